"""A run's folder: resolved configuration, log, atomic checkpoint, resume; and the flags that the scripts share.

    runs/resnet32x4-resnet8x4-kd-z-seed0/
      config.json    every resolved value, versions, device, git commit, command line
      log.jsonl      one row an epoch
      last.pt        all that resuming needs, replaced atomically; previous.pt is the one before
      student.pt     {"model": state_dict, ...facts}, loads with weights_only
      result.json    last and best accuracy, epochs, minutes, images per second, peak memory
"""

import ctypes
import difflib
import functools
import io
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from contextlib import contextmanager
from pathlib import Path

import click
import torch


VERSION = "0.5"         # of the project, kept in every run and every exported file


class RunError(click.ClickException):
    """A problem that its message explains in one line; the command ends with exit code 1."""


class Busy(RunError):
    """Another process has the run's folder."""


@contextmanager
def explained(folder):
    """Turns a failed write (disk full, no permission) into one line; what was saved before stays usable."""
    try:
        yield
    except OSError as error:
        raise RunError(f"could not write in {folder} ({error.strerror or error}); what was saved before is kept. Make room there or "
                       "choose another --out, and give the same command again") from None


class Run:
    """One run's folder. `recipe` (a flat dict) says what is computed; `facts` say with what and where."""

    def __init__(self, folder, recipe, facts):
        self.folder, self.recipe, self.facts, self._lock = Path(folder), recipe, facts, None

    def open(self):
        """The state of the last checkpoint, or None for a new run. The log is cut back to that checkpoint.

        A finished run is left as it is. The folder is locked until `close`. RunError when another process has it, or when it holds a run of
        another recipe; nothing is overwritten then.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "a")
            if hasattr(os, "register_at_fork"):     # a loading process that outlives this one must not hold the folder
                file = weakref.ref(self._lock)
                os.register_at_fork(after_in_child=lambda: file() and file().close())
        if not lock(self._lock):
            raise Busy(f"another process is running in {self.folder}; wait for it, or choose another --out")
        if not self._same_recipe():
            self._write("config.json", json.dumps({"recipe": self.recipe, "facts": self.facts}, indent=2))
        if self.finished():
            return None
        state = self._load()
        self._cut_log(state["epoch"] if state else 0)
        return state

    def close(self):
        """Lets another process have the folder."""
        if self._lock:
            self._lock.close()

    def _same_recipe(self):
        """Whether the folder holds this run already; RunError when it holds another."""
        config = self.folder / "config.json"
        if not config.exists():
            if (self.folder / "last.pt").exists():
                raise RunError(f"{self.folder} holds a checkpoint without its config.json; choose another --out")
            return False
        try:
            before = json.loads(config.read_text())
            recipe, facts = before["recipe"], before["facts"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{config} is not a run's configuration; choose another --out") from None
        now = json.loads(json.dumps(self.recipe))
        if "compile" in now:
            recipe = {"compile": False} | recipe        # older runs do not say
        differ = [f"{k} was {recipe.get(k)}, now {now.get(k)}" for k in recipe | now if recipe.get(k) != now.get(k)]
        if differ:
            raise RunError(f"{self.folder} holds a run of another recipe ({'; '.join(differ)}); choose another --out, "
                           "or remove the folder")
        notices = [f"{k} was {facts.get(k)}, now {v}" for k, v in self.facts.items() if k != "command" and facts.get(k) != v]
        if notices and not self.finished():
            click.echo(f"notice: this run began with other facts: {'; '.join(notices)}")
        return True

    def _load(self):
        damaged = False
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            if not path.exists():
                continue
            try:
                content = path.read_bytes()
                with zipfile.ZipFile(io.BytesIO(content)) as file:      # torch itself does not look at the checksums
                    if file.testzip() is not None:
                        raise zipfile.BadZipFile
            except (OSError, MemoryError) as error:     # the disk's or the machine's trouble, not the file's
                raise RunError(f"could not read {path} ({error}); it is kept as it is") from None
            except Exception:       # zipfile raises a dozen types for damaged files
                kept = path.with_suffix(".damaged")
                click.echo(f"notice: {path} is damaged (kept as {kept.name}); going on from the save before it")
                with explained(self.folder):
                    os.replace(path, kept)          # no later save may push it over a good one
                damaged = True
                continue
            try:
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception as error:      # its bytes are as they were written: memory is full, or torch is another
                raise RunError(f"could not read {path} ({first_line(error)}); it is kept as it is") from None
        if damaged:
            click.echo(f"notice: no save in {self.folder} is usable; beginning anew")
        return None

    def _cut_log(self, epochs):
        path = self.folder / "log.jsonl"
        rows = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break               # a kill in the middle of a write leaves half a row, at the end
            if isinstance(row, dict) and row.get("epoch", epochs + 1) <= epochs:
                rows.append(line + "\n")
        self._write("log.jsonl", "".join(rows))

    def log(self, row):
        """Appends one epoch's row to log.jsonl."""
        with explained(self.folder), open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(rounded(row)) + "\n")

    def save(self, state):
        """Replaces last.pt in one step; the one before stays as previous.pt."""
        last = self.folder / "last.pt"
        with explained(self.folder):
            partial = write_checkpoint(last.with_suffix(".partial"), state)
            if last.exists():
                os.replace(last, self.folder / "previous.pt")
            os.replace(partial, last)

    def finish(self, result, student):
        """student.pt and, last of all, result.json."""
        with explained(self.folder):
            os.replace(write_checkpoint(self.folder / "student.partial", student), self.folder / "student.pt")
        self._write("result.json", json.dumps(rounded(result), indent=2))

    def finished(self):
        """The result of a run that is over, else None."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            return None

    def _write(self, name, text):
        partial = self.folder / f"{name}.partial"
        with explained(self.folder):
            try:
                partial.write_text(text)
                os.replace(partial, self.folder / name)
            finally:
                partial.unlink(missing_ok=True)


def lock(file):
    """Locks an open file for this process until it closes it or ends, however it ends; False if another has it."""
    try:
        import fcntl
    except ImportError:     # Windows
        import msvcrt
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:         # a file system without locks
        pass
    return True


def write_checkpoint(path, content):
    """torch.save, flushed to the disk; a failed write leaves no file."""
    buffer = io.BytesIO()       # torch.save on a full disk hides the system's reason
    torch.save(content, buffer)
    try:
        with open(path, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return path


def rounded(value):
    """Floats to 6 significant digits, inside dicts and lists; what is not finite becomes None, as JSON has no word."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


