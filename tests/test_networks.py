"""Networks by name in both scripts: models.py's, torchvision's, timm's, custom ones; first weights."""

import http.client
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torchvision
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F
from torchvision.models import _api

import checkpoints
import data
import networks
import teacher
import train_cifar
import train_imagenet
from data import synthetic
from models import MODELS, create_model
from test_folders import photos

SCRIPTS = {"cifar": (train_cifar, ["--data", "folder"]), "imagenet": (train_imagenet, ["--workers", "0"])}
FLAGS = ["--data-dir", "images", "--size", "32", "--epochs", "1", "--batch-size", "8", "--lr", "0.01",
         "--device", "cpu"]
TAUGHT = ["--teacher", "nets.py:Net", "--teacher-checkpoint", "net.pt"]
both = pytest.mark.parametrize("script", SCRIPTS)

NETS = '''
import torch
from torch import nn
from parts import Body          # a module next to this one


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def small(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))


class Both(Net):
    """Logits and features, as networks for feature distillation return them."""

    def forward(self, x):
        features = self.body(x)
        return self.head(features.mean((2, 3))), features


class Lists(Net):
    """An auxiliary head in training alone, as GoogLeNet."""

    def forward(self, x):
        logits = super().forward(x)
        return [logits, logits + 1, logits] if self.training else logits


class View(nn.Module):
    """LeNet's way from a map to a vector: a view, which not every memory layout allows."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=8), nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.fc(x.view(x.size(0), -1))


class Few(Net):
    def forward(self, x):
        return super().forward(x)[:, :2]


class Breaks(Net):
    def forward(self, x):
        raise RuntimeError("\\n  my own words\\nsecond line")


class Dictionary(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Nothing(Net):
    def forward(self, x):
        return ()


def raises(num_classes):
    raise KeyError("width")


def without():
    return Net(3)


def none(num_classes):
    pass


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def frozen(num_classes):
    return Net(num_classes).requires_grad_(False)
'''
PARTS = '''
from torch import nn


class Body(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
'''
TIMM = '''
from nets import Net


def create_model(model_name, pretrained=False, num_classes=1000, **more):
    if model_name != "tiny_net":
        raise RuntimeError(f"Unknown model ({model_name})")
    assert not pretrained and not more
    return Net(num_classes)
'''


class Net(nn.Module):
    """nets.py's, written out: no import, no hook."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with images/ of three classes, nets.py, a teacher's net.pt; no module stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setitem(teacher.BATCH, "cpu", 16)
    photos(tmp_path / "images", {"train": 24, "val": 9})
    Path("nets.py").write_text(NETS)
    Path("parts.py").write_text(PARTS)
    torch.manual_seed(3)
    net = Net(3).train()
    with torch.no_grad():
        for _ in range(9):
            net(torch.randn(8, 3, 32, 32))
    torch.save(net.state_dict(), "net.pt")
    before = set(sys.modules)
    networks._module.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def call(script, *arguments, code=0):
    module, flags = SCRIPTS[script]
    result = CliRunner().invoke(module.main, [*flags, *FLAGS, *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def last_line(script, *arguments, code=1):
    """The one line of a refused command."""
    lines = call(script, *arguments, code=code).splitlines()
    assert lines[-1].startswith("Error: ") and not any(
        line.startswith(("Error", "Traceback")) for line in lines[:-1])
    return lines[-1].removeprefix("Error: ")


def only(pattern):
    found, = Path().glob(pattern)
    return found


def measured(network, script):
    """(top-1, mean loss) of a network on val/, by a loop of its own over what the script's images are."""
    if script == "cifar":
        read = data.load_data("folder", "images", "cpu", size=32)
        images, target = read.eval.images, read.eval.targets
        mean, std = read.pixels[:2]
    else:
        found = data.load_folders("images").eval
        images = torch.stack([data.centre(data.read_image(path), 32, 37) for path, _ in found])
        target, mean, std = torch.tensor([t for _, t in found]), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.no_grad():
        logits = network.eval()(torchvision.transforms.functional.normalize(images / 255, mean, std))
    return 100 * (logits.argmax(1) == target).double().mean().item(), F.cross_entropy(logits, target).item()


# ---------------------------------------------------------------- custom networks


