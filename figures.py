"""The paper's pictures, from this project's own runs: PNG and SVG, the numbers beside them as CSV.

\b
  python figures.py toy                                              KL against prediction; needs nothing
  python figures.py curves gap --pair resnet56-resnet8               from results/, which reproduce.py writes
  python figures.py logits difference --pair resnet56-resnet8 \\
      --teacher-checkpoint FILE --plain FILE --zscore FILE           teacher and students (student.pt) on the test images
  python figures.py grid --pair resnet56-resnet8 --runs DIR          accuracy over temperature and weight, where runs exist

Without names: all that the flags allow. Colours are those of Okabe and Ito and cividis, which the colour-blind can tell apart.
"""

import csv
import gzip
import io
import json
import statistics
from pathlib import Path

import click
import torch

import cli
import run as runs
from data import CIFAR100_CLASSES, load_data, normalise
from models import MODELS, create_model, load_weights
from weights import facts_of, read_checkpoint
from run import RunError
from teacher import Teacher
from zscore_kd import kd_loss, weighted_zscore

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:     # said in one line when a picture is asked for
    matplotlib = None

ROOT = Path(__file__).resolve().parent
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")      # Okabe and Ito
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX*"
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
         "svg.hashsalt": "figures", "savefig.dpi": 200}     # the salt: equal pictures are equal files


def label(method):
    """KD+Z for kd-z."""
    if method == "none":
        return "alone"
    name, *rest = method.split("-")
    return name.upper() + "+Z" * ("z" in rest) + ", released" * ("released" in rest)


def save(figure, out, name, rows):
    """figure as out/NAME.png and .svg; rows, a list of dicts, as out/NAME.csv."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs.rounded(rows))
    with runs.explained(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.csv").write_text(buffer.getvalue())
        figure.savefig(out / f"{name}.png")
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    click.echo(f"{out / name}.png, .svg and .csv")


# ---------------------------------------------------------------- (1) the toy case


TOY = {"teacher": (1.0, 5.0, 6.0), "student 1": (1.0, 5.9, 5.6), "student 2": (0.125, 0.625, 0.75)}


def toy(flags):
    """A student near the teacher's logits that is wrong, and one of an eighth of their range that is right (paper, figure 2)."""
    logits = {name: torch.tensor([values], dtype=torch.float64) for name, values in TOY.items()}
    rows = []
    for name, z in logits.items():
        kl = {zscore: kd_loss(z, logits["teacher"], 1.0, zscore=zscore).item() for zscore in (False, True)}
        rows.append({"network": name, **{f"logit_{i}": v for i, v in enumerate(TOY[name])}, "predicts": z.argmax().item(),
                     "kl": kl[False], "kl_zscore": kl[True]})
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, *right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for i, name in enumerate(TOY):
        left.bar([k + 0.27 * (i - 1) for k in range(3)], TOY[name], 0.25, label=name, color=COLOURS[i], hatch=("", "//", "..")[i],
                 edgecolor="white")
    left.set(xticks=range(3), xticklabels=[f"class {k}" for k in range(3)], ylabel="logit",
             title="Student 1 is nearer, and wrong;\nstudent 2 ranks as the teacher does")
    left.legend(frameon=False)
    for axes, key, what in zip(right, ("kl", "kl_zscore"), ("plain", "standardized")):
        bars = axes.bar([0, 1], [row[key] for row in rows[1:]], 0.6, color=COLOURS[1:3], edgecolor="white")
        for bar, hatch in zip(bars, ("//", "..")):
            bar.set_hatch(hatch)
        axes.bar_label(bars, fmt="%.2f")
        best = min(rows[1:], key=lambda row: row[key])
        axes.set(xticks=[0, 1], xticklabels=[f"{row['network']}\n{'right' if row['predicts'] == 2 else 'wrong'}" for row in rows[1:]],
                 ylabel="KL(teacher || student), nats", title=f"{what}: KL prefers\nthe {'right' if best['predicts'] == 2 else 'wrong'} one")
    save(figure, flags["out"], "toy", rows)


