"""report.html: the numbers, curves, pictures and cases of a judged run on one page.

The page, whose frame is page.html, holds everything inline: it opens from disk in any browser and
can be sent to somebody as one file.
"""

import base64
import io
import re
import textwrap
from datetime import timedelta
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import torch.nn.functional as F
from PIL import Image

from analysis.compare import read_scores, training_time, validations
from analysis.pictures import COLORS, label_picture, paint_image, paint_map
from common import IGNORE
from sources.files import write_text
from sources.runs import read_config, read_log

SIDE = 192  # pixels: larger cases are shrunk, so that the page stays at a few MB
HEADLINE = {"ged": "↓", "hungarian_iou": "↑", "ncc": "↑", "dice": "↑"}
ARROWS = {"↓": "↓ lower is better", "↑": "↑ higher is better"}

# What each measure means, under headings; the arrow shows the better direction. The ending of its
# name in metrics.json, mostly a number, becomes a column of the table: see `split_name`.
MEASURES = {
    "Samples against annotators, by the number of samples": {
        "ged": "↓ Squared generalised energy distance of samples and annotations. n samples of the "
               "true distribution, against A annotations, have about d (1/n + 1/A), where d is the "
               "mean 1 - IoU of two different ones.",
        "hungarian_iou": "↑ Mean IoU after samples and annotations are matched one to one.",
        "ncc": "↑ Correlation between where samples vary and where annotators contradict them.",
        "diversity": "Mean 1 - IoU of two of the n samples, each pair of a sample with itself "
                     "included. Ideally d (1 - 1/n), with d as above."},
    "Sets of samples against annotators": {
        "dice_max": "↑ Dice of the sample nearest to an annotator, averaged over annotators.",
        "dice_match": "↑ Dice when every annotator is matched with a sample of its own.",
        "dice_soft": "↑ Dice of the samples' and the annotators' means above five thresholds.",
        "volume_crps": "↓ CRPS of the foreground's volume, in pixels."},
    "Calibration of the samples' mean": {
        "ece": "↓ Expected calibration error in 20 bins: of all pixels, of those where some "
               "foreground is possible, and of those where it is uncertain.",
        "brier": "↓ Brier score over all classes, from 0 to 2."},
    "Failure detection: does a score of the image tell how wrong the prediction is?": {
        "aurc": "↓ Area under the curve of risk, 1 - Dice, against the share of images kept.",
        "e_aurc": "↓ By how much this area exceeds that of the ideal order.",
        "augrc": "↓ The area if the risk is divided by the number of all images, from 0 to 0.5."},
    "Uncertainty": {
        "entropy": "Entropy of the samples' mean, in nats per pixel: the total uncertainty.",
        "expected_entropy": "Mean entropy of a single sample, in nats per pixel.",
        "mutual_information": "Entropy minus expected entropy: how much the samples disagree.",
        "disagreement": "1 - Dice of the samples and the prediction of their mean.",
        **{f"{name}_patch": f"Mean {name.replace('_', ' ')} in the window of 10 pixels a side where "
           "it is highest." for name in ("variance", "entropy", "mutual_information")}},
    "The single prediction against annotators": {
        "dice": "↑ Dice of the deterministic prediction, averaged over annotators and classes; "
                "1 for a class that neither marks.",
        "dice_present": "↑ The same over classes that the annotation has.",
        "dice_foreground": "↑ Dice of the prediction, all classes but the background as one.",
        "dice_mean": "↑ Dice of the mean of the samples' probabilities.",
        "ged_predict": "↓ GED of the prediction, as if it were the only sample.",
        "dice_better": "Share of samples whose Dice is above the prediction's."},
    "Likelihood and reconstruction": {
        "log_likelihood": "↑ Log-probability of an annotation under the model, in nats: a lower "
                          "bound from --likelihood-samples samples. It is exact for unet, m_heads "
                          "and ensemble, and with few samples far too low for ssn, so it does not "
                          "rank methods.",
        "iou_rec": "↑ IoU of an annotation and its reconstruction from the posterior's mean."},
    "Spread of the samples' Dice": {
        "dice_q": "Quantiles of Dice over the samples of a case; columns are per cent."},
    "Known probabilities": {
        "mode_tv": "↓ Total variation between frequencies of a case's label maps and known ones. "
                   "Above 0 even for samples of the true distribution.",
        "mode_pooled_tv": "↓ The same after averaging over the cases.",
        "mode_gap": "↓ The largest difference of a single label map, after the same averaging."},
    "By class": {
        "dice_class": "↑ Dice of the class, averaged over the annotators who marked it.",
        "hd95_class": "↓ 95 % Hausdorff distance of the class in pixels or voxels, averaged "
                      "likewise over the cases in which the prediction has the class, too."},
    "Objects found in samples": {
        "rand_error": "↓ Rand error: 1 - F-score over pairs of pixels of one object.",
        "rand_error_components": "↓ The same for connected parts of the prediction.",
        "ap": "↑ Average precision of the objects, over IoU thresholds from 0.5 to 0.95.",
        "ap50": "↑ Average precision of the objects at an IoU of 0.5.",
        "coherence": "↑ Share of an object's pixels that have its commonest colour in a sample.",
        "colour_nats": "Information in the objects' colours: objects x ln(colours), in nats.",
        "kl": "KL divergence of posterior and prior in nats, of all latents and of each latent "
              "map. Latents that can name every object need at least colour_nats."}}
