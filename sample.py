"""Turn a picture into splats, a film of the denoising and a viewer page; measure how good they are.

    python sample.py car.png                                   # any picture of one object
    python sample.py a.png b.png --samples 8 --seed 1          # several
    python sample.py car.png --view back.png --pose back.txt   # guided by a further view
    python sample.py path/to/object --views 64,104             # view 64 of a dataset's object,
                                                               # guided by its view 104
writes into out/car/: viewer.html, a page to look around in; sample.png, the input and every sample
from several sides; film.webp, the samples condensing from noise, then a turn; and for each sample a
.ply in the standard 3DGS layout. The same seed gives the same files.

A pose file holds 16 numbers, a rigid 4 x 4 matrix by rows: from the further camera's frame to the
source camera's frame, both with OpenCV's axes (x right, y down, z forward), in the world units of
the training data. Pictures with a pose, and their source, must be square and are not framed.
"""
import argparse
import base64
import functools
import io
import json
import math
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from model import (STEPS, Denoiser, S, T, ddim_step, denoise, load_network, pick_device,
                   write_atomically)
from rasterize import (ALPHA_MIN, LOW_PASS, NEAR, Camera, Captured, Gaussians, fail, invert_pose,
                       render, transform)
from teacher import Teacher
from toys import cars

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
        others = repeat(views_of(cam, slice(1, None)), B)
        x_hat, _, _ = render(g, others, background)                           # (B, V-1, 3, H, W)
        return (x_hat - x[:, 1:]).square().mean((1, 2, 3, 4))                 # (B,)
    return guide


def views_of(cam, index):
    """Some views of cameras (B, V, ..)."""
    return Camera(cam.w2c[:, index], cam.K[:, index], cam.hw)


def repeat(cam, n):
    """The cameras of one object (1, V, ..) for n samples of it."""
    return Camera(cam.w2c.expand(n, -1, -1, -1), cam.K.expand(n, -1, -1), cam.hw)


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


# ---- one picture, from reading to the last file --------------------------------------------------

def from_picture(path, networks, a, write):
    """Make the results of one input; write(name, bytes) takes each."""
    denoiser, teacher, meta = networks
    size = denoiser.cfg.size
    pixels, cam = read_views(path, size, meta, a)                             # (V, size, size, 3)
    cam = cam.to(a.device)
    background = torch.tensor(meta["background"], device=a.device)            # (3,)
    x = torch.from_numpy(pixels).to(a.device).movedim(-1, 1)[None] / 255      # (1, V, 3, H, W)
    guide = guidance(denoiser, x, cam, background) if len(pixels) > 1 else None
    trail = trajectory(denoiser, x[:, 0], guide, a)
    s_hat = trail[-1][2]                                                      # (B, 24, H, W)

    K = cam.K[:, 0]                                                           # (1, 4 or 5)
    first = denoiser.gaussians(s_hat[:1], K)
    x_hat, _, _ = render(first, views_of(cam, [0]), background)               # (1, 1, 3, H, W)
    found = psnr(x_hat, x[:, :1]).item()                                      # dB
    if found < meta.get("source", 0) - STRANGE:
        print(f"warning: {path}: its own view comes back at {found:.0f} dB, {meta['source']:.0f} "
              f"is usual: these weights know {meta['dataset']}, and see something else",
              file=sys.stderr)
    middle = (denoiser.cfg.near + denoiser.cfg.far) / 2 + K[0, 4:].sum().item()
    look = dict(distance=middle, elevation=a.elevation, focal=K[0, 0].item() / size,
                background=list(meta["background"]))

    def place(network, s):
        """Splats of any step -> Gaussians in the upright frame."""
        g = network.gaussians(s, K.expand(len(s), -1))
        return upright(widen(g, look, size), look)
    states = [place(denoiser, s) for s in [s_t for s_t, _, _ in trail] + [s_hat]]
    g = states[-1]
    spread = differences(g, look, size)                                       # (SIDES,)
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
    page = viewer_html(path.resolve().name, png(pixels[0]), objects, look)
    write("viewer.html", page.encode())

    film = [photograph(place(denoiser, s_t), angle[None], look, a.size)       # (B, 1, P, P, 3)
            for s_t, angle in zip(condense(trail, a.frames), turn(a.frames))]
    film.append(photograph(g, turn(a.frames), look, a.size))                  # (B, frames, P, P, 3)
    write("film.webp", animation(np.concatenate(film, 1), a.fps))
    for k in range(a.samples):
        write(f"sample_{k}.ply", ply_bytes(one(g, k)))
    if a.samples > 1:
        print(f"the {a.samples} samples differ most from {look['differ']:.0f} degrees around the "
              f"object: standard deviation {spread[most]:.4f} of 1 there, {spread[0]:.4f} at the "
              "picture's own side")


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
    """B objects from V angles -> (B, V, side, side, 3) uint8, one angle at a time to bound the
    memory."""
    B = len(g.xyz)
    f = look["focal"] * side
    K = g.xyz.new_tensor([f, f, side / 2, side / 2]).expand(1, 1, 4)          # pixels
    background = g.xyz.new_tensor(look["background"])                         # (3,)
    images = []
    for w2c in orbit(angles, look).to(g.xyz.device).split(1, 1):              # (1, 1, 4, 4)
        cam = repeat(Camera(w2c, K, (side, side)), B)
        x, _, _ = render(g, cam, background)                                  # (B, 1, 3, P, P)
        images.append((x.clamp(0, 1) * 255 + 0.5).byte().movedim(2, -1).cpu())
    return torch.cat(images, 1).numpy()


