"""The papers' hyper-parameters and published accuracies, pair by pair, on CIFAR-100 and ImageNet.

`recipe(teacher, student, method, zscore)` gives every number of a run. Two sources differ here and there:
"authors" (the default) is what the names of the authors' training logs say, "released" is what their released
code runs when no value is given (CIFAR-100). `unsure` gives the reasons for what could not be settled.
`data` is "cifar100" or "imagenet"; any other data set takes CIFAR-100's rules. `feature` adds one of the
FEATURES to a method: alone (method "none") it is the published baseline, cross-entropy and the feature loss.
"""

import hashlib
import math
import re
from pathlib import Path

METHODS = ("none", "kd", "dkd", "mlkd", "ctkd", "ttm", "wttm", "dist", "rld")
FEATURES = ("fitnet", "at", "rkd", "crd", "ofd", "reviewkd", "simkd", "catkd")
FEATURE_NAMES = dict(zip(FEATURES, ("FitNet", "AT", "RKD", "CRD", "OFD", "ReviewKD", "SimKD", "CAT-KD")))
SOURCES = ("authors", "released")
COLUMNS = ("kd", "kd-z", "ctkd", "ctkd-z", "dkd", "dkd-z", "mlkd", "mlkd-z", "ttm", "wttm")
NEWER_COLUMNS = ("dist", "rld", "kd-ea", "mlkd-ea", "mlkd-z-ea")    # of other papers, in NEWER
LOGGED_COLUMNS = ("kd-z", "ctkd-z", "dkd-z", "mlkd-z")
NAMES = ("none", *(name + end for name in COLUMNS for end in ("", "-released")),    # in the tables' order
         "dist", "dist-z", "rld", "rld-z", *(f"{name}-ea" for name in (*COLUMNS, "rld", "rld-z")),
         *FEATURES, *(f"{name}-{feature}" for name in COLUMNS for feature in FEATURES))

# Common to all runs of a data set; MobileNets and ShuffleNets take 0.01 on CIFAR-100, the field's rule.
CIFAR_100 = {"lr": 0.05, "epochs": 240, "stages": (150, 180, 210), "batch_size": 64, "momentum": 0.9,
             "weight_decay": 5e-4}
IMAGE_NET = {"lr": 0.2, "epochs": 100, "stages": (30, 60, 90), "batch_size": 512, "momentum": 0.9,
             "weight_decay": 1e-4}
