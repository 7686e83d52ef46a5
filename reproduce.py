"""The paper's CIFAR-100 table from one command: many runs of train_cifar.py, their results, the README's tables.

\b
  python reproduce.py                                            six teachers, then eight pairs, nine methods, one seed
  python reproduce.py --pairs resnet32x4-resnet8x4 --methods kd,kd-z --seeds 3
  python reproduce.py --pairs resnet56-resnet8 --epochs 12 --train-images 20000      a short budget, in a table of its own
  python reproduce.py --table                                    the README's tables from results/; nothing is run

A run is results/NAME.json, its log results/logs/NAME.jsonl.gz, and for teachers a file in checkpoints/. Stopped at any moment, the same command goes on; what
is finished is not run again. A row that another process has in hand is left to it, so that several may share one GPU.
"""

import gzip
import json
import os
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import click
import torch

import recipes
import cli
import run as runs
import train_cifar
from data import load_data
from models import MODELS, create_model, load_weights, weights_sha256
from weights import read_checkpoint
from run import Busy, RunError
from teacher import CHECKPOINTS, Teacher

ROOT = Path(__file__).resolve().parent
TEACHERS = ("resnet32x4", "wrn_40_2", "resnet56", "resnet110", "vgg13", "ResNet50")
PAIRS = ("resnet32x4-resnet8x4", "resnet32x4-ShuffleV2", "resnet32x4-wrn_16_2", "resnet32x4-wrn_40_2", "wrn_40_2-wrn_16_2",
         "resnet56-resnet20", "resnet110-resnet32", "resnet110-resnet20")
METHODS = ("none", "kd", "kd-z", "dkd", "dkd-z", "mlkd-z", "mlkd-z-released", "ctkd-z", "wttm")
KNOWN_METHODS = ("none", *(f"{c}{r}" for c in recipes.COLUMNS for r in ("", "-released")))
KEPT_PAIR = "resnet32x4-resnet8x4"      # its students are kept in checkpoints/, like the teachers
LARGEST = 16e6      # bytes of a checkpoint that is kept
BEGIN, END = "<!-- made by reproduce.py: begin -->", "<!-- made by reproduce.py: end -->"


class Row(NamedTuple):
    teacher: str | None
    student: str
    method: str         # as in KNOWN_METHODS

    @property
    def pair(self):
        return f"{self.teacher}-{self.student}" if self.teacher else self.student

    def flags(self):
        """The row in train_cifar.py's words."""
        name, *rest = self.method.split("-")
        return {"teacher": self.teacher, "student": self.student, "method": name, "zscore": "z" in rest,
                "recipe": "released" if "released" in rest else "authors"}


def rows_of(pairs, methods):
    """Rows in the order of pairs, then methods. A pair is TEACHER-STUDENT, or one network alone; a student alone counts once."""
    rows = []
    for pair in pairs:
        *teacher, student = pair.split("-")
        for method in methods if teacher else ["none"]:
            rows.append(Row(teacher[0] if teacher and method != "none" else None, student, method))
    return list(dict.fromkeys(rows))


# ---------------------------------------------------------------- running


def is_full(recipe):
    return recipe["epochs"] == recipe["full_epochs"] and recipe["train_images"] is None


def budget_of(recipe):
    """What is shorter than the published recipe, as parts of a name."""
    epochs = [] if recipe["epochs"] == recipe["full_epochs"] else [f"{recipe['epochs']}epochs"]
    return epochs + ([f"{recipe['train_images']}images"] if recipe["train_images"] else [])


def command_of(row, recipe, teacher_checkpoint=None):
    """The command that makes this row alone, on any machine: with all that a recipe and a machine may decide otherwise."""
    words = ["python train_cifar.py"]
    for name, value in row.flags().items():
        if name == "zscore":
            words += ["--zscore"] * value
        elif value is not None and (name, value) != ("recipe", "authors"):
            words.append(f"--{name} {value}")
    given = {"teacher_checkpoint": teacher_checkpoint if row.teacher else None, "seed": recipe["seed"],
             "epochs": None if recipe["epochs"] == recipe["full_epochs"] else recipe["epochs"], "train_images": recipe["train_images"],
             "precision": recipe["precision"], "data": None if recipe["data"] == "cifar100" else recipe["data"]}
    words += [f"--{k.replace('_', '-')} {v}" for k, v in given.items() if v is not None]
    return " ".join(words + ["--compile"] * recipe["compile"])


