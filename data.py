"""CIFAR-100 as tensors on the device, augmented in whole batches; a synthetic set for a machine without data.

    data = load_data("cifar100", "data", device)            # uint8 images, once
    order, views = epoch_draws(seed, epoch, len(data.train.targets))
    images = normalise(crop_and_flip(data.train.images[order[:64]], views[:64]))

No loader processes and no PIL in that loop: the whole set is 184 MB of uint8. Folders of images (ImageNet) do need both; they
stand at the end of the file.
"""

import functools
import http.client
import itertools
import math
import os
import random
import signal
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import functional as pil

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)      # of pixels in [0, 1]; as in the field's code
PAD = 4                                                             # pixels of black on each side before the crop
VIEWS = (2 * PAD + 1) ** 2 * 2                                      # 81 crops x 2 flips = 162 views of an image
SYNTHETIC_SIZES = 10_000, 2_000                                     # training and test images
TIMEOUT = 30                                                        # seconds without a byte before a download is given up
HELD_OUT_KEY = 2**64 - 1                                            # draws of this seed are the same for every run

CIFAR100_CLASSES = tuple("""
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split())


class Split(NamedTuple):
    images: torch.Tensor        # (N, 3, 32, 32) uint8
    targets: torch.Tensor       # (N,) int64


class Data(NamedTuple):
    train: Split
    test: Split
    eval: Split                 # what a run is evaluated on: the test split, or the held-out training images
    eval_name: str              # "test" or "val"
    num_classes: int = 100


# ---------------------------------------------------------------- the random draws


def epoch_draws(seed, epoch, n):
    """(order, views) of one epoch, int64 arrays (n,): a shuffle, and for each place in it one of VIEWS.

    A pure function of (seed, epoch), by a counter-based generator keyed with both: seeds and epochs never share draws,
    resuming needs no generator state, and the raw 64-bit words are the same in every NumPy version.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(2 * n).reshape(2, n)
    order = np.argsort(words[0], kind="stable")
    views = words[1] % np.uint64(VIEWS)         # the bias of a 64-bit word modulo 162 is below 1e-17
    return order, views.astype(np.int64)


def crop_and_flip(images, views):
    """The field's augmentation, one view per image: pad by 4 black pixels, crop 32 x 32, flip.

    images: (B, 3, H, W) uint8. views: (B,) int64 in [0, VIEWS): (9 top + left) * 2 + flip. Returns (B, 3, H, W) uint8.
    """
    channels, height, width = images.shape[1:]
    row, column = (torch.arange(n, device=images.device) for n in (height, width))
    top, left, flip = views // 2 // (2 * PAD + 1), views // 2 % (2 * PAD + 1), views % 2 == 1
    rows = top[:, None] + row
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    places = (rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]).flatten(1)    # in the padded image, one gather
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).flatten(2)
    return padded.gather(2, places[:, None].expand(-1, channels, -1)).view(images.shape)


@functools.cache
def _statistics(device, *statistics):
    """Mean and deviation on the device, (3, 1, 1): copied there once."""
    return tuple(torch.tensor(s, device=device).view(3, 1, 1) for s in statistics)


def normalise(images, mean=MEAN, std=STD):
    """uint8 (B, 3, H, W) -> float32, (x / 255 - mean) / std, channels last. The same bits as ToTensor and Normalize."""
    mean, std = _statistics(images.device, mean, std)
    x = images.to(torch.float32).div_(255).sub_(mean).div_(std)     # planes first: over three channels last it takes four times as long
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- the strong view of multi-level distillation


OPERATIONS = ("AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Identity", "Posterize", "Rotate", "Sharpness",
              "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY")       # FixMatch's, each with probability 1/14


class StrongDraws(NamedTuple):
    views: torch.Tensor         # (N,) int64, the crop and flip
    operations: torch.Tensor    # (N, 2) int64 in [0, 14): two, with replacement, one after the other
    magnitudes: torch.Tensor    # (N, 2) float in [0, 1): the place in each operation's range
    cutout: torch.Tensor        # (N, 3) float in [0, 1): side / 16 pixels, centre x / 32, centre y / 32

    def __getitem__(self, part):
        return StrongDraws(*(draws[part] for draws in tuple(self)))

    def to(self, device):
        return StrongDraws(*(draws.to(device) for draws in tuple(self)))


