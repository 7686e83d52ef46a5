"""Where a teacher comes from, and its answers.

A teacher is looked for in this order: the file that was named; checkpoints/NAME.pt; the teachers that mdistiller
publishes, downloaded once into checkpoints/mdistiller/; those of pytorch-cifar-models. Where there is none, the training script trains it.

Its answers are finite in number: a frozen network gives the same logits for the same view, and an image has 162 views. They
are computed in large batches, once, and remembered: on a GPU in its memory, elsewhere in a file that runs share.
"""

import errno
import hashlib
import http.client
import operator
import os
import shutil
import tarfile
import urllib.request
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from data import VIEWS, crop_and_flip, evaluate, normalise
from models import create_model, load_weights, weights_sha256
from weights import network_of

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
ARCHIVE_URL = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
# file, of whose SHA-256 the name holds the first 8 digits, and top-1 (%) that its authors give
PYTORCH_CIFAR_MODELS_URL = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
PYTORCH_CIFAR_MODELS = {"resnet20": ("cifar100_resnet20-23dac2f1.pt", 68.83), "resnet32": ("cifar100_resnet32-84213ce6.pt", 70.16),
                        "resnet44": ("cifar100_resnet44-ffe32858.pt", 71.63), "resnet56": ("cifar100_resnet56-f2eff4c8.pt", 72.63)}
IN_ARCHIVE = ("resnet32x4", "resnet56", "resnet110", "wrn_40_2", "vgg13", "ResNet50")
TIMEOUT = 30    # seconds without an answer before a download is given up
BATCH = {"cuda": 1024, "mps": 256, "cpu": 256}      # images that a teacher is asked about at once
SPARE = 4 * 2**30       # bytes that a GPU must have left for the rest of a run
RESERVE = 2**30         # bytes of a disk that answers leave free for what matters more


