"""Logit standardization in knowledge distillation on ImageNet, or any folder of images; one GPU or many.

\b
  python train_imagenet.py --data-dir imagenet --teacher resnet34 --student resnet18 --zscore
  torchrun --nproc-per-node 8 train_imagenet.py --teacher resnet50 --student MobileNetV1 --zscore
  python train_imagenet.py --teacher resnet34 --student resnet18 --dry-run     the whole path, made images
  python train_imagenet.py --list                                              recipes, published numbers

data-dir holds train/CLASS/ and val/CLASS/. Networks are torchvision's, by its names, those of models.py and
your own, FILE.py:NAME. Flags left out take the pair's recipe; a stopped run goes on with the same command, on
any number of processes.
"""

import hashlib
import itertools
import multiprocessing
import os
import tempfile
from pathlib import Path

import click
import torch
from torchvision.transforms.functional import to_pil_image

import cli
import recipes
from checkpoints import load_pretrained, open_checkpoint, weights_sha256
from data import (IMAGENET_PREPROCESSING, FolderImages, epoch_draws, flip_images, folder_batches, folder_keys,
                  load_folders, printable)
from distill import run_experiment, evaluate, micro_batches
from distributed import World
from logit_kd import METHODS
from models import MODELS
from networks import (TORCHVISION, check_feature, check_model, create, init_bn_stats, known_weights, label,
                      layout, torchvision_network)
from randaugment import StrongDraws, strong_draws, strong_operations
from run import RunError, first_line
from teacher import Teacher, check_names, check_teacher, load_teacher

BAD = 0.001         # the share of training images that may be undecodable


