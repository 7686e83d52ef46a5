"""models.py against forward passes written a second time, from the papers' facts, out of a state_dict.

Depths come from the keys and widths from the shapes; strides, paddings, groups and activations are written
out. With the weights of `random_state` leaving out any one ReLU moves the logits by a hundredth of the
largest or more.
"""

import pytest
import torch
import torch.nn.functional as F

from models import MODELS, create_model


class Layers:
    """Functional layers of one state dict. `training` takes batch statistics; buffers are never written."""

    def __init__(self, state, training):
        self.state, self.training = state, training

    def count(self, prefix):
        """How many different numbers follow `prefix` in the keys: the number of units in a sequence."""
        return len({key[len(prefix):].split(".")[0] for key in self.state if key.startswith(prefix)})

    def conv(self, key, x, stride, padding, groups=1):
        weight, bias = self.state[f"{key}.weight"], self.state.get(f"{key}.bias")
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=groups)

    def depthwise(self, key, x, stride):
        return self.conv(key, x, stride, padding=1, groups=x.shape[1])

    def norm(self, key, x):
        mean, var, weight, bias = (self.state[f"{key}.{n}"]
                                   for n in ("running_mean", "running_var", "weight", "bias"))
        if self.training:
            mean = var = None
        return F.batch_norm(x, mean, var, weight, bias, training=self.training, eps=1e-5)

    def linear(self, key, x):
        return F.linear(x.flatten(1), self.state[f"{key}.weight"], self.state[f"{key}.bias"])


