"""The teacher: a deterministic image-to-3D model whose splats, once noised, the student denoises.

It is Splatter Image's network (Szymanowicz et al. 2024): a U-Net without time, one Gaussian per
pixel, trained by rendering alone. Left out: its camera embedding and cross-view attention for two
input views, dropout, and the LPIPS fine-tuning. The training loop is in train.py, as stage 0.
"""
import torch
from torch import nn

from model import S, UNet, canonical, splats_to_gaussians


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
