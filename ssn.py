"""Stochastic Segmentation Networks (Monteiro et al., NeurIPS 2020, arXiv:2006.06015).

One image, many plausible masks. The network predicts a normal distribution over the whole logit
map, with a covariance of low rank,
        eta | x ~ N(mu(x), P(x) P(x)^T + D(x)),                                        (Eq. 5)
so a single forward pass yields as many spatially coherent masks as you like, at the price of a
matrix-vector product each. Trained by maximising the Monte-Carlo likelihood
        log p(y | x) ~ logsumexp_m ( sum_i log softmax(eta_i^m)[y_i] ) - log M.        (Eq. 7)
What varies between samples is aleatoric uncertainty: what the image leaves open.

The paper's three experiments, chosen by the number of spatial axes of the data:
    dims=1  the 21-pixel toy of Fig. 2: no network, the three maps are free parameters
    dims=2  LIDC: a deterministic U-Net (the default configuration)
    dims=3  BraTS: DeepMedic, trained on patches; at test time the maps are stitched first and one
            sample is drawn for the whole volume, so no patch border shows in it
and `SSN(config, backbone=net)` puts the method on any network of your own.

Differences from the paper
  1. Sampling: the authors' code builds torch's LowRankMultivariateNormal, which factorises a matrix
     and falls back to independent normals where that fails. A sample needs no factorisation.
  2. The log of the diagonal is bounded (common.bounded_log_std), so it cannot overflow; the authors
     stop the toy before it does.
  3. A covariance that outgrows the mean leads to bad optima (Sec. 5.1). As in the paper, the toy
     trains its mean first, and `mask` takes factor and diagonal out of a known background (air
     round a brain). Beyond the paper, so do the networks (`mean_steps`), and their covariance
     starts small: otherwise whole backgrounds flip in many samples, which Eq. 7 hardly minds (one
     good sample in M is enough for it) and which takes long to unlearn.
  4. DeepMedic's coarse pathways see averages over 3^3 and 5^3 voxels and come back by repetition,
     so that stitched and whole-volume maps agree exactly. Half of the training patches are centred
     on a labelled voxel, as DeepMedic's authors do; this paper does not say.
  5. Temperature: T scales the covariance, N(mu, T Sigma).

    python ssn.py                                      # Fig. 2 in seconds -> ssn_toy.png
    python train.py --model ssn --data lidc --device cuda
    python train.py --model ssn --data lidc --model-args rank=0       # the diagonal model
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (BATCH_NORM, CONV, IGNORE, LowRankNormal, UNet, bounded_log_std, center_crop,
                    check_choice, conv_block, cross_entropy, new_figure, paint_label, reflect_index,
                    reflect_pad, save_figure, save_grid, show_map, valid_label)


TILE = 60  # voxels a side that DeepMedic computes at once at test time: bounds memory, else nothing


@dataclass(frozen=True)
class SSNConfig:
    """Defaults are the paper's LIDC model; the last five fields only serve dims=3 and dims=1."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    rank: int = 10  # columns of the covariance factor P; 0 is the paper's diagonal model
    mc_samples: int = 20  # M of Eq. 7
    diagonal_min: float = 1e-5  # added to every variance
    mean_steps: int = 1000  # training steps in which the mean learns alone: difference 3
    backbone: str = "auto"  # "unet", "deepmedic", "none"; auto: by dims as above
    channels: tuple[int, ...] = (32, 64, 128, 192, 192, 192, 192)  # U-Net, a level each
    convs: int = 3  # 3-wide convolutions a level; and 1-wide ones before the three heads
    pathway: tuple[int, ...] = (30, 30, 40, 40, 40, 40, 50, 50)  # DeepMedic: a pathway's layers
    scales: tuple[int, ...] = (1, 3, 5)  # DeepMedic: a pathway sees the volume at 1/scale
    hidden: tuple[int, ...] = (250, 250)  # DeepMedic: 1-wide layers that join the pathways
    patch: int = 30  # DeepMedic: side of the label patch in training, a multiple of the scales
    pixels: int = 21  # length of the toy's line


