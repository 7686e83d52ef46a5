"""The paper's pictures, from this project's own runs: PNG and SVG, the numbers beside them as CSV.

\b
  python figures.py toy                                          KL against prediction; needs nothing
  python figures.py curves gap --pair resnet56-resnet8           from results/, which reproduce.py writes
  python figures.py logits difference --pair resnet56-resnet8 \\
      --teacher-checkpoint FILE --plain FILE --zscore FILE       students (student.pt), on the test images
  python figures.py grid --pair resnet56-resnet8 --runs DIR      accuracy over temperature and weight

Without names: all that the flags allow. Colours are those of Okabe and Ito, and cividis.
"""

import csv
import gzip
import io
import json
from pathlib import Path
from statistics import mean, stdev

import click
import torch

import cli
import recipes
import run as runs
from checkpoints import metadata_of, read_checkpoint
from data import CIFAR100_CLASSES, load_data, normalise
from models import MODELS, create_model
from run import RunError
from teacher import load_teacher
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
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
TOY = {"teacher": (1.0, 5.0, 6.0), "student 1": (1.0, 5.9, 5.6), "student 2": (0.125, 0.625, 0.75)}


def panels(width, height, *grid, **more):
    """(figure, axes): inches, and matplotlib's subplots."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*grid, **more)


def save(figure, flags, name, rows):
    """figure as out/NAME.png and .svg; rows, a list of dicts, as out/NAME.csv."""
    out, text = flags["out"], io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs.rounded(rows))
    with runs.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.csv").write_text(text.getvalue())
        figure.savefig(out / f"{name}.png")
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    click.echo(f"{out / name}.png, .svg and .csv")


def label(method, n):
    return f"{recipes.display_name(method)} (n = {n})"


def toy(flags):
    """A wrong student near the teacher's logits, a right one of an eighth of their range (paper, fig. 2)."""
    logits = {name: torch.tensor([values], dtype=torch.float64) for name, values in TOY.items()}
    rows = [{"network": name, **{f"logit_{k}": v for k, v in enumerate(TOY[name])},
             "predicts": z.argmax().item(), "kl": kd_loss(z, logits["teacher"], 1.0, zscore=False).item(),
             "kl_zscore": kd_loss(z, logits["teacher"], 1.0).item()} for name, z in logits.items()]
    figure, axes = panels(8, 3, 1, 3, width_ratios=(2, 1, 1))
    for i, row in enumerate(rows):
        look = {"color": COLOURS[i], "hatch": ("", "//", "..")[i], "edgecolor": "white"}
        places = [k + 0.27 * (i - 1) for k in range(3)]
        name = row["network"]
        axes[0].bar(places, TOY[name], 0.25, label=f"{name}: class {row['predicts']}", **look)
        for panel, key in zip(axes[1:], ("kl", "kl_zscore")):
            if i:
                panel.bar_label(panel.bar(name, row[key], 0.6, **look), fmt="%.2f")
    axes[0].set(xticks=range(3), xlabel="class", ylabel="logit", title="logits and predicted class")
    axes[0].legend(frameon=False)
    for panel, title in zip(axes[1:], ("plain logits", "standardized logits")):
        panel.set(ylabel="KL(teacher || student), nats", title=title)
    save(figure, flags, "toy", rows)


def records_of(flags):
    """({method: its records by seed}, title), of the pair and its student alone: of the longest budget in
    results/, real images first."""
    teacher, student = flags["pair"].split("-")
    found = {}
    for path in sorted(flags["results"].glob("*.json")):
        record = json.loads(path.read_text())
        if record["student"] == student and record["teacher"] in (teacher, None):
            data, images = (record["recipe"][k] for k in ("data", "train_images"))
            full = record["full_length"]
            budget = data == "cifar100", full, 0 if full else record["epochs"], images or 50_000, data
            found.setdefault(budget, []).append(record | {"name": path.stem})
    budget = max((b for b, group in found.items() if any(r["teacher"] for r in group)), default=None)
    if not budget:
        raise RunError(f"{flags['results']} holds no row of {flags['pair']}; python reproduce.py --pairs "
                       f"{flags['pair']} makes them")
    if len({r["recipe"].get("teacher_sha256") for r in found[budget] if r["teacher"]}) > 1:
        raise RunError(f"the rows of {flags['pair']} were taught by different teachers and are not compared")
    groups = {}
    place = {name: i for i, name in enumerate(recipes.NAMES)}
    for r in sorted(found[budget], key=lambda r: (place.get(r["method"], len(place)), r["seed"])):
        groups.setdefault(r["method"], []).append(r)
    real, full, epochs, images, data = budget
    length = "full length" if full else f"{epochs} epochs on {images:,} images"
    return groups, f"{teacher} → {student}, {length}" + ("" if real else f" of {data}")


