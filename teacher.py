"""The teacher: a deterministic image-to-3D model whose splats, once noised, the student denoises.

It is Splatter Image's network (Szymanowicz et al. 2024): a U-Net without time, one Gaussian per
pixel, trained by rendering alone. Left out: its camera embedding and cross-view attention for two
input views, dropout, and the LPIPS fine-tuning. The training loop is in train.py, as stage 0; the
released weights can take its place (`load_splatter_image`).
"""
import re

import torch
from torch import nn

from model import (ModelConfig, S, UNet, canonical, load_checkpoint, load_network,
                   splats_to_gaussians)


class Teacher(nn.Module):
    """T(x_src) -> raw splats on the pixel grid of the source view."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.unet = UNet(cfg)

    def forward(self, images, cam=None):
        """images (B, K, 3, H, W) in [0, 1], the source view first; cam: their cameras.
        K = 1 today and the camera is not looked at; a teacher that sees more views fits here."""
        return self.unet(images[:, 0])                                        # (B, 24, H, W) raw

    def gaussians(self, raw, K):
        """Raw splats -> Gaussians in the frame of the camera K (B, 4)."""
        return splats_to_gaussians(raw, K, self.cfg.near, self.cfg.far)


@torch.no_grad()
def splat_statistics(teacher, batches):
    """Mean and deviation (2, 24) of the teacher's splats per channel, over source images x_src
    (B, 3, H, W): what `normalise` subtracts and divides by."""
    count, (total, square) = 0, torch.zeros(2, S, dtype=torch.float64)
    for x_src in batches:
        s = canonical(teacher(x_src[:, None])).double().movedim(1, 0).flatten(1).cpu()   # (24, BHW)
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