def strong_draws(seed, epoch, n):
    """The draws of one epoch's strong views, independent of `epoch_draws`; a pure function of (seed, epoch)."""
    key = np.array([seed, epoch + 2**32], dtype=np.uint64)
    words = torch.from_numpy(np.random.Philox(key=key).random_raw(8 * n).reshape(n, 8).view(np.int64) >> 11 & 2**53 - 1)
    uniform = (words.double() * 2**-53).float().clamp_(max=1 - 2**-24)
    return StrongDraws(words[:, 0] % VIEWS, words[:, 1:3] % len(OPERATIONS), uniform[:, 3:5], uniform[:, 5:8])


def strong_view(images, draws):
    """Crop, flip, two of OPERATIONS and a cutout, each image with its own draws. (B, 3, H, W) uint8 to the same.

    Pillow's arithmetic: nearest neighbour, black outside, blends that truncate. The enhancers' factors are in [0.05, 0.95],
    posterize keeps 4 to 7 bits, rotation is within 30 degrees, shear within 0.3, translation within 0.3 of the side.
    """
    return strong_operations(crop_and_flip(images, draws.views), draws)


def strong_operations(images, draws):
    """`strong_view` after its crop and flip; images of any size."""
    for k in range(2):
        images = _operate(images, draws.operations[:, k], draws.magnitudes[:, k])
    return _cutout(images, *draws.cutout.unbind(1))


def _operate(x, operation, u):
    """One operation an image. Three families serve all fourteen: tables of 256 grey levels, one affine map, two blends."""
    u = u[:, None, None]

    def is_one_of(*names):
        chosen = torch.zeros_like(operation, dtype=torch.bool)
        for name in names:
            chosen = chosen | (operation == OPERATIONS.index(name))
        return chosen[:, None, None, None]

    flat = x.flatten(2).long()
    red, green, blue = flat.unbind(1)
    grey = (19595 * red + 38470 * green + 7471 * blue + 2**15 >> 16).view(len(x), 1, *x.shape[2:])
    factor = 0.05 + 0.9 * u[..., None]

    table = _tables(flat, operation, u, grey).gather(2, flat).view_as(x)
    moved = _affine(x, operation, u)
    colour = _blend(grey.float(), x.float(), factor).to(torch.uint8)
    sharp = _blend(_smooth(x), x.float(), factor).to(torch.uint8)

    x = torch.where(is_one_of("AutoContrast", "Brightness", "Contrast", "Equalize", "Posterize", "Solarize"), table, x)
    x = torch.where(is_one_of("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"), moved, x)
    x = torch.where(is_one_of("Color"), colour, x)
    return torch.where(is_one_of("Sharpness"), sharp, x)


def _blend(degenerate, x, factor):
    """Between a degenerate image (0) and the image itself (1), truncated as Pillow does."""
    return (degenerate + factor * (x - degenerate)).trunc()


