"""Turn a picture into splats, a film of the denoising and a viewer page; measure how good they are.

    python sample.py car.png --samples 8 --seed 1              # any picture of one object
    python sample.py path/to/object --views 64,104             # an object's view 64, guided by 104
writes into out/car/: viewer.html, a page to look around in; sample.png, the input and the samples
from several sides; film.webp, the denoising, then a turn; and a .ply of each sample.
"""
import argparse
import base64
import io
import json
import math
import os
import zlib
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # threads that wait must not starve the others
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from model import (Denoiser, S, T, denoise, fingerprint, load_network, pick_device,
                   write_atomically)
from rasterize import (ALPHA_MIN, LOW_PASS, NEAR, Camera, Gaussians, fail, invert_pose, render,
                       transform)
from teacher import Teacher
from toys import cars

HERE = Path(__file__).parent
FRAMES = 36     # of one turn, a multiple of 4
SIDE = 192      # pixels, width of a rendering
SWAY = 4        # degrees to each side, instead of a turn, where the data are clips


# ---- a picture -> splats -> files ----------------------------------------------------------------

def guidance(gaussians, x, cam, background):
    """-> guide(s) for `denoise`: it renders gaussians(s), s splats (B, 24, H, W), in each view of x
    (1, V, 3, H, W) but the first, the source, and returns their error (B,). None if V = 1."""
    def guide(s):
        g = gaussians(s)                                                      # (B, N, ..)
        x_hat = renderings(g, cam.views(slice(1, None)), background)          # (B, V-1, 3, H, W)
        return (x_hat - x[:, 1:]).square().mean((1, 2, 3, 4))                 # (B,)
    return guide if x.shape[1] > 1 else None


def renderings(g, cam, background):
    """B samples g of one object, from its cameras (1, V) -> (B, V, 3, H, W)."""
    w2c = cam.w2c.expand(len(g.xyz), -1, -1, -1)                              # (B, V, 4, 4)
    K = cam.K.expand(len(g.xyz), -1, -1)                                      # (B, V, 4 or 5)
    return render(g, Camera(w2c, K, cam.hw), background)[0]


def sample_splats(denoiser, teacher, x, cam, background, generators, steps):
    """B samples of the object in x (1, V, 3, h, w): its first view is the source, the others guide.
    Each of B generators draws the noise of a sample, on the CPU: the same for every device.
    -> s_hat (B, 24, H, W), and the function that makes Gaussians of such splats."""
    eps = [torch.randn(S, *denoiser.cfg.hw, generator=generator) for generator in generators]
    eps = torch.stack(eps).to(x.device)                                       # (B, 24, H, W)
    base = denoiser.base(teacher(x[:, :1]))                       # (1, 24, H, W) or (1, 24, 1, 1)
    to_gaussians = lambda s: denoiser.gaussians(s, base, cam.K[:, 0])
    guide = guidance(to_gaussians, x, cam, background)
    x_src = x[:, 0].expand(len(eps), -1, -1, -1)                              # (B, 3, h, w)
    t = torch.full((len(eps),), T - 1, device=x.device)                       # (B,) pure noise
    *_, s_hat = denoise(denoiser, eps, t, x_src, base, steps, guide)          # (B, 24, H, W)
    return s_hat, to_gaussians


