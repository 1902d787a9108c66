"""report.html: the numbers, curves, pictures and cases of a judged run on one page.

The page holds everything inline and runs nothing but the few lines of JavaScript in page.html, so
it opens from disk in any browser and can be sent to somebody as one file.
"""

import base64
import csv
import io
import json
import re
from datetime import timedelta
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from analysis.compare import training_time
from analysis.pictures import COLORS, label_picture, paint_image, paint_map
from sources.files import write_text
from sources.runs import read_config, read_log

SIDE = 192  # pixels: larger cases are shrunk to keep the page at a few MB
HEADLINE = ("ged", "hungarian_iou", "ncc", "dice")

# What each measure means, under headings; an arrow says which direction is better. Where a name in
# metrics.json ends in a number, the number is a column.
MEASURES = {
    "Samples against annotators, by the number of samples": {
        "ged": "↓ Squared generalised energy distance between samples and annotations; 0 if both "
               "come from one distribution.",
        "hungarian_iou": "↑ Mean IoU after samples and annotations are matched one to one.",
        "ncc": "↑ Correlation between where samples vary and where annotators contradict them.",
        "diversity": "Mean 1 - IoU of two samples; right when it is that of two annotations."},
    "The single prediction against annotators": {
        "dice": "↑ Dice of the deterministic prediction, averaged over annotators and classes.",
        "dice_present": "↑ The same over classes that the prediction or the annotation has.",
        "dice_mean": "↑ Dice of the mean of the samples' probabilities.",
        "ged_predict": "↓ GED of the prediction, as if it were the only sample.",
        "dice_better": "Share of samples whose Dice is above the prediction's."},
    "Likelihood and reconstruction": {
        "log_likelihood": "↑ Log-probability of an annotation under the model, in nats.",
        "iou_rec": "↑ IoU of an annotation and its reconstruction from the posterior's mean."},
    "Spread of the samples' Dice": {
        "dice_q": "Quantiles, in per cent, over the samples of a case."},
    "Known probabilities": {
        "mode_tv": "↓ Total variation between the label maps drawn for a case and their known "
                   "probabilities; a perfect sampler has some, too.",
        "mode_pooled_tv": "↓ The same after averaging over the cases.",
        "mode_gap": "↓ The largest difference of one label map's frequency then."},
    "By class": {
        "dice_class": "↑ Dice over the cases that have the class.",
        "hd95_class": "↓ 95 % Hausdorff distance in pixels over the cases that have the class."},
    "Objects found in samples": {
        "rand_error": "↓ Rand error: 1 - F-score over pairs of pixels of one object.",
        "rand_error_components": "↓ The same for connected parts of the prediction.",
        "ap": "↑ Average precision of the objects, over IoU thresholds from 0.5 to 0.95.",
        "ap50": "↑ Average precision of the objects at an IoU of 0.5."}}
# Pictures that may lie in the folder, with captions; True for plots that turn dark with the page.
PICTURES = {
    "curves.png": (True, "Training: every term of the loss, and the validation score, by step."),
    "ged.png": (True, "GED against the number of samples."),
    "modes.png": (True, "Frequencies of label maps and of pixels' classes against known ones."),
    "dice.png": (True, "Spread of the samples' Dice in each case, beside the prediction's."),
    "overview.png": (False, "Annotators and samples of four cases."),
    "uncertainty.png": (False, "Where annotators differ and where samples do."),
    "maps.png": (False, "Does the model vary where annotators contradict it (PHiSeg, Fig. 3)?"),
    "instances.png": (False, "Objects clustered from samples (HPU-Net, Fig. 4)."),
    "manipulation.png": (False, "One sample, changed by class and by temperature (SSN, Fig. 6)."),
    "levels.png": (False, "Samples growing level by level (PHiSeg, Fig. 1)."),
    "latents.png": (False, "Latent maps of every level (VAE U-Net, Fig. 11)."),
    "scales.png": (False, "Samples if only some scales are drawn (HPU-Net, Fig. 3)."),
    "extrapolation.png": (False, "Completions of hidden label maps (HPU-Net, Fig. 5).")}


