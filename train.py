"""Three stages, three losses, one loop.

    python train.py --dataset cars                           # sizes that fit the machine
    python train.py --dataset cars --views=6 --out=out/six   # any flag of Config below
    torchrun --standalone --nproc_per_node=2 train.py --dataset cars

    stage 0   the teacher, trained by rendering alone; half of a batch is told what is hidden (ours)
    stage 1   bootstrapping: predict the told teacher's splats from noised ones, and render well
    stage 2   multi-step: unroll the denoiser, and render well

After an interruption the same command continues, bit for bit. --code=0 has the paper's teacher,
which is told nothing; --paper has all its numbers. What the paper does not say is marked *ours*.
"""
import argparse
import ast
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # threads that wait must not starve the others
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
from model import (SIGNAL, STEPS, T, T_STAR, WEIGHTINGS, Denoiser, ModelConfig, S, add_noise,
                   denoise, fingerprint, lambda_t, load_checkpoint, load_network, pick_device,
                   save_network, write_atomically)
from rasterize import Camera, Captured, choose, fail, invert_pose, reading, render
from sample import evaluate_few, preview, score_table
from teacher import Teacher, given_teacher, splat_statistics


@dataclass
class Config:
    # what
    dataset: str = "cars"        # chairs, hydrants, teddybears, re10k, rooms or path/to/your/own
    paper: bool = False          # sizes and numbers of the paper and of its teacher; see PAPER
    seed: int = 0
    teacher: str = ""            # teacher.pt or Splatter Image's file, in place of stage 0
    init: str = ""               # ours: continue training such a file in stage 0
    n_train: int = 160           # procedural cars or rooms to make, if there are no real ones
    n_test: int = 20
    data_seed: int = 0           # of the procedural cars or rooms
    # network of teacher and student (the paper's student is smaller)
    size: int = 32               # pixels, height of the pictures; data.DATASETS has their aspect
    width: int = 16              # channels of the first level; see ModelConfig for these four
    mult: tuple = (1, 2, 4)
    blocks: int = 1
    attn: int = 8
    bf16: bool = False           # half precision in it; faster
    # ours: a teacher that is told what the picture does not show
    code: int = 8                # numbers that tell it; 0: nothing, the paper's own recipe
    told: int = 8                # further views that these numbers are made of
    code_noise: float = 0.1      # added to them in stage 0
    warm_start: bool = True      # ours: the student begins with the teacher's weights
    # optimisation; numbers by stage: teacher, bootstrapping, multi-step
    iters: tuple = (3000, 300, 30)    # steps; training ends before a stage of 0 steps
    batch: tuple = (8, 8, 4)     # objects a step, over all GPUs; paper, per GPU: 100 and 10
    lr: tuple = (8e-3, 5e-4, 2e-4)    # peak learning rate of Adam
    views: int = 4               # rendered views per object, the source view among them
    warmup: int = 20             # steps of linear warm-up
    decay_lr: bool = True        # ours: then a cosine down to 0; False: constant
    clip: float = 1.0            # gradient norm
    ema: float = 0.99            # averaging of weights; the averages are evaluated and kept
    # losses, weights ours: the paper's coefficients are not known
    w_3dgs: float = 0.1          # stage 1: mean square on normalised splats
    w_3dgs_2: float = 0.1        # ours, the same in stage 2: keeps s such that its code is read
    w_code: float = 0.05         # ours, stage 1: reading the teacher's code off the noised splats
    w_cyc: float = 0.1           # both stages; at 1 it outweighs the images, at 0 it is left out
    weighting: str = "min_snr"   # lambda_t: min_snr, constant, noise
    t_star: int = T_STAR         # stage 2 starts above this noise level (paper)
    t_known: int = T - 1         # nor above this one (ours); on a GPU 50: s_t still shows the code
    steps: int = 5               # DDIM steps unrolled in stage 2 and when sampling; paper: 10
    # what follows may change when a run continues
    root: str = "data"           # folder of the datasets
    out: str = ""                # results; "" is out/<dataset>
    device: str = ""             # cpu or cuda; "" takes the GPU if there is one
    graph: bool = False          # replay the step as one CUDA graph
    compile: bool = False        # torch.compile the U-Net: a minute or two, then half the time
    checkpoint: bool = False     # stage 2 keeps only the splats between steps: less memory, slower
    split: str = "test"          # whose objects are evaluated and previewed; paper's ablations: val
    eval_views: int = 10         # target views per test object, evenly spaced; 0 is all
    samples: int = 16            # samples of each test object
    lpips: bool = False          # a column LPIPS, by the packages lpips and torchvision
    log_every: int = 10          # steps
    preview_every: int = 50
    save_every: int = 50
    eval_only: bool = False      # make the table again from the finished stages
    max_steps: int = 0           # stop and save after so many steps; 0 goes to the end


