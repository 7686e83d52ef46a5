"""The recipes and published numbers are the papers'."""

import itertools
import json

import pytest

import recipes
from recipes import (FEATURE_NAMES, FEATURES, TABLES, log_of, parse_method, published, recipe, recipe_epoch,
                     schedule, table)

PAIRS, IMAGENET = (TABLES[data]["published"] for data in ("cifar100", "imagenet"))


@pytest.fixture(scope="module")
def tables(shared):
    return json.loads((shared / "reference" / "paper_tables.json").read_text())


def split(pair):
    return pair.split("-")


def logged(teacher, student, method, zscore=False, data="cifar100", feature=None):
    run = {"teacher": teacher, "student": student, "method": method, "zscore": zscore, "feature": feature}
    return log_of(run, data).get("last")


# ---------------------------------------------------------------- CIFAR-100


def test_the_first_command_is_the_papers_experiment():
    r = recipe("resnet32x4", "resnet8x4", "kd", zscore=True)
    assert r == {"known": True, "lr": 0.05, "epochs": 240, "stages": (150, 180, 210), "batch_size": 64,
                 "momentum": 0.9, "weight_decay": 5e-4, "base_temp": 2.0, "kd_weight": 9.0, "ce_weight": 0.1}
    assert published("resnet32x4", "resnet8x4", "kd", True) == 76.62
    assert logged("resnet32x4", "resnet8x4", "kd", True) == 76.28


def test_where_released_code_and_logs_differ_both_are_rows():
    """Plain KD is the published baseline, not the released default."""
    for source, numbers in (("authors", (4.0, 0.9, 0.1)), ("released", (2.0, 9.0, 0.1))):
        r = recipe("resnet56", "resnet20", "kd", source=source)
        assert (r["base_temp"], r["kd_weight"], r["ce_weight"]) == numbers
        assert r.get("source", "authors") == source
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
    found = tables["hyper_parameters_per_pair_from_log_names"]
    for key, row in found.items():
        method, teacher, student = key.split("|")
        r = recipe(teacher, student, names[method], zscore=True)
        assert f"{teacher}-{student}" in PAIRS and r["known"]
        assert (r["base_temp"], r["kd_weight"]) == (row["base_temp"], row["kd_weight"]), key
        if method == "DKD+Z":
            assert r["beta"] == (row["dkd_beta"] or 8), key
    assert len(found) == 4 * 14 - 2 and len(PAIRS) == 14
    for pair, beta in tables["dkd_upstream_beta"].items():
        if pair.replace("|", "-") in PAIRS:
            assert recipe(*pair.split("|"), "dkd")["beta"] == beta
            assert recipe(*pair.split("|"), "dkd", True, "released")["beta"] == beta


def test_learning_rates_and_lengths():
    for teacher, student in map(split, PAIRS):
        rate = 0.01 if student in ("MobileNetV2", "ShuffleV2") else 0.05
        assert recipe(teacher, student, "kd", True)["lr"] == rate
    assert recipe("resnet32x4", "ShuffleV2", "mlkd", True)["epochs"] == 960
    assert recipe("wrn_40_2", "MobileNetV2", "mlkd", True)["lr"] == 0.005
    alone = recipe(None, "ShuffleV1", "none")
    assert (alone["lr"], alone["epochs"], alone["ce_weight"], alone["known"]) == (0.01, 240, 1.0, True)


def test_published_accuracies_are_the_tables(tables):
    for row in tables["cifar100_lskd_readme"]:
        method, zscore = row["method"].removesuffix("+Z").lower(), row["method"].endswith("+Z")
        assert published(row["teacher"], row["student"], method, zscore) == row["top1"], row
    for row in tables["cifar100_ttm_readme"]:
        if row["method"] in ("TTM", "WTTM") and f"{row['teacher']}-{row['student']}" in PAIRS:
            assert published(row["teacher"], row["student"], row["method"].lower()) == row["top1"], row
    for row in tables["vanilla_accuracies"]:
        assert published(None, row["student"], "none") == row["student_top1"]
        assert published(None, row["teacher"], "none") == row["teacher_top1"]
        assert published(row["teacher"], None, "teacher") == row["teacher_top1"]


