"""export.py of what users train: custom networks, folders, CIFAR-10, plain state_dicts."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torchvision.datasets import CIFAR10

import data
import export
import networks
import predict

NETS = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self, num_classes, pair):
        super().__init__()
        self.head, self.pair = nn.Linear(12, num_classes), pair       # the head is not the last of its keys
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
                                  nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())

    def forward(self, x):
        features = self.body(x).mean((2, 3))
        return (self.head(features), features) if self.pair else self.head(features)

def tiny(num_classes):
    return Tiny(num_classes, False)

def pair(num_classes):
    return Tiny(num_classes, True)

def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, num_classes))
"""
COLOURS = {"Käse": (200, 180, 60), "rot": (190, 40, 50), "日本": (60, 80, 200)}
CLASSES = sorted(COLOURS)
SPEED = {count: {"median_ms": 1.0, "p95_ms": 1.0, "img_s": 1.0} for count in ("1", "all")}
SILENT = "does not contain its images' mean and standard deviation"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with nets.py; no speeds, few synthetic images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "speeds", lambda *rest: SPEED)
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (300, 200))
    networks._module.cache_clear()
    Path("nets.py").write_text(NETS)
    return tmp_path


def call(*arguments, code=0):
    result = CliRunner().invoke(export.main, [str(a) for a in arguments])
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return result.output


def refused(*arguments):
    """The one line of an error; no file was written."""
    before = sorted(os.listdir())
    line = call(*arguments, code=1).splitlines()[-1]
    assert line.startswith("Error: ") and sorted(os.listdir()) == before
    return line


def facts_of(path):
    facts = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    return {k: v if k in ("network", "teacher", "data", "weights_sha256", "version") else json.loads(v)
            for k, v in facts.items() if k not in ("input", "method", "precision", "temperature_fitted_on",
                                                   "activations")}


def logits_of(path, images):
    return onnxruntime.InferenceSession(str(path)).run(["logits"], {"image": np.asarray(images)})[0]


def photos(where="photos", parts=("train", "val"), count=8, classes=CLASSES):
    """where/PART/CLASS/: noise in the colour of the class, of several sizes, with an alpha, stored turned."""
    draw = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            Path(where, part, name).mkdir(parents=True)
            for i in range(count):
                shape = ((64, 64), (80, 100), (131, 70), (64, 90))[i % 4]
                image = draw.normal(COLOURS.get(name, (99, 99, 99)), 40, (*shape, 3)).clip(0, 255)
                exif = Image.Exif()
                exif[0x0112] = 6 if i % 3 == 2 else 1
                image = Image.fromarray(image.astype(np.uint8)).convert("RGBA" if i == 5 else "RGB")
                image.save(Path(where, part, name, f"{i}.png"), exif=exif)
    return where


def trained(name, images, targets, pixels, num_classes):
    """A network that knows these images: what is shipped has margins, and int8 keeps its classes."""
    torch.manual_seed(0)
    network = networks.create(name, num_classes).train()
    optimizer, x = torch.optim.Adam(network.parameters(), 0.02), pixels.normalise(images)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), targets).backward()
        optimizer.step()
    return network.eval()


def save(network, name, data_name, classes, pixels, **more):
    """student.pt as the training scripts write it."""
    facts = {"student": name, "data": data_name, "num_classes": len(classes), "classes": list(classes),
             **pixels._asdict(), "epochs": 2, "seed": 3}
    torch.save({"model": network.state_dict(), **facts, **more}, "student.pt")


def run(name="nets.py:tiny", **more):
    """student.pt of train_cifar.py --data folder --size 64 in photos/: (its network, its Data)."""
    loaded = data.load_data("folder", photos(), "cpu", size=64)
    network = trained(name, *loaded.train, loaded.pixels, 3)
    save(network, name, "folder", loaded.classes, loaded.pixels, **more)
    return network, loaded


# ---------------------------------------------------------------- custom networks


