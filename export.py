"""A trained student as ONNX files that run without PyTorch: written, verified, measured, renamed.

\b
  python export.py --checkpoint runs/resnet32x4-resnet8x4-kd-z-seed0/student.pt --data-dir data
  python export.py --checkpoint bare.pt --student nets.py:tiny               its file says nothing of itself
  python predict.py resnet8x4.int8.onnx photos/                              classifies with what was written

NAME.onnx (float32), NAME.int8.onnx and, with --fp16, NAME.fp16.onnx, and the report NAME.json. Each file
carries its weights and says what it is in its metadata: classes, input, normalisation, accuracy,
temperature. A file whose logits are not PyTorch's is not kept.
"""

import io
import json
import logging
import math
import os
import signal
import tempfile
import time
import timeit
import warnings
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime import quantization
from onnxruntime.transformers import float16
from onnxruntime.transformers.onnx_model import OnnxModel

import cli
import run as runs
from checkpoints import open_checkpoint, weights_sha256
from data import (CIFAR, HELD_OUT_KEY, PAD, FolderImages, Preprocessing, Split, collate, epoch_draws,
                  has_cifar, load_data, load_folders, printable, read_images, synthetic)
from models import MODELS
from networks import TORCHVISION, label

CENTRE = ((2 * PAD + 1) ** 2 // 2) * 2          # the view that is the image itself
OPSETS = 13, 23         # the oldest that quantizes by channel, and the newest that was tried
BATCHES = 1, 2, 7, 64   # sizes that are verified
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "int8": math.inf}     # largest error, relative to the largest logit
WARM_UP, SAMPLES, SECONDS = 20, 200, 1.0        # of a latency, and the time after which fewer samples do
FACTS = "teacher", "method", "zscore", "feature", "entropy_temp", "epochs", "seed", "data"      # for metadata
HELD_OUT = "held-out training images"
UNSEEN = "training images at a position that training did not draw"
UNMEASURED = "accuracy is not measured, int8 is not calibrated, the temperature is not fitted"
ADVICE = "try --exclude-first-last, --calibration 2048 or a lower --agreement"


# ---------------------------------------------------------------- the student and its images


