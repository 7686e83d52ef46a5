"""feature_kd.py against feature_reference.py, a second implementation, and what people rely on in it.

Values and gradients are compared in float64. Features are random where a method is meant, of real networks
where a pair is: which maps these give is test_features.py's.
"""

import copy
import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feature_kd
import feature_reference as reference
from feature_kd import (AT, CRD, METHODS, OFD, ReviewKD, at_loss, cam_loss, hcl_loss, ofd_loss,
                        ofd_margin, rkd_loss)
from models import create_model

SOURCE = Path(feature_kd.__file__)
N, K = 60, 16           # training images and negatives of the small CRD


class Feat(NamedTuple):
    pre: tuple
    post: tuple
    last: torch.Tensor
    pooled: torch.Tensor


class Tiny(nn.Module):
    """A small network; a stage: convolution, batch norm, ReLU. last: the width of a 1x1 layer more."""

    def __init__(self, name, widths, sides, last=None, classes=5, image=16):
        super().__init__()
        self.name, self.image, inp, side = name, image, 3, image
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for width, size in zip(widths, sides):
            self.convs.append(nn.Conv2d(inp, width, 3, side // size, 1))
            self.norms.append(nn.BatchNorm2d(width))
            nn.init.normal_(self.norms[-1].weight)
            nn.init.normal_(self.norms[-1].bias)
            inp, side = width, size
        self.widen = nn.Conv2d(inp, last, 1) if last else None
        self.fc = nn.Linear(last or inp, classes)

    def norms_before_relu(self):
        return list(self.norms)

    def forward(self, x, features=False):
        pre, post = [], []
        for conv, norm in zip(self.convs, self.norms):
            pre.append(norm(conv(x)))
            x = pre[-1].relu()
            post.append(x)
        x = x if self.widen is None else self.widen(x).relu()
        pooled = x.mean((2, 3))
        logits = self.fc(pooled)
        if features is True:
            return logits, Feat(tuple(pre), tuple(post), x, pooled)
        return logits


# (widths, sides, width of last) of a student and a teacher
PAIRS = {
    "alike": (((4, 6, 8), (16, 8, 4), None), ((6, 8, 12), (16, 8, 4), None)),
    "student smaller": (((4, 6, 8), (8, 4, 2), 20), ((6, 8, 12), (16, 8, 4), None)),
    "student larger": (((4, 6, 8), (16, 8, 4), None), ((6, 8, 12), (8, 4, 2), None)),
    "four stages": (((4, 6, 6, 8), (8, 4, 4, 2), 20), ((6, 6, 8, 12), (8, 4, 2, 2), None)),
}


def double_features(network, seed, batch=4):
    """Random leaves of the shapes of a network's features."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(x):
        return torch.randn((batch, *x.shape[1:]), generator=generator, dtype=torch.float64).requires_grad_()

    with torch.no_grad():
        images = torch.randn(2, 3, network.image, network.image, generator=generator)
        _, f = copy.deepcopy(network).float().eval()(images, features=True)
    return Feat(tuple(map(leaf, f.pre)), tuple(map(leaf, f.post)), leaf(f.last), leaf(f.pooled))


def mapped(function, f):
    return Feat(tuple(map(function, f.pre)), tuple(map(function, f.post)), function(f.last),
                function(f.pooled))


def tensors(f):
    return [*f.pre, *f.post, f.last, f.pooled]


class Case(NamedTuple):
    student: nn.Module
    teacher: nn.Module
    s: Feat
    t: Feat
    method: nn.Module
    index: torch.Tensor

    def loss(self, s=None, t=None):
        return self.method(s or self.s, t or self.t, None, self.index)


@pytest.fixture(autouse=True)
def few_negatives(monkeypatch):
    monkeypatch.setattr(CRD, "NEGATIVES", K)


def case(name, pair="alike", seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    student, teacher = (Tiny(who, *what).to(dtype) for who, what in zip(("small", "large"), PAIRS[pair]))
    s, t = (mapped(lambda x: x.detach().to(dtype).requires_grad_(), double_features(network, i))
            for i, network in enumerate((student, teacher), 1))
    method = METHODS[name](student, teacher, s, t, torch.arange(N) % 3, **options).to(dtype)
    return Case(student, teacher, s, t, method, torch.tensor([5, 0, 59, 31]))


# ---------------------------------------------------------------- the same, by the reference


def norm_of(norm, name="bn"):
    return {f"{name}_weight": norm.weight, f"{name}_bias": norm.bias, f"{name}_mean": norm.running_mean,
            f"{name}_var": norm.running_var}


def conv_norm(conv, norm):
    bias = {} if conv.bias is None else {"conv_bias": conv.bias}
    return {"conv_weight": conv.weight, **bias, **norm_of(norm)}


def parameters_of(norms):
    return [n.weight.detach() for n in norms], [n.bias.detach() for n in norms]


def levels_of(method):
    return [{"conv1_weight": reduce[0].weight, **norm_of(reduce[1], "bn1"), "conv2_weight": restore[0].weight,
             **norm_of(restore[1], "bn2"), **({"att_weight": method.attend[i].weight,
                                               "att_bias": method.attend[i].bias}
                                              if i < len(method.attend) else {})}
            for i, (reduce, restore) in enumerate(zip(method.reduce, method.restore))]


def projector_of(method):
    p = method.projector
    return [conv_norm(p[i], p[i + 1]) for i in (0, 3, 6)]


def simkd_map(s):
    """features.md 2.7: `last` where its width is the last stage's, otherwise that stage's map."""
    return s.last if s.last.shape[1] == s.post[-1].shape[1] else s.post[-1]


def classifier(network):
    return [m for m in network.modules() if isinstance(m, nn.Linear)][-1]


def expected(name, c):
    """The reference's loss for a Case, out of the tensors of its method and networks."""
    s, t, method, training = c.s, c.t, c.method, c.method.training
    if name == "fitnet":
        return reference.fitnet(s.post[1], t.post[1], conv_norm(*method.regressor[:2]), training)
    if name == "at":
        return reference.at(s.post, t.post)
    if name == "rkd":
        return reference.rkd(s.pooled, t.pooled)
    if name == "ofd":
        norms = c.teacher.norms_before_relu()
        return reference.ofd(s.pre, t.pre, *parameters_of(norms),
                             [conv_norm(*x) for x in method.connectors], training)
    if name == "reviewkd":
        return reference.reviewkd([*s.post, s.pooled], [*t.pre, t.pooled], levels_of(method), training)
    if name == "simkd":
        return reference.simkd(simkd_map(s), t.last, projector_of(method), training)
    assert name == "catkd"
    return reference.catkd(s.last, t.last, classifier(c.student).weight, classifier(c.teacher).weight,
                           method.resolution, method.normalize)


def assert_same(ours, want, leaves, tolerance=1e-9):
    """Value and gradients; a gradient that is zero but for rounding may be anything as small."""
    assert ours.shape == () and ours.dtype == want.dtype
    assert ours.item() == pytest.approx(want.item(), rel=tolerance)
    ours, want = ([torch.zeros_like(x) if g is None else g
                   for g, x in zip(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True),
                                   leaves)] for loss in (ours, want))
    overall = max(g.abs().max() for g in want)
    assert overall > 0
    for a, b in zip(ours, want):
        assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-12 * overall


def assert_no_gradient(loss, leaves):
    assert all(g is None for g in torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True))


