"""logit_kd.py against a second implementation, and what every loss promises, called by its name."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill
import zscore_kd
from logit_kd import METHODS, dist_loss, distillation_loss, entropy_weight, linear_kd_loss, rld_loss
from test_zscore import logits
from zscore_kd import dkd_loss, kd_loss, mlkd_loss, ttm_loss, weighted_zscore, wttm_loss

BOTH = pytest.mark.parametrize("zscore", [True, False])
NAN, INF = float("nan"), float("inf")


# The second implementation: the published formulas, in loops over samples and classes, without a look at
# logit_kd.py. They take complex numbers: the gradient of an analytic f is Im f(x + ih) / h, to rounding.


def soften(row, tau, zscore):
    """The list of softmax(Z(row; tau)), or of softmax(row / tau)."""
    k = len(row)
    if zscore:
        mean = sum(row) / k
        std = np.sqrt(sum((x - mean) ** 2 for x in row) / k)
        row = [(x - mean) / std for x in row]
    top = max(x.real for x in row)
    e = [np.exp((x - top) / tau) for x in row]
    return [x / sum(e) for x in e]


def kl(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q))


def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    if max(map(abs, x)) == min(map(abs, x)) or max(map(abs, y)) == min(map(abs, y)):
        return 0                    # what is constant correlates with nothing
    top = sum((a - mx) * (b - my) for a, b in zip(x, y))
    return top / (np.sqrt(sum((a - mx) ** 2 for a in x)) * np.sqrt(sum((b - my) ** 2 for b in y)))


def dist_reference(z, v, tau, beta, gamma, zscore):
    p = [soften(row, tau, zscore) for row in z]
    t = [soften(row, tau, zscore) for row in v]
    rows, columns = len(z), len(z[0])
    inter = 1 - sum(pearson(p[i], t[i]) for i in range(rows)) / rows
    intra = 1 - sum(pearson([a[k] for a in p], [a[k] for a in t]) for k in range(columns)) / columns
    return tau**2 * (beta * inter + gamma * intra)


def rld_reference(z, v, target, tau, alpha, beta, zscore):
    total = 0
    for s, t, y in zip(z, v, target):
        ps, pt = soften(s, tau, zscore), soften(t, tau, zscore)
        scd = kl([max(pt), 1 - max(pt)], [ps[y], 1 - ps[y]])
        below = [k for k in range(len(t)) if t[k] < t[y]]
        mcd = 0
        if below:
            sum_t, sum_s = sum(pt[k] for k in below), sum(ps[k] for k in below)
            mcd = kl([pt[k] / sum_t for k in below], [ps[k] / sum_s for k in below])
        total += tau**2 * (alpha * scd + beta * mcd)
    return total / len(z)


def entropy_weight_reference(z, v, temperature):
    weights = []
    for s, t in zip(z, v):
        h_s, h_t = (-sum(p * np.log(p) for p in soften(x, temperature, False)) for x in (s, t))
        weights.append((h_t + h_t * h_s / np.log(len(s))) / 2)
    return weights


def check(ours, reference, *students):
    """Value and every entry of each student's gradient, 1e-9 relative."""
    ours.backward()
    arrays = [z.detach().numpy().astype(complex) for z in students]
    assert ours.item() == pytest.approx(complex(reference(*arrays)).real, rel=1e-9, abs=1e-13)
    for z, array in zip(students, arrays):
        gradient = np.zeros(z.shape)
        for index in np.ndindex(*z.shape):
            kept, array[index] = array[index], array[index] + 1e-30j
            gradient[index] = complex(reference(*arrays)).imag / 1e-30
            array[index] = kept
        np.testing.assert_allclose(z.grad.numpy(), gradient, rtol=0, atol=1e-9 * abs(gradient).max() + 1e-14)


# ---------------------------------------------------------------- against the second implementation


@pytest.mark.parametrize("rows, k, tau, beta, gamma, zscore", [
    (5, 7, 4.0, 2.0, 2.0, True), (4, 4, 1.0, 1.0, 1.0, False), (3, 6, 2.0, 0.0, 1.0, True),
    (3, 6, 2.0, 1.0, 0.0, False)])
