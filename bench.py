"""Speed of the training scripts, part by part, beside the plain loop of the field in the same process.

\b
  python bench.py                                 all experiments but the last two on this machine
  python bench.py --compile --json bench.json     with torch.compile beside it; every round's numbers
  python bench.py --only resnet56-resnet20        one of them
  python bench.py --only features                 feature methods, which take long on a CPU
  python bench.py --only vocabulary               KD on language models' tokens: speed and memory

The baseline is what the field's code does: eager, float32, contiguous, the teacher run for every batch, loss
and accuracy read after every step; with torchvision's transforms in two loading workers, and with this
program's batched augmentation, so that a slow loader does not decide. All take turns, round by round.

Feature methods: whole steps on images in memory. CRD's and RKD's baselines compute as the field's code does.
"""

import json
import math
import os
import tempfile
import time
import warnings
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, count, cycle, islice, product, repeat
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

import cli
import recipes
import train_cifar
import train_imagenet
from data import IMAGENET_PREPROCESSING, MEAN, STD, VIEWS, Data, Folders, Split, folder_keys, synthetic
from distill import Distiller, make_optimizer, make_step
from feature_kd import CRD, nce_loss
from logit_kd import linear_kd_loss
from models import create_model
from networks import TORCHVISION, create, feature_method, init_bn_stats
from run import RunError, collect_facts, first_line, rounded
from teacher import BATCH, Teacher
from zscore_kd import kd_loss

IMAGENET = [tuple(pair.split("-")) for pair in recipes.IMAGENET]
EXPERIMENTS = "resnet56-resnet20", "resnet32x4-resnet8x4", "resnet32x4-resnet8x4-mlkd"
ALL = *EXPERIMENTS, "imagenet", "features", "vocabulary"
ROWS = "data", "teacher", "student", "whole, first epoch", "whole, cached"
DATA, TEACHER, STUDENT, FIRST, CACHED = ROWS
COLUMNS = {"workers": "baseline, 2 workers", "baseline": "baseline", "this": "this program",
           "compiled": "with --compile", "roofline": "roofline"}
LOADED = 512        # images, at least, that ImageNet's loading is measured with
HIDDEN, VOCABULARIES, TOKENS = 512, (32_000, 128_256), (2_048, 8_192)
PAIR, IMAGES = "resnet32x4-resnet8x4", 50_000       # of the feature methods; in CRD's banks

# What is measured: `use` on `steps` of `batches`, (views, target, ...); the first `skip` do not count.
Part = namedtuple("Part", "batches steps use skip", defaults=(lambda *batch: None, 0))


def measure(parts, rounds, device):
    """{row: {column: [images per second in each round]}} of {row: {column: Part}}; one more is warm-up."""
    def now():
        getattr(torch, device.type).synchronize()
        return time.perf_counter()

    rates = {part: [] for cells in parts.values() for part in cells.values()}
    for part in list(rates) * (rounds + 1):
        images, begun = 0, now()
        for i, batch in enumerate(islice(part.batches, part.steps), 1):
            part.use(*batch)
            images += len(batch[1])
            if i == part.skip:
                images, begun = 0, now()
        rates[part].append(images / (now() - begun))
    return {row: {c: rates[part][1:] for c, part in cells.items()} for row, cells in parts.items()}


def endless(batches, epochs, first_step=0):
    return chain.from_iterable(batches.epoch(epoch, first_step) for epoch in epochs)


