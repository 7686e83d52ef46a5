"""A run's folder: resolved configuration, log, atomic checkpoint, resume.

    runs/resnet32x4-resnet8x4-kd-z-seed0/
      config.json    every resolved value, versions, device, git commit, command line
      log.jsonl      one row an epoch
      last.pt        all that resuming needs, replaced atomically; previous.pt is the one before
      student.pt     {"model": state_dict, ...facts}, loads with weights_only
      result.json    last and best accuracy, epochs, minutes, images per second, peak memory
"""

import functools
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from filelock import FileLock, Timeout

VERSION = "0.7"         # of the project, kept in every run and every exported file


class RunError(click.ClickException):
    """A problem that its message explains in one line; the command ends with exit code 1."""


class Busy(RunError):
    """Another process has the run's folder."""


@contextmanager
def disk_errors(folder):
    """Turns a failed write (disk full, no permission) into one line; what was saved before stays usable."""
    try:
        yield
    except OSError as error:
        raise RunError(f"could not write in {folder} ({error.strerror or error}); earlier saves are kept. "
                       "Make room or choose another --out, and give the same command again") from None


class Run:
    """One run's folder. `recipe` (a flat dict) says what is computed; `facts` say with what and where."""

    def __init__(self, folder, recipe, facts):
        self.folder = Path(folder).expanduser()
        self.recipe = recipe
        self.facts = facts
        self.lock = FileLock(self.folder / "lock", blocking=False)

    def open(self):
        """The state of the last save, or None for a new run. The log is cut back to that save.

        A finished run is left as it is. The folder is locked until `close`. RunError when another process has
        it, or when it holds a run of another recipe; nothing is overwritten then.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            raise Busy(f"another process is running in {self.folder}; wait for it, or choose another "
                       "--out") from None
        except (OSError, NotImplementedError):      # a file system without locks
            pass
        if (self.folder / "config.json").exists():
            self._check_recipe()
        else:
            self._write("config.json", json.dumps({"recipe": self.recipe, "facts": self.facts}, indent=2))
        if self.finished():
            return None
        state = self._load()
        self._cut_log(state["epoch"] if state else 0)
        return state

    def close(self):
        """Lets another process have the folder."""
        self.lock.release()

    def kept_recipe(self):
        """The recipe in the folder, {} for a new run or a file that is none."""
        try:
            return dict(json.loads((self.folder / "config.json").read_text())["recipe"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _check_recipe(self):
        """RunError when the folder holds a run of another recipe; a notice when other facts differ."""
        config = self.folder / "config.json"
        try:
            before = json.loads(config.read_text())
            recipe, facts = before["recipe"], before["facts"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{config} is not a run's configuration; choose another --out") from None
        now = json.loads(json.dumps(self.recipe))
        differ = [f"{k} was {recipe.get(k)}, now {now.get(k)}"
                  for k in recipe | now if recipe.get(k) != now.get(k)]
        if differ:
            raise RunError(f"{self.folder} holds a run of another recipe ({'; '.join(differ)}); "
                           "choose another --out, or remove the folder")
        differ = [f"{k} was {facts.get(k)}, now {v}"
                  for k, v in self.facts.items() if k != "command" and facts.get(k) != v]
        if differ and not self.finished():
            click.echo(f"notice: this run began elsewhere: {'; '.join(differ)}")

    def _load(self):
        """The newest save that is whole, else None."""
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            if not path.exists():
                continue
            content = path.read_bytes()
            if is_whole(content):
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            damaged = path.with_suffix(".damaged")
            click.echo(f"notice: {path} is damaged, kept as {damaged.name}; resuming from the save before "
                       "it, or from the start")
            os.replace(path, damaged)       # no later save may push it over a good one
        return None

    def _cut_log(self, epochs):
        """Keeps the first rows, one an epoch."""
        path = self.folder / "log.jsonl"
        rows = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        self._write("log.jsonl", "".join(rows[:epochs]))

    def log(self, row):
        """Appends one epoch's row to log.jsonl."""
        with disk_errors(self.folder), open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(rounded(row)) + "\n")

    def save(self, state):
        """Replaces last.pt in one step; the one before stays as previous.pt."""
        last = self.folder / "last.pt"
        with disk_errors(self.folder):
            partial = write_checkpoint(last.with_suffix(".partial"), state)
            if last.exists():
                os.replace(last, self.folder / "previous.pt")
            os.replace(partial, last)

    def finish(self, result, student):
        """student.pt and, last of all, result.json."""
        with disk_errors(self.folder):
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
        with disk_errors(self.folder):
            partial.write_text(text)
            os.replace(partial, self.folder / name)


def is_whole(content):
    """Whether the checksums of a zip archive's bytes fit; torch.load does not look at them."""
    try:
        return zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    except Exception:       # zipfile raises a dozen types for damaged files
        return False


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
    """Floats to 6 significant digits, inside dicts and lists; None where not finite, as JSON has no word."""
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
    """`with Stop() as stop:` turns Ctrl-C and SIGTERM into `stop.requested`, to save and leave.

    The second signal interrupts at once.
    """

    def __enter__(self):
        self.requested, self.before = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._ask)
            except ValueError:      # not the main thread
                pass
        return self

    def _ask(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def exit_if_requested(self, folder):
        """To be called after a save."""
        if self.requested:
            raise Stopped(f"stopped, and saved in {folder}: the same command resumes from here")

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@functools.cache
def commit():
    """The program's git commit as it was when this process first asked, or None."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "describe", "--always", "--abbrev=12"], capture_output=True, text=True,
                              timeout=10).stdout.strip()
        changed = name and subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"],
                                          timeout=10).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    # results and README, which change as rows are run, do not count
    return name + "-dirty" * bool(changed) or None


def collect_facts(device):
    """Versions, device, commit and command line, for config.json."""
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{platform.machine()} {device.type}")
    return {"version": VERSION, "python": platform.python_version(), "torch": torch.__version__,
            "device": name, "threads": torch.get_num_threads(), "commit": commit(),
            "command": " ".join(sys.argv)}


def first_line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
