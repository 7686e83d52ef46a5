"""Folders of images in both scripts, and CIFAR-10: what is read, kept, skipped and refused."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as per_image

import data
import recipes
import teacher
import train_cifar
import train_imagenet
import zscore_kd
from data import load_folders
from models import MODELS, create_model

SCRIPTS = {"cifar": (train_cifar, ["--data", "folder", "--size", "32"]),
           "imagenet": (train_imagenet, ["--size", "32", "--workers", "0"])}
SHORT = ["--epochs", "1", "--batch-size", "8", "--lr", "0.01", "--device", "cpu"]
ALONE = ["--method", "none", "--student", "resnet8"]
both = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder with images/ in it: 24 for training, 9 for evaluation, 3 classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("CIFAR10_URL", "http://127.0.0.1:9/none.tar.gz")
    monkeypatch.setitem(train_cifar.CHUNK, "cpu", 24)       # small runs too prepare steps in several chunks
    monkeypatch.setitem(teacher.BATCH, "cpu", 16)
    photos(tmp_path / "images", {"train": 24, "val": 9})
    return tmp_path


def photos(folder, counts, classes=3):
    """PNG files of several sizes; classes differ in colour."""
    draw = np.random.default_rng(len(counts))
    for part, count in counts.items():
        for i in range(count):
            picture(folder / part / f"class{i % classes}" / f"{i}.png", draw, i % classes % 3,
                    (52 - i % 3 * 9, 36 + i % 5 * 7))


def picture(path, draw=None, plane=0, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (draw or np.random.default_rng(0)).integers(0, 128, (*size[::-1], 3), dtype=np.uint8)
    pixels[..., plane] += 100
    Image.fromarray(pixels).save(path)


def call(script, *arguments, code=0, charset="utf-8"):
    """What a command prints. The script's own flags come first, so that a test's win."""
    module, flags = SCRIPTS[script]
    return invoke(module, *flags, "--data-dir", "images", *SHORT, *arguments, code=code, charset=charset)


def invoke(module, *arguments, code=0, charset="utf-8"):
    runner = CliRunner(charset=charset)
    result = runner.invoke(module.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def only(pattern):
    found, = Path().glob(pattern)
    return found


def pixels_of(path, size):
    """The image of an RGB file as documented: the shorter side `size`, Pillow's antialiased bilinear, the
    centre; (3, size, size) uint8."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.Resampling.BILINEAR)
    else:
        image = image.resize((int(size * width / height), size), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def listed(part, root="images"):
    """[(path, target)] of a part, in the order of class and file names."""
    classes = sorted(p.name for p in Path(root, part).iterdir())
    return [(path, i) for i, name in enumerate(classes) for path in sorted(Path(root, part, name).iterdir())]


# ---------------------------------------------------------------- pixels


def test_a_folder_is_read_in_order_with_its_names_and_targets():
    """A target that belongs to another image, or class names in another order, would be learnt silently."""
    read = data.load_data("folder", "images", "cpu", size=40)
    for split, part in ((read.train, "train"), (read.test, "val")):
        assert split.targets.tolist() == [target for _, target in listed(part)]
        assert np.array_equal(split.images, np.stack([pixels_of(path, 40) for path, _ in listed(part)]))
    assert read.classes == ["class0", "class1", "class2"] and read.eval is read.test
    assert read.eval_name == "val" and read.pixels[2:] == (40, 40)


def test_mean_and_standard_deviation_are_those_of_the_training_images_and_kept():
    """Of images that a run may not learn from, or of other pixels than the network's, they would be wrong."""
    call("cifar", *ALONE, "--size", 40, "--val-from-train", 6, "--train-images", 12)
    read = data.load_data("folder", "images", "cpu", size=40, val_from_train=6, train_images=12)
    known = {pixels_of(path, 40).tobytes() for path, _ in listed("train")}
    mine, other = ({image.numpy().tobytes() for image in split.images} for split in (read.train, read.eval))
    assert len(mine) == 12 and mine <= known and not mine & other
    values = read.train.images.double() / 255
    mean, std = values.mean((0, 2, 3)), (values.flatten(2).transpose(0, 1).flatten(1).std(1, correction=0))
    student = torch.load(only("runs/*/student.pt"))
    recipe = json.loads(only("runs/*/config.json").read_text())["recipe"]
    for told in (student, read.pixels._asdict()):
        assert torch.allclose(torch.tensor(told["mean"], dtype=torch.double), mean, rtol=0, atol=5.1e-5)
        assert torch.allclose(torch.tensor(told["std"], dtype=torch.double), std, rtol=0, atol=5.1e-5)
    assert (student["size"], student["resize"], student["data"]) == (40, 40, "folder")
    assert student["classes"] == ["class0", "class1", "class2"] and recipe["size"] == 40


# ---------------------------------------------------------------- a run


@pytest.fixture
def pair(folder):
    """The flags of a distillation from a small teacher that was trained on images normalised otherwise."""
    torch.manual_seed(5)
    network = create_model("resnet14", 3).train()
    with torch.no_grad():
        for _ in range(20):         # batch norms that know images of its kind
            network(torch.randn(8, 3, 32, 32))
    torch.save({"model": network.state_dict(), "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1)}, "teacher.pt")
    return ["--teacher", "resnet14", "--teacher-checkpoint", "teacher.pt", "--student", "resnet8"]


def on(image, mean, std):
    """torchvision's ToTensor and Normalize of uint8 (..., 3, H, W)."""
    return per_image.normalize(image.float() / 255, mean, std)


def test_two_epochs_equal_a_plain_loop(pair):
    """Written out at 40 x 40: views by torchvision, one image at a time; the teacher on pixels of its own."""
    call("cifar", *pair, "--size", 40, "--epochs", 2, "--batch-size", 16, "--exact-teacher")
    read = data.load_data("folder", "images", "cpu", size=40)
    torch.manual_seed(0)
    student, frozen = create_model("resnet8", 3), create_model("resnet14", 3).eval()
    frozen.load_state_dict(torch.load("teacher.pt")["model"])
    optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 4])       # of 4 steps: 2.5, 3, 3.5
    for epoch in range(2):
        order, views = data.epoch_draws(0, epoch, 24)
        for part in (slice(0, 16), slice(16, 24)):
            crops = []
            for i, view in zip(order[part], views[part]):
                padded = per_image.pad(read.train.images[i], 4)
                crop = per_image.crop(padded, view // 18, view // 2 % 9, 40, 40)
                crops.append(per_image.hflip(crop) if view % 2 else crop)
            crops, target = torch.stack(crops), read.train.targets[order[part]]
            z = student(on(crops, *read.pixels[:2]))
            v = frozen(on(crops, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))).detach()
            kd = 16 * nn.KLDivLoss(reduction="batchmean")((z / 4).log_softmax(1), (v / 4).softmax(1))
            loss = 0.1 * nn.CrossEntropyLoss()(z, target) + 0.9 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    ours = torch.load(only("runs/*/student.pt"))["model"]
    for key, value in student.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-3)


