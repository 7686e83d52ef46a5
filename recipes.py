"""The papers' hyper-parameters and published accuracies, pair by pair, on CIFAR-100 and ImageNet.

`recipe(teacher, student, method, zscore)` gives every number of a run. Two sources differ here and there:
"authors" (the default) is what the names of the authors' training logs say, "released" is what their released
code runs when no value is given (CIFAR-100). `data` is "cifar100" or "imagenet"; any other data set takes
CIFAR-100's rules. The tables are text, which `--list` prints; `read_tables` makes dictionaries of them.
"""

import ast
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
NAMES = ("none", *(name + end for name in COLUMNS for end in ("", "-released")),    # in the tables' order
         "dist", "dist-z", "rld", "rld-z", *(f"{name}-ea" for name in (*COLUMNS, "rld", "rld-z")),
         *FEATURES, *(f"{name}-{feature}" for name in COLUMNS for feature in FEATURES))
NARROW = [f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)]

CIFAR_100 = """\
# "?" marks doubtful values, for which NOTES.md has the reasons; "-" is none.
[schedule]
# stages: epochs after which lr is divided by ten. light: MobileNets and ShuffleNets, at most this lr.
students  lr    epochs  stages       batch_size  momentum  weight_decay
all       0.05  240     150,180,210  64          0.9       0.0005
light     0.01  -       -            -           -         -

[methods]
# tau is base_temp, of TTM 1 / exponent; lambda_KD and lambda_CE are kd_weight and ce_weight. lambda_KD
# multiplies alpha and beta. CTKD's temperatures are tau to tau + span. ramp and warmup count epochs.
# Plain KD is the published baseline, mdistiller's.
method base_temp kd_weight ce_weight alpha beta gamma span ramp warmup lr    epochs zscore_relations
none   None      0.0       1.0       -     -    -     -    -    -      -     -      -
kd     4.0       0.9       0.1       -     -    -     -    -    -      -     -      -
kd-z   2.0       9.0       0.1       -     -    -     -    -    -      -     -      -  # ? ce_weight
dkd    4.0       1.0       1.0       1.0   8.0  -     -    -    20     -     -      -  # ? beta
dkd-z  2.0       9.0       1.0       1.0   8.0  -     -    -    20     -     -      -  # ? beta
mlkd   4.0       0.9       0.1       -     -    -     -    -    -      0.025 480    False  # ? lr, epochs
mlkd-z 2.0       9.0       0.1       -     -    -     -    -    -      0.025 480    True  # ?
ctkd   1.0       0.9       0.1       -     -    -     20.0 10   -      -     -      -
ctkd-z 2.0       9.0       0.1       -     -    -     40.0 10   -      -     -      -  # ? base_temp, span
ttm    10.0      45.0      1.0       -     -    -     -    -    -      -     -      -  # ?
wttm   5.0       4.0       1.0       -     -    -     -    -    -      -     -      -  # ?
dist   4.0       2.0       1.0       -     2.0  2.0   -    -    -      -     -      -
dist-z 2.0       2.0       1.0       -     2.0  2.0   -    -    -      -     -      -  # ?
rld    4.0       1.0       1.0       1.0   8.0  -     -    -    20     -     -      -
rld-z  2.0       9.0       1.0       1.0   8.0  -     -    -    20     -     -      -  # ?

[released]
# The released code's defaults where they differ; it takes them for every pair.
method  base_temp  kd_weight  span  zscore_relations
kd      2.0        9.0        -     -
ctkd-z  1.0        -          20.0  -
mlkd    2.0        9.0        -     -
mlkd-z  -          -          -     False

[pairs]
# What differs for a pair, with Z and without: DKD's beta in the released configurations, MLKD's learning rate
# and epochs in the logs' names.
pair-method                beta  lr     epochs
resnet32x4-resnet8x4-dkd   8.0   -      -
vgg13-vgg8-dkd             6.0   -      -
wrn_40_2-wrn_40_1-dkd      6.0   -      -
wrn_40_2-wrn_16_2-dkd      6.0   -      -
resnet56-resnet20-dkd      2.0   -      -
resnet110-resnet32-dkd     2.0   -      -
resnet32x4-ShuffleV2-dkd   8.0   -      -
vgg13-MobileNetV2-dkd      6.0   -      -
ResNet50-MobileNetV2-dkd   8.0   -      -
vgg13-vgg8-mlkd            -     0.01   480
resnet32x4-ShuffleV2-mlkd  -     0.01   960
wrn_40_2-MobileNetV2-mlkd  -     0.005  480
vgg13-MobileNetV2-mlkd     -     0.01   480
ResNet50-MobileNetV2-mlkd  -     0.01   480

[logs]
# The authors' logs: values in their names (?); top-1, %, of the last epoch, the mean where a log holds two
# runs, and of the last 20 epochs; training losses of epochs 1 to 3. No baseline has a log.
pair-method                  base_temp  kd_weight  beta  last   mean_20  loss_1  loss_2  loss_3
resnet32x4-resnet8x4-kd-z    2.0        9.0        -     76.28  76.33    15.83   12.39   10.06
resnet32x4-resnet8x4-ctkd-z  -          -          -     76.09  -        -       -       -
resnet32x4-resnet8x4-dkd-z   2.0        9.0        8.0   76.93  76.99    5.03    5.14    5.24
resnet32x4-resnet8x4-mlkd-z  2.0        9.0        -     78.17  77.97    72.94   55.77   45.64
vgg13-vgg8-kd-z              3.0        9.0        -     74.50  74.55    9.80    7.21    5.96
vgg13-vgg8-ctkd-z            -          -          -     74.50  -        -       -       -
vgg13-vgg8-dkd-z             2.0        15.0       2.0   74.53  74.46    5.12    5.29    5.64
vgg13-vgg8-mlkd-z            2.0        6.0        -     74.79  74.83    57.09   43.33   35.86
wrn_40_2-wrn_40_1-kd-z       2.0        9.0        -     74.20  74.28    8.00    6.26    5.25
wrn_40_2-wrn_40_1-ctkd-z     -          -          -     74.50  -        -       -       -
wrn_40_2-wrn_40_1-dkd-z      2.0        12.0       2.0   74.60  74.67    5.01    5.04    5.06
wrn_40_2-wrn_40_1-mlkd-z     2.0        9.0        -     74.97  74.97    61.26   46.28   38.21
wrn_40_2-wrn_16_2-kd-z       2.0        9.0        -     75.59  75.75    7.78    5.65    4.53
wrn_40_2-wrn_16_2-ctkd-z     -          -          -     75.69  -        -       -       -
wrn_40_2-wrn_16_2-dkd-z      2.0        12.0       2.0   76.05  76.07    4.86    4.76    4.61
wrn_40_2-wrn_16_2-mlkd-z     2.0        9.0        -     76.54  76.43    68.84   53.46   43.64
resnet56-resnet20-kd-z       2.0        9.0        -     71.37  71.30    6.84    4.99    3.95
resnet56-resnet20-ctkd-z     -          -          -     70.94  -        -       -       -
resnet56-resnet20-dkd-z      3.0        18.0       2.0   71.82  71.81    4.95    4.82    4.73
resnet56-resnet20-mlkd-z     2.0        9.0        -     -      -        -       -       -
resnet110-resnet32-kd-z      2.0        9.0        -     74.01  73.94    7.32    5.33    4.35
resnet110-resnet32-ctkd-z    -          -          -     73.72  -        -       -       -
resnet110-resnet32-dkd-z     2.0        15.0       2.0   73.80  73.92    5.07    4.95    4.84
resnet110-resnet32-mlkd-z    2.0        9.0        -     73.88  73.92    51.98   38.46   31.19
resnet110-resnet20-kd-z      4.0        12.0       -     71.22  71.13    7.90    5.84    4.76
resnet110-resnet20-ctkd-z    -          -          -     71.22  -        -       -       -
resnet110-resnet20-dkd-z     2.0        15.0       2.0   71.37  71.46    4.98    5.05    5.00
resnet110-resnet20-mlkd-z    2.0        9.0        -     71.92  71.82    76.58   60.20   50.20
resnet32x4-ShuffleV2-kd-z    2.0        9.0        -     75.58  75.49    1.67    1.47    1.38
resnet32x4-ShuffleV2-ctkd-z  -          -          -     76.46  -        -       -       -
resnet32x4-ShuffleV2-dkd-z   2.0        9.0        8.0   76.92  77.07    6.04    6.78    7.51
resnet32x4-ShuffleV2-mlkd-z  2.0        6.0        -     77.89  78.10    61.44   48.55   40.06
resnet32x4-wrn_16_2-kd-z     3.0        9.0        -     75.82  75.69    10.41   8.16    6.68
resnet32x4-wrn_16_2-ctkd-z   -          -          -     74.72  -        -       -       -
resnet32x4-wrn_16_2-dkd-z    2.0        9.0        2.0   75.68  75.75    4.93    4.94    4.90
resnet32x4-wrn_16_2-mlkd-z   2.0        9.0        -     77.19  77.17    75.53   58.70   47.32
resnet32x4-wrn_40_2-kd-z     3.0        9.0        -     77.98  78.22    10.73   8.67    7.02
resnet32x4-wrn_40_2-ctkd-z   -          -          -     78.40  -        -       -       -
resnet32x4-wrn_40_2-dkd-z    2.0        9.0        8.0   78.79  78.77    6.25    7.12    7.70
resnet32x4-wrn_40_2-mlkd-z   2.0        9.0        -     79.27  79.38    76.27   60.43   48.79
wrn_40_2-resnet8x4-kd-z      2.0        9.0        -     76.69  76.85    11.14   8.09    6.53
wrn_40_2-resnet8x4-ctkd-z    -          -          -     76.62  -        -       -       -
wrn_40_2-resnet8x4-dkd-z     2.0        18.0       2.0   76.72  76.78    5.25    5.41    5.54
wrn_40_2-resnet8x4-mlkd-z    2.0        9.0        -     77.47  77.47    68.01   52.70   43.19
wrn_40_2-MobileNetV2-kd-z    3.0        9.0        -     69.35  69.50    8.66    7.54    7.03
wrn_40_2-MobileNetV2-ctkd-z  -          -          -     69.91  -        -       -       -
wrn_40_2-MobileNetV2-dkd-z   2.0        15.0       2.0   70.11  69.95    5.57    6.13    6.88
wrn_40_2-MobileNetV2-mlkd-z  2.0        9.0        -     -      -        -       -       -
vgg13-MobileNetV2-kd-z       3.0        9.0        -     69.09  69.15    10.90   9.58    9.00
vgg13-MobileNetV2-ctkd-z     -          -          -     69.08  -        -       -       -
vgg13-MobileNetV2-dkd-z      3.0        9.0        2.0   69.88  69.74    5.00    5.16    5.51
vgg13-MobileNetV2-mlkd-z     2.0        6.0        -     70.54  70.27    61.32   53.51   49.06
ResNet50-MobileNetV2-kd-z    3.0        1.0        -     69.03  68.91    1.51    1.34    1.26
ResNet50-MobileNetV2-ctkd-z  -          -          -     69.78  -        -       -       -
ResNet50-MobileNetV2-dkd-z   2.0        15.0       2.0   70.77  70.64    5.71    6.54    7.47
ResNet50-MobileNetV2-mlkd-z  2.0        9.0        -     71.31  71.31    66.92   58.28   54.95

[features]
# Feature methods, from their authors' scripts. feature_ramp counts epochs.
feature   feature_weight  feature_ramp  factor  ce_weight
fitnet    100.0           -             -       -
at        1000.0          -             -       -
rkd       1.0             -             -       -
crd       0.8             -             -       -
ofd       0.001           -             -       -
reviewkd  -               20            -       -
simkd     1.0             -             2       0.0
catkd     -               -             -       -

[feature_pairs]
# The weights of ReviewKD and CAT-KD; the side of CAT-KD's pooled maps, whether they are normalised.
pair                  reviewkd  catkd  resolution  normalize
resnet32x4-resnet8x4  5.0       15.0   2           False
vgg13-vgg8            5.0       4.5    2           False  # reviewkd: ?
wrn_40_2-wrn_40_1     5.0       1.5    2           False
wrn_40_2-wrn_16_2     5.0       12.0   2           False
resnet56-resnet20     0.6       0.7    2           False
resnet110-resnet32    1.0       1.8    2           False
resnet32x4-ShuffleV1  5.0       600.0  4           True
resnet32x4-ShuffleV2  8.0       600.0  4           True
wrn_40_2-ShuffleV1    5.0       80.0   4           True
vgg13-MobileNetV2     5.0       15.0   2           True  # reviewkd: ?
ResNet50-MobileNetV2  5.0       40.0   2           True  # reviewkd: ?

[vanilla]
# Published top-1, %, of networks trained from scratch.
network      top1
wrn_40_2     75.61
resnet56     72.34
resnet110    74.31
resnet32x4   79.42
vgg13        74.64
ResNet50     79.34
wrn_16_2     73.26
wrn_40_1     71.98
resnet20     69.06
resnet32     71.14
resnet8x4    72.50
vgg8         70.36
MobileNetV2  64.60
ShuffleV1    70.50
ShuffleV2    71.82

[published]
# Published top-1, %, of students. The papers' Z rows are near the best epoch on the test split, not the last.
pair                  kd     kd-z   ctkd   ctkd-z  dkd    dkd-z  mlkd   mlkd-z  ttm    wttm
resnet32x4-resnet8x4  73.33  76.62  73.39  76.67   76.32  77.01  77.08  78.28   76.17  76.06
vgg13-vgg8            72.98  74.36  73.52  74.47   74.68  74.81  75.18  75.22   74.33  74.44
wrn_40_2-wrn_40_1     73.54  74.37  73.93  74.58   74.81  74.89  75.35  75.56   74.32  74.58
wrn_40_2-wrn_16_2     74.92  76.11  75.45  76.08   76.24  76.39  76.63  76.95   76.23  76.37
resnet56-resnet20     70.66  71.43  71.19  71.34   71.97  72.32  72.19  72.33   71.83  71.92
resnet110-resnet32    73.08  74.17  73.52  74.01   74.11  74.29  74.11  74.32   73.97  74.13
resnet110-resnet20    70.67  71.48  70.99  71.39   71.06  71.85  71.89  72.27   71.46  71.67
resnet32x4-ShuffleV2  74.45  75.56  75.37  76.18   77.07  77.37  78.44  78.76   76.57  76.55
resnet32x4-wrn_16_2   74.90  75.26  74.57  75.16   75.70  76.19  76.52  77.53   -      -
resnet32x4-wrn_40_2   77.70  77.92  77.66  77.99   78.46  78.95  79.26  79.66   -      -
wrn_40_2-resnet8x4    73.97  77.11  74.61  77.03   75.56  76.75  77.33  77.68   -      -
wrn_40_2-MobileNetV2  68.36  69.23  68.34  69.53   69.28  70.01  70.78  71.61   -      -
vgg13-MobileNetV2     67.37  68.61  68.50  68.98   69.71  69.98  70.57  70.94   68.98  69.16
ResNet50-MobileNetV2  67.35  69.02  68.67  69.36   70.35  70.45  71.04  71.19   69.24  69.59

[newer]
# DIST, RLD: their papers'; ea, EA-KD: read in another paper. In no paper (?): TTM, WTTM, DIST and RLD with Z,
# EA-KD with others than these and DKD.
pair                  dist   rld    kd-ea  mlkd-ea  mlkd-z-ea
resnet32x4-resnet8x4  76.31  76.64  75.46  77.65    78.38

[published_features]
# The poster's. FitNet, AT, RKD, CRD: last epochs, from RepDistiller's README (AT of resnet110 -> resnet20 is
# 70.22 there). SimKD, CAT-KD: best epochs on the test split; OFD, ReviewKD: not known. The rows of
# resnet32x4 -> WRN are in no repository. OFD and ReviewKD were probably run with their authors' recipes;
# SimKD's WRNs are other networks (its file resnet38x2). One recipe for all differs by more than 0.2 in
# places without being wrong.
pair                  fitnet  at     rkd    crd    ofd    reviewkd  simkd  catkd
resnet32x4-ShuffleV2  73.54   72.73  73.21  75.65  76.82  77.78     78.39  78.41
resnet32x4-wrn_16_2   74.70   73.91  74.86  75.65  76.17  76.11     77.17  76.97
resnet32x4-wrn_40_2   77.69   77.43  77.82  78.15  79.25  78.96     79.29  78.59
wrn_40_2-wrn_16_2     73.58   74.08  73.35  75.48  75.24  76.12     75.53  75.60
resnet56-resnet20     69.21   70.55  69.61  71.16  70.98  71.89     71.05  71.62
resnet110-resnet32    71.06   72.31  71.82  73.48  73.23  73.89     73.92  73.62
resnet110-resnet20    68.99   70.65  69.25  71.46  71.29  71.34     71.06  71.37
"""

