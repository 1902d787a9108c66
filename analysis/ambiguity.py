"""Can the samples tell on which cases annotators disagree?"""

import json
from pathlib import Path

import numpy as np
import torch

from analysis.pictures import COLORS, new_plot, save_figure
from common import UserError
from models import labels_of, sample_batches
from sources.files import write_text


@torch.no_grad()
def ambiguity(model, val, test, folder, n=16) -> dict:
    """Can the samples tell which cases the annotators disagree on? (Kohl et al. 2018, App. E.)

    A case is ambiguous if one annotator marked something and another nothing. It is predicted
    to be so if fewer than t of its n samples mark something; t has the highest accuracy on the
    validation split. Writes ambiguity.json and ambiguity.png to `folder`; returns the accuracy on
    the test split, that of always giving the more frequent answer ("commoner"), and t. Raises
    UserError if all test cases are alike in this.
    """
    (val_counts, val_truth), (counts, truth) = (marking(model, split, n) for split in (val, test))
    if truth.all() or not truth.any():
        raise UserError(f"--ambiguous: in {'all' if truth.all() else 'none'} of the {len(truth)} "
                        "test cases, some annotators mark something and others nothing, so there "
                        "is nothing to tell apart")
    right = [((val_counts < t) == val_truth).mean() for t in range(n + 2)]
    threshold = int(np.argmax(right))
    result = dict(accuracy=float(((counts < threshold) == truth).mean()),
                  commoner=float(max(truth.mean(), 1 - truth.mean())),
                  threshold=threshold, samples=n, n=len(truth))
    write_text(Path(folder) / "ambiguity.json", json.dumps(result, indent=2) + "\n")
    figure, ax = new_plot(size=(5, 3))
    ax.hist([counts[truth], counts[~truth]], bins=np.arange(n + 2) - 0.5,
            color=[COLORS[6], COLORS[5]],
            label=["some annotators mark nothing", "all or none mark something"])
    ax.axvline(threshold - 0.5, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel=f"samples of {n} that mark something", ylabel="test cases")
    ax.set_title(f"accuracy {result['accuracy']:.3f} (commoner answer {result['commoner']:.3f})",
                 fontsize=9)
    ax.legend(fontsize=8)
    save_figure(figure, Path(folder) / "ambiguity.png")
    return result


def marking(model, split, n) -> tuple[np.ndarray, np.ndarray]:
    """Of each case, how many of n samples mark something, and whether annotators disagree."""
    counts, ambiguous = [], []
    for batch, chunks in sample_batches(model, split, n):
        marked = [(labels_of(logits, 2) > 0).flatten(2).any(2) for logits in chunks]
        counts.append(torch.cat(marked).sum(0))
        ambiguous.append(batch.marked.any(1) & (~batch.marked & batch.present).any(1))
    return torch.cat(counts).cpu().numpy(), torch.cat(ambiguous).cpu().numpy()