class Reproduction:
    """What the rows share: the data, and each teacher with its remembered answers."""

    def __init__(self, flags, device, results, readme):
        self.device, self.teachers, self.data, self.results, self.readme = device, {}, None, results, readme
        self.flags = dict.fromkeys(p.name for p in train_cifar.main.params) | {
            "deterministic": False, "val_from_train": 0, "save_every": 60, "capture": True, "teacher_memory": True,
            "exact_teacher": False, "dry_run": False} | flags
        self.facts = runs.collect_facts(device)     # now: the files may change while the rows run
        self.named = None       # the hash of --teacher-checkpoint
        self.kept = {KEPT_PAIR, KEPT_PAIR.split("-")[1], *TEACHERS}     # whose weights go to checkpoints/

    def recipe(self, row, seed):
        """(the row's resolved recipe, lines to print, its name)."""
        recipe, lines = train_cifar.resolve(self.flags | row.flags(), self.device)
        recipe["seed"] = seed
        released = ["released"] if "released" in row.method else []
        return recipe, lines, "-".join([train_cifar.run_name(recipe), *released, *budget_of(recipe)])

    def done(self, path, recipe):
        """Whether a row's result is there; RunError where it is another recipe's, or another teacher's than the named one."""
        if not path.exists():
            return False
        before = load_record(path)["recipe"]
        if recipe["teacher"] and self.flags["teacher_checkpoint"]:
            if self.named is None:
                network = create_model(recipe["teacher"])
                load_weights(network, self.flags["teacher_checkpoint"], prefer="teacher")
                self.named = weights_sha256(network)
            recipe = recipe | {"teacher_sha256": self.named}
        now = json.loads(json.dumps(recipe))
        differ = [f"{k} was {before.get(k)}, now {v}" for k, v in now.items() if before.get(k) != v]
        if differ:
            raise RunError(f"{path} is of another recipe ({'; '.join(differ)}): choose other --results and --out, or remove it")
        return True

    def run(self, row, recipe):
        """Trains a row, or finds it trained. Returns its record and its run's folder."""
        flags = self.flags | row.flags()
        self.data = self.data or load_data(flags["data"], flags["data_dir"], self.device, train_images=flags["train_images"])
        teacher, top1 = self.teacher(recipe, flags) if row.teacher else (None, None)
        out = Path(flags["out"], *(["released"] if "released" in row.method else []), *budget_of(recipe))
        result, folder = train_cifar.distil(recipe, self.data, teacher, flags | {"out": str(out)}, self.device)
        config = json.loads((folder / "config.json").read_text())
        facts = [{k: v for k, v in x.items() if k != "command"} for x in (config["facts"], self.facts)]     # begun with, ended with
        return {"teacher": row.teacher, "student": row.student, "method": row.method, "seed": recipe["seed"],
                **{k: result[k] for k in ("last", "best", "best_chosen_on", "epochs", "minutes", "img_s")},
                "full_length": is_full(recipe), "teacher_top1": top1, "teacher_source": teacher and teacher.source,
                "command": command_of(row, recipe, flags["teacher_checkpoint"]), "facts": facts[0],
                **({"went_on_with": facts[1]} if facts[0] != facts[1] else {}), "recipe": config["recipe"]}, folder

    def teacher(self, recipe, flags):
        """(the Teacher of a row, trained here first where there is none, its top-1); once for all rows that have it."""
        name = recipe["teacher"]
        if name not in self.teachers:
            teacher = train_cifar.get_teacher(recipe, self.data, flags, self.device, self.train_teacher)
            before = {r["recipe"]["teacher_sha256"]: r["teacher_source"] for r in load_records(self.results) if r["teacher"] == name
                      and (r["recipe"]["data"], *budget_of(r["recipe"])) == (recipe["data"], *budget_of(recipe))}
            if before and teacher.sha256 not in before:     # rows of two teachers would stand beside each other
                raise RunError(f"{self.results} has rows taught by another {name} ({', '.join(before.values())}) than {teacher.source}: "
                               "name that one with --teacher-checkpoint, or choose other --results")
            top1, line = teacher.check(self.data.test, recipes.ALONE.get(name) if flags["data"] == "cifar100" else None)
            click.echo(line)
            self.teachers[name] = teacher, top1
        return self.teachers[name]

    def train_teacher(self, recipe, flags, device):
        """A missing teacher's file: of its own row, at full length whatever the budget, which is recorded and kept like any."""
        if recipe["data"] != "cifar100":
            return train_cifar.train_teacher(recipe, flags, device)
        shared = Reproduction(self.flags | {"epochs": None, "train_images": None}, device, self.results, self.readme)
        row = Row(None, recipe["teacher"], "none")
        shared.kept.add(row.student)
        run_all([(row, 0)], shared)
        alone, _, name = shared.recipe(row, 0)
        for path in (CHECKPOINTS / f"{row.student}.pt", Path(flags["out"]) / name / "student.pt"):
            if path.exists():
                return path
        if shared.done(self.results / f"{name}.json", alone):       # a result without its weights
            return train_cifar.train_teacher(recipe, flags, device)
        raise Busy(f"{row.student} is being trained")


