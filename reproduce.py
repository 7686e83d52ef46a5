"""The papers' CIFAR-100 table from one command: command lines of train_cifar.py, their results, the tables.

\b
  python reproduce.py                                     six teachers, then eight pairs, nine methods
  python reproduce.py --pairs resnet32x4-resnet8x4 --methods kd,kd-z --seeds 3
  python reproduce.py --pairs resnet56-resnet8 --epochs 12 --train-images 20000     a short budget
  python reproduce.py --add RUN...                        finished runs of train_cifar.py, folders, as rows
  python reproduce.py --table                             the tables from results/; nothing is run

A row is results/NAME.json and its log, results/logs/NAME.jsonl.gz. What it is: its values, its teacher's
weights, precision, device and seed; such a row is not run again. The students of the first pair and the
teachers are kept in checkpoints/, where later rows find them.
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
from teacher import CHECKPOINTS, local_teacher

ROOT = Path(__file__).resolve().parent
TEACHERS = ("resnet32x4", "wrn_40_2", "resnet56", "resnet110", "vgg13", "ResNet50")
PAIRS = ("resnet32x4-resnet8x4", "resnet32x4-ShuffleV2", "resnet32x4-wrn_16_2", "resnet32x4-wrn_40_2",
         "wrn_40_2-wrn_16_2", "resnet56-resnet20", "resnet110-resnet32", "resnet110-resnet20")
METHODS = ("none", "kd", "kd-z", "dkd", "dkd-z", "mlkd-z", "mlkd-z-released", "ctkd-z", "wttm")
# rows of which the student is kept in checkpoints/, and its name there
KEPT = {f"{name}-none-seed0": name for name in (*TEACHERS, "resnet8x4")}
KEPT |= {f"{PAIRS[0]}-{method}-seed0": f"{PAIRS[0]}-{method}" for method in METHODS[1:]}
# Student's t at 95 %, of 2 to 9 degrees of freedom
T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
BEGIN, END = "<!-- made by reproduce.py: begin -->", "<!-- made by reproduce.py: end -->"
# what a recipe that lacks a key means: older records lack the newer keys
DEFAULTS = {"compile": False, "deterministic": False, "exact_teacher": False, "feature": None,
            "feature_weight": None, "precision": "fp32", "source": "authors", "teacher_precision": None,
            "train_images": None, "val_from_train": 0}
ELSEWHERE = ("epochs", "train_images", "precision", "source")       # changes that the tables say elsewhere


class Row(NamedTuple):
    """A command line of train_cifar.py, and what it is resolved to."""
    arguments: list     # that make the row on any machine
    where: list         # on this one
    recipe: dict
    key: tuple          # of its record, see `key_of`
    name: str           # of its run's folder


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
    usual = cli.pick_precision(None, device)
    arguments = options(
        teacher=teacher, student=student, method=name, feature=feature, zscore=zscore, entropy_weight=entropy,
        recipe="released" if released else None, teacher_checkpoint=named, seed=seed, epochs=flags["epochs"],
        train_images=flags["train_images"], precision=flags["precision"] or usual,
        data=None if flags["data"] == "cifar100" else flags["data"], compile=flags["compile"])
    where = options(**{key: flags[key] for key in PLACE})
    recipe, _ = train_cifar.resolve_arguments([*arguments, *where])
    file = named or local_teacher(teacher)
    if teacher and file:
        recipe["teacher_sha256"] = sha256_of(teacher, file)
    key = key_of(recipe, runs.collect_facts(device)["device"])
    run_name = recipes.run_name(recipe, precision=usual, teacher_file=named is not None)
    return Row(arguments, where, recipe, key, run_name)


@functools.cache
def sha256_of(name, path):
    """The hash of a teacher's weights in a file."""
    return weights_sha256(open_checkpoint(path, name, prefer="teacher")[0])


def key_of(recipe, device):
    """What a row is: (the run's name without its seed, its teacher's hash, its device, the seed).

    The precision is in the name. A teacher that is not known yet has the hash "".
    """
    recipe = DEFAULTS | recipe
    sha256 = recipe.get("teacher_sha256", "")
    name = recipes.run_name(recipe | {"seed": ""}, teacher_file=bool(sha256))
    return name, sha256, device, recipe["seed"]


