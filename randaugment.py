"""The strong view of multi-level distillation: FixMatch's RandAugment, on whole batches of uint8 images.

    draws = strong_draws(seed, epoch, len(images))
    images = strong_view(images, draws)                 # crop, flip, two operations, cutout

Each image has its own draws. The pixels are those of Pillow, which does one image at a time.
"""

from typing import NamedTuple

import numpy as np
import torch

from data import VIEWS, crop_and_flip

OPERATIONS = ("AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Identity", "Posterize",
              "Rotate", "Sharpness", "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY")


class StrongDraws(NamedTuple):
    views: torch.Tensor         # (N,) int64, the crop and flip
    operations: torch.Tensor    # (N, 2) int64 in [0, 14): two, with replacement, one after the other
    magnitudes: torch.Tensor    # (N, 2) float in [0, 1): the place in each operation's range
    cutout: torch.Tensor        # (N, 3) float in [0, 1): side / 16 pixels, centre x / 32, centre y / 32

    def __getitem__(self, part):
        return StrongDraws(*(draws[part] for draws in tuple(self)))

    def to(self, device):
        return StrongDraws(*(draws.to(device) for draws in tuple(self)))


def strong_draws(seed, epoch, n):
    """An epoch's n strong views, independent of `epoch_draws`; a pure function of (seed, epoch)."""
    generator = np.random.Philox(key=np.array([seed, epoch + 2**32], dtype=np.uint64))
    words = torch.from_numpy(generator.random_raw(8 * n).reshape(n, 8).view(np.int64) >> 11 & 2**53 - 1)
    uniform = (words.double() * 2**-53).float().clamp_(max=1 - 2**-24)
    return StrongDraws(words[:, 0] % VIEWS, words[:, 1:3] % len(OPERATIONS), uniform[:, 3:5], uniform[:, 5:8])


def strong_view(images, draws):
    """Crop, flip, two of OPERATIONS and a cutout, by each image's own draws. (B, 3, H, W) uint8 to the same.

    Pillow's arithmetic: nearest neighbour, black outside, blends that truncate. The enhancers' factors are in
    [0.05, 0.95], posterize keeps 4 to 7 bits, rotation is within 30 degrees, shear within 0.3, translation
    within 0.3 of the side.
    """
    return strong_operations(crop_and_flip(images, draws.views), draws)


def strong_operations(images, draws):
    """`strong_view` after its crop and flip; images of any size."""
    for k in range(2):
        images = _operate(images, draws.operations[:, k], draws.magnitudes[:, k])
    return _cutout(images, *draws.cutout.unbind(1))


def _operate(x, operation, u):
    """One operation an image, (B,) numbers, u in [0, 1): a table of levels, an affine map, or a blend."""
    u = u[:, None, None]
    flat = x.flatten(2).long()
    red, green, blue = flat.unbind(1)
    grey = (19595 * red + 38470 * green + 7471 * blue + 2**15 >> 16).view(len(x), 1, *x.shape[2:])
    factor = 0.05 + 0.9 * u[..., None]

    # for other operations than theirs the table and the map are the identity
    result = _affine(_tables(flat, operation, u, grey).gather(2, flat).view_as(x), operation, u)
    for name, degenerate in (("Color", grey.float()), ("Sharpness", _smooth(x))):
        blend = _blend(degenerate, x.float(), factor).to(torch.uint8)
        result = torch.where((operation == OPERATIONS.index(name))[:, None, None, None], blend, result)
    return result


def _blend(degenerate, x, factor):
    """Between a degenerate image (0) and the image itself (1), truncated as Pillow does."""
    return (degenerate + factor * (x - degenerate)).trunc()


