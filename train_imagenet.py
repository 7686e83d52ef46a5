"""Logit standardization in knowledge distillation on ImageNet, or any folder of images; one GPU or many.

\b
  python train_imagenet.py --data-dir imagenet --teacher resnet34 --student resnet18 --zscore
  torchrun --nproc-per-node 8 train_imagenet.py --teacher resnet50 --student MobileNetV1 --zscore
  python train_imagenet.py --teacher resnet34 --student resnet18 --dry-run     the whole path, made images
  python train_imagenet.py --list                                              recipes, published numbers

data-dir holds train/CLASS/ and val/CLASS/. Networks are torchvision's, by its names, and MobileNetV1. Flags
left out take the pair's recipe; a stopped run goes on with the same command, on any number of processes.
"""

import hashlib
import http.client
import itertools
import multiprocessing
import os
import tempfile
from pathlib import Path

import click
import torch
import torchvision.models
from torchvision.transforms.functional import to_pil_image

import cli
import recipes
from data import FolderImages, epoch_draws, folder_batches, folder_keys, load_folders, normalise_folder
from distill import distil, evaluate, micro_batches
from distributed import World
from models import class_count, create_model, load_weights
from randaugment import StrongDraws, strong_draws, strong_operations
from run import RunError, first_line
from teacher import Teacher
from weights import facts_of, read_checkpoint
from zscore_kd import METHODS

NETWORKS = ["MobileNetV1", *(n for n in torchvision.models.list_models(module=torchvision.models)
                             if n not in ("googlenet", "inception_v3"))]    # these return more than logits
BAD = 0.001         # the share of training images that may be undecodable