def record_of(folder, arguments=None):
    """The record of a finished run of train_cifar.py; RunError where it is none.

    arguments: its command line; None: that of its config.json.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        result = json.loads((folder / "result.json").read_text())
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        recipe, facts = config["recipe"], config["facts"]
        words = arguments or shlex.split(facts["command"])
        del facts["command"]
        record = {k: recipe[k] for k in ("teacher", "student", "seed")}
        method = recipes.method_name(recipe)
        losses = [row["loss"] for row in rows[:3]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not a finished run of train_cifar.py ({error})") from None
    if recipe.get("source") == "released":
        method += "-released"
    full_length = recipe["epochs"] == recipe["full_epochs"] and not recipe["train_images"]
    return record | {"method": method, **result, "losses": losses, "full_length": full_length,
                     "command": command_of(recipe, words), "facts": facts, "recipe": recipe}


def command_of(recipe, words):
    """The command line that makes a run's recipe on any machine. words: that of the run."""
    given = {key: recipe[key] for key in recipes.changes(recipe) if key != "source"}
    given |= {key: recipe.get(key) for key in ("precision", "compile", "deterministic", "exact_teacher")}
    for flag in ("--teacher-checkpoint", "--student-checkpoint"):
        if flag in words:
            given[flag.strip("-").replace("-", "_")] = Path(words[words.index(flag) + 1]).name
    arguments = options(
        teacher=recipe["teacher"], student=recipe["student"], method=recipe["method"],
        feature=recipe.get("feature"), zscore=recipe["zscore"], entropy_weight="entropy_temp" in recipe,
        recipe=recipe.get("source"), data=None if recipe["data"] == "cifar100" else recipe["data"],
        seed=recipe["seed"], **given)
    return shlex.join(["python", "train_cifar.py", *arguments])


def key_of_record(record):
    return key_of(record["recipe"], record["facts"]["device"])


def write_record(record, folder, results):
    """A run's record and log in results/, unless its row is there. Returns a line."""
    for other in load_records(results):
        if key_of_record(other) == key_of_record(record):
            return f"{folder}: {other['name']} is there already"
    name = recipes.run_name(DEFAULTS | record["recipe"], teacher_file=bool(record["teacher"]))
    device = re.sub(r"\W+", "-", record["facts"]["device"].lower())
    name = f"{name}-{device}"
    log = gzip.compress((folder / "log.jsonl").read_bytes(), mtime=0)
    replace(results / "logs" / f"{name}.jsonl.gz", log)
    replace(results / f"{name}.json", to_json(record))      # last: it marks the row as done
    return f"{folder}: added as {name}"


def run_row(row, results, device, data_dir):
    """Runs a row, or finds its run finished, and writes its result."""
    _, _, folder, _ = train_cifar.run([*row.arguments, *row.where])
    record = record_of(folder, row.arguments)
    if row.name in KEPT:
        data = load_data("cifar100", data_dir, device)
        click.echo(keep(CHECKPOINTS / f"{KEPT[row.name]}.pt", record, folder, data, device))
    write_record(record, folder, results)


def run_all(rows, results, readme, device, data_dir):
    """Every row that is not done. RunError at the end where some failed."""
    problems = []
    for row in rows:
        if is_done(row, load_records(results)):
            click.echo(f"{row.name}: done already")
            continue
        click.echo(f"\n{row.name}")
        try:
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


def is_done(row, records):
    return row.key in map(key_of_record, records)


def add(folders, results, readme):
    """Finished runs become rows, without their minutes: nobody knows what else the machine did."""
    for folder in folders:
        record = record_of(Path(folder))
        for key in ("minutes", "img_s"):
            record.pop(key, None)
        click.echo(write_record(record, Path(folder), results))
    write_tables(results, readme)


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
    replace(path, buffer.getvalue())
    return (f"{path}: kept, {buffer.tell() / 1e6:.1f} MB, {top1[0]:.2f} % in float32, {top1[1]:.2f} % in "
            "float16")


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
    """Lists of the records of one key but for the seed, in the order of the table."""
    cells = {}
    for record in records:
        name, sha256, device, _ = key_of_record(record)
        method = recipes.NAMES.index(record["method"])
        key = record["teacher"] or "", sha256, record["student"], method, name, device
        cells.setdefault(key, []).append(record)
    return [sorted(cells[key], key=lambda record: record["seed"]) for key in sorted(cells)]


