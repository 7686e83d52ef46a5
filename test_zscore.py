"""The mathematics of zscore_kd.py, against references from the paper's equations in numpy and float64."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import zscore_kd
from zscore_kd import (CurriculumTemperature, dkd_loss, kd_loss, mlkd_loss, ttm_loss, weighted_zscore,
                       wttm_loss)

# A sample of the numbers of classes, temperatures, corrections and zscore or not.
SAMPLE = pytest.mark.parametrize("k, tau, correction, zscore", [
    (3, 1.0, 0, True), (3, 4.0, 1, True), (10, 2.0, 1, True), (10, 4.0, 0, False), (100, 2.0, 0, True),
    (100, 1.0, 0, False), (1000, 4.0, 0, True), (1000, 1.0, 1, True)])
NAN, INF = float("nan"), float("inf")


# The references take complex numbers: the gradient of an analytic f is Im f(x + ih) / h, exact to rounding.


def z_reference(x, tau, correction=0):
    """Algorithm 1 for one row."""
    k = len(x)
    mean = sum(x) / k
    sigma = np.sqrt(sum((value - mean) ** 2 for value in x) / (k - correction))
    return (x - mean) / sigma / tau


def softmax_reference(x):
    e = np.exp(x - x.real.max())
    return e / e.sum()


def soft_reference(x, tau, zscore, correction):
    return softmax_reference(z_reference(x, tau, correction) if zscore else x / tau)


def kl_reference(p, q):
    return np.sum(p * (np.log(p) - np.log(q)))


def kd_reference(z, v, tau, zscore=True, correction=0):
    """Algorithm 2's KD term: the mean over rows of tau^2 KL(q(v) || q(z))."""
    return sum(tau**2 * kl_reference(soft_reference(t, tau, zscore, correction),
                                     soft_reference(s, tau, zscore, correction))
               for s, t in zip(z, v)) / len(z)


def dkd_reference(z, v, target, tau, alpha, beta, zscore, correction=0):
    """Decoupled KD, as published: two-way KL of the target class, KL among the others, renormalised."""
    total = 0
    for s, t, y in zip(z, v, target):
        p, q = soft_reference(t, tau, zscore, correction), soft_reference(s, tau, zscore, correction)
        others = np.arange(len(p)) != y
        p_rest, q_rest = p[others].sum(), q[others].sum()
        tckd = p[y] * np.log(p[y] / q[y]) + p_rest * np.log(p_rest / q_rest)
        total += tau**2 * (alpha * tckd + beta * kl_reference(p[others] / p_rest, q[others] / q_rest))
    return total / len(z)


def mlkd_reference(z, v, z_strong, v_strong, tau, zscore, zscore_relations, correction=0):
    """The executed loss, term by term: the masks of its authors' code are applied as the means they are."""
    total = 0
    for i, t in enumerate((tau, 3, 5, 2, 6)):
        weak, strong = (kd_reference(a, b, t, zscore, correction) for a, b in ((z, v), (z_strong, v_strong)))
        total += weak / 2 + (strong if i < 3 else weak)
        p, q = (np.stack([soft_reference(row, t, zscore and zscore_relations, correction) for row in x])
                for x in (v, z))
        classes = np.sum((np.einsum("bi,bj->ij", p, p) - np.einsum("bi,bj->ij", q, q)) ** 2) / p.shape[1]
        batch = np.sum((np.einsum("ik,jk->ij", p, p) - np.einsum("ik,jk->ij", q, q)) ** 2) / p.shape[0]
        total += classes / 2 + batch / 2
    return total


def ttm_reference(z, v, temperature, zscore, weighted, correction=0):
    """The power transform of the second paper: p^gamma renormalised, gamma = 1 / T; the weight is its sum."""
    total = 0
    for s, t in zip(z, v):
        power = soft_reference(t, 1.0, zscore, correction) ** (1 / temperature)
        weight = power.sum() if weighted else 1.0
        total += weight * kl_reference(power / power.sum(), soft_reference(s, 1.0, zscore, correction))
    return total / len(z)


