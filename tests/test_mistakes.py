"""Every mistake of a user is one line that says what was wrong and what to do; nothing is overwritten."""

import importlib
import shutil

import click
import pytest
import torch
from click.testing import CliRunner

import cli
import data
import distill
import teacher
import train_cifar
from checkpoints import load_weights
from models import create_model
from train_cifar import main

PAIR = "--teacher resnet14 --teacher-checkpoint teacher.pt --student resnet8 "
ALONE = "--method none --student resnet8 "
MADE = "--data synthetic --train-images 96 --epochs 1 "


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a good teacher and a collection of bad files; no network, no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (200, 64))
    monkeypatch.setattr(teacher, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(train_cifar, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    torch.save(create_model("resnet14").state_dict(), "teacher.pt")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "teacher.pt").read_bytes()[:20_000])
    torch.save(create_model("resnet20").state_dict(), "other.pt")
    torch.save(create_model("resnet14", 10).state_dict(), "classes.pt")
    torch.save({"model": create_model("resnet14").state_dict(), "x": Bomb()}, "bomb.pt")
    torch.save({"epoch": 3}, "nothing.pt")
    torch.save(create_model("resnet14").state_dict() | {"fc.bias": torch.tensor(1.0)}, "number.pt")
    for name in ("damaged", "cifar10"):
        (tmp_path / name / "cifar-100-python").mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (tmp_path / "damaged" / "cifar-100-python" / name).write_bytes(b"\x80\x04no")
    shutil.rmtree(tmp_path / "cifar10" / "cifar-100-python")
    (tmp_path / "cifar10" / "cifar-10-batches-py").mkdir()
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8bhalf")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