def _tables(flat, operation, u, grey):
    """The operations that map grey levels, as tables (B, 3, 256) uint8; flat: (B, 3, H W) levels, u: (B, 1, 1)."""
    level = torch.arange(256, device=flat.device).expand(*flat.shape[:2], 256)
    real = torch.float32 if flat.device.type == "mps" else torch.float64
    factor, mean = 0.05 + 0.9 * u, (2 * grey.flatten(1).sum(1) + grey[0].numel()) // (2 * grey[0].numel())

    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    span = (high - low).to(real)                # 0 for one level, where the table is the identity
    scale = torch.full_like(span, 255).div(span)        # 255 / span would be 255 * (1 / span), rounded twice
    stretch = torch.where(high > low, (level * scale - low * scale).nan_to_num(0, 0, 0).clamp(0, 255).long(), level)

    histogram = torch.zeros_like(level).scatter_add(2, flat, torch.ones_like(flat))
    step = (flat.shape[2] - histogram.gather(2, high)) // 255           # the last level's pixels are not counted
    before = histogram.cumsum(2) - histogram
    equal = torch.where(step > 0, ((step // 2 + before) // step.clamp(min=1)).clamp(max=255), level)

    kept = 2 ** (4 - (4 * u).long())            # 4 to 7 bits are kept: levels are rounded down to multiples of 16 to 2
    tables = {"AutoContrast": stretch, "Brightness": _blend(torch.zeros_like(factor), level.float(), factor),
              "Contrast": _blend(mean[:, None, None].float(), level.float(), factor), "Equalize": equal,
              "Posterize": level - level % kept, "Solarize": torch.where(level < 256 * u, level, 255 - level)}
    result = level
    for name, values in tables.items():
        result = torch.where((operation == OPERATIONS.index(name))[:, None, None], values.long(), result)
    return result.to(torch.uint8)


def _affine(x, operation, u):
    """Rotation, shear and translation as one gather at nearest neighbours, in Pillow's 16-bit fixed point."""
    height, width = x.shape[2:]
    u, one, zero = u[:, 0, 0], torch.ones_like(u[:, 0, 0]), torch.zeros_like(u[:, 0, 0])
    angle = torch.deg2rad(30 - 60 * u)          # Pillow turns counter-clockwise
    sin, cos, small = angle.sin(), angle.cos(), 0.6 * u - 0.3
    middle_x, middle_y = width / 2, height / 2
    maps = {"Rotate": (cos, sin, middle_x - cos * middle_x - sin * middle_y,
                       -sin, cos, middle_y + sin * middle_x - cos * middle_y),
            "ShearX": (one, small, zero, zero, one, zero), "ShearY": (one, zero, zero, small, one, zero),
            "TranslateX": (one, zero, small * width, zero, one, zero), "TranslateY": (one, zero, zero, zero, one, small * height)}
    matrix = torch.stack([one, zero, zero, zero, one, zero], 1)
    for name, values in maps.items():
        matrix = torch.where((operation == OPERATIONS.index(name))[:, None], torch.stack(values, 1), matrix)
    a, b, c, d, e, f = matrix.unbind(1)
    c, f = c + (a + b) / 2, f + (d + e) / 2     # from the middle of a pixel
    a, b, c, d, e, f = ((65536 * v + 0.5).floor().long()[:, None, None] for v in (a, b, c, d, e, f))
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    from_x, from_y = a * column + b * row + c >> 16, d * column + e * row + f >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    index = torch.where(inside, from_y * width + from_x, 0).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return torch.where(inside[:, None], x.flatten(2).gather(2, index).view_as(x), 0)


def _smooth(x):
    """Pillow's SMOOTH filter, (1 1 1; 1 5 1; 1 1 1) / 13 rounded, the border as it was; float."""
    x = x.int()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth.float()


def _cutout(x, side, centre_x, centre_y):
    """A grey rectangle (125, 123, 114) of up to half the image's side, its far edge included, clipped."""
    height, width = x.shape[2:]
    side = side * width / 2

    def covered(centre, size):
        first = (centre * size - side / 2).clamp(min=0).floor()
        last = (first + side).clamp(max=size).floor()
        place = torch.arange(size, device=x.device)
        return (place >= first[:, None]) & (place <= last[:, None])

    hole = covered(centre_y, height)[:, None, :, None] & covered(centre_x, width)[:, None, None, :]
    return torch.where(hole, torch.tensor((125, 123, 114), dtype=torch.uint8, device=x.device).view(3, 1, 1), x)


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(network, split, batch_size=500):
    """Mean cross-entropy, top-1 and top-5 (%) of `network`, images (B, 3, H, W) -> logits (B, K), on a whole split."""
    sums = torch.zeros(3, device=split.images.device)
    for images, targets in zip(split.images.split(batch_size), split.targets.split(batch_size)):
        logits = network(normalise(images)).float()
        sums += torch.stack([F.cross_entropy(logits, targets, reduction="sum"), *top_k_hits(logits, targets)])
    loss, top1, top5 = (sums / len(split.targets)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def top_k_hits(logits, targets):
    """How many of the targets (B,) are the first, and among the first five, of the logits (B, K): two scalars."""
    hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    return hits[:, 0].sum(), hits.any(1).sum()


# ---------------------------------------------------------------- the sets


def load_data(name, data_dir, device, *, train_images=None, val_from_train=0, download=True):
    """The training and the evaluation images of `name` ("cifar100" or "synthetic") on `device`, as Data.

    val_from_train: hold that many training images out and evaluate on them, the test split untouched.
    train_images: train on the first so many of the rest. Both in one fixed shuffle, the same for every seed.
    Raises ValueError, one line that says what to do, for missing or damaged data and for numbers that do not fit.
    """
    train, test = tuple(map(synthetic, SYNTHETIC_SIZES, (1, 2))) if name == "synthetic" else read_cifar100(data_dir, download)
    shuffle = torch.from_numpy(epoch_draws(HELD_OUT_KEY, 0, len(train.targets))[0])
    rest = len(shuffle) - val_from_train
    if rest < 1:
        raise ValueError(f"--val-from-train {val_from_train} leaves nothing of {len(shuffle)} training images")
    if train_images is not None and not 1 <= train_images <= rest:
        raise ValueError(f"--train-images {train_images}: there are {rest} training images")

    def pick(split, indices=slice(None)):
        return Split(split.images[indices].to(device), split.targets[indices].to(device))

    test, held_out = pick(test), pick(train, shuffle[rest:])
    train = pick(train, shuffle[: train_images or rest]) if val_from_train or train_images else pick(train)
    return Data(train, test, *((held_out, "val") if val_from_train else (test, "test")))


LAYOUTS = (CIFAR100.base_folder, "")    # the archive's folder, or its three files directly in the folder that is named


def has_cifar100(data_dir):
    """Whether CIFAR-100 is in `data_dir`, unpacked or as its archive; nothing is downloaded."""
    folder = Path(data_dir).expanduser()
    return any((folder / name).exists() for name in (CIFAR100.filename, *(Path(base, "train") for base in LAYOUTS)))


def read_cifar100(data_dir, download=True):
    """(train, test) of the official CIFAR-100 in `data_dir`, unpacked and, if `download`, downloaded (169 MB) where it is missing.

    The files' MD5 are checked. The environment variable CIFAR100_URL names another place, which is tried before the official one.
    """
    folder = Path(data_dir).expanduser()
    for base in LAYOUTS:
        reader = type("Reader", (CIFAR100,), {"base_folder": base})
        try:
            sets = [reader(folder, train=train) for train in (True, False)]
            break
        except RuntimeError:                    # not there, or the checksums differ
            pass
    else:
        sets = _fetch_cifar100(folder, download)
    # (N, 32, 32, 3) as the reader gives it -> (N, 3, 32, 32)
    return tuple(Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets)


def _fetch_cifar100(folder, download):
    damaged = any((folder / base / "train").exists() for base in LAYOUTS)
    problem = f"CIFAR-100 in {folder} is damaged (its checksums differ)" if damaged else f"no CIFAR-100 in {folder}"
    archive = folder / CIFAR100.filename
    if not check_integrity(archive, CIFAR100.tgz_md5):
        if not download:
            raise ValueError(f"{problem}; train_cifar.py downloads it anew where what is damaged is removed")
        print(f"{problem}: downloading 169 MB, once", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fetch([*filter(None, [os.environ.get("CIFAR100_URL")]), CIFAR100.url], archive, CIFAR100.tgz_md5)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{problem}, and it could not be downloaded ({error}). The same command goes on with what has come; or set "
                             f"CIFAR100_URL to a mirror, or put cifar-100-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) into "
                             f"{folder}, or name the folder that holds cifar-100-python with --data-dir, or try --data synthetic") from None
    try:
        return [CIFAR100(folder, train=train, download=True) for train in (True, False)]     # unpacks the archive
    except OSError as error:
        raise ValueError(f"{archive} could not be unpacked ({error.strerror or error}): name a folder with room for it with --data-dir") from None


def fetch(urls, path, md5):
    """Downloads the first of `urls` that works to `path`, by way of path.part, with which a later attempt goes on.

    Raises the last address's OSError, ValueError or http.client.HTTPException where none works or the checksum differs.
    """
    part, problem = path.with_name(f"{path.name}.part"), None
    for url in urls:
        while True:
            before = part.stat().st_size if part.exists() else 0
            print(f"{url}{f', from byte {before:,} on' if before else ''}", flush=True)
            try:
                _receive(url, part, before)
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = error
                if part.exists() and part.stat().st_size > before:      # it breaks off, but something came: once more
                    continue
                break
            if check_integrity(part, md5):
                part.with_name(f"{part.name}.version").unlink(missing_ok=True)
                part.replace(path)
                return
            part.unlink()
            problem = ValueError(f"what {url} gave has another checksum")
            break
    raise problem


def _receive(url, part, done):
    """The rest of a file after the first `done` bytes in `part`, or all of it where the server has another by now."""
    version = part.with_name(f"{part.name}.version")        # the server's name for the file that `part` is the beginning of
    known = version.read_text() if done and version.exists() else ""
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-", "If-Range": known} if known else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and known:     # nothing is missing
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        if response.status != 206:
            done = 0
            version.write_text(response.headers["ETag"] or response.headers["Last-Modified"] or "")
        total, shown = done + int(response.headers["Content-Length"] or 0), time.monotonic()
        while block := response.read(2**16):
            file.write(block)
            done += len(block)
            if time.monotonic() - shown >= 10:      # seconds
                shown = time.monotonic()
                print(f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", flush=True)
    if done < total:
        raise OSError(f"the connection broke off after {done / 1e6:.1f} of {total / 1e6:.1f} MB")


@functools.cache
def synthetic(n, part, seed=0):
    """n made images, 32 x 32, of 100 classes in 20 families of five. `part` draws the images, `seed` the classes.

    A class is a smooth pattern, near those of its family; an image is its class's pattern, moved and partly covered
    by another class's, with noise. The amounts were set so that a larger network, trained longer, beats a small one.
    """
    generator = torch.Generator().manual_seed(seed)

    def smooth(count, size):
        return F.interpolate(torch.randn(count, 3, size, size, generator=generator), 32, mode="bicubic")

    patterns = smooth(20, 4).repeat_interleave(5, 0) + 0.5 * smooth(100, 8)
    generator.manual_seed(1_000_003 * (seed + 1) + part)
    targets = torch.arange(n) % 100
    other = torch.randint(100, (n,), generator=generator)
    share = 0.6 * torch.rand(n, 1, 1, 1, generator=generator)
    images = (1 - share) * patterns[targets] + share * patterns[other] + 0.8 * smooth(n, 16)
    images = images + 0.3 * torch.randn(images.shape, generator=generator)
    images = images.mul_(45).add_(128).clamp_(0, 255).to(torch.uint8)
    views = torch.randint(VIEWS, (n,), generator=generator)
    return Split(crop_and_flip(images, views), targets)


# ---------------------------------------------------------------- folders of images (ImageNet)


WAIT = 600      # seconds for a batch of images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folders(NamedTuple):
    train: list                 # [(path, target)]
    eval: list
    eval_name: str              # "val", or "held-out" training images
    classes: list


def load_folders(data_dir, val_from_train=0):
    """The images under data_dir/train/CLASS/ and data_dir/val/CLASS/. ValueError, one line, for what is missing.

    val_from_train: hold so many training images out, by one fixed shuffle, and evaluate on them; val/ is not needed then.
    """
    root, sets = Path(data_dir).expanduser(), {}
    for part in ("train",) if val_from_train else ("train", "val"):
        try:
            sets[part] = ImageFolder(root / part)
        except OSError as error:
            raise ValueError(f"no folders of images, one for each class, in {root / part} ({str(error).splitlines()[0]}); name "
                             "the folder that holds train/ and val/ with --data-dir") from None
    train = sets["train"]
    if not val_from_train:
        if sets["val"].classes != train.classes:
            odd = sorted(set(sets["val"].classes) ^ set(train.classes))
            raise ValueError(f"{root}: train/ and val/ have different classes, for instance {', '.join(odd[:3])}")
        return Folders(train.samples, sets["val"].samples, "val", train.classes)
    order = epoch_draws(HELD_OUT_KEY, 0, len(train.samples))[0].tolist()
    if val_from_train >= len(order):
        raise ValueError(f"--val-from-train {val_from_train} leaves nothing of {len(order)} training images")
    return Folders([train.samples[i] for i in sorted(order[:-val_from_train])],
                   [train.samples[i] for i in sorted(order[-val_from_train:])], "held-out", train.classes)


def random_box(width, height, draw):
    """(left, top, width, height) of a crop of 8 to 100 % of the area and a side ratio of 3/4 to 4/3 (Szegedy et al. 2015).

    draw: a random.Random. Ten attempts, then the largest centred box of an allowed ratio.
    """
    for _ in range(10):
        area, ratio = width * height * draw.uniform(0.08, 1), math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


class FolderImages(Dataset):
    """Decoded images by key (index, seed): `views` random crops of each in training, the centre in evaluation.

    An item is ([uint8 (3, size, size)], [flip], target, bad): bad lists the indices of images that could not be decoded; in
    training the next one stands in, in evaluation black does.
    """

    def __init__(self, samples, size, views=0):
        self.samples, self.size, self.views = samples, size, views

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, seed = key
        bad = []
        while True:
            path, target = self.samples[index]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")     # odd EXIF, which is not read
                    with Image.open(path) as file:
                        image = to_rgb(file)
                break
            except Exception:       # Pillow raises a dozen types for damaged files
                bad.append(index)
                if not self.views or len(bad) > 100:        # so many are an error for the caller
                    views = self.views or 1
                    return [torch.zeros(3, self.size, self.size, dtype=torch.uint8)] * views, [False] * views, target, bad
                index = (index + 1) % len(self.samples)
        draw = random.Random(seed)
        images, flips = [], []
        for _ in range(self.views):
            left, top, width, height = random_box(*image.size, draw)
            images.append(pil.resized_crop(image, top, left, height, width, [self.size, self.size]))
            flips.append(draw.random() < 0.5)
        if not self.views:
            images, flips = [pil.center_crop(pil.resize(image, round(self.size * 8 / 7)), [self.size, self.size])], [False]
        return [pil.pil_to_tensor(x) for x in images], flips, target, bad


def to_rgb(image):
    """A Pillow image of any mode in RGB: 16-bit grey scaled, not clipped; what is transparent on white. EXIF is not looked at."""
    if image.mode.startswith("I"):
        image = image.point(lambda level: level / 256).convert("L")
    if "transparency" in image.info or "A" in image.getbands():
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def collate(items):
    """([uint8 (B, 3, S, S) of each view], [flips (B,) of each view], targets (B,), bad indices)."""
    images, flips, targets, bad = zip(*items)
    return ([torch.stack(view) for view in zip(*images)], [torch.tensor(view) for view in zip(*flips)], torch.tensor(targets),
            [i for some in bad for i in some])


def folder_batches(dataset, keys, workers, pin=False):
    """A DataLoader over lists of keys, one list a batch. Its processes live as long as it does: `keys` may be filled anew for each epoch.

    They are forked once, as a fork beside running threads can leave a process that hangs (CPython 3.11 did, after a collective); one
    that says nothing for WAIT seconds is a RuntimeError.
    """
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate, pin_memory=pin, worker_init_fn=ignore_signals,
                      persistent_workers=workers > 0, timeout=WAIT if workers else 0)


def ignore_signals(worker):
    """In a loading process: what stops a job reaches all its processes, and the one that trains still needs images for its save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def folder_keys(seed, epoch, n, batch, first_step, rank, world, parts):
    """Rank's share of an epoch's batches: keys, `parts` lists a batch, and where in the epoch each list begins.

    Batches are the same whatever the number of processes: each takes its part of every one. Parts and lists are of equal length, or
    one apart. The last, incomplete batch is left out.
    """
    order, _ = epoch_draws(seed, epoch, n)
    seeds = np.random.Philox(key=np.array([seed, epoch + 2**33], dtype=np.uint64)).random_raw(n)
    keys, places, begin, end = [], [], batch * rank // world, batch * (rank + 1) // world
    for step in range(first_step, n // batch):
        bounds = [step * batch + begin + (end - begin) * i // parts for i in range(parts + 1)]
        for first, last in itertools.pairwise(bounds):
            keys.append(list(zip(order[first:last].tolist(), seeds[first:last].tolist())))
            places.append(first)
    return keys, places


def normalise_folder(images, flips):
    """uint8 (B, 3, S, S), flipped where `flips` says so, with ImageNet's mean and deviation, as `normalise`."""
    return normalise(torch.where(flips[:, None, None, None], images.flip(3), images), IMAGENET_MEAN, IMAGENET_STD)
