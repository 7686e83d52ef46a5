"""Images: CIFAR-100 as tensors on the device, augmented in batches; a synthetic set; folders of large images.

    data = load_data("cifar100", "data", device)            # uint8 images, once
    order, views = epoch_draws(seed, epoch, len(data.train.targets))
    images = normalise(crop_and_flip(data.train.images[order[:64]], views[:64]))

No loading processes and no PIL in that loop: the whole set is 184 MB of uint8. Folders (ImageNet) need both.
"""

import functools
import itertools
import math
import os
import random
import signal
import time
import urllib.error
import urllib.request
import warnings
from http.client import HTTPException
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

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of pixels in [0, 1]; as in the field's code
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4                                 # pixels of black on each side before the crop
VIEWS = (2 * PAD + 1) ** 2 * 2          # 81 crops x 2 flips = 162 views of an image
SYNTHETIC_SIZES = 10_000, 2_000         # training and test images
HELD_OUT_KEY = 2**64 - 1                # draws of this seed are the same for every run
TIMEOUT = 30    # seconds without a byte before a download is given up
WAIT = 600      # seconds without a batch before a loading process is given up

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

    A pure function of (seed, epoch), by a counter-based generator keyed with both: seeds and epochs share no
    draws, resuming needs no generator state, and the raw words are the same in every NumPy version.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(2 * n).reshape(2, n)
    order = np.argsort(words[0], kind="stable")
    views = words[1] % np.uint64(VIEWS)         # the bias of a 64-bit word modulo 162 is below 1e-17
    return order, views.astype(np.int64)


def crop_and_flip(images, views):
    """The field's augmentation, one view per image: pad by 4 black pixels, crop to the size before, flip.

    images: (B, 3, H, W) uint8. views: (B,) int64 in [0, VIEWS): (9 top + left) * 2 + flip. Returns new ones.
    """
    channels, height, width = images.shape[1:]
    row, column = (torch.arange(n, device=images.device) for n in (height, width))
    top, left, flip = views // 2 // (2 * PAD + 1), views // 2 % (2 * PAD + 1), views % 2 == 1
    rows = top[:, None] + row
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    places = (rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]).flatten(1)    # in the padded image
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).flatten(2)
    return padded.gather(2, places[:, None].expand(-1, channels, -1)).view(images.shape)


@functools.cache
def _statistics(device, *statistics):
    """Mean and deviation on the device, (3, 1, 1): copied there once."""
    return tuple(torch.tensor(s, device=device).view(3, 1, 1) for s in statistics)


def normalise(images, mean=MEAN, std=STD):
    """uint8 (B, 3, H, W) -> float32, (x / 255 - mean) / std, channels last: the bits of torchvision's."""
    mean, std = _statistics(images.device, mean, std)
    x = images.to(torch.float32).div_(255).sub_(mean).div_(std)     # plane by plane: four times as fast
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(network, split, batch_size=500):
    """Mean cross-entropy, top-1 and top-5 (%) of `network`, (B, 3, H, W) -> logits (B, K), on a split."""
    sums = torch.zeros(3, device=split.images.device)
    for images, targets in zip(split.images.split(batch_size), split.targets.split(batch_size)):
        logits = network(normalise(images)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.any(1).sum()])
    loss, top1, top5 = (sums / len(split.targets)).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


# ---------------------------------------------------------------- the sets


def load_data(name, data_dir, device, *, train_images=None, val_from_train=0, download=True):
    """The training and the evaluation images of `name` ("cifar100" or "synthetic") on `device`, as Data.

    val_from_train: hold that many training images out and evaluate on them, the test split untouched.
    train_images: train on the first so many of the rest. Both in one fixed shuffle, the same for every seed.
    ValueError, one line that says what to do, for missing or damaged data and for numbers that do not fit.
    """
    if name == "synthetic":
        train, test = map(synthetic, SYNTHETIC_SIZES, (1, 2))
    else:
        train, test = read_cifar100(data_dir, download)
    shuffle, rest = held_out(len(train.targets), val_from_train)
    if train_images is not None and not 1 <= train_images <= rest:
        raise ValueError(f"--train-images {train_images}: there are {rest} training images")

    def pick(split, indices=slice(None)):
        return Split(split.images[indices].to(device), split.targets[indices].to(device))

    test, val = pick(test), pick(train, shuffle[rest:])
    train = pick(train, shuffle[:train_images or rest]) if val_from_train or train_images else pick(train)
    return Data(train, test, *((val, "val") if val_from_train else (test, "test")))