class Student(NamedTuple):
    """A trained network and what is known of it."""
    network: torch.nn.Module    # in evaluation mode
    facts: dict                 # what its checkpoint says of the training
    num_classes: int
    classes: list | None        # their names, where the checkpoint or the user has them
    float_input: bool           # its files take normalised float32, not uint8
    pixels: Preprocessing

    def feed(self, images):
        """uint8 images -> what the files take, in NumPy."""
        return (self.pixels.normalise(images).contiguous() if self.float_input else images).numpy()

    @property
    def batch(self):
        return max(1, 500 * 32**2 // self.pixels.size**2)       # the pixels of 500 images of CIFAR-100

    @torch.no_grad()
    def logits(self, images, call=None, batch=None):
        """float64 (N, K) of uint8 (N, 3, size, size), PyTorch's, or those of a file's `call` (see `load`)."""
        call, feed = (call, self.feed) if call else (self.network, self.pixels.normalise)
        return torch.cat([torch.as_tensor(call(feed(x))) for x in images.split(batch or self.batch)]).double()


def load_student(path, name=None, float_input=False, *, classes=None, mean=None, std=None, size=None):
    """The Student in a checkpoint of any format of the field. ValueError, one line, for what it is not.

    classes (a file), mean and std ("R,G,B"), size: in place of what the checkpoint says.
    """
    network, facts = open_checkpoint(path, name, size=size)
    name, count, pixels = facts["student"], facts["num_classes"], facts["preprocessing"]
    if mean or std:
        pixels = with_statistics(pixels, mean, std)
    papers = ":" not in name and count == (100 if pixels.size == pixels.resize else 1000)
    if not (facts["preprocessing_known"] or mean and std or "data" in facts or papers):
        click.echo(f"{path} does not say its images' mean and deviation: where --mean and --std do not, "
                   f"{'CIFAR-100' if pixels.size == pixels.resize else 'ImageNet'}'s are taken, at "
                   f"{pixels.size} pixels (--size); --classes names the classes")
    facts = {k: facts[k] for k in (*FACTS, "train_images", "val_from_train", "classes")
             if isinstance(facts.get(k), list if k == "classes" else (str, int, float))}
    names = read_classes(classes, count) if classes else facts.get("classes")
    return Student(network, facts, count, names, float_input, pixels)


def with_statistics(pixels, mean, std):
    """The Preprocessing with another mean and deviation, "R,G,B"."""
    given = {k: v.split(",") for k, v in (("mean", mean), ("std", std)) if v}
    pixels = Preprocessing.of(pixels._asdict() | given)
    if not pixels or not all(0 <= x <= 1 for x in pixels.mean + pixels.std):
        raise ValueError("--mean and --std take three numbers in [0, 1], of pixels in [0, 1], as 0.5,0.5,0.4")
    return pixels


def read_classes(path, count):
    """The names in a file, one a line."""
    try:
        names = [x.strip() for x in Path(path).read_text("utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--classes {path}: {error}") from None
    if len(names) != count:
        raise ValueError(f"--classes {path} has {len(names)} names, one a line; the network {count}")
    return names


class Images(NamedTuple):
    """A student's images as Splits, None where there are none."""
    calibration: Split | None = None        # training images, for the ranges of int8
    held_out: Split | None = None           # for the temperature: training did not see them, or not there
    test: Split | None = None
    held_out_name: str = ""
    classes: list = []                      # their names


def find_images(student, data_dir, count):
    """The Images of the student's own data set, where they are at hand; never downloaded. count: for int8.

    Where the checkpoint says nothing, it is what --data-dir has. ValueError, one line: that does not fit.
    """
    root, name = Path(data_dir or "data").expanduser(), data_set(student, data_dir)
    if name in CIFAR and not has_cifar(name, root):
        official = f"CIFAR-{name[5:]}"
        if data_dir:
            raise ValueError(f"no {official} in {data_dir}: --data-dir names the folder that holds "
                             f"{CIFAR[name][0].base_folder}, or train/ or val/")
        click.echo(f"no {official} in data/ and no --data-dir: {UNMEASURED}")
        return Images(classes=CIFAR[name][1])
    if name == "folder" and not data_dir:
        click.echo(f"no --data-dir: {UNMEASURED}")
        return Images()
    return folder_images(student, root, count) if name == "folder" else set_images(student, name, root, count)


def data_set(student, data_dir):
    """Whose images a student takes: a name of CIFAR, "synthetic", or "folder"."""
    said, parts = student.facts.get("data"), data_dir and parts_of(Path(data_dir).expanduser())
    if student.pixels[2:] != Preprocessing()[2:] or said not in (*CIFAR, "synthetic", None):
        return "folder"
    if said or parts or student.classes and not data_dir:
        return said or "folder"
    return {100: "cifar100", 10: data_dir and "cifar10"}.get(student.num_classes) or "folder"


def parts_of(root):
    return [part for part in ("train", "val") if (root / part).is_dir()]


def set_images(student, name, root, count):
    """`find_images` in a set that is held as tensors."""
    facts = student.facts
    data = load_data(name, root, "cpu", train_images=facts.get("train_images"),
                     val_from_train=facts.get("val_from_train", 0), download=False)
    check_images(student, root, list(data.classes))
    order = torch.from_numpy(epoch_draws(0, 0, len(data.train.targets))[0])
    fit, what = data.eval, HELD_OUT
    if data.eval_name == "test":
        unseen = order[~drawn(facts, len(order))[order]][:5000]
        fit, what = Split(*(x[unseen] for x in data.train)), UNSEEN
    return report(Split(*(x[order[:count]] for x in data.train)), fit, what, data.test, data.classes)


def folder_images(student, root, count):
    """`find_images` in folders; of many images some, spread evenly, and half of those that were held out."""
    facts, (*_, size, resize), parts = student.facts, student.pixels, parts_of(root)
    held = facts.get("val_from_train", 0) if "train" in parts else 0
    folders = load_folders(root, held, parts or ("train", "val"))
    check_images(student, root, folders.classes)
    chosen = epoch_draws(HELD_OUT_KEY, 0, len(folders.train))[0][:facts.get("train_images")]
    train = [folders.train[i] for i in sorted(chosen.tolist())]
    order = epoch_draws(0, 0, len(train))[0].tolist()

    def some(samples, most):
        n = min(len(samples), most)
        return [samples[len(samples) * i // n] for i in range(n)]

    def read(samples):
        if not samples or size == resize:
            return Split(read_images(samples, size, resize), torch.tensor([t for _, t in samples]))
        files = FolderImages(samples, size)
        (images,), _, targets, bad = collate([files[i, 0] for i in range(len(samples))])
        if bad:
            raise ValueError(f"{printable(samples[bad[0]][0])} cannot be decoded")
        return Split(images, targets)

    fit, test, what = folders.eval[::2], folders.eval[1::2] if held else folders.eval, HELD_OUT
    if not held and size == resize:
        seen, what = drawn(facts, len(train)), UNSEEN
        fit = [train[i] for i in order if not seen[i]]
    elif not held:
        fit, what = [train[i] for i in order], "training images' centre views"
    fit, tested = some(fit, 5000 if size == resize else 2000), some(test, 10_000 if size == resize else 2000)
    of = f"other {HELD_OUT}" if held else "evaluation images"
    click.echo(f"accuracy on {len(tested)} of {len(test)} {of}" if test else
               f"no {of} in {printable(root)}: accuracy is not measured")
    if not train:
        click.echo(f"no train/ in {printable(root)}: int8 is not calibrated, the temperature is not fitted")
    return report(read([train[i] for i in order[:count]]), read(fit), what, read(tested), folders.classes)


def drawn(facts, n):
    """Which of n training images a run drew uncropped (N,), as seed and epochs say; all where they do not."""
    if not {"seed", "epochs", "data"} <= facts.keys():
        return torch.ones(n, dtype=torch.bool)
    seen = torch.zeros(n, dtype=torch.bool)
    for epoch in range(facts["epochs"]):
        at, views = epoch_draws(facts["seed"], epoch, n)
        seen[torch.from_numpy(at[views == CENTRE])] = True
    return seen


def report(train, fit, what, test, classes):
    """The Images, None for an empty Split. The temperature of images that training saw would be too small."""
    if len(train.targets) and not len(fit.targets):
        click.echo("it is not known which views training drew: the temperature is not fitted")
    train, fit, test = (x if len(x.targets) else None for x in (train, fit, test))
    return Images(train, fit, test, f"{len(fit.targets)} {what}" if fit else "", list(classes))


def check_images(student, root, classes):
    """ValueError where the images have other classes. Readable names may stand for the folders' own."""
    own, said = student.classes, student.facts.get("classes", classes)
    if (len(classes) != student.num_classes or said != classes
            or own and own != classes and sorted(own) == sorted(classes)):
        raise ValueError(f"{printable(root)} has {len(classes)} classes ({', '.join(classes[:3])}, ...), not "
                         f"the student's {student.num_classes} "
                         f"({', '.join(map(str, (own or ['?'])[:3]))}, ...)")


# ---------------------------------------------------------------- probabilities


def fit_temperature(logits, targets):
    """The T in [1e-3, 1e3] that minimises the cross-entropy of softmax(logits / T) (Guo et al. 2017, 4.2).

    (N, K), (N,) -> a number. It is convex in 1/T; its derivative, the mean over softmax(logits / T) of a
    logit less the target's, is bisected.
    """
    own = logits.gather(1, targets[:, None])
    low, high = math.log(1e-3), math.log(1e3)           # of 1/T
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((logits * math.exp(middle)).softmax(1) * (logits - own)).sum(1).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def calibration_of(logits, targets, temperature, bins=15):
    """Negative log-likelihood and expected calibration error (Guo et al. 2017, eq. 3; equal bins)."""
    log_p = (logits / temperature).log_softmax(1)
    confidence, predicted = log_p.exp().max(1)
    hit, place = (predicted == targets).double(), (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, place, hit - confidence)
    return {"nll": F.nll_loss(log_p, targets).item(), "ece": gap.abs().sum().item() / len(targets)}


def fit(student, images, expected):
    """The metadata of the temperature, which is fitted here. expected: logits of the test images, if any."""
    if not images.held_out:
        return {"temperature": 1.0, "temperature_fitted_on": "nothing"}
    temperature = fit_temperature(student.logits(images.held_out.images), images.held_out.targets)
    found = {"temperature": temperature, "temperature_fitted_on": images.held_out_name}
    line = f"temperature {temperature:.4g}, fitted on {images.held_out_name}"
    if images.test:
        before, after = (calibration_of(expected, images.test.targets, t) for t in (1, temperature))
        found["calibration"] = {"before": before, "after": after}
        line += (f"; on the {len(expected)} test images: expected calibration error {before['ece']:.4f} -> "
                 f"{after['ece']:.4f}, negative log-likelihood {before['nll']:.4f} -> {after['nll']:.4f}")
        if after["nll"] > before["nll"]:
            line += ("\nwarning: the temperature makes it worse, as the network knows its training images "
                     "too well: train with --val-from-train and export again")
    click.echo(line)
    return found


# ---------------------------------------------------------------- writing


class Deployed(torch.nn.Module):
    """The network with what belongs to it on a device: normalisation before it, softmax after it."""

    def __init__(self, student, temperature=None):
        super().__init__()
        self.network, self.float_input, self.temperature = student.network, student.float_input, temperature
        mean, std, *_ = student.pixels
        self.register_buffer("scale", torch.tensor([[[1 / (255 * s)]] for s in std]))
        self.register_buffer("shift", torch.tensor([[[-m / s]] for m, s in zip(mean, std)]))

    def forward(self, image):
        """(N, 3, H, W), uint8 or normalised float32 -> logits (N, K); with a temperature softmax too."""
        logits = self.network(image if self.float_input else image.float() * self.scale + self.shift)
        return logits if self.temperature is None else (logits, (logits / self.temperature).softmax(1))


def write_fp32(module, path, opset, size, metadata):
    """One ONNX file with the weights inside. ValueError where the exporter does not give this opset."""
    example = torch.zeros(2, 3, size, size, dtype=torch.float32 if module.float_input else torch.uint8)
    outputs = ["logits"] if module.temperature is None else ["logits", "probabilities"]
    how = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": False}
    if opset < 18:      # the new exporter gives 18 whatever older one is asked for; the old one is deprecated
        how = {"dynamic_axes": {name: {0: "batch"} for name in ("image", *outputs)}}
    try:
        with quiet():
            torch.onnx.export(module, (example,), str(path), input_names=["image"], output_names=outputs,
                              opset_version=opset, dynamo=opset >= 18, verbose=False, **how)
    except OSError:         # the disk's trouble
        raise
    except Exception as error:
        raise ValueError(f"opset {opset}: the exporter failed ({runs.first_line(error)}); 18 is a good "
                         "choice") from None
    model = onnx.load(path)
    given = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if given != opset:
        raise ValueError(f"opset {opset} cannot be had, the exporter gave {given}; 18 is a good choice")
    save(model, path, metadata)


def save(model, path, metadata):
    """Saves without source paths, for the oldest onnxruntime that can run it, with this metadata alone."""
    graph = model.graph
    for item in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer,
                 *model.functions):
        del item.metadata_props[:]
        item.doc_string = ""
    used = {n.domain for item in (graph, *model.functions) for n in item.node} | {""}
    imports = [o for o in model.opset_import if o.domain in used]
    del model.opset_import[:], model.metadata_props[:]
    model.opset_import.extend(imports)
    model.ir_version = onnx.helper.find_min_ir_version_for(imports)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


def sha256_in(path):
    """That of the weights in a file's metadata; None where it says none, or is no ONNX file."""
    try:
        return {p.key: p.value for p in onnx.load(path).metadata_props}.get("weights_sha256")
    except Exception:       # protobuf's own types
        return None


def write_fp16(source, path, metadata):
    """Weights and arithmetic in float16; input and outputs stay as they are."""
    with quiet():
        model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True)
        OnnxModel.graph_topological_sort(model.graph)       # a cast of a float input stands at its end
        save(model, path, metadata)


class Reader(list):
    """The calibration's batches, which the quantizer asks for one after the other."""

    def set_range(self, start_index, end_index):
        self.rest = iter(self[start_index:end_index])

    def get_next(self):
        return next(self.rest, None)


def write_int8(source, path, metadata, student, images, flags):
    """Static quantization, QDQ: int8 weights for each channel, 8-bit activations whose ranges `images` give.

    Weights take 7 bits, -64 to 64: x86 processors without VNNI add two uint8 x int8 products in 16 bits,
    which 2 x 255 x 64 fits. The first convolution, whose input is already 8-bit, stays in float32.
    --symmetric: weights of 8 bits, int8 activations, and all zero points 0.
    """
    symmetric, ends = flags["symmetric"], flags["exclude_first_last"]
    kind = quantization.QuantType
    batches = Reader({"image": student.feed(x)} for x in images.split(min(64, student.batch)))
    prepared = path.with_name("prepared.onnx")
    with quiet():
        quantization.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        layers = [i for i, n in enumerate(nodes) if n.op_type in ("Conv", "Gemm", "MatMul")]
        excluded = [n.name for i, n in enumerate(nodes) if n.op_type in ("Softmax", "Div")
                    or i < layers[0]            # normalisation
                    or i == layers[0] and (ends or not symmetric) or i == layers[-1] and ends]
        quantization.quantize_static(
            str(prepared), str(path), batches, quant_format=quantization.QuantFormat.QDQ,
            activation_type=kind.QInt8 if symmetric else kind.QUInt8, weight_type=kind.QInt8,
            per_channel=True, reduce_range=not symmetric, nodes_to_exclude=excluded,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],    # 256 levels have ties
                           "CalibStridedMinMax": 1,     # batch by batch, or all images' activations are held
                           "ActivationSymmetric": symmetric})
    prepared.unlink()
    model = onnx.load(path)
    shift = student.logits(images, load(source)) - student.logits(images, load(path))
    correct_bias(model, shift.mean(0).numpy())
    save(model, path, metadata)


