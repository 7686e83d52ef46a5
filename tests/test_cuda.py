"""What would break on a GPU, held on a machine without one: by stubs, dispatch modes, autocast on the CPU."""

import collections
import contextlib
import copy
import json
import os
import types
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cli
import distill
import distributed
import figures
import models
import networks
import recipes
import reproduce
import run
import teacher
import train_cifar
from data import normalise, synthetic
from models import create_model, float32_head

CPU = torch.device("cpu")
ALONE = types.SimpleNamespace(size=1, rank=0, device=CPU)


def recipe_of(method, zscore=True, precision="fp32"):
    found = recipes.recipe("resnet32x4", "resnet8x4", method, zscore)
    return found | {"teacher": "resnet32x4", "student": "resnet8x4", "method": method, "zscore": zscore,
                    "precision": precision, "full_epochs": found["epochs"], "seed": 0}


def batch_of(method, n=8):
    torch.manual_seed(1)
    views = 2 if method == "mlkd" else 1
    images = [torch.randn(n, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(views)]
    logits = [] if method == "none" else [3 * torch.randn(n, 100) for _ in range(views)]
    return images, torch.randint(100, (n,)), torch.arange(n), logits


def step_of(method, zscore=True, precision="fp32", student="resnet8x4", micro_batch=None):
    recipe = recipe_of(method, zscore, precision)
    torch.manual_seed(0)
    network = create_model(student).to(memory_format=torch.channels_last)
    distiller = distill.Distiller(network, recipe).train()
    optimizer = distill.make_optimizer(distiller, recipe)
    return distiller, distill.make_step(distiller, optimizer, 8, ALONE, micro_batch)


NOTHING = "empty", "new_empty", "promote_types", "profiler::"


class Operations(TorchDispatchMode):
    """Counts what is dispatched and computes, views aside: about one kernel each."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if not function.is_view and not name.startswith(NOTHING):
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------- 1: one process fails alone


class Left(BaseException):
    pass


@pytest.fixture
def world(monkeypatch):
    """A World of several processes, whose destroy_process_group would wait for ever."""
    def leave(code):
        raise Left(code)

    def wait():
        raise AssertionError("NCCL would wait here for processes that wait for this one")

    made = distributed.World("cpu")
    made.group = object()
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", wait)
    return made


@pytest.mark.parametrize("error, words, code", [
    (run.RunError("the loss became nan"), "Error: the loss became nan\n", 1),
    (click.UsageError("no such size"), "Error: no such size (--help shows all flags)\n", 2),
    (run.Stopped("stopped, and saved"), "stopped, and saved\n", 1),
    (click.exceptions.Exit(1), "", 1),
    (ZeroDivisionError("a fault of ours"), "ZeroDivisionError: a fault of ours\n", 1)])
def test_a_process_that_fails_alone_says_why_and_leaves_at_once(world, capfd, error, words, code):
    """Else torchrun sees no failed process, restarts nothing, and nobody learns the reason."""
    with pytest.raises(Left) as left:
        with world:
            raise error
    assert left.value.args == (code,)
    assert capfd.readouterr().err.endswith(words)


def test_at_the_end_the_processes_part_in_peace(world, monkeypatch):
    calls = []
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: calls.append(1))
    with world:
        pass
    assert calls == [1]


# ---------------------------------------------------------------- 2: float16's range


def test_logits_beyond_float16_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = create_model("resnet8")
    network.fc.bias.data.fill_(70000.0)
    torch.save(network.state_dict(), "teacher.pt")
    with pytest.raises(ValueError, match="do not fit float16, which ends at 65504"):
        train_cifar.run(["--data", "synthetic", "--train-images", "128", "--epochs", "1", "--device", "cpu",
                         "--teacher", "resnet8", "--teacher-checkpoint", "teacher.pt", "--student",
                         "resnet8"])


# ---------------------------------------------------------------- 3: float32 is float32


@pytest.fixture
def tf32(monkeypatch):
    """PyTorch's default: float32 convolutions of newer GPUs are rounded to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("tf32", True), ("bf16", False),
                                                (None, False)])
