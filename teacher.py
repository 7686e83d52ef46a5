"""Where a teacher comes from, and its logits, each computed once.

A teacher is looked for in this order: the file that was named; checkpoints/NAME.pt; RepDistiller's, one file
a network; the same in mdistiller's archive; pytorch-cifar-models'. A download is kept in a folder of
checkpoints/. Where there is none, the training script trains it.

A frozen network gives the same logits for the same view, and a small image has 162 views. They are computed
in large batches and cached: on a GPU in its memory, elsewhere in a file that runs share.
"""

import copy
import hashlib
import operator
import os
import tarfile
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from checkpoints import load_weights, weights_sha256
from data import VIEWS, Preprocessing, socket_timeout
from logit_kd import distillation_loss
from models import Features, float32_head

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
ARCHIVE_URL = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
REPDISTILLER_URL = "http://shape2prog.csail.mit.edu/repo/{}_vanilla/ckpt_epoch_240.pth"
REPDISTILLER = {"resnet32x4": "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f"}    # SHA-256
IN_ARCHIVE = ("resnet32x4", "resnet56", "resnet110", "wrn_40_2", "vgg13", "ResNet50")
PYTORCH_CIFAR_MODELS_URL = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
PYTORCH_CIFAR_MODELS = {        # the first 8 digits of the file's SHA-256; its authors' top-1 (%)
    "resnet20": "23dac2f1",     # 68.83
    "resnet32": "84213ce6",     # 70.16
    "resnet44": "ffe32858",     # 71.63
    "resnet56": "f2eff4c8"}     # 72.63
BATCH = {"cuda": 1024, "mps": 256, "cpu": 256}      # images in a teacher's batch
HALF_ERROR = 0.02       # rms of a logit, with which float16 is taken; bfloat16 has 0.05
SPARE = 4 * 2**30       # bytes of a GPU's memory that cached logits leave for the rest of a run


