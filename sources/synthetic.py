"""Synthetic sets, whose distribution of label maps is known.

Each function returns the whole set and the case indices of each split. Its keyword arguments are
the set's options; `Annotated[int, 32]` is a whole number from 32 up.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from sources.base import (SPLITS, Split, random_classes, relabel, seeded_generator, spline,
                          split_groups)
from sources.files import DataError

STREET = ("sky", "building", "road", "sidewalk", "vegetation", "car", "person")

# The probability that a class flips to its twin (Probabilistic U-Net, arXiv:1806.05034, Sec. 4.2).
FLIPS = {"sidewalk": 8 / 17, "person": 7 / 17, "car": 6 / 17, "vegetation": 5 / 17, "road": 4 / 17}

# The organs in a picture of the belly, as shares of its side: row, column, radii; and contrast.
ORGANS = torch.tensor([[0.45, 0.28, 0.20, 0.17, 0.32],  # 1 liver
                       [0.38, 0.70, 0.12, 0.14, 0.20],  # 2 stomach
                       [0.72, 0.28, 0.09, 0.06, 0.42],  # 3 right kidney
                       [0.70, 0.72, 0.09, 0.06, 0.42],  # 4 left kidney
                       [0.62, 0.50, 0.06, 0.06, 0.55]])  # 5 aorta


def make_toy1d():
    """SSN's toy (arXiv:2006.06015, Sec. 5.1): one constant image of 21 pixels, two label maps.

    The first third is on, the last third off; the middle third is on with probability 1/2.
    """
    labels = torch.zeros(1, 2, 21, dtype=torch.uint8)
    labels[:, :, :7] = 1
    labels[:, 1, 7:14] = 1
    whole = Split(torch.ones(1, 1, 21), labels, None, ["line"], 2, ["line"], exact=True,
                  parts={split: ["line"] for split in SPLITS})
    return whole, {split: [0] for split in SPLITS}  # one case for all


def make_shapes(*, n: Annotated[int, 3] = 1000, size: Annotated[int, 32] = 64, seed: int = 0):
    """Two objects, three independent ambiguities, 12 label maps a case in a fixed order.

    s, u, v are uniform in [0, 1] for each case, and the image shows all of them.
      class     the main object |x/a|^p + |y/b|^p < 1 has p = 2 * 4^s, between ellipse (class 1,
                p = 2) and box (class 2, p = 8):                P(class 2) = 0.1 + 0.8 s
      style     every border is a halo, sigmoid(-distance / h), h = 0.4 + 2 u pixels at size 64.
                Annotators draw tight (-3 px), middle or loose (+3 px), the same way around
                both objects, and with q = 0.1 + 0.8 u:         P = (1 - q)^2, 2 q (1 - q), q^2
      presence  a second, faint ellipse (class 3) of contrast 0.1 + 0.3 v is drawn or not:
                                                                P(drawn) = 0.1 + 0.8 v
    The probability of label map (class * 3 + style) * 2 + drawn is the product of the three.
    """
    uniform, normal = _draws(n, seed)
    s = uniform(0, 1)
    images, inner, outer, weights = _two_objects(uniform, normal, size, 2, exponent=2 * 4**s)
    kind = torch.tensor([1, 2], dtype=torch.uint8).view(2, 1, 1, 1, 1)
    drawn = torch.tensor([0, 3], dtype=torch.uint8).view(2, 1, 1)
    labels = torch.where(inner[:, None, :, None], kind, outer[:, None, :, None] * drawn)
    weights = _either(s)[:, :, None] * weights[:, None]  # (n, 2, 6)
    return _finish("shape", images, labels.flatten(1, 3), weights.flatten(1), 4)


def make_lesions3d(*, n: Annotated[int, 3] = 60, size: Annotated[int, 32] = 48, seed: int = 0):
    """`make_shapes` in 3D without the class: a certain and a faint lesion, 6 label maps a case.

    Label map number style * 2 + drawn; the style moves borders by 3 voxels at size 64.
    """
    images, inner, outer, weights = _two_objects(*_draws(n, seed), size, 3)
    labels = torch.stack([inner, inner | outer], 2).to(torch.uint8)
    return _finish("volume", images, labels.flatten(1, 2), weights, 2)


def _two_objects(uniform: Callable, normal: Callable, size: int, dims: int, exponent=None):
    """What `make_shapes` describes, without the class: images (n, 1, *S); each object as drawn in
    the three styles, (n, 3, *S) bool; the probabilities (n, 6) of style * 2 + drawn."""
    unit, u, v = size / 64, uniform(0, 1), uniform(0, 1)
    axis = F.normalize(normal(dims), dim=1)  # the objects stand on either side of the centre
    middle = size / 2 - 0.5 + unit * uniform(-2, 2, dims)
    main = _distance(size, middle - 11 * unit * axis, unit * uniform(9, 13, dims),
                     uniform(0, math.pi), exponent)
    faint = _distance(size, middle + 19 * unit * axis, unit * uniform(6, 8, dims),
                      uniform(0, math.pi))
    halo = _broadcast(unit * (0.4 + 2 * u), dims)
    images = (0.2 + 0.06 * _texture(normal, size, 6, dims) + 0.04 * normal(*[size] * dims)
              + _broadcast(uniform(0.45, 0.65), dims) * torch.sigmoid(-main / halo)
              + _broadcast(0.1 + 0.3 * v, dims) * torch.sigmoid(-faint / halo))
    shift = _broadcast(unit * torch.tensor([-3.0, 0.0, 3.0]), dims)
    inner, outer = main[:, None] < shift, faint[:, None] < shift  # (n, 3, *S)
    no, yes = _either(u).unbind(1)
    styles = torch.stack([no**2, 2 * no * yes, yes**2], 1)  # (n, 3)
    return images[:, None], inner, outer, (styles[:, :, None] * _either(v)[:, None]).flatten(1)


def make_modes(*, n: Annotated[int, 3] = 500, size: Annotated[int, 48] = 64, seed: int = 0):
    """Street scenes, where each of five classes may turn into its twin class: 32 label maps.

    Classes 0..6 are `STREET`, 7..11 the twins in the order of `FLIPS`; maps as in `flip_modes`.
    """
    uniform, normal = _draws(n, seed)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    scene, images = torch.zeros(n, size, size, dtype=torch.long), torch.zeros(n, 3, size, size)

    def one(low: float, high: float) -> Tensor:  # a number for each scene, (n, 1, 1)
        return _broadcast(uniform(low, high), 2)

    def ellipse(row, column, high, wide) -> Tensor:
        return ((y - row) / high) ** 2 + ((x - column) / wide) ** 2 < 1

    def paint(where: Tensor, name: str, *colour: float, vary: float = 0.06):
        scene.masked_fill_(where, STREET.index(name))
        tone = torch.tensor(colour) + vary * uniform(-1, 1, 3)
        torch.where(where[:, None], tone[:, :, None, None], images, out=images)

    side = torch.where(one(0, 1) < 0.5, 1.0, -1.0)  # the tree's side; the person has the other
    horizon, vanish = one(0.48, 0.56), 0.5 + side * one(-0.05, 0.05)
    paint(torch.ones_like(scene, dtype=torch.bool), "sky", 0.65, 0.8, 0.95)
    house = (4 * x + one(0, 1)).long()  # five fronts of different height
    roofs = uniform(0.08, 0.3, 5).gather(1, house.flatten(1)).view(n, size, size)
    for number in range(5):
        paint((house == number) & (y > roofs), "building", 0.55, 0.5, 0.45, vary=0.12)
    windows = (x * 16 % 1 > 0.5) & (y * 12 % 1 > 0.5)
    paint((scene == 1) & windows, "building", 0.35, 0.38, 0.45)
    paint(y > horizon, "sidewalk", 0.62, 0.58, 0.6)
    road = (x - vanish).abs() < 0.07 + 0.75 * (y - horizon)
    paint((y > horizon) & road, "road", 0.36, 0.36, 0.4)

    crown, trunk = one(0.28, 0.36), 0.5 + side * one(0.3, 0.4)
    stem = ((x - trunk).abs() < 0.02) & (y > crown) & (y < horizon + 0.06)
    paint(stem, "vegetation", 0.35, 0.27, 0.18)
    paint(ellipse(crown, trunk, one(0.13, 0.2), one(0.09, 0.14)), "vegetation", 0.2, 0.45, 0.2)
    row, column, high, wide = one(0.7, 0.8), 0.5 + one(-0.1, 0.1), one(0.045, 0.06), one(0.11, 0.15)
    body = ((x - column).abs() < wide) & ((y - row).abs() < high)
    roof = ((x - column).abs() < 0.6 * wide) & ((y - row + 1.8 * high).abs() < high)
    paint(body | roof, "car", 0.7, 0.15, 0.15, vary=0.15)
    paint(roof & (y - row < -high) & (y - row > -2.3 * high), "car", 0.25, 0.3, 0.38)
    for wheel in (-0.6, 0.6):
        paint(ellipse(row + high, column + wheel * wide, 0.03, 0.03), "car", 0.08, 0.08, 0.08)
    row, column = one(0.58, 0.66), 0.5 - side * one(0.3, 0.4)
    paint(ellipse(row, column, 0.12, 0.035), "person", 0.2, 0.25, 0.6, vary=0.15)
    paint(ellipse(row - 0.13, column, 0.035, 0.03), "person", 0.85, 0.65, 0.5)
    images *= 1 + 0.12 * _texture(normal, size, 8)[:, None]
    images = (images + 0.04 * normal(3, size, size)).clamp(0, 1)

    table, probabilities = flip_modes([STREET.index(name) for name in FLIPS], len(STREET))
    labels, weights = table[:, scene].transpose(0, 1).contiguous(), probabilities.repeat(n, 1)
    return _finish("scene", images, labels, weights.float(), len(STREET) + len(FLIPS))


def flip_modes(values: Sequence[int], twin: int) -> tuple[Tensor, Tensor]:
    """The 32 label maps of `FLIPS`: (table (32, 256) uint8, probabilities (32,)).

    values: the class of each name of `FLIPS`. In label map m class c becomes table[m, c]: values[j]
    flips to twin + j where bit j of m is set. A map's probability is the product over the five.
    """
    flipped = torch.arange(32)[:, None] >> torch.arange(len(values)) & 1  # (32, 5)
    table = torch.arange(256, dtype=torch.uint8).repeat(32, 1)
    for j, value in enumerate(values):
        table[flipped[:, j] == 1, value] = twin + j
    chance = torch.tensor(list(FLIPS.values()), dtype=torch.float64)
    return table, torch.where(flipped == 1, chance, 1 - chance).prod(1)


def make_cells(*, n: Annotated[int, 3] = 500, size: Annotated[int, 32] = 64, seed: int = 0,
               faded: int = 0, colours: Annotated[int, 2] = 15):
    """Cells of a warped Voronoi diagram with dark membranes, like neurites in electron microscopy.

    Each cell's class is drawn anew from 1..colours; the membrane is class 0 (HPU-Net's SNEMI3D
    task, arXiv:1905.13077, Sec. 3.3). `instances` holds the ids, `labels` four maps for evaluation.
    faded: per cent of the image where membranes fade out and cells touch, so that the connected
    components of even the true foreground are many cells at once.
    """
    if faded > 100 or colours > 254:
        raise DataError(f"faded={faded}, colours={colours}: give at most 100 per cent and 254")
    (uniform, normal), across = _draws(n, seed), 4  # cells along the side
    axis = (torch.arange(size) + 0.5) / size * across  # in cells
    y, x = axis[:, None] + 0.2 * _texture(normal, size, 4), axis + 0.2 * _texture(normal, size, 4)
    nearest, second = torch.full((2, n, size, size), math.inf)
    instances = torch.zeros(n, size, size, dtype=torch.int32)
    corners = list(itertools.product(range(-1, across + 1), repeat=2))
    for label, (row, column) in enumerate(corners, start=1):
        place = uniform(0.1, 0.9, 2)
        distance = torch.hypot(y - row - _broadcast(place[:, 0], 2),
                               x - column - _broadcast(place[:, 1], 2))
        instances.masked_fill_(distance < nearest, label)
        second = torch.minimum(second, torch.maximum(nearest, distance))
        nearest = torch.minimum(nearest, distance)
    to_wall = (second - nearest) / 2 * size / across  # about the pixels to the border
    width = _broadcast(uniform(0.6, 1.1), 2) * size / 64
    shade = uniform(-0.08, 0.08, len(corners) + 1)
    shade = shade.gather(1, instances.flatten(1).long()).view(instances.shape)
    images = 0.65 + shade + 0.08 * _texture(normal, size, 24) + 0.06 * normal(size, size)
    visible = torch.ones_like(images)
    if faded:  # drawn last: the cells are those of the set without it
        field = _texture(normal, size, 12)
        threshold = field.flatten(1).quantile(faded / 100, dim=1)
        visible = torch.sigmoid(6 * (field - _broadcast(threshold, 2)))
    wall = torch.sigmoid(3 * (1.2 * width - to_wall) / width)
    images = (images - 0.45 * wall * visible).clamp(0, 1)
    instances.masked_fill_((to_wall < width) & (visible > 0.5), 0)
    tables = [random_classes(n, len(corners) + 1, 1, colours + 1, seeded_generator(seed, number))
              for number in range(4)]
    labels = torch.stack([relabel(instances, table) for table in tables], 1)
    return _finish("section", images[:, None], labels, None, colours + 1, instances=instances)


def make_organs(*, n: Annotated[int, 12] = 400, size: Annotated[int, 48] = 96, seed: int = 0):
    """Five organs with blurred borders, four slices a patient, three annotators of known weight.

    An organ covers sigmoid(-distance / h) of a pixel; each organ of a patient has its own h, 0.4 to
    2.4 px at size 96. Annotators draw all organs where they cover more than 0.2, 0.5 or 0.8
    (probability 1/4, 1/2, 1/4): loose, middle or tight, +-1.39 h.
    """
    (uniform, normal), unit, count = _draws(n, seed), size / 96, len(ORGANS)
    patient = torch.arange(n) // 4
    blur = unit * uniform(0.4, 2.4, count)[patient]
    turn = uniform(-0.4, 0.4, count)[patient]
    places = ORGANS[:, :2] + uniform(-0.03, 0.03, count, 2)[patient] + uniform(-0.01, 0.01, 1, 2)
    radii = ORGANS[:, 2:4] * uniform(0.8, 1.1, 1, 2)[patient] * uniform(0.95, 1.05, count, 2)
    belly = _distance(size, torch.full((n, 2), size / 2), size * torch.tensor([[0.4, 0.46]]))
    cover = torch.stack([torch.sigmoid(-_distance(size, size * places[:, k], size * radii[:, k],
                                                  turn[:, k]) / _broadcast(blur[:, k], 2))
                         for k in range(count)], 1)  # (n, 5, H, W)
    cover = cover / cover.sum(1, keepdim=True).clamp(min=1)
    images = (0.05 + torch.sigmoid(-belly / unit) * (0.3 + 0.04 * _texture(normal, size, 10))
              + torch.einsum("nkhw,k->nhw", cover, ORGANS[:, 4]) + 0.03 * normal(size, size))
    most, organ = cover.max(1)
    labels = torch.stack([(organ + 1) * (most > threshold) for threshold in (0.2, 0.5, 0.8)], 1)
    weights = torch.tensor([0.25, 0.5, 0.25]).repeat(n, 1)
    groups = [f"patient-{number:04d}" for number in patient.tolist()]
    return _finish("slice", images[:, None], labels.to(torch.uint8), weights, 6, groups)


def _draws(n: int, seed: int):
    """Seeded draws for n cases: uniform(low, high, *more) and normal(*more), each (n, *more)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *more, generator=generator)

    def normal(*more: int) -> Tensor:
        return torch.randn(n, *more, generator=generator)

    return uniform, normal


