"""How every picture paints and arranges images, label maps and maps of numbers, and the pictures
that every evaluation draws.

Functions take arrays and write PNGs. They use Figure without pyplot, which needs no display.
"""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import metrics
from common import IGNORE
from sources.files import write_atomically

# Okabe and Ito's palette, which the colour-blind can tell apart. In every picture class k is
# COLORS[k - 1] and annotator a is COLORS[a].
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#999999")
LINES = [color for color in COLORS if color != "#F0E442"]  # yellow lines do not show on white

CASES, ANNOTATORS, SAMPLES = 6, 7, 16  # that a picture of an evaluation shows at most


# ------------------------------------------------------------------------ painting and layout


def new_plot(rows: int = 1, columns: int = 1, *, size: tuple[float, float]):
    """Make a figure of `size` inches; returns it and its axes, as Figure.subplots does."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns)
    for ax in figure.axes:
        ax.tick_params(labelsize=7)
    return figure, axes


def save_figure(figure, path) -> None:
    """Write the figure as a PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def paint_image(image) -> Tensor:
    """Paint an image (C, H, W) as RGB (H, W, 3) in 0..1: three channels as colours, else the first
    one as grey."""
    image = image.detach().float().cpu()
    image = image.permute(1, 2, 0) if image.shape[0] == 3 else image[0, ..., None].repeat(1, 1, 3)
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp(min=1e-6)


def paint_label(label, image=None) -> Tensor:
    """Paint a label map (H, W) as RGB (H, W, 3) in the classes' colours, over an image if given."""
    label = label.cpu().long()
    base = torch.zeros(*label.shape, 3) if image is None else paint_image(image)
    opacity = 1.0 if image is None else 0.65
    fill = torch.tensor([to_rgb(c) for c in COLORS])[(label - 1).clamp(min=0) % len(COLORS)]
    picture = torch.where((label > 0)[..., None], opacity * fill + (1 - opacity) * base, base)
    picture[label == IGNORE] = 0.5
    return picture


def label_picture(label: np.ndarray) -> Image.Image:
    """Turn a label map (H, W) uint8 into a picture whose palette has the classes' colours."""
    colors = ["#000000", *itertools.islice(itertools.cycle(COLORS), 254), "#808080"]
    picture = Image.fromarray(label)
    picture.putpalette([round(255 * value) for color in colors[: int(label.max()) + 1]
                        for value in to_rgb(color)])
    return picture


def paint_map(values, high: float | None = None, low: float = 0.0, colors="magma") -> Tensor:
    """Paint a map of numbers (H, W) from `low` to `high`, or to its maximum, as RGB (H, W, 3)."""
    values = values.detach().float().cpu()
    high = values.max().item() if high is None else high
    values = (values - low) / max(high - low, 1e-12)
    return torch.from_numpy(colormaps[colors](values.clamp(0, 1).numpy())[..., :3]).float()


def show_picture(ax, picture: Tensor, title: str = "", **options) -> None:
    """Show RGB (H, W, 3) on an axes, which loses its ticks."""
    ax.imshow(picture.numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=8, **options)
    ax.set_axis_off()


def show_map(ax, values, title: str = "", **options):
    """Show a map of numbers (H, W) from dark to bright; returns the image for a colour bar."""
    picture = ax.imshow(values.detach().float().cpu().numpy(), cmap="magma", **options)
    ax.set_title(title, fontsize=8)
    ax.set_axis_off()
    return picture


