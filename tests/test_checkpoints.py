"""Checkpoint files as the field's code writes them load, or are refused in one line that says what to do."""

import argparse
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from torch.optim.swa_utils import AveragedModel

from checkpoints import FromNumpy, load_weights, open_checkpoint, read_checkpoint
from data import Preprocessing
from models import create_model


def trained(name="resnet8", seed=1):
    """A network whose state is not the initial one, its batch norm counters included."""
    torch.manual_seed(seed)
    model = create_model(name).train()
    model(torch.rand(4, 3, 32, 32))
    return model


def optimizer_after_a_drop(model, lr=0.05):
    """SGD as RepDistiller and mdistiller leave it: after the first drop, its lr is a numpy.float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    (1e-3 * model(torch.rand(8, 3, 32, 32)).mean()).backward()
    optimizer.step()
    steps = np.sum(240 > np.asarray([150, 180, 210]))
    for group in optimizer.param_groups:
        group["lr"] = lr * (0.1 ** steps)
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    return optimizer.state_dict()


class Distiller(torch.nn.Module):
    """As mdistiller's: both networks inside, student first."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher


# the keys, and their order, that each code gives torch.save
def repdistiller_teacher(model):
    return {"epoch": 240, "model": model.state_dict(), "accuracy": torch.tensor(72.3),
            "optimizer": optimizer_after_a_drop(model)}


def repdistiller_best(model):
    return {"epoch": 213, "model": model.state_dict(), "best_acc": torch.tensor(72.3),
            "optimizer": optimizer_after_a_drop(model)}


def repdistiller_last(model):
    flags = argparse.Namespace(learning_rate=0.05, lr_decay_epochs=[150, 180, 210], trial="1",
                               path_t="x.pth", n_cls=100, cosine=False)
    return {"opt": flags, "model": model.state_dict(), "optimizer": optimizer_after_a_drop(model)}


def mdistiller_latest(model):
    distiller = torch.nn.DataParallel(Distiller(model, trained("resnet14", 2)))
    return {"epoch": 240, "model": distiller.state_dict(), "optimizer": optimizer_after_a_drop(model),
            "best_acc": np.float64(71.25)}


def mdistiller_student(model):
    return {"model": model.state_dict()}


def lightning(model, prefix="model."):
    return {"epoch": 3, "global_step": 99, "pytorch-lightning_version": "2.5.0",
            "state_dict": {prefix + k: v for k, v in model.state_dict().items()},
            "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {},
            "optimizer_states": [optimizer_after_a_drop(model)], "lr_schedulers": [],
            "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1}}


def prefixed(prefix):
    return lambda model: {prefix + k: v for k, v in model.state_dict().items()}


def under(key):
    return lambda model: {key: model.state_dict(), "epoch": 3}


FORMATS = {
    "bare": lambda m: m.state_dict(),
    "RepDistiller ckpt_epoch_240.pth": repdistiller_teacher,
    "RepDistiller resnet8_best.pth": repdistiller_best,
    "RepDistiller resnet8_last.pth": repdistiller_last,
    "mdistiller latest and best": mdistiller_latest,
    "mdistiller student_best": mdistiller_student,
    "the issue's smallest": lambda m: {"model": m.state_dict(),
                                       "optimizer": {"param_groups": [{"lr": np.float64(5e-5)}]}},
    "NumPy's generator, arrays, types": lambda m: {
        "model": m.state_dict(), "rng": np.random.RandomState(0).get_state(),
        "mean": np.ones(3), "names": np.array(["a"]), "dtype": np.dtype("f8"), "n": np.int64(3)},
    "counted by thop": lambda m: m.state_dict() | {"total_ops": torch.zeros(1),
                                                   "layer1.0.conv1.total_params": torch.zeros(1)},
    "pytorch/examples": lambda m: {"epoch": 90, "arch": "resnet8", "state_dict": prefixed("module.")(m),
                                   "best_acc1": torch.tensor(1.0)},
    "Lightning": lightning,
    "Lightning, net.": lambda m: lightning(m, "net."),
    "torch.compile of DistributedDataParallel": lambda m: {"model": prefixed("_orig_mod.module.")(m)},
    "backbone in a wrapper in a wrapper": prefixed("module._orig_mod.model.backbone."),
    "AveragedModel": lambda m: AveragedModel(m).state_dict(),
    "DeepSpeed": lambda m: {"module": m.state_dict(), "global_steps": 3},
    "float16": lambda m: {"model": {k: v.half() if v.is_floating_point() else v
                                    for k, v in m.state_dict().items()}},
    "old, without counters": lambda m: {k: v for k, v in m.state_dict().items()
                                        if not k.endswith("num_batches_tracked")},
    **{key: under(key) for key in ("net", "model_state_dict", "model_ema", "student")},
}
OLD = [name for name in FORMATS if name.startswith(("Rep", "mdistiller", "NumPy"))]


@pytest.mark.parametrize("name, container", [*((name, "zip") for name in FORMATS),
                                             *((name, "before torch 1.6") for name in OLD)])
def test_every_format_of_the_field_loads(name, container, tmp_path):
    source, path = trained(), tmp_path / "checkpoint"
    expected = {k: v.clone() for k, v in source.state_dict().items()}
    content = FORMATS[name](source)
    expected |= {k: v for k, v in source.state_dict().items()       # they trained on
                 if name.startswith(("RepDistiller", "mdistiller", "Lightning"))}
    torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    model = create_model("resnet8")
    load_weights(model, path)
    for key, value in expected.items():
        if name == "float16" and value.is_floating_point():
            value = value.half().float()
        if name.startswith("old") and key.endswith("num_batches_tracked"):
            continue
        assert torch.equal(model.state_dict()[key], value), key
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_safetensors_loads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, model = trained(), create_model("resnet8")
    safetensors.save_file(source.state_dict(), tmp_path / "x.safetensors")
    load_weights(model, tmp_path / "x.safetensors")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:900])
    with pytest.raises(ValueError, match="is a damaged safetensors file"):
        load_weights(model, tmp_path / "x.safetensors")


