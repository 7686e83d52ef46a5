"""Logit standardization in knowledge distillation (Sun et al., CVPR 2024), and the losses it plugs into.

Copy this one file; it needs torch alone. In your own training loop:

    from zscore_kd import kd_loss

    with torch.no_grad():
        teacher_logits = teacher(images)                          # (B, K), teacher.eval()
    student_logits = student(images)                              # (B, K)
    ce = F.cross_entropy(student_logits, target)                  # on the raw logits
    kd = kd_loss(student_logits, teacher_logits, base_temp=2.0)   # tau^2 KL(teacher || student), with tau^2
    loss = 0.1 * ce + 9.0 * kd                                    # both terms are minimised

Standardization is per sample, over the classes; nothing else changes. For softmax tasks (one label of K).

Every loss takes logits (B, K), casts half precision and float8 up to float32, detaches the teacher, and
returns the mean over the batch, unweighted. A row with a NaN or +inf makes the loss NaN, never a silent
number; a row of equal logits has Z = 0 and no gradient.

weight: (B,), a sample's weight, or a mask; the mean is then sum(w loss) / sum(w), 0 where all are 0, and a
row of weight 0 may hold anything. Whether one is negative is not looked at. reduction="none" returns the
(weighted) losses (B,).
Maps (B, K, H, W) are rows z.movedim(1, -1).flatten(0, -2), tokens (B, T, K) are rows z.flatten(0, 1), targets
and weights .flatten() then; Z itself takes any shape, but over the last axis, which of maps is the wrong one.
A teacher that does not know all classes: give the columns of those that it knows, z[:, known], not -inf.

The base temperature for another number of classes: Z is at most sqrt(K - 1) / tau, so the teacher's top
probability has a ceiling, reached by a one-hot row:

    K        tau = 1    tau = 2    tau = 4
    2        0.881      0.731      0.622       every Z is +-1 / tau: only the argmax is left, and no gradient
    10       0.757      0.370      0.204
    100      0.996      0.606      0.111
    1000     1.000      1.000      0.732

A row of real shape reaches less, for instance one of a logit 8 of the others' deviations above their mean,
the others a Gaussian's quantiles:

    K        tau = 1/4  tau = 1/2  tau = 1    tau = 2
    100      1.00       1.00       0.80       0.18
    1000     1.00       1.00       0.60       0.041
    10000    1.00       0.99       0.15       0.0047
    32000    1.00       0.97       0.053      0.0015
    128256   1.00       0.90       0.014      0.00038

Above 10,000 classes, the vocabularies of language models, take tau of at most 0.5, or no standardization.
"""

import torch
import torch.nn.functional as F

METHODS = ("kd", "dkd", "mlkd", "ctkd", "ttm", "wttm")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def weighted_zscore(logits, base_temp=1.0, *, correction=0):
    """Z(x; tau) = (x - mean(x)) / std(x) / tau over the last axis. Paper: Algorithm 1.

    logits: (..., K), any floating dtype. base_temp: tau, a positive number, or a tensor that broadcasts to
    (..., 1). correction: 0 is the paper's population deviation (1/K); 1 is the released code's (1/(K-1)).
    Returns (..., K), float32 or float64: each row has mean 0 and, with correction 0, standard deviation
    1/tau. TypeError for integer logits; ValueError for K < 2, an empty input, a number tau that is not
    positive, a tensor of another shape, or another correction.
    """
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 (1/K) or 1 (1/(K-1)), got {correction}")
    if logits.dim() < 1 or logits.numel() == 0:
        raise ValueError(f"logits must be (..., K) and not empty, got shape {tuple(logits.shape)}")
    _check_classes(logits, base_temp)
    with _full_precision(logits):
        x = logits.to(_wide(logits))

        # Z is the same for x and a x + b, a > 0. Bringing each row to [0, 1] first, by constants, changes
        # neither Z nor its gradient; it keeps the digits of logits that are large, or close together, and
        # shows a constant row.
        low, high = x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True)
        span = high - low
        constant = span == 0        # false for a row of infinities: inf - inf is NaN, and NaN shall show
        x = (x - low) / torch.where(constant, 1.0, span)

        mean = x.mean(-1, keepdim=True)                                         # Algorithm 1, line 1
        variance = x.var(-1, correction=correction, keepdim=True)
        std = torch.where(constant, 1.0, variance).sqrt()                       # line 2
        z = (x - mean) / std / base_temp                                        # line 3
        return torch.where(constant, 0.0, z)    # a constant row has nothing to teach: 0, also in the gradient