def test_a_stopped_run_resumes_with_the_bits_of_an_unbroken_one(pair, killed):
    """Else a night's run that was cut off is another run. With strong views, at a size of its own."""
    flags = [*pair, "--method", "mlkd", "--zscore", "--size", 40, "--epochs", 2]
    call("cifar", *flags, "--out", "whole")
    with killed():
        call("cifar", *flags, "--save-every", "1e-9", "--out", "broken")
    assert "resuming from epoch 1, step 2" in call("cifar", *flags, "--out", "broken")
    whole, broken = (torch.load(only(f"{out}/*/last.pt")) for out in ("whole", "broken"))
    assert all(map(torch.equal, whole["model"].values(), broken["model"].values()))
    assert whole["best"] == broken["best"]


def test_every_network_takes_images_of_64():
    """A network whose last map is of one size would only fail after hours of reading."""
    torch.manual_seed(0)
    for name in MODELS:
        with torch.no_grad():
            logits = create_model(name, 7).eval()(torch.randn(2, 3, 64, 64))
        assert logits.shape == (2, 7) and logits.isfinite().all(), name


def test_other_images_in_the_same_folder_are_another_run():
    """Resuming on them would mix two data sets."""
    call("cifar", *ALONE)
    assert "finished before" in call("cifar", *ALONE)
    path = listed("train")[5][0]
    image = Image.open(path)
    image.putpixel((20, 18), (0, 0, 0))
    image.save(path)
    assert "holds a run of another recipe (images was 24 and 9 of 3 classes" in call("cifar", *ALONE, code=1)