def save_grid(path, rows: dict, columns=(), notes: dict | None = None, cell: float = 1.0) -> None:
    """Write a PNG of many small pictures, rows {name: [RGB (H, W, 3) or None, ...]} of one size.

    columns: the names above. notes: {(row name, column): a short text for that picture's corner}.
    cell: inches a picture. They are one mosaic on one axes, as hundreds of axes take seconds.
    """
    height, width = next(p for row in rows.values() for p in row if p is not None).shape[:2]
    count, gap = max(map(len, rows.values())), max(1, max(height, width) // 32)
    down, across = height + gap, width + gap
    mosaic = torch.ones(len(rows) * down, count * across, 3)
    for r, row in enumerate(rows.values()):
        for c, picture in enumerate(row):
            if picture is not None:
                mosaic[r * down:, c * across:][:height, :width] = picture
    figure, ax = new_plot(size=(cell * count + 1.2, cell * len(rows) * height / width + 0.4))
    ax.imshow(mosaic.numpy(), interpolation="nearest")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    ax.set_yticks([r * down + height / 2 for r in range(len(rows))], list(rows))
    ax.set_xticks([c * across + width / 2 for c in range(len(columns))], columns)
    for (name, c), text in (notes or {}).items():
        top = list(rows).index(name) * down
        ax.text(c * across + gap, top + gap, text, color="white", fontsize=7, va="top",
                bbox=dict(facecolor="black", alpha=0.5, linewidth=0, pad=1))
    save_figure(figure, path)


def numbered(name: str, count: int) -> list[str]:
    """Number a name as those of columns are: "sample 1", "sample 2", ..."""
    return [f"{name} {i}" for i in range(1, count + 1)]


def paint_outlines(labels, image) -> Tensor:
    """Paint the outlines of label maps (n, H, W) over an image (C, H, W) as RGB (H, W, 3), the
    brighter the more of the maps change class there."""
    edge = torch.zeros(labels.shape, dtype=torch.bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:, :, :-1] |= labels[:, :, :-1] != labels[:, :, 1:]
    share = edge.float().mean(0).unsqueeze(2)
    line = torch.tensor(to_rgb(COLORS[0])).expand(*image.shape[1:], 3)
    return torch.lerp(paint_image(image), line, (share > 0) * (0.3 + 0.7 * share))


def spread(count: int, most: int) -> list[int]:
    """Choose at most `most` indices, evenly spread over 0 .. count - 1."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


# ------------------------------------------------------------------ the cases of an evaluation


@dataclass
class Case:
    """One case as pictures show it, on the CPU. A line is shown as a band, a volume by its fullest
    slice."""

    name: str
    image: Tensor  # (C, H, W)
    labels: Tensor  # (A, H, W), the likeliest first
    drawn_by: dict[int, str]  # {number: name} of the annotators, or modes, of these label maps
    weights: Tensor | None  # (A,) probabilities of the label maps, where they are known
    annotated: Tensor  # (H, W) share of the annotators that marked any foreground
    prediction: Tensor  # (H, W) label map
    samples: Tensor  # (n, H, W) label maps
    foreground: Tensor  # (H, W) mean probability of foreground over all samples
    variance: Tensor  # (H, W) over all samples, added over the classes
    gamma: Tensor  # (H, W), see metrics.gamma_map
    error: Tensor  # (H, W), see metrics.error_map
    ncc: float  # of the last two
    of_volume: bool  # whether the maps are a volume's slice


def cases_to_show(batch, shown: dict, prediction, samples, moments) -> list[Case]:
    """Make a Case of each case of a batch (a Split) that is in shown {name: its name in pictures}.

    prediction (B, *S) and samples (n, B, *S) are label maps; moments: metrics.Moments of all
    samples.
    """
    rows = [i for i, name in enumerate(batch.names) if name in shown]
    if not rows:
        return []
    ncc = metrics.ncc(moments, batch.labels, batch.weights)
    maps = dict(image=batch.images, labels=batch.labels, prediction=prediction,
                samples=samples[:SAMPLES].movedim(0, 1), foreground=1 - moments.mean[:, 0],
                variance=moments.variance, gamma=metrics.gamma_map(moments),
                error=metrics.error_map(moments, batch.labels, batch.weights))
    cases, people = [], short_names(batch.annotators)
    for i in rows:
        flat = _flat({name: values[i] for name, values in maps.items()})
        flat = {name: values.cpu().clone() for name, values in flat.items()}  # without its volume
        labels, probabilities = flat.pop("labels"), batch.probabilities[i].cpu()
        weight = probabilities[:, None, None] * (labels != IGNORE)
        annotated = (weight * (labels > 0)).sum(0) / weight.sum(0).clamp(min=1e-6)
        order = torch.arange(len(labels))
        if batch.exact:  # the known modes, the likeliest first
            order = probabilities.argsort(descending=True)
        order = order[probabilities[order] > 0][:ANNOTATORS]  # an annotator may be missing
        weights = probabilities[order] if batch.exact else None
        drawn_by = {a: f"annotator\n{people[a]}" for a in order.tolist()}
        if batch.exact or batch.instances is not None:  # no annotator drew them
            drawn_by = dict(enumerate(numbered("mode" if batch.exact else "map", len(order))))
        cases.append(Case(shown[batch.names[i]], labels=labels[order], drawn_by=drawn_by,
                          weights=weights, annotated=annotated, ncc=ncc[i].item(),
                          of_volume=prediction.dim() == 4, **flat))
    return cases


def _flat(maps: dict) -> dict:
    """Turn the maps {name: (..., *S)} of one case into maps of two axes."""
    dims = maps["prediction"].dim()
    if dims == 3:
        fullest = fullest_slice(maps["labels"])
        return {name: values.select(-3, fullest) for name, values in maps.items()}
    if dims == 1:
        length = len(maps["prediction"])
        return {name: values.unsqueeze(-2).expand(*values.shape[:-1], length // 2, length)
                for name, values in maps.items()}
    return maps


def fullest_slice(labels) -> int:
    """Find the slice of label maps (n, D, H, W) with the most foreground."""
    return int(((labels > 0) & (labels != IGNORE)).sum((0, 2, 3)).argmax())


def short_names(names: list[str], most: int = 16) -> list[str]:
    """Cut names to their last `most` characters, with a number where these are not unique."""
    ends = [name[-most:] for name in names]
    return [end if ends.count(end) == 1 else f"{end} ({i})" for i, end in enumerate(ends)]


# ------------------------------------------------------------------ the pictures of an evaluation


def case_row(case: Case, columns: dict, samples: int, *between: Tensor) -> list:
    """Paint a case's image, its label maps in the `columns` of `label_names` (None where it lacks
    one) and at most `samples` samples, with the pictures `between` before these."""
    maps = {a: paint_label(label, case.image) for a, label in zip(case.drawn_by, case.labels)}
    return [paint_image(case.image), *map(maps.get, columns), *between,
            *(paint_label(sample, case.image) for sample in case.samples[:samples])]


def label_names(cases: list[Case], most: int = ANNOTATORS) -> dict[int, str]:
    """{number: name} of the `most` annotators (or modes) that drew most of the cases: columns of a
    picture."""
    counts = Counter(a for case in cases for a in case.drawn_by)
    names = {a: name for case in cases for a, name in case.drawn_by.items()}
    return {a: names[a] for a in sorted(a for a, _ in counts.most_common(most))}


def plot_samples(path, cases: list[Case]) -> None:
    """Draw image, annotators, prediction and samples of every case, a column a case."""
    labels = label_names(cases)
    columns = [case_row(c, labels, SAMPLES, paint_label(c.prediction, c.image)) for c in cases]
    names = ["image", *labels.values(), "prediction", *numbered("sample", len(cases[0].samples))]
    notes = {(name, i): f"{p:.2f}" for i, c in enumerate(cases) if c.weights is not None
             for name, p in zip(labels.values(), c.weights)}
    save_grid(path, dict(zip(names, zip(*columns))), [c.name for c in cases], notes)


def plot_overview(path, cases: list[Case]) -> None:
    """Draw four cases with four annotators and eight samples each, a row a case."""
    chosen = cases[:: -(-len(cases) // 4)]
    labels = label_names(chosen, 4)
    rows = {c.name: case_row(c, labels, 8) for c in chosen}
    notes = {(c.name, 1 + a): f"{p:.2f}" for c in chosen if c.weights is not None
             for a, p in enumerate(c.weights[: len(labels)])}
    save_grid(path, rows, ["image", *labels.values(), *numbered("sample", 8)], notes, cell=0.8)


def plot_uncertainty(path, cases: list[Case]) -> None:
    """Draw where annotators differ and where samples do, a column a case."""
    rows = {"image": [paint_image(c.image) for c in cases],
            "annotators:\nforeground": [paint_map(c.annotated, 1) for c in cases],
            "samples:\nforeground": [paint_map(c.foreground, 1) for c in cases],
            "gamma map": [paint_map(c.gamma) for c in cases],
            "variance /\nmaximum": [paint_map(c.variance) for c in cases]}
    save_grid(path, rows, [c.name for c in cases])


def plot_dice(path, values) -> None:
    """Draw the samples' Dice of each case and the share above the prediction's (SSN's Fig. 5)."""
    order = np.argsort(values["dice"], kind="stable")[spread(len(values["dice"]), 80)]
    dice = {name: numbers[order] for name, numbers in values.items() if name.startswith("dice")}
    better = values["dice_better"].mean()
    x = np.arange(len(order))
    figure, ax = new_plot(size=(8, 3.6))
    ax.bar(x, dice["dice_better"], width=0.9, color=COLORS[4], alpha=0.6,
           label="share of samples above the prediction")
    ax.axhline(better, color="#666666", linestyle="--", label=f"its mean, {better:.1%}")
    for low, high, color, width in ((5, 95, COLORS[1], 1.2), (25, 75, COLORS[5], 3)):
        ax.vlines(x, dice[f"dice_q{low:02}"], dice[f"dice_q{high}"], color=color, linewidth=width,
                  label=f"samples: {low}% to {high}%")
    ax.plot(x, dice["dice"], "x", color=COLORS[6], label="prediction")
    ax.set(ylim=(0, 1.02), xlabel="case, by the prediction's Dice", yticks=[0, 0.5, 1])
    ax.set_title(f"Dice of the samples: mean 95% quantile {values['dice_q95'].mean():.3f}, "
                 f"prediction {values['dice'].mean():.3f}", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=5)
    save_figure(figure, path)


def line_styles():
    """Yield a style for each line of a plot: seven colours, then the same dashed, then dotted."""
    for dashes in itertools.cycle(("-", "--", ":")):
        for color in LINES:
            yield dict(color=color, linestyle=dashes)


def plot_ged(path, runs: list[tuple[str, dict]]) -> None:
    """Draw GED against the number of samples, a line a run; runs: (name, what metrics.json has)."""
    figure, ax = new_plot(size=(6, 3.2 + 0.08 * len(runs)))
    for (name, summary), style in zip(runs, line_styles()):
        counts = sorted(int(k[4:]) for k in summary if k.startswith("ged_") and k[4:].isdigit())
        geds = [summary[f"ged_{n}"] for n in counts]
        ax.errorbar(counts, [g["mean"] for g in geds], [g["stderr"] for g in geds], label=name,
                    **style, marker="o", markersize=3, capsize=2)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="samples", ylabel="squared GED", xticks=counts, xticklabels=counts)
    ax.set_ylim(bottom=0)
    add_legend(figure, *ax.get_legend_handles_labels())
    save_figure(figure, path)