# fmt: off
# Temperature tau, lambda_KD and lambda_CE where PAIRS has nothing else. Plain KD is the published baseline,
# mdistiller's; the released code's defaults without its flag are 2, 9, 0.1. TTM's tau is 1 / exponent.
NUMBERS = {
    #         authors         released        ImageNet
    "none":   ((None, 0, 1),  (None, 0, 1),   (None, 0, 1)),
    "kd":     ((4, 0.9, 0.1), (2, 9, 0.1),    (1, 0.5, 0.5)),
    "kd-z":   ((2, 9, 0.1),   (2, 9, 0.1),    (2, 9, 0.5)),
    "ctkd":   ((1, 0.9, 0.1), (1, 0.9, 0.1),  (1, 1, 1)),
    "ctkd-z": ((2, 9, 0.1),   (1, 9, 0.1),    (2, 9, 1)),
    "dkd":    ((4, 1, 1),     (4, 1, 1),      (1, 1, 1)),
    "dkd-z":  ((2, 9, 1),     (2, 9, 1),      (2, 9, 1)),
    "mlkd":   ((4, 0.9, 0.1), (2, 9, 0.1),    (1, 0.5, 0.5)),
    "mlkd-z": ((2, 9, 0.1),   (2, 9, 0.1),    (2, 9, 0.5)),
    "ttm":    ((10, 45, 1),) * 3,
    "wttm":   ((5, 4, 1),) * 3,
    "dist":   ((4, 2, 1),     (4, 2, 1),      (1, 2, 1)),
    "dist-z": ((2, 2, 1),     (2, 2, 1),      (1, 2, 1)),
    "rld":    ((4, 1, 1),     (4, 1, 1),      (1, 1, 1)),
    "rld-z":  ((2, 9, 1),     (2, 9, 1),      (2, 9, 1)),
}
# From the logs' names: (tau, lambda_KD[, beta]); lambda multiplies DKD's alpha (1) and beta. MLKD+Z: (tau,
# lambda, learning rate, epochs). DKD's beta without Z is the released configuration's; without one 8 is run.
# Then the last epochs of those logs, top-1 in %, what a last-epoch result compares with: the mean where a log
# holds two runs, None where there is no log. No baseline has one.
PAIRS = {
    # teacher, student            KD+Z     DKD   DKD+Z        MLKD+Z              KD+Z   CTKD+Z DKD+Z  MLKD+Z
    ("resnet32x4", "resnet8x4"): ((2, 9),  8,    (2,  9, 8),  (2, 9, 0.025, 480), 76.28, 76.09, 76.93, 78.17),
    ("vgg13", "vgg8"):           ((3, 9),  6,    (2, 15, 2),  (2, 6, 0.010, 480), 74.50, 74.50, 74.53, 74.79),
    ("wrn_40_2", "wrn_40_1"):    ((2, 9),  6,    (2, 12, 2),  (2, 9, 0.025, 480), 74.20, 74.50, 74.60, 74.97),
    ("wrn_40_2", "wrn_16_2"):    ((2, 9),  6,    (2, 12, 2),  (2, 9, 0.025, 480), 75.59, 75.69, 76.05, 76.54),
    ("resnet56", "resnet20"):    ((2, 9),  2,    (3, 18, 2),  (2, 9, 0.025, 480), 71.37, 70.94, 71.82, None),
    ("resnet110", "resnet32"):   ((2, 9),  2,    (2, 15, 2),  (2, 9, 0.025, 480), 74.01, 73.72, 73.80, 73.88),
    ("resnet110", "resnet20"):   ((4, 12), None, (2, 15, 2),  (2, 9, 0.025, 480), 71.22, 71.22, 71.37, 71.92),
    ("resnet32x4", "ShuffleV2"): ((2, 9),  8,    (2,  9, 8),  (2, 6, 0.010, 960), 75.58, 76.46, 76.92, 77.89),
    ("resnet32x4", "wrn_16_2"):  ((3, 9),  None, (2,  9, 2),  (2, 9, 0.025, 480), 75.82, 74.72, 75.68, 77.19),
    ("resnet32x4", "wrn_40_2"):  ((3, 9),  None, (2,  9, 8),  (2, 9, 0.025, 480), 77.98, 78.40, 78.79, 79.27),
    ("wrn_40_2", "resnet8x4"):   ((2, 9),  None, (2, 18, 2),  (2, 9, 0.025, 480), 76.69, 76.62, 76.72, 77.47),
    ("wrn_40_2", "MobileNetV2"): ((3, 9),  None, (2, 15, 2),  (2, 9, 0.005, 480), 69.35, 69.91, 70.11, None),
    ("vgg13", "MobileNetV2"):    ((3, 9),  6,    (3,  9, 2),  (2, 6, 0.010, 480), 69.09, 69.08, 69.88, 70.54),
    ("ResNet50", "MobileNetV2"): ((3, 1),  8,    (2, 15, 2),  (2, 9, 0.010, 480), 69.03, 69.78, 70.77, 71.31),
}
# Feature methods: one weight for every pair but for ReviewKD and CAT-KD (beta, side of the pooled maps,
# whether they are normalised), whose authors' scripts have these; None where they have none.
FEATURE_WEIGHTS = {"fitnet": 100, "at": 1000, "rkd": 1, "crd": 0.8, "ofd": 0.001, "simkd": 1}
FEATURE_PAIRS = {
    # teacher, student            ReviewKD  CAT-KD
    ("resnet32x4", "resnet8x4"): (5,        (15,  2, False)),
    ("vgg13", "vgg8"):           (None,     (4.5, 2, False)),
    ("wrn_40_2", "wrn_40_1"):    (5,        (1.5, 2, False)),
    ("wrn_40_2", "wrn_16_2"):    (5,        (12,  2, False)),
    ("resnet56", "resnet20"):    (0.6,      (0.7, 2, False)),
    ("resnet110", "resnet32"):   (1,        (1.8, 2, False)),
    ("resnet32x4", "ShuffleV1"): (5,        (600, 4, True)),
    ("resnet32x4", "ShuffleV2"): (8,        (600, 4, True)),
    ("wrn_40_2", "ShuffleV1"):   (5,        (80,  4, True)),
    ("vgg13", "MobileNetV2"):    (None,     (15,  2, True)),
    ("ResNet50", "MobileNetV2"): (None,     (40,  2, True)),
}
NARROW = [f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)]
# Published top-1, %. The papers' Z rows lie near the best epoch on the test split, not the last.
ALONE = {
    "wrn_40_2": 75.61, "resnet56": 72.34, "resnet110": 74.31, "resnet32x4": 79.42, "vgg13": 74.64,
    "ResNet50": 79.34, "wrn_16_2": 73.26, "wrn_40_1": 71.98, "resnet20": 69.06, "resnet32": 71.14,
    "resnet8x4": 72.50, "vgg8": 70.36, "MobileNetV2": 64.60, "ShuffleV1": 70.50, "ShuffleV2": 71.82,
}
PUBLISHED = {
    # teacher, student            KD     KD+Z   CTKD   CTKD+Z DKD    DKD+Z  MLKD   MLKD+Z TTM    WTTM
    ("resnet32x4", "resnet8x4"): (73.33, 76.62, 73.39, 76.67, 76.32, 77.01, 77.08, 78.28, 76.17, 76.06),
    ("vgg13", "vgg8"):           (72.98, 74.36, 73.52, 74.47, 74.68, 74.81, 75.18, 75.22, 74.33, 74.44),
    ("wrn_40_2", "wrn_40_1"):    (73.54, 74.37, 73.93, 74.58, 74.81, 74.89, 75.35, 75.56, 74.32, 74.58),
    ("wrn_40_2", "wrn_16_2"):    (74.92, 76.11, 75.45, 76.08, 76.24, 76.39, 76.63, 76.95, 76.23, 76.37),
    ("resnet56", "resnet20"):    (70.66, 71.43, 71.19, 71.34, 71.97, 72.32, 72.19, 72.33, 71.83, 71.92),
    ("resnet110", "resnet32"):   (73.08, 74.17, 73.52, 74.01, 74.11, 74.29, 74.11, 74.32, 73.97, 74.13),
    ("resnet110", "resnet20"):   (70.67, 71.48, 70.99, 71.39, 71.06, 71.85, 71.89, 72.27, 71.46, 71.67),
    ("resnet32x4", "ShuffleV2"): (74.45, 75.56, 75.37, 76.18, 77.07, 77.37, 78.44, 78.76, 76.57, 76.55),
    ("resnet32x4", "wrn_16_2"):  (74.90, 75.26, 74.57, 75.16, 75.70, 76.19, 76.52, 77.53, None , None),
    ("resnet32x4", "wrn_40_2"):  (77.70, 77.92, 77.66, 77.99, 78.46, 78.95, 79.26, 79.66, None , None),
    ("wrn_40_2", "resnet8x4"):   (73.97, 77.11, 74.61, 77.03, 75.56, 76.75, 77.33, 77.68, None , None),
    ("wrn_40_2", "MobileNetV2"): (68.36, 69.23, 68.34, 69.53, 69.28, 70.01, 70.78, 71.61, None , None),
    ("vgg13", "MobileNetV2"):    (67.37, 68.61, 68.50, 68.98, 69.71, 69.98, 70.57, 70.94, 68.98, 69.16),
    ("ResNet50", "MobileNetV2"): (67.35, 69.02, 68.67, 69.36, 70.35, 70.45, 71.04, 71.19, 69.24, 69.59),
}
FEATURE_PUBLISHED = {   # the poster's; PROVENANCE says what they are
    # teacher, student            FitNet AT     RKD    CRD    OFD    ReviewKD SimKD CAT-KD
    ("resnet32x4", "ShuffleV2"): (73.54, 72.73, 73.21, 75.65, 76.82, 77.78, 78.39, 78.41),
    ("resnet32x4", "wrn_16_2"):  (74.70, 73.91, 74.86, 75.65, 76.17, 76.11, 77.17, 76.97),
    ("resnet32x4", "wrn_40_2"):  (77.69, 77.43, 77.82, 78.15, 79.25, 78.96, 79.29, 78.59),
    ("wrn_40_2", "wrn_16_2"):    (73.58, 74.08, 73.35, 75.48, 75.24, 76.12, 75.53, 75.60),
    ("resnet56", "resnet20"):    (69.21, 70.55, 69.61, 71.16, 70.98, 71.89, 71.05, 71.62),
    ("resnet110", "resnet32"):   (71.06, 72.31, 71.82, 73.48, 73.23, 73.89, 73.92, 73.62),
    ("resnet110", "resnet20"):   (68.99, 70.65, 69.25, 71.46, 71.29, 71.34, 71.06, 71.37),
}
PROVENANCE = """\
FitNet, AT, RKD, CRD: last epochs, from RepDistiller's README (AT of resnet110 -> resnet20 is 70.22 there).
SimKD, CAT-KD: best epochs on the test split; OFD, ReviewKD: not said. The rows of resnet32x4 -> WRN stand in
no repository. OFD and ReviewKD were probably run with their authors' recipes; SimKD's WRNs are other networks
(its file resnet38x2). One recipe for all differs by more than 0.2 in places without being wrong."""
# ImageNet; teachers are torchvision's IMAGENET1K_V1. WTTM's top-5 is not published; one log is.
IMAGENET_ALONE = {"resnet34": 73.31, "resnet18": 69.75, "resnet50": 76.16, "MobileNetV1": 68.87}
IMAGENET = {
    ("resnet34", "resnet18"):    (71.03, 71.42, 71.38, 71.81, 71.70, 71.88, 71.90, 72.08, None,  72.19),
    ("resnet50", "MobileNetV1"): (70.50, 72.18, 71.16, 72.92, 72.05, 72.85, 73.01, 73.22, None,  73.09),
}
IMAGENET_TOP5 = {   # teacher, student alone, then the same columns
    ("resnet34", "resnet18"):    (91.42, 89.07, 90.05, 90.29, 90.27, 90.46, 90.41, 90.58, 90.55, 90.74),
    ("resnet50", "MobileNetV1"): (92.86, 88.76, 89.80, 90.80, 90.11, 91.25, 91.05, 91.23, 91.42, 91.59),
}
NEWER = {       # DIST: its paper's; RLD: its paper's on CIFAR-100; the others, * in the list, read elsewhere
    #                            DIST   RLD    EA: KD MLKD   MLKD+Z
    ("resnet32x4", "resnet8x4"): (76.31, 76.64, 75.46, 77.65, 78.38),
    ("resnet34", "resnet18"):    (72.07, 71.91, 71.79, None,  None),
    ("resnet50", "MobileNetV1"): (73.24, 72.75, None,  None,  None),
}
# fmt: on
IMAGENET_LOGGED = {("resnet34", "resnet18"): (71.26, None, None, None)}

