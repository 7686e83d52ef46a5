"""The papers' CIFAR-100 table from one command: command lines of train_cifar.py, their results, the tables.

\b
  python reproduce.py                                     six teachers, then eight pairs, nine methods
  python reproduce.py --pairs resnet32x4-resnet8x4 --methods kd,kd-z --seeds 3
  python reproduce.py --pairs resnet56-resnet8 --epochs 12 --train-images 20000     a short budget
  python reproduce.py --table                             the tables from results/; nothing is run

A row is results/NAME.json, its log results/logs/NAME.jsonl.gz, for teachers a file in checkpoints/. A row
that is there is not run again; one that another process has in hand is left to it: several may share a GPU.
"""

import gzip
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
from checkpoints import load_weights, read_checkpoint, weights_sha256
from data import load_data
from distill import evaluate
from models import create_model
from run import Busy, RunError
from teacher import CHECKPOINTS, find_teacher, load_teacher

ROOT = Path(__file__).resolve().parent
TEACHERS = ("resnet32x4", "wrn_40_2", "resnet56", "resnet110", "vgg13", "ResNet50")
PAIRS = ("resnet32x4-resnet8x4", "resnet32x4-ShuffleV2", "resnet32x4-wrn_16_2", "resnet32x4-wrn_40_2",
         "wrn_40_2-wrn_16_2", "resnet56-resnet20", "resnet110-resnet32", "resnet110-resnet20")
METHODS = ("none", "kd", "kd-z", "dkd", "dkd-z", "mlkd-z", "mlkd-z-released", "ctkd-z", "wttm")
KEPT = ("resnet32x4-resnet8x4", "resnet8x4", *TEACHERS)     # whose students are kept in checkpoints/
LARGEST = 16e6      # bytes of a checkpoint that is kept
NOISE = 0.25        # points: how the last epoch of full-length runs deviates from seed to seed
BEGIN, END = "<!-- made by reproduce.py: begin -->", "<!-- made by reproduce.py: end -->"
# what a recipe that lacks a key means: older records lack the newer keys
DEFAULTS = {"compile": False, "deterministic": False, "exact_teacher": False, "feature": None,
            "feature_weight": None, "precision": "fp32", "student_checkpoint": None, "train_images": None,
            "val_from_train": 0}


class Row(NamedTuple):
    """A command line of train_cifar.py, and what it is resolved to."""
    teacher: str | None
    student: str
    method: str         # as in recipes.NAMES
    seed: int
    arguments: list     # that make the row on any machine
    where: list         # on this one
    recipe: dict
    name: str           # of its result

    @property
    def pair(self):
        return f"{self.teacher}-{self.student}" if self.teacher else self.student

    @property
    def full_length(self):
        return not budget_of(self.recipe)


def options(**values):
    """The words of flags with values; a flag whose value is None is left out."""
    return [word for k, v in values.items() if v is not None for word in (f"--{k.replace('_', '-')}", str(v))]


def rows_of(pairs, methods):
    """(teacher or None, student, method) by pairs, TEACHER-STUDENT or NAME, then methods; each once."""
    rows = {}
    for pair in pairs:
        *teacher, student = pair.split("-")
        for method in methods if teacher else ["none"]:
            rows[teacher[0] if method != "none" else None, student, method] = None
    return list(rows)


def budget_of(recipe):
    """What is shorter than the published recipe, as parts of a name."""
    epochs = [] if recipe["epochs"] == recipe["full_epochs"] else [f"{recipe['epochs']}epochs"]
    return epochs + ([f"{recipe['train_images']}images"] if recipe["train_images"] else [])


def differences(before, now, but=()):
    """Where two recipes differ, keys in `but` aside: ["precision was fp32, now bf16"]."""
    before, now = (DEFAULTS | json.loads(json.dumps(recipe)) for recipe in (before, now))
    return [f"{k} was {before.get(k)}, now {now.get(k)}" for k in before | now
            if k not in but and before.get(k) != now.get(k)]


# ---------------------------------------------------------------- running


