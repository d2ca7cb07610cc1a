"""Teacher, bootstrapping, multi-step: one loop, three losses, one table at the end.

    python train.py --dataset cars            # everything, with sizes that fit the machine
    python train.py --dataset cars --views=6 --out=out/six   # any flag of Config below
    python train.py --dataset cars --eval_only                # make the table again

Run the same command again to go on after an interruption: every number comes out the same.
    stage 0   the teacher, by rendering alone; half of the time it is told what the picture hides
    stage 1   bootstrapping: predict the told teacher's splats from noised ones, and render well
    stage 2   multi-step: unroll the denoiser, render well, and leave the teacher behind
The paper's own recipe, a teacher that is never told anything: --code=0 --best_of=1.
What the paper does not say is marked *ours*. Several GPUs, and what a step costs:
    torchrun --standalone --nproc_per_node=2 train.py --dataset cars
    python csrc/bench.py 0 1 2                # works behind torchrun, too
"""
import ast
import functools
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from model import (STEPS, T, T_STAR, WEIGHTINGS, Denoiser, ModelConfig, S, add_noise, denoise,
                   lambda_t, load_checkpoint, load_network, normalise, pick_device,
                   save_network, write_atomically)
from rasterize import Camera, Gaussians, invert_pose, render
from sample import guidance
from teacher import Teacher, can_be_told, load_teacher, splat_statistics


@dataclass
class Config:
    # what and where
    dataset: str = "cars"        # cars, chairs, hydrants, teddybears, or path/to/your/own
    root: str = "data"           # folder of the datasets
    out: str = ""                # results; "" is out/<dataset>
    paper: bool = False          # sizes and numbers of the paper and of its teacher; see PAPER
    device: str = ""             # cpu or cuda; "" takes the GPU if there is one
    seed: int = 0
    teacher: str = ""            # its file, a teacher.pt or Splatter Image's. Stage 0 then only
                                 # teaches it to be told, if it cannot be told anything yet
    init: str = ""               # ours: continue training this teacher.pt in stage 0
    n_train: int = 160           # procedural cars to make, if there are no real ones
    n_test: int = 20
    data_seed: int = 0           # of the procedural cars
    # network, the same shape for teacher and student (the paper's student is smaller)
    size: int = 32               # pixels
    width: int = 16              # channels of the first level; see ModelConfig for these four
    mult: tuple = (1, 2, 4)
    blocks: int = 1
    attn: int = 8
    # ours: a teacher that is told what the picture does not show
    code: int = 8                # numbers that tell it; 0: nothing, the paper's own recipe
    told: int = 8                # further views that these numbers are made of
    code_noise: float = 0.1      # added to them in stage 0
    warm_start: bool = True      # ours: the student begins with the teacher's weights
    # optimisation; numbers by stage: teacher, bootstrapping, multi-step
    iters: tuple = (3000, 300, 30)    # steps; a stage of 0 is the end
    batch: tuple = (8, 8, 4)     # objects a step, over all GPUs; paper: 100 in stage 1, 10 in 2
    lr: tuple = (8e-3, 5e-4, 2e-4)    # peak learning rate of Adam
    views: int = 4               # rendered views per object, the source view among them
    warmup: int = 20             # steps of linear warm-up
    decay_lr: bool = True        # ours: then a cosine down to 0; False: constant
    clip: float = 1.0            # gradient norm
    ema: float = 0.99            # averaging of weights; the averages are evaluated and kept
    # losses, weights ours: the paper's coefficients are not known
    w_3dgs: float = 1.0          # stage 1: mean square on normalised splats
    w_3dgs_2: float = 0.0        # the same in stage 2; the paper drops it there
    w_code: float = 0.05         # ours, stage 1: reading the teacher's code off the noised splats
    best_of: int = 1             # ours, stage 2: train only the best of so many samples; 1: paper
    every_step: bool = False     # ours: stage 2 renders each step's splats, not only the last
    w_cyc: float = 0.1           # both stages; at 1 it outweighs the images, at 0 it is left out
    weighting: str = "min_snr"   # stage 2: lambda_t, or constant, or noise
    t_star: int = T_STAR         # stage 2 starts above this noise level (paper)
    steps: int = 5               # DDIM steps unrolled in stage 2 and when sampling; paper: 10
    # speed; the same training, but for the rounding of bf16
    bf16: bool = False           # half precision in the U-Net
    graph: bool = False          # replay the step as one CUDA graph
    compile: bool = False        # torch.compile the U-Net: a minute or two, then half the time
    checkpoint: bool = False     # stage 2 keeps only the splats between steps: less memory, slower
    # watching
    split: str = "test"          # whose objects are evaluated and previewed; paper's ablations: val
    eval_views: int = 10         # target views per test object, evenly spaced; 0 is all
    samples: int = 16            # samples of each test object
    preview_samples: int = 4     # and of each row of preview.png
    lpips: bool = False          # a column LPIPS, by the packages lpips and torchvision
    log_every: int = 10          # steps
    preview_every: int = 50
    save_every: int = 50
    # this call only
    eval_only: bool = False      # make the table again from the finished stages
    max_steps: int = 0           # stop and save after so many steps; 0 goes to the end


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # by torchrun
GPU = dict(n_train=2000, n_test=200, size=128, width=64, mult=(1, 2, 2, 2), attn=16,   # on a GPU
           iters=(20000, 5000, 2000), batch=(32, 32, 10), lr=(5e-4, 5e-4, 5e-5), views=4,
           warmup=500, ema=0.999, told=16, best_of=4, steps=STEPS, eval_views=50, log_every=50,
           preview_every=500, save_every=500, bf16=True, graph=True, compile=True,
           weighting="noise")      # better in longer runs: assets/results.md, "Before", 3
# What the paper says, and where it is silent Splatter Image: its teacher is --width=128 --blocks=4.
# The numbers of steps of stages 1 and 2 are ours; those of stage 0 stand in data.DATASETS.
PAPER = dict(code=0, best_of=1, size=128, width=96, mult=(1, 2, 2, 2), blocks=3, attn=16,
             warm_start=False, views=4, batch=(8, 100, 10), lr=(5e-5, 1e-4, 5e-5), clip=1e9,
             ema=0.9999, warmup=500, w_cyc=1.0, weighting="noise", steps=STEPS, eval_views=0,
             checkpoint=True)
PAPER_ITERS = 100_000, 20_000
SESSION = {"out", "root", "device", "eval_only", "max_steps", "eval_views", "samples",
           "log_every", "preview_every", "save_every",             # these may change between calls
           "preview_samples", "graph", "compile", "checkpoint", "lpips", "split"}


