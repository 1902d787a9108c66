"""Make the tables of results/README.md, each by its name in TABLES below.

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
import csv
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import metrics
from analysis.compare import compare
from analysis.ood import CORRUPTIONS
from common import Progress, UserError, pick_device, say
from sources.files import write_text
from sources.runs import read_config, read_log

# ----------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Table:
    """Rows named alike up to a colon are tested against each other."""

    title: str
    text: str  # what a reader has to know
    rows: dict[str, str] = field(default_factory=dict)  # {name: its own options of train.py}
    common: str = ""  # options of train.py that all rows share
    judge: str = ""  # options of evaluate.py, if what train.py makes of best.pt is not wanted
    columns: str = ""  # measures, the first ranks; best:NAME is NAME of best.pt
    beside: dict[str, dict[str, str]] = field(default_factory=dict)  # {column: {row: published}}
    seeds: int = 1
    prints: tuple[str, ...] = ()  # instead of rows: commands whose output is the table


MAIN = {name: f"--model {name}" for name in
        ("ssn", "prob_unet", "phiseg", "hpunet", "vae_unet", "unet")}
ALL = MAIN | {name: f"--model {name}" for name in
              ("image2image_vae", "m_heads", "dropout_unet", "ensemble")}
LAST, QUICK = "--weights last", "--weights last --samples 16"
WHY_LAST = ("All rows are judged at their last checkpoint: at the one of lowest validation GED, "
            "models with one answer win by marking nothing.")
CROPS = "--data lidc --path FILE --steps 3000 --image-size 64 --batch-size 8"
SCORES = "ged_100 ged_16 hungarian_iou_16 ncc_100 diversity_16 dice iou_rec ece best:ged_100"
STREETS = '--model-args "channels=(16,32,64,64)" convs=1'
SECTIONS = ("--data em --path FILE --data-args tile=128 --batch-size 4 --lr 1e-3 "
            '--model-args "channels=(16,32,48,48,48,48,48,48)" convs=2')

TABLES = {
    "toy": Table(
        "The toy of the SSN paper", "The paper has -0.93 for the low-rank model (rank 2) and -4.87 "
        "for the diagonal one, in nats per label map.", prints=("ssn.py",)),
    "shapes": Table(
        "Synthetic scenes", "Narrow models that train for one to three minutes on an idle CPU: "
        f"this ranks what learns fast, not what is best in the end. {WHY_LAST}",
        ALL, "--data shapes --quick", QUICK, seeds=3,
        columns="ged_16 ncc_16 diversity_16 ece iou_rec mode_gap_16"),
    "ablations": Table(
        "Ablations", f"Synthetic scenes, narrow models. {WHY_LAST}",
        {"phiseg: 4 levels": "--model phiseg",
         "phiseg: 2 levels": "--model phiseg --model-args latent_levels=2",
         "phiseg: 1 level": "--model phiseg --model-args latent_levels=1",
         "hpunet: four scales": "--model hpunet",
         "hpunet: global": '--model hpunet --model-args "latents=(85,)"',
         "hpunet: finest": '--model hpunet --model-args "latents=(0,0,0,1)"',
         "ssn: rank 10": "--model ssn",
         "ssn: rank 2": "--model ssn --model-args rank=2",
         "ssn: diagonal": "--model ssn --model-args rank=0",
         "prob_unet: as published": "--model prob_unet",
         "prob_unet: fixed prior": "--model prob_unet --model-args prior=fixed",
         "prob_unet: posterior of mask": "--model prob_unet --model-args posterior=mask",
         "prob_unet: z at input": "--model prob_unet --model-args z_enters=input",
         "prob_unet: all three":
             "--model prob_unet --model-args prior=fixed posterior=mask z_enters=input",
         "vae_unet: latents of mask": "--model vae_unet",
         "vae_unet: latents of image": "--model vae_unet --model-args latents=image"},
        "--data shapes --quick", QUICK, "ged_16 ncc_16 diversity_16 ece iou_rec mode_gap_16"),
    "modes": Table(
        "Calibration of 32 modes",
        "The Cityscapes experiment of the Probabilistic U-Net on synthetic street scenes. Total "
        "variation is between the share of 100 samples that fall into each mode and its "
        f"probability, pooled over 100 test scenes. {WHY_LAST}",
        {name: f"--model {name} {STREETS}" for name in
         ("prob_unet", "image2image_vae", "m_heads", "dropout_unet", "unet")}
        | {"ensemble": f"--model ensemble {STREETS} members=2"},
        "--data modes --steps 12000 --batch-size 4 --lr 1e-3", LAST,
        "mode_pooled_tv_100 mode_gap_100 ged_100"),
    "crops": Table(
        "Real LIDC crops", "Every model in its default configuration, the paper's, at one size and "
        f"one length; learned from all annotators and judged against all. {WHY_LAST} The last "
        "measure is that of the checkpoint of lowest validation GED.", ALL, CROPS, LAST, SCORES),
    "annotators": Table(
        "Real LIDC crops, one annotator against all", "As real LIDC crops, but learned from "
        f"annotator 0 alone. {WHY_LAST}", MAIN, f"{CROPS} --annotators 0", LAST, SCORES),
    "brain": Table(
        "Newborn brain MR", "QUBIQ brain-growth in the layout of the LIDC pickle, 28 slices of "
        f"128 x 128, seven annotators; default configurations. {WHY_LAST}",
        MAIN, "--data lidc --path FILE --steps 2000 --batch-size 4", LAST, SCORES),
    "organs": Table(
        "Organs with blurred borders", "Synthetic images, narrow models. Dice is that of the "
        "deterministic answer (the VAE U-Net's prior mode), then that of the mean of samples (its "
        f"sampling mode). {WHY_LAST}",
        {"vae_unet": "--model vae_unet", "unet": "--model unet",
         "vae_unet on Swin-Unet": "--model vae_unet --steps 1000 --model-args backbone=swin"},
        "--data organs --quick", QUICK, "dice dice_mean ged_16 diversity_16 ece"),
    "ood": Table(
        "Images unlike those of training", "Area under the ROC curve of the mean variance over "
        "samples, telling corrupted images from the same images as they are; 0.5 is chance. Blur: "
        "std in pixels; patch: per cent of the side; noise: std.",
        {name: f"--model {name}" for name in ("vae_unet", "prob_unet")},
        "--data organs --quick --steps 800", "--ood", " ".join(
            f"auroc_variance_{kind}_{strength}" for kind, strengths in
            (CORRUPTIONS | {"foreign": ["shapes"]}).items() for strength in strengths)),
    "objects": Table(
        "Objects by sampling", "Rand error of objects clustered from 32 samples (Hamming distance "
        "48) and of the connected components of the model's own foreground, at the last "
        "checkpoint; then of objects clustered from 16 samples (distance 16) at the best one.",
        {"cells: hpunet": "--model hpunet --data cells --quick --steps 5000 --model-args kappa=1.7",
         "cells: unet": "--model unet --data cells --quick --steps 2000",
         "sections: hpunet":
             f"--model hpunet --steps 11000 {SECTIONS} blocks=1 top_k=0.1 kappa=1.8",
         "sections: unet": f"--model unet --steps 1500 {SECTIONS}"},
        judge=f"{QUICK} --cluster 32 48",
        columns="rand_error_32_48 rand_error_components best:rand_error_16"),
    "extrapolation": Table(
        "What lies beyond the edge", "Half of each image is hidden, and the labels of the rest are "
        "given; `extrapolation.png` of the run shows samples.",
        {"hpunet": "--model hpunet"}, "--data shapes --quick --data-args hide=50", QUICK,
        "ged_16 diversity_16 iou_rec"),
    "lesions3d": Table(
        "Lesions in 3D", f"Synthetic volumes of 48 x 48 x 48, narrow models. {WHY_LAST}",
        MAIN, "--data lesions3d --quick", QUICK, "ged_16 diversity_16 ece dice mode_gap_16"),
    "lidc": Table(
        "LIDC, the full pickle", "Each method's model and schedule of its paper, on the split that "
        "later works share (64/16/20 by series), judged at the checkpoint of lowest validation "
        "GED. The published figures are of other splits.",
        {name: options for name, options in MAIN.items() if name != "unet"},
        "--data lidc --path FILE --image-size 128", columns="ged_16 ged_100 hungarian_iou_16 "
        "ncc_100 diversity_16 dice dice_present iou_rec ece",
        beside={"its paper's GED (samples)": {
            "ssn": "0.225 (100)", "prob_unet": "0.287 (16)", "phiseg": "0.225 (100)",
            "hpunet": "0.27 (16)", "vae_unet": "0.289 (100; one annotator, agreed lesions)"},
            "GED 16 that later works quote": {"ssn": "0.259", "prob_unet": "0.324",
                                              "phiseg": "0.262", "hpunet": "0.270"}}),
    "speed": Table("Speed", "`bench.py --help` explains the columns. To be run alone.", prints=(
        "bench.py --tables models costs --rounds 5",
        "bench.py --tables models costs --rounds 5 --precision bf16",
        "bench.py --tables evaluation")),
    "reliability": Table("Reliability", "tests/campaign.py says what is a failure.", prints=(
        "tests/campaign.py inputs --count 10000", "tests/campaign.py kills --count 350",
        "tests/campaign.py disk")),
}

WORDS = {"best:": "best.pt: ", "ged": "GED", "ncc": "NCC", "hungarian iou": "matched IoU",
         "dice": "Dice", "iou rec": "IoU_rec", "ece": "ECE", "mode gap": "worst mode",
         "mode pooled tv": "total variation", "auroc variance ": "", "rand error": "Rand error"}

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
        options = f"{own} {table.common}".strip()
        if "FILE" in options and not args.path:
            say(f"{name}: {row} needs --path FILE and is left out")
            continue
        if args.steps:
            options = re.sub(r" --steps \d+", "", options) + f" --steps {args.steps}"
        source = args.path.stem if "FILE" in options else ""
        for seed in range(args.seeds or table.seeds):
            folder = args.out / name / re.sub(r"\W+", "-", f"{row} {source} {seed}")
            judge = [f"evaluate.py RUN {table.judge}"] if table.judge else []
            runs.append(Run(name, row, folder, (f"train.py {options} --seed {seed} --out RUN",
                                                *judge)))
    return runs


def run_all(runs: list[Run], args) -> dict[Run, str]:
    """Run what has not finished, --jobs at once; {run that failed: the last line it said}."""
    waiting, running, failed = [run for run in runs if not run.finished()], {}, {}
    progress, told = Progress(len(runs), sum(run.share() for run in runs)), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                running[waiting[0]] = 0, waiting[0].start(0, args)
                del waiting[0]
            time.sleep(0.2)
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
            done = sum(run in failed or run.share() for run in runs)
            if done > progress.first:  # else there is no rate yet
                line, now = time.monotonic() > told + 30, [run.folder.name for run in running]
                told = time.monotonic() if line else told
                progress.update(round(done, 2), f"runs; now {', '.join(now)}", line)
    except KeyboardInterrupt:
        for _, process in running.values():
            process.terminate()  # it saves and stops
        for _, process in running.values():
            process.wait()
        say("stopped; rerun to resume")
    return failed


# ------------------------------------------------------------------------------------ the table


def measure(runs: list[Run], column: str):
    """(mean, standard error, means of the seeds, {case: mean over seeds}) of a measure, or None."""
    judge, summaries, tables = TABLES[runs[0].table].judge, [], []
    last, column = "last" in judge and "best:" not in column, column.removeprefix("best:")
    for run in runs:
        folder = run.folder / "test-all-last" if last else run.folder
        file = folder / ("ood.json" if "--ood" in judge else "metrics.json")
        summaries.append(json.loads(file.read_text()).get(column))
        with open(folder / "per_case.csv", newline="") as text:
            tables.append({r["name"]: float(r.get(column, "nan")) for r in csv.DictReader(text)})
    if None in summaries:
        return None
    means, errors = zip(*((summary["mean"], summary["stderr"]) for summary in summaries))
    cases = {name: np.mean([table[name] for table in tables]) for name in tables[0]}
    error = metrics.bootstrap(list(cases.values()))["stderr"]
    return np.mean(means), np.mean(errors) if np.isnan(error) else error, means, cases


def lines_of(table: Table, groups: dict[str, list[Run]]) -> list[str]:
    """The table's lines in Markdown; groups {row: its finished runs}."""
    found = {c: {row: m for row, runs in groups.items() if (m := measure(runs, c))}
             for c in table.columns.split()}
    found = {c: rows for c, rows in found.items() if rows}
    (ranking, first), *_ = found.items()
    groups = {row: runs for row, runs in groups.items() if row in first}
    several, names = any(len(m[2]) > 1 for m in first.values()), " | ".join(found).replace("_", " ")
    for word, name in WORDS.items():
        names = names.replace(word, name)
    lines = [["", "parameters", "steps x batch", "minutes", names, *["over seeds"] * several, "p",
              *table.beside]]
    lines.append(["---"] * (len(lines[0]) + len(found) - 1))
    for row, runs in groups.items():
        config, logs = read_config(runs[0].folder), [read_log(run.folder) for run in runs]
        seconds = sum(entry.get("steps", 0) * entry.get("seconds_per_step", 0)
                      for log in logs for entry in log)
        rivals = [r for r in first if r.rpartition(":")[0] == row.rpartition(":")[0]]
        best = (max if ranking == "dice" else min)(rivals, key=lambda r: first[r][0])
        p = metrics.paired_test(*([first[r][3][case] for case in first[best][3]]
                                  for r in (row, best)))
        lines.append([f"`{row}`", f"{config['parameters'] / 1e6:.2f} M",
                      f"{logs[0][-1]['step']} x {config['training']['batch_size']}",
                      f"{seconds / 60 / len(runs):.1f}",
                      *("{:.3f} ± {:.3f}".format(*rows[row]) if row in rows else ""
                        for rows in found.values()),
                      *[f"± {np.std(first[row][2], ddof=len(runs) > 1):.3f}"] * several,
                      "best" if row == best else f"{p:.2g}",
                      *(published.get(row, "") for published in table.beside.values())])
    return [f"| {' | '.join(line)} |" for line in lines]


