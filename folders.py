"""Folders of images, a subfolder for each class: what is in them, and an image decoded.

    folders = load_folders("photos")                    # photos/train/CLASS/, photos/val/CLASS/
    images = read_images(folders.train, size=32)        # uint8 (N, 3, 32, 32)
"""

import itertools
import math
import os
import random
import re
import shlex
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as pil

from data import (HELD_OUT_KEY, IMAGENET_MEAN, IMAGENET_STD, Data, Preprocessing, Split, check_train_images,
                  epoch_draws, held_out, normalise)

LARGEST = 2**27         # pixels that an image is resized to
WAIT = 600      # seconds without a batch before a loading process is given up
TINY_IMAGENET = ("(cd {} && while read -r file class rest; do mkdir -p $class && mv images/$file $class/; "
                 "done < val_annotations.txt && rmdir images)")


class Folders(NamedTuple):
    train: list                 # [(path, target)], empty where it was not asked for
    eval: list
    eval_name: str              # "val", or "held-out" training images
    classes: list               # their names, sorted; a target is a place in it


def load_folders(data_dir, val_from_train=0, parts=("train", "val"), say=partial(print, flush=True)):
    """The images under data_dir/train/CLASS/ and val/CLASS/, as Folders; of one of them where `parts` says.

    val_from_train: hold so many training images out, in one fixed shuffle, and evaluate on them, not on val/.
    say: takes a line about names that were skipped. ValueError, one line: a folder that is missing, a class
    without images, one class alone, classes that differ.
    """
    root = Path(data_dir).expanduser()
    sets = {part: _read(root / part, say) for part in (("train",) if val_from_train else parts)}
    first, *others = sets.values()
    for other in others:
        if odd := sorted(set(first.classes) ^ set(other.classes)):
            raise ValueError(f"{printable(root)}: train/ and val/ have different classes, for instance "
                             f"{', '.join(map(printable, odd[:3]))}")
    if not val_from_train:
        samples = {part: found.samples for part, found in sets.items()}
        return Folders(samples.get("train", []), samples.get("val", []), "val", first.classes)
    shuffle, rest = held_out(len(first.samples), val_from_train)
    chosen = [[first.samples[i] for i in sorted(part.tolist())] for part in (shuffle[:rest], shuffle[rest:])]
    return Folders(*chosen, "held-out", first.classes)


def _read(folder, say):
    if (folder / "val_annotations.txt").is_file() and (folder / "images").is_dir():
        raise ValueError(f"{printable(folder)} is Tiny-ImageNet's as it was downloaded; run: "
                         + TINY_IMAGENET.format(shlex.quote(printable(folder))))
    try:
        found = _Reader(str(folder))
    except OSError as error:
        hint = "name the folder that holds train/ and val/ with --data-dir"
        if folder.name == "val" and (folder.parent / "train").is_dir():
            hint += ", or give --val-from-train N, which holds N training images out"
        elif folder.parent.name in ("train", "val"):
            hint = f"--data-dir {printable(folder.parent.parent)} holds it"
        raise ValueError(f"no folders of images, one for each class, in {printable(folder)} "
                         f"({error.strerror or error}); {hint}") from None
    if found.others:
        say(f"notice: {printable(folder)}: skipped {len(found.others)} files whose endings are not "
            f"{', '.join(IMG_EXTENSIONS)}, for instance {printable(found.others[0])}")
    if found.skipped:
        say(f"notice: {printable(folder)}: skipped {len(found.skipped)} whose names begin with . or are "
            f"__MACOSX, for instance {printable(found.skipped[0])}")
    if len(found.classes) < 2:
        raise ValueError(f"{printable(folder)} has one class, {printable(found.classes[0])}: "
                         "a classifier needs two")
    if empty := sorted(set(range(len(found.classes))) - set(found.targets)):
        raise ValueError(f"no images in {len(empty)} of the {len(found.classes)} classes in "
                         f"{printable(folder)}, for instance {printable(found.classes[empty[0]])}: add some "
                         f"({', '.join(IMG_EXTENSIONS)}), or remove that class in train/ and val/")
    return found


class _Reader(ImageFolder):
    """torchvision's, without names that begin with "." and __MACOSX, which operating systems leave behind."""

    def __init__(self, folder):
        self.skipped, self.others = [], []
        super().__init__(folder, is_valid_file=self._is_image, allow_empty=True)

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        classes = [n for n in names if not _hidden(n)]
        self.skipped += [n for n in names if _hidden(n)]
        if not classes:
            raise FileNotFoundError("there are none")
        return classes, {name: i for i, name in enumerate(classes)}

    def _is_image(self, path):
        names = path[len(self.root) + 1:].split(os.sep)[1:]
        if any(map(_hidden, names)):
            self.skipped.append(path)
            return False
        if not path.lower().endswith(IMG_EXTENSIONS):
            self.others.append(path)
            return False
        return True