def test_logged_last_epochs_are_the_logs(tables):
    last = {}
    for row in tables["official_logs"]:
        if f"{row['teacher']}-{row['student']}" in PAIRS and row["base_temp"] is not None:
            last.setdefault((row["teacher"], row["student"], row["method"]), []).append(row["last"])
    for (teacher, student, method), values in last.items():
        ours = logged(teacher, student, method.removesuffix("+Z").lower(), True)
        assert ours == pytest.approx(sum(values) / len(values), abs=0.0051)
    assert logged("resnet56", "resnet20", "mlkd", True) is None


def test_an_unknown_pair_takes_temperature_2_and_weight_9():
    r = recipe("resnet56", "resnet8", "kd", True)
    assert (r["known"], r["base_temp"], r["kd_weight"], r["lr"]) == (False, 2.0, 9.0, 0.05)
    assert recipe("resnet56", "MobileNetV2", "kd", True)["lr"] == 0.01
    r = recipe("resnet56", "MobileNetV2", "mlkd", True)
    assert (r["base_temp"], r["kd_weight"], r["lr"], r["epochs"]) == (2.0, 9.0, 0.01, 480)


@pytest.mark.parametrize("name", ["cifar10", "folder", "synthetic"])
def test_another_data_set_takes_cifar_100s_rules(name):
    """For any pair, ImageNet's too; what is published for CIFAR-100 is the caller's to leave out."""
    for method, zscore, feature in itertools.product(recipes.METHODS, (False, True), (None, "catkd")):
        for pair in (("vgg13", "vgg8"), ("resnet34", "resnet18")):
            for function in (recipe, published, logged):
                of = *pair, method, zscore
                assert function(*of, data=name, feature=feature) == function(*of, feature=feature)
    assert recipe("resnet34", "resnet18", "kd", data=name)["epochs"] == 240
    assert published("resnet34", "resnet18", "kd", data=name) is None


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown method 'kdd'; known: none, kd"):
        recipe("resnet56", "resnet20", "kdd")
    with pytest.raises(ValueError, match="unknown feature 'cdr'; known: fitnet, at, .*, simkd, catkd$"):
        recipe("resnet56", "resnet20", "kd", feature="cdr")


# ---------------------------------------------------------------- ImageNet


def imagenet(*names):
    return recipe(*names, data="imagenet")


def test_the_imagenet_recipes_are_the_papers():
    common = {"known": True, "lr": 0.2, "epochs": 100, "stages": (30, 60, 90), "batch_size": 512,
              "momentum": 0.9, "weight_decay": 1e-4}
    small, large = ("resnet34", "resnet18"), ("resnet50", "MobileNetV1")
    for pair in (small, large):
        z = {"base_temp": 2.0, "kd_weight": 9.0}
        assert imagenet(*pair, "kd") == common | {"base_temp": 1.0, "kd_weight": 0.5, "ce_weight": 0.5}
        assert imagenet(*pair, "kd", True) == common | z | {"ce_weight": 0.5}
        assert imagenet(*pair, "none") == common | {"base_temp": None, "kd_weight": 0.0, "ce_weight": 1.0}
        beta = {"alpha": 1.0, "beta": 0.5 if pair == small else 2.0, "warmup": 1, "ce_weight": 1.0}
        assert imagenet(*pair, "dkd") == common | beta | {"base_temp": 1.0, "kd_weight": 1.0}
        assert imagenet(*pair, "dkd", True) == common | beta | z
        rate = common | {"lr": 0.1 if pair == small else 0.2, "ce_weight": 0.5}
        plain = {"base_temp": 1.0, "kd_weight": 0.5}
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
    checked = 0
    for row in tables["seed_poster_imagenet"]:
        method, zscore = methods.get(row["method"].removesuffix("+Z")), row["method"].endswith("+Z")
        for column, pair in pairs.items() if method else ():
            name = recipes.method_name({"method": method, "zscore": zscore})
            assert published(*split(pair), method, zscore, "imagenet") == row[column]["top1"], row
            assert TABLES["imagenet"]["top5"][pair][name] == row[column]["top5"], row
            checked += 1
    assert checked == 2 * 10
    transformed = tables["imagenet_ttm_readme"]
    names = "ResNet34(73.31)->ResNet18(69.76)", "ResNet50(76.16)->MobileNet(68.87)"
    for name, pair in zip(names, IMAGENET):
        wttm = dict(zip(transformed["columns"], transformed[name]))["WTTM"]
        assert published(*split(pair), "wttm", data="imagenet") == wttm
    log, = [row for row in tables["official_logs"] if row["student"] == "ResNet18"]
    assert logged("resnet34", "resnet18", "kd", True, "imagenet") == log["last"]


