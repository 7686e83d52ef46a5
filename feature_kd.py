"""Eight feature-distillation methods, the baselines of the papers' tables. Copy this file; it needs torch.

    with torch.no_grad():                           # once: of any two images, both networks in eval mode
        (z, s), (v, t) = (network(images[:2], features=True) for network in (student, teacher))
    method = METHODS["crd"](student, teacher, s, t, labels, logits=(z, v)).to(images.device)
    optimizer = SGD([*student.parameters(), *method.parameters()], ...)
    student.train()

    logits, s = student(images, features=True)      # a step
    with torch.no_grad():
        _, t = teacher(images, features=True)       # frozen, in method.teacher_mode ("eval", OFD's "train")
    loss = F.cross_entropy(logits, target) + 0.8 * method(s, t, target, index)

    network = method.deploy(student)                # answers at test time: the student; for SimKD another

A network's features are any object with the fields
    post    its stages' maps (B, C, H, W), after their ReLU; without the stem
    pre     the same before it
    last    the map that global pooling averages
    pooled  its mean (B, C), the input of its classifier, an nn.Linear

Half precision is cast up to float32 before a loss is computed, autocast is off there; convolutions that learn
beside the student follow autocast. The teacher is detached. Every loss is a scalar, unweighted; a NaN shows.
The authors' own code, where it differs from their paper, is followed: it made the tables.

The tables' weights: FitNet 100, AT 1000, RKD 1, CRD 0.8, OFD 0.001; SimKD 1, without the cross-entropy;
ReviewKD 0.6 to 8 by pair, after a linear ramp of 20 epochs; CAT-KD 0.7 to 600 (recipes.py has the pairs').
OFD's teacher in training mode must not move its running statistics: momentum 0 in its batch norms.
"""

import math

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

EPS = 1e-12         # of norms, squared distances


# ---------------------------------------------------------------- functions of features


