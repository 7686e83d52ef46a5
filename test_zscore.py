"""The mathematics of zscore_kd.py, against references written from the paper's equations in numpy and float64."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zscore_kd import distillation_loss, kd_loss, weighted_zscore

K_TAU_CORRECTION = [(k, tau, c) for k in (2, 3, 10, 100, 1000) for tau in (1.0, 2.0, 4.0) for c in (0, 1)]


def z_reference(x, tau, correction=0):
    """Algorithm 1 for one row."""
    k = len(x)
    mean = sum(x) / k
    sigma = np.sqrt(sum((value - mean) ** 2 for value in x) / (k - correction))
    return (x - mean) / sigma / tau


def softmax_reference(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kd_reference(z, v, tau, zscore=True, correction=0):
    """Algorithm 2's KD term: the mean over rows of tau^2 KL(q(v) || q(z))."""
    total = 0.0
    for student, teacher in zip(z, v):
        if zscore:
            student, teacher = z_reference(student, tau, correction), z_reference(teacher, tau, correction)
        else:
            student, teacher = student / tau, teacher / tau
        p, q = softmax_reference(teacher), softmax_reference(student)
        total += tau**2 * np.sum(p * (np.log(p) - np.log(q)))
    return total / len(z)


def numeric_gradient(f, x, rows=2, columns=5, step=1e-5):
    """Central differences of f at some entries of x."""
    gradient = {}
    for i in range(min(rows, x.shape[0])):
        for j in range(min(columns, x.shape[1])):
            up, down = x.copy(), x.copy()
            up[i, j] += step
            down[i, j] -= step
            gradient[i, j] = (f(up) - f(down)) / (2 * step)
    return gradient


