"""The teacher: an image-to-3D model whose splats, once noised, the student denoises.

It is Splatter Image's network (Szymanowicz et al. 2024): a U-Net without time, one Gaussian per
pixel, trained by rendering alone. Left out: its camera embedding and cross-view attention for two
input views, dropout, and the LPIPS fine-tuning. The training loop is in train.py, as stage 0; the
released weights can take its place (`load_splatter_image`).

The paper's teacher is deterministic: its splats, noised or not, tell the denoiser nothing that the
picture does not, so every sample is the same average. *Ours* has a second use: shown further views,
it is told in a short code where it is wrong (learning with privileged information). Splats made
with a code are what the student learns from, so its samples differ as the objects do.
"""
import re
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from model import (ModelConfig, S, UNet, canonical, group_norm, load_checkpoint, load_network,
                   splats_to_gaussians)
from rasterize import Camera, render


class Encoder(nn.Module):
    """The teacher's errors in further views -> a short code (ours).

    The average colour of the errors goes into the code directly: from the first step it says
    something that the picture does not, and the rest of the encoder can learn from there."""

    def __init__(self, code):
        super().__init__()
        widths = 3, 32, 64, 128, 128
        self.convs = nn.Sequential(*[layer for a, b in pairwise(widths) for layer in (
            nn.Conv2d(a, b, 3, stride=2, padding=1), group_norm(b), nn.SiLU())])
        self.mlp = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, code))
        self.colour = nn.Linear(3, code)
        nn.init.normal_(self.colour.weight)

    def forward(self, error):
        """error (B, K, 3, H, W), true minus rendered views -> (B, code) in [-1, 1]."""
        size = error.square().mean((1, 2, 3, 4), keepdim=True).sqrt()         # (B, 1, 1, 1, 1)
        error = error / size.clamp(min=1e-6)                                  # mean square 1
        found = self.convs(error.flatten(0, 1)).mean((2, 3))                  # (BK, 128)
        found = found.unflatten(0, error.shape[:2]).mean(1)                   # (B, 128)
        colour = 20 * error.mean((1, 3, 4))                                   # (B, 3) about 1
        return (self.colour(colour) + self.mlp(found)).tanh()                 # (B, code)


