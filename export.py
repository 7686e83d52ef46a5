"""A trained student as ONNX files, which run without PyTorch: written, compared with PyTorch, measured.

\b
  python export.py --checkpoint runs/resnet32x4-resnet8x4-kd-z-seed0/student.pt --data-dir data
  python export.py --checkpoint weights.pt --student nets.py:tiny            a plain state_dict
  python predict.py resnet8x4.int8.onnx photos/                              classifies images with a file

NAME.onnx (float32), NAME.int8.onnx, with --fp16 NAME.fp16.onnx, and a report, NAME.json. Each file holds the
weights and, as metadata, the classes, input, normalisation, accuracy and temperature. A file that does not
compute PyTorch's logits is not kept.
"""

import json
import logging
import math
import os
import signal
import tempfile
import timeit
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import click
import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from onnxruntime.transformers import float16
from onnxruntime.transformers.onnx_model import OnnxModel

import cli
import run as runs
from checkpoints import open_checkpoint, weights_sha256
from data import CIFAR, PAD, Split, cifar_folder, epoch_draws, load_data, load_folders, read_images
from distill import top_k_hits
from models import MODELS
from networks import TORCHVISION
from recipes import label

CENTRE = ((2 * PAD + 1) ** 2 // 2) * 2      # the crop id of the image itself
BATCH = 64
VERIFIED = 1, 2, 7, 64      # batch sizes
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "int8": math.inf}     # largest error, relative to the largest logit
MOST = 5000                 # images that fit the temperature, and of a folder that measure accuracy
SECONDS = 1.0               # of a latency
HISTORY = "method", "zscore", "feature", "entropy_temp", "epochs", "seed", "data"   # for metadata
ADVICE = "try --exclude-first-last, --calibration 2048 or a lower --agreement"


# ---------------------------------------------------------------- the student


class InferenceModel(torch.nn.Module):
    """A trained student as its files compute it: with the normalisation, and with a temperature softmax.

    classes: their names, or None. float_input: the input is normalised float32, not uint8.
    """

    def __init__(self, network, metadata, preprocessing, classes=None, float_input=False):
        super().__init__()
        self.network = network
        self.metadata = metadata
        self.preprocessing = preprocessing
        self.classes = classes
        self.float_input = float_input
        self.temperature = None
        statistics = torch.tensor([preprocessing.mean, preprocessing.std], dtype=torch.double)
        mean, std = statistics.view(2, 3, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, image):
        """(N, 3, H, W) uint8 or normalised float32 -> logits (N, K), or (logits, probabilities)."""
        if not self.float_input:
            image = image.float() * self.scale + self.shift
        logits = self.network(image)
        if self.temperature is None:
            return logits
        return logits, (logits / self.temperature).softmax(1)

    def feed(self, images):
        """uint8 images -> the input of the files, in NumPy."""
        if self.float_input:
            images = self.preprocessing.normalise(images).contiguous()
        return images.numpy()

    @torch.no_grad()
    def logits(self, images, call=None):
        """float64 (N, K) of uint8 images, by the network in PyTorch or by a file's `call` (see `load`)."""
        found = []
        for part in images.split(BATCH):
            if call is None:
                part = self.preprocessing.normalise(part)
                found.append(self.network(part))
            else:
                part = self.feed(part)
                found.append(torch.from_numpy(call(part)))
        return torch.cat(found).double()


def load_student(path, name=None, float_input=False, classes=None, mean=None, std=None, size=None):
    """The InferenceModel of a checkpoint. ValueError, one line, for what it is not.

    classes (names), mean, std, size: instead of the checkpoint's.
    """
    network, metadata = open_checkpoint(path, name, size=size)
    usual = metadata["preprocessing"]
    preprocessing = usual._replace(
        mean=mean or usual.mean,
        std=std or usual.std)
    if not (metadata["preprocessing_known"] or mean and std):
        click.echo(f"notice: {path} does not contain its images' mean and standard deviation; taken are "
                   f"{preprocessing.mean}, {preprocessing.std}, at {preprocessing.size} pixels "
                   "(--mean, --std, --size; --classes names the classes)")
    names = classes or metadata.get("classes")
    number = metadata["num_classes"]
    if names and len(names) != number:
        raise ValueError(f"--classes has {len(names)} names, one a line; the network {number}")
    return InferenceModel(network, metadata, preprocessing, names, float_input).eval()


