"""Eight feature-distillation methods, the baselines of the papers' tables. Copy this file; it needs torch.

    with torch.no_grad():                           # once, two images, both networks in eval mode
        z, s = student(images[:2], features=True)
        v, t = teacher(images[:2], features=True)
    method = METHODS["crd"](student, teacher, s, t, labels, logits=(z, v)).to(images.device)
    optimizer = SGD([*student.parameters(), *method.parameters()], ...)
    student.train()

    logits, s = student(images, features=True)      # a step
    with torch.no_grad():
        _, t = teacher(images, features=True)       # frozen, in method.teacher_mode ("eval", OFD's "train")
    loss = F.cross_entropy(logits, target) + 0.8 * method(s, t, target, index)

    network = method.deploy(student)                # for inference: the student; for SimKD another network

A network's features are any object with the fields
    post    its stages' maps (B, C, H, W), after their ReLU; without the stem
    pre     the same before it
    last    the map that global pooling averages
    pooled  its mean (B, C), the input of its classifier, an nn.Linear

Half precision is cast up to float32 before a loss is computed; the connectors' convolutions follow autocast.
The teacher is detached. Every loss is a scalar, unweighted; a NaN stays visible. Where the authors' code
differs from their paper, the code is followed, as it made the tables.

The tables' weights: FitNet 100, AT 1000, RKD 1, CRD 0.8, OFD 0.001; SimKD 1, without the cross-entropy;
ReviewKD 0.6 to 8 by pair, after a linear ramp of 20 epochs; CAT-KD 0.7 to 600 (recipes.py has the pairs').
OFD's teacher in training mode must not change its running statistics: set momentum 0 in its batch norms.
"""

import math

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

EPS = 1e-12         # of norms and squared distances


# ---------------------------------------------------------------- functions of features


