"""logit_kd.py and what zscore_kd.py has of weights, masks and shapes, against a second implementation."""

import functools
import re
import subprocess
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distill
import logit_kd
import zscore_kd
from logit_kd import crld_loss, dist_loss, entropy_weight, linear_kd_loss, rld_loss
from test_zscore import dkd_reference, logits
from zscore_kd import METHODS, distillation_loss, dkd_loss, kd_loss, ttm_loss, weighted_zscore, wttm_loss

ROOT = Path(__file__).resolve().parent.parent
BOTH = pytest.mark.parametrize("zscore", [True, False])
NAN, INF = float("nan"), float("inf")


# The second implementation: the published formulas, in loops over samples and classes, without a look at
# logit_kd.py. They take complex numbers: the gradient of an analytic f is Im f(x + ih) / h, to rounding.


def soften(row, tau, zscore, correction=0):
    """The list of softmax(Z(row; tau)), or of softmax(row / tau)."""
    k = len(row)
    if zscore:
        mean = sum(row) / k
        deviation = np.sqrt(sum((x - mean) ** 2 for x in row) / (k - correction))
        row = [(x - mean) / deviation for x in row]
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


def dist_reference(z, v, tau, beta, gamma, zscore, correction=0):
    p = [soften(row, tau, zscore, correction) for row in z]
    t = [soften(row, tau, zscore, correction) for row in v]
    rows, columns = len(z), len(z[0])
    inter = 1 - sum(pearson(p[i], t[i]) for i in range(rows)) / rows
    intra = 1 - sum(pearson([a[k] for a in p], [a[k] for a in t]) for k in range(columns)) / columns
    return tau**2 * (beta * inter + gamma * intra)


def rld_reference(z, v, target, tau, alpha, beta, zscore, correction=0):
    total = 0
    for s, t, y in zip(z, v, target):
        ps, pt = soften(s, tau, zscore, correction), soften(t, tau, zscore, correction)
        scd = kl([max(pt), 1 - max(pt)], [ps[y], 1 - ps[y]])
        below = [k for k in range(len(t)) if t[k] < t[y]]
        mcd = 0
        if below:
            sum_t, sum_s = sum(pt[k] for k in below), sum(ps[k] for k in below)
            mcd = kl([pt[k] / sum_t for k in below], [ps[k] / sum_s for k in below])
        total += tau**2 * (alpha * scd + beta * mcd)
    return total / len(z)


def crld_reference(z_weak, v_weak, z_strong, v_strong, tau, within, across, zscore, correction=0):
    total = 0
    for zw, vw, zs, vs in zip(z_weak, v_weak, z_strong, v_strong):
        def d(s, t):
            return tau**2 * kl(soften(t, tau, zscore, correction), soften(s, tau, zscore, correction))
        m_w = float(max(soften(vw, 1.0, False)) >= 0.9)
        m_s = float(max(soften(vs, 1.0, False)) >= 0.2)
        total += within * m_w * (d(zw, vw) + d(zs, vs)) + across * m_s * (d(zs, vw) + d(zw, vs))
    return total / len(z_weak)


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


@BOTH
@pytest.mark.parametrize("rows, k, tau, correction, beta, gamma", [
    (5, 7, 4.0, 0, 2.0, 2.0), (4, 4, 1.0, 0, 1.0, 1.0), (3, 6, 2.0, 1, 0.0, 1.0), (3, 6, 2.0, 0, 1.0, 0.0)])
def test_dist_is_the_published_form(rows, k, tau, correction, beta, gamma, zscore):
    z, v = logits(rows, k, seed=1).requires_grad_(), logits(rows, k, seed=2)
    check(dist_loss(z, v, tau, beta=beta, gamma=gamma, zscore=zscore, correction=correction),
          lambda x: dist_reference(x, v.numpy(), tau, beta, gamma, zscore, correction), z)


@BOTH
def test_dists_row_term_is_the_mean_product_of_two_z_scores(zscore):
    """Algorithm 1, 1/K, of the probabilities."""
    z, v = logits(6, 9, seed=3), logits(6, 9, seed=4)
    q, p = ((weighted_zscore(x, 4.0) if zscore else x / 4).softmax(-1) for x in (z, v))
    products = (weighted_zscore(q) * weighted_zscore(p)).mean(-1)
    rho = [np.corrcoef(a, b)[0, 1] for a, b in zip(q.numpy(), p.numpy())]
    np.testing.assert_allclose(products.numpy(), rho, rtol=1e-12)
    ours = dist_loss(z, v, beta=1.0, gamma=0.0, zscore=zscore)
    assert ours.item() == pytest.approx(16 * (1 - np.mean(rho)), rel=1e-12)


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


@BOTH
@pytest.mark.parametrize("rows, k, tau, alpha, beta, correction", [
    (6, 7, 4.0, 1.0, 8.0, 0), (5, 5, 1.0, 1.0, 0.0, 1), (5, 5, 2.0, 0.0, 1.0, 0), (4, 3, 2.0, 1.0, 2.0, 0),
    (3, 2, 1.0, 1.0, 1.0, 0), (1, 6, 2.0, 1.0, 8.0, 0)])
def test_rld_is_the_published_form(rows, k, tau, alpha, beta, correction, zscore):
    z, v, y = logits(rows, k, seed=7).requires_grad_(), logits(rows, k, seed=8), torch.arange(rows) % k
    if zscore and k == 2:
        with pytest.raises(ValueError, match="2 classes"):
            rld_loss(z, v, y)
        return
    if rows > 4:
        y[0], y[1], y[2] = v[0].argmax(), v[1].argmin(), v[2].argsort()[k // 2]
    check(rld_loss(z, v, y, tau, alpha=alpha, beta=beta, zscore=zscore, correction=correction),
          lambda x: rld_reference(x, v.numpy(), y.tolist(), tau, alpha, beta, zscore, correction), z)


@BOTH
def test_rld_is_dkd_where_the_teacher_is_right(zscore):
    v = logits(6, 8, seed=9)
    z, y = logits(6, 8, seed=10).requires_grad_(), v.argmax(-1)
    ours, dkd = (loss(z, v, y, 2.0, zscore=zscore) for loss in (rld_loss, dkd_loss))
    assert ours.item() == pytest.approx(dkd.item(), rel=1e-12)
    assert dkd.item() == pytest.approx(dkd_reference(z.detach().numpy(), v.numpy(), y.numpy(), 2.0, 1.0, 8.0,
                                                     zscore), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (ours, dkd)), rtol=1e-10, atol=1e-14)


