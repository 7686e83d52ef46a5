"""The recipes and published numbers are the papers'."""

import itertools
import json

import pytest

import recipes
from recipes import IMAGENET, PAIRS, PUBLISHED, logged, published, recipe, schedule, table, unsure


@pytest.fixture(scope="module")
def tables(shared):
    return json.loads((shared / "reference" / "paper_tables.json").read_text())


def test_the_first_command_is_the_papers_experiment():
    r = recipe("resnet32x4", "resnet8x4", "kd", zscore=True)
    assert r == {"known": True, "lr": 0.05, "epochs": 240, "stages": (150, 180, 210), "batch_size": 64,
                 "momentum": 0.9, "weight_decay": 5e-4, "base_temp": 2.0, "kd_weight": 9.0, "ce_weight": 0.1}
    assert published("resnet32x4", "resnet8x4", "kd", True) == 76.62
    assert logged("resnet32x4", "resnet8x4", "kd", True) == 76.28


def test_plain_kd_is_the_published_baseline_and_not_the_released_default():
    r = recipe("resnet56", "resnet20", "kd")
    assert (r["base_temp"], r["ce_weight"], r["kd_weight"]) == (4.0, 0.1, 0.9)
    r = recipe("resnet56", "resnet20", "kd", source="released")
    assert (r["base_temp"], r["ce_weight"], r["kd_weight"]) == (2.0, 0.1, 9.0)


def test_where_released_code_and_logs_differ_both_are_rows():
    for method, authors in (("kd", (3, 9)), ("dkd", (2, 15)), ("mlkd", (2, 6))):
        for source, numbers in (("authors", authors), ("released", (2, 9))):
            r = recipe("vgg13", "vgg8", method, True, source)
            assert (r["base_temp"], r["kd_weight"]) == numbers, (method, source)
    assert [recipe("vgg13", "vgg8", "dkd", True, s)["beta"] for s in recipes.SOURCES] == [2, 6]
    relations = [recipe("vgg13", "vgg8", "mlkd", True, s)["zscore_relations"] for s in recipes.SOURCES]
    assert relations == [True, False]
    curricula = [recipe("vgg13", "vgg8", "ctkd", True, source) for source in recipes.SOURCES]
    assert [(r["base_temp"], r["span"]) for r in curricula] == [(2, 40), (1, 20)]


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
    for pair in PAIRS:
        assert recipe(*pair, "kd", True)["lr"] == (0.01 if pair[1] in ("MobileNetV2", "ShuffleV2") else 0.05)
    assert recipe("resnet32x4", "ShuffleV2", "mlkd", True)["epochs"] == 960
    assert recipe("wrn_40_2", "MobileNetV2", "mlkd", True)["lr"] == 0.005
    alone = recipe(None, "ShuffleV1", "none")
    assert (alone["lr"], alone["epochs"], alone["ce_weight"], alone["known"]) == (0.01, 240, 1.0, True)


def test_published_accuracies_are_the_tables(tables):
    for row in tables["cifar100_lskd_readme"]:
        method, zscore = row["method"].removesuffix("+Z").lower(), row["method"].endswith("+Z")
        assert published(row["teacher"], row["student"], method, zscore) == row["top1"], row
    for row in tables["cifar100_ttm_readme"]:
        if row["method"] in ("TTM", "WTTM") and (row["teacher"], row["student"]) in PUBLISHED:
            assert published(row["teacher"], row["student"], row["method"].lower()) == row["top1"], row
    for row in tables["vanilla_accuracies"]:
        assert published(None, row["student"], "none") == row["student_top1"]
        assert published(None, row["teacher"], "none") == row["teacher_top1"]
        assert published(row["teacher"], None, "teacher") == row["teacher_top1"]


def test_logged_last_epochs_are_the_logs(tables):
    last = {}
    for row in tables["official_logs"]:
        if (row["teacher"], row["student"]) in PAIRS and row["base_temp"] is not None:
            last.setdefault((row["teacher"], row["student"], row["method"]), []).append(row["last"])
    for (teacher, student, method), values in last.items():
        ours = logged(teacher, student, method.removesuffix("+Z").lower(), True)
        assert ours == pytest.approx(sum(values) / len(values), abs=0.0051)
    assert logged("resnet56", "resnet20", "mlkd", True) is None