def at_loss(student_maps, teacher_maps, p=2):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017), as its users' code has it.

    Sum over the pairs of maps of the mean squared difference of attention: mean over the channels of map^p,
    flattened, divided by its L2 norm. Maps (B, C, H, W); the larger of a pair is average-pooled first. The
    longer sequence is cut.
    """
    def attention(x):
        return _unit(x.pow(p).mean(1).flatten(1))

    return sum(_mse(attention(s), attention(t)) for s, t in _pairs(student_maps, teacher_maps))


def rkd_loss(student, teacher, distance=25.0, angle=50.0):
    """Relational KD (Park et al., CVPR 2019): `distance` times RKD-D plus `angle` times RKD-A.

    student (B, D), teacher (B, D'), B >= 2. Huber loss (delta 1) between the pairs' distances, each side's
    divided by their mean, and between the triplets' cosines (B^3 of them). Two equal rows have no gradient.
    """
    def relations(x):
        difference = x[None] - x[:, None]                                       # (B, B, D): x_j - x_i
        other = 1 - torch.eye(len(x), device=x.device, dtype=x.dtype)
        d = difference.square().sum(-1).clamp(min=EPS).sqrt() * other
        e = _unit(difference)
        return d / (d.sum() / other.sum()), e @ e.mT        # RKD-D's potential; RKD-A's, a cosine at i

    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError("RKD compares images, two at least, as many of both sides, got "
                         f"{tuple(student.shape)} and {tuple(teacher.shape)}")
    with _full_precision(student):
        (d, a), (d_teacher, a_teacher) = relations(_up(student)), relations(_up(teacher.detach()))
        return distance * F.smooth_l1_loss(d, d_teacher) + angle * F.smooth_l1_loss(a, a_teacher)


def nce_loss(scores, n_data):
    """CRD's noise-contrastive loss (Tian et al., ICLR 2020), batch mean.

    scores (B, 1 + K): the positive's, then K negatives'; n_data: the number of images that these are of.
    """
    with _full_precision(scores):
        x = _up(scores)
        k = x.shape[1] - 1
        q = k / n_data
        log_d = torch.cat([(x[:, :1] / (x[:, :1] + q + 1e-7)).log(), (q / (x[:, 1:] + q + 1e-7)).log()], 1)
        return -log_d.sum() / len(x)


def ofd_margin(norm):
    """The mean of the negative part of a batch norm's output, for each channel (C,), float64 on the CPU.

    The output is taken as N(beta, gamma^2) (Heo et al., ICCV 2019); -3 |gamma| where less than a
    thousandth of it is negative, min(beta, 0) where gamma is 0.
    """
    mean, sigma = (x.detach().cpu().double() for x in (norm.bias, norm.weight.abs()))
    ratio = mean / torch.where(sigma == 0, 1.0, sigma)
    negative = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    margin = torch.where(negative > 1e-3, mean - sigma * density / negative, -3 * sigma)
    return torch.where(sigma == 0, mean.clamp(max=0), margin)


def ofd_loss(student_maps, teacher_maps, margins):
    """Overhaul's partial L2 distance (Heo et al., ICCV 2019); of maps of the same shapes.

    Per image: (s - max(t, margin))^2 where s is above that or t is positive, summed; a stage counts half as
    much as the next. margins: (C,) a stage, as `ofd_margin`.
    """
    loss = 0
    for s, t, margin in zip(student_maps, teacher_maps, margins, strict=True):
        with _full_precision(s):
            s, t = _paired(_up(s), _up(t.detach()))
            target = torch.maximum(t, margin.to(t)[:, None, None])
            counts = ((s > target) | (t > 0)).to(s.dtype)       # a product: a NaN stays one
            loss = loss / 2 + ((s - target).square() * counts).sum() / len(s)
    return loss


def hcl_loss(student_maps, teacher_maps):
    """ReviewKD's hierarchical context loss (Chen et al., CVPR 2021); of maps of the same shapes.

    For a pair the weighted mean of the MSE at full size (1) and of the maps average-pooled to 4, 2 and 1
    where they are larger (1/2, 1/4, 1/8). Summed over the pairs.
    """
    loss = 0
    for s, t in zip(student_maps, teacher_maps, strict=True):
        sides = [side for side in (4, 2, 1) if side < min(s.shape[-2:])]
        weights = [2.0**-i for i in range(len(sides) + 1)]
        terms = [_mse(s, t)] + [_mse(_averaged(s, side), _averaged(t, side)) for side in sides]
        loss = loss + sum(w * term for w, term in zip(weights, terms)) / sum(weights)
    return loss


def cam_loss(student_cam, teacher_cam, resolution=None, normalize=False):
    """CAT-KD (Guo et al., CVPR 2023): MSE of class activation maps (B, K, H, W).

    resolution: they are averaged to so many pixels a side first; None: they are already. normalize: each
    class's map is divided by its L2 norm; a zero map then has no gradient.
    """
    def normal(x):
        x = _averaged(x, resolution) if resolution else x
        return _unit(x.flatten(2)) if normalize else x

    with _full_precision(student_cam):
        return _mse(normal(_up(student_cam)), normal(_up(teacher_cam.detach())))


def _full_precision(x):
    return torch.autocast(x.device.type, enabled=False)


def _up(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mse(s, t):
    with _full_precision(s):
        return F.mse_loss(*_paired(_up(s), _up(t.detach())))


def _paired(s, t):
    """Both, or a ValueError: PyTorch would broadcast one to the other."""
    if s.shape != t.shape:
        raise ValueError(f"features of one shape are needed, got {tuple(s.shape)} and {tuple(t.shape)}")
    return s, t


def _unit(x):
    """x / |x| along the last axis; a zero vector stays zero, without a gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, x / norm.clamp(min=EPS))


def _averaged(x, *size):
    """Average-pooled to size, (height, width) or a side; without remainders not by the adaptive form, which
    has no deterministic gradient on CUDA."""
    x, size = _up(x), (size[0], size[-1])
    if all(n % m == 0 for n, m in zip(x.shape[2:], size)):
        kernel = x.shape[2] // size[0], x.shape[3] // size[1]
        return F.avg_pool2d(x, kernel) if kernel != (1, 1) else x
    return F.adaptive_avg_pool2d(x, size)


