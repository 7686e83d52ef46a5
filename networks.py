"""Networks by name: models.py's, torchvision's, timm's and custom ones; what they take and give.

    create("resnet8x4", 10)                     # models.py's
    create("my/nets.py:tiny", 10)               # tiny(num_classes=10), of a file
    create("package.module:tiny", 10)           # of an installed or a nearby module
    create("timm:resnet18", 10)                 # with timm installed
    create("resnet18", 10, TORCHVISION)         # torchvision's first, then models.py's
"""

import functools
import hashlib
import http.client
import importlib
import inspect
import re
import sys
from pathlib import Path

import torch
import torch.fx
import torchvision.models
from torch import nn

import feature_kd
from models import MODELS, Features, Network, create_model
from recipes import label
from run import first_line

ROOT = Path(__file__).resolve().parent
OTHERS = ("googlenet", "inception_v3")      # return more than logits
TORCHVISION = [n for n in torchvision.models.list_models(module=torchvision.models) if n not in OTHERS]


def create(name, num_classes, first=MODELS):
    """The network, (B, 3, H, W) -> logits (B, num_classes), initialised; `model.name` can name a file.

    first: MODELS or TORCHVISION, where both have the name. A custom network, which may view its maps as
    vectors, gets contiguous images; a tuple's first entry is its logits. ValueError, one line. Draws from
    torch's global generator.
    """
    if ":" in name:
        model = _custom(name, num_classes)
        model.register_forward_pre_hook(lambda module, inputs: tuple(x.contiguous() for x in inputs))
        model.register_forward_hook(_keep_logits, with_kwargs=True)
        model.name, model.own = label(name), True
        _, model.code = _module(name.rpartition(":")[0])
        return model
    if name in TORCHVISION and (first is TORCHVISION or name not in MODELS):
        model = torchvision.models.get_model(name, num_classes=num_classes)
    else:
        model = create_model(name, num_classes)
    model.name, model.own = name, False
    return model


def layout(model):
    """The memory format of a network's weights and images: the faster one, for a custom one the usual one."""
    return torch.contiguous_format if model.own else torch.channels_last


def _logits(output):
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _keep_logits(module, inputs, options, output):
    """A forward hook: the logits alone, where features are not asked for."""
    return output if options.get("features") else _logits(output)


def _custom(name, num_classes):
    where, _, function = name.rpartition(":")
    try:
        module, _ = _module(where)
        if where == "timm":
            model = module.create_model(function, num_classes=num_classes)
        else:
            model = getattr(module, function)(num_classes=num_classes)
    except (Exception, SystemExit) as error:        # of the user's code, any
        raise ValueError(f"{name} with num_classes={num_classes} fails ({_reason(error)})") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returns a {type(model).__name__}, not a torch.nn.Module")
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise ValueError(f"{name} has lazy layers: give them their sizes")
    return model


@functools.cache
def _module(where):
    """A user's module by its file (*.py) or its name, and a hash of its code: see Teacher.cache_logits.

    During its import, our modules of the names that its folder has are set aside. Its own are forgotten
    afterwards: another file's helper may have the same name.
    """
    name, folder = where, Path.cwd()
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        name, folder = path.stem, path.parent
    before = dict(sys.modules)
    nearby = {path.stem for path in folder.glob("*")}
    if folder != ROOT:
        for ours in ROOT.glob("*.py"):
            if ours.stem in nearby:
                sys.modules.pop(ours.stem, None)
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
        return module, hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:16]
    finally:
        sys.path.append(sys.path.pop(0))        # for what it imports later
        for other in sys.modules.keys() - before.keys():
            if other.partition(".")[0] in nearby:
                del sys.modules[other]
        sys.modules.update(before)


def _reason(error):
    return f"{type(error).__name__}: {first_line(error)}"


def check_model(name, num_classes, size, first=MODELS, say=print, learns=False, smallest=2):
    """ValueError, one line, where a network does not make logits of images of size x size, in either mode.

    learns: it needs something to learn. smallest: the fewest images that it will learn from at once.
    """
    with torch.random.fork_rng(devices=[]):
        model = _custom(name, num_classes) if ":" in name else create(name, num_classes, first)
        if learns and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{name} has no parameter that learns")
        batch = min(smallest, 2) if learns else 2
        output = check_logits(model.train(), name, num_classes, size, batch)
        if isinstance(output, (tuple, list)):
            say(f"notice: {name} returns {len(output)} values; the first is taken as its logits")
        check_logits(model.eval(), name, num_classes, size)


@torch.no_grad()
def check_logits(model, name, num_classes, size, batch=2):
    """A network's output for a batch of images. ValueError, one line, where that is not its logits."""
    try:
        output = model(_images(batch, size))
    except (Exception, SystemExit) as error:        # of any network, any
        cure = "another --size" if batch > 1 else "another --batch-size: one image is left over"
        raise ValueError(f"{name} does not take images of {size} x {size} pixels ({_reason(error)}): choose "
                         f"{cure}") from None
    logits = _logits(output)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (batch, num_classes):
        raise ValueError(f"{name} makes {shape} of {batch} images and {num_classes} classes, not logits "
                         f"({batch}, {num_classes}): it has to take num_classes")
    return output


