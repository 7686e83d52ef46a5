"""Logit standardization in knowledge distillation on CIFAR-100, or any small images.

\b
  python train_cifar.py --demo                                             needs nothing: minutes on a laptop
  python train_cifar.py --teacher resnet32x4 --student resnet8x4 --zscore  the paper's KD+Z
  python train_cifar.py --teacher resnet32x4 --student resnet8x4           KD, the baseline
  python train_cifar.py --method none --student resnet32x4                 from scratch: trains a teacher
  python train_cifar.py --teacher ... --student ... --zscore --seeds 3     mean and standard deviation
  python train_cifar.py --data folder --data-dir photos --size 64 ...      photos/train/CLASS/, val/CLASS/
  python train_cifar.py --eval FILE                                        evaluate a checkpoint
  python train_cifar.py --list                                             recipes and published numbers

A flag that is left out takes the pair's recipe. A stopped run resumes when the same command is given again.
The last epoch is the result; the best epoch, chosen on the test split, is shown with it.
"""

import hashlib
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F

import cli
import experiment
import recipes
from data import CIFAR, Data, Preprocessing, Split, crop_and_flip, epoch_draws, load_data, synthetic
from distributed import World
from models import MODELS
from randaugment import strong_draws, strong_view
from teacher import find_teacher

# images that are augmented, and given to the teacher, at a time
CHUNK = {"cuda": 8192, "mps": 1024, "cpu": 1024}
# the rows of --demo and their flags
DEMO = {"teacher, resnet20, 8 epochs": "--method none --student resnet20 --epochs 8",
        "student, resnet8, 5 epochs, from scratch": "--method none --student resnet8 --epochs 5",
        "the same with KD": "--teacher resnet20 --student resnet8 --epochs 5",
        "the same with KD+Z": "--teacher resnet20 --student resnet8 --epochs 5 --zscore"}