def write_page(out: Path, folder: Path, judged: str, cases: list, shown: dict) -> None:
    """Write `out`/report.html from the files in `out` and in the run's `folder`.

    judged: what was judged, in words. cases: pictures.Case of every case to page through; shown:
    {its name in per_case.csv: its name in pictures}.
    """
    config, log = read_config(folder), read_log(folder)
    summary = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    with open(out / "per_case.csv", newline="", encoding="utf-8") as file:
        scores = {row["name"]: row for row in csv.DictReader(file)}
    about = ["{model} on {data}, seed {seed}".format(**config["settings"]), judged]
    if isinstance(count := config.get("parameters"), int):
        about.insert(1, f"{count:,} parameters")
    for steps, seconds in training_time(log)[-1:]:
        if seconds < 1e9:  # in a damaged log it may be anything
            about.insert(2, f"{steps:,.0f} training steps in {timedelta(seconds=round(seconds))} h")
    headline = [max((n for n in summary if split_name(n)[0] == base), default=None,
                    key=lambda n: column_order(split_name(n)[1])) for base in HEADLINE]
    headline = [name for name in headline if name]
    full = {short: name for name, short in shown.items()}
    names = [full[case.name] for case in cases]
    labels = [" · ".join([name, *(f"{spoken(n)} {float(scores[name][n]):.3f}"
                                  for n in headline[:1])]) for name in names]
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    write_text(out / "report.html", template.substitute(
        title=escape(folder.resolve().name), about=escape(" · ".join(about)),
        tiles="".join(tile(name, summary[name]) for name in headline),
        options="".join(f"<option>{escape(label)}</option>" for label in labels),
        cases="\n".join(case_html(case, name, {n: scores[name][n] for n in headline})
                        for case, name in zip(cases, names)),
        numbers=numbers_html(summary), pictures=pictures_html(out, folder)))


# ------------------------------------------------------------------------------------- numbers


def split_name(name: str) -> tuple[str, str]:
    """The name of a measure without the number it ends in, and the number: ("ged", "16")."""
    base, column = re.fullmatch(r"(.*?)(?:(?:_|(?<=_q))(\d+(?:_\d+)?))?", name).groups()
    return base, column or ""


def column_order(column: str) -> list[int]:
    """"16_4" -> [16, 4], so that columns are sorted as numbers."""
    return [int(number) for number in column.split("_") if number]


def spoken(name: str) -> str:
    """A measure's name for people: hungarian_iou_16 -> Hungarian IoU 16."""
    words = re.sub(r"\b(ged|ncc|ap|hd|tv)(?=\d|\b)", lambda word: word[0].upper(),
                   name.replace("_", " ").replace("iou", "IoU"))
    return words[0].upper() + words[1:]


def better(text: str) -> str:
    """The direction that a text of MEASURES begins with."""
    words = {"↓": "↓ lower is better", "↑": "↑ higher is better"}.get(text[0], "")
    return f"<span class=better>{words}</span>"


def number(value: float) -> str:
    """Three decimals, or one for large numbers."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def tile(name: str, result: dict) -> str:
    """One of the numbers at the top of the page."""
    texts = {base: text for group in MEASURES.values() for base, text in group.items()}
    return (f"<div><dt>{spoken(name)}</dt><dd>{number(result['mean'])} <small>&plusmn; "
            f"{number(result['stderr'])}</small></dd>{better(texts[split_name(name)[0]])}</div>")


def numbers_html(summary: dict) -> str:
    """Every measure in metrics.json: a table for each heading, a row for each measure."""
    cells = {}
    for name, result in summary.items():
        base, column = split_name(name)
        cells.setdefault(base, {})[column] = result
    groups = [*MEASURES.items(), ("Further measures", dict.fromkeys(cells, "See evaluate.py."))]
    tables = []
    for heading, texts in groups:
        rows = {base: (text, cells.pop(base)) for base, text in texts.items() if base in cells}
        columns = sorted({c for _, row in rows.values() for c in row}, key=column_order)
        if not rows:
            continue
        head = "".join(f"<th scope=col>{c.lstrip('0').replace('_', ', ')}</th>" for c in columns)
        head = f"<thead><tr><th></th>{head}</tr></thead>" if any(columns) else ""
        body = ""
        for base, (text, row) in rows.items():
            body += (f"<tr><th scope=row>{escape(spoken(base))} {better(text)}"
                     f"<small>{escape(text.lstrip('↓↑ '))}</small></th>")
            for column in columns:
                result = row.get(column)
                body += "<td>" + (f"{number(result['mean'])}<small>&plusmn; "
                                  f"{number(result['stderr'])}</small>" if result else "") + "</td>"
            body += "</tr>"
        tables.append(f"<h3>{heading}</h3><div class=scroll tabindex=0 role=region "
                      f"aria-label='{escape(heading)}'><table>{head}"
                      f"<tbody>{body}</tbody></table></div>")
    return "\n".join(tables)


# ---------------------------------------------------------------------------- cases and pictures


def case_html(case, name: str, scores: dict) -> str:
    """One case: outlines, the samples that JavaScript plays, maps, and every label map."""
    height, width = case.image.shape[1:]
    scale = min(1, SIDE / max(height, width))
    size = [max(1, round(scale * side)) for side in (height, width)]
    image = F.interpolate(case.image[None].float(), size, mode="area")[0]
    labels, samples, prediction = (
        F.interpolate(maps[None].float(), size, mode="nearest-exact")[0].byte().numpy()
        for maps in (case.labels, case.samples, case.prediction[None]))
    kind = "annotator" if case.weights is None else "mode"
    kinds = [f"{kind} {a + 1}" for a in range(len(labels))]
    if case.weights is not None:
        kinds = [f"{text}: {weight:.2f}" for text, weight in zip(kinds, case.weights.tolist())]
    lines, key = "", ""
    for a, (label, text) in enumerate(zip(labels, kinds)):
        color, stroke = COLORS[a % len(COLORS)], 1.5 * (len(labels) - a)
        lines += f"<path d='{outline_path(label)}' stroke='{color}' stroke-width='{stroke}'/>"
        key += f"<span class=key style='--color: {color}'>{text}</span>"
    thumbs = [(f"sample {i + 1}", label_png(sample)) for i, sample in enumerate(samples)]
    maps = [(title, picture_png(paint_map(F.interpolate(values[None, None], size, mode="area")[0, 0],
                                          high)))
            for title, values, high in (("annotators' mean", case.annotated.float(), 1),
                                        ("samples' mean", case.foreground.float(), 1),
                                        ("variance / maximum", case.variance.float(), None))]
    flat = [(text, label_png(label)) for text, label in zip(kinds, labels)]
    flat += [("prediction", label_png(prediction[0])), maps.pop()]
    marked = ", ".join(f"{spoken(n)} {float(score):.3f}" for n, score in scores.items())
    return f"""<article class="case" style="--image: url({picture_png(paint_image(image))});