@pytest.mark.parametrize("script, name", [
    ("cifar", "nets.py:Both"), ("cifar", "timm:tiny_net"), ("imagenet", "nets.py:Lists"),
    ("imagenet", "package.deep:Net")])
def test_a_custom_network_is_teacher_and_student(script, name):
    """By file, module and timm: it teaches, is trained, resumed and evaluated; the numbers are those of the
    network itself, written out. A wrapper that changed a logit or a key would make all of them wrong."""
    os.makedirs("package")
    Path("package", "deep.py").write_text("from nets import Net")
    Path("timm.py").write_text(TIMM)
    flags = ["--teacher", name, "--teacher-checkpoint", "net.pt", "--student", name, "--epochs", 2]
    output = call(script, *flags)
    reference = Net(3)
    reference.load_state_dict(torch.load("net.pt"))
    top1, _ = measured(reference, script)
    assert f"(net.pt): {top1:.2f} % top-1 on the val images" in output
    values = {"nets.py:Both": 2, "nets.py:Lists": 3}.get(name)
    assert (f"notice: {name} returns {values} values; the first is taken as its logits\n" in output) == (
        values is not None)
    assert "finished before" in call(script, *flags)

    path = only("runs/*/student.pt")
    shown = name.replace(".py:", "-").replace(":", "-")
    assert re.match(f"{shown}@[0-9a-f]{{6}}-{shown}-kd-", path.parent.name)
    told = torch.load(path)
    assert told["student"] == name and told["model"].keys() == reference.state_dict().keys()
    reference.load_state_dict(told["model"])
    top1, loss = measured(reference, script)
    assert told["top1"] == pytest.approx(top1, abs=1e-3)
    output = call(script, "--eval", path).splitlines()[-1]
    assert output.startswith(f"{name}: {top1:.2f} top-1, ")
    assert float(output.split("loss ")[1].split()[0]) == pytest.approx(loss, abs=2e-4)


@pytest.mark.parametrize("script", ["cifar"])
def test_a_save_of_another_network_of_the_same_name_is_one_line(script, killed):
    """The file was edited between two halves of a run."""
    flags = ["--method", "none", "--student", "nets.py:Net"]
    with killed(0, 1):
        call(script, *flags, "--save-every", "1e-9")
    Path("nets.py").write_text(NETS.replace("Linear(8", "Linear(8 + 0 * num_classes"))
    networks._module.cache_clear()
    Path("parts.py").write_text(PARTS.replace("stride=2", "stride=2, bias=False"))
    sys.modules.pop("parts", None)
    assert "is of another nets.py:Net or version (" in last_line(script, *flags)


@pytest.mark.parametrize("script", ["imagenet"])
def test_a_network_that_views_its_maps_trains(script):
    """x.view(x.size(0), -1) after a map, as in LeNet and thousands after it, is refused by channels last; a
    run in that layout ends with a traceback after the check has passed."""
    call(script, "--method", "none", "--student", "nets.py:View")
    told = torch.load(only("runs/*/student.pt"))
    call(script, "--teacher", "nets.py:View", "--teacher-checkpoint", only("runs/*/student.pt"),
         "--student", "nets.py:Net")
    assert told["student"] == "nets.py:View"


@both
def test_dry_run_walks_the_whole_path_with_a_custom(script):
    before = sorted(os.listdir())
    for more in ([], ["--teacher-checkpoint", "net.pt"]):
        output = call(script, "--teacher", "nets.py:Both", "--student", "nets.py:small", "--zscore",
                      "--dry-run", *more)
        assert output.splitlines()[-1] == "dry run: all is well"
    assert sorted(set(os.listdir()) - {"__pycache__"}) == before


def test_one_image_that_is_left_over_is_tried_before_the_first_epoch():
    """A batch norm of 1 x 1 maps, and a loss of pairs, need two: the line names --batch-size."""
    networks.check_model("vgg8", 10, 8, learns=True)
    with pytest.raises(ValueError, match=r"vgg8 .* choose another --batch-size: one image is left over$"):
        networks.check_model("vgg8", 10, 8, learns=True, smallest=1)
    recipe = {"student": "resnet8", "teacher": "resnet14", "feature": "rkd"}
    networks.check_feature(recipe, 10, 32)
    with pytest.raises(ValueError, match="--feature rkd .*; one image is left over: give another --batch-"):
        networks.check_feature(recipe, 10, 32, smallest=1)


