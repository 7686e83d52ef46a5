"""Where a teacher comes from, and its logits, each computed once.

A teacher is looked for in this order: the file that was named; checkpoints/NAME.pt; those that mdistiller
publishes, downloaded once into checkpoints/mdistiller/; those of pytorch-cifar-models. Where there is none,
the training script trains it.

A frozen network gives the same logits for the same view, and a small image has 162 views. They are computed
in large batches and cached: on a GPU in its memory, elsewhere in a file that runs share.
"""

import copy
import errno
import hashlib
import math
import mmap
import operator
import os
import shutil
import socket
import tarfile
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from data import VIEWS, Preprocessing, crop_and_flip
from models import Features, float32_head, load_weights, weights_sha256
from weights import network_of

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
ARCHIVE_URL = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
IN_ARCHIVE = ("resnet32x4", "resnet56", "resnet110", "wrn_40_2", "vgg13", "ResNet50")
PYTORCH_CIFAR_MODELS_URL = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
PYTORCH_CIFAR_MODELS = {        # file, with the first 8 digits of its SHA-256, and its authors' top-1 (%)
    "resnet20": ("cifar100_resnet20-23dac2f1.pt", 68.83),
    "resnet32": ("cifar100_resnet32-84213ce6.pt", 70.16),
    "resnet44": ("cifar100_resnet44-ffe32858.pt", 71.63),
    "resnet56": ("cifar100_resnet56-f2eff4c8.pt", 72.63)}
TIMEOUT = 30    # seconds without a byte before a download is given up
BATCH = {"cuda": 1024, "mps": 256, "cpu": 256}      # images in a teacher's batch
SPARE = 4 * 2**30       # bytes of a GPU's memory that cached logits leave for the rest of a run
RESERVE = 2**30         # bytes of a disk that they leave free for what matters more


