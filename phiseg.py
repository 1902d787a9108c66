"""PHiSeg, hierarchical probabilistic segmentation (Baumgartner et al., MICCAI 2019,
arXiv:1906.04045).

One image, many plausible masks: a conditional variational autoencoder whose latents are maps, of 2
channels each, at L resolutions, so that large and small structures of a mask can vary separately.
Levels are numbered from the finest, 1, to the coarsest, L. The latent map z_l of a level is drawn
given the image x and the coarser map z_{l+1}:
        p(s | x) = int p(s | z_1 .. z_L) p(z_1 | z_2, x) ... p(z_L | x) dz_1 .. dz_L        (Eq. 1)
Given the coarser map, the values of z_l are independent, so only coarser latents can make distant
pixels vary together. The mask s is built like a Laplacian pyramid: every level adds a residual to
the logits of the coarser levels. Unlike in a Probabilistic U-Net, the image influences the mask
through the latents alone: no features of the image bypass them.

Three networks are trained together. The prior net p(z | x) encodes the image and predicts a normal
distribution of z_l at each of its L coarsest levels (Eq. 3). The posterior net q(z | s, x) has the
same form but also reads an annotator's mask, so it can find the latents that stand for this mask
(Eq. 4). The likelihood net p(s | z) turns latents into masks. The loss is
        -E_q[ log p(s | z_1 .. z_L) ] + alpha_L KL( q(z_L | s, x) || p(z_L | x) )
        + sum_{l < L} alpha_l E_q[ KL( q(z_l | z_{l+1}, s, x) || p(z_l | z_{l+1}, x) ) ]     (Eq. 2)
with weights alpha_l = 4^(l-1); if all were 1, Eq. 2 would be the negative ELBO. To Eq. 2 are added
the cross-entropies of the coarser levels' masks (deep supervision). Without them, prior and
posterior of a level may merely agree, and z_l say nothing about the mask. Samples differ because of
aleatoric uncertainty: the image alone does not determine the mask.

Differences from the paper
  1. In the text, z_1 has the resolution of the image. In the authors' code (hence in the published
     numbers) and here, the encoders have R = 7 resolutions, and the L = 5 coarsest have latents, so
     z_1 has a quarter of the image's side. With as many `channels` as `latent_levels`, it has the
     image's size, as in the text.
  2. alpha_l is 2^(l-1) in the text, but 4^(l-1) in the code and here (`kl_base`): in 2D, a coarser
     map has a quarter of the positions, hence a smaller KL; the weight makes up for it.
  3. The mean of z_L comes from a 3-wide convolution in the code; here every mean and std has a
     1-wide one.
  4. The nets predict log sigma, and it is bounded (common.bounded_log_std). In the code, sigma is
     the softplus of the prediction.
  5. Images of any size are padded by reflection. The posterior gets the one-hot mask minus 0.5, as
     in the code; padding and ignored pixels (255) are -0.5 in every class. 1D and 3D work as well.
  6. Training takes 500k steps and keeps the checkpoint of lowest validation GED, which is also what
     the code's test script takes; the paper trains for 48 hours and keeps that of lowest validation
     loss. Initial weights are PyTorch's defaults; the code draws He's normal ones.
  7. The paper's single prediction is the mean of samples (`dice_mean` of evaluate.py); `predict`
     sets every level to its prior mean.
  8. Batch norm has the code's epsilon, 1e-3, but PyTorch's momentum, 0.1 instead of 0.01, because
     slower averages lag behind the weights in runs of hundreds of steps (common.batch_norm).
  9. Up-sampling is bilinear as in PyTorch; TensorFlow 1 places the samples half a pixel elsewhere.
 10. LIDC is augmented as in the HPU-Net's paper (data.DATASETS), which is more than the authors do:
     they rotate half of the images by up to 10 degrees and magnify them.

    python phiseg.py                 # a small one, about a minute on two CPU cores
                                     # -> phiseg_levels.png (Fig. 1), phiseg_maps.png (Fig. 3)
    python train.py --model phiseg --data lidc --device cuda
    python train.py --model phiseg --data lidc --model-args latent_levels=1    # the ablation
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (CONV, center_crop, check_choice, concatenate, conv_block, cross_entropy,
                    hierarchy_noise, importance_log_ratio, one_hot, pad_to_multiple, predict_normal,
                    run_encoder, upsample, valid_label)


@dataclass(frozen=True)
class PHiSegConfig:
    """Defaults are the paper's LIDC model, PHiSeg 7_5 of its code."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    channels: tuple[int, ...] = (32, 64, 128, 192, 192, 192, 192)  # widths of R resolution levels
    latent_levels: int = 5  # L, at most R; 1 is the paper's ablation
    latent_channels: int = 2  # D, channels of every latent map
    convs: int = 3  # 3-wide convolutions per level of the encoders
    kl_base: float = 4.0  # alpha_l = kl_base^(l-1): 4 in the code, 2 in the text (3D: perhaps 8)


