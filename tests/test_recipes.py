"""The recipes and published numbers are the papers'."""

import json

import pytest

import recipes
from recipes import LOGGED, PAIRS, PUBLISHED, imagenet, logged, published, recipe, table


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


def test_the_imagenet_recipes_are_the_papers():
    common = {"known": True, "lr": 0.2, "epochs": 100, "stages": (30, 60, 90), "batch_size": 512, "momentum": 0.9, "weight_decay": 1e-4}
    small, large = ("resnet34", "resnet18"), ("resnet50", "MobileNetV1")
    for pair in (small, large):
        assert imagenet(*pair, "kd") == common | {"base_temp": 1.0, "kd_weight": 0.5, "ce_weight": 0.5}
        assert imagenet(*pair, "kd", True) == common | {"base_temp": 2.0, "kd_weight": 9.0, "ce_weight": 0.5}
        assert imagenet(*pair, "none") == common | {"base_temp": None, "kd_weight": 0.0, "ce_weight": 1.0}
        beta = {"alpha": 1.0, "beta": 0.5 if pair == small else 2.0, "warmup": 1, "ce_weight": 1.0}
        assert imagenet(*pair, "dkd") == common | beta | {"base_temp": 1.0, "kd_weight": 1.0}
        assert imagenet(*pair, "dkd", True) == common | beta | {"base_temp": 2.0, "kd_weight": 9.0}
        rate = common | {"lr": 0.1 if pair == small else 0.2, "ce_weight": 0.5}
        assert imagenet(*pair, "mlkd") == rate | {"base_temp": 1.0, "kd_weight": 0.5, "zscore_relations": False}
        assert imagenet(*pair, "mlkd", True) == rate | {"base_temp": 2.0, "kd_weight": 9.0, "zscore_relations": True}
        curriculum = common | {"ce_weight": 1.0, "ramp": 5}
        assert imagenet(*pair, "ctkd") == curriculum | {"base_temp": 1.0, "span": 20.0, "kd_weight": 1.0}
        assert imagenet(*pair, "ctkd", True) == curriculum | {"base_temp": 2.0, "span": 40.0, "kd_weight": 9.0}
    full = imagenet(*small, "kd", True) | {"full_epochs": 100}
    assert [recipes.learning_rate(e, full) for e in (1, 30, 31, 60, 61, 90, 91)] == pytest.approx([0.2, 0.2, 0.02, 0.02, 2e-3, 2e-3, 2e-4])


def test_published_imagenet_accuracies_are_the_tables(tables):
    pairs = {"ResNet34_ResNet18": ("resnet34", "resnet18"), "ResNet50_MobileNetV1": ("resnet50", "MobileNetV1")}
    methods = {"KD": "kd", "KD+CTKD": "ctkd", "DKD": "dkd", "MLKD": "mlkd"}
    checked = 0
    for row in tables["seed_poster_imagenet"]:
        name, zscore = row["method"].removesuffix("+Z"), row["method"].endswith("+Z")
        method = {"Teacher": "teacher", "Student": "none"}.get(name) or methods.get(name)
        for column, pair in pairs.items() if method else ():
            assert recipes.imagenet_published(*pair, method, zscore) == (row[column]["top1"], row[column]["top5"]), row
            checked += 1
    assert checked == 2 * 10
    transformed = tables["imagenet_ttm_readme"]
    for key, pair in (("ResNet34(73.31)->ResNet18(69.76)", pairs["ResNet34_ResNet18"]), ("ResNet50(76.16)->MobileNet(68.87)", pairs["ResNet50_MobileNetV1"])):
        assert recipes.imagenet_published(*pair, "wttm")[0] == dict(zip(transformed["columns"], transformed[key]))["WTTM"]
    log, = [row for row in tables["official_logs"] if row["student"] == "ResNet18"]
    assert recipes.imagenet_logged("resnet34", "resnet18", "kd", True) == log["last"]


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
    assert recipes.unsure("vgg13", "vgg8", "kd", True) == [recipes.UNSURE[recipes.ANY, "kd-z"]]
    assert recipes.unsure("vgg13", "vgg8", "kd", True, "released") == [] != recipes.unsure("vgg13", "vgg8", "wttm", False, "released")
    assert recipes.imagenet_unsure("resnet34", "resnet18", "kd", True) and recipes.imagenet_unsure("resnet50", "MobileNetV1", "kd", True) is None


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown method 'kdd'; known: none, kd"):
        recipe("resnet56", "resnet20", "kdd")
