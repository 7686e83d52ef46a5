"""Reads weights out of the checkpoint files that the field's code writes, without running any code from them.

    content = read_checkpoint("resnet56_best.pth")
    places, _ = find_weights(content, model)
    # {"model": state_dict}, or {"module.student": ..., "module.teacher": ...}

A file is one tree of names and tensors, however dictionaries and dots are nested. A network's weights are
where all of its keys are and no others: {"model": ...}, {"net": ...}, a bare state_dict, `module.`,
`_orig_mod.`, `model.` and any other prefix alike.
"""

import argparse
import io
import os
import re
import tarfile
import zipfile
from collections import Counter
from pathlib import PurePosixPath

import torch

# NumPy's names in checkpoints: RepDistiller's and mdistiller's optimizers hold a numpy.float64 learning rate
NUMPY = (["numpy.ndarray", "numpy.dtype"]
         + [f"numpy.{core}.{name}" for core in ("core", "_core")
            for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")]
         + [f"numpy.{kind}" for kind in (
             "bool", "bool_", "str_", "bytes_", "object_", "float16", "float32", "float64", "longdouble",
             "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")]
         + [f"numpy.dtypes.{kind}DType" for kind in (
             "Bool", "Str", "Bytes", "Object", "Float16", "Float32", "Float64", "LongDouble",
             "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")])
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"      # how files of torch before 1.6 begin
COUNTERS = ("num_batches_tracked", "n_averaged")    # of batch norms (not in old files), of AveragedModel
CLEAN = "Where it was made, save the weights alone: torch.save({}, 'clean.pt')"


class FromNumpy:
    """Stands in for a NumPy value, whose bytes are read over: no NumPy code runs."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path, network=None):
    """What a checkpoint file holds, tensors on the CPU. network: which of mdistiller's archive of teachers.

    Reads torch's files (also of before version 1.6) and safetensors. ValueError, one line with the path: what
    the file is instead, or which object in it is more than data.
    """
    path = os.path.expanduser(path)
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if start[257:262] == b"ustar":
            return _load(_from_archive(path, network), f"{path}, {network}")
        if start[5:9] == b"\0\0\0{":        # after the length of the header
            return _safetensors(path)
        if problem := _not_a_checkpoint(path, start):
            raise ValueError(f"{path} {problem}")
        return _load(path, path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a checkpoint file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _load(file, path):
    """torch.load of a file, open or not; argparse's Namespace passes: RepDistiller's flags in *_last.pth."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *((FromNumpy, name) for name in NUMPY)]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:      # torch raises a dozen types for damaged files
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise ValueError(f"{path} is not a PyTorch checkpoint, or it is damaged") from None
        what = ("is a whole pickled network," if _begins_with(file, name[1])
                else "holds a Python object beside tensors,")
        raise ValueError(f"{path} {what} {name[1]}; not loaded, as it could run code. "
                         f"{CLEAN.format('model.state_dict()')}") from None


def _begins_with(file, name):
    """Whether a checkpoint's pickle begins with an object of that class, as one of a whole network does."""
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))[:512]
    except zipfile.BadZipFile:      # before torch 1.6
        with file if hasattr(file, "read") else open(file, "rb") as stream:
            stream.seek(0)
            pickled = stream.read(1024)
    module, _, name = map(re.escape, name.rpartition("."))
    return re.search(rf"\x80\x02(\(X\x06\0\0\0moduleq\0)?c{module}\n{name}\n".encode(), pickled) is not None


def _not_a_checkpoint(path, start):
    """What a file is that is no checkpoint, by its first bytes and a zip's names; None if it may be one."""
    text = start.lstrip().lower()
    if not start:
        return "is empty"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "is an HTML page, not a checkpoint: the download gave an error or a log-in page"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if start.startswith(b"\x1f\x8b"):
        return "is compressed with gzip: unpack it, and name the checkpoint in it"
    if start.startswith(b"\x80") and not start.startswith(LEGACY):
        return ("is a plain pickle, which is not loaded, as it could run code. "
                f"{CLEAN.format('model.state_dict()')}")
    if not start.startswith(b"PK"):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "is not a PyTorch checkpoint, or it is damaged"
    if any(n.endswith("/constants.pkl") for n in names):
        return ("is a TorchScript archive, which holds code. "
                f"{CLEAN.format(f'torch.jit.load({str(path)!r}).state_dict()')}")
    if names and all(n.endswith(".npy") for n in names):
        arrays = "{k: torch.from_numpy(v) for k, v in numpy.load(" + repr(str(path)) + ").items()}"
        return f"holds NumPy's arrays (npz). {CLEAN.format(arrays)}"
    if not any(n.endswith("data.pkl") for n in names):
        return f"is a zip archive ({', '.join(names[:3])}): unpack it, and name the checkpoint in it"


def _safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path} is a safetensors file: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:      # its own type
        raise ValueError(f"{path} is not a safetensors file, or it is damaged ({error})") from None


def network_of(member):
    """The network of a member of mdistiller's archive, NAME of NAME_vanilla/ckpt_epoch_240.pth, else None."""
    path = PurePosixPath(member.name)
    return (path.parent.name.removesuffix("_vanilla")
            if member.isfile() and path.name == "ckpt_epoch_240.pth" else None)


def _from_archive(path, network):
    try:
        with tarfile.open(path) as archive:
            members = {network_of(m): m for m in archive if network_of(m)}
            if network in members:
                return io.BytesIO(archive.extractfile(members[network]).read())
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is a damaged tar archive ({error})") from None
    raise ValueError(f"{path} is a tar archive with teachers of {', '.join(members) or 'no network'}, "
                     f"{f'not of {network}' if network else 'and no network was named'}: name one of them, "
                     "or unpack it and name a checkpoint in it")


def facts_of(content):
    """What a file says beside its weights: the plain values of its outermost dictionary."""
    plain = (str, int, float, list, tuple, type(None))
    return {k: v for k, v in content.items() if isinstance(v, plain)} if isinstance(content, dict) else {}


def _flat(content, where=""):
    """{"model.conv1.weight": tensor}: nested dictionaries' names joined by dots."""
    found = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if not isinstance(key, str):
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{where}{key}.")
        elif isinstance(value, (torch.Tensor, FromNumpy)):
            found[where + key] = value
    return found


def find_weights(content, model):
    """({where: state_dict}, nearest): each place in the content that has all of the model's keys, no others.

    where is a dotted path, "" for the whole. The counters of batch norms may be missing; shapes are not
    compared. nearest: the state_dict with most of the model's keys, for who wants to say what is wrong; {}
    where there is none.
    """
    flat, keys = _flat(content), set(model.state_dict())
    want, found = {k for k in keys if not k.endswith(COUNTERS)}, Counter()
    for key in flat:
        parts = key.split(".")
        found.update(".".join(parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in want)

    def under(where):
        prefix = where + "." if where else ""
        state = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
        return {k: v for k, v in state.items()
                if k in keys or isinstance(v, torch.Tensor) and not k.endswith(COUNTERS)}

    fits = {where: state for where, n in found.items() if n == len(want)
            for state in [under(where)] if state.keys() <= keys}
    return fits, under(found.most_common(1)[0][0]) if found else {}


def preferred(places, prefer="student"):
    """The place to take, of those that fit: of teacher and student the wanted one, raw before averaged."""
    def rank(where):
        words = re.split(r"[._]", where.lower())
        return (("teacher" in words) != (prefer == "teacher"),
                any(w in ("ema", "swa", "averaged") for w in words), len(words))
    return min(places, key=rank)
