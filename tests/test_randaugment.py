"""The strong view in batches equals Pillow's image by image; its draws are uniform and independent."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

import randaugment
from data import crop_and_flip, epoch_draws, load_data, synthetic
from randaugment import strong_draws, strong_operations, strong_view

OPERATIONS = ["AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Identity", "Posterize",
              "Rotate", "Sharpness", "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY"]
FACTOR = (0.05, 0.95)
RANGES = {"Brightness": FACTOR, "Color": FACTOR, "Contrast": FACTOR, "Sharpness": FACTOR, "Posterize": (4, 8),
          "Rotate": (-30, 30), "ShearX": (-0.3, 0.3), "ShearY": (-0.3, 0.3), "Solarize": (0, 256),
          "TranslateX": (-0.3, 0.3), "TranslateY": (-0.3, 0.3)}
EXACT = ["AutoContrast", "Equalize", "Identity", "Posterize", "Solarize"]
INTEGER = {*EXACT, "Brightness", "Color", "Contrast", "Sharpness"}


def with_pillow(image, name, u):
    """One operation by Pillow itself on an image (3, 32, 32) uint8; u in [0, 1) is the place in its range."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    low, high = RANGES.get(name, (0, 0))
    v = low + (high - low) * u
    affine = {"ShearX": (1, v, 0, 0, 1, 0), "ShearY": (1, 0, 0, v, 1, 0),
              "TranslateX": (1, 0, v * 32, 0, 1, 0), "TranslateY": (1, 0, 0, 0, 1, v * 32)}
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
    """400 real images, and some with few grey levels; synthetic ones where the real are not available."""
    try:
        images = load_data("cifar100", request.getfixturevalue("cifar"), "cpu").test.images[:400]
    except pytest.skip.Exception:
        images = synthetic(400, 1).images
    few = images[:20] // 200 * 60
    return torch.cat([images, few, torch.full((1, 3, 32, 32), 7, dtype=torch.uint8), images[:9] // 2 + 50])


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows(name, real_images, generator):
    u = torch.rand(len(real_images), generator=generator)
    ours = randaugment.operate(real_images, torch.full((len(u),), OPERATIONS.index(name)), u)
    theirs = torch.stack([with_pillow(image, name, value) for image, value in zip(real_images, u.tolist())])
    wrong = (ours.int() - theirs.int()).abs()
    assert ours.dtype == torch.uint8
    if name in INTEGER:
        assert wrong.max() <= 1 and (wrong > 0).float().mean() < 1e-4      # float32 rounds the last place
    assert (wrong <= 1).float().mean() >= 0.99
    if name != "Identity":
        assert (ours != real_images).float().mean() > 0.05


@pytest.mark.parametrize("name", EXACT)
def test_operations_on_integers_are_exact(name, real_images, generator):
    u = torch.rand(len(real_images), generator=generator)
    ours = randaugment.operate(real_images, torch.full((len(u),), OPERATIONS.index(name)), u)
    theirs = [with_pillow(image, name, value) for image, value in zip(real_images, u.tolist())]
    assert torch.equal(ours, torch.stack(theirs))


def test_cutout_is_pillows_rectangle(generator):
    images = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    side, x, y = torch.rand(3, 500, generator=generator)
    ours = randaugment.cutout(images, side, x, y)
    for got, s, cx, cy in zip(ours, (16 * side).tolist(), (32 * x).tolist(), (32 * y).tolist()):
        picture = Image.new("RGB", (32, 32))
        left, top = int(max(0, cx - s / 2)), int(max(0, cy - s / 2))
        ImageDraw.Draw(picture).rectangle((left, top, min(32, left + s), min(32, top + s)), (125, 123, 114))
        assert torch.equal(got, torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_the_strong_view_is_its_parts_each_image_with_its_own_draws(real_images):
    draws = strong_draws(0, 3, len(real_images))
    ours = strong_view(real_images, draws)
    one = torch.cat([strong_view(real_images[i:i + 1], draws[i:i + 1]) for i in range(60)])
    assert torch.equal(ours[:60], one)
    assert torch.equal(ours, strong_operations(crop_and_flip(real_images, draws[:, 0].long()), draws))
    for i in range(60):
        image = crop_and_flip(real_images[i:i + 1], draws[i:i + 1, 0].long())[0]
        for k in range(2):
            image = with_pillow(image, OPERATIONS[int(draws[i, 1 + k])], draws[i, 3 + k].item())
        image = randaugment.cutout(image[None], *draws[i:i + 1, 5:].unbind(1))[0]
        assert ((ours[i].int() - image.int()).abs() <= 2).float().mean() > 0.95, i


def test_strong_draws_are_uniform_independent_and_a_function_of_seed_and_epoch():
    draws = strong_draws(1, 2, 50_000)
    assert torch.equal(draws, strong_draws(1, 2, 50_000))
    assert not torch.equal(draws, strong_draws(1, 3, 50_000))
    assert not torch.equal(draws[:, 0].long(), torch.from_numpy(epoch_draws(1, 2, 50_000)[1]))
    operations = draws[:, 1:3].long()
    counts = torch.bincount(operations.flatten(), minlength=14) / 100_000
    assert len(counts) == 14 and (counts - 1 / 14).abs().max() < 0.004
    same = (operations[:, 0] == operations[:, 1]).float().mean()
    assert abs(same - 1 / 14) < 0.006             # with replacement
    for uniform in draws[:, 3:].unbind(1):
        assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert (draws.T.corrcoef() - torch.eye(8)).abs().max() < 0.02


def test_strong_draws_are_the_same_on_every_machine():
    """A run that resumes elsewhere must see the same images."""
    draws = strong_draws(0, 1, 1000)
    parts = draws[:, 0].long(), draws[:, 1:3].long(), draws[:, 3:5], draws[:, 5:]
    digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in parts))
    assert digest.hexdigest()[:16] == "0562d0ce5c0cc858"