GPU = dict(n_train=2000, n_test=100, size=128, width=32, mult=(1, 2, 4, 4, 4), attn=16, bf16=True,
           told=16, iters=(28000, 10000, 300), batch=(32, 16, 16), lr=(1e-3, 5e-4, 5e-5),
           warmup=200, ema=0.999, w_3dgs=0.02, w_3dgs_2=0.02, w_cyc=0.0, weighting="noise",
           t_known=50, steps=STEPS, graph=True, compile=True, eval_views=11, log_every=100,
           preview_every=4000, save_every=2000)
# What the paper says, and where it is silent Splatter Image: its teacher is --width=128 --blocks=4.
# iters are ours, of stages 1 and 2; those of stage 0 are in data.DATASETS.
PAPER = dict(code=0, t_known=T - 1, size=128, width=96, mult=(1, 2, 2, 2), blocks=3, attn=16,
             warm_start=False, batch=(8, 100, 10), lr=(5e-5, 1e-4, 5e-5), clip=1e9, ema=0.9999,
             warmup=500, w_3dgs=1.0, w_3dgs_2=0.0, w_cyc=1.0, weighting="noise", steps=STEPS,
             eval_views=0, checkpoint=True, decay_lr=False, iters=(100_000, 20_000))
# The least value of a flag, or of each of its numbers, where it is not 0
LEAST = dict.fromkeys("n_train n_test size mult blocks told batch steps samples log_every "
                      "preview_every save_every".split(), 1) | dict(width=8, views=2, clip=1e-9)

RANK = int(os.environ.get("RANK", 0))              # of this process, by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))       # processes


# ---- the losses ----------------------------------------------------------------------------------
# Each stage takes networks and one batch and returns named losses; `loss` is their total. x
# (B, V, 3, H, W) and cam hold the source view, then further ones. All of these tell the teacher;
# the first cfg.views, the source among them, are rendered and judged, as in Splatter Image.

def image_loss(x_hat, x):
    """|| x - x_hat ||^2 per object, over the views in x_hat (B, V, 3, H, W) -> (B,)."""
    return (x_hat - x[:, :x_hat.shape[1]]).square().flatten(1).mean(1)


def cycle_loss(predict, x, x_hat, cam, background):
    """L_cyc: predict splats from the *rendered* target, view 1, and render them from the source.
    Gradients pass through the frozen `predict` to the rendered view."""
    g_cyc = predict(x_hat[:, 1].clamp(0, 1), cam.K[:, 1])             # in the target camera's frame
    to_source = invert_pose(cam.w2c[:, 1:2])   # (B, 1, 4, 4): cam's world is the source's frame
    x_src_hat, _, _ = render(g_cyc, Camera(to_source, cam.K[:, :1], cam.hw), background)
    return image_loss(x_src_hat, x).mean()


def beyond(x, limit):
    """The mean of the x above a limit (of this process's share). If none is, it is exactly 0, and
    so are its gradients."""
    over = x > limit                                                          # as x, bool
    return torch.where(over, x, 0).sum() / over.sum().clamp(min=1)


def total(losses, w_3dgs, cfg):
    """The losses, and `loss`, their weighted sum."""
    weights = dict(loss_3dgs=w_3dgs, loss_image=1, loss_cyc=cfg.w_cyc, loss_code=cfg.w_code)
    return dict(loss=sum(weights[k] * x for k, x in losses.items()), **losses)


