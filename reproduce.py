"""The papers' CIFAR-100 table from one command: command lines of train_cifar.py, their results, the tables.

\b
  python reproduce.py                                     six teachers, then eight pairs, nine methods
  python reproduce.py --pairs resnet32x4-resnet8x4 --methods kd,kd-z --seeds 3
  python reproduce.py --pairs resnet56-resnet8 --epochs 12 --train-images 20000     a short budget
  python reproduce.py --table                             the tables from results/; nothing is run

A row is results/NAME.json and its log, results/logs/NAME.jsonl.gz. A row that is there is not run again. The
students of the first pair and the teachers are kept in checkpoints/, where later rows find them.
"""

import functools
import gzip
import io
import json
import os
import re
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

import click
import torch

import cli
import recipes
import run as runs
import train_cifar
from checkpoints import open_checkpoint, read_checkpoint, weights_sha256
from data import load_data
from distill import evaluate
from models import create_model
from run import RunError
from teacher import CHECKPOINTS

ROOT = Path(__file__).resolve().parent
TEACHERS = ("resnet32x4", "wrn_40_2", "resnet56", "resnet110", "vgg13", "ResNet50")
PAIRS = ("resnet32x4-resnet8x4", "resnet32x4-ShuffleV2", "resnet32x4-wrn_16_2", "resnet32x4-wrn_40_2",
         "wrn_40_2-wrn_16_2", "resnet56-resnet20", "resnet110-resnet32", "resnet110-resnet20")
METHODS = ("none", "kd", "kd-z", "dkd", "dkd-z", "mlkd-z", "mlkd-z-released", "ctkd-z", "wttm")
# rows of which the student is kept in checkpoints/, and its name there
KEPT = {f"{name}-none-seed0": name for name in (*TEACHERS, "resnet8x4")}
KEPT |= {f"{PAIRS[0]}-{method}-seed0": f"{PAIRS[0]}-{method}" for method in METHODS[1:]}
LARGEST = 16e6      # bytes of a checkpoint that is kept
# Student's t at 95 %, of 2 to 9 degrees of freedom
T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BEGIN, END = "<!-- made by reproduce.py: begin -->", "<!-- made by reproduce.py: end -->"
# what a recipe that lacks a key means: older records lack the newer keys
DEFAULTS = {"compile": False, "deterministic": False, "exact_teacher": False, "feature": None,
            "feature_weight": None, "precision": "fp32", "source": "authors", "train_images": None,
            "val_from_train": 0}
SAME = ("teacher_sha256", "precision", "compile")       # of the two methods that are compared


class Row(NamedTuple):
    """A command line of train_cifar.py, what it is resolved to, and the name of its result."""
    method: str         # as in recipes.NAMES
    arguments: list     # that make the row on any machine
    where: list         # on this one
    recipe: dict
    name: str


# ---------------------------------------------------------------- running


def rows_of(pairs, methods):
    """(teacher or None, student, method) by pairs, TEACHER-STUDENT or NAME, then methods; each once."""
    rows = {}
    for pair in pairs:
        *teacher, student = pair.split("-")
        for method in methods if teacher else ["none"]:
            rows[teacher[0] if method != "none" else None, student, method] = None
    return list(rows)


def options(**values):
    """The words of flags with values; None and False are left out, True has no value."""
    words = []
    for key, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def make_row(flags, device, teacher, student, method, seed):
    """The Row of one run; its recipe has the hash of the teacher's file where that is on this machine."""
    name, zscore, released, feature, entropy = recipes.parse_method(method)
    named = flags["teacher_checkpoint"] if teacher else None
    arguments = options(
        teacher=teacher, student=student, method=name, feature=feature, zscore=zscore, entropy_weight=entropy,
        recipe="released" if released else None, teacher_checkpoint=named, seed=seed, epochs=flags["epochs"],
        train_images=flags["train_images"], precision=cli.pick_precision(flags["precision"], device),
        data=None if flags["data"] == "cifar100" else flags["data"], compile=flags["compile"])
    where = options(**{key: flags[key] for key in ("device", "data_dir", "teacher_url", "out")})
    recipe, _ = train_cifar.resolve_arguments([*arguments, *where])
    file = named or local_teacher(teacher)
    if teacher and file:
        recipe["teacher_sha256"] = sha256_of(teacher, file)
    run_name = recipes.run_name(recipe, precision=cli.pick_precision(None, device),
                                teacher_file=named is not None)
    return Row(method, arguments, where, json.loads(json.dumps(DEFAULTS | recipe)), run_name)