def check(ours, reference, z):
    """Value to 1e-9 and gradient to 1e-7, relative; the gradient at some entries, by complex steps."""
    ours.backward()
    x = z.detach().numpy()
    assert ours.item() == pytest.approx(reference(x), rel=1e-9, abs=1e-13)
    scale = z.grad.abs().max().item()
    for i, j in ((0, 0), (0, 1), (1, 2 % x.shape[1]), (x.shape[0] - 1, x.shape[1] - 1)):
        stepped = x.astype(complex)
        stepped[i, j] += 1e-30j
        assert z.grad[i, j].item() == pytest.approx(reference(stepped).imag / 1e-30, rel=1e-7,
                                                    abs=1e-9 * scale + 1e-14)


def logits(rows, k, seed, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(rows, k, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("k, tau, correction", [(2, 1.0, 0), (2, 4.0, 1), (3, 2.0, 0), (10, 1.0, 1),
                                                (100, 2.0, 0), (1000, 4.0, 1)])
def test_zscore_is_algorithm_1(k, tau, correction):
    x = logits(5, k, seed=k)
    ours = weighted_zscore(x, tau, correction=correction)
    expected = [z_reference(row, tau, correction) for row in x.numpy()]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)
    assert torch.equal(weighted_zscore(x), weighted_zscore(x, 1.0, correction=0))


@pytest.mark.parametrize("k", [2, 10, 100, 1000])
def test_zscore_properties_of_the_paper(k):
    x, tau = logits(7, k, seed=1), 2.0
    z = weighted_zscore(x, tau)
    torch.testing.assert_close(z.mean(-1), torch.zeros(7, dtype=torch.float64))             # zero mean
    torch.testing.assert_close(z.std(-1, correction=0), torch.full((7,), 1 / tau, dtype=torch.float64))
    assert torch.equal(z.argsort(-1), x.argsort(-1))                                        # monotone
    assert z.abs().max() <= (k - 1) ** 0.5 / tau + 1e-12                                    # bounded
    one_hot = weighted_zscore(F.one_hot(torch.tensor([1]), k).double(), tau)
    torch.testing.assert_close(one_hot[0, 1].item(), (k - 1) ** 0.5 / tau)                  # ... and reached


def test_zscore_of_any_leading_shape_and_of_one_vector():
    x = logits(6, 9, seed=2)
    whole = weighted_zscore(x, 2.0)
    assert torch.equal(weighted_zscore(x.view(2, 3, 9), 2.0).view(6, 9), whole)
    assert torch.equal(weighted_zscore(x[4], 2.0), whole[4])
    torch.testing.assert_close(weighted_zscore(x.t().contiguous().t(), 2.0), whole)     # not contiguous
    taus = torch.arange(1.0, 7.0).double()[:, None]
    torch.testing.assert_close(weighted_zscore(x, taus) * taus, weighted_zscore(x))


@pytest.mark.parametrize("k, value", [(7, 0.0), (7, 0.1), (1000, 0.1), (100, 1e4), (1000, -3e38)])
def test_a_constant_row_is_zero_with_no_gradient(k, value):
    x = torch.full((2, k), value, requires_grad=True)
    z = weighted_zscore(x, 2.0)
    (z * torch.arange(k)).sum().backward()
    assert (z == 0).all() and (x.grad == 0).all()


@pytest.mark.parametrize("offset, scale", [(0, 1e4), (0, 1e-4), (1e4, 1.0), (0, 1e25), (0, 1e-25),
                                           (1e6, 1.0)])
def test_zscore_keeps_its_digits_in_float32(offset, scale):
    x = (offset + scale * logits(4, 100, seed=5)).float()
    expected = np.stack([z_reference(row, 2.0) for row in x.double().numpy()])
    np.testing.assert_allclose(weighted_zscore(x, 2.0).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("bad", [[NAN, 0, 1], [INF, 0, 1], [INF] * 3, [NAN] * 3])
def test_a_nan_or_infinite_row_is_nan_and_the_other_rows_are_not(bad):
    z = weighted_zscore(torch.tensor([bad, [0.0, 1.0, 3.0]]))
    assert z[0].isnan().all() and z[1].isfinite().all()


def test_ties_and_a_row_that_is_nearly_constant():
    row = torch.full((1, 7), 1e4)
    row[0, 3] += 2**-10             # the smallest step of float32 at 10,000
    torch.testing.assert_close(weighted_zscore(row), weighted_zscore(F.one_hot(torch.tensor([3]), 7).float()))
    assert kd_loss(torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]]), row).isfinite()


