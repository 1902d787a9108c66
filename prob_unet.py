"""Probabilistic U-Net (Kohl et al., NeurIPS 2018, arXiv:1806.05034), its ablations, and the
Image2Image VAE that the paper compares it with.

One image, many plausible masks: a conditional variational autoencoder on top of a U-Net. A latent
vector z of a few numbers encodes which of the masks is meant. A prior net predicts from the image X
how likely each z is. z is repeated at every pixel and concatenated to the U-Net's last features,
and f_comb, three 1x1 convolutions, turns both into a logit map S. For sample i:
        z_i ~ P(. | X) = N(mu_prior(X), diag(sigma_prior(X)^2)),                       (Eq. 1)
        S_i = f_comb(f_U-Net(X), z_i).                                                 (Eq. 2)
U-Net and prior net run once for an image; a further sample only costs a pass of f_comb. All pixels
share one z, so a mask is coherent, but a few numbers have to encode all that annotators vary;
PHiSeg and the HPU-Net have maps of latents instead.

It is unknown which z belongs to which mask. In training, a posterior net therefore reads X and the
mask Y of one annotator, drawn anew whenever X is used, and predicts a normal Q(z | Y, X) of the z
for this mask (Eq. 3). The loss
        L = E_{z ~ Q(.|Y,X)}[ -log P_c(Y | S(X, z)) ] + beta KL( Q(z|Y,X) || P(z|X) )     (Eq. 4)
asks that such a z reproduces Y (P_c is the softmax of S in every pixel), and that prior and
posterior agree, so the prior learns to cover the z of all masks that annotators draw on an image.
For beta = 1 it is the negative ELBO. With a small beta, the posterior encodes more than the prior
can predict, so the prior's z fall where f_comb was not trained, and their masks are poor; with a
large one, z encodes little. Samples differ because of aleatoric uncertainty: the image alone does
not determine the mask.

The paper's ablations (App. D) and the Image2Image VAE (Sec. 3.2) change three things, which are the
last three fields of the config: what the prior is given (`prior=fixed`), what the posterior is
given (`posterior=mask`), and where z enters the U-Net (`z_enters=input`).

Differences from the paper
  1. f_comb is three 1x1 convolutions in all, as the text says; the authors' code has three and then
     the output layer (`comb_layers=4`). The first one, on concat(features, broadcast z), is
     computed as conv(features) + linear(z), so that all samples share conv(features); the two
     parts of its initial weights are orthogonal by themselves, not as one matrix.
  2. The nets predict log sigma, and it is bounded (common.bounded_log_std) so that the KL cannot
     overflow. The authors take exp of an unbounded number. The text calls sigma of Eq. 1 the
     variance; App. H.1 and the code mean the standard deviation, as here.
  3. The learning rate falls from 1e-4 to 1e-6 "in 5 steps" in the paper, which does not say
     when. Here it is multiplied by 10^-0.4 every 40k steps. For Cityscapes, models.RECIPES follows
     the paper (six levels, batch 16); the authors' code has seven levels and batch 10.
  4. Up-sampling is bilinear without `align_corners`, which the authors' code sets. Down-sampling is
     average pooling, which equals the paper's bilinear down-sampling for even sizes.
  5. Initial weights are orthogonal, as the paper says; the authors' code uses He's normal ones.
  6. Images of any size are padded by reflection. The posterior gets the one-hot mask minus 0.5, as
     in the authors' code; padding and ignored pixels (255) are -0.5 in every class.
  7. Besides the transformations that App. H lists, images are mirrored and, on LIDC, turned by
     quarter turns. The paper's crops of 128 pixels from 180 take `--image-size 128`.
  8. Weight decay acts on all parameters; in the code, on the weights of all layers but the last.
  9. 1D and 3D work as well (`dims`); the paper is 2D.

    python prob_unet.py              # a small one with a 2D latent, under a minute on a CPU
                                     # -> prob_unet_samples.png, prob_unet_latent.png
    python train.py --model prob_unet --data lidc --device cuda
    python train.py --model prob_unet --data lidc --model-args prior=fixed     # an ablation
    python train.py --model image2image_vae --data lidc --device cuda
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbones.unet import UNet
from common import (CONV, DiagonalNormal, check_choice, concatenate, conv_block, cross_entropy,
                    importance_log_ratio, init_orthogonal, one_hot, pad_to_multiple, predict_normal,
                    run_encoder, samples_at_once, standard_normal, valid_label)


@dataclass(frozen=True)
class ProbUNetConfig:
    """Defaults are the paper's LIDC model (App. H.1)."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # width of each resolution level
    convs: int = 3  # 3-wide convolutions per level
    latent_dim: int = 6  # N, the length of z
    comb_layers: int = 3  # 1-wide convolutions in f_comb; the last one gives the logits
    beta: float = 1.0  # weight of the KL; for 1 the loss is an upper bound of -log p(y | x)
    prior: str = "conditional"  # or "fixed": N(0, 1) for every image
    posterior: str = "image_and_mask"  # what the posterior net is given; or "mask"
    z_enters: str = "after"  # after the U-Net; or "input": beside the image, a U-Net per sample