# ---------------------------------------------------------------- 1. functions of features


def maps(shapes, seed, batch=4, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, h, h, generator=generator, dtype=torch.float64)
            .requires_grad_(requires_grad) for c, h in shapes]


SHAPES = {      # student's, teacher's maps
    "resnet56, resnet20": (((16, 32), (32, 16), (64, 8)), ((16, 32), (32, 16), (64, 8))),
    "resnet32x4, ShuffleV2": (((29, 16), (58, 8), (116, 4)), ((64, 32), (128, 16), (256, 8))),
    "vgg13, resnet20": (((16, 32), (32, 16), (64, 8)), ((32, 16), (64, 8), (64, 4), (64, 4))),
    "odd": (((3, 7), (4, 6)), ((5, 4), (2, 9))),
}


@pytest.mark.parametrize("pair, p", [*zip(SHAPES, (2, 4, 2, 4))])
def test_at(pair, p):
    s, t = (maps(shapes, i) for i, shapes in enumerate(SHAPES[pair]))
    ours = at_loss(s, t, p)
    assert_same(ours, reference.at(s, t, p), s)
    assert_no_gradient(ours, t)
    if p == 2:
        assert torch.equal(at_loss(s, t), ours)     # the default


@pytest.mark.parametrize("batch, d, d_teacher, scale", [(3, 7, 7, 1), (9, 64, 20, 1), (16, 5, 256, 30)])
def test_rkd(batch, d, d_teacher, scale):
    generator = torch.Generator().manual_seed(batch)
    s, t = (scale * torch.randn(batch, n, generator=generator, dtype=torch.float64) for n in (d, d_teacher))
    s.requires_grad_(), t.requires_grad_()
    for options in ({}, {"distance": 1.0, "angle": 0.0}, {"distance": 0.0, "angle": 2.0}):
        ours = rkd_loss(s, t, **options)
        assert_same(ours, reference.rkd(s, t, **options), [s])
        assert_no_gradient(ours, [t])


GAMMAS_BETAS = [(1, 0), (1, -2), (-1, 0.5), (0.5, 1.5), (1, 3.08), (1, 3.10), (-2, 6.1), (-2, 6.3), (0.1, 5),
                (0.01, -3), (1e-3, 1e-4), (0, 0), (0, 2), (0, -2)]


def norm_with(pairs):
    norm = nn.BatchNorm2d(len(pairs))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([g for g, _ in pairs]))
        norm.bias.copy_(torch.tensor([b for _, b in pairs]))
    return norm


def test_ofd_margins():
    norm = norm_with(GAMMAS_BETAS)
    ours = ofd_margin(norm)
    want = reference.ofd_margin(norm.weight.detach(), norm.bias.detach())
    assert ours.dtype == torch.float64 and ours.isfinite().all()
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=0)
    assert ours[-3:].tolist() == [0, 0, -2]     # no spread: min(beta, 0)
    assert not ours.requires_grad


def test_ofd_margin_is_the_mean_of_what_is_negative():
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for gamma, beta in ((1.0, 0.5), (2.0, -1.0)):
        y = beta + gamma * x
        ours = ofd_margin(norm_with([(gamma, beta)])).item()
        assert ours == pytest.approx(y[y < 0].mean().item(), rel=5e-3)