def write(name: str, runs: list[Run], failed: dict[Run, str], args) -> str:
    """<out>/<name>.md, of what has finished; its text."""
    table, runs, groups = TABLES[name], [run for run in runs if run.table == name], {}
    for run in runs:
        if run.finished():
            groups.setdefault(run.row, []).append(run)
    commands = dict.fromkeys(re.sub(" --seed .*", "", c) for run in runs for c in run.commands)
    commands = sorted(commands, key=lambda command: command.startswith("evaluate"))
    text = [f"## {table.title}", table.text,
            "\n".join(["```sh", *(f"python {command}" for command in commands), "```"])]
    if table.prints and groups:
        lines = runs[0].folder.with_suffix(".log").read_text(errors="replace").splitlines()
        lines = [line for line in lines[:-1] if not re.match(r"\d+/\d+ ", line)] + lines[-1:]
        text += ["\n".join(line if line.startswith("|") else f"{line}\n" for line in lines)]
    elif groups:
        text += ["\n".join(lines_of(table, groups))]
    text += [f"Failed: {failed[run]}" for run in runs if run in failed]
    if left := [run.folder.name for run in runs if not run.finished() and run not in failed]:
        text += [f"Not finished: {', '.join(left)}."]
    machines = [json.loads(run.folder.with_suffix(".done").read_text())[0]
                for group in groups.values() for run in group]
    text += [f"Measured on {machine}." for machine in dict.fromkeys(machines)]
    text += [f"![{table.title}]({file.name})" for file in sorted(args.out.glob(f"{name}-*.png"))]
    text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(text)) + "\n"
    write_text(args.out / f"{name}.md", text)
    return text


def draw(name: str, runs: list[Run], args) -> None:
    """<out>/<name>-*.png: what evaluate.py --compare draws, or the printed commands drew."""
    folders = [run.folder for run in runs if run.table == name and run.finished()]
    try:
        if folders and not TABLES[name].prints:
            compare(folders)
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
    p.add_argument("--path", type=Path, metavar="FILE", help="data of the rows that name FILE")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    p.add_argument("--seeds", type=int, metavar="N", help="runs a row (default: the table's)")
    p.add_argument("--steps", type=int, metavar="N", help="of every run (default: the table's)")
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
