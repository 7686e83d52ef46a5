"""Algorithm 2, once: a student learns from a teacher. Scripts bring the images, the networks, the recipe.

    Distiller.forward    lines 2 to 6: the logits of both sides, their standardized softmaxes, the loss
    make_step            one update from a batch, on one device or many, as a CUDA graph where there is CUDA
    train                the epochs: goes on where it was stopped, saves, evaluates, logs
    Trainer.train_epoch  line 1, the loop over batches
    run_experiment               one run in its folder, from its first line to its result
"""

import itertools
import math
import time
import warnings
from contextlib import contextmanager, nullcontext

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from cli import Progress, check_batch, duration, peak_memory
from logit_kd import distillation_loss
from models import float32_head
from networks import feature_method
from recipes import method_name, recipe_epoch, schedule
from run import Run, RunError, Stop, Stopped, collect_facts, first_line
from zscore_kd import CurriculumTemperature

HELD = 16       # steps
KEPT = "the last checkpoint in {} is kept. Try a smaller --lr or --kd-weight, in another --out"
SHOWN = ("lr", "epochs", "batch_size", "weight_decay", "ce_weight", "kd_weight", "base_temp", "alpha", "beta",
         "gamma", "entropy_temp", "span", "zscore_relations", "feature_weight", "feature_ramp", "resolution",
         "normalize", "factor", "precision", "compile", "exact_teacher", "size", "images", "train_images",
         "val_from_train")
OPTIONS = "zscore", "alpha", "beta", "gamma", "entropy_temp", "zscore_relations"     # a method's, in a recipe
FACTS = ("student", "teacher", "method", "zscore", "feature", "entropy_temp", "base_temp", "epochs", "seed",
         "data", "size", "train_images", "val_from_train")      # of the recipe, kept in student.pt