def logits(rows, k, seed, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(rows, k, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("k, tau, correction", K_TAU_CORRECTION)
def test_zscore_is_algorithm_1(k, tau, correction):
    x = logits(5, k, seed=k)
    ours = weighted_zscore(x, tau, correction=correction)
    for row, ours_row in zip(x.numpy(), ours.numpy()):
        np.testing.assert_allclose(ours_row, z_reference(row, tau, correction), rtol=0, atol=1e-12)


def test_zscore_defaults_are_tau_1_and_the_population_deviation():
    x = logits(5, 10, seed=0)
    z = weighted_zscore(x)
    torch.testing.assert_close(z.var(-1, correction=0), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(z, weighted_zscore(x, 1.0, correction=0))


@pytest.mark.parametrize("k", [2, 10, 100, 1000])
def test_zscore_properties_of_the_paper(k):
    x, tau = logits(7, k, seed=1), 2.0
    z = weighted_zscore(x, tau)
    torch.testing.assert_close(z.mean(-1), torch.zeros(7, dtype=torch.float64))                     # zero mean
    torch.testing.assert_close(z.std(-1, correction=0), torch.full((7,), 1 / tau, dtype=torch.float64))
    assert torch.equal(z.argsort(-1), x.argsort(-1))                                                # monotone
    assert z.abs().max() <= (k - 1) ** 0.5 / tau + 1e-12                                            # bounded
    one_hot = weighted_zscore(F.one_hot(torch.tensor([1]), k).double(), tau)
    torch.testing.assert_close(one_hot[0, 1].item(), (k - 1) ** 0.5 / tau)                          # ... and reached


def test_zscore_of_any_leading_shape_and_of_one_vector():
    x = logits(6, 9, seed=2)
    whole = weighted_zscore(x, 2.0)
    assert torch.equal(weighted_zscore(x.view(2, 3, 9), 2.0).view(6, 9), whole)
    assert torch.equal(weighted_zscore(x[4], 2.0), whole[4])
    torch.testing.assert_close(weighted_zscore(x.t().contiguous().t(), 2.0), whole)                 # not contiguous


@pytest.mark.parametrize("k", [7, 100, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -3e38])
def test_a_constant_row_is_zero_with_no_gradient(k, value):
    x = torch.full((2, k), value, requires_grad=True)
    z = weighted_zscore(x, 2.0)
    (z * torch.arange(k)).sum().backward()
    assert (z == 0).all() and (x.grad == 0).all()


def test_a_constant_student_row_leaves_the_other_rows_gradients_right():
    z, v = logits(3, 10, seed=3), logits(3, 10, seed=4)
    z[1] = 0.1
    z.requires_grad_()
    kd_loss(z, v).backward()
    assert (z.grad[1] == 0).all() and torch.isfinite(z.grad).all()
    other = z.detach()[[0, 2]].requires_grad_()
    kd_loss(other, v[[0, 2]]).backward()
    torch.testing.assert_close(z.grad[[0, 2]], other.grad * 2 / 3)


@pytest.mark.parametrize("offset, scale", [(0, 1e4), (0, 1e-4), (1e4, 1.0), (0, 1e25), (0, 1e-25), (1e6, 1.0)])
def test_zscore_keeps_its_digits_in_float32(offset, scale):
    x = (offset + scale * logits(4, 100, seed=5)).float()
    expected = np.stack([z_reference(row, 2.0) for row in x.double().numpy()])
    np.testing.assert_allclose(weighted_zscore(x, 2.0).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("bad", [[float("nan"), 0, 1], [float("inf"), 0, 1], [float("inf")] * 3, [float("nan")] * 3])
def test_a_nan_or_infinite_row_is_never_silent(bad):
    x = torch.tensor([bad, [0.0, 1.0, 3.0]])
    z = weighted_zscore(x)
    assert z[0].isnan().all() and z[1].isfinite().all()
    good = torch.tensor([[0.0, 1.0, 2.0]] * 2)
    for zscore in (True, False):
        assert kd_loss(x, good, zscore=zscore).isnan()
        assert kd_loss(good, x, zscore=zscore).isnan()


# ---------------------------------------------------------------- Algorithm 2


@pytest.mark.parametrize("zscore", [True, False])
@pytest.mark.parametrize("k, tau, correction", K_TAU_CORRECTION)
def test_kd_loss_and_gradient_are_algorithm_2(k, tau, correction, zscore):
    z, v = logits(4, k, seed=6).requires_grad_(), logits(4, k, seed=7)
    ours = kd_loss(z, v, tau, zscore=zscore, correction=correction)
    ours.backward()
    reference = lambda x: kd_reference(x, v.numpy(), tau, zscore, correction)   # noqa: E731
    assert ours.item() == pytest.approx(reference(z.detach().numpy()), rel=1e-9, abs=1e-12)
    for (i, j), value in numeric_gradient(reference, z.detach().numpy()).items():
        assert z.grad[i, j].item() == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_kd_loss_defaults():
    z, v = logits(4, 10, seed=8), logits(4, 10, seed=9)
    assert kd_loss(z, v).item() == pytest.approx(kd_reference(z.numpy(), v.numpy(), 2.0), rel=1e-12)
    assert distillation_loss("kd", z, v).item() == kd_loss(z, v).item()


def test_correction_1_is_another_temperature():
    """The released code's K - 1: tau there is tau sqrt(K / (K - 1)) here, and the loss is scaled by the square."""
    k, tau = 10, 2.0
    z, v = logits(4, k, seed=10), logits(4, k, seed=11)
    other = tau * (k / (k - 1)) ** 0.5
    torch.testing.assert_close(kd_loss(z, v, tau, correction=1), kd_loss(z, v, other) * (tau / other) ** 2)


def test_kd_loss_does_not_see_shift_and_scale_of_either_side():
    z, v = logits(4, 10, seed=12), logits(4, 10, seed=13)
    loss = kd_loss(z, v)
    torch.testing.assert_close(kd_loss(3 * z + 5, v), loss)
    torch.testing.assert_close(kd_loss(z, 0.1 * v - 7), loss)
    assert not torch.isclose(kd_loss(3 * z, v, zscore=False), kd_loss(z, v, zscore=False), rtol=0.01)


def test_gradient_rows_sum_to_zero_and_leave_the_scale_alone():
    z, v = logits(4, 10, seed=14).requires_grad_(), logits(4, 10, seed=15)
    kd_loss(z, v).backward()
    centred = (z - z.mean(-1, keepdim=True)).detach()
    torch.testing.assert_close(z.grad.sum(-1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close((z.grad * centred).sum(-1), torch.zeros(4, dtype=torch.float64))


def test_the_papers_toy_case():
    """With a shared temperature the student that is wrong has the lower KL; with Z the one that is right has it."""
    teacher = torch.tensor([[1.0, 2.0, 3.0]])
    near_but_wrong = torch.tensor([[1.4, 2.4, 2.2]])        # its largest logit is at class 1, not 2
    far_but_right = torch.tensor([[3.0, 6.0, 9.0]])         # the teacher's relations, three times as wide
    plain = [kd_loss(s, teacher, 1.0, zscore=False).item() for s in (near_but_wrong, far_but_right)]
    standard = [kd_loss(s, teacher, 1.0).item() for s in (near_but_wrong, far_but_right)]
    assert plain[0] < plain[1]
    assert standard[0] > standard[1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zscore", [True, False])
def test_half_precision_is_cast_up_before_anything_else(dtype, zscore):
    z, v = logits(64, 100, seed=16, dtype=torch.float32).to(dtype), logits(64, 100, seed=17, dtype=torch.float32).to(dtype)
    ours = kd_loss(z, v, zscore=zscore)
    assert ours.dtype == torch.float32
    expected = kd_reference(z.double().numpy(), v.double().numpy(), 2.0, zscore)
    assert ours.item() == pytest.approx(expected, rel=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert kd_loss(z, v, zscore=zscore).item() == ours.item()


def test_float64_stays_float64():
    assert kd_loss(logits(2, 5, 0), logits(2, 5, 1)).dtype == torch.float64
    assert kd_loss(logits(2, 5, 0).float(), logits(2, 5, 1)).dtype == torch.float64


def test_large_logits_are_finite():
    z, v = logits(8, 100, seed=18, scale=1e4, dtype=torch.float32).requires_grad_(), logits(8, 100, 19, 1e4, torch.float32)
    for zscore in (True, False):
        z.grad = None
        loss = kd_loss(z, v, zscore=zscore)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


def test_no_gradient_to_the_teacher_but_one_to_a_tensor_temperature():
    z, v = logits(4, 10, seed=20).requires_grad_(), logits(4, 10, seed=21).requires_grad_()
    temp = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    kd_loss(z, v, temp, zscore=False).backward()
    assert v.grad is None and z.grad is not None
    step = 1e-6
    up, down = (kd_reference(z.detach().numpy(), v.detach().numpy(), 2.0 + s, zscore=False) for s in (step, -step))
    assert temp.grad.item() == pytest.approx((up - down) / (2 * step), rel=1e-6)


def test_it_compiles_whole_and_maps():
    z, v = logits(4, 10, seed=22), logits(4, 10, seed=23)
    for zscore in (True, False):
        compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z, v, 2.0, zscore=zscore), kd_loss(z, v, 2.0, zscore=zscore))
    mapped = torch.func.vmap(kd_loss)(torch.stack([z, 2 - z]), torch.stack([v, v]))
    torch.testing.assert_close(mapped, torch.stack([kd_loss(z, v), kd_loss(2 - z, v)]))


# ---------------------------------------------------------------- what is refused, and how it says so


@pytest.mark.parametrize("error, words, call", [
    (ValueError, r"\(2, 3\) and \(2, 4\)", lambda: kd_loss(torch.rand(2, 3), torch.rand(2, 4))),
    (ValueError, r"one shape \(B, K\)", lambda: kd_loss(torch.rand(3), torch.rand(3))),
    (ValueError, "batch is empty", lambda: kd_loss(torch.rand(0, 3), torch.rand(0, 3))),
    (ValueError, "at least 2 classes", lambda: kd_loss(torch.rand(4, 1), torch.rand(4, 1))),
    (TypeError, "int64", lambda: kd_loss(torch.ones(2, 3, dtype=torch.int64), torch.rand(2, 3))),
    (TypeError, "int64", lambda: weighted_zscore(torch.ones(3, dtype=torch.int64))),
    (ValueError, "positive number, got 0", lambda: kd_loss(torch.rand(2, 3), torch.rand(2, 3), 0)),
    (ValueError, "positive number, got -1", lambda: weighted_zscore(torch.rand(2, 3), -1)),
    (ValueError, "positive number, got nan", lambda: weighted_zscore(torch.rand(2, 3), float("nan"))),
    (ValueError, "not empty", lambda: weighted_zscore(torch.rand(0, 3))),
    (ValueError, "unknown method 'kdd'; known: kd", lambda: distillation_loss("kdd", torch.rand(2, 3), torch.rand(2, 3))),
])
def test_bad_input_is_refused_with_the_values(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_the_one_file_works_alone(tmp_path):
    """What the engineer does who copies it into another repository."""
    shutil.copy(Path(__file__).with_name("zscore_kd.py"), tmp_path)
    code = "import torch, zscore_kd as k; print(k.kd_loss(torch.eye(3), torch.eye(3)).item(), k.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "0.0" and str(tmp_path) in done.stdout
