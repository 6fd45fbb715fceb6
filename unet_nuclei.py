"""Find and separate every nucleus in fluorescence images with a U-Net, in one file.

    python unet_nuclei.py --boundary --epochs 10            # train and score: three classes, watershed
    python unet_nuclei.py                                   # the simpler model: foreground, connected components
    python unet_nuclei.py --boundary --data synthetic       # without a download
    python unet_nuclei.py --checkpoint runs/boundary/model.pt --predict FOLDER     # segment your own images
    torchrun --nproc-per-node 2 unet_nuclei.py --boundary   # on two GPUs

Ten epochs at --width 16 take 6 to 12 minutes on two CPU cores with bf16, 29 or more without. On 44 test images of the Data
Science Bowl 2018 (2,426 nuclei), the mean F1 at IoU 0.5 is then 0.92, the AP 0.855 to 0.861; more in README.md.

Pasted into a notebook cell, the file defines its functions and waits; in the next cell,
`main(["--boundary", "--epochs", "10"])` trains. Needs torch, numpy, scikit-image, scipy and imageio.
"""
import argparse
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage.draw import ellipse
from skimage.measure import label
from skimage.segmentation import relabel_sequential, watershed
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

# ---------------------------------------------------------------- settings
DATA_URL = "https://github.com/stardist/stardist/releases/download/0.1.0/dsb2018.zip"
DATA_SHA256 = "e44921950edce378063aa4457e625581ba35b4c2dbd9a07c19d48900129f386f"
KAGGLE_INPUT = Path("/kaggle/input")
SUFFIXES = {".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp"}
OUTPUTS = ("model.pt", "last.pt", "history.csv", "metrics.json", "data.png", "samples.png", "curves.png")
CROP = 256  # side of a training crop in pixels
TILE, MARGIN = 1536, 128  # of a large image; the receptive field reaches 103 pixels to each side (tested)
IOU_THRESHOLDS = tuple(i / 100 for i in range(50, 100, 5))  # of AP 0.5:0.95
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
NOTEBOOK = "ipykernel" in sys.modules


class UserError(Exception):
    """A mistake that one line explains: `main` prints it after `error:`, a notebook shows it without a traceback."""

    def _render_traceback_(self):  # IPython asks an exception for this
        return [str(self)]


def require(condition, message):
    """UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def say(text):
    """Print a line, on the first process only."""
    if RANK == 0:
        print(text, flush=True)
        say.time = time.time()


say.time = math.inf  # of the last line


def live(text=""):
    """Overwrite the current line of a terminal; in a file or a notebook print a line, but only after five minutes without one."""
    if RANK == 0 and sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif text and time.time() - say.time > 300:
        say(text)


# ---------------------------------------------------------------- files
def image_files(folder):
    """The images of a folder by name, without the hidden files that macOS puts beside them. UserError if there are none."""
    files = sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in SUFFIXES)
    require(files, f"{folder} is missing or holds no image; put TIFF, PNG or JPEG files there")
    return files


def decode_tiff(data):
    """All pages of a TIFF. What tifffile decompresses with one more package only (LZW, JPEG), Pillow reads as it is."""
    try:
        return iio.imread(data, plugin="tifffile")
    except ValueError:
        return iio.imread(data, plugin="pillow", index=...)


def read_image(path, ids=False):
    """An image file as (H, W): gray in its own dtype, colour averaged to float32. UserError names a file that is none.

    ids: it is a mask, in which colour is refused.
    """
    try:
        read = decode_tiff if path.suffix.lower() in (".tif", ".tiff") else iio.imread
        array = np.asarray(read(path.read_bytes()))
        require(array.size, "no pixels in it")
    except Exception as error:  # text, empty and truncated files each fail in a way of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as an image ({reason}); replace it or take it out") from None
    if array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] <= 4:
        colors = array[..., : 3 if array.shape[2] >= 3 else 1]  # without alpha
        gray = (colors == colors[..., :1]).all()
        require(gray or not ids, f"{path} is coloured; a mask is a gray image in which each nucleus has an id of its own")
        array = colors[..., 0] if gray else colors.mean(-1, dtype=np.float32)
    require(array.ndim == 2, f"{path} is {array.shape}, not a 2-D image; save each plane of a stack on its own")
    # beyond, differences of pixels overflow float32
    require((abs(array) < np.float32(1e38)).all(), f"{path} holds NaN, infinite or huge pixels; replace them by a gray level")
    return array


def read_mask(path):
    """(H, W) int32 ids 0..n, 0 is background. UserError where the file has not one id for each nucleus."""
    array = read_image(path, ids=True)
    ids, index = np.unique(array, return_inverse=True)  # any ids, with gaps or of 32 bits, become 0..n
    require(ids[0] >= 0 and not (ids % 1).any(), f"{path} has negative or fractional ids; a mask holds 0 for background and "
            "1, 2, 3, ... for nuclei")
    require(len(ids) != 2 or ids[0] != 0 or label(array > 0).max() == 1, f"{path} holds one id, {ids[-1]:g}, for all its nuclei; "
            "each nucleus needs an id of its own (skimage.measure.label gives them)")
    return (index.reshape(array.shape) + (ids[0] != 0)).astype(np.int32)


def write_file(path, data):
    """Write bytes beside `path`, then move them there whole: after a kill or on a full disk the old file is intact."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_picture(path, pixels):
    write_file(path, iio.imwrite("<bytes>", np.asarray(pixels), extension=".png"))


# ---------------------------------------------------------------- data
Sample = namedtuple("Sample", "name image mask")


def read_split(folder):
    """The samples of `folder`, images/ and masks/ paired by file stem, in name order."""
    images, masks = ({file.stem: file for file in image_files(folder / part)} for part in ("images", "masks"))
    for stem in sorted(images.keys() ^ masks.keys()):  # in one of the two only
        alone, other = (images[stem], "mask") if stem in images else (masks[stem], "image")
        raise UserError(f"{alone} has no {other} of the same stem; add it, or take this one out")
    samples = [Sample(stem, read_image(images[stem]), read_mask(masks[stem])) for stem in images]
    for name, image, mask in samples:
        require(image.shape == mask.shape, f"{images[name]} is {image.shape}, its mask {mask.shape}; save both with one shape")
    return samples


def read_kaggle(folder, all_images=False):
    """(training, test) samples of the Data Science Bowl's layout: ID/images/ID.png, and in ID/masks one file per nucleus.

    Every tenth image kept is for testing. Unless `all_images`, fluorescence only: gray, nuclei brighter than the rest.
    """
    kept = []
    for file in sorted(folder.glob("*/images/[!.]*.png")):
        image = read_image(file)
        mask = np.zeros(image.shape, np.int32)
        for i, nucleus in enumerate(sorted(file.parents[1].glob("masks/[!.]*.png")), 1):
            pixels = read_image(nucleus) > 0
            require(pixels.shape == mask.shape, f"{nucleus} is {pixels.shape}, its image {mask.shape}; fetch the data again")
            mask[pixels] = i
        gray = image.dtype != np.float32  # what colour is averaged to
        if all_images or gray and mask.any() and image[mask > 0].mean() > image[mask == 0].mean():
            kept.append(Sample(file.stem, image, mask))
    require(len(kept) >= 10, f"{folder} has {len(kept)} images to use; at least ten are needed, as every tenth is for testing")
    return [sample for i, sample in enumerate(kept) if i % 10 != 9], kept[9::10]


def draw_nuclei(rng, size=256):
    """(image, mask), (size, size): ellipses, many of them touching, blurred, on an uneven and noisy background."""
    mask, light, placed = np.zeros((size, size), np.int32), np.zeros((size, size)), []
    scale = rng.uniform(6, 16)
    for i in range(1, rng.integers(12, 45)):
        radii, center = scale * rng.uniform(0.7, 1.3, 2), rng.uniform(0, size, 2)
        if placed and rng.random() < 0.6:  # beside an earlier nucleus
            angle = rng.uniform(0, 2 * np.pi)
            center = placed[rng.integers(len(placed))] + 1.9 * scale * np.array([np.sin(angle), np.cos(angle)])
        pixels = np.array(ellipse(*center, *radii, shape=mask.shape, rotation=rng.uniform(0, np.pi)))
        y, x = pixels[:, mask[tuple(pixels)] == 0]
        if len(y) >= max(30, 0.85 * pixels.shape[1]):
            mask[y, x], light[y, x] = i, rng.uniform(0.3, 1) * (1 + 0.15 * rng.standard_normal(len(y)))
            placed.append(center)
    haze = ndimage.gaussian_filter(rng.standard_normal(mask.shape), size / 6)
    light = ndimage.gaussian_filter(light, rng.uniform(0.8, 1.6)) + 0.1 + 0.1 * (haze - haze.min()) / np.ptp(haze)
    photons = rng.poisson(light * rng.uniform(40, 200)) + rng.normal(8, 1, mask.shape)
    return photons.clip(0, 65535).astype(np.uint16), mask