class Teacher:
    """A frozen network in evaluation mode, and its logits.

    network: a module, (B, 3, H, W) -> (B, K), with a `name`. precision: "bf16" is autocast. source:
    where it comes from. compile: by torch.compile, which needs a C++ compiler on a CPU. pixels: those of the
    images that it gets. own: those that it was trained on, where known; where their mean and deviation differ
    it sees its own.
    """

    def __init__(self, network, device, precision="fp32", source="untrained", compile=False,
                 pixels=Preprocessing(), own=None):
        self.name, self.source, self.sha256 = network.name, source, weights_sha256(network)
        self.device, self.precision, self.compiled = torch.device(device), precision, compile
        self.code = getattr(network, "code", "")
        self.pixels, self.own = pixels, own or pixels
        self.scale = self.shift = None
        if self.own[:2] != pixels[:2]:      # (x std + mean - own mean) / own std
            self.sha256 += f" of pixels of {self.own[:2]}"
            mean, std, own_mean, own_std = (torch.tensor(s, device=device, dtype=torch.float32).view(3, 1, 1)
                                            for s in (*pixels[:2], *self.own[:2]))
            self.scale, self.shift = std / own_std, (mean - own_mean) / own_std
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        network = self.whole = network.to(device).eval().requires_grad_(False)
        if not getattr(network, "own", False):      # who knows what that does
            network = fold(network).to(memory_format=torch.channels_last)
        if precision == "bf16":
            float32_head(network)
        self.network = torch.compile(network, dynamic=False) if compile else network
        self.batch = BATCH[self.device.type]
        self.images = self.cache = None

    @torch.no_grad()
    def logits(self, images):
        """Logits (B, K), float32, of normalised images (B, 3, H, W), computed `batch` at a time (None: all).

        The network always sees a full batch: a row's last bits do not depend on which images stand beside it.
        """
        parts, batch = [], self.batch or len(images)
        for part in images.split(batch):
            filler = part[:1].expand(batch - len(part), -1, -1, -1)
            full = torch.cat([part, filler]) if len(filler) else part
            if self.scale is not None:
                full = full * self.scale + self.shift
            with self.autocast:
                logits = self.network(full.contiguous(memory_format=torch.channels_last))
            parts.append(logits[:len(part)].float())
        return torch.cat(parts)

    def prepare(self, method):
        """Makes `features` give what a feature_kd.Method reads, in its mode; in evaluation nothing else."""
        self.shown = FeatureExtractor(self.whole, method.reads, method.depth)
        if method.teacher_mode == "train":      # batch statistics; its own stay as they are
            self.shown = copy.deepcopy(self.shown)
            for m in self.shown.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.momentum, m.num_batches_tracked = 0.0, None
            self.shown.train()
        elif not getattr(self.whole, "own", False):
            self.shown = fold(self.shown).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def features(self, images):
        """Features of exactly these normalised images; see `prepare`."""
        if self.scale is not None:
            images = images * self.scale + self.shift
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            shown = self.shown(images.contiguous(memory_format=torch.channels_last))
        return Features((), (), None, None)._replace(**shown)

    def cache_logits(self, split, folder=None, exact=False):
        """Take the images of `split` as those of `cached_logits`, and cache what is computed from here on.

        folder: where a file of n x 162 x (K numbers + 8 bytes) may stand, used where a GPU has no room for
        them; None: cache nothing. exact: keep float32; else round to float16 (up to 65504, error 5e-4).
        """
        self.images, self.dtype = split.images, torch.float32 if exact else torch.float16
        self.cache = self.pending = None
        self.largest = split.images.new_zeros((), dtype=torch.float32)      # of all logits, without signs
        self.classes = self.logits(self.pixels.normalise(split.images[:1])).shape[1]
        if folder is None:
            return
        shape = len(split.images) * VIEWS, self.classes, self.dtype, self.device
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            needed = math.prod(shape[:2]) * self.dtype.itemsize
            if torch.cuda.mem_get_info(self.device)[0] > needed + SPARE:
                self.cache = Cache(*shape)
                return
        if self.device.type != "cpu":
            print(f"notice: the teacher's logits are cached in {folder}, not on the {self.device.type} device"
                  + (f", which has no room for {needed / 2**30:.1f} GiB beside the run" if cuda else "")
                  + "; reading and writing them takes about 0.1 s for 8,192 images")
        images = hashlib.sha256(split.images.cpu().numpy()).hexdigest()
        key = (f"3 {self.sha256} {images} {self.device.type} {self.precision} {self.dtype} {self.compiled} "
               f"{torch.__version__} {torch.get_num_threads()}")        # all that may change their last bits
        key += self.code
        if self.pixels[:2] != Preprocessing()[:2]:
            key += f" {self.pixels[:2]}"
        path = Path(folder) / f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.logits"
        self.pending = *shape, path     # made when first asked for: a refused command leaves none

    def _open_cache(self):
        try:
            self.cache = Cache(*self.pending)
        except OSError as error:
            print(f"notice: the teacher's logits are not cached in {self.pending[-1]} "
                  f"({error.strerror or error}); going on without")
        self.pending = None

    def cached_logits(self, indices, views, images=None):
        """Logits (n, K), float32 on the device, of views (n,) of images `indices` (n,); int64 on the CPU.

        Always the rounded value, cached or not; what is not cached is computed. images: the normalised views
        (n, 3, H, W), where the caller has them. What float16 cannot hold is infinite: see `check_range`.
        """
        slots = indices * VIEWS + views
        if self.pending:
            self._open_cache()
        if self.cache:
            logits, known = self.cache.read(slots)
        else:
            logits = torch.empty(len(slots), self.classes, dtype=self.dtype, device=self.device)
            known = torch.zeros(len(slots), dtype=torch.bool)
        missing = (~known).nonzero().flatten()
        for chosen in missing.split(self.batch) if len(missing) else ():
            where = chosen.to(self.device)
            if images is None:
                raw = self.images[indices[chosen].to(self.device)]
                batch = self.pixels.normalise(crop_and_flip(raw, views[chosen].to(self.device)))
            else:
                batch = images[where]
            exact = self.logits(batch)
            new = exact.to(self.dtype)
            logits[where] = new
            if self.cache:
                self.cache.write(slots[chosen], new)
        logits = logits.float()
        self.largest = torch.maximum(self.largest, logits.abs().max())      # rows of an earlier run too
        return logits

    def check_range(self):
        """ValueError where logits that were to be cached are too large for float16. Waits for the device."""
        if self.dtype == torch.float16 and self.largest.isinf():
            raise ValueError("the teacher's logits do not fit float16, which ends at 65504: give "
                             "--exact-teacher")