# ---------------------------------------------------------------- Algorithm 2


@SAMPLE
def test_kd_loss_and_gradient_are_algorithm_2(k, tau, correction, zscore):
    z, v = logits(4, k, seed=6).requires_grad_(), logits(4, k, seed=7)
    check(kd_loss(z, v, tau, zscore=zscore, correction=correction),
          lambda x: kd_reference(x, v.numpy(), tau, zscore, correction), z)


def test_the_papers_toy_case():
    """With a shared temperature the student that is wrong has the lower KL; with Z the one that is right."""
    teacher = torch.tensor([[1.0, 2.0, 3.0]])
    near_but_wrong = torch.tensor([[1.4, 2.4, 2.2]])        # its largest logit is at class 1, not 2
    far_but_right = torch.tensor([[3.0, 6.0, 9.0]])         # the teacher's relations, three times as wide
    plain = [kd_loss(s, teacher, 1.0, zscore=False).item() for s in (near_but_wrong, far_but_right)]
    standard = [kd_loss(s, teacher, 1.0).item() for s in (near_but_wrong, far_but_right)]
    assert plain[0] < plain[1]
    assert standard[0] > standard[1] == pytest.approx(0.0, abs=1e-6)


def test_no_gradient_to_the_teacher_but_one_to_a_tensor_temperature():
    z, v = logits(4, 10, seed=20).requires_grad_(), logits(4, 10, seed=21).requires_grad_()
    temp = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    kd_loss(z, v, temp, zscore=False).backward()
    assert v.grad is None and z.grad is not None
    step = 1e-6
    up, down = (kd_reference(z.detach().numpy(), v.detach().numpy(), 2.0 + s, zscore=False)
                for s in (step, -step))
    assert temp.grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-6)


# ---------------------------------------------------------------- the methods that use it


@SAMPLE
def test_dkd_is_the_published_form(k, tau, correction, zscore):
    v, y = logits(4, k, seed=31), torch.arange(4) % k
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (1.0, 8.0)):
        z = logits(4, k, seed=30).requires_grad_()
        check(dkd_loss(z, v, y, tau, alpha=alpha, beta=beta, zscore=zscore, correction=correction),
              lambda x: dkd_reference(x, v.numpy(), y.numpy(), tau, alpha, beta, zscore, correction), z)


@SAMPLE
def test_mlkd_is_the_executed_loss(k, tau, correction, zscore):
    z, v, z2, v2 = (logits(4, k, seed=s) for s in (32, 33, 34, 35))
    zscore_relations = k != 10
    z.requires_grad_()
    z2.requires_grad_()
    keep = z2.detach().numpy()
    ours = mlkd_loss(z, v, z2, v2, tau, zscore=zscore, zscore_relations=zscore_relations,
                     correction=correction)
    check(ours, lambda x: mlkd_reference(x, v.numpy(), keep, v2.numpy(), tau, zscore, zscore_relations,
                                         correction), z)
    z2.grad = None
    ours = mlkd_loss(z.detach(), v, z2, v2, tau, zscore=zscore, zscore_relations=zscore_relations,
                     correction=correction)
    keep_weak = z.detach().numpy()
    check(ours, lambda x: mlkd_reference(keep_weak, v.numpy(), x, v2.numpy(), tau, zscore, zscore_relations,
                                         correction), z2)


@SAMPLE
def test_ttm_and_wttm_are_the_second_papers(k, tau, correction, zscore):
    v = logits(4, k, seed=37)
    for loss, weighted in ((ttm_loss, False), (wttm_loss, True)):
        z = logits(4, k, seed=36).requires_grad_()
        check(loss(z, v, tau, zscore=zscore, correction=correction),
              lambda x: ttm_reference(x, v.numpy(), tau, zscore, weighted, correction), z)


