"""Do label maps appear as often as their known probability says?"""

from types import SimpleNamespace

import numpy as np
import torch

import metrics

from analysis.pictures import COLORS, new_plot, save_figure
from models import labels_of, sample_batches


@torch.no_grad()
def calibrate(model, split, n) -> SimpleNamespace:
    """Do modes, and classes of pixels, appear as often as the known odds say?

    frequency, odds: (N, M), of each mode of each case (Kohl et al. 2018, App. C). marginal (20, 2):
    for pixels and foreground classes sorted into 20 bins by their known probability (0 and 1 left
    out): its mean and the mean share of the samples; NaN where a bin is empty.
    """
    frequency, odds, totals = [], [], torch.zeros(20, 3, dtype=torch.float64)
    for part, logits in sample_batches(model, split, n):
        hard = labels_of(logits, 2)
        frequency.append(metrics.mode_frequencies(hard, part.labels, part.num_classes).cpu())
        odds.append(part.probabilities.cpu())
        for k in range(1, part.num_classes):
            known = torch.einsum("bm,bm...->b...", part.probabilities, (part.labels == k).float()).flatten()
            share = (hard == k).float().mean(0).flatten()
            open_ = (known > 1e-4) & (known < 1 - 1e-4)
            known, share = known[open_].double().cpu(), share[open_].double().cpu()
            row = (known * 20).long().clamp(max=19)
            totals.index_add_(0, row, torch.stack([known, share, torch.ones_like(known)], 1))
    return SimpleNamespace(frequency=torch.cat(frequency).numpy(), probabilities=torch.cat(odds).numpy(),
                           marginal=(totals[:, :2] / totals[:, 2:]).numpy())


def pooled(modes, n) -> dict:
    """mode_pooled_tv_<n> and mode_gap_<n> with standard errors by resampling cases."""
    rng = np.random.default_rng(0)
    excess = modes.frequency - modes.probabilities
    again = excess[rng.integers(len(excess), size=(200, len(excess)))].mean(1)  # (200, M)
    mean = excess.mean(0)
    return {f"mode_pooled_tv_{n}": {"mean": abs(mean).sum() / 2, "n": len(excess),
                                    "stderr": np.std(abs(again).sum(1) / 2)},
            f"mode_gap_{n}": {"mean": abs(mean).max(), "stderr": np.std(abs(again).max(1)),
                              "n": len(excess)}}


def plot_modes(path, modes) -> None:
    """Frequencies against known odds: of modes, averaged over cases; and of pixels' classes."""
    odds, frequency = modes.probabilities.mean(0), modes.frequency.mean(0)
    figure, axes = new_plot(1, 3, size=(9, 2.9))
    bars, modewise, pixelwise = axes[0]
    x = np.arange(len(odds))
    order = np.argsort(-odds, kind="stable")
    bars.bar(x - 0.2, odds[order], 0.4, color=COLORS[7], label="known odds")
    bars.bar(x + 0.2, frequency[order], 0.4, color=COLORS[5], label="share of samples")
    bars.set(xticks=x[:: 1 + len(x) // 16], xticklabels=order[:: 1 + len(x) // 16], xlabel="mode")
    bars.legend(fontsize=7)
    seen = np.concatenate([odds, frequency])
    floor = seen[seen > 0].min() / 2  # where modes that were never drawn are put
    modewise.plot([floor, 2 * seen.max()], [floor, 2 * seen.max()], color=COLORS[7])
    modewise.plot(odds, frequency.clip(floor), "o", color=COLORS[5], markersize=3)
    modewise.set(xscale="log", yscale="log", xlabel="odds of a mode", ylabel="its frequency")
    pixelwise.plot([0, 1], [0, 1], color=COLORS[7])
    pixelwise.plot(*modes.marginal.T, "s", color=COLORS[6], markersize=4)
    pixelwise.set(xlabel="odds of a pixel's class", ylabel="its frequency")
    for ax in (modewise, pixelwise):
        ax.set_aspect("equal")
    figure.suptitle(f"total variation, pooled over cases: {abs(odds - frequency).sum() / 2:.3f}",
                    fontsize=9)
    save_figure(figure, path)
