"""The papers' CIFAR-100 hyper-parameters and published accuracies, pair by pair.

`recipe(teacher, student, method, zscore)` gives every number of a run. Two sources differ here and there, and both are
rows: "authors" (the default) is what the names of the authors' training logs say, "released" is what their released code
runs when no value is given. What could not be settled is marked unsure, with the reason in `UNSURE`.

Common to all: SGD, momentum 0.9, weight decay 5e-4 on every parameter, batch 64 (the last batch of 16 too), learning
rate x 0.1 after epochs 150, 180 and 210.
"""

import math

EPOCHS, STAGES, BATCH_SIZE, MOMENTUM, WEIGHT_DECAY = 240, (150, 180, 210), 64, 0.9, 5e-4
METHODS = ("none", "kd", "dkd", "mlkd", "ctkd", "ttm", "wttm")
SOURCES = ("authors", "released")

# fmt: off
# (tau, lambda_KD[, beta]) from the logs' names; lambda multiplies DKD's alpha (1) and beta. DKD's beta without Z from the
# released configurations, None where there is none. MLKD: (tau, lambda, learning rate, epochs).
PAIRS = {
    # teacher, student              lr    KD+Z      DKD   DKD+Z        MLKD+Z               CTKD+Z
    ("resnet32x4", "resnet8x4"):   (0.05, (2, 9),   8,    (2,  9, 8),  (2, 9, 0.025, 480),  (2, 9)),
    ("vgg13", "vgg8"):             (0.05, (3, 9),   6,    (2, 15, 2),  (2, 6, 0.010, 480),  (2, 9)),
    ("wrn_40_2", "wrn_40_1"):      (0.05, (2, 9),   6,    (2, 12, 2),  (2, 9, 0.025, 480),  (2, 9)),
    ("wrn_40_2", "wrn_16_2"):      (0.05, (2, 9),   6,    (2, 12, 2),  (2, 9, 0.025, 480),  (2, 9)),
    ("resnet56", "resnet20"):      (0.05, (2, 9),   2,    (3, 18, 2),  (2, 9, 0.025, 480),  (2, 9)),
    ("resnet110", "resnet32"):     (0.05, (2, 9),   2,    (2, 15, 2),  (2, 9, 0.025, 480),  (2, 9)),
    ("resnet110", "resnet20"):     (0.05, (4, 12),  None, (2, 15, 2),  (2, 9, 0.025, 480),  (2, 9)),
    ("resnet32x4", "ShuffleV2"):   (0.01, (2, 9),   8,    (2,  9, 8),  (2, 6, 0.010, 960),  (2, 9)),
    ("resnet32x4", "wrn_16_2"):    (0.05, (3, 9),   None, (2,  9, 2),  (2, 9, 0.025, 480),  (2, 9)),
    ("resnet32x4", "wrn_40_2"):    (0.05, (3, 9),   None, (2,  9, 8),  (2, 9, 0.025, 480),  (2, 9)),
    ("wrn_40_2", "resnet8x4"):     (0.05, (2, 9),   None, (2, 18, 2),  (2, 9, 0.025, 480),  (2, 9)),
    ("wrn_40_2", "MobileNetV2"):   (0.01, (3, 9),   None, (2, 15, 2),  (2, 9, 0.005, 480),  (2, 9)),
    ("vgg13", "MobileNetV2"):      (0.01, (3, 9),   6,    (3,  9, 2),  (2, 6, 0.010, 480),  (2, 9)),
    ("ResNet50", "MobileNetV2"):   (0.01, (3, 1),   8,    (2, 15, 2),  (2, 9, 0.010, 480),  (2, 9)),
}

