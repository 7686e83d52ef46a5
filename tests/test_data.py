"""CIFAR-100 in batches equals CIFAR-100 image by image; draws, sets and downloads are as promised."""

import hashlib
import pickle
import socket
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as per_image

import data
from data import VIEWS, crop_and_flip, epoch_draws, load_data, normalise, synthetic
from distill import evaluate


def one_by_one(image, view):
    """The field's transforms for one image (3, 32, 32) uint8: pad, crop, flip, ToTensor, Normalize."""
    top, left, flip = view // 18, view // 2 % 9, view % 2
    picture = per_image.pad(Image.fromarray(image.permute(1, 2, 0).numpy()), 4)
    picture = per_image.crop(picture, top, left, 32, 32)
    picture = per_image.hflip(picture) if flip else picture
    tensor = transforms.ToTensor()(picture)
    return transforms.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))(tensor)


def test_batched_augmentation_is_torchvisions_for_all_162_views(generator):
    images = torch.randint(256, (VIEWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    views = torch.arange(VIEWS)
    ours = normalise(crop_and_flip(images, views))
    theirs = torch.stack([one_by_one(image, view) for image, view in zip(images, views.tolist())])
    assert torch.equal(ours, theirs)        # bit for bit
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_batched_augmentation_on_real_images(cifar):
    train = load_data("cifar100", cifar, "cpu").train
    order, views = epoch_draws(0, 0, 50_000)
    chosen = torch.from_numpy(order[:100])
    ours = normalise(crop_and_flip(train.images[chosen], torch.from_numpy(views[:100])))
    theirs = [one_by_one(train.images[i], view) for i, view in zip(order[:100], views[:100])]
    assert torch.equal(ours, torch.stack(theirs))


def test_an_unaugmented_view_is_the_image_itself(generator):
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
    middle = torch.full((5,), (4 * 9 + 4) * 2)
    assert torch.equal(crop_and_flip(images, middle), images)
    assert torch.equal(crop_and_flip(images, middle + 1), images.flip(3))


# ---------------------------------------------------------------- draws


def test_every_epoch_is_a_shuffle_with_one_draw_for_each_image():
    order, views = epoch_draws(3, 7, 50_000)
    assert np.array_equal(np.sort(order), np.arange(50_000))
    counts = np.bincount(views, minlength=VIEWS)
    assert len(counts) == VIEWS and views.min() >= 0
    chi_square = ((counts - 50_000 / VIEWS) ** 2 / (50_000 / VIEWS)).sum()
    assert chi_square < 235             # 161 degrees of freedom: above with probability 1e-4
    assert abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02


def test_seeds_and_epochs_never_share_draws():
    keys = [(seed, epoch) for seed in (0, 1, 2, 2**32 - 1) for epoch in range(5)]
    assert len({epoch_draws(*key, 1000)[0].tobytes() for key in keys}) == 20


def test_draws_are_the_same_on_every_machine():
    """A run that goes on elsewhere, with another NumPy, must see the same images."""
    order, views = epoch_draws(0, 1, 50_000)
    digest = hashlib.sha256(order.astype("<i8").tobytes() + views.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "723dc321fee1a35f"


# ---------------------------------------------------------------- the sets


def test_cifar100_is_the_official_one(cifar):
    whole = load_data("cifar100", cifar, "cpu")
    assert whole.train.images.shape == (50_000, 3, 32, 32) and whole.train.images.dtype == torch.uint8
    assert whole.test.images.shape == (10_000, 3, 32, 32) and whole.eval is whole.test
    assert torch.equal(torch.bincount(whole.train.targets), torch.full((100,), 500))
    with open(cifar / "cifar-100-python" / "test", "rb") as file:
        raw = pickle.load(file, encoding="latin1")
    assert torch.equal(whole.test.images, torch.from_numpy(raw["data"]).view(-1, 3, 32, 32))
    assert whole.test.targets.tolist() == raw["fine_labels"]


def test_class_names_are_known_without_the_data(cifar):
    with open(cifar / "cifar-100-python" / "meta", "rb") as file:
        assert list(data.CIFAR100_CLASSES) == pickle.load(file)["fine_label_names"]


def test_the_folder_may_be_named_itself(cifar):
    folder = cifar / "cifar-100-python"
    assert len(load_data("cifar100", folder, "cpu").test.targets) == 10_000
    assert data.cifar_folder("cifar100", folder).is_dir()


# ---------------------------------------------------------------- downloads


def test_the_real_archive_is_fetched_unpacked_and_read(cifar, serve, tmp_path, monkeypatch):
    """From a mirror, in place of what an earlier download left; a second call finds it."""
    archive = serve[0] / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as file:
        file.add(cifar / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(data.CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    place = tmp_path / "to" / "cifar-100-python.tar.gz"
    place.parent.mkdir()
    place.write_bytes(archive.read_bytes()[:100_000])
    monkeypatch.setenv("CIFAR100_URL", f"{serve[1]}/none")
    with pytest.raises(ValueError, match=f": try wget -c {serve[1]}/none -O {place}, or name its folder"):
        data.read_cifar("cifar100", tmp_path / "to")
    monkeypatch.setenv("CIFAR100_URL", f"{serve[1]}/cifar.tar.gz")
    train, test = data.read_cifar("cifar100", tmp_path / "to")
    assert (len(train.targets), len(test.targets)) == (50_000, 10_000)
    asked = len(serve[2].asked)
    data.read_cifar("cifar100", tmp_path / "to")
    assert len(serve[2].asked) == asked


def test_a_server_that_falls_silent_is_given_up(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, monkeypatch.context() as patch:
        patch.setenv("CIFAR100_URL", f"http://127.0.0.1:{server.getsockname()[1]}/x")
        patch.setattr(data, "TIMEOUT", 0.2)
        with pytest.raises(ValueError, match="timed out"):
            data.read_cifar("cifar100", tmp_path)
    assert socket.getdefaulttimeout() is None


def test_held_out_images_are_training_images_that_are_not_trained_on(cifar):
    whole = load_data("cifar100", cifar, "cpu")
    part = load_data("cifar100", cifar, "cpu", train_images=3000, val_from_train=2000)
    train, held_out, known = ({image.numpy().tobytes() for image in split.images}
                              for split in (part.train, part.eval, whole.train))
    assert part.eval_name == "val" and len(part.train.targets) == 3000 and len(part.eval.targets) == 2000
    assert train <= known and held_out <= known and len(train & held_out) <= 2   # a few are twice in the set
    assert torch.equal(part.test.images, whole.test.images)
    again = load_data("cifar100", cifar, "cpu", train_images=1000, val_from_train=2000)
    assert torch.equal(again.train.images, part.train.images[:1000])
    assert torch.equal(again.eval.images, part.eval.images)


def test_too_many_images_asked_for():
    with pytest.raises(ValueError, match="--val-from-train 10000 leaves nothing of 10000"):
        load_data("synthetic", None, "cpu", val_from_train=10_000)
    with pytest.raises(ValueError, match="--train-images 9001: there are 9000"):
        load_data("synthetic", None, "cpu", train_images=9001, val_from_train=1000)


def test_missing_and_damaged_data_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(ValueError) as caught:
        load_data("cifar100", tmp_path / "nowhere", "cpu")
    caught.match("no CIFAR-100 in .*wget -c http://127.0.0.1:9/cifar-100.*--data-dir.*--data synthetic")
    assert "\n" not in str(caught.value)
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"not it")
    with pytest.raises(ValueError, match="is damaged"):
        load_data("cifar100", tmp_path, "cpu")


def test_synthetic_images_are_the_same_every_time_and_differ_between_splits():
    first, second, other = synthetic(300, 1), synthetic(300, 1), synthetic(300, 2)
    assert torch.equal(first.images, second.images) and not torch.equal(first.images, other.images)
    assert first.images.dtype == torch.uint8 and first.images.shape == (300, 3, 32, 32)
    assert torch.bincount(first.targets).tolist() == [3] * 100
    assert 20 < first.images.float().std() < 100        # neither blank nor saturated


# ---------------------------------------------------------------- evaluation


def test_evaluation_counts_like_a_loop_over_images(generator):
    split = synthetic(130, 3)
    weight = torch.randn(100, 3 * 32 * 32, generator=generator)
    batches = ((normalise(x), y) for x, y in zip(split.images.split(32), split.targets.split(32)))
    scores = evaluate(lambda x: x.flatten(1) @ weight.T, batches)
    first = five = loss = 0
    for image, target in zip(split.images, split.targets):
        logits = weight @ one_by_one(image, (4 * 9 + 4) * 2).flatten()
        ranking = logits.argsort(descending=True)
        first, five = first + (ranking[0] == target).item(), five + (target in ranking[:5])
        loss += F.cross_entropy(logits[None], target[None]).item()
    expected = {"loss": loss / 130, "top1": 100 * first / 130, "top5": 100 * five / 130}
    assert scores == pytest.approx(expected, rel=1e-4)


def test_equal_or_nan_logits_are_not_counted_as_right():
    split = synthetic(100, 3)
    for value in (0.0, float("nan")):
        batches = [(split.images, split.targets)]
        assert evaluate(lambda x: torch.full((len(x), 100), value), batches)["top1"] <= 1


def test_other_folders_named_train_are_no_damaged_cifar100(tmp_path):
    """data/train/cat/ is somebody's images: nothing is damaged, an export goes on without CIFAR-100."""
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert not data.cifar_folder("cifar100", tmp_path).is_dir()
    with pytest.raises(ValueError, match="^no CIFAR-100 in "):
        data.read_cifar("cifar100", tmp_path, download=False)
