"""The papers' pictures, from this project's own runs, as PNG and SVG.

\b
  python figures.py toy                                          KL and prediction disagree; needs nothing
  python figures.py curves --pair resnet56-resnet8               from results/, which reproduce.py writes
  python figures.py logits difference --pair resnet56-resnet8 \\
      --teacher-checkpoint FILE --plain FILE --zscore FILE       students (student.pt), on the test images

Colours are those of Okabe and Ito, and cividis.
"""

import gzip
import json
from pathlib import Path

import click
import torch

import cli
import recipes
import run as runs
from checkpoints import open_checkpoint
from data import load_data, normalise
from run import RunError
from zscore_kd import kd_loss, weighted_zscore

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:     # said in one line when a picture is asked for
    matplotlib = None

ROOT = Path(__file__).resolve().parent
CYCLE = ("cycler(color=['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', 'k', '#F0E442'], "
         "marker=['o', 's', 'D', '^', 'v', 'P', 'X', '*'], "
         "linestyle=['-', '--', '-.', ':', '-', '--', '-.', ':'])")
STYLE = {
    "axes.prop_cycle": CYCLE,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 9,
    "font.size": 9,
    "image.cmap": "cividis",
    "legend.frameon": False,
    "lines.markersize": 3,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "figures",      # equal pictures, equal files
}
CHECKPOINTS = "pair", "teacher_checkpoint", "plain", "zscore"
NEEDS = {"toy": (), "curves": ("pair",), "logits": CHECKPOINTS, "difference": CHECKPOINTS}


