"""Every promise of this repository, checked: python test_all.py, or pytest.

Docstrings say against what: a closed form, finite differences, the reference, a repeat. Sizes are
tiny, seeds fixed, comparisons elementwise. Tests of CUDA skip where there is none.
"""
import base64
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import urlencode

import numpy as np
import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # as the scripts do
import torch
import torch.nn.functional as F
from PIL import Image

import data
import rasterize
import sample
import toys.cars
import train
from csrc.bench import benchmark_scene, random_views
from model import (RHO, SIGNAL, T, T_STAR, S, Denoiser, ModelConfig, add_noise, alpha_bar,
                   canonical, ddim_step, denoise, fingerprint, lambda_t, load_checkpoint,
                   load_network, save_network, signal_noise, splats_to_gaussians, write_atomically)
from rasterize import (ALPHA_MAX, C0, C1, LOW_PASS, NEAR, Camera, Gaussians, invert_pose,
                       matrix_to_quat, quat_to_matrix, render, transform)
from teacher import Teacher, given_teacher, load_splatter_image, splat_statistics
from toys import controls, rooms

HERE = Path(__file__).resolve().parent

# ---- rasterize.py --------------------------------------------------------------------------------

needs_kernel = pytest.mark.skipif(not rasterize.choose("auto", "cpu"), reason="no compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available()
                                or not rasterize.choose("auto", "cuda"),
                                reason="no GPU, or no nvcc")


class Painter(NamedTuple):
    """A backend, its precision, and what rounding may change, relative to the largest number."""
    backend: str
    dtype: torch.dtype
    image: float
    gradient: float

    @property
    def device(self):
        return "cuda" if self.backend == "cuda" else "cpu"

    def takes(self, *scene):
        return [x.to(self.device, self.dtype) for x in scene]

    def __call__(self, g, cam, background, d_out=None):
        """-> (rgb, alpha, depth), gradients of g under d_out or random cotangents, in float64."""
        g, cam, background = self.takes(g, cam, background)
        leaves = [x.detach().clone().requires_grad_() for x in g]
        out = render(Gaussians(*leaves), cam, background, self.backend)
        rng = torch.Generator().manual_seed(1)
        d_out = d_out or [torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in out]
        d_out = [torch.as_tensor(d).to(x).expand_as(x) for d, x in zip(d_out, out)]
        d = torch.autograd.grad(out, leaves, d_out)
        return [x.detach().double().cpu() for x in out], [x.double().cpu() for x in d]


reference, cpu64 = [Painter(x, torch.float64, 1e-10, 1e-10) for x in ("torch", "cpu")]
cpu32 = Painter("cpu", torch.float32, 2e-5, 2e-4)
cuda = Painter("cuda", torch.float32, 1e-4, 1e-3)   # exp to 2 units in the last place; atomics
REFERENCE = pytest.param(reference, id="torch")
CPU64, CPU32 = [pytest.param(p, id=i, marks=needs_kernel)
                for p, i in ((cpu64, "cpu64"), (cpu32, "cpu32"))]
CUDA = pytest.param(cuda, id="cuda", marks=needs_cuda)
every_painter = pytest.mark.parametrize("painter", [REFERENCE, CPU64, CPU32, CUDA])
every_kernel = pytest.mark.parametrize("painter", [CPU64, CPU32, CUDA])
float_kernels = pytest.mark.parametrize("painter", [CPU32, CUDA])


def assert_same(mine, theirs, tolerance):
    """Elementwise, relative to the largest number of each tensor; 0: every bit."""
    for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(a, b.to(a), rtol=0, atol=tolerance * b.abs().max().item(),
                                   msg=lambda m: f"tensor {k}: {m}")


def pick(g, n):
    """The Gaussians n of every object."""
    return Gaussians(*[x[:, n] for x in g])


def awkward_scene(B=2, V=3, N=40, hw=(17, 33), degree=1, dtype=torch.float64, seed=0):
    """Gaussians that are legal but difficult, from cameras with fx != fy and off-centre axes."""
    rng = torch.Generator().manual_seed(seed)
    def rand(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64)
    g, cam = [x.to(torch.float64) for x in benchmark_scene(B, V, N, 32)]
    scale = g.scale * (0.3 + 2 * rand(B, N, 3))                # anisotropic
    xyz, opacity, sh = g.xyz.clone(), g.opacity.clone(), g.sh[:, :, :1 + 3 * degree].clone()
    if N >= 40:
        scale[:, 0] = torch.tensor([3., 0.5, 2.])              # larger than the image
        scale[:, 1] = torch.tensor([1., 1e-3, 1e-3])           # a needle
        opacity[:, 2:12] = 0.985                               # ten opaque ones behind each other
        opacity[:, 2] = 0.999                                  # one is clamped: two would leave
                                                               # 0.01^2, on the edge of T_STOP
        xyz[:, 2:12] = xyz[:, 2:3] * torch.linspace(1, 2, 10).view(1, 10, 1)
        xyz[:, 12:16] = xyz[:, 12:13]                          # equal depths
        xyz[:, 16:20] *= 10                                    # behind, or beside the image
        xyz[:, 20:24] = invert_pose(cam.w2c)[:, :1, :3, 3] * (1 + 0.3 * rand(B, 4, 1))   # behind
        sh[:, 24:28, 0] -= 3                                   # colour below 0
        opacity[:, 28:30] = 0.003                              # below 1/255
    f = 30 + 20 * rand(B, V, 2)                                # fx != fy
    K = torch.cat([f, torch.tensor(hw[::-1]) * (0.2 + 0.6 * rand(B, V, 2))], -1)
    g = Gaussians(xyz, scale, 3 * g.quat, opacity, sh)
    return g.to(dtype), Camera(cam.w2c, K, hw).to(dtype), rand(B, 3).to(dtype)


def one_gaussian(xyz=(0., 0., 2.), scale=(.1, .1, .1), opacity=0.8, rgb=(.9, .5, .2), hw=(9, 9)):
    """One Gaussian before a camera with f = 20 whose axis hits the centre of the middle pixel."""
    t = lambda x: torch.tensor(x, dtype=torch.float64)
    g = Gaussians(t([[xyz]]), t([[scale]]), t([[[1., 0, 0, 0]]]), t([[opacity]]),
                  ((t(rgb) - 0.5) / C0)[None, None, None])
    K = t([[[20., 20., hw[1] / 2, hw[0] / 2]]])
    return g, Camera(torch.eye(4).double()[None, None], K, hw)


def join(*gs):
    return Gaussians(*[torch.cat(x, 1) for x in zip(*gs)])


def by_numpy(g, cam, background):
    """(rgb, alpha, depth) of one image in which no pixel is finished, all in another way: J by
    differences, R by the cross products of q v q*, the eye by inverting w2c."""
    xyz, scale, quat, opacity, sh = [x[0].double().numpy() for x in g]
    w2c, size = cam.w2c[0, 0].double().numpy(), np.array(cam.hw[::-1])
    f, c = np.split(cam.K[0, 0].double().numpy(), 2)
    def pinhole(p):
        return f * p[:2] / p[2] + c
    pixel = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in size]), -1)    # (H, W, 2)
    image, trans = np.zeros((5, *cam.hw)), np.ones(cam.hw)
    camera = xyz @ w2c[:3, :3].T + w2c[:3, 3]                                 # (N, 3)
    for n in np.argsort(camera[:, 2], kind="stable"):
        p, (w, *v) = camera[n], quat[n] / np.linalg.norm(quat[n])
        slope = np.clip(p[:2] / p[2], (-.15 * size - c) / f, (1.15 * size - c) / f)
        held = np.append(slope, 1) * p[2]                                     # where J is taken
        J = [(pinhole(held + e) - pinhole(held - e)) / 2e-5 for e in 1e-5 * np.eye(3)]
        R = [e + 2 * np.cross(v, w * e + np.cross(v, e)) for e in np.eye(3)]
        M = np.stack(J, 1) @ w2c[:3, :3] @ np.stack(R, 1) * scale[n]          # (2, 3)
        d = pixel - pinhole(p)
        power = (d @ np.linalg.inv(M @ M.T + LOW_PASS * np.eye(2)) * d).sum(-1) / -2
        a = np.minimum(ALPHA_MAX, opacity[n] * np.exp(power))                 # (H, W)
        a[a < 1 / 255] = 0
        look = xyz[n] - np.linalg.inv(w2c)[:3, 3]
        x, y, z = look / np.linalg.norm(look)
        basis = np.array([C0, -C1 * y, C1 * z, -C1 * x])[:len(sh[n])]
        seen = np.append(np.maximum(0.5 + basis @ sh[n], 0), [1, p[2]])       # (5,)
        image += trans * a * seen[:, None, None]
        trans *= 1 - a
    image[:3] += trans * background[0].double().numpy()[:, None, None]
    return [x[None, None] for x in torch.from_numpy(image).split([3, 1, 1])]


@every_painter
@pytest.mark.parametrize("centres", [[(.05, .03, 2.)], [(.3, .03, 2.)], [(-.25, -.3, 2.)],
                                     [(.05, .03, 2.), (.3, .2, 2.5), (-.1, 0., 1.5)]],
                         ids=["inside", "off to the right", "off the corner", "overlapping"])
def test_turned_gaussians_look_as_numpy_says(painter, centres):
    """Against another computation, in any order, of Gaussians with these x/z, y/z, z, turned every
    way, before a turned camera with fx != fy; the slope of J is held off screen."""
    rng = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    u, w2c, N = torch.tensor(centres).double(), torch.eye(4).double(), len(centres)
    w2c[:3, :3], w2c[:3, 3] = quat_to_matrix(normal(4)), normal(3)
    xyz = (torch.cat([u[:, :2] * u[:, 2:], u[:, 2:]], 1) - w2c[:3, 3]) @ w2c[:3, :3]   # (N, 3)
    g = Gaussians(xyz[None], torch.tensor([.8, 8., 2.]).double().repeat(1, N, 1), normal(1, N, 4),
                  torch.full((1, N), 0.8).double(), 2 * normal(1, N, 4, 3))   # colours < 0, > 1
    cam = Camera(w2c[None, None], torch.tensor([[[20, 26, 3, 2.25]]]).double(), (5, 5))
    background = normal(1, 3).abs()
    images, _ = painter(g, cam, background)
    assert images[1].min() > 0.1
    assert_same(images, by_numpy(g, cam, background), max(painter.image, 1e-8))
    assert_same(painter(pick(g, list(reversed(range(N)))), cam, background)[0], images, 1e-6)


def flat(opacity, z=2., rgb=(.9, .5, .2)):
    """A Gaussian that covers an image of one pixel, so alpha is its opacity; and the camera."""
    return one_gaussian((0., 0, z), (9., 9, 9), opacity, rgb, (1, 1))


@every_painter
def test_equal_depths_are_drawn_by_index(painter):
    """Against the blend in the order of the list, though another one is nearer."""
    cam, behind, red, green = flat(0.)[1], *[flat(0.5, z, rgb)[0] for z, rgb in (
        (2.5, (0, 0, 1)), (2, (1, 0, 0)), (2, (0, 1, 0)))]
    for g, expect in ((join(behind, red, green), (.5, .25, .125)),
                      (join(green, red, behind), (.25, .5, .125))):
        rgb = painter(g, cam, torch.zeros(1, 3))[0][0].flatten()
        torch.testing.assert_close(rgb, torch.tensor(expect).double(), rtol=0, atol=1e-6)


@every_painter
@pytest.mark.parametrize("o, gradient", [(0., 0), ((1 - 1e-4) / 255, 0), ((1 + 1e-4) / 255, 1),
                                         (0.989, 1), (0.991, 0), (1., 0)])
def test_opacity_counts_from_1_255_to_0_99(painter, o, gradient):
    """Against alpha = o with gradient 1; beyond either end every gradient is exactly 0."""
    (_, alpha, _), d = painter(*flat(o), torch.zeros(1, 3), d_out=(0, 1, 0))
    assert abs(alpha.item() - (min(o, ALPHA_MAX) if o >= 1 / 255 else 0)) < 3e-7
    assert abs(d[3].item() - gradient) < 1e-5 and (gradient or not any(x.any() for x in d))


@every_painter
@pytest.mark.parametrize("z, scale, drawn, beside", [
    (-1., .1, 0, None), (NEAR, .1, 0, None), (NEAR + 1e-4, .1, 1, None), (1e6, .1, 1, None),
    (2., 0., 1, np.exp(-1 / 0.6)), (2., 1e4, 1, 1.)])
def test_what_lies_beyond_near_is_drawn_however_far_or_large(painter, z, scale, drawn, beside):
    """Against o and o z at its centre, and o by the low-pass beside it; gradients are finite."""
    g, cam = one_gaussian(xyz=(0., 0, z), scale=(scale,) * 3)
    (rgb, alpha, depth), d = painter(g, cam, torch.ones(1, 3))
    middle = torch.stack([alpha, depth])[..., 4, 4].flatten()
    torch.testing.assert_close(middle, drawn * torch.tensor([.8, .8 * z]).double(), rtol=1e-6,
                               atol=0)
    assert beside is None or alpha[0, 0, 0, 4, 5].item() == pytest.approx(.8 * beside, rel=1e-5)
    assert all(x.isfinite().all() for x in (rgb, *d)) and d[3].any() == drawn


@every_painter
def test_no_gaussian_gives_the_background(painter):
    """Against the background itself, for N = 0 and for N = 3 behind the camera or too faint."""
    g, cam, background = awkward_scene(V=1, N=3)
    eye = torch.linalg.inv(cam.w2c)[:, :, :3, 3]                              # (B, 1, 3)
    for g in (pick(g, slice(0)), g._replace(xyz=1.5 * eye.expand(2, 3, 3)),
              g._replace(opacity=0.003 * g.opacity)):
        (rgb, alpha, depth), d = painter(g, cam, background)
        assert (rgb == background.to(painter.dtype)[:, None, :, None, None]).all()
        assert not alpha.any() and not depth.any()
        assert not any(x.any() for x in d)


@every_kernel   # seeds: no alpha within 1e-4 of 1/255, no light left within 1e-4 of 1e-4
@pytest.mark.parametrize("case", [
    dict(hw=(1, 1)), dict(hw=(7, 5)), dict(hw=(17, 33)), dict(hw=(17, 33), degree=0),
    dict(hw=(33, 65), seed=4), dict(N=1), dict(N=33, seed=2),
    dict(N=270, B=1, V=1, hw=(9, 13), seed=2), dict(N=30, hw=(9, 13), inside=True)], ids=str)
def test_the_kernels_draw_the_reference(painter, case):
    """Against the float64 reference: the image, then every gradient under random cotangents."""
    g, cam, background = awkward_scene(**{k: v for k, v in case.items() if k != "inside"})
    if "inside" in case:   # the camera among the Gaussians
        g = g._replace(xyz=1.5 * g.xyz)
        cam.w2c[..., :3, 3] = 0
    mine, theirs = painter(g, cam, background), reference(g, cam, background)
    assert_same(mine[0], theirs[0], painter.image)
    assert_same(mine[1], theirs[1], painter.gradient)


@float_kernels
@pytest.mark.parametrize("N, size", [(1025, 40), (4096, (256, 384)), (4097, 64), (16384, 128),
                                     (16385, (128, 160))])
def test_at_full_size_float32_draws_what_float64_draws(painter, N, size):
    """Against float64 on the CPU. Rounding moves a few fragments across 1/255, 0.99 or 1e-4, or
    past a neighbour in depth: a small fraction of the numbers may differ by more."""
    scene = *benchmark_scene(2, 2, N, size), torch.ones(2, 3)
    images, gradients = cpu64(*scene)
    mine, d_mine = painter(*scene)
    for a, b in zip((*mine, *d_mine), (*images, *gradients)):
        off = (a - b).abs() > (1e-4 if a.dim() == 5 else 1e-3) * b.abs().max()
        assert a.isfinite().all() and off.double().mean() <= 1e-3
    assert (mine[1] - images[1]).abs().max() <= 1 / 255 + 1e-4                # alpha


@float_kernels
@pytest.mark.parametrize("length", [0.3, 1., 3.])
@pytest.mark.parametrize("d_out", [[1., 0., 0.], None], ids=["sum", "random"])
def test_gradients_of_needles_survive_float32(painter, length, d_out):
    """Against float64 on the CPU, relative to each gradient's length."""
    g, cam = one_gaussian((.02, .01, 1.3), (length, 1e-4, 1e-4), hw=(128, 128))
    turn = torch.tensor([math.cos(math.pi / 12), 0, 0, math.sin(math.pi / 12)]).double()
    g = g._replace(quat=turn[None, None])
    cam.K[..., :2] = 131.25
    scene = g, cam, torch.ones(1, 3)
    for a, b in zip(painter(*scene, d_out=d_out)[1], cpu64(*scene, d_out=d_out)[1]):
        assert (a - b).norm() < 0.05 * b.norm()


@every_kernel
@pytest.mark.parametrize("B, V", [(1, 1), (1, 3), (32, 4), (43, 3)])
def test_a_batch_equals_one_call_per_image(painter, B, V):
    """Against B V single renders, every bit."""
    g, cam, background = awkward_scene(B, V, hw=(10, 12))
    images, _ = painter(g, cam, background)
    for b, v in np.ndindex(B, V):
        one, _ = painter(Gaussians(*[x[b:b + 1] for x in g]),
                         Camera(cam.w2c[b:b + 1, v:v + 1], cam.K[b:b + 1, v:v + 1], cam.hw),
                         background[b:b + 1])
        assert_same([x[b:b + 1, v:v + 1] for x in images], one, 0)


@needs_kernel
@pytest.mark.parametrize("V", [1, 20])   # one image in strips; more images than tasks
def test_the_number_of_threads_changes_no_bit(V):
    """Against one thread."""
    scene, results = awkward_scene(B=1, V=V, N=300, hw=(50, 40)), []
    threads = torch.get_num_threads()
    for n in (1, 2, 7):
        torch.set_num_threads(n)
        results.append(sum(map(list, cpu32(*scene)), []))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, results[0], 0)