def stage_0(teacher, x, cam, background, t, eps, cfg):
    """The teacher: L = || x - R(T(x_src)) ||^2, and Flash3D's regularisers for scales above 2 and
    offsets above 1 along an axis, which objects do not have. Half of the batch is told nothing
    (the paper's teacher), the other half what the further views show (ours)."""
    half = len(x) // 2
    code = None
    if teacher.encoder:
        late = Camera(cam.w2c[half:], cam.K[half:], cam.hw)
        with torch.no_grad():
            alone = teacher(x[half:, :1])                                     # (B - half, 24, H, W)
        code = teacher.code(alone, x[half:], late, background)                # (B - half, code)
        code = code + cfg.code_noise * eps[half:].flatten(1)[:, :cfg.code]    # eps is noise, too
        code = F.pad(code, (0, 0, half, 0))                                   # (B, code) 0: nothing
    raw, _ = teacher.unet(x[:, 0], code=code)                                 # (B, 24, H, W)
    g = teacher.gaussians(raw, cam.K[:, 0])
    x_hat, _, _ = render(g, cam.views(slice(cfg.views)), background)          # (B, V, 3, H, W)
    each = image_loss(x_hat, x)                                               # (B,)
    # channels last, to keep the gradient of raw so: convolutions in another layout round otherwise
    offset = raw.movedim(1, -1)[..., 1:4]                                     # (B, H, W, 3)
    wild = 0.001 * beyond(g.scale, 2) + 0.01 * beyond(offset.square(), 1)     # ()
    losses = dict(loss=each.mean() + wild)
    if teacher.encoder:
        losses |= dict(loss_not_told=each[:half].mean(), loss_told=each[half:].mean())
    return losses


def noised_teacher(denoiser, teacher, x, cam, background, t, eps, cfg):
    """-> s_teacher, s_t (B, 24, H, W) each, the base from which both are differences, and the code
    (B, code). Ours: the teacher is told what the further views show; with --code=0 it sees the
    source alone, as in the paper."""
    with torch.no_grad():
        code = None
        alone = raw = teacher(x[:, :1])                                       # (B, 24, H, W)
        if cfg.code:
            code = teacher.code(alone, x, cam, background)                    # (B, code)
            raw, _ = teacher.unet(x[:, 0], code=code)                         # (B, 24, H, W)
        base = denoiser.base(alone)                               # (B, 24, H, W) or (1, 24, 1, 1)
        s_teacher = denoiser.normalise(raw, base)                             # (B, 24, H, W)
    return s_teacher, add_noise(s_teacher, t, eps), base, code


def stage_1(denoiser, teacher, x, cam, background, t, eps, cfg):
    """Bootstrapping: L = || s - D(s_t) ||^2 + || x - R(D(s_t)) ||^2 + L_cyc through the teacher.
    Ours: + || code - what D reads off s_t ||^2."""
    s_teacher, s_t, base, code = noised_teacher(denoiser, teacher, x, cam, background, t, eps, cfg)
    raw, code_hat = denoiser.unet(x[:, 0], t, s_t=s_t)               # (B, 24, H, W), (B, code)
    s_hat = denoiser.normalise(raw, base)                                     # (B, 24, H, W)
    g = denoiser.gaussians(s_hat, base, cam.K[:, 0])
    x_hat, _, _ = render(g, cam.views(slice(cfg.views)), background)          # (B, V, 3, H, W)
    losses = dict(loss_3dgs=F.mse_loss(s_hat, s_teacher), loss_image=image_loss(x_hat, x).mean())
    if cfg.w_cyc:
        frozen = lambda image, K: teacher.gaussians(teacher(image[:, None]), K)
        losses["loss_cyc"] = cycle_loss(frozen, x, x_hat, cam, background)
    if cfg.code:
        losses["loss_code"] = F.mse_loss(code_hat.float(), code)
    return total(losses, cfg.w_3dgs, cfg)


def stage_2(denoiser, teacher, x, cam, background, t, eps, cfg):
    """Multi-step: L = lambda_t || x - R(D o ... o D(s_t)) ||^2 + L_cyc through the frozen student.
    Gradients flow through every step. If s_t hides the answer, the average of all answers has the
    least loss. Ours: t is at most cfg.t_known, so that s_t still shows it (on a GPU), and s_hat
    stays near the teacher's s; else the next step reads another code off it."""
    s_teacher, s_t, base, _ = noised_teacher(denoiser, teacher, x, cam, background, t, eps, cfg)
    step = denoiser
    if cfg.checkpoint:
        step = partial(checkpoint, denoiser, use_reentrant=False, preserve_rng_state=False)
    *_, s_hat = denoise(step, s_t, t, x[:, 0], base, cfg.steps)               # (B, 24, H, W)
    g = denoiser.gaussians(s_hat, base, cam.K[:, 0])
    x_hat, _, _ = render(g, cam.views(slice(cfg.views)), background)          # (B, V, 3, H, W)
    weight = lambda_t(t, cfg.weighting, cfg.t_star, cfg.t_known)              # (B,)
    losses = dict(loss_3dgs=F.mse_loss(s_hat, s_teacher),             # ours; the paper drops it
                  loss_image=(weight * image_loss(x_hat, x)).mean())
    if cfg.w_cyc:
        weights = {k: v.detach() for k, v in denoiser.named_parameters()}     # today's, but frozen
        start = eps, torch.full_like(t, T - 1)                      # ours: one step, from noise

        def frozen(image, K):
            base = denoiser.base(teacher(image[:, None]))         # (B, 24, H, W) or (1, 24, 1, 1)
            s = functional_call(denoiser, weights, (*start, image, base))     # (B, 24, H, W)
            return denoiser.gaussians(s, base, K)
        losses["loss_cyc"] = cycle_loss(frozen, x, x_hat, cam, background)
    return total(losses, cfg.w_3dgs_2, cfg)