class Reproduction:
    """What the rows share: flags, folders, data and teachers."""

    def __init__(self, flags, results, readme):
        self.results, self.readme, self.kept, self.shared = results, readme, KEPT, {}
        self.device = cli.pick_device(flags["device"])
        self.flags = flags | {"precision": cli.pick_precision(flags["precision"], self.device)}
        self.facts = runs.collect_facts(self.device)        # now: files may change while the rows run
        self.teachers = {}      # what train_cifar.py is to be told of each one's file
        self.hashes = {}        # of files of weights

    def row(self, teacher, student, method, seed):
        flags, (name, z, released, feature, entropy) = self.flags, recipes.parse_method(method)
        arguments = options(teacher=teacher, student=student, method=name, feature=feature)
        arguments += ["--zscore"] * z + ["--entropy-weight"] * entropy + ["--recipe", "released"] * released
        arguments += options(teacher_checkpoint=flags["teacher_checkpoint"] if teacher else None, seed=seed,
                             **{k: flags[k] for k in ("epochs", "train_images", "precision")},
                             data=None if flags["data"] == "cifar100" else flags["data"])
        arguments += ["--compile"] * flags["compile"]
        where = options(**{k: flags[k] for k in ("device", "data_dir", "teacher_url")})
        recipe, folder = train_cifar.resolve_arguments([*arguments, *where])
        parts = ["released"] * released + budget_of(recipe)
        where += options(out=Path(flags["out"], *parts))
        return Row(teacher, student, method, seed, arguments, where, recipe, "-".join([folder, *parts]))

    def done(self, row):
        """Whether a row's result is there; RunError for another recipe's, or another teacher's."""
        path, recipe = self.results / f"{row.name}.json", row.recipe
        if not path.exists():
            return False
        file = self.flags["teacher_checkpoint"] or local_teacher(row.teacher)
        if row.teacher and file:
            recipe = recipe | {"teacher_sha256": self.sha256(row.teacher, file)}
        differ = differences(load_record(path)["recipe"], recipe, () if file else ("teacher_sha256",))
        if differ:
            raise RunError(f"{path} is of another recipe ({'; '.join(differ)}): choose other --results and "
                           "--out, or remove it")
        return True

    def run(self, row):
        """Runs a row, or finds its run finished, and writes its result and the tables."""
        more = self.teacher(row) if row.teacher else []
        _, result, folder, teacher = train_cifar.run([*row.arguments, *more, *row.where], self.shared)
        if teacher:
            self.check_teacher(row, teacher.sha256, teacher.source)
        config = json.loads((folder / "config.json").read_text())
        begun, ended = ({k: v for k, v in x.items() if k != "command"} for x in (config["facts"], self.facts))
        record = {"teacher": row.teacher, "student": row.student, "method": row.method, "seed": row.seed,
                  **{k: result[k] for k in ("last", "best", "best_chosen_on", "epochs", "minutes", "img_s",
                                            "parameters", "macs") if k in result},
                  "full_length": row.full_length, "teacher_top1": teacher and teacher.top1,
                  "teacher_source": teacher and teacher.source,
                  "command": shlex.join(["python", "train_cifar.py", *row.arguments, *more]), "facts": begun,
                  **({} if ended.items() <= begun.items() else {"went_on_with": ended}),
                  "recipe": config["recipe"]}
        if (row.full_length and row.recipe["data"] == "cifar100" and row.seed == 0
                and row.pair in self.kept and not row.recipe.get("feature")):
            data = load_data("cifar100", self.flags["data_dir"], self.device)
            click.echo(keep(row, record, folder, data, self.device))
        with runs.disk_errors(self.results):      # the JSON, which says that a row is done, last
            (self.results / "logs").mkdir(parents=True, exist_ok=True)
            log = gzip.compress((folder / "log.jsonl").read_bytes(), mtime=0)
            replace(self.results / "logs" / f"{row.name}.jsonl.gz", log)
            replace(self.results / f"{row.name}.json", to_json(record))
        write_tables(self.results, self.readme)

    def teacher(self, row):
        """What train_cifar.py is to be told of a teacher's file. One that is missing is trained first."""
        if row.teacher not in self.teachers:
            path, more = self.flags["teacher_checkpoint"], []
            if not path and row.recipe["data"] == "cifar100":
                path, reason = find_teacher(row.teacher, None, self.flags["teacher_url"], click.echo)
                if path is None:
                    click.echo(f"{reason}; training {row.teacher} here first")
                    path = self.train_teacher(row.teacher)
                    more = [] if path.parent == CHECKPOINTS else options(teacher_checkpoint=path)
            if path:
                self.check_teacher(row, self.sha256(row.teacher, path), path)
            self.teachers[row.teacher] = more
        return self.teachers[row.teacher]

    def train_teacher(self, name):
        """The file of a teacher trained as a row of its own, at full length whatever the budget."""
        flags = self.flags | {"epochs": None, "train_images": None}
        alone = Reproduction(flags, self.results, self.readme)
        alone.kept, alone.shared = [*self.kept, name], self.shared
        row = alone.row(None, name, "none", 0)
        run_all([row], alone)
        for path in (CHECKPOINTS / f"{name}.pt", Path(flags["out"], row.name, "student.pt")):
            if path.exists():
                return path
        if not alone.done(row):
            raise Busy(f"{name} is being trained")
        # its result is there, its weights are not
        return train_cifar.run([*row.arguments, *row.where], self.shared)[2] / "student.pt"

    def sha256(self, name, path):
        """The hash of a teacher's weights in a file, read once."""
        if path not in self.hashes:
            network = create_model(name)
            load_weights(network, path, prefer="teacher")
            self.hashes[path] = weights_sha256(network)
        return self.hashes[path]

    def check_teacher(self, row, sha256, source):
        """RunError where rows of the same table were taught by another one."""
        budget = row.recipe["data"], *budget_of(row.recipe)
        before = {r["recipe"]["teacher_sha256"]: r["teacher_source"] for r in load_records(self.results)
                  if r["teacher"] == row.teacher and (r["recipe"]["data"], *budget_of(r["recipe"])) == budget}
        if before and sha256 not in before:
            raise RunError(f"{self.results} has rows taught by another {row.teacher} "
                           f"({', '.join(before.values())}) than {source}: name that one with "
                           "--teacher-checkpoint, or choose other --results")


