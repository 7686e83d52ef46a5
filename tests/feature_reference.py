"""Eight feature-distillation losses written down once more from shared/reference/features.md, section 2.

A second, independent implementation to test the fast one against: slow and literal. Every function computes
in the dtype that it is given, is differentiable in the student's maps and in the trained tensors, holds the
teacher's maps constant and returns the feature loss alone: no cross-entropy, no method's weight, no ramp.

Maps are (B, C, side, side), pooled features (B, C). A convolution and its batch norm are a dict of tensors:
    conv_weight, conv_bias (where there is one), bn_weight, bn_bias, bn_mean, bn_var
bn_mean and bn_var are the running statistics, used with training=False alone; without them 0 and 1 are used.
"""

import math

import torch
import torch.nn.functional as F


# -------------------------------------------------------- what several methods need


def batch_norm(x, weight, bias, mean=None, var=None, training=True, eps=1e-5):
    """Per channel, over samples and pixels: in training the batch's mean and biased variance."""
    channels = []
    for c in range(x.shape[1]):
        values = x[:, c]
        if training:
            centre = values.mean()
            spread = ((values - centre) ** 2).mean()
        else:
            centre = 0.0 if mean is None else mean[c]
            spread = torch.ones_like(values[0, 0, 0]) if var is None else var[c]
        channels.append((values - centre) / torch.sqrt(spread + eps) * weight[c] + bias[c])
    return torch.stack(channels, 1)


def bn_of(x, state, training, name="bn"):
    """The batch norm `name` of a dict."""
    return batch_norm(x, state[f"{name}_weight"], state[f"{name}_bias"], state.get(f"{name}_mean"),
                      state.get(f"{name}_var"), training)


def average_pool(x, side):
    """Adaptive average: cell (i, j) is the mean over rows floor(i h / side) to ceil((i + 1) h / side) - 1."""
    h, w = x.shape[2:]
    rows = []
    for i in range(side):
        top, bottom = (i * h) // side, math.ceil((i + 1) * h / side)
        cells = []
        for j in range(side):
            left, right = (j * w) // side, math.ceil((j + 1) * w / side)
            cells.append(x[:, :, top:bottom, left:right].mean((2, 3)))
        rows.append(torch.stack(cells, -1))
    return torch.stack(rows, -2)


