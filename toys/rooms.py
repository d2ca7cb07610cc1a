"""Procedural rooms: ray cast in closed form, written in RealEstate10K's layout.

A toy world for scenes, as toys/cars.py is one for objects: a camera walks and turns in a room. Just
outside the picture in the middle of a clip, the source, each side wall has a panel (a wardrobe, a
curtain, a door), amber or blue, drawn independently. The method can be followed without this file.
"""
import json
from colorsys import hsv_to_rgb
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from toys.cars import DOORS, HUES, SIDES, Solid, add_missing, box, cast, slab, stack

VERSION = 1            # of the rooms: to be raised when their files change
FRAMES, SOURCE = 61, 30                     # of a clip; the frame that a model is shown
HW, SS = (128, 192), 2                      # pixels of a picture; SS x SS rays for each

PIECES = {   # x out of the wall: from, to | y along it: middle, half | z from, to | paint, taper
    "sofa": "0 .85 0 .5 .1 .4 a, 0 .24 0 .5 .4 .82 a, 0 .87 ±.46 .05 .1 .6 a, "
            ".2 .84 ±.2 .195 .4 .52 b, .2 .34 ±.2 .18 .52 .78 c",
    "bed": "0 2 0 .5 .1 .34 wood, 0 .07 0 .53 0 .95 wood, .07 1.98 0 .48 .34 .5 white, "
           ".75 2.02 0 .52 .25 .54 quilt, .1 .5 ±.25 .2 .5 .62 white",
    "shelf": "0 .04 0 .5 0 1.9 wood, 0 .32 ±.49 .015 0 1.9 wood, 0 .32 0 .5 .04 .08 wood, "
             "0 .32 0 .5 .6 .63 wood, 0 .32 0 .5 1.2 1.23 wood, 0 .32 0 .5 1.86 1.9 wood, "
             ".04 .25 .1 .36 .08 .4 books, .04 .25 -.1 .4 .6 .9 books, .04 .25 .1 .3 1.2 1.5 books",
    "chest": "0 .45 0 .5 .08 .8 tiers, 0 .48 0 .52 .8 .83 wood, .44 .48 0 .12 .6 .64 black",
    "kitchen": "0 .58 0 .5 .1 .88 tiers, 0 .62 0 .5 .88 .92 b, 0 .33 0 .5 1.45 2.05 tiers",
    "table": "-.4 .4 0 .5 .7 .74 wood, .3 .36 ±.45 .03 0 .7 wood, -.36 -.3 ±.45 .03 0 .7 wood",
    "lamp": ".15 .45 0 .15 0 .03 a, .28 .32 0 .02 .03 1.4 black, .08 .52 0 .22 1.35 1.7 glow .1",
    "plant": ".15 .45 0 .15 0 .34 a -.04, .1 .5 0 .2 .34 .6 green -.1, 0 .6 0 .3 .6 1.2 green .2",
    "screen": ".1 .4 0 .15 .83 .86 black, .22 .26 0 .04 .83 1 black, .2 .25 0 .5 .94 1.5 black",
    "picture": "0 .03 0 .3 1.2 1.9 wood, 0 .035 0 .27 1.24 1.86 white, 0 .04 0 .2 1.3 1.8 quilt",
    "window": "0 .05 0 .5 1.1 2.1 white, 0 .12 0 .56 1.04 1.1 white, 0 .055 0 .45 1.16 2.04 sky, "
              "0 .06 0 .45 1.16 1.4 green, 0 .07 0 .02 1.1 2.1 white, 0 .13 ±.6 .16 .8 2.2 folds",
    "blinds": "0 .05 0 .5 1 2.1 white, 0 .055 0 .46 1.05 2.05 blinds",
    "exit": "0 .03 0 .5 0 2.1 white, 0 .04 0 .43 0 2.03 tiers, .04 .09 .34 .04 .95 1 black",
    "wardrobe": "0 .4 0 .5 0 2.1 panel, 0 .41 0 .006 .06 2.06 black, .4 .44 ±.05 .01 1 1.2 black",
    "curtain": "0 .14 0 .5 .04 2.2 pleats, 0 .1 0 .54 2.2 2.24 black",
    "door": "0 .03 0 .54 0 2.14 white, 0 .04 0 .5 0 2.1 panel, .04 .09 .44 .03 .95 1 black",
}
WIDE = {"sofa": (1.5, 2.2), "bed": (1.5, 1.7), "kitchen": (1.5, 3), "chest": (.7, 1.4),
        "shelf": (.7, 1.3), "lamp": (.6, 1), "plant": (.6, 1), "exit": (.8, 1)}
