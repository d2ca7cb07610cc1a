"""The splat image, the U-Net, and the diffusion that turns noise into splats.

    s      (B, 24, H, W) splat image: one Gaussian per pixel of the source view and of its margin,
           if any. A network outputs *raw* ones; the diffusion is in the space of *normalised* ones.
    g      the Gaussians that are rendered; `splats_to_gaussians` is the only way from s to g.

The paper gives T = 100, t* = 20, DDIM with 10 steps and prediction of the clean splats (x0). The
noise schedule, the space that is noised, and how the image enters are our choices. So is the
*code*, a few numbers that say what the picture does not show (teacher.py). No rendering, training
or data in here.
"""
import io
import math
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from rasterize import Gaussians, fail, reading

# ---- the splat image -----------------------------------------------------------------------------
# Layout and activations are Splatter Image's, so that its weights load. So are initial gains and
# biases, with two changes that train faster here: opacity and offset start as in its CO3D models,
# and scales (our choice) at one pixel with a gain of 0.5, not at two with 0.003.
SPLAT = {   # channels, then gain and bias of the last 1x1 convolution, then what they become
    "depth":   (1, 1.0, 0.0),              # from near to far by its sigmoid: z in the camera
    "offset":  (3, 0.1, 0.0),              # added in the camera's frame, world units
    "opacity": (1, 1.0, -2.0),             # sigmoid
    "scale":   (3, 0.5, math.log(0.01)),   # exp: world units; starts at about 1 pixel
    "quat":    (4, 1.0, 0.0),              # normalised: w x y z
    "dc":      (3, 5.0, 0.0),              # SH degree 0: rgb
    "sh1":     (9, 0.0, 0.0),              # SH degree 1: 3 basis functions x rgb
}
WIDTHS = [width for width, _, _ in SPLAT.values()]
S = sum(WIDTHS)                      # 24 channels
SUMS = 8                             # weighted sums of s_t from which the code is read (ours)