@BOTH
def test_rlds_masked_part_is_zero_where_no_class_is_below(zscore):
    z, v = logits(5, 6, seed=11).requires_grad_(), logits(5, 6, seed=12)
    y = v.argmin(-1)
    loss = rld_loss(z, v, y, alpha=0.0, zscore=zscore)
    loss.backward()
    assert loss.item() == 0 and (z.grad == 0).all()
    constant = rld_loss(z, torch.ones(5, 6, dtype=torch.float64), y, alpha=0.0, zscore=zscore)
    assert constant.item() == 0


@BOTH
def test_rld_with_ties_masks_what_is_equal(zscore):
    v = torch.tensor([[2.0, 2.0, 1.0, 0.0, 0.0], [1.0, 3.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 5.0, 5.0]])
    z, v, y = logits(3, 5, seed=13).requires_grad_(), v.double(), torch.tensor([1, 0, 2])
    check(rld_loss(z, v, y, 2.0, zscore=zscore),
          lambda x: rld_reference(x, v.numpy(), y.tolist(), 2.0, 1.0, 8.0, zscore), z)


def views(rows, k, seed):
    """Two views of a student, and of a teacher that is sure of some, of each view's own."""
    z, v, z2, v2 = (logits(rows, k, seed=seed + i, scale=2.0) for i in range(4))
    v[::2] *= 6
    v2[::3] /= 20
    return z.requires_grad_(), v, z2.requires_grad_(), v2


@BOTH
@pytest.mark.parametrize("rows, k, tau, within, across, correction", [
    (6, 7, 4.0, 2.0, 0.5, 0), (7, 7, 2.0, 1.0, 0.0, 1), (5, 9, 1.0, 0.0, 1.0, 0), (1, 6, 4.0, 2.0, 0.5, 0)])
def test_crld_is_the_published_form(rows, k, tau, within, across, correction, zscore):
    z, v, z2, v2 = views(rows, k, seed=20)
    if rows > 1:
        for teacher, least in ((v, 0.9), (v2, 0.2)):
            assert 0 < (teacher.softmax(-1).amax(-1) >= least).sum() < rows
    check(crld_loss(z, v, z2, v2, tau, within=within, across=across, zscore=zscore, correction=correction),
          lambda a, b: crld_reference(a, v.numpy(), b, v2.numpy(), tau, within, across, zscore, correction),
          z, z2)


def test_a_view_of_which_the_teacher_is_unsure_gives_nothing():
    """At T = 1, of the raw logits: 0.9 of the weak view, 0.2 of the strong."""
    z, z2 = logits(1, 10, seed=30), logits(1, 10, seed=31)

    def teacher(p):     # largest probability p
        return torch.tensor([[p] + [(1 - p) / 9] * 9], dtype=torch.float64).log()

    for weak, strong, within, across in ((0.899, 0.201, 0, 1), (0.901, 0.199, 1, 0), (0.8, 0.19, 0, 0)):
        v, v2 = teacher(weak), teacher(strong)
        own = kd_loss(z, v, 4.0) + kd_loss(z2, v2, 4.0)
        other = kd_loss(z2, v, 4.0) + kd_loss(z, v2, 4.0)
        assert crld_loss(z, v, z2, v2).item() == pytest.approx(
            (2 * within * own + 0.5 * across * other).item(), rel=1e-12)


def test_a_teacher_beyond_float32_is_as_sure_as_any():
    z, v, z2, v2 = (x.detach() for x in views(4, 8, seed=35))
    torch.testing.assert_close(crld_loss(z, 1e300 * v, z2, 1e300 * v2), crld_loss(z, 1e3 * v, z2, 1e3 * v2))


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
    z, v, z2, v2 = (x.detach() for x in views(6, 7, seed=34))
    n, y = [x.numpy() for x in (z, v, z2, v2)], [3, 0, 6, 3, 1, 2]
    for ours, reference in (
            (dist_loss(z, v), dist_reference(*n[:2], 4.0, 2.0, 2.0, True)),
            (rld_loss(z, v, torch.tensor(y)), rld_reference(*n[:2], y, 4.0, 1.0, 8.0, True)),
            (crld_loss(z, v, z2, v2), crld_reference(*n, 4.0, 2.0, 0.5, True)),
            (entropy_weight(z, v).sum(), sum(entropy_weight_reference(*n[:2], 3.0)))):
        assert ours.item() == pytest.approx(reference, rel=1e-9)


# ---------------------------------------------------------------- any scale, dtype and compiler


@pytest.mark.parametrize("k, scale, top, tau, zscore", [
    (100, 1e-6, 0, 4, False), (100, 100, 0, 4, False), (32000, 1, 40, 4, False), (32000, 1, 8, 0.5, True)])
