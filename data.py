"""Images as tensors: CIFAR-100, CIFAR-10, folders of images, synthetic images; batched crop and flip.

    data = load_data("cifar100", "data", device)            # uint8 images on the device, read once
    permutation, crop_ids = epoch_draws(seed, epoch, len(data.train.targets))
    images = data.pixels.normalise(crop_and_flip(data.train.images[permutation[:64]], crop_ids[:64]))

Small images are augmented in batches on the device: no loading processes, no PIL in the loop. Large images
are read from their files at every step: `load_folders`, `FolderImages`, `folder_batches`.
"""

import functools
import math
import os
import random
import re
import shlex
import signal
import socket
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as pil

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of pixels in [0, 1]; as in the field's code
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)   # of its training images
PAD = 4                                 # pixels of black on each side before the crop
VIEWS = (2 * PAD + 1) ** 2 * 2          # 81 crops x 2 flips = 162 views of an image
SYNTHETIC_SIZES = 10_000, 2_000         # training and test images
HELD_OUT_KEY = 2**64 - 1                # the seed of the shuffle that is the same for every run
TIMEOUT = 30                            # seconds without a byte before a download is given up
LARGEST = 2**27                         # pixels that an image is resized to
WAIT = 600                              # seconds without a batch before a loading process is given up
HIDDEN = ".", "__MACOSX"                # how names begin that operating systems and notebooks leave behind
TINY_IMAGENET = ("(cd {} && while read -r file class rest; do mkdir -p $class && mv images/$file $class/; "
                 "done < val_annotations.txt && rmdir images)")

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
    """What a network gets: the shorter side becomes `resize`, the centre of `size` is cut out, normalised."""
    mean: tuple = MEAN          # of pixels in [0, 1]
    std: tuple = STD
    size: int = 32
    resize: int = 32

    @classmethod
    def of(cls, metadata, size=32, resize=32):
        """The one in a checkpoint's metadata, or None. size, resize: where the metadata has none."""
        try:
            mean, std = (tuple(map(float, metadata[k])) for k in ("mean", "std"))
            size = int(metadata.get("size", size))
            resize = int(metadata.get("resize", resize))
        except (KeyError, TypeError, ValueError):
            return None
        valid = len(mean) == len(std) == 3 and min(std) > 0
        return cls(mean, std, size, resize) if valid else None

    def at(self, size):
        """The same at another size."""
        return self._replace(size=size, resize=round(size * self.resize / self.size))

    def normalise(self, images):
        """uint8 (B, 3, H, W) -> float32, as `normalise`."""
        return normalise(images, self.mean, self.std)


IMAGENET_PREPROCESSING = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 256)


class Split(NamedTuple):
    images: torch.Tensor        # (N, 3, size, size) uint8
    targets: torch.Tensor       # (N,) int64

    def pick(self, indices):
        return Split(self.images[indices], self.targets[indices])

    def to(self, device):
        return Split(self.images.to(device), self.targets.to(device))


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
    """(permutation, crop_ids) of one epoch, int64 arrays (n,): a shuffle, and the view of each image in it.

    A pure function of (seed, epoch), by a counter-based generator keyed with both: seeds and epochs share no
    draws, resuming needs no generator state, and the raw words are the same in every NumPy version.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order, words = generator.random_raw(2 * n).reshape(2, n)
    permutation = np.argsort(order, kind="stable")
    crop_ids = words % np.uint64(VIEWS)         # the bias of a 64-bit word modulo 162 is below 1e-17
    return permutation, crop_ids.astype(np.int64)


def crop_and_flip(images, crop_ids):
    """The field's augmentation, a view of each image: pad by 4 black pixels, crop to the size before, flip.

    images: (B, 3, H, W) uint8. crop_ids: (B,) int64 in [0, VIEWS), (9 top + left) * 2 + flip. Returns a copy.
    """
    channels, height, width = images.shape[1:]
    top = crop_ids // 2 // (2 * PAD + 1)
    left = crop_ids // 2 % (2 * PAD + 1)
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    column = torch.where(crop_ids[:, None] % 2 == 1, width - 1 - column, column)        # flipped
    rows = top[:, None] + row
    columns = left[:, None] + column
    pixels = (rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]).flatten(1)    # of the padded image
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).flatten(2)
    # one gather: four times as fast as indexing an unfolded view
    return padded.gather(2, pixels[:, None].expand(-1, channels, -1)).view(images.shape)


def flip_images(images, flips):
    """Images (B, 3, H, W), mirrored where flips (B,) is True."""
    return torch.where(flips[:, None, None, None], images.flip(3), images)


@functools.cache
def _statistics(device, *statistics):
    """Mean and standard deviation on the device, (3, 1, 1): copied there once."""
    return tuple(torch.tensor(s, device=device).view(3, 1, 1) for s in statistics)


def normalise(images, mean=MEAN, std=STD):
    """uint8 (B, 3, H, W) -> float32, (x / 255 - mean) / std, channels last: the bits of torchvision's."""
    mean, std = _statistics(images.device, mean, std)
    x = images.to(torch.float32).div_(255).sub_(mean).div_(std)     # plane by plane: four times as fast
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- small images, all on the device


