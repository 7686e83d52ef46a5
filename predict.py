"""Classifies images with a file that export.py wrote. Needs onnxruntime, numpy and Pillow; copy it beside it.

    python predict.py resnet8x4.int8.onnx cat.png photos/
    python predict.py resnet8x4.onnx cat.png --json

All that it knows about the network (classes, size, normalisation, temperature) stands in the file's metadata.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg")


class Classifier:
    """An exported file. `classifier(pixels)`: uint8 (N, 3, height, width) -> probabilities (N, K)."""

    def __init__(self, path, threads=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads      # 0: all
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        facts = self.session.get_modelmeta().custom_metadata_map
        if "classes" not in facts:
            raise ValueError("it was not written by export.py: no metadata")
        self.classes, self.size, self.resize = (json.loads(facts[k]) for k in ("classes", "size", "resize"))
        self.mean, self.std = (np.array(json.loads(facts[k]), np.float32).reshape(3, 1, 1)
                               for k in ("mean", "std"))
        self.temperature = float(facts["temperature"])
        self.takes_float = self.session.get_inputs()[0].type == "tensor(float)"

    def pixels(self, image):
        """uint8 (3, height, width) of a Pillow image, upright, in RGB; resized, and the centre taken."""
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:       # a damaged orientation, for which Pillow has several errors: as it is
            pass
        if image.mode.startswith("I"):              # 16-bit grey, which Pillow would clip
            image = image.point(lambda level: level / 256).convert("L")
        if "transparency" in image.info or "A" in image.getbands():
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        height, width = self.size
        short, other = min(image.size), max(image.size)
        if (short, other) != (self.resize, self.resize):    # to the pixel as torchvision's Resize, CenterCrop
            scaled = int(self.resize * other / short)
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
    """The images that are named, and those in the folders that are named, in order."""
    for name in map(Path, names):
        if name.is_dir():
            yield from sorted(p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES)
        else:
            yield name


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"Error: {message} (--help shows all flags)\n")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.onnx")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG or JPEG files, or folders of them")
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
            print(f"Error: {path} cannot be read as an image ({error})", file=sys.stderr)
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
            print(json.dumps({"image": str(path), "top": top}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, _, p in best))
    if not found:
        sys.exit(f"Error: no images ({', '.join(SUFFIXES)}) in {', '.join(arguments.images)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
