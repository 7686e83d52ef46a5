"""reproduce.py: rows are run once, results say what was run, and the tables say what the results say."""

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import data
import recipes
import reproduce
import run as runs
import teacher
import train_cifar
from checkpoints import load_weights, weights_sha256
from models import create_model
from reproduce import BEGIN, END, load_records, main, rows_of, tables

ROOT = Path(__file__).resolve().parent.parent
RECORDS = load_records(ROOT / "results")
PLACE = ["--device", "cpu", "--results", "results", "--readme", "RESULTS.md"]
SMALL = ["--pairs", "resnet14-resnet8", "--teacher-checkpoint", "teacher.pt", "--data", "synthetic",
         "--train-images", "128", "--epochs", "2", *PLACE]
CIFAR = ["--pairs", "resnet14-resnet8", "--train-images", "128", "--epochs", "2", *PLACE]


# ---------------------------------------------------------------- what the repository contains


def test_the_tables_are_what_the_results_say():
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == tables(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_every_result_is_complete_and_has_its_log(record):
    check_result(record, ROOT / "results")


def check_result(record, folder):
    log = gzip.decompress((folder / "logs" / f"{record['name']}.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in log.splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, record["epochs"] + 1))
    assert [rows[-1][f"test_{k}"] for k in ("top1", "top5")] == [record["last"][k] for k in ("top1", "top5")]
    best = rows[record["best"]["epoch"] - 1]["test_top1"]
    assert max(row["test_top1"] for row in rows) == record["best"]["top1"] == best
    assert {"device", "torch", "python", "commit", "version"} <= set(record["facts"])
    # the command makes this very recipe
    words = shlex.split(record["command"])
    assert words[:2] == ["python", "train_cifar.py"]
    recipe, _ = train_cifar.resolve_arguments([*words[2:], "--device", "cpu"])
    made = json.loads(json.dumps(reproduce.DEFAULTS | recipe))
    assert made == {k: v for k, v in record["recipe"].items() if k in made}
    assert record["recipe"].keys() - made.keys() <= {"teacher_sha256", "student_sha256"}
    assert record["losses"] == [row["loss"] for row in rows[:3]]


def test_the_table_of_z_and_its_weight_is_what_the_results_say():
    """RESULTS.md's first table and the README's two differences, with Student's t of the paired seeds."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8").split(BEGIN)[0]
    rows = re.findall(r"^\| (KD|KD\+Z) \((\d), ([\d.]+)\) \| (.*) \| (.*) \| (.*) \|$", text, re.M)
    assert len(rows) == 5

    def top1_of(method, tau, weight):
        values = {"teacher": "resnet20", "student": "resnet8", "epochs": 12, "train_images": 15_000,
                  "base_temp": float(tau), "kd_weight": float(weight), "method": "kd",
                  "zscore": method == "KD+Z"}
        found = {r["seed"]: r["last"]["top1"] for r in RECORDS if r["recipe"].items() >= values.items()}
        assert sorted(found) == [0, 1, 2, 3]
        return np.array([found[seed] for seed in range(4)])

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for *cell, mean, less_kd, less_same in rows:
        values = top1_of(*cell)
        assert mean == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
        for shown, other in ((less_kd, ("KD", 4, 0.9)), (less_same, ("KD", 2, 9))):
            if shown != "–":
                gains = values - top1_of(*other)
                spread = gains.std(ddof=1)
                assert shown == f"{gains.mean():+.2f} ± {spread:.2f}, t = {gains.mean() / spread * 2:.2f}"
                assert cell != ["KD+Z", "2", "9"] or f"{gains.mean():.2f} " in readme


def test_the_readmes_rows_are_the_results():
    """Last epoch in float32 and best epoch, the paper's number and the log's of each row of its table."""
    full = {recipes.display_name(r["method"]): r for r in RECORDS if r["full_length"]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| method | top-1, last epoch |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == len(full) == 4
    for method, *shown in (line.strip("| ").split(" | ") for line in table):
        record = full.get(method, full["from scratch"])
        names = [record["recipe"][k] for k in ("teacher", "student", "method", "zscore")]
        numbers = (record["float32"]["top1"], record["best"]["top1"], recipes.published(*names),
                   recipes.log_of(record["recipe"]).get("last"))
        assert shown == [f"{number:.2f}" if number else "–" for number in numbers]


def test_a_fresh_clones_list_never_fails_on_a_cpu(monkeypatch):
    """A row of another device or precision is another row. Older results have older names."""
    monkeypatch.setattr(runs.platform, "machine", lambda: "x86_64")
    output = call("--list", "--device", "cpu")
    assert "      resnet32x4-resnet8x4-kd-z-seed0\n" in output and "done" not in output
    assert "done" not in call("--list", "--device", "cpu", "--precision", "bf16")       # the H100's
    short = ("--list", "--device", "cpu", "--pairs", "resnet20-resnet8", "--methods", "kd,kd-z", "--seeds", 3,
             "--epochs", 12, "--train-images", 15000)
    assert call(*short).count("done  resnet20-resnet8-kd-") == 6
    assert "done" not in call(*short, "--precision", "bf16")


def test_the_default_rows_are_the_posters():
    poster = [("resnet32x4", "ShuffleV2"), ("resnet32x4", "wrn_16_2"), ("resnet32x4", "wrn_40_2"),
              ("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"), ("resnet110", "resnet32"),
              ("resnet110", "resnet20")]
    assert reproduce.PAIRS == tuple(map("-".join, [("resnet32x4", "resnet8x4"), *poster]))
    assert set(reproduce.PAIRS) <= set(recipes.TABLES["cifar100"]["published"])
    rows = rows_of(["resnet56-resnet20", "resnet110-resnet20"], ["none", "kd"])
    assert rows == [(None, "resnet20", "none"), *((t, "resnet20", "kd") for t in ("resnet56", "resnet110"))]


# ---------------------------------------------------------------- running


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder with a place for the tables, a teacher, and no network."""
    monkeypatch.chdir(tmp_path)
    for module in (teacher, reproduce):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "checkpoints", raising=False)
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (600, 200))
    monkeypatch.setitem(teacher.BATCH, "cpu", 48)
    monkeypatch.setenv("TEACHER_URL", "http://127.0.0.1:9/none.tar")
    Path("RESULTS.md").write_text(f"before\n{BEGIN}\nother tables\n{END}\nafter\n")
    save_teacher("teacher.pt", 5)
    yield tmp_path
    reproduce.sha256_of.cache_clear()


def save_teacher(path, seed, name="resnet14"):
    reproduce.sha256_of.cache_clear()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(create_model(name).state_dict(), path)


@pytest.fixture
def made(small, monkeypatch):
    """train_cifar.run without its training: the list of the methods and seeds that were begun."""
    begun = []

    def run(arguments):
        def option(name):
            return arguments[arguments.index(name) + 1] if name in arguments else None

        recipe, _ = train_cifar.resolve_arguments(arguments)
        begun.append(f"{recipes.method_name(recipe)} {recipe['seed']}")
        if recipe["teacher"]:
            file = option("--teacher-checkpoint") or teacher.local_teacher(recipe["teacher"])
            network = create_model(recipe["teacher"])
            load_weights(network, file)
            recipe = recipe | {"teacher_sha256": weights_sha256(network)}
        folder = Path(option("--out"), str(len(begun)))
        folder.mkdir(parents=True)
        facts = {"device": "x86_64 cpu", "threads": 1, "torch": "2", "python": "3", "commit": None,
                 "version": "0", "command": shlex.join(["train_cifar.py", *arguments])}
        (folder / "config.json").write_text(json.dumps({"recipe": recipe, "facts": facts}))
        rows = [{"epoch": epoch, "loss": 1.0, "test_top1": 10.0 + epoch, "test_top5": 50.0}
                for epoch in range(1, recipe["epochs"] + 1)]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        last = {"top1": 10.0 + recipe["epochs"], "top5": 50.0}
        torch.manual_seed(recipe["seed"])
        torch.save({"model": create_model(recipe["student"]).state_dict()}, folder / "student.pt")
        result = {"last": last, "best": last | {"epoch": recipe["epochs"]}, "best_chosen_on": "test",
                  "epochs": recipe["epochs"], "minutes": 1.0, "img_s": 1000.0}
        (folder / "result.json").write_text(json.dumps(result))
        return recipe, result, folder, None

    monkeypatch.setattr(train_cifar, "run", run)
    monkeypatch.setattr(reproduce, "load_data", lambda *rest: data.load_data("synthetic", None, "cpu",
                                                                             train_images=100))
    return begun


def call(*arguments, code=0, command=main):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_rows_equal_their_commands_alone(small):
    """The one test here that trains."""
    output = call(*SMALL, "--methods", "kd-z", "--seed", 1)
    assert output.count("top-1 on the test images") == 1
    record, = load_records(Path("results"))
    digits = record["recipe"]["teacher_sha256"][:6]
    name = f"resnet14@{digits}-resnet8-kd-z-2epochs-128images-synthetic-seed1-"
    assert record["name"].startswith(name) and record["name"].endswith("-cpu")
    check_result(record, Path("results"))
    assert record["teacher_report"]["images"] == 128
    assert "on 128 training views" in Path("RESULTS.md").read_text()

    call(*shlex.split(record["command"])[2:], "--out", "alone", "--device", "cpu", command=train_cifar.main)
    ours, theirs = (torch.load(next(Path(out).rglob("student.pt")))["model"] for out in ("runs", "alone"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert json.loads(next(Path("alone").rglob("result.json")).read_text())["last"] == record["last"]


def test_rows_are_run_once(made):
    call(*SMALL, "--methods", "none,kd,kd-z")
    assert made == ["none 0", "kd 0", "kd-z 0"]
    assert "done already" in call(*SMALL, "--methods", "none")
    call(*SMALL, "--methods", "kd,kd-z,mlkd-z-released", "--seeds", 2)
    assert made[3:] == ["mlkd-z 0", "kd 1", "kd-z 1", "mlkd-z 1"]
    released, = [r for r in load_records(Path("results")) if r["method"] == "mlkd-z-released" and r["seed"]]
    assert not released["recipe"]["zscore_relations"] and "--recipe released" in released["command"]
    assert "-mlkd-z-2epochs-128images-released-synthetic-seed1" in released["name"]

    lines = call(*SMALL, "--methods", "none,dkd", "--list").splitlines()
    assert [line.split()[0] for line in lines][0] == "done" and lines[1].startswith("      resnet14@")
    text = Path("RESULTS.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "other tables" not in text
    assert "2 epochs on 128 training images of synthetic, 7 runs" in text
    for path in Path("results").glob("*seed1*"):
        path.unlink()
    call("--table", *PLACE[2:])
    assert len(made) == 7 and Path("RESULTS.md").read_text() != text        # the table, without those rows


def test_a_row_of_another_precision_or_teacher_is_another_row(made):
    """Of the same table. An older result of the same recipe is the row whatever its name is."""
    call(*SMALL, "--methods", "kd")
    save_teacher("teacher.pt", 6)
    call(*SMALL, "--methods", "kd")
    call(*SMALL, "--methods", "kd", "--precision", "bf16")
    assert len(made) == len(load_records(Path("results"))) == 3
    path = next(Path("results").glob("*bf16*.json"))
    record = json.loads(path.read_text())
    for key in ("compile", "exact_teacher", "deterministic", "val_from_train"):     # older ones lack these
        record["recipe"].pop(key, None)
    path.unlink()
    Path("results/older.json").write_text(json.dumps(record))
    call(*SMALL, "--methods", "kd", "--precision", "bf16")
    assert len(made) == 3
    text = Path("RESULTS.md").read_text()
    assert text.count("- Teacher resnet14@") == 2 and text.count("→ resnet8 | KD |") == 3


def test_a_row_of_another_teacher_than_the_local_file_is_not_done(made):
    save_teacher("checkpoints/resnet14.pt", 1)
    call(*CIFAR, "--methods", "kd")
    assert call(*CIFAR, "--methods", "kd", "--list").startswith("done")
    save_teacher("checkpoints/resnet14.pt", 2)
    assert not call(*CIFAR, "--methods", "kd", "--list").startswith("done")
    call(*CIFAR, "--methods", "kd")
    assert len(made) == len(load_records(Path("results"))) == 2
    Path("checkpoints/resnet14.pt").unlink()       # which teacher it will be is not known
    assert not call(*CIFAR, "--methods", "kd", "--list").startswith("done")


def test_a_row_that_fails_or_is_stopped_costs_no_other(made, monkeypatch):
    real, before = train_cifar.run, Path("RESULTS.md").read_text()

    def failing(arguments):
        if "dkd" in arguments:
            raise error
        return real(arguments)

    monkeypatch.setattr(train_cifar, "run", failing)
    error = ValueError("the loss became nan\nand more")
    assert "1 of 1 rows could not be run" in call(*SMALL, "--methods", "dkd", code=1)
    assert Path("RESULTS.md").read_text() == before         # written when a row came only
    output = call(*SMALL, "--methods", "dkd,kd", code=1)
    assert "-seed0: the loss became nan\n" in output and "1 of 2 rows" in output and made == ["kd 0"]
    error = runs.Stopped("stopped, and saved")
    call(*SMALL, "--methods", "none,dkd,wttm", code=1)
    assert made == ["kd 0", "none 0"] and "| resnet8 | from scratch | " in Path("RESULTS.md").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["--pairs", "resnet65-resnet8"], "resnet65: no such network"),
    (["--methods", "kdz"], "--methods kdz: known are kd, kd-z"),
    (["--table", "--readme", "other.md"], "other.md has no place for the tables"),
    (["--table", "--readme", "none.md"], "none.md has no place for the tables"),
    (["--table", "--results", "damaged"], "damaged/row.json is not a row's result"),
])
def test_mistakes_are_said_in_one_line(small, arguments, words):
    Path("other.md").write_text("no marks")
    Path("damaged").mkdir()
    Path("damaged/row.json").write_text('{"last": 1}')
    before = Path("RESULTS.md").read_text()
    more = [] if "--readme" in arguments else ["--readme", "RESULTS.md"]
    output = call(*arguments, *more, code=1 if "--table" in arguments else 2)
    assert words in output and len(output.splitlines()) == 1 and Path("RESULTS.md").read_text() == before


# ---------------------------------------------------------------- finished runs


def finished_run(folder, teacher="a" * 64, **more):
    """A run of commit 4db765c, whose recipes lack the newer keys."""
    recipe = {"teacher": "resnet20", "student": "resnet8", "method": "kd", "zscore": False, "lr": 0.05,
              "epochs": 12, "stages": [150, 180, 210], "batch_size": 64, "momentum": 0.9,
              "weight_decay": 0.0005, "base_temp": 2.0, "kd_weight": 9.0, "ce_weight": 0.1,
              "full_epochs": 240, "precision": "fp32", "deterministic": False, "compile": False,
              "val_from_train": 0, "seed": 1,
              "data": "cifar100", "train_images": None, "exact_teacher": False, "teacher_sha256": teacher}
    facts = {"version": "0.6", "python": "3.11.7", "torch": "2.14.1+cu130", "device": "x86_64 cpu",
             "threads": 1, "commit": "4db765c7d66b", "processes": 1,
             "command": "train_cifar.py --teacher-checkpoint /some/where/resnet20.pt --out /else/where"}
    result = {"last": {"top1": 49.66, "top5": 80.82}, "best": {"top1": 49.66, "top5": 80.79, "epoch": 12},
              "best_chosen_on": "test", "epochs": 12, "minutes": 69.8, "img_s": 143.1, "parameters": 83892}
    rows = [{"epoch": i, "loss": 9.0 - i, "test_top1": 37.66 + i, "test_top5": 80.82} for i in range(1, 13)]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"recipe": recipe | more, "facts": facts}))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_finished_runs_are_added_by_what_they_are_never_by_their_folders_names(small):
    place = PLACE[2:]
    one = finished_run(Path("any name"))
    output = call("--add", one, *place)
    name = "resnet20@aaaaaa-resnet8-kd-tau2-kd9-12epochs-seed1-x86_64-cpu"
    assert f"added as {name}" in output
    record, = load_records(Path("results"))
    check_result(record, Path("results"))
    assert record["name"] == name and "minutes" not in record and record["losses"] == [8.0, 7.0, 6.0]
    assert record["command"] == (       # no folder of this machine
        "python train_cifar.py --teacher resnet20 --student resnet8 --method kd --seed 1 --base-temp 2.0 "
        "--kd-weight 9.0 --epochs 12 --precision fp32 --teacher-checkpoint resnet20.pt")
    assert "is there already" in call("--add", one, *place)
    call("--add", finished_run(Path("2"), "b" * 64), finished_run(Path("3"), precision="bf16"), *place)
    text = Path("RESULTS.md").read_text()
    assert text.count("→ resnet8 | KD, tau2, kd9 |") == 3 and len(load_records(Path("results"))) == 3