def test_every_default_argument():
    z, v, z2, v2 = (logits(4, 10, seed=s) for s in (38, 39, 40, 41))
    n, y = [x.numpy() for x in (z, v, z2, v2)], torch.tensor([3, 0, 9, 3])
    for ours, reference in (
            (kd_loss(z, v), kd_reference(*n[:2], 2.0)),
            (dkd_loss(z, v, y), dkd_reference(*n[:2], y.numpy(), 2.0, 1.0, 8.0, True)),
            (mlkd_loss(z, v, z2, v2), mlkd_reference(*n, 2.0, True, True)),
            (ttm_loss(z, v), ttm_reference(*n[:2], 4.0, False, False)),
            (wttm_loss(z, v), ttm_reference(*n[:2], 4.0, False, True))):
        assert ours.item() == pytest.approx(reference, rel=1e-9)


def test_a_temperature_for_each_sample():
    z, v, temp = (logits(4, 10, seed=107), logits(4, 10, seed=108),
                  torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64))
    rows = [kd_loss(z[i:i + 1], v[i:i + 1], temp[i].item()) for i in range(4)]
    torch.testing.assert_close(kd_loss(z, v, temp), sum(rows) / 4)


def test_the_temperatures_gradient_survives_float32():
    """CTKD learns from it alone, at T = 15.6: without care it is mostly rounding there."""
    for seed in range(8):
        z, v = logits(64, 100, seed=120 + seed), logits(64, 100, seed=140 + seed)
        gradients = []
        for dtype in (torch.float64, torch.float32):
            temp = torch.tensor(15.6, dtype=dtype, requires_grad=True)
            kd_loss(z.to(dtype), v.to(dtype), temp).backward()
            gradients.append(temp.grad.item())
        assert gradients[1] == pytest.approx(gradients[0], rel=0.01)


def test_dkd_keeps_its_digits_when_the_target_dominates():
    z, v, y = logits(8, 100, seed=160), logits(8, 100, seed=161), torch.arange(8)
    for gap, alpha, beta in ((30.0, 1.0, 0.0), (1e4, 0.0, 1.0)):
        large = [(x + gap * F.one_hot(y, 100)).float() for x in (z, v)]
        exact = dkd_loss(*(x.double() for x in large), y, 1.0, alpha=alpha, beta=beta, zscore=False)
        ours = dkd_loss(*large, y, 1.0, alpha=alpha, beta=beta, zscore=False)
        assert ours.item() == pytest.approx(exact.item(), rel=1e-4)


def test_curriculum_temperature_is_an_adversary():
    """T = start + span sigmoid(g), g = 1 at first; what reaches g is -reversal times the gradient."""
    temperature, z, v = CurriculumTemperature(), logits(4, 10, seed=109), logits(4, 10, seed=110)
    assert temperature(0.5).item() == pytest.approx(1 + 20 / (1 + np.exp(-1)), rel=1e-6)
    assert CurriculumTemperature(2.0, 40.0)(0.0).item() == pytest.approx(31.2423, abs=1e-4)
    gradients = []
    for reversal in (-1.0, 0.0, 0.5, 1.0):      # -1: no reversal, as a scale
        temperature.g.grad = None
        kd_loss(z, v, temperature(reversal), zscore=False).backward()
        gradients.append(temperature.g.grad.item())
    t = 1 + 20 / (1 + np.exp(-1))
    slope = (kd_reference(z.numpy(), v.numpy(), t + 1e-6, False)
             - kd_reference(z.numpy(), v.numpy(), t - 1e-6, False)) / 2e-6
    s = 1 / (1 + np.exp(-1))
    assert gradients[0] == pytest.approx(slope * 20 * s * (1 - s), rel=1e-4)
    assert gradients[1:] == pytest.approx([0.0, -0.5 * gradients[0], -gradients[0]], rel=1e-5)
    assert [name for name, _ in temperature.named_parameters()] == ["g"]


def test_curriculum_temperature_keeps_its_range():
    """Loaded into a module made with other values it was another temperature, silently."""
    saved = CurriculumTemperature(2.0, 40.0).state_dict()
    other = CurriculumTemperature()
    other.load_state_dict(saved)
    assert other(0.0).item() == pytest.approx(31.2423, abs=1e-4)
    other = CurriculumTemperature(2.0, 40.0)
    other.load_state_dict({"g": torch.tensor(0.0)})         # an older file
    assert other(0.0).item() == 22.0


