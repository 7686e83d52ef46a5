"""Algorithm 2, once: a student learns from a teacher. Scripts bring the images, the networks, the recipe.

    Distiller.forward    lines 2 to 6: the logits of both sides, their standardized softmaxes, the loss
    make_step            one update from a batch, on one device or many, as a CUDA graph where there is CUDA
    train                the epochs: resumed where a run was stopped, evaluated, logged, saved
    Trainer.train_epoch  line 1, the loop over batches
"""

import math
import time
import warnings
from contextlib import nullcontext
from itertools import islice

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from cli import Progress, peak_memory
from logit_kd import distillation_loss
from models import float32_head
from recipes import recipe_epoch, schedule
from run import RunError, first_line
from teacher import teacher_report
from zscore_kd import CurriculumTemperature

METHOD_OPTIONS = ("zscore", "alpha", "beta", "gamma", "entropy_temp", "zscore_relations")   # in a recipe
METADATA = ("student", "teacher", "method", "zscore", "feature", "entropy_temp", "base_temp", "epochs",
            "seed", "data", "size", "train_images", "val_from_train")       # of the recipe, in student.pt


REPORTED = 10_000       # images of epoch 1, on which the teacher is reported


class Distiller(nn.Module):
    """All that learns: the student, CTKD's temperature, a feature method's connectors.

    Its forward is lines 2 to 6 of Algorithm 2. feature: a feature_kd.Method, with the Teacher of which it
    reads the features.
    """

    def __init__(self, student, recipe, feature=None, teacher=None):
        super().__init__()
        self.student = student
        self.recipe = recipe
        self.feature = feature
        # tuples: neither learnt nor saved. inference_model: the student, but for SimKD
        self.teacher = (teacher,)
        self.inference_model = (feature.deploy(student) if feature else student,)
        if recipe["precision"] == "bf16":
            for network in {student, *self.inference_model}:
                float32_head(network)
        self.options = {k: recipe[k] for k in METHOD_OPTIONS if k in recipe}
        self.temperature = None
        if recipe["method"] == "ctkd":
            self.temperature = CurriculumTemperature(recipe["base_temp"], recipe["span"])
        for name in ("kd_weight", "reversal", "feature_weight"):    # a captured or compiled step reads them
            self.register_buffer(name, torch.zeros(()), persistent=False)

    def autocast(self, images):
        bf16 = self.recipe["precision"] == "bf16"
        return torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)

    def predict(self, images):
        """Logits (B, K) of normalised images (B, 3, H, W), float32 whatever --precision is."""
        return self.inference_model[0](images).float()

    def loss_and_logits(self, images, target, index):
        """The feature method's loss, and logits (B, K), of one pass of each network."""
        t = self.teacher[0].features(images)
        with self.autocast(images):
            logits, s = self.student(images, features=True)
            loss, logits = self.feature.loss_and_logits(logits, s, t, target, index)
        return loss, logits.float()

    def forward(self, views, target, index, teacher_logits):
        """Loss, its parts [L_CE, L_KD, and a feature method's], the student's logits of the first view.

        views: [weak], for MLKD [weak, strong], each (B, 3, H, W). target, index: (B,) classes, and positions
        in the data set. teacher_logits: one (B, K) a view, or [].
        """
        recipe = self.recipe
        v = teacher_logits
        z, parts = [], []
        if self.feature:
            loss, logits = self.loss_and_logits(views[0], target, index)
            z.append(logits)
            parts.append(loss)
        for view in views[len(z):]:
            with self.autocast(view):
                z.append(self.inference_model[0](view).float())                     # line 2: z_n, v_n
        ce = 0
        for logits in z:
            ce = ce + F.cross_entropy(logits, target)                               # line 5: L_CE
        kd = torch.zeros_like(ce)
        if v:
            tau = self.temperature(self.reversal) if self.temperature else recipe["base_temp"]
            # lines 3, 4: tau^2 L_KD
            kd = distillation_loss(recipe["method"], z, v, target, tau, **self.options)
        loss = recipe["ce_weight"] * ce + self.kd_weight * kd                       # line 6
        for term in parts:
            loss = loss + self.feature_weight * term
        return loss, [ce, kd, *parts], z[0]


# ---------------------------------------------------------------- one step