def record_row(record, folder, results, name):
    """results/NAME.json and results/logs/NAME.jsonl.gz; the JSON, which says that a row is done, last."""
    with runs.explained(results):
        (results / "logs").mkdir(parents=True, exist_ok=True)
        log = gzip.compress((folder / "log.jsonl").read_bytes(), mtime=0)
        replace(results / "logs" / f"{name}.jsonl.gz", log)
        replace(results / f"{name}.json", (json.dumps(runs.rounded(record), indent=2) + "\n").encode())


def replace(path, content):
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def keep(row, record, folder, data, device):
    """A teacher, or a student of KEPT_PAIR, as float16 weights with a model card (JSON) in checkpoints/; returns a line to print.

    Weights of 16 MB and more, and those whose accuracy float16 changes by more than 0.02 points, are left out; the card stays. A file
    that is there already is not touched: rows may have been taught by it.
    """
    name = row.student if row.teacher is None else f"{row.pair}-{row.method}"
    path, card = CHECKPOINTS / f"{name}.pt", CHECKPOINTS / f"{name}.json"
    weights = {k: v.half() if v.is_floating_point() else v for k, v in read_checkpoint(folder / "student.pt")["model"].items()}
    with runs.explained(CHECKPOINTS):
        CHECKPOINTS.mkdir(exist_ok=True)
        if path.exists() and card.exists():
            return f"{path} is there already and stays"
        partial = runs.write_checkpoint(CHECKPOINTS / f"{name}.{os.getpid()}.part", {"model": weights, "student": row.student})
        try:
            top1 = []       # as trained and as kept, by the same arithmetic: float32
            for file in (folder / "student.pt", partial):
                network = create_model(row.student)
                load_weights(network, file)
                top1.append(Teacher(network, device).evaluate(data.test)["top1"])
            size, same = partial.stat().st_size, abs(top1[1] - top1[0]) <= 0.02
            replace(card, (json.dumps(runs.rounded(
                {k: record[k] for k in ("command", "seed", "last", "best", "best_chosen_on", "facts")}
                | {"float32_top1": top1[0], "float16_top1": top1[1], "float16_bytes": size}), indent=2) + "\n").encode())
            if path.exists():
                return f"{path} is there already and stays; its card was written"
            if size >= LARGEST or not same:
                return f"{name}: {size / 1e6:.1f} MB, {top1[0]:.2f} %, {top1[1]:.2f} % in float16: only its card is kept"
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return f"kept {path}, {top1[1]:.2f} % in float16"