@both
def test_held_out_training_images_need_no_val(script):
    shutil.rmtree("images/val")
    output = call(script, *ALONE, "--val-from-train", 6)
    row = json.loads(only("runs/*/log.jsonl").read_text())
    assert "held-out_top1" in row and "val_top1" not in row and "chosen on held-out" in output
    held = load_folders("images", 6)
    assert (len(held.train), len(held.eval)) == (18, 6) and not {*held.train} & {*held.eval}


# ---------------------------------------------------------------- evaluation, and a teacher's own pixels


@both
def test_a_teachers_logits_are_those_on_its_own_pixels(pair, monkeypatch, script, method="mlkd"):
    """All that a student is taught in a run, computed, cached and read again, is the network's on its own."""
    seen, module = [], SCRIPTS[script][0]

    def epoch(batches, *rest, real=module.Batches.epoch):
        for batch in real(batches, *rest):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(module.Batches, "epoch", epoch)
    exact = ["--exact-teacher"] if script == "cifar" else []
    run = [*pair, "--method", method, *exact]
    call(script, *run)
    if script == "cifar":
        shutil.rmtree(only("runs/resnet14@*"))
        assert only("runs/logits/*").stat().st_size == 24 * 162 * (3 * 4 + 1)
        call(script, *run)          # from the file
        assert len(seen) == 6
    pixels = data.IMAGENET_PREPROCESSING.at(32)
    if script == "cifar":
        pixels = data.load_data("folder", "images", "cpu", size=32).pixels
    network = create_model("resnet14", 3).double().eval()
    network.load_state_dict(torch.load("teacher.pt")["model"])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in pixels[:2])
    for views, _, _, logits in seen:
        assert len(views) == len(logits) == (2 if method == "mlkd" else 1)
        for view, ours in zip(views, logits):
            image = view.double() * std + mean          # in [0, 1]
            with torch.no_grad():
                theirs = network(per_image.normalize(image, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)))
            assert theirs.std() > 0.01
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["pixels", "images"])
def test_another_teacher_or_other_images_have_logits_of_their_own(pair, change):
    """Its mean and standard deviation became known, or one image was exchanged: nothing cached is read."""
    call("cifar", *pair, "--zscore")
    if change == "pixels":
        torch.save(torch.load("teacher.pt")["model"], "teacher.pt")
    else:
        picture(listed("train")[-1][0], np.random.default_rng(7))
    shutil.copytree("runs/logits", "shared/logits")
    for out in ("shared", "fresh"):
        call("cifar", *pair, "--zscore", "--out", out)
    ours, fresh = (torch.load(only(f"{out}/*/student.pt"))["model"] for out in ("shared", "fresh"))
    assert all(map(torch.equal, ours.values(), fresh.values())) and len(os.listdir("shared/logits")) == 2


