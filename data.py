"""Multi-view pictures of objects with their cameras: folders in, batches out.

    <root>/srn_cars/cars_<split>/<object>/{intrinsics.txt, rgb/000000.png, pose/000000.txt}
    <root>/co3d_hydrant_for_gs/<split>/<object>/{images_full, images_fg, focal_lengths}.npy
    path/to/your/own/<object>/{transforms.json and the pictures it names, or SRN's files}

`prepare` finds a dataset, packs each split's images into one memory-mapped uint8 file, and returns
its `Views`; `draw` and `gather` cut batches from them. Where there are no cars at all, it makes
some: procedural ones, ray cast in closed form, written in SRN's layout and read by the same
reader. Their two doors have independent colours, so one view cannot show both.
Nothing is downloaded, and no image is decoded in the training loop.

    python data.py cars                    # prepare, say what is there, draw out/cars/data.png
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import zlib
from colorsys import hsv_to_rgb
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from rasterize import Camera

# What a dataset needs to know, as Splatter Image sets it:
#   near, far    depths that splats may have, world units; where the distance of an object differs
#                from view to view (CO3D, one's own), they count from its middle: Views.K, column 4
#   background   rgb
#   source       the view of a test object that the protocol shows; all others are targets
#   iters        steps of the teacher | start: gain, bias of its last layer; both for --paper
ON_WHITE, ON_BLACK, SMALL = (1., 1., 1.), (0., 0., 0.), math.log(.02)
CO3D = dict(near=-2.0, far=2.0, background=ON_BLACK, source=0, iters=900_001,
            start=dict(opacity=(1, -2), scale=(.003, SMALL), offset=(.1, 0)))
DATASETS = {
    "cars": dict(near=0.80, far=1.80, background=ON_WHITE, source=64, iters=900_001,
                 start=dict(opacity=(.001, -3), scale=(.001, SMALL), offset=(1e-6, 0))),
    "chairs": dict(near=1.25, far=2.75, background=ON_WHITE, source=64, iters=1_000_001,
                   start=dict(opacity=(.001, -2), scale=(.001, SMALL), offset=(1e-6, 0))),
    "hydrants": CO3D, "teddybears": CO3D,
}
OWN = {**CO3D, "near": -0.5, "far": 0.5, "background": ON_WHITE}     # a folder of one's own
EXTENT = 1.27          # world units across a picture at the object's distance, as in SRN's cars
SOURCES = "get pixelNeRF's archive (github.com/sxyu/pixel-nerf, section \"Getting the data\")"
SPLITS = "train", "val", "test"
VERSION = 1            # of the generator and the cache: a change of either's bytes raises it


def fail(message):
    """Bad input, met at the door: one line on stderr, exit code 1, no traceback."""
    raise SystemExit(f"error: {message}")


@contextmanager
def writing(path):
    try:
        yield
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror or e}; free some disk space or choose another "
             "--root (links to datasets will do there)")


@contextmanager
def one_at_a_time(folder):
    """A second run that needs the same data waits until the first has made it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            import fcntl
            lock = os.open(folder, os.O_RDONLY)     # the system frees it even of a killed process
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"data: another run is at work in {folder}; waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):              # Windows, some network folders: no lock
            pass
        yield


def parallel(function, jobs, title, quiet=False):
    """[function(job) for job in jobs], on all cores; what a worker has to say surfaces here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bar = lambda results: list(tqdm(results, title, len(jobs), disable=quiet, leave=False))
    if min(cores, len(jobs) // 4) < 2:                     # too little to be worth the processes
        return bar(map(function, jobs))
    safe = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    try:                                                   # fork itself would copy torch's threads
        with ProcessPoolExecutor(min(cores, 32), multiprocessing.get_context(safe),
                                 signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            return bar(pool.map(function, jobs))
    except BrokenProcessPool:
        fail(f"a worker process died {title}: of what is said above, or lack of memory")
    except KeyboardInterrupt:
        fail(f"interrupted {title}; start again to go on")


# ---- convex solids -------------------------------------------------------------------------------
# World: x forward, y left, z up. Lengths are metres until `assemble` scales the whole car.

class Solid(NamedTuple):
    """A convex solid: all x with n . x <= d for every one of its k faces."""
    n: np.ndarray          # (k, 3) outward normals
    d: np.ndarray          # (k,)
    corners: np.ndarray    # (m, 3)
    colour: tuple          # rgb in [0, 1]
    skin: int              # only to be seen where one of its first `skin` faces looks at you


def solid(n, d, colour, skin):
    """Drop the planes that bound nothing; find the corners: any three planes' meet, if inside."""
    i, j, k = np.array(list(combinations(range(len(n)), 3))).T                          # (c,)
    nij, njk, nki = np.cross(n[i], n[j]), np.cross(n[j], n[k]), np.cross(n[k], n[i])    # (c, 3)
    det = (n[i] * njk).sum(1)                                                           # (c,)
    ok = abs(det) > 1e-6
    x = (d[i, None] * njk + d[j, None] * nki + d[k, None] * nij)[ok] / det[ok, None]    # (c', 3)
    x = x[(x @ n.T < d + 1e-6).all(1)]                                                  # (m, 3)
    used = (x @ n.T > d - 1e-6).sum(0) > 2                                              # (k,)
    return Solid(n[used], d[used], x, colour, int(used[:skin].sum()))


def slab(profile, half, colour=None, lean=0., y=0.):
    """A side view [(x, z), ...] given the width y +- half, its sides leaning in as they rise."""
    x, z = np.asarray(profile, float).T                                                 # (k,)
    dx, dz = np.roll(x, -1) - x, np.roll(z, -1) - z                                     # (k,)
    turn = np.sign((x * dz - z * dx).sum())                             # 1: counter-clockwise
    n = np.r_[[[0, 1, lean], [0, -1, lean]], turn * np.stack([dz, 0 * x, -dx], 1)]      # (2+k, 3)
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    left = np.stack([x, half - lean * (z - z.min()), z], 1)                             # (k, 3)
    corners = np.r_[left, left * [1, -1, 1]] + [0, y, 0]                                # (2k, 3)
    d = (n * corners[[0, len(x), *range(len(x))]]).sum(1)           # one corner of each face
    return Solid(n, d, corners, colour, len(n))


def box(x, y, z, colour=None):
    (x0, x1), (y0, y1), (z0, z1) = x, y, z
    profile = [(x0, z0), (x1, z0), (x1, z1), (x0, z1)]
    return slab(profile, abs(y1 - y0) / 2, colour, y=(y0 + y1) / 2)


def disc(x, z, radius, corners, half, y, colour=None):
    angle = (np.arange(corners) + .5) * 2 * np.pi / corners
    profile = np.stack([x + radius * np.cos(angle), z + radius * np.sin(angle)], 1)
    return slab(profile, half, colour, y=y)


