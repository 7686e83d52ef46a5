"""--feature: eight methods in whole runs on synthetic images: steps, resuming, files, teachers, mistakes."""

import copy
import itertools
import json
import math
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from click.testing import CliRunner
from PIL import Image

import data
import distill
import experiment
import export
import feature_kd
import networks
import recipes
import reproduce
import teacher
import train_cifar
import train_imagenet
from checkpoints import load_weights, open_checkpoint
from feature_kd import METHODS
from conftest import run_in
from models import create_model
from teacher import Teacher
from test_export import predict
from test_reproduce import cells
from zscore_kd import kd_loss

PAIR = ["--teacher", "resnet14", "--student", "resnet8"]
SMALL = ["--data", "synthetic", "--train-images", "48", "--batch-size", "16", "--lr", "0.01", "--epochs", "2",
         "--device", "cpu"]
# of resnet14 -> resnet8, which no paper has; ReviewKD's grows to it
WEIGHTS = {"fitnet": 100, "at": 1000, "rkd": 1, "crd": 0.8, "ofd": 0.001, "reviewkd": 0.6, "simkd": 1,
           "catkd": 0.7}
OWN = """
import types
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 64, 3, 2, 1), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, num_classes)

    def maps(self, x):
        a = self.bn1(self.conv1(x))
        b = self.bn2(self.conv2(torch.relu(a)))
        return [a, b], [torch.relu(a), torch.relu(b)]

class Mute(Small):
    def forward(self, x):
        return self.fc(self.maps(x)[1][-1].mean((2, 3)))

class Net(Small):
    def forward(self, x, features=False):
        pre, post = self.maps(x)
        pooled = post[-1].mean((2, 3))
        if features:
            return self.fc(pooled), types.SimpleNamespace(pre=pre, post=post, last=post[-1], pooled=pooled)
        return self.fc(pooled)

    def norms_before_relu(self):
        return [self.bn1, self.bn2]

class Bare(Small):
    def forward(self, x, features=False):
        return self.fc(self.maps(x)[1][-1].mean((2, 3)))

class Looping(Net):
    def maps(self, x):
        return super().maps(torch.stack([x[i] for i in range(len(x))]))
"""


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    """Each test in an empty folder, with no kept teachers and no network."""
    monkeypatch.chdir(tmp_path)
    for module in (teacher, reproduce):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (200, 60))
    monkeypatch.setitem(train_cifar.CHUNK, "cpu", 32)       # an epoch is prepared in several chunks
    monkeypatch.setitem(teacher.BATCH, "cpu", 40)
    monkeypatch.setenv("TEACHER_URL", "http://127.0.0.1:9/none.tar")
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/none.tar.gz")


def lively(name, seed=5):
    """A network with trained-looking batch norms: statistics of images, random weights and biases."""
    torch.manual_seed(seed)
    network = create_model(name)
    for m in network.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, 0, 0.3)
    networks.init_bn_stats(network, data.normalise(data.synthetic(64, 3).images))
    return network.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The file of a teacher, by its name."""
    folder = tmp_path_factory.mktemp("teachers")

    def file(name):
        path = folder / f"{name}.pt"
        if not path.exists():
            torch.save(lively(name).state_dict(), path)
        return path

    return file


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of a finished, unbroken run with a feature method; each is made once."""
    out = tmp_path_factory.mktemp("whole")

    def folder(feature):
        if not (out / feature).exists():
            call(*PAIR, "--teacher-checkpoint", files("resnet14"), *SMALL, "--method", "none", "--feature",
                 feature, "--out", out / feature)
        return run_in(out / feature)

    return folder


def call(*arguments, code=0, command=train_cifar.main):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def flags(feature, files, pair=("resnet14", "resnet8"), method="none"):
    return ["--teacher", pair[0], "--teacher-checkpoint", files(pair[0]), "--student", pair[1], *SMALL,
            "--method", method, "--feature", feature]


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def recipe_of(folder):
    return json.loads((folder / "config.json").read_text())["recipe"]


def equal(ours, theirs):
    """Two state dicts: the same names and bits."""
    return list(ours) == list(theirs) and all(map(torch.equal, ours.values(), theirs.values()))


