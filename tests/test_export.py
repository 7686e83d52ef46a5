"""export.py and predict.py as their users call them; what is written is read back through onnxruntime."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image

import data
import export
from conftest import run_in
from models import MODELS, create_model
from train_cifar import main as train

ROOT = Path(__file__).resolve().parent.parent
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


SPEED = {count: {"median_ms": 1.0, "p95_ms": 1.0, "img_s": 1.0} for count in ("1", "all")}


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Few synthetic images, and no speeds: they are measured once, in `distilled`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (600, 300))
    monkeypatch.setattr(export, "speeds", lambda *rest: SPEED)


def call(*arguments, code=0, command=export.main):
    result = CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=True)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output


def lively(name, num_classes=100):
    """A network with batch norms that have seen images, and logits that differ from image to image."""
    torch.manual_seed(0)
    network = create_model(name, num_classes).train()
    with torch.no_grad():
        for part in data.synthetic(300, 3).images.split(100):
            network(data.normalise(part))
    return network.eval()


def checkpoint(name, path="student.pt", **facts):
    facts = {"student": name, "data": "synthetic", "epochs": 3, "seed": 0, **facts}
    torch.save({"model": lively(name).state_dict(), **facts}, path)
    return path


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def metadata(path):
    return session(path).get_modelmeta().custom_metadata_map


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """student.pt of a real, small run on synthetic images."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, "SYNTHETIC_SIZES", (1000, 500))
        call("--method", "none", "--student", "resnet8", "--data", "synthetic", "--epochs", 5, "--batch-size",
             16, "--lr", 0.05, "--device", "cpu", command=train)
    return run_in(folder / "runs") / "student.pt"


@pytest.fixture(scope="module")
def distilled(student, tmp_path_factory):
    """(the folder of its exported files, the output)"""
    out = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SYNTHETIC_SIZES", (1000, 500))
        patch.setattr(export, "SECONDS", 0.05)
        return out, call("--checkpoint", student, "--fp16", "--probabilities", "--out", out)


@pytest.fixture
def written(distilled, monkeypatch):
    """The writers copy what `distilled` wrote, each with its `harm`; for tests of what comes after them."""
    harms = {}

    def copy(precision):
        def write(*arguments, **more):
            path = next(x for x in arguments[1:] if isinstance(x, Path))
            model = onnx.load(distilled[0] / f"resnet8{precision}.onnx")
            harms.get(precision, lambda model: None)(model)
            onnx.save(model, path)
        return write

    monkeypatch.setattr(export, "write_fp32", copy(""))
    monkeypatch.setattr(export, "write_int8", copy(".int8"))
    return harms


def test_three_files_and_a_report_and_nothing_else(distilled):
    folder, output = distilled
    names = ["resnet8.fp16.onnx", "resnet8.int8.onnx", "resnet8.json", "resnet8.onnx"]
    assert sorted(os.listdir(folder)) == names
    report = json.loads((folder / "resnet8.json").read_text())
    for name in ("fp32", "fp16", "int8"):
        row = report["files"][name]
        assert f"\n{name}" in output
        assert row["speed"]["1"]["median_ms"] > 0 and row["speed"]["all"]["img_s"] > 0
    assert report["files"]["fp32"]["top1"] == pytest.approx(report["metadata"]["top1"])
    assert report["files"]["fp32"]["error"] < 1e-5
    assert report["files"]["int8"]["agreement"] >= 0.95
    sizes = [(folder / f"resnet8{p}.onnx").stat().st_size for p in ("", ".fp16", ".int8")]
    assert sizes[0] > 1.7 * sizes[1] and sizes[0] > 2.5 * sizes[2]


