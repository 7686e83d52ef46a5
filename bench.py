"""Speed of train_cifar.py, part by part, side by side with a plain loop in one process.

\b
  python bench.py                                 all experiments on this machine
  python bench.py --compile --json bench.json     with torch.compile beside it; the numbers for machines
  python bench.py --only resnet56-resnet20        one of them

The plain loop is what the field's code does: eager, float32, contiguous, the teacher run for every batch of 64, the loss read
after every step. It is measured with per-image torchvision transforms in two workers, and with this project's batched
augmentation, so that a slow loader is not what wins. Contestants take turns; medians over the turns, and their spread.
"""

import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image

import recipes
import cli
import run as runs
import train_cifar
import train_imagenet
from data import (IMAGENET_MEAN, IMAGENET_STD, MEAN, STD, VIEWS, Data, Folders, Split, crop_and_flip, epoch_draws, folder_batches, folder_keys, normalise,
                  strong_draws, strong_view, synthetic)
from models import create_model
from teacher import BATCH, Teacher
from zscore_kd import distillation_loss

EXPERIMENTS = {"resnet56-resnet20": ("resnet56", "resnet20", "kd"), "resnet32x4-resnet8x4": ("resnet32x4", "resnet8x4", "kd"),
               "resnet32x4-resnet8x4-mlkd": ("resnet32x4", "resnet8x4", "mlkd")}
ROWS = ("data", "teacher", "student", "whole, first epoch", "whole, remembered")
TRAINING_IMAGES = 50_000


def resolved(name, device, compile):
    """The recipe of an experiment, as the command itself finds it."""
    teacher, student, method = EXPERIMENTS[name]
    flags = dict.fromkeys(p.name for p in train_cifar.main.params)
    flags |= {"teacher": teacher, "student": student, "method": method, "zscore": True, "recipe": "authors", "data": "synthetic",
              "deterministic": False, "compile": compile, "exact_teacher": False, "val_from_train": 0}
    return train_cifar.resolve(flags, device)[0] | {"seed": 0}


def images_on(device):
    """Made images, as many as are prepared at once and as many again; speed does not depend on what they show."""
    n = 2 * train_cifar.AHEAD[device.type]
    split = Split(*(x.to(device) for x in synthetic(n, 1)))
    return Data(split, split, split, "test")


# ---------------------------------------------------------------- the contestants: each call does some steps, and says how many


class PerImage(Dataset):
    """One image at a time through torchvision's transforms, as (view, target), or (weak, strong, target) for MLKD."""

    def __init__(self, split, two_views):
        self.images, self.targets = split.images.cpu().permute(0, 2, 3, 1).numpy(), split.targets.tolist()
        crop = [transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.views = [transforms.Compose(crop + tensor)]
        if two_views:       # two operations and a hole, like the strong view's
            self.views.append(transforms.Compose(crop + [transforms.RandAugment(2)] + tensor + [transforms.RandomErasing(p=1)]))

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return *(view(self.images[i]) for view in self.views), self.targets[i]


def plain_loop(recipe, data, device, steps):
    """{row: call} of the plain loop, and of the one whose images come from two workers."""
    two = recipe["method"] == "mlkd"
    torch.manual_seed(0)
    teacher, student = create_model(recipe["teacher"]).to(device).eval(), create_model(recipe["student"]).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), recipe["lr"], momentum=0.9, weight_decay=recipe["weight_decay"])
    options = {"zscore_relations": recipe["zscore_relations"]} if two else {}

    def batched():
        for epoch in itertools.count():
            order, views = (torch.from_numpy(x).to(device) for x in epoch_draws(0, epoch, len(data.train.targets)))
            strong = strong_draws(0, epoch, len(order)).to(device) if two else None
            for first in range(0, len(order), 64):
                part = slice(first, first + 64)
                chosen, target = data.train.images[order[part]], data.train.targets[order[part]]
                images = [normalise(crop_and_flip(chosen, views[part])).contiguous()]
                if two:
                    images.append(normalise(strong_view(chosen, strong[part])).contiguous())
                yield images, target

    def per_image():
        loader = DataLoader(PerImage(data.train, two), 64, shuffle=True, num_workers=2, prefetch_factor=1, drop_last=True, persistent_workers=True)
        while True:
            for *images, target in loader:
                yield [x.to(device) for x in images], target.to(device)

    def ask(images):
        with torch.no_grad():
            return [teacher(x) for x in images]

    def learn(images, target, teacher_logits):
        logits = [student(x) for x in images]
        ce = sum(F.cross_entropy(z, target) for z in logits)
        kd = distillation_loss(recipe["method"], logits[0], teacher_logits[0], target, recipe["base_temp"], zscore=True,
                               student_strong=logits[-1], teacher_strong=teacher_logits[-1], **options)
        loss = recipe["ce_weight"] * ce + recipe["kd_weight"] * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    batches, loaded = batched(), per_image()
    images, target = next(batches)
    answers = ask(images)

    def whole(batches):
        return sum(1 for images, target in itertools.islice(batches, steps) if learn(images, target, ask(images)) is not None)

    plain = {"data": lambda: sum(1 for _ in itertools.islice(batches, steps)),
             "teacher": lambda: sum(1 for _ in range(steps) if ask(images)),
             "student": lambda: sum(1 for _ in range(steps) if learn(images, target, answers) is not None),
             "whole, first epoch": (every := lambda: whole(batches)), "whole, remembered": every}
    workers = {"data": lambda: sum(1 for _ in itertools.islice(loaded, 4 * steps)),     # more than waits ready in the workers
               "whole, first epoch": (every := lambda: whole(loaded)), "whole, remembered": every}
    return {"workers": workers, "plain": plain}