def test_a_missing_teacher_is_trained_on_the_folder_first():
    """Nobody publishes one for a user's own photos. Its file has their classes and pixels."""
    flags = ["--teacher", "resnet14", "--student", "resnet8", "--size", 40]
    assert "no teacher is published for folder images; training resnet14 here first" in call("cifar", *flags)
    told = torch.load(only("runs/resnet14-none-*/student.pt"))
    assert told["classes"] == ["class0", "class1", "class2"] and told["size"] == 40
    assert told["mean"] == data.load_data("folder", "images", "cpu", size=40).pixels.mean
    assert not list(Path().glob("checkpoints/*"))       # which are for CIFAR-100
    assert "finished before" in call("cifar", *flags, "--seed", 1)


@both
def test_eval_needs_val_alone_and_the_file_has_the_rest(script):
    """On the machine where a network is checked the training images are seldom there. Accuracy and loss are
    those of a loop over val/, with the mean, standard deviation and size of its metadata."""
    call(script, *ALONE, "--size", 40, "--epochs", 2)
    shutil.rmtree("images/train")
    path, module = only("runs/*/student.pt"), SCRIPTS[script][0]
    workers = ["--workers", "0"] if script == "imagenet" else []
    output = invoke(module, "--eval", path, "--data-dir", "images", "--device", "cpu", *workers)
    told = torch.load(path)
    network = create_model("resnet8", 3).eval()
    network.load_state_dict(told["model"])
    first, loss = 0, 0.0
    for file, target in listed("val"):
        if script == "cifar":
            image = torch.from_numpy(pixels_of(file, 40).copy())
        else:       # 256 for 224: 46 for 40, then the centre
            image = per_image.pil_to_tensor(per_image.center_crop(
                per_image.resize(Image.open(file), 46, antialias=True), [40, 40]))
        with torch.no_grad():
            logits = network(on(image, told["mean"], told["std"])[None])
        first, loss = first + (logits.argmax() == target).item(), loss + nn.functional.cross_entropy(
            logits, torch.tensor([target])).item()
    line = output.splitlines()[-1]
    assert line.startswith(f"resnet8: {100 * first / 9:.2f} top-1, ") and " on the 9 val images of " in line
    assert float(re.search(r"loss ([\d.]+)", line)[1]) == pytest.approx(loss / 9, abs=2e-4)


def test_eval_of_other_classes_is_refused(script="imagenet"):
    """Accuracies of a network on classes that it does not know, or in another order, mean nothing."""
    call(script, *ALONE)
    found = only("runs/*/student.pt")
    torch.save(torch.load(found) | {"classes": ["class1", "class0", "class2"]}, "order.pt")
    assert "order.pt is for 3 classes (class1, class0, " in call(script, "--eval", "order.pt", code=1)
    shutil.move("images/val/class1", "images/val/class9")
    output = call(script, "--eval", found, code=1)
    assert (f"Error: {found} is for 3 classes (class0, class1, class2, ...), these images have 3 "
            "(class0, class2, class9, ...)") in output


# ---------------------------------------------------------------- names


HIDDEN = ["train/.ipynb_checkpoints/a.png", "train/__MACOSX/class0/._1.png", "train/class0/._0.png",
          "train/class1/.cache/deep/a.png", "train/class2/__MACOSX/._2.png", "val/.ipynb_checkpoints/a.png",
          "val/class0/.hidden.png"]


def test_what_operating_systems_and_notebooks_leave_behind_is_no_class_and_no_image(script="cifar"):
    """An empty ._1.png would end a run, and .ipynb_checkpoints would be a class that val/ lacks."""
    for name in HIDDEN:
        picture(Path("images", name))
    Path("images/train/class0/._0.png").write_bytes(b"\0\5\x16\7")
    Path("images/train/.DS_Store").write_bytes(b"\0")
    picture(Path("images/train/class0/nested/a.b/99.png"))      # of the class, as torchvision reads it
    output = call(script, *ALONE)
    assert "notice: images/train: skipped 5 hidden files and files whose ending is no image's, " in output
    assert "notice: images/val: skipped 2 hidden files and files whose ending is no image's, " in output
    assert "25 and 9 of 3 classes" in output
    found = load_folders("images", say=lambda line: None)
    assert found.classes == ["class0", "class1", "class2"]
    assert {os.path.relpath(p, "images/train") for p, _ in found.train} == {
        *(os.path.relpath(p, "images/train") for p in Path("images/train").rglob("[0-9]*.png"))}