class Teacher(nn.Module):
    """T(x_src) -> raw splats on the pixel grid of the source view."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.unet = UNet(cfg)
        self.encoder = Encoder(cfg.code) if cfg.code else None

    def forward(self, images, cam=None, background=None):
        """images (B, K, 3, H, W) in [0, 1], the source view first; cam: their cameras.

        K = 1: the paper's deterministic teacher, told nothing. K > 1: told what it gets wrong in
        the views after the first, which are on `background` (3,)."""
        code = self.code(images, cam, background)
        return self.unet(images[:, 0], code=code)[0]                          # (B, 24, H, W) raw

    def code(self, images, cam, background):
        """What the views after the first tell: (B, code), zeros without any; None without code."""
        if not self.encoder:
            return None
        nothing = images.new_zeros(len(images), self.cfg.code)                # (B, code)
        if images.shape[1] == 1:
            return nothing
        with torch.no_grad():
            g = self.gaussians(self.unet(images[:, 0], code=nothing)[0], cam.K[:, 0])
            others = Camera(cam.w2c[:, 1:], cam.K[:, 1:], cam.hw)
            seen, _, _ = render(g, others, background)                        # (B, K-1, 3, H, W)
        with torch.autocast(images.device.type, torch.bfloat16, self.unet.bf16,
                            cache_enabled=False):
            return self.encoder(images[:, 1:] - seen).float()

    def gaussians(self, raw, K):
        """Raw splats -> Gaussians in the frame of the camera K (B, 4)."""
        return splats_to_gaussians(raw, K, self.cfg.near, self.cfg.far)


def can_be_told(teacher, code):
    """A teacher without a code -> one that is told in `code` numbers what it gets wrong. Told
    nothing, it stays the given one to the last bit, because only what is told will be learned."""
    told = Teacher(replace(teacher.cfg, code=code))
    told.load_state_dict(teacher.state_dict(), strict=False)
    for name, x in told.named_parameters():
        x.requires_grad_(name.startswith("encoder.") or name.endswith("affine.weight"))
    return told


@torch.no_grad()
def splat_statistics(batches):
    """Mean and deviation (2, 24) of raw splats (B, 24, H, W) per channel: what `normalise`
    subtracts and divides by."""
    count, (total, square) = 0, torch.zeros(2, S, dtype=torch.float64)
    for raw in batches:
        s = canonical(raw).double().movedim(1, 0).flatten(1).cpu()            # (24, BHW)
        count, total, square = count + s.shape[1], total + s.sum(1), square + s.square().sum(1)
    mean = total / count
    std = (square / count - mean ** 2).clamp(min=1e-6).sqrt()                # at least 0.001
    return torch.stack([mean, std]).float()


def load_teacher(path, near, far):
    """teacher.pt as train.py leaves it, or a checkpoint of Splatter Image -> Teacher."""
    if "network" in load_checkpoint(path, []):
        return load_network(path, Teacher)[0]
    return load_splatter_image(path, near, far)


# ---- Splatter Image's released weights -----------------------------------------------------------

RENAME = [(r"^network_with_offset\.", ""),             # our names are theirs, without these
          (r"^encoder\.", ""),
          (r"^dec\.\d+x\d+_aux", "aux")]
UNUSED = ("ray_dirs", "sh_to_v_transform", "v_to_sh_transform",   # constants that we compute
          "resample_filter")                           # a 2x2 box: average pooling


def load_splatter_image(path, near, far):
    """model_<category>.pth of Splatter Image -> Teacher, its shape read off the weights.

    near, far: world units, of the category; the file does not say. One line and exit 1 if the file
    is something else, naming the tensors that are missing, unknown or of another shape.
    """
    theirs = load_checkpoint(path, ["model_state_dict"])["model_state_dict"]
    state = {}
    for name, x in theirs.items():
        for pattern, new in RENAME:
            name = re.sub(pattern, new, name)
        if not name.endswith(UNUSED):
            state[name] = x

    def channels(name):
        return len(state[name]) if name in state else 0
    levels = {int(r) for k in state for r in re.findall(r"^enc\.(\d+)x\1_", k)}
    levels = sorted(levels, reverse=True) or [0]                # resolutions, the finest first
    first = f"enc.{levels[0]}x{levels[0]}"
    width = channels(f"{first}_conv.weight")
    if not width:
        raise SystemExit(f"error: {path}: not a checkpoint of Splatter Image: no first convolution "
                         "(network_with_offset.encoder.enc.<size>x<size>_conv) is in it")
    mult = tuple(channels(f"enc.{r}x{r}_block0.conv0.weight") // width for r in levels)
    blocks = sum(k.startswith(f"{first}_block") and k.endswith(".conv0.weight") for k in state)
    attend = [r for r in levels if f"enc.{r}x{r}_block0.qkv.weight" in state] or [0]
    cfg = ModelConfig(levels[0], width, mult, blocks, attend[0], near, far)
    teacher = Teacher(cfg)
    mine = teacher.unet.state_dict()
    wrong = ([f"{k} is missing" for k in mine if k not in state]
             + [f"{k} is unknown" for k in state if k not in mine]
             + [f"{k} is {list(state[k].shape)}, not {list(x.shape)}" for k, x in mine.items()
                if k in state and state[k].shape != x.shape])
    if wrong:
        more = f", and {len(wrong) - 8} more" * (len(wrong) > 8)
        raise SystemExit(f"error: {path}: not Splatter Image with one input view, offsets and SH "
                         f"of degree 1: {'; '.join(wrong[:8])}{more}")
    teacher.unet.load_state_dict(state)
    return teacher.eval()