class Teacher:
    """A frozen network in evaluation mode, and its logits.

    network: (B, 3, H, W) -> (B, K), with a `name`. precision: of the features, "bf16" is autocast; logits are
    float32's unless `allow_half` took float16. compile: by torch.compile.
    pixels: the Preprocessing of the images that it gets. own: that of its training, None: the same. It sees
    its own where mean or standard deviation differ.
    """

    def __init__(self, network, device, precision="fp32", source="untrained", compile=False,
                 pixels=Preprocessing(), own=None):
        self.name = network.name
        self.source = source
        self.top1 = None        # on the evaluation images, where it was evaluated
        self.sha256 = weights_sha256(network)
        self.device = torch.device(device)
        self.precision = precision
        self.half = False
        self.pixels = pixels
        self.rescale = None
        if own and own[:2] != pixels[:2]:
            self.sha256 += f" of pixels of {own[:2]}"
            values = torch.tensor([*pixels[:2], *own[:2]], device=device)
            mean, std, own_mean, own_std = values.view(4, 3, 1, 1)
            self.rescale = std / own_std, (mean - own_mean) / own_std
        code = getattr(network, "code", "")
        self.key = (self.sha256, code, pixels[:2], self.device.type, compile)
        self.whole = network.to(device).eval().requires_grad_(False)
        network = float32_head(fold(self.whole))
        self.network = torch.compile(network, dynamic=False) if compile else network
        self.batch = BATCH[self.device.type]
        self.folder = self.rows = None

    def _prepared(self, images):
        if self.rescale is not None:
            scale, shift = self.rescale
            images = images * scale + shift
        return images.contiguous(memory_format=torch.channels_last)

    def allow_half(self, images):
        """Takes float16 for the logits, if it moves those of these images by HALF_ERROR (rms) at most."""
        exact = self.logits(images)
        self.half = True
        error = (self.logits(images) - exact).square().mean().sqrt()
        self.half = bool(error <= HALF_ERROR)       # not for NaN

    @torch.no_grad()
    def logits(self, images):
        """Logits (B, K), float32, of normalised images (B, 3, H, W), computed `batch` at a time (None: all).

        The network always sees a full batch: the last bits of a row do not depend on the other images.
        """
        parts = []
        batch = self.batch or len(images)
        for part in images.split(batch):
            full = F.pad(part, [0] * 7 + [batch - len(part)])
            with torch.autocast(self.device.type, torch.float16, enabled=self.half):
                logits = self.network(self._prepared(full))
            parts.append(logits[:len(part)].float())
        return torch.cat(parts)

    def prepare(self, method):
        """Makes `features` give what a feature_kd.Method reads, in its mode; in evaluation nothing else."""
        self.extractor = FeatureExtractor(self.whole, method.reads, method.depth)
        if method.teacher_mode == "train":      # batch statistics; its own stay as they are
            self.extractor = copy.deepcopy(self.extractor)
            for m in self.extractor.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.momentum = 0.0
                    m.num_batches_tracked = None
            self.extractor.train()
        elif not getattr(self.whole, "own", False):
            self.extractor = fold(self.extractor)

    @torch.no_grad()
    def features(self, images):
        """Features of exactly these normalised images; see `prepare`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.extractor(self._prepared(images))
        return Features((), (), None, None)._replace(**found)

    # ------------------------------------------------------------ cached logits

    def cache_logits(self, split, folder=None, exact=False):
        """Caches what `cached_logits` computes for the images of `split` from here on; None: nothing.

        folder: of the file, n x 162 x (K numbers + 1 byte), for where a GPU has no room. exact: float32; else
        rounded to float16 (error 5e-4).
        """
        self.images = split.images
        self.folder = folder
        self.dtype = torch.float32 if exact else torch.float16
        self.rows = None        # made when first asked for: a refused command leaves no file

    def cached_logits(self, indices, views, images):
        """Logits (n, K), float32 on the device, of views (n,) of images `indices` (n,), int64 on the CPU.

        images: those views, normalised (n, 3, H, W). The rounded values, cached or not. ValueError: NaN, or
        beyond float16's range.
        """
        if self.rows is None and self.folder is not None:
            self._open_cache(self.whole(images[:1]).shape[1])       # `logits` would fill a batch
        if self.rows is None:
            return self._rounded(images).float()
        slots = indices * VIEWS + views
        missing = (~self.known[slots]).nonzero().flatten()
        if len(missing):
            new = self._rounded(images[missing.to(images.device)])
            self.rows[slots[missing].to(self.rows.device)] = new.to(self.rows.device)
            self.known[slots[missing]] = True       # after its row: a process may be killed in between
        return self.rows[slots.to(self.rows.device)].to(self.device).float()

    def _rounded(self, images):
        logits = self.logits(images).to(self.dtype)
        if not logits.isfinite().all():
            raise ValueError("the teacher's logits are NaN or do not fit float16, which ends at 65504: give "
                             "--exact-teacher")
        return logits

    def _open_cache(self, classes):
        """Makes `rows`, logits (n x 162, K), and `known`, which of them there are (n x 162,)."""
        n = len(self.images) * VIEWS
        size = n * classes * self.dtype.itemsize
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            if torch.cuda.mem_get_info(self.device)[0] > size + SPARE:
                self.rows = torch.empty(n, classes, dtype=self.dtype, device=self.device)
                self.known = torch.zeros(n, dtype=torch.bool)
                return
        path = self._cache_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:      # a write to a mapped page that has no room is a SIGBUS
                os.posix_fallocate(file.fileno(), 0, size + n)
        except (OSError, AttributeError) as error:      # macOS and Windows have no posix_fallocate
            print(f"notice: {path} cannot be made ({error}): "
                  "the teacher's logits are computed in every epoch")
            path.unlink(missing_ok=True)
            self.folder = None
            return
        file = torch.from_file(str(path), shared=True, size=size + n, dtype=torch.uint8)
        self.rows = file[:size].view(self.dtype).view(n, classes)
        self.known = file[size:].view(torch.bool)

    def _cache_path(self):
        """A name with a hash of all that may change the last bits."""
        images = hashlib.sha256(self.images.cpu().numpy()).hexdigest()
        key = (*self.key, self.half, images, self.dtype, torch.__version__, torch.get_num_threads())
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        return Path(self.folder) / f"{self.name}-{digest[:16]}.logits"


class FeatureExtractor(nn.Module):
    """A network's fields of Features by name, the maps of the first `depth` stages, None: of all."""

    def __init__(self, network, names, depth):
        super().__init__()
        self.network = network
        self.names = names
        self.depth = depth

    def forward(self, images):
        _, features = self.network(images, features=True)
        found = {name: getattr(features, name) for name in self.names}
        for name in {"pre", "post"} & set(found):
            found[name] = found[name][:self.depth]
        return found


def fold(network):
    """The network for inference: batch norms folded into the convolutions before them, safe ReLUs in place.

    A custom model, and one that torch.fx cannot trace, come back as they are.
    """
    if getattr(network, "own", False):
        return network
    try:
        folded = fuse(network)
    except TraceError:
        return network.to(memory_format=torch.channels_last)
    folded.graph.eliminate_dead_code()
    for node in folded.graph.nodes:
        if node.target is F.relu and len(node.args[0].users) == 1 and (     # a fresh input, read here alone
                node.args[0].op == "call_module" or node.args[0].target is operator.add):
            node.kwargs = {**node.kwargs, "inplace": True}
    folded.recompile()
    return folded.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------- where a teacher comes from


def load_teacher(network, path, device, source="", precision="fp32", compile=False, pixels=Preprocessing(),
                 classes=None, prefer="teacher"):
    """The Teacher of a network with the weights of a checkpoint file. pixels, classes: those of the images.

    ValueError as in `checkpoints.load_weights`, and for a file that names other classes.
    """
    metadata = load_weights(network, path, prefer=prefer)
    check_names(path, metadata, classes)
    own = Preprocessing.of(metadata, pixels.size, pixels.resize)
    if own and own.size != pixels.size:
        print(f"notice: {path} was trained on images of {own.size} x {own.size}, and sees {pixels.size} x "
              f"{pixels.size} here")
    return Teacher(network, device, precision, source, compile, pixels, own)