IMAGENET = """\
# "?" marks doubtful values, for which NOTES.md has the reasons; "-" is none.
[schedule]
students  lr   epochs  stages    batch_size  momentum  weight_decay
all       0.2  100     30,60,90  512         0.9       0.0001

[methods]
# See CIFAR-100's.
method base_temp kd_weight ce_weight alpha beta gamma span ramp warmup lr  zscore_relations
none   None      0.0       1.0       -     -    -     -    -    -      -   -
kd     1.0       0.5       0.5       -     -    -     -    -    -      -   -  # ? ce_weight
kd-z   2.0       9.0       0.5       -     -    -     -    -    -      -   -  # ? ce_weight
dkd    1.0       1.0       1.0       1.0   0.5  -     -    -    1      -   -
dkd-z  2.0       9.0       1.0       1.0   0.5  -     -    -    1      -   -  # ?
mlkd   1.0       0.5       0.5       -     -    -     -    -    -      0.1 False
mlkd-z 2.0       9.0       0.5       -     -    -     -    -    -      0.1 True  # ?
ctkd   1.0       1.0       1.0       -     -    -     20.0 5    -      -   -  # ?
ctkd-z 2.0       9.0       1.0       -     -    -     40.0 5    -      -   -  # ?
ttm    10.0      45.0      1.0       -     -    -     -    -    -      -   -  # ?
wttm   5.0       4.0       1.0       -     -    -     -    -    -      -   -  # ?
dist   1.0       2.0       1.0       -     1.0  1.0   -    -    -      -   -
dist-z 1.0       2.0       1.0       -     1.0  1.0   -    -    -      -   -  # ?
rld    1.0       1.0       1.0       1.0   0.5  -     -    -    1      -   -
rld-z  2.0       9.0       1.0       1.0   0.5  -     -    -    1      -   -  # ?

[pairs]
# What differs for a teacher, with Z and without.
teacher-method  beta  lr
resnet50-dkd    2.0   -
resnet50-mlkd   -     0.2
resnet50-rld    2.0   -

[logs]
# Top-1, %, of the last epoch of the authors' log.
pair-method             last
resnet34-resnet18-kd-z  71.26

[vanilla]
# Published top-1, %; teachers are torchvision's IMAGENET1K_V1.
network      top1
resnet34     73.31
resnet18     69.75
resnet50     76.16
MobileNetV1  68.87

[published]
pair                  kd     kd-z   ctkd   ctkd-z  dkd    dkd-z  mlkd   mlkd-z  ttm  wttm
resnet34-resnet18     71.03  71.42  71.38  71.81   71.70  71.88  71.90  72.08   -    72.19
resnet50-MobileNetV1  70.50  72.18  71.16  72.92   72.05  72.85  73.01  73.22   -    73.09

[top5]
# Published top-5, %. WTTM's is not published; one log is.
pair                  teacher  none   kd     kd-z   ctkd   ctkd-z  dkd    dkd-z  mlkd   mlkd-z
resnet34-resnet18     91.42    89.07  90.05  90.29  90.27  90.46   90.41  90.58  90.55  90.74
resnet50-MobileNetV1  92.86    88.76  89.80  90.80  90.11  91.25   91.05  91.23  91.42  91.59

[newer]
# See CIFAR-100's.
pair                  dist   rld    kd-ea  mlkd-ea  mlkd-z-ea
resnet34-resnet18     72.07  71.91  71.79  -        -
resnet50-MobileNetV1  73.24  72.75  -      -        -
"""


