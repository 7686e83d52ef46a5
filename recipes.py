"""The papers' hyper-parameters and published accuracies, pair by pair, on CIFAR-100 and ImageNet.

`recipe(teacher, student, method, zscore)` gives every number of a run. Two sources differ here and there:
"authors" (the default) is what the names of the authors' training logs say, "released" is what their released
code runs when no value is given (CIFAR-100). A "?" in a comment marks a column with doubtful values; NOTES.md
has the reasons. `data` is "cifar100" or "imagenet"; any other data set takes CIFAR-100's rules.
"""

import hashlib
import math
import re
from bisect import bisect_left
from pathlib import Path

METHODS = ("none", "kd", "dkd", "mlkd", "ctkd", "ttm", "wttm", "dist", "rld")
FEATURE_NAMES = {"fitnet": "FitNet", "at": "AT", "rkd": "RKD", "crd": "CRD", "ofd": "OFD",
                 "reviewkd": "ReviewKD", "simkd": "SimKD", "catkd": "CAT-KD"}
FEATURES = tuple(FEATURE_NAMES)
SOURCES = ("authors", "released")
COLUMNS = ("kd", "kd-z", "ctkd", "ctkd-z", "dkd", "dkd-z", "mlkd", "mlkd-z", "ttm", "wttm")
NEWER_COLUMNS = ("dist", "rld", "kd-ea", "mlkd-ea", "mlkd-z-ea")    # of other papers, in NEWER
LOGGED_COLUMNS = ("kd-z", "ctkd-z", "dkd-z", "mlkd-z")
NAMES = ("none", *(name + end for name in COLUMNS for end in ("", "-released")),    # in the tables' order
         "dist", "dist-z", "rld", "rld-z", *(f"{name}-ea" for name in (*COLUMNS, "rld", "rld-z")),
         *FEATURES, *(f"{name}-{feature}" for name in COLUMNS for feature in FEATURES))
# fmt: off
# ---- CIFAR-100. "?": doubtful values in this row or column, see NOTES.md.
# MobileNets and ShuffleNets take a learning rate of 0.01, the field's rule.
CIFAR_100 = {"lr": 0.05, "epochs": 240, "stages": (150, 180, 210), "batch_size": 64, "momentum": 0.9,
             "weight_decay": 5e-4}