def kd_loss(student_logits, teacher_logits, base_temp=2.0, *, zscore=True, correction=0, reduction="mean",
            weight=None):
    """tau^2 KL(softmax Z(v; tau) || softmax Z(z; tau)), batch mean. Paper: Algorithm 2, lines 3, 4 and 6.

    student_logits z, teacher_logits v: (B, K). base_temp: tau, a positive number or a tensor, one for all or
    (B, 1), that may need a gradient. zscore=False is Hinton's KD, logits / tau on both sides. correction:
    see `weighted_zscore`. reduction, weight: see above. Returns a scalar, unweighted (multiply by lambda_KD).
    Errors: see `weighted_zscore`, and shapes that differ. NormKD (Chi et al., 2023) is the mean of these
    losses, reduction="none", each times the variance of its row of teacher's logits.
    """
    z, v, base_temp, weight = _pair(student_logits, teacher_logits, base_temp, weight)
    with _full_precision(z):
        z, v = (_softened(x, base_temp, zscore, correction) for x in (z, v))
        log_q_teacher = F.log_softmax(v, -1)                                    # Algorithm 2, line 3
        log_q_student = F.log_softmax(z, -1)                                    # line 4
        q_teacher, q_student = log_q_teacher.exp(), log_q_student.exp()
        # KL; the last two sum to 0 and take away the softmaxes' rounding, which a high temperature blows up
        kl = (q_teacher * (log_q_teacher - log_q_student) - q_teacher + q_student).sum(-1, keepdim=True)
        return _mean(base_temp**2 * kl, reduction, weight)                      # line 6, without lambda_KD


def dkd_loss(student_logits, teacher_logits, target, base_temp=2.0, *, alpha=1.0, beta=8.0, zscore=True,
             correction=0, reduction="mean", weight=None, ignore_index=-100):
    """tau^2 (alpha TCKD + beta NCKD), batch mean: decoupled KD (Zhao et al., CVPR 2022, eq. 7), in log space.

    TCKD is the KL of (p_y, 1 - p_y), target class against the rest; NCKD the KL among the other K - 1
    classes, where KL = TCKD + (1 - p_y) NCKD. target: (B,) class numbers in [0, K), or ignore_index, whose
    weight is 0. Any other is a ValueError on a CPU; elsewhere, compiled or mapped the loss is NaN. With Z the
    paper's lambda_KD multiplies both alpha and beta. The rest as in `kd_loss`; K of at least 3. Mixup of the
    classes a and b is m dkd_loss(z, v, a) + (1 - m) dkd_loss(z, v, b).
    """
    z, v, base_temp, weight = _pair(student_logits, teacher_logits, base_temp, weight, 3, target,
                                    ignore_index)
    with _full_precision(z):
        z, v = (_softened(x, base_temp, zscore, correction) for x in (z, v))
        is_target = target[:, None] == torch.arange(z.shape[1], device=z.device)
        tckd, nckd = _decoupled(z, v, is_target, is_target, is_target, is_target)
        known = torch.where(is_target.any(-1) | (weight == 0), 1.0, torch.nan)
        return _mean(base_temp**2 * (known * (alpha * tckd + beta * nckd))[:, None], reduction, weight)


