"""VAE U-Net: latents on the skip connections (Bai and Bai 2023, "Hierarchical Uncertainty
Estimation for Medical Image Segmentation Networks", arXiv:2308.08465).

One image, many plausible masks: a conditional variational autoencoder whose latents sit on the skip
connections of a U-Net. On skip connection i, numbered from the finest, a 1-wide convolution turns
the encoder's features of the image x into the normal of one number at every position. A sample z_i
of these numbers is concatenated to the features before the decoder reads them:
    p(z_i | x) = N(mu_i(x), diag(sigma_i(x)^2)),    logits = decoder(features(x), z_0, z_1, ..).
In training, the same encoder and convolutions also read an annotator's mask y as if it were a grey
image, which gives q(z_i | y). (The paper writes q(z | X) for this p, and p(z | Y) for this q.) The
decoder learns from samples of q, and a KL makes p, which does not know y, similar to q. The loss,
in nats per pixel, is
        E_{z ~ q(z|y)}[ CE(y, logits) ] + sum_i KL( p(z_i|x) || q(z_i|y) ).
At test time z comes from p. The encoder runs once; a sample costs a pass of the decoder. This loss
is not the published one: with that of the paper's text or of its code, samples hardly vary.
Differences 1 and 2 say why, and how to set them.

The loss would be the negative ELBO if the KL were KL(q||p) (`elbo_kl=True`), which asks p to cover
the q of every annotator. For the q of two annotators, N(-2, 0.5^2) and N(2, 0.5^2), the p of lowest
mean KL(q||p) is N(0, 2.06^2), which covers both; that of lowest mean KL(p||q) is N(0, 0.5^2),
between them, so here q itself has to be wide where annotators differ. Covering all has a price: the
z_i are independent given x, so with a wide p, parts of a mask vary independently. On `shapes`, the
ELBO's KL lowers GED 16 from 0.33 to 0.27. On LIDC crops (seven test slices) it raises it from 0.22
to 0.52: many samples mark only parts of a nodule.

Samples differ because of aleatoric uncertainty: the image alone does not determine the mask. The
authors also leave DropPath on when they sample, which adds epistemic uncertainty, that of the
weights; for this, set `backbone=swin sample_drop_path=True`.

Differences from the paper and its code, BXYMartin/Python-Uncertainty_Aware_Vision_Transformer
  1. The code's loss for LIDC is
        E_{z ~ q(z|y)}[ 0.6 CE + 0.4 Dice ] + 1e-5 sum_i KL( p(z_i|x) || q(z_i|y) ),
     (1e-3 in an earlier version) with `dice_loss`, a KL that is a mean over positions, and no
     gradient from z to q: set `reparameterised=False kl_scale=mean ce_weight=0.6 dice_weight=0.4
     kl_weight=1e-5`. The convolutions that predict q then learn from the KL alone, which is lowest
     if z says nothing about y, so the decoder learns to ignore z. With gradients, a weight of 1e-5
     is too low: q encodes the whole mask, and p cannot follow (results/README.md has figures). For
     Synapse, models.RECIPES has the code's weights, 0.4, 0.5 and 0.1, but lets gradients flow.
  2. The text's loss draws z from the image's own distribution, and the mask has its own encoder:
        E_{z ~ p(z|x)}[ 0.4 CE + 0.6 Dice ] + 0.1 mean_i KL( p(z_i|x) || q(z_i|y) ) (Eq. 15, App. C)
     for which set `latents=image kl_scale=mean ce_weight=0.4 dice_weight=0.6 kl_weight=0.025` (our
     KL is a sum over levels, here four). This z is drawn without knowledge of y, so the CE is
     lowest if z has no effect on the mask.
  3. The paper has a GED of 0.289 on LIDC. The code's only script for it gives the network the test
     masks and samples from their q, so this may not be comparable with samples of p.
  4. CE and KL are in nats per pixel (`kl_scale=pixel`), so that both count as in an ELBO. In 2D,
     level i has 4^i times fewer positions than the finest one, so in a mean over positions each of
     its nats costs 4^i times as much: the cheapest latents are then those of the finest level,
     which can only vary single pixels.
  5. In training, the U-Net's decoder also sees a sample of p, without gradients, because its batch
     norm has to know the statistics of what it reads at test time. The authors' Swin has layer
     norm.
  6. Grey values of the mask: class numbers 0 .. K - 1 in the code; here k / (K - 1), and -1 where
     it is ignored. Image and mask pass the encoder in one batch, because batch norm has to know the
     statistics of both.
  7. The coarsest features, which are no skip connection, have no latents. The text gives them some;
     the code builds the layer but never uses it. With that layer, the latents add 3,560 parameters,
     the paper's 3.6 k; without it, 2,022. In Eq. 6, z_i depends on z_<i; in the code and here, the
     z_i are independent given x.
  8. The nets predict log sigma, and it is bounded (common.bounded_log_std).
  9. The default backbone is the other methods' U-Net. `backbone=swin` is the authors' (20.08 M
     parameters, depths 2, 2, 2, 1, DropPath 0.2), without pre-trained weights.
 10. The code's learning rate falls polynomially, as here; the text says "decay 1e-4". LIDC is
     augmented as in the HPU-Net's paper (data.DATASETS); the code does not augment it, resizes it
     to 224 pixels, and trains for 150 epochs, which are 60,000 steps if each image counts once.
 11. 1D and 3D work as well (`dims`), and any size: the image is padded by reflection.
 12. evaluate.judge_volumes says how scores of volumes (`--per-volume`) differ from the code's.

    python vae_unet.py               # a small one on synthetic organs, about a minute on a CPU
                                     # -> vae_unet_samples.png, vae_unet_latents.png
    python train.py --model vae_unet --data lidc --device cuda
    python train.py --model vae_unet --data synapse --device cuda     # on Swin, see models.RECIPES
    python evaluate.py runs/vae_unet-synapse-0 --per-volume           # the paper's Tables 2 and 3
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.swin_unet import SwinUNet, dropping_paths
from backbones.unet import UNet
from common import (CONV, IGNORE, DiagonalNormal, center_crop, check_choice, concatenate,
                    cross_entropy, importance_log_ratio, one_hot, pad_to_multiple, predict_normal,
                    process_mean, samples_at_once, train_small, valid_label)


@dataclass(frozen=True)
class VAEUNetConfig:
    """The published code's settings for LIDC, but for the loss (differences 1 and 4) and the
    backbone (9)."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    latents: str = "mask"  # training draws z from q(z|y) of the mask; "image": from p(z|x), Eq. 15
    reparameterised: bool = True  # gradients flow through z to its distribution
    latent_dim: int = 1  # latents per position of every skip connection
    ce_weight: float = 1.0
    dice_weight: float = 0.0
    kl_weight: float = 1.0
    elbo_kl: bool = False  # KL(q||p), as in the ELBO, instead of the authors' KL(p||q)
    kl_scale: str = "pixel"  # nats per pixel of the image; or "mean" over each level's positions
    backbone: str = "unet"  # or "swin" (2D)
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # U-Net: width of each level
    convs: int = 3  # U-Net: 3-wide convolutions per level
    width: int = 96  # Swin: channels of the finest level, doubled at every coarser one
    depths: tuple[int, ...] = (2, 2, 2, 1)  # Swin: blocks of each level, in the decoder too
    heads: tuple[int, ...] = (3, 6, 12, 24)  # Swin: attention heads of each level
    patch: int = 4  # Swin: side, in pixels, of a token of the finest level
    window: int = 7  # Swin: side, in tokens, of an attention window
    drop_path: float = 0.2  # Swin: largest probability of skipping a residual layer in training
    sample_drop_path: bool = False  # Swin: skip layers in `sample` too (epistemic)