# Temperature tau, lambda_KD, lambda_CE where PAIRS has nothing else. Plain KD is the published baseline,
# mdistiller's. TTM's tau is 1 / exponent.
NUMBERS = {
    "none":   (None, 0.0, 1.0),
    "kd":     (4.0, 0.9, 0.1),
    "kd-z": (2.0, 9.0, 0.1),      # ? lambda_CE
    "ctkd":   (1.0, 0.9, 0.1),
    "ctkd-z": (2.0, 9.0, 0.1),      # ? tau and span
    "dkd":    (4.0, 1.0, 1.0),
    "dkd-z":  (2.0, 9.0, 1.0),
    "mlkd":   (4.0, 0.9, 0.1),      # ? learning rate and epochs, in PAIRS
    "mlkd-z": (2.0, 9.0, 0.1),      # ?
    "ttm":    (10.0, 45.0, 1.0),    # ?
    "wttm":   (5.0, 4.0, 1.0),      # ?
    "dist":   (4.0, 2.0, 1.0),
    "dist-z": (2.0, 2.0, 1.0),      # ?
    "rld":    (4.0, 1.0, 1.0),
    "rld-z":  (2.0, 9.0, 1.0),      # ?
}
# The methods' own numbers; lambda_KD multiplies alpha and beta. CTKD's temperatures are tau to tau + span.
# ramp and warmup count epochs.
METHOD_NUMBERS = {
    "ctkd":   {"span": 20.0, "ramp": 10},
    "ctkd-z": {"span": 40.0},
    "dkd":    {"alpha": 1.0, "beta": 8.0, "warmup": 20},    # ? beta, without one in PAIRS
    "mlkd":   {"zscore_relations": False},
    "mlkd-z": {"zscore_relations": True},                   # ?
    "dist":   {"beta": 2.0, "gamma": 2.0},
    "rld":    {"alpha": 1.0, "beta": 8.0, "warmup": 20},
}
# The released code's defaults, where they differ; it takes NUMBERS for every pair.
RELEASED = {
    "kd":     {"base_temp": 2.0, "kd_weight": 9.0},
    "ctkd-z": {"base_temp": 1.0, "span": 20.0},
    "mlkd":   {"base_temp": 2.0, "kd_weight": 9.0},
    "mlkd-z": {"zscore_relations": False},
}
# From the logs' names: (tau, lambda_KD[, beta]); lambda multiplies DKD's alpha (1) and beta. MLKD+Z: (tau,
# lambda, learning rate, epochs). DKD's beta without Z is the released configuration's; without one 8 is run.
# Then the last epochs of those logs, top-1 in %, what a last-epoch result compares with: the mean where a log
# holds two runs, None where there is no log. No baseline has one.
PAIRS = {
    # pair                   KD+Z?    DKD?  DKD+Z?       MLKD+Z?             KD+Z   CTKD+Z DKD+Z  MLKD+Z
    "resnet32x4-resnet8x4": ((2, 9),  8,    (2,  9, 8),  (2, 9, 0.025, 480), 76.28, 76.09, 76.93, 78.17),
    "vgg13-vgg8":           ((3, 9),  6,    (2, 15, 2),  (2, 6, 0.010, 480), 74.50, 74.50, 74.53, 74.79),
    "wrn_40_2-wrn_40_1":    ((2, 9),  6,    (2, 12, 2),  (2, 9, 0.025, 480), 74.20, 74.50, 74.60, 74.97),
    "wrn_40_2-wrn_16_2":    ((2, 9),  6,    (2, 12, 2),  (2, 9, 0.025, 480), 75.59, 75.69, 76.05, 76.54),
    "resnet56-resnet20":    ((2, 9),  2,    (3, 18, 2),  (2, 9, 0.025, 480), 71.37, 70.94, 71.82, None),
    "resnet110-resnet32":   ((2, 9),  2,    (2, 15, 2),  (2, 9, 0.025, 480), 74.01, 73.72, 73.80, 73.88),
    "resnet110-resnet20":   ((4, 12), None, (2, 15, 2),  (2, 9, 0.025, 480), 71.22, 71.22, 71.37, 71.92),
    "resnet32x4-ShuffleV2": ((2, 9),  8,    (2,  9, 8),  (2, 6, 0.010, 960), 75.58, 76.46, 76.92, 77.89),
    "resnet32x4-wrn_16_2":  ((3, 9),  None, (2,  9, 2),  (2, 9, 0.025, 480), 75.82, 74.72, 75.68, 77.19),
    "resnet32x4-wrn_40_2":  ((3, 9),  None, (2,  9, 8),  (2, 9, 0.025, 480), 77.98, 78.40, 78.79, 79.27),
    "wrn_40_2-resnet8x4":   ((2, 9),  None, (2, 18, 2),  (2, 9, 0.025, 480), 76.69, 76.62, 76.72, 77.47),
    "wrn_40_2-MobileNetV2": ((3, 9),  None, (2, 15, 2),  (2, 9, 0.005, 480), 69.35, 69.91, 70.11, None),
    "vgg13-MobileNetV2":    ((3, 9),  6,    (3,  9, 2),  (2, 6, 0.010, 480), 69.09, 69.08, 69.88, 70.54),
    "ResNet50-MobileNetV2": ((3, 1),  8,    (2, 15, 2),  (2, 9, 0.010, 480), 69.03, 69.78, 70.77, 71.31),
}
UNPUBLISHED = ((2, 9), None, (2, 9, 8), (2, 9, 0.025, 480))      # any other pair
# Feature methods: one weight for every pair but for ReviewKD and CAT-KD (weight, side of the pooled maps,
# whether they are normalised), from their authors' scripts. feature_ramp counts epochs.
FEATURE_WEIGHTS = {"fitnet": 100.0, "at": 1000.0, "rkd": 1.0, "crd": 0.8, "ofd": 0.001, "simkd": 1.0}
FEATURE_NUMBERS = {"reviewkd": {"feature_ramp": 20}, "simkd": {"factor": 2, "ce_weight": 0.0}}
FEATURE_PAIRS = {
    # pair                   ReviewKD, CAT-KD
    "resnet32x4-resnet8x4": (5,       15,  2, False),
    "vgg13-vgg8":           (5,       4.5, 2, False),     # ReviewKD: ?
    "wrn_40_2-wrn_40_1":    (5,       1.5, 2, False),
    "wrn_40_2-wrn_16_2":    (5,       12,  2, False),
    "resnet56-resnet20":    (0.6,     0.7, 2, False),
    "resnet110-resnet32":   (1,       1.8, 2, False),
    "resnet32x4-ShuffleV1": (5,       600, 4, True),
    "resnet32x4-ShuffleV2": (8,       600, 4, True),
    "wrn_40_2-ShuffleV1":   (5,       80,  4, True),
    "vgg13-MobileNetV2":    (5,       15,  2, True),     # ReviewKD: ?
    "ResNet50-MobileNetV2": (5,       40,  2, True),     # ReviewKD: ?
}
NARROW = [f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)]
# Published top-1, %: networks from scratch, then students. The papers' Z rows are near the best epoch on the
# test split, not the last.
VANILLA = {
    "wrn_40_2": 75.61, "resnet56": 72.34, "resnet110": 74.31, "resnet32x4": 79.42, "vgg13": 74.64,
    "ResNet50": 79.34, "wrn_16_2": 73.26, "wrn_40_1": 71.98, "resnet20": 69.06, "resnet32": 71.14,
    "resnet8x4": 72.50, "vgg8": 70.36, "MobileNetV2": 64.60, "ShuffleV1": 70.50, "ShuffleV2": 71.82,
}
PUBLISHED = {
    # pair                   KD     KD+Z   CTKD   CTKD+Z DKD    DKD+Z  MLKD   MLKD+Z TTM    WTTM
    "resnet32x4-resnet8x4": (73.33, 76.62, 73.39, 76.67, 76.32, 77.01, 77.08, 78.28, 76.17, 76.06),
    "vgg13-vgg8":           (72.98, 74.36, 73.52, 74.47, 74.68, 74.81, 75.18, 75.22, 74.33, 74.44),
    "wrn_40_2-wrn_40_1":    (73.54, 74.37, 73.93, 74.58, 74.81, 74.89, 75.35, 75.56, 74.32, 74.58),
    "wrn_40_2-wrn_16_2":    (74.92, 76.11, 75.45, 76.08, 76.24, 76.39, 76.63, 76.95, 76.23, 76.37),
    "resnet56-resnet20":    (70.66, 71.43, 71.19, 71.34, 71.97, 72.32, 72.19, 72.33, 71.83, 71.92),
    "resnet110-resnet32":   (73.08, 74.17, 73.52, 74.01, 74.11, 74.29, 74.11, 74.32, 73.97, 74.13),
    "resnet110-resnet20":   (70.67, 71.48, 70.99, 71.39, 71.06, 71.85, 71.89, 72.27, 71.46, 71.67),
    "resnet32x4-ShuffleV2": (74.45, 75.56, 75.37, 76.18, 77.07, 77.37, 78.44, 78.76, 76.57, 76.55),
    "resnet32x4-wrn_16_2":  (74.90, 75.26, 74.57, 75.16, 75.70, 76.19, 76.52, 77.53, None , None),
    "resnet32x4-wrn_40_2":  (77.70, 77.92, 77.66, 77.99, 78.46, 78.95, 79.26, 79.66, None , None),
    "wrn_40_2-resnet8x4":   (73.97, 77.11, 74.61, 77.03, 75.56, 76.75, 77.33, 77.68, None , None),
    "wrn_40_2-MobileNetV2": (68.36, 69.23, 68.34, 69.53, 69.28, 70.01, 70.78, 71.61, None , None),
    "vgg13-MobileNetV2":    (67.37, 68.61, 68.50, 68.98, 69.71, 69.98, 70.57, 70.94, 68.98, 69.16),
    "ResNet50-MobileNetV2": (67.35, 69.02, 68.67, 69.36, 70.35, 70.45, 71.04, 71.19, 69.24, 69.59),
}
# FitNet, AT, RKD, CRD: last epochs, from RepDistiller's README (AT of resnet110 -> resnet20 is 70.22 there).
# SimKD, CAT-KD: best epochs on the test split; OFD, ReviewKD: not known. The rows of resnet32x4 -> WRN are
# in no repository. OFD and ReviewKD were probably run with their authors' recipes; SimKD's WRNs are other
# networks (its file resnet38x2). One recipe for all differs by more than 0.2 in places without being wrong.
FEATURE_PUBLISHED = {   # the poster's
    # pair                   FitNet AT     RKD    CRD    OFD    ReviewKD SimKD CAT-KD
    "resnet32x4-ShuffleV2": (73.54, 72.73, 73.21, 75.65, 76.82, 77.78, 78.39, 78.41),
    "resnet32x4-wrn_16_2":  (74.70, 73.91, 74.86, 75.65, 76.17, 76.11, 77.17, 76.97),
    "resnet32x4-wrn_40_2":  (77.69, 77.43, 77.82, 78.15, 79.25, 78.96, 79.29, 78.59),
    "wrn_40_2-wrn_16_2":    (73.58, 74.08, 73.35, 75.48, 75.24, 76.12, 75.53, 75.60),
    "resnet56-resnet20":    (69.21, 70.55, 69.61, 71.16, 70.98, 71.89, 71.05, 71.62),
    "resnet110-resnet32":   (71.06, 72.31, 71.82, 73.48, 73.23, 73.89, 73.92, 73.62),
    "resnet110-resnet20":   (68.99, 70.65, 69.25, 71.46, 71.29, 71.34, 71.06, 71.37),
}
# ---- ImageNet. "?": doubtful values in this row, see NOTES.md.
IMAGE_NET = {"lr": 0.2, "epochs": 100, "stages": (30, 60, 90), "batch_size": 512, "momentum": 0.9,
             "weight_decay": 1e-4}