def read_tables(text):
    """{title: {row: {column: value}}} of blocks: [title], names of the columns, rows of Python literals."""
    tables = {}
    for block in text.strip().split("\n\n"):
        lines = [line.partition("#")[0].split() for line in block.splitlines()]
        (title,), (_, *columns), *rows = [line for line in lines if line]
        table = {}
        for name, *cells in rows:
            table[name] = {k: ast.literal_eval(cell) for k, cell in zip(columns, cells) if cell != "-"}
        tables[title.strip("[]")] = table
    return tables


TABLES = {"cifar100": read_tables(CIFAR_100), "imagenet": read_tables(IMAGENET)}


def tables_of(data):
    return TABLES["imagenet" if data == "imagenet" else "cifar100"]


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
    tables = tables_of(data)
    name = f"{method}-z" if zscore else method
    run = {"teacher": teacher, "student": student, "method": method, "feature": feature}
    numbers = {"known": known(run, data), **tables["schedule"]["all"]}
    numbers |= tables["methods"].get(name, tables["methods"][method])
    for who in (teacher, f"{teacher}-{student}"):
        numbers |= tables["pairs"].get(f"{who}-{method}", {})
    if source == "authors":
        log = tables["logs"].get(f"{teacher}-{student}-{name}", {})
        numbers |= {k: log[k] for k in ("base_temp", "kd_weight", "beta") if k in log}
    else:
        numbers |= tables["released"].get(name, {}) | {"source": source}
    if student.startswith(("MobileNet", "Shuffle")) and "light" in tables["schedule"]:
        numbers["lr"] = min(numbers["lr"], tables["schedule"]["light"]["lr"])
    if entropy:     # as EA-KD's code: MLKD's relations of raw probabilities
        numbers["entropy_temp"] = 2.0 if data == "imagenet" else 3.0
        if method == "mlkd":
            numbers["zscore_relations"] = False
        if name == "mlkd-z" and data != "imagenet":
            numbers["kd_weight"] = 4.0
    if feature:
        numbers |= _feature(teacher, student, feature)
    return numbers


