"""Logit standardization in knowledge distillation (Sun et al., CVPR 2024), and losses to use it in.

Copy this one file; it needs only torch. In your own training loop (the numbers are Algorithm 2's lines):

    import torch
    import torch.nn.functional as F

    from zscore_kd import kd_loss

    with torch.no_grad():
        teacher_logits = teacher(images)                          # 2: v, (B, K); call teacher.eval() before
    student_logits = student(images)                              # 2: z, (B, K)
    ce = F.cross_entropy(student_logits, target)                  # 5: of the raw logits
    kd = kd_loss(student_logits, teacher_logits, base_temp=2.0)   # 3, 4, and tau^2 of line 6
    loss = 0.1 * ce + 9.0 * kd                                    # 6

Every loss takes logits (B, K) of a softmax classifier, the student's first. It detaches the teacher, computes
in float32 (float64 stays float64) and returns the batch mean, not yet multiplied by lambda_KD. A row with NaN
or +inf makes the loss NaN or inf. A row of equal logits has Z = 0 and no gradient.

To leave samples out, for instance those with the label -100, ask for the loss of each sample, (B,). This form
compiles, and is 0 if no sample is left. The logits of all rows must be finite:

    w = (y != -100).float()
    losses = dkd_loss(z, v, y.clamp(min=0), reduction="none")
    loss = (w * losses).sum() / w.sum().clamp(min=1)

Pixels (B, K, H, W) become rows with z.movedim(1, -1).flatten(0, -2), tokens (B, T, K) with z.flatten(0, 1),
and their targets with y.flatten(). If the teacher knows only some classes, give those columns: z[:, known].

Which base temperature for another number of classes? No value of Z exceeds sqrt(K - 1) / tau. So the
teacher's top probability has a ceiling, which a one-hot row of logits reaches:

    K        tau = 1    tau = 2    tau = 4
    2        0.881      0.731      0.622       every Z is +-1 / tau: zscore=True is refused
    10       0.757      0.370      0.204
    100      0.996      0.606      0.111
    1000     1.000      1.000      0.732

A row of real shape stays lower. Example: one logit is 8 standard deviations above the mean of the others, and
those are Gaussian. The teacher's top probability is then:

    K        tau = 1/4  tau = 1/2  tau = 1    tau = 2
    100      1.00       1.00       0.80       0.18
    1000     1.00       1.00       0.60       0.041
    10000    1.00       0.99       0.15       0.0047
    32000    1.00       0.97       0.053      0.0015
    128256   1.00       0.90       0.014      0.00038

For more than 10,000 classes (vocabularies of language models) use tau <= 0.5, or no standardization.
"""

import torch
import torch.nn.functional as F


def weighted_zscore(logits, base_temp=1.0, *, correction=0):
    """Algorithm 1: Z(x; tau) = (x - mean(x)) / std(x) / tau over the last axis.

    logits: (..., K), floating point. base_temp: tau > 0, a number or a tensor that broadcasts to (..., 1).
    correction: 0 is the paper's standard deviation (1/K), 1 the released code's (1/(K-1)).
    Returns (..., K), float32 or float64. TypeError for integers; ValueError for K < 2, no rows, tau <= 0.
    """
    _check(logits, base_temp)
    x = _full_precision(logits)

    # Z is the same for x and a x + b, a > 0. Scaling each row to [0, 1] first keeps the digits of logits that
    # are large or close together. The scaling is by constants, so Z's gradient does not change.
    low, high = x.detach().aminmax(dim=-1, keepdim=True)
    span = high - low
    constant = span == 0                # not if a row has infinities: its span is NaN, and so is its Z
    x = (x - low) / torch.where(constant, 1.0, span)

    mean = x.mean(-1, keepdim=True)                                         # Algorithm 1, line 1
    variance = x.var(-1, correction=correction, keepdim=True)
    std = torch.where(constant, 1.0, variance).sqrt()                       # line 2
    z = (x - mean) / std / base_temp                                        # line 3
    return torch.where(constant, 0.0, z)    # also stops the gradient of a constant row