def _matched(s, t):
    """Two maps, the larger average-pooled to the other's size."""
    if s.dim() != 4 or t.dim() != 4:
        raise ValueError(f"maps (B, C, H, W) are needed, got {tuple(s.shape)} and {tuple(t.shape)}")
    size = [*map(min, s.shape[2:], t.shape[2:])]
    return (_averaged(x, *size) for x in (s, t))


def _pairs(student_maps, teacher_maps):
    for s, t in zip(student_maps, teacher_maps):
        with _full_precision(s):
            yield _matched(_up(s), _up(t.detach()))


# ---------------------------------------------------------------- the methods


class Method(nn.Module):
    """What learns with the student, and the loss. Made of both networks and their features of one batch.

    logits: of that batch, of both; they tell a classifier from another linear layer. ValueError, one line,
    where the method does not take these networks. reads: which of the teacher's
    features, of its first `depth` stages where that is not None. notice: a line for people, or empty.
    """

    teacher_mode, reads, depth, notice = "eval", (), None, ""

    def forward(self, s, t, target=None, index=None):
        """The loss, a scalar. s, t: features of one batch; index (B,): its images' places (CRD)."""
        raise NotImplementedError

    def loss_and_logits(self, logits, s, t, target=None, index=None):
        """(loss, logits of the network that is deployed)."""
        return self(s, t, target, index), logits

    def deploy(self, student):
        """The network that answers at test time. It shares what it has of the student."""
        return student


class FitNet(Method):
    """FitNets' hint (Romero et al., ICLR 2015), one stage of training: after stage 2, by a regressor."""

    reads, depth = ("post",), 2

    def __init__(self, student, teacher, s, t, labels=None, *, logits=None):
        super().__init__()
        (c, h), (c_teacher, h_teacher) = (_shape(_stages("FitNet", x, f, 2)[1])
                                          for x, f in ((student, s), (teacher, t)))
        if h == h_teacher:
            regressor = nn.Conv2d(c, c_teacher, 1)
        elif h == 2 * h_teacher:
            regressor = nn.Conv2d(c, c_teacher, 3, 2, 1)
        elif 2 * h == h_teacher:
            regressor = nn.ConvTranspose2d(c, c_teacher, 4, 2, 1)
        else:
            raise ValueError(f"FitNet: the second stages' maps are {h} and {h_teacher} pixels wide; it takes "
                             "equal ones, or one twice the other")
        self.regressor = nn.Sequential(regressor, nn.BatchNorm2d(c_teacher), nn.ReLU())

    def forward(self, s, t, target=None, index=None):
        return _mse(self.regressor(_fit(s.post[1])), t.post[1])


class AT(Method):
    """Attention transfer of all stages: see `at_loss`."""

    reads = ("post",)

    def __init__(self, student, teacher, s, t, labels=None, *, logits=None):
        super().__init__()
        n = [len(_stages("AT", x, f)) for x, f in ((student, s), (teacher, t))]
        if n[0] != n[1]:
            self.notice = (f"AT: {_name(student)} has {n[0]} stages, {_name(teacher)} {n[1]}; the first "
                           f"{min(n)} are paired")

    def forward(self, s, t, target=None, index=None):
        return at_loss(s.post, t.post)


class RKD(Method):
    """Relational KD of the pooled features: see `rkd_loss`."""

    reads = ("pooled",)

    def __init__(self, student, teacher, s, t, labels=None, *, logits=None):
        super().__init__()
        _check_pooled("RKD", student, teacher, s, t)

    def forward(self, s, t, target=None, index=None):
        return rkd_loss(s.pooled, t.pooled)


