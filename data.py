"""Multi-view pictures of objects with their cameras: folders in, batches out.

    <root>/srn_cars/cars_<split>/<object>/{intrinsics.txt, rgb/000000.png, pose/000000.txt}
    <root>/co3d_hydrant_for_gs/<split>/<object>/{images_full, images_fg, focal_lengths}.npy
    path/to/your/own/<object>/{transforms.json and the pictures it names, or SRN's files}

`prepare` finds a dataset, packs the pictures of each split into one memory-mapped uint8 file, and
returns its `Views`; `draw` and `gather` cut batches from them, so training decodes no picture.
Nothing is downloaded: if there are no cars, toys/cars.py makes procedural ones in SRN's layout.

    python data.py cars                    # prepare, print what is there, draw out/cars/data.png
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import signal
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from rasterize import Camera, fail
from toys import cars

# Settings of each dataset, as in Splatter Image:
#   near, far    range of the splats' depths, world units; if the distance of the object differs
#                between views (CO3D, your own), relative to the object's middle: Views.K, column 4
#   background   rgb
#   source       the view of a test object that is the input; all others are targets
#   iters        steps of the teacher | start: gain, bias of its last layer; both for --paper
ON_WHITE = (1., 1., 1.)
SMALL = math.log(.02)
CO3D = dict(near=-2.0, far=2.0, background=(0., 0., 0.), source=0, iters=900_001,
            start=dict(opacity=(1, -2), scale=(.003, SMALL), offset=(.1, 0)))
DATASETS = {
    "cars": dict(near=0.80, far=1.80, background=ON_WHITE, source=cars.SOURCE, iters=900_001,
                 start=dict(opacity=(.001, -3), scale=(.001, SMALL), offset=(1e-6, 0))),
    "chairs": dict(near=1.25, far=2.75, background=ON_WHITE, source=64, iters=1_000_001,
                   start=dict(opacity=(.001, -2), scale=(.001, SMALL), offset=(1e-6, 0))),
    "hydrants": CO3D, "teddybears": CO3D,
}
OWN = {**CO3D, "near": -0.5, "far": 0.5, "background": ON_WHITE}     # a folder of your own
EXTENT = 1.27          # world units across a picture at the object's distance, as in SRN's cars
SOURCES = "get pixelNeRF's archive (github.com/sxyu/pixel-nerf, section \"Getting the data\")"
SPLITS = "train", "val", "test"
VERSION = 1            # of the packed files: to be raised when their bytes change


# ---- batches -------------------------------------------------------------------------------------

@dataclass
class Views:
    """One split, all that a batch is cut from: M views of O objects."""
    images: torch.Tensor   # (M, 3, S, S) uint8, memory-mapped
    c2w: torch.Tensor      # (M, 4, 4) camera-to-world, OpenCV
    K: torch.Tensor        # (M, 4) fx fy cx cy in pixels; (M, 5): and the depth of the object
    start: torch.Tensor    # (O+1,) int64, stays on the CPU: object o owns views start[o]:start[o+1]
    names: list            # O names of objects
    meta: dict             # a row of DATASETS, and dataset split size procedural fingerprint root

    def __len__(self):
        return len(self.names)

    def to(self, device):
        return replace(self, images=self.images.to(device), c2w=self.c2w.to(device),
                       K=self.K.to(device))


def draw(views, batch, n_views, generator):
    """Random objects (B,) and V distinct random views of each (B, V), the first the source view."""
    first = views.start[:-1]                                                 # (O,)
    count = views.start.diff()                                               # (O,)
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


# ---- from a dataset's name to Views --------------------------------------------------------------

def prepare(dataset, root="data", size=128, n_train=200, n_test=24, seed=0, quiet=False,
            splits=SPLITS):
    """-> {split: Views} of the splits that are there. dataset: a name in DATASETS, or the path of a
    folder. If there are no cars, n_train + n_test procedural ones are made from the seed."""
    if min(size, n_train, n_test) < 1:
        fail(f"size {size}, {n_train} and {n_test} cars: each must be 1 or more")
    own = Path(root) / dataset
    folders, procedural = find(root, dataset)
    limits = {}
    if procedural or (dataset == "cars" and not folders and not any(own.glob("*/"))):
        said = (f"procedural cars in {own} (seed {seed}), not ShapeNet\n"
                f"      for the real ones {SOURCES} and unpack srn_cars.zip in {root}/")
        limits = dict(train=n_train, test=n_test)
    elif folders:
        where = folders[min(folders)].parent if dataset in DATASETS else Path(dataset).resolve()
        said = f"{Path(dataset).name} in {where}"
        if (own / "procedural.json").exists():
            said += "; the procedural ones beside it are not used"
    else:
        missing(root, dataset)
    if not quiet:
        print(f"data: {said}", flush=True)
    if limits:
        with disk(own):
            cars.generate(own, limits, seed, partial(parallel, quiet=quiet))
        folders, _ = find(root, dataset)
    return {split: load(root, dataset, split, size, limits.get(split), quiet) for split in folders
            if split in splits}


def load(root, dataset, split, size, limit=None, quiet=False):
    """One split's Views, its first `limit` objects; packs the split first if it is new."""
    folders, procedural = find(root, dataset)
    if split not in folders:
        missing(root, dataset)
    folder = folders[split]
    about = DATASETS.get(dataset, OWN)
    name = dataset
    if about is OWN:                                             # two folders may have one name
        folder = folder.resolve()
        name = f"{folder.name}_{zlib.crc32(str(folder).encode()):08x}"
    shared = [*folders.values()].count(folders[split]) > 1
    objects, left_out = list_objects(folder, split, shared)
    name = f"{name}_{split}_{size}_"
    stem = Path(root, ".cache", name + stamp(objects))
    found = open_pack(stem, size)
    if not found:
        for old in stem.parent.glob("*"):                        # packed before a file changed
            if old.name.startswith(name) and not old.name.startswith(stem.name):
                old.unlink(missing_ok=True)
        pack(stem, [(item, split, size, about) for item in objects], f"packing {folder}", quiet)
        found = open_pack(stem, size)
    images, side = found
    left_out += len(objects) - len(side["names"])
    if left_out and not quiet:
        print(f"data: {left_out} objects in {folder} are left out: named in its skip.txt, or "
              "cameras that are not finite")
    start = side["start"][:limit + 1 if limit else None]                     # (O+1,)
    M = start[-1]
    O = len(start) - 1
    tensors = map(torch.from_numpy, (images[:M], side["c2w"][:M], side["K"][:M], start))
    return Views(*tensors, side["names"][:O].tolist(), dict(
        dataset=dataset, split=split, size=size, **about, procedural=procedural,
        fingerprint=hashlib.sha256(side["checks"][:O].tobytes()).hexdigest()[:12],
        root=str(folder.parent)))


