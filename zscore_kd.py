"""Logit standardization in knowledge distillation (Sun et al., CVPR 2024): the paper's two algorithms.

Copy this one file; it needs torch alone. In your own training loop:

    from zscore_kd import kd_loss

    with torch.no_grad():
        teacher_logits = teacher(images)                            # (B, K), teacher.eval()
    student_logits = student(images)                                # (B, K)
    ce = F.cross_entropy(student_logits, target)                    # on the raw logits
    kd = kd_loss(student_logits, teacher_logits, base_temp=2.0)     # tau^2 KL(teacher || student), tau^2 is inside
    loss = 0.1 * ce + 9.0 * kd                                      # both terms are minimised

Standardization is per sample, over the classes; nothing else changes. It is for softmax tasks (one label of K).

Every loss takes logits (B, K), casts half precision up to float32, detaches the teacher, and returns the mean over the
batch, unweighted: the weights stand in the training loop. A row with a NaN or +inf makes the loss NaN, never a silent
number; a row of equal logits has Z = 0 and no gradient.
"""

import torch
import torch.nn.functional as F

METHODS = ("kd",)


def weighted_zscore(logits, base_temp=1.0, *, correction=0):
    """Z(x; tau) = (x - mean(x)) / std(x) / tau over the last axis. Paper: Algorithm 1.

    logits: (..., K), any floating dtype. base_temp: tau, a positive number, or a tensor that broadcasts to (..., 1).
    correction: 0 is the paper's population deviation (1/K); 1 is the released code's (1/(K-1)).
    Returns (..., K), float32 or float64: each row has mean 0 and, with correction 0, standard deviation 1/tau.
    TypeError for integer logits; ValueError for K < 2, an empty input, or a number tau that is not positive.
    """
    if logits.dim() < 1 or logits.numel() == 0:
        raise ValueError(f"logits must be (..., K) and not empty, got shape {tuple(logits.shape)}")
    _check_classes(logits, base_temp)
    with _full_precision(logits):
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))

        # Z is the same for x and a x + b, a > 0. Bringing each row to [0, 1] first, by constants, changes neither Z nor
        # its gradient; it keeps the digits of logits that are large, or close together, and shows a constant row.
        low, high = x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True)
        span = high - low
        constant = span == 0        # false for a row of infinities: inf - inf is NaN, and NaN shall show
        x = (x - low) / torch.where(constant, 1.0, span)

        mean = x.mean(-1, keepdim=True)                                         # Algorithm 1, line 1
        variance = x.var(-1, correction=correction, keepdim=True)
        std = torch.where(constant, 1.0, variance).sqrt()                       # line 2
        z = (x - mean) / std / base_temp                                        # line 3
        return torch.where(constant, 0.0, z)    # a constant row has no relations to teach: 0, also in the gradient


def kd_loss(student_logits, teacher_logits, base_temp=2.0, *, zscore=True, correction=0):
    """tau^2 KL(softmax Z(v; tau) || softmax Z(z; tau)), mean over the batch. Paper: Algorithm 2, lines 3, 4 and 6.

    student_logits z, teacher_logits v: (B, K). base_temp: tau, a positive number or a tensor that may need a gradient.
    zscore=False is Hinton's KD, logits / tau on both sides. correction: see `weighted_zscore`.
    Returns a scalar, unweighted (multiply by lambda_KD). Errors: see `weighted_zscore`, and shapes that differ.
    """
    z, v = _pair(student_logits, teacher_logits, base_temp)
    with _full_precision(z):
        if zscore:
            z, v = (weighted_zscore(x, base_temp, correction=correction) for x in (z, v))
        else:
            z, v = z / base_temp, v / base_temp
        log_q_teacher = F.log_softmax(v, -1)                                    # Algorithm 2, line 3
        log_q_student = F.log_softmax(z, -1)                                    # line 4
        kl = (log_q_teacher.exp() * (log_q_teacher - log_q_student)).sum(-1)
        return base_temp**2 * kl.mean()                                         # line 6, without lambda_KD


def distillation_loss(method, student_logits, teacher_logits, target=None, base_temp=2.0, *, zscore=True, correction=0):
    """The loss of `method` by its name, one of METHODS; see that method's function. target: (B,) class numbers."""
    if method == "kd":
        return kd_loss(student_logits, teacher_logits, base_temp, zscore=zscore, correction=correction)
    raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def _pair(student_logits, teacher_logits, base_temp, min_classes=2):
    """Both sides checked (shapes and dtypes only, so that it compiles) and in one full precision, the teacher detached."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError("student and teacher logits must have one shape (B, K), got "
                         f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    if student_logits.shape[0] == 0:
        raise ValueError(f"the batch is empty: logits of shape {tuple(student_logits.shape)}")
    for logits in (student_logits, teacher_logits):
        _check_classes(logits, base_temp, min_classes)
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    return student_logits.to(dtype), teacher_logits.detach().to(dtype)


def _check_classes(logits, base_temp, min_classes=2):
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.shape[-1] < min_classes:
        raise ValueError(f"at least {min_classes} classes are needed, got logits of shape {tuple(logits.shape)}")
    if not isinstance(base_temp, torch.Tensor) and not 0 < base_temp < float("inf"):
        raise ValueError(f"the temperature must be a positive number, got {base_temp}")


def _full_precision(logits):
    """Autocast off: under it some operations would go back to half precision."""
    return torch.autocast(logits.device.type, enabled=False)
