"""Logit standardization in knowledge distillation on CIFAR-100.

\b
  python train_cifar.py --demo                                                needs nothing: minutes on a laptop
  python train_cifar.py --teacher resnet32x4 --student resnet8x4 --zscore     the paper's KD+Z
  python train_cifar.py --teacher resnet32x4 --student resnet8x4              KD, the baseline
  python train_cifar.py --method none --student resnet32x4                    a network alone: a teacher
  python train_cifar.py --teacher ... --student ... --zscore --seeds 3        mean and standard deviation
  python train_cifar.py --eval FILE --student resnet56                        evaluate a checkpoint
  python train_cifar.py --list                                                recipes and published numbers

A flag that is left out takes the pair's recipe. A run that was stopped goes on when the same command is given again.
The last epoch is the result; the best epoch, chosen on the test split, stands beside it.
"""

import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import click
import torch
import torch.nn.functional as F
from click.core import ParameterSource

import recipes
import run as runs
from data import (Data, crop_and_flip, epoch_draws, evaluate, load_data, normalise, strong_draws, strong_view, synthetic,
                  top_k_hits)
from models import MODELS, create_model, load_weights
from weights import facts_of, read_checkpoint
from recipes import kd_weight, learning_rate, recipe_epoch, reversal
from run import KEPT, Progress, Run, RunError, Stop, check_finite, epoch_line, epoch_row
from teacher import ARCHIVE_URL, CHECKPOINTS, Teacher, find_teacher, load_teacher
from zscore_kd import METHODS, CurriculumTemperature, distillation_loss

AHEAD = {"cuda": 8192, "mps": 1024, "cpu": 1024}      # images that are prepared at once
REST = 10           # seconds without a save at the end of an epoch on a GPU, where an epoch may take less than one
ADVICE = ("take a CUDA GPU, or a short run of small networks, for instance --student resnet8 --epochs 12 "
          "--train-images 10000")


# ---------------------------------------------------------------- training


class Learner(NamedTuple):
    student: torch.nn.Module
    curriculum: torch.nn.Module | None      # CTKD's temperature
    optimizer: torch.optim.Optimizer
    predict: Callable                       # images -> float32 logits
    step: Callable                          # one update
    set_epoch: Callable                     # the recipe's epoch, for what changes with it