def test_dist_keeps_its_digits(k, scale, top, tau, zscore):
    """In float32, where all logits are alike (probabilities of 0.01 + 1e-8), and where one is far above."""
    z, v = (scale * logits(12, k, seed=i, scale=1.0).detach().float() for i in (5, 6))
    z[:, 3] += top
    v[:, 3] += top
    found = []
    for x in (z.requires_grad_(), z.detach().double().requires_grad_()):
        loss = dist_loss(x, v.to(x.dtype), tau, zscore=zscore)
        found.append((loss.item(), torch.autograd.grad(loss, x)[0].double()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert (found[0][1] - found[1][1]).norm() < 1e-3 * found[1][1].norm()



NEWER = {
    "dist": lambda z, v, y, zscore, tau=4.0: dist_loss(z, v, tau, zscore=zscore),
    "rld": lambda z, v, y, zscore, tau=4.0: rld_loss(z, v, y, tau, zscore=zscore),
    "crld": lambda z, v, y, zscore, tau=4.0: crld_loss(z, v, z.flip(0), v.flip(0), tau, zscore=zscore),
    "entropy": lambda z, v, y, zscore, tau=4.0: (
        entropy_weight(z, v) * kd_loss(z, v, tau, zscore=zscore, reduction="none")).mean(),
}
NEWER_LOSSES = pytest.mark.parametrize("name", NEWER)


@BOTH
@NEWER_LOSSES
@pytest.mark.parametrize("scale, dtype", [
    (1e-30, torch.float64), (1e30, torch.float64), (1e-30, torch.float32), (10, torch.float32),
    (30, torch.float32), (100, torch.float32), (1e4, torch.float32), (1e4, torch.float16),
    (1e4, torch.bfloat16)])
def test_the_newer_losses_and_gradients_are_finite_at_any_scale(scale, dtype, name, zscore):
    for rows in (1, 3, 16):
        for tau in (0.1, 1.0, 4.0):
            for seed in range(2):
                z, v = (scale * logits(rows, 16, seed=2 * seed + i, scale=1.0) for i in range(2))
                z, v = z.to(dtype).requires_grad_(), v.to(dtype)
                loss = NEWER[name](z, v, torch.arange(rows), zscore, tau)
                loss.backward()
                assert loss.isfinite() and z.grad.isfinite().all(), (rows, tau, seed)


@BOTH
@NEWER_LOSSES
def test_one_hot_teachers_constant_rows_and_constant_columns_are_finite(name, zscore):
    y, one_hot = torch.arange(4), 50 * torch.eye(8)[[0, 5, 2, 2]]
    rows, columns = logits(4, 8, seed=36, dtype=torch.float32), logits(4, 8, seed=37, dtype=torch.float32)
    rows[1], columns[:, 3] = 0.1, 0.1
    for z in (rows, columns, one_hot, one_hot.flip(0), 1e4 * one_hot, torch.full((4, 8), 0.1)):
        for v in (rows, columns, one_hot, 1e4 * one_hot, torch.full((4, 8), 0.1)):
            z = z.detach().requires_grad_()
            loss = NEWER[name](z, v, y, zscore)
            loss.backward()
            assert loss.isfinite() and z.grad.isfinite().all()
            if zscore:
                assert (z.grad[z.detach().amax(-1) == z.detach().amin(-1)] == 0).all()


@BOTH
@NEWER_LOSSES
def test_the_newer_losses_show_a_nan_or_an_infinity(name, zscore):
    y = torch.arange(4)
    for bad in (NAN, INF):
        for side in (0, 1):
            for row, column in ((2, 5), (2, 2), (0, 0)):      # another class, the target's own
                pair = [logits(4, 8, seed=s, dtype=torch.float32) for s in (38, 39)]
                pair[side][row, column] = bad
                assert NEWER[name](*pair, y, zscore).isnan(), (bad, side, row)


@BOTH
@NEWER_LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_newer_losses_cast_half_precision_up(dtype, name, zscore):
    z, v = (logits(16, 100, seed=s, dtype=torch.float32).to(dtype) for s in (40, 41))
    y = torch.arange(16)
    expected = NEWER[name](z.float(), v.float(), y, zscore)
    ours = NEWER[name](z, v, y, zscore)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(NEWER[name](z, v, y, zscore), expected)
        assert torch.equal(NEWER[name](z.float(), v.float(), y, zscore), expected)
    exact = NEWER[name](z.double(), v.double(), y, zscore)
    assert exact.dtype == torch.float64 and ours.item() == pytest.approx(exact.item(), rel=1e-4)


@BOTH
def test_no_gradient_reaches_the_newer_losses_teacher(zscore):
    z, v = logits(4, 8, seed=42).requires_grad_(), logits(4, 8, seed=43).requires_grad_()
    sum(loss(z, v, torch.arange(4), zscore) for loss in NEWER.values()).backward()
    assert v.grad is None and z.grad.abs().sum() > 0


@BOTH
@NEWER_LOSSES
def test_the_newer_losses_compile_whole_and_map(name, zscore):
    z, v, y = logits(6, 8, seed=44), logits(6, 8, seed=45), torch.arange(6)

    def loss(z, v, y):
        return NEWER[name](z, v, y, zscore)

    if zscore:
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z, v, y), loss(z, v, y))
    stack = [torch.stack([x, x.flip(0)]) for x in (z, 2 * v, y)]
    torch.testing.assert_close(torch.func.vmap(loss)(*stack),
                               torch.stack([loss(*(s[i] for s in stack)) for i in range(2)]))


# ---------------------------------------------------------------- zscore_kd: reduction, weight, ignore_index


SUMS = {        # the losses that are sums over samples
    "kd": lambda z, v, y, zscore, tau=2.0, **how: kd_loss(z, v, tau, zscore=zscore, **how),
    "dkd": lambda z, v, y, zscore, tau=2.0, **how: dkd_loss(z, v, y, tau, zscore=zscore, **how),
    "ttm": lambda z, v, y, zscore, tau=2.0, **how: ttm_loss(z, v, tau, zscore=zscore, **how),
    "wttm": lambda z, v, y, zscore, tau=2.0, **how: wttm_loss(z, v, tau, zscore=zscore, **how),
    "rld": lambda z, v, y, zscore, tau=2.0, **how: rld_loss(z, v, y, tau, zscore=zscore, **how),
}
EACH_SUM = pytest.mark.parametrize("name", SUMS)
HAS_TARGET = pytest.mark.parametrize("name", ["dkd", "rld"])


@BOTH
@EACH_SUM
def test_reduction_none_is_a_loss_for_each_sample(name, zscore):
    loss = SUMS[name]
    for rows in (1, 3, 7, 64, 100):
        for dtype in (torch.float32, torch.float64):
            z, v = (logits(rows, 8, seed=s, dtype=dtype) for s in (50, 51))
            y = torch.arange(rows) % 8
            each = loss(z, v, y, zscore, reduction="none")
            assert each.shape == (rows,) and each.dtype == dtype
            assert torch.equal(each.mean(), loss(z, v, y, zscore))
            assert torch.equal(loss(z, v, y, zscore, reduction="mean"), loss(z, v, y, zscore))
    alone = torch.stack([loss(z[i:i + 1], v[i:i + 1], y[i:i + 1], zscore) for i in range(rows)])
    torch.testing.assert_close(each, alone, rtol=1e-12, atol=1e-14)
    w = torch.rand(rows, dtype=torch.float64)
    torch.testing.assert_close(loss(z, v, y, zscore, reduction="none", weight=w), w * each)