THICK = {"wardrobe": .44, "curtain": .14, "door": .09}         # the panels
# paint: a colour; or two, in tiles by turns or with some of both, metres across x along, 0: endless
MIXED, TURNS = True, False


def hue(rng, saturation=(.15, .6), value=(.35, .9)):
    """A colour (3,), but no amber nor blue."""
    return np.array(hsv_to_rgb(HUES[rng.integers(len(HUES))] + rng.uniform(0, .015),
                               rng.uniform(*saturation), rng.uniform(*value)))


def paints(rng, panel=(0, 0, 0)):
    """-> {name: paint} for one piece of furniture. No two hues: they might mix to amber or blue."""
    a, b, c, cloth = hue(rng), hue(rng), hue(rng, (.3, .7)), hue(rng, (.05, .5), (.5, .95))
    wood = np.array(hsv_to_rgb(rng.uniform(.035, .07), *rng.uniform((.3, .22), (.62, .75))))
    front, panel = (wood, cloth)[rng.integers(2)], np.array(panel)
    return dict(a=[a], b=[b], c=[c], white=[(.94, .94, .93)], black=[(.1, .1, .1)], panel=[panel],
                green=[(.36, .52, .3)], sky=[(1.3, 1.4, 1.45)], glow=[(1.4, 1.35, 1.2)],
                wood=[wood, .8 * wood, MIXED, 9, .07], books=[b, .4 * b, MIXED, .04, 0],
                folds=[cloth, .85 * cloth, TURNS, .06, 0],
                pleats=[panel, .85 * panel, TURNS, .09, 0], tiers=[front, .9 * front, TURNS, 0, .3],
                quilt=[c, .5 + .5 * c, rng.random() < .5, *rng.uniform(.05, .4, 2)],
                blinds=[(1.4,) * 3, (1,) * 3, TURNS, 0, .06])


def piece(name, own, place, wide=1.):
    """Its solids, `wide` times as wide, turned and moved to a place (angle, x, y)."""
    angle, *at = place
    R = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    for row in PIECES[name].split(","):
        x0, x1, y, half, z0, z1, paint, *taper = row.split()
        x0, x1, z0, z1, t = map(float, (x0, x1, z0, z1, *(taper or "0")))
        for y in (y.replace("±", ""), y.replace("±", "-"))[:1 + ("±" in y)]:
            s = slab([(x0, z0), (x1, z0), (x1 - t, z1), (x0 + t, z1)], float(half) * wide,
                     own[paint], t / (z1 - z0), float(y) * wide)
            n = s.n @ R
            yield s._replace(n=n, d=s.d + n[:, :2] @ at, corners=s.corners @ R + [*at, 0])


def furnish(rng, place, w, deep):
    """What stands at w metres of wall, and what hangs above it."""
    own, fits = paints(rng), [x for x in WIDE if WIDE[x][0] < w and (deep or x != "bed")]
    name = fits[rng.integers(len(fits))]
    yield from piece(name, own, place, min(w, rng.uniform(*WIDE[name])))
    if name == "chest" and rng.random() < .6:
        yield from piece("screen", own, place)
    if name not in ("kitchen", "shelf", "exit") and rng.random() < .8:
        above = ("picture", "window", "blinds")[rng.integers(3)]
        yield from piece(above, own, place, rng.uniform(.4, .7) * w)


