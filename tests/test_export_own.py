"""export.py of what users train: own networks, own folders, CIFAR-10, files that say nothing of it."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
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

def three(num_classes):
    return {3: Tiny(3, False)}[num_classes]

def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, num_classes))
"""
COLOURS = {"Käse": (200, 180, 60), "rot": (190, 40, 50), "日本": (60, 80, 200)}
CLASSES = sorted(COLOURS)
SPEED = {count: {"median_ms": 1.0, "p95_ms": 1.0, "img_s": 1.0, "samples": [1, 1]} for count in ("1", "all")}
SILENT = "does not say its images' mean and deviation"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with nets.py; no speeds, few made images."""
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
    made = data.load_data("folder", photos(), "cpu", size=64)
    network = trained(name, *made.train, made.pixels, 3)
    save(network, name, "folder", made.classes, made.pixels, **more)
    return network, made


# ---------------------------------------------------------------- own networks


@pytest.mark.parametrize("opset", [13, 18])
def test_an_own_network_that_returns_a_pair_is_shipped(opset, capsys):
    """Its file's first output is the logits, by either exporter, and predict.py names the user's classes."""
    network, made = run("nets.py:pair")
    output = call("--checkpoint", "student.pt", "--data-dir", "photos", "--opset", opset, "--probabilities")
    assert SILENT not in output
    assert {"nets-pair.onnx", "nets-pair.int8.onnx", "nets-pair.json"} <= set(os.listdir())
    for name in ("nets-pair.onnx", "nets-pair.int8.onnx"):
        facts, session = facts_of(name), onnxruntime.InferenceSession(name)
        assert facts["network"] == "nets-pair" and facts["classes"] == CLASSES
        assert [x.name for x in session.get_outputs()] == ["logits", "probabilities"]
        assert [x.shape for x in session.run(None, {"image": made.test.images[:5].numpy()})] == [(5, 3)] * 2
        assert b"nets.py" not in Path(name).read_bytes()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["predict.py", name, "photos/val", "--json"])
            predict.main()
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert end.value.code == 0 and len(rows) == 24
        right = sum(Path(row["image"]).parent.name == row["top"][0]["class"] for row in rows)
        assert right >= 23
    with torch.no_grad():
        expected = network(made.pixels.normalise(made.test.images)).numpy()
    np.testing.assert_allclose(logits_of("nets-pair.onnx", made.test.images), expected, atol=1e-4)


def test_a_network_whose_file_is_gone_is_named_anew(folder):
    """The checkpoint says nets.py, seen from where it was trained."""
    run()
    Path("code").mkdir()
    os.rename("nets.py", "code/mine.py")
    networks._module.cache_clear()      # another process
    assert refused("--checkpoint", "student.pt") == (
        "Error: student.pt is of nets.py:tiny, and there is no nets.py here: give --student")
    call("--checkpoint", "student.pt", "--student", "code/mine.py:tiny", "--no-int8")
    assert facts_of("mine-tiny.onnx")["classes"] == CLASSES
    assert "mine.py has no other" in refused("--checkpoint", "student.pt", "--student", "code/mine.py:other")


def test_a_network_is_built_for_the_classes_of_its_file():
    """A user's function may know one number of classes alone."""
    save(networks.create("nets.py:three", 3), "nets.py:three", "folder", CLASSES, data.Preprocessing())
    assert export.load_student("student.pt").num_classes == 3


def test_a_size_that_the_network_does_not_take_is_one_line():
    torch.manual_seed(0)
    torch.save(networks.create("nets.py:flat", 100).state_dict(), "bare.pt")
    bare = "--checkpoint", "bare.pt", "--student", "nets.py:flat"
    assert "does not take images of 32 x 32 pixels" in refused(*bare)
    output = call(*bare, "--size", 48)
    assert output.count(SILENT) == 1        # 100 classes of an own network may be anything
    assert facts_of("nets-flat.onnx")["size"] == [48, 48] and facts_of("nets-flat.onnx")["resize"] == 48