USAGE = [       # exit code 2: the command itself is wrong
    ("--teacher resnet32x5 --student resnet8x4",
     "--teacher resnet32x5: no such network; known, the nearest first: resnet32x4, "),
    ("--teacher resnet56 --student ResNet8",
     "--student ResNet8: no such network; known, the nearest first: resnet8, "),
    (ALONE.replace("resnet8", "vgg9"),
     "--student vgg9: no such network; known, the nearest first: vgg19, vgg8, "),
    (PAIR + "--method kdd", "'kdd' is not known; known, the nearest first: kd, dkd, "),
    (PAIR + "--data cifar", "'cifar' is not known; known, the nearest first: cifar10, cifar100, "),
    (PAIR + "--device gpu", "'gpu' is not known; known, the nearest first: cpu, "),
    (PAIR + "--precision fp16", "'fp16' is not known; known, the nearest first: bf16, fp32"),
    (PAIR + "--recipe author", "'author' is not known; known, the nearest first: authors, released"),
    (PAIR + "--zscor", "No such option"),
    (PAIR + "extra", "unexpected extra argument"),
    (PAIR + "--lr", "requires an argument"),
    ("--teacher resnet56", "name a --student and a --teacher; --list shows the pairs"),
    ("--student resnet8", "name a --teacher (or train the student alone: --method none)"),
    ("--method none", "name a --student; --list shows the pairs"),
    ("", "name a --student and a --teacher"),
    (ALONE + "--zscore", "--zscore needs a method that distils"),
    (PAIR + "--base-temp 0", "'--base-temp': 0.0 is not in the range x>0"),
    (PAIR + "--base-temp -2", "'--base-temp': -2.0 is not in the range x>0"),
    (PAIR + "--base-temp nan", "'--base-temp': nan is not a finite number"),
    (PAIR + "--base-temp inf", "'--base-temp': inf is not a finite number"),
    (PAIR + "--base-temp two", "'--base-temp': 'two' is not a valid float"),
    (PAIR + "--kd-weight -9", "'--kd-weight': -9.0 is not in the range x>=0"),
    (PAIR + "--kd-weight nan", "'--kd-weight': nan is not a finite number"),
    (PAIR + "--ce-weight -0.1", "'--ce-weight': -0.1 is not in the range x>=0"),
    (PAIR + "--weight-decay -1", "'--weight-decay': -1.0 is not in the range x>=0"),
    (PAIR + "--lr 0", "'--lr': 0.0 is not in the range x>0"),
    (PAIR + "--lr nan", "'--lr': nan is not a finite number"),
    (PAIR + "--epochs 0", "'--epochs': 0 is not in the range x>=1"),
    (PAIR + "--epochs 1.5", "'--epochs': '1.5' is not a valid integer"),
    (PAIR + "--batch-size 0", "'--batch-size': 0 is not in the range x>=1"),
    (PAIR + MADE + "--batch-size 97 --lr 0.05", "--batch-size 97: there are 96 training images"),
    (PAIR + "--seed -1", "'--seed': -1 is not in the range"),
    (PAIR + "--seeds 0", "'--seeds': 0 is not in the range x>=1"),
    (PAIR + "--train-images 0", "'--train-images': 0 is not in the range x>=1"),
    (PAIR + "--val-from-train -5", "'--val-from-train': -5 is not in the range x>=0"),
    (PAIR + "--save-every 0", "'--save-every': 0.0 is not in the range x>0"),
    (PAIR + "--beta 2", "--beta is for --method dkd, rld, dist, not kd"),
    (PAIR + "--method dkd --no-zscore-relations", "--zscore-relations is for --method mlkd, not dkd"),
    (PAIR + "--method dkd --alpha -1", "'--alpha': -1.0 is not in the range x>=0"),
    (PAIR + "--method mlkd --zscore-relations", "--zscore-relations needs --zscore"),
    (PAIR + "--method dist --alpha 1", "--alpha is for --method dkd, rld, not dist"),
    (PAIR + "--method dist --entropy-weight",
     "--entropy-weight weights the losses of samples, which --method dist does not have"),
    (ALONE + "--entropy-weight", "which --method none does not have"),
    (PAIR + MADE + "--method dist --batch-size 95 --lr 0.05",
     "--method dist compares images, and of 96 in batches of 95 one is alone"),
    (ALONE + "--kd-weight 7", "--kd-weight is for a method that distils, not for --method none"),
    ("--demo --epochs 3", "--demo takes no --epochs; it has its own"),
    ("--demo --val-from-train 500", "--demo takes no --val-from-train; it has its own"),
    ("--eval teacher.pt --student resnet57 --data synthetic",
     "--student resnet57: no such network; known, the nearest first: resnet5"),
]
OTHER = [       # exit code 1: the command is right, the world is not
    (PAIR + MADE + "--device cuda",
     "--device cuda: PyTorch finds none here; leave the flag out, it finds cpu"),
    (ALONE, "no CIFAR-100 in data, or it is damaged"),
    (ALONE + "--data-dir cifar10", "no CIFAR-100 in cifar10, or it is damaged"),
    (ALONE + "--data-dir damaged",
     "no CIFAR-100 in damaged, or it is damaged"),
    (ALONE + "--data-dir download", "no CIFAR-100 in download, or it is damaged"),
    (ALONE + "--data-dir file", "no CIFAR-100 in file, or it is damaged"),
    (ALONE + "--data synthetic --train-images 201", "--train-images 201: there are 200 training images"),
    (ALONE + "--data synthetic --val-from-train 200",
     "--val-from-train 200 leaves nothing of 200 training images"),
    *[(PAIR.replace("teacher.pt", name) + MADE, words) for name, words in (
        ("text.pt", "text.pt is a Git LFS pointer: fetch the file"),
        ("empty.pt", "empty.pt is not loaded (damaged, "),
        ("cut.pt", "cut.pt is not loaded (damaged, "),
        ("other.pt", "other.pt is not a resnet14 but a resnet20: "),
        ("classes.pt", "classes.pt is for 10 classes, this resnet14 is for 100"),
        ("bomb.pt",
         "bomb.pt is not loaded (io.open in it could run code)"),
        ("nothing.pt", "nothing.pt is not a resnet14"),
        ("missing.pt", "missing.pt: No such file"),
        ("damaged", "damaged: Is a directory"))],
    ("--eval bomb.pt --student resnet14 --data synthetic", "bomb.pt is not loaded (io.open in it"),
    ("--eval empty.pt --student resnet14 --data synthetic", "empty.pt is not loaded (damaged, "),
    ("--eval missing.pt", "missing.pt: No such file"),
    ("--eval number.pt --student resnet14 --data synthetic",
     "number.pt is not a resnet14: fc.bias is () there and (100,) here"),
    (PAIR + MADE + "--out file", "could not write in file"),
    (PAIR + MADE + "--out file/below", "could not write in file"),
    (ALONE + MADE + "--lr 1e38 --train-images 64",
     "the loss became infinite in epoch 1, by step 1; the last save in"),
    (ALONE + MADE + "--lr 1e38", "the loss became infinite in epoch 1, by step 2; the last save in"),
]


def call(arguments):
    result = CliRunner().invoke(main, arguments.split(), catch_exceptions=False)
    return result.exit_code, result.output


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent.name != "download"}


@pytest.mark.parametrize("code, arguments, words",
                         [*((2, *case) for case in USAGE), *((1, *case) for case in OTHER)])