def mlkd_loss(student_weak, teacher_weak, student_strong, teacher_strong, base_temp=2.0, *,
              zscore=True, zscore_relations=True, correction=0, kl_weights=(None, None)):
    """Multi-level logit distillation (Jin et al., CVPR 2023) in closed form: instances, classes and batch.

    The four logits are (B, K): the student's and the teacher's of a weakly and of a strongly augmented view.
    As executed by its authors' code, at five temperatures: its confidence masks come to the constant 1/2 (for
    even B and K; the last batch of an epoch may be odd, and theirs is then (n + 1) / 2n), and its strong
    terms at 2 and 6 see the weak view. zscore_relations: standardize the class and batch relations too (the
    released code does not). The relations have no temperature squared. It takes no weight: class relations
    are no sum over samples; kl_weights, of the weak and of the strong view, (B,) or None, are factors of the
    samples' KLs alone, of which the mean stays over B (EA-KD). Returns a scalar, unweighted; errors as in
    `kd_loss`.
    """
    z, v, base_temp, _ = _pair(student_weak, teacher_weak, base_temp)
    z_strong, v_strong, *_ = _pair(student_strong, teacher_strong, base_temp)
    if z.shape != z_strong.shape:
        raise ValueError("weak and strong logits must have one shape, "
                         f"got {tuple(z.shape)} and {tuple(z_strong.shape)}")
    with _full_precision(z):
        raw = z, v
        z, v, z_strong, v_strong = (_softened(x, 1.0, zscore, correction)
                                    for x in (z, v, z_strong, v_strong))
        temperatures = (base_temp, 3.0, 5.0, 2.0, 6.0)

        def kl(z, v, t, weight):
            return kd_loss(z, v, t, zscore=False, reduction="none", weight=weight).mean()

        weak = [kl(z, v, t, kl_weights[0]) for t in temperatures]
        strong = [kl(z_strong, v_strong, t, kl_weights[1]) for t in temperatures[:3]]

        relations = 0.0
        for t in temperatures:
            q, p = (F.softmax(x / t, -1) for x in ((z, v) if zscore_relations else raw))
            relations += (p.mT @ p - q.mT @ q).square().sum() / p.shape[1]      # between classes, K x K
            relations += (p @ p.mT - q @ q.mT).square().sum() / p.shape[0]      # between samples, B x B
        return 0.5 * sum(weak) + sum(strong) + sum(weak[3:]) + 0.5 * relations


def ttm_loss(student_logits, teacher_logits, temperature=4.0, *, zscore=False, correction=0,
             reduction="mean", weight=None):
    """KL(softmax(v / T) || softmax(z)), batch mean: transformed teacher matching (Zheng and Yang, ICLR 2024).

    The teacher alone is transformed, by the power 1 / T of its probabilities; there is no T squared. With
    zscore: teacher softmax Z(v; T), student softmax Z(z; 1). Shapes, dtypes and errors as in `kd_loss`.
    """
    return _transformed(student_logits, teacher_logits, temperature, zscore, correction, reduction, weight)


def wttm_loss(student_logits, teacher_logits, temperature=4.0, *, zscore=False, correction=0,
              reduction="mean", weight=None):
    """TTM with each sample weighted by U = sum_k p_k^(1/T), the power sum of the teacher's p = softmax(v).

    For T of at least 1, U lies between 1 (a certain teacher) and K^(1 - 1/T) (a uniform one). With zscore
    p = softmax Z(v; 1). U is no part of the mean's weights. See `ttm_loss`.
    """
    return _transformed(student_logits, teacher_logits, temperature, zscore, correction, reduction, weight,
                        powers=True)


def _transformed(student_logits, teacher_logits, temperature, zscore, correction, reduction, weight,
                 powers=False):
    z, v, temperature, weight = _pair(student_logits, teacher_logits, temperature, weight)
    with _full_precision(z):
        z, v = (_softened(x, 1.0, zscore, correction) for x in (z, v))
        log_p, log_q = F.log_softmax(v / temperature, -1), F.log_softmax(z, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        if powers:
            kl = (F.log_softmax(v, -1) / temperature).logsumexp(-1).exp() * kl
        return _mean(kl, reduction, weight)


class CurriculumTemperature(torch.nn.Module):
    """CTKD's learned temperature (Li et al., AAAI 2023): T = start + span sigmoid(g), g = 1.0 at first.

    forward(reversal) gives T, a tensor for `base_temp` of `kd_loss`. The gradient that reaches g is
    multiplied by -reversal: the student minimises the loss, g maximises it. Put g, one scalar, into the
    student's optimizer. start and span are saved and loaded with g; a file without them keeps the module's.
    """

    def __init__(self, start=1.0, span=20.0):
        super().__init__()
        self.register_buffer("start", torch.tensor(float(start)))
        self.register_buffer("span", torch.tensor(float(span)))
        self.g = torch.nn.Parameter(torch.tensor(1.0))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.setdefault(prefix + "start", self.start)     # an older file has g alone
        state_dict.setdefault(prefix + "span", self.span)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, reversal):
        g = self.g.detach()
        g = g - reversal * (self.g - g)         # the value of g, -reversal times its gradient
        return self.start + self.span * g.sigmoid()