@every_painter
def test_inputs_may_be_strided_and_gradients_partial(painter):
    """Against contiguous inputs and all gradients at once; a second derivative is refused."""
    scene = painter.takes(*awkward_scene(B=1))
    images, gradients = painter(*scene, d_out=[0.25, 0, 0])
    planar = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in scene[0]]
    assert not planar[0].is_contiguous()
    for k in range(5):
        x = [x.detach().requires_grad_(j == k) for j, x in enumerate(planar)]
        out = render(Gaussians(*x), *scene[1:], backend=painter.backend)
        assert_same([a.detach().double().cpu() for a in out], images,
                    1e-12 if painter is reference else 0)
        d, = torch.autograd.grad(0.25 * out[0].sum(), x[k], retain_graph=True)
        assert_same([d.double().cpu()], [gradients[k]],            # atomics, and a needle
                    painter.gradient / (1 if painter is cuda else 10))
    if painter is not reference:
        d, = torch.autograd.grad(out[0].square().sum(), x[4], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            d.sum().backward()


@float_kernels
def test_low_precision_is_drawn_in_float32(painter):
    """Against the same numbers given as float32, bit for bit."""
    g, cam = benchmark_scene(1, 1, 30, 16, painter.device)
    half = g.to(torch.bfloat16)
    assert_same(render(half, cam, (1., 1., 1.)), render(half.to(torch.float32), cam, (1., 1., 1.)),
                0)


@pytest.mark.parametrize("painter", [REFERENCE, CPU64])
@pytest.mark.parametrize("degree", [0, 1])
def test_gradients_agree_with_finite_differences(painter, degree):
    """Against central differences in float64: of the reference, and of the kernel's own header."""
    g, cam, background = awkward_scene(B=1, V=2, N=4, hw=(5, 7), degree=degree, seed=3)
    g = g._replace(scale=3 * g.scale)
    leaves = [x.requires_grad_() for x in g]
    weights = torch.randn(5, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    def weighted_sums(*x):   # of rgb, alpha and depth; one backward each instead of one per pixel
        out = render(Gaussians(*x), cam, background, backend=painter.backend)
        return [(a * w).sum() for a, w in zip(out, weights.split([3, 1, 1]))]
    assert torch.autograd.gradcheck(weighted_sums, leaves, eps=1e-7, atol=1e-6, rtol=1e-5)


def test_rotations_survive_the_way_to_quaternions_and_back():
    """Against the matrix itself, half turns included, where one component alone is large."""
    q = torch.cat([torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.eye(4)])
    R = quat_to_matrix(q)
    assert torch.allclose(quat_to_matrix(matrix_to_quat(R)), R, atol=1e-6)
    assert (matrix_to_quat(R)[:, 0] >= 0).all()


@float_kernels
@pytest.mark.parametrize("field, value", [
    *itertools.product(Gaussians._fields, (float("nan"), float("inf"), -float("inf"))),
    ("scale", 1e20), ("quat", 0.), ("opacity", 0.), ("xyz", -3.)])
def test_a_poisoned_gaussian_leaves_no_trace(painter, field, value):
    """Against the scene without it: the image bit for bit; its own gradients are exactly 0."""
    g, cam = benchmark_scene(1, 1, 30, 16)
    cam.w2c[:], keep = torch.eye(4), torch.arange(30) != 7
    g = g._replace(xyz=g.xyz + torch.tensor([0., 0, 1.5]))
    clean, d_clean = painter(pick(g, keep), cam, torch.ones(1, 3))
    for element in (0, -1):                                    # the first and the last number of it
        bad = Gaussians(*[x.clone() for x in g])
        x = getattr(bad, field)[0, 7].view(-1)
        x[slice(None) if field in ("xyz", "quat") or value == 1e20 else element] = value
        images, d = painter(bad, cam, torch.ones(1, 3))
        assert_same(images, clean, 0)
        assert_same([a[:, keep] for a in d], d_clean, 1e-4 * (painter is cuda))
        assert not any(a[:, 7].any() for a in d)


@needs_kernel
def test_builds_survive_a_killed_one_and_each_other(tmp_path):
    """Against two builds at once where a killed one left torch's lock and half a file."""
    (tmp_path / "splat.h").touch()
    (tmp_path / "rasterize.cpp").write_text(
        "#include <Python.h>\n#define NAME_(x) PyInit_##x\n#define NAME(x) NAME_(x)\n"
        "static PyModuleDef def = {PyModuleDef_HEAD_INIT, \"m\", 0, -1};\n"
        "PyMODINIT_FUNC NAME(TORCH_EXTENSION_NAME)() { return PyModule_Create(&def); }\n")
    code = (f"import rasterize\nrasterize.CSRC = rasterize.Path({str(tmp_path)!r})\n"
            "rasterize.load_kernels('cpu')")
    start = lambda **env: subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), **env})
    assert start(CXX="/nonexistent").wait()                                   # makes the folder
    folder, = (tmp_path / "built").iterdir()
    (folder / "lock").touch()
    (folder / "main.o").write_text("half")
    both = [start(), start()]
    said = "".join(p.communicate(timeout=100)[0] for p in both)
    assert not any(p.returncode for p in both) and said.count("compiling") == 1, said


@needs_kernel
@pytest.mark.parametrize("device, flags, why", [
    ("cpu", [], "no compiler /nonexistent"), ("mps", [], "csrc/ has no kernel for mps"),
    ("cpu", ["-include", "no_such_header.h"], "no_such_header.h")])
def test_what_is_missing_to_compile_is_named(device, flags, why, monkeypatch, tmp_path, capsys):
    """Against one sentence; "auto" prints it and draws with the reference."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "c++" if flags else "/nonexistent")
    monkeypatch.setattr(rasterize, "FLAGS", flags)
    monkeypatch.setattr(rasterize, "load_kernels", rasterize.load_kernels.__wrapped__)
    choose = rasterize.choose.__wrapped__                           # both without their caches
    assert choose("auto", device) is None
    said, = [line for line in capsys.readouterr().out.splitlines() if "reference" in line]
    assert "reference, which is slow, because " in said and why in said
    with pytest.raises((RuntimeError, ImportError)):                # by name it is an error
        choose(device, device)


@pytest.mark.parametrize("field, shape", [("scale", (1, 3, 3)), ("opacity", (1, 4, 1)),
                                          ("sh", (1, 4, 2, 3)), ("K", (1, 2, 4))])
def test_shapes_that_do_not_fit_are_refused(field, shape):
    """Against an error, before any kernel reads beyond a tensor's end."""
    scene = [x._replace(**{field: torch.ones(shape)}) if field in x._fields else x
             for x in benchmark_scene(1, 1, 4, 8)]
    with pytest.raises(ValueError, match="do not fit together"):
        render(*scene, (1., 1., 1.))