# Published top-1, %. The papers' Z rows lie near the best epoch on the test split, not the last.
ALONE = {
    "wrn_40_2": 75.61, "resnet56": 72.34, "resnet110": 74.31, "resnet32x4": 79.42, "vgg13": 74.64, "ResNet50": 79.34,
    "wrn_16_2": 73.26, "wrn_40_1": 71.98, "resnet20": 69.06, "resnet32": 71.14, "resnet8x4": 72.50, "vgg8": 70.36,
    "MobileNetV2": 64.60, "ShuffleV1": 70.50, "ShuffleV2": 71.82,
}
COLUMNS = ("kd", "kd-z", "ctkd", "ctkd-z", "dkd", "dkd-z", "mlkd", "mlkd-z", "ttm", "wttm")
PUBLISHED = {
    # teacher, student              KD     KD+Z   CTKD   CTKD+Z  DKD    DKD+Z  MLKD   MLKD+Z  TTM    WTTM
    ("resnet32x4", "resnet8x4"):   (73.33, 76.62, 73.39, 76.67,  76.32, 77.01, 77.08, 78.28,  76.17, 76.06),
    ("vgg13", "vgg8"):             (72.98, 74.36, 73.52, 74.47,  74.68, 74.81, 75.18, 75.22,  74.33, 74.44),
    ("wrn_40_2", "wrn_40_1"):      (73.54, 74.37, 73.93, 74.58,  74.81, 74.89, 75.35, 75.56,  74.32, 74.58),
    ("wrn_40_2", "wrn_16_2"):      (74.92, 76.11, 75.45, 76.08,  76.24, 76.39, 76.63, 76.95,  76.23, 76.37),
    ("resnet56", "resnet20"):      (70.66, 71.43, 71.19, 71.34,  71.97, 72.32, 72.19, 72.33,  71.83, 71.92),
    ("resnet110", "resnet32"):     (73.08, 74.17, 73.52, 74.01,  74.11, 74.29, 74.11, 74.32,  73.97, 74.13),
    ("resnet110", "resnet20"):     (70.67, 71.48, 70.99, 71.39,  71.06, 71.85, 71.89, 72.27,  71.46, 71.67),
    ("resnet32x4", "ShuffleV2"):   (74.45, 75.56, 75.37, 76.18,  77.07, 77.37, 78.44, 78.76,  76.57, 76.55),
    ("resnet32x4", "wrn_16_2"):    (74.90, 75.26, 74.57, 75.16,  75.70, 76.19, 76.52, 77.53,  None,  None),
    ("resnet32x4", "wrn_40_2"):    (77.70, 77.92, 77.66, 77.99,  78.46, 78.95, 79.26, 79.66,  None,  None),
    ("wrn_40_2", "resnet8x4"):     (73.97, 77.11, 74.61, 77.03,  75.56, 76.75, 77.33, 77.68,  None,  None),
    ("wrn_40_2", "MobileNetV2"):   (68.36, 69.23, 68.34, 69.53,  69.28, 70.01, 70.78, 71.61,  None,  None),
    ("vgg13", "MobileNetV2"):      (67.37, 68.61, 68.50, 68.98,  69.71, 69.98, 70.57, 70.94,  68.98, 69.16),
    ("ResNet50", "MobileNetV2"):   (67.35, 69.02, 68.67, 69.36,  70.35, 70.45, 71.04, 71.19,  69.24, 69.59),
}
# Last epoch of the authors' published logs, the number that a last-epoch result compares with; the mean where a log
# holds two runs; None where there is no log. No baseline has one.
LOGGED = {
    # teacher, student              KD+Z   CTKD+Z  DKD+Z  MLKD+Z
    ("resnet32x4", "resnet8x4"):   (76.28, 76.09,  76.93, 78.17),
    ("vgg13", "vgg8"):             (74.50, 74.50,  74.53, 74.79),
    ("wrn_40_2", "wrn_40_1"):      (74.20, 74.50,  74.60, 74.97),
    ("wrn_40_2", "wrn_16_2"):      (75.59, 75.69,  76.05, 76.54),
    ("resnet56", "resnet20"):      (71.37, 70.94,  71.82, None),
    ("resnet110", "resnet32"):     (74.01, 73.72,  73.80, 73.88),
    ("resnet110", "resnet20"):     (71.22, 71.22,  71.37, 71.92),
    ("resnet32x4", "ShuffleV2"):   (75.58, 76.46,  76.92, 77.89),
    ("resnet32x4", "wrn_16_2"):    (75.82, 74.72,  75.68, 77.19),
    ("resnet32x4", "wrn_40_2"):    (77.98, 78.40,  78.79, 79.27),
    ("wrn_40_2", "resnet8x4"):     (76.69, 76.62,  76.72, 77.47),
    ("wrn_40_2", "MobileNetV2"):   (69.35, 69.91,  70.11, None),
    ("vgg13", "MobileNetV2"):      (69.09, 69.08,  69.88, 70.54),
    ("ResNet50", "MobileNetV2"):   (69.03, 69.78,  70.77, 71.31),
}
# ImageNet, (top-1, top-5); teachers are torchvision's IMAGENET1K_V1. WTTM's top-5 is not published.
IMAGENET_COLUMNS = ("teacher", "none", "kd", "kd-z", "ctkd", "ctkd-z", "dkd", "dkd-z", "mlkd", "mlkd-z", "wttm")
IMAGENET = {pair: dict(zip(IMAGENET_COLUMNS, zip(top1, top5))) for pair, top1, top5 in (
    (("resnet34", "resnet18"),    (73.31, 69.75, 71.03, 71.42, 71.38, 71.81, 71.70, 71.88, 71.90, 72.08, 72.19),
                                  (91.42, 89.07, 90.05, 90.29, 90.27, 90.46, 90.41, 90.58, 90.55, 90.74, None)),
    (("resnet50", "MobileNetV1"), (76.16, 68.87, 70.50, 72.18, 71.16, 72.92, 72.05, 72.85, 73.01, 73.22, 73.09),
                                  (92.86, 88.76, 89.80, 90.80, 90.11, 91.25, 91.05, 91.23, 91.42, 91.59, None)),
)}
IMAGENET_LOGGED = {("resnet34", "resnet18", "kd-z"): 71.26}     # last epoch of the authors' log, top-1; there is one
# fmt: on
IMAGENET_UNSURE = {
    "kd": "the released configuration's cross-entropy weight was 0.5, and is 1 since May 2024; 0.5 is run",
    "kd-z": "the released configuration's cross-entropy weight was 0.5, and is 1 since May 2024; 0.5 is run",
    "dkd-z": "no numbers are published: temperature and weight are KD+Z's",
    "mlkd-z": "the released configuration does not run: temperature and weight are KD+Z's",
    "ctkd": "published with 120 epochs, batch 256, learning rate 0.1; here it takes KD's schedule",
    "ctkd-z": "the released script has 120 epochs, batch 256, learning rate 0.1, and a weight of 2 where 9 is meant; here it takes KD's "
              "schedule and weight, and span 40 as on CIFAR-100",
    "ttm": "no exponent and weight are published: those of CIFAR-100", "wttm": "no exponent and weight are published: those of CIFAR-100",
    "ttm-z": "no paper has it", "wttm-z": "no paper has it",
}

