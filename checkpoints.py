"""Checkpoint files of the field: read without running code from them, identified, and loaded.

    network, metadata = open_checkpoint("student.pt")           # the file names its network, or its keys do
    network, metadata = open_checkpoint("best.pth", "resnet8x4")
    metadata = load_weights(network, "resnet56_best.pth")       # into a network that you have

A file is one tree of names and tensors, however dictionaries and dots are nested. A network's weights are
where all of its keys are and no others: {"model": ...}, {"net": ...}, a plain state_dict, `module.`,
`_orig_mod.`, `model.` and any other prefix.
"""

import argparse
import functools
import hashlib
import io
import re
import tarfile
from collections import Counter
from pathlib import Path

import torch

from data import IMAGENET_PREPROCESSING, Preprocessing
from models import MODELS, create_model
from networks import TORCHVISION, check_logits, create, simkd_network, torchvision_network

# NumPy's names in files of torch before 1.6, which list none: RepDistiller's learning rate is a numpy.float64
NUMPY = ["numpy.ndarray", "numpy.dtype",
         "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
         "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"]
# keys that are no weights: of batch norms (not in old files), of AveragedModel, of thop's count of operations
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
AVERAGED = {"ema", "swa", "averaged"}


class FromNumpy:
    """Replaces a NumPy value, which is skipped: no NumPy code runs."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


# ---------------------------------------------------------------- reading


def read_checkpoint(path, network=None):
    """The content of a checkpoint file, tensors on the CPU. network: which one of mdistiller's archive.

    Reads torch's files (also of versions before 1.6) and safetensors. ValueError, one line, for others.
    """
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            if start[257:262] == b"ustar":
                return _load(_from_archive(path, network), f"{path}, {network}")
            if start[5:9] == b"\0\0\0{":        # after the length of the header
                return _safetensors(path)
            if start.lstrip().startswith(b"<"):
                raise ValueError(f"{path} is a web page, not a checkpoint: download it again")
            if start.startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a Git LFS pointer: fetch the file with `git lfs pull`")
            return _load(file, path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _load(file, path):
    """torch.load of an open file. argparse's Namespace passes: RepDistiller's flags in *_last.pth."""
    file.seek(0)
    try:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except ValueError:      # before torch 1.6
            names = NUMPY
        file.seek(0)
        skipped = [(FromNumpy, name) for name in names if name.startswith("numpy.")]
        with torch.serialization.safe_globals([argparse.Namespace, *skipped]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:      # torch raises a dozen types for damaged files
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{unsafe[1]} in it could run code" if unsafe else "damaged, or no PyTorch checkpoint"
        raise ValueError(f"{path} is not loaded ({reason}); where it was made: "
                         "torch.save(model.state_dict(), 'clean.pt')") from None


def _safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path} is a safetensors file: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:      # its own type
        raise ValueError(f"{path} is a damaged safetensors file ({error})") from None


def _from_archive(path, network):
    """The file of one network in mdistiller's archive of teachers."""
    wanted = f"{network}_vanilla/ckpt_epoch_240.pth"
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith("/" + wanted):
                    return io.BytesIO(archive.extractfile(member).read())
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is a damaged tar archive ({error})") from None
    raise ValueError(f"{path} is a tar archive without {wanted}")


def metadata_of(content):
    """The plain values next to a file's weights."""
    plain = (str, int, float, list, tuple, type(None))
    return {k: v for k, v in content.items() if isinstance(v, plain)} if isinstance(content, dict) else {}


# ---------------------------------------------------------------- finding a network's weights


def _flat(content, prefix=""):
    """{"model.conv1.weight": tensor}: nested dictionaries' names joined by dots."""
    found = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
    return found