def kd_loss(student_logits, teacher_logits, base_temp=2.0, *,
            zscore=True, correction=0, reduction="mean"):
    """Algorithm 2, lines 3, 4 and 6: tau^2 KL(softmax Z(v; tau) || softmax Z(z; tau)).

    student_logits z, teacher_logits v: (B, K). base_temp: tau > 0, a number, or a tensor () or (B, 1), which
    may need a gradient. zscore=False: Hinton's KD, logits / tau on both sides. reduction="none": (B,).
    ValueError for shapes that differ, K < 3 (without zscore K < 2) and exchanged arguments.
    """
    z, v = prepare(student_logits, teacher_logits, base_temp)
    v = soften(v, base_temp, zscore, correction)
    z = soften(z, base_temp, zscore, correction)
    log_q_teacher = F.log_softmax(v, -1)                                    # Algorithm 2, line 3
    log_q_student = F.log_softmax(z, -1)                                    # line 4
    q_teacher = log_q_teacher.exp()
    q_student = log_q_student.exp()
    # The last two terms sum to 0. They remove rounding errors that tau^2 would enlarge.
    kl = q_teacher * (log_q_teacher - log_q_student) - q_teacher + q_student
    kl = kl.sum(-1, keepdim=True)
    return reduce(base_temp**2 * kl, reduction)                             # line 6, without lambda_KD


def dkd_loss(student_logits, teacher_logits, target, base_temp=2.0, *,
             alpha=1.0, beta=8.0, zscore=True, correction=0, reduction="mean"):
    """tau^2 (alpha TCKD + beta NCKD): decoupled KD (Zhao et al., CVPR 2022, eq. 7), computed in log space.

    TCKD: KL of (p_y, 1 - p_y), y the target class. NCKD: KL among the other K - 1 classes.
    target: (B,) class numbers. One outside [0, K) is a ValueError on a CPU; on a GPU, compiled or mapped the
    loss is then not finite. The paper's lambda_KD multiplies both alpha and beta. Rest as `kd_loss`; K >= 3.
    Mixup of the targets a and b: m * dkd_loss(z, v, a) + (1 - m) * dkd_loss(z, v, b).
    """
    z, v = prepare(student_logits, teacher_logits, base_temp, min_classes=3)
    z = soften(z, base_temp, zscore, correction)
    v = soften(v, base_temp, zscore, correction)
    is_target = target_mask(target, z)
    tckd, nckd = decoupled_kl(z, v, is_target, is_target, ~is_target)
    return reduce(base_temp**2 * (alpha * tckd + beta * nckd), reduction)


def mlkd_loss(student_weak, teacher_weak, student_strong, teacher_strong, base_temp=2.0, *,
              zscore=True, zscore_relations=True, correction=0, kl_weights=(1.0, 1.0)):
    """Multi-level logit distillation (Jin et al., CVPR 2023): KLs, class relations and sample relations.

    Logits (B, K) of a weakly and a strongly augmented view. As the authors' code computes it: its confidence
    masks equal 1/2 (for even B and K), and the strong KLs at temperatures 2 and 6 use the weak view.
    zscore_relations: standardize the relations too (the released code does not). kl_weights: factors (B,) of
    each view's KLs (EA-KD). Returns a scalar: class relations are no sum over samples. Errors as `kd_loss`.
    """
    raw_weak = prepare(student_weak, teacher_weak, base_temp)
    raw_strong = prepare(student_strong, teacher_strong, base_temp)
    weak = [soften(x, 1.0, zscore, correction) for x in raw_weak]
    strong = [soften(x, 1.0, zscore, correction) for x in raw_strong]
    weak_weight, strong_weight = kl_weights
    temperatures = (base_temp, 3.0, 5.0, 2.0, 6.0)

    def mean_kl(view, t, weight):
        kl = kd_loss(*view, t, zscore=False, reduction="none")
        return (weight * kl).mean()

    weak_kls = [mean_kl(weak, t, weak_weight) for t in temperatures]
    strong_kls = [mean_kl(strong, t, strong_weight) for t in temperatures[:3]]
    kls = 0.5 * sum(weak_kls) + sum(strong_kls) + sum(weak_kls[3:])

    z, v = weak if zscore_relations else raw_weak
    relations = 0.0
    with torch.autocast(z.device.type, enabled=False):      # it would multiply matrices in half precision
        for t in temperatures:
            q = F.softmax(z / t, -1)
            p = F.softmax(v / t, -1)
            classes = p.mT @ p - q.mT @ q       # (K, K)
            samples = p @ p.mT - q @ q.mT       # (B, B)
            relations += classes.square().sum() / len(classes)
            relations += samples.square().sum() / len(samples)
    return kls + 0.5 * relations