def read_object(folder, split, size, about):
    """All views of one object -> pixels (V, size, size, 3) uint8, c2w (V, 4, 4) float64, and
    K (V, 4 or 5) in pixels. about["background"] is the colour behind transparent pictures."""
    read = layout(folder, split) or read_srn
    with reading(folder, "an object that can be read"):
        c2w, K, pictures = read(Path(folder), split, about["background"])
        pixels = np.stack([resize(picture, size) for picture in pictures])   # (V, size, size, 3)
    K[:, :4] *= size
    return pixels, c2w, K


def centred(c2w, K, folder, size):
    """Your own pictures do not say where the object is, nor how large. Take its middle to be where
    the optical axes meet, and EXTENT to be what a picture shows there.
    c2w (V, 4, 4), K (V, 4) in pixels of size -> c2w (V, 4, 4), K (V, 5): the middle's depth is last.
    """
    axis = c2w[:, :3, 2]                                                     # (V, 3)
    eye = c2w[:, :3, 3]                                                      # (V, 3)
    across = np.eye(3) - axis[:, :, None] * axis[:, None]                    # (V, 3, 3)
    if np.linalg.eigvalsh(across.mean(0))[0] < 1e-3:
        fail(f"{folder}: its cameras all look the same way; pictures of an object from several "
             "sides are needed")
    middle = np.linalg.solve(across.sum(0), (across @ eye[:, :, None]).sum(0))[:, 0]    # (3,)
    depth = ((middle - eye) * axis).sum(1)                                   # (V,)
    if depth.min() <= 0:
        fail(f"{folder}: camera {depth.argmin()} looks away from where the others look; are "
             "the poses camera-to-world, with OpenGL's axes in transforms.json?")
    scale = EXTENT / (depth / K[:, 0] * size).mean()
    c2w = c2w.copy()
    c2w[:, :3, 3] = (eye - middle) * scale
    return c2w, np.c_[K, depth * scale]