class Distiller(nn.Module):
    """All that learns: the student, CTKD's temperature, a feature method's connectors.

    Its forward is lines 2 to 6 of Algorithm 2. feature: a feature_kd.Method, with the Teacher whose features
    it reads.
    """

    def __init__(self, student, recipe, feature=None, teacher=None):
        super().__init__()
        self.student, self.recipe, self.feature = student, recipe, feature
        # tuples: neither learnt nor saved. deployed: what answers at test time; the student, but for SimKD
        self.teacher, self.inference_model = (teacher,), (feature.deploy(student) if feature else student,)
        if recipe["precision"] == "bf16":
            for network in {student, *self.inference_model}:
                float32_head(network)
        ctkd = recipe["method"] == "ctkd"
        self.temperature = CurriculumTemperature(recipe["base_temp"], recipe["span"]) if ctkd else None
        for name in ("kd_weight", "reversal", "feature_weight"):    # a captured or compiled step reads them
            self.register_buffer(name, torch.zeros(()), persistent=False)
        self.losses = 4 if feature else 3           # loss, L_CE, L_KD, the feature method's
        self.norms = tuple(m for m in student.modules()         # (a tuple: they are the student's)
                           if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
                           and m.momentum is not None and m.num_batches_tracked is not None)

    @contextmanager
    def uncounted(self):
        """Batch norms count nothing in here: it would be an operation a layer and step. See `count`."""
        counters = [m.num_batches_tracked for m in self.norms]
        for m in self.norms:
            m.num_batches_tracked = None
        try:
            yield
        finally:
            for m, counter in zip(self.norms, counters):
                m.num_batches_tracked = counter

    def count(self, passes):
        """Adds what `uncounted` left out, which no computation reads: one for each pass in training."""
        if passes and self.norms:
            torch._foreach_add_([m.num_batches_tracked for m in self.norms], passes)

    def autocast(self, device):
        return torch.autocast(device.type, torch.bfloat16, enabled=self.recipe["precision"] == "bf16")

    def predict(self, images):
        """Logits (B, K) of normalised images (B, 3, H, W), float32 whatever --precision is."""
        return self.inference_model[0](images).float()

    def compare(self, images, target, index):
        """Logits as of `predict`, and the feature method's loss, of one forward pass of each network."""
        t = self.teacher[0].features(images)
        with self.autocast(images.device):
            logits, s = self.student(images, features=True)
            loss, logits = self.feature.loss_and_logits(logits, s, t, target, index)
        return logits.float(), loss

    def forward(self, views, target, index, teacher_logits):
        """Loss, its parts [L_CE, L_KD, and a feature method's], the student's logits of the first view.

        views: [weak], for MLKD [weak, strong], each (B, 3, H, W). target, index: (B,) classes, and places in
        the data set. teacher_logits: one (B, K) a view, or [].
        """
        r, v, z, more = self.recipe, teacher_logits, [], []
        if self.feature:
            logits, loss = self.compare(views[0], target, index)
            z, more = [logits], [loss]
        for view in views[len(z):]:                                                 # line 2: z_n, v_n
            with self.autocast(view.device):
                z.append(self.inference_model[0](view).float())
        ce = sum(F.cross_entropy(logits, target) for logits in z)                   # line 5
        kd = torch.zeros_like(ce)
        if v:
            tau = self.temperature(self.reversal) if self.temperature else r["base_temp"]
            options = {k: r[k] for k in OPTIONS if k in r}
            # lines 3, 4: tau^2 L_KD
            kd = distillation_loss(r["method"], z, v, target, tau, **options)
        loss = r["ce_weight"] * ce + self.kd_weight * kd                            # line 6
        for term in more:
            loss = loss + self.feature_weight * term
        return loss, [ce, kd, *more], z[0]


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

    batch_size: of all processes together. micro_batch: images that the device takes at once, gradients add
    up; None: all. seed: of dropout's masks, plus an image's place in the share, so that they are the images'
    own. Returns the share's sums of the loss and of its parts, (3,) or (4,), and the student's logits of the
    first view; the next step overwrites both where it is a CUDA graph.
    """
    model = torch.compile(distiller, dynamic=False) if compile else distiller
    if world.size > 1:
        with warnings.catch_warnings():     # torch 2.15 has a newer name for the same
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(model, broadcast_buffers=False)     # each has its own batch norm
    parts = micro_batches(batch_size, world.size, micro_batch)

    def step(views, target, index, teacher_logits, seed=0):
        n, sums, seen = len(target), torch.zeros(distiller.losses, device=target.device), []
        whole = batch_size if world.size > 1 else n         # the last batch of an epoch may be smaller
        optimizer.zero_grad()
        bounds = (n * i // min(parts, n) for i in range(min(parts, n) + 1))
        for first, last in itertools.pairwise(bounds):
            if first:
                torch.manual_seed((seed + first) % 2**63)
            now = slice(first, last)
            with (nullcontext() if world.size == 1 or last == n else model.no_sync()), distiller.uncounted():
                loss, terms, logits = model([x[now] for x in views], target[now], index[now],
                                             [v[now] for v in teacher_logits])
                (loss * ((last - first) * world.size / whole)).backward()       # averaged over processes
            seen.append(logits.detach())
            sums += (last - first) * torch.stack([x.detach() for x in (loss, *terms)])
        optimizer.step()
        return sums, torch.cat(seen) if len(seen) > 1 else seen[0]

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


class Tally:
    """What one process's steps add up to, on the device: `losses` losses, hits (2), undecodable images.

    Its small operations are done for HELD steps at once; looking at the sums waits for a GPU.
    """

    def __init__(self, device, losses=3):
        self.sums = torch.zeros(losses + 3, dtype=torch.float32 if device.type == "mps" else torch.float64,
                                device=device)
        self.held, self.losses, self.passes = [], [], 0

    def add(self, losses, logits, target, passes):
        """A step's sums (losses,), logits, which a CUDA graph will overwrite, targets, and forward passes."""
        self.held.append((losses.clone(), logits.clone(), target))
        self.passes += passes
        if len(self.held) == HELD:
            self._count()

    def _count(self):
        if self.held:
            losses, logits, targets = zip(*self.held)
            losses = torch.stack(losses)
            self.sums[:-3] += losses.to(self.sums.dtype).sum(0)
            self.sums[-3:-1] += top_k_hits(torch.cat(logits), torch.cat(targets))
            self.losses.append(losses[:, 0])
            self.held.clear()

    def unchecked(self):
        """The losses of the steps since the last call, (n,)."""
        self._count()
        losses, self.losses = torch.cat(self.losses), []
        return losses

    def take(self):
        """The sums, which begin anew."""
        self._count()
        sums = self.sums.clone()
        self.sums.zero_()
        self.passes = 0
        return sums