def test_a_custom_network_that_returns_a_pair_is_shipped(capsys):
    """Its file's first output is the logits, and predict.py names the user's classes."""
    network, loaded = run("nets.py:pair")
    output = call("--checkpoint", "student.pt", "--data-dir", "photos", "--probabilities")
    assert SILENT not in output
    assert {"nets-pair.onnx", "nets-pair.int8.onnx", "nets-pair.json"} <= set(os.listdir())
    for name in ("nets-pair.onnx", "nets-pair.int8.onnx"):
        facts, session = facts_of(name), onnxruntime.InferenceSession(name)
        assert facts["network"] == "nets-pair" and facts["classes"] == CLASSES
        assert [x.name for x in session.get_outputs()] == ["logits", "probabilities"]
        assert [x.shape for x in session.run(None, {"image": loaded.test.images[:5].numpy()})] == [(5, 3)] * 2
        assert b"nets.py" not in Path(name).read_bytes()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["predict.py", name, "photos/val", "--json"])
            predict.main()
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert end.value.code == 0 and len(rows) == 24
        right = sum(Path(row["image"]).parent.name == row["top"][0]["class"] for row in rows)
        assert right >= 23
    with torch.no_grad():
        expected = network(loaded.pixels.normalise(loaded.test.images)).numpy()
    np.testing.assert_allclose(logits_of("nets-pair.onnx", loaded.test.images), expected, atol=1e-4)


def test_a_network_with_a_file_that_is_gone_is_named_again(folder):
    """The checkpoint has nets.py, seen from where it was trained."""
    run()
    Path("code").mkdir()
    os.rename("nets.py", "code/mine.py")
    networks._module.cache_clear()      # another process
    assert "nets.py:tiny with num_classes=3 fails (ModuleNotFoundError" in refused(
        "--checkpoint", "student.pt")
    call("--checkpoint", "student.pt", "--student", "code/mine.py:tiny", "--no-int8")
    assert facts_of("mine-tiny.onnx")["classes"] == CLASSES


def test_a_size_that_the_network_does_not_take_is_one_line():
    torch.manual_seed(0)
    torch.save(networks.create("nets.py:flat", 100).state_dict(), "plain.pt")
    plain = "--checkpoint", "plain.pt", "--student", "nets.py:flat"
    assert "32 x 32 pixels" in refused(*plain)
    call(*plain, "--size", 48)
    assert facts_of("nets-flat.onnx")["size"] == [48, 48] and facts_of("nets-flat.onnx")["resize"] == 48


# ---------------------------------------------------------------- small images in folders


def as_set(images):
    return {x.numpy().tobytes() for x in images}


def test_a_student_of_small_images_sees_on_a_device_what_it_saw_in_training():
    """Sizes, alpha and orientation of the files included: the pixels are equal, and so are the logits."""
    network, loaded = run()
    output = call("--checkpoint", "student.pt", "--data-dir", "photos")
    assert "fitted on 12 val images" in output and SILENT not in output
    facts = facts_of("nets-tiny.onnx")
    assert facts["size"] == [64, 64] and facts["resize"] == 64 and facts["data"] == "folder"
    assert facts["mean"] == list(loaded.pixels.mean) and facts["std"] == list(loaded.pixels.std)
    classifier = predict.Classifier("nets-tiny.onnx")
    seen = [classifier.pixels(Image.open(path)) for path, _ in data.load_folders("photos").eval]
    assert np.array_equal(np.stack(seen), loaded.test.images.numpy())
    with torch.no_grad():
        expected = network(loaded.pixels.normalise(loaded.test.images))
    np.testing.assert_allclose(logits_of("nets-tiny.onnx", seen), expected.numpy(), atol=1e-4)
    hits = (expected.argmax(1) == loaded.test.targets).double()
    assert facts["top1"] == pytest.approx(100 * hits[1::2].mean().item())
    report = json.loads(Path("nets-tiny.json").read_text())["files"]["int8"]
    assert report["agreement"] >= 0.95 and report["compared"] == 12