def _feature(teacher, student, feature):
    """What a feature adds to a pair's recipe; where nothing is published, the numbers of a pair like it."""
    tables = TABLES["cifar100"]
    pairs = tables["feature_pairs"]
    row = pairs.get(f"{teacher}-{student}", pairs[_similar_pair(teacher, student)])
    numbers = {"feature": feature} | tables["features"][feature]
    if feature in row:
        numbers["feature_weight"] = row[feature]
    if feature == "catkd":
        numbers |= {"resolution": row["resolution"], "normalize": row["normalize"]}
    return numbers


def _similar_pair(teacher, student):
    if teacher in NARROW and student in NARROW:
        return "resnet56-resnet20"
    kinds = {re.match("[a-z]*", name.lower())[0].replace("wrn", "resnet") for name in (teacher, student)}
    if len(kinds) == 1:
        return "resnet32x4-resnet8x4"
    return "ResNet50-MobileNetV2" if "mobilenet" in student.lower() else "wrn_40_2-ShuffleV1"


def known(run, data="cifar100"):
    """Whether a paper has the pair of a run, without a teacher its student."""
    tables, pair = tables_of(data), f"{run['teacher']}-{run['student']}"
    if run["method"] == "none" and run.get("feature") is None:
        return run["student"] in tables["vanilla"]
    published_feature = run["method"] == "none" and pair in tables.get("feature_pairs", {})
    return pair in tables["published"] or published_feature