def design(rng):
    """Every choice that makes a clip, for attributes.json; furniture follows from `seed`. Metres, z
    up; the source's camera is at x = y = 0, walls are at x = front, -back and y = left, -right."""
    U = lambda a, b: float(rng.uniform(a, b))
    pick = lambda options: list(options)[rng.integers(len(options))]
    c = SimpleNamespace(panels={side: pick(DOORS) for side in SIDES}, seed=int(rng.integers(2**31)),
                        kinds={side: pick(THICK) for side in SIDES}, ends={})
    c.left, c.right, c.front, c.back = U(1.7, 2.6), U(1.7, 2.6), U(4.3, 7.5), U(1.4, 2.6)
    c.height, c.eye, c.focal = U(2.35, 2.9), U(1.25, 1.6), U(.84, .90)       # focal: of height 1
    c.heading, c.pitch, c.nod = U(-.2, .2), -U(.02, .15), U(-.04, .04)
    c.walk, c.toward, c.bend = U(.8, 1.3) * pick((-1, 1)), U(-.8, .8), U(-.15, .15)
    c.first, c.ease, c.lag = pick(SIDES), U(.8, 1.1), U(.05, .2)   # first: it looks there at first
    edge = np.arctan2(8 / 9, c.focal * np.cos(c.pitch) + .5 * np.sin(c.pitch))  # its lower corners
    for side, s in SIDES.items():                              # x of the panel's front, its back
        x = (vars(c)[side] - THICK[c.kinds[side]]) / np.tan(edge + s * c.heading + U(.03, .09))
        c.ends[side] = float(x), float(x) - U(1.2, 1.7)
    return c


def cameras(c):
    """-> K (4,) in pixels; camera-to-world (61, 4, 4), as in OpenCV, in a unit in which the root
    mean square distance of the cameras from their mean is 1; this unit in metres."""
    u = (np.arange(FRAMES) - SOURCE) / SOURCE                                # (61,) from -1 to 1
    cos, sin = np.cos(c.heading + c.toward), np.sin(c.heading + c.toward)
    eye = np.c_[u * c.walk / 2, u ** 2 * c.bend] @ [[cos, sin], [-sin, cos]]            # (61, 2)
    yaw = np.full(FRAMES, c.heading)                                         # (61,)
    for side, s in SIDES.items():                              # from the source to each panel
        then, end = (u < 0, eye[0]) if side == c.first else (u > 0, eye[-1])
        x, y = np.array([np.mean(c.ends[side]), s * vars(c)[side]]) - end
        angle = s * (np.arctan2(y, x) - c.heading) - c.lag
        yaw += s * then * angle.clip(.62, 1) * (1 - np.cos(np.pi * abs(u) ** c.ease)) / 2
    right = np.stack([np.sin(yaw), -np.cos(yaw), 0 * u], 1)                  # (61, 3)
    level = np.stack([np.cos(yaw), np.sin(yaw), 0 * u], 1)                   # (61, 3)
    pitch = (c.pitch + c.nod * u)[:, None]                                   # (61, 1)
    ahead = np.cos(pitch) * level + np.sin(pitch) * [0, 0, 1]                # (61, 3)
    xyz = np.c_[eye, c.eye + .012 * np.sin(9 * u)]                           # (61, 3)
    unit = np.sqrt(xyz.var(0).sum())
    c2w = np.tile(np.eye(4), (FRAMES, 1, 1))                                 # (61, 4, 4)
    c2w[:, :3] = np.stack([right, np.cross(ahead, right), ahead, xyz / unit], 2)
    return np.array([c.focal * 9 / 16 * HW[1], c.focal * HW[0], HW[1] / 2, HW[0] / 2]), c2w, unit