def test_the_temperature_is_of_held_out_images_else_of_half_of_val():
    """And never of images that training saw; int8 is calibrated on what it was trained on."""
    _, loaded = run(train_images=20)
    images = export.find_images(export.load_student("student.pt"), "photos", 512)
    assert torch.equal(images.temperature.images, loaded.test.images[::2])
    assert torch.equal(images.test.images, loaded.test.images[1::2])
    kept = data.load_data("folder", "photos", "cpu", size=64, train_images=20)
    assert len(images.calibration.images) == 20
    assert as_set(images.calibration.images) == as_set(kept.train.images)

    torch.save(torch.load("student.pt") | {"train_images": None, "val_from_train": 8}, "student.pt")
    student = export.load_student("student.pt")
    images = export.find_images(student, "photos", 512)
    kept = data.load_data("folder", "photos", "cpu", size=64, val_from_train=8)
    assert images.source == "held-out images"
    assert torch.equal(images.temperature.images, kept.eval.images)
    assert torch.equal(images.test.images, loaded.test.images)
    assert as_set(images.calibration.images) == as_set(kept.train.images)
    os.rename("photos/val", "elsewhere")        # half of the held-out images then give the accuracy
    images = export.find_images(student, "photos", 512)
    assert torch.equal(images.temperature.images, kept.eval.images[::2])
    assert torch.equal(images.test.images, kept.eval.images[1::2])


@pytest.mark.parametrize("part, missing", [("train", "temperature, test"), ("val", "calibration")])
def test_one_part_of_a_folder_gives_what_it_can(part, missing):
    """What a colleague hands over is often the evaluation images only."""
    run()
    other, = {"train", "val"} - {part}
    os.rename(f"photos/{other}", "elsewhere")
    output = call("--checkpoint", "student.pt", "--data-dir", "photos")
    assert f"notice: no images for {missing}: --data-dir" in output
    facts = facts_of("nets-tiny.onnx")
    assert ("top1" in facts) == (facts["temperature"] != 1) == (part == "val")
    assert Path("nets-tiny.int8.onnx").exists() == (part == "train")


def test_other_classes_and_damaged_images_are_refused_in_one_line():
    """An accuracy on them would be a number that means nothing."""
    run()
    photos("others", classes=["Käse", "blau", "rot"], count=1)
    assert "others has 3 classes (Käse, blau, rot, ...), not the student's 3 (Käse, rot, 日本, ...)" in refused(
        "--checkpoint", "student.pt", "--data-dir", "others")
    Path("photos/val/rot/0.png").write_bytes(b"no image")
    assert "photos/val/rot/0.png" in refused("--checkpoint", "student.pt", "--data-dir", "photos")