def differences(g, look, size):
    """Standard deviation between the B samples, mean over the pixels, from each side -> (SIDES,)
    in [0, 1]; 0 for a single sample."""
    x = torch.from_numpy(photograph(g, turn(SIDES), look, size)) / 255        # (B, SIDES, P, P, 3)
    return x.std(0, correction=min(1, len(x) - 1)).mean((1, 2, 3))


# ---- how good they are ---------------------------------------------------------------------------
# Protocol of Splatter Image: view 64 in, all others out; per image, then per object, then overall.
# `cfg` is train.py's Config, `views` one split of a dataset.

def psnr(x_hat, x):
    """(..., 3, H, W) unclamped -> (...,) dB for a range of 1."""
    return -10 * (x_hat - x).square().flatten(-3).mean(-1).log10()


def ssim(x_hat, x):
    """(M, 3, H, W) -> (M,). 11x11 Gaussian window of sigma 1.5, zero padding, Wang et al. 2004."""
    k = torch.exp(-(torch.arange(11, device=x.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    k = (k / k.sum()).expand(3, 1, 1, 11)                                     # (3, 1, 1, 11)

    def blur(y):
        return F.conv2d(F.conv2d(y, k, padding=(0, 5), groups=3), k.mT, padding=(5, 0), groups=3)
    mu_a = blur(x_hat)                                                        # (M, 3, H, W)
    mu_b = blur(x)
    var_a = blur(x_hat ** 2) - mu_a ** 2
    var_b = blur(x ** 2) - mu_b ** 2
    cov = blur(x_hat * x) - mu_a * mu_b
    value = ((2 * mu_a * mu_b + 0.01 ** 2) * (2 * cov + 0.03 ** 2)
             / ((mu_a ** 2 + mu_b ** 2 + 0.01 ** 2) * (var_a + var_b + 0.03 ** 2)))
    return value.flatten(1).mean(1)


def test_views(views, o, n):
    """Indices of test object o: its source view, or the first if there is none, then n evenly
    spaced targets, or all for n = 0."""
    first, last = views.start[o:o + 2].tolist()
    source = first + views.meta["source"]
    source = source if source < last else first
    targets = [i for i in range(first, last) if i != source]
    if 0 < n < len(targets):
        targets = [targets[i * len(targets) // n] for i in range(n)]
    return torch.tensor([source] + targets)                                   # (1 + n,)


def opposite_views(views, o):
    """[source view of test object o, the view that looks the other way]: indices."""
    index = test_views(views, o, 0)                                           # (V,)
    axes = views.c2w[index, :3, 2].cpu()                                      # (V, 3)
    return index[[0, int((axes @ axes[0]).argmin())]]                         # (2,)


def told_views(views, o, n):
    """The source view of test object o and n random others: indices (1 + n,)."""
    index = test_views(views, o, 0)
    others = torch.randperm(len(index) - 1, generator=torch.Generator().manual_seed(o))[:n]
    return torch.cat([index[:1], index[1:][others]])                          # (1 + n,)


def object_views(views, index, cfg):
    """Images x (1, V, 3, H, W) and cameras of the views `index`, relative to the first."""
    x, cam = data.gather(views, index[None].to(views.images.device))          # (1, V, 3, H, W)
    return x.to(cfg.device), cam.to(cfg.device)


def background_of(views, cfg):
    return torch.tensor(views.meta["background"], device=cfg.device)          # (3,)


def hidden(depth, alpha, cam):
    """Pixels that show what the first view does not: depth and alpha (V, 1, H, W) of renderings
    from cam (B = 1) -> (V, H, W) bool. A pixel's point is moved into the first camera, and is
    hidden there if it lies 0.05 world units or more behind what that camera sees."""
    V, _, H, W = depth.shape
    z = (depth / alpha.clamp(min=1e-3)).flatten(1)                            # (V, HW)
    fx, fy, cx, cy = cam.K[0, :, :4, None].unbind(1)                          # (V, 1)
    v, u = torch.meshgrid(torch.arange(H, device=z.device) + 0.5,
                          torch.arange(W, device=z.device) + 0.5, indexing="ij")   # (H, W)
    xyz = torch.stack([(u.flatten() - cx) / fx * z, (v.flatten() - cy) / fy * z, z], -1)
    c2w = invert_pose(cam.w2c[0])[:, None]                                    # (V, 1, 4, 4)
    xyz = (c2w[..., :3, :3] @ xyz[..., None])[..., 0] + c2w[..., :3, 3]       # (V, HW, 3)
    x, y, z_src = xyz.unbind(-1)                                              # (V, HW)
    column = (fx[0] * x / z_src + cx[0]).long().clamp(0, W - 1)               # (V, HW)
    row = (fy[0] * y / z_src + cy[0]).long().clamp(0, H - 1)                  # (V, HW)
    behind = z_src > z[0, row * W + column] + 0.05                            # (V, HW)
    return (behind & (alpha.flatten(1) > 0.5)).view(V, H, W)


@torch.no_grad()
def evaluate(predict, views, cfg, n_views, objects, title="", lpips=None):
    """Scores of each test object, a dict each. predict(o, x_src (1, 3, H, W), K (1, 4)) makes the
    Gaussians of n samples.

    one, mean, best: PSNR in the n_views novel views of one sample (the average over samples), of
    the samples' mean image, and of the best sample. std: the standard deviation between samples in
    pixels that the source view hides. Of procedural cars also `cars.door_scores`."""
    background = background_of(views, cfg)
    scores = []
    for o in tqdm(objects, title, leave=False, mininterval=1, disable=not title):
        index = test_views(views, o, n_views)                                 # (V,)
        x, cam = object_views(views, index, cfg)                              # (1, V, 3, H, W)
        g = predict(o, x[:, 0], cam.K[:, 0])                                  # (n, N, ..)
        drawn = [render(one(g, k), cam, background) for k in range(len(g.xyz))]
        x_hat = torch.cat([rgb for rgb, _, _ in drawn])                       # (n, V, 3, H, W)
        shown = x[0].flatten(1).amax(1) > 0   # (V,) CO3D: a picture without a mask is all black
        shown[0] = False                                                      # the source
        novel = x_hat[:, shown]                                               # (n, V', 3, H, W)
        truth = x[0, shown]                                                   # (V', 3, H, W)
        each = psnr(novel, truth).mean(1)                                     # (n,)
        r = dict(one=each.mean(), ssim=ssim(novel[0], truth).mean(),
                 source=psnr(x_hat[:, 0], x[:, 0]).mean())
        if lpips:
            r["lpips"] = lpips(2 * novel[0] - 1, 2 * truth - 1).mean()
        if len(g.xyz) > 1:
            _, alpha, depth = drawn[0]                                        # (1, V, 1, H, W)
            r |= dict(mean=psnr(novel.mean(0), truth).mean(), best=each.max())
            where = hidden(depth[0], alpha[0], cam)[shown]                    # (V', H, W)
            if where.any():
                r["std"] = novel.std(0).mean(1)[where].mean()
        if views.meta["procedural"]:
            v, *pair = cars.door_pair(views, o, data.resize)
            facing = torch.stack([index[0], torch.tensor(v)])                 # (2,)
            x, cam = object_views(views, facing, cfg)                         # (1, 2, 3, H, W)
            door = repeat(views_of(cam, [1]), len(g.xyz))
            x_hat, _, _ = render(g, door, background)                         # (n, 1, 3, H, W)
            r |= cars.door_scores(x_hat[:, 0], x[0, 1], *(p.to(x) for p in pair))
        scores.append(dict(object=views.names[o], **{k: float(v) for k, v in r.items()}))
    return scores


def average_scores(scores):
    names = {k for r in scores for k in r if k != "object"}
    return {k: round(float(np.mean([r[k] for r in scores if k in r])), 6) for k in sorted(names)}


# ---- who predicts: each is what `evaluate` calls -------------------------------------------------

def by_teacher(teacher):
    """The teacher, told nothing."""
    return lambda o, x_src, K: teacher.gaussians(teacher(x_src[:, None]), K)


def by_told_teacher(teacher, views, cfg, choose):
    """The teacher, told the truth by the views choose(views, o), source first."""
    def predict(o, x_src, K):
        x, cam = object_views(views, choose(views, o), cfg)                   # (1, V, 3, H, W)
        raw = teacher(x, cam, background_of(views, cfg))                      # (1, 24, H, W)
        return teacher.gaussians(raw, K)
    return predict


def by_student(denoiser, views, cfg, n, guided=False):
    """n samples from noise that belongs to the object's number; perhaps guided by the opposite
    view."""
    def sample(x_src, eps):
        return denoiser.sample(x_src, eps, cfg.steps)
    if cfg.graph and not guided:
        sample = Captured(sample)

    def predict(o, x_src, K):
        seeds = [10**6 * (cfg.seed + 1) + 10**3 * o + k for k in range(n)]
        eps = torch.stack([torch.randn(S, cfg.size, cfg.size, generator=torch.Generator()
                                       .manual_seed(seed)) for seed in seeds]).to(cfg.device)
        x_src = x_src.repeat(n, 1, 1, 1)                                      # (n, 3, H, W)
        if guided:
            x, cam = object_views(views, opposite_views(views, o), cfg)       # (1, 2, 3, H, W)
            guide = guidance(denoiser, x, cam, background_of(views, cfg))
            s = denoiser.sample(x_src, eps, cfg.steps, guide)                 # (n, 24, H, W)
        else:
            s = sample(x_src, eps)                                            # (n, 24, H, W)
        return denoiser.gaussians(s, K.expand(n, -1))
    return predict


def predictors(cfg, views):
    """Yields (name, predict, network, meta) for each row that the weights in cfg.out can make."""
    out = Path(cfg.out)
    teacher, meta = load_network(out / "teacher.pt", Teacher, cfg.device)
    yield "teacher", by_teacher(teacher), teacher, meta
    if teacher.encoder:
        predict = by_told_teacher(teacher, views, cfg, functools.partial(told_views, n=cfg.told))
        yield f"teacher, told {cfg.told} views", predict, teacher, meta
    for stage in 1, 2:
        if (out / f"stage_{stage}.pt").exists():
            student, meta = load_network(out / f"stage_{stage}.pt", Denoiser, cfg.device)
            for name, guided in (f"stage {stage}", False), (f"stage {stage}, guided by 1", True):
                predict = by_student(student, views, cfg, cfg.samples, guided)
                yield name, predict, student, meta


COLUMNS = {"both": ".2f", "decided": ".2f", "amber": ".2f", "true": ".2f", "one": ".2f",
           "mean": ".2f", "best": ".2f", "std": ".4f", "ssim": ".3f", "lpips": ".3f",
           "source": ".2f", "parameters": ",", "minutes": ".1f"}


def score_table(cfg, train_views, views, about):
    """Every row that the weights in cfg.out can make -> the table as text. Also writes results.json
    and, for each row, the scores of each object."""
    out = Path(cfg.out)
    lpips = None
    if cfg.lpips:
        from lpips import LPIPS
        lpips = LPIPS(net="vgg", verbose=False).to(cfg.device)
    few = train_views.images[:: max(1, len(train_views.images) // 4096)]      # (M, 3, H, W)
    mean = (few.float().mean(0) / 255).to(cfg.device)                         # (3, H, W)
    truths = [object_views(views, test_views(views, o, cfg.eval_views)[1:], cfg)[0][0]
              for o in range(len(views))]                                     # (V, 3, H, W) each
    rows = {"mean image": dict(
        one=float(np.mean([psnr(mean, x).mean().item() for x in truths])),
        ssim=float(np.mean([ssim(mean.expand_as(x), x).mean().item() for x in truths])))}
    for name, predict, network, meta in predictors(cfg, views):
        scores = evaluate(predict, views, cfg, cfg.eval_views, range(len(views)), name, lpips)
        path = out / "scores" / f"{cfg.split}_{name.replace(',', '').replace(' ', '_')}.jsonl"
        text = "".join(json.dumps(r) + "\n" for r in scores)
        write_atomically(path, lambda file: file.write(text.encode()))
        rows[name] = dict(average_scores(scores), minutes=meta["minutes"],
                          parameters=sum(p.numel() for p in network.parameters()))
    kind = "procedural" if views.meta["procedural"] else "real"
    sources = {int(test_views(views, o, 1)[0] - views.start[o]) for o in range(len(views))}
    sources = " or ".join(map(str, sorted(sources)))
    title = (f"{views.meta['dataset']} ({kind}), {cfg.size}x{cfg.size}, {len(views)} {cfg.split} "
             f"objects, view {sources} in, {cfg.eval_views or 'all'} others out, {cfg.samples} "
             f"samples, seed {cfg.seed}; PSNR of one, their mean, the best; std where the source "
             "hides")
    record = json.dumps(dict(table=rows, kind=kind, source_views=sources, **about), indent=1)
    write_atomically(out / "results.json", lambda file: file.write(record.encode()))
    return title + "\n" + format_rows(rows)


def format_rows(rows):
    """{name: scores} -> lines of text."""
    shown = [k for k in COLUMNS if any(k in r for r in rows.values())]
    lines = [" " * 26 + "".join(f"{k:>11}" for k in shown)]
    for name, r in rows.items():
        cells = [format(r[k], COLUMNS[k]) if k in r else "" for k in shown]
        lines.append(f"{name:26}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def evaluate_few(network, views, cfg):
    """Scores on a few test objects in 5 views of each, for a curve."""
    few, n = (32, 16) if cfg.device.startswith("cuda") else (6, 4)            # objects, samples
    predict = (by_teacher(network) if isinstance(network, Teacher)
               else by_student(network, views, cfg, n))
    return average_scores(evaluate(predict, views, cfg, 5, range(min(few, len(views)))))


@torch.no_grad()
def preview(teacher, student, views, cfg):
    """Draws preview.png, a row for each of 6 objects: source | truth from the side that it hides |
    the teacher's rendering of that side | samples'. The student may be None."""
    predictions = [by_teacher(teacher)]
    titles = ["source", "truth", "teacher"]
    if student:
        n = min(cfg.samples, 8)
        predictions.append(by_student(student, views, replace(cfg, graph=False), n))
        titles += [f"sample {k}" for k in range(n)]
    lines = []
    for o in range(min(6, len(views))):
        x, cam = object_views(views, opposite_views(views, o), cfg)           # (1, 2, 3, H, W)
        pictures = [*x[0]]
        for predict in predictions:
            g = predict(o, x[:, 0], cam.K[:, 0])                              # (n, N, ..)
            other = repeat(views_of(cam, [1]), len(g.xyz))
            x_hat, _, _ = render(g, other, background_of(views, cfg))         # (n, 1, 3, H, W)
            pictures += x_hat[:, 0]
        lines.append(torch.cat(pictures, -1))                                 # (3, H, columns W)
    sheet = torch.cat(lines, 1).movedim(0, -1).clamp(0, 1)                    # (6 H, columns W, 3)
    zoom = max(1, 128 // cfg.size)                                            # legible
    sheet = (sheet * 255).byte().cpu().numpy().repeat(zoom, 0).repeat(zoom, 1)
    picture = Image.fromarray(np.pad(sheet, ((16, 0), (0, 0), (0, 0))))
    for i, title in enumerate(titles):
        ImageDraw.Draw(picture).text((i * cfg.size * zoom + 4, 2), title, "white")
    write_atomically(Path(cfg.out) / "preview.png", lambda file: picture.save(file, "PNG"))


# ==== The idea ends here. Below: file formats, pictures from the wild, flags. =====================

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


def animation(film, fps):
    """(B, frames, P, P, 3) uint8 -> the bytes of a .webp that loops, the objects side by side."""
    first, *rest = [Image.fromarray(np.concatenate(list(x), 1)) for x in film.swapaxes(0, 1)]
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return file.getvalue()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def quantise(states):
    """Gaussians of the states of one object, each (1, N, ..) -> (q, low, high).

    q (states, 23, n) int32 in 0..65535 stands for low + q / 65535 (high - low); low, high (23,). Of
    the N splats n are kept, those that are drawn in some state. The 23 numbers: xyz, opacity, quat,
    log scale, 4 x rgb of SH.
    """
    x = torch.stack([torch.cat([g.xyz[0], g.opacity[0, :, None], g.quat[0],
                                g.scale[0].clamp(min=1e-9).log(), g.sh[0].flatten(1)], 1)
                     for g in states]).cpu()                                  # (states, N, 23)
    drawn = (x[..., 3] >= ALPHA_MIN).any(0) & x.isfinite().all(2).all(0)      # (N,)
    x = x[:, drawn].mT                                                        # (states, 23, n)
    low, high = (x.amin((0, 2)), x.amax((0, 2))) if drawn.any() else torch.zeros(2, 23)
    unit = ((high - low) / 65535).clamp(min=1e-30)[:, None]                   # (23, 1)
    return ((x - low[:, None]) / unit).round().int().clamp(0, 65535), low, high


def viewer_html(title, picture, objects, look):
    """assets/viewer.html with the splats put in: a page that needs no network -> str.

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
    """A file -> (size, size, 3) uint8 as in training, and a warning or None.
    posed: its camera is given, so it is neither cropped nor shifted."""
    image = data.read_rgba(path)
    if (path.parent.parent / "intrinsics.txt").exists():   # SRN's pictures are composited already,
        image.putalpha(255)                                # and their alpha is only the mask
    step = max(1, max(image.size) // (16 * size))        # of a huge picture every n-th pixel
    alpha = np.asarray(image)[::step, ::step, 3]                              # (h, w)
    rgb = data.on_background(image, background)[::step, ::step]               # (h, w, 3)
    if posed:
        if rgb.shape[0] != rgb.shape[1]:
            fail(f"{path}: not square; with --view all pictures must be")
        return data.resize(rgb, size), None
    background = (255 * np.array(background) + .5).astype(int)                # (3,)
    rgb, subject = find_subject(rgb, alpha, background)
    note = None
    if subject is None:
        note = ("its background has more than one colour; for good splats cut the object out, on a "
                "transparent or plain ground")
    elif not subject.any():
        fail(f"{path}: there is nothing but background; give a picture of an object")
    elif subject[[0, -1]].any() or subject[:, [0, -1]].any():
        note = "the object is cut off by the picture's edge; in training it never is"
    return frame(rgb, subject, background.tolist(), size), note


def read_views(path, size, meta, a):
    """The source view, then those that guide -> pixels (V, size, size, 3) uint8, and cameras (1, V)
    in the source camera's frame."""
    if path.is_dir():
        split = next((split for split in ("test", "val", "train") if data.layout(path, split)), "")
        if not split:
            fail(f"{path}: a folder, but not the object of a dataset")
        pixels, c2w, K = data.read_object(path, split, size, meta)            # (V, size, size, 3)
        if K.shape[1] < len(meta["K"]):
            c2w, K = data.centred(c2w, K, path, size)
        finite = np.isfinite(c2w).all() and np.isfinite(K).all()
        if K.shape[1] > len(meta["K"]) or not finite:
            fail(f"{path}: its cameras are not such as these weights were trained with")
        views = (a.views or ("64" if len(c2w) > 64 else "0")).split(",")
        if not all(view.isdecimal() and int(view) < len(c2w) for view in views):
            fail(f"{path}: --views {a.views}: give numbers from 0 to {len(c2w) - 1}")
        views = [int(view) for view in views]
        pixels = pixels[views]
        K = K[views]                                                          # (V, 4 or 5)
        poses = np.linalg.inv(c2w[views[0]]) @ c2w[views]                     # to the source camera
    elif a.views:
        fail(f"{path}: --views needs the folder of an object")
    else:
        read = [prepare(p, size, meta["background"], bool(a.view)) for p in [path, *a.view]]
        pixels = np.stack([x for x, _ in read])
        if read[0][1]:
            print(f"warning: {path}: {read[0][1]}", file=sys.stderr)
        poses = [data.rigid(data.numbers(p, "a pose"), p, "a pose") for p in a.pose]
        poses = np.stack([np.eye(4), *poses])                                 # (V, 4, 4)
        K = np.tile(meta["K"], (len(poses), 1))                               # (V, 4 or 5)
    w2c = torch.from_numpy(np.linalg.inv(poses)).float()                      # (V, 4, 4)
    return pixels, Camera(w2c[None], torch.from_numpy(K).float()[None], (size, size))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("image", nargs="+", type=Path, help="pictures, or a dataset's objects: folders in one of "
        "the layouts that data.py reads")
    add("--views", metavar="N,N", help="of an object: its source view, then those that guide the "
        "samples, if any; default: 64, or 0 if it has fewer views")
    add("--view", metavar="FILE", action="append", type=Path, default=[],
        help="a further picture of the object that guides the samples; may be repeated")
    add("--pose", metavar="FILE", action="append", type=Path, default=[],
        help="one for each --view; see above")
    add("--weights", metavar="FILE", type=Path, default=HERE / "weights" / "cars.pt",
        help="a stage_1.pt or stage_2.pt of train.py; default weights/cars.pt")
    add("--out", metavar="FOLDER", type=Path, help="default out/<name of the input>")
    add("--samples", metavar="N", type=int, default=4, help="how many of each picture; default 4")
    add("--seed", metavar="N", type=int, default=0, help="another seed, other samples; default 0")
    add("--steps", metavar="N", type=int, help="DDIM steps; default: as many as in training")
    add("--frames", metavar="N", type=int, default=36, help="of one turn; default 36")
    add("--fps", metavar="N", type=int, default=12, help="frames a second; default 12")
    add("--size", metavar="N", type=int, default=192, help="pixels of a rendering; default 192")
    add("--elevation", metavar="X", type=float, default=25.0,
        help="degrees by which the picture looks down on the object; default 25")
    add("--device", metavar="NAME", default="", help="default: the GPU if there is one")
    parser.error = fail
    return parser


def load_networks(a):
    """-> denoiser, the teacher beside it or None, and what the file says."""
    denoiser, meta = load_network(a.weights, Denoiser, a.device)
    denoiser.to(memory_format=torch.channels_last)                 # faster on a CPU
    a.steps = a.steps or meta.get("steps", STEPS)
    kind = "procedural" if meta["data"]["procedural"] else "real"
    print(f"weights: {a.weights} ({meta['dataset']}, {kind}, {denoiser.cfg.size} pixels)")
    beside = a.weights.parent / "teacher.pt"
    teacher = load_network(beside, Teacher, a.device)[0] if beside.exists() else None
    if teacher and teacher.cfg.size != denoiser.cfg.size:
        teacher = None
    results = a.weights.parent / "results.json"                    # of train.py: the usual dB
    if results.exists() and "source" not in meta:
        row = json.loads(results.read_text())["table"].get(a.weights.stem.replace("_", " "), {})
        meta = meta | {"source": row.get("source", 0)}
    return denoiser, teacher, meta


@torch.no_grad()
def main():
    a = arguments().parse_args()
    bounds = dict(samples=(1, 1000), steps=(1, T - 1), frames=(1, 1000), fps=(1, 100),
                  size=(1, 2048), seed=(0, 2 ** 63 - 1), elevation=(-90, 90))
    for name, (least, most) in bounds.items():
        value = getattr(a, name)
        if value is not None and not least <= value <= most:
            fail(f"--{name} {value}: give {least} to {most}")
    for wrong, message in [
            (a.samples * a.size > 16383, "--samples x --size: more than the 16383 pixels that a "
             ".webp can be wide"),
            (len(a.view) != len(a.pose), "give a --pose for each --view"),
            (len(a.image) > 1 and (a.out or a.view) or a.view and a.image[0].is_dir(),
             "--out goes with a single input, --view with a single picture"),
            (len({path.resolve().stem for path in a.image}) < len(a.image),
             "two pictures of one name would share a folder; take one after the other")]:
        if wrong:
            fail(message)
    a.device = pick_device(a.device)
    warnings.simplefilter("ignore", UserWarning)                      # Pillow's, about odd files
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    networks = load_networks(a)
    errors = []
    for path in a.image:
        out = a.out or Path("out") / path.resolve().stem
        inputs = {file.resolve() for file in [path, *a.view, *a.pose]}
        names = []

        def write(name, content):
            if (out / name).resolve() in inputs:
                fail(f"{out / name}: is an input, not written over; choose another --out")
            write_atomically(out / name, lambda file: file.write(content))
            names.append(name)
        try:
            if not str(path).isprintable():
                fail(f"{str(path)!r}: cannot be printed; rename it")
            from_picture(path, networks, a, write)
            print(f"{path} -> {out}/: {' '.join(names)}", flush=True)
        except SystemExit as stop:                        # bad input: the others are still made
            errors.append(str(stop))
    if errors:
        raise SystemExit("\n".join(errors))


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        fail(e)
