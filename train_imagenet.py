"""Logit standardization in knowledge distillation on ImageNet, or any folder of images; one GPU or many.

\b
  python train_imagenet.py --data-dir imagenet --teacher resnet34 --student resnet18 --zscore
  torchrun --nproc-per-node 8 train_imagenet.py --data-dir imagenet --teacher resnet50 --student MobileNetV1 --zscore
  python train_imagenet.py --teacher resnet34 --student resnet18 --dry-run         the whole path in seconds, made images
  python train_imagenet.py --list                                                  recipes and published numbers

data-dir holds train/CLASS/ and val/CLASS/. Networks are torchvision's, by its names, and MobileNetV1. A flag that is left out
takes the pair's recipe; a run that was stopped goes on when the same command is given again, with any number of processes.
"""

import hashlib
import http.client
import itertools
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.models
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import to_pil_image

import recipes
import run as runs
from data import (FolderImages, StrongDraws, folder_batches, folder_keys, load_folders, normalise_folder, strong_draws,
                  strong_operations, top_k_hits)
from models import class_count, create_model, load_weights
from weights import facts_of, read_checkpoint
from recipes import kd_weight, learning_rate, recipe_epoch, reversal
from run import KEPT, Progress, Run, RunError, Stop, check_finite, epoch_line, epoch_row
from teacher import Teacher
from zscore_kd import METHODS, CurriculumTemperature, distillation_loss

NETWORKS = ["MobileNetV1", *(n for n in torchvision.models.list_models(module=torchvision.models)
                             if n not in ("googlenet", "inception_v3"))]        # those two return more than logits
BAD = 0.001         # the share of training images that may be undecodable


# ---------------------------------------------------------------- processes


class Team:
    """The processes of one job: rank 0 alone reports and writes, each names its own trouble. Without torchrun, one process."""

    def __init__(self, device_name):
        self.rank, self.size, self.flags = 0, 1, None
        self.device = runs.pick_device(device_name)
        launched = dist.is_torchelastic_launched()      # RANK alone says nothing: clusters set it for other reasons
        if self.device.type == "cuda":
            local, there = int(os.environ["LOCAL_RANK"]) if launched else 0, torch.cuda.device_count()
            if local >= there:
                raise RunError(f"process {local + 1} on this machine finds {there} GPUs: give torchrun --nproc-per-node {there}")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if launched:
            store, self.rank, self.size = next(dist.rendezvous("env://"))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")     # after a restart the store still has the dead one's keys
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", rank=self.rank, world_size=self.size,
                                    store=dist.PrefixStore(f"attempt {attempt}", store))
            self.flags = dist.new_group(backend="gloo")     # small questions, on the CPU

    def say(self, line):
        if self.rank == 0:
            click.echo(line)

    def share(self, value=None):
        """Rank 0's value, for all."""
        if self.flags is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0, group=self.flags)
        return held[0]

    def first(self, call):
        """What `call` gives in rank 0, for all; its problem ends all of them, with one line."""
        value = problem = None
        if self.rank == 0:
            try:
                value = call()
            except (click.ClickException, ValueError) as error:
                problem = error
        value, failed = self.share((value, problem is not None))
        if problem:
            raise problem
        if failed:
            raise click.exceptions.Exit(1)
        return value

    def gather(self, values):
        """The union of all processes' sets."""
        if self.flags is None:
            return values
        held = [None] * self.size
        dist.all_gather_object(held, values, group=self.flags)
        return set().union(*held)

    def any(self, *flags):
        """Each flag, true where it is so in any process: all save, and all stop, at the same step."""
        if self.flags is None:
            return flags
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.flags)
        return tuple(map(bool, tensor.tolist()))

    def total(self, tensor):
        """The sum over all processes."""
        if self.flags is not None:
            dist.all_reduce(tensor, group=self.flags if tensor.device.type == "cpu" else None)
        return tensor

    def agree(self, tensors):
        """Rank 0's values in every process."""
        for tensor in tensors if self.flags is not None else ():
            dist.broadcast(tensor, 0)

    def close(self):
        if self.flags is not None:
            dist.destroy_process_group()


