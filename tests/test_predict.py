"""predict.py on devices: training's pixels, odd names and encodings, folders as systems leave them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from torchvision.transforms import functional as pil

import data
import predict

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["café", "caf\udce9", "日本"]     # the second: of a folder of which the name is not UTF-8


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """x.onnx, as export.py writes it: the logits are the means of red, green and blue."""
    monkeypatch.chdir(tmp_path)
    write_model("x.onnx", ["red", "green", "blue"])


def write_model(path, classes):
    nodes = [helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["float"], ["logits"], axes=[2, 3], keepdims=0)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    metadata = {"classes": classes, "size": [32, 32], "resize": 32, "mean": [0, 0, 0], "std": [1, 1, 1],
                "temperature": 100}
    if classes:
        helper.set_model_props(model, {k: json.dumps(v) for k, v in metadata.items()})
    onnx.save(model, path)


def picture(path, colour="red"):
    path = Path(os.fsdecode(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path)


def run(*arguments, code=0, **environment):
    """(standard output, standard error) in bytes, of a run that ends with `code` and without a traceback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", **environment}
    result = subprocess.run([sys.executable, ROOT / "predict.py", *arguments], capture_output=True,
                            env=environment)
    assert b"Traceback" not in result.stderr and result.returncode == code, result.stderr.decode()
    return result.stdout, result.stderr


def refused(*arguments, code=1, **environment):
    """The one line of an error."""
    _, errors = run(*arguments, code=code, **environment)
    assert errors.startswith(b"Error: ") and errors.count(b"\n") == 1
    return errors.decode()


# ---------------------------------------------------------------- names and folders


@pytest.mark.parametrize("environment, encoding, shown", [
    ({"PYTHONIOENCODING": "ascii"}, "ascii", [r"caf\xe9", r"caf\udce9", r"\u65e5\u672c"]),
    ({"PYTHONIOENCODING": "utf-8"}, "utf-8", ["café", r"caf\udce9", "日本"]),
    ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}, "ascii", None),
])
def test_a_class_name_that_the_output_cannot_show_ends_no_run(environment, encoding, shown):
    """A device's console is often ASCII; the run would end at the first image of such a class."""
    write_model("names.onnx", NAMES)
    picture("a.png", (90, 60, 30))
    if shown:
        output, _ = run("names.onnx", "a.png", **environment)
        assert output.decode(encoding).startswith(f"a.png: {shown[0]} 43.")
        assert all(f" {name} " in output.decode(encoding) for name in shown)
    output, _ = run("names.onnx", "a.png", "--json", **environment)
    assert [top["class"] for top in json.loads(output.decode("ascii"))["top"]] == NAMES


def test_a_file_with_a_name_that_is_not_utf8_is_classified_and_named():
    """Old cameras and archives leave such names; --json gives them back byte by byte."""
    name = b"photos/caf\xe9.png"
    try:
        picture(name)
        Path(os.fsdecode(b"bad\xe9.png")).write_text("not an image")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    output, _ = run("x.onnx", "photos", PYTHONIOENCODING="ascii")
    assert output.decode() == r"photos/caf\udce9.png: red 86.5 %, green 6.8 %, blue 6.8 %" + os.linesep
    output, _ = run("x.onnx", name, "--json")
    assert os.fsencode(json.loads(output)["image"]) == name
    assert refused("x.onnx", b"bad\xe9.png", PYTHONIOENCODING="ascii").startswith(
        r"Error: bad\udce9.png cannot be read")


def test_a_folder_is_read_whatever_its_endings_and_without_what_systems_leave_there():
    """Not as images that cannot be read (macOS's ._x.png), nor twice (a notebook's copies)."""
    wanted = [f"photos/{name}" for name in ("0.png", "1.jpg", "2.bmp", "3.tiff", "in/A.PNG", "in/B.TIF")]
    hidden = ["photos/.ipynb_checkpoints/a.png", "photos/in/.deep/b/a.png", "photos/__MACOSX/a.jpg"]
    for name in wanted + hidden:
        picture(name)
    Path("photos/._0.png").write_text("macOS's")
    Path("photos/notes.txt").write_text("not an image, and not asked for")
    Path("photos/album.png").mkdir()
    output, errors = run("x.onnx", "photos", "--json")
    assert [json.loads(line)["image"] for line in output.splitlines()] == [str(Path(w)) for w in wanted]
    assert errors == b""


def test_what_is_named_is_read_hidden_or_not():
    """The user who names a hidden folder or file, or calls from inside of one, means it."""
    picture(".cache/a.png")
    picture(".b.png")
    picture("c.png")
    os.rename("c.png", "c.data")
    output, errors = run("x.onnx", ".cache", ".b.png", "c.data")
    assert [line.split(b":")[0] for line in output.splitlines()] == [b".cache/a.png", b".b.png", b"c.data"]
    assert errors == b""
    assert refused("x.onnx", ".").startswith("Error: no images (.png, .jpg, ")


def test_what_cannot_be_used_is_one_line_and_costs_itself_alone():
    picture("a.png")
    output, errors = run("x.onnx", "x" * 5000, "a.png", "missing.png", "x.onnx", code=1)
    assert output.startswith(b"a.png: red") and errors.count(b"\n") == 3
    write_model("other.onnx", [])
    for arguments, words in ((("a.png", "a.png"), "a.png cannot be used"),
                             (("none.onnx", "a.png"), "none.onnx cannot be used"),
                             (("other.onnx", "a.png"), "was not written by export.py")):
        assert words in refused(*arguments)
    assert "arguments are required" in refused("x.onnx", code=2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_is_one_line():
    picture("a.png")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "predict.py", "x.onnx", "a.png"], stdout=full,
                              stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.startswith(b"Error: cannot write (")
    assert done.stderr.count(b"\n") == 1


