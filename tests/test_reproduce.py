"""reproduce.py: rows are run once, results say what was run, and the README's tables say what the results say."""

import gzip
import json
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import data
import recipes
import reproduce
import run as runs
import teacher
import train_cifar
from models import create_model, load_weights
from reproduce import BEGIN, END, Row, main, rows_of, tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "results").glob("*.json"))
SMALL = ["--pairs", "resnet14-resnet8", "--teacher-checkpoint", "teacher.pt", "--data", "synthetic", "--train-images", "128",
         "--epochs", "2", "--device", "cpu", "--results", "results", "--readme", "README.md"]


# ---------------------------------------------------------------- what the repository says


def test_the_readmes_tables_are_what_the_results_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == tables(reproduce.load_records(ROOT / "results")).strip()


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_every_result_is_complete_and_has_its_log(path):
    record = json.loads(path.read_text())
    rows = [json.loads(line) for line in gzip.decompress((path.parent / "logs" / f"{path.stem}.jsonl.gz").read_bytes()).splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, record["epochs"] + 1))
    assert [rows[-1][f"test_{k}"] for k in ("top1", "top5")] == [record["last"][k] for k in ("top1", "top5")]
    assert max(row["test_top1"] for row in rows) == record["best"]["top1"] == rows[record["best"]["epoch"] - 1]["test_top1"]
    assert {"device", "torch", "python", "commit", "version"} <= set(record["facts"]) and record["minutes"] > 0
    # the command makes this very recipe
    words = shlex.split(record["command"])
    assert words[:2] == ["python", "train_cifar.py"]
    flags = train_cifar.main.make_context("train_cifar.py", words[2:]).params
    train_cifar.check_usage(flags)
    resolved, _ = train_cifar.resolve(flags | {"precision": record["recipe"]["precision"]}, torch.device("cpu"))
    expected = {k: v for k, v in record["recipe"].items() if k != "teacher_sha256"}
    assert json.loads(json.dumps(resolved | {"seed": flags["seed"]})) == expected


# ---------------------------------------------------------------- running


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder with a README, a teacher, and no network."""
    monkeypatch.chdir(tmp_path)
    for module in (teacher, train_cifar, reproduce):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (600, 200))
    monkeypatch.setitem(teacher.BATCH, "cpu", 48)
    monkeypatch.setenv("TEACHER_URL", "http://127.0.0.1:9/none.tar")
    Path("README.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    torch.manual_seed(5)
    torch.save(create_model("resnet14").state_dict(), "teacher.pt")
    return tmp_path


def call(*arguments, code=0, command=main):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def results():
    return {p.stem: json.loads(p.read_text()) for p in Path("results").glob("*.json")}


def test_rows_are_run_once_and_equal_their_commands_alone(small, monkeypatch):
    begun = []
    monkeypatch.setattr(train_cifar, "train", lambda recipe, *rest, real=train_cifar.train, **more: (
        begun.append((recipe["method"], recipe["zscore"], recipe["seed"])), real(recipe, *rest, **more))[1])
    call(*SMALL, "--methods", "none,kd,kd-z")
    assert begun == [("none", False, 0), ("kd", False, 0), ("kd", True, 0)]
    output = call(*SMALL, "--methods", "none,kd,kd-z,mlkd-z-released", "--seeds", 2)
    assert begun[3:] == [("mlkd", True, 0), ("none", False, 1), ("kd", False, 1), ("kd", True, 1), ("mlkd", True, 1)]
    assert output.count("top-1 on the test split") == 1         # one teacher for all rows
    found = results()
    assert len(found) == 8 and not found["resnet14-resnet8-mlkd-z-synthetic-seed1-released-2epochs-128images"]["recipe"]["zscore_relations"]

    record = found["resnet14-resnet8-kd-z-synthetic-seed1-2epochs-128images"]
    alone = shlex.split(record["command"])[2:]
    call(*alone, "--out", "alone", "--device", "cpu", command=train_cifar.main)
    ours = torch.load("runs/2epochs/128images/resnet14-resnet8-kd-z-synthetic-seed1/student.pt")["model"]
    theirs = torch.load("alone/resnet14-resnet8-kd-z-synthetic-seed1/student.pt")["model"]
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert json.loads(Path("alone/resnet14-resnet8-kd-z-synthetic-seed1/result.json").read_text())["last"] == record["last"]
    assert len(list(Path("runs/answers").iterdir())) == 1       # and one file of its answers

    readme = Path("README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "2 epochs on 128 training images of synthetic" in readme
    for path in Path("results").glob("*seed1*"):
        path.unlink()
    call("--table", "--results", "results", "--readme", "README.md")
    assert len(begun) == 9 and Path("README.md").read_text() != readme      # only the table, without those rows


def test_a_missing_teacher_is_trained_first(small):
    output = call("--pairs", "resnet14-resnet8", *SMALL[4:], "--methods", "kd")
    assert "training resnet14 here first" in output
    record, = results().values()
    assert record["teacher_source"].startswith("trained here, ") and "--teacher-checkpoint" not in record["command"]


def test_a_missing_teacher_of_cifar100_is_a_row_of_its_own_kept_in_float16(small, monkeypatch):
    """At full length whatever the students' budget, with result, card and weights; later rows find the same teacher."""
    monkeypatch.setattr(recipes, "EPOCHS", 1)
    made = data.load_data("synthetic", None, "cpu", train_images=128)
    for module in (train_cifar, reproduce):
        monkeypatch.setattr(module, "load_data", lambda *rest, **more: made)
    arguments = ["--pairs", "resnet14-resnet8", "--train-images", "128", *SMALL[8:]]
    call(*arguments, "--methods", "kd")
    call(*arguments, "--methods", "kd-z")
    found = results()
    own = found["resnet14-none-seed0"]
    assert own["full_length"] and own["teacher"] is None and json.loads(Path("checkpoints/resnet14.json").read_text())["last"] == own["last"]
    assert all(v.dtype != torch.float32 for v in torch.load("checkpoints/resnet14.pt")["model"].values())
    kd, z = (found[f"resnet14-resnet8-{m}-seed0-2epochs-128images"] for m in ("kd", "kd-z"))
    assert kd["teacher_source"].startswith("trained here, ") and z["teacher_source"] == "checkpoints/resnet14.pt"
    assert kd["recipe"]["teacher_sha256"] == z["recipe"]["teacher_sha256"]