# Pictures that may lie in the folder, with captions; True for plots, which turn dark with the page.
PICTURES = {
    "curves.png": (True, "Training: every term of the loss, and the validation score, by step."),
    "ged.png": (True, "GED against the number of samples."),
    "modes.png": (True, "Frequencies of label maps and of pixels' classes against known ones."),
    "reliability.png": (True, "Annotators' mean against the samples' mean, by pixels."),
    "risk_coverage.png": (True, "Mean error of the images that are kept if the most uncertain ones "
                                "are left out."),
    "dice.png": (False, "Spread of the samples' Dice in each case, beside the prediction's."),
    "overview.png": (False, "Annotators and samples of a few cases."),
    "uncertainty.png": (False, "Where annotators differ and where samples do. PHiSeg's gamma map "
                               "is the mean cross-entropy between the samples' mean and a sample."),
    "maps.png": (False, "Does the model vary (gamma map) where annotators contradict it (PHiSeg, "
                        "Fig. 3)?"),
    "instances.png": (False, "Objects clustered from samples (HPU-Net, Fig. 4)."),
    "manipulation.png": (False, "One sample, changed by class and by temperature (SSN, Fig. 6)."),
    "levels.png": (False, "Samples growing level by level (PHiSeg, Fig. 1)."),
    "latents.png": (False, "Latent maps of every level (VAE U-Net, Fig. 11)."),
    "scales.png": (False, "Samples if only some scales are drawn (HPU-Net, Fig. 3)."),
    "extrapolation.png": (False, "Completions of hidden label maps (HPU-Net, Fig. 5).")}


def explained() -> str:
    """PICTURES and MEASURES as text, with which `evaluate.py --help` ends."""
    lines = ["Names of measures end with a number of samples (ged_16), a class (hd95_class_2),",
             "a quantile (dice_q05), a kind of pixels (ece_band), or a score (aurc_entropy)."]
    pictures = {name: caption for name, (_, caption) in PICTURES.items()}
    for heading, texts in [*MEASURES.items(), ("Pictures", pictures)]:
        lines += ["", heading]
        for name, text in texts.items():
            text = text.replace("↓", "(lower is better)").replace("↑", "(higher is better)")
            lines += textwrap.wrap(text, 100, initial_indent=f"    {name:26}",
                                   subsequent_indent=30 * " ")
    return "\n".join(lines)


def write_page(out: Path, folder: Path, judged: str, cases: list, shown: dict) -> None:
    """Write `out`/report.html from the files in `out` and in the run's `folder`.

    judged: what was judged, in words. cases: pictures.Case of every case to page through; shown:
    {its name in per_case.csv: its name in pictures}.
    """
    summary, scores = read_scores(out)
    log = read_log(folder)
    _, steps, _, validated = validations(log)
    if judged.endswith("best.pt") and np.isfinite(validated).any():
        judged += f" (step {steps[int(np.nanargmin(validated))]:,.0f})"
    about = ["{model} on {data}, seed {seed}".format(**read_config(folder)["settings"]), judged]
    for steps, seconds in training_time(log)[-1:]:
        if abs(seconds) < 1e9:  # in a damaged log it may be anything
            about.insert(1, f"{steps:,.0f} training steps in {timedelta(seconds=round(seconds))} "
                            "(h:min:s)")
    headline = {}
    for base, arrow in HEADLINE.items():
        names = [name for name in summary if split_name(name)[0] == base]
        if names:  # the longest is that of the most samples, ged_100 before ged_16
            headline[max(names, key=lambda name: (len(name), name))] = arrow
    full, options, articles = {short: name for name, short in shown.items()}, "", []
    for case in cases:
        name = full[case.name]
        marks = [f"{spoken(n)} {float(scores[name][n]):.3f}" for n in headline]
        options += f"<option>{escape(' · '.join([name, *marks[:1]]))}</option>"
        articles.append(case_html(case, escape(name), ", ".join(marks)))
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_text(out / "report.html", template.substitute(
        title=escape(folder.resolve().name), about=escape(" · ".join(about)), options=options,
        tiles="".join(f"<div><dt>{spoken(name)}</dt><dd>{value(summary[name], len(scores))}</dd>"
                      f"<dd class=better>{ARROWS[arrow]}</dd></div>"
                      for name, arrow in headline.items()),
        classes=classes_html(cases), cases="".join(articles),
        numbers=numbers_html(summary, len(scores)),
        pictures=pictures_html(out, folder)))