@BOTH
@EACH_SUM
def test_a_weight_is_a_mask_or_a_number_for_each_sample(name, zscore):
    loss, y = SUMS[name], torch.arange(6)
    z, v = logits(6, 8, seed=52).requires_grad_(), logits(6, 8, seed=53)
    keep = torch.tensor([True, False, True, True, False, False])
    expected = loss(z[keep], v[keep], y[keep], zscore)
    gradient, = torch.autograd.grad(expected, z)
    for dtype in (torch.bool, torch.float16, torch.bfloat16, torch.int64, torch.float32, torch.float64):
        ours = loss(z, v, y, zscore, weight=keep.to(dtype))
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(ours, z)[0], gradient, rtol=1e-12, atol=1e-14)
    w = torch.tensor([0.5, 2.0, 0.0, 3.0, 0.25, 1.0], dtype=torch.float64)
    each = loss(z, v, y, zscore, reduction="none")
    ours = loss(z, v, y, zscore, weight=w)
    torch.testing.assert_close(ours, (w * each).sum() / w.sum(), rtol=1e-12, atol=0)
    for factor in (0.01, 7):        # a sum below 1, and above
        torch.testing.assert_close(loss(z, v, y, zscore, weight=factor * w), ours)
    torch.testing.assert_close(loss(z, v, y, zscore, weight=torch.ones(6)), loss(z, v, y, zscore))


@BOTH
@EACH_SUM
def test_weights_of_half_precision_are_summed_in_full(name, zscore):
    """2,049 ones are 2,048 in float16, and 100,000 are infinite."""
    z, v = (logits(1, 4, seed=s, dtype=torch.float32).expand(3000, 4) for s in (54, 55))
    y = torch.ones(3000, dtype=torch.int64)
    ours = SUMS[name](z, v, y, zscore, weight=torch.full((3000,), 40.0, dtype=torch.float16))
    assert ours.item() == pytest.approx(SUMS[name](z, v, y, zscore).item(), rel=1e-5)


@BOTH
@EACH_SUM
def test_weights_that_are_all_zero_give_zero_and_no_gradient(name, zscore):
    z, v, y = logits(4, 8, seed=56).requires_grad_(), logits(4, 8, seed=57), torch.arange(4)
    for weight in (torch.zeros(4), torch.zeros(4, dtype=torch.bool)):
        loss = SUMS[name](z, v, y, zscore, weight=weight)
        assert loss.item() == 0 and (torch.autograd.grad(loss, z)[0] == 0).all()


@BOTH
@EACH_SUM
@pytest.mark.parametrize("shape", [(), (4, 1)])
def test_a_row_of_weight_0_may_hold_anything(name, shape, zscore):
    """Neither the loss nor the gradient of the student or of the temperature sees it."""
    y, weight, keep = torch.arange(4), torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0, 2])
    for bad in (NAN, INF, -INF, 3e38):
        for sides in ((0,), (1,), (0, 1)):
            pair = [logits(4, 8, seed=58), logits(4, 8, seed=59)]
            for side in sides:
                pair[side][1, 1], pair[side][3] = bad, bad
            z, v = pair[0].requires_grad_(), pair[1]
            tau = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
            loss = SUMS[name](z, v, y, zscore, tau, weight=weight)
            loss.backward()
            assert (z.grad[[1, 3]] == 0).all()
            other, other_tau = z.detach()[keep].requires_grad_(), tau.detach().clone().requires_grad_()
            expected = SUMS[name](other, v[keep], y[keep], zscore, other_tau[keep] if shape else other_tau,
                                  weight=weight[keep])
            expected.backward()
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(z.grad[keep], other.grad)
            torch.testing.assert_close(tau.grad, other_tau.grad)
            each = SUMS[name](z, v, y, zscore, weight=weight, reduction="none")
            assert (each[[1, 3]] == 0).all() and each.isfinite().all()
            # where its weight is not 0 it shows
            assert bad == 3e38 or SUMS[name](z, v, y, zscore, weight=weight + 1).isnan()


def test_a_weight_that_is_nan_shows():
    z, v, y = logits(2, 8, seed=60), logits(2, 8, seed=61), torch.arange(2)
    assert all(loss(z, v, y, True, weight=torch.tensor([NAN, 1.0])).isnan() for loss in SUMS.values())


@BOTH
@HAS_TARGET
def test_ignore_index_is_cross_entropys(name, zscore):
    loss = SUMS[name]
    z, v, y = logits(6, 8, seed=62).requires_grad_(), logits(6, 8, seed=63), torch.arange(6)
    keep = torch.tensor([True, False, True, True, False, True])
    expected = loss(z[keep], v[keep], y[keep], zscore)
    gradient, = torch.autograd.grad(expected, z)
    for number, how in ((-100, {}), (-1, {"ignore_index": -1}), (255, {"ignore_index": 255}),
                        (7, {"ignore_index": 7})):
        target = torch.where(keep, y, number)
        ours = loss(z, v, target, zscore, **how)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(ours, z)[0], gradient, rtol=1e-12, atol=1e-14)
        each = loss(z, v, target, zscore, reduction="none", **how)
        assert (each[~keep] == 0).all() and (each[keep] != 0).all()
        w = torch.rand(6, dtype=torch.float64)
        torch.testing.assert_close(loss(z, v, target, zscore, weight=w, **how),
                                   loss(z[keep], v[keep], y[keep], zscore, weight=w[keep]))
        bad = v.clone()
        bad[1] = NAN                                # an ignored row may hold anything
        torch.testing.assert_close(loss(z, bad, target, zscore, **how), expected)
    strange = torch.where(keep, y, 99)              # a row of weight 0 too, its target included
    torch.testing.assert_close(loss(z, bad, strange, zscore, weight=keep), expected)
    none = loss(z, v, torch.full((6,), -100), zscore)
    assert none.item() == 0 and (torch.autograd.grad(none, z)[0] == 0).all()
    ce = F.cross_entropy(z, torch.where(keep, y, -100))     # whose mean is over the same rows
    torch.testing.assert_close(ce, F.cross_entropy(z[keep], y[keep]))