def find_weights(content, network):
    """({prefix: state_dict}, nearest): each place in the content that has all of the network's keys.

    prefix: a dotted path, "" for the whole. COUNTERS may be missing; shapes are not compared. nearest: the
    state_dict with most of the network's keys, {} where there is none.
    """
    flat, keys = _flat(content), network.state_dict().keys()
    wanted = {k for k in keys if not k.endswith(COUNTERS)}
    matches = Counter()
    for key in flat:
        words = key.split(".")
        for i in range(len(words)):
            if ".".join(words[i:]) in wanted:
                matches[".".join(words[:i])] += 1
    fits = {}
    for prefix, n in matches.items():
        state = _state_at(prefix, flat, keys)
        if n == len(wanted) and state.keys() <= keys:
            fits[prefix] = state
    nearest = _state_at(max(matches, key=matches.get), flat, keys) if matches else {}
    return fits, nearest


def _state_at(prefix, flat, keys):
    start = prefix + "." if prefix else ""
    state = {k.removeprefix(start): v for k, v in flat.items() if k.startswith(start)}
    return {k: v for k, v in state.items() if k in keys or not k.endswith(COUNTERS)}


def preferred(places, prefer="student"):
    """The place to take, of those that fit: of teacher and student the wanted one, raw before averaged."""
    def rank(prefix):
        words = re.split(r"[._]", prefix.lower())
        other = ("teacher" in words) != (prefer == "teacher")
        return other, not AVERAGED.isdisjoint(words), len(words)
    return min(places, key=rank)


def other_classes(state, wanted):
    """(classes of the state, of the network) where their tensors differ in the number of classes alone."""
    pairs = [(v.shape, wanted[k].shape) for k, v in state.items() if v.shape != wanted[k].shape]
    counts = {(given[:1], own[:1]) for given, own in pairs}
    if len(counts) != 1 or any(not given or given[1:] != own[1:] for given, own in pairs):
        return None
    (given,), (own,) = counts.pop()
    return given, own


def guess_network(content):
    """The name in MODELS whose keys and shapes a checkpoint's content has, class count aside; else None."""
    found = {}
    for name in MODELS:
        outline = _outline(name)
        wanted = {k: v.shape[1:] for k, v in outline.state_dict().items()}
        for prefix, state in find_weights(content, outline)[0].items():
            if all(v.shape[1:] == wanted[k] for k, v in state.items()):
                found[prefix] = name
    return found[preferred(found)] if found else None


@functools.cache
def _outline(name):
    """A network without its numbers."""
    with torch.device("meta"):
        return create_model(name)


# ---------------------------------------------------------------- loading


def load_weights(network, path, *, prefer="student"):
    """Loads a checkpoint file into a network, strictly, and returns the file's metadata, a dict.

    prefer: "student" or "teacher", where a file has both; float16 weights are cast. ValueError, one line: the
    first difference; the network is then untouched.
    """
    content = read_checkpoint(path, getattr(network, "name", None))
    _load_content(network, content, path, prefer)
    return metadata_of(content)


def _load_content(network, content, path, prefer):
    name = getattr(network, "name", type(network).__name__)
    fits, state = find_weights(content, network)
    if fits:
        prefix = preferred(fits, prefer)
        state = fits[prefix]
        if len(fits) > 1 or prefer == "student" and "teacher" in prefix.lower():
            print(f"notice: {path} has weights of a {name} at {', '.join(fits)}; taking {prefix}", flush=True)
    wanted = network.state_dict()
    own, given = _shapes(wanted), _shapes(state)
    if own.keys() == given.keys() and (classes := other_classes(state, wanted)):
        raise ValueError(f"{path} is for {classes[0]} classes, this {name} is for {classes[1]}")
    differ = [k for k in own | given if own.get(k) != given.get(k)]
    if differ:
        other = "SimKD student" if "simkd" in metadata_of(content) else guess_network(content)
        what = f"{name} but a {other}" if other and other != name else name
        key = differ[0]
        raise ValueError(f"{path} is not a {what}: {key} is {given.get(key, 'missing')} there and "
                         f"{own.get(key, 'missing')} here (tensors that differ: {len(differ)})")
    network.load_state_dict(wanted | state)


