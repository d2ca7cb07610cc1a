"""What things cost: the rasterizer, and a training step. Run by hand; only tests import it.

    python csrc/bench.py                      # the rasterizer, beside gsplat where it is installed
    python csrc/bench.py 0 1 2 --size=64      # steps of these stages, with any flag of train.py
    torchrun --standalone --nproc_per_node=2 csrc/bench.py 0

Milliseconds are medians of many calls, after a warm-up, all in the same run.
"""
import importlib.util
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from model import Denoiser
from rasterize import C0, NEAR, Camera, Captured, Gaussians, fail, invert_pose, render
from teacher import Teacher


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
    z = -F.normalize(eye, dim=-1)                                             # (B, V, 3)
    x = F.normalize(torch.linalg.cross(z, torch.tensor([0., 0, 1]).expand_as(z)), dim=-1)
    c2w = torch.eye(4).repeat(B, V, 1, 1)                                     # (B, V, 4, 4)
    c2w[..., :3, :] = torch.stack([x, torch.linalg.cross(z, x), z, eye], -1)
    K = torch.tensor([f, f, w / 2, h / 2]).repeat(B, V, 1)                    # (B, V, 4)
    return g.to(device), Camera(invert_pose(c2w), K, (h, w)).to(device)


def milliseconds(f, device, calls):
    """Median over `calls`. On a GPU by its own clock."""
    times = []
    if device == "cpu":
        for _ in range(calls):
            start = time.perf_counter()
            f()
            times.append(1e3 * (time.perf_counter() - start))
    else:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        marks[0].record()
        for mark in marks[1:]:
            f()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    return sorted(times)[calls // 2]


# ---- the rasterizer ------------------------------------------------------------------------------

def gsplat(g, cam, background, tile=8):
    """`render` by the package gsplat, of colours of degree 0 (its batches share no SH): rgb, alpha
    and no depth."""
    from gsplat import rasterization
    colour = (0.5 + C0 * g.sh[:, :, 0]).clamp(min=0)                          # (B, N, 3)
    K = torch.eye(3, device=cam.K.device).repeat(*cam.K.shape[:2], 1, 1)      # (B, V, 3, 3)
    K[..., 0, 0] = cam.K[..., 0]
    K[..., 1, 1] = cam.K[..., 1]
    K[..., :2, 2] = cam.K[..., 2:4]
    rgb, alpha, _ = rasterization(
        g.xyz, g.quat, g.scale, g.opacity, colour, cam.w2c, K, cam.hw[1], cam.hw[0],
        near_plane=NEAR, packed=False, tile_size=tile,
        backgrounds=background.expand(len(g.xyz), 3)[:, None].expand(-1, cam.w2c.shape[1], 3))
    return rgb.movedim(-1, 2), alpha.movedim(-1, 2), None


PAINTERS = {"reference": partial(render, backend="torch"), "1 thread": render, "kernel": render,
            "gsplat 8": gsplat, "gsplat 16": partial(gsplat, tile=16)}


def replay(f, x):
    """f(x) as a replay of a CUDA graph."""
    captured = Captured(f)
    for _ in range(4):
        captured(x)
    return captured.graph.replay


def measure(name, g, cam, background, device):
    """-> text of the times and memory, milliseconds of forward and backward, images, gradients."""
    paint = PAINTERS[name]
    calls = 1 if name == "reference" else 50
    leaves = [x.detach().requires_grad_() for x in g]
    scene = Gaussians(*leaves)
    images = [x.detach() for x in paint(scene, cam, background)[:2]]

    def forward(background):
        with torch.no_grad():
            return paint(scene, cam, background)

    def both(background):   # of half the images' squares: the images are their own gradients
        return torch.autograd.grad(paint(scene, cam, background)[:2], leaves, images)
    gradients = both(background)                                              # and warm up
    times = [milliseconds(partial(f, background), device, calls) for f in (forward, both)]
    memory = ""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(background)
        memory = f"{(torch.cuda.max_memory_allocated() - before) / 2 ** 20:10.0f}"
        if "gsplat" not in name:   # gsplat waits for the device, and so cannot be captured
            times += [milliseconds(replay(f, background), device, calls) for f in (forward, both)]
    row = "".join(f"{ms:10.3f}" for ms in times)
    return f"{row:40}{memory}", min(times[1::2]), images, gradients


def rasterizer(device, cases):
    """One table. Speed-up: over the best row above. Differences: from the first row."""
    cuda = device == "cuda"
    threads = torch.get_num_threads()
    print(f"{torch.cuda.get_device_name() if cuda else f'cpu, {threads} threads'}, milliseconds\n"
          f"{'B x V x N, pixels':37}{'forward':>10}{'+backward':>10}"
          + (f"{'in a CUDA graph, both':>20}{'MiB':>9}" if cuda else f"{'':20}")
          + f"{'speed-up':>10}   differences: images, gradients")
    for B, V, N, size, names in cases:
        g, cam = benchmark_scene(B, V, N, size, device)
        if cuda:   # what gsplat can do too: one colour per Gaussian, and its alpha ends at 0.999
            g = g._replace(sh=g.sh[:, :, :1].contiguous(), opacity=g.opacity.clamp(max=0.98))
        background = torch.ones(B, 3, device=device)
        best = first = None
        for name in names:
            torch.set_num_threads(1 if name == "1 thread" else threads)
            text, ms, images, gradients = measure(name, g, cam, background, device)
            best = best or ms
            first = first or (images, gradients)
            off = max((a - b).abs().max().item() for a, b in zip(images, first[0]))
            d_off = max(((a - b).abs().max() / b.abs().max()).item()
                        for a, b in zip(gradients, first[1]))
            print(f"{f'{B} x {V} x {N}, {cam.hw[0]}x{cam.hw[1]}':27}{name:10}{text}"
                  f"{best / ms:9.1f}x   {off:.0e}, {d_off:.0e}", flush=True)
            best = min(best, ms)


# ---- a training step -----------------------------------------------------------------------------

def ways_to_run(cfg, stage):
    """name -> flags."""
    ways = {"eager": dict(graph=False, compile=False)}
    if cfg.device.startswith("cuda"):
        ways["captured"] = dict(graph=True, compile=False)
        if stage == 2:
            ways["captured, checkpoint"] = dict(graph=True, compile=False, checkpoint=True)
        if cfg.compile:
            ways["captured, compiled"] = dict(graph=True)
    return ways


def random_views(cfg):
    """Four objects of random pixels, shaped as those of --dataset."""
    row = data.DATASETS.get(cfg.dataset, data.OWN)
    hw = cfg.size, round(cfg.size * row.get("aspect", 1))
    n = max(cfg.views, 1 + cfg.told)                                          # views of each
    images = torch.randint(256, (4 * n, 3, *hw), dtype=torch.uint8)
    _, cam = benchmark_scene(4, n, 1, hw)
    return data.Views(images, invert_pose(cam.w2c).flatten(0, 1), cam.K.flatten(0, 1),
                      torch.arange(5) * n, [""] * 4, dict(row, hw=hw)).to(cfg.device)


def rendering_share(step, batch):
    """Percent of the GPU's time that the rasterizer's kernels take."""
    with torch.profiler.profile() as profile:
        step(*batch)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type.name == "CUDA"]
    ours = sum(e.device_time for e in kernels if e.name.startswith(
        ("project_", "bin_kernel", "blend_", "void sort_kernel")))
    return 100 * ours / sum(e.device_time for e in kernels)


