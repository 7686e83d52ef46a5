"""The flags that the scripts share, errors of one line, device and precision, progress."""

import ctypes
import difflib
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from recipes import FEATURES, ceiling, suggested_temperature
from run import RunError, first_line


def suggest(name, known):
    """The known names, comma-separated, those most like `name` first."""
    folded = {}
    for k in known:
        folded.setdefault(k.casefold(), []).append(k)
    near = [k for f in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4) for k in folded[f]]
    return ", ".join(near + [k for k in known if k not in near])


def check_name(flag, name, known):
    """A usage error that lists the known names, the nearest first; a name of one's own has a colon."""
    if ":" not in name and name not in known:
        raise click.UsageError(f"{flag} {name}: no such network; known, the nearest first: "
                               f"{suggest(name, known)}; one of your own is FILE.py:NAME")


def check_method(flags, networks):
    """Usage errors of the flags that say what is trained, which click cannot see by itself.

    Takes the teacher from method none. networks: the names that --teacher and --student may have.
    """
    if flags["method"] == "none":
        if flags["zscore"]:
            raise click.UsageError("--zscore needs a method that distils: "
                                   "--method none has no teacher's logits to standardize")
        if not flags["feature"]:
            flags["teacher"] = flags["teacher_checkpoint"] = None
    if flags["feature_weight"] is not None and not flags["feature"]:
        raise click.UsageError("--feature-weight is for --feature NAME, which is not given")
    if flags["entropy_weight"] and flags["method"] in ("none", "dist"):
        raise click.UsageError("--entropy-weight weights the losses of samples, which --method "
                               f"{flags['method']} does not have")
    for flag, *methods in (("alpha", "dkd", "rld"), ("beta", "dkd", "rld", "dist"),
                           ("zscore_relations", "mlkd")):
        if flags[flag] is not None and flags["method"] not in methods:
            raise click.UsageError(f"--{flag.replace('_', '-')} is for --method {', '.join(methods)}, "
                                   f"not {flags['method']}")
    if flags["zscore_relations"] and not flags["zscore"]:
        raise click.UsageError("--zscore-relations needs --zscore")
    for flag in ("base_temp", "kd_weight"):
        if flags[flag] is not None and flags["method"] == "none":
            raise click.UsageError(f"--{flag.replace('_', '-')} is for a method that distils, "
                                   "not for --method none")
    for flag in ("teacher", "student"):
        if flags[flag] is not None:
            check_name(f"--{flag}", flags[flag], networks)
    taught = flags["method"] != "none" or flags["feature"]
    if flags["eval_file"] is None and flags["student"] is None:
        raise click.UsageError("name a --student" + " and a --teacher" * bool(taught)
                               + "; --list shows the pairs")
    if flags["eval_file"] is None and taught and flags["teacher"] is None:
        raise click.UsageError("name a --teacher" + " (or train the student alone: --method none)"
                               * (not flags["feature"]))


GIVEN = ("base_temp", "kd_weight", "ce_weight", "alpha", "beta", "zscore_relations", "feature_weight",
         "epochs", "batch_size", "lr", "weight_decay")


def resolve(flags, found, device):
    """The recipe: the pair's numbers `found`, with the flags given. Returns (recipe, lines to print)."""
    names = {k: flags[k] for k in ("teacher", "student", "method", "zscore")}
    found, lines = dict(found), []
    given = {k: flags[k] for k in GIVEN if flags[k] is not None}
    if not found.pop("known"):
        pair = (f"{names['teacher']} -> {names['student']}" if names["teacher"]
                else f"{names['student']} alone")
        taken = found | given
        lines.append(f"no published recipe for {pair}: taking learning rate {taken['lr']:g}"
                     + (f", base temperature {taken['base_temp']:g}, weight {taken['kd_weight']:g}"
                        if found["base_temp"] else "")
                     + (f", feature weight {taken['feature_weight']:g}" if flags["feature"] else ""))
    usual, batch = found["batch_size"], given.get("batch_size", found["batch_size"])
    if batch != usual and "lr" not in given:
        lines.append(f"warning: the recipe's learning rate {found['lr']:g} is for batches of {usual}; "
                     f"for {batch} give --lr too (linear rule: {found['lr'] * batch / usual:g})")
    return names | found | {
        "full_epochs": found["epochs"], **given, "precision": pick_precision(flags["precision"], device),
        "deterministic": flags["deterministic"], "compile": flags["compile"],
        "val_from_train": flags["val_from_train"], "seed": flags["seed"]}, lines


