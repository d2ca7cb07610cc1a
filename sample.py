"""Turn a picture into splats, a film of the denoising and a page to look around in.

    python sample.py car.png                                   # any picture of one object
    python sample.py a.png photos --samples 8 --seed 1         # several, and folders of pictures
    python sample.py car.png --view back.png --pose back.txt   # guided by a further view
    python sample.py path/to/object --views 64,104             # view 64 of a dataset's object,
                                                               # guided by its view 104
writes into out/car/: viewer.html, a page to look around in; sample.png, the input and every sample
from several sides; turntable.webp; film.webp, the samples condensing from noise; input.png, what
the network was shown; and for each sample a .ply in the standard 3DGS layout. The same seed gives
the same files. A picture that fails is named in one line, and the others are still made.

A pose file holds 16 numbers, a rigid 4 x 4 matrix by rows: from the further camera's frame to the
source camera's frame, both with OpenCV's axes (x right, y down, z forward), in the world units of
the training data. Pictures with a pose, and their source, must be square and are not framed.
"""
import argparse
import base64
import io
import json
import math
import os
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import data
from model import (STEPS, Denoiser, S, T, ddim_step, denoise, load_network, pick_device,
                   write_atomically)
from rasterize import (ALPHA_MIN, LOW_PASS, NEAR, Camera, Gaussians, invert_pose, render,
                       transform)
from teacher import Teacher

HERE = Path(__file__).parent
SIDES = 24      # of one turn, from which the samples are compared: every 15 degrees
STRANGE = 11    # dB below held-out cars at which a picture is warned of; chairs lie there


# ---- noise -> splats -----------------------------------------------------------------------------

def guidance(network, x, cam, background):
    """-> guide(s) for `denoise`: the error (B,) of splats s (B, 24, H, W) of the denoiser, or raw
    ones of the teacher, in all views but the first, the source. x (1, V, 3, H, W) in [0, 1]."""
    def guide(s):
        B = len(s)
        g = network.gaussians(s, cam.K[:, 0].expand(B, -1))
        w2c = cam.w2c[:, 1:].expand(B, -1, -1, -1)                            # (B, V-1, 4, 4)
        K = cam.K[:, 1:].expand(B, -1, -1)                                    # (B, V-1, 4 or 5)
        x_hat, _, _ = render(g, Camera(w2c, K, cam.hw), background)           # (B, V-1, 3, H, W)
        return (x_hat - x[:, 1:]).square().mean((1, 2, 3, 4))                 # (B,)
    return guide


def trajectory(denoiser, x_src, guide, a):
    """Sampling that remembers: x_src (1, 3, H, W) -> [(s_t, t, s_hat)], one for each DDIM step."""
    trail = []

    def watched(s_t, t, x_src):
        s_hat = denoiser(s_t, t, x_src)                                       # (B, 24, H, W)
        trail.append((s_t.detach(), t, s_hat.detach()))
        return s_hat
    noise = torch.Generator().manual_seed(a.seed)      # on the CPU: the same for every device
    eps = torch.randn(a.samples, S, *x_src.shape[2:], generator=noise).to(a.device)
    t = torch.full((a.samples,), T - 1, device=a.device)                      # (B,)
    x_src = x_src.expand(a.samples, -1, -1, -1)                               # (B, 3, H, W)
    steps = denoise(watched, eps, t, x_src, a.steps, guide)
    list(tqdm(steps, "denoising", a.steps, leave=False, disable=None))
    return trail


def condense(trail, frames):
    """Yields s_t (B, 24, H, W) at as many moments, slower towards the end. Between two DDIM steps
    it is what a step to the level between them would give."""
    for i in tqdm(range(frames), "film", leave=False, disable=None):
        k = len(trail) * (1 - (1 - i / frames) ** 2)                          # step, with fraction
        s_t, now, s_hat = trail[int(k)]
        then = trail[int(k) + 1][1] if k < len(trail) - 1 else 0 * now        # (B,)
        yield ddim_step(s_t, s_hat, now, now + (then - now) * (k % 1))


# ---- cameras -------------------------------------------------------------------------------------
# A network's splats live in its source camera's frame. All that leaves this file is in the upright
# frame instead: the object's middle at the origin, level OpenCV axes (y down, z forward), which is
# what viewers of .ply files expect. One picture does not tell how far its camera looked down:
# `elevation` does. `look` is a dict of distance, elevation in degrees, focal / side of the picture,
# and background.