def this_program(recipe, data, device, steps, folder):
    """{row: call} of train_cifar.py's own parts."""
    torch.manual_seed(0)
    teacher = Teacher(create_model(recipe["teacher"]), device, recipe["precision"], compile=recipe["compile"])
    teacher.attend(data.train, Path(folder) / str(recipe["compile"]))
    learner = train_cifar.build(recipe, 100, device, recipe["compile"])
    learner.student.train()
    learner.set_epoch(1)

    def lessons(epochs, teacher=teacher):
        for epoch in epochs:
            yield from train_cifar.lessons(recipe, data, teacher, epoch, 0, device)

    def whole(source):
        return sum(1 for lesson in itertools.islice(source, steps) if learner.step(*lesson))

    only_data, new, known = lessons(itertools.count(), None), lessons(itertools.count(1)), lessons(itertools.repeat(0))
    lesson = next(known)
    for _ in range(2 * len(data.train.targets) // 64):      # ask for all of epoch 0, so that it is known
        next(known)
    order, views = map(torch.from_numpy, epoch_draws(0, 0, len(data.train.targets)))
    images = normalise(crop_and_flip(data.train.images[order[:64 * steps].to(device)], views[:64 * steps].to(device)))
    asked = [images] * len(lesson[0])
    return {"data": lambda: sum(1 for _ in itertools.islice(only_data, steps)),
            "teacher": lambda: [teacher.logits(x) for x in asked] and steps,
            "student": lambda: sum(1 for _ in range(steps) if learner.step(*lesson)),
            "whole, first epoch": lambda: whole(new), "whole, remembered": lambda: whole(known)}


# ---------------------------------------------------------------- measuring


def measure(contestants, rounds, device):
    """{(column, row): rates, images per second, one a round}. All take their turn in every round."""
    keys = {(column, row): call for column, calls in contestants.items() for row, call in calls.items()}
    rates = {call: [] for call in keys.values()}        # the plain loop's step is the same in every epoch: measured once
    for turn in range(rounds + 1):          # the first is warm-up
        for call in rates:
            begun = time.perf_counter()
            steps = call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                rates[call].append(64 * steps / (time.perf_counter() - begun))
    return {key: rates[call] for key, call in keys.items()}


def peak(name, device_name, which, steps):
    """Peak memory (MiB) of one contestant's whole steps; to be run in a process of its own."""
    device = torch.device(device_name)
    cli.keep_memory()
    data, recipe = images_on(device), resolved(name, device, False)
    with tempfile.TemporaryDirectory() as folder:
        calls = this_program(recipe, data, device, steps, folder) if which == "this" else plain_loop(recipe, data, device, steps)["plain"]
        calls["whole, first epoch"]()
    return cli.peak_memory(device)


def floor(recipe, device):
    """Images per second if the teacher's and the student's arithmetic ran at the rate of a large matrix product: (first epoch,
    remembered, that rate in FLOP/s)."""
    dtype = torch.bfloat16 if recipe["precision"] == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begun)
    rate = 2 * size**3 / min(times)
    teacher, student = create_model(recipe["teacher"]).eval(), create_model(recipe["student"])
    images = torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as asked, torch.no_grad():
        teacher(images)
    with FlopCounterMode(display=False) as learnt:
        student(images).sum().backward()
    views = 2 if recipe["method"] == "mlkd" else 1
    asked, learnt = (views * counter.get_total_flops() / 2 for counter in (asked, learnt))
    kept = asked / 2 if views == 2 else 0           # the strong view is asked about every time
    return rate / (asked + learnt), rate / (kept + learnt), rate


