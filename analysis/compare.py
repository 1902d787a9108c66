"""Runs side by side: a table, paired tests, and curves of GED."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np

import metrics
from analysis.pictures import plot_ged, plot_validation
from common import UserError
from sources.files import write_text
from sources.runs import read_config, read_log

COMPARED = ("ged_16", "ged_100", "hungarian_iou_16", "dice_max_16", "ncc_100", "diversity_16",
            "dice", "dice_present", "dice_mean", "iou_rec", "ece_band", "volume_crps",
            "e_aurc_disagreement", "mode_pooled_tv_100")


def compare(folders, judged: str = "") -> str:
    """Compare judged runs in a table, a line for each run, and in two pictures.

    The table is returned and written as compare.md to the first run's folder. There, compare.png
    shows GED against the number of samples (if there are several), and compare_curves.png the
    validation GED against the steps and the time of training. Runs that differ only in their seeds
    share a line, with the mean and the standard deviation over them; for a single run, the standard
    error over patients follows the mean. p is that of a paired permutation test of `ged_16` against
    the first line, in which the cases of a patient (group) count as one. `judged` is the folder
    within a run in which its scores are, such as "test-all-last"; by default the run's own. Runs
    are named after their folders, or by the given paths where folders share a name. Raises
    UserError where runs were not judged on the same cases.
    """
    folders = [Path(folder) for folder in folders]
    runs = [read_judged(folder, judged) for folder in folders]
    names = [folder.name for folder in folders]
    runs = [(settings, (name if names.count(name) == 1 else str(folder), *scores), patients)
            for name, folder, (settings, scores, patients) in zip(names, folders, runs)]
    check_alike(folders, runs)
    groups = by_seeds(folders, runs)
    rows = [pooled([run for _, run in group]) for group in groups]
    patients = list(runs[0][2].values())
    text = "\n".join(table(rows, patients) + caveats(rows, runs, len(set(patients)))) + "\n"
    write_text(folders[0] / "compare.md", text)
    if len(set.union(*(counts(summary) for _, summary, _ in rows))) > 1:  # or there is no curve
        plot_ged(folders[0] / "compare.png", [(name, summary) for name, summary, _ in rows])
    curves = [(row[0], *validations(read_log(folder)))
              for row, group in zip(rows, groups) for folder, _ in group]
    if any(scores for *_, scores in curves):
        plot_validation(folders[0] / "compare_curves.png", curves)
    return text


def check_alike(folders: list[Path], runs: list[tuple]) -> None:
    """UserError unless all runs were judged on the same cases, in crops of one size."""
    settings, (_, _, geds), _ = runs[0]
    for folder, (others, run, _) in zip(folders, runs):
        if run[2].keys() != geds.keys():
            raise UserError(f"{folder} and {folders[0]} were judged on different cases: train both "
                            "on the same data with the same --data-args (of a set in files: "
                            f"split_file={folders[0] / 'split.json'})")
        sizes = settings["image_size"], others["image_size"]
        if None not in sizes and sizes[0] != sizes[1]:
            raise UserError(f"{folder} and {folders[0]} were judged on crops of different sizes: "
                            "train both with the same --image-size")


def by_seeds(folders: list[Path], runs: list[tuple]) -> list[list[tuple]]:
    """Lists of (folder, run) of those runs that differ in their seeds alone."""
    groups, seen = {}, Counter()
    for folder, (settings, run, _) in zip(folders, runs):
        rest = json.dumps({**settings, "seed": None}, sort_keys=True)
        again = seen[rest, settings["seed"]]  # the same seed again goes to another group
        seen[rest, settings["seed"]] += 1
        groups.setdefault((rest, again), []).append((folder, run))
    return list(groups.values())


def table(rows: list[tuple], patients: list[str]) -> list[str]:
    """The lines of the table in Markdown."""
    names = [n for n in COMPARED if any(n in summary for _, summary, _ in rows)]
    lines = ["| run | " + " | ".join(names) + " | p (ged_16) |", "|---" * (len(names) + 2) + "|"]
    first = rows[0][2]
    for row, (name, summary, geds) in enumerate(rows):
        cells = [f"{s['mean']:.3f} ± {s['stderr']:.3f}" if (s := summary.get(n)) else ""
                 for n in names]
        p = metrics.paired_test([geds[case] for case in first], list(first.values()), patients)
        cells.append(f"{p:.2g}" if row else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def caveats(rows: list[tuple], runs: list[tuple], patients: int) -> list[str]:
    """What a reader of the table has to know, each after an empty line."""
    notes = ["±: standard error over patients or other groups; in a line of several seeds, "
             "the standard deviation over these."]
    if len(rows) > 1:
        notes[0] += (f" p: paired permutation test of ged_16 against {rows[0][0]}; it is about "
                     "these trained networks, and another seed may reverse it.")
    if any(counts(summary) != counts(rows[0][1]) for _, summary, _ in rows):
        notes.append("The runs were judged with different numbers of samples: compare only "
                     "measures that name one number, such as ged_16.")
    if len({settings["image_size"] for settings, _, _ in runs}) > 1:
        notes.append("Some runs were judged on whole images, others on their centre of "
                     "--image-size: compare them only if the images have that size.")
    if patients < 8 and len(rows) > 1:
        notes.append(f"p compares {patients} patients or other groups; with so many it cannot be "
                     f"below {2 ** (1 - patients):.2g}.")
    return [line for note in notes for line in ("", note)]


def counts(summary: dict) -> set[str]:
    """The measures ged_<n> of a summary, one for each number of samples."""
    return {name for name in summary if name.startswith("ged_") and name[4:].isdigit()}


def training_time(log: list[dict]) -> list[tuple[float, float]]:
    """The log's steps, each with the seconds that the run had trained until then.

    Steps whose pace was not logged, because a kill came first, count at the pace of the next entry.
    """
    times, before, seconds = [], 0.0, 0.0
    for entry in log:
        if "seconds_per_step" in entry:
            step = float(entry["step"])
            seconds, before = seconds + entry["seconds_per_step"] * (step - before), step
            times.append((before, seconds))
    return times


def validations(log: list[dict]) -> tuple:
    """(the validation score's name or "", steps, minutes of training, scores) of a run's log."""
    found = [(float(entry["step"]), name, value) for entry in log for name, value in entry.items()
             if name.startswith("val_")]
    if not found:
        return "", (), (), ()
    steps, names, scores = zip(*found)
    return names[0], steps, np.interp(steps, *zip((0.0, 0.0), *training_time(log))) / 60, scores


def read_scores(folder: Path) -> tuple[dict, dict]:
    """What evaluate.py wrote to a folder: metrics.json, and {case: its row of per_case.csv}."""
    summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with open(folder / "per_case.csv", newline="", encoding="utf-8") as file:
        return summary, {row["name"]: row for row in csv.DictReader(file)}


def read_judged(folder: Path, judged: str = "") -> tuple[dict, tuple, dict]:
    """The settings of a judged run, ({measure: {"mean", "stderr"}}, {case: ged_16}), and {case: its
    patient or other group}."""
    settings = read_config(folder)["settings"]
    try:
        summary, cases = read_scores(folder / judged)
        summary = {name: {key: float(result[key]) for key in ("mean", "stderr")}
                   for name, result in summary.items()}
        summary["ged_16"]
        geds = {name: float(row["ged_16"]) for name, row in cases.items()}
        groups = {name: row.get("group", name) for name, row in cases.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        raise UserError(f"{folder / judged}: not judged yet, or without ged_16; run: "
                        f"python evaluate.py {folder}") from None
    return settings, (summary, geds), groups


def pooled(runs: list[tuple]) -> tuple:
    """Join runs that differ only in their seeds: the means over them and, as "stderr", their
    standard deviations."""
    if len(runs) == 1:
        return runs[0]
    names, summaries, geds = zip(*runs)
    summary = {}
    for name in set.intersection(*map(set, summaries)):
        means = [s[name]["mean"] for s in summaries]
        summary[name] = {"mean": np.mean(means), "stderr": np.std(means, ddof=1)}
    geds = {case: np.mean([values[case] for values in geds]) for case in geds[0]}
    return f"{names[0]} ({len(runs)} seeds)", summary, geds