class Batches:
    """Small images for `distill.train`: each epoch shuffled, each image at one of its 162 crops and flips."""

    long_evaluation = False

    def __init__(self, data, recipe, teacher, device):
        self.data, self.recipe, self.teacher, self.device = data, recipe, teacher, device
        self.eval_name, self.targets = data.eval_name, data.train.targets
        self.images = self.train_images = len(self.targets)
        batch = recipe["batch_size"]
        self.steps = math.ceil(self.images / batch)         # the last batch is smaller
        chunk = CHUNK[device.type] * 32**2 // data.pixels.size**2
        self.chunk = max(1, chunk // batch) * batch         # whole batches
        self.metadata = {"num_classes": data.num_classes, "classes": list(data.classes),
                         **data.pixels._asdict()}

    def epoch(self, epoch, first_step):
        """Yields (views, target, index, teacher_logits) of each step; they are prepared in larger chunks."""
        seed, batch = self.recipe["seed"], self.recipe["batch_size"]
        permutation, crop_ids = map(torch.from_numpy, epoch_draws(seed, epoch, self.images))
        strong = strong_draws(seed, epoch, self.images) if self.recipe["method"] == "mlkd" else None
        for start in range(first_step * batch, self.images, self.chunk):
            part = slice(start, start + self.chunk)
            views, target, index, logits = self.prepare(permutation[part], crop_ids[part],
                                                        None if strong is None else strong[part])
            for first in range(0, len(target), batch):
                now = slice(first, first + batch)
                yield [x[now] for x in views], target[now], index[now], [v[now] for v in logits]

    def prepare(self, order, crop_ids, strong):
        """(views, target, index, teacher_logits) of the images `order`, on the device."""
        index, normalise, logits = order.to(self.device), self.data.pixels.normalise, []
        images, target = self.data.train.images[index], self.data.train.targets[index]
        views = [normalise(crop_and_flip(images, crop_ids.to(self.device)))]
        if strong is not None:
            views.append(normalise(strong_view(images, strong.to(self.device))))
        if self.teacher:                                            # line 2: v_n
            logits = [self.teacher.cached_logits(order, crop_ids, views[0]),
                      *map(self.teacher.logits, views[1:])]
        return views, target, index, logits

    def evaluation(self):
        return evaluation(self.data.eval, self.data.pixels)


def evaluation(split, preprocessing):
    """Yields (normalised images, targets) of a split, as `distill.evaluate` takes them."""
    for images, target in zip(split.images.split(500), split.targets.split(500)):
        yield preprocessing.normalise(images), target


# ---------------------------------------------------------------- one run


def resolve(flags, device):
    """(recipe, lines to print) of the flags."""
    recipe, lines = experiment.resolve(flags, device)
    recipe |= {"data": flags["data"], "train_images": flags["train_images"]}
    if flags["data"] == "folder":
        recipe |= {"folder": Path(flags["data_dir"]).resolve().name, "size": flags["size"]}
    if flags["teacher"]:
        recipe["exact_teacher"] = flags["exact_teacher"]
    return recipe, lines


def dataset_fingerprint(data):
    """A folder's images in a line, with a hash: they may be others when a run resumes."""
    digest = hashlib.sha256()
    for tensor in (*data.train, *data.eval):
        digest.update(tensor.cpu().numpy())
    return (f"{len(data.train.targets)} and {len(data.eval.targets)} of {data.num_classes} classes, "
            f"{digest.hexdigest()[:12]}")


def set_up(flags, world, data=None):
    """(recipe, data, teacher) of the flags, the same for all seeds."""
    recipe, lines = resolve(flags, world.device)
    data = data or load_data(flags["data"], flags["data_dir"], world.device, size=flags["size"],
                             train_images=flags["train_images"], val_from_train=flags["val_from_train"])
    if recipe["data"] == "folder":
        recipe["images"] = dataset_fingerprint(data)
    last_batch = len(data.train.targets) % recipe["batch_size"] or recipe["batch_size"]
    experiment.check_run(recipe, lines, flags, data.num_classes, data.pixels.size,
                         recipe["data"] in ("cifar100", "synthetic"), world, MODELS, last_batch)
    return recipe, data, get_teacher(recipe, data, flags, world) if recipe["teacher"] else None


def train(recipe, data, teacher, flags, world, stop_after=None):
    """One run. Returns (result, folder)."""
    batches = Batches(data, recipe, teacher if recipe["method"] != "none" else None, world.device)
    return experiment.run_experiment(recipe, batches, teacher, flags, world, stop_after=stop_after,
                                     compare=recipe["data"] == "cifar100")


def parsed(arguments):
    """The flags of a command line, a list; usage errors as the command's own."""
    flags = main.make_context("train_cifar.py", [str(a) for a in arguments]).params
    check_flags(flags)
    return flags


def check_flags(flags):
    """Usage errors that click cannot see; defaults that depend on other flags."""
    experiment.check_flags(flags, MODELS)
    if not flags["eval_file"]:
        flags["data"] = flags["data"] or "cifar100"
        if flags["size"] and flags["data"] != "folder" and not flags["dry_run"]:
            raise click.UsageError("--size is for --data folder: the other images are 32 x 32")
        flags["size"] = flags["size"] or 32


def resolve_arguments(arguments):
    """(recipe, lines to print) of a command line, a list; nothing is run."""
    flags = parsed(arguments)
    return resolve(flags, cli.pick_device(flags["device"]))


def run(arguments):
    """A command line of one seed, a list, run here. Returns (recipe, result, folder, teacher)."""
    flags = parsed(arguments)
    world = prepared(flags)
    recipe, data, teacher = set_up(flags, world)
    return recipe, *train(recipe, data, teacher, flags, world), teacher


def prepared(flags):
    """The World, with what must be set before its first operation."""
    if torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise click.UsageError("train_cifar.py is one process: start it without torchrun")
    world = World(flags["device"])
    cli.prepare(flags, world.device)
    return world


# ---------------------------------------------------------------- the teacher


def get_teacher(recipe, data, flags, world):
    """A recipe's Teacher, evaluated, its logits cached; trained here first if there is none."""
    name, official = recipe["teacher"], recipe["data"] == "cifar100"
    path = source = flags["teacher_checkpoint"]
    if not path and not flags["dry_run"]:
        source = f"no teacher is published for {recipe['data']} images"
        if official:
            path, source = find_teacher(name, say=click.echo)
        if not path:
            click.echo(f"{source}; training {name} here first (a file: --teacher-checkpoint)")
            path = source = train_teacher(recipe, flags, world)
    teacher = experiment.make_teacher(recipe, path, source, data.classes, flags, world, data.pixels, MODELS)
    cached = flags["teacher_memory"] and recipe["method"] != "none"
    teacher.cache_logits(data.train, Path(flags["out"]) / "logits" if cached else None,
                         flags["exact_teacher"] or flags["dry_run"])
    published = recipes.published(None, name, "none") if official else None
    images = f"{data.eval_name} images" if recipe["data"] == "folder" else "test images"
    experiment.evaluate_teacher(teacher, recipe, lambda: evaluation(data.test, data.pixels), images,
                                published, world)
    return teacher


def train_teacher(recipe, flags, world):
    """Trains recipe["teacher"] from scratch by its own recipe; returns its file.

    On images that no paper has, its training is as long as the run's.
    """
    unset = dict.fromkeys((*experiment.GIVEN, "teacher", "teacher_checkpoint", "student_checkpoint",
                           "feature", "train_images"))
    scratch = flags | unset | {"student": recipe["teacher"], "method": "none", "zscore": False,
                               "entropy_weight": False, "recipe": "authors", "val_from_train": 0, "seed": 0}
    if recipe["data"] not in CIFAR:
        for key in ("epochs", "batch_size", "train_images", "val_from_train"):
            scratch[key] = flags[key]
    own, data, _ = set_up(scratch, world)
    return train(own, data, None, scratch, world)[1] / "student.pt"


# ---------------------------------------------------------------- the other commands


def seeds_table(results):
    """Each seed's row, then mean and standard deviation."""
    lines = [f"seed    last    best (chosen on {next(iter(results.values()))['best_chosen_on']})"]
    for seed, result in results.items():
        lines.append(f"{seed:4d}  {result['last']['top1']:6.2f}  {result['best']['top1']:6.2f}")
    means = [mean_and_deviation([r[key]["top1"] for r in results.values()]) for key in ("last", "best")]
    return "\n".join([*lines, f"mean  {'  '.join(means)}  (n = {len(results)})"])


def mean_and_deviation(values):
    """Of a sample (n - 1), as text."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def evaluate_file(flags, world):
    """--eval: on the data set of the flags, else on that of the file's metadata."""
    def images_of(metadata):
        preprocessing, name = metadata["preprocessing"], flags["data"] or metadata.get("data") or "cifar100"
        if name not in (*CIFAR, "synthetic"):
            name = "folder"
        data = load_data(name, flags["data_dir"], world.device, size=preprocessing.size, parts=("val",),
                         resize=preprocessing.resize, val_from_train=flags["val_from_train"])
        return (evaluation(data.eval, preprocessing), len(data.eval.targets),
                f"{data.eval_name} images of {name}", data.classes)

    experiment.evaluate_file(flags, world, images_of)


def dry_run(flags, world):
    """Trains an epoch of two batches of synthetic images, saves, leaves, resumes, evaluates."""
    classes = experiment.dry_run_classes(flags, 10 if flags["data"] == "cifar10" else 100)
    count, size = 2 * resolve(flags, world.device)[0]["batch_size"], flags["size"]

    def images(part):
        split = synthetic(count, part)
        return Split(F.interpolate(split.images, size).to(world.device),
                     (split.targets % len(classes)).to(world.device))

    data = Data(images(1), images(2), images(2), "test", classes, Preprocessing(size=size, resize=size))
    with tempfile.TemporaryDirectory() as folder:
        flags = flags | {"data": "synthetic", "epochs": 2, "train_images": None, "val_from_train": 0,
                         "out": folder}
        recipe, data, teacher = set_up(flags, world, data)
        for stop_after in (1, None):
            train(recipe, data, teacher, flags, world, stop_after)
    click.echo("dry run: all is well")


def demo(flags):
    """--demo: a small teacher on synthetic images; the student from scratch, with KD and with KD+Z."""
    begun, accuracies = time.monotonic(), {name: [] for name in DEMO}
    same = ["--data", "synthetic", "--train-images", 4000, "--out", Path(flags["out"], "demo")]
    for key in ("device", "precision"):
        if flags[key]:
            same += [f"--{key}", flags[key]]
    for seed in range(flags["seed"], flags["seed"] + flags["seeds"]):
        teacher = []
        for name, words in DEMO.items():
            _, result, folder, _ = run([*words.split(), *same, "--seed", seed, *teacher])
            teacher = teacher or ["--teacher-checkpoint", folder / "student.pt"]
            accuracies[name].append(result["last"]["top1"])
    click.echo(f"\n{'synthetic images of 100 classes':42s}top-1, last epoch")
    for name, values in accuracies.items():
        click.echo(f"{name:42s}{mean_and_deviation(values)}")
    click.echo(f"{cli.duration(time.monotonic() - begun)} in all. Next, the paper's experiment on CIFAR-100 "
               "(a GPU helps; --list shows every pair):\n"
               "  python train_cifar.py --teacher resnet32x4 --student resnet8x4 --zscore")


@click.command(cls=cli.Command, help=__doc__)
@cli.flags(
    data=[
        click.option("--data", type=click.Choice([*CIFAR, "folder", "synthetic"]),
                     help="[default: cifar100]"),
        click.option("--data-dir", type=cli.PATH, default="data", show_default=True,
                     help="Folder that holds cifar-100-python, cifar-10-batches-py, or train/ and val/."),
        click.option("--size", type=cli.Count(min=8),
                     help="Pixels of an image's side, for --data folder.  [default: 32]"),
        click.option("--train-images", type=cli.COUNT, help="Train on so many, of a fixed shuffle."),
        cli.HELD_OUT,
    ],
    method=cli.method_flags(recipes.METHODS, recipes.FEATURES),
    recipe=[
        click.option("--recipe", type=click.Choice(recipes.SOURCES), default="authors", show_default=True,
                     help="The authors' logs, or the defaults of their released code."),
        *cli.RECIPE,
    ],
    run=[
        *cli.RUN, cli.save_every(60),
        click.option("--seeds", type=cli.COUNT, default=1, show_default=True,
                     help="Run so many seeds; print mean and standard deviation."),
        click.option("--demo", is_flag=True, help="Four small runs on synthetic images, in minutes."),
    ],
    machine=[
        *cli.MACHINE,
        click.option("--teacher-memory/--no-teacher-memory", default=True,
                     help="Cache the teacher's logits, on a GPU or in OUT/logits.  [default: on]"),
        click.option("--exact-teacher", is_flag=True, help="Cache them in float32, not in float16."),
    ])
def main(**flags):
    if flags["list_recipes"]:
        click.echo(recipes.table())
        return
    if flags["demo"]:
        with cli.friendly_errors():
            demo(flags)
        return
    check_flags(flags)
    with cli.friendly_errors():
        world = prepared(flags)
        if flags["eval_file"]:
            evaluate_file(flags, world)
        elif flags["dry_run"]:
            dry_run(flags, world)
        else:
            recipe, data, teacher = set_up(flags, world)
            results = {}
            for seed in range(flags["seed"], flags["seed"] + flags["seeds"]):
                results[seed], _ = train(recipe | {"seed": seed}, data, teacher, flags, world)
            if len(results) > 1:
                click.echo(seeds_table(results))


if __name__ == "__main__":
    main()