# ---------------------------------------------------------------- the tables


def load_record(path):
    """One row's result; RunError for a file that is not one."""
    try:
        record = json.loads(path.read_text())
        for key in ("teacher", "student", "seed", "epochs", "full_length", "minutes", "teacher_top1", "teacher_source", "command"):
            record[key]
        record["last"]["top1"] + record["best"]["top1"], record["facts"]["device"], record["recipe"]["data"]
        Row(None, "", record["method"]).flags()
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is not a row's result; remove it") from None


def load_records(results):
    """All rows of a results folder."""
    return [load_record(path) for path in sorted(Path(results).glob("*.json"))]


def cells_of(records):
    """Row -> its records by seed. RunError where the seeds of one cell were run by different recipes."""
    cells = {}
    for record in records:
        cell = cells.setdefault(Row(record["teacher"], record["student"], record["method"]), {})
        for other in cell.values():
            differ = [k for k in record["recipe"] | other["recipe"] if k != "seed" and record["recipe"].get(k) != other["recipe"].get(k)]
            if differ:
                raise RunError(f"seeds {other['seed']} and {record['seed']} of {record['command']} differ in {', '.join(differ)}: no "
                               "mean is taken over them; move one of them out of the results")
        cell[record["seed"]] = record
    return cells


def spread(values, sign=""):
    """Mean ± standard deviation (of a sample, n - 1), and n."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation} (n = {len(values)})"


def device_of(facts):
    return facts["device"] + (f", {facts['threads']} threads" if facts["device"].endswith("cpu") else "")


def table_row(row, cells):
    """One line of a table. A cell that has not been run is empty."""
    flags = row.flags()
    names = (row.teacher, row.student, flags["method"], flags["zscore"])
    published, logged = (f"{v:.2f}" if v else "" for v in (recipes.published(*names), recipes.logged(*names)))
    pair = f"{row.teacher} → {row.student}" if row.teacher else row.student
    method = flags["method"].upper() + "+Z" * flags["zscore"] + ", released" * (flags["recipe"] == "released")
    cell = cells.get(row, {})
    if not cell:
        return [pair, "alone" if row.teacher is None else method, "", "", published, logged, "", "", "", ""]
    plain = cells.get(row._replace(method=row.method.replace("-z", "")), {}) if flags["zscore"] else {}
    alike = ("teacher_sha256", "precision", "compile")      # the recipes differ anyway
    delta = [cell[s]["last"]["top1"] - plain[s]["last"]["top1"] for s in sorted(cell.keys() & plain.keys())
             if all(cell[s]["recipe"].get(k) == plain[s]["recipe"].get(k) for k in alike)]
    shown = list(cell.values())
    return [pair, "alone" if row.teacher is None else method, spread([r["last"]["top1"] for r in shown]),
            spread([r["best"]["top1"] for r in shown]), published, logged, spread(delta, "+") if delta else "",
            f"{statistics.mean(r['minutes'] for r in shown):.1f}", ", ".join(sorted({device_of(r["facts"]) for r in shown})),
            "`" + re.sub(" --seed [0-9]+", "", shown[0]["command"].removeprefix("python train_cifar.py ")) + "`"]


HEAD = ["pair", "method", "last epoch, top-1", "best, chosen on test", "paper", "authors' log, last epoch", "Δ of Z", "minutes",
        "device", "`python train_cifar.py`, with `--seed`"]


def teachers_of(records):
    """Which teachers taught the rows, a sentence."""
    teachers = {(r["teacher"], r["teacher_source"], f"{r['teacher_top1']:.2f} %", r["recipe"]["teacher_sha256"][:12]) for r in records if r["teacher"]}
    return "".join(f"Teacher {name}: {source}, {top1}, SHA-256 of its weights {sha}... " for name, source, top1, sha in sorted(teachers)).strip()


def tables(records):
    """Markdown of all rows, a table for each budget; full length, also where nothing has been run yet, last."""
    short = {}
    for record in records:
        if not (record["full_length"] and record["recipe"]["data"] == "cifar100"):
            short.setdefault((record["recipe"]["data"], record["epochs"], record["recipe"]["train_images"]), []).append(record)
    text = []
    for (data, epochs, images), group in sorted(short.items(), key=str):
        cells = cells_of(group)
        pairs = dict.fromkeys(row.pair for row in cells if row.teacher)
        methods = [*METHODS, *sorted({row.method for row in cells} - set(METHODS))]
        rows = list(dict.fromkeys([*rows_of(pairs, methods), *cells]))
        seconds = sum(60 * r["minutes"] for r in group)
        text += [f"**A short budget: {epochs} epochs on {f'{images:,}' if images else 'all'} training images"
                 f"{'' if data == 'cifar100' else ' of ' + data}, {cli.duration(seconds)} for the {len(group)} runs.** It shows that the "
                 f"machinery works{' on real images' * (data == 'cifar100')}, not the paper's ranking. {teachers_of(group)}", "", *markdown([table_row(row, cells) for row in rows]), ""]
    full = cells_of([r for r in records if r["full_length"] and r["recipe"]["data"] == "cifar100"])
    rows = list(dict.fromkeys([*rows_of([*TEACHERS, *PAIRS], METHODS), *full]))
    lines = markdown([table_row(row, full) for row in rows])
    title = f"Full length, as in the papers: {len(full.keys() & set(rows))} of {len(rows)} rows have been run"
    text += ([f"**{title}.** {teachers_of([r for cell in full.values() for r in cell.values()])}", "", *lines] if full else
             [f"<details><summary>{title}; the published numbers wait beside the empty places.</summary>", "", *lines, "", "</details>"])
    return "\n".join(text)


def markdown(rows):
    return ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]


def write_tables(results, readme):
    """Puts the tables between the marks of a README."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise RunError(f"{readme} has no place for the tables: it must hold the lines {BEGIN} and {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with runs.explained(readme.parent):
        replace(readme, f"{before}{BEGIN}\n{tables(load_records(results))}\n{END}{after}".encode())


# ---------------------------------------------------------------- the command


def check_usage(flags):
    """The pairs and methods of the flags, as lists of known names."""
    pairs = flags["pairs"].split(",") if flags["pairs"] else [*TEACHERS, *PAIRS]
    methods = flags["methods"].split(",") if flags["methods"] else METHODS
    for pair in pairs:
        if pair.count("-") > 1:
            raise click.UsageError(f"--pairs {pair}: a pair is TEACHER-STUDENT, for instance {PAIRS[0]}")
        for network in pair.split("-"):
            cli.check_name("--pairs", network, [name for name in MODELS if name != "MobileNetV1"])
    for method in methods:
        if method not in KNOWN_METHODS:
            raise click.UsageError(f"--methods {method}: known, the nearest first: {cli.nearest_first(method, list(KNOWN_METHODS))}")
    if flags["teacher_checkpoint"] and len({pair.split("-")[0] for pair in pairs if "-" in pair}) != 1:
        raise click.UsageError("--teacher-checkpoint is one teacher's: name pairs with that teacher alone in --pairs")
    return pairs, methods


@click.command(cls=cli.Command, help=__doc__)
@click.option("--pairs", metavar="T-S,...", help="TEACHER-STUDENT, or a network alone.  [default: the teachers and eight pairs]")
@click.option("--methods", metavar="M,...", help=f"Of {', '.join(KNOWN_METHODS[:4])}, ...  [default: {','.join(METHODS)}]")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="First seed.")
@click.option("--seeds", type=cli.COUNT, default=1, show_default=True, help="Number of seeds; all rows of one before the next.")
@click.option("--epochs", type=cli.COUNT, help="A shorter budget.  [default: recipe]")
@click.option("--train-images", type=cli.COUNT, metavar="N", help="Train on the first N images of a fixed shuffle.")
@click.option("--teacher-checkpoint", metavar="FILE", help="The teacher's weights.")
@click.option("--teacher-url", default=train_cifar.ARCHIVE_URL, envvar="TEACHER_URL", metavar="URL",
              help="Archive of mdistiller's teachers, or a mirror of it (also TEACHER_URL).")