def nearest_resize(x, side):
    """Pixel (i, j) is the pixel (floor(i h / side), floor(j w / side)) of x."""
    h, w = x.shape[2:]
    rows = [(i * h) // side for i in range(side)]
    columns = [(j * w) // side for j in range(side)]
    return x[:, :, rows][:, :, :, columns]


def l2_normalize(x, dim, eps=1e-12):
    """x / max(|x|, eps), the L2 norm over `dim`."""
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps)


def huber(a, b):
    """Smooth L1 with beta = 1, element by element: d^2 / 2 where |d| < 1, else |d| - 1/2."""
    d = (a - b).abs()
    return torch.where(d < 1, 0.5 * d ** 2, d - 0.5)


def mse(a, b):
    """Mean squared difference over all elements."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b) ** 2).mean()


# -------------------------------------------------------- 2.1 FitNet


def fitnet(student_map, target, state, training):
    """Section 2.1: mean((R(student) - target)^2), R = convolution with bias, batch norm, ReLU.

    The transposed convolution's conv_weight is (C_s, C_t, 4, 4), PyTorch's order.
    """
    hs, ht = student_map.shape[2], target.shape[2]
    weight, bias = state["conv_weight"], state["conv_bias"]
    if hs == ht:
        kernel = 1
        x = F.conv2d(student_map, weight, bias)
    elif hs == 2 * ht:
        kernel = 3
        x = F.conv2d(student_map, weight, bias, stride=2, padding=1)
    elif 2 * hs == ht:
        kernel = 4
        x = F.conv_transpose2d(student_map, weight, bias, stride=2, padding=1)
    else:
        raise ValueError(f"no regressor from side {hs} to side {ht}")
    assert weight.shape[2:] == (kernel, kernel), (weight.shape, kernel)
    x = torch.relu(bn_of(x, state, training))
    return mse(x, target.detach())


# -------------------------------------------------------- 2.2 AT


def at(student_maps, teacher_maps, p=2):
    """Section 2.2: per stage the mean squared difference of the attention maps, summed over the stages."""
    loss = 0.0
    for s, t in zip(student_maps, teacher_maps):        # by index, to the shorter list
        t = t.detach()
        side = min(s.shape[2], t.shape[2])
        if s.shape[2] > side:
            s = average_pool(s, side)
        if t.shape[2] > side:
            t = average_pool(t, side)
        loss = loss + mse(attention(s, p), attention(t, p))
    return loss


def attention(f, p):
    """A(f) = normalize(flatten(mean over channels of f^p)): (B, H W)."""
    return l2_normalize((f ** p).mean(1).flatten(1), dim=1)


# -------------------------------------------------------- 2.3 RKD


def rkd(student_pooled, teacher_pooled, distance=25.0, angle=50.0):
    """Section 2.3: distance * Huber mean over B^2 + angle * Huber mean over B^3."""
    teacher_pooled = teacher_pooled.detach()
    by_distance = huber(rkd_distances(student_pooled), rkd_distances(teacher_pooled)).mean()
    by_angle = huber(rkd_angles(student_pooled), rkd_angles(teacher_pooled)).mean()
    return distance * by_distance + angle * by_angle


def rkd_distances(f):
    """(B, B): d_ij = sqrt(max(|f_i|^2 + |f_j|^2 - 2 f_i f_j, 1e-12)), d_ii = 0; over the mean of d > 0."""
    rows = []
    for i in range(len(f)):
        square = (f[i] ** 2).sum() + (f ** 2).sum(1) - 2 * (f[i] * f).sum(1)        # one for each j
        d = torch.sqrt(square.clamp_min(1e-12))
        diagonal = torch.arange(len(f), device=f.device) == i
        rows.append(torch.where(diagonal, torch.zeros_like(d), d))
    d = torch.stack(rows)
    return d / d[d > 0].mean()


def rkd_angles(f):
    """(B, B, B): e_ijk = cosine at vertex i between f_j - f_i and f_k - f_i, 0 where j = i or k = i."""
    vertices = []
    for i in range(len(f)):
        e = l2_normalize(f - f[i], dim=1)                           # one row for each j
        vertices.append((e[:, None, :] * e[None, :, :]).sum(2))      # (j, k)
    return torch.stack(vertices)


# -------------------------------------------------------- 2.4 CRD


def crd_step(v_s_pooled, v_t_pooled, W_s, b_s, W_t, b_t, bank_s, bank_t, z_s, z_t, index, negatives, n,
             temperature=0.07, momentum=0.5):
    """Section 2.4: (loss, new bank_s, new bank_t, z_s, z_t) of one batch; the banks given stay untouched.

    index (B,) and negatives (B, K) are rows of the banks (n, 128). z_s and z_t: None before the first batch,
    then the numbers that it returned. Both embeddings train; banks and constants have no gradient.
    """
    v_t_pooled, bank_s, bank_t = v_t_pooled.detach(), bank_s.detach(), bank_t.detach()
    v_s = crd_embed(v_s_pooled, W_s, b_s)
    v_t = crd_embed(v_t_pooled, W_t, b_t)
    x_s = crd_scores(v_s, bank_t, index, negatives, temperature)        # student against the teacher's bank
    x_t = crd_scores(v_t, bank_s, index, negatives, temperature)
    if z_s is None:
        z_s = x_s.detach().mean() * n
    if z_t is None:
        z_t = x_t.detach().mean() * n
    loss = crd_nce(x_s / z_s, n) + crd_nce(x_t / z_t, n)
    new_bank_s = crd_update(bank_s, v_s.detach(), index, momentum)
    new_bank_t = crd_update(bank_t, v_t.detach(), index, momentum)
    return loss, new_bank_s, new_bank_t, z_s, z_t


def crd_embed(pooled, weight, bias):
    """v = (W pooled + b) / |W pooled + b|, no eps."""
    v = torch.stack([(weight * row).sum(1) + bias for row in pooled])
    return v / torch.sqrt((v ** 2).sum(1, keepdim=True))


def crd_scores(v, bank, index, negatives, temperature):
    """(B, 1 + K): exp(v_b bank[c] / T) for c = [index_b, negatives_b]."""
    rows = []
    for b in range(len(v)):
        c = torch.cat([index[b:b + 1], negatives[b]])
        rows.append(torch.exp((bank[c] * v[b]).sum(1) / temperature))
    return torch.stack(rows)


def crd_nce(x, n, eps=1e-7):
    """-1/B sum_b [log(x_0 / (x_0 + q + eps)) + sum_k log(q / (x_k + q + eps))], q = K / n."""
    q = (x.shape[1] - 1) / n
    total = 0.0
    for row in x:
        total = total + torch.log(row[0] / (row[0] + q + eps))
        total = total + torch.log(q / (row[1:] + q + eps)).sum()
    return -total / len(x)


def crd_update(bank, v, index, momentum):
    """A copy of the bank whose rows `index` are normalize(momentum * old + (1 - momentum) * v), no eps."""
    new = bank.clone()
    for b in range(len(v)):
        row = momentum * bank[index[b]] + (1 - momentum) * v[b]
        new[index[b]] = row / torch.sqrt((row ** 2).sum())
    return new


# -------------------------------------------------------- 2.5 OFD


def ofd_margin(gamma, beta):
    """Section 2.5: the margins of one batch norm's channels, a float64 vector.

    The mean of the negative part of N(beta, gamma^2); -3 sigma where its probability is at most 0.001. At
    gamma = 0 the limit: beta where it is negative, else 0.
    """
    margins = []
    for g, b in zip(gamma, beta):
        sigma, b = abs(float(g)), float(b)
        if sigma == 0:
            margins.append(min(b, 0.0))
            continue
        x = b / sigma
        density = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)             # phi(beta / sigma)
        below = 0.5 * (1 + math.erf(-x / math.sqrt(2)))                     # Phi(-beta / sigma)
        margins.append(b - sigma * density / below if below > 0.001 else -3 * sigma)
    return torch.tensor(margins, dtype=torch.float64)


def ofd(student_maps, teacher_maps, gammas, betas, connectors, training):
    """Section 2.5: maps before the stages' last ReLU, stages 1..n; gammas, betas: the teacher's, per stage.

    connectors: per stage conv_weight (C_t, C_s, 1, 1), bn_weight, bn_bias; `training` is their mode.
    """
    n = len(student_maps)
    assert n == len(teacher_maps) == len(gammas) == len(betas) == len(connectors)
    loss = 0.0
    for k in range(1, n + 1):
        connector = connectors[k - 1]
        s = bn_of(F.conv2d(student_maps[k - 1], connector["conv_weight"]), connector, training)
        t = average_pool(teacher_maps[k - 1].detach(), s.shape[2])          # a smaller map is repeated
        m = ofd_margin(gammas[k - 1], betas[k - 1]).to(t)[None, :, None, None]
        clipped = torch.where(t > m, t, m)                                  # t' = max(t, m)
        counted = (s > clipped) | (t > 0)
        squares = torch.where(counted, (s - clipped) ** 2, torch.zeros_like(s))
        loss = loss + squares.sum() / len(s) / 2 ** (n - k)
    return loss


# -------------------------------------------------------- 2.6 ReviewKD


def reviewkd(student_maps_with_pooled, teacher_maps_with_pooled, levels, training=True):
    """Section 2.6: HCL of the fused student maps and the teacher's; all lists from shallow to deep.

    The last entry of both lists is the pooled feature, (B, C) or (B, C, 1, 1). levels: per entry
    conv1_weight, bn1_weight, bn1_bias, att_weight and att_bias (not in the last), conv2_weight, bn2_weight,
    bn2_bias; mean and var of bn1 and bn2 as above.
    """
    student = [as_map(f) for f in student_maps_with_pooled]
    teacher = [as_map(f) for f in teacher_maps_with_pooled]
    assert len(student) == len(teacher) == len(levels)
    deepest = len(levels) - 1
    outputs = [None] * len(levels)
    deeper = None                                       # the deeper level's fused map
    for i in range(deepest, -1, -1):
        level = levels[i]
        x = bn_of(F.conv2d(student[i], level["conv1_weight"]), level, training, "bn1")
        if i != deepest:
            y = nearest_resize(deeper, x.shape[2])
            a = torch.sigmoid(F.conv2d(torch.cat([x, y], 1), level["att_weight"], level["att_bias"]))
            x = x * a[:, 0:1] + y * a[:, 1:2]
        if x.shape[2] != teacher[i].shape[2]:
            x = nearest_resize(x, teacher[i].shape[2])
        deeper = x
        outputs[i] = bn_of(F.conv2d(x, level["conv2_weight"], padding=1), level, training, "bn2")
    return hcl(outputs, teacher)


def as_map(f):
    """Pooled features (B, C) as (B, C, 1, 1)."""
    return f[:, :, None, None] if f.dim() == 2 else f


def hcl(student_maps, teacher_maps):
    """Section 2.6: per map the weighted mean of MSEs at full size and pooled to 4, 2, 1; summed over maps."""
    total = 0.0
    for s, t in zip(student_maps, teacher_maps):
        s, t = as_map(s), as_map(t).detach()
        loss = mse(s, t)
        weight, weights = 1.0, 1.0
        for side in (4, 2, 1):
            if side < s.shape[2]:
                weight = weight / 2                     # 1/2, 1/4, 1/8 in the order of the levels used
                loss = loss + weight * mse(average_pool(s, side), average_pool(t, side))
                weights = weights + weight
        total = total + loss / weights
    return total


# -------------------------------------------------------- 2.7 SimKD


def simkd(student_map, teacher_map, convs, training=True):
    """Section 2.7: mean((P(student) - teacher)^2); the larger side is average-pooled to the smaller first."""
    target = teacher_map.detach()
    side = min(student_map.shape[2], target.shape[2])
    if target.shape[2] > side:
        target = average_pool(target, side)
    return mse(simkd_project(student_map, side, convs, training), target)


def simkd_project(student_map, side, convs, training):
    """The student's map pooled to `side`, then P: 1x1, 3x3, 1x1, no biases, each with batch norm and ReLU."""
    x = student_map
    if x.shape[2] > side:
        x = average_pool(x, side)
    assert [c["conv_weight"].shape[2] for c in convs] == [1, 3, 1]
    x = torch.relu(bn_of(F.conv2d(x, convs[0]["conv_weight"]), convs[0], training))
    x = torch.relu(bn_of(F.conv2d(x, convs[1]["conv_weight"], padding=1), convs[1], training))
    return torch.relu(bn_of(F.conv2d(x, convs[2]["conv_weight"]), convs[2], training))


def simkd_deployed(student_map, teacher_side, convs, classifier_weight, classifier_bias, training=False):
    """Section 2.7, inference: pool to the teacher's side if larger, P, global average, the teacher's head."""
    pooled = simkd_project(student_map, teacher_side, convs, training).mean((2, 3))
    return torch.stack([(classifier_weight * row).sum(1) + classifier_bias for row in pooled])


# -------------------------------------------------------- 2.8 CAT-KD


def catkd(student_last, teacher_last, student_weight, teacher_weight, resolution, normalize):
    """Section 2.8: mean squared difference of the class activation maps, pooled to resolution x resolution.

    The maps are computed at full size and pooled afterwards. Weights: (classes, C) or (classes, C, 1, 1); no
    biases. normalize: each sample's and class's pooled map over its L2 norm.
    """
    maps = []
    for last, weight in ((student_last, student_weight), (teacher_last.detach(), teacher_weight.detach())):
        pooled = average_pool(class_activation(last, weight.flatten(1)), resolution).flatten(2)
        maps.append(l2_normalize(pooled, dim=2) if normalize else pooled)
    return mse(*maps)


def class_activation(last, weight):
    """(B, classes, H, W): class c's map is the sum over channels of weight[c, k] * last[:, k]."""
    return torch.stack([(last * w[None, :, None, None]).sum(1) for w in weight], 1)