def three_numbers(text):
    """A flag's "R,G,B" -> three numbers in [0, 1]."""
    numbers = tuple(float(x) for x in text.split(","))
    if len(numbers) != 3 or not all(0 <= x <= 1 for x in numbers):
        raise click.BadParameter(f"{text}: three numbers in [0, 1], of pixels in [0, 1], as 0.5,0.5,0.4")
    return numbers


# ---------------------------------------------------------------- its images


class Images(NamedTuple):
    """A student's images as Splits, None where there are none."""
    calibration: Split = None   # training images, for the ranges of int8
    temperature: Split = None   # images that training did not see
    test: Split = None
    source: str = ""            # of the temperature's images
    classes: list = ()          # their names


def find_images(student, data_dir, count):
    """The Images of the student's own data set, where they are in `data_dir`. count: for int8.

    Of a plain state_dict the number of classes tells CIFAR.
    """
    root = Path(data_dir)
    metadata = student.metadata
    kept = {k: metadata.get(k) or 0 for k in ("val_from_train", "train_images")}
    usual = {100: "cifar100", 10: "cifar10"}.get(metadata["num_classes"])
    name = metadata.get("data", usual)
    there = name == "synthetic" or name in CIFAR and cifar_folder(name, root).is_dir()
    if there and student.preprocessing.resize == 32:
        data = load_data(name, root, "cpu", download=False, **kept)
        return choose_arrays(data, metadata, count)
    parts = [part for part in ("train", "val") if (root / part).is_dir()]
    if parts:
        return choose_files(root, parts, kept, student, count)
    return Images()


def choose_arrays(data, metadata, count):
    """The Images of a Data. The temperature's: held out, else those that training never drew uncropped."""
    order, _ = epoch_draws(0, 0, len(data.train.targets))
    fit, source = data.eval, "held-out images"
    if data.eval_name == "test":
        never = undrawn(metadata, order)[:MOST]
        fit = data.train.pick(never) if len(never) else None
        source = "training images that training never drew uncropped"
    calibration = data.train.pick(order[:count])
    return Images(calibration, fit, data.test, source, data.classes)


def undrawn(metadata, order):
    """Those of the training images `order` that a run never drew uncropped; none of a plain state_dict."""
    if not {"data", "epochs", "seed"} <= metadata.keys():
        return order[:0]
    never = np.full(len(order), True)
    for epoch in range(metadata["epochs"]):
        permutation, crop_ids = epoch_draws(metadata["seed"], epoch, len(order))
        never[permutation[crop_ids == CENTRE]] = False
    return order[never[order]]


def choose_files(root, parts, kept, student, count):
    """The Images of train/ and val/, or one of them. The temperature's: held out, else every second of val/.

    ValueError: other classes than the student's.
    """
    if "train" not in parts:
        kept = {}
    folders = load_folders(root, parts=parts, **kept)
    found, number = folders.classes, student.metadata["num_classes"]
    trained = student.metadata.get("classes", found)        # --classes may give them other names
    if len(found) != number or found != trained:
        raise ValueError(f"{root} has {len(found)} classes ({', '.join(found[:3])}, ...), not "
                         f"the student's {number} ({', '.join(trained[:3])}, ...)")
    order, _ = epoch_draws(0, 0, len(folders.train))
    calibration = [folders.train[i] for i in order[:count]]
    fit, test = folders.eval[::2], folders.eval[1::2]
    if folders.eval_name == "held-out" and "val" in parts:
        fit = folders.eval
        test = load_folders(root, parts=("val",)).eval
    splits = [read_split(x, student.preprocessing) for x in (calibration, fit, test)]
    return Images(*splits, f"{folders.eval_name} images", found)


