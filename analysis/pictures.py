"""How images, label maps and maps of numbers are painted and laid out, the same in every picture.

Functions take arrays and write PNGs; none needs a display.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import metrics

from common import IGNORE
from sources.files import write_atomically

# matplotlib's Figure is used directly: no pyplot, so no display and no global state.

# Okabe and Ito's palette, told apart by the colour-blind; class k and reader k are COLORS[k - 1]
# and COLORS[k], in every picture.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")


def new_figure(rows: int, columns: int, *, panel: float = 1.3, title: str = ""):
    """(figure, (rows, columns) array of bare axes), `panel` inches a side each, for pictures."""
    figure, axes = new_plot(rows, columns, size=(panel * columns + 0.4, panel * rows + 0.5))
    for ax in axes.flat:
        ax.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, axes


def new_plot(rows: int = 1, columns: int = 1, *, size: tuple[float, float]):
    """(figure of `size` inches, (rows, columns) array of axes with ticks), for curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
    return figure, axes


def save_figure(figure, path, dpi: int = 110) -> None:
    """Write a PNG, whole or not at all."""
    write_atomically(path, lambda name: figure.savefig(name, format="png", dpi=dpi))


def paint_image(image) -> Tensor:
    """Array (C, H, W) -> RGB (H, W, 3) in 0..1: the first channel as grey, or three as colours."""
    image = torch.as_tensor(image).detach().float().cpu()
    image = image.permute(1, 2, 0) if image.shape[0] == 3 else image[0, ..., None].repeat(1, 1, 3)
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp(min=1e-6)


def paint_label(label, image=None) -> Tensor:
    """Label map (H, W) -> RGB (H, W, 3) in the classes' colours, over the image where given."""
    from matplotlib.colors import to_rgb

    label = torch.as_tensor(label).cpu().long()
    base = torch.zeros(*label.shape, 3) if image is None else paint_image(image)
    opacity = 1.0 if image is None else 0.65
    fill = torch.tensor([to_rgb(c) for c in COLORS])[(label - 1).clamp(min=0) % len(COLORS)]
    picture = torch.where((label > 0)[..., None], opacity * fill + (1 - opacity) * base, base)
    picture[label == IGNORE] = 0.5
    return picture


def paint_map(values, high: float | None = None) -> Tensor:
    """Map of numbers (H, W) from 0 to `high` (else its maximum) -> RGB (H, W, 3)."""
    from matplotlib import colormaps

    values = torch.as_tensor(values).detach().float().cpu()
    values = values / max(high or values.max().item(), 1e-12)
    return torch.from_numpy(colormaps["magma"](values.clamp(0, 1).numpy())[..., :3]).float()


def show_image(ax, image, title: str = "") -> None:
    """`paint_image` on an axes."""
    ax.imshow(paint_image(image).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=8)


def show_label(ax, label, image=None, title: str = "") -> None:
    """`paint_label` on an axes."""
    ax.imshow(paint_label(label, image).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=8)


def show_map(ax, values, title: str = "", **options):
    """A map of numbers (H, W), dark to bright; returns the image for a colour bar."""
    values = torch.as_tensor(values).detach().float().cpu().numpy()
    picture = ax.imshow(values, cmap="magma", **options)
    ax.set_title(title, fontsize=8)
    return picture


