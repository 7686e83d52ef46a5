"""Kills, signals, a full disk, a second process: a run always goes on and ends with an unbroken run's bits."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import data
import teacher
import train_cifar
from models import create_model
from train_cifar import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and resource limits are Unix's")
NAME = "resnet14-resnet8-kd-z-synthetic-seed0"


@pytest.fixture
def flags(tmp_path):
    torch.manual_seed(5)
    torch.save(create_model("resnet14").state_dict(), tmp_path / "teacher.pt")
    return ["--teacher", "resnet14", "--teacher-checkpoint", str(tmp_path / "teacher.pt"), "--student", "resnet8", "--zscore",
            "--data", "synthetic", "--epochs", "12", "--batch-size", "32", "--lr", "0.05", "--device", "cpu",
            "--save-every", "0.02", "--out"]


def child(arguments, output, file_size):
    """The command in a process of its own."""
    import resource
    data.SYNTHETIC_SIZES = (256, 64)
    train_cifar.AHEAD["cpu"] = 96        # stretches of steps that neither a save nor an epoch divides
    teacher.BATCH["cpu"] = 40
    torch.set_num_threads(1)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    with open(output, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        main([str(a) for a in arguments])


@pytest.fixture
def start(tmp_path):
    """Starts the command in a fresh process, forked from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_cifar"])
    processes = []

    def begin(*arguments, file_size=None):
        process = context.Process(target=child, args=(arguments, tmp_path / "output", file_size))
        process.start()
        processes.append(process)
        return process

    begin.output = lambda: (tmp_path / "output").read_text()
    yield begin
    for process in processes:
        process.kill()
        process.join()


def finish(process):
    process.join(120)
    return process.exitcode


def ending(folder):
    """What must not depend on how often a run was stopped: weights, momentum, log without times."""
    state = torch.load(folder / NAME / "last.pt")
    momentum = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    rows = [json.loads(line) for line in (folder / NAME / "log.jsonl").read_text().splitlines()]
    return list(state["model"].values()) + momentum, [{k: v for k, v in r.items() if k not in ("img_s", "seconds")} for r in rows]


def same(ours, theirs):
    return ours[1] == theirs[1] and len(ours[0]) == len(theirs[0]) and all(map(torch.equal, ours[0], theirs[0]))


def wait_for(path, seconds=60):
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert path.exists()


def test_twenty_kills_at_random_moments_change_nothing(flags, start, tmp_path):
    assert finish(start(*flags, tmp_path / "whole")) == 0
    chance, kills, mid_epoch = random.Random(0), 0, 0
    for _ in range(200):
        process = start(*flags, tmp_path / "broken")
        process.join(chance.uniform(0, 1.2))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            mid_epoch += ", step 0 " not in start.output() and "going on" in start.output()
        elif kills >= 20:
            break
        elif (tmp_path / "broken" / NAME / "result.json").exists():     # too fast: once more from the start
            assert same(ending(tmp_path / "broken"), ending(tmp_path / "whole"))
            (tmp_path / "broken").rename(tmp_path / f"broken{kills}")
    assert kills >= 20 and mid_epoch > 0
    assert finish(start(*flags, tmp_path / "broken")) == 0
    assert same(ending(tmp_path / "broken"), ending(tmp_path / "whole"))
    assert [row["epoch"] for row in ending(tmp_path / "broken")[1]] == list(range(1, 13))
    student = torch.load(tmp_path / "broken" / NAME / "student.pt")["model"]
    assert all(map(torch.equal, student.values(), ending(tmp_path / "whole")[0]))
    assert sorted(p.name for p in (tmp_path / "broken" / NAME).iterdir()) == [
        "config.json", "last.pt", "lock", "log.jsonl", "previous.pt", "result.json", "student.pt"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_says_how_to_go_on(flags, start, tmp_path, number):
    process = start(*flags, tmp_path / "broken", "--save-every", "1000")
    wait_for(tmp_path / "broken" / NAME / "last.pt")        # after the first epoch
    os.kill(process.pid, getattr(signal, number))
    assert finish(process) == 1
    assert start.output().splitlines()[-1].startswith("stopped, and saved in") and "same command goes on" in start.output()
    assert finish(start(*flags, tmp_path / "broken")) == 0
    assert "going on from epoch" in start.output()
    assert finish(start(*flags, tmp_path / "whole")) == 0
    assert same(ending(tmp_path / "broken"), ending(tmp_path / "whole"))


def test_a_full_disk_keeps_the_checkpoint_before(flags, start, tmp_path):
    process = start(*flags, tmp_path / "broken")
    wait_for(tmp_path / "broken" / NAME / "previous.pt")
    process.kill()
    process.join()
    before = torch.load(tmp_path / "broken" / NAME / "last.pt")
    assert finish(start(*flags, tmp_path / "broken", file_size=100_000)) == 1
    output = start.output()
    assert "could not write in" in output and "File too large" in output and "Traceback" not in output
    after = torch.load(tmp_path / "broken" / NAME / "last.pt")
    assert (before["epoch"], before["step"]) == (after["epoch"], after["step"])
    assert not list((tmp_path / "broken" / NAME).glob("*.partial"))
    assert finish(start(*flags, tmp_path / "broken")) == 0
    assert finish(start(*flags, tmp_path / "whole")) == 0
    assert same(ending(tmp_path / "broken"), ending(tmp_path / "whole"))


def test_a_truncated_checkpoint_costs_one_save(flags, start, tmp_path):
    process = start(*flags, tmp_path / "broken")
    wait_for(tmp_path / "broken" / NAME / "previous.pt")
    process.kill()
    process.join()
    last = tmp_path / "broken" / NAME / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    assert finish(start(*flags, tmp_path / "broken")) == 0
    assert "last.pt is damaged (kept as last.damaged); going on from the save before it" in start.output()
    assert finish(start(*flags, tmp_path / "whole")) == 0
    assert same(ending(tmp_path / "broken"), ending(tmp_path / "whole"))


def test_the_second_process_in_one_folder_is_refused(flags, start, tmp_path):
    first = start(*flags, tmp_path / "runs")
    wait_for(tmp_path / "runs" / NAME / "config.json")
    assert finish(start(*flags, tmp_path / "runs")) == 1
    assert "another process is running in" in start.output()
    first.kill()
    first.join()
    assert finish(start(*flags, tmp_path / "runs")) == 0        # a killed process leaves no lock behind