def test_a_name_that_two_have_is_taken_for_what_the_keys_say(monkeypatch):
    """vgg13 is models.py's, of small images, and torchvision's, which train_imagenet.py trains."""
    for kind in (torch.nn.Linear, torch.nn.Conv2d):        # 133 million numbers are not drawn
        monkeypatch.setattr(kind, "reset_parameters", lambda self: None)
    for init in ("normal_", "kaiming_normal_", "constant_"):
        monkeypatch.setattr(torch.nn.init, init, lambda tensor, *rest, **more: tensor)
    monkeypatch.setattr("checkpoints.check_logits", lambda *rest: None)

    def file(network, **facts):     # in a small file
        state = {k: torch.zeros(()).expand(v.shape) for k, v in network.state_dict().items()}
        torch.save({"model": state, "student": "vgg13", **facts}, "vgg13.pt")

    pixels = data.IMAGENET_PREPROCESSING.at(64)
    file(torchvision.models.vgg13(num_classes=3), data="birds", num_classes=3, classes=CLASSES,
         **pixels._asdict())
    student = export.load_student("vgg13.pt")
    assert "classifier.6.weight" in student.network.state_dict()
    assert (student.num_classes, student.classes, student.pixels) == (3, CLASSES, pixels)
    file(networks.create("vgg13", 100), data="cifar100")        # as older runs say it
    student = export.load_student("vgg13.pt")
    assert "classifier.weight" in student.network.state_dict()
    assert student.num_classes == 100 and student.pixels == data.Preprocessing()


# ---------------------------------------------------------------- small images in folders


def test_a_student_of_small_images_sees_on_a_device_what_it_saw_in_training():
    """Sizes, alpha and orientation of the files included: the pixels are equal, and so are the logits."""
    network, made = run()
    output = call("--checkpoint", "student.pt", "--data-dir", "photos")
    assert "accuracy on 24 of 24 evaluation images" in output and SILENT not in output
    facts = facts_of("nets-tiny.onnx")
    assert facts["size"] == [64, 64] and facts["resize"] == 64 and facts["data"] == "folder"
    assert facts["mean"] == list(made.pixels.mean) and facts["std"] == list(made.pixels.std)
    classifier = predict.Classifier("nets-tiny.onnx")
    seen = [classifier.pixels(Image.open(path)) for path, _ in data.load_folders("photos").eval]
    assert np.array_equal(np.stack(seen), made.test.images.numpy())
    with torch.no_grad():
        expected = network(made.pixels.normalise(made.test.images))
    np.testing.assert_allclose(logits_of("nets-tiny.onnx", seen), expected.numpy(), atol=1e-4)
    top1 = 100 * (expected.argmax(1) == made.test.targets).double().mean().item()
    assert facts["top1"] == pytest.approx(top1)
    assert json.loads(Path("nets-tiny.json").read_text())["files"]["int8"]["agreement"] >= 0.95


def test_the_temperature_is_fitted_on_images_that_training_saw_at_another_position_only():
    """--train-images' own choice of them, in the run's own order; int8 is calibrated on no other image."""
    run(train_images=20, epochs=150)
    train = data.load_data("folder", "photos", "cpu", size=64, train_images=20).train
    drawn = set()
    for epoch in range(150):
        order, views = data.epoch_draws(3, epoch, 20)
        for i, view in zip(order.tolist(), views.tolist()):
            image = train.images[i:i + 1]
            if torch.equal(data.crop_and_flip(image, torch.tensor([view])), image):
                drawn.add(i)
    images = export.find_images(export.load_student("student.pt"), "photos", 512)
    held_out = {x.numpy().tobytes() for x in images.held_out.images}
    assert 0 < len(drawn) < 20
    assert held_out == {x.numpy().tobytes() for i, x in enumerate(train.images) if i not in drawn}
    assert sorted(x.numpy().tobytes() for x in images.calibration.images) == sorted(
        x.numpy().tobytes() for x in train.images)