CIFAR = {"cifar100": (CIFAR100, CIFAR100_CLASSES, Preprocessing()),
         "cifar10": (CIFAR10, CIFAR10_CLASSES, Preprocessing(CIFAR10_MEAN, CIFAR10_STD))}


def load_data(name, data_dir, device, *, size=32, resize=None, train_images=None, val_from_train=0,
              parts=("train", "val"), download=True):
    """The images of "cifar100", "cifar10", "synthetic" or "folder" on `device`, as Data.

    val_from_train: hold that many training images out and evaluate on them, the test split untouched.
    train_images: train on the first so many of the rest. Both in one fixed shuffle, the same for every seed.
    size, resize, parts: of a folder, see `load_folders`. ValueError, one line: missing or damaged data,
    numbers that do not fit.
    """
    if name == "folder":
        folders = load_folders(data_dir, val_from_train, parts, train_images=train_images)
        return _read_folders(folders, device, size, resize or size)
    if name == "synthetic":
        train, test = (synthetic(n, part) for part, n in enumerate(SYNTHETIC_SIZES, 1))
        classes, pixels = [f"class {i}" for i in range(100)], Preprocessing()
    else:
        train, test = read_cifar(name, data_dir, download)
        _, classes, pixels = CIFAR[name]
    train, test = train.to(device), test.to(device)
    evaluated, eval_name = test, "test"
    if val_from_train or train_images:
        chosen, held_out = choose_images(len(train.targets), val_from_train, train_images)
        if val_from_train:
            evaluated, eval_name = train.pick(held_out), "val"
        train = train.pick(chosen)
    return Data(train, test, evaluated, eval_name, classes, pixels)


def choose_images(n, val_from_train=0, train_images=None):
    """Indices of the (training, held-out) images among n, by a shuffle that is the same for every run."""
    rest = n - val_from_train
    if rest < 1:
        raise ValueError(f"--val-from-train {val_from_train} leaves nothing of {n} training images")
    if train_images and train_images > rest:
        raise ValueError(f"--train-images {train_images}: there are {rest} training images")
    permutation, _ = epoch_draws(HELD_OUT_KEY, 0, n)
    return permutation[:train_images or rest], permutation[rest:]


def cifar_folder(name, data_dir):
    """Where the official files are: cifar-100-python in `data_dir`, or `data_dir` if that is its name."""
    folder, base = Path(data_dir).expanduser(), CIFAR[name][0].base_folder
    return folder if folder.name == base else folder / base