def shell(c, rng):
    """Four walls, floor and ceiling: half-spaces outside the room, one face each."""
    wall, accent, tile = hue(rng, (.03, .35), (.6, .98)), hue(rng), hue(rng, (.02, .3), (.5, .9))
    wall, size = [wall, .93 * wall, TURNS, .2 * (rng.random() < .3), 0], rng.uniform(.3, .6)
    floor = ([*paints(rng)["wood"][:3], rng.uniform(.1, .2), rng.uniform(.9, 1.8)],
             [tile, tile * rng.uniform(.5, .9), TURNS, size, size],
             [tile, tile * .9, MIXED, .05, .05])[rng.integers(3)]
    accent = (wall, wall, [accent])[rng.integers(3)]
    room = box((-c.back, c.front), (-c.right, c.left), (0, c.height))
    for n, d, paint in zip(room.n, room.d, (wall, wall, floor, accent, [(.95, .95, .94)], wall)):
        yield Solid(-n[None], -d[None], room.corners[abs(room.corners @ n - d) < 1e-9], paint, 1)


def assemble(c):
    """A design -> its solids as `cast` takes them, in the clip's unit, and their paint."""
    rng = np.random.default_rng(c.seed)
    parts, walls = [*shell(c, rng)], [(np.pi, c.front, 0., c.left + c.right, c.left - c.right)]
    for side, s in SIDES.items():
        (front, back), angle, y = c.ends[side], -s * np.pi / 2, s * vars(c)[side]
        own = paints(rng, DOORS[c.panels[side]])
        parts += piece(c.kinds[side], own, (angle, (front + back) / 2, y), front - back)
        long = c.front - front - 1.3                           # as far as the front wall's things
        walls.append((angle, front + .3 + long / 2, y, long, 0))
    for k, (angle, x, y, long, shift) in enumerate(walls):
        n = max(1, round(long / rng.uniform(1.7, 2.5)))
        for i in range(n if long / n > .8 else 0):
            t = (i + .5 - n / 2) * long / n + shift / 2
            place = angle, x + t * (k > 0), y + t * (k == 0)
            parts += furnish(rng, place, long / n - .15, k == 0)
    if rng.random() < .6:
        place = rng.uniform((0, 2.5, -.5), (0, max(2.6, c.front - 2.7), .5))
        parts += piece("table", paints(rng), place, rng.uniform(.8, 1.5))
    return painted(parts, 1 / cameras(c)[2], rng.uniform(0, 2 * np.pi))


def painted(parts, scale, sun):
    """Stack solids; give each face four colours, from one to the other of its paint, and tiles."""
    room = stack(parts, np.zeros(3), scale)
    rgb, other, mixed, *size = (np.array(x)[np.r_[0, room.owner]] for x in zip(
        *[(*p.colour, p.colour[0], TURNS, 0, 0)[:5] for p in parts]))        # (1+P, ..) 0: nothing
    n = np.r_[[[0, 0, 1]], room.n]                                           # (1+P, 3)
    light = .7 + .14 * abs(n[:, 2]) + .28 * (n @ [.8 * np.cos(sun), .8 * np.sin(sun), .6]).clip(0)
    rgba = np.zeros((len(n), 4, 4), np.uint8)
    rgb = rgb[:, None] + (other - rgb)[:, None] * np.arange(4)[:, None] / 3  # (1+P, 4, 3)
    rgba[..., :3] = (light[:, None, None] * rgb).clip(0, 1) * 255 + .5         # Lambert
    room.palette, room.mixed = rgba.view(np.uint32).ravel(), mixed           # (4 (1+P),) (1+P,)
    across, along = (np.where(x > 0, 1 / np.maximum(x * scale, 1e-9), 0) for x in size)
    x, y, z = abs(n.T) > .5          # where a face looks: tiles go along y and x, y and z, x and z
    room.tiles = np.float32([across * ~(x | z), across * (x | z), along * z, along * ~z])
    return room