@needs_cuda
@pytest.mark.parametrize("N", [300, 17000])
def test_a_captured_call_replays_with_new_numbers_and_nothing_waits_for_the_device(N):
    """Against eager calls; the debug mode turns every wait for the device into an error."""
    g, cam = benchmark_scene(2, 2, N, 24, "cuda")
    d_out = [torch.rand(2, 2, c, 24, 24, device="cuda") for c in (3, 1, 1)]
    def step(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs[:5]]
        out = render(Gaussians(*leaves), cam, inputs[5])
        return [x.detach() for x in out] + list(torch.autograd.grad(out, leaves, d_out))
    captured = rasterize.Captured(step)
    for k in range(6):
        inputs = [0.95 ** k * x for x in (*g, torch.rand(2, 3, device="cuda"))]
        expect = step(*inputs)
        torch.cuda.set_sync_debug_mode("error" if k not in (0, 3) else "default")
        try:
            mine = captured(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(captured.graph) == (k >= 3)
        assert_same(mine[:3], expect[:3], 0)
        for a, b in zip(mine[3:], expect[3:]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


# ---- data.py -------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def cars(tmp_path_factory):
    """A root with procedural cars: two to train on, one to test; copy it before changing it."""
    root = tmp_path_factory.mktemp("cars")
    data.prepare("cars", root, 32, n_train=2, n_test=1)
    return root


def copy_of(root, to):
    return shutil.copytree(root, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".cache"))


def with_files_of_at_most(kilobytes, command):
    """Runs the command as on a full disk: no file can grow larger."""
    return subprocess.run(["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "_", *command],
                          capture_output=True, text=True, cwd=HERE)


def refused(call, *args, **more):
    """The one line in which a call ends."""
    with pytest.raises(SystemExit) as e:
        call(*args, **more)
    assert e.value.code.startswith("error: ") and e.value.code.splitlines() == [e.value.code]
    return e.value.code


def test_cars_are_written_and_read_back(cars):
    """Against what was written: counts, white corners, intrinsics; a larger pack is its mean."""
    train, test = data.prepare("cars", cars, 32, n_train=2, n_test=1).values()
    assert len(train) == 2 and train.start.tolist() == [0, 50, 100] and len(test.images) == 251
    assert train.images.dtype == torch.uint8 and train.images.shape == (100, 3, 32, 32)
    assert (train.images[:, :, 0, 0] == 255).all() and train.images.float().std() > 20
    torch.testing.assert_close(train.K, torch.tensor([[131.25, 131.25, 64, 64]]).expand(100, 4) / 4)
    assert train.meta["procedural"] and train.meta["fingerprint"] != test.meta["fingerprint"]
    big = data.load(cars, "cars", "train", 128).images[:9].float()            # (9, 3, 128, 128)
    assert (F.avg_pool2d(big, 4) - train.images[:9].float()).abs().max() <= 1


def test_a_batch_is_distinct_views_of_one_object_seen_from_the_first(cars):
    """Against the packed order, a repeat, and w2c = inv(c2w) @ c2w_source."""
    views = data.load(cars, "cars", "train", 32)
    draw = lambda: data.draw(views, 64, 50, torch.Generator().manual_seed(3))
    objects, index = draw()
    assert (index.sort(1).values == views.start[objects, None] + torch.arange(50)).all()
    assert set(objects.tolist()) == {0, 1} and len(set(index[:, 0].tolist())) > 20
    assert torch.equal(index, draw()[1])
    x, cam = data.gather(views, index[:5, :4])
    assert x.shape == (5, 4, 3, 32, 32) and 0 <= x.min() and x.max() == 1 and cam.hw == (32, 32)
    assert torch.equal(cam.w2c[:, 0], torch.eye(4).expand(5, 4, 4))
    want = views.c2w[index[:5, :4]].double().inverse() @ views.c2w[index[:5, :1]].double()
    torch.testing.assert_close(cam.w2c.double(), want, atol=1e-6, rtol=0)
    assert torch.equal(x[2, 3], views.images[index[2, 3]].float() / 255)


def picture_of_a_box(xyz, c2w, K, S):
    """(S, S, 4) uint8: a tiny red box at xyz, ray cast; red is seen on white and on black."""
    scene = toys.cars.stack([toys.cars.box(*np.stack([xyz - .02, xyz + .02], 1))], np.zeros(3), 1)
    scene.table = np.float32([[1, 1, 1, 0]] + [[1, 0, 0, 1]] * 6)   # background, then six faces
    return toys.cars.trace(scene, c2w, K, S)


SIDES = np.array([[.6, 0, .8], [-.6, .64, .48], [0, -.8, .6], [.48, .6, .64], [-.8, -.36, .48]])
LENS, POINT = (131.25, 131.25, 64, 64), np.array([.2, -.1, .15])
LOOKS = np.stack([toys.cars.look_at_origin(side) for side in SIDES])                # (5, 4, 4)
ROUND = np.stack([toys.cars.look_at_origin(side, 1.3 + .2 * i) for i, side in enumerate(SIDES)])
MOVED = ROUND.copy()                                    # in another unit, from another place
MOVED[:, :3, 3] = 40 * ROUND[:, :3, 3] + [5, -3, 7]
BOX = [picture_of_a_box(POINT, m, LENS, 128) for m in ROUND]
WIDE, GREY = (32, 32, 16, 16), [np.full((32, 32, 4), 100, np.uint8)] * 5
POSE, PICTURE, NERF, MASKED = ("pose/000003.txt", "rgb/000003.png", "transforms.json",
                               "images_fg.npy")


def write_srn(folder, c2w, K, pictures):
    (folder / "rgb").mkdir(parents=True)
    (folder / "pose").mkdir()
    S = len(pictures[0])
    (folder / "intrinsics.txt").write_text(f"{K[0]} {K[2]} {K[3]} 0.\n0. 0. 0.\n1.\n{S} {S}\n")
    for v, (m, picture) in enumerate(zip(c2w, pictures)):
        Image.fromarray(picture).save(folder / f"rgb/{v:06d}.png")
        (folder / f"pose/{v:06d}.txt").write_text(" ".join(map(str, m.ravel())))


def write_nerf(folder, c2w, K, pictures, name="transforms.json"):
    """As Blender and nerfstudio have it: OpenGL's axes. All but the first picture lose 16 columns
    on the left, so that they are not square and their principal point is not in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for v, (m, picture) in enumerate(zip(c2w, pictures)):
        left, (h, w, _) = 16 * (v > 0), picture.shape
        Image.fromarray(picture[:, left:]).save(folder / f"r_{v}.png")
        frame = dict(file_path=f"./r_{v}", transform_matrix=(m * [1, -1, -1, 1]).tolist())
        angle = dict(camera_angle_x=2 * np.arctan(w / 2 / K[0]))    # of a picture left whole
        lens = dict(fl_x=K[0], fl_y=K[1], cx=K[2] - left, cy=K[3], w=w - left, h=h)
        frames.append({**frame, **(lens if left else angle)})
    (folder / name).write_text(json.dumps(dict(k1=0.0, frames=frames)))


def write_co3d(folder, c2w, K, pictures):
    """As Splatter Image preprocesses CO3D: PyTorch3D's cameras, x left and y up, acting on rows."""
    folder.mkdir(parents=True)
    rgba = np.stack(pictures).transpose(0, 3, 1, 2) / np.float32(255)               # (V, 4, S, S)
    np.save(folder / "images_fg.npy", rgba[:, :3] * rgba[:, 3:])
    focal = np.full((len(c2w), 2), 2 * K[0] / len(pictures[0]), np.float32)
    np.save(folder / "focal_lengths.npy", focal)
    row = [(np.diag([-1, -1, 1, 1]) @ np.linalg.inv(m)).T for m in c2w]             # (4, 4) each
    for name, part in (("Rs", lambda m: m[:3, :3]), ("Ts", lambda m: m[3, :3])):
        path = folder.parent / f"camera_{name}.npz"
        old = dict(np.load(path)) if path.exists() else {}
        np.savez(path, **old, **{folder.name: np.stack([part(m) for m in row])})


def write_clip(folder, c2w, K, pictures, kind="png"):
    """As RealEstate10K: cameras beside the frames, intrinsics as fractions, world-to-camera."""
    folder.mkdir(parents=True)
    h, w, _ = pictures[0].shape
    lines = ["https://www.youtube.com/watch?v=0"]
    for v, (m, picture) in enumerate(zip(c2w, pictures)):
        Image.fromarray(picture).save(folder / f"{33367 * v}.{kind}", quality=95)
        numbers = K[0] / w, K[1] / h, K[2] / w, K[3] / h, 0., 0., *np.linalg.inv(m)[:3].ravel()
        lines.append(" ".join([str(33367 * v), *(f"{x:.9f}" for x in numbers)]))
    (folder.parent / f"{folder.name}.txt").write_text("\n".join(lines) + "\n")


def assert_the_point_is_on_its_pixel(views, which, point, atol):
    """The pinhole formula for a point (3,) against the middle of what is not background."""
    where, K = views.c2w[which].double(), views.K[which]
    p = where[:, :3, :3].mT @ (point - where[:, :3, 3])[:, :, None]                 # (V, 3, 1)
    uv = (p[:, :2, 0] / p[:, 2] * K[:, :2] + K[:, 2:4]).numpy()
    backdrop = torch.tensor(views.meta["background"])[:, None, None]
    cover = (views.images[which] / 255. - backdrop).abs().mean(1).numpy()           # (V, H, W)
    cover *= cover > .05                                            # the noise of JPEG
    cover /= cover.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(cover.sum(1) @ (np.arange(cover.shape[2]) + .5), uv[:, 0], atol=atol)
    np.testing.assert_allclose(cover.sum(2) @ (np.arange(cover.shape[1]) + .5), uv[:, 1], atol=atol)


@pytest.mark.parametrize("write, dataset, folder", [
    (write_srn, "cars", "srn_cars/cars_train/a"),
    (write_srn, "chairs", "srn_chairs/chairs_train/chairs_2.0_train/a"),
    (write_srn, "own", "own/a"), (write_nerf, "own", "own/a"), (write_nerf, "own", "own"),
    (write_co3d, "hydrants", "co3d_hydrant_for_gs/train/a"),
    (write_co3d, "teddybears", "co3d_teddybear_for_gs/train/a")])
def test_a_known_point_lands_on_its_pixel_in_every_layout(write, dataset, folder, tmp_path):
    """Against the pinhole formula, at half of the size; your own pictures in whatever units."""
    own = dataset == "own"
    write(tmp_path / folder, MOVED if own else ROUND, LENS, BOX)
    views = data.load(tmp_path, str(tmp_path / "own") if own else dataset, "train", 64)
    eye = views.c2w[:, :3, 3].double()                              # (5, 3)
    scale = eye[0].norm() / 1.3                                     # of one's own: as it may be
    np.testing.assert_allclose(eye, ROUND[:, :3, 3] * scale.item(), atol=1e-5)
    if own:
        shown = (views.K[:, 4] * 64 / views.K[:, 0]).mean()         # across, at the object
        np.testing.assert_allclose(shown, data.EXTENT, rtol=1e-5)
    assert_the_point_is_on_its_pixel(views, slice(5), torch.from_numpy(POINT) * scale, .15)
    if views.K.shape[1] == 5:               # the depth of the middle, and of a splat without depth
        depth = np.array([1.3, 1.5, 1.7, 1.9, 2.1]) * scale.item()
        np.testing.assert_allclose(views.K[:, 4], depth, rtol=1e-5)
        cfg = ModelConfig(near=views.meta["near"], far=views.meta["far"])
        g = splats_to_gaussians(torch.zeros(5, 24, 64, 64), views.K, cfg)
        np.testing.assert_allclose(g.xyz[:, 0, 2], depth, rtol=1e-5)


def test_a_known_point_lands_on_its_pixel_in_the_stretched_frames_of_clips(tmp_path, capsys):
    """Against the pinhole formula, in frames that are cropped off the middle and stretched, so that
    fx != fy, in any unit. A clip without frames is left out, a list of frames is handed on."""
    folder = tmp_path / "re10k/test"
    crop = [x[4:116] for x in BOX]                                  # 128 wide, 112 high
    opaque = [data.on_background(Image.fromarray(x), (.5, .5, .5)) for x in crop]
    stretch = lambda x: np.asarray(Image.fromarray(x).resize((192, 96), Image.LANCZOS))
    lens = 131.25 * 192 / 128, 131.25 * 96 / 112, 64 * 192 / 128, 60 * 96 / 112
    write_clip(folder / "a", ROUND, lens, [*map(stretch, crop)])
    write_clip(folder / "b", MOVED[:3], lens, [*map(stretch, opaque)], "jpg")
    write_clip(folder / "gone", ROUND, lens, [stretch(crop[0])])
    (folder / "gone/0.png").unlink()
    load = lambda: data.load(tmp_path, "re10k", "test", 48)
    views = load()
    assert views.names == ["a", "b"]
    assert views.images.shape == (8, 3, 48, 72) and views.meta["listed"] == {}
    assert data.gather(views, torch.tensor([[5, 6]]))[1].hw == views.meta["hw"] == (48, 72)
    want = torch.tensor(lens) * torch.tensor([72 / 192, 48 / 96] * 2)
    torch.testing.assert_close(views.K, want.expand(8, 4))
    for first, last, unit in (0, 5, ROUND), (5, 8, MOVED[:3]):
        eye = views.c2w[first:last, :3, 3].double()                 # (V, 3)
        spread = np.sqrt(((unit[:, :3, 3] - unit[:, :3, 3].mean(0)) ** 2).sum(1).mean())
        np.testing.assert_allclose(eye, unit[:, :3, 3] / spread, rtol=1e-5, atol=1e-5)
        point = torch.from_numpy(POINT if last == 5 else 40 * POINT + [5, -3, 7]) / spread
        assert_the_point_is_on_its_pixel(views, slice(first, last), point, .2)
    (folder / "a.txt").write_text((folder / "a.txt").read_text() + "\n")         # a blank line
    assert load().meta["fingerprint"] == views.meta["fingerprint"]
    assert len([*tmp_path.glob(".cache/*")]) == 4                   # the cameras count, too
    own = data.load(tmp_path, str(tmp_path / "re10k"), "test", 48)  # of one's own: another pack
    assert own.images.shape[2:] == (48, 48) and own.K.shape[1] == 5
    write_clip(folder / "c", ROUND[[0, 0]], lens, [*map(stretch, crop[:2])])
    torch.testing.assert_close(load().c2w[8:], torch.from_numpy(ROUND[[0, 0]]).float())   # still
    folder.with_suffix(".txt").write_text("b 1 0 2 2\nb 0 1 2 2\n")
    assert load().names == ["b"] and load().meta["listed"] == dict(b=(1, 0, 2, 2))
    for row, said in (("b 1 0 2 3", "b has 3"), ("b 1 -1 2 2", "b has 3"), ("d 1 0 2 2", "left"),
                      ("b 1 0 2\n", "test.txt: not Flash3D's list")):
        folder.with_suffix(".txt").write_text(row)
        assert said in refused(load)


def test_the_targets_of_a_frame_are_distinct_and_within_its_window():
    """Against the frame numbers of two clips, one of them shorter than the window."""
    start = torch.tensor([0, 40, 43])
    views = data.Views(None, None, None, start, ["long", "short"], dict(window=5))
    objects, index = data.draw(views, 4000, 4, torch.Generator().manual_seed(1))
    assert (index >= start[objects, None]).all() and (index < start[objects + 1, None]).all()
    assert all(len(set(row)) == (4 if row[0] < 40 else 3) for row in index.tolist())
    assert set(index[:, 0].tolist()) == set(range(43))              # any frame is a source
    assert set((index - index[:, :1])[:, 1:].flatten().tolist()) == set(range(-5, 6))   # 0: repeats


def test_pictures_of_ones_own_are_split_by_object_or_by_file(tmp_path):
    """Against the rule: every tenth object, or the last of fewer, or transforms_test.json."""
    own, one = tmp_path / "own", tmp_path / "one"
    for i in range(12):
        write_nerf(own / f"{i:02d}", LOOKS, WIDE, GREY)
    splits = data.prepare(str(own), tmp_path, 16)
    assert splits["train"].names == [f"{i:02d}" for i in (*range(9), 10, 11)]
    assert splits["test"].names == ["09"] and splits["train"].K.shape[1] == 5     # by workers, too
    (own / "05/r_3.png").write_bytes(b"no")                         # found by a worker
    assert "05/r_3.png" in refused(data.load, tmp_path, str(own), "train", 16)
    write_nerf(one, LOOKS, WIDE, GREY, "transforms_train.json")
    write_nerf(one, LOOKS[:3], WIDE, GREY, "transforms_test.json")
    (one / "train").mkdir()                                         # Blender's pictures lie there
    splits = data.prepare(str(one), tmp_path, 16)
    assert [len(splits[split].images) for split in ("train", "test")] == [5, 3]


def test_what_else_lies_in_folders_is_left_out(tmp_path):
    """Against what Splatter Image leaves of CO3D, macOS's ._ files, a link that leads nowhere."""
    split, own = tmp_path / "co3d_hydrant_for_gs/train", tmp_path / "**a [b]"
    write_co3d(split / "good", LOOKS, WIDE, GREY)
    write_co3d(split / "bad", LOOKS * np.nan, WIDE, GREY)
    (split / "empty").mkdir()
    views = data.load(tmp_path, "hydrants", "train", 16)
    assert views.names == ["good"]
    assert set(views.images.flatten().tolist()) == {39}                   # 100 * 100 / 255
    write_srn(own / "x", LOOKS, WIDE, GREY)
    for name in "rgb/._000000.png", "pose/._000000.txt", ".DS_Store":
        (own / "x" / name).write_bytes(b"no")
    (own / "x/rgb/000009.png").symlink_to("nowhere")
    assert len(data.load(tmp_path, str(own), "train", 16).images) == 5


@pytest.mark.parametrize("toy, hides", [(toys.cars, "doors"), (rooms, "panels")])
def test_what_is_hidden_is_drawn_independently_and_painted_both_ways(toy, hides, cars, clips):
    """Against a count over many designs, all four pairs, none rare; against the packed picture: it
    is one of the two (up to JPEG), the other differs where the door or panel is."""
    designs = [toy.design(np.random.default_rng([0, 0, i])) for i in range(400)]
    pairs = [tuple(getattr(c, hides).values()) for c in designs]
    assert all(70 < pairs.count((l, r)) < 130 for l in toys.cars.DOORS for r in toys.cars.DOORS)
    where = (clips.parent, "rooms") if toy is rooms else (cars, "cars")
    views = data.load(*where, "test", 64)
    v, *pair = toy.hidden_pair(views, 0, data.resize)
    note, = Path(views.meta["root"]).glob("*test/test_00000/attributes.json")
    amber = json.loads(note.read_text())[hides]["right"] == "amber"
    true, other = pair if amber else pair[::-1]                               # (3, 64, W) each
    x = views.images[v] / 255                                                 # (3, 64, W)
    assert (x - true).abs().mean() < 1 / 255 and (x - true).abs().max() < .1
    there = (true - other).abs().sum(0) > .5                                  # (64, W)
    assert .005 < there.double().mean() < .4 and (x - other).abs().sum(0)[there].mean() > .5
    if toy is toys.cars:
        assert views.c2w[v, 1, 3] < -1 and views.c2w[64, 1, 3] > 0            # source: left


def test_one_seed_gives_the_same_bytes_and_more_cars_only_add(cars, tmp_path):
    """Against a repeat, with one object missing; real cars come before procedural ones."""
    again = copy_of(cars, tmp_path)
    shutil.rmtree(again / "cars/cars_train/train_00001")
    splits = data.prepare("cars", again, 32, n_train=3, n_test=1)
    for file in sorted((cars / "cars/cars_train").rglob("*.*")):
        assert file.read_bytes() == (again / file.relative_to(cars)).read_bytes()
    assert len(splits["train"]) == 3 and not list((again / "cars/cars_train").glob(".*"))
    fewer = data.prepare("cars", again, 32, n_train=2, n_test=1)["train"]
    assert fewer.meta["fingerprint"] == data.load(cars, "cars", "train", 32).meta["fingerprint"]
    write_srn(again / "srn_cars/cars_train/real", LOOKS, LENS, BOX)
    real = data.prepare("cars", again, 32)
    assert list(real) == ["train"] and real["train"].names == ["real"]
    assert not real["train"].meta["procedural"]


def test_the_packed_file_is_rebuilt_if_a_file_changes_and_never_used_half_written(cars, tmp_path):
    """Against a changed picture, and a packed file that lost its end."""
    root = copy_of(cars, tmp_path)
    load = lambda: data.load(root, "cars", "train", 32)
    views, cache = load(), sorted((root / ".cache").iterdir())
    assert len(cache) == 2                                          # nothing temporary is left
    assert torch.equal(load().images, views.images) and sorted((root / ".cache").iterdir()) == cache
    picture = root / "cars/cars_train/train_00001/rgb/000007.png"
    Image.new("RGBA", (128, 128), (10, 20, 30, 255)).save(picture)
    changed = load()
    assert changed.images[57].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
    assert changed.meta["fingerprint"] != views.meta["fingerprint"]
    for packed in {*root.glob(".cache/*")} - {*cache}:
        for start in packed.read_bytes()[:1000], b"":
            packed.unlink()                                         # its map above lives on
            packed.write_bytes(start)
            assert torch.equal(load().images, changed.images) and packed.stat().st_size > 1000
    lens = root / "cars/cars_train/train_00001/intrinsics.txt"
    lens.write_text(lens.read_text().replace("131.25", "130.00"))
    assert load().meta["fingerprint"] != changed.meta["fingerprint"]


def test_alpha_is_straight_but_in_srn_only_a_mask(tmp_path):
    """Against pixels by hand: translucent, also packed; of the value that a PNG has transparent."""
    def read(pixel, background=(1, 1, 1), **more):
        picture = Image.fromarray(np.full((2, 3, *np.shape(pixel)), pixel, np.uint8))
        picture.save(tmp_path / "x.png", **more)
        return data.on_background(data.read_rgba(tmp_path / "x.png"), background)[0, 0].tolist()
    assert read((205, 55, 5, 128), background=(0, 0, 0)) == [103, 28, 3]
    assert read((0, 0, 0, 0)) == [255, 255, 255]
    assert read(77) == read(77, transparency=78) == [77] * 3
    assert read(77, transparency=77) == [255] * 3
    write_srn(tmp_path / "a", LOOKS[:1], WIDE, [np.full((32, 32, 4), 128, np.uint8)])
    pixels, _, _ = data.read_object(tmp_path / "a", "train", (32, 32), (1., 1., 1.))
    assert (pixels == 128).all()
    own = write_own(tmp_path / "own", pixel=(180, 180, 190, 128))             # before white
    images = data.load(tmp_path, str(own), "train", 64).images                # (5, 3, 64, 64)
    assert (images == torch.tensor([217, 217, 222])[:, None, None]).all()


@pytest.mark.parametrize("depth, colour, row, key, want", [
    (1, 0, b"\x40", b"\0\1", [0, 0]), (2, 0, b"\x60", b"\0\2", None),
    (4, 0, b"\x35", b"\0\5", None), (16, 0, b"\x33\x34\x55\xf0", b"", None),
    (16, 2, b"\x33\x34" * 3 + b"\x55\xf0" * 3, b"", [51, 255]),             # the upper bytes
    (16, 2, b"\x33\x34" * 3 + b"\x55\xf0" * 3, b"\x55\xf0" * 3, None)])
def test_a_png_that_has_not_8_bits_is_read_or_refused(depth, colour, row, key, want, tmp_path):
    """Against two pixels, written by hand: red of the first, alpha of the second, which has the
    transparent value of tRNS if there is a key."""
    chunk = lambda name, body: (len(body).to_bytes(4, "big") + name + body
                                + zlib.crc32(name + body).to_bytes(4, "big"))
    path, size = tmp_path / "x.png", bytes([0, 0, 0, 2, 0, 0, 0, 1, depth, colour, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + (key and chunk(b"tRNS", key))
                     + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))
    if want:
        first, second = np.asarray(data.read_rgba(path))[0].tolist()
        assert [first[0], second[3]] == want
    else:
        said = refused(data.read_rgba, path)
        assert f"{path}: not a readable image (ValueError not 8 bits a channel" in said


@pytest.mark.parametrize("write, name, how, said", [
    (write_srn, "intrinsics.txt", None, "no objects with cameras"), (write_srn, POSE, None, POSE),
    (write_srn, "intrinsics.txt", b"a b c\n", "intrinsics.txt"),
    (write_srn, "rgb", None, "rgb/000000.png"), (write_srn, POSE, b"nan " * 16, POSE),
    (write_srn, POSE, b"-1 0 0 0 0 1 0 0 0 0 1 1 0 0 0 1", POSE),           # mirrored
    (write_srn, PICTURE, Image.new("RGB", (32, 24)), PICTURE),
    (write_nerf, NERF, b"{", "not NeRF's transforms"),
    (write_nerf, NERF, b'{"frames": []}', "a: not an object"),
    (write_nerf, NERF, ("./r_3", "../r_3"), "not below this folder"),
    (write_nerf, NERF, ("camera_angle_x", "angle"), "fl_x or camera_angle_x"),
    (write_clip, "../a.txt", b"url\n0 1 1 .5 .5\n", "a.txt: not a clip"),
    (write_clip, "../a.txt", ("0 1.000000000", "0 0.000000000"), "a.txt: no focal length"),
    (write_clip, "../a.txt", (" -0.8", " -9.8"), "a.txt: 0: not a pose"),
    (write_clip, "100101.png", None, "a/100101.jpg: not a readable image"),
    (write_co3d, MASKED, b"no", MASKED), (write_co3d, MASKED, np.zeros((4, 3, 8, 8)), MASKED),
    (write_co3d, "focal_lengths.npy", np.array([1, 1, 1, 1, np.inf]), "focal_lengths.npy"),
    (write_co3d, "../camera_Rs.npz", dict(a=np.ones((5, 3, 3))), "camera_Rs.npz: a: not a pose")])
def test_bad_files_are_named_in_one_line(write, name, how, said, tmp_path):
    """Against each way of spoiling an object; nothing packed is left behind. None: delete; (a, b):
    put b for a in the text; an array, arrays, a picture, bytes: write."""
    dataset, base = {write_srn: ("cars", "srn_cars/cars_train"), write_nerf: (str(tmp_path), ""),
                     write_co3d: ("hydrants", "co3d_hydrant_for_gs/train"),
                     write_clip: ("re10k", "re10k/train")}[write]
    write(tmp_path / base / "a", LOOKS, WIDE, GREY)
    path = tmp_path / base / "a" / name
    if how is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(how, tuple):
        assert how[0] in path.read_text()
        path.write_text(path.read_text().replace(*how))
    elif isinstance(how, dict):
        np.savez(path, **how)
    elif isinstance(how, np.ndarray):
        np.save(path, how)
    else:
        how.save(path) if isinstance(how, Image.Image) else path.write_bytes(how)
    assert said in refused(data.load, tmp_path, dataset, "train", 16)
    assert not list(tmp_path.glob(".cache/*"))


def write_own(folder, camera=(), frame=(), hw=(64, 64), pixel=(90, 90, 90)):
    """Pictures as nerfstudio has them, and what is odd in all or in the last of them."""
    folder.mkdir()
    frames = []
    for v, m in enumerate(LOOKS):
        Image.fromarray(np.full((*hw, len(pixel)), pixel, np.uint8)).save(folder / f"{v}.png")
        frames.append(dict(file_path=f"{v}.png", transform_matrix=(m * [1, -1, -1, 1]).tolist()))
    frames[4] |= dict(frame)
    about = dict(fl_x=80, fl_y=80, cx=32, cy=32, w=64, h=64, frames=frames) | dict(camera)
    about = {key: value for key, value in about.items() if value is not None}
    (folder / "transforms.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("more, want", [
    (dict(camera=dict(camera_model="OPENCV", k1=0.0, k4=0, p1=0.0)), (80, 80, 32, 32)),
    (dict(hw=(32, 32)), (80, 80, 32, 32)),                          # resized, w and h are not
    (dict(camera=dict(fl_x=None, fl_y=None, camera_angle_x=np.pi / 2, camera_angle_y=np.pi / 2.5)),
     (32, 32 / np.tan(np.pi / 5), 32, 32)),
    (dict(camera=dict(aabb_scale=16, is_fisheye=False, rolling_shutter=[0] * 4),
          frame=dict(colmap_im_id=7, sharpness=30.0)), (80, 80, 32, 32)),
    (dict(camera=dict(camera_model="OPENCV_FISHEYE")), "OPENCV_FISHEYE"),
    (dict(camera=dict(k4=0.2)), "k4"), (dict(frame=dict(is_fisheye=True)), "is_fisheye"),
    (dict(camera=dict(fl_x=math.nan)), "focal"), (dict(frame=dict(cx=65)), "principal"),
    (dict(camera=dict(fl_x=None, fl_y=None, camera_angle_x=40)), "focal"),      # degrees
    (dict(camera=dict(camera_angle_x=1.2)), "camera_angle_x and fl_x"),
    (dict(hw=(128, 64)), "0.png"),
    (dict(frame=dict(mask_path="4.png")), "transforms.json: ['mask_path'] cannot be used")])
def test_transforms_are_read_as_documented_and_what_is_no_pinhole_is_refused(more, want, tmp_path):
    """Against the pinhole that each file describes, or the field that a pinhole cannot have."""
    own = str(write_own(tmp_path / "own", **more))
    if isinstance(want, str):
        assert want in refused(data.load, tmp_path, own, "train", 64)
    else:
        views = data.load(tmp_path, own, "train", 64)
        np.testing.assert_allclose(views.K[:, :4], np.tile(want, (5, 1)), rtol=1e-5)


def test_what_cannot_be_used_is_explained_in_one_line(cars, tmp_path):
    """Against names and folders without objects, another seed, cameras that have no middle."""
    assert "cars, chairs" in refused(data.prepare, "horses", tmp_path)
    assert "chairs_{train,test}" in refused(data.prepare, "chairs", tmp_path)
    assert "seed 0" in refused(data.prepare, "cars", cars, seed=1)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.jpg")
    assert "cameras" in refused(data.prepare, str(tmp_path / "photos"), tmp_path)
    away, same = LOOKS.copy(), np.stack([LOOKS[0]] * 5)
    away[2, :3, 3] *= -1
    same[:, 0, 3] += np.arange(5)
    for name, poses, said in ("same", same, "all look the same way"), ("away", away, "looks away"):
        write_nerf(tmp_path / name, poses, WIDE, GREY)
        assert said in refused(data.load, tmp_path, str(tmp_path / name), "train", 16)


def test_a_full_disk_and_a_killed_packer_leave_nothing_that_two_runs_at_once_use(cars, tmp_path):
    """Against the real things, a limit on the size of files and SIGKILL; then one run alone."""
    root, new = copy_of(cars, tmp_path), tmp_path / "new"
    command = lambda place: [sys.executable, str(HERE / "data.py"), "cars", f"--root={place}",
                             "--size=128", "--n_train=2", "--n_test=1"]       # as a user calls it
    run = lambda place: subprocess.Popen(command(place), stdout=subprocess.DEVNULL)
    for most, place, said in (1000, root, "free some space"), (2, new, "making cars"):
        full = with_files_of_at_most(most, command(place))
        assert full.returncode == 1 and "Traceback" not in full.stderr
        last = full.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and said in last and str(place) in last
        assert not list(place.glob(".cache/*"))
    killed = run(root)
    while not any(f.stat().st_size for f in root.glob(".cache/*/*")) and killed.poll() is None:
        time.sleep(.01)
    killed.kill()
    assert killed.wait() and not list(root.glob(".cache/*.u8"))
    assert not any([both.wait() for both in [run(root), run(root), run(new), run(new)]])
    one = data.load(cars, "cars", "train", 128)
    for place in root, new:
        views = data.load(place, "cars", "train", 128)
        assert torch.equal(views.images, one.images)
        assert views.meta["fingerprint"] == one.meta["fingerprint"]


# ---- toys/rooms.py -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The folder of a set of three procedural rooms."""
    folder = tmp_path_factory.mktemp("data") / "rooms"
    rooms.generate(folder, dict(train=1, test=2), 0, lambda f, jobs, title: map(f, jobs))
    return folder


@pytest.mark.parametrize("a, b", [(30, 35), (30, 40), (18, 10)])
def test_frames_of_a_room_agree_by_warping_with_its_true_depth(clips, a, b):
    """Against the other frame's picture, where its true depth says that it sees the same point."""
    for txt in clips.glob("*/*.txt"):
        numbers = np.loadtxt(txt, skiprows=1)                                 # (61, 19)
        picture = [np.asarray(Image.open(txt.with_suffix("") / f"{numbers[t, 0]:.0f}.jpg")) / 255
                   for t in (a, b)]                                           # (128, 192, 3) each
        K, w2c = numbers[:, 1:5] * [192, 128, 192, 128], np.tile(np.eye(4), (61, 1, 1))
        w2c[:, :3] = numbers[:, 7:].reshape(-1, 3, 4)
        assert np.allclose(K[:, 0] / 192, K[:, 1] / 128 * 9 / 16)             # squeezed to 3 : 2
        about = json.loads((txt.with_suffix("") / "attributes.json").read_text())
        room, (_, c2w, _) = [f(SimpleNamespace(**about)) for f in (rooms.assemble, rooms.cameras)]
        depth = [rooms.depth(room, K[t], c2w[t]) for t in (a, b)]             # (128, 192) each
        v, u = np.mgrid[:128, :192].reshape(2, -1) + .5                       # (n,)
        ray = np.stack([(u - K[a, 2]) / K[a, 0], (v - K[a, 3]) / K[a, 1], 1 + 0 * u])
        xyz = np.r_[ray * depth[0].ravel(), [1 + 0 * u]]                      # (4, n) camera a
        x, y, z, _ = w2c[b] @ np.linalg.inv(w2c[a]) @ xyz                     # (n,) each, camera b
        uv = np.stack([K[b, 0] * x / z + K[b, 2], K[b, 1] * y / z + K[b, 3]])     # (2, n)
        u, v = np.floor(uv).astype(int).clip(0, [[191], [127]])
        inside = (abs(uv - [[96], [64]]) < [[95], [63]]).all(0)
        shown = inside & (abs(z / depth[1][v, u] - 1) < .01)                  # (n,)
        off = abs(picture[1][v, u] - picture[0].reshape(-1, 3)).mean(1)[shown]
        assert shown.mean() > .4 and np.median(off) < .01 and off.mean() < .02


def test_the_source_shows_no_panel_and_the_pan_shows_both():
    """Against the same rooms painted the other way, ray by ray."""
    for i in range(40):
        c = rooms.design(np.random.default_rng([1, 0, i]))
        (K, c2w, _), one = rooms.cameras(c), rooms.assemble(c)
        for side in c.panels:
            flip = {**c.panels, side: "blue" if c.panels[side] == "amber" else "amber"}
            other = rooms.assemble(SimpleNamespace(**{**vars(c), "panels": flip}))
            assert len(one.n) < 1024                           # numbers of faces have 10 bits
            assert (rooms.draw(one, K, c2w[30]) == rooms.draw(other, K, c2w[30])).all()
            there = c2w[:16:5] if side == c.first else c2w[60:44:-5]      # 15 to 30 frames off
            assert max((rooms.draw(one, K, m, 1) != rooms.draw(other, K, m, 1)).any(2).mean()
                       for m in there) > .08


# ---- model.py ------------------------------------------------------------------------------------

TINY = ModelConfig(size=16, width=8, mult=(1, 2), blocks=1, attn=8)
TOLD = data.replace(TINY, code=4)
CLIPS = dict(near=0.5, far=8., background=(0.5, 0.5, 0.5), aspect=1.5, window=12, log_depth=True,
             pad=1 / 8)
told_or_not = pytest.mark.parametrize("shape", [TINY, TOLD], ids=["code 0", "code 4"])


def random_splats(batch=2, size=16, seed=0):
    return torch.randn(batch, S, size, size, generator=torch.Generator().manual_seed(seed))


def shake(network):
    """Random biases, and random weights of the layers that read a code."""
    for name, p in network.named_parameters():
        if p.dim() == 1 and "norm" not in name or name.endswith(("affine.weight", "conv1.weight")):
            p.data = 0.3 * torch.randn(p.shape)


@pytest.mark.parametrize("steps", [1, 3, 10, 99])
def test_denoise_recovers_an_oracle_exactly(steps):
    """Against the closed form: if every prediction is the clean splats, so is the result."""
    a = alpha_bar(torch.arange(T))                                            # (T,)
    assert (a.diff() < 0).all() and a[0] > 0.999 and a[-1] < 1e-3
    s_0, eps, levels = random_splats(), random_splats(seed=1), []
    t = torch.tensor([99, 57])

    def oracle(s_t, now, x_src, mean):
        levels.append(now)
        assert torch.allclose(s_t, add_noise(s_0, now, eps), atol=1e-4)   # DDIM stays on the ray
        return s_0
    *_, s_hat = denoise(oracle, add_noise(s_0, t, eps), t, None, None, steps)
    assert torch.equal(s_hat, s_0) and len(levels) == steps
    assert torch.equal(levels[0], t) and (torch.stack(levels).diff(dim=0) <= 0).all()


@pytest.mark.parametrize("theirs, mine", [*itertools.product([TINY, TOLD], repeat=2)])
def test_a_warm_start_is_the_teacher_told_nothing_whatever_the_noise(theirs, mine):
    """Against the teacher's raw splats, told nothing, and told the code that is read."""
    torch.manual_seed(0)
    teacher, denoiser, x = Teacher(theirs), Denoiser(mine), torch.rand(2, 3, 16, 16)
    shake(teacher)
    denoiser.warm_start(teacher.unet)
    for t in (0, 99):
        raw, code = denoiser.unet(x, torch.full((2,), t), s_t=random_splats(seed=t))
        assert torch.allclose(raw, teacher(x[:, None]), atol=1e-5)
        assert code is None if mine is TINY else not code.any()
    if mine is theirs is TOLD:
        denoiser.unet.read.bias.data = torch.tensor([1., -2., .5, 0.])
        raw, code = denoiser.unet(x, torch.full((2,), t), s_t=random_splats(seed=t))
        want, _ = teacher.unet(x, code=denoiser.unet.read.bias.tanh().expand(2, 4))
        assert torch.allclose(raw, want, atol=1e-5)
        assert not torch.allclose(want, teacher(x[:, None]))


def test_the_code_is_read_off_the_sum_of_noisy_splats():
    """Against half of the codes' variance, 0.49, at any level of noise, where a code adds a tenth
    of the noise to each pixel. Only the reading is trained."""
    torch.manual_seed(0)
    shape = data.replace(TINY, code=2)
    denoiser, adds = Denoiser(shape).requires_grad_(False), 0.1 * torch.randn(2, S)
    denoiser.warm_start(Teacher(shape).unet)
    adam, losses = torch.optim.Adam(denoiser.unet.read.requires_grad_().parameters(), lr=0.01), []
    for k in range(100):
        code, t = 1.4 * torch.randint(2, (16, 2)) - 0.7, torch.randint(T, (16,))
        s_t = add_noise((code @ adds)[..., None, None], t, random_splats(16, seed=k))
        _, code_hat = denoiser.unet(torch.rand(16, 3, 16, 16), t, s_t=s_t)
        losses.append(F.mse_loss(code_hat, code))
        adam.zero_grad()
        losses[k].backward()
        adam.step()
    assert sum(losses[80:]) / 20 < 0.49 / 2


def test_guidance_pulls_every_step_but_the_last_down_its_slope_through_the_denoiser():
    """Against the closed form for D(s_t) = c s_t with c < 0, where the slope by s_t has another
    sign than the slope by s_hat; without a guide the steps are DDIM's, to the bit."""
    c, x, t = -0.5, random_splats().double(), torch.tensor([99, 57])
    seen = []
    def oracle(s_t, now, x_src, mean):
        seen.append(s_t.detach())
        return c * s_t
    for guide in (None, lambda s_hat: (s_hat - 1).square().mean((1, 2, 3))):
        seen.clear()
        steps = list(denoise(oracle, x, t, None, None, 3, guide))
        s_t = x
        for k in range(3):
            now, then = t * (3 - k) // 3, t * (2 - k) // 3
            assert torch.equal(seen[k], s_t) if guide is None else torch.allclose(seen[k], s_t)
            assert torch.equal(steps[k], c * seen[k]) and not steps[k].requires_grad
            s_t = ddim_step(s_t, c * s_t, now, then)
            if guide and k < 2:
                slope = c * (c * seen[k] - 1)                                 # but for its size
                slope = slope / slope.square().sum((1, 2, 3), keepdim=True).sqrt()
                s_t = s_t - RHO * signal_noise(then)[1] * slope
    x.requires_grad_()
    *_, s_hat = denoise(lambda s_t, *_: c * s_t, x, t, None, None, 3)
    assert torch.allclose(torch.autograd.grad(s_hat.sum(), x)[0] * x, s_hat)   # linear: all steps


def released(unet, path):
    """Writes a U-Net of 16 pixels as Splatter Image's authors do: their names, their constants."""
    state = dict(ray_dirs=torch.ones(1, 3, 16, 16))
    for k, x in unet.state_dict().items():
        k = k if k.startswith("out.") else "encoder." + k.replace("aux", "dec.16x16_aux")
        k = "network_with_offset." + k
        state[k] = x
        if k.endswith(("up.skip.weight", "down.skip.weight")):
            state[k.replace("weight", "resample_filter")] = torch.ones(2, 2)
    torch.save(dict(model_state_dict=state, iteration=7), path)
    return state


@pytest.mark.parametrize("log_depth", [False, True])
def test_splats_of_any_shape_lie_on_their_pixels_and_between_near_and_far(log_depth):
    """Against pixels by hand, with fx != fy, the axis off centre, and a margin; the depths of 0."""
    cfg = ModelConfig(6, aspect=1.5, pad=2, near=0.5, far=50., log_depth=log_depth)
    assert cfg.hw == (10, 13)
    raw, K = torch.zeros(1, S, 10, 13), torch.tensor([[7., 5., 4., 3.5]])
    raw[:, 0] = 40 * (torch.arange(13) - 6).sign()
    x, y, z = splats_to_gaussians(raw, K, cfg).xyz[0].view(10, 13, 3).unbind(-1)
    assert torch.allclose(7 * x / z + 4, torch.arange(13) - 2 + 0.5, atol=1e-5)
    assert torch.allclose(5 * y / z + 3.5, torch.arange(10)[:, None] - 2 + 0.5, atol=1e-5)
    assert torch.allclose(z[0, [0, 6, 12]], torch.tensor([0.5, 5. if log_depth else 25.25, 50.]))


def test_networks_take_pictures_of_any_shape_and_add_a_margin():
    """Against splats of 20 x 28 pixels for pictures of 16 x 24, whose border is seen repeated."""
    cfg = data.replace(TINY, aspect=1.5, pad=2)
    teacher, x = Teacher(cfg), torch.rand(2, 3, 16, 24)
    larger = Teacher(data.replace(cfg, size=20, aspect=1.4, pad=0, attn=10))
    larger.load_state_dict(teacher.state_dict())                              # the same names, too
    wide = F.pad(x, (2, 2, 2, 2), "replicate")                                # (2, 3, 20, 28)
    assert torch.equal(canonical(teacher(x[:, None])), canonical(larger(wide[:, None])))
    assert teacher.unet.enc["10x14_block0"].attention


def test_the_network_is_splatter_images():
    """Against numbers recorded when this code reproduced the official code's. Weights and image are
    made by formula; any parameter reversed, or left out, moves the splats by at least 0.03."""
    def noise(shape, seed):                                         # mean 0, deviation 1
        x = torch.sin((torch.arange(shape.numel()).double() + 1000 * seed) * 12.9898) * 43758.5453
        return ((x - x.floor() - .5) * 12 ** .5).view(shape)
    teacher = Teacher(ModelConfig(16, 16, (1, 2), 2, 8))
    for i, (name, p) in enumerate(teacher.unet.named_parameters()):
        size = (1 + ("qkv" in name)) * p[0].numel() ** -.5 if p.dim() > 1 else .3
        p.data = (noise(p.shape, i) * size + bool(re.search(r"norm\d?\.weight", name))).float()
    pose = torch.tensor([[[0, 1, 0, .1], [0, 0, 1, .2], [1, 0, 0, .3], [0, 0, 0, 1]]])
    raw = teacher(noise(torch.Size([1, 1, 3, 16, 16]), 99).float())           # (1, 24, 16, 16)
    g = transform(teacher.gaussians(raw, torch.tensor([[16.4, 16.4, 8, 8]])), pose)
    want = [-.0837394, -.3507617, -1.0073483, -.7005131, .3697383, .9000772]
    torch.testing.assert_close(raw[0, ::4, 5, 7], torch.tensor(want), atol=1e-4, rtol=0)
    want = [.308309, 1.199754, -.600903, 3.220033, 2.209682, .413358, .225836, .561949, -.077267,
            .413198, -.700513, -.471826, .683823, -.812603, .158565, -.900077]
    mine = torch.cat([x[0, 87].flatten()[:n] for x, n in zip(g, (3, 3, 3, 1, 6))])
    torch.testing.assert_close(mine, torch.tensor(want), atol=1e-3, rtol=0)


def test_released_weights_are_read_and_what_does_not_fit_is_named(tmp_path):
    """Against the network they were written from; then a file with each kind of flaw."""
    path, cfg = tmp_path / "model_cars.pth", ModelConfig(16, 8, (1, 2), 2, 8)
    mine = Teacher(cfg)
    state = released(mine.unet, path)
    theirs = load_splatter_image(path)
    assert theirs.cfg == cfg and all(map(torch.equal, mine.parameters(), theirs.parameters()))
    state["network_with_offset.new"] = torch.ones(1)
    state["network_with_offset.out.bias"] = torch.ones(21)
    del state["network_with_offset.encoder.dec.8x8_in0.norm2.weight"]
    named = r'Missing.*"dec.8x8_in0.norm2.weight".*Unexpected.*"new".*mismatch for out.bias.*21.*24'
    for flawed, said in [(dict(model_state_dict=state), named),
                         (dict(state=state), "KeyError 'model_state_dict'"),
                         (dict(model_state_dict=torch.ones(3)), "not Splatter Image")]:
        torch.save(flawed, path)
        assert re.search(said, refused(load_splatter_image, path))


# ---- train.py ------------------------------------------------------------------------------------

def scene_batch(batch=2, views=3, size=16, seed=0):
    """Images and cameras as data.gather returns them, of nothing in particular."""
    _, cam = benchmark_scene(batch, views, 1, size)
    w2c = cam.w2c @ invert_pose(cam.w2c[:, :1])
    w2c[:, 0] = torch.eye(4)
    x = torch.rand(batch, views, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x, Camera(w2c, cam.K, cam.hw), torch.ones(3)


def told_scene(shape, batch=2):
    """A frozen teacher whose codes say something, a denoiser, images and cameras for them. Further
    views are the teacher's, plus noise: no code is at tanh's ends."""
    torch.manual_seed(0)
    teacher, denoiser = Teacher(shape).requires_grad_(False), Denoiser(shape)
    x, cam, white = scene_batch(batch, views=4)
    shake(teacher)
    g = teacher.gaussians(teacher(x[:, :1]), cam.K[:, 0])
    seen, _, _ = render(g, cam.views(slice(1, None)), white)                  # (B, 3, 3, 16, 16)
    x[:, 1:] = seen + 0.1 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    return teacher, denoiser, x, cam, white


def test_the_cycle_looks_at_splats_of_the_target_frame_and_passes_gradients_to_that_view():
    """Against 0 for splats that are right in the target's frame, and for all other views."""
    g, cam = benchmark_scene(2, 3, 30, 16)
    white, w2c = torch.ones(3), cam.w2c @ invert_pose(cam.w2c[:, :1])
    g_source = transform(g, cam.w2c[:, 0])                            # world = source
    cam = Camera(w2c, cam.K * torch.tensor([1, 1.2, 0.9]).view(1, 3, 1), cam.hw)
    x = render(g_source, cam, white)[0]
    in_target = transform(g_source, w2c[:, 1])
    assert train.cycle_loss(lambda image, K: in_target, x, x, cam, white) < 1e-8
    torch.manual_seed(0)
    teacher, x_hat = Teacher(TINY).requires_grad_(False), x.clone().requires_grad_()
    train.cycle_loss(lambda image, K: teacher.gaussians(teacher(image[:, None]), K),
                     x, x_hat, cam, white).backward()
    assert x_hat.grad[:, 1].abs().sum() > 0 and x_hat.grad[:, [0, 2]].abs().sum() == 0


@told_or_not
@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_returns_finite_losses_and_trains_only_the_student(stage, shape):
    """Against gradients of 0, the sum of the terms; views that are only told are not judged."""
    teacher, denoiser, x, cam, white = told_scene(shape)
    cfg = train.Config(size=16, steps=3, code=shape.code, told=3, views=2, w_3dgs_2=0.2, t_star=10,
                       t_known=80)
    t, eps, close = torch.tensor([30, 99]), random_splats(), torch.testing.assert_close
    lose = lambda: getattr(train, f"stage_{stage}")(denoiser, teacher, x, cam, white, t, eps, cfg)
    losses = lose()
    losses["loss"].backward()
    for name, p in denoiser.named_parameters():
        assert p.grad is not None and 0 < p.grad.abs().sum() < math.inf, name
    assert all(p.grad is None for p in teacher.parameters())
    w = cfg.w_3dgs if stage == 1 else cfg.w_3dgs_2
    want = w * losses["loss_3dgs"] + losses["loss_image"] + cfg.w_cyc * losses["loss_cyc"]
    assert ("loss_code" in losses) == (stage == 1 and shape.code > 0)
    close(losses["loss"], want + cfg.w_code * losses.get("loss_code", 0))
    s, s_t, base, code = train.noised_teacher(denoiser, teacher, x, cam, white, t, eps, cfg)
    *_, s_hat = denoise(denoiser, s_t, t, x[:, 0], base, (1, cfg.steps)[stage - 1])
    x_hat, _, _ = render(denoiser.gaussians(s_hat, base, cam.K[:, 0]), cam.views(slice(2)), white)
    weight = lambda_t(t, cfg.weighting, 10, 80) if stage == 2 else 1
    close(losses["loss_3dgs"], F.mse_loss(s_hat, s))
    close(losses["loss_image"], (weight * train.image_loss(x_hat, x)).mean())
    if "loss_code" in losses:
        close(losses["loss_code"], F.mse_loss(denoiser.unet(x[:, 0], t, s_t=s_t)[1], code))
        assert lose()["loss_code"].requires_grad
    x[:, 2:] = x[:, 2:].flip(1)                                               # tell something else
    assert (lose()["loss_image"] == losses["loss_image"]) == (not shape.code)


@told_or_not
def test_noised_splats_are_what_the_told_teacher_adds(shape):
    """Against the teacher told and told nothing, by hand, and its Gaussians; against torch.std."""
    teacher, denoiser, x, cam, white = told_scene(shape)
    alone = teacher(x[:, :1])                                                 # (2, 24, 16, 16)
    told = teacher(x, cam, white) if shape.code else alone                    # (2, 24, 16, 16)
    denoiser.stats.copy_(splat_statistics(canonical(told).split(1)))
    constant, std = denoiser.stats[..., None, None]                           # (24, 1, 1) each
    torch.testing.assert_close(constant.flatten(), canonical(told).mean((0, 2, 3)))
    torch.testing.assert_close(std.flatten(), canonical(told).std((0, 2, 3), False).clamp(1e-3))
    t, eps, cfg = torch.tensor([0, 30]), random_splats(), train.Config(code=shape.code)
    s, s_t, base, code = train.noised_teacher(denoiser, teacher, x, cam, white, t, eps, cfg)
    assert torch.equal(base, canonical(alone) if shape.code else constant[None])
    assert (canonical(told, base)[:, 8:12] * base[:, 8:12]).sum(1).min() >= 0 or not shape.code
    assert canonical(told)[:, 8].min() >= 0
    want = (canonical(told, base if shape.code else None) - base) / std       # (2, 24, 16, 16)
    assert torch.allclose(s, want, atol=1e-4) and s.abs().amax((1, 2, 3)).min() > 0.01
    assert torch.equal(s_t, add_noise(s, t, eps)) and (code is None) == (not shape.code)
    mine, theirs = denoiser.gaussians(s, base, cam.K[:, 0]), teacher.gaussians(told, cam.K[:, 0])
    flip = (mine.quat * theirs.quat).sum(-1, keepdim=True).sign()             # (2, 256, 1)
    assert_same(mine, theirs._replace(quat=flip * theirs.quat), 1e-5)


@told_or_not
@torch.no_grad()
def test_the_splats_that_stage_1_noises_have_a_known_deviation(shape, cars, tmp_path):
    """Against SIGNAL, or 1 and a mean of 0 without a code, over the 32 batches, in every channel
    but those of degree 1, which are still constant."""
    teacher, _, _, _, white = told_scene(shape)
    teacher.unet.out.weight[8:12] *= 20                            # quaternions of either sign
    teacher.unet.out.bias[8:12] = 0
    save_network(tmp_path / "teacher.pt", teacher, {}, half=False)
    cfg = train.Config(size=16, width=8, mult=(1, 2), code=shape.code, told=2, batch=(2, 2, 2),
                       out=tmp_path, device="cpu")
    views = data.load(cars, "cars", "train", 16)
    denoiser, teacher = train.make_networks(cfg, 1, views, white)
    x, _, _, t, eps = train.draw_batch(views, cfg, 1, 0)
    raw, _ = denoiser.unet(x[:, 0], t, s_t=eps)
    assert torch.allclose(raw, teacher(x[:, :1]), atol=1e-4)                  # the warm start
    draws = (train.draw_batch(views, cfg, 0, cfg.iters[0] + k) for k in range(32))
    mean, std = splat_statistics(
        train.noised_teacher(denoiser, teacher, x, Camera(w2c, K, (16, 16)), white, t, eps, cfg)[0]
        for x, w2c, K, t, eps in draws)
    want = torch.full_like(std, SIGNAL if shape.code else 1)
    torch.testing.assert_close(std[:15], want[:15], rtol=1e-3, atol=0)
    assert shape.code or mean.abs().max() < 1e-3


@pytest.mark.parametrize("wild", [0, 0.01 * (9 + 2.25) / 2 + 0.001 * (3 + 4) / 2])
def test_half_of_a_batch_is_told_and_the_views_that_tell_are_not_judged(wild):
    """Against a teacher called by hand: codes of 0 and the codes of the views, with noise; splats
    that are too large or too far out are held back."""
    (teacher, _, x, cam, white), eps = told_scene(TOLD, batch=4), random_splats(4)
    if wild:
        teacher.unet.out.weight[1:8] = 0
        teacher.unet.out.bias[1:8] = torch.tensor([3., 0.5, 1.5, -9, 0, math.log(3), math.log(4)])
    cfg = train.Config(code=4, told=3, views=2, code_noise=0.1)
    losses = train.stage_0(teacher.requires_grad_(), x, cam, white, None, eps, cfg)
    if not wild:
        grads = torch.autograd.grad(losses["loss"], [*teacher.encoder.parameters()])
        assert all(grad.any() for grad in grads)
    code = teacher.code(teacher(x[:, :1]), x, cam, white) + 0.1 * eps[:, 0, 0, :4]
    raw = torch.cat([teacher(x[:2, :1]), teacher.unet(x[2:, 0], code=code[2:])[0]])
    two = Camera(cam.w2c[:, :2], cam.K[:, :2], cam.hw)
    x_hat, _, _ = render(teacher.gaussians(raw, cam.K[:, 0]), two, white)     # (4, 2, 3, 16, 16)
    want = train.image_loss(x_hat, x[:, :2])                                  # (4,)
    torch.testing.assert_close(losses["loss"], want.mean() + wild)
    torch.testing.assert_close(losses["loss_told"], want[2:].mean())
    torch.testing.assert_close(losses["loss_not_told"], want[:2].mean())


def test_stage_2_starts_above_t_star_and_where_the_code_is_known(cars):
    """Against the levels of 200 draws; stages 0 and 1 take all of them."""
    views = data.load(cars, "cars", "train", 16)
    cfg = train.Config(size=16, batch=(4, 200, 200), t_star=20, t_known=80, device="cpu")
    levels = [train.draw_batch(views, cfg, stage, 0)[3] for stage in (1, 2)]
    assert levels[0].min() < 5 and levels[0].max() > 94
    assert levels[1].min() == 21 and levels[1].max() == 80
    x, y = [train.draw_batch(views, cfg, 1, step) for step in (0, 1)]
    assert not any(map(torch.equal, (x[3], x[4]), (y[3], y[4])))


def test_the_learning_rate_warms_up_and_then_decays_or_does_not():
    """Against a line up, then half a cosine or a constant, by hand."""
    cfg = train.Config(iters=(0, 100, 0), lr=(0., 8., 0.), warmup=20)
    rates = [train.learning_rate(c, 1, step) for c in (cfg, train.replace(cfg, decay_lr=False))
             for step in (0, 9, 50, 99)]
    want = [8 / 20, 4 * (1 + math.cos(0.09 * math.pi)) / 2, 4, 8 * math.sin(math.pi / 200) ** 2,
            8 / 20, 4, 8, 8]
    assert np.allclose(rates, want)


def test_the_weights_of_noise_levels_average_to_one():
    """Against the mean over the levels that stage 2 starts from; 1 - alpha_bar rises with t."""
    for kind, t_star in itertools.product(("min_snr", "constant", "noise"), (0, T_STAR, T - 2)):
        assert abs(lambda_t(torch.arange(t_star + 1, T), kind, t_star).mean() - 1) < 1e-5
        assert abs(lambda_t(torch.arange(6, 81), kind, 5, 80).mean() - 1) < 1e-5
    t = torch.arange(T_STAR + 1, T)
    assert (lambda_t(t, "noise").diff() >= 0).all() and (lambda_t(t, "min_snr").diff() <= 0).all()


def test_flags_have_the_types_of_config(capsys):
    """Against Config: --clip=1 is a float, --mult a tuple, a bare switch is true."""
    cfg = train.parse(["--clip=1", "--mult", "(1,2)", "--eval_only", "--out=o", "--device=cpu"])
    assert "no attention" in capsys.readouterr().out               # at 8 pixels, by --attn
    assert (cfg.mult, cfg.eval_only, cfg.out) == ((1, 2), True, "o") and type(cfg.clip) is float
    paper = train.parse(["--paper", "--dataset", "chairs", "--size=64", "--device=cpu"])
    assert (paper.code, paper.size, paper.batch) == (0, 64, (8, 100, 10))
    assert paper.iters == (1_000_001, 100_000, 20_000) and paper.out == "out/chairs"


@pytest.mark.parametrize("flag", [
    "--mult=()", "--mult=(1,2,'a')", "--mult=(1,0)", "--batch=(-2,2,2)", "--batch=(2,2)",
    "--batch=(1,2,2)", "--width=9", "--lr=(1e999,1,1)", "--lr=fast", "--iters=(1.5,1,1)",
    "--clip=nan", "--bf16=2", "--steps=0", "--size=", "--size=30", "--t_known=100", "--epochs=3"])
def test_flags_out_of_range_get_one_line_that_names_them(flag):
    """Against the least values and the types of the defaults."""
    assert flag.split("=")[0] in refused(train.parse, ["--device=cpu", flag])


@pytest.mark.parametrize("change", [
    lambda c: dict(c, config=dict(c["config"], flavour=1)),
    lambda c: dict(c, config=dict(c["config"], mult=3)),
    lambda c: dict(c, state=torch.ones(1)), lambda c: torch.ones(1), lambda c: dict(a=1)])
@pytest.mark.parametrize("read", [lambda path: load_network(path, Teacher),
                                  lambda path: given_teacher(path, TINY, False)])
def test_odd_checkpoints_get_one_line_that_names_the_file(tmp_path, change, read):
    """Against a file of save_network, changed in one thing."""
    path = tmp_path / "teacher.pt"
    save_network(path, Teacher(TINY), {})
    read(path)
    torch.save(change(torch.load(path)), path)
    assert refused(read, path).startswith(f"error: {path}: ")


def small_step(device, stages=(0, 1, 2), count=20, **flags):
    """-> losses of `count` steps of these stages on random images, by make_step."""
    cfg = train.Config(size=16, mult=(1, 2), batch=(4, 4, 2), views=2, told=1, steps=3,
                       device=device, **flags)
    shape = ModelConfig(16, 16, (1, 2), 1, 8, code=cfg.code)
    losses = []
    for stage in stages:
        torch.manual_seed(0)
        views = random_views(cfg)
        network = (Denoiser if stage else Teacher)(shape).to(device)
        teacher = Teacher(shape).to(device).requires_grad_(False)
        step, _ = train.make_step(cfg, stage, network, teacher, torch.ones(3, device=device))
        for k in range(count):
            lr = torch.full((), 1e-3, device=device)
            losses.append(float(step(*train.draw_batch(views, cfg, stage, k), lr)["loss"]))
    return torch.tensor(losses)


def test_keeping_only_the_splats_between_steps_changes_nothing(monkeypatch):
    """Against keeping all activations: 5 steps of stage 2. Without nvcc no step is captured."""
    monkeypatch.setattr(train, "choose", lambda *_: None)
    monkeypatch.delattr(train, "Captured")
    flags = dict(code=4, stages=[2], count=5)
    torch.testing.assert_close(small_step("cpu", checkpoint=True, graph=True, **flags),
                               small_step("cpu", **flags))


@needs_cuda
@pytest.mark.parametrize("bf16, compiled, code", [
    (False, False, 0), (False, False, 4), (True, False, 4), (True, True, 4)])
def test_a_captured_step_trains_like_an_eager_one(bf16, compiled, code):
    """Against 20 steps as written; compiling takes minutes, so it is done for one stage."""
    flags = dict(bf16=bf16, stages=[1] if compiled else [0, 1, 2], code=code)
    torch.testing.assert_close(small_step("cuda", graph=True, compile=compiled, **flags),
                               small_step("cuda", **flags),
                               rtol=0.05 if bf16 or compiled else 5e-3, atol=1e-3)


def test_a_gradient_that_is_no_number_changes_no_weight():
    """Against the weights before, of the network and of Adam; the next step trains again."""
    torch.manual_seed(0)
    network, (x, cam, white) = Teacher(TINY), scene_batch(views=2)
    cfg = train.Config(size=16, device="cpu", code=0, clip=1e-3)
    step, optimiser = train.make_step(cfg, 0, network, None, white)
    take = lambda x: step(x, cam.w2c, cam.K, None, None, torch.tensor(1e-3))["grad_norm"]
    state = lambda: deepcopy([*network.parameters(), *[
        v for s in optimiser.state.values() for v in s.values()]])
    take(x)
    before, bad = state(), x.clone()
    bad[0, 1, 0, 3, 3] = torch.nan
    assert take(bad).isnan() and all(map(torch.equal, before, state()))
    assert take(x).isfinite() and not any(map(torch.equal, before[:3], state()))
    norm = torch.cat([s["exp_avg"].flatten() for s in optimiser.state.values()]).norm()
    assert norm <= 0.2 * cfg.clip                                             # of two clipped steps


# ---- sample.py: how good they are ----------------------------------------------------------------

def test_psnr_and_ssim_of_known_pairs():
    """Against a constant error (20 dB), equality (1), and SSIM summed window by window."""
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(sample.psnr(x + 0.1, x), torch.tensor(20.0), atol=1e-3)
    assert torch.allclose(sample.ssim(x, x), torch.tensor(1.0))
    w = torch.exp(-(torch.arange(11).double() - 5) ** 2 / 4.5)
    w = torch.outer(w, w).flatten()[:, None] / w.sum() ** 2                   # (121, 1)
    p, q = [F.unfold(z.double().flatten(0, 1)[:, None], 11, padding=5)        # (6, 121, 256) each
            for z in (x, y)]
    mean = lambda z: (w * z).sum(1)                                           # (6, 256)
    mp, mq = mean(p), mean(q)
    spread = mean(p * p) - mp ** 2 + mean(q * q) - mq ** 2
    each = ((2 * mp * mq + 1e-4) * (2 * (mean(p * q) - mp * mq) + 9e-4)
            / ((mp ** 2 + mq ** 2 + 1e-4) * (spread + 9e-4)))
    assert torch.allclose(sample.ssim(x, y).double(), each.view(2, -1).mean(1), atol=1e-5)


def test_the_paint_of_a_door_is_told_from_mud():
    """Against blends of an amber and a blue picture; what both share does not count."""
    amber = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    blue = amber.clone()
    for picture, name in (amber, "amber"), (blue, "blue"):
        picture[:, 4:9, 3:9] = torch.tensor(toys.cars.DOORS[name])[:, None, None]
    for q, both, decided, share, true in [
            ([0.], 0, 1, 0, (0, 1)), ([.5], 0, 0, None, (0, 0)), ([1., .9, .8], 0, 1, 1, (1, 0)),
            ([.8, .2, .5, .6], 1, .5, None, (.25, .25)), ([1.4, -.3], 1, 1, .5, (.5, .5))]:
        x_hat = torch.stack([a * amber + (1 - a) * blue for a in q])          # (n, 3, 16, 16)
        x_hat[:, :, 10:] = 0.3                                                # beside the door
        got, if_blue = [toys.cars.door_scores(x_hat, x, amber, blue) for x in (amber, blue)]
        assert (got["both"], got["decided"]) == (both, decided), q
        assert share is None or got["amber"] == share, q
        assert (got["true"], if_blue["true"]) == true, q
    hole = toys.cars.door_scores(torch.ones(2, 3, 16, 16), amber, amber, blue)
    assert hole["decided"] == hole["true"] == hole["both"] == 0


def test_what_a_nearer_plane_covers_or_the_frame_leaves_out_is_hidden():
    """Against geometry by hand: what a small wall hides of a large one behind it; in clips also
    what the first camera has outside of its frame."""
    W, f = 32, 32.0
    K = torch.tensor([f, f, W / 2, W / 2]).expand(1, 2, 4)
    w2c = torch.eye(4).repeat(1, 2, 1, 1)
    w2c[0, 1, 0, 3] = -0.5                                                    # moved to the right
    x = ((torch.arange(W) + 0.5 - W / 2) / f).expand(W, W)                    # at depth 1
    y = x.T
    def seen(move):
        return torch.where((x + move).abs().maximum(y.abs()) < 0.25, 1.0, 2.0)
    depth = torch.stack([seen(0), seen(0.5)])[:, None]                        # (2, 1, 32, 32)
    alpha = torch.ones_like(depth)
    alpha[1, 0, :4] = 0.3                                                     # shows no splats
    # the shadow on the far wall: |x| < 0.5 at depth 2, which is |x + 0.25| < 0.25 in the other
    shadow = ((x + 0.25).abs().maximum(y.abs()) < 0.25) & (seen(0.5) > 1.5)
    assert shadow.sum() > 50
    for frame in False, True:
        hidden = sample.hidden(depth * alpha, alpha, Camera(w2c, K, (W, W)), frame)
        want = shadow | frame & (x > 0.25)                         # half of 0.5 at depth 2
        assert hidden.shape == (2, W, W) and not hidden[0].any()
        assert torch.equal(hidden[1][4:], want[4:]) and not hidden[1, :4].any()


def test_scores_of_samples_are_what_they_are_called(cars):
    """Against two known samples, by hand; black pictures (CO3D without a mask) do not count."""
    views, white = data.load(cars, "cars", "test", 16), torch.ones(3)
    views = data.replace(views, images=views.images.clone())
    cfg = train.Config(size=16, device="cpu")
    torch.manual_seed(0)
    teacher = Teacher(TINY)
    raw = teacher(torch.rand(2, 1, 3, 16, 16)).detach()                       # (2, 24, 16, 16)
    raw[:, 4] += 4                                                            # opaque
    index = sample.test_views(views, 0, 6)
    g = teacher.gaussians(raw, views.K[index[:2]])
    views.images[index[2]] = 0
    likeness = lambda a, b: (a - b).abs().mean((1, 2, 3))
    r, = sample.evaluate(lambda o: g, views, cfg, 6, [0], lpips=likeness)
    x, cam = data.gather(views, index[None, [0, 1, 3, 4, 5, 6]])
    twice = Camera(*(y.repeat(2, *[1] * (y.dim() - 1)) for y in cam[:2]), cam.hw)
    x_hat, alpha, depth = render(g, twice, white)                             # (2, 6, 3, 16, 16)
    each = sample.psnr(x_hat[:, 1:], x[:, 1:])                                # (2, 5)
    where = sample.hidden(depth[0], alpha[0], cam)[1:]                        # (5, 16, 16)
    assert where.any()
    want = dict(one=each.mean(), best=each.mean(1).max(),
                source=sample.psnr(x_hat[:, 0], x[:, 0]).mean(),
                mean=sample.psnr(x_hat[:, 1:].mean(0), x[0, 1:]).mean(),
                ssim=sample.ssim(x_hat[0, 1:], x[0, 1:]).mean(),
                std=((x_hat[0] - x_hat[1]).abs() / 2 ** .5)[1:].mean(1)[where].mean(),
                lpips=2 * (x_hat[0, 1:] - x[0, 1:]).abs().mean())
    v, *pair = toys.cars.hidden_pair(views, 0, data.resize)
    x, cam = data.gather(views, torch.tensor([[64, v]]))
    door = sample.renderings(g, cam.views([1]), white)[:, 0]                  # (2, 3, 16, 16)
    want |= toys.cars.door_scores(door, x[0, 1], *pair)
    assert r.pop("object") == "test_00000"
    assert r == pytest.approx({k: v if v is None else float(v) for k, v in want.items()}, rel=1e-4)
    given = lambda n: sample.evaluate(lambda o: g, views, cfg, 6, [0], given=lambda *_: index[:n])
    assert given(2)[0]["one"] == pytest.approx(each[:, 1:].mean().item(), rel=1e-4)
    assert not given(7)                                            # no view is left to be scored
    index[1] = v
    assert "decided" not in given(2)[0]                            # nor the door that was given
    scores = [dict(object="a", one=1., std=2.), dict(object="b", one=2.)]
    assert sample.average_scores(scores) == dict(one=1.5, std=2.0)


def test_codes_of_others_are_what_the_others_say(cars):
    """Against the code of the only other object, by hand; from an equal set, of its own."""
    views, white = data.load(cars, "cars", "train", 16), torch.ones(3)
    cfg = train.Config(size=16, code=4, told=3, device="cpu", samples=1)
    teacher = Teacher(TOLD)
    shake(teacher)
    told = lambda views, o: sample.told_views(views, o, 3)
    (x, cam), (y, there) = [data.gather(views, told(views, o)[None]) for o in range(2)]
    with torch.no_grad():
        code = teacher.code(teacher(y[:, :1]), y, there, white)               # (1, 4)
        raw, _ = teacher.unet(x[:, 0], code=code)                             # (1, 24, 16, 16)
        own = teacher(x, cam, white)                                          # (1, 24, 16, 16)
        for predict, want in [
                (controls.by_codes(teacher, views, cfg, views), raw),
                (controls.by_codes(teacher, views, cfg, data.replace(views)), own),
                (sample.predictor(teacher, None, views, cfg, told), own)]:
            assert_same(predict(0), teacher.gaussians(want, cam.K[:, 0]), 1e-5)


@torch.no_grad()
def test_controls_and_guided_samples_come_nearer_to_the_view_that_they_are_given(cars):
    """Against the teacher and the samples without it."""
    torch.manual_seed(0)
    views = data.load(cars, "cars", "test", 16)
    teacher, student = Teacher(TINY), Denoiser(TINY)
    cfg = train.Config(size=16, device="cpu", steps=5)
    index = sample.opposite_views(views, 0)
    axes = views.c2w[:, :3, 2]                                                # (251, 3)
    assert index.tolist() == [64, (axes @ axes[64]).argmin()]
    x, cam, white = sample.scene(views, index, cfg)
    def error(predict):
        x_hat = sample.renderings(predict(0), cam, white)                     # (n, 2, 3, 16, 16)
        return (x_hat - x).square().mean((2, 3, 4))                           # (n, 2)
    assert (error(controls.by_optimised_teacher(teacher, views, cfg, 20))
            < error(sample.predictor(teacher, None, views, cfg))).all()
    guided, free = [error(sample.predictor(teacher, student, views, cfg, given, 3))
                    for given in (sample.opposite_views, None)]
    assert (guided[:, 1] < free[:, 1]).all()


@told_or_not
@torch.no_grad()
def test_samples_drawn_together_are_those_drawn_one_by_one(shape, cars):
    """Against `denoise`, one at a time, from the noise of that object and sample."""
    torch.manual_seed(0)
    views = data.load(cars, "cars", "train", 16)
    teacher, denoiser = Teacher(shape), Denoiser(shape)
    cfg = train.Config(size=16, steps=3, device="cpu")
    g = sample.predictor(teacher, denoiser, views, cfg, n=2)(1)
    x, cam, _ = sample.scene(views, sample.test_views(views, 1), cfg)
    base = denoiser.base(teacher(x[:, :1]))
    for k in range(2):
        eps = torch.randn(1, S, 16, 16, generator=torch.Generator().manual_seed(10**6 + 10**3 + k))
        *_, s = denoise(denoiser, eps, torch.tensor([T - 1]), x[:, 0], base, 3)
        assert_same(sample.one(g, k), denoiser.gaussians(s, base, cam.K[:, 0]), 1e-5)


def made_up_clips(split, lengths=(30, 30)):
    """Views of clips, 16 x 24 pixels of anything, by a camera that walks and turns; fx != fy."""
    M, rng = sum(lengths), torch.Generator().manual_seed(len(split))
    images = torch.randint(256, (M, 3, 16, 24), dtype=torch.uint8, generator=rng)
    k = torch.cat([torch.arange(n) for n in lengths])                         # (M,)
    c2w = torch.eye(4).repeat(M, 1, 1)                                        # (M, 4, 4)
    c2w[:, 0, 0] = c2w[:, 2, 2] = (0.02 * k).cos()
    c2w[:, 0, 2] = (0.02 * k).sin()
    c2w[:, 2, 0] = -c2w[:, 0, 2]
    c2w[:, 2, 3] = 0.05 * k
    start, names = torch.tensor([0, *lengths]).cumsum(0), [f"clip_{o}" for o in range(len(lengths))]
    return data.Views(images, c2w, torch.tensor([[18., 20., 12., 8.]]).expand(M, 4), start, names,
                      dict(CLIPS, dataset="clips", split=split, hw=(16, 24), root="",
                           procedural=False, fingerprint="0", listed={}))


def test_targets_of_a_clip_lie_in_its_window_and_are_scored_one_by_one_without_the_border():
    """Against frames and scores by hand; a clip that is too short repeats its frames."""
    views, cfg = made_up_clips("test", (30, 8, 1)), train.Config(size=16, device="cpu")
    source, five, ten, random = sample.test_views(views, 0, 7).tolist()
    assert (source, five, ten) == (15, 20, 25) and 3 <= random <= 27 and random != 15
    assert sample.test_views(views, 1).tolist()[:3] == [34, 37, 37]
    for pick in sample.test_views, sample.opposite_views, lambda *a: sample.told_views(*a, 3):
        assert set(pick(views, 2).tolist()) == {38}
    assert sample.opposite_views(views, 0).tolist() == [15, 3]       # of equal angles the first
    told = sample.told_views(views, 0, 9)                                     # (10,)
    assert told[0] == 15 and len(set(told.tolist())) == 10 and abs(told - 15).max() <= 12
    views.meta["listed"] = {"clip_1": (2, 6, 9, 0)}
    assert sample.test_views(views, 1).tolist() == [32, 36, 37, 30]
    teacher = Teacher(train.shape_of(train.Config(size=16, width=8, mult=(1, 2), code=0), CLIPS))
    predict = sample.predictor(teacher, None, views, cfg)
    r, = sample.evaluate(predict, views, cfg, 0, [0])
    x, cam, grey = sample.scene(views, sample.test_views(views, 0), cfg)
    each = sample.psnr(*(y[:, :, :, 1:15, 2:22] for y in (render(predict(0), cam, grey)[0], x)))
    want = dict(zip(("source", "5", "10", "random"), each[0]), one=each[0, 1:].mean())
    assert all(r[k] == pytest.approx(v.item(), rel=1e-5) for k, v in want.items())
    ten = lambda views, o: sample.test_views(views, o)[[0, 2]]                # given, so not scored
    r, = sample.evaluate(predict, views, cfg, 0, [0], given=ten)
    assert "10" not in r and r["one"] == pytest.approx((r["5"] + r["random"]) / 2, rel=1e-5)


def test_clips_train_in_three_stages_are_scored_and_sampled(monkeypatch, tmp_path, capsys):
    """Against the columns and rows promised, and shapes of pictures by hand."""
    monkeypatch.setitem(data.DATASETS, "clips", CLIPS)
    monkeypatch.setattr(data, "prepare", lambda *_, splits: {s: made_up_clips(s) for s in splits})
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--dataset=clips", "--told=3",
                                      "--w_cyc=0.1", f"--out={tmp_path}/a"])
    train.main()
    assert "16x24, 2 test objects, listed or middle frame in" in capsys.readouterr().out
    rows = table(tmp_path / "a")
    assert len(rows) == 6
    for name, r in rows.items():
        assert {"5", "10", "random", "one", "ssim", "source"} <= set(r)
        mean = pytest.approx((r["5"] + r["10"] + r["random"]) / 3, abs=1e-4)
        assert r["one"] == mean or "," in name                     # not of views that were given
    assert Image.open(tmp_path / "a/preview.png").size == (8 * 24 * (2 + 1 + 2), 8 * 16 * 2)
    monkeypatch.setattr(sys, "argv", ["controls.py", f"{tmp_path}/a"])
    controls.main()
    said = capsys.readouterr().out
    assert all(row in said for row in ("optimised on 1", "told by 1", "codes of others"))

    image, out = tmp_path / "wide.png", tmp_path / "sampled"
    PHOTO.crop((0, 0, 60, 20)).save(image)
    make(monkeypatch, tmp_path / "a/stage_2.pt", image, f"--out={out}")
    assert Image.open(out / "film.webp").size == (2 * 16, 10)        # fx : fy is 18 : 20
    assert Image.open(out / "sample.png").size == (4 * 16, 2 * 10)   # input, middle, right, left
    assert read_ply(out / "sample_0.ply")["x"].shape == (20 * 28,)
    shown = base64.b64decode(unpacked((out / "viewer.html").read_text())["picture"])
    assert Image.open(io.BytesIO(shown)).size == (16, 10)
    assert "look down" not in capsys.readouterr().out
    wide = np.asarray(Image.open(image))                                      # (20, 60, 3)
    for shape, columns in (1.5, slice(15, 45)), (2, slice(10, 50)), (2, slice(60)):
        if columns == slice(60):                                              # it is a frame
            data.clip_file(tmp_path).touch()
        meta = dict(K=(1.5, shape), background=(1, 1, 1))
        x = sample.prepare(image, ModelConfig(size=20, aspect=1.5), meta)
        assert (x == data.resize(wide[:, columns], (20, 30))).all()