class CRD(Method):
    """Contrastive representation distillation (Tian et al., ICLR 2020), its "exact" form.

    labels: the classes (n,) of all training images. Two banks hold each image's embedding of student and
    teacher; a sample's negatives are 16,384 images of other classes, drawn anew, without replacement (with it
    where there are fewer, or more than LARGE images). The draws are torch's global generator's. In training a
    call updates the banks: one a step, else later micro-batches meet newer banks.
    """

    reads = ("pooled",)
    WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 16384, 0.07, 0.5
    LARGE = 2**17       # images; a batch's draw without replacement takes memory for all of them

    def __init__(self, student, teacher, s, t, labels=None, *, logits=None):
        super().__init__()
        _check_pooled("CRD", student, teacher, s, t)
        labels = torch.as_tensor([] if labels is None else labels)
        if labels.dim() != 1 or not len(labels) or labels.is_floating_point() or labels.min() < 0:
            raise ValueError("CRD needs labels, the class numbers (n,) of all training images")
        self.embed_s, self.embed_t = (nn.Linear(f.pooled.shape[1], self.WIDTH) for f in (s, t))
        bound = 1 / math.sqrt(self.WIDTH / 3)
        for name in ("bank_s", "bank_t"):
            self.register_buffer(name, torch.empty(len(labels), self.WIDTH).uniform_(-bound, bound))
        for name in ("z_s", "z_t"):         # normalisation constants, of the first batch
            self.register_buffer(name, torch.tensor(-1.0))
        counts = labels.bincount()
        others = len(labels) - int(counts.max())
        if not others:
            raise ValueError("CRD needs images of more than one class")
        self.distinct = others >= self.NEGATIVES and len(labels) <= self.LARGE
        if not self.distinct:
            why = f"a class has {others:,} images of others" if others < self.NEGATIVES else "memory"
            self.notice = f"CRD: {self.NEGATIVES:,} negatives are drawn with replacement ({why})"
        for name, x in (("labels", labels), ("order", labels.argsort(stable=True)), ("counts", counts),
                        ("starts", counts.cumsum(0) - counts)):
            self.register_buffer(name, x, persistent=False)

    def forward(self, s, t, target=None, index=None):
        if index is None or len(index) != len(s.pooled):
            raise ValueError("CRD needs index (B,), the images' places among the training images")
        with _full_precision(s.pooled):
            x, y = self.embed_s(_up(s.pooled)), self.embed_t(_up(t.pooled.detach()))
            x, y = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in (x, y))
            chosen = torch.cat([index[:, None], self._negatives(index)], 1)
            loss = 0
            for v, bank, z in ((x, self.bank_t, self.z_s), (y, self.bank_s, self.z_t)):
                # of one product with the bank, 30 times as fast as gathering its rows; a copy, as it changes
                scores = (F.linear(v, bank.clone()).gather(1, chosen) / self.TEMPERATURE).exp()
                new = torch.where(z < 0, scores.detach().mean() * len(bank), z)
                loss = loss + nce_loss(scores / new, len(bank))
                if self.training:
                    z.copy_(new)
            if self.training:
                self._remember(index, x.detach(), y.detach())
            return loss

    def _negatives(self, index):
        """(B, K) images of other classes than those of images `index` (B,)."""
        label, n = self.labels[index], len(self.labels)
        if self.distinct:
            keys = torch.rand(len(index), n, device=index.device)
            keys.masked_fill_(self.labels == label[:, None], -1)
            return keys.topk(self.NEGATIVES, sorted=False).indices
        count, start = (x[label][:, None] for x in (self.counts, self.starts))
        place = torch.randint(2**62, (len(index), self.NEGATIVES), device=index.device) % (n - count)
        return self.order[place + count * (place >= start)]

    @torch.no_grad()
    def _remember(self, index, x, y):
        for bank, new in ((self.bank_s, x), (self.bank_t, y)):
            mixed = bank[index] * self.MOMENTUM + new.to(bank) * (1 - self.MOMENTUM)
            bank[index] = mixed / torch.linalg.vector_norm(mixed, dim=1, keepdim=True)


