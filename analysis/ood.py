"""Do samples warn of unfamiliar images?"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from analysis.pictures import paint_image, paint_label, paint_map, save_grid, spread
from common import IGNORE, Progress, UserError, reflect_pad
from models import labels_of, sample_batches
from sources.files import write_text

CORRUPTIONS = {"blur": (1, 2, 4, 8), "patch": (5, 10, 20, 40), "noise": (0.25, 0.5, 1, 2)}
CASES, SAMPLES = 64, 10
MARGIN = 5  # pixels round the predicted foreground that count


def corrupt(images, kind: str, strength: float, seed=0) -> torch.Tensor:
    """Images (B, C, H, W) taken out of their distribution (Bai and Bai 2023, Sec. 4.2).

    strength: of a blur its sigma in pixels; of a patch, as bright as the image's maximum, per cent
    of the image's sides; of noise, standard deviations of the images. Places and noise do not
    depend on it.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "blur":
        radius = math.ceil(4 * strength)
        at = torch.arange(-radius, radius + 1, device=images.device)
        weight = torch.exp(-(at / strength).square() / 2)
        weight = (weight / weight.sum()).view(1, 1, -1, 1)
        rows = reflect_pad(images, [(radius, radius)] * 2).flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(rows, weight), weight.mT).view_as(images)
    if kind == "patch":
        images = images.clone()
        height, width = (max(1, round(strength / 100 * side)) for side in images.shape[2:])
        places = torch.rand(len(images), 2, generator=generator).tolist()
        for image, (down, right) in zip(images, places):
            top = int(down * (image.shape[1] - height + 1))
            left = int(right * (image.shape[2] - width + 1))
            image[:, top : top + height, left : left + width] = image.max()
        return images
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return images + strength * images.std() * noise


def as_foreign(images, like) -> torch.Tensor:
    """Images (M, C', H', W') in size, channels, mean and std of `like` (N, C, H, W), so that what
    they show is foreign, not their scale."""
    grey = images.mean(1, keepdim=True).expand(-1, like.shape[1], -1, -1)
    same = images if images.shape[1] == like.shape[1] else grey
    same = F.interpolate(same, like.shape[2:], mode="bilinear", antialias=True)
    return (same - same.mean()) / same.std().clamp(min=1e-6) * like.std() + like.mean()


def warning_scores(probs) -> dict:
    """How much an image's samples differ, in one number: probs (n, B, K, H, W) -> two of (B,).

    The mean of a map over the predicted foreground and MARGIN pixels round it; over the whole image
    where nothing is predicted. variance: over the samples, added over the classes. It is not
    divided by its maximum, as in metrics.uncertainty_map, because then the most uncertain pixel
    would count the same in every image.
    gamma: PHiSeg's map, which also shows what is uncertain within each sample.
    """
    foreground = (labels_of(probs.mean(0), 1) > 0).float().unsqueeze(1)
    near = F.max_pool2d(foreground, 2 * MARGIN + 1, 1, MARGIN).flatten(1)  # (B, H*W)
    near = torch.where(near.any(1, keepdim=True), near, torch.ones_like(near))
    moments = metrics.Moments(probs)
    maps = {"variance": moments.variance, "gamma": metrics.gamma_map(moments)}
    return {name: (m.flatten(1) * near).sum(1) / near.sum(1) for name, m in maps.items()}