def panels(width, height, rows, columns, **options):
    """(figure, axes); width and height in inches."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **options)


def save(figure, out, name):
    with runs.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / f"{name}.png")
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    click.echo(f"{out / name}.png and .svg")


# ---------------------------------------------------------------- the paper's toy case


TOY = {"teacher": (1.0, 5.0, 6.0), "student 1": (1.0, 5.9, 5.6), "student 2": (0.125, 0.625, 0.75)}


def toy(out):
    """A wrong student near the teacher's logits, a right one of an eighth of their range (paper, fig. 2).

    Returns the students' losses, {"plain logits", "standardized logits"} to (2,).
    """
    figure, axes = panels(8, 3, 1, 3, width_ratios=(2, 1, 1))
    logits = torch.tensor(list(TOY.values()), dtype=torch.float64)
    for i, name in enumerate(TOY):
        classes = torch.arange(3) + 0.27 * (i - 1)
        label = f"{name}: class {logits[i].argmax()}"
        axes[0].bar(classes, logits[i], 0.25, label=label)
    axes[0].set(xticks=range(3), ylim=(0, 9), xlabel="class", ylabel="logit", title="logits, predicted class")
    axes[0].legend()
    students = logits[1:]
    teacher = logits[:1].expand(2, 3)
    losses = {
        "plain logits": kd_loss(students, teacher, 1.0, zscore=False, reduction="none"),
        "standardized logits": kd_loss(students, teacher, 1.0, reduction="none"),
    }
    for panel, title in zip(axes[1:], losses):
        bars = panel.bar(["student 1", "student 2"], losses[title], 0.6, color=["C1", "C2"])
        panel.bar_label(bars, fmt="%.2f")
        panel.set(ylabel="KL(teacher || student), nats", title=title)
    save(figure, out, "toy")
    return losses


# ---------------------------------------------------------------- from results/


def budget_of(record):
    """Runs of one budget are compared: (full length, epochs, training images, data)."""
    recipe = record["recipe"]
    full = record["full_length"]
    epochs = 0 if full else record["epochs"]
    images = recipe["train_images"] or 50_000
    return full, epochs, images, recipe["data"]


def records_of(pair, methods, folder):
    """(records, title) of a pair and of its student from scratch, of one budget and one teacher."""
    teacher, student = pair.split("-")
    records = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        record["log"] = folder / "logs" / f"{path.stem}.jsonl.gz"
        of_pair = record["student"] == student and record["teacher"] in (teacher, None)
        if of_pair and record["method"] in methods:
            records.append(record)
    taught = [record for record in records if record["teacher"]]
    if not taught:
        raise RunError(f"{folder} has no distilled row of {pair} by {', '.join(methods)}; "
                       f"python reproduce.py --pairs {pair} makes some")
    budget = max(map(budget_of, taught))
    records = [record for record in records if budget_of(record) == budget]
    teachers = {record["recipe"].get("teacher_sha256") for record in records if record["teacher"]}
    if len(teachers) > 1:
        raise RunError(f"the rows of {pair} were taught by different teachers and are not compared")
    full, epochs, images, _ = budget
    length = "full length" if full else f"{epochs} epochs on {images:,} images"
    return records, f"{teacher} → {student}, {length}"


def log_of(record):
    """A record's test accuracies and training cross-entropies, (epochs, 2).

    MLKD's cross-entropy, a sum over two views in the log, is halved.
    """
    with gzip.open(record["log"], "rt") as file:
        rows = [json.loads(line) for line in file]
    views = 2 if record["method"].startswith("mlkd") else 1
    return torch.tensor([[row["test_top1"], row["ce"] / views] for row in rows])


def curves(flags):
    """Test accuracy and training cross-entropy by epoch: the mean and the range of a method's seeds.

    Returns {label: (seeds, epochs, 2)}.
    """
    methods = flags["methods"].split(",")
    records, title = records_of(flags["pair"], methods, flags["results"])
    figure, axes = panels(8, 3.4, 1, 2)
    drawn = {}
    for method in methods:
        logs = [log_of(record) for record in records if record["method"] == method]
        if not logs:
            continue
        label = f"{recipes.display_name(method)} (n = {len(logs)})"
        drawn[label] = torch.stack(logs)
        epochs = range(1, len(logs[0]) + 1)
        every = max(1, len(epochs) // 12)
        for panel, values in zip(axes, drawn[label].unbind(2)):
            panel.plot(epochs, values.mean(0), markevery=every, label=label)
            panel.fill_between(epochs, values.amin(0), values.amax(0), alpha=0.2, linewidth=0)
    axes[0].set(xlabel="epoch", ylabel="top-1 on the test split, %")
    axes[1].set(xlabel="epoch", ylabel="cross-entropy in training, nats")
    axes[0].legend()
    figure.suptitle(title)
    save(figure, flags["out"], "curves")
    return drawn


# ---------------------------------------------------------------- from checkpoints


def open_student(path, name, zscore):
    """(network, title). RunError where the file's metadata has the other `zscore`."""
    network, metadata = open_checkpoint(path, name)
    if metadata.get("zscore", zscore) != zscore:
        raise RunError(f"{path} is of a run with zscore={not zscore}: exchange --plain and --zscore")
    run = {"method": "kd"} | metadata | {"zscore": zscore}
    method = recipes.method_name(run)
    return network, f"{name}, {recipes.display_name(method)}"


@torch.no_grad()
def logits_of(flags):
    """Of the teacher and both students: logits (3, N, K), float32 on the CPU, and titles; targets (N,)."""
    teacher_name, student = flags["pair"].split("-")
    device = cli.pick_device(flags["device"])
    cli.set_backends(deterministic=False)
    split = load_data("cifar100", flags["data_dir"], device).test
    teacher, _ = open_checkpoint(flags["teacher_checkpoint"], teacher_name, prefer="teacher")
    plain, plain_title = open_student(flags["plain"], student, False)
    zscore, zscore_title = open_student(flags["zscore"], student, True)
    logits = []
    for network in (teacher, plain, zscore):
        network.to(device)
        chunks = [network(normalise(images)) for images in split.images.split(2000)]
        logits.append(torch.cat(chunks).cpu())
    titles = f"teacher {teacher_name}", plain_title, zscore_title
    return torch.stack(logits), titles, split.targets.cpu()