# ---------------------------------------------------------------- training


class Learner:
    """The student and what one step of Algorithm 2 does with it; losses are of the images learnt at once, gradients the mean of all."""

    def __init__(self, recipe, classes, team, compile=False):
        torch.manual_seed(recipe["seed"])
        self.recipe, self.team, device = recipe, team, team.device
        self.student = network(recipe["student"], classes).to(device, memory_format=torch.channels_last)
        ctkd = recipe["method"] == "ctkd"
        self.curriculum = CurriculumTemperature(recipe["base_temp"], recipe["span"]).to(device) if ctkd else None
        learned = [*self.student.parameters(), *(self.curriculum.parameters() if ctkd else ())]
        self.optimizer = torch.optim.SGD(learned, lr=recipe["lr"], momentum=recipe["momentum"], weight_decay=recipe["weight_decay"])
        for parameter in learned:
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe["precision"] == "bf16")
        self.options = {k: recipe[k] for k in ("alpha", "beta", "zscore_relations") if k in recipe}
        self.parallel = torch.compile(self.student) if compile else self.student
        if team.flags is not None:
            with warnings.catch_warnings():     # torch 2.15 has a newer name for the same
                warnings.simplefilter("ignore", FutureWarning)
                self.parallel = DistributedDataParallel(self.parallel, broadcast_buffers=False)     # batch norm is per replica

    def predict(self, images):
        with self.autocast:
            return self.student(images).float()

    def losses(self, images, target, teacher_logits, epoch):
        """Loss, L_CE, L_KD, and the student's logits of the first view."""
        with self.autocast:
            z = [self.parallel(view).float() for view in images]                        # Algorithm 2, line 2: z_n
        ce = sum(F.cross_entropy(x, target) for x in z)                                 # lines 5 and 6: L_CE
        kd = torch.zeros_like(ce)
        if teacher_logits:
            temp = self.curriculum(reversal(epoch, self.recipe)) if self.curriculum else self.recipe["base_temp"]
            kd = distillation_loss(self.recipe["method"], z[0], teacher_logits[0], target, temp, student_strong=z[-1],
                                   teacher_strong=teacher_logits[-1], zscore=self.recipe["zscore"], **self.options)
        return self.recipe["ce_weight"] * ce + kd_weight(epoch, self.recipe) * kd, ce, kd, z[0]      # line 6

    def step(self, parts, epoch):
        """One update from this process's share of a batch, in parts whose gradients add up.

        parts: a list of (images of each view, targets, teacher's logits of each view, place of the first image in the run). Returns
        the share's sums of loss, L_CE, L_KD and hits, (5,), and the student's logits of the last part's first view.
        """
        sums = torch.zeros(5, device=self.team.device)
        self.optimizer.zero_grad()
        for i, (images, target, teacher_logits, place) in enumerate(parts):
            torch.manual_seed((self.recipe["seed"] * 2**40 + place) % 2**63)        # dropout's masks: of the images, not of the process
            last = i == len(parts) - 1
            with nullcontext() if last or self.team.flags is None else self.parallel.no_sync():
                loss, ce, kd, logits = self.losses(images, target, teacher_logits, epoch)
                (loss * (len(target) * self.team.size / self.recipe["batch_size"])).backward()      # processes' gradients are averaged
            logits = logits.detach()
            sums += torch.cat([len(target) * torch.stack([x.detach() for x in (loss, ce, kd)]), torch.stack(top_k_hits(logits, target))])
        if self.curriculum and self.team.flags is not None:         # its gradient is not DistributedDataParallel's
            self.curriculum.g.grad = self.team.total(self.curriculum.g.grad) / self.team.size
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(epoch, self.recipe)
        self.optimizer.step()
        return sums, logits

    def state(self):
        return {"model": self.student.state_dict(), "optimizer": self.optimizer.state_dict(),
                "curriculum": self.curriculum.state_dict() if self.curriculum else {}}

    def load(self, state):
        self.student.load_state_dict(state["model"])
        for held, kept in zip(self.optimizer.state.values(), state["optimizer"]["state"].values()):
            held["momentum_buffer"].copy_(kept["momentum_buffer"])
        for group, kept in zip(self.optimizer.param_groups, state["optimizer"]["param_groups"]):
            group["lr"] = kept["lr"]
        if self.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])