def cut(s, chamfers):
    """Plane corners off: along each (direction, depth) the outermost `depth` metres go."""
    n = np.array([direction / np.linalg.norm(direction) for direction, _ in chamfers])  # (c, 3)
    d = (s.corners @ n.T).max(0) - [depth for _, depth in chamfers]                     # (c,)
    return solid(np.r_[s.n, n], np.r_[s.d, d], s.colour, s.skin + len(n))


def inlay(parent, volume, colour, grow=.012):
    """Colour the part of a parent's surface inside `volume`: their intersection, a bit proud."""
    skin = (volume.corners @ parent.n.T > parent.d + grow).any(0)       # (k,) faces of the parent
    edge = (parent.corners @ volume.n.T > volume.d - grow).any(0)       # (k',) and of the volume
    return solid(np.r_[parent.n[skin], volume.n[edge]],
                 np.r_[parent.d[skin] + grow, volume.d[edge]], colour, skin.sum())


def trace(car, c2w, K, size, ss=3):
    """Ray cast a car in closed form -> (size, size, 4) uint8 RGBA on white, ss x ss rays a pixel.

    A ray through (u, v) meets the plane n . x = d where 1/z is affine in (u, v). It enters a convex
    solid through the farthest plane that faces the camera, leaves by the nearest that does not,
    and hits it if it enters first. 1/z carries the face's number in its lowest bits, so the
    z-buffer is one maximum and remembers what was seen.
    """
    fx, fy, cx, cy = K
    R, eye = c2w[:3, :3], c2w[:3, 3]
    gap = car.d - car.n @ eye                                                # (P,)
    gap = np.where(abs(gap) < 1e-6, 1e-6, gap)
    facing = gap < 0                                                         # (P,) the camera
    order = np.lexsort((~facing, car.owner))                 # (P,) each solid's facing planes first
    to_ray = np.array([[1 / fx, 0, -cx / fx], [0, 1 / fy, -cy / fy], [0, 0, 1]])
    plane = ((car.n @ R @ to_ray) / gap[:, None])[order].astype(np.float32)  # (P, 3): 1/z of u v 1
    grid = ((np.arange(size * ss) + .5) / ss).astype(np.float32)             # (size ss,) pixels
    along_u = (plane[:, :1] * grid)[:, None]                                 # (P, 1, size ss)
    along_v = (plane[:, 1:2] * grid + plane[:, 2:])[:, :, None]              # (P, size ss, 1)
    number = (order + 1).astype(np.int32)[:, None, None]                     # (P, 1, 1)

    p = (car.corners - eye) @ R                                              # (M, 3) camera frame
    uv = (p[:, :2] / p[:, 2:] * [fx, fy] + [cx, cy]) * ss                    # (M, 2) samples
    first = np.floor(np.minimum.reduceat(uv, car.first_corner)).clip(0, size * ss).astype(int)
    last = np.ceil(np.maximum.reduceat(uv, car.first_corner)).clip(0, size * ss).astype(int)

    fronts = np.add.reduceat(facing, car.first[:-1], dtype=int)              # (solids,)
    shown = np.logical_or.reduceat(facing & car.skin, car.first[:-1])        # (solids,)
    nearest = np.zeros((size * ss, size * ss), np.float32)                   # 1/z, 0 = background
    for i in np.flatnonzero(shown & (first < last).all(1)):
        (u0, v0), (u1, v1), a, b = first[i], last[i], car.first[i], car.first[i + 1]
        m = a + fronts[i]
        enter = along_u[a:m, :, u0:u1] + along_v[a:m, v0:v1]                 # (m - a, h, w)
        bits = enter.view(np.int32)
        bits &= ~1023
        bits |= number[a:m]
        enter = enter.min(0)                                                 # (h, w)
        leave = along_u[m:b, :, u0:u1] + along_v[m:b, v0:v1]                 # (b - m, h, w)
        leave = leave.max(0, initial=0)                      # (h, w) 0: an inlay without a back
        seen = nearest[v0:v1, u0:u1]
        np.maximum(seen, enter * (enter > leave), out=seen)

    (u0, v0), (u1, v1) = first.min(0) // ss, -(-last.max(0) // ss)           # whole pixels
    face = nearest.view(np.int32)[v0 * ss:v1 * ss, u0 * ss:u1 * ss] & 1023   # (h ss, w ss)
    rgba = car.table.take(face, 0)                                           # (h ss, w ss, 4)
    rgba = sum(rgba[i::ss] for i in range(ss))
    rgba = sum(rgba[:, i::ss] for i in range(ss)) / ss ** 2                  # (h, w, 4)
    image = np.full((size, size, 4), 255, np.uint8)
    image[..., 3] = 0
    image[v0:v1, u0:u1] = rgba * 255 + .5
    return image


# ---- procedural cars -----------------------------------------------------------------------------

KINDS = {   # length width height | belt / height | cabin: rear foot, rear top, front top, front
            # foot | clearance, wheel radius | axle to axle, rear edge of the door | extras it may
            # have. In metres, x as a fraction of the length; each number varies by 5 %.
    "sedan":  (4.7, 1.80, 1.45, .63, .14, .27, .56, .72, .17, .33, .58, .30, "stripes wing taxi"),
    "hatch":  (3.9, 1.74, 1.50, .62, .02, .09, .58, .75, .17, .31, .57, .33, "stripes rails box"),
    "wagon":  (4.7, 1.82, 1.50, .62, .01, .05, .57, .72, .17, .33, .58, .30, "rails box taxi"),
    "suv":    (4.6, 1.90, 1.75, .62, .01, .04, .58, .71, .26, .39, .58, .32, "rails box stripes"),
    "van":    (4.9, 1.92, 2.00, .55, .00, .02, .76, .93, .20, .34, .60, .42, "rails box taxi"),
    "pickup": (5.2, 1.92, 1.78, .60, .40, .42, .62, .74, .28, .40, .59, .42, "stripes rails bed"),
    "sports": (4.4, 1.88, 1.22, .66, .05, .30, .50, .70, .13, .34, .58, .33, "wing stripes"),
    "truck":  (5.6, 2.00, 2.30, .48, .67, .67, .87, .96, .30, .41, .68, .66, "cargo"),
}
DOORS = {"amber": (.98, .68, .10), "blue": (.10, .32, .85)}     # one for each side, independently
HUES = .00, .02, .05, .30, .38, .46, .52, .76, .92              # of the paint: not the doors'
WHITE, GREY, BLACK = (.94, .94, .93), (.72, .74, .77), (.09, .09, .10)
GLASS, LAMP, TAIL, SIGN = (.13, .16, .21), (1., .97, .80), (.80, .07, .07), (.99, .93, .35)
LIGHT = np.array([.35, .45, .82]) / np.linalg.norm([.35, .45, .82])    # fixed in the world
SIDES = {"left": 1, "right": -1}                                       # and the sign of y there