def test_a_check_leaves_no_trace_in_the_seeded_numbers():
    """A student's first weights are the seed's, whatever was looked at before."""
    torch.manual_seed(4)
    expected = create_model("resnet8", 3).state_dict()
    torch.manual_seed(4)
    networks.check_model("nets.py:Net", 3, 32)
    networks.check_model("resnet20", 3, 32)
    made = networks.create("resnet8", 3).state_dict()
    assert all(map(torch.equal, expected.values(), made.values()))


# ---------------------------------------------------------------- mistakes in one's own


WRONG = [
    ("nets.py:Few", "nets.py:Few makes (2, 2) of 2 images and 3 classes, not logits (2, 3): it has to take"),
    ("nets.py:Breaks", "nets.py:Breaks does not take images of 32 x 32 pixels (RuntimeError: my own words)"),
    ("nets.py:Dictionary", "nets.py:Dictionary makes dict of 2 images and 3 classes, not logits (2, 3)"),
    ("nets.py:Nothing", "nets.py:Nothing makes tuple of 2 images"),         # an empty tuple
    ("nets.py:nope", "fails (AttributeError: module 'nets' has no attribute 'nope')"),
    ("nets.py:raises", "nets.py:raises with num_classes=3 fails (KeyError: 'width')"),
    ("nets.py:without", "fails (TypeError: without() got an unexpected "),
    ("nets.py:none", "nets.py:none returns a NoneType, not a torch.nn.Module"),
    ("nets.py:lazy", "nets.py:lazy has lazy layers: give them their sizes"),
    ("nets.py:frozen", "nets.py:frozen has no parameter that learns"),
    ("syntax.py:x", "fails (SyntaxError: "),
    ("missing.py:x", "fails (ModuleNotFoundError: No module named 'nowhere_at_all')"),
    ("exits.py:x", "fails (SystemExit: 3)"),
    ("absent.py:x", "fails (ModuleNotFoundError: No module named 'absent')"),
    ("timm:tiny_net", "fails (ModuleNotFoundError: No module named 'timm')"),
]


@pytest.mark.parametrize("name, words", WRONG)
def test_a_mistake_in_a_custom_network_is_one_line(name, words):
    """Its own first line: not fifty lines of this project's."""
    Path("syntax.py").write_text("def x(:\n")
    Path("missing.py").write_text("import nowhere_at_all\n")
    Path("exits.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        networks.check_model(name, 3, 32, learns=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("script, flags", [
    ("cifar", "--method none --student nets.py:Few"),
    ("imagenet", "--teacher nets.py:Few --teacher-checkpoint net.pt --student resnet8"),
    ("cifar", "--eval net.pt --student nets.py:Few")])
def test_a_mistake_in_a_custom_network_ends_a_command(script, flags):
    assert "nets.py:Few makes (2, 2) of 2 images" in last_line(script, *flags.split())
    assert not list(Path().rglob("last.pt"))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name, where", [
    ("resnet18", "torchvision"), ("ResNet18", "models"), ("vgg11", "torchvision"), ("vgg8", "models")])
def test_a_name_is_torchvisions_in_train_imagenet_and_models_in_train_cifar(name, where):
    """vgg11 is in both, and resnet18 and ResNet18 differ in case alone: another network than was meant would
    train without a word."""
    with torch.device("meta"):
        ours = networks.create(name, 5, networks.TORCHVISION)
        theirs = (torchvision.models.get_model(name, num_classes=5) if where == "torchvision"
                  else create_model(name, 5))
        assert ({k: v.shape for k, v in ours.state_dict().items()}
                == {k: v.shape for k, v in theirs.state_dict().items()})
        assert type(ours) is type(theirs) and ours.name == name and not ours.own
        assert name not in MODELS or type(networks.create(name, 5)).__module__ == "models"


# ---------------------------------------------------------------- which network a file holds