def test_tf32_is_used_where_it_is_asked_for_alone(tf32, precision, allowed):
    cli.set_backends(False, precision)
    assert torch.backends.cudnn.allow_tf32 is allowed and torch.backends.cuda.matmul.allow_tf32 is False


def test_tf32_elsewhere_than_on_cuda_is_refused():
    with pytest.raises(click.UsageError, match="--precision tf32 is for CUDA"):
        cli.pick_precision("tf32", CPU)
    assert cli.pick_precision("tf32", torch.device("cuda")) == "tf32"


def test_evaluations_and_pictures_are_float32(tf32, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": create_model("resnet8").state_dict()}, "student.pt")
    train_cifar.main(["--eval", "student.pt", "--data", "synthetic", "--device", "cpu"],
                     standalone_mode=False)
    assert not torch.backends.cudnn.allow_tf32
    row = {"teacher": None, "student": "resnet8", "method": "none"}
    flags = {"pair": "a-b", "device": "cpu", "data_dir": ""}
    for module, call in ((figures, lambda: figures.logits_of(flags)),
                         (reproduce, lambda: reproduce.keep(tmp_path / "x.pt", row, tmp_path, None, CPU))):
        torch.backends.cudnn.allow_tf32 = True
        monkeypatch.setattr(module, "load_data", None, raising=False)
        monkeypatch.setattr(reproduce, "CHECKPOINTS", tmp_path)
        with contextlib.suppress(Exception):        # there is nothing to read
            call()
        assert not torch.backends.cudnn.allow_tf32, module.__name__


# ---------------------------------------------------------------- 4: logits in float32


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2",
                                  "torchvision.models:resnet18", "torchvision.models:squeezenet1_1"])
def test_under_autocast_the_last_layer_computes_in_float32(name):
    """In bfloat16 Z is off by 1.6e-3, and the first class of one image in 200 is another."""
    torch.manual_seed(0)
    network, x = networks.create(name, 10).eval(), torch.randn(2, 3, 32, 32)
    plain, keys = copy.deepcopy(network), list(network.state_dict())
    float32_head(float32_head(network))
    assert list(network.state_dict()) == keys
    head = [m for m in network.modules() if isinstance(m, models.Float32)]
    inputs = []
    assert len(head) == 1
    head[0].register_forward_hook(lambda module, args, output: inputs.append((args[0], output.clone())))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, rounded = network(x), plain(x)
    given, made = inputs[0]
    layer = F.linear if isinstance(head[0], nn.Linear) else F.conv2d
    assert logits.dtype == made.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(made, layer(given.float(), head[0].weight, head[0].bias))
    other = copy.deepcopy(network)      # a copy's layer reads the copy's weights
    with torch.no_grad():
        head[0].weight.zero_()
        assert other(x).std() > 0