def test_no_numpy_code_runs_on_a_files_bytes(tmp_path):
    """The names come from the file's own list; none of them is resolved."""
    torch.save({"lr": np.float64(0.1), "array": np.arange(3), "type": np.float32}, tmp_path / "x.pt")
    content = read_checkpoint(tmp_path / "x.pt")
    assert all(type(content[key]) is FromNumpy and not vars(content[key]) for key in ("lr", "array"))
    assert content["type"] is FromNumpy


@pytest.mark.parametrize("wanted", ["student", "teacher"])
def test_of_a_student_and_a_teacher_the_wanted_half_is_taken_with_a_notice(wanted, tmp_path, capsys):
    halves = {"student": trained(seed=1), "teacher": trained(seed=2)}
    torch.save({"model": torch.nn.DataParallel(Distiller(**halves)).state_dict()}, tmp_path / "latest")
    model = create_model("resnet8")
    load_weights(model, tmp_path / "latest", prefer=wanted)
    assert torch.equal(model.fc.weight, halves[wanted].fc.weight)
    assert capsys.readouterr().out == (
        f"notice: {tmp_path / 'latest'} has weights of a resnet8 at model.module.student, "
        f"model.module.teacher; taking model.module.{wanted}\n")


def test_raw_weights_come_before_their_average_with_a_notice(tmp_path, capsys):
    raw, mean = trained(seed=1), trained(seed=2)
    model = create_model("resnet8")
    torch.save({"state_dict_ema": mean.state_dict(), "state_dict": raw.state_dict()}, tmp_path / "timm.pth")
    load_weights(model, tmp_path / "timm.pth")
    assert torch.equal(model.fc.weight, raw.fc.weight)
    assert capsys.readouterr().out.endswith("taking state_dict\n")
    torch.save({"ema": {"module": mean.state_dict()}, "epoch": 3}, tmp_path / "mean.pth")
    load_weights(model, tmp_path / "mean.pth")
    assert torch.equal(model.fc.weight, mean.fc.weight) and not capsys.readouterr().out


def test_a_teachers_half_alone_is_not_taken_for_a_student_without_a_word(tmp_path, capsys):
    torch.save({"model": torch.nn.DataParallel(
        Distiller(trained("resnet14"), trained("resnet8", 2))).state_dict()}, tmp_path / "latest")
    load_weights(create_model("resnet8"), tmp_path / "latest")
    assert "taking model.module.teacher" in capsys.readouterr().out
    load_weights(create_model("resnet14"), tmp_path / "latest")
    assert not capsys.readouterr().out


def test_a_files_metadata_is_returned(tmp_path):
    torch.save({"model": trained().state_dict(), "student": "resnet8", "top1": 41.5, "optimizer": {},
                "best": np.float64(3)}, tmp_path / "student.pt")
    assert load_weights(create_model("resnet8"), tmp_path / "student.pt") == {
        "student": "resnet8", "top1": 41.5}