def _shapes(state):
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith(COUNTERS)}


def open_checkpoint(path, name=None, *, num_classes=None, size=None, prefer="student"):
    """(network in evaluation mode, metadata) of a checkpoint file.

    name: of the network; None: the one in the file's metadata, or that its keys fit. num_classes and size
    (pixels of an image's side): None, the file's. metadata: the file's, with "student", "num_classes",
    "preprocessing" and "preprocessing_known". ValueError, one line.
    """
    content = read_checkpoint(path, name)
    metadata = metadata_of(content)
    name = name or _name_in(path, content, metadata)
    source = MODELS if ":" in name or name in MODELS else TORCHVISION
    network, classes = _build(name, source, content, metadata, num_classes, prefer)
    if classes is None and name in TORCHVISION:     # both have a vgg13: the keys decide
        source = TORCHVISION
        network, classes = _build(name, source, content, metadata, num_classes, prefer)
    _load_content(network, content, path, prefer)
    large = source is TORCHVISION or name == "MobileNetV1" or name.startswith("timm:")
    preprocessing, known = _preprocessing(metadata, large, size)
    check_logits(network.eval(), name, classes, preprocessing.size)
    return network, metadata | {"student": name, "num_classes": classes, "preprocessing": preprocessing,
                                "preprocessing_known": known}


def _name_in(path, content, metadata):
    """The name of a file's network. A custom network's is imported, which runs its code."""
    name = metadata.get("student") or guess_network(content)
    if name is None:
        raise ValueError(f"{path} does not name its network, and its keys fit none: give --student")
    if ":" in name:
        print(f"notice: {path} is of {name}, which is imported", flush=True)
    return name


def _build(name, source, content, metadata, num_classes, prefer):
    """(network, its number of classes; None where the content does not fit it)."""
    classes = num_classes or metadata.get("num_classes") or 100
    network = create(name, classes, source)
    if "simkd" in metadata:
        network = simkd_network(network, metadata["simkd"])
    fits, _ = find_weights(content, network)
    if not fits:
        return network, None
    state = fits[preferred(fits, prefer)]
    differ = other_classes(state, network.state_dict())
    if differ and num_classes is None:
        return create(name, differ[0], source), differ[0]
    return network, classes


def _preprocessing(metadata, large, size):
    """(Preprocessing of a file's images, whether the file has it): else the network's usual one."""
    side = metadata.get("size")
    usual = IMAGENET_PREPROCESSING.at(side or 224) if side or large else Preprocessing()
    own = Preprocessing.of(metadata, usual.size, usual.resize)
    found = own or usual
    return found.at(size or found.size), own is not None


def load_pretrained(network, source, say=print):
    """Loads what fits of a checkpoint file into a network; the rest, a head of other classes, stays new.

    source: a file, or the name of torchvision's weights for one of its networks. ValueError where nothing
    fits.
    """
    known = not network.own and type(network).__module__.startswith("torchvision.")
    if known and source.isidentifier() and not Path(source).expanduser().exists():
        given = torchvision_network(network.name, source).state_dict()
    else:
        fits, nearest = find_weights(read_checkpoint(source, network.name), network)
        given = fits[preferred(fits)] if fits else nearest
    wanted = network.state_dict()
    taken = {k: v for k, v in given.items() if k in wanted and v.shape == wanted[k].shape}
    if all(k.endswith(COUNTERS) for k in taken):
        raise ValueError(f"--student-checkpoint {source}: nothing in it fits {network.name}")
    network.load_state_dict(wanted | taken)
    line = f"{network.name} begins with {source}"
    new = [k for k in wanted if k not in taken and not k.endswith(COUNTERS)]
    if new:
        line += f", but for {len(new)} of {len(wanted)} tensors, which start new: {', '.join(new[:4])}"
    say(line)


def weights_sha256(network):
    """SHA-256 of a network's parameters and buffers, names included; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
