"""predict.py on devices: odd names, odd encodings, folders as operating systems leave them, odd pixels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image, features
from torchvision.transforms import functional as pil

import folders
import predict

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["café", "caf\udce9", "日本"]     # the second: of a folder whose name is not UTF-8
UNUSUAL = r"\udce9"


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """x.onnx, as export.py writes it: the logits are the means of red, green and blue."""
    monkeypatch.chdir(tmp_path)
    write_model("x.onnx", ["red", "green", "blue"])


def write_model(path, classes, batch="batch", **changed):
    nodes = [helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["float"], ["logits"], axes=[2, 3], keepdims=0)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    facts = {"classes": classes, "size": [32, 32], "resize": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    facts = {k: json.dumps(v) for k, v in facts.items()} | {"temperature": "100"} | changed
    helper.set_model_props(made, facts)
    onnx.save(made, path)


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


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("environment, encoding, shown", [
    ({"PYTHONIOENCODING": "ascii"}, "ascii", [r"caf\xe9", r"caf\udce9", r"\u65e5\u672c"]),
    ({"PYTHONIOENCODING": "latin-1"}, "latin-1", ["café", r"caf\udce9", r"\u65e5\u672c"]),
    ({"PYTHONIOENCODING": "utf-8"}, "utf-8", ["café", r"caf\udce9", "日本"]),
    ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}, "ascii", None),
])
def test_a_class_name_that_the_output_cannot_show_ends_no_run(environment, encoding, shown):
    """A device's console is often ASCII; the run would end at the first image of such a class."""
    write_model("names.onnx", NAMES)
    picture("a.png", (90, 60, 30))
    output, _ = run("names.onnx", "a.png", **environment)
    if shown:
        assert output.decode(encoding).startswith(f"a.png: {shown[0]} 43.")
        assert all(f" {name} " in output.decode(encoding) for name in shown)
    output, _ = run("names.onnx", "a.png", "--json", **environment)
    assert [top["class"] for top in json.loads(output.decode("ascii"))["top"]] == NAMES


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_file_whose_name_is_not_utf8_is_classified_and_named(encoding):
    """Old cameras and archives leave such names; --json gives them back byte by byte."""
    name = b"photos/caf\xe9.png"
    try:
        picture(name)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    output, _ = run("x.onnx", "photos", PYTHONIOENCODING=encoding)
    assert output.decode() == rf"photos/caf{UNUSUAL}.png: red 86.5 %, green 6.8 %, blue 6.8 %" + os.linesep
    output, _ = run("x.onnx", name, "--json", PYTHONIOENCODING=encoding)
    assert os.fsencode(json.loads(output)["image"]) == name


def test_a_name_that_is_not_utf8_is_named_in_an_error_too():
    try:
        Path(os.fsdecode(b"caf\xe9.png")).write_text("not an image")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    _, errors = run("x.onnx", b"caf\xe9.png", code=1, PYTHONIOENCODING="ascii")
    assert errors.decode().startswith(rf"Error: caf{UNUSUAL}.png cannot be read") and errors.count(b"\n") == 1
    _, errors = run(b"caf\xe9.png", "a.png", code=1, PYTHONIOENCODING="ascii")
    assert errors.decode().startswith(rf"Error: caf{UNUSUAL}.png cannot be used") and errors.count(b"\n") == 1


def test_a_name_that_cannot_be_looked_at_costs_itself_alone():
    """Too long here; without permission is the same: Path.is_dir raises, and the run ended."""
    picture("a.png")
    output, errors = run("x.onnx", "x" * 5000, "a.png", code=1)
    assert output.startswith(b"a.png: red") and errors.count(b"\n") == 1


@pytest.mark.parametrize("words, changed", [
    ("metadata are not its network's", {"mean": "[0, 0, 0]", "temperature": "0"}),
    ("could not convert", {"temperature": "warm"}), ("invalid dimensions", {"size": "[16, 16]"}),
    ("", {"size": "32"}), ("Expecting", {"mean": "[0"}), ("invalid dimensions", {"batch": 4}),
])
def test_a_file_that_was_changed_is_refused_before_any_image(words, changed):
    write_model("changed.onnx", ["red", "green", "blue"], **changed)
    picture("a.png")
    output, errors = run("changed.onnx", "a.png", code=1)
    assert output == b"" and errors.startswith(b"Error: changed.onnx cannot be used (")
    assert words.encode() in errors and errors.count(b"\n") == 1
    write_model("changed.onnx", ["red", "green"])
    assert b"metadata are not its network's" in run("changed.onnx", "a.png", code=1)[1]


def test_a_narrow_image_does_not_fill_the_memory():
    """Its shorter side would become 32 pixels, its longer one some millions."""
    Image.new("RGB", (1, 200_000)).save("narrow.png")
    _, errors = run("x.onnx", "narrow.png", code=1)
    assert b"1 x 200000 is too narrow" in errors and errors.count(b"\n") == 1
    with pytest.raises(ValueError, match="1 x 200000 is too narrow"):
        folders.centre(Image.open("narrow.png"), 32, 32)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_is_one_line(flags):
    picture("a.png")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "predict.py", "x.onnx", "a.png", *flags], stdout=full,
                              stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.startswith(b"Error: cannot write (")
    assert done.stderr.count(b"\n") == 1


# ---------------------------------------------------------------- folders


