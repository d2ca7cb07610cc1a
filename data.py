"""Multi-view pictures of objects with their cameras: folders in, batches out.

    <root>/srn_cars/cars_<split>/<object>/{intrinsics.txt, rgb/000000.png, pose/000000.txt}
    <root>/co3d_hydrant_for_gs/<split>/<object>/{images_full, images_fg, focal_lengths}.npy
    path/to/your/own/<object>/{transforms.json and the pictures it names, or SRN's files}

`prepare` finds a dataset, packs each split's images into one memory-mapped uint8 file, and returns
its `Views`; `draw` and `gather` cut batches from them. Where there are no cars at all, it makes
some: procedural ones (toys/cars.py), written in SRN's layout and read by the same reader. Their two
doors have independent colours, so one view cannot show both.
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from rasterize import Camera
from toys import cars

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
    "cars": dict(near=0.80, far=1.80, background=ON_WHITE, source=cars.SOURCE, iters=900_001,
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


# ---- procedural cars -----------------------------------------------------------------------------

def door_pair(views, o):
    """The door that procedural car o hides from its source view, painted both ways.

    -> index of a view that faces that door; A, B (3, S, S) float in [0, 1]: the true picture of
    that view if the door were amber, and if it were blue. The source view shows the left door."""
    first, last, meta = int(views.start[o]), int(views.start[o + 1]), views.meta
    v = first + int(views.c2w[first:last, 1, 3].argmin())                    # farthest to the right
    folder = Path(meta["root"], f"cars_{meta['split']}", views.names[o])
    pictures = [torch.from_numpy(resize(rgba[..., :3], meta["size"])).movedim(-1, 0) / 255
                for rgba in cars.door_pictures(folder, views.c2w[v].cpu().double().numpy())]
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
            parallel(cars.write_car, jobs, f"making cars in {folder}", quiet)


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