def ttm_loss(student_logits, teacher_logits, temperature=4.0, *,
             zscore=False, correction=0, reduction="mean"):
    """KL(softmax(v / T) || softmax(z)): transformed teacher matching (Zheng and Yang, ICLR 2024).

    Only the teacher is softened, and there is no T^2. With zscore: teacher softmax Z(v; T), student
    softmax Z(z; 1). Shapes, dtypes and errors as `kd_loss`.
    """
    z, v = prepare(student_logits, teacher_logits, temperature)
    log_p = F.log_softmax(soften(v, temperature, zscore, correction), -1)
    log_q = F.log_softmax(soften(z, 1.0, zscore, correction), -1)
    return reduce(kl_divergence(log_p, log_q), reduction)


def wttm_loss(student_logits, teacher_logits, temperature=4.0, *,
              zscore=False, correction=0, reduction="mean"):
    """`ttm_loss` with each sample multiplied by U = sum_k p_k^(1/T), p = softmax(v) of the teacher.

    For T >= 1, U is between 1 (a certain teacher) and K^(1 - 1/T) (a uniform one). With zscore, p is
    softmax Z(v; 1).
    """
    kl = ttm_loss(student_logits, teacher_logits, temperature,
                  zscore=zscore, correction=correction, reduction="none")
    v = _full_precision(teacher_logits.detach())
    log_p = F.log_softmax(soften(v, 1.0, zscore, correction), -1)
    power_sum = (log_p / temperature).logsumexp(-1).exp()
    return reduce(power_sum * kl, reduction)


class CurriculumTemperature(torch.nn.Module):
    """CTKD's learned temperature (Li et al., AAAI 2023): T = start + span sigmoid(g), at first g = 1.

    forward(reversal) returns T, a tensor for `base_temp` of `kd_loss`. It multiplies the gradient of g by
    -reversal: the student minimises the loss, g maximises it. Give g to the student's optimizer.
    start and span are in the state_dict; an older one without them loads too.
    """

    def __init__(self, start=1.0, span=20.0):
        super().__init__()
        self.register_buffer("start", torch.tensor(float(start)))
        self.register_buffer("span", torch.tensor(float(span)))
        self.g = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, reversal):
        g = self.g.detach()
        g = g - reversal * (self.g - g)         # the value of g, -reversal times its gradient
        return self.start + self.span * g.sigmoid()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        state_dict.setdefault(prefix + "start", self.start)
        state_dict.setdefault(prefix + "span", self.span)
        super()._load_from_state_dict(state_dict, prefix, *rest)


# -------------------------------------------------- shared by all losses, here and in logit_kd.py