# ---- one reader a layout -------------------------------------------------------------------------
# read(folder, split, background) -> c2w (V, 4, 4) as in OpenCV; K (V, 4 or 5), fx fy cx cy as
# fractions of the picture's side and, in CO3D, the depth of the object's middle; and an iterator of
# V square pictures (side, side, 3) uint8.

def read_srn(folder, split, background):
    """intrinsics.txt: f cx cy 0. / ... / height width. pose/*.txt: camera-to-world, row-major.
    rgb/*.png: composited already, their alpha is only the object's mask."""
    path = folder / "intrinsics.txt"
    what = "intrinsics, `f cx cy 0.` first and `height width` last, that fit together"
    values = numbers(path, what)
    f, cx, cy, *_, h, w = values if len(values) > 5 else [0] * 5
    if min(f, h, w) <= 0 or not (0 <= cx <= w and 0 <= cy <= h):
        fail(f"{path}: not {what}")
    names = sorted(p.stem for p in folder.glob("rgb/*.png"))
    poses = sorted(p.stem for p in folder.glob("pose/*.txt"))
    if names != poses or not names:
        odd = min({*names} ^ {*poses}, default="*")
        fail(f"{folder}: needs both rgb/{odd}.png and pose/{odd}.txt; unpack the object again or "
             "remove it")
    poses = [folder / "pose" / f"{name}.txt" for name in names]
    c2w = np.stack([rigid(numbers(p, "a pose"), p, "a pose") for p in poses])           # (V, 4, 4)
    K = np.tile([f / w, f / h, cx / w, cy / h], (len(names), 1))                        # (V, 4)

    def pictures():
        side = None
        for name in names:
            image = read_rgba(folder / "rgb" / f"{name}.png").convert("RGB")
            side = side or image.width
            if image.size != (side, side):
                fail(f"{folder}/rgb/{name}.png: {image.width} x {image.height} pixels; all of an "
                     f"object must be squares of one size, as its first is {side} wide")
            yield np.asarray(image)                                          # (side, side, 3)
    return c2w, K, pictures()