class OFD(Method):
    """A comprehensive overhaul of feature distillation (Heo et al., ICCV 2019): before the ReLU, margin ReLU.

    The teacher normalises by the batch, as its authors mean it. It needs `teacher.norms_before_relu()`: the
    batch norm of each stage's last output before its ReLU.
    """

    teacher_mode, reads = "train", ("pre",)

    def __init__(self, student, teacher, s, t, labels=None, *, logits=None):
        super().__init__()
        _check_stages("OFD", student, teacher, s.pre, t.pre)
        norms = teacher.norms_before_relu() if hasattr(teacher, "norms_before_relu") else []
        if len(norms) != len(t.pre):
            raise ValueError(f"OFD takes no {_name(teacher)} as a teacher: its norms_before_relu() names "
                             f"{len(norms)} batch norms right before the last ReLUs of {len(t.pre)} stages")
        self.connectors = nn.ModuleList()
        for i, (own, target, norm) in enumerate(zip(s.pre, t.pre, norms, strict=True)):
            c, c_teacher = own.shape[1], target.shape[1]
            conv = nn.Conv2d(c, c_teacher, 1, bias=False)
            nn.init.normal_(conv.weight, std=math.sqrt(2 / c_teacher))
            self.connectors.append(nn.Sequential(conv, nn.BatchNorm2d(c_teacher)))
            self.register_buffer(f"margin{i}", ofd_margin(norm).to(norm.weight.dtype), persistent=False)

    def forward(self, s, t, target=None, index=None):
        maps = [connector(_fit(x)) for connector, x in zip(self.connectors, s.pre)]
        # no gradient flows here, so that the adaptive form serves; a smaller map is repeated
        targets = [F.adaptive_avg_pool2d(_up(y.detach()), x.shape[-2:]) for x, y in zip(maps, t.pre)]
        return ofd_loss(maps, targets, [getattr(self, f"margin{i}") for i in range(len(maps))])


class ReviewKD(Method):
    """Knowledge review (Chen et al., CVPR 2021): residual fusion from deep to shallow levels.

    Levels: the stages' maps, the teacher's before their ReLU, and the pooled vector as a map of 1 x 1.
    """

    reads = "pre", "pooled"

    def __init__(self, student, teacher, s, t, labels=None, *, logits=None):
        super().__init__()
        _check_stages("ReviewKD", student, teacher, s.post, t.pre)
        _check_pooled("ReviewKD", student, teacher, s, t)
        self.mid = min(512, s.pooled.shape[1])
        self.reduce, self.attend, self.restore = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for x, y in zip(self._levels(s.post, s.pooled), self._levels(t.pre, t.pooled)):
            reduce = nn.Conv2d(x.shape[1], self.mid, 1, bias=False)
            restore = nn.Conv2d(self.mid, y.shape[1], 3, padding=1, bias=False)
            for conv in (reduce, restore):
                nn.init.kaiming_uniform_(conv.weight, a=1)
            self.reduce.append(nn.Sequential(reduce, nn.BatchNorm2d(self.mid)))
            self.restore.append(nn.Sequential(restore, nn.BatchNorm2d(y.shape[1])))
            if len(self.attend) < len(s.post):      # the deepest, the last, has nothing to be fused with
                self.attend.append(nn.Conv2d(2 * self.mid, 2, 1))

    @staticmethod
    def _levels(maps, pooled):
        return [*maps, pooled[:, :, None, None]]

    def forward(self, s, t, target=None, index=None):
        targets, fused, y = self._levels(t.pre, t.pooled), [], None
        for i, x in reversed(list(enumerate(self._levels(s.post, s.pooled)))):
            x = self.reduce[i](_fit(x))
            if y is not None:
                y = F.interpolate(y, x.shape[-2:])
                a = self.attend[i](torch.cat([x, y], 1)).sigmoid()
                x = x * a[:, :1] + y * a[:, 1:]
            if x.shape[-1] != targets[i].shape[-1]:
                x = F.interpolate(x, targets[i].shape[-2:])
            fused.insert(0, self.restore[i](x))
            y = x
        return hcl_loss(fused, targets)


