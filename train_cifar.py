"""Logit standardization in knowledge distillation on CIFAR-100, or any small images.

\b
  python train_cifar.py --demo                                             needs nothing: minutes on a laptop
  python train_cifar.py --teacher resnet32x4 --student resnet8x4 --zscore  the paper's KD+Z
  python train_cifar.py --teacher resnet32x4 --student resnet8x4           KD, the baseline
  python train_cifar.py --method none --student resnet32x4                 a network alone: a teacher
  python train_cifar.py --teacher ... --student ... --zscore --seeds 3     mean and standard deviation
  python train_cifar.py --data folder --data-dir photos --size 64 ...      photos/train/CLASS/, val/CLASS/
  python train_cifar.py --eval FILE                                        evaluate a checkpoint
  python train_cifar.py --list                                             recipes and published numbers

A flag that is left out takes the pair's recipe. A run that was stopped goes on when the same command is given
again. The last epoch is the result; the best epoch, chosen on the test split, stands beside it.
"""

import hashlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from click.core import ParameterSource

import cli
import recipes
from checkpoints import load_pretrained, open_checkpoint, weights_sha256
from data import CIFAR, Data, Preprocessing, Split, crop_and_flip, epoch_draws, load_data, synthetic
from distill import run_experiment, evaluate
from distributed import World
from logit_kd import METHODS
from models import MODELS
from networks import check_feature, check_model, create, init_bn_stats, label, layout
from randaugment import strong_draws, strong_view
from run import RunError
from teacher import ARCHIVE_URL, CHECKPOINTS, Teacher, check_names, check_teacher, find_teacher, load_teacher

# images that are augmented, and the teacher is asked about, at once
CHUNK = {"cuda": 8192, "mps": 1024, "cpu": 1024}
ADVICE = ("take a CUDA GPU, or a short run of small networks, for instance --student resnet8 --epochs 12 "
          "--train-images 10000")


