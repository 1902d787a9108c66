"""Hierarchical Probabilistic U-Net, HPU-Net (Kohl et al. 2019, arXiv:1905.13077).

One image, many plausible masks, made from coarse to fine. The coarsest levels i = 0 .. L of a
U-Net's decoder (L = 3) each have a latent map z_i, one number per position. It is sampled given the
image X and the coarser latent maps z_<i, and concatenated to the features that predicted it:
        z_i ~ N(mu_i(z_<i, X), sigma_i(z_<i, X)^2) =: p(z_i | z_<i, X).                      (Eq. 1)
A sample S(X, z) therefore costs a pass of the decoder. Given the coarser maps, the values of z_i
are independent, so only coarse latents can make distant pixels vary together: they learn to decide
about whole objects, fine ones about outlines.

It is unknown which z belongs to an annotator's mask Y. In training, a posterior net q of the same
form therefore reads Y as well (Eq. 3), and its samples of z are given to the U-Net. With the
negative ELBO as the loss (Eq. 5), the authors found that the prior converges poorly. They use GECO
(Rezende and Viola 2018):
        lambda (E_q[ -log P_c(Y | S(X, z)) ] - kappa)
            + sum_i E_q[ KL( q(z_i | z_<i, X, Y) || p(z_i | z_<i, X) ) ],                    (Eq. 6)
where P_c is the softmax in every pixel. lambda is a learned Lagrange multiplier: it rises until the
cross-entropy has fallen to its target kappa, and falls after that, so that the KL gets more weight.
Choose kappa for your data: if it is too low to be reached, lambda keeps rising and the KL hardly
counts. As most pixels are easy, the cross-entropy is summed over 2 % of the batch's pixels only,
sampled in proportion to their loss; its target is kappa nats times their number. Samples differ
because of aleatoric uncertainty: the image alone does not determine the mask.

If every object of the training masks has a random class number, the model segments instances:
pixels of one object change together from sample to sample (analysis/instances.py has a recipe).
Separately, with `--data-args hide=50` it is given the labels around a hidden region, and completes
them there.

Differences from the paper
  1. App. D says that lambda keeps rising if kappa is too high; it must mean too low. The term
     `constraint` then never falls below 0, and train.py says so. 0.05 is the kappa of LIDC;
     models.RECIPES has the paper's other values.
  2. For instances, the demo below, `--quick` and the recipe for `cells` use Eq. 5 with a large beta
     instead of Eq. 6, as analysis/instances.py explains; the recipe for `em` is the paper's.
  3. The moving average in the loss is that of the whole constraint; in the code it is that of the
     reconstruction. They differ only where pixels are ignored.
  4. log sigma is bounded (common.bounded_log_std).
  5. The paper does not name its optimiser; here it is Adam, as in the Probabilistic U-Net. It gives
     the first and last learning rate and "in 4 steps"; here the rate is multiplied by 0.05^(1/4)
     every 48k steps.
  6. App. D.1 speaks of 8 latent scales on LIDC; Sec. 2, Table 2 and the code have 4, as here.
  7. Weight decay adds 1e-5 w to the gradient of w; the authors' penalty, 1e-5 |w|^2, adds twice as
     much. Here it acts on lambda as well, whose own gradient is far larger.
  8. The checkpoint of lowest validation GED is kept; the paper does not say which one it keeps.
  9. Images of any size are padded by reflection. In the posterior's one-hot mask, the padding and
     ignored pixels (255) are zero in every class. 1D and 3D work as well (`dims`).

    python hpunet.py                 # a small one on synthetic cells, a minute on two CPU cores
                                     # -> hpunet_scales.png (Fig. 3), hpunet_instances.png (Fig. 4)
    python train.py --model hpunet --data lidc --device cuda
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.res_blocks import UpBlock, res_blocks
from common import (CONV, IGNORE, center_crop, check_choice, concatenate, cross_entropy,
                    hierarchy_noise, importance_log_ratio, init_orthogonal, one_hot,
                    pad_to_multiple, predict_normal, process_mean, run_encoder, valid_label)


@dataclass(frozen=True)
class HPUNetConfig:
    """Defaults are the paper's LIDC model."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    channels: tuple[int, ...] = (24, 48, 96, 192, 192, 192, 192, 192)  # width of each level
    blocks: int = 3  # residual blocks per level, in encoder and decoder
    convs: int = 3  # 3-wide convolutions per block, at half its width
    latents: tuple[int, ...] = (1, 1, 1, 1)  # channels of z_0, z_1 .., coarse to fine; 0: no z_i
    objective: str = "geco"  # Eq. 6; or "elbo", Eq. 5, with top_k=1: reconstruction + beta KL
    kappa: float = 0.05  # GECO's target, nats per kept pixel; depends on the data (here LIDC)
    beta: float = 1.0  # weight of the KL in Eq. 5 ("elbo")
    top_k: float = 0.02  # share of the batch's pixels that the loss keeps; 1: all