def _images(batch, size):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def feature_method(recipe, student, teacher, labels, size):
    """A recipe's feature_kd.Method between two networks on one device. ValueError where it does not fit them.

    labels: (n,) classes of the training images; size: pixels of an image's side. The networks are in
    evaluation mode afterwards.
    """
    options = {k: recipe[k] for k in ("resolution", "normalize", "factor") if k in recipe}
    if recipe["feature"] == "catkd":
        options["fresh"] = "student_sha256" not in recipe       # else the student begins with given weights
    images = _images(2, size).to(next(student.parameters()).device)
    z, student_features = with_features(student).eval()(images, features=True)
    v, teacher_features = with_features(teacher).eval()(images, features=True)
    build = feature_kd.METHODS[recipe["feature"]]
    return build(student, teacher, student_features, teacher_features, labels, logits=(z, v), **options)


def check_feature(recipe, num_classes, size, first=MODELS, smallest=2):
    """ValueError, one line, where a recipe's feature method does not take its two networks, or their images.

    smallest: the fewest images that will be computed at once.
    """
    if not recipe.get("feature"):
        return
    batch = min(smallest, 2)
    indices = torch.arange(batch)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        student, teacher = (create(recipe[k], num_classes, first) for k in ("student", "teacher"))
        try:
            method = feature_method(recipe, student, teacher, torch.arange(2), size)
            logits, student_features = student(_images(batch, size), features=True)
            _, teacher_features = teacher(_images(batch, size), features=True)
            method.train(batch == 1)
            method.loss_and_logits(logits, student_features, teacher_features, indices, indices)
        except Exception as error:      # of any networks, any
            cure = "; one image is left over: give another --batch-size" if batch == 1 else ""
            raise ValueError(f"--feature {recipe['feature']} fails between {teacher.name} and {student.name} "
                             f"({_reason(error)}){cure}") from None


@torch.no_grad()
def init_bn_stats(network, images):
    """Gives an untrained network's batch norms the statistics of images; else its maps would be enormous."""
    for m in network.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
    network.train()(images)


def simkd_network(student, form):
    """SimKD's network at test time, of its student and the form in its checkpoint (feature_kd.Reuse)."""
    network = feature_kd.trimmed(feature_kd.Reuse(with_features(student).eval(), *form))
    network.name, network.own = student.name, student.own
    return network


# ---------------------------------------------------------------- the maps of a network's stages

STAGES = {      # the beginnings of names of torchvision's networks: their stages, then what is pooled
    "(wide_)?resnex?t": ["layer1", "layer2", "layer3", "layer4", "layer4"],
    "regnet": [*(f"trunk_output.block{i}" for i in (1, 2, 3, 4)), "trunk_output.block4"],
    "shufflenet": ["stage2", "stage3", "stage4", "conv5"],
}


def with_features(model):
    """The network itself, which now takes model(x, features=True) as those of models.py do.

    Of torchvision's, pre is empty, post and last are the outputs of the layers in STAGES (none and None for
    other names), and pooled is the last linear layer's input. A custom network has to do it itself.
    ValueError, one line, where a network cannot.
    """
    if isinstance(model, (Network, Featured)):
        return model
    if getattr(model, "own", False):
        if "features" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{model.name} gives no features: its forward(x, features=True) must return "
                             "(logits, Features(pre, post, last, pooled)), see models.py")
        return model
    mode = model.training
    model.forwards = [_featured_forward(model.train(training)) for training in (False, True)]
    kind = type(model)
    model.__class__ = type(f"Featured{kind.__name__}", (Featured, kind), {"__module__": kind.__module__})
    return model.train(mode)


class Featured:
    """Mixed into a network, it gives features by its `forwards`, one of evaluation and one of training.

    They are code only: the parameters are the network's own, on any device.
    """

    def forward(self, x, features=False):
        if features is not True:        # see models.py
            return super().forward(x)
        logits, pooled, *maps = self.forwards[self.training](self, x)
        return logits, Features((), tuple(maps[:-1]), maps[-1] if maps else None, pooled)


def _featured_forward(model):
    """A function (network, images) -> (logits, last linear layer's input, *maps), traced in its mode."""
    name = getattr(model, "name", type(model).__name__)
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception as error:      # of any network, any
        raise ValueError(f"{name} gives no features: it cannot be traced ({_reason(error)})") from None
    heads = [node for node in graph.find_nodes(op="call_module")
             if isinstance(model.get_submodule(node.target), nn.Linear)]
    if not heads:
        raise ValueError(f"{name} gives no features: it has no linear layer")
    wanted = [heads[-1].args[0]]
    stages = next((layers for names, layers in STAGES.items() if re.match(names, name)), [])
    for stage in stages:
        inside = [node for node in graph.nodes if stage in node.meta.get("nn_module_stack", {})]
        wanted.append(inside[-1])
    output, = graph.find_nodes(op="output")
    output.args = ((output.args[0], *wanted),)
    return type(torch.fx.GraphModule(model, graph)).forward


# ---------------------------------------------------------------- torchvision's weights


def torchvision_network(name, weights):
    """torchvision's network with its weights of that name. ValueError: there are none, no connection."""
    known = [w.name for w in torchvision.models.get_model_weights(name)] + ["DEFAULT"]
    if weights not in known:
        raise ValueError(f"torchvision has no {weights} of {name}, but {', '.join(known)}")
    try:
        model = torchvision.models.get_model(name, weights=weights)
    except (OSError, RuntimeError, http.client.HTTPException) as error:     # no network, a bad download
        raise ValueError(f"{name}, {weights}: the download failed ({first_line(error)}); try again, or name "
                         "a checkpoint file") from None
    model.name, model.own = name, False
    return model
