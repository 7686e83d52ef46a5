"""CIFAR-100 in batches equals CIFAR-100 image by image; the draws are what they promise; the synthetic set."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as per_image

import data
from data import VIEWS, crop_and_flip, epoch_draws, evaluate, load_data, normalise, synthetic


def one_by_one(image, view):
    """The field's transforms for one image (3, 32, 32) uint8 and a given draw: pad, crop, flip, ToTensor, Normalize."""
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
    seen = {epoch_draws(seed, epoch, 1000)[0].tobytes() for seed in (0, 1, 2, 2**32 - 1) for epoch in range(5)}
    assert len(seen) == 20


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


def test_the_folder_may_be_named_itself(cifar, tmp_path):
    """Kaggle's layout, read-only: train, test and meta directly in the folder, whatever its name."""
    folder = tmp_path / "cifar100"
    folder.symlink_to(cifar / "cifar-100-python")
    assert len(load_data("cifar100", folder, "cpu").test.targets) == 10_000 and data.has_cifar100(folder)


# ---------------------------------------------------------------- downloads


@pytest.fixture
def slow(monkeypatch, serve, tmp_path):
    """A file of 300 kB on a server that breaks off; (its bytes, their MD5, address, server, where it goes)."""
    content = np.random.default_rng(0).bytes(300_000)
    (serve[0] / "file").write_bytes(content)
    return content, hashlib.md5(content).hexdigest(), f"{serve[1]}/file", serve[2], tmp_path / "here"


def test_a_download_that_breaks_off_goes_on_where_it_was(slow, capsys):
    content, md5, url, server, path = slow
    server.cut = 100_000
    data.fetch([url], path, md5)
    assert path.read_bytes() == content and server.ranges == [None, "bytes=100000-"]
    assert "from byte 100,000 on" in capsys.readouterr().out and [p.name for p in path.parent.glob("here*")] == ["here"]


def test_a_later_attempt_goes_on_too_unless_the_server_has_another_file_by_now(slow):
    content, md5, url, server, path = slow
    part = path.with_name("here.part")
    for tag, asked in (('"1"', "bytes=100000-"), ('"2"', None)):
        part.write_bytes(content[:100_000])
        part.with_name("here.part.version").write_text(tag)
        server.ranges.clear()
        data.fetch([url], path, md5)
        assert path.read_bytes() == content and server.ranges == [asked]


def test_a_whole_part_is_only_checked(slow):
    content, md5, url, server, path = slow
    for body in (content, bytes(300_000)):
        path.with_name("here.part").write_bytes(body)
        path.with_name("here.part.version").write_text('"1"')
        if body == content:
            data.fetch([url], path, md5)
            assert path.read_bytes() == content
        else:
            with pytest.raises(ValueError, match="has another checksum"):
                data.fetch([url], path, md5)
            assert not path.with_name("here.part").exists()


def test_the_mirror_comes_first_and_then_the_official_place(slow, monkeypatch):
    content, md5, url, server, path = slow
    data.fetch(["http://127.0.0.1:9/none", url], path, md5)
    assert path.read_bytes() == content
    with pytest.raises(OSError, match="404"):
        data.fetch([url + "-missing"], path, md5)


