"""Runs side by side: a table, paired tests, GED curves."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import metrics
from analysis.pictures import plot_ged
from common import UserError
from models import read_config
from sources.files import write_text

COMPARED = ("ged_16", "ged_100", "hungarian_iou_16", "ncc_100", "diversity_16", "dice",
            "dice_present", "dice_mean", "iou_rec", "log_likelihood", "mode_pooled_tv_100")


@dataclass
class Judged:
    """What `compare` needs of a run, or of several that differ in their seeds alone."""

    name: str
    summary: dict  # {measure: {"mean", "stderr"}}
    geds: dict  # {case: ged_16}
    settings: dict  # without the seed
    seeds: set


def compare(folders) -> str:
    """A table of judged runs, one a line, and `compare.png`, both in the first run's folder.

    Runs that differ in nothing but the seed share a line, with the mean and the standard deviation
    over them; of a single run the standard error over cases stands behind the mean. p: the paired
    permutation test, over cases, of `ged_16` against the first line's.
    Raises UserError where runs were not judged on the same cases.
    """
    folders = [Path(f) for f in folders]
    runs = [read_judged(folder) for folder in folders]
    for run in runs:
        if run.geds.keys() != runs[0].geds.keys():
            raise UserError(f"{run.name} and {runs[0].name} were judged on different cases")
    groups = []
    for run in runs:
        for group in groups:
            if group[0].settings == run.settings and all(run.seeds != g.seeds for g in group):
                group.append(run)
                break
        else:
            groups.append([run])
    rows = [pool_seeds(group) for group in groups]
    names = [n for n in COMPARED if any(n in row.summary for row in rows)]
    lines = ["| run | " + " | ".join(names) + " | p |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [f"{s['mean']:.3f} ± {s['stderr']:.3f}" if (s := row.summary.get(n)) else ""
                 for n in names]
        p = metrics.paired_test([row.geds[case] for case in rows[0].geds],
                                list(rows[0].geds.values()))
        cells.append("" if row is rows[0] else f"{p:.2g}")
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    write_text(folders[0] / "compare.md", text)
    plot_ged(folders[0] / "compare.png", {row.name: row.summary for row in rows})
    return text


def read_judged(folder: Path) -> Judged:
    """The results of a run that was judged."""
    settings = read_config(folder)["settings"]
    try:
        summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        summary = {name: {key: float(result[key]) for key in ("mean", "stderr")}
                   for name, result in summary.items()}
        summary["ged_16"]
        with open(folder / "per_case.csv", newline="", encoding="utf-8") as file:
            geds = {row["name"]: float(row["ged_16"]) for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
        raise UserError(f"{folder}: not judged yet, or without ged_16; run: "
                        f"python evaluate.py {folder}") from None
    return Judged(folder.name, summary, geds, settings, {settings.pop("seed", 0)})


def pool_seeds(group: list[Judged]) -> Judged:
    """Runs that differ in their seeds as one: means over them, and standard deviations."""
    first = group[0]
    if len(group) == 1:
        return first
    summary = {}
    for name in first.summary:
        if all(name in run.summary for run in group):
            means = [run.summary[name]["mean"] for run in group]
            summary[name] = {"mean": np.mean(means), "stderr": np.std(means, ddof=1)}
    geds = {case: np.mean([run.geds[case] for run in group]) for case in first.geds}
    return Judged(f"{first.name} ({len(group)} seeds)", summary, geds, first.settings,
                  set().union(*(run.seeds for run in group)))