def histogram(logits, titles, out):
    """The bivariate histogram of each image's mean and standard deviation of logits."""
    means = logits.mean(2).numpy()
    deviations = logits.std(2, correction=0).numpy()
    limits = [(means.min(), means.max()), (deviations.min(), deviations.max())]
    figure, axes = panels(8.4, 3.2, 1, 3, sharex=True, sharey=True)
    norm = matplotlib.colors.LogNorm(1)
    highest = 0
    for panel, title, mean, deviation in zip(axes, titles, means, deviations):
        counts, _, _, image = panel.hist2d(mean, deviation, 60, range=limits, norm=norm,
                                              rasterized=True)
        highest = max(highest, counts.max())
        panel.set(title=f"{title}:\ndeviation {deviation.mean():.2f} ± {deviation.std():.2f}")
        panel.set_xlabel("mean of an image's logits", loc="left")       # its power of ten is on the right
    norm.vmax = highest
    axes[0].set_ylabel("standard deviation of an image's logits")
    axes[0].ticklabel_format(axis="x", scilimits=(-2, 3))
    axes[0].locator_params(axis="x", nbins=4)
    figure.colorbar(image, ax=axes, label="test images in a cell")
    save(figure, out, "logits")


def class_gaps(teacher, student, targets):
    """|teacher's - student's| logits (N, K), averaged over each class's images: (K, K), images by logits."""
    classes = teacher.shape[1]
    sums = torch.zeros(classes, classes).index_add_(0, targets, teacher - student)
    counts = targets.bincount(minlength=classes)
    means = sums / counts[:, None]
    return means.abs()


def difference(logits, titles, targets, out):
    """`class_gaps` of both students, before and after standardization."""
    figure, axes = panels(8, 7, 2, 2)
    kinds = {"logits": logits, "standardized logits": weighted_zscore(logits)}
    for line, (kind, (teacher, *students)) in zip(axes, kinds.items()):
        maps = [class_gaps(teacher, student, targets) for student in students]
        highest = torch.stack(maps).max()
        for panel, title, gaps in zip(line, titles[1:], maps):
            image = panel.imshow(gaps, vmin=0, vmax=highest)
            numbers = f"mean {gaps.mean():.2f}, maximum {gaps.max():.2f}"
            panel.set(title=f"{title}, {kind}:\n{numbers}", xlabel="logit of class", ylabel="images of class")
        figure.colorbar(image, ax=line, label=f"|difference of means|, {kind}")
    save(figure, out, "difference")


FOLDER = cli.UserPath(path_type=Path)


@click.command(cls=cli.Command, help=__doc__)
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(NEEDS)),
                metavar=f"[{'|'.join(NEEDS)}]...")
@click.option("--pair", metavar="T-S", help="TEACHER-STUDENT.")
@click.option("--methods", metavar="M,...", default="none,kd,kd-z,dkd,dkd-z", show_default=True,
              help="curves: methods, as in results/.")
@click.option("--results", metavar="DIR", default=ROOT / "results", type=FOLDER,
              help="curves: records.  [default: results/ here]")
@click.option("--teacher-checkpoint", type=cli.PATH, metavar="FILE", help="logits, difference: the teacher.")
@click.option("--plain", type=cli.PATH, metavar="FILE", help="student.pt of a run without --zscore.")
@click.option("--zscore", type=cli.PATH, metavar="FILE", help="student.pt of a run with --zscore.")
@click.option("--data-dir", type=cli.PATH, metavar="DIR", default="data", show_default=True,
              help="logits, difference: folder of cifar-100-python.")
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]")
@click.option("--out", metavar="DIR", default=ROOT / "figures", type=FOLDER,
              help="[default: figures/ here]")
def main(names, **flags):
    if matplotlib is None:
        raise RunError("the pictures need matplotlib: pip install matplotlib")
    if flags["pair"] is not None and flags["pair"].count("-") != 1:
        raise click.UsageError(f"--pair {flags['pair']}: give TEACHER-STUDENT, as resnet32x4-resnet8x4")
    for name in names:
        missing = [f"--{k.replace('_', '-')}" for k in NEEDS[name] if flags[k] is None]
        if missing:
            raise click.UsageError(f"{name} needs {', '.join(missing)}")
    out = flags["out"]
    with cli.friendly_errors(), matplotlib.rc_context(STYLE):
        if "toy" in names:
            toy(out)
        if "curves" in names:
            curves(flags)
        if "logits" in names or "difference" in names:
            logits, titles, targets = logits_of(flags)
        if "logits" in names:
            histogram(logits, titles, out)
        if "difference" in names:
            difference(logits, titles, targets, out)


if __name__ == "__main__":
    main()