# ---------------------------------------------------------------- feature methods

# fmt: off
PER_PAIR = (    # ReviewKD, CAT-KD: weight, side of the maps, normalised
    ("resnet32x4 resnet8x4",   5,   (15, 2, False)),
    ("vgg13 vgg8",             5,   (4.5, 2, False)),
    ("resnet56 resnet20",      0.6, (0.7, 2, False)),
    ("resnet110 resnet20",     0.6, (0.7, 2, False)),
    ("resnet32x4 ShuffleV1",   5,   (600, 4, True)),
    ("resnet32x4 ShuffleV2",   8,   (600, 4, True)),
    ("wrn_40_2 ShuffleV1",     5,   (80, 4, True)),
    ("wrn_40_2 MobileNetV2",   5,   (40, 2, True)),
    ("ResNet50 MobileNetV2",   5,   (40, 2, True)),
    # in no paper
    ("resnet110 resnet8",      0.6, (0.7, 2, False)),     # narrow ResNets both
    ("resnet34 resnet18",      5,   (15, 2, False)),      # torchvision's are not narrow
    ("vgg13 resnet20",         5,   (80, 4, True)),
    ("wrn_40_2 mobilenet_v2",  5,   (40, 2, True)),       # a last map of side 2
)
# fmt: on


def test_weights_per_pair():
    for names, review, cat in PER_PAIR:
        pair = names.split()
        assert recipe(*pair, "none", feature="reviewkd")["feature_weight"] == review, names
        r = recipe(*pair, "none", feature="catkd")
        assert (r["feature_weight"], r["resolution"], r["normalize"]) == cat, names
        for feature, numbers in TABLES["cifar100"]["features"].items():
            if "feature_weight" in numbers:
                assert recipe(*pair, "kd", feature=feature)["feature_weight"] == numbers["feature_weight"]


def test_a_feature_alone_is_the_published_baseline():
    """Cross-entropy and the feature loss, no KL; SimKD has no cross-entropy either."""
    common = recipe("resnet32x4", "resnet8x4", "none")
    assert common["kd_weight"] == 0 and common["ce_weight"] == 1
    more = {"reviewkd": {"feature_ramp": 20}, "simkd": {"factor": 2, "ce_weight": 0.0},
            "catkd": {"resolution": 2, "normalize": False}}
    weights = (100, 1000, 1, 0.8, 0.001, 5, 1, 15)
    for feature, weight in zip(FEATURES, weights, strict=True):
        wanted = common | {"feature": feature, "feature_weight": weight} | more.get(feature, {})
        r = recipe("resnet32x4", "resnet8x4", "none", feature=feature)
        assert r == wanted and isinstance(r["feature_weight"], float)


@pytest.mark.parametrize("data, pair", [("cifar100", ("vgg13", "vgg8")),
                                        ("imagenet", ("resnet50", "MobileNetV1"))])
def test_a_feature_only_adds_to_a_method(data, pair):
    for method, zscore, feature in itertools.product(recipes.METHODS[1:], (False, True), FEATURES):
        plain = recipe(*pair, method, zscore, data=data)
        both = recipe(*pair, method, zscore, data=data, feature=feature)
        changed = {"ce_weight"} if feature == "simkd" else set()
        assert {k for k in plain if both[k] != plain[k]} == changed and set(both) > set(plain)


