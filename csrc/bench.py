"""What things cost: the rasterizer, and a training step. Run by hand; only tests import it.

    python csrc/bench.py                      # the rasterizer, beside gsplat where it is installed
    python csrc/bench.py 0 1 2 --size=64      # steps of these stages, with any flag of train.py
    torchrun --standalone --nproc_per_node=2 csrc/bench.py 0

Milliseconds are medians of many calls, after a warm-up, peers side by side in the same run.
"""
import functools
import importlib.util
import sys
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from model import Denoiser, ModelConfig
from rasterize import C0, NEAR, Camera, Gaussians, choose, invert_pose, render
from teacher import Teacher

# ---- the rasterizer ------------------------------------------------------------------------------

def benchmark_scene(B, V, N, size, device="cpu"):
    """Gaussians of about one pixel on B ellipsoid shells, V cameras around each; size or (H, W)."""
    rng = torch.Generator().manual_seed(0)
    def normal(*shape):
        return torch.randn(*shape, generator=rng)
    h, w = (size, size) if isinstance(size, int) else size
    f = 131.25 * w / 128                                                      # 52 degrees
    g = Gaussians(F.normalize(normal(B, N, 3), dim=-1) * torch.tensor([.40, .18, .15]),
                  (0.4 * normal(B, N, 3)).exp() * 1.3 / f, normal(B, N, 4),
                  (1.5 * normal(B, N)).sigmoid(), 0.5 * normal(B, N, 4, 3))
    eye = F.normalize(normal(B, V, 3), dim=-1) * 1.3                          # (B, V, 3)
    z = -F.normalize(eye, dim=-1)
    x = F.normalize(torch.linalg.cross(z, torch.tensor([0., 0, 1]).expand_as(z)), dim=-1)
    c2w = torch.eye(4).repeat(B, V, 1, 1)                                     # (B, V, 4, 4)
    c2w[..., :3, :] = torch.stack([x, torch.linalg.cross(z, x), z, eye], -1)
    K = torch.tensor([f, f, w / 2, h / 2]).repeat(B, V, 1)                    # (B, V, 4)
    return g.to(device), Camera(invert_pose(c2w), K, (h, w)).to(device)


