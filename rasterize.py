"""Gaussians and cameras in, images out.

`render(g, cam, background) -> rgb, alpha, depth` is differentiable, and batched over B objects x
V views. `render_reference` is the *definition* of the image, in plain PyTorch: it evaluates every
Gaussian at every pixel. The kernels in csrc/ compute the same image fast. They are compiled on
first use; if that fails, the reference draws instead. No networks, losses or files in here.

Conventions of the whole repository:
    camera      OpenCV: x right, y down, z forward; pixel i is sampled at i + 0.5
    world       the source camera's frame: the source view's w2c is the identity
    quaternion  w, x, y, z; need not be normalised
    covariance  Sigma = R S S R^T in 3D, J W Sigma W^T J^T + 0.3 I in pixels (the low-pass)
    blending    front to back by depth, ties by index; alpha <= 0.99, nothing below 1/255,
                stop before the Gaussian that would leave less than 1e-4 of the light
    SH          degree 0 or 1: colour = max(0, 1/2 + C0 k0 + C1 (-y k1 + z k2 - x k3))
Letters: B objects, V views, N Gaussians, H W pixels, P = pixels in one chunk.
"""
import functools
import hashlib
import importlib
import os
import shutil
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

C0 = 0.28209479177387814   # real spherical harmonics, degree 0
C1 = 0.4886025119029199    # and degree 1
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

    def views(self, index):
        """Those views of every object."""
        return Camera(self.w2c[:, index], self.K[:, index], self.hw)

    def to(self, *args):
        return Camera(self.w2c.to(*args), self.K.to(*args), self.hw)


def fail(message):
    """Bad input ends in one line on stderr, exit code 1, no traceback."""
    raise SystemExit(f"error: {message}")