def draw(room, K, c2w, ss=SS):
    """What a camera sees of a room -> (h, w, 3) uint8."""
    (h, w), (fx, fy, cx, cy) = HW, K
    nearest = cast(room, c2w, K, HW, ss)[0]                                  # (h ss, w ss)
    face = (nearest.view(np.int32) & 1023).astype(int)
    ray_u = np.outer(c2w[:3, 0], ((np.arange(w * ss) + .5) / ss - cx) / fx) + c2w[:3, 2:3]
    ray_v = np.outer(c2w[:3, 1], ((np.arange(h * ss) + .5) / ss - cy) / fy)
    ray = ray_u.astype(np.float32)[:, None] + ray_v.astype(np.float32)[:, :, None]
    x, y, z = ray / nearest + c2w[:3, 3].astype(np.float32)[:, None, None]   # (h ss, w ss) each
    a, b, c, d, mixed = (t.take(face) for t in (*room.tiles, room.mixed))
    i = np.floor(a * x + b * y + .5).astype(np.int32)                        # number of the tile
    j = np.floor(c * x + d * z + .5 + .37 * i * mixed).astype(np.int32)
    level = np.where(mixed, (i * 7919 ^ j * 104729) >> 3 & 3, 3 * (i + j & 1))
    rgba = room.palette.take(4 * face + level).view(np.uint8).reshape(h, ss, w, ss, 4)
    rgb = sum(np.uint16(rgba[:, i, :, j, :3]) for i in range(ss) for j in range(ss))    # (h, w, 3)
    return ((rgb + ss ** 2 // 2) // ss ** 2).astype(np.uint8)


def depth(room, K, c2w):
    """True depth (h, w) of the middle of each pixel."""
    return 1 / cast(room, c2w, K, HW, 1)[0]


# ---- a procedural dataset in RealEstate10K's layout ----------------------------------------------

def write_clip(job):
    """Clip i of a split, from seed, split and i alone."""
    folder, seed, split, i = job
    c = design(np.random.default_rng([seed, ("train", "val", "test").index(split), i]))
    room, (K, c2w, _), clip = assemble(c), cameras(c), folder / f"{split}_{i:05d}"
    clip.mkdir()
    (clip / "attributes.json").write_text(json.dumps(vars(c), indent=1) + "\n")
    lines = [f"toys/rooms.py, seed {seed}"]
    for t, m in enumerate(c2w):
        stamp = 33_367 * (t + 1)                               # microseconds, as of 30 frames/s
        Image.fromarray(draw(room, K, m)).save(clip / f"{stamp}.jpg", quality=95, subsampling=0)
        numbers = *K / [*HW[::-1], *HW[::-1]], 0, 0, *np.linalg.inv(m)[:3].ravel()
        lines.append(" ".join([str(stamp), *(f"{x:.9f}" for x in numbers)]))
    clip.with_suffix(".txt").write_text("\n".join(lines) + "\n")


# generate(folder, wanted, seed, parallel) adds the clips that a set lacks, as cars.generate does
generate = partial(add_missing, version=VERSION, write=write_clip, place="{}", last=".txt")


def hidden_pair(views, o, resize):
    """The right panel of clip o, which the source does not show, painted both ways: index of the
    view that shows it best; A, B (3, H, W) in [0, 1], the true picture of that view if the panel
    were amber, and if it were blue. resize is data.resize."""
    folder = Path(views.meta["root"], views.meta["split"], views.names[o])
    c = SimpleNamespace(**json.loads((folder / "attributes.json").read_text()))
    (K, c2w, _), rooms = cameras(c), []
    for c.panels["right"] in ("amber", "blue"):
        rooms.append(assemble(c))
    shown = lambda v: np.not_equal(*[draw(room, K, c2w[v], 1) for room in rooms]).sum()
    v = max(range(0, FRAMES, 3), key=shown)                    # all are within 30 of the source
    pair = [resize(draw(room, K, c2w[v]), views.meta["hw"]) for room in rooms]
    return int(views.start[o]) + v, *(torch.from_numpy(x).movedim(-1, 0) / 255 for x in pair)