def test_a_run_that_is_not_finished_is_no_row(small):
    run = finished_run(Path("run"))
    (run / "result.json").unlink()
    before = Path("RESULTS.md").read_text()
    output = call("--add", run, *PLACE[2:], code=1)
    assert "run is not a finished run of train_cifar.py" in output
    assert Path("RESULTS.md").read_text() == before
    assert "--add takes the folders" in call(run, code=2) and "--add takes" in call("--add", code=2)


# ---------------------------------------------------------------- the tables


def record(method, seed, top1, teacher="resnet32x4", student="resnet8x4", full=True, **more):
    name = method.split("-")[0]
    recipe = {"data": "cifar100", "train_images": None, "seed": seed, "precision": "bf16", "method": name,
              "teacher": teacher, "student": student, "zscore": "-z" in method, "feature": None,
              "compile": False, "full_epochs": 240, "epochs": 240 if full else 12}
    usual = recipes.recipe(teacher, student, name, recipe["zscore"])
    recipe |= {k: usual[k] for k in ("base_temp", "kd_weight", "ce_weight")}
    recipe |= {"teacher_sha256": "0123456789abcdef"} if teacher else {}
    return {"teacher": teacher, "student": student, "method": method, "seed": seed, "last": {"top1": top1},
            "best": {"top1": top1 + 0.5}, "epochs": recipe["epochs"], "minutes": 20.0, "full_length": full,
            "losses": [15.0, 12.0, 10.0], "teacher_top1": teacher and 79.4,
            "facts": {"device": "H", "threads": 8, "torch": "2.11.0+cu130"}, "recipe": recipe,
            "command": f"python train_cifar.py --teacher {teacher} --method {name} --seed {seed}"} | more


