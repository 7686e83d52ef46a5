"""Newer logit losses to use standardization in, KD for large vocabularies, and every loss by its name.

Copy it together with zscore_kd.py. Shapes, dtypes and errors are as in that file: logits (B, K), the
student's first; the teacher is detached; the batch mean is returned, not multiplied by lambda_KD. zscore=True
standardizes both sides first.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

if __package__:     # copied into a package
    from .zscore_kd import (decoupled_kl, dkd_loss, kd_loss, mlkd_loss, prepare, reduce, soften, target_mask,
                            ttm_loss, weighted_zscore, wttm_loss)
else:
    from zscore_kd import (decoupled_kl, dkd_loss, kd_loss, mlkd_loss, prepare, reduce, soften, target_mask,
                           ttm_loss, weighted_zscore, wttm_loss)


def dist_loss(student_logits, teacher_logits, base_temp=4.0, *,
              beta=2.0, gamma=2.0, zscore=True):
    """DIST (Huang et al., NeurIPS 2022): tau^2 (beta inter + gamma intra), of the probabilities at tau.

    inter: 1 - Pearson's correlation of the student's and the teacher's probabilities of a sample, mean over
    the samples. intra: the same for a class over the batch, mean over the classes. What is constant has
    correlation 0. For ImageNet tau, beta and gamma are 1. Returns a scalar: intra is no sum over samples.
    """
    z, v = prepare(student_logits, teacher_logits, base_temp)
    q = F.softmax(soften(z, base_temp, zscore), -1)
    p = F.softmax(soften(v, base_temp, zscore), -1)
    inter = 1 - _correlation(q, p)
    intra = 1 - _correlation(q.mT, p.mT)
    return reduce(base_temp**2 * (beta * inter + gamma * intra), "mean")


def _correlation(x, y):
    """Mean over the rows of Pearson's correlation: the mean product of two z-scores."""
    if x.shape[-1] == 1:        # a batch of one: each class is constant
        return 0.0
    return (weighted_zscore(x) * weighted_zscore(y)).mean()


def rld_loss(student_logits, teacher_logits, target, base_temp=4.0, *,
             alpha=1.0, beta=8.0, zscore=True, reduction="mean"):
    """Refined logit distillation (Sun et al., ICCV 2025): tau^2 (alpha SCD + beta MCD).

    SCD: KL of (teacher's p of its largest class, rest) from (student's p of the target, rest). MCD: KL among
    the classes that the teacher ranks below the target, 0 if there are none. Equal to `dkd_loss` where the
    teacher's largest class is the target. target: as in `dkd_loss`.
    """
    z, v = prepare(student_logits, teacher_logits, base_temp)
    is_target = target_mask(target, z)
    classes = torch.arange(v.shape[1], device=v.device)
    is_largest = classes == v.argmax(-1, keepdim=True)
    target_logit = v.masked_fill(~is_target, -torch.inf).amax(-1, keepdim=True)
    below = v < target_logit
    has_below = below.any(-1, keepdim=True)
    z = soften(z, base_temp, zscore)
    v = soften(v, base_temp, zscore)
    scd, mcd = decoupled_kl(z, v, is_target, is_largest, below | ~has_below)
    return reduce(base_temp**2 * (alpha * scd + beta * has_below * mcd), reduction)


def entropy_weight(student_logits, teacher_logits, temperature=3.0):
    """EA-KD's weight of each sample (Su et al., ICCV 2025): (H_t + H_t H_s / ln K) / 2, (B,), no gradient.

    H_t, H_s: entropies of the teacher's and the student's softmax(logits / temperature), not standardized.
    ImageNet: temperature 2. The loss is (entropy_weight(z, v) * kd_loss(z, v, reduction="none")).mean().
    """
    z, v = prepare(student_logits.detach(), teacher_logits.detach(), temperature)
    q = F.softmax(z / temperature, -1)
    p = F.softmax(v / temperature, -1)
    h_student = torch.special.entr(q).sum(-1)
    h_teacher = torch.special.entr(p).sum(-1)
    return 0.5 * h_teacher * (1 + h_student / math.log(z.shape[1]))


def linear_kd_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, base_temp=1.0, *,
                   zscore=True, reduction="mean", chunk=256):
    """`kd_loss` of the logits hidden @ weight.T of both sides, without computing all of them at once.

    hidden: (N, H), of N tokens. weight: (V, H), of the output layer; H may differ between the two sides. The
    logits of `chunk` tokens at a time are computed, and again in the backward pass: memory does not grow with
    N. A bias is one more column of the weight, with ones in hidden. torch.func.grad does not work with it.
    """
    if len(student_hidden) != len(teacher_hidden):
        raise ValueError(f"{len(student_hidden)} tokens of the student, {len(teacher_hidden)} of the teacher")
    # float32, because the chunks' gradients are summed in it: half precision would lose many small ones
    master_weight = student_weight.to(torch.promote_types(student_weight.dtype, torch.float32))

    def chunk_losses(h_student, h_teacher):
        z = h_student @ master_weight.to(student_weight.dtype).mT
        v = h_teacher @ teacher_weight.mT
        return kd_loss(z, v, base_temp, zscore=zscore, reduction="none")

    losses = []
    for h_student, h_teacher in zip(student_hidden.split(chunk), teacher_hidden.split(chunk)):
        losses.append(checkpoint(chunk_losses, h_student, h_teacher,
                                 use_reentrant=False, preserve_rng_state=False))
    return reduce(torch.cat(losses), reduction)


LOSSES = {
    "kd": kd_loss,
    "dkd": dkd_loss,
    "mlkd": mlkd_loss,
    "ctkd": kd_loss,        # with the tensor that CurriculumTemperature returns as base_temp
    "ttm": ttm_loss,
    "wttm": wttm_loss,
    "dist": dist_loss,
    "rld": rld_loss,
}
METHODS = tuple(LOSSES)


def distillation_loss(method, student, teacher, target, base_temp=None, *, entropy_temp=None, **options):
    """The loss of a method by its name, one of METHODS.

    student, teacher: lists of logits (B, K), one per view; "mlkd" has two views, weak and strong. base_temp,
    options: arguments of the method's function, which has the defaults. entropy_temp: for EA-KD, multiplies
    the losses of the samples (for "mlkd" each view's KLs) by `entropy_weight` at this temperature.
    """
    if method not in LOSSES:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    arguments = [student[0], teacher[0]]
    if method == "mlkd":
        arguments += [student[1], teacher[1]]
    if method in ("dkd", "rld"):
        arguments.append(target)
    if base_temp is not None:
        arguments.append(base_temp)
    loss = LOSSES[method]
    if entropy_temp is None:
        return loss(*arguments, **options)
    weights = [entropy_weight(z, v, entropy_temp) for z, v in zip(student, teacher)]
    if method == "mlkd":
        return loss(*arguments, kl_weights=weights, **options)
    losses = loss(*arguments, reduction="none", **options)
    return (weights[0] * losses).mean()