def shuffle(x, groups):
    """Read the channels as (groups, n) and write them as (n, groups)."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


def residual_unit(net, unit, x, stride, shortcut):
    """Post-activation unit: bottleneck (1x1, 3x3 with the stride, 1x1) if it has conv3, else basic (3x3s)."""
    if f"{unit}.conv3.weight" in net.state:
        y = F.relu(net.norm(f"{unit}.bn1", net.conv(f"{unit}.conv1", x, stride=1, padding=0)))
        y = F.relu(net.norm(f"{unit}.bn2", net.conv(f"{unit}.conv2", y, stride=stride, padding=1)))
        y = net.norm(f"{unit}.bn3", net.conv(f"{unit}.conv3", y, stride=1, padding=0))
    else:
        y = F.relu(net.norm(f"{unit}.bn1", net.conv(f"{unit}.conv1", x, stride=stride, padding=1)))
        y = net.norm(f"{unit}.bn2", net.conv(f"{unit}.conv2", y, stride=1, padding=1))
    if stride == 2 or x.shape[1] != y.shape[1]:
        x = net.norm(f"{unit}.{shortcut}.1", net.conv(f"{unit}.{shortcut}.0", x, stride=stride, padding=0))
    return F.relu(x + y)


def resnet(net, x):
    """resnet* (three stages, classifier `fc`) and ResNet* (four stages, classifier `linear`)."""
    small = "fc.weight" in net.state
    strides, shortcut = ((1, 2, 2), "downsample") if small else ((1, 2, 2, 2), "shortcut")
    x = F.relu(net.norm("bn1", net.conv("conv1", x, stride=1, padding=1)))
    for stage, first_stride in enumerate(strides, start=1):
        for i in range(net.count(f"layer{stage}.")):
            x = residual_unit(net, f"layer{stage}.{i}", x, first_stride if i == 0 else 1, shortcut)
    return (net.linear("fc", F.avg_pool2d(x, 8)) if small
            else net.linear("linear", F.adaptive_avg_pool2d(x, 1)))


def wide_resnet(net, x):
    x = net.conv("conv1", x, stride=1, padding=1)  # no BN, no ReLU: the units are pre-activation
    for stage, first_stride in enumerate((1, 2, 2), start=1):
        for i in range(net.count(f"block{stage}.layer.")):
            unit, stride = f"block{stage}.layer.{i}", first_stride if i == 0 else 1
            active = F.relu(net.norm(f"{unit}.bn1", x))
            y = F.relu(net.norm(f"{unit}.bn2", net.conv(f"{unit}.conv1", active, stride=stride, padding=1)))
            y = net.conv(f"{unit}.conv2", y, stride=1, padding=1)
            if x.shape[1] != y.shape[1]:  # the 1x1 takes the activated input, the identity the raw one
                x = net.conv(f"{unit}.convShortcut", active, stride=stride, padding=0)
            x = x + y
    return net.linear("fc", F.avg_pool2d(F.relu(net.norm("bn1", x)), 8))


def vgg(net, x):
    for block in range(5):
        for i in range(0, net.count(f"block{block}.") // 2 * 3, 3):  # conv i, BN i + 1, ReLU i + 2 (no key)
            x = F.relu(net.norm(f"block{block}.{i + 1}",
                                net.conv(f"block{block}.{i}", x, stride=1, padding=1)))
        if block < 3:  # a pool after block 3 exists for 64x64 images only
            x = F.max_pool2d(x, kernel_size=2, stride=2)
    return net.linear("classifier", F.adaptive_avg_pool2d(x, 1))


def mobilenet_v2(net, x):
    x = F.relu(net.norm("conv1.1", net.conv("conv1.0", x, stride=2, padding=1)))
    for stage, first_stride in enumerate((1, 1, 2, 2, 1, 2, 1)):
        for i in range(net.count(f"blocks.{stage}.")):
            unit, stride = f"blocks.{stage}.{i}.conv", first_stride if i == 0 else 1
            y = F.relu(net.norm(f"{unit}.1", net.conv(f"{unit}.0", x, stride=1, padding=0)))
            y = F.relu(net.norm(f"{unit}.4", net.depthwise(f"{unit}.3", y, stride)))
            y = net.norm(f"{unit}.7", net.conv(f"{unit}.6", y, stride=1, padding=0))  # linear bottleneck
            x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
    x = F.relu(net.norm("conv2.1", net.conv("conv2.0", x, stride=1, padding=0)))
    return net.linear("classifier.0", F.avg_pool2d(x, 2, ceil_mode=True))


def shufflenet_v1(net, x):
    x = F.relu(net.norm("bn1", net.conv("conv1", x, stride=1, padding=0)))
    for stage in (1, 2, 3):
        for i in range(net.count(f"layer{stage}.")):
            unit, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
            groups = 1 if stage == 1 and i == 0 else 3  # the 24-channel stem is neither grouped nor shuffled
            y = F.relu(net.norm(f"{unit}.bn1",
                                net.conv(f"{unit}.conv1", x, stride=1, padding=0, groups=groups)))
            y = F.relu(net.norm(f"{unit}.bn2", net.depthwise(f"{unit}.conv2", shuffle(y, groups), stride)))
            y = net.norm(f"{unit}.bn3", net.conv(f"{unit}.conv3", y, stride=1, padding=0, groups=3))
            x = F.relu(torch.cat((y, F.avg_pool2d(x, 3, stride=2, padding=1)), dim=1) if stride == 2
                       else x + y)
    return net.linear("linear", F.avg_pool2d(x, 4))


def shufflenet_v2_branch(net, unit, x, first, stride):
    """1x1-BN-ReLU, depthwise 3x3-BN, 1x1-BN-ReLU, in the convolutions numbered from `first`."""
    x = F.relu(net.norm(f"{unit}.bn{first}", net.conv(f"{unit}.conv{first}", x, stride=1, padding=0)))
    x = net.norm(f"{unit}.bn{first + 1}", net.depthwise(f"{unit}.conv{first + 1}", x, stride))
    return F.relu(net.norm(f"{unit}.bn{first + 2}",
                           net.conv(f"{unit}.conv{first + 2}", x, stride=1, padding=0)))


def shufflenet_v2(net, x):
    x = F.relu(net.norm("bn1", net.conv("conv1", x, stride=1, padding=0)))
    for stage in (1, 2, 3):
        for i in range(net.count(f"layer{stage}.")):
            unit = f"layer{stage}.{i}"
            if i == 0:
                left = net.norm(f"{unit}.bn1", net.depthwise(f"{unit}.conv1", x, stride=2))
                left = F.relu(net.norm(f"{unit}.bn2", net.conv(f"{unit}.conv2", left, stride=1, padding=0)))
                right = shufflenet_v2_branch(net, unit, x, first=3, stride=2)
            else:
                left, right = x.chunk(2, dim=1)
                right = shufflenet_v2_branch(net, unit, right, first=1, stride=1)
            x = shuffle(torch.cat((left, right), dim=1), groups=2)
    x = F.relu(net.norm("bn2", net.conv("conv2", x, stride=1, padding=0)))
    return net.linear("linear", F.avg_pool2d(x, 4))


def mobilenet_v1(net, x):
    x = F.relu(net.norm("model.0.1", net.conv("model.0.0", x, stride=2, padding=1)))
    for i, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), start=1):
        x = F.relu(net.norm(f"model.{i}.1", net.depthwise(f"model.{i}.0", x, stride)))
        x = F.relu(net.norm(f"model.{i}.4", net.conv(f"model.{i}.3", x, stride=1, padding=0)))
    return net.linear("fc", F.avg_pool2d(x, 7))


NETWORKS = {
    "MobileNetV1": mobilenet_v1, "MobileNetV2": mobilenet_v2,
    "ShuffleV1": shufflenet_v1, "ShuffleV2": shufflenet_v2,
    **{f"resnet{size}": resnet for size in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")},
    **{f"ResNet{depth}": resnet for depth in (18, 34, 50)},
    **{f"wrn_{depth}_{factor}": wide_resnet for depth in (16, 40) for factor in (1, 2)},
    **{f"vgg{depth}": vgg for depth in (8, 11, 13, 16, 19)},
}


# ---------------------------------------------------------------- the comparison


def random_state(model, generator):
    """Weights by which all layers matter: He's deviation, gains and variances near 1, small biases."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = value
        elif value.ndim > 1:
            fan_in = value.numel() / value.shape[0]
            state[key] = (2 / fan_in) ** 0.5 * torch.randn(value.shape, generator=generator,
                                                           dtype=torch.float64)
        elif key.endswith("running_var") or (key.endswith("weight")):
            state[key] = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
        else:
            state[key] = 0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return state


@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_reference(name, generator):
    model = create_model(name).double()
    state = random_state(model, generator)
    model.load_state_dict(state)
    size = 224 if name == "MobileNetV1" else 32
    images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    for training in (False, True):
        with torch.no_grad():
            ours = model.train(training)(images)
            reference = NETWORKS[name](Layers(state, training), images)
        assert ours.shape == (2, 100)
        assert (ours - reference).abs().max() <= 1e-9 * reference.abs().max(), training
