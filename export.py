"""A trained student as ONNX files that run without PyTorch: verified, quantized, measured.

\b
  python export.py --checkpoint runs/resnet32x4-resnet8x4-kd-z-seed0/student.pt --data-dir data
  python export.py --checkpoint student.pt --student resnet8x4 --no-int8          a bare checkpoint of the field
  python predict.py resnet8x4.int8.onnx photos/                                   classifies with what was written

NAME.onnx (float32), NAME.int8.onnx and, with --fp16, NAME.fp16.onnx, and the report NAME.json. Each file carries its weights
and says what it is in its metadata: classes, input, normalisation, accuracy, temperature. A file whose logits are not
PyTorch's is not kept.
"""

import contextlib
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
import torchvision.models
from onnxruntime import quantization
from torch import nn

import cli
import run as runs
from data import (CIFAR100_CLASSES, IMAGENET_MEAN, IMAGENET_STD, MEAN, PAD, STD, FolderImages, Split, epoch_draws, has_cifar100,
                  load_data, load_folders, normalise, synthetic)
from models import MODELS, class_count, create_model, guess_network, load_weights, weights_sha256
from weights import facts_of, read_checkpoint

CENTRE = ((2 * PAD + 1) ** 2 // 2) * 2          # the view that is the image itself
LIMITS = {"fp32": 1e-4, "fp16": 1e-2}           # largest error allowed, relative to the largest logit
FOLDER_IMAGES = 2000    # of folders of images, for the temperature and for accuracy
BATCHES = (1, 2, 7, 64)
WARM_UP, SAMPLES, SECONDS = 20, 200, 1.0        # of a latency measurement, and the time after which fewer samples do
ADVICE = "try --exclude-first-last, --calibration-method percentile or entropy, --calibration 2048, or accept it with --agreement"
OPSETS = 13, 23         # the oldest that quantizes by channel, and the newest that was tried


class NotVerified(Exception):
    """A file does not compute what PyTorch computes."""


class Deployed(nn.Module):
    """The network with what belongs to it on a device: normalisation before it, softmax after it."""

    def __init__(self, network, float_input=False, temperature=None):
        super().__init__()
        self.network, self.float_input, self.temperature = network, float_input, temperature
        _, _, mean, std = network.input
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std)]).view(1, 3, 1, 1))

    def forward(self, image):
        """image (N, 3, H, W), uint8, or normalised float32 -> logits (N, K), and with a temperature probabilities too."""
        logits = self.network(image if self.float_input else image.float() * self.scale + self.shift)
        return logits if self.temperature is None else (logits, (logits / self.temperature).softmax(1))


class Input(NamedTuple):
    """What a network takes; other sizes are resized, the shorter side to `resize`, and the centre is cut out."""
    size: int = 32
    resize: int = 32
    mean: tuple = MEAN
    std: tuple = STD


class Images(NamedTuple):
    calibration: Split | None       # training images, for the ranges of int8
    held_out: Split | None          # training images for the temperature, at a position that training did not show
    held_out_name: str
    test: Split | None


# ---------------------------------------------------------------- the student and its images


def load_student(path, name):
    """(network in evaluation mode, what the file says about it)."""
    content = read_checkpoint(path, name)
    facts = facts_of(content)
    name = name or facts.get("student") or guess_network(content)
    if name not in MODELS and name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"{path} does not say which network it holds, and none has its keys: name it with --student")
    build = create_model if name in MODELS else torchvision.models.get_model
    classes = class_count(content, build(name, num_classes=100)) or 100
    network = build(name, num_classes=classes)
    network.name = name
    load_weights(network, path)
    small = name in MODELS and name != "MobileNetV1" and "size" not in facts       # which train_imagenet.py's students say
    size = facts.get("size", 224)
    network.input = Input() if small else Input(size, round(size * 8 / 7), IMAGENET_MEAN, IMAGENET_STD)
    network.classes, network.num_classes = facts.get("classes"), classes
    known = ("student", "teacher", "method", "zscore", "base_temp", "epochs", "seed", "data", "train_images", "val_from_train",
             "top1", "top5")
    return network.eval(), {k: facts[k] for k in known if isinstance(facts.get(k), (str, int, float, bool))} | {"student": name}