def test_dist_is_the_published_form(rows, k, tau, beta, gamma, zscore):
    z, v = logits(rows, k, seed=1).requires_grad_(), logits(rows, k, seed=2)
    check(dist_loss(z, v, tau, beta=beta, gamma=gamma, zscore=zscore),
          lambda x: dist_reference(x, v.numpy(), tau, beta, gamma, zscore), z)


@BOTH
def test_dist_of_one_sample_and_of_constant_classes_correlates_nothing(zscore):
    z, v = logits(1, 7, seed=5).requires_grad_(), logits(1, 7, seed=6)
    check(dist_loss(z, v, 2.0, zscore=zscore),
          lambda x: dist_reference(x, v.numpy(), 2.0, 2.0, 0.0, zscore) + 4 * 2.0, z)
    z, v = logits(1, 7, seed=5).repeat(3, 1).requires_grad_(), logits(3, 7, seed=6)
    loss = dist_loss(z, v, 1.0, beta=0.0, gamma=1.0, zscore=zscore)
    loss.backward()
    assert loss.item() == 1.0 and (z.grad == 0).all()
    assert dist_loss(v, v, 1.0, zscore=zscore).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rows, k, tau, alpha, beta, zscore", [
    (6, 7, 4.0, 1.0, 8.0, True), (5, 5, 1.0, 1.0, 0.0, False), (5, 5, 2.0, 0.0, 1.0, True),
    (4, 3, 2.0, 1.0, 2.0, False), (1, 6, 2.0, 1.0, 8.0, True)])
def test_rld_is_the_published_form(rows, k, tau, alpha, beta, zscore):
    z, v, y = logits(rows, k, seed=7).requires_grad_(), logits(rows, k, seed=8), torch.arange(rows) % k
    if rows > 4:
        y[0], y[1], y[2] = v[0].argmax(), v[1].argmin(), v[2].argsort()[k // 2]
    check(rld_loss(z, v, y, tau, alpha=alpha, beta=beta, zscore=zscore),
          lambda x: rld_reference(x, v.numpy(), y.tolist(), tau, alpha, beta, zscore), z)


@BOTH
def test_rld_with_ties_masks_what_is_equal(zscore):
    v = torch.tensor([[2.0, 2.0, 1.0, 0.0, 0.0], [1.0, 3.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 5.0, 5.0]])
    z, v, y = logits(3, 5, seed=13).requires_grad_(), v.double(), torch.tensor([1, 0, 2])
    check(rld_loss(z, v, y, 2.0, zscore=zscore),
          lambda x: rld_reference(x, v.numpy(), y.tolist(), 2.0, 1.0, 8.0, zscore), z)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_entropy_weight_is_ea_kds(temperature):
    z, v = logits(5, 8, seed=32).requires_grad_(), logits(5, 8, seed=33).requires_grad_()
    ours = entropy_weight(z, v, temperature)
    assert ours.shape == (5,) and not ours.requires_grad
    np.testing.assert_allclose(
        ours.numpy(), entropy_weight_reference(*(x.detach().numpy() for x in (z, v)), temperature), rtol=1e-9)
    flat = torch.zeros(2, 8)
    torch.testing.assert_close(entropy_weight(flat, flat), torch.full((2,), np.log(8)).float())
    assert (entropy_weight(flat, 1e6 * torch.eye(8)[:2]) == 0).all()        # a certain teacher


def test_every_default_argument_of_the_newer_losses():
    z, v, y = logits(6, 7, seed=34), logits(6, 7, seed=35), [3, 0, 6, 3, 1, 2]
    n = [x.numpy() for x in (z, v)]
    for ours, reference in (
            (dist_loss(z, v), dist_reference(*n, 4.0, 2.0, 2.0, True)),
            (rld_loss(z, v, torch.tensor(y)), rld_reference(*n, y, 4.0, 1.0, 8.0, True)),
            (entropy_weight(z, v).sum(), sum(entropy_weight_reference(*n, 3.0)))):
        assert ours.item() == pytest.approx(reference, rel=1e-9)


# ---------------------------------------------------------------- what every loss promises


CASES = [(method, entropy_temp, zscore) for method, entropy_temp in (
    *((method, None) for method in METHODS), ("kd", 3.0), ("dkd", 3.0), ("mlkd", 3.0))
    for zscore in (True, False)]
EVERY = pytest.mark.parametrize("method, entropy_temp, zscore", CASES)


def by_name(method, entropy_temp, zscore, z, v, y=None, tau=2.0):
    """A loss by its name; MLKD's strong view is the weak one, its rows in another order."""
    y = torch.arange(len(z)) if y is None else y
    return distillation_loss(method, [z, z.flip(0)], [v, v.flip(0)], y, tau, zscore=zscore,
                             entropy_temp=entropy_temp)


def value_and_gradient(loss, z, *rest):
    z = z.detach().clone().requires_grad_()
    value = loss(z, *rest)
    value.backward()
    return value.detach(), z.grad


@EVERY
def test_every_loss_casts_up_and_leaves_the_teacher_alone(method, entropy_temp, zscore):
    def loss(z, v):
        return by_name(method, entropy_temp, zscore, z, v)

    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2fnuz):
        z, v = (logits(16, 100, seed=s, dtype=torch.float32).to(dtype) for s in (40, 41))
        ours = loss(z, v)
        assert ours.dtype == torch.float32 and ours.shape == ()
        assert torch.equal(ours, loss(z.float(), v.float()))
        exact = loss(z.double(), v.double())
        assert exact.dtype == torch.float64 and ours.item() == pytest.approx(exact.item(), rel=1e-4)
        assert loss(z, v.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(z, v), ours) and torch.equal(loss(z.float(), v.float()), ours)
    z, v = (logits(16, 100, seed=s).requires_grad_() for s in (42, 43))
    loss(z, v).backward()
    assert v.grad is None and z.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="exchanged"):
        loss(v.detach(), z)


