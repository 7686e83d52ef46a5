"""Classifies images with a file that export.py wrote. Needs onnxruntime, numpy and Pillow; copy it beside it.

    python predict.py resnet8x4.int8.onnx cat.png photos/
    python predict.py resnet8x4.onnx cat.png --json

All that it knows about the network (classes, size, normalisation, temperature) stands in the file's metadata.
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

    As in folders.py, whose images training sees.
    """
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 255 or 1 < high < 2:     # NaN; just above 1: 0 to 1, overshot
            raise ValueError(f"float values in [{low:.6g}, {high:.6g}], neither 0 to 1 nor 0 to 255")
        image = Image.fromarray(np.rint(values * 255 if high <= 1 else values).astype(np.uint8))
    elif image.mode.startswith("I"):                # 16-bit grey, which Pillow would clip; "I" has 32 bits
        wide, image = image.mode != "I", image.convert("I")
        low, high = image.getextrema()
        if not 0 <= low <= high <= 65535:
            raise ValueError(f"integer values in [{low}, {high}], not 0 to 65535")
        image = (image.point(lambda level: level / 256) if wide or high > 255 else image).convert("L")
    if "transparency" in image.info or "A" in image.getbands():
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


class Classifier:
    """An exported file. `classifier(pixels)`: uint8 (N, 3, height, width) -> probabilities (N, K)."""

    def __init__(self, path, threads=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads      # 0: all
        self.session = onnxruntime.InferenceSession(os.path.expanduser(path), options,
                                                    providers=["CPUExecutionProvider"])
        facts = self.session.get_modelmeta().custom_metadata_map
        if not {"classes", "size", "resize", "mean", "std", "temperature"} <= facts.keys():
            raise ValueError("it was not written by export.py: no metadata")
        self.classes, self.size, self.resize = (json.loads(facts[k]) for k in ("classes", "size", "resize"))
        self.mean, self.std = (np.array(json.loads(facts[k]), np.float32).reshape(3, 1, 1)
                               for k in ("mean", "std"))
        self.temperature = float(facts["temperature"])
        self.takes_float = self.session.get_inputs()[0].type == "tensor(float)"
        black = np.zeros((1, 3, *self.size), np.uint8)
        if not self.temperature > 0 or self(black).shape != (1, len(self.classes)):
            raise ValueError("its metadata are not its network's")

    def pixels(self, image):
        """uint8 (3, height, width) of a Pillow image, upright, in RGB; resized, and the centre taken."""
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:       # a damaged orientation, for which Pillow has several errors: as it is
            pass
        image = to_rgb(image)
        height, width = self.size
        short, other = min(image.size), max(image.size)
        if (short, other) != (self.resize, self.resize):    # to the pixel as torchvision's Resize, CenterCrop
            scaled = int(self.resize * other / short)
            if self.resize * scaled > LARGEST:
                raise ValueError(f"{image.width} x {image.height} is too narrow to be resized")
            new = (self.resize, scaled) if image.width <= image.height else (scaled, self.resize)
            image = image.resize(new, Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        return np.asarray(image).transpose(2, 0, 1)

    def __call__(self, pixels):
        if self.takes_float:
            pixels = (pixels.astype(np.float32) / 255 - self.mean) / self.std
        logits = self.session.run(["logits"], {"image": pixels})[0].astype(np.float64) / self.temperature
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)


def files(names):
    """The images that are named, and those in the folders that are named, in order, less the hidden ones."""
    skipped = 0
    for name in map(Path, names):
        inside = (p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES and not os.path.isdir(p))
        for path in sorted(inside) if os.path.isdir(name) else [name]:  # Path.is_dir may raise
            if any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(name).parts):
                skipped += 1
            else:
                yield path
    if skipped:
        print(f"notice: skipped {skipped} images: names that begin with . or are __MACOSX", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"Error: {message} (--help shows all flags)\n")


def main():
    if sys.stdout:      # None where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")   # names that its encoding lacks
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=os.path.expanduser, metavar="FILE.onnx")
    parser.add_argument("images", nargs="+", type=os.path.expanduser, metavar="IMAGE",
                        help="PNG, JPEG, WebP, BMP, TIFF, or folders")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to print (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error("--top must be at least 1")
    try:
        classifier = Classifier(arguments.file)
    except Exception as error:      # onnxruntime raises its own types
        sys.exit(f"Error: {arguments.file} cannot be used ({str(error).splitlines()[0]})")

    found = failed = 0
    for path in files(arguments.images):
        found += 1
        try:
            with Image.open(path) as image:
                size, pixels = image.size, classifier.pixels(image)
        except Exception as error:      # so does Pillow, for damaged files
            print(f"Error: {path} cannot be read as an image ({str(error) or type(error).__name__})",
                  file=sys.stderr)
            failed += 1
            continue
        height, width = classifier.size
        if size != (width, height):
            print(f"notice: {path} is {size[0]} x {size[1]}, resized and cropped to {width} x {height}",
                  file=sys.stderr)
        probabilities = classifier(pixels[None])[0]
        best = [(classifier.classes[i], int(i), float(probabilities[i]))
                for i in np.argsort(-probabilities, kind="stable")[:arguments.top]]
        if arguments.json:
            top = [{"class": name, "index": i, "probability": round(p, 6)} for name, i, p in best]
            print(json.dumps({"image": str(path), "top": top}), flush=True)
        else:
            print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, _, p in best), flush=True)
    if not found:
        sys.exit(f"Error: no images ({', '.join(SUFFIXES)}) in {', '.join(arguments.images)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:    # `| head`, or a full disk: the interpreter would name it again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"Error: cannot write ({error})")