# ---- one batch, one step -------------------------------------------------------------------------

def draw_batch(views, cfg, stage, step, mine=slice(RANK, None, WORLD)):
    """-> x (B, V, 3, H, W), w2c (B, V, 4, 4), K (B, V, 4), t (B,), eps (B, 24, H, W). They depend
    on (seed, stage, step) alone, so resuming needs no other state. Every process draws the whole
    batch and takes its share."""
    seed = (cfg.seed * 3 + stage) * 10**9 + step
    gen = torch.Generator().manual_seed(seed)
    B = cfg.batch[stage]
    n_views = max(cfg.views, 1 + cfg.told) if cfg.code else cfg.views
    _, index = data.draw(views, B, n_views, gen)                              # (B, V)
    first, last = (cfg.t_star + 1, cfg.t_known) if stage == 2 else (0, T - 1)
    t = torch.randint(first, last + 1, (B,), generator=gen)                   # (B,)
    if cfg.device.startswith("cuda"):                                         # the large one there
        gen = torch.Generator(cfg.device).manual_seed(seed)
    eps = torch.randn(B, S, *shape_of(cfg, views.meta).hw, generator=gen, device=gen.device)
    index = index[mine].to(views.images.device, non_blocking=True)            # (B / WORLD, V)
    x, cam = data.gather(views, index)
    batch = x, cam.w2c, cam.K, t[mine], eps[mine]
    return [y.to(cfg.device, non_blocking=True) for y in batch]