def test_rows_wait_for_the_teacher_that_another_process_trains(small, monkeypatch):
    """And take no other one meanwhile: one table, one teacher."""
    monkeypatch.setattr(recipes, "EPOCHS", 1)
    made = data.load_data("synthetic", None, "cpu", train_images=128)
    for module in (train_cifar, reproduce):
        monkeypatch.setattr(module, "load_data", lambda *rest, **more: made)
    (small / "checkpoints" / "mdistiller").mkdir(parents=True)
    torch.save(create_model("resnet56").state_dict(), small / "checkpoints" / "mdistiller" / "resnet56.pth")
    other = runs.Run("runs/resnet56-none-seed0", {"made": "up"}, {})
    other.open()
    output = call("--pairs", "resnet56,resnet56-resnet8", "--methods", "kd", "--device", "cpu", "--results", "results", "--readme", "README.md")
    assert "in another process's hands: resnet56-none-seed0, resnet56-resnet8-kd-seed0" in output and not results()
    other.close()


def test_a_stop_costs_no_finished_row(small, monkeypatch):
    real = train_cifar.distil
    order = []

    def stopped(recipe, *rest):
        order.append(recipe["method"])
        if len(order) == 2:
            raise runs.Stopped("stopped, and saved")
        return real(recipe, *rest)

    monkeypatch.setattr(train_cifar, "distil", stopped)
    call(*SMALL, "--methods", "none,kd,dkd", code=1)
    assert order == ["none", "kd"] and list(results()) == ["resnet8-none-synthetic-seed0-2epochs-128images"]
    assert "| resnet8 | alone | " in Path("README.md").read_text()
    call(*SMALL, "--methods", "none,kd,dkd")
    assert order == ["none", "kd", "kd", "dkd"] and len(results()) == 3


def test_a_row_in_another_process_hands_is_left_to_it(small):
    recipe = {"made": "up"}
    other = runs.Run("runs/2epochs/128images/resnet14-resnet8-kd-synthetic-seed0", recipe, {})
    other.open()
    output = call(*SMALL, "--methods", "kd,dkd")
    assert "in another process's hands: resnet14-resnet8-kd-synthetic-seed0" in output and len(results()) == 1
    other.close()


def test_a_row_that_fails_does_not_stop_the_others(small, monkeypatch):
    real = train_cifar.distil
    monkeypatch.setattr(train_cifar, "distil", lambda recipe, *rest: real(recipe | ({"lr": 1e30} if recipe["method"] == "kd" else {}), *rest))
    output = call(*SMALL, "--methods", "kd,dkd", code=1)
    assert "1 of 2 rows could not be run: resnet14-resnet8-kd-synthetic-seed0-2epochs-128images" in output and len(results()) == 1


