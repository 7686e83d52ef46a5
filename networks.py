"""Networks by name: models.py's, torchvision's, timm's and your own; what they take; weights to begin with.

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
import importlib.util
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
from run import first_line

ROOT = Path(__file__).resolve().parent
OTHERS = ("googlenet", "inception_v3")      # return more than logits
TORCHVISION = [n for n in torchvision.models.list_models(module=torchvision.models) if n not in OTHERS]


def create(name, num_classes, first=MODELS):
    """The network, (B, 3, H, W) -> logits (B, num_classes), initialised; `model.name` can name a file.

    first: whose names win, MODELS or TORCHVISION, where both have one. One's own, which may view its maps as
    vectors, sees contiguous images; a tuple's first entry is its logits. ValueError, one line. Draws from
    torch's global generator.
    """
    if ":" in name:
        model = _own(name, num_classes)
        try:
            model.register_forward_pre_hook(lambda module, inputs: tuple(x.contiguous() for x in inputs))
            model.register_forward_hook(lambda module, inputs, given, output: output if given.get("features")
                                        else _logits(output), with_kwargs=True)
            model.name, model.own, model.code = label(name), True, _code(name)
        except (AttributeError, TypeError, RuntimeError) as error:      # a property, a layer, a ScriptModule
            raise ValueError(f"{name} takes no hooks, or has something called name or own "
                             f"({_reason(error)})") from None
        if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
            raise ValueError(f"{name} has lazy layers: give them their sizes")
        return model
    if name in TORCHVISION and (first is TORCHVISION or name not in MODELS):
        model = torchvision.models.get_model(name, num_classes=num_classes)
    else:
        model = create_model(name, num_classes)
    model.name, model.own = name, False
    return model


def layout(model):
    """The memory format of a network's weights and images: the faster one, for one's own the usual one."""
    return torch.contiguous_format if model.own else torch.channels_last


def label(name):
    """A network's name in the names of files and folders: nets-tiny for my/nets.py:tiny."""
    where, _, function = name.rpartition(":")
    stem = Path(where).stem if where.endswith(".py") else where
    return re.sub(r"[^\w.-]", "-", f"{stem}-{function}" if where else function)


def _logits(output):
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _own(name, num_classes):
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise ValueError(f"{name}: a network of your own is FILE.py:NAME, package.module:NAME or timm:NAME")
    attribute = "create_model" if where == "timm" else function
    build = getattr(_module(where), attribute, None)
    if build is None:
        raise ValueError(f"{name}: {where} has no {attribute}")
    if isinstance(build, nn.Module) or not callable(build):
        raise ValueError(f"{name} is a {type(build).__name__}, not a function or class that takes "
                         "num_classes and returns a network")
    try:
        model = build(*[function] * (where == "timm"), num_classes=num_classes)
    except (Exception, SystemExit) as error:        # of the user's code, any
        raise ValueError(f"{name}(num_classes={num_classes}) fails ({_reason(error)})") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


@functools.cache
def _module(where):
    """A user's module, by its file (*.py) or its name; its folder's other modules are found from it.

    Where that folder has a module of the name of one of ours, or of another file's helper, it gets its own.
    """
    path = Path(where).expanduser()
    if where.endswith(".py") and not path.is_file():
        raise ValueError(f"{where}: no such file")
    folder, before = path.resolve().parent if where.endswith(".py") else Path.cwd(), dict(sys.modules)
    ours = {n: m for n, m in before.items() if folder != ROOT and _file(m).parent == ROOT
            and any((folder / f"{n}{end}").exists() for end in (".py", "/"))}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(f"own_{label(where)}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        hint = "; pip install timm" if where == "timm" else ""
        raise ValueError(f"{where} cannot be imported ({_reason(error)}){hint}") from None
    finally:
        sys.path.remove(str(folder))
        sys.path.append(str(folder))        # for what it imports later
        for name in set(sys.modules) - set(before):
            file = _file(sys.modules[name])
            if file.is_relative_to(folder) and "site-packages" not in file.parts and folder != ROOT:
                del sys.modules[name]       # another file's helper may have its name
        sys.modules.update(ours)


def _code(name):
    """A hash of the file that has a user's network: cached logits of other code are others."""
    file = _file(_module(name.rpartition(":")[0]))
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


def _file(module):
    return Path(getattr(module, "__file__", None) or "/")


def _reason(error):
    return f"{type(error).__name__}: {first_line(error)}"


def check_model(name, num_classes, size, first=MODELS, say=print, learns=False):
    """ValueError, one line, where a network does not make logits of images of size x size, in either mode.

    learns: it needs something to learn.
    """
    with torch.random.fork_rng(devices=[]):
        model = _own(name, num_classes) if ":" in name else create(name, num_classes, first)
        if learns and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"{name} has no parameter that learns")
        output = check_logits(model.train(), name, num_classes, size)
        if isinstance(output, (tuple, list)):
            say(f"notice: {name} returns {len(output)} values; the first is taken as its logits")
        check_logits(model.eval(), name, num_classes, size)


@torch.no_grad()
def check_logits(model, name, num_classes, size):
    """A network's output for two images. ValueError, one line, where that is not (2, num_classes) logits."""
    try:
        output = model(torch.zeros(2, 3, size, size))
    except (Exception, SystemExit) as error:        # of any network, any
        raise ValueError(f"{name} does not take images of {size} x {size} pixels ({_reason(error)}): "
                         "choose another --size") from None
    logits = _logits(output)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise ValueError(f"{name} makes {shape} of 2 images and {num_classes} classes, not logits "
                         f"(2, {num_classes}): it has to take num_classes")
    return output


