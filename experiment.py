"""What both training scripts share: a recipe from flags, the networks, one run in its folder, --eval."""

import itertools
from pathlib import Path

import click
import torch

import recipes
from checkpoints import load_pretrained, open_checkpoint, weights_sha256
from cli import check_name, duration, pick_precision
from distill import Distiller, evaluate, train
from models import MODELS
from networks import TORCHVISION, check_feature, check_model, create, feature_method, init_bn_stats, layout
from run import Run, Stop, collect_facts
from teacher import Teacher, check_names, check_teacher, load_teacher

METHODS = [method for method in recipes.METHODS if method != "none"]
GIVEN = ("base_temp", "kd_weight", "ce_weight", "alpha", "beta", "zscore_relations", "feature_weight",
         "epochs", "batch_size", "lr", "weight_decay")
ONLY_FOR = {        # flag: the methods that it is for
    "zscore": METHODS, "base_temp": METHODS, "kd_weight": METHODS, "alpha": ("dkd", "rld"),
    "beta": ("dkd", "rld", "dist"), "zscore_relations": ("mlkd",),
    "entropy_weight": [method for method in METHODS if method != "dist"]}


PRINTED = ("lr", "epochs", "batch_size", "weight_decay", "base_temp", "kd_weight", "ce_weight", "alpha",
           "beta", "feature_weight", "precision", "images")       # of a recipe; config.json has all
HALF_IMAGES = 512       # of the evaluation, on which a teacher's float16 is compared with its float32

# ---------------------------------------------------------------- from flags to a recipe


def check_flags(flags, networks):
    """Usage errors that click cannot see by itself. networks: the names that --teacher and --student take.

    Takes the teacher from method none without a feature.
    """
    method, feature = flags["method"], flags["feature"]
    if method == "none" and not feature:
        flags["teacher"] = flags["teacher_checkpoint"] = None
    for key, methods in ONLY_FOR.items():
        off = (None,) if key == "zscore_relations" else (None, False)
        if not any(flags[key] is value for value in off) and method not in methods:
            raise click.UsageError(f"{option(key)} is for --method {', '.join(methods)}, not {method}")
    if flags["zscore_relations"] and not flags["zscore"]:
        raise click.UsageError("--zscore-relations needs --zscore")
    if flags["feature_weight"] is not None and not feature:
        raise click.UsageError("--feature-weight needs --feature")
    needed = ["student"] if method == "none" and not feature else ["teacher", "student"]
    for key in needed:
        if flags[key] is None and flags["eval_file"] is None:
            raise click.UsageError(f"name a --{key}; --list shows the pairs, --method none takes no teacher")
    for key in ("teacher", "student"):
        if flags[key]:
            check_name(f"--{key}", flags[key], networks)


def option(key):
    return f"--{key.replace('_', '-')}"


def resolve(flags, device, data="cifar100"):
    """The recipe: the pair's values, replaced by the flags given. Returns (recipe, lines to print).

    data: whose recipes, "cifar100" or "imagenet".
    """
    pair = {k: flags[k] for k in ("teacher", "student", "method", "zscore")}
    usual = recipes.recipe(**pair, source=flags.get("recipe", "authors"), data=data,
                           feature=flags["feature"], entropy=flags["entropy_weight"])
    lines = []
    if not usual.pop("known"):
        names = " -> ".join(filter(None, (pair["teacher"], pair["student"])))
        lines.append(f"no published recipe for {names}: values of similar pairs are taken")
    given = {k: flags[k] for k in GIVEN if flags[k] is not None}
    recipe = pair | usual | {"full_epochs": usual["epochs"]} | given
    batch, usual_batch = recipe["batch_size"], usual["batch_size"]
    if batch != usual_batch and "lr" not in given:
        lines.append(f"warning: lr {usual['lr']:g} is for batches of {usual_batch}; for {batch} give --lr "
                     f"(linear rule: {usual['lr'] * batch / usual_batch:g})")
    recipe["precision"] = pick_precision(flags["precision"], device)
    for key in ("deterministic", "compile", "val_from_train", "seed"):
        recipe[key] = flags[key]
    return recipe, lines