class Batches:
    """Image folders as `distill.train` takes them: a process's share of every batch, among any number."""

    advice, chunk, long_evaluation = "", 1, True

    def __init__(self, folders, recipe, teacher, world, workers, micro_batch):
        self.recipe, self.teacher, self.world, self.eval_name = recipe, teacher, world, folders.eval_name
        self.views = 2 if recipe["method"] == "mlkd" else 1
        self.train_images, batch = len(folders.train), recipe["batch_size"]
        self.steps = self.train_images // batch                 # the last, incomplete batch is left out
        self.images = self.steps * batch
        self.parts = micro_batches(batch, world.size, micro_batch) if batch >= world.size else 1
        pin = world.device.type == "cuda"
        self.train, self.keys = FolderImages(folders.train, recipe["size"], self.views), []
        self.loader = folder_batches(self.train, self.keys, workers, pin)
        self.evaluated = Evaluation(folders, recipe["size"], world, workers,
                                    micro_batch or min(256, -(-batch // world.size)))
        self.facts = {"num_classes": len(folders.classes), "classes": folders.classes}
        self.undecodable, self.known = 0, set()       # since the last collection; indices that were named

    def check(self, undecodable):
        """What a log row says beside the usual; RunError: too many of an epoch's images cannot be decoded."""
        if undecodable > max(BAD * self.train_images, 1):
            name = f", for instance {self.train.samples[min(self.known)][0]}" if self.known else ""
            raise RunError(f"{undecodable} of {self.train_images} training images cannot be decoded{name}; "
                           "mend or remove them")
        return {"undecodable": undecodable}

    def place(self, epoch, step):
        """Where in the run the first image of this process's share of a step is."""
        batch = self.recipe["batch_size"]
        return epoch * self.train_images + step * batch + batch * self.world.rank // self.world.size

    def epoch(self, epoch, first_step):
        """Yields (views, target, index, teacher_logits) of each step."""
        seed, n, world = self.recipe["seed"], self.train_images, self.world
        self.keys[:], places = folder_keys(seed, epoch, n, self.recipe["batch_size"], first_step, world.rank,
                                           world.size, self.parts)
        order = torch.from_numpy(epoch_draws(seed, epoch, n)[0])
        strong = strong_draws(seed, epoch, n) if self.views == 2 else None
        loader = iter(self.loader)
        for step in range(0, len(places), self.parts):
            parts = [self._part(*next(loader), order, strong, place)
                     for place in places[step:step + self.parts]]
            views, target, index, teacher_logits = zip(*parts)
            yield ([torch.cat(x) for x in zip(*views)], torch.cat(target), torch.cat(index),
                   [torch.cat(v) for v in zip(*teacher_logits)])

    def _part(self, images, flips, target, bad, order, strong, place):
        device, index = self.world.device, order[place:place + len(target)]
        self.undecodable += len(set(bad) & set(index.tolist()))     # each counts where its own turn is
        for i in set(bad) - self.known:
            click.echo(f"notice: {self.train.samples[i][0]} cannot be decoded; another image stands in")
        self.known |= set(bad)
        images, flips = ([x.to(device, non_blocking=True) for x in views] for views in (images, flips))
        if strong:
            images[1] = strong_operations(
                images[1], StrongDraws(*(x.to(device) for x in strong[place:place + len(target)])))
        views = [normalise_folder(x, flip) for x, flip in zip(images, flips)]
        teacher_logits = [self.teacher.logits(x) for x in views] if self.teacher else []        # line 2: v_n
        return views, target.to(device, non_blocking=True), index.to(device), teacher_logits

    def evaluation(self):
        return iter(self.evaluated)


class Evaluation:
    """One process's share of the evaluation images, `batch` at once, as `distill.evaluate` takes them."""

    def __init__(self, folders, size, world, workers, batch):
        mine = range(world.rank, len(folders.eval), world.size)
        self.keys = [[(i, 0) for i in mine[first:first + batch]] for first in range(0, len(mine), batch)]
        self.loader = folder_batches(FolderImages(folders.eval, size), self.keys, workers,
                                     world.device.type == "cuda")
        self.samples, self.world, self.rounds = (
            folders.eval, world, -(-len(folders.eval) // (world.size * batch)))

    def __iter__(self):
        device, loader, bad = self.world.device, iter(self.loader), set()
        for i in range(self.rounds):
            if i >= len(self.keys):     # some processes have a batch more than others
                yield None, None
                continue
            images, flips, target, undecodable = next(loader)
            bad |= set(undecodable)
            yield normalise_folder(images[0].to(device), flips[0].to(device)), target.to(device)
        count = int(self.world.sum(torch.tensor(len(bad))))
        if count:
            name = f", for instance {self.samples[min(bad)][0]}" if bad else ""
            raise RunError(f"{count} evaluation images cannot be decoded{name}; mend or remove them")


# ---------------------------------------------------------------- networks and teacher


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
        except (OSError, RuntimeError, http.client.HTTPException) as error:     # no network, a bad download
            raise RunError(f"torchvision's {weights} of {name} could not be downloaded "
                           f"({first_line(error)}); give the same command again, or name a file with "
                           "--teacher-checkpoint") from None
    model.name = name
    return model


def refusal(model, size):
    """Why a network does not take images of size x size pixels, None where it does."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        return (f"{model.name} does not take images of {size} x {size} pixels ({first_line(error)}): "
                "choose another --size")


def get_teacher(recipe, folders, flags, world):
    """The Teacher, with the weights that were named, or torchvision's."""
    name, classes, path = recipe["teacher"], len(folders.classes), flags["teacher_checkpoint"]
    if path or flags["dry_run"]:
        model, source = network(name, classes), path or "untrained"
        if path:
            load_weights(model, path, prefer="teacher")
    elif name == "MobileNetV1":
        raise RunError("nobody publishes a MobileNetV1 as a teacher: "
                       "name its weights with --teacher-checkpoint")
    elif classes != 1000:
        raise RunError(f"torchvision's {name} is for 1000 classes, {flags['data_dir']} has {classes}: "
                       f"train a teacher on it (--method none --student {name}) and name it with "
                       "--teacher-checkpoint")
    else:
        # downloads for all on its machine
        world.on_main(lambda: network(name, classes, flags["teacher_weights"]) and None)
        model, source = (network(name, classes, flags["teacher_weights"]),
                         f"torchvision's {flags['teacher_weights']}")
    teacher = Teacher(model, world.device, recipe["precision"], source, flags["compile"])
    teacher.batch = None
    return teacher


# ---------------------------------------------------------------- one run


def resolve(flags, world):
    """The run's recipe: the pair's, with the flags that were given. Returns (recipe, lines to print)."""
    names, data = [flags[k] for k in ("teacher", "student", "method", "zscore")], {"data": "imagenet"}
    recipe, lines = cli.resolve(flags, recipes.recipe(*names, **data), recipes.unsure(*names, **data),
                                world.device)
    if recipe["batch_size"] < world.size:
        raise click.UsageError(f"--batch-size {recipe['batch_size']} is the total: "
                               f"too few images for {world.size} processes")
    return recipe | {"data": Path(flags["data_dir"]).resolve().name, "size": flags["size"]}, lines


def run_name(recipe):
    pair = [recipe["teacher"]] if recipe["teacher"] else []
    method = recipes.key(recipe["method"], recipe["zscore"])
    return "-".join([*pair, recipe["student"], method, recipe["data"], f"seed{recipe['seed']}"])


def digest(folders):
    """Which images a run learns from and is evaluated on: how many, and a hash of their names and classes."""
    names = hashlib.sha256()
    for path, target in itertools.chain(folders.train, folders.eval):
        names.update(f"{'/'.join(Path(path).parts[-3:])} {target}\n".encode())
    return (f"{len(folders.train)} and {len(folders.eval)} of {len(folders.classes)} classes, "
            f"{names.hexdigest()[:12]}")


def run_one(recipe, folders, teacher, flags, world, stop_after=None):
    """One run in its folder: trained, resumed or found finished. Returns its result."""
    recipe = recipe | {"images": digest(folders)} | ({"teacher_sha256": teacher.sha256} if teacher else {})
    classes = len(folders.classes)
    for name in filter(None, (recipe["teacher"], recipe["student"])):
        if problem := refusal(network(name, classes), recipe["size"]):
            raise click.UsageError(problem)
    batches = Batches(folders, recipe, teacher, world, flags["workers"], flags["at_once"])
    names, data = [recipe[k] for k in ("teacher", "student")], {"data": "imagenet"}
    real = classes == 1000 and folders.eval_name == "val"       # these may be ImageNet itself

    def check_teacher():
        scores = evaluate(teacher.logits, batches.evaluation(), world)
        known = recipes.published(*names, "teacher", **data) if real else None
        world.print(f"teacher {teacher.name} ({teacher.source}): {scores['top1']:.2f} % top-1 on the "
                    f"{folders.eval_name} images" + (f", published {known:.2f}" if known else ""))
        if known and scores["top1"] <= known - 1:
            world.print("warning: this teacher is worse than the published one; "
                        "the paper's numbers cannot be expected")

    method = recipe["method"], recipe["zscore"]
    known = ({"published": recipes.published(*names, *method, **data),
              "logged": recipes.logged(*names, *method, **data)} if real else {})
    torch.manual_seed(recipe["seed"])
    student = network(recipe["student"], classes).to(world.device, memory_format=torch.channels_last)
    before = check_teacher if teacher and not flags["dry_run"] else lambda: None
    return distil(recipe, batches, student, Path(flags["out"]) / run_name(recipe), world, **known,
                  before=before, save_every=flags["save_every"], stop_after=stop_after, capture=False,
                  micro_batch=flags["at_once"], compile=flags["compile"])


def dry_run(recipe, flags, world):
    """The whole path, made images: an epoch of two batches, save, leave, resume, evaluate, result, --eval."""
    networks = [network(name, 3) for name in (recipe["teacher"], recipe["student"]) if name]
    size = 64 if not any(refusal(model, 64) for model in networks) else flags["size"]
    recipe |= {"batch_size": 8 * world.size, "epochs": 2, "size": size, "data": "made", "val_from_train": 0}
    generator = torch.Generator().manual_seed(0)
    # each process's own folder, the same in all: nodes need not share a disk
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(["train"] * 2 * recipe["batch_size"] + ["val"] * 7):
            path = Path(folder, part, f"class{i % 3}", f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8,
                                       generator=generator)).save(path)
        folders = load_folders(folder)
        if flags["teacher_checkpoint"]:     # whose classes are the file's
            teacher = recipe["teacher"]
            content = read_checkpoint(flags["teacher_checkpoint"], teacher)
            count = class_count(content, network(teacher, 3), "teacher") or 3
            folders = folders._replace(classes=folders.classes + list(map(str, range(3, count))))
        flags = flags | {"out": str(Path(folder, "runs")), "workers": 0, "at_once": None, "data_dir": folder}
        teacher = get_teacher(recipe, folders, flags, world) if recipe["teacher"] else None
        run_one(recipe, folders, teacher, flags, world, stop_after=1)
        run_one(recipe, folders, teacher, flags, world)
        if world.size == 1:      # the file is rank 0's
            evaluate_file(flags | {"eval_file": Path(folder, "runs", run_name(recipe), "student.pt")},
                          world, folders)
        world.any(False)         # none removes its folder before the others are done
    world.print("dry run: all is well")


def evaluate_file(flags, world, folders=None):
    """--eval: loss, top-1 and top-5 of a checkpoint on evaluation images, by default those of the flags."""
    folders = folders or load_folders(flags["data_dir"], flags["val_from_train"])
    said = facts_of(read_checkpoint(flags["eval_file"], flags["student"]))
    name, size = flags["student"] or said.get("student"), said.get("size", flags["size"])
    if name not in NETWORKS:
        raise click.UsageError(f"{flags['eval_file']} does not say which network it holds: "
                               "name it with --student")
    model = network(name, len(folders.classes))
    load_weights(model, flags["eval_file"])
    if problem := refusal(model, size):
        raise click.UsageError(problem)
    teacher = Teacher(model, world.device, flags["precision"] or "fp32")
    teacher.batch = flags["at_once"] or 64
    scores = evaluate(teacher.logits,
                      Evaluation(folders, size, world, flags["workers"], teacher.batch), world)
    world.print(f"{name}: {scores['top1']:.2f} top-1, {scores['top5']:.2f} top-5 (%), "
                f"loss {scores['loss']:.4f} on the {len(folders.eval)} {folders.eval_name} images of "
                f"{flags['data_dir']} ({flags['eval_file']})")


@click.command(cls=cli.Command, help=__doc__)
@click.option("--method", type=cli.Choice(["none", *METHODS]), default="kd", show_default=True,
              help="Distillation method; none trains the student alone.")
@cli.shared_flags
@click.option("--data-dir", default="imagenet", show_default=True, metavar="DIR",
              help="Folder that holds train/ and val/.")
@click.option("--teacher-weights", default="IMAGENET1K_V1", show_default=True, metavar="NAME",
              help="torchvision's name of the teacher's weights.")
@click.option("--size", type=click.IntRange(min=32), default=224, show_default=True,
              help="Pixels of an image's side.")
@click.option("--workers", type=click.IntRange(min=0), default=min(8, os.cpu_count() or 1),
              show_default="8 or the cores", help="Loading processes, for each process.")
@click.option("--at-once", type=cli.COUNT, metavar="N",
              help="Images that a device takes at once (micro-batch); the rest of its share is accumulated.  "
                   "[default: all]")
@click.option("--save-every", type=cli.POSITIVE, default=300, show_default=True,
              help="Seconds between saves.")
def main(**flags):
    if flags["list_recipes"]:
        click.echo(recipes.table("imagenet"))
        return
    cli.check_method(flags, NETWORKS)
    if flags["seeds"] != 1:
        raise click.UsageError("--seeds is for train_cifar.py; here, give one --seed at a time")
    world = World(flags["device"])
    try:
        with cli.one_line():
            execute(flags, world)
    except RuntimeError as error:
        if "DataLoader" in str(error):
            for child in multiprocessing.active_children():
                child.kill()        # a hung one hears nothing else, and the end of this process waits for it
            raise RunError(f"a loading process was lost ({first_line(error)}): memory is full, or the shared "
                           "memory is small (in a container, --shm-size); give fewer --workers, or "
                           "--workers 0") from None
        if world.size == 1 or not any(words in str(error)
                                      for words in ("Connection closed", "Connection reset")):
            raise
        raise RunError(f"process {world.rank} lost another one, whose own lines say why") from None
    finally:
        world.close()


def execute(flags, world):
    cli.pick_kernels(flags["deterministic"])
    cli.keep_memory()
    if flags["compile"]:
        cli.check_compiler(world.device)
    if flags["eval_file"]:
        evaluate_file(flags, world)
        return
    recipe, lines = resolve(flags, world)
    for line in lines:
        world.print(line)
    if flags["dry_run"]:
        dry_run(recipe, flags, world)
        return
    folders = load_folders(flags["data_dir"], flags["val_from_train"])
    world.print(f"{len(folders.train)} training and {len(folders.eval)} {folders.eval_name} images of "
                f"{len(folders.classes)} classes, {world.size} process{'es' * (world.size > 1)}")
    teacher = get_teacher(recipe, folders, flags, world) if recipe["teacher"] else None
    run_one(recipe, folders, teacher, flags, world)


if __name__ == "__main__":
    main()