def classes_html(cases: list) -> str:
    """That a volume is shown by a slice, and what the colours of label maps mean."""
    count = int(max(maps[maps != IGNORE].max(initial=0) for case in cases
                    for maps in (case.labels.numpy(), case.prediction.numpy())))
    key = " ".join(f"<span class=key><span style='color: {COLORS[k % len(COLORS)]}'>&#9632;</span> "
                   f"class {k + 1}</span>" for k in range(min(count, len(COLORS))))
    text = ""
    if any(case.of_volume for case in cases):
        text = "Of each volume, the slice with the most annotated foreground is shown. "
    if count > 1:
        text += f"In samples and predictions, colours are classes: {key}"
    return text


def split_name(name: str) -> tuple[str, str]:
    """A measure's row and column in the tables: ged_16 -> ("ged", "16"), ece -> ("ece", "")."""
    row, column = (re.fullmatch(r"(ece|(?:e_)?aurc|augrc)_?(.*)", name)
                   or re.fullmatch(r"(.*?)(?:(?:_|(?<=_q))(\d+(?:_\d+)?))?", name)).groups()
    return row, column or ""


def spoken(name: str) -> str:
    """A measure's name for people: hungarian_iou_16 -> Matched IoU 16."""
    words = re.sub(r"\b(ged|ncc|ap|hd|tv|ece|aurc|augrc|crps)(?=\d|\b)",
                   lambda word: word[0].upper(),
                   escape(name.replace("hungarian", "matched").replace("_", " ")
                          .replace("iou", "IoU")))
    return words[0].upper() + words[1:]


def value(result: dict, cases: int) -> str:
    """Mean and standard error with three decimals, or with one where they are large; and of how
    many cases, where these are not all."""
    digits = 3 if abs(result["mean"]) < 100 else 1
    text = f"{result['mean']:.{digits}f} <small>&plusmn; {result['stderr']:.{digits}f}</small>"
    return text if result["n"] == cases else f"{text} <small>of {result['n']} cases</small>"


def numbers_html(summary: dict, cases: int) -> str:
    """Every measure in metrics.json: a table for each heading, a row for each measure."""
    cells, html = {}, ""
    for name, result in summary.items():
        base, column = split_name(name)
        cells.setdefault(base, {})[column] = value(result, cases)
    further = dict.fromkeys(cells, "")
    for heading, texts in [*MEASURES.items(), ("Further measures", further)]:
        rows = {base: (text, cells.pop(base)) for base, text in texts.items() if base in cells}
        columns = sorted(sorted({c for _, row in rows.values() for c in row}), key=len)
        if rows:
            html += (f"<h3>{heading}</h3><div class=scroll tabindex=0 role=region "
                     f'aria-label="{heading}"><table>')
        if any(columns):
            heads = [column.lstrip("0").replace("_", " ") or "all" for column in columns]
            html += ("<tr><td class=corner></td>"
                     + "".join(f"<th scope=col>{head}</th>" for head in heads) + "</tr>")
        for base, (text, row) in rows.items():
            html += (f"<tr><th scope=row>{spoken(base)} <span class=better>"
                     f"{ARROWS.get(text[:1], '')}</span><small>{text.lstrip('↓↑ ')}</small></th>"
                     + "".join(f"<td>{row.get(c, '')}</td>" for c in columns) + "</tr>")
        html += "</table></div>" if rows else ""
    return html