def local_teacher(name):
    """The file that would be taken for a teacher without a download, or None."""
    places = (f"{name}.pt", f"mdistiller/{name}.pth", f"pytorch-cifar-models/{name}.pt")
    return next((CHECKPOINTS / place for place in places if (CHECKPOINTS / place).is_file()), None)


def run_all(rows, shared):
    """Every row that is not done, for a Reproduction; whether there was one.

    RunError at the end, when some could not be run.
    """
    problems, again, ran = [], True, False
    while again:        # once more when a row that was in another's hands may be free by now
        again, elsewhere, awaited = False, [], set()
        for row in rows:
            try:
                if row.name in problems or shared.done(row):
                    continue
                if row.teacher in awaited:      # another teacher than the awaited one is not taken meanwhile
                    raise Busy(f"{row.teacher} is being trained")
                click.echo(f"\n{row.name}")
                shared.run(row)
                again = ran = True
            except Busy:
                elsewhere.append(row.name)
                if row.method == "none" and row.full_length and not shared.flags["teacher_checkpoint"]:
                    awaited.add(row.student)
            except (RunError, click.UsageError, ValueError, torch.OutOfMemoryError) as error:
                click.echo(f"{row.name}: {runs.first_line(error)}", err=True)
                problems.append(row.name)
        again = again and bool(elsewhere)
    if elsewhere:
        click.echo(f"in another process's hands: {', '.join(elsewhere)}")
    if problems:
        raise RunError(f"{len(problems)} of {len(rows)} rows could not be run: {', '.join(problems)}; "
                       "their reasons are above")
    return ran or bool(elsewhere)


def to_json(record):
    return (json.dumps(runs.rounded(record), indent=2) + "\n").encode()