def images_of(n, part=1):
    images, target = data.synthetic(n, part)
    return data.normalise(images).contiguous(), target


def prepared(words):
    """(recipe, Distiller, Teacher) as a run begins, without running it."""
    recipe, _ = train_cifar.resolve(train_cifar.parsed([str(w) for w in words]), torch.device("cpu"))
    network = create_model(recipe["teacher"])
    load_weights(network, words[words.index("--teacher-checkpoint") + 1])
    taught = Teacher(network, "cpu")
    torch.manual_seed(0)
    student = create_model(recipe["student"])
    method = networks.feature_method(recipe, student, taught.whole, data.synthetic(48, 1).targets, 32)
    taught.prepare(method)
    return recipe, distill.Distiller(student, recipe, method, taught).train(), taught


def stepped(recipe, distiller, taught, batches, epoch=1):
    """distill's own steps with the schedule of an epoch; the sums that they return."""
    optimizer = distill.make_optimizer(distiller, recipe)
    values = distill.schedule(epoch, recipe)
    optimizer.param_groups[0]["lr"].fill_(values[0])
    for held, value in zip((distiller.kd_weight, distiller.reversal, distiller.feature_weight), values[1:]):
        held.fill_(value)
    world = types.SimpleNamespace(size=1, rank=0, device=torch.device("cpu"))
    step, sums = distill.make_step(distiller, optimizer, 16, world), []
    for i, (images, target, index) in enumerate(batches):
        torch.manual_seed(i)        # CRD's negatives
        logits = [taught.logits(images)] if recipe["method"] != "none" else []
        sums.append(step([images], target, index, logits))
    return sums


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("method, feature, pair", [
    *(("none", name, ("resnet14", "resnet8")) for name in METHODS), ("kd", "crd", ("resnet14", "resnet8")),
    ("none", "reviewkd", ("wrn_16_2", "wrn_16_1")), ("none", "simkd", ("resnet14", "ShuffleV2"))])
