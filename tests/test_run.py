"""A run's folder: atomic checkpoints, a log cut back to them, another recipe refused."""

import errno
import json
import multiprocessing
import os
import time

import filelock
import pytest
import torch

from cli import duration, pick_device
from run import Run, RunError

RECIPE, FACTS = {"student": "resnet8", "lr": 0.05, "stages": (150, 180)}, {"torch": "2.15", "command": "x"}


def opened(folder, recipe=RECIPE, facts=FACTS):
    run = Run(folder, recipe, facts)
    state = run.open()
    run.close()         # as the end of a process would
    return run, state


def test_a_new_run_writes_its_configuration(tmp_path):
    _, state = opened(tmp_path / "a")
    assert state is None
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config == {"recipe": {"student": "resnet8", "lr": 0.05, "stages": [150, 180]}, "facts": FACTS}


def test_another_recipe_is_refused_and_nothing_is_touched(tmp_path):
    run, _ = opened(tmp_path)
    run.log({"epoch": 1})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert "config.json" in before
    with pytest.raises(RunError, match="another recipe .lr was 0.05, now 0.1; beta was None, now 2.*"
                                       "another --out"):
        opened(tmp_path, RECIPE | {"lr": 0.1, "beta": 2})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_other_facts_are_a_notice(tmp_path, capsys):
    opened(tmp_path)
    opened(tmp_path, facts={"torch": "2.16", "command": "y"})
    assert "torch was 2.15, now 2.16" in capsys.readouterr().out


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    run, _ = opened(tmp_path)
    for epoch in (1, 2, 3):
        run.log({"epoch": epoch, "loss": 1 / 3})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 4, "lo')                 # killed in the middle of a write
    run.save({"epoch": 2})
    assert opened(tmp_path)[1] == {"epoch": 2}
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"epoch": 1, "loss": 0.333333}, {"epoch": 2, "loss": 0.333333}]


@pytest.mark.parametrize("harm", [lambda data: data[:100], lambda data: b"", lambda data: (
    data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:])],
                         ids=["cut", "empty", "a flipped bit"])
def test_a_damaged_checkpoint_costs_one_save(tmp_path, capsys, harm):
    """torch.load itself gives a flipped bit back."""
    run, _ = opened(tmp_path)
    for epoch in (1, 2):
        run.save({"epoch": epoch, "w": torch.ones(10_000)})
    (tmp_path / "last.pt").write_bytes(harm((tmp_path / "last.pt").read_bytes()))
    assert opened(tmp_path)[1]["epoch"] == 1
    assert "last.pt is damaged" in capsys.readouterr().out


def test_a_damaged_checkpoint_never_replaces_the_good_one(tmp_path):
    run, _ = opened(tmp_path)
    run.save({"epoch": 1})
    run.save({"epoch": 2})
    (tmp_path / "last.pt").write_bytes(b"damaged")
    run, _ = opened(tmp_path)
    run.save({"epoch": 2})
    (tmp_path / "last.pt").write_bytes(b"damaged again")
    assert opened(tmp_path)[1] == {"epoch": 1}


def test_trouble_of_the_disk_is_not_taken_for_damage(tmp_path, monkeypatch):
    run, _ = opened(tmp_path)
    run.log({"epoch": 1})
    run.save({"epoch": 1})

    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    for module, name in ((torch, "load"), (type(tmp_path), "read_bytes")):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(module, name, fails)
            run = Run(tmp_path, RECIPE, FACTS)
            run.open()
        run.close()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"epoch": 2, "\xff')       # nor is a byte of the log that is no text
    assert opened(tmp_path)[1] == {"epoch": 1} and (tmp_path / "log.jsonl").read_text()


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    opened(tmp_path)
    opened(tmp_path)


def test_a_finished_run_keeps_its_log_without_its_checkpoints(tmp_path):
    run, _ = opened(tmp_path)
    run.log({"epoch": 1})
    run.finish({"last": 1}, {})
    opened(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n'


def test_a_failed_write_leaves_no_file_and_the_last_checkpoint(tmp_path):
    run, _ = opened(tmp_path)
    run.save({"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        run.save({"epoch": 2, "x": lambda: None})
    assert opened(tmp_path)[1] == {"epoch": 1}
    assert not list(tmp_path.glob("*.partial"))


def test_student_file_and_result(tmp_path):
    run, _ = opened(tmp_path)
    assert run.finished() is None
    run.finish({"last": {"top1": 41.123456789}, "minutes": float("nan")},
               {"model": {"w": torch.ones(2)}, "seed": 0})
    assert run.finished() == {"last": {"top1": 41.1235}, "minutes": None}
    assert torch.load(tmp_path / "student.pt", weights_only=True)["seed"] == 0


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(RunError, match="--device cuda: PyTorch finds only cpu here"):
        pick_device("cuda")
    assert pick_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"


def test_durations_are_in_the_largest_unit():
    assert [duration(x) for x in (45, 900, 11520, 360000)] == ["45 s", "15 min", "3.2 h", "4.2 days"]


def test_two_damaged_checkpoints_begin_from_the_start_and_say_so(tmp_path, capsys):
    run, _ = opened(tmp_path)
    run.log({"epoch": 1})
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"")
    assert opened(tmp_path)[1] is None and "or from the start" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not write in .*file.*choose another --out"):
        opened(tmp_path / "file")
    with pytest.raises(RunError, match="could not write in"):
        opened(tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "fork"),
                    reason="a child shares files with its parent where there is fork alone")
def test_a_child_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    """Loading processes live on for seconds when the run is killed; the restarted one must not be refused."""
    run = Run(tmp_path / "run", {}, {})
    run.open()
    fork = multiprocessing.get_context("fork")
    there = fork.Event()
    child = fork.Process(target=lambda: (there.set(), time.sleep(60)))
    child.start()
    try:
        assert there.wait(30)
        run.close()
        again = Run(tmp_path / "run", {}, {})
        again.open()
        again.close()
    finally:
        child.kill()