@HAS_TARGET
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_class_numbers_of_other_types_ignore_nothing_else(dtype, name):
    """-100 is 156 in uint8, and 255 is -1 in int8."""
    z, v = logits(3, 200, seed=64), logits(3, 200, seed=65)
    y = torch.tensor([1, 100, 156 if dtype != torch.int8 else 27])
    torch.testing.assert_close(SUMS[name](z, v, y.to(dtype), True), SUMS[name](z, v, y, True))
    if dtype == torch.int8:
        with pytest.raises(ValueError, match="-1 is no class number"):
            SUMS[name](z, v, torch.tensor([1, 2, -1]).to(dtype), True, ignore_index=255)


@HAS_TARGET
def test_any_other_class_number_is_said_or_nan(name):
    loss, z, v = SUMS[name], logits(3, 8, seed=66), logits(3, 8, seed=67)
    for bad, ignored in ((8, -100), (-1, -100), (-100, -1), (10**12, -100)):
        y = torch.tensor([0, bad, 2])
        with pytest.raises(ValueError, match=rf"target {bad} is no class number in \[0, 8\).*{ignored}"):
            loss(z, v, y, True, ignore_index=ignored)

        def free(z, v, y):
            return loss(z, v, y, True, ignore_index=ignored)

        assert torch.func.vmap(free)(*(x[None] for x in (z, v, y))).isnan().all()
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, v, y: loss(z, v, y, True), fullgraph=True, backend="aot_eager")
    assert compiled(z, v, torch.tensor([0, 8, 2])).isnan()
    torch.testing.assert_close(compiled(z, v, torch.tensor([0, -100, 2])),
                               loss(z[[0, 2]], v[[0, 2]], torch.tensor([0, 2]), True))


@BOTH
@HAS_TARGET
def test_mixup_is_two_calls(name, zscore):
    z, v, m = logits(4, 8, seed=68), logits(4, 8, seed=69), 0.3
    a, b = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1, 7, 0])
    ours = m * SUMS[name](z, v, a, zscore) + (1 - m) * SUMS[name](z, v, b, zscore)
    reference = {"dkd": dkd_reference, "rld": rld_reference}[name]
    for_a, for_b = (reference(z.numpy(), v.numpy(), y.numpy(), 2.0, 1.0, 8.0, zscore) for y in (a, b))
    assert ours.item() == pytest.approx(m * for_a + (1 - m) * for_b, rel=1e-9)


@EACH_SUM
def test_weights_compile_whole_and_map(name):
    z, v, y, w = logits(6, 8, seed=70), logits(6, 8, seed=71), torch.arange(6), torch.arange(6.0)
    z[0] = NAN

    def loss(z, v, y, w):
        return SUMS[name](z, v, y, True, weight=w)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert loss(z, v, y, w).isfinite()
    torch.testing.assert_close(compiled(z, v, y, w), loss(z, v, y, w))
    stack = [torch.stack([x, x.flip(0)]) for x in (z, v, y, w)]
    torch.testing.assert_close(torch.func.vmap(loss)(*stack), torch.stack([loss(z, v, y, w)] * 2))


EVERY = {**SUMS, **{name: NEWER[name] for name in ("dist", "crld")}}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 3, 8)], ids=["maps", "tokens"])
def test_the_error_for_maps_and_tokens_names_the_line_that_helps(shape, name):
    x = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    with pytest.raises(ValueError, match=re.escape(str(shape))) as caught:
        EVERY[name](*x, torch.zeros(2).long(), True)
    line = re.search(r"are rows (z\..+)$", str(caught.value))[1]
    z, v = (eval(line, {"z": tensor}) for tensor in x)
    assert z.dim() == 2 and z.shape[1] == 8
    y = torch.arange(len(z)) % 8
    if name in SUMS:
        places = np.ndindex(shape[:1] + (shape[2:] if len(shape) == 4 else shape[1:2]))
        pixels = [[t[place[0], :, place[1], place[2]] if len(shape) == 4 else t[place] for t in x]
                  for place in places]
        assert len(pixels) == len(z)
        alone = [SUMS[name](a[None], b[None], y[i:i + 1], True).item() for i, (a, b) in enumerate(pixels)]
        assert SUMS[name](z, v, y, True).item() == pytest.approx(np.mean(alone), rel=1e-12)
    else:
        assert EVERY[name](z, v, y, True).isfinite()