# ---- the scripts ---------------------------------------------------------------------------------

CARS = dict(dataset="cars", background=(1., 1., 1.))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
SMALL = ("--size=16 --width=8 --mult=(1,2) --attn=8 --batch=(4,2,2) --views=2 --steps=3 "
         "--n_train=2 --n_test=1 --iters=(4,4,4) --eval_views=3 --samples=2 "
         "--preview_every=2 --save_every=1 --log_every=1 --device=cpu").split()


def script(name, *args, cwd=None, ok=True):
    """Run one of our scripts as a user does; returns what it printed."""
    run = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *map(str, args)],
                         cwd=cwd or HERE, capture_output=True, text=True,
                         env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert (run.returncode == 0) == ok and "Traceback" not in run.stderr, run.stdout + run.stderr
    return run.stdout + run.stderr if ok else run.stderr


def run_training(root, out, *more, ok=True):
    return script("train", *SMALL, f"--root={root}", f"--out={out}", *more, ok=ok)


@pytest.fixture(scope="session")
def trained(cars, tmp_path_factory):
    """A complete run of train.py: twelve steps, three stages, one table."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, run_training(cars, out)


def records(out):
    """The steps in log.jsonl."""
    return list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))


def table(out):
    return json.loads((out / "results.json").read_text())["table"]


def same_weights(*paths):
    """Whether two files hold the same weights, bit for bit."""
    a, b = (load_checkpoint(path)["state"] for path in paths)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_leaves_a_table_a_preview_and_the_word_procedural(trained):
    """Against the promises of the README: files, rows, and where the data came from."""
    out, said = trained
    record, rows = json.loads((out / "results.json").read_text()), table(out)
    students = ["stage 1", "stage 1, guided by 1", "stage 2", "stage 2, guided by 1"]
    assert list(rows) == ["teacher", "teacher, told 8 views", *students]
    for name, r in rows.items():
        path = out / f"scores/test_{name.replace(',', '').replace(' ', '_')}.jsonl"
        line, = map(json.loads, path.read_text().splitlines())
        assert line["object"] == "test_00000" and line["one"] == pytest.approx(r["one"], abs=1e-5)
        assert np.isfinite(r["one"]) and f"{r['one']:.4g}" in said, name
        assert {"ssim", "source", "minutes", "both", "decided", "amber"} <= set(r)
        assert ({"mean", "best", "std"} <= set(r)) == (name in students)
    for k in "stage 1", "stage 2":
        assert rows[k]["source"] != rows[f"{k}, guided by 1"]["source"]
    assert record["data"]["procedural"] is True and record["kind"] == "procedural"
    assert "procedural" in said and record["git"] and "decided" in said
    log = records(out)
    assert [(r["stage"], r["step"]) for r in log] == [(s, k) for s in range(3) for k in range(1, 5)]
    assert [{"one", "decided"} <= set(r) for r in log] == [False, True] * 6
    assert ["loss_told" in r for r in log] == [True] * 4 + [False] * 8
    assert np.asarray(Image.open(out / "preview.png")).std() > 10


def test_interrupted_training_goes_on_bitwise(trained, cars, tmp_path):
    """Against the uninterrupted run: stopped inside every stage, the same weights, log, scores."""
    out, _ = trained
    for most in (3, 3, 3, 0):
        run_training(cars, tmp_path, f"--max_steps={most}", ok=not most)
        if most and not (tmp_path / "teacher.pt").exists():
            state = torch.load(tmp_path / "resume.pt")
    run_training(cars, tmp_path / "last", "--ema=0", "--iters=(4,0,0)")       # the last weights
    one, last = [load_checkpoint(x / "teacher.pt")["state"] for x in (out, tmp_path / "last")]
    for k, x in state["ema"].items():                                         # after step 3 of 4
        if x.is_floating_point():
            torch.testing.assert_close(one[k].float(), x.lerp(last[k].float(), 1 - 4 / 13),
                                       rtol=2e-3, atol=1e-4)
    assert not same_weights(out / "teacher.pt", tmp_path / "last/teacher.pt")
    for name in ("teacher.pt", "stage_1.pt", "stage_2.pt"):
        assert same_weights(out / name, tmp_path / name), name
    for one, other in zip(records(out), records(tmp_path), strict=True):
        del one["steps_per_s"], other["steps_per_s"]
        assert one == other
    one, other = table(out), table(tmp_path)
    assert all(one[k]["one"] == other[k]["one"] for k in one)


def test_released_weights_are_the_papers_teacher_or_learn_to_be_told(cars, tmp_path):
    """Against the teacher's row: the paper's recipe keeps it, without stage 0. --init adds a code;
    at a rate of 0, told nothing, that is the same teacher but for half precision."""
    path, paper, ours = tmp_path / "model_cars.pth", tmp_path / "paper", tmp_path / "ours"
    given = f"--teacher={path}"
    torch.manual_seed(0)
    released(Teacher(data.replace(TINY, near=0.8, far=1.8)).unet, path)
    run_training(cars, paper, given, "--code=0", "--eval_only")
    alone = table(paper)
    said = run_training(cars, paper, given, "--code=0", "--width=16")
    assert "no warm start" in said and {r["stage"] for r in records(paper)} == {1, 2}
    assert "stage 2" in table(paper) and not any("told" in name for name in table(paper))
    assert list(alone) == ["teacher"] and alone["teacher"]["one"] == table(paper)["teacher"]["one"]
    new = load_checkpoint(paper / "teacher.pt")["state"]
    old = load_splatter_image(path).state_dict()
    assert all(torch.equal(p, new[k]) for k, p in old.items()) and len(new) == len(old)
    run_training(cars, ours, f"--init={path}", "--iters=(2,2,1)", "--lr=(0,1e-3,0)")
    assert same_weights(ours / "stage_1.pt", ours / "stage_2.pt")             # where it begins
    assert [r["stage"] for r in records(ours)] == [0, 0, 1, 1, 2]
    rows = table(ours)
    assert rows["teacher"]["one"] == pytest.approx(alone["teacher"]["one"], abs=0.01)
    assert rows["teacher, told 8 views"]["one"] != rows["teacher"]["one"]
    # it can be told now, so that another run needs no stage 0
    run_training(cars, tmp_path / "again", f"--teacher={ours}/teacher.pt", "--iters=(2,1,0)")
    assert [r["stage"] for r in records(tmp_path / "again")] == [1]
    for flag, said in ("--size=32", "a ModelConfig(size=16"), ("--code=8", "flags need"):
        assert said in run_training(cars, tmp_path / "x", given, flag, ok=False)


def test_a_folder_of_ones_own_is_trained_on_with_a_teacher_of_ours(trained, tmp_path):
    """Against: NeRF's transforms.json in, a table out; a teacher trained on is the same after a
    rate of 0, and another otherwise; one of another size or code is refused."""
    pictures = [picture_of_a_box(np.array([.2, 0, 0]), m, WIDE, 32) for m in LOOKS]
    for i in range(3):
        write_nerf(tmp_path / f"mugs/{i}", LOOKS, WIDE, pictures)
    out, given = tmp_path / "out", trained[0] / "teacher.pt"
    run = lambda *more, **ok: run_training(tmp_path / "data", out, f"--dataset={tmp_path}/mugs",
                                           f"--init={given}", *more, **ok)
    said = run("--iters=(1,2,1)", "--lr=(0,1e-3,1e-3)")
    assert "mugs (real)" in said and "1 test objects, view 0 in" in said and "stage 2 " in said
    assert "data: mugs in" in said and (tmp_path / "data/.cache").is_dir()
    assert same_weights(given, out / "teacher.pt")
    assert json.loads((out / "scores/test_stage_2.jsonl").read_text())["object"] == "2"
    assert "teacher, told 8 views" in table(out) and "decided" not in said
    run("--iters=(1,0,0)", f"--out={tmp_path}/other")
    assert not same_weights(given, tmp_path / "other/teacher.pt")
    for flag, said in ("--size=32", "size=16"), ("--code=4", "code=8"):
        assert said in run(flag, f"--out={tmp_path}/none", ok=False)


def test_two_processes_train_like_one_and_one_goes_on(trained, cars, tmp_path):
    """Against one process but for rounding; stopped in stage 1, one alone goes on to the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               HERE / "train.py", *SMALL, f"--root={cars}", f"--out={tmp_path}", "--max_steps=6"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300,
                         env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert run.stdout.count("device: 2 x CPU") == 1, run.stdout + run.stderr
    assert "stopped and saved" in run.stderr and (tmp_path / "resume.pt").exists()
    run_training(cars, tmp_path)
    for one, both in zip(records(trained[0]), records(tmp_path), strict=True):
        assert (one["stage"], one["step"]) == (both["stage"], both["step"])
        if (one["stage"], one["step"]) <= (1, 1):   # later, Adam has followed signs of tiny
            for k in ("loss", "grad_norm"):         # gradients, which rounding turns
                assert both[k] == pytest.approx(one[k], rel=1e-2), (k, one, both)