class Lessons:
    """One process's share of every batch of an epoch, in parts: what `Learner.step` takes."""

    def __init__(self, recipe, folders, teacher, team, workers, at_once):
        self.recipe, self.teacher, self.team = recipe, teacher, team
        share = -(-recipe["batch_size"] // team.size)       # or one image less
        self.parts = min(-(-share // (at_once or share)), recipe["batch_size"] // team.size)
        self.views = 2 if recipe["method"] == "mlkd" else 1
        self.dataset, self.keys = FolderImages(folders.train, recipe["size"], self.views), []
        self.loader = folder_batches(self.dataset, self.keys, workers, team.device.type == "cuda")
        self.bad = set()        # indices of images that cannot be decoded

    def check(self):
        """Learns from all processes which images cannot be decoded; RunError in each where they are too many."""
        self.bad = self.team.gather(self.bad)
        if len(self.bad) > max(BAD * len(self.dataset), 1):
            raise RunError(f"{len(self.bad)} of {len(self.dataset)} training images cannot be decoded, for instance "
                           f"{self.dataset.samples[min(self.bad)][0]}; mend or remove them")

    def epoch(self, epoch, first_step):
        team, batch = self.team, self.recipe["batch_size"]
        n = len(self.dataset)
        self.keys[:], places = folder_keys(self.recipe["seed"], epoch, n, batch, first_step, team.rank, team.size, self.parts)
        loader = iter(self.loader)
        strong = strong_draws(self.recipe["seed"], epoch, n) if self.views == 2 else None
        for first in range(0, len(places), self.parts):
            yield [(*self._part(*next(loader), strong, place), epoch * n + place) for place in places[first:first + self.parts]]

    def _part(self, images, flips, target, bad, strong, place):
        device = self.team.device
        for index in set(bad) - self.bad:
            click.echo(f"notice: {self.dataset.samples[index][0]} cannot be decoded; another image stands in")
        self.bad |= set(bad)
        images, flips = ([x.to(device, non_blocking=True) for x in views] for views in (images, flips))
        if strong:
            draws = StrongDraws(*(x.to(device) for x in strong[place:place + len(target)]))
            images[1] = strong_operations(images[1], draws)
        images = [normalise_folder(x, flip) for x, flip in zip(images, flips)]
        teacher_logits = [self.teacher.logits(x) for x in images] if self.teacher else []       # line 2: v_n
        return images, target.to(device, non_blocking=True), teacher_logits


class Exam:
    """One process's share of the evaluation images, `at_once` a batch."""

    def __init__(self, samples, size, team, workers, at_once):
        mine = range(team.rank, len(samples), team.size)
        self.keys = [[(i, 0) for i in mine[first:first + at_once]] for first in range(0, len(mine), at_once)]
        self.loader = folder_batches(FolderImages(samples, size), self.keys, workers, team.device.type == "cuda")
        self.samples, self.team, self.rounds = samples, team, -(-len(samples) // (team.size * at_once))

    @torch.no_grad()
    def evaluate(self, predict, interrupted=lambda: None):
        """Mean cross-entropy, top-1 and top-5 (%), exact over all samples whatever the number of processes.

        interrupted: called between batches, by every process equally often; it may raise.
        """
        team, samples, loader = self.team, self.samples, iter(self.loader)
        sums, bad = [torch.zeros(3, device=team.device)], set()
        for i in range(self.rounds):
            interrupted()
            if i < len(self.keys):      # some have a batch more than others
                images, flips, target, undecodable = next(loader)
                bad |= set(undecodable)
                target = target.to(team.device)
                logits = predict(normalise_folder(images[0].to(team.device), flips[0].to(team.device)))
                sums.append(torch.stack([F.cross_entropy(logits, target, reduction="sum"), *top_k_hits(logits, target)]))
        bad = team.gather(bad)
        if bad:
            raise RunError(f"{len(bad)} evaluation images cannot be decoded, for instance {samples[min(bad)][0]}; mend or remove them")
        loss, top1, top5 = (team.total(torch.stack(sums).cpu().double().sum(0)) / len(samples)).tolist()
        return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def train(recipe, folders, teacher, exam, run, state, team, stop, flags, until=None):
    """One run (Algorithm 2). Returns its result, a dict; None when it leaves after `until` epochs, as a kill would."""
    learner = Learner(recipe, len(folders.classes), team, flags["compile"])
    lessons = Lessons(recipe, folders, teacher, team, flags["workers"], flags["at_once"])
    state = state or {"epoch": 0, "step": 0, "seconds": 0.0, "sums": torch.zeros(5), "best": {"top1": -1.0}, "row": {}}
    lessons.bad |= set(state.get("bad", ()))
    if "model" in state:
        learner.load(state)
        team.say(f"going on from epoch {state['epoch']}, step {state['step']} ({run.folder})")
    start, first_step, sums = state["epoch"], state["step"], state["sums"].to(team.device)      # sums: of all processes
    best, row, name = state["best"], state["row"], folders.eval_name
    saved = time.monotonic()
    begun = saved - state["seconds"]
    batch = recipe["batch_size"]
    steps = len(folders.train) // batch
    progress = Progress(steps * batch, recipe["epochs"], (start * steps + first_step) * batch, team.device)

    def save(epoch, step, sums, logged=None):
        lessons.check()

        def write():
            if not all(v.isfinite().all() for v in learner.student.state_dict().values()):
                raise RunError(f"the student's weights became infinite in epoch {epoch}; {KEPT.format(run.folder)}")
            if logged:
                run.log(logged)
            run.save({"epoch": epoch, "step": step, "seconds": time.monotonic() - begun, "sums": sums.cpu(), "best": best,
                      "row": row, "bad": sorted(lessons.bad), **learner.state()})
        team.first(write)

    def interrupted():
        if team.any(stop.asked)[0]:
            leave(team, run)

    for epoch in range(start, recipe["epochs"]):
        epoch_begun, seen = time.monotonic(), (steps - first_step) * batch
        mine = torch.zeros(5, device=team.device)
        learner.student.train()
        for i, parts in enumerate(lessons.epoch(epoch, first_step), first_step):        # Algorithm 2, line 1
            losses, logits = learner.step(parts, recipe_epoch(epoch * steps + i, steps, recipe))        # lines 2 to 6
            mine += losses
            if team.rank == 0:
                progress.step(epoch, batch)
            due = i < steps - 1 and (stop.asked or time.monotonic() - saved >= flags["save_every"])
            due, asked = team.any(due, stop.asked)
            if due or team.device.type == "cpu" or i == steps - 1:
                check_finite(mine, losses, epoch, i, logits, parts[-1][2], run)
            if due:
                sums, mine = sums + team.total(mine), torch.zeros_like(mine)
                save(epoch, i + 1, sums)
                saved = time.monotonic()
                if asked:
                    leave(team, run)
        spent = time.monotonic() - epoch_begun
        sums = sums + team.total(mine)
        save(epoch, steps, sums)        # the evaluation may take minutes
        learner.student.eval()
        team.agree(learner.student.buffers())       # all evaluate what is saved
        scores = exam.evaluate(learner.predict, interrupted)
        if not math.isfinite(scores["loss"]):
            raise RunError(f"the evaluation's loss became {scores['loss']} in epoch {epoch + 1}; {KEPT.format(run.folder)}")
        row = epoch_row(epoch, learner.optimizer, sums / (steps * batch), scores, name)
        if learner.curriculum:
            row["temperature"] = learner.curriculum(0.0).item()
        row |= {"img_s": seen / spent, "seconds": time.monotonic() - epoch_begun, "undecodable": len(lessons.bad)}
        if row[f"{name}_top1"] > best["top1"]:
            best = {"top1": row[f"{name}_top1"], "top5": row[f"{name}_top5"], "epoch": epoch + 1}
        first_step, sums = 0, torch.zeros_like(sums)
        save(epoch + 1, 0, sums, row)
        if team.rank == 0:
            progress.print(epoch_line(row, best, name, recipe["epochs"]))
        saved = time.monotonic()
        if epoch + 1 == until:
            return None
        if epoch + 1 < recipe["epochs"]:
            interrupted()
    return finish(recipe, folders, run, learner.student, row, best, (time.monotonic() - begun) / 60, team)


def leave(team, run):
    """All processes, promptly, after a save."""
    if team.rank == 0:
        raise runs.Stopped(f"stopped, and saved in {run.folder}: the same command goes on from here")
    raise click.exceptions.Exit(1)


def finish(recipe, folders, run, student, row, best, minutes, team):
    """Writes student.pt and result.json; returns the result."""
    images = len(folders.train) // recipe["batch_size"] * recipe["batch_size"] * recipe["epochs"]
    result = {"last": {k: row[f"{folders.eval_name}_{k}"] for k in ("top1", "top5")}, "best": best,
              "best_chosen_on": folders.eval_name, "epochs": recipe["epochs"], "minutes": minutes,
              "img_s": images / (60 * minutes), "processes": team.size, "peak_memory_mib": runs.peak_memory(team.device)}

    def write():
        facts = {k: recipe[k] for k in ("student", "teacher", "method", "zscore", "base_temp", "epochs", "seed", "data", "size", "val_from_train")}
        weights = {k: v.cpu().contiguous() for k, v in student.state_dict().items()}
        run.finish(result, {"model": weights, **facts, "num_classes": len(folders.classes), "classes": folders.classes, **result["last"]})
    team.first(write)
    return result


# ---------------------------------------------------------------- the command


def network(name, classes, weights=None):
    """One of NETWORKS, untrained, or with torchvision's weights of that name."""
    if name == "MobileNetV1":
        return create_model(name, classes)
    if weights is None:
        model = torchvision.models.get_model(name, num_classes=classes)
    else:
        known = [w.name for w in torchvision.models.get_model_weights(name)]
        if weights not in known:
            raise RunError(f"--teacher-weights {weights}: torchvision's {name} has {', '.join(known)}")
        try:
            model = torchvision.models.get_model(name, weights=weights)
        except (OSError, RuntimeError, http.client.HTTPException) as error:     # no network, or a damaged download
            raise RunError(f"torchvision's {weights} of {name} could not be downloaded ({runs.first_line(error)}); give the same command "
                           "again, or name a file with --teacher-checkpoint") from None
    model.name = name
    return model


def refusal(model, size):
    """Why a network does not take images of size x size pixels, None where it does."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        return f"{model.name} does not take images of {size} x {size} pixels ({runs.first_line(error)}): choose another --size"


def get_teacher(recipe, folders, flags, team):
    """The Teacher, with the weights that were named, or torchvision's."""
    name, classes, path = recipe["teacher"], len(folders.classes), flags["teacher_checkpoint"]
    if path or flags["dry_run"]:
        model, source = network(name, classes), path or "untrained"
        if path:
            load_weights(model, path, prefer="teacher")
    elif name == "MobileNetV1":
        raise RunError("nobody publishes a MobileNetV1 as a teacher: name its weights with --teacher-checkpoint")
    elif classes != 1000:
        raise RunError(f"torchvision's {name} is for 1000 classes, {flags['data_dir']} has {classes}: train a teacher on it (--method none "
                       f"--student {name}) and name it with --teacher-checkpoint")
    else:
        team.first(lambda: network(name, classes, flags["teacher_weights"]) and None)       # rank 0 downloads for all on its machine
        model, source = network(name, classes, flags["teacher_weights"]), f"torchvision's {flags['teacher_weights']}"
    teacher = Teacher(model, team.device, recipe["precision"], source, flags["compile"])
    teacher.batch = None
    return teacher


def resolve(flags, team):
    """The run's recipe: the pair's, with the flags that were given. Returns (recipe, lines to print)."""
    names = tuple(flags[k] for k in ("teacher", "student", "method", "zscore"))
    found = recipes.imagenet(*names)
    doubt = recipes.imagenet_unsure(*names)
    lines = [f"unsure: {doubt}"] if doubt else []
    if not found.pop("known") and names[2] != "none":
        lines.append(f"no published recipe for {names[0]} -> {names[1]}: taking resnet34 -> resnet18's")
    given = {k: flags[k] for k in ("base_temp", "kd_weight", "ce_weight", "alpha", "beta", "zscore_relations", "epochs", "batch_size",
                                   "lr", "weight_decay") if flags[k] is not None}
    if given.get("batch_size", 512) != 512 and "lr" not in given:
        lines.append(f"warning: the recipe's learning rate {found['lr']:g} is for batches of 512; for {given['batch_size']} give --lr too "
                     f"(linear rule: {found['lr'] * given['batch_size'] / 512:g})")
    recipe = dict(zip(("teacher", "student", "method", "zscore"), names)) | {"data": Path(flags["data_dir"]).resolve().name} | found | {
        "full_epochs": found["epochs"], **given, "precision": runs.pick_precision(flags["precision"], team.device),
        "deterministic": flags["deterministic"], "compile": flags["compile"], "size": flags["size"],
        "val_from_train": flags["val_from_train"], "seed": flags["seed"]}
    if recipe["batch_size"] < team.size:
        raise click.UsageError(f"--batch-size {recipe['batch_size']} is the total: too few images for {team.size} processes")
    return recipe, lines


def run_name(recipe):
    pair = [recipe["teacher"]] if recipe["teacher"] else []
    return "-".join([*pair, recipe["student"], recipes.key(recipe["method"], recipe["zscore"]), recipe["data"], f"seed{recipe['seed']}"])


def digest(folders):
    """Which images a run learns from and is evaluated on: their numbers, and a hash of their names and classes."""
    names = hashlib.sha256()
    for path, target in itertools.chain(folders.train, folders.eval):
        names.update(f"{'/'.join(Path(path).parts[-3:])} {target}\n".encode())
    return f"{len(folders.train)} and {len(folders.eval)} of {len(folders.classes)} classes, {names.hexdigest()[:12]}"


def published(recipe, folders, method):
    """As `recipes.imagenet_published`, for what may be ImageNet itself."""
    if len(folders.classes) == 1000 and folders.eval_name == "val":
        return recipes.imagenet_published(recipe["teacher"], recipe["student"], method, recipe["zscore"] and method != "teacher")


def distil(recipe, folders, teacher, flags, team, until=None):
    """One run in its folder: printed, trained or found finished. Returns its result."""
    recipe = recipe | {"images": digest(folders)} | ({"teacher_sha256": teacher.sha256} if teacher else {})
    for name in (recipe["teacher"], recipe["student"]):
        problem = name and refusal(network(name, len(folders.classes)), recipe["size"])
        if problem:
            raise click.UsageError(problem)
    run = Run(Path(flags["out"]) / run_name(recipe), recipe, runs.collect_facts(team.device) | {"processes": team.size})
    team.say(f"{run.folder}: " + ", ".join(f"{k} {v}" for k, v in recipe.items() if v not in (None, False, "", []) and k != "teacher_sha256"))
    if len(folders.train) < recipe["batch_size"]:
        raise click.UsageError(f"--batch-size {recipe['batch_size']}: there are {len(folders.train)} training images")
    at_once = flags["at_once"] or min(256, -(-recipe["batch_size"] // team.size))
    exam = Exam(folders.eval, recipe["size"], team, flags["workers"], at_once)
    try:
        state, result = team.first(lambda: (run.open(), run.finished()))        # rank 0 alone touches the folder
        if result:
            team.say("finished before")
        elif teacher and not state and not flags["dry_run"]:
            scores = exam.evaluate(teacher.logits)
            known = published(recipe, folders, "teacher")
            team.say(f"teacher {teacher.name} ({teacher.source}): {scores['top1']:.2f} % top-1 on the {folders.eval_name} images"
                     + (f", published {known[0]:.2f}" if known else ""))
            if known and scores["top1"] <= known[0] - 1:
                team.say("warning: this teacher is worse than the published one; the paper's numbers cannot be expected")
        with Stop() as stop:
            result = result or train(recipe, folders, teacher, exam, run, state, team, stop, flags, until)
    finally:
        run.close()
    if result:
        line = (f"{run_name(recipe)}: last epoch {result['last']['top1']:.2f} top-1, {result['last']['top5']:.2f} top-5; best "
                f"{result['best']['top1']:.2f} (epoch {result['best']['epoch']}, chosen on {result['best_chosen_on']})")
        known = published(recipe, folders, recipe["method"])
        logged = recipes.imagenet_logged(recipe["teacher"], recipe["student"], recipe["method"], recipe["zscore"])
        if known:
            line += f"; published {known[0]:.2f}" + (f", last epoch of the authors' log {logged:.2f}" if logged else "")
        team.say(f"{line}; {runs.duration(60 * result['minutes'])}")
    return result


def dry_run(recipe, flags, team):
    """The whole path on made images: an epoch of two batches, save, leave, resume, evaluate, result, and its file evaluated again."""
    networks = [network(name, 3) for name in (recipe["teacher"], recipe["student"]) if name]
    size = 64 if not any(refusal(model, 64) for model in networks) else flags["size"]
    recipe |= {"batch_size": 8 * team.size, "epochs": 2, "size": size, "data": "made", "val_from_train": 0}
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:       # each process's own, the same in all: nodes need not share a disk
        for i, part in enumerate(["train"] * 2 * recipe["batch_size"] + ["val"] * 7):
            path = Path(folder, part, f"class{i % 3}", f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8, generator=generator)).save(path)
        folders = load_folders(folder)
        if flags["teacher_checkpoint"]:     # whose classes are the file's
            count = class_count(read_checkpoint(flags["teacher_checkpoint"], recipe["teacher"]), network(recipe["teacher"], 3)) or 3
            folders = folders._replace(classes=folders.classes + list(map(str, range(3, count))))
        flags = flags | {"out": str(Path(folder, "runs")), "workers": 0, "at_once": None, "data_dir": folder}
        teacher = get_teacher(recipe, folders, flags, team) if recipe["teacher"] else None
        distil(recipe, folders, teacher, flags, team, until=1)
        distil(recipe, folders, teacher, flags, team)
        if team.size == 1:      # the file is rank 0's
            evaluate_file(flags | {"eval_file": Path(folder, "runs", run_name(recipe), "student.pt")}, team, folders)
        team.share()
    team.say("dry run: all is well")


def evaluate_file(flags, team, folders=None):
    """--eval: loss, top-1 and top-5 of a checkpoint on the evaluation images, by default those of the flags."""
    folders = folders or load_folders(flags["data_dir"], flags["val_from_train"])
    said = facts_of(read_checkpoint(flags["eval_file"], flags["student"]))
    name, size = flags["student"] or said.get("student"), said.get("size", flags["size"])
    if name not in NETWORKS:
        raise click.UsageError(f"{flags['eval_file']} does not say which network it holds: name it with --student")
    model = network(name, len(folders.classes))
    load_weights(model, flags["eval_file"])
    if problem := refusal(model, size):
        raise click.UsageError(problem)
    teacher = Teacher(model, team.device, flags["precision"] or "fp32")
    teacher.batch = flags["at_once"] or 64
    scores = Exam(folders.eval, size, team, flags["workers"], teacher.batch).evaluate(teacher.logits)
    team.say(f"{name}: {scores['top1']:.2f} top-1, {scores['top5']:.2f} top-5 (%), loss {scores['loss']:.4f} on the "
             f"{len(folders.eval)} {folders.eval_name} images of {flags['data_dir']} ({flags['eval_file']})")


@click.command(cls=runs.Command, help=__doc__)
@click.option("--method", type=runs.Choice(["none", *METHODS]), default="kd", show_default=True,
              help="Distillation method; none trains the student alone.")
@runs.shared_flags
@click.option("--data-dir", default="imagenet", show_default=True, metavar="DIR", help="Folder that holds train/ and val/.")
@click.option("--teacher-weights", default="IMAGENET1K_V1", show_default=True, metavar="NAME", help="torchvision's name of the teacher's weights.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True, help="Pixels of an image's side.")
@click.option("--workers", type=click.IntRange(min=0), default=min(8, os.cpu_count() or 1), show_default="8 or the cores", help="Loading processes, for each process.")
@click.option("--at-once", type=runs.COUNT, metavar="N", help="Images that a device takes at once; the rest of its share is accumulated.  [default: all]")
@click.option("--save-every", type=runs.POSITIVE, default=300, show_default=True, help="Seconds between saves in an epoch.")
def main(**flags):
    if flags["list_recipes"]:
        click.echo(recipes.imagenet_table())
        return
    runs.check_method(flags, NETWORKS)
    if flags["seeds"] != 1:
        raise click.UsageError("--seeds is for train_cifar.py; here, give one --seed at a time")
    team = Team(flags["device"])
    try:
        runs.pick_kernels(flags["deterministic"])
        runs.keep_memory()
        if flags["compile"]:
            runs.check_compiler(team.device)
        if flags["eval_file"]:
            evaluate_file(flags, team)
            return
        recipe, lines = resolve(flags, team)
        for line in lines:
            team.say(line)
        if flags["dry_run"]:
            dry_run(recipe, flags, team)
            return
        folders = load_folders(flags["data_dir"], flags["val_from_train"])
        team.say(f"{len(folders.train)} training and {len(folders.eval)} {folders.eval_name} images of {len(folders.classes)} classes, "
                 f"{team.size} process{'es' * (team.size > 1)}")
        teacher = get_teacher(recipe, folders, flags, team) if recipe["teacher"] else None
        distil(recipe, folders, teacher, flags, team)
    except ValueError as error:     # the rooms' own, one line each
        raise RunError(str(error)) from None
    except torch.OutOfMemoryError:
        raise RunError("the device's memory is full: let it take fewer images at once, --at-once N (the batch stays the same)") from None
    except RuntimeError as error:
        if "DataLoader" in str(error):
            for child in multiprocessing.active_children():
                child.kill()        # one that hangs hears nothing else, and the end of this process waits for it
            raise RunError(f"a loading process was lost ({runs.first_line(error)}): memory is full, or the shared memory is small (in a "
                           "container, --shm-size); give fewer --workers, or --workers 0") from None
        if team.flags is None or not any(words in str(error) for words in ("Connection closed", "Connection reset")):
            raise
        raise RunError(f"process {team.rank} lost another one, whose own lines say why") from None
    finally:
        team.close()


if __name__ == "__main__":
    main()