def level(look):
    """(4, 4) pose from the source camera's frame to the upright one."""
    c = math.cos(math.radians(look["elevation"]))
    s = math.sin(math.radians(look["elevation"]))
    z = look["distance"]
    return torch.tensor([[1., 0, 0, 0], [0, c, s, -s * z], [0, -s, c, -c * z], [0, 0, 0, 1]])


def upright(g, look):
    """From the source camera's frame to the upright one: centres, axes and colours alike."""
    return transform(g, level(look).to(g.xyz.device).expand(len(g.xyz), 4, 4))


def turn(count):
    """(count,) angles of one turn, in radians; the source camera stands at 0."""
    return torch.arange(count) * (2 * math.pi / count)


def orbit(angles, look):
    """Cameras around the origin: (V,) radians -> w2c (1, V, 4, 4)."""
    spin = torch.eye(4).repeat(len(angles), 1, 1)                             # (V, 4, 4)
    spin[:, 0, 0] = spin[:, 2, 2] = angles.cos()
    spin[:, 0, 2] = angles.sin()
    spin[:, 2, 0] = -angles.sin()
    return (invert_pose(level(look)) @ spin)[None]


def widen(g, look, size):
    """Splats learn where the renderer widens each by LOW_PASS px^2; seen from nearer, or in more
    pixels, gaps open between them. This gives each that width for good, in world units."""
    pixel = look["distance"] / (look["focal"] * size)                         # at the object
    return g._replace(scale=(g.scale ** 2 + LOW_PASS * pixel ** 2).sqrt())    # (B, N, 3)


def photograph(g, angles, look, side):
    """B objects from V angles -> (B, V, side, side, 3) uint8. One angle at a time: bounds the
    memory."""
    B = len(g.xyz)
    f = look["focal"] * side
    K = g.xyz.new_tensor([f, f, side / 2, side / 2]).expand(B, 1, 4)          # pixels
    background = g.xyz.new_tensor(look["background"])                         # (3,)
    images = []
    for w2c in orbit(angles, look).to(g.xyz.device).split(1, 1):              # (1, 1, 4, 4)
        cam = Camera(w2c.expand(B, 1, 4, 4), K, (side, side))
        x, _, _ = render(g, cam, background)               # (B, 1, 3, P, P)
        images.append((x.clamp(0, 1) * 255 + 0.5).byte().movedim(2, -1).cpu())
    return torch.cat(images, 1).numpy()


def differences(g, look, size):
    """Standard deviation between the B samples, mean over the pixels, from each side -> (SIDES,)
    in [0, 1]; 0 for a single sample."""
    x = torch.from_numpy(photograph(g, turn(SIDES), look, size)) / 255        # (B, SIDES, P, P, 3)
    return x.std(0, correction=min(1, len(x) - 1)).mean((1, 2, 3))


# ---- one picture, from reading to the last file --------------------------------------------------