# tau, lambda_KD, lambda_CE; the methods that are not here have those of CIFAR-100.
IMAGENET_NUMBERS = {
    "kd":     (1.0, 0.5, 0.5),      # ? lambda_CE
    "kd-z": (2.0, 9.0, 0.5),      # ? lambda_CE
    "ctkd":   (1.0, 1.0, 1.0),      # ?
    "ctkd-z": (2.0, 9.0, 1.0),      # ?
    "dkd":    (1.0, 1.0, 1.0),      # DKD+Z, TTM, WTTM: ?
    "mlkd":   (1.0, 0.5, 0.5),
    "mlkd-z": (2.0, 9.0, 0.5),      # ?
    "dist":   (1.0, 2.0, 1.0),
    "dist-z": (1.0, 2.0, 1.0),      # ?
    "rld":    (1.0, 1.0, 1.0),      # RLD+Z: ?
}
IMAGENET_METHOD_NUMBERS = {
    "ctkd": {"ramp": 5},
    "dkd":  {"beta": 0.5, "warmup": 1},
    "mlkd": {"lr": 0.1},
    "dist": {"beta": 1.0, "gamma": 1.0},
    "rld":  {"beta": 0.5, "warmup": 1},
}
RESNET50_NUMBERS = {"dkd": {"beta": 2.0}, "mlkd": {"lr": 0.2}, "rld": {"beta": 2.0}}    # with this teacher
# Published top-1, %; teachers are torchvision's IMAGENET1K_V1. WTTM's top-5 is not published; one log is.
IMAGENET_VANILLA = {"resnet34": 73.31, "resnet18": 69.75, "resnet50": 76.16, "MobileNetV1": 68.87}
IMAGENET = {
    "resnet34-resnet18":    (71.03, 71.42, 71.38, 71.81, 71.70, 71.88, 71.90, 72.08, None,  72.19),
    "resnet50-MobileNetV1": (70.50, 72.18, 71.16, 72.92, 72.05, 72.85, 73.01, 73.22, None,  73.09),
}
IMAGENET_TOP5 = {   # teacher, student without one, then the same columns
    "resnet34-resnet18":    (91.42, 89.07, 90.05, 90.29, 90.27, 90.46, 90.41, 90.58, 90.55, 90.74),
    "resnet50-MobileNetV1": (92.86, 88.76, 89.80, 90.80, 90.11, 91.25, 91.05, 91.23, 91.42, 91.59),
}
IMAGENET_LOGGED = {"resnet34-resnet18": (71.26, None, None, None)}
# ---- Newer methods, both data sets. DIST: its paper's; RLD: its paper's on CIFAR-100; the others: read in
# another paper. In no paper (?): TTM, WTTM, DIST and RLD with Z, EA-KD with others than these and DKD.
NEWER = {
    # pair                   DIST   RLD    EA: KD MLKD   MLKD+Z
    "resnet32x4-resnet8x4": (76.31, 76.64, 75.46, 77.65, 78.38),
    "resnet34-resnet18":    (72.07, 71.91, 71.79, None,  None),
    "resnet50-MobileNetV1": (73.24, 72.75, None,  None,  None),
}
# fmt: on