# Why numbers are in doubt: of which pairs ("any"), of which methods, the reason.
UNSURE = (
    ("resnet32x4-ShuffleV2", "kd-z",
     "its log begins with a loss of 1.67, which a weight of 9 does not give: it was probably about 1"),
    ("resnet56-resnet20 wrn_40_2-MobileNetV2", "mlkd-z", "published without a log: the code's default"),
    ("resnet32x4-resnet8x4 resnet32x4-ShuffleV2", "dkd-z", "its log names no beta: 8 is the configuration's"),
    ("any", "kd-z", "the final losses of the authors' logs suggest a cross-entropy weight of 0.1 in some, 1 "
     "in others; 0.1 is run"),
    ("any", "ctkd-z", "start 2 and span 40 fit the logged temperatures; the released script has 1 and 20"),
    ("any", "dkd", "pairs without a released configuration take its default, beta 8"),
    ("any", "dkd-z", "the third number in the logs' names is read as beta before the weight multiplies it"),
    ("any", "mlkd", "learning rate and length are the released MLKD+Z's; the baseline's own repository went "
     "from 480 to 240 epochs for some pairs"),
    ("any", "mlkd-z", "which reading of the method was run is open: the first temperature 2 or 4, the "
     "cross-entropy weight 0.1 or 1, the relations standardized or not"),
    ("any", "ttm", "not published per pair: exponent 0.1, weight 45 are those of vgg13 -> vgg8"),
    ("any", "wttm", "not published per pair: exponent 0.2, weight 4 are those of vgg13 -> vgg8 with CRD"),
    ("any", "ttm-z", "no paper has TTM with standardization: the numbers are TTM's"),
    ("any", "wttm-z", "no paper has WTTM with standardization: the numbers are WTTM's"),
    ("any", "dist-z", "no paper has it: DIST's weight, at temperature 2"),
    ("any", "rld-z", "no paper has it: temperature 2, weight 9, beta 8"),
    ("any", "ea", "it is published with KD, DKD, MLKD and MLKD+Z alone"),
    ("ResNet50-MobileNetV2", "reviewkd", "a user of mdistiller reached the published accuracy with 30"),
    ("any", "reviewkd catkd", "no number is published for the pair: that of pairs like it is run"),
)
IMAGENET_UNSURE = (
    ("any", "kd kd-z", "the released configuration's cross-entropy weight was 0.5, and is 1 since May 2024 "
     "(not resnet50's); 0.5 is run"),
    ("any", "ctkd", "published with 120 epochs, batch 256, learning rate 0.1; here it takes KD's schedule"),
    ("any", "ctkd-z", "the released script has 120 epochs, batch 256, learning rate 0.1, and a weight of 2 "
     "where 9 is meant; here it takes KD's schedule and weight, and span 40 as on CIFAR-100"),
    ("any", "dkd-z", "no numbers are published: temperature and weight are KD+Z's"),
    ("any", "mlkd-z", "the released configuration does not run: temperature and weight are KD+Z's"),
    ("any", "ttm wttm", "no exponent and weight are published: those of CIFAR-100"),
    ("any", "ttm-z wttm-z", "no paper has it"),
    ("any", "dist-z", "no paper has it: DIST's numbers"),
    ("any", "rld-z", "no paper has it: KD+Z's temperature and weight"),
    ("any", "ea", "it is published with KD, DKD and DKD+Z alone"),
    ("any", "at rkd crd simkd", "the weight is CIFAR-100's: no other was found"),
)