def add_legend(figure, lines, names) -> None:
    """Put a legend below a figure, in as many columns as its width has room for."""
    longest = 0.5 + 0.07 * max(map(len, names))  # inches
    figure.legend(lines, names, fontsize=8, loc="outside lower center",
                  ncols=max(1, int(figure.get_figwidth() / longest)))


def plot_validation(path, runs: list[tuple]) -> None:
    """Draw the validation score against the steps and the time of training, a line a run.

    runs: (name, name of the score, steps, minutes, scores); runs of one name share a colour.
    """
    figure, axes = new_plot(1, 2, size=(8, 3.4))
    styles = dict(zip(dict.fromkeys(run[0] for run in runs), line_styles()))
    lines = {}
    for name, _, steps, minutes, scores in runs:
        for ax, x in zip(axes, (steps, minutes)):
            (lines[name],) = ax.plot(x, scores, **styles[name], marker="o", markersize=3)
    score = max(run[1] for run in runs).removeprefix("val_").replace("_", " ")
    axes[0].set(xlabel="training steps", ylabel=f"validation {score}", xlim=(0, None))
    axes[1].set(xlabel="training time in minutes", xlim=(0, None))
    add_legend(figure, lines.values(), lines)
    save_figure(figure, path)


def plot_curves(path, log: list[dict]) -> None:
    """Draw every term of a run's log, and the validation score, against the step."""
    skip = {"step", "steps", "lr", "seconds_per_step"}
    names = list(dict.fromkeys(k for entry in log for k in entry if k not in skip))
    if not names:  # nothing is logged yet
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, _ = new_plot(rows, columns, size=(2.8 * columns, 2.2 * rows))
    for ax in figure.axes[len(names):]:
        ax.set_axis_off()
    for ax, name in zip(figure.axes, names):
        ax.set_xlabel("step", fontsize=7)
        points = [(e["step"], e[name]) for e in log if name in e]
        ax.plot(*zip(*points), color="#0072B2", marker="." if len(points) < 30 else "")
        ax.set_title(name.replace("_", " "), fontsize=8)
    save_figure(figure, path)