def curves(flags):
    """Test accuracy and training cross-entropy by epoch: the mean of a method's seeds, lowest and highest as
    a band. MLKD's cross-entropy, a sum over two views in the log, is halved."""
    groups, title = records_of(flags)
    groups = {method: group for method, group in groups.items() if method in flags["methods"].split(",")}
    if not groups:
        raise RunError(f"no row of {flags['pair']} has one of the methods {flags['methods']}")
    figure, axes = panels(8, 3.4, 1, 2)
    rows = []
    for i, (method, group) in enumerate(groups.items()):
        epochs = {}
        for record in group:
            with gzip.open(flags["results"] / "logs" / f"{record['name']}.jsonl.gz", "rt") as file:
                for row in map(json.loads, file):
                    point = {"test_top1": row["test_top1"], "ce": row["ce"] / (1 + method.startswith("mlkd"))}
                    epochs.setdefault(row["epoch"], []).append(point)
                    rows.append({"method": method, "seed": record["seed"], "epoch": row["epoch"], **point})
        for panel, key in zip(axes, ("test_top1", "ce")):
            values = [[point[key] for point in points] for points in epochs.values()]
            low, middle, high = ([f(v) for v in values] for f in (min, mean, max))
            panel.plot(list(epochs), middle, LINES[i % 4], color=COLOURS[i % 8], marker=MARKERS[i % 8],
                       markersize=3, markevery=max(1, len(epochs) // 12), label=label(method, len(group)))
            panel.fill_between(list(epochs), low, high, color=COLOURS[i % 8], alpha=0.2, linewidth=0)
    axes[0].set(xlabel="epoch", ylabel="top-1 on the test split, %")
    axes[1].set(xlabel="epoch", ylabel="cross-entropy in training, nats")
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=9)
    save(figure, flags, "curves", rows)


def gap(flags):
    """Teacher's accuracy less the student's last epoch, per method."""
    groups, title = records_of(flags)
    teacher = next(r["teacher_top1"] for group in groups.values() for r in group if r["teacher"])
    figure, axes = panels(6, 0.3 * len(groups) + 1.2)
    rows = []
    for i, (method, group) in enumerate(groups.items()):
        values = [teacher - r["last"]["top1"] for r in group]
        row = {"method": method, "gap": mean(values), "std": stdev(values) if len(values) > 1 else None,
               "n": len(values)}
        z = "-z" in method
        axes.errorbar(row["gap"], i, xerr=row["std"], fmt="D" if z else "o", color=COLOURS[z], capsize=3)
        text = f"{row['gap']:.2f}" + (f" ± {row['std']:.2f}" if len(values) > 1 else "")
        axes.annotate(text, (row["gap"], i), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        rows.append(row)
    axes.set(yticks=range(len(rows)), yticklabels=[label(r["method"], r["n"]) for r in rows], title=title,
             ylim=(len(rows) - 0.3, -0.8),
             xlabel=f"teacher's top-1 ({teacher:.2f} %) less the student's last epoch's, points\n"
                    "(diamonds: standardized; bars: ± 1 standard deviation over n seeds)")
    axes.grid(axis="x", alpha=0.3)
    save(figure, flags, "gap", rows)


def logits_of(flags):
    """{"teacher", "plain", "zscore"} to logits (N, K), float32 on the CPU, and to titles; targets (N,)."""
    teacher, student = flags["pair"].split("-")
    device = cli.pick_device(flags["device"])
    cli.set_backends(deterministic=False)
    split = load_data("cifar100", flags["data_dir"], device).test
    logits, titles = {}, {}
    for who in ("teacher", "plain", "zscore"):
        name, path = (teacher, flags["teacher_checkpoint"]) if who == "teacher" else (student, flags[who])
        facts = metadata_of(read_checkpoint(path, name))
        run = {"method": "kd"} | facts | {"zscore": who == "zscore"}
        said, method = facts.get("zscore"), recipes.display_name(recipes.method_name(run))
        if who != "teacher" and said not in (None, who == "zscore"):
            how = "with" if said else "without"
            raise RunError(f"--{who} {path}: this student was distilled {how} --zscore")
        titles[who] = f"teacher {name}" if who == "teacher" else f"{name}, {method}"
        prefer = "teacher" if who == "teacher" else "student"
        network = load_teacher(create_model(name), path, device, prefer=prefer)
        logits[who] = torch.cat([network.logits(normalise(x)) for x in split.images.split(2000)]).cpu()
    return logits, titles, split.targets.cpu()


def histogram(flags, logits, titles, targets):
    """The bivariate histogram of each image's mean and standard deviation of logits."""
    points = {who: torch.stack([v.mean(1), v.std(1, correction=0)], 1) for who, v in logits.items()}
    low, high = (f(torch.cat(list(points.values())), 0).tolist() for f in (torch.amin, torch.amax))
    edges = [torch.linspace(*ends, 61) for ends in zip(low, high)]
    counts = {who: torch.histogramdd(x, edges).hist for who, x in points.items()}
    scale = matplotlib.colors.LogNorm(1, max(x.max().item() for x in counts.values()))
    figure, axes = panels(8.4, 3.2, 1, 3, sharex=True, sharey=True)
    for panel, (who, count) in zip(axes, counts.items()):
        image = panel.pcolormesh(*(e.numpy() for e in edges), count.T.numpy(), cmap="cividis", norm=scale,
                                 rasterized=True)
        deviation = points[who][:, 1]
        panel.set(title=f"{titles[who]}:\ndeviation {deviation.mean():.2f} ± {deviation.std():.2f}")
        panel.set_xlabel("mean of an image's logits", loc="left")       # its power of ten stands on the right
    axes[0].set_ylabel("standard deviation of an image's logits")
    axes[0].ticklabel_format(axis="x", scilimits=(-2, 3))
    axes[0].locator_params(axis="x", nbins=4)
    figure.colorbar(image, ax=axes, label="test images in a cell")
    save(figure, flags, "logits", [
        {"network": who, "mean_from": edges[0][i].item(), "mean_to": edges[0][i + 1].item(),
         "deviation_from": edges[1][j].item(), "deviation_to": edges[1][j + 1].item(),
         "images": int(count[i, j])}
        for who, count in counts.items() for i, j in count.nonzero().tolist()])


def difference(flags, logits, titles, targets):
    """|teacher's - student's| logits, each averaged over a class's images, before and after standardization.
    All classes count, an image's own (the diagonal) too."""
    classes = logits["teacher"].shape[1]
    counts = torch.bincount(targets, minlength=classes)[:, None]
    figure, axes = panels(8, 7, 2, 2)
    rows = []
    for line, (what, shown) in zip(axes, (("logits", lambda x: x), ("standardized logits", weighted_zscore))):
        gaps = {who: shown(logits["teacher"]) - shown(logits[who]) for who in ("plain", "zscore")}
        maps = {who: (torch.zeros(classes, classes).index_add_(0, targets, x) / counts).abs()
                for who, x in gaps.items()}
        highest = max(x.max().item() for x in maps.values())
        for panel, (who, values) in zip(line, maps.items()):
            image = panel.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=highest)
            panel.set(title=f"{titles[who]}, {what}:\nmean {values.mean():.2f}, maximum {values.max():.2f}",
                      xlabel="logit of class", ylabel="images of class")
            rows += [{"logits": what, "student": who, "images_of": name,
                      **{c: round(v, 3) for c, v in zip(CIFAR100_CLASSES, row)}}
                     for name, row in zip(CIFAR100_CLASSES, values.tolist())]
        figure.colorbar(image, ax=line, label=f"|difference of means|, {what}")
    save(figure, flags, "difference", rows)


def grid(flags):
    """KD's accuracy over temperature and weight on held-out training images; of the recipe with most runs."""
    teacher, student = flags["pair"].split("-")
    found = {}
    for path in sorted(flags["runs"].rglob("result.json")):
        recipe = json.loads(path.with_name("config.json").read_text())["recipe"]
        result = json.loads(path.read_text())
        pair = [recipe[k] for k in ("teacher", "student", "method")] == [teacher, student, "kd"]
        if pair and recipe["val_from_train"]:
            cell = recipe["base_temp"], recipe["kd_weight"]
            same = json.dumps(recipe | {"base_temp": 0, "kd_weight": 0, "seed": 0}, sort_keys=True)
            found.setdefault(same, {}).setdefault(cell, []).append(result["last"]["top1"])
    if not found:
        raise RunError(f"{flags['runs']} holds no finished run of {flags['pair']} with --val-from-train; "
                       "temperature and weight are not chosen on the test split")
    same, cells = max(found.items(), key=lambda item: len(item[1]))
    facts, z = json.loads(same), "+Z" * json.loads(same)["zscore"]
    temps, weights = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = [[mean(cells.get((t, w), [float("nan")])) for w in weights] for t in temps]
    figure, axes = panels(max(3.6, 1.2 + 0.9 * len(weights)), 1.6 + 0.6 * len(temps))
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for (t, w), cell in cells.items():
        axes.text(weights.index(w), temps.index(t), f"{mean(cell):.1f}", ha="center", va="center",
                  color="black" if mean(cell) > middle else "white")
    images = facts["train_images"] or 50_000 - facts["val_from_train"]
    axes.set(xticks=range(len(weights)), xticklabels=[f"{w:g}" for w in weights], yticks=range(len(temps)),
             yticklabels=[f"{t:g}" for t in temps], xlabel="weight of KD",
             ylabel="base temperature" if z else "temperature",
             title=f"{teacher} → {student}, KD{z},\n{facts['epochs']} epochs on {images:,} images")
    figure.colorbar(image, label=f"top-1 on {facts['val_from_train']:,} held-out\ntraining images, %")
    save(figure, flags, "grid", [{"base_temp": t, "kd_weight": w, "top1": mean(v), "n": len(v)}
                                 for (t, w), v in sorted(cells.items())])


CHECKPOINTS = "pair", "teacher_checkpoint", "plain", "zscore"
FIGURES = {"toy": (toy, ()), "curves": (curves, ("pair",)), "gap": (gap, ("pair",)),     # and what they need
           "grid": (grid, ("pair", "runs")), "logits": (histogram, CHECKPOINTS),
           "difference": (difference, CHECKPOINTS)}


@click.command(cls=cli.Command, help=__doc__)
@click.argument("names", nargs=-1, type=cli.Choice(list(FIGURES)), metavar=f"[{'|'.join(FIGURES)}]...")
@click.option("--pair", metavar="T-S", help="TEACHER-STUDENT.")
@click.option("--methods", metavar="M,...", default="none,kd,kd-z,dkd,dkd-z", show_default=True,
              help="Of the curves.")
@click.option("--results", metavar="DIR", default=ROOT / "results", type=cli.UserPath(path_type=Path),
              help="[default: results/ here]")
@click.option("--runs", metavar="DIR", type=cli.UserPath(path_type=Path),
              help="Of runs with --val-from-train.")
@click.option("--teacher-checkpoint", type=cli.PATH, metavar="FILE", help="The teacher's weights.")
@click.option("--plain", type=cli.PATH, metavar="FILE", help="student.pt of a run without --zscore.")
@click.option("--zscore", type=cli.PATH, metavar="FILE", help="student.pt of a run with --zscore.")
@click.option("--data-dir", type=cli.PATH, metavar="DIR", default="data", show_default=True,
              help="Of cifar-100-python.")
@click.option("--device", type=cli.Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]")
@click.option("--out", metavar="DIR", default=ROOT / "figures", type=cli.UserPath(path_type=Path),
              help="[default: figures/ here]")
def main(names, **flags):
    if matplotlib is None:
        raise RunError("the pictures need matplotlib: pip install matplotlib")
    if flags["pair"] is not None:
        if flags["pair"].count("-") != 1:
            raise click.UsageError(f"--pair {flags['pair']}: it is TEACHER-STUDENT, for instance "
                                   "resnet32x4-resnet8x4")
        for network in flags["pair"].split("-"):
            cli.check_name("--pair", network, list(MODELS))
    missing = {name: [f"--{k.replace('_', '-')}" for k in needs if flags[k] is None]
               for name, (_, needs) in FIGURES.items()}
    for name in names:
        if missing[name]:
            raise click.UsageError(f"{name} needs {', '.join(missing[name])}")
    known = None
    try:
        with matplotlib.rc_context(STYLE):
            for name, (draw, needs) in FIGURES.items():
                if name in names or not names and not missing[name]:
                    known = known or (logits_of(flags) if needs == CHECKPOINTS else None)
                    draw(flags, *(known if needs == CHECKPOINTS else ()))
    except (ValueError, OSError, EOFError, TypeError) as error:     # of files that are not what they seem
        raise RunError(runs.first_line(error)) from None
    except KeyError as error:
        raise RunError(f"a result or a run has no {error}: it is not of this program, or of an older "
                       "one") from None


if __name__ == "__main__":
    main()