def test_val_alone_gives_accuracy_and_no_int8():
    """What a colleague hands over is often the evaluation images alone."""
    _, made = run()
    os.rename("photos/train", "elsewhere")
    output = call("--checkpoint", "student.pt", "--data-dir", "photos")
    assert "no train/ in photos: int8 is not calibrated, the temperature is not fitted" in output.splitlines()
    assert "accuracy on 24 of 24 evaluation images" in output.splitlines()
    facts = facts_of("nets-tiny.onnx")
    assert facts["top1"] > 90 and facts["temperature"] == 1 and not Path("nets-tiny.int8.onnx").exists()
    assert "--int8 needs training images" in refused("--checkpoint", "student.pt", "--data-dir", "photos",
                                                     "--int8")


def test_train_alone_gives_int8_and_a_temperature_and_no_accuracy():
    """int8 is then compared on training images: made ones would be refused, or prove nothing."""
    run()
    os.rename("photos/val", "elsewhere")
    output = call("--checkpoint", "student.pt", "--data-dir", "photos")
    assert "no evaluation images in photos: accuracy is not measured" in output.splitlines()
    assert "top1" not in facts_of("nets-tiny.int8.onnx") and facts_of("nets-tiny.onnx")["temperature"] != 1
    assert json.loads(Path("nets-tiny.json").read_text())["files"]["int8"]["compared"] == 24


def test_held_out_training_images_are_used_as_in_training():
    """One half of them for the temperature, the other for the accuracy; val/ alone is enough without them."""
    run(val_from_train=8)
    images = export.find_images(export.load_student("student.pt"), "photos", 512)
    held_out = data.load_data("folder", "photos", "cpu", size=64, val_from_train=8).eval
    found = torch.cat([images.held_out.images, images.test.images])
    assert len(found) == 8 and images.held_out_name == "4 held-out training images"
    assert {x.numpy().tobytes() for x in found} == {x.numpy().tobytes() for x in held_out.images}
    os.rename("photos/train", "elsewhere")
    images = export.find_images(export.load_student("student.pt"), "photos", 512)
    assert images.held_out is None and len(images.test.targets) == 24


def test_other_classes_are_refused_in_one_line():
    """An accuracy on them would be a number that means nothing."""
    run()
    photos("others", classes=["Käse", "blau", "rot"], count=1)
    photos("fewer", classes=["Käse", "rot"], count=1)
    for where, there in (("others", "3 classes (Käse, blau, rot"), ("fewer", "2 classes (Käse, rot")):
        assert f"{where} has {there}, ...), not the student's 3 (Käse, rot, 日本, ...)" in refused(
            "--checkpoint", "student.pt", "--data-dir", where)
    assert "no folders of images, one for each class, in nowhere/train" in refused(
        "--checkpoint", "student.pt", "--data-dir", "nowhere")
    assert sorted(os.listdir()) == ["fewer", "nets.py", "others", "photos", "student.pt"]