def build(network, recipe, world, plain=False):
    """(teacher, ask, learn) as the scripts make them, or as the plain loop does. network: name -> module.

    ask(views): the teacher's logits. learn(views, target, index, teacher_logits): a step.
    """
    device, lr, feature = world.device, recipe["lr"], recipe.get("feature")
    teacher, student = (network(recipe[k]).to(device) for k in ("teacher", "student"))
    student.to(memory_format=torch.contiguous_format if plain else torch.channels_last)
    if feature or not plain:
        teacher = Teacher(teacher, device, recipe["precision"], compile=recipe["compile"])
    if feature:
        init_bn_stats(teacher.whole, torch.randn(recipe["batch_size"], 3, 32, 32, device=device))
        method = feature_method(recipe, student, teacher.whole, torch.arange(IMAGES) % 100, 32)
        if plain:
            teacher.whole.train(method.teacher_mode == "train")
            teacher.features = lambda x: teacher.whole(x, features=True)[1]
            method.forward = partial(PLAIN[feature], method) if feature in PLAIN else method.forward
        else:
            teacher.prepare(method)
    distiller = Distiller(student, recipe, *((method, teacher) if feature else ())).to(device).train()
    distiller.kd_weight.fill_(recipe["kd_weight"])
    distiller.feature_weight.fill_(recipe.get("feature_weight", 0))
    if plain:
        optimizer = torch.optim.SGD(distiller.parameters(), lr, 0.9, weight_decay=recipe["weight_decay"])
    else:
        optimizer = make_optimizer(distiller, recipe)
        optimizer.param_groups[0]["lr"].fill_(lr)
    step = make_step(distiller, optimizer, recipe["batch_size"], world, None, recipe["compile"], not plain)
    logits = teacher.logits if feature or not plain else teacher.eval().requires_grad_(False)
    total = torch.zeros(6 if feature else 5, dtype=torch.float64, device=device)

    def ask(views, *_):
        torch.backends.cudnn.allow_tf32 = plain         # PyTorch's default on CUDA
        return [logits(x) for x in views]

    def learn(views, target, index=None, teacher_logits=None):
        torch.backends.cudnn.allow_tf32 = plain
        given = [] if feature else teacher_logits or ask(views)
        sums = step(views, target, index if feature else target, given)      # other losses read no index
        if plain:
            return sums.tolist()
        total.add_(sums)
    return teacher, ask, learn


def per_image(two_views, items):
    """A loading worker's batch of [(image, target)]: torchvision's transforms, image by image."""
    crop = [transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    strong = [*crop, transforms.RandAugment(2), *tensor, transforms.RandomErasing(p=1)]
    views = [transforms.Compose(view) for view in ([*crop, *tensor], strong)[:1 + two_views]]
    images, targets = zip(*items)
    return [torch.stack([*map(view, images)]) for view in views], torch.tensor(targets)


def recipe_of(name, device, column="this", feature=None):
    """The recipe of a column of an experiment, as the command itself finds it."""
    flags = {"compiled": ["--compile"], "this": []}.get(column, ["--precision", "fp32"])
    flags += ["--feature", feature] if feature else ["--zscore"]
    pair = zip(("--teacher", "--student", "--method"), f"{name}-kd".split("-"))
    return train_cifar.resolve_arguments([*chain(*pair), "--device", device.type, *flags])[0]


def parts_of(name, column, world, folder):
    """{row: Part} of a column of an experiment; where the cached logits are a file, it is in `folder`."""
    device, plain = world.device, column in ("workers", "baseline")
    recipe, chunk = recipe_of(name, device, column), train_cifar.CHUNK[device.type]
    size, steps = recipe["batch_size"], chunk // recipe["batch_size"]
    split = Split(*(x.to(device) for x in synthetic(2 * chunk, 1)))     # speed does not depend on the images
    torch.manual_seed(0)
    teacher, ask, learn = build(create_model, recipe, world, plain)
    known, batches, chunks = (
        train_cifar.Batches(Data(*[split] * 3, "test"), recipe | {"batch_size": n}, t, device)
        for t, n in ((teacher, size), (None, size), (None, chunk)))
    if not plain:
        teacher.cache_logits(split, Path(folder, column))
        for held in known.epoch(0, 0):      # its weak views' logits are cached from here on
            pass
        return {DATA: Part(endless(batches, count()), steps), STUDENT: Part(repeat(held), steps, learn),
                TEACHER: Part(repeat(next(chunks.epoch(0, 0))), 1, ask),
                FIRST: Part(endless(known, count(1)), steps, learn),
                CACHED: Part(endless(known, repeat(0)), steps, learn)}
    if column == "workers":
        images = list(zip(split.images.permute(0, 2, 3, 1).cpu().numpy(), split.targets.tolist()))
        loader = DataLoader(images, size, True, num_workers=2, persistent_workers=True, prefetch_factor=1,
                            collate_fn=partial(per_image, recipe["method"] == "mlkd"))
        source = chain.from_iterable(repeat(loader))
    else:
        batches.chunk, source = size, endless(batches, count())
    source = (([x.to(device).contiguous() for x in views], y.to(device)) for views, y, *_ in source)
    held, whole = next(source), Part(source, steps, learn)
    # four times the steps, as the workers have a few batches ready when their turn begins
    return {DATA: Part(source, 4 * steps), TEACHER: Part(repeat(held), steps, ask),
            STUDENT: Part(repeat((*held, None, ask(held[0]))), steps, learn), FIRST: whole, CACHED: whole}


def peak(name, column, device):
    """Peak memory (MiB) of a column's whole steps; to be run in a process of its own. device: its name."""
    world = train_cifar.prepared({"device": device, "deterministic": False, "compile": False,
                                  "precision": None})
    with tempfile.TemporaryDirectory() as folder:
        measure({FIRST: {column: parts_of(name, column, world, folder)[FIRST]}}, 0, world.device)
    return cli.peak_memory(world.device)


def roofline(recipe, device):
    """({row: images per second if all arithmetic ran as fast as a large matrix product}, its FLOP/s)."""
    size, bf16 = 8192 if device.type == "cuda" else 2048, recipe["precision"] == "bf16"
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else None)
    product = Part(repeat((matrix, [0])), 1, lambda a, _: a @ a)        # [0]: counts as one image
    rate = 2 * size**3 * max(measure({0: {0: product}}, 5, device)[0][0])
    images, views = torch.randn(2, 3, 32, 32), 2 if recipe["method"] == "mlkd" else 1
    with FlopCounterMode(display=False) as counter:
        create_model(recipe["teacher"]).eval().requires_grad_(False)(images)
        view = counter.get_total_flops() / 2
        create_model(recipe["student"])(images).sum().backward()
    teacher, student = views * view, views * (counter.get_total_flops() / 2 - view)
    flops = {TEACHER: teacher, STUDENT: student, FIRST: teacher + student, CACHED: teacher - view + student}
    return {row: rate / n for row, n in flops.items()}, rate        # a strong view is never cached