class PHiSeg(nn.Module):
    """Prior, posterior and likelihood net. Default: 17.81 M parameters, 11.83 M for sampling.

    `loss`, which is also `forward`, draws latents from the posterior and returns Eq. 2 plus deep
    supervision. `sample` draws latents from the prior and returns the logits of their masks.
    `predict` uses the prior's means, and `reconstruct` the posterior's for a given mask.
    Dicts {l: ...} have the paper's level numbers as keys and run from the coarsest, L, to 1. For an
    image of 128 x 128, z_5 .. z_1 have sides of 2, 4, 8, 16, 32, and their residuals 8 .. 128.
    """

    Config = PHiSegConfig
    TRAINING = dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=12, steps=500_000)
    # The text's KL weights: on small images, the code's leave the coarsest latents unused.
    QUICK_CONFIG = dict(channels=(16, 16, 32, 32, 32), latent_levels=4, convs=2, kl_base=2.0)
    QUICK_TRAINING = dict(lr=2e-3, lr_drops=((600, 0.3),), batch_size=8, steps=800)

    def __init__(self, config: PHiSegConfig = PHiSegConfig()):
        super().__init__()
        self.config = c = config
        check_choice("dims", c.dims, (1, 2, 3))
        if not 1 <= c.latent_levels <= len(c.channels):
            raise ValueError(f"latent_levels={c.latent_levels}: 1 to {len(c.channels)}, the number "
                             "of resolution levels (channels)")
        self.multiple = 2 ** (len(c.channels) - 1)
        self.prior = LatentNet(c, c.in_channels)
        self.posterior = LatentNet(c, c.in_channels + c.num_classes)
        self.likelihood = Likelihood(c)

    def encode(self, image: Tensor, label: Tensor | None = None) -> dict[int, Tensor]:
        """Features {l: (B, C_l, *S_l)} of the prior's or, given a label, posterior's encoder."""
        image = pad_to_multiple(image, self.multiple)
        if label is None:
            return self.prior.encode(image)
        hot = one_hot(label, self.config.num_classes, image.shape[2:])
        return self.posterior.encode(torch.cat([image, hot - 0.5], 1))

    def noise(self, image: Tensor, n: int, generator: torch.Generator | None = None):
        """Yield noise {l: (m * B, D, *S_l)} for all latents of n samples, m of them at a time."""
        c = self.config
        channels = {l: c.latent_channels for l in range(c.latent_levels, 0, -1)}
        width = 6 * c.channels[-c.latent_levels]  # about six maps at once in the likelihood net
        return hierarchy_noise(channels, self.multiple, image, n, generator, width)

    def level_logits(self, latents: dict[int, Tensor], size) -> dict[int, Tensor]:
        """Logits {l: (B, K, *size)} of every level's mask, the sum of the residuals of L .. l."""
        total, logits = 0.0, {}
        residuals = self.likelihood(latents)
        full = residuals[1].shape[2:]
        for l, residual in residuals.items():
            # in float32, because under autocast every sum would be rounded
            total = total + F.interpolate(residual.float(), full)  # nearest neighbour
            logits[l] = center_crop(total, size)
        return logits

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Eq. 2 plus deep supervision, in nats, summed over pixels and averaged over the batch:
        (loss, terms).

        image (B, C, *S), label int64 (B, *S), ignored where it is 255 or mask (B, *S) is False.
        Terms: `reconstruction`, the cross-entropy of the finest level; `supervision`, the sum of
        the coarser levels'; `kl_<l>`, the KL of z_l without its weight alpha_l; `kl`, their sum.
        """
        label, features = valid_label(label, mask), self.encode(image)
        noise = next(self.noise(image, 1))
        latents, q = self.posterior(self.encode(image, label), noise=noise)
        _, p = self.prior(features, latents=latents)  # at the posterior's z, as Eq. 2 asks
        kls = {l: q[l].kl(p[l]).mean() for l in latents}
        errors = {l: cross_entropy(logits, label).mean()
                  for l, logits in self.level_logits(latents, label.shape[1:]).items()}
        if self.training:
            noise = next(self.noise(image, 1))
            # At test time, this net reads samples of the prior, so batch norm's running statistics
            # must know them too.
            with torch.no_grad():
                self.likelihood(self.prior(features, noise=noise)[0])
        loss = sum(errors.values()) + sum(
            self.config.kl_base ** (l - 1) * kl for l, kl in kls.items())
        terms = dict(reconstruction=errors[1], supervision=sum(errors.values()) - errors[1],
                     kl=sum(kls.values()))
        terms.update({f"kl_{l}": kl for l, kl in kls.items()})
        return loss, {name: term.detach() for name, term in terms.items()}

    forward = loss

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n logit maps, (n, B, K, *S). The prior's encoder runs once for all of them."""
        features = self.encode(image)
        chunks = (self._finest(self.prior(features, noise=noise)[0], image)
                  for noise in self.noise(image, n, generator))
        return concatenate(chunks, n)

    def _finest(self, latents, image):
        """Logits (m, B, K, *S) of the finest masks for latents of m samples."""
        return self.level_logits(latents, image.shape[2:])[1].unflatten(0, (-1, len(image)))

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S), with every z_l at its prior mean given the coarser ones."""
        latents, _ = self.prior(self.encode(image))
        return self._finest(latents, image)[0].softmax(1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, *S) with every z_l at its posterior mean: how well z describes `label`."""
        latents, _ = self.posterior(self.encode(image, label))
        return self._finest(latents, image)[0]

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int, mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
        """Estimate of log p(s | x) in nats, (B,), on average a lower bound, by importance sampling
        with n sets of latents, half from the posterior, half from the prior:
        common.importance_log_ratio."""
        label, log_weights = valid_label(label, mask), []
        of_image, of_both = self.encode(image), self.encode(image, label)
        n_q, n_p = n - n // 2, n // 2
        for net, features, count in ((self.posterior, of_both, n_q), (self.prior, of_image, n_p)):
            for noise in self.noise(image, count, generator):
                latents, _ = net(features, noise=noise)
                _, q = self.posterior(of_both, latents=latents)
                _, p = self.prior(of_image, latents=latents)
                log_q = sum(q[l].log_prob(z) for l, z in latents.items())
                log_p = sum(p[l].log_prob(z) for l, z in latents.items())
                log_ratio = importance_log_ratio(log_q, log_p, n_q, n_p).view(-1, len(image))
                log_weights.append(log_ratio - cross_entropy(self._finest(latents, image), label))
        return torch.cat(log_weights).logsumexp(0) - math.log(n)