class FeatureExtractor(nn.Module):
    """A network's fields of Features by name, the maps of the first `depth` stages, None: of all."""

    def __init__(self, network, names, depth):
        super().__init__()
        self.network, self.names, self.depth = network, names, depth

    def forward(self, images):
        _, features = self.network(images, features=True)
        return {name: getattr(features, name)[:self.depth] if name in ("pre", "post") else
                getattr(features, name) for name in self.names}


def fold(network):
    """The network for inference: batch norms folded into the convolutions before them, safe ReLUs in place.

    A network that torch.fx cannot trace comes back as it is.
    """
    try:
        folded = fuse(network)
    except TraceError:
        return network
    folded.graph.eliminate_dead_code()
    for node in folded.graph.nodes:
        if node.target is F.relu and len(node.args[0].users) == 1 and (     # a fresh input, read here alone
                node.args[0].op == "call_module" or node.args[0].target is operator.add):
            node.kwargs = {**node.kwargs, "inplace": True}
    folded.recompile()
    return folded


class Cache:
    """Rows of logits by slot, in a GPU's memory or in a mapped file, and a mark for each that is known.

    In memory a mark says that the row was written. In a file it is the row's checksum: what a kill, a crash,
    a bad disk or another writer leaves does not fit it. OSError where a file cannot have its room.
    """

    def __init__(self, slots, classes, dtype, device, path=None):
        self.device, self.path = device, path
        if path is None:
            self.marks = torch.zeros(slots, dtype=torch.bool)
            self.rows = torch.empty(slots, classes, dtype=dtype, device=device)
        else:
            words = classes * dtype.itemsize // 2
            self.weights = torch.randint(2**37, (words,), generator=torch.Generator().manual_seed(0)) | 1
            file = torch.frombuffer(mapped(path, slots * (8 + 2 * words)), dtype=torch.uint8)
            self.marks = file[:8 * slots].view(torch.int64)
            self.rows = file[8 * slots:].view(dtype).view(slots, classes)

    def read(self, slots):
        """(logits (n, K), known (n,) on the CPU) of slots (n,); logits that are not known are any numbers."""
        rows = self.rows.index_select(0, slots.to(self.rows.device))
        return rows.to(self.device), self.marks[slots] == self.mark(slots, rows)

    def write(self, slots, rows):
        """Keep rows (n, K), of the type that was given, for slots (n,), int64 on the CPU."""
        rows = rows.to(self.rows.device)
        self.rows.index_copy_(0, slots.to(rows.device), rows)
        self.marks[slots] = self.mark(slots, rows)

    def mark(self, slots, rows):
        """(n,) marks. A checksum is slot + 1 + the sum of weight_i word_i over the row's 16-bit words.

        The weights differ and 2,048 such products fit int64: one other word, or two exchanged, always give
        another sum. Zeros, which the file holds where nothing was written, are no row with its checksum.
        """
        if self.path is None:
            return torch.ones(len(slots), dtype=torch.bool)
        return rows.view(torch.int16).long() @ self.weights + slots + 1


def mapped(path, size):
    """The first `size` bytes of a file, which is made or extended, mapped. OSError where there is no room.

    All of it is reserved first: writing to a mapped page that the disk has no room for is a SIGBUS.
    """
    if not hasattr(os, "posix_fallocate"):      # macOS, Windows
        raise OSError(errno.ENOTSUP, "this system cannot reserve the room")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    lacking = size - 512 * path.stat().st_blocks
    try:
        if lacking > 0 and shutil.disk_usage(path.parent).free - lacking < RESERVE:
            raise OSError(errno.ENOSPC, "the disk is nearly full")
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError:
        if lacking > 0:
            path.unlink()       # what was reserved; who has it mapped keeps it
        raise
    memory.madvise(mmap.MADV_RANDOM)        # else the first rows bring the whole file into memory
    return memory