def held_out(n, val_from_train):
    """(a shuffle of n training images, the same for every run, how many stay): the others are held out."""
    if val_from_train >= n:
        raise ValueError(f"--val-from-train {val_from_train} leaves nothing of {n} training images")
    return torch.from_numpy(epoch_draws(HELD_OUT_KEY, 0, n)[0]), n - val_from_train


LAYOUTS = CIFAR100.base_folder, ""      # the archive's folder, or its three files in the named folder itself


def _unpacked(folder):
    """Whether the files of CIFAR-100 are in a folder, whole or not."""
    direct = all((folder / name).is_file() for name in ("train", "test", "meta"))
    return direct or (folder / CIFAR100.base_folder).is_dir()


def has_cifar100(data_dir):
    """Whether CIFAR-100 is in `data_dir`, unpacked or as its archive; nothing is downloaded."""
    folder = Path(data_dir).expanduser()
    return _unpacked(folder) or (folder / CIFAR100.filename).exists()


def read_cifar100(data_dir, download=True):
    """(train, test) of the official CIFAR-100 in `data_dir`; `download` it (169 MB) where it is missing.

    The files' MD5 are checked. The environment variable CIFAR100_URL names a mirror, which is tried first.
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
    return tuple(Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
                 for s in sets)                 # the reader gives (N, 32, 32, 3)


def _fetch_cifar100(folder, download):
    problem = f"no CIFAR-100 in {folder}"
    if _unpacked(folder):
        problem = f"CIFAR-100 in {folder} is damaged (its checksums differ)"
    archive = folder / CIFAR100.filename
    if not check_integrity(archive, CIFAR100.tgz_md5):
        if not download:
            raise ValueError(f"{problem}; train_cifar.py downloads it anew where what is damaged is removed")
        print(f"{problem}: downloading 169 MB, once", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fetch([*filter(None, [os.environ.get("CIFAR100_URL")]), CIFAR100.url], archive, CIFAR100.tgz_md5)
        except (OSError, ValueError, HTTPException) as error:
            raise ValueError(
                f"{problem}, and it could not be downloaded ({error}). The same command goes on with what "
                "has come; or set CIFAR100_URL to a mirror, or put cifar-100-python.tar.gz "
                f"(https://www.cs.toronto.edu/~kriz/cifar.html) into {folder}, or name the folder that holds "
                "cifar-100-python with --data-dir, or try --data synthetic") from None
    try:            # the reader unpacks it
        return [CIFAR100(folder, train=train, download=True) for train in (True, False)]
    except OSError as error:
        raise ValueError(f"{archive} could not be unpacked ({error.strerror or error}): name a folder with "
                         "room for it with --data-dir") from None


def fetch(urls, path, md5):
    """Downloads the first of `urls` that works to `path`, by way of path.part, where a later attempt goes on.

    Raises the last OSError, ValueError or HTTPException where none works or the checksum differs.
    """
    part, version = (path.with_name(f"{path.name}.part{end}") for end in ("", ".version"))
    for url in urls:
        while True:
            before = part.stat().st_size if part.exists() else 0
            print(f"{url}{f', from byte {before:,} on' if before else ''}", flush=True)
            try:
                _receive(url, part, version, before)
                if not check_integrity(part, md5):
                    part.unlink()
                    raise ValueError(f"what {url} gave has another checksum")
            except (OSError, ValueError, HTTPException) as error:
                problem = error
                if check_integrity(path, md5):          # another process was faster
                    return
                if not part.exists() or part.stat().st_size <= before:      # else something came: once more
                    break
            else:
                version.unlink(missing_ok=True)
                part.replace(path)
                return
    raise problem


def _receive(url, part, version, done):
    """Appends to `part` what follows its first `done` bytes, or writes all if the server's file is another.

    version: a file with the server's name (ETag) for what `part` is the beginning of.
    """
    known = version.read_text() if done and version.exists() else ""
    headers = {"Range": f"bytes={done}-", "If-Range": known} if known else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
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
    """n made images 32 x 32, 100 classes in 20 families of five. `part` draws the images, `seed` the classes.

    A class is a smooth pattern, near those of its family; an image is its class's pattern, moved and partly
    covered by another's, with noise, so much that a larger network, trained longer, beats a small one.
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


class Folders(NamedTuple):
    train: list                 # [(path, target)]
    eval: list
    eval_name: str              # "val", or "held-out" training images
    classes: list