# ---------------------------------------------------------------- (2) curves and (6) gaps, from results/


def records_of(flags):
    """The rows of results/ of the pair and its student alone, of the longest budget, real images first; (records, the budget)."""
    teacher, student = flags["pair"].split("-")
    found = {}
    for path in sorted(flags["results"].glob("*.json")):
        record = json.loads(path.read_text())
        if (record["teacher"], record["student"]) in ((teacher, student), (None, student)):
            recipe = record["recipe"]
            budget = (recipe["data"] == "cifar100", record["full_length"], record["epochs"] * (not record["full_length"]),
                      recipe["train_images"] or 50_000, recipe["data"])
            found.setdefault(budget, []).append(record | {"name": path.stem})
    found = {budget: group for budget, group in found.items() if any(r["teacher"] for r in group)}
    if not found:
        raise RunError(f"{flags['results']} holds no row of {flags['pair']}; python reproduce.py --pairs {flags['pair']} makes them")
    _, full, epochs, images, name = longest = max(found)
    if len({r["recipe"].get("teacher_sha256") for r in found[longest] if r["teacher"]}) > 1:
        raise RunError(f"the rows of {flags['pair']} were taught by different teachers and are not compared")
    budget = "full length" if full else f"{epochs} epochs on {images:,} images"
    return found[longest], budget + ("" if name == "cifar100" else f" of {name}")


def by_method(records):
    """method -> its records by seed, in reproduce.py's order."""
    order = ["none", "kd", "kd-z", "ctkd", "ctkd-z", "dkd", "dkd-z", "mlkd", "mlkd-z", "mlkd-z-released", "ttm", "wttm"]
    groups = {}
    for record in sorted(records, key=lambda r: (order.index(r["method"]) if r["method"] in order else 99, r["seed"])):
        groups.setdefault(record["method"], []).append(record)
    return groups