def test_a_killed_writer_and_a_full_disk_never_leave_half_a_checkpoint(tmp_path):
    """Against ten SIGKILLs of a process that only saves; then a limit on the size of files."""
    path, tensor = tmp_path / "resume.pt", torch.arange(200_000)
    save = lambda: write_atomically(path, lambda f: torch.save(dict(x=tensor), f))
    save()
    for seconds in np.random.default_rng(0).uniform(0.001, 0.05, 10):
        child = os.fork()
        if child == 0:
            while True:
                save()
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert torch.equal(load_checkpoint(path)["x"], tensor)
    code = (f"import model, torch; path = model.Path('{path}')\n"
            "model.write_atomically(path, lambda f: torch.save(torch.ones(10**6), f))")
    full = with_files_of_at_most(100, [sys.executable, "-c", code])
    assert full.stderr == (f"error: cannot write {path}: File too large; what was there before is "
                           "untouched\n")
    assert [*tmp_path.iterdir()] == [path]
    assert torch.equal(load_checkpoint(path)["x"], tensor)


def read_ply(path):
    """An independent reader of the standard layout -> {property: column}."""
    header, body = path.read_bytes().split(b"end_header\n", 1)
    names = [line.split()[-1].decode() for line in header.splitlines() if line[:4] == b"prop"]
    return dict(zip(names, np.frombuffer(body, "<f4").reshape(-1, len(names)).T))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A file of weights that cost nothing: an untrained denoiser, its teacher beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    meta = dict(dataset="cars", data=dict(procedural=True), K=[16.40625, 16.40625, 8., 8.],
                background=[1., 1., 1.], steps=3)                            # K: of procedural cars
    teacher = Teacher(TOLD)
    save_network(folder / "teacher.pt", teacher, meta)
    save_network(folder / "stage_2.pt", Denoiser(TOLD), dict(meta, teacher=fingerprint(teacher)))
    return folder / "stage_2.pt"


