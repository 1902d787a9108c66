"""Instances from samples, against literal transcriptions of the paper's Algorithm 1 and App. H."""
import itertools
import time

import pytest
import torch
import torch.nn.functional as F

import data
from analysis.instances import (clean_instances, cluster_instances, coherence,
                                connected_components, kl_terms, rand_error)
from hpunet import HPUNet, HPUNetConfig
from sources.files import DataError


def algorithm_1(samples, alpha, order):
    """Algorithm 1 to the letter, class 0 the background, on one-hot vectors; a random pixel of U is
    the first of `order` that is in U."""
    classes = int(samples.max()) + 1
    Y = F.one_hot(samples.flatten(1).T, classes).flatten(1).tolist()  # (pixels, n C)
    I = [-1] * len(Y)
    U = set(range(len(Y)))
    p = ([1] + [0] * (classes - 1)) * len(samples)
    c = 0
    while U:
        if c > 0:
            i = next(i for i in order if i in U)
            p = Y[i]
            I[i] = c
            U.remove(i)
        for j in sorted(U):
            d = sum(a != b for a, b in zip(Y[j], p))
            if d <= alpha:
                I[j] = c
                U.remove(j)
        c += 1
    return torch.tensor(I).view(samples.shape[1:])


def cell_samples(size, cells, n, classes, noise, seed=0):
    """n random class numbers of square cells with walls of 2 pixels, some pixels wrong."""
    generator = torch.Generator().manual_seed(seed)
    wide = size // cells
    cell = torch.arange(size) // wide
    truth = 1 + cells * cell[:, None] + cell
    wall = torch.arange(size) % wide < 2
    truth[wall] = 0
    truth[:, wall] = 0
    table = torch.randint(1, classes, (n, cells * cells + 1), generator=generator)
    table[:, 0] = 0
    samples = table[:, truth]
    wrong = torch.rand(samples.shape, generator=generator) < noise
    return torch.where(wrong, torch.randint(classes, samples.shape, generator=generator),
                       samples), truth


@pytest.mark.parametrize("alpha", [None, 0, 4, 100])
def test_clustering_is_algorithm_1(alpha):
    samples, _ = cell_samples(24, 4, 6, 5, 0.15)
    order = torch.randperm(24 * 24, generator=torch.Generator().manual_seed(3)).tolist()
    ids = cluster_instances(samples, alpha, torch.Generator().manual_seed(3))
    expected = algorithm_1(samples, 6 if alpha is None else alpha, order)
    assert torch.equal(ids, expected)
    assert ids.max() == 0 if alpha == 100 else ids.max() > 10
    assert not torch.equal(cluster_instances(samples, 0, torch.Generator().manual_seed(4)),
                           cluster_instances(samples, 0, torch.Generator().manual_seed(3)))


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha=-1: a distance, from 0 up"):
        cluster_instances(torch.zeros(2, 3, 3, dtype=torch.long), -1)


def test_noisy_cells_are_found_in_seconds():
    samples, truth = cell_samples(512, 16, 16, 16, 0.15)
    start = time.process_time()
    ids = clean_instances(cluster_instances(samples, generator=torch.Generator().manual_seed(0)))
    assert time.process_time() - start < 5
    pairs = torch.stack([ids, truth]).flatten(1).unique(dim=1, return_counts=True)
    common = {}  # each cell's most frequent id
    for (found, cell), count in zip(pairs[0].T.tolist(), pairs[1].tolist()):
        common[cell] = max(common.get(cell, (0, 0)), (count, found))
    assert sum(count for count, _ in common.values()) > 0.98 * truth.numel()
    assert len({found for _, found in common.values()}) == 16 * 16 + 1


def test_clean_up_by_hand():
    ids = torch.zeros(20, 20, dtype=torch.long)
    ids[5:10, 5:10] = 1  # 5 x 5 survives
    ids[5:10, 10:14] = 2  # 4 wide does not
    ids[0:3, 17:20] = 4  # in a corner, where it may go on beyond the image
    ids[18, 0] = 5  # nobody within 5 pixels
    cleaned = clean_instances(ids)
    expected = ids.clone()
    expected[ids == 2] = 1
    assert torch.equal(cleaned, expected)
    expected[18, 0] = 0
    assert torch.equal(clean_instances(ids, keep=False), expected)
    expected[ids == 2] = 2
    assert torch.equal(clean_instances(ids, erosion=3, keep=False), expected)
    far = clean_instances(ids, box=3)  # only what touches
    assert (far[5:10, 10] == 1).all() and (far[5:10, 11:14] == 2).all()


def test_an_instance_that_grows_may_survive():
    ids = torch.zeros(9, 12, dtype=torch.long)
    ids[2:7, 2:4] = 1  # beside 2, which takes it over and is 5 wide then
    ids[2:7, 4:7] = 2
    assert (clean_instances(ids)[2:7, 2:7] == 2).all()
    assert (clean_instances(ids, keep=False)[2:7, 2:7] == 2).all()


