"""The networks of the distillation papers, under the names and parameter keys that the field uses.

    model = create_model("resnet8x4", num_classes=100)
    logits = model(images)                  # (B, 3, 32, 32) float -> (B, num_classes)
    logits, features = model(images, features=True)         # the maps of its stages too: see Features

Keys and shapes are those of RepDistiller and mdistiller, so their checkpoints load here and ours load there.
All networks take 32 x 32 images, except MobileNetV1 (ImageNet, 224 x 224).
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn


def conv3x3(inp, out, stride=1, groups=1):
    return nn.Conv2d(inp, out, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(inp, out, stride=1, groups=1):
    return nn.Conv2d(inp, out, 1, stride, groups=groups, bias=False)


def conv_bn(conv):
    """A convolution and its batch norm."""
    return [conv, nn.BatchNorm2d(conv.out_channels)]


def conv_bn_relu(conv):
    return [*conv_bn(conv), nn.ReLU(inplace=True)]


def shuffle(x, groups):
    """Interleaves the channels of `groups` groups; channels last in memory, as what follows."""
    x = x.unflatten(1, (groups, -1))
    x = x.transpose(1, 2).flatten(1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def he_init(model):
    """Convolutions N(0, 2 / (k k out)), their biases 0; batch norms are 1 and 0 already."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# -------------------------------------------------------- what all networks share


class Features(NamedTuple):
    """What `model(x, features=True)` gives with the logits; no stage is the stem, n stages have n maps.

    Pre-activation networks (wrn) rectify at the beginning of what follows: pre[k] is the next batch norm of
    post[k], the raw sum. MobileNetV2's stages end without a ReLU: both are the same tensors. ShuffleV2
    shuffles the channels of pre[k] to post[k]; of the other families post[k] = relu(pre[k]).
    """

    pre: tuple              # the stages' maps (B, C, H, W) before their last ReLU
    post: tuple             # the stages' outputs (B, C, H, W)
    last: torch.Tensor      # the map (B, C, H, W) that global pooling averages
    pooled: torch.Tensor    # its average (B, C), which the classifier takes


class Network(nn.Module):
    """One call for all families: a family has its stages and the name of its classifier.

    The methods here fit those of a convolution, a batch norm, a ReLU, and stages layer1, layer2, ...
    """

    head = "fc"

    def forward(self, x, features=False):
        """Logits (B, num_classes) of images; features=True: (logits, Features)."""
        pre, post, last = self.stages(x)
        pooled = F.adaptive_avg_pool2d(last, 1).flatten(1)      # the mean over the map
        classifier = getattr(self, self.head)
        logits = classifier(pooled)
        if features is True:        # torch.fx gives a proxy, of which no truth is known
            return logits, Features(tuple(pre), tuple(post), last, pooled)
        return logits

    def stages(self, x):
        """(pre, post, last) of images, as in Features; the first two are lists."""
        x = F.relu(self.bn1(self.conv1(x)))
        pre, post = run(self.layers(), x)
        return pre, post, post[-1]

    def layers(self):
        return [layer for name, layer in self.named_children() if name.startswith("layer")]

    def norms_before_relu(self):
        """The batch norms that make `pre`, one a stage; [] where there are none."""
        return []


class Stage(nn.Sequential):
    """Units in a row; unit number `which` adds its map before a ReLU to the list `pre`."""

    def forward(self, x, pre=None, which=-1):
        for unit in self:
            x = unit(x, pre if unit is self[which] else None)
        return x


def stage(unit, inp, out, n, stride):
    """n units, of which the first changes channels and size."""
    units = [unit(inp, out, stride)]
    for _ in range(n - 1):
        units.append(unit(out, out, 1))
    return Stage(*units)


def run(stages, x, which=-1):
    """(pre, post) of Stages one after another: the maps that they note and their outputs."""
    pre, post = [], []
    for layer in stages:
        x = layer(x, pre, which)
        post.append(x)
    return pre, post


def note(x, notes):
    """x itself, added to the list `notes` if there is one."""
    if notes is not None:
        notes.append(x)
    return x


# -------------------------------------------------------- ResNet (He et al. 2016; section 4.2 is CIFAR's)