def from_picture(path, networks, a, write):
    """Make all the results of one input and write(name, bytes) each.
    -> a phrase that says which views were used, a sentence how much the samples differ."""
    denoiser, teacher, meta, usual = networks
    cfg = denoiser.cfg
    pixels, cam, used = read_views(path, cfg.size, meta, a)                   # (V, size, size, 3)
    write("input.png", png(pixels[0]))
    cam = cam.to(a.device)
    K = cam.K[:, 0]                                                           # (1, 4 or 5)
    focal, _, _, _, *depth = K[0].tolist()
    look = dict(distance=(cfg.near + cfg.far) / 2 + sum(depth), elevation=a.elevation,
                focal=focal / cfg.size, background=list(meta["background"]))
    background = torch.tensor(look["background"], device=a.device)            # (3,)

    x = torch.from_numpy(pixels).to(a.device).movedim(-1, 1)[None] / 255      # (1, V, 3, H, W)
    guide = guidance(denoiser, x, cam, background) if len(pixels) > 1 else None
    trail = trajectory(denoiser, x[:, 0], guide, a)
    s_hat = trail[-1][2]                                                      # (B, 24, H, W)

    source = Camera(cam.w2c[:, :1], cam.K[:, :1], cam.hw)
    x_hat, _, _ = render(denoiser.gaussians(s_hat[:1], K), source, background)
    psnr = -10 * (x_hat - x[:, :1]).square().mean().clamp(min=1e-10).log10().item()
    if usual and psnr < usual - STRANGE:
        print(f"warning: {path}: its own view comes back at {psnr:.0f} dB, {usual:.0f} is usual: "
              f"these weights know {meta['dataset']}, and see something else", file=sys.stderr)

    def place(network, s):
        """Splats of any step -> Gaussians in the upright frame."""
        g = network.gaussians(s, K.expand(len(s), -1))
        return upright(widen(g, look, cfg.size), look)

    states = [s_t for s_t, _, _ in trail] + [s_hat]       # from pure noise to the result
    states = [place(denoiser, s) for s in states]
    g = states[-1]
    spread = differences(g, look, cfg.size)                                   # (SIDES,)
    most = spread.argmax().item() if a.samples > 1 else SIDES // 2
    sides = list(dict.fromkeys([0, most, SIDES // 4, SIDES // 2, 3 * SIDES // 4]))
    picture = Image.fromarray(pixels[0]).resize((a.size, a.size), Image.Resampling.BICUBIC)
    rows = [np.concatenate([picture, *row], 1)                                # (P, 5 or 6 P, 3)
            for row in photograph(g, turn(SIDES)[sides], look, a.size)]
    write("sample.png", png(np.concatenate(rows)))

    objects = {f"sample {k}": [one(state, k) for state in states] for k in range(a.samples)}
    if teacher:
        objects["teacher"] = [place(teacher, teacher(x[:, :1]))]
    look["differ"] = most * 360 / SIDES
    page = viewer_html(Path(os.path.abspath(path)).name, png(pixels[0]), objects, look)
    write("viewer.html", page.encode())

    around = [np.concatenate(list(x), 1)                                      # (P, B P, 3)
              for x in photograph(g, turn(a.frames), look, a.size).swapaxes(0, 1)]
    write("turntable.webp", animation(around, a.fps))
    film = []
    for s_t, angle in zip(condense(trail, a.frames), turn(a.frames)):
        x = photograph(place(denoiser, s_t), angle[None], look, a.size)       # (B, 1, P, P, 3)
        film.append(np.concatenate(list(x[:, 0]), 1))                         # (P, B P, 3)
    write("film.webp", animation(film + around, a.fps))
    for k in range(a.samples):
        write(f"sample_{k}.ply", ply_bytes(one(g, k)))
    return used, (f"the {a.samples} samples differ most from {look['differ']:.0f} degrees around "
                  f"the object: standard deviation {spread[most]:.4f} of 1 there, "
                  f"{spread[0]:.4f} at the picture's own side")


# ==== The idea ends here. Below: file formats, pictures from the wild, inputs, flags. =============

# ---- .ply, .png, .webp ---------------------------------------------------------------------------

PLY = [*"x y z nx ny nz f_dc_0 f_dc_1 f_dc_2".split(), *(f"f_rest_{i}" for i in range(45)),
       *"opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()]    # 62 properties


def one(g, k):
    """Object k of a batch, as a batch of its own."""
    return Gaussians(*[x[k: k + 1] for x in g])


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


def animation(frames, fps):
    """[(h, w, 3) uint8] -> the bytes of a .webp that loops."""
    first, *rest = map(Image.fromarray, frames)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return file.getvalue()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# ---- viewer.html ---------------------------------------------------------------------------------
# One page that a browser opens without a network: assets/viewer.html with the splats put in.

def quantise(states):
    """Gaussians of the states of one object, each (1, N, ..) -> (q, low, high).

    q (states, 23, n) int32 in 0..65535 stands for low + q / 65535 (high - low); low, high (23,). Of
    the N splats n are kept, those that are drawn in some state. The 23 numbers: xyz, opacity, quat,
    log scale, 4 x rgb of SH, where degree 0 has zeros.
    """
    x = torch.stack([torch.cat([g.xyz[0], g.opacity[0, :, None], g.quat[0],
                                g.scale[0].clamp(min=1e-9).log(), g.sh[0].flatten(1)], 1)
                     for g in states]).cpu()                                  # (states, N, 14 | 23)
    x = torch.nn.functional.pad(x, (0, 23 - x.shape[2]))                      # (states, N, 23)
    drawn = (x[..., 3] >= ALPHA_MIN).any(0) & x.isfinite().all(2).all(0)      # (N,)
    x = x[:, drawn].mT                                                        # (states, 23, n)
    low, high = (x.amin((0, 2)), x.amax((0, 2))) if drawn.any() else torch.zeros(2, 23)
    unit = ((high - low) / 65535).clamp(min=1e-30)[:, None]                   # (23, 1)
    return ((x - low[:, None]) / unit).round().int().clamp(0, 65535), low, high


def viewer_html(title, picture, objects, look):
    """A page that shows splats from all sides -> str.

    picture: the input, bytes of a .png. objects: {name: [Gaussians of every state, from noise to
    the result]}, each B = 1, upright. look: as for cameras, and `differ`, the side in degrees that
    the thumbnails show.
    """
    packed = []
    for name, states in objects.items():
        q, low, high = quantise(states)
        # The last state has 16 bits; the others 8, as differences to the state after them, which
        # are small numbers, so zlib packs them well.
        last_low = (q[-1:] & 255).numpy().astype(np.uint8)                    # (1, 23, n)
        backward = (q >> 8).flip(0).numpy().astype(np.uint8)                  # (states, 23, n)
        change = np.diff(backward, axis=0)                                    # modulo 256
        stream = b"".join(x.tobytes() for x in (last_low, backward[:1], change))
        packed.append(dict(name=name, n=q.shape[2], states=len(q), low=low.tolist(),
                           high=high.tolist(),
                           data=base64.b64encode(zlib.compress(stream, 9)).decode()))
    scene = dict(title=title, picture=base64.b64encode(picture).decode(), objects=packed,
                 look=dict(look, near=NEAR))
    # Inside <script> only "<" could end the text early; JSON has another spelling for it.
    text = json.dumps(scene).replace("<", "\\u003c")
    template = HERE / "assets" / "viewer.html"
    return template.read_text(encoding="utf-8").replace("{{scene}}", text)


# ---- pictures from the wild ----------------------------------------------------------------------
# In the training pictures (cars) the longer side of the object's bounding box takes a share of the
# picture within SHARES, and its middle lies within MIDDLES. A picture of that kind is left as it
# is, another is framed to SHARE and MIDDLE, the medians.
SHARE, SHARES = 0.67, (0.35, 0.80)
MIDDLE, MIDDLES = (0.50, 0.54), [(0.40, 0.60), (0.44, 0.64)]      # x, y
MOST_PIXELS = 50_000_000                                          # of a file: bounds the memory


def read_upright(path, background, most):
    """-> (h, w, 3) uint8 on the background and (h, w) uint8 alpha, turned as the EXIF orientation
    says; if more than `most` pixels long, every second, third ... pixel of them."""
    image = Image.fromarray(data.read_picture(path, background))
    with Image.open(path) as file:
        image.putalpha(file.convert("RGBA").getchannel("A"))
        try:
            image.getexif()[0x0112] = file.getexif().get(0x0112, 1)
        except Exception:                       # nonsense in EXIF raises many kinds of errors
            pass
    rgba = np.asarray(ImageOps.exif_transpose(image))                         # (h, w, 4)
    step = max(1, max(image.size) // most)
    return rgba[::step, ::step, :3], rgba[::step, ::step, 3]


def find_subject(rgb, alpha, background):
    """-> (rgb with the training background behind the subject, (h, w) bool subject), the latter
    None if no background is found. By alpha, else by distance from the border's colour."""
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
        x = np.flatnonzero(subject.any(0))
        y = np.flatnonzero(subject.any(1))
        extent = max(x[-1] - x[0], y[-1] - y[0]) + 1                          # pixels
        middle = np.array([x[0] + x[-1] + 1, y[0] + y[-1] + 1]) / 2           # x y
        inside = [low <= value <= high for value, (low, high) in zip(
            [extent / side, *(middle - corner) / side], [SHARES, *MIDDLES])]
        if not all(inside):
            side = round(extent / SHARE)
            corner = (middle - side * np.array(MIDDLE)).round().astype(int)
    canvas = Image.new("RGB", (side, side), tuple(background))
    canvas.paste(Image.fromarray(rgb), tuple((-corner).tolist()))
    return data.resize(np.asarray(canvas), size)


def prepare(path, size, background, posed=False):
    """A file -> (size, size, 3) uint8 as in training, and warnings where that may not succeed.
    posed: its camera is given, so it is neither cropped nor shifted."""
    background = (255 * np.array(background) + .5).astype(int)                # (3,)
    rgb, alpha = read_upright(path, background / 255, 16 * size)
    if posed:
        if rgb.shape[0] != rgb.shape[1]:
            data.fail(f"{path}: not square; with --view all pictures must be")
        return data.resize(rgb, size), []
    rgb, subject = find_subject(rgb, alpha, background)
    notes = []
    if subject is None:
        notes = ["its background has more than one colour; for good splats cut the object out, on "
                 "a transparent or plain ground"]
    elif not subject.any():
        data.fail(f"{path}: there is nothing but background; give a picture of an object")
    elif subject[[0, -1]].any() or subject[:, [0, -1]].any():
        notes = ["the object is cut off by the picture's edge; in training it never is"]
    return frame(rgb, subject, background.tolist(), size), notes


# ---- inputs --------------------------------------------------------------------------------------

def split_of(folder):
    """The split by which data.layout knows the folder of an object; None if it is no object."""
    return next((split for split in reversed(data.SPLITS) if data.layout(folder, split)), None)


def read_object(folder, size, meta):
    """All views of a dataset's object -> pixels (V, size, size, 3) uint8, c2w (V, 4, 4), and
    K (V, 4 or 5) in pixels."""
    split = split_of(folder)
    list_views, read = data.layout(folder, split)
    names, _ = list_views(folder, split)
    c2w, K, pictures = read(folder, split, names, meta["background"])
    if K.shape[1] < len(meta["K"]):
        c2w, K = data.centred(c2w, K, folder)
    if K.shape[1] > len(meta["K"]) or not np.isfinite(c2w).all():
        data.fail(f"{folder}: its cameras are not such as these weights were trained with")
    K[:, :4] *= size
    return np.stack([data.resize(x, size) for x in pictures]), c2w, K


def read_views(path, size, meta, a):
    """The source view, then those that guide -> pixels (V, size, size, 3) uint8; cameras (1, V) in
    the source camera's frame; and a phrase that says which views they are."""
    used = ""
    if split_of(path):
        pixels, c2w, K = read_object(path, size, meta)
        views = (a.views or ("64" if len(c2w) > 64 else "0")).split(",")
        if not all(view.isdecimal() and int(view) < len(c2w) for view in views):
            data.fail(f"{path}: --views {a.views}: give numbers from 0 to {len(c2w) - 1}")
        views = [int(view) for view in views]
        pixels, K = pixels[views], K[views]
        poses = np.linalg.inv(c2w[views[0]]) @ c2w[views]                     # to the source camera
        used = f", view {views[0]}"
    else:
        if a.views:
            data.fail(f"{path}: --views needs the folder of an object, and this is none")
        read = [prepare(p, size, meta["background"], bool(a.view)) for p in [path, *a.view]]
        pixels = np.stack([x for x, _ in read])
        for note in read[0][1]:
            print(f"warning: {path}: {note}", file=sys.stderr)
        poses = [data.rigid(data.numbers(p, "a pose"), p, "a pose") for p in a.pose]
        poses = np.stack([np.eye(4), *poses])                                 # (V, 4, 4)
        K = np.tile(meta["K"], (len(poses), 1))                               # (V, 4 or 5)
    if len(pixels) > 1:
        used += f", guided by {len(pixels) - 1} further view" + "s" * (len(pixels) > 2)
    w2c = torch.from_numpy(np.linalg.inv(poses)).float()                      # (V, 4, 4)
    return pixels, Camera(w2c[None], torch.from_numpy(K).float()[None], (size, size)), used


def find_inputs(given):
    """Pictures, folders of pictures and objects' folders -> the path of each input."""
    paths = []
    for path in given:
        found = sorted(p for p in path.glob("*")
                       if p.suffix.lower() in Image.registered_extensions())
        paths += [path] if split_of(path) or not found else found
    return list(dict.fromkeys(paths))


def folders(paths, out):
    """A folder of results for each path: out/<name>, and where two of the names are the same,
    out/<path below the folder that all share>. A single path may have `out` itself."""
    if len(paths) == 1 and out:
        return [Path(out)]
    whole = [Path(os.path.abspath(path)) for path in paths]
    names = [path.stem for path in whole]
    if len({name.lower() for name in names}) < len(paths):
        top = os.path.commonpath([path.parent for path in whole])
        names = [path.relative_to(top) for path in whole]
    return [Path(out or "out") / name for name in names]


# ---- the script ----------------------------------------------------------------------------------

def load_networks(a):
    """-> (denoiser, the teacher beside it or None, meta, PSNR in dB at which held-out source views
    come back or None)."""
    path = a.weights
    denoiser, meta = load_network(path, Denoiser, a.device)
    denoiser.to(memory_format=torch.channels_last)   # half the time on a CPU
    a.steps = a.steps or meta.get("steps", STEPS)    # with others the last is not the best
    kind = "procedural" if meta["data"]["procedural"] else "real"
    print(f"weights: {path} ({meta['dataset']}, {kind}, {denoiser.cfg.size} pixels)")
    teacher = None
    if (path.parent / "teacher.pt").exists():
        teacher, _ = load_network(path.parent / "teacher.pt", Teacher, a.device)
        teacher = teacher if teacher.cfg.size == denoiser.cfg.size else None
    usual, results = meta.get("source"), path.parent / "results.json"         # of train.py
    if results.exists() and not usual:
        row = json.loads(results.read_text())["table"].get(path.stem.replace("_", " "), {})
        usual = row.get("source")
    return denoiser, teacher, meta, usual


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("image", nargs="+", type=Path, help="pictures, folders of pictures, or a dataset's "
        "objects: folders in one of the layouts that data.py reads")
    add("--views", metavar="N,N", help="of an object: its source view, then those that guide the "
        "samples, if any; default: 64, or 0 if it has fewer views")
    add("--view", metavar="FILE", action="append", type=Path, default=[],
        help="a further picture of the object that guides the samples; may be repeated")
    add("--pose", metavar="FILE", action="append", type=Path, default=[],
        help="one for each --view; see above")
    add("--weights", metavar="FILE", type=Path, default=HERE / "weights" / "cars.pt",
        help="a stage_1.pt or stage_2.pt of train.py; default weights/cars.pt")
    add("--out", metavar="FOLDER", help="of the results, default out/<name>; with several inputs "
        "each has a folder in it")
    add("--samples", metavar="N", type=int, default=4, help="how many of each picture; default 4")
    add("--seed", metavar="N", type=int, default=0, help="another seed, other samples; default 0")
    add("--steps", metavar="N", type=int, help="DDIM steps; default: as many as in training")
    add("--frames", metavar="N", type=int, default=36, help="of one turn; default 36")
    add("--fps", metavar="N", type=int, default=12, help="frames a second; default 12")
    add("--size", metavar="N", type=int, default=192, help="pixels of a rendering; default 192")
    add("--elevation", metavar="X", type=float, default=25.0,
        help="degrees by which the picture looks down on the object; default 25")
    add("--device", metavar="NAME", default="", help="default: the GPU if there is one")
    return parser


def check(a):
    """Flags that make no sense are refused before any work."""
    for name, (least, most) in dict(samples=(1, 1000), steps=(1, T - 1), frames=(1, 1000),
                                    fps=(1, 100), size=(1, 2048), seed=(0, 2 ** 63 - 1),
                                    elevation=(-90, 90)).items():
        if getattr(a, name) is not None and not least <= getattr(a, name) <= most:
            data.fail(f"--{name} {getattr(a, name)}: give {least} to {most}")
    if a.samples * a.size > 16383:   # what WebP can hold
        data.fail(f"--samples {a.samples} --size {a.size}: together more than 16383 pixels wide; "
                  "give less of either")
    if len(a.view) != len(a.pose):
        data.fail(f"{len(a.view)} --view, {len(a.pose)} --pose: give a pose for each view")
    if a.view and (len(a.image) > 1 or a.image[0].is_dir()):
        data.fail(f"--view {a.view[0]}: it guides one picture only; give a single one")
    a.device = pick_device(a.device)


@torch.no_grad()
def main():
    a = arguments().parse_args()
    check(a)
    warnings.simplefilter("ignore", UserWarning)                      # Pillow's, about odd files
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS

    paths, errors = find_inputs(a.image), []
    given = [*a.view, *a.pose, *paths, *(file for path in paths for file in path.rglob("*"))]
    given = {path.resolve() for path in given}
    networks = load_networks(a)
    for path, out in zip(paths, folders(paths, a.out)):
        names = []

        def write(name, content):
            if (out / name).resolve() in given:
                data.fail(f"{out / name}: is an input, not written over; choose another --out")
            write_atomically(out / name, lambda file: file.write(content))
            names.append(name)
        try:
            if not str(path).isprintable():
                data.fail(f"{str(path)!r}: cannot be printed; rename it")
            used, differ = from_picture(path, networks, a, write)
            print(f"{path}{used} -> {out}/: {' '.join(names)}", flush=True)
            if a.samples > 1:
                print(differ, flush=True)
        except SystemExit as stop:                        # bad input: the others are still made
            errors.append(str(stop))
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    main()