@contextmanager
def friendly_errors():
    """As one line: a ValueError of this project's modules, a full device, what has no deterministic form."""
    try:
        yield
    except ValueError as error:
        raise RunError(str(error)) from None
    except torch.OutOfMemoryError:
        raise RunError(f"the device's memory is full{gpu_memory()}: take smaller batches (--batch-size, "
                       "--at-once N where there is one), or see what else is on the device") from None
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise RunError(f"--deterministic: {first_line(error).split(',')[0]}: leave the flag out, or take a "
                       "network without that operation") from None


def gpu_memory():
    """What a full GPU's memory is used for, in brackets; "" where there is none."""
    if not torch.cuda.is_available():
        return ""
    (free, total), ours = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    return (f" ({total / 2**30:.1f} GiB, of which this process holds {ours / 2**30:.1f} and others "
            f"{(total - free - ours) / 2**30:.1f})")


def check_classes(recipe, count):
    """A usage error for a method that `count` classes do not allow."""
    if recipe["zscore"] and count == 2:
        raise click.UsageError("--zscore leaves nothing to teach of two classes (Z is +1 and -1 for every "
                               "image, without a gradient): leave it out; KD's own temperature is 4")
    if recipe["method"] == "dkd" and count == 2:
        raise click.UsageError("--method dkd needs three classes: there is nothing beside the target's part")


def check_batch(recipe, images, smallest):
    """A usage error where an epoch has no whole batch, or a method compares images and one is alone.

    smallest: the images that are computed together at least.
    """
    batch = recipe["batch_size"]
    if batch > images:
        raise click.UsageError(f"--batch-size {batch}: there are {images} training images; "
                               "give a smaller one, and a --lr that is smaller in proportion")
    method = (f"--feature {recipe['feature']}" if recipe.get("feature") in ("rkd", "reviewkd") else
              "--method dist" if recipe["method"] == "dist" else None)
    if method and smallest == 1:
        raise click.UsageError(f"{method} compares images, and of {images} in batches of {batch} one is "
                               "alone: give another --batch-size (or --at-once, where there is one)")


def temperature_line(recipe, count):
    """Which temperature the ceiling of Z (see zscore_kd.py) suggests for `count` classes, and why."""
    tau, used = suggested_temperature(count), recipe["base_temp"]
    if count >= 10_000:
        return (f"for {count} classes, without a recipe, take base temperature {tau:g} or less (--base-temp "
                f"{tau:g}), or no standardization: the second table in zscore_kd.py; this run has {used:g}")
    return (f"for {count} classes, without a recipe, the table in zscore_kd.py suggests base temperature "
            f"{tau:g}: the teacher's top probability can reach {ceiling(count, tau):.2f}"
            + ("" if used == tau else f", at this run's {used:g} only {ceiling(count, used):.2f} "
               f"(--base-temp {tau:g})"))


class Choice(click.Choice):
    """click's, with the nearest first in its message."""

    def convert(self, value, param, ctx):
        if value not in self.choices:
            self.fail(f"{value!r} is not known; known, the nearest first: "
                      f"{suggest(str(value), list(self.choices))}")
        return super().convert(value, param, ctx)


class Device(Choice):
    """cuda, mps or cpu; a number is for the system to choose by."""

    def convert(self, value, param, ctx):
        if kind := re.fullmatch(r"cuda:(\d+)", str(value)):
            self.fail(f"{value}: a command sees one GPU, cuda; CUDA_VISIBLE_DEVICES={kind[1]} before the "
                      "command chooses which")
        return super().convert(value, param, ctx)


class Command(click.Command):
    """A click command whose errors are one line on stderr, usage errors (exit code 2) too."""

    def main(self, *args, standalone_mode=True, **more):
        for stream in (sys.stdout, sys.stderr):     # a file's name may have what the encoding lacks
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, standalone_mode=False, **more)
        except (click.ClickException, click.Abort) as error:
            code = show(error)
        if standalone_mode:
            sys.exit(code)
        return code