def read_split(samples, preprocessing):
    """A Split of [(path, target)], at most MOST of them, spread evenly."""
    if not samples:
        return None
    step = math.ceil(len(samples) / MOST)
    some = samples[::step]
    targets = torch.tensor([target for _, target in some])
    return Split(read_images(some, preprocessing.size, preprocessing.resize), targets)


# ---------------------------------------------------------------- probabilities


def fit_temperature(logits, targets):
    """The T in [1e-3, 1e3] that minimises the cross-entropy of softmax(logits / T) (Guo et al. 2017, 4.2).

    (N, K), (N,) -> a number. It is convex in 1/T, so its derivative is bisected: the mean over
    softmax(logits / T) of a logit less the target's.
    """
    above = logits - logits.gather(1, targets[:, None])
    log_scale, step = 0.0, math.log(1e3)        # of 1/T
    for _ in range(60):
        p = (logits * math.exp(log_scale)).softmax(1)
        slope = (p * above).sum(1).mean()
        step /= 2
        log_scale -= math.copysign(step, slope)
    return math.exp(-log_scale)


def calibration_of(logits, targets, temperature, bins=15):
    """Negative log-likelihood and expected calibration error (Guo et al. 2017, eq. 3; equal bins)."""
    log_p = (logits / temperature).log_softmax(1)
    confidence, predicted = log_p.exp().max(1)
    gaps = (predicted == targets).double() - confidence
    indices = (confidence * bins).long()
    indices = indices.clamp(max=bins - 1)
    sums = torch.bincount(indices, gaps)
    ece = sums.abs().sum() / len(targets)
    nll = torch.nn.functional.nll_loss(log_p, targets)
    return {"nll": nll.item(), "ece": ece.item()}


def fit(student, images, expected):
    """The metadata of the temperature, which is fitted here. expected: logits of the test images, if any."""
    if images.temperature is None:
        return {"temperature": 1.0, "temperature_fitted_on": "nothing"}
    fitted, targets = images.temperature
    temperature = fit_temperature(student.logits(fitted), targets)
    source = f"{len(targets)} {images.source}"
    found = {"temperature": temperature, "temperature_fitted_on": source}
    click.echo(f"temperature {temperature:.4g}, fitted on {source}")
    if images.test:
        targets = images.test.targets
        before = calibration_of(expected, targets, 1)
        after = calibration_of(expected, targets, temperature)
        found["calibration"] = {"before": before, "after": after}
        click.echo(f"on {len(expected)} test images: expected calibration error {before['ece']:.4f} -> "
                   f"{after['ece']:.4f}, negative log-likelihood {before['nll']:.4f} -> {after['nll']:.4f}")
        if after["nll"] > before["nll"]:
            click.echo("warning: the temperature makes it worse: train with --val-from-train, which holds "
                       "images out for it")
    return found


# ---------------------------------------------------------------- writing


def write_fp32(student, opset, path):
    """One ONNX file with the weights inside, for any number of images."""
    size = student.preprocessing.size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    example = torch.from_numpy(student.feed(images))
    outputs = ["logits"]
    if student.temperature is not None:
        outputs.append("probabilities")
    torch.onnx.export(
        student, (example,), str(path),
        input_names=["image"],
        output_names=outputs,
        dynamic_axes={name: {0: "batch"} for name in ("image", *outputs)},
        opset_version=opset,
        dynamo=opset >= 18,         # the new exporter gives no older one
        external_data=False,
        verbose=False)


def write_fp16(source, path):
    """Weights and arithmetic in float16; input and outputs stay as they are."""
    model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True)
    OnnxModel.graph_topological_sort(model.graph)       # the cast of a float input comes last in it
    onnx.save(model, path)