@EVERY
def test_every_loss_and_gradient_is_finite_at_any_scale(method, entropy_temp, zscore):
    for rows, scale, dtype, tau in ((1, 1e-30, torch.float32, 4.0), (16, 1e-30, torch.float64, 1.0),
                                    (16, 30, torch.float32, 0.1), (1, 100, torch.float16, 1.0),
                                    (16, 1e4, torch.bfloat16, 4.0), (16, 1e30, torch.float64, 4.0)):
        z, v = ((scale * logits(rows, 16, seed=s, scale=1.0)).to(dtype) for s in (1, 2))
        value, gradient = value_and_gradient(
            lambda z: by_name(method, entropy_temp, zscore, z, v, tau=tau), z)
        assert value.isfinite() and gradient.isfinite().all(), (scale, dtype, tau)


@EVERY
def test_every_loss_shows_a_nan_and_leaves_constant_rows_alone(method, entropy_temp, zscore):
    for bad in (NAN, INF):
        for side in (0, 1):
            for row, column in ((2, 5), (2, 2), (0, 0)):      # another class, the target's own
                pair = [logits(4, 8, seed=s, dtype=torch.float32) for s in (38, 39)]
                pair[side][row, column] = bad
                loss = by_name(method, entropy_temp, zscore, *pair)
                assert loss.isnan() or loss.isinf() and not zscore, (bad, side, row, column)
    one_hot, flat = 50 * torch.eye(8)[[0, 5, 2, 2]], torch.full((4, 8), 0.1)
    rows, columns = logits(4, 8, seed=36, dtype=torch.float32), logits(4, 8, seed=37, dtype=torch.float32)
    rows[1], columns[:, 3] = 0.1, 0.1
    for z in (rows, columns, one_hot, flat):
        for v in (rows, columns, 1e4 * one_hot, flat):
            value, gradient = value_and_gradient(lambda z: by_name(method, entropy_temp, zscore, z, v), z)
            assert value.isfinite() and gradient.isfinite().all()
            if zscore:
                assert (gradient[z.amax(-1) == z.amin(-1)] == 0).all()


@EVERY
def test_every_loss_compiles_whole_and_maps(method, entropy_temp, zscore):
    z, v, y = logits(6, 10, seed=103), logits(6, 10, seed=104), torch.arange(6)

    def loss(z, v, y):
        return by_name(method, entropy_temp, zscore, z, v, y)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, z, v, y), value_and_gradient(loss, z, v, y))
    stack = [torch.stack([x, x.flip(0)]) for x in (z, v, y)]
    torch.testing.assert_close(torch.func.vmap(loss)(*stack),
                               torch.stack([loss(z, v, y), loss(*(x[1] for x in stack))]))
    torch.testing.assert_close(torch.func.grad(loss)(z, v, y), value_and_gradient(loss, z, v, y)[1])