@pytest.mark.parametrize("precision", ["", ".fp16", ".int8"])
def test_a_file_computes_what_pytorch_computes_on_batches_of_any_size(distilled, student, precision):
    folder, _ = distilled
    network = create_model("resnet8")
    network.load_state_dict(torch.load(student)["model"])
    runner = session(folder / f"resnet8{precision}.onnx")
    image, = runner.get_inputs()
    assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(uint8)", [3, 32, 32])
    images = data.synthetic(5, 9).images
    mean, std = (np.array(x).reshape(3, 1, 1) for x in (data.MEAN, data.STD))
    with torch.no_grad():
        expected = network.double().eval()(torch.from_numpy((images.numpy() / 255 - mean) / std)).numpy()
    for batch in (1, 3, 5):
        logits, probabilities = runner.run(["logits", "probabilities"], {"image": images[:batch].numpy()})
        tolerance = {"": 1e-5, ".fp16": 5e-3, ".int8": 0.15}[precision] * abs(expected).max()
        assert logits.dtype == np.float32 and abs(logits - expected[:batch]).max() < tolerance
        z = logits / float(metadata(folder / f"resnet8{precision}.onnx")["temperature"])
        odds = np.exp(z - z.max(1, keepdims=True))
        softmax = odds / odds.sum(1, keepdims=True)
        np.testing.assert_allclose(probabilities, softmax, atol=2e-3)


def test_int8_keeps_the_mean_logits_of_the_calibration_images(distilled):
    order, _ = data.epoch_draws(0, 0, 1000)
    images = data.synthetic(1000, 1).images[order[:512]]
    logits = [session(distilled[0] / f"resnet8{precision}.onnx").run(["logits"], {"image": images.numpy()})[0]
              for precision in ("", ".int8")]
    assert abs((logits[0] - logits[1]).mean(0)).max() < 1e-4 < abs(logits[0] - logits[1]).mean()


def test_metadata_are_inside_and_source_paths_are_not(distilled, student):
    folder, _ = distilled
    facts = torch.load(student)
    for precision in ("fp32", "fp16", "int8"):
        path = folder / ("resnet8.onnx" if precision == "fp32" else f"resnet8.{precision}.onnx")
        found = metadata(path)
        assert found["network"] == "resnet8" and found["precision"] == precision and found["method"] == "none"
        assert json.loads(found["size"]) == [32, 32] and json.loads(found["mean"]) == list(data.MEAN)
        assert json.loads(found["classes"])[3] == "class 3" and found["input"] == "uint8" and found["version"]
        assert float(found["top1"]) > 5 and float(found["temperature"]) > 0
        assert len(found["weights_sha256"]) == 64
        model = onnx.load(path, load_external_data=False)
        assert not any(t.external_data for t in model.graph.initializer)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert model.ir_version == 8        # the least for opset 18: onnxruntime refuses newer than it knows
        text = path.read_bytes()
        assert not any(x in text for x in (b"models.py", b"export.py", b"site-packages", str(ROOT).encode()))
    assert float(metadata(folder / "resnet8.onnx")["top1"]) == pytest.approx(facts["top1"], abs=0.01)


def test_the_temperature_makes_probabilities_honest(distilled):
    """KD+Z's small logits are the case: here they are made ten times too small, and come back."""
    torch.manual_seed(0)
    sure = 3 * torch.randn(4000, 10).double()
    targets = torch.distributions.Categorical(logits=sure).sample()     # it is right about itself
    temperature = export.fit_temperature(sure / 10, targets)
    assert temperature == pytest.approx(0.1, rel=0.05)
    before, after = (export.calibration_of(sure / 10, targets, t) for t in (1, temperature))
    assert after["nll"] < before["nll"] and before["ece"] > 0.3 and after["ece"] < 0.03
    nll = [torch.nn.functional.cross_entropy(sure / 10 / temperature / f, targets) for f in (0.9, 1, 1.1)]
    assert nll[1] <= min(nll)
    assert "temperature" in distilled[1] and "expected calibration error" in distilled[1]


def test_a_temperature_that_makes_other_images_worse_is_a_warning(capsys):
    logits = 3 * torch.eye(10).double()
    fitted = data.Split(torch.zeros(10), torch.arange(10))
    other = data.Split(torch.zeros(10), torch.zeros(10, dtype=torch.long))
    student = types.SimpleNamespace(logits=lambda images: logits)
    export.fit(student, export.Images(None, fitted, other), logits)
    assert "warning: the temperature makes it worse" in capsys.readouterr().out
    export.fit(student, export.Images(None, fitted, fitted), logits)
    assert "warning" not in capsys.readouterr().out