class ProbUNet(nn.Module):
    """U-Net, prior net, posterior net and f_comb.

    `loss`, which is also `forward`, draws z from the posterior and returns Eq. 4. `sample` draws z
    from the prior and returns logit maps; `predict` uses the prior's mean. `decode` takes a z of
    your choice, and `reconstruct` the posterior's mean for a given mask.
    Default: 27.50 M parameters, 19.64 M of them for sampling.
    """

    Config = ProbUNetConfig
    TRAINING = dict(optimizer="adam", lr=1e-4, weight_decay=1e-5, batch_size=32, steps=240_000,
                    lr_drops=tuple((40_000 * k, 10 ** (-0.4 * k)) for k in range(1, 6)))
    # One convolution per level, because without a norm deeper networks learn slowly at first.
    QUICK_CONFIG = dict(channels=(16, 32, 64, 64), convs=1)
    QUICK_TRAINING = dict(lr=2e-3, lr_drops=((800, 0.5), (1150, 0.2), (1350, 0.05)), batch_size=4,
                          steps=1500)

    def __init__(self, config: ProbUNetConfig | None = None):
        super().__init__()
        self.config = c = config or self.Config()
        check_choice("dims", c.dims, (1, 2, 3))
        check_choice("prior", c.prior, ("conditional", "fixed"))
        check_choice("posterior", c.posterior, ("image_and_mask", "mask"))
        check_choice("z_enters", c.z_enters, ("after", "input"))
        if c.latent_dim < 1 or c.comb_layers < 2 or c.beta < 0:
            raise ValueError(f"latent_dim={c.latent_dim}, comb_layers={c.comb_layers}, beta="
                             f"{c.beta}: latent_dim is at least 1, comb_layers at least 2, beta at "
                             "least 0")
        at_input = c.z_enters == "input"
        self.unet = UNet(c.in_channels + (c.latent_dim if at_input else 0), c.channels, dims=c.dims,
                         convs=c.convs, norm="none")
        width = self.unet.out_channels
        self.prior_net = GaussianNet(c, c.in_channels) if c.prior == "conditional" else None
        image_channels = c.in_channels if c.posterior == "image_and_mask" else 0
        self.posterior_net = GaussianNet(c, image_channels + c.num_classes)

        # conv(concat(features, z)) = conv(features) + linear(z), and samples share the first term
        self.z_at_input, self.from_features = at_input, CONV[c.dims](width, width, 1)
        self.from_z = None if at_input else nn.Linear(c.latent_dim, width, bias=False)
        self.comb = nn.Sequential()
        for out in [width] * (c.comb_layers - 2) + [c.num_classes]:
            self.comb.extend([nn.ReLU(inplace=True), CONV[c.dims](width, out, 1)])
        init_orthogonal(self)

    def prior(self, image: Tensor) -> DiagonalNormal:
        """P(z | X) of Eq. 1, with mean and std (B, N)."""
        if self.prior_net is None:
            zeros = image.new_zeros(len(image), self.config.latent_dim)
            return DiagonalNormal(zeros, zeros)
        return self.prior_net(pad_to_multiple(image, self.unet.multiple))

    def posterior(self, image: Tensor, label: Tensor) -> DiagonalNormal:
        """Q(z | Y, X) of Eq. 3: where the masks `label` (B, *S) lie in latent space."""
        image = pad_to_multiple(image, self.unet.multiple)
        given = one_hot(label, self.config.num_classes, image.shape[2:]) - 0.5
        if self.config.posterior == "image_and_mask":
            given = torch.cat([image, given], 1)
        return self.posterior_net(given)

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Eq. 4 in nats, summed over pixels and averaged over the batch: (loss, terms).

        image (B, C, *S), label int64 (B, *S), ignored where it is 255 or mask (B, *S) is False.
        """
        label = valid_label(label, mask)
        prior, posterior = self.prior(image), self.posterior(image, label)
        logits = self._logits(self._shared(image), posterior.sample().unsqueeze(0))  # (1, B, ...)
        reconstruction = cross_entropy(logits, label).mean()
        kl = posterior.kl(prior).mean()
        terms = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        return reconstruction + self.config.beta * kl, terms

    forward = loss

    def _shared(self, image):
        """What all samples of an image share: U-Net features, or the image if z_enters="input"."""
        return image if self.z_at_input else self.from_features(self.unet(image))

    def _logits(self, shared, z):
        """Output of `_shared` (B, ., *S) and latents z (n, B, N) -> logits (n, B, K, *S)."""
        size, one_pixel = shared.shape[2:], [1] * (shared.dim() - 2)
        if self.z_at_input:
            z_map = z.view(*z.shape, *one_pixel).expand(*z.shape, *size)  # (n, B, N, *S)
            x = torch.cat([shared.expand(len(z), *shared.shape), z_map], 2).flatten(0, 1)
            x = self.from_features(self.unet(x))  # (n * B, width, *S)
        else:
            bias = self.from_z(z).unflatten(2, (-1, *one_pixel))  # (n, B, width, 1, 1)
            x = (shared + bias).flatten(0, 1)  # (n * B, width, *S)
        return self.comb(x).unflatten(0, z.shape[:2])

    def _chunks(self, shared, z):
        """Yield `_logits` of latents z (n, B, N), in chunks that bound the memory."""
        values = 4 * self.config.channels[0] * shared[:, 0].numel()  # f_comb holds about four maps
        for part in z.split(samples_at_once(values, shared.device)):
            yield self._logits(shared, part)

    @torch.no_grad()
    def decode(self, image: Tensor, z: Tensor) -> Tensor:
        """Eq. 2: logit maps (n, B, K, *S) for latents z (n, B, N) of your choice."""
        return concatenate(self._chunks(self._shared(image), z), len(z))

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n logit maps, (n, B, K, *S). U-Net and prior run once, if z enters after the U-Net."""
        return self.decode(image, draw(self.prior(image), n, generator))

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) for the mean of the prior, its most likely z."""
        return self.decode(image, self.prior(image).mean.unsqueeze(0))[0].softmax(1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, *S) for the posterior's mean: shows how well a z can describe `label`."""
        return self.decode(image, self.posterior(image, label).mean.unsqueeze(0))[0]

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int, mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
        """Estimate of log p(y | x) in nats, (B,), on average a lower bound, by importance sampling
        with n latents, half from the posterior and half from the prior: see
        common.importance_log_ratio."""
        label, shared = valid_label(label, mask), self._shared(image)
        prior, posterior = self.prior(image), self.posterior(image, label)
        n_q, n_p = n - n // 2, n // 2
        z = torch.cat([draw(posterior, n_q, generator), draw(prior, n_p, generator)])
        log_q = torch.stack([posterior.log_prob(sample) for sample in z])  # (n, B)
        log_p = torch.stack([prior.log_prob(sample) for sample in z])
        log_prob = torch.cat([-cross_entropy(logits, label) for logits in self._chunks(shared, z)])
        log_weights = log_prob + importance_log_ratio(log_q, log_p, n_q, n_p)
        return log_weights.logsumexp(0) - math.log(n)


