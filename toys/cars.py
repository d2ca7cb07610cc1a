"""Procedural cars: ray cast in closed form, written in the ShapeNet-SRN layout.

A toy world in which few pictures can show everything: each door is amber or blue, drawn
independently, and only views from high above see both. Nobody need read this file. data.py
calls `generate` if there are no real cars; `hidden_pair` and `door_scores` measure what a model
makes of the door that its input does not show.
"""
import json
import os
import shutil
import tempfile
from colorsys import hsv_to_rgb
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from rasterize import fail

VERSION = 1            # of the cars: to be raised when their files change
SIZE, K = 128, (131.25, 131.25, 64, 64)     # pixels of a picture; its fx fy cx cy
SOURCE = 64            # the view of a test car that a model is shown
bytearray(1 << 24)     # freed at once; glibc then keeps the memory of a traced picture for the next


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


def cast(car, c2w, K, hw, ss):
    """Ray cast a stack of convex solids in closed form, ss x ss rays a pixel -> 1/z of each ray,
    (h ss, w ss) float32, 0 where it meets nothing; each solid's first and last samples (solids, 2).

    A ray through (u, v) meets the plane n . x = d where 1/z is affine in (u, v). It enters a convex
    solid through the farthest plane that faces the camera, leaves by the nearest that does not,
    and hits it if it enters first. 1/z carries the face's number in its lowest 10 bits, so the
    z-buffer is one maximum and remembers what was seen.
    """
    h, w = np.array(hw) * ss
    fx, fy, cx, cy = K
    R, eye = c2w[:3, :3], c2w[:3, 3]
    gap = car.d - car.n @ eye                                                # (P,)
    gap = np.where(abs(gap) < 1e-6, 1e-6, gap)
    facing = gap < 0                                                         # (P,) the camera
    order = np.lexsort((~facing, car.owner))                 # (P,) each solid's facing planes first
    to_ray = np.array([[1 / fx, 0, -cx / fx], [0, 1 / fy, -cy / fy], [0, 0, 1]])
    plane = ((car.n @ R @ to_ray) / gap[:, None])[order].astype(np.float32)  # (P, 3): 1/z of u v 1
    grid = ((np.arange(max(h, w)) + .5) / ss).astype(np.float32)             # pixels
    along_u = (plane[:, :1] * grid[:w])[:, None]                             # (P, 1, w ss)
    along_v = (plane[:, 1:2] * grid[:h] + plane[:, 2:])[:, :, None]          # (P, h ss, 1)
    number = (order + 1).astype(np.int32)[:, None, None]                     # (P, 1, 1)

    p = (car.corners - eye) @ R                                              # (M, 3) camera frame
    ahead = np.maximum(p[:, 2:], 1e-3)
    uv = (p[:, :2] / ahead * [fx, fy] + [cx, cy]) * ss                       # (M, 2) samples
    first = np.floor(np.minimum.reduceat(uv, car.first_corner)).clip(0, (w, h)).astype(int)
    last = np.ceil(np.maximum.reduceat(uv, car.first_corner)).clip(0, (w, h)).astype(int)
    z = np.minimum.reduceat(p[:, 2], car.first_corner)                       # (solids,) its nearest
    first[z < 1e-3], last[z < 1e-3] = 0, (w, h)              # partly behind the camera: anywhere
    last[np.maximum.reduceat(p[:, 2], car.first_corner) < 1e-3] = 0          # all of it: nowhere

    fronts = np.add.reduceat(facing, car.first[:-1], dtype=int)              # (solids,)
    shown = np.logical_or.reduceat(facing & car.skin, car.first[:-1])        # (solids,)
    nearest = np.zeros((h, w), np.float32)
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
    return nearest, first, last


