"""The strong view of multi-level distillation: FixMatch's RandAugment, on whole batches of uint8 images.

    draws = strong_draws(seed, epoch, len(images))
    images = strong_view(images, draws)                 # crop, flip, two operations, cutout

Each image has its own draws. The pixels are those of Pillow, which does one image at a time. An operation
takes images (B, 3, H, W) uint8 and magnitudes (B, 1, 1, 1) in [0, 1), the positions in its range.
"""

import numpy as np
import torch

from data import VIEWS, crop_and_flip

GREY = 125, 123, 114        # of the cutout


def strong_draws(seed, epoch, n):
    """An epoch's n strong views, independent of `epoch_draws`: float32 (n, 8), from (seed, epoch) alone.

    The columns are the crop's id, the indices of two operations (with replacement), their two magnitudes in
    [0, 1), and of the cutout the side, the centre's x and the centre's y in [0, 1).
    """
    generator = np.random.Philox(key=np.array([seed, epoch + 2**32], dtype=np.uint64))
    words = generator.random_raw(8 * n).reshape(n, 8).view(np.int64)
    words = torch.from_numpy(words >> 11 & 2**53 - 1)
    draws = (words.double() * 2**-53).float().clamp_(max=1 - 2**-24)
    draws[:, 0] = words[:, 0] % VIEWS
    draws[:, 1:3] = words[:, 1:3] % len(OPERATIONS)
    return draws


def strong_view(images, draws):
    """Crop, flip, two of OPERATIONS and a cutout, by each image's own draws; (B, 3, H, W) uint8."""
    return strong_operations(crop_and_flip(images, draws[:, 0].long()), draws)


def strong_operations(images, draws):
    """`strong_view` after its crop and flip; images of any size."""
    _, first, second, magnitude, magnitude_2, side, x, y = draws.unbind(1)
    images = operate(images, first, magnitude)
    images = operate(images, second, magnitude_2)
    return cutout(images, side, x, y)


def operate(images, operation, magnitude):
    """One operation an image: (B,) indices of OPERATIONS, (B,) magnitudes."""
    magnitude = magnitude.view(-1, 1, 1, 1)
    result = images.clone()
    for i, function in enumerate(OPERATIONS):
        chosen = (operation == i).nonzero()[:, 0]
        result[chosen] = function(images[chosen], magnitude[chosen])
    return result


# ---------------------------------------------------------------- operations on levels


def identity(x, magnitude):
    return x


def auto_contrast(x, magnitude):
    """The levels of each plane are stretched to 0 to 255; a plane of one level stays."""
    real = torch.float32 if x.device.type == "mps" else torch.float64       # MPS has no float64
    low, high = (levels.to(real) for levels in x.flatten(2).aminmax(dim=2))
    low, high = low[..., None, None], high[..., None, None]
    scale = torch.full_like(low, 255).div(high - low)       # 255 / span would be 255 * (1 / span)
    stretched = (x * scale - low * scale).nan_to_num(0, 0, 0).clamp(0, 255)
    return torch.where(high > low, stretched.to(torch.uint8), x)


def equalize(x, magnitude):
    """The histogram of each plane is flattened."""
    flat = x.flatten(2).long()
    histogram = flat.new_zeros(*flat.shape[:2], 256).scatter_add(2, flat, torch.ones_like(flat))
    last = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - histogram.gather(2, last)) // 255       # the last level's pixels are not counted
    before = histogram.cumsum(2) - histogram
    table = (step // 2 + before) // step.clamp(min=1)
    equal = table.clamp(max=255).gather(2, flat)
    return torch.where(step > 0, equal, flat).view(x.shape).to(torch.uint8)


def posterize(x, magnitude):
    """4 to 7 bits are kept: levels are rounded down to multiples of 16 to 2."""
    multiple = 2 ** (4 - (4 * magnitude).long())
    return x - (x % multiple).to(torch.uint8)


def solarize(x, magnitude):
    """Levels from a threshold on are inverted."""
    return torch.where(x < 256 * magnitude, x, 255 - x)


# ---------------------------------------------------------------- enhancers: blends with a degenerate image


def blend(degenerate, x, magnitude):
    """0.05 to 0.95 of the image, the rest of the degenerate one; truncated, as Pillow does."""
    share = 0.05 + 0.9 * magnitude
    return (degenerate + share * (x.float() - degenerate)).to(torch.uint8)


def brightness(x, magnitude):
    return blend(torch.zeros_like(x, dtype=torch.float32), x, magnitude)


def color(x, magnitude):
    return blend(grey_levels(x).float(), x, magnitude)


def contrast(x, magnitude):
    grey = grey_levels(x)
    pixels = x.shape[2] * x.shape[3]
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)
    return blend(mean.float(), x, magnitude)