def save_grid(path, rows: dict, columns=(), notes: dict | None = None, cell: float = 1.0) -> None:
    """A PNG of many small pictures: rows {name: [RGB (H, W, 3) or None, ...]}, all of one size.

    columns: names above. notes: {(row name, column): a few characters in that picture's corner}.
    cell: inches a picture. One mosaic on one axes: hundreds of axes take matplotlib seconds.
    """
    height, width = next(p for row in rows.values() for p in row if p is not None).shape[:2]
    count, gap = max(map(len, rows.values())), max(1, max(height, width) // 32)
    mosaic = torch.ones(len(rows) * (height + gap), count * (width + gap), 3)
    for r, row in enumerate(rows.values()):
        for c, picture in enumerate(row):
            if picture is not None:
                top, left = r * (height + gap), c * (width + gap)
                mosaic[top : top + height, left : left + width] = picture
    figure, axes = new_plot(size=(cell * count + 1.2, cell * len(rows) * height / width + 0.4))
    ax = axes[0, 0]
    ax.imshow(mosaic.numpy(), interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    ax.set_yticks([r * (height + gap) + height / 2 for r in range(len(rows))], list(rows))
    ax.set_xticks([c * (width + gap) + width / 2 for c in range(len(columns))], columns)
    for (name, c), text in (notes or {}).items():
        r = list(rows).index(name)
        ax.text(c * (width + gap) + gap, r * (height + gap) + gap, text, color="white", fontsize=7,
                va="top")
    save_figure(figure, path)


def plot_curves(path, log: list[dict]) -> None:
    """Every term of a run's log, and the validation GED, against the step."""
    skip = {"step", "steps", "lr", "seconds_per_step"}
    names = list(dict.fromkeys(k for entry in log for k in entry if k not in skip))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = new_plot(rows, columns, size=(2.8 * columns, 2.2 * rows))
    for ax in axes.flat[len(names):]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, names):
        points = [(e["step"], e[name]) for e in log if name in e]
        ax.plot(*zip(*points), color="#0072B2", marker="." if len(points) < 30 else "")
        ax.set_title(name.replace("_", " "), fontsize=8)
    save_figure(figure, path)


def plane(split, case, probs, prediction, error, gamma) -> SimpleNamespace:
    """One case as arrays a picture can show, on the CPU: 1D as a band, of 3D one slice.

    probs (n, K, *S), prediction (K, *S), error and gamma maps (*S) -> image (C, H, W), labels
    (A, H, W) with their weights where they differ, the likeliest first; the others with H, W.
    """
    maps = [x.cpu() for x in (split.images[case], split.labels[case], probs, prediction, error,
                              gamma)]
    if maps[0].dim() == 2:
        maps = [x.unsqueeze(-2).expand(*x.shape[:-1], x.shape[-1] // 2, x.shape[-1]) for x in maps]
    if maps[0].dim() == 4:  # the slice with the most foreground
        marked = (maps[1] > 0) & (maps[1] != IGNORE)
        at = int(marked.sum((0, 2, 3)).argmax())
        maps = [x.select(-3, at) for x in maps]
    image, labels, probs, prediction, error, gamma = maps
    weights = None if split.weights is None else split.weights[case].cpu()
    mean_label = reader_mean(labels, weights)
    if weights is None:
        chosen = torch.arange(min(len(labels), READERS))
    else:
        chosen = weights.argsort(descending=True)[:READERS]
        chosen = chosen[weights[chosen] > 0]
        weights = weights[chosen]
    return SimpleNamespace(name=short_name(split, case), image=image, labels=labels[chosen],
                           weights=weights, probs=probs, prediction=prediction,
                           mean_label=mean_label, error=error, gamma=gamma)


def short_name(split, case: int, most: int = 16) -> str:
    """The end of a case's name, where the names of a set differ, and its number if they do not."""
    ends = [name[-most:] for name in split.names]
    return ends[case] if ends.count(ends[case]) == 1 else f"{ends[case]} ({case})"


def reader_mean(labels, weights) -> torch.Tensor:
    """Share of the readers (A, H, W) that drew any foreground, (H, W)."""
    valid = (labels != IGNORE).float()
    weights = valid if weights is None else valid * weights[:, None, None]
    return (weights * (labels > 0)).sum(0) / weights.sum(0).clamp(min=1e-6)


def plot_samples(path, cases) -> None:
    """Image, readers, prediction and samples of every case, a column each."""
    readers, n = max(len(c.labels) for c in cases), len(cases[0].probs)
    named = [f"reader {i + 1}" if cases[0].weights is None else f"mode {i + 1}"
             for i in range(readers)]
    rows = {"image": [paint_image(c.image) for c in cases]}
    for i, name in enumerate(named):
        rows[name] = [paint_label(c.labels[i], c.image) if i < len(c.labels) else None
                      for c in cases]
    rows["prediction"] = [paint_label(c.prediction.argmax(0), c.image) for c in cases]
    for i in range(n):
        rows[f"sample {i + 1}"] = [paint_label(c.probs[i].argmax(0), c.image) for c in cases]
    notes = {(named[i], column): f"{p:.2f}" for column, c in enumerate(cases)
             if c.weights is not None for i, p in enumerate(c.weights)}
    save_grid(path, rows, [c.name for c in cases], notes)


def plot_overview(path, cases) -> None:
    """`plot_samples` in short, a row a case: four cases, four readers, eight samples."""
    rows = {}
    for c in cases[:: -(-len(cases) // 4)]:
        labels = [paint_label(label, c.image) for label in c.labels[:4]]
        rows[c.name] = [paint_image(c.image), *labels, *[None] * (4 - len(labels))]
        rows[c.name] += [paint_label(p.argmax(0), c.image) for p in c.probs[:8]]
    columns = ["image", *(f"{'reader' if cases[0].weights is None else 'mode'} {i}"
                          for i in range(1, 5)), *(f"sample {i}" for i in range(1, 9))]
    notes = {(c.name, 1 + i): f"{p:.2f}" for c in cases if c.name in rows and c.weights is not None
             for i, p in enumerate(c.weights[:4])}
    save_grid(path, rows, columns, notes, cell=0.8)


def plot_uncertainty(path, cases) -> None:
    """Where readers differ and where samples do, a column a case."""
    rows = {"image": [], "readers:\nforeground": [], "samples:\nforeground": [], "gamma map": [],
            "variance /\nmaximum": []}
    for case in cases:
        probs = case.probs.unsqueeze(1)  # (n, 1, K, H, W)
        pictures = (paint_image(case.image), paint_map(case.mean_label, 1),
                    paint_map(1 - probs.mean(0)[0, 0], 1), paint_map(case.gamma),
                    paint_map(metrics.uncertainty_map(probs)[0], 1))
        for row, picture in zip(rows.values(), pictures):
            row.append(picture)
    save_grid(path, rows, [c.name for c in cases])


def plot_dice(path, values) -> None:
    """SSN's Fig. 5: the samples' Dice of each case, and the share above the prediction's."""
    order = np.argsort(values["dice"], kind="stable")
    order = order[np.linspace(0, len(order) - 1, min(80, len(order))).round().astype(int)]
    low, quarter, median, three, high, predicted, better = (
        values[name][order] for name in (*QUANTILES, "dice", "dice_better"))
    x = np.arange(len(order))
    figure, axes = new_plot(size=(8, 3.6))
    ax = axes[0, 0]
    ax.bar(x, better, width=0.9, color=COLORS[4], alpha=0.6, label="share of samples above the "
           "prediction")
    ax.axhline(values["dice_better"].mean(), color="#666666", linestyle="--", linewidth=1,
               label=f"its mean, {values['dice_better'].mean():.1%}")
    ax.vlines(x, low, high, color=COLORS[1], linewidth=1.2, label="samples: 5% to 95%")
    ax.vlines(x, quarter, three, color=COLORS[5], linewidth=3, label="samples: 25% to 75%")
    ax.plot(x, median, ".", color="white", markersize=2)
    ax.plot(x, predicted, "x", color=COLORS[6], markersize=5, label="prediction")
    ax.set(ylim=(0, 1.02), xlabel="case, by the prediction's Dice", yticks=[0, 0.5, 1])
    ax.set_title(f"Dice of the samples: mean 95% quantile {values['dice_q95'].mean():.3f}, "
                 f"prediction {values['dice'].mean():.3f}", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=5)
    save_figure(figure, path)


def plot_ged(path, summaries: dict) -> None:
    """GED against the number of samples, a line a run; `summaries`: {name: metrics.json}."""
    figure, axes = new_plot(size=(5, 3.2))
    ax = axes[0, 0]
    for (name, summary), color in zip(summaries.items(), itertools.cycle(LINES)):
        counts = sorted(int(k[4:]) for k in summary if k.startswith("ged_") and k[4:].isdigit())
        geds = [summary[f"ged_{n}"] for n in counts]
        ax.errorbar(counts, [g["mean"] for g in geds], [g["stderr"] for g in geds], label=name,
                    color=color, marker="o", markersize=3, capsize=2)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="samples", ylabel="squared GED", xticks=counts, xticklabels=counts)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    save_figure(figure, path)


def paint_outlines(labels, image) -> torch.Tensor:
    """Where any of the label maps (n, H, W) changes class, over the image: RGB (H, W, 3), the
    brighter the more of them do."""
    edge = torch.zeros(labels.shape, dtype=torch.bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:, :, :-1] |= labels[:, :, :-1] != labels[:, :, 1:]
    share = edge.float().mean(0).unsqueeze(2)
    line = torch.tensor([0.90, 0.62, 0.0])  # the first class's colour
    return torch.lerp(paint_image(image), line.expand(*edge.shape[1:], 3),
                      (share > 0) * (0.3 + 0.7 * share))


LINES = [c for c in COLORS if c != "#F0E442"]  # yellow lines do not show on white


COLUMNS = 6  # cases a picture shows


QUANTILES = ("dice_q05", "dice_q25", "dice_q50", "dice_q75", "dice_q95")


READERS = 7  # label maps of a case a picture shows
