"""Gaussians + cameras -> images.

The one door is `render(g, cam, background) -> rgb, alpha, depth`: differentiable, batched over
B objects x V views, each object with Gaussians of its own. `render_reference` below is the
*definition* of the image, in plain PyTorch and slow: every Gaussian is evaluated at every pixel.
The kernels in csrc/ draw the same image, several hundred times faster; they are compiled on first
use, and where that fails the reference draws. `python csrc/bench.py` times both.
No networks, losses or files in here.

Conventions, stated once for the whole repository:
    camera      OpenCV: x right, y down, z forward; pixel i is sampled at i + 0.5
    world       the source camera's frame: the source view's w2c is the identity
    quaternion  w, x, y, z; need not be normalised
    covariance  Sigma = R S S R^T in 3D, J W Sigma W^T J^T + 0.3 I in pixels (the low-pass)
    blending    front to back by depth, ties by index; alpha <= 0.99, nothing below 1/255,
                stop before the Gaussian that would leave less than 1e-4 of the light
    SH          degree 0 or 1: colour = max(0, 1/2 + C0 k0 + C1 (-y k1 + z k2 - x k3))
Letters: B objects, V views, N Gaussians, H W pixels, P = pixels in one chunk, I = B V images.
"""
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

C0, C1 = 0.28209479177387814, 0.4886025119029199   # real spherical harmonics, degrees 0 and 1
LOW_PASS = 0.3         # px^2 added to the 2D covariance: no Gaussian is thinner than a pixel
ALPHA_MAX = 0.99       # keeps 1 - alpha away from 0, so the blend stays invertible
ALPHA_MIN = 1 / 255    # below one grey level a Gaussian is skipped
T_STOP = 1e-4          # transmittance below which a pixel is finished
NEAR = 0.2             # world units; a Gaussian must lie beyond it


class Gaussians(NamedTuple):
    """N activated 3D Gaussians per object, in world units."""
    xyz: Tensor        # (B, N, 3) centres
    scale: Tensor      # (B, N, 3) standard deviations along the Gaussian's own axes, > 0
    quat: Tensor       # (B, N, 4) w x y z: own axes -> world
    opacity: Tensor    # (B, N) in (0, 1)
    sh: Tensor         # (B, N, 1 or 4, 3) SH coefficients k0..k3 by rgb

    def to(self, *args):
        return Gaussians(*[x.to(*args) for x in self])


class Camera(NamedTuple):
    """V pinhole cameras per object."""
    w2c: Tensor        # (B, V, 4, 4) world to camera, rigid, acting on column vectors
    K: Tensor          # (B, V, 4) fx, fy, cx, cy in pixels; `render` ignores further columns
    hw: tuple          # (H, W) pixels

    def to(self, *args):
        return Camera(self.w2c.to(*args), self.K.to(*args), self.hw)


# ---- rigid motion --------------------------------------------------------------------------------

def invert_pose(m):
    """(..., 4, 4) rigid -> its inverse [R^T | -R^T t]: exact, and no host sync as in linalg.inv."""
    R_t = m[..., :3, :3].mT                                                   # (..., 3, 3)
    t = -(R_t @ m[..., :3, 3:])                                               # (..., 3, 1)
    return torch.cat([torch.cat([R_t, t], -1), m[..., 3:, :]], -2)            # (..., 4, 4)


def quat_to_matrix(q):
    """(..., 4) quaternion w x y z, any length > 0 -> (..., 3, 3) rotation."""
    w, x, y, z = F.normalize(q, dim=-1).unbind(-1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
                       -1).unflatten(-1, (3, 3))


def matrix_to_quat(R):
    """(..., 3, 3) rotation -> (..., 4) unit quaternion with w >= 0.

    The matrix of all products q_i q_j is linear in R, up to the sign of q; its largest diagonal
    entry names the row that is safe to divide by.
    """
    m = R.flatten(-2).unbind(-1)                                              # row-major 3x3
    qq = torch.stack([1 + m[0] + m[4] + m[8], m[7] - m[5], m[2] - m[6], m[3] - m[1],
                      m[7] - m[5], 1 + m[0] - m[4] - m[8], m[1] + m[3], m[2] + m[6],
                      m[2] - m[6], m[1] + m[3], 1 - m[0] + m[4] - m[8], m[5] + m[7],
                      m[3] - m[1], m[2] + m[6], m[5] + m[7], 1 - m[0] - m[4] + m[8]],
                     -1).unflatten(-1, (4, 4))                                # (..., 4, 4) 4 q q^T
    row = qq.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]           # (..., 1, 1)
    q = F.normalize(qq.take_along_dim(row, -2).squeeze(-2), dim=-1)           # (..., 4)
    return torch.where(q[..., :1] < 0, -q, q)