def splats_to_gaussians(raw, K, cfg):
    """Raw splat image (B, 24, H, W) -> Gaussians in the frame of the camera whose pixels it covers,
    and cfg.pad pixels beyond them on each side. Gaussian n = row * W + column has centre ray(pixel)
    * depth + offset. K (B, 4 or 5): fx, fy, cx, cy in pixels, then perhaps the depth of the
    object's middle, from which near and far then count. Lengths in world units."""
    B, _, H, W = raw.shape
    depth, offset, opacity, scale, quat, dc, sh1 = raw.flatten(2).mT.split(WIDTHS, -1)  # (B, N, c)
    fx, fy, cx, cy = K[:, :4, None].unbind(1)                                 # (B, 1)
    start = cfg.near + K[:, 4:].sum(1)[:, None, None]                         # (B, 1, 1)
    n = torch.arange(H * W, device=raw.device)                                # (N,)
    x = (n % W + 0.5 - (cx + cfg.pad)) / fx                                   # (B, N)
    y = (n // W + 0.5 - (cy + cfg.pad)) / fy                                  # (B, N)
    ray = torch.stack([x, y, torch.ones_like(x)], -1)                         # (B, N, 3), z = 1
    if cfg.log_depth:
        z = start * (cfg.far / cfg.near) ** depth.sigmoid()                   # (B, N, 1)
    else:
        z = start + (cfg.far - cfg.near) * depth.sigmoid()                    # (B, N, 1)
    xyz = ray * z + offset                                                    # (B, N, 3)
    sh = torch.cat([dc, sh1], -1).unflatten(-1, (4, 3))                       # (B, N, 4, 3)
    return Gaussians(xyz, scale.exp(), F.normalize(quat, dim=-1), opacity[..., 0].sigmoid(), sh)


def canonical(raw, base=None):
    """Quaternions to unit length and to the sign that is nearer to those of `base`, or w >= 0:
    length and sign do not change the rotation, so noise and losses should not depend on them."""
    q = F.normalize(raw[:, 8:12], dim=1)                                      # (B, 4, H, W)
    near = q[:, :1] if base is None else (q * base[:, 8:12]).sum(1, keepdim=True)
    q = torch.where(near < 0, -q, q)
    return torch.cat([raw[:, :8], q, raw[:, 12:]], 1)


# ---- U-Net ---------------------------------------------------------------------------------------
# DDPM++ (Song et al. 2021), named and shaped as in Splatter Image's checkpoints. Without dropout.

@dataclass
class ModelConfig:
    size: int = 128              # pixels, height of the images
    width: int = 128             # channels of the first level
    mult: tuple = (1, 2, 2, 2)   # channels of each level / width; every level halves the size
    blocks: int = 4              # residual blocks a level
    attn: int = 16               # height, without the pad, of the level with self-attention
    near: float = 0.8            # world units, range of the depth channel
    far: float = 1.8
    code: int = 0                # numbers that say what the picture does not show; 0: the paper
    aspect: float = 1.0          # width / height of the images
    pad: int = 0                 # pixels that splat images reach beyond images, on each side
    log_depth: bool = False      # depth is near (far / near)^sigmoid, not linear in the sigmoid

    @property
    def hw(self):
        """Height and width of a splat image."""
        return self.size + 2 * self.pad, round(self.size * self.aspect) + 2 * self.pad


def xavier(layer, gain=1.0):
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    groups = max(n for n in range(1, 33) if channels % n == 0 and n <= channels / 4)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """norm, SiLU, convolution, twice; between them `emb` scales and shifts each channel (adaptive
    group norm, Dhariwal & Nichol 2021); the shortcut; then perhaps attention."""

    def __init__(self, c_in, c_out, emb=0, resample=None, attention=False):
        super().__init__()
        self.resample = resample                                              # None, "up", "down"
        self.norm0 = group_norm(c_in)
        self.norm1 = group_norm(c_out)
        self.conv0 = xavier(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.conv1 = xavier(nn.Conv2d(c_out, c_out, 3, padding=1), 1e-5)      # starts as a shortcut
        self.skip = xavier(nn.Conv2d(c_in, c_out, 1)) if c_in != c_out or resample else None
        self.affine = xavier(nn.Linear(emb, 2 * c_out), 0.1) if emb else None
        self.attention = attention
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv = xavier(nn.Conv2d(c_out, 3 * c_out, 1), 0.2 ** 0.5)
            self.proj = xavier(nn.Conv2d(c_out, c_out, 1), 1e-5)

    def resized(self, x):
        """(B, C, H, W) -> (B, C, H', W'): means of 2 x 2, each pixel 2 x 2 times, or unchanged."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":   # compiled, F.interpolate's gradient would use slow atomics
            x = x.permute(0, 2, 3, 1)                                         # (B, H, W, C)
            x = torch.stack((x, x), 3).flatten(2, 3)                          # (B, H, 2W, C)
            x = torch.stack((x, x), 2).flatten(1, 2).permute(0, 3, 1, 2)      # (B, C, 2H, 2W)
        return x

    def forward(self, x, emb=None):
        h = self.norm1(self.conv0(self.resized(F.silu(self.norm0(x)))))       # (B, c_out, H', W')
        if emb is not None:
            scale, shift = self.affine(emb)[:, :, None, None].chunk(2, 1)     # (B, c_out, 1, 1)
            h = h * (1 + scale) + shift
        h = self.conv1(F.silu(h))                                             # (B, c_out, H', W')
        x = self.skip(self.resized(x)) if self.skip else x
        x = (x + h) * 0.5 ** 0.5                                              # keeps the variance
        if self.attention:
            qkv = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3)    # (B, C, 3, HW)
            q, k, v = qkv.permute(2, 0, 3, 1)                                 # (B, HW, C), one head
            h = F.scaled_dot_product_attention(q, k, v).mT.view_as(x)         # (B, C, H, W)
            x = (x + self.proj(h)) * 0.5 ** 0.5
        return x


class UNet(nn.Module):
    """Images (B, 3, h, w) -> (B, 24, H, W) raw splats, H = h + 2 cfg.pad. The denoiser's also takes
    noisy splats s_t of that size, and depends on the time t (B,). With cfg.code the decoder depends
    on a code (B, code): the teacher is given it, the denoiser reads it off s_t."""

    def __init__(self, cfg, c_in=3, time=False):
        super().__init__()
        emb = 4 * cfg.width if time else 0
        both = emb + cfg.code                                                 # in the decoder
        self.width = cfg.width
        self.pad = cfg.pad
        self.bf16 = False            # convolutions in half precision; all else stays in float32
        if time:
            self.map_layer0 = xavier(nn.Linear(cfg.width, emb))
            self.map_layer1 = xavier(nn.Linear(emb, emb))
        h, w = cfg.hw
        levels = [(f"{h >> i}x{w >> i}", cfg.width * m, cfg.size >> i == cfg.attn)
                  for i, m in enumerate(cfg.mult)]                            # finest first
        self.enc = nn.ModuleDict()
        skips = []                                                            # their channels
        c = cfg.width
        for name, c_out, attend in levels:
            if skips:
                self.enc[f"{name}_down"] = Block(c, c, emb, "down")
            else:
                self.enc[f"{name}_conv"] = xavier(nn.Conv2d(c_in, c, 3, padding=1))
            skips.append(c)
            for i in range(cfg.blocks):
                self.enc[f"{name}_block{i}"] = Block(c, c_out, emb, attention=attend)
                c = c_out
                skips.append(c)
        self.blocks = cfg.blocks
        self.read = None
        if time and cfg.code:
            self.where = nn.Conv2d(cfg.width * cfg.mult[0], SUMS, 1)
            self.read = nn.Linear(c + SUMS * S, cfg.code)
        self.dec = nn.ModuleDict()
        for name, c_out, attend in reversed(levels):
            if not self.dec:
                self.dec[f"{name}_in0"] = Block(c, c, both, attention=attend)
                self.dec[f"{name}_in1"] = Block(c, c, both)
            else:
                self.dec[f"{name}_up"] = Block(c, c, both, "up")
            for i in range(cfg.blocks + 1):
                last = attend and i == cfg.blocks
                self.dec[f"{name}_block{i}"] = Block(c + skips.pop(), c_out, both, attention=last)
                c = c_out
        self.aux_norm = group_norm(c)
        self.aux_conv = xavier(nn.Conv2d(c, S, 3, padding=1), 0.2)
        self.out = nn.Conv2d(S, S, 1)
        parts = zip(SPLAT.values(), self.out.weight.split(WIDTHS), self.out.bias.split(WIDTHS))
        for (_, gain, value), weight, bias in parts:
            nn.init.xavier_uniform_(weight, gain)
            nn.init.constant_(bias, value)
        with torch.no_grad():
            self.out.bias[5:8] += math.log(128 / cfg.size)                    # 1 pixel at any size

    def forward(self, x, t=None, code=None, s_t=None):
        """-> raw splats (B, 24, H, W), and the code (B, code) that was given or read, or None."""
        if self.pad:
            x = F.pad(x, (self.pad,) * 4, "replicate")                        # (B, 3, H, W)
        if s_t is not None:
            x = torch.cat([x, s_t], 1)                                        # (B, 27, H, W)
        with torch.autocast(x.device.type, torch.bfloat16, self.bf16, cache_enabled=False):
            emb = None
            if t is not None:
                freq = 1e4 ** -torch.linspace(0, 1, self.width // 2, device=x.device)   # (width/2,)
                phase = t[:, None] * freq                                     # (B, width/2)
                emb = torch.cat([phase.cos(), phase.sin()], 1)                # (B, width)
                emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))   # (B, emb)
            skips = []
            for layer in self.enc.values():
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
            if self.read:   # one code for all pixels, so in sums over them it stands out from noise
                where = 1 + self.where(skips[self.blocks]).flatten(2)         # (B, 8, HW) weights
                sums = where @ s_t.flatten(2).mT / where.shape[2] ** 0.5      # (B, 8, 24)
                seen = torch.cat([x.mean((2, 3)), sums.flatten(1)], 1)        # (B, c + 192)
                code = self.read(seen).float().tanh()                         # (B, code)
            if code is not None:
                emb = code if emb is None else torch.cat([emb, code], 1)      # (B, emb + code)
            for name, layer in self.dec.items():
                x = layer(torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
        # the last layers are float32: bfloat16 has 8 bits, too few for a depth
        raw = self.out(self.aux_conv(F.silu(self.aux_norm(x.float()))))       # (B, 24, H, W)
        return raw, code


# ---- diffusion -----------------------------------------------------------------------------------

T = 100          # noise levels (paper)
T_STAR = 20      # stage 2 starts above this level (paper)
STEPS = 10       # DDIM steps, in stage 2 and when sampling (paper)
RHO = 4          # strength of guidance: how many deviations of its noise s_t is moved (ours)
SIGNAL = 0.2     # deviation of s_0 with a code (ours): small, so that noise hides it at T - 1


def alpha_bar(t):
    """Cosine schedule (our choice; Nichol & Dhariwal 2021): 0.9998 at t = 0, 0.0002 at T - 1."""
    return torch.cos((t / T + 0.008) / 1.008 * torch.pi / 2) ** 2


def signal_noise(t):
    """sqrt(alpha_bar), sqrt(1 - alpha_bar) for t (B,), shaped to multiply a splat image."""
    a = alpha_bar(t)[:, None, None, None]                                     # (B, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def add_noise(s, t, eps):
    """s_t = sqrt(ab_t) s_0 + sqrt(1 - ab_t) eps."""
    signal, noise = signal_noise(t)
    return signal * s + noise * eps


def ddim_step(s_t, s_hat, t, t_next):
    """From level t to t_next, deterministically (DDIM, eta = 0), if s_hat are the clean splats."""
    signal, noise = signal_noise(t)
    eps = (s_t - signal * s_hat) / noise                                      # (B, 24, H, W)
    return add_noise(s_hat, t_next, eps)


def denoise(denoiser, s_t, t, x_src, base, steps=STEPS, guide=None):
    """Yields the predictions s_hat of `steps` evenly spaced DDIM steps from t (B,) to 0, the result
    last, both in training (stage 2) and in sampling. guide(s_hat) -> (B,) is a loss, e.g. the error
    in further views (paper, v1): every step but the last moves s_t down its slope."""
    for k in range(steps):
        now = t * (steps - k) // steps                                        # (B,) int
        then = t * (steps - k - 1) // steps                                   # (B,) int
        if guide and k < steps - 1:
            s_hat, slope = guided(denoiser, s_t, now, x_src, base, guide)     # (B, 24, H, W) each
            pull = RHO * signal_noise(then)[1] * slope                        # (B, 24, H, W)
        else:
            s_hat = denoiser(s_t, now, x_src, base)                           # (B, 24, H, W)
            pull = 0
        yield s_hat
        s_t = ddim_step(s_t, s_hat, now, then) - pull


def guided(denoiser, s_t, t, x_src, base, guide):
    """-> s_hat, and d guide(s_hat) / d s_t *through* D, scaled to length 1 per sample."""
    with torch.enable_grad():
        s_t = s_t.detach().requires_grad_()
        s_hat = denoiser(s_t, t, x_src, base)                                 # (B, 24, H, W)
        slope, = torch.autograd.grad(guide(s_hat).sum(), s_t)                 # (B, 24, H, W)
    length = slope.square().sum((1, 2, 3), keepdim=True).sqrt()               # (B, 1, 1, 1)
    return s_hat.detach(), slope / length.clamp(min=1e-12)


WEIGHTINGS = {"noise":    lambda a: 1 - a,                         # most where sampling starts
              "constant": torch.ones_like,
              "min_snr":  lambda a: (a / (1 - a)).clamp(max=5)}    # most where it ends: Hang 2023


def lambda_t(t, kind, t_star=T_STAR, t_known=T - 1):
    """Weight of the rendering loss at noise level t (ours), with mean 1 over t* < t <= t_known."""
    weight = WEIGHTINGS[kind]
    levels = torch.arange(t_star + 1, t_known + 1)                            # those of stage 2
    return weight(alpha_bar(t)) / weight(alpha_bar(levels)).mean().item()


class Denoiser(nn.Module):
    """D(s_t, t, x_src, base) -> s_hat: clean splats, normalised like s_t. The image x_src
    (B, 3, h, w) is concatenated to s_t."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.unet = UNet(cfg, 3 + S, time=True)
        # (2, 24): per channel, the mean and the unit of the splats that are noised
        self.register_buffer("stats", torch.stack([torch.zeros(S), torch.ones(S)]))

    def base(self, raw):
        """The splats from which normalised ones are differences. Ours: raw (B, 24, H, W), those of
        the teacher that is told nothing. So what is left to denoise is what the picture does not
        show. With cfg.code = 0, as in the paper, that would be nothing; there the base is the mean
        of each channel, (1, 24, 1, 1)."""
        return canonical(raw) if self.cfg.code else self.stats[None, 0, :, None, None]

    def forward(self, s_t, t, x_src, base):
        raw, _ = self.unet(x_src, t, s_t=s_t)                                 # (B, 24, H, W)
        return self.normalise(raw, base)

    def normalise(self, raw, base):
        """Raw splats -> s (B, 24, H, W): their difference from `base`, each channel in its own unit
        (ours, as they differ by orders of magnitude); deviation SIGNAL, or 1 without a code."""
        raw = canonical(raw, base if self.cfg.code else None)                 # (B, 24, H, W)
        return (raw - base) / self.stats[1, :, None, None]

    def gaussians(self, s, base, K):
        """The inverse, as Gaussians in the frame of the camera K (B, 4 or 5)."""
        return splats_to_gaussians(s * self.stats[1, :, None, None] + base, K, self.cfg)

    @torch.no_grad()
    def warm_start(self, unet):
        """Begin as the teacher (our addition): its weights, and zeros for what it does not have:
        noisy splats, time, reading. At step 0 the output is that of the teacher, told nothing."""
        theirs = unet.state_dict()
        code = self.cfg.code
        for name, mine in self.unet.state_dict().items():
            if name.startswith(("map_layer", "where")):       # these learn nothing from zeros
                continue
            mine.zero_()
            w = theirs.get(name, mine.clone())
            if w.dim() == 1:
                mine.copy_(w)
            elif ".affine." in name:                          # the last columns are the code's
                mine[:, mine.shape[1] - code:] = w[:, :code]
            else:                                             # the first channels are the image's
                mine[:, :w.shape[1]] = w


# ==== The lesson ends here. Below: devices, and weights on disk. ==================================

def pick_device(name=""):
    """That device, or the GPU if there is one; refuses what cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with reading(f"--device={name}", "usable here; try --device=cpu"):
        torch.zeros(1, device=name).item()
    return name


def write_atomically(path, write):
    """write(file), then rename that file to `path`, so that a reader never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    content = io.BytesIO()      # in memory first: torch.save hides that a disk is full
    write(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(content.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        if part.exists():       # unlink fails if a folder of the path is a file
            part.unlink()
        fail(f"cannot write {path}: {e.strerror}; what was there before is untouched")


def load_checkpoint(path):
    """A dict of tensors and plain values; never runs code from the file."""
    with reading(path, "a checkpoint"):
        if not Path(path).is_file():                  # a pipe would hang
            raise FileNotFoundError("no such file, or not a regular one")
        return dict(torch.load(path, map_location="cpu", weights_only=True))


def save_network(path, network, meta, half=True):
    """Weights, in half precision, with what is needed to use them. meta: plain values."""
    state = {k: (v.half() if half and k != "stats" else v).cpu()
             for k, v in network.state_dict().items()}
    content = dict(network=type(network).__name__, config=asdict(network.cfg), state=state,
                   meta=meta)
    write_atomically(path, lambda f: torch.save(content, f))


def fingerprint(network):
    """One number for all weights, as a file in half precision holds them."""
    weights = [x.half().cpu().numpy().tobytes() for x in network.state_dict().values()]
    return zlib.crc32(b"".join(weights))


def load_network(path, cls, device="cpu"):
    """-> (network in evaluation mode, meta) of a file that `save_network` wrote."""
    c = load_checkpoint(path)
    with reading(path, f"a {cls.__name__} of this version"):
        network = cls(ModelConfig(**c["config"]))
        network.load_state_dict(c["state"])
        return network.eval().to(device), c["meta"]
