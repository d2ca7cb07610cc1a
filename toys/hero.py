"""The README's first picture, assets/hero.webp: held-out cars turn, from left to right the input,
the teacher, the samples. Run by hand.

    python toys/hero.py                      # with weights/cars.pt and the teacher.pt beside it
    python toys/hero.py out/cars/stage_1.pt
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import data
import sample
from model import pick_device
from rasterize import Gaussians

CARS = 2, 5, 10, 11         # of the test set, of different paint
SAMPLES = 4
ZOOM = 1.3                  # the cars fill the picture
ELEVATION = 26              # degrees by which view 64 looks down


@torch.no_grad()
def main():
    weights = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "weights" / "cars.pt")
    device = pick_device()
    denoiser, teacher, meta = sample.load_student(weights, device)
    size = denoiser.cfg.size
    cfg = SimpleNamespace(device=device, size=size, seed=0, steps=meta["steps"])
    views = data.prepare("cars", "data", size, 1, max(CARS) + 1, splits=("test",))["test"]
    look = dict(distance=1.3, elevation=ELEVATION, focal=ZOOM * meta["K"][0] / size,
                background=meta["background"], aspect=1)
    rows = []                                              # of each car: input, frames
    for o in CARS:
        predict = [sample.predictor(teacher, student, views, cfg, n=SAMPLES)(o)
                   for student in (None, denoiser)]
        g = Gaussians(*map(torch.cat, zip(*predict)))                         # (1 + SAMPLES, N, ..)
        g = sample.upright(g, dict(look, focal=look["focal"] / ZOOM), size)
        x = sample.scene(views, sample.test_views(views, o)[:1], cfg)[0]      # (1, 1, 3, H, W)
        edge = round(size * (1 - 1 / ZOOM) / 2)                               # as the zoom cuts off
        picture = Image.fromarray(sample.to_pixels(x[0, 0])[edge:size - edge, edge:size - edge])
        picture = np.asarray(picture.resize((sample.SIDE, sample.SIDE), Image.Resampling.BICUBIC))
        turn = [sample.photograph(g, 360 * k / sample.FRAMES, look) for k in range(sample.FRAMES)]
        rows.append([np.hstack([picture, *frame]) for frame in turn])         # (P, 6 P, 3) each
    film = []
    for frame in zip(*rows):
        head = np.full_like(frame[0][:24], 255)                               # for the titles
        sheet = Image.fromarray(np.vstack([head, *(row[16:-16] for row in frame)]))
        draw = ImageDraw.Draw(sheet)
        for column, title in enumerate(["input", "teacher", *["sample"] * SAMPLES]):
            draw.text(((column + 0.5) * sample.SIDE, 12), title, "black", anchor="mm", font_size=16)
        film.append(np.asarray(sheet))
    content = sample.encoded(film, "WEBP", save_all=True, duration=100, loop=0, quality=75)
    (HERE / "assets" / "hero.webp").write_bytes(content)
    print(f"assets/hero.webp: {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