def last_top1(record):
    """Top-1 of the last epoch; that of the kept student in float32, where training evaluated in bfloat16."""
    return record.get("float32", record["last"])["top1"]


def changes_of(record):
    """{key: text} of a record's values that differ from its recipe, but for what the tables say elsewhere."""
    changed = {k: text for k, text in recipes.changes(record["recipe"]).items() if k not in ELSEWHERE}
    if "student_sha256" in record["recipe"]:
        changed["student_sha256"] = "student begins with a file"
    return changed


def setting_of(record, method):
    """What the runs of two methods that are compared have in common: (method, networks, teacher, machine)."""
    recipe, facts = record["recipe"], record["facts"]
    return (method, record["teacher"], record["student"], recipe.get("teacher_sha256"), recipe["precision"],
            recipe["compile"], facts["device"])


def differences(cell, others):
    """Top-1 of a cell less that of the runs of the same seed among the others."""
    by_seed = {record["seed"]: last_top1(record) for record in others}
    return [last_top1(record) - by_seed[record["seed"]] for record in cell if record["seed"] in by_seed]


def without_z(cell, cells, same_values):
    """The runs of a cell's method without Z: of its recipe, or with the cell's temperature and weights."""
    record = cell[0]
    wanted = setting_of(record, record["method"].replace("-z", ""))
    values = [record["recipe"][k] for k in ("base_temp", "kd_weight", "ce_weight")]
    found = []
    for other in sum(cells, []):
        recipe = other["recipe"]
        if same_values:
            fits = [recipe[k] for k in ("base_temp", "kd_weight", "ce_weight")] == values
        else:
            fits = not changes_of(other) and not changes_of(record)
        if fits and setting_of(other, other["method"]) == wanted:
            found.append(other)
    return found


def spread(values, sign=""):
    """One seed's value, both of two, else mean ± standard deviation (of a sample, n - 1)."""
    if len(values) == 1:
        return f"{values[0]:{sign}.2f} (one seed)"
    if len(values) == 2:
        return f"{values[0]:{sign}.2f}, {values[1]:{sign}.2f}"
    return f"{statistics.mean(values):{sign}.2f} ± {statistics.stdev(values):.2f} (n = {len(values)})"


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
precision and device, each with its recipe's temperature and weight; in the next column both have those of the
row. From three seeds on it is called better or worse where Student's t at 95 % excludes zero, else within
noise."""
FLOAT32 = """\
The last epoch is evaluated from the kept students by `--eval` in float32 (the KD+Z student is kept in
float16); the best epoch is the log's, in bfloat16."""
COLUMNS = ("pair", "method", "last epoch, top-1", "best, chosen on test", "paper", "authors' log, last epoch",
           "Δ of Z", "Δ of Z, same temperature and weight", "paper's Δ", "loss of epoch 1",
           "authors' log, epoch 1", "exported network", "minutes", "device",
           "`python train_cifar.py`, with `--seed`")


def table_row(cell, cells):
    """One line of a table: {column: text}, without the columns that have nothing to say."""
    record = cell[0]
    recipe, changed = record["recipe"], changes_of(record)
    known, plain = recipes.results_of(recipe), recipes.results_of(recipe | {"zscore": False})
    log = recipes.log_of(recipe)
    row = {"pair": pair_of(record),
           "method": ", ".join([recipes.display_name(record["method"]), *changed.values()]),
           "last epoch, top-1": spread([last_top1(r) for r in cell]),
           "best, chosen on test": spread([r["best"]["top1"] for r in cell])}
    if known["published"] and not changed:
        row["paper"] = f"{known['published']:.2f}"
    if known["logged"] and not changed:
        row["authors' log, last epoch"] = f"{known['logged']:.2f}"
        if "loss_1" in log and "losses" in record:
            row["loss of epoch 1"] = f"{statistics.mean([r['losses'][0] for r in cell]):.2f}"
            row["authors' log, epoch 1"] = f"{log['loss_1']:.2f}"
    if recipe["zscore"]:
        for column, same_values in zip(COLUMNS[6:8], (False, True)):
            gains = differences(cell, without_z(cell, cells, same_values))
            if gains:
                row[column] = spread(gains, "+") + verdict(gains)
        if known["published"] and plain["published"] and not changed:
            row["paper's Δ"] = f"{known['published'] - plain['published']:+.2f}"
    if recipe["feature"] == "simkd":
        row["exported network"] = (f"{record['parameters']:,} parameters, "
                                   f"{record['macs'] / 1e6:.1f} M multiply-accumulates")
    minutes = [r["minutes"] for r in cell if "minutes" in r]
    if minutes:
        row["minutes"] = f"{statistics.mean(minutes):.1f}"
    row["device"] = "; ".join(sorted({machine_of(r) for r in cell}))
    command = re.sub(" --seed [0-9]+", "", record["command"].removeprefix("python train_cifar.py "))
    row[COLUMNS[-1]] = f"`{command}`"
    return row