class SimKD(Method):
    """Reused teacher classifier (Chen et al., CVPR 2022): a projector makes the student's map the teacher's.

    Labels are not used, nor a cross-entropy. `deploy` puts together the student's body, the projector and the
    teacher's classifier, for which torch.fx must be able to trace the student; what else that has is frozen.
    factor: by how much the projector is narrower inside.
    """

    reads = ("last",)

    def __init__(self, student, teacher, s, t, labels=None, factor=2, *, logits=None):
        super().__init__()
        own, other = logits or (None, None)
        classifier = classifier_of("SimKD", teacher, t, other)
        classes = [m.out_features for m in student.modules() if isinstance(m, nn.Linear)][-1:]
        if own is not None:
            classes = [own.shape[1]]
        if classes != [classifier.out_features]:
            raise ValueError(f"SimKD: {_name(student)} has {classes[0] if classes else 'no'} classes, "
                             f"{_name(teacher)} {classifier.out_features}")
        stages = _stages("SimKD", student, s)
        stage = s.last.shape[1] != stages[-1].shape[1]      # of ShuffleV2 and MobileNetV2: before a 1x1 layer
        (c, h), (c_teacher, h_teacher) = _shape(stages[-1] if stage else s.last), _shape(t.last)
        if max(h, h_teacher) % min(h, h_teacher):
            raise ValueError(f"SimKD: the last maps are {h} and {h_teacher} pixels wide, and none is a "
                             "multiple of the other")
        self.stage, self.stride = stage, max(1, h // h_teacher)
        self.form = c, c_teacher, factor, self.stride, stage, classifier.out_features
        whole = Reuse(student, *self.form)
        self.projector, self.fc = whole.projector, whole.fc
        self.networks = student, trimmed(whole)         # not registered: the second has the first in it
        with torch.no_grad():
            self.fc.weight.copy_(classifier.weight)
            self.fc.bias.copy_(0 if classifier.bias is None else classifier.bias)
        self.fc.requires_grad_(False)
        lives = set(self.networks[1].parameters())
        for parameter in student.parameters():
            if parameter not in lives:
                parameter.requires_grad_(False)

    def forward(self, s, t, target=None, index=None):
        return self.loss_and_logits(None, s, t)[0]

    def loss_and_logits(self, logits, s, t, target=None, index=None):
        x = _fit(s.post[-1] if self.stage else s.last)
        x = self.projector(_reduced(x, self.stride))
        return _mse(*_matched(x, t.last)), self.fc(_pool(x))

    def deploy(self, student):
        if student is not self.networks[0]:
            raise ValueError("SimKD deploys the student that it was made with, not a copy")
        return self.networks[1]


class CATKD(Method):
    """Class attention transfer (Guo et al., CVPR 2023): maps of the classes' logits, averaged to r x r.

    The student's classifier begins anew, without a bias; fresh=False keeps its weight.
    """

    reads = ("last",)

    def __init__(self, student, teacher, s, t, labels=None, resolution=2, normalize=False, fresh=True, *,
                 logits=None):
        super().__init__()
        z, v = logits or (None, None)
        self.heads = classifier_of("CAT-KD", student, s, z), classifier_of("CAT-KD", teacher, t, v)
        self.resolution, self.normalize = resolution, normalize
        own, other = (x.out_features for x in self.heads)
        if own != other:
            raise ValueError(f"CAT-KD: {_name(student)} has {own} classes, {_name(teacher)} {other}")
        with torch.no_grad():
            weight, bias = self.heads[0].weight, self.heads[0].bias
            if fresh and _name(student).lower().startswith(("vgg", "shuffle")):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))        # PyTorch's own
            elif fresh:
                nn.init.normal_(weight, std=math.sqrt(2 / own))
            if bias is not None:
                bias.zero_().requires_grad_(False)

    def forward(self, s, t, target=None, index=None):
        # the mean and the 1x1 convolution commute: on fewer pixels first
        cams = [F.conv2d(_fit(_averaged(f.last, self.resolution)), _fit(layer.weight)[:, :, None, None])
                for f, layer in zip((s, t), self.heads)]
        return cam_loss(*cams, normalize=self.normalize)


METHODS = {"fitnet": FitNet, "at": AT, "rkd": RKD, "crd": CRD, "ofd": OFD, "reviewkd": ReviewKD,
           "simkd": SimKD, "catkd": CATKD}