def synthetic(seed):
    """60 training and 12 test samples drawn from `seed`."""
    rng = np.random.default_rng(seed)
    samples = [Sample(f"synthetic_{i:02d}", *draw_nuclei(rng)) for i in range(72)]
    return samples[:60], samples[60:]


def download(target):
    """Fetch the released zip, check it, and unpack it as the folder `target`."""
    say(f"downloading {DATA_URL}")
    archive = io.BytesIO()
    try:
        with urllib.request.urlopen(DATA_URL, timeout=60) as reply:
            while block := reply.read(4 << 20):
                archive.write(block)
                say(f"{archive.tell() / 1e6:.0f} MB")
    except Exception as error:
        raise UserError(f"no data at {target}, and {DATA_URL} cannot be fetched ({error}): switch the internet on, give the "
                        "data with --data PATH, or use --data synthetic") from None
    require(hashlib.sha256(archive.getbuffer()).hexdigest() == DATA_SHA256,
            "the download is incomplete or not the released file; run again, or give --data PATH")
    unpack(archive, target)


def unpack(archive, target):
    """Unpack a zip, a path or an open file, as the folder `target`, whole or not at all, and nothing outside it."""
    try:
        with zipfile.ZipFile(archive) as members, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            outside = [name for name in members.namelist() if name[0] in "/\\" or ".." in Path(name).parts or ":" in name]
            require(not outside, f"{archive} holds {outside[:1]}, which would land outside its folder; do not use this file")
            members.extractall(Path(scratch, "data"))
            os.replace(Path(scratch, "data"), target)
    except (OSError, UserError):  # of the disk, or just said
        raise
    except Exception as error:  # each kind of damage fails in a way of its own
        raise UserError(f"{archive} is no zip file, or damaged ({error}); fetch it again") from None


def load_data(path, seed=0, all_images=False):
    """(training samples, test samples) of a folder, a zip, or the word `synthetic`; the README shows the layouts.

    Where `dsb2018` is not there, data attached to a Kaggle notebook is taken, else the released zip is downloaded.
    """
    if path == "synthetic":
        return synthetic(seed)
    path = Path(path)
    if str(path) == "dsb2018" and not path.exists():
        for depth, mark in itertools.product((1, 2, 3), ("train/images", "stage1_train", "stage1_train.zip")):
            for found in KAGGLE_INPUT.glob("*/" * depth + mark):
                return load_data(found.parents[1] if mark == "train/images" else found, seed, all_images)
        download(path)
    require(path.exists(), f"--data {path} does not exist; give a folder or a zip, or --data synthetic")
    if path.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            unpack(path, Path(scratch, path.stem))
            return load_data(Path(scratch, path.stem), seed, all_images)
    for folder in [path, *sorted(path.iterdir())]:
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            return read_split(folder / "train"), read_split(folder / "test")
        if next(folder.glob("*/masks/*.png"), None):
            return read_kaggle(folder, all_images)
        if (folder / "stage1_train.zip").is_file():
            return load_data(folder / "stage1_train.zip", seed, all_images)
    raise UserError(f"{path} holds no train/ and test/, each with images/ and masks/; the README shows the layout")