def write_int8(source, student, images, symmetric, exclude_first_last, path):
    """Static quantization, QDQ: int8 weights by channel, 8-bit activations in ranges that `images` give.

    Weights take 7 bits, -64 to 64: x86 processors without VNNI add two uint8 x int8 products in 16 bits,
    which 2 x 255 x 64 fits. The first convolution, of input that is 8-bit already, stays in float32.
    symmetric: weights of 8 bits, int8 activations, zero points 0.
    """
    prepared = path.with_name("prepared.onnx")
    kind = quantization.QuantType
    quantization.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    nodes = onnx.load(prepared).graph.node
    layers = [i for i, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul")]
    first, last = layers[0], layers[-1]
    if exclude_first_last or not symmetric:
        first += 1
    if not exclude_first_last:
        last += 1
    in_float = [*nodes[:first], *nodes[last:]]      # normalisation and probabilities too
    batches = ({"image": student.feed(part)} for part in images.split(BATCH))
    quantization.quantize_static(
        str(prepared), str(path),
        SimpleNamespace(get_next=lambda: next(batches, None)),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not symmetric,
        nodes_to_exclude=[node.name for node in in_float],
        activation_type=kind.QInt8 if symmetric else kind.QUInt8,
        weight_type=kind.QInt8,
        extra_options={"ActivationSymmetric": symmetric,        # and logits in float: 256 levels have ties
                       "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]})
    before = student.logits(images, load(source))
    after = student.logits(images, load(path))
    lost = (before - after).mean(0)
    add_to_logits(path, lost.float().numpy())


def add_to_logits(path, lost):
    """Adds (K,) to a file's logits: what quantization takes from their mean is most of its error."""
    model = onnx.load(path)
    nodes = model.graph.node
    last = next(i for i, node in enumerate(nodes) if node.output[0] == "logits")
    nodes[last].output[0] = "quantized_logits"
    add = onnx.helper.make_node("Add", ["quantized_logits", "correction"], ["logits"])
    nodes.insert(last + 1, add)
    correction = onnx.numpy_helper.from_array(lost, "correction")
    model.graph.initializer.append(correction)
    onnx.save(model, path)


def finish(path, metadata):
    """Saves a file with this metadata, without source paths, for the oldest onnxruntime that can run it."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("metadata_props")       # where in the source it is from
    standard = [entry for entry in model.opset_import if entry.domain == ""]
    del model.opset_import[:]       # the quantizer adds others, which it does not use
    model.opset_import.extend(standard)
    model.ir_version = onnx.helper.find_min_ir_version_for(standard)
    texts = {}
    for key, value in metadata.items():
        texts[key] = value if isinstance(value, str) else json.dumps(value)
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


# ---------------------------------------------------------------- verifying and measuring


def load(path, threads=0):
    """A file as a function, images -> logits in NumPy, by so many threads.

    0: all, and without the saturation of x86 processors that have no VNNI, so that checks are equal on all.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if threads == 0:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"image": images})[0]


def verify(path, student, images, expected, limit):
    """onnx.checker, then several batch sizes against PyTorch's logits. Returns the error of the largest.

    Errors are relative to the largest logit. ValueError above `limit`; the checker's and the runtime's own.
    """
    onnx.checker.check_model(onnx.load(path), full_check=True)
    call = load(path)
    for n in VERIFIED:
        right = expected[:n]
        logits = torch.from_numpy(call(student.feed(images[:n])))
        difference = (logits - right).abs().max()
        error = (difference / right.abs().max()).item()
        if not error <= limit:      # NaN neither
            raise ValueError(f"relative error {error:.1e} against PyTorch, allowed {limit:.0e}")
    return error


def accuracy(logits, test):
    """Top-1 and top-5, %; nothing without test images."""
    if test is None:
        return {}
    hits = top_k_hits(logits, test.targets)
    top1, top5 = (100 * hits.double() / len(logits)).tolist()
    return {"top1": top1, "top5": top5}


def seconds(call, inputs):
    """Times of single calls, after three to warm up."""
    times = []
    while len(times) < 6 or sum(times) < SECONDS:
        times.append(timeit.timeit(lambda: call(inputs), number=1))
    return times[3:]


def speeds(path, student, images):
    """By threads: ms of one image (median and 95th percentile), images a second in batches."""
    inputs = student.feed(images[:1]).repeat(BATCH, 0)
    found = {}
    for name, threads in (("1", 1), ("all", torch.get_num_threads())):
        call = load(path, threads)
        one = seconds(call, inputs[:1])
        batch = np.median(seconds(call, inputs))
        median, p95 = 1000 * np.percentile(one, (50, 95))
        found[name] = {"median_ms": median, "p95_ms": p95, "img_s": BATCH / batch}
    return found


def table(rows):
    """The report's rows as text, one for each file."""
    lines = ["precision       MB   top-1   top-5  agree %    error  "
             "one image: median, p95 (ms), 1 thread / all    images/s: 1 thread / all"]
    for name, row in rows.items():
        one, every = row["speed"]["1"], row["speed"]["all"]
        lines.append(
            f"{name:10s} {row['bytes'] / 1e6:7.2f} "
            f"{row.get('top1', math.nan):7.2f} {row.get('top5', math.nan):7.2f} "
            f"{100 * row['agreement']:8.2f} {row['error']:8.1e} "
            f"{one['median_ms']:14.2f} {one['p95_ms']:6.2f} / "
            f"{every['median_ms']:6.2f} {every['p95_ms']:6.2f} "
            f"{one['img_s']:18,.0f} / {every['img_s']:,.0f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the steps, and the command


def describe(student, classes):
    """The metadata that say what the network is and takes. classes: where the student has none."""
    metadata = student.metadata
    number = metadata["num_classes"]
    numbered = [f"class {i}" for i in range(number)]
    history = {k: metadata[k] for k in HISTORY if metadata.get(k) is not None}
    return history | student.preprocessing._asdict() | {
        "teacher": label(metadata.get("teacher") or "none"),
        "network": student.network.name,
        "num_classes": number,
        "classes": student.classes or classes or numbered,
        "input": "normalised float32" if student.float_input else "uint8",
        "size": [student.preprocessing.size] * 2,
        "version": runs.VERSION,
        "weights_sha256": weights_sha256(student.network)}


def export(student, images, flags, folder, out):
    """Writes, verifies and measures each file in `folder`, renames the good ones into `out`, and reports.

    A failed fp16 or int8 file costs itself only. RunError at the end: what failed.
    """
    test = images.test
    size = student.preprocessing.size
    noise = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
    sample = (test or images.calibration or Split(noise, None)).images
    expected = student.logits(sample)
    metadata = describe(student, images.classes)
    metadata |= fit(student, images, expected)
    metadata |= accuracy(expected, test)
    if flags["probabilities"]:
        student.temperature = metadata["temperature"]
    source = folder / f"{student.network.name}.onnx"
    rows, failures = {}, []
    for precision, write in writers(student, images, flags, source).items():
        path = source if precision == "fp32" else source.with_suffix(f".{precision}.onnx")
        try:
            write(path)
            logits = student.logits(sample, load(path))
            same = (logits.argmax(1) == expected.argmax(1)).double()
            row = {"precision": precision, "agreement": same.mean().item(), "compared": len(same)}
            row |= accuracy(logits, test)
            finish(path, metadata | row)
            row["error"] = verify(path, student, sample, expected, LIMITS[precision])
            if precision == "int8" and row["agreement"] < flags["agreement"]:
                raise ValueError(f"only {row['agreement']:.1%} of {len(same)} images in PyTorch's class, "
                                 f"{flags['agreement']:.0%} wanted; {ADVICE}")
        except Exception as error:      # the converters', the checker's and the runtime's own types
            failures.append(f"{path.name} was not written: {runs.first_line(error)}")
            if precision == "fp32":
                break
            continue
        if test and row["top1"] < metadata["top1"] - 1:
            click.echo(f"warning: {path.name} loses {metadata['top1'] - row['top1']:.2f} points; {ADVICE}")
        rows[precision] = row | {
            "file": path.name,
            "bytes": path.stat().st_size,
            "speed": speeds(path, student, sample)}
    if rows:
        publish(rows, failures, metadata, folder, out)
    if failures:
        raise runs.RunError("; ".join(failures))


def writers(student, images, flags, source):
    """By precision: what writes its file to a path, from the float32 file `source`."""
    found = {"fp32": partial(write_fp32, student, flags["opset"])}
    if flags["fp16"]:
        found["fp16"] = partial(write_fp16, source)
    if flags["int8"] and images.calibration:
        found["int8"] = partial(write_int8, source, student, images.calibration.images,
                                flags["symmetric"], flags["exclude_first_last"])
    return found


def publish(rows, failures, metadata, folder, out):
    """Writes the report, prints it, and renames it and the files into `out`."""
    name = metadata["network"]
    facts = runs.collect_facts(torch.device("cpu"))
    facts |= {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    report = {"files": rows, "failed": failures, "metadata": metadata, "facts": facts}
    files = [row["file"] for row in rows.values()]
    files.append(f"{name}.json")
    text = json.dumps(runs.rounded(report), indent=2)
    (folder / files[-1]).write_text(text)
    for file in files:
        os.replace(folder / file, out / file)
    click.echo(f"{table(rows)}\n{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
               f"onnxruntime {facts['onnxruntime']}; written in {out}: {', '.join(files)}")
    older = [path.name for path in out.glob(f"{name}.*onnx") if path.name not in files]
    if older:
        click.echo(f"notice: of an earlier export are {', '.join(older)}")


option = partial(click.option, show_default=True)


@click.command(cls=cli.Command, help=__doc__)
@option("--checkpoint", required=True, type=cli.PATH, help="student.pt of a run, or any format.")
@option("--student", type=cli.PATH, metavar="NAME", help="Its network, FILE.py:NAME too; else the file's.")
@option("--classes", type=cli.UserPath(exists=True, dir_okay=False),
        help="A file of class names, one a line; else the checkpoint's.")
@option("--mean", type=three_numbers, metavar="R,G,B",
        help="Its images' mean, in [0, 1]; else the checkpoint's.")
@option("--std", type=three_numbers, metavar="R,G,B",
        help="Their standard deviation; else the checkpoint's.")
@option("--size", type=cli.Count(8), help="Their height and width, pixels; else the checkpoint's.")
@option("--out", type=cli.PATH, help="Folder for the files; else the checkpoint's.")
@option("--data-dir", type=cli.PATH, default="data",
        help="Folder of train/, val/ or a CIFAR, for accuracy, int8 and the temperature.")
@option("--opset", type=cli.Count(13, 18), default=18)
@option("--float-input", is_flag=True, help="Of normalised float32; else uint8, normalised inside.")
@option("--probabilities", is_flag=True, help="A second output, softmax(logits / temperature).")
@option("--int8/--no-int8", default=True, help="Write the int8 file, where there are images.")
@option("--fp16", is_flag=True, help="Write the float16 file.")
@option("--calibration", type=cli.Count(1, MOST), default=512, help="Training images for int8's ranges.")
@option("--symmetric", is_flag=True,
        help="int8 for TensorRT and Arm: zero points 0, 8-bit weights; wrong on x86 without VNNI.")
@option("--agreement", type=cli.Number(0, 1), default=0.95,
        help="Share of images that int8 must put in PyTorch's class.")
@option("--exclude-first-last", is_flag=True, help="int8's first convolution and classifier in float.")
def main(checkpoint, student, classes, mean, std, size, out, data_dir, float_input, calibration, **flags):
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: unfinished files are removed
    if student is not None:
        cli.check_name("--student", student, [*MODELS, *TORCHVISION])
    warnings.simplefilter("ignore")     # the exporter's and the quantizer's
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    with cli.friendly_errors():
        if classes:
            classes = Path(classes).read_text("utf-8-sig").rstrip("\n").split("\n")
        student = load_student(checkpoint, student, float_input, classes, mean, std, size)
        images = find_images(student, data_dir, calibration)
        missing = [name for name, value in images._asdict().items() if value is None]
        if missing:
            click.echo(f"notice: no images for {', '.join(missing)}: --data-dir names their folder")
        out = Path(out or Path(checkpoint).parent)
        with runs.disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
                export(student, images, flags, Path(folder), out)


if __name__ == "__main__":
    main()