def feature_method(recipe, student, teacher, labels, size, call=False):
    """A recipe's feature_kd.Method between two networks on one device. ValueError where they do not fit it.

    labels: (n,) classes of the training images; size: pixels of an image's side; call: try it on two images.
    """
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(next(student.parameters()).device)
    options = {k: recipe[k] for k in ("resolution", "normalize", "factor") if k in recipe}
    if recipe["feature"] == "catkd":
        options["fresh"] = "student_sha256" not in recipe       # else the student begins with given weights
    try:
        with torch.no_grad():
            (z, s), (v, t) = (with_features(network).eval()(images, features=True)
                                   for network in (student, teacher))
            method = feature_kd.METHODS[recipe["feature"]](student, teacher, s, t, labels,
                                                            logits=(z, v), **options)
            if call:
                method.eval().loss_and_logits(z, s, t, torch.arange(2), torch.arange(2))
        return method
    except ValueError:
        raise
    except Exception as error:      # of any networks, any
        raise ValueError(f"--feature {recipe['feature']} fails between {teacher.name} and {student.name} "
                         f"({_reason(error)})") from None


def check_feature(recipe, num_classes, size, first=MODELS):
    """ValueError, one line, where a recipe's feature method does not take its two networks."""
    if recipe.get("feature"):
        with torch.random.fork_rng(devices=[]):
            networks = [create(recipe[k], num_classes, first) for k in ("student", "teacher")]
            feature_method(recipe, *networks, torch.arange(2), size, call=True)


@torch.no_grad()
def init_bn_stats(network, images):
    """Gives an untrained network's batch norms the statistics of images: its maps would be enormous else."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
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

    Of torchvision's pre is empty, post and last are the outputs of the layers in STAGES (of other names none,
    and None), and pooled is what the last linear layer takes. One's own has to do it itself. ValueError, one
    line, where a network cannot.
    """
    if isinstance(model, (Network, Featured)):
        return model
    if getattr(model, "own", False):
        if "features" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{model.name} gives no features: its forward(x, features=True) must return "
                             "(logits, Features(pre, post, last, pooled)), see models.py")
        return model
    model.forwards = _featured_forward(model, False), _featured_forward(model, True)
    kind = type(model)
    model.__class__ = type(f"Featured{kind.__name__}", (Featured, kind), {"__module__": kind.__module__})
    return model


class Featured:
    """Mixed into a network, it gives features by functions (of evaluating, of training) in its `forwards`.

    They are code alone: all that they compute with is the network's own, wherever that is moved.
    """

    def forward(self, x, features=False):
        if features is not True:        # see models.py
            return super().forward(x)
        logits, pooled, *maps = self.forwards[self.training](self, x)
        return logits, Features((), tuple(maps[:-1]), maps[-1] if maps else None, pooled)


class Tracer(torch.fx.Tracer):
    """Notes (first input, output) of each module by its name."""

    def trace(self, root):
        self.notes = {}
        return super().trace(root)

    def is_leaf_module(self, module, name):
        return isinstance(module, nn.Linear) or super().is_leaf_module(module, name)    # also of float32_head

    def call_module(self, module, forward, inputs, given):
        output = super().call_module(module, forward, inputs, given)
        self.notes[self.path_of_module(module)] = inputs[0], output
        return output


def _featured_forward(model, training):
    """A function (network, images) -> (logits, last linear layer's input, *maps), traced in one mode."""
    name, tracer, mode = getattr(model, "name", type(model).__name__), Tracer(), model.training
    heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not heads:
        raise ValueError(f"{name} gives no features: it has no linear layer")
    stages = next((layers for names, layers in STAGES.items() if re.match(names, name)), [])
    try:
        graph = tracer.trace(model.train(training))
        wanted = tracer.notes[heads[-1]][0], *(tracer.notes[stage][1] for stage in stages)
    except Exception as error:      # of any network, any
        raise ValueError(f"{name} gives no features: it cannot be traced ({_reason(error)})") from None
    finally:
        model.train(mode)
    output, = graph.find_nodes(op="output")
    output.args = (output.args[0], *(proxy.node for proxy in wanted)),
    return type(torch.fx.GraphModule(model, graph)).forward


# ---------------------------------------------------------------- weights to begin with


def known_weights(name):
    """torchvision's names of weights for a network."""
    weights = torchvision.models.get_model_weights(name) if name in TORCHVISION else []
    return [*(w.name for w in weights), "DEFAULT"]


def torchvision_network(name, weights, flag):
    """torchvision's network with its weights of that name. ValueError: there are none, no connection."""
    known = known_weights(name)
    if weights not in known:
        raise ValueError(f"{flag} {weights}: torchvision's {name} has {', '.join(known)}")
    try:
        model = torchvision.models.get_model(name, weights=weights)
    except (OSError, RuntimeError, http.client.HTTPException) as error:     # no network, a bad download
        raise ValueError(f"torchvision's {weights} of {name} could not be downloaded ({first_line(error)}); "
                         "give the same command again, or name a file with --"
                         f"{flag.strip('-').split('-')[0]}-checkpoint") from None
    model.name, model.own = name, False
    return model