def imagenet(*names):
    return recipe(*names, data="imagenet")


def test_the_imagenet_recipes_are_the_papers():
    common = {"known": True, "lr": 0.2, "epochs": 100, "stages": (30, 60, 90), "batch_size": 512,
              "momentum": 0.9, "weight_decay": 1e-4}
    small, large = ("resnet34", "resnet18"), ("resnet50", "MobileNetV1")
    for pair in (small, large):
        assert imagenet(*pair, "kd") == common | {"base_temp": 1.0, "kd_weight": 0.5, "ce_weight": 0.5}
        assert imagenet(*pair, "kd", True) == common | {"base_temp": 2.0, "kd_weight": 9.0, "ce_weight": 0.5}
        assert imagenet(*pair, "none") == common | {"base_temp": None, "kd_weight": 0.0, "ce_weight": 1.0}
        beta = {"alpha": 1.0, "beta": 0.5 if pair == small else 2.0, "warmup": 1, "ce_weight": 1.0}
        assert imagenet(*pair, "dkd") == common | beta | {"base_temp": 1.0, "kd_weight": 1.0}
        assert imagenet(*pair, "dkd", True) == common | beta | {"base_temp": 2.0, "kd_weight": 9.0}
        rate = common | {"lr": 0.1 if pair == small else 0.2, "ce_weight": 0.5}
        plain, z = {"base_temp": 1.0, "kd_weight": 0.5}, {"base_temp": 2.0, "kd_weight": 9.0}
        assert imagenet(*pair, "mlkd") == rate | plain | {"zscore_relations": False}
        assert imagenet(*pair, "mlkd", True) == rate | z | {"zscore_relations": True}
        curriculum = common | {"ce_weight": 1.0, "ramp": 5}
        assert imagenet(*pair, "ctkd") == curriculum | {"base_temp": 1.0, "span": 20.0, "kd_weight": 1.0}
        assert imagenet(*pair, "ctkd", True) == curriculum | z | {"span": 40.0}
    full = imagenet(*small, "kd", True) | {"full_epochs": 100}
    rates = [schedule(epoch, full)[0] for epoch in (1, 30, 31, 60, 61, 90, 91)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 2e-3, 2e-3, 2e-4])
    assert imagenet(None, "resnet18", "none")["known"]
    assert not imagenet("resnet34", "MobileNetV1", "kd")["known"]


def test_published_imagenet_accuracies_are_the_tables(tables):
    pairs = dict(zip(("ResNet34_ResNet18", "ResNet50_MobileNetV1"), IMAGENET))
    methods = {"Teacher": "teacher", "Student": "none", "KD": "kd", "KD+CTKD": "ctkd", "DKD": "dkd",
               "MLKD": "mlkd"}
    order = ["teacher", "none", *recipes.COLUMNS]
    checked = 0
    for row in tables["seed_poster_imagenet"]:
        method, zscore = methods.get(row["method"].removesuffix("+Z")), row["method"].endswith("+Z")
        for column, pair in pairs.items() if method else ():
            assert published(*pair, method, zscore, "imagenet") == row[column]["top1"], row
            top5 = recipes.IMAGENET_TOP5[pair][order.index(recipes.key(method, zscore))]
            assert top5 == row[column]["top5"], row
            checked += 1
    assert checked == 2 * 10
    transformed = tables["imagenet_ttm_readme"]
    names = "ResNet34(73.31)->ResNet18(69.76)", "ResNet50(76.16)->MobileNet(68.87)"
    for name, pair in zip(names, IMAGENET):
        wttm = dict(zip(transformed["columns"], transformed[name]))["WTTM"]
        assert published(*pair, "wttm", data="imagenet") == wttm
    log, = [row for row in tables["official_logs"] if row["student"] == "ResNet18"]
    assert logged("resnet34", "resnet18", "kd", True, "imagenet") == log["last"]


