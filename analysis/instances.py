"""Objects found by sampling (HPU-Net's Algorithm 1 and Appendix H), their scores and picture.

A recipe for sets whose objects have random class numbers, "colours" (HPUNet.QUICK_INSTANCES). The
values of one latent map are independent given the coarser maps, so a sample paints an object in one
colour only if a single position decides on it. The recipe:
  - a latent map of 8 channels with about one position per object, and a finer one of 4 channels
    with about four;
  - Eq. 5 on all pixels, with a beta of a tenth to a third of P, the pixels of an object. A position
    that encodes the colour, one of K, costs beta ln K nats and saves P ln K; a second one costs as
    much again and saves nothing;
  - five colours (`--data-args colours=5`), which are learned sooner than 15;
  - 128 samples (`evaluate.py RUN --cluster 128`), which separate objects better than the paper's 16
    or 32.
Where objects are of very different sizes, as in `em`, large ones still break along the grid of the
coarsest latents, and encoding the colour of those of fewer than beta pixels does not pay.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.pictures import numbered, paint_image, paint_label, save_grid
from common import center_crop


@torch.no_grad()
def cluster_instances(samples: Tensor, alpha: int | None = None,
                      generator: torch.Generator | None = None) -> Tensor:
    """Algorithm 1: pixels that change together from sample to sample are one instance.

    samples (n, *S), n label maps of one image, in which every class but 0 stands for objects ->
    instance ids (*S) int64, 0 the background. Greedy: a random pixel gathers all remaining ones
    within Hamming distance alpha, counted on one-hot vectors, where a sample that differs counts
    twice. The default, alpha = n, is the paper's: half of them may differ.
    """
    alpha = len(samples) if alpha is None else alpha
    if alpha < 0:  # the loop would not end
        raise ValueError(f"alpha={alpha}: a distance, from 0 up")
    classes = samples.flatten(1).T.byte()  # (P, n)
    # pixels in random order: the first that remains is a random one of those that remain
    pixels = torch.randperm(len(classes), generator=generator).to(classes.device)
    classes, ids = classes[pixels], torch.zeros_like(pixels)
    prototype = torch.zeros_like(classes[0])  # of the background
    for instance in itertools.count():
        far = 2 * (classes != prototype).sum(1) > alpha
        ids[pixels[~far]] = instance
        rows = far.nonzero()[:, 0]  # copies rows faster than the mask itself
        classes, pixels = classes[rows], pixels[rows]
        if not len(pixels):
            return ids.view(samples.shape[1:])
        prototype = classes[0]


@torch.no_grad()
def clean_instances(ids: Tensor, erosion: int = 5, box: int = 11, keep: bool = True) -> Tensor:
    """Appendix H: paint over instances too thin to survive an erosion; 2D or 3D ids (*S) -> (*S).

    Where no `erosion` wide box fits into an instance, each of its pixels takes the most frequent id
    of other instances in the `box` around it (of several, the lowest). Where there is none, it
    keeps its id (SNEMI3D), or with keep=False becomes background, 0 (Cityscapes). One instance
    after the other: one that earlier ones made thicker may survive. Both widths are odd.
    """
    size, dims, reach = ids.shape, ids.dim(), box // 2
    thin, counts = ids.unique(return_counts=True)
    chosen = (thin > 0) & ~torch.isin(thin, _surviving(ids, erosion))
    thin, counts = thin[chosen], counts[chosen]

    ids = F.pad(ids, [reach] * 2 * dims)  # with background, which has no vote
    steps = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * dims)
    around = (steps * torch.tensor(ids.stride())).sum(1).to(ids.device)  # offsets in the flat map
    flat = ids.view(-1)
    paintable = torch.isin(flat, thin).nonzero()[:, 0]
    for instance, area in zip(thin.tolist(), counts.tolist()):
        pixels = paintable[flat[paintable] == instance]
        grown = len(pixels) > area  # painting over others has made it thicker
        if grown and (_surviving(center_crop(ids, size), erosion) == instance).any():
            continue
        neighbours = flat[pixels[:, None] + around]  # (P, box^dims)
        others, which = neighbours.unique(return_inverse=True)
        votes = torch.zeros(len(pixels), len(others), device=ids.device)
        votes.scatter_add_(1, which, ((neighbours > 0) & (neighbours != instance)).float())
        count, winner = votes.max(1)
        flat[pixels] = others[winner].where(count > 0, instance if keep else 0)
    return center_crop(ids, size).contiguous()


def _surviving(ids: Tensor, erosion: int) -> Tensor:
    """Ids of the pixels whose `erosion` wide box lies within their instance."""
    pool = {2: F.max_pool2d, 3: F.max_pool3d}[ids.dim()]
    high = pool(ids[None, None].float(), erosion, 1, erosion // 2)[0, 0]
    low = -pool(-ids[None, None].float(), erosion, 1, erosion // 2)[0, 0]
    return ids[high == low]


def connected_components(mask: Tensor) -> Tensor:
    """Ids (B, *S) int64, not consecutive, of the parts of mask (B, *S) bool whose pixels connect by
    their sides; 0 where the mask is false."""
    size = mask[0].numel()
    ids = torch.arange(1, size + 1, device=mask.device).view(1, *mask.shape[1:]) * mask
    while True:
        high = ids.clone()
        for axis, side in enumerate(mask.shape[1:], 1):
            for here, there in ((0, 1), (1, 0)):  # each pixel takes a neighbour's larger id
                target = high.narrow(axis, here, side - 1)
                torch.maximum(target, ids.narrow(axis, there, side - 1), out=target)
        high *= mask
        # Then look up the present id of the pixel that the id names, so that ids spread faster.
        known = torch.cat([high.new_zeros(len(high), 1), high.flatten(1)], 1)
        high = known.gather(1, high.flatten(1)).view_as(ids)
        if torch.equal(high, ids):
            return ids
        ids = high


def objects(maps: Tensor, first: int) -> Tensor:
    """Label maps, or instance ids, as int64 maps in which the classes or ids from `first` up are
    counted from 1 and all others are 0."""
    return (maps.long() - first + 1).clamp(min=0)


def find_instances(samples: Tensor, alpha: int | None = None, first: int = 1) -> Tensor:
    """Objects in the samples' label maps (n, B, H, W), whose classes from `first` up stand for
    objects: instance ids (B, H, W)."""
    erosion, box = (5, 11) if min(samples.shape[2:]) >= 128 else (3, 7)  # the paper's: 256 pixels
    found = []
    for maps in objects(samples, first).cpu().unbind(1):  # a GPU would wait for every object
        ids = cluster_instances(maps, alpha, torch.Generator().manual_seed(0))
        found.append(clean_instances(ids, erosion, box, keep=first == 1))
    return torch.stack(found).to(samples.device)


def rand_errors(batch, found: Tensor) -> Tensor:
    """Rand error of instance ids (B, H, W) against those of a batch (a Split), which leaves out
    pixels of id -1; (B,)."""
    return rand_error(found, objects(batch.instances, batch.fixed))


def coherence(samples: Tensor, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Do the samples paint every object in one colour? Returns the share of an object's pixels that
    have its commonest colour, averaged over objects and samples, (B,), NaN without any object; and
    the number of objects, (B,).

    samples (n, B, *S): colours, 0 for none; instances (B, *S): ids, from 1 up.
    """
    shares, counts, most = [], [], max(2, int(samples.max()) + 1)  # none, and a colour
    for colours, truth in zip(samples.flatten(2).unbind(1), instances.flatten(1)):
        known = truth > 0
        _, which, area = truth[known].unique(return_inverse=True, return_counts=True)
        pixels = colours.new_zeros(len(colours), len(area) * most)
        pixels.scatter_add_(1, which * most + colours[:, known],
                            torch.ones_like(colours[:, known]))
        shares.append((pixels.view(len(colours), len(area), most)[..., 1:].amax(2) / area).mean())
        counts.append(len(area))
    return torch.stack(shares), torch.tensor(counts, device=samples.device)