@click.option("--data", type=cli.Choice(["cifar100", "synthetic"]), default="cifar100", show_default=True)
@click.option("--data-dir", default="data", show_default=True, metavar="DIR", help="Folder of cifar-100-python.")
@click.option("--out", metavar="DIR", default="runs", show_default=True, help="Folder for the runs' folders.")
@click.option("--results", metavar="DIR", default=ROOT / "results", type=click.Path(path_type=Path), help="[default: results/ here]")
@click.option("--readme", metavar="FILE", default=ROOT / "README.md", type=click.Path(path_type=Path), help="[default: README.md here]")
@click.option("--device", type=cli.Choice(["cuda", "mps", "cpu"]), help="[default: the best there is]")
@click.option("--precision", type=cli.Choice(["fp32", "bf16"]), help="[default: bf16 on cuda, else fp32]")
@click.option("--compile/--no-compile", default=False, help="torch.compile.  [default: off]")
@click.option("--table", is_flag=True, help="Only rewrite the README's tables from the results.")
@click.option("--list", "list_rows", is_flag=True, help="Print the rows and which are done, and exit.")
def main(**flags):
    results, readme = flags.pop("results"), flags.pop("readme")
    if flags.pop("table"):
        write_tables(results, readme)
        return
    pairs, methods = check_usage(flags)
    todo = [(row, seed) for seed in range(flags["seed"], flags["seed"] + flags["seeds"]) for row in rows_of(pairs, methods)]
    try:
        device = cli.pick_device(flags["device"])
        shared = Reproduction(flags, device, results, readme)
        if flags["list_rows"]:
            for row, seed in todo:
                recipe, _, name = shared.recipe(row, seed)
                click.echo(f"{'done' if shared.done(results / f'{name}.json', recipe) else '    '}  {name}")
            return
        write_tables(results, readme)       # what is missing there is better said now than after hours
        cli.pick_kernels(False)
        cli.keep_memory()
        if flags["compile"]:
            cli.check_compiler(device)
        run_all(todo, shared)
    except ValueError as error:     # the rooms' own, one line each
        raise RunError(str(error)) from None