@pytest.mark.parametrize("name", ["cifar10", "folder", "synthetic"])
def test_another_data_set_takes_cifar_100s_rules(name):
    """For any pair, ImageNet's too; what is published for CIFAR-100 is the caller's to leave out."""
    for method, zscore in itertools.product(recipes.METHODS, (False, True)):
        for pair in (("vgg13", "vgg8"), ("resnet34", "resnet18")):
            for function in (recipe, unsure, published, logged):
                assert function(*pair, method, zscore, data=name) == function(*pair, method, zscore)
    assert recipe("resnet34", "resnet18", "kd", data=name)["epochs"] == 240
    assert published("resnet34", "resnet18", "kd", data=name) is None
    assert logged("resnet34", "resnet18", "kd", True, name) is None


def test_an_unknown_pair_takes_temperature_2_and_weight_9():
    r = recipe("resnet56", "resnet8", "kd", True)
    assert (r["known"], r["base_temp"], r["kd_weight"], r["lr"]) == (False, 2.0, 9.0, 0.05)
    assert recipe("resnet56", "MobileNetV2", "kd", True)["lr"] == 0.01


def reason(method, pair="any", reasons=recipes.UNSURE):
    return next(why for pairs, names, why in reasons if method in names.split() and pair in pairs.split())


def test_what_is_unsure_is_said():
    of_all = reason("kd-z")
    assert unsure("vgg13", "vgg8", "kd", True) == [of_all]
    assert unsure("resnet32x4", "ShuffleV2", "kd", True) == [reason("kd-z", "resnet32x4-ShuffleV2"), of_all]
    assert unsure("wrn_40_2", "MobileNetV2", "mlkd", True)[0].startswith("published without a log")
    assert unsure("vgg13", "vgg8", "kd") == [] == unsure("vgg13", "vgg8", "none")
    assert unsure("vgg13", "vgg8", "dkd") == [] != unsure("resnet110", "resnet20", "dkd")   # a beta, or none
    assert unsure("vgg13", "vgg8", "ttm") == [] != unsure("resnet110", "resnet20", "ttm")
    assert unsure("vgg13", "vgg8", "kd", True, "released") == []
    assert unsure("vgg13", "vgg8", "wttm", source="released") == [reason("wttm")]

    large = {"data": "imagenet"}
    doubt = reason("kd-z", reasons=recipes.IMAGENET_UNSURE)
    assert unsure("resnet34", "resnet18", "kd", True, **large) == [doubt] != []
    assert unsure("resnet50", "MobileNetV1", "kd", True, **large) == []
    assert unsure("resnet34", "resnet18", "dkd", **large) == []
    assert unsure("resnet50", "MobileNetV1", "ctkd", **large)


@pytest.mark.parametrize("data, pairs, row, cells", [
    ("cifar100", PAIRS, "resnet32x4 -> ShuffleV2", ["2, 9?", "75.56 (75.58)"]),
    ("imagenet", IMAGENET, "resnet34 -> resnet18", ["1, 0.5?", "71.42 / 90.29 (71.26)"])])
def test_the_list_holds_every_pair_and_its_doubts_under_them(data, pairs, row, cells):
    text = table(data)
    rows = [line for line in text.splitlines() if line.startswith(row)]
    assert len(rows) == 2 and all(cell in line for cell, line in zip(cells, rows))
    assert all(text.count(f"\n{t} -> {s} ") == 2 for t, s in pairs)
    recipes_part, published_part = text.split("\nPublished")
    for _, names, why in recipes.IMAGENET_UNSURE if data == "imagenet" else recipes.UNSURE:
        shown = names.upper().replace("-Z", "+Z").replace(" ", ", ")
        line, = [line for line in recipes_part.split("\n") if line.endswith(f": {why}")]
        assert line.startswith(f"  ? {shown}")
    assert "?" not in published_part


def test_the_schedule_is_its_three_parts():
    r = recipe("vgg13", "vgg8", "ctkd", True)
    assert schedule(10, r) == (0.05, 9.0, 1.0) and schedule(211, r)[0] == pytest.approx(5e-5)
    assert schedule(5, recipe("vgg13", "vgg8", "dkd", True))[1:] == (15 * 5 / 20, 0.0)


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown method 'kdd'; known: none, kd"):
        recipe("resnet56", "resnet20", "kdd")
