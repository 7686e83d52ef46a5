"""Kills, signals, a full disk, a second process: a run goes on and ends with an unbroken run's bits."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import data
import distill
import run
import teacher
import train_cifar
from checkpoints import weights_sha256
from conftest import forked
from models import create_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and resource limits are Unix's")
EPOCHS, STEPS, BATCH = 3, 8, 4
with torch.random.fork_rng():
    torch.manual_seed(5)
    TEACHER = create_model("resnet14")
NAME = f"resnet14@{weights_sha256(TEACHER)[:6]}-resnet8-kd-z-batch4-3epochs-synthetic-seed0"


def after(module, name, count, call, before=False):
    """Lets `call` happen after (or before) the count-th call of module.name in this process."""
    real, seen = getattr(module, name), []

    def counted(*arguments, **more):
        seen.append(1)
        if before and len(seen) == count:
            call()
        value = real(*arguments, **more)
        if not before and len(seen) == count:
            call()
        return value

    setattr(module, name, counted)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def renamed(source, target, real=os.replace):
    """os.replace, killed after a save's first rename: last.pt is previous.pt, and there is no last.pt."""
    real(source, target)
    if str(target).endswith("previous.pt") and renamed.left == 0:
        killed()
    renamed.left -= str(target).endswith("previous.pt")