def key(method, zscore, feature=None, entropy=False):
    """The name of a method in the tables: "kd", "kd-z", "kd-z-ea", "kd-z-crd"; "crd" alone."""
    name = method + "-z" * bool(zscore) + "-ea" * bool(entropy)
    return name if feature is None else feature if method == "none" else f"{name}-{feature}"


def name_of(recipe):
    """`key` of a recipe."""
    return key(recipe["method"], recipe["zscore"], recipe.get("feature"), recipe.get("entropy_temp"))


def words(name):
    """(method, zscore, released, feature, entropy) of a name as of `key`, "-released" at its end or not."""
    method, *rest = name.split("-")
    feature = next((word for word in (method, *rest) if word in FEATURES), None)
    return "none" if method == feature else method, "z" in rest, "released" in rest, feature, "ea" in rest


def title(name):
    """What the tables call it: "alone", "KD+Z", "MLKD+Z, released", "KD, EA", "CRD", "KD+Z and CRD"."""
    method, zscore, released, feature, entropy = words(name)
    parts = [method.upper() + "+Z" * zscore + ", EA" * entropy] if method != "none" else []
    parts += [FEATURE_NAMES[feature]] if feature else []
    return " and ".join(parts) + ", released" * released or "alone"


def recipe(teacher, student, method, zscore=False, source="authors", data="cifar100", feature=None,
           entropy=False):
    """Every number of one run, a dict. ValueError for an unknown method or feature.

    known: whether a paper has this pair, without a method this student. base_temp: tau of every method.
    stages: epochs after which lr is divided by ten. warmup: epochs of DKD's and RLD's ramp, ramp: of CTKD's
    reversal, feature_ramp: of ReviewKD's. alpha, beta: before kd_weight multiplies both. span: CTKD's range
    of temperatures above base_temp. resolution, normalize: CAT-KD's maps. source: only where not "authors".
    """
    for kind, name, names in (("method", method, METHODS), ("feature", feature, (None, *FEATURES))):
        if name not in names:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(filter(None, names))}")
    large, pair = data == "imagenet", (teacher, student)
    logs = zscore and (large or source == "authors")
    r = {"known": pair in IMAGENET if large else pair in PAIRS, **(IMAGE_NET if large else CIFAR_100)}
    if source != "authors":
        r["source"] = source
    if not large and student.startswith(("MobileNet", "Shuffle")):
        r["lr"] = 0.01
    temp, weight, ce = NUMBERS[method if method in ("none", "ttm", "wttm") else key(method, zscore)][
        2 if large else SOURCES.index(source)]
    kd_z, beta, dkd_z, mlkd_z = (not large and PAIRS.get(pair) or (
        (2, 9), None, (2, 9, 8), (2, 9, min(r["lr"], 0.025), 480)))[:4]
    if logs and not large and method in ("kd", "dkd", "mlkd"):
        temp, weight = {"kd": kd_z, "dkd": dkd_z, "mlkd": mlkd_z}[method][:2]
    r |= {"base_temp": temp and float(temp), "kd_weight": float(weight), "ce_weight": float(ce)}
    if method == "none":
        r["known"] = (student in (IMAGENET_ALONE if large else ALONE) if feature is None else
                      r["known"] or not large and pair in FEATURE_PAIRS)
    elif method in ("dkd", "rld"):
        beta = 8 if method == "rld" else dkd_z[2] if logs else beta or 8
        beta = beta if not large else 2 if teacher == "resnet50" else 0.5
        r |= {"alpha": 1.0, "warmup": 1 if large else 20, "beta": float(beta)}
    elif method == "dist":
        r |= {"beta": 1.0 if large else 2.0, "gamma": 1.0 if large else 2.0}
    elif method == "mlkd":
        lr, epochs = (0.2 if teacher == "resnet50" else 0.1, 100) if large else mlkd_z[2:]
        r |= {"lr": lr, "epochs": epochs, "zscore_relations": logs}
    elif method == "ctkd":
        r |= {"span": 40.0 if logs else 20.0, "ramp": 5 if large else 10}
    if entropy:
        r["entropy_temp"] = 2.0 if large else 3.0
        if method == "mlkd":        # as its authors' code: relations of raw probabilities, a smaller weight
            r |= {"zscore_relations": False} | ({"kd_weight": 4.0} if zscore and not large else {})
    return r if feature is None else r | _feature(teacher, student, feature)


