"""Newer logit losses that plug onto standardization, and the form for large vocabularies.

Copy it together with zscore_kd.py.

Arguments, shapes and errors as in zscore_kd.py: logits (B, K), half precision is cast up, the teacher is
detached, a scalar, unweighted, is returned; with zscore both sides are standardized first. Each is as its
authors' code executes it, but for slips. Above 10,000 classes, the vocabularies of language models, take a
base temperature of at most 0.5, or no standardization (the table in zscore_kd.py).
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

if __package__:     # copied into a package
    from .zscore_kd import (METHODS, _check_weight, _decoupled, _full_precision, _mean, _pair, _softened,
                            distillation_loss as first_methods, kd_loss, weighted_zscore)
else:
    from zscore_kd import (METHODS, _check_weight, _decoupled, _full_precision, _mean, _pair, _softened,
                           distillation_loss as first_methods, kd_loss, weighted_zscore)

METHODS = (*METHODS, "dist", "rld")


def dist_loss(student_logits, teacher_logits, base_temp=4.0, *, beta=2.0, gamma=2.0, zscore=True,
              correction=0):
    """DIST (Huang et al., NeurIPS 2022): tau^2 (beta inter + gamma intra), of probabilities at tau.

    inter: 1 - Pearson's correlation of the student's and the teacher's probabilities of a sample, mean over
    the samples; intra: the same of a class over the batch, mean over the classes. What is constant, like a
    class in a batch of one, correlates with nothing. ImageNet: tau, beta and gamma 1. It takes no weight:
    intra is no sum over samples.
    """
    z, v, base_temp, _ = _pair(student_logits, teacher_logits, base_temp)
    with _full_precision(z):
        q, p = (_log_ratio(_softened(x, base_temp, zscore, correction)) for x in (z, v))
        inter = 1 - _correlation(q.expm1(), p.expm1())      # of K p - 1, which it does not see
        # a class may be rare in all samples: its largest is brought to 1, which the correlation does not see
        intra = 1 - _correlation(*((x - x.detach().amax(0)).expm1().mT for x in (q, p)))
        return (base_temp**2 * (beta * inter + gamma * intra)).mean()


def rld_loss(student_logits, teacher_logits, target, base_temp=4.0, *, alpha=1.0, beta=8.0, zscore=True,
             correction=0, reduction="mean", weight=None, ignore_index=-100):
    """Refined logit distillation (Sun et al., ICCV 2025): tau^2 (alpha SCD + beta MCD).

    SCD is the KL of (largest p of the teacher, rest) from (p of the target of the student, rest); MCD the KL
    among the classes that the teacher ranks below the target, 0 where there is none. Where the teacher's
    largest is the target this is `dkd_loss`. target, ignore_index as there.
    """
    z, v, base_temp, weight = _pair(student_logits, teacher_logits, base_temp, weight, 2, target,
                                    ignore_index)
    with _full_precision(z):
        is_target = target[:, None] == torch.arange(z.shape[1], device=z.device)
        below = v < torch.where(is_target, v, -torch.inf).amax(-1, keepdim=True)    # Z and tau keep the order
        z, v = (_softened(x, base_temp, zscore, correction) for x in (z, v))
        is_largest = torch.arange(z.shape[1], device=z.device) == v.argmax(-1, keepdim=True)
        scd, mcd = _decoupled(z, v, is_target, is_largest, ~below, ~below & below.any(-1, keepdim=True))
        known = torch.where(is_target.any(-1) | (weight == 0), 1.0, torch.nan)
        return _mean(base_temp**2 * (known * (alpha * scd + beta * mcd))[:, None], reduction, weight)


def crld_loss(student_weak, teacher_weak, student_strong, teacher_strong, base_temp=4.0, *, within=2.0,
              across=0.5, zscore=True, correction=0):
    """The distillation part of CRLD (Zhang et al., ACM MM 2024): both views, within and across them.

    `within` times the KDs of each view with itself where the teacher's weak view is confident (largest p at
    least 0.9), plus `across` times those of each with the other where its strong view is (0.2); batch mean.
    """
    def kd(z, v):
        return kd_loss(z, v, base_temp, zscore=zscore, correction=correction, reduction="none")

    other = kd(student_strong, teacher_weak) + kd(student_weak, teacher_strong)
    own = kd(student_weak, teacher_weak) + kd(student_strong, teacher_strong)
    weak, strong = (x.detach().to(other.dtype).softmax(-1).amax(-1) for x in (teacher_weak, teacher_strong))
    return (within * (weak >= 0.9) * own + across * (strong >= 0.2) * other).mean()


def entropy_weight(student_logits, teacher_logits, temperature=3.0):
    """EA-KD's weight w of each sample (Su et al., ICCV 2025), (B,); no gradient flows here.

    (H_t + H_t H_s / ln K) / 2, H the entropies of the raw logits' softmaxes at `temperature` (ImageNet: 2).
    EA-KD's loss is the mean of w times the loss, kd_loss(..., weight=w, reduction="none").mean(): the mean of
    reduction="mean" would be over the weights. With a mask m of rows that hold anything give
    weight=w.where(m, 0).
    """
    z, v, temperature, _ = _pair(student_logits.detach(), teacher_logits.detach(), temperature)
    with _full_precision(z):
        h_student, h_teacher = (torch.special.entr(F.softmax(x / temperature, -1)).sum(-1) for x in (z, v))
        return 0.5 * h_teacher * (1 + h_student / math.log(z.shape[1]))


def linear_kd_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, base_temp=1.0, *,
                   zscore=True, correction=0, weight=None, chunk=256):
    """`kd_loss` of hidden states (N, H), (N, H') and the heads' weights (V, H), (V, H'), without any (N, V).

    The logits of `chunk` tokens at a time are computed, and once more in the backward pass, so that memory
    does not grow with N. weight: (N,), for instance the mask of the tokens that count. A bias is one more
    column of the weight, with ones in the hidden states. A head in half precision is copied to float32 once.
    Returns a scalar. ValueError, with the values, for shapes and dtypes that do not go together, and as in
    `kd_loss`. torch.func.grad does not take it.
    """
    for hidden, matrix in ((student_hidden, student_weight), (teacher_hidden, teacher_weight)):
        mixed = hidden.dtype != matrix.dtype and not torch.is_autocast_enabled(hidden.device.type)
        if hidden.dim() != 2 or matrix.dim() != 2 or hidden.shape[1] != matrix.shape[1] or mixed:
            raise ValueError("hidden states (N, H) and a weight (V, H) of one dtype are needed, got "
                             f"{tuple(hidden.shape)} and {tuple(matrix.shape)}, {hidden.dtype} and "
                             f"{matrix.dtype}; tokens (B, T, H) are rows h.flatten(0, 1)")
    n = len(student_hidden)
    if len(teacher_hidden) != n or n == 0:
        raise ValueError(f"{n} student's and {len(teacher_hidden)} teacher's tokens: some, as many of both")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number of tokens, at least 1, got {chunk}")
    _check_weight(weight, n)
    if isinstance(base_temp, torch.Tensor) and base_temp.numel() != 1:
        raise ValueError(f"a tensor temperature must be one number, got shape {tuple(base_temp.shape)}")

    # the gradients of the chunks add up in float32: in half precision many small ones would be lost
    wide = student_weight.to(torch.promote_types(student_weight.dtype, torch.float32))

    def part(h_student, h_teacher, w):
        h_student, h_teacher = (h.masked_fill((w == 0)[:, None], 0.0) for h in (h_student, h_teacher))
        with torch.no_grad():
            v = h_teacher @ teacher_weight.mT
        return kd_loss(h_student @ wide.to(student_weight.dtype).mT, v, base_temp, zscore=zscore,
                       correction=correction, reduction="none", weight=w).sum()

    counts = torch.ones(n, device=student_hidden.device) if weight is None else weight
    total = sum(checkpoint(part, *xs, use_reentrant=False, preserve_rng_state=False) for xs in
                zip(*(x.split(chunk) for x in (student_hidden, teacher_hidden, counts))))
    number = counts.to(total.dtype).sum()
    return total / torch.where(number == 0, 1.0, number)


def distillation_loss(method, student_logits, teacher_logits, target=None, base_temp=2.0, *,
                      entropy_temp=None, reduction="mean", **options):
    """The loss of `method` by its name, one of METHODS.

    options: those of `dist_loss` or `rld_loss`, else of `zscore_kd.distillation_loss`. entropy_temp: that of
    EA-KD's weights, by which the samples' losses, of "mlkd" each view's KLs, are multiplied before the mean,
    which is over all rows; None: by nothing. TypeError for "dist", which has neither, and for other weights
    beside EA-KD's.
    """
    z, v = student_logits, teacher_logits
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if method == "dist":
        if entropy_temp is not None or reduction != "mean":
            raise TypeError("method 'dist' has no loss of a sample")
        return dist_loss(z, v, base_temp, **options)
    if entropy_temp is not None and options.get("weight") is not None:
        raise TypeError("entropy_temp gives the weights: leave weight out")
    options["reduction"] = reduction if entropy_temp is None or method == "mlkd" else "none"
    if method == "mlkd" and entropy_temp is not None:
        strong = options.get("student_strong"), options.get("teacher_strong")
        if all(x is not None for x in strong):      # a missing one is said below
            options["kl_weights"] = entropy_weight(z, v, entropy_temp), entropy_weight(*strong, entropy_temp)
    if method != "rld":
        loss = first_methods(method, z, v, target, base_temp, **options)
    elif target is None:
        raise TypeError("method 'rld' needs target")
    else:
        loss = rld_loss(z, v, target, base_temp, **options)
    if entropy_temp is None or method == "mlkd":
        return loss
    # a row that is ignored may hold anything, its weight too; its loss is 0
    return _mean(entropy_weight(z, v, entropy_temp).where(loss.detach() != 0, 0.0) * loss, reduction, None)


def _log_ratio(x):
    """log(K softmax(x)), with all digits where the K are nearly alike, and where one is far above them."""
    x = x - x.detach().amax(-1, keepdim=True)
    mean = x.expm1().mean(-1, keepdim=True)
    far = x.logsumexp(-1, keepdim=True) - math.log(x.shape[-1])
    return x - torch.where(mean > -0.5, mean.log1p(), far)


def _correlation(x, y):
    """The mean of Pearson's correlations of two matrices' rows, the mean products of z-scores."""
    if x.shape[-1] == 1:        # a batch of one: a class's only number is constant
        return 0.0
    return (weighted_zscore(x) * weighted_zscore(y)).mean()
