"""The recipes and published numbers are the papers'."""

import json

import pytest

import recipes
from recipes import LOGGED, PAIRS, PUBLISHED, logged, published, recipe, table


@pytest.fixture(scope="module")
def tables(shared):
    return json.loads((shared / "reference" / "paper_tables.json").read_text())


def test_the_first_command_is_the_papers_experiment():
    r = recipe("resnet32x4", "resnet8x4", "kd", zscore=True)
    assert r == {"known": True, "lr": 0.05, "epochs": 240, "stages": (150, 180, 210), "batch_size": 64, "momentum": 0.9,
                 "weight_decay": 5e-4, "base_temp": 2.0, "kd_weight": 9.0, "ce_weight": 0.1}
    assert published("resnet32x4", "resnet8x4", "kd", True) == 76.62
    assert logged("resnet32x4", "resnet8x4", "kd", True) == 76.28


def test_plain_kd_is_the_published_baseline_and_not_the_released_default():
    r = recipe("resnet56", "resnet20", "kd")
    assert (r["base_temp"], r["ce_weight"], r["kd_weight"]) == (4.0, 0.1, 0.9)
    r = recipe("resnet56", "resnet20", "kd", source="released")
    assert (r["base_temp"], r["ce_weight"], r["kd_weight"]) == (2.0, 0.1, 9.0)


def test_where_released_code_and_logs_differ_both_are_rows():
    for method, authors, released in (("kd", (3, 9), (2, 9)), ("dkd", (2, 15), (2, 9)), ("mlkd", (2, 6), (2, 9))):
        for source, numbers in (("authors", authors), ("released", released)):
            r = recipe("vgg13", "vgg8", method, True, source)
            assert (r["base_temp"], r["kd_weight"]) == numbers, (method, source)
    assert [recipe("vgg13", "vgg8", "dkd", True, s)["beta"] for s in recipes.SOURCES] == [2, 6]
    assert [recipe("vgg13", "vgg8", "mlkd", True, s)["zscore_relations"] for s in recipes.SOURCES] == [True, False]
    assert [(r["base_temp"], r["span"]) for r in (recipe("vgg13", "vgg8", "ctkd", True, s) for s in recipes.SOURCES)] == [
        (2, 40), (1, 20)]


def test_all_fourteen_pairs_have_the_logs_temperature_weight_and_beta(tables):
    names = {"KD+Z": "kd", "DKD+Z": "dkd", "MLKD+Z": "mlkd", "CTKD+Z": "ctkd"}
    checked = 0
    for key, row in tables["hyper_parameters_per_pair_from_log_names"].items():
        method, teacher, student = key.split("|")
        r = recipe(teacher, student, names[method], zscore=True)
        assert (teacher, student) in PAIRS and r["known"]
        assert (r["base_temp"], r["kd_weight"]) == (row["base_temp"], row["kd_weight"]), key
        if method == "DKD+Z":
            assert r["beta"] == (row["dkd_beta"] or 8), key
        checked += 1
    assert checked == 4 * 14 - 2 and len(PAIRS) == 14
    for pair, beta in tables["dkd_upstream_beta"].items():
        if tuple(pair.split("|")) in PAIRS:
            assert recipe(*pair.split("|"), "dkd")["beta"] == beta
            assert recipe(*pair.split("|"), "dkd", True, "released")["beta"] == beta


def test_learning_rates_and_lengths():
    for (_, student), row in PAIRS.items():
        assert row[0] == (0.01 if student in ("MobileNetV2", "ShuffleV2") else 0.05)
    assert recipe("resnet32x4", "ShuffleV2", "mlkd", True)["epochs"] == 960
    assert recipe("wrn_40_2", "MobileNetV2", "mlkd", True)["lr"] == 0.005
    assert recipe(None, "ShuffleV1", "none") | {"lr": 0.01, "epochs": 240, "ce_weight": 1.0} == recipe(None, "ShuffleV1", "none")


def test_published_accuracies_are_the_tables(tables):
    for row in tables["cifar100_lskd_readme"]:
        method, zscore = row["method"].removesuffix("+Z").lower(), row["method"].endswith("+Z")
        assert published(row["teacher"], row["student"], method, zscore) == row["top1"], row
    for row in tables["cifar100_ttm_readme"]:
        if row["method"] in ("TTM", "WTTM") and (row["teacher"], row["student"]) in PUBLISHED:
            assert published(row["teacher"], row["student"], row["method"].lower()) == row["top1"], row
    for row in tables["vanilla_accuracies"]:
        assert published(None, row["student"], "none") == row["student_top1"]
        assert recipes.ALONE[row["teacher"]] == row["teacher_top1"]


def test_logged_last_epochs_are_the_logs(tables):
    last = {}
    for row in tables["official_logs"]:
        if (row["teacher"], row["student"]) in LOGGED and row["base_temp"] is not None:
            last.setdefault((row["teacher"], row["student"], row["method"]), []).append(row["last"])
    for (teacher, student, method), values in last.items():
        ours = logged(teacher, student, method.removesuffix("+Z").lower(), True)
        assert ours == pytest.approx(sum(values) / len(values), abs=0.0051)
    assert logged("resnet56", "resnet20", "mlkd", True) is None


def test_an_unknown_pair_takes_temperature_2_and_weight_9():
    r = recipe("resnet56", "resnet8", "kd", True)
    assert (r["known"], r["base_temp"], r["kd_weight"], r["lr"]) == (False, 2.0, 9.0, 0.05)
    assert recipe("resnet56", "MobileNetV2", "kd", True)["lr"] == 0.01


def test_the_doubtful_rows_are_marked_in_the_list():
    text = table()
    rows = [line for line in text.splitlines() if line.startswith("resnet32x4 -> ShuffleV2")]
    assert "2, 9?" in rows[0] and "75.56 (75.58)" in rows[1]
    assert all(f"{t} -> {s}" in text for t, s in PAIRS)
    assert "weight was probably about 1" in text


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown method 'kdd'; known: none, kd"):
        recipe("resnet56", "resnet20", "kdd")
