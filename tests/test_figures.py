"""figures.py: pictures show what the runs say; their numbers are compared with numpy's."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

matplotlib = pytest.importorskip("matplotlib")

import data
import figures
from figures import main
from models import create_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments), "--out", "out", "--results", "results"])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def drawn(function, *arguments):
    """What a drawing function returns; its pictures are in out/."""
    with matplotlib.rc_context(figures.STYLE):
        numbers = function(*arguments)
    name = function.__name__
    assert Path(f"out/{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and "</svg>" in svg(name)
    return numbers


def results(**accuracies):
    """results/ of a pair: method -> its seeds' last accuracies. Two epochs, the first at half of the last."""
    Path("results/logs").mkdir(parents=True, exist_ok=True)
    for method, values in accuracies.items():
        method = method.replace("_", "-")
        for seed, top1 in enumerate(values):
            name = f"{method}-{seed}"
            rows = [{"epoch": e, "test_top1": top1 * e / 2, "ce": 4 / e + seed, "loss": 5} for e in (1, 2)]
            log = "\n".join(map(json.dumps, rows)).encode()
            Path(f"results/logs/{name}.jsonl.gz").write_bytes(gzip.compress(log))
            Path(f"results/{name}.json").write_text(json.dumps(
                {"teacher": None if method == "none" else "resnet56", "student": "resnet8", "method": method,
                 "seed": seed, "epochs": 2, "last": {"top1": top1}, "full_length": False,
                 "teacher_top1": 70.0, "recipe": {"train_images": 100, "data": "cifar100"}}))


def svg(name):
    return Path(f"out/{name}.svg").read_text()


def test_the_toy_case_is_the_papers_point():
    losses = drawn(figures.toy, Path("out"))
    wrong, right = zip(*(values.tolist() for values in losses.values()))
    assert wrong[0] < right[0] and wrong[1] > right[1] and right[1] == pytest.approx(0, abs=1e-12)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (figures.TOY["teacher"], figures.TOY["student 1"]))
    assert wrong[0] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert "student 1: class 1" in svg("toy") and "student 2: class 2" in svg("toy")
    call("toy")
    first = svg("toy")
    call("toy")
    assert svg("toy") == first      # equal pictures are equal files


def test_curves_show_every_seed():
    results(none=[20.0], kd=[30.0, 34.0], kd_z=[40.0])
    flags = {"pair": "resnet56-resnet8", "methods": "none,kd,kd-z,dkd", "results": Path("results"),
             "out": Path("out")}
    logs = drawn(figures.curves, flags)
    assert list(logs) == ["from scratch (n = 1)", "KD (n = 2)", "KD+Z (n = 1)"]
    assert logs["KD (n = 2)"].tolist() == [[[15, 4], [30, 2]], [[17, 5], [34, 3]]]
    call("curves", "--pair", "resnet56-resnet8")
    assert all(words in svg("curves") for words in ("KD (n = 2)", "KD+Z (n = 1)", "2 epochs on 100 images"))
    output = call("curves", "--pair", "resnet56-resnet8", "--methods", "ttm", code=1)
    assert "results has no distilled row of resnet56-resnet8 by ttm; python reproduce.py" in output
    record = json.loads(Path("results/kd-z-0.json").read_text())
    record["recipe"]["teacher_sha256"] = "another"
    Path("results/kd-z-0.json").write_text(json.dumps(record))
    assert "taught by different teachers" in call("curves", "--pair", "resnet56-resnet8", code=1)
    output = call("curves", "--pair", "resnet32x4-resnet8x4", code=1)
    assert "has no distilled row of resnet32x4-resnet8x4" in output


@pytest.fixture
def networks(folder, monkeypatch):
    """Untrained networks and 200 made test images; (the flags that name them, logits in numpy)."""
    split = data.Split(*(x[:200] for x in data.synthetic(200, 2)))
    monkeypatch.setattr(figures, "load_data", lambda *rest: data.Data(split, split, split, "test"))
    logits, images = {}, data.normalise(split.images)
    for i, (who, name) in enumerate((("teacher", "resnet14"), ("plain", "resnet8"), ("zscore", "resnet8"))):
        torch.manual_seed(i)
        network = create_model(name)
        facts = {"student": name, "method": "dkd", "zscore": who == "zscore"}
        facts |= {"entropy_temp": 3.0} if who == "zscore" else {}
        torch.save({"model": network.state_dict(), **facts}, f"{who}.pt")
        with torch.no_grad():
            logits[who] = network.eval()(images).double().numpy()
    return ["--pair", "resnet14-resnet8", "--teacher-checkpoint", "teacher.pt", "--plain", "plain.pt",
            "--zscore", "zscore.pt", "--device", "cpu"], logits, split.targets.numpy()