def make(monkeypatch, tiny, *args):
    """sample.py in this process, small."""
    flags = ["--weights", tiny, "--samples=2", "--steps=3", "--device=cpu"]
    monkeypatch.setattr(sample, "FRAMES", 4)
    monkeypatch.setattr(sample, "SIDE", 16)
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*flags, *args])])
    sample.main()


def test_the_weights_that_come_with_the_code_draw_what_they_did_and_what_they_are_told(cars):
    """Against the PSNR of held-out car 0 when they were committed: view 64 in, ten views out; of
    8 samples one shows an amber hidden door and another a blue one, no mud. Told the amber door or
    its twin's blue one, the teacher draws that one; told nothing, mud."""
    views = data.load(cars, "cars", "test", 128)
    cfg = train.Config(size=128, device="cpu", steps=10)
    teacher, _ = load_network(HERE / "weights/teacher.pt", Teacher)
    for name, kind, psnr in ("cars", Denoiser, 28.95), ("teacher", Teacher, 29.14):
        path = HERE / f"weights/{name}.pt"
        network, meta = load_network(path, kind)
        student = network if name == "cars" else None
        predict = sample.predictor(teacher, student, views, cfg, n=8)
        r, = sample.evaluate(predict, views, cfg, 10, [0])
        assert abs(r["one"] - psnr) < 0.1 and r["both"] == bool(student)
        assert path.stat().st_size < 16 * 2 ** 20
        assert meta["data"]["procedural"] and "python train.py" in meta["command"]
    v, amber, blue = toys.cars.hidden_pair(views, 0, data.resize)
    x, cam = data.gather(views, torch.tensor([[64, v]] * 2))                  # (2, 2, 3, 128, 128)
    x[:, 1] = torch.stack([amber, blue])
    door = cam.views([1])
    with torch.no_grad():
        raw = [teacher(y, cam, torch.ones(3)) for y in (x, x[:, :1])]         # (2, 24, 128, 128)
        told, nothing = (render(teacher.gaussians(r, cam.K[:, 0]), door, torch.ones(3))[0][:, 0]
                         for r in raw)                                        # (2, 3, 128, 128)
    one = toys.cars.door_scores(told, amber, amber, blue)
    assert one["both"] == 1 and one["decided"] == 1 and one["amber"] == 0.5
    assert toys.cars.door_scores(told[:1], amber, amber, blue)["true"] == 1   # not the twin's
    assert toys.cars.door_scores(nothing, amber, amber, blue)["decided"] == 0