def learning_rate(cfg, stage, step):
    """Linear warm-up, then half a cosine down to 0, or constant."""
    iters = cfg.iters[stage]
    ramp = min(1.0, (step + 1) / max(1, min(cfg.warmup, iters // 2)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / iters))
    return cfg.lr[stage] * ramp * (cosine if cfg.decay_lr else 1)


def make_step(cfg, stage, network, teacher, background):
    """-> step, optimiser. step(x, w2c, K, t, eps, lr) trains once, without waiting for the device,
    and returns the named losses, grad_norm among them."""
    stage_loss = (stage_0, stage_1, stage_2)[stage]
    networks = [network, teacher] if stage else [network]
    for net in networks:
        net.unet.bf16 = cfg.bf16
        if cfg.compile:
            compile_network(net)
    params = [*network.parameters()]
    optimiser = torch.optim.Adam(params, lr=torch.zeros((), device=cfg.device), betas=(0.9, 0.99),
                                 fused=True, capturable=cfg.device.startswith("cuda"))

    def step(x, w2c, K, t, eps, lr):
        cam = Camera(w2c, K, tuple(x.shape[-2:]))
        optimiser.zero_grad()
        losses = stage_loss(*networks, x, cam, background, t, eps, cfg)
        losses["loss"].backward()
        losses = {k: v.detach() for k, v in losses.items()}
        average([*losses.values(), *(p.grad for p in params)])                # over processes
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.clip)               # ()
        optimiser.found_inf = (~norm.isfinite()).float()   # 1: fused Adam changes nothing
        optimiser.param_groups[0]["lr"].copy_(lr)
        optimiser.step()
        return dict(losses, grad_norm=norm)
    graph = cfg.graph and choose("auto", "cuda")           # the reference cannot be captured
    return (Captured(step) if graph else step), optimiser


# ---- one stage -----------------------------------------------------------------------------------

def shape_of(cfg, row):
    """The networks' shape, by the flags and by the row of data.DATASETS that Views.meta holds."""
    return ModelConfig(cfg.size, cfg.width, cfg.mult, cfg.blocks, cfg.attn, row["near"], row["far"],
                       cfg.code, row.get("aspect", 1.0), round(row.get("pad", 0) * cfg.size),
                       row.get("log_depth", False))


def make_networks(cfg, stage, views, background):
    """-> the network that learns in this stage, and the frozen teacher, None in stage 0."""
    shape = shape_of(cfg, views.meta)
    torch.manual_seed(cfg.seed)
    if stage == 0 and cfg.init:
        return given_teacher(cfg.init, shape, learns=True), None
    if stage == 0:
        return Teacher(shape), None
    teacher, _ = load_network(Path(cfg.out) / "teacher.pt", Teacher, cfg.device)
    teacher.requires_grad_(False).to(memory_format=torch.channels_last)
    if stage == 2:
        return load_network(Path(cfg.out) / "stage_1.pt", Denoiser)[0], teacher
    network = Denoiser(shape).to(cfg.device)
    # units of the splats that stage 1 will noise, from 32 batches; until then they are 1
    draws = (draw_batch(views, cfg, 0, cfg.iters[0] + i, slice(None)) for i in range(32))
    splats = (noised_teacher(network, teacher, x, Camera(w2c, K, views.meta["hw"]), background,
                             t, eps, cfg)[0] for x, w2c, K, t, eps in draws)
    network.stats.copy_(splat_statistics(splats))                             # (2, 24)
    network.stats[1] /= SIGNAL if cfg.code else 1
    if cfg.warm_start and replace(teacher.cfg, code=cfg.code) == shape:
        network.warm_start(teacher.unet)
    elif cfg.warm_start:
        print(f"no warm start: the teacher is {teacher.cfg}, the student {shape}")
    return network, teacher


def train_stage(cfg, stage, views, test, state):
    """The loop of one stage, from state["step"] on."""
    out = Path(cfg.out)
    iters = cfg.iters[stage]
    began = time.time() - 60 * state["minutes"]
    background = torch.tensor(views.meta["background"], device=cfg.device)    # (3,)
    network, teacher = make_networks(cfg, stage, views, background)
    network.to(cfg.device, memory_format=torch.channels_last)
    for x in network.state_dict().values() if WORLD > 1 else ():              # the same everywhere
        dist.broadcast(x, 0)
    ema = deepcopy(network).requires_grad_(False)                             # averaged weights
    step_once, optimiser = make_step(cfg, stage, network, deepcopy(teacher), background)
    if state["step"]:
        with reading(out / "resume.pt", "a state of this run; delete that folder"):
            network.load_state_dict(state["network"])
            ema.load_state_dict(state["ema"])
            optimiser.load_state_dict(dict(optimiser.state_dict(),
                                           state=state["optimiser"]["state"]))
    bar = tqdm(range(state["step"], iters), f"stage {stage}", iters, initial=state["step"],
               unit="step", disable=RANK > 0)
    for step in bar:
        if state["left"] == 0:
            fail("stopped and saved, after --max_steps; the same command continues")
        lr = torch.full((), learning_rate(cfg, stage, step), device=cfg.device)
        losses = step_once(*draw_batch(views, cfg, stage, step), lr)
        decay = min(cfg.ema, (1 + step) / (10 + step))     # short memory at first
        with torch.no_grad():
            torch._foreach_lerp_([*ema.parameters()], [*network.parameters()], 1 - decay)

        # -- what waits for the device is done now and then only
        done = step + 1
        state["left"] -= 1
        shown = done % cfg.preview_every == 0 or done == iters
        if RANK == 0 and (shown or done % cfg.log_every == 0):
            record = dict(stage=stage, step=done, **{k: v.item() for k, v in losses.items()},
                          steps_per_s=bar.format_dict["rate"])
            bar.set_postfix_str(f"loss {record['loss']:.4f}")
            if shown:
                networks = teacher or ema, ema if stage else None
                preview(*networks, test, cfg)
                record |= evaluate_few(*networks, test, cfg)
            with open(out / "log.jsonl", "a") as file:     # after a kill some steps are there twice
                file.write(json.dumps(record) + "\n")
        if done % cfg.save_every == 0 or state["left"] == 0:
            save(cfg, views, stage=stage, step=done, minutes=(time.time() - began) / 60,
                 network=network.state_dict(), ema=ema.state_dict(),
                 optimiser=optimiser.state_dict())
    state |= dict(stage=stage + 1, step=0, minutes=(time.time() - began) / 60)
    if RANK == 0:
        meta = about(cfg, views, stage=stage, iters=iters, minutes=state["minutes"],
                     teacher=fingerprint(teacher) if teacher else None)
        name = f"stage_{stage}.pt" if stage else "teacher.pt"
        save_network(out / name, ema, meta)
    save(cfg, views, stage=stage + 1, step=0, minutes=state["minutes"])


# ==== The lesson ends here. Below: processes, saving, flags. ======================================

def average(tensors):
    """Over all processes, in place and in one message."""
    if WORLD > 1:
        flat = torch.cat([x.flatten() for x in tensors])                      # (n,)
        dist.all_reduce(flat)
        parts = flat.div_(WORLD).split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])