@BOTH
@pytest.mark.parametrize("method", ["kd", "dkd", "ttm", "wttm", "rld"])
def test_reduction_none_is_a_loss_for_each_sample(method, zscore):
    for rows in (1, 7, 100):
        z, v, y = logits(rows, 8, seed=50), logits(rows, 8, seed=51), torch.arange(rows) % 8
        each = distillation_loss(method, [z], [v], y, zscore=zscore, reduction="none")
        assert each.shape == (rows,)
        for reduction in ({}, {"reduction": "mean"}):
            mean = distillation_loss(method, [z], [v], y, zscore=zscore, **reduction)
            assert torch.equal(each.mean(), mean)
    alone = [distillation_loss(method, [z[i:i + 1]], [v[i:i + 1]], y[i:i + 1], zscore=zscore)
             for i in range(rows)]
    torch.testing.assert_close(each, torch.stack(alone), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match='"mean" or "none", got \'sum\''):
        distillation_loss(method, [z], [v], y, zscore=zscore, reduction="sum")


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_the_masked_form_as_the_docstring_prints_it(backend):
    """The mean over the samples that are left; without any 0, and no gradient."""
    lines = [line for line in zscore_kd.__doc__.splitlines()
             if line.startswith(("    w = ", "    losses = ", "    loss = (w"))]
    assert len(lines) == 3
    names = {"dkd_loss": dkd_loss}
    exec("\n".join(["def form(z, v, y):", *lines, "    return loss"]), names)
    form = names["form"]
    torch._dynamo.reset()
    z, v = logits(6, 8, seed=62), logits(6, 8, seed=63)
    keep = torch.tensor([True, False, True, True, False, True])
    y = torch.arange(6).where(keep, -100)
    call = torch.compile(form, fullgraph=True, backend=backend) if backend else form
    value, gradient = value_and_gradient(call, z, v, y)
    expected, expected_gradient = value_and_gradient(dkd_loss, z[keep], v[keep], y[keep])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[keep], expected_gradient)
    assert (gradient[~keep] == 0).all()
    value, gradient = value_and_gradient(call, z, v, torch.full((6,), -100))
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("method", ["dkd", "rld"])
def test_a_target_that_is_no_class_is_said_or_not_finite(method):
    def loss(z, v, y):
        return by_name(method, None, True, z, v, y)

    z, v, y = logits(3, 8, seed=66), logits(3, 8, seed=67), torch.tensor([0, 8, 2])
    with pytest.raises(ValueError, match=r"in \[0, 8\), got \(3,\) from 0 to 8"):
        loss(z, v, y)
    assert not torch.func.vmap(loss)(*(x[None] for x in (z, v, y))).isfinite().any()
    torch._dynamo.reset()
    assert not torch.compile(loss, fullgraph=True, backend="aot_eager")(z, v, y).isfinite()
    wide = [logits(3, 200, seed=s) for s in (64, 65)]
    for dtype in (torch.uint8, torch.int16, torch.int32):       # 156 is -100 in 8 bits
        numbers = torch.tensor([1, 100, 156], dtype=dtype)
        torch.testing.assert_close(loss(*wide, numbers), loss(*wide, numbers.long()))