def check_names(path, metadata, classes):
    """ValueError where a checkpoint's metadata has other class names than those of the images."""
    theirs = metadata.get("classes")
    if theirs and classes and list(theirs) != list(classes):
        raise ValueError(f"{path} is for {len(theirs)} classes ({', '.join(theirs[:3])}, ...), "
                         f"these images have {len(classes)} ({', '.join(classes[:3])}, ...)")


def check_teacher(teacher, top1, images, say, published=None):
    """Says what a Teacher is and its top-1 (%) on `images`; a point under the published one: a warning."""
    line = f"teacher {teacher.name} ({teacher.source}): {top1:.2f} % top-1 on the {images}"
    if published:
        line += f", published {published:.2f}"
    say(line)
    if published and top1 <= published - 1:
        say("warning: this teacher is worse than the published one; the paper's numbers cannot be expected")


@torch.no_grad()
def teacher_report(batches, recipe, options):
    """What a teacher is on training views: a dict, of top-1 in %, cross-entropy, and more.

    batches: [(one (B, K) a view, targets (B,))]. options: of the recipe's loss. logit_std: the mean over the
    images of the standard deviation over the classes. uniform_loss: the recipe's distillation term, lambda_KD
    times the method's loss, of a student that answers uniformly.
    """
    logits = torch.cat([views[0] for views, _ in batches])
    targets = torch.cat([target for _, target in batches])
    kd = 0
    for views, target in batches:
        uniform = [torch.zeros_like(v) for v in views]
        loss = distillation_loss(recipe["method"], uniform, views, target, recipe["base_temp"], **options)
        kd += loss.item() * len(target) / len(targets)
    return {"images": len(targets),
            "train_top1": 100 * (logits.argmax(1) == targets).double().mean().item(),
            "train_ce": F.cross_entropy(logits, targets).item(),
            "logit_std": logits.std(1, correction=0).mean().item(),
            "uniform_loss": recipe["kd_weight"] * kd}


def local_teacher(name):
    """The file of a CIFAR-100 teacher that is in checkpoints/, or None."""
    files = (f"{name}.pt", f"repdistiller/{name}.pth", f"mdistiller/{name}.pth",
             f"pytorch-cifar-models/{name}.pt")
    for file in files:
        if (CHECKPOINTS / file).is_file():
            return CHECKPOINTS / file
    return None


def find_teacher(name, url=None, say=print):
    """(file, source) of a CIFAR-100 teacher's weights, in the order above; (None, reason) without one.

    url: a mirror of mdistiller's archive, as the environment variable TEACHER_URL; it is asked first. say:
    takes a line about a download.
    """
    mirror = url or os.environ.get("TEACHER_URL")
    downloads = []      # (address, file, its SHA-256 or the first digits)
    if name in IN_ARCHIVE:
        if not mirror:      # one small file before all of them
            file = CHECKPOINTS / "repdistiller" / f"{name}.pth"
            downloads.append((REPDISTILLER_URL.format(name), file, REPDISTILLER.get(name)))
        downloads.append((mirror or ARCHIVE_URL, CHECKPOINTS / "cifar_teachers.tar", None))
    if name in PYTORCH_CIFAR_MODELS:
        sha256 = PYTORCH_CIFAR_MODELS[name]
        file = CHECKPOINTS / "pytorch-cifar-models" / f"{name}.pt"
        downloads.append((f"{PYTORCH_CIFAR_MODELS_URL}cifar100_{name}-{sha256}.pt", file, sha256))
    reason = f"no checkpoints/{name}.pt, and nobody publishes a {name}"
    for address, file, sha256 in downloads:
        if local_teacher(name):
            break
        say(f"downloading {address}, once")
        reason = f"no {name} in {address}"
        try:
            download(address, file, sha256)
        except (OSError, ValueError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
            reason = f"the download failed ({error}): wget -c {address} -O {file}"
        if not local_teacher(name):
            say(reason)
    path = local_teacher(name)
    return (path, f"checkpoints/{path.relative_to(CHECKPOINTS)}") if path else (None, reason)


def download(url, path, sha256=None):
    """A file from the network, whole or not at all; an archive is unpacked. sha256: its first digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket_timeout():
        if not path.is_file():
            torch.hub.download_url_to_file(url, path, hash_prefix=sha256, progress=False)
    if path.suffix == ".tar":
        unpack_teachers(path)


def unpack_teachers(path):
    """NAME_vanilla/ckpt_epoch_240.pth of mdistiller's archive becomes mdistiller/NAME.pth next to it."""
    folder = path.parent / "mdistiller"
    folder.mkdir(exist_ok=True)
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name).parent.name.removesuffix("_vanilla")
            if name in IN_ARCHIVE and member.name.endswith("/ckpt_epoch_240.pth"):
                partial = folder / f"{name}.{os.getpid()}.part"
                partial.write_bytes(archive.extractfile(member).read())
                os.replace(partial, folder / f"{name}.pth")
    path.unlink()