POINTS = {      # the third save is in the first epoch, the eleventh in the second
    "before a save is written": lambda n: after(run, "write_checkpoint", n, killed, before=True),
    "before its renames": lambda n: after(run, "write_checkpoint", n, killed),
    "between its renames": lambda n: (setattr(renamed, "left", n - 2), setattr(run.os, "replace", renamed)),
    "after a save": lambda n: after(run.Run, "save", n, killed),
    "in a step": lambda n: after(distill, "top_k_hits", n, killed),
    "while a row is logged": lambda n: after(run.Run, "log", 1 + n // 8, killed),
    "before the result is written": lambda n: after(run.Run, "finish", 1, killed, before=True),
}
SIGNALS = {
    "SIGTERM": lambda n: after(distill.Trainer, "set_schedule", n,
                               lambda: os.kill(os.getpid(), signal.SIGTERM)),
    "SIGINT": lambda n: after(distill.Trainer, "set_schedule", n,
                              lambda: os.kill(os.getpid(), signal.SIGINT)),
    "SIGTERM in the evaluation": lambda n: after(distill, "evaluate", 2,
                                                 lambda: os.kill(os.getpid(), signal.SIGTERM)),
}


def child(arguments, output, point, n, file_size):
    """The command in a process of its own, in which something happens at a chosen point."""
    import resource
    data.SYNTHETIC_SIZES = (BATCH * STEPS, 16)
    train_cifar.CHUNK["cpu"] = 3 * BATCH        # chunks that neither a save nor an epoch divides
    teacher.BATCH["cpu"] = 5
    torch.set_num_threads(1)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if point:
        (POINTS | SIGNALS)[point](n)
    with open(output, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        train_cifar.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Runs the command in a fresh process, forked from a server that has imported torch already."""
    folder = tmp_path_factory.mktemp("kills")
    torch.save(TEACHER.state_dict(), folder / "teacher.pt")
    flags = ["--teacher", "resnet14", "--teacher-checkpoint", folder / "teacher.pt", "--student", "resnet8",
             "--zscore", "--data", "synthetic", "--epochs", EPOCHS, "--batch-size", BATCH, "--lr", 0.05,
             "--device", "cpu"]

    def begin(out, *more, point=None, n=0, file_size=None, save_every=1e-9, wait=True):
        arguments = [*flags, "--save-every", save_every, "--out", out, *more]
        process = forked().Process(target=child, args=(arguments, folder / "output", point, n, file_size))
        process.start()
        if wait:
            process.join(300)
            return process.exitcode, (folder / "output").read_text()
        return process

    yield begin


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """What must not depend on how often a run was stopped: an unbroken one's ending."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = start(folder, save_every=1000)
    assert code == 0, output
    return ending(folder)


def ending(folder):
    """Weights, momentum, and the log without times."""
    state = torch.load(folder / NAME / "last.pt")
    rows = [json.loads(line) for line in (folder / NAME / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    student = torch.load(folder / NAME / "student.pt")["model"]
    assert all(map(torch.equal, student.values(), state["model"].values()))
    return ([*state["model"].values(), *state["momentum"]],
            [{k: v for k, v in r.items() if k not in ("img_s", "seconds")} for r in rows])


def same(ours, theirs):
    return (ours[1] == theirs[1] and len(ours[0]) == len(theirs[0])
            and all(map(torch.equal, ours[0], theirs[0])))


@pytest.mark.parametrize("point, n", [*zip(POINTS, itertools.cycle([3, 11]))])
def test_a_kill_at_any_point_changes_nothing(start, whole, tmp_path, point, n):
    code, _ = start(tmp_path, point=point, n=n)
    assert code == -signal.SIGKILL
    code, output = start(tmp_path)
    assert code == 0 and "resuming from epoch" in output, output
    assert same(ending(tmp_path), whole)
    assert sorted(p.name for p in (tmp_path / NAME).iterdir() if p.suffix != ".partial") == [
        "config.json", "last.pt", "lock", "log.jsonl", "previous.pt", "result.json", "student.pt"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(start, whole, tmp_path, kills):
    chance, done = random.Random(0), 0
    while done < kills:
        process = start(tmp_path, wait=False)
        process.join(chance.uniform(0, 1))
        if process.exitcode is None:
            process.kill()
            process.join()
            done += 1
        else:               # it was faster: once more from the start
            assert same(ending(tmp_path), whole)
            shutil.rmtree(tmp_path / NAME)
    code, output = start(tmp_path)
    assert code == 0 and same(ending(tmp_path), whole), output


@pytest.mark.parametrize("point", SIGNALS)
def test_a_signal_saves_and_says_how_to_go_on(start, whole, tmp_path, point):
    code, output = start(tmp_path, point=point, n=11, save_every=1000)
    assert code == 1
    assert output.splitlines()[-1].startswith("stopped, and saved in") and "same command resumes" in output
    code, output = start(tmp_path, save_every=1000)
    assert code == 0 and ("resuming from epoch 2, step 0" if "evaluation" in point
                          else "resuming from epoch 1, step 3") in output
    assert same(ending(tmp_path), whole)


def test_a_full_disk_keeps_the_checkpoint_before(start, whole, tmp_path):
    assert start(tmp_path, point="after a save", n=3)[0] == -signal.SIGKILL
    before = torch.load(tmp_path / NAME / "last.pt")
    code, output = start(tmp_path, file_size=100_000)
    assert (code == 1 and "could not write in" in output and "File too large" in output
            and "Traceback" not in output)
    after = torch.load(tmp_path / NAME / "last.pt")
    assert (before["epoch"], before["step"]) == (after["epoch"], after["step"]) == (0, 3)
    assert not list((tmp_path / NAME).glob("*.partial"))
    assert start(tmp_path)[0] == 0 and same(ending(tmp_path), whole)


def test_a_truncated_checkpoint_costs_one_save(start, whole, tmp_path):
    assert start(tmp_path, point="after a save", n=3)[0] == -signal.SIGKILL
    last = tmp_path / NAME / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    code, output = start(tmp_path)
    assert (code == 0
            and "last.pt is damaged, kept as last.damaged; resuming from the save before it" in output)
    assert "resuming from epoch 0, step 2" in output and same(ending(tmp_path), whole)


def test_the_second_process_in_one_folder_is_refused(start, tmp_path):
    held = run.Run(tmp_path / NAME, {}, {})
    held.open()
    code, output = start(tmp_path)
    assert code == 1 and "another process is running in" in output
    held.close()
    (tmp_path / NAME / "config.json").unlink()
    assert start(tmp_path, point="after a save", n=3)[0] == -signal.SIGKILL
    assert start(tmp_path)[0] == 0              # a killed process leaves no lock behind