class SSN(nn.Module):
    """Stochastic segmentation network: any backbone, and three 1-wide convolutions on it.

    backbone: a network of your own, image (B, in_channels, *S) -> features (B, F, *S), with F
        in its attribute `out_channels`; None builds the one `config` names.
    Default: 2D U-Net, 9.24 M parameters.
    """

    Config = SSNConfig
    TRAINING = dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=12, steps=500_000)
    QUICK_CONFIG = dict(channels=(16, 32, 64), convs=2, mc_samples=10, mean_steps=100, patch=18,
                        pathway=(8, 8, 12, 16), scales=(1, 3), hidden=(32,))
    QUICK_TRAINING = dict(lr=2e-3, lr_drops=((450, 0.2),), batch_size=8, steps=600)

    def __init__(self, config: SSNConfig = SSNConfig(), backbone: nn.Module | None = None):
        super().__init__()
        self.config = c = config
        check_choice("dims", c.dims, (1, 2, 3))
        check_choice("backbone", c.backbone, ("auto", "unet", "deepmedic", "none"))
        if c.rank < 0 or c.mc_samples < 1:
            raise ValueError(f"rank={c.rank}, mc_samples={c.mc_samples}: rank is at least 0, "
                             "mc_samples at least 1")
        self.backbone = backbone or build_backbone(c)
        features = self.backbone.out_channels
        self.mean = CONV[c.dims](features, c.num_classes, 1)
        self.log_diagonal = CONV[c.dims](features, c.num_classes, 1)
        self.factor = CONV[c.dims](features, c.rank * c.num_classes, 1) if c.rank else None
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))
        with torch.no_grad():  # a quiet start: see difference 3
            self.log_diagonal.bias -= 4
            for parameter in self.factor.parameters() if c.rank else ():
                parameter *= 0.1

    def distribution(self, image: Tensor, mask: Tensor | None = None) -> LowRankNormal:
        """The normal over logit maps, (B, K, *S): all there is to know about an image.

        mask (B, *S), true inside the region of interest: outside, logits stay at their mean.
        """
        if isinstance(self.backbone, DeepMedic):
            maps = self.backbone.stitch(image, TILE, self._maps)
        else:
            maps = self._maps(self.backbone(image))
        return self._normal(*maps, mask)

    def _maps(self, features):
        """features (B, F, *S) -> mean (B, K, *S), factor (B, R*K, *S), log diagonal (B, K, *S)."""
        mean = self.mean(features)
        factor = self.factor(features) if self.factor else mean[:, :0]
        return mean, factor, self.log_diagonal(features)

    def _normal(self, mean, factor, log_diagonal, mask):
        factor = factor.unflatten(1, (self.config.rank, self.config.num_classes))
        diagonal = bounded_log_std(log_diagonal).exp()
        if mask is not None:
            diagonal = diagonal * mask.unsqueeze(1)
            factor = factor * mask[:, None, None]
        return LowRankNormal(mean, factor, diagonal + self.config.diagonal_min)

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Eq. 7: (loss in nats, summed over pixels and averaged over the batch; its terms).

        image (B, C, *S), label int64 (B, *S) with 255 ignored, mask bool (B, *S).
        DeepMedic sees one patch of every volume, at random.
        """
        if isinstance(self.backbone, DeepMedic):
            image, label, mask = self.backbone.random_patch(image, label, mask, self.config.patch)
        normal = self._normal(*self._maps(self.backbone(image)), mask)
        if self.training:
            # Temperature 0 leaves the mean's cross-entropy, and the other heads without gradient.
            temperature = (self.steps_seen >= self.config.mean_steps).float()
            self.steps_seen += 1
        else:
            temperature = 1.0
        samples = normal.sample(self.config.mc_samples, antithetic=True, temperature=temperature)
        log_prob = -cross_entropy(samples, valid_label(label, mask))  # (M, B)
        loss = (math.log(len(log_prob)) - log_prob.logsumexp(0)).mean()
        return loss, {"negative_log_likelihood": loss.detach()}

    forward = loss

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None, *,
               temperature: float = 1.0) -> Tensor:
        """n logit maps, (n, B, K, *S); one pass of the network whatever n is."""
        return self.distribution(image).sample(n, generator, temperature=temperature)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) at the most likely logit map, the mean."""
        return self.distribution(image).mean.softmax(1)

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int,
                       mask: Tensor | None = None) -> Tensor:
        """Eq. 6 with n samples: log p(y | x) in nats, a lower bound on average, (B,)."""
        normal = self.distribution(image, mask)
        label = valid_label(label, mask)
        chunk = max(1, 2**24 // normal.mean.numel())  # memory does not grow with n
        parts = [-cross_entropy(normal.sample(min(chunk, n - i)), label)
                 for i in range(0, n, chunk)]
        return torch.cat(parts).logsumexp(0) - math.log(n)


def build_backbone(c: SSNConfig) -> nn.Module:
    """The network that `config.backbone` names."""
    name = {1: "none", 2: "unet", 3: "deepmedic"}[c.dims] if c.backbone == "auto" else c.backbone
    if name == "deepmedic":
        return DeepMedic(c)
    if name == "none":
        return FreeMaps(c.pixels)
    width = c.channels[0]
    backbone = nn.Sequential(
        UNet(c.in_channels, c.channels, dims=c.dims, convs=c.convs),
        conv_block(c.dims, width, width, convs=c.convs, kernel=1))
    backbone.out_channels = width
    return backbone


class FreeMaps(nn.Module):
    """No network: pixel i's features are the i-th unit vector, so the heads' weights *are* maps."""

    def __init__(self, pixels: int):
        super().__init__()
        self.out_channels = pixels
        self.register_buffer("units", torch.eye(pixels), persistent=False)

    def forward(self, image):
        if image.shape[2:] != self.units.shape[1:]:
            raise ValueError(f'backbone="none" holds one line of {self.out_channels} pixels; the '
                             f"image has {tuple(image.shape[2:])}: set pixels, or another backbone")
        return self.units.expand(len(image), -1, -1)


class DeepMedic(nn.Module):
    """Three views of a volume at 1/1, 1/3 and 1/5, side by side (Kamnitsas et al. 2017).

    Each pathway is eight unpadded 3^3 convolutions, pre-activated: at scale s they eat 8 s voxels
    on each side, so an input of side o + 2 * margin, margin = 8 * 5, gives features of side o:
    110 -> 30, 140 -> 60. o is a multiple of every scale.
    """

    def __init__(self, c: SSNConfig):
        super().__init__()
        self.scales, self.multiple = c.scales, math.lcm(*c.scales)
        self.layers = len(c.pathway)
        self.margin = self.layers * max(c.scales)
        if c.dims != 3 or c.patch % self.multiple:
            raise ValueError(f"deepmedic with dims={c.dims}, patch={c.patch}: dims is 3 and patch "
                             f"a multiple of {self.multiple}, the scales' common multiple")

        def layer(i, before, after, kernel):
            activate = [] if i == 0 else [BATCH_NORM[3](before), nn.ReLU(inplace=True)]
            return activate + [nn.Conv3d(before, after, kernel)]

        widths = list(zip((c.in_channels, *c.pathway), c.pathway))
        self.pathways = nn.ModuleList(
            nn.Sequential(*[m for i, w in enumerate(widths) for m in layer(i, *w, 3)])
            for _ in c.scales)
        joined = len(c.scales) * c.pathway[-1]
        self.join = nn.Sequential()
        for before, after in zip((joined, *c.hidden), c.hidden):
            self.join.extend([*layer(1, before, after, 1)[:2], nn.Dropout(0.5),
                              nn.Conv3d(before, after, 1)])
        self.join.extend([BATCH_NORM[3](c.hidden[-1]), nn.ReLU(inplace=True)])
        self.out_channels = c.hidden[-1]

    def forward(self, volume):
        """(B, C, D, H, W), every side o + 2 * margin -> features (B, F, *o)."""
        size = [side - 2 * self.margin for side in volume.shape[2:]]
        views = []
        for scale, pathway in zip(self.scales, self.pathways):
            view = center_crop(volume, [o + 2 * scale * self.layers for o in size])
            view = pathway(F.avg_pool3d(view, scale) if scale > 1 else view)
            views.append(F.interpolate(view, scale_factor=scale) if scale > 1 else view)
        return self.join(torch.cat(views, 1))

    def stitch(self, volume, tile, head):
        """`head` of the features of a whole volume (B, C, *S), computed tile by tile.

        Tiles start at multiples of every scale, so the result is the same whatever side they have.
        """
        size, tile = volume.shape[2:], tile - tile % self.multiple
        up = [-s % self.multiple for s in size]
        volume = reflect_pad(volume, [(self.margin, self.margin + u) for u in up])
        padded = [s + u for s, u in zip(size, up)]
        whole = None
        for corner in torch.cartesian_prod(*[torch.arange(0, s, tile) for s in padded]).tolist():
            part = volume
            for axis, (start, side) in enumerate(zip(corner, padded), 2):
                stop = min(start + tile, side)
                part = part.narrow(axis, start, stop - start + 2 * self.margin)
            maps = head(self(part))
            if whole is None:
                whole = [m.new_empty(*m.shape[:2], *padded) for m in maps]
            for target, m in zip(whole, maps):
                place = [slice(a, a + b) for a, b in zip(corner, m.shape[2:])]
                target[:, :, place[0], place[1], place[2]] = m
        return [w[:, :, : size[0], : size[1], : size[2]] for w in whole]

    def random_patch(self, image, label, mask, side):
        """One window of side^3 labels a case, its image wider by the margin the network eats.

        Centred on a labelled voxel half of the time, anywhere otherwise. What lies beyond the
        volume: image by reflection, label 255, mask false.
        """
        label = valid_label(label, mask)
        images, labels, masks = [], [], []
        for case, (x, y) in enumerate(zip(image, label)):
            center = torch.stack([torch.randint(s, ()) for s in y.shape])
            labelled = torch.nonzero((y > 0) & (y != IGNORE))
            if len(labelled) and torch.rand(()) < 0.5:
                center = labelled[torch.randint(len(labelled), ())]
            start = [min(max(middle - side // 2, 0), max(size - side, 0))
                     for middle, size in zip(center.tolist(), y.shape)]
            for axis, a in enumerate(start, 1):
                index = torch.arange(a - self.margin, a + side + self.margin, device=x.device)
                x = x.index_select(axis, reflect_index(index, x.shape[axis]))
            images.append(x)
            window = tuple(slice(a, a + side) for a in start)
            missing = [p for s in y.shape[::-1] for p in (0, max(side - s, 0))]
            labels.append(F.pad(y[window], missing, value=IGNORE))
            if mask is not None:
                masks.append(F.pad(mask[case][window], missing, value=False))
        return torch.stack(images), torch.stack(labels), torch.stack(masks) if masks else None


@torch.no_grad()
def draw_manipulation(model: SSN, image: Tensor, path: str, seed: int = 0) -> None:
    """Fig. 6: one sample of an image (C, H, W), changed after the fact.

    A row for every foreground class, whose part of (sample - mean) is scaled by -3 ... 3 with the
    other classes left alone, and one for the temperature, at which everything is scaled.
    """
    scales = (-3, -2, -1, 0, 1, 2, 3)
    normal = model.distribution(image[None])
    sample = normal.sample(1, torch.Generator(image.device).manual_seed(seed))
    rows = {}
    for k in range(1, model.config.num_classes):
        changes = torch.ones(len(scales), model.config.num_classes)
        changes[:, k] = torch.tensor(scales)
        rows[f"class {k} scaled"] = [normal.scale_classes(sample, c) for c in changes]
    rows["temperature 0 to 9"] = [normal.mean + s * (sample - normal.mean) if s >= 0 else None
                                  for s in scales]
    pictures = {name: [None if x is None else paint_label(x.reshape(x.shape[-3:]).argmax(0), image)
                       for x in row] for name, row in rows.items()}
    save_grid(path, pictures, [f"x {s}" for s in scales])


# ------------------------------------------------------------------------- the toy of Sec. 5.1


def train_toy(image: Tensor, label: Tensor, rank: int, steps: int = 2500) -> SSN:
    """Fit the three free maps to equally likely labels of one image.

    image (B, 1, S) the same B times, label (B, S).
    """
    torch.manual_seed(0)
    model = SSN(SSNConfig(dims=1, rank=rank, mc_samples=200, pixels=label.shape[-1],
                          mean_steps=200))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.4, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(image, label)[0].backward()
        optimizer.step()
        decay.step()
    return model


@torch.no_grad()
def draw_toy(models: dict[str, SSN], image: Tensor, label: Tensor, path: str) -> None:
    """Fig. 2: a row a model with mean, covariance and 14 samples; the two label maps at the end."""
    figure, axes = new_figure(len(models), 4, panel=2.0, title="SSN on 21 pixels, two label maps")
    for row, (name, model) in zip(axes, models.items()):
        normal = model.distribution(image[:1])
        on = lambda logits: logits[..., 1, :] - logits[..., 0, :]  # one logit a pixel: K = 2
        factor = on(normal.factor[0])  # (R, S)
        covariance = factor.T @ factor + normal.diagonal[0].sum(0).diag()
        samples = model.sample(image[:1], 14, torch.Generator().manual_seed(0))
        show_map(row[0], on(normal.mean).T.expand(-1, 7), f"{name}\nmean logit")
        picture = show_map(row[1], covariance, "covariance")
        figure.colorbar(picture, ax=row[1], shrink=0.7)
        show_map(row[2], samples[:, 0].softmax(1)[:, 1].T, "14 samples, p(on)", vmin=0, vmax=1)
        show_map(row[3], label.T.repeat_interleave(3, 1), "the label maps", vmin=0, vmax=1)
    save_figure(figure, path)


if __name__ == "__main__":
    import data

    torch.set_num_threads(1)  # tensors of 21 pixels: a second thread would only wait
    line = data.load("toy1d")
    label = line.labels[0].long()  # (2, 21)
    image = line.images.expand(2, -1, -1)
    models = {}
    for name, rank in (("diagonal", 0), ("low-rank", 2)):
        models[name] = train_toy(image, label, rank)
        nats = models[name].log_likelihood(image, label, 200_000).mean()
        print(f"{name}: log-likelihood {nats:.3f}", flush=True)
    print(f"the best possible: diagonal 7 log 1/2 = {7 * math.log(0.5):.3f}, "
          f"low-rank log 1/2 = {math.log(0.5):.3f}")
    draw_toy(models, image, label, "ssn_toy.png")
    print("mean, covariance and samples: ssn_toy.png")
