"""The strong view of multi-level distillation: FixMatch's RandAugment, on whole batches of uint8 images.

    draws = strong_draws(seed, epoch, len(images))
    images = strong_view(images, draws)                 # crop, flip, two operations, cutout

Each image has its own draws. The pixels are those of Pillow, which does one image at a time. An operation
takes images (B, 3, H, W) uint8 and magnitudes (B, 1, 1, 1) in [0, 1), the positions in its range.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data import VIEWS, crop_and_flip

GREY = 125, 123, 114        # of the cutout


def strong_draws(seed, epoch, n):
    """An epoch's n strong views, independent of `epoch_draws`: float32 (n, 8), from (seed, epoch) alone.

    The columns are the crop's id, the indices of two operations (with replacement), their two magnitudes in
    [0, 1), and of the cutout the side, the centre's x and the centre's y in [0, 1).
    """
    key = np.array([seed, epoch + 2**32], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(8 * n)
    words = (words >> 11).astype(np.int64)      # 53 bits
    words = torch.from_numpy(words).view(n, 8)
    draws = (words * 2.0**-53).float()
    draws.clamp_(max=1 - 2**-24)
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
    low = x.amin((2, 3), keepdim=True).to(real)
    high = x.amax((2, 3), keepdim=True).to(real)
    top = torch.full_like(low, 255)
    scale = top / (high - low)          # a number / span would be 255 * (1 / span)
    stretched = x * scale - low * scale
    stretched = stretched.nan_to_num(0, 0, 0).clamp(0, 255)
    return torch.where(high > low, stretched.to(torch.uint8), x)


def equalize(x, magnitude):
    """The histogram of each plane is flattened."""
    flat = x.flatten(2).long()
    histogram = flat.new_zeros(len(x), 3, 256)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    last = flat.amax(2, keepdim=True)
    counted = flat.shape[2] - histogram.gather(2, last)     # without the pixels of the last level
    step = counted // 255
    before = histogram.cumsum(2) - histogram
    table = (step // 2 + before) // step.clamp(min=1)
    equal = table.clamp(max=255).gather(2, flat)
    result = torch.where(step > 0, equal, flat)
    return result.view(x.shape).to(torch.uint8)


def posterize(x, magnitude):
    """4 to 7 bits are kept: levels are rounded down to multiples of 16 to 2."""
    bits = 4 + (4 * magnitude).long()
    multiple = 2 ** (8 - bits)
    return x - (x % multiple).to(torch.uint8)


def solarize(x, magnitude):
    """Levels from a threshold on are inverted."""
    return torch.where(x < 256 * magnitude, x, 255 - x)


# ---------------------------------------------------------------- enhancers: blends with a degenerate image


def blend(degenerate, x, magnitude):
    """0.05 to 0.95 of the image, the rest of the degenerate one; truncated, as Pillow does."""
    share = 0.05 + 0.9 * magnitude
    blended = degenerate + share * (x - degenerate)
    return blended.to(torch.uint8)


def brightness(x, magnitude):
    black = torch.zeros_like(x)
    return blend(black.float(), x, magnitude)


def color(x, magnitude):
    return blend(grey_levels(x).float(), x, magnitude)


def contrast(x, magnitude):
    grey = grey_levels(x)
    pixels = x.shape[2] * x.shape[3]
    total = grey.sum((1, 2, 3), keepdim=True)
    mean = (2 * total + pixels) // (2 * pixels)         # rounded
    return blend(mean.float(), x, magnitude)


def sharpness(x, magnitude):
    """The degenerate image is Pillow's SMOOTH, (1 1 1; 1 5 1; 1 1 1) / 13 rounded; its border stays."""
    smooth = x.int()
    inner = smooth[:, :, 1:-1, 1:-1]
    total = smooth.unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5))
    total += 4 * inner
    inner.copy_((2 * total + 13) // 26)
    return blend(smooth.float(), x, magnitude)


def grey_levels(x):
    """(B, 1, H, W) int64: Pillow's luma of RGB."""
    red, green, blue = x.long().split(1, 1)
    luma = 19595 * red + 38470 * green + 7471 * blue
    return luma + 2**15 >> 16


# ---------------------------------------------------------------- affine maps


def rotate(x, magnitude):
    """Within 30 degrees, around the image's centre."""
    height, width = x.shape[2:]
    angle = torch.deg2rad(30 - 60 * magnitude)          # Pillow turns counter-clockwise
    sin = angle.sin()
    cos = angle.cos()
    x0 = width / 2
    y0 = height / 2
    c = x0 - cos * x0 - sin * y0
    f = y0 + sin * x0 - cos * y0
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
    a, b, c, d, e, f = (fixed_point(v, x.device) for v in (a, b, c, d, e, f))
    row = torch.arange(height, device=x.device)[:, None]
    column = torch.arange(width, device=x.device)
    from_x = a * column + b * row + c >> 16
    from_y = d * column + e * row + f >> 16
    # All that is outside is in a border of one pixel.
    from_x = from_x.clamp(-1, width) + 1
    from_y = from_y.clamp(-1, height) + 1
    index = from_y * (width + 2) + from_x
    index = index.view(-1, 1, height * width).expand(len(x), 3, -1)
    bordered = F.pad(x, (1, 1, 1, 1)).flatten(2)
    return bordered.gather(2, index).view(x.shape)


def fixed_point(coefficient, device):
    coefficient = torch.as_tensor(coefficient, device=device)
    rounded = (65536 * coefficient + 0.5).floor()
    return rounded.long().view(-1, 1, 1)


def cutout(x, side, centre_x, centre_y):
    """A grey rectangle of up to half the image's side, its far edge included, clipped. (B,) in [0, 1)."""
    height, width = x.shape[2:]
    side = side * width / 2

    def covered(centre, size):
        first = centre * size - side / 2
        first = first.clamp(min=0).floor()[:, None]
        last = (first + side[:, None]).floor()
        position = torch.arange(size, device=x.device)
        return (position >= first) & (position <= last)

    rows = covered(centre_y, height)[:, None, :, None]
    columns = covered(centre_x, width)[:, None, None]
    hole = rows & columns
    grey = torch.tensor(GREY, dtype=torch.uint8, device=x.device).view(3, 1, 1)
    return torch.where(hole, grey, x)


OPERATIONS = (auto_contrast, brightness, color, contrast, equalize, identity, posterize, rotate, sharpness,
              shear_x, shear_y, solarize, translate_x, translate_y)