def rescale(image):
    """(H, W) image of any dtype and range -> float32, its own 1st and 99.8th percentile at 0 and 1.

    The images of this data differ a hundredfold in brightness.
    """
    image = np.asarray(image, np.float32)
    low, high = np.percentile(image[:: max(1, image.shape[0] // 2048)], (1, 99.8)).astype(np.float32)
    return ((image - low) / max(high - low, np.float32(1e-6))).clip(-1, 3)


def standardize(image, normalization):
    """Rescaled image -> float32 as the network takes it, by mean and standard deviation of the training images."""
    return (image - np.float32(normalization["mean"])) / np.float32(normalization["std"])


def resize(array, shape):
    """(H, W) array -> `shape` and its own dtype: floats bilinear, without aliasing, integer ids by the nearest pixel."""
    smooth = array.dtype.kind == "f"
    x = torch.from_numpy(np.ascontiguousarray(array, np.float32 if smooth else np.float64))[None, None]
    how = {"mode": "bilinear", "antialias": True} if smooth else {"mode": "nearest-exact"}
    return F.interpolate(x, size=shape, **how)[0, 0].numpy().astype(array.dtype, copy=False)


class NucleiDataset(torch.utils.data.Dataset):
    """Random 256x256 crops of images with their instance masks.

    images: list of (H, W) float arrays. masks: list of (H, W) integer ids, 0 is background.
    transform: (image, mask) -> (image, mask), both (256, 256) arrays; image_transform: image -> image; mask_transform:
    mask -> target, `foreground_target` for example. An item is a float32 tensor (1, 256, 256) and the target (without
    mask_transform the ids, int64). Smaller images are padded with their minimum, masks with background. All randomness
    is torch's, so that workers differ from each other and runs of one seed do not.
    """

    def __init__(self, images, masks, image_transform=None, mask_transform=None, transform=None):
        if len(images) != len(masks):
            raise ValueError(f"{len(images)} images but {len(masks)} masks")
        self.images, self.masks = images, masks
        self.image_transform, self.mask_transform, self.transform = image_transform, mask_transform, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, mask = self.images[index], self.masks[index]
        y, x = (int(torch.randint(max(size - CROP, 0) + 1, ())) for size in image.shape)
        image, mask = image[y : y + CROP, x : x + CROP], mask[y : y + CROP, x : x + CROP]
        missing = [(0, CROP - size) for size in image.shape]
        image, mask = np.pad(image, missing, constant_values=image.min()), np.pad(mask, missing)
        if self.transform:
            image, mask = self.transform(image, mask)
        if self.image_transform:
            image = self.image_transform(image)
        target = self.mask_transform(mask) if self.mask_transform else torch.from_numpy(mask.astype(np.int64))
        return torch.as_tensor(np.ascontiguousarray(image), dtype=torch.float32).reshape(1, CROP, CROP), target


def uniform(low, high):
    """A random number from torch's generator."""
    return low + (high - low) * torch.rand(()).item()


# Share of crops that are only flipped and turned. With 0, AP of 89 held-out images was 0.796 and 0.797 (two seeds), not 0.801
# and 0.788, AP 0.5:0.95 0.551 and 0.544, not 0.559 and 0.547; with 1, AP of unseen kinds is 0.03 less.
PLAIN = 0.5


def augment(image, mask):
    """One crop and its mask flipped and turned; unless `PLAIN`, also zoomed, in other light, contrast, haze, sharpness, noise."""
    def smooth(values):
        # (side, side) random values as a field of the crop's size: bicubic by rows, then columns, in a third of the time
        weights = F.interpolate(torch.eye(len(values))[None, None], size=(len(values), CROP), mode="bicubic")[0, 0]
        return (weights.T @ values @ weights).numpy()

    plain = uniform(0, 1) < PLAIN
    turns, flip = divmod(int(torch.randint(8, ())), 2)
    image, mask = (np.ascontiguousarray(np.rot90(array, turns)[:, :: 1 - 2 * flip]) for array in (image, mask))
    if plain:
        return image, mask
    if uniform(0, 1) < 0.5:
        image, mask = zoom(image, mask, 2 ** uniform(-1, 1.58))
    if uniform(0, 1) < 0.5:  # uneven light where the grid is coarse, texture where it is fine
        side = int(2 ** uniform(1.5, 5))
        image = image * np.exp(0.3 * smooth(torch.randn(side, side)))
    if uniform(0, 1) < 0.5:
        image = np.sign(image) * np.abs(image) ** (2 ** uniform(-1, 1))
    if uniform(0, 1) < 0.5:  # haze: AP of unseen kinds was 0.741 to 0.755 (four runs), without 0.731 to 0.746 (four)
        image = image + smooth(torch.rand(3, 3)) * uniform(0, 0.4)
    image = image * 2 ** uniform(-0.5, 0.5) + uniform(-0.1, 0.1)
    if uniform(0, 1) < 0.25:
        image = ndimage.gaussian_filter(image, uniform(0.5, 2))
    if uniform(0, 1) < 0.5:
        image = image + uniform(0, 0.15) * torch.randn(image.shape).numpy()
    return image, mask


def zoom(image, mask, factor):
    """Magnify a random part of a crop to the whole, or shrink the whole and fill up with its mirror images."""
    side = min(CROP, round(CROP / factor))
    y, x = (int(torch.randint(CROP - side + 1, ())) for _ in range(2))
    to = min(CROP, round(side * factor))
    part = slice(y, y + side), slice(x, x + side)
    return tuple(np.pad(resize(array[part], (to, to)), (0, CROP - to), mode="symmetric") for array in (image, mask))


# ---------------------------------------------------------------- targets
def foreground_target(mask):
    """(H, W) ids -> float32 tensor (1, H, W): 1 in nuclei, 0 outside."""
    return torch.from_numpy((np.asarray(mask) > 0).astype(np.float32))[None]


def boundary_target(mask):
    """(H, W) ids -> int64 tensor (H, W): 0 background, 1 foreground, 2 boundary.

    The boundary is the pixels of each nucleus beside any other id, so that foreground and boundary together are exactly the
    nucleus: what skimage's `find_boundaries(mode="inner")` marks, in a sixth of its time, which was a quarter of a crop's.
    """
    mask = np.asarray(mask)
    around = np.pad(mask, 1, mode="edge")
    inside = (around[:-2, 1:-1] == mask) & (around[2:, 1:-1] == mask) & (around[1:-1, :-2] == mask) & (around[1:-1, 2:] == mask)
    return torch.from_numpy(((mask > 0) * (2 - inside.astype(np.int8))).astype(np.int64))


def depth_target(mask):
    """(H, W) ids -> float32 tensor (3, H, W), the probabilities of `boundary_target`'s classes that training aims at.

    Boundary fades into foreground with the depth within the nucleus, the distance to its rim relative to that of its
    deepest pixel (the distance map of Naylor et al. 2019, IEEE TMI 38:448, normalized): each nucleus, large or small,
    has one summit to find it by, and the whole nucleus, not a few pixels, teaches where two of them meet.
    """
    mask = np.asarray(mask)
    background = (mask == 0).astype(np.float32)
    core = boundary_target(mask).numpy() == 1
    # the mean of two distances in whole pixels is within a tenth of Euclid's and takes a quarter of its time
    distance = ndimage.distance_transform_cdt(core, "chessboard") + ndimage.distance_transform_cdt(core, "taxicab")
    distance = distance.clip(0).astype(np.float32) + 1  # where no rim is in sight both are -1
    deepest = np.ones(int(mask.max()) + 1, np.float32)
    np.maximum.at(deepest, mask[core], distance[core])
    deepest[0] = np.inf
    foreground = distance / deepest[mask]
    return torch.from_numpy(np.stack([background, foreground, 1 - background - foreground]))


def offset_target(mask):
    """(H, W) ids -> float32 tensor (2, H, W): rows and columns from the centre of a pixel's nucleus, in roots of its area.

    Outside 0. Where nuclei touch, the offsets jump (the maps of HoVer-Net, Graham et al. 2019, arXiv 1812.06499).
    """
    nuclei = label(mask, connectivity=1)  # a nucleus and its mirror images in a shrunken crop are several
    pixels = np.flatnonzero(nuclei)
    ids, offsets = nuclei.ravel()[pixels], np.zeros((2, nuclei.size), np.float32)
    areas = np.maximum(np.bincount(ids), 1)
    for offset, position in zip(offsets, np.unravel_index(pixels, nuclei.shape)):
        centers = np.bincount(ids, position) / areas
        offset[pixels] = (position - centers[ids]) / np.sqrt(areas)[ids]
    return torch.from_numpy(offsets.reshape(2, *nuclei.shape))


def nucleus_target(mask):
    """(H, W) ids -> float32 tensor (5, H, W): `depth_target` and `offset_target`, what the boundary model learns."""
    return torch.cat([depth_target(mask), offset_target(mask)])


def separated_target(mask):
    """`foreground_target` with the pixels between touching nuclei as background, so that components come apart.

    Those are the pixels of nuclei with another nucleus in their 3x3 neighbourhood.
    """
    mask = np.asarray(mask)
    highest = ndimage.maximum_filter(mask, 3)
    lowest = ndimage.minimum_filter(np.where(mask > 0, mask, highest.max()), 3)  # of the nuclei there
    return foreground_target(np.where(highest == lowest, mask, 0))


# ---------------------------------------------------------------- network
class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv 1505.04597, fig. 1) with 3x3 convolutions that keep the size.

    Five levels of width, 2, 4, 8 and 16 times width channels; (B, in_channels, H, W) with H and W divisible by 16 ->
    float32 logits (B, out_channels, H, W). `norm=False` leaves out the batch normalization (Ioffe and Szegedy 2015) after
    each convolution: UNet(1, 1, norm=False) has 31,030,593 parameters. In training, `extra` channels follow the logits, and
    of the deepest channels a share `dropout` is left out. The layers compute in the dtype `precision`.
    """

    def __init__(self, in_channels=1, out_channels=1, width=64, norm=True, extra=0, dropout=0.0):
        super().__init__()
        self.out_channels, self.dropout, self.precision = out_channels, dropout, torch.float32

        def block(inputs, outputs):
            layers = []
            for channels in inputs, outputs:
                normalization = [nn.BatchNorm2d(outputs)] if norm else []
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), *normalization, nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        channels = [width * 2**level for level in range(5)]
        down, up = list(zip(channels, channels[1:])), list(zip(channels[:0:-1], channels[-2::-1]))
        self.encoder = nn.ModuleList([block(in_channels, width), *(block(i, o) for i, o in down)])
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in up)
        self.decoder = nn.ModuleList(block(i, o) for i, o in up)
        self.out = nn.Conv2d(width, out_channels + extra, 1)

    def forward(self, x):
        if x.shape[-1] % 16 or x.shape[-2] % 16:
            raise ValueError(f"height and width must be divisible by 16, not {tuple(x.shape[-2:])}")
        full = self.precision == torch.float32  # for which torch 2.4 has no autocast on MPS, not even a disabled one
        with nullcontext() if full else torch.autocast(x.device.type, self.precision):
            skips = []
            for i, block in enumerate(self.encoder):
                x = block(F.max_pool2d(x, 2) if i else x)
                skips.append(x)
            x = F.dropout2d(skips.pop(), self.dropout, self.training)
            for upsample, block in zip(self.upsample, self.decoder):
                x = block[1:](joined(block[0], skips.pop(), upsample(x)))
            x = self.out(x).float()
            return x if self.training else x[:, : self.out_channels]


def joined(conv, skip, x):
    """The 3x3 convolution `conv` of skip and x concatenated, as the sum of two: without the copy a step takes a twelfth less."""
    of_skip, of_x = conv.weight.chunk(2, 1)
    return F.conv2d(x, of_x, conv.bias, padding=1).add_(F.conv2d(skip, of_skip, padding=1))


def memory_format(device, training):
    """Channels last, the fastest; channels first to train with AVX2 and no AVX-512, where a full-width step took 14 s, not 20.

    On MPS, channels last crashes in the backward pass of max pooling (pytorch issue 175190).
    """
    avx2 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if device.type == "mps" or avx2 and training else torch.channels_last


# ---------------------------------------------------------------- loss and scores
# Tuned, as all constants below, at width 16 on training images held out for it; AP is at IoU 0.5, of the code of the time.
DROPOUT = 0.2  # of the deepest channels, with --boundary only; AP is 0.786 and 0.787 (two seeds), without 0.779 and 0.782
OFFSET_WEIGHT = 5.0  # AP of unseen kinds was 0.741 to 0.755 (four runs), without 0.731 and 0.719 (two); 2 is no better


def loss_function(logits, target):
    """Binary cross entropy for one channel; for three, cross entropy with class probabilities.

    For two more channels, the offsets of training, their squared error within nuclei is added.
    """
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, target)
    error = (logits[:, 3:] - target[:, 3:]) ** 2  # empty in validation, where the network gives no offsets
    return F.cross_entropy(logits[:, :3], target[:, :3]) + OFFSET_WEIGHT * (error * (1 - target[:, :1])).sum(1).mean()


def dice_score(input_, target, eps=1e-6):
    """Soft dice of logits and targets of 0 to 1, both (B, C, H, W), over all pixels -> scalar tensor, 1 is best.

    2 sum(pt) / (sum(p^2) + sum(t^2)) with p = sigmoid(logit), Milletari et al. 2016 (V-Net, arXiv 1606.04797, sec. 3).
    """
    prediction = torch.sigmoid(input_)
    overlap = (prediction * target).sum()
    return (2 * overlap + eps) / ((prediction**2).sum() + (target**2).sum() + eps)


def nucleus_dice(logits, target):
    """Dice of nuclei against background; of three channels, nucleus is foreground and boundary together."""
    if logits.shape[1] == 1:
        return dice_score(logits, target)
    return dice_score(logits[:, 1:3].logsumexp(1, keepdim=True) - logits[:, :1], 1 - target[:, :1])


def overlaps(seg, mask):
    """Objects of two label images that overlap: a sparse (predicted, true) matrix of their IoU, and how many each image has.

    Time and memory grow with pixels and pairs, not with the product of the numbers of objects.
    """
    if np.shape(seg) != np.shape(mask):
        raise ValueError(f"shapes differ: {np.shape(seg)} and {np.shape(mask)}")
    labels = []
    for image in map(np.asarray, (seg, mask)):
        if image.dtype.kind not in "iub":
            raise ValueError(f"ids must be integers, not {image.dtype}")
        if image.size and (image.min() < 0 or image.max() > image.size):  # ids too sparse to index a matrix with
            image = np.where(image == 0, 0, np.unique(image, return_inverse=True)[1].reshape(image.shape) + 1)
        labels.append(image.ravel().astype(np.int32, copy=False))
    shape = [int(ids.max(initial=0)) + 1 for ids in labels]
    table = coo_array((np.ones(len(labels[0]), np.int32), labels), shape=shape).tocsr()  # tocsr adds up the ones
    of_seg, of_mask = table.sum(1), table.sum(0)  # areas
    pairs = table[1:, 1:].tocoo()
    pairs.data = pairs.data / (of_seg[1 + pairs.row] + of_mask[1 + pairs.col] - pairs.data)
    return pairs.tocsr(), np.count_nonzero(of_seg[1:]), np.count_nonzero(of_mask[1:])


def count_matches(iou, n_seg, n_mask, threshold):
    """(tp, fp, fn) from `overlaps`: tp is the size of a maximum one-to-one matching of the pairs at or above threshold."""
    tp = int((maximum_bipartite_matching(iou >= threshold, perm_type="column") >= 0).sum())
    return tp, n_seg - tp, n_mask - tp


def match_counts(seg, mask, threshold=0.5):
    """(true positives, false positives, false negatives) of a label image against the true one.

    seg, mask: (H, W) integer ids, 0 is background, any other id is an object. True positives are the pairs of a maximum
    one-to-one matching with IoU >= threshold (> 0). Raises ValueError if the shapes differ or ids are not integers.
    """
    return count_matches(*overlaps(seg, mask), threshold)


def f1_from_counts(tp, fp, fn):
    return 1.0 if tp + fp + fn == 0 else 2 * tp / (2 * tp + fp + fn)


def f1_score(seg, mask, threshold=0.5):
    """F1 = 2 TP / (2 TP + FP + FN) of `match_counts`; 1.0 where both images are empty."""
    return f1_from_counts(*match_counts(seg, mask, threshold))


# ---------------------------------------------------------------- prediction
def predict(model, image, tile=TILE, margin=MARGIN):
    """Probabilities of an image of any size, in tiles where it is large.

    image: normalized (H, W) floats, padded here by reflection to multiples of 16. Returns float32 (C, H, W): the sigmoid
    of a single channel, the softmax of several. Tiles overlap by the margin; one of the receptive field or more leaves no seam.
    """
    height, width = image.shape
    if max(height, width) > tile + 2 * margin:
        result = np.empty((model.out_channels, height, width), np.float32)
        corners = list(itertools.product(range(0, height, tile), range(0, width, tile)))
        for i, (y, x) in enumerate(corners, 1):
            top, left = max(y - margin, 0), max(x - margin, 0)
            part = predict(model, image[top : y + tile + margin, left : x + tile + margin], tile, margin)
            result[:, y : y + tile, x : x + tile] = part[:, y - top :, x - left :][:, :tile, :tile]
            live(f"tile {i}/{len(corners)}")
        live()
        return result
    device, training = next(model.parameters()).device, model.training
    x = np.pad(np.asarray(image, np.float32), ((0, -height % 16), (0, -width % 16)), mode="symmetric")
    model.eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(x)[None, None].to(device, memory_format=memory_format(device, training=False)))
        logits = logits[0, :, :height, :width].cpu()
        probabilities = logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
    model.train(training)
    return probabilities.numpy()


# ---------------------------------------------------------------- instances
# nucleus: least probability of a nucleus's pixels; with 0.6, AP 0.5:0.95 is 0.008 more, of unseen kinds 0.015 less.
# core: least probability of the pixels of a component, which then grows to those of the nucleus.
# rise: of a summit above the pass to a higher one, so that it counts; 0.09 and 0.15 change AP by 0.007 at most.
# confidence: the least of an instance that is kept; 0.6 and 0.7 change AP by 0.010 at most.
# sure: mean confidence of an image that needs no blurred look; with 0.75, AP of large nuclei in coarse grain is 0.59, not 0.73,
# with 0.85 it is 0.77, but falls by 0.12 where the grain is blurred (one of two seeds).
BOUNDARY_THRESHOLDS = {"nucleus": 0.5, "rise": 0.12, "confidence": 0.65, "sure": 0.8}
FOREGROUND_THRESHOLDS = {"nucleus": 0.5, "core": 0.9, "confidence": 0.5, "sure": 0.9}


def connected_components(foreground_prediction, threshold=0.5):
    """(H, W) foreground probabilities -> (H, W) int32 ids of the connected components above the threshold."""
    return label(np.asarray(foreground_prediction) > threshold, connectivity=1).astype(np.int32)


def instance_segmentation(foreground_prediction, boundary_prediction, threshold=0.5, rise=BOUNDARY_THRESHOLDS["rise"]):
    """(H, W) probabilities of foreground and boundary -> (H, W) int32 instance ids, 0 is background.

    Nuclei are where foreground and boundary together exceed the threshold, so that they cover their rims; a watershed
    shares them out between the summits of the foreground, smoothed a little. NaN counts as 0. ValueError if the shapes differ.
    """
    foreground, boundary = np.asarray(foreground_prediction, np.float32), np.asarray(boundary_prediction, np.float32)
    if foreground.shape != boundary.shape:
        raise ValueError(f"shapes differ: {foreground.shape} and {boundary.shape}")
    depth = ndimage.gaussian_filter(np.nan_to_num(foreground), 1)
    depth = np.pad(np.where(foreground + boundary > threshold, depth, -np.inf), 1, constant_values=-np.inf)
    basins = watershed(-depth, mask=depth > -np.inf)  # one of each summit; without the rim an image of one height had none
    return merge_basins(basins, depth, rise)[1:-1, 1:-1]


def merge_basins(basins, depth, rise):
    """Join watershed basins where the pass between them is shallow: the lower of their summits is less than `rise` above it.

    (H, W) basins 1..n of the depth, which is -inf outside them and at the edge of the image -> int32 ids 1..m. Each has one
    h-maximum (Soille 2003, sec. 6.3) with h = rise. skimage's `h_maxima` needs five to ten times as long as all this.
    """
    n = int(basins.max()) + 1
    summits = np.zeros(n, depth.dtype)
    np.maximum.at(summits, basins, depth)
    pairs, passes = [], []
    for shift in (0, 1), (1, -1), (1, 0), (1, 1):  # half of the eight neighbours; for these, it is one of the other half
        other, heights = np.roll(basins, shift, (0, 1)), np.minimum(depth, np.roll(depth, shift, (0, 1)))
        shallow = (basins != other) & (np.minimum(summits[basins], summits[other]) - heights < rise)
        pairs.append(basins[shallow] * np.int64(n) + other[shallow])
        passes.append(heights[shallow])
    pairs, passes = np.concatenate(pairs), np.concatenate(passes)
    order = np.argsort(-passes, kind="stable")  # from the highest down, equal ones in one order on every machine
    order = order[np.sort(np.unique(pairs[order], return_index=True)[1])]  # of each two basins the highest alone
    groups = DisjointSet(range(n))
    for pair, height in zip(pairs[order].tolist(), passes[order]):
        one, other = (groups[basin] for basin in divmod(pair, n))
        low, high = sorted((summits[one], summits[other]))
        if low - height < rise:
            groups.merge(one, other)
            summits[groups[one]] = high
    return np.unique([groups[basin] for basin in range(n)], return_inverse=True)[1].astype(np.int32)[basins]


def confidence(instances, probabilities):
    """How sure instances 1..n of (1 or 3, H, W) probabilities are, (n,) and at most 1: the mean probability of their pixels.

    With three classes less the mean difference of the predicted foreground from the target that these instances would make: a
    nucleus in pieces, or two nuclei in one, have other summits than the network saw. AP (two seeds) is 0.794 and 0.796,
    with the probability alone, kept above 0.9, 0.790 and 0.793.
    """
    score = probabilities[0]
    if len(probabilities) == 3:
        score = probabilities[1] + probabilities[2] - abs(probabilities[1] - depth_target(instances)[1].numpy())
    ids = instances.ravel()
    return np.bincount(ids, score.ravel())[1:] / np.maximum(np.bincount(ids), 1)[1:]


def decode(probabilities, thresholds):
    """(1 or 3, H, W) probabilities -> (H, W) int32 ids of the instances 1..n that are large and sure enough, their confidence."""
    if len(probabilities) == 3:
        instances = instance_segmentation(*probabilities[1:], thresholds["nucleus"], thresholds["rise"])
    else:  # cores come apart where `separated_target` opened the seam, and then grow
        cores = connected_components(probabilities[0], thresholds["core"])
        instances = watershed(-probabilities[0], cores, mask=probabilities[0] > thresholds["nucleus"])
    confidences, areas = confidence(instances, probabilities), np.bincount(instances.ravel())[1:]
    keep = (areas >= thresholds["smallest"]) & (confidences >= thresholds["confidence"])
    return np.append(0, np.cumsum(keep) * keep).astype(np.int32)[instances], confidences[keep]


def typical_size(instances):
    """Root of the area of the nucleus that the median nucleus pixel lies in: crumbs hardly change it. 0 without nuclei."""
    areas = np.sort(np.bincount(instances.ravel())[1:])
    return math.sqrt(areas[np.searchsorted(areas.cumsum(), areas.sum() / 2)]) if len(areas) else 0.0


# Typical size of nuclei in pixels, least and largest, by number of classes; images outside are resized for a second look. Where
# nuclei are small, it raised AP of validation images from 0.827 to 0.837, of halved held-out ones from 0.636 to 0.798; with the
# foreground model these have 0.798 as well, and 0.762 if seen at 28 pixels.
TYPICAL = {3: (28, 28), 1: (20, 30)}
MOST = 2**26  # pixels of a resized image, for the memory
# Images still in doubt get further looks in these sizes, blurred by a Gaussian of `BLUR` pixels: texture and noise are gone.
# They raised AP in coarse grain from 0.49 to 0.71, of large nuclei from 0.11 to 0.67; of other images 5 % get them, AP stays.
BLURRED, BLUR = (1, 0.5, 0.35, 0.25), 2
# How much surer a further look must be. 0.005 to 0.02 change little; 0 lowers AP of dimmed images from 0.800 to 0.772. A second
# look (at 20 to 30 pixels) that was always kept lowered it from 0.828 to 0.814 in validation images, 0.536 to 0.282 in grain.
LEAD = 0.01


def segment(model, image):
    """Raw (H, W) image of any dtype -> (instance ids (H, W), probabilities (C, H, W)).

    Where the nuclei found are not of the size that is seen best, the image is looked at again, resized. Where texture or noise
    leaves the instances in doubt, it is blurred and shrunken. A look that is not surer by `LEAD` is dropped.
    """
    thresholds, image = model.settings["thresholds"], standardize(rescale(image), model.settings["normalization"])

    def look(factor, blur=0):
        resized = resize(image, tuple(max(1, round(side * factor)) for side in image.shape))
        probabilities = predict(model, ndimage.gaussian_filter(resized, blur))
        instances, confidences = decode(probabilities, thresholds | {"smallest": thresholds["smallest"] * factor**2})
        # the mean, with 0.5 counted in, since few instances prove little: else one blob was preferred to 250 small nuclei
        return (confidences.sum() + 0.5) / (len(confidences) + 1), factor, instances, probabilities

    def surer(best, found):
        return found if found[0] > best[0] + LEAD else best

    best = look(1)
    size = typical_size(best[2])
    factor = np.clip(size, *TYPICAL[model.out_channels]) / size if size else 1
    if abs(factor - 1) > 0.1 and image.size * factor**2 <= MOST:
        best = surer(best, look(factor))
    if best[0] < thresholds["sure"]:
        for factor in BLURRED:
            best = surer(best, look(factor, BLUR))
    _, factor, instances, probabilities = best
    if factor != 1:
        probabilities = np.stack([resize(channel, image.shape) for channel in probabilities])
        if factor < 1:  # instances are found where the pixels are finer
            instances, _ = decode(probabilities, thresholds)
        else:
            instances = relabel_sequential(resize(instances, image.shape))[0]
    return instances, probabilities


# ---------------------------------------------------------------- training
class Muon(torch.optim.Adam):
    """Adam, but kernels between hidden channels step along their momentum made orthogonal (Jordan et al. 2024, Muon).

    All directions of a kernel learn at one pace, `lr`; what is left (the first layer, a last one of fewer than four channels,
    biases, normalization) follows Adam at 0.06 of it, as do kernels of more than 512 channels, where the product of matrices
    would cost more than it gives. Validation AP at IoU 0.5: 0.831, with Adam alone 0.795.
    """

    def __init__(self, model, lr):
        kernels, rest = [], []
        for p in model.parameters():
            (kernels if p.ndim == 4 and 3 < min(p.shape[:2]) and len(p) <= 512 else rest).append(p)
        on_cpu = rest[0].device.type == "cpu"  # on a GPU the fused kind would take fp16's loss scale unseen by Muon
        super().__init__([{"params": kernels, "lr": lr}, {"params": rest, "lr": 0.06 * lr}], fused=on_cpu)

    @torch.no_grad()
    def step(self):
        for kernel in self.param_groups[0]["params"]:
            state = self.state[kernel]
            if not state:  # under Adam's own names, so that its loading of a checkpoint finds what it looks for
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(kernel))
            momentum = state["exp_avg"].lerp_(kernel.grad, 0.05)
            update = orthogonalize(kernel.grad.lerp(momentum, 0.95).flatten(1))
            kernel.sub_(update.view_as(kernel), alpha=self.param_groups[0]["lr"])
            kernel.grad = None  # which Adam passes over
        super().step()


def orthogonalize(matrix):
    """(m, n), m <= n -> the matrix of the same singular vectors with the singular values brought towards 1, 1.2 at most.

    Jordan's Newton-Schulz iteration, in (m, m) products. Three steps are enough up to 256 rows (held-out AP at width 16: 0.841,
    with five 0.835 and 0.842); with 512 rows they leave the median singular value near 0.1, five bring it to 0.8.
    In bfloat16 singular values reached 3.9 and training failed.
    """
    steps, identity = 3 if len(matrix) <= 256 else 5, torch.eye(len(matrix), device=matrix.device)

    def polynomial(gram):
        return torch.addmm(3.4445 * identity - 4.7750 * gram, gram, gram, alpha=2.0315)

    unit = matrix / (matrix.norm() + 1e-12)
    gram = unit @ unit.T
    result = factor = polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = polynomial(gram)
        result = factor @ result
    return result @ unit


def keep_memory():
    """Let glibc keep what is freed (mallopt(3)): given back after each step, pages come again one by one, to be zeroed each.

    On a CPU at width 16 a step took 0.41 s, with this 0.34 s. Blocks from 17 MiB on still go back, for the peak memory: at the
    full width in bf16 1.75 GiB, from 32 MiB on 1.84. From 16 MiB on, with the maps of its second level, it is 1.70 GiB, but a
    step takes 8 % longer.
    """
    if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 17 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def train_epoch(model, loader, optimizer, schedule, scaler, epoch=1, epochs=1):
    """One pass over `loader`: (mean loss, mean dice). Raises UserError at a loss that is not finite."""
    model.train()
    device, total, start = next(model.parameters()).device, np.zeros(2), time.time()
    asynchronous = device.type == "cuda"  # on MPS such a copy can bring other values (pytorch issue 189690)
    for step, (image, target) in enumerate(loader, 1):
        image, target = (tensor.to(device, non_blocking=asynchronous) for tensor in (image, target))
        optimizer.zero_grad()
        logits = model(image)
        loss = loss_function(logits, target)
        value = loss.item()
        require(math.isfinite(value), f"the loss is {value} at epoch {epoch}, step {step}; start again with a lower --lr")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        total += value, nucleus_dice(logits[:1].detach(), target[:1]).item()  # of one crop, for its time
        left = (time.time() - start) / step * (len(loader) * (epochs - epoch + 1) - step)
        live(f"epoch {epoch}/{epochs}  step {step}/{len(loader)}  loss {total[0] / step:.4f}  {left / 60:.0f} min left")
    live()
    return total / len(loader)


def validate(model, samples, make_target):
    """(loss, dice, F1 at IoU 0.5) on whole images, each a mean over the images; one look at each, for its time."""
    scores = []
    for sample in samples:
        probabilities = predict(model, standardize(rescale(sample.image), model.settings["normalization"]))
        f1 = f1_score(decode(probabilities, model.settings["thresholds"])[0], sample.mask)
        probabilities = torch.from_numpy(probabilities).clamp(1e-6, 1 - 1e-6)[None]
        logits = probabilities.logit() if probabilities.shape[1] == 1 else probabilities.log()
        target = make_target(sample.mask)[None]
        scores.append((loss_function(logits, target), nucleus_dice(logits, target), f1))
    return np.mean(scores, axis=0)


def fit_settings(args, images, masks):
    """The settings that `build_model` takes and a model.pt holds, from the flags and the rescaled training images."""
    pixels = np.concatenate([image.ravel()[::16] for image in images])
    areas = np.concatenate([np.bincount(mask.ravel())[1:] for mask in masks])
    smallest = int(np.percentile(areas[areas > 0], 1) / 2) if areas.any() else 0  # half of what 99 % of the nuclei reach
    return dict(boundary=args.boundary, width=args.width,
                normalization={"mean": float(pixels.mean()), "std": float(pixels.std()) or 1.0},
                thresholds=(BOUNDARY_THRESHOLDS if args.boundary else FOREGROUND_THRESHOLDS) | {"smallest": smallest})


def build_model(settings, device, precision):
    """The network of `settings` (boundary, width, normalization, thresholds), which it carries for prediction."""
    outputs, more = (3, {"extra": 2, "dropout": DROPOUT}) if settings["boundary"] else (1, {})
    model = UNet(1, outputs, settings["width"], **more)
    model.settings, model.precision = settings, precision
    return model.to(device, memory_format=memory_format(device, training=True))


def save_checkpoint(path, **state):
    buffer = io.BytesIO()  # in memory first: torch.save to a disk that fills up can abort the process
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path, load):
    """load(what `save_checkpoint` wrote), read as data only, so that no file can run code. UserError if it does not fit."""
    try:
        return load(torch.load(path, map_location="cpu", weights_only=True))
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train first, or give the file of an earlier run") from None
    except Exception:  # a truncated, foreign or malicious file, or one of another version, fails in any way it likes
        raise UserError(f"{path} is no intact checkpoint of this version of the script; give a file that it wrote") from None


def load_model(path, device, precision):
    """The network in a model.pt, for prediction alone: normalization folded into the convolutions, weights in `precision`."""
    def load(state):
        settings = {key: state["settings"][key] for key in ("boundary", "width", "normalization", "thresholds")}
        require("sure" in settings["thresholds"], f"{path} is of an earlier version of the script; train again with this one")
        model = build_model(settings, device, precision)
        model.load_state_dict(state["model"])
        for block in (*model.eval().encoder, *model.decoder):
            for i in (0, 3):
                block[i], block[i + 1] = fuse_conv_bn_eval(block[i], block[i + 1]), nn.Identity()
        return model.to(precision)

    return load_checkpoint(path, load)


def make_room(out, names=OUTPUTS):
    """Make the folder `out`; files of these names that an earlier run left there are kept, in out/earlier-1, earlier-2, ..."""
    out.mkdir(parents=True, exist_ok=True)
    if left := [file for name in names if (file := out / name).exists()]:
        earlier = next(folder for n in itertools.count(1) if not (folder := out / f"earlier-{n}").exists())
        earlier.mkdir()
        for file in left:
            file.rename(earlier / file.name)
        say(f"{len(left)} file(s) of an earlier run are now in {earlier}")


def draw_crops(images, seed, epoch):
    """Indices of the images to cut this rank's crops of an epoch from, in random order.

    Each image comes by its area: together about as many crops as train in the time of 425 of the notebook's loop.
    """
    shares = torch.tensor([max(1, round(0.9 * image.size / CROP**2)) for image in images])
    crops = torch.arange(len(images)).repeat_interleave(shares)
    crops = crops.repeat(math.ceil(WORLD_SIZE / len(crops)))
    order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return crops[order][: len(crops) // WORLD_SIZE * WORLD_SIZE][RANK::WORLD_SIZE].tolist()


def resume(last, parts, fixed):
    """Set the `parts` of a run as in the file `last`, and model.pt beside it; returns the run's history.

    UserError where the settings `fixed` differ.
    """
    def load(state):
        for key, value in fixed.items():
            require(value == state["fixed"][key], f"--resume: {key} is {value}, in {last} {state['fixed'][key]}; give the same")
        for name, part in parts.items():
            if name != "scaler" or state[name]:  # empty where no loss scale was in use
                part.load_state_dict(state[name])
        return state["history"], state["best"].numpy()

    history, best = load_checkpoint(last, load)
    if RANK == 0:
        write_file(last.with_name("model.pt"), best)
    return history


def save_epoch(out, settings, parts, fixed, history):
    """Write what a run has after an epoch; last.pt, which `resume` reads, comes last, so that all that it knows of is written."""
    best = out / "model.pt"
    # by loss, held-out AP is 0.778 and 0.787 (two seeds); by F1, coarse for so few images, 0.759 and 0.787
    if history[-1]["val_loss"] == min(row["val_loss"] for row in history) or not best.exists():  # or taken away
        save_checkpoint(best, settings=settings, model=parts["model"].state_dict())
    table = [history[0].keys(), *(row.values() for row in history)]
    write_file(out / "history.csv", "".join(",".join(map(str, line)) + "\n" for line in table).encode())
    write_picture(out / "curves.png", curves_picture(history))
    states = {name: part.state_dict() for name, part in parts.items()}
    states["best"] = torch.from_numpy(np.fromfile(best, np.uint8))  # so that last.pt alone is enough to go on
    save_checkpoint(out / "last.pt", fixed=fixed, history=history, **states)


def one_cycle(step, steps):
    """Share of the highest learning rate: up for a fifth of the steps, then down a cosine (Smith 2018, arXiv 1803.09820)."""
    done = step / steps
    return (done + 1 / steps) / (0.2 + 1 / steps) if done < 0.2 else (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2


def run_training(args, samples, checksum, device, precision):
    """Train on `samples`, every 20th of them for validation; write data.png and, each epoch, checkpoints, history and curves.

    UserError where --resume does not fit, or the loss is not finite. Returns the history, a dict an epoch.
    """
    require(len(samples) > 1, f"{args.data} has {len(samples)} training image; at least two are needed, the last validates")
    every = min(20, len(samples))
    training, validation = [sample for i, sample in enumerate(samples, 1) if i % every], samples[every - 1 :: every]
    images, masks = [rescale(sample.image) for sample in training], [sample.mask for sample in training]
    settings = fit_settings(args, images, masks)
    to_learn, to_predict = (nucleus_target, depth_target) if args.boundary else (separated_target, separated_target)
    dataset = NucleiDataset(images, masks, partial(standardize, normalization=settings["normalization"]), to_learn, augment)

    torch.manual_seed(args.seed)
    model = network = build_model(settings, device, precision)
    say(f"network: U-Net of width {args.width} with {model.out_channels} output channel(s), "
        f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if WORLD_SIZE > 1:
        network = nn.parallel.DistributedDataParallel(model)
    optimizer = Muon(network, args.lr)
    # at torch's own 2**16 the first gradients, of up to 4, overflow fp16, and it warns of a step left out
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=precision == torch.float16)
    parts, history = {"model": model, "optimizer": optimizer, "scaler": scaler}, []
    fixed = {key: getattr(args, key) for key in ("boundary", "width", "batch_size", "lr", "seed")}
    fixed |= {"data": checksum, "processes": WORLD_SIZE}
    if args.resume:
        history = resume(args.out / "last.pt", parts, fixed)
        require(len(history) <= args.epochs, f"--resume: {len(history)} epochs are done, more than --epochs {args.epochs}")
    elif RANK == 0:
        make_room(args.out)
    steps = math.ceil(len(draw_crops(images, args.seed, 0)) / args.batch_size)  # an epoch
    rate = partial(one_cycle, steps=args.epochs * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=len(history) * steps - 1)
    if RANK == 0:
        write_picture(args.out / "data.png", data_picture(dataset))
    if device.type == "cpu":
        keep_memory()
    # one thread first: where two share MKL's first call of these, half of it can be 6e-5 off (pytorch issue 188792)
    torch.ones(1).exp().log()
    # with CUDA only; elsewhere than on Linux each worker would import torch anew, and could not in a notebook
    workers = min(4, os.cpu_count() // WORLD_SIZE) if device.type == "cuda" and sys.platform == "linux" else 0
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed((args.seed * 100_003 + epoch) * WORLD_SIZE + RANK)  # each epoch and rank anew, a resumed one as well
        crops = draw_crops(images, args.seed, epoch)
        loader = torch.utils.data.DataLoader(dataset, args.batch_size, sampler=crops, num_workers=workers,
                                             pin_memory=device.type == "cuda")
        start = time.time()
        train_loss, train_dice = train_epoch(network, loader, optimizer, schedule, scaler, epoch, args.epochs)
        seconds = time.time() - start
        if RANK:
            continue
        val_loss, val_dice, val_f1 = validate(model, validation, to_predict)
        require(math.isfinite(val_loss), f"the validation loss is {val_loss} after epoch {epoch}; start again with a lower --lr")
        row = dict(epoch=epoch, train_loss=train_loss, val_loss=val_loss, train_dice=train_dice, val_dice=val_dice, val_f1=val_f1,
                   lr=args.lr * rate(epoch * steps - 1), seconds=seconds, images_per_second=WORLD_SIZE * len(crops) / seconds)
        history.append({key: float(f"{value:.6g}") if key != "epoch" else epoch for key, value in row.items()})
        say(f"epoch {epoch}/{args.epochs}  loss {train_loss:.4f}, validation {val_loss:.4f}  dice {train_dice:.3f}, "
            f"{val_dice:.3f}  F1 {val_f1:.3f}  lr {row['lr']:.1e}  {seconds:.0f} s  {row['images_per_second']:.2f} images/s")
        save_epoch(args.out, settings, parts, fixed, history)
    return history


# ---------------------------------------------------------------- evaluation
def evaluate(model, samples):
    """({name in metrics.json: score}, F1 of each image at IoU 0.5) of the test samples."""
    counts, seconds = [], 0.0
    for i, sample in enumerate(samples, 1):
        start = time.time()
        instances, _ = segment(model, sample.image)
        seconds += time.time() - start
        pairs = overlaps(instances, sample.mask)
        counts.append([count_matches(*pairs, threshold) for threshold in IOU_THRESHOLDS])
        live(f"test image {i}/{len(samples)}")
    live()
    f1 = np.array([[f1_from_counts(*at_threshold) for at_threshold in image] for image in counts])
    pooled = np.sum(counts, axis=0)
    ap = pooled[:, 0] / np.maximum(pooled.sum(1), 1)
    scores = {"f1@0.5": f1[:, 0].mean(), "f1@0.75": f1[:, 5].mean(), "ap@0.5": ap[0], "ap@0.75": ap[5], "ap@0.5:0.95": ap.mean(),
              "predict_images_per_second": sum(sample.image.size for sample in samples) / CROP**2 / seconds}
    (tp, fp, fn), scores = pooled[0].tolist(), {name: round(float(score), 6) for name, score in scores.items()}
    return scores | dict(n_images=len(samples), n_objects=tp + fn, found=tp, missed=fn, made_up=fp), f1[:, 0]


# ---------------------------------------------------------------- pictures
def gray(image):
    """(H, W) of any dtype -> (H, W, 3) uint8, bright enough to see dim nuclei."""
    return np.repeat((rescale(image).clip(0, 1) ** 0.6 * 255).astype(np.uint8)[..., None], 3, axis=-1)


def colored(mask):
    """(H, W) ids -> (H, W, 3) uint8, each id in a random colour, background black."""
    colors = np.random.default_rng(0).integers(60, 256, (int(mask.max()) + 1, 3), dtype=np.uint8)
    colors[0] = 0
    return colors[mask]


LEGEND = {1: "green foreground", 3: "green foreground, red boundary"}  # of `classes`, by the number of channels


def classes(probabilities):
    """(1 or 3, H, W) target or prediction -> (H, W, 3) uint8, coloured as `LEGEND` says."""
    red, green = probabilities[:0:-1] if len(probabilities) == 3 else (0 * probabilities[0], probabilities[0])
    return (np.stack([red, green, 0 * red], -1) * 255).astype(np.uint8)


def sheet(headings, rows):
    """Picture of rows, each (caption above it, (H, W, 3) pictures of at most `CROP` pixels a side), under headings."""
    width, height = CROP + 6, CROP + 22
    canvas = Image.new("RGB", (len(headings) * width, 22 + len(rows) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, heading in enumerate(headings):
        draw.text((column * width + 4, 5), heading, fill="black")
    for y, (caption, pictures) in zip(itertools.count(22, height), rows):
        draw.text((4, y + 4), caption, fill="black")
        for column, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (column * width, y + 20))
    return canvas


def data_picture(dataset):
    """Some training crops just as the network gets them: image, instances, target."""
    rows, seen = [], NucleiDataset(dataset.images, dataset.masks, dataset.image_transform, transform=dataset.transform)
    for i in np.linspace(0, len(dataset) - 1, min(6, len(dataset))).astype(int):
        image, mask = seen[i]
        target = dataset.mask_transform(mask.numpy()).numpy()[:3]
        rows.append(("", [gray(image[0].numpy()), colored(mask.numpy()), classes(target)]))
    return sheet(["training crop", "instances", f"target: {LEGEND[len(target)]}"], rows)


def samples_picture(model, samples, f1):
    """The three worst test images and three more up to the best; of large ones, where truth and prediction differ most."""
    order, rows = np.argsort(f1, kind="stable"), []
    for i in dict.fromkeys([*order[:3], *order[np.linspace(0, len(order) - 1, 4).astype(int)[1:]]]):
        name, image, mask = samples[i]
        instances, probabilities = segment(model, image)
        caption = f"{name[:40]}  F1 {f1[i]:.2f}  {len(np.unique(mask[mask > 0]))} nuclei, {instances.max()} predicted"
        wrong = (boundary_target(mask) != boundary_target(instances)).numpy().astype(np.float32)
        middle = np.unravel_index(ndimage.gaussian_filter(wrong, CROP / 4, mode="constant").argmax(), mask.shape)
        y, x = (max(0, min(at - CROP // 2, n - CROP)) for at, n in zip(middle, mask.shape))
        pictures = gray(image), colored(mask), classes(probabilities), colored(instances)
        rows.append((caption, [picture[y : y + CROP, x : x + CROP] for picture in pictures]))
    return sheet(["image", "true instances", f"prediction: {LEGEND[len(probabilities)]}", "predicted instances"], rows)


def curves_picture(history):
    """Losses, on a logarithmic axis since the first are ten times the last, and scores against epoch."""
    canvas, width, height, top = Image.new("RGB", (980, 400), "white"), 400, 300, 40
    draw, epochs = ImageDraw.Draw(canvas), np.array([row["epoch"] for row in history])
    for left, names in (60, ("train_loss", "val_loss")), (540, ("train_dice", "val_dice", "val_f1")):
        values = np.array([[row[name] for row in history] for name in names])
        values = np.log(values.clip(1e-6)) if (loss := left == 60) else values
        low, high = (values.min() - 0.1, values.max() + 0.1) if loss else (0.5 * (values.min() >= 0.5), 1)
        x = left + width * (epochs - epochs[0]) / max(1, epochs[-1] - epochs[0])
        draw.rectangle((left, top, left + width, top + height), outline="black")
        draw.text((left + width / 2 - 15, top + height + 30), "epoch", fill="black")
        for tick in np.linspace(0, 1, 6):
            value = low + tick * (high - low)
            draw.text((left - 38, top + height * (1 - tick) - 6), f"{np.exp(value) if loss else value:.2g}", fill="black")
        for i in np.unique(np.linspace(0, len(epochs) - 1, 10).astype(int)):
            draw.text((x[i] - 4, top + height + 8), str(epochs[i]), fill="black")
        for i, (name, color) in enumerate(zip(names, ("steelblue", "darkorange", "seagreen"))):
            points = list(zip(x.tolist(), (top + height * (high - values[i]) / (high - low)).tolist()))
            draw.line(points, fill=color, width=2)
            for px, py in points:
                draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill=color)
            draw.text((left + 120 * i, top - 20), f"- {name}", fill=color)
    return canvas


# ---------------------------------------------------------------- command line
def predict_files(model, paths, out):
    """Segment image files, and all images of folders, into out/predictions: a label TIFF and a picture of outlines each."""
    files, counts, bad, out = {}, [], [], out / "predictions"
    for path in map(Path, paths):
        require(path.exists(), f"--predict {path} does not exist; give images or folders")
        for file in image_files(path) if path.is_dir() else [path]:
            require(files.setdefault(file.stem, file).resolve() == file.resolve(),
                    f"{files[file.stem]} and {file} would both become {file.stem}.tif; predict them one by one")
            require(file.resolve().parent != out.resolve(), f"{file} is where its own result would go; give another --out")
    make_room(out, [stem + suffix for stem in files for suffix in (".tif", ".png")])
    for stem, file in files.items():
        try:
            image = read_image(file)
        except UserError as error:
            bad.append(str(error))
            continue
        instances, _ = segment(model, image)
        counts.append(int(instances.max()))
        labels = instances.astype(np.uint16 if counts[-1] <= 65535 else np.uint32)
        write_file(out / f"{stem}.tif", iio.imwrite("<bytes>", labels, extension=".tif", plugin="tifffile", compression="zlib"))
        picture = gray(image)
        picture[boundary_target(instances) == 2] = (255, 220, 0)
        write_picture(out / f"{stem}.png", picture)
        say(f"{file}: {counts[-1]} nuclei")
    say(f"{len(counts)} images, {sum(counts)} nuclei, in {out}")
    require(not bad, "; ".join(bad))
    return {"n_images": len(counts), "n_objects": sum(counts)}


def choose_device(name, precision):
    """(torch.device, dtype to compute in) of --device and --precision."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and WORLD_SIZE > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.zeros(1, device=name).device  # fails where there is none
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not to be had here; give --device auto, cpu, cuda, cuda:N or mps") from None
    fastest = torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
        fastest = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    elif device.type == "cpu" and (cpu := Path("/proc/cpuinfo")).exists():
        if {"avx512_bf16", "amx_bf16"} & set(cpu.read_text().split()):  # without them bf16 is slower than float32
            fastest = torch.bfloat16
    return device, torch.float32 if precision == "fp32" else fastest


def parse_arguments(argv):
    """The flags as a namespace; UserError where they are wrong or do not go together."""
    about = "Train a U-Net that finds and separates nuclei, score it, and apply it."
    parser = argparse.ArgumentParser("unet_nuclei.py", description=about, allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message}; --help lists the flags")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="dsb2018", metavar="PATH", help="folder or zip of train/, test/, or `synthetic` (default: %(default)s)")
    add("--all-images", action="store_true", help="of the Bowl's own folders, keep what is not fluorescence too (default: off)")
    add("--predict", nargs="+", metavar="PATH", help="images or folders to segment with --checkpoint (default: none)")
    add = parser.add_argument_group("model").add_argument
    add("--boundary", action="store_true", help="three classes and watershed, not foreground and components (default: off)")
    add("--width", type=int, metavar="N", help="channels of the first level (default: 64)")
    add("--checkpoint", metavar="FILE", help="a model.pt, to --predict with or, with --epochs 0, to evaluate (default: none)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, metavar="N", help="training epochs; 0 evaluates --checkpoint (default: %(default)s)")
    add("--batch-size", type=int, default=4, metavar="N", help="crops in a step (default: %(default)s)")
    add("--lr", type=float, default=0.05, metavar="RATE", help="peak learning rate, of hidden kernels (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, crops and synthetic nuclei (default: %(default)s)")
    add("--resume", action="store_true", help="go on from OUT/last.pt (default: off)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", "fp32"), help="auto: the fastest of the device (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="where results go (default: runs/foreground or runs/boundary)")
    args = parser.parse_args(argv)
    for name, low in ("epochs", 0), ("width", 1), ("batch_size", 1), ("seed", 0):
        value = getattr(args, name)
        require(value is None or value >= low, f"--{name.replace('_', '-')} must be at least {low}")
    require(0 < args.lr < math.inf, "--lr must be a positive number")
    require(args.predict or not args.checkpoint or not args.epochs,
            "--checkpoint goes with --epochs 0 (evaluate) or --predict; to train on, use --resume")
    require(args.checkpoint or not args.predict and args.epochs, "--predict and --epochs 0 need --checkpoint, a model.pt")
    return args


def run(args):
    """What `main` does once the arguments are parsed; mistakes of the user's are UserErrors."""
    device, precision = choose_device(args.device, args.precision)
    model = load_model(args.checkpoint, device, precision) if args.checkpoint else None
    if model:
        require(model.settings["boundary"] or not args.boundary, f"{args.checkpoint} is a foreground model; leave --boundary out")
        width = model.settings["width"]
        require(args.width in (None, width), f"--width is {args.width}, but {width} in {args.checkpoint}; leave --width out")
        args.boundary, args.width = model.settings["boundary"], width
        if RANK:
            return {}  # one process is enough to predict and to evaluate
    args.width = args.width or 64
    args.out = args.out or Path("runs", "boundary" if args.boundary else "foreground")
    if args.predict:
        return predict_files(model, args.predict, args.out)

    parallel = WORLD_SIZE > 1 and not model
    if parallel:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if RANK:
            torch.distributed.barrier()  # rank 0 downloads, the others wait
    train, test = load_data(args.data, args.seed, args.all_images)
    if parallel and RANK == 0:
        torch.distributed.barrier()
    checksum = hashlib.sha256()
    for name, samples in ("training", train), ("test", test):
        for sample in samples:
            checksum.update(sample.name.encode() + sample.image.tobytes() + sample.mask.tobytes())
        shapes, nuclei = [sample.image.shape for sample in samples], sum(len(np.unique(s.mask[s.mask > 0])) for s in samples)
        say(f"data: {len(samples)} {name} images of {min(shapes)} to {max(shapes)} pixels with {nuclei} nuclei")
    say(f"device: {device}, computing in {str(precision).split('.')[1]}" + f", {WORLD_SIZE} processes" * (WORLD_SIZE > 1))
    about = dict(data=str(args.data), data_sha256=checksum.hexdigest(), device=str(device), precision=str(precision),
                 train_images_per_second=None)
    if not model:
        history = run_training(args, train, about["data_sha256"], device, precision)
        if parallel:
            torch.distributed.destroy_process_group()
        if RANK:
            return {}
        about["train_images_per_second"] = np.mean([row["images_per_second"] for row in history]).round(3).item()
        args.checkpoint = args.out / "model.pt"
        model = load_model(args.checkpoint, device, precision)
    return report(args, model, test, about)


def report(args, model, test, about):
    """Score the model, write metrics.json, with `about` in it, and samples.png, and say what a person wants to know."""
    if not args.epochs:  # else of the training just done
        make_room(args.out, ("metrics.json", "samples.png"))
    metrics, f1 = evaluate(model, test)
    write_picture(args.out / "samples.png", samples_picture(model, test, f1))
    versions = {name: version(name) for name in ("torch", "numpy", "scikit-image", "scipy")} | {"python": sys.version.split()[0]}
    metrics |= about | dict(versions=versions, settings=vars(args))
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())  # str: of paths
    if NOTEBOOK:
        from IPython.display import display

        for name in ("data.png", "curves.png", "samples.png"):
            if (args.out / name).exists():
                display(Image.open(args.out / name))
    say(f"{len(test)} test images: AP = TP / (TP + FP + FN) is {metrics['ap@0.5']:.4f} at IoU 0.5, "
        f"{metrics['ap@0.5:0.95']:.4f} over IoU 0.5 to 0.95; F1 below is the mean over images at IoU 0.5")
    say(f"of {metrics['n_objects']} nuclei {metrics['found']} found, {metrics['missed']} missed; {metrics['made_up']} made up")
    say(f"model, scores and pictures: {args.out}")
    words = ["--checkpoint", str(args.checkpoint), "--predict", "FOLDER"]
    say(f"segment your own images: {f'main({words})' if NOTEBOOK else ' '.join(['python unet_nuclei.py', *words])}")
    say(f"Mean f1 score: {metrics['f1@0.5']:.4f}")
    return metrics


def main(argv=None):
    """The command line, `argv` its words; returns the metrics as a dict.

    A mistake of the user's ends with one line and status 2, Ctrl-C with status 130, SIGTERM with 143. In a notebook they
    are exceptions that show as one line, and without `argv` the kernel's own arguments are left alone.
    """
    status = 2
    try:
        return run(parse_arguments([] if argv is None and NOTEBOOK else argv))
    except SystemExit:  # after --help; a notebook would show an error
        if NOTEBOOK:
            return None
        raise
    except UserError as error:
        message = f"error: {error}"
    except torch.cuda.OutOfMemoryError:
        message = "error: the GPU is out of memory; lower --batch-size or --width"
    except OSError as error:
        message = f"error: {error}; make room, or give another --out"
    except KeyboardInterrupt as stop:
        status = stop.args[0] if stop.args else 130
        message = "stopped; training goes on after its last whole epoch with the same command and --resume"
    live()
    if NOTEBOOK:
        raise UserError(message)
    print(message, file=sys.stderr)
    raise SystemExit(status)


def terminate(*_):
    """Handler of SIGTERM, which Kaggle and Slurm send before they take the machine away."""
    raise KeyboardInterrupt(143)


if __name__ == "__main__":
    if "__file__" in globals():
        signal.signal(signal.SIGTERM, terminate)
        main()
    else:
        print('unet_nuclei is ready. To train, run in the next cell: main(["--boundary", "--epochs", "10"])')
