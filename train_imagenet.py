"""Logit standardization in knowledge distillation on ImageNet, or any folder of images; one GPU or many.

\b
  python train_imagenet.py --data-dir imagenet --teacher resnet34 --student resnet18 --zscore
  torchrun --nproc-per-node 8 train_imagenet.py --teacher resnet50 --student MobileNetV1 --zscore
  python train_imagenet.py --teacher resnet34 --student resnet18 --dry-run   the whole path, synthetic images
  python train_imagenet.py --list                                            recipes, published numbers

data-dir holds train/CLASS/ and val/CLASS/. Networks are torchvision's, by its names, those of models.py and
custom ones, FILE.py:NAME. A flag that is left out takes the pair's recipe. A stopped run resumes with the
same command, on any number of processes.
"""

import hashlib
import math
import os
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image

import cli
import experiment
import recipes
from data import (IMAGENET_PREPROCESSING, FolderImages, epoch_draws, flip_images, folder_batches, folder_keys,
                  load_folders, printable)
from distributed import World
from models import MODELS
from networks import TORCHVISION, torchvision_network
from randaugment import strong_draws, strong_operations
from run import RunError
from teacher import Teacher

LARGEST_BAD_SHARE = 0.001       # of the training images, which cannot be decoded
WEIGHTS = "IMAGENET1K_V1"       # of teachers, the papers'
LIKE_IMAGENET = 1000            # classes, with torchvision's weights and published accuracies


class Batches:
    """Image folders for `distill.train`: a process's share of every batch, among any number of processes."""

    chunk, long_evaluation = 1, True

    def __init__(self, folders, recipe, teacher, flags, world):
        self.folders, self.recipe, self.teacher, self.world = folders, recipe, teacher, world
        batch, size = recipe["batch_size"], recipe["size"]
        self.train_images = count = len(folders.train)
        if not world.size <= batch <= count:
            raise ValueError(f"--batch-size {batch}, the total, does not fit {count} images and {world.size} "
                             "processes")
        self.eval_name = folders.eval_name
        self.targets = torch.tensor([target for _, target in folders.train])
        self.steps = count // batch             # the last, incomplete batch is left out
        self.images = self.steps * batch
        self.preprocessing = IMAGENET_PREPROCESSING.at(size)
        self.metadata = {"num_classes": len(folders.classes), "classes": folders.classes,
                         **self.preprocessing._asdict()}
        self.keys, self.bad = [], set()
        dataset = FolderImages(folders.train, size, 2 if recipe["method"] == "mlkd" else 1)
        self.loader = folder_batches(dataset, self.keys, flags["workers"], world.device.type == "cuda")
        self.evaluated = Evaluation(folders, self.preprocessing, flags, world)

    def epoch(self, epoch, first_step):
        """Yields (views, target, index, teacher_logits) of each step."""
        seed, n, world = self.recipe["seed"], self.train_images, self.world
        self.keys[:], offsets = folder_keys(seed, epoch, n, self.recipe["batch_size"], first_step,
                                            world.rank, world.size)
        permutation = torch.from_numpy(epoch_draws(seed, epoch, n)[0])
        strong = strong_draws(seed, epoch, n) if self.recipe["method"] == "mlkd" else None
        for offset, (images, flips, target, decoded) in zip(offsets, self.loader):
            part = slice(offset, offset + len(target))
            self.report(permutation[part][~decoded].tolist())
            images = list(images.to(world.device, non_blocking=True).unbind(1))
            if strong is not None:
                images[1] = strong_operations(images[1], strong[part].to(world.device))
            views = [self.preprocessing.normalise(flip_images(x, flip))
                     for x, flip in zip(images, flips.to(world.device).unbind(1))]
            logits = [self.teacher.logits(x) for x in views] if self.teacher else []        # line 2: v_n
            yield views, target.to(world.device), permutation[part].to(world.device), logits

    def report(self, bad):
        """Names the training images that cannot be decoded; RunError where they are too many."""
        for i in set(bad) - self.bad:
            path = printable(self.folders.train[i][0])
            click.echo(f"notice: {path} cannot be decoded; another image takes its place")
        self.bad |= set(bad)
        if len(self.bad) > max(LARGEST_BAD_SHARE * self.train_images, 1):
            raise RunError(f"{len(self.bad)} of {self.train_images} training images cannot be decoded; "
                           "repair or remove them")

    def evaluation(self):
        return iter(self.evaluated)