def test_the_histogram_says_the_standard_deviations(networks):
    flags, logits, _ = networks
    call("logits", *flags)
    for who, values in logits.items():
        assert f"deviation {values.std(1).mean():.2f}" in svg("logits")
    titles = "teacher resnet14", "resnet8, DKD", "resnet8, DKD+Z, EA"
    assert all(f"{title}:" in svg("logits") for title in titles)


def test_the_heat_map_is_the_mean_difference_of_each_class(networks):
    flags, logits, targets = networks
    call("difference", *flags)
    standard = {who: (v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True) for who, v in logits.items()}
    for values in (logits, standard):
        for who in ("plain", "zscore"):
            gaps = values["teacher"] - values[who]
            expected = np.abs(np.stack([gaps[targets == c].mean(0) for c in range(100)]))
            both = (torch.from_numpy(x).float() for x in (values["teacher"], values[who]))
            found = figures.class_gaps(*both, torch.from_numpy(targets))
            np.testing.assert_allclose(found, expected, atol=1e-4)
            assert f"mean {expected.mean():.2f}, maximum {expected.max():.2f}" in svg("difference")


def test_a_student_of_the_other_kind_is_refused(networks):
    flags, _, _ = networks
    Path("plain.pt").write_bytes(Path("zscore.pt").read_bytes())
    assert "plain.pt is of a run with zscore=True: exchange" in call("logits", *flags, code=1)


@pytest.mark.parametrize("arguments, code, words", [
    (["curves"], 2, "curves needs --pair"),
    (["logits", "--pair", "resnet56-resnet8"], 2, "logits needs --teacher-checkpoint, --plain, --zscore"),
    (["pie"], 2, "'pie' is not one of"),
    (["curves", "--pair", "resnet56"], 2, "give TEACHER-STUDENT"),
    (["difference", "--pair", "resnet56-resnet8", "--teacher-checkpoint", "none.pt", "--plain", "none.pt",
      "--zscore", "none.pt"], 1, "none.pt"),
])
def test_mistakes_are_said_in_one_line(arguments, code, words, monkeypatch):
    monkeypatch.setattr(figures, "load_data", lambda *rest: data.Data(None, None, None, "test"))
    output = call(*arguments, code=code)
    assert words in output and len(output.splitlines()) == 1 and not Path("out").exists()


def test_without_matplotlib_it_says_so(monkeypatch):
    monkeypatch.setattr(figures, "matplotlib", None)
    assert call("toy", code=1) == "Error: the pictures need matplotlib: pip install matplotlib\n"


def words(text):
    """The texts of an SVG file: titles, labels, ticks, numbers."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", text)


def test_the_kept_pictures_are_what_the_results_say():
    os.symlink(ROOT / "results", "results")
    call("toy", "curves", "--pair", "resnet56-resnet20")
    for name in ("toy", "curves"):
        kept = (ROOT / "figures" / f"{name}.svg").read_text()
        assert words(svg(name)) == words(kept), f"draw figures/{name} again"


TEXTS = [p.read_text(encoding="utf-8") for p in (ROOT / "README.md", ROOT / "NOTES.md") if p.exists()]


def test_the_numbers_in_the_text_are_the_pictures():
    said, = (x for text in TEXTS for x in text.split("\n\n") if "spread of logits" in " ".join(x.split()))
    drawn = "".join((ROOT / "figures" / f"{name}.svg").read_text() for name in ("logits", "difference"))
    found = re.findall(r"[0-9]+\.[0-9]+", said)
    assert len(found) == 5 and all(number in drawn for number in found), found


def test_the_text_shows_pictures_that_are_there():
    shown = re.findall(r"!\[[^\]]*\]\((figures/[^)]*)\)", "\n".join(TEXTS))
    assert {f"figures/{name}.png" for name in ("logits", "difference", "curves")} <= set(shown)
    for name in shown:
        assert min((ROOT / name).with_suffix(end).stat().st_size for end in (".png", ".svg")) > 1000