def test_three_steps_equal_a_plain_loop(files, method, feature, pair):
    """A wrong weight, a teacher in the other mode, a connector that does not learn or is not decayed, images
    that are taken for others: the accuracy would be a little lower, and nobody would know why."""
    rate = 0.001 if pair[1] == "ShuffleV2" else 0.01        # its rounding errors would grow
    recipe, distiller, taught = prepared([*flags(feature, files, pair, method), "--lr", rate,
                                          *["--zscore"] * (method == "kd")])
    student, connectors, frozen = copy.deepcopy((distiller.student, distiller.feature, taught.whole))
    start = copy.deepcopy((student.state_dict(), connectors.state_dict()))
    images, targets = images_of(48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    batches = [(images[i], targets[i], i) for i in order.split(16)]
    sums = stepped(recipe, distiller, taught, batches)

    weight = {"reviewkd": (0.6 if "resnet" in pair[0] else 5) / 20}.get(feature, WEIGHTS[feature])
    student.train(), connectors.train(), frozen.train(feature == "ofd")
    learnt = [p for p in (*student.parameters(), *connectors.parameters()) if p.requires_grad]
    momentum = [torch.zeros_like(p) for p in learnt]
    for i, ((x, y, index), ours) in enumerate(zip(batches, sums)):
        torch.manual_seed(i)
        with torch.no_grad():
            v, t = frozen(x, features=True)
        z, s = student(x, features=True)
        loss = connectors(s, t, y, index)
        total = weight * loss
        if feature != "simkd":          # which has no cross-entropy
            ce = F.cross_entropy(z, y)
            total = total + (0.1 if method == "kd" else 1) * ce
            assert ours[1].item() == pytest.approx(16 * ce.item(), rel=1e-4)
        if method == "kd":
            total = total + 9 * kd_loss(z, v, 2.0)
        for p in learnt:
            p.grad = None
        total.backward()
        with torch.no_grad():
            for p, m in zip(learnt, momentum):
                m.mul_(0.9).add_(p.grad + 5e-4 * p)
                p.sub_(rate * m)
        assert ours[0].item() == pytest.approx(16 * total.item(), rel=1e-4)
        assert ours[3].item() == pytest.approx(16 * loss.item(), rel=3e-4)
    for plain, ours, before in zip((student, connectors), (distiller.student, distiller.feature), start):
        ours, moved, off = ours.state_dict(), 0.0, 0.0
        for key, value in plain.state_dict().items():
            if value.is_floating_point():
                moved = max(moved, (value - before[key]).abs().max().item())
                off = max(off, (value - ours[key]).abs().max().item())
            else:
                assert torch.equal(value, ours[key]), key       # the counters
        assert off <= 2e-3 * moved and (moved > 1e-4 or not plain.state_dict()), (off, moved)
    if feature == "crd":
        assert not torch.equal(distiller.feature.bank_s[order], start[1]["bank_s"][order])


def test_a_row_of_crds_banks_is_one_image(files, tmp_path, monkeypatch):
    """`index` is the image's place in the data, of which the class is known: else negatives are of the same
    class, and positives other images."""
    seen, targets = [], data.load_data("synthetic", None, "cpu", train_images=48).train.targets

    def forward(method, s, t, target, index, real=feature_kd.CRD.forward):
        if not method.training:     # whether it takes these networks, before the run
            return real(method, s, t, target, index)
        assert torch.equal(target, targets[index]) and torch.equal(method.labels, targets)
        negatives = method._negatives(index)
        assert (targets[negatives] != target[:, None]).all()
        seen.append(index)
        return real(method, s, t, target, index)

    monkeypatch.setattr(feature_kd.CRD, "forward", forward)
    call(*flags("crd", files), "--epochs", "1")
    assert sorted(torch.cat(seen).tolist()) == list(range(48))
    state = torch.load(run_in() / "last.pt")["model"]
    for bank in ("feature.bank_s", "feature.bank_t"):       # all were visited: rows of norm 1
        torch.testing.assert_close(state[bank].norm(dim=1), torch.ones(48))


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("feature", ["reviewkd", "crd"])
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(whole, files, tmp_path, killed, feature):
    """Its connectors, banks and constants are in the save too."""
    with killed():
        call(*flags(feature, files), "--save-every", "1e-9")
    output = call(*flags(feature, files))
    assert "resuming from epoch 1, step 2" in output
    ours, theirs = (torch.load(folder / "last.pt") for folder in (run_in(), whole(feature)))
    assert equal(ours["model"], theirs["model"])
    assert len(ours["momentum"]) == len(theirs["momentum"])
    assert all(map(torch.equal, ours["momentum"], theirs["momentum"]))
    ours, theirs = (torch.load(folder / "student.pt")
                    for folder in (run_in(), whole(feature)))
    assert equal(ours["model"], theirs["model"]) and ours["top1"] == theirs["top1"]
    ours, theirs = ([{k: v for k, v in row.items() if k not in ("img_s", "seconds")} for row in rows(folder)]
                    for folder in (run_in(), whole(feature)))
    assert ours == theirs


# ---------------------------------------------------------------- whole commands


@pytest.mark.parametrize("words", ["--method none --feature crd", "--method kd --zscore --feature simkd",
                                   "--method mlkd --feature at"])
def test_dry_run_walks_the_whole_path(tmp_path, words):
    output = call(*PAIR, *words.split(), "--dry-run", "--batch-size", "16", "--lr", "0.01", "--device", "cpu")
    assert output.endswith("dry run: all is well\n") and "resuming from epoch 1" in output
    assert " parameters; " in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("student, words", [
    *(("shufflenet_v2_x0_5", f"--method none --feature {name}") for name in ("at", "simkd")),
    pytest.param("MobileNetV1", "--method kd --zscore --feature simkd", marks=pytest.mark.slow),
    pytest.param("mobilenet_v2", "--method mlkd --feature rkd", marks=pytest.mark.slow)])
def test_train_imagenets_dry_run_walks_the_whole_path(tmp_path, student, words):
    output = call("--teacher", "resnet18", "--student", student, *words.split(), "--dry-run", "--lr",
                  "0.01", "--device", "cpu", command=train_imagenet.main)
    assert output.endswith("dry run: all is well\n") and "resuming from epoch 1" in output
    assert not list(tmp_path.iterdir())


def photos(folder, n=12):
    draw = np.random.default_rng(0)
    for part, i in itertools.product(("train", "val"), range(n)):
        path = folder / part / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)