def test_eval_knows_a_plain_state_dict_by_its_keys():
    """Files from elsewhere seldom name their network."""
    network = create_model("resnet14", 3)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, "bare.pt")
    output = call("cifar", "--eval", "bare.pt")
    assert "resnet14: " in output and "on the 9 val images" in output
    assert "notice: bare.pt has no mean and std of its images; these are taken: ((0.5071, " in output


def test_eval_says_where_no_network_is_known(script="imagenet"):
    assert (last_line(script, "--eval", "net.pt") == "net.pt does not name its network, and its keys fit "
            "none: give --student")
    torch.save({"model": torch.load("net.pt"), "student": "resnet9"}, "says.pt")
    assert "unknown network 'resnet9'; known: " in last_line(script, "--eval", "says.pt")


def test_eval_takes_the_data_that_the_file_says(monkeypatch):
    """--eval of a run on synthetic images needs no flag; what is given wins."""
    monkeypatch.setattr("data.SYNTHETIC_SIZES", (96, 64))
    flags = ["--method", "none", "--student", "resnet8", "--data", "synthetic", *FLAGS[4:]]
    assert CliRunner().invoke(train_cifar.main, flags).exit_code == 0
    path = str(only("runs/*/student.pt"))
    output = CliRunner().invoke(train_cifar.main, ["--eval", path, "--device", "cpu"]).output
    assert "on the 64 test images of synthetic" in output
    assert f"{path} is for 100 classes, these images have 3" in last_line("cifar", "--eval", path)


# ---------------------------------------------------------------- weights to begin with


def begun(script, *flags, network="resnet8"):
    """(what the command says, the student's state_dict) of a run whose steps move nothing but batch norms."""
    output = call(script, "--method", "none", "--student", network, "--lr", "1e-30", *flags)
    return output, torch.load(only("runs/*/student.pt"))["model"]


def parameters(state):
    return {k: v for k, v in state.items() if "running" not in k and "tracked" not in k}


@pytest.mark.parametrize("script, classes", [("cifar", 3), ("imagenet", 5)])
def test_a_student_begins_with_a_file_and_a_new_head_where_classes_differ(script, classes):
    """Fine-tuning: all that fits is the file's, the head of other classes is the seed's, and it is said."""
    torch.manual_seed(8)
    source = create_model("resnet8", classes).state_dict()
    torch.save({"net": {f"module.{k}": v.half() if k == "conv1.weight" else v for k, v in source.items()}},
               "begin.pt")
    output, state = begun(script, "--student-checkpoint", "begin.pt")
    torch.manual_seed(0)
    fresh = create_model("resnet8", 3).state_dict()
    head = ["fc.weight", "fc.bias"] if classes == 5 else []
    for key, value in parameters(state).items():
        expected = fresh[key] if key in head else source[key]
        expected = expected.half().float() if key == "conv1.weight" else expected
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=key)
    line, = [line for line in output.splitlines() if line.startswith("resnet8 begins with begin.pt")]
    assert line == "resnet8 begins with begin.pt" + (
        f", but for 2 of {len(fresh)} tensors, which start new: fc.weight, fc.bias" if head else "")


@pytest.mark.parametrize("name, words", [
    ("net.pt", "--student-checkpoint net.pt: nothing in it fits resnet8"),
    ("empty.pt", "--student-checkpoint empty.pt: nothing in it fits resnet8"),
    ("DEFAULT", "DEFAULT: No such file")])
def test_a_file_to_begin_with_that_has_nothing_is_one_line(name, words):
    """Else a run of days would start from random weights."""
    torch.save({"epoch": 3}, "empty.pt")
    flags = ["--method", "none", "--student", "resnet8", "--student-checkpoint", name]
    assert words in last_line("cifar", *flags)
    assert not list(Path().rglob("last.pt"))


def test_of_another_network_what_fits_is_taken_and_the_rest_counted():
    """resnet14's stem and first blocks for a resnet8, running statistics included."""
    torch.manual_seed(8)
    source = create_model("resnet14", 5)
    for key, value in source.state_dict().items():
        if "running" in key:
            value.uniform_(1, 2)
    source = source.state_dict()
    torch.save({"model": source}, "begin.pt")
    student, lines = networks.create("resnet8", 3), []
    before = {k: v.clone() for k, v in student.state_dict().items()}
    checkpoints.load_pretrained(student, "begin.pt", lines.append)
    fits = {k for k, v in before.items() if k in source and source[k].shape == v.shape}
    for key, value in student.state_dict().items():
        assert torch.equal(value, source[key] if key in fits else before[key]), key
    assert lines == [f"resnet8 begins with begin.pt, but for 2 of {len(before)} tensors, which start new: "
                     "fc.weight, fc.bias"]