class Batches:
    """Small images as `distill.train` takes them: each epoch shuffled, each image at one of its 162 views."""

    advice, long_evaluation, undecodable = ADVICE, False, 0

    def __init__(self, data, recipe, teacher, device):
        self.data, self.recipe, self.teacher, self.device, self.eval_name = (
            data, recipe, teacher, device, data.eval_name)
        self.targets = data.train.targets
        self.images = self.train_images = len(self.targets)
        self.steps = -(-self.images // recipe["batch_size"])        # the last batch is smaller
        chunk = CHUNK[device.type] * 32**2 // data.pixels.size**2
        self.chunk = max(1, chunk // recipe["batch_size"]) * recipe["batch_size"]       # whole batches
        self.metadata = {"num_classes": data.num_classes, "classes": list(data.classes),
                         **data.pixels._asdict()}

    def check(self, undecodable):
        """What a row of the log says beside the usual."""
        return {}

    def epoch(self, epoch, first_step):
        """Yields (views, target, index, teacher_logits) of each step.

        Made `chunk` images at a time: the teacher does not depend on the student, and few large operations
        beat many small ones.
        """
        seed, batch, train = self.recipe["seed"], self.recipe["batch_size"], self.data.train
        normalise = self.data.pixels.normalise
        order, drawn = map(torch.from_numpy, epoch_draws(seed, epoch, self.images))
        strong = strong_draws(seed, epoch, self.images) if self.recipe["method"] == "mlkd" else None
        for start in range(first_step * batch, self.images, self.chunk):
            part = slice(start, start + self.chunk)
            index = order[part].to(self.device)
            images, target = train.images[index], train.targets[index]
            views = [normalise(crop_and_flip(images, drawn[part].to(self.device)))]
            teacher_logits = ([self.teacher.cached_logits(order[part], drawn[part], views[0])]
                              if self.teacher else [])      # line 2: v_n
            if strong:
                views.append(normalise(strong_view(images, strong[part].to(self.device))))
                teacher_logits += [self.teacher.logits(views[1])] if self.teacher else []
            for first in range(0, len(target), batch):
                now = slice(first, first + batch)
                yield [x[now] for x in views], target[now], index[now], [v[now] for v in teacher_logits]

    def evaluation(self):
        return evaluation(self.data.eval, self.data.pixels)


def evaluation(split, pixels):
    """Yields (normalised images, targets) of a split, as `distill.evaluate` takes them."""
    for images, target in zip(split.images.split(500), split.targets.split(500)):
        yield pixels.normalise(images), target


# ---------------------------------------------------------------- one run


def resolve(flags, device):
    """The run's recipe: the pair's, with the flags that were given. Returns (recipe, lines to print)."""
    names = [flags[k] for k in ("teacher", "student", "method", "zscore", "recipe")]
    more = {"feature": flags["feature"], "entropy": flags["entropy_weight"]}
    recipe, lines = cli.resolve(flags, recipes.recipe(*names, **more), device)
    recipe |= {"data": flags["data"], "train_images": flags["train_images"]}
    if flags["data"] == "folder":
        recipe |= {"folder": Path(flags["data_dir"]).resolve().name, "size": flags["size"]}
    return recipe | ({"exact_teacher": flags["exact_teacher"]} if flags["teacher"] else {}), lines


def run_name(recipe):
    """The folder's name: resnet32x4-resnet8x4-kd-z-seed0."""
    pair = [label(recipe["teacher"])] if recipe["teacher"] else []
    data = [] if recipe["data"] == "cifar100" else [recipe.get("folder", recipe["data"])]
    name = recipes.method_name(recipe)
    return "-".join([*pair, label(recipe["student"]), name, *data, f"seed{recipe['seed']}"])


def read_data(flags, device, **part):
    """The Data that the flags name, on the device."""
    part |= {"train_images": flags["train_images"], "val_from_train": flags["val_from_train"]}
    return load_data(flags["data"], flags["data_dir"], device, size=flags["size"], **part)


def about(data):
    """What a run in folders of images keeps of them, in its recipe: they may be others when it goes on."""
    digest = hashlib.sha256()
    for x in (*data.train, *data.eval):
        digest.update(x.cpu().numpy())
    counts = f"{len(data.train.targets)} and {len(data.eval.targets)} of {data.num_classes} classes"
    return {"images": f"{counts}, {digest.hexdigest()[:12]}", "mean": data.pixels.mean,
            "std": data.pixels.std}


def check_networks(recipe, data):
    """A usage error, or a ValueError, where the method or a network does not go with the data."""
    cli.check_classes(recipe, data.num_classes)
    images, batch = len(data.train.targets), recipe["batch_size"]
    cli.check_batch(recipe, images, images % batch or batch)
    for name in filter(None, (recipe["teacher"], recipe["student"])):
        check_model(name, data.num_classes, data.pixels.size, MODELS, click.echo, name == recipe["student"])
    check_feature(recipe, data.num_classes, data.pixels.size)


def run_one(recipe, data, teacher, flags, world, stop_after=None):
    """One run in its folder: trained, resumed or found finished. Returns (result, folder)."""
    recipe = recipe | ({"teacher_sha256": teacher.sha256} if teacher else {})
    if flags["compile"]:
        torch._dynamo.reset()       # else the variants of all runs count towards its limit, and it stops
    torch.manual_seed(recipe["seed"])
    student = create(recipe["student"], data.num_classes)
    if flags["student_checkpoint"]:
        load_pretrained(student, flags["student_checkpoint"], click.echo)
        recipe["student_sha256"] = weights_sha256(student)
    student.to(world.device, memory_format=layout(student))
    known = recipes.results_of(recipe) if recipe["data"] == "cifar100" else {}
    folder = Path(flags["out"]) / run_name(recipe)
    batches = Batches(data, recipe, teacher if recipe["method"] != "none" else None, world.device)
    result = run_experiment(recipe, batches, student, folder, world, teacher=teacher, **known, more=True,
                    stop_after=stop_after, save_every=flags["save_every"], compile=flags["compile"],
                    capture=flags["capture"])
    return result, folder


def execute(flags, world, shared):
    """The run of the flags' first seed. Returns (recipe, result, folder, teacher).

    shared: a dict; keeps data and teachers for the next run that has the same.
    """
    recipe, lines = resolve(flags, world.device)
    wanted = tuple(flags[k] for k in ("data", "data_dir", "size", "train_images", "val_from_train"))
    if wanted not in shared:
        shared[wanted] = read_data(flags, world.device)
    data, teacher = shared[wanted], None
    check_networks(recipe, data)
    known = recipe["data"] == "synthetic" or recipe["data"] == "cifar100" and recipes.known(recipe)
    if recipe["zscore"] and not known and flags["base_temp"] is None:
        lines.append(cli.temperature_line(recipe, data.num_classes))
    for line in lines:
        if line not in shared:      # once for all seeds
            click.echo(line)
        shared[line] = True
    if recipe["data"] == "folder":
        recipe |= about(data)
    if recipe["teacher"]:
        asked = (*wanted, recipe["teacher"], flags["teacher_checkpoint"], recipe["precision"],
                 recipe["compile"], recipe["exact_teacher"], recipe["method"] == "none")
        if asked not in shared:
            if world.device.type == "cuda":     # which has room for one teacher's logits at a time
                for other in [k for k, v in shared.items() if isinstance(v, Teacher)]:
                    del shared[other]
            teacher = get_teacher(recipe, data, flags, world)
            known = recipes.published(None, teacher.name, "none") if recipe["data"] == "cifar100" else None
            split = "test split" if data.eval_name == "test" or recipe["data"] != "folder" else (
                f"{data.eval_name} images")
            teacher.top1 = evaluate(teacher.logits, evaluation(data.test, data.pixels), world)["top1"]
            check_teacher(teacher, teacher.top1, split, world.print, known)
            shared[asked] = teacher
        teacher = shared[asked]
    return recipe, *run_one(recipe, data, teacher, flags, world), teacher


def parsed(arguments):
    """The flags of a command line, a list of strings; usage errors as the command's own."""
    flags = main.make_context("train_cifar.py", list(arguments)).params
    check_flags(flags)
    return flags


def check_flags(flags):
    """Usage errors that click cannot see by itself."""
    cli.check_method(flags, MODELS)
    if flags["data"] is None and flags["eval_file"] is None:
        flags["data"] = "cifar100"
    if flags["size"] is None:
        flags["size"] = None if flags["eval_file"] else 32
    elif flags["data"] != "folder" and not (flags["dry_run"] or flags["eval_file"]):
        raise click.UsageError("--size is for --data folder: the other images are 32 x 32")


def resolve_arguments(arguments):
    """(recipe, name of the run's folder) of a command line; nothing is run."""
    flags = parsed(arguments)
    recipe, _ = resolve(flags, cli.pick_device(flags["device"]))
    return recipe, run_name(recipe)


def run(arguments, shared=None):
    """A command line, a list of strings, run here: see `execute`. Raises what the command would."""
    flags = parsed(arguments)
    return execute(flags, prepared(flags), {} if shared is None else shared)


def prepared(flags):
    """The World, with what must be set before its first operation."""
    if torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise click.UsageError("train_cifar.py is one process: start it without torchrun")
    world = World(flags["device"])
    cli.set_backends(flags["deterministic"], flags["precision"])
    cli.tune_malloc()
    if flags["compile"]:
        cli.check_compiler(world.device)
    return world


# ---------------------------------------------------------------- the teacher


def get_teacher(recipe, data, flags, world):
    """A recipe's Teacher, its logits cached for the training images; trained here first if there is none."""
    name, how = recipe["teacher"], (recipe["precision"],)
    network = create(name, data.num_classes)
    if flags["dry_run"] and flags["teacher_checkpoint"] is None:
        init_bn_stats(network, data.pixels.normalise(data.train.images.cpu()))
        return caching(Teacher(network, world.device, *how, pixels=data.pixels), data, flags)
    if (recipe["data"] != "cifar100" or network.own) and flags["teacher_checkpoint"] is None:
        path, source = None, (f"{name} is your own" if network.own else
                              f"no teacher is published for {recipe['data']} images")
    else:
        path, source = find_teacher(network.name, flags["teacher_checkpoint"], flags["teacher_url"],
                                    click.echo)
    if path is None:
        click.echo(f"{source}; training {name} here first, which is as long as a run (a file: "
                   "--teacher-checkpoint)")
        path = train_teacher(recipe, flags, world)
        source = f"trained here, {path}"
    return caching(load_teacher(network, path, world.device, source, *how, flags["compile"], data.pixels,
                                data.classes), data, flags)


def caching(teacher, data, flags):
    """The teacher, its logits cached. An untrained one's need not fit float16."""
    read = flags["teacher_memory"] and not flags["dry_run"] and flags["method"] != "none"
    folder = Path(flags["out"]) / "logits" if read else None
    teacher.cache_logits(data.train, folder, flags["exact_teacher"] or flags["dry_run"])
    return teacher


def train_teacher(recipe, flags, world):
    """Trains recipe["teacher"] alone by its own recipe, keeps it, and returns its file.

    On images that no paper has, its training is as long as the run's.
    """
    own = recipe["data"] not in CIFAR
    alone = {**flags, **dict.fromkeys(cli.GIVEN), "teacher": None, "teacher_checkpoint": None,
             "student": recipe["teacher"], "student_checkpoint": None, "method": "none", "feature": None,
             "entropy_weight": False, "zscore": False, "recipe": "authors", "val_from_train": 0, "seed": 0,
             "train_images": None, "precision": recipe["precision"]}
    if own:
        alone |= {k: flags[k] for k in ("epochs", "batch_size", "train_images", "val_from_train")}
    try:
        folder = execute(alone, world, {})[2]
    except RunError as error:
        raise RunError(f"{error.message}; or name a teacher's file with --teacher-checkpoint") from None
    if recipe["data"] != "cifar100" or ":" in recipe["teacher"]:
        return folder / "student.pt"
    kept = CHECKPOINTS / f"{recipe['teacher']}.pt"
    partial = kept.with_name(f"{kept.name}.{os.getpid()}.part")
    try:
        CHECKPOINTS.mkdir(exist_ok=True)
        shutil.copyfile(folder / "student.pt", partial)
        os.replace(partial, kept)
        return kept
    except OSError as error:
        click.echo(f"notice: no copy of the teacher could be kept in {CHECKPOINTS} ({error.strerror}); "
                   f"it stays in {folder}")
        return folder / "student.pt"
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- the command


def seeds_table(results):
    """Each seed's row, then mean and standard deviation (of a sample, n - 1)."""
    lines = [f"seed    last    best (chosen on {next(iter(results.values()))['best_chosen_on']})"]
    lines += [f"{seed:4d}  {r['last']['top1']:6.2f}  {r['best']['top1']:6.2f}" for seed, r in results.items()]
    last, best = ([r[k]["top1"] for r in results.values()] for k in ("last", "best"))
    lines.append("mean  " + "  ".join(f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}"
                                      for x in (last, best)) + f"  (n = {len(last)})")
    return "\n".join(lines)


def evaluate_file(flags, world, data=None):
    """--eval: prints loss, top-1 and top-5 of a checkpoint on a data set, by default the one of the flags."""
    path = flags["eval_file"]
    network, facts = open_checkpoint(path, flags["student"], size=flags["size"])
    name, count, pixels = facts["student"], facts["num_classes"], facts["preprocessing"]
    network = Teacher(network, world.device, flags["precision"] or "fp32", path, pixels=pixels)
    if data is None:
        flags = flags | {"data": flags["data"] or usual_data(facts, pixels, flags["data_dir"])}
        if flags["data"] == "folder":
            data = load_data("folder", flags["data_dir"], world.device, size=pixels.size,
                             resize=pixels.resize, parts=("val",), val_from_train=flags["val_from_train"])
        else:
            data = read_data(flags | {"train_images": None}, world.device)
        if flags["data"] == "folder" and not facts["preprocessing_known"]:
            whose = "CIFAR-100" if pixels[:2] == Preprocessing()[:2] else "ImageNet"
            click.echo(f"notice: {path} does not say its images' mean and deviation; taking {whose}'s")
    if count != data.num_classes:
        raise ValueError(f"{path} is for {count} classes, these images have {data.num_classes}")
    check_names(path, facts, data.classes)
    scores = evaluate(network.logits, evaluation(data.eval, pixels), world)
    click.echo(f"{name}: {scores['top1']:.2f} top-1, {scores['top5']:.2f} top-5 (%), "
               f"loss {scores['loss']:.4f} on the {len(data.eval.targets)} {data.eval_name} images of "
               f"{flags['data_dir'] if flags['data'] == 'folder' else flags['data']} ({path})")


def usual_data(facts, pixels, data_dir):
    """Whose images a checkpoint is evaluated on: those that it says, else what --data-dir has."""
    said = facts.get("data")
    if said in (*CIFAR, "synthetic", "folder") and pixels.size == pixels.resize:
        return said
    folder = Path(data_dir).expanduser()
    return "folder" if any((folder / part).is_dir() for part in ("train", "val")) else "cifar100"


def dry_run(flags, world):
    """The whole path on made data: train one epoch of two batches, save, leave, resume, evaluate, result."""
    recipe, lines = resolve(flags, world.device)
    for line in lines:
        click.echo(line)
    count, size = 10 if flags["data"] == "cifar10" else 100, flags["size"]
    classes = [f"class {i}" for i in range(count)]
    if flags["teacher_checkpoint"]:     # whose classes are the file's
        _, facts = open_checkpoint(flags["teacher_checkpoint"], recipe["teacher"], prefer="teacher")
        count = facts["num_classes"]
        classes = facts.get("classes") or [f"class {i}" for i in range(count)]

    def made(part):
        images, target = synthetic(2 * recipe["batch_size"], part)
        return Split(F.interpolate(images, size).to(world.device), (target % count).to(world.device))

    data = Data(made(1), made(2), made(2), "test", classes, Preprocessing(size=size, resize=size))
    recipe |= {"data": "synthetic", "epochs": 2, "train_images": None, "val_from_train": 0}
    check_networks(recipe, data)
    with tempfile.TemporaryDirectory() as folder:
        flags = flags | {"out": folder}
        teacher = get_teacher(recipe, data, flags, world) if recipe["teacher"] else None
        run_one(recipe, data, teacher, flags, world, stop_after=1)
        run_one(recipe, data, teacher, flags, world)
        student = str(Path(folder, run_name(recipe), "student.pt"))
        evaluate_file(flags | {"eval_file": student, "data": "synthetic", "size": None}, world, data)
    click.echo("dry run: all is well")


def demo(flags, world):
    """--demo: a small teacher on made images; the student alone, with KD and with KD+Z; their accuracies."""
    begun = time.monotonic()
    flags = flags | {"data": "synthetic", "train_images": 4000, "out": os.path.join(flags["out"], "demo")}
    alone, pair = ({"teacher": None, "method": "none"},
                   {"teacher": "resnet20", "student": "resnet8", "method": "kd"})
    settings = {
        "teacher, resnet20, 8 epochs": alone | {"student": "resnet20", "epochs": 8, "zscore": False},
        "student, resnet8, 5 epochs, alone": alone | {"student": "resnet8", "epochs": 5, "zscore": False},
        "the same with KD": pair | {"epochs": 5, "zscore": False},
        "the same with KD+Z": pair | {"epochs": 5, "zscore": True}}
    accuracies = {name: [] for name in settings}
    shared = {}
    for seed in range(flags["seed"], flags["seed"] + flags["seeds"]):
        teacher = None
        for name, setting in settings.items():
            setting = setting | {"seed": seed, "teacher_checkpoint": teacher if setting["teacher"] else None}
            _, result, folder, _ = execute(flags | setting, world, shared)
            teacher = teacher or str(folder / "student.pt")
            accuracies[name].append(result["last"]["top1"])
    click.echo(f"\n{'made images of 100 classes':36s}top-1, last epoch")
    for name, values in accuracies.items():
        spread = f" ± {statistics.stdev(values):.2f} (n = {len(values)})" if len(values) > 1 else ""
        click.echo(f"{name:36s}{statistics.mean(values):.2f}{spread}")
    click.echo(f"{cli.duration(time.monotonic() - begun)} in all. Next, the paper's experiment on CIFAR-100 "
               "(a GPU helps; --list shows every pair):\n"
               "  python train_cifar.py --teacher resnet32x4 --student resnet8x4 --zscore")


def check_demo():
    """A usage error for what --demo decides itself."""
    context, allowed = (click.get_current_context(),
                        ("demo", "seed", "seeds", "out", "device", "precision", "save_every"))
    for name in context.params:
        if name not in allowed and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--demo takes no --{name.replace('_', '-')}; it has its own")


@click.command(cls=cli.Command, help=__doc__)
@click.option("--method", type=cli.Choice(["none", *METHODS]), default="kd", show_default=True,
              help="Distillation method; none trains the student alone.")
@cli.shared_flags
@click.option("--recipe", type=cli.Choice(recipes.SOURCES), default="authors", show_default=True,
              help="Whose numbers: the authors' logs, or the defaults of their released code.")
@click.option("--data", type=cli.Choice([*CIFAR, "folder", "synthetic"]), help="[default: cifar100]")
@click.option("--data-dir", type=cli.PATH, default="data", show_default=True, metavar="DIR",
              help="Folder that holds cifar-100-python, cifar-10-batches-py, or train/ and val/.")
@click.option("--size", type=click.IntRange(min=8), metavar="PIXELS",
              help="Side of the images of --data folder.  [default: 32]")
@click.option("--train-images", type=cli.COUNT, metavar="N",
              help="Train on the first N images of a fixed shuffle.")
@click.option("--teacher-url", default=ARCHIVE_URL, envvar="TEACHER_URL", metavar="URL",
              help="Archive of mdistiller's teachers, or a mirror of it (also TEACHER_URL).")
@click.option("--capture/--no-capture", default=True,
              help="On CUDA, the step as a CUDA graph.  [default: on]")
@click.option("--teacher-memory/--no-teacher-memory", default=True,
              help="Cache the teacher's logits (on a GPU there, else in OUT/logits, up to 1.7 GB).  "
                   "[default: on]")
@click.option("--exact-teacher", is_flag=True,
              help="Cache the teacher's logits in float32, not rounded to float16.")
@click.option("--demo", is_flag=True,
              help="Teacher, student alone, KD and KD+Z on made images, in minutes on two CPU cores.")
@click.option("--save-every", type=cli.POSITIVE, default=60, show_default=True, help="Seconds between saves.")
def main(**flags):
    if flags["list_recipes"]:
        click.echo(recipes.table())
        return
    if flags["demo"]:
        check_demo()
    else:
        check_flags(flags)
    with cli.friendly_errors():
        world = prepared(flags)
        if flags["demo"]:
            demo(flags, world)
        elif flags["eval_file"]:
            evaluate_file(flags, world)
        elif flags["dry_run"]:
            dry_run(flags, world)
        else:
            seeds, shared = range(flags["seed"], flags["seed"] + flags["seeds"]), {}
            results = {seed: execute(flags | {"seed": seed}, world, shared)[1] for seed in seeds}
            if len(seeds) > 1:
                click.echo(seeds_table(results))


if __name__ == "__main__":
    main()