class HPUNet(nn.Module):
    """Hierarchical Probabilistic U-Net. Default: 20.58 M parameters, 11.18 M of them for sampling.

    `loss`, which is also `forward`, draws latents from the posterior and returns Eq. 6 or 5.
    `sample` draws latents from the prior and returns logit maps; `predict` uses the prior's means,
    `reconstruct` the posterior's for a given mask. Keys of dicts {i: ...} number the latent maps
    as in the paper: 0 is the coarsest. For an image of 128 x 128, z_0 .. z_3 have sides of 1, 2, 4,
    8.
    """

    Config = HPUNetConfig
    TRAINING = dict(optimizer="adam", lr=1e-4, weight_decay=1e-5, batch_size=32, steps=240_000,
                    lr_drops=tuple((48_000 * k, 0.05 ** (k / 4)) for k in range(1, 5)))
    # 2 % of a small image are too few pixels. A small net reaches this kappa early; with a lower
    # one, lambda would keep rising, the KL would hardly count, and z would encode even what X can
    # predict.
    QUICK_CONFIG = dict(channels=(16, 32, 48, 48, 48, 48, 48), blocks=1, convs=2, top_k=0.1,
                        kappa=0.35)
    # for sets with instances: z_0 has a position for every 16 x 16 pixels, see analysis/instances
    QUICK_INSTANCES = dict(channels=(16, 32, 48, 48, 48), latents=(8, 4), objective="elbo", top_k=1,
                           beta=30.0)
    QUICK_TRAINING = dict(lr=1.5e-3, lr_drops=((900, 0.3),), batch_size=8, steps=1200)

    def __init__(self, config: HPUNetConfig = HPUNetConfig()):
        super().__init__()
        self.config = c = config
        check_choice("dims", c.dims, (1, 2, 3))
        check_choice("objective", c.objective, ("geco", "elbo"))
        if not (0 < len(c.latents) < len(c.channels) and min(c.latents) >= 0 and c.latents[-1] > 0):
            raise ValueError(f"latents={c.latents}: 1 to {len(c.channels) - 1} numbers (fewer than "
                             "channels) from 0 up, the last one at least 1")
        if not 0 < c.top_k <= 1 or (c.objective == "elbo" and c.top_k != 1):
            raise ValueError(f"objective={c.objective!r} with top_k={c.top_k}: Eq. 5 needs "
                             "top_k=1, Eq. 6 one above 0 and at most 1")
        if min(c.blocks, c.convs) < 1:
            raise ValueError(f"blocks={c.blocks}, convs={c.convs}: both are at least 1")
        self.multiple = 2 ** (len(c.channels) - 1)
        self.unet = LatentUNet(c, c.in_channels, len(c.channels))
        self.out = CONV[c.dims](c.channels[0], c.num_classes, 1)
        self.posterior = LatentUNet(c, c.in_channels + c.num_classes, len(c.latents))
        init_orthogonal(self)
        if c.objective == "geco":  # lambda = softplus(rho)^2 is 1 at first
            self.rho = nn.Parameter(torch.tensor(math.log(math.e - 1)))
            self.register_buffer("constraint", torch.zeros(()))  # the constraint's moving average
            self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))

    def encode(self, image: Tensor, label: Tensor | None = None) -> list:
        """Everything computed before the first latent map, which all samples share: of the U-Net
        or, given a label, of the posterior net."""
        image = pad_to_multiple(image, self.multiple)
        if label is None:
            return self.unet.encode(image)
        hot = one_hot(label, self.config.num_classes, image.shape[2:])
        return self.posterior.encode(torch.cat([image, hot], 1))

    def noise(self, image: Tensor, n: int, generator: torch.Generator | None = None):
        """Yields noise {i: (m * B, D_i, *S_i)} of all latents for m of the n samples at a time."""
        channels = dict(enumerate(self.config.latents))
        width = 4 * self.config.channels[0]  # what the finest level's blocks hold at a time
        return hierarchy_noise(channels, self.multiple, image, n, generator, width)

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Eq. 6 or 5: (loss in nats, summed over pixels and averaged over the batch; its terms).

        image (B, C, *S), label int64 (B, *S), ignored where it is 255 or mask (B, *S) is False.
        Terms: `reconstruction`, the kept pixels' cross-entropy, and `reconstruction_per_pixel`, its
        mean over them; `kl_<i>`, the KL of z_i, and `kl`, their sum; for GECO `lambda` and
        `constraint`, reconstruction - kappa * kept pixels (in training, its moving average).
        """
        c, label = self.config, valid_label(label, mask)
        noise = next(self.noise(image, 1))
        latents, q, _ = self.posterior(self.encode(image, label), noise=noise)
        _, p, x = self.unet(self.encode(image), latents=latents)
        kls = {f"kl_{i}": q[i].kl(p[i]).mean() for i in latents}
        kl = sum(kls.values())

        error = F.cross_entropy(self._logits(x, image)[0], label, ignore_index=IGNORE,
                                reduction="none")  # (B, *S)
        kept = hard_pixels(error.detach(), c.top_k, together=self.training) & (label != IGNORE)
        reconstruction = (error * kept).sum() / len(label)  # nats per case
        count = kept.sum() / len(label)  # kept pixels per case
        both = torch.stack([reconstruction.detach(), count])
        # under torchrun, over the pixels of all processes
        total, pixels = process_mean(both) if self.training else both
        terms = dict(reconstruction=reconstruction, kl=kl, **kls,
                     reconstruction_per_pixel=total / pixels.clamp(min=1e-6))
        if c.objective == "elbo":
            loss = reconstruction + c.beta * kl
        else:
            constraint = self._averaged(reconstruction - c.kappa * count)
            weight = F.softplus(self.rho).square()
            loss = weight.detach() * constraint + kl
            # This adds 0. Its gradient with respect to rho is that of -lambda * constraint, so
            # descending the loss raises lambda while the constraint is above 0. (The authors scale
            # this gradient by 0.01. With Adam, which divides by its size, that changes nothing.)
            loss = loss + (weight.detach() - weight) * constraint.detach()
            terms.update({"constraint": constraint, "lambda": weight})
        return loss, {name: term.detach() for name, term in terms.items()}

    forward = loss

    def _averaged(self, constraint):
        """In training, the moving average of the constraint, with the gradient of this batch's."""
        if not self.training:
            return constraint
        now = process_mean(constraint).detach()
        # 0.99 of the old average and 0.01 of this batch's constraint
        average = torch.where(self.steps_seen == 0, now, now.lerp(self.constraint, 0.99))
        self.constraint.copy_(average)
        self.steps_seen += 1
        return constraint + (average - constraint).detach()

    def _logits(self, x, image):
        """The U-Net's finest features (m * B, C, *padded S) -> logits (m, B, K, *S)."""
        return center_crop(self.out(x), image.shape[2:]).float().unflatten(0, (-1, len(image)))

    def advice(self, log: list[dict]) -> str | None:
        """What a log of training, dicts of the terms above, says of `kappa`, if it was too low or
        too high."""
        entries = [entry for entry in log if "constraint" in entry]
        if not entries:
            return None
        kappa = self.config.kappa
        if min(entry["constraint"] for entry in entries) >= 0:
            return (f"the reconstruction never reached its target kappa={kappa}: raise it with "
                    "--model-args kappa=...")
        found = entries[-1]["reconstruction_per_pixel"]
        if found < kappa / 2 and entries[-1]["lambda"] < 0.5:
            return (f"the target kappa={kappa} was easily met, by a reconstruction of {found:.2g}: "
                    "with a lower --model-args kappa=..., the latents say more, and samples vary "
                    "more")
        return None

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None, *,
               scales: list[int] | None = None) -> Tensor:
        """n logit maps, (n, B, K, *S); the encoder runs once whatever n is.

        scales: numbers of the latent maps that are drawn, 0 the most global; the others are kept at
            their mean given the coarser ones (Fig. 3). By default all are drawn.
        """
        levels = [i for i, width in enumerate(self.config.latents) if width]
        scales = levels if scales is None else scales
        for i in scales:
            check_choice("scales", i, levels)
        shared = self.encode(image)

        def decode(noise):
            for i in levels:
                if i not in scales:
                    noise[i] = torch.zeros_like(noise[i])  # so that z_i is the mean
            _, _, x = self.unet(shared, noise=noise)
            return self._logits(x, image)

        return concatenate(map(decode, self.noise(image, n, generator)), n)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) with every level at its prior mean given the coarser ones."""
        _, _, x = self.unet(self.encode(image))
        return self._logits(x, image)[0].softmax(1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, *S) at the posterior means: how well z describes `label` (IoU_rec)."""
        latents, _, _ = self.posterior(self.encode(image, label))
        _, _, x = self.unet(self.encode(image), latents=latents)
        return self._logits(x, image)[0]

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int, mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
        """Estimate of log p(Y | X) in nats, (B,), over all pixels, on average a lower bound, by
        importance sampling with n sets of latents, half from the posterior, half from the prior:
        common.importance_log_ratio."""
        label, log_weights = valid_label(label, mask), []
        shared_p, shared_q = self.encode(image), self.encode(image, label)
        n_q, n_p = n - n // 2, n // 2
        for from_q, count in ((True, n_q), (False, n_p)):
            for noise in self.noise(image, count, generator):
                if from_q:
                    latents, q, _ = self.posterior(shared_q, noise=noise)
                    _, p, x = self.unet(shared_p, latents=latents)
                else:
                    latents, p, x = self.unet(shared_p, noise=noise)
                    _, q, _ = self.posterior(shared_q, latents=latents)
                log_q = sum(q[i].log_prob(z) for i, z in latents.items())
                log_p = sum(p[i].log_prob(z) for i, z in latents.items())
                log_ratio = importance_log_ratio(log_q, log_p, n_q, n_p).view(-1, len(image))
                log_weights.append(log_ratio - cross_entropy(self._logits(x, image), label))
        return torch.cat(log_weights).logsumexp(0) - math.log(n)