def design(rng):
    """Every choice that makes one car: what attributes.json holds."""
    U = rng.uniform
    pick = lambda options: options[rng.integers(len(options))]
    c = SimpleNamespace(kind=pick(list(KINDS)), doors={side: pick(list(DOORS)) for side in SIDES})
    *sizes, extras = KINDS[c.kind]
    (c.length, c.width, c.height, belt, *cabin, c.clearance, c.wheel, wheelbase, door
     ) = (np.array(sizes) * U(.95, 1.05, 12)).tolist()
    c.rear_foot, c.rear_top, c.front_top, c.front_foot, c.door, c.rear_axle, c.front_axle = [
        (x - .5) * c.length for x in (*cabin, door, .19, .19 + wheelbase)]
    c.belt = belt * c.height                                    # where the windows begin
    c.hood = c.belt - U(.07, .16) * (2 if c.height > 1.85 else 1)
    c.tail = c.belt - U(.00, .06)
    c.round, c.shoulder, c.tuck = U(.08, .22), U(.05, .10), U(.06, .12)        # cut off the body
    c.lean, c.pillar, c.lamp, c.spokes = U(.18, .30), U(.10, .14), U(.09, .14), pick([5, 6, 8, 14])
    c.paint = (pick([.95, .78, .50, .24]),) * 3 if U(0, 1) < .3 else hsv_to_rgb(
        pick(HUES) + U(0, .015), U(.55, .85), U(.45, .90))
    c.second = BLACK if min(c.paint) > .7 else WHITE
    c.roof = c.second if U(0, 1) < .2 else c.paint
    c.sill = BLACK if U(0, 1) < .4 else c.paint
    c.extra = pick(["none", *extras.split()])
    return c


def body(c):
    """The lower half, and what is drawn on it."""
    nose, rear, half, low = c.length / 2, -c.length / 2, c.width / 2, c.clearance
    hull = slab([(rear + .06, low), (nose - .1, low), (nose, low + .18), (nose - .02, c.hood - .14),
                 (nose - .12, c.hood - .02), (c.front_foot, c.belt),
                 (max(c.rear_foot, rear + .3), c.belt), (rear + .06, c.tail - .01),
                 (rear, c.tail - .1), (rear, low + .15)], half, c.paint, lean=.02)
    hull = cut(hull, [((x, 1.2 * y, 0), c.round) for x in (-1, 1) for y in (-1, 1)]
               + [((0, y, .9), c.shoulder) for y in (-1, 1)]
               + [((0, y, -.55), c.tuck) for y in (-1, 1)])
    front, back = (nose - .3, 9), (-9, rear + .2)
    parts = [hull, inlay(hull, box((-9, 9), (-9, 9), (0, low + .16)), c.sill),
             inlay(hull, box(front, (-half * .55, half * .55), (low + .12, low + .3)), BLACK, .014),
             inlay(hull, box(front, (-.26, .26), (low + .16, low + .26)), WHITE, .02),
             inlay(hull, box(back, (-.26, .26), (low + .22, low + .33)), WHITE, .02)]
    for s in SIDES.values():
        y, z0, z1 = (s * half * .56, s * 9), c.hood - .1 - c.lamp, c.tail - .12 - c.lamp
        parts += [inlay(hull, box(front, y, (z0, c.hood - .08)), LAMP, .015),
                  inlay(hull, box(back, y, (z1, c.tail - .10)), TAIL, .015)]
    return parts


def wheels_and_doors(c, hull):
    parts, r, y = [], c.wheel, c.width / 2 - .105               # y: the middle of a wheel
    for side, s in SIDES.items():
        for x in (c.rear_axle, c.front_axle):
            tyre = disc(x, r, r, 16, .11, s * y, BLACK)
            parts += [inlay(hull, disc(x, r, 1.2 * r, 14, .4, s * c.width / 2), BLACK, .013), tyre,
                      inlay(tyre, disc(x, r, .66 * r, c.spokes, .1, s * (y + .1)), GREY, .005),
                      inlay(tyre, disc(x, r, .20 * r, 6, .1, s * (y + .1)), BLACK, .01)]
        x, out = (c.door, c.front_axle - 1.3 * r), (s * .6, s * 9)
        door = box(x, out, (c.clearance + .1, c.belt - .03))
        grip = box((c.door + .12, c.door + .3), out, (c.belt - .2, c.belt - .15))
        parts += [inlay(hull, door, DOORS[c.doors[side]]), inlay(hull, grip, BLACK, .03)]
    return parts


def cabin(c):
    half, foot, top, middle = c.width / 2 - .07, c.belt - .02, c.height - .05, c.rear_top + .3
    shell = slab([(c.rear_foot, foot), (c.rear_top, top), (c.rear_top + .10, c.height),
                  (c.front_top - .14, c.height), (c.front_top, top), (c.front_foot, foot)],
                 half, c.roof, c.lean)
    shell = cut(shell, [((0, y, 1), .05) for y in (-1, 1)])
    parts = [shell]
    z0, z1 = c.belt + .04, c.height - .10                       # of the glass
    up = (np.array([z0, z1]) - foot) / (top - foot)             # (2,) along the slanted pillars
    a = c.rear_foot + (c.rear_top - c.rear_foot) * up + c.pillar        # (2,) x of its rear edge,
    b = c.front_foot + (c.front_top - c.front_foot) * up - c.pillar     # (2,) of its front edge
    posts = np.linspace(a[0], b[0], max(2, int((b[0] - a[0]) / 1.05) + 1))[1:-1, None] + [0, 0]
    for l, r in zip([a, *(posts + .035)], [*(posts - .035), b]):
        window = [(l[0], z0), (r[0], z0), (r[1], z1), (l[1], z1)]
        parts += [inlay(shell, slab(window, .4, None, y=s * half), GLASS) for s in SIDES.values()]
    for x in (9, -9):                                           # windscreen, rear window
        pane = [(middle, z0), (x, z0), (x, z1), (middle, z1)]
        parts.append(inlay(shell, slab(pane, half - .12, None, c.lean), GLASS))
    x, z = (b[0] - .11, b[0] + .03), (z0, z0 + .13)             # and mirrors
    return parts + [box(x, (s * half, s * (half + .18)), z, BLACK) for s in SIDES.values()]