@torch.no_grad()
def ood(model, split, foreign, foreign_name: str, folder) -> dict:
    """Do the samples of corrupted and foreign images differ more than those of the split's own?

    (Bai and Bai 2023, Sec. 4.2.) For every corruption and strength the AUROC of both warning scores
    against the same cases left as they are. foreign: images (M, C', H', W') of another data set.
    Writes ood.json, which is returned, and ood.png.
    """
    for owner, images in (("this data set", split.images), (foreign_name, foreign)):
        if images.dim() != 4:
            raise UserError("--ood is for 2D images; "
                            f"those of {owner} have {images.dim() - 2} axes")
    split = split.subset(spread(len(split), CASES))
    foreign = foreign[spread(len(foreign), len(split))].to(split.images.device)
    foreign = as_foreign(foreign, split.images)

    given = {("clean", ""): split.images, ("foreign", foreign_name): foreign}
    strengths = [(kind, strength) for kind in CORRUPTIONS for strength in CORRUPTIONS[kind]]
    marked = (split.labels > 0) & (split.labels != IGNORE)
    most = int(marked.flatten(1).sum(1).argmax())
    scores, shown = {}, {}  # by condition: {score: (cases,)}, and images for the picture
    progress = Progress(len(strengths) + 2)
    for condition in [("clean", ""), *strengths, ("foreign", foreign_name)]:
        images = given[condition] if condition in given else corrupt(split.images, *condition)
        cases = replace(split.subset(range(len(images))), images=images)
        batches = []
        for _, chunks in sample_batches(model, cases, SAMPLES):
            batches.append(warning_scores(torch.cat([logits.softmax(2) for logits in chunks])))
        scores[condition] = {name: torch.cat([batch[name] for batch in batches])
                             .double().cpu().numpy() for name in batches[0]}
        shown[condition] = images[:3] if condition[0] == "foreign" else images[[most]]
        progress.update(len(scores), "{} {}".format(*condition))

    out, summary = Path(folder), ood_summary(scores, split.groups)
    write_text(out / "ood.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    plot_ood(out / "ood.png", model, shown)
    return summary


def ood_summary(scores: dict, groups) -> dict:
    """{"<score>_<kind>_<strength>": {"mean", "stderr", "n"}}, and under "auroc_..." the AUROC.

    scores {(kind, strength): {score: (cases,)}} with ("clean", "") among them. Standard errors are
    by resampling the cases' groups (cases,), each case with its clean image, and foreign images.
    """
    clean, summary = scores["clean", ""], {}
    for (kind, strength), both in scores.items():
        for score, values in both.items():
            name = f"{score}_{kind}_{strength}".rstrip("_")
            own = range(len(values)) if kind == "foreign" else groups
            summary[name] = metrics.bootstrap(values, own)
            if kind == "clean":
                continue
            draws = zip(metrics.resampled(own, seed=int(kind == "foreign")),
                        metrics.resampled(groups))
            again = [metrics.auroc(np.repeat(values, mine), np.repeat(clean[score], cases))
                     for mine, cases in draws]
            summary[f"auroc_{name}"] = {"mean": metrics.auroc(values, clean[score]),
                                        "stderr": float(np.std(again)), "n": len(values)}
    return summary


def plot_ood(path, model, shown: dict) -> None:
    """Bai and Bai's Figs. 3, 8 and 9: image, prediction and uncertainty of one case, by strength.

    shown {(kind, strength): images (n, C, H, W)}: one, and of the last, "foreign", up to three.
    Every map of uncertainty is divided by its own maximum.
    """
    rows, notes = {}, {}
    for (kind, strength), images in shown.items():
        probs = model.sample(images, SAMPLES, torch.Generator(images.device).manual_seed(0))
        probs = probs.float().softmax(2)
        labels, maps = labels_of(probs.mean(0), 1), metrics.uncertainty_map(probs)
        name = {"clean": "as it is", "foreign": f"foreign:\n{strength}"}.get(kind)
        if kind in CORRUPTIONS:
            name = f"strength {CORRUPTIONS[kind].index(strength) + 1}"
            notes[name, len(rows.get(name, ()))] = f"{kind} {strength}"
        for image, label, m in zip(images, labels, maps):
            rows.setdefault(name, []).extend(
                [paint_image(image), paint_label(label, image), paint_map(m, 1)])
    save_grid(path, rows, ["image", "prediction", "uncertainty"] * len(CORRUPTIONS), notes)