@pytest.mark.parametrize("error, words, call", [
    (ValueError, r"\(2, 3\) and \(2, 4\)", lambda: dist_loss(torch.rand(2, 3), torch.rand(2, 4))),
    (ValueError, "positive number, got 0", lambda: dist_loss(torch.rand(2, 3), torch.rand(2, 3), 0)),
    (TypeError, "int64", lambda: entropy_weight(torch.rand(2, 3), torch.ones(2, 3).long())),
    (ValueError, r"4 classes .* got \(3,\)",
     lambda: rld_loss(torch.rand(4, 3), torch.rand(4, 3), torch.zeros(3).long())),
    (ValueError, "unknown method 'ddd'; known: kd, .*, dist, rld",
     lambda: distillation_loss("ddd", [torch.rand(2, 3)], [torch.rand(2, 3)], None)),
    (ValueError, "5 tokens of the student, 4 of the teacher",
     lambda: linear_kd_loss(torch.rand(5, 6), torch.rand(40, 6), torch.rand(4, 6), torch.rand(40, 6))),
])
def test_bad_input_to_the_newer_losses_is_refused(error, words, call):
    with pytest.raises(error, match=words):
        call()


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_two_classes_are_refused_with_zscore(method, zscore):
    z, v = logits(4, 2, seed=1), logits(4, 2, seed=2)
    if zscore or method == "dkd":
        with pytest.raises(ValueError, match="2 classes|3 classes"):
            by_name(method, None, zscore, z, v, torch.zeros(4).long())
    else:
        assert by_name(method, None, zscore, z, v, torch.zeros(4).long()) > 0


# ---------------------------------------------------------------- large vocabularies


def heads(n, h=6, h_teacher=9, v=40, dtype=torch.float64, seed=80):
    g = torch.Generator().manual_seed(seed)
    make = [torch.randn(s, dtype=torch.float64, generator=g).to(dtype)
            for s in ((n, h), (v, h), (n, h_teacher), (v, h_teacher))]
    return make[0].requires_grad_(), make[1].requires_grad_(), make[2], make[3]


def plain(s, w, t, w_t, tau=1.0, **how):
    """`linear_kd_loss` without chunks."""
    return kd_loss(s @ w.mT, t @ w_t.mT, tau, **how)


@pytest.mark.parametrize("n, chunk, dtype, zscore", [
    (13, 4, torch.float64, True), (12, 4, torch.float32, False), (5, 256, torch.float64, False),
    (1, 1, torch.float32, True), (7, 1, torch.bfloat16, True), (13, 4, torch.bfloat16, False)])
def test_linear_kd_is_kd_of_the_heads_logits(n, chunk, dtype, zscore):
    data = heads(n, dtype=dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    mask = (torch.arange(n) % 3 != 1).float()
    for tau in (0.5, 2.0):
        how = {"zscore": zscore, "reduction": "none"}
        ours, expected = linear_kd_loss(*data, tau, chunk=chunk, **how), plain(*data, tau, **how)
        assert ours.shape == (n,) and ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=max(tolerance / 10, 1e-10), atol=1e-6 * tolerance)
        mean = linear_kd_loss(*data, tau, chunk=chunk, zscore=zscore)
        torch.testing.assert_close(mean, ours.mean(), rtol=1e-6, atol=0)
        for weighted in (lambda x: x.mean(), lambda x: (mask * x).sum() / mask.sum().clamp(min=1)):
            for a, b in zip(*(torch.autograd.grad(weighted(x), data[:2], retain_graph=True)
                              for x in (ours, expected))):
                assert a.dtype == dtype
                assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-14


def test_linear_kds_defaults_are_z_tau_1_and_chunks_of_256():
    data = heads(300)
    torch.testing.assert_close(linear_kd_loss(*data), plain(*data, 1.0, zscore=True))
    with Watch(40) as watch:
        linear_kd_loss(*data)
    assert watch.rows == 256


def test_linear_kd_leaves_the_teacher_alone():
    s, w, t, w_t = (x.detach().requires_grad_() for x in heads(9))
    loss = linear_kd_loss(s, w, t, w_t, chunk=4)
    loss.backward()
    assert t.grad is None and w_t.grad is None and s.grad is not None and w.grad is not None
    with torch.no_grad():
        assert not linear_kd_loss(s, w, t, w_t, chunk=4).requires_grad
    with pytest.raises(ValueError, match="exchanged"):
        linear_kd_loss(s.detach(), w.detach(), t, w_t, chunk=4)