def stack(parts, centre, scale):
    """Solids -> all their planes and corners, scaled about `centre`: what `cast` takes."""
    faces, points = [len(s.n) for s in parts], [len(s.corners) for s in parts]
    n = np.concatenate([s.n for s in parts])                                            # (P, 3)
    return SimpleNamespace(
        n=n, d=(np.concatenate([s.d for s in parts]) - n @ centre) * scale,
        corners=(np.concatenate([s.corners for s in parts]) - centre) * scale,
        first=np.cumsum([0] + faces), first_corner=np.cumsum([0] + points)[:-1],
        owner=np.repeat(np.arange(len(parts)), faces),
        skin=np.concatenate([np.arange(len(s.n)) < s.skin for s in parts]))


def trace(car, c2w, K, size, ss=3):
    """What a camera sees of a car -> (size, size, 4) uint8 RGBA on white."""
    nearest, first, last = cast(car, c2w, K, (size, size), ss)
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
    """A design -> one stack of planes, the bounding box centred on the origin with diagonal 1, and
    the colour of each."""
    lower, upper = body(c), cabin(c)
    parts = lower + wheels_and_doors(c, lower[0]) + upper + extras(c, lower[0], upper[0])
    n = np.concatenate([s.n for s in parts])                                        # (P, 3)
    corners = np.concatenate([s.corners for s in parts])                            # (M, 3)
    lo, hi = corners.min(0), corners.max(0)
    car = stack(parts, (lo + hi) / 2, 1 / np.linalg.norm(hi - lo))
    light = .50 + .14 * n[:, 2] + .46 * (n @ LIGHT).clip(0)                         # (P,) Lambert
    rgb = np.array([s.colour for s in parts])[car.owner] * light[:, None]           # (P, 3)
    table = np.r_[[[1, 1, 1, 0]], np.c_[rgb.clip(0, 1), np.ones(len(n))]]           # (1+P, 4)
    car.table = table.astype(np.float32)
    return car


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
        turns = 8 * (i - SOURCE) / 250                                              # (251,)
        azimuth = np.radians(50) + 2 * np.pi * turns                                # (251,)
    r = np.sqrt(1 - z ** 2)
    return [look_at_origin(p) for p in np.stack([r * np.cos(azimuth), r * np.sin(azimuth), z], 1)]


def write_car(job):
    """Car i of a split, from seed, split and i alone; its folder appears whole or not at all."""
    folder, seed, split, i = job
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split), i])
    design_ = design(rng)
    car, final = assemble(design_), folder / f"{split}_{i:05d}"
    part = folder / f".{final.name}"
    shutil.rmtree(part, ignore_errors=True)
    (part / "rgb").mkdir(parents=True)
    (part / "pose").mkdir()
    (part / "intrinsics.txt").write_text("131.25 64. 64. 0.\n0. 0. 0.\n1.\n128 128\n")
    (part / "attributes.json").write_text(json.dumps(vars(design_), indent=1) + "\n")
    for v, c2w in enumerate(cameras(split, rng)):
        picture = Image.fromarray(trace(car, c2w, K, SIZE))
        picture.save(part / "rgb" / f"{v:06d}.png", compress_level=1)
        text = " ".join(f"{x:.9g}" for x in c2w.ravel())
        (part / "pose" / f"{v:06d}.txt").write_text(text + "\n")
    part.rename(final)


def add(job):
    """`write` an object in a folder of its own, then move it: another run may make it, too."""
    write, folder, *which = job
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as own:
        write((Path(own), *which))
        for item in sorted(Path(own).iterdir()):
            try:
                item.rename(folder / item.name)
            except OSError:
                if not (folder / item.name).exists():
                    raise