@dataclass(frozen=True)
class Image2ImageVAEConfig(ProbUNetConfig):
    """The paper's baseline, with its best settings for LIDC."""

    latent_dim: int = 3
    beta: float = 10.0
    prior: str = "fixed"
    posterior: str = "mask"
    z_enters: str = "input"


class Image2ImageVAE(ProbUNet):
    """Image2Image VAE (Sec. 3.2): prior and posterior do not depend on the image, and z enters the
    U-Net beside the image. 19.64 M parameters."""

    Config = Image2ImageVAEConfig


class GaussianNet(nn.Module):
    """Prior or posterior net: a U-Net's encoder, global average pooling and a linear layer."""

    def __init__(self, c: ProbUNetConfig, in_channels: int):
        super().__init__()
        self.levels = nn.ModuleList(
            conv_block(c.dims, before, after, convs=c.convs, norm="none")
            for before, after in zip((in_channels, *c.channels), c.channels))
        self.head = nn.Linear(c.channels[-1], 2 * c.latent_dim)

    def forward(self, x):
        coarsest = run_encoder(self.levels, x)[-1]
        return predict_normal(self.head, coarsest.flatten(2).mean(2))  # (B, N)


def draw(normal: DiagonalNormal, n: int, generator: torch.Generator | None = None) -> Tensor:
    """n samples of each case's latents, (n, B, N)."""
    batch, latents = normal.mean.shape
    # `standard_normal` wants the batch as the first axis
    noise = standard_normal((batch, n, latents), normal.mean, generator).transpose(0, 1)
    return normal.mean + normal.std * noise


if __name__ == "__main__":
    import data
    import metrics
    from analysis.paper_figures import draw_cases, plot_latent_map
    from analysis.pictures import plot_overview
    from common import train_small

    train, test = data.load("shapes", ("train", "test"), size=32)
    torch.manual_seed(0)
    # A beta above 1 widens the posteriors, which after so few steps would not cover the prior.
    model = ProbUNet(ProbUNetConfig(num_classes=4, channels=(16, 32, 64), convs=1, latent_dim=2,
                                    beta=3.0))
    batches = data.batches(train, 8, seed=0, augmentation=data.DATASETS["shapes"].augmentation)
    train_small(model, batches, steps=1500, lr=2e-3, drop_at=900)

    test = test.subset(range(50))
    samples = model.sample(test.images, 16, torch.Generator().manual_seed(0)).argmax(2)
    print(f"GED of 16 samples: {metrics.ged(samples, test.labels, 4, test.weights).mean():.3f}")
    plot_overview("prob_unet_samples.png", draw_cases(model, test.subset(range(4)), 8))
    likeliest = test.weights[0].topk(6).indices
    plot_latent_map(model, test.images[0], test.labels[0, likeliest], "prob_unet_latent.png")