def clean_loop(ids, erosion, box):
    """Appendix H pixel by pixel."""
    inside = lambda m, y, x, r: m[max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1]
    pixels = list(itertools.product(*map(range, ids.shape)))
    ids = ids.clone()
    for c in sorted(set(ids.unique().tolist()) - {0}):
        if any((inside(ids, *p, erosion // 2) == c).all() for p in pixels if ids[p] == c):
            continue
        before = ids.clone()
        for p in pixels:
            around = inside(before, *p, box // 2).flatten().tolist()
            around = [v for v in around if v not in (0, c)]
            if before[p] == c and around:
                ids[p] = min(set(around), key=lambda v: (-around.count(v), v))
    return ids


def test_clean_up_is_appendix_h():
    samples, _ = cell_samples(32, 4, 4, 4, 0.2)
    ids = cluster_instances(samples, 2, torch.Generator().manual_seed(0))
    assert len(ids.unique()) > 30
    cleaned = clean_instances(ids, 3, 7)
    assert torch.equal(cleaned, clean_loop(ids, 3, 7))
    assert len(cleaned.unique()) < len(ids.unique())


def test_volumes_are_clustered_too():
    samples, truth = cell_samples(16, 2, 8, 9, 0)
    volume = samples[:, None].expand(-1, 6, -1, -1)
    ids = clean_instances(cluster_instances(volume), 3, 5)
    assert ids.shape == (6, 16, 16) and len(ids.unique()) == 5
    assert torch.equal(ids == 0, (truth == 0).expand(6, -1, -1))


def test_coherence_by_hand():
    instances = torch.tensor([[[1, 1, 1, 1, 0, 7, 7, -1]], [[0, 0, 0, 0, 0, 0, 0, 0]]])
    samples = torch.tensor([[[2, 2, 2, 3, 5, 1, 4, 4]], [[0, 0, 0, 3, 5, 4, 4, 9]]])  # (n, H, W)
    share, count = coherence(samples[:, None].expand(-1, 2, -1, -1), instances)
    # object 1: three of four, then one of four; object 7: one of two, then both
    assert share[0].item() == pytest.approx((3 / 4 + 1 / 4 + 1 / 2 + 1) / 4)
    assert share[1].isnan() and count.tolist() == [2, 0]
    empty = torch.zeros(3, 2, 1, 8, dtype=torch.long)  # no sample has an object
    assert coherence(empty, instances)[0][0] == 0


def test_kl_of_every_case_by_itself():
    split = data.load("cells", "test", n=15, size=32)
    torch.manual_seed(0)
    model = HPUNet(HPUNetConfig(num_classes=16, channels=(4, 6, 8), blocks=1, convs=1,
                                latents=(2, 1))).eval()
    torch.nn.init.normal_(model.posterior.heads["0"].weight)  # equal nets would have a KL of 0
    terms = kl_terms(model, split)
    assert set(terms) == {"kl", "kl_0", "kl_1"} and terms["kl"].shape == (3,)
    assert torch.allclose(terms["kl"], terms["kl_0"] + terms["kl_1"])
    first = model.loss(split.images[:1], split.labels[:1, 0].long())[1]
    assert terms["kl_0"][0] == pytest.approx(first["kl_0"].item(), rel=1e-4)  # draws nothing


def test_membranes_fade_and_the_cells_stay():
    plain, faded = (data.load("cells", "all", n=20, faded=faded) for faded in (0, 50))
    default = data.load("cells", "all", n=20)
    for one, other in zip((plain.images, plain.instances, plain.labels),
                          (default.images, default.instances, default.labels)):
        assert torch.equal(one, other)
    assert int(default.instances.sum()) == 1173768  # as before there was such an option
    inside, gone = plain.instances > 0, (plain.instances == 0) & (faded.instances > 0)
    assert torch.equal(faded.instances[inside], plain.instances[inside])
    walls = (plain.instances == 0).sum()
    assert 0.4 < gone.sum() / walls < 0.6
    light, dark = faded.images[:, 0][gone].mean(), faded.images[:, 0][faded.instances == 0].mean()
    assert light - dark > 0.2
    truth = faded.instances.long()
    assert rand_error(connected_components(truth > 0), truth).mean() > 0.7
    assert rand_error(truth, truth).max() < 1e-6
    with pytest.raises(DataError, match="at most 100 per cent"):
        data.load("cells", "all", faded=101)


def test_cells_of_five_colours():
    five = data.load("cells", "all", n=20, colours=5)
    assert five.num_classes == 6 and five.labels.unique().tolist() == list(range(6))
    assert torch.equal(five.images, data.load("cells", "all", n=20).images)