class Stopped(click.ClickException):
    """The run was asked to stop and has saved; exit code 1, as it is not finished."""

    def show(self, file=None):
        click.echo(self.message, err=True)


class Stop:
    """`with Stop() as stop:` turns Ctrl-C and SIGTERM into `stop.asked`, for a loop to save and leave between two steps.

    The second signal interrupts at once.
    """

    def __enter__(self):
        self.asked, self.before = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._ask)
            except ValueError:      # not the main thread
                pass
        return self

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def leave_if_asked(self, folder):
        """To be called after a save."""
        if self.asked:
            raise Stopped(f"stopped, and saved in {folder}: the same command goes on from here")

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Progress:
    """A line that moves on a terminal, one plain row an epoch elsewhere, and the projected time after some seconds."""

    def __init__(self, images, epochs, done, device, advice="", stretch=1):
        """stretch: images that are prepared at once; speed is judged over whole stretches."""
        self.stretch, self.stretches = stretch, 0
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
        before, self.stretches = self.stretches, self.seen // self.stretch
        if not self.projected and elapsed >= 5 and self.stretches > before:
            self.projected = True
            remaining = self.left * elapsed / self.seen
            line = (f"about {duration(remaining)} for the {self.left:,} images to go ({self.seen / elapsed:,.0f} images/s "
                    f"on {self.device.type}), evaluation aside")
            self.print(line + (f": {self.advice}" if self.advice and remaining > 86400 else ""))
        if sys.stdout.isatty() and now - self.printed >= 0.5:
            self.printed = now
            share = 1 - (self.left - self.seen) / (self.images * self.epochs)
            click.echo(f"\r\033[Kepoch {epoch + 1}/{self.epochs}  {share:.0%}  {self.seen / max(elapsed, 1e-9):,.0f} images/s  "
                       f"{duration((self.left - self.seen) * elapsed / self.seen)} left", nl=False)

    def print(self, line):
        click.echo(("\r\033[K" if sys.stdout.isatty() else "") + line)


# ---------------------------------------------------------------- what a training loop reports


KEPT = "the last checkpoint in {} is kept. Try a smaller --lr or --kd-weight, in another --out"


def epoch_row(epoch, optimizer, means, scores, eval_name):
    """One row of log.jsonl: learning rate, mean training losses, and accuracies in %.

    With MLKD ce is the sum over its two views, as it is in the loss, and the training accuracy the weak view's.
    """
    loss, ce, kd, top1, top5 = means.tolist()
    return {"epoch": epoch + 1, "lr": float(optimizer.param_groups[0]["lr"]), "loss": loss, "ce": ce, "kd": kd,
            "train_top1": 100 * top1, "train_top5": 100 * top5, **{f"{eval_name}_{k}": v for k, v in scores.items()}}