class Teacher:
    """A frozen network in evaluation mode, and what it says.

    network: a module, (B, 3, H, W) -> (B, K). precision: "fp32" or "bf16" (autocast). source: where it comes from.
    compile: by torch.compile, which needs a C++ compiler on a CPU.
    """

    def __init__(self, network, device, precision="fp32", source="untrained", compile=False):
        self.name, self.source, self.sha256 = network.name, source, weights_sha256(network)
        self.device, self.precision = torch.device(device), precision
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.network = fold(network.to(device).eval().requires_grad_(False)).to(memory_format=torch.channels_last)
        self.compiled = compile
        if compile:
            self.network = torch.compile(self.network, dynamic=False)
        self.batch = BATCH[self.device.type]
        self.images = self.memory = None

    @torch.no_grad()
    def logits(self, images):
        """Logits (B, K), float32, of normalised images (B, 3, H, W), computed `batch` at a time (None: all at once).

        The network always sees a full batch, so that what else is asked does not change an answer's last bits.
        """
        parts = []
        batch = self.batch or len(images)
        for part in images.split(batch):
            full = part if len(part) == batch else torch.cat([part, part[:1].expand(batch - len(part), -1, -1, -1)])
            with self.autocast:
                parts.append(self.network(full.contiguous(memory_format=torch.channels_last))[:len(part)].float())
        return torch.cat(parts)

    def attend(self, split, folder=None, exact=False):
        """Take the views of `split` for what `answers` is asked about, and remember what was answered.

        folder: where a file of answers may stand (n x 162 x K numbers at most), used where the GPU has no room for them; None:
        remember nothing. exact: keep float32; else answers are rounded to float16, relative error 5e-4, largest 65504.
        """
        self.images, self.dtype = split.images, torch.float32 if exact else torch.float16
        classes = self.logits(normalise(split.images[:1])).shape[1]
        size = len(split.images) * VIEWS * classes * self.dtype.itemsize
        if folder is None:
            self.memory = None
        elif self.device.type == "cuda" and not torch.cuda.empty_cache() and torch.cuda.mem_get_info(self.device)[0] > size + SPARE:
            self.memory = OnDevice(len(split.images) * VIEWS, classes, self.dtype, self.device)
        else:
            data = hashlib.sha256(split.images.cpu().numpy()).hexdigest()
            key = (f"1 {self.sha256} {data} {self.device.type} {self.precision} {self.dtype} {self.compiled} {torch.__version__} "
                   f"{torch.get_num_threads()}")        # all that may change an answer's last bits
            self.memory = OnDisk(Path(folder) / f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.answers", classes, self.dtype)

    def answers(self, indices, views, images=None):
        """Logits (n, K), float32 on the device, of views (n,) of the training images `indices` (n,); int64 on the CPU.

        Always the rounded value, remembered or not. Those that are known are read, the others computed and remembered.
        images: the normalised views (n, 3, H, W), where the caller has them. ValueError for logits that float16 cannot hold.
        """
        slots = indices * VIEWS + views
        if self.memory:
            logits, known = self.memory.read(slots)
            logits = logits.to(self.device)
        else:
            logits, known = None, torch.zeros(len(slots), dtype=torch.bool)
        missing = (~known).nonzero().flatten()
        for chosen in missing.split(self.batch) if len(missing) else ():
            where = chosen.to(self.device)
            if images is not None:
                seen = images[where]
            else:
                seen = normalise(crop_and_flip(self.images[indices[chosen].to(self.device)], views[chosen].to(self.device)))
            computed = self.logits(seen)
            new = computed.to(self.dtype)
            if self.device.type == "cpu" and new.isinf().any() and computed.isfinite().all():
                raise ValueError(f"the teacher's logits, up to {computed.abs().max():.3g}, do not fit float16: give --exact-teacher")
            if logits is None:
                logits = torch.empty(len(slots), new.shape[1], dtype=self.dtype, device=self.device)
            logits[where] = new
            if self.memory:
                self.memory.write(slots[chosen], new)
        return logits.float()

    def check(self, split, published=None):
        """Top-1 (%) on a split, as (top1, line to print); the line warns when it is a point or more under `published`."""
        top1 = self.evaluate(split)["top1"]
        line = f"teacher {self.name} ({self.source}): {top1:.2f} % top-1 on the test split"
        if published is not None:
            line += f", published {published:.2f}"
            if top1 <= published - 1:
                line += "\nwarning: this teacher is worse than the published one; the paper's numbers cannot be expected"
        return top1, line

    def evaluate(self, split):
        """As `data.evaluate`."""
        return evaluate(self.logits, split, max(self.batch, 512))


def fold(network):
    """The network for inference: batch norms folded into the convolutions before them, ReLUs in place where that is safe.

    A network that torch.fx cannot trace comes back as it is.
    """
    try:
        folded = fuse(network)
    except TraceError:
        return network
    for node in folded.graph.nodes:
        if node.target is F.relu and len(node.args[0].users) == 1 and (
                node.args[0].op == "call_module" or node.args[0].target is operator.add):      # fresh, and read here alone
            node.kwargs = {**node.kwargs, "inplace": True}
    folded.recompile()
    return folded


class OnDevice:
    """Answers in the GPU's memory; which are known is kept on the host."""

    def __init__(self, slots, classes, dtype, device):
        self.table = torch.empty(slots, classes, dtype=dtype, device=device)
        self.known = torch.zeros(slots, dtype=torch.bool)

    def read(self, slots):
        return self.table[slots.to(self.table.device)], self.known[slots]

    def write(self, slots, logits):
        self.table[slots.to(self.table.device)] = logits
        self.known[slots] = True


class OnDisk:
    """Answers in a sparse file. A record is K numbers and their CRC-32, written in this order by one call.

    What a kill, a full disk, a crash or another writer leaves half-written does not fit its checksum and is not known; nor is
    what was never written, as the CRC-32 of zeros is not 0.
    """

    def __init__(self, path, classes, dtype):
        self.path, self.classes, self.dtype = path, classes, dtype
        self.size = classes * dtype.itemsize + 4        # bytes
        self.problem = self.file = None

    def read(self, slots):
        """(logits (n, K), known (n,)) of slots (n,); rows that are not known are zero."""
        rows, known = bytearray(), []
        for slot in slots.tolist():
            record = self._record(slot)
            values, mark = record[:-4], record[-4:]
            known.append(len(record) == self.size and zlib.crc32(values) == int.from_bytes(mark, "little"))
            rows += values if known[-1] else bytes(self.size - 4)
        return torch.frombuffer(rows, dtype=self.dtype).view(len(slots), self.classes), torch.tensor(known)

    def _record(self, slot):
        try:
            self.file = self.file or open(self.path, "r+b", buffering=0)
            self.file.seek(slot * self.size)
            return self.file.read(self.size)
        except OSError:         # not there yet, or cannot be read
            return b""

    def write(self, slots, logits):
        if self.problem:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.path.parent).free < RESERVE:
                raise OSError(errno.ENOSPC, "the disk is nearly full")
            if self.file is None:
                self.path.touch()
                self.file = open(self.path, "r+b", buffering=0)
            for slot, row in zip(slots.tolist(), logits.cpu().numpy()):
                values = row.tobytes()
                self.file.seek(slot * self.size)
                self.file.write(values + zlib.crc32(values).to_bytes(4, "little"))
        except OSError as error:
            self.problem = error
            if self.file and error.errno == errno.ENOSPC and shutil.disk_usage(self.path.parent).free < RESERVE // 100:
                self.file.truncate(0)       # the saves need the room more; whoever shares the file computes again
            print(f"notice: no more of the teacher's answers are kept in {self.path} ({error.strerror or error}); going on without")