def local_teacher(name):
    """The file that would be taken for a teacher without a download, or None."""
    places = (f"{name}.pt", f"mdistiller/{name}.pth", f"pytorch-cifar-models/{name}.pt")
    return next((CHECKPOINTS / place for place in places if (CHECKPOINTS / place).is_file()), None)


@functools.cache
def sha256_of(name, path):
    """The hash of a teacher's weights in a file."""
    return weights_sha256(open_checkpoint(path, name, prefer="teacher")[0])


def differences(before, now):
    """Where two recipes differ: ["precision was fp32, now bf16"]. A teacher without a known hash fits any."""
    keys = before.keys() | now.keys()
    if "teacher_sha256" not in now:
        keys -= {"teacher_sha256"}
    return [f"{k} was {before.get(k)}, now {now.get(k)}"
            for k in sorted(keys) if before.get(k) != now.get(k)]


def done(row, records):
    """Whether a row's result is among the records, under any name; RunError where its name is another's."""
    differ = {record["name"]: differences(record["recipe"], row.recipe) for record in records}
    if [] in differ.values():
        return True
    if row.name in differ:
        raise RunError(f"{row.name} has a result of another recipe ({'; '.join(differ[row.name])}): "
                       "choose other --results and --out")
    return False


def run_row(row, results, device, data_dir):
    """Runs a row, or finds its run finished, and writes its result."""
    recipe, result, folder, teacher = train_cifar.run([*row.arguments, *row.where])
    config = json.loads((folder / "config.json").read_text())
    del config["facts"]["command"]
    record = {"teacher": recipe["teacher"], "student": recipe["student"], "method": row.method,
              "seed": recipe["seed"], **result,
              "full_length": recipe["epochs"] == recipe["full_epochs"] and not recipe["train_images"],
              "teacher_top1": teacher and teacher.top1, "teacher_source": teacher and teacher.source,
              "command": shlex.join(["python", "train_cifar.py", *row.arguments]), **config}
    if row.name in KEPT:
        data = load_data("cifar100", data_dir, device)
        click.echo(keep(CHECKPOINTS / f"{KEPT[row.name]}.pt", record, folder, data, device))
    log = gzip.compress((folder / "log.jsonl").read_bytes(), mtime=0)
    replace(results / "logs" / f"{row.name}.jsonl.gz", log)
    replace(results / f"{row.name}.json", to_json(record))      # last: it marks the row as done


def run_all(rows, results, readme, device, data_dir):
    """Every row that is not done. RunError at the end where some failed."""
    problems = []
    for row in rows:
        try:
            if done(row, load_records(results)):
                click.echo(f"{row.name}: done already")
                continue
            click.echo(f"\n{row.name}")
            with cli.friendly_errors():
                run_row(row, results, device, data_dir)
        except (RunError, click.UsageError) as error:
            click.echo(f"{row.name}: {runs.first_line(error.format_message())}", err=True)
            problems.append(row.name)
            continue
        write_tables(results, readme)
    if problems:
        raise RunError(f"{len(problems)} of {len(rows)} rows could not be run, for the reasons above: "
                       f"{', '.join(problems)}")


def keep(path, record, folder, data, device):
    """Keeps a run's student and a model card (JSON) in checkpoints/; returns a line.

    The weights are float16, or float32 where float16 moves the accuracy by more than 0.02 points. A file that
    is there is not touched: rows may have been taught by it.
    """
    cli.set_backends(deterministic=False)       # in float32, whatever the row's own precision was
    if path.exists():
        return f"{path} is there already and stays"
    content = read_checkpoint(folder / "student.pt")
    half = {k: v.half() if v.is_floating_point() else v for k, v in content["model"].items()}
    network, top1 = create_model(record["student"]).to(device).eval(), []
    for weights in (content["model"], half):
        network.load_state_dict(weights)
        with torch.no_grad():
            top1.append(evaluate(network, train_cifar.evaluation(data.test, data.pixels))["top1"])
    if abs(top1[1] - top1[0]) <= 0.02:
        content = content | {"model": half}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    card = {k: record[k] for k in ("command", "seed", "last", "best", "best_chosen_on", "facts")}
    replace(path.with_suffix(".json"), to_json(card | {"float32_top1": top1[0], "float16_top1": top1[1]}))
    line = f"{path}: {buffer.tell() / 1e6:.1f} MB, {top1[0]:.2f} % in float32, {top1[1]:.2f} % in float16"
    if buffer.tell() >= LARGEST:
        return f"{line}: too large, its card is written"
    replace(path, buffer.getvalue())
    return f"{line}: kept"