def make_optimizer(distiller, recipe):
    """SGD over all that learns; for a captured step its momentum is there at once, its rate a tensor."""
    learned = list(distiller.parameters())
    rate = torch.zeros((), device=learned[0].device)
    optimizer = torch.optim.SGD(learned, rate, recipe["momentum"], weight_decay=recipe["weight_decay"],
                                fused=True)
    for parameter in learned:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_step(distiller, optimizer, batch_size, world, micro_batch=None, compile=False, capture=True):
    """step(views, target, index, teacher_logits, seed): one update from this process's share of a batch.

    batch_size: of all processes together. micro_batch: images that the device takes at once, None: all.
    seed: of dropout's masks, plus an image's offset in the share. Returns the sums over the share of the
    loss, its parts, top-1 and top-5 hits, (5,) or (6,); the next step of a CUDA graph overwrites them.
    """
    model = torch.compile(distiller, dynamic=False) if compile else distiller
    if world.size > 1:
        with warnings.catch_warnings():     # torch 2.15 has a newer name for the same
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(model, broadcast_buffers=False)     # each has its own batch norm
    parts = micro_batches(batch_size, world.size, micro_batch)

    def step(views, target, index, teacher_logits, seed=0):
        n = len(target)
        sums = 0
        whole = batch_size if world.size > 1 else n         # the last batch of an epoch may be smaller
        optimizer.zero_grad()
        count = min(parts, n)
        for i in range(count):
            first = n * i // count
            last = n * (i + 1) // count
            if first:
                torch.manual_seed((seed + first) % 2**63)
            part = slice(first, last)
            with nullcontext() if world.size == 1 or last == n else model.no_sync():
                loss, terms, logits = model([x[part] for x in views], target[part], index[part],
                                            [v[part] for v in teacher_logits])
                (loss * ((last - first) * world.size / whole)).backward()       # averaged over processes
            losses = torch.stack([x.detach() for x in (loss, *terms)])
            sums = sums + torch.cat([(last - first) * losses, top_k_hits(logits.detach(), target[part])])
        optimizer.step()
        return sums

    if world.device.type == "cuda" and world.size == 1 and parts == 1 and capture:
        momentum = [s["momentum_buffer"] for s in optimizer.state.values()]
        step = CUDAGraphStep(step, [*distiller.state_dict(keep_vars=True).values(), *momentum])
    return step