def _feature(teacher, student, feature):
    """What a feature adds to a pair's recipe; where nothing is published, the numbers of pairs like it."""
    review, cat = FEATURE_PAIRS.get((teacher, student), (None, None))
    families = {re.match("[a-z]*", (n or "").lower())[0].replace("wrn", "resnet") for n in (teacher, student)}
    narrow = teacher in NARROW and student in NARROW
    weight, side, normalize = cat or (      # those of the teachers resnet56, resnet32x4, ResNet50, wrn_40_2
        (0.7, 2, False) if narrow else (15, 2, False) if len(families) == 1 else
        (40, 2, True) if student.lower().startswith("mobilenet") else (80, 4, True))
    weights = FEATURE_WEIGHTS | {"reviewkd": review or (0.6 if narrow else 5), "catkd": weight}
    more = {"reviewkd": {"feature_ramp": 20}, "catkd": {"resolution": side, "normalize": normalize},
            "simkd": {"factor": 2, "ce_weight": 0.0}}
    return {"feature": feature, "feature_weight": float(weights[feature]), **more.get(feature, {})}


def known(of, data="cifar100"):
    """Whether a paper has the pair of a recipe."""
    names = (of[k] for k in ("teacher", "student", "method", "zscore"))
    return recipe(*names, data=data, feature=of.get("feature"))["known"]