def read_nerf(folder, split, background):
    """transforms.json as NeRF, Blender and nerfstudio write it. Pictures are padded to squares."""
    path = folder / f"transforms_{split}.json"
    if not path.exists():
        path = folder / "transforms.json"
    with reading(path, "NeRF's transforms, a list `frames` with file_path and transform_matrix"):
        common = json.loads(path.read_text())
        frames = [{**common, **frame} for frame in common["frames"]]         # may override all
        names = [frame["file_path"] for frame in frames]
        files = [nerf_picture(path, name) for name in names]
    if not frames:
        fail(f"{path}: no frames in it; remove it, or write it again")
    c2w, K = zip(*[nerf_camera(path, *job) for job in zip(frames, files)])

    def pictures():
        for file in files:
            image = read_rgba(file)
            w, h = image.size
            side = max(w, h)
            square = Image.new("RGBA", (side, side))                         # transparent
            square.paste(image, ((side - w) // 2, (side - h) // 2))
            yield on_background(square, background)                          # (side, side, 3)
    return np.stack(c2w), np.stack(K), pictures()


def nerf_picture(path, name):
    """The picture that path, a transforms.json, calls `name`. It must lie in the same folder, which
    `stamp` looks through for changes."""
    if any(part[0] in "./" for part in Path(name).parts):
        fail(f"{path}: {name} is not below its folder; copy the pictures there")
    for end in ("", ".png", ".jpg", ".jpeg"):
        if (path.parent / (name + end)).is_file():
            return path.parent / (name + end)
    fail(f"{path.parent / name}: not there, but {path} names it; copy it again, or remove its frame")


def nerf_camera(path, frame, file):
    """-> c2w (4, 4), K (4,). A frame of transforms.json has camera-to-world with OpenGL's axes (y
    up, z backward), and focal lengths as fl_x, fl_y in pixels or as the angle camera_angle_x."""
    bent = [k for k in ("k1", "k2", "k3", "k4", "p1", "p2", "is_fisheye") if frame.get(k)]
    if bent:
        fail(f"{path}: its lens distorts ({bent[0]}), a pinhole camera is needed; undistort the "
             "pictures (colmap image_undistorter), or set it to 0 to ignore it")
    with reading(file, "a readable image"), Image.open(file) as image:
        w, h = image.size
        if image.getexif().get(0x0112, 1) != 1:
            raise ValueError("its EXIF orientation turns it, and its camera may be of either; save "
                             "it upright")
    with reading(path, f"a camera of {file}: transform_matrix, and fl_x or camera_angle_x"):
        wide = w / frame.get("w", w)                                         # of pictures resized
        high = h / frame.get("h", h)
        if "fl_x" in frame:
            fx = frame["fl_x"] * wide
            fy = frame.get("fl_y", frame["fl_x"]) * high
        else:
            fx = fy = w / 2 / math.tan(frame["camera_angle_x"] / 2)
        cx = frame["cx"] * wide if "cx" in frame else w / 2
        cy = frame["cy"] * high if "cy" in frame else h / 2
        matrix = np.array(frame["transform_matrix"], np.float64)             # (4, 4) or (3, 4)
        matrix = np.vstack([matrix, [0, 0, 0, 1]])[:4]                       # (4, 4)
        side = max(w, h)
        K = np.array([fx, fy, cx + (side - w) // 2, cy + (side - h) // 2]) / side       # (4,)
        if not (np.isfinite(K).all() and min(fx, fy) > 0):
            raise ValueError("a focal length that is not a positive number")
    return rigid(matrix, f"{path}: {file}", "a pose") * [1, -1, -1, 1], K


def read_co3d(folder, split, background):
    """As Splatter Image preprocesses CO3D: pictures and masks (V, c, S, S) in [0, 1] or as uint8;
    PyTorch3D's cameras, x_cam = x R + T with x left and y up, focal 1 for half a picture.
    A sequence whose cameras are not finite is returned as it is."""
    with reading(folder, "a sequence whose cameras can be read; it needs an entry in camera_Rs.npz "
                         "and camera_Ts.npz beside it: preprocess again, or name it in skip.txt"):
        R, T = (np.load(folder.parent / f"camera_{x}.npz")[folder.name] for x in ("Rs", "Ts"))
        R = R.reshape(-1, 3, 3)                                              # (V, 3, 3)
        V = len(R)
        T = T.reshape(V, 3)                                                  # (V, 3)
        f = np.load(folder / "focal_lengths.npy").reshape(V, -1)             # (V, 1 or 2)
        f = np.broadcast_to(f, (V, 2))                                       # (V, 2)
    c2w = np.tile(np.eye(4), (V, 1, 1))                                      # (V, 4, 4)
    c2w[:, :3, :3] = R * [-1, -1, 1]                           # to OpenCV's axes
    c2w[:, :3, 3] = -(R @ T[:, :, None])[:, :, 0]
    K = np.concatenate([f / 2, np.full_like(f, .5), T[:, 2:]], 1)            # (V, 5)
    if np.isfinite(c2w).all():
        for m in c2w:
            rigid(m, folder.parent / "camera_Rs.npz", f"a pose of {folder.name}")
    rgb = co3d_array(folder / "images_full.npy", V, (3,))                    # (V, 3, S, S)
    mask = co3d_array(folder / "images_fg.npy", V, (1, 3))                   # (V, 1 or 3, S, S)
    behind = np.float32(background)[:, None, None]                           # (3, 1, 1)

    def pictures():
        for x, m in zip(rgb, mask):
            x = x.astype(np.float32) / (255 if rgb.dtype == np.uint8 else 1)            # (3, S, S)
            m = m.astype(np.float32) / (255 if mask.dtype == np.uint8 else 1)           # (c, S, S)
            # three channels: the picture, masked already
            x = m if len(m) == 3 else m * x + (1 - m) * behind               # (3, S, S)
            yield (255 * x.clip(0, 1) + .5).astype(np.uint8).transpose(1, 2, 0)
    return c2w, K, pictures()


def co3d_array(path, V, channels):
    with reading(path, f"an array ({V}, {channels[0]}, S, S); preprocess the sequence again"):
        x = np.load(path, mmap_mode="r")                                     # (V, c, S, S)
        V_, c, h, w = x.shape
        if V_ != V or c not in channels or h != w:
            raise ValueError(f"of shape {x.shape}")
        return x


READERS = {   # by the file that only objects of this layout have
    "transforms_{split}.json": read_nerf,
    "transforms.json": read_nerf,
    "focal_lengths.npy": read_co3d,
    "intrinsics.txt": read_srn,
}


def layout(folder, split):
    """The reader of the object in this folder, or None if it is no object."""
    for name, read in READERS.items():
        if Path(folder, name.format(split=split)).exists():
            return read


def numbers(path, what):
    """All the numbers of a text file, finite."""
    with reading(path, what):
        values = np.array(path.read_text().split(), np.float64)
        if not np.isfinite(values).all():
            raise ValueError("not all numbers are finite")
        return values


def rigid(m, path, what):
    """m (16,) or (4, 4), if it is a rigid motion -> (4, 4)."""
    m = np.reshape(m, (4, 4)) if np.size(m) == 16 else np.zeros((4, 4))
    R = m[:3, :3]
    turns = abs(R @ R.T - np.eye(3)).max() < 1e-3 and np.linalg.det(R) > 0
    if not turns or not np.isfinite(m).all() or any(m[3] != [0, 0, 0, 1]):
        fail(f"{path}: not {what}: a rigid 4 x 4 camera-to-world of 16 numbers, the last row 0 0 0 1")
    return m


def read_rgba(path):
    """Any picture (grey, 16-bit, palette, transparent) -> RGBA image, upright as its EXIF says."""
    with reading(path, "a readable image"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                                       # 16-bit grey
            image = Image.fromarray((np.asarray(image) / 257 + .5).astype(np.uint8))
        return image.convert("RGBA")


def on_background(image, background):
    """RGBA image, its colours straight, not multiplied by alpha -> (h, w, 3) uint8."""
    behind = Image.new("RGBA", image.size, tuple(round(255 * c) for c in background))
    return np.asarray(Image.alpha_composite(behind, image).convert("RGB"))


def resize(pixels, size):
    """(side, side, 3) uint8 -> (size, size, 3). If a whole number of pixels becomes one, that is
    their mean, as a camera of that size would see them."""
    how = Image.Resampling.BOX if len(pixels) % size == 0 else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(pixels).resize((size, size), how))


# ---- find a dataset's folders and objects --------------------------------------------------------

def find(root, dataset):
    """-> {split: its folder}, is it procedural. The real set comes before the procedural one.
    A folder of your own that is not split stands for both of its splits."""
    root = Path(root)
    own = root / dataset
    if dataset not in DATASETS:
        return find_own(Path(dataset)), False
    if DATASETS[dataset] is CO3D:
        bases = [root / f"co3d_{dataset[:-1]}_for_gs", own]
    else:
        real = root / f"srn_{dataset}"
        bases = [real / real.name, real, root, own, own / dataset, own / real.name]
    for base in sorted(bases, key=lambda base: (base / "procedural.json").exists()):
        folders = {}
        for split in SPLITS:
            a = f"{dataset}_{split}"
            b = f"{dataset}_2.0_{split}"
            for folder in base / a / b, base / a, base / b, base / split:
                if folder.is_dir() and folder != root / split:      # that may be anyone's
                    folders.setdefault(split, folder)
        if folders:
            return folders, (base / "procedural.json").exists()
    return {}, (own / "procedural.json").exists()            # begun, but not one car made yet


def find_own(own):
    folders = {}
    if not any(layout(own, split) for split in SPLITS):             # itself an object
        folders = {split: folder for split in SPLITS
                   for folder in (*own.glob(f"*_{split}"), own / split) if folder.is_dir()}
    if "train" in folders or own.is_dir():
        whole = folders.get("train", own)
        folders = {"train": whole, "test": whole, **folders}
    return folders


def missing(root, dataset):
    if dataset not in DATASETS:
        fail(f"no dataset {dataset}: give one of {', '.join(DATASETS)}, or a folder of your own: "
             "<folder>/<object>/ with transforms.json and the pictures it names, or with "
             "intrinsics.txt, rgb/*.png and pose/*.txt")
    if DATASETS[dataset] is CO3D:
        fail(f"no {dataset} in {root}: expected {root}/co3d_{dataset[:-1]}_for_gs/{{train,test}}/"
             "<object>/{images_full,images_fg,focal_lengths}.npy and, beside the objects, "
             "camera_{Rs,Ts}.npz; get CO3D v2 (github.com/facebookresearch/co3d, CC BY-NC 4.0) and "
             "preprocess it as Splatter Image does (github.com/szymanowiczs/splatter-image)")
    fail(f"no {dataset} in {root}: expected {root}/srn_{dataset}/{dataset}_{{train,test}}/<object>/"
         f"{{intrinsics.txt, rgb/*.png, pose/*.txt}}; {SOURCES}, under ShapeNet's terms (research "
         f"only), and unpack srn_{dataset}.zip there")


def list_objects(folder, split, shared):
    """-> folders of a split's objects, and how many skip.txt leaves out. shared: the folder holds
    both splits. Then every tenth object is for testing; a single one is for both."""
    if layout(folder, split):
        return [folder], 0
    skip = folder / "skip.txt"
    skip = skip.read_text().split() if skip.exists() else []
    found = sorted(item for item in folder.iterdir() if item.is_dir() and item.name[0] != ".")
    kept = [item for item in found if item.name not in skip]
    left_out = len(found) - len(kept)
    if shared:
        kept = [item for item in kept if layout(item, split)]       # other folders may lie there
        test = kept[9::10] or kept[-1:]
        if len(kept) > 1:
            kept = [item for item in kept if (item in test) == (split == "test")]
    if not kept:
        fail(f"{folder}: no objects in it; unpack the split again or remove the empty folder")
    return kept, left_out


# ---- pack a split into two files -----------------------------------------------------------------

def pack(stem, jobs, title, quiet):
    """Write <stem>.u8, the pictures of all objects, and <stem>.npz, all else of `Views`."""
    rows = []
    with writing(f"{stem}.u8") as file:
        for pixels, *row in parallel(read_packed, jobs, title, quiet):
            file.write(pixels)
            if len(row[1]):
                rows.append(row)
        if not rows:
            fail(f"{title}: no object has finite cameras")
    names, c2w, K, checks = zip(*rows)
    start = np.cumsum([0, *map(len, c2w)])                                   # (O+1,)
    with writing(f"{stem}.npz") as file:
        np.savez(file, c2w=np.concatenate(c2w), K=np.concatenate(K), start=start, names=names,
                 checks=np.array(checks))


def read_packed(job):
    """-> the bytes of an object's pictures, its name, c2w, K, and a checksum. No views if its
    cameras are not finite."""
    folder, split, size, about = job
    pixels, c2w, K = read_object(*job)                                       # (V, size, size, 3)
    if not (np.isfinite(c2w).all() and np.isfinite(K).all()):
        return b"", folder.name, c2w[:0], K[:0], 0
    raw = pixels.transpose(0, 3, 1, 2).tobytes()                             # V x 3 x size x size
    check = zlib.crc32(raw, zlib.crc32(c2w.tobytes()))
    if about is OWN and K.shape[1] == 4:
        c2w, K = centred(c2w, K, folder, size)
    return raw, folder.name, c2w.astype(np.float32), K.astype(np.float32), check


def open_pack(stem, size):
    """-> pictures (M, 3, size, size) and a dict of the rest; None if they are not there, whole."""
    try:
        with np.load(f"{stem}.npz") as file:
            rest = dict(file)
        # "c", copy on write: torch wants writable memory, and the file must never change
        shape = (int(rest["start"][-1]), 3, size, size)
        return np.memmap(f"{stem}.u8", np.uint8, "c", shape=shape), rest
    except Exception:
        return None


def stamp(objects):
    """A short hash of the names, sizes and times of all files that the objects are read from."""
    def entries(folder):
        return [(e.name, entries(e)) if e.is_dir() else (e.name, *changed(e.stat()))
                for e in sorted(os.scandir(folder), key=lambda e: e.name) if e.name[0] != "."]

    def changed(info):
        return info.st_size, info.st_mtime_ns
    beside = sorted(objects[0].parent.glob("camera_?s.npz"))                 # of CO3D
    state = [(item.name, entries(item)) for item in objects]
    state += [(path.name, *changed(path.stat())) for path in beside]
    return hashlib.sha256(repr((VERSION, state)).encode()).hexdigest()[:12]


def parallel(function, jobs, title, quiet=False):
    """Yield function(job) for each job in order, computed on all cores; errors of workers are
    raised here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bar = partial(tqdm, desc=title, total=len(jobs), disable=quiet, leave=False)
    if min(cores, len(jobs) // 4) < 2:                     # too few to be worth the processes
        yield from bar(map(function, jobs))
        return
    kinds = multiprocessing.get_all_start_methods()        # fork itself would copy torch's threads
    context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
    pool = ProcessPoolExecutor(min(cores, 32), context, signal.signal,
                               (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from bar(pool.map(function, jobs))
    except BrokenProcessPool:
        fail(f"{title}: a worker process died, of what is said above or of lack of memory; a script "
             'that calls prepare must do so under `if __name__ == "__main__":`')
    finally:
        pool.shutdown(cancel_futures=True)


# ================ The idea ends here. Below: errors in one line, and the command. ================

@contextmanager
def reading(path, what):
    """Any error inside ends in one line that names the file."""
    try:
        yield
    except Exception as e:                               # Pillow raises whatever its decoders do
        fail(f"{path}: not {what} ({type(e).__name__}: {e})")


@contextmanager
def disk(path):
    """A full disk and Ctrl-C inside end in one line."""
    try:
        yield
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror or e}; free some disk space or choose another "
             "--root (links to datasets will do there)")
    except KeyboardInterrupt:
        fail(f"interrupted, {path} is not complete; start again to go on")


@contextmanager
def writing(path):
    """A file to write into. It appears under its name when it is whole, or never; a second process
    that writes the same has a file of its own."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def contact_sheet(splits, columns=10, rows=6):
    """A few objects of each split, one a row, views evenly apart -> an image."""
    lines = []
    for views in splits.values():
        for o in np.linspace(0, len(views) - 1, min(rows, len(views))).astype(int):
            first, end = views.start[o:o + 2].tolist()
            v = torch.linspace(first, end - 1, columns).long()
            lines.append(torch.cat(list(views.images[v]), -1))               # (3, S, 10 S)
    return Image.fromarray(torch.cat(lines, 1).permute(1, 2, 0).numpy())


def main():
    parser = argparse.ArgumentParser(description="Prepare a dataset and print what it holds.")
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
    with writing(path) as file:
        contact_sheet(splits).save(file, "png")
    print(path)


if __name__ == "__main__":
    main()