def barrier():
    if WORLD > 1:
        dist.barrier()


def join_processes(device):
    """Take that GPU, connect the processes that torchrun has started; only the first one prints."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(torch.device(device).index or 0)
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def compile_network(network):
    from torch._inductor import config as inductor   # late: importing it takes seconds
    inductor.force_layout_optimization = True        # channels last, as cuDNN wants them
    torch._dynamo.config.recompile_limit = 64        # with and without gradients, by use
    for part in network.children():                  # the U-Net; of a teacher, its encoder, too
        part.compile(dynamic=False)


def on_device(views, device):
    """The uint8 images on the GPU, if they fit."""
    fits = device.startswith("cuda") and views.images.nbytes < torch.cuda.mem_get_info()[0] / 3
    return views.to(device) if fits else views


def device_name(device):
    if device.startswith("cuda"):
        return f"{WORLD} x {torch.cuda.get_device_name(device)}"
    return f"{WORLD} x CPU, {torch.get_num_threads()} threads"


def about(cfg, views, **more):
    """Provenance, written beside weights and tables: plain values."""
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()
    dataset = {k: views.meta[k] for k in ("dataset", "procedural", "fingerprint")}
    return dict(dataset=cfg.dataset, data=dataset, config=asdict(cfg), steps=cfg.steps,
                K=views.K[0].tolist(), background=list(views.meta["background"]),
                window=views.meta.get("window"), git=git or "unknown",
                device=device_name(cfg.device), **more)


def save(cfg, views, **state):
    """resume.pt: all that training needs to continue from here."""
    if RANK == 0:
        state["about"] = about(cfg, views)
        write_atomically(Path(cfg.out) / "resume.pt", lambda file: torch.save(state, file))
    barrier()


def resume(cfg, views):
    """The state that `save` left, or a new one; refuses the state of another run."""
    path = Path(cfg.out) / "resume.pt"
    if not path.exists():
        return dict(stage=0, step=0, minutes=0.0)
    state = load_checkpoint(path)
    with reading(path, "a state of this version; delete that folder"):
        was = state["about"]["config"] | dict(images=state["about"]["data"]["fingerprint"])
    now = dict(images=views.meta["fingerprint"], **asdict(cfg))
    fixed = [*now][:[*now].index("root")]
    other = [f"{k}={was.get(k)}" for k in fixed if was.get(k) != now[k]
             and not (cfg.eval_only and k == "steps")]            # sampling may take other steps
    if other:
        fail(f"{path}: a run with {other}; give these, or another --out, or delete that folder")
    return state


def value_of(field, text):
    """A flag's value, in Python's spelling, of the type of its default."""
    like = field.default
    if type(like) is str:
        return text
    many = type(like) is tuple
    kind = type(like[0] if many else like)
    least = LEAST.get(field.name, 0)
    with reading(f"--{field.name}={text}", f"a value like {like}, at least {least}"):
        given = ast.literal_eval(text)
        numbers = tuple(given if many else [given])
        if numbers and all(kind(x) == x and least <= x < 10**9 for x in numbers):
            return tuple(map(kind, numbers)) if many else kind(given)
        raise ValueError("out of range")


def parse(argv):
    """--name=value or --name value -> Config; the defaults depend on the machine."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.format_help = lambda: (f"{__doc__}\n{inspect.getsource(Config)}\nOn a GPU: {GPU}\n\n"
                                  f"--paper: {PAPER}\n")
    parser.error = fail
    for f in fields(Config):
        bare = dict(nargs="?", const=True) if f.type is bool else {}
        parser.add_argument(f"--{f.name}", type=partial(value_of, f), **bare)
    given = vars(parser.parse_args(argv))
    device = pick_device(given.get("device"))
    if WORLD > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    cuda = device.startswith("cuda")
    sizes = GPU if cuda else {}
    row = data.DATASETS.get(given.get("dataset", Config.dataset), data.OWN)
    if given.get("paper"):
        sizes = sizes | PAPER | dict(iters=(row["iters"], *PAPER["iters"]))
    cfg = Config(**sizes | given | dict(device=device))
    cfg.out = cfg.out or f"out/{Path(cfg.dataset).resolve().name}"
    h, w = shape_of(cfg, row).hw
    for wrong, message in [
            (cfg.weighting not in WEIGHTINGS, f"--weighting: give one of {[*WEIGHTINGS]}"),
            ({len(cfg.iters), len(cfg.batch), len(cfg.lr)} != {3},
             "--iters, --batch and --lr have three numbers each, one a stage"),
            (not (cfg.iters[0] or cfg.teacher), "--iters: without stage 0, give a --teacher"),
            (cfg.init and cfg.teacher, "--init begins stage 0, --teacher replaces it; give one"),
            (any(n % WORLD for n in cfg.batch) or cfg.code and cfg.batch[0] % (2 * WORLD),
             "--batch: give multiples of the number of processes, in stage 0 of twice that number"),
            (cfg.code and cfg.views > 1 + cfg.told,
             "--views: give at most 1 + --told, because all of them tell the teacher"),
            (not cfg.t_star < cfg.t_known < T, f"give --t_star < --t_known < {T}"),
            (cfg.width % 2 or math.gcd(h, w) % 2 ** (len(cfg.mult) - 1),
             f"--width, and {h}x{w} by --size on each level of --mult but the last, must be even"),
            ((cfg.graph or cfg.compile) and not cuda, "--graph and --compile need a GPU")]:
        if wrong:
            fail(message)
    if cfg.attn not in [cfg.size >> level for level in range(len(cfg.mult))]:
        print(f"no attention: no level of the U-Net is {cfg.attn} pixels high (--attn)")
    return cfg


