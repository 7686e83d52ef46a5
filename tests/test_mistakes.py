"""Every mistake of a user is one line that says what was wrong and what to do; nothing is overwritten."""

import importlib

import click
import pytest
import torch
from click.testing import CliRunner

import cli
import data
import distill
import teacher
from checkpoints import load_weights
from models import create_model
from train_cifar import main

PAIR = "--teacher resnet14 --teacher-checkpoint teacher.pt --student resnet8 "
ALONE = "--method none --student resnet8 "
MADE = "--data synthetic --train-images 96 --epochs 1 "
SCRIPTS = "train_cifar", "train_imagenet", "export", "reproduce", "figures"


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a good teacher and a collection of bad files; no network, no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (200, 64))
    monkeypatch.setattr(teacher, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    torch.save(create_model("resnet14").state_dict(), "teacher.pt")
    torch.save(create_model("resnet14", 10).state_dict(), "classes.pt")
    torch.save({"model": create_model("resnet14").state_dict(), "x": Bomb()}, "bomb.pt")
    (tmp_path / "damaged" / "cifar-100-python").mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (tmp_path / "damaged" / "cifar-100-python" / name).write_bytes(b"\x80\x04no")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


USAGE = [       # exit code 2: the command itself is wrong
    ("--teacher resnet32x5 --student resnet8x4",
     "--teacher resnet32x5: no such network; known, the nearest first: resnet32x4, "),
    (ALONE.replace("resnet8", "resnet50"),       # not resnet56
     "--student resnet50: no such network; known, the nearest first: ResNet50, "),
    ("--teacher resnet56", "name a --student; --list shows the pairs"),
    ("--student resnet8", "name a --teacher; --list shows the pairs, --method none takes no teacher"),
    ("--method none --student resnet8 --feature crd", "name a --teacher"),
    (ALONE + "--zscore", "--zscore is for --method kd, dkd, mlkd, ctkd, ttm, wttm, dist, rld, not none"),
    (ALONE + "--kd-weight 7", "--kd-weight is for --method kd, "),
    (PAIR + "--beta 2", "--beta is for --method dkd, rld, dist, not kd"),
    (PAIR + "--method dist --entropy-weight", "mlkd, ctkd, ttm, wttm, rld, not dist"),
    (PAIR + "--method dkd --no-zscore-relations", "--zscore-relations is for --method mlkd, not dkd"),
    (PAIR + "--method mlkd --zscore-relations", "--zscore-relations needs --zscore"),
    (PAIR + "--feature-weight 3", "--feature-weight needs --feature"),
    (PAIR + "--size 64", "--size is for --data folder"),
]
OTHER = [       # exit code 1: the command is right, the world is not
    (PAIR + MADE + "--device cuda", "--device cuda: PyTorch finds only cpu here"),
    (ALONE, "no CIFAR-100 in data, or it is damaged"),
    (ALONE + "--data-dir damaged", "no CIFAR-100 in damaged, or it is damaged"),
    ("--eval teacher.pt", "no CIFAR-100 in data, or it is damaged"),        # a resnet14 by its keys
    (ALONE + "--data synthetic --train-images 201", "--train-images 201: there are 200 training images"),
    (ALONE + "--data synthetic --val-from-train 200",
     "--val-from-train 200 leaves nothing of 200 training images"),
    *[(PAIR.replace("teacher.pt", name) + MADE, words) for name, words in (
        ("classes.pt", "classes.pt is for 10 classes, this resnet14 is for 100"),
        ("bomb.pt", "bomb.pt is not loaded (io.open in it could run code)"),
        ("missing.pt", "missing.pt: No such file"))],
    ("--eval bomb.pt --student resnet14 --data synthetic", "bomb.pt is not loaded (io.open in it"),
    ("--eval missing.pt", "missing.pt: No such file"),
    (PAIR + MADE + "--out file", "could not write in file"),
    ("--eval classes.pt --data synthetic", "classes.pt is for 10 classes, these images have 100"),
    ("--eval teacher.pt --student resnet8 --data synthetic", "teacher.pt is not a resnet8 but a resnet14"),
    (ALONE + MADE + "--lr 1e38", "in epoch 1, "),
]


def call(arguments):
    result = CliRunner().invoke(main, arguments.split(), catch_exceptions=False)
    return result.exit_code, result.output


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("code, arguments, words",
                         [*((2, *case) for case in USAGE), *((1, *case) for case in OTHER)])
def test_a_mistake_is_one_line_and_overwrites_nothing(code, arguments, words, folder):
    before = contents(folder)
    got, output = call(arguments)
    assert got == code, output
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and output.splitlines()[-1] == errors[0], output
    assert words in errors[0] and "Traceback" not in output
    if code == 2:
        assert output.splitlines() == errors        # usage is checked before anything is done
    after = contents(folder)
    assert all(after[path] == content for path, content in before.items())
    assert not (folder / "bomb-went-off").exists()


def test_a_damaged_configuration_is_named(folder):
    assert call(PAIR + MADE)[0] == 0
    config = next((folder / "runs").rglob("config.json"))
    for text in ("", "[]", '{"recipe": 3}'):
        config.write_text(text)
        code, output = call(PAIR + MADE)
        assert code == 1 and "config.json is not a run's configuration" in output.splitlines()[-1]


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(folder, monkeypatch):
    calls = []

    def breaks(*arguments, real=distill.distillation_loss, **more):
        calls.append(1)
        return real(*arguments, **more) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(distill, "distillation_loss", breaks)
    code, output = call(PAIR + MADE + "--epochs 3 --batch-size 32 --lr 0.01 --save-every 1e-9")
    assert code == 1 and "in epoch 2, " in output.splitlines()[-1]
    state = torch.load(next((folder / "runs").rglob("last.pt")))
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(v.isfinite().all() for v in state["model"].values())
    assert len(next((folder / "runs").rglob("log.jsonl")).read_text().splitlines()) == 1


def test_a_teacher_of_nans_ends_the_run(folder):
    state = create_model("resnet14").state_dict()
    state["fc.bias"][3] = float("nan")
    torch.save(state, "nan.pt")
    code, output = call(PAIR.replace("teacher.pt", "nan.pt") + MADE)
    assert code == 1 and output.splitlines()[-1].startswith("Error: ")


def test_help_is_grouped():
    code, output = call("--help")
    assert code == 0 and "--base-temp NUMBER" in output and "the paper's KD+Z" in output
    assert [line for line in output.splitlines() if line.endswith(":") and line[:1].isupper()] == [
        "Data:", "Method:", "Recipe:", "Run:", "Machine:", "Options:"]
    result = CliRunner().invoke(importlib.import_module("train_imagenet").main, ["--help"])
    assert "[at|rkd|crd|simkd]" in result.output and "--seeds" not in result.output


def test_several_processes_are_refused(monkeypatch):
    """Each would train on the whole batch."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, output = call(ALONE + MADE)
    assert code == 2 and "train_cifar.py is one process: start it without torchrun" in output


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    """bash leaves it in --out=~/x, and in Python nothing else replaces it."""
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "t.pt").write_bytes((folder / "teacher.pt").read_bytes())
    (home / "nets.py").write_text("import models\n\n\ndef tiny(num_classes):\n"
                                  "    return models.create_model('resnet8', num_classes)\n")
    code, output = call("--teacher resnet14 --teacher-checkpoint=~/t.pt --student=~/nets.py:tiny --out=~/x "
                        + MADE)
    assert code == 0, output
    student, = home.glob("x/resnet14*-nets-tiny-kd-*/student.pt")
    assert not (folder / "~").exists()
    assert load_weights(create_model("resnet14"), "~/t.pt") == {}
    assert "top-1" in call(f"--eval=~/{student.relative_to(home)}")[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_path_flag_is_of_the_type_that_expands_a_tilde(script):
    options = importlib.import_module(script).main.params
    named = [p for p in options if p.name.endswith(("_dir", "_checkpoint", "out", "_file"))]
    paths = [p for p in options if p.metavar in ("DIR", "FILE", "FOLDER") or isinstance(p.type, click.Path)]
    assert paths and all(isinstance(p.type, cli.UserPath) for p in [*named, *paths])
