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
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "svg.fonttype": "none", "svg.hashsalt": "figures", "savefig.dpi": 200}  # equal pictures, equal files
TOY = {"teacher": (1.0, 5.0, 6.0), "student 1": (1.0, 5.9, 5.6), "student 2": (0.125, 0.625, 0.75)}


def panels(width, height, *grid, **options):
    """(figure, axes): inches, and matplotlib's subplots."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*grid, **options)


def save(figure, out, name, numbers=None):
    """The figure as out/NAME.png and .svg; numbers, if any, as out/NAME.json."""
    with runs.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        if numbers:
            (out / f"{name}.json").write_text(json.dumps(runs.rounded(numbers)) + "\n")
        figure.savefig(out / f"{name}.png")
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    click.echo(f"{out / name}.png and .svg")


# ---------------------------------------------------------------- the paper's toy case


def toy(flags):
    """A wrong student near the teacher's logits, a right one of an eighth of their range (paper, fig. 2)."""
    logits = {name: torch.tensor([values], dtype=torch.float64) for name, values in TOY.items()}
    losses = {name: (kd_loss(z, logits["teacher"], 1.0, zscore=False).item(),
                     kd_loss(z, logits["teacher"], 1.0).item()) for name, z in logits.items()}
    figure, axes = panels(8, 3, 1, 3, width_ratios=(2, 1, 1))
    for i, (name, values) in enumerate(TOY.items()):
        places = [k + 0.27 * (i - 1) for k in range(3)]
        axes[0].bar(places, values, 0.25, label=f"{name}: class {logits[name].argmax()}", color=COLOURS[i])
        if name != "teacher":
            for panel, loss in zip(axes[1:], losses[name]):
                panel.bar_label(panel.bar(name, loss, 0.6, color=COLOURS[i]), fmt="%.2f")
    axes[0].set(xticks=range(3), ylim=(0, 9), xlabel="class", ylabel="logit", title="logits, predicted class")
    axes[0].legend(frameon=False)
    for panel, title in zip(axes[1:], ("plain logits", "standardized logits")):
        panel.set(ylabel="KL(teacher || student), nats", title=title)
    save(figure, flags["out"], "toy", losses)


# ---------------------------------------------------------------- from results/


def budget_of(record):
    """Runs of one budget are compared: (full length, epochs, training images, data)."""
    recipe, full = record["recipe"], record["full_length"]
    return full, 0 if full else record["epochs"], recipe["train_images"] or 50_000, recipe["data"]


def records_of(flags):
    """({method: its records by seed}, title) of a pair and its student from scratch, of one budget."""
    teacher, student = flags["pair"].split("-")
    records = [json.loads(path.read_text()) | {"name": path.stem} for path in flags["results"].glob("*.json")]
    records = [r for r in records if r["student"] == student and r["teacher"] in (teacher, None)]
    taught = [r for r in records if r["teacher"]]
    if not taught:
        raise RunError(f"{flags['results']} holds no row of {flags['pair']}; python reproduce.py --pairs "
                       f"{flags['pair']} makes them")
    budget = max(map(budget_of, taught))
    groups, teachers = {}, set()
    for r in sorted(records, key=lambda r: r["seed"]):
        if budget_of(r) == budget:
            groups.setdefault(r["method"], []).append(r)
            if r["teacher"]:
                teachers.add(r["recipe"].get("teacher_sha256"))
    if len(teachers) > 1:
        raise RunError(f"the rows of {flags['pair']} were taught by different teachers and are not compared")
    full, epochs, images, _ = budget
    length = "full length" if full else f"{epochs} epochs on {images:,} images"
    return groups, f"{teacher} → {student}, {length}"