def check_finite(sums, losses, epoch, step, student_logits, teacher_logits, run):
    """RunError when the sum of losses is not finite; the last checkpoint, made before, is kept."""
    if torch.isfinite(sums[0]):
        return
    ranges = [f"{name} logits in [{x.min():.4g}, {x.max():.4g}]"
              for name, x in (("student", student_logits), *(("teacher", x) for x in teacher_logits[:1]))]
    raise RunError(f"the loss became {losses[0].item()} in epoch {epoch + 1}, step {step + 1} ({', '.join(ranges)}); "
                   + KEPT.format(run.folder))


def epoch_line(row, best, name, epochs):
    return (f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.5g}  loss {row['loss']:8.4f}  train {row['train_top1']:6.2f}  "
            f"{name} top-1 {row[f'{name}_top1']:6.2f}  top-5 {row[f'{name}_top5']:6.2f}  (best {best['top1']:.2f})  "
            f"{row['img_s']:,.0f} images/s  {row['seconds']:.0f} s")


# ---------------------------------------------------------------- where and with what


def pick_device(name=None):
    """torch.device of "cuda", "mps" or "cpu", the best there is for None. RunError when it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(k for k, v in there.items() if v)
    if not there[name]:
        have = " and ".join(k for k, v in there.items() if v)
        raise RunError(f"--device {name}: PyTorch finds none here; leave the flag out, it finds {have}")
    return torch.device(name)


def pick_precision(name, device):
    """"fp32" or "bf16": the one that was asked for, else bf16 where a CUDA device has it in hardware."""
    if name is None:
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return name


@functools.cache
def commit():
    """The program's git commit as it was when this process first asked, or None."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "describe", "--always", "--abbrev=12"], capture_output=True, text=True, timeout=10).stdout.strip()
        changed = name and subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], timeout=10).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return name + "-dirty" * bool(changed) or None      # results and README, which change as rows are run, do not count


def collect_facts(device):
    """Versions, device, commit and command line, for config.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    return {"version": VERSION, "python": platform.python_version(), "torch": torch.__version__, "device": name,
            "threads": torch.get_num_threads(), "commit": commit(), "command": " ".join(sys.argv)}


def pick_kernels(deterministic):
    """Deterministic algorithms only, or the fastest. To be called before the first CUDA operation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def keep_memory():
    """Lets the C library keep freed memory. It would give it back and fault it in again at every step: 10 % on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt         # glibc's; M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):        # older ones take 32 MiB at most
            mallopt(-1, 2**31 - 1)
    except (AttributeError, OSError, TypeError):    # another C library
        pass


def check_compiler(device):
    """RunError where torch.compile does not work."""
    import torch._inductor.config       # a second, which only this needs
    torch._inductor.config.freezing = device.type == "cpu"      # a teacher's weights are constants: 8 % on a CPU
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:      # torch raises its own types, by version
        raise RunError(f"--compile does not work here ({first_line(error)}); it needs a C++ compiler on a CPU, Triton on a GPU. Leave "
                       "the flag out") from None


def peak_memory(device):
    """Peak memory in MiB: of the allocator on CUDA, of the process elsewhere; None where it cannot be known."""
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


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def duration(seconds):
    """Seconds as people say them: 45 s, 12 min, 3.2 h, 4.1 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------- flags that the scripts share


def nearest_first(name, known):
    """The known names, comma-separated, those most like `name` first."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return ", ".join(near + [k for k in known if k not in near])


def check_name(flag, name, known):
    """Raises a usage error that lists the known names, the nearest first."""
    if name not in known:
        raise click.UsageError(f"{flag} {name}: no such network; known, the nearest first: {nearest_first(name, known)}")


def check_method(flags, networks):
    """Usage errors of the flags that say what is trained, which click cannot see by itself. Takes the teacher from method none.

    networks: the names that --teacher and --student may have.
    """
    if flags["method"] == "none":
        if flags["zscore"]:
            raise click.UsageError("--zscore needs a method that distils: --method none has no teacher's logits to standardize")
        flags["teacher"] = flags["teacher_checkpoint"] = None
    for flag, method in (("alpha", "dkd"), ("beta", "dkd"), ("zscore_relations", "mlkd")):
        if flags[flag] is not None and flags["method"] != method:
            raise click.UsageError(f"--{flag.replace('_', '-')} is for --method {method}, not {flags['method']}")
    if flags["zscore_relations"] and not flags["zscore"]:
        raise click.UsageError("--zscore-relations needs --zscore")
    for flag in ("base_temp", "kd_weight"):
        if flags[flag] is not None and flags["method"] == "none":
            raise click.UsageError(f"--{flag.replace('_', '-')} is for a method that distils, not for --method none")
    for flag in ("teacher", "student"):
        if flags[flag] is not None:
            check_name(f"--{flag}", flags[flag], networks)
    if flags["eval_file"] is None and flags["student"] is None:
        raise click.UsageError("name a --student" + ("" if flags["method"] == "none" else " and a --teacher") + "; --list shows the pairs")
    if flags["eval_file"] is None and flags["method"] != "none" and flags["teacher"] is None:
        raise click.UsageError("name a --teacher (or train the student alone: --method none)")


class Choice(click.Choice):
    """click's, with the nearest first in its message."""

    def convert(self, value, param, ctx):
        if value not in self.choices:
            self.fail(f"{value!r} is not known; known, the nearest first: {nearest_first(str(value), list(self.choices))}")
        return super().convert(value, param, ctx)