class Evaluation:
    """One process's share of the evaluation images, as `distill.evaluate` takes them."""

    def __init__(self, folders, preprocessing, flags, world):
        self.samples, self.preprocessing, self.device = folders.eval, preprocessing, world.device
        share = np.arange(world.rank, len(folders.eval), world.size)
        rounds = math.ceil(len(folders.eval) / world.size / (flags["micro_batch"] or 64))   # in each process
        self.keys = [[(i, 0) for i in part] for part in np.array_split(share, rounds)]
        dataset = FolderImages(folders.eval, preprocessing.size, 0, preprocessing.resize)
        self.loader = folder_batches(dataset, self.keys, flags["workers"], world.device.type == "cuda")

    def __iter__(self):
        undecodable = []
        for keys, (images, _, target, decoded) in zip(self.keys, self.loader):
            undecodable += [index for (index, _), good in zip(keys, decoded) if not good]
            yield self.preprocessing.normalise(images[:, 0].to(self.device)), target.to(self.device)
        if undecodable:
            path = printable(self.samples[undecodable[0]][0])
            raise RunError(f"{len(undecodable)} evaluation images cannot be decoded, for instance {path}; "
                           "repair or remove them")


# ---------------------------------------------------------------- one run


def get_teacher(recipe, classes, flags, world):
    """The Teacher, with the weights that were named, or torchvision's."""
    name, path = recipe["teacher"], flags["teacher_checkpoint"]
    if path or flags["dry_run"]:
        teacher = experiment.make_teacher(recipe, path, path, classes, flags, world,
                                          IMAGENET_PREPROCESSING.at(recipe["size"]), TORCHVISION)
    elif name not in TORCHVISION or len(classes) != LIKE_IMAGENET:
        raise RunError(f"no {name} for {len(classes)} classes is published: name its file with "
                       "--teacher-checkpoint (to train one: --method none)")
    else:
        world.on_main(lambda: torchvision_network(name, WEIGHTS) and None)      # downloads for all
        network = torchvision_network(name, WEIGHTS)
        teacher = Teacher(network, world.device, recipe["precision"], f"torchvision's {WEIGHTS}",
                          flags["compile"])
    teacher.batch = flags["micro_batch"]
    return teacher


def dataset_fingerprint(folders):
    """The images in a line, with a hash of names and classes: they may be others when a run resumes."""
    digest = hashlib.sha256()
    for path, target in folders.train + folders.eval:
        digest.update(os.fsencode(f"{'/'.join(Path(path).parts[-3:])} {target}\n"))
    return (f"{len(folders.train)} and {len(folders.eval)} of {len(folders.classes)} classes, "
            f"{digest.hexdigest()[:12]}")