def test_of_very_many_images_an_even_choice_is_read(monkeypatch):
    """All of them would take hours; the first of them would be the first classes only."""
    many = [(f"{i}", i * 3 // 12_345) for i in range(12_345)]
    found = data.Folders(many, many, "val", CLASSES)
    Path("photos/val").mkdir(parents=True)
    monkeypatch.setattr(export, "load_folders", lambda *rest, **more: found)
    monkeypatch.setattr(export, "read_images", lambda samples, *rest: torch.zeros(len(samples), 3, 1, 1))
    student = export.InferenceModel(None, {"data": "folder", "num_classes": 3},
                                    data.Preprocessing(size=224, resize=256), CLASSES)
    images = export.find_images(student, "photos", 30)
    assert [len(x.targets) for x in images[:3]] == [30, 3087, 3086]
    for split in images[1:3]:
        assert split.targets.bincount().tolist() == pytest.approx([3086 / 3] * 3, abs=1)


# ---------------------------------------------------------------- CIFAR-10


def cifar10(where):
    """The files of CIFAR-10, 20 images in each, without their checksums."""
    files = [[name, None] for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    base, draw = Path(where, CIFAR10.base_folder), np.random.default_rng(0)
    base.mkdir(parents=True)
    for name, _ in files:
        pixels = draw.integers(0, 256, (20, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(data.CIFAR10_CLASSES)}))
    return {"train_list": files[:5], "test_list": files[5:], "meta": {**CIFAR10.meta, "md5": None}}


def test_a_student_of_cifar10_has_its_classes_and_pixels(monkeypatch):
    network, pixels = networks.create("resnet8", 10), data.CIFAR["cifar10"][2]
    save(network, "resnet8", "cifar10", data.CIFAR10_CLASSES, pixels)
    output = call("--checkpoint", "student.pt", "--no-int8", "--data-dir", "nowhere")
    assert "notice: no images for calibration, temperature, test" in output and SILENT not in output
    facts = facts_of("resnet8.onnx")
    assert facts["classes"][:2] == ["airplane", "automobile"] and facts["mean"] == list(pixels.mean)
    assert facts["std"] == list(pixels.std) and facts["size"] == [32, 32]
    for name, value in cifar10("data").items():
        monkeypatch.setattr(CIFAR10, name, value)
    torch.save(network.state_dict(), "plain.pt")
    expected = data.load_data("cifar10", "data", "cpu")
    for name in ("student.pt", "plain.pt"):
        images = export.find_images(export.load_student(name), "data", 512)
        assert len(images.calibration.targets) == 100
        assert (images.temperature is None) == (name == "plain.pt")
        assert torch.equal(images.test.images, expected.test.images)
        assert torch.equal(images.test.targets, expected.test.targets)
        assert images.classes == data.CIFAR10_CLASSES


# ---------------------------------------------------------------- plain state_dicts


def ten():
    torch.manual_seed(0)
    torch.save({"state_dict": networks.create("resnet8", 10).state_dict()}, "ten.pt")
    return "--checkpoint", "ten.pt", "--student", "resnet8"


def names_file(names, path="names.txt", encoding="utf-8"):
    Path(path).write_text("\n".join(names) + "\n", encoding=encoding)
    return path


def test_what_is_assumed_of_a_plain_file_is_one_line_that_names_the_flags():
    """Another mean than the training's costs accuracy, and no error says so."""
    output = call(*ten())
    line, = (x for x in output.splitlines() if "mean" in x)
    assert line.startswith(f"notice: ten.pt {SILENT}") and "at 32 pixels" in line
    assert all(flag in line for flag in ("--mean", "--std", "--size", "--classes"))
    facts = facts_of("resnet8.onnx")
    assert facts["classes"] == [f"class {i}" for i in range(10)] and facts["mean"] == list(data.MEAN)


def test_flags_give_what_a_plain_file_does_not():
    names = ["Käse", "rot", "日本", *(f"n{i}" for i in range(7))]
    names_file(names, encoding="utf-8-sig")         # as Windows' editor writes it
    flags = "--classes", "names.txt", "--mean", "0.5,0.4,0.3", "--std", "0.2, 0.3, 1", "--size", 40
    output = call(*ten(), *flags)
    assert SILENT not in output
    facts = facts_of("resnet8.onnx")
    assert facts["classes"] == names and facts["size"] == [40, 40] and facts["resize"] == 40
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    network = networks.create("resnet8", 10).eval()
    network.load_state_dict(torch.load("ten.pt")["state_dict"])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.5, 0.4, 0.3), (0.2, 0.3, 1)))
    with torch.no_grad():
        expected = network((images / 255 - mean) / std).numpy()
    np.testing.assert_allclose(logits_of("resnet8.onnx", images), expected, atol=1e-4 * abs(expected).max())


def test_a_plain_file_takes_the_folder_that_is_named():
    """Its classes' names too, where --classes gives no others."""
    loaded = data.load_data("folder", photos(), "cpu", size=32)
    network = trained("nets.py:tiny", *loaded.train, data.Preprocessing(), 3)
    torch.save({"net": network.state_dict(), "epochs": 9, "seed": 0}, "plain.pt")
    plain = "--checkpoint", "plain.pt", "--student", "nets.py:tiny", "--data-dir", "photos"
    output = call(*plain)
    assert output.count(SILENT) == 1 and Path("nets-tiny.int8.onnx").exists()
    facts = facts_of("nets-tiny.onnx")
    assert facts["classes"] == CLASSES and facts["top1"] > 90
    call(*plain, "--classes", names_file(["cheese", "red", "Japan"]), "--no-int8")
    assert facts_of("nets-tiny.onnx")["classes"] == ["cheese", "red", "Japan"]
    assert "photos has 3 classes (Käse, rot, 日本, ...), not the student's 10" in refused(
        *ten(), "--data-dir", "photos")


def test_a_teachers_path_is_not_shipped():
    save(networks.create("resnet8", 3), "resnet8", "folder", CLASSES, data.Preprocessing(), method="kd",
         teacher="/home/me/t.py:large")
    call("--checkpoint", "student.pt")
    assert facts_of("resnet8.onnx")["teacher"] == "t-large"
    assert b"/home" not in Path("resnet8.onnx").read_bytes()