def method_name(run):
    """The name of a run's method in the tables: "kd", "kd-z", "kd-z-ea", "kd-z-crd"; "crd"."""
    name = run["method"]
    if run["zscore"]:
        name += "-z"
    if run.get("entropy_temp"):
        name += "-ea"
    feature = run.get("feature")
    if feature is None:
        return name
    return feature if name == "none" else f"{name}-{feature}"


def parse_method(name):
    """(method, zscore, released, feature, entropy) of a method's name, "-released" at its end or not."""
    method, *rest = name.split("-")
    feature = next((word for word in (method, *rest) if word in FEATURES), None)
    if method == feature:
        method = "none"
    return method, "z" in rest, "released" in rest, feature, "ea" in rest


def display_name(name):
    """A method in tables: "from scratch", "KD+Z", "MLKD+Z, released", "KD, EA", "CRD", "KD+Z and CRD"."""
    method, zscore, released, feature, entropy = parse_method(name)
    text = "from scratch" if method == "none" else method.upper()
    if zscore:
        text += "+Z"
    if entropy:
        text += ", EA"
    if feature:
        text = FEATURE_NAMES[feature] if method == "none" else f"{text} and {FEATURE_NAMES[feature]}"
    return f"{text}, released" if released else text


def recipe(teacher, student, method, zscore=False, source="authors", data="cifar100", feature=None,
           entropy=False):
    """Every number of one run, a dict. ValueError for an unknown method or feature.

    known: whether a paper has this pair, without a method this student. base_temp: tau of every method.
    stages: epochs after which lr is divided by ten. alpha, beta: before kd_weight multiplies both. span:
    CTKD's range of temperatures above base_temp. resolution, normalize: CAT-KD's maps. factor: how much
    narrower SimKD's projector is inside. source: only where it is not "authors".
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if feature not in (None, *FEATURES):
        raise ValueError(f"unknown feature {feature!r}; known: {', '.join(FEATURES)}")
    name = f"{method}-z" if zscore else method
    imagenet = data == "imagenet"
    rows = NUMBERS | IMAGENET_NUMBERS if imagenet else NUMBERS
    pair = {"teacher": teacher, "student": student, "method": method, "feature": feature}
    numbers = {"known": known(pair, data)} | (IMAGE_NET if imagenet else CIFAR_100)
    numbers |= zip(("base_temp", "kd_weight", "ce_weight"), rows.get(name, rows[method]))
    numbers |= METHOD_NUMBERS.get(method, {}) | METHOD_NUMBERS.get(name, {})
    if not imagenet:
        numbers |= _cifar(teacher, student, name, source)
    else:
        numbers |= IMAGENET_METHOD_NUMBERS.get(method, {})
        if teacher == "resnet50":
            numbers |= RESNET50_NUMBERS.get(method, {})
    if entropy:     # as EA-KD's code: MLKD's relations of raw probabilities
        numbers["entropy_temp"] = 2.0 if imagenet else 3.0
        if method == "mlkd":
            numbers["zscore_relations"] = False
        if name == "mlkd-z" and not imagenet:
            numbers["kd_weight"] = 4.0
    if feature:
        numbers |= _feature(teacher, student, feature)
    if source != "authors":
        numbers["source"] = source
    return numbers


def _cifar(teacher, student, name, source):
    """What a pair has of its own on CIFAR-100; one that no paper has takes tau 2 and weight 9 with Z."""
    kd_z, beta, dkd_z, (*mlkd_z, lr, epochs) = PAIRS.get(f"{teacher}-{student}", UNPUBLISHED)[:4]
    numbers = {}
    if student.startswith(("MobileNet", "Shuffle")):
        numbers["lr"] = 0.01
    if name.startswith("dkd") and beta:
        numbers["beta"] = float(beta)
    if name.startswith("mlkd"):
        numbers |= {"lr": min(lr, numbers.get("lr", lr)), "epochs": epochs}
    if source == "released":
        return numbers | RELEASED.get(name, {})
    of_the_log = {"kd-z": kd_z, "dkd-z": dkd_z, "mlkd-z": mlkd_z}.get(name, ())
    return numbers | dict(zip(("base_temp", "kd_weight", "beta"), map(float, of_the_log)))


def _feature(teacher, student, feature):
    """What a feature adds to a pair's recipe; where nothing is published, the numbers of a pair like it."""
    row = FEATURE_PAIRS.get(f"{teacher}-{student}", FEATURE_PAIRS[_similar_pair(teacher, student)])
    review_weight, cat_weight, side, normalize = row
    weights = FEATURE_WEIGHTS | {"reviewkd": review_weight, "catkd": cat_weight}
    numbers = {"feature": feature, "feature_weight": float(weights[feature])}
    if feature == "catkd":
        numbers |= {"resolution": side, "normalize": normalize}
    return numbers | FEATURE_NUMBERS.get(feature, {})