LOGGED_COLUMNS = ("kd-z", "ctkd-z", "dkd-z", "mlkd-z")
ANY = ("*", "*")        # stands for every pair in UNSURE
UNSURE = {
    (("resnet32x4", "ShuffleV2"), "kd-z"): "its log begins with a loss of 1.67, which a weight of 9 does not give: "
                                           "the weight was probably about 1",
    (("resnet56", "resnet20"), "mlkd-z"): "published without a log: 2, 9 is the code's default",
    (("wrn_40_2", "MobileNetV2"), "mlkd-z"): "published without a log: 2, 9 is the code's default",
    (ANY, "kd-z"): "the final losses of the authors' logs suggest a cross-entropy weight of 0.1 in some, 1 in others; 0.1 is run",
    (("resnet32x4", "resnet8x4"), "dkd-z"): "its log names no beta: 8 is the configuration's",
    (("resnet32x4", "ShuffleV2"), "dkd-z"): "its log names no beta: 8 is the configuration's",
    (ANY, "dkd-z"): "the third number in the logs' names is read as beta before the weight multiplies it",
    (ANY, "mlkd"): "learning rate and length are the released MLKD+Z's; the baseline's own repository went from 480 to 240 epochs for "
                   "some pairs",
    (ANY, "mlkd-z"): "which reading of the method was run is open: the first temperature 2 or 4, the cross-entropy "
                     "weight 0.1 or 1, the relations standardized or not",
    (ANY, "ctkd-z"): "start 2 and span 40 fit the logged temperatures; the released script has 1 and 20",
    (ANY, "ttm"): "not published per pair: exponent 0.1, weight 45 are those of vgg13 -> vgg8",
    (ANY, "wttm"): "not published per pair: exponent 0.2, weight 4 are those of vgg13 -> vgg8 with CRD",
    (ANY, "ttm-z"): "no paper has TTM with standardization: the numbers are TTM's",
    (ANY, "wttm-z"): "no paper has WTTM with standardization: the numbers are WTTM's",
    (ANY, "dkd"): "pairs without a released configuration take its default, beta 8",
}