def test_a_pair_is_known_with_a_feature_where_a_paper_has_the_pair():
    def known(teacher, student, method, feature, data="cifar100"):
        of = {"teacher": teacher, "student": student, "method": method, "feature": feature}
        found = recipes.known(of, data)
        assert recipe(**of, data=data)["known"] == found
        return found

    assert known("vgg13", "resnet20", "none", None)     # the student alone
    assert not known("vgg13", "resnet20", "none", "crd") and not known("resnet34", "resnet18", "none", "crd")
    assert known("vgg13", "vgg8", "none", "crd") and known("wrn_40_2", "ShuffleV1", "none", "crd")
    assert known("vgg13", "vgg8", "kd", "crd")
    assert not known("wrn_40_2", "ShuffleV1", "kd", "crd")      # no paper has its temperature
    assert known("resnet34", "resnet18", "none", "crd", "imagenet")
    assert not known("vgg13", "vgg8", "none", "crd", "imagenet")


def test_the_schedule_and_reviewkds_ramp_which_begins_at_a_twentieth_and_scales_with_the_epochs():
    r = recipe("resnet32x4", "resnet8x4", "kd", True, feature="reviewkd") | {"full_epochs": 240}
    assert [schedule(e, r)[3] for e in (1, 10, 20, 21, 240)] == pytest.approx([0.25, 2.5, 5, 5, 5])
    assert schedule(1, r)[:3] == (0.05, 9.0, 0.0)       # nothing else is ramped
    ctkd = recipe("vgg13", "vgg8", "ctkd", True)
    assert schedule(10, ctkd) == (0.05, 9.0, 1.0, 0.0) and schedule(211, ctkd)[0] == pytest.approx(5e-5)
    assert schedule(5, recipe("vgg13", "vgg8", "dkd", True))[1:] == (15 * 5 / 20, 0.0, 0.0)
    short = r | {"epochs": 24}      # one epoch goes through ten of the recipe's
    assert [schedule(recipe_epoch(step, 100, short), short)[3] for step in (0, 9, 10, 99, 100, 199)] == (
        pytest.approx([0.25, 0.25, 0.5, 2.5, 2.75, 5]))
    constant = recipe("resnet32x4", "resnet8x4", "none", feature="catkd")
    assert schedule(1, constant)[3] == schedule(240, constant)[3] == constant["feature_weight"]


def test_published_features_are_the_posters(tables):
    poster, checked = tables["seed_poster_cifar100"], 0
    ours = TABLES["cifar100"]["published_features"]
    for feature, name in FEATURE_NAMES.items():
        for pair, top1 in zip(poster["pairs"], poster["rows"][name], strict=True):
            assert published(*pair, "none", feature=feature) == top1, (pair, name)
            checked += 1
    assert checked == 8 * 7 and [*ours] == ["-".join(pair) for pair in poster["pairs"]]
    last = {(row["method"], row["teacher"], row["student"]): row["top1"]
            for row in tables["cifar100_repdistiller_readme"]}
    differ = {(name, *pair, last[name, *pair]) for pair in map(split, ours)
              for feature, name in FEATURE_NAMES.items() if (name, *pair) in last
              and last[name, *pair] != published(*pair, "none", feature=feature)}
    assert differ == {("AT", "resnet110", "resnet20", 70.22)}       # as the table's comment says
    pair = ("resnet56", "resnet20")         # nothing with a method, nothing on ImageNet
    assert published(*pair, "kd", True, feature="crd") is None is logged(*pair, "kd", True, feature="crd")
    assert published(*pair, "none", data="imagenet", feature="crd") is None


# ---------------------------------------------------------------- newer methods