def extras(c, hull, shell):
    """What makes kinds, and cars of a kind, differ."""
    half, rear, top, middle = c.width / 2, -c.length / 2, c.height, (c.rear_top + c.front_top) / 2
    parts, both = [], SIDES.values()
    if c.kind == "truck":
        x, z = (rear + .02, c.rear_foot - .05), (c.belt - .25, top + .15)
        parts.append(box(x, (-half, half), z, c.second))
    if c.kind == "pickup":                                          # the bed: a floor, three walls
        x, z, wall = (rear + .03, c.rear_foot), (c.belt - .1, c.belt + .12), half - .13
        parts += [inlay(hull, box((rear + .12, x[1] - .06), (-wall, wall), (0, 9)), BLACK),
                  box((x[0], x[0] + .09), (-wall, wall), z, c.paint)]
        parts += [box(x, (s * (wall - .06), s * (wall + .06)), z, c.paint) for s in both]
    if c.extra == "wing":
        x, z = rear - .02, c.belt + .2
        wing = [(x, z - .02), (x + .3, z - .06), (x + .3, z - .01), (x, z + .05)]
        parts += [box((x + .10, x + .22), (s * half * .55, s * half * .65), (z - .3, z), BLACK)
                  for s in both] + [slab(wing, half * .86, c.roof)]
    if c.extra == "rails":
        x, z = (c.rear_top + .1, c.front_top - .2), (top - .01, top + .09)
        parts += [box(x, (s * .44, s * .52), z, GREY) for s in both]
    if c.extra in ("box", "taxi"):
        shape, wide, colour = dict(
            box=([(-.75, 0), (.6, 0), (.8, .12), (.5, .3), (-.7, .3)], .38, c.second),
            taxi=([(-.1, 0), (.1, 0), (.06, .2), (-.06, .2)], .34, SIGN))[c.extra]
        parts.append(slab(np.array(shape) + [middle, top], wide, colour, lean=.2))
    if c.extra == "stripes":
        over = BLACK if c.roof == WHITE else c.second
        for y in [(s * .08, s * .30) for s in both]:
            parts += [inlay(hull, box((c.front_foot - .1, 9), y, (c.clearance + .3, 9)), c.second),
                      inlay(shell, box((-9, 9), y, (top - .04, 9)), over)]
    return parts


def assemble(c):
    """A design -> one stack of planes, the bounding box centred on the origin with diagonal 1."""
    lower, upper = body(c), cabin(c)
    parts = lower + wheels_and_doors(c, lower[0]) + upper + extras(c, lower[0], upper[0])
    n = np.concatenate([s.n for s in parts])                                        # (P, 3)
    corners = np.concatenate([s.corners for s in parts])                            # (M, 3)
    lo, hi = corners.min(0), corners.max(0)
    scale, centre = 1 / np.linalg.norm(hi - lo), (lo + hi) / 2
    faces, points = [len(s.n) for s in parts], [len(s.corners) for s in parts]
    light = .50 + .14 * n[:, 2] + .46 * (n @ LIGHT).clip(0)                         # (P,) Lambert
    rgb = np.repeat([s.colour for s in parts], faces, 0) * light[:, None]           # (P, 3)
    table = np.r_[[[1, 1, 1, 0]], np.c_[rgb.clip(0, 1), np.ones(len(n))]]           # (1+P, 4)
    return SimpleNamespace(
        n=n, d=(np.concatenate([s.d for s in parts]) - n @ centre) * scale,
        corners=(corners - centre) * scale, table=table.astype(np.float32),
        first=np.cumsum([0] + faces), first_corner=np.cumsum([0] + points)[:-1],
        owner=np.repeat(np.arange(len(parts)), faces),
        skin=np.concatenate([np.arange(len(s.n)) < s.skin for s in parts]))


# ---- a procedural dataset in the SRN layout ------------------------------------------------------

def look_at_origin(direction, radius=1.3):
    """(3,) unit vector -> (4, 4) camera-to-world, OpenCV: x right, y down, z forward; z is up."""
    right = np.cross(-direction, [0, 0, 1])
    right /= np.linalg.norm(right)
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(-direction, right), -direction, radius * direction], 1)
    return c2w


def cameras(split, rng):
    """Train: 50 views, uniform on the upper hemisphere. Else 251 on a spiral up from 8 to 80
    degrees in 8 turns, whose view 64 sees front, left and roof from 26 degrees."""
    if split == "train":
        z, azimuth = rng.uniform(0, .99, 50), rng.uniform(0, 2 * np.pi, 50)         # (50,)
    else:
        i = np.arange(251)
        z = np.sin(np.radians(8 + 72 * i / 250))                                    # (251,)
        turns = 8 * (i - DATASETS["cars"]["source"]) / 250                          # (251,)
        azimuth = np.radians(50) + 2 * np.pi * turns                                # (251,)
    r = np.sqrt(1 - z ** 2)
    return [look_at_origin(p) for p in np.stack([r * np.cos(azimuth), r * np.sin(azimuth), z], 1)]


def write_car(job):
    """Car i of a split, from seed, split and i alone; its folder appears whole or not at all."""
    folder, seed, split, i = job
    rng = np.random.default_rng([seed, SPLITS.index(split), i])
    design_ = design(rng)
    car, final = assemble(design_), folder / f"{split}_{i:05d}"
    part = folder / f".{final.name}"
    with writing(final):
        shutil.rmtree(part, ignore_errors=True)
        (part / "rgb").mkdir(parents=True)
        (part / "pose").mkdir()
        (part / "intrinsics.txt").write_text("131.25 64. 64. 0.\n0. 0. 0.\n1.\n128 128\n")
        (part / "attributes.json").write_text(json.dumps(vars(design_), indent=1) + "\n")
        for v, c2w in enumerate(cameras(split, rng)):
            picture = Image.fromarray(trace(car, c2w, (131.25, 131.25, 64, 64), 128))
            picture.save(part / "rgb" / f"{v:06d}.png", compress_level=1)
            text = " ".join(f"{x:.9g}" for x in c2w.ravel())
            (part / "pose" / f"{v:06d}.txt").write_text(text + "\n")
        part.rename(final)


def door_pair(views, o):
    """The door that procedural car o hides from its source view, painted both ways.

    -> index of a view that faces that door; A, B (3, S, S) float in [0, 1]: the true picture of
    that view if the door were amber, and if it were blue. The source view shows the left door."""
    first, last, meta = int(views.start[o]), int(views.start[o + 1]), views.meta
    v = first + int(views.c2w[first:last, 1, 3].argmin())                    # farthest to the right
    path = Path(meta["root"], f"cars_{meta['split']}", views.names[o], "attributes.json")
    about = json.loads(path.read_text())
    design_ = SimpleNamespace(**{k: tuple(x) if type(x) is list else x for k, x in about.items()})
    pictures = []
    for design_.doors["right"] in ("amber", "blue"):
        rgba = trace(assemble(design_), views.c2w[v].cpu().double().numpy(),
                     (131.25, 131.25, 64, 64), 128)
        pictures.append(torch.from_numpy(resize(rgba[..., :3], meta["size"])).movedim(-1, 0) / 255)
    return v, *pictures


def generate(folder, n_train, n_test, seed, quiet):
    """Add the cars that are missing; procedural.json says which set this is."""
    note, wanted = folder / "procedural.json", {"train": n_train, "test": n_test}
    about = found = {"generator": "data.py", "version": VERSION, "seed": seed}
    if note.exists():
        found = json.loads(note.read_text())
        if {**found, **about} != found:
            fail(f"{note}: these cars have seed {found.get('seed')}, version {found.get('version')}"
                 f", not {seed}, {VERSION}; delete {folder} or choose another --root")
    jobs = [(folder / f"cars_{split}", seed, split, i) for split, n in wanted.items()
            for i in range(n) if not (folder / f"cars_{split}" / f"{split}_{i:05d}").exists()]
    if jobs:
        counts = {split: max(n, found.get(split, 0)) for split, n in wanted.items()}
        with writing(folder):
            note.with_suffix(".part").write_text(json.dumps({**about, **counts}, indent=1) + "\n")
            note.with_suffix(".part").rename(note)
        parallel(write_car, jobs, f"making cars in {folder}", quiet)