def test_a_folder_inside_a_hidden_one_is_read(script="imagenet"):
    """~/.cache/photos is where some keep their images: only names below train/ and val/ are looked at."""
    shutil.move("images", "home/.cache/images")
    output = call(script, *ALONE, "--data-dir", "home/.cache/images")
    assert "24 and 9 of 3 classes" in output and "skipped" not in output


@pytest.fixture
def odd(folder):
    """photos\\xff/: a folder, a class and files whose names are not UTF-8, as old archives have them."""
    root = os.fsdecode(b"photos\xff")
    try:
        shutil.copytree("images", root)
        for part in ("train", "val"):
            os.rename(f"{root}/{part}/class1", os.fsencode(f"{root}/{part}/caf") + b"\xe9")
            for path in Path(root, part, "class2").iterdir():
                os.rename(path, path.with_name(os.fsdecode(b"\xe9\xff" + os.fsencode(path.name))))
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    return root


@both
def test_names_that_are_not_utf8_work_everywhere(odd, killed, script):
    """Trained, stopped, resumed, evaluated, refused; the student keeps the names' bytes."""
    flags = [*ALONE, "--data-dir", odd, "--epochs", 2]
    with killed(0, 1):
        call(script, *flags, "--save-every", "1e-9", charset="ascii")
    assert "resuming from epoch 0, step 1" in call(script, *flags, charset="ascii")
    path = only("runs/*/student.pt")
    told = torch.load(path)
    assert [os.fsencode(name) for name in told["classes"]] == [b"caf\xe9", b"class0", b"class2"]
    assert "on the 9 val images" in call(script, "--eval", path, "--data-dir", odd, charset="ascii")
    output = call(script, "--eval", path, code=1, charset="ascii")
    assert re.search(r"is for 3 classes \(caf\S{1,6}, class0, ", output)        # click's ? in ASCII
    bad, = Path(odd, "val", "class2").glob("*2.png")
    bad.write_bytes(b"no image")
    output = call(script, *flags, "--seed", 1, code=1, charset="ascii").splitlines()[-1]
    assert "cannot be decoded, for instance " in output and r"val/class2/\xe9\xff2.png" in output