def test_folders_of_images_with_simkd_and_crd(tmp_path, monkeypatch):
    """train_imagenet.py: SimKD's file is evaluated as the run said, CRD's rows are the images."""
    photos(tmp_path / "images")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), "teacher.pt")
    words = ["--data-dir", "images", "--teacher", "resnet18", "--teacher-checkpoint", "teacher.pt",
             "--student", "MobileNetV1", "--size", "32", "--batch-size", "4", "--lr", "0.001",
             "--epochs", "1", "--device", "cpu", "--workers", "0", "--method", "none", "--feature"]
    call(*words, "simkd", command=train_imagenet.main)
    folder = run_in()
    last = json.loads((folder / "result.json").read_text())["last"]
    output = call("--data-dir", "images", "--eval", folder / "student.pt", "--device", "cpu",
                  "--workers", "0", command=train_imagenet.main)
    assert f"MobileNetV1: {last['top1']:.2f} top-1" in output
    targets, seen = torch.tensor([i % 3 for i in range(12)]).sort().values, []

    def forward(method, s, t, target, index, real=feature_kd.CRD.forward):
        if not method.training:     # whether it takes these networks, before the run
            return real(method, s, t, target, index)
        assert torch.equal(target, targets[index]) and torch.equal(method.labels, targets)
        seen.extend(index.tolist())
        return real(method, s, t, target, index)

    monkeypatch.setattr(feature_kd.CRD, "forward", forward)
    call(*words, "crd", command=train_imagenet.main)
    assert sorted(seen) == list(range(12))


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("feature", ["crd", "catkd"])
def test_student_pt_is_a_plain_students(whole, feature):
    """RepDistiller and mdistiller read it; what taught it is not in it."""
    content, plain = torch.load(whole(feature) / "student.pt", weights_only=True), create_model("resnet8")
    assert list(content["model"]) == list(plain.state_dict())
    assert load_weights(plain, whole(feature) / "student.pt")["top1"] == content["top1"]
    assert (content["student"], content["teacher"], content["method"], content["feature"]) == (
        "resnet8", "resnet14", "none", feature) and "simkd" not in content
    bias = content["model"]["fc.bias"]
    assert (feature == "catkd") == (not bias.any())
    result = json.loads((whole(feature) / "result.json").read_text())
    assert result["parameters"] == sum(p.numel() for p in plain.parameters())
    assert 11e6 < result["macs"] < 14e6


def test_simkds_file_has_nothing_dead_in_it_and_is_the_network_of_the_run(whole):
    content = torch.load(whole("simkd") / "student.pt", weights_only=True)
    assert content["feature"] == "simkd" and {k.split(".")[0] for k in content["model"]} == {
        "student", "projector", "fc"}
    assert not [k for k in content["model"] if k.startswith("student.fc")]
    body = [k for k in create_model("resnet8").state_dict() if not k.startswith("fc.")]
    assert [k.removeprefix("student.") for k in content["model"] if k.startswith("student.")] == body
    result = json.loads((whole("simkd") / "result.json").read_text())
    network, _ = open_checkpoint(whole("simkd") / "student.pt")
    assert result["parameters"] == sum(p.numel() for p in network.parameters())
    # written out
    last = torch.load(whole("simkd") / "last.pt")["model"]
    student, taught = create_model("resnet8").eval(), lively("resnet14")
    student.load_state_dict({k.removeprefix("student."): v for k, v in last.items()
                             if k.startswith("student.")})
    assert torch.equal(content["model"]["fc.weight"], taught.fc.weight)
    images, _ = images_of(5, 2)
    with torch.no_grad():
        x = student(images, features=True)[1].last
        for i in (0, 3, 6):
            x = F.conv2d(x, last[f"feature.projector.{i}.weight"], padding=int(i == 3))
            x = F.batch_norm(x, *(last[f"feature.projector.{i + 1}.{k}"] for k in
                                  ("running_mean", "running_var", "weight", "bias"))).relu()
        torch.testing.assert_close(network.eval()(images), taught.fc(x.mean((2, 3))))