def micro_batches(batch_size, processes, micro_batch):
    """Into how many micro-batches a process divides its share of a batch; shares differ by one at most."""
    share = -(-batch_size // processes)
    return min(-(-share // (micro_batch or share)), batch_size // processes)


class CUDAGraphStep:
    """A training step as CUDA graphs, one a batch size: one launch instead of hundreds, and the same numbers.

    state: the tensors that a step changes in place. They must stay where they are, as must what it reads.
    """

    def __init__(self, step, state):
        self.step, self.state, self.graphs = step, state, {}

    def __call__(self, *arguments, seed=0):
        given, form = tree_flatten(arguments)
        size = len(arguments[1])
        if size not in self.graphs:
            self.graphs[size] = self._capture(given, form)
            torch.manual_seed(seed % 2**63)     # the rehearsals have drawn dropout's masks
        if self.graphs[size] is None:
            return self.step(*arguments, seed=seed)
        graph, inputs, outputs = self.graphs[size]
        for held, new in zip(inputs, given):
            held.copy_(new)
        graph.replay()
        return outputs

    def _capture(self, given, form):
        """(graph, the tensors it reads, those it writes); None, with a line, where none can be made."""
        inputs = [x.clone() for x in given]
        arguments = tree_unflatten(inputs, form)
        before = [x.detach().clone() for x in self.state]
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(3):          # kernels are chosen, workspaces made
                    self.step(*arguments)
            here.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = next((held[0].pool() for held in self.graphs.values() if held), None)
            try:
                with torch.cuda.graph(graph, pool=pool):
                    outputs = self.step(*arguments)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                click.echo(f"notice: no CUDA graph of the step of {len(arguments[1])} images "
                           f"({first_line(error)}); going on without, slower")
                return None
            return graph, inputs, outputs
        finally:
            torch.cuda.set_stream(here)         # a failed capture stays on its own
            torch.cuda.synchronize()            # nor does it wait for the steps that are undone here
            for now, then in zip(self.state, before):
                now.detach().copy_(then)


# ---------------------------------------------------------------- evaluation


def top_k_hits(logits, target):
    """How many of the targets (B,) are the first, and among the first five, of the logits (B, K): (2,)."""
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


@torch.no_grad()
def evaluate(predict, batches, world=None, between=lambda: None):
    """Mean cross-entropy, top-1 and top-5 (%) of `predict`, images -> logits, over all processes' batches.

    batches: (images, target), as many in each process. between: called before each.
    """
    sums = torch.zeros(4, dtype=torch.double)
    for images, target in batches:
        between()
        logits = predict(images).float()
        loss = F.cross_entropy(logits, target, reduction="sum")
        sums[:3] += torch.cat([loss[None], top_k_hits(logits, target)]).cpu().double()
        sums[3] += len(target)
    loss, top1, top5, n = (world.sum(sums) if world else sums).tolist()
    return {"loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n}


# ---------------------------------------------------------------- the training loop


def train(recipe, data, distiller, run, state, world, stop, *, save_every=60, stop_after=None, log=None,
          **how):
    """Trains `distiller` on `data`; returns the result, a dict.

    data: a script's Batches: steps, images (of an epoch), train_images, eval_name, metadata (for student.pt),
    epoch, evaluation, long_evaluation, and chunk (see cli.Progress). state: the
    save to resume from, or None. save_every: seconds. stop_after: leave after so many epochs, as a kill
    would, and return None. log: the row of the authors' log; None: no report of the teacher (a dry run).
    how: see `make_step`.
    """
    trainer = Trainer(recipe, data, distiller, run, state, world, stop, save_every, log, how)
    for epoch in range(trainer.epoch, recipe["epochs"]):
        trainer.train_epoch(epoch)
        trainer.eval_epoch(epoch)
        trainer.save_if_due(epoch + 1, 0, epoch + 1 in (recipe["epochs"], stop_after))
        if epoch + 1 == stop_after:
            return None
    return trainer.finish()


class Trainer:
    """A run that trains: its step, what the steps add up to, its rows and saves."""

    def __init__(self, recipe, data, distiller, run, state, world, stop, save_every, log, how):
        self.recipe = recipe
        self.data = data
        self.distiller = distiller
        self.run = run
        self.world = world
        self.stop = stop
        self.save_every = save_every
        self.optimizer = make_optimizer(distiller, recipe)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        # of this process, in the epoch: the loss, its parts, top-1 and top-5 hits
        precise = torch.float32 if world.device.type == "mps" else torch.float64
        self.sums = torch.zeros(6 if distiller.feature else 5, dtype=precise, device=world.device)
        self.epoch = self.first_step = 0
        self.row = {}
        self.best = {"top1": -1.0}
        self.log = log
        teacher = distiller.teacher[0]
        self.report = teacher and {"test_top1": teacher.top1}
        self.seen = []          # of the teacher, in epoch 1: (logits of the views, targets)
        self.reported = 0 if log is None else math.ceil(REPORTED / recipe["batch_size"])
        self.saved = self.begun = time.monotonic()
        if state:
            self.resume(state)
        self.step = make_step(distiller, self.optimizer, recipe["batch_size"], world, **how)
        done = self.epoch * data.images + self.first_step * recipe["batch_size"]
        self.progress = Progress(data.images, recipe["epochs"], done, world.device, data.chunk)
        self.scheduled = None       # the epoch of the schedule that the step has

    def resume(self, state):
        """Takes over a save, in place: a captured step reads it there."""
        try:
            self.distiller.load_state_dict(state["model"])
            if self.world.rank == 0:
                self.sums.copy_(state["sums"])
        except RuntimeError as error:       # a custom model's file was edited, or an older version saved
            raise RunError(f"the save in {self.run.folder} is of another {self.recipe['student']} or version "
                           f"({first_line(error).rstrip(':')}); choose another --out") from None
        for held, kept in zip(self.optimizer.state.values(), state["momentum"]):
            held["momentum_buffer"].copy_(kept)
        self.epoch = state["epoch"]
        self.first_step = state["step"]
        self.row = state["row"]
        self.best = state["best"]
        self.report = state.get("teacher", self.report)
        self.begun -= state["seconds"]      # the time of earlier sessions counts
        self.world.print(f"resuming from epoch {self.epoch}, step {self.first_step} ({self.run.folder})")

    def train_epoch(self, epoch):
        """The steps of an epoch that are left."""
        recipe = self.recipe
        data = self.data
        world = self.world
        batch = recipe["batch_size"]
        self.epoch_begun = time.monotonic()
        self.epoch_images = data.images - self.first_step * batch
        self.distiller.train()
        if epoch == 0:      # of a run that was stopped in it: the logits of the steps before
            before = islice(data.epoch(0, 0), min(self.first_step, self.reported))
            self.seen = [(logits, target) for _, target, _, logits in before if logits]
        batches = enumerate(data.epoch(epoch, self.first_step), self.first_step)
        for i, (views, target, index, teacher_logits) in batches:                   # line 1
            self.set_schedule(recipe_epoch(epoch * data.steps + i, data.steps, recipe))
            if epoch == 0 and teacher_logits and len(self.seen) < self.reported:
                self.seen.append((teacher_logits, target))
            offset = epoch * data.train_images + i * batch + batch * world.rank // world.size
            seed = recipe["seed"] * 2**40 + offset      # of dropout's masks
            torch.manual_seed(seed % 2**63)
            self.sums += self.step(views, target, index, teacher_logits, seed=seed)    # lines 2 to 6
            if world.rank == 0:
                self.progress.step(epoch, batch if world.size > 1 else len(target))
            self.save_if_due(epoch, i + 1, data.long_evaluation and i + 1 == data.steps)
        self.first_step = 0

    def set_schedule(self, epoch):
        """Sets learning rate and weights to those of an epoch of the full-length recipe."""
        if epoch == self.scheduled:
            return
        lr, kd_weight, reversal, feature_weight = schedule(epoch, self.recipe)
        self.optimizer.param_groups[0]["lr"].fill_(lr)
        self.distiller.kd_weight.fill_(kd_weight)
        self.distiller.reversal.fill_(reversal)
        self.distiller.feature_weight.fill_(feature_weight)
        self.scheduled = epoch

    def eval_epoch(self, epoch):
        """Evaluates after an epoch, in float32, and logs its row.

        With MLKD ce is the sum over its two views, as it is in the loss, and the accuracy the weak view's.
        """
        data = self.data
        world = self.world
        name = data.eval_name
        speed = self.epoch_images / (time.monotonic() - self.epoch_begun)
        self.distiller.eval()
        world.broadcast(self.distiller.buffers())       # all evaluate what is saved
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        between = self.exit_if_requested if data.long_evaluation else lambda: None
        scores = evaluate(self.distiller.predict, data.evaluation(), world, between)
        torch.backends.cudnn.allow_tf32 = allowed
        loss, ce, kd, *feature, top1, top5 = (self.total() / data.images).tolist()
        if not math.isfinite(loss + scores["loss"]):
            raise self.diverged(epoch, data.steps)
        lr, *_ = schedule(recipe_epoch((epoch + 1) * data.steps - 1, data.steps, self.recipe), self.recipe)
        self.row = {"epoch": epoch + 1, "lr": lr, "loss": loss, "ce": ce, "kd": kd}
        if feature:
            self.row["feature"] = feature[0]
        self.row |= {"train_top1": 100 * top1, "train_top5": 100 * top5}
        self.row |= {f"{name}_{k}": v for k, v in scores.items()}
        if self.distiller.temperature:
            self.row["temperature"] = self.distiller.temperature(0.0).item()
        self.row |= {"img_s": speed, "seconds": time.monotonic() - self.epoch_begun}
        if self.seen:
            self.report |= teacher_report(self.seen, self.recipe, self.distiller.options)
            self.row["teacher"] = self.report
        if scores["top1"] > self.best["top1"]:
            self.best = {"top1": scores["top1"], "top5": scores["top5"], "epoch": epoch + 1}
        self.sums.zero_()
        world.on_main(lambda: self.run.log(self.row))
        if world.rank == 0:
            self.progress.print(epoch_line(self.row, self.best, name, self.recipe["epochs"]))
            if self.seen:
                self.print_report()
        self.seen = []

    def print_report(self):
        """What the teacher is, and the first epoch's loss with that of the authors' log."""
        report = self.report
        self.progress.print(
            f"teacher on {report['images']:,} training views: {report['train_top1']:.2f} % top-1, "
            f"cross-entropy {report['train_ce']:.3f}, standard deviation of its logits "
            f"{report['logit_std']:.2f}; a uniform student's distillation loss is "
            f"{report['uniform_loss']:.2f}")
        line = f"epoch 1: loss {self.row['loss']:.2f}"
        if "loss_1" in self.log:
            line += f", authors' log {self.log['loss_1']:.2f}"
        self.progress.print(line)

    def total(self):
        """The sums of all processes."""
        return self.world.sum(self.sums.clone())

    def save_if_due(self, epoch, step, now=False):
        """Saves after `save_every` seconds, at a stop, or now: so many epochs, and steps of the next one."""
        due = now or self.stop.requested or time.monotonic() - self.saved >= self.save_every
        if self.world.size > 1:
            due = self.world.any(due)
        if due:
            self.save(epoch, step)
            self.exit_if_requested()

    def save(self, epoch, step):
        total = self.total()

        def write():
            weights = {k: v.cpu() for k, v in self.distiller.state_dict().items()}
            if not all(x.isfinite().all() for x in (total, *weights.values())):
                raise self.diverged(epoch, step)
            self.run.save({"epoch": epoch, "step": step, "seconds": time.monotonic() - self.begun,
                           "sums": total.cpu(), "best": self.best, "row": self.row,
                           "teacher": self.report, "model": weights,
                           "momentum": [s["momentum_buffer"].cpu() for s in self.optimizer.state.values()]})
        self.world.on_main(write)
        self.saved = time.monotonic()

    def diverged(self, epoch, step):
        return RunError(f"the loss became infinite in epoch {epoch + 1}, by step {step}; the last save in "
                        f"{self.run.folder} is kept. Try a smaller --lr or --kd-weight, in another --out")

    def exit_if_requested(self):
        """After a save: ends all processes where one shall stop."""
        self.stop.requested = self.world.any(self.stop.requested)
        if self.stop.requested:
            self.world.on_main(lambda: self.stop.exit_if_requested(self.run.folder))

    def finish(self):
        """Writes student.pt and result.json; returns the result."""
        recipe = self.recipe
        data = self.data
        device = self.world.device
        minutes = (time.monotonic() - self.begun) / 60
        last = {k: self.row[f"{data.eval_name}_{k}"] for k in ("top1", "top5")}
        network = self.distiller.inference_model[0]
        result = {"last": last, "best": self.best, "best_chosen_on": data.eval_name,
                  "epochs": recipe["epochs"], "minutes": minutes,
                  "img_s": data.images * recipe["epochs"] / (60 * minutes),
                  "peak_memory_mib": peak_memory(device), "processes": self.world.size,
                  "teacher_report": self.report,
                  **cost(network, data.metadata["size"], device)}
        content = {"model": {k: v.cpu().contiguous() for k, v in network.state_dict().items()}}
        content |= {k: recipe[k] for k in METADATA if k in recipe} | data.metadata | last
        if hasattr(self.distiller.feature, "form"):
            content["simkd"] = [*self.distiller.feature.form]
        self.world.on_main(lambda: self.run.finish(result, content))
        return result


@torch.no_grad()
def cost(network, size, device):
    """Parameters of a network, and multiply-accumulates of one image of size x size."""
    network.eval()      # a run that is resumed at its end has not evaluated, and its batch norms would move
    try:
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(2, 3, size, size, device=device))
        macs = counter.get_total_flops() // 4
    except Exception:       # of a custom model, any: no reason to lose the run
        macs = None
    return {"parameters": sum(p.numel() for p in network.parameters()), "macs": macs}


def epoch_line(row, best, name, epochs):
    return (f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.5g}  loss {row['loss']:8.4f}  "
            f"train {row['train_top1']:6.2f}  {name} top-1 {row[f'{name}_top1']:6.2f}  "
            f"top-5 {row[f'{name}_top5']:6.2f}  (best {best['top1']:.2f})  "
            f"{row['img_s']:,.0f} images/s  {row['seconds']:.0f} s")
