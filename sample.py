"""Pictures in; splats, turning views, a film of the denoising and a page to look around in out.

    python sample.py car.png                          # any picture of one object
    python sample.py a.png photos 'more/*.jpg' --samples 8 --seed 1 --format gif,splat
    python sample.py scene.ply                        # look at splats that are there already

writes into out/car/: viewer.html, to be opened in a browser; sample.png, the input and every sample
from five sides; turntable.webp; film.webp, the samples condensing from noise; input.png, what the
network was shown; and one .ply a sample in the standard 3DGS layout. The same seed gives the same
files. A picture that fails is named in one line, the others are still made, and the exit code is 1.
"""
import argparse
import base64
import glob
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, features
from tqdm import tqdm

import data
from model import (STEPS, Denoiser, S, T, ddim_step, denoise, load_network, pick_device,
                   write_atomically)
from rasterize import ALPHA_MIN, C0, LOW_PASS, NEAR, Camera, Gaussians, render, transform
from teacher import Teacher

# ---- pictures from the wild ----------------------------------------------------------------------
# Framing of the training pictures, measured: in the 3,008 views of 28 procedural cars at 128 pixels
# (data.prepare("cars", root, 128, 20, 8)) the longer side of the subject's bounding box takes 0.375
# to 0.781 of the picture, median 0.67; its middle lies at x 0.43 to 0.58, y 0.47 to 0.62, medians
# 0.50 and 0.54; the background takes 0.757 to 0.930 of the pixels and the whole border. 250 views
# of meshes in SRN's layout and pixelNeRF's three photographs lie there too (background from 0.748).
SIDE, SIDES = 0.67, (0.35, 0.80)                                  # framed to; left as it is
MIDDLE, MIDDLES = (0.50, 0.54), [(0.40, 0.60), (0.44, 0.64)]      # x, y
EMPTY = 0.70, 0.95                                                # background; else a warning
# How well the shipped weights redraw the picture itself tells what they know: on held-out cars 33
# to 38 dB, on those photographs and 15 views of five other meshes 26 to 32, on chairs 20 to 22.
STRANGE = 12                                                      # dB below held-out; a warning
MOST_PIXELS = 50_000_000                                          # of a file: bounds the memory