def build(recipe, num_classes, device, compile=False, capture=True):
    """The student as the seed makes it, its optimizer, and what one step of Algorithm 2 does with them.

    compile: the step by torch.compile. capture: on CUDA, the step as a CUDA graph.
    """
    torch.manual_seed(recipe["seed"])
    student = create_model(recipe["student"], num_classes).to(device, memory_format=torch.channels_last)
    curriculum = CurriculumTemperature(recipe["base_temp"], recipe["span"]).to(device) if recipe["method"] == "ctkd" else None
    learned = [*student.parameters(), *(curriculum.parameters() if curriculum else ())]
    # tensors, as a captured or compiled step reads their values again each time
    lr, weight, reverse = (torch.zeros((), device=device) for _ in range(3))
    optimizer = torch.optim.SGD(learned, lr=lr, momentum=recipe["momentum"], weight_decay=recipe["weight_decay"], fused=True)
    for parameter in learned:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe["precision"] == "bf16")
    options = {k: recipe[k] for k in ("alpha", "beta", "zscore_relations") if k in recipe}

    shown = None

    def set_epoch(epoch):
        nonlocal shown
        if epoch != shown:
            lr.fill_(learning_rate(epoch, recipe))
            weight.fill_(kd_weight(epoch, recipe))
            reverse.fill_(reversal(epoch, recipe))
            shown = epoch

    def predict(images):
        with autocast:
            return student(images).float()

    def losses(images, target, teacher_logits):
        student_logits = [predict(view) for view in images]                             # Algorithm 2, line 2: z_n
        ce = sum(F.cross_entropy(z, target) for z in student_logits)                    # lines 5 and 6: L_CE
        kd = torch.zeros_like(ce)
        if teacher_logits:
            temp = curriculum(reverse) if curriculum else recipe["base_temp"]
            kd = distillation_loss(recipe["method"], student_logits[0], teacher_logits[0], target, temp,
                                   student_strong=student_logits[-1], teacher_strong=teacher_logits[-1],
                                   zscore=recipe["zscore"], **options)                  # lines 3, 4 and 6: tau^2 L_KD
        return recipe["ce_weight"] * ce + weight * kd, ce, kd, student_logits[0]        # line 6

    if compile:
        losses = torch.compile(losses, dynamic=False)

    def step(images, target, teacher_logits):
        """images and teacher_logits: one view's, or the weak and the strong view's.

        Returns the batch's sums of loss, L_CE, L_KD and hits, (5,), and the student's logits of the first view.
        """
        loss, ce, kd, logits = losses(images, target, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logits = logits.detach()
        sums = torch.stack([len(target) * x.detach() for x in (loss, ce, kd)])
        return torch.cat([sums, torch.stack(top_k_hits(logits, target))]), logits

    if device.type == "cuda" and capture:
        step = Captured(step, [*student.state_dict(keep_vars=True).values(), *learned,
                               *(optimizer.state[p]["momentum_buffer"] for p in learned)])
    return Learner(student, curriculum, optimizer, predict, step, set_epoch)


class Captured:
    """A training step as CUDA graphs, one for each batch size: one launch instead of hundreds, and the same numbers.

    state: the tensors that a step changes in place. They must stay where they are, and so must what the step reads.
    """

    def __init__(self, step, state):
        self.step, self.state, self.graphs = step, state, {}

    def __call__(self, images, target, teacher_logits):
        arguments = [*images, target, *teacher_logits]
        if self.graphs is not None and len(target) not in self.graphs:
            try:
                self.graphs[len(target)] = self._capture(arguments, len(images))
            except RuntimeError as error:
                click.echo(f"notice: no CUDA graph of the step ({str(error).splitlines()[0]}); going on without, slower")
                self.graphs = None
        if self.graphs is None:
            return self.step(images, target, teacher_logits)
        graph, inputs, outputs = self.graphs[len(target)]
        for held, argument in zip(inputs, arguments):
            held.copy_(argument)
        graph.replay()
        return outputs

    def _capture(self, arguments, views):
        """(graph, the tensors that it reads, the tensors that it writes); RuntimeError where a step cannot be captured."""
        inputs = [x.clone() for x in arguments]
        call = lambda: self.step(inputs[:views], inputs[views], inputs[views + 1:])
        before = [x.detach().clone() for x in self.state]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):          # kernels are chosen, workspaces made
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = next((g.pool() for g, _, _ in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                outputs = call()
            return graph, inputs, outputs
        finally:
            for now, then in zip(self.state, before):       # as if the rehearsal had not been
                now.detach().copy_(then)


def stretch(batch, device):
    """How many images are prepared at once, whole batches."""
    return max(1, AHEAD[device.type] // batch) * batch


def lessons(recipe, data, teacher, epoch, first_step, device):
    """What each step of an epoch learns from: (the images of each view, targets, the teacher's logits of each view).

    Made for AHEAD images at once: the teacher does not depend on the student, and few large operations beat many small ones.
    """
    n, batch = len(data.train.targets), recipe["batch_size"]
    order, views = map(torch.from_numpy, epoch_draws(recipe["seed"], epoch, n))
    strong = strong_draws(recipe["seed"], epoch, n) if recipe["method"] == "mlkd" else None
    size = stretch(batch, device)
    for start in range(first_step * batch, n, size):
        part = slice(start, start + size)
        indices = order[part].to(device)
        chosen, target = data.train.images[indices], data.train.targets[indices]
        images = [normalise(crop_and_flip(chosen, views[part].to(device)))]
        teacher_logits = [teacher.answers(order[part], views[part], images[0])] if teacher else []  # Algorithm 2, line 2: v_n
        if strong:
            images.append(normalise(strong_view(chosen, strong[part].to(device))))
            teacher_logits += [teacher.logits(images[1])] if teacher else []
        for first in range(0, len(target), batch):
            now = slice(first, first + batch)
            yield [x[now] for x in images], target[now], [v[now] for v in teacher_logits]


def train(recipe, data, teacher, run, state, device, stop, *, save_every=60, until=None, compile=False, capture=True):
    """One run (Algorithm 2). Returns its result, a dict.

    teacher: a Teacher that attends to data.train, None for method none. state: the checkpoint to go on from, or None. stop: a Stop.
    save_every: seconds between saves inside an epoch; every epoch saves too, on a GPU every REST seconds.
    until: leave after so many epochs, as a kill would; returns None.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    student, curriculum, optimizer, predict, step, set_epoch = build(recipe, data.num_classes, device, compile, capture)
    state = state or {"epoch": 0, "step": 0, "seconds": 0.0, "sums": torch.zeros(5), "best": {"top1": -1.0}, "row": {}}
    if "model" in state:
        student.load_state_dict(state["model"])
        for held, kept in zip(optimizer.state.values(), state["optimizer"]["state"].values()):
            held["momentum_buffer"].copy_(kept["momentum_buffer"])      # in place: a captured step reads it there
        if curriculum:
            curriculum.load_state_dict(state["curriculum"])
        click.echo(f"going on from epoch {state['epoch']}, step {state['step']} ({run.folder})")
    start, first_step, sums = state["epoch"], state["step"], state["sums"].to(device)
    best, row = state["best"], state["row"]                                             # row: the last epoch's
    saved = time.monotonic()
    begun = saved - state["seconds"]                                                    # time of earlier sessions counts

    def save(epoch, step):
        if not all(v.isfinite().all() for v in student.state_dict().values()):
            raise RunError(f"the student's weights became infinite in epoch {epoch}; {KEPT.format(run.folder)}")
        run.save({"epoch": epoch, "step": step, "seconds": time.monotonic() - begun, "sums": sums.cpu(), "best": best,
                  "row": row, "model": student.state_dict(), "optimizer": optimizer.state_dict(),
                  "curriculum": curriculum.state_dict() if curriculum else {}})

    n, batch = len(data.train.targets), recipe["batch_size"]
    steps = -(-n // batch)                                                              # the last batch is smaller
    progress = Progress(n, recipe["epochs"], start * n + first_step * batch, device, ADVICE, stretch(batch, device))
    for epoch in range(start, recipe["epochs"]):
        epoch_begun, seen = time.monotonic(), n - first_step * batch
        student.train()
        for i, (images, target, teacher_logits) in enumerate(lessons(recipe, data, teacher, epoch, first_step, device), first_step):
            set_epoch(recipe_epoch(epoch * steps + i, steps, recipe))
            losses, student_logits = step(images, target, teacher_logits)               # Algorithm 2, lines 2 to 6
            sums += losses

            progress.step(epoch, len(target))
            due = i < steps - 1 and (stop.asked or time.monotonic() - saved >= save_every)
            if due or device.type == "cpu" or i == steps - 1:       # on a GPU looking waits for it
                check_finite(sums, losses, epoch, i, student_logits, teacher_logits, run)
            if due:
                save(epoch, i + 1)
                saved = time.monotonic()
                stop.leave_if_asked(run.folder)

        spent = time.monotonic() - epoch_begun
        student.eval()
        scores = evaluate(predict, data.eval)
        if not math.isfinite(scores["loss"]):
            raise RunError(f"the evaluation's loss became {scores['loss']} in epoch {epoch + 1}; {KEPT.format(run.folder)}")
        row = epoch_row(epoch, optimizer, sums / n, scores, data.eval_name)
        if curriculum:
            row["temperature"] = curriculum(0.0).item()
        row |= {"img_s": seen / spent, "seconds": time.monotonic() - epoch_begun}
        if row[f"{data.eval_name}_top1"] > best["top1"]:
            best = {"top1": row[f"{data.eval_name}_top1"], "top5": row[f"{data.eval_name}_top5"], "epoch": epoch + 1}
        first_step, sums = 0, torch.zeros_like(sums)
        run.log(row)
        asked, last = stop.asked, epoch + 1 in (recipe["epochs"], until)
        if device.type == "cpu" or last or asked or time.monotonic() - saved >= min(save_every, REST):
            save(epoch + 1, 0)
            saved = time.monotonic()
        progress.print(epoch_line(row, best, data.eval_name, recipe["epochs"]))
        if epoch + 1 == until:
            return None
        if asked and not last:
            stop.leave_if_asked(run.folder)
    return finish(recipe, data, run, student, row, best, (time.monotonic() - begun) / 60, device)


def finish(recipe, data, run, student, row, best, minutes, device):
    """Writes student.pt and result.json; returns the result."""
    result = {"last": {k: row[f"{data.eval_name}_{k}"] for k in ("top1", "top5")}, "best": best,
              "best_chosen_on": data.eval_name, "epochs": recipe["epochs"], "minutes": minutes,
              "img_s": len(data.train.targets) * recipe["epochs"] / (60 * minutes),
              "peak_memory_mib": runs.peak_memory(device)}
    facts = {k: recipe[k] for k in ("student", "teacher", "method", "zscore", "base_temp", "epochs", "seed", "data", "train_images",
                                    "val_from_train")}
    weights = {k: v.cpu().contiguous() for k, v in student.state_dict().items()}
    run.finish(result, {"model": weights, **facts, "num_classes": data.num_classes, **result["last"]})
    return result


# ---------------------------------------------------------------- the command


def resolve(flags, device):
    """The run's recipe: the pair's, with the flags that were given. Returns (recipe, lines to print)."""
    teacher, student, method, zscore = (flags[k] for k in ("teacher", "student", "method", "zscore"))
    found = recipes.recipe(teacher, student, method, zscore, flags["recipe"])
    doubts = recipes.unsure(teacher, student, method, zscore, flags["recipe"])
    lines = [f"unsure: {reason}" for reason in doubts]
    if not found.pop("known"):
        what = f"{student} alone" if method == "none" else f"{teacher} -> {student}"
        lines.append(f"no published recipe for {what}: taking learning rate {found['lr']:g}"
                     + (f", base temperature {found['base_temp']:g}, weight {found['kd_weight']:g}" if teacher else ""))
    given = {k: flags[k] for k in ("base_temp", "kd_weight", "ce_weight", "alpha", "beta", "zscore_relations", "epochs",
                                   "batch_size", "lr", "weight_decay") if flags[k] is not None}
    if given.get("batch_size", found["batch_size"]) != found["batch_size"] and "lr" not in given:
        scaled = found["lr"] * given["batch_size"] / found["batch_size"]
        lines.append(f"warning: the recipe's learning rate {found['lr']:g} is for batches of {found['batch_size']}; for "
                     f"{given['batch_size']} give --lr too (linear rule: {scaled:g})")
    recipe = {"teacher": teacher, "student": student, "method": method, "zscore": zscore, "data": flags["data"],
              **found, "full_epochs": found["epochs"], **given,
              "precision": runs.pick_precision(flags["precision"], device),
              "deterministic": flags["deterministic"], "compile": flags["compile"],
              "train_images": flags["train_images"], "val_from_train": flags["val_from_train"]}
    if teacher:
        recipe["exact_teacher"] = flags["exact_teacher"]
    return recipe, lines


def run_name(recipe):
    """The folder's name: resnet32x4-resnet8x4-kd-z-seed0."""
    pair = [recipe["teacher"]] if recipe["teacher"] else []
    data = [] if recipe["data"] == "cifar100" else [recipe["data"]]
    return "-".join([*pair, recipe["student"], recipes.key(recipe["method"], recipe["zscore"]), *data,
                     f"seed{recipe['seed']}"])


def get_teacher(recipe, data, flags, device, train=None):
    """The Teacher of a recipe, trained here first where there is none; it attends to the training images. train: how, if not `train_teacher`."""
    name, precision = recipe["teacher"], recipe["precision"]
    if flags["dry_run"] and flags["teacher_checkpoint"] is None:
        return attending(Teacher(create_model(name), device, precision), data, flags)
    if recipe["data"] == "synthetic" and flags["teacher_checkpoint"] is None:
        path, source = None, "no teacher is published for the synthetic set"
    else:
        path, source = find_teacher(name, flags["teacher_checkpoint"], flags["teacher_url"], click.echo)
    if path is None:
        click.echo(f"{source}; training {name} here first")
        path = (train or train_teacher)(recipe, flags, device)
        source = f"trained here, {path}"
    return attending(load_teacher(name, path, source, device, precision, compile=flags["compile"]), data, flags)


def attending(teacher, data, flags):
    """The teacher, ready to answer about the training images. An untrained one's logits need not fit float16."""
    remember = flags["teacher_memory"] and not flags["dry_run"]
    teacher.attend(data.train, Path(flags["out"]) / "answers" if remember else None, flags["exact_teacher"] or flags["dry_run"])
    return teacher


def train_teacher(recipe, flags, device):
    """Trains recipe["teacher"] alone by its own recipe, keeps it, and returns its file."""
    alone = {**dict.fromkeys(flags), "teacher": None, "student": recipe["teacher"], "method": "none", "zscore": False,
             "recipe": "authors", "data": recipe["data"], "deterministic": flags["deterministic"], "val_from_train": 0,
             "precision": recipe["precision"], "compile": flags["compile"]}
    if recipe["data"] == "synthetic":       # made data: the teacher's training is as short as the run's
        alone |= {k: flags[k] for k in ("epochs", "train_images")}
    teacher_recipe, _ = resolve(alone, device)
    data = load_data(recipe["data"], flags["data_dir"], device, train_images=alone["train_images"])
    folder = distil(teacher_recipe | {"seed": 0}, data, None, flags, device)[1]
    if recipe["data"] == "synthetic":
        return folder / "student.pt"
    kept = CHECKPOINTS / f"{recipe['teacher']}.pt"
    partial = kept.with_name(f"{kept.name}.{os.getpid()}.part")
    try:
        CHECKPOINTS.mkdir(exist_ok=True)
        shutil.copyfile(folder / "student.pt", partial)
        os.replace(partial, kept)
        return kept
    except OSError as error:
        click.echo(f"notice: no copy of the teacher could be kept in {CHECKPOINTS} ({error.strerror}); it stays in {folder}")
        return folder / "student.pt"
    finally:
        partial.unlink(missing_ok=True)


def distil(recipe, data, teacher, flags, device, until=None):
    """One run in its folder: printed, trained or found finished. Returns (result, folder)."""
    if teacher:
        recipe = recipe | {"teacher_sha256": teacher.sha256}
    if flags["compile"]:
        torch._dynamo.reset()       # or the variants of all runs so far count towards its limit, and it stops compiling
    run = Run(Path(flags["out"]) / run_name(recipe), recipe, runs.collect_facts(device))
    shown = [k for k in ("lr", "epochs", "batch_size", "weight_decay", "ce_weight", "kd_weight", "base_temp", "alpha", "beta",
                         "span", "zscore_relations", "precision", "compile", "exact_teacher", "train_images",
                         "val_from_train") if k in recipe]
    click.echo(f"{run.folder}: {recipes.key(recipe['method'], recipe['zscore'])}, "
               + ", ".join(f"{k} {recipe[k]}" for k in shown if recipe[k] not in (None, False)))
    if recipe["batch_size"] > len(data.train.targets):
        raise click.UsageError(f"--batch-size {recipe['batch_size']}: there are {len(data.train.targets)} training images")
    try:
        state = run.open()
        if run.finished():
            click.echo("finished before")
        with Stop() as stop:
            result = run.finished() or train(recipe, data, teacher, run, state, device, stop, save_every=flags["save_every"],
                                             until=until, compile=flags["compile"], capture=flags["capture"])
    finally:
        run.close()
    if result:
        click.echo(summary(recipe, result))
    stop.leave_if_asked(run.folder)     # asked for in the last epoch: what would come after this run is left out
    return result, run.folder


def summary(recipe, result):
    names = (recipe["teacher"], recipe["student"], recipe["method"], recipe["zscore"])
    line = (f"{run_name(recipe)}: last epoch {result['last']['top1']:.2f} top-1, {result['last']['top5']:.2f} top-5; best "
            f"{result['best']['top1']:.2f} (epoch {result['best']['epoch']}, chosen on {result['best_chosen_on']})")
    published, logged = recipes.published(*names), recipes.logged(*names)
    if recipe["data"] == "cifar100" and published:
        line += f"; published {published:.2f}" + (f", last epoch of the authors' log {logged:.2f}" if logged else "")
    return line + f"; {runs.duration(60 * result['minutes'])}"


def seeds_table(results):
    """Each seed's row, then mean and standard deviation (of a sample, n - 1)."""
    lines = [f"seed    last    best (chosen on {next(iter(results.values()))['best_chosen_on']})"]
    lines += [f"{seed:4d}  {r['last']['top1']:6.2f}  {r['best']['top1']:6.2f}" for seed, r in results.items()]
    last, best = ([r[k]["top1"] for r in results.values()] for k in ("last", "best"))
    lines.append("mean  " + "  ".join(f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" for x in (last, best))
                 + f"  (n = {len(last)})")
    return "\n".join(lines)


def evaluate_file(flags, device, data=None):
    """--eval: prints loss, top-1 and top-5 of a checkpoint on a data set, by default the one of the flags."""
    path = flags["eval_file"]
    name = flags["student"] or facts_of(read_checkpoint(path, flags["student"])).get("student")
    if name not in MODELS:
        raise click.UsageError(f"{path} does not say which network it holds: name it with --student")
    network = create_model(name)
    load_weights(network, path)
    data = data or load_data(flags["data"], flags["data_dir"], device, val_from_train=flags["val_from_train"])
    scores = Teacher(network, device, flags["precision"] or "fp32").evaluate(data.eval)
    click.echo(f"{name}: {scores['top1']:.2f} top-1, {scores['top5']:.2f} top-5 (%), loss {scores['loss']:.4f} on the "
               f"{len(data.eval.targets)} {data.eval_name} images of {flags['data']} ({path})")


def dry_run(recipe, flags, device):
    """The whole path on made data: train one epoch of two batches, save, leave, resume, evaluate, result."""
    size = 2 * recipe["batch_size"]
    data = Data(synthetic(size, 1), synthetic(size, 2), synthetic(size, 2), "test")
    data = Data(*(type(s)(*(x.to(device) for x in s)) for s in data[:3]), *data[3:])
    recipe |= {"data": "synthetic", "epochs": 2, "train_images": None, "val_from_train": 0, "seed": flags["seed"]}
    with tempfile.TemporaryDirectory() as folder:
        flags = flags | {"out": folder}
        teacher = get_teacher(recipe, data, flags, device) if recipe["teacher"] else None
        distil(recipe, data, teacher, flags, device, until=1)
        distil(recipe, data, teacher, flags, device)
        student = str(Path(folder, run_name(recipe), "student.pt"))
        evaluate_file(flags | {"eval_file": student, "student": None, "data": "synthetic"}, device, data)
    click.echo("dry run: all is well")


def demo(flags, device):
    """--demo: a small teacher on made images, then the student alone, with KD and with KD+Z, and their accuracies."""
    begun = time.monotonic()
    flags = flags | {"data": "synthetic", "train_images": 4000, "out": os.path.join(flags["out"], "demo")}
    data = load_data("synthetic", None, device, train_images=flags["train_images"])
    alone, distilled = {"teacher": None, "method": "none"}, {"teacher": "resnet20", "student": "resnet8", "method": "kd"}
    settings = {"teacher, resnet20, 8 epochs": alone | {"student": "resnet20", "epochs": 8, "zscore": False},
                "student, resnet8, 5 epochs, alone": alone | {"student": "resnet8", "epochs": 5, "zscore": False},
                "the same with KD": distilled | {"epochs": 5, "zscore": False},
                "the same with KD+Z": distilled | {"epochs": 5, "zscore": True}}
    accuracies = {name: [] for name in settings}
    for seed in range(flags["seed"], flags["seed"] + flags["seeds"]):
        teacher = None
        for name, setting in settings.items():
            recipe, _ = resolve(flags | setting, device)
            result, folder = distil(recipe | {"seed": seed}, data, teacher if setting["teacher"] else None, flags, device)
            accuracies[name].append(result["last"]["top1"])
            teacher = teacher or attending(load_teacher("resnet20", folder / "student.pt", str(folder), device,
                                                        recipe["precision"]), data, flags)
    click.echo(f"\n{'made images of 100 classes':36s}top-1, last epoch")
    for name, values in accuracies.items():
        spread = f" ± {statistics.stdev(values):.2f} (n = {len(values)})" if len(values) > 1 else ""
        click.echo(f"{name:36s}{statistics.mean(values):.2f}{spread}")
    click.echo(f"{runs.duration(time.monotonic() - begun)} in all. Next, the paper's experiment on CIFAR-100 (a GPU helps; "
               "--list shows every pair):\n  python train_cifar.py --teacher resnet32x4 --student resnet8x4 --zscore")


def check_usage(flags):
    """Usage errors that click cannot see by itself."""
    if flags["demo"]:
        context, allowed = click.get_current_context(), ("demo", "seed", "seeds", "out", "device", "precision", "save_every")
        for name in flags:
            if name not in allowed and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--demo takes no --{name.replace('_', '-')}; it has its own")
        return
    runs.check_method(flags, [name for name in MODELS if name != "MobileNetV1"])     # ImageNet's


@click.command(cls=runs.Command, help=__doc__)
@click.option("--method", type=runs.Choice(["none", *METHODS]), default="kd", show_default=True,
              help="Distillation method; none trains the student alone.")
@runs.shared_flags
@click.option("--recipe", type=runs.Choice(recipes.SOURCES), default="authors", show_default=True,
              help="Whose numbers: the authors' logs, or the defaults of their released code.")
@click.option("--data", type=runs.Choice(["cifar100", "synthetic"]), default="cifar100", show_default=True)
@click.option("--data-dir", default="data", show_default=True, metavar="DIR", help="Folder of cifar-100-python.")
@click.option("--train-images", type=runs.COUNT, metavar="N", help="Train on the first N images of a fixed shuffle.")
@click.option("--teacher-url", default=ARCHIVE_URL, envvar="TEACHER_URL", metavar="URL",
              help="Archive of mdistiller's teachers, or a mirror of it (also TEACHER_URL).")
@click.option("--capture/--no-capture", default=True, help="On CUDA, the step as a CUDA graph.  [default: on]")
@click.option("--teacher-memory/--no-teacher-memory", default=True,
              help="Keep the teacher's answers (on a GPU there, else in OUT/answers, up to 1.7 GB).  [default: on]")
@click.option("--exact-teacher", is_flag=True, help="Keep the teacher's logits in float32, not rounded to float16.")
@click.option("--demo", is_flag=True, help="Teacher, student alone, KD and KD+Z on made images, in minutes on two CPU cores.")
@click.option("--save-every", type=runs.POSITIVE, default=60, show_default=True, help="Seconds between saves in an epoch.")
def main(**flags):
    if flags["list_recipes"]:
        click.echo(recipes.table())
        return
    check_usage(flags)
    try:
        device = runs.pick_device(flags["device"])
        runs.pick_kernels(flags["deterministic"])
        runs.keep_memory()
        if flags["compile"]:
            runs.check_compiler(device)
        if flags["demo"]:
            demo(flags, device)
            return
        if flags["eval_file"]:
            evaluate_file(flags, device)
            return
        recipe, lines = resolve(flags, device)
        for line in lines:
            click.echo(line)
        if flags["dry_run"]:
            dry_run(recipe, flags, device)
            return
        data = load_data(recipe["data"], flags["data_dir"], device, train_images=recipe["train_images"],
                         val_from_train=recipe["val_from_train"])
        teacher = None
        if recipe["teacher"]:
            teacher = get_teacher(recipe, data, flags, device)
            click.echo(teacher.check(data.test, recipes.ALONE.get(recipe["teacher"]) if recipe["data"] == "cifar100" else None)[1])
        seeds = range(flags["seed"], flags["seed"] + flags["seeds"])
        results = {seed: distil(recipe | {"seed": seed}, data, teacher, flags, device)[0] for seed in seeds}
        if len(seeds) > 1:
            click.echo(seeds_table(results))
    except ValueError as error:     # the rooms' own, one line each
        raise RunError(str(error)) from None


if __name__ == "__main__":
    main()
