"""Every table of README.md as the list of its runs; reproduce.py makes them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows named alike up to a colon are tested against each other."""

    title: str
    text: str  # what a reader has to know
    rows: dict[str, str] = field(default_factory=dict)  # {name: its own options of train.py}
    common: str = ""  # options of train.py that all rows share
    judge: str = ""  # options of evaluate.py, if what train.py makes of best.pt is not wanted
    columns: str = ""  # measures, the first ranks; best:NAME is NAME of best.pt
    beside: dict[str, dict[str, str]] = field(default_factory=dict)  # {column: {row: published}}
    further: str = ""  # measures of a second table, which also says which of them tells rows apart
    seeds: int = 1
    prints: tuple[str, ...] = ()  # instead of rows: commands whose output is the table


MAIN = {name: f"--model {name}" for name in
        ("ssn", "prob_unet", "phiseg", "hpunet", "vae_unet", "unet")}
ALL = MAIN | {name: f"--model {name}" for name in
              ("image2image_vae", "m_heads", "dropout_unet", "ensemble")}
LAST, QUICK = "--weights last", "--weights last --samples 16"
CROPS = ("--data lidc --path FILE --steps 3000 --image-size 64 --batch-size 8 "
         "--lr-drops 2000:.3 2700:.1")
SMALL_CROPS = f"{CROPS} --quick --lr 1e-3"
# On crops, networks need the five levels that the quick SSN and PHiSeg have already.
FIVE_LEVELS = {name: f'{options} --model-args "channels=(16,32,64,64,64)" convs=2'
               if name not in ("ssn", "phiseg", "hpunet", "vae_unet") else options
               for name, options in ALL.items()}
# The paper's target for LIDC; that of --quick is for `shapes`.
CROP_ROWS = FIVE_LEVELS | {"hpunet": "--model hpunet --model-args kappa=0.05"}
SCORES = "ged_100 ged_16 hungarian_iou_16 ncc_100 diversity_16 dice iou_rec ece"
FURTHER = "The same runs by other measures (`evaluate.py --help`)."
APART = ("The last line says how many pairs of models each measure tells apart by the paired test, "
         "with p below 0.05 divided by the number of pairs (Bonferroni). ECE and E-AURC have no "
         "value for a single case.")
APART_ROW = "pairs told apart"
MEASURES = ("ged_16 ncc_16 dice_mean dice_max_16 dice_match_16 dice_soft volume_crps brier "
            "ece_band e_aurc_disagreement")
STREETS = '--model-args "channels=(16,32,64,64)" convs=1'
CELLS = "--data cells --quick --data-args colours=5"
CELL_STEPS = "--steps 4000 --lr 2.5e-3 --lr-drops 2400:.3 3400:.1"
SECTIONS = "--data em --path FILE --quick --data-args tile=128 colours=5 --batch-size 4"
SECTION_WIDTHS = '"channels=(16,32,48,48,48,48)"'  # z_0 has a position for every 32 pixels

