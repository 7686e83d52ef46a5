"""Training speed of train_cifar.py compared with a plain loop, in one process.

\b
  python bench.py                                        resnet56-resnet20 and resnet32x4-resnet8x4
  python bench.py --pairs resnet56-resnet20 --compile    one pair, by torch.compile

The plain loop does what the field's code does: eager, float32, contiguous images, the teacher run for every
batch, the loss read after every step. Its images come from this program's batched augmentation, so that no
loader decides. Images are synthetic: speed does not depend on them. All loops take turns, round by round.
"""

import itertools
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import torch
import torch.nn.functional as F

import cli
import recipes
from data import Data, Split, synthetic
from distill import Distiller, make_optimizer, make_step
from distributed import World
from models import create_model
from run import collect_facts
from teacher import Teacher
from train_cifar import CHUNK, Batches
from zscore_kd import kd_loss


def plain_steps(recipe, data, device):
    """KD+Z by a plain loop; yields the number of images of each step, without an end."""
    teacher = create_model(recipe["teacher"]).to(device).eval()
    student = create_model(recipe["student"]).to(device)
    optimizer = torch.optim.SGD(student.parameters(), recipe["lr"], recipe["momentum"],
                                weight_decay=recipe["weight_decay"])
    batches = Batches(data, recipe, None, device)
    for epoch in itertools.count():
        for (images,), target, *_ in batches.epoch(epoch, 0):
            images = images.contiguous()
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            ce = F.cross_entropy(logits, target)
            kd = kd_loss(logits, teacher_logits, recipe["base_temp"])
            loss = recipe["ce_weight"] * ce + recipe["kd_weight"] * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            yield len(target)


def our_steps(recipe, data, world, folder, epochs, compile):
    """The same by train_cifar.py's parts, for these epochs. folder: of the cached logits, without a GPU."""
    teacher = Teacher(create_model(recipe["teacher"]), world.device, recipe["precision"], compile=compile)
    teacher.cache_logits(data.train, folder)
    student = create_model(recipe["student"]).to(world.device, memory_format=torch.channels_last)
    distiller = Distiller(student, recipe).to(world.device).train()
    distiller.kd_weight.fill_(recipe["kd_weight"])
    optimizer = make_optimizer(distiller, recipe)
    optimizer.param_groups[0]["lr"].fill_(recipe["lr"])
    step = make_step(distiller, optimizer, recipe["batch_size"], world, compile=compile)
    batches = Batches(data, recipe, teacher, world.device)
    for epoch in epochs:
        for views, target, index, teacher_logits in batches.epoch(epoch, 0):
            step(views, target, index, teacher_logits)
            yield len(target)


def images_per_second(steps, images, device):
    """The rate of so many images of a loop."""
    backend = getattr(torch, device.type)
    backend.synchronize()
    start = time.perf_counter()
    done = 0
    while done < images:
        done += next(steps)
    backend.synchronize()
    return done / (time.perf_counter() - start)


def measure(pair, world, rounds, compile, folder):
    """{loop: [images per second in each round]} of a pair, TEACHER-STUDENT, after a round of warm-up."""
    device = world.device
    images = CHUNK[device.type]
    teacher, student = pair.split("-")
    recipe = recipes.recipe(teacher, student, "kd", zscore=True)
    recipe |= {"teacher": teacher, "student": student, "method": "kd", "zscore": True, "seed": 0}
    recipe["precision"] = cli.pick_precision(None, device)
    train = Split(*(x.to(device) for x in synthetic(images, 1)))
    data = Data(train, train, train, "test")
    torch.manual_seed(0)
    loops = {"plain loop": plain_steps(recipe, data, device)}
    kinds = {"first epoch": itertools.count(), "cached": itertools.repeat(0)}   # epochs
    for kind, epochs in kinds.items():
        steps = our_steps(recipe, data, world, folder / pair / kind, epochs, compile)
        loops[f"this program, {kind}"] = steps
    rates = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, steps in loops.items():
            rate = images_per_second(steps, images, device)
            rates[name].append(rate)
    return {name: values[1:] for name, values in rates.items()}


def table(pair, rates):
    """Markdown: median (lowest to highest) images per second, and the median ratio to the plain loop's."""
    lines = [f"| {pair} | images/s | ratio |", "| --- | --- | --- |"]
    for name, values in rates.items():
        ratio = median(own / plain for own, plain in zip(values, rates["plain loop"]))
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        lines.append(f"| {name} | {median(values):,.0f} ({spread}) | x {ratio:.2f} |")
    return "\n".join(lines)


@click.command(cls=cli.Command, help=__doc__)
@click.option("--pairs", metavar="T-S,...", default="resnet56-resnet20,resnet32x4-resnet8x4",
              show_default=True, help="TEACHER-STUDENT.")
@click.option("--rounds", type=cli.COUNT, default=7, show_default=True, help="Turns of each loop.")
@click.option("--compile", is_flag=True, help="This program by torch.compile; a minute more.")
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the best available]")
def main(pairs, rounds, compile, device):
    world = World(device)
    cli.set_backends(deterministic=False)
    cli.tune_malloc()
    if compile:
        cli.check_compiler(world.device)
    facts = collect_facts(world.device)
    click.echo(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {rounds} rounds")
    with cli.friendly_errors(), tempfile.TemporaryDirectory() as folder:
        for pair in pairs.split(","):
            rates = measure(pair, world, rounds, compile, Path(folder))
            click.echo("\n" + table(pair, rates))


if __name__ == "__main__":
    main()