def at_loss(student_maps, teacher_maps, p=2):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017): a sum over the pairs of maps (B, C, H, W).

    The mean squared difference of attention, which is the mean over the channels of map^p, divided by its L2
    norm. The larger map of a pair is average-pooled first. The longer sequence is cut.
    """
    loss = 0
    for s, t in zip(student_maps, teacher_maps):
        s, t = _same_size(s, t.detach())
        attention = [_unit(x.pow(p).mean(1).flatten(1)) for x in (s, t)]
        loss = loss + _mse(*attention)
    return loss


def rkd_loss(student, teacher, distance=25.0, angle=50.0):
    """Relational KD (Park et al., CVPR 2019) of pooled features (B, D), (B, D'); B of at least 2.

    distance times the Huber loss (delta 1) between the pairs' distances, each side's divided by their mean,
    plus angle times that between the triplets' cosines. Two equal rows have no gradient. ValueError: B.
    """
    if not len(student) == len(teacher) > 1:
        raise ValueError("RKD compares at least two images, as many of both sides, got "
                         f"{len(student)} and {len(teacher)}")

    def relations(x):
        difference = x[None] - x[:, None]                       # (B, B, D): x_j - x_i
        other = 1 - torch.eye(len(x), device=x.device, dtype=x.dtype)
        squared = difference.square().sum(-1)
        distances = squared.clamp(min=EPS).sqrt() * other
        mean = distances.sum() / other.sum()
        direction = _unit(difference)
        cosines = direction @ direction.mT
        return distances / mean, cosines

    with _no_autocast(student):
        distances, cosines = relations(_up(student))
        teacher_distances, teacher_cosines = relations(_up(teacher.detach()))
        distance_loss = F.smooth_l1_loss(distances, teacher_distances)
        angle_loss = F.smooth_l1_loss(cosines, teacher_cosines)
        return distance * distance_loss + angle * angle_loss


def nce_loss(scores, n_data):
    """CRD's noise-contrastive loss (Tian et al., ICLR 2020), batch mean.

    scores (B, 1 + K): the positive's, then those of K negatives, drawn from n_data images.
    """
    with _no_autocast(scores):
        scores = _up(scores)
        positive = scores[:, :1]
        negative = scores[:, 1:]
        noise = negative.shape[1] / n_data
        p_positive = positive / (positive + noise + 1e-7)
        p_negative = noise / (negative + noise + 1e-7)
        likelihood = torch.cat([p_positive, p_negative], 1).log()
        return -likelihood.sum() / len(scores)


def ofd_margin(norm):
    """The mean of the negative part of a batch norm's output, for each channel (C,), float64 on the CPU.

    The output is taken as N(beta, gamma^2) (Heo et al., ICCV 2019); -3 |gamma| where less than a thousandth
    of it is negative, min(beta, 0) where gamma is 0.
    """
    mean = norm.bias.detach().cpu().double()
    sigma = norm.weight.detach().cpu().double().abs()
    ratio = mean / torch.where(sigma == 0, 1.0, sigma)
    negative = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    truncated_mean = mean - sigma * density / negative
    margin = torch.where(negative > 1e-3, truncated_mean, -3 * sigma)
    return torch.where(sigma == 0, mean.clamp(max=0), margin)


def ofd_loss(student_maps, teacher_maps, margins):
    """Overhaul's partial L2 distance (Heo et al., ICCV 2019), of maps of equal shapes.

    For each image the sum of (s - max(t, margin))^2 where s is above that or t is positive; a stage counts
    half as much as the next. margins: (C,) a stage, from `ofd_margin`.
    """
    loss = 0
    for s, t, margin in zip(student_maps, teacher_maps, margins, strict=True):
        with _no_autocast(s):
            s = _up(s)
            t = _up(t.detach())
            _check_shapes(s, t)
            margin = margin.to(t)[:, None, None]
            target = torch.maximum(t, margin)
            counts = (s > target) | (t > 0)
            squared = (s - target).square() * counts        # a product keeps a NaN
            loss = loss / 2 + squared.sum() / len(s)
    return loss


def hcl_loss(student_maps, teacher_maps):
    """ReviewKD's hierarchical context loss (Chen et al., CVPR 2021), of maps of equal shapes.

    A weighted mean of the MSE at full size (1) and of the maps average-pooled to 4, 2 and 1 pixels where they
    are larger (1/2, 1/4, 1/8), summed over the pairs.
    """
    loss = 0
    for s, t in zip(student_maps, teacher_maps, strict=True):
        pair = _mse(s, t)
        weight = total = 1.0
        for side in (4, 2, 1):
            if side < min(s.shape[-2:]):
                weight = weight / 2
                pooled = _mse(_average_pool(s, side), _average_pool(t, side))
                pair = pair + weight * pooled
                total += weight
        loss = loss + pair / total
    return loss


def cam_loss(student_cam, teacher_cam, resolution=None, normalize=False):
    """CAT-KD (Guo et al., CVPR 2023): MSE of class activation maps (B, K, H, W).

    resolution: average-pool to so many pixels a side first. normalize: divide each class's map by its L2
    norm; a zero map then has no gradient.
    """
    maps = []
    with _no_autocast(student_cam):
        for cam in (_up(student_cam), _up(teacher_cam.detach())):
            if resolution:
                cam = _average_pool(cam, resolution)
            maps.append(_unit(cam.flatten(2)) if normalize else cam)
        return _mse(*maps)


def _no_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


def _up(x):
    """float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mse(s, t):
    with _no_autocast(s):
        s, t = _up(s), _up(t.detach())
        _check_shapes(s, t)
        return F.mse_loss(s, t)


def _check_shapes(s, t):
    """PyTorch would broadcast one to the other."""
    if s.shape != t.shape:
        raise ValueError(f"features of one shape are needed, got {tuple(s.shape)} and {tuple(t.shape)}")


def _unit(x):
    """x / |x| along the last axis; a zero vector stays zero, without a gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0.0, x / norm.clamp(min=EPS))


def _normalize(x):
    """Rows / their norm; a zero row is NaN."""
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def _average_pool(x, height, width=None):
    """A map average-pooled to height x width. Where these divide it, the gradient is deterministic."""
    x, width = _up(x), width or height
    size = x.shape[2:]
    if size[0] % height or size[1] % width:
        return F.adaptive_avg_pool2d(x, (height, width))
    return F.avg_pool2d(x, (size[0] // height, size[1] // width))


def _same_size(s, t):
    """Two maps, the larger average-pooled to the other's size."""
    height, width = map(min, s.shape[2:], t.shape[2:])
    with _no_autocast(s):
        return _average_pool(s, height, width), _average_pool(t, height, width)


# ---------------------------------------------------------------- the methods


class Method(nn.Module):
    """What learns with the student, and the loss. Made of both networks and their features of one batch.

    logits: of that batch, of both networks; they identify the classifiers. ValueError, one line, where the
    method does not take these networks. reads: the teacher's features that are used, of its first `depth`
    stages (None: all); student_reads: the student's. notice: a line for people, or empty.
    """

    title, reads, student_reads = "", (), None
    teacher_mode, depth, notice = "eval", None, ""

    def __init__(self, student, teacher, s, t, labels=None, *, logits=(None, None), **options):
        super().__init__()
        self.check_fields(student, s, self.student_reads or self.reads)
        self.check_fields(teacher, t, self.reads)
        self.build(student, teacher, s, t, labels=labels, logits=logits, **options)

    def build(self, student, teacher, s, t, **_):
        """Makes what learns, from the shapes of the features."""

    def forward(self, s, t, target=None, index=None):
        """The loss, a scalar. s, t: features of one batch; index (B,): the images' numbers (CRD)."""
        raise NotImplementedError

    def loss_and_logits(self, logits, s, t, target=None, index=None):
        """(loss, logits of the network for inference)."""
        return self(s, t, target, index), logits

    def deploy(self, student):
        """The network for inference. It shares the student's modules."""
        return student

    def check_fields(self, network, features, fields):
        for field in fields:
            value = getattr(features, field)
            if value is None or len(value) == 0:
                raise ValueError(f"{self.title} needs the features `{field}`: {_name(network)} has none")

    def check_stages(self, student, teacher, own, other):
        if len(own) != len(other):
            raise ValueError(f"{self.title} pairs the stages' maps: {_name(student)} has {len(own)}, "
                             f"{_name(teacher)} {len(other)}")


class FitNet(Method):
    """FitNets' hint (Romero et al., ICLR 2015), one stage of training: after stage 2, by a regressor."""

    title, reads, depth = "FitNet", ("post",), 2

    def build(self, student, teacher, s, t, **_):
        if min(len(s.post), len(t.post)) < 2:
            raise ValueError(f"FitNet needs two stages: {_name(student)} has {len(s.post)}, "
                             f"{_name(teacher)} {len(t.post)}")
        channels, side = _channels_and_side(s.post[1])
        teacher_channels, teacher_side = _channels_and_side(t.post[1])
        if side == teacher_side:
            regressor = nn.Conv2d(channels, teacher_channels, 1)
        elif side == 2 * teacher_side:
            regressor = nn.Conv2d(channels, teacher_channels, 3, 2, 1)
        elif 2 * side == teacher_side:
            regressor = nn.ConvTranspose2d(channels, teacher_channels, 4, 2, 1)
        else:
            raise ValueError(f"FitNet: the second stages' maps have {side} and {teacher_side} pixels a side; "
                             "it takes equal ones, or one twice the other")
        self.regressor = nn.Sequential(regressor, nn.BatchNorm2d(teacher_channels), nn.ReLU())

    def forward(self, s, t, target=None, index=None):
        return _mse(self.regressor(_connector_input(s.post[1])), t.post[1])


class AT(Method):
    """Attention transfer of all stages: see `at_loss`."""

    title, reads = "AT", ("post",)

    def build(self, student, teacher, s, t, **_):
        own, other = len(s.post), len(t.post)
        if own != other:
            self.notice = (f"AT: {_name(student)} has {own} stages, {_name(teacher)} {other}; the first "
                           f"{min(own, other)} are paired")

    def forward(self, s, t, target=None, index=None):
        return at_loss(s.post, t.post)


class RKD(Method):
    """Relational KD of the pooled features: see `rkd_loss`."""

    title, reads = "RKD", ("pooled",)

    def forward(self, s, t, target=None, index=None):
        return rkd_loss(s.pooled, t.pooled)


class CRD(Method):
    """Contrastive representation distillation (Tian et al., ICLR 2020), its "exact" form.

    labels: the classes (n,) of all training images. Two banks hold each image's embedding of student and
    teacher. A sample's negatives are 16,384 images of other classes, new in each step, without replacement
    (with it where there are fewer, or more than LARGE images). In training a call updates the banks.
    """

    title, reads = "CRD", ("pooled",)
    WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 16384, 0.07, 0.5
    LARGE = 2**17       # images; drawing without replacement takes memory for all of them

    def build(self, student, teacher, s, t, labels, **_):
        labels = torch.as_tensor([] if labels is None else labels)
        if labels.dim() != 1 or not len(labels) or labels.is_floating_point() or labels.min() < 0:
            raise ValueError("CRD needs labels, the class numbers (n,) of all training images")
        self.embed_s = nn.Linear(s.pooled.shape[1], self.WIDTH)
        self.embed_t = nn.Linear(t.pooled.shape[1], self.WIDTH)
        bound = 1 / math.sqrt(self.WIDTH / 3)
        for name in ("bank_s", "bank_t"):
            bank = torch.empty(len(labels), self.WIDTH)
            self.register_buffer(name, bank.uniform_(-bound, bound))
        for name in ("z_s", "z_t"):         # normalisation constants, set by the first batch
            self.register_buffer(name, torch.tensor(-1.0))
        counts = labels.bincount()
        order = labels.argsort(stable=True)
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        others = len(labels) - int(counts.max())
        self._choose_draw(len(labels), others)

    def _choose_draw(self, images, others):
        """others: images of other classes than the largest one."""
        if not others:
            raise ValueError("CRD needs images of more than one class")
        reason = ""
        if images > self.LARGE:
            reason = "memory"
        if others < self.NEGATIVES:
            reason = f"a class has {others:,} images of other classes"
        self.distinct = not reason
        if reason:
            self.notice = f"CRD: {self.NEGATIVES:,} negatives are drawn with replacement ({reason})"

    def forward(self, s, t, target=None, index=None):
        if index is None or len(index) != len(s.pooled):
            raise ValueError("CRD needs index (B,), the images' numbers in the training set")
        with _no_autocast(s.pooled):
            x = self.embed_s(_up(s.pooled))
            y = self.embed_t(_up(t.pooled.detach()))
            x = _normalize(x)
            y = _normalize(y)
            chosen = torch.cat([index[:, None], self._negatives(index)], 1)
            student_loss = self._contrast(x, self.bank_t, self.z_s, chosen)
            teacher_loss = self._contrast(y, self.bank_s, self.z_t, chosen)
            if self.training:
                self._update(self.bank_s, index, x.detach())
                self._update(self.bank_t, index, y.detach())
            return student_loss + teacher_loss

    def _contrast(self, embedding, bank, z, chosen):
        # one product with the whole bank is 30 times as fast as gathering rows; a copy, as the bank changes
        similarity = F.linear(embedding, bank.clone()).gather(1, chosen)
        scores = (similarity / self.TEMPERATURE).exp()
        estimate = scores.detach().mean() * len(bank)
        constant = torch.where(z < 0, estimate, z)
        if self.training:
            z.copy_(constant)
        return nce_loss(scores / constant, len(bank))

    def _negatives(self, index):
        """(B, K) images of other classes than those of images `index` (B,)."""
        label = self.labels[index]
        n = len(self.labels)
        if self.distinct:
            keys = torch.rand(len(index), n, device=index.device)
            keys.masked_fill_(self.labels == label[:, None], -1)
            return keys.topk(self.NEGATIVES, sorted=False).indices
        count = self.counts[label][:, None]
        start = self.starts[label][:, None]
        place = torch.randint(2**62, (len(index), self.NEGATIVES), device=index.device)
        place = place % (n - count)
        place += count * (place >= start)       # the image's own class is skipped
        return self.order[place]

    @torch.no_grad()
    def _update(self, bank, index, embedding):
        old = bank[index]
        new = embedding.to(bank)
        mixed = old * self.MOMENTUM + new * (1 - self.MOMENTUM)
        bank[index] = _normalize(mixed)


class OFD(Method):
    """A comprehensive overhaul of feature distillation (Heo et al., ICCV 2019): before the ReLU, margin ReLU.

    The teacher normalises with the batch's statistics. It needs `teacher.norms_before_relu()`: the batch norm
    of each stage's last output before its ReLU.
    """

    title, teacher_mode, reads = "OFD", "train", ("pre",)

    def build(self, student, teacher, s, t, **_):
        self.check_stages(student, teacher, s.pre, t.pre)
        norms = teacher.norms_before_relu() if hasattr(teacher, "norms_before_relu") else []
        if len(norms) != len(t.pre):
            raise ValueError(f"OFD: the norms_before_relu() of {_name(teacher)} names {len(norms)} batch "
                             f"norms for {len(t.pre)} stages")
        self.connectors = nn.ModuleList()
        for i, norm in enumerate(norms):
            channels = t.pre[i].shape[1]
            conv = nn.Conv2d(s.pre[i].shape[1], channels, 1, bias=False)
            nn.init.normal_(conv.weight, std=math.sqrt(2 / channels))
            self.connectors.append(nn.Sequential(conv, nn.BatchNorm2d(channels)))
            margin = ofd_margin(norm).to(norm.weight.dtype)
            self.register_buffer(f"margin{i}", margin, persistent=False)

    def forward(self, s, t, target=None, index=None):
        maps, targets, margins = [], [], []
        for i, (own, other) in enumerate(zip(s.pre, t.pre)):
            x = self.connectors[i](_connector_input(own))
            maps.append(x)
            # without a gradient the adaptive form is deterministic; a smaller map is repeated
            target = _up(other.detach())
            targets.append(F.adaptive_avg_pool2d(target, x.shape[-2:]))
            margins.append(getattr(self, f"margin{i}"))
        return ofd_loss(maps, targets, margins)


class ReviewKD(Method):
    """Knowledge review (Chen et al., CVPR 2021): residual fusion from deep to shallow levels.

    Levels: the stages' maps, the teacher's before their ReLU, and the pooled vector as a map of 1 x 1.
    """

    title, reads, student_reads = "ReviewKD", ("pre", "pooled"), ("post", "pooled")

    def build(self, student, teacher, s, t, **_):
        self.check_stages(student, teacher, s.post, t.pre)
        width = min(512, s.pooled.shape[1])
        self.reduce = nn.ModuleList()
        self.attend = nn.ModuleList()
        self.restore = nn.ModuleList()
        for own, other in zip(self._levels(s.post, s.pooled), self._levels(t.pre, t.pooled)):
            reduce = nn.Conv2d(own.shape[1], width, 1, bias=False)
            restore = nn.Conv2d(width, other.shape[1], 3, padding=1, bias=False)
            nn.init.kaiming_uniform_(reduce.weight, a=1)
            nn.init.kaiming_uniform_(restore.weight, a=1)
            self.reduce.append(nn.Sequential(reduce, nn.BatchNorm2d(width)))
            self.restore.append(nn.Sequential(restore, nn.BatchNorm2d(other.shape[1])))
            if len(self.attend) < len(s.post):      # the deepest level has nothing to be fused with
                self.attend.append(nn.Conv2d(2 * width, 2, 1))

    @staticmethod
    def _levels(maps, pooled):
        return [*maps, pooled[:, :, None, None]]

    def forward(self, s, t, target=None, index=None):
        own = self._levels(s.post, s.pooled)
        targets = self._levels(t.pre, t.pooled)
        fused = []
        deeper = None
        for i in reversed(range(len(own))):
            x = self.reduce[i](_connector_input(own[i]))
            if deeper is not None:
                deeper = F.interpolate(deeper, x.shape[-2:])
                both = torch.cat([x, deeper], 1)
                weights = self.attend[i](both).sigmoid()
                x = x * weights[:, :1] + deeper * weights[:, 1:]
            x = F.interpolate(x, targets[i].shape[-2:])
            fused.insert(0, self.restore[i](x))
            deeper = x
        return hcl_loss(fused, targets)


class SimKD(Method):
    """Reused teacher classifier (Chen et al., CVPR 2022): a projector makes the student's map the teacher's.

    Labels and cross-entropy are not used. `deploy` gives the student's body, the projector and the teacher's
    classifier as one network, which torch.fx must be able to trace; other parameters of the student are
    frozen. factor: by how much the projector is narrower inside.
    """

    title, reads, student_reads = "SimKD", ("last",), ("post",)

    def build(self, student, teacher, s, t, logits, factor=2, **_):
        classifier = classifier_of("SimKD", teacher, t, logits[1])
        # ShuffleV2 and MobileNetV2 end with a 1x1 layer: the map before it is used
        self.stage = s.last.shape[1] != s.post[-1].shape[1]
        channels, side = _channels_and_side(s.post[-1] if self.stage else s.last)
        teacher_channels, teacher_side = _channels_and_side(t.last)
        if side % teacher_side and teacher_side % side:
            raise ValueError(f"SimKD: the last maps have {side} and {teacher_side} pixels a side, and "
                             "none is a multiple of the other")
        self.stride = max(1, side // teacher_side)
        self.form = channels, teacher_channels, factor, self.stride, self.stage, classifier.out_features
        whole = Reuse(student, *self.form)
        self.projector = whole.projector
        self.fc = whole.fc
        self.networks = student, trimmed(whole)         # a tuple: not registered twice
        with torch.no_grad():
            self.fc.weight.copy_(classifier.weight)
            self.fc.bias.copy_(0 if classifier.bias is None else classifier.bias)
        self.fc.requires_grad_(False)
        used = set(self.networks[1].parameters())
        for parameter in student.parameters():
            if parameter not in used:
                parameter.requires_grad_(False)

    def forward(self, s, t, target=None, index=None):
        return self.loss_and_logits(None, s, t)[0]

    def loss_and_logits(self, logits, s, t, target=None, index=None):
        x = _connector_input(s.post[-1] if self.stage else s.last)
        x = self.projector(_reduce(x, self.stride))
        loss = _mse(*_same_size(x, t.last))
        return loss, self.fc(_pool(x))

    def deploy(self, student):
        if student is not self.networks[0]:
            raise ValueError("SimKD deploys the student that it was made with, not a copy")
        return self.networks[1]


class CATKD(Method):
    """Class attention transfer (Guo et al., CVPR 2023): maps of the classes' logits, averaged to r x r.

    The student's classifier is initialised again, without a bias; fresh=False keeps its weight.
    """

    title, reads = "CAT-KD", ("last",)

    def build(self, student, teacher, s, t, logits, resolution=2, normalize=False, fresh=True, **_):
        head = classifier_of("CAT-KD", student, s, logits[0])
        other = classifier_of("CAT-KD", teacher, t, logits[1])
        if head.out_features != other.out_features:
            raise ValueError(f"CAT-KD: {_name(student)} has {head.out_features} classes, "
                             f"{_name(teacher)} {other.out_features}")
        self.heads = head, other        # a tuple: not registered twice
        self.resolution, self.normalize = resolution, normalize
        if fresh and _name(student).lower().startswith(("vgg", "shuffle")):
            nn.init.kaiming_uniform_(head.weight, a=math.sqrt(5))        # PyTorch's own
        elif fresh:
            nn.init.normal_(head.weight, std=math.sqrt(2 / head.out_features))
        if head.bias is not None:
            nn.init.zeros_(head.bias).requires_grad_(False)

    def forward(self, s, t, target=None, index=None):
        cams = []
        for features, head in zip((s, t), self.heads):
            # the mean and the 1x1 convolution commute: the mean first, as it leaves fewer pixels
            x = _average_pool(features.last, self.resolution)
            weight = _connector_input(head.weight)[:, :, None, None]
            cams.append(F.conv2d(_connector_input(x), weight))
        return cam_loss(*cams, normalize=self.normalize)


METHODS = {
    "fitnet": FitNet,
    "at": AT,
    "rkd": RKD,
    "crd": CRD,
    "ofd": OFD,
    "reviewkd": ReviewKD,
    "simkd": SimKD,
    "catkd": CATKD,
}


class Reuse(nn.Module):
    """SimKD's network for inference, images -> logits; `trimmed` it has no unused parts of the student.

    channels, teacher_channels: of the last maps; stride: how much larger the student's is; stage: whether it
    is the last stage's and not `last`. `SimKD.form` has all but the student, in this order.
    """

    def __init__(self, student, channels, teacher_channels, factor, stride, stage, classes):
        super().__init__()
        self.stride = stride
        self.stage = stage
        self.student = student
        width = teacher_channels // factor
        self.projector = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, teacher_channels, 1, bias=False),
            nn.BatchNorm2d(teacher_channels),
            nn.ReLU(),
        )
        self.fc = nn.Linear(teacher_channels, classes)

    def forward(self, x):
        _, features = self.student(x, features=True)
        x = features.post[-1] if self.stage else features.last
        x = self.projector(_reduce(x, self.stride))
        return self.fc(_pool(x))


