"""All pictures of a judged run, as evaluate.py writes them beside its numbers."""

from analysis.calibration import plot_modes
from analysis.classes import write_classes
from analysis.instances import plot_instances
from analysis.paper_figures import (plot_extrapolation, plot_latents, plot_levels,
                                    plot_manipulation, plot_maps, plot_scales)
from analysis.pictures import (CASES, plot_dice, plot_ged, plot_overview, plot_samples,
                               plot_uncertainty, spread)
from analysis.uncertainty import plot_reliability, plot_risk_coverage
from models import MODELS

# {model: a figure that only this method has, and its file}
FIGURES = {"ssn": (plot_manipulation, "manipulation.png"), "phiseg": (plot_levels, "levels.png"),
           "vae_unet": (plot_latents, "latents.png"), "hpunet": (plot_scales, "scales.png")}


def plot_all(out, model, pictured, found, values, summary, hidden: bool) -> None:
    """Draw the pictures, of CASES of the cases `pictured`, into the folder `out`, and write
    per_class.csv. found: what evaluate.score returns; values, summary: what per_case.csv and
    metrics.json hold; hidden says whether data.hide was used."""
    few = spread(len(pictured), CASES)
    some, cases = pictured.subset(few).all_maps(), [found["shown"][i] for i in few]
    plot_samples(out / "samples.png", cases)
    plot_overview(out / "overview.png", cases)
    plot_uncertainty(out / "uncertainty.png", cases)
    plot_maps(out / "maps.png", cases)
    plot_dice(out / "dice.png", values)
    plot_ged(out / "ged.png", [(out.name, summary)])
    plot_reliability(out / "reliability.png", found["reliability"])
    plot_risk_coverage(out / "risk_coverage.png", values)
    if some.exact:
        plot_modes(out / "modes.png", found)
    if "class_dice" in found:
        write_classes(out / "per_class.csv", found)
    if "instances_shown" in found:
        plot_instances(out / "instances.png", [found["instances_shown"][i] for i in few[:4]])
    image, dims = some.images[0], model.config.dims
    for name, (plot, file) in FIGURES.items():
        if isinstance(model, MODELS[name]) and (dims == 2 or (dims, name) == (3, "ssn")):
            plot(model, image, out / file)
    if isinstance(model, MODELS["hpunet"]) and dims == 2 and hidden:
        plot_extrapolation(model, some.images, some.labels[:, 0], out / "extrapolation.png")