def test_the_expected_calibration_error_is_guos():
    """Two bins by hand: 4 images of confidence 0.75, half of them right; 2 of confidence 0.55, both right."""
    p = torch.tensor([[0.75, 0.25]] * 4 + [[0.55, 0.45]] * 2).double()
    targets = torch.tensor([0, 0, 1, 1, 0, 0])
    expected = 4 / 6 * abs(0.5 - 0.75) + 2 / 6 * abs(1 - 0.55)
    assert export.calibration_of(p.log(), targets, 1.0)["ece"] == pytest.approx(expected, abs=1e-6)


def test_the_temperature_is_fitted_on_views_that_training_did_not_draw(tmp_path):
    checkpoint("resnet8", epochs=40)
    student = export.load_student("student.pt")
    images = export.find_images(student, "data", 8)
    train_set = data.load_data("synthetic", None, "cpu").train
    drawn = set()
    for epoch in range(40):
        order, views = data.epoch_draws(0, epoch, 600)
        drawn |= {i for i, v in zip(order.tolist(), views.tolist()) if v == export.CENTRE}
    centre = data.crop_and_flip(train_set.images[:3], torch.full((3,), export.CENTRE))
    assert torch.equal(centre, train_set.images[:3]) and 100 < len(drawn) < 200
    fitted = {x.numpy().tobytes() for x in images.temperature.images}
    assert len(fitted) == 600 - len(drawn)
    assert not any(train_set.images[i].numpy().tobytes() in fitted for i in drawn)
    student.metadata["val_from_train"] = 50
    images = export.find_images(student, "data", 8)
    assert images.source == "held-out images" and len(images.temperature.targets) == 50
    del student.metadata["data"], student.metadata["val_from_train"]     # what training drew is not known
    assert export.find_images(student, "data", 8).temperature is None


def test_depthwise_convolutions_and_float_inputs():
    """A float input's cast is float16's converter's, which puts it behind what reads it."""
    call("--checkpoint", checkpoint("MobileNetV2"), "--out", "out", "--float-input", "--fp16",
         "--calibration", 128)
    for name in ("MobileNetV2", "MobileNetV2.fp16", "MobileNetV2.int8"):
        assert session(f"out/{name}.onnx").get_inputs()[0].type == "tensor(float)"
        assert metadata(f"out/{name}.onnx")["input"] == "normalised float32"
    nodes = onnx.load("out/MobileNetV2.int8.onnx").graph.node
    assert sum(n.op_type == "QuantizeLinear" for n in nodes) > 5
    assert os.path.getsize("out/MobileNetV2.int8.onnx") < 0.45 * os.path.getsize("out/MobileNetV2.onnx")
    images = data.normalise(data.synthetic(2, 1).images)
    expected = lively("MobileNetV2")(images).detach().numpy()
    found, = session("out/MobileNetV2.onnx").run(["logits"], {"image": images.contiguous().numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-4)
    row = json.loads(Path("out/MobileNetV2.json").read_text())["files"]["int8"]
    assert row["error"] < 0.1           # untrained, it predicts one class, whatever its logits


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MODELS if n != "MobileNetV1"])
def test_every_network_is_exported(name):
    """Untrained: their classes are close to each other."""
    call("--checkpoint", checkpoint(name), "--out", "out", "--fp16", "--agreement", 0.5)
    assert len(os.listdir("out")) == 4


def test_a_plain_state_dict_and_no_data(tmp_path):
    torch.save({"module." + k: v for k, v in lively("resnet8").state_dict().items()}, "plain.pth")
    output = call("--checkpoint", "plain.pth")              # its keys tell the network
    assert "notice: no images for calibration, temperature, test: --data-dir names" in output
    assert sorted(os.listdir()) == ["plain.pth", "resnet8.json", "resnet8.onnx"]
    assert json.loads(metadata("resnet8.onnx")["classes"])[:2] == ["class 0", "class 1"]
    assert metadata("resnet8.onnx")["temperature_fitted_on"] == "nothing"
    assert "top1" not in metadata("resnet8.onnx")


