"""Can the samples tell on which cases annotators disagree?"""

import json
from pathlib import Path

import numpy as np
import torch

import data
import models

from analysis.pictures import COLORS, new_plot, save_figure
from common import IGNORE, pick_device
from models import labels_of, read_config, sample_batches
from sources.files import write_text


@torch.no_grad()
def ambiguity(folder, *, path=None, device=None, n=16) -> dict:
    """Can the samples tell which cases the readers disagree on? (Kohl et al. 2018, App. E.)

    A case is ambiguous if a reader marked nothing and another something. It is called so if fewer
    than t of its n samples mark something, with the t that is right most often on the validation
    split. Writes ambiguity.json and ambiguity.png; returns accuracy on the test split, the share
    that the commoner answer would get right, and t.
    """
    folder = Path(folder)
    settings = read_config(folder)["settings"]
    device = device or pick_device()
    model = models.load(folder / "best.pt", device)
    splits = data.load(settings["data"], ("val", "test"), path or settings["path"],
                       **settings["data_args"])
    counts, truth = [], []
    for split in splits:
        if settings["image_size"] is not None:
            split = data.center(split, settings["image_size"])
        marked = [((labels_of(logits, 2) > 0).flatten(2).any(2)).sum(0).cpu()
                  for _, logits in sample_batches(model, split.to(device), n)]
        counts.append(torch.cat(marked).numpy())
        drew = ((split.labels > 0) & (split.labels != IGNORE)).flatten(2).any(2)
        there = (split.labels != IGNORE).flatten(2).any(2)
        truth.append(((drew & there).any(1) & (~drew & there).any(1)).numpy())
    right = [((counts[0] < t) == truth[0]).mean() for t in range(n + 2)]
    threshold = int(np.argmax(right))
    result = dict(accuracy=float(((counts[1] < threshold) == truth[1]).mean()),
                  commoner=float(max(truth[1].mean(), 1 - truth[1].mean())),
                  threshold=threshold, samples=n, n=len(truth[1]))
    write_text(folder / "ambiguity.json", json.dumps(result, indent=2) + "\n")
    figure, axes = new_plot(size=(5, 3))
    ax = axes[0, 0]
    ax.hist([counts[1][truth[1]], counts[1][~truth[1]]], bins=np.arange(n + 2) - 0.5,
            color=[COLORS[6], COLORS[5]], label=["readers disagree", "readers agree"])
    ax.axvline(threshold - 0.5, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel=f"samples of {n} that mark something", ylabel="test cases")
    ax.set_title(f"accuracy {result['accuracy']:.3f} (commoner answer {result['commoner']:.3f})",
                 fontsize=9)
    ax.legend(fontsize=8)
    save_figure(figure, folder / "ambiguity.png")
    return result
