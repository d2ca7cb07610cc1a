"""Multi-view pictures of objects and scenes with their cameras: folders in, batches out.

    <root>/srn_cars/cars_<split>/<object>/{intrinsics.txt, rgb/000000.png, pose/000000.txt}
    <root>/co3d_hydrant_for_gs/<split>/<object>/{images_fg, focal_lengths}.npy
    <root>/re10k/<split>/<clip>.txt and <clip>/<timestamp>.jpg, as RealEstate10K: scenes
    path/to/your/own/<object>/{transforms.json and the pictures it names, or the files of SRN}

`prepare` finds a dataset, packs the pictures of each split into one memory-mapped uint8 file, and
returns its `Views`; `draw` and `gather` cut batches from them, so training decodes no picture. A
clip counts as an object; all that differs in scenes is in their rows of DATASETS.
Nothing is downloaded: if there are no cars, toys/cars.py makes procedural ones in SRN's layout.

    python data.py cars --size 128                             # prepare, print what is there
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from rasterize import Camera, fail, reading
from toys import cars, rooms

# Settings of each dataset, as in Splatter Image:
#   near, far    range of the splats' depths, world units; if the distance of the object differs
#                between views (CO3D, your own), relative to the object's middle: Views.K, column 4
#   background   rgb
#   source       the view of a test object that is the input; all others are targets
#   iters        steps of the teacher, for --paper
# For scenes:
#   aspect       width / height of the pictures; 1 for objects
#   window       targets are at most this many frames from the source; for objects, all views
#   log_depth    depth = near (far / near)^sigmoid
#   pad          the splat image is larger than the picture by this part of H on each side
ON_WHITE = (1., 1., 1.)
CO3D = dict(near=-2.0, far=2.0, background=(0., 0., 0.), source=0, iters=900_001)
# In the unit of `read_clip`, corners triangulated in real clips have depths from 1.6 to 20. Such
# corners miss what is nearest and farthest, hence more room.
SCENE = dict(near=0.5, far=50.0, background=(.5, .5, .5), iters=500_001, aspect=1.5, window=30,
             log_depth=True, pad=1 / 8)
DATASETS = {
    "cars": dict(near=0.80, far=1.80, background=ON_WHITE, source=cars.SOURCE, iters=900_001),
    "chairs": dict(near=1.25, far=2.75, background=ON_WHITE, source=64, iters=1_000_001),
    "hydrants": CO3D, "teddybears": CO3D, "re10k": SCENE, "rooms": SCENE,
}
PLACES = dict(cars="srn_cars/cars_", chairs="srn_chairs/chairs_", hydrants="co3d_hydrant_for_gs/",
              teddybears="co3d_teddybear_for_gs/", re10k="re10k/", rooms="rooms/")
TOYS = dict(cars=cars, rooms=rooms)                                  # procedural datasets
OWN = dict(CO3D, near=-0.5, far=0.5, background=ON_WHITE)            # a folder of your own
EXTENT = 1.27          # world units across a picture at the object's distance, as in SRN's cars
SPLITS = "train", "val", "test"
# transforms.json: camera models that are pinholes if no coefficient distorts; fields of nerfstudio
# and instant-ngp that, if not 0, change rays, poses or colours. The others are used or harmless.
PINHOLES = "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV"
REFUSED = re.compile("[kps]\\d*|(distortion|ftheta|rolling_shutter|intrinsic|transform_matrix_).*|"
                     ".*_transparent|mask_.*|is_fisheye|latlong|equirectangular|from_na|._fov")
VERSION = 3            # of the packed files: to be raised when their bytes change


# ---- batches -------------------------------------------------------------------------------------

@dataclass
class Views:
    """One split, all that a batch is cut from: M views of O objects."""
    images: torch.Tensor   # (M, 3, H, W) uint8, memory-mapped
    c2w: torch.Tensor      # (M, 4, 4) camera-to-world, OpenCV
    K: torch.Tensor        # (M, 4) fx fy cx cy in pixels; (M, 5): and the depth of the object
    start: torch.Tensor    # (O+1,) int64, stays on the CPU: object o owns views start[o]:start[o+1]
    names: list            # O names of objects
    meta: dict   # a row of DATASETS; dataset split hw procedural fingerprint root listed

    def __len__(self):
        return len(self.names)

    def to(self, device):
        return replace(self, images=self.images.to(device), c2w=self.c2w.to(device),
                       K=self.K.to(device))


def draw(views, batch, n_views, generator):
    """Random objects (B,), V random views of each (B, V), source first; repeats if it has fewer. If
    the dataset has a window, the others are at most that many frames from the source."""
    first = views.start[:-1]                                                 # (O,)
    count = views.start.diff()                                               # (O,)
    objects = torch.randint(len(views), (batch,), generator=generator)       # (B,)
    order = torch.rand(batch, int(count.max()), generator=generator)         # (B, most views)
    frame = torch.arange(order.shape[1])                                     # (most views,)
    own = frame < count[objects, None]                                       # (B, most views)
    source = order.masked_fill(~own, 2).argmin(1, keepdim=True)              # (B, 1)
    own &= (frame - source).abs() <= views.meta.get("window", math.inf)      # (B, most views)
    order = order.masked_fill(~own, 2).argsort(1)                            # own views first
    pick = torch.arange(n_views) % own.sum(1, keepdim=True)                  # too few: again
    return objects, first[objects, None] + order.gather(1, pick)             # (B,) (B, V)


def gather(views, index):
    """(B, V) -> images (B, V, 3, H, W) in [0, 1] and cameras relative to each first view."""
    x = views.images[index].float() / 255                                    # (B, V, 3, H, W)
    R, t = views.c2w[index, :3].split([3, 1], -1)                            # (B, V, 3, 3 and 1)
    w2c = torch.eye(4, device=R.device).repeat(*index.shape, 1, 1)           # (B, V, 4, 4)
    # inv(c2w) @ c2w_src = R^T [R_src | t_src - t]; summed by hand, as TF32 would round it
    move = torch.cat([R[:, :1].expand_as(R), t[:, :1] - t], -1)              # (B, V, 3, 4)
    w2c[:, 1:, :3] = (R.mT[..., None] * move[..., None, :, :]).sum(-2)[:, 1:]
    return x, Camera(w2c, views.K[index], tuple(x.shape[-2:]))


# ==== The lesson ends here. Below: from a dataset's name to Views. ================================

def prepare(dataset, root="data", size=128, n_train=200, n_test=24, seed=0, splits=SPLITS):
    """-> {split: Views} of the splits that are there. dataset: a name in DATASETS, or the path of a
    folder. If there are no TOYS of that name, n_train + n_test are made from the seed."""
    folders = find(root, dataset)
    limits = {}
    if dataset in TOYS and all((x.parent / "procedural.json").exists() for x in folders.values()):
        limits = dict(train=n_train, test=n_test)
        TOYS[dataset].generate(Path(root, dataset), limits, seed, parallel)
        folders = find(root, dataset)
    said = f" (procedural, seed {seed}, not real data)" if limits else ""
    print(f"data: {Path(dataset).name} in {min(folders.values()).parent}{said}", flush=True)
    views = {split: load(root, dataset, split, size, limits.get(split)) for split in folders
             if split in splits}
    for split, part in views.items():
        print(f"{split:>9}: {len(part)} objects, {len(part.images)} views")
    return views


def load(root, dataset, split, size, limit=None):
    """Views of a split's first `limit` objects; packs them first if they are new. The packs in
    <root>/.cache may be deleted at any time."""
    folders = find(root, dataset)
    folder = folders[split]
    about = DATASETS.get(dataset, OWN)
    listed = read_list(clip_file(folder)) if "window" in about else {}
    objects = list_objects(folders, split)
    objects = [x for x in objects if x.name in listed or not listed][:limit]
    if not objects:
        fail(f"{folder}: no object is left; does {clip_file(folder)} name others?")
    hw = size, round(size * about.get("aspect", 1))
    used = *objects, *sorted(folder.glob("camera_?s.npz")), *map(clip_file, objects)
    stamp = repr((VERSION, about, [files_of(os.path.realpath(path)) for path in used]))
    stamp = hashlib.sha256(stamp.encode()).hexdigest()[:12]
    stem = Path(root, ".cache", f"{Path(dataset).name}_{split}_{size}_{stamp}")
    if not read_pack(stem, hw):
        pack(stem, objects, split, hw, about)
    *arrays, checks = read_pack(stem, hw)
    _, _, K, start = arrays
    names = [item.name for item in objects]
    for name, frames in zip(names, np.diff(start)):
        if not all(0 <= frame < frames for frame in listed.get(name, ())):
            fail(f"{clip_file(folder)}: {name} has {frames} frames, the list names {listed[name]}")
    return Views(*map(torch.from_numpy, arrays), names, dict(
        dataset=dataset, split=split, hw=hw, **about, root=str(folder.parent),
        procedural=dataset in TOYS and (folder.parent / "procedural.json").exists(),
        fingerprint=hashlib.sha256(checks.tobytes() + K.tobytes()).hexdigest()[:12], listed=listed))


def read_object(folder, split, hw, background):
    """All views of one object -> pixels (V, H, W, 3) uint8, c2w (V, 4, 4) float64, and K (V, 4 or
    5) in pixels. The background is the colour behind transparent pictures."""
    with reading(folder, "an object that can be read"):
        read = layout(folder, split)
        views = [(c2w, K, resize(picture, hw)) for c2w, K, picture in read(background)]
        c2w, K, pixels = map(np.stack, zip(*views))
    K[:, :4] *= hw[::-1] * 2                                                 # W H W H
    return pixels, c2w, K


def centred(c2w, K, folder, size):
    """In your own pictures the object's place and size are unknown. Its middle is taken to be the
    point nearest to all optical axes; the world is scaled so that pictures show EXTENT there. c2w
    (V, 4, 4), K (V, 4) in pixels -> c2w (V, 4, 4), K (V, 5): the depth of the middle is last."""
    axis = c2w[:, :3, 2]                                                     # (V, 3)
    eye = c2w[:, :3, 3]                                                      # (V, 3)
    across = np.eye(3) - axis[:, :, None] * axis[:, None]                    # (V, 3, 3)
    if np.linalg.eigvalsh(across.mean(0))[0] < 1e-3:
        fail(f"{folder}: its cameras all look the same way; pictures from several sides are needed")
    middle = np.linalg.solve(across.sum(0), (across @ eye[:, :, None]).sum(0))[:, 0]    # (3,)
    depth = ((middle - eye) * axis).sum(1)                                   # (V,)
    if depth.min() <= 0:
        fail(f"{folder}: camera {depth.argmin()} looks away from where the others look; are the "
             "poses camera-to-world, with OpenGL's axes in transforms.json?")
    scale = EXTENT / (depth / K[:, 0] * size).mean()
    c2w = c2w.copy()
    c2w[:, :3, 3] = (eye - middle) * scale
    return c2w, np.c_[K, depth * scale]


# ---- one reader a layout -------------------------------------------------------------------------
# read(path, background), of the file that `layout` looks for, yields an object's views: c2w (4, 4)
# as in OpenCV; K (4 or 5,), fx fy cx cy as fractions of width and height and, in CO3D, the depth
# of the object's middle; and a picture (h, w, 3) uint8, square but in clips.

def read_srn(path, background):
    """intrinsics.txt: f cx cy 0. / ... / height width. pose/*.txt: camera-to-world, row-major.
    rgb/*.png: composited already, their alpha is only the object's mask."""
    folder = path.parent
    with reading(path, "intrinsics, `f cx cy 0.` first and `height width` last"):
        f, cx, cy, *_, h, w = numbers(path).tolist()
        K = pinhole([f / w, f / h, cx / w, cy / h], path)                    # (4,)
    files = *folder.glob("rgb/[!.]*.png"), *folder.glob("pose/[!.]*.txt")     # macOS adds ._*
    for stem in sorted({file.stem for file in files if file.is_file()}):
        file = folder / f"rgb/{stem}.png"
        pose = folder / f"pose/{stem}.txt"
        image = read_rgba(file)
        if image.width != image.height or w != h:
            fail(f"{file}: {image.size} pixels, {path} says {w} x {h}, but it must be square")
        yield rigid(numbers(pose), pose), K, np.asarray(image.convert("RGB"))


def read_nerf(path, background):
    """transforms.json as NeRF, Blender and nerfstudio write it. Pictures are padded to squares."""
    with reading(path, "NeRF's transforms: file_path, transform_matrix, fl_x or camera_angle_x"):
        common = json.loads(path.read_text())
        for frame in common["frames"]:
            yield nerf_frame(path, {**common, **frame}, background)


def nerf_frame(path, frame, background):
    """One frame -> c2w, K, picture. In the file c2w has OpenGL's axes: y up, z backward."""
    name = Path(frame["file_path"])
    if any(part[0] in "./" for part in name.parts):            # `load` looks only below it
        fail(f"{path}: {name} is not below this folder; copy it there")
    file = path.parent / (name if name.suffix else f"{name}.png")    # Blender leaves .png out
    odd = [key for key, value in frame.items() if REFUSED.fullmatch(key) and np.any(value)]
    model = frame.get("camera_model", "PINHOLE")
    if odd or model not in PINHOLES:
        fail(f"{path}: {odd or model} cannot be used: undistort the pictures (colmap "
             "image_undistorter), cut the object out by transparency, give plain poses and colours")
    image = read_rgba(file)
    if Image.open(file).getexif().get(0x0112, 1) != 1:
        fail(f"{file}: EXIF turns it, its camera may be of either; save it upright")
    w, h = frame.get("w", image.width), frame.get("h", image.height)
    if not abs(w * image.height - h * image.width) < max(w, h):    # within a pixel: may be resized
        fail(f"{file}: {image.size} pixels, but {path} says w {w}, h {h}, of another shape")
    fx = focal_length(frame, "x", w)
    fy = focal_length(frame, "y", h) or fx
    cx = frame.get("cx", w / 2)
    cy = frame.get("cy", h / 2)
    K = pinhole([fx / w, fy / h, cx / w, cy / h], path)                      # (4,)
    size = np.array(image.size)                                              # (2,) w h
    side = size.max()
    pad = (side - size) // 2                                                 # (2,) left and above
    K = (K * [*size, *size] + [0, 0, *pad]) / side                           # (4,)
    square = image.crop((*-pad, *side - pad))                                # transparent beside it
    c2w = rigid(frame["transform_matrix"], f"{path}: {file}") * [1, -1, -1, 1]          # (4, 4)
    return c2w, K, on_background(square, background)


def focal_length(frame, axis, side):
    """In pixels: fl_x, or from the angle camera_angle_x in radians; None if neither is there."""
    angle = frame.get(f"camera_angle_{axis}")
    by_angle = angle and side / 2 / math.tan(min(angle, math.pi) / 2)        # 0 from degrees
    f = frame.get(f"fl_{axis}", by_angle)
    if angle and abs(f - by_angle) > 0.01 * f:
        raise ValueError(f"camera_angle_{axis} and fl_{axis} disagree")
    return f


def read_co3d(path, background):
    """As Splatter Image preprocesses CO3D: pictures on black, in [0, 1]; PyTorch3D's cameras,
    x_cam = x R + T with x left and y up, focal 1 for half a picture."""
    folder = path.parent
    with reading(folder, "a sequence as Splatter Image preprocesses it"):
        R = np.load(folder.parent / "camera_Rs.npz")[folder.name].reshape(-1, 3, 3)    # (V, 3, 3)
        T = np.load(folder.parent / "camera_Ts.npz")[folder.name].reshape(-1, 3, 1)    # (V, 3, 1)
        K = np.full((len(R), 5), .5)                                         # (V, 5)
        K[:, :2] = np.load(path).reshape(len(R), -1) / 2                     # (V, 1 or 2)
        K[:, 4] = T[:, 2, 0]
    file = folder / "images_fg.npy"
    with reading(file, f"an array ({len(R)}, 3, S, S) from 0 to 1"):
        pictures = np.load(file)                                             # (V, 3, S, S)
        shape, low, high = pictures.shape, pictures.min(), pictures.max()
        if shape != (len(R), 3, *shape[2:3] * 2) or not -.01 < low <= high < 1.01:
            raise ValueError(f"{shape}, from {low:g} to {high:g}")
    c2w = np.concatenate([R * [-1, -1, 1], -R @ T], 2)                       # (V, 3, 4), OpenCV
    pinhole(K[:, :4], path)
    for m, k, x in zip(c2w, K, pictures):
        m = rigid([*m.ravel(), 0, 0, 0, 1], f"{folder.parent}/camera_Rs.npz: {folder.name}")
        picture = (255 * x.clip(0, 1) + .5).astype(np.uint8)                 # (3, S, S)
        yield m, k, picture.transpose(1, 2, 0)


def read_clip(path, background):
    """RealEstate10K: the video's address, then a line for each frame: its time, fx fy cx cy as
    fractions of width and height, 0 0, and world-to-camera (3, 4). Ours: scaled so that the root
    mean square distance of the cameras from their mean is 1; there are no points to scale by."""
    with reading(path, "a clip: an address, then 19 numbers a frame"):
        lines = [line.split() for line in path.read_text().splitlines()[1:] if line.strip()]
        rows = np.array([line[1:] for line in lines], np.float64).reshape(len(lines), 18)  # (V, 18)
    K = pinhole(rows[:, :4], path)                                           # (V, 4)
    w2c = [rigid([*row[6:], 0, 0, 0, 1], f"{path}: {time}")                  # (4, 4) each
           for (time, *_), row in zip(lines, rows)]
    c2w = np.linalg.inv(w2c)                                                 # (V, 4, 4)
    away = c2w[:, :3, 3] - c2w[:, :3, 3].mean(0)                             # (V, 3)
    spread = np.sqrt((away ** 2).sum(1).mean())
    if spread > 1e-6:                                          # else the camera only turns
        c2w[:, :3, 3] /= spread
    for (time, *_), m, k in zip(lines, c2w, K):
        png = path.with_suffix("") / f"{time}.png"
        file = png if png.exists() else png.with_suffix(".jpg")
        yield m, k, on_background(read_rgba(file), background)


def read_list(path):
    """Flash3D's test list, rows `clip source 5 10 random` of frame numbers, if it is there ->
    {clip: the four numbers in its first row}. Flash3D scores all rows of a clip, up to five."""
    with reading(path, "Flash3D's list: clip, source, three targets"):
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return {clip: (int(source), int(five), int(ten), int(random))
                for clip, source, five, ten, random in reversed(rows)}    # the first row stays


def clip_file(folder):
    """The text file beside the folder of a clip, or, a list of clips, beside that of a split."""
    return folder.parent / f"{folder.name}.txt"


def layout(folder, split):
    """The reader of the object in this folder, by a file of its layout; None if it is no object."""
    for name, read in {f"transforms_{split}.json": read_nerf, "transforms.json": read_nerf,
                       "focal_lengths.npy": read_co3d, "intrinsics.txt": read_srn}.items():
        if (folder / name).exists():
            return partial(read, folder / name)
    if clip_file(folder).exists() and any(folder.glob("[!.]*.[jp][pn]g")):
        return partial(read_clip, clip_file(folder))


def numbers(path):
    """All the numbers of a text file."""
    with reading(path, "numbers"):
        return np.array(path.read_text().split(), np.float64)


def pinhole(K, path):
    """K (..., 4), fx fy cx cy as fractions of the picture, if a pinhole camera can have it."""
    K = np.array(K, np.float64)
    focal = K[..., :2]
    middle = K[..., 2:]
    if not ((.1 < focal) & (focal < np.inf) & (0 <= middle) & (middle <= 1)).all():
        fail(f"{path}: no focal length above a tenth of the picture, or principal point outside")
    return K


def rigid(m, path):
    """m (16,) or (4, 4), if it is a rigid motion -> (4, 4)."""
    with reading(path, "a pose: a rigid 4 x 4 camera-to-world of 16 numbers, last row 0 0 0 1"):
        m = np.array(m, np.float64).reshape(4, 4)
        R = m[:3, :3]
        turns = abs(R @ R.T - np.eye(3)).max() < 1e-3 and np.linalg.det(R) > 0
        if not (turns and np.isfinite(m).all() and (m[3] == [0, 0, 0, 1]).all()):
            raise ValueError("is not rigid")
        return m


def read_rgba(path):
    """A picture -> RGBA image, upright as its EXIF says. Of 16-bit colours Pillow keeps 8 bits."""
    # not by its name: Pillow would map a TIFF into memory, and then turn it wrongly
    with reading(path, "a readable image"), open(path, "rb") as file, Image.open(file) as image:
        # Pillow would clip 16-bit grey; it gives a PNG's transparent colour in the file's units
        keyed = "transparency" in image.info and image.tile[0][3]
        if image.mode[0] in "IF" or keyed in ("L;2", "L;4", "RGB;16B"):
            raise ValueError("not 8 bits a channel; save it with 8")
        return ImageOps.exif_transpose(image).convert("RGBA")


def on_background(image, background):
    """RGBA image, its colours straight, not multiplied by alpha -> (h, w, 3) uint8."""
    behind = Image.new("RGBA", image.size, tuple(round(255 * c) for c in background))
    return np.asarray(Image.alpha_composite(behind, image).convert("RGB"))


def resize(pixels, hw):
    """(h, w, 3) uint8 -> (H, W, 3). If whole pixels become one, it is their mean."""
    how = Image.LANCZOS if np.mod(pixels.shape[:2], hw).any() else Image.BOX
    return np.array(Image.fromarray(pixels).resize(hw[::-1], how))


# ---- find the objects, pack them, the command ----------------------------------------------------

def find(root, dataset):
    """-> {split: its folder}. A folder of your own that is not split stands for both splits."""
    def splits(place):
        return {split: Path(place + split) for split in SPLITS if Path(place + split).is_dir()}
    if dataset in DATASETS:
        real = f"{root}/{PLACES[dataset]}"
        found = splits(real) or splits(f"{root}/{dataset}/{dataset}_")       # procedural cars
        if dataset not in TOYS and not found:
            fail(f"no {dataset}: expected {real}{{train,test}}/<object>/; see README.md")
        return found
    own = Path(dataset)
    if not own.is_dir():
        fail(f"no dataset {dataset}: give {', '.join(DATASETS)}, or a folder with objects")
    found = {} if any(layout(own, split) for split in SPLITS) else splits(f"{own}/")
    whole = found.get("train", own)
    return {"train": whole, "test": whole, **found}


def list_objects(folders, split):
    """The folders of a split's objects. If one folder stands for two splits, every tenth object is
    for testing, a single one for both."""
    folder = folders[split]
    if layout(folder, split):                                  # itself an object
        return [folder]
    found = sorted([*folder.glob("[!.]*"), *folder.glob("chairs_2.0_*/[!.]*")])
    found = [x for x in found if layout(x, split)]             # there may be others
    # CO3D: only finite cameras. Splatter Image also leaves out what its bad_sequences.py names.
    for path in folder.glob("camera_?s.npz"):
        with reading(path, "cameras of sequences"), np.load(path) as cameras:
            found = [x for x in found if np.isfinite(cameras.get(x.name, math.nan)).all()]
    if not found:
        fail(f"{folder}: no objects with cameras in it: transforms.json, or intrinsics.txt with "
             "pose/ and rgb/, or CO3D's focal_lengths.npy, or <clip>.txt beside <clip>/*.jpg")
    if list(folders.values()).count(folder) > 1:
        test = found[9::10] or found[-1:]
        found = test if split == "test" else [x for x in found if x not in test] or test
    return found