def steps(cfg, stages):
    """One table: a step of each stage, run in several ways, on random weights and images. With
    several GPUs, --batch and img/s are of all together, TFLOP/s and MiB of one."""
    cuda = cfg.device.startswith("cuda")
    views = random_views(cfg)
    shape = train.shape_of(cfg, views.meta)
    h, w = views.meta["hw"]
    background = torch.ones(3, device=cfg.device)
    print(f"{train.device_name(cfg.device)}; {h}x{w}, U-Net {cfg.width} x "
          f"{cfg.mult}, {cfg.blocks} blocks, bf16={cfg.bf16}, {cfg.views} views, "
          f"{cfg.steps} steps; medians\n"
          f"{'':37}{'batch':>6}{'parameters':>12}{'ms/step':>10}{'speed-up':>10}{'img/s':>9}"
          f"{'TFLOP/s':>9}{'MiB':>8}{'rendering':>11}")
    for stage in stages:
        eager_ms = flops = None
        for way, flags in ways_to_run(cfg, stage).items():
            torch._dynamo.reset()
            torch.manual_seed(0)
            c = replace(cfg, **flags)
            network = (Denoiser if stage else Teacher)(shape)
            network.to(cfg.device, memory_format=torch.channels_last)
            teacher = Teacher(shape).to(cfg.device, memory_format=torch.channels_last)
            step, _ = train.make_step(c, stage, network, teacher.requires_grad_(False), background)
            lr = torch.full((), 1e-5, device=cfg.device)
            batch = [*train.draw_batch(views, c, stage, 0), lr]
            if flops is None:
                with FlopCounterMode(display=False) as counter:
                    step(*batch)
                flops = counter.get_total_flops()
            for _ in range(5):                                                # compile, capture
                step(*batch)
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            share = f"{rendering_share(step, batch):9.1f} %" if c.graph else ""
            ms = milliseconds(lambda: step(*batch), "cuda" if cuda else "cpu", 20)
            eager_ms = eager_ms or ms
            count = sum(p.numel() for p in network.parameters())
            memory = torch.cuda.max_memory_reserved() / 2 ** 20 if cuda else 0
            print(f"stage {stage}, {way:28}{cfg.batch[stage]:6}{count:12,}{ms:10.2f}"
                  f"{eager_ms / ms:9.2f}x{1e3 * cfg.batch[stage] * cfg.views / ms:9.0f}"
                  f"{1e-9 * flops / ms:9.2f}{memory:8.0f}{share}", flush=True)
            step = network = teacher = None
            if cuda:
                torch.cuda.empty_cache()


def main():
    words = sys.argv[1:]
    stages = [int(word) for word in takewhile(("0", "1", "2").__contains__, words)]
    if stages:
        cfg = train.parse(words[len(stages):])
        train.join_processes(cfg.device)
        steps(cfg, stages)
    elif words:
        fail("name the stages first, then flags: python csrc/bench.py 0 1 2 --size=64")
    elif torch.cuda.is_available():
        names = ["gsplat 8", "gsplat 16"] if importlib.util.find_spec("gsplat") else []
        rasterizer("cuda", [(*case, names + ["kernel"]) for case in [
            (32, 4, 16384, 128), (32, 4, 4096, 64), (4, 3, 196608, (256, 384)),
            (1, 1, 16384, 128), (100, 1, 16384, 128)]])
    else:
        rasterizer("cpu", [(4, 4, 4096, 64, ["reference", "1 thread", "kernel"]),
                           (16, 3, 1024, 32, ["reference", "1 thread", "kernel"]),
                           (1, 1, 16384, 128, ["1 thread", "kernel"])])


if __name__ == "__main__":
    main()
