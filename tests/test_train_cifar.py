"""train_cifar.py as its users call it: in this process through click, on small synthetic or real data."""

import copy
import json
import os
import re
import signal
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cli
import data
import distill
import experiment
import randaugment
import recipes
import teacher
import train_cifar
from checkpoints import load_weights
from conftest import run_in
from distributed import World
from models import create_model
from recipes import kd_weight, learning_rate, recipe_epoch, reversal
from teacher import Teacher
from test_teacher import archive
from train_cifar import main
from zscore_kd import dkd_loss, kd_loss, mlkd_loss

SMALL = ["--data", "synthetic", "--train-images", "40", "--batch-size", "16", "--epochs", "3", "--device",
         "cpu"]


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    """Each test in an empty folder, with no kept teachers and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (200, 50))
    monkeypatch.setitem(train_cifar.CHUNK, "cpu", 24)       # small runs too prepare steps in several chunks
    monkeypatch.setitem(train_cifar.CHUNK, "cuda", 24)
    monkeypatch.setitem(teacher.BATCH, "cpu", 12)
    monkeypatch.setenv("TEACHER_URL", "http://127.0.0.1:9/none.tar")
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/none.tar.gz")


@pytest.fixture
def pair(tmp_path):
    """The flags of a distillation from a small teacher file."""
    torch.manual_seed(5)
    torch.save(create_model("resnet14").state_dict(), tmp_path / "teacher.pt")
    return ["--teacher", "resnet14", "--teacher-checkpoint", "teacher.pt", "--student", "resnet8"]


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".pt", ".json", ".jsonl")}


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


# ---------------------------------------------------------------- one run


def test_the_main_command_finds_a_teacher_as_mdistiller_publishes_it(serve, cifar, monkeypatch):
    """Real images, but few; the archive with optimizers and numpy.float64 in it; smaller networks."""
    archive(serve[0] / "cifar_teachers.tar", ["resnet56"])
    monkeypatch.setenv("TEACHER_URL", f"{serve[1]}/cifar_teachers.tar")
    train, test = (data.Split(s.images[:100], s.targets[:100]) for s in data.read_cifar("cifar100", cifar))
    monkeypatch.setattr(data, "read_cifar", lambda *_: (train, test))
    output = call("--teacher", "resnet56", "--student", "resnet20", "--zscore", "--epochs", 1,
                  "--device", "cpu")
    loss = rows(run_in())[0]["loss"]
    assert f"epoch 1: loss {loss:.2f}, authors' log 6.84\n" in output
    assert "teacher resnet56 (checkpoints/mdistiller/resnet56.pth): " in output
    assert "epoch   1/1" in output and "resnet56-resnet20-kd-z-1epochs-seed0: last epoch" in output


def test_a_run_leaves_what_the_design_promises(pair):
    output = call(*pair, *SMALL, "--zscore")
    folder = run_in()
    assert re.fullmatch("resnet14@[0-9a-f]{6}-resnet8-kd-z-batch16-3epochs-40images-synthetic-seed0",
                        folder.name)
    assert sorted(files(folder)) == ["config.json", "last.pt", "log.jsonl", "result.json", "student.pt"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["recipe"]["base_temp"] == 2 and config["recipe"]["kd_weight"] == 9
            and config["recipe"]["zscore"])
    assert config["recipe"]["teacher_sha256"] and config["facts"]["torch"] == torch.__version__
    log = rows(folder)
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert {"lr", "loss", "ce", "kd", "train_top1", "train_top5", "test_top1", "test_top5", "img_s",
            "seconds"} <= set(log[0])
    for row in log:
        assert row["loss"] == pytest.approx(0.1 * row["ce"] + 9 * row["kd"], rel=1e-4)
    result, best = result_of(folder), max(log, key=lambda row: row["test_top1"])
    assert result["last"]["top1"] == log[-1]["test_top1"] and result["best"]["top1"] == best["test_top1"]
    assert result["best"]["epoch"] == best["epoch"] and result["best_chosen_on"] == "test"
    metadata = load_weights(create_model("resnet8"), folder / "student.pt")
    assert metadata["top1"] == pytest.approx(result["last"]["top1"], abs=1e-3)
    assert "no published recipe for resnet14 -> resnet8" in output and "last epoch" in output
    shown = call("--eval", folder / "student.pt", "--data", "synthetic")
    assert f"resnet8: {result['last']['top1']:.2f} top-1, {result['last']['top5']:.2f} top-5" in shown

    before, again = files(folder), call(*pair, *SMALL, "--zscore")
    assert again.splitlines()[-1] == output.splitlines()[-1] and "finished before" in again
    assert files(folder) == before


def test_the_teacher_is_reported_after_epoch_1(pair):
    """From the logits of its first images, written out in NumPy; nothing of it in a dry run."""
    output = call(*pair, *SMALL, "--zscore", "--exact-teacher")
    split = data.synthetic(200, 1).pick(torch.from_numpy(data.choose_images(200, 0, 40)[0]))
    order, views = map(torch.from_numpy, data.epoch_draws(0, 0, 40))
    network = create_model("resnet14").eval()
    load_weights(network, "teacher.pt")
    images = data.normalise(data.crop_and_flip(split.images[order], views))
    with torch.no_grad():
        v = network(images).double().numpy()
    target = split.targets[order].numpy()
    z = (v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True) / 2
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    kl = (p * np.log(100 * p)).sum(1).mean()
    ce = np.log(np.exp(v).sum(1)) - v[np.arange(40), target]
    expected = {"images": 40, "train_top1": 100 * (v.argmax(1) == target).mean(), "train_ce": ce.mean(),
                "logit_std": v.std(1).mean(), "uniform_loss": 9 * 2**2 * kl}
    report = result_of(run_in())["teacher_report"]
    assert 0 <= report.pop("test_top1") <= 100
    assert report == pytest.approx(expected, rel=1e-4)
    assert rows(run_in())[0]["teacher"].items() >= report.items() and "teacher" not in rows(run_in())[1]
    assert f"a uniform student's distillation loss is {report['uniform_loss']:.2f}\nepoch 1: loss " in output
    assert "uniform" not in call(*pair, "--zscore", "--dry-run", "--device", "cpu")


def test_a_teachers_precision_is_kept_on_resume(pair, killed):
    """It was chosen on CUDA; the notice of another device is all that changes."""
    flags = [*pair, *SMALL, "--zscore", "--exact-teacher"]
    with killed(1, 2):
        call(*flags, "--save-every", "1e-9")
    config = json.loads((run_in() / "config.json").read_text())
    assert "teacher_precision" not in config["recipe"]
    config["recipe"]["teacher_precision"] = "fp16"
    (run_in() / "config.json").write_text(json.dumps(config))
    assert "from epoch 1, step 2" in call(*flags)
    exact = rows(run_in())[0]["kd"]
    call(*flags, "--out", "float32")
    assert rows(run_in("float32"))[0]["kd"] == exact
    assert rows(run_in("float32"))[2]["kd"] != rows(run_in())[2]["kd"]


@pytest.mark.parametrize("flags, at", [("--zscore", (0, 1)), ("--zscore", (1, 2)), ("--method none", (1, 0)),
                                       ("--method ctkd --zscore", (1, 2)), ("--method mlkd", (1, 2))])
def test_a_killed_run_ends_with_an_unbroken_runs_bits(pair, killed, flags, at):
    """Killed after an epoch or in one; CTKD's parameter and MLKD's second view are other mechanisms."""
    flags = [*pair, *SMALL, *flags.split()]
    call(*flags, "--out", "whole")
    with killed(*at):
        call(*flags, "--save-every", "1e-9", "--out", "broken")
    assert "from epoch {}, step {}".format(*at) in call(*flags, "--out", "broken")
    folders = run_in("whole"), run_in("broken")
    whole, broken = (torch.load(folder / "last.pt") for folder in folders)
    for key, value in whole["model"].items():
        assert torch.equal(value, broken["model"][key]), key
    assert all(map(torch.equal, whole["momentum"], broken["momentum"]))
    results = [result_of(folder) for folder in folders]
    assert results[0]["last"] == results[1]["last"] and results[0]["best"] == results[1]["best"]
    logs = [[{k: v for k, v in row.items() if k not in ("img_s", "seconds")} for row in rows(folder)]
            for folder in folders]
    assert logs[0] == logs[1]


def test_a_run_that_breaks_while_it_writes_its_result_finishes_the_next_time(pair, monkeypatch):
    call(*pair, *SMALL, "--out", "whole")

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(experiment.Run, "finish", killed)
        call(*pair, *SMALL, "--out", "broken")
    call(*pair, *SMALL, "--out", "broken")
    results = [result_of(run_in(out)) for out in ("whole", "broken")]
    assert all(results[0][k] == results[1][k] for k in ("last", "best", "epochs"))


def test_a_stop_in_the_last_evaluation_leaves_the_next_seed_out(pair, monkeypatch):
    def asked(*arguments, real=experiment.Run.finish):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(experiment.Run, "finish", asked)
    output = call(*pair, *SMALL, "--seeds", "2", code=1)
    assert "last epoch" in output and "the same command" in output.splitlines()[-1]
    assert run_in().name.endswith("seed0")


def test_another_value_is_another_folder_and_another_teachers_file_too(pair, tmp_path):
    call(*pair, *SMALL)
    first = run_in()
    before = files(first)
    call(*pair, *SMALL, "--lr", "0.1", "--base-temp", "1.5")
    torch.save(create_model("resnet14").state_dict(), tmp_path / "teacher.pt")
    call(*pair, *SMALL)
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 3
    assert len(list(tmp_path.glob("runs/*-tau1.5-lr0.1-*/result.json"))) == 1
    assert "exact_teacher was False, now True" in call(*pair, *SMALL, "--exact-teacher", code=1)
    assert files(first) == before


def test_zscore_changes_the_training_and_seeds_differ(pair, tmp_path):
    """The released CTKD script had its switch inverted; nobody noticed from its output."""
    output = call(*pair, *SMALL, "--epochs", "1", "--seeds", "2", "--seed", "3")
    call(*pair, *SMALL, "--epochs", "1", "--seed", "3", "--zscore", "--kd-weight", "0.9", "--base-temp", "4")
    losses = {path.name: rows(path)[0] for path in tmp_path.glob("runs/resnet14*")}
    assert len({row["kd"] for row in losses.values()}) == 3
    last = [row["test_top1"] for name, row in losses.items() if "kd-z" not in name]
    mean, deviation = (float(word) for word in output.split("mean")[1].split()[0:3:2])
    assert mean == pytest.approx(sum(last) / 2, abs=0.006) and "(n = 2)" in output
    assert deviation == pytest.approx(abs(last[0] - last[1]) / 2**0.5, abs=0.006)


def test_a_missing_teacher_is_trained_first_and_kept():
    output = call("--teacher", "resnet14", "--student", "resnet8", *SMALL)
    assert "training resnet14 here first" in output
    assert "finished before" in call("--teacher", "resnet14", "--student", "resnet8", *SMALL, "--zscore")


def test_held_out_images_choose_and_the_log_says_so(pair):
    output = call(*pair, *SMALL, "--val-from-train", "100")
    row = rows(run_in())[0]
    assert "val_top1" in row and "test_top1" not in row and "chosen on val" in output
    assert "(chosen on val)" in call(*pair, *SMALL, "--val-from-train", "100", "--seeds", "2")


# ---------------------------------------------------------------- the loop is the recipe


def test_schedules_are_the_recipes_and_scale_with_the_epochs():
    def at(function, step, **change):
        recipe = {"lr": 0.05, "kd_weight": 9.0, "stages": (150, 180, 210), "epochs": 240, "full_epochs": 240,
                  **change}
        return function(recipe_epoch(step, 782, recipe), recipe)

    drops = [at(learning_rate, epoch * 782) for epoch in (0, 149, 150, 179, 180, 209, 210, 239)]
    assert drops == pytest.approx([0.05, 0.05, 0.005, 0.005, 5e-4, 5e-4, 5e-5, 5e-5])
    assert at(learning_rate, 150 * 782 - 1) == 0.05
    assert at(learning_rate, 75 * 782 - 1, epochs=120) == 0.05
    assert at(learning_rate, 75 * 782, epochs=120) == pytest.approx(0.005)
    # MLKD drops as early
    assert at(learning_rate, 150 * 782, epochs=480, full_epochs=480) == pytest.approx(0.005)
    assert at(learning_rate, 75 * 782 - 1, full_epochs=480) == 0.05
    assert at(learning_rate, 75 * 782, full_epochs=480) == pytest.approx(0.005)
    assert [at(kd_weight, e * 782, warmup=20) for e in (0, 1, 9, 19, 30)] == pytest.approx(
        [0.45, 0.9, 4.5, 9, 9])
    assert at(kd_weight, 391, warmup=20, epochs=12) == pytest.approx(4.95) and at(kd_weight, 0) == 9
    ramp = [0.024, 0.095, 0.206, 0.345, 0.5, 0.655, 0.794, 0.905, 0.976, 1, 1]      # of CTKD, epochs 1 to 11
    assert [at(reversal, e * 782, ramp=10) for e in range(11)] == pytest.approx(ramp, abs=6e-4)


def test_two_epochs_equal_a_plain_loop(pair, tmp_path):
    """An independent loop: torchvision's order of operations, torch's own losses, MultiStepLR."""
    call(*pair, *SMALL, "--epochs", "2", "--train-images", "100", "--batch-size", "64", "--lr", "0.05",
         "--weight-decay", "0.1")
    train = data.load_data("synthetic", None, "cpu", train_images=100).train
    torch.manual_seed(0)
    student, frozen = create_model("resnet8"), create_model("resnet14")
    load_weights(frozen, tmp_path / "teacher.pt")
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    # 150, 180, 210 of 240 in 4 steps: 2.5, 3, 3.5
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 4])
    frozen.eval()
    for epoch in range(2):
        order, views = (torch.from_numpy(x) for x in data.epoch_draws(0, epoch, 100))
        for part in (slice(0, 64), slice(64, 100)):
            images = data.normalise(data.crop_and_flip(train.images[order[part]], views[part])).contiguous()
            z, v = student(images), frozen(images).detach()
            kd = 16 * torch.nn.KLDivLoss(reduction="batchmean")((z / 4).log_softmax(1), (v / 4).softmax(1))
            loss = 0.1 * torch.nn.CrossEntropyLoss()(z, train.targets[order[part]]) + 0.9 * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    ours = torch.load(run_in() / "student.pt")["model"]
    for key, value in student.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU")])])
@pytest.mark.parametrize("method", ["ctkd", "mlkd"])
def test_ten_fast_steps_equal_a_plain_loop(device, method, tmp_path):
    """Folded teacher in large batches, its cached logits, images in chunks, channels last, fused optimizer,
    on a GPU the captured step: the same numbers as a loop that does one thing after the other, the smaller
    last batch included."""
    device = torch.device(device)
    torch.backends.cudnn.allow_tf32 = False
    recipe = {**recipes.recipe("resnet32x4", "resnet8x4", method, True, "authors"), "teacher": "resnet14",
              "student": "resnet8", "method": method, "zscore": True, "seed": 3, "precision": "fp32",
              "batch_size": 16, "epochs": 2, "lr": 0.01}
    recipe["full_epochs"] = 480 if method == "mlkd" else 240
    split = data.Split(*(x.to(device) for x in data.synthetic(75, 1)))      # 5 steps an epoch, the last of 11
    made = data.Data(split, split, split, "test")
    torch.manual_seed(1)
    network = create_model("resnet14")
    teacher = Teacher(copy.deepcopy(network), device)
    teacher.cache_logits(split, tmp_path, exact=True)
    torch.manual_seed(3)
    student = create_model("resnet8").to(device, memory_format=torch.channels_last)
    distiller = distill.Distiller(student, recipe).to(device)
    optimizer = distill.make_optimizer(distiller, recipe)
    world = types.SimpleNamespace(size=1, rank=0, device=device)
    step, batches = (distill.make_step(distiller, optimizer, 16, world),
                     train_cifar.Batches(made, recipe, teacher, device))
    plain, start = (copy.deepcopy(student).to(memory_format=torch.contiguous_format) for _ in range(2))
    network.to(device).eval()
    g = torch.tensor(1.0, device=device, requires_grad=True)
    reference = torch.optim.SGD([*plain.parameters(), g], 0.01, momentum=0.9, weight_decay=5e-4,
                                foreach=False)
    for epoch in range(2):
        distill.evaluate(student.eval(), batches.evaluation())      # in between, as in a run
        student.train()
        order, views = (torch.from_numpy(x).to(device) for x in data.epoch_draws(3, epoch, 75))
        strong = randaugment.strong_draws(3, epoch, 75).to(device)
        for i, batch in enumerate(batches.epoch(epoch, 0)):
            now = recipe_epoch(epoch * 5 + i, 5, recipe)
            lr, weight, reverse, _ = recipes.schedule(now, recipe)
            for held, value in ((optimizer.param_groups[0]["lr"], lr), (distiller.kd_weight, weight),
                                (distiller.reversal, reverse)):
                held.fill_(value)
            sums = step(*batch)

            part = slice(16 * i, 16 * i + 16)
            chosen, y = split.images[order[part]], split.targets[order[part]]
            images = [data.normalise(data.crop_and_flip(chosen, views[part])).contiguous()]
            if method == "mlkd":
                images.append(data.normalise(randaugment.strong_view(chosen, strong[part])).contiguous())
            z, v = [plain(x) for x in images], [network(x).detach() for x in images]
            ce = sum(torch.nn.functional.cross_entropy(x, y) for x in z)
            if method == "mlkd":
                kd = mlkd_loss(z[0], v[0], z[1], v[1], 2.0)
            else:
                kd = kd_loss(z[0], v[0], 2 + 40 * torch.sigmoid(g) if method == "ctkd" else 2.0)
            loss = recipe["ce_weight"] * ce + recipe["kd_weight"] * kd
            reference.zero_grad()
            loss.backward()
            if method == "ctkd":
                g.grad *= -reversal(now, recipe)
            for group in reference.param_groups:
                group["lr"] = learning_rate(now, recipe)
            reference.step()
            assert sums[0].item() / len(y) == pytest.approx(loss.item(), rel=1e-3), (epoch, i)
    for read in (dict.values, lambda d: [v for k, v in d.items() if "running" in k]):
        ours, theirs, before = (torch.cat([v.flatten().double() for v in read(dict(m.state_dict()))])
                                for m in (student, plain, start))
        assert (ours - theirs).norm() < 0.01 * (theirs - before).norm()     # of the way that ten steps went
    if method == "ctkd":
        assert distiller.temperature.g.item() == pytest.approx(g.item(), abs=1e-2 * abs(g.item() - 1))


def test_a_run_is_the_same_with_and_without_cached_logits(pair, tmp_path):
    """And a second run finds the first one's; rounding to float16 is a recipe of its own."""
    flags = [*pair, *SMALL, "--zscore"]
    call(*flags)
    cached = list((tmp_path / "runs" / "logits").iterdir())
    call(*flags, "--no-teacher-memory", "--out", "without")
    call(*flags, "--exact-teacher", "--out", "exact")
    weights = [torch.load(run_in(out) / "last.pt")["model"] for out in ("runs", "without", "exact")]
    assert (all(map(torch.equal, weights[0].values(), weights[1].values()))
            and not (tmp_path / "without" / "logits").exists())
    assert not all(map(torch.equal, weights[0].values(), weights[2].values()))
    assert len(cached) == 1 and cached[0].stat().st_size > 40 * 162 * 200