@pytest.mark.parametrize("height, width", [(8, 16), (16, 8), (6, 9)])
def test_maps_that_are_not_square(height, width):
    s, t = (torch.randn(4, 5, height, width, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
    terms = [torch.nn.functional.mse_loss(*(torch.nn.functional.adaptive_avg_pool2d(x, n) for x in (s, t)))
             for n in ((height, width), 4, 2, 1)]
    want = sum(w * x for w, x in zip((8, 4, 2, 1), terms)) / 15
    assert_same(hcl_loss([s], [t]), want, [s])
    pooled = [torch.nn.functional.adaptive_avg_pool2d(x, 2) for x in (s, t)]
    assert_same(cam_loss(s, t, 2), torch.nn.functional.mse_loss(*pooled), [s])
    unit = [torch.nn.functional.normalize(x.square().mean(1).flatten(1)) for x in (s, t)]
    assert_same(at_loss([s], [t]), torch.nn.functional.mse_loss(*unit), [s])


@pytest.mark.parametrize("words, call", [
    (r"\(4, 64\) and \(1, 64\)", lambda s, t: at_loss([s], [t[:1]])),
    (r"\(4, 3, 8, 8\) and \(4, 3, 4, 4\)", lambda s, t: hcl_loss([s], [t[..., :4, :4]])),
    (r"\(4, 3, 8, 8\) and \(4, 3, 1, 1\)", lambda s, t: cam_loss(s, t[..., :1, :1])),
    (r"\(4, 3, 8, 8\) and \(4, 3, 1, 1\)", lambda s, t: ofd_loss([s], [t[..., :1, :1]], [torch.zeros(3)])),
    (r"at least two.*1 and 1", lambda s, t: rkd_loss(torch.rand(1, 9), torch.rand(1, 9))),
    (r"as many.*4 and 1", lambda s, t: rkd_loss(torch.rand(4, 9), torch.rand(1, 9))),
])
def test_shapes_that_do_not_pair_are_refused_not_broadcast(words, call):
    with pytest.raises(ValueError, match=words):
        call(torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8))


# ---------------------------------------------------------------- 2. the methods


OPTIONS = {"catkd": ({"resolution": 1}, {"resolution": 2, "normalize": True}), "simkd": ({}, {"factor": 3})}
# pairs and modes take turns over the methods and their options
TURNS = list(itertools.product(PAIRS, (True, False)))
WAYS = [(name, *TURNS[3 * (i + k) % 8], options) for i, name in enumerate(m for m in METHODS if m != "crd")
        for options in OPTIONS.get(name, ({},)) for k in range(3)]


@pytest.mark.parametrize("name, pair, training, options", WAYS)
def test_method_is_the_reference(name, pair, options, training):
    c = case(name, pair, **options)
    c.loss()                                    # running statistics other than 0 and 1
    c.method.train(training)
    want = expected(name, c)
    ours = c.loss()
    learned = [p for p in c.method.parameters() if p.requires_grad]
    heads = [classifier(c.student).weight] if name == "catkd" else []
    assert_same(ours, want, tensors(c.s) + learned + heads)
    assert_no_gradient(ours, tensors(c.t) + list(c.teacher.parameters()))


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_that_a_gpu_sums_in_any_order(name, pair="student larger"):
    """Of adaptive pooling: on CUDA a resumed run would not be the same to the bit."""
    seen, todo = set(), [case(name, pair).loss().grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert any("Accumulate" in x for x in names) and not any("Adaptive" in x for x in names)


@pytest.mark.parametrize("replacement", [False, True])
def test_crd_is_the_reference_for_three_steps(replacement, monkeypatch):
    c = case("crd")
    if replacement:
        c.method.distinct = False
    drawn, draw = [], CRD._negatives
    monkeypatch.setattr(CRD, "_negatives", lambda *x: drawn.append(draw(*x)) or drawn[-1])
    m, z = c.method, (None, None)
    banks = m.bank_s.clone(), m.bank_t.clone()
    for step in range(3):
        s, t = double_features(c.student, 10 + step), double_features(c.teacher, 20 + step)
        index = c.index if step != 1 else torch.tensor([31, 7, 8, 5])    # two of them a second time
        ours = m(s, t, None, index)
        want, *rest = reference.crd_step(s.pooled, t.pooled, m.embed_s.weight, m.embed_s.bias,
                                         m.embed_t.weight, m.embed_t.bias, *banks, *z, index, drawn[-1], N)
        assert_same(ours, want, [s.pooled, *m.parameters()])
        assert_no_gradient(ours, [t.pooled, s.last, *s.post])
        banks, z = rest[:2], rest[2:]
        for a, b in zip((m.bank_s, m.bank_t, m.z_s, m.z_t), rest):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
            assert not a.requires_grad
        assert drawn[-1].shape == (4, K)


@pytest.mark.parametrize("pair", ["student smaller", "student larger"])
def test_simkds_deployed_network(pair):
    c = case("simkd", pair)
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        c.student(images), c.loss()
        network = c.method.deploy(c.student).eval()
        _, f = c.student(images, features=True)
        want = reference.simkd_deployed(simkd_map(f), min(simkd_map(f).shape[-1], c.t.last.shape[-1]),
                                        projector_of(c.method), c.teacher.fc.weight, c.teacher.fc.bias)
        torch.testing.assert_close(network(images), want, rtol=1e-9, atol=1e-12)
        c.method.eval()
        t = c.t._replace(last=c.t.last[:1].expand(5, -1, -1, -1))
        loss, logits = c.method.loss_and_logits("the student's own", f, t)
        torch.testing.assert_close(logits, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, c.method(f, t), rtol=0, atol=0)


# ---------------------------------------------------------------- 3. whole networks


REAL = [("resnet56", "resnet20"), ("wrn_40_2", "wrn_16_2"), ("resnet32x4", "ShuffleV2"),
        ("vgg13", "MobileNetV2")]


@functools.lru_cache(maxsize=1)
def real_pair(teacher, student):
    torch.manual_seed(0)
    teacher, student = (create_model(name).double() for name in (teacher, student))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    _, s = student.train()(images, features=True)
    with torch.no_grad():
        teacher(images)                             # running statistics that fit
        answers = {mode: teacher.train(mode == "train")(images, features=True)[1]
                   for mode in ("train", "eval")}
    return teacher, student, s, answers


@pytest.mark.parametrize("pair, name", [*zip(itertools.cycle(REAL), METHODS)])
def test_real_networks(pair, name, monkeypatch):
    teacher, student, s, answers = real_pair(*pair)
    assert METHODS[name].teacher_mode == ("train" if name == "ofd" else "eval")
    t, index, drawn, draw = answers[METHODS[name].teacher_mode], torch.tensor([0, 7, 59]), [], CRD._negatives
    monkeypatch.setattr(CRD, "_negatives", lambda *x: drawn.append(draw(*x)) or drawn[-1])
    m = METHODS[name](student, teacher, s, t, torch.arange(N) % 3).double()
    with torch.no_grad():
        for norm in m.modules():                    # not what they begin with
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5), norm.bias.normal_()
    c = Case(student, teacher, s, t, m, index)
    bank = [x.clone() for x in (m.bank_s, m.bank_t)] if name == "crd" else None
    ours = c.loss()
    want = (reference.crd_step(s.pooled, t.pooled, m.embed_s.weight, m.embed_s.bias, m.embed_t.weight,
                               m.embed_t.bias, *bank, None, None, index, drawn[0], N)[0] if bank
            else expected(name, c))
    first = next(student.parameters())
    assert first.requires_grad
    assert_same(ours, want, [first] + [p for p in m.parameters() if p.requires_grad])


# ---------------------------------------------------------------- 4. half precision, NaN, zeros


HALVES = itertools.cycle([torch.float16, torch.bfloat16])


@pytest.mark.parametrize("name, dtype, pair", [*zip(METHODS, HALVES, itertools.cycle(PAIRS))])
def test_methods_compute_in_float32(name, dtype, pair):
    one, other = case(name, pair, dtype=torch.float32), case(name, pair, dtype=torch.float32)
    s, t = (mapped(lambda x: x.detach().to(dtype).requires_grad_(), f) for f in (one.s, one.t))
    torch.manual_seed(3)
    half = one.loss(s, t)
    torch.manual_seed(3)
    full = other.loss(*(mapped(lambda x: x.detach().float(), f) for f in (s, t)))
    assert half.dtype == torch.float32 and torch.equal(half, full)
    half.backward()
    gradients = [x.grad for x in tensors(s) if x.grad is not None]
    assert gradients and all(g.dtype == dtype and g.isfinite().all() for g in gradients)
    assert all(x.grad is None for x in tensors(t))


@pytest.mark.parametrize("name", METHODS)
def test_methods_under_autocast(name):
    one, other = case(name, dtype=torch.float32), case(name, dtype=torch.float32)
    torch.manual_seed(3)
    full = one.loss()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = other.loss()
    assert cast.dtype == torch.float32
    if name in ("at", "rkd", "crd"):            # nothing there that autocast would speed up
        assert torch.equal(cast, full)
    else:
        assert 0 < (cast - full).abs() <= 0.02 * full       # its connectors are in bfloat16
    cast.backward()
    for p in other.method.parameters():
        assert not p.requires_grad or p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_crd_is_finite_where_an_embedding_meets_itself(dtype):
    c = case("crd", dtype=torch.float32)
    m = c.method
    with torch.no_grad():
        for embed, f, bank in ((m.embed_s, c.s, m.bank_t), (m.embed_t, c.t, m.bank_s)):
            v = embed(f.pooled)
            bank.copy_(v[:1] / v[:1].norm())            # every image's score is exp(1 / 0.07), 1.6 million
    s, t = (mapped(lambda x: x.detach()[:1].expand_as(x).to(dtype).requires_grad_(), f) for f in (c.s, c.t))
    loss = c.loss(s, t)
    loss.backward()
    assert m.z_s > 1.5e6 * N and loss.isfinite() and s.pooled.grad.isfinite().all()


READ = {"fitnet": (("post",), ("post",)), "at": (("post",), ("post",)), "rkd": (("pooled",), ("pooled",)),
        "crd": (("pooled",), ("pooled",)), "ofd": (("pre",), ("pre",)),
        "reviewkd": (("post", "pooled"), ("pre", "pooled")), "simkd": (("last",), ("last",)),
        "catkd": (("last",), ("last",))}


def spoilt(f, field):
    """Copies of features with one NaN in `field`, in each of its maps in turn."""
    value = getattr(f, field)
    many = value if isinstance(value, tuple) else (value,)
    for i, x in enumerate(many):
        x = x.detach().clone()
        x.view(-1)[x.numel() // 2] = math.nan
        yield i, f._replace(**{field: (*many[:i], x, *many[i + 1:]) if isinstance(value, tuple) else x})


@pytest.mark.parametrize("name, options", [*((name, {}) for name in METHODS), ("catkd", {"normalize": True})])
def test_one_nan_shows(name, options):
    own, others = READ[name]
    for side, fields in enumerate((own, others)):
        for field in fields:
            for i, f in spoilt((case(name).s, case(name).t)[side], field):
                if name == "fitnet" and i != 1:
                    continue                    # it reads the second stage
                c = case(name, **options)
                assert c.loss(**{"st"[side]: f}).isnan(), (side, field, i)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("name, options", [*((name, {}) for name in METHODS), ("catkd", {"normalize": True})])
def test_gradients_of_constant_features_are_finite(name, value, options):
    for sides in ("s", "t", "st"):
        c = case(name, dtype=torch.float32, **options)
        flat = {x: mapped(lambda v: torch.full_like(v, value).requires_grad_(), getattr(c, x)) for x in sides}
        s, t = flat.get("s", c.s), flat.get("t", c.t)
        loss = c.loss(s, t)
        loss.backward()
        assert loss.isfinite()
        for x in [*tensors(s), *c.method.parameters()]:
            assert x.grad is None or x.grad.isfinite().all()
            assert x.grad is None or name not in ("at", "rkd", "crd", "catkd") or x.grad.abs().max() < 1e4


def test_rkd_of_two_equal_rows():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x[4] = x[1]
    x.requires_grad_()
    rkd_loss(x, torch.randn(6, 5, generator=torch.Generator().manual_seed(1))).backward()
    assert x.grad.abs().max() < 1e3         # the authors' code: 4e8


# ---------------------------------------------------------------- 5. sizes and first values


@functools.lru_cache(maxsize=None)
def probed(name):
    torch.manual_seed(0)
    network = create_model(name).eval()
    with torch.no_grad():
        return network, network(torch.randn(2, 3, 32, 32), features=True)[1]


def method_of(name, teacher, student, **options):
    """(method, its student), of networks that other tests may use."""
    (network, s), (large, t) = probed(student), probed(teacher)
    network = copy.deepcopy(network)
    torch.manual_seed(1)
    return METHODS[name](network, large, s, t, torch.arange(N) % 3, **options), network


def learned(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


TABLE = [       # features.md, section 3
    (("resnet32x4", "ShuffleV2"), (475520, 164096, 156800, 4195718, 240640)),
    (("resnet56", "resnet20"), (1120, 16640, 5600, 114278, 13568)),
]


@pytest.mark.parametrize("pair, counts", TABLE, ids=lambda x: "-".join(map(str, x))[:22])
def test_what_learns_with_the_student(pair, counts):
    ours = tuple(learned(method_of(name, *pair)[0]) for name in ("fitnet", "crd", "ofd", "reviewkd", "simkd"))
    assert ours == counts
    assert [learned(method_of(name, *pair)[0]) for name in ("at", "rkd", "catkd")] == [0, 0, 0]


DEPLOYED = [    # teacher, student, P, deployed, dead
    ("resnet32x4", "ShuffleV2", 240640, 1042184, 579684), 
    ("vgg13", "vgg8", 854016, 4819044, 51300),
    ("vgg13", "MobileNetV2", 763904, 1292580, 335460)]


@pytest.mark.parametrize("teacher, student, projector, deployed, dead", DEPLOYED)
def test_what_simkd_deploys(teacher, student, projector, deployed, dead):
    method, network = method_of("simkd", teacher, student)
    assert learned(method) == projector
    whole = method.deploy(network)
    assert sum(p.numel() for p in whole.parameters()) == deployed
    assert sum(p.numel() for p in network.parameters() if not p.requires_grad) == dead
    keys = whole.state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"student", "projector", "fc"}
    gone = {"ShuffleV2": ("conv2.", "bn2.", "linear."), "MobileNetV2": ("conv2.", "classifier."),
            "vgg8": ("classifier.",)}.get(student, ("fc.",))
    assert {f"student.{key}" for key in network.state_dict() if not key.startswith(gone)} == {
        key for key in keys if key.startswith("student.")}


@pytest.mark.parametrize("student, std", [("MobileNetV2", 0.1414), ("ShuffleV2", None)])
def test_catkds_first_head(student, std):
    _, network = method_of("catkd", "vgg13", student)
    layer = classifier(network)
    if std:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.04)
        assert layer.weight.abs().max() > 3 * std
    else:
        bound = layer.in_features ** -0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert (layer.bias == 0).all() and not layer.bias.requires_grad and layer.weight.requires_grad


def test_ofds_first_connectors():
    method, _ = method_of("ofd", "resnet32x4", "ShuffleV2")
    for (conv, norm), width in zip(method.connectors, (64, 128, 256)):
        assert conv.weight.std().item() == pytest.approx((2 / width) ** 0.5, rel=0.03)
        assert conv.bias is None and (norm.weight == 1).all() and (norm.bias == 0).all()


def test_reviewkds_first_connectors():
    method, _ = method_of("reviewkd", "resnet32x4", "ShuffleV2")
    assert [x.in_channels for x in method.attend] == [1024, 1024, 1024]         # twice 512, not 1024's
    for x in [*(x[0] for x in method.reduce), *(x[0] for x in method.restore), *method.attend]:
        default = x.bias is not None        # 1 / sqrt(fan in); the others Kaiming's with a = 1
        fan = x.weight[0].numel()
        bound = (1 if default else 3) ** 0.5 * fan ** -0.5
        assert 0.98 * bound < x.weight.abs().max() <= bound


def test_crds_first_banks():
    method, _ = method_of("crd", "resnet32x4", "ShuffleV2")
    for bank in (method.bank_s, method.bank_t):
        bound = 128 ** -0.5 * 3 ** 0.5
        assert 0.999 * bound < bank.abs().max() <= bound
        assert (bank.norm(dim=1) - 1).abs().max() < 0.25 and abs(bank.norm(dim=1).mean() - 1) < 0.02
    assert not torch.equal(method.bank_s, method.bank_t)


def test_crds_numbers_are_the_papers(monkeypatch):
    monkeypatch.undo()
    assert (CRD.WIDTH, CRD.NEGATIVES, CRD.TEMPERATURE, CRD.MOMENTUM) == (128, 16384, 0.07, 0.5)


# ---------------------------------------------------------------- 6. CRD's draws and banks


def crd_of(labels):
    torch.manual_seed(0)
    pooled = Feat((), (), None, torch.randn(2, 6))
    return CRD(None, None, pooled, pooled, labels)


UNEVEN = torch.tensor([0] * 9 + [2] * 21 + [3] * 30)[torch.arange(N) * 7 % N]        # no image is of class 1


@pytest.mark.parametrize("labels, way", [(torch.arange(N) % 3, "distinct"), (UNEVEN, "distinct"),
                                         (UNEVEN, "few others"), (torch.arange(N) % 3, "large")])
def test_negatives(labels, way, monkeypatch):
    k = {"distinct": 16, "few others": 64, "large": 16}[way]
    monkeypatch.setattr(CRD, "NEGATIVES", k)
    if way == "large":
        monkeypatch.setattr(CRD, "LARGE", N - 1)
    method = crd_of(labels)
    if way == "distinct":
        assert method.notice == ""
    else:
        assert method.notice.startswith(f"CRD: {k} negatives are drawn with replacement (")
        assert ("of other classes" if way == "few others" else "(memory)") in method.notice
    for label in labels.unique():
        image = (labels == label).nonzero()[-1]
        others = (labels != label).nonzero().flatten()
        drawn = method._negatives(image.expand(3000))
        assert drawn.shape == (3000, k) and (labels[drawn] != label).all()
        counts = drawn.flatten().bincount(minlength=N)[others].double()
        if way == "distinct":
            assert all(len(row.unique()) == k for row in drawn[:500])
            want, variance = 3000 * k / len(others), 3000 * k / len(others) * (1 - k / len(others))
        else:
            want, variance = 3000 * k / len(others), 3000 * k / len(others) * (1 - 1 / len(others))
        assert (counts - want).abs().max() < 4.5 * variance ** 0.5      # each as often
        assert 0.4 < ((counts - want) ** 2).mean() / variance < 1.8
        assert len({tuple(row.sort().values.tolist()) for row in drawn[:50]}) == 50     # new in each step


def test_crd_changes_nothing_in_eval_mode():
    c = case("crd")
    c.loss()
    before = {key: x.clone() for key, x in c.method.state_dict().items()}
    c.method.eval()
    assert c.loss(s=double_features(c.student, 8)).isfinite()
    assert all(torch.equal(x, before[key]) for key, x in c.method.state_dict().items())


@pytest.mark.parametrize("name", ["crd", "simkd"])
def test_a_saved_method_resumes(name, tmp_path):
    one, other = case(name, dtype=torch.float32), case(name, seed=1, dtype=torch.float32)
    one.loss()
    torch.save(one.method.state_dict(), tmp_path / "method.pt")
    other = other._replace(method=METHODS[name](one.student, one.teacher, one.s, one.t, torch.arange(N) % 3,
                                                **({"fresh": False} if name == "catkd" else {})))
    other.method.load_state_dict(torch.load(tmp_path / "method.pt", weights_only=True))
    s, t = (mapped(lambda x: x.detach().float(), double_features(x, 7)) for x in (one.student, one.teacher))
    for _ in range(2):
        torch.manual_seed(5)
        want = one.loss(s, t)
        torch.manual_seed(5)
        assert torch.equal(other.loss(s, t), want)
    assert all(torch.equal(x, y) for x, y in zip(one.method.state_dict().values(),
                                                 other.method.state_dict().values()))


# ---------------------------------------------------------------- 7. torch.compile


@pytest.mark.parametrize("name", METHODS)
def test_one_graph(name):
    one, other = case(name, "student smaller"), case(name, "student smaller")
    torch.compiler.reset()
    compiled = torch.compile(other.method, fullgraph=True, backend="aot_eager")
    for step in range(2):
        torch.manual_seed(step)
        want = one.loss()
        torch.manual_seed(step)
        ours = compiled(other.s, other.t, None, other.index)
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=0)
        want.backward(), ours.backward()
    for x, y in zip([*tensors(one.s), *one.method.parameters()],
                    [*tensors(other.s), *other.method.parameters()]):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-12)
    for x, y in zip(one.method.buffers(), other.method.buffers()):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- 8. errors