def hours(epochs, first, cached, chunk, batch, images=50_000):
    """Projected hours of a run, evaluation aside, from images per second without and with cached logits."""
    missing = ((1 - 1 / VIEWS) ** e for e in range(epochs))     # the share of an epoch's views not yet cached
    asked = (min(1, math.ceil(chunk * share / batch) * batch / chunk) for share in missing)     # full batches
    return sum(images * (1 / cached + share * (1 / first - 1 / cached)) for share in asked) / 3600


def experiment(name, world, rounds, compile):
    """All numbers of one experiment, as a dict."""
    device, recipe, columns = world.device, recipe_of(name, world.device), list(COLUMNS)[:3 + compile]
    with tempfile.TemporaryDirectory() as folder:
        parts = {c: parts_of(name, c, world, folder) for c in columns}
        rates = measure({row: {c: parts[c][row] for c in columns} for row in ROWS}, rounds, device)
    rate = {row: {c: median(values) for c, values in cells.items()} for row, cells in rates.items()}
    bounds, flops = roofline(recipe, device)
    for row, bound in bounds.items():
        rates[row]["roofline"] = [bound] * rounds
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        memory = {c: pool.submit(peak, name, c, device.type).result() for c in ("baseline", "this")}
    sizes, last = (train_cifar.CHUNK[device.type], BATCH[device.type]), columns[-1]
    shares = ", ".join(f"{row} {rate[FIRST][last] / rate[row][last]:.0%}" for row in (DATA, TEACHER, STUDENT))
    return {"experiment": name, "epochs": recipe["epochs"], "rates": rates, "peak_mib": memory,
            "hours": {c: hours(recipe["epochs"], rate[FIRST][c], rate[CACHED][c], *sizes) for c in columns},
            "notes": [f"of a step of the first epoch ({COLUMNS[last]}): {shares}, measured apart; roofline: "
                      f"the {flops / 1e9:,.0f} GFLOP/s of a large {recipe['precision']} matrix product"]}