def test_readmes_first_snippet_runs_as_printed():
    readme = Path(__file__).with_name("README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0]
    names = {"teacher": torch.nn.Flatten(), "student": torch.nn.Linear(4, 4), "images": torch.rand(3, 4),
             "target": torch.arange(3)}
    exec(snippet, names)
    expected = (0.1 * F.cross_entropy(names["student_logits"], names["target"])
                + 9 * kd_loss(names["student_logits"], names["images"]))
    assert names["loss"].item() == pytest.approx(expected.item()) and names["loss"].requires_grad


def test_the_docstrings_table_of_ceilings():
    for k in (2, 10, 100, 1000):
        line = next(line for line in zscore_kd.__doc__.splitlines() if line.split()[:1] == [str(k)])
        row = F.one_hot(torch.tensor(0), k).double()
        tops = [F.softmax(weighted_zscore(row, tau), -1).max().item() for tau in (1, 2, 4)]
        assert line.split()[1:4] == [f"{top:.3f}" for top in tops]


# ---------------------------------------------------------------- what is refused, and how it says so


def pair(*shape):
    return torch.rand(*shape), torch.rand(*shape)


@pytest.mark.parametrize("error, words, call", [
    (ValueError, r"\(2, 3\) and \(2, 4\)", lambda: kd_loss(torch.rand(2, 3), torch.rand(2, 4))),
    (ValueError, r"one shape \(B, K\)", lambda: kd_loss(*pair(2, 8, 4, 4))),
    (ValueError, r"1 row .* \(0, 3\)", lambda: kd_loss(*pair(0, 3))),
    (ValueError, r"2 classes, got \(4, 1\)", lambda: kd_loss(*pair(4, 1))),
    (ValueError, r"3 classes, got \(4, 2\)", lambda: dkd_loss(*pair(4, 2), torch.zeros(4).long())),
    (TypeError, "int64", lambda: kd_loss(torch.ones(2, 3).long(), torch.rand(2, 3))),
    (ValueError, "positive number, got -1", lambda: weighted_zscore(torch.rand(2, 3), -1)),
    (ValueError, "positive number, got nan", lambda: ttm_loss(*pair(2, 3), NAN)),
    (ValueError, r"\(\) or \(B, 1\), got \(4,\)", lambda: kd_loss(*pair(4, 4), torch.ones(4))),
    (ValueError, r"4 classes .* got \(3,\)", lambda: dkd_loss(*pair(4, 3), torch.zeros(3).long())),
    (ValueError, r"in \[0, 3\), got \(4,\) from 0 to 3", lambda: dkd_loss(*pair(4, 3), torch.arange(4))),
    (ValueError, r"in \[0, 3\), got \(2,\) from -100 to 1; to leave",
     lambda: dkd_loss(*pair(2, 3), torch.tensor([1, -100]))),
    (ValueError, "2 classes need zscore=False", lambda: kd_loss(*pair(4, 2))),
])
def test_bad_input_is_refused_with_the_values(error, words, call):
    with pytest.raises(error, match=words) as caught:
        call()
    assert len(str(caught.value)) < 130


def test_the_files_work_where_they_are_copied_to(tmp_path):
    """zscore_kd.py in a folder of its own; both files in a package."""
    package = tmp_path / "package"
    package.mkdir()
    for name, folder in (("zscore_kd.py", tmp_path), ("zscore_kd.py", package), ("logit_kd.py", package)):
        shutil.copy(Path(__file__).with_name(name), folder)
    code = """
import torch
import zscore_kd
import package.logit_kd as logit_kd
x = torch.eye(3)
print(zscore_kd.kd_loss(x, x).item(), zscore_kd.__file__)
print(logit_kd.distillation_loss("kd", [x], [x], None).item(), logit_kd.kd_loss.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          check=True)
    assert done.stdout.split() == ["0.0", str(tmp_path / "zscore_kd.py"), "0.0", "package.zscore_kd"]