def tiny(name, widths=(4, 6, 8), sides=(16, 8, 4), **options):
    network = Tiny(name, widths, sides, **options)
    return network, mapped(lambda x: x.detach().float(), double_features(network, 0))


def three(sides=(16, 8, 4)):
    return tiny("three", (4, 6, 8), sides)


def four(sides=(16, 8, 4, 2)):
    return tiny("four", (4, 6, 8, 8), sides)


def refusal(method, student, teacher, labels=None):
    (student, s), (teacher, t) = student, teacher
    with pytest.raises(ValueError) as e:
        METHODS[method](student, teacher, s, t, labels)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200
    return str(e.value)


@pytest.mark.parametrize("method, student, teacher, words", [
    ("ofd", three, four, "OFD pairs the stages' maps: three has 3, four 4"),
    ("reviewkd", four, three, "ReviewKD pairs the stages' maps: four has 4, three 3"),
    ("fitnet", lambda: three((16, 16, 4)), lambda: four((8, 4, 4, 4)), "16 and 4 pixels"),
    ("fitnet", lambda: four((8, 4, 4, 4)), lambda: three((16, 16, 4)), "4 and 16 pixels"),
    ("catkd", three, lambda: tiny("large", classes=7), "CAT-KD: three has 5 classes, large 7"),
    ("simkd", three, lambda: tiny("large", (4, 6, 8), (12, 6, 6), image=12), "4 and 6 pixels"),
])
def test_networks_that_do_not_fit(method, student, teacher, words):
    assert words in refusal(method, student(), teacher())