class Reuse(nn.Module):
    """SimKD's network at test time, images -> logits; `trimmed` it is without the student's classifier.

    c, c_teacher: channels of the student's map and of the teacher's; stride: how much larger the first is;
    stage: whether it is the last stage's, not `last`. `SimKD.form` has these and the rest, in this order.
    """

    def __init__(self, student, c, c_teacher, factor, stride, stage, classes):
        super().__init__()
        self.stride, self.stage, mid, layers = stride, stage, c_teacher // factor, []
        for inp, out, kernel in ((c, mid, 1), (mid, mid, 3), (mid, c_teacher, 1)):
            layers += [nn.Conv2d(inp, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out),
                       nn.ReLU()]
        self.student, self.projector, self.fc = student, nn.Sequential(*layers), nn.Linear(c_teacher, classes)

    def forward(self, x):
        _, f = self.student(x, features=True)
        x = f.post[-1] if self.stage else f.last
        return self.fc(_pool(self.projector(_reduced(x, self.stride))))


def trimmed(network):
    """A Reuse without the parts that its output does not depend on, as a graph of the same modules.

    It is for evaluation. ValueError where torch.fx cannot trace its student.
    """
    modes = {m: m.training for m in network.modules()}
    try:
        traced = torch.fx.symbolic_trace(network.eval())        # or a function's dropout would be the graph's
    except Exception as error:      # of any network, any
        raise ValueError(f"SimKD: {_name(network.student)} cannot be traced by torch.fx "
                         f"({str(error).partition(chr(10))[0] or type(error).__name__})") from None
    finally:
        for m, mode in modes.items():
            m.training = mode
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def classifier_of(method, network, features, logits=None):
    """The linear layer that makes a network's logits (B, K) of the mean of its map `last`.

    ValueError where there is none (another pooling, a norm between), or several may be and logits is None.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if features.last is not None:
        layers = [m for m in layers if m.in_features == features.last.shape[1]]
        if logits is not None:
            layers = [m for m in layers if m.out_features == logits.shape[1]
                      and _makes(m, _pool(features.last), logits)]
    if features.last is None or not layers:
        raise ValueError(f"{method}: no linear layer of {_name(network)} makes its logits from the mean of "
                         "its last map")
    if logits is None and len(layers) > 1:
        raise ValueError(f"{method}: {_name(network)} has {len(layers)} linear layers of that size; give "
                         "logits=(student's, teacher's)")
    return layers[-1]


def _makes(layer, x, logits):
    """Whether a linear layer makes these logits of x, to a thousandth of the largest in float32."""
    x, logits, weight = _up(x), _up(logits), _up(layer.weight)
    bias = None if layer.bias is None else _up(layer.bias)
    rounding = max(1e-3, 8 * torch.finfo(layer.weight.dtype).eps)       # of a network in half precision
    with _full_precision(x):
        error = (F.linear(x, weight, bias) - logits).abs().amax()
    return bool(error <= rounding * logits.abs().amax())


def _name(network):
    return getattr(network, "name", type(network).__name__)


def _shape(x):
    """(channels, side) of a map."""
    return x.shape[1], x.shape[-1]


def _pool(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _reduced(x, stride):
    return F.avg_pool2d(x, stride) if stride > 1 else x


def _fit(x):
    """A feature as a connector's input: autocast casts by itself, half precision is cast up elsewhere."""
    return x if torch.is_autocast_enabled(x.device.type) else _up(x)


def _stages(method, network, features, least=1):
    if len(features.post or ()) < least:
        raise ValueError(f"{method} needs the maps of a network's stages, {least} at least: {_name(network)} "
                         f"gives {len(features.post or ()) or 'none'}")
    return features.post


def _check_stages(method, student, teacher, own, other):
    n = len(own or ()), len(other or ())
    if n[0] != n[1] or not all(n):
        raise ValueError(f"{method} pairs the stages' maps: {_name(student)} gives {n[0]}, "
                         f"{_name(teacher)} {n[1]}")


def _check_pooled(method, student, teacher, s, t):
    for network, features in ((student, s), (teacher, t)):
        if features.pooled is None:
            raise ValueError(f"{method} needs pooled features: {_name(network)} gives none")