def _similar_pair(teacher, student):
    if teacher in NARROW and student in NARROW:
        return "resnet56-resnet20"
    kinds = {re.match("[a-z]*", name.lower())[0].replace("wrn", "resnet") for name in (teacher, student)}
    if len(kinds) == 1:
        return "resnet32x4-resnet8x4"
    return "ResNet50-MobileNetV2" if "mobilenet" in student.lower() else "wrn_40_2-ShuffleV1"


def known(run, data="cifar100"):
    """Whether a paper has the pair of a run, without a teacher its student."""
    pair, imagenet = f"{run['teacher']}-{run['student']}", data == "imagenet"
    if run["method"] != "none":
        return pair in (IMAGENET if imagenet else PAIRS)
    if run.get("feature") is None:
        return run["student"] in (IMAGENET_VANILLA if imagenet else VANILLA)
    return pair in (IMAGENET if imagenet else PAIRS | FEATURE_PAIRS)


def published(teacher, student, method, zscore=False, data="cifar100", feature=None, entropy=False):
    """Published top-1 (%), "none": the student's from scratch, "teacher": the teacher's; None without one.

    With a feature the poster's, which has them without a method ("none") only.
    """
    name = method_name({"method": method, "zscore": zscore, "feature": feature, "entropy_temp": entropy})
    vanilla, tables = VANILLA, ((COLUMNS, PUBLISHED), (NEWER_COLUMNS, NEWER), (FEATURES, FEATURE_PUBLISHED))
    if data == "imagenet":
        vanilla, tables = IMAGENET_VANILLA, ((COLUMNS, IMAGENET), (NEWER_COLUMNS, NEWER))
    if method in ("none", "teacher") and feature is None:
        return vanilla.get(teacher if method == "teacher" else student)
    for columns, rows in tables:
        if name in columns and f"{teacher}-{student}" in rows:
            return rows[f"{teacher}-{student}"][columns.index(name)]
    return None