def published(teacher, student, method, zscore=False, data="cifar100", feature=None, entropy=False):
    """Published top-1 (%), "none": the student's from scratch, "teacher": the teacher's; None without one.

    With a feature the poster's, which has them without a method ("none") only.
    """
    tables = tables_of(data)
    if method in ("none", "teacher") and feature is None:
        return tables["vanilla"].get(teacher if method == "teacher" else student, {}).get("top1")
    name = method_name({"method": method, "zscore": zscore, "feature": feature, "entropy_temp": entropy})
    for title in ("published", "newer", "published_features"):
        row = tables.get(title, {}).get(f"{teacher}-{student}", {})
        if name in row:
            return row[name]
    return None


def log_of(run, data="cifar100"):
    """The row of a run's authors' log, a dict, {} where there is none, as for every feature."""
    return tables_of(data)["logs"].get(f"{run['teacher']}-{run['student']}-{method_name(run)}", {})


def results_of(run, data="cifar100"):
    """{"published", "logged"} of a run: published top-1 (%), the authors' log's last epoch, or None."""
    of = (run["teacher"], run["student"], run["method"], run["zscore"], data, run.get("feature"),
          bool(run.get("entropy_temp")))
    return {"published": published(*of), "logged": log_of(run, data).get("last")}


# What a run's folder is named by where it differs from the pair's recipe, in this order.
NAME_PARTS = {"base_temp": "tau{:g}", "kd_weight": "kd{:g}", "ce_weight": "ce{:g}", "alpha": "alpha{:g}",
              "beta": "beta{:g}", "lr": "lr{:g}", "weight_decay": "wd{:g}", "batch_size": "batch{}",
              "epochs": "{}epochs", "train_images": "{}images", "val_from_train": "{}val", "size": "{}px",
              "precision": "{}", "source": "{}"}