def check_run(recipe, lines, flags, num_classes, size, from_paper, world, source, smallest):
    """Prints lines about a recipe; ValueError where its networks do not take images of size x size.

    from_paper: the images are those of the recipe. source: MODELS or TORCHVISION, whose names go first.
    smallest: the fewest images that will be computed at once.
    """
    if num_classes < 3 and (recipe["zscore"] or recipe["method"] == "dkd"):
        raise ValueError(f"--zscore and --method dkd need three classes, these images have {num_classes}: "
                         "with two the standardized logits are always the same")
    suggested = recipes.suggested_temperature(num_classes)
    if recipe["zscore"] and not flags["base_temp"] and not from_paper and suggested != recipe["base_temp"]:
        lines.append(f"notice: for {num_classes} classes zscore_kd.py's table suggests --base-temp "
                     f"{suggested:g}")
    for line in lines:
        world.print(line)
    for name in filter(None, (recipe["teacher"], recipe["student"])):
        check_model(name, num_classes, size, source, world.print, name == recipe["student"], smallest)
    check_feature(recipe, num_classes, size, source, smallest)


# ---------------------------------------------------------------- networks


def make_teacher(recipe, path, origin, classes, flags, world, preprocessing, source):
    """The Teacher of a checkpoint file; path None: an untrained one. origin: where the file comes from."""
    torch.manual_seed(0)        # of an untrained one
    network = create(recipe["teacher"], len(classes), source)
    if path:
        return load_teacher(network, path, world.device, str(origin), recipe["precision"], flags["compile"],
                            preprocessing, classes)
    init_bn_stats(network, torch.randn(8, 3, preprocessing.size, preprocessing.size))
    return Teacher(network, world.device, recipe["precision"], pixels=preprocessing)


def evaluate_teacher(teacher, recipe, evaluation, images, published, world):
    """Prints a Teacher's top-1 on `images`, the batches of evaluation(), with the published one.

    On CUDA its logits become float16, where those of HALF_IMAGES differ little from float32's.
    """
    if world.device.type == "cuda" and recipe["precision"] != "fp32" and not recipe["deterministic"]:
        some = [x for x, _ in itertools.islice(evaluation(), 8)]
        teacher.allow_half(torch.cat(some)[:HALF_IMAGES])
        teacher.half = not world.any(not teacher.half)
    teacher.top1 = evaluate(teacher.logits, evaluation(), world)["top1"]
    check_teacher(teacher, teacher.top1, images, world.print, published)


def dry_run_classes(flags, count):
    """Names of `count` classes, or of those of the teacher's file."""
    path, metadata = flags["teacher_checkpoint"], {}
    if path:
        metadata = open_checkpoint(path, flags["teacher"], prefer="teacher")[1]
    return metadata.get("classes") or [f"class {i}" for i in range(metadata.get("num_classes", count))]


def make_student(recipe, flags, num_classes, world, source):
    """The student on its device, from its seed or its file; the hash of that file goes into the recipe."""
    torch.manual_seed(recipe["seed"])
    student, path = create(recipe["student"], num_classes, source), flags["student_checkpoint"]
    if path:
        world.on_main(lambda: load_pretrained(student, path))       # downloads for all on its machine
        load_pretrained(student, path, lambda line: None)
        recipe["student_sha256"] = weights_sha256(student)
    return student.to(world.device, memory_format=layout(student))


def make_distiller(recipe, batches, student, teacher, world):
    """All that learns, on the device."""
    feature = None
    if recipe.get("feature"):
        feature = feature_method(recipe, student, teacher.whole, batches.targets, batches.metadata["size"])
        teacher.prepare(feature)
        if feature.notice:
            world.print(feature.notice)
    return Distiller(student, recipe, feature, teacher).to(world.device)


# ---------------------------------------------------------------- one run