def test_a_result_of_another_recipe_or_teacher_is_not_taken_for_the_row(small):
    call(*SMALL, "--methods", "kd")
    assert "is of another recipe (precision was fp32, now bf16)" in call(*SMALL, "--methods", "kd", "--precision", "bf16", code=1)
    torch.manual_seed(6)
    torch.save(create_model("resnet14").state_dict(), "teacher.pt")
    assert "is of another recipe (teacher_sha256 was" in call(*SMALL, "--methods", "kd", code=1)


def test_a_damaged_teacher_fails_its_rows_alone(small):
    Path("teacher.pt").write_bytes(b"damaged")
    output = call(*SMALL, "--methods", "kd,none", code=1)
    assert "1 of 2 rows could not be run: resnet14-resnet8-kd-synthetic" in output and len(results()) == 1


def test_list_says_what_is_done(small):
    call(*SMALL, "--methods", "none")
    lines = call(*SMALL, "--methods", "none,kd", "--list").splitlines()
    assert [line.split() for line in lines] == [["done", "resnet8-none-synthetic-seed0-2epochs-128images"],
                                                ["resnet14-resnet8-kd-synthetic-seed0-2epochs-128images"]]


@pytest.mark.parametrize("arguments, words", [
    (["--pairs", "resnet65-resnet8"], "--pairs resnet65: no such network; known, the nearest first: resnet56"),
    (["--pairs", "resnet56-resnet20-resnet8"], "a pair is TEACHER-STUDENT"),
    (["--methods", "kdz"], "--methods kdz: known, the nearest first: kd"),
    (["--teacher-checkpoint", "teacher.pt"], "one teacher's"),
    (["--table", "--readme", "other.md"], "other.md has no place for the tables"),
    (["--table", "--readme", "none.md"], "none.md has no place for the tables"),
    (["--table", "--results", "damaged"], "damaged/row.json is not a row's result"),
])
def test_mistakes_are_said_in_one_line(small, arguments, words):
    Path("other.md").write_text("no marks")
    Path("damaged").mkdir()
    Path("damaged/row.json").write_text('{"last": 1}')
    output = call(*arguments, *([] if "--readme" in arguments else ["--readme", "README.md"]), code=2 if "--table" not in arguments else 1)
    assert words in output and len(output.splitlines()) == 1
    assert Path("README.md").read_text() == f"before\n{BEGIN}\n{END}\nafter\n"


# ---------------------------------------------------------------- the tables


def record(method, seed, top1, teacher="resnet32x4", student="resnet8x4", **more):
    found = Row(teacher, student, method).flags()
    recipe = {"data": "cifar100", "train_images": None, "seed": seed, "precision": "bf16", "method": found["method"], "compile": False,
              "teacher_sha256": "0123456789abcdef", "full_epochs": 240, "epochs": 240}
    return {"teacher": teacher, "student": student, "method": method, "seed": seed, "last": {"top1": top1}, "best": {"top1": top1 + 0.5},
            "epochs": 240, "minutes": 20.0, "full_length": True, "teacher_top1": 79.4, "teacher_source": "checkpoints/resnet32x4.pt",
            "facts": {"device": "H", "threads": 8}, "recipe": recipe,
            "command": f"python train_cifar.py --teacher {teacher} --method {found['method']} --seed {seed}"} | more


def line(text, start):
    return next([c.strip() for c in row.strip("|").split("|")] for row in text.splitlines() if row.startswith(start))


def test_a_tables_numbers_are_the_papers_words():
    """Mean and sample deviation of the last epoch, the best beside it; the gain of Z over the seeds that both have."""
    text = tables([record("kd", 0, 73.0), record("kd", 1, 74.0), record("kd-z", 0, 76.0), record("kd-z", 1, 76.2), record("kd-z", 2, 75.8)])
    assert "Full length, as in the papers: 2 of" in text and "<details>" not in text
    row = line(text, "| resnet32x4 → resnet8x4 | KD+Z |")
    assert row[2:9] == ["76.00 ± 0.20 (n = 3)", "76.50 ± 0.20 (n = 3)", "76.62", "76.28", "+2.60 ± 0.57 (n = 2)", "20.0", "H"]
    assert "Teacher resnet32x4: checkpoints/resnet32x4.pt, 79.40 %, SHA-256 of its weights 0123456789ab" in text
    row = line(text, "| resnet32x4 → resnet8x4 | KD |")
    assert row[2:7] == ["73.50 ± 0.71 (n = 2)", "74.00 ± 0.71 (n = 2)", "73.33", "", ""]