def test_tiny_imagenet_as_downloaded_comes_in_order_by_the_line_that_is_printed(script="imagenet"):
    """Its val/ has no folders of classes; the command, pasted into a shell, makes them, wherever it is."""
    root = "it's tiny; imagenet"
    names = ["n01443537", "n01629819", "n01641577"]
    rows = []
    for i, (name, count) in enumerate(zip(names * 4, [0] * 3 + [1] * 9)):
        if not count:
            for j in range(8):
                picture(Path(root, "train", name, "images", f"{name}_{j}.JPEG"), None, i, (64, 64))
            Path(root, "train", name, f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
        else:
            picture(Path(root, "val", "images", f"val_{i}.JPEG"), np.random.default_rng(i), i % 3, (64, 64))
            rows.append(f"val_{i}.JPEG\t{name}\t0\t32\t44\t62\n")
    picture(Path(root, "test", "images", "test_0.JPEG"))
    Path(root, "val", "val_annotations.txt").write_text("".join(rows))
    Path(root, "wnids.txt").write_text("\n".join(names))
    output = call(script, *ALONE, "--data-dir", root, code=1).splitlines()[-1]
    assert output.startswith("Error: ") and "is Tiny-ImageNet's as it was downloaded" in output
    command = output.split("downloaded; run: ")[1]
    subprocess.run(["sh", "-c", command], check=True)
    assert "24 and 9 of 3 classes" in call(script, *ALONE, "--data-dir", root, "--size", 64)
    found = load_folders(root)
    assert found.classes == names and {os.path.basename(p): found.classes[t] for p, t in found.eval} == {
        row.split("\t")[0]: row.split("\t")[1] for row in rows}


# ---------------------------------------------------------------- mistakes


def one_class():
    for name in ("class1", "class2"):
        for part in ("train", "val"):
            shutil.rmtree(f"images/{part}/{name}")


def empty_class():
    for path in Path("images/val/class1").iterdir():
        path.rename(path.with_suffix(".txt"))


def rename(train, val):
    """class2 becomes another name in train/ than in val/."""
    os.rename("images/train/class2", f"images/train/{train}")
    os.rename("images/val/class2", f"images/val/{val}")


def damaged(part):
    def damage():
        path = Path(f"images/{part}/class0/0.png")
        path.write_bytes(path.read_bytes()[:200])
    return damage


def two_classes():
    for part in ("train", "val"):
        shutil.rmtree(f"images/{part}/class2")


TEACHER = ["--teacher", "resnet14", "--teacher-checkpoint", "none.pt", "--student", "resnet8"]
MISTAKES = [        # script, what is done to images/, flags, words of the line
    ("cifar", one_class, ALONE, "no folders of images, one for each class, in images/train (1 found)"),
    ("imagenet", empty_class, ALONE, "no images in the class images/val/class1: add some (.jpg, "),
    ("cifar", lambda: shutil.move("images/val/class2", "images/val/Class2"), ALONE,
     "images: val/ lacks 1 of the classes, for instance class2; train/ lacks 1 of the classes, for instance "
     "Class2"),
    ("imagenet", lambda: shutil.rmtree("images/train/class1"), ALONE,
     "images: train/ lacks 1 of the classes, for instance class1"),
    ("cifar", lambda: rename("caf\u00e9", "cafe\u0301"), ALONE,
     "images: the classes of train/ and val/ differ in the Unicode form of their names alone: rename them"),
    ("imagenet", lambda: shutil.move("images/val", "images/valid"), ALONE,
     "in images/val (0 found): link or rename valid/, which is next to it, or give --val-from-train N"),
    ("imagenet", lambda: shutil.rmtree("images/val"), ALONE,
     "no folders of images, one for each class, in images/val (0 found): --data-dir holds"),
    ("cifar", None, [*ALONE, "--data-dir", "nowhere"], "in nowhere/train (0 found)"),
    ("cifar", None, [*ALONE, "--val-from-train", "24"],
     "--val-from-train 24 leaves nothing of 24 training images"),
    ("imagenet", None, [*ALONE, "--val-from-train", "24"],
     "--val-from-train 24 leaves nothing of 24 training images"),
    ("imagenet", None, [*ALONE, "--batch-size", "25"], "--batch-size 25, the total, does not fit 24 images"),
    ("cifar", two_classes, [*TEACHER, "--method", "dkd"], "need three classes, these images have 2"),
    ("imagenet", None, [*ALONE, "--eval", "none.pt", "--student", "resnet14", "--data-dir", "nowhere"],
     "without val/ give --val-from-train N"),
    ("cifar", damaged("train"), ALONE,
     "1 of 24 images cannot be decoded, for instance images/train/class0/0.png ("),
    ("cifar", damaged("val"), ALONE, "cannot be decoded, for instance images/val/class0/0.png"),
    ("imagenet", damaged("val"), ALONE, "cannot be decoded, for instance images/val/class0/0.png"),
    ("cifar", None, [*ALONE, "--train-images", "25"], "--train-images 25: there are 24 training images"),
]


@pytest.mark.parametrize("script, harm, flags, words", MISTAKES)
def test_a_mistake_is_one_line(script, harm, flags, words):
    """No traceback, what is wrong and where; and nothing is begun that the same command would resume."""
    torch.save(create_model("resnet14", 2).state_dict(), "none.pt")
    if harm:
        harm()
    output = call(script, *flags, code=1).splitlines()
    assert output[-1].startswith("Error: ") and words in output[-1]
    assert not [line for line in output[:-1] if line.startswith(("Error", "Traceback"))]
    if "cannot be decoded" not in words:        # train_imagenet.py reads val/ after an epoch, which it keeps
        assert not list(Path().rglob("last.pt"))


def test_a_folder_that_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    """The system would end the process without a word. Half is left for the rest of a run."""
    need = 33 * 3 * 32**2
    monkeypatch.setattr(data, "free_memory", lambda: 2 * need - 1)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_images", lambda *rest: pytest.fail("it was read"))
        line = call("cifar", *ALONE, code=1).splitlines()[-1]
    assert "32 x 32 images take 0.0 GB, 0.0 GB are free" in line
    assert "a smaller --size, or train_imagenet.py" in line
    monkeypatch.setattr(data, "free_memory", lambda: 2 * need)
    assert len(data.load_data("folder", "images", "cpu", size=32).train.targets) == 24


@both
def test_two_classes_are_taught_without_z(script):
    """A cat-or-dog folder is the commonest; what is refused for it says what works, and that works."""
    two_classes()
    torch.save(create_model("resnet14", 2).state_dict(), "none.pt")
    output = call(script, *TEACHER, "--zscore", code=1)
    assert "need three classes, these images have 2" in output.splitlines()[-1]
    assert "top-1" not in output        # before a teacher is evaluated, or trained for hours
    output = call(script, *TEACHER)
    assert "base_temp 4.0" in output or script == "imagenet"
    assert "last epoch" in output


# ---------------------------------------------------------------- the temperature for other class counts


@pytest.mark.parametrize("classes", [2, 3, 7, 10, 37, 100, 101, 1000])
def test_the_suggested_temperature_leaves_the_papers_ceiling(classes):
    """0.6, the top probability of a one-hot row for the papers' 100 classes at 2, or all that there is."""
    one_hot = torch.eye(classes, dtype=torch.double)[:1]
    tops = {tau: zscore_kd.weighted_zscore(one_hot, tau).softmax(-1).max() for tau in (2.0, 1.5, 1.0)}
    assert recipes.suggested_temperature(classes) == next((t for t, top in tops.items() if top >= 0.6), 1.0)
    assert recipes.suggested_temperature(21841) == 0.5      # no real row comes near the ceiling


@both
def test_a_notice_comes_where_no_paper_has_a_temperature(pair, script):
    """With 3 classes the papers' temperature flattens a teacher; with a number given nothing is said."""
    told = re.compile(r"^notice: for 3 classes zscore_kd.py's table suggests --base-temp 1.5$", re.M)
    assert told.search(call(script, *pair, "--zscore"))
    assert not told.search(call(script, *pair, "--zscore", "--base-temp", 1.5, "--seed", 1))
    assert not told.search(call(script, *pair, "--seed", 2))


# ---------------------------------------------------------------- CIFAR-10


CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()      # batches.meta's


@pytest.fixture
def made(folder, monkeypatch):
    """A CIFAR-10 of 5 x 8 + 12 images in the published layout: (its folder's parent, images, labels)."""
    draw, sums = np.random.default_rng(0), {}
    root = folder / "made" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    images, labels = draw.integers(0, 256, (52, 3072), dtype=np.uint8), draw.permutation(np.arange(52) % 10)
    parts = {f"data_batch_{i + 1}": slice(8 * i, 8 * i + 8) for i in range(5)} | {"test_batch": slice(40, 52)}
    for name, part in parts.items():
        sums[name] = write(root / name, {"labels": labels[part].tolist(), "data": images[part]})
    meta = write(root / "batches.meta", {"label_names": CLASSES})
    published = [(CIFAR10, name, getattr(CIFAR10, name)) for name in ("train_list", "test_list", "meta")]
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in parts if "data" in name])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    return root.parent, images.reshape(52, 3, 32, 32), labels, published