def log_of(record, results):
    """A record's test accuracies and training cross-entropies, (2, epochs).

    MLKD's cross-entropy, a sum over two views in the log, is halved.
    """
    with gzip.open(results / "logs" / f"{record['name']}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    views = 2 if record["method"].startswith("mlkd") else 1
    return [[row["test_top1"] for row in rows], [row["ce"] / views for row in rows]]


def curves(flags):
    """Test accuracy and training cross-entropy by epoch: the mean and the range of a method's seeds."""
    groups, title = records_of(flags)
    figure, axes = panels(8, 3.4, 1, 2)
    numbers = {}
    for method in flags["methods"].split(","):
        if method not in groups:
            continue
        i, name = len(numbers), f"{recipes.display_name(method)} (n = {len(groups[method])})"
        logs = torch.tensor([log_of(record, flags["results"]) for record in groups[method]])
        numbers[name] = logs.tolist()
        epochs = range(1, logs.shape[2] + 1)
        for panel, values in zip(axes, logs.unbind(1)):
            panel.plot(epochs, values.mean(0), ("-", "--", "-.", ":")[i % 4], color=COLOURS[i % 8],
                       marker="osD^vPX*"[i % 8], markersize=3, markevery=max(1, len(epochs) // 12),
                       label=name)
            panel.fill_between(epochs, values.amin(0), values.amax(0), color=COLOURS[i % 8], alpha=0.2,
                               linewidth=0)
    if not numbers:
        raise RunError(f"no row of {flags['pair']} has one of the methods {flags['methods']}")
    axes[0].set(xlabel="epoch", ylabel="top-1 on the test split, %")
    axes[1].set(xlabel="epoch", ylabel="cross-entropy in training, nats")
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    save(figure, flags["out"], "curves", numbers)


# ---------------------------------------------------------------- from checkpoints


@torch.no_grad()
def logits_of(flags):
    """{"teacher", "plain", "zscore"} to logits (N, K), float32 on the CPU, and to titles; targets (N,)."""
    teacher, student = flags["pair"].split("-")
    device = cli.pick_device(flags["device"])
    cli.set_backends(deterministic=False)
    split = load_data("cifar100", flags["data_dir"], device).test
    logits, titles = {}, {}
    for who in ("teacher", "plain", "zscore"):
        if who == "teacher":
            network, _ = open_checkpoint(flags["teacher_checkpoint"], teacher, prefer="teacher")
            titles[who] = f"teacher {teacher}"
        else:
            network, metadata = open_checkpoint(flags[who], student)
            if metadata.get("zscore") not in (None, who == "zscore"):
                how = "without" if who == "zscore" else "with"
                raise RunError(f"--{who} {flags[who]}: this student was distilled {how} --zscore")
            method = recipes.method_name({"method": "kd"} | metadata | {"zscore": who == "zscore"})
            titles[who] = f"{student}, {recipes.display_name(method)}"
        network.to(device)
        logits[who] = torch.cat([network(normalise(x)) for x in split.images.split(2000)]).cpu()
    return logits, titles, split.targets.cpu()


def histogram(flags, logits, titles, targets):
    """The bivariate histogram of each image's mean and standard deviation of logits."""
    points = {who: torch.stack([v.mean(1), v.std(1, correction=0)], 1) for who, v in logits.items()}
    everything = torch.cat(list(points.values()))
    lowest, highest = everything.amin(0).tolist(), everything.amax(0).tolist()
    means, deviations = (torch.linspace(lowest[i], highest[i], 61) for i in range(2))
    counts = {who: torch.histogramdd(x, [means, deviations]).hist for who, x in points.items()}
    scale = matplotlib.colors.LogNorm(1, max(x.max().item() for x in counts.values()))
    figure, axes = panels(8.4, 3.2, 1, 3, sharex=True, sharey=True)
    for panel, (who, count) in zip(axes, counts.items()):
        image = panel.pcolormesh(means.numpy(), deviations.numpy(), count.T.numpy(), cmap="cividis",
                                 norm=scale, rasterized=True)
        deviation = points[who][:, 1]
        panel.set(title=f"{titles[who]}:\ndeviation {deviation.mean():.2f} ± {deviation.std():.2f}")
        panel.set_xlabel("mean of an image's logits", loc="left")       # its power of ten is on the right
    axes[0].set_ylabel("standard deviation of an image's logits")
    axes[0].ticklabel_format(axis="x", scilimits=(-2, 3))
    axes[0].locator_params(axis="x", nbins=4)
    figure.colorbar(image, ax=axes, label="test images in a cell")
    save(figure, flags["out"], "logits")


def class_gaps(teacher, student, targets):
    """|teacher's - student's| logits (N, K), averaged over each class's images: (K, K), images by logits."""
    classes = teacher.shape[1]
    sums = torch.zeros(classes, classes).index_add_(0, targets, teacher - student)
    return (sums / targets.bincount(minlength=classes)[:, None]).abs()


def difference(flags, logits, titles, targets):
    """`class_gaps` of both students, before and after standardization."""
    figure, axes = panels(8, 7, 2, 2)
    standardized = {who: weighted_zscore(x) for who, x in logits.items()}
    for line, (what, z) in zip(axes, (("logits", logits), ("standardized logits", standardized))):
        maps = {who: class_gaps(z["teacher"], z[who], targets) for who in ("plain", "zscore")}
        highest = max(gaps.max().item() for gaps in maps.values())
        for panel, (who, gaps) in zip(line, maps.items()):
            image = panel.imshow(gaps.numpy(), cmap="cividis", vmin=0, vmax=highest)
            panel.set(title=f"{titles[who]}, {what}:\nmean {gaps.mean():.2f}, maximum {gaps.max():.2f}",
                      xlabel="logit of class", ylabel="images of class")
        figure.colorbar(image, ax=line, label=f"|difference of means|, {what}")
    save(figure, flags["out"], "difference")


# what each picture needs
NEEDS = {"toy": (), "curves": ("pair",), "logits": ("pair", "teacher_checkpoint", "plain", "zscore"),
         "difference": ("pair", "teacher_checkpoint", "plain", "zscore")}


@click.command(cls=cli.Command, help=__doc__)
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(NEEDS)),
                metavar=f"[{'|'.join(NEEDS)}]...")
@click.option("--pair", metavar="T-S", help="TEACHER-STUDENT.")
@click.option("--methods", metavar="M,...", default="none,kd,kd-z,dkd,dkd-z", show_default=True,
              help="curves: methods, as in results/.")
@click.option("--results", metavar="DIR", default=ROOT / "results", type=cli.UserPath(path_type=Path),
              help="curves: records.  [default: results/ here]")
@click.option("--teacher-checkpoint", type=cli.PATH, metavar="FILE", help="logits, difference: the teacher.")
@click.option("--plain", type=cli.PATH, metavar="FILE", help="student.pt of a run without --zscore.")
@click.option("--zscore", type=cli.PATH, metavar="FILE", help="student.pt of a run with --zscore.")
@click.option("--data-dir", type=cli.PATH, metavar="DIR", default="data", show_default=True,
              help="logits, difference: folder of cifar-100-python.")
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]")
@click.option("--out", metavar="DIR", default=ROOT / "figures", type=cli.UserPath(path_type=Path),
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
    with cli.friendly_errors(), matplotlib.rc_context(STYLE):
        if "toy" in names:
            toy(flags)
        if "curves" in names:
            curves(flags)
        if "logits" in names or "difference" in names:
            networks = logits_of(flags)
            if "logits" in names:
                histogram(flags, *networks)
            if "difference" in names:
                difference(flags, *networks)


if __name__ == "__main__":
    main()