def jpeg_folder(folder, files=256):
    """`folder`, with JPEG files of ImageNet's typical 500 x 375 pixels, of two classes, in folder/train/."""
    images = F.interpolate(synthetic(files, 5).images.float(), (375, 500), mode="bicubic")
    for i, image in enumerate(images.clamp(0, 255).byte()):
        path = Path(folder, "train", f"class{i % 2}", f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        transforms.functional.to_pil_image(image).save(path, quality=90)
    return folder


def imagenet(world, rounds, folder, batch):
    """Images per second at 224 pixels, as a dict: loading by torchvision's ImageFolder and by this program;
    both pairs' step with images in memory, and from files. folder: holds train/CLASS/, or RunError."""
    device, workers = world.device, min(8, os.cpu_count() or 1)
    pipeline = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(*IMAGENET_PREPROCESSING[:2])])
    steps = max(4, min(16, 2 * workers))
    loads = max(steps, LOADED // batch)
    try:
        plain = datasets.ImageFolder(Path(folder, "train"), pipeline)
    except OSError as error:
        raise RunError(f"no folders of images in {folder}/train ({first_line(error)})") from None
    plain.samples = list(islice(cycle(plain.samples), loads * batch))       # few files are read again
    theirs = repeat(DataLoader(plain, batch, shuffle=True, num_workers=workers, persistent_workers=True))

    def resolved(teacher, student):
        flags = ["--teacher", teacher, "--student", student, "--zscore", "--batch-size", str(batch)]
        return train_imagenet.resolve(train_imagenet.main.make_context("", flags).params, world)[0]

    def decoded(epoch):
        loading.keys[:], _ = folder_keys(0, epoch, loads * batch, batch, 0, 0, 1, 1)
        return ((images, target) for images, _, target, _ in islice(loading.loader, loads))

    folders, recipe = Folders(plain.samples, [], "val", []), resolved(*IMAGENET[0])
    loading = train_imagenet.Batches(folders, recipe, None, world, workers, None)
    held = next(loading.epoch(0, 0))
    parts = {"loading": {"baseline": Part(chain.from_iterable(theirs), loads, lambda x, _: x.to(device)),
                         "this": Part(endless(loading, count()), loads)},
             "its workers alone, uint8": {"this": Part(chain.from_iterable(map(decoded, count())), loads)}}
    for pair in IMAGENET:
        name = f"step of {'-'.join(pair)}"
        teacher, _, learn = build(lambda n: create(n, 1000, TORCHVISION), resolved(*pair), world)
        teacher.batch = None
        # a run waits only once for the first batch of each worker
        files = Part(endless(loading, count(), loads - steps), steps, learn, min(workers, steps // 2))
        parts |= {f"{name}, images in memory": {"this": Part(repeat(held), 4, learn)},
                  f"{name}, from JPEG files": {"this": files}}
    rates, name = measure(parts, rounds, device), f"224 pixels, batch {batch}, {workers} workers"
    return {"experiment": name, "rates": rates, "notes": limits(rates)}


def plain_crd(method, s, t, target, index):
    """CRD's loss as the field has it: of index (B, 1 + K), drawn in the loader; the banks' rows are gathered,
    the normalisation constants are read in every step."""
    x, y = method.embed_s(s.pooled), method.embed_t(t.pooled)
    x, y = (v / v.square().sum(1, keepdim=True).sqrt() for v in (x, y))
    loss, n = 0, len(method.bank_s)
    for v, bank, z in ((x, method.bank_t, method.z_s), (y, method.bank_s, method.z_t)):
        rows = bank.index_select(0, index.flatten()).view(*index.shape, -1)
        scores = (torch.bmm(rows, v[:, :, None])[:, :, 0] / method.TEMPERATURE).exp()
        if z.item() < 0:
            z.fill_(scores.mean().item() * n)
        loss = loss + nce_loss(scores / z.item(), n)
    method._remember(index[:, 0], x, y)
    return loss


def plain_rkd(method, s, t, target, index):
    """RKD's loss as the field has it: distances by the expanded square, their mean by a boolean mask."""
    def relations(x):
        square = x.square().sum(1)
        d = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt().clone().fill_diagonal_(0)
        e = F.normalize(x[None] - x[:, None], dim=2)
        return d / d[d > 0].mean(), torch.bmm(e, e.transpose(1, 2)).flatten()

    with torch.no_grad():
        d_teacher, a_teacher = relations(t.pooled)
    d, a = relations(s.pooled)
    return 25 * F.smooth_l1_loss(d, d_teacher) + 50 * F.smooth_l1_loss(a, a_teacher)


PLAIN = {"crd": plain_crd, "rkd": plain_rkd}        # the others' operations are the field's


def contrasts(others, items):
    """A loading worker's (B, 1 + K): images, and negatives of each. others: a class's images to draw from."""
    drawn = [np.append(i, np.random.choice(others[i % 100], CRD.NEGATIVES, replace=False)) for i in items]
    return torch.from_numpy(np.stack(drawn))


def feature_part(feature, column, world):
    """The Part of a feature method's whole steps, of images in memory; image i is of class i % 100."""
    device, plain, workers = world.device, column == "baseline", min(8, os.cpu_count() or 1)
    recipe = recipe_of(f"{PAIR}-none", device, column, feature)
    torch.manual_seed(0)
    learn = build(create_model, recipe, world, plain)[2]
    size, steps = recipe["batch_size"], 32 if device.type == "cuda" else 1
    images, index = torch.randn(size, 3, 32, 32, device=device), torch.arange(size, device=device)
    images = images.to(memory_format=torch.contiguous_format if plain else torch.channels_last)
    if not plain or feature != "crd":
        return Part(repeat(([images], index % 100, index)), steps, learn)
    others = [np.flatnonzero(np.arange(IMAGES) % 100 != c) for c in range(100)]
    loader = DataLoader(range(IMAGES), size, True, drop_last=True, num_workers=workers, prefetch_factor=1,
                        persistent_workers=True, collate_fn=partial(contrasts, others))
    drawn = (x.to(device) for x in chain.from_iterable(repeat(loader)))
    batches = (([images], x[:, 0] % 100, x) for x in drawn)
    return Part(batches, workers + steps, learn, workers)       # a batch of each was ready before


def features(world, rounds, compile):
    """Images per second of each feature method's whole steps, as a dict; the teacher sees every batch."""
    rates = {}
    for feature, name in recipes.FEATURE_NAMES.items():
        if compile:
            torch._dynamo.reset()       # its limit is of all variants together
        parts = {c: feature_part(feature, c, world) for c in ["baseline", "this", "compiled"][:2 + compile]}
        rates |= measure({name: parts}, rounds, world.device)
    return {"experiment": f"{PAIR}, a whole step", "rates": rates, "notes": [
        f"images are in memory; CRD's baseline draws in {min(8, os.cpu_count() or 1)} loading workers"]}


def tokens(words, n, plain, device):
    """(tokens per second, peak MiB beside operands and gradients) of KD+Z's two passes, in a new process."""
    cli.tune_malloc(2**20)      # or fragments of the C library's heap are counted
    student, teacher = ([torch.randn(rows, HIDDEN, device=device) for rows in (n, words)] for _ in range(2))
    for x in student:
        x.requires_grad_().grad = torch.zeros_like(x)
    before, begun = cli.peak_memory(torch.device(device)), time.perf_counter()
    if plain:
        kd_loss(student[0] @ student[1].mT, teacher[0] @ teacher[1].mT, 0.5).backward()
    else:
        linear_kd_loss(*student, *teacher, 0.5).backward()
    getattr(torch, device).synchronize()
    return n / (time.perf_counter() - begun), cli.peak_memory(torch.device(device)) - before


def vocabulary(world):
    """KD+Z on tokens of two vocabularies: all logits at once, as far as they fit, and `linear_kd_loss`."""
    rates, notes = {}, []
    for words, n in product(VOCABULARIES, TOKENS):
        row = rates.setdefault(f"{words:,} words, {n:,} tokens", {})
        for column in ("baseline", "this")[n > TOKENS[0]:]:
            with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
                rate, memory = pool.submit(tokens, words, n, column == "baseline", world.device.type).result()
            row[column] = [rate]
            notes.append(f"{words:,} words, {n:,} tokens, {COLUMNS[column]}: {memory:,.0f} MiB")
    return {"experiment": f"KD+Z, hidden states of {HIDDEN}", "unit": "tokens/s", "rates": rates, "notes": [
        "Peak memory beside operands and their gradients:", *notes]}


def limits(rates):
    """A line for each pair: whether loading or the step limits, and the time of its 100 epochs."""
    rate, lines = {row: median(cells["this"]) for row, cells in rates.items()}, []
    for name in map("-".join, IMAGENET):
        what = "loading" if rate["loading"] < rate[f"step of {name}, images in memory"] else "the step"
        spent = cli.duration(100 * 1_281_167 / rate[f"step of {name}, from JPEG files"])
        lines.append(f"{name}: {what} limits; 100 epochs of 1,281,167 images: {spent}, evaluation aside")
    return lines


def table(result):
    """Markdown: images per second, median (lowest to highest); for this program the medians of each round's
    ratios to the baselines and to the roofline; hours and peak memory where they are known; the notes."""
    columns = [c for c in COLUMNS if any(c in cells for cells in result["rates"].values())]

    def text(column, cells):
        values, others = cells[column], [c for c in ("workers", "baseline", "roofline") if c in cells]
        if column == "roofline":
            return f"{values[0]:,.0f}"
        ratios = [f"{median(a / b for a, b in zip(values, cells[c])):.2f}" for c in others]
        shown = f", x {' / '.join(ratios)}" if ratios and column in ("this", "compiled") else ""
        return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f}){shown}"

    unit = result.get("unit", "images/s")
    rows = {f"{result['experiment']}, {unit}": COLUMNS, "---": dict.fromkeys(columns, "---")}
    rows |= {row: {c: text(c, cells) for c in cells} for row, cells in result["rates"].items()}
    if "hours" in result:
        spent = {c: cli.duration(3600 * h) for c, h in result["hours"].items()}
        rows[f"{result['epochs']} epochs, projected"] = spent
        rows["peak memory"] = {c: f"{m:,.0f} MiB" for c, m in result["peak_mib"].items() if m}
    lines = [f"| {' | '.join([row, *(cells.get(c, '') for c in columns)])} |" for row, cells in rows.items()]
    return "\n".join([*lines, "", *result["notes"]])


@click.command(cls=cli.Command, help=__doc__)
@click.option("--only", type=cli.Choice(ALL), multiple=True, help="May be repeated.")
@click.option("--rounds", type=cli.COUNT, default=7, show_default=True, help="Turns of each part.")
@click.option("--compile/--no-compile", default=False, help="torch.compile too; a minute more for each.")
@click.option("--device", type=cli.Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]")
@click.option("--json", "file", type=cli.UserPath(dir_okay=False, writable=True),
              help="Every round's numbers.")
@click.option("--image-dir", type=cli.UserPath(file_okay=False, exists=True),
              help="Holds train/CLASS/.  [default: JPEG files are made]")
@click.option("--imagenet-batch", type=cli.COUNT, help="Images a step.  [default: 512 on cuda, else 16]")
def main(only, rounds, compile, device, file, image_dir, imagenet_batch):
    world, results = train_cifar.prepared({"device": device, "deterministic": False, "compile": compile,
                                           "precision": None}), []
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    facts, cuda = collect_facts(world.device) | {"rounds": rounds}, world.device.type == "cuda"
    click.echo(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
               f"Python {facts['python']}\n{rounds} rounds; x: ratios to the baselines and the roofline")
    if cuda and torch.cuda.get_device_capability() >= (8, 0):
        click.echo("the baseline's float32 convolutions are TF32, PyTorch's default")
    for name in only or ALL[:-2]:
        if name in EXPERIMENTS:
            results.append(experiment(name, world, rounds, compile))
        elif name == "features":
            results.append(features(world, rounds, compile))
        elif name == "vocabulary":
            results.append(vocabulary(world))
        else:
            with tempfile.TemporaryDirectory() as made:
                images, batch = image_dir or jpeg_folder(made), imagenet_batch or (512 if cuda else 16)
                try:
                    results.append(imagenet(world, rounds, images, batch))
                except torch.OutOfMemoryError:
                    raise RunError("the device's memory is full: give a smaller --imagenet-batch") from None
        click.echo("\n" + table(results[-1]))
        if file:
            Path(file).write_text(json.dumps(rounded({"facts": facts, "results": results}), indent=2))


if __name__ == "__main__":
    main()