def unsure(teacher, student, method, zscore=False, source="authors", data="cifar100", feature=None,
           entropy=False):
    """Why a recipe's numbers are in doubt, a list of reasons, empty where they are not."""
    name, pair = key(method, zscore), f"{teacher}-{student}"
    if data == "imagenet":
        sure = method == "kd" and teacher == "resnet50"
    elif source == "released":      # the code's own defaults; it has none of these
        sure = method not in ("ttm", "wttm", "dist", "rld")
    else:
        sure = name == "dkd" and PAIRS.get((teacher, student), (0, None))[1]
    doubts = set() if sure or (pair, name) == ("vgg13-vgg8", "ttm") else {name}
    numbers = dict(zip(("reviewkd", "catkd"), FEATURE_PAIRS.get((teacher, student), (None, None))))
    if feature and (data == "imagenet" or numbers.get(feature, 0) is None):
        doubts.add(feature)
    if entropy and name not in ("kd", "dkd", *(("dkd-z",) if data == "imagenet" else ("mlkd", "mlkd-z"))):
        doubts.add("ea")
    return [reason for pairs, names, reason in (IMAGENET_UNSURE if data == "imagenet" else UNSURE)
            if doubts & {*names.split()} and {pair, "any"} & {*pairs.split()}]


def published(teacher, student, method, zscore=False, data="cifar100", feature=None, entropy=False):
    """Published top-1 (%), "none": the student's alone, "teacher": the teacher's; None if there is none.

    With a feature the poster's, which has them without a method ("none") only.
    """
    alone, rows = (IMAGENET_ALONE, IMAGENET) if data == "imagenet" else (ALONE, PUBLISHED)
    if feature:
        rows = FEATURE_PUBLISHED if method == "none" and data != "imagenet" else {}
        return dict(zip(FEATURES, rows.get((teacher, student), ()))).get(feature)
    if method in ("none", "teacher"):
        return alone.get(teacher if method == "teacher" else student)
    pair, name = (teacher, student), key(method, zscore, None, entropy)
    return dict(zip(COLUMNS + NEWER_COLUMNS, (*rows.get(pair, (None,) * len(COLUMNS)), *NEWER.get(pair, ()))
                    )).get(name)


def logged(teacher, student, method, zscore=False, data="cifar100", feature=None, entropy=False):
    """Top-1 (%) of the last epoch of the authors' log; None where there is none, as for every feature."""
    rows = {} if feature or entropy else IMAGENET_LOGGED if data == "imagenet" else PAIRS
    return dict(zip(LOGGED_COLUMNS, rows.get((teacher, student), ())[-4:])).get(key(method, zscore))