LONGEST_NAME = 120      # characters; a hash replaces the rest


def changes(run, data="cifar100", precision="fp32"):
    """{key: text} of a run's values that differ from its recipe: {"base_temp": "tau1.5"}.

    run: every resolved value. data: the recipe's, "cifar100" or "imagenet". precision: the device's default.
    """
    usual = recipe(run["teacher"], run["student"], run["method"], run["zscore"],
                   run.get("source", "authors"), data, run.get("feature"), bool(run.get("entropy_temp")))
    usual |= {"train_images": None, "val_from_train": 0, "size": 224 if data == "imagenet" else 32,
              "precision": precision, "source": "authors"}
    return {key: form.format(run[key]) for key, form in NAME_PARTS.items()
            if key in run and run[key] != usual[key]}


def run_name(run, data="cifar100", precision="fp32", teacher_file=False):
    """A run's folder: resnet32x4-resnet8x4-kd-z-tau1.5-seed0, the pair and its `changes`.

    teacher_file: whether the teacher's file was named; run["teacher_sha256"] is then part of the name.
    """
    parts = [label(run["student"], run.get("student_sha256")), method_name(run)]
    if run["teacher"]:
        parts.insert(0, label(run["teacher"], run["teacher_sha256"] if teacher_file else None))
    parts += changes(run, data, precision).values()
    if run["data"] != "cifar100":
        parts.append(run.get("folder", run["data"]))
    name = "-".join([*parts, f"seed{run['seed']}"])
    if len(name) > LONGEST_NAME:
        name = name[:LONGEST_NAME] + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name


def label(name, sha256=None):
    """A network in a name: resnet56, nets-tiny for my/nets.py:tiny, resnet56@a93aca for a file's weights."""
    where, colon, function = name.rpartition(":")
    if where.endswith(".py"):
        where = Path(where).stem
    plain = re.sub(r"[^\w.-]", "-", where + colon + function)
    return f"{plain}@{sha256[:6]}" if sha256 else plain


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
    """What `--list` prints: the tables of a data set."""
    return IMAGENET if data == "imagenet" else CIFAR_100