def test_the_newer_methods_have_their_papers_numbers():
    cifar, large = ("resnet32x4", "resnet8x4"), ("resnet50", "MobileNetV1")
    for of, data, wanted in (
            ((*cifar, "dist"), "cifar100", dict(base_temp=4, kd_weight=2, ce_weight=1, beta=2, gamma=2)),
            ((*large, "dist"), "imagenet", dict(base_temp=1, kd_weight=2, ce_weight=1, beta=1, gamma=1)),
            ((*cifar, "rld"), "cifar100", dict(base_temp=4, kd_weight=1, alpha=1, beta=8, warmup=20)),
            ((*large, "rld"), "imagenet", dict(base_temp=1, kd_weight=1, alpha=1, beta=2, warmup=1)),
            (("resnet34", "resnet18", "rld"), "imagenet", dict(beta=0.5))):
        found = recipe(*of, data=data)
        assert found == found | wanted, of
    assert recipe(*cifar, "kd", True, entropy=True) == recipe(*cifar, "kd", True) | {"entropy_temp": 3.0}
    assert recipe(*large, "kd", data="imagenet", entropy=True)["entropy_temp"] == 2.0
    ea = {"entropy_temp": 3.0, "zscore_relations": False}       # EA-KD's code: raw relations, weight 4
    assert recipe(*cifar, "mlkd", entropy=True) == recipe(*cifar, "mlkd") | ea
    ea["kd_weight"] = 4.0
    assert recipe(*cifar, "mlkd", True, entropy=True) == recipe(*cifar, "mlkd", True) | ea


def test_what_is_published_of_the_newer_methods():
    cifar, large = ("resnet32x4", "resnet8x4"), ("resnet34", "resnet18")
    assert [published(*cifar, m) for m in ("dist", "rld")] == [76.31, 76.64]
    assert [published(*large, m, data="imagenet") for m in ("dist", "rld")] == [72.07, 71.91]
    assert [published(*cifar, "kd", z, entropy=True) for z in (False, True)] == [75.46, None]
    assert [published(*cifar, "mlkd", z, entropy=True) for z in (False, True)] == [77.65, 78.38]
    assert published("vgg13", "vgg8", "dist") is None and published(*cifar, "dist", True) is None
    of = {"teacher": cifar[0], "student": cifar[1], "method": "mlkd", "zscore": True}
    assert recipes.results_of(of) == {"published": 78.28, "logged": 78.17}
    assert recipes.results_of(of | {"entropy_temp": 3.0}) == {"published": 78.38, "logged": None}
    assert recipes.results_of(of | {"method": "none", "zscore": False, "feature": "crd"})["published"] is None


# ---------------------------------------------------------------- names and the list


def test_names_of_methods():
    for name, displayed in {
            "none": "from scratch", "kd-z": "KD+Z", "mlkd-z-released": "MLKD+Z, released",
            "kd-z-ea": "KD+Z, EA", "crd": "CRD",
            "dkd-z-reviewkd": "DKD+Z and ReviewKD", "dist": "DIST"}.items():
        assert recipes.display_name(name) == displayed
    for name in recipes.NAMES:      # every name is that of its recipe
        method, z, released, feature, entropy = parse_method(name)
        found = recipe("resnet32x4", "resnet8x4", method, z, feature=feature, entropy=entropy)
        assert recipes.method_name(found | {"method": method, "zscore": z}) == name.removesuffix("-released")
        assert released == name.endswith("-released")
    assert len({*recipes.NAMES}) == len(recipes.NAMES)


def test_the_logs_losses_are_the_logs(shared):
    """What a first epoch is compared with."""
    short = {"res110": "resnet110", "res20": "resnet20", "res32": "resnet32", "res50": "ResNet50",
             "mv2": "MobileNetV2"}
    logs = json.loads((shared / "reference" / "log_milestones.json").read_text())
    for key, log in logs.items():
        method, teacher, student, *_ = (short.get(word, word) for word in key.split(","))
        row = TABLES["cifar100"]["logs"][f"{teacher}-{student}-{method}-z"]
        assert [row[f"loss_{i}"] for i in "123"] == [log["train_loss"][i] for i in "123"], key
        assert row["mean_20"] == pytest.approx(log["test_acc"]["last 20, mean"], abs=0.0051), key
    assert len(logs) == 40