def test_real_networks_that_do_not_fit():
    (large, t), (small, s) = probed("wrn_40_2"), probed("MobileNetV2")
    for method in (OFD, ReviewKD):
        with pytest.raises(ValueError, match="MobileNetV2 has 4, wrn_40_2 3"):
            method(small, large, s, t)
    notice = AT(small, large, s, t).notice
    assert notice == "AT: MobileNetV2 has 4 stages, wrn_40_2 3; the first 3 are paired"
    (shuffle, f), (other, g) = probed("ShuffleV2"), probed("resnet20")
    with pytest.raises(ValueError, match=r"OFD: the norms_before_relu\(\) of ShuffleV2 names 0 batch norms"):
        OFD(other, shuffle, g, f)
    assert AT(other, shuffle, g, f).notice == ""


def test_an_error_leaves_the_student_as_it_was():
    wide = tiny("large", image=18, sides=(18, 9, 3))
    for method, teacher in (("catkd", tiny("large", classes=7)), ("simkd", wide)):
        student = three()
        before = copy.deepcopy(student[0].state_dict())
        refusal(method, student, teacher)
        assert all(torch.equal(x, before[key]) for key, x in student[0].state_dict().items())
        assert all(p.requires_grad for p in student[0].parameters())


def untraceable():
    network, f = three()
    real = network.forward

    def forward(x, features=False):
        assert x.shape[1] == 3
        return real(x, features)

    network.forward = forward
    return network, f