def test_a_row_that_was_not_run_is_empty_but_for_the_published_numbers():
    text = tables([])
    assert "<details>" in text
    assert line(text, "| resnet32x4 → resnet8x4 | DKD+Z |")[2:] == ["", "", "77.01", "76.93", "", "", "", ""]
    assert line(text, "| resnet32x4 | alone |")[2:] == ["", "", "79.42", "", "", "", "", ""]
    rows = rows_of([*reproduce.TEACHERS, *reproduce.PAIRS], reproduce.METHODS)
    assert text.count("\n| ") == len(rows) + 2 == len(set(rows)) + 2        # with the head and the rule


@pytest.mark.parametrize("key", ["teacher_sha256", "precision", "compile"])
def test_the_gain_of_z_is_of_rows_that_differ_in_nothing_else(key):
    plain, z = record("kd", 0, 73.0), record("kd-z", 0, 76.0)
    assert line(tables([plain, z]), "| resnet32x4 → resnet8x4 | KD+Z |")[6] == "+3.00 (n = 1)"
    z["recipe"][key] = "another"
    assert line(tables([plain, z]), "| resnet32x4 → resnet8x4 | KD+Z |")[6] == ""


def test_no_mean_over_different_recipes():
    with pytest.raises(runs.RunError, match="differ in precision"):
        other = record("kd", 1, 74.0)
        tables([record("kd", 0, 73.0), other | {"recipe": other["recipe"] | {"precision": "fp32"}}])


def test_the_default_rows_are_the_posters():
    poster = [("resnet32x4", "ShuffleV2"), ("resnet32x4", "wrn_16_2"), ("resnet32x4", "wrn_40_2"), ("wrn_40_2", "wrn_16_2"),
              ("resnet56", "resnet20"), ("resnet110", "resnet32"), ("resnet110", "resnet20")]
    assert reproduce.PAIRS == tuple(map("-".join, [("resnet32x4", "resnet8x4"), *poster]))
    assert all(tuple(pair.split("-")) in recipes.PAIRS for pair in reproduce.PAIRS)
    rows = rows_of(["resnet56-resnet20", "resnet110-resnet20"], ["none", "kd"])
    assert rows == [Row(None, "resnet20", "none"), Row("resnet56", "resnet20", "kd"), Row("resnet110", "resnet20", "kd")]


# ---------------------------------------------------------------- what is kept


def kept(small, monkeypatch, **more):
    """keep() of an untrained resnet8 with the accuracy that it has."""
    torch.manual_seed(1)
    network = create_model("resnet8")
    images = data.load_data("synthetic", None, "cpu", train_images=100)
    top1 = teacher.Teacher(network, "cpu").evaluate(images.test)["top1"]
    torch.save({"model": network.state_dict(), "student": "resnet8"}, small / "student.pt")
    made = record("none", 0, top1, None, "resnet8", best_chosen_on="test", **more)
    made["recipe"]["precision"] = "fp32"
    return reproduce.keep(Row(None, "resnet8", "none"), made, small, images, torch.device("cpu")), network


def test_a_kept_teacher_is_half_as_large_and_found_again(small, monkeypatch):
    said, network = kept(small, monkeypatch)
    path, source = teacher.find_teacher("resnet8", None, "http://127.0.0.1:9/none.tar")
    assert path == small / "checkpoints" / "resnet8.pt" and "kept" in said
    assert path.stat().st_size < 0.6 * (small / "student.pt").stat().st_size
    again = create_model("resnet8")
    load_weights(again, path)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-3, atol=1e-6)
    card = json.loads((small / "checkpoints" / "resnet8.json").read_text())
    assert {"command", "seed", "last", "facts", "float16_top1"} <= set(card)
    before = path.read_bytes()
    assert "stays" in kept(small, monkeypatch)[0] and path.read_bytes() == before


def test_what_is_too_large_or_loses_accuracy_leaves_its_card_alone(small, monkeypatch):
    monkeypatch.setattr(reproduce, "LARGEST", 1000)
    assert "only its card" in kept(small, monkeypatch)[0]
    monkeypatch.setattr(reproduce, "LARGEST", 16e6)
    answers = iter([50.0, 50.03])       # of float32, of float16
    monkeypatch.setattr(reproduce.Teacher, "evaluate", lambda *rest, real=reproduce.Teacher.evaluate: real(*rest) | {"top1": next(answers, 50.0)})
    assert "only its card" in kept(small, monkeypatch)[0]
    assert [p.name for p in (small / "checkpoints").iterdir()] == ["resnet8.json"]