def instance_scores(batch, found: Tensor, prediction: Tensor, probs: Tensor, samples: Tensor,
                    ending: str) -> dict:
    """{name: (B,)}: Rand error and average precision of the ids `found` (B, H, W); the Rand error
    of the connected parts of the label map `prediction`, which shows what a deterministic network
    achieves; the `coherence` of the samples (n, B, H, W); and colour_nats, the information in the
    objects' colours, which is the smallest KL of latents that encode them all.

    An object's confidence is the mean over it of the probability of the classes that stand for
    objects; probs (B, K, H, W) are the samples' means.
    """
    known, truth = batch.instances >= 0, objects(batch.instances, batch.fixed)
    precision = average_precision(found * known, truth, probs[:, batch.fixed :].sum(1))
    components = connected_components(objects(prediction, batch.fixed) > 0)
    coherent, count = coherence(objects(samples, batch.fixed), truth)
    return {f"rand_error_{ending}": rand_errors(batch, found),
            **{f"{name}_{ending}": values for name, values in precision.items()},
            "rand_error_components": rand_errors(batch, components), "coherence": coherent,
            "colour_nats": count * math.log(batch.num_classes - batch.fixed)}


@torch.no_grad()
def kl_terms(model, batch) -> dict:
    """{"kl": (B,), "kl_<i>": (B,)}: the KL that the loss has of every case's first label map."""
    torch.manual_seed(0)  # for the loss, which takes no generator
    rows = [model.loss(batch.images[i : i + 1], batch.labels[i : i + 1, 0].long())[1]
            for i in range(len(batch))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]
            if name.split("_")[0] == "kl"}