def projection(inp, out, stride):
    """A shortcut: a 1x1 convolution where the shape changes ("option B"), else the input itself."""
    if stride == 1 and inp == out:
        return nn.Sequential()
    return nn.Sequential(*conv_bn(conv1x1(inp, out, stride)))


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, ReLU."""

    shortcut_key = "downsample"

    def __init__(self, inp, out, stride):
        super().__init__()
        self.conv1 = conv3x3(inp, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.add_module(self.shortcut_key, projection(inp, out, stride))

    def forward(self, x, pre=None):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        shortcut = getattr(self, self.shortcut_key)
        return F.relu(note(y + shortcut(x), pre))


class ResNet(Network):
    """widths: the channels of the stem and of each stage; blocks: how many are in each stage."""

    def __init__(self, block, blocks, widths, head, num_classes):
        super().__init__()
        self.head = head
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i, n in enumerate(blocks):
            stride = 1 if i == 0 else 2
            layer = stage(block, widths[i], widths[i + 1], n, stride)
            self.add_module(f"layer{i + 1}", layer)
        self.add_module(head, nn.Linear(widths[-1], num_classes))
        he_init(self)

    def norms_before_relu(self):
        norms = []
        for layer in self.layers():
            block = layer[-1]
            norms.append(block.bn3 if isinstance(block, Bottleneck) else block.bn2)
        return norms


def cifar_resnet(depth, widths, num_classes):
    """depth = 6n + 2: three stages of n blocks."""
    n = (depth - 2) // 6
    return ResNet(BasicBlock, (n, n, n), widths, "fc", num_classes)


# -------------------------------------------------------- ResNet18/34/50, ImageNet's shape with a CIFAR stem


class WideBasicBlock(BasicBlock):
    """BasicBlock with the key of the field's CIFAR ResNet18."""

    shortcut_key = "shortcut"