class VAEUNet(nn.Module):
    """A U-Net (or Swin-Unet) with a `LatentSkip` on every skip connection.

    `loss`, which is also `forward`, draws the latents from the mask's q (with latents="image" from
    p) and returns the loss above.
    `sample` draws them from the image's p and returns logit maps; `predict` uses the means of p,
    `reconstruct` those of the q of a given mask.
    For an image of 128 x 128, z_0 .. z_3 of the default U-Net have sides of 128, 64, 32, 16 (on
    Swin, z_0 .. z_2 have 32, 16, 8).
    Default: 11.78 M parameters.
    """

    Config = VAEUNetConfig
    TRAINING = dict(optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, batch_size=24,
                    steps=60_000, poly_power=0.9)
    # Six levels: at 64 pixels, the coarsest latent map is 4 x 4, so one number can set the class or
    # size of a whole object. The loss is the one above, also where models.RECIPES has another.
    QUICK_CONFIG = dict(channels=(16, 32, 64, 64, 64, 64), convs=1, width=24, depths=(2, 2, 2),
                        heads=(2, 4, 8),
                        kl_scale="pixel", ce_weight=1.0, dice_weight=0.0, kl_weight=1.0)
    QUICK_TRAINING = dict(optimizer="adam", lr=5e-3, batch_size=8, steps=500)

    def __init__(self, config: VAEUNetConfig = VAEUNetConfig()):
        super().__init__()
        self.config = c = config
        check_choice("dims", c.dims, (1, 2, 3))
        check_choice("latents", c.latents, ("mask", "image"))
        check_choice("kl_scale", c.kl_scale, ("mean", "pixel"))
        check_choice("backbone", c.backbone, ("unet", "swin"))
        levels = len(c.channels if c.backbone == "unet" else c.depths)
        if c.latent_dim < 1 or levels < 2:
            raise ValueError(f"latent_dim={c.latent_dim}, {levels} resolution levels: latent_dim "
                             "is at least 1, and there are at least 2 levels")
        if c.backbone == "unet" and c.sample_drop_path:
            raise ValueError("sample_drop_path=True: only backbone='swin' has layers to skip")
        self.backbone = build_backbone(c, c.in_channels)
        self.skips = latent_skips(c, self.backbone.channels)
        self.head = CONV[c.dims](self.backbone.out_channels, c.num_classes, 1)
        if c.latents == "image":  # the mask has an encoder of its own
            self.mask_net = build_backbone(c, c.num_classes, decoder=False)
            self.mask_skips = latent_skips(c, self.backbone.channels)

    def encode(self, image: Tensor) -> tuple[list[Tensor], list[DiagonalNormal]]:
        """Of the padded image: the features (B, C_i, *S_i) of every level, and p(z_i | x), of shape
        (B, latent_dim, *S_i), of every skip connection, both fine to coarse."""
        features = self.backbone.encode(pad_to_multiple(image, self.backbone.multiple))
        return features, [skip(f) for skip, f in zip(self.skips, features)]

    def encode_both(self, image: Tensor, label: Tensor):
        """(features, [p(z_i | x)], [q(z_i | y)]): the results of `encode`, and the mask's."""
        padded = pad_to_multiple(image, self.backbone.multiple)
        if self.config.latents == "image":
            hot = one_hot(label, self.config.num_classes, padded.shape[2:])
            of_mask = self.mask_net.encode(hot)
            return *self.encode(image), [skip(f) for skip, f in zip(self.mask_skips, of_mask)]
        # one batch of both, so that batch norm's statistics are those of both
        both = self.backbone.encode(torch.cat([padded, self.label_image(label, padded.shape[2:])]))
        halves = [f.chunk(2) for f in both]  # of (2B, C_i, *S_i): the image's and the mask's
        features, of_mask = [half[0] for half in halves], [half[1] for half in halves]
        return (features, [skip(f) for skip, f in zip(self.skips, features)],
                [skip(f) for skip, f in zip(self.skips, of_mask)])

    def label_image(self, label: Tensor, size) -> Tensor:
        """Label map (B, *S) -> grey image (B, in_channels, *size): class k has the value k / (K-1);
        ignored pixels and padding have -1."""
        grey = (label / (self.config.num_classes - 1)).masked_fill(label == IGNORE, -1)
        padded = grey.new_full((len(label), 1, *size), -1)
        center_crop(padded, label.shape[1:]).copy_(grey.unsqueeze(1))
        return padded.expand(-1, self.config.in_channels, *size)

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """ce_weight CE + dice_weight Dice + kl_weight KL, with a CE that is a mean over pixels:
        (loss, terms).

        image (B, C, *S), label int64 (B, *S), ignored where it is 255 or mask (B, *S) is False.
        The term `kl` is the sum of `kl_0` (finest skip connection), `kl_1`, ...
        """
        c, label = self.config, valid_label(label, mask)
        features, of_image, of_mask = self.encode_both(image, label)
        # valid pixels of the batch; under torchrun, the mean over the processes
        pixels = process_mean((label != IGNORE).sum().float()).clamp(min=1)
        kls = []
        for p, q in zip(of_image, of_mask):
            positions = len(label) * p.mean[0, 0].numel()
            kl = q.kl(p) if c.elbo_kl else p.kl(q)
            kls.append(kl.sum() / (positions if c.kl_scale == "mean" else pixels))
        drawn_from = of_mask if c.latents == "mask" else of_image
        z = [normal.sample() for normal in drawn_from]
        if not c.reparameterised:
            z = [z_i.detach() for z_i in z]
        logits = self._logits(features, z, image.shape[2:])
        if self.training and c.latents == "mask" and c.backbone == "unet":
            of_p = [p.sample() for p in of_image]
            with torch.no_grad():  # batch norm's running statistics must know samples of p too
                self._logits(features, of_p, image.shape[2:])
        ce = cross_entropy(logits, label).sum() / pixels
        dice, kl = dice_loss(logits, label), sum(kls)
        loss = c.ce_weight * ce + c.dice_weight * dice + c.kl_weight * kl
        terms = {"cross_entropy": ce, "dice": dice, "kl": kl}
        terms.update({f"kl_{i}": kl for i, kl in enumerate(kls)})
        return loss, {name: term.detach() for name, term in terms.items()}

    forward = loss

    def _logits(self, features, z, size):
        """Features of every level and z of every skip connection -> logits (B, K, *size)."""
        *skips, coarsest = features
        joined = [torch.cat([f, z_i.to(f)], 1) for f, z_i in zip(skips, z)]
        return self.head(center_crop(self.backbone.decode([*joined, coarsest]), size))

    def _decode(self, features, draws, size):
        """Yield logits (m, B, K, *size) for a list of samples of all latents, in chunks."""
        # the decoder's finest level needs about four times the memory of the finest features
        chunk = samples_at_once(4 * features[0].numel(), features[0].device)
        for start in range(0, len(draws), chunk):
            part = draws[start : start + chunk]
            z = [torch.cat(level) for level in zip(*part)]  # (m * B, latent_dim, *S_i)
            repeated = [torch.cat([f] * len(part)) for f in features]
            yield self._logits(repeated, z, size).unflatten(0, (len(part), -1))

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The paper's sampling mode: n logit maps (n, B, K, *S). Each takes a pass of the decoder
        and, with `sample_drop_path`, of the encoder."""
        if self.config.sample_drop_path:
            with dropping_paths(self, generator):
                return torch.cat([self._sample(image, 1, generator) for _ in range(n)])
        return self._sample(image, n, generator)

    def _sample(self, image, n, generator):
        features, of_image = self.encode(image)
        draws = [[normal.sample(generator) for normal in of_image] for _ in range(n)]
        return concatenate(self._decode(features, draws, image.shape[2:]), n)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """The paper's prior mode: probabilities (B, K, *S) for the means of p(z_i | x)."""
        features, of_image = self.encode(image)
        means = [normal.mean for normal in of_image]
        return self._logits(features, means, image.shape[2:]).float().softmax(1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, *S) for the means of q(z_i | y): shows how well z describes `label`."""
        features, _, of_mask = self.encode_both(image, label)
        return self._logits(features, [normal.mean for normal in of_mask], image.shape[2:])

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int, mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
        """Estimate of log p(y | x) in nats, (B,), on average a lower bound, by importance sampling
        with n sets of latents, half from the mask's q, half from the image's p: see
        common.importance_log_ratio. With latents="image" all are from p."""
        label = valid_label(label, mask)
        n_q, n_p = n - n // 2, n // 2
        if self.config.latents == "image":
            n_q, n_p = 0, n
        features, of_image, of_mask = self.encode_both(image, label)
        draws = [[normal.sample(generator) for normal in of_mask] for _ in range(n_q)]
        draws += [[normal.sample(generator) for normal in of_image] for _ in range(n_p)]
        log_q = torch.stack([log_density(of_mask, z) for z in draws])  # (n, B)
        log_p = torch.stack([log_density(of_image, z) for z in draws])
        log_prob = torch.cat([-cross_entropy(logits, label)
                              for logits in self._decode(features, draws, image.shape[2:])])
        log_ratio = importance_log_ratio(log_q, log_p, n_q, n_p)
        return (log_prob + log_ratio).logsumexp(0) - math.log(n)


def log_density(normals: list[DiagonalNormal], z: list[Tensor]) -> Tensor:
    """Log density of one sample of the latents of all skip connections, (B,)."""
    return sum(normal.log_prob(z_i) for normal, z_i in zip(normals, z))


class LatentSkip(nn.Module):
    """All that the method adds to a network: features (B, channels, *S) -> DiagonalNormal of
    (B, latent_dim, *S). To use it in a U-Net of your own, give the decoder layer that reads the
    skip connection latent_dim more input channels, and write:

        p, q = self.latent(skip), self.latent(skip_of_mask)      # p.kl(q) for the loss
        skip = torch.cat([skip, q.sample()], 1)    # in training; later p.sample(), or p.mean
    """

    def __init__(self, channels: int, latent_dim: int = 1, dims: int = 2):
        super().__init__()
        self.conv = CONV[dims](channels, 2 * latent_dim, 1)

    def forward(self, features: Tensor) -> DiagonalNormal:
        return predict_normal(self.conv, features)


def latent_skips(c: VAEUNetConfig, channels) -> nn.ModuleList:
    """A LatentSkip for every level but the coarsest, which has no skip connection."""
    skips = nn.ModuleList(LatentSkip(width, c.latent_dim, c.dims) for width in channels[:-1])
    if c.backbone == "swin":  # as in its other layers; with larger weights the KL explodes at first
        for skip in skips:
            nn.init.trunc_normal_(skip.conv.weight, std=0.02)
            nn.init.zeros_(skip.conv.bias)
    return skips


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Soft Dice loss in 0..1: 1 - mean_k 2 sum(s y) / (sum s^2 + sum y^2), s = softmax(logits).

    logits (B, K, *S), label (B, *S). The sums are over the valid pixels of the batch, the mean over
    all classes, including the background and absent ones.
    """
    valid = (label != IGNORE).unsqueeze(1)
    hot = one_hot(label, logits.shape[1], label.shape[1:])
    prob = logits.float().softmax(1) * valid
    axes = [0, *range(2, prob.dim())]
    both = process_mean((prob * hot).sum(axes))
    size = process_mean(prob.square().sum(axes) + hot.sum(axes))
    return 1 - ((2 * both + 1e-5) / (size + 1e-5)).mean()