def test_simkds_file_is_no_teacher_and_says_why(whole):
    path = whole("simkd") / "student.pt"
    output = call("--teacher", "resnet8", "--teacher-checkpoint", path, "--student", "resnet8", "--zscore",
                  "--data", "synthetic", code=1)
    assert "is not a resnet8 but a SimKD student: " in output


def test_simkds_file_is_exported_and_classifies(whole, tmp_path, monkeypatch):
    """The ONNX file is the network with the projector, on a device without torch."""
    once = {"median_ms": 1.0, "p95_ms": 1.0, "img_s": 1.0, "samples": [1, 1]}
    monkeypatch.setattr(export, "speeds", lambda *rest: {"1": once, "all": once})
    path = whole("simkd") / "student.pt"
    call("--checkpoint", path, "--out", "out", "--agreement", "0", command=export.main)
    network, _ = open_checkpoint(path)
    images = data.synthetic(7, 2).images
    session = onnxruntime.InferenceSession("out/resnet8.onnx", providers=["CPUExecutionProvider"])
    logits, = session.run(["logits"], {"image": images.numpy()})
    with torch.no_grad():
        expected = network(data.normalise(images)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
    known = session.get_modelmeta().custom_metadata_map
    assert known["feature"] == "simkd" and known["teacher"] == "resnet14" and known["network"] == "resnet8"
    assert Path("out/resnet8.int8.onnx").exists()
    for i, image in enumerate(images[:3]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{i}.png")
    result = predict("out/resnet8.onnx", "0.png", "1.png", "2.png", "--json")
    assert result.returncode == 0, result.stderr
    found = [json.loads(line)["top"][0]["index"] for line in result.stdout.splitlines()]
    assert found == expected[:3].argmax(1).tolist()


def test_reproduces_table_says_what_simkd_deploys(files, monkeypatch):
    """Next to the published number: its network is larger than the students it is compared with."""
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (64, 32))
    Path("RESULTS.md").write_text(f"{reproduce.BEGIN}\n{reproduce.END}\n")
    call("--pairs", "resnet56-resnet20", "--methods", "simkd,kd-z-crd", "--teacher-checkpoint",
         files("resnet56"), "--data", "synthetic", "--train-images", 64, "--epochs", 1, "--device", "cpu",
         "--results", "results", "--readme", "RESULTS.md", command=reproduce.main)
    text = Path("RESULTS.md").read_text()
    record = json.loads(next(Path("results").glob("*-simkd-*.json")).read_text())
    pair = f"resnet56@{record['recipe']['teacher_sha256'][:6]} → resnet20"
    row = cells(text, "SimKD", pair)
    assert row["paper"] == "71.05"
    assert row["exported network"] == "291,892 parameters, 41.7 M multiply-accumulates"
    assert "--method none --feature simkd" in row["`python train_cifar.py`, with `--seed`"]
    row = cells(text, "KD+Z and CRD", pair)
    assert row["paper"] == "–" and row["exported network"] == "–"
    assert record["parameters"] == 291_892 and record["recipe"]["feature"] == "simkd"


# ---------------------------------------------------------------- teachers


def statistics(network):
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k}


def begun(words):
    """The Teacher of a run in this process."""
    return train_cifar.run([str(w) for w in words])[-1]