def _tables(flat, operation, u, grey):
    """The operations that map levels, as tables (B, 3, 256) uint8; flat: (B, 3, H W) levels, u: (B, 1, 1)."""
    level = torch.arange(256, device=flat.device).expand(*flat.shape[:2], 256)
    real = torch.float32 if flat.device.type == "mps" else torch.float64        # MPS has no float64
    factor, mean = 0.05 + 0.9 * u, (2 * grey.flatten(1).sum(1) + grey[0].numel()) // (2 * grey[0].numel())

    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    span = (high - low).to(real)        # 0 for one level, where the table is the identity
    scale = torch.full_like(span, 255).div(span)    # 255 / span would be 255 * (1 / span), rounded twice
    stretch = (level * scale - low * scale).nan_to_num(0, 0, 0).clamp(0, 255).long()
    stretch = torch.where(high > low, stretch, level)

    histogram = torch.zeros_like(level).scatter_add(2, flat, torch.ones_like(flat))
    step = (flat.shape[2] - histogram.gather(2, high)) // 255       # the last level's pixels are not counted
    before = histogram.cumsum(2) - histogram
    equal = torch.where(step > 0, ((step // 2 + before) // step.clamp(min=1)).clamp(max=255), level)

    kept = 2 ** (4 - (4 * u).long())    # 4 to 7 bits: levels are rounded down to multiples of 16 to 2
    tables = {"AutoContrast": stretch, "Brightness": _blend(torch.zeros_like(factor), level.float(), factor),
              "Contrast": _blend(mean[:, None, None].float(), level.float(), factor), "Equalize": equal,
              "Posterize": level - level % kept, "Solarize": torch.where(level < 256 * u, level, 255 - level)}
    result = level
    for name, values in tables.items():
        result = torch.where((operation == OPERATIONS.index(name))[:, None, None], values.long(), result)
    return result.to(torch.uint8)


def _affine(x, operation, u):
    """Rotation, shear and translation as one gather at nearest neighbours, in Pillow's 16-bit fixed point."""
    height, width = x.shape[2:]
    u, one, zero = u[:, 0, 0], torch.ones_like(u[:, 0, 0]), torch.zeros_like(u[:, 0, 0])
    angle = torch.deg2rad(30 - 60 * u)          # Pillow turns counter-clockwise
    sin, cos, small = angle.sin(), angle.cos(), 0.6 * u - 0.3
    middle_x, middle_y = width / 2, height / 2
    maps = {"Rotate": (cos, sin, middle_x - cos * middle_x - sin * middle_y,
                       -sin, cos, middle_y + sin * middle_x - cos * middle_y),
            "ShearX": (one, small, zero, zero, one, zero),
            "ShearY": (one, zero, zero, small, one, zero),
            "TranslateX": (one, zero, small * width, zero, one, zero),
            "TranslateY": (one, zero, zero, zero, one, small * height)}
    matrix = torch.stack([one, zero, zero, zero, one, zero], 1)
    for name, values in maps.items():
        matrix = torch.where((operation == OPERATIONS.index(name))[:, None], torch.stack(values, 1), matrix)
    a, b, c, d, e, f = matrix.unbind(1)
    c, f = c + (a + b) / 2, f + (d + e) / 2     # from the middle of a pixel
    a, b, c, d, e, f = ((65536 * v + 0.5).floor().long()[:, None, None] for v in (a, b, c, d, e, f))
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    from_x, from_y = a * column + b * row + c >> 16, d * column + e * row + f >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    index = torch.where(inside, from_y * width + from_x, 0).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return torch.where(inside[:, None], x.flatten(2).gather(2, index).view_as(x), 0)


def _smooth(x):
    """Pillow's SMOOTH filter, (1 1 1; 1 5 1; 1 1 1) / 13 rounded, the border as it was; float."""
    x = x.int()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth.float()


def _cutout(x, side, centre_x, centre_y):
    """A grey rectangle (125, 123, 114) of up to half the image's side, its far edge included, clipped."""
    height, width = x.shape[2:]
    side = side * width / 2

    def covered(centre, size):
        first = (centre * size - side / 2).clamp(min=0).floor()
        last = (first + side).clamp(max=size).floor()
        place = torch.arange(size, device=x.device)
        return (place >= first[:, None]) & (place <= last[:, None])

    hole = covered(centre_y, height)[:, None, :, None] & covered(centre_x, width)[:, None, None, :]
    grey = torch.tensor((125, 123, 114), dtype=torch.uint8, device=x.device).view(3, 1, 1)
    return torch.where(hole, grey, x)
