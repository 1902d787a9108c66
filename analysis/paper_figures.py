"""Figures of the papers, drawn for trained models by means that only these models have."""

import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import metrics
from analysis.pictures import (COLORS, Case, case_row, cases_to_show, fullest_slice,
                               label_names, new_plot, numbered, paint_image, paint_label, paint_map,
                               save_figure, save_grid, show_map, show_picture)
from common import IGNORE, center_crop, pad_to_multiple

MANIPULATED = 8  # classes that plot_manipulation shows at most


@torch.no_grad()
def plot_toy(models: dict, image: Tensor, label: Tensor, path: str) -> None:
    """Draw SSN's Fig. 2: mean, covariance and 14 samples of every model, a row each, and the two
    label maps at the end."""
    figure, axes = new_plot(len(models), 4, size=(8.4, 2 * len(models) + 0.5))
    for row, (name, model) in zip(axes, models.items()):
        normal = model.distribution(image[:1])
        # of two classes the difference of logits is all that matters: one number a pixel
        mean = normal.mean[:, 1] - normal.mean[:, 0]  # (1, S)
        covariance = normal.diagonal[0].sum(0).diag()
        if normal.factor is not None:
            factor = normal.factor[0, :, 1] - normal.factor[0, :, 0]  # (R, S)
            covariance = covariance + factor.T @ factor
        samples = model.sample(image[:1], 14, torch.Generator().manual_seed(0))
        show_map(row[0], mean.T.expand(-1, 7), f"{name}\nmean logit")
        picture = show_map(row[1], covariance, "covariance")
        figure.colorbar(picture, ax=row[1], shrink=0.7)
        show_map(row[2], samples[:, 0].softmax(1)[:, 1].T, "14 samples, p(on)", vmin=0, vmax=1)
        show_map(row[3], label.T.repeat_interleave(3, 1), "the label maps", vmin=0, vmax=1)
    save_figure(figure, path)


@torch.no_grad()
def plot_manipulation(model, image: Tensor, path: str) -> None:
    """Draw SSN's Fig. 6: one sample of an image (C, *S), or of a volume's slice, that is changed
    after it was drawn.

    There is a row for each of the most frequent foreground classes, whose part of (sample - mean)
    is scaled by -3 ... 3 while the other classes stay, and one in which all are scaled; the square
    of this scale is the temperature.
    """
    scales = (-3, -2, -1, 0, 1, 2, 3)
    normal = model.distribution(image[None])
    mean = normal.mean[0]  # (K, *S)
    sample = normal.sample(1, torch.Generator(image.device).manual_seed(0))[0, 0]
    if image.dim() == 4:
        fullest = fullest_slice(sample.argmax(0)[None])
        image, mean, sample = (x[:, fullest] for x in (image, mean, sample))
    counts = sample.argmax(0).flatten().bincount(minlength=len(sample))
    classes = 1 + counts[1:].argsort(descending=True, stable=True)[:MANIPULATED]
    rows = {}
    for k in sorted(classes.tolist()):
        factor = torch.ones(len(sample), *[1] * (sample.dim() - 1), device=sample.device)
        rows[f"class {k} scaled"] = row = []
        for scale in scales:
            factor[k] = scale
            row.append(paint_label((mean + factor * (sample - mean)).argmax(0), image))
    rows["all classes scaled\n(temperature x^2)"] = [
        None if scale < 0 else paint_label((mean + scale * (sample - mean)).argmax(0), image)
        for scale in scales]
    save_grid(path, rows, [f"x {scale}" for scale in scales])