def show(error):
    """Prints a click exception's one line on stderr; returns its exit code."""
    if isinstance(error, click.UsageError):
        text = error.format_message().replace(os.linesep, " ")
        click.echo(f"Error: {text} (--help shows all flags)", err=True)
    elif isinstance(error, click.ClickException):
        error.show()
    elif isinstance(error, click.Abort):        # Ctrl-C where there is nothing to save
        click.echo("interrupted", err=True)
    return getattr(error, "exit_code", 1)


class UserPath(click.Path):
    """A path in which ~ is the home folder: a shell leaves it in --out=~/runs."""

    def convert(self, value, param, ctx):
        return super().convert(os.path.expanduser(value), param, ctx)


class Finite(click.FloatRange):
    """A finite number in a range; click's own takes nan."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


POSITIVE, WEIGHT, COUNT = Finite(min=0, min_open=True), Finite(min=0), click.IntRange(min=1)
PATH = UserPath()

SHARED = [
    click.option("--teacher", type=PATH, metavar="NAME", help="Teacher network."),
    click.option("--student", type=PATH, metavar="NAME",
                 help="Student network, or the one to train alone with --method none. Both also "
                      "FILE.py:NAME, package.module:NAME (called with num_classes) or timm:NAME."),
    click.option("--zscore/--no-zscore", default=False,
                 help="Standardize the logits of both sides.  [default: off]"),
    click.option("--feature", type=Choice(FEATURES),
                 help="Feature method beside --method; alone with --method none."),
    click.option("--feature-weight", type=WEIGHT, metavar="W", help="Its weight.  [default: recipe]"),
    click.option("--base-temp", type=POSITIVE, metavar="TAU",
                 help="Temperature of the method.  [default: recipe]"),
    click.option("--kd-weight", type=WEIGHT, metavar="W", help="lambda_KD.  [default: recipe]"),
    click.option("--ce-weight", type=WEIGHT, metavar="W", help="lambda_CE.  [default: recipe]"),
    click.option("--alpha", type=WEIGHT, help="DKD, RLD: weight of the target's part.  [default: recipe]"),
    click.option("--beta", type=WEIGHT,
                 help="DKD, RLD: weight of the other classes' part; DIST: of the samples'.  "
                      "[default: recipe]"),
    click.option("--entropy-weight", is_flag=True, help="EA-KD: samples weighted by both sides' entropies."),
    click.option("--zscore-relations/--no-zscore-relations", default=None,
                 help="MLKD with --zscore: standardize the class and batch relations too.  "
                      "[default: recipe]"),
    click.option("--epochs", type=COUNT, help="Length; the schedule scales with it.  [default: recipe]"),
    click.option("--batch-size", type=COUNT, help="Images per step.  [default: recipe]"),
    click.option("--lr", type=POSITIVE, help="Learning rate at the start.  [default: recipe]"),
    click.option("--weight-decay", type=WEIGHT, help="[default: recipe]"),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                 help="First seed."),
    click.option("--seeds", type=COUNT, default=1, show_default=True,
                 help="Number of seeds to run, one by one."),
    click.option("--val-from-train", type=click.IntRange(min=0), default=0, metavar="N",
                 help="Hold N training images out and evaluate the student on them alone, "
                      "for choosing numbers."),
    click.option("--teacher-checkpoint", type=PATH, metavar="FILE", help="The teacher's weights."),
    click.option("--student-checkpoint", type=PATH, metavar="FILE",
                 help="Weights that the student begins with: what fits of them."),
    click.option("--out", type=PATH, metavar="DIR", default="runs", show_default=True,
                 help="Folder for the runs' folders."),
    click.option("--device", type=Device(["cuda", "mps", "cpu"]), help="[default: the best there is]"),
    click.option("--precision", type=Choice(["fp32", "tf32", "bf16"]),
                 help="bf16 is autocast, last layer and losses in float32; tf32 rounds convolutions, which "
                      "is PyTorch's default on CUDA.  [default: bf16 on cuda, else fp32]"),
    click.option("--deterministic", is_flag=True, help="Deterministic CUDA kernels; slower."),
    click.option("--compile/--no-compile", default=False,
                 help="torch.compile: faster steps after a minute of preparation.  [default: off]"),
    click.option("--list", "list_recipes", is_flag=True,
                 help="Print all recipes and published numbers, and exit."),
    click.option("--dry-run", is_flag=True,
                 help="Walk the whole path in seconds: made data, two batches, a temporary folder."),
    click.option("--eval", "eval_file", type=PATH, metavar="FILE",
                 help="Evaluate a checkpoint of any supported format, and exit."),
]


def shared_flags(command):
    """Decorator: gives a click command the flags of SHARED, in that order."""
    for option in reversed(SHARED):
        command = option(command)
    return command


# ---------------------------------------------------------------- where and how


def pick_device(name=None):
    """torch.device of "cuda", "mps" or "cpu", the best there is for None. RunError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(k for k, v in there.items() if v)
    if not there[name]:
        have = " and ".join(k for k, v in there.items() if v)
        raise RunError(f"--device {name}: PyTorch finds none here; leave the flag out, it finds {have}")
    return torch.device(name)