def trimmed(network):
    """A Reuse without the parts that its output does not depend on, as a graph of the same modules.

    It is for evaluation. ValueError where torch.fx cannot trace its student.
    """
    modes = {m: m.training for m in network.modules()}
    try:
        traced = torch.fx.symbolic_trace(network.eval())        # in training a dropout would be in the graph
    except Exception as error:      # any network can fail in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"SimKD: {_name(network.student)} cannot be traced by torch.fx ({reason})") from None
    finally:
        for m, mode in modes.items():
            m.training = mode
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def classifier_of(method, network, features, logits=None):
    """The linear layer that makes a network's logits (B, K) from the mean of its map `last`.

    ValueError where there is none (another pooling, a norm between), or several may be and logits is None.
    """
    pooled = _pool(features.last)
    layers = [m for m in _linear_layers(network) if m.in_features == pooled.shape[1]]
    if logits is not None:
        layers = [m for m in layers if _makes(m, pooled, logits)]
    elif len(layers) > 1:
        raise ValueError(f"{method}: {_name(network)} has {len(layers)} linear layers of that size; give "
                         "logits=(student's, teacher's)")
    if not layers:
        raise ValueError(f"{method}: no linear layer of {_name(network)} makes its logits from the mean of "
                         "its last map")
    return layers[-1]


def _makes(layer, x, logits):
    """Whether a linear layer makes these logits from x, up to rounding."""
    if layer.out_features != logits.shape[1]:
        return False
    with torch.no_grad(), _no_autocast(x):
        bias = None if layer.bias is None else _up(layer.bias)
        made = F.linear(_up(x), _up(layer.weight), bias)
        error = (made - logits).abs().amax()
        error = error / logits.abs().amax()
    rounding = torch.finfo(layer.weight.dtype).eps
    return error.item() <= max(1e-3, 8 * rounding)


def _linear_layers(network):
    return [m for m in network.modules() if isinstance(m, nn.Linear)]


def _name(network):
    return getattr(network, "name", type(network).__name__)


def _channels_and_side(x):
    return x.shape[1], x.shape[-1]


def _pool(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _reduce(x, stride):
    return F.avg_pool2d(x, stride) if stride > 1 else x


def _connector_input(x):
    """Under autocast as it is, as autocast casts; else half precision is cast up."""
    return x if torch.is_autocast_enabled(x.device.type) else _up(x)