def logged(teacher, student, method, zscore=False, data="cifar100", feature=None, entropy=False):
    """Top-1 (%) of the last epoch of the authors' log; None where there is none, as for every feature."""
    name = method_name({"method": method, "zscore": zscore, "feature": feature, "entropy_temp": entropy})
    rows = IMAGENET_LOGGED if data == "imagenet" else PAIRS
    return dict(zip(LOGGED_COLUMNS, rows.get(f"{teacher}-{student}", ())[-4:])).get(name)


def results_of(run, data="cifar100"):
    """{"published", "logged"} of a run, top-1 (%) or None: see these functions."""
    of = (run["teacher"], run["student"], run["method"], run["zscore"], data, run.get("feature"),
          bool(run.get("entropy_temp")))
    return {"published": published(*of), "logged": logged(*of)}


# What a run's folder is named by where it differs from the pair's recipe, in this order.
NAME_PARTS = {"base_temp": "tau{:g}", "kd_weight": "kd{:g}", "ce_weight": "ce{:g}", "alpha": "alpha{:g}",
              "beta": "beta{:g}", "lr": "lr{:g}", "weight_decay": "wd{:g}", "batch_size": "batch{}",
              "epochs": "{}epochs", "train_images": "{}images", "val_from_train": "{}val", "size": "{}px",
              "precision": "{}", "source": "{}"}
LONGEST_NAME = 120      # characters; a hash replaces the rest