@EACH_SUM
def test_a_wrong_weight_or_reduction_is_said(name):
    z, v, y = logits(4, 8, seed=72), logits(4, 8, seed=73), torch.arange(4)
    for shape in ((3,), (4, 1), (), (8,)):
        with pytest.raises(ValueError, match=rf"weight must be \(4,\) real .* shape {re.escape(str(shape))}"):
            SUMS[name](z, v, y, True, weight=torch.ones(shape))
    with pytest.raises(ValueError, match="real numbers, got torch.complex64"):
        SUMS[name](z, v, y, True, weight=torch.ones(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"a tensor \(4,\), got a list"):
        SUMS[name](z, v, y, True, weight=[1.0, 0.0, 1.0, 1.0])
    tiny = torch.full((4,), 1e-60, dtype=torch.float64)      # 0 in float32: never a mean of nothing over it
    loss = SUMS[name](z.float(), v.float(), y, True, weight=tiny)
    assert loss.item() == 0
    for reduction in ("sum", "batchmean", None):
        with pytest.raises(ValueError, match=f'"mean" or "none", got {reduction!r}'):
            SUMS[name](z, v, y, True, reduction=reduction)


@pytest.mark.parametrize("error, words, call", [
    (ValueError, r"\(2, 3\) and \(2, 4\)", lambda: dist_loss(torch.rand(2, 3), torch.rand(2, 4))),
    (ValueError, r"\(2, 3\) and \(2, 4\)",
     lambda: rld_loss(torch.rand(2, 3), torch.rand(2, 4), torch.zeros(2).long())),
    (ValueError, r"\(2, 3\) and \(2, 4\)", lambda: entropy_weight(torch.rand(2, 3), torch.rand(2, 4))),
    (ValueError, r"\(4, 3\) and \(2, 3\)|\(2, 3\) and \(4, 3\)",
     lambda: crld_loss(*[torch.rand(4, 3)] * 2, *[torch.rand(2, 3)] * 2)),
    (ValueError, "batch is empty", lambda: dist_loss(torch.rand(0, 3), torch.rand(0, 3))),
    (ValueError, "batch is empty", lambda: crld_loss(*[torch.rand(0, 3)] * 4)),
    (ValueError, "positive number, got 0", lambda: dist_loss(torch.rand(2, 3), torch.rand(2, 3), 0)),
    (ValueError, "positive number, got -1", lambda: crld_loss(*[torch.rand(2, 3)] * 4, -1)),
    (ValueError, "positive number, got 0", lambda: entropy_weight(torch.rand(2, 3), torch.rand(2, 3), 0)),
    (ValueError, "at least 2 classes", lambda: dist_loss(torch.rand(4, 1), torch.rand(4, 1))),
    (TypeError, "int64", lambda: dist_loss(torch.ones(2, 3).long(), torch.rand(2, 3))),
    (TypeError, "int64", lambda: crld_loss(*[torch.ones(2, 3).long()] * 4)),
    (TypeError, "int64", lambda: entropy_weight(torch.rand(2, 3), torch.ones(2, 3).long())),
    (ValueError, "target must be 4 class numbers, got torch.bool",
     lambda: dkd_loss(torch.rand(4, 3), torch.rand(4, 3), torch.zeros(4).bool())),
    (ValueError, "target must be 4 class numbers, got torch.complex64",
     lambda: rld_loss(torch.rand(4, 3), torch.rand(4, 3), torch.zeros(4, dtype=torch.complex64))),
    (ValueError, "target must be 4 class numbers, got torch.float32",
     lambda: rld_loss(torch.rand(4, 3), torch.rand(4, 3), torch.rand(4))),
    (ValueError, "target must be 4 class numbers",
     lambda: rld_loss(torch.rand(4, 3), torch.rand(4, 3), torch.zeros(3).long())),
    (ValueError, r"one number or \(B, 1\), got shape \(4, 1, 1\)",
     lambda: rld_loss(torch.rand(4, 3), torch.rand(4, 3), torch.zeros(4).long(), torch.ones(4, 1, 1))),
])
def test_bad_input_to_the_newer_losses_is_refused_with_the_values(error, words, call):
    with pytest.raises(error, match=words):
        call()


@pytest.fixture(scope="module")
def before():
    """zscore_kd.py as it was before it had weights."""
    done = subprocess.run(["git", "show", "7749f38:zscore_kd.py"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs git and the commit 7749f38")
    module = types.ModuleType("zscore_kd_before")
    exec(compile(done.stdout, "zscore_kd_before.py", "exec"), module.__dict__)
    return module


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_without_the_new_arguments_every_loss_has_the_bits_it_had(before, method, zscore):
    for rows in (1, 3, 7, 64, 100, 257):
        for dtype in (torch.float16, torch.float32, torch.float64):
            data = [logits(rows, 10, seed=s, dtype=torch.float32).to(dtype) for s in (74, 75, 76, 77)]
            y, results = torch.arange(rows) % 10, []
            for function in (distillation_loss, before.distillation_loss):
                z, z2 = (data[i].clone().requires_grad_() for i in (0, 2))
                tau = 2.0
                if method == "ctkd":
                    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
                loss = function(method, z, data[1], y, tau, student_strong=z2, teacher_strong=data[3],
                                zscore=zscore)
                loss.backward()
                learnt = [z] + [z2] * (method == "mlkd") + [tau] * (method == "ctkd")
                results.append([loss, *(x.grad for x in learnt)])
            assert all(torch.equal(a, b) for a, b in zip(*results)), (rows, dtype)


# ---------------------------------------------------------------- large vocabularies


def heads(n, h=6, h_teacher=9, v=40, dtype=torch.float64, seed=80):
    g = torch.Generator().manual_seed(seed)
    make = [torch.randn(s, dtype=torch.float64, generator=g).to(dtype)
            for s in ((n, h), (v, h), (n, h_teacher), (v, h_teacher))]
    return make[0].requires_grad_(), make[1].requires_grad_(), make[2], make[3]


def plain(s, w, t, w_t, tau=1.0, **how):
    """`linear_kd_loss` without chunks."""
    return kd_loss(s @ w.mT, t @ w_t.mT, tau, **how)


@BOTH
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5),
                                              (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("n, chunk", [(13, 4), (12, 4), (5, 256), (1, 1), (7, 1)])
def test_linear_kd_is_kd_of_the_heads_logits(n, chunk, dtype, tolerance, zscore):
    data = heads(n, dtype=dtype)
    mask = torch.arange(n) % 3 != 1
    for tau in (0.5, 2.0):
        for weight in (None, mask, torch.arange(1.0, n + 1), torch.zeros(n)):
            ours = linear_kd_loss(*data, tau, zscore=zscore, weight=weight, chunk=chunk)
            expected = plain(*data, tau, zscore=zscore, weight=weight)
            assert ours.shape == () and ours.dtype == expected.dtype
            assert ours.item() == pytest.approx(expected.item(), rel=max(tolerance / 10, 1e-10), abs=1e-13)
            for a, b in zip(*(torch.autograd.grad(x, data[:2]) for x in (ours, expected))):
                assert a.dtype == dtype
                assert (a - b).abs().max() <= tolerance * b.abs().max() + 1e-14
    assert ours.item() == 0                         # the weights that are all 0


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
    student_frozen = linear_kd_loss(s.detach(), w.detach(), t, w_t, chunk=4)
    assert not student_frozen.requires_grad


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


def test_linear_kd_carries_a_gradient_to_a_tensor_temperature():
    data, taus = heads(9), [torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    linear_kd_loss(*data, taus[0], chunk=4).backward()
    plain(*data, taus[1]).backward()
    torch.testing.assert_close(taus[0].grad, taus[1].grad)


def test_a_token_of_weight_0_may_hold_anything():
    """Neither the loss nor the gradient of the hidden states or of the head's weight sees it."""
    s, w, t, w_t = heads(5)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    expected = plain(s, w, t, w_t, weight=weight)
    gradients = torch.autograd.grad(expected, (s, w))
    for bad in (NAN, INF):
        hidden, teacher = s.detach().clone(), t.clone()
        hidden[1], teacher[4] = bad, bad
        ours = linear_kd_loss(hidden.requires_grad_(), w, teacher, w_t, weight=weight, chunk=2)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, (hidden, w)), gradients)
        assert linear_kd_loss(hidden, w, t, w_t, chunk=2).isnan()


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


def test_linear_kd_keeps_nothing_of_a_vocabularys_width():
    """What stands between the forward and the backward pass: no tensor of V columns at all."""
    saved = []
    data = heads(32, v=3000, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        loss = linear_kd_loss(*data, chunk=8)
    assert all(3000 not in shape or shape in ((3000, 6), (3000, 9)) for shape in saved)
    with Watch(3000) as watch:          # the forward pass alone: it ends with nothing of that width alive
        loss = linear_kd_loss(*data, chunk=8)
    given = {x.untyped_storage().data_ptr() for x in data}
    alive = [size for key, (ref, size) in watch.alive.items() if not ref.expired() and key not in given]
    assert loss.requires_grad and sum(alive) < 3000 * 4


@pytest.mark.parametrize("words, change", [
    (r"\(5, 6\) and \(40, 7\)", {1: torch.rand(40, 7)}),
    (r"\(5, 9\) and \(40, 8\)", {3: torch.rand(40, 8)}),
    (r"\(5, 2, 6\) and \(40, 6\)", {0: torch.rand(5, 2, 6)}),
    (r"\(6,\) and \(40, 6\)", {0: torch.rand(6)}),
    ("5 student's and 4 teacher's tokens", {2: torch.rand(4, 9)}),
    ("0 student's and 0 teacher's tokens", {0: torch.rand(0, 6), 2: torch.rand(0, 9)}),
    (r"one shape.*\(5, 40\) and \(5, 41\)", {3: torch.rand(41, 9)}),
    ("chunk must .* got 0", {"chunk": 0}), ("got -1", {"chunk": -1}), ("got 2.5", {"chunk": 2.5}),
    (r"weight must be \(5,\) .* shape \(4,\)", {"weight": torch.ones(4)}),
    (r"weight must be \(5,\) .* shape \(5, 1\)", {"weight": torch.ones(5, 1)}),
    (r"weight must be a tensor \(5,\), got a list", {"weight": [1.0] * 5}),
    ("float32 and torch.bfloat16", {1: torch.rand(40, 6).bfloat16()}),
    (r"rows h.flatten\(0, 1\)", {0: torch.rand(5, 2, 6)}),
    ("positive number, got 0", {"base_temp": 0}),
    # a temperature for each token would be cut with no chunk, or be one chunk's for all
    (r"one number, got shape \(5, 1\)", {"base_temp": torch.ones(5, 1), "chunk": 2}),
    (r"\(2, 1\)", {"base_temp": torch.ones(2, 1), "chunk": 2, 0: torch.rand(4, 6), 2: torch.rand(4, 9)}),
])
def test_linear_kd_refuses_with_the_values(words, change):
    data = list(heads(5, dtype=torch.float32))
    for key, value in change.items():
        if isinstance(key, int):
            data[key] = value
    with pytest.raises(ValueError, match=words):
        linear_kd_loss(*data, **{key: value for key, value in change.items() if isinstance(key, str)})


# ---------------------------------------------------------------- tau by the number of classes


@pytest.mark.parametrize("k, deviations, top", [
    (100, 8, (1.00, 1.00, 0.80, 0.18)), (1000, 8, (1.00, 1.00, 0.60, 0.041)),
    (10000, 8, (1.00, 0.99, 0.15, 0.0047)), (32000, 8, (1.00, 0.97, 0.053, 0.0015)),
    (128256, 8, (1.00, 0.90, 0.014, 0.00038)),
    (128256, 12, (1.00, 1.00, 0.43, 0.0028))])
def test_the_teachers_top_probability_of_a_real_shaped_row(k, deviations, top):
    """One logit so many deviations out of a Gaussian's: what Z leaves of it, at tau 0.25, 0.5, 1 and 2."""
    row = torch.special.ndtri((torch.arange(k, dtype=torch.float64) - 0.5) / (k - 1))
    row[0] = deviations
    for tau, expected in zip((0.25, 0.5, 1.0, 2.0), top):
        p = weighted_zscore(row, tau).softmax(-1)[0].item()
        assert f"{p:.1e}" == f"{expected:.1e}", tau
        # in closed form: the mean of exp(x / tau) of a Gaussian is exp(1 / 2 tau^2)
        sigma = (1 + deviations**2 / k) ** 0.5 * tau
        mean = np.exp(deviations / sigma) / (np.exp(deviations / sigma) + k * np.exp(0.5 / sigma**2))
        assert p == pytest.approx(mean, rel=0.05), tau
    if deviations == 8:
        lines = [line.split() for line in zscore_kd.__doc__.splitlines()]
        assert [float(x) for x in [line for line in lines if line[:1] == [str(k)]][-1][1:]] == list(top)


# ---------------------------------------------------------------- by their names, as the scripts call them


@pytest.mark.parametrize("zscore", [False, True])
def test_the_newer_methods_by_name(zscore):
    """A swapped argument would be another method under the right name."""
    torch.manual_seed(0)
    z, v = (torch.randn(6, 9, dtype=torch.float64) for _ in range(2))
    y = torch.arange(6)
    call = functools.partial(logit_kd.distillation_loss, zscore=zscore)
    assert torch.equal(call("dist", z, v, y, 3.0, beta=1.5, gamma=0.5),
                       dist_loss(z, v, 3.0, beta=1.5, gamma=0.5, zscore=zscore))
    assert torch.equal(call("rld", z, v, y, 3.0, alpha=0.5, beta=2.0),
                       rld_loss(z, v, y, 3.0, alpha=0.5, beta=2.0, zscore=zscore))
    for method in METHODS:
        views = {"student_strong": z + 1, "teacher_strong": v * 2} if method == "mlkd" else {}
        assert torch.equal(call(method, z, v, y, 3.0, **views),
                           distillation_loss(method, z, v, y, 3.0, zscore=zscore, **views))
    for method in ("kd", "dkd", "ttm", "rld"):
        for temp in (None, 2.0):
            each = call(method, z, v, y, 3.0, entropy_temp=temp, reduction="none")
            assert each.shape == (6,)
            assert torch.equal(each.mean(), call(method, z, v, y, 3.0, entropy_temp=temp))


@pytest.mark.parametrize("method", ["kd", "ctkd", "dkd", "ttm", "wttm", "rld"])
def test_weights_and_ignored_targets_reach_the_method(method):
    z, v, y = logits(6, 9, seed=1), logits(6, 9, seed=2), torch.tensor([0, 3, 7, 1, 8, 5])
    call, rows = functools.partial(logit_kd.distillation_loss, method), torch.tensor([0, 2, 3, 5])
    w = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    expected = call(z[rows], v[rows], y[rows])
    torch.testing.assert_close(call(z, v, y, weight=w), expected)
    if method in ("dkd", "rld"):
        ignored = torch.where(w > 0, y, 255)
        torch.testing.assert_close(call(z, v, ignored, ignore_index=255), expected)
        # EA-KD's mean is over all rows; one that is ignored may hold anything
        torn = torch.where(w[:, None] > 0, z, NAN).requires_grad_()
        ours = call(torn, v, ignored, ignore_index=255, entropy_temp=3.0)
        torch.testing.assert_close(ours, call(z[rows], v[rows], y[rows], entropy_temp=3.0) * 4 / 6)
        assert torch.autograd.grad(ours, torn)[0].isfinite().all()


def test_entropy_weights_go_with_a_mask_as_the_docstring_says():
    z, v, m = logits(6, 9, seed=3), logits(6, 9, seed=4), torch.arange(6) != 2
    torn = torch.where(m[:, None], z, NAN)
    ours = kd_loss(torn, v, weight=entropy_weight(torn, v).where(m, 0), reduction="none")
    assert ours[2] == 0
    torch.testing.assert_close(ours[m], entropy_weight(z, v)[m] * kd_loss(z, v, reduction="none")[m])


@pytest.mark.parametrize("error, words, method, more", [
    (TypeError, "leave weight out", "kd", {"entropy_temp": 3.0, "weight": torch.ones(6)}),
    (ValueError, "unknown method 'ddd'; known: kd, .*, dist, rld", "ddd", {}),
    (TypeError, "'dist' has no loss of a sample", "dist", {"entropy_temp": 3.0}),
    (TypeError, "'dist' has no loss of a sample", "dist", {"reduction": "none"}),
    (TypeError, "'mlkd' has no loss of a sample", "mlkd", {"reduction": "none", "student_strong": 1,
                                                          "teacher_strong": 1}),
    (TypeError, "'mlkd' needs teacher_strong", "mlkd", {"entropy_temp": 3.0, "student_strong": 1}),
    (TypeError, "'rld' needs target", "rld", {}),
    (TypeError, "unexpected keyword argument 'betta'", "dist", {"betta": 3.0}),
    (TypeError, "unexpected keyword argument 'gamma'", "rld", {"target": torch.arange(6), "gamma": 3.0}),
    (TypeError, "unexpected keyword argument 'gamma'", "kd", {"gamma": 3.0}),
    (ValueError, "positive number, got 0", "kd", {"entropy_temp": 0.0}),
    (ValueError, '"mean" or "none", got \'sum\'', "kd", {"entropy_temp": 2.0, "reduction": "sum"}),
])
def test_what_a_method_does_not_take_is_said(error, words, method, more):
    z, more = torch.randn(6, 9), {"target": None} | more
    with pytest.raises(error, match=words):
        logit_kd.distillation_loss(method, z, z, base_temp=3.0, **more)


DIST = {"method": "dist", "beta": 1.5, "gamma": 0.5}
RLD = {"method": "rld", "alpha": 0.5, "beta": 2.0}
EA = {"entropy_temp": 2.0}


@pytest.mark.parametrize("zscore", [False, True])
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
        expected = zscore_kd.mlkd_loss(z, v, z2, v2, 3.0, zscore_relations=False, kl_weights=(w, w2), **how)
    else:
        each = {"rld": lambda: rld_loss(z, v, y, 3.0, alpha=0.5, beta=2.0, reduction="none", **how),
                "kd": lambda: kd_loss(z, v, 3.0, reduction="none", **how),
                "dkd": lambda: dkd_loss(z, v, y, 3.0, reduction="none", **how)}[method]()
        expected = (w * each if "entropy_temp" in recipe else each).mean()
    assert kd.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx((ce + 2 * kd).item(), rel=1e-6)


@pytest.mark.parametrize("method", ["kd", "ctkd", "dkd", "ttm", "wttm", "rld"])
def test_entropy_weights_multiply_the_losses_of_the_samples(method):
    """EA-KD's mean is over the batch, not over its weights; they come from the raw logits."""
    torch.manual_seed(0)
    z, v = (torch.randn(6, 9, dtype=torch.float64) for _ in range(2))
    y = torch.arange(6)
    weights = entropy_weight(z, v, 2.0)
    each = [logit_kd.distillation_loss(method, z[i:i + 1], v[i:i + 1], y[i:i + 1], 3.0, zscore=True)
            for i in range(6)]
    loss = logit_kd.distillation_loss(method, z, v, y, 3.0, zscore=True, entropy_temp=2.0)
    assert loss.item() == pytest.approx((weights * torch.stack(each)).mean().item(), rel=1e-12)


@pytest.mark.parametrize("zscore", [False, True])
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

    ours, plain = (logit_kd.distillation_loss("mlkd", z, v, None, 2.0, zscore=zscore, student_strong=z2,
                                              teacher_strong=v2, entropy_temp=t) for t in (3.0, None))
    one = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(ours - plain, terms(weak, strong) - terms(one, one), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weak, strong)
