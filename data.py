"""CIFAR-100 as tensors on the device, augmented in whole batches; a synthetic set for a machine without data.

    data = load_data("cifar100", "data", device)            # uint8 images, once
    order, views = epoch_draws(seed, epoch, len(data.train.targets))
    images = normalise(crop_and_flip(data.train.images[order[:64]], views[:64]))

No loader processes and no PIL in the loop: the whole set is 184 MB of uint8.
"""

import functools
import http.client
import os
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR100

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)      # of pixels in [0, 1]; as in the field's code
PAD = 4                                                             # pixels of black on each side before the crop
VIEWS = (2 * PAD + 1) ** 2 * 2                                      # 81 crops x 2 flips = 162 views of an image
SYNTHETIC_SIZES = 10_000, 2_000                                     # training and test images
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
    height, width = images.shape[2:]
    batch, channel, row, column = (torch.arange(n, device=images.device) for n in images.shape)
    top, left, flip = views // 2 // (2 * PAD + 1), views // 2 % (2 * PAD + 1), views % 2 == 1
    rows = top[:, None] + row
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    padded = F.pad(images, (PAD, PAD, PAD, PAD))
    return padded[batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


@functools.cache
def _statistics(device):
    """MEAN and STD on the device, (3, 1, 1): copied there once."""
    return tuple(torch.tensor(s, device=device).view(3, 1, 1) for s in (MEAN, STD))


def normalise(images):
    """uint8 (B, 3, H, W) -> float32, (x / 255 - MEAN) / STD, channels last. The same bits as ToTensor and Normalize."""
    mean, std = _statistics(images.device)
    x = images.to(torch.float32, memory_format=torch.channels_last)
    return x.div_(255).sub_(mean).div_(std)


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


def load_data(name, data_dir, device, *, train_images=None, val_from_train=0):
    """The training and the evaluation images of `name` ("cifar100" or "synthetic") on `device`, as Data.

    val_from_train: hold that many training images out and evaluate on them, the test split untouched.
    train_images: train on the first so many of the rest. Both in one fixed shuffle, the same for every seed.
    Raises ValueError, one line that says what to do, for missing or damaged data and for numbers that do not fit.
    """
    train, test = tuple(map(synthetic, SYNTHETIC_SIZES, (1, 2))) if name == "synthetic" else read_cifar100(data_dir)
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


def read_cifar100(data_dir):
    """(train, test) of the official CIFAR-100 under `data_dir`, downloaded there (169 MB) if it is missing.

    The files' MD5 are checked. The environment variable CIFAR100_URL names another place to download from.
    """
    folder = Path(data_dir).expanduser()
    if folder.name == CIFAR100.base_folder:     # the folder itself was named instead of the one it stands in
        folder = folder.parent

    class Mirrored(CIFAR100):
        url = os.environ.get("CIFAR100_URL", CIFAR100.url)

    try:
        sets = [CIFAR100(folder, train=train) for train in (True, False)]
    except RuntimeError:                        # not there, or the checksums differ
        sets = _download_cifar100(Mirrored, folder)
    # (N, 32, 32, 3) as the reader gives it -> (N, 3, 32, 32)
    return tuple(Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets)


def _download_cifar100(dataset, folder):
    damaged = (folder / dataset.base_folder).exists()
    problem = f"CIFAR-100 in {folder} is damaged (its checksums differ)" if damaged else f"no CIFAR-100 in {folder}"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)                # seconds; the reader itself would wait for ever
    try:
        print(f"{problem}; downloading 169 MB from {dataset.url}", flush=True)
        return [dataset(folder, train=train, download=True) for train in (True, False)]
    except (OSError, ValueError, RuntimeError, EOFError, http.client.HTTPException) as error:
        raise ValueError(f"{problem}, and it could not be downloaded ({error}). Put cifar-100-python.tar.gz from "
                         f"https://www.cs.toronto.edu/~kriz/cifar.html into {folder}, or name the folder that holds "
                         "cifar-100-python with --data-dir, or set CIFAR100_URL to a mirror, or try --data synthetic"
                         ) from None
    finally:
        socket.setdefaulttimeout(timeout)


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