# ---- finding a dataset ---------------------------------------------------------------------------

def find(root, dataset):
    """-> {split: its folder}, is it procedural. The real set comes before the procedural one.
    A folder of one's own that is not split stands for both of its splits."""
    root, own = Path(root), Path(root) / dataset
    if dataset not in DATASETS:
        folders = {split: folder for split in SPLITS for folder in (
            *Path(dataset).glob(f"*_{split}"), Path(dataset) / split) if folder.is_dir()}
        if "train" in folders or Path(dataset).is_dir():
            whole = folders.get("train", Path(dataset))
            folders = {"train": whole, "test": whole, **folders}
        return folders, False
    if DATASETS[dataset] is CO3D:
        bases = [root / f"co3d_{dataset[:-1]}_for_gs", own]
    else:
        real = root / f"srn_{dataset}"
        bases = [real / real.name, real, root, own, own / dataset, own / real.name]
    for base in sorted(bases, key=lambda base: (base / "procedural.json").exists()):
        folders = {}
        for split in SPLITS:
            a, b = f"{dataset}_{split}", f"{dataset}_2.0_{split}"
            for folder in base / a / b, base / a, base / b, base / split:
                if folder.is_dir() and folder != root / split:      # that may be anyone's
                    folders.setdefault(split, folder)
        if folders:
            return folders, (base / "procedural.json").exists()
    return {}, (own / "procedural.json").exists()            # begun, but not one car made yet


def missing(root, dataset):
    if dataset not in DATASETS:
        fail(f"no dataset {dataset}: give one of {', '.join(DATASETS)}, or a folder of your own: "
             "<folder>/<object>/ with transforms.json and the pictures it names, or with "
             "intrinsics.txt, rgb/*.png and pose/*.txt")
    if DATASETS[dataset] is CO3D:
        fail(f"no {dataset} in {root}: expected {root}/co3d_{dataset[:-1]}_for_gs/{{train,test}}/"
             "<object>/{images_full,images_fg,focal_lengths}.npy and, beside the objects, "
             f"camera_{{Rs,Ts}}.npz; get the {dataset} of CO3D v2 (github.com/facebookresearch/"
             "co3d; CC BY-NC 4.0; its pages tell the size) and preprocess them as Splatter Image "
             "does (github.com/szymanowiczs/splatter-image)")
    size = {"cars": "2,458 x 50 + 704 x 251", "chairs": "4,612 x 50 + 1,317 x 251"}[dataset]
    fail(f"no {dataset} in {root}: expected {root}/srn_{dataset}/{dataset}_{{train,test}}/<object>/"
         f"{{intrinsics.txt, rgb/*.png, pose/*.txt}}; {SOURCES}, {size} pictures under ShapeNet's "
         f"terms (research only), and unpack srn_{dataset}.zip there")