def top_k_hits(logits, target):
    """How many of the targets (B,) are the first, and among the first five, of the logits (B, K): (2,)."""
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum()])


@contextmanager
def no_tf32():
    """CUDA's float32 convolutions are not rounded in here."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@torch.no_grad()
def evaluate(predict, batches, world=None, between=lambda: None):
    """Mean cross-entropy, top-1 and top-5 (%) of `predict`, images -> logits, over all processes' batches.

    batches: (images, target), as many in each process; (None, None) where one has fewer. between: called
    before each.
    """
    sums = torch.zeros(4, dtype=torch.double)
    for images, target in batches:
        between()
        if images is not None:
            logits = predict(images).float()
            loss = F.cross_entropy(logits, target, reduction="sum")
            sums[:3] += torch.cat([loss[None], top_k_hits(logits, target)]).cpu().double()
            sums[3] += len(target)
    loss, top1, top5, n = (world.sum(sums) if world else sums).tolist()
    return {"loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n}


# ---------------------------------------------------------------- the training loop


def train(recipe, data, distiller, run, state, world, stop, *, save_every=60, stop_after=None, **how):
    """Trains `distiller` on `data`; returns the result, a dict.

    data: a script's Batches: eval_name, images (an epoch's), train_images, steps, undecodable, check,
    place, epoch, evaluation, long_evaluation, facts (for student.pt), advice and chunk (see
    cli.Progress). state: the checkpoint to go on from, or None. stop: a Stop. save_every: seconds; a run also
    saves when it is stopped, at its end, and around an evaluation that takes long. stop_after: leave after so
    many epochs, as a kill would, and return None. how: see `make_step`.
    """
    session = Trainer(recipe, data, distiller, run, state, world, stop, save_every, how)
    for epoch in range(session.epoch, recipe["epochs"]):
        begun = time.monotonic()
        speed, extra = session.train_epoch(epoch)
        session.eval_epoch(epoch)
        session.row |= {"img_s": speed, "seconds": time.monotonic() - begun, **extra}
        world.on_main(lambda: run.log(session.row))
        last = epoch + 1 in (recipe["epochs"], stop_after)
        save_now, asked = session.due()
        if save_now or last or data.long_evaluation:
            session.save(epoch + 1, 0)
        if world.rank == 0:
            session.progress.print(epoch_line(session.row, session.best, data.eval_name, recipe["epochs"]))
        if epoch + 1 == stop_after:
            return None
        if not last:
            session.exit_if_requested(asked)
    minutes = (time.monotonic() - session.begun) / 60
    return finish(recipe, data, distiller, run, session.row, session.best, minutes, world)


class Trainer:
    """A run that trains: its step, what the steps add up to, its saves, and whether it is asked to stop."""

    def __init__(self, recipe, data, distiller, run, state, world, stop, save_every, how):
        self.recipe, self.data, self.distiller, self.run = recipe, data, distiller, run
        self.world, self.stop, self.save_every = world, stop, save_every
        self.optimizer = make_optimizer(distiller, recipe)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        self.tally = Tally(world.device, distiller.losses)      # of this process, since the last save
        state = state or {"epoch": 0, "step": 0, "seconds": 0.0, "sums": self.tally.take(),
                          "best": {"top1": -1.0}, "row": {}}
        if "model" in state:
            restore(state, distiller, self.optimizer, run)
            world.print(f"going on from epoch {state['epoch']}, step {state['step']} ({run.folder})")
        self.epoch, self.first_step = state["epoch"], state["step"]
        self.best, self.row = state["best"], state["row"]
        self.sums = state["sums"].to(self.tally.sums)           # of all processes
        self.saved = time.monotonic()
        self.begun = self.saved - state["seconds"]              # the time of earlier sessions counts
        self.step = make_step(distiller, self.optimizer, recipe["batch_size"], world, **how)
        self.parts = micro_batches(recipe["batch_size"], world.size, how.get("micro_batch"))
        done = self.epoch * data.images + self.first_step * recipe["batch_size"]
        self.progress = Progress(data.images, recipe["epochs"], done, world.device, data.advice, data.chunk)
        self.shown = None       # the epoch whose schedule the step has

    def train_epoch(self, epoch):
        """The steps of an epoch that are left. Returns (images per second, what a log row says beside)."""
        recipe, data, world, batch = self.recipe, self.data, self.world, self.recipe["batch_size"]
        begun, images = time.monotonic(), data.images - self.first_step * batch
        self.distiller.train()
        # line 1: the loop over batches
        for i, (views, target, index, teacher_logits) in enumerate(data.epoch(epoch, self.first_step),
                                                                   self.first_step):
            self.set_schedule(recipe_epoch(epoch * data.steps + i, data.steps, recipe))
            seed = recipe["seed"] * 2**40 + data.place(epoch, i)
            torch.manual_seed(seed % 2**63)
            losses, logits = self.step(views, target, index, teacher_logits, seed=seed)     # lines 2 to 6
            self.tally.add(losses, logits, target, len(views) * min(self.parts, len(target)))
            if world.rank == 0:
                self.progress.step(epoch, batch if world.size > 1 else len(target))
            last = i == data.steps - 1
            save_now, asked = (False, False) if last else self.due()
            if save_now or last or world.device.type == "cpu":      # on a GPU looking waits for it
                check_finite(self.tally, epoch, i, logits, teacher_logits, self.run, world)
            if save_now:
                self.collect()
                self.save(epoch, i + 1)
                self.exit_if_requested(asked)
        self.first_step, extra = 0, self.collect()
        return images / (time.monotonic() - begun), extra

    def set_schedule(self, epoch):
        """Sets learning rate and weights to those of an epoch of the full-length recipe."""
        if epoch != self.shown:
            lr, *weights = schedule(epoch, self.recipe)
            self.optimizer.param_groups[0]["lr"].fill_(lr)
            for held, weight in zip((self.distiller.kd_weight, self.distiller.reversal,
                                     self.distiller.feature_weight), weights, strict=True):
                held.fill_(weight)
            self.shown = epoch

    def eval_epoch(self, epoch):
        """Evaluates after an epoch: its row of the log, but for times, and the best epoch so far."""
        recipe, data, distiller = self.recipe, self.data, self.distiller
        if data.long_evaluation:
            self.save(epoch, data.steps)
        distiller.eval()
        self.world.broadcast(distiller.buffers())       # all evaluate what is saved
        with no_tf32():
            scores = evaluate(distiller.predict, data.evaluation(), self.world,
                              self.exit_if_requested if data.long_evaluation else lambda: None)
        if not math.isfinite(scores["loss"]):
            raise RunError(f"the evaluation's loss became {scores['loss']} in epoch {epoch + 1}; "
                           f"{KEPT.format(self.run.folder)}")
        lr, *_ = schedule(recipe_epoch((epoch + 1) * data.steps - 1, data.steps, recipe), recipe)
        self.row = epoch_row(epoch, lr, self.sums / data.images, scores, data.eval_name)
        if distiller.temperature:
            self.row["temperature"] = distiller.temperature(0.0).item()
        if scores["top1"] > self.best["top1"]:
            self.best = {"top1": scores["top1"], "top5": scores["top5"], "epoch": epoch + 1}
        self.sums.zero_()

    def collect(self):
        """Adds all processes' sums since the last time. Returns what a log row says beside the usual."""
        self.tally.sums[-1], self.data.undecodable = self.data.undecodable, 0
        self.distiller.count(self.tally.passes)
        self.sums.add_(self.world.sum(self.tally.take()))
        return self.data.check(int(self.sums[-1]))

    def save(self, epoch, step):
        """Saves the run after so many epochs and steps of the next one."""
        def write():
            weights = self.distiller.state_dict()
            if not all(x.isfinite().all() for x in weights.values()):
                raise RunError(f"the student's weights became infinite in epoch {epoch}; "
                               f"{KEPT.format(self.run.folder)}")
            self.run.save({"epoch": epoch, "step": step, "seconds": time.monotonic() - self.begun,
                           "sums": self.sums.cpu(), "best": self.best, "row": self.row,
                           "model": {k: v.cpu() for k, v in weights.items()},
                           "momentum": [s["momentum_buffer"].cpu() for s in self.optimizer.state.values()]})
        self.world.on_main(write)
        self.saved = time.monotonic()

    def due(self):
        """(whether a save is due in any process, whether any is asked to stop)."""
        return self.world.any(self.stop.requested or time.monotonic() - self.saved >= self.save_every,
                              self.stop.requested)

    def exit_if_requested(self, asked=None):
        """After a save: ends all processes where one is asked to stop. asked: whether, where it is known."""
        asked = self.world.any(self.stop.requested)[0] if asked is None else asked
        if asked and self.world.rank == 0:
            raise Stopped(f"stopped, and saved in {self.run.folder}: the same command goes on from here")
        if asked:
            raise click.exceptions.Exit(1)


