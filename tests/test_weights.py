"""Checkpoint files as the field's code writes them load, or are refused in one line that says what to do."""

import argparse
import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from models import class_count, create_model, guess_network, load_weights
from weights import FromNumpy, read_checkpoint


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
        "model": m.state_dict(), "rng": np.random.RandomState(0).get_state(), "type": np.float32,
        "mean": np.ones(3), "names": np.array(["a"]), "dtype": np.dtype("f8"), "n": np.int64(3)},
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
    **{key: under(key) for key in ("net", "model_state_dict", "model_ema", "state", "weights", "params",
                                   "ema", "network", "student")},
}


@pytest.mark.parametrize("container", ["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", FORMATS)
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
    with pytest.raises(ValueError, match="is not a safetensors file, or it is damaged"):
        load_weights(model, tmp_path / "x.safetensors")


def test_no_numpy_code_runs_on_a_files_bytes(tmp_path):
    """The scalar's bytes stand in the file; what comes out is a stand-in that has forgotten them."""
    torch.save({"model": {}, "lr": np.float64(0.1), "array": np.arange(3)}, tmp_path / "x.pt")
    content = read_checkpoint(tmp_path / "x.pt")
    assert all(type(content[key]) is FromNumpy and not vars(content[key]) for key in ("lr", "array"))


@pytest.mark.parametrize("prefer, wanted", [("student", "student"), ("teacher", "teacher")])
def test_of_a_student_and_a_teacher_the_wanted_half_is_taken_and_said(prefer, wanted, tmp_path):
    halves = {"student": trained(seed=1), "teacher": trained(seed=2)}
    torch.save({"model": torch.nn.DataParallel(Distiller(**halves)).state_dict()}, tmp_path / "latest")
    model, lines = create_model("resnet8"), []
    load_weights(model, tmp_path / "latest", prefer=prefer, say=lines.append)
    assert torch.equal(model.fc.weight, halves[wanted].fc.weight)
    assert lines == [f"notice: {tmp_path / 'latest'} has weights of a resnet8 at model.module.student, "
                     f"model.module.teacher; taking model.module.{wanted}"]


def test_raw_weights_come_before_their_average_and_it_is_said(tmp_path):
    raw, mean = trained(seed=1), trained(seed=2)
    model, lines = create_model("resnet8"), []
    torch.save({"state_dict_ema": mean.state_dict(), "state_dict": raw.state_dict()}, tmp_path / "timm.pth")
    load_weights(model, tmp_path / "timm.pth", say=lines.append)
    assert (torch.equal(model.fc.weight, raw.fc.weight) and "taking state_dict" in lines[0]
            and lines[0].endswith("state_dict"))
    torch.save({"ema": {"module": mean.state_dict()}, "epoch": 3}, tmp_path / "mean.pth")
    load_weights(model, tmp_path / "mean.pth", say=lines.append)
    assert torch.equal(model.fc.weight, mean.fc.weight) and len(lines) == 1


def test_a_teachers_half_alone_is_not_taken_for_a_student_without_a_word(tmp_path):
    torch.save({"model": torch.nn.DataParallel(
        Distiller(trained("resnet14"), trained("resnet8", 2))).state_dict()}, tmp_path / "latest")
    lines = []
    load_weights(create_model("resnet8"), tmp_path / "latest", say=lines.append)
    assert "taking model.module.teacher" in lines[0]
    load_weights(create_model("resnet14"), tmp_path / "latest", say=lines.append)
    assert len(lines) == 1


def test_what_else_the_file_says_is_returned(tmp_path):
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
                       match="is a tar archive with teachers of vgg13, resnet56, not of resnet8: "):
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
    np.savez(folder / "arrays.npz", **{k: v.numpy() for k, v in state.items()})
    with zipfile.ZipFile(folder / "zip.pt", "w") as archive:
        archive.writestr("resnet8/best.pth", b"x")
    clean = r"save the weights alone: torch\.save\("
    cases = {
        "empty.pt": (b"", "is empty"),
        "text.pt": (b"hello", "is not a PyTorch checkpoint, or it is damaged"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
                       "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
        "page.pt": (b"\n<!DOCTYPE html><html><title>404", "is an HTML page, not a checkpoint"),
        "packed.pt": (gzip.compress(good), "is compressed with gzip: unpack it"),
        "cut.pt": (good[: len(good) // 2], "is not a PyTorch checkpoint, or it is damaged"),
        "pickle.pt": (pickle.dumps({k: v.numpy() for k, v in state.items()}),
                      r"is a plain pickle, which is not loaded, .*" + clean),
        "script.pt": (None, "is a TorchScript archive, which holds code. .*" + clean + r"torch\.jit\.load"),
        "arrays.npz": (None, r"holds NumPy's arrays \(npz\)\. .*" + clean),
        "zip.pt": (None, r"is a zip archive \(resnet8/best.pth\): unpack it"),
        "numbers.pt": ({"model": {k: v.numpy() for k, v in state.items()}},
                       "holds its weights as numpy.ndarray, which is not read. .*" + clean),
        "bomb.pt": ({"model": state, "extra": Bomb()},
                    r"holds a Python object beside tensors, io\.open; not loaded, as it could run code\. .*"
                    + clean),
        "whole.pt": (trained(), r"is a whole pickled network, models\.ResNet; not loaded, .*" + clean),
        "whole-old.pt": (trained(), r"is a whole pickled network, models\.ResNet; not loaded, .*" + clean),
        "beside.pt": ({"model": state, "net": trained()},
                      r"holds a Python object beside tensors, models\.ResNet; not loaded"),
        "number.pt": (3, "holds no weights for resnet8"),
        "none.pt": ({"model": {}, "epoch": 3}, "holds no weights for resnet8"),
        "other.pt": (create_model("resnet14").state_dict(),
                     r"not a resnet8 but a resnet14: layer1\.1\.conv1\.weight is not in resnet8; .*; "
                     r"and \d+ more"),
        "classes.pt": (create_model("resnet8", 10).state_dict(),
                       "is for 10 classes, this resnet8 is for 100"),
        "less.pt": ({k: v for k, v in state.items() if k != "fc.bias"},
                    r"not a resnet8: fc\.bias is missing"),
        "wide.pt": (create_model("resnet8x4").state_dict(), "not a resnet8 but a resnet8x4"),
        "foreign.pt": (create_model("vgg8").state_dict(), "holds no weights for resnet8 but a vgg8"),
    }
    for name, (content, _) in cases.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            torch.save(content, folder / name, _use_new_zipfile_serialization="old" not in name)
    return ({name: words for name, (_, words) in cases.items()}
            | {"missing.pt": "no such file", ".": "is a folder"})


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


def test_a_network_is_guessed_in_any_wrapping():
    content = mdistiller_latest(trained("resnet20"))
    assert guess_network(content) == "resnet20"         # the student, whose teacher is a resnet14
    assert guess_network({"net": {f"module.{k}": v for k, v
                                  in create_model("wrn_16_2", 7).state_dict().items()}}) == "wrn_16_2"
    assert guess_network({"epoch": 3}) is None


def test_the_class_count_of_weights_that_are_not_read_is_unknown():
    """export.py asks for it before it loads them, and the refusal is load_weights'."""
    arrays = {"model": {k: FromNumpy() for k in create_model("resnet8").state_dict()}}
    assert class_count(arrays, create_model("resnet8")) is None
    assert class_count(mdistiller_latest(trained("resnet8")), create_model("resnet8")) == 100