def distillation_loss(method, student_logits, teacher_logits, target=None, base_temp=2.0, *,
                      student_strong=None, teacher_strong=None, alpha=1.0, beta=8.0, zscore=True,
                      zscore_relations=True, correction=0, reduction="mean", weight=None,
                      ignore_index=-100, kl_weights=(None, None)):
    """The loss of `method` by its name, one of METHODS; see that method's function for its arguments.

    base_temp is the temperature of every method (a tensor for "ctkd"); the two strong views and kl_weights
    are for "mlkd", target, ignore_index, alpha and beta for "dkd". TypeError where one of these is missing,
    or where "mlkd" is given a reduction or a weight, which it does not have.
    """
    needed = {"dkd": {"target": target},
              "mlkd": {"student_strong": student_strong, "teacher_strong": teacher_strong}}.get(method, {})
    if missing := [name for name, value in needed.items() if value is None]:
        raise TypeError(f"method {method!r} needs {' and '.join(missing)}")
    z, v, how = student_logits, teacher_logits, {"zscore": zscore, "correction": correction}
    if method == "mlkd":
        if reduction != "mean" or weight is not None:
            raise TypeError("method 'mlkd' has no loss of a sample")
        return mlkd_loss(z, v, student_strong, teacher_strong, base_temp,
                         zscore_relations=zscore_relations, kl_weights=kl_weights, **how)
    how |= {"reduction": reduction, "weight": weight}
    if method in ("kd", "ctkd"):
        return kd_loss(z, v, base_temp, **how)
    if method == "dkd":
        return dkd_loss(z, v, target, base_temp, alpha=alpha, beta=beta, ignore_index=ignore_index, **how)
    if method == "ttm":
        return ttm_loss(z, v, base_temp, **how)
    if method == "wttm":
        return wttm_loss(z, v, base_temp, **how)
    raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def _softened(x, temperature, zscore, correction):
    """Z(x; tau), or x / tau."""
    if not zscore:
        return x / temperature
    if x.shape[-1] == 2:
        raise ValueError("with zscore the logits of 2 classes are always +-1 / tau, without gradient: "
                         "use zscore=False")
    return weighted_zscore(x, temperature, correction=correction)