def replace(path, content):
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def keep(row, record, folder, data, device):
    """Keeps a row's student as float16 weights with a model card (JSON) in checkpoints/; returns a line.

    Weights of 16 MB and more, and those whose accuracy float16 changes by more than 0.02 points, are left
    out; the card stays. A file that is there already is not touched: rows may have been taught by it.
    """
    name = row.student if row.teacher is None else f"{row.pair}-{row.method}"
    path, card = CHECKPOINTS / f"{name}.pt", CHECKPOINTS / f"{name}.json"
    if path.exists() and card.exists():
        return f"{path} is there already and stays"
    content = read_checkpoint(folder / "student.pt")
    half = {k: v.half() if v.is_floating_point() else v for k, v in content["model"].items()}
    partial, top1 = CHECKPOINTS / f"{name}.{os.getpid()}.part", []
    cli.set_backends(deterministic=False)       # in float32, whatever the row's own precision was
    with runs.disk_errors(CHECKPOINTS):
        CHECKPOINTS.mkdir(exist_ok=True)
        runs.write_checkpoint(partial, content | {"model": half})       # and its facts, for export.py
        try:
            for file in (folder / "student.pt", partial):       # by the same arithmetic: float32
                student = load_teacher(create_model(row.student), file, device, prefer="student")
                batches = train_cifar.evaluation(data.test, data.pixels)
                top1.append(evaluate(student.logits, batches)["top1"])
            size, same = partial.stat().st_size, abs(top1[1] - top1[0]) <= 0.02
            shown = {k: record[k] for k in ("command", "seed", "last", "best", "best_chosen_on", "facts")}
            shown |= {"float32_top1": top1[0], "float16_top1": top1[1], "float16_bytes": size}
            replace(card, to_json(shown))
            line = f"{path}: {size / 1e6:.1f} MB, {top1[0]:.2f} %, {top1[1]:.2f} % in float16"
            if path.exists() or size >= LARGEST or not same:
                return f"{line}: only its card is written"
            os.replace(partial, path)
            return f"{line}: kept"
        finally:
            partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- the tables


def load_record(path):
    """One row's result; RunError for a file that is not one."""
    try:
        record = json.loads(path.read_text())
        for key in ("teacher", "student", "seed", "epochs", "full_length", "teacher_top1", "teacher_source"):
            record[key]
        record["last"]["top1"] + record["best"]["top1"] + record["minutes"]
        record["facts"]["device"], record["recipe"]["data"], record["method"] + record["command"]
        if record["method"].endswith("-released"):      # older records do not contain it
            record["recipe"]["source"] = "released"
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is not a row's result; remove it") from None


def load_records(results):
    """All rows of a results folder."""
    return [load_record(path) for path in sorted(Path(results).glob("*.json"))]


def cells_of(records):
    """(teacher, student, method) -> its records by seed. RunError where their recipes differ."""
    cells = {}
    for record in records:
        cell = cells.setdefault((record["teacher"], record["student"], record["method"]), {})
        for other in cell.values():
            differ = differences(other["recipe"], record["recipe"], ("seed",))
            if differ:
                raise RunError(f"seeds {other['seed']} and {record['seed']} of {record['command']} differ: "
                               f"{'; '.join(differ)}. No mean is taken; move one out of the results")
        cell[record["seed"]] = record
    return cells


def spread(values, sign=""):
    """Mean ± standard deviation (of a sample, n - 1), and n."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation} (n = {len(values)})"


def verdict(values, others, full_length):
    """What RULE calls `values` beside as many `others`."""
    n, difference = len(values), statistics.mean(values) - statistics.mean(others)
    if n > 1:
        error = ((statistics.variance(values) + statistics.variance(others)) / n) ** 0.5
    else:
        error = NOISE * 2 ** 0.5 if full_length else float("inf")
    return "within noise" if abs(difference) <= 2 * error else "better" if difference > 0 else "worse"


RULE = f"""\
Δ of Z is taken over the seeds that were run with and without Z, with one teacher, precision and compilation.
It is called better or worse where it exceeds twice its standard error, from the sample deviations of the two
cells. One seed gives no deviation: a full-length run is then taken to deviate by {NOISE} points, as such runs
are known to, and a short one is within noise."""
FLOAT32 = """\
The last epoch is evaluated from the kept students by `--eval` in float32 (the KD+Z student is kept in
float16); the best epoch is the log's, in bfloat16."""
HEAD = ("pair", "method", "last epoch, top-1", "best, chosen on test", "paper", "authors' log, last epoch",
        "Δ of Z", "paper's Δ", "as deployed", "minutes", "device", "`python train_cifar.py`, with `--seed`")