def add_missing(folder, wanted, seed, parallel, version, write, place, last):
    """Write the objects that a set lacks, each below place.format(split); `last` ends the name of
    what is moved there last. procedural.json holds the set's seed and is written first, once."""
    note = folder / "procedural.json"
    about = {"version": version, "seed": seed}
    folder.mkdir(parents=True, exist_ok=True)
    if not note.exists():
        part = folder / f".{os.getpid()}.json"
        part.write_text(json.dumps(about) + "\n")
        part.replace(note)               # at once: no other run reads half of it
    try:
        found = json.loads(note.read_text())
    except ValueError:
        found = {}
    if {**found, **about} != found:
        fail(f"{note}: these {folder.name} have seed {found.get('seed')}, version "
             f"{found.get('version')}, not {seed}, {version}; delete {folder} or choose another "
             "--root")
    jobs = []
    for split, number in wanted.items():
        to = folder / place.format(split)
        to.mkdir(exist_ok=True)
        jobs += [(write, to, seed, split, i) for i in range(number)
                 if not (to / f"{split}_{i:05d}{last}").exists()]
    if jobs:
        list(parallel(add, jobs, f"making {folder.name} in {folder}"))


def generate(folder, wanted, seed, parallel):
    """Add the cars that a set lacks; wanted is {split: number}, parallel is data.parallel."""
    add_missing(folder, wanted, seed, parallel, VERSION, write_car, "cars_{}", "")


# ---- the hidden door -----------------------------------------------------------------------------

def door_pictures(folder, c2w):
    """What the camera c2w (4, 4) sees of the car in `folder` if its right door is amber, and if it
    is blue: two of (SIZE, SIZE, 4) uint8."""
    about = json.loads((folder / "attributes.json").read_text())
    design_ = SimpleNamespace(**{k: tuple(x) if type(x) is list else x for k, x in about.items()})
    for design_.doors["right"] in ("amber", "blue"):
        yield trace(assemble(design_), c2w, K, SIZE)


def hidden_pair(views, o, resize):
    """The door that car o hides from its source view, painted both ways: index of a view that faces
    that door; A, B (3, S, S) in [0, 1], the true picture of that view if the door were amber, and
    if it were blue. The source view shows the left door. resize is data.resize."""
    first = int(views.start[o])
    c2w = views.c2w[first:views.start[o + 1]].cpu().double().numpy()                # (V, 4, 4)
    v = int(c2w[:, 1, 3].argmin())                                      # farthest to the right
    folder = Path(views.meta["root"], f"cars_{views.meta['split']}", views.names[o])
    pair = [resize(rgba[..., :3], views.meta["hw"]) for rgba in door_pictures(folder, c2w[v])]
    return first + v, *(torch.from_numpy(x).movedim(-1, 0) / 255 for x in pair)     # (3, S, S)


def door_scores(x_hat, truth, amber, blue):
    """Of renderings (n, 3, H, W) of a hidden door, its true picture (3, H, W), and what that would
    be if the door were amber and if it were blue. The paint q is 1 for amber, 0 for blue, 1/2 for
    mud.

    both: is one sample amber (q > 3/4) and one blue (q < 1/4)? decided: the share of samples that
    are one or the other, not another colour or a hole. amber: the share with q > 1/2; over many
    cars the truth is 1/2. true: the share that are decided for the true colour."""
    d = amber - blue                                                          # (3, H, W)
    there = d.abs().sum(0) > 0.5                                              # (H, W) they differ
    d = d * there                                                             # (3, H, W)
    x = torch.cat([truth[None], x_hat])                                       # (1 + n, 3, H, W)
    q = ((x - blue) * d).flatten(1).sum(1) / d.square().sum()                 # (1 + n,)
    is_amber, q = q[0] > 0.5, q[1:]                                           # () (n,)
    rest = (x_hat - blue) * there - q[:, None, None, None] * d                # (n, 3, H, W) other
    clear = rest.flatten(1).norm(dim=1) < 0.5 * d.norm()                      # (n,)
    decided = ((q - 0.5).abs() > 0.25) & clear                                # (n,)
    share = lambda which: which.float().mean().item()
    both = (decided & (q > 0.5)).any() and (decided & (q < 0.5)).any()
    return dict(both=float(both), decided=share(decided),
                amber=share(q > 0.5), true=share(decided & ((q > 0.5) == is_amber)))