@contextmanager
def reading(path, what):
    """Any error inside ends in one line that names the file."""
    try:
        yield
    except Exception as e:                               # decoders raise whatever they like
        reason = " ".join([type(e).__name__, *str(e).split()])[:1000]
        fail(f"{path}: not {what} ({reason})")


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
    """(..., 3, 3) rotation -> (..., 4) unit quaternion with w >= 0. 4 q q^T is linear in R and each
    of its rows is a multiple of q. Take the row with the largest diagonal: it is not near 0."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = R.flatten(-2).unbind(-1)             # (...) each
    qq = torch.stack([1 + xx + yy + zz, zy - yz, xz - zx, yx - xy,
                      zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx,
                      xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy,
                      yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
                     -1).unflatten(-1, (4, 4))                                # (..., 4, 4) 4 q q^T
    row = qq.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]           # (..., 1, 1)
    q = F.normalize(qq.take_along_dim(row, -2).squeeze(-2), dim=-1)           # (..., 4)
    return torch.where(q[..., :1] < 0, -q, q)


def transform(g, pose):
    """Move Gaussians by a rigid pose (B, 4, 4): centres, axes and colour by direction alike."""
    R = pose[:, None, :3, :3]                                                 # (B, 1, 3, 3)
    xyz = (R @ g.xyz[..., None])[..., 0] + pose[:, None, :3, 3]               # (B, N, 3)
    quat = matrix_to_quat(R @ quat_to_matrix(g.quat))                         # (B, N, 4)
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

    # J = d(pixel)/d(camera point). It explodes off screen: clamp u, v to 15% outside the image.
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


def render_reference(g, cam, background):
    """The definition of `render`; background is (B, 3). Memory is bounded, because every chunk of
    pixels, with a million Gaussian-pixel pairs, is computed again in the backward pass."""
    B, V = cam.w2c.shape[:2]
    h, w = cam.hw
    g = Gaussians(*[x[:, None] for x in g])                                   # (B, 1, N, ..)
    with torch.no_grad():   # which Gaussians are seen, in which view
        s = project(g, cam)
        total = (s.xy.sum(-1) + s.cov.sum(-1) + g.sh.sum((-1, -2)) + s.rgb.sum(-1)
                 + s.det + s.z + s.opacity)                                   # (B, V, N)
        ok = (total.isfinite() & (s.z > NEAR) & (s.det > 0) & (s.opacity >= ALPHA_MIN)
              & (g.quat.square().sum(-1) >= 1e-8))                            # (B, V, N)
    # A culled Gaussian is replaced by a harmless one *before* the differentiable pass: so its NaN
    # cannot reach a gradient (0 x NaN = NaN), and its own gradients are exactly 0.
    ahead = invert_pose(cam.w2c)[..., None, :3, 2:].sum(-1)       # (B, V, 1, 3) centre + z axis
    g = Gaussians(*[torch.where(ok.view(ok.shape + (1,) * (x.dim() - 3)), x, harmless)
                    for x, harmless in zip(g, (ahead, 1, 1, 0, 1))])          # (B, V, N, ..)
    s = project(g, cam)
    order = s.z.detach().masked_fill(~ok, torch.inf).argsort(dim=-1, stable=True)   # (B, V, N)

    grid = torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")    # (H, W) x, y
    pixel = torch.stack(grid, -1).view(-1, 2).to(s.z) + 0.5                   # (HW, 2)
    step = 1 + 10**6 // max(1, s.z.shape[-1])                                 # pixels in a chunk
    images = []
    for b in range(B):
        for v in range(V):
            splats = [x[b, v][order[b, v]] for x in s]                        # (N, ..) sorted
            images.append(torch.cat([checkpoint(blend, p, *splats, background[b],
                                                use_reentrant=False) for p in pixel.split(step)]))
    out = torch.stack(images).mT.reshape(B, V, 5, h, w)                       # rgb, alpha, depth
    return out.split([3, 1, 1], 2)


# ==== The lesson ends here. Below: the kernels, `render`, CUDA graphs. ============================

CSRC = Path(__file__).resolve().parent / "csrc"
# Not -ffast-math, with which NaN could not be told from numbers.
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
FLAGS += ["-fopenmp"] if sys.platform == "linux" else []   # elsewhere: one thread


@functools.cache
def load_kernels(device):
    """The module of csrc/ for "cpu" or "cuda". It is compiled once: the name of its folder holds a
    hash of everything that the result depends on. If that fails, an exception says why."""
    import fcntl   # not on Windows
    if device not in ("cpu", "cuda"):
        raise RuntimeError(f"csrc/ has no kernel for {device}")
    sources = [CSRC / "rasterize.cpp"]
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    flags = FLAGS + wide * ["-mavx2", "-mfma"]   # not -march=native: a home folder may be shared
    cuda_flags = []
    if device == "cuda":
        sources.append(CSRC / "rasterize.cu")
        flags.append("-DWITH_CUDA")
        sm = "".join(map(str, torch.cuda.get_device_capability()))   # compile for this GPU only
        # Division and root to 2 units in the last place, denormals are 0; NaN stays NaN.
        cuda_flags = ["-O3", "-ftz=true", "-prec-div=false", "-prec-sqrt=false", f"-arch=sm_{sm}"]
        cuda_flags += ["-DBLOCK_SORT=4096"] * (sm == "75")   # a block of a T4 has 64 KiB
    text = [path.read_bytes() for path in (*sources, CSRC / "splat.h")]
    key = [text, flags, cuda_flags, sys.version, torch.__version__, sysconfig.get_platform()]
    name = f"splats_{device}_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    folder = Path(root).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "flock", "w") as lock:   # the system releases it when a process is killed
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            compiler = os.environ.get("CXX", "c++").split()[0]
            if not shutil.which(compiler):
                raise RuntimeError(f"there is no compiler {compiler} (CXX can name another)")
            print("rasterize: compiling csrc/ (once, about a minute)", flush=True)
            from torch.utils import cpp_extension   # slow to import
            os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")   # ninja of a venv
            (folder / "lock").unlink(missing_ok=True)   # torch's own, left by a killed build
            cpp_extension.load(name, list(map(str, sources)), extra_cflags=flags,
                               extra_ldflags=list(FLAGS), extra_cuda_cflags=cuda_flags,
                               build_directory=str(folder))
            (folder / "done").touch()
    sys.path.append(str(folder))
    return importlib.import_module(name)


class Rasterize(torch.autograd.Function):
    """The kernel as one differentiable function of g."""

    @staticmethod
    def forward(ctx, module, hw, *inputs):
        w2c, K, background, *g = inputs = [x.contiguous() for x in inputs]
        out = module.forward(g, background, w2c, K, *hw, NEAR)
        ctx.module = module
        ctx.set_materialize_grads(False)   # no zeros for what the loss does not use
        ctx.save_for_backward(*inputs, *out)
        return tuple(out[:3])                                                 # rgb, alpha, depth

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_out):
        w2c, K, background, *rest = ctx.saved_tensors                         # then 5 of g, out
        d_out = [w2c.new_empty(0) if x is None else x.contiguous() for x in d_out]
        d_g = ctx.module.backward(rest[:5], background, w2c, K, rest[5:], d_out)
        return None, None, None, None, None, *d_g


# ---- the one function for other files ------------------------------------------------------------

@functools.cache
def choose(backend, device):
    """The kernel module for Gaussians on `device`, or None for the reference."""
    if backend not in ("auto", device, "torch"):
        raise ValueError(f"backend {backend!r}: Gaussians on {device} need auto, {device} or torch")
    try:
        return None if backend == "torch" else load_kernels(device)
    except Exception as e:   # any failure at all: the reference still works
        if backend == device:
            raise
        lines = str(e).splitlines()
        reason = next((line for line in lines if "error:" in line), lines[0])   # a compiler's
        print(f"rasterize: drawing with the PyTorch reference, which is slow, because {reason}",
              flush=True)


def render(g, cam, background, backend="auto"):
    """Images of Gaussians `g` from cameras `cam`: rgb (B, V, 3, H, W), not clamped; alpha
    (B, V, 1, H, W) in [0, 1); depth (B, V, 1, H, W) = sum of weight x z, not divided by alpha.

    background: colour behind everything, (3,) or one per object (B, 3).
    backend:    "cpu" or "cuda", the kernels; "torch", the reference; "auto", the kernel of g's
                device (float32 on a GPU), or the reference if it cannot be compiled.
    Differentiable in all of `g`. A Gaussian with NaN, Inf or a zero quaternion, or nearer than
    NEAR, is not drawn. Nothing waits for the device if the background is on it."""
    device = g.xyz.device
    B, V = cam.w2c.shape[:2]
    N, k = g.sh.shape[1:3]
    cam = cam._replace(K=cam.K[..., :4])
    inputs = (*g, cam.w2c, cam.K)
    want = [(B, N, 3), (B, N, 3), (B, N, 4), (B, N), (B, N, k, 3), (B, V, 4, 4), (B, V, 4)]
    devices = {x.device for x in inputs}
    if [x.shape for x in inputs] != want or devices != {device} or k not in (1, 4):
        raise ValueError("Gaussians and cameras do not fit together: "
                         f"{[list(x.shape) for x in inputs]} on {devices}")
    dtype = torch.float64 if g.xyz.dtype == torch.float64 else torch.float32   # never half
    g = g.to(dtype)
    cam = cam.to(dtype)
    background = torch.as_tensor(background, dtype=dtype, device=device).detach().expand(B, 3)
    module = choose(backend, device.type)
    if module:
        return Rasterize.apply(module, cam.hw, cam.w2c, cam.K, background, *g)
    return render_reference(g, cam, background)


# ---- graph capture -------------------------------------------------------------------------------

class Captured:
    """step(*tensors) -> tensors, as one CUDA graph: a single launch instead of thousands. Three
    calls run eagerly, because compilers and libraries settle in them. The fourth is recorded, and
    replayed from then on. Each call overwrites the outputs of the last."""

    def __init__(self, step):
        self.step = step
        self.calls = 0
        self.graph = None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):   # the stream that a recording will use, too
                outputs = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if not self.graph:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream,
                                  capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.outputs