def pack(stem, objects, split, hw, about):
    """Write <stem>.u8, the pictures, and <stem>.npz, all else; named so when they are whole."""
    read = partial(read_object, split=split, hw=hw, background=about["background"])
    title = f"packing {stem.name}"
    rows = []
    with reading(f"{stem}.u8", "written: free some space, or give another --root"):
        stem.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=stem.parent) as own:
            with open(f"{own}/new.u8", "wb") as file:
                for (pixels, c2w, K), folder in zip(parallel(read, objects, title), objects):
                    pictures = pixels.transpose(0, 3, 1, 2).tobytes()        # V x 3 x H x W
                    check = zlib.crc32(pictures, zlib.crc32(c2w.tobytes()))
                    if about is OWN and K.shape[1] == 4:
                        c2w, K = centred(c2w, K, folder, hw[0])
                    file.write(pictures)
                    rows.append((c2w, K, check))
                file.flush()
                os.fsync(file.fileno())         # before the .npz beside it says that it is whole
            c2w, K, checks = zip(*rows)
            np.savez(f"{own}/new.npz", c2w=np.concatenate(c2w, dtype=np.float32),
                     K=np.concatenate(K, dtype=np.float32), checks=checks,
                     start=np.cumsum([0, *map(len, c2w)]))                   # (O+1,)
            for kind in "u8", "npz":
                os.replace(f"{own}/new.{kind}", f"{stem}.{kind}")