@torch.no_grad()
def instances_to_show(model, batch, shown: dict, found: Tensor, samples: Tensor) -> list[dict]:
    """The arrays that `plot_instances` takes, of those cases of a batch that are in shown {name:
    its name in pictures}; samples (n, B, H, W)."""
    cases = []
    for i in [i for i, name in enumerate(batch.names) if name in shown]:
        truth = objects(batch.instances[i], batch.fixed).where(batch.instances[i] >= 0, -1)
        case = dict(name=shown[batch.names[i]], image=batch.images[i], truth=truth, found=found[i],
                    samples=objects(samples[:6, i], batch.fixed), again=torch.zeros_like(truth))
        if hasattr(model, "reconstruct"):
            logits = model.reconstruct(batch.images[i : i + 1], batch.labels[i : i + 1, 0].long())
            case["again"] = objects(logits[0].argmax(0), batch.fixed)
        cases.append(case)
    return cases


def plot_instances(path: str, cases: list[dict]) -> None:
    """HPU-Net's Fig. 4, a row a case: a dict of arrays name, image (C, H, W), truth and found
    (H, W) instance ids, again (H, W) the reconstruction of a label map, samples (n, H, W)."""
    rows = {}
    for case in cases:
        maps = (case["truth"], case["found"], case["again"], *case["samples"][:6])
        rows[case["name"]] = [paint_image(case["image"]), *(paint_label(m) for m in maps)]
    save_grid(path, rows, ["image", "truth", "clustered", "reconstruction", *numbered("sample", 6)])


# ---- measures of id maps, where 0 is background or ignored and every other number is an object

def rand_error(pred, target):
    """Adapted Rand error of id maps pred, target (B, *S), restricted to target's foreground.

    As in SNEMI3D's script, 1 - F-score of precision and recall over pairs of pixels (a pixel with
    itself included): is a pair within one object? The pixels of pred 0 are objects of their own,
    but like the script, this divides their number by that of the image's pixels. Without foreground
    in target: NaN.
    """
    errors = []
    for p, t in zip(pred.flatten(1).long(), target.flatten(1).long(), strict=True):
        table = _contingency(p, t)[0][:, 1:]
        alone = table[0].sum() / len(p)
        both = table[1:].square().sum() + alone
        within_pred = table[1:].sum(1).square().sum() + alone
        within_target = table.sum(0).square().sum()
        # precision = both / within_pred, recall = both / within_target, F = 2 P R / (P + R)
        errors.append(1 - 2 * both / (within_pred + within_target))
    return torch.stack(errors)


def average_precision(pred, target, confidence):
    """Average precision of id maps pred, target (B, *S): {"ap", "ap50"}, each (B,).

    The Cityscapes scheme (Kohl et al. 2019, App. B.3): a predicted object is right if its IoU with
    a target is above a threshold; ranked by confidence, precision and recall make a curve, and AP
    is the area below. "ap50": threshold 0.5; "ap": mean over 0.50, 0.55 .. 0.95. An object's
    confidence is the mean of the map `confidence` (B, *S) over it. Cityscapes has one curve for all
    images, here each image has its own; and it leaves out objects below 100 pixels and predictions
    that lie mostly in ignored pixels, which count here. Without objects in target: NaN.
    """
    thresholds = torch.arange(50, 100, 5, device=pred.device) / 100
    curves = []
    for b in range(len(pred)):
        table, row = _contingency(pred[b].flatten().long(), target[b].flatten().long())
        inter = table[1:, 1:]
        if inter.shape[1] == 0:
            curves.append(torch.full_like(thresholds, math.nan))
            continue
        iou = inter / (table.sum(1)[1:, None] + table.sum(0)[1:] - inter)
        # Above 0.5, an object overlaps no second one: the matches are 1:1 by themselves.
        right = iou.amax(1)[:, None] > thresholds  # (objects, thresholds)
        score = torch.zeros(len(table), device=pred.device)
        score = score.index_add(0, row, confidence[b].flatten().float()) / table.sum(1)
        score, order = score[1:].sort(descending=True)
        last_of_ties = score.diff(append=score.new_full((1,), -math.inf)) != 0
        hits = right[order].cumsum(0)[last_of_ties]
        start = torch.zeros(1, len(thresholds), device=pred.device)  # recall 0, precision 1
        precision = torch.cat([start + 1, hits / (last_of_ties.nonzero() + 1)])
        recall = torch.cat([start, hits / inter.shape[1]])
        curves.append(torch.trapezoid(precision, recall, dim=0))
    curves = torch.stack(curves)
    return {"ap": curves.mean(1), "ap50": curves[:, 0]}


def _contingency(pred, target):
    """Pixels shared by each object of pred and of target (P,), id 0 first; and each pixel's row."""
    (rows, row), (columns, column) = (
        torch.cat([ids, ids.new_zeros(1)]).unique(return_inverse=True) for ids in (pred, target))
    shape = len(rows), len(columns)
    cell = row[:-1] * shape[1] + column[:-1]  # less the 0 that was added to be in the table
    return cell.bincount(minlength=shape[0] * shape[1]).view(shape), row[:-1]