def run_name(run, data="cifar100", precision="fp32", teacher_file=False):
    """A run's folder: resnet32x4-resnet8x4-kd-z-tau1.5-seed0, the pair and what differs from its recipe.

    run: every resolved value. data: the recipe's, "cifar100" or "imagenet". precision: the device's default.
    teacher_file: whether the teacher's file was named; run["teacher_sha256"] is then part of the name.
    """
    usual = recipe(run["teacher"], run["student"], run["method"], run["zscore"],
                   run.get("source", "authors"), data, run.get("feature"), bool(run.get("entropy_temp")))
    usual |= {"train_images": None, "val_from_train": 0, "size": 224 if data == "imagenet" else 32,
              "precision": precision, "source": "authors"}
    parts = [_network(run["student"], run.get("student_sha256")), method_name(run)]
    if run["teacher"]:
        parts.insert(0, _network(run["teacher"], run["teacher_sha256"] if teacher_file else None))
    for key, form in NAME_PARTS.items():
        if key in run and run[key] != usual[key]:
            parts.append(form.format(run[key]))
    if run["data"] != "cifar100":
        parts.append(run.get("folder", run["data"]))
    name = "-".join([*parts, f"seed{run['seed']}"])
    if len(name) > LONGEST_NAME:
        name = name[:LONGEST_NAME] + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name


def _network(name, sha256):
    """A network in a name: resnet56, nets-tiny for my/nets.py:tiny, resnet56@a93aca for a file's weights."""
    where, colon, function = name.rpartition(":")
    if where.endswith(".py"):
        where = Path(where).stem
    label = re.sub(r"[^\w.-]", "-", where + colon + function)
    return f"{label}@{sha256[:6]}" if sha256 else label


def recipe_epoch(step, steps_per_epoch, recipe):
    """The epoch of the full-length recipe, from 1, that a step belongs to; the schedules count in it."""
    return step * recipe["full_epochs"] // (recipe["epochs"] * steps_per_epoch) + 1


def learning_rate(epoch, recipe):
    """x 0.1 after each of the recipe's stages."""
    return recipe["lr"] * 0.1 ** bisect_left(recipe["stages"], epoch)


def kd_weight(epoch, recipe):
    """lambda_KD, for DKD and RLD with their linear warm-up."""
    return recipe["kd_weight"] * min(epoch / recipe.get("warmup", 1), 1)


def reversal(epoch, recipe):
    """How much of the temperature's gradient CTKD reverses: a cosine from 0 to 1 over the recipe's ramp."""
    return (1 - math.cos(min(epoch / recipe["ramp"], 1) * math.pi)) / 2 if "ramp" in recipe else 0.0


def feature_weight(epoch, recipe):
    """The weight of the feature loss, for ReviewKD with its linear ramp; 0 without one."""
    return recipe.get("feature_weight", 0.0) * min(epoch / recipe.get("feature_ramp", 1), 1)


def schedule(epoch, recipe):
    """(learning rate, KD weight, reversal, feature weight) in an epoch of the recipe at full length."""
    return (learning_rate(epoch, recipe), kd_weight(epoch, recipe), reversal(epoch, recipe),
            feature_weight(epoch, recipe))


def ceiling(classes, base_temp):
    """The largest top probability of softmax(Z; tau) over K classes: of a one-hot row, Z = sqrt(K - 1)."""
    top, rest = math.sqrt(classes - 1) / base_temp, -1 / math.sqrt(classes - 1) / base_temp
    return 1 / (1 + (classes - 1) * math.exp(rest - top))


def suggested_temperature(classes):
    """The largest of some temperatures that leaves a ceiling of 0.6, what tau = 2 has of the papers' 100.

    From 10,000 classes on, where no real row comes near it, 0.5.
    """
    if classes >= 10_000:
        return 0.5
    return next((tau for tau in (2.0, 1.5, 1.0) if ceiling(classes, tau) >= 0.6), 1.0)


def table(data="cifar100"):
    """What `--list` prints: this file's own tables of a data set and of the newer methods."""
    source = Path(__file__).read_text(encoding="utf-8")
    cifar, imagenet, newer = re.split("^# ---- ", source.partition("# fmt: on")[0], flags=re.M)[1:]
    return f"# {imagenet if data == 'imagenet' else cifar}# {newer}"