def curves(flags):
    """Test accuracy and training cross-entropy by epoch, the mean of a method's seeds, its lowest and highest as a band.

    MLKD's cross-entropy, a sum over two views in the log, is halved.
    """
    records, budget = records_of(flags)
    groups = {m: g for m, g in by_method(records).items() if m in flags["methods"].split(",")}
    if not groups:
        raise RunError(f"no row of {flags['pair']} has one of the methods {flags['methods']}")
    rows = []
    for method, group in groups.items():
        for record in group:
            with gzip.open(flags["results"] / "logs" / f"{record['name']}.jsonl.gz", "rt") as file:
                views = 2 if method.startswith("mlkd") else 1
                rows += [{"method": method, "seed": record["seed"], "epoch": row["epoch"], "test_top1": row["test_top1"],
                          "ce": row["ce"] / views} for row in map(json.loads, file)]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, method in enumerate(groups):
        for axes, key in zip(panels, ("test_top1", "ce")):
            values = {}
            for row in rows:
                if row["method"] == method:
                    values.setdefault(row["epoch"], []).append(row[key])
            epochs, means = list(values), [statistics.mean(v) for v in values.values()]
            axes.plot(epochs, means, LINES[i % 4], color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=3,
                      markevery=max(1, len(epochs) // 12), label=f"{label(method)} (n = {len(groups[method])})")
            axes.fill_between(epochs, [min(v) for v in values.values()], [max(v) for v in values.values()], color=COLOURS[i % 8], alpha=0.2,
                              linewidth=0)
    last = {m: statistics.mean(r["last"]["top1"] for r in g) for m, g in groups.items()}
    best = max(last, key=last.get)
    fits = sorted(groups, key=lambda m: statistics.mean(r["ce"] for r in rows if r["method"] == m and r["epoch"] == groups[m][0]["epochs"]))
    panels[0].set(xlabel="epoch", ylabel="top-1 on the test split, %", title=f"{label(best)} ends highest, {last[best]:.1f} %")
    panels[1].set(xlabel="epoch", ylabel="cross-entropy in training, nats", title=f"{label(fits[0])} fits the labels best, {label(fits[-1])} least")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{flags['pair'].replace('-', ' → ')}, {budget}", fontsize=9)
    save(figure, flags["out"], "curves", rows)


def gap(flags):
    """Teacher's accuracy less the student's last epoch, per method."""
    records, budget = records_of(flags)
    teacher = next(r["teacher_top1"] for r in records if r["teacher"])
    rows = []
    for method, group in by_method(records).items():
        values = [teacher - r["last"]["top1"] for r in group]
        rows.append({"method": method, "gap": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
                     "n": len(values)})
    figure = Figure(figsize=(6, 0.3 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        z = "-z" in row["method"]
        axes.errorbar(row["gap"], i, xerr=row["std"], fmt="D" if z else "o", color=COLOURS[1 if z else 0], capsize=3)
        axes.annotate(f"{row['gap']:.2f}" + (f" ± {row['std']:.2f}" if row["n"] > 1 else ""), (row["gap"], i), xytext=(0, 6),
                      textcoords="offset points", ha="center", fontsize=7)
    smallest = min(rows, key=lambda row: row["gap"])
    axes.set(yticks=range(len(rows)), yticklabels=[f"{label(r['method'])} (n = {r['n']})" for r in rows], ylim=(len(rows) - 0.3, -0.8),
             xlabel=f"teacher's top-1 ({teacher:.2f} %) less the student's last epoch's, points\n(diamonds: standardized; bars: "
                    "± 1 standard deviation over n seeds)",
             title=f"{label(smallest['method'])} leaves the smallest gap to the teacher\n{flags['pair'].replace('-', ' → ')}, {budget}")
    axes.grid(axis="x", alpha=0.3)
    save(figure, flags["out"], "gap", rows)


# ---------------------------------------------------------------- (3) and (4), from a teacher and two students


def logits_of(flags):
    """Of the test images: {"teacher", "plain", "zscore"} to logits (N, K), float32 on the CPU; to titles; and targets (N,)."""
    teacher, student = flags["pair"].split("-")
    device = cli.pick_device(flags["device"])
    split = load_data("cifar100", flags["data_dir"], device).test
    logits, titles = {}, {}
    for who, path in (("teacher", flags["teacher_checkpoint"]), ("plain", flags["plain"]), ("zscore", flags["zscore"])):
        facts = facts_of(read_checkpoint(path, teacher if who == "teacher" else student))
        said = facts.get("zscore")
        if who != "teacher" and said is not None and said != (who == "zscore"):
            raise RunError(f"--{who} {path}: this student was distilled {'with' if said else 'without'} --zscore")
        titles[who] = f"teacher {teacher}" if who == "teacher" else f"{student}, {facts.get('method', 'KD').upper()}{'+Z' * (who == 'zscore')}"
        network = create_model(teacher if who == "teacher" else student)
        load_weights(network, path, prefer="teacher" if who == "teacher" else "student")
        network = Teacher(network, device)
        logits[who] = torch.cat([network.logits(normalise(part)) for part in split.images.split(2000)]).cpu()
    return logits, titles, split.targets.cpu()


def logit_statistics(flags, logits, titles, targets):
    """The bivariate histogram of each image's mean and standard deviation of logits."""
    points = {who: (v.mean(1), v.std(1, correction=0)) for who, v in logits.items()}
    edges = [torch.linspace(min(p[i].min() for p in points.values()).item(), max(p[i].max() for p in points.values()).item(), 61)
             for i in (0, 1)]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    rows = []
    histograms = {who: torch.histogramdd(torch.stack(p, 1), edges).hist for who, p in points.items()}
    highest = max(h.max().item() for h in histograms.values())
    for axes, (who, (mean, deviation)) in zip(panels, points.items()):
        counts = histograms[who]
        image = axes.pcolormesh(*(e.numpy() for e in edges), counts.T.numpy(), cmap="cividis", norm=matplotlib.colors.LogNorm(1, highest), rasterized=True)
        axes.set(title=f"{titles[who]}:\ndeviation {deviation.mean():.2f} ± {deviation.std():.2f}", xlabel="mean of an image's logits")
        rows += [{"network": who, "mean_from": edges[0][i].item(), "mean_to": edges[0][i + 1].item(), "deviation_from": edges[1][j].item(),
                  "deviation_to": edges[1][j + 1].item(), "images": int(counts[i, j])} for i, j in counts.nonzero().tolist()]
    panels[0].set_ylabel("standard deviation of an image's logits")
    figure.colorbar(image, ax=panels, label="test images in a cell")
    near = {who: abs(points[who][1].mean() - points["teacher"][1].mean()).item() for who in ("plain", "zscore")}
    figure.suptitle(f"The mean deviation of the logits lies {near['plain']:.2f} from the teacher's without standardization, "
                    f"{near['zscore']:.2f} with it", fontsize=9)
    save(figure, flags["out"], "logits", rows)


def difference(flags, logits, titles, targets):
    """The heat map of |teacher's - student's| logits, each averaged over the images of a class, before and after standardization.

    All classes count, an image's own (the diagonal) too.
    """
    classes = logits["teacher"].shape[1]
    counts = torch.bincount(targets, minlength=classes).unsqueeze(1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    rows, means = [], {}
    for line, (what, shown) in enumerate((("logits", lambda x: x), ("standardized logits", weighted_zscore))):
        maps = {who: (torch.zeros(classes, classes).index_add_(0, targets, shown(logits["teacher"]) - shown(logits[who])) / counts).abs()
                for who in ("plain", "zscore")}
        highest = max(m.max() for m in maps.values())
        for axes, (who, values) in zip(panels[line], maps.items()):
            image = axes.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=highest.item(), interpolation="nearest")
            axes.set(title=f"{titles[who]}, {what}:\nmean {values.mean():.2f}, maximum {values.max():.2f}", xlabel="logit of class",
                     ylabel="images of class")
            means[line, who] = values.mean().item()
            rows += [{"logits": what, "student": who, "images_of": name, **{c: round(v, 3) for c, v in zip(CIFAR100_CLASSES, values[i].tolist())}}
                     for i, name in enumerate(CIFAR100_CLASSES)]
        figure.colorbar(image, ax=panels[line], label=f"|difference of means|, {what}")
    words = ["nearer to" if means[line, "zscore"] < means[line, "plain"] else "farther from" for line in (0, 1)]
    figure.suptitle(f"The student with standardization is {words[0]} the teacher {titles['teacher'].split()[1]} than the other in its logits,\n"
                    f"and {words[1]} it once both sides are standardized", fontsize=9)
    save(figure, flags["out"], "difference", rows)


# ---------------------------------------------------------------- (5) temperature and weight


def grid(flags):
    """KD's accuracy over temperature and weight on images held out of the training images; of the recipe with the most runs."""
    teacher, student = flags["pair"].split("-")
    found = {}
    for path in sorted(flags["runs"].rglob("result.json")):
        recipe, result = json.loads((path.parent / "config.json").read_text())["recipe"], json.loads(path.read_text())
        if (recipe["teacher"], recipe["student"]) != (teacher, student) or recipe["method"] != "kd" or not recipe["val_from_train"]:
            continue
        same = json.dumps({k: v for k, v in recipe.items() if k not in ("base_temp", "kd_weight", "seed")}, sort_keys=True)
        cell = found.setdefault(same, {}).setdefault((recipe["base_temp"], recipe["kd_weight"]), [])
        cell.append(result["last"]["top1"])
    if not found:
        raise RunError(f"{flags['runs']} holds no finished run of {flags['pair']} with --val-from-train; temperature and weight are not "
                       "chosen on the test split")
    same, cells = max(found.items(), key=lambda item: len(item[1]))
    temps, weights = (sorted({key[i] for key in cells}) for i in (0, 1))
    values = [[statistics.mean(cells[t, w]) if (t, w) in cells else float("nan") for w in weights] for t in temps]
    figure = Figure(figsize=(max(3.6, 1.2 + 0.9 * len(weights)), 1.6 + 0.6 * len(temps)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value == value:
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > middle else "white")
    best = max(cells, key=lambda key: statistics.mean(cells[key]))
    facts = json.loads(same)
    axes.set(xticks=range(len(weights)), xticklabels=[f"{w:g}" for w in weights], yticks=range(len(temps)),
             yticklabels=[f"{t:g}" for t in temps], xlabel="weight of KD", ylabel="base temperature" if facts["zscore"] else "temperature")
    axes.set_title(f"{flags['pair'].replace('-', ' → ')}, KD{'+Z' if facts['zscore'] else ''}:\nbest at temperature {best[0]:g},\nweight {best[1]:g} ({facts['epochs']} epochs on "
                   f"{facts['train_images'] or 50_000 - facts['val_from_train']:,} images)")
    figure.colorbar(image, label=f"top-1 on {facts['val_from_train']:,} held-out\ntraining images, last epoch, %")
    save(figure, flags["out"], "grid", [{"base_temp": t, "kd_weight": w, "top1": statistics.mean(v), "n": len(v)}
                                        for (t, w), v in sorted(cells.items())])


# ---------------------------------------------------------------- the command


NEEDS = {"toy": (), "curves": ("pair",), "gap": ("pair",), "logits": ("pair", "teacher_checkpoint", "plain", "zscore"),
         "difference": ("pair", "teacher_checkpoint", "plain", "zscore"), "grid": ("pair", "runs")}


@click.command(cls=cli.Command, help=__doc__)
@click.argument("names", nargs=-1, type=cli.Choice(list(NEEDS)), metavar=f"[{'|'.join(NEEDS)}]...")
@click.option("--pair", metavar="T-S", help="TEACHER-STUDENT.")
@click.option("--methods", metavar="M,...", default="none,kd,kd-z,dkd,dkd-z", show_default=True, help="Of the curves.")
@click.option("--results", metavar="DIR", default=ROOT / "results", type=click.Path(path_type=Path), help="[default: results/ here]")
@click.option("--runs", metavar="DIR", type=click.Path(path_type=Path), help="Folder of runs with --val-from-train.")
@click.option("--teacher-checkpoint", metavar="FILE", help="The teacher's weights.")
@click.option("--plain", metavar="FILE", help="student.pt of a run without --zscore.")
@click.option("--zscore", metavar="FILE", help="student.pt of a run with --zscore.")
@click.option("--data-dir", default="data", show_default=True, metavar="DIR", help="Folder of cifar-100-python.")
@click.option("--device", type=cli.Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]")
@click.option("--out", metavar="DIR", default=ROOT / "figures", type=click.Path(path_type=Path), help="[default: figures/ here]")
def main(names, **flags):
    if matplotlib is None:
        raise RunError("the pictures need matplotlib: pip install matplotlib")
    if flags["pair"] is not None:
        if flags["pair"].count("-") != 1:
            raise click.UsageError(f"--pair {flags['pair']}: it is TEACHER-STUDENT, for instance resnet32x4-resnet8x4")
        for network in flags["pair"].split("-"):
            cli.check_name("--pair", network, list(MODELS))
    for name in names:
        missing = [f"--{k.replace('_', '-')}" for k in NEEDS[name] if flags[k] is None]
        if missing:
            raise click.UsageError(f"{name} needs {', '.join(missing)}")
    names = names or [name for name, needs in NEEDS.items() if all(flags[k] is not None for k in needs)]
    try:
        with matplotlib.rc_context(STYLE):
            for name, draw in (("toy", toy), ("curves", curves), ("gap", gap), ("grid", grid)):
                if name in names:
                    draw(flags)
            if {"logits", "difference"} & set(names):
                known = logits_of(flags)
                for name, draw in (("logits", logit_statistics), ("difference", difference)):
                    if name in names:
                        draw(flags, *known)
    except (ValueError, OSError, EOFError, TypeError) as error:         # of files that are not what they are said to be
        raise RunError(runs.first_line(error)) from None
    except KeyError as error:
        raise RunError(f"a result or a run has no {error}: it is not of this program, or of an older one") from None


if __name__ == "__main__":
    main()