def last_top1(record):
    """Top-1 of the last epoch; that of the kept student in float32, where training evaluated in bfloat16."""
    return record.get("float32", record["last"])["top1"]


def table_row(key, cells):
    """One line of a table; "" where there is nothing to say."""
    (teacher, student, method), cell = key, cells[key]
    (name, z, _, feature, entropy), record = recipes.parse_method(method), next(iter(cell.values()))
    plain = cells.get((teacher, student, method.replace("-z", "")), {}) if z else {}
    alike = ("teacher_sha256", "precision", "compile")      # the two methods' recipes differ anyway
    seeds = [s for s in cell if s in plain and not differences(
        *({k: c[s]["recipe"][k] for k in alike if k in c[s]["recipe"]} for c in (plain, cell)))]
    last = [[last_top1(c[s]) for s in seeds] for c in (cell, plain)]
    gain = [a - b for a, b in zip(*last)]
    more = {"feature": feature, "entropy": entropy}
    published, baseline = (recipes.published(teacher, student, name, on, **more) for on in (z, False))
    logged = recipes.logged(teacher, student, name, z, **more)
    deployed = (f"{record['parameters']:,} parameters, {record['macs'] / 1e6:.1f} M multiply-accumulates"
                if feature == "simkd" else "")
    minutes = [r["minutes"] for r in cell.values() if not r.get("background")]      # they hold waiting
    devices = {f"{d['device']}, {d['threads']} thread{'s'[:d['threads'] - 1]}" if d["device"].endswith("cpu")
               else d["device"] for d in (r["facts"] for r in cell.values())}
    command = re.sub(" --seed [0-9]+", "", record["command"].removeprefix("python train_cifar.py "))
    return [f"{teacher} → {student}" if teacher else student,
            recipes.display_name(method),
            spread([last_top1(r) for r in cell.values()]), spread([r["best"]["top1"] for r in cell.values()]),
            f"{published:.2f}" if published else "", f"{logged:.2f}" if logged else "",
            f"{spread(gain, '+')}, {verdict(*last, record['full_length'])}" if gain else "",
            f"{published - baseline:+.2f}" if z and published and baseline else "", deployed,
            f"{statistics.mean(minutes):.1f}" if minutes else "", ", ".join(sorted(devices)), f"`{command}`"]


def markdown(records):
    """Which teachers taught, and a table of the rows, without columns that have nothing to say."""
    cells = cells_of(records)
    pairs = [*TEACHERS, *PAIRS, *(f"{teacher}-{student}" for teacher, student, _ in cells if teacher)]
    order = dict.fromkeys([*rows_of(pairs, recipes.NAMES), *cells])
    rows = [table_row(key, cells) for key in order if key in cells]
    used = [i for i in range(len(HEAD)) if any(row[i] for row in rows)]
    teachers = {(r["teacher"], r["teacher_source"], r["teacher_top1"], r["recipe"]["teacher_sha256"])
                for r in records if r["teacher"]}
    said = [f"Teacher {name}: {source}, {top1:.2f} %, SHA-256 of its weights {sha[:12]}..."
            for name, source, top1, sha in sorted(teachers)]
    lines = [" | ".join(row[i] or "–" for i in used) for row in (HEAD, ["---"] * len(HEAD), *rows)]
    return "\n".join([" ".join(said), "", *(f"| {line} |" for line in lines), ""])