def restore(state, distiller, optimizer, run):
    """What a save holds, back in its places: a captured step reads it there. RunError: of another network."""
    if "optimizer" in state:        # saved by version 0.5
        temperature = {f"temperature.{k}": v for k, v in state["curriculum"].items()}
        state["model"] = {f"student.{k}": v for k, v in state["model"].items()} | temperature
        state["momentum"] = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
        state["sums"] = F.pad(state["sums"], (0, 1))
    try:
        distiller.load_state_dict(state["model"])
    except RuntimeError as error:       # a file of the user's own was edited
        raise RunError(f"the save in {run.folder} is of another {distiller.recipe['student']} "
                       f"({first_line(error).rstrip(':')}); choose another --out") from None
    for held, kept in zip(optimizer.state.values(), state["momentum"]):
        held["momentum_buffer"].copy_(kept)


def finish(recipe, data, distiller, run, row, best, minutes, world):
    """Writes student.pt and result.json; returns the result."""
    last = {k: row[f"{data.eval_name}_{k}"] for k in ("top1", "top5")}
    result = {"last": last, "best": best, "best_chosen_on": data.eval_name, "epochs": recipe["epochs"],
              "minutes": minutes, "img_s": data.images * recipe["epochs"] / (60 * minutes),
              "peak_memory_mib": peak_memory(world.device), "processes": world.size}
    network, form = distiller.inference_model[0], getattr(distiller.feature, "form", None)
    result |= cost(network, data.facts["size"], world.device)
    weights = {k: v.cpu().contiguous() for k, v in network.state_dict().items()}
    facts = {k: recipe[k] for k in FACTS if k in recipe} | data.facts | ({"simkd": [*form]} if form else {})
    world.on_main(lambda: run.finish(result, {"model": weights, **facts, **last}))
    return result