def hours(epochs, first, remembered, ahead, batch):
    """Projected hours of a run, evaluation aside. Epoch e finds the share 1 - (161/162)^e of the views known; the teacher
    computes the others of `ahead` images in full batches."""
    unknown = ((1 - 1 / VIEWS) ** e for e in range(epochs))
    asked = (min(1, math.ceil(ahead * share / batch) * batch / ahead) for share in unknown)
    return sum(TRAINING_IMAGES * (1 / remembered + share * (1 / first - 1 / remembered)) for share in asked) / 3600


def experiment(name, device, rounds, compile):
    """All numbers of one experiment, as a dict."""
    steps = train_cifar.AHEAD[device.type] // 64
    data = images_on(device)
    recipe = resolved(name, device, False)
    with tempfile.TemporaryDirectory() as folder:
        contestants = plain_loop(recipe, data, device, steps)
        contestants["this"] = this_program(recipe, data, device, steps, folder)
        if compile:
            contestants["compiled"] = this_program(recipe | {"compile": True}, data, device, steps, folder)
        rates = measure(contestants, rounds, device)
    result = {"experiment": name, "precision": recipe["precision"], "rounds": rounds, "steps": steps, "rows": {}}
    for row in ROWS:
        result["rows"][row] = {
            column: {"img_s": statistics.median(r), "low": min(r), "high": max(r),
                     **{f"times_{other}": statistics.median(a / b for a, b in zip(r, rates[other, row]))
                        for other in ("workers", "plain") if (other, row) in rates}}
            for column in contestants if (r := rates.get((column, row)))}
    whole = {row: {c: v["img_s"] for c, v in result["rows"][row].items()} for row in ROWS[3:]}
    result["epochs"] = recipe["full_epochs"]
    result["hours"] = {c: hours(recipe["full_epochs"], whole[ROWS[3]][c], whole[ROWS[4]][c], 64 * steps,
                                BATCH[device.type]) for c in contestants}
    result["floor_first"], result["floor_remembered"], result["flop_s"] = floor(recipe, device)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        result["peak_mib"] = {c: pool.submit(peak, name, device.type, c, steps).result() for c in ("plain", "this")}
    return result


# ---------------------------------------------------------------- ImageNet: loading against learning


def jpeg_folder(folder, count=256):
    """`count` JPEG files of ImageNet's typical 500 x 375 pixels, of two classes."""
    for i, image in enumerate(F.interpolate(synthetic(count, 5).images.float(), (375, 500), mode="bicubic").clamp(0, 255).byte()):
        path = Path(folder) / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path, quality=90)