def find_folders(network, facts, data_dir, count):
    """`find_images` for folders of images: centre views, which no random crop showed, and every so many-th evaluation image."""
    if data_dir is None:
        return Images(None, None, "", None), "no --data-dir: accuracy is not measured, int8 is not calibrated, the temperature is not fitted"
    folders = load_folders(data_dir, facts.get("val_from_train", 0))
    if network.classes not in (None, folders.classes):
        raise ValueError(f"{data_dir} has other classes than the student was trained on")

    def read(samples, order):
        views, _, targets, bad = zip(*(FolderImages(samples, network.input.size)[i, 0] for i in order))
        if any(bad):
            raise ValueError(f"{samples[next(b for b in bad if b)[0]][0]} cannot be decoded")
        return Split(torch.stack([v[0] for v in views]), torch.tensor(targets))

    order = epoch_draws(0, 0, len(folders.train))[0].tolist()
    seen = read(folders.train, order[:max(count, FOLDER_IMAGES)])
    calibration, held_out, test = Split(*(x[:count] for x in seen)), Split(*(x[:FOLDER_IMAGES] for x in seen)), folders.eval
    name, what = f"{len(held_out.targets)} training images' centre views", "evaluation images"
    if folders.eval_name == "held-out":     # half of them for the temperature, half for accuracy
        fit, test = folders.eval[::2][:FOLDER_IMAGES], folders.eval[1::2]
        held_out = read(fit, range(len(fit)))
        name, what = f"{len(held_out.targets)} held-out training images", "other held-out training images"
    chosen = range(0, len(test), max(1, -(-len(test) // FOLDER_IMAGES)))
    line = f"accuracy on {len(chosen)} of {len(test)} {what}" if len(chosen) < len(test) or test is not folders.eval else None
    return Images(calibration, held_out, name, read(test, chosen) if test else None), line


def find_images(network, facts, data_dir, count):
    """The images of the set that the student was trained on, where they are at hand; never downloaded. (Images, line to print)"""
    if network.input != Input():
        return find_folders(network, facts, data_dir, count)
    name, folder = facts.get("data", "cifar100"), data_dir or "data"
    if network.num_classes != 100:
        if data_dir:
            raise ValueError(f"the student has {network.num_classes} classes, which are not CIFAR-100's: leave --data-dir out")
        return Images(None, None, "", None), (f"the student has {network.num_classes} classes, which are not CIFAR-100's: accuracy is not "
                                              "measured, int8 is not calibrated, the temperature is not fitted")
    if name == "cifar100" and not has_cifar100(folder):
        if data_dir:
            raise ValueError(f"no CIFAR-100 in {folder}: --data-dir names the folder that holds cifar-100-python")
        return Images(None, None, "", None), ("no CIFAR-100 in data/ and no --data-dir: accuracy is not measured, int8 is not "
                                              "calibrated, the temperature is not fitted")
    data = load_data(name, folder, "cpu", train_images=facts.get("train_images"), val_from_train=facts.get("val_from_train", 0), download=False)
    order = torch.from_numpy(epoch_draws(0, 0, len(data.train.targets))[0])
    calibration = Split(*(x[order[:count]] for x in data.train))
    if data.eval_name == "val":
        return Images(calibration, data.eval, f"{len(data.eval.targets)} held-out training images", data.test), None
    if not {"epochs", "seed"} <= facts.keys():          # what training drew cannot be known, and T of seen images is too small
        return Images(calibration, None, "", data.test), "the file does not say which views training drew: the temperature is not fitted"
    unseen = torch.ones(len(data.train.targets), dtype=torch.bool)
    for epoch in range(facts["epochs"]):        # the draws are a function of seed and epoch
        at, views = epoch_draws(facts["seed"], epoch, len(unseen))
        unseen[torch.from_numpy(at[views == CENTRE])] = False
    chosen = order[unseen[order]][:5000]
    return Images(calibration, Split(*(x[chosen] for x in data.train)), f"{len(chosen)} training images at a position that "
                  "training did not draw", data.test), None


# ---------------------------------------------------------------- probabilities


def logits_of(network, images):
    """float64 logits (N, K) of uint8 images."""
    with torch.no_grad():
        return torch.cat([network(normalise(x, *network.input[2:])) for x in images.split(batch_for(images))]).double()


def batch_for(images):
    """As many images at once as 500 of CIFAR-100 have pixels."""
    return max(1, 500 * 32**2 // images[0, 0].numel())


def fit_temperature(logits, targets):
    """The T that minimises the cross-entropy of softmax(logits / T): (N, K), (N,) -> a number in [1e-3, 1e3].

    The cross-entropy is convex in 1/T; its derivative, mean over softmax(logits / T) of a logit less the target's, is bisected.
    """
    own = logits.gather(1, targets[:, None])
    low, high = math.log(1e-3), math.log(1e3)           # of 1/T
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((logits * math.exp(middle)).softmax(1) * (logits - own)).sum(1).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def calibration_of(logits, targets, temperature, bins=15):
    """Negative log-likelihood and expected calibration error (Guo et al. 2017; equal bins of confidence)."""
    log_p = (logits / temperature).log_softmax(1)
    confidence, predicted = log_p.exp().max(1)
    hit = (predicted == targets).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add(0, place, hit - confidence)
    return {"nll": F.nll_loss(log_p, targets).item(), "ece": gap.abs().sum().item() / len(targets)}


# ---------------------------------------------------------------- writing


def write_fp32(module, path, opset, size, metadata):
    """Writes one ONNX file with the weights and the metadata inside, and nothing of the machine that made it."""
    example = torch.zeros(2, 3, *size, dtype=torch.float32 if module.float_input else torch.uint8)
    outputs = ["logits"] if module.temperature is None else ["logits", "probabilities"]
    # the new exporter writes 18 whatever older opset is asked for, and with the old one all files would take a deprecated path
    how = ({"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": False} if opset >= 18 else
           {"dynamo": False, "dynamic_axes": {name: {0: "batch"} for name in ("image", *outputs)}})
    try:
        with quiet():
            torch.onnx.export(module, (example,), str(path), input_names=["image"], output_names=outputs, opset_version=opset, verbose=False, **how)
    except OSError:         # the disk's trouble
        raise
    except Exception as error:
        raise ValueError(f"opset {opset}: the exporter failed ({runs.first_line(error)}); 18 is a good choice") from None
    model = onnx.load(path)
    given = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if given != opset:
        raise ValueError(f"opset {opset} cannot be had, the exporter gave {given}; 18 is a good choice")
    save(model, path, metadata)


def save(model, path, metadata):
    """Saves without source paths, for the oldest onnxruntime that can run it, with the metadata in place of what was there."""
    for part in [model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output,
                 *model.graph.initializer, *model.functions]:
        del part.metadata_props[:]
        part.doc_string = ""
    used = {n.domain for part in [model.graph, *model.functions] for n in part.node} | {""}
    imports = [o for o in model.opset_import if o.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    model.ir_version = onnx.helper.find_min_ir_version_for(imports)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    onnx.save(model, path)


def write_fp16(source, path, metadata):
    """Weights and arithmetic in float16; input and outputs stay as they are."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    with quiet():
        save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path, metadata)


class Reader(quantization.CalibrationDataReader):
    """Batches of images for the quantizer, which may ask for some at a time."""

    def __init__(self, images, feed):
        self.batches, self.feed = images.split(min(64, batch_for(images))), feed
        self.set_range(0, len(self))

    def __len__(self):
        return len(self.batches)

    def set_range(self, start_index, end_index):
        self.rest = iter(self.batches[start_index:end_index])

    def get_next(self):
        batch = next(self.rest, None)
        return None if batch is None else {"image": self.feed(batch).numpy()}


def write_int8(source, path, metadata, images, *, feed, method, activations, full_range, symmetric, exclude_first_last):
    """Static quantization, QDQ: int8 weights for each channel, 8-bit activations whose ranges `images` give.

    Weights take 7 bits, -64 to 64, unless full_range: x86 processors without VNNI add two uint8 x int8 products in 16 bits, which
    2 x 255 x 64 fits. The first convolution, whose input has been rounded to a byte once already, then stays in float32.
    symmetric: int8 activations too, and all zero points 0.
    """
    method = {"minmax": quantization.CalibrationMethod.MinMax, "entropy": quantization.CalibrationMethod.Entropy,
              "percentile": quantization.CalibrationMethod.Percentile}[method]
    options = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"], "ActivationSymmetric": symmetric}    # logits of 256 levels have ties
    if method != quantization.CalibrationMethod.MinMax:
        options["CalibStridedMinMax"] = 1       # or the activations of all images are held
    prepared = path.with_name("prepared.onnx")
    with quiet():
        quantization.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        layers = [n.name for n in nodes if n.op_type in ("Conv", "Gemm", "MatMul")]
        excluded = [n.name for n in nodes[:next(i for i, n in enumerate(nodes) if n.op_type == "Conv")]]     # normalisation
        excluded += [n.name for n in nodes if n.op_type in ("Softmax", "Div")]
        excluded += layers[:1] if exclude_first_last or not full_range else []
        excluded += layers[-1:] if exclude_first_last else []
        quantization.quantize_static(
            str(prepared), str(path), Reader(images, feed), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            reduce_range=not full_range, weight_type=quantization.QuantType.QInt8, nodes_to_exclude=excluded, calibrate_method=method,
            activation_type=quantization.QuantType.QUInt8 if activations == "uint8" else quantization.QuantType.QInt8, extra_options=options)
    prepared.unlink()
    model = onnx.load(path)
    shift = sum((run_all(session(source), x, feed) - run_all(session(path), x, feed)).sum(0) for x in images.split(512)) / len(images)
    correct_bias(model, shift.numpy())
    save(model, path, metadata)


def correct_bias(model, shift):
    """Adds `shift` (K,), what quantization takes from the mean logits, to the classifier's bias: most of a small network's error."""
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


@contextlib.contextmanager
def quiet():
    """The exporter's and the quantizer's remarks are not for the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ---------------------------------------------------------------- verifying and measuring


def session(path, threads=0, exact=True):
    """exact: without the saturation of x86 processors that have no VNNI, so that a check has one outcome on all; else as users get it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads      # 0: all
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_all(network, images, feed, batch=None):
    """The logits of an onnxruntime session for uint8 images, as a float64 tensor. feed: uint8 -> the file's input."""
    return torch.cat([torch.from_numpy(network.run(["logits"], {"image": feed(x).numpy()})[0]).double()
                      for x in images.split(batch or batch_for(images))])


def verify(path, precision, images, expected, feed, agreement=0.95):
    """onnx.checker, then onnxruntime at several batch sizes against PyTorch's logits; NotVerified, or the report's figures.

    agreement: the share of images in PyTorch's class, in exact arithmetic; agreement_here: by this processor's own.
    """
    try:
        onnx.checker.check_model(onnx.load(path), full_check=True)
        runner = session(path)
        errors = []
        for batch in BATCHES:
            ours = run_all(runner, images[:batch], feed, batch)
            errors.append(((ours - expected[:batch]).abs().max() / expected[:batch].abs().max()).item())
        same, here = ((run_all(x, images, feed).argmax(1) == expected.argmax(1)).double().mean().item() for x in (runner, session(path, exact=False)))
    except Exception as error:      # onnx's and onnxruntime's own types
        raise NotVerified(runs.first_line(error)) from None
    if not max(errors) <= LIMITS.get(precision, math.inf):
        raise NotVerified(f"relative error {max(errors):.1e} against PyTorch, allowed {LIMITS[precision]:.0e}")
    if precision == "int8" and not same >= agreement:
        raise NotVerified(f"only {100 * same:.1f} % of {len(images)} images in PyTorch's class, {100 * agreement:.0f} % wanted; {ADVICE}")
    return {"error": max(errors), "agreement": same, "agreement_here": here, "compared": len(images)}


def accuracy(logits, targets):
    hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    return {"top1": 100 * hits[:, 0].double().mean().item(), "top5": 100 * hits.any(1).double().mean().item()}


def latency(call, one, many):
    """Median and 95th percentile (ms) at batch 1, and images per second at batch 64; `samples` of each."""
    def times(x):
        for _ in range(WARM_UP if len(x) == 1 else 3):
            call(x)
        found, begun = [], time.perf_counter()
        while len(found) < SAMPLES and (time.perf_counter() - begun < SECONDS or len(found) < 5):
            before = time.perf_counter()
            call(x)
            found.append(time.perf_counter() - before)
        return found
    single, batch = times(one), times(many)
    return {"median_ms": 1000 * statistics.median(single), "p95_ms": 1000 * statistics.quantiles(single, n=20)[-1],
            "img_s": len(many) / statistics.median(batch), "samples": [len(single), len(batch)]}


def speeds(path, network, images, feed):
    """{"1": ..., "all": ...} latencies of a file, or of the network itself in PyTorch for None."""
    images = images.repeat(-(-64 // len(images)), 1, 1, 1)[:64]
    inputs = normalise(images, *network.input[2:]).contiguous() if path is None else feed(images)
    threads, found = torch.get_num_threads(), {}
    for name, count in (("1", 1), ("all", threads)):
        if path is None:
            torch.set_num_threads(count)
            with torch.inference_mode():
                found[name] = latency(network, inputs[:1], inputs)
        else:
            runner = session(path, count, exact=False)
            found[name] = latency(lambda x: runner.run(["logits"], {"image": x.numpy()}), inputs[:1], inputs)
    torch.set_num_threads(threads)
    return found


def table(rows):
    """The report's rows as text, one for each file and one for PyTorch."""
    lines = ["precision       MB   top-1   top-5  agree %  error    batch 1: median, p95 (ms), 1 thread / all   images/s at 64, 1 thread / all"]
    for name, row in rows.items():
        one, all_ = row["speed"]["1"], row["speed"]["all"]
        top = [f"{row[k]:7.2f}" if row.get(k) is not None else "       " for k in ("top1", "top5")]
        checked = f"{100 * row['agreement']:7.2f}  {row['error']:.1e}" if "error" in row else " " * 16
        lines.append(f"{name:10s} {row['bytes'] / 1e6:7.2f} {' '.join(top)}  {checked}  {one['median_ms']:9.2f} {one['p95_ms']:6.2f} / "
                     f"{all_['median_ms']:6.2f} {all_['p95_ms']:6.2f} {one['img_s']:18,.0f} / {all_['img_s']:,.0f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def describe(network, facts, images, expected, float_input):
    """expected: PyTorch's logits of the test images, or None. (metadata of every file, temperature, lines to print)."""
    size, resize, mean, std = network.input
    classes = network.classes or (list(CIFAR100_CLASSES) if facts.get("data", "cifar100") == "cifar100" and network.input == Input() else [])
    k = expected.shape[1]
    metadata = {"network": facts["student"], "num_classes": k,
                "classes": classes if len(classes) == k else [f"class {i}" for i in range(k)], "size": [size, size], "resize": resize,
                "input": "normalised float32" if float_input else "uint8", "mean": mean, "std": std,
                "weights_sha256": weights_sha256(network), "version": runs.VERSION,
                **{key: facts[key] for key in ("teacher", "method", "zscore", "epochs", "seed", "data") if key in facts}}
    if images.held_out is None or not len(images.held_out.targets):
        return metadata | {"temperature": 1.0, "temperature_fitted_on": "nothing"}, 1.0, []
    temperature = fit_temperature(logits_of(network, images.held_out.images), images.held_out.targets)
    metadata |= {"temperature": temperature, "temperature_fitted_on": images.held_out_name}
    line = f"temperature {temperature:.4g}, fitted on {images.held_out_name}"
    if images.test is None:
        return metadata, temperature, [line]
    before, after = (calibration_of(expected, images.test.targets, t) for t in (1, temperature))
    line += (f"; on the {len(expected)} test images: expected calibration "
            f"error {before['ece']:.4f} -> {after['ece']:.4f}, negative log-likelihood {before['nll']:.4f} -> {after['nll']:.4f}")
    if after["nll"] > before["nll"]:
        line += ("\nwarning: the temperature makes it worse, as the network knows its training images too well: train with "
                 "--val-from-train and export again")
    return metadata | {"calibration": {"before": before, "after": after}}, temperature, [line]


def made(network, count):
    """Made images where none are at hand, uint8."""
    return F.interpolate(synthetic(count, 7).images, network.input.size) if network.input.size != 32 else synthetic(count, 7).images


def feeder(network, float_input):
    """uint8 images -> what the file takes."""
    return (lambda x: normalise(x, *network.input[2:]).contiguous()) if float_input else lambda x: x


def convert(flags, network, facts, images, folder):
    """Writes and checks the files in `folder`. Returns {precision: (file, row of the report)}, metadata and the lines of failures."""
    name, float_input, size = flags["name"] or facts["student"], flags["float_input"], [network.input.size] * 2
    sample, feed = images.test.images if images.test else made(network, 128), feeder(network, float_input)
    expected = logits_of(network, sample)
    metadata, temperature, lines = describe(network, facts, images, expected, float_input)
    for line in lines:
        click.echo(line)
    if images.test:
        metadata |= accuracy(expected, images.test.targets)
    module = Deployed(network, float_input, temperature if flags["probabilities"] else None).eval()
    source = folder / f"{name}.onnx"
    write_fp32(module, source, flags["opset"], size, metadata | {"precision": "fp32"})
    wanted = {"fp32": lambda path: None}
    if flags["fp16"]:
        wanted["fp16"] = lambda path: write_fp16(source, path, metadata | {"precision": "fp16"})
    if flags["int8"] or (flags["int8"] is None and images.calibration):
        wanted["int8"] = lambda path: write_int8(
            source, path, metadata | {"precision": "int8"}, images.calibration.images, feed=feed,
            method=flags["calibration_method"], activations=flags["activations"] or ("int8" if flags["symmetric"] else "uint8"),
            full_range=flags["full_range"] or flags["symmetric"], symmetric=flags["symmetric"], exclude_first_last=flags["exclude_first_last"])

    done, failures = {}, []
    for precision, write in wanted.items():
        path = source if precision == "fp32" else folder / f"{name}.{precision}.onnx"
        try:
            try:
                write(path)
            except Exception as error:      # the converters' own types
                raise NotVerified(runs.first_line(error)) from None
            row = {"bytes": path.stat().st_size, **verify(path, precision, sample[:1024], expected[:1024], feed, flags["agreement"])}
        except NotVerified as error:
            failures.append(f"{path.name} was not written: {error}")
            continue
        if row["agreement"] - row["agreement_here"] > 0.005:
            click.echo(f"warning: {path.name}: {100 * row['agreement']:.1f} % of images in PyTorch's class, but {100 * row['agreement_here']:.1f} % "
                       "on this processor, whose 16-bit sums saturate: leave --full-range out")
        if images.test:
            row |= accuracy(run_all(session(path), images.test.images, feed), images.test.targets)
            model = onnx.load(path)
            save(model, path, {p.key: p.value for p in model.metadata_props} | {k: row[k] for k in ("top1", "top5")})
            if metadata["top1"] - row["top1"] > 1:
                click.echo(f"warning: {path.name} loses {metadata['top1'] - row['top1']:.2f} points; {ADVICE}")
        done[precision] = (path, row)
    return done, metadata, failures


@click.command(cls=cli.Command, help=__doc__)
@click.option("--checkpoint", required=True, metavar="FILE", help="The student: student.pt of a run, or any of the field's formats.")
@click.option("--student", metavar="NAME", help="Its network.  [default: what the file says]")
@click.option("--out", metavar="DIR", help="Folder for the files.  [default: the checkpoint's]")
@click.option("--name", metavar="NAME", help="The files' name.  [default: the network's]")
@click.option("--data-dir", metavar="DIR", help="Folder of cifar-100-python, for accuracy, int8 and the temperature.  [default: data, if there]")
@click.option("--opset", type=click.IntRange(*OPSETS), default=18, show_default=True)
@click.option("--float-input", is_flag=True, help="The input is float32 and normalised already; else uint8, normalised in the graph.")
@click.option("--probabilities", is_flag=True, help="A second output, softmax(logits / temperature).")
@click.option("--int8/--no-int8", default=None, help="Write the int8 file.  [default: if there are images to calibrate on]")
@click.option("--fp16/--no-fp16", default=False, help="Write the float16 file.  [default: off]")
@click.option("--calibration", type=click.IntRange(1, 50_000), default=512, show_default=True, metavar="N", help="Training images for int8's ranges.")
@click.option("--calibration-method", type=cli.Choice(["minmax", "entropy", "percentile"]), default="minmax", show_default=True)
@click.option("--activations", type=cli.Choice(["uint8", "int8"]), help="[default: uint8; int8 with --symmetric]")
@click.option("--full-range", is_flag=True, help="int8 weights of 8 bits, not 7: nearer to float32 with VNNI and on Arm, wrong on x86 without VNNI.")
@click.option("--symmetric", is_flag=True, help="int8 with zero points of 0 and weights of 8 bits, as TensorRT wants it.")
@click.option("--agreement", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="SHARE", help="Of images that int8 must put in PyTorch's class.")
@click.option("--exclude-first-last", is_flag=True, help="Keep the first convolution and the classifier of int8 in float.")
def main(**flags):
    if flags["student"] is not None:
        cli.check_name("--student", flags["student"], [*MODELS, *torchvision.models.list_models(module=torchvision.models)])
    if flags["name"] is not None and Path(flags["name"]).name != flags["name"]:
        raise click.UsageError(f"--name {flags['name']}: a name, not a path; --out names the folder")
    if flags["symmetric"] and flags["activations"] == "uint8":
        raise click.UsageError("--symmetric has int8 activations: leave --activations out")
    torch.manual_seed(0)
    try:
        network, facts = load_student(flags["checkpoint"], flags["student"])
        images, line = find_images(network, facts, flags["data_dir"], flags["calibration"])
        if line:
            click.echo(line)
        if flags["int8"] and not images.calibration:
            raise ValueError("--int8 needs training images to calibrate on: name their folder with --data-dir")
        out = Path(flags["out"] or Path(flags["checkpoint"]).parent)
        with runs.explained(out):
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
                failures = report(flags, network, facts, images, Path(folder), out)
    except ValueError as error:     # the rooms' own, one line each
        raise runs.RunError(str(error)) from None
    if failures:
        raise runs.RunError("; ".join(failures))


def report(flags, network, facts, images, folder, out):
    """Makes the files, moves those that were verified to `out`, and reports on them. Returns the failures."""
    done, metadata, failures = convert(flags, network, facts, images, folder)
    sample, feed = (images.test.images if images.test else made(network, 64))[:64], feeder(network, flags["float_input"])
    rows = {"PyTorch": {"bytes": sum(v.numel() * v.element_size() for v in network.state_dict().values()),
                        **{k: metadata[k] for k in ("top1", "top5") if k in metadata},
                        "speed": speeds(None, network, sample, feed)}}
    for precision, (path, row) in done.items():
        rows[precision] = row | {"speed": speeds(path, network, sample, feed), "file": path.name}
    for path, _ in done.values():
        os.replace(path, out / path.name)
    if not done:
        return failures
    facts = runs.collect_facts(torch.device("cpu"))
    name = flags["name"] or metadata["network"]
    (folder / "report").write_text(json.dumps(runs.rounded({"files": rows, "metadata": metadata, "warm_up": WARM_UP, "batches_verified": BATCHES,
                                                     "facts": facts | {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}}), indent=2))
    os.replace(folder / "report", out / f"{name}.json")
    click.echo(f"{table(rows)}\n{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, onnxruntime "
               f"{onnxruntime.__version__}; written in {out}: " + ", ".join(p.name for p, _ in done.values()) + f", {name}.json")
    return failures


if __name__ == "__main__":
    main()