def to_json(record):
    return (json.dumps(runs.rounded(record), indent=2) + "\n").encode()


def replace(path, content):
    """Writes bytes to a file in one step."""
    partial = path.with_name(f"{path.name}.partial")
    with runs.disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)


# ---------------------------------------------------------------- the tables


def load_records(results):
    """All rows of a results folder, their recipes complete; RunError for a file that is not one."""
    records = []
    for path in sorted(results.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            record |= {"name": path.stem, "recipe": DEFAULTS | record["recipe"]}
            if record["method"].endswith("-released"):      # older records do not contain it
                record["recipe"]["source"] = "released"
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path} is not a row's result; remove it") from None
        records.append(record)
    return records


def cells_of(records):
    """Lists of the records that differ in nothing but the seed, in the order of the table."""
    cells = {}
    for record in records:
        recipe = {k: v for k, v in record["recipe"].items() if k != "seed"}
        key = (record["student"], record["teacher"] or "", recipes.NAMES.index(record["method"]),
               json.dumps(recipe, sort_keys=True))
        cells.setdefault(key, []).append(record)
    return [cells[key] for key in sorted(cells)]


def last_top1(record):
    """Top-1 of the last epoch; that of the kept student in float32, where training evaluated in bfloat16."""
    return record.get("float32", record["last"])["top1"]


def gains_of_z(cell, cells):
    """Differences to the same seeds without Z, the networks and SAME being equal."""
    def what(record, method):
        return method, record["teacher"], record["student"], [record["recipe"].get(k) for k in SAME]

    wanted = what(cell[0], cell[0]["method"].replace("-z", ""))
    plain = {}
    for record in sum(cells, []):
        if what(record, record["method"]) == wanted:
            plain[record["seed"]] = last_top1(record)
    return [last_top1(record) - plain[record["seed"]] for record in cell if record["seed"] in plain]


def spread(values, sign=""):
    """Mean ± standard deviation (of a sample, n - 1), and n."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation} (n = {len(values)})"


def verdict(gains):
    """What RULE calls the differences of the same seeds; "" for fewer than three."""
    if len(gains) < 3:
        return ""
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    if abs(mean) <= T95[min(len(gains), 10) - 3] * error:
        return ", within noise"
    return ", better" if mean > 0 else ", worse"


RULE = """\
Δ of Z is the mean of the differences between runs of the same seed with and without Z, with one teacher,
precision and compilation. From three seeds on it is called better or worse where Student's t at 95 % excludes
zero, else within noise."""
FLOAT32 = """\
The last epoch is evaluated from the kept students by `--eval` in float32 (the KD+Z student is kept in
float16); the best epoch is the log's, in bfloat16."""


COLUMNS = ("pair", "method", "last epoch, top-1", "best, chosen on test", "paper", "authors' log, last epoch",
           "Δ of Z", "paper's Δ", "exported network", "minutes", "device",
           "`python train_cifar.py`, with `--seed`")


def table_row(cell, cells):
    """One line of a table: {column: text}, without the columns that have nothing to say."""
    record = cell[0]
    recipe, teacher = record["recipe"], record["teacher"]
    known, without_z = recipes.results_of(recipe), recipes.results_of(recipe | {"zscore": False})
    row = {"pair": f"{teacher} → {record['student']}" if teacher else record["student"],
           "method": recipes.display_name(record["method"]),
           "last epoch, top-1": spread([last_top1(r) for r in cell]),
           "best, chosen on test": spread([r["best"]["top1"] for r in cell])}
    if known["published"]:
        row["paper"] = f"{known['published']:.2f}"
    if known["logged"]:
        row["authors' log, last epoch"] = f"{known['logged']:.2f}"
    if recipe["zscore"]:
        gains = gains_of_z(cell, cells)
        if gains:
            row["Δ of Z"] = spread(gains, "+") + verdict(gains)
        if known["published"] and without_z["published"]:
            row["paper's Δ"] = f"{known['published'] - without_z['published']:+.2f}"
    if recipe["feature"] == "simkd":
        row["exported network"] = (f"{record['parameters']:,} parameters, "
                                   f"{record['macs'] / 1e6:.1f} M multiply-accumulates")
    minutes = [r["minutes"] for r in cell if not r.get("background")]       # the others contain waiting
    if minutes:
        row["minutes"] = f"{statistics.mean(minutes):.1f}"
    devices = {f"{r['facts']['device']}, threads: {r['facts']['threads']}" for r in cell}
    row["device"] = "; ".join(sorted(devices))
    command = re.sub(" --seed [0-9]+", "", record["command"].removeprefix("python train_cifar.py "))
    row[COLUMNS[-1]] = f"`{command}`"
    return row