@pytest.mark.parametrize("flags", ["--method ctkd", "--method ttm --zscore", "--method none"])
def test_the_log_has_the_weighted_sum_that_was_minimised(pair, flags):
    call(*pair, *SMALL, *flags.split(), "--epochs", "2")
    recipe = json.loads((run_in() / "config.json").read_text())["recipe"]
    for row in rows(run_in()):
        assert row["loss"] == pytest.approx(
            recipe["ce_weight"] * row["ce"] + recipe["kd_weight"] * row["kd"], rel=1e-3)
        assert (row["kd"] > 0) == ("none" not in flags)
        if "ctkd" in flags:
            start = recipe["base_temp"]
            assert start < row["temperature"] < start + recipe["span"]


@pytest.mark.parametrize("method", ["dkd", "mlkd", "ctkd"])
def test_two_steps_of_a_method_equal_a_plain_loop(pair, tmp_path, method):
    """Written out: where views enter, both cross-entropies, DKD's warm-up, CTKD's ramp, g in the same SGD."""
    call(*pair, *SMALL, "--method", method, "--zscore", "--epochs", "1", "--train-images", "64",
         "--batch-size", "32", "--lr", "0.001", "--weight-decay", "0.1")
    train = data.load_data("synthetic", None, "cpu", train_images=64).train
    torch.manual_seed(0)
    student, frozen, g = (create_model("resnet8"), create_model("resnet14"),
                          torch.tensor(1.0, requires_grad=True))
    load_weights(frozen, tmp_path / "teacher.pt")
    frozen.eval()
    optimizer = torch.optim.SGD([*student.parameters()] + [g] * (method == "ctkd"), 0.001, momentum=0.9,
                                weight_decay=0.1)
    order, views = (torch.from_numpy(x) for x in data.epoch_draws(0, 0, 64))
    strong = randaugment.strong_draws(0, 0, 64)
    for i, part in enumerate((slice(0, 32), slice(32, 64))):
        chosen, y = train.images[order[part]], train.targets[order[part]]
        weak = data.normalise(data.crop_and_flip(chosen, views[part])).contiguous()
        z, v = student(weak), frozen(weak).detach()
        ce = torch.nn.functional.cross_entropy(z, y)
        if method == "dkd":         # epochs 1 and 121 of 240: a twentieth of the weight, then all of it
            loss = ce + 9 * (1 / 20, 1)[i] * dkd_loss(z, v, y, 2.0, alpha=1.0, beta=8.0)
        elif method == "mlkd":
            hard = data.normalise(randaugment.strong_view(chosen, strong[part])).contiguous()
            z2, v2 = student(hard), frozen(hard).detach()
            loss = 0.1 * (ce + torch.nn.functional.cross_entropy(z2, y)) + 9 * mlkd_loss(z, v, z2, v2, 2.0)
        else:                       # the reversal is 0.0245 in epoch 1 and 1 in epoch 121
            temperature = 2 + 40 * torch.sigmoid(g)
            loss = 0.1 * ce + 9 * kd_loss(z, v, temperature)
        optimizer.zero_grad()
        loss.backward()
        if method == "ctkd":
            g.grad *= -(0.02447174, 1.0)[i]
        for group in optimizer.param_groups:
            # epoch 241 of 480 is past 150, 180 and 210
            group["lr"] = 0.001 * (1, 0.1**3 if method == "mlkd" else 1)[i]
        optimizer.step()
    state = torch.load(run_in() / "last.pt")
    for key, value in student.state_dict().items():
        torch.testing.assert_close(state["model"][f"student.{key}"], value, rtol=1e-3, atol=2e-5,
                                   msg=lambda m: f"{key}: {m}")
    if method == "ctkd":
        assert (state["model"]["temperature.g"].item() == pytest.approx(g.item(), abs=2e-6)
                and abs(g.item() - 1) > 1e-4)