def read_pack(stem, hw):
    """-> images, c2w, K, start and checksums that `pack` wrote; None if not all is there."""
    try:
        with np.load(f"{stem}.npz") as file:
            arrays = [file[name] for name in ("c2w", "K", "start", "checks")]
        # "c", copy on write: torch wants writable memory, and the file must never change
        shape = len(arrays[0]), 3, *hw
        return np.memmap(f"{stem}.u8", np.uint8, "c", shape=shape), *arrays
    except Exception:                                          # zipfile raises many
        return None


def files_of(path):
    """Names, sizes and times of all files below a path."""
    if os.path.isdir(path):
        return [files_of(f"{path}/{name}") for name in sorted(os.listdir(path)) if name[0] != "."]
    if os.path.exists(path):                                   # a link may lead nowhere
        info = os.stat(path)
        return path, info.st_size, info.st_mtime_ns


def parallel(function, jobs, title):
    """Yield function(job) of each job in order, computed on all cores. An error ends them all."""
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    context = multiprocessing.get_context("forkserver" if linux else "spawn")
    context.set_forkserver_preload(["torch"])                  # imported once, not by each process
    deaf = signal.signal, (signal.SIGINT, signal.SIG_IGN)      # to Ctrl-C, which ends the parent
    with reading(title, "done"), ProcessPoolExecutor(min(cores, 32), context, *deaf) as pool:
        run = map if len(jobs) < 8 else pool.map               # fewer are not worth the processes
        yield from tqdm(run(function, jobs), title, len(jobs), leave=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare a dataset and print what it holds.")
    parser.add_argument("dataset", help=f"{', '.join(DATASETS)}, or path/to/your/own")
    for flag, default in dict(root="data", size=128, n_train=200, n_test=24, seed=0).items():
        parser.add_argument(f"--{flag}", default=default, type=type(default))
    try:
        prepare(**vars(parser.parse_args()))
    except (KeyboardInterrupt, OSError) as e:                  # Ctrl-C says nothing
        fail(str(e) or "stopped; the same command goes on")