def parse(argv):
    """--name=value, --name value or --switch -> Config; the defaults depend on the machine."""
    known = {f.name: f.type for f in fields(Config)}
    given, argv = {}, list(argv)
    if "--help" in argv or "-h" in argv:
        print(__doc__ + "\n" + inspect.getsource(Config) + f"\nOn a GPU: {GPU}\n\nPAPER: {PAPER}")
        raise SystemExit(0)
    while argv:
        flag, eq, value = argv.pop(0).partition("=")
        name = flag[2:]
        if not flag.startswith("--") or name not in known:
            data.fail(f"unknown flag {flag}; known are " + " ".join(f"--{k}" for k in known))
        if not eq:
            is_value = argv and not argv[0].startswith("--")
            value = argv.pop(0) if is_value else "True" if known[name] is bool else ""
        try:
            if known[name] is not str:
                value = ast.literal_eval(value)
                value = float(value) if known[name] is float and type(value) is int else value
            if type(value) is not known[name]:
                raise ValueError
        except (ValueError, SyntaxError):
            data.fail(f"--{name} needs a {known[name].__name__}, not {value!r}; its default is "
                      f"{getattr(Config, name)!r}")
        given[name] = value
    device = pick_device(given.get("device"))
    if WORLD > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    sizes = GPU if device.startswith("cuda") else {}
    if given.get("paper"):
        first = data.DATASETS.get(given.get("dataset", Config.dataset), data.OWN)["iters"]
        sizes = {**sizes, **PAPER, "iters": (first, *PAPER_ITERS)}
    cfg = Config(**{**sizes, **given, "device": device})
    cfg.out = cfg.out or f"out/{Path(cfg.dataset).resolve().name}"
    least = dict(size=1, width=8, blocks=1, views=2, samples=1, steps=1, n_train=1, n_test=1,
                 log_every=1, preview_every=1, save_every=1)
    for name, value in least.items():
        if getattr(cfg, name) < value:
            data.fail(f"--{name}={getattr(cfg, name)}: give {value} or more")
    if cfg.weighting not in WEIGHTINGS:
        data.fail(f"--weighting={cfg.weighting}: give one of {', '.join(WEIGHTINGS)}")
    if any(len(getattr(cfg, name)) != 3 for name in ("iters", "batch", "lr")):
        data.fail("--iters, --batch and --lr have three numbers each, one a stage")
    if not (cfg.iters[0] or cfg.teacher):
        data.fail(f"--iters={cfg.iters}: without a stage 0, --teacher must name a teacher's file")
    if cfg.code and cfg.batch[0] < 2 * WORLD:
        data.fail(f"--batch={cfg.batch}: stage 0 tells the teacher nothing in half of each batch; "
                  f"give {2 * WORLD} or more, or --code=0")
    if cfg.told < 1:
        data.fail("--told=0: give 1 view or more, or --code=0 to tell the teacher nothing")
    if cfg.init and cfg.teacher:
        data.fail("--init is where stage 0 begins, --teacher leaves stage 0 out; give one of them")
    if not 0 <= cfg.t_star < T - 1:
        data.fail(f"--t_star={cfg.t_star}: give 0 to {T - 2}")
    if any(n % WORLD for n in cfg.batch):
        data.fail(f"--batch={cfg.batch}: each is shared out to {WORLD} processes; give multiples")
    if cfg.size % 2 ** (len(cfg.mult) - 1):
        data.fail(f"--size={cfg.size} does not halve {len(cfg.mult) - 1} times, once for every "
                  f"level of --mult={cfg.mult}; give another size or fewer levels")
    return cfg


# ---- the three losses ----------------------------------------------------------------------------
# Each: networks and one batch in, named losses out, the total first. x (B, V, 3, H, W) and cam hold
# the source view, the targets, and views that only tell the teacher. The source and the targets are
# rendered, as Splatter Image does.

def image_loss(x_hat, x):
    """|| x - x_hat ||^2 per object: (B, V, 3, H, W) twice -> (B,)."""
    return (x_hat - x).square().flatten(1).mean(1)


def cycle_loss(predict, x, x_hat, cam, background):
    """L_cyc: predict splats from the *rendered* target, look at them from the source.

    The new splats live in the target camera's frame, so the source's pose is taken relative to it.
    `predict` is frozen, but gradients pass through it to the rendered view.
    """
    x_tgt_hat = x_hat[:, 1].clamp(0, 1)                                       # (B, 3, H, W)
    g_cyc = predict(x_tgt_hat, cam.K[:, 1])
    to_source = invert_pose(cam.w2c[:, 1:2])                                  # (B, 1, 4, 4)
    x_src_hat, _, _ = render(g_cyc, Camera(to_source, cam.K[:, :1], cam.hw), background)
    return image_loss(x_src_hat, x[:, :1]).mean()


def first_views(x, cam, n):
    """The n views that are rendered and judged; those after them are only told."""
    return x[:, :n], Camera(cam.w2c[:, :n], cam.K[:, :n], cam.hw)


def stage_0(teacher, x, cam, background, t, eps, cfg):
    """The teacher: L = || x - R(T(x_src)) ||^2. Half of the batch is told nothing (the paper's
    teacher), the other half what the further views show (ours)."""
    code, half = None, len(x) // 2
    if teacher.encoder:
        late = Camera(cam.w2c[half:], cam.K[half:], cam.hw)
        code = teacher.code(x[half:], late, background)                       # (B - half, code)
        code = code + cfg.code_noise * eps[half:].flatten(1)[:, :cfg.code]    # eps is noise, too
        code = F.pad(code, (0, 0, half, 0))                                   # (B, code) 0: nothing
    raw, _ = teacher.unet(x[:, 0], code=code)                                 # (B, 24, H, W)
    x, cam = first_views(x, cam, cfg.views)
    x_hat, _, _ = render(teacher.gaussians(raw, cam.K[:, 0]), cam, background)
    per_object = image_loss(x_hat, x)                                         # (B,)
    losses = dict(loss=per_object.mean())
    if teacher.encoder:
        losses |= dict(loss_not_told=per_object[:half].mean(), loss_told=per_object[half:].mean())
    return losses, per_object


def noised_teacher(denoiser, teacher, x, cam, background, t, eps, cfg):
    """-> s_teacher, s_t (B, 24, H, W) each, and the code (B, code). Ours: the teacher is told what
    the further views show; with --code=0 it sees the source alone, as in the paper."""
    with torch.no_grad():
        code = teacher.code(x if cfg.code else x[:, :1], cam, background)     # (B, code)
        raw, _ = teacher.unet(x[:, 0], code=code)                             # (B, 24, H, W)
        s_teacher = normalise(raw, denoiser.stats)                            # (B, 24, H, W)
    return s_teacher, add_noise(s_teacher, t, eps), code


def stage_1(denoiser, teacher, x, cam, background, t, eps, cfg):
    """Bootstrapping: L = || s - D(s_t) ||^2 + || x - R(D(s_t)) ||^2 + L_cyc through the teacher.
    Ours: and || code - what D has read off s_t ||^2."""
    s_teacher, s_t, code = noised_teacher(denoiser, teacher, x, cam, background, t, eps, cfg)
    s_hat, code_hat = denoiser.predict(s_t, t, x[:, 0])                       # (B, 24, H, W)
    x, cam = first_views(x, cam, cfg.views)
    x_hat, _, _ = render(denoiser.gaussians(s_hat, cam.K[:, 0]), cam, background)
    per_object = image_loss(x_hat, x)                                         # (B,)
    frozen = lambda image, K: teacher.gaussians(teacher(image[:, None]), K)
    zero = x.new_zeros(())
    loss_3dgs = F.mse_loss(s_hat, s_teacher)
    loss_image = per_object.mean()
    loss_cyc = cycle_loss(frozen, x, x_hat, cam, background) if cfg.w_cyc else zero
    loss_code = F.mse_loss(code_hat.float(), code) if cfg.code else zero
    loss = cfg.w_3dgs * loss_3dgs + loss_image + cfg.w_cyc * loss_cyc + cfg.w_code * loss_code
    return dict(loss=loss, loss_3dgs=loss_3dgs, loss_image=loss_image, loss_cyc=loss_cyc,
                loss_code=loss_code), per_object