def cells(text, method, pair="resnet32x4@012345 → resnet8x4"):
    """Column -> cell of a method's row."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line] for line in lines]
    row, = [row for row in rows if row[:2] == [pair, method]]
    return dict(zip(rows[0], row))


def test_a_tables_numbers_are_the_papers_words():
    """Mean and sample deviation of the last epoch, the best with it; the gain of Z over common seeds."""
    text = tables([record("kd", 0, 73.0), record("kd", 1, 74.0), record("kd-z", 0, 76.0),
                   record("kd-z", 1, 76.2), record("kd-z", 2, 75.8)])
    assert "Full length, as in the papers: 2 rows" in text and reproduce.RULE in text
    assert cells(text, "KD+Z") == {
        "pair": "resnet32x4@012345 → resnet8x4", "method": "KD+Z",
        "last epoch, top-1": "76.00 ± 0.20 (n = 3)",
        "best, chosen on test": "76.50 ± 0.20 (n = 3)", "paper": "76.62", "authors' log, last epoch": "76.28",
        "Δ of Z": "+3.00, +2.20", "paper's Δ": "+3.29", "loss of epoch 1": "15.00",
        "authors' log, epoch 1": "15.83", "minutes": "20.0", "device": "H, threads: 8, torch 2.11.0, bf16",
        "`python train_cifar.py`, with `--seed`": "`--teacher resnet32x4 --method kd`"}
    assert "Teacher resnet32x4@012345 (SHA-256 of its weights: 0123456789ab): 79.40 % of the test" in text
    row = cells(text, "KD")
    assert [row[k] for k in ("last epoch, top-1", "paper", "Δ of Z", "paper's Δ")] == [
        "73.00, 74.00", "73.33", "–", "–"]


def test_a_table_has_no_row_and_no_column_that_says_nothing():
    assert tables([]) == ""
    text = tables([record("none", 0, 72.0, None, "resnet8x4")])
    assert text.count("\n| ") == 3 and "Δ" not in text and "log" not in text and "paper |" in text
    assert cells(text, "from scratch", "resnet8x4")["paper"] == "72.50"
    assert "paper |" not in tables([record("kd", 0, 50.0, student="resnet8")])


@pytest.mark.parametrize("gains, word", [
    ([1.0], ""), ([1.0, 1.1], ""),
    ([1.0, 1.2, 0.8], ", better"),          # 0.2 / sqrt(3) * 4.303 = 0.50
    ([-1.0, -1.2, -0.8], ", worse"),
    ([0.6, 1.0, 1.45], ", within noise"),   # t = 4.14: between 3.182, three degrees of freedom, and 4.303
    ([1.0, 1.8, 0.2], ", within noise"),    # 1.99
    ([0.1] * 11 + [0.1001], ", better"),    # more seeds than the table has
])
def test_a_verdict_is_students_t_of_paired_differences(gains, word):
    records = [record(m, seed, 70.0 + seed + gain) for seed, gain in enumerate(gains)
               for m, gain in (("kd", 0.0), ("kd-z", gain))]
    n = {1: "+1.00 (one seed)", 2: "+1.00, +1.10"}.get(len(gains), f"(n = {len(gains)}){word}")
    assert cells(tables(records), "KD+Z")["Δ of Z"].endswith(n)


def test_rows_that_differ_in_more_than_the_seed_are_not_averaged_and_not_compared():
    plain, other = record("kd", 0, 73.0), record("kd", 1, 74.0)
    assert "73.00, 74.00" in tables([plain, other])
    for change in ({"precision": "fp32"}, {"teacher_sha256": "a" * 12}, {"kd_weight": 9.0}):
        changed = other | {"recipe": other["recipe"] | change}
        assert "2 rows" in tables([plain, changed])
        z = record("kd-z", 0, 76.0)
        assert cells(tables([plain, z]), "KD+Z")["Δ of Z"] == "+3.00 (one seed)"
        assert "Δ of Z" not in tables([plain | {"recipe": plain["recipe"] | change}, z])
    elsewhere = other | {"facts": other["facts"] | {"device": "another"}}
    assert "2 rows" in tables([plain, elsewhere])


def test_z_is_compared_with_the_same_temperature_and_weight_too():
    """KD is published with weight 0.9, KD+Z with 9: their difference holds both."""
    same = record("kd", 0, 75.0)
    same["recipe"] |= {"base_temp": 2.0, "kd_weight": 9.0}
    row = cells(tables([record("kd", 0, 73.0), same, record("kd-z", 0, 76.0)]), "KD+Z")
    assert row["Δ of Z"] == "+3.00 (one seed)"
    assert row["Δ of Z, same temperature and weight"] == "+1.00 (one seed)"
    row = cells(tables([same]), "KD, tau2, kd9")
    assert row["last epoch, top-1"] == "75.00 (one seed)" and "paper" not in row


def test_a_table_begins_with_what_its_teachers_are():
    report = {"test_top1": 72.61, "images": 10_000, "train_top1": 99.8, "train_ce": 0.0284, "logit_std": 3.58,
              "uniform_loss": 8.46}
    text = tables([record("kd-z", 0, 76.0, teacher_report=report), record("kd", 0, 73.0)])
    assert ("72.61 % of the test images; on 10,000 training views 99.80 %, cross-entropy 0.028, standard "
            "deviation of the logits 3.58; a uniform student's distillation loss: KD+Z 8.46\n") in text


def test_the_last_epoch_of_full_length_rows_is_that_of_the_kept_students_in_float32():
    kd, z = (record(m, 0, top1, float32={"top1": top1 + 0.2}) for m, top1 in (("kd", 73.0), ("kd-z", 76.0)))
    row = cells(tables([kd, z]), "KD+Z")
    assert row["last epoch, top-1"] == "76.20 (one seed)"
    assert row["best, chosen on test"] == "76.50 (one seed)"
    assert reproduce.FLOAT32 in tables([kd, z]) and reproduce.FLOAT32 not in tables([record("kd", 0, 73.0)])


# ---------------------------------------------------------------- what is kept


def test_a_teachers_row_is_kept_in_float16_with_its_card_and_found_again(made, monkeypatch):
    monkeypatch.setitem(reproduce.KEPT, "resnet8-none-seed0", "resnet8")
    place = ["--pairs", "resnet8", *PLACE]
    assert ": kept, " in call(*place)
    path, source = teacher.find_teacher("resnet8", "http://127.0.0.1:9/none.tar")
    assert source == "checkpoints/resnet8.pt"
    saved = torch.load(path)["model"]
    assert {v.dtype for v in saved.values()} == {torch.float16, torch.int64}
    own = torch.load("runs/1/student.pt")["model"]
    torch.testing.assert_close(saved, own, rtol=1e-3, atol=1e-6, check_dtype=False)
    card = json.loads(path.with_suffix(".json").read_text())
    assert {"command", "seed", "last", "facts", "float16_top1", "float32_top1"} <= set(card)
    before = path.read_bytes()
    next(Path("results").glob("*.json")).unlink()
    assert "is there already and stays" in call(*place) and path.read_bytes() == before


def test_a_student_that_float16_moves_is_kept_in_float32(small, monkeypatch):
    """A teacher that was trained for the next rows is never replaced by a published one."""
    torch.save({"model": create_model("resnet8").state_dict(), "seed": 3}, "student.pt")
    images = data.load_data("synthetic", None, "cpu", train_images=100)
    made = record("none", 0, 1.0, None, "resnet8", best_chosen_on="test")
    top1 = iter([50.0, 50.03])      # of float32, of float16
    monkeypatch.setattr(reproduce, "evaluate", lambda *rest: {"top1": next(top1)})
    path = Path("checkpoints/resnet8.pt")
    assert "50.03 % in float16" in reproduce.keep(path, made, small, images, torch.device("cpu"))
    saved = torch.load(path)
    assert saved["model"]["fc.weight"].dtype == torch.float32 and saved["seed"] == 3    # export.py needs it