def scan(folder, split, alone=True):
    """One pass over a split's files -> {object: its pictures' names}; a stamp of all names, sizes
    and times, by which a packed file is known to be out of date; and how many objects are left
    out, because skip.txt names them or their cameras are not finite.

    alone: the folder holds one split. Else every tenth object is for testing, and a single one for
    both.
    """
    skip = Path(folder) / "skip.txt"
    skip = skip.read_text().split() if skip.exists() else []
    items = sorted(e.path for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    found = len(items)
    items = [item for item in items if os.path.basename(item) not in skip]
    left_out = found - len(items)
    if layout(folder, split):                                           # itself an object
        items = [str(folder)]
    elif not alone:
        items = [item for item in items if layout(item, split)]         # there may be others
        test = items[9::10] or items[-1:]
        if len(items) > 1:
            items = test if split == "test" else [item for item in items if item not in test]
    objects, stamp = {}, hashlib.sha256()
    for item in items:
        pictures, files = (layout(item, split) or LAYOUTS["intrinsics.txt"])[0](item, split)
        stamp.update(repr((os.path.basename(item), files)).encode())
        objects[item] = pictures
    left_out += sum(not pictures for pictures in objects.values())
    objects = {item: pictures for item, pictures in objects.items() if pictures}
    if not objects:
        fail(f"{folder}: no objects in it; unpack the split again or remove the empty folder")
    return objects, stamp.hexdigest()[:12], left_out


# ---- reading cameras and pictures ----------------------------------------------------------------
# Three layouts, two functions each. list_*: an object's pictures, and (name, size, time) of all its
# files, from a look at the folder alone. read_*: its cameras, c2w (V, 4, 4) as in OpenCV and K
# (V, 4 or 5): fx fy cx cy as fractions of the picture's side, so that they hold at any size, and
# in CO3D the depth of the object's middle; and its square pictures, (side, side, 3) uint8 each,
# one after the other.

def stat(path):
    info = os.stat(path)
    return os.path.basename(path), info.st_size, info.st_mtime_ns


def numbers(path, what):
    """All the numbers of a text file, finite."""
    try:
        values = np.array(path.read_text().split(), np.float64)
    except (OSError, ValueError) as e:
        fail(f"{path}: not {what} ({e}); unpack the object again or remove it")
    if not np.isfinite(values).all():
        fail(f"{path}: not {what} (some are not finite); unpack the object again or remove it")
    return values


def rigid(m, path, what):
    """m (16,) or (4, 4), if it is a rigid motion -> (4, 4)."""
    m = np.reshape(m, (4, 4)) if np.size(m) == 16 else np.zeros((4, 4))
    R = m[:3, :3]
    if abs(R @ R.T - np.eye(3)).max() > 1e-3 or np.linalg.det(R) < 0 or any(m[3] != [0, 0, 0, 1]):
        fail(f"{path}: not {what}: a rigid 4 x 4 camera-to-world of 16 numbers, the last row 0 0 0 "
             "1; unpack the object again or remove it")
    return m


def read_picture(path, background):
    """Any picture (grey, 16-bit, palette, transparent) -> (h, w, 3) uint8 on the background."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):                                   # 16-bit grey
                image = Image.fromarray((np.asarray(image) / 257 + .5).astype(np.uint8))
            rgba = np.asarray(image.convert("RGBA")).astype(np.float32)      # (h, w, 4)
    except Exception as e:                               # Pillow raises whatever its decoders do
        fail(f"{path}: not a readable image ({e}); copy it again or leave it out")
    rgb, alpha, behind = rgba[..., :3], rgba[..., 3:], 255 * np.float32(background)
    # SRN's RGB is composited already and its alpha but the mask: twice would leave halos. A colour
    # composited on black or white is no farther from it than alpha; if one is, do it here.
    if (abs(rgb - behind) > alpha + 2).any():
        rgb = behind + (rgb - behind) * alpha / 255
    return (rgb + .5).astype(np.uint8)


def resize(pixels, size):
    """(side, side, 3) uint8 -> (size, size, 3). Where whole pixels become one it is their mean, as
    a camera of that size would see them."""
    side, how = len(pixels), Image.Resampling
    filtering = how.BOX if side % size == 0 else how.LANCZOS
    return np.array(Image.fromarray(pixels).resize((size, size), filtering))


def list_srn(folder, split):
    files, stems = [], []                                      # of intrinsics, of rgb, of pose
    for kind, end in (("", "intrinsics.txt"), ("rgb", ".png"), ("pose", ".txt")):
        path = os.path.join(folder, kind)
        own = sorted((e.name, (s := e.stat()).st_size, s.st_mtime_ns) for e in os.scandir(path)
                     if e.name.endswith(end)) if os.path.isdir(path) else []
        if not own:
            fail(f"{path}: no {end} in it; an object has intrinsics.txt, rgb/*.png and "
                 "pose/*.txt: unpack it again or remove it")
        files += own
        stems.append([name[:-4] for name, _, _ in own])
    for odd in sorted(set(stems[1]) ^ set(stems[2])):
        fail(f"{folder}: of rgb/{odd}.png and pose/{odd}.txt there is only one; "
             "unpack it again or remove it")
    return stems[1], files


def read_srn(folder, split, names, background):
    """intrinsics.txt: f cx cy 0 / ... / height width. pose/*.txt: camera-to-world, row-major."""
    path, what = folder / "intrinsics.txt", "intrinsics, `f cx cy 0.` first and `height width` last"
    values = numbers(path, what)
    (f, cx, cy), (h, w) = (values[:3], values[-2:]) if len(values) > 5 else ((0, 0, 0), (0, 0))
    if min(f, h, w) <= 0 or not (0 <= cx <= w and 0 <= cy <= h):
        fail(f"{path}: not {what}, that fit together; unpack the object again or remove it")
    K = np.tile([f / w, f / h, cx / w, cy / h], (len(names), 1))             # (V, 4)
    poses = [folder / "pose" / f"{name}.txt" for name in names]
    c2w = np.stack([rigid(numbers(p, "a pose"), p, "a pose") for p in poses])         # (V, 4, 4)

    def pictures():
        side = 0
        for name in names:
            picture = folder / "rgb" / f"{name}.png"
            pixels = read_picture(picture, background)                       # (h, w, 3)
            h, w, _ = pixels.shape
            side = side or w
            if (h, w) != (side, side):
                fail(f"{picture}: {w} x {h} pixels, the object's first picture is {side} wide; all "
                     "must be squares of one size: resize it, or remove the object")
            yield pixels
    return c2w, K, pictures()


def transforms(folder, split):
    """The path and the contents of an object's transforms.json."""
    path = Path(folder) / f"transforms_{split}.json"
    path = path if path.exists() else path.with_name("transforms.json")
    try:
        about = json.loads(path.read_text())
        frames = [dict(about, **frame) for frame in about["frames"]]         # may override all
        frames = [(str(frame["file_path"]), frame) for frame in frames]
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail(f"{path}: not NeRF's transforms, a list `frames` with file_path and transform_matrix "
             f"({type(e).__name__}: {e}); write it again")
    bent = [k for _, f in frames for k in ("k1", "k2", "k3", "p1", "p2") if f.get(k)]
    if bent:
        fail(f"{path}: its lens distorts ({bent[0]}), a pinhole camera is needed; undistort the "
             "pictures (colmap image_undistorter), or set it to 0 to do without")
    return path, frames


def list_nerf(folder, split):
    path, frames = transforms(folder, split)
    pictures = []
    for name, _ in frames:
        found = [p for end in ("", ".png", ".jpg", ".jpeg") if (p := path.parent / (name + end))
                 .is_file()]
        if not found:
            fail(f"{path.parent / name}: not there, but {path} names it; copy it again, or take it "
                 "out of the list")
        pictures.append(str(found[0]))
    if not pictures:
        fail(f"{path}: no frames in it; remove it, or write it again")
    return pictures, [stat(path), *map(stat, pictures)]


def read_nerf(folder, split, names, background):
    """transforms.json as NeRF, Blender and nerfstudio write it: camera-to-world with OpenGL's axes
    (y up, z backward), focal lengths as fl_x, fl_y in pixels or as the angle camera_angle_x."""
    path, frames = transforms(folder, split)
    K, c2w = [], []
    for (_, frame), name in zip(frames, names):
        try:
            with Image.open(name) as image:
                w, h = image.size
            scale = [w / frame.get("w", w), h / frame.get("h", h)]           # of pictures resized
            if "fl_x" in frame:
                fx = frame["fl_x"] * scale[0]
                fy = frame.get("fl_y", frame["fl_x"]) * scale[1]
            else:
                fx = fy = w / 2 / math.tan(frame["camera_angle_x"] / 2)
            cx = frame["cx"] * scale[0] if "cx" in frame else w / 2
            cy = frame["cy"] * scale[1] if "cy" in frame else h / 2
            matrix = np.array(frame["transform_matrix"], np.float64)         # (4, 4) or (3, 4)
            matrix = np.vstack([matrix[:3], [0, 0, 0, 1]])
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OSError) as e:
            fail(f"{path}: the camera of {name}: {type(e).__name__}: {e}; it needs "
                 "transform_matrix, and fl_x or camera_angle_x")
        side = max(w, h)                                       # padded, the picture in the middle
        K.append(np.array([fx, fy, cx + (side - w) // 2, cy + (side - h) // 2]) / side)
        c2w.append(rigid(matrix, f"{path}: {name}", "a pose") * [1, -1, -1, 1])
    if not (np.isfinite(K).all() and np.min(K, 0)[:2].min() > 0):
        fail(f"{path}: a focal length that is not a positive number; write it again")
    return np.stack(c2w), np.stack(K), (pad(read_picture(n, background), background) for n in names)


def pad(pixels, background):
    """(h, w, 3) uint8 -> (side, side, 3), the picture in the middle of the background."""
    h, w, _ = pixels.shape
    side = max(h, w)
    canvas = np.full((side, side, 3), [round(255 * c) for c in background], np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    canvas[top: top + h, left: left + w] = pixels
    return canvas


def co3d_cameras(folder):
    """R (V, 3, 3), T (V, 3) and focal lengths (V, 2) of one sequence, as PyTorch3D has them."""
    try:
        R, T = (np.load(folder.parent / f"camera_{x}.npz")[folder.name] for x in ("Rs", "Ts"))
        f = np.load(folder / "focal_lengths.npy")
        R, V = R.reshape(-1, 3, 3), len(R)
        return R, T.reshape(V, 3), np.broadcast_to(f.reshape(V, -1), (V, 2))
    except (OSError, KeyError, ValueError, EOFError) as e:
        fail(f"{folder}: its cameras cannot be read ({e}); {folder.parent}/camera_Rs.npz and "
             "camera_Ts.npz need an entry for it: preprocess again, or name it in skip.txt")


def list_co3d(folder, split):
    folder = Path(folder)
    files = [folder / name for name in ("images_full.npy", "images_fg.npy", "focal_lengths.npy")]
    cameras = co3d_cameras(folder)
    for path in files:
        if not path.exists():
            fail(f"{path}: not there; preprocess the sequence again or name it in skip.txt")
    finite = all(np.isfinite(x).all() for x in cameras)
    files += [folder.parent / f"camera_{x}.npz" for x in ("Rs", "Ts")]
    return [f"{v:06d}" for v in range(len(cameras[0]) * finite)], [*map(stat, files)]


def read_co3d(folder, split, names, background):
    """As Splatter Image preprocesses CO3D: pictures and masks (V, c, S, S) in [0, 1] or as uint8;
    PyTorch3D's cameras, x_cam = x R + T with x left and y up, focal 1 for half a picture."""
    R, T, f = co3d_cameras(folder)
    c2w = np.tile(np.eye(4), (len(R), 1, 1))                                 # (V, 4, 4)
    c2w[:, :3, :3] = R * [-1, -1, 1]                           # to OpenCV's axes
    c2w[:, :3, 3] = -(R @ T[:, :, None])[:, :, 0]
    K = np.concatenate([f / 2, np.full_like(f, .5), T[:, 2:]], 1)            # (V, 5)
    for m in c2w:
        rigid(m, folder.parent / "camera_Rs.npz", f"a pose of {folder.name}")

    def load(name, channels):
        path = folder / name
        try:
            x = np.load(path, mmap_mode="r")                                 # (V, c, S, S)
        except (OSError, ValueError, EOFError) as e:
            fail(f"{path}: not an array ({e}); preprocess the sequence again")
        if x.ndim != 4 or x.shape[0] != len(R) or x.shape[1] not in channels:
            fail(f"{path}: of shape {x.shape}, not ({len(R)}, {channels[0]}, S, S); preprocess the "
                 "sequence again")
        return x, 255 if x.dtype == np.uint8 else 1
    (rgb, top), (mask, opaque) = load("images_full.npy", [3]), load("images_fg.npy", [1, 3])

    def pictures():
        for x, m in zip(rgb, mask):
            x, m = x.astype(np.float32) / top, m.astype(np.float32) / opaque           # (c, S, S)
            # three channels: the picture, masked already
            x = m if len(m) == 3 else m * x + (1 - m) * np.float32(background)[:, None, None]
            yield (255 * x.clip(0, 1) + .5).astype(np.uint8).transpose(1, 2, 0)
    return c2w, K, pictures()


LAYOUTS = {   # by the file that only its objects have
    "transforms_{split}.json": (list_nerf, read_nerf),
    "transforms.json": (list_nerf, read_nerf),
    "focal_lengths.npy": (list_co3d, read_co3d),
    "intrinsics.txt": (list_srn, read_srn),
}


def layout(folder, split):
    """The two functions for what this folder holds, or None if it is no object."""
    names = (name for name in LAYOUTS
             if os.path.exists(os.path.join(folder, name.format(split=split))))
    return LAYOUTS.get(next(names, None))


def centred(c2w, K, folder):
    """Of one's own pictures nobody knows where the object is, nor how large: take its middle to be
    where the optical axes meet, and EXTENT to be what a picture shows there.
    -> c2w (V, 4, 4), K (V, 5): the middle's depth is the last."""
    axis, eye = c2w[:, :3, 2], c2w[:, :3, 3]                                 # (V, 3) each
    across = np.eye(3) - axis[:, :, None] * axis[:, None]                    # (V, 3, 3)
    if np.linalg.eigvalsh(across.mean(0))[0] < 1e-3:
        fail(f"{folder}: its cameras all look the same way; pictures of an object from several "
             "sides are needed")
    middle = np.linalg.solve(across.sum(0), (across @ eye[:, :, None]).sum(0))[:, 0]    # (3,)
    depth = ((middle - eye) * axis).sum(1)                                   # (V,)
    if depth.min() <= 0:
        fail(f"{folder}: camera {depth.argmin()} looks away from where the others look; are "
             "the poses camera-to-world, with OpenGL's axes in transforms.json?")
    scale = EXTENT / (depth / K[:, 0]).mean()
    c2w = c2w.copy()
    c2w[:, :3, 3] = (eye - middle) * scale
    return c2w, np.c_[K, depth * scale]


def read_object(job):
    """Read one object, write its pictures into the packed file -> c2w, K in pixels, checksum."""
    folder, names, split, own, size, background, packed, offset = job
    folder = Path(folder)
    read = (layout(folder, split) or LAYOUTS["intrinsics.txt"])[1]
    c2w, K, pictures = read(folder, split, names, background)
    check = zlib.crc32(c2w.tobytes())
    if own and K.shape[1] == 4:
        c2w, K = centred(c2w, K, folder)
    with writing(packed), open(packed, "r+b") as file:
        file.seek(offset)
        for pixels in pictures:
            raw = resize(pixels, size).transpose(2, 0, 1).tobytes()          # 3 x size x size
            check = zlib.crc32(raw, check)
            file.write(raw)
    K[:, :4] *= size                                                         # pixels
    return c2w.astype(np.float32), K.astype(np.float32), check


# ---- one packed file per split and size ----------------------------------------------------------

@dataclass
class Views:
    """One split, everything a batch is cut from: M views of O objects."""
    images: torch.Tensor   # (M, 3, S, S) uint8, memory-mapped
    c2w: torch.Tensor      # (M, 4, 4) camera-to-world, OpenCV
    K: torch.Tensor        # (M, 4) fx fy cx cy in pixels; (M, 5): and the depth of the object
    start: torch.Tensor    # (O+1,) int64, stays on the CPU: object o owns views start[o]:start[o+1]
    names: list            # O instance names
    meta: dict             # a line of DATASETS, and dataset split size procedural fingerprint root

    def __len__(self):
        return len(self.names)

    def to(self, device):
        return replace(self, images=self.images.to(device), c2w=self.c2w.to(device),
                       K=self.K.to(device))


def pack(objects, split, own, packed, index, size, background, title, quiet):
    """Read a split into two files, images and all else, which appear whole or not at all."""
    count = np.array([len(names) for names in objects.values()])             # (O,)
    start = np.r_[0, count.cumsum()]                                         # (O+1,)
    part, stem = packed.with_suffix(".part"), packed.stem[:-12]
    with writing(part):
        for old in part.parent.glob(f"{stem}*"):                 # of files that have changed since
            old.unlink()
        part.write_bytes(b"")
    jobs = [(folder, names, split, own, size, background, part, int(first) * 3 * size ** 2)
            for (folder, names), first in zip(objects.items(), start)]
    c2w, K, checks = zip(*parallel(read_object, jobs, title, quiet))
    with writing(packed):
        part.rename(packed)
        with open(part, "wb") as file:
            np.savez(file, c2w=np.concatenate(c2w), K=np.concatenate(K), start=start,
                     names=[Path(folder).name for folder in objects], checks=np.array(checks))
        part.rename(index)


def load(root, dataset, split, size, limit=None, quiet=False):
    """One split's Views, its first `limit` objects; packs them first if that is not yet done."""
    folders, procedural = find(root, dataset)
    if split not in folders:
        missing(root, dataset)
    folder, about = folders[split], DATASETS.get(dataset, OWN)
    alone = list(folders.values()).count(folder) == 1
    objects, stamp, left_out = scan(folder, split, alone)
    if left_out and not quiet:
        print(f"data: {left_out} objects in {folder} are left out: named in its skip.txt, or "
              "cameras that are not finite")
    name = dataset
    if about is OWN:                                             # two folders may have one name
        folder = folder.resolve()
        name = f"{folder.name}_{zlib.crc32(str(folder).encode()):08x}"
    stem = Path(root) / ".cache" / f"{name}_{split}_{size}_{stamp}"
    packed, index = Path(f"{stem}.u8"), Path(f"{stem}.npz")
    views = sum(map(len, objects.values()))
    with one_at_a_time(index.parent):
        if not (index.exists() and packed.exists()
                and packed.stat().st_size == views * 3 * size ** 2):
            pack(objects, split, about is OWN, packed, index, size, about["background"],
                 f"packing {folder}", quiet)
    with np.load(index, allow_pickle=False) as side:
        side = dict(side)
    start = side["start"][:limit + 1 if limit else None]                     # (O+1,)
    M, O = int(start[-1]), len(start) - 1
    # "c", copy on write: torch wants writable memory, and nothing must ever reach the file
    images = np.memmap(packed, np.uint8, "c", shape=(M, 3, size, size))
    tensors = map(torch.from_numpy, (images, side["c2w"][:M], side["K"][:M], start))
    return Views(*tensors, side["names"][:O].tolist(), dict(
        dataset=dataset, split=split, size=size, **about, procedural=procedural,
        fingerprint=hashlib.sha256(side["checks"][:O].tobytes()).hexdigest()[:12],
        root=str(folder.parent)))


def prepare(dataset, root="data", size=128, n_train=200, n_test=24, seed=0, quiet=False,
            splits=SPLITS):
    """-> {split: Views}, of the splits that are there. dataset: a name in DATASETS, or the path of
    a folder. Where there are no cars, procedural ones are made, and it says so; n_train, n_test and
    seed are theirs."""
    if min(size, n_train, n_test) < 1:
        fail(f"size {size}, {n_train} and {n_test} cars: each must be 1 or more")
    say = (lambda line: None) if quiet else (lambda line: print(line, flush=True))
    own, limits = Path(root) / dataset, {}
    folders, procedural = find(root, dataset)
    if procedural or dataset == "cars" and not folders and not list(own.glob("*/")):
        say(f"data: procedural cars in {own} (seed {seed}), not ShapeNet")
        say(f"      for the real ones {SOURCES} and unpack srn_cars.zip in {root}/")
        with one_at_a_time(own):
            generate(own, n_train, n_test, seed, quiet)
        folders, limits = find(root, dataset)[0], dict(train=n_train, test=n_test)
    elif folders:
        beside = "; the procedural ones beside it are not used" * (own / "procedural.json").exists()
        where = folders[min(folders)].parent if dataset in DATASETS else Path(dataset).resolve()
        say(f"data: {Path(dataset).name} in {where}{beside}")
    else:
        missing(root, dataset)
    return {split: load(root, dataset, split, size, limits.get(split), quiet) for split in folders
            if split in splits}


# ---- batches -------------------------------------------------------------------------------------

def draw(views, batch, n_views, generator):
    """Random objects (B,) and V distinct random views of each (B, V), the first the source view."""
    first, count = views.start[:-1], views.start.diff()                      # (O,) (O,)
    objects = torch.randint(len(views), (batch,), generator=generator)       # (B,)
    order = torch.rand(batch, int(count.max()), generator=generator)         # (B, most views)
    own = torch.arange(order.shape[1]) < count[objects, None]                # (B, most views)
    order = order.masked_fill(~own, 2).argsort(1)                            # own views first
    pick = torch.arange(n_views) % count[objects, None]                      # too few: again
    return objects, first[objects, None] + order.gather(1, pick)             # (B,) (B, V)


def gather(views, index):
    """(B, V) -> images (B, V, 3, S, S) in [0, 1] and cameras relative to each first view."""
    x = views.images[index].float() / 255                                    # (B, V, 3, S, S)
    c2w = views.c2w[index]                                                   # (B, V, 4, 4)
    move = torch.cat([c2w[:, :1, :3, :3].expand_as(c2w[..., :3, :3]),        # [R_src | t_src - t]
                      c2w[:, :1, :3, 3:] - c2w[..., :3, 3:]], -1)            # (B, V, 3, 4)
    w2c = torch.eye(4, device=c2w.device).repeat(*index.shape, 1, 1)         # (B, V, 4, 4)
    # R^T [R_src | t_src - t], summed by hand: a TF32 matmul would round poses to three digits
    w2c[:, 1:, :3] = (c2w[..., :3, :3].mT[..., None] * move[..., None, :, :]).sum(-2)[:, 1:]
    return x, Camera(w2c, views.K[index], (views.meta["size"],) * 2)


# ---- python data.py cars -------------------------------------------------------------------------

def contact_sheet(splits, columns=10, rows=6):
    """A few objects of each split, one per row, views evenly apart -> an image."""
    lines = []
    for views in splits.values():
        for o in np.linspace(0, len(views) - 1, min(rows, len(views))).astype(int):
            v = np.linspace(*(views.start[o:o + 2].numpy() - [0, 1]), columns).astype(int)
            lines.append(torch.cat(list(views.images[torch.from_numpy(v)]), -1))     # (3, S, 10 S)
    return Image.fromarray(torch.cat(lines, 1).permute(1, 2, 0).numpy())


def main():
    parser = argparse.ArgumentParser(description="Prepare a dataset and say what it holds.")
    parser.add_argument("dataset", help=f"{', '.join(DATASETS)}, or path/to/your/own")
    parser.add_argument("--root", default="data", help="folder of datasets")
    parser.add_argument("--size", default=128, type=int, help="pixels")
    parser.add_argument("--instances_train", default=200, type=int, help="procedural cars to make")
    parser.add_argument("--instances_test", default=24, type=int)
    parser.add_argument("--seed", default=0, type=int, help="of the procedural cars")
    a = parser.parse_args()
    splits = prepare(a.dataset, a.root, a.size, a.instances_train, a.instances_test, a.seed)
    for split, views in splits.items():
        f, _, cx, cy, *_ = views.K[0].tolist()
        print(f"{split:>6}: {len(views)} objects, {len(views.images)} views of {a.size} x {a.size},"
              f" focal {f:.2f}, centre {cx:.2f} {cy:.2f} pixels, id {views.meta['fingerprint']}")
    about = next(iter(splits.values())).meta
    middle = " from the object's middle" if views.K.shape[1] > 4 else ""
    print(f"depths {about['near']} to {about['far']}{middle}, background {about['background']}, "
          + ("procedural" if about["procedural"] else "not procedural"))
    path = Path("out") / Path(a.dataset).resolve().name / "data.png"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(splits).save(path)
    print(path)


if __name__ == "__main__":
    main()
