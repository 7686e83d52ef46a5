"""reproduce.py: rows are run once, results say what was run, and the tables say what the results say."""

import gzip
import json
import shlex
import shutil
import types
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
from checkpoints import load_weights, weights_sha256
from models import create_model
from reproduce import BEGIN, END, Row, differences, load_records, main, rows_of, tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "results").glob("*.json"))
PLACE = ["--device", "cpu", "--results", "results", "--readme", "RESULTS.md"]
SMALL = ["--pairs", "resnet14-resnet8", "--teacher-checkpoint", "teacher.pt", "--data", "synthetic",
         "--train-images", "128", "--epochs", "2", *PLACE]
CIFAR = ["--pairs", "resnet14-resnet8", "--train-images", "128", "--epochs", "2", *PLACE]
BUDGET = "2epochs-128images"


# ---------------------------------------------------------------- what the repository says


def test_the_tables_are_what_the_results_say():
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == tables(load_records(ROOT / "results"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_every_result_is_complete_and_has_its_log(path):
    check_result(path)


def check_result(path):
    record = reproduce.load_record(path)
    log = gzip.decompress((path.parent / "logs" / f"{path.stem}.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in log.splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, record["epochs"] + 1))
    assert [rows[-1][f"test_{k}"] for k in ("top1", "top5")] == [record["last"][k] for k in ("top1", "top5")]
    best = rows[record["best"]["epoch"] - 1]["test_top1"]
    assert max(row["test_top1"] for row in rows) == record["best"]["top1"] == best
    assert {"device", "torch", "python", "commit", "version"} <= set(record["facts"])
    assert record["minutes"] > 0
    # the command makes this very recipe
    words = shlex.split(record["command"])
    assert words[:2] == ["python", "train_cifar.py"]
    recipe, _ = train_cifar.resolve_arguments([*words[2:], "--device", "cpu"])
    assert differences(record["recipe"], recipe, ("teacher_sha256",)) == []


# ---------------------------------------------------------------- running


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder with a place for the tables, a teacher, and no network."""
    monkeypatch.chdir(tmp_path)
    for module in (teacher, train_cifar, reproduce):
        monkeypatch.setattr(module, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(data, "SYNTHETIC_SIZES", (600, 200))
    monkeypatch.setitem(teacher.BATCH, "cpu", 48)
    monkeypatch.setenv("TEACHER_URL", "http://127.0.0.1:9/none.tar")
    Path("RESULTS.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    save_teacher("teacher.pt", 5)
    return tmp_path


def save_teacher(path, seed, name="resnet14"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(create_model(name).state_dict(), path)


def option(words, name):
    return words[words.index(name) + 1] if name in words else None


@pytest.fixture
def made(small, monkeypatch):
    """train_cifar.run without its training: the list of the runs that were begun, by name and seed."""
    begun = []

    def run(arguments, shared=None):
        recipe, name = train_cifar.resolve_arguments(arguments)
        begun.append(name)
        taught = None
        if recipe["teacher"]:
            file, source = teacher.find_teacher(recipe["teacher"], option(arguments, "--teacher-checkpoint"))
            network = create_model(recipe["teacher"])
            load_weights(network, file)
            taught = types.SimpleNamespace(name=recipe["teacher"], source=source, top1=50.0,
                                           sha256=weights_sha256(network))
            recipe = recipe | {"teacher_sha256": taught.sha256}
        folder = Path(option(arguments, "--out"), name)
        one = runs.Run(folder, recipe, {"device": "x86_64 cpu", "threads": 1, "torch": "2", "python": "3",
                                        "commit": None, "version": "0", "command": "c"})
        try:
            one.open()
            for epoch in range(1, recipe["epochs"] + 1):
                one.log({"epoch": epoch, "test_top1": 10.0 + epoch, "test_top5": 50.0})
            last = {"top1": 10.0 + recipe["epochs"], "top5": 50.0}
            result = {"last": last, "best": last | {"epoch": recipe["epochs"]}, "best_chosen_on": "test",
                      "epochs": recipe["epochs"], "minutes": 1.0, "img_s": 1000.0}
            torch.manual_seed(recipe["seed"])
            one.finish(result, {"model": create_model(recipe["student"]).state_dict()})
        finally:
            one.close()
        return recipe, result, folder, taught

    monkeypatch.setattr(train_cifar, "run", run)
    monkeypatch.setattr(reproduce, "load_data", lambda *rest: data.load_data("synthetic", None, "cpu",
                                                                             train_images=100))
    return begun


def call(*arguments, code=0, command=main):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def results():
    return {p.stem: json.loads(p.read_text()) for p in Path("results").glob("*.json")}


def test_rows_equal_their_commands_alone(small):
    """The one test here that trains."""
    output = call(*SMALL, "--methods", "kd-z", "--seed", 1)
    assert output.count("top-1 on the test split") == 1
    name = f"resnet14-resnet8-kd-z-synthetic-seed1-{BUDGET}"
    assert list(results()) == [name]
    check_result(Path("results", f"{name}.json"))
    record = results()[name]
    assert 0 <= record["teacher_top1"] <= 100 and record["teacher_source"] == "teacher.pt"

    call(*shlex.split(record["command"])[2:], "--out", "alone", "--device", "cpu", command=train_cifar.main)
    folder = "resnet14-resnet8-kd-z-synthetic-seed1"
    ours = torch.load(f"runs/2epochs/128images/{folder}/student.pt")["model"]
    theirs = torch.load(f"alone/{folder}/student.pt")["model"]
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert json.loads(Path("alone", folder, "result.json").read_text())["last"] == record["last"]


def test_rows_are_run_once(made):
    call(*SMALL, "--methods", "none,kd,kd-z")
    name = "resnet14-resnet8-{}-synthetic-seed{}"
    assert made == ["resnet8-none-synthetic-seed0", name.format("kd", 0), name.format("kd-z", 0)]
    call(*SMALL, "--methods", "kd,kd-z,mlkd-z-released", "--seeds", 2)
    assert made[3:] == [name.format(m, s) for m, s in (("mlkd-z", 0), ("kd", 1), ("kd-z", 1), ("mlkd-z", 1))]
    released = results()[f"resnet14-resnet8-mlkd-z-synthetic-seed1-released-{BUDGET}"]
    assert not released["recipe"]["zscore_relations"] and "--recipe released" in released["command"]
    assert Path("runs/released/2epochs/128images").is_dir()

    text = Path("RESULTS.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "2 epochs on 128 training images of synthetic" in text
    for path in Path("results").glob("*seed1*"):
        path.unlink()
    call("--table", *PLACE[2:])
    assert len(made) == 7 and Path("RESULTS.md").read_text() != text        # the table, without those rows


def test_a_missing_teacher_is_a_row_of_its_own_kept_in_float16(made):
    """At full length whatever the students' budget, with result, card and weights; later rows find it."""
    output = call(*CIFAR, "--methods", "kd")
    call(*CIFAR, "--methods", "kd-z")
    assert "training resnet14 here first" in output
    found = results()
    own = found["resnet14-none-seed0"]
    assert own["full_length"] and own["teacher"] is None
    assert json.loads(Path("checkpoints/resnet14.json").read_text())["last"] == own["last"]
    assert all(v.dtype != torch.float32 for v in torch.load("checkpoints/resnet14.pt")["model"].values())
    kd, z = (found[f"resnet14-resnet8-{m}-seed0-{BUDGET}"] for m in ("kd", "kd-z"))
    assert kd["teacher_source"] == z["teacher_source"] == "checkpoints/resnet14.pt"
    assert kd["recipe"]["teacher_sha256"] == z["recipe"]["teacher_sha256"]
    assert "--teacher-checkpoint" not in kd["command"]


def test_a_teacher_too_large_to_keep_stays_in_its_runs_folder(made, monkeypatch):
    monkeypatch.setattr(reproduce, "LARGEST", 1000)
    call(*CIFAR, "--methods", "kd")
    record = results()[f"resnet14-resnet8-kd-seed0-{BUDGET}"]
    assert record["teacher_source"] == "runs/resnet14-none-seed0/student.pt"
    assert "--teacher-checkpoint runs/resnet14-none-seed0/student.pt" in record["command"]
    assert [p.name for p in Path("checkpoints").iterdir()] == ["resnet14.json"]
    shutil.rmtree("runs")       # its result is there, its weights are not
    call(*CIFAR, "--methods", "kd-z")
    assert made.count("resnet14-none-seed0") == 2 and len(results()) == 3


def test_rows_wait_for_the_teacher_that_another_process_trains(made):
    """And take no other one meanwhile: one table, one teacher."""
    save_teacher("checkpoints/mdistiller/resnet56.pth", 1, "resnet56")
    other = runs.Run("runs/resnet56-none-seed0", {"made": "up"}, {})
    other.open()
    output = call("--pairs", "resnet56,resnet56-resnet8", "--methods", "kd", *PLACE)
    waiting = "in another process's hands: resnet56-none-seed0, resnet56-resnet8-kd-seed0"
    assert waiting in output and not results()
    other.close()


def test_rows_of_one_table_are_not_taught_by_two_teachers(made):
    save_teacher("checkpoints/resnet14.pt", 1)
    call(*CIFAR, "--methods", "kd")
    save_teacher("checkpoints/resnet14.pt", 2)
    before = list(made)
    output = call(*CIFAR, "--methods", "kd-z", code=1)
    assert "results has rows taught by another resnet14 (checkpoints/resnet14.pt)" in output
    assert made == before
    call(*CIFAR, "--methods", "kd-z", "--epochs", 3)        # a table of its own


def test_a_stop_costs_no_finished_row(made, monkeypatch):
    real, order = train_cifar.run, []

    def stopped(arguments, shared):
        order.append(option(arguments, "--method"))
        if len(order) == 2:
            raise runs.Stopped("stopped, and saved")
        return real(arguments, shared)

    monkeypatch.setattr(train_cifar, "run", stopped)
    call(*SMALL, "--methods", "none,kd,dkd", code=1)
    assert order == ["none", "kd"] and list(results()) == [f"resnet8-none-synthetic-seed0-{BUDGET}"]
    assert "| resnet8 | alone | " in Path("RESULTS.md").read_text()
    call(*SMALL, "--methods", "none,kd,dkd")
    assert order == ["none", "kd", "kd", "dkd"] and len(results()) == 3


def test_a_row_in_another_process_hands_is_left_to_it(made):
    """And tried once more when another row was finished meanwhile."""
    name = "resnet14-resnet8-kd-synthetic-seed0"
    other = runs.Run(f"runs/2epochs/128images/{name}", {"made": "up"}, {})
    other.open()
    output = call(*SMALL, "--methods", "kd,dkd")
    assert f"in another process's hands: {name}" in output and len(results()) == 1
    assert made.count(name) == 2
    call(*SMALL, "--methods", "kd,dkd")
    assert made.count(name) == 3        # nothing else to wait for
    other.close()


def test_a_row_that_fails_does_not_stop_the_others(made, monkeypatch):
    real = train_cifar.run

    def failing(arguments, shared):
        if option(arguments, "--method") == "kd":
            raise runs.RunError("the loss became nan\nand more")
        return real(arguments, shared)

    monkeypatch.setattr(train_cifar, "run", failing)
    output = call(*SMALL, "--methods", "kd,dkd", code=1)
    name = f"resnet14-resnet8-kd-synthetic-seed0-{BUDGET}"
    assert f"{name}: the loss became nan\n" in output
    assert f"1 of 2 rows could not be run: {name}" in output and len(results()) == 1


def test_a_result_of_another_recipe_or_teacher_is_not_taken_for_the_row(made):
    call(*SMALL, "--methods", "kd")
    output = call(*SMALL, "--methods", "kd", "--precision", "bf16", code=1)
    assert "is of another recipe (precision was fp32, now bf16)" in output
    save_teacher("teacher.pt", 6)
    assert "is of another recipe (teacher_sha256 was" in call(*SMALL, "--methods", "kd", code=1)


def test_a_result_that_does_not_say_what_was_new_since_is_the_row(made):
    call(*SMALL, "--methods", "kd")
    path, = Path("results").glob("*.json")
    record = json.loads(path.read_text())
    for key in ("compile", "exact_teacher", "deterministic", "val_from_train"):
        record["recipe"].pop(key, None)
    path.write_text(json.dumps(record))
    call(*SMALL, "--methods", "kd")
    assert len(made) == 1
    assert "compile was False, now True" in call(*SMALL, "--methods", "kd", "--compile", code=1)


def test_a_damaged_teacher_fails_its_rows_alone(made):
    Path("teacher.pt").write_bytes(b"damaged")
    output = call(*SMALL, "--methods", "kd,none", code=1)
    assert "1 of 2 rows could not be run: resnet14-resnet8-kd-synthetic" in output and len(results()) == 1


def test_a_row_of_another_teacher_than_the_local_file_is_not_done(made):
    save_teacher("checkpoints/resnet14.pt", 1)
    call(*CIFAR, "--methods", "kd")
    assert call(*CIFAR, "--methods", "kd", "--list").startswith("done")
    save_teacher("checkpoints/resnet14.pt", 2)
    listed = call(*CIFAR, "--methods", "kd", "--list")
    assert not listed.startswith("done") and "teacher_sha256 was" in listed
    Path("checkpoints/resnet14.pt").unlink()       # without a file, the result is the row's
    assert call(*CIFAR, "--methods", "kd", "--list").startswith("done")


def test_a_fresh_clones_list_never_fails_on_a_cpu():
    """The full-length rows are bfloat16's, a CPU's default is float32."""
    output = call("--list", "--device", "cpu")
    assert "precision was bf16, now fp32" in output and "resnet32x4-resnet8x4-kd-z-seed0" in output
    assert "done  resnet56-resnet20-kd-z-seed0" in call("--list", "--device", "cpu", "--precision", "bf16")


def test_the_tables_are_written_when_a_row_came_only(made, monkeypatch):
    before = Path("RESULTS.md").read_text()
    Path("RESULTS.md").write_text(before.replace(BEGIN, f"{BEGIN}\nthe tables of other results"))
    before = Path("RESULTS.md").read_text()
    Path("teacher.pt").write_bytes(b"damaged")
    call(*SMALL, "--methods", "kd", code=1)
    assert Path("RESULTS.md").read_text() == before
    call(*SMALL, "--methods", "none")
    assert Path("RESULTS.md").read_text() != before


def test_the_last_epoch_of_full_length_rows_is_that_of_the_kept_students_in_float32():
    kd, z = (record(m, 0, top1, float32={"top1": top1 + 0.2}) for m, top1 in (("kd", 73.0), ("kd-z", 76.0)))
    row = cells(tables([kd, z]), "KD+Z")
    assert row["last epoch, top-1"] == "76.20 (n = 1)" and row["best, chosen on test"] == "76.50 (n = 1)"
    assert reproduce.FLOAT32 in tables([kd, z]) and reproduce.FLOAT32 not in tables([record("kd", 0, 73.0)])


def test_list_says_what_is_done(made):
    assert "nothing to run" not in call(*SMALL, "--methods", "none")
    assert "nothing to run: all rows are in " in call(*SMALL, "--methods", "none")
    lines = call(*SMALL, "--methods", "none,kd", "--list").splitlines()
    assert [line.split() for line in lines] == [["done", f"resnet8-none-synthetic-seed0-{BUDGET}"],
                                                [f"resnet14-resnet8-kd-synthetic-seed0-{BUDGET}"]]
    assert len(made) == 1


@pytest.mark.parametrize("arguments, words", [
    (["--pairs", "resnet65-resnet8"], "resnet65: no such network; known, the nearest first: resnet56"),
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
    more = [] if "--readme" in arguments else ["--readme", "RESULTS.md"]
    output = call(*arguments, *more, code=1 if "--table" in arguments else 2)
    assert words in output and len(output.splitlines()) == 1
    assert Path("RESULTS.md").read_text() == f"before\n{BEGIN}\n{END}\nafter\n"


def test_the_flags_are_train_cifars():
    found = {p.name for p in main.params}
    assert set(reproduce.PASSED) | {"pairs", "methods", "results", "readme", "table", "list_rows"} == found


# ---------------------------------------------------------------- the tables


def record(method, seed, top1, teacher="resnet32x4", student="resnet8x4", full=True, **more):
    name = method.split("-")[0]
    recipe = {"data": "cifar100", "train_images": None, "seed": seed, "precision": "bf16", "method": name,
              "compile": False, "full_epochs": 240, "epochs": 240 if full else 12}
    recipe |= {"teacher_sha256": "0123456789abcdef"} if teacher else {}
    return {"teacher": teacher, "student": student, "method": method, "seed": seed, "last": {"top1": top1},
            "best": {"top1": top1 + 0.5}, "epochs": recipe["epochs"], "minutes": 20.0, "full_length": full,
            "teacher_top1": teacher and 79.4, "teacher_source": teacher and "checkpoints/resnet32x4.pt",
            "facts": {"device": "H", "threads": 8}, "recipe": recipe,
            "command": f"python train_cifar.py --teacher {teacher} --method {name} --seed {seed}"} | more


def cells(text, method, pair="resnet32x4 → resnet8x4"):
    """Column -> cell of a method's row."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line] for line in lines]
    row, = [row for row in rows if row[:2] == [pair, method]]
    return dict(zip(rows[0], row))


def test_a_tables_numbers_are_the_papers_words():
    """Mean and sample deviation of the last epoch, the best beside it; the gain of Z over common seeds."""
    text = tables([record("kd", 0, 73.0), record("kd", 1, 74.0), record("kd-z", 0, 76.0),
                   record("kd-z", 1, 76.2), record("kd-z", 2, 75.8)])
    assert "Full length, as in the papers: 2 rows" in text and reproduce.RULE in text
    assert cells(text, "KD+Z") == {
        "pair": "resnet32x4 → resnet8x4", "method": "KD+Z", "last epoch, top-1": "76.00 ± 0.20 (n = 3)",
        "best, chosen on test": "76.50 ± 0.20 (n = 3)", "paper": "76.62", "authors' log, last epoch": "76.28",
        "Δ of Z": "+2.60 ± 0.57 (n = 2), better", "paper's Δ": "+3.29", "minutes": "20.0", "device": "H",
        "`python train_cifar.py`, with `--seed`": "`--teacher resnet32x4 --method kd`"}
    assert "checkpoints/resnet32x4.pt, 79.40 %, SHA-256 of its weights 0123456789ab" in text
    row = cells(text, "KD")
    assert [row[k] for k in ("last epoch, top-1", "paper", "Δ of Z", "paper's Δ")] == [
        "73.50 ± 0.71 (n = 2)", "73.33", "–", "–"]


def test_a_table_has_no_row_and_no_column_that_says_nothing():
    assert tables([]) == ""
    text = tables([record("none", 0, 72.0, None, "resnet8x4")])
    assert text.count("\n| ") == 3 and "Δ" not in text and "log" not in text and "paper |" in text
    assert cells(text, "alone", "resnet8x4")["paper"] == "72.50"
    unknown = tables([record("kd", 0, 50.0, student="resnet8")])
    assert "paper |" not in unknown


@pytest.mark.parametrize("plain, z, full, word", [
    ([73.0], [73.7], True, "within noise"),         # 2 * 0.25 * sqrt(2) = 0.707
    ([73.0], [73.72], True, "better"),
    ([73.72], [73.0], True, "worse"),
    ([30.0], [36.0], False, "within noise"),        # one seed of a short run says nothing
    ([73.0, 74.0], [74.0, 75.4], True, "within noise"),     # 2 * sqrt((0.5 + 0.98) / 2) = 1.72 > 1.2
    ([73.0, 74.0], [75.0, 75.8], True, "better"),           # 2 * sqrt((0.5 + 0.32) / 2) = 1.28 < 1.9
    ([30.0, 30.2], [29.0, 29.2], False, "worse"),
])
def test_a_difference_within_twice_its_standard_error_is_noise(plain, z, full, word):
    records = [record(m, seed, top1, full=full) for m, found in (("kd", plain), ("kd-z", z))
               for seed, top1 in enumerate(found)]
    assert cells(tables(records), "KD+Z")["Δ of Z"].endswith(f", {word}")


def test_waiting_is_no_minutes():
    """Rows made in the background: their minutes have waiting in them."""
    rows = [record("kd", 0, 73.0), record("kd", 1, 73.1, minutes=900.0, background=True)]
    assert cells(tables(rows), "KD")["minutes"] == "20.0"
    text = tables(rows[1:])
    assert "minutes" not in text and cells(text, "KD")["last epoch, top-1"] == "73.10 (n = 1)"


@pytest.mark.parametrize("key", ["teacher_sha256", "precision", "compile"])
def test_the_gain_of_z_is_of_rows_that_differ_in_nothing_else(key):
    plain, z = record("kd", 0, 73.0), record("kd-z", 0, 76.0)
    assert cells(tables([plain, z]), "KD+Z")["Δ of Z"] == "+3.00 (n = 1), better"
    z["recipe"][key] = "another"
    assert "Δ of Z" not in cells(tables([plain, z]), "KD+Z")


def test_no_mean_over_different_recipes():
    other = record("kd", 1, 74.0)
    other["recipe"]["precision"] = "fp32"
    with pytest.raises(runs.RunError, match="differ: precision was bf16, now fp32"):
        tables([record("kd", 0, 73.0), other])


def test_tomorrows_seed_stands_in_todays_cell(tmp_path):
    """A recipe with keys that today's lack, at their defaults, is the same; at another value it is not."""
    records = load_records(ROOT / "results")
    old = next(r for r in records if r["method"] == "kd-z")
    new = json.loads(json.dumps(old)) | {"seed": 9}
    new["recipe"] = reproduce.DEFAULTS | new["recipe"] | {"seed": 9}
    assert set(new["recipe"]) > set(old["recipe"])
    n = sum(all(r[k] == old[k] for k in ("teacher", "student", "method")) for r in records) + 1
    pair = f"{old['teacher']} → {old['student']}"
    assert f"(n = {n})" in cells(tables([*records, new]), "KD+Z", pair)["last epoch, top-1"]
    for key in reproduce.DEFAULTS.keys() - old["recipe"].keys():
        with pytest.raises(runs.RunError, match=f"differ: {key} was None, now other"):
            tables([*records, new | {"recipe": new["recipe"] | {key: "other"}}])


def test_the_default_rows_are_the_posters():
    poster = [("resnet32x4", "ShuffleV2"), ("resnet32x4", "wrn_16_2"), ("resnet32x4", "wrn_40_2"),
              ("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"), ("resnet110", "resnet32"),
              ("resnet110", "resnet20")]
    assert reproduce.PAIRS == tuple(map("-".join, [("resnet32x4", "resnet8x4"), *poster]))
    assert set(reproduce.PAIRS) <= set(recipes.PAIRS)
    rows = rows_of(["resnet56-resnet20", "resnet110-resnet20"], ["none", "kd"])
    assert rows == [(None, "resnet20", "none"), *((t, "resnet20", "kd") for t in ("resnet56", "resnet110"))]


# ---------------------------------------------------------------- what is kept


def kept(small):
    """keep() of an untrained resnet8 with the accuracy that it has."""
    torch.manual_seed(1)
    network = create_model("resnet8")
    images = data.load_data("synthetic", None, "cpu", train_images=100)
    torch.save({"model": network.state_dict(), "student": "resnet8", "seed": 3}, small / "student.pt")
    made = record("none", 0, 1.0, None, "resnet8", best_chosen_on="test")
    row = Row(None, "resnet8", "none", 0, [], [], made["recipe"], "resnet8-none-seed0")
    return reproduce.keep(row, made, small, images, torch.device("cpu")), network


def test_a_kept_teacher_is_half_as_large_and_found_again(small):
    said, network = kept(small)
    path, source = teacher.find_teacher("resnet8", None, "http://127.0.0.1:9/none.tar")
    assert path == small / "checkpoints" / "resnet8.pt" and said.endswith("kept")
    assert path.stat().st_size < 0.6 * (small / "student.pt").stat().st_size
    again = create_model("resnet8")
    load_weights(again, path)
    assert torch.load(path)["seed"] == 3        # export.py's temperature needs to know the training views
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=1e-3, atol=1e-6)
    card = path.with_suffix(".json")
    assert {"command", "seed", "last", "facts", "float16_top1"} <= set(json.loads(card.read_text()))
    before = path.read_bytes()
    assert kept(small)[0].endswith("stays") and path.read_bytes() == before
    card.unlink()
    assert "only its card" in kept(small)[0] and card.exists() and path.read_bytes() == before


def test_what_is_too_large_or_loses_accuracy_leaves_its_card_alone(small, monkeypatch):
    monkeypatch.setattr(reproduce, "LARGEST", 1000)
    assert "only its card" in kept(small)[0]
    monkeypatch.setattr(reproduce, "LARGEST", 16e6)
    top1 = iter([50.0, 50.03])       # of float32, of float16
    monkeypatch.setattr(reproduce, "evaluate", lambda *rest: {"top1": next(top1)})
    assert "only its card" in kept(small)[0]
    assert [p.name for p in (small / "checkpoints").iterdir()] == ["resnet8.json"]


def test_the_readmes_rows_are_the_results():
    """Last and best epoch, the paper's number, the log's, and the command of each row in its first table."""
    rows = [line.split(" | ") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
            if line.startswith("| ") and "`python train_cifar.py" in line]
    records = {r["command"]: r for r in reproduce.load_records(ROOT / "results")}
    assert 2 <= len(rows) <= 5
    for _, last, best, paper, log, command in rows:
        record = records[command.strip("`| ")]
        names = [record["recipe"][k] for k in ("teacher", "student", "method", "zscore")]
        assert last in [f"{record[k]['top1']:.2f}" for k in ("float32", "last")]
        assert best == f"{record['best']['top1']:.2f}"
        for shown, known in ((paper, recipes.published(*names)), (log, recipes.logged(*names))):
            assert shown == (f"{known:.2f}" if known else "–")
