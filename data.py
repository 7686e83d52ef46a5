"""Small images (CIFAR-100, CIFAR-10, a made set) as tensors on the device, augmented in batches.

    data = load_data("cifar100", "data", device)            # uint8 images, once
    order, views = epoch_draws(seed, epoch, len(data.train.targets))
    images = data.pixels.normalise(crop_and_flip(data.train.images[order[:64]], views[:64]))

No loading processes and no PIL in that loop: CIFAR-100 is 184 MB of uint8. Folders: folders.py.
"""

import functools
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of pixels in [0, 1]; as in the field's code
CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)      # of its training images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4                                 # pixels of black on each side before the crop
VIEWS = (2 * PAD + 1) ** 2 * 2          # 81 crops x 2 flips = 162 views of an image
SYNTHETIC_SIZES = 10_000, 2_000         # training and test images
HELD_OUT_KEY = 2**64 - 1                # draws of this seed are the same for every run
TIMEOUT = 30    # seconds without a byte before a download is given up

CIFAR100_CLASSES = tuple("""
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split())


CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())


class Preprocessing(NamedTuple):
    """What a network is given: the shorter side is `resize`, the centre of `size` is cut out, normalised."""
    mean: tuple = MEAN
    std: tuple = STD
    size: int = 32
    resize: int = 32

    @classmethod
    def of(cls, facts, size=32, resize=32):
        """Those that a checkpoint's facts say, None where they do not. size, resize: if these are lacking."""
        try:
            mean, std = (tuple(float(x) for x in facts[k]) for k in ("mean", "std"))
            size, resize = (int(facts.get(k, v)) for k, v in (("size", size), ("resize", resize)))
        except (KeyError, TypeError, ValueError):
            return None
        return cls(mean, std, size, resize) if len(mean) == len(std) == 3 and min(std) > 0 else None

    def normalise(self, images):
        """uint8 (B, 3, H, W) -> float32, as `normalise`."""
        return normalise(images, self.mean, self.std)


class Split(NamedTuple):
    images: torch.Tensor        # (N, 3, size, size) uint8
    targets: torch.Tensor       # (N,) int64


class Data(NamedTuple):
    train: Split
    test: Split
    eval: Split                 # what a run is evaluated on: the test split, or the held-out training images
    eval_name: str              # "test" or "val"; of folders "val" or "held-out"
    classes: list = CIFAR100_CLASSES        # their names
    pixels: Preprocessing = Preprocessing()

    @property
    def num_classes(self):
        return len(self.classes)


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


# ---------------------------------------------------------------- the sets


CIFAR = {"cifar100": (CIFAR100, CIFAR100_CLASSES, Preprocessing()),
         "cifar10": (CIFAR10, CIFAR10_CLASSES, Preprocessing(*CIFAR10_STATISTICS))}


def load_data(name, data_dir, device, *, train_images=None, val_from_train=0, download=True):
    """The training and the evaluation images of "cifar100", "cifar10" or "synthetic" on `device`, as Data.

    val_from_train: hold that many training images out and evaluate on them, the test split untouched.
    train_images: train on the first so many of the rest. Both in one fixed shuffle, the same for every seed.
    ValueError, one line that says what to do, for missing or damaged data and for numbers that do not fit.
    """
    if name == "synthetic":
        train, test = map(synthetic, SYNTHETIC_SIZES, (1, 2))
        about = [f"class {i}" for i in range(100)], Preprocessing()
    else:
        (train, test), about = read_cifar(name, data_dir, download), CIFAR[name][1:]
    shuffle, rest = held_out(len(train.targets), val_from_train)
    check_train_images(train_images, rest)

    def pick(split, indices=slice(None)):
        return Split(split.images[indices].to(device), split.targets[indices].to(device))

    test, val = pick(test), pick(train, shuffle[rest:])
    train = pick(train, shuffle[:train_images or rest]) if val_from_train or train_images else pick(train)
    return Data(train, test, *((val, "val") if val_from_train else (test, "test")), *about)


def held_out(n, val_from_train):
    """(a shuffle of n training images, the same for every run, how many stay): the others are held out."""
    if val_from_train >= n:
        raise ValueError(f"--val-from-train {val_from_train} leaves nothing of {n} training images")
    return torch.from_numpy(epoch_draws(HELD_OUT_KEY, 0, n)[0]), n - val_from_train


def check_train_images(wanted, there):
    if wanted is not None and not 1 <= wanted <= there:
        raise ValueError(f"--train-images {wanted}: there are {there} training images")


def _unpacked(reader, folder):
    """Whether a CIFAR's files are in a folder, whole or not: in the archive's own folder, or directly."""
    files = [name for name, _ in reader.train_list + reader.test_list] + [reader.meta["filename"]]
    return all((folder / name).is_file() for name in files) or (folder / reader.base_folder).is_dir()


def has_cifar(name, data_dir):
    """Whether that CIFAR is in `data_dir`, unpacked or as its archive; nothing is downloaded."""
    folder, reader = Path(data_dir).expanduser(), CIFAR[name][0]
    return _unpacked(reader, folder) or (folder / reader.filename).exists()


def read_cifar(name, data_dir, download=True):
    """(train, test) of the official "cifar100" or "cifar10" in `data_dir`; `download` it where it is missing.

    The files' MD5 are checked. The environment variable CIFAR100_URL or CIFAR10_URL names a mirror, which is
    tried first.
    """
    folder, reader = Path(data_dir).expanduser(), CIFAR[name][0]
    for base in (reader.base_folder, ""):       # or the files in the named folder itself
        here = type("Reader", (reader,), {"base_folder": base})
        try:
            sets = [here(folder, train=train) for train in (True, False)]
            break
        except RuntimeError:                    # not there, or the checksums differ
            pass
    else:
        sets = _fetch_cifar(reader, folder, download)
    return tuple(Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
                 for s in sets)                 # the reader gives (N, 32, 32, 3)


def _fetch_cifar(reader, folder, download):
    name, archive = reader.__name__.replace("R1", "R-1"), folder / reader.filename
    problem = (f"{name} in {folder} is damaged (its checksums differ)" if _unpacked(reader, folder)
               else f"no {name} in {folder}")
    if not check_integrity(archive, reader.tgz_md5):
        if not download:
            raise ValueError(f"{problem}; train_cifar.py downloads it anew where what is damaged is removed")
        print(f"{problem}: downloading 170 MB, once", flush=True)
        mirror = reader.__name__ + "_URL"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fetch([*filter(None, [os.environ.get(mirror)]), reader.url], archive, reader.tgz_md5)
        except (OSError, ValueError, HTTPException) as error:
            raise ValueError(
                f"{problem}, and it could not be downloaded ({error}). The same command goes on with what "
                f"has come; or set {mirror} to a mirror, or put {reader.filename} "
                f"(https://www.cs.toronto.edu/~kriz/cifar.html) into {folder}, or name the folder that holds "
                f"{reader.base_folder} with --data-dir, or try --data synthetic") from None
    try:            # the reader unpacks it
        return [reader(folder, train=train, download=True) for train in (True, False)]
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