def test_another_file_or_none_is_another_folder(script="cifar"):
    for i, name in enumerate(("begin.pt", "other.pt")):
        torch.manual_seed(i)
        torch.save(create_model("resnet8", 5).state_dict(), name)
    flags = ["--method", "none", "--student", "resnet8", "--student-checkpoint"]
    call(script, *flags, "begin.pt")
    before = only("runs/*/last.pt").read_bytes()
    shutil.copy("begin.pt", "copy.pt")
    assert "finished before" in call(script, *flags, "copy.pt")
    first = only("runs/*/last.pt")
    call(script, *flags, "other.pt")
    call(script, *flags[:-1])
    assert first.read_bytes() == before and len(list(Path().glob("runs/*/last.pt"))) == 3


def test_torchvisions_weights_by_name_begin_a_student_of_other_classes(monkeypatch, weights="DEFAULT"):
    """The usual fine-tuning: ImageNet's weights (of a download that is replaced), a new head."""
    torch.manual_seed(8)
    state, asked = torchvision.models.squeezenet1_1().state_dict(), []

    def download(url, *rest, **more):
        asked.append(url)
        return dict(state)

    monkeypatch.setattr(_api, "load_state_dict_from_url", download)
    output, student = begun("imagenet", "--student-checkpoint", weights, "--size", 64,
                            network="squeezenet1_1")
    torch.manual_seed(0)
    fresh = torchvision.models.squeezenet1_1(num_classes=3).state_dict()
    for key, value in student.items():
        torch.testing.assert_close(value, (fresh if key.startswith("classifier") else state)[key], rtol=0,
                                   atol=1e-6)
    assert (f"squeezenet1_1 begins with {weights}, but for 2 of {len(fresh)} tensors, which start new: "
            "classifier.1.weight, classifier.1.bias") in output
    assert asked and set(asked) == {"https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"}
    torch.save(state, "same.pth")               # the same weights by file are the same recipe
    assert "finished before" in call("imagenet", "--method", "none", "--student", "squeezenet1_1", "--lr",
                                     "1e-30", "--size", 64, "--student-checkpoint", "same.pth")


@pytest.mark.parametrize("weights, error, words", [
    ("NOPE", None, "torchvision has no NOPE of squeezenet1_1, but IMAGENET1K_V1"),
    ("DEFAULT", OSError("no route"), "squeezenet1_1, DEFAULT: the download failed (no route); "
     "try again, or name a checkpoint file"),
    ("DEFAULT", RuntimeError("invalid hash value\nmore"), "the download failed (invalid hash value)"),
    ("DEFAULT", http.client.IncompleteRead(b""), "squeezenet1_1, DEFAULT: the download failed (")])
def test_torchvisions_weights_that_do_not_come_are_one_line(monkeypatch, weights, error, words):
    def fails(*rest, **more):
        raise error

    monkeypatch.setattr(_api, "load_state_dict_from_url", fails)
    assert words in last_line("imagenet", "--method", "none", "--student", "squeezenet1_1", "--size", 64,
                              "--student-checkpoint", weights)


def test_a_file_without_a_suffix_is_a_file():
    """It could be a name of weights, but the file exists."""
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), "weights")
    flags = ["--method", "none", "--student", "squeezenet1_1", "--student-checkpoint", "weights"]
    assert "begins with weights\n" in call("imagenet", *flags)


def test_a_teacher_of_a_custom_without_weights_is_trained_or_refused(folder):
    """train_cifar.py trains it; in train_imagenet.py nobody publishes it."""
    photos(folder / "images", {"train": 72})
    output = call("cifar", "--teacher", "nets.py:Net", "--student", "nets.py:small")
    assert "training nets.py:Net here first" in output
    assert torch.load(only("runs/nets-Net-none-*/student.pt"))["student"] == "nets.py:Net"
    line = last_line("imagenet", "--teacher", "nets.py:Net", "--student", "nets.py:small")
    assert "no nets.py:Net for 3 classes is published: name its file with --teacher-checkpoint" in line