class Command(click.Command):
    """A click command whose errors are one line on stderr, usage errors (exit code 2) too."""

    def main(self, *args, standalone_mode=True, **more):
        try:
            code = super().main(*args, standalone_mode=False, **more)
        except click.UsageError as error:
            click.echo(f"Error: {error.format_message().replace(os.linesep, ' ')} (--help shows all flags)", err=True)
            code = error.exit_code
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except click.Abort:         # Ctrl-C where there is nothing to save
            click.echo("interrupted", err=True)
            code = 1
        if standalone_mode:
            sys.exit(code)
        return code


class Finite(click.FloatRange):
    """A finite number in a range; click's own takes nan."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


POSITIVE, WEIGHT, COUNT = Finite(min=0, min_open=True), Finite(min=0), click.IntRange(min=1)

SHARED = [
    click.option("--teacher", metavar="NAME", help="Teacher network."),
    click.option("--student", metavar="NAME", help="Student network, or the one to train alone with --method none."),
    click.option("--zscore/--no-zscore", default=False, help="Standardize the logits of both sides.  [default: off]"),
    click.option("--base-temp", type=POSITIVE, metavar="TAU", help="Temperature of the method.  [default: recipe]"),
    click.option("--kd-weight", type=WEIGHT, metavar="W", help="lambda_KD.  [default: recipe]"),
    click.option("--ce-weight", type=WEIGHT, metavar="W", help="lambda_CE.  [default: recipe]"),
    click.option("--alpha", type=WEIGHT, help="DKD: weight of the target class's part.  [default: recipe]"),
    click.option("--beta", type=WEIGHT, help="DKD: weight of the other classes' part.  [default: recipe]"),
    click.option("--zscore-relations/--no-zscore-relations", default=None,
                 help="MLKD with --zscore: standardize the class and batch relations too.  [default: recipe]"),
    click.option("--epochs", type=COUNT, help="Length; the schedule scales with it.  [default: recipe]"),
    click.option("--batch-size", type=COUNT, help="Images per step.  [default: recipe]"),
    click.option("--lr", type=POSITIVE, help="Learning rate at the start.  [default: recipe]"),
    click.option("--weight-decay", type=WEIGHT, help="[default: recipe]"),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="First seed."),
    click.option("--seeds", type=COUNT, default=1, show_default=True, help="Number of seeds to run, one by one."),
    click.option("--val-from-train", type=click.IntRange(min=0), default=0, metavar="N",
                 help="Hold N training images out and evaluate the student on them alone, for choosing numbers."),
    click.option("--teacher-checkpoint", metavar="FILE", help="The teacher's weights."),
    click.option("--out", metavar="DIR", default="runs", show_default=True, help="Folder for the runs' folders."),
    click.option("--device", type=Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]"),
    click.option("--precision", type=Choice(["fp32", "bf16"]),
                 help="bf16 is autocast, losses in float32.  [default: bf16 on cuda, else fp32]"),
    click.option("--deterministic", is_flag=True, help="Deterministic CUDA kernels; slower."),
    click.option("--compile/--no-compile", default=False, help="torch.compile: faster steps after a minute of preparation.  [default: off]"),
    click.option("--list", "list_recipes", is_flag=True, help="Print all recipes and published numbers, and exit."),
    click.option("--dry-run", is_flag=True, help="Walk the whole path in seconds: made data, two batches, a temporary folder."),
    click.option("--eval", "eval_file", metavar="FILE", help="Evaluate a checkpoint of any supported format, and exit."),
]


def shared_flags(command):
    """Decorator: gives a click command the flags of SHARED, in that order."""
    for option in reversed(SHARED):
        command = option(command)
    return command