def test_teachers_and_students_in_bf16_have_float32_logits():
    image = normalise(synthetic(4, 1).images)
    distiller, _ = step_of("kd", precision="bf16")
    frozen = teacher.Teacher(create_model("resnet8"), "cpu", "bf16")
    for network in (distiller.student, frozen.network):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert network(image).dtype == torch.float32
    distiller, _ = step_of("kd")
    assert not any(isinstance(m, models.Float32) for m in distiller.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_evaluated_in_float32_whatever_its_precision_is(tmp_path, capsys, precision):
    """In bfloat16 the same weights had 70.90 % in place of 71.01 %: the row is what --eval finds."""
    _, result, folder, _ = train_cifar.run([
        "--method", "none", "--student", "resnet8", "--data", "synthetic", "--train-images", "128",
        "--epochs", "1", "--precision", precision, "--device", "cpu", "--out", str(tmp_path)])
    row = json.loads((folder / "log.jsonl").read_text())
    capsys.readouterr()
    train_cifar.main(["--eval", str(folder / "student.pt"), "--data", "synthetic", "--device", "cpu"],
                     standalone_mode=False)
    said = capsys.readouterr().out
    assert f"{row['test_top1']:.2f} top-1" in said and f"loss {row['test_loss']:.4f} on" in said
    assert result["last"]["top1"] == row["test_top1"]


# ---------------------------------------------------------------- 5: the CUDA graph


class Card:
    """torch.cuda as `CUDAGraphStep` uses it, run at once; capture fails where `fail` says."""

    def __init__(self, monkeypatch, fail):
        self.here, self.current, self.log, self.fail = object(), None, [], fail
        self.current = self.here
        stub = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {"Stream": lambda: stub, "current_stream": lambda: self.current,
                            "set_stream": self.set_stream, "synchronize": lambda: self.log.append("waited"),
                            "stream": lambda s: contextlib.nullcontext(), "CUDAGraph": self.graph,
                            "graph": self.capture}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def set_stream(self, stream):
        self.current = stream

    def graph(self):
        return types.SimpleNamespace(pool=lambda: "pool", replay=lambda: self.log.append("replayed"))

    @contextlib.contextmanager
    def capture(self, graph, pool=None):
        self.current = "the capture's stream"       # where a failed capture leaves the process
        self.log.append(f"pool {pool}")
        error = self.fail.pop(0) if self.fail else None
        yield
        if error:
            raise error
        self.current = self.here


@pytest.fixture
def state():
    return torch.zeros(())


def captured(state, monkeypatch, *fail):
    card = Card(monkeypatch, list(fail))
    card.here = card.current = types.SimpleNamespace(wait_stream=lambda other: None)

    def step(views, target, seed=0):
        card.log.append("step")
        state.add_(1)
        return state.clone()
    return card, distill.CUDAGraphStep(step, [state])


def test_a_failed_capture_leaves_the_stream_the_weights_and_the_other_graph(state, monkeypatch, capsys):
    card, step = captured(state, monkeypatch, None, RuntimeError("operation not permitted when capturing"))
    for size in (4, 3, 4):
        before = card.here
        step([torch.zeros(size)], torch.zeros(size))
        assert card.current is before, "the process is left on the capture's stream"
    assert capsys.readouterr().out.count("no CUDA graph of the step of 3 images (operation not perm") == 1
    # size 4: three rehearsals and the capture, undone, replayed; size 3: the same, undone, and a plain step
    assert state == 1
    assert card.log == ["step"] * 3 + ["pool None", "step", "waited", "replayed"] + (
        ["step"] * 3 + ["pool pool", "step", "waited", "step"]) + ["replayed"]


def test_rehearsals_that_raise_are_waited_for_before_they_are_undone(state, monkeypatch, capsys):
    card = Card(monkeypatch, [])
    card.here = card.current = types.SimpleNamespace(wait_stream=lambda other: None)

    def step(views, target, seed=0):
        state.add_(1)
        raise RuntimeError("a kernel is missing")
    with pytest.raises(RuntimeError, match="a kernel is missing"):
        distill.CUDAGraphStep(step, [state])([torch.zeros(4)], torch.zeros(4))
    assert card.log == ["waited"] and state == 0


def test_a_full_card_is_no_missing_graph_but_one_line(state, monkeypatch):
    card, step = captured(state, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    for name, value in {"is_available": lambda: True, "mem_get_info": lambda: (2**30, 8 * 2**30),
                        "memory_reserved": lambda: 3 * 2**30}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(run.RunError) as caught, cli.friendly_errors():
        step([torch.zeros(4)], torch.zeros(4))
    assert "take a smaller --batch-size, or --micro-batch where there is one" in str(caught.value.message)
    assert "--batch-size" in caught.value.message and "\n" not in caught.value.message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_card_a_step_that_cannot_be_captured_goes_on_without(capsys):
    """The whole of it: the default stream, the state and the other size's graph are as before."""
    state = torch.zeros((), device="cuda")

    def step(views, target, seed=0):
        if len(target) == 3:
            state.item()            # waits for the device, which no capture allows
        return state.add_(1).clone(), views[0] + 1

    captured, before = distill.CUDAGraphStep(step, [state]), torch.cuda.current_stream()
    for i, size in enumerate((4, 3, 4, 3), 1):
        count, more = captured([torch.ones(size, device="cuda")], torch.zeros(size, device="cuda"))
        assert count.item() == state.item() == i and more.tolist() == [2.0] * size
        assert torch.cuda.current_stream() == before
    assert capsys.readouterr().out.count("no CUDA graph of the step of 3 images") == 1


# ---------------------------------------------------------------- 6: deterministic kernels


@pytest.mark.parametrize("method", ["dkd", "mlkd", "ctkd"])
def test_no_step_scatters(method):
    """A scatter has no deterministic form on CUDA, and may stop the capture of a deterministic step."""
    _, step = step_of(method, student="resnet8")
    with Operations() as seen:
        step(*batch_of(method))
    assert not {k for k in seen.count if "scatter" in k or "gather" in k or "index_put" in k}


def test_uninitialized_memory_is_not_filled():
    cli.set_backends(True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory is False
    finally:
        cli.set_backends(False)


def test_a_network_without_a_deterministic_form_is_one_line():
    """By an operation that has none on a CPU either."""
    cli.set_backends(True)
    try:
        with pytest.raises(run.RunError, match="no --deterministic form, leave it out .put_ does not have"):
            with cli.friendly_errors():
                torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        cli.set_backends(False)


# ---------------------------------------------------------------- 7: devices


def test_saves_hold_tensors_of_the_cpu(tmp_path, monkeypatch):
    """A save that holds a card's tensors fills that card once more when it is read elsewhere."""
    asked = []

    def cpu(x, real=torch.Tensor.cpu):
        asked.append(x.data_ptr())
        return real(x)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    held = []
    monkeypatch.setattr(run.Run, "save", lambda self, state: held.append(
        all(x.data_ptr() in asked for x in [*state["model"].values(), *state["momentum"]])))
    train_cifar.run(["--data", "synthetic", "--train-images", "64", "--epochs", "1", "--device", "cpu",
                     "--method", "none", "--student", "resnet8", "--out", str(tmp_path)])
    assert held and all(held)


@pytest.mark.parametrize("visible, there, local, device", [("3", 1, 3, 0), ("0,1,2,3", 4, 2, 2),
                                                           (None, 2, 1, 1)])
def test_launchers_may_show_each_process_its_own_gpu(monkeypatch, visible, there, local, device):
    class Chosen(Exception):
        pass

    def choose(found):
        raise Chosen(found.index)

    monkeypatch.setattr(distributed, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(Chosen, match=str(device)):
        distributed.World()
    if not visible:
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(run.RunError, match="process 3 on this machine finds 2 GPUs"):
            distributed.World()


# ---------------------------------------------------------------- 8: operations of a step


# what torch 2.14.1 dispatched; the versions differ by a few
MEASURED = {"none": 102, "kd": 181, "dkd": 262, "ctkd": 217, "ttm": 119, "wttm": 125, "mlkd": 722}


@pytest.mark.parametrize("method, measured", MEASURED.items())
def test_a_step_dispatches_no_more_operations_than_it_did(method, measured):
    """resnet8x4's, by the method with Z: on a GPU each is a kernel of some microseconds."""
    _, step = step_of(method, method not in ("none", "ttm", "wttm"))
    batch = batch_of(method)
    step(*batch)
    with Operations() as seen:
        step(*batch)
    assert sum(seen.count.values()) <= 1.1 * measured, seen.count


def test_a_run_counts_each_forward_pass(tmp_path):
    for method, epoch in (("none", 3), ("mlkd", 6)):
        torch.save(create_model("resnet8").state_dict(), tmp_path / "teacher.pt")
        flags = [] if method == "none" else ["--teacher", "resnet8", "--teacher-checkpoint",
                                             str(tmp_path / "teacher.pt")]
        _, _, folder, _ = train_cifar.run([
            *flags, "--method", method, "--student", "resnet8", "--data", "synthetic", "--train-images",
            "150", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path)])
        saved = torch.load(Path(folder, "last.pt"))["model"]
        assert {v.item() for k, v in saved.items() if k.endswith("num_batches_tracked")} == {2 * epoch}


@pytest.mark.parametrize("name", ["ShuffleV1", "ShuffleV2"])
def test_shufflenets_convolutions_see_channels_last(name):
    """Where a shuffle returned plane after plane, a third of them converted their input on every pass."""
    network = create_model(name).to(memory_format=torch.channels_last)
    odd = []

    def look(module, args):
        if args[0].stride(1) != 1:      # half of the channels is a view
            odd.append(module)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(look)
    network(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert odd == []
