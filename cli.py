"""The flags that the scripts share, errors of one line, device and precision, progress."""

import ctypes
import difflib
import multiprocessing
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from run import RunError, first_line

# ---------------------------------------------------------------- errors of one line

FAILURES = {        # words of PyTorch's error: what to do
    "does not have a deterministic implementation": "an operation has no --deterministic form, leave it out",
    "DataLoader": "a loading process was lost: give fewer --workers, a container more --shm-size",
    "Connection closed": "another process was lost, its own lines say why",
    "Connection reset": "another process was lost, its own lines say why",
}


@contextmanager
def friendly_errors():
    """Turns into one line: a ValueError of this project's modules, full memory, and FAILURES."""
    try:
        yield
    except ValueError as error:
        raise RunError(str(error)) from None
    except torch.OutOfMemoryError as error:
        raise RunError("the device's memory is full: take a smaller --batch-size, or --micro-batch where "
                       f"there is one ({first_line(error)})") from None
    except RuntimeError as error:
        for words, todo in FAILURES.items():
            if words in str(error):
                for child in multiprocessing.active_children():
                    child.kill()        # the end of this process would wait for one that hangs
                raise RunError(f"{todo} ({first_line(error)[:80]})") from None
        raise


class Command(click.Command):
    """A click command with headings in --help, and errors of one line on stderr."""

    def format_options(self, ctx, formatter):
        sections = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record:
                sections.setdefault(getattr(option, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def main(self, *args, standalone_mode=True, **more):
        for stream in (sys.stdout, sys.stderr):     # names of files may have what the encoding lacks
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


def suggest(name, known):
    """The known names, comma-separated, those most like `name` first."""
    folded = {}
    for k in known:
        folded.setdefault(k.casefold(), []).append(k)
    near = []
    for match in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4):
        near += folded[match]
    return ", ".join(near + [k for k in known if k not in near])


def check_name(flag, name, known):
    """A usage error that lists the known networks, the nearest first; a custom network's name has a colon."""
    if ":" not in name and name not in known:
        if os.path.isfile(name):
            raise click.UsageError(f"{flag} {name} is a file: give it to {flag}-checkpoint, and the name of "
                                   f"its network to {flag}")
        raise click.UsageError(f"{flag} {name}: no such network; known, the nearest first: "
                               f"{suggest(name, known)}; a custom one is FILE.py:NAME")


# ---------------------------------------------------------------- flags


class UserPath(click.Path):
    """A path in which ~ is the home folder: a shell leaves it in --out=~/runs."""

    def convert(self, value, param, ctx):
        return super().convert(os.path.expanduser(value), param, ctx)


class Number(click.FloatRange):
    name = "number"


class Count(click.IntRange):
    name = "number"


POSITIVE, WEIGHT = Number(min=0, min_open=True), Number(min=0)
COUNT, COUNT_OR_NONE = Count(min=1), Count(min=0)
PATH = UserPath()


def flags(**groups):
    """Decorator: gives a click command lists of options, each under its heading in --help."""
    def decorate(command):
        for heading, options in reversed(groups.items()):
            for option in reversed(options):
                option(command)
                command.__click_params__[-1].heading = heading.capitalize()
        return command
    return decorate


def method_flags(methods, features):
    """What is trained, and by which loss."""
    return [
        click.option("--teacher", type=PATH, metavar="NAME", help="Teacher network."),
        click.option("--student", type=PATH, metavar="NAME",
                     help="Student network. Both also FILE.py:NAME, package.module:NAME or timm:NAME."),
        click.option("--method", type=click.Choice(methods), default="kd", show_default=True,
                     help="Distillation loss; none trains the student without a teacher."),
        click.option("--zscore/--no-zscore", default=False,
                     help="Logit standardization: both sides' logits are z-scored.  [default: off]"),
        click.option("--feature", type=click.Choice(features),
                     help="Feature loss, added to --method's; with --method none it is the only one."),
        click.option("--entropy-weight", is_flag=True,
                     help="EA-KD: weight each image's loss by the entropies of both predictions."),
        click.option("--zscore-relations/--no-zscore-relations", default=None,
                     help="MLKD (KD between images and between classes too) with --zscore: z-score these "
                          "relations too.  [default: recipe]"),
    ]


RECIPE = [
    click.option("--base-temp", type=POSITIVE, help="Temperature of the method."),
    click.option("--kd-weight", type=WEIGHT, help="lambda_KD: weight of the method's loss."),
    click.option("--ce-weight", type=WEIGHT, help="lambda_CE: weight of the cross-entropy."),
    click.option("--feature-weight", type=WEIGHT, help="Weight of the feature loss."),
    click.option("--alpha", type=WEIGHT, help="DKD, RLD: weight of the target class."),
    click.option("--beta", type=WEIGHT,
                 help="DKD, RLD: weight of the other classes; DIST: of the relations within an image."),
    click.option("--epochs", type=COUNT, help="Length; the schedule scales with it."),
    click.option("--batch-size", type=COUNT, help="Images a step, of all processes."),
    click.option("--lr", type=POSITIVE, help="Learning rate at the start."),
    click.option("--weight-decay", type=WEIGHT, help="Of all parameters."),
]
HELD_OUT = click.option("--val-from-train", type=COUNT_OR_NONE, default=0,
                        help="Hold out so many training images and evaluate on them: to choose values.")
RUN = [
    click.option("--teacher-checkpoint", type=PATH, help="The teacher's weights."),
    click.option("--student-checkpoint", type=PATH,
                 help="Weights that the student starts from; those that do not fit are left out."),
    click.option("--out", type=PATH, default="runs", show_default=True,
                 help="Holds the runs' folders."),
    click.option("--seed", type=Count(0, 2**32 - 1), default=0, show_default=True,
                 help="Of all random draws."),
    click.option("--list", "list_recipes", is_flag=True, help="Print recipes and published accuracies."),
    click.option("--dry-run", is_flag=True,
                 help="The whole path in seconds: untrained teacher, synthetic data, temporary folder."),
    click.option("--eval", "eval_file", type=PATH, help="Evaluate a checkpoint, and exit."),
]
MACHINE = [
    click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]),
                 help="Which GPU: CUDA_VISIBLE_DEVICES.  [default: the best there is]"),
    click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16"]),
                 help="bf16: autocast, losses in float32; tf32: rounded convolutions, as PyTorch's default.  "
                      "[default: bf16 on cuda, else fp32]"),
    click.option("--deterministic", is_flag=True, help="Deterministic CUDA kernels; slower."),
    click.option("--compile/--no-compile", default=False,
                 help="torch.compile: faster steps after a minute.  [default: off]"),
]