def read_cifar(name, data_dir, download=True):
    """(train, test) of the official "cifar100" or "cifar10" in `data_dir`; `download`: if it is missing.

    The files' MD5 are checked. The environment variable CIFAR100_URL or CIFAR10_URL names a mirror.
    """
    reader, folder = CIFAR[name][0], cifar_folder(name, data_dir).parent
    reader.url = os.environ.get(f"{name.upper()}_URL", reader.url)
    try:
        with socket_timeout():
            sets = [reader(folder, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no CIFAR-{name[5:]} in {folder}, or it is damaged ({error}): try "
                         f"wget -c {reader.url} -O {folder / reader.filename}, or name its folder with "
                         "--data-dir, or try --data synthetic") from None
    return tuple(Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
                 for s in sets)                 # the reader gives (N, 32, 32, 3)


@contextmanager
def socket_timeout():
    """A download in this context is given up after TIMEOUT seconds without a byte."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@functools.cache
def synthetic(n, part, seed=0):
    """n images 32 x 32 of 100 classes in 20 families of five. `part` draws the images, `seed` the classes.

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
    crop_ids = torch.randint(VIEWS, (n,), generator=generator)
    return Split(crop_and_flip(images, crop_ids), targets)


def _read_folders(folders, device, size, resize):
    """The images of Folders as Data, size x size. Mean and standard deviation are the training images'."""
    count = len(folders.train) + len(folders.eval)
    needed = 3 * size**2 * count
    free = free_memory()
    if needed > free / 2:
        raise ValueError(f"{size} x {size} images take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                         "take a smaller --size, or train_imagenet.py, which reads them at every step")
    splits = []
    for samples in (folders.train, folders.eval):
        targets = [target for _, target in samples]
        splits.append(Split(read_images(samples, size, resize), torch.tensor(targets)))
    train, test = splits
    mean, std = mean_and_std(train.images) if folders.train else (MEAN, STD)
    test = test.to(device)
    return Data(train.to(device), test, test, folders.eval_name, folders.classes,
                Preprocessing(mean, std, size, resize))


def mean_and_std(images):
    """Of uint8 (N, 3, H, W) in [0, 1] on the CPU: two tuples of three numbers, 4 decimals."""
    total, squares = 0, 0
    for part in images.split(1000):
        x = part.double() / 255
        total += x.sum((0, 2, 3))
        squares += x.square().sum((0, 2, 3))
    count = images[:, 0].numel()
    mean = total / count
    variance = (squares / count - mean**2).clamp(min=0)
    stds = (round(std, 4) for std in variance.sqrt().tolist())
    means = tuple(round(x, 4) for x in mean.tolist())
    return means, tuple(std or 1.0 for std in stds)     # 0 where all pixels are equal


def free_memory():
    """Free bytes of the machine; infinity where they are not known."""
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf


# ---------------------------------------------------------------- folders, a subfolder for each class


class Folders(NamedTuple):
    train: list                 # [(path, target)], empty where it was not asked for
    eval: list
    eval_name: str              # "val", or "held-out" training images
    classes: list               # their names, sorted; a target is an index of it


def load_folders(data_dir, val_from_train=0, parts=("train", "val"), say=partial(print, flush=True),
                 train_images=None):
    """The images under data_dir/train/CLASS/ and val/CLASS/, or one of them (`parts`), as Folders.

    val_from_train, train_images: as in `load_data`; with the first, val/ is not read. say: takes a line
    about files that are skipped. ValueError, one line: a missing folder, an empty class, one class alone,
    classes that differ.
    """
    root = Path(data_dir).expanduser()
    found, classes = {"train": [], "val": []}, None
    for part in ["train"] if val_from_train else parts:
        found[part], names = _list_images(root / part, say)
        check_same_classes(root, classes or names, names)
        classes = names
    train, val = found.values()
    if val_from_train:
        chosen, held_out = choose_images(len(train), val_from_train)
        val = [train[i] for i in sorted(held_out)]
        train = [train[i] for i in sorted(chosen)]
    if train_images:
        chosen, _ = choose_images(len(train), 0, train_images)
        train = [train[i] for i in sorted(chosen)]
    return Folders(train, val, "held-out" if val_from_train else "val", classes)


def check_same_classes(root, train, val):
    """ValueError where the class names of train/ and val/ differ: which of the two lacks what."""
    parts = []
    for part, lacking in (("val", set(train) - set(val)), ("train", set(val) - set(train))):
        if lacking:
            some = ", ".join(map(printable, sorted(lacking)[:3]))
            parts.append(f"{part}/ lacks {len(lacking)} of the classes, for instance {some}")
    forms = [sorted(unicodedata.normalize("NFC", name) for name in names) for names in (train, val)]
    if parts and forms[0] == forms[1]:
        parts = ["the classes of train/ and val/ differ in the Unicode form of their names alone: rename "
                 "them"]
    if parts:
        raise ValueError(f"{printable(root)}: {'; '.join(parts)}")


def _list_images(folder, say):
    """([(path, target)], class names) of a folder, in the order of torchvision's ImageFolder."""
    place = printable(folder)
    if (folder / "val_annotations.txt").is_file() and (folder / "images").is_dir():
        raise ValueError(f"{place} is Tiny-ImageNet's as it was downloaded; run: "
                         + TINY_IMAGENET.format(shlex.quote(place)))
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
    classes = [name for name in names if not name.startswith(HIDDEN)]
    if len(classes) < 2:
        cure = "--data-dir holds train/ and val/; without val/ give --val-from-train N"
        others = [name for name in ("valid", "validation", "test") if (folder.parent / name).is_dir()]
        if folder.name == "val" and others:
            cure = f"link or rename {others[0]}/, which is next to it, or give --val-from-train N"
        raise ValueError(f"no folders of images, one for each class, in {place} ({len(classes)} found): "
                         f"{cure}")
    samples, skipped = [], [name for name in names if name.startswith(HIDDEN)]
    for target, name in enumerate(classes):
        before = len(samples)
        for parent, _, files in sorted(os.walk(folder / name, followlinks=True)):
            hidden = any(part.startswith(HIDDEN) for part in Path(parent).relative_to(folder).parts)
            for file in sorted(files):
                path = os.path.join(parent, file)
                if hidden or file.startswith(HIDDEN) or not file.lower().endswith(IMG_EXTENSIONS):
                    skipped.append(path)
                else:
                    samples.append((path, target))
        if len(samples) == before:
            raise ValueError(f"no images in the class {place}/{printable(name)}: add some "
                             f"({', '.join(IMG_EXTENSIONS)}), or remove that class in train/ and val/")
    if skipped:
        say(f"notice: {place}: skipped {len(skipped)} hidden files and files whose ending is no image's, "
            f"for instance {printable(skipped[0])}")
    return samples, classes


def printable(path):
    """A path or name that can be printed and encoded, whatever its bytes are."""
    return os.fsencode(path).decode(errors="backslashreplace")


# ---------------------------------------------------------------- one image


def read_image(path):
    """The Pillow image of a file, RGB, upright as its EXIF says. Raises any of Pillow's errors."""
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:       # of odd EXIF
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:       # a damaged orientation, for which Pillow has several errors: as it is
            pass
        return to_rgb(image)


def to_rgb(image):
    """A Pillow image in RGB: floats and 16-bit grey scaled, transparency on white. ValueError: odd values.

    As in predict.py, which imports nothing of ours.
    """
    if image.mode[0] in "FI":       # floats, 16 and 32 bits, which Pillow would clip
        values = np.asarray(image)
        if image.mode == "F":
            values = np.rint(values * 255 if values.max() < 2 else values)
        elif image.mode != "I" or values.max() > 255:
            values = values // 256
        if not 0 <= values.min() <= values.max() <= 255:        # or NaN
            raise ValueError("values are not in 0 to 1, 0 to 255 or 0 to 65535")
        image = Image.fromarray(values.astype(np.uint8))
    if "transparency" in image.info or "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def centre(image, size, resize):
    """uint8 (3, size, size) of an RGB image: its shorter side to `resize`, antialiased; the centre of it.

    ValueError for an image that would fill the memory.
    """
    if resize**2 * max(image.size) / min(image.size) > LARGEST:
        raise ValueError(f"{image.width} x {image.height} is too narrow to be resized")
    return pil.pil_to_tensor(pil.center_crop(pil.resize(image, resize), [size, size]))


def read_images(samples, size, resize=None):
    """uint8 (N, 3, size, size) of all images of [(path, target)], with predict.py's pixels.

    Upright, the shorter side becomes `resize` (None: size), the centre is cut out. ValueError, one line, for
    images that cannot be decoded.
    """
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)

    def read(i):
        try:
            images[i] = centre(read_image(samples[i][0]), size, resize or size)
        except Exception as error:      # Pillow raises a dozen types for damaged files
            return f"{printable(samples[i][0])} ({str(error) or type(error).__name__})"

    with ThreadPoolExecutor() as pool:
        bad = [line for line in pool.map(read, range(len(samples))) if line]
    if bad:
        raise ValueError(f"{len(bad)} of {len(samples)} images cannot be decoded, for instance {bad[0]}; "
                         "mend or remove them")
    return images


# ---------------------------------------------------------------- large images, read at every step


def random_box(width, height, draw):
    """(left, top, width, height) of a crop: 8 to 100 % of the area, sides 3:4 to 4:3 (Szegedy et al. 2015).

    draw: a random.Random. Ten attempts, then the largest centred box of an allowed ratio.
    """
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = draw.randint(0, width - w)
            top = draw.randint(0, height - h)
            return left, top, w, h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


class FolderImages(Dataset):
    """Decoded images by key (index, seed): `views` random crops in training, the centre in evaluation (0).

    An item is (uint8 (V, 3, size, size), flips (V,), target, whether the image could be decoded); if not, in
    training the next image takes its place, in evaluation black does.
    """

    def __init__(self, samples, size, views=0, resize=None):
        self.samples, self.size, self.views = samples, size, views
        self.resize = resize or IMAGENET_PREPROCESSING.at(size).resize

    def __getitem__(self, key):
        index, seed = key
        for i in range(100 if self.views else 1):       # so many in a row are an error for the caller
            path, target = self.samples[(index + i) % len(self.samples)]
            try:
                return *self._views(read_image(path), seed), target, i == 0
            except Exception:       # Pillow raises a dozen types for damaged files
                continue
        black = Image.new("RGB", (self.size, self.size))
        return *self._views(black, seed), target, False

    def _views(self, image, seed):
        """(uint8 (V, 3, size, size), flips (V,)) of a Pillow image."""
        if not self.views:
            return centre(image, self.size, self.resize)[None], torch.tensor([False])
        draw, images, flips = random.Random(seed), [], []
        for _ in range(self.views):
            left, top, width, height = random_box(*image.size, draw)
            crop = pil.resized_crop(image, top, left, height, width, [self.size, self.size])
            images.append(pil.pil_to_tensor(crop))
            flips.append(draw.random() < 0.5)
        return torch.stack(images), torch.tensor(flips)


def folder_batches(dataset, keys, workers, pin=False):
    """A DataLoader over lists of keys, one list a batch, which may be filled again for each epoch.

    Its processes are forked once: a fork while threads run can leave one that hangs (CPython 3.11, after a
    collective). One that gives nothing for WAIT seconds is a RuntimeError.
    """
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, pin_memory=pin,
                      worker_init_fn=ignore_signals, persistent_workers=workers > 0,
                      timeout=WAIT if workers else 0)


def ignore_signals(worker):
    """What stops a job reaches all its processes, and the one that trains needs images until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def folder_keys(seed, epoch, n, batch, first_step, rank, world):
    """A rank's share of each batch of an epoch: (lists of keys, where in the epoch each begins).

    Batches are the same whatever the number of processes; the last, incomplete one is left out.
    """
    permutation, _ = epoch_draws(seed, epoch, n)
    generator = np.random.Philox(key=np.array([seed, epoch + 2**33], dtype=np.uint64))
    keys = np.stack([permutation.astype(np.uint64), generator.random_raw(n)], 1)
    begin = batch * rank // world
    end = batch * (rank + 1) // world
    offsets = [step * batch + begin for step in range(first_step, n // batch)]
    return [keys[i:i + end - begin].tolist() for i in offsets], offsets