def test_the_real_archive_is_fetched_unpacked_and_read(cifar, serve, tmp_path, monkeypatch):
    """By way of a mirror that breaks off once; a second call finds it."""
    with tarfile.open(serve[0] / "cifar.tar.gz", "w:gz", compresslevel=1) as file:
        file.add(cifar / "cifar-100-python", "cifar-100-python")
    monkeypatch.setattr(data.CIFAR100, "tgz_md5", hashlib.md5((serve[0] / "cifar.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setenv("CIFAR100_URL", f"{serve[1]}/cifar.tar.gz")
    serve[2].cut = 50_000_000
    train, test = data.read_cifar100(tmp_path / "to")
    assert (len(train.targets), len(test.targets)) == (50_000, 10_000) and serve[2].ranges == [None, "bytes=50000000-"]
    data.read_cifar100(tmp_path / "to")
    assert len(serve[2].asked) == 2


def test_held_out_images_are_training_images_that_are_not_trained_on(cifar):
    whole = load_data("cifar100", cifar, "cpu")
    part = load_data("cifar100", cifar, "cpu", train_images=3000, val_from_train=2000)
    keys = [{image.numpy().tobytes() for image in split.images} for split in (part.train, part.eval, whole.train)]
    assert part.eval_name == "val" and len(part.train.targets) == 3000 and len(part.eval.targets) == 2000
    assert keys[0] <= keys[2] and keys[1] <= keys[2] and len(keys[0] & keys[1]) <= 2     # the set has a few duplicates
    assert torch.equal(part.test.images, whole.test.images)
    again = load_data("cifar100", cifar, "cpu", train_images=1000, val_from_train=2000)
    assert torch.equal(again.train.images, part.train.images[:1000]) and torch.equal(again.eval.images, part.eval.images)


def test_too_many_images_asked_for():
    with pytest.raises(ValueError, match="--val-from-train 10000 leaves nothing of 10000"):
        load_data("synthetic", None, "cpu", val_from_train=10_000)
    with pytest.raises(ValueError, match="--train-images 9001: there are 9000"):
        load_data("synthetic", None, "cpu", train_images=9001, val_from_train=1000)


def test_missing_and_damaged_data_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(ValueError, match="no CIFAR-100 in .*CIFAR100_URL.*--data-dir.*--data synthetic") as caught:
        load_data("cifar100", tmp_path / "nowhere", "cpu")
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
    scores = evaluate(lambda x: x.flatten(1) @ weight.T, split, batch_size=32)
    first = five = loss = 0
    for image, target in zip(split.images, split.targets):
        logits = weight @ one_by_one(image, (4 * 9 + 4) * 2).flatten()
        ranking = logits.argsort(descending=True)
        first, five = first + (ranking[0] == target).item(), five + (target in ranking[:5])
        loss += F.cross_entropy(logits[None], target[None]).item()
    assert scores == pytest.approx({"loss": loss / 130, "top1": 100 * first / 130, "top5": 100 * five / 130}, rel=1e-4)


def test_equal_or_nan_logits_are_not_counted_as_right():
    split = synthetic(100, 3)
    for value in (0.0, float("nan")):
        assert evaluate(lambda x: torch.full((len(x), 100), value), split)["top1"] <= 1


# ---------------------------------------------------------------- the strong view, against Pillow


RANGES = {"Brightness": (0.05, 0.95), "Color": (0.05, 0.95), "Contrast": (0.05, 0.95), "Sharpness": (0.05, 0.95),
          "Posterize": (4, 8), "Rotate": (-30, 30), "ShearX": (-0.3, 0.3), "ShearY": (-0.3, 0.3), "Solarize": (0, 256),
          "TranslateX": (-0.3, 0.3), "TranslateY": (-0.3, 0.3)}
INTEGER = {"Equalize", "Identity", "Posterize", "Solarize", "Brightness", "Contrast", "Color", "Sharpness", "AutoContrast"}


def with_pillow(image, name, u):
    """One operation by Pillow itself on an image (3, 32, 32) uint8; u in [0, 1) is the place in the operation's range."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    low, high = RANGES.get(name, (0, 0))
    v = low + (high - low) * u
    affine = {"ShearX": (1, v, 0, 0, 1, 0), "ShearY": (1, 0, 0, v, 1, 0), "TranslateX": (1, 0, v * 32, 0, 1, 0),
              "TranslateY": (1, 0, 0, 0, 1, v * 32)}
    if name in affine:
        picture = picture.transform((32, 32), Image.Transform.AFFINE, affine[name])
    elif name in ("Brightness", "Color", "Contrast", "Sharpness"):
        picture = getattr(ImageEnhance, name)(picture).enhance(v)
    elif name == "Rotate":
        picture = picture.rotate(v)
    elif name in ("Posterize", "Solarize"):
        picture = getattr(ImageOps, name.lower())(picture, int(v) if name == "Posterize" else v)
    elif name in ("AutoContrast", "Equalize"):
        picture = getattr(ImageOps, name.lower())(picture)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def real_images(request):
    """400 real images, and some with few grey levels; made ones where the real are not at hand."""
    try:
        images = load_data("cifar100", request.getfixturevalue("cifar"), "cpu").test.images[:400]
    except pytest.skip.Exception:
        images = synthetic(400, 1).images
    few = images[:20] // 200 * 60
    return torch.cat([images, few, torch.full((1, 3, 32, 32), 7, dtype=torch.uint8), images[:9] // 2 + 50])


@pytest.mark.parametrize("name", data.OPERATIONS)
def test_each_operation_is_pillows(name, real_images, generator):
    u = torch.rand(len(real_images), generator=generator)
    ours = data._operate(real_images, torch.full((len(u),), data.OPERATIONS.index(name)), u)
    theirs = torch.stack([with_pillow(image, name, value) for image, value in zip(real_images, u.tolist())])
    wrong = (ours.int() - theirs.int()).abs()
    assert ours.dtype == torch.uint8
    if name in INTEGER:
        assert wrong.max() <= 1 and (wrong > 0).float().mean() < 1e-4       # float32 factors round the last place
    assert (wrong <= 1).float().mean() >= 0.99
    if name != "Identity":
        assert (ours != real_images).float().mean() > 0.05


@pytest.mark.parametrize("name", ["Equalize", "Identity", "Posterize", "AutoContrast", "Solarize"])
def test_operations_on_integers_are_exact(name, real_images, generator):
    u = torch.rand(len(real_images), generator=generator)
    ours = data._operate(real_images, torch.full((len(u),), data.OPERATIONS.index(name)), u)
    assert torch.equal(ours, torch.stack([with_pillow(image, name, v) for image, v in zip(real_images, u.tolist())]))


def test_cutout_is_pillows_rectangle(generator):
    images = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    side, x, y = torch.rand(3, 500, generator=generator)
    ours = data._cutout(images, side, x, y)
    for got, s, cx, cy in zip(ours, (16 * side).tolist(), (32 * x).tolist(), (32 * y).tolist()):
        picture = Image.new("RGB", (32, 32))
        left, top = int(max(0, cx - s / 2)), int(max(0, cy - s / 2))
        ImageDraw.Draw(picture).rectangle((left, top, min(32, left + s), min(32, top + s)), (125, 123, 114))
        assert torch.equal(got, torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_the_strong_view_is_its_parts_each_image_with_its_own_draws(real_images):
    draws = data.strong_draws(0, 3, len(real_images))
    ours = data.strong_view(real_images, draws)
    one = torch.cat([data.strong_view(real_images[i:i + 1], draws[i:i + 1]) for i in range(60)])
    assert torch.equal(ours[:60], one)
    for i in range(60):
        image = crop_and_flip(real_images[i:i + 1], draws.views[i:i + 1])[0]
        for k in range(2):
            image = with_pillow(image, data.OPERATIONS[draws.operations[i, k]], draws.magnitudes[i, k].item())
        image = data._cutout(image[None], *draws.cutout[i:i + 1].unbind(1))[0]
        assert ((ours[i].int() - image.int()).abs() <= 2).float().mean() > 0.95, i


def test_strong_draws_are_uniform_independent_and_a_function_of_seed_and_epoch():
    draws = data.strong_draws(1, 2, 50_000)
    assert all(torch.equal(a, b) for a, b in zip(tuple(draws), tuple(data.strong_draws(1, 2, 50_000))))
    assert not torch.equal(draws.views, data.strong_draws(1, 3, 50_000).views)
    assert not torch.equal(draws.views, torch.from_numpy(epoch_draws(1, 2, 50_000)[1]))
    counts = torch.bincount(draws.operations.flatten(), minlength=14) / 100_000
    assert len(counts) == 14 and (counts - 1 / 14).abs().max() < 0.004
    pairs = draws.operations[:, 0] == draws.operations[:, 1]
    assert abs(pairs.float().mean() - 1 / 14) < 0.006             # with replacement
    for uniform in (*draws.magnitudes.unbind(1), *draws.cutout.unbind(1)):
        assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    columns = torch.stack([draws.views.float(), *draws.operations.float().unbind(1), *draws.magnitudes.unbind(1),
                           *draws.cutout.unbind(1)])
    assert (columns.corrcoef() - torch.eye(8)).abs().max() < 0.02