def test_linear_kd_under_autocast_is_the_plain_form_under_autocast():
    data = heads(9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = linear_kd_loss(*data, chunk=4), plain(*data)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(expected.item(), rel=2e-3)
    for a, b in zip(*(torch.autograd.grad(x, data[:2]) for x in (ours, expected))):
        assert (a - b).abs().max() <= 2e-2 * b.abs().max()


def test_linear_kd_adds_up_many_chunks_gradients_without_loss():
    """In bfloat16 the 256th of equal gradients would be rounded away."""
    torch.manual_seed(0)
    s, w, t, w_t = (torch.randn(n, 8).bfloat16() for n in (4096, 32, 4096, 32))
    s, w = (s * 0.2 + 1).requires_grad_(), w.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (s, w)]
    expected = torch.autograd.grad(plain(*exact, t.double(), w_t.double()), exact[1])[0]
    for loss in (plain(s, w, t, w_t), linear_kd_loss(s, w, t, w_t, chunk=16)):
        gradient = torch.autograd.grad(loss, w)[0]
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - expected).norm() < 0.02 * expected.norm()


def test_linear_kd_compiles_whole_and_maps():
    s, w, t, w_t = (x.detach() for x in heads(9))

    def loss(s, w):
        return linear_kd_loss(s, w, t, w_t, chunk=4)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        leaves = s.clone().requires_grad_(), w.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(torch.func.vmap(loss, (0, None))(torch.stack([s, -s]), w),
                               torch.stack([loss(s, w), loss(-s, w)]))


class Watch(TorchDispatchMode):
    """Of all that is computed: the most rows of a tensor with V columns, and the most bytes alive at once."""

    def __init__(self, v):
        super().__init__()
        self.v, self.rows, self.peak, self.alive = v, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                if x.dim() == 2 and x.shape[1] == self.v:
                    self.rows = max(self.rows, x.shape[0])
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: pair for k, pair in self.alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@BOTH
def test_linear_kds_memory_does_not_grow_with_the_tokens(zscore):
    v, chunk, peaks = 3000, 8, {}
    for name, n in (("ours", 32), ("ours", 128), ("plain", 32), ("plain", 128)):
        data = heads(n, h=4, h_teacher=4, v=v, dtype=torch.float32)
        with Watch(v) as watch:
            (linear_kd_loss(*data, zscore=zscore, chunk=chunk) if name == "ours"
             else plain(*data, zscore=zscore)).backward()
        assert watch.rows == (chunk if name == "ours" else n)
        peaks[name, n] = watch.peak
    assert peaks["plain", 128] > 3.5 * peaks["plain", 32]        # so the count sees what it should
    assert peaks["ours", 128] < 1.1 * peaks["ours", 32]
    assert peaks["ours", 128] < 0.2 * peaks["plain", 128]


# ---------------------------------------------------------------- tau by the number of classes


@pytest.mark.parametrize("k", [100, 1000, 10000, 32000, 128256])
def test_the_teachers_top_probability_of_a_real_shaped_row(k):
    """One logit 8 standard deviations out of a Gaussian's: what Z leaves of it, as the docstring's table."""
    row = torch.special.ndtri((torch.arange(k, dtype=torch.float64) - 0.5) / (k - 1))
    row[0] = 8
    line = [line for line in zscore_kd.__doc__.splitlines() if line.split()[:1] == [str(k)]][-1]
    for tau, printed in zip((0.25, 0.5, 1.0, 2.0), line.split()[1:], strict=True):
        p = weighted_zscore(row, tau).softmax(-1)[0].item()
        assert f"{p:.1e}" == f"{float(printed):.1e}", tau
        # in closed form: the mean of exp(x / tau) of a Gaussian is exp(1 / 2 tau^2)
        sigma = (1 + 8**2 / k) ** 0.5 * tau
        mean = np.exp(8 / sigma) / (np.exp(8 / sigma) + k * np.exp(0.5 / sigma**2))
        assert p == pytest.approx(mean, rel=0.05), tau


# ---------------------------------------------------------------- by their names, as the scripts call them