@pytest.mark.parametrize("size, counts", [(64, (5000, 10_000)), (224, (2000, 2000))])
def test_of_very_many_images_an_even_choice_is_read(size, counts, monkeypatch):
    """All of them would take hours; the first of them would be the first classes alone."""
    many = [(f"{i}", i * 3 // 12_345) for i in range(12_345)]
    found = data.Folders(many[:9000:2] + many[9000:], many, "val", CLASSES)
    monkeypatch.setattr(export, "load_folders", lambda *rest: found)
    monkeypatch.setattr(export, "read_images",
                        lambda samples, size, resize: torch.zeros(len(samples), 3, 1, 1))
    monkeypatch.setattr(export, "FolderImages", lambda samples, size: {
        (i, 0): ([torch.zeros(3, 1, 1)], [False], target, []) for i, (_, target) in enumerate(samples)})
    pixels = data.Preprocessing(size=64, resize=64) if size == 64 else data.IMAGENET_PREPROCESSING.at(size)
    facts = {"data": "folder", "epochs": 1, "seed": 0}
    images = export.find_images(export.Student(None, facts, 3, CLASSES, False, pixels), "photos", 30)
    assert [len(x.targets) for x in images[:3]] == [30, *counts]
    assert images.test.targets.bincount().tolist() == pytest.approx([counts[1] / 3] * 3, abs=1)
    assert images.held_out.targets.bincount(minlength=3).min() > counts[0] / 5


def test_a_damaged_image_is_named():
    run()
    Path("photos/val/rot/0.png").write_bytes(b"no image")
    assert "photos/val/rot/0.png" in refused("--checkpoint", "student.pt", "--data-dir", "photos")


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


def test_a_student_of_cifar10_knows_its_classes_and_pixels(monkeypatch):
    network, pixels = networks.create("resnet8", 10), data.CIFAR["cifar10"][2]
    save(network, "resnet8", "cifar10", data.CIFAR10_CLASSES, pixels)
    cifar10_only = "--checkpoint", "student.pt", "--no-int8"
    output = call(*cifar10_only)
    assert "no CIFAR-10 in data/ and no --data-dir: accuracy is not measured" in output
    assert SILENT not in output
    facts = facts_of("resnet8.onnx")
    assert facts["classes"][:2] == ["airplane", "automobile"] and facts["mean"] == list(pixels.mean)
    assert facts["std"] == list(pixels.std) and facts["size"] == [32, 32]
    assert "no CIFAR-10 in nowhere: --data-dir names the folder that holds cifar-10-batches-py" in refused(
        *cifar10_only, "--data-dir", "nowhere")
    for name, value in cifar10("data").items():
        monkeypatch.setattr(CIFAR10, name, value)
    student = export.load_student("student.pt")
    images = export.find_images(student, None, 512)
    assert [len(x.targets) for x in images[:3]] == [100, len(images.held_out.targets), 20]
    expected = data.load_data("cifar10", "data", "cpu")
    assert torch.equal(images.test.images, expected.test.images)
    assert torch.equal(images.test.targets, expected.test.targets)

    torch.save(network.state_dict(), "bare.pt")         # takes it where it is named, and not else
    bare = export.load_student("bare.pt")
    images = export.find_images(bare, "data", 512)
    assert images.classes == list(data.CIFAR10_CLASSES) and len(images.test.targets) == 20
    assert images.held_out is None
    assert export.find_images(bare, None, 512) == export.Images()


# ---------------------------------------------------------------- files that say nothing


def ten(**facts):
    torch.manual_seed(0)
    torch.save({"state_dict": networks.create("resnet8", 10).state_dict(), **facts}, "ten.pt")
    return "--checkpoint", "ten.pt", "--student", "resnet8"


def names_file(names, path="names.txt", encoding="utf-8"):
    Path(path).write_text("\n".join(names) + "\n", encoding=encoding)
    return path


def test_what_is_assumed_of_a_bare_file_is_said_in_one_line_that_names_the_flags():
    """Another mean than the training's costs accuracy, and no error says so."""
    output = call(*ten())
    line, = (x for x in output.splitlines() if "mean" in x)
    assert line.startswith(f"ten.pt {SILENT}: ") and "CIFAR-100's are taken, at 32 pixels" in line
    assert all(flag in line for flag in ("--mean", "--std", "--size", "--classes"))
    assert "CIFAR" not in output.replace(line, "")          # and nothing contradicts it
    facts = facts_of("resnet8.onnx")
    assert facts["classes"] == [f"class {i}" for i in range(10)] and facts["mean"] == list(data.MEAN)


def test_flags_say_what_a_bare_file_does_not():
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


def test_flags_override_what_a_file_says():
    ten()
    save(networks.create("resnet8", 10), "resnet8", "birds", CLASSES, data.IMAGENET_PREPROCESSING.at(64))
    student = export.load_student("student.pt", mean="0.5,0.5,0.5", std="0.1,0.1,0.1", size=112,
                                  classes=names_file("abcdefghij"))
    assert student.pixels == data.Preprocessing((0.5,) * 3, (0.1,) * 3, 112, 128)
    assert student.classes == list("abcdefghij")


@pytest.mark.parametrize("flag, value, words", [
    ("--classes", "three.txt", "three.txt has 3 names, one a line; the network 10"),
    ("--classes", "latin.txt", "'utf-8' codec can't decode byte 0xe9"),
    ("--classes", "none.txt", "No such file or directory"),
    ("--classes", ".", "Is a directory"),
    *[(flag, value, "--mean and --std take three numbers in [0, 1]") for flag, value in (
        ("--mean", "123.7,116.3,103.5"), ("--mean", "0.5,0.5"), ("--mean", "0.5"), ("--mean", "a,b,c"),
        ("--mean", "-0.1,0.5,0.5"), ("--mean", "nan,0.5,0.5"), ("--mean", "0.5,nan,0.5"),
        ("--std", "0,0.2,0.2"), ("--std", "0.2,0.2,58.4"), ("--std", "0.2,0.2,inf"),
        ("--std", "0.2;0.2;0.2"))],
])
def test_flags_that_cannot_be_are_one_line(flag, value, words):
    names_file(CLASSES, "three.txt")
    names_file(["café"] * 10, "latin.txt", "latin-1")
    assert words in refused(*ten(), flag, value)


def test_a_bare_file_takes_the_folder_that_is_named(tmp_path):
    """Its classes' names too, where their number fits; the temperature is not fitted on what training saw."""
    made = data.load_data("folder", photos(), "cpu", size=32)
    pixels = data.Preprocessing()
    torch.save({"net": trained("nets.py:tiny", *made.train, pixels, 3).state_dict(), "epochs": 9, "seed": 0},
               "bare.pt")       # whose seed means nothing here
    bare = "--checkpoint", "bare.pt", "--student", "nets.py:tiny", "--data-dir", "photos"
    output = call(*bare)
    assert output.count(SILENT) == 1 and "24 of 24 evaluation images" in output
    assert "the temperature is not fitted" in output and Path("nets-tiny.int8.onnx").exists()
    facts = facts_of("nets-tiny.onnx")
    assert facts["classes"] == CLASSES and facts["top1"] > 90 and facts["temperature"] == 1
    images = export.find_images(export.load_student("bare.pt", "nets.py:tiny"), "photos", 512)
    assert torch.equal(images.test.images, made.test.images)

    call(*bare, "--classes", names_file(["cheese", "red", "Japan"]), "--no-int8")       # to be read by people
    assert facts_of("nets-tiny.onnx")["classes"] == ["cheese", "red", "Japan"]
    assert "photos has 3 classes" in refused(*bare, "--classes", names_file(CLASSES[::-1]))    # another order
    assert "photos has 3 classes (Käse, rot, 日本, ...), not the student's 10 (?, ...)" in refused(
        *ten(), "--data-dir", "photos")
    assert refused(*ten(), "--data-dir", ".").endswith(
        "no CIFAR-10 in .: --data-dir names the folder that holds cifar-10-batches-py, or train/ or val/")


def test_a_hundred_classes_are_cifar100s_unless_their_names_are_others():
    torch.save(networks.create("resnet8", 100).state_dict(), "bare.pt")
    output = call("--checkpoint", "bare.pt")
    assert SILENT not in output and "no CIFAR-100 in data/ and no --data-dir" in output
    assert facts_of("resnet8.onnx")["classes"] == list(data.CIFAR100_CLASSES)
    names = [f"bird {i}" for i in range(100)]
    output = call("--checkpoint", "bare.pt", "--classes", names_file(names))
    assert "CIFAR" not in output and facts_of("resnet8.onnx")["classes"] == names


def test_a_teachers_path_is_not_shipped():
    save(networks.create("resnet8", 3), "resnet8", "folder", CLASSES, data.Preprocessing(), method="kd",
         teacher="/home/me/t.py:large")
    call("--checkpoint", "student.pt")
    assert facts_of("resnet8.onnx")["teacher"] == "t-large"
    assert b"/home" not in Path("resnet8.onnx").read_bytes()