def test_a_folder_is_read_whatever_its_endings_and_without_what_systems_leave_there():
    """Not as images that cannot be read (macOS's ._x.png), nor twice (a notebook's copies), nor silently."""
    endings = [e for e in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
               if e != ".webp" or features.check("webp")]
    wanted = [f"photos/{i}{e}" for i, e in enumerate(endings)] + ["photos/in/A.PNG", "photos/in/B.TIFF"]
    for name in wanted:
        picture(name)
    hidden = ["photos/.ipynb_checkpoints/a.png", "photos/in/.thumbnails/deep/a.png", "photos/__MACOSX/a.jpg"]
    for name in hidden:
        picture(name)
    Path("photos/._0.png").write_text("macOS's")
    Path("photos/notes.txt").write_text("not an image, and not asked for")
    Path("photos/album.png").mkdir()
    output, errors = run("x.onnx", "photos", "--json")
    assert [json.loads(line)["image"] for line in output.splitlines()] == [str(Path(w)) for w in wanted]
    assert errors.decode().splitlines() == [
        "notice: skipped 4 images: names that begin with . or are __MACOSX"]


def test_what_is_named_is_read_hidden_or_not():
    """The user who names a hidden folder or file, or calls from inside of one, means it."""
    picture(".cache/a.png")
    picture(".b.png")
    picture("c.png")
    os.rename("c.png", "c.data")
    output, errors = run("x.onnx", ".cache", ".b.png", "c.data")
    assert [line.split(b":")[0] for line in output.splitlines()] == [
        str(Path(p)).encode() for p in (".cache/a.png", ".b.png", "c.data")]
    assert errors == b""
    _, errors = run("x.onnx", ".", code=1)
    assert errors.decode().splitlines()[0].startswith("notice: skipped 2 images")
    assert "Error: no images (.png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .ppm, .pgm) in ." in str(errors)


# ---------------------------------------------------------------- pixels


def floats(*values):
    return Image.fromarray(np.array([values], np.float32))


@pytest.mark.parametrize("values, grey", [
    ((0, 0.25, 0.5, 0.999, 1), [0, 64, 128, 255, 255]),
    ((0, 0.25, 254.6, 255), [0, 0, 255, 255]),
    ((0, 0), [0, 0]),
    ([i / 255 for i in range(256)], list(range(256))),
    (range(256), list(range(256))),
])
def test_floats_of_either_scale_are_seen(values, grey):
    """Pillow's own conversion clips, so that an image in [0, 1] would be black and classified as such."""
    seen = np.asarray(predict.to_rgb(floats(*values)))
    assert seen.dtype == np.uint8 and seen.tolist() == [[[v] * 3 for v in grey]]


@pytest.mark.parametrize("image, words", [
    (floats(0, np.nan), "float values in [nan, nan]"),
    (floats(0, np.inf), "float values in [0, inf]"),
    (floats(-0.5, 1), "float values in [-0.5, 1]"),
    (floats(0, 255.5), "float values in [0, 255.5]"),
    (Image.fromarray(np.array([[0, 65536]], np.int32)), "integer values in [0, 65536]"),
    (Image.fromarray(np.array([[-1, 9]], np.int32)), "integer values in [-1, 9]"),
])
def test_values_of_an_unknown_scale_are_refused_in_a_line(image, words):
    """Depths and heights, say: whatever they were made, the class would mean nothing."""
    with pytest.raises(ValueError) as error:
        predict.to_rgb(image)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_a_float_file_is_classified_or_refused_and_the_others_go_on():
    for name, whole in (("a.tif", 1), ("b.tiff", 255), ("c.TIF", 3000)):
        Path("photos").mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32), whole, np.float32)).save(f"photos/{name}")
    output, errors = run("x.onnx", "photos", code=1)
    assert [line[:12] for line in output.splitlines()] == [b"photos/a.tif", b"photos/b.tif"]
    name = Path("photos/c.TIF")
    assert errors.decode().splitlines() == [f"Error: {name} cannot be read as an image (float values in "
                                            "[3000, 3000], neither 0 to 1 nor 0 to 255)"]


@pytest.mark.parametrize("mode, order", [("I;16", "<"), ("I;16B", ">")])
def test_16_bit_grey_of_either_byte_order_is_scaled(tmp_path, mode, order):
    """Scanners and microscopes write big-endian TIFF, which Pillow's point() refuses."""
    values = np.arange(65536).reshape(256, 256)
    image = Image.frombytes(mode, (256, 256), values.astype(f"{order}u2").tobytes())
    image.save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(predict.to_rgb(image))[..., 1], values // 256)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV", "I;16", "F 1", "F 255"])
def test_training_sees_the_same_colours(mode):
    """A student is only as good as what it is shown is what it was trained on."""
    from folders import to_rgb

    draw = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(draw.integers(0, 2**16, (31, 77), dtype=np.uint16))
    elif mode.startswith("F"):
        image = Image.fromarray(draw.random((31, 77), dtype=np.float32) * int(mode[2:]))
    else:
        image = Image.fromarray(draw.integers(0, 256, (31, 77, 4), dtype=np.uint8)).convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    assert np.array_equal(np.asarray(predict.to_rgb(image)), np.asarray(to_rgb(image)))


@pytest.mark.parametrize("shape", [(31, 77), (500, 375), (32, 32), (1, 40), (33, 32), (32, 47), (31, 31),
                                   (65, 64), (1, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_are_torchvisions_where_the_shorter_side_is_the_crop(shape, turned):
    """Students of small images; one moved by half a pixel costs accuracy, and no error says so."""
    size = shape[::-1] if turned else shape
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = np.asarray(pil.center_crop(pil.resize(image, 32), [32, 32])).transpose(2, 0, 1)
    classifier = object.__new__(predict.Classifier)
    classifier.size, classifier.resize = (32, 32), 32
    found = classifier.pixels(image)
    assert found.shape == (3, 32, 32) and np.array_equal(found, expected)