def load_teacher(network, path, device, source="", precision="fp32", compile=False, pixels=Preprocessing(),
                 classes=None, prefer="teacher"):
    """The Teacher of a network with the weights of a checkpoint file. pixels, classes: those of the images.

    ValueError as in `models.load_weights`, and for a file that names other classes.
    """
    facts = load_weights(network, path, prefer=prefer)
    check_names(path, facts, classes)
    own = Preprocessing.of(facts, pixels.size, pixels.resize)
    if own and own.size != pixels.size:
        print(f"notice: {path} was trained on images of {own.size} x {own.size}, and sees {pixels.size} x "
              f"{pixels.size} here")
    return Teacher(network, device, precision, source, compile, pixels, own)


def check_names(path, facts, classes):
    """ValueError, one line, where a checkpoint's facts say other classes than those of the images."""
    said = list(facts.get("classes") or classes or ())
    if classes and said != list(classes):
        i = next((i for i, pair in enumerate(zip(said, classes)) if len(set(pair)) == 2), -1)
        raise ValueError(f"{path} is for {len(said)} classes, these images have {len(classes)}; its class "
                         f"{i} is {said[i]}, theirs {classes[i]}")


def find_teacher(name, checkpoint=None, url=ARCHIVE_URL, say=print):
    """(file, source) of a CIFAR-100 teacher's weights, in the order above; (None, reason) without one.

    `url` is the archive of mdistiller's teachers, or a mirror; `say` takes a line about a download. What was
    downloaded before is taken again, and nothing else downloaded for the same network.
    """
    if checkpoint is not None:
        return Path(checkpoint), str(checkpoint)
    file, accuracy = PYTORCH_CIFAR_MODELS.get(name, (None, None))
    alternative = f"pytorch-cifar-models/{name}.pt"
    places = {f"{name}.pt": "", f"mdistiller/{name}.pth": "mdistiller's, ",
              alternative: f"pytorch-cifar-models', {accuracy} % by its authors, "}

    def found():
        return next(((CHECKPOINTS / place, f"{whose}checkpoints/{place}") for place, whose in places.items()
                     if (CHECKPOINTS / place).is_file()), None)

    problems = [f"no checkpoints/{name}.pt"]
    if not found() and name in IN_ARCHIVE:
        say(f"downloading mdistiller's teachers, once, from {url}")
        problem = problem_of(lambda: download_teachers(url, CHECKPOINTS / "mdistiller"))
        problems.append(f"mdistiller's teachers could not be downloaded ({problem})" if problem
                        else f"no {name} in {url}")
    elif name not in IN_ARCHIVE:
        problems.append(f"mdistiller publishes no {name}")
    if not found() and file:        # the archive is at one address only
        say(f"{problems[-1]}; downloading pytorch-cifar-models' {file}")
        problem = problem_of(lambda: download_model(file, CHECKPOINTS / alternative))
        problems.append(f"pytorch-cifar-models' could not be downloaded ({problem})")
    return found() or (None, ", and ".join(problems))


def problem_of(download):
    """Why a download failed, None where it did not."""
    try:
        download()
    except (OSError, ValueError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
        return str(error) or type(error).__name__


def download_model(file, path):
    """One of PYTORCH_CIFAR_MODELS to a path, if its SHA-256 is the one in its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)       # the download has none of its own
    try:
        torch.hub.download_url_to_file(PYTORCH_CIFAR_MODELS_URL + file, path, hash_prefix=file[-11:-3],
                                       progress=False)
    finally:
        socket.setdefaulttimeout(timeout)


def download_teachers(url, folder):
    """NAME_vanilla/ckpt_epoch_240.pth of the archive becomes folder/NAME.pth, each as soon as it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with (urllib.request.urlopen(url, timeout=TIMEOUT) as response,
          tarfile.open(fileobj=response, mode="r|*") as archive):
        for name, member in ((network_of(member), member) for member in archive):
            if name not in IN_ARCHIVE:
                continue
            partial = folder / f"{name}.pth.{os.getpid()}.part"
            try:
                partial.write_bytes(archive.extractfile(member).read())
                os.replace(partial, folder / f"{name}.pth")
            finally:
                partial.unlink(missing_ok=True)