def tables(records):
    """Markdown of all rows, a table for each budget; full length last."""
    budgets, text = {}, []
    for record in records:
        recipe = record["recipe"]
        full = record["full_length"] and recipe["data"] == "cifar100"
        budget = () if full else (recipe["data"], record["epochs"], recipe.get("train_images") or 0)
        budgets.setdefault((full, *budget), []).append(record)
    for (full, *budget), group in sorted(budgets.items()):
        if full:
            said = " " + FLOAT32 if any("float32" in record for record in group) else ""
            text.append(f"**Full length, as in the papers: {len(cells_of(group))} rows.**{said} "
                        + markdown(group))
            continue
        (data, epochs, images), real = budget, budget[0] == "cifar100"
        timed = [r["minutes"] for r in group if not r.get("background")]
        of = "" if len(timed) == len(group) else f"{len(timed)} of "
        text.append(
            f"**A short budget: {epochs} epochs on {f'{images:,}' if images else 'all'} training images"
            f"{'' if real else f' of {data}'}, {cli.duration(60 * sum(timed))} for {of}the {len(group)} "
            f"runs.** It shows that the machinery works{' on real images' * real}, not the paper's ranking. "
            + markdown(group))
    return "\n".join(text + [RULE] * any("Δ of Z" in part for part in text)).strip()


def list_line(row, shared):
    """A row in --list: whether it is done, or why its result is not the row's."""
    try:
        return f"{'done' if shared.done(row) else '    '}  {row.name}"
    except (RunError, ValueError) as error:
        return f"      {row.name}: {runs.first_line(error)}"


def split_readme(readme):
    """What is before and after the tables in a file; RunError where it has no place for them."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{readme} has no place for the tables: it must hold the lines {BEGIN} and {END}, "
                       "once each")
    return text.split(BEGIN)[0], text.split(END)[1]


def write_tables(results, readme):
    """Puts the tables between the marks of a file."""
    before, after = split_readme(readme)
    with runs.disk_errors(readme.parent):
        replace(readme, f"{before}{BEGIN}\n{tables(load_records(results))}\n{END}{after}".encode())


# ---------------------------------------------------------------- the command


@click.command(cls=cli.Command, help=__doc__)
@click.option("--pairs", metavar="T-S,...", help="TEACHER-STUDENT, or a network.  [default: six and eight]")
@click.option("--methods", metavar="M,...", help=f"[default: {','.join(METHODS)}]")
@click.option("--results", metavar="DIR", default=ROOT / "results", type=cli.UserPath(path_type=Path),
              help="[default: results/ here]")
@click.option("--readme", metavar="FILE", default=ROOT / "RESULTS.md", type=cli.UserPath(path_type=Path),
              help="File of the tables.  [default: RESULTS.md here]")
@click.option("--table", is_flag=True, help="Only rewrite the tables from the results.")
@click.option("--list", "list_rows", is_flag=True, help="Print the rows and which are done, and exit.")
def main(pairs, methods, results, readme, table, list_rows, **flags):
    if table:
        write_tables(results, readme)
        return
    pairs = pairs.split(",") if pairs else [*TEACHERS, *PAIRS]
    methods = methods.split(",") if methods else METHODS
    for pair in pairs:
        if pair.count("-") > 1:
            raise click.UsageError(f"--pairs {pair}: a pair is TEACHER-STUDENT, for instance {PAIRS[0]}")
    for method in methods:
        if method not in recipes.NAMES:
            nearest = cli.suggest(method, list(recipes.NAMES))
            raise click.UsageError(f"--methods {method}: known, the nearest first: {nearest}")
    if flags["teacher_checkpoint"] and len({pair.split("-")[0] for pair in pairs if "-" in pair}) != 1:
        raise click.UsageError("--teacher-checkpoint is one teacher's: name its pairs alone in --pairs")
    with cli.friendly_errors():
        shared = Reproduction(flags, results, readme)
        seeds = range(flags["seed"], flags["seed"] + flags["seeds"])
        rows = [shared.row(*row, seed) for seed in seeds for row in rows_of(pairs, methods)]
        if list_rows:
            for row in rows:
                click.echo(list_line(row, shared))
            return
        split_readme(readme)        # a missing place for the tables is an error now, not after hours
        if not run_all(rows, shared):
            click.echo(f"nothing to run: all rows are in {results} already")


# flags that mean what they mean there
PASSED = ("seed", "seeds", "epochs", "train_images", "teacher_checkpoint", "teacher_url", "data", "data_dir",
          "out", "device", "precision", "compile")
main.params[2:2] = [option for option in train_cifar.main.params if option.name in PASSED]

if __name__ == "__main__":
    main()