def imagenet(device, rounds, data_dir, batch):
    """Images per second at 224 pixels: loading (torchvision's ImageFolder pipeline, and this program's, with the same workers), and for
    both pairs of the paper the step with images in memory, and both together. At most 16 batches of a large folder, or 512 images."""
    workers = min(8, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as made:
        if data_dir is None:
            jpeg_folder(made)
        root = Path(data_dir or made) / "train"
        try:
            samples = ImageFolder(root).samples
        except OSError as error:
            raise runs.RunError(f"no folders of images, one for each class, in {root} ({runs.first_line(error)})") from None
        steps = max(2, min(len(samples) // batch, 16)) if data_dir else max(4, min(16, 2 * workers))      # all workers have some

        def repeated(steps):        # few files are read again
            return (samples * -(-steps * batch // len(samples)))[:steps * batch]

        many = repeated(max(steps, 512 // batch))       # so many that the workers' start is a small part
        pipeline = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                       transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        dataset = ImageFolder(root, pipeline)
        dataset.samples, epochs = many, itertools.count()
        calls = {}

        def plain():
            for images, _ in DataLoader(dataset, batch, shuffle=True, num_workers=workers):
                images.to(device)
            return len(many), None

        calls["loading, ImageFolder"] = plain
        for pair in recipes.IMAGENET:
            calls |= imagenet_calls(pair, repeated(steps), None if len(calls) > 1 else many, batch, workers, device, epochs)
        rates = {name: [] for name in calls}
        for turn in range(rounds + 1):          # the first is warm-up
            for name, call in calls.items():
                begun = now(device)
                images, warm = call()
                if turn:
                    rates[name].append(images / (now(device) - (warm or begun)))
    rows = {name: {"img_s": statistics.median(r), "low": min(r), "high": max(r)} for name, r in rates.items()}
    return {"experiment": "imagenet", "batch": batch, "workers": workers, "images": steps * batch, "rows": rows}


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def imagenet_calls(pair, samples, many, batch, workers, device, epochs):
    """What is measured of one pair, by name; each call says how many images it took, and since when, None: since it began.

    many: samples to load alone, None: do not.
    """
    teacher_name, student = pair
    team = train_imagenet.Team(device.type)
    recipe = recipes.imagenet(*pair, "kd", True) | {
        "teacher": teacher_name, "student": student, "method": "kd", "zscore": True, "seed": 0, "batch_size": batch, "size": 224,
        "full_epochs": 100, "precision": cli.pick_precision(None, device)}
    learner = train_imagenet.Learner(recipe, 1000, team)
    learner.student.train()
    teacher = Teacher(train_imagenet.network(teacher_name, 1000), device, recipe["precision"])
    teacher.batch = None

    def lessons(samples, teacher, workers):
        return train_imagenet.Lessons(recipe, Folders(samples, samples, "val", []), teacher, team, workers, None)

    held = next(lessons(samples, None, 0).epoch(0, 0))[0]

    def decoded():
        lesson = lessons(many, None, workers)
        for _ in folder_batches(lesson.dataset, folder_keys(0, next(epochs), len(many), batch, 0, 0, 1, 1)[0], workers):
            pass
        return len(many), None

    def loaded():
        for _ in lessons(many, None, workers).epoch(next(epochs), 0):
            pass
        return len(many), None

    def learned():
        warm = None         # the workers' start is not of every step
        for parts in lessons(samples, teacher, workers).epoch(next(epochs), 0):
            learner.step(parts, 1)
            warm = warm or now(device)
        return len(samples) - batch, warm

    def step(few=min(len(samples) // batch, 4)):
        for _ in range(few):
            learner.step([(held[0], held[1], [teacher.logits(held[0][0])], 0)], 1)
        return few * batch, None

    calls = {"loading, this program": loaded, "its workers alone, uint8": decoded} if many else {}
    return calls | {f"step of {'-'.join(pair)}, images in memory": step, f"step of {'-'.join(pair)}, from JPEG files": learned}


def imagenet_table(result):
    lines = [f"| 224 pixels, batch {result['batch']}, {result['workers']} workers | images/s |", "|---|---|"]
    lines += [f"| {name} | {row['img_s']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f}) |" for name, row in result["rows"].items()]
    rate = {name: row["img_s"] for name, row in result["rows"].items()}
    for pair in map("-".join, recipes.IMAGENET):
        limit = "loading" if rate["loading, this program"] < rate[f"step of {pair}, images in memory"] else "the step"
        hours = 1_281_167 * 100 / rate[f"step of {pair}, from JPEG files"] / 3600
        lines += ["", f"{pair}: {limit} limits; 100 epochs of 1,281,167 images would take {cli.duration(3600 * hours)}, evaluation aside"]
    return "\n".join(lines)


# ---------------------------------------------------------------- the report


HEADERS = {"workers": "plain, 2 workers", "plain": "plain", "this": "this program", "compiled": "with --compile"}


def table(result):
    """Markdown: images per second, median (lowest to highest), and ratios to the two plain loops of the same round."""
    columns = [c for c in HEADERS if c in result["hours"]]
    name = result["experiment"]
    lines = [f"| {name}, images/s | " + " | ".join(HEADERS[c] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, cells in result["rows"].items():
        texts = []
        for column in columns:
            if (cell := cells.get(column)) is None:
                texts.append("")
                continue
            text = f"{cell['img_s']:,.0f} ({cell['low']:,.0f} to {cell['high']:,.0f})"
            if column in ("this", "compiled"):
                ratios = [f"{cell[f'times_{c}']:.2f}" for c in ("workers", "plain") if f"times_{c}" in cell]
                text += f", x {' and '.join(ratios)}"
            texts.append(text)
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    lines.append(f"| {result['epochs']} epochs, projected | "
                 + " | ".join(cli.duration(3600 * result["hours"][c]) for c in columns) + " |")
    memory = {c: f"{m:,.0f} MiB" if m else "" for c, m in result["peak_mib"].items()}
    lines.append("| peak memory | " + " | ".join(memory.get(c, "") for c in columns) + " |")
    return "\n".join(lines)


def where(result):
    """One line: the shares of a step, the arithmetic floor, and how near to it the program is."""
    column = "compiled" if "compiled" in result["hours"] else "this"
    rates = {row: result["rows"][row][column]["img_s"] for row in ROWS}
    first, known = rates[ROWS[3]], rates[ROWS[4]]
    parts = [f"{row} {100 * first / rates[row]:.0f} %" for row in ROWS[:3]]
    return (f"{result['experiment']}: of a step of the first epoch ({HEADERS[column]}) {', '.join(parts)}, measured apart; "
            f"arithmetic floor at {result['flop_s'] / 1e9:,.0f} GFLOP/s of a large {result['precision']} matrix product: "
            f"{result['floor_first']:,.0f} images/s in the first epoch ({100 * first / result['floor_first']:.0f} % reached), "
            f"{result['floor_remembered']:,.0f} remembered ({100 * known / result['floor_remembered']:.0f} %)")


@click.command(cls=cli.Command, help=__doc__)
@click.option("--only", type=cli.Choice([*EXPERIMENTS, "imagenet"]), multiple=True, help="An experiment; may be given again.")
@click.option("--rounds", type=cli.COUNT, default=7, show_default=True, help="Turns of each contestant.")
@click.option("--compile/--no-compile", default=False, help="Measure torch.compile too; a minute more for each experiment.")
@click.option("--device", type=cli.Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, writable=True), metavar="FILE", help="Write the numbers there.")
@click.option("--image-dir", type=click.Path(file_okay=False, exists=True), metavar="DIR", help="imagenet: a folder with train/.  [default: made JPEG files]")
@click.option("--imagenet-batch", type=cli.COUNT, metavar="N", help="imagenet: images a step.  [default: 512 on cuda, else 16]")
def main(only, rounds, compile, device, json_file, image_dir, imagenet_batch):
    device = cli.pick_device(device)
    cli.pick_kernels(False)
    cli.keep_memory()
    if compile:
        cli.check_compiler(device)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    facts = runs.collect_facts(device)
    click.echo(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, Python {facts['python']}; "
               f"{rounds} rounds of {train_cifar.AHEAD[device.type] // 64} steps of 64\n")
    results = []
    for name in only or [*EXPERIMENTS, "imagenet"]:
        if name == "imagenet":
            try:
                results.append(imagenet(device, rounds, image_dir, imagenet_batch or (512 if device.type == "cuda" else 16)))
            except torch.OutOfMemoryError:
                raise runs.RunError("the device's memory is full: give a smaller --imagenet-batch") from None
            click.echo(imagenet_table(results[-1]) + "\n")
        else:
            results.append(experiment(name, device, rounds, compile))
            click.echo(table(results[-1]) + "\n\n" + where(results[-1]) + "\n")
        if json_file:
            Path(json_file).write_text(json.dumps(runs.rounded({"facts": facts, "results": results}), indent=2))


if __name__ == "__main__":
    main()