def key(method, zscore):
    """The name of a method in the tables: "kd" or "kd-z"."""
    return f"{method}-z" if zscore else method


def usual_rate(student):
    """0.01 for the MobileNets and ShuffleNets, 0.05 for the rest: the field's rule for a student of any pair."""
    return 0.01 if student.startswith(("MobileNet", "Shuffle")) else 0.05


def unsure(teacher, student, method, zscore=False, source="authors"):
    """Why a row's numbers are in doubt, a list of reasons, empty where they are not. Released code leaves none, but for TTM, which it has not."""
    name, pair = key(method, zscore), (teacher, student)
    if source == "released" and method not in ("ttm", "wttm"):
        return []
    if name == "dkd" and PAIRS.get(pair, (None, None, None))[2] is not None or (pair, name) == (("vgg13", "vgg8"), "ttm"):
        return []
    return [UNSURE[p, name] for p in (pair, ANY) if (p, name) in UNSURE]


def recipe(teacher, student, method, zscore=False, source="authors"):
    """Every number of one run, a dict. A pair that no paper has takes temperature 2 and weight 9, and "known" is False.

    base_temp: tau, the temperature of every method. kd_weight: lambda_KD. alpha, beta: DKD's, before the weight that
    multiplies both with Z. warmup: epochs of DKD's ramp. span: CTKD's range of temperatures above base_temp.
    epochs: at full length; stages: those epochs after which the learning rate is divided by ten.
    """
    lr = usual_rate(student)
    unknown = (lr, (2, 9), None, (2, 9, 8), (2, 9, min(lr, 0.025), 480), (2, 9))
    lr, kd_z, beta, dkd_z, mlkd_z, ctkd_z = PAIRS.get((teacher, student), unknown)
    r = {"known": (teacher, student) in PAIRS, "lr": lr, "epochs": EPOCHS, "stages": STAGES, "batch_size": BATCH_SIZE,
         "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "base_temp": 4.0, "kd_weight": 0.9, "ce_weight": 0.1}
    released = source == "released"
    if method == "none":
        return r | {"known": student in ALONE, "base_temp": None, "kd_weight": 0.0, "ce_weight": 1.0}
    if method == "kd":
        # the published baseline is mdistiller's 4, 0.1, 0.9; the released code's defaults without its flag are 2, 0.1, 9
        temp, weight = (2, 9) if released else kd_z if zscore else (4, 0.9)
    elif method == "dkd":
        temp, weight = (2, 9) if released and zscore else dkd_z[:2] if zscore else (4, 1)
        r |= {"ce_weight": 1.0, "alpha": 1.0, "warmup": 20,
              "beta": float(dkd_z[2] if zscore and not released else 8 if beta is None else beta)}
    elif method == "mlkd":
        temp, weight = (2, 9) if released else mlkd_z[:2] if zscore else (4, 0.9)
        r |= {"lr": mlkd_z[2], "epochs": mlkd_z[3], "zscore_relations": zscore and not released}
    elif method == "ctkd":
        temp, weight = (1, 9) if released and zscore else ctkd_z if zscore else (1, 0.9)
        r |= {"span": 40.0 if zscore and not released else 20.0, "ramp": 10}
    elif method in ("ttm", "wttm"):
        temp, weight = (10, 45) if method == "ttm" else (5, 4)      # temperature = 1 / exponent
        r |= {"ce_weight": 1.0}
    else:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    return r | {"base_temp": float(temp), "kd_weight": float(weight)}


def recipe_epoch(step, steps_per_epoch, recipe):
    """The epoch of the recipe at full length, from 1, that a step belongs to: what the schedules below are counted in."""
    return step * recipe["full_epochs"] // (recipe["epochs"] * steps_per_epoch) + 1


def learning_rate(epoch, recipe):
    """x 0.1 after each of the recipe's stages."""
    return recipe["lr"] * 0.1 ** sum(epoch > stage for stage in recipe["stages"])


def kd_weight(epoch, recipe):
    """lambda_KD, for DKD with its linear warm-up."""
    return recipe["kd_weight"] * min(epoch / recipe.get("warmup", 1), 1)


def reversal(epoch, recipe):
    """How much of the temperature's gradient CTKD reverses: a cosine from 0 to 1 over the recipe's ramp."""
    return (1 - math.cos(min(epoch / recipe["ramp"], 1) * math.pi)) / 2 if "ramp" in recipe else 0.0


def imagenet(teacher, student, method, zscore=False):
    """Every number of one ImageNet run, as `recipe` gives them for CIFAR-100."""
    r = {"known": (teacher, student) in IMAGENET, "lr": 0.2, "epochs": 100, "stages": (30, 60, 90), "batch_size": 512,
         "momentum": MOMENTUM, "weight_decay": 1e-4, "base_temp": 1.0, "kd_weight": 0.5, "ce_weight": 0.5}
    if zscore:
        r |= {"base_temp": 2.0, "kd_weight": 9.0}
    if method == "none":
        r |= {"base_temp": None, "kd_weight": 0.0, "ce_weight": 1.0}
    elif method == "dkd":
        r |= {"ce_weight": 1.0, "alpha": 1.0, "beta": 2.0 if teacher == "resnet50" else 0.5, "warmup": 1}
        r |= {} if zscore else {"kd_weight": 1.0}
    elif method == "mlkd":
        r |= {"lr": 0.2 if teacher == "resnet50" else 0.1, "zscore_relations": zscore}
    elif method == "ctkd":
        r |= {"span": 40.0 if zscore else 20.0, "ramp": 5, "ce_weight": 1.0} | ({} if zscore else {"kd_weight": 1.0})
    elif method in ("ttm", "wttm"):
        r |= {"ce_weight": 1.0, "base_temp": 10.0 if method == "ttm" else 5.0, "kd_weight": 45.0 if method == "ttm" else 4.0}
    elif method != "kd":
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    return r


def imagenet_unsure(teacher, student, method, zscore=False):
    """Why the numbers of an ImageNet recipe are in doubt, or None."""
    return None if method == "kd" and teacher == "resnet50" else IMAGENET_UNSURE.get(key(method, zscore))


def imagenet_published(teacher, student, method, zscore=False):
    """(top-1, top-5) in %, of the student alone for "none"; None where there is none. WTTM's top-5 is None."""
    row = IMAGENET.get((teacher, student), {})
    if method == "none":
        return next((rows["none"] for (_, name), rows in IMAGENET.items() if name == student), None)
    return row.get(key(method, zscore))


def imagenet_logged(teacher, student, method, zscore=False):
    """The last epoch's top-1 (%) of the authors' log; None where there is none."""
    return IMAGENET_LOGGED.get((teacher, student, key(method, zscore)))


def imagenet_table():
    """What `--list` prints for ImageNet."""
    rows = [("teacher -> student, top-1 / top-5 (%)", *IMAGENET_COLUMNS)]
    for pair, row in IMAGENET.items():
        logged = {c: f" ({IMAGENET_LOGGED[*pair, c]:.2f})" if (*pair, c) in IMAGENET_LOGGED else "" for c in IMAGENET_COLUMNS}
        rows.append((" -> ".join(pair), *(" / ".join(f"{v:.2f}" for v in row[c] if v) + logged[c] for c in IMAGENET_COLUMNS)))
    recipes = [("method", "lr", "temperature", "KD weight", "CE weight", "unsure")]
    for method in METHODS[1:]:
        for zscore in (False, True):
            r = imagenet("resnet34", "resnet18", method, zscore)
            recipes.append((key(method, zscore), f"{r['lr']:g}", f"{r['base_temp']:g}", f"{r['kd_weight']:g}", f"{r['ce_weight']:g}",
                            imagenet_unsure("resnet34", "resnet18", method, zscore) or ""))
    return "\n".join(["Published, ImageNet; in brackets the last epoch of the authors' log, top-1.", "", *_aligned(rows), "", "Recipes of resnet34 -> resnet18: 100 epochs, batch 512, learning "
                      "rate x 0.1 after 30, 60 and 90, weight decay 1e-4; DKD's alpha 1, beta 0.5, a warm-up of 1 epoch.", "resnet50 -> MobileNetV1: the "
                      "same, but MLKD's learning rate 0.2, DKD's beta 2, and KD's cross-entropy weight is not in doubt.", "", *_aligned(recipes)])


def published(teacher, student, method, zscore=False):
    """The published top-1 (%) of a row, of the student alone for "none"; None where there is none."""
    if method == "none":
        return ALONE.get(student)
    row = dict(zip(COLUMNS, PUBLISHED.get((teacher, student), ())))
    return row.get(key(method, zscore))


def logged(teacher, student, method, zscore=False):
    """The last epoch's top-1 (%) of the authors' log; None where there is none."""
    return dict(zip(LOGGED_COLUMNS, LOGGED.get((teacher, student), ()))).get(key(method, zscore))


def table():
    """The recipes and the published accuracies as text, what `--list` prints."""
    def numbers(values):
        return ", ".join("-" if v is None else f"{v:g}" for v in values)

    lines = ["Recipes (authors): temperature, KD weight[, beta][, learning rate, epochs]. ? = unsure, see below.", ""]
    head = ("teacher -> student", "lr", "KD", "KD+Z", "DKD", "DKD+Z", "MLKD", "MLKD+Z", "CTKD", "CTKD+Z", "TTM", "WTTM")
    rows = [head]
    for teacher, student in PAIRS:
        row = [f"{teacher} -> {student}", f"{recipe(teacher, student, 'kd')['lr']:g}"]
        for name in ("kd", "kd-z", "dkd", "dkd-z", "mlkd", "mlkd-z", "ctkd", "ctkd-z", "ttm", "wttm"):
            method, zscore = name.removesuffix("-z"), name.endswith("-z")
            r = recipe(teacher, student, method, zscore)
            values = [r["base_temp"], r["kd_weight"]]
            if method == "dkd":
                values.append(r["beta"])
            if method == "mlkd":
                values += [r["lr"], r["epochs"]]
            row.append(numbers(values) + "?" * bool(unsure(teacher, student, method, zscore)))
        rows.append(row)
    row = ["any pair, released code", ""]
    for name in ("kd", "kd-z", "dkd", "dkd-z", "mlkd", "mlkd-z", "ctkd", "ctkd-z"):
        r = recipe("", "", name.removesuffix("-z"), name.endswith("-z"), "released")
        row.append(numbers([r["base_temp"], r["kd_weight"]]) + (", as left" if "dkd" in name else ""))
    rows.append(row + ["", ""])
    lines += _aligned(rows)

    lines += ["", "Cross-entropy weight: 0.1 for KD, MLKD and CTKD, 1 for DKD, TTM, WTTM and none.", "With Z the weight multiplies DKD's alpha (1) and beta.", "MLKD+Z, authors: relations standardized; released: raw. CTKD's temperature lies "
              "between the given one and it + 20 (+ 40 with Z, authors).", "", "Unsure:"]
    for (pair, name), reason in UNSURE.items():
        lines.append(f"  {name.upper().replace('-Z', '+Z')}, {'all pairs' if pair == ANY else ' -> '.join(pair)}: {reason}")

    lines += ["", "Published CIFAR-100 top-1, %; in brackets the last epoch of the authors' log.", ""]
    rows = [("teacher -> student", "teacher", "alone", *(c.upper().replace("-Z", "+Z") for c in COLUMNS))]
    for pair, accuracies in PUBLISHED.items():
        row = [" -> ".join(pair), *(f"{ALONE[name]:.2f}" for name in pair)]
        for name, value in zip(COLUMNS, accuracies):
            last = logged(*pair, name.removesuffix("-z"), name.endswith("-z"))
            row.append("-" if value is None else f"{value:.2f}" + (f" ({last:.2f})" if last else ""))
        rows.append(row)
    return "\n".join(lines + _aligned(rows))


def _aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