def pair_of(record):
    if record["teacher"] is None:
        return record["student"]
    teacher = recipes.label(record["teacher"], record["recipe"]["teacher_sha256"])
    return f"{teacher} → {record['student']}"


def machine_of(record):
    facts = record["facts"]
    return (f"{facts['device']}, threads: {facts['threads']}, torch {facts['torch'].partition('+')[0]}, "
            f"{record['recipe']['precision']}")


def teachers_of(records):
    """A line for each teacher, from the reports of the runs that it taught."""
    names, reports, uniform = {}, {}, {}
    for record in records:
        if record["teacher"]:
            sha256 = record["recipe"]["teacher_sha256"]
            report = record.get("teacher_report")
            names[sha256] = recipes.label(record["teacher"], sha256)
            # runs of older versions have the first number alone
            reports.setdefault(sha256, {"test_top1": record.get("teacher_top1")})
            if report and "images" in report:
                reports[sha256] = report
            if report and "images" in report and not changes_of(record):
                method = recipes.display_name(record["method"])
                uniform.setdefault(sha256, {})[method] = f"{method} {report['uniform_loss']:.2f}"
    lines = []
    for sha256, report in sorted(reports.items()):
        top1 = report["test_top1"]
        line = f"- Teacher {names[sha256]} (SHA-256 of its weights: {sha256[:12]})"
        if top1:
            line += f": {top1:.2f} % of the test images"
        if sha256 in uniform:
            line += (f"; on {report['images']:,} training views {report['train_top1']:.2f} %, cross-entropy "
                     f"{report['train_ce']:.3f}, standard deviation of the logits {report['logit_std']:.2f}; "
                     f"a uniform student's distillation loss: {', '.join(uniform[sha256].values())}")
        lines.append(line)
    return lines


def markdown(records):
    """The teachers' reports, and a table of the rows, without empty columns."""
    cells = cells_of(records)
    rows = [table_row(cell, cells) for cell in cells]
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    lines = ["", *teachers_of(records), ""]
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
        text.append(f"{intro}\n{markdown(group)}")
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
@click.option("--add", "adding", is_flag=True, help="Add the finished runs RUN to the results.")
@click.argument("folders", metavar="[RUN]...", nargs=-1, type=cli.PATH)
@click.option("--list", "list_rows", is_flag=True, help="Print the rows and which are done, and exit.")
def main(folders, pairs, methods, results, readme, table, adding, list_rows, **flags):
    results, readme = Path(results), Path(readme)
    if table:
        write_tables(results, readme)
        return
    if adding or folders:
        if not (adding and folders):
            raise click.UsageError("--add takes the folders of finished runs: --add RUN...")
        split_readme(readme)
        add(folders, results, readme)
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
                click.echo(f"{'done' if is_done(row, records) else '    '}  {row.name}")
            return
        split_readme(readme)        # a missing place for the tables is an error now, not after hours
        run_all(rows, results, readme, device, flags["data_dir"])


# flags that mean what they mean there
PASSED = ("seed", "seeds", "epochs", "train_images", "teacher_checkpoint", "data", "data_dir", "out",
          "device", "precision", "compile")
PLACE = ("device", "data_dir", "out")      # those that only say where
main.params[2:2] = [option for option in train_cifar.main.params if option.name in PASSED]

if __name__ == "__main__":
    main()