def prepare(student_logits, teacher_logits, base_temp, min_classes=2):
    """Checks a loss's arguments; returns the logits of the student and of the teacher, detached, (B, K)."""
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError("student and teacher logits must have one shape (B, K) (others: see zscore_kd.py), "
                         f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    _check(student_logits, base_temp, min_classes)
    _check(teacher_logits, base_temp, min_classes)
    if torch.is_grad_enabled() and teacher_logits.requires_grad and not student_logits.requires_grad:
        raise ValueError("the teacher's logits need a gradient, the student's do not: are they exchanged?")
    return _full_precision(student_logits), _full_precision(teacher_logits.detach())


def soften(x, temperature, zscore, correction=0):
    """Z(x; tau) if `zscore`, else x / tau."""
    if not zscore:
        return x / temperature
    if x.shape[-1] == 2:
        raise ValueError("2 classes need zscore=False: Z is +-1 / tau for any logits, without gradient")
    return weighted_zscore(x, temperature, correction=correction)


def target_mask(target, logits):
    """True at the target class of each row, (B, K). ValueError for a target outside [0, K), on a CPU."""
    batch, classes = logits.shape
    outside = False
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            outside = bool(target.min() < 0 or target.max() >= classes)
        except RuntimeError:        # under torch.func.vmap values cannot be read
            pass
    if outside or target.shape != (batch,):
        raise ValueError(f"target must be {batch} classes in [0, {classes}), got {tuple(target.shape)} from "
                         f"{target.min()} to {target.max()}; to leave samples out see zscore_kd.py")
    return target[:, None] == torch.arange(classes, device=logits.device)


def kl_divergence(log_p, log_q):
    """KL(p || q) of each row, (B, 1)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)


def decoupled_kl(z, v, student_class, teacher_class, among):
    """The two KLs of decoupled KD, each (B, 1). z, v: softened logits (B, K) of student and teacher.

    First: KL of (p of one class, p of all others); student_class and teacher_class, masks (B, K), mark that
    class on each side. Second: KL among the classes that `among`, a mask (B, K), marks, at least one per row.
    """
    z = z - z.detach().amax(-1, keepdim=True)       # the same softmax; +inf becomes NaN
    v = v - v.detach().amax(-1, keepdim=True)
    one_against_others = kl_divergence(_log_two_way(v, teacher_class), _log_two_way(z, student_class))
    among_several = kl_divergence(_log_softmax_among(v, among), _log_softmax_among(z, among))
    return one_against_others, among_several


def _log_two_way(x, one):
    """log p and log(1 - p) of the class that `one` marks, (B, 2); not finite if it marks none."""
    logit = x.masked_fill(~one, -torch.inf).amax(-1, keepdim=True)
    others = x.masked_fill(one, -torch.inf).logsumexp(-1, keepdim=True)
    log_odds = logit - others
    return F.logsigmoid(torch.cat([log_odds, -log_odds], -1))


def _log_softmax_among(x, among):
    """log_softmax over the classes that `among` marks; 0 at the others."""
    log_p = F.log_softmax(x.masked_fill(~among, -torch.inf), -1)
    return log_p.masked_fill(~among, 0.0)


def reduce(losses, reduction):
    """The mean of the samples' losses, (B,) or (B, 1); with reduction "none" the losses, (B,)."""
    if reduction == "mean":
        return losses.mean()
    if reduction == "none":
        return losses.flatten()
    raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')


def _full_precision(logits):
    """float64 as it is, float32 for all else: half precision and float8 have too few digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(logits, base_temp, min_classes=2):
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.numel() == 0 or logits.shape[-1] < min_classes:
        raise ValueError(f"logits need at least 1 row of {min_classes} classes, got {tuple(logits.shape)}")
    if isinstance(base_temp, torch.Tensor):
        if base_temp.dim() and base_temp.shape[-1] != 1:        # (B,) would divide the classes if B is K
            raise ValueError(f"a tensor temperature must be () or (B, 1), got {tuple(base_temp.shape)}")
    elif not 0 < base_temp < torch.inf:
        raise ValueError(f"the temperature must be a positive number, got {base_temp}")