class Bottleneck(nn.Module):
    """1x1 to a quarter of the channels, 3x3 with the stride, 1x1, plus the shortcut, ReLU."""

    def __init__(self, inp, out, stride):
        super().__init__()
        width = out // 4
        self.conv1 = conv1x1(inp, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = projection(inp, out, stride)

    def forward(self, x, pre=None):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(note(y + self.shortcut(x), pre))


# -------------------------------------------------------- Wide ResNet (Zagoruyko and Komodakis 2016)


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv. Where the width changes, both branches start from the activated input."""

    def __init__(self, inp, out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inp)
        self.conv1 = conv3x3(inp, out, stride)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = conv3x3(out, out)
        self.convShortcut = conv1x1(inp, out, stride) if inp != out else None

    def forward(self, x, pre=None):
        y = F.relu(note(self.bn1(x), pre))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        return shortcut + self.conv2(y)


class WideResNet(Network):
    """depth = 6n + 4, widths 16, 16k, 32k, 64k."""

    def __init__(self, depth, k, num_classes):
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = conv3x3(3, 16)
        # the field's key is block1.layer.0...
        self.block1 = nn.ModuleDict({"layer": stage(PreActBlock, 16, 16 * k, n, 1)})
        self.block2 = nn.ModuleDict({"layer": stage(PreActBlock, 16 * k, 32 * k, n, 2)})
        self.block3 = nn.ModuleDict({"layer": stage(PreActBlock, 32 * k, 64 * k, n, 2)})
        self.bn1 = nn.BatchNorm2d(64 * k)
        self.fc = nn.Linear(64 * k, num_classes)
        he_init(self)
        nn.init.zeros_(self.fc.bias)

    def layers(self):
        return [block["layer"] for block in (self.block1, self.block2, self.block3)]

    def stages(self, x):
        pre, post = run(self.layers(), self.conv1(x), which=0)
        pre.append(self.bn1(post[-1]))
        return pre[1:], post, F.relu(pre[-1])       # the first is the stem's

    def norms_before_relu(self):
        _, second, third = self.layers()
        return [second[0].bn1, third[0].bn1, self.bn1]


# -------------------------------------------------------- VGG with batch norm (Simonyan and Zisserman 2015)


@torch.fx.wrap     # one operation for who traces a network, as it looks at the size
def halve_large(x):
    """The field's VGGs pool once more before the last block on 64 x 64 images, which are 8 x 8 by then."""
    return F.max_pool2d(x, 2) if x.shape[-1] == 8 else x


class VGG(Network):
    """Five blocks of 3x3 convolutions with bias, of which block0 is the stem; one linear layer.

    convs: how many of them are in each block.
    """

    head = "classifier"

    def __init__(self, convs, num_classes):
        super().__init__()
        inp = 3
        for i, width in enumerate((64, 128, 256, 512, 512)):
            layers = []
            for _ in range(convs[i]):
                conv = nn.Conv2d(inp, width, 3, padding=1)
                layers += conv_bn_relu(conv)
                inp = width
            layers.pop()        # the last ReLU is in `stages`
            self.add_module(f"block{i}", nn.Sequential(*layers))
        self.classifier = nn.Linear(512, num_classes)
        he_init(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def stages(self, x):
        pre, post = [], []
        for i, block in enumerate((self.block0, self.block1, self.block2, self.block3, self.block4)):
            pre.append(block(x))
            x = F.relu(pre[-1])
            post.append(x)
            if i < 3:
                x = F.max_pool2d(x, 2)
            elif i == 3:
                x = halve_large(x)
        return pre[1:], post[1:], x

    def norms_before_relu(self):
        return [block[-1] for block in (self.block1, self.block2, self.block3, self.block4)]


# -------------------------------------------------------- MobileNetV2 at half width (Sandler et al. 2018)


class InvertedResidual(nn.Module):
    """1x1 to `expand` times the channels, 3x3 depthwise, 1x1; plus the input where its shape stays."""

    def __init__(self, inp, out, stride, expand):
        super().__init__()
        mid = inp * expand
        self.residual = stride == 1 and inp == out
        self.conv = nn.Sequential(
            *conv_bn_relu(conv1x1(inp, mid)),
            *conv_bn_relu(conv3x3(mid, mid, stride, mid)),
            *conv_bn(conv1x1(mid, out)),
        )

    def forward(self, x):
        y = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(Network):
    """The CIFAR form of the distillation papers (`mobile_half`): width 0.5, ReLU, a stem of stride 2."""

    head = "classifier"
    ends = 1, 2, 4, 6       # of its stages: the last block of each size
    settings = (            # expansion, channels, units, stride of the first
        (1, 8, 1, 1),
        (6, 12, 2, 1),
        (6, 16, 3, 2),
        (6, 32, 4, 2),
        (6, 48, 3, 1),
        (6, 80, 3, 2),
        (6, 160, 1, 1),
    )

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn_relu(conv3x3(3, 16, 2)))
        self.blocks = nn.ModuleList()
        inp = 16
        for expand, width, n, stride in self.settings:
            units = [InvertedResidual(inp, width, stride, expand)]
            for _ in range(n - 1):
                units.append(InvertedResidual(width, width, 1, expand))
            self.blocks.append(nn.Sequential(*units))
            inp = width
        self.conv2 = nn.Sequential(*conv_bn_relu(conv1x1(inp, 1280)))       # not halved
        linear = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(linear)
        he_init(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def stages(self, x):
        post = []
        x = self.conv1(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                post.append(x)
        return post, post, self.conv2(x)

    def norms_before_relu(self):
        return [self.blocks[i][-1].conv[-1] for i in self.ends]


# -------------------------------------------------------- ShuffleNet V1 and V2 (Zhang et al., Ma et al. 2018)


class ShuffleUnitV1(nn.Module):
    """1x1 grouped, shuffle, 3x3 depthwise, 1x1 grouped; a unit of stride 2 concatenates the pooled input."""

    def __init__(self, inp, out, stride):
        super().__init__()
        self.stride = stride
        if stride == 2:
            out -= inp
        mid = out // 4
        self.groups = 1 if inp == 24 else 3        # the stem's 24 channels are not grouped
        self.conv1 = conv1x1(inp, mid, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv3x3(mid, mid, stride, mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv1x1(mid, out, groups=3)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x, pre=None):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = shuffle(y, self.groups)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.stride == 2:
            y = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1)
        else:
            y = y + x
        return F.relu(note(y, pre))


class ShuffleV1(Network):
    head = "linear"

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = stage(ShuffleUnitV1, 24, 240, 4, 2)
        self.layer2 = stage(ShuffleUnitV1, 240, 480, 8, 2)
        self.layer3 = stage(ShuffleUnitV1, 480, 960, 4, 2)
        self.linear = nn.Linear(960, num_classes)


class ShuffleUnitV2(nn.Module):
    """Half of the channels pass, half go through 1x1, 3x3 depthwise, 1x1; then a shuffle in two groups."""

    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, 1, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x, pre=None):
        kept, y = x.chunk(2, 1)
        y = F.relu(self.bn1(self.conv1(y)), inplace=True)
        y = self.bn2(self.conv2(y))
        y = F.relu(self.bn3(self.conv3(y)))
        return shuffle(note(torch.cat([kept, y], 1), pre), 2)


class ShuffleDownV2(nn.Module):
    """Both branches see the whole input at stride 2."""

    def __init__(self, inp, out):
        super().__init__()
        half = out // 2
        self.conv1 = conv3x3(inp, inp, 2, inp)
        self.bn1 = nn.BatchNorm2d(inp)
        self.conv2 = conv1x1(inp, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(inp, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, 2, half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x, pre=None):
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)))
        return shuffle(note(torch.cat([left, right], 1), pre), 2)