def execute(flags, world, folders=None, stop_after=None):
    """The run of the flags. Returns (result, folder)."""
    recipe, lines = experiment.resolve(flags, world.device, "imagenet")
    if flags["feature"] == "crd" and world.size > 1:
        raise click.UsageError("--feature crd has one memory bank of all images: it is for one process")
    folders = folders or load_folders(flags["data_dir"], flags["val_from_train"], say=world.print)
    classes, images = folders.classes, f"{folders.eval_name} images"
    recipe |= {"data": Path(flags["data_dir"]).resolve().name, "size": flags["size"] or 224,
               "images": dataset_fingerprint(folders)}
    compare = len(classes) == LIKE_IMAGENET and folders.eval_name == "val"
    lines.append(f"images: {recipe['images']}; processes: {world.size}")
    share = max(1, recipe["batch_size"] // world.size)
    smallest = share // -(-share // (flags["micro_batch"] or share))        # of the micro-batches
    experiment.check_run(recipe, lines, flags, len(classes), recipe["size"], compare, world, TORCHVISION,
                         smallest)
    teacher = get_teacher(recipe, classes, flags, world) if recipe["teacher"] else None
    batches = Batches(folders, recipe, teacher if recipe["method"] != "none" else None, flags, world)

    def before():
        if teacher:
            published = recipes.published(teacher.name, None, "teacher", data="imagenet") if compare else None
            experiment.evaluate_teacher(teacher, recipe, batches.evaluation, images, published, world)

    return experiment.run_experiment(recipe, batches, teacher, flags, world, data="imagenet", compare=compare,
                                     before=before, stop_after=stop_after)


def dry_run(flags, world):
    """Trains an epoch of two batches of synthetic images, saves, leaves, resumes, evaluates."""
    classes = experiment.dry_run_classes(flags, 3)
    generator, batch = torch.Generator().manual_seed(0), 8 * world.size
    # each process's own folder, the same in all: nodes need not share a disk
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(["train"] * 2 * batch + ["val"] * batch):
            path = Path(folder, "images", part, f"{i % min(3, len(classes))}", f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8, generator=generator)
            to_pil_image(pixels).save(path)
        flags = flags | {"data_dir": f"{folder}/images", "out": folder, "val_from_train": 0, "epochs": 2,
                         "batch_size": batch, "lr": flags["lr"] or 0.01, "size": flags["size"] or 64,
                         "workers": 0, "micro_batch": None}
        folders = load_folders(flags["data_dir"])._replace(classes=classes)
        for stop_after in (1, None):
            execute(flags, world, folders, stop_after)
        world.any(False)         # none removes its folder before the others are done
    world.print("dry run: all is well")


def evaluate_file(flags, world):
    """--eval: on the evaluation images of --data-dir."""
    def images_of(metadata):
        folders = load_folders(flags["data_dir"], flags["val_from_train"], ("val",), world.print)
        batches = Evaluation(folders, metadata["preprocessing"], flags, world)
        name = f"{folders.eval_name} images of {flags['data_dir']}"
        return batches, len(folders.eval), name, folders.classes

    experiment.evaluate_file(flags, world, images_of)


@click.command(cls=cli.Command, help=__doc__)
@cli.flags(
    data=[
        click.option("--data-dir", type=cli.PATH, default="imagenet", show_default=True,
                     help="Folder that holds train/ and val/."),
        click.option("--size", type=cli.Count(min=32),
                     help="Pixels of an image's side.  [default: 224]"),
        click.option("--workers", type=cli.COUNT_OR_NONE, default=min(8, os.cpu_count() or 1),
                     show_default="8 or the cores", help="Loading processes, for each process."),
        cli.HELD_OUT,
    ],
    method=cli.method_flags(recipes.METHODS, ["at", "rkd", "crd", "simkd"]),
    recipe=cli.RECIPE,
    run=[
        *cli.RUN, cli.save_every(300),
    ],
    machine=[
        *cli.MACHINE,
        click.option("--micro-batch", "--at-once", "micro_batch", type=cli.COUNT,
                     help="Images that a device takes at a time; their gradients are added.  [default: all]"),
    ])
def main(**flags):
    if flags["list_recipes"]:
        click.echo(recipes.table("imagenet"))
        return
    experiment.check_flags(flags, [*TORCHVISION, *MODELS])
    command = evaluate_file if flags["eval_file"] else dry_run if flags["dry_run"] else execute
    with World(flags["device"]) as world, cli.friendly_errors():
        cli.prepare(flags, world.device)
        command(flags, world)


if __name__ == "__main__":
    main()