def quat_multiply(a, b):
    """Hamilton product of (..., 4) quaternions: the rotation b followed by a."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack([aw * bw - ax * bx - ay * by - az * bz,
                        aw * bx + ax * bw + ay * bz - az * by,
                        aw * by - ax * bz + ay * bw + az * bx,
                        aw * bz + ax * by - ay * bx + az * bw], -1)


def transform(g, pose):
    """Move Gaussians by a rigid pose (B, 4, 4): centres, axes and colour by direction alike."""
    R = pose[:, None, :3, :3]                                                 # (B, 1, 3, 3)
    xyz = (R @ g.xyz[..., None])[..., 0] + pose[:, None, :3, 3]               # (B, N, 3)
    quat = quat_multiply(matrix_to_quat(R), g.quat)                           # (B, N, 4)
    sh = g.sh
    if sh.shape[2] == 4:   # degree 1 is a vector v . dir with v = (-k3, -k1, k2): it turns with R
        k1, k2, k3 = sh[:, :, 1:].unbind(2)                                   # (B, N, 3) per rgb
        v = R @ torch.stack([-k3, -k1, k2], 2)                                # (B, N, 3 xyz, 3 rgb)
        sh = torch.stack([sh[:, :, 0], -v[:, :, 1], v[:, :, 2], -v[:, :, 0]], 2)
    return Gaussians(xyz, g.scale, quat, g.opacity, sh)


# ---- the definition of the image -----------------------------------------------------------------

class Splats(NamedTuple):
    """What is left of Gaussians in an image: one 2D Gaussian each, in pixels."""
    xy: Tensor         # (B, V, N, 2) centre
    cov: Tensor        # (B, V, N, 3) covariance xx, xy, yy
    det: Tensor        # (B, V, N) its determinant
    z: Tensor          # (B, V, N) depth along the camera's axis
    opacity: Tensor    # (B, V, N)
    rgb: Tensor        # (B, V, N, 3) colour towards the camera, >= 0


def project(g, cam):
    """Gaussians (B, V or 1, N, ..) -> Splats. First-order (EWA) projection, Zwicker et al. 2001."""
    W, t = cam.w2c[..., None, :3, :3], cam.w2c[..., None, :3, 3]             # (B,V,1,3,3), (..,3)
    fx, fy, cx, cy = cam.K[..., None, :4].unbind(-1)                          # (B, V, 1) pixels
    h, w = cam.hw
    x, y, z = ((W @ g.xyz[..., None])[..., 0] + t).unbind(-1)                 # (B, V, N) camera
    u, v = x / z, y / z                                                       # (B, V, N)
    xy = torch.stack([fx * u + cx, fy * v + cy], -1)                          # (B, V, N, 2) pixels

    # J = d(pixel)/d(camera point). Off screen its slope is held: the linearisation explodes there.
    u = torch.minimum(torch.maximum(u, (-0.15 * w - cx) / fx), (1.15 * w - cx) / fx)
    v = torch.minimum(torch.maximum(v, (-0.15 * h - cy) / fy), (1.15 * h - cy) / fy)
    o = torch.zeros_like(z)
    J = torch.stack([fx / z, o, -fx * u / z, o, fy / z, -fy * v / z], -1).unflatten(-1, (2, 3))
    M = J @ W @ (quat_to_matrix(g.quat) * g.scale[..., None, :])             # (B,V,N,2,3) JWRS
    cov = M @ M.mT                                                            # (B, V, N, 2, 2) px^2
    cov = torch.stack([cov[..., 0, 0] + LOW_PASS, cov[..., 0, 1], cov[..., 1, 1] + LOW_PASS], -1)
    det = cov[..., 0] * cov[..., 2] - cov[..., 1] ** 2                        # (B, V, N)

    rgb = 0.5 + C0 * g.sh[..., 0, :]                                          # (B, V, N, 3)
    if g.sh.shape[-2] == 4:
        camera = -(W.mT @ t[..., None])[..., 0]                               # (B, V, 1, 3) world
        dx, dy, dz = F.normalize(g.xyz - camera, dim=-1)[..., None].unbind(-2)   # (B, V, N, 1)
        k = g.sh[..., 1:, :]
        rgb = rgb + C1 * (-dy * k[..., 0, :] + dz * k[..., 1, :] - dx * k[..., 2, :])
    return Splats(xy, cov, det, z, g.opacity.expand_as(z), rgb.clamp(min=0).expand(*z.shape, 3))


def blend(pixel, xy, cov, det, z, opacity, rgb, background):
    """N splats of one image, in depth order, at P pixels -> (P, 5): rgb, alpha, depth.

    a_i   = min(0.99, o_i exp(-d^T cov^-1 d / 2))            d = centre - pixel
    T_i   = prod_{j<i} (1 - a_j)                             light that reaches splat i
    image = sum_i T_i a_i c_i + T_end background
    """
    d = xy[:, None] - pixel                                                   # (N, P, 2) pixels
    dx, dy = d.unbind(-1)
    xx, xy_, yy = cov[:, :, None].unbind(1)                                   # (N, 1)
    power = -0.5 * (yy * dx * dx - 2 * xy_ * dx * dy + xx * dy * dy) / det[:, None]   # (N, P)
    a = (opacity[:, None] * power.exp()).clamp(max=ALPHA_MAX)                 # (N, P)
    a = torch.where((power <= 0) & (a >= ALPHA_MIN), a, 0)
    with torch.no_grad():
        alive = (1 - a).cumprod(0) >= T_STOP                                  # (N, P) once off, off
    a = torch.where(alive, a, 0)
    trans = F.pad((1 - a).cumprod(0), (0, 0, 1, 0), value=1.0)                # (N+1, P): T_0..T_end
    weight = a * trans[:-1]                                                   # (N, P) = T_i a_i
    seen = torch.cat([rgb, torch.ones_like(z)[:, None], z[:, None]], -1)      # (N, 5)
    back = F.pad(background, (0, 2))                                           # (5,)
    return weight.mT @ seen + trans[-1][:, None] * back                       # (P, 5)


def render_reference(g, cam, background, near=NEAR, chunk=1 << 20):
    """The definition of `render`, same arguments. Memory is bounded by `chunk` Gaussian-pixel
    pairs, because every chunk of pixels is computed again in the backward pass."""
    B, V = cam.w2c.shape[:2]
    h, w = cam.hw
    g = Gaussians(*[x[:, None] for x in g])                                   # (B, 1, N, ..)
    with torch.no_grad():   # which Gaussians are seen, in which view
        s = project(g, cam)
        total = (s.xy.sum(-1) + s.cov.sum(-1) + g.sh.sum((-1, -2)) + s.rgb.sum(-1)
                 + s.det + s.z + s.opacity)                                   # (B, V, N)
        ok = (total.isfinite() & (s.z > near) & (s.det > 0) & (s.opacity >= ALPHA_MIN)
              & (g.quat.square().sum(-1) >= 1e-8))                            # (B, V, N)
    # A culled Gaussian is replaced by a harmless one *before* the differentiable pass: no NaN of
    # its own can then reach a gradient (0 x NaN = NaN), and its own gradients are exactly 0.
    inside = invert_pose(cam.w2c)[..., None, :3, 2] + invert_pose(cam.w2c)[..., None, :3, 3]
    one = torch.ones_like(ok, dtype=g.xyz.dtype)                              # (B, V, N)
    xyz, scale, quat, opacity, sh = g
    g = Gaussians(torch.where(ok[..., None], xyz, inside),                    # 1 unit ahead
                  torch.where(ok[..., None], scale, one[..., None]),
                  torch.where(ok[..., None], quat, one[..., None]),
                  torch.where(ok, opacity, 0 * one),
                  torch.where(ok[..., None, None], sh, one[..., None, None]))
    s = project(g, cam)
    order = s.z.detach().masked_fill(~ok, torch.inf).argsort(dim=-1, stable=True)   # (B, V, N)

    px = torch.arange(w, device=s.z.device, dtype=s.z.dtype) + 0.5
    py = torch.arange(h, device=s.z.device, dtype=s.z.dtype) + 0.5
    pixel = torch.stack(torch.meshgrid(px, py, indexing="xy"), -1).view(-1, 2)     # (HW, 2)
    step = max(1, chunk // max(1, s.z.shape[-1]))
    images = []
    for b in range(B):
        for v in range(V):
            splats = [x[b, v][order[b, v]] for x in s]                        # (N, ..) sorted
            images.append(torch.cat([checkpoint(blend, p, *splats, background[b],
                                                use_reentrant=False) for p in pixel.split(step)]))
    out = torch.stack(images).mT.reshape(B, V, 5, h, w)                       # rgb, alpha, depth
    return out[:, :, :3], out[:, :, 3:4], out[:, :, 4:]


# ---- the kernels ---------------------------------------------------------------------------------

CSRC = Path(__file__).resolve().parent / "csrc"
# Not -ffast-math: NaN could not be told from numbers any more.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []   # without it: one thread


@functools.cache
def extension(device):
    """csrc/ compiled for "cpu" or "cuda" and loaded -> (module, None), or (None, why not).

    It is compiled once: the folder's name holds a hash of all that the result depends on.
    """
    sources = {"cpu": ["rasterize.cpp"], "cuda": ["rasterize.cpp", "rasterize.cu"]}.get(device)
    if not sources or not all((CSRC / x).exists() for x in sources):
        return None, f"csrc/ has no kernel for {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return None, "there is no GPU that PyTorch can use"
    flags, cuda_flags = FLAGS + OPENMP, []
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        flags += ["-mavx2", "-mfma"]   # not -march=native: machines may share a home folder
    if device == "cuda":
        flags += ["-DWITH_CUDA"]
        sm = "".join(map(str, torch.cuda.get_device_capability()))   # for this GPU alone
        # Division and root to 2 units in the last place, denormals are 0; NaN stays NaN.
        cuda_flags = ["-O3", "-ftz=true", "-prec-div=false", "-prec-sqrt=false",
                      f"-gencode=arch=compute_{sm},code=sm_{sm}"]
    key = repr([device, flags, cuda_flags, sys.version, torch.__version__, platform.machine()])
    key = key.encode() + b"".join((CSRC / x).read_bytes() for x in ["splat.h", *sources])
    name = f"splats_{device}_{hashlib.sha256(key).hexdigest()[:16]}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    folder = Path(root).expanduser() / name
    try:
        import fcntl
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "flock", "w") as lock:   # the system frees it even of a killed process
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                (folder / "lock").unlink(missing_ok=True)   # torch's own: a killed build leaves it
                compile_extension(name, sources, flags, cuda_flags, folder)
                (folder / "done").touch()
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, None
    except Exception as e:   # whatever it is: the reference can still draw
        return None, str(e)


def compile_extension(name, sources, flags, cuda_flags, folder):
    """The slow part of `extension`; says in a sentence which of four usual things is missing."""
    if importlib.util.find_spec("ninja"):   # venv/bin/python does not put venv/bin on the PATH
        import ninja
        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler):
        raise RuntimeError(f"there is no C++ compiler called {compiler} (CXX can name another)")
    if not shutil.which("ninja"):
        raise RuntimeError("there is no ninja (pip install ninja)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise RuntimeError("there is no Python.h (the system's package is called python3-dev)")
    from torch.utils import cpp_extension   # slow to import
    if cuda_flags and not (cpp_extension.CUDA_HOME
                           and shutil.which(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))):
        raise RuntimeError("there is no CUDA compiler nvcc (CUDA_HOME can name the folder of a "
                           f"toolkit, which should be version {torch.version.cuda} as PyTorch's)")
    print(f"rasterize: compiling csrc/ (once, about {'a' if cuda_flags else 'half a'} minute)",
          flush=True)
    cpp_extension.load(name, [str(CSRC / x) for x in sources], extra_cflags=flags,
                       extra_cuda_cflags=cuda_flags,
                       extra_ldflags=OPENMP, build_directory=str(folder))


class Rasterize(torch.autograd.Function):
    """The kernel as one differentiable step of g and the background."""

    @staticmethod
    def forward(ctx, module, hw, near, w2c, K, background, *g):
        background, w2c, K, *g = [x.contiguous() for x in (background, w2c, K, *g)]
        out = module.forward(g, background, w2c, K, *hw, near)
        ctx.module = module
        ctx.set_materialize_grads(False)   # no zeros for what the loss does not use
        ctx.save_for_backward(background, w2c, K, *g, *out)
        return tuple(out[:3])                                                 # rgb, alpha, depth

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_out):
        background, w2c, K, *rest = ctx.saved_tensors
        g, out = rest[:5], rest[5:]
        d_background = torch.zeros_like(background) if ctx.needs_input_grad[5] else None
        if ctx.needs_input_grad[5] and d_out[0] is not None:   # what the splats let through
            d_background = ((1 - out[1]) * d_out[0]).sum((1, 3, 4))           # (B, 3)
        d_out = [out[0].new_empty(0) if x is None else x.contiguous() for x in d_out]
        d_g = ctx.module.backward(g, background, w2c, K, out, d_out)
        return None, None, None, None, None, d_background, *d_g


# ---- the one door --------------------------------------------------------------------------------

@functools.cache
def choose(backend, device):
    """Who draws on this kind of device: a compiled module, or None for the reference."""
    if backend == "torch":
        return None
    if backend not in ("auto", "cpu", "cuda"):
        raise ValueError(f"backend {backend!r} is none of auto, cpu, cuda, torch")
    if backend not in ("auto", device):
        raise ValueError(f"the {backend} backend cannot draw Gaussians that are on {device}")
    module, why = extension(device)
    if module is None and backend != "auto":
        raise RuntimeError(f"the {backend} backend cannot be built: {why}")
    if backend == "auto":
        how = (f"the {device} kernel, since the Gaussians are on {device}" if module else
               f"the PyTorch reference, which is slow, because {why.splitlines()[0]}")
        print(f"rasterize: drawing with {how}", flush=True)
    return module


def render(g, cam, background, near=NEAR, backend="auto"):
    """Images of Gaussians `g` from cameras `cam`.

    background: colour behind everything, (3,) or one per object (B, 3).
    near:       world units; only Gaussians with z > near are drawn.
    backend:    "cpu" or "cuda", the compiled kernels; "torch", the reference; "auto", the kernel
                of the device that g is on, and if it cannot be compiled the reference.
    Returns rgb (B, V, 3, H, W), not clamped; alpha (B, V, 1, H, W) in [0, 1); and depth
    (B, V, 1, H, W) = sum of weight x z, not divided by alpha. Differentiable in every field of
    `g` and in the background. A Gaussian with NaN, Inf or a zero quaternion is not drawn.
    ValueError: shapes or devices that do not fit together. RuntimeError: a kernel that was asked
    for by name and cannot be compiled, with what the compiler said.
    In a CUDA graph nothing waits for the device, if the background is a tensor on it. Under
    torch.compile this call is a graph break: there is nothing in it to compile.
    """
    if torch.compiler.is_compiling():   # not a decorator, which would import the compiler here
        return torch.compiler.disable(draw)(g, cam, background, near, backend)
    return draw(g, cam, background, near, backend)


def draw(g, cam, background, near, backend):
    """`render` itself."""
    device = g.xyz.device
    (B, N), V, k = g.xyz.shape[:2], cam.w2c.shape[1], g.sh.shape[2]
    cam = cam._replace(K=cam.K[..., :4])
    inputs = (*g, cam.w2c, cam.K)
    want = [(B, N, 3), (B, N, 3), (B, N, 4), (B, N), (B, N, k, 3), (B, V, 4, 4), (B, V, 4)]
    fit = [x.shape for x in inputs] == want and {x.device for x in inputs} == {device}
    if not fit or k not in (1, 4):
        raise ValueError("Gaussians and cameras do not fit together: " + ", ".join(
            f"{name} {list(x.shape)} on {x.device}"
            for name, x in zip(Gaussians._fields + Camera._fields, inputs)))
    dtype = torch.float64 if g.xyz.dtype == torch.float64 else torch.float32   # never half
    if any(x.dtype != dtype for x in inputs):
        g, cam = g.to(dtype), cam.to(dtype)
    background = torch.as_tensor(background, dtype=dtype, device=device).expand(B, 3)
    if device.type == "cuda" and dtype == torch.float64:
        if backend == "cuda":
            raise ValueError("the CUDA kernels are float32 only; the torch backend has float64")
        backend = "torch"
    module = choose(backend, device.type)
    if module:
        return Rasterize.apply(module, cam.hw, near, cam.w2c, cam.K, background, *g)
    with torch.autocast(device.type, enabled=False):
        return render_reference(g, cam, background, near)