class LatentUNet(nn.Module):
    """A U-Net with latent maps at the coarsest levels of its decoder. It is either the whole
    network, which contains the prior, or the posterior net, whose decoder ends after its last
    latent map. `levels` is the number of levels of the decoder."""

    def __init__(self, c: HPUNetConfig, in_channels: int, levels: int):
        super().__init__()
        self.encoder = nn.ModuleList(
            res_blocks(c.dims, before, after, c.blocks, c.convs)
            for before, after in zip((in_channels, *c.channels), c.channels))
        self.heads, self.joins, self.decoder = nn.ModuleDict(), nn.ModuleList(), nn.ModuleList()
        coarser_channels = 0
        for i, width in enumerate(c.channels[::-1][:levels]):
            if i > 0:
                self.joins.append(UpBlock(c.dims, coarser_channels + width, width, c.convs))
                self.decoder.append(res_blocks(c.dims, width, width, c.blocks - 1, c.convs))
            coarser_channels = width
            if i < len(c.latents) and c.latents[i]:
                self.heads[str(i)] = CONV[c.dims](width, 2 * c.latents[i], 1)  # mean and log std
                coarser_channels += c.latents[i]

    def encode(self, x: Tensor) -> list:
        """Image (B, C, *S), sides multiples of 2^(encoder levels - 1) -> what all samples share:
        the coarsest features, then `UpBlock.encode` of each finer decoder level's skip connection.
        """
        *skips, x = run_encoder(self.encoder, x)
        return [x, *(join.encode(skip) for join, skip in zip(self.joins, reversed(skips)))]

    def forward(self, shared: list, *, noise=None, latents=None):
        """A pass of the decoder for m samples of B cases: ({i: z_i}, {i: its normal}, the finest
        features).

        z_i is latents[i] if the other net's latents are given, is sampled with noise[i] if noise is
        given, and is the mean of its normal otherwise. Both are {i: (m * B, D_i, *S_i)}.
        """
        chosen, normals, x, given = {}, {}, shared[0], latents or noise
        if given:
            coarsest = next(iter(given.values()))  # (m * B, ...)
            x = torch.cat([x] * (len(coarsest) // len(x)))  # (m * B, ...)
        for i in range(len(shared)):
            if i > 0:
                x = self.decoder[i - 1](self.joins[i - 1](x, shared[i]))
            if str(i) in self.heads:
                normals[i] = predict_normal(self.heads[str(i)], x)
                if latents:
                    chosen[i] = latents[i]
                elif noise:
                    chosen[i] = normals[i].mean + normals[i].std * noise[i]
                else:
                    chosen[i] = normals[i].mean
                x = torch.cat([x, chosen[i].to(x.dtype)], 1)
        return chosen, normals, x


def hard_pixels(error: Tensor, share: float, together: bool = False) -> Tensor:
    """Stochastic top-k: which pixels of the batch the loss keeps, a `share` of them, (B, *S) bool.

    Keeping the largest log error + Gumbel noise draws pixels without replacement, in proportion to
    error (B, *S) >= 0. The exponential of Gumbel noise is 1 / E with E ~ Exp(1), so error / E has
    the same order. together: the batch is that of all processes.
    """
    if share == 1:
        return torch.ones_like(error, dtype=torch.bool)
    whole, rank = error.contiguous(), 0
    if together and dist.is_initialized():
        parts = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, whole)
        whole, rank = torch.cat(parts), dist.get_rank()
    # E = 0 would give 0 / 0, which is NaN, and topk takes NaN for the largest value
    score = (whole / torch.empty_like(whole).exponential_().clamp_(min=1e-20)).flatten()
    top = score.topk(max(1, int(share * len(score))), sorted=False).indices
    kept = torch.zeros_like(score, dtype=torch.bool).index_fill_(0, top, True).view(whole.shape)
    return kept[rank * len(error) : (rank + 1) * len(error)]


if __name__ == "__main__":
    import data
    from analysis.instances import find_instances, plot_instances, rand_error
    from analysis.paper_figures import plot_scales
    from common import train_small

    train, test = data.load("cells", ("train", "test"), size=32, colours=5)
    torch.manual_seed(0)
    model = HPUNet(HPUNetConfig(num_classes=6, channels=(16, 32, 48, 48), blocks=1, convs=2,
                                latents=(8, 4), objective="elbo", top_k=1, beta=10.0))
    batches = data.batches(train, 8, seed=0, augmentation=data.DATASETS["cells"].augmentation)
    train_small(model, batches, steps=800, lr=3e-3, drop_at=500)

    test = test.subset(range(20))
    samples = model.sample(test.images, 32, torch.Generator().manual_seed(0)).argmax(2)
    found = find_instances(samples, alpha=24)
    error = rand_error(found, test.instances.long())
    print(f"instances clustered from 32 samples: Rand error {error.mean():.3f}")
    again = model.reconstruct(test.images, test.labels[:, 0].long()).argmax(1)
    plot_instances("hpunet_instances.png", [
        dict(name=test.names[i], image=test.images[i], truth=test.instances[i], found=found[i],
             again=again[i], samples=samples[:, i]) for i in range(4)])
    plot_scales(model, test.images[0], "hpunet_scales.png")