def _hidden(name):
    return name.startswith(".") or name == "__MACOSX"


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

    As in predict.py, which stands alone.
    """
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 255 or 1 < high < 2:     # NaN; just above 1: 0 to 1, overshot
            raise ValueError(f"float values in [{low:.6g}, {high:.6g}], neither 0 to 1 nor 0 to 255")
        image = Image.fromarray(np.rint(values * 255 if high <= 1 else values).astype(np.uint8))
    elif image.mode.startswith("I"):                # 16-bit grey, which Pillow would clip; "I" has 32 bits
        wide, image = image.mode != "I", image.convert("I")
        low, high = image.getextrema()
        if not 0 <= low <= high <= 65535:
            raise ValueError(f"integer values in [{low}, {high}], not 0 to 65535")
        image = (image.point(lambda level: level / 256) if wide or high > 255 else image).convert("L")
    if "transparency" in image.info or "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def centre(image, size, resize):
    """uint8 (3, size, size) of an RGB image: its shorter side to `resize`, antialiased; the centre of it.

    ValueError for one so narrow that it would fill the memory.
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


# ---------------------------------------------------------------- small images, all at once


def load_small(data_dir, device, size, resize=None, *, train_images=None, val_from_train=0,
               parts=("train", "val")):
    """The images of folders as Data on `device`, size x size, for train_cifar.py; see `load_folders`.

    Their mean and deviation are the training images'. resize: of the shorter side, by default `size`.
    train_images: train on so many, by a fixed shuffle.
    """
    resize = resize or size
    folders = load_folders(data_dir, val_from_train, parts)
    check_train_images(train_images, len(folders.train))
    chosen = epoch_draws(HELD_OUT_KEY, 0, len(folders.train))[0][:train_images].tolist()
    train = [folders.train[i] for i in sorted(chosen)]
    count, free = len(train) + len(folders.eval), free_memory(device)
    if free is not None and count * 3 * size**2 > free / 2:
        raise ValueError(f"{count} images of {size} x {size} take {count * 3 * size**2 / 1e9:.1f} GB, more "
                         f"than half of the {free / 1e9:.1f} GB that are free ({device}): take a smaller "
                         "--size, or train_imagenet.py, which reads them as it goes")
    splits = [Split(read_images(samples, size, resize).to(device),
                    torch.tensor([target for _, target in samples]).to(device))
              for samples in (train, folders.eval)]
    mean, std = statistics(splits[0].images) if train else Preprocessing()[:2]
    return Data(splits[0], splits[1], splits[1], folders.eval_name, folders.classes,
                Preprocessing(mean, std, size, resize))


def statistics(images):
    """Mean and deviation of uint8 (N, 3, H, W) in [0, 1], two tuples of three numbers of 4 decimals."""
    levels, found = torch.arange(256, dtype=torch.double) / 255, []
    for plane in range(3):
        count = torch.zeros(256, dtype=torch.double)
        for part in images[:, plane].split(10_000):
            count += torch.bincount(part.flatten(), minlength=256).cpu()
        mean = (count @ levels / count.sum()).item()
        found.append((round(mean, 4), round((count @ (levels - mean)**2 / count.sum()).sqrt().item(), 4)))
    if not any(std for _, std in found):
        raise ValueError("the training images are of one colour: nothing can be learnt")
    mean, std = zip(*found)
    return mean, tuple(s or 1.0 for s in std)       # of a plane that is constant nothing is left


def free_memory(device):
    """Free bytes of a device, None where it cannot be known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return None


# ---------------------------------------------------------------- large images, read as a run goes


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

    def __init__(self, samples, size, views=0, resize=None):
        self.samples, self.size, self.views = samples, size, views
        self.resize = resize or imagenet_pixels(size).resize

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        (index, seed), bad, count = key, [], self.views or 1
        while True:
            path, target = self.samples[index]
            try:
                image = read_image(path)
                if not self.views:
                    return [centre(image, self.size, self.resize)], [False], target, bad
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
            images.append(pil.pil_to_tensor(pil.resized_crop(image, top, left, height, width, square)))
            flips.append(draw.random() < 0.5)
        return images, flips, target, bad


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


def imagenet_pixels(size):
    """The field's way with large images: ImageNet's mean and deviation, 256 pixels for 224."""
    return Preprocessing(IMAGENET_MEAN, IMAGENET_STD, size, round(size * 8 / 7))


def normalise_folder(images, flips):
    """`normalise` with ImageNet's mean and deviation, uint8 (B, 3, S, S), flipped where flips (B,) says."""
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    return normalise(images, IMAGENET_MEAN, IMAGENET_STD)