# ---------------------------------------------------------------- int8 on every processor


def weights_of(path):
    """The int8 weights of a file's convolutions and classifier."""
    model = onnx.load(path)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    feeds = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return [arrays[feeds[n.input[1]].input[0]] for n in model.graph.node
            if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in feeds]


def without_vnni(activations, weights):
    """A dot product by x86 without VNNI: two uint8 x int8 products are added in 16 bits, which saturate."""
    pairs = (activations.astype(np.int32) * weights).reshape(-1, 2).sum(1)
    return np.clip(pairs, -2**15, 2**15 - 1).sum()


@pytest.mark.parametrize("opset, symmetric", [(13, True), (17, False)])
def test_the_default_computes_the_same_on_every_processor_and_symmetric_does_not(student, opset, symmetric):
    """And the file has the opset that was asked for, no other; calibration is of several batches."""
    flags = ["--symmetric"] if symmetric else ["--exclude-first-last"]
    call("--checkpoint", student, "--opset", opset, *flags, "--calibration", 200, "--probabilities", "--out",
         "out")
    report = json.loads(Path("out/resnet8.json").read_text())["files"]
    assert report["fp32"]["error"] < 1e-5 and report["int8"]["agreement"] >= 0.95
    for name in ("resnet8.onnx", "resnet8.int8.onnx"):
        model = onnx.load(f"out/{name}")
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
        assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)
        outputs = session(f"out/{name}").run(None, {"image": np.zeros((3, 3, 32, 32), np.uint8)})
        assert [x.shape for x in outputs] == [(3, 100), (3, 100)]
    weights = weights_of("out/resnet8.int8.onnx")
    assert len(weights) == (10 if symmetric else 8)
    assert max(abs(w.astype(int)).max() for w in weights) == (127 if symmetric else 64)
    worst = [np.sort(w.astype(int).reshape(len(w), -1))[:, -2:].flatten() for w in weights]
    exact = [without_vnni(np.full(w.size, 255, np.uint8), w) == 255 * w.sum() for w in worst]
    assert not any(exact) if symmetric else all(exact)
    if symmetric:
        arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        points = [arrays[n.input[2]] for n in model.graph.node if n.op_type in
                  ("QuantizeLinear", "DequantizeLinear")]
        assert len(points) > 20 and all((p == 0).all() and p.dtype in (np.int8, np.int32) for p in points)


# ---------------------------------------------------------------- what must not be shipped


@pytest.mark.parametrize("harm", ["bias", "weight", "graph", "nan"])
def test_a_broken_graph_is_caught_and_not_kept(harm, written, student):
    def broken(model):
        tensor = next(t for t in model.graph.initializer
                      if t.name.endswith("fc.weight" if harm == "weight" else "fc.bias"))
        values = onnx.numpy_helper.to_array(tensor).copy()
        values[-1] += np.nan if harm == "nan" else 0.1
        if harm == "graph":
            model.graph.node[-1].input[0] = "nothing"
        else:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    written[""] = broken
    output = call("--checkpoint", student, "--out", "out", "--no-int8", code=1)
    assert "resnet8.onnx was not written: " in output.splitlines()[-1] and "Traceback" not in output
    assert os.listdir("out") == []


def test_a_student_of_other_classes_is_not_measured_on_cifar100(cifar):
    """A plain CIFAR-10 file has the same keys; an accuracy of 1 % would be nonsense, as would the ranges."""
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 10).state_dict(), "ten.pt")
    os.symlink(cifar, "data")
    assert "notice: no images for calibration, temperature, test" in call("--checkpoint", "ten.pt")
    assert "top1" not in metadata("resnet8.onnx") and not Path("resnet8.int8.onnx").exists()