@torch.no_grad()
def plot_latent_map(model, image: Tensor, labels: Tensor, path: str) -> None:
    """Draw Figs. 6 and 7 of the Probabilistic U-Net: the label maps across the latent space of two
    dimensions, and the annotators in it.

    image (C, H, W), labels (A, H, W) of its annotators, on the model's device. Positions are
    counted in the prior's std from the prior's mean, so the prior is the unit normal in the
    picture: the rings at 1 to 4 std hold 39.3 %, 86.5 %, 98.9 % and 99.97 % of the samples. A dot
    is the posterior's mean for an annotator's map; outliers are drawn at the border.
    """
    side, edge = 19, 4.75  # tiles a side, half a std wide each
    at = torch.linspace(-4.5, 4.5, side, device=image.device)
    whitened = torch.stack(torch.meshgrid(at, -at, indexing="xy"), -1)  # y upwards
    prior = model.prior(image[None])
    z = prior.mean + prior.std * whitened.view(-1, 1, 2)
    tiles = model.decode(image[None], z).argmax(2).unflatten(0, (side, side))[:, :, 0]
    mosaic = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (side * H, side * W)
    posterior = model.posterior(image.expand(len(labels), -1, -1, -1), labels.long())
    annotators = ((posterior.mean - prior.mean) / prior.std).cpu()

    rows = 1 + len(labels)
    figure = Figure(figsize=(7.2 + 6.6 / rows, 7), layout="constrained")
    panels = figure.subplot_mosaic([[row, "map"] for row in range(rows)], width_ratios=(1, rows))
    show_picture(panels[0], paint_image(image), "image")
    for a, label in enumerate(labels):
        show_picture(panels[1 + a], paint_label(label), f"annotator {a}", fontweight="bold",
                     color=COLORS[a % len(COLORS)])

    ax = panels["map"]
    ax.imshow(paint_label(mosaic).numpy(), extent=(-edge, edge, -edge, edge))
    lines = torch.linspace(-edge, edge, side + 1)
    ax.hlines(lines, -edge, edge, color="#555555", linewidth=0.4)
    ax.vlines(lines, -edge, edge, color="#555555", linewidth=0.4)
    angle = torch.linspace(0, 2 * math.pi, 200)
    for ring in range(1, 5):
        ax.plot(ring * angle.cos(), ring * angle.sin(), color="white", linewidth=1.2)
        ax.text(0, ring, f"{ring} std", color="black", fontsize=7, ha="center", va="center",
                bbox=dict(boxstyle="round,pad=0.15", facecolor="white", linewidth=0))
    for a, (x, y) in enumerate(annotators.clamp(-edge, edge).tolist()):
        color, turn = COLORS[a % len(COLORS)], 2 * math.pi * a / len(labels)
        ax.annotate(str(a), (x, y), (22 * math.sin(turn), 22 * math.cos(turn)),
                    textcoords="offset points", fontsize=10, fontweight="bold",
                    ha="center", va="center", arrowprops=dict(color=color, arrowstyle="-", lw=2),
                    bbox=dict(boxstyle="circle,pad=0.2", facecolor=color, edgecolor="white"))
        ax.plot(x, y, "o", color=color, markersize=6, markeredgecolor="white")
    ax.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal",
           xlabel="$z_0$, in std of the prior from its mean", ylabel="$z_1$")
    ax.set_title("the label map that each latent position stands for\n"
                 "rings: the prior; numbers: where the posterior puts each annotator", fontsize=10)
    save_figure(figure, path)


def draw_cases(model, split, n: int) -> list[Case]:
    """Draw n samples for every case of a Split, for `plot_maps` and pictures.plot_overview."""
    probs = model.sample(split.images, n, torch.Generator().manual_seed(0)).softmax(2)
    return cases_to_show(split, dict(zip(split.names, split.names)),
                         model.predict(split.images).argmax(1), probs.argmax(2),
                         metrics.Moments(probs))


@torch.no_grad()
def plot_levels(model, image: Tensor, path: str, n: int = 3) -> None:
    """Draw PHiSeg's Fig. 1: n samples of an image (C, H, W) that grow level by level.

    Below each level: what it added (blue) to or took from the logits of the sample's most frequent
    foreground class, minus the mean over all classes.
    """
    images = image.expand(n, *image.shape)
    noise = next(model.noise(images, 1, torch.Generator().manual_seed(0)))
    latents, _ = model.prior(model.encode(images), noise=noise)
    # coarse to fine, (n, K, H, W)
    logits = list(model.level_logits(latents, image.shape[1:]).values())
    masks = [m.argmax(1) for m in logits]
    changes = [logits[0]] + [fine - coarse for coarse, fine in zip(logits, logits[1:])]
    changes = [c - c.mean(1, keepdim=True) for c in changes]
    rows = {}
    for i in range(n):
        k = masks[-1][i].flatten().bincount(minlength=2)[1:].argmax() + 1
        bound = max(change[i, k].abs().max().item() for change in changes)
        rows[f"sample {i + 1}"] = [paint_image(image), *(paint_label(m[i]) for m in masks)]
        rows[f"residual {i + 1}"] = [None, *(paint_map(change[i, k], bound, -bound, "RdBu")
                                             for change in changes)]
    save_grid(path, rows, ["image", *reversed(numbered("level", len(masks)))], cell=1.2)


