"""The teacher: an image-to-3D model. The student learns to denoise its splats.

It is Splatter Image's network (Szymanowicz et al. 2024): a U-Net without time, one Gaussian per
pixel, trained by rendering alone (stage 0 of train.py), or with its released weights. Left out: two
input views, dropout, and the LPIPS fine-tuning.

The paper's teacher is deterministic. Its splats say no more than the picture does, so a denoiser
that learns from them always samples the same average. *Ours* also takes further views: a short code
tells it what it gets wrong there (privileged information). So two objects that look alike in the
picture get different splats, and the student learns to sample both.
"""
import re
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from model import (ModelConfig, UNet, group_norm, load_checkpoint, load_network,
                   splats_to_gaussians)
from rasterize import fail, reading, render


class Encoder(nn.Module):
    """The teacher's errors in further views -> a short code (ours). One linear layer carries the
    errors' hue into the code, so it says something from step 0."""

    def __init__(self, code):
        super().__init__()
        widths = 3, 32, 64, 128, 128
        self.convs = nn.Sequential(*[layer for a, b in pairwise(widths) for layer in (
            nn.Conv2d(a, b, 3, stride=2, padding=1), group_norm(b), nn.SiLU())])
        self.mlp = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, code))
        self.hue = nn.Linear(3, code)
        nn.init.normal_(self.hue.weight)

    def forward(self, error):
        """error (B, V, 3, H, W), true minus rendered views -> (B, code) in [-1, 1]."""
        size = error.square().mean((1, 2, 3, 4), keepdim=True).sqrt()         # (B, 1, 1, 1, 1)
        error = error / size.clamp(min=1e-6)                                  # mean square 1
        found = self.convs(error.flatten(0, 1)).mean((2, 3))                  # (BV, 128)
        found = found.unflatten(0, error.shape[:2]).mean(1)                   # (B, 128)
        # A wrong edge errs in brightness, a wrong paint in hue: the error minus its grey. Take the
        # mean of hue / length with weights length^3: length 1 if all agree, 0 if they cancel.
        hue = error - error.mean(2, keepdim=True)                             # (B, V, 3, H, W)
        length = hue.square().sum(2, keepdim=True).sqrt()                     # (B, V, 1, H, W)
        total = length.pow(3).sum((1, 3, 4)).clamp(min=1e-6)                  # (B, 1)
        hue = (length.square() * hue).sum((1, 3, 4)) / total                  # (B, 3)
        return (self.hue(hue) + self.mlp(found)).tanh()                       # (B, code)


class Teacher(nn.Module):
    """T(x_src) -> raw splats on the pixel grid of the source view."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.unet = UNet(cfg)
        self.encoder = Encoder(cfg.code) if cfg.code else None

    def forward(self, images, cam=None, background=None):
        """images (B, V, 3, H, W) in [0, 1], the source view first; cam: their cameras. V = 1: the
        paper's teacher. V > 1: the teacher is told what it gets wrong in the views after the
        first, which are on `background` (3,)."""
        nothing = images.new_zeros(len(images), self.cfg.code) if self.encoder else None
        raw, _ = self.unet(images[:, 0], code=nothing)                        # (B, 24, H, W)
        if images.shape[1] == 1:
            return raw
        code = self.code(raw, images, cam, background)                        # (B, code)
        return self.unet(images[:, 0], code=code)[0]                          # (B, 24, H, W)

    def code(self, raw, images, cam, background):
        """-> (B, code): what is wrong with raw (B, 24, H, W), the splats of the teacher that was
        told nothing, in the views after the first. Only with cfg.code."""
        with torch.no_grad():
            g = self.gaussians(raw, cam.K[:, 0])
            seen, _, _ = render(g, cam.views(slice(1, None)), background)     # (B, V-1, 3, H, W)
        with torch.autocast(seen.device.type, torch.bfloat16, self.unet.bf16, cache_enabled=False):
            return self.encoder(images[:, 1:] - seen).float()

    def gaussians(self, raw, K):
        """Raw splats -> Gaussians in the frame of the camera K (B, 4 or 5)."""
        return splats_to_gaussians(raw, K, self.cfg)


@torch.no_grad()
def splat_statistics(batches):
    """Per channel, the mean and deviation of batches of splats (B, 24, H, W) -> (2, 24)."""
    count = total = square = 0
    for s in batches:
        s = s.double().movedim(1, 0).flatten(1).cpu()                         # (24, BHW)
        count += s.shape[1]
        total += s.sum(1)                                                     # (24,)
        square += s.square().sum(1)                                           # (24,)
    mean = total / count
    std = (square / count - mean ** 2).clamp(min=1e-6).sqrt()                 # at least 0.001
    return torch.stack([mean, std]).float()


# ==== The lesson ends here. Below: given teachers, Splatter Image's weights. ======================

def given_teacher(path, want, learns):
    """A teacher.pt of train.py, or a checkpoint of Splatter Image -> Teacher. Its splat images are
    those of the ModelConfig `want`, its layers may differ. If it learns further and takes no code,
    it gets the layers that make and read one: with a code of zeros it stays what it was."""
    if "network" in load_checkpoint(path):
        given, _ = load_network(path, Teacher)
    else:
        given = load_splatter_image(path)
    if learns and want.code and not given.encoder:
        told = Teacher(replace(given.cfg, code=want.code))
        told.load_state_dict(given.state_dict(), strict=False)
        given = told
    layers = ["width", "mult", "blocks", "attn"]
    if not (want.code or learns):
        layers.append("code")
    need = replace(want, **{k: getattr(given.cfg, k) for k in layers})
    given.cfg = replace(given.cfg, near=want.near, far=want.far)   # of the data that it is used on
    if given.cfg != need:
        fail(f"{path}: a {given.cfg}, but these flags need a {need}")
    return given


PREFIX = r"network_with_offset\.|encoder\.|dec\.\d+x\d+_(?=aux)"   # their names have these, too
UNUSED = ("ray_dirs", "sh_to_v_transform", "v_to_sh_transform",   # constants that we compute
          "resample_filter")                                      # a 2 x 2 box: average pooling


def load_splatter_image(path):
    """model_<category>.pth of Splatter Image -> Teacher of the shape of these weights, but for near
    and far, of which the file does not say anything."""
    with reading(path, "Splatter Image with one input view, offsets and SH of degree 1"):
        theirs = load_checkpoint(path)["model_state_dict"]
        state = {re.sub(PREFIX, "", k): x for k, x in theirs.items() if not k.endswith(UNUSED)}
        blocks = [k.split(".")[1] for k in state if re.match(r"enc\..*block\d+\.conv0\.weight", k)]
        res = sorted({int(k.split("x")[0]) for k in blocks}, reverse=True)    # the finest first
        chan = [len(state[f"enc.{r}x{r}_block0.conv0.weight"]) for r in res]
        attn = max([r for r in res if f"enc.{r}x{r}_block0.qkv.weight" in state], default=0)
        width = len(state[f"enc.{res[0]}x{res[0]}_conv.weight"])
        teacher = Teacher(ModelConfig(res[0], width, tuple(c // width for c in chan),
                                      len(blocks) // len(res), attn))
        teacher.unet.load_state_dict(state)
    return teacher.eval()