def run_experiment(recipe, batches, teacher, flags, world, *, data="cifar100", compare=True,
                   before=lambda: None, stop_after=None):
    """One run in its folder: trained, resumed or found finished. Returns (result, folder).

    batches: the script's Batches. teacher: a Teacher or None. data: whose recipes, "cifar100" or "imagenet";
    compare: print what is published there. before: called before a new run begins. stop_after: leave after
    so many epochs, as a kill would; the result is then None.
    """
    if teacher:
        recipe["teacher_sha256"] = teacher.sha256
    if flags["compile"]:
        torch._dynamo.reset()       # its limit of variants counts those of all runs of a process
    source = TORCHVISION if data == "imagenet" else MODELS
    student = make_student(recipe, flags, batches.metadata["num_classes"], world, source)
    folder = Path(flags["out"]) / recipes.run_name(recipe, data, pick_precision(None, world.device),
                                                   bool(flags["teacher_checkpoint"]))
    run = Run(folder, recipe, collect_facts(world.device) | {"processes": world.size})
    kept = run.kept_recipe()
    if teacher and kept:
        teacher.half = kept.get("teacher_precision") == "fp16"
    if teacher and teacher.half:
        recipe["teacher_precision"] = "fp16"
    values = [f"{k} {recipe[k]}" for k in PRINTED if recipe.get(k) is not None]
    world.print(f"{folder}: {', '.join(values)}")
    try:
        # rank 0 alone touches the folder
        state, result = world.on_main(lambda: (run.open(), run.finished()))
        if result:
            world.print("finished before")
        elif not state:
            before()
        log = recipes.log_of(recipe, data) if compare else {}
        with Stop() as stop:
            if not result:
                distiller = make_distiller(recipe, batches, student, teacher, world)
                result = train(recipe, batches, distiller, run, state, world, stop, stop_after=stop_after,
                               save_every=flags["save_every"], compile=flags["compile"],
                               log=None if flags["dry_run"] else log,
                               micro_batch=flags.get("micro_batch"), capture=data != "imagenet")
    finally:
        run.close()
    if result:
        world.print(summary(folder.name, result, recipes.results_of(recipe, data) if compare else {}))
    stop.exit_if_requested(folder)      # of the last epoch: what would come next is left out
    return result, folder


def summary(name, result, known):
    """The result in one line, with the published accuracy."""
    last, best = result["last"], result["best"]
    parts = [f"last epoch {last['top1']:.2f} top-1, {last['top5']:.2f} top-5",
             f"best {best['top1']:.2f} (epoch {best['epoch']}, chosen on {result['best_chosen_on']})"]
    for key, words in (("published", "published"), ("logged", "last epoch of the authors' log")):
        if known.get(key):
            parts.append(f"{words} {known[key]:.2f}")
    parts.append(f"{result['parameters']:,} parameters")
    return f"{name}: {'; '.join(parts)}; {duration(60 * result['minutes'])}"


def evaluate_file(flags, world, images_of):
    """--eval: prints loss, top-1 and top-5 of a checkpoint, in float32.

    images_of(metadata) returns its evaluation batches, their number of images, what they are, and the
    names of their classes.
    """
    path = flags["eval_file"]
    network, metadata = open_checkpoint(path, flags["student"], size=flags["size"])
    batches, count, images, classes = images_of(metadata)
    if not metadata["preprocessing_known"]:
        world.print(f"notice: {path} has no mean and std of its images; these are taken: "
                    f"{metadata['preprocessing'][:2]}")
    if metadata["num_classes"] != len(classes):
        raise ValueError(f"{path} is for {metadata['num_classes']} classes, these images have {len(classes)}")
    check_names(path, metadata, classes)
    network.to(world.device, memory_format=layout(network))
    scores = evaluate(network, batches, world)
    world.print(f"{metadata['student']}: {scores['top1']:.2f} top-1, {scores['top5']:.2f} top-5 (%), "
                f"loss {scores['loss']:.4f} on the {count} {images} ({path})")