def case_html(case, name: str, marks: str) -> str:
    """One case: outlines, the samples that JavaScript plays, maps, and every label map."""
    height, width = case.image.shape[1:]
    scale = min(1, SIDE / max(height, width))
    size = [max(1, round(scale * side)) for side in (height, width)]
    image = paint_image(F.interpolate(case.image[None].float(), size, mode="area")[0])
    step = size[1] / 420 * min(1.5, 8 / len(case.labels))  # lines of 1 to 8 px on a wide screen
    labels, lines, key, flat = shrink(case.labels, size), "", "", []
    for i, (a, text) in enumerate(case.drawn_by.items()):
        label, text = labels[i], escape(text.replace("\n", " "))
        if case.weights is not None:
            text += f": {case.weights[i]:.2f}"
        color, stroke = COLORS[a % len(COLORS)], step * (len(labels) - i)
        lines += f"<path d='{outline_path(label)}' stroke='{color}' stroke-width='{stroke:.3f}'/>"
        key += f"<span class=key><span style='color: {color}'>&#9632;</span> {text}</span> "
        flat.append((text, label_png(label)))
    samples = [(f"sample {i}", label_png(sample))
               for i, sample in enumerate(shrink(case.samples, size), 1)]
    means = [("annotators' mean, foreground", map_png(case.annotated, size, high=1)),
             ("samples' mean, foreground", map_png(case.foreground, size, high=1))]
    flat += [("prediction", label_png(shrink(case.prediction[None], size)[0])),
             ("variance, relative to its maximum", map_png(case.variance, size))]
    return f"""<article class="case" style="--image: url({picture_png(image)}); --ratio:
{width / height:.4f}"><h3>{name}</h3><p class="soft">{marks}</p><div class="stage"><figure><div
class="frame"><svg role="img" aria-label="Outlines of {len(labels)} label maps"
viewBox="0 0 {size[1]} {size[0]}">{lines}</svg></div><span class="text">{key}</span></figure>
{framed("figure", *samples[0], ' class="film"')}
<div>{"".join(framed("figure", *shown) for shown in means)}</div></div>
<div class="strip">{"".join(framed("figure", *shown) for shown in flat)}</div>
<div class="strip">{"".join(framed("button", *shown) for shown in samples)}</div></article>
"""


def framed(tag: str, text: str, uri: str, more: str = "") -> str:
    """A picture over the case's image, with its name below."""
    return (f'<{tag}><span class="frame"><img src="{uri}" alt="{text}"{more}></span>'
            f'<span class="text">{text}</span></{tag}>')


def map_png(values, size, high=None) -> str:
    """A map (H, W) in another size, as paint_map colours it."""
    values = F.interpolate(values[None, None].float(), size, mode="area")[0, 0]
    return picture_png(paint_map(values, high))


def shrink(labels, size) -> np.ndarray:
    """Label maps (n, H, W) of another size, (n, *size) uint8."""
    return F.interpolate(labels[None].float(), size, mode="nearest-exact")[0].byte().numpy()


def outline_path(label: np.ndarray) -> str:
    """The borders between the classes of a label map (H, W) as an SVG path, a unit a pixel; not
    those of ignored pixels, which nobody drew."""
    path = ""
    for maps, line in ((label, "M{0} {1}h{2}"), (label.T, "M{1} {0}v{2}")):
        drawn = (maps[1:] != IGNORE) & (maps[:-1] != IGNORE)
        border = np.pad((maps[1:] != maps[:-1]) & drawn, ((0, 0), (1, 1))).astype(np.int8)
        turns = np.diff(border, axis=1)  # 1 where a straight line begins, -1 where it ends
        for (row, first), (_, last) in zip(np.argwhere(turns == 1), np.argwhere(turns == -1)):
            path += line.format(first, row + 1, last - first)
    return path


def label_png(label: np.ndarray) -> str:
    """A label map (H, W) in the classes' colours; the background is transparent."""
    return data_uri(label_picture(label), transparency=bytes([0, *[166] * int(label.max())]))


def picture_png(picture) -> str:
    """RGB (H, W, 3) in 0..1 in 64 colours."""
    array = (255 * picture).round().byte().numpy()
    return data_uri(Image.fromarray(array).quantize(64, dither=Image.Dither.NONE))


def pictures_html(out: Path, folder: Path) -> str:
    """The pictures that lie in `out`, and the run's curves."""
    html = ""
    for name, (plot, caption) in PICTURES.items():
        file = (folder if name == "curves.png" else out) / name
        if file.exists():
            with Image.open(file) as picture:
                small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
            kind = ("plot" if plot else "mosaic") + (" wide" if small.width > 720 else "")
            html += (f'<figure class="card {kind}"><img src="{data_uri(small)}" alt="{caption}" '
                     f'width={small.width} height={small.height}><span class=text>{caption}</span>'
                     "</figure>")
    return html


def data_uri(picture: Image.Image, **options) -> str:
    """A PNG of the picture as a data URI."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