def save_every(seconds):
    return click.option("--save-every", type=POSITIVE, default=seconds, show_default=True,
                        help="Seconds between saves.")


# ---------------------------------------------------------------- where and how


def prepare(flags, device):
    """What must be set before the first operation."""
    set_backends(flags["deterministic"], flags["precision"])
    tune_malloc()
    if flags["compile"]:
        check_compiler(device)


def pick_device(name=None):
    """torch.device of "cuda", "mps" or "cpu", the best there is for None. RunError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [kind for kind, is_there in there.items() if is_there]
    if name and name not in found:
        raise RunError(f"--device {name}: PyTorch finds only {' and '.join(found)} here")
    return torch.device(name or found[0])


def pick_precision(name, device):
    """"fp32", "tf32" or "bf16": the named one, else bf16 where a CUDA device has it in hardware."""
    if name == "tf32" and device.type != "cuda":
        raise click.UsageError("--precision tf32 is for CUDA: elsewhere give fp32 or bf16")
    if name:
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


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
    """Lets the C library keep freed blocks up to a size: to fault them in again takes 10 % of a step."""
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
        raise RunError(f"--compile needs a C++ compiler on a CPU, Triton on a GPU ({first_line(error)})"
                       ) from None


def peak_memory(device):
    """Peak memory in MiB: of the allocator on CUDA, of the process elsewhere; None if it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:                    # Linux
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
    except (OSError, TypeError):
        return None


# ---------------------------------------------------------------- progress


def duration(seconds):
    """Seconds as people say them: 45 s, 12 min, 3.2 h, 4.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 1.5 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 1.5 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


class Progress:
    """A line that moves on a terminal, a plain row an epoch elsewhere, and soon the projected time."""

    def __init__(self, images, epochs, done, device, chunk=1):
        """chunk: images that are prepared at once; speed is judged over whole chunks."""
        self.chunk, self.chunks = chunk, 0
        self.images, self.epochs, self.device = images, epochs, device
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
        remaining = (self.left - self.seen) * elapsed / self.seen
        if not self.projected and elapsed >= 5 and self.chunks > before:
            self.projected = True
            self.print(f"about {duration(remaining)} for the {self.left - self.seen:,} images to go, without "
                       f"evaluation ({self.seen / elapsed:,.0f} images/s on {self.device.type})")
            if remaining > 86400 and self.device.type == "cpu":
                self.print("a short run: --student resnet8 --epochs 12 --train-images 10000; or take a GPU")
        if sys.stdout.isatty() and now - self.printed >= 0.5:
            self.printed = now
            share = 1 - (self.left - self.seen) / (self.images * self.epochs)
            click.echo(f"\r\033[Kepoch {epoch + 1}/{self.epochs}  {share:.0%}  "
                       f"{self.seen / elapsed:,.0f} images/s  {duration(remaining)} left", nl=False)

    def print(self, line):
        click.echo(("\r\033[K" if sys.stdout.isatty() else "") + line)
