"""Runs side by side: a table, paired tests, GED curves."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np

import metrics
from analysis.pictures import plot_ged
from common import UserError
from sources.files import write_text
from sources.runs import read_config

COMPARED = ("ged_16", "ged_100", "hungarian_iou_16", "ncc_100", "diversity_16", "dice",
            "dice_present", "dice_mean", "iou_rec", "log_likelihood", "mode_pooled_tv_100")


def compare(folders) -> str:
    """A table of judged runs, one a line, and `compare.png`, both in the first run's folder.

    Runs that differ in nothing but the seed share a line, with the mean and the standard deviation
    over them; of a single run the standard error over cases stands behind the mean. p: the paired
    permutation test, over cases, of `ged_16` against the first line's.
    Raises UserError where runs were not judged on the same cases.
    """
    folders = [Path(folder) for folder in folders]
    runs = [read_judged(folder) for folder in folders]
    cases = list(runs[0][1][2])
    groups, seen = {}, Counter()  # runs that differ in their seeds alone
    for folder, (settings, run) in zip(folders, runs):
        if run[2].keys() != set(cases):
            raise UserError(f"{folder} and {folders[0]} were judged on different cases")
        seed = settings.pop("seed", 0)
        rest = json.dumps(settings, sort_keys=True)
        groups.setdefault((rest, seen[rest, seed]), []).append(run)
        seen[rest, seed] += 1  # the same seed again goes to another group
    rows = [pooled(group) for group in groups.values()]
    names = [n for n in COMPARED if any(n in summary for _, summary, _ in rows)]
    lines = ["| run | " + " | ".join(names) + " | p |", "|---" * (len(names) + 2) + "|"]
    for row, (name, summary, geds) in enumerate(rows):
        cells = [f"{s['mean']:.3f} ± {s['stderr']:.3f}" if (s := summary.get(n)) else ""
                 for n in names]
        p = metrics.paired_test([geds[c] for c in cases], [rows[0][2][c] for c in cases])
        cells.append(f"{p:.2g}" if row else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    write_text(folders[0] / "compare.md", text)
    plot_ged(folders[0] / "compare.png", [(name, summary) for name, summary, _ in rows])
    return text


def read_judged(folder: Path) -> tuple[dict, tuple]:
    """A judged run: its settings, and (name, {measure: {"mean", "stderr"}}, {case: ged_16})."""
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
    return settings, (folder.name, summary, geds)


def pooled(runs: list[tuple]) -> tuple:
    """Runs that differ in their seeds as one: means, and standard deviations over them."""
    if len(runs) == 1:
        return runs[0]
    names, summaries, geds = zip(*runs)
    summary = {}
    for name in set.intersection(*map(set, summaries)):
        means = [s[name]["mean"] for s in summaries]
        summary[name] = {"mean": np.mean(means), "stderr": np.std(means, ddof=1)}
    geds = {case: np.mean([values[case] for values in geds]) for case in geds[0]}
    return f"{names[0]} ({len(runs)} seeds)", summary, geds