def _wide(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _decoupled(z, v, own, top, out, hidden):
    """KLs (B,) of (p of one class, of all other), and of the p among some classes, in log space.

    Masks (B, K): own, the one class of the student z; top, that of the teacher v; out, the classes that are
    not among the some; hidden, the same, but none in a row that has no other.
    """
    z, v = (x - x.detach().amax(-1, keepdim=True) for x in (z, v))      # the same p; +inf shows, as NaN

    def two(x, one):
        gap = x.masked_fill(~one, 0.0).sum(-1) - x.masked_fill(one, -torch.inf).logsumexp(-1)
        return F.logsigmoid(gap), F.logsigmoid(-gap)    # (a sum, as gather's backward pass scatters)

    def among(x):       # 0 elsewhere
        return F.log_softmax(x.masked_fill(hidden, -torch.inf), -1).masked_fill(out, 0.0)

    (t_one, t_rest), (s_one, s_rest), log_p, log_q = two(v, top), two(z, own), among(v), among(z)
    return (t_one.exp() * (t_one - s_one) + t_rest.exp() * (t_rest - s_rest),
            (log_p.exp().masked_fill(out, 0.0) * (log_p - log_q)).sum(-1))


def _mean(losses, reduction, weight):
    """The mean of losses (B,) or (B, 1), or themselves (B,), with weights (B,) where there are some."""
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    if weight is None:
        return losses.mean() if reduction == "mean" else losses.flatten()
    losses = weight * losses.flatten()
    if reduction == "none":
        return losses
    total = weight.sum()
    return losses.sum() / torch.where(total == 0, 1.0, total)


def _counts(target, logits, ignore_index, weight):
    """Which targets (B,) are not ignored and weigh something, as a mask.

    ValueError for what is no class, if it is seen.
    """
    if not isinstance(target, torch.Tensor):
        raise ValueError(f"target must be a tensor of class numbers, got a {type(target).__name__}")
    if target.shape != logits.shape[:1] or target.dtype not in INTEGERS:
        raise ValueError(f"target must be {len(logits)} class numbers, "
                         f"got {target.dtype} of shape {tuple(target.shape)}")
    target = target.long()      # 255 is -1 in int8
    counts, classes = target != ignore_index, logits.shape[1]
    if weight is not None:
        counts = counts & (weight != 0)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            strange = target[counts & ((target < 0) | (target >= classes))].tolist()
        except RuntimeError:        # under torch.func.vmap, which has no values
            strange = []
        if strange:
            raise ValueError(f"target {strange[0]} is no class number in [0, {classes}), nor ignored as "
                             f"{ignore_index} is")
    return counts


def _pair(student_logits, teacher_logits, base_temp, weight=None, min_classes=2, target=None,
          ignore_index=None):
    """Student, teacher detached, temperature, in one full precision, and weights, with those of the targets.

    Checks what compiles: shapes, dtypes. A row of weight 0 becomes constant: it has no loss, no gradient.
    """
    for logits in (student_logits, teacher_logits):
        if not isinstance(logits, torch.Tensor):
            raise TypeError(f"logits must be tensors, got a {type(logits).__name__}")
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        hint = {3: "; with target.flatten(), tokens (B, T, K) are rows z.flatten(0, 1)",
                4: "; with target.flatten(), maps (B, K, H, W) are rows z.movedim(1, -1).flatten(0, -2)"}
        raise ValueError("student and teacher logits must have one shape (B, K), got "
                         f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
                         + hint.get(student_logits.dim(), ""))
    _check_weight(weight, len(student_logits))
    if student_logits.shape[0] == 0:
        raise ValueError(f"the batch is empty: logits of shape {tuple(student_logits.shape)}")
    if (isinstance(base_temp, torch.Tensor) and base_temp.numel() != 1
            and base_temp.shape != (len(student_logits), 1)):
        raise ValueError("a tensor temperature must be one number or (B, 1), "
                         f"got shape {tuple(base_temp.shape)}")
    for logits in (student_logits, teacher_logits):
        _check_classes(logits, base_temp, min_classes)
    if torch.is_grad_enabled() and teacher_logits.requires_grad and not student_logits.requires_grad:
        raise ValueError("the teacher's logits need a gradient and the student's do not: are they exchanged?")
    dtype = torch.promote_types(_wide(student_logits), _wide(teacher_logits))
    temp = base_temp.to(dtype) if isinstance(base_temp, torch.Tensor) else base_temp
    z, v = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    if target is not None:
        counts = _counts(target, z, ignore_index, weight)
        weight = counts if weight is None else weight * counts
    if weight is not None:
        weight = weight.to(dtype)
        z, v = (x.masked_fill((weight == 0)[:, None], 0.0) for x in (z, v))
    return z, v, temp, weight


def _check_weight(weight, rows):
    if weight is not None and not isinstance(weight, torch.Tensor):
        raise ValueError(f"weight must be a tensor ({rows},), got a {type(weight).__name__}")
    if weight is not None and (weight.shape != (rows,) or weight.is_complex()):
        raise ValueError(f"weight must be ({rows},) real numbers, "
                         f"got {weight.dtype} of shape {tuple(weight.shape)}")


def _check_classes(logits, base_temp, min_classes=2):
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.shape[-1] < min_classes:
        raise ValueError(f"at least {min_classes} classes are needed, "
                         f"got logits of shape {tuple(logits.shape)}")
    if isinstance(base_temp, torch.Tensor):
        if base_temp.dim() and base_temp.shape[-1] != 1:        # (B,) would divide classes, where B is K
            raise ValueError("a tensor temperature must be one number or end in a dimension of 1, "
                             f"got shape {tuple(base_temp.shape)}")
    elif not 0 < base_temp < float("inf"):
        raise ValueError(f"the temperature must be a positive number, got {base_temp}")


def _full_precision(logits):
    """Autocast off: under it some operations would go back to half precision."""
    return torch.autocast(logits.device.type, enabled=False)
