"""One picture in; splats, turning views and files that other viewers open out.

    python sample.py car.png                       # any image; transparency is welcome
    python sample.py car.png --samples 8 --seed 1 --weights out/cars/stage_2.pt

writes out/car/sample.png (the input, then every sample from several sides), turntable.webp, and
one .ply a sample in the standard 3DGS layout. The same seed gives the same files. The image is
padded to a square, so the object should fill it about as the training pictures do.
"""
import argparse
import base64
import io
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

import data
from model import STEPS, Denoiser, S, load_network, pick_device, write_atomically
from rasterize import ALPHA_MIN, NEAR, Camera, Gaussians, invert_pose, render, transform


def pick_weights():
    """The newest student that train.py left in out/, else the one that comes with the code."""
    found = [*Path("out").glob("*/stage_2.pt"), *Path(__file__).parent.glob("weights/cars.pt")]
    if not found:
        data.fail("no weights: none in out/*/stage_2.pt or weights/; first: python train.py, or "
                  "name a file with --weights")
    return max(found, key=lambda path: (path.parts[0] == "out", path.stat().st_mtime))


def square(pixels, size, background):
    """(h, w, 3) uint8 padded to a square with the background, resized -> (1, 3, size, size)."""
    h, w, _ = pixels.shape
    side = max(h, w)
    canvas = np.full((side, side, 3), [round(255 * c) for c in background], np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    canvas[top: top + h, left: left + w] = pixels
    return torch.from_numpy(data.resize(canvas, size)).permute(2, 0, 1)[None] / 255


# ---- cameras -------------------------------------------------------------------------------------
# The splats live in the source camera's frame: x right, y down, z into the picture. How far that
# camera looks down is not known from one picture; `elevation` says, and only the turntable's axis
# and the upright .ply depend on it.

def pitch(elevation):
    """(4, 4) rotation about x: from the source camera's axes to level ones, y straight down."""
    c, s = math.cos(math.radians(elevation)), math.sin(math.radians(elevation))
    return torch.tensor([[1., 0, 0, 0], [0, c, s, 0], [0, -s, c, 0], [0, 0, 0, 1]])


def turn(angles, distance, elevation):
    """Cameras on a circle around the object, the source at angle 0: (V,) -> w2c (1, V, 4, 4)."""
    c, s, o = angles.cos(), angles.sin(), torch.zeros_like(angles)            # (V,)
    one = torch.ones_like(angles)
    spin = torch.stack([c, o, s, o, o, one, o, o, -s, o, c, o, o, o, o, one], -1).view(-1, 4, 4)
    centre = torch.eye(4)
    centre[2, 3] = distance                                                   # object -> source
    level = pitch(elevation)
    return (centre @ level.T @ spin @ level @ invert_pose(centre))[None]


# ---- .ply ----------------------------------------------------------------------------------------

PLY = [*"x y z nx ny nz f_dc_0 f_dc_1 f_dc_2".split(), *(f"f_rest_{i}" for i in range(45)),
       *"opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()]    # 62 properties


def ply_bytes(g):
    """Gaussians of one object (B = 1) -> a binary .ply as 3D Gaussian Splatting writes it: logit
    opacity, log scale, w x y z; f_rest holds 15 coefficients of red, then green, then blue."""
    N = g.xyz.shape[1]
    rest = torch.zeros(N, 3, 15, device=g.xyz.device)                         # degrees 1 to 3
    rest[:, :, : g.sh.shape[2] - 1] = g.sh[0, :, 1:].mT                       # we have degree 1
    opacity = g.opacity[0, :, None].clamp(1e-6, 1 - 1e-6)                     # (N, 1)
    columns = torch.cat([g.xyz[0], torch.zeros_like(g.xyz[0]), g.sh[0, :, 0], rest.flatten(1),
                         opacity.logit(), g.scale[0].log(), g.quat[0]], 1)    # (N, 62)
    header = "\n".join(["ply", "format binary_little_endian 1.0", f"element vertex {N}",
                        *(f"property float {name}" for name in PLY), "end_header\n"])
    return header.encode() + columns.cpu().numpy().astype("<f4").tobytes()


# ---- viewer.html ---------------------------------------------------------------------------------
# One page that a browser opens without a network: assets/viewer.html with the splats put in. Four
# samples of 16,384 splats with their 10 steps are 60 MB of float32; packed as below, a car is 3.

def quantise(steps):
    """Gaussians of the steps of one object, each (1, N, ..) -> (q, low, high).

    q (steps, 23, n) int32 in 0..65535 stands for low + q / 65535 (high - low); low, high (23,). Of
    the N splats n are kept, those that are drawn in some step. The 23 numbers: xyz, opacity, quat,
    log scale, 4 x rgb of SH, where degree 0 has zeros.
    """
    x = torch.stack([torch.cat([g.xyz[0], g.opacity[0, :, None], g.quat[0],
                                g.scale[0].clamp(min=1e-9).log(), g.sh[0].flatten(1)], 1)
                     for g in steps])                                         # (steps, N, 14 | 23)
    x = torch.nn.functional.pad(x, (0, 23 - x.shape[2]))                      # (steps, N, 23)
    drawn = (x[..., 3] >= ALPHA_MIN).any(0) & x.isfinite().all(2).all(0)      # (N,)
    x = x[:, drawn].mT.cpu()                                                  # (steps, 23, n)
    low, high = (x.amin((0, 2)), x.amax((0, 2))) if drawn.any() else torch.zeros(2, 23)
    unit = ((high - low) / 65535).clamp(min=1e-30)[:, None]                   # (23, 1)
    return ((x - low[:, None]) / unit).round().int().clamp(0, 65535), low, high


def viewer_html(title, picture, objects, look):
    """A page that shows splats from all sides -> str.

    picture: the input (PIL), or None. objects: {name: [Gaussians of every denoising step]}, each
    B = 1, upright: the object's middle at the origin, y straight down. look: distance of the
    camera, the elevation in degrees from which it first looks, focal = fx / side of the image,
    background (3,).
    """
    packed = []
    for name, steps in objects.items():
        q, low, high = quantise(steps)
        # The last step has 16 bits; the others 8, as differences to the step after them, which are
        # small numbers, so zlib packs them well.
        last_low = (q[-1:] & 255).numpy().astype(np.uint8)                    # (1, 23, n)
        backward = (q >> 8).flip(0).numpy().astype(np.uint8)                  # (steps, 23, n)
        change = np.diff(backward, axis=0)                                    # modulo 256
        stream = b"".join(map(np.ndarray.tobytes, (last_low, backward[:1], change)))
        packed.append(dict(name=name, n=q.shape[2], steps=len(q), low=low.tolist(),
                           high=high.tolist(),
                           data=base64.b64encode(zlib.compress(stream, 9)).decode()))
    if picture is not None:
        file, small = io.BytesIO(), picture.convert("RGB")
        small.thumbnail((512, 512))
        small.save(file, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    scene = dict(title=title, picture=picture, objects=packed, look={"near": NEAR, **look})
    # Inside <script> only "<" could end the text early; JSON has another spelling for it.
    text = json.dumps(scene).replace("<", "\\u003c")
    template = Path(__file__).parent / "assets" / "viewer.html"
    return template.read_text(encoding="utf-8").replace("{{scene}}", text)


# ---- the script ----------------------------------------------------------------------------------

def arguments():
    parser = argparse.ArgumentParser(description="Splats from one picture.")
    parser.add_argument("image", help="a picture of one object on a white or transparent ground")
    parser.add_argument("--weights", help="a stage_1.pt or stage_2.pt; default: the newest in out/")
    parser.add_argument("--out", help="folder of the results; default: out/<name of the picture>")
    parser.add_argument("--samples", type=int, default=4, help="how many; default 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"DDIM steps; default {STEPS}")
    parser.add_argument("--frames", type=int, default=36, help="of the turntable; default 36")
    parser.add_argument("--pixels", type=int, default=192, help="side of a rendering; default 192")
    parser.add_argument("--elevation", type=float, default=25.0,
                        help="degrees by which the picture looks down on the object; default 25")
    parser.add_argument("--device", default="", help="default: the GPU if there is one")
    return parser


@torch.no_grad()
def main():
    a = arguments().parse_args()
    for name in ("samples", "steps", "frames", "pixels"):
        if getattr(a, name) < 1:
            data.fail(f"--{name} {getattr(a, name)}: give 1 or more")

    a.device = pick_device(a.device)
    path = Path(a.weights) if a.weights else pick_weights()
    denoiser, meta = load_network(path, Denoiser, a.device)
    kind = "procedural" if meta["data"]["procedural"] else "real"
    print(f"weights: {path} ({meta['dataset']}, {kind}, {denoiser.cfg.size} pixels)")
    size, background = denoiser.cfg.size, torch.tensor(meta["background"], device=a.device)
    picture = data.read_picture(Path(a.image), meta["background"])            # (h, w, 3)
    x_src = square(picture, size, meta["background"]).to(a.device)            # (1, 3, size, size)

    eps = torch.randn(a.samples, S, size, size, generator=torch.Generator().manual_seed(a.seed))
    s = denoiser.sample(x_src.expand(a.samples, -1, -1, -1), eps.to(a.device), a.steps)
    K = torch.tensor([meta["K"]], device=a.device)                            # (1, 4) pixels
    g = denoiser.gaussians(s, K.expand(a.samples, 4))                         # (samples, N, ..)

    distance = (denoiser.cfg.near + denoiser.cfg.far) / 2                     # object's middle
    def look(angles):
        """(V,) radians -> (samples, V, pixels, pixels, 3) uint8."""
        w2c = turn(angles, distance, a.elevation).to(a.device).expand(a.samples, -1, -1, -1)
        big = (K * a.pixels / size).expand(a.samples, len(angles), 4)
        x_hat, _, _ = render(g, Camera(w2c, big, (a.pixels, a.pixels)), background)
        return (x_hat.clamp(0, 1) * 255 + 0.5).byte().permute(0, 1, 3, 4, 2).cpu().numpy()

    out = Path(a.out or Path("out") / Path(a.image).stem)
    def save(name, write):
        write_atomically(out / name, write)
        return out / name

    views = look(torch.arange(5) * 2 * math.pi / 5)                         # (samples, 5, P, P, 3)
    shown = Image.fromarray((x_src[0] * 255 + 0.5).byte().permute(1, 2, 0).cpu().numpy())
    shown = np.asarray(shown.resize((a.pixels, a.pixels), Image.Resampling.BICUBIC))   # (P, P, 3)
    rows = [np.concatenate([shown, *row], 1) for row in views]                # (P, 6 P, 3) each
    files = [save("sample.png", lambda f: Image.fromarray(np.concatenate(rows)).save(f, "PNG"))]

    frames = []
    for angle in torch.arange(a.frames) * 2 * math.pi / a.frames:
        frames.append(Image.fromarray(np.concatenate(list(look(angle[None])[:, 0]), 1)))
    ending = "webp" if features.check("webp") else "gif"
    files.append(save(f"turntable.{ending}", lambda f: frames[0].save(
        f, ending.upper(), save_all=True, append_images=frames[1:], duration=80, loop=0)))

    middle = torch.eye(4)
    middle[2, 3] = -distance
    upright = transform(g, (pitch(a.elevation) @ middle).to(a.device).expand(a.samples, 4, 4))
    for k in range(a.samples):
        one = Gaussians(*[x[k: k + 1] for x in upright])
        files.append(save(f"sample_{k}.ply", lambda f: f.write(ply_bytes(one))))
    print(f"{a.samples} samples of {g.xyz.shape[1]:,} splats, seed {a.seed}:", *files)


if __name__ == "__main__":
    main()