def test_mlkd_relations_and_dkd_weights_are_flags(pair):
    for method, flags in (("mlkd", ["--no-zscore-relations"]), ("dkd", ["--beta", "3", "--alpha", "2"])):
        losses = []
        for out, more in ((f"{method}-a", []), (f"{method}-b", flags)):
            call(*pair, *SMALL, "--method", method, "--zscore", "--epochs", "1", *more, "--out", out)
            losses.append(rows(run_in(out))[0]["kd"])
        assert losses[0] != losses[1]


def test_bf16_trains_with_losses_in_float32():
    flags, losses = ["--method", "none", "--student", "resnet8", *SMALL, "--epochs", "1"], []
    for precision in ("bf16", "fp32"):
        call(*flags, "--precision", precision, "--out", precision)
        losses.append(rows(run_in(precision))[0]["loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.05        # the student ran in bf16, its loss is near
    state = torch.load(run_in("bf16") / "last.pt")
    assert all(v.dtype != torch.bfloat16 for v in state["model"].values())
    recipe = json.loads((run_in("bf16") / "config.json").read_text())["recipe"]
    assert recipe["precision"] == "bf16" and "-bf16-" in run_in("bf16").name


# ---------------------------------------------------------------- the other commands


def test_dry_run_walks_the_whole_path_and_leaves_nothing(tmp_path):
    output = call("--teacher", "resnet56", "--student", "resnet20", "--zscore", "--dry-run", "--device",
                  "cpu")
    assert "from epoch 1" in output and "last epoch" in output and output.endswith("dry run: all is well\n")
    assert list(tmp_path.iterdir()) == []
    # a teacher of seven classes, images of another size
    torch.save(create_model("resnet14", 7).state_dict(), "seven.pt")
    output = call("--teacher", "resnet14", "--teacher-checkpoint", "seven.pt", "--student", "resnet8",
                  "--data", "folder", "--size", "48", "--batch-size", "16", "--lr", "0.01", "--dry-run")
    assert "77,847 parameters" in output         # of seven classes


def test_the_demo_ends_with_its_four_rows(monkeypatch):
    """The README's first command, on fewer images: each seed's own teacher, then three students."""
    splits = [data.synthetic(64, part) for part in (1, 2)]
    monkeypatch.setattr(train_cifar, "load_data", lambda *rest, **more: data.Data(*splits, splits[1], "test"))
    output = call("--demo", "--device", "cpu")
    table = output.split("synthetic images of 100 classes")[1].splitlines()
    assert [line.split("  ")[0] for line in table[1:5]] == list(train_cifar.DEMO)
    assert output.count("teacher resnet20 (runs/demo/resnet20-none-8epochs-4000images-synthetic-seed0/") == 2
    assert "finished before" in call("--demo", "--device", "cpu")


@pytest.mark.slow
def test_eval_of_the_published_teacher_on_real_images(shared, cifar):
    output = call("--eval", shared / "teachers" / "resnet56.pt", "--student", "resnet56", "--data-dir", cifar)
    top1, top5 = (float(output.split(f" {word}")[0].split()[-1]) for word in ("top-1", "top-5"))
    assert top1 == pytest.approx(72.61, abs=0.02) and top5 == pytest.approx(91.92, abs=0.02)


def test_a_real_distillation_in_miniature(shared, cifar):
    output = call("--teacher", "resnet56", "--teacher-checkpoint", shared / "teachers" / "resnet56.pt",
                  "--student", "resnet8", "--zscore", "--epochs", "1", "--train-images", "1920",
                  "--data-dir", cifar, "--precision", "bf16", "--val-from-train", "2000")
    accuracy = float(re.search("([0-9.]+) % top-1 on the test images, published 72.34", output)[1])
    assert accuracy == pytest.approx(72.61, abs=0.25)       # in bfloat16
    assert result_of(run_in())["last"]["top1"] > 1.5


def test_list_prints_the_recipes():
    output = call("--list")
    assert "resnet32x4-resnet8x4" in output and "76.28" in output


def test_projected_days_say_what_to_do_instead(monkeypatch, capsys):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    progress = cli.Progress(50_000, 240, 0, torch.device("cpu"))
    for _ in range(4):
        progress.step(0, 64)
    line = capsys.readouterr().out
    assert "6.5 days" in line and "--student resnet8" in line and len(line.splitlines()) == 2


def test_another_batch_without_a_learning_rate_is_a_warning(pair):
    assert "warning: lr 0.05 is for batches of 64" in call(*pair, *SMALL, "--batch-size", "32")
    assert "warning" not in call(*pair, *SMALL, "--batch-size", "32", "--lr", "0.025")


def test_micro_batches_of_unequal_size_weigh_by_their_images():
    """Five images in three micro-batches, of 1, 2 and 2: the step is that of the whole batch."""
    recipe = recipes.recipe(None, "resnet8", "none") | {"method": "none", "precision": "fp32"}
    images, target = torch.randn(5, 3, 2, 2), torch.arange(5) % 3
    weights = []
    for micro_batch in (None, 2):
        torch.manual_seed(0)
        student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        distiller = distill.Distiller(student, recipe)
        optimizer = distill.make_optimizer(distiller, recipe)
        optimizer.param_groups[0]["lr"].fill_(0.1)
        step = distill.make_step(distiller, optimizer, 5, World("cpu"), micro_batch)
        sums = step([images], target, torch.arange(5), [])
        weights.append([*student.parameters(), sums])
    for whole, parts in zip(*weights):
        torch.testing.assert_close(parts, whole)