def test_the_archive_of_mdistillers_teachers_is_read_as_it_is(tmp_path):
    """364 MB of six teachers with their optimizers: the file that people have."""
    source, path = trained("resnet56"), tmp_path / "cifar_teachers.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("vgg13", b"not read"), ("resnet56", None)):
            buffer = io.BytesIO(content or b"")
            if content is None:
                torch.save(repdistiller_teacher(source), buffer, _use_new_zipfile_serialization=False)
            member = tarfile.TarInfo(f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth")
            member.size = len(buffer.getvalue())
            buffer.seek(0)
            archive.addfile(member, buffer)
    model = create_model("resnet56")
    load_weights(model, path)
    assert torch.equal(model.fc.weight, source.fc.weight)
    with pytest.raises(ValueError,
                       match="is a tar archive without resnet8_vanilla"):
        load_weights(create_model("resnet8"), path)
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(ValueError, match="cifar_teachers.tar is a damaged tar archive"):
        load_weights(model, path)


# ---------------------------------------------------------------- what is refused


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def bad_files(folder):
    """{name of a file that is made: words of the error}."""
    state = trained().state_dict()
    torch.save(state, folder / "good.pt")
    good = (folder / "good.pt").read_bytes()
    torch.jit.trace(create_model("resnet8").eval(), torch.rand(1, 3, 32, 32)).save(folder / "script.pt")
    damaged = (r"is not loaded \(damaged, or no PyTorch checkpoint\); where it was made: "
               r"torch\.save\(model\.state_dict\(\), 'clean\.pt'\)$")
    cases = {
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                       "is a Git LFS pointer: fetch the file with `git lfs pull`"),
        "page.pt": (b"\n<!DOCTYPE html><html><title>404", "is a web page, not a checkpoint"),
        "text.pt": (b"hello", damaged),
        "cut.pt": (good[: len(good) // 2], damaged),
        "pickle.pt": (pickle.dumps({k: v.numpy() for k, v in state.items()}), "is not loaded"),
        "script.pt": (None, "is not loaded"),
        "bomb.pt": ({"model": state, "extra": Bomb()}, r"is not loaded \(io\.open in it could run code\)"),
        "whole-old.pt": (trained(), r"\(models\.ResNet in it could run code\)"),
        "numbers.pt": ({"model": {k: v.numpy() for k, v in state.items()}},
                       r"conv1\.weight is missing there and \(16, 3, 3, 3\) here"),
        "none.pt": ({"model": {}, "epoch": 3}, "is not a resnet8"),
        "other.pt": (create_model("resnet14").state_dict(),
                     r"resnet8 but a resnet14: layer1\.1\.conv1\.weight is \(16, 16, 3, 3\) there and "),
        "classes.pt": (create_model("resnet8", 10).state_dict(),
                       "is for 10 classes, this resnet8 is for 100"),
        "less.pt": ({k: v for k, v in state.items() if k != "fc.bias"},
                    r"fc\.bias is missing there .* \(tensors that differ: 1\)$"),
        "foreign.pt": (create_model("vgg8").state_dict(), "is not a resnet8 but a vgg8"),
    }
    for name, (content, _) in cases.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            torch.save(content, folder / name, _use_new_zipfile_serialization="old" not in name)
    return ({name: words for name, (_, words) in cases.items()}
            | {"missing.pt": "No such file", ".": "Is a directory"})


@pytest.mark.filterwarnings("ignore:.*jit")
def test_a_bad_file_is_one_clear_line_and_no_half_loaded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in bad_files(tmp_path).items():
        model = create_model("resnet8")
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=words) as caught:
            load_weights(model, tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value), name
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), name
    assert not (tmp_path / "bomb-went-off").exists()


# ---------------------------------------------------------------- open_checkpoint


def test_a_file_is_opened_by_its_metadata_or_its_keys(tmp_path):
    """The name, the number of classes and the preprocessing come from the file, or else from its keys."""
    source, path = create_model("resnet8", 7), tmp_path / "student.pt"
    images = torch.rand(2, 3, 32, 32)
    torch.save({"model": source.state_dict(), "student": "resnet8", "num_classes": 7,
                "classes": list("abcdefg"), "mean": [0.5] * 3, "std": [0.25] * 3, "size": 64, "resize": 64},
               path)
    network, metadata = open_checkpoint(path)
    assert torch.equal(network(images), source.eval()(images)) and not network.training
    assert metadata["student"] == "resnet8" and metadata["classes"] == list("abcdefg")
    assert metadata["num_classes"] == 7
    assert metadata["preprocessing"] == Preprocessing((0.5,) * 3, (0.25,) * 3, 64, 64)
    assert metadata["preprocessing_known"]
    assert open_checkpoint(path, size=48)[1]["preprocessing"][2:] == (48, 48)

    torch.save({"net": prefixed("module.")(source)}, path)
    network, metadata = open_checkpoint(path)
    assert torch.equal(network(images), source(images))
    assert metadata == {"student": "resnet8", "num_classes": 7, "preprocessing": Preprocessing(),
                        "preprocessing_known": False}
    with pytest.raises(ValueError, match="is for 7 classes, this resnet8 is for 5"):
        open_checkpoint(path, num_classes=5)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="does not name its network, and its keys fit none: give --student"):
        open_checkpoint(path)


def test_of_the_two_vgg13_the_keys_decide(tmp_path):
    """models.py's is for small images, torchvision's for large ones."""
    for builder, size in ((create_model, (32, 32)), (torchvision.models.get_model, (64, 73))):
        torch.save(builder("vgg13", num_classes=3).state_dict(), tmp_path / "x.pt")
        _, metadata = open_checkpoint(tmp_path / "x.pt", "vgg13", size=size[0])
        assert metadata["num_classes"] == 3 and metadata["preprocessing"][2:] == size


def test_of_a_teacher_and_a_student_either_is_opened(tmp_path):
    halves = {"student": trained("resnet14"), "teacher": trained("resnet8", 2)}
    torch.save({"model": torch.nn.DataParallel(Distiller(**halves)).state_dict()}, tmp_path / "latest")
    assert open_checkpoint(tmp_path / "latest")[1]["student"] == "resnet14"
    network, _ = open_checkpoint(tmp_path / "latest", "resnet8", prefer="teacher")
    assert torch.equal(network.fc.weight, halves["teacher"].fc.weight)