def test_the_sides_that_differ_and_the_elevation_are_told(tmp_path):
    """Against the side that the picture hides, and the elevation of its camera, 25 degrees."""
    said = script("sample", HERE / "assets/car.png", cwd=tmp_path)
    assert 90 < int(re.search(r"differ most from (\d+) degrees", said)[1]) < 270
    assert 20 < int(re.search(r"car.png: taken to look down by (\d+) degrees", said)[1]) < 34


def test_sampling_writes_splats_and_repeats_itself(trained, cars, tmp_path, capsys, monkeypatch):
    """Against the same seed, another, other steps; the page's last state is that of the .ply."""
    out, image = trained[0], HERE / "assets/car.png"
    flags = dict(a=["--steps=0"], b=["--steps=3"], c=["--seed=1"], d=["--steps=1"])
    for name, more in flags.items():
        make(monkeypatch, out / "stage_2.pt", image, f"--out={tmp_path}/{name}", *more)
    assert "the 2 samples differ most from" in capsys.readouterr().out
    a, b, c, d = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in flags]
    assert sorted(a) == ["film.webp", "sample.png", "sample_0.ply", "sample_1.ply", "viewer.html"]
    assert a == b and all(a["sample_0.ply"] != x["sample_0.ply"] for x in (c, d))
    assert np.asarray(Image.open(tmp_path / "a" / "sample.png")).std() > 1
    assert Image.open(tmp_path / "a" / "film.webp").n_frames == 8             # noise, then a turn
    scene = unpacked(a["viewer.html"].decode())
    assert scene["title"] == "car.png" and set(scene["look"]) == set(LOOK)
    states = {o["name"]: o["states"] for o in scene["objects"]}
    assert states == {"sample 0": 4, "sample 1": 4, "teacher": 1}
    o, y = scene["objects"][1], read_ply(tmp_path / "a/sample_1.ply")["y"]
    mine = o["low"][1] + o["q"][-1, 1] / 65535 * (o["high"][1] - o["low"][1])
    np.testing.assert_allclose(mine, y, atol=1e-4)
    assert "steps=3" in run_training(cars, out, "--steps=1", ok=False)


def test_guidance_is_the_error_against_the_views_after_the_first():
    """Against the mean square by hand, of splats and pictures of nothing in particular."""
    (x, cam, white), s = scene_batch(1), random_splats()                      # s (2, 24, 16, 16)
    gaussians = lambda s: splats_to_gaussians(s, cam.K[:, 0].expand(len(s), 4), TINY)
    x_hat = [render(gaussians(one), cam, white)[0] for one in s.split(1)]     # (1, 3, 3, 16, 16)
    want = torch.stack([(y - x)[:, 1:].square().mean() for y in x_hat])       # (2,)
    torch.testing.assert_close(sample.guidance(gaussians, x, cam, white)(s), want)


def test_an_object_and_a_folder_of_your_own_give_the_same_files(tiny, cars, tmp_path, monkeypatch):
    """Against each other to the byte, but for the page's title; and against no guidance."""
    folder, own = cars / "cars/cars_test/test_00000", tmp_path / "own"
    own.mkdir()
    frames = []
    for k in (64, 104, 20):
        Image.open(folder / f"rgb/{k:06d}.png").convert("RGB").save(own / f"{k}.png")
        c2w = np.loadtxt(folder / f"pose/{k:06d}.txt").reshape(4, 4) * [1, -1, -1, 1]
        frames.append(dict(file_path=f"{k}.png", transform_matrix=c2w.tolist()))
    f, w = (float((folder / "intrinsics.txt").read_text().split()[i]) for i in (0, -1))
    (own / "transforms.json").write_text(json.dumps(dict(frames=frames, fl_x=f, w=w, h=w)))
    make(monkeypatch, tiny, folder, "--views=64,104,20", f"--out={tmp_path}/a")
    own.with_suffix(".txt").touch()                                # a note beside it is no clip
    make(monkeypatch, tiny, own, "--views=0,1,2", f"--out={tmp_path}/b")
    make(monkeypatch, tiny, folder, f"--out={tmp_path}/c")
    for path in (tmp_path / "a").iterdir():
        same = path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert same or path.name == "viewer.html", path.name
    assert (tmp_path / "a/sample_0.ply").read_bytes() != (tmp_path / "c/sample_0.ply").read_bytes()
    (own / "transforms.json").write_text(json.dumps(dict(frames=frames, fl_x=1.1 * f, w=w, h=w)))
    assert "1.10 times that of training" in refused(make, monkeypatch, tiny, own, "--views=0,1,2")
    meta = dict(dataset="hydrants", K=[16, 16, 8, 8, 5], background=(0, 0, 0))   # of another unit
    assert "its cameras" in refused(sample.read_views, TINY, meta, SimpleNamespace(image=own))
    make(monkeypatch, tiny, folder / "rgb/000064.png", f"--out={tmp_path}/d")
    monkeypatch.chdir(folder / "rgb")                              # still a picture of a dataset
    make(monkeypatch, tiny, "000064.png", f"--out={tmp_path}/e")
    assert (tmp_path / "d/film.webp").read_bytes() == (tmp_path / "e/film.webp").read_bytes()


def test_a_clip_is_sampled_from_its_middle_frame(clips):
    """Against the packed frame 30 of 61."""
    meta = dict(dataset="rooms", window=30, K=[1] * 4, background=(.5, .5, .5))
    a = SimpleNamespace(image=clips / "test/test_00000", views=None, device="cpu")
    x, _, _ = sample.read_views(ModelConfig(size=16, aspect=1.5), meta, a)
    views = data.load(clips.parent, "rooms", "test", 16)
    assert torch.equal(x[0, 0], views.images[30] / 255)


def test_every_training_view_passes_unchanged(cars, capsys):
    """Against the reader of training images, bit for bit: the ranges in sample.py are of these."""
    files = sorted(cars.glob("cars/*/*/rgb/*.png"))
    for path in files:
        as_trained = data.resize(np.asarray(Image.open(path).convert("RGB")), (32, 32))
        assert (sample.prepare(path, ModelConfig(size=32), CARS) == as_trained).all(), path
    assert len(files) == 351 and not capsys.readouterr().out


@pytest.mark.parametrize("ground, turned, spoilt", [
    ((255, 255, 255), 1, ""), ((120, 160, 120), 6, "speck"), ((250, 247, 244), 8, ""),
    (None, 6, "speck"), ((120, 160, 120), 1, "margin")])
def test_a_subject_is_framed_as_in_training(ground, turned, spoilt, tmp_path, capsys):
    """Against the framing's target, and against the same subject cut out by hand."""
    yy, xx = np.mgrid[:240, :400] / 2
    rgba = np.zeros((240, 400, 4), np.uint8)
    if ground:
        grain = np.random.default_rng(0).normal(0, 3 * (ground != (255,) * 3), (240, 400, 3))
        rgba[..., :3] = (np.array(ground) + grain).clip(0, 255)
        rgba[..., 3] = 255
    rgba[((xx - 150) / 40) ** 2 + ((yy - 30) / 20) ** 2 < 1] = [180, 30, 40, 255]     # an ellipse
    if spoilt == "margin":
        rgba[(xx < 1) | (yy > 117), 3] = 0
    if spoilt == "speck":
        rgba[-1, 0] = 0, 0, 255, 255
    exif = Image.Exif()
    exif[0x0112] = turned                                                     # as a camera held so
    image = Image.fromarray(rgba).rotate({1: 0, 6: 90, 8: 270}[turned], expand=True)
    image.save(tmp_path / "x.png", exif=exif)
    pixels = sample.prepare(tmp_path / "x.png", ModelConfig(size=64), CARS)
    y, x = np.nonzero((pixels < 200).any(-1))
    low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()]) + 1
    box = np.array([*(high - low), *(low + high) / 2]) / 64
    assert abs(box - [sample.SHARE, sample.SHARE / 2, *sample.MIDDLE]).max() < 0.03
    assert not capsys.readouterr().out
    assert (pixels[:10] == 255).all() and abs(pixels[34, 32] - [180., 30, 40]).max() < 12
    other = sample.prepare(tmp_path / "x.png", ModelConfig(size=64), dict(CARS, dataset="mugs"))
    assert np.ptp(np.nonzero((other < 200).any(-1))[1]) < 0.45 * 64           # as it was