def markdown(records):
    """Which teachers taught, and a table of the rows, without empty columns."""
    cells = cells_of(records)
    rows = [table_row(cell, cells) for cell in cells]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    teachers = {(r["teacher"], r["teacher_source"], r["teacher_top1"], r["recipe"]["teacher_sha256"])
                for r in records if r["teacher"]}
    lines = [" ".join(f"Teacher {name}: {source}, {top1:.2f} %, SHA-256 of its weights {sha[:12]}..."
                      for name, source, top1, sha in sorted(teachers)), ""]
    lines += [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    lines += [f"| {' | '.join(row.get(column, '–') for column in columns)} |" for row in rows]
    return "\n".join([*lines, ""])


def tables(records):
    """Markdown of all rows, a table for each budget; full length last."""
    budgets, text = {}, []
    for record in records:
        data, images = record["recipe"]["data"], record["recipe"]["train_images"] or 0
        full = record["full_length"] and data == "cifar100"
        budgets.setdefault((full, data, 0 if full else record["epochs"], images), []).append(record)
    for (full, data, epochs, images), group in sorted(budgets.items()):
        if full:
            intro = f"**Full length, as in the papers: {len(cells_of(group))} rows.**"
            if any("float32" in record for record in group):
                intro += " " + FLOAT32
        else:
            intro = (f"**A short budget: {epochs} epochs on {images or 'all'} training images of {data}, "
                    f"{len(group)} runs.** It shows that the machinery works, not the paper's ranking.")
        text.append(f"{intro} {markdown(group)}")
    if any("Δ of Z" in part for part in text):
        text.append(RULE)
    return "\n".join(text).strip()


def split_readme(readme):
    """What is before and after the tables in a file; RunError where it has no place for them."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{readme} has no place for the tables: the lines {BEGIN} and {END}, once each")
    return text.split(BEGIN)[0], text.split(END)[1]


def write_tables(results, readme):
    """Puts the tables between the marks of a file."""
    before, after = split_readme(readme)
    replace(readme, f"{before}{BEGIN}\n{tables(load_records(results))}\n{END}{after}".encode())


# ---------------------------------------------------------------- the command


@click.command(cls=cli.Command, help=__doc__)
@click.option("--pairs", metavar="T-S,...", help="TEACHER-STUDENT, or a network.  [default: six and eight]")
@click.option("--methods", metavar="M,...", help=f"[default: {','.join(METHODS)}]")
@click.option("--results", metavar="DIR", default=ROOT / "results", type=cli.PATH,
              help="[default: results/ here]")
@click.option("--readme", metavar="FILE", default=ROOT / "RESULTS.md", type=cli.PATH,
              help="File of the tables.  [default: RESULTS.md here]")
@click.option("--table", is_flag=True, help="Only rewrite the tables from the results.")
@click.option("--list", "list_rows", is_flag=True, help="Print the rows and which are done, and exit.")
def main(pairs, methods, results, readme, table, list_rows, **flags):
    results, readme = Path(results), Path(readme)
    if table:
        write_tables(results, readme)
        return
    pairs = pairs.split(",") if pairs else [*TEACHERS, *PAIRS]
    methods = methods.split(",") if methods else METHODS
    for method in methods:
        if method not in recipes.NAMES:
            raise click.UsageError(f"--methods {method}: known are kd, kd-z, mlkd-z-released, crd and others")
    with cli.friendly_errors():
        device = cli.pick_device(flags["device"])
        seeds = range(flags["seed"], flags["seed"] + flags["seeds"])
        rows = [make_row(flags, device, *row, seed) for seed in seeds for row in rows_of(pairs, methods)]
        if list_rows:
            records = load_records(results)
            for row in rows:
                differ = [differences(record["recipe"], row.recipe) for record in records]
                click.echo(f"{'done' if [] in differ else '    '}  {row.name}")
            return
        split_readme(readme)        # a missing place for the tables is an error now, not after hours
        run_all(rows, results, readme, device, flags["data_dir"])


# flags that mean what they mean there
PASSED = ("seed", "seeds", "epochs", "train_images", "teacher_checkpoint", "teacher_url", "data", "data_dir",
          "out", "device", "precision", "compile")
main.params[2:2] = [option for option in train_cifar.main.params if option.name in PASSED]

if __name__ == "__main__":
    main()