def sharpness(x, magnitude):
    """The degenerate image is Pillow's SMOOTH, (1 1 1; 1 5 1; 1 1 1) / 13 rounded; its border stays."""
    inner = x[:, :, 1:-1, 1:-1].int()
    total = x.int().unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5)) + 4 * inner
    smooth = x.float()
    smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).float()
    return blend(smooth, x, magnitude)


def grey_levels(x):
    """(B, 1, H, W) int64: Pillow's luma of RGB."""
    red, green, blue = x.long().split(1, 1)
    return 19595 * red + 38470 * green + 7471 * blue + 2**15 >> 16


# ---------------------------------------------------------------- affine maps


def rotate(x, magnitude):
    """Within 30 degrees, around the image's centre."""
    height, width = x.shape[2:]
    angle = torch.deg2rad(30 - 60 * magnitude)          # Pillow turns counter-clockwise
    sin, cos = angle.sin(), angle.cos()
    c = width / 2 - cos * (width / 2) - sin * (height / 2)
    f = height / 2 + sin * (width / 2) - cos * (height / 2)
    return affine(x, cos, sin, c, -sin, cos, f)


def shear_x(x, magnitude):
    return affine(x, b=0.6 * magnitude - 0.3)


def shear_y(x, magnitude):
    return affine(x, d=0.6 * magnitude - 0.3)


def translate_x(x, magnitude):
    return affine(x, c=(0.6 * magnitude - 0.3) * x.shape[3])


def translate_y(x, magnitude):
    return affine(x, f=(0.6 * magnitude - 0.3) * x.shape[2])


def affine(x, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """The pixel of column x, row y is that of (a x + b y + c, d x + e y + f), the nearest; black outside.

    Each coefficient is a number or has B elements. In Pillow's fixed point of 16 bits.
    """
    height, width = x.shape[2:]
    c = c + (a + b) / 2         # from the middle of a pixel
    f = f + (d + e) / 2
    coefficients = (torch.as_tensor(v, device=x.device) for v in (a, b, c, d, e, f))
    a, b, c, d, e, f = ((65536 * v + 0.5).floor().long().view(-1, 1, 1) for v in coefficients)
    row = torch.arange(height, device=x.device)[:, None]
    column = torch.arange(width, device=x.device)
    from_x = a * column + b * row + c >> 16
    from_y = d * column + e * row + f >> 16
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    index = torch.where(inside, from_y * width + from_x, 0)
    moved = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, 3, -1))
    return torch.where(inside[:, None], moved.view(x.shape), 0)


def cutout(x, side, centre_x, centre_y):
    """A grey rectangle of up to half the image's side, its far edge included, clipped. (B,) in [0, 1)."""
    height, width = x.shape[2:]
    side = side * width / 2

    def covered(centre, size):
        first = (centre * size - side / 2).clamp(min=0).floor()
        last = (first + side).clamp(max=size).floor()
        position = torch.arange(size, device=x.device)
        return (position >= first[:, None]) & (position <= last[:, None])

    hole = covered(centre_y, height)[:, :, None] & covered(centre_x, width)[:, None]
    grey = torch.tensor(GREY, dtype=torch.uint8, device=x.device).view(3, 1, 1)
    return torch.where(hole[:, None], grey, x)


OPERATIONS = (auto_contrast, brightness, color, contrast, equalize, identity, posterize, rotate, sharpness,
              shear_x, shear_y, solarize, translate_x, translate_y)