def build_backbone(c: VAEUNetConfig, in_channels: int, decoder: bool = True) -> nn.Module:
    """A network whose decoder expects `latent_dim` more channels on every skip connection.

    encode: image (B, C, *S), sides multiples of `multiple` -> features of every level, with
    `channels` channels, fine to coarse. decode: these and the latents -> (B, out_channels, *S).
    """
    if c.backbone == "swin":
        if c.dims != 2:
            raise ValueError(f"backbone='swin' with dims={c.dims}: dims is 2")
        return SwinUNet(in_channels, width=c.width, depths=c.depths, heads=c.heads, patch=c.patch,
                        window=c.window, joined=c.latent_dim, drop_path=c.drop_path,
                        decoder=decoder)
    return UNet(in_channels, c.channels, dims=c.dims, convs=c.convs, joined=c.latent_dim,
                decoder=decoder)


if __name__ == "__main__":
    import data
    import metrics
    from analysis.paper_figures import plot_latents, plot_vae_samples

    train, test = data.load("organs", ("train", "test"))
    torch.manual_seed(0)
    model = VAEUNet(VAEUNetConfig(num_classes=6, **VAEUNet.QUICK_CONFIG))
    batches = data.batches(train, 8, seed=0, augmentation=data.DATASETS["organs"].augmentation)
    train_small(model, batches, steps=300, lr=5e-3, drop_at=200)
    test = test.subset(range(0, len(test), 4))
    samples = model.sample(test.images, 16, torch.Generator().manual_seed(0)).argmax(2)
    print(f"GED of 16 samples: {metrics.ged(samples, test.labels, 6, test.weights).mean():.3f}")
    blurred = F.avg_pool2d(test.images[0], 9, 1, 4, count_include_pad=False)
    plot_vae_samples(model, {"image": test.images[0], "blurred": blurred}, "vae_unet_samples.png")
    plot_latents(model, test.images[0], "vae_unet_latents.png")
    print("samples and uncertainty: vae_unet_samples.png, latents: vae_unet_latents.png")