def test_a_ply_holds_the_same_gaussians(tmp_path):
    """Against an independent reader: 62 properties, raw scales and opacities, SH by channel."""
    g, _ = benchmark_scene(1, 1, 50, 16)
    (tmp_path / "g.ply").write_bytes(sample.ply_bytes(g))
    p = read_ply(tmp_path / "g.ply")
    column = lambda *names: torch.from_numpy(np.stack([p[n] for n in names], -1))
    assert len(p) == 62 and len(p["x"]) == 50
    assert torch.equal(column("x", "y", "z"), g.xyz[0])
    assert torch.allclose(column("scale_0", "scale_1", "scale_2").exp(), g.scale[0])
    assert torch.allclose(column("opacity").sigmoid()[:, 0], g.opacity[0], atol=1e-6)
    assert torch.equal(column("rot_0", "rot_1", "rot_2", "rot_3"), g.quat[0])
    assert torch.equal(column("f_dc_0", "f_dc_1", "f_dc_2"), g.sh[0, :, 0])
    rest = column(*[f"f_rest_{k}" for k in range(45)]).view(50, 3, 15)
    assert torch.equal(rest[..., :3].mT, g.sh[0, :, 1:]) and not rest[..., 3:].any()


def test_the_turntable_starts_at_the_picture_and_stays_level():
    """Against the source camera at angle 0, a constant distance and a constant height."""
    look = dict(distance=1.3, elevation=25., focal=1.)
    g, _ = benchmark_scene(1, 1, 9, 16)
    w2c = torch.cat([sample.orbit(45 * k, look) for k in range(8)], 1)     # (1, 8, 4, 4)
    centre = invert_pose(w2c)[0, :, :3, 3]                                    # (8, 3), y is down
    there = transform(sample.upright(g, look, 16), w2c[:, 0])                 # the source's axes
    assert torch.allclose(there.xyz, g.xyz, atol=1e-6)
    assert torch.allclose(there.sh, g.sh, atol=1e-6)
    assert torch.allclose(there.scale ** 2 - g.scale ** 2, torch.tensor(LOW_PASS * (1.3 / 16) ** 2))
    assert torch.allclose(centre.norm(dim=-1), torch.tensor(1.3))
    assert torch.allclose(centre[:, 1], torch.tensor(-1.3 * math.sin(math.radians(25))))


@pytest.mark.parametrize("elevation", [5, 20, 35, 55])
def test_the_elevation_is_told_by_what_is_level(elevation):
    """Against two boxes on each other, a cabin on a body, seen from a known elevation."""
    rng, n = np.random.default_rng(0), np.arange(4000)
    sides = rng.uniform(-1, 1, (2, 4000, 3))
    sides[:, n, rng.integers(0, 3, 4000)] = rng.choice([-1, 1], 4000)
    xyz = np.concatenate([sides[0] * [.45, .08, .2], sides[1] * [.2, .07, .18] - [0, .15, 0]])
    xyz = torch.from_numpy(xyz + rng.normal(0, .004, xyz.shape)).float()[None]      # (1, 8000, 3)
    w2c = sample.orbit(math.degrees(0.6), dict(elevation=elevation, distance=1.3))[:, 0]
    g = Gaussians(xyz, xyz, torch.ones(1, 8000, 4), torch.ones(1, 8000), torch.zeros(1, 8000, 1, 3))
    assert abs(sample.estimate_elevation(transform(g, w2c), 1.3) - elevation) <= 2


def test_a_picture_has_its_folder_and_no_input_is_written_over(tiny, tmp_path, monkeypatch, capsys):
    """Against files and bytes; a name that cannot be written costs one line; a photograph without a
    plain ground is taken with a warning."""
    monkeypatch.chdir(tmp_path)
    PHOTO.save("photo.jpg")
    make(monkeypatch, tiny, "photo.jpg")
    assert [p.name for p in Path("out").iterdir()] == ["photo"]
    assert "background has more than one colour" in capsys.readouterr().out
    assert "photo.jpg/out" in refused(make, monkeypatch, tiny, "photo.jpg", "--out=photo.jpg/out")
    shutil.copy("photo.jpg", "sample.png")
    assert "an input" in refused(make, monkeypatch, tiny, "sample.png", "--out=.")
    assert Path("sample.png").read_bytes() == Path("photo.jpg").read_bytes()
    write_nerf(Path("out/bear"), LOOKS, WIDE, GREY)
    assert "an input" in refused(make, monkeypatch, tiny, "out/bear")         # it lies in its out


def test_ctrl_c_is_one_line(tmp_path):
    """Against a traceback."""
    run = subprocess.Popen([sys.executable, "-u", HERE / "sample.py", HERE / "assets/car.png"],
                           cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           # what runs in the background ignores it
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert run.stdout.readline().startswith("weights")
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and said.splitlines()[-1].startswith("error: stopped")
    assert "Traceback" not in said


def test_hostile_files_cost_one_line_each_and_no_good_one(tiny, tmp_path, monkeypatch):
    """Against tracebacks, silence, and good files left out: those called ok can be sampled."""
    folder = tmp_path / "in"
    folder.mkdir()
    PHOTO.save(folder / "ok_odd_exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    PHOTO.save(folder / "ok_animated.gif", save_all=True, append_images=[PHOTO, PHOTO])
    PHOTO.save(folder / "ok_Grüße 'x' <b>.png")
    PHOTO.convert("CMYK").save(folder / "ok_cmyk.jpg")
    PHOTO.convert("1").save(folder / "ok_bit.png")
    Image.new("RGBA", (30, 30)).save(folder / "clear.png")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    whole = (folder / "ok_Grüße 'x' <b>.png").read_bytes()
    for k in range(4):
        (folder / f"short_{k}.png").write_bytes(whole[:k * len(whole) // 4])
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")                                            # would never end
    for path in folder.iterdir():
        args = monkeypatch, tiny, path, f"--out={tmp_path}/{path.name}", "--steps=1"
        if path.name.startswith("ok"):
            make(*args)
        else:
            assert path.name in refused(make, *args)


def test_bad_input_of_sample_is_one_clear_line(tiny, cars, tmp_path, monkeypatch):
    """Against tracebacks: each names the file or the flag, and nothing is written."""
    folder, other, odd = [cars / "cars/cars_test/test_00000", tmp_path / "other", tmp_path / "odd"]
    picture, good = folder / "rgb/000064.png", tmp_path / "good.txt"
    np.savetxt(good, np.eye(4))
    odd.mkdir()
    shutil.copy(folder / "intrinsics.txt", odd)
    other.mkdir()
    shutil.copy(tiny, other)
    save_network(other / "teacher.pt", Teacher(TOLD), {})
    cases = [
        ([picture, "--samples=0"], "--samples"), ([picture, "--views=64,1"], "--views"),
        ([folder, "--views=64,251"], "0 to 250"), ([folder, "--views=a"], "--views"),
        ([picture, "--weights", odd / "x.pt"], "x.pt"), ([picture, "--weights", good], "good.txt"),
        ([picture, "--weights", tiny.with_name("teacher.pt")], "teacher.pt"),
        ([picture, "--weights", other / "stage_2.pt"], "another teacher"), ([odd], "odd"),
        ([odd / "gone.png"], "gone.png"), ([odd / "typo", "--views=1"], "no such")]
    for args, word in cases:
        assert word in refused(make, monkeypatch, tiny, *args, f"--out={tmp_path}/out"), args
        assert not (tmp_path / "out").exists(), args


def test_bad_input_of_training_is_one_clear_line(trained, cars, tmp_path, monkeypatch):
    """Against tracebacks: each says what is wrong with what, exits with 1, and spoils nothing."""
    out, _ = trained
    (tmp_path / "file").write_text("")
    before = (out / "resume.pt").read_bytes()
    flags = [*SMALL, f"--root={cars}"]
    cases = [(["--dataset=planes"], "planes"), (["--device=warp"], "--device=warp"),
             (["--batch=(3,8,4)"], "--batch"), (["--iters=(0,5,0)"], "--teacher"),
             ([*flags, f"--out={out}", "--seed=1"], "seed=0"),
             ([*flags, f"--out={tmp_path}/none", "--eval_only"], "teacher.pt")]
    run_training(cars, tmp_path, "--max_steps=2", ok=False)
    state = torch.load(tmp_path / "resume.pt")                      # of another kind of run:
    for k, change in enumerate([dict(network=None), dict(network=dict(a=torch.ones(1))),
                                dict(about=torch.ones(2)), dict(optimiser={})]):
        (tmp_path / f"{k}").mkdir()
        torch.save(state | change, tmp_path / f"{k}/resume.pt")
        cases.append(([*flags, f"--out={tmp_path}/{k}"], f"{k}/resume.pt: not "))
    for args, word in cases:
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        assert word in refused(train.main), args
    assert "file/out" in run_training(cars, tmp_path / "file/out", ok=False).splitlines()[-1]
    assert (out / "resume.pt").read_bytes() == before


# ---- assets/viewer.html --------------------------------------------------------------------------

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
LOOK = dict(distance=1.3, elevation=20., focal=1.0, background=[1., 1., 0.9], near=NEAR,
            differ=150., aspect=1.)


def browse(page, address, *flags):
    """The page at this address, in a browser without a window -> what that prints."""
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--use-angle=swiftshader", "--hide-scrollbars",
         "--enable-unsafe-swiftshader", "--window-size=900,800", "--virtual-time-budget=3000",
         *flags, f"{page.as_uri()}#{address}"],
        check=True, capture_output=True, text=True, timeout=60).stdout


def upright_scene(N, seed=0):
    """Gaussians off screen, near, large, thin, opaque, too faint, of negative colour."""
    g, _ = benchmark_scene(1, 1, N, 64)
    rng = torch.Generator().manual_seed(seed)
    sh = g.sh + 0.5 * torch.randn(g.sh.shape, generator=rng)                  # (1, N, 4, 3)
    xyz, scale, opacity = g.xyz.clone(), g.scale.clone(), g.opacity.clone()
    xyz[0, :4] = torch.tensor([[1.1, 0, 0], [0, 0.9, 0], [0, 0.3, -1.15], [0.8, 0, -0.7]])
    scale[0, :8] = torch.tensor([[0.2, 0.2, 0.2], [0.3, 0.002, 0.002]]).repeat(4, 1)
    opacity[0, 8:12], opacity[0, 12:16] = 0.999, 0.003
    sh[0, 16:20, 0] -= 3
    return g._replace(xyz=xyz, scale=scale, opacity=opacity, sh=sh)


def psnr_of_page(page, g, azimuth, elevation=10, zoom=1, **more):
    """Of the page against render of these Gaussians, by the camera of the turntable."""
    address = urlencode(dict(azimuth=azimuth, elevation=elevation, zoom=zoom, turn=0) | more)
    frame = page.with_name("frame.html")     # of known size: a window has borders in some browsers
    frame.write_text(f"<iframe src='{page.name}#{address}' style='position: fixed; inset: 0; "
                     "width: 800px; height: 500px; border: 0'></iframe>")
    browse(frame, "", f"--screenshot={page.parent}/shot.png")
    seen = np.asarray(Image.open(page.parent / "shot.png").convert("RGB"))[52:500, :528] / 255
    h, w, _ = seen.shape                                                      # of the canvas
    w2c = sample.orbit(azimuth, dict(LOOK, elevation=elevation))
    f = LOOK["focal"] * zoom * min(h, w)
    cam = Camera(w2c, torch.tensor([[[f, f, w / 2, h / 2]]]), (h, w))
    x_hat, _, _ = render(g, cam, torch.tensor([LOOK["background"]]))
    x_hat = x_hat[0, 0].clamp(0, 1).permute(1, 2, 0).numpy()                  # (h, w, 3)
    assert x_hat.std() > 0.05
    return -10 * np.log10(((seen - x_hat) ** 2).mean())


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
def test_the_viewer_draws_what_render_draws_and_its_tilt_is_another_elevation(tmp_path):
    """Against render by the camera of the turntable, also of the state that the address names; then
    against the splats that sample.upright makes with another elevation: their render and .ply."""
    page = tmp_path / "viewer.html"
    g, teacher = upright_scene(1500), upright_scene(900, seed=1)
    states = [g._replace(xyz=g.xyz * k) for k in (0.5, 0.75, 1.0)]
    red = sample.encoded([np.full((40, 40, 3), [255, 0, 0], np.uint8)], "PNG")
    objects = dict(sample=states, teacher=[teacher])
    page.write_text(sample.viewer_html("red.png", red, objects, LOOK), encoding="utf-8")
    for view in (0, 20, 1), (75, -15, 1.5), (200, 89, 0.7):
        assert psnr_of_page(page, teacher, *view, object="teacher") > 40, view
    for step, at_least in enumerate((22, 22, 40)):
        assert psnr_of_page(page, states[step], -50, object="sample", step=step) > at_least, step
    tilted = invert_pose(sample.orbit(0, dict(LOOK, elevation=50)))           # (1, 1, 4, 4)
    g = transform(teacher, (tilted @ sample.orbit(0, LOOK))[0])
    assert psnr_of_page(page, g, 110, object="teacher", down=50) > 40
    saving, wanted = page.with_name("saving.html"), page.with_name("wanted.ply")
    saving.write_text(page.read_text() + """<script>setTimeout(() => {
        window.Blob = Array;   // its bytes come from another process, which has no virtual time
        const [[header, rows]] = ply(splats(objects[1], 0), objects[1].n);
        const bytes = [...new TextEncoder().encode(header), ...new Uint8Array(rows.buffer)];
        document.body.textContent = `[${bytes}]`;
    }, 1000)</script>""")
    said = browse(saving, "turn=0&object=teacher&down=50", "--dump-dom")
    saving.write_bytes(bytes(json.loads(re.search(r"\[[\d,]+\]", said)[0])))
    wanted.write_bytes(sample.ply_bytes(pick(g, g.opacity[0] >= rasterize.ALPHA_MIN)))
    p, q = read_ply(saving), read_ply(wanted)
    for name in "x", "y", "z", "scale_0", "opacity", *(f"f_rest_{k}" for k in range(45)):
        np.testing.assert_allclose(p[name], q[name], rtol=0, atol=1e-3)


def unpacked(html):
    """What the page reads, by an independent reader -> scene, with q (states, 23, n) per object."""
    text = html.split('<script id="scene" type="application/json">')[1].split("</script>")[0]
    scene = json.loads(text)
    for o in scene["objects"]:
        planes = np.frombuffer(zlib.decompress(base64.b64decode(o["data"])), np.uint8).astype(int)
        low, *high = planes.reshape(23, o["n"], -1).transpose(2, 0, 1)        # (23, n) each
        o["q"] = 256 * np.stack(high) + 128                                   # (states, 23, n)
        o["q"][-1] += low - 128
        assert len(high) == o["states"]
    return scene


def test_the_viewer_holds_every_step_to_its_precision():
    """Against the Gaussians: half of 1/65535 of each range in the last state, half of 1/256 in the
    others. Those that no state draws are gone; a wild splat does not stretch the ranges."""
    g = upright_scene(3000)
    g.scale[0, 21] = 0
    g.xyz[0, 30] = torch.tensor([1e6, 0, 0])
    g.sh[0, 31] = -1e9
    g.xyz[0, 40:50, 2] = 20                                                   # a window far away
    states = [g._replace(opacity=g.opacity * k) for k in (0.1, 1.0)]
    objects = dict(a=states, b=[g._replace(opacity=0 * g.opacity)])
    scene = unpacked(sample.viewer_html('a "title" <!--<script>\u2028', b"", objects, LOOK))
    a, b = scene["objects"]
    assert scene["title"] == 'a "title" <!--<script>\u2028' and scene["picture"] == ""
    assert scene["look"] == LOOK and b["n"] == 1
    keep = g.opacity[0] >= rasterize.ALPHA_MIN
    assert a["n"] == keep.sum() == 2996
    low, high = np.array(a["low"])[:, None], np.array(a["high"])[:, None]     # (23, 1)
    assert (high - low).max() < 30 and high[2] > 19.99
    for state, q, levels in zip(states, a["q"], (256, 65535)):
        k = pick(state, keep)
        x = torch.cat([k.xyz[0], k.opacity[0, :, None], k.quat[0], k.scale[0].clamp(min=1e-9).log(),
                       k.sh[0].flatten(1)], 1).mT.double().numpy()            # (23, n)
        error = np.abs(low + q / 65535 * (high - low) - x.clip(low, high))
        assert (error <= (0.51 / levels) * (high - low) + 1e-6).all()


# ---- README --------------------------------------------------------------------------------------

def test_every_command_in_the_readme_parses():
    """Against the parsers of the scripts: no flag there is out of date."""
    text = (HERE / "README.md").read_text()
    calls = lambda name: re.findall(rf"python {name}\.py([^`#&\n]*)", text)
    for call in calls("train"):
        if "--help" not in call:
            train.parse(shlex.split(call))
    known = sample.arguments().format_help()
    flags = re.findall(r"--\w+", " ".join(calls("sample")))
    assert len(calls("train")) > 5 and flags and all(flag in known for flag in flags)


if __name__ == "__main__":
    raise SystemExit(pytest.main(["-q", __file__, *sys.argv[1:]]))