def write(path, content):
    """Pickles to a file; its MD5."""
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("way", ["folder", "the folder itself", "archive", "download"])
def test_cifar10_is_read_to_the_pixel_from_wherever_it_is(made, serve, monkeypatch, way):
    root, images, labels, _ = made
    packed = root / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as file:
        file.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    where = {"folder": root, "the folder itself": root / "cifar-10-batches-py"}.get(way, Path("to"))
    if way == "archive":
        where.mkdir()
        shutil.copy(packed, where)
    elif way == "download":
        shutil.copy(packed, serve[0] / "mirror.tar.gz")
        monkeypatch.setenv("CIFAR10_URL", f"{serve[1]}/mirror.tar.gz")
    assert data.cifar_folder("cifar10", where).is_dir() == ("folder" in way)
    read = data.load_data("cifar10", where, "cpu")
    assert np.array_equal(read.train.images, images[:40]) and np.array_equal(read.test.images, images[40:])
    assert np.array_equal(read.train.targets, labels[:40]) and np.array_equal(read.test.targets, labels[40:])
    assert read.train.images.dtype == torch.uint8 and list(read.classes) == CLASSES and read.num_classes == 10
    assert bool(serve[2].asked) == (way == "download")
    data.read_cifar("cifar10", where, download=False)       # and stays