def test_a_mistake_is_one_line_and_overwrites_nothing(code, arguments, words, folder):
    before = contents(folder)
    got, output = call(arguments)
    assert got == code, output
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and output.splitlines()[-1] == errors[0], output
    assert words in errors[0] and "Traceback" not in output
    if code == 2 and "97" not in arguments:
        assert output.splitlines() == errors        # usage is checked before anything is done
    after = contents(folder)
    assert all(after[path] == content for path, content in before.items())
    assert not (folder / "bomb-went-off").exists()


def test_the_table_is_long_enough():
    assert len(USAGE) + len(OTHER) >= 40


def test_a_run_folder_of_another_recipe_is_left_alone(folder):
    assert call(PAIR + MADE)[0] == 0
    before = contents(folder)
    for change in ("--lr 0.1", "--kd-weight 3", "--base-temp 3", "--epochs 2", "--batch-size 48 --lr 0.05",
                   "--precision bf16"):
        code, output = call(f"{PAIR}{MADE}{change}")
        assert (code == 1 and "holds a run of another recipe" in output.splitlines()[-1]
                and "another --out" in output)
    assert contents(folder) == before


def test_a_damaged_configuration_is_named(folder):
    assert call(PAIR + MADE)[0] == 0
    config = next((folder / "runs").rglob("config.json"))
    for text in ("", "[]", '{"recipe": 3}'):
        config.write_text(text)
        code, output = call(PAIR + MADE)
        assert code == 1 and ("config.json is not a run's configuration; choose another --out"
                              in output.splitlines()[-1])


def test_a_pair_without_a_recipe_says_what_it_takes(folder):
    output = call(PAIR + MADE + "--zscore")[1]
    assert ("no published recipe for resnet14 -> resnet8: taking learning rate 0.05, base temperature 2, "
            "weight 9") in output
    given = train_cifar.parsed("--teacher resnet14 --student resnet8 --zscore --lr 0.3 --kd-weight 2".split())
    assert train_cifar.resolve(given, torch.device("cpu"))[1] == [
        "no published recipe for resnet14 -> resnet8: taking learning rate 0.3, base temperature 2, weight 2"]


def test_a_loss_that_becomes_nan_keeps_the_last_good_checkpoint(folder, monkeypatch):
    calls = []

    def breaks(*arguments, real=distill.distillation_loss, **more):
        calls.append(1)
        return real(*arguments, **more) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(distill, "distillation_loss", breaks)
    code, output = call(PAIR + MADE + "--epochs 3 --batch-size 32 --lr 0.01 --save-every 1e-9")
    assert code == 1 and "the loss became infinite in epoch 2, by step 3; " in output.splitlines()[-1]
    state = torch.load(next((folder / "runs").rglob("last.pt")))
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(v.isfinite().all() for v in state["model"].values())
    assert len(next((folder / "runs").rglob("log.jsonl")).read_text().splitlines()) == 1
    monkeypatch.undo()


def test_a_teacher_of_nans_is_named_as_the_cause(folder):
    state = create_model("resnet14").state_dict()
    state["fc.bias"][3] = float("nan")
    torch.save(state, "nan.pt")
    code, output = call(PAIR.replace("teacher.pt", "nan.pt") + MADE)
    assert code == 1 and "the teacher's logits are NaN or do not fit" in output.splitlines()[-1]


def test_help_says_what_everything_is():
    code, output = call("--help")
    assert code == 0 and "--base-temp TAU" in output and "the paper's KD+Z" in output


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
    shutil.copy("teacher.pt", home / "t.pt")
    (home / "nets.py").write_text("import models\n\n\ndef tiny(num_classes):\n"
                                  "    return models.create_model('resnet8', num_classes)\n")
    code, output = call("--teacher resnet14 --teacher-checkpoint=~/t.pt --student=~/nets.py:tiny --out=~/x "
                        + MADE)
    assert code == 0, output
    assert (home / "x" / "resnet14-nets-tiny-kd-synthetic-seed0" / "student.pt").is_file()
    assert not (folder / "~").exists()
    assert load_weights(create_model("resnet14"), "~/t.pt") == {}
    arguments = "--eval=~/x/resnet14-nets-tiny-kd-synthetic-seed0/student.pt"
    assert "top-1" in call(arguments)[1]


SCRIPTS = "train_cifar", "train_imagenet", "export", "reproduce", "figures"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_path_flag_is_of_the_type_that_expands_a_tilde(script):
    options = importlib.import_module(script).main.params
    paths = [p for p in options if p.metavar in ("DIR", "FILE") or isinstance(p.type, click.Path)]
    assert len(paths) >= 2 and all(isinstance(p.type, cli.UserPath) for p in paths)