--ratio: {width / height:.4f}">
<h3>{escape(name)}</h3>
<p class="soft">{marked}</p>
<div class="stage">
<figure><div class="frame"><svg role="img" aria-label="Outlines of {len(labels)} {kind}s"
viewBox="0 0 {size[1]} {size[0]}">{lines}</svg></div><figcaption>{key}</figcaption></figure>
<figure><div class="frame"><img class="film" src="{thumbs[0][1]}" alt="sample 1"></div>
<figcaption>sample <span class="number">1</span> of {len(thumbs)}</figcaption></figure>
<div>{"".join(f'<figure>{framed(*m)}<figcaption>{m[0]}, foreground</figcaption></figure>'
              for m in maps)}</div>
</div>
<div class="strip">{"".join(f'<div>{framed(*m)}<small>{m[0]}</small></div>' for m in flat)}</div>
<div class="strip">{"".join(f'<button>{framed(*m)}<small>{m[0]}</small></button>' for m in thumbs)}
</div>
</article>"""


def framed(text: str, uri: str) -> str:
    """A picture over the case's image."""
    return f'<span class="frame"><img src="{uri}" alt="{text}"></span>'


def outline_path(label: np.ndarray) -> str:
    """The borders between the classes of a label map (H, W) as an SVG path, a unit a pixel."""
    path = []
    for maps, line in ((label, "M{0} {1}h{2}"), (label.T, "M{1} {0}v{2}")):
        border = np.pad(maps[1:] != maps[:-1], ((0, 0), (1, 1))).astype(np.int8)
        turns = np.diff(border, axis=1)  # 1 where a straight line begins, -1 where it ends
        for (row, first), (_, last) in zip(np.argwhere(turns == 1), np.argwhere(turns == -1)):
            path.append(line.format(first, row + 1, last - first))
    return "".join(path)


def label_png(label: np.ndarray) -> str:
    """A label map (H, W) in the classes' colours as a data URI; the background is transparent."""
    return data_uri(label_picture(label), transparency=bytes([0, *[166] * label.max()]))


def picture_png(picture: torch.Tensor) -> str:
    """RGB (H, W, 3) in 0..1 as the data URI of a PNG of 64 colours."""
    array = (255 * picture).round().byte().numpy()
    return data_uri(Image.fromarray(array).quantize(64, dither=Image.Dither.NONE))


def pictures_html(out: Path, folder: Path) -> str:
    """The pictures that lie in `out`, and the run's curves."""
    figures = ""
    for name, (plot, caption) in PICTURES.items():
        file = (folder if name == "curves.png" else out) / name
        if file.exists():
            with Image.open(file) as picture:
                small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
            kind = ("plot" if plot else "mosaic") + (" wide" if small.width > 700 else "")
            figures += (f"<figure class='{kind}'><img src='{data_uri(small)}' "
                        f"alt='{escape(caption)}' width={small.width} height={small.height}>"
                        f"<figcaption>{escape(caption)}</figcaption></figure>")
    return figures


def data_uri(picture: Image.Image, **options) -> str:
    """A PNG of the picture as a data URI."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