@torch.no_grad()
def cost(network, size, device):
    """Parameters of a network, and multiply-accumulates of one image of size x size."""
    network.eval()      # a run that goes on at its very end has not evaluated, and its batch norms would move
    try:
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(2, 3, size, size, device=device))
        macs = counter.get_total_flops() // 4
    except Exception:       # of one's own network, any: no reason to lose the run
        macs = None
    return {"parameters": sum(p.numel() for p in network.parameters()), "macs": macs}


def check_finite(tally, epoch, step, student_logits, teacher_logits, run, world):
    """RunError, in all processes, when a loss was not finite; the checkpoint made before is kept.

    step: the last one; the first bad one is named, and the logits' ranges of the last.
    """
    losses = tally.unchecked()
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if not world.any(bool(bad))[0]:
        return
    if not bad:
        raise click.exceptions.Exit(1)      # another process says why
    ranges = [f"{name} logits in [{x.min():.4g}, {x.max():.4g}]"
              for name, x in (("student", student_logits), *(("teacher", x) for x in teacher_logits[:1]))]
    raise RunError(f"the loss became {losses[bad[0]].item()} in epoch {epoch + 1}, step "
                   f"{step + 2 - len(losses) + bad[0]} ({', '.join(ranges)}"
                   + f" {len(losses) - 1 - bad[0]} steps later" * (bad[0] < len(losses) - 1)
                   + "); " + KEPT.format(run.folder))