def _either(visible: Tensor) -> Tensor:
    """Probabilities (n, 2) of no and yes: P(yes) = 0.1 + 0.8 visible."""
    return torch.stack([0.9 - 0.8 * visible, 0.1 + 0.8 * visible], 1)


def _broadcast(values: Tensor, dims: int) -> Tensor:
    """(n,) -> (n, 1, ...), to broadcast over maps of `dims` axes."""
    return values.view(-1, *[1] * dims)


def _distance(size: int, centre: Tensor, radii: Tensor, turn=None, exponent=None) -> Tensor:
    """About the signed distance, in pixels, to a superellipse: (n, d), (n, d) -> (n, *[size] * d).

    (f - 1) times the mean radius, f = (sum_i |x_i / r_i|^p)^(1/p); `exponent` p (n,) is 2 if not
    given. `turn` (n,), radians, is in the last two axes.
    """
    dims = centre.shape[1]
    grid = [torch.arange(size).view(*[-1 if i == axis else 1 for i in range(dims)])
            - _broadcast(centre[:, axis], dims) for axis in range(dims)]
    if turn is not None:
        cos, sin = _broadcast(turn.cos(), dims), _broadcast(turn.sin(), dims)
        grid[-2:] = [cos * grid[-2] - sin * grid[-1], sin * grid[-2] + cos * grid[-1]]
    parts = [(line / _broadcast(radii[:, axis], dims)).abs() for axis, line in enumerate(grid)]
    if exponent is None:
        f = sum(part**2 for part in parts).sqrt()
    else:
        power = _broadcast(exponent, dims)
        f = sum(part**power for part in parts) ** (1 / power)
    return (f - 1) * _broadcast(radii.log().mean(1).exp(), dims)


def _texture(normal: Callable, size: int, bumps: int, dims: int = 2) -> Tensor:
    """Smooth noise (n, *[size] * dims), mean 0, spread about 1, so many `bumps` along a side."""
    knots = normal(1, *[bumps + 3] * dims)
    return spline(knots, [size] * dims)[:, 0] / 0.69**dims  # 0.69: rms of a cubic B-spline


def _finish(kind, images, labels, weights, num_classes, groups=None, instances=None):
    """Names the cases and splits them 60/20/20 by group."""
    names = [f"{kind}-{i:04d}" for i in range(len(images))]
    rows = split_groups(groups or names, val=0.25)
    parts = {split: [names[i] for i in rows[split]] for split in SPLITS}
    whole = Split(images, labels, weights, groups or names, num_classes, names, instances,
                  exact=instances is None, parts=parts)
    return whole, rows
