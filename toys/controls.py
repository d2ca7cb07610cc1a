"""Controls for the table of train.py: what else could choose, or use a further view? Run by hand.

    python toys/controls.py out/cars        # the rows below, with the weights and settings of a run

    teacher, codes of others   codes instead of diffusion: the teacher is told what it gets wrong in
                               other objects of the test set, a sample for each
    teacher, codes of train    the same with objects of the training set, as a sampler could
    teacher, told by 1         the teacher is told the view from the other side, which guides the
                               samples in the row "guided by 1"
    teacher, optimised on 1    the teacher's splats, optimised on the source and the same view
"""
import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import sample
import train
from model import load_network, pick_device
from rasterize import fail
from teacher import Teacher


def by_codes(teacher, views, cfg, others):
    """The teacher, told what it gets wrong in other objects -> cfg.samples of each object."""
    @functools.cache
    @torch.no_grad()
    def code(o):
        index = sample.told_views(others, o, cfg.told)                        # (1 + told,)
        x, cam, background = sample.scene(others, index, cfg)                 # (1, 1 + told, ..)
        return teacher.code(teacher(x[:, :1]), x, cam, background)            # (1, code)

    def predict(o):
        x, cam, _ = sample.scene(views, sample.test_views(views, o)[:1], cfg)     # (1, 1, 3, H, W)
        choice = [i for i in range(len(others)) if others is not views or i != o]
        codes = [code(choice[(o + k) % len(choice)]) for k in range(cfg.samples)]
        raw, _ = teacher.unet(x[:, 0].expand(cfg.samples, -1, -1, -1), code=torch.cat(codes))
        return teacher.gaussians(raw, cam.K[:, 0].expand(cfg.samples, -1))    # (n, N, ..)
    return predict


def by_optimised_teacher(teacher, views, cfg, steps=100):
    """The teacher's splats, optimised by Adam on the source and the opposite view."""
    def predict(o):
        source, other = sample.opposite_views(views, o)
        index = torch.stack([source, source, other])                          # (3,)
        x, cam, background = sample.scene(views, index, cfg)                  # (1, 3, 3, H, W)
        gaussians = lambda raw: teacher.gaussians(raw, cam.K[:, 0])
        error = sample.guidance(gaussians, x, cam, background)
        raw = teacher(x[:, :1]).requires_grad_()                              # (1, 24, H, W)
        adam = torch.optim.Adam([raw], lr=0.02)
        with torch.enable_grad():
            for _ in range(steps):
                adam.zero_grad()
                error(raw).sum().backward()
                adam.step()
        return gaussians(raw.detach())
    return predict


def main():
    if len(sys.argv) < 2:
        fail("name the folder of a run: python toys/controls.py out/cars")
    out = Path(sys.argv[1])
    if not (out / "results.json").exists():
        fail(f"{out}/results.json: not there; train first")
    config = json.loads((out / "results.json").read_text())["config"]
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    cfg = train.Config(**{**config, "out": str(out), "device": pick_device()})
    splits = data.prepare(cfg.dataset, cfg.root, cfg.size, cfg.n_train, cfg.n_test, cfg.data_seed,
                          splits=("train", cfg.split))
    views = train.on_device(splits[cfg.split], cfg.device)
    teacher, _ = load_network(out / "teacher.pt", Teacher, cfg.device)
    rows = {"teacher, optimised on 1": by_optimised_teacher(teacher, views, cfg)}
    if teacher.encoder:
        rows["teacher, told by 1"] = sample.predictor(teacher, None, views, cfg,
                                                      sample.opposite_views)
        rows["teacher, codes of train"] = by_codes(teacher, views, cfg, splits["train"])
    if teacher.encoder and len(views) > 1:
        rows["teacher, codes of others"] = by_codes(teacher, views, cfg, views)
    scores = {name: sample.average_scores(sample.evaluate(
        predict, views, cfg, cfg.eval_views, range(len(views)), name,
        given=sample.opposite_views if name.endswith(" 1") else None))
        for name, predict in rows.items()}
    print(sample.format_rows(scores))


if __name__ == "__main__":
    main()