def plot_maps(path: str, cases: list[Case]) -> None:
    """Draw PHiSeg's Fig. 3: does the model vary where the annotators contradict it? The error map
    and the gamma map of a case, which is a row, share one scale."""
    labels = label_names(cases, 4)
    rows, notes = {}, {}
    for case in cases:
        high = max(case.error.max().item(), case.gamma.max().item())
        rows[case.name] = case_row(case, labels, 4, paint_map(case.error, high),
                                   paint_map(case.gamma, high))
        notes[case.name, len(labels) + 2] = f"NCC {case.ncc:.2f}"
    columns = ["image", *labels.values(), "E[CE(y, s)]", "gamma map", *numbered("sample", 4)]
    save_grid(path, rows, columns, notes)


@torch.no_grad()
def plot_scales(model, image: Tensor, path: str, n: int = 5) -> None:
    """Draw HPU-Net's Fig. 3: samples of an image (C, H, W), and how they vary, if all scales are
    drawn, only the most local one, or only the most global one."""
    rows, scales = {}, [i for i, width in enumerate(model.config.latents) if width]
    for name, chosen in (("all scales", None), ("local only", scales[-1:]),
                         ("global only", scales[:1])):
        generator = torch.Generator(image.device).manual_seed(0)
        samples = model.sample(image[None], 16, generator, scales=chosen)[:, 0].argmax(1)
        drawn = F.one_hot(samples, model.config.num_classes).movedim(-1, 1)  # (16, K, H, W)
        deviation = (metrics.Moments(drawn[:, None]).variance[0] / 2).sqrt()  # of 0 and 1 if K = 2
        rows[name] = [paint_image(image), *(paint_label(s, image) for s in samples[:n]),
                      paint_map(deviation, 0.7)]
    save_grid(path, rows, ["image", *numbered("sample", n), "std of 16"])


@torch.no_grad()
def plot_extrapolation(model, seen: Tensor, label: Tensor, path: str) -> None:
    """Draw HPU-Net's Fig. 5, a row a case: what a model trained with data.hide makes of its inputs
    `seen` (B, C + K + 1, H, W), and of the whole label maps (B, H, W)."""
    samples = model.sample(seen, 6, torch.Generator(seen.device).manual_seed(0)).argmax(2)
    again, hidden = model.reconstruct(seen, label.long()).argmax(1), seen[:, -1] == 1
    shown = zip(seen, label.masked_fill(hidden, IGNORE), label, again, samples.unbind(1))
    rows = {f"case {i}": [paint_image(image[:1]), *map(paint_label, (*maps, *guesses))]
            for i, (image, *maps, guesses) in enumerate(shown, 1)}
    save_grid(path, rows, ["image", "known", "truth", "reconstruction", *numbered("sample", 6)])


@torch.no_grad()
def plot_latents(model, image: Tensor, path: str) -> None:
    """Draw VAE U-Net's Fig. 11: mean and log variance of every level's first latent for an image
    (C, H, W)."""
    latents = model.encode(image[None])[1]
    size = pad_to_multiple(image[None], model.backbone.multiple).shape[2:]
    figure, axes = new_plot(2, 1 + len(latents), size=(1.9 * len(latents) + 2.3, 4.3))
    show_picture(axes[0, 0], paint_image(image), "image")
    axes[1, 0].set_axis_off()
    for level, (q, column) in enumerate(zip(latents, axes[:, 1:].T)):
        maps = {f"mean, level {level}": q.mean, "log variance": 2 * q.log_std}
        for ax, (title, values) in zip(column, maps.items()):
            values = F.interpolate(values[:, :1], size)[0, 0]  # nearest
            picture = show_map(ax, center_crop(values, image.shape[1:]), title)
            figure.colorbar(picture, ax=ax, shrink=0.7).ax.tick_params(labelsize=6)
    save_figure(figure, path)


def plot_vae_samples(model, images: dict[str, Tensor], path: str) -> None:
    """Draw VAE U-Net's Fig. 2: image, prediction, uncertainty map and samples of images {name:
    (C, H, W)} of one size."""
    batch = torch.stack(list(images.values()))
    probs = model.sample(batch, 16, torch.Generator().manual_seed(0)).softmax(2)
    predictions, maps = model.predict(batch).argmax(1), metrics.uncertainty_map(probs)
    rows = {}
    for i, (name, image) in enumerate(images.items()):
        labels = [paint_label(label, image) for label in probs[:6, i].argmax(1)]
        rows[name] = [paint_image(image), paint_label(predictions[i], image),
                      paint_map(maps[i], 1), *labels]
    save_grid(path, rows, ["image", "prediction", "uncertainty", *numbered("sample", 6)])