TABLES = {
    "toy": Table(
        "The toy of the SSN paper", "The paper has -0.93 for the low-rank model (rank 2) and -4.87 "
        "for the diagonal one, in nats per label map.", prints=("ssn.py",)),
    "shapes": Table(
        "Synthetic scenes", "Narrow models that train for one to three minutes on an idle CPU: "
        "this ranks what learns fast, not what is best in the end.",
        ALL, "--data shapes --quick", QUICK, seeds=3,
        columns="ged_16 ncc_16 diversity_16 ece iou_rec mode_gap_16", further=MEASURES),
    "ablations": Table(
        "Ablations", "Synthetic scenes, narrow models.",
        {"phiseg: 4 levels": "--model phiseg",
         "phiseg: 2 levels": "--model phiseg --model-args latent_levels=2",
         "phiseg: 1 level": "--model phiseg --model-args latent_levels=1",
         "hpunet: four scales": "--model hpunet",
         "hpunet: global": '--model hpunet --model-args "latents=(85,)"',
         "hpunet: finest": '--model hpunet --model-args "latents=(0,0,0,1)"',
         "ssn: rank 10": "--model ssn",
         "ssn: rank 2": "--model ssn --model-args rank=2",
         "ssn: diagonal": "--model ssn --model-args rank=0",
         "prob_unet: as published": "--model prob_unet",
         "prob_unet: fixed prior": "--model prob_unet --model-args prior=fixed",
         "prob_unet: posterior of mask": "--model prob_unet --model-args posterior=mask",
         "prob_unet: z at input": "--model prob_unet --model-args z_enters=input",
         "prob_unet: all three":
             "--model prob_unet --model-args prior=fixed posterior=mask z_enters=input",
         "vae_unet: latents of mask": "--model vae_unet",
         "vae_unet: KL of the ELBO": "--model vae_unet --model-args elbo_kl=True",
         "vae_unet: latents of image": "--model vae_unet --model-args latents=image"},
        "--data shapes --quick", QUICK, "ged_16 ncc_16 diversity_16 ece iou_rec mode_gap_16"),
    "modes": Table(
        "Calibration of 32 modes",
        "The Cityscapes experiment of the Probabilistic U-Net on synthetic street scenes. Total "
        "variation is between the share of 100 samples that fall into each mode and its "
        "probability, pooled over 100 test scenes.",
        {name: f"--model {name} {STREETS}" for name in
         ("prob_unet", "image2image_vae", "m_heads", "dropout_unet", "unet")}
        | {"ensemble": f"--model ensemble {STREETS} members=2"},
        "--data modes --steps 12000 --batch-size 4 --lr 1e-3", LAST,
        "mode_pooled_tv_100 mode_gap_100 ged_100"),
    "crops": Table(
        "Real LIDC crops", "Every model in its default configuration, the paper's (vae_unet: with "
        "another loss), at one size and one length; learned from all annotators and judged against "
        "all. The last measure is that of the checkpoint of lowest validation GED.",
        ALL, CROPS, LAST,
        f"{SCORES} best:ged_100"),
    "crops_small": Table(
        "Real LIDC crops, small models", "The narrow models of `--quick`, which take minutes on a "
        "CPU, at one size, one length and one learning rate; learned from all annotators and "
        "judged against all.", CROP_ROWS, SMALL_CROPS, LAST, SCORES, further=MEASURES),
    "annotators": Table(
        "Real LIDC crops, one annotator against all", "The small models of the table above, but "
        "trained on annotator 0 alone.", {name: CROP_ROWS[name] for name in MAIN},
        f"{SMALL_CROPS} --annotators 0", LAST, SCORES),
    "brain": Table(
        "Newborn brain MR", "QUBIQ brain-growth in the layout of the LIDC pickle, 28 slices of "
        "128 x 128, seven annotators; narrow models.", FIVE_LEVELS,
        "--data lidc --path FILE --quick --steps 800 --batch-size 4 --lr 1e-3 "
        "--lr-drops 500:.3 700:.1", LAST, SCORES, further=MEASURES),
    "organs": Table(
        "Organs with blurred borders", "Synthetic images, narrow models. Dice is that of the "
        "deterministic answer (the VAE U-Net's prior mode), then that of the mean of samples (its "
        "sampling mode).",
        {"vae_unet": "--model vae_unet", "unet": "--model unet",
         "vae_unet on Swin-Unet": "--model vae_unet --steps 1000 --model-args backbone=swin"},
        "--data organs --quick", QUICK, "dice dice_mean ged_16 diversity_16 ece"),
    "ood": Table(
        "Images unlike those of training", "Area under the ROC curve (AUROC) when the mean "
        "variance over samples is used to distinguish corrupted images from the unchanged ones; "
        "0.5 is chance. Blur: std in pixels; patch: per cent of the image's side; noise: in "
        "standard deviations of the images.",
        {name: f"--model {name}" for name in ("vae_unet", "prob_unet")},
        "--data organs --quick --steps 800", "--ood", " ".join(
            f"auroc_variance_{kind}" for kind in (
                "blur_1", "blur_2", "blur_4", "blur_8", "patch_5", "patch_10", "patch_20",
                "patch_40", "noise_0.25", "noise_0.5", "noise_1", "noise_2", "foreign_shapes"))),
    "objects": Table(
        "Objects by sampling", "Rand error of objects clustered from 128 samples (Hamming distance "
        "128) and of the connected components of the model's own foreground; and the share of an "
        "object's pixels that have its commonest colour in a sample. In faded cells, half of the "
        "membranes' length cannot be seen.",
        {"faded cells: hpunet": f"--model hpunet {CELLS} faded=50 {CELL_STEPS}",
         "faded cells: unet": f"--model unet {CELLS} faded=50 --steps 2000",
         "cells: hpunet": f"--model hpunet {CELLS} {CELL_STEPS}",
         "cells: unet": f"--model unet {CELLS} --steps 2000",
         "sections: hpunet": f"--model hpunet {SECTIONS} --steps 5000 --lr 2.5e-3 --lr-drops "
                             f"3000:.3 4300:.1 --model-args {SECTION_WIDTHS} beta=150",
         "sections: unet": f"--model unet {SECTIONS} --steps 1500 --model-args {SECTION_WIDTHS}"},
        judge=f"{QUICK} --cluster 128",
        columns="rand_error_128 rand_error_components coherence"),
    "extrapolation": Table(
        "What lies beyond the edge", "Half of each image is hidden, and the labels of the rest are "
        "given; `extrapolation.png` of the run shows samples.",
        {"hpunet": "--model hpunet"}, "--data shapes --quick --data-args hide=50", QUICK,
        "ged_16 diversity_16 iou_rec"),
    "lesions3d": Table(
        "Lesions in 3D", "Synthetic volumes of 48 x 48 x 48, narrow models at one length and one "
        "learning rate.", MAIN,
        "--data lesions3d --quick --steps 300 --batch-size 2 --lr 1e-3 --lr-drops 200:.3", QUICK,
        "ged_16 diversity_16 ece dice iou_rec"),
    "lidc": Table(
        "LIDC, the full pickle", "Each method's model and schedule of its paper (vae_unet: with "
        "another loss), on the split that "
        "later works share (64/16/20 by series), judged at the checkpoint of lowest validation "
        "GED. The published figures are of other splits.",
        {name: options for name, options in MAIN.items() if name != "unet"},
        "--data lidc --path FILE --image-size 128", columns="ged_16 ged_100 hungarian_iou_16 "
        "ncc_100 diversity_16 dice dice_present iou_rec ece",
        beside={"its paper's GED (samples)": {
            "ssn": "0.225 (100)", "prob_unet": "0.287 (16)", "phiseg": "0.225 (100)",
            "hpunet": "0.27 (16)", "vae_unet": "0.289 (100; one annotator, agreed lesions)"},
            "GED 16 that later works quote": {"ssn": "0.259", "prob_unet": "0.324",
                                              "phiseg": "0.262", "hpunet": "0.270"}}),
    "speed": Table("Speed", "`bench.py --help` explains the columns. To be run alone.", prints=(
        "bench.py --tables models costs --rounds 5",
        "bench.py --tables models costs --rounds 5 --precision bf16",
        "bench.py --tables evaluation")),
    "reliability": Table("Reliability", "tests/campaign.py says what is a failure.", prints=(
        "tests/campaign.py inputs --count 6000", "tests/campaign.py kills --count 350",
        "tests/campaign.py disk")),
}

WORDS = {"best:": "best.pt: ", "ged": "GED", "ncc": "NCC", "hungarian iou": "matched IoU",
         "dice mean": "Dice of the mean", "dice": "Dice", "iou rec": "IoU_rec", "ece": "ECE",
         "mode gap": "worst mode", "mode pooled tv": "total variation", "auroc variance ": "",
         "rand error": "Rand error", "volume crps": "volume CRPS", "brier": "Brier score",
         "e aurc disagreement": "E-AURC"}