# ---------------------------------------------------------------- pixels


def seen(image, size, resize):
    """What predict.py gives a network of size x size pixels."""
    classifier = object.__new__(predict.Classifier)
    classifier.size, classifier.resize = (size, size), resize
    return classifier.pixels(image)


def save(path, mode, shape):
    """An image of noise, as files of this mode are stored."""
    draw, more = np.random.default_rng(0), {}
    if mode == "I;16":
        image = Image.fromarray(draw.integers(0, 2**16, shape[::-1], dtype=np.uint16))
    elif mode.startswith("F"):
        image = Image.fromarray(draw.random(shape[::-1], dtype=np.float32) * int(mode[2:]))
    else:
        image = Image.fromarray(draw.integers(0, 256, (*shape[::-1], 4), dtype=np.uint8)).convert(mode)
    if mode == "P":
        more["transparency"] = 3
    if mode == "RGB":
        more["exif"] = Image.Exif()
        more["exif"][0x0112] = 6        # stored turned, as cameras do
    image.save(path, **more)


@pytest.mark.parametrize("mode, ending, shape, size, resize", [
    ("RGB", "png", (31, 77), 32, 32), ("RGB", "jpg", (501, 374), 64, 73), ("L", "png", (64, 64), 64, 64),
    ("L", "png", (1, 40), 32, 32), ("LA", "png", (73, 73), 64, 73), ("RGBA", "png", (75, 131), 64, 73),
    ("RGBA", "png", (47, 32), 32, 32), ("P", "png", (40, 90), 64, 73), ("CMYK", "jpg", (33, 32), 32, 32),
    ("1", "png", (65, 64), 32, 32), ("I;16", "png", (64, 64), 64, 73), ("I;16", "tif", (1, 1), 32, 32),
    ("F 1", "tif", (31, 31), 32, 32), ("F 255", "tif", (500, 375), 64, 73),
])
def test_pixels_are_those_that_training_and_evaluation_see(tmp_path, mode, ending, shape, size, resize):
    """One moved by half a pixel costs accuracy, and no error says so. data.py's are torchvision's."""
    path = tmp_path / f"x.{ending}"
    save(path, mode, shape)
    expected = data.read_images([(path, 0)], size, resize)[0].numpy()
    evaluated, = data.FolderImages([(path, 0)], size, resize=resize)[0, 0][0]
    with Image.open(path) as image:
        assert np.array_equal(seen(image, size, resize), expected)
    assert np.array_equal(evaluated.numpy(), expected)
    rgb = data.read_image(path)
    independent = pil.center_crop(pil.resize(rgb, resize), [size, size])
    assert np.array_equal(np.asarray(independent).transpose(2, 0, 1), expected)
    assert rgb.size == (shape[::-1] if mode == "RGB" else shape)


@pytest.mark.parametrize("exif", [b"Exif\0\0no such thing", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"])
def test_damaged_exif_hinders_neither_the_evaluation_nor_predict(tmp_path, exif):
    pixels = np.random.default_rng(0).integers(0, 256, (73, 73, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as image:
        expected = data.read_images([(tmp_path / "x.jpg", 0)], 64, 73)[0]
        assert np.array_equal(seen(image, 64, 73), expected.numpy())


def floats(*values):
    return Image.fromarray(np.array([values], np.float32))


@pytest.mark.parametrize("values, grey", [
    ((0, 0.25, 0.5, 0.999, 1), [0, 64, 128, 255, 255]),
    ((0, 0.25, 254.6, 255), [0, 0, 255, 255]),
    ((0, 0), [0, 0]),
])
def test_floats_of_either_scale_are_seen(values, grey):
    """Pillow's own conversion clips, so that an image in [0, 1] would be black and classified as such."""
    image = np.asarray(predict.to_rgb(floats(*values)))
    assert image.dtype == np.uint8 and image.tolist() == [[[v] * 3 for v in grey]]


@pytest.mark.parametrize("image", [
    floats(0, np.nan), floats(0, np.inf), floats(-0.5, 1), floats(0, 1.5), floats(0, 255.5),
    Image.fromarray(np.array([[0, 65536]], np.int32)), Image.fromarray(np.array([[-1, 9]], np.int32))])
def test_values_of_an_unknown_scale_are_refused_in_a_line(image):
    """Depths and heights, say: whatever they were made, the class would mean nothing."""
    for to_rgb in (predict.to_rgb, data.to_rgb):
        with pytest.raises(ValueError, match="^values are not in 0 to 1, 0 to 255 or 0 to 65535$"):
            to_rgb(image)


@pytest.mark.parametrize("mode, order", [("I;16", "<"), ("I;16B", ">")])
def test_16_bit_grey_of_either_byte_order_is_scaled(tmp_path, mode, order):
    """Scanners and microscopes write big-endian TIFF, which Pillow's point() refuses."""
    values = np.arange(65536).reshape(256, 256)
    image = Image.frombytes(mode, (256, 256), values.astype(f"{order}u2").tobytes())
    image.save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(predict.to_rgb(image))[..., 1], values // 256)


def test_a_narrow_image_does_not_fill_the_memory():
    """Its shorter side would become 32 pixels, its longer one some millions."""
    Image.new("RGB", (1, 200_000)).save("narrow.png")
    assert "1 x 200000 is too narrow" in refused("x.onnx", "narrow.png")
    with pytest.raises(ValueError, match="1 x 200000 is too narrow"):
        data.read_images([("narrow.png", 0)], 32)
