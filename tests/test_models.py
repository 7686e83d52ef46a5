"""The networks have the field's names, keys, shapes, sizes and initial weights, and load its checkpoints."""

import hashlib
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoints import guess_network, load_weights
from models import MODELS, create_model

# name: parameters, multiply-accumulates of one image, and the first digits of the SHA-256 of "key shape"
# lines, taken from RepDistiller's and mdistiller's own networks (MobileNetV1 with 1000 classes at 224 x 224,
# the rest 100 at 32 x 32)
KNOWN = {
    "resnet8": (83892, 12507392, "06f573ceec95"),
    "resnet14": (181108, 26663168, "c29c83ce8bb0"),
    "resnet20": (278324, 40818944, "8b3b1efa47e5"),
    "resnet32": (472756, 69130496, "7ce6147d1af0"),
    "resnet44": (667188, 97442048, "4bb062c679bb"),
    "resnet56": (861620, 125753600, "e7a102cf6b9f"),
    "resnet110": (1736564, 253155584, "13df0b1343df"),
    "resnet8x4": (1233540, 177071104, "9a64e9d0fa7c"),
    "resnet32x4": (7433860, 1083040768, "15d00be64ef8"),
    "ResNet18": (11220132, 555468800, "3a7bb19cef1c"),
    "ResNet34": (21328292, 1159448576, "5c28046f707d"),
    "ResNet50": (23705252, 1298014208, "6bcc49538a49"),
    "wrn_16_1": (180916, 26663168, "d715f7fe2c25"),
    "wrn_16_2": (703284, 101118464, "ac7cdeda226a"),
    "wrn_40_1": (569780, 83286272, "170d4c1ca9a5"),
    "wrn_40_2": (2255156, 327610880, "26ca50ca1e15"),
    "vgg8": (3965028, 96192512, "54ab085270b2"),
    "vgg11": (9277284, 209438720, "2ea8ab95ea74"),
    "vgg13": (9462180, 284936192, "7fb2ad96dd5a"),
    "vgg16": (14774436, 398182400, "dba14e69a970"),
    "vgg19": (20086692, 511428608, "3812b05635a4"),
    "MobileNetV2": (812836, 6523648, "3ddc0bf2eef0"),
    "ShuffleV1": (949258, 38691456, "cab61113362f"),
    "ShuffleV2": (1355528, 44504448, "058fe31c4395"),
    "MobileNetV1": (4231976, 568740352, "3086a0bc53a4"),
}


def build(name):
    return create_model(name, 1000 if name == "MobileNetV1" else 100)


def listing(model):
    return [[k, list(v.shape)] for k, v in model.state_dict().items()]


def test_every_network_of_the_papers_is_there():
    assert list(MODELS) == list(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_keys_shapes_parameters_and_work_are_the_fields(name):
    parameters, macs, digest = KNOWN[name]
    model = build(name).eval()
    text = "".join(f"{k} {tuple(shape)}\n" for k, shape in listing(model))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest
    assert sum(p.numel() for p in model.parameters()) == parameters
    size = 224 if name == "MobileNetV1" else 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.rand(1, 3, size, size))
    assert counter.get_total_flops() == 2 * macs
    assert logits.shape == (1, 1000 if name == "MobileNetV1" else 100)


def test_keys_and_shapes_are_those_of_the_reference_file(shared):
    reference = json.loads((shared / "reference" / "models.json").read_text())["models"]
    assert {name: listing(build(name)) for name in MODELS} == {
        name: r["state_dict"] for name, r in reference.items()}
    assert {name: KNOWN[name][:2] for name in MODELS} == {
        n: (r["params"], r["macs"]) for n, r in reference.items()}


def test_the_published_resnet56_loads_and_names_itself(shared):
    assert load_weights(create_model("resnet56"), shared / "teachers" / "resnet56.pt") == {}


def test_names_are_listed_when_one_is_wrong():
    with pytest.raises(ValueError, match="unknown network 'resnet9'; known: resnet8, .*MobileNetV1"):
        create_model("resnet9")
    assert create_model("wrn_16_1", num_classes=7)(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name, conv, linear_std, linear_bias", [
    ("resnet56", "layer3.0.conv2.weight", 64**-0.5 / 3**0.5, None),
    ("wrn_40_2", "block3.layer.1.conv2.weight", 128**-0.5 / 3**0.5, 0),
    ("vgg8", "block4.0.weight", 0.01, 0),
    ("MobileNetV2", "blocks.3.1.conv.3.weight", 0.01, 0),
])
def test_initial_weights_are_the_papers(name, conv, linear_std, linear_bias):
    torch.manual_seed(0)
    state = create_model(name).state_dict()
    weight = state[conv]
    he = (2 / (weight.shape[0] * 9)) ** 0.5         # 3x3; the field's formula has no depthwise groups
    assert weight.std().item() == pytest.approx(he, rel=0.05) and abs(weight.mean()) < he / 10
    assert list(state.values())[-2].std().item() == pytest.approx(linear_std, rel=0.05)
    bias = list(state.values())[-1]
    assert (bias == 0).all() if linear_bias == 0 else bias.std() > 0
    assert all((v == 1).all() for k, v in state.items() if k.endswith(("bn1.weight", "bn2.weight")))


def test_guess_network_tells_all_networks_apart():
    for name in MODELS:
        assert guess_network(build(name).state_dict()) == name