def run_all(todo, shared):
    """Every row that is not done. RunError at the end, when some could not be run."""
    results, problems, elsewhere, again = shared.results, [], [], True
    while again:        # a pass over the rows; once more when a row that was in another's hands may be free by now
        again, elsewhere, awaited = False, [], set()
        for row, seed in todo:
            recipe, lines, name = shared.recipe(row, seed)
            if name in problems:
                continue
            try:
                if shared.done(results / f"{name}.json", recipe):
                    continue
                if row.teacher in awaited:      # another teacher than the awaited one is not taken meanwhile
                    raise Busy(f"{row.teacher} is being trained")
                click.echo("\n".join(["", name, *lines]))
                record, folder = shared.run(row, recipe)
                if is_full(recipe) and recipe["data"] == "cifar100" and seed == 0 and row.pair in shared.kept:
                    click.echo(keep(row, record, folder, shared.data, shared.device))
                record_row(record, folder, results, name)
                write_tables(results, shared.readme)
                again = True
            except Busy:
                elsewhere.append(name)
                if row.method == "none" and is_full(recipe) and not shared.flags["teacher_checkpoint"]:
                    awaited.add(row.student)
            except (RunError, click.UsageError, ValueError, torch.OutOfMemoryError) as error:
                click.echo(f"{name}: {runs.first_line(error)}", err=True)
                problems.append(name)
        again = again and bool(elsewhere)
    write_tables(results, shared.readme)       # another process may have written its own in between
    if elsewhere:
        click.echo(f"in another process's hands: {', '.join(elsewhere)}")
    if problems:
        raise RunError(f"{len(problems)} of {len(todo)} rows could not be run: {', '.join(problems)}; their reasons are above")


if __name__ == "__main__":
    main()