def load_folders(data_dir, val_from_train=0):
    """The images under data_dir/train/CLASS/ and val/CLASS/, as Folders. ValueError if any are missing.

    val_from_train: hold so many training images out, in one fixed shuffle, and evaluate on them, not on val/.
    """
    root, sets = Path(data_dir).expanduser(), {}
    for part in ("train",) if val_from_train else ("train", "val"):
        try:
            sets[part] = ImageFolder(root / part)
        except OSError as error:
            raise ValueError(f"no folders of images, one for each class, in {root / part} "
                             f"({str(error).splitlines()[0]}); name the folder that holds train/ and val/ "
                             "with --data-dir") from None
    train = sets["train"]
    if not val_from_train:
        if sets["val"].classes != train.classes:
            odd = ", ".join(sorted(set(sets["val"].classes) ^ set(train.classes))[:3])
            raise ValueError(f"{root}: train/ and val/ have different classes, for instance {odd}")
        return Folders(train.samples, sets["val"].samples, "val", train.classes)
    shuffle, rest = held_out(len(train.samples), val_from_train)
    parts = [[train.samples[i] for i in sorted(part.tolist())] for part in (shuffle[:rest], shuffle[rest:])]
    return Folders(*parts, "held-out", train.classes)


def random_box(width, height, draw):
    """(left, top, width, height) of a crop: 8 to 100 % of the area, sides 3:4 to 4:3 (Szegedy et al. 2015).

    draw: a random.Random. Ten attempts, then the largest centred box of an allowed ratio.
    """
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


class FolderImages(Dataset):
    """Decoded images by key (index, seed): `views` random crops in training, the centre in evaluation (0).

    An item is ([uint8 (3, size, size)], [flip], target, bad): bad lists the indices of images that could not
    be decoded; in training the next one stands in, in evaluation black does.
    """

    def __init__(self, samples, size, views=0):
        self.samples, self.size, self.views = samples, size, views

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        (index, seed), bad, count = key, [], self.views or 1
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
                    black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
                    return [black] * count, [False] * count, target, bad
                index = (index + 1) % len(self.samples)
        draw, square = random.Random(seed), [self.size, self.size]
        images, flips = [], []
        for _ in range(self.views):
            left, top, width, height = random_box(*image.size, draw)
            images.append(pil.resized_crop(image, top, left, height, width, square))
            flips.append(draw.random() < 0.5)
        if not self.views:
            images, flips = [pil.center_crop(pil.resize(image, round(self.size * 8 / 7)), square)], [False]
        return [pil.pil_to_tensor(x) for x in images], flips, target, bad


def to_rgb(image):
    """A Pillow image of any mode in RGB: 16-bit grey scaled, what is transparent on white, EXIF not read."""
    if image.mode.startswith("I"):
        image = image.point(lambda level: level / 256).convert("L")
    if "transparency" in image.info or "A" in image.getbands():
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def collate(items):
    """([uint8 (B, 3, S, S) of each view], [flips (B,) of each view], targets (B,), bad indices)."""
    images, flips, targets, bad = zip(*items)
    return ([torch.stack(view) for view in zip(*images)], [torch.tensor(view) for view in zip(*flips)],
            torch.tensor(targets), [i for some in bad for i in some])


def folder_batches(dataset, keys, workers, pin=False):
    """A DataLoader over lists of keys, one list a batch, which may be filled anew for each epoch.

    Its processes are forked once, as a fork beside running threads can leave one that hangs (CPython 3.11,
    after a collective); one that gives nothing for WAIT seconds is a RuntimeError.
    """
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate, pin_memory=pin,
                      worker_init_fn=ignore_signals, persistent_workers=workers > 0,
                      timeout=WAIT if workers else 0)


def ignore_signals(worker):
    """What stops a job reaches all its processes, and the one that trains needs images until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def folder_keys(seed, epoch, n, batch, first_step, rank, world, parts):
    """A rank's share of an epoch's batches: keys, `parts` lists a batch, and where in the epoch each begins.

    Batches are the same whatever the number of processes: each takes its part of every one. Parts and lists
    are of equal length, or one apart. The last, incomplete batch is left out.
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
    """`normalise` with ImageNet's mean and deviation, uint8 (B, 3, S, S), flipped where flips (B,) says."""
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    return normalise(images, IMAGENET_MEAN, IMAGENET_STD)