def test_damaged_data_is_not_downloaded_by_an_export(monkeypatch):
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/none.tar.gz")
    Path("data/cifar-100-python").mkdir(parents=True)
    Path("data/cifar-100-python/train").write_bytes(b"half")
    output = call("--checkpoint", checkpoint("resnet8", "real.pt", data="cifar100"), code=1)
    assert "or it is damaged (Dataset not found or corrupted" in output


def test_a_converter_that_fails_costs_its_file_alone(written, student):
    written[".int8"] = lambda model: 1 / 0
    output = call("--checkpoint", student, "--out", "out", code=1)
    assert "resnet8.int8.onnx was not written: division by zero" in output.splitlines()[-1]
    assert "Traceback" not in output and sorted(os.listdir("out")) == ["resnet8.json", "resnet8.onnx"]


def test_files_of_an_earlier_export_are_named(distilled):
    """Not for `predict.py` to be given last week's int8 file."""
    shutil.copytree(distilled[0], "out")
    output = call("--checkpoint", checkpoint("resnet8"), "--out", "out", "--no-int8")
    assert "notice: of an earlier export are resnet8.fp16.onnx, resnet8.int8.onnx" in output


def test_a_stop_leaves_nothing_unfinished(student, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(export, "verify", lambda *rest: signal.raise_signal(signal.SIGTERM))
    assert "interrupted" in call("--checkpoint", student, "--out", "out", "--no-int8", code=1)
    assert os.listdir("out") == []
    signal.signal(signal.SIGTERM, before)


def test_an_int8_file_that_disagrees_is_not_kept_but_float32_is(written, student):
    def broken(model):
        scale = next(t for t in model.graph.initializer
                     if t.name.endswith("_scale") and "logits" not in t.name)
        small = onnx.numpy_helper.to_array(scale) * np.float32(0.01)
        scale.CopyFrom(onnx.numpy_helper.from_array(small, scale.name))

    written[".int8"] = broken
    output = call("--checkpoint", student, "--out", "out", code=1)
    assert "resnet8.int8.onnx was not written: only" in output and "--exclude-first-last" in output
    assert sorted(os.listdir("out")) == ["resnet8.json", "resnet8.onnx"]


@pytest.mark.parametrize("words, code, flags", [
    ("nothing.pt: No such file", 1, "--checkpoint nothing.pt"),
    ("no PyTorch checkpoint", 1, "--checkpoint text.pt"),
    ("is not a resnet14 but a resnet8", 1, "--checkpoint student.pt --student resnet14"),
    ("--student resnet9: no such network", 2, "--checkpoint student.pt --student resnet9"),
    ("could not write in text.pt", 1, "--checkpoint student.pt --out text.pt"),
    ("--classes has 1 names, one a line; the network 100", 1, "--checkpoint student.pt --classes text.pt"),
    ("none.txt", 2, "--checkpoint student.pt --classes none.txt"),
    ("three numbers in [0, 1]", 2, "--checkpoint student.pt --mean 123.7,116.3,103.5"),
    ("three numbers in [0, 1]", 2, "--checkpoint student.pt --std 0.5,0.5"),
    ("'--mean'", 2, "--checkpoint student.pt --mean a,b,c"),
])
def test_mistakes_are_one_line_and_leave_nothing(words, code, flags):
    checkpoint("resnet8")
    Path("text.pt").write_text("no checkpoint")
    before = sorted(os.listdir())
    output = call(*flags.split(), code=code)
    assert words in output.splitlines()[-1] and "Traceback" not in output
    assert sorted(os.listdir()) == before


# ---------------------------------------------------------------- real images


@pytest.mark.parametrize("count", [1024, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_public_resnet56_loses_nothing_in_float32_half_a_point_in_int8(count, shared, cifar, monkeypatch):
    def first(*arguments, real=data.load_data, **more):
        found = real(*arguments, **more)
        return found._replace(test=data.Split(*(x[:count] for x in found.test)))

    monkeypatch.setattr(export, "load_data", first)
    call("--checkpoint", shared / "teachers" / "resnet56.pt", "--student", "resnet56", "--data-dir", cifar,
         "--out", "out")
    report = json.loads(Path("out/resnet56.json").read_text())
    files = report["files"]
    assert report["metadata"]["top1"] == files["fp32"]["top1"] and files["int8"]["compared"] == count
    assert count < 10_000 or files["fp32"]["top1"] == 72.61
    assert files["int8"]["top1"] >= files["fp32"]["top1"] - 0.5
    assert files["int8"]["bytes"] <= 0.33 * files["fp32"]["bytes"]
    facts = metadata("out/resnet56.int8.onnx")
    assert json.loads(facts["classes"]) == list(data.CIFAR100_CLASSES)
    assert float(facts["top1"]) == pytest.approx(files["int8"]["top1"], abs=1e-3)


def test_a_student_of_train_imagenet_is_exported_with_its_rule_for_sizes(shared, tmp_path):
    """Real JPEG files of other sizes: predict.py resizes the shorter side to 8/7 of the crop and takes the
    centre, as the evaluation in training did."""
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for one in sorted((shared / "imagenet-sample").glob("n*"))[:24]:
            os.symlink(one, tmp_path / part / one.name)
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=24)
    found = data.load_folders(".")
    views = torch.stack([data.FolderImages(found.eval, 64)[i, 0][0][0] for i in range(24)])
    with torch.no_grad():
        for _ in range(8):
            network.train()(data.normalise(views, *IMAGENET))
    torch.save({"model": network.state_dict(), "student": "resnet18", "size": 64, "classes": found.classes,
                "data": "imagenet"}, "student.pt")
    call("--checkpoint", "student.pt", "--data-dir", ".", "--out", "out", "--no-int8")
    facts = metadata("out/resnet18.onnx")
    assert json.loads(facts["size"]) == [64, 64] and facts["resize"] == "73"
    assert json.loads(facts["classes"]) == found.classes
    result = predict("out/resnet18.onnx", *[found.eval[i][0] for i in range(24)], "--json")
    assert result.returncode == 0 and result.stderr == ""
    with torch.no_grad():
        logits = network.eval()(data.normalise(views, *IMAGENET))
    expected = (logits / float(facts["temperature"])).softmax(1)
    for row, line in zip(expected, result.stdout.splitlines()):
        top = json.loads(line)["top"][0]
        assert row[top["index"]].item() == pytest.approx(top["probability"], abs=0.02)


# ---------------------------------------------------------------- predict.py


def predict(*arguments, blocked=("torch", "torchvision", "onnx", "click")):
    """predict.py in a process where only onnxruntime, numpy and Pillow can be imported."""
    code = f"""
import sys, runpy
sys.path[:] = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
for name in {blocked!r}:
    sys.modules[name] = None
sys.argv = ["predict.py", *{[str(a) for a in arguments]!r}]
runpy.run_path("predict.py", run_name="__main__")
"""
    Path("predict.py").write_bytes((ROOT / "predict.py").read_bytes())      # copied, as it is to a device
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def pictures(folder, count=3):
    Path(folder).mkdir(parents=True, exist_ok=True)
    images = data.synthetic(count, 9).images
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(f"{folder}/{i}.png")
    return images


def test_predict_says_what_pytorch_would_say(distilled, student):
    folder, _ = distilled
    images = pictures("photos/inner")
    result = predict(folder / "resnet8.onnx", "photos", "--json")
    assert result.returncode == 0, result.stderr
    network = create_model("resnet8")
    network.load_state_dict(torch.load(student)["model"])
    temperature = float(metadata(folder / "resnet8.onnx")["temperature"])
    with torch.no_grad():
        expected = (network.eval()(data.normalise(images)) / temperature).softmax(1).topk(5)
    for i, line in enumerate(result.stdout.splitlines()):
        found = json.loads(line)
        assert found["image"].endswith(f"{i}.png")
        assert [t["index"] for t in found["top"]] == expected.indices[i].tolist()
        odds = expected.values[i].tolist()
        assert [t["probability"] for t in found["top"]] == pytest.approx(odds, abs=1e-4)
        assert found["top"][0]["class"] == f"class {found['top'][0]['index']}"
    assert "%" in predict(folder / "resnet8.int8.onnx", "photos/inner/1.png").stdout