def test_simkd_says_what_it_cannot_trace_and_deploys_no_copy():
    student = untraceable()
    student[0].eval()
    assert "three cannot be traced by torch.fx (" in refusal("simkd", student, four())
    assert student[0].training is False
    c = case("simkd")
    with pytest.raises(ValueError, match="the student that it was made with"):
        c.method.deploy(copy.deepcopy(c.student))
    student, method = copy.deepcopy((c.student, c.method))
    assert method.deploy(student) is not c.method.deploy(c.student)


def test_simkds_deployed_network_drops_nothing_wherever_it_was_made():
    """A function's dropout asks for the student's mode, which tracing would write down."""
    (student, s), (teacher, t) = three(), four()
    widen = student.forward
    student.forward = lambda x, features=False: widen(
        torch.nn.functional.dropout(x, 0.5, student.training), features)
    student.train()
    method = METHODS["simkd"](student, teacher, s, t)
    assert all(m.training for m in student.modules())
    network, images = method.deploy(student).eval(), torch.randn(2, 3, student.image, student.image)
    assert torch.equal(network(images), network(images))


def test_simkd_takes_a_classifier_without_a_bias():
    (student, s), (teacher, t) = three(), four()
    teacher.fc.bias = None
    method = METHODS["simkd"](student, teacher, s, t)
    assert torch.equal(method.fc.weight, teacher.fc.weight) and (method.fc.bias == 0).all()