class Batches:
    """Image folders as `distill.train` takes them: a process's share of every batch, among any number."""

    advice, chunk, long_evaluation = "", 1, True

    def __init__(self, folders, recipe, teacher, world, workers, micro_batch):
        self.recipe, self.teacher, self.world, self.eval_name = recipe, teacher, world, folders.eval_name
        self.views = 2 if recipe["method"] == "mlkd" else 1
        self.train_images, batch = len(folders.train), recipe["batch_size"]
        self.targets = torch.tensor([target for _, target in folders.train])
        self.steps = self.train_images // batch                 # the last, incomplete batch is left out
        self.images = self.steps * batch
        self.parts = micro_batches(batch, world.size, micro_batch)
        pin = world.device.type == "cuda"
        self.train, self.keys = FolderImages(folders.train, recipe["size"], self.views), []
        self.loader = folder_batches(self.train, self.keys, workers, pin)
        self.evaluated = Evaluation(folders, recipe["size"], world, workers,
                                    micro_batch or min(256, -(-batch // world.size)))
        self.metadata = {"num_classes": len(folders.classes), "classes": folders.classes,
                         **IMAGENET_PREPROCESSING.at(recipe["size"])._asdict()}
        self.undecodable, self.known = 0, set()       # since the last collection; indices that were named

    def check(self, undecodable):
        """What a log row says beside the usual; RunError: too many of an epoch's images cannot be decoded."""
        if undecodable > max(BAD * self.train_images, 1):
            name = f", for instance {printable(self.train.samples[min(self.known)][0])}" if self.known else ""
            raise RunError(f"{undecodable} of {self.train_images} training images cannot be decoded{name}; "
                           "mend or remove them")
        return {"undecodable": undecodable}

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
            click.echo(f"notice: {printable(self.train.samples[i][0])} cannot be decoded; another "
                       "image takes its place")
        self.known |= set(bad)
        images, flips = ([x.to(device, non_blocking=True) for x in views] for views in (images, flips))
        if strong:
            images[1] = strong_operations(
                images[1], StrongDraws(*(x.to(device) for x in strong[place:place + len(target)])))
        views = [IMAGENET_PREPROCESSING.normalise(flip_images(x, flip)) for x, flip in zip(images, flips)]
        teacher_logits = [self.teacher.logits(x) for x in views] if self.teacher else []        # line 2: v_n
        return views, target.to(device, non_blocking=True), index.to(device), teacher_logits

    def evaluation(self):
        return iter(self.evaluated)


class Evaluation:
    """One process's share of the evaluation images, `batch` at once, as `distill.evaluate` takes them."""

    def __init__(self, folders, size, world, workers, batch, resize=None):
        mine = range(world.rank, len(folders.eval), world.size)
        self.keys = [[(i, 0) for i in mine[first:first + batch]] for first in range(0, len(mine), batch)]
        self.loader = folder_batches(FolderImages(folders.eval, size, 0, resize), self.keys, workers,
                                     world.device.type == "cuda")
        self.samples, self.world, self.rounds = (
            folders.eval, world, -(-len(folders.eval) // (world.size * batch)))

    def __iter__(self):
        device, loader, bad = self.world.device, iter(self.loader), set()
        for i in range(self.rounds):
            if i >= len(self.keys):     # some processes have a batch more than others
                yield None, None
                continue
            images, _, target, undecodable = next(loader)
            bad |= set(undecodable)
            yield IMAGENET_PREPROCESSING.normalise(images[0].to(device)), target.to(device)
        count = int(self.world.sum(torch.tensor(len(bad))))
        if count:
            name = f", for instance {printable(self.samples[min(bad)][0])}" if bad else ""
            raise RunError(f"{count} evaluation images cannot be decoded{name}; mend or remove them")


# ---------------------------------------------------------------- the teacher


def get_teacher(recipe, folders, flags, world):
    """The Teacher, with the weights that were named, or torchvision's."""
    name, classes, path = recipe["teacher"], folders.classes, flags["teacher_checkpoint"]
    pixels, how = IMAGENET_PREPROCESSING.at(recipe["size"]), (recipe["precision"], flags["compile"])
    if path:
        network = create(name, len(classes), TORCHVISION)
        teacher = load_teacher(network, path, world.device, path, *how, pixels, classes)
    elif flags["dry_run"]:
        network = create(name, len(classes), TORCHVISION)
        generator = torch.Generator().manual_seed(0)
        init_bn_stats(network, torch.randn(8, 3, recipe["size"], recipe["size"], generator=generator))
        teacher = Teacher(network, world.device, *how[:1])
    elif name not in TORCHVISION:
        raise RunError(f"nobody publishes a {name} as a teacher: name its weights with --teacher-checkpoint")
    elif len(classes) != 1000:
        raise RunError(f"torchvision's {name} is for 1000 classes, {flags['data_dir']} has {len(classes)}: "
                       f"train a teacher on it (--method none --student {name}) and name it with "
                       "--teacher-checkpoint")
    else:
        weights = name, flags["teacher_weights"], "--teacher-weights"
        # downloads for all on its machine
        world.on_main(lambda: torchvision_network(*weights) and None)
        teacher = Teacher(torchvision_network(*weights), world.device, how[0],
                          f"torchvision's {flags['teacher_weights']}", how[1])
    teacher.batch = None
    return teacher


# ---------------------------------------------------------------- one run


def resolve(flags, world):
    """The run's recipe: the pair's, with the flags that were given. Returns (recipe, lines to print)."""
    names = [flags[k] for k in ("teacher", "student", "method", "zscore")]
    data = {"data": "imagenet", "feature": flags["feature"], "entropy": flags["entropy_weight"]}
    recipe, lines = cli.resolve(flags, recipes.recipe(*names, **data), world.device)
    if flags["feature"] == "crd" and world.size > 1:
        raise click.UsageError("--feature crd has one memory bank of all images: it is for one process")
    if recipe["batch_size"] < world.size:
        raise click.UsageError(f"--batch-size {recipe['batch_size']} is the total: "
                               f"too few images for {world.size} processes")
    return recipe | {"data": Path(flags["data_dir"]).resolve().name, "size": flags["size"] or 224}, lines


def run_name(recipe):
    pair = [label(recipe["teacher"])] if recipe["teacher"] else []
    name = recipes.method_name(recipe)
    return "-".join([*pair, label(recipe["student"]), name, recipe["data"], f"seed{recipe['seed']}"])


def digest(folders):
    """Which images a run learns from and is evaluated on: how many, and a hash of their names and classes."""
    names = hashlib.sha256()
    for path, target in itertools.chain(folders.train, folders.eval):
        names.update(os.fsencode(f"{'/'.join(Path(path).parts[-3:])} {target}\n"))
    return (f"{len(folders.train)} and {len(folders.eval)} of {len(folders.classes)} classes, "
            f"{names.hexdigest()[:12]}")


def check_networks(recipe, classes, say):
    """A usage error, or a ValueError, where the method or a network does not go with the images."""
    cli.check_classes(recipe, classes)
    for name in filter(None, (recipe["teacher"], recipe["student"])):
        check_model(name, classes, recipe["size"], TORCHVISION, say, name == recipe["student"])
    check_feature(recipe, classes, recipe["size"], TORCHVISION)


def run_one(recipe, folders, teacher, flags, world, stop_after=None):
    """One run in its folder: trained, resumed or found finished. Returns its result."""
    recipe = recipe | {"images": digest(folders)} | ({"teacher_sha256": teacher.sha256} if teacher else {})
    classes = len(folders.classes)
    batches = Batches(folders, recipe, teacher if recipe["method"] != "none" else None, world,
                      flags["workers"], flags["at_once"])
    real = classes == 1000 and folders.eval_name == "val"       # these may be ImageNet itself
    known = recipes.results_of(recipe, "imagenet") if real else {}

    def before():
        if (recipe["zscore"] and flags["base_temp"] is None
                and not (real and recipes.known(recipe, "imagenet"))):
            world.print(cli.temperature_line(recipe, classes))
        if teacher:
            published = None
            if real:
                published = recipes.published(recipe["teacher"], None, "teacher", data="imagenet")
            top1 = evaluate(teacher.logits, batches.evaluation(), world)["top1"]
            check_teacher(teacher, top1, f"{folders.eval_name} images", world.print, published)

    torch.manual_seed(recipe["seed"])
    student = create(recipe["student"], classes, TORCHVISION)
    if flags["student_checkpoint"]:
        # downloads for all on its machine
        world.on_main(lambda: load_pretrained(student, flags["student_checkpoint"]))
        load_pretrained(student, flags["student_checkpoint"], lambda line: None)
        recipe["student_sha256"] = weights_sha256(student)
    student.to(world.device, memory_format=layout(student))
    folder = Path(flags["out"]) / run_name(recipe)
    return run_experiment(recipe, batches, student, folder, world, teacher=teacher,
                  **known, before=before if not flags["dry_run"] else lambda: None,
                  save_every=flags["save_every"], stop_after=stop_after, capture=False,
                  micro_batch=flags["at_once"], compile=flags["compile"])


def dry_run(recipe, flags, world):
    """The whole path, made images: an epoch of two batches, save, leave, resume, evaluate, result, --eval."""
    try:
        size = 64
        check_networks(recipe | {"size": size}, 3, lambda line: None)
    except ValueError:      # for larger images only
        size = recipe["size"]
    batch = 8 * world.size
    recipe |= {"batch_size": batch, "lr": recipe["lr"] * batch / recipe["batch_size"], "epochs": 2,
               "size": size, "data": "made", "val_from_train": 0}
    classes, generator = [f"class {i}" for i in range(3)], torch.Generator().manual_seed(0)
    if flags["teacher_checkpoint"]:         # whose classes are the file's
        _, facts = open_checkpoint(flags["teacher_checkpoint"], recipe["teacher"], prefer="teacher")
        classes = facts.get("classes") or [f"class {i}" for i in range(facts["num_classes"])]
    # each process's own folder, the same in all: nodes need not share a disk
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(["train"] * 2 * recipe["batch_size"] + ["val"] * 7):
            path = Path(folder, part, f"{i % min(3, len(classes))}", f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8,
                                       generator=generator)).save(path)
        folders = load_folders(folder)._replace(classes=classes)
        check_networks(recipe, len(classes), world.print)
        flags = flags | {"out": str(Path(folder, "runs")), "workers": 0, "at_once": None, "data_dir": folder}
        if flags["student_checkpoint"] in known_weights(recipe["student"]):
            flags["student_checkpoint"] = None          # no download
        teacher = get_teacher(recipe, folders, flags, world) if recipe["teacher"] else None
        run_one(recipe, folders, teacher, flags, world, stop_after=1)
        run_one(recipe, folders, teacher, flags, world)
        if world.size == 1:      # the file is rank 0's
            student = Path(folder, "runs", run_name(recipe), "student.pt")
            evaluate_file(flags | {"eval_file": student, "size": None}, world, folders)
        world.any(False)         # none removes its folder before the others are done
    world.print("dry run: all is well")


def evaluate_file(flags, world, folders=None):
    """--eval: loss, top-1 and top-5 of a checkpoint on evaluation images, by default those of the flags."""
    folders = folders or load_folders(flags["data_dir"], flags["val_from_train"], ("val",), world.print)
    network, facts = open_checkpoint(flags["eval_file"], flags["student"], size=flags["size"],
                                     num_classes=len(folders.classes))
    check_names(flags["eval_file"], facts, folders.classes)
    name, pixels = facts["student"], facts["preprocessing"]
    teacher = Teacher(network, world.device, flags["precision"] or "fp32", flags["eval_file"],
                      pixels=IMAGENET_PREPROCESSING.at(pixels.size),
                      own=pixels if facts["preprocessing_known"] else None)
    teacher.batch = flags["at_once"] or 64
    images = Evaluation(folders, pixels.size, world, flags["workers"], teacher.batch, pixels.resize)
    scores = evaluate(teacher.logits, images, world)
    world.print(f"{name}: {scores['top1']:.2f} top-1, {scores['top5']:.2f} top-5 (%), "
                f"loss {scores['loss']:.4f} on the {len(folders.eval)} {folders.eval_name} images of "
                f"{flags['data_dir']} ({flags['eval_file']})")


@click.command(cls=cli.Command, help=__doc__)
@click.option("--method", type=cli.Choice(["none", *METHODS]), default="kd", show_default=True,
              help="Distillation method; none trains the student alone.")
@cli.shared_flags
@click.option("--data-dir", type=cli.PATH, default="imagenet", show_default=True, metavar="DIR",
              help="Folder that holds train/ and val/.")
@click.option("--teacher-weights", default="IMAGENET1K_V1", show_default=True, metavar="NAME",
              help="torchvision's name of the teacher's weights.")
@click.option("--size", type=click.IntRange(min=32), help="Preprocessing of an image's side.  [default: 224]")
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
    if flags["feature"] in ("fitnet", "ofd", "reviewkd", "catkd"):
        raise click.UsageError(f"--feature {flags['feature']} is for train_cifar.py: here there are at, rkd, "
                               "crd and simkd")
    cli.check_method(flags, [*TORCHVISION, *(name for name in MODELS if name not in TORCHVISION)])
    if flags["seeds"] != 1:
        raise click.UsageError("--seeds is for train_cifar.py; here, give one --seed at a time")
    with World(flags["device"]) as world:
        try:
            with cli.friendly_errors():
                execute(flags, world)
        except RuntimeError as error:
            if "DataLoader" in str(error):
                for child in multiprocessing.active_children():
                    child.kill()    # a hung one hears nothing else, and the end of this process waits for it
                raise RunError(f"a loading process was lost ({first_line(error)}): memory is full, or the "
                               "shared memory is small (in a container, --shm-size); give fewer --workers, "
                               "or --workers 0") from None
            if world.size == 1 or not any(words in str(error)
                                          for words in ("Connection closed", "Connection reset")):
                raise
            raise RunError(f"process {world.rank} lost another one, whose own lines say why") from None


def execute(flags, world):
    cli.set_backends(flags["deterministic"], flags["precision"])
    cli.tune_malloc()
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
    folders = load_folders(flags["data_dir"], flags["val_from_train"], say=world.print)
    world.print(f"{len(folders.train)} training and {len(folders.eval)} {folders.eval_name} images of "
                f"{len(folders.classes)} classes, {world.size} process{'es' * (world.size > 1)}")
    check_networks(recipe, len(folders.classes), world.print)
    teacher = get_teacher(recipe, folders, flags, world) if recipe["teacher"] else None
    run_one(recipe, folders, teacher, flags, world)


if __name__ == "__main__":
    main()