def test_another_cifar10_than_the_published_is_refused_as_damaged(made, monkeypatch):
    for thing in made[3]:
        monkeypatch.setattr(*thing)
    with pytest.raises(ValueError, match="^no CIFAR-10 in .*made, or it is damaged .*: try wget -c http"):
        data.read_cifar("cifar10", made[0], download=False)
    for where in ("made", "nothing"):
        line = invoke(train_cifar, *ALONE, *SHORT, "--data", "cifar10", "--data-dir", where, code=1)
        line = line.splitlines()[-1]
        assert line.startswith(f"Error: no CIFAR-10 in {where}, or it is damaged (")
        assert f"wget -c http://127.0.0.1:9/none.tar.gz -O {where}/cifar-10-python.tar.gz, " in line


def test_a_run_on_cifar10_is_of_ten_classes_and_eval_knows_it(made):
    """The flags that matter are in the file: --eval of it needs the folder alone."""
    flags = ["--data", "cifar10", "--data-dir", "made", *SHORT]
    output = invoke(train_cifar, *ALONE, *flags)
    told = torch.load(only("runs/resnet8-none-*/student.pt"))
    assert told["classes"] == CLASSES and told["data"] == "cifar10" and told["num_classes"] == 10
    assert (told["mean"], told["std"]) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert "test top-1" in output and "published" not in output.splitlines()[-1]
    path = only("runs/resnet8-none-*/student.pt")
    output = invoke(train_cifar, "--eval", path, "--data-dir", "made", "--device", "cpu")
    network = create_model("resnet8", 10).eval()
    network.load_state_dict(told["model"])
    images, labels = torch.from_numpy(made[1][40:]), torch.from_numpy(made[2][40:])
    with torch.no_grad():
        logits = network(on(images, told["mean"], told["std"]))
    top1 = 100 * (logits.argmax(1) == labels).double().mean()
    assert f"resnet8: {top1:.2f} top-1, " in output and "on the 12 test images of cifar10" in output
    # distilled: the teacher is the file; Z's temperature is not published for ten classes
    output = invoke(train_cifar, "--teacher", "resnet8", "--teacher-checkpoint",
                    path, "--student", "resnet14", "--zscore", *flags)
    assert "notice: for 10 classes zscore_kd.py's table suggests --base-temp 1\n" in output
    assert f"student.pt): {top1:.2f} % top-1 on the test images\n" in output