def load_teacher(name, path, source, device, precision="fp32", num_classes=100, compile=False):
    """The Teacher `name` with the weights of a checkpoint file. ValueError as in `models.load_weights`."""
    network = create_model(name, num_classes)
    load_weights(network, path, prefer="teacher")
    return Teacher(network, device, precision, source, compile)


def find_teacher(name, checkpoint=None, url=ARCHIVE_URL, say=print):
    """(file, source) of a CIFAR-100 teacher's weights, in the order above; (None, reason) where none was found.

    `url` is the archive of mdistiller's teachers, or a mirror of it; `say` takes a line about a download. What was downloaded before is
    taken again, whatever could be had today: a run that goes on needs the teacher that it began with.
    """
    if checkpoint is not None:
        return Path(checkpoint), str(checkpoint)
    file, accuracy = PYTORCH_CIFAR_MODELS.get(name, (None, None))
    alternative, published = CHECKPOINTS / "pytorch-cifar-models" / f"{name}.pt", CHECKPOINTS / "mdistiller" / f"{name}.pth"
    sources = {CHECKPOINTS / f"{name}.pt": f"checkpoints/{name}.pt",
               alternative: f"pytorch-cifar-models', {accuracy} % by its authors, checkpoints/pytorch-cifar-models/{name}.pt",
               published: f"mdistiller's, checkpoints/mdistiller/{name}.pth"}

    def found():
        return next(((path, source) for path, source in sources.items() if path.is_file()), None)

    problems = [f"no checkpoints/{name}.pt"]
    if not found() and name in IN_ARCHIVE:
        say(f"downloading mdistiller's teachers, once, from {url}")
        problem = problem_of(lambda: download_teachers(url, published.parent))
        problems.append(f"mdistiller's teachers could not be downloaded ({problem})" if problem else f"no {name} in {url}")
    elif name not in IN_ARCHIVE:
        problems.append(f"mdistiller publishes no {name}")
    if not found() and file:        # the archive is at one address only
        say(f"{problems[-1]}; downloading pytorch-cifar-models' {file}")
        alternative.parent.mkdir(parents=True, exist_ok=True)
        problem = problem_of(lambda: torch.hub.download_url_to_file(
            PYTORCH_CIFAR_MODELS_URL + file, alternative, hash_prefix=file[-11:-3], progress=False))
        problems.append(f"pytorch-cifar-models' could not be downloaded ({problem})")
    return found() or (None, ", and ".join(problems))


def problem_of(download):
    """Why a download failed, None where it did not."""
    try:
        download()
    except (OSError, ValueError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        return str(error) or type(error).__name__


def download_teachers(url, folder):
    """Takes NAME_vanilla/ckpt_epoch_240.pth out of the archive, as it comes, to folder/NAME.pth; nothing half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, tarfile.open(fileobj=response, mode="r|*") as archive:
        for member in archive:
            name = network_of(member)
            if name not in IN_ARCHIVE:
                continue
            partial = folder / f"{name}.pth.{os.getpid()}.part"
            try:
                partial.write_bytes(archive.extractfile(member).read())
                os.replace(partial, folder / f"{name}.pth")
            finally:
                partial.unlink(missing_ok=True)
