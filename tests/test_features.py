"""model(x, features=True): which tensor is which, for models.py's networks, torchvision's and custom ones.

The tensors of models.py's networks are looked up in test_models_forward.py's second implementation, which
notes what goes into each convolution and ReLU and what comes out of each batch norm.
"""

import copy
import itertools
import textwrap

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from checkpoints import load_pretrained
from models import Features, create_model, float32_head
from networks import TORCHVISION, create, with_features
from test_models_forward import NETWORKS, Layers, random_state, shuffle

# channels and sides of the stages; channels of `last`; the batch norms of which `pre` is made
KNOWN = {
    "resnet14": ((16, 32, 64), (32, 16, 8), 64, [f"layer{k}.1.bn2" for k in (1, 2, 3)]),
    "ResNet18": ((64, 128, 256, 512), (32, 16, 8, 4), 512, [f"layer{k}.1.bn2" for k in (1, 2, 3, 4)]),
    "ResNet50": ((256, 512, 1024, 2048), (32, 16, 8, 4), 2048,
                 ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"]),
    "wrn_16_2": ((32, 64, 128), (32, 16, 8), 128, ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
    "vgg8": ((128, 256, 512, 512), (16, 8, 4, 4), 512, [f"block{k}.1" for k in (1, 2, 3, 4)]),
    "MobileNetV2": ((12, 16, 48, 160), (16, 8, 4, 2), 1280,
                    ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"]),
    "ShuffleV1": ((240, 480, 960), (16, 8, 4), 960, []),
    "ShuffleV2": ((116, 232, 464), (16, 8, 4), 1024, []),
    "MobileNetV1": ((128, 256, 512, 1024), (56, 28, 14, 7), 1024, [f"model.{i}.4" for i in (3, 5, 11, 13)]),
}
SMALL = "resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "MobileNetV1"   # each family
small = pytest.mark.parametrize("name", SMALL)
modes = pytest.mark.parametrize("training", [False, True])


class Noting(Layers):
    """Notes by its key what goes into each layer and what comes out of each batch norm."""

    def __init__(self, *given):
        super().__init__(*given)
        self.into, self.out = {}, {}

    def conv(self, key, x, *rest, **more):
        self.into[key] = x
        return super().conv(key, x, *rest, **more)

    def norm(self, key, x):
        self.into[key] = x
        self.out[key] = super().norm(key, x)
        return self.out[key]

    def linear(self, key, x):
        self.into["classifier"] = x.flatten(1)
        return super().linear(key, x)


def expected(name, state, images, training, monkeypatch):
    """Features of images by the second implementation."""
    net, before = Noting(state, training), []
    with monkeypatch.context() as patch:
        relu = F.relu
        patch.setattr(F, "relu", lambda x: before.append(x) or relu(x))
        NETWORKS[name](net, images)
    last = F.relu(before[-1])       # of all families
    if name.startswith(("resnet", "ResNet", "ShuffleV1")):      # the sum or concat before a unit's last ReLU
        relus = 3 if name in ("ResNet50", "ShuffleV1") else 2   # in a unit; one is the stem's
        units = [net.count(f"layer{k}.") for k in range(1, 5)]
        pre = [before[relus * n] for n in itertools.accumulate(n for n in units if n)]
        post = [F.relu(x) for x in pre]
    elif name.startswith("wrn"):
        pre, post = [[notes[key] for key in KNOWN[name][3]] for notes in (net.out, net.into)]   # raw sums
    elif name == "MobileNetV2":
        post = pre = [net.into[f"{key}.0"] for key in ("blocks.2.0.conv", "blocks.3.0.conv",
                                                       "blocks.5.0.conv", "conv2")]
    elif name == "ShuffleV2":       # units end with the shuffle
        post = [net.into[key] for key in ("layer2.0.conv1", "layer3.0.conv1", "conv2")]
        pre = [shuffle(x, x.shape[1] // 2) for x in post]       # which this undoes
    else:
        pre = [net.out[key] for key in KNOWN[name][3]]
        post = [F.relu(x) for x in pre]
    return Features(pre, post, last, net.into["classifier"])


@modes
@pytest.mark.parametrize("name", KNOWN)
def test_features_are_those_of_the_second_implementation(name, training, generator, monkeypatch):
    """Also none of them is overwritten by what is computed after it."""
    channels, sides, width, norms = KNOWN[name]
    model = create_model(name).double().train(training)
    state = random_state(model, generator)
    model.load_state_dict(state)
    size = 224 if name == "MobileNetV1" else 32
    images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits, features = model(images, features=True)
        known = expected(name, state, images, training, monkeypatch)
        torch.testing.assert_close(logits, model(images), rtol=0, atol=0)   # the same in either call
    assert type(features.pre) is type(features.post) is tuple
    for ours, reference in [*zip(features.pre, known.pre, strict=True), (features.last, known.last),
                            *zip(features.post, known.post, strict=True), (features.pooled, known.pooled)]:
        assert ours.shape == reference.shape
        assert (ours - reference).abs().max() <= 1e-9 * reference.abs().max()
    assert [x.shape for x in features.pre] == [x.shape for x in features.post] == [
        (2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert features.last.shape == (2, width, sides[-1], sides[-1]) and features.pooled.shape == (2, width)
    assert model.norms_before_relu() == [model.get_submodule(key) for key in norms]
    assert [norm.num_features for norm in model.norms_before_relu()] == [*channels] * bool(norms)


def test_vgg_on_64_pixels_pools_before_its_last_block():
    _, (pre, post, last, _) = create_model("vgg8")(torch.rand(2, 3, 64, 64), features=True)
    assert [x.shape[-1] for x in post] == [32, 16, 8, 4] and last is post[-1]
    assert all(torch.equal(F.relu(x), y) for x, y in zip(pre, post))


@small
def test_a_call_with_features_is_one_step(name, generator):
    """Batch norms count one batch; each map is on the way from the weights, so that a loss on it teaches."""
    model = create_model(name).train()
    logits, features = model(torch.randn(2, 3, 32, 32, generator=generator), features=True)
    assert {int(v) for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")} == {1}
    first = next(model.parameters())
    for x in (*features.pre, *features.post, features.last, features.pooled, logits):
        gradient, = torch.autograd.grad((x * torch.randn_like(x)).sum(), first, retain_graph=True)
        assert gradient.abs().max() > 0
    total = sum(x.square().mean() for x in (*features.pre, *features.post, features.last, logits))
    total.backward()
    assert all(p.grad is not None for p in model.parameters())


@small
def test_modules_are_called_as_ever(name, generator):
    """Hooks on stages and blocks, for Grad-CAM and the like, see what they saw: one map a call."""
    model, seen = create_model(name).eval(), {}
    stages = {"wrn_16_1": [f"block{k}.layer" for k in (1, 2, 3)], "vgg8": [],
              "MobileNetV1": [f"model.{i}" for i in (3, 5, 11, 13)],
              "MobileNetV2": [f"blocks.{i}" for i in (1, 2, 4, 6)]}.get(name, ["layer1", "layer2", "layer3"])
    for key in stages:
        model.get_submodule(key).register_forward_hook(lambda m, x, y, key=key: seen.update({key: y}))
    _, features = model(torch.randn(2, 3, 32, 32, generator=generator), features=True)
    assert all(seen[key] is x for key, x in zip(stages, features.post))


@pytest.mark.parametrize("name", ["wrn_16_1", "ShuffleV2"])
def test_a_call_with_features_compiles_to_one_graph(name, generator):
    model, images = create_model(name).train(), torch.randn(2, 3, 32, 32, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    (logits, features), (known, others) = compiled(images, features=True), model(images, features=True)
    assert isinstance(features, Features) and torch.equal(logits, known)
    assert all(map(torch.equal, (*features.pre, *features.post, *features[2:]),
                   (*others.pre, *others.post, *others[2:])))


class Part(nn.Module):
    """One of a network's features, as a network: what is deployed of a student with a replaced head."""

    def __init__(self, student, part):
        super().__init__()
        self.student, self.part = student, part

    def forward(self, x):
        return self.part(self.student(x, features=True)[1])


@pytest.mark.parametrize("name, part, dead", [
    ("resnet8", lambda f: f.pooled, {"fc"}),
    ("wrn_16_1", lambda f: f.post[-1], {"bn1", "fc"}),
    ("ShuffleV2", lambda f: f.post[-1], {"conv2", "bn2", "linear"}),
    ("shufflenet_v2_x0_5", lambda f: f.post[-1], {"conv5", "fc"}),
    ("regnet_y_400mf", lambda f: f.post[1], {"trunk_output.block3", "trunk_output.block4", "fc"}),
])
def test_a_traced_part_has_only_its_own_weights(name, part, dead, generator):
    model = with_features(create(name, 10)).eval()
    images = torch.randn(2, 3, 64, 64, generator=generator)
    traced = torch.fx.symbolic_trace(Part(model, part))
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    assert {k.removeprefix("student.") for k in traced.state_dict()} == {
        k for k in model.state_dict() if not k.startswith(tuple(f"{d}." for d in dead))}
    assert torch.equal(traced(images), part(model(images, features=True)[1]))


# ---------------------------------------------------------------- torchvision's


@modes
@pytest.mark.parametrize("name, layers, channels", [
    ("resnet50", [f"layer{i}" for i in (1, 2, 3, 4)], [256, 512, 1024, 2048]),
    ("shufflenet_v2_x0_5", ["stage2", "stage3", "stage4"], [48, 96, 192]),
    ("regnet_y_400mf", [f"trunk_output.block{i}" for i in (1, 2, 3, 4)], [48, 104, 208, 440]),
    ("efficientnet_b0", [], []),        # its stochastic depth is not a layer that is told the mode
])
def test_torchvisions_features_are_its_layers(name, layers, channels, training, generator):
    model, seen = create(name, 10, TORCHVISION).train(not training), {}
    keys, modules = list(model.state_dict()), list(model.modules())
    assert with_features(model) is with_features(model) is model and list(model.state_dict()) == keys
    assert list(model.modules()) == modules and {m.training for m in modules} == {not training}
    model.train(training)       # afterwards: either mode has its own graph
    hooks = [model.get_submodule(key).register_forward_hook(
        lambda m, x, output, key=key: seen.update({key: output.clone()})) for key in layers]
    head = [m for m in modules if isinstance(m, nn.Linear)][-1]
    hooks.append(head.register_forward_pre_hook(lambda m, x: seen.update(pooled=x[0].clone())))
    images = torch.randn(2, 3, 64, 64, generator=generator)
    torch.manual_seed(0)        # dropout
    known = model(images)
    for hook in hooks:
        hook.remove()
    torch.manual_seed(0)
    logits, features = model(images, features=True)
    assert isinstance(features, Features) and features.pre == ()
    assert torch.equal(logits, known) and torch.equal(features.pooled, seen["pooled"])
    assert all(torch.equal(x, seen[key]) for x, key in zip(features.post, layers, strict=True))
    assert [x.shape[1] for x in features.post] == channels
    if name.startswith("shufflenet"):       # another layer is pooled
        assert torch.equal(features.last.mean((2, 3)), features.pooled)
    else:
        assert features.last is (features.post[-1] if layers else None)
    counts = [int(v) for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")]
    assert set(counts) == {2 if training else 0}        # one a call


def test_torchvisions_features_follow_the_network(generator):
    """A copy, another type, a head in float32, a compiled one, and pretrained weights, as before."""
    images = torch.randn(2, 3, 64, 64, generator=generator)
    model = with_features(create("resnet18", 10)).eval()
    logits, features = model(images, features=True)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        double.fc.weight.zero_()
    assert torch.equal(double(images.double(), features=True)[0][0], double.fc.bias)
    torch.testing.assert_close(model(images, features=True)[0], logits, rtol=0, atol=0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images, features=True)
    assert torch.equal(compiled[0], logits) and torch.equal(compiled[1].pooled, features.pooled)
    other = with_features(float32_head(create("resnet18", 10)).eval())
    other.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        head, features = other(images, features=True)
    assert head.dtype == torch.float32 and features.last.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="torchvision has no IMAGENET1K_V9 of resnet18, but"):
        load_pretrained(model, "IMAGENET1K_V9")


def test_networks_that_give_no_features_say_so():
    with pytest.raises(ValueError, match=r"^squeezenet1_1 gives no features: it has no linear layer$"):
        with_features(create("squeezenet1_1", 10))

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x.mean((2, 3))) if x.sum() > 0 else self.fc(x.amax((2, 3)))

    with pytest.raises(ValueError, match="^Branching gives no features: it cannot be traced .*control flow"):
        with_features(Branching())


# ---------------------------------------------------------------- custom networks


def test_a_custom_network_gives_its_features_itself(tmp_path, generator):
    (tmp_path / "nets.py").write_text(textwrap.dedent("""
        from torch import nn


        class Pair(nn.Module):
            def __init__(self, num_classes):
                super().__init__()
                self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

            def forward(self, x):
                x = self.conv(x).relu().mean((2, 3))
                return self.fc(x), x


        class Gives(Pair):
            def forward(self, x, features=False):
                assert x.is_contiguous()
                logits, pooled = super().forward(x)
                return (logits, ((), (), None, pooled)) if features else (logits, "something else")
    """))
    images = torch.randn(2, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    model = create(f"{tmp_path / 'nets.py'}:Gives", 10)
    assert with_features(model) is model
    logits, (_, _, _, pooled) = model(images, features=True)
    assert torch.equal(model(images), logits) and torch.equal(model.fc(pooled), logits)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, features=True)[0], logits)
    with pytest.raises(ValueError, match=r"^nets-Pair gives no features: its forward\(x, features=True\) "
                       r"must return \(logits, Features\(pre, post, last, pooled\)\), see models.py$"):
        with_features(create(f"{tmp_path / 'nets.py'}:Pair", 10))