def results_of(of, data="cifar100"):
    """{"published", "logged"} of a recipe, top-1 (%) or None: see these functions."""
    names = [of[k] for k in ("teacher", "student", "method", "zscore")]
    more = {"data": data, "feature": of.get("feature"), "entropy": bool(of.get("entropy_temp"))}
    return {"published": published(*names, **more), "logged": logged(*names, **more)}


# What a run's folder is named by where it differs from the pair's recipe, in this order.
NAME_PARTS = {"base_temp": "tau", "kd_weight": "kd", "ce_weight": "ce", "alpha": "alpha", "beta": "beta",
              "lr": "lr", "weight_decay": "wd", "batch_size": "batch"}
LONGEST_NAME = 120      # characters; a hash replaces the rest


def run_name(run, data="cifar100", precision="fp32", teacher_file=False):
    """The folder of a run: resnet32x4-resnet8x4-kd-z-tau1.5-seed0, its pair and what differs from the recipe.

    run: every resolved value. data: the recipe's, "cifar100" or "imagenet". precision: the device's default.
    teacher_file: whether the teacher's file was named; run["teacher_sha256"] is then part of the name.
    """
    usual = recipe(run["teacher"], run["student"], run["method"], run["zscore"],
                   run.get("source", "authors"), data, run.get("feature"), bool(run.get("entropy_temp")))
    parts = [_network(run["student"], run.get("student_sha256")), name_of(run)]
    if run["teacher"]:
        parts.insert(0, _network(run["teacher"], run["teacher_sha256"] if teacher_file else None))
    for key, short in NAME_PARTS.items():
        if run.get(key) != usual.get(key):
            parts.append(f"{short}{run[key]:g}")
    if run["epochs"] != run["full_epochs"]:
        parts.append(f"{run['epochs']}epochs")
    if run.get("train_images"):
        parts.append(f"{run['train_images']}images")
    if run.get("val_from_train"):
        parts.append(f"{run['val_from_train']}val")
    usual_size = 224 if data == "imagenet" else 32
    if run.get("size", usual_size) != usual_size:
        parts.append(f"{run['size']}px")
    if run["precision"] != precision:
        parts.append(run["precision"])
    if "source" in run:
        parts.append(run["source"])
    if run["data"] != "cifar100":
        parts.append(run.get("folder", run["data"]))
    name = "-".join([*parts, f"seed{run['seed']}"])
    if len(name) <= LONGEST_NAME:
        return name
    return name[:LONGEST_NAME] + hashlib.sha256(name.encode()).hexdigest()[:8]


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
    return recipe["lr"] * 0.1 ** sum(epoch > stage for stage in recipe["stages"])


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
    return tuple(part(epoch, recipe) for part in (learning_rate, kd_weight, reversal, feature_weight))


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
    """The recipes, right under them what is unsure, and the published accuracies: what `--list` prints."""
    large = data == "imagenet"
    methods = {c: (c.removesuffix("-z"), c.endswith("-z")) for c in COLUMNS}
    shown = {c: title(c) for c in COLUMNS}

    def numbers(pair, column, source="authors"):
        method = methods[column]
        r = recipe(*pair, *method, source, data)
        more = {"dkd": ["beta"], "mlkd": ["lr", "epochs"]}.get(method[0], []) if pair != ("", "") else []
        return (", ".join(f"{r[k]:g}" for k in ["base_temp", "kd_weight", *more])
                + "?" * bool(unsure(*pair, *method, source, data)))

    pairs = IMAGENET if large else PAIRS
    rows = [["teacher -> student", "lr", *shown.values()]]
    for pair in pairs:
        lr = recipe(*pair, "kd", data=data)["lr"]
        rows.append([" -> ".join(pair), f"{lr:g}", *(numbers(pair, c) for c in COLUMNS)])
    if not large:
        rows.append(["any, released code", "", *(numbers(("", ""), c, "released") for c in COLUMNS)])
    lines = ["temperature, KD weight[, beta][, learning rate, epochs]; ? = unsure:", "", *_aligned(rows)]
    doubts = []
    for names, of, reason in IMAGENET_UNSURE if large else UNSURE:
        where = "" if names == "any" else ", " + names.replace(" ", ", ").replace("-", " -> ")
        of = ", ".join(title(name) for name in of.split())
        doubts.append(f"  ? {of}{where}: {reason}")
    lines += doubts if large else _feature_lines() + doubts
    r = recipe("", "", "kd", data=data)
    lines += ["", f"{r['epochs']} epochs, batch {r['batch_size']}, weight decay {r['weight_decay']:g}, "
              f"learning rate x 0.1 after epochs {', '.join(map(str, r['stages']))}.",
              f"Cross-entropy weight: {'0.5 for KD, MLKD' if large else '0.1 for KD, MLKD, CTKD'}, 1 for the "
              "rest. The KD weight multiplies DKD's alpha (1) and beta.",
              "CTKD's temperature lies between the given one and it + 20, + 40 with Z. MLKD+Z standardizes "
              "relations too." + " The released code has + 20, raw relations." * (not large)]

    for method in ("dist", "rld"):
        name = title(method)
        r, z = (recipe(*next(iter(pairs)), method, z, data=data) for z in (False, True))
        lines.append(f"{name}: temperature {r['base_temp']:g}, weight {r['kd_weight']:g}; {name}+Z: "
                     f"{z['base_temp']:g}, {z['kd_weight']:g}; beta {r['beta']:g}"
                     + (f", gamma {r['gamma']:g}." if "gamma" in r else " (resnet50: 2)." if large else "."))
    ea = recipe(*next(iter(pairs)), "mlkd", True, data=data, entropy=True)
    lines.append(f"EA-KD: --entropy-weight, entropies at temperature {ea['entropy_temp']:g}; MLKD's relations"
                 " stay raw then" + f", MLKD+Z's weight is {ea['kd_weight']:g}" * (not large) + ".")

    name = "ImageNet top-1 / top-5" if large else "CIFAR-100 top-1"
    lines += ["", f"Published {name}, %; in brackets the last epoch of the authors' log, top-1:", ""]
    rows = [["teacher -> student", "teacher", "alone", *shown.values()]]
    for pair in pairs:
        cells = [" -> ".join(pair)]
        for i, method in enumerate([("teacher",), ("none",), *methods.values()]):
            top1, last = published(*pair, *method, data=data), logged(*pair, *method, data=data)
            top5 = dict(enumerate(IMAGENET_TOP5[pair])).get(i) if large else None
            cells.append((f"{top1:.2f}" if top1 else "-") + (f" / {top5:.2f}" if top5 else "")
                         + (f" ({last:.2f})" if last else ""))
        rows.append(cells)
    lines += _aligned(rows)
    newer = {pair: numbers for pair, numbers in NEWER.items() if pair in pairs}
    lines += ["", "Of newer methods, from their own papers; * read in another one:", ""]
    elsewhere = [name.endswith("-ea") or large and name == "rld" for name in NEWER_COLUMNS]
    lines += _aligned([["teacher -> student", *map(title, NEWER_COLUMNS)],
                       *([" -> ".join(pair), *(f"{x:.2f}" + "*" * star if x else "-"
                                               for x, star in zip(numbers, elsewhere))]
                         for pair, numbers in newer.items())])
    if not large:
        rows = [["teacher -> student", *FEATURE_NAMES.values()]]
        rows += [[" -> ".join(pair), *map("{:.2f}".format, row)] for pair, row in FEATURE_PUBLISHED.items()]
        lines += ["", "The same of feature methods, from the poster:", "", *_aligned(rows), "", PROVENANCE]
    return "\n".join(lines)


def _feature_lines():
    """The weights of the feature methods, as `--list` prints them."""
    rows = [["teacher -> student", "ReviewKD", "CAT-KD"]]
    for pair in PAIRS | FEATURE_PAIRS:
        review, cat = (recipe(*pair, "none", feature=name) for name in ("reviewkd", "catkd"))
        cells = (f"{review['feature_weight']:g}", f"{cat['feature_weight']:g}, {cat['resolution']}"
                 + ", normalised" * cat["normalize"])
        review, cat = (cell + "?" * bool(unsure(*pair, "none", feature=name))
                       for cell, name in zip(cells, ("reviewkd", "catkd")))
        refused = pair == ("wrn_40_2", "MobileNetV2")       # three stages and four
        rows.append([" -> ".join(pair), "-" if refused else review, cat])
    same = ", ".join(f"{FEATURE_NAMES[name]} {weight:g}" for name, weight in FEATURE_WEIGHTS.items())
    return ["", f"Feature methods, weights: {same} (no cross-entropy);",
            "ReviewKD's, in full from epoch 20 on; CAT-KD's, the side of its maps[, normalised]:", "",
            *_aligned(rows)]


def _aligned(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