def results(denoiser, teacher, meta, a):
    """Yields (name, bytes) of every file that is made."""
    x, cam, background = read_views(denoiser.cfg, meta, a)                    # (1, V, 3, H, W)
    K = cam.K[:, 0]                                                           # (1, 4 or 5)
    noise = [torch.Generator().manual_seed(a.seed)] * a.samples
    trail = []             # s_t of every DDIM step, then the result: (B, 24, H, W) each
    with denoiser.register_forward_pre_hook(lambda _, inputs: trail.append(inputs[0].detach())):
        s, to_gaussians = sample_splats(denoiser, teacher, x, cam, background, noise, a.steps)
    trail.append(s)
    h, w = cam.hw
    fx, fy = K[0, :2].tolist()
    middle = (denoiser.cfg.near + denoiser.cfg.far) / 2 + K[0, 4:].sum().item()
    look = dict(distance=middle, elevation=a.elevation, focal=fx / w, aspect=fy / h * w / fx,
                background=meta["background"], near=NEAR)
    g = to_gaussians(s)                                                       # (B, N, ..)
    around = [360 * i / FRAMES for i in range(FRAMES)]                        # degrees
    if meta.get("window"):     # of a clip, not of an object with sides: the camera was level
        around = [SWAY * math.sin(math.radians(angle)) for angle in around]
        look |= dict(distance=g.xyz[..., 2].median().item(), elevation=a.elevation or 0, sway=SWAY)
    elif a.elevation is None:
        look["elevation"] = estimate_elevation(g, middle)
        print(f"{a.image}: taken to look down by {look['elevation']} degrees, or give --elevation")
    place = lambda s: upright(to_gaussians(s), look, w)
    states = [place(s) for s in trail]                                        # (B, N, ..) each
    turn = [photograph(states[-1], angle, look) for angle in around]          # (B, h, w, 3) each
    spread = [x.std(0, ddof=min(1, a.samples - 1)).mean() / 255 for x in turn]
    most = int(np.argmax(spread))
    sides = {round(around[i]): i for i in (0, most, *range(0, FRAMES, FRAMES // 4))}
    pixels = to_pixels(x[0, 0])                                               # (H, W, 3)
    picture = Image.fromarray(pixels).resize(turn[0].shape[2:0:-1])
    # (h, w, 3) each: a column is one side of all samples
    columns = [[picture] * a.samples, *(turn[i] for i in sides.values())]
    yield "sample.png", encoded([np.hstack([np.vstack(x) for x in columns])], "PNG")

    objects = {f"sample {k}": [one(state, k) for state in states] for k in range(a.samples)}
    objects["teacher"] = [upright(teacher.gaussians(teacher(x[:, :1]), K), look, w)]
    look["differ"] = around[most]
    page = viewer_html(a.image.name, encoded([np.asarray(picture)], "PNG"), objects, look)
    yield "viewer.html", page.encode()

    film = []                                                                 # (B, h, w, 3) each
    for i in range(FRAMES):
        step = a.steps * (1 - (1 - i / FRAMES) ** 2)                          # slower and slower
        k = int(step)
        s = trail[k].lerp(trail[k + 1], step - k)                             # (B, 24, H, W)
        film.append(photograph(place(s), around[i], look))
    film = [np.hstack(x) for x in film + turn]                                # (h, B w, 3) each
    yield "film.webp", encoded(film, "WEBP", save_all=True, duration=83, loop=0)     # 12 a second
    for k in range(a.samples):
        yield f"sample_{k}.ply", ply_bytes(one(states[-1], k))
    if a.samples > 1:
        print(f"the {a.samples} samples differ most from {around[most]:.0f} degrees around the "
              f"object: standard deviation {spread[most]:.4f} of 1 there, {spread[0]:.4f} at the "
              "picture's own side")


# ---- cameras -------------------------------------------------------------------------------------
# A network's splats live in its source camera's frame, what is written in the upright one: the
# object's middle at the origin, level OpenCV axes (y down, z forward). `look` is a dict: distance
# of the middle; elevation, degrees by which the source camera looks down; focal / width; aspect,
# width / height in square pixels; background; sway, only of clips; and for the page near, and
# differ, the side in degrees of its thumbnails.

def estimate_elevation(g, distance):
    """Degrees from 0 to 60 for B samples g of one object in the source camera's frame (ours). Level
    parts, such as roof and sill, put the splats at few heights: at the right angle the entropy of
    their heights is least."""
    _, y, z = (g.xyz[g.opacity > 0.3] * 96 / distance).T.cpu().numpy()        # (n,) levels
    angles = np.radians(np.arange(61))[:, None]                               # (61, 1)
    heights = y * np.cos(angles) + (z - 96) * np.sin(angles)                  # (61, n)
    counts = np.stack([np.histogram(h, np.arange(-60, 61))[0] for h in heights])      # (61, 120)
    order = (counts * np.log(counts.clip(1))).sum(1)                          # (61,) - n x entropy
    return int(order.argmax())


def orbit(angle, look):
    """w2c (1, 1, 4, 4) of a camera so many degrees around the origin; the source camera's are 0."""
    down = math.radians(look["elevation"])
    c = math.cos(down)
    s = math.sin(down)
    around = math.radians(angle)
    x = math.cos(around)
    y = math.sin(around)
    return torch.tensor([[[[x, 0, y, 0],
                           [s * y, c, -s * x, 0],
                           [-c * y, s, c * x, look["distance"]],
                           [0, 0, 0, 1]]]])


def upright(g, look, width):
    """From the source camera's frame to the upright one. In training the renderer widens splats by
    LOW_PASS px^2; here they get that width in world units, or gaps would open from nearer."""
    depth = g.xyz[..., 2:] if "sway" in look else look["distance"]     # (B, N, 1) of a scene
    pixel = depth / (look["focal"] * width)                                   # as depth
    g = g._replace(scale=(g.scale ** 2 + LOW_PASS * pixel ** 2).sqrt())       # (B, N, 3)
    pose = invert_pose(orbit(0, look))[0].to(g.xyz.device)                    # (1, 4, 4)
    return transform(g, pose.expand(len(g.xyz), -1, -1))


def photograph(g, angle, look):
    """B objects from so many degrees around the middle -> (B, h, w, 3) uint8, w = SIDE."""
    h = round(SIDE / look["aspect"])
    f = look["focal"] * SIDE
    K = g.xyz.new_tensor([[[f, f, SIDE / 2, h / 2]]])                         # (1, 1, 4) pixels
    cam = Camera(orbit(angle, look).to(K), K, (h, SIDE))
    return to_pixels(renderings(g, cam, K.new_tensor(look["background"]))[:, 0])


# ---- how good they are ---------------------------------------------------------------------------
# Protocol of Splatter Image: view 64 in, all others out; per image, then per object, then overall.
# `cfg` is train.py's Config, `views` one split of a dataset.

def psnr(x_hat, x):
    """(..., 3, H, W) unclamped -> (...,) dB for a range of 1."""
    return -10 * (x_hat - x).square().flatten(-3).mean(-1).log10()


def ssim(x_hat, x):
    """(M, 3, H, W) -> (M,). 11x11 Gaussian window of sigma 1.5, zero padding, Wang et al. 2004."""
    k = torch.signal.windows.gaussian(11, std=1.5, device=x.device)           # (11,)
    k = (k.outer(k) / k.sum() ** 2).expand(3, 1, 11, 11)                      # (3, 1, 11, 11)
    terms = torch.cat([x_hat, x, x_hat ** 2 + x ** 2, x_hat * x])             # (4 M, 3, H, W)
    a, b, squares, product = F.conv2d(terms, k, padding=5, groups=3).chunk(4)
    value = ((2 * a * b + 1e-4) * (2 * (product - a * b) + 9e-4)
             / ((a ** 2 + b ** 2 + 1e-4) * (squares - a ** 2 - b ** 2 + 9e-4)))
    return value.flatten(1).mean(1)


def own_views(views, o):
    """Indices (V,) of test object o: its source view, or the first if there is none, then all
    others. Of a clip: the middle frame if no source is listed, then those within the window."""
    first, end = views.start[o:o + 2].tolist()
    n = end - first
    source, *_ = views.meta["listed"].get(views.names[o], [views.meta.get("source", n // 2)])
    source = source if source < n else 0
    window = views.meta.get("window", n)
    others = [i for i in range(n) if 0 < abs(i - source) <= window]
    return first + torch.tensor([source, *others])


def test_views(views, o, n=0):
    """Indices of test object o: its source view, then n evenly spaced targets, or all for n = 0. Of
    a clip, whatever n is: those listed, or 5 and 10 frames later and a random one."""
    first, end = views.start[o:o + 2].tolist()
    source, *others = own_views(views, o).tolist()
    if "window" in views.meta:
        random = np.random.default_rng(o).choice(others or [source])
        index = [first + i for i in views.meta["listed"].get(views.names[o], [])]
        index = index or [source, source + 5, source + 10, random]
        return torch.tensor(index).clamp(max=end - 1)                         # (4,)
    n = min(n, len(others)) or len(others)
    return torch.tensor([source, *(others[i * len(others) // n] for i in range(n))])


def opposite_views(views, o):
    """The source view of test object o and the view whose direction differs most: indices (2,)."""
    index = own_views(views, o)                                               # (V,)
    axes = views.c2w[index, :3, 2].cpu()                                      # (V, 3)
    return index[[0, int((axes @ axes[0]).argmin())]]


def told_views(views, o, n):
    """The source view of test object o and n random others: indices (1 + n,). Evenly spaced ones
    may all be from one side, as SRN's test cameras wind around the object."""
    index = own_views(views, o)                                               # (V,)
    generator = torch.Generator().manual_seed(o)
    index[1:] = index[1:][torch.randperm(len(index) - 1, generator=generator)]
    return index[:1 + n]


def scene(views, index, cfg):
    """The views `index` (V,): images (1, V, 3, H, W), cameras relative to the first, background."""
    x, cam = data.gather(views, index[None].to(views.images.device))
    background = torch.tensor(views.meta["background"], device=cfg.device)    # (3,)
    return x.to(cfg.device), cam.to(cfg.device), background


def load_student(path, device):
    """-> (denoiser, teacher, meta) of a student's file and of the teacher.pt beside it, whose
    splats are what the student denoises around. Refuses another teacher than that of training."""
    student, meta = load_network(path, Denoiser, device)
    teacher, _ = load_network(path.with_name("teacher.pt"), Teacher, device)
    if meta.get("teacher") != fingerprint(teacher):
        fail(f"{path}: was trained with another teacher than the teacher.pt beside it")
    return student, teacher, meta


def predictor(teacher, student, views, cfg, given=None, n=1):
    """-> predict(o): the Gaussians of test object o from its source view, by the teacher, or n
    samples by the student if it is not None. given(views, o): the source and the views that tell
    the teacher or guide the student. Its noise depends on cfg.seed, o and the sample's number."""
    def predict(o):
        index = given(views, o) if given else test_views(views, o)[:1]        # (V,)
        x, cam, background = scene(views, index, cfg)                         # (1, V, 3, H, W)
        if not student:
            return teacher.gaussians(teacher(x, cam, background), cam.K[:, 0])
        seed = 10**6 * (cfg.seed + 1) + 10**3 * o
        noise = [torch.Generator().manual_seed(seed + k) for k in range(n)]
        s, to_gaussians = sample_splats(student, teacher, x, cam, background, noise, cfg.steps)
        return to_gaussians(s)                                                # (n, N, ..)
    return predict


def hidden(depth, alpha, cam, frame=False):
    """Pixels that show what the first view does not: depth and alpha (V, 1, H, W) of renderings
    from cam (B = 1) -> (V, H, W) bool. Their points lie more than 0.05 world units behind what the
    first camera sees; or, with `frame`, for clips, outside its picture."""
    V, _, H, W = depth.shape
    n = torch.arange(H * W, device=depth.device)                              # (HW,)
    f, c = cam.K[0, :, :4, None].split(2, 1)                                  # (V, 2, 1)
    z = (depth / alpha.clamp(min=1e-3)).flatten(2)                            # (V, 1, HW)
    pixel = torch.stack([n % W, n // W]) + 0.5                                # (2, HW)
    xyz = torch.cat([(pixel - c) / f * z, z], 1)                              # (V, 3, HW)
    R, t = invert_pose(cam.w2c[0])[:, :3].split([3, 1], 2)                    # to the first camera
    xyz = R @ xyz + t                                                         # (V, 3, HW)
    xy = xyz[:, :2] / xyz[:, 2:] * f[0] + c[0]                                # (V, 2, HW)
    size = n.new_tensor([[W], [H]])                                           # (2, 1)
    x, y = xy.long().clamp(min=0).minimum(size - 1).unbind(1)                 # (V, HW)
    away = xyz[:, 2] > z[0, 0, y * W + x] + 0.05                              # (V, HW)
    if frame:
        away |= ((xy < 0) | (xy >= size)).any(1) | (xyz[:, 2] < 0)
    return (away & (alpha.flatten(1) > 0.5)).view(V, H, W)


@torch.no_grad()
def evaluate(predict, views, cfg, n_views, objects, title="", lpips=None, given=None):
    """Scores of each test object, a dict each. predict(o) makes the Gaussians of n samples, from
    the views given(views, o), which are not scored, or from the source alone.

    one, mean, best: PSNR in the n_views novel views of one sample (the average over samples), of
    the samples' mean image, and of the best sample. std: between samples, in pixels that the source
    view hides. Of clips as in Flash3D: without a border of 5 %, the three targets also one by one.
    Of procedural data also `cars.door_scores`."""
    clips = "window" in views.meta
    border = [clips * math.ceil(0.05 * n) for n in views.meta["hw"]]          # pixels
    inner = ..., *(slice(n, -n or None) for n in border)
    scores = []
    for o in tqdm(objects, title, leave=False, disable=not title):
        index = test_views(views, o, n_views)                                 # (V,)
        x, cam, background = scene(views, index, cfg)                         # (1, V, 3, H, W)
        g = predict(o)                                                        # (n, N, ..)
        drawn = [render(one(g, k), cam, background) for k in range(len(g.xyz))]
        x_hat, alpha, depth = map(torch.cat, zip(*drawn))                     # (n, V, .., H, W)
        x_hat = x_hat[inner]                                                  # (n, V, 3, h, w)
        x = x[inner]                                                          # (1, V, 3, h, w)
        shown = x[0].flatten(1).amax(1) > 0   # (V,) CO3D: a picture without a mask is all black
        known = given(views, o) if given else index[:1]                       # (1 or more,)
        shown &= ~torch.isin(index, known).to(shown.device)
        if not shown.any():
            continue
        novel = x_hat[:, shown]                                               # (n, V', 3, h, w)
        truth = x[0, shown]                                                   # (V', 3, h, w)
        each = psnr(novel, truth).mean(1)                                     # (n,)
        source, *targets = psnr(x_hat, x).mean(0)                             # (V,)
        columns = ("5", "10", "random") if clips else ()
        r = {k: score for k, score, new in zip(columns, targets, shown[1:]) if new}
        r |= dict(one=each.mean(), ssim=ssim(novel[0], truth).mean(), source=source)
        if lpips:
            r["lpips"] = lpips(2 * novel[0] - 1, 2 * truth - 1).mean()
        if len(g.xyz) > 1:
            r |= dict(mean=psnr(novel.mean(0), truth).mean(), best=each.max())
            where = hidden(depth[0], alpha[0], cam, clips)[shown][inner]      # (V', h, w)
            if where.any():
                r["std"] = novel.std(0).mean(1)[where].mean()
        if views.meta["procedural"]:
            toy = data.TOYS[views.meta["dataset"]]
            v, *pair = toy.hidden_pair(views, o, data.resize)                 # (3, H, W) each
            if v not in known:
                x, cam, _ = scene(views, torch.tensor([index[0], v]), cfg)    # (1, 2, 3, H, W)
                x_hat = renderings(g, cam.views([1]), background)             # (n, 1, 3, H, W)
                r |= cars.door_scores(x_hat[:, 0], x[0, 1], *(p.to(x) for p in pair))
        scores.append(dict(object=views.names[o], **{k: float(v) for k, v in r.items()}))
    return scores


def average_scores(scores):
    names = dict.fromkeys(k for r in scores for k in r if k != "object")
    return {k: round(float(np.mean([r[k] for r in scores if k in r])), 6) for k in names}


def score_table(cfg, views, about):
    """Evaluates all weights in cfg.out -> a table as text. Writes the table into results.json, and
    the scores of each object into scores/."""
    out = Path(cfg.out)
    lpips = None
    if cfg.lpips:
        from lpips import LPIPS
        lpips = LPIPS(net="vgg", verbose=False).to(cfg.device)
    teacher, meta = load_network(out / "teacher.pt", Teacher, cfg.device)
    told = lambda views, o: told_views(views, o, cfg.told)
    rows = {}
    for name, given in {"teacher": None, f"teacher, told {cfg.told} views": told,
                        "stage 1": None, "stage 1, guided by 1": opposite_views,
                        "stage 2": None, "stage 2, guided by 1": opposite_views}.items():
        stem = name.replace(",", "").replace(" ", "_")
        weights = out / f"{stem[:7]}.pt"                    # teacher.pt, stage_1.pt or stage_2.pt
        if not weights.exists() or given is told and not teacher.encoder:
            continue
        student = None
        if "stage" in name:
            student, _, meta = load_student(weights, cfg.device)
        predict = predictor(teacher, student, views, cfg, given, cfg.samples)
        scores = evaluate(predict, views, cfg, cfg.eval_views, range(len(views)), name, lpips,
                          given)
        rows[name] = dict(minutes=meta["minutes"], **average_scores(scores))
        lines = [json.dumps(r).encode() + b"\n" for r in scores]
        write_atomically(out / f"scores/{cfg.split}_{stem}.jsonl",
                         lambda file: file.writelines(lines))
    kind = "procedural" if views.meta["procedural"] else "real"
    h, w = views.meta["hw"]
    targets = (f"view {views.meta['source']} in, {cfg.eval_views or 'all'} others out"
               if "source" in views.meta else "listed or middle frame in, 3 others out")
    record = json.dumps(dict(table=rows, kind=kind, **about), indent=1)
    write_atomically(out / "results.json", lambda file: file.write(record.encode()))
    return (f"{views.meta['dataset']} ({kind}), {h}x{w}, {len(views)} {cfg.split} "
            f"objects, {targets}, {cfg.samples} samples, seed {cfg.seed}\n{format_rows(rows)}")


def format_rows(rows):
    """{name: scores} -> lines of text."""
    names = dict.fromkeys(k for r in rows.values() for k in r)
    lines = [" " * 26 + "".join(f"{k:>9}" for k in names)]
    for name, r in rows.items():
        lines.append(f"{name:26}" + "".join(f"{r.get(k, ''):>9.4}" for k in names))
    return "\n".join(lines)


def evaluate_few(teacher, student, views, cfg):
    """Scores on a few test objects in 5 views of each, for a curve."""
    few, n = (32, 16) if cfg.device.startswith("cuda") else (6, 4)            # objects, samples
    predict = predictor(teacher, student, views, cfg, n=n)
    return average_scores(evaluate(predict, views, cfg, 5, range(len(views))[:few]))


@torch.no_grad()
def preview(teacher, student, views, cfg):
    """Writes preview.png, a row for each of 6 objects: the source view; from the opposite side the
    truth, the teacher, the student's samples. The student may be None."""
    rows = []
    for o in range(len(views))[:6]:
        x, cam, background = scene(views, opposite_views(views, o), cfg)      # (1, 2, 3, H, W)
        row = [*x[0]]                                                         # (3, H, W) each
        for network in [None, student] if student else [None]:
            g = predictor(teacher, network, views, cfg, n=min(cfg.samples, 8))(o)     # (n, N, ..)
            row += renderings(g, cam.views([1]), background)[:, 0]            # (n, 3, H, W)
        rows.append(torch.cat(row, -1))                                       # (3, H, columns W)
    zoom = max(1, 128 // cfg.size)                                            # legible
    sheet = to_pixels(torch.cat(rows, 1)).repeat(zoom, 0).repeat(zoom, 1)     # (6 H, columns W, 3)
    write_atomically(Path(cfg.out) / "preview.png",
                     lambda file: Image.fromarray(sheet).save(file, "PNG"))


# ==== The lesson ends here. Below: file formats, pictures from the wild, flags. ===================

PLY = [*"x y z nx ny nz f_dc_0 f_dc_1 f_dc_2".split(), *(f"f_rest_{i}" for i in range(45)),
       *"opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()]    # 62 properties


def one(g, k):
    """Object k of a batch, as a batch of its own."""
    return Gaussians(*[x[k: k + 1] for x in g])


def ply_bytes(g):
    """Gaussians of one object (B = 1) -> a binary .ply as 3D Gaussian Splatting writes it: logit
    opacity, log scale, w x y z; f_rest holds 15 coefficients of red, then green, then blue."""
    rest = F.pad(g.sh[0, :, 1:].mT, (0, 12)).flatten(1)                       # we have degree 1
    columns = torch.cat([g.xyz[0], torch.zeros_like(g.xyz[0]), g.sh[0, :, 0], rest,
                         g.opacity[0, :, None].logit(2 ** -23), g.scale[0].log(), g.quat[0]], 1)
    properties = "".join(f"property float {name}\n" for name in PLY)
    header = (f"ply\nformat binary_little_endian 1.0\nelement vertex {len(columns)}\n"
              f"{properties}end_header\n")
    return header.encode() + columns.cpu().numpy().astype("<f4").tobytes()


def encoded(images, kind, **more):
    """(h, w, 3) uint8 each -> the bytes of one picture, or of a film."""
    first, *rest = map(Image.fromarray, images)
    file = io.BytesIO()
    first.save(file, kind, append_images=rest, **more)
    return file.getvalue()


def to_pixels(x):
    """(.., 3, H, W) in [0, 1] -> (.., H, W, 3) uint8."""
    return (x.clamp(0, 1) * 255 + 0.5).byte().movedim(-3, -1).cpu().numpy()


def quantise(states):
    """Gaussians of every state of one object, each (1, N, ..) -> dict for the page. It has the n
    splats that some state draws: xyz, opacity, quat, log scale, 4 x rgb of SH, 0..65535 each, from
    low to high (23,)."""
    x = torch.stack([torch.cat([g.xyz[0], g.opacity[0, :, None], g.quat[0],
                                g.scale[0].clamp(min=1e-9).log(), g.sh[0].flatten(1)], 1)
                     for g in states]).cpu().numpy()                          # (states, N, 23)
    drawn = (x[..., 3] >= ALPHA_MIN).any(0)                                   # (N,)
    drawn[0] = True                                                           # n > 0
    x = x[:, drawn]                                                           # (states, n, 23)
    # A number far out must not cost the others their precision: it is clamped.
    low, high = np.quantile(x, [0.001, 0.999], (0, 1))                        # (23,) each
    margin = 4 * (high - low)
    x = x.clip(low - margin, high + margin)
    low = x.min((0, 1))                                                       # (23,)
    high = x.max((0, 1))                                                      # (23,)
    q = (65535 * (x - low) / (high - low).clip(1e-30) + 0.5).astype(np.uint16)    # (states, n, 23)
    # The low byte of the last state, then the high bytes of all; zlib finds the states alike.
    stream = np.concatenate([q[-1:], q >> 8]).astype(np.uint8).T              # (23, n, 1 + states)
    return dict(n=q.shape[1], states=len(q), low=low.tolist(), high=high.tolist(),
                data=base64.b64encode(zlib.compress(stream.tobytes())).decode())


def viewer_html(title, picture, objects, look):
    """assets/viewer.html with the splats put in: a page that needs no network -> str. picture: the
    bytes of a .png. objects: {name: [Gaussians of every state, B = 1, upright]}."""
    packed = [dict(name=name, **quantise(states)) for name, states in objects.items()]
    content = json.dumps(dict(title=title, picture=base64.b64encode(picture).decode(),
                              objects=packed, look=look))
    page = (HERE / "assets/viewer.html").read_text(encoding="utf-8")
    # Inside <script> only "<" could end the text early; JSON has another spelling for it.
    return page.replace("{{scene}}", content.replace("<", "\\u003c"))


# ---- pictures from the wild ----------------------------------------------------------------------
# In training pictures of cars the longer side of the bounding box takes 0.35 to 0.80 of a picture,
# and its middle lies within 0.1 of MIDDLE. A picture of that kind is left as it is, another is
# cropped or padded to SHARE and MIDDLE, the medians. Other objects are only padded to a square.
SHARE = 0.67
MIDDLE = np.array([0.50, 0.54])            # x y


def frame(path, image, meta):
    """RGBA image -> a square one, around a car if that does not lie as in training. Ground is
    made transparent, unless it is the training background already. The subject is told by alpha if
    that cuts it out, else by distance from the border's colour."""
    cover = np.asarray(image)[..., 3] / 255                                   # (h, w) in [0, 1]
    noise = 0
    if (cover > 0.5).mean() > 0.95:   # no cut-out: at most a margin or corners are transparent
        image = image.crop(Image.fromarray(cover > 0.5).getbbox())
        rgb = data.on_background(image, meta["background"]).astype(float)     # (h, w, 3)
        opaque = np.asarray(image)[..., 3] > 127                              # (h, w)
        edge = opaque.copy()
        edge[1:-1, 1:-1] = False
        far = abs(rgb - np.median(rgb[edge], 0)).max(2)                       # (h, w) grey levels
        noise = np.quantile(far[edge], 0.9)
        cover = (far / (8 + 2 * noise) - 1).clip(0, 1) * opaque               # (h, w)
        if noise <= 24 and (rgb[edge] != np.multiply(meta["background"], 255)).any():
            image = Image.fromarray(np.dstack([rgb, 255 * cover]).astype(np.uint8))
    side = max(image.size)
    corner = (np.array(image.size) - side) // 2                               # x y, at most 0
    y, x = np.nonzero(cover > 0.5)
    if noise > 24:
        print(f"warning: {path}: its background has more than one colour; for good splats cut the "
              "object out")
    elif not len(x):
        fail(f"{path}: there is nothing but background; give a picture of an object")
    elif meta["dataset"] == "cars":
        low, high = np.quantile([x, y], [0.001, 0.999], 1)                    # x y, without specks
        middle = (low + high + 1) / 2
        extent = max(high - low) + 1                                          # pixels
        off = abs((middle - corner) / side - MIDDLE).max()
        if not 0.35 <= extent / side <= 0.80 or off > 0.1:
            side = round(extent / SHARE)
            corner = (middle - side * MIDDLE).round().astype(int)
    return image.crop((*corner, *corner + side))


def prepare(path, cfg, meta):
    """A file -> (H, W, 3) uint8 as in training. For clips, a picture that is no frame of one is
    cropped to the shape of unstretched frames."""
    image = data.read_rgba(path)
    if (path.parent.parent / "intrinsics.txt").exists():   # SRN's pictures are composited already,
        image.putalpha(255)                                # and their alpha is only the mask
    image.thumbnail((16 * cfg.size, 16 * cfg.size))
    if cfg.aspect != 1:
        if not data.clip_file(path.parent).exists():
            fx, fy = meta["K"][:2]
            shape = cfg.aspect * fy / fx                                      # width / height
            w = min(image.width, round(image.height * shape))
            h = min(image.height, round(image.width / shape))
            corner = (np.array(image.size) - (w, h)) // 2                     # x y
            image = image.crop((*corner, *corner + (w, h)))
    else:
        image = frame(path, image, meta)
    pixels = data.on_background(image, meta["background"])                    # (h, w, 3)
    return data.resize(pixels, (cfg.size, round(cfg.size * cfg.aspect)))


def read_views(cfg, meta, a):
    """The source view, then those that guide -> images (1, V, 3, H, W), cameras relative to the
    first, background."""
    if a.image.is_dir():
        clip = bool(meta.get("window"))
        split = next((split for split in data.SPLITS if data.layout(a.image, split)), "test")
        hw = cfg.size, round(cfg.size * cfg.aspect)
        pixels, c2w, K = data.read_object(a.image, split, hw, meta["background"])     # (V, H, W, 3)
        if K.shape[1] < len(meta["K"]) and meta["dataset"] not in data.DATASETS:
            c2w, K = data.centred(c2w, K, a.image, cfg.size)
        of_clip = data.layout(a.image, split).func is data.read_clip
        if K.shape[1] != len(meta["K"]) or of_clip != clip:
            fail(f"{a.image}: its cameras are not such as these weights were trained with")
        index = a.views or [len(c2w) // 2 if clip else 64 * (len(c2w) > 64)]
        if not set(index) <= set(range(len(c2w))):
            fail(f"{a.image}: --views: give numbers from 0 to {len(c2w) - 1}")
        lens = K[index[0], :2] / meta["K"][:2]              # objects were learned with one lens
        if len(meta["K"]) == 4 and not clip and abs(lens - 1).max() > 0.02:
            fail(f"{a.image}: the source's focal length is {lens.max():.2f} times that of training")
    else:
        pixels = prepare(a.image, cfg, meta)[None]                            # (1, H, W, 3)
        c2w = np.eye(4)[None]                                                 # (1, 4, 4)
        K = np.array([meta["K"]])                                             # (1, 4 or 5)
        index = [0]
    images = torch.from_numpy(pixels).movedim(-1, 1)                          # (V, 3, H, W)
    views = data.Views(images, torch.from_numpy(c2w), torch.from_numpy(K).float(), None, None, meta)
    return scene(views, torch.tensor(index), a)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("image", type=lambda path: Path(os.path.abspath(path)),
        help="a picture, or the folder of an object in a dataset")
    add("--views", metavar="N,N", type=lambda text: [int(n) for n in text.split(",")],
        help="of an object: the source view, then any that guide; default 64, 0 if it has fewer, "
             "the middle frame of a clip")
    add("--weights", type=Path, default=HERE / "weights/cars.pt",
        help="of train.py, beside its teacher.pt; default weights/cars.pt")
    add("--out", type=Path, help="default out/<name of the input>")
    add("--device", default="", help="default: the GPU if there is one")
    add("--samples", type=int, default=4, help="default 4")
    add("--seed", type=int, default=0, help="default 0")
    add("--steps", type=int, default=0, help="DDIM steps; default: as many as in training")
    add("--elevation", type=float, help="degrees the camera looks down by; default: estimated")
    return parser


@torch.no_grad()
def main():
    a = arguments().parse_args()
    if not (a.image.is_file() or a.image.is_dir()):
        fail(f"{a.image}: no such file, or a pipe, which would hang")
    elevation = abs(a.elevation or 0)                              # 85 samples fill a .webp
    if not (1 <= a.samples <= 85 and a.steps >= 0 and 0 <= a.seed < 2 ** 63 and elevation <= 90):
        fail("give --samples 1 to 85, --steps from 0, --seed 0 to 2^63 - 1, --elevation -90 to 90")
    out = a.out or Path("out", a.image.name if a.image.is_dir() else a.image.stem)
    here = a.image.resolve()
    if out.resolve() == (here if here.is_dir() else here.parent):
        fail(f"{out}: there is an input in it, which may be written over; choose another --out")
    if a.views and not a.image.is_dir():
        fail(f"{a.image}: --views goes with the folder of an object, not with a picture")
    a.device = pick_device(a.device)
    denoiser, teacher, meta = load_student(a.weights, a.device)
    denoiser.to(memory_format=torch.channels_last)                            # faster on a CPU
    kind = "procedural" if meta["data"]["procedural"] else "real"
    print(f"weights: {a.weights} ({meta['dataset']}, {kind}, {denoiser.cfg.size} pixels)")
    a.steps = a.steps or meta["steps"]
    for name, content in results(denoiser, teacher, meta, a):
        write_atomically(out / name, lambda file: file.write(content))
    print(f"{a.image} -> {out}/")


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, OSError) as e:                                 # Ctrl-C says nothing
        fail(str(e) or "stopped; the files written so far are whole")