def test_a_name_is_its_function_with_its_own_defaults():
    """A swapped argument would be another method under the right name."""
    z, v, z2, v2 = (logits(6, 9, seed=s) for s in (1, 2, 3, 4))
    y = torch.arange(6)
    inputs = {"mlkd": (z, v, z2, v2), "dkd": (z, v, y), "rld": (z, v, y)}
    functions = {"kd": kd_loss, "dkd": dkd_loss, "mlkd": mlkd_loss, "ctkd": kd_loss, "ttm": ttm_loss,
                 "wttm": wttm_loss, "dist": dist_loss, "rld": rld_loss}
    assert METHODS == tuple(functions)
    options = {"dist": {"beta": 1.5, "gamma": 0.5}, "rld": {"alpha": 0.5, "beta": 2.0},
               "mlkd": {"zscore_relations": False}, "kd": {"correction": 1}}
    for name, function in functions.items():
        given = inputs.get(name, (z, v))
        assert torch.equal(distillation_loss(name, [z, z2], [v, v2], y), function(*given)), name
        for more in ({"zscore": False}, {"zscore": True}, options.get(name, {})):
            assert torch.equal(distillation_loss(name, [z, z2], [v, v2], y, 3.0, **more),
                               function(*given, 3.0, **more)), name


DIST = {"method": "dist", "beta": 1.5, "gamma": 0.5}
RLD = {"method": "rld", "alpha": 0.5, "beta": 2.0}
EA = {"entropy_temp": 2.0}


@BOTH
@pytest.mark.parametrize("recipe", [DIST, RLD, RLD | EA, {"method": "kd"} | EA, {"method": "dkd"} | EA,
                                    {"method": "mlkd", "zscore_relations": False} | EA])
def test_a_recipes_numbers_reach_the_loss_of_a_run(recipe, zscore):
    """Else --entropy-weight, or DIST's gamma, would do nothing under the right name."""
    torch.manual_seed(0)
    z, z2, v, v2 = (torch.randn(6, 9) for _ in range(4))
    y, method = torch.arange(6), recipe["method"]
    distiller = distill.Distiller(torch.nn.Flatten(), recipe | {
        "precision": "fp32", "base_temp": 3.0, "zscore": zscore, "ce_weight": 1.0})
    distiller.kd_weight.fill_(2.0)
    views, answers = ([z, z2], [v, v2]) if method == "mlkd" else ([z], [v])
    loss, (ce, kd), _ = distiller([x.view(6, 1, 3, 3) for x in views], y, y, answers)
    w, w2 = entropy_weight(z, v, 2.0), entropy_weight(z2, v2, 2.0)
    how = {"zscore": zscore}
    if method == "dist":
        expected = dist_loss(z, v, 3.0, beta=1.5, gamma=0.5, **how)
    elif method == "mlkd":
        expected = mlkd_loss(z, v, z2, v2, 3.0, zscore_relations=False, kl_weights=(w, w2), **how)
    else:
        each = {"rld": lambda: rld_loss(z, v, y, 3.0, alpha=0.5, beta=2.0, reduction="none", **how),
                "kd": lambda: kd_loss(z, v, 3.0, reduction="none", **how),
                "dkd": lambda: dkd_loss(z, v, y, 3.0, reduction="none", **how)}[method]()
        expected = (w * each if "entropy_temp" in recipe else each).mean()
    assert kd.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx((ce + 2 * kd).item(), rel=1e-6)


@BOTH
def test_entropy_weights_of_mlkd_are_on_the_kls_of_their_own_view_alone(zscore):
    """As EA-KD's code has it: weights of the raw logits of the view, relations without any."""
    torch.manual_seed(0)
    z, z2, v, v2 = (scale * torch.randn(6, 10, dtype=torch.float64) for scale in (1, 1, 3, 3))
    weak, strong = (torch.tensor(entropy_weight_reference(*view, 3.0), dtype=torch.float64)
                    for view in ((z.numpy(), v.numpy()), (z2.numpy(), v2.numpy())))

    def kls(z, v, temperatures, w):
        z, v = (weighted_zscore(x) if zscore else x for x in (z, v))
        return sum((t**2 * w * (F.softmax(v / t, -1) * ((v / t).log_softmax(-1) - (z / t).log_softmax(-1))
                                ).sum(-1)).mean() for t in temperatures)

    def terms(w, w2):
        return (0.5 * kls(z, v, (2, 3, 5, 2, 6), w) + kls(z2, v2, (2, 3, 5), w2) + kls(z, v, (2, 6), w))

    ours, plain = (distillation_loss("mlkd", [z, z2], [v, v2], None, 2.0, zscore=zscore, entropy_temp=t)
                   for t in (3.0, None))
    one = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(ours - plain, terms(weak, strong) - terms(one, one), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weak, strong)