def milliseconds(f, device, budget=3000, calls=None):
    """Median, least and most of as many calls as fit the budget, or of `calls`, after one to warm
    up."""
    def once():
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)
    times = [once()]
    while device == "cpu" and (len(times) <= calls if calls else sum(times) < budget):
        times.append(once())
    if device == "cuda":   # by the device's own clock, with calls following each other closely
        n = calls or max(5, min(100, int(budget / 3 / once())))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        marks[0].record()
        for mark in marks[1:]:
            f()
            mark.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    times = sorted(times[1:] or times)   # a call that takes the whole budget is its own warm-up
    return times[len(times) // 2], times[0], times[-1]


def graphed(f):
    """f as a replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):   # a first call outside the graph, to compile and initialise
        f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def gsplat(g, cam, background, tile):
    """The images of `render` but for depth, by the package gsplat, where `sh` is taken for rgb."""
    from gsplat import rasterization
    K = torch.eye(3, device=cam.K.device).repeat(*cam.K.shape[:2], 1, 1)      # (B, V, 3, 3)
    K[..., 0, 0], K[..., 1, 1] = cam.K[..., 0], cam.K[..., 1]
    K[..., :2, 2] = cam.K[..., 2:4]
    rgb, alpha, _ = rasterization(
        g.xyz, g.quat, g.scale, g.opacity, g.sh, cam.w2c, K, cam.hw[1], cam.hw[0],
        near_plane=NEAR, packed=False, tile_size=tile,
        backgrounds=background[:, None].expand(-1, cam.w2c.shape[1], 3))
    return rgb.movedim(-1, 2), alpha.movedim(-1, 2)


def floor(g, cam, device):
    """Milliseconds to move, at the speed of a large copy here, what no rasterizer can avoid moving:
    forward reads the Gaussians and writes rgb, alpha, depth; backward reads both and the gradients
    of rgb and alpha, and writes those of the Gaussians."""
    x = torch.empty(1 << (30 if device == "cuda" else 27), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    per_ms = 2 * x.nbytes / milliseconds(lambda: y.copy_(x), device, budget=300)[0]
    B, V = cam.w2c.shape[:2]
    scene, plane = sum(x.nbytes for x in g), 4 * B * V * cam.hw[0] * cam.hw[1]
    return (3 * scene + (5 + 5 + 4) * plane) / per_ms


def rasterizer(device, cases):
    """One table. A further row is a further function with the arguments of `render`."""
    painters = {"reference": functools.partial(render, backend="torch"),
                "kernel": functools.partial(render, backend=device),
                "1 thread": functools.partial(render, backend=device),
                "gsplat 8": functools.partial(gsplat, tile=8),
                "gsplat 16": functools.partial(gsplat, tile=16)}
    cuda, threads = device == "cuda", torch.get_num_threads()
    where = torch.cuda.get_device_name() if cuda else f"cpu, {threads} threads"
    print(f"{where}; milliseconds: median (least..most)\n{'B x V x N, pixels':37}"
          f"{'forward':>11}{'forward+backward':>33}{'':12}"
          + (f"{'both in a CUDA graph':>26}{'':31}{'MiB':>7}" if cuda else "")
          + f"{'of floor':>11}{'speed-up':>10}   differences: image, gradients")
    for B, V, N, size, names in cases:
        g, cam = benchmark_scene(B, V, N, size, device)
        h, w = cam.hw
        if cuda:   # what gsplat can do too: one colour per Gaussian, and its alpha ends at 0.999
            g = g._replace(sh=g.sh[:, :, :1].contiguous(), opacity=g.opacity.clamp(max=0.98))
        background = torch.ones(B, 3, device=device)
        d_out = [torch.rand(B, V, 3, h, w, device=device), torch.rand(B, V, 1, h, w, device=device)]
        least, best, first = floor(g, cam, device), None, None
        for name in names:
            paint, scene, d = painters[name], g, d_out
            torch.set_num_threads(1 if name == "1 thread" else threads)
            if name == "kernel":
                choose(device, device)   # compile before the clock runs
            if "gsplat" in name:
                scene = g._replace(sh=(0.5 + C0 * g.sh[:, :, 0]).clamp(min=0))
                d = [x.movedim(2, -1).contiguous().movedim(-1, 2) for x in d_out]
            leaves = [x.detach().requires_grad_() for x in scene]
            scene = Gaussians(*leaves)
            def forward():
                with torch.no_grad():
                    return paint(scene, cam, background)
            def both():
                return torch.autograd.grad(paint(scene, cam, background)[:2], leaves, d)
            times = [milliseconds(forward, device), milliseconds(both, device)]
            more = ""
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                both()
                more = f"{(torch.cuda.max_memory_allocated() - before) / 2 ** 20:8.0f}"
                if "gsplat" in name:   # it waits for the device, and so cannot be in a graph
                    more = f"{'-':>11}{'':17}{'-':>11}{'':17}" + more
                else:
                    times += [milliseconds(graphed(forward), device),
                              milliseconds(graphed(both), device)]
            row = "".join(f"{m:11.3f} {f'({a:.3f}..{b:.3f})' if b > a else '(once)':16}"
                          for m, a, b in times)
            mine = min(t[0] for t in times[1::2])   # forward+backward, as it is best run
            faster = f"{100 * least / mine:9.2g} %"
            faster += f"{best / mine:9.1f}x" if best else f"{'':10}"
            best = min(mine, best or mine)
            images, gradients = forward()[:2], list(both())
            if "gsplat" in name:
                gradients[4] = (C0 * gradients[4] * (scene.sh > 0))[:, :, None]
            if first:
                faster += "   " + ", ".join(
                    f"{max(((a - b).abs().max() / s).item() for a, b, s in z):.0e}" for z in (
                        [(a, b, 1) for a, b in zip(*first[:1], images)],
                        [(a, b, a.abs().max()) for a, b in zip(first[1], gradients)]))
            first = first or (images, gradients)
            print(f"{f'{B} x {V} x {N}, {h}x{w}':27}{name:10}{row}{more}{faster}", flush=True)


# ---- a training step -----------------------------------------------------------------------------

def one_by_one(g, cam, background):
    """`render` in one call per image, as the published codebases do."""
    images = [render(Gaussians(*[x[b:b + 1] for x in g]),
                     Camera(cam.w2c[b:b + 1, v:v + 1], cam.K[b:b + 1, v:v + 1], cam.hw),
                     background) for b, v in np.ndindex(*cam.w2c.shape[:2])]
    return [torch.cat(x).unflatten(0, cam.w2c.shape[:2])[:, :, 0] for x in zip(*images)]


def by_gsplat(g, cam, background):
    """By the package gsplat, whose batches share no SH: colours of degree 0, its better tiles."""
    g = g._replace(sh=(0.5 + C0 * g.sh[:, :, 0]).clamp(min=0))
    return *gsplat(g, cam, background.expand(len(g.xyz), 3), 8), None


def steps(cfg, stages, say):
    """One table: a step of each stage, run in several ways, on random weights and images. With
    several GPUs, --batch and img/s are of all together, TFLOP/s and MiB of one."""
    cuda, shape = cfg.device.startswith("cuda"), ModelConfig(cfg.size, cfg.width, cfg.mult,
                                                             cfg.blocks, cfg.attn, code=cfg.code)
    eager, graph = dict(graph=False, compile=False), dict(graph=True, compile=False)
    ways = {"eager": eager, "eager, one render an image": eager}
    if importlib.util.find_spec("gsplat") and cuda:
        ways["eager, gsplat"] = eager
    if cuda:
        ways |= {"captured": graph, "captured, checkpoint": dict(graph, checkpoint=True)}
        ways |= {"captured, compiled": dict(graph=True)} if cfg.compile else {}
    if train.WORLD > 1:   # enough to compare with the table of one process
        ways = {k: v for k, v in ways.items() if k in ("eager", "captured", "captured, compiled")}
    n = max(cfg.views, 1 + cfg.told)                                          # of each object
    images = torch.randint(256, (4 * n, 3, cfg.size, cfg.size), dtype=torch.uint8)
    _, cam = benchmark_scene(4, n, 1, cfg.size)
    views = data.Views(images, invert_pose(cam.w2c).flatten(0, 1), cam.K.flatten(0, 1),
                       torch.arange(5) * n, [""] * 4, dict(size=cfg.size)).to(cfg.device)
    background = torch.ones(3, device=cfg.device)
    say(f"{train.device_name(cfg.device)}; {cfg.size}x{cfg.size}, U-Net {cfg.width} x {cfg.mult}, "
        f"{cfg.blocks} blocks, bf16={cfg.bf16}, {cfg.views} views, {cfg.steps} steps; medians\n"
        f"{'':37}{'batch':>6}{'parameters':>12}{'ms/step':>10}{'speed-up':>10}{'img/s':>9}"
        f"{'TFLOP/s':>9}{'MiB':>8}{'rendering':>11}")
    for stage in stages:
        reference = flops = None
        for way, flags in ways.items():
            if "checkpoint" in way and stage < 2:
                continue
            torch._dynamo.reset()
            torch.manual_seed(0)
            c = replace(cfg, **flags)
            network = (Denoiser if stage else Teacher)(shape)
            network.to(cfg.device, memory_format=torch.channels_last)
            teacher = Teacher(shape).to(cfg.device, memory_format=torch.channels_last)
            step, _ = train.make_step(c, stage, network, teacher.requires_grad_(False), background)
            batch = *train.draw_batch(views, c, stage, 0), torch.full((), 1e-5, device=cfg.device)
            train.render = {   # what the losses draw with
                "eager, gsplat": by_gsplat,
                "eager, one render an image": one_by_one}.get(way, render)
            if flops is None:
                with FlopCounterMode(display=False) as counter:
                    step(*batch)
                flops = counter.get_total_flops()
            for _ in range(5):                                                # compile, capture
                step(*batch)
            share = ""
            if c.graph:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                with torch.profiler.profile() as profile:
                    step(*batch)
                    torch.cuda.synchronize()
                kernels = [e for e in profile.events() if e.device_type.name == "CUDA"]
                ours = sum(e.device_time for e in kernels if e.name.startswith(
                    ("project_", "bin_kernel", "blend_", "void sort_kernel")))
                share = f"{100 * ours / sum(e.device_time for e in kernels):9.1f} %"
            ms, _, _ = milliseconds(lambda: step(*batch), "cuda" if cuda else "cpu", 2000,
                                    20 if train.WORLD > 1 else None)   # in step with each other
            reference, n = reference or ms, sum(p.numel() for p in network.parameters())
            memory = torch.cuda.max_memory_reserved() / 2 ** 20 if cuda else 0
            say(f"stage {stage}, {way:28}{cfg.batch[stage]:6}{n:12,}{ms:10.2f}"
                f"{reference / ms:9.2f}x{1e3 * cfg.batch[stage] * cfg.views / ms:9.0f}"
                f"{1e-9 * flops / ms:9.2f}{memory:8.0f}{share}", flush=True)
            step = network = teacher = None
            if cuda:
                torch.cuda.empty_cache()


def main():
    words, cuda = sys.argv[1:], torch.cuda.is_available()
    stages = [int(word) for word in takewhile(("0", "1", "2").__contains__, words)]
    if words and not stages:
        data.fail("name the stages first, then flags: python csrc/bench.py 0 1 2 --size=64")
    if stages:
        cfg = train.parse(words[len(stages):])
        train.join_processes(cfg.device)
        say = print if train.RANK == 0 else lambda *_, **__: None             # one voice
        return steps(cfg, stages, say)
    if cuda:
        names = ["gsplat 8", "gsplat 16"] if importlib.util.find_spec("gsplat") else []
        return rasterizer("cuda", [(*case, names + ["kernel"]) for case in [
            (32, 4, 16384, 128), (32, 4, 4096, 64), (4, 3, 196608, (256, 384)),
            (1, 1, 16384, 128), (100, 1, 16384, 128)]])
    rasterizer("cpu", [(4, 4, 4096, 64, ["reference", "1 thread", "kernel"]),
                       (16, 3, 1024, 32, ["reference", "1 thread", "kernel"]),
                       (1, 1, 16384, 128, ["1 thread", "kernel"])])


if __name__ == "__main__":
    main()
