"""Classifies images with a file that export.py wrote. Needs onnxruntime, numpy and Pillow; copy both files.

    python predict.py resnet8x4.int8.onnx cat.png photos/
    python predict.py resnet8x4.onnx cat.png --json

The file's metadata contain what it needs to know: classes, size, normalisation, temperature.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

LARGEST = 2**27         # pixels that an image is resized to
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def to_rgb(image):
    """A Pillow image in RGB: floats and 16-bit grey scaled, transparency on white. ValueError: odd values.

    As in data.py, which reads the training images.
    """
    if image.mode[0] in "FI":       # floats, 16 and 32 bits, which Pillow would clip
        values = np.asarray(image)
        if image.mode == "F":
            values = np.rint(values * 255 if values.max() < 2 else values)
        elif image.mode != "I" or values.max() > 255:
            values = values // 256
        if not 0 <= values.min() <= values.max() <= 255:        # or NaN
            raise ValueError("values are not in 0 to 1, 0 to 255 or 0 to 65535")
        image = Image.fromarray(values.astype(np.uint8))
    if "transparency" in image.info or "A" in image.getbands():
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class Classifier:
    """An exported file. `classifier(pixels)`: uint8 (N, 3, height, width) -> probabilities (N, K)."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(
            os.path.expanduser(path), providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "classes" not in metadata:
            raise ValueError("it was not written by export.py: no metadata")
        self.classes = json.loads(metadata["classes"])
        self.size = json.loads(metadata["size"])
        self.resize = int(metadata["resize"])
        self.mean, self.std = (
            np.array(json.loads(metadata[key]), np.float32).reshape(3, 1, 1)
            for key in ("mean", "std"))
        self.temperature = float(metadata["temperature"])
        self.takes_float = self.session.get_inputs()[0].type == "tensor(float)"

    def pixels(self, image):
        """uint8 (3, height, width) of a Pillow image, upright, in RGB; resized, and the centre taken."""
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:       # a damaged orientation, for which Pillow has several errors: as it is
            pass
        image = to_rgb(image)
        # to the pixel as torchvision's Resize and CenterCrop
        longer = int(self.resize * max(image.size) / min(image.size))
        if self.resize * longer > LARGEST:
            raise ValueError(f"{image.width} x {image.height} is too narrow to be resized")
        upright = image.width <= image.height
        new = (self.resize, longer) if upright else (longer, self.resize)
        image = image.resize(new, Image.Resampling.BILINEAR)
        height, width = self.size
        left = round((image.width - width) / 2)
        top = round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        return np.asarray(image).transpose(2, 0, 1)

    def __call__(self, pixels):
        if self.takes_float:
            pixels = (pixels.astype(np.float32) / 255 - self.mean) / self.std
        logits, = self.session.run(["logits"], {"image": pixels})
        logits = logits.astype(np.float64) / self.temperature
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)


def files(names):
    """The images that are named, and those in the folders that are named, in order, without hidden ones."""
    for name in map(Path, names):
        if not os.path.isdir(name):     # Path.is_dir may raise
            yield name
            continue
        for path in sorted(name.rglob("*")):
            hidden = any(part.startswith((".", "__MACOSX")) for part in path.relative_to(name).parts)
            if path.suffix.lower() in SUFFIXES and not hidden and not os.path.isdir(path):
                yield path


def show(path, classes, probabilities, top, as_json):
    """Prints the most probable classes of an image."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    if as_json:
        best = []
        for i in order.tolist():
            best.append({"class": classes[i], "index": i, "probability": round(float(probabilities[i]), 6)})
        print(json.dumps({"image": str(path), "top": best}), flush=True)
    else:
        best = [f"{classes[i]} {100 * probabilities[i]:.1f} %" for i in order]
        print(f"{path}: {', '.join(best)}", flush=True)


def main():
    sys.stdout.reconfigure(errors="backslashreplace")       # names that its encoding lacks
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"Error: {message} (--help shows all flags)\n")
    parser.add_argument("file", metavar="FILE.onnx")
    parser.add_argument("images", nargs="+", type=os.path.expanduser, metavar="IMAGE",
                        help="PNG, JPEG, WebP, BMP, TIFF, or folders")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to print (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    flags = parser.parse_args()
    try:
        classifier = Classifier(flags.file)
    except Exception as error:      # onnxruntime raises its own types
        sys.exit(f"Error: {flags.file} cannot be used ({str(error).splitlines()[0]})")

    paths, failed = list(files(flags.images)), False
    if not paths:
        sys.exit(f"Error: no images ({', '.join(SUFFIXES)}) in {', '.join(flags.images)}")
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = classifier.pixels(image)
        except Exception as error:      # so does Pillow, for damaged files
            failed = True
            print(f"Error: {path} cannot be read as an image ({str(error) or type(error).__name__})",
                  file=sys.stderr)
            continue
        probabilities = classifier(pixels[None])[0]
        show(path, classifier.classes, probabilities, flags.top, flags.json)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:    # `| head`, or a full disk: the interpreter would name it again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"Error: cannot write ({error})")