class LatentNet(nn.Module):
    """Prior or posterior net: an encoder, and a normal of z_l at each of its L coarsest levels."""

    def __init__(self, c: PHiSegConfig, in_channels: int):
        super().__init__()
        self.latent_levels, latents = c.latent_levels, c.latent_channels
        self.encoder = nn.ModuleList(
            conv_block(c.dims, before, after, convs=c.convs)
            for before, after in zip((in_channels, *c.channels), c.channels))
        self.up, self.join, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        features = c.channels[-c.latent_levels :]  # widths of the encoder at levels 1 .. L
        expanded = latents * c.channels[0]  # channels that z_{l+1} is expanded to
        for l in range(1, c.latent_levels):
            width = c.channels[l - 1]  # as the authors', although this level's encoder has another
            self.up[str(l)] = conv_block(c.dims, latents, expanded, convs=2)
            self.join[str(l)] = conv_block(c.dims, features[l - 1] + expanded, width, convs=2)
            self.heads[str(l)] = CONV[c.dims](width, 2 * latents, 1)  # mean and log std
        self.heads[str(c.latent_levels)] = CONV[c.dims](features[-1], 2 * latents, 1)

    def encode(self, x: Tensor) -> dict[int, Tensor]:
        """Image (B, C, *S), sides multiples of 2^(R-1) -> features {l: (B, C_l, *S_l)}."""
        levels = range(self.latent_levels, 0, -1)  # zip leaves out the levels finer than these
        return dict(zip(levels, reversed(run_encoder(self.encoder, x))))

    def forward(self, features: dict[int, Tensor], *, noise=None, latents=None):
        """From coarse to fine: the normal of z_L, then z_L, the normal of z_{L-1} given z_L, ...

        z_l is `latents[l]` if latents are given (say, those of the other net), else a sample made
        with noise[l], and without either the mean. Both dicts hold (m * B, D, *S_l).
        Returns ({l: z_l}, {l: normal of z_l}).
        """
        chosen, normals, given = {}, {}, latents or noise
        for l, x in features.items():
            if given:
                x = torch.cat([x] * (len(given[l]) // len(x)))  # (m * B, C_l, *S_l)
            if l < self.latent_levels:
                x = self.join[str(l)](torch.cat([x, self.up[str(l)](upsample(chosen[l + 1]))], 1))
            normals[l] = predict_normal(self.heads[str(l)], x)
            if latents:
                chosen[l] = latents[l]
            elif noise:
                chosen[l] = normals[l].mean + normals[l].std * noise[l]
            else:
                chosen[l] = normals[l].mean
        return chosen, normals


class Likelihood(nn.Module):
    """Latents {l: (B, D, *S_l)} -> every level's residual logits, 2^(R-L) times as large as z_l.

    `enter` and `finer` turn z_l into features of that size, `up` and `join` add those of the
    coarser level, and `out` makes the logits.
    """

    def __init__(self, c: PHiSegConfig):
        super().__init__()
        doublings = len(c.channels) - c.latent_levels
        self.enter, self.finer, self.up = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.join, self.out = nn.ModuleDict(), nn.ModuleDict()
        coarser_channels = 0
        for l in range(c.latent_levels, 0, -1):
            name, width = str(l), c.channels[l - 1]
            self.enter[name] = conv_block(c.dims, c.latent_channels, width, convs=2)
            self.finer[name] = nn.ModuleList(
                conv_block(c.dims, width, width) for _ in range(doublings))
            if coarser_channels:
                self.up[name] = conv_block(c.dims, coarser_channels, width)
                joined = c.channels[l - 1 + doublings]
                self.join[name] = conv_block(c.dims, 2 * width, joined, convs=2)
                width = joined
            self.out[name] = CONV[c.dims](width, c.num_classes, 1)
            coarser_channels = width

    def forward(self, latents: dict[int, Tensor]) -> dict[int, Tensor]:
        residuals, coarser = {}, None
        for l, z in latents.items():
            x = self.enter[str(l)](z)  # (B, C, *S_l)
            for block in self.finer[str(l)]:
                x = block(upsample(x))
            if coarser is not None:
                x = self.join[str(l)](torch.cat([x, self.up[str(l)](upsample(coarser))], 1))
            residuals[l], coarser = self.out[str(l)](x), x  # 2^(R-L) times as large as z
        return residuals


if __name__ == "__main__":
    import data
    import metrics
    from analysis.paper_figures import draw_cases, plot_levels, plot_maps
    from common import train_small

    train, test = data.load("shapes", ("train", "test"), size=32)
    torch.manual_seed(0)
    model = PHiSeg(PHiSegConfig(num_classes=4, channels=(16, 32, 32, 32), latent_levels=3, convs=2,
                                kl_base=2.0))
    batches = data.batches(train, 12, seed=0, augmentation=data.DATASETS["shapes"].augmentation)
    train_small(model, batches, steps=300, lr=2e-3, drop_at=210)

    probs = model.sample(test.images, 16, torch.Generator().manual_seed(0)).softmax(2)
    ged = metrics.ged(probs.argmax(2), test.labels, 4, test.weights)
    ncc = metrics.ncc(probs, test.labels, test.weights)
    print(f"GED {ged.mean():.3f}, NCC {ncc.mean():.3f} (16 samples, {len(test)} cases)")
    plot_levels(model, test.images[0], "phiseg_levels.png")
    plot_maps("phiseg_maps.png", draw_cases(model, test.subset(range(5)), 16))
