"""Objects found by sampling."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

import metrics

from analysis.pictures import short_name
from common import POOL, center_crop
from models import labels_of, sample_batches


@torch.no_grad()
def cluster_instances(samples: Tensor, alpha: int | None = None,
                      generator: torch.Generator | None = None) -> Tensor:
    """Algorithm 1: pixels that change together from sample to sample are one instance.

    samples (n, *S), n label maps of one image, in which every class but 0 stands for objects (map
    others to 0 first) -> instance ids (*S) int64, 0 the background. Greedy: a random pixel gathers
    all that are left within Hamming distance alpha, counted on one-hot vectors, where a sample that
    differs counts twice; by default alpha = n, as in the paper: up to half of them may differ.
    """
    votes, alpha = samples.flatten(1).T.byte(), len(samples) if alpha is None else alpha
    if alpha < 0:
        raise ValueError(f"alpha={alpha}: a distance, from 0 up")
    # the first pixel left of a random order is a random one of those left
    device = "cpu" if generator is None else generator.device
    left = torch.randperm(len(votes), generator=generator, device=device).to(votes.device)
    votes, ids = votes[left], torch.zeros_like(left)
    prototype = torch.zeros_like(votes[0])  # of the background
    for instance in itertools.count():
        far = 2 * (votes != prototype).sum(1) > alpha
        ids[left[~far]] = instance
        rows = far.nonzero()[:, 0]  # copies rows faster than the mask itself
        votes, left = votes[rows], left[rows]
        if not len(left):
            return ids.view(samples.shape[1:])
        prototype = votes[0]


@torch.no_grad()
def clean_instances(ids: Tensor, erosion: int = 5, box: int = 11, keep: bool = True) -> Tensor:
    """Appendix H: paint over instances too thin to survive an erosion; ids (*S) -> ids (*S), 2D or
    3D; erosion and box are odd.

    Where no `erosion` wide box fits into an instance, each of its pixels takes the most frequent id
    of other instances in the `box` around it (of several, the lowest). Where there is none, it
    keeps its id (SNEMI3D), or with keep=False becomes background, 0 (Cityscapes). One instance
    after the other: one that earlier ones made thicker may survive. The image's edge erodes
    nothing.
    """
    size, dims, reach = ids.shape, ids.dim(), box // 2

    def surviving(ids):
        high, low = (POOL["max"][dims](t[None, None].float(), erosion, 1, erosion // 2)[0, 0]
                     for t in (ids, -ids))  # equal: nothing else within the box
        return ids[high == -low]

    thin, counts = ids.unique(return_counts=True)
    chosen = (thin > 0) & ~torch.isin(thin, surviving(ids))
    thin, counts = thin[chosen], counts[chosen]

    ids = F.pad(ids, [reach] * 2 * dims)  # with background, which has no vote
    steps = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * dims)
    around = (steps * torch.tensor(ids.stride())).sum(1).to(ids.device)  # offsets in the flat map
    flat = ids.view(-1)
    paintable = torch.isin(flat, thin).nonzero()[:, 0]
    for instance, area in zip(thin.tolist(), counts.tolist()):
        pixels = paintable[flat[paintable] == instance]
        if len(pixels) > area and (surviving(center_crop(ids, size)) == instance).any():
            continue
        seen = flat[pixels[:, None] + around]  # (P, box^dims)
        others, which = seen.unique(return_inverse=True)
        votes = torch.zeros(len(pixels), len(others), device=ids.device)
        votes.scatter_add_(1, which, ((seen > 0) & (seen != instance)).float())
        count, winner = votes.max(1)
        flat[pixels] = others[winner].where(count > 0, instance if keep else 0)
    return center_crop(ids, size).contiguous()


@torch.no_grad()
def instances(model, split, n=16, alpha=None) -> tuple[dict, list[dict]]:
    """Objects found by sampling (HPU-Net's Algorithm 1 and Appendix H) against the split's ids:
    {name: (N,)}, and a few cases for `plot_instances`.

    rand_error_<n>, ap_<n>, ap50_<n> of the clusters of n samples, with _<alpha> behind it if it is
    given (see hpunet.cluster_instances); an object's confidence is the samples' mean probability,
    over it, of the classes that stand for objects: those from split.fixed up. To other classes it
    is all background, and so are pixels of theirs. rand_error_components: what a deterministic
    network could do, the connected components of the foreground in `predict`. Pixels of id -1
    count nowhere.
    """
    scores, shown, device, first = {}, [], split.images.device, split.fixed
    generator = torch.Generator().manual_seed(0)

    def objects(maps):  # object classes, or ids, from 1; 0 for all else
        return (maps.long() - first + 1).clamp(min=0)

    for part, logits in sample_batches(model, split, n):
        samples = objects(labels_of(logits, 2))  # (n, B, H, W)
        foreground = logits.softmax(2)[:, :, first:].sum(2).mean(0)
        boxes = (5, 11) if min(samples.shape[2:]) >= 128 else (3, 7)  # the paper's are for 256
        found = torch.stack([clean_instances(cluster_instances(s, alpha, generator), *boxes,
                                             keep=first == 1)
                             for s in samples.unbind(1)]).to(device)
        parts = metrics.connected_components(
            objects(labels_of(model.predict(part.images), 1)) > 0)
        known, truth = part.instances >= 0, objects(part.instances)
        batch = metrics.average_precision(found * known, truth, foreground)
        batch["rand_error"] = metrics.rand_error(found * known, truth)
        batch = {f"{name}_{n}" + f"_{alpha}" * bool(alpha): values
                 for name, values in batch.items()}
        batch["rand_error_components"] = metrics.rand_error(parts * known, truth)
        for name, values in batch.items():
            scores.setdefault(name, []).append(values.double().cpu())
        again = None
        if hasattr(model, "reconstruct"):
            again = objects(labels_of(
                model.reconstruct(part.images, part.labels[:, 0].long()), 1))
        for i in range(len(part) if len(shown) < 4 else 0):
            shown.append(dict(name=short_name(part, i), image=part.images[i], found=found[i],
                              truth=truth[i].where(known[i], -1), samples=samples[:, i],
                              again=truth[i] * 0 if again is None else again[i]))
    return {name: torch.cat(values).numpy() for name, values in scores.items()}, shown[:4]