def epoch_row(epoch, lr, means, scores, eval_name):
    """One row of log.jsonl: learning rate, mean training losses, and accuracies in %.

    With MLKD ce is the sum over its two views, as it is in the loss, and the accuracy the weak view's.
    """
    loss, ce, kd, *feature, top1, top5, _ = means.tolist()
    return {"epoch": epoch + 1, "lr": lr, "loss": loss, "ce": ce, "kd": kd,
            **({"feature": feature[0]} if feature else {}),
            "train_top1": 100 * top1, "train_top5": 100 * top5,
            **{f"{eval_name}_{k}": v for k, v in scores.items()}}


def epoch_line(row, best, name, epochs):
    return (f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.5g}  loss {row['loss']:8.4f}  "
            f"train {row['train_top1']:6.2f}  {name} top-1 {row[f'{name}_top1']:6.2f}  "
            f"top-5 {row[f'{name}_top5']:6.2f}  (best {best['top1']:.2f})  "
            f"{row['img_s']:,.0f} images/s  {row['seconds']:.0f} s")


# ---------------------------------------------------------------- one run


def run_experiment(recipe, data, student, folder, world, *, teacher=None, published=None, logged=None,
           before=lambda: None, more=False, **how):
    """One run in its folder: printed, trained or found finished. Returns its result; None at `stop_after`.

    data: a script's Batches; student: a network on the device. teacher: the Teacher, for a feature method.
    published, logged: top-1 (%) of the paper, and of the last epoch of the authors' log, to print beside the
    result. before: called before a new run begins. more: other runs come after this one. how: see `train`.
    """
    run = Run(folder, recipe, collect_facts(world.device) | {"processes": world.size})
    values = ", ".join(f"{k} {recipe[k]}" for k in SHOWN
                       if recipe.get(k) not in (None, False) or k == "ce_weight"
                       or k == "zscore_relations" and recipe["zscore"] and k in recipe)
    world.print(f"{run.folder}: {method_name(recipe)}, {values}")
    batch = recipe["batch_size"]
    share = batch // world.size // micro_batches(batch, world.size, how.get("micro_batch"))
    check_batch(recipe, data.train_images, min(share, data.images % batch or batch))
    try:
        # rank 0 alone touches the folder
        state, result = world.on_main(lambda: (run.open(), run.finished()))
        if result:
            world.print("finished before")
        elif not state:
            before()
        with Stop() as stop:
            if not result:
                feature = None
                if recipe.get("feature"):
                    feature = feature_method(recipe, student, teacher.whole, data.targets, data.facts["size"])
                    teacher.prepare(feature)
                    if feature.notice:
                        world.print(feature.notice)
                distiller = Distiller(student, recipe, feature, teacher).to(world.device)
                result = train(recipe, data, distiller, run, state, world, stop, **how)
    finally:
        run.close()
    if result:
        world.print(summary(run.folder.name, result, published, logged))
        if recipe.get("feature") == "simkd":
            world.print(f"deployed with the teacher's classifier: {result['parameters']:,} parameters, "
                        f"{result['macs'] / 1e6:.1f} M multiply-accumulates")
    if not result or more:
        stop.exit_if_requested(run.folder)     # asked for in the last epoch: what would come next is left out
    return result


def summary(name, result, published, logged):
    last, best = result["last"], result["best"]
    line = (f"{name}: last epoch {last['top1']:.2f} top-1, {last['top5']:.2f} top-5; best {best['top1']:.2f} "
            f"(epoch {best['epoch']}, chosen on {result['best_chosen_on']})")
    if published:
        line += (f"; published {published:.2f}"
                 + (f", last epoch of the authors' log {logged:.2f}" if logged else ""))
    return f"{line}; {duration(60 * result['minutes'])}"