def pick_precision(name, device):
    """"fp32", "tf32" or "bf16": what was asked for, else bf16 where a CUDA device has it in hardware."""
    if name == "tf32" and device.type != "cuda":
        raise click.UsageError("--precision tf32 is for CUDA: elsewhere give fp32 or bf16")
    if name is None:
        name = ("bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
                else "fp32")
    return name


def set_backends(deterministic, precision="fp32"):
    """Deterministic algorithms only, or the fastest. To be called before the first CUDA operation.

    float32 is float32, unless "tf32" is asked for: PyTorch's default rounds convolutions on newer GPUs.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False     # nothing here reads such memory
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False


def tune_malloc(block=2**30):
    """Lets the C library keep freed blocks up to a size: faulting them in again takes 10 % of a step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt         # glibc's; M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
        if mallopt(-3, block) or mallopt(-3, 2**25):        # older ones take 32 MiB at most
            mallopt(-1, 2**31 - 1)
    except (AttributeError, OSError, TypeError):    # another C library
        pass


def check_compiler(device):
    """RunError where torch.compile does not work."""
    import torch._inductor.config       # a second, which only this needs
    torch._inductor.config.freezing = device.type == "cpu"      # a teacher's weights are constant: 8 % there
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:      # torch raises its own types, by version
        raise RunError(f"--compile does not work here ({first_line(error)}); it needs a C++ compiler on a "
                       "CPU, Triton on a GPU. Leave the flag out") from None


def peak_memory(device):
    """Peak memory in MiB: of the allocator on CUDA, of the process elsewhere; None if it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:                    # Linux; getrusage there counts the process that started this one too
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    except (OSError, TypeError):
        pass
    try:
        import resource     # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------- progress


def duration(seconds):
    """Seconds as people say them: 45 s, 12 min, 3.2 h, 4.1 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


class Progress:
    """A line that moves on a terminal, a plain row an epoch elsewhere, and soon the projected time."""

    def __init__(self, images, epochs, done, device, advice="", chunk=1):
        """chunk: images that are prepared at once; speed is judged over whole chunks."""
        self.chunk, self.chunks = chunk, 0
        self.images, self.epochs, self.device, self.advice = images, epochs, device, advice
        self.left = images * epochs - done      # images still to be trained on
        self.seen, self.begun, self.printed, self.projected = 0, None, 0.0, False

    def step(self, epoch, images):
        now = time.monotonic()
        if self.begun is None:                  # the first step is warm-up, not speed
            self.begun = now
            self.left -= images
            return
        self.seen += images
        elapsed = now - self.begun
        before, self.chunks = self.chunks, self.seen // self.chunk
        if not self.projected and elapsed >= 5 and self.chunks > before:
            self.projected = True
            remaining = self.left * elapsed / self.seen
            line = (f"about {duration(remaining)} for the {self.left:,} images to go "
                    f"({self.seen / elapsed:,.0f} images/s on {self.device.type}), evaluation aside")
            self.print(line + (f": {self.advice}" if self.advice and remaining > 86400 else ""))
        if sys.stdout.isatty() and now - self.printed >= 0.5:
            self.printed = now
            share = 1 - (self.left - self.seen) / (self.images * self.epochs)
            click.echo(f"\r\033[Kepoch {epoch + 1}/{self.epochs}  {share:.0%}  "
                       f"{self.seen / max(elapsed, 1e-9):,.0f} images/s  "
                       f"{duration((self.left - self.seen) * elapsed / self.seen)} left", nl=False)

    def print(self, line):
        click.echo(("\r\033[K" if sys.stdout.isatty() else "") + line)