def read_upright(path, background, most):
    """-> (h, w, 3) uint8 on the background and (h, w) uint8 alpha, turned as the EXIF orientation
    says, and shrunk by a whole factor if they are more than `most` pixels long."""
    rgb, both = Image.fromarray(data.read_picture(path, background)), []
    with Image.open(path) as file:
        alpha = (file.convert("RGBA").getchannel("A") if file.has_transparency_data
                 else Image.new("L", file.size, 255))
        try:
            orientation = file.getexif().get(0x0112, 1)
        except Exception:                       # EXIF of nonsense raises many things: as it stands
            orientation = 1
    for image in rgb, alpha:
        image.getexif()[0x0112] = orientation
        image = ImageOps.exif_transpose(image)
        both.append(np.asarray(image.reduce(max(1, max(image.size) // most))))
    return both


def find_subject(rgb, alpha, background):
    """-> (rgb with the training background behind the subject, (h, w) bool subject), the latter
    None where no background can be told. By alpha, else by distance from the border's colour."""
    if alpha.min() < 128:
        return rgb, alpha > 127
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]).astype(float)   # (b, 3)
    behind = np.median(border, 0)                                             # (3,)
    noise = np.quantile(abs(border - behind).max(1), 0.9)                     # grey levels
    if noise > 24:
        return rgb, None
    slack = 8 + 2 * noise
    far = abs(rgb - behind).max(-1)                                           # (h, w) grey levels
    cover = (far / slack - 1).clip(0, 1)                                      # (h, w) in [0, 1]
    if (border != background).any():   # a matte: the edges' share of the old colour turns new
        new = rgb + (1 - cover[..., None]) * (background - behind)            # (h, w, 3)
        new = np.where(cover[..., None] > 0, new, background)
        rgb = (new.clip(0, 255) + .5).astype(np.uint8)
    return rgb, cover > 0.5


def frame(rgb, subject, background, size):
    """(h, w, 3) -> (size, size, 3): padded to a square, and if the subject (h, w) does not lie in
    that as in the training pictures, cropped and padded until it does."""
    h, w = rgb.shape[:2]
    side = max(h, w)
    corner = np.array([(w - side + 1) // 2, (h - side + 1) // 2])             # x y, at most 0
    if subject is not None:
        x, y = np.flatnonzero(subject.any(0)), np.flatnonzero(subject.any(1))
        extent = max(x[-1] - x[0], y[-1] - y[0]) + 1                          # pixels
        middle = np.array([x[0] + x[-1] + 1, y[0] + y[-1] + 1]) / 2           # x y
        inside = [low <= value <= high for value, (low, high) in zip(
            [extent / side, *(middle - corner) / side], [SIDES, *MIDDLES])]
        if not all(inside):
            side = round(extent / SIDE)
            corner = (middle - side * np.array(MIDDLE)).round().astype(int)
    canvas = Image.new("RGB", (side, side), tuple(background))
    canvas.paste(Image.fromarray(rgb), tuple((-corner).tolist()))
    return data.resize(np.asarray(canvas), size)


def prepare(path, size, background):
    """A file -> (size, size, 3) uint8 as in training, and warnings where that may not succeed."""
    background, notes = (255 * np.array(background) + .5).astype(int), []
    rgb, alpha = read_upright(path, background / 255, 16 * size)
    rgb, subject = find_subject(rgb, alpha, background)
    if subject is not None and not subject.any():
        data.fail(f"{path}: there is nothing but background; give a picture of an object")
    pixels = frame(rgb, subject, background.tolist(), size)
    if subject is None:
        return pixels, ["its background has not one colour; for good splats cut the object out, "
                        "on a transparent or plain ground"]
    if subject[[0, -1]].any() or subject[:, [0, -1]].any():
        notes.append("the object is cut off by the picture's edge; in training it never is")
    empty = (abs(pixels - background).max(-1) <= 8).mean()
    if not EMPTY[0] <= empty <= EMPTY[1]:
        notes.append(f"background is {empty:.0%} of it, in training {EMPTY[0]:.0%} to "
                     f"{EMPTY[1]:.0%}; splats may be poor")
    return pixels, notes


# ---- cameras -------------------------------------------------------------------------------------
# A network's splats live in its source camera's frame. All that leaves this file is in the upright
# frame instead: the object's middle at the origin, level OpenCV axes (y down, z forward), which is
# what viewers of .ply files expect. How far the source camera looked down is not known from one
# picture: `elevation` says. `look` is a dict of distance, near, elevation in degrees, focal / side
# of the picture, and background.

def pitch(elevation):
    """(4, 4) rotation about x: from the source camera's axes to level ones, y straight down."""
    c, s = math.cos(math.radians(elevation)), math.sin(math.radians(elevation))
    return torch.tensor([[1., 0, 0, 0], [0, c, s, 0], [0, -s, c, 0], [0, 0, 0, 1]])


def upright(g, look):
    """From the source camera's frame to the upright one: centres, axes and colours alike."""
    middle = torch.eye(4)
    middle[2, 3] = -look["distance"]                                          # source -> object
    pose = (pitch(look["elevation"]) @ middle).to(g.xyz.device)               # (4, 4)
    return transform(g, pose.expand(len(g.xyz), 4, 4))


def orbit(angles, look):
    """Cameras around the origin, at angle 0 the source's: (V,) radians -> w2c (1, V, 4, 4)."""
    c, s, o = angles.cos(), angles.sin(), torch.zeros_like(angles)            # (V,)
    one = torch.ones_like(angles)
    spin = torch.stack([c, o, s, o, o, one, o, o, -s, o, c, o, o, o, o, one], -1).view(-1, 4, 4)
    back = torch.eye(4)
    back[2, 3] = look["distance"]
    return (back @ pitch(look["elevation"]).T @ spin)[None]


def widen(g, look, size):
    """Splats learn where the renderer widens each by LOW_PASS px^2; seen from nearer, or in more
    pixels, gaps open between them. This gives each that width for good, in world units."""
    pixel = look["distance"] / (look["focal"] * size)                         # at the object
    return g._replace(scale=(g.scale ** 2 + LOW_PASS * pixel ** 2).sqrt())    # (B, N, 3)


def photograph(g, angles, look, side):
    """B objects from V angles -> (B, V, side, side, 3) uint8, in few calls that fit the memory."""
    B, N = g.opacity.shape
    f = look["focal"] * side
    K = torch.tensor([f, f, side / 2, side / 2], device=g.xyz.device)         # (4,) pixels
    background, images = torch.tensor(look["background"], device=g.xyz.device), []
    parts = angles.split(max(1, 4_000_000 // (B * N)))
    for part in tqdm(parts, "rendering", leave=False, disable=len(parts) < 4 or None):
        w2c = orbit(part, look).to(g.xyz.device).expand(B, -1, -1, -1)        # (B, V', 4, 4)
        cam = Camera(w2c, K.expand(B, len(part), 4), (side, side))
        x, _, _ = render(g, cam, background, near=look["near"])               # (B, V', 3, P, P)
        images.append((x.clamp(0, 1) * 255 + 0.5).byte().permute(0, 1, 3, 4, 2).cpu())
    return torch.cat(images, 1).numpy()


def turn(views):
    """(views,) angles of one turn, in radians."""
    return torch.arange(views) * (2 * math.pi / views)


# ---- .ply and .splat -----------------------------------------------------------------------------

PLY = [*"x y z nx ny nz f_dc_0 f_dc_1 f_dc_2".split(), *(f"f_rest_{i}" for i in range(45)),
       *"opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()]    # 62 properties
NEEDED, REST = PLY[:3] + PLY[6:9] + PLY[54:], PLY[9:54]                       # all but normals; SH
TYPES = dict(zip("char uchar short ushort int uint float double int8 uint8 int16 uint16 int32 "
                 "uint32 float32 float64".split(), "i1 u1 <i2 <u2 <i4 <u4 <f4 <f8".split() * 2))


def ply_bytes(g):
    """Gaussians of one object (B = 1) -> a binary .ply as 3D Gaussian Splatting writes it: logit
    opacity, log scale, w x y z; f_rest holds 15 coefficients of red, then green, then blue."""
    N = g.xyz.shape[1]
    rest = torch.zeros(N, 3, 15, device=g.xyz.device)                         # degrees 1 to 3
    rest[:, :, : g.sh.shape[2] - 1] = g.sh[0, :, 1:].mT                       # we have degree 1
    opacity = g.opacity[0, :, None].logit(torch.finfo(g.opacity.dtype).eps)   # (N, 1)
    columns = torch.cat([g.xyz[0], torch.zeros_like(g.xyz[0]), g.sh[0, :, 0], rest.flatten(1),
                         opacity, g.scale[0].log(), g.quat[0]], 1)            # (N, 62)
    header = "\n".join(["ply", "format binary_little_endian 1.0", f"element vertex {N}",
                        *(f"property float {name}" for name in PLY), "end_header\n"])
    return header.encode() + columns.cpu().numpy().astype("<f4").tobytes()


def splat_bytes(g):
    """Gaussians of one object -> .splat, 32 bytes each, the most important first: float32 centre
    and scale, uint8 rgba and quaternion. Colours that change with the direction do not fit in."""
    order = (g.opacity[0] * g.scale[0].prod(-1)).argsort(descending=True, stable=True)    # (N,)
    xyz, scale, quat, opacity, sh = [x[0, order].cpu() for x in g]
    rgba = 255 * torch.cat([0.5 + C0 * sh[:, 0], opacity[:, None]], 1)        # (N, 4)
    quat = 128 + 128 * torch.nn.functional.normalize(quat, dim=-1)            # (N, 4)
    parts = [x.numpy().astype("<f4").view(np.uint8) for x in (xyz, scale)]    # (N, 12) each
    parts += [x.round().clamp(0, 255).byte().numpy() for x in (rgba, quat)]   # (N, 4) each
    return np.concatenate(parts, 1).tobytes()


def ply_columns(path):
    """The vertices of a binary .ply -> structured array (N,), a field for each property."""
    with open(path, "rb") as file:
        lines = [["ply"]] if file.readline(1000).split() == [b"ply"] else []
        while lines and lines[-1] != ["end_header"] and len(lines) < 1000:
            lines.append(file.readline(1000).decode("ascii", "replace").split())
        if not lines or lines[-1] != ["end_header"]:
            data.fail(f"{path}: not a .ply file: it does not begin with a header; name another")
        form = " ".join(next((line[1:] for line in lines if line[:1] == ["format"]), []))
        if form != "binary_little_endian 1.0":
            data.fail(f"{path}: its format is {form!r}; convert it to binary_little_endian 1.0")
        elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]] + [-1]
        try:
            _, name, count = lines[elements[0]]
            count, kind = int(count), np.dtype([
                (line[2], TYPES[line[1]]) for line in lines[elements[0]:elements[1]]
                if line[:1] == ["property"]])
        except (IndexError, KeyError, ValueError):
            data.fail(f"{path}: its header makes no sense; export it again as a 3DGS .ply")
        if name != "vertex":
            data.fail(f"{path}: it begins with {name!r}, not with splats; export it uncompressed")
        left = os.fstat(file.fileno()).st_size - file.tell()                  # bytes
        room = left // kind.itemsize if kind.itemsize else 0
        if not 0 < count <= room:
            data.fail(f"{path}: its header promises {count} splats, there are {room}; copy or "
                      "export it again")
        return np.fromfile(file, kind, count)


def read_ply(path):
    """A 3DGS .ply -> (Gaussians (1, N, ..) in double precision, so that `ply_bytes` gives back the
    same bytes; what we cannot draw and so have dropped, in words)."""
    try:
        columns = ply_columns(path)
    except OSError as e:
        data.fail(f"{path}: {e.strerror or e}; name another file")
    names = set(columns.dtype.names)
    K = len(names.intersection(REST)) // 3                       # SH coefficients a colour, but dc
    absent = [name for name in NEEDED + REST[:3 * K] if name not in names]
    if absent or K not in (0, 3, 8, 15):
        data.fail(f"{path}: not 3DGS splats: {', '.join(absent) or 'some f_rest'} missing; export "
                  "it with a 3DGS tool")
    sh1 = [REST[c * K + k] for k in range(min(K, 3)) for c in range(3)]       # red green blue of k1
    x = torch.from_numpy(np.stack([columns[name] for name in NEEDED + sh1], 1).astype(np.float64))
    x[:, 6].sigmoid_()                                                        # opacity
    x[:, 7:10].exp_()                                                         # scale
    ok = x.float().isfinite().all(1)                                          # (N,)
    if not ok.any():
        data.fail(f"{path}: none of its splats is made of finite numbers; export it again")
    xyz, dc, opacity, scale, quat, sh1 = x[None, ok].split([3, 3, 1, 3, 4, len(sh1)], -1)
    sh = torch.cat([dc, sh1], -1).unflatten(-1, (-1, 3))                      # (1, N, 1 or 4, 3)
    more = [REST[c * K + k] for c in range(3) for k in range(3, K)]
    lost = [f"{(~ok).sum():,} splats with NaN or Inf"] * bool((~ok).any())
    lost += ["SH above degree 1"] * any(columns[name].any() for name in more)
    lost += [", ".join(sorted(names.difference(PLY)))] * bool(names.difference(PLY))
    return Gaussians(xyz, scale, quat, opacity[..., 0], sh), "; ".join(lost)


SPLATS = {"ply": ply_bytes, "splat": splat_bytes}


# ---- animations ----------------------------------------------------------------------------------

MOVIES = "webp", "gif", "mp4"


def animation(frames, kind, fps):
    """[(h, w, 3) uint8] -> the bytes of an animation that loops."""
    if kind == "mp4":
        return mp4(frames, fps)
    first, *rest = map(Image.fromarray, frames)
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return file.getvalue()


def mp4(frames, fps):
    """By ffmpeg, which reads raw frames; the codec that plays everywhere wants even sides."""
    h, w = frames[0].shape[:2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "film.mp4")
        call = (f"ffmpeg -v error -f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {fps} -i - -vf pad=ceil("
                "iw/2)*2:ceil(ih/2)*2 -pix_fmt yuv420p -movflags +faststart").split()
        made = subprocess.run([*call, path], input=np.stack(frames).tobytes(), capture_output=True)
        if made.returncode:
            said = made.stderr.decode(errors="replace").split("\n")[0]
            data.fail(f"ffmpeg made no mp4 ({said}); use --format webp or gif")
        return path.read_bytes()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# ---- viewer.html ---------------------------------------------------------------------------------
# One page that a browser opens without a network: assets/viewer.html with the splats put in. Four
# samples of 16,384 splats with their 10 steps are 60 MB of float32; packed as below, a car is 3.

def quantise(steps):
    """Gaussians of the steps of one object, each (1, N, ..) -> (q, low, high).

    q (steps, 23, n) int32 in 0..65535 stands for low + q / 65535 (high - low); low, high (23,). Of
    the N splats n are kept, those that are drawn in some step. The 23 numbers: xyz, opacity, quat,
    log scale, 4 x rgb of SH, where degree 0 has zeros.
    """
    x = torch.stack([torch.cat([g.xyz[0], g.opacity[0, :, None], g.quat[0],
                                g.scale[0].clamp(min=1e-9).log(), g.sh[0].flatten(1)], 1)
                     for g in steps])                                         # (steps, N, 14 | 23)
    x = torch.nn.functional.pad(x, (0, 23 - x.shape[2]))                      # (steps, N, 23)
    drawn = (x[..., 3] >= ALPHA_MIN).any(0) & x.isfinite().all(2).all(0)      # (N,)
    x = x[:, drawn].mT.cpu()                                                  # (steps, 23, n)
    low, high = (x.amin((0, 2)), x.amax((0, 2))) if drawn.any() else torch.zeros(2, 23)
    unit = ((high - low) / 65535).clamp(min=1e-30)[:, None]                   # (23, 1)
    return ((x - low[:, None]) / unit).round().int().clamp(0, 65535), low, high


def viewer_html(title, picture, objects, look):
    """A page that shows splats from all sides -> str.

    picture: the input (PIL), or None. objects: {name: [Gaussians of every denoising step]}, each
    B = 1, upright: the object's middle at the origin, y straight down. look: distance of the
    camera, the elevation in degrees from which it first looks, focal = fx / side of the image,
    background (3,).
    """
    packed = []
    for name, steps in objects.items():
        q, low, high = quantise(steps)
        # The last step has 16 bits; the others 8, as differences to the step after them, which are
        # small numbers, so zlib packs them well.
        last_low = (q[-1:] & 255).numpy().astype(np.uint8)                    # (1, 23, n)
        backward = (q >> 8).flip(0).numpy().astype(np.uint8)                  # (steps, 23, n)
        change = np.diff(backward, axis=0)                                    # modulo 256
        stream = b"".join(map(np.ndarray.tobytes, (last_low, backward[:1], change)))
        packed.append(dict(name=name, n=q.shape[2], steps=len(q), low=low.tolist(),
                           high=high.tolist(),
                           data=base64.b64encode(zlib.compress(stream, 9)).decode()))
    if picture is not None:
        file, small = io.BytesIO(), picture.convert("RGB")
        small.thumbnail((512, 512))
        small.save(file, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    scene = dict(title=title, picture=picture, objects=packed, look={"near": NEAR, **look})
    # Inside <script> only "<" could end the text early; JSON has another spelling for it.
    text = json.dumps(scene).replace("<", "\\u003c")
    template = Path(__file__).parent / "assets" / "viewer.html"
    return template.read_text(encoding="utf-8").replace("{{scene}}", text)


# ---- the script ----------------------------------------------------------------------------------

SPENT = {}   # seconds by kind of work, for --verbose


@contextmanager
def timed(work):
    start = time.perf_counter()
    yield
    SPENT[work] = SPENT.get(work, 0) + time.perf_counter() - start


def one(g, k):
    """Object k of a batch, as a batch of its own."""
    return Gaussians(*[x[k: k + 1] for x in g])


def shown(title, picture, objects, g, look, a, states=()):
    """Yields (name, bytes) of what is to be looked at: g (B, N, ..), the results, and `states`, one
    g for each view of a first turn in which they condense from noise."""
    with timed("render"):
        five = photograph(g, turn(5), look, a.size)                           # (B, 5, P, P, 3)
        views = photograph(g, turn(a.views), look, a.size)                    # (B, V, P, P, 3)
    rows = five.swapaxes(1, 2).reshape(-1, 5 * a.size, 3)                     # (B P, 5 P, 3)
    if picture:
        big = np.asarray(picture.resize((a.size, a.size), Image.Resampling.BICUBIC))
        rows = np.concatenate([np.tile(big, (len(five), 1, 1)), rows], 1)     # (B P, 6 P, 3)
    yield "sample.png", png(rows)

    with timed("viewer"):
        page = viewer_html(title, picture, objects, look).encode()
    yield "viewer.html", page

    across = views.transpose(1, 2, 0, 3, 4).reshape(a.views, a.size, -1, 3)   # (V, P, B P, 3)
    with timed("turntable"):
        table = animation(list(across), a.movie, a.fps)
    yield f"turntable.{a.movie}", table

    if states:
        with timed("film"):
            frames = [photograph(s, angle[None], look, a.size)[:, 0]          # (B, P, P, 3)
                      for s, angle in zip(states, turn(a.views))]
            frames = [np.concatenate(list(x), 1) for x in frames]             # (P, B P, 3)
            film = animation([*frames, *across], a.movie, a.fps)
        yield f"film.{a.movie}", film


def trajectory(denoiser, x_src, a):
    """Sampling that remembers -> [(s_t, t, s_hat)], one for each DDIM step."""
    trail, cfg = [], denoiser.cfg
    def watched(s_t, t, x_src):
        trail.append((s_t, t, denoiser(s_t, t, x_src)))
        return trail[-1][2]
    eps = torch.randn(a.samples, S, cfg.size, cfg.size,
                      generator=torch.Generator().manual_seed(a.seed)).to(a.device)
    t = torch.full((a.samples,), T - 1, device=a.device)
    steps = denoise(watched, eps, t, x_src.expand(a.samples, -1, -1, -1), a.steps)
    list(tqdm(steps, "denoising", a.steps, leave=False, disable=None))
    return trail


def condense(trail, views):
    """Yields s_t at as many moments, slower towards the end. Between two steps it is what DDIM,
    which believes in one s_hat until the next, would have at that level of noise."""
    for i in tqdm(range(views), "film", leave=False, disable=None):
        k = len(trail) * (1 - (1 - i / views) ** 2)                           # step, with fraction
        s_t, now, s_hat = trail[int(k)]
        then = trail[int(k) + 1][1] if k < len(trail) - 1 else 0 * now
        yield ddim_step(s_t, s_hat, now, now + (then - now) * (k % 1))        # (samples, 24, H, W)


def redrawn(g, K, pixels, background):
    """PSNR in dB of one object's splats, in their source camera K (1, 4 or 5), and its picture."""
    source = Camera(torch.eye(4, device=K.device)[None, None], K[None], pixels.shape[:2])
    x_hat, _, _ = render(g, source, torch.tensor(background, device=K.device))
    x_hat = x_hat[0, 0].permute(1, 2, 0).cpu().numpy()                        # (size, size, 3)
    return -10 * math.log10(np.square(x_hat - pixels / 255).mean() + 1e-10)


def from_picture(path, networks, a):
    """Yields (name, bytes) of all the files of one picture."""
    denoiser, teacher, meta, usual = networks
    cfg = denoiser.cfg
    middle = (cfg.near + cfg.far) / 2 + sum(meta["K"][4:])                    # of the object
    look = dict(distance=middle, near=NEAR,
                elevation=a.elevation, focal=meta["K"][0] / cfg.size,
                background=list(meta["background"]))
    with timed("read"):
        pixels, notes = prepare(path, cfg.size, look["background"])           # (size, size, 3)
    for note in notes:
        print(f"warning: {path}: {note}", file=sys.stderr)
    yield "input.png", png(pixels)

    with timed("denoise"):
        x_src = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(a.device) / 255
        trail = trajectory(denoiser, x_src, a)
    K = torch.tensor([meta["K"]], device=a.device)                            # (1, 4 or 5)
    psnr = redrawn(denoiser.gaussians(trail[-1][2][:1], K), K, pixels, look["background"])
    if usual and psnr < usual - STRANGE:
        print(f"warning: {path}: its own view comes back at {psnr:.0f} dB, {usual:.0f} is usual: "
              f"these weights know {meta['dataset']}, and see something else", file=sys.stderr)
    def place(network, s):
        """Splats of any step -> Gaussians in the upright frame."""
        g = network.gaussians(s, K.expand(len(s), -1))
        return upright(widen(g, look, cfg.size), look)
    every = [place(denoiser, s_hat) for _, _, s_hat in trail]                 # g after each step
    objects = {f"sample {k}": [one(g, k).to("cpu") for g in every] for k in range(a.samples)}
    if teacher:
        objects["teacher"] = [place(teacher, teacher(x_src[:, None])).to("cpu")]
    states = (place(denoiser, s_t) for s_t in condense(trail, a.views))
    yield from shown(path.name, Image.fromarray(pixels), objects, every[-1], look, a, states)
    for kind in a.splats or ["ply"]:
        for k in range(a.samples):
            with timed(kind):
                content = SPLATS[kind](one(every[-1], k))
            yield f"sample_{k}.{kind}", content


def from_ply(path, a):
    """Yields (name, bytes) of all the files of splats that are there already; these are copied only
    into a format that is asked for."""
    with timed("read"):
        g, lost = read_ply(path)
    print(f"{path}: {g.xyz.shape[1]:,} splats" + f"; not kept: {lost}" * bool(lost))
    solid = g.xyz[g.opacity > min(0.1, g.opacity.median())].numpy()           # (n, 3) not faint
    low, high = np.quantile(solid if len(solid) else g.xyz[0], [0.02, 0.98], 0)     # (3,) each
    distance = max(1.3 * float(np.linalg.norm(high - low)), 1e-3)
    look = dict(distance=distance, near=distance / 10, elevation=a.elevation,
                focal=131.25 / 128, background=[1., 1., 1.])                  # as SRN looks at cars
    print(f"camera: {distance:.3g} from the middle of the box that bounds all but 2 % of the solid "
          "splats on each side, 1.3 times its diagonal; y is taken to point down")
    seen = g._replace(xyz=g.xyz - torch.from_numpy(low + high) / 2).to(a.device, torch.float32)
    yield from shown(path.name, None, {path.stem: [seen.to("cpu")]}, seen, look, a)
    for kind in a.splats:
        with timed(kind):
            content = SPLATS[kind](g)
        yield f"{path.stem}.{kind}", content


def find_inputs(names):
    """Files, folders and patterns -> (paths, a line for each name that gives none)."""
    known, paths, errors = {*Image.registered_extensions(), ".ply"}, [], []
    for name in names:
        if os.path.isdir(name):
            found = sorted(p for p in Path(name).glob("*") if p.suffix.lower() in known)
        elif os.path.exists(name) or not glob.has_magic(name):
            found = [Path(name)]
        else:
            found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
        if not found:
            errors.append(f"error: {name}: no pictures or .ply files there; name others")
        paths += found
    errors += [f"error: {str(p)!r}: cannot be printed; rename it" for p in paths
               if not str(p).isprintable()]
    return list(dict.fromkeys(p for p in paths if str(p).isprintable())), errors


def folders(paths, out):
    """A folder of results for each path: out/<name>, and where two of the names are the same,
    out/<path below the folder that all share>. A single path may have `out` itself."""
    if len(paths) == 1 and out:
        return [Path(out)]
    names = [path.stem for path in paths]
    if len({name.lower() for name in names}) < len(paths):
        top = os.path.commonpath([path.absolute().parent for path in paths])
        names = [path.absolute().relative_to(top) for path in paths]
    return [Path(out or "out") / name for name in names]


def pick_weights():
    """The newest student that train.py left in out/, else the one that comes with the code."""
    found = [*Path("out").glob("*/stage_2.pt"), *Path(__file__).parent.glob("weights/cars.pt")]
    if not found:
        data.fail("no weights: none in out/*/stage_2.pt or weights/; first: python train.py, or "
                  "name a file with --weights")
    return max(found, key=lambda path: (path.parts[0] == "out", path.stat().st_mtime))


def load_networks(a):
    """-> (denoiser, the teacher beside it or None, meta, PSNR in dB at which held-out source views
    come back or None)."""
    path = Path(a.weights) if a.weights else pick_weights()
    denoiser, meta = load_network(path, Denoiser, a.device)
    denoiser.to(memory_format=torch.channels_last)   # half the time on a CPU
    a.steps = a.steps or meta.get("steps", STEPS)    # with others the last is not the best
    kind = "procedural" if meta["data"]["procedural"] else "real"
    print(f"weights: {path} ({meta['dataset']}, {kind}, {denoiser.cfg.size} pixels)")
    teacher = None
    if (path.parent / "teacher.pt").exists():
        teacher, _ = load_network(path.parent / "teacher.pt", Teacher, a.device)
        teacher = teacher if teacher.cfg.size == denoiser.cfg.size else None
    usual, results = meta.get("scores"), path.parent / "results.json"         # of train.py
    if results.exists() and not usual:
        usual = json.loads(results.read_text())["table"].get(path.stem.replace("_", " "))
    return denoiser, teacher, meta, usual and usual["psnr_source"]


def arguments():
    parser = argparse.ArgumentParser(
        description="Splats from pictures, each of one object; or a look at splats in .ply files.",
        epilog="Open viewer.html in a browser; the .ply files open in the usual 3DGS viewers.")
    add = parser.add_argument
    add("image", nargs="+", help="pictures, .ply files, folders of them, or quoted patterns")
    add("--weights", metavar="FILE", help="a stage_1.pt or stage_2.pt; default: the newest in out/")
    add("--out", metavar="FOLDER", help="of the results, default out/<name>; with several inputs "
        "each has a folder in it")
    add("--samples", metavar="N", type=int, default=4, help="how many of each picture; default 4")
    add("--seed", metavar="N", type=int, default=0, help="another seed, other samples; default 0")
    add("--steps", metavar="N", type=int, help="DDIM steps; default: as many as in training")
    add("--format", default="", metavar="A,B", help="of the animations: webp, gif or, where there "
        "is ffmpeg, mp4; of the splats: ply, splat or both; default webp,ply")
    add("--views", metavar="N", type=int, default=36, help="frames of one turn; default 36")
    add("--fps", metavar="N", type=int, default=12, help="frames a second; default 12")
    add("--size", metavar="N", type=int, default=192, help="pixels of a rendering; default 192")
    add("--elevation", metavar="X", type=float, default=25.0,
        help="degrees by which the picture looks down on the object; default 25")
    add("--device", metavar="NAME", default="", help="default: the GPU if there is one")
    add("--verbose", action="store_true", help="say where the time goes")
    return parser


def check(a):
    """Flags that make no sense are refused before any work."""
    for name, (least, most) in dict(samples=(1, 1000), steps=(1, T - 1), views=(1, 1000),
                                    fps=(1, 100), size=(1, 2048), seed=(0, 2 ** 63 - 1),
                                    elevation=(-90, 90)).items():
        if getattr(a, name) is not None and not least <= getattr(a, name) <= most:
            data.fail(f"--{name} {getattr(a, name)}: give {least} to {most}")
    if a.samples * a.size > 16383:   # what WebP can hold
        data.fail(f"--samples {a.samples} --size {a.size}: together more than 16383 pixels wide; "
                  "give less of either")
    names = a.format.split(",") if a.format else []
    for name in names:
        if name not in (*MOVIES, *SPLATS):
            data.fail(f"--format {name}: there are {', '.join((*MOVIES, *SPLATS))}")
    if "mp4" in names and not shutil.which("ffmpeg"):
        data.fail("--format mp4: there is no ffmpeg here; install it, or choose webp or gif")
    a.movie = next((name for name in names if name in MOVIES),
                   "webp" if features.check("webp") else "gif")
    a.splats = [name for name in names if name in SPLATS]
    a.device = pick_device(a.device)


@torch.no_grad()
def main():
    a = arguments().parse_args()
    check(a)
    warnings.simplefilter("ignore", UserWarning)                      # Pillow's, about odd files
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS

    paths, errors = find_inputs(a.image)
    given = {path.resolve() for path in paths}
    is_ply = [path.suffix.lower() == ".ply" for path in paths]
    with timed("load"):
        networks = None if all(is_ply) else load_networks(a)
    for path, out, ply in zip(paths, folders(paths, a.out), is_ply):
        try:
            names = []
            for name, content in from_ply(path, a) if ply else from_picture(path, networks, a):
                if (out / name).resolve() in given:
                    data.fail(f"{out / name}: is an input, not written over; choose another --out")
                write_atomically(out / name, lambda f: f.write(content))
                names.append(name)
            print(f"{path} -> {out}/: {' '.join(names)}", flush=True)
        except SystemExit as stop:                        # bad input: the others are still made
            errors.append(str(stop))
    if a.verbose:
        print("seconds:", ", ".join(f"{work} {s:.1f}" for work, s in SPENT.items()))
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main()