def stage_2(denoiser, teacher, x, cam, background, t, eps, cfg):
    """Multi-step: L = lambda_t || x - R(D o ... o D(s_t)) ||^2 + L_cyc through the frozen student.
    Gradients flow through every step; the teacher's splats are only a place to start from.

    A mean square over all samples pulls each of them to the average: from noise that hides the
    answer no better one is known. Ours: of cfg.best_of noises only the one whose sample is nearest
    to the truth is trained, so that the others may choose differently."""
    s_teacher, s_t, _ = noised_teacher(denoiser, teacher, x, cam, background, t, eps, cfg)
    x, cam = first_views(x, cam, cfg.views)

    def error(s):
        x_hat, _, _ = render(denoiser.gaussians(s, cam.K[:, 0]), cam, background)
        return image_loss(x_hat, x), x_hat                                    # (B,) (B, V, 3, H, W)
    if cfg.best_of > 1:
        with torch.no_grad():
            # shifted noise is noise, too, and needs no drawing
            noises = [eps.roll(k * cfg.size // cfg.best_of, 3) for k in range(cfg.best_of)]
            starts = torch.stack([add_noise(s_teacher, t, e) for e in noises])    # (n, B, 24, H, W)
            ends = [list(denoise(denoiser, s, t, x[:, 0], cfg.steps))[-1] for s in starts]
            best = torch.stack([error(s)[0] for s in ends]).argmin(0)         # (B,)
            s_t = starts[best, torch.arange(len(best), device=best.device)]   # (B, 24, H, W)
    again = functools.partial(checkpoint, denoiser, use_reentrant=False, preserve_rng_state=False)
    *early, s_hat = denoise(again if cfg.checkpoint else denoiser, s_t, t, x[:, 0], cfg.steps)
    per_object, x_hat = error(s_hat)
    if cfg.every_step:           # otherwise the early steps drift to splats that cannot be drawn
        per_object = sum([error(s)[0] for s in early], per_object) / cfg.steps    # (B,)
    weights = {k: v.detach() for k, v in denoiser.named_parameters()}         # today's, but frozen
    t_cyc = torch.full_like(t, T - 1)                               # ours: once, from noise

    def frozen(image, K):
        return denoiser.gaussians(functional_call(denoiser, weights, (eps, t_cyc, image)), K)
    loss_3dgs = F.mse_loss(s_hat, s_teacher)                        # how far the teacher is behind
    loss_image = (lambda_t(t, cfg.weighting, cfg.t_star) * per_object).mean()
    loss_cyc = cycle_loss(frozen, x, x_hat, cam, background) if cfg.w_cyc else x.new_zeros(())
    loss = cfg.w_3dgs_2 * loss_3dgs + loss_image + cfg.w_cyc * loss_cyc
    return dict(loss=loss, loss_3dgs=loss_3dgs, loss_image=loss_image,
                loss_cyc=loss_cyc), per_object


# ---- evaluation ----------------------------------------------------------------------------------
# Protocol of Splatter Image: view 64 in, all others out; per image, then per object, then overall.

def psnr(x_hat, x):
    """(..., 3, H, W) unclamped -> (...,) dB for a range of 1."""
    return -10 * (x_hat - x).square().flatten(-3).mean(-1).log10()


def ssim(x_hat, x):
    """(M, 3, H, W) -> (M,). 11x11 Gaussian window of sigma 1.5, zero padding, Wang et al. 2004."""
    k = torch.exp(-(torch.arange(11, device=x.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    k = (k / k.sum()).expand(3, 1, 1, 11)                                     # (3, 1, 1, 11)

    def blur(y):
        return F.conv2d(F.conv2d(y, k, padding=(0, 5), groups=3), k.mT, padding=(5, 0), groups=3)
    mu_a, mu_b = blur(x_hat), blur(x)                                         # (M, 3, H, W)
    var_a, var_b = blur(x_hat ** 2) - mu_a ** 2, blur(x ** 2) - mu_b ** 2
    cov = blur(x_hat * x) - mu_a * mu_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    value = ((2 * mu_a * mu_b + c1) * (2 * cov + c2)
             / ((mu_a ** 2 + mu_b ** 2 + c1) * (var_a + var_b + c2)))         # (M, 3, H, W)
    return value.flatten(1).mean(1)


def test_views(views, o, n_views):
    """Indices of test object o: its source view, or the first if there is none, then evenly spaced
    targets."""
    first, last, source = int(views.start[o]), int(views.start[o + 1]), views.meta["source"]
    source = first + source if last - first > source else first
    targets = [i for i in range(first, last) if i != source]
    if n_views and n_views < len(targets):
        targets = [targets[i * len(targets) // n_views] for i in range(n_views)]
    return torch.tensor([source] + targets)                                   # (1 + n,)


def opposite_views(views, o):
    """[source view of test object o, the view that looks the other way]: indices."""
    source, *targets = test_views(views, o, 0).tolist()
    axes = views.c2w[:, :3, 2].cpu()                                          # (M, 3)
    return [source, targets[int((axes[targets] @ axes[source]).argmin())]]


def object_views(views, index, device):
    """Images x (1, V, 3, H, W) and cameras of the views `index`, relative to the first."""
    index = torch.as_tensor(index)[None].to(views.images.device)              # (1, V)
    return [y.to(device) for y in data.gather(views, index)]


def repeat(cam, n):
    """The cameras of one object (1, V, ..) for n samples of it."""
    return Camera(cam.w2c.expand(n, -1, -1, -1), cam.K.expand(n, -1, -1), cam.hw)


def hidden(depth, alpha, cam):
    """Pixels that show what the first view does not: depth and alpha (V, 1, H, W) of renderings
    from cam (B = 1) -> (V, H, W) bool. A pixel's point is moved into the first camera, and is
    hidden there if it lies 0.05 world units or more behind what that camera sees."""
    V, _, H, W = depth.shape
    z = (depth / alpha.clamp(min=1e-3)).flatten(1)                            # (V, HW)
    fx, fy, cx, cy = cam.K[0, :, :4, None].unbind(1)                          # (V, 1)
    v, u = torch.meshgrid(torch.arange(H, device=z.device) + 0.5,
                          torch.arange(W, device=z.device) + 0.5, indexing="ij")   # (H, W)
    x, y = (u.flatten() - cx) / fx * z, (v.flatten() - cy) / fy * z           # (V, HW)
    xyz = torch.stack([x, y, z], -1)[:, :, None]                              # (V, HW, 1, 3)
    c2w = invert_pose(cam.w2c[0])[:, None]                                    # (V, 1, 4, 4)
    x, y, z_src = ((c2w[..., :3, :3] * xyz).sum(-1) + c2w[..., :3, 3]).unbind(-1)   # (V, HW)
    column = (fx[0] * x / z_src + cx[0]).long().clamp(0, W - 1)               # (V, HW)
    row = (fy[0] * y / z_src + cy[0]).long().clamp(0, H - 1)                  # (V, HW)
    behind = z_src > z[0, row * W + column] + 0.05                            # (V, HW)
    return (behind & (alpha.flatten(1) > 0.5)).view(V, H, W)


def door_scores(x_hat, truth, amber, blue):
    """Of renderings (n, 3, H, W) of a hidden door, its true picture (3, H, W), and what that would
    be if the door were amber and if it were blue. The paint q is 1 for amber, 0 for blue, 1/2 for
    mud.

    both: is one sample amber (q > 3/4) and one blue (q < 1/4)? decided: the share of samples that
    are one or the other. amber: the share with q > 1/2; over many cars the truth is 1/2. true: the
    share that are decided for the true colour."""
    d = amber - blue                                                          # (3, H, W)
    d = d * (d.abs().sum(0) > 0.5)                                            # where they differ
    x = torch.cat([truth[None], x_hat])                                       # (1 + n, 3, H, W)
    q = ((x - blue) * d).flatten(1).sum(1) / d.square().sum()                 # (1 + n,)
    is_amber, q = q[0] > 0.5, q[1:]                                           # () (n,)
    decided = (q - 0.5).abs() > 0.25                                          # (n,)
    share = lambda which: which.float().mean().item()
    return dict(both=float(q.max() > 0.75 and q.min() < 0.25), decided=share(decided),
                amber=share(q > 0.5), true=share(decided & ((q > 0.5) == is_amber)))


@torch.no_grad()
def evaluate(predict, views, cfg, background, n_views, objects, title="", lpips=None):
    """Scores of each test object, a dict each. predict(o, x_src (1, 3, H, W), K (1, 4)) makes the
    Gaussians of n samples.

    one, mean, best: PSNR in the n_views novel views of one sample (the average over samples), of
    the samples' mean image, and of the best sample. std: the standard deviation between samples in
    pixels that the source view hides. Of procedural cars also `door_scores`."""
    scores = []
    for o in tqdm(objects, title, leave=False, mininterval=1, disable=not title):
        index = test_views(views, o, n_views)                                 # (V,)
        x, cam = object_views(views, index, cfg.device)                       # (1, V, 3, H, W)
        g, x = predict(o, x[:, 0], cam.K[:, 0]), x[0]                         # (n, N, ..)
        n = len(g.xyz)
        drawn = [render(Gaussians(*[y[k:k + 1] for y in g]), cam, background) for k in range(n)]
        x_hat = torch.cat([rgb for rgb, _, _ in drawn])                       # (n, V, 3, H, W)
        _, alpha, depth = drawn[0]                                            # (1, V, 1, H, W)
        shown = x.flatten(1).amax(1) > 0      # (V,) CO3D: a picture without a mask is all black
        shown[0] = False                                                      # the source
        novel, truth = x_hat[:, shown], x[shown]                              # (n, V', 3, H, W)
        each = psnr(novel, truth).mean(1)                                     # (n,)
        r = dict(object=views.names[o], one=each.mean().item(),
                 ssim=ssim(novel[0], truth).mean().item(),
                 source=psnr(x_hat[:, 0], x[0]).mean().item(),
                 source_ssim=ssim(x_hat[0, :1], x[:1]).item())
        if lpips:
            r["lpips"] = lpips(2 * novel[0] - 1, 2 * truth - 1).mean().item()
        if n > 1:
            r |= dict(mean=psnr(novel.mean(0), truth).mean().item(), best=each.max().item())
            where = hidden(depth[0], alpha[0], cam)[shown]                    # (V', H, W)
            if where.any():
                r["std"] = novel.std(0).mean(1)[where].mean().item()
        if views.meta["procedural"]:
            v, amber, blue = data.door_pair(views, o)
            x, cam = object_views(views, [int(index[0]), v], cfg.device)      # (1, 2, 3, H, W)
            door = Camera(cam.w2c[:, 1:], cam.K[:, 1:], cam.hw)
            x_hat, _, _ = render(g, repeat(door, n), background)              # (n, 1, 3, H, W)
            r |= door_scores(x_hat[:, 0], x[0, 1], amber.to(x), blue.to(x))
        scores.append(r)
    return scores


def average_scores(scores):
    names = {k for r in scores for k in r if k != "object"}
    return {k: round(float(np.mean([r[k] for r in scores if k in r])), 6) for k in sorted(names)}


# ---- who predicts: each is what `evaluate` calls -------------------------------------------------

def noise_of(o, n, cfg):
    """(n, 24, H, W): belongs to the object's number, whatever else is drawn with it."""
    def one(k):
        gen = torch.Generator().manual_seed(10**6 * (cfg.seed + 1) + 10**3 * o + k)
        return torch.randn(S, cfg.size, cfg.size, generator=gen)
    return torch.stack([one(k) for k in range(n)]).to(cfg.device)


def by_teacher(teacher):
    """The teacher, told nothing."""
    return lambda o, x_src, K: teacher.gaussians(teacher(x_src[:, None]), K)


def told_index(views, o, n):
    """The source view of test object o, and n random others."""
    index = test_views(views, o, 0)
    others = torch.randperm(len(index) - 1, generator=torch.Generator().manual_seed(o))[:n]
    return torch.cat([index[:1], index[1:][others]])                          # (1 + n,)


def by_told_teacher(teacher, views, cfg, background, choose):
    """The teacher, told the truth by the views choose(o), source first: what a student learns from.
    """
    def predict(o, x_src, K):
        x, cam = object_views(views, choose(o), cfg.device)
        return teacher.gaussians(teacher(x, cam, background), K)
    return predict


def by_codes(teacher, views, cfg, background, n):
    """Control, codes instead of diffusion: the teacher is told what it gets wrong in n others."""
    @functools.cache
    @torch.no_grad()
    def code(o):
        x, cam = object_views(views, told_index(views, o, cfg.told), cfg.device)
        return teacher.code(x, cam, background)                               # (1, code)

    def predict(o, x_src, K):
        others = [i for i in range(len(views)) if i != o]
        codes = torch.cat([code(others[(o + k) % len(others)]) for k in range(n)])    # (n, code)
        raw, _ = teacher.unet(x_src.expand(n, -1, -1, -1), code=codes)        # (n, 24, H, W)
        return teacher.gaussians(raw, K.expand(n, -1))
    return predict


def by_student(denoiser, cfg, n):
    """n samples from pure noise."""
    sample = lambda x_src, eps: denoiser.sample(x_src, eps, cfg.steps)
    if cfg.graph:   # ten steps on a single picture are hardly more than their launches
        sample = Captured(sample)

    def predict(o, x_src, K):
        s = sample(x_src.repeat(n, 1, 1, 1), noise_of(o, n, cfg))             # (n, 24, H, W)
        return denoiser.gaussians(s, K.expand(n, -1))
    return predict


def by_guided_student(denoiser, views, cfg, background, n):
    """n samples, guided by the view from the other side."""
    def predict(o, x_src, K):
        guide = guidance(denoiser, *object_views(views, opposite_views(views, o), cfg.device),
                         background)
        x_src, eps = x_src.expand(n, -1, -1, -1), noise_of(o, n, cfg)         # (n, 24, H, W)
        s = denoiser.sample(x_src, eps, cfg.steps, guide)                     # (n, 24, H, W)
        return denoiser.gaussians(s, K.expand(n, -1))
    return predict


def by_optimised_teacher(teacher, views, cfg, background, steps=100):
    """Control of guidance: the teacher's splats, optimised on the source and the same view."""
    def predict(o, x_src, K):
        source, other = opposite_views(views, o)
        x, cam = object_views(views, [source, source, other], cfg.device)     # (1, 3, 3, H, W)
        error = guidance(teacher, x, cam, background)    # in all views but the first
        raw = teacher(x_src[:, None]).requires_grad_()                        # (1, 24, H, W)
        adam = torch.optim.Adam([raw], lr=0.02)
        with torch.enable_grad():
            for _ in range(steps):
                adam.zero_grad()
                error(raw).sum().backward()
                adam.step()
        return teacher.gaussians(raw.detach(), K)
    return predict


def load_lpips(device):
    """LPIPS of VGG (Zhang et al. 2018); the package brings its weights from torchvision."""
    from lpips import LPIPS
    return LPIPS(net="vgg", verbose=False).to(device)


COLUMNS = {"both": ".2f", "decided": ".2f", "amber": ".2f", "true": ".2f", "one": ".2f",
           "mean": ".2f", "best": ".2f", "std": ".4f", "ssim": ".3f", "lpips": ".3f",
           "source": ".2f", "parameters": ",", "minutes": ".1f"}


def predictors(cfg, views, out, background):
    """Yields (name, predict, network, what its file says) for each row of the table that can be
    made from the weights in `out`."""
    n = cfg.samples
    teacher, meta = load_network(out / "teacher.pt", Teacher, cfg.device)
    yield "teacher", by_teacher(teacher), teacher, meta
    if teacher.encoder:
        told = lambda o: told_index(views, o, cfg.told)
        opposite = lambda o: opposite_views(views, o)
        predict = by_told_teacher(teacher, views, cfg, background, told)
        yield f"teacher, told {cfg.told} views", predict, teacher, meta
        if len(views) > 1:
            predict = by_codes(teacher, views, cfg, background, n)
            yield "teacher, codes of others", predict, teacher, meta
        predict = by_told_teacher(teacher, views, cfg, background, opposite)
        yield "teacher, told 1 view", predict, teacher, meta
        predict = by_optimised_teacher(teacher, views, cfg, background)
        yield "teacher, optimised on 1", predict, teacher, meta
    for stage in 1, 2:
        if (out / f"stage_{stage}.pt").exists():
            student, meta = load_network(out / f"stage_{stage}.pt", Denoiser, cfg.device)
            yield f"stage {stage}", by_student(student, cfg, n), student, meta
            predict = by_guided_student(student, views, cfg, background, n)
            yield f"stage {stage}, guided by 1", predict, student, meta


def results(cfg, splits, out, identity, background):
    """Every row of the table that can be made from what is in `out`; written to results.json."""
    views, device = on_device(splits[cfg.split], cfg.device), cfg.device
    images = splits["train"].images[:: max(1, len(splits["train"].images) // 4096)]
    mean = (images.float().mean(0) / 255).to(device)                          # (3, H, W)
    truths = [object_views(views, test_views(views, o, cfg.eval_views)[1:], device)[0][0]
              for o in range(len(views))]                                     # (V, 3, H, W) each
    rows = {"mean image": dict(
        one=np.mean([psnr(mean, x).mean().item() for x in truths]),
        ssim=np.mean([ssim(mean.expand_as(x), x).mean().item() for x in truths]))}
    lpips = load_lpips(device) if cfg.lpips else None
    for name, predict, network, meta in predictors(cfg, views, out, background):
        scores = evaluate(predict, views, cfg, background, cfg.eval_views, range(len(views)), name,
                          lpips)
        path = out / "scores" / f"{cfg.split}_{name.replace(',', '').replace(' ', '_')}.jsonl"
        text = "".join(json.dumps(r) + "\n" for r in scores)
        write_atomically(path, lambda f: f.write(text.encode()))
        count = sum(p.numel() for p in network.parameters())
        rows[name] = {**average_scores(scores), "parameters": count, "minutes": meta["minutes"]}
    kind = "procedural" if identity["procedural"] else "real"
    sources = sorted({int(test_views(views, o, 1)[0] - views.start[o]) for o in range(len(views))})
    lines = [f"{views.meta['dataset']} ({kind}), {cfg.size}x{cfg.size}, {len(views)} {cfg.split} "
             f"objects, view {' or '.join(map(str, sources))} in, {cfg.eval_views or 'all'} others "
             f"out, {cfg.samples} samples, seed {cfg.seed}; PSNR of one, their mean, the best; std "
             "where the source hides"]
    shown = [k for k in COLUMNS if any(k in r for r in rows.values())]
    lines.append(" " * 24 + "".join(f"{k:>11}" for k in shown))
    for name, r in rows.items():
        lines.append(f"{name:24}" + "".join(
            f"{format(r[k], COLUMNS[k]) if k in r else '':>11}" for k in shown))
    record = dict(table=rows, config=asdict(cfg), data=identity, kind=kind, seed=cfg.seed,
                  source_views=sources, device=device_name(device), git=git_revision())
    write_atomically(out / "results.json", lambda f: f.write(json.dumps(record, indent=1).encode()))
    return "\n".join(lines)


def unlike(views, background, n, among=64):
    """Up to n of the first test objects, each of a colour as far as can be from those before."""
    index = torch.stack([test_views(views, o, 1)[0] for o in range(min(among, len(views)))])
    x = views.images[index.to(views.images.device)].to(background.device) / 255   # (O, 3, H, W)
    object_ = ((x - background[:, None, None]).abs().amax(1, True) > 0.1)     # (O, 1, H, W)
    colour = (x * object_).sum((2, 3)) / object_.sum((2, 3)).clamp(min=1)     # (O, 3)
    chosen = [0]
    while len(chosen) < min(n, len(colour)):
        chosen.append(int(torch.cdist(colour, colour[chosen]).amin(1).argmax()))
    return chosen


@torch.no_grad()
def preview(teacher, student, views, cfg, background, path):
    """Draws preview.png, a row for each of 6 objects: source | truth from the side that it hides |
    the teacher's rendering of that side | samples'. The student may be None."""
    predictions, titles, lines = [by_teacher(teacher)], ["source", "truth", "teacher"], []
    if student:
        predictions.append(by_student(student, replace(cfg, graph=False), cfg.preview_samples))
        titles += [f"sample {k}" for k in range(cfg.preview_samples)]
    for o in unlike(views, background, 6):
        x, cam = object_views(views, opposite_views(views, o), cfg.device)    # (1, 2, 3, H, W)
        other, pictures = Camera(cam.w2c[:, 1:], cam.K[:, 1:], cam.hw), [*x[0]]
        for predict in predictions:
            g = predict(o, x[:, 0], cam.K[:, 0])                              # (n, N, ..)
            x_hat, _, _ = render(g, repeat(other, len(g.xyz)), background)    # (n, 1, 3, H, W)
            pictures += x_hat[:, 0]
        lines.append(torch.cat(pictures, -1))                                 # (3, H, columns W)
    sheet = torch.cat(lines, 1).movedim(0, -1).clamp(0, 1)                    # (6 H, columns W, 3)
    zoom = max(1, 128 // cfg.size)                                            # legible
    sheet = (sheet * 255).byte().cpu().numpy().repeat(zoom, 0).repeat(zoom, 1)
    picture = Image.fromarray(np.pad(sheet, ((16, 0), (0, 0), (0, 0))))
    for i, title in enumerate(titles):
        ImageDraw.Draw(picture).text((i * cfg.size * zoom + 4, 2), title, "white")
    write_atomically(path, lambda f: picture.save(f, "PNG"))


def held_out(network, views, cfg, background):
    """Scores on a few test objects in 5 views of each, for a curve."""
    few, n = (32, 16) if cfg.device.startswith("cuda") else (6, 4)            # objects, samples
    predict = by_teacher(network) if isinstance(network, Teacher) else by_student(network, cfg, n)
    return average_scores(evaluate(predict, views, cfg, background, 5, range(min(few, len(views)))))


# ---- bookkeeping ---------------------------------------------------------------------------------

def git_revision():
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
                             capture_output=True, text=True)
        return git.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def device_name(device):
    return (torch.cuda.get_device_name(device) if device.startswith("cuda")
            else f"CPU, {torch.get_num_threads()} threads")


def provenance(cfg, views, identity, **more):
    """What is written beside weights: plain values."""
    return dict(dataset=cfg.dataset, data=identity, K=views.K[0].tolist(), seed=cfg.seed,
                steps=cfg.steps, background=list(views.meta["background"]), git=git_revision(),
                device=f"{WORLD} x {device_name(cfg.device)}", **more)


def learning_rate(cfg, stage, step):
    """Linear warm-up, then half a cosine down to 0, or constant."""
    iters = cfg.iters[stage]
    ramp = min(1.0, (step + 1) / max(1, min(cfg.warmup, iters // 2)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / iters))
    return cfg.lr[stage] * ramp * (cosine if cfg.decay_lr else 1)


def draw_batch(views, cfg, stage, step, mine=slice(RANK, None, WORLD)):
    """Everything random in one step, from (seed, stage, step) alone: resuming needs no other state,
    and every process draws the whole batch and takes its own share of it.
    V views: those that are rendered, and those that only tell the teacher.
    -> x (B, V, 3, H, W), w2c (B, V, 4, 4), K (B, V, 4), t (B,), eps (B, 24, H, W)."""
    seed = (cfg.seed * 3 + stage) * 10**9 + step
    gen, batch = torch.Generator().manual_seed(seed), cfg.batch[stage]
    n_views = max(cfg.views, 1 + cfg.told) if cfg.code else cfg.views
    _, index = data.draw(views, batch, n_views, gen)                          # (B, V)
    t = torch.randint(cfg.t_star + 1 if stage == 2 else 0, T, (batch,), generator=gen)   # (B,)
    if cfg.device.startswith("cuda"):                                         # the large one there
        gen = torch.Generator(cfg.device).manual_seed(seed)
    eps = torch.randn(batch, S, cfg.size, cfg.size, generator=gen,            # (B, 24, H, W)
                      device=gen.device)

    def send(y, device):   # from pinned memory, or the host would wait for the copy
        if y.device.type == torch.device(device).type:
            return y
        return y.pin_memory().to(device, non_blocking=True)
    x, cam = data.gather(views, send(index[mine], views.images.device))
    return [send(y, cfg.device) for y in (x, cam.w2c, cam.K, t[mine], eps[mine])]


def teacher_splats(teacher, views, cfg, background):
    """Raw splats (B, 24, H, W) of 32 batches, as stage 1 will noise them."""
    for i in range(32):
        x, w2c, K, _, _ = draw_batch(views, cfg, 0, cfg.iters[0] + i, slice(None))
        x = x if cfg.code else x[:, :1]
        yield teacher(x, Camera(w2c, K, tuple(x.shape[-2:])), background)


def on_device(views, device):
    """The images there once and for all, as uint8, if they fit."""
    fits = device.startswith("cuda") and views.images.nbytes < torch.cuda.mem_get_info()[0] / 3
    return views.to(device) if fits else views


def batches(views, cfg, stage, first, end):
    """draw_batch of every step; where the images are not on the device, a thread is one ahead."""
    draw = functools.partial(draw_batch, views, cfg, stage)
    if views.images.device.type == torch.device(cfg.device).type:
        yield from map(draw, range(first, end))
    else:
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(draw, first)
            for step in range(first, end):
                batch, ahead = ahead.result(), pool.submit(draw, step + 1)
                yield batch


# ---- speed: nothing of the idea is in here -------------------------------------------------------

class Captured:
    """step(*tensors) -> tensors, as one CUDA graph: a single launch instead of thousands.

    The first calls run as they are, because compilers and libraries settle down in them; then the
    same work is recorded, once, and from there on replayed on new inputs. The outputs are
    overwritten by the next call."""

    def __init__(self, step, first=3):
        self.step, self.first, self.graph, self.stream = step, first, None, torch.cuda.Stream()

    def __call__(self, *inputs):
        if self.graph:
            torch._foreach_copy_(self.inputs, inputs)
            self.graph.replay()
            return self.outputs
        self.first -= 1
        if self.first >= 0:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):   # the stream that a recording will use, too
                outputs = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.step(*self.inputs)
        return self(*inputs)


def average_gradients(params):
    """Over all processes, in one message."""
    gradients = [p.grad for p in params]
    flat = torch.cat([g.flatten() for g in gradients])                        # (n,)
    dist.all_reduce(flat)
    parts = flat.div_(WORLD).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [x.view_as(g) for x, g in zip(parts, gradients)])


def make_step(cfg, stage, network, teacher, background):
    """-> step, optimiser. step(x, w2c, K, t, eps, lr) trains once and waits for nothing; it returns
    the named losses, the loss per object (B,), the gradient's norm, and 1 if that was no number."""
    params = [x for x in network.parameters() if x.requires_grad]
    cuda = cfg.device.startswith("cuda")
    optimiser = torch.optim.Adam(params, lr=torch.zeros((), device=cfg.device), betas=(0.9, 0.99),
                                 eps=1e-8, fused=True, capturable=cuda)
    if cfg.compile:
        from torch._inductor import config as inductor   # late: importing it takes seconds
        # else it computes U-Nets in NCHW, and cuDNN turns each image round and back
        inductor.force_layout_optimization = True
        # one code for each use: with or without gradients, of weights or of images
        torch._dynamo.config.recompile_limit = 64
    for net in (network, teacher):
        if net:
            net.unet.bf16 = cfg.bf16
            if cfg.compile:
                net.unet.compile(dynamic=False)
                if getattr(net, "encoder", None):
                    net.encoder.compile(dynamic=False)

    def step(x, w2c, K, t, eps, lr):
        # ---- a single training step --------------------------------------------------------------
        cam = Camera(w2c, K, tuple(x.shape[-2:]))
        optimiser.zero_grad()   # to None: what backward makes is kept, not added
        if stage == 0:
            losses, per_object = stage_0(network, x, cam, background, t, eps, cfg)
        else:
            losses, per_object = (stage_1, stage_2)[stage - 1](network, teacher, x, cam, background,
                                                               t, eps, cfg)
        losses["loss"].backward()
        if WORLD > 1:
            average_gradients(params)
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.clip)               # ()
        optimiser.found_inf = (~norm.isfinite()).float()   # 1: Adam leaves everything as it was
        optimiser.param_groups[0]["lr"].copy_(lr)
        optimiser.step()
        # ------------------------------------------------------------------------------------------
        return ({k: v.detach() for k, v in losses.items()}, per_object.detach(), norm,
                optimiser.found_inf)
    return (Captured(step) if cfg.graph else step), optimiser


def join_processes(device):
    """Where torchrun has started several."""
    if WORLD > 1:
        cuda = device.startswith("cuda")
        torch.cuda.set_device(device) if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))


def on_all(x, device):
    """The sum of x over all processes."""
    x = torch.as_tensor(x, device=device).clone()
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def meet():
    """Nobody goes on before everybody is here."""
    if WORLD > 1:
        dist.barrier()


class Stop:
    """Ctrl-C and SIGTERM ask; the loop stops after the step in hand. A second Ctrl-C kills."""
    asked = False

    def __init__(self):
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, number, frame):
        self.asked = True
        self.end()

    def end(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Log:
    """out/log.jsonl: one line a record. Lines from beyond the point of resumption are dropped."""

    def __init__(self, path, stage, step, header):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                r = json.loads(line)
            except ValueError:                                                # cut by a crash
                continue
            if "step" not in r or (r["stage"], r["step"]) <= (stage, step):
                kept.append(line)
        text = "".join(line + "\n" for line in kept or [json.dumps(header)])
        if RANK == 0:
            write_atomically(path, lambda f: f.write(text.encode()))

    def __call__(self, **record):
        if RANK == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")


def resume(path, cfg, identity):
    """The training state in `path`, or a new one; refuses a state that belongs to another run."""
    if not path.exists():
        return dict(stage=0, step=0, skipped=0, minutes=[0.0, 0.0, 0.0])
    state = load_checkpoint(path, ("stage", "step", "config", "data"))
    free = SESSION | {"steps"} if cfg.eval_only else SESSION     # sampling may take other steps
    old, new = ({k: v for k, v in c.items() if k not in free}
                for c in (state["config"], asdict(cfg)))
    changed = [f"{k}: {old.get(k)} -> {new[k]}" for k in new
               if old.get(k, new[k]) != new[k]]                  # unknown then: what it is now
    if state["data"]["fingerprint"] != identity["fingerprint"]:
        changed.append("the images in the dataset")
    if changed:
        data.fail(f"{path} is a run with other settings ({'; '.join(changed)}); give those, or "
                  "another --out, or delete that folder")
    return state


def train(cfg, splits, out, identity, background):
    """Stages 0, 1, 2 from wherever `out` says they are. Returns False if it was asked to stop."""
    device, stop, done_here = cfg.device, Stop(), 0
    views, test = on_device(splits["train"], device), splits[cfg.split]
    state = resume(out / "resume.pt", cfg, identity)
    meet()                                         # before anyone writes what another still reads
    if cfg.teacher and (not cfg.code or load_network(out / "teacher.pt", Teacher)[0].encoder):
        if state["stage"] == 0:                    # a teacher that can be told needs no stage 0
            state.update(stage=1, step=0)
    log = Log(out / "log.jsonl", state["stage"], state["step"],
              dict(config=asdict(cfg), data=identity, git=git_revision()))
    shape = ModelConfig(cfg.size, cfg.width, tuple(cfg.mult), cfg.blocks, cfg.attn,
                        views.meta["near"], views.meta["far"], cfg.code)
    teacher = None
    for stage in range(state["stage"], 3):
        if not cfg.iters[stage]:
            break
        # -- once a stage: the network that learns, its average, its optimiser
        iters = cfg.iters[stage]
        torch.manual_seed(cfg.seed)
        if stage == 0 and (cfg.init or cfg.teacher):
            network = load_network(cfg.init or out / "teacher.pt", Teacher)[0]
            if cfg.init and replace(network.cfg, code=cfg.code) != shape:
                data.fail(f"--init={cfg.init}: a {network.cfg}, and here it is a {shape}")
            if cfg.init and network.cfg.code not in (0, cfg.code):
                data.fail(f"--init={cfg.init}: it is told in {network.cfg.code} numbers: give "
                          f"--code={network.cfg.code}")
            if cfg.code and not network.encoder:
                network = can_be_told(network, cfg.code)
                network.requires_grad_(True) if cfg.init else None            # all is trained on
        elif stage == 0:
            network = Teacher(shape)
        else:
            teacher = load_network(out / "teacher.pt", Teacher, device)[0].requires_grad_(False)
            teacher.to(memory_format=torch.channels_last)
            network = Denoiser(shape)
            if stage == 1:
                network.stats.copy_(splat_statistics(teacher_splats(
                    teacher, views, cfg, background)))
                if cfg.warm_start and replace(teacher.cfg, code=cfg.code) == shape:
                    network.warm_start(teacher.unet)
                elif cfg.warm_start and RANK == 0:
                    print(f"no warm start: the teacher is {teacher.cfg}, the student {shape}")
            else:
                network.load_state_dict(load_network(out / "stage_1.pt", Denoiser)[0].state_dict())
        if cfg.paper and stage < 2 and not (cfg.warm_start if stage else cfg.init):
            network.unet.start(cfg.size, **views.meta["start"])
        network.to(device, memory_format=torch.channels_last)                 # convolutions like it
        if WORLD > 1:   # the same to the last bit
            for x in network.state_dict().values():
                dist.broadcast(x, 0)
        average = deepcopy(network).requires_grad_(False)
        frozen = deepcopy(teacher)   # to train with; the other stays as it is, to look at
        step_once, optimiser = make_step(cfg, stage, network, frozen, background)
        if state["step"]:
            network.load_state_dict(state["network"])
            average.load_state_dict(state["average"])
            group = {k: optimiser.param_groups[0][k] for k in ("lr", "capturable")}
            optimiser.load_state_dict(state["optimiser"])
            optimiser.param_groups[0].update(group)                           # of this device
        params, averages = list(network.parameters()), list(average.parameters())

        def save(step):
            state.update(stage=stage, step=step, config=asdict(cfg), data=identity,
                         network=network.state_dict(), average=average.state_dict(),
                         optimiser=optimiser.state_dict())
            write_atomically(out / "resume.pt", lambda f: torch.save(state, f))

        if cfg.compile and RANK == 0:
            print(f"stage {stage}: compiling the U-Net, a minute or two")
        bar = tqdm(range(state["step"], iters), f"stage {stage}", iters, initial=state["step"],
                   unit="step", mininterval=0.5, disable=RANK > 0)
        # (2, 6): sum and count of the losses by noise level; in the last column, skipped steps
        levels = torch.zeros(2, T // 20 + 1, device=device)
        began, asked = time.time(), False
        for step, batch in zip(bar, batches(views, cfg, stage, state["step"], iters)):
            lr = torch.full((), learning_rate(cfg, stage, step), device=device)
            losses, per_object, norm, skipped = step_once(*batch, lr)
            decay = min(cfg.ema, (1 + step) / (10 + step))                   # short memory at first
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - decay)
            levels[:, -1] += skipped
            levels.index_add_(1, batch[3] // 20, torch.stack([per_object, per_object ** 0]))

            # -- all that waits for the device happens now and then only
            done_here += 1
            state["minutes"][stage] += (time.time() - began) / 60
            began = time.time()
            last, asked = step == iters - 1, stop.asked or 0 < cfg.max_steps <= done_here
            shown = (step + 1) % cfg.preview_every == 0 or last
            logged = (step + 1) % cfg.log_every == 0 or shown
            if WORLD > 1:   # processes stop together, where they meet anyway
                asked = logged and float(on_all(float(asked), device)) > 0
            if logged:
                record = {k: float(on_all(v, device)) / WORLD for k, v in losses.items()}
                total, count = on_all(levels, device).tolist()
                state["skipped"] += int(total[-1]) // WORLD
                rate = (bar.format_dict["rate"] or 0.0) * cfg.batch[stage] * cfg.views   # rendered
                bins = {} if stage == 0 else {f"t{20 * k}-{20 * k + 19}": total[k] / count[k]
                                              for k in range(T // 20) if count[k]}
                if shown and RANK == 0:
                    nets = (teacher, average) if stage else (average, None)
                    preview(*nets, test, cfg, background, out / "preview.png")
                    record |= held_out(average, test, cfg, background)
                log(stage=stage, step=step + 1, **record, by_level=bins, grad_norm=float(norm),
                    skipped=state["skipped"], images_per_s=rate)
                bar.set_postfix_str(f"loss {record['loss']:.4f}, {rate:.0f} img/s")
                levels.zero_()
            if ((step + 1) % cfg.save_every == 0 or asked) and RANK == 0:
                save(step + 1)
            if asked and not last:
                bar.close()
                return False
        bar.close()
        name = ("teacher", "stage_1", "stage_2")[stage]
        meta = provenance(cfg, views, identity, stage=stage, iters=iters,
                          minutes=sum(state["minutes"][:stage + 1]))
        state = dict(stage=stage + 1, step=0, skipped=state["skipped"], minutes=state["minutes"],
                     config=asdict(cfg), data=identity)
        if RANK == 0:
            # a teacher that was given stays as it is, to the last bit
            save_network(out / f"{name}.pt", average, meta, half=not (cfg.teacher and stage == 0))
            write_atomically(out / "resume.pt", lambda f: torch.save(state, f))
        meet()                                     # the next stage reads that file
        if asked:
            return stage == 2
    stop.end()
    return True


def main():
    cfg = parse(sys.argv[1:])
    began = time.time()
    cuda = cfg.device.startswith("cuda")
    say = print if RANK == 0 else lambda *_, **__: None                       # one voice
    say(f"device: {f'{WORLD} x ' * (WORLD > 1)}{device_name(cfg.device)}; sizes for "
        f"{'a GPU' if cuda else 'a CPU'} (--help lists the flags)")
    if (cfg.graph or cfg.compile) and not cuda:
        data.fail("--graph and --compile need a GPU; leave them out")
    join_processes(cfg.device)
    if RANK > 0:                                                              # 0 makes the data
        meet()
    splits = data.prepare(cfg.dataset, cfg.root, cfg.size, cfg.n_train, cfg.n_test,
                          cfg.data_seed, quiet=RANK > 0, splits=("train", cfg.split))
    if RANK == 0:
        meet()
    for split in {"train", cfg.split}.difference(splits):
        data.fail(f"{cfg.dataset} in {cfg.root} has no {split} split; unpack it too")
    meta = splits["train"].meta
    identity = {k: meta[k] for k in ("dataset", "procedural", "fingerprint")}
    out = Path(cfg.out)
    background = torch.tensor(meta["background"], device=cfg.device)          # (3,)
    say(" ".join(f"{k}={v}" for k, v in asdict(cfg).items()))
    if WORLD > 1:
        say(f"{WORLD} processes; each takes {[n // WORLD for n in cfg.batch]} objects a step")
    if cfg.teacher and not (out / "resume.pt").exists() and RANK == 0:        # nothing has begun
        given = load_teacher(cfg.teacher, meta["near"], meta["far"])
        if given.cfg.size != cfg.size:
            data.fail(f"{cfg.teacher} is for {given.cfg.size} pixels: give --size={given.cfg.size}")
        if cfg.code and given.cfg.code not in (0, cfg.code):
            data.fail(f"{cfg.teacher} is told in {given.cfg.code} numbers: give "
                      f"--code={given.cfg.code}, or --code=0 to tell it nothing")
        if cfg.code and not given.cfg.code and not cfg.iters[0]:
            data.fail(f"{cfg.teacher} cannot be told anything yet: give stage 0 steps to teach it, "
                      "or --code=0 for the paper's own recipe")
        save_network(out / "teacher.pt", given, provenance(
            cfg, splits["train"], identity, stage=0, iters=0, minutes=0.0, source=cfg.teacher),
            half=False)
    if not cfg.eval_only:
        say(f"watch {out}/preview.png; Ctrl-C saves, and the same command goes on from there")
        if not train(cfg, splits, out, identity, background):
            say(f"stopped and saved; to go on: python {' '.join(sys.argv)}")
            raise SystemExit(130 if RANK == 0 else 0)
    elif not (out / "teacher.pt").exists():
        data.fail(f"--eval_only: {out}/teacher.pt is not there; train first, without --eval_only")
    else:
        resume(out / "resume.pt", cfg, identity)                              # the same settings?
    if RANK > 0:
        return
    print(results(cfg, splits, out, identity, background))
    teacher = load_network(out / "teacher.pt", Teacher, cfg.device)[0]
    paths = [out / f"stage_{k}.pt" for k in (1, 2) if (out / f"stage_{k}.pt").exists()]
    student = load_network(paths[-1], Denoiser, cfg.device)[0] if paths else None
    preview(teacher, student, splits[cfg.split], cfg, background, out / "preview.png")
    print(f"{(time.time() - began) / 60:.1f} minutes; {out}/: preview.png results.json "
          "log.jsonl scores teacher.pt stage_1.pt stage_2.pt")
    if paths:
        print(f"now: python sample.py <picture> --weights {paths[-1]}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; what was finished is kept, the same command goes on") from None