def test_a_teacher_of_a_custom_is_not_fused():
    """fx would trace a module that branches on its input wrongly, or fold what it does not know."""
    frozen = teacher.load_teacher(networks.create("nets.py:Both", 3), "net.pt", "cpu")
    assert not isinstance(frozen.network, torch.fx.GraphModule)
    reference = Net(3).eval()
    reference.load_state_dict(torch.load("net.pt"))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen.logits(images), reference(images), rtol=0, atol=1e-5)


def test_two_files_find_each_its_own_helper(tmp_path):
    """A teacher and a student of two cloned repositories, which both have a parts.py."""
    for i, folder in enumerate((tmp_path / "a", tmp_path / "b"), 1):
        folder.mkdir()
        (folder / "parts.py").write_text(f"width = {i}\n")
        (folder / "nets.py").write_text("from torch import nn\nfrom parts import width\n\n\n"
                                        "def net(num_classes):\n    return nn.Linear(width, num_classes)\n")
    made = [networks.create(f"{tmp_path}/{x}/nets.py:net", 3) for x in "ab"]
    assert [m.in_features for m in made] == [1, 2] and {m.name for m in made} == {"nets-net"}


def written(path, text):
    """A Python file, under `import torch` and `from torch import nn`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("import torch\nfrom torch import nn\n\n\n" + textwrap.dedent(text))


def test_a_repositorys_own_modules_win_over_this_projects(tmp_path):
    """Most repositories have a models/ package and a data.py, some a train_cifar.py. Ours are unchanged."""
    written(tmp_path / "models" / "__init__.py", "")
    written(tmp_path / "models" / "resnet.py", "width = 7")
    written(tmp_path / "data.py", "deep = 2")
    written(tmp_path / "nets.py", """
        from data import deep
        from models.resnet import width

        def net(num_classes):
            return nn.Linear(width * deep, num_classes)""")
    written(tmp_path / "models" / "tiny.py", """
        from models.resnet import width

        def net(num_classes):
            return nn.Linear(width, num_classes)""")
    shutil.copy(tmp_path / "nets.py", tmp_path / "train_cifar.py")
    before = {name: sys.modules[name] for name in ("models", "data", "train_cifar")}
    for name in ("nets.py", "train_cifar.py"):
        assert networks.create(f"{name}:net", 3).in_features == 14
    assert networks.create("models.tiny:net", 3).in_features == 7
    assert all(sys.modules[name] is module for name, module in before.items())
    assert "models.resnet" not in sys.modules and networks.create("resnet8", 3).name == "resnet8"


def test_what_a_file_imports_from_its_environment_stays(tmp_path, monkeypatch):
    """.venv/ in the folder of nets.py: a second import would give second classes."""
    package = tmp_path / ".venv" / "lib" / "site-packages"
    written(package / "heavy_thing.py", "")
    written(tmp_path / "nets.py", """
        import heavy_thing

        def net(num_classes):
            return nn.Linear(1, num_classes)""")
    monkeypatch.syspath_prepend(package)
    networks.create(f"{tmp_path}/nets.py:net", 3)
    assert sys.modules.pop("heavy_thing", None)


def test_cached_logits_of_other_code_are_others(tmp_path):
    """The weights of a corrected nets.py are the same, its logits are not."""
    made = []
    for sign in "+-":
        written(tmp_path / "nets.py", f"""
            class Net(nn.Linear):
                def __init__(self, num_classes):
                    super().__init__(3 * 32 * 32, num_classes)

                def forward(self, x):
                    return {sign}super().forward(x.flatten(1))""")
        networks._module.cache_clear()
        torch.manual_seed(0)
        one = teacher.Teacher(networks.create(f"{tmp_path}/nets.py:Net", 100), "cpu")
        split = synthetic(10, 1)
        one.cache_logits(split, tmp_path / "logits")
        views = torch.zeros(10, dtype=torch.long)
        made.append(one.cached_logits(torch.arange(10), views, split.images.float()))
    assert torch.equal(made[0], -made[1])