def correct_bias(model, shift):
    """Adds what quantization takes from the mean logits (K,) to the classifier's bias: most of its error."""
    made = {n.output[0]: n for n in model.graph.node}
    layer = made["logits"]
    if layer.op_type != "Gemm":     # no linear classifier at the end
        return
    if len(layer.input) == 2:       # a bias of zeros is left out
        layer.input.append("bias")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros_like(shift, np.float32), "bias"))
    quantized = made.get(layer.input[2])        # int32 and its scale, or float32
    arrays = {t.name: t for t in model.graph.initializer}
    bias = arrays[quantized.input[0] if quantized else layer.input[2]]
    values = onnx.numpy_helper.to_array(bias)
    if quantized:
        shift = np.round(shift / onnx.numpy_helper.to_array(arrays[quantized.input[1]]))
    bias.CopyFrom(onnx.numpy_helper.from_array((values + shift).astype(values.dtype), bias.name))


@contextmanager
def quiet():
    """The exporter's and the quantizer's remarks are not for the user."""
    with ExitStack() as stack, warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        yield


# ---------------------------------------------------------------- verifying and measuring


def load(path, threads=0, exact=True):
    """A file as a function, images -> logits in NumPy. threads: 0 for all. exact: without the saturation of
    x86 processors that have no VNNI, so that a check has one outcome on all."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"image": images})[0]


def verify(path, precision, student, images, expected, wanted):
    """onnx.checker, then several batch sizes against PyTorch's logits: the report's figures.

    wanted: the share of images that int8 has to put in PyTorch's class in exact arithmetic, the report's
    "agreement"; "agreement_here" is by this processor's own. ValueError, or the checker's and runtime's own.
    """
    def agreement(logits):
        return (logits.argmax(1) == expected[:len(logits)].argmax(1)).double().mean().item()

    onnx.checker.check_model(onnx.load(path), full_check=True)
    exact, some = load(path), images[:1024]
    errors = [(student.logits(images[:n], exact, n) - expected[:n]).abs().max() / expected[:n].abs().max()
              for n in BATCHES]
    logits, error, limit = student.logits(some, exact), torch.stack(errors).max().item(), LIMITS[precision]
    same, here = agreement(logits), agreement(student.logits(some, load(path, exact=False)))
    if not error <= limit:      # nan neither
        raise ValueError(f"relative error {error:.1e} against PyTorch, allowed {limit:.0e}")
    if precision == "int8" and not same >= wanted:
        raise ValueError(f"only {100 * same:.1f} % of {len(some)} images in PyTorch's class, "
                         f"{100 * wanted:.0f} % wanted; {ADVICE}")
    if same - here > 0.005:
        click.echo(f"warning: {path.name}: {100 * same:.1f} % of images in PyTorch's class, {100 * here:.1f} "
                   "% on this processor, whose 16-bit sums saturate: leave --symmetric out")
    return {"error": error, "agreement": same, "agreement_here": here, "compared": len(some)}


def accuracy(logits, targets):
    """Top-1 and top-5, %."""
    hits = (logits.topk(min(5, logits.shape[1])).indices == targets[:, None]).double()
    return {"top1": 100 * hits[:, 0].mean().item(), "top5": 100 * hits.sum(1).mean().item()}


def speeds(student, images, path=None):
    """Of a file or of PyTorch, by threads ("1", "all"): median and 95th percentile (ms) at batch 1, images a
    second at batch 64, and how many calls were timed."""
    def several(x, most, least):
        found, begun = [], time.perf_counter()
        while len(found) < most and (time.perf_counter() - begun < SECONDS or len(found) < least):
            found.append(timeit.timeit(lambda: call(x), number=1))
        return found

    def seconds(x):
        several(x, WARM_UP if len(x) == 1 else 3, 1)
        return several(x, SAMPLES, 3)

    images = images.repeat(-(-64 // len(images)), 1, 1, 1)[:64]
    inputs = student.feed(images) if path else student.pixels.normalise(images).contiguous()
    threads, found = torch.get_num_threads(), {}
    for name, count in (("1", 1), ("all", threads)):
        if found and count == 1:
            found[name] = found["1"]
            continue
        torch.set_num_threads(count)
        call = load(path, count, exact=False) if path else student.network
        with torch.inference_mode():
            one, many = seconds(inputs[:1]), seconds(inputs)
        found[name] = {"median_ms": 1000 * np.median(one), "p95_ms": 1000 * np.percentile(one, 95),
                       "img_s": 64 / np.median(many), "samples": [len(one), len(many)]}
    torch.set_num_threads(threads)
    return found


def table(rows):
    """The report's rows as text, one for each file and one for PyTorch."""
    lines = ["precision       MB   top-1   top-5  agree %  error    "
             "batch 1: median, p95 (ms), 1 thread / all   images/s at 64, 1 thread / all"]
    for name, row in rows.items():
        one, all_ = row["speed"]["1"], row["speed"]["all"]
        top = " ".join(f"{row[k]:7.2f}" if k in row else " " * 7 for k in ("top1", "top5"))
        checked = f"{100 * row['agreement']:7.2f}  {row['error']:.1e}" if "error" in row else " " * 16
        lines.append(f"{name:10s} {row['bytes'] / 1e6:7.2f} {top}  {checked}  {one['median_ms']:9.2f} "
                     f"{one['p95_ms']:6.2f} / {all_['median_ms']:6.2f} {all_['p95_ms']:6.2f} "
                     f"{one['img_s']:18,.0f} / {all_['img_s']:,.0f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the steps, and the command


def export(student, images, flags, folder, out):
    """Writes, verifies and measures each file in `folder`, renames the good ones into `out`, and reports.

    A file that fails costs itself alone. Returns what failed, a line each.
    """
    name, test, size = flags["name"] or student.network.name, images.test, student.pixels.size
    real = test or images.calibration
    sample = real.images if real else F.interpolate(synthetic(128, 7).images, size)     # still uint8
    expected = student.logits(sample)
    top = accuracy(expected, test.targets) if test else {}
    metadata = describe(student, images.classes) | fit(student, images, expected) | top
    rows = {"PyTorch": {"bytes": sum(v.nbytes for v in student.network.state_dict().values()), **top,
                        "speed": speeds(student, sample)}}
    source, done, failures = folder / f"{name}.onnx", [], []
    module = Deployed(student, metadata["temperature"] if flags["probabilities"] else None).eval()
    write_fp32(module, source, flags["opset"], size, metadata | {"precision": "fp32"})

    int8 = images.calibration if flags["int8"] is None else flags["int8"]
    for precision in ["fp32"] + ["fp16"] * flags["fp16"] + ["int8"] * bool(int8):
        path = source if precision == "fp32" else folder / f"{name}.{precision}.onnx"
        facts = metadata | {"precision": precision} | (how_quantized(flags) if precision == "int8" else {})
        try:
            if precision == "fp16":
                write_fp16(source, path, facts)
            elif precision == "int8":
                write_int8(source, path, facts, student, images.calibration.images, flags)
            row = verify(path, precision, student, sample[:1024], expected[:1024], flags["agreement"])
        except Exception as error:      # the converters', the checker's and the runtime's own types
            failures.append(f"{path.name} was not written: {runs.first_line(error)}")
            continue
        if test:
            row |= (top := accuracy(student.logits(sample, load(path)), test.targets))
            save(onnx.load(path), path, facts | top)
            if (lost := metadata["top1"] - row["top1"]) > 1:
                click.echo(f"warning: {path.name} loses {lost:.2f} points; {ADVICE}")
        row |= {"bytes": path.stat().st_size, "speed": speeds(student, sample, path), "file": path.name}
        rows[precision] = row
        done.append(path)
    if not done:
        return failures

    facts = runs.collect_facts(torch.device("cpu")) | {
        "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    report = {"files": rows, "failed": failures, "metadata": metadata, "warm_up_at_most": WARM_UP,
              "batches_verified": BATCHES, "facts": facts}
    done.append(folder / f"{name}.json")
    done[-1].write_text(json.dumps(runs.rounded(report), indent=2))
    for path in done:
        os.replace(path, out / path.name)
    click.echo(f"{table(rows)}\n{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
               f"onnxruntime {facts['onnxruntime']}; written in {out}: {', '.join(p.name for p in done)}")
    for path in (out / f"{name}{end}.onnx" for end in ("", ".fp16", ".int8")):
        if path.exists() and sha256_in(path) != metadata["weights_sha256"]:
            click.echo(f"notice: {path} is of an earlier export, of other weights: remove it")
    return failures


def how_quantized(flags):
    """int8's choices, for the metadata."""
    bits, activations = (8, "int8") if flags["symmetric"] else (7, "uint8")
    return {"weight_bits": bits, "activations": activations,
            **{k: flags[k] for k in ("symmetric", "calibration", "exclude_first_last")}}


def describe(student, classes):
    """The metadata that say what the network is and takes. classes: where the student does not know them."""
    classes = list(student.classes or classes)
    if len(classes) != student.num_classes:
        classes = [f"class {i}" for i in range(student.num_classes)]
    return {"network": student.network.name, "num_classes": student.num_classes, "classes": classes,
            "input": "normalised float32" if student.float_input else "uint8", **student.pixels._asdict(),
            "size": [student.pixels.size] * 2, "version": runs.VERSION,
            "weights_sha256": weights_sha256(student.network),
            **{k: label(v) if k == "teacher" else v for k, v in student.facts.items() if k in FACTS}}


@contextmanager
def interrupted_by_sigterm():
    """As by Ctrl-C, which removes unfinished files."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:      # not the main thread
        before = None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@click.command(cls=cli.Command, help=__doc__)
@click.option("--checkpoint", type=cli.PATH, required=True, metavar="FILE",
              help="student.pt of a run, or any format.")
@click.option("--student", type=cli.PATH, metavar="NAME",
              help="Its network, FILE.py:NAME too.  [default: as the file says]")
@click.option("--classes", type=cli.PATH, metavar="FILE",
              help="Class names, one a line.  [default: as the file says]")
@click.option("--mean", metavar="R,G,B", help="Its images' mean, in [0, 1].  [default: as the file says]")
@click.option("--std", metavar="R,G,B", help="Their deviation, in [0, 1].  [default: as the file says]")
@click.option("--size", type=click.IntRange(min=8), metavar="PIXELS", help="[default: as the file says]")
@click.option("--out", type=cli.PATH, metavar="DIR",
              help="Folder for the files.  [default: the checkpoint's]")
@click.option("--name", metavar="NAME", help="The files' name.  [default: the network's]")
@click.option("--data-dir", type=cli.PATH, metavar="DIR",
              help="Folder of train/, val/ or a CIFAR, for accuracy, int8 and the temperature.  "
                   "[default: data, if there]")
@click.option("--opset", type=click.IntRange(*OPSETS), default=18, show_default=True)
@click.option("--float-input", is_flag=True, help="Of normalised float32; else uint8, normalised inside.")
@click.option("--probabilities", is_flag=True, help="A second output, softmax(logits / temperature).")
@click.option("--int8/--no-int8", default=None, help="Write the int8 file.  [default: with images]")
@click.option("--fp16/--no-fp16", default=False, help="Write the float16 file.  [default: off]")
@click.option("--calibration", type=click.IntRange(1, 50_000), default=512, show_default=True, metavar="N",
              help="Training images for int8's ranges.")
@click.option("--symmetric", is_flag=True, help="int8 for TensorRT and Arm: zero points 0, 8-bit weights; "
                                                "wrong on x86 without VNNI.")
@click.option("--agreement", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="SHARE",
              help="Of images that int8 must put in PyTorch's class.")
@click.option("--exclude-first-last", is_flag=True, help="int8's first convolution and classifier in float.")
def main(**flags):
    if flags["student"] is not None:
        cli.check_name("--student", flags["student"], [*MODELS, *TORCHVISION])
    if flags["name"] is not None and Path(flags["name"]).name != flags["name"]:
        raise click.UsageError(f"--name {flags['name']}: a name, not a path; --out names the folder")
    torch.manual_seed(0)
    with cli.friendly_errors(), interrupted_by_sigterm():
        student = load_student(flags["checkpoint"], flags["student"], flags["float_input"],
                               **{k: flags[k] for k in ("classes", "mean", "std", "size")})
        images = find_images(student, flags["data_dir"], flags["calibration"])
        if flags["int8"] and not images.calibration:
            raise ValueError("--int8 needs training images to calibrate on: --data-dir names their folder")
        out = Path(flags["out"] or Path(flags["checkpoint"]).parent)
        with runs.disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
                failures = export(student, images, flags, Path(folder), out)
    if failures:
        raise runs.RunError("; ".join(failures))


if __name__ == "__main__":
    main()