class ShuffleV2(Network):
    """Size 1: 116, 232, 464 channels, 1024 before the classifier."""

    head = "linear"

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.conv2 = conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(inp, out, n):
        units = [ShuffleDownV2(inp, out)]
        for _ in range(n):
            units.append(ShuffleUnitV2(out))
        return Stage(*units)

    def stages(self, x):
        pre, post, x = super().stages(x)
        x = F.relu(self.bn2(self.conv2(x)))
        return pre, post, x


# -------------------------------------------------------- MobileNetV1 for ImageNet (Howard et al. 2017)


class SeparableUnit(nn.Sequential):
    """Depthwise conv-BN-ReLU, 1x1 conv-BN, and the ReLU that is not among its layers."""

    def forward(self, x, pre=None):
        return F.relu(note(super().forward(x), pre), inplace=pre is None)


class MobileNetV1(Network):
    ends = 3, 5, 11, 13     # of its stages: the last unit of each size
    widths = 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024

    def __init__(self, num_classes):
        super().__init__()
        units = [nn.Sequential(*conv_bn_relu(conv3x3(3, 32, 2)))]
        inp = 32
        for out in self.widths:
            stride = 2 if out > inp and out > 64 else 1
            depthwise = conv3x3(inp, inp, stride, inp)
            units.append(SeparableUnit(*conv_bn_relu(depthwise), *conv_bn(conv1x1(inp, out))))
            inp = out
        self.model = nn.Sequential(*units)
        self.fc = nn.Linear(1024, num_classes)

    def stages(self, x):
        pre, post = [], []
        for i, unit in enumerate(self.model):
            if i in self.ends:
                x = unit(x, pre)
                post.append(x)
            else:
                x = unit(x)
        return pre, post, x

    def norms_before_relu(self):
        return [self.model[i][-1] for i in self.ends]


# -------------------------------------------------------- under autocast


class Float32:
    """Mixed into a layer, it computes in float32 also under autocast."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def float32_head(network):
    """Makes a network's last layer compute its logits in float32 under autocast; the network itself.

    In bfloat16 they would be off by 2e-3 of their range, and the first class of one image in 200 another.
    """
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if layers and not isinstance(layers[-1], Float32):
        kind = type(layers[-1])
        name = f"Float32{kind.__name__}"
        layers[-1].__class__ = type(name, (Float32, kind), {"__module__": kind.__module__})     # for torch.fx
    return network


# -------------------------------------------------------- names

NARROW = 16, 16, 32, 64         # channels of the stem and the three stages
WIDE = 32, 64, 128, 256

MODELS = {
    "resnet8": partial(cifar_resnet, 8, NARROW),
    "resnet14": partial(cifar_resnet, 14, NARROW),
    "resnet20": partial(cifar_resnet, 20, NARROW),
    "resnet32": partial(cifar_resnet, 32, NARROW),
    "resnet44": partial(cifar_resnet, 44, NARROW),
    "resnet56": partial(cifar_resnet, 56, NARROW),
    "resnet110": partial(cifar_resnet, 110, NARROW),
    "resnet8x4": partial(cifar_resnet, 8, WIDE),
    "resnet32x4": partial(cifar_resnet, 32, WIDE),
    "ResNet18": partial(ResNet, WideBasicBlock, (2, 2, 2, 2), (64, 64, 128, 256, 512), "linear"),
    "ResNet34": partial(ResNet, WideBasicBlock, (3, 4, 6, 3), (64, 64, 128, 256, 512), "linear"),
    "ResNet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), (64, 256, 512, 1024, 2048), "linear"),
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
    "MobileNetV1": MobileNetV1,
}


def create_model(name, num_classes=100):
    """The network `name`, initialised as in its papers' code; `model.name` keeps the name.

    Raises ValueError that lists the names. Draws from torch's global generator.
    """
    if name not in MODELS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(MODELS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    model = MODELS[name](num_classes)
    model.name = name
    return model