@pytest.fixture
def modes(monkeypatch):
    """The modes of the teachers' batch norms when their features were taken, and their maps."""
    seen = []

    def features(taught, images, real=Teacher.features):
        norms = [m.training for m in taught.extractor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        seen.append((set(norms), images, real(taught, images)))
        return seen[-1][-1]

    monkeypatch.setattr(Teacher, "features", features)
    return seen


def test_ofds_teacher_takes_the_batchs_statistics_and_keeps_its_own(files, modes, whole, tmp_path):
    """As its authors mean it; a teacher that drifted would not be the file's that the log names."""
    before = statistics(lively("resnet14"))
    taught = begun(flags("ofd", files, method="kd"))
    assert len(modes) == 6 and all(mode == {True} for mode, *_ in modes)
    network = lively("resnet14").train()
    for _, images, ours in modes:
        with torch.no_grad():
            theirs = network(images, features=True)[1]
        for a, b in zip(ours.pre, theirs.pre, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    after = statistics(taught.whole)
    assert before and all(torch.equal(after[k], v) for k, v in before.items())
    images, _ = images_of(48)
    with torch.no_grad():
        torch.testing.assert_close(taught.logits(images), lively("resnet14")(images), rtol=1e-3, atol=1e-3)
    # and the logits that KD reads, of the cache too
    fresh = Teacher(lively("resnet14"), "cpu")
    assert torch.equal(fresh.logits(images), taught.logits(images))
    index, views = torch.arange(20), torch.full((20,), 80)
    seen = data.load_data("synthetic", None, "cpu", train_images=48).train.images[index]
    seen = data.normalise(data.crop_and_flip(seen, views))
    torch.testing.assert_close(taught.cached_logits(index, views, seen), fresh.logits(seen), rtol=2e-3,
                               atol=2e-3)


@pytest.mark.parametrize("feature", ["simkd", "reviewkd"])
def test_another_methods_teacher_is_in_evaluation_mode(files, modes, feature):
    taught = begun(flags(feature, files))
    assert len(modes) == 6 and all(True not in mode for mode, *_ in modes)
    _, images, ours = modes[0]
    with torch.no_grad():
        theirs = lively("resnet14")(images, features=True)[1]
    for name in METHODS[feature].reads:
        a, b = getattr(ours, name), getattr(theirs, name)
        for x, y in zip(a, b[:len(a)], strict=True) if isinstance(a, tuple) else [(a, b)]:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    before, after = statistics(lively("resnet14")), statistics(taught.whole)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_wrns_batch_norms_see_each_batch_once(files, tmp_path):
    """mdistiller's see three of their maps twice, and its running statistics are others."""
    network = create_model("wrn_16_1").train()
    network(images_of(8)[0], features=True)
    counters = [v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counters and all(v == 1 for v in counters)
    call(*flags("ofd", files, ("wrn_16_2", "wrn_16_1")))
    state = torch.load(run_in() / "last.pt")["model"]
    counters = {k: v.item() for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert set(counters.values()) == {2 * 3} and any(k.startswith("feature.") for k in counters)


def test_a_second_view_is_counted_and_not_compared(files, modes, tmp_path):
    """MLKD's strong view is the student's alone: a feature method sees the weak one."""
    call(*flags("fitnet", files, method="mlkd"))
    folder = run_in()
    state = torch.load(folder / "last.pt")["model"]
    assert state["student.bn1.num_batches_tracked"] == 12
    assert state["feature.regressor.1.num_batches_tracked"] == 6
    train = data.load_data("synthetic", None, "cpu", train_images=48).train
    order, views = (torch.from_numpy(x)[:16] for x in data.epoch_draws(0, 0, 48))
    assert torch.equal(modes[0][1], data.normalise(data.crop_and_flip(train.images[order], views)))


# ---------------------------------------------------------------- schedule and log


@pytest.fixture
def steps(monkeypatch):
    """(feature weight, CRD's constants) at each step's end."""
    seen = []

    def make_step(distiller, *rest, real=distill.make_step, **more):
        step = real(distiller, *rest, **more)

        def noted(*arguments, **given):
            value = step(*arguments, **given)
            seen.append((distiller.feature_weight.item(),
                         *(getattr(distiller.feature, k, torch.zeros(())).item() for k in ("z_s", "z_t"))))
            return value
        return noted

    monkeypatch.setattr(distill, "make_step", make_step)
    return seen


def test_reviewkds_weight_grows_over_twenty_epochs_whatever_the_length(files, tmp_path, steps):
    """8 epochs of 2 steps for 240: the steps are those of epochs 1, 16, 31, ... of the recipe."""
    call(*flags("reviewkd", files), "--epochs", 8, "--train-images", 32)
    assert [weight for weight, *_ in steps] == pytest.approx([0.6 / 20, 0.6 * 16 / 20, *[0.6] * 14])
    folder = run_in()
    row = rows(folder)[-1]
    assert row["loss"] == pytest.approx(row["ce"] + 0.6 * row["feature"], rel=1e-3)
    recipe = recipe_of(folder) | {"epochs": 240}
    at = [distill.schedule(distill.recipe_epoch(epoch * 3, 3, recipe), recipe)[-1]
          for epoch in (0, 9, 19, 99)]
    assert at == pytest.approx([0.6 / 20, 0.3, 0.6, 0.6])


@pytest.mark.parametrize("feature", ["reviewkd", "simkd"])
def test_the_log_has_the_feature_loss(whole, feature):
    """loss is the weighted sum that was minimised, with the weight that config.json says."""
    recipe, log = recipe_of(whole(feature)), rows(whole(feature))
    assert recipe["feature"] == feature and recipe["feature_weight"] == WEIGHTS[feature] and len(log) == 2
    for row in log:
        assert math.isfinite(row["feature"]) and row["feature"] > 0 and row["kd"] == 0
        if feature != "reviewkd":
            ce = 0 if feature == "simkd" else row["ce"]
            assert row["loss"] == pytest.approx(ce + WEIGHTS[feature] * row["feature"], rel=1e-3)


def test_simkds_accuracy_in_training_is_the_deployed_networks(files):
    """The student's own head learns nothing: its 1 % would be in the log."""
    recipe, distiller, taught = prepared(flags("simkd", files))
    images, targets = images_of(16)
    twin = copy.deepcopy(distiller)
    _, logits = distiller.loss_and_logits(images, targets, torch.arange(16))
    torch.testing.assert_close(logits, twin.inference_model[0](images))
    assert not torch.allclose(logits, copy.deepcopy(distiller.student)(images))
    distiller.eval()
    assert torch.equal(distiller.predict(images), distiller.inference_model[0](images))


# ---------------------------------------------------------------- flags


def start_of(monkeypatch, *words):
    """The Distiller of a command as its training begins; nothing is trained."""
    class Begun(BaseException):
        pass

    def begun(recipe, batches, distiller, *rest, **more):
        raise Begun(distiller)

    with monkeypatch.context() as patch, pytest.raises(Begun) as caught:
        patch.setattr(experiment, "train", begun)
        call(*words)
    return caught.value.args[0]


def test_catkds_student_begins_with_a_new_head_or_its_files(files, tmp_path, monkeypatch):
    torch.save(lively("resnet8", 3).state_dict(), "begin.pt")
    words = flags("catkd", files)
    fresh = start_of(monkeypatch, *words).student
    torch.manual_seed(0)
    plain = create_model("resnet8")
    assert fresh.fc.weight.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.05)
    assert torch.equal(fresh.conv1.weight, plain.conv1.weight)
    begin = lively("resnet8", 3)
    given = start_of(monkeypatch, *words, "--student-checkpoint", "begin.pt", "--out", "other").student
    for key, value in begin.state_dict().items():
        if key != "fc.bias":
            assert torch.equal(given.state_dict()[key], value), key
    for student in (fresh, given):
        assert not student.fc.bias.any() and not student.fc.bias.requires_grad and begin.fc.bias.any()


def test_the_given_weight_wins_and_is_kept(files, tmp_path):
    call(*flags("fitnet", files), "--feature-weight", "3")
    folder = run_in()
    assert recipe_of(folder)["feature_weight"] == 3
    for row in rows(folder):
        assert row["loss"] == pytest.approx(row["ce"] + 3 * row["feature"], rel=1e-3)
    output = call(*flags("fitnet", files), "--feature-weight", "4", code=1)
    assert "holds a run of another recipe (feature_weight was 3.0, now 4.0)" in output.splitlines()[-1]


def test_a_folders_name_and_recipe_say_the_feature(files, tmp_path, monkeypatch):
    begins = ["--teacher", "resnet20", "--student", "resnet8"]
    for words, name in (("--method none --feature crd", "crd"), ("--zscore --feature crd", "kd-z-crd"),
                        ("--feature simkd", "kd-simkd"), ("--method kd --zscore", "kd-z")):
        recipe, _ = train_cifar.resolve_arguments([*begins, *words.split(), "--device", "cpu"])
        assert recipes.run_name(recipe) == f"resnet20-resnet8-{name}-seed0"


@pytest.mark.parametrize("code, words, said", [
    (2, "--teacher resnet14 --student resnet8 --feature-weight 3", "--feature-weight needs --feature"),
    (2, "--method none --student resnet8 --feature crd", "name a --teacher"),
    (2, "--method none --teacher resnet14 --student resnet8 --feature at --kd-weight 2",
     "--kd-weight is for --method kd, dkd"),
    (1, "--teacher wrn_40_2 --student MobileNetV2 --method none --feature ofd --dry-run",
     "OFD pairs the stages' maps: MobileNetV2 has 4, wrn_40_2 3"),
    (1, "--teacher resnet20 --student nets.py:Mute --method none --feature crd --dry-run",
     "nets-Mute gives no features: its forward(x, features=True) must return"),
    (1, "--teacher nets.py:Mute --student resnet8 --method none --feature crd --dry-run",
     "nets-Mute gives no features: its forward(x, features=True) must return"),
    (1, "--teacher resnet20 --student nets.py:Bare --method none --feature at --dry-run",
     "--feature at fails between resnet20 and nets-Bare ("),
    (1, "--teacher nets.py:Bare --student resnet8 --method none --feature crd --dry-run",
     "--feature crd fails between nets-Bare and resnet8 ("),
    (1, "--teacher resnet20 --student nets.py:Looping --method none --feature simkd --dry-run",
     "SimKD: nets-Looping cannot be traced by torch.fx ("),
    *((1, f"--teacher resnet14 --student resnet8 --data synthetic --method none --feature {name} {more}",
       f"--feature {name} fails between resnet14 and resnet8 (")
      for name, more in (("rkd", "--train-images 65"), ("reviewkd", "--batch-size 1 --lr 0.001"))),
])
def test_a_mistake_is_one_line_on_stderr(tmp_path, code, words, said):
    (tmp_path / "nets.py").write_text(OWN)
    result = CliRunner().invoke(train_cifar.main, [*words.split(), "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    line, = result.stderr.splitlines()
    assert line.startswith("Error: ") and said in line and "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nets.py"]


def test_crd_is_for_one_process():
    """Each would have a bank of its own, which misses the others' updates."""
    world = types.SimpleNamespace(size=2, rank=0, device=torch.device("cpu"))
    words = ["--teacher", "resnet18", "--student", "resnet18", "--feature", "crd"]
    given = train_imagenet.main.make_context("train_imagenet.py", words).params
    with pytest.raises(train_imagenet.click.UsageError, match="it is for one process"):
        train_imagenet.execute(given, world)


def test_a_teachers_decoy_head_is_not_matched(tmp_path):
    """Its classifier is the linear layer that makes its logits; a second head of its size came after it."""
    (tmp_path / "decoys.py").write_text(OWN + """
class Decoy(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.other = nn.Linear(64, num_classes)
""")
    for feature in ("simkd", "catkd"):
        teacher_network, student = (networks.create("decoys.py:Decoy", 5) for _ in range(2))
        recipe = {"feature": feature}
        method = networks.feature_method(recipe, student, teacher_network, torch.arange(2), 32)
        used = method.fc if feature == "simkd" else method.heads[1]
        assert torch.equal(used.weight, teacher_network.fc.weight)


@pytest.mark.parametrize("feature", ["crd", "simkd"])
def test_a_custom_network_that_gives_features_works_on_both_sides(tmp_path, feature):
    """A teacher that nobody publishes is trained first; the student's file is evaluated as the run said."""
    (tmp_path / "nets.py").write_text(OWN)
    call("--teacher", "nets.py:Net", "--student", "nets.py:Net", "--method", "none", "--feature", feature,
         *SMALL, "--epochs", 1)
    folder, = Path("runs").glob("nets-Net-nets-Net-*")
    last = json.loads((folder / "result.json").read_text())["last"]
    assert math.isfinite(rows(folder)[0]["feature"])
    assert f"{last['top1']:.2f} top-1" in call("--eval", folder / "student.pt", "--device", "cpu")


def test_what_cannot_be_counted_costs_no_run():
    """As attention with its own operators: the network is trained, its multiply-accumulates are not known."""
    network = torch.nn.Sequential(create_model("resnet8"))
    network.register_forward_hook(lambda *_: next(iter(())))
    assert distill.cost(network, 32, torch.device("cpu")) == {"parameters": 83892, "macs": None}