def main():
    cfg = parse(sys.argv[1:])
    out = Path(cfg.out)
    join_processes(cfg.device)
    print(f"device: {device_name(cfg.device)}; flags (--help explains them):\n"
          + shlex.join(f"--{k}={v}" for k, v in asdict(cfg).items()))
    # compile the rasterizer while the data is made
    Thread(target=choose, args=("auto", cfg.device.split(":")[0]), daemon=True).start()
    if RANK > 0:                                                              # 0 makes the data
        barrier()
    splits = data.prepare(cfg.dataset, cfg.root, cfg.size, cfg.n_train, cfg.n_test, cfg.data_seed,
                          splits=("train", cfg.split))
    if RANK == 0:
        barrier()
    for split in {"train", cfg.split}.difference(splits):
        fail(f"{cfg.dataset} in {cfg.root} has no {split} split; unpack it too")
    views, test = [on_device(splits[split], cfg.device) for split in ("train", cfg.split)]
    out.mkdir(parents=True, exist_ok=True)
    state = resume(cfg, views) | dict(left=cfg.max_steps or -1)
    if cfg.teacher and state["stage"] == 0:
        given = given_teacher(cfg.teacher, shape_of(cfg, views.meta), learns=False)
        state["stage"] = 1
        if RANK == 0:
            meta = about(cfg, views, stage=0, iters=0, minutes=0.0)
            save_network(out / "teacher.pt", given, meta, half=False)
    barrier()                                      # the files read above are written below
    for stage in range(state["stage"], 3):
        if cfg.eval_only or not cfg.iters[stage]:
            break
        train_stage(cfg, stage, views, test, state)
    if RANK == 0:
        print(score_table(cfg, test, about(cfg, test)))
        print(f"{state['minutes']:.1f} minutes of training; the weights and the log are in {out}/")
        if state["stage"] > 1:
            weights = f"{out}/stage_{state['stage'] - 1}.pt"
            print("now:", shlex.join(["python", "sample.py", "picture.png", "--weights", weights]))


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, OSError) as e:                                 # Ctrl-C says nothing
        fail(str(e) or "stopped; the same command continues from the last save")