class Decoy(Tiny):
    """A network with an unused linear layer of its classifier's size after it, or a classifier of no mean."""

    def __init__(self, name, kind):
        super().__init__(name, (4, 6, 8), (16, 8, 4))
        self.kind, self.other = kind, nn.Linear(8, 5)

    def forward(self, x, features=False):
        _, f = super().forward(x, features=True)
        seen = {"decoy": f.pooled, "GeM": f.last.pow(3).mean((2, 3)).pow(1 / 3),
                "norm": F.layer_norm(f.pooled, (8,))}[self.kind]
        logits = self.fc(seen)
        return (logits, f) if features is True else logits


@pytest.mark.parametrize("name, kind, dtype", [
    ("simkd", "decoy", torch.float32), ("catkd", "decoy", torch.bfloat16),
    ("simkd", "GeM", torch.float32), ("catkd", "norm", torch.float32)])
def test_the_classifier_is_the_layer_that_makes_the_logits(name, kind, dtype):
    """A decoy head was deployed by SimKD and matched by CAT-KD: the student ended at chance."""
    student, teacher = Tiny("small", (4, 6, 8), (16, 8, 4)).to(dtype), Decoy("large", kind).to(dtype)
    with torch.no_grad():
        (z, s), (v, t) = (network.eval()(torch.randn(2, 3, 16, 16).to(dtype), features=True)
                          for network in (student, teacher))
    if kind == "decoy":
        method = METHODS[name](student, teacher, s, t, logits=(z, v))
        used = method.heads[1] if name == "catkd" else method.fc
        assert torch.equal(used.weight, teacher.fc.weight.to(used.weight))
    else:
        with pytest.raises(ValueError, match="no linear layer of large makes its logits from the mean"):
            METHODS[name](student, teacher, s, t, logits=(z, v))
    with pytest.raises(ValueError, match="large has 2 linear layers of that size; give logits="):
        METHODS[name](student, teacher, s, t)


@pytest.mark.parametrize("name", METHODS)
def test_networks_in_half_precision(name):
    """Outside autocast: their features are cast up, and so is the classifier that CAT-KD reads."""
    c = case(name, dtype=torch.float32)
    c.student.bfloat16(), c.teacher.bfloat16()
    s, t = (mapped(lambda x: x.detach().bfloat16(), f) for f in (c.s, c.t))
    assert c.loss(s, t).dtype == torch.float32 and c.loss(s, t).isfinite()


def test_what_a_network_does_not_give_is_said():
    whole, (network, f) = three(), three()
    for method in ("ofd", "reviewkd"):
        refusal(method, (network, f._replace(pre=None, post=None)), whole)
        refusal(method, whole, (network, f._replace(pre=None, post=None)))
    for method in ("rkd", "crd", "reviewkd"):
        assert "pooled" in refusal(method, (network, f._replace(pooled=None)), whole, torch.arange(N) % 3)
    short = network, f._replace(post=f.post[:1])
    assert "needs two stages: three has 1, three 3" in refusal("fitnet", short, whole)
    network.norms_before_relu = lambda: list(network.norms)[:2]
    assert "names 2 batch norms" in refusal("ofd", whole, (network, f))


