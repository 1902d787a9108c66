"""Make the tables of results/README.md, each by its name in tables.py, which lists their runs.

    python results/reproduce.py shapes
    python results/reproduce.py crops annotators --path lidc.pickle --device cuda --jobs 10
    python results/reproduce.py lidc --path data_lidc.pickle --device cuda --steps 20000

Every row is a run of train.py, trained and judged in its own folder, runs/results/<table>/<row>/;
--jobs N of them at once share the device. The table is printed and written to
runs/results/<table>.md, anew whenever a run has finished, and pictures of its curves beside it.
Rerun the same command to resume: finished runs are not run again, interrupted ones are resumed. A
run that fails is named below the table with its last line, and does not hold up the others.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import metrics
from analysis.compare import compare, read_scores, training_time
from common import Progress, UserError, pick_device, say
from results.tables import APART, APART_ROW, FURTHER, TABLES, WORDS, Table
from sources.files import write_text
from sources.runs import read_config, read_log

# ------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Run:
    """A seed of a row, or a printed table. FILE and RUN in `commands`: --path and `folder`.

    Beside the folder: <folder>.log, what the commands say, and <folder>.done, a JSON list of the
    machine and the commands, written when all of them have succeeded.
    """

    table: str
    row: str
    folder: Path
    commands: tuple[str, ...]

    def finished(self) -> bool:
        """Whether these very commands have succeeded."""
        done = self.folder.with_suffix(".done")
        return done.exists() and json.loads(done.read_text())[1:] == list(self.commands)

    def share(self) -> float:
        """How much is done, from 0 to 1; judging counts as a tenth."""
        try:
            steps = read_config(self.folder)["training"]["steps"]
            return 1 if self.finished() else 0.9 * read_log(self.folder)[-1]["step"] / steps
        except (UserError, LookupError):
            return 0

    def start(self, number: int, args) -> subprocess.Popen:
        """Start a command; a training that was begun is resumed."""
        known = {"FILE": str(args.path), "RUN": str(self.folder)}
        script, *words = [known.get(word, word) for word in shlex.split(self.commands[number])]
        if script == "train.py" and (self.folder / "config.json").exists():
            words[words.index("--out")] = "--resume"
        if script in ("train.py", "evaluate.py", "bench.py"):
            words += ["--device", args.device]
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder.with_suffix(".log"), "a" if number else "w") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / script), *words], stdout=log, stderr=subprocess.STDOUT,
                cwd=self.folder if TABLES[self.table].prints else ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
                start_new_session=True)  # Ctrl-C is passed on once, by `run_all`


def plan(name: str, args) -> list[Run]:
    """The runs of a table, without those that need a data file where none is given."""
    table, runs = TABLES[name], []
    if table.prints:
        return [Run(name, "", args.out / name / "printed", table.prints)]
    for row, own in table.rows.items():
        if args.rows and row not in args.rows:
            continue
        options = f"{own} {table.common} {args.options}".strip()
        if "FILE" in options and not args.path:
            say(f"{name}: {row} needs --path FILE and is left out")
            continue
        if args.steps:
            options = with_steps(options, args.steps)
        source = args.path.stem if "FILE" in options else ""
        for seed in range(args.seeds or table.seeds):
            folder = args.out / name / re.sub(r"\W+", "-", f"{row} {source} {seed}")
            judge = [f"evaluate.py RUN {table.judge}"] if table.judge else []
            runs.append(Run(name, row, folder, (f"train.py {options} --seed {seed} --out RUN",
                                                *judge)))
    return runs


def with_steps(options: str, steps: int) -> str:
    """Options of train.py with another number of steps, the learning rate's drops moved along."""
    before = re.findall(r"--steps (\d+)", options)
    if before:
        options = re.sub(r"\b(\d+)(?=:\.?\d)", lambda drop: str(
            int(drop[1]) * steps // int(before[-1])), options)
    return re.sub(r" --steps \d+", "", options) + f" --steps {steps}"


def run_all(runs: list[Run], args) -> dict[Run, str]:
    """Run what has not finished, --jobs at once; {run that failed: the last line it said}."""
    waiting, running, failed = [run for run in runs if not run.finished()], {}, {}
    progress, tick = Progress(len(runs), sum(run.share() for run in runs)), 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                running[waiting[0]] = 0, waiting[0].start(0, args)
                del waiting[0]
            time.sleep(0.5)
            for run, (number, process) in [*running.items()]:
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode:
                    said = run.folder.with_suffix(".log").read_text(errors="replace").split("\n")
                    last = [line for line in ["no output", *said] if line.strip()][-1]
                    failed[run] = f"`python {run.commands[number]}`: {last.strip()}"
                    progress.say(f"failed: {failed[run]}")
                elif number + 1 < len(run.commands):
                    running[run] = number + 1, run.start(number + 1, args)
                    continue
                else:
                    write_text(run.folder.with_suffix(".done"),
                               json.dumps([args.machine, *run.commands]))
                write(run.table, runs, failed, args)
            done, tick = sum(run in failed or run.share() for run in runs), tick + 1
            now = ", ".join(run.folder.name for run in running)
            progress.update(round(done, 2), f"runs; now {now}", line=tick % 60 == 0)
    except KeyboardInterrupt:
        for _, process in running.values():
            process.terminate()  # it saves and stops
        for _, process in running.values():
            process.wait()
        say("stopped; rerun to resume")
    return failed


# ------------------------------------------------------------------------------------ the table


class Measured(NamedTuple):
    """A measure of a row."""

    mean: float
    error: float  # standard error over patients
    seeds: tuple[float, ...]  # the mean of every run
    cases: dict[str, float]  # {case: mean over the runs}; NaN if single cases have no value
    patients: dict[str, str]  # {case: its patient or scene}

    def differs_from(self, other: "Measured") -> float:
        """p of the paired test over patients; NaN if single cases have no value."""
        mine = list(self.cases.values())
        return np.nan if np.isnan(mine).all() else metrics.paired_test(
            mine, [other.cases[case] for case in self.cases], list(self.patients.values()))


def measure(runs: list[Run], column: str) -> Measured | None:
    """A measure of a row's runs; None where a run lacks it. best:NAME is that of best.pt."""
    judge, name = TABLES[runs[0].table].judge, column.removeprefix("best:")
    last = "--weights last" in judge and name == column
    folders = [run.folder / "test-all-last" if last else run.folder for run in runs]
    summaries, tables = zip(*map(read_scores, folders))
    if "--ood" in judge:
        summaries = [json.loads((folder / "ood.json").read_text()) for folder in folders]
    if not all(name in summary for summary in summaries):
        return None
    summaries = [summary[name] for summary in summaries]
    means = tuple(summary["mean"] for summary in summaries)
    cases = {case: np.mean([float(table[case].get(name, "nan")) for table in tables])
             for case in tables[0]}
    patients = {case: row["group"] for case, row in tables[0].items()}
    error = metrics.bootstrap(list(cases.values()), list(patients.values()))["stderr"]
    if np.isnan(error):
        error = np.mean([summary["stderr"] for summary in summaries])
    return Measured(np.mean(means), error, means, cases, patients)


def against_best(row: str, measured: dict[str, Measured], highest: bool) -> str:
    """What the table says of a row in column p: "best", or p of the paired test over patients
    against the best row of its kind, whose names are alike up to a colon. Nothing if there is no
    other row, or if single cases have no value."""
    rivals = [r for r in measured if r.rpartition(":")[0] == row.rpartition(":")[0]]
    best = (max if highest else min)(rivals, key=lambda r: measured[r].mean)
    if row == best:
        return "best" if len(rivals) > 1 else ""
    p = measured[row].differs_from(measured[best])
    return "" if np.isnan(p) else f"{p:.2g}"


def found_in(groups: dict[str, list[Run]], columns: str) -> dict[str, dict[str, Measured]]:
    """{measure: {row: its value}} without measures that no row has; groups {row: its runs}."""
    found = {column: {row: m for row, runs in groups.items() if (m := measure(runs, column))}
             for column in columns.split()}
    return {column: rows for column, rows in found.items() if rows}


def spelled(columns) -> list[str]:
    """Names of measures as the headings of a table."""
    names = " | ".join(columns).replace("_", " ")
    for word, name in WORDS.items():
        names = names.replace(word, name)
    return names.split(" | ")


def cell(measured: Measured | None) -> str:
    """What a table says of a measure."""
    if measured is None:
        return ""
    digits = 3 if abs(measured.mean) < 100 else 1
    return f"{measured.mean:.{digits}f} ± {measured.error:.{digits}f}"


def lines_of(table: Table, groups: dict[str, list[Run]]) -> list[str]:
    """The table's lines in Markdown; groups {row: its finished runs}."""
    found = found_in(groups, table.columns)
    ranking, first = next(iter(found.items()))
    highest = ranking.startswith(("dice", "auroc"))
    several = any(len(m.seeds) > 1 for m in first.values())
    against = {row: against_best(row, first, highest) for row in first}
    tested = any(p not in ("", "best") for p in against.values())
    lines = [["", "parameters", "steps x batch", "minutes", *spelled(found),
              *["over seeds"] * several, *["p"] * tested, *table.beside]]
    lines.append(["---"] * len(lines[0]))
    for row in first:
        runs = groups[row]
        config, logs = read_config(runs[0].folder), [read_log(run.folder) for run in runs]
        seconds = sum(training_time(log)[-1][1] for log in logs)
        cells = [cell(rows.get(row)) for rows in found.values()]
        deviation = np.std(first[row].seeds, ddof=len(runs) > 1)
        lines.append([f"`{row}`", f"{config['parameters'] / 1e6:.2f} M",
                      f"{logs[0][-1]['step']} x {config['training']['batch_size']}",
                      f"{seconds / 60 / len(runs):.1f}", *cells,
                      *[f"± {deviation:.3f}"] * several, *[against[row]] * tested,
                      *(published.get(row, "") for published in table.beside.values())])
    return [f"| {' | '.join(line)} |" for line in lines]


def told_apart(table: Table, groups: dict[str, list[Run]]) -> list[str]:
    """The lines of the table of `table.further` measures; the last line says how many pairs of rows
    each of them tells apart by the paired test over patients, p below 0.05 divided by their number
    (Bonferroni). It is left out where there are too few patients for such a p."""
    found = found_in(groups, table.further)
    lines = [["", *spelled(found)], ["---"] * (len(found) + 1)]
    lines += [[f"`{row}`", *(cell(rows.get(row)) for rows in found.values())] for row in groups]
    last = [APART_ROW]
    for rows in found.values():
        pairs = itertools.combinations(rows.values(), 2)
        tests = [p for a, b in pairs if not np.isnan(p := a.differs_from(b))]
        least = 2.0 ** (1 - len(set(next(iter(rows.values())).patients.values())))  # of any p
        apart = sum(p < 0.05 / len(tests) for p in tests)
        last.append(f"{apart} of {len(tests)}" if tests and least < 0.05 / len(tests) else "")
    if any(last[1:]):
        lines.append(last)
    return [f"| {' | '.join(line)} |" for line in lines]


def shell(commands: list[str]) -> list[str]:
    """The commands as lines for a shell. If all calls of train.py end in the same options, these are
    a variable, so that a reader sees in what the rows differ."""
    words = [command.split(" ") for command in commands if command.startswith("train.py")]
    shared = 0
    while len(words) > 1 and len({each[-shared - 1] for each in words}) == 1:
        shared += 1
    while shared and not words[0][-shared].startswith("--"):  # it begins with an option
        shared -= 1
    ending = " ".join(words[0][-shared:]) if shared > 4 else ""
    if '"' in ending:
        ending = ""
    lines = [f'COMMON="{ending}"'] if ending else []
    for command in commands:
        if ending and command.startswith("train.py"):
            command = f"{command.removesuffix(ending)}$COMMON"
        lines.append(f"python {command}")
    return lines


def write(name: str, runs: list[Run], failed: dict[Run, str], args) -> str:
    """Write <out>/<name>.md from the runs that have finished; returns its text."""
    table, runs, groups = TABLES[name], [run for run in runs if run.table == name], {}
    for run in runs:
        if run.finished():
            groups.setdefault(run.row, []).append(run)
    commands = dict.fromkeys(re.sub(" --seed .*", "", c) for run in runs for c in run.commands)
    commands = sorted(commands, key=lambda command: command.startswith("evaluate"))
    text = [f"## {table.title}", table.text, "\n".join(["```sh", *shell(commands), "```"])]
    if table.prints and groups:
        lines = runs[0].folder.with_suffix(".log").read_text(errors="replace").splitlines()
        lines = [line for line in lines[:-1] if not re.match(r"\d+/\d+ ", line)] + lines[-1:]
        text += ["\n".join(line if line.startswith("|") else f"{line}\n" for line in lines)]
    elif groups:
        text += ["\n".join(lines_of(table, groups))]
        if table.further:
            lines = told_apart(table, groups)
            text += [f"{FURTHER} {APART}" if APART_ROW in lines[-1] else FURTHER, "\n".join(lines)]
    text += [f"Failed: {failed[run]}" for run in runs if run in failed]
    if left := [run.folder.name for run in runs if not run.finished() and run not in failed]:
        text += [f"Not finished: {', '.join(left)}."]
    machines = [json.loads(run.folder.with_suffix(".done").read_text())[0]
                for group in groups.values() for run in group]
    jobs = {}  # {machine and versions: how many runs shared it}
    for machine in machines:
        place, _, load = machine.partition("; runs at once: ")
        jobs.setdefault(place, set()).add(load.partition(",")[0])
    text += [f"Measured on {place}; runs at once: {' or '.join(sorted(found))}."
             for place, found in jobs.items()]
    text += [f"![{table.title}]({file.name})" for file in sorted(args.out.glob(f"{name}-*.png"))]
    text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(text)) + "\n"
    write_text(args.out / f"{name}.md", text)
    return text


def draw(name: str, runs: list[Run], args) -> None:
    """Save <out>/<name>-*.png: what evaluate.py --compare draws, of the checkpoints that the table
    is of, or what the printed commands drew."""
    folders = [run.folder for run in runs if run.table == name and run.finished()]
    try:
        if folders and not TABLES[name].prints:
            compare(folders, "test-all-last" if "--weights last" in TABLES[name].judge else "")
    except UserError as error:  # runs on different cases
        say(f"{name}: no picture: {error}")
    for folder in folders[:1]:
        for file in folder.glob("*.png" if TABLES[name].prints else "compare*.png"):
            shutil.copy(file, args.out / f"{name}-{file.name}")


# ----------------------------------------------------------------------------- the command line


def parse(argv=None) -> argparse.Namespace:
    """The command line, paths made absolute."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tables", nargs="+", metavar="TABLE", choices=TABLES, help=", ".join(TABLES))
    p.add_argument("--path", type=Path, metavar="FILE", help="data file of the rows that need one")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    p.add_argument("--seeds", type=int, metavar="N", help="runs a row (default: the table's)")
    p.add_argument("--steps", type=int, metavar="N", help="of every run (default: the table's)")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (default: all)")
    p.add_argument("--options", default="", metavar="'...'",
                   help="more options of every train.py, such as --options=--cuda-graphs")
    p.add_argument("--out", type=Path, default="runs/results", help="default: runs/results")
    args = p.parse_args(argv)
    if min(n for n in (args.jobs, args.seeds, args.steps) if n is not None) < 1:
        p.error("--jobs, --seeds, --steps: give 1 or more")
    args.out, args.path = args.out.resolve(), args.path and args.path.resolve()
    args.threads = max(1, torch.get_num_threads() // args.jobs)
    return args


def describe(args) -> str:
    """The machine, the versions, and how many runs share them."""
    device, file = pick_device(args.device), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text() if file.exists() else "")
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return (f"{gpu}{(names or [platform.processor()])[0]} with {os.cpu_count()} cores, torch "
            f"{torch.__version__}; runs at once: {args.jobs}, threads of each: {args.threads}")


def main(argv=None) -> int:
    """The command line: 0 if every run has finished, 1 if not, 2 for a mistake of the user's."""
    args = parse(argv)
    try:
        args.machine = describe(args)
        runs = [run for name in args.tables for run in plan(name, args)]
        if not runs:
            raise UserError("there is nothing to run without --path FILE")
        failed = run_all(runs, args)
        for name in args.tables:
            draw(name, runs, args)
            print(f"\n{write(name, runs, failed, args)}")
        return 0 if all(run.finished() for run in runs) else 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