def test_the_list_is_this_files_tables():
    text, large = table(), table("imagenet")
    assert "resnet32x4-ShuffleV2-mlkd  -     0.01   960" in text and "76.31  76.64  75.46" in text
    assert "AT of resnet110 -> resnet20 is" in text and "resnet34" not in text
    assert "71.03  71.42" in large and "72.07  71.91" in large and "resnet56-resnet20" not in large
    for listed in (text, large):
        assert "NOTES.md" in listed and "# ?" in listed and "def " not in listed


def resolved(teacher="resnet32x4", student="resnet8x4", method="kd", zscore=True, **values):
    """A run's recipe as the scripts resolve it."""
    source, data = (values.pop(k, usual) for k, usual in (("source", "authors"), ("rules", "cifar100")))
    found = recipe(teacher, student, method, zscore, source, data, values.get("feature"),
                   bool(values.pop("entropy", False)))
    return {"teacher": teacher, "student": student, "method": method, "zscore": zscore, **found,
            "full_epochs": found["epochs"], "precision": "fp32", "seed": 0, "data": "cifar100",
            "train_images": None, "val_from_train": 0, "teacher_sha256": "a93aca9c131b"} | values


@pytest.mark.parametrize("values, name", [
    ({}, "resnet32x4-resnet8x4-kd-z-seed0"),
    ({"base_temp": 1.5, "seed": 3}, "resnet32x4-resnet8x4-kd-z-tau1.5-seed3"),
    ({"epochs": 12, "train_images": 15000}, "resnet32x4-resnet8x4-kd-z-12epochs-15000images-seed0"),
    ({"method": "dkd", "base_temp": 4.0, "kd_weight": 0.9, "ce_weight": 0.5, "alpha": 2.0, "beta": 6.0,
      "lr": 1e-5, "weight_decay": 0.0, "batch_size": 128, "epochs": 3, "train_images": 2000000,
      "val_from_train": 5000},
     "resnet32x4-resnet8x4-dkd-z-tau4-kd0.9-ce0.5-alpha2-beta6-lr1e-05-wd0-batch128-3epochs-2000000images-"
     "5000val-seed0"),
    ({"precision": "bf16", "source": "released"}, "resnet32x4-resnet8x4-kd-z-bf16-released-seed0"),
    ({"method": "none", "zscore": False, "teacher": None}, "resnet8x4-none-seed0"),
    ({"feature": "crd", "entropy": True}, "resnet32x4-resnet8x4-kd-z-ea-crd-seed0"),
    ({"data": "folder", "folder": "birds", "size": 64}, "resnet32x4-resnet8x4-kd-z-64px-birds-seed0"),
    ({"data": "folder", "folder": "birds", "size": 32}, "resnet32x4-resnet8x4-kd-z-birds-seed0"),
    ({"teacher": "my/nets.py:big", "student": "timm:a/b", "student_sha256": "0123456789"},
     "nets-big-timm-a-b@012345-kd-z-seed0"),
])
def test_a_runs_folder_is_named_by_what_differs_from_the_recipe(values, name):
    assert recipes.run_name(resolved(**values)) == name


def test_a_runs_name_with_a_teachers_file_another_device_imagenets_rules_and_a_hash_past_120_characters():
    assert recipes.run_name(resolved(), teacher_file=True) == "resnet32x4@a93aca-resnet8x4-kd-z-seed0"
    assert recipes.run_name(resolved(), precision="bf16") == "resnet32x4-resnet8x4-kd-z-fp32-seed0"
    large = resolved("resnet34", "resnet18", rules="imagenet", data="photos", size=224)
    assert recipes.run_name(large, "imagenet") == "resnet34-resnet18-kd-z-photos-seed0"
    assert recipes.run_name(large | {"size": 192}, "imagenet") == "resnet34-resnet18-kd-z-192px-photos-seed0"
    names = {recipes.run_name(resolved(data="folder", folder="x" * 120, seed=seed)) for seed in range(3)}
    assert len(names) == 3 and {len(name) for name in names} == {128}