def test_crds_labels():
    for labels in (None, torch.rand(30), torch.tensor([0, -1, 2]), torch.zeros(3, 2).long(), []):
        assert refusal("crd", three(), four(), labels).startswith("CRD needs labels, the class numbers (n,)")
    c = case("crd")
    with pytest.raises(ValueError, match="CRD needs index"):
        c.method(c.s, c.t)
    with pytest.raises(ValueError, match="CRD needs index"):
        c.method(c.s, c.t, None, torch.arange(5))
    assert "more than one class" in refusal("crd", three(), four(), torch.full((30,), 2))
    CRD(None, None, *[three()[1]] * 2, [0, 1] * 30)         # a list does


@pytest.mark.parametrize("name", METHODS)
def test_what_every_method_promises(name):
    """It owns no weight of the networks, deploys the student and reads of the teacher what it names."""
    one, other = case(name), case(name)
    assert {*one.student.parameters(), *one.teacher.parameters()}.isdisjoint(one.method.parameters())
    assert all(p.requires_grad for p in one.teacher.parameters())
    if name != "simkd":
        assert one.method.deploy(one.student) is one.student
    t, reads, depth = one.t, one.method.reads, one.method.depth
    bare = Feat(*(getattr(t, field) if field in reads else None for field in Feat._fields))
    bare = bare._replace(**{field: getattr(t, field)[:depth] for field in reads if field in ("pre", "post")})
    torch.manual_seed(1)
    want = one.loss()
    torch.manual_seed(1)
    assert torch.equal(other.loss(t=bare), want)
    assert reads == READ[name][1]


# ---------------------------------------------------------------- 9. the file alone


STRANGER = '''
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch.nn.functional as F
from collections import namedtuple
from torch import nn
from feature_kd import METHODS, __doc__ as text

Maps = namedtuple("Maps", "post pre last pooled")

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)
        self.end = nn.Linear(2 * width, 4)
    def norms_before_relu(self):
        return [self.norm_a, self.norm_b]
    def forward(self, x, features=False):
        a = self.norm_a(self.a(x))
        b = self.norm_b(self.b(F.relu(a)))
        last = F.relu(b)
        pooled = last.mean((2, 3))
        out = self.end(pooled)
        return (out, Maps((F.relu(a), last), (a, b), last, pooled)) if features is True else out

example = "\\n".join(line[4:] for line in text.split("A network's features")[0].splitlines()
                     if line.startswith("    "))
assert example.count("\\n") >= 5, example
for name in METHODS:
    student, teacher = Net(4), Net(6)
    images, target, index = torch.randn(5, 3, 8, 8), torch.arange(5) % 4, torch.arange(5)
    labels = torch.arange(40) % 4
    scope = dict(globals(), SGD=lambda parameters, *_: torch.optim.SGD(parameters, lr=0.1))
    first, once, rest = example.partition("method = ")
    exec(first + once + rest.replace('"crd"', repr(name)).split("\\n")[0], scope)
    assert "METHODS" in rest.split("\\n")[0]
    exec(first + rest.split("\\n", 1)[1], scope)        # a step, as all of them
    before = [p.detach().clone() for p in student.parameters()]
    scope["loss"].backward()
    scope["optimizer"].step()
    assert scope["loss"].isfinite() and any((p != q).any() for p, q in zip(student.parameters(), before))
    assert scope["network"](images).shape == (5, 4)
    print(name, *scope["network"].state_dict())
'''


def test_the_file_alone(tmp_path):
    (tmp_path / "feature_kd.py").write_text(SOURCE.read_text())
    out = subprocess.run([sys.executable, "-I", "-c", STRANGER, tmp_path], cwd=tmp_path, capture_output=True,
                         text=True)
    assert out.returncode == 0, out.stderr
    assert [line.split()[0] for line in out.stdout.splitlines()] == list(METHODS)
    assert out.stderr == ""


# ---------------------------------------------------------------- 10. what is deployed


@pytest.mark.parametrize("teacher, student", [("resnet32x4", "ShuffleV2"), ("wrn_40_2", "wrn_16_2")])
def test_simkds_network_shares_what_learns(teacher, student):
    method, network = method_of("simkd", teacher, student)
    whole, images = method.deploy(network), torch.randn(2, 3, 32, 32)
    alive = {p for p in network.parameters() if p.requires_grad}
    assert {p for p in whole.parameters() if p.requires_grad} == alive | {*method.projector.parameters()}
    assert {p for p in whole.parameters() if not p.requires_grad} == {*method.fc.parameters()}
    large = classifier(probed(teacher)[0])
    assert torch.equal(method.fc.weight, large.weight) and torch.equal(method.fc.bias, large.bias)
    assert method.fc.weight is not large.weight
    with torch.no_grad():
        before = whole.eval()(images)
        next(network.parameters()).mul_(1.5)                    # "training" the student ...
        middle = whole(images)
        method.projector[0].weight.add_(0.1)                    # ... and the projector
        assert not torch.equal(before, middle) and not torch.equal(middle, whole(images))
    whole.train()
    assert all(m.training for m in method.projector.modules())
    network.train(), method.train()
    _, s = network(images, features=True)
    method(s, probed(teacher)[1]).backward()
    assert all(p.grad is not None for p in alive)               # nothing dead is left to decay
    assert all(p.grad is None for p in network.parameters() if p not in alive)


