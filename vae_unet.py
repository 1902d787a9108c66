"""VAE U-Net: latents on the skip connections (Bai and Bai 2023, "Hierarchical Uncertainty
Estimation for Medical Image Segmentation Networks", arXiv:2308.08465).

On every skip connection i a 1-wide convolution turns the features into a normal for each position,
and a draw z_i is concatenated to the features before the decoder reads them:
        p(z_i | x) = N(mu_i(x), diag(sigma_i(x)^2)),   y = decoder(features(x), z_0 .. z_{L-1}).
In training the same encoder and convolutions also read the mask y, as a grey image: q(z_i | y). The
decoder learns from draws of q, and a KL ties the image's latents to them (the published code):
        L = E_{z ~ q(z|y)}[ 0.6 CE(y, z) + 0.4 Dice(y, z) ] + 1e-5 sum_i KL( p(z_i|x) || q(z_i|y) ).
At test time z comes from p: a conditional VAE with a latent map on every skip connection. A sample
costs a pass of the decoder; the encoder runs once for all. The paper's text differs:
        L = E_{z ~ p(z|x)}[ 0.4 CE + 0.6 Dice ] + 0.1 mean_i KL( p(z_i|x) || q(z_i|y) ),   (Eq. 15)
with an encoder of its own for the mask (`latents=image`). There nothing asks for a sample for each
annotator: z is drawn without knowledge of y, CE is lowest where z changes nothing, and samples
hardly vary. (The text writes q(z|X) for our p and p(z|Y) for our q.)

Which uncertainty: aleatoric. The authors sample with DropPath switched on as in training, so theirs
holds epistemic uncertainty of the weights as well: `backbone=swin sample_drop_path=True`.

Differences (where text and code, BXYMartin/Python-Uncertainty_Aware_Vision_Transformer, differ, the
code is followed)
  1. Weights of CE, Dice, KL: text 0.4, 0.6, 0.1; code for LIDC 0.6, 0.4, 1e-5 (first 1e-3), for
     Synapse 0.4, 0.5, 0.1. Its KL is a mean over positions, summed over levels; its Dice counts
     classes that are absent from the batch. Learning rate: text "decay 1e-4", code polynomial.
  2. The code draws z without a gradient to q (`reparameterised=False`), so q learns from the KL
     alone, which is lowest if z says nothing about y. Here gradients flow: GED on small `shapes`
     after 400 steps at KL weight 0.1 is 0.48 with them, 0.77 without, 0.66 with latents=image.
  3. `kl_scale=pixel`, not in the paper, is for weights 1, 0 and 1: CE and KL both in nats a pixel,
     an ELBO but for the KL's direction. With means, a nat in a coarse latent costs 4^i times one of
     the finest level, where draws are mere noise. `--quick` trains like this, with Adam.
  4. The mask as an image: class numbers 0 .. K - 1 in the code, here k / (K - 1), and -1 where it
     is ignored. Both pass the encoder in one batch, for batch norm must know the moments of both.
  5. No latents on the coarsest features, which are no skip connection; the text counts them, the
     code makes their head and never uses it. With it the latents have the paper's 3.6 k parameters
     (3,560), without 2,022. Eq. 6 lets z_i depend on z_<i; in the code they are independent.
  6. The nets predict log sigma, and it is bounded (common.bounded_log_std).
  7. The default backbone is the U-Net of the other methods; `backbone=swin` is the authors', with
     20.08 M parameters, depths 2, 2, 2, 1 and DropPath 0.2, but no pre-trained weights. From random
     weights, the latents of short runs collapse unless the KL weighs little: on `organs` of 48 px,
     500 steps with weights 1, 0 and 0.3 in nats a pixel give samples of diversity .02 and a GED of
     .27, with 0.1 a diversity of .24 (annotators: .28) and a GED of .62.
  8. 1D and 3D work as well (`dims`), and any size: the image is padded by reflection.
  9. Judging volumes (`evaluate.py --per-volume`), the code gives a class that the annotation or the
     prediction lacks a Dice of 1 and a distance of 0. Here it counts only where it is annotated; if
     it is missed there, its Dice is 0 and it has no distance. Distances are in voxels, in the code
     too, although the paper says mm.

    python vae_unet.py               # a small one on synthetic organs, about a minute on a CPU
                                     # -> vae_unet_samples.png, vae_unet_latents.png
    python train.py --model vae_unet --data lidc --device cuda
    python train.py --model vae_unet --data synapse --device cuda     # on Swin, see train.RECIPES
    python evaluate.py runs/vae_unet-synapse-0 --per-volume           # the paper's Tables 2 and 3
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.swin_unet import SwinUNet, dropping_paths
from common import (CONV, IGNORE, DiagonalNormal, UNet, center_crop, check_choice, concatenate,
                    conv_block, cross_entropy, importance_log_ratio, one_hot, pad_to_multiple,
                    predict_normal, samples_at_once, train_small, valid_label)


@dataclass(frozen=True)
class VAEUNetConfig:
    """Latents and loss as in the published code for LIDC, on the U-Net of the other methods."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    latents: str = "mask"  # drawn in training from the mask's distribution; "image": Eq. 15
    reparameterised: bool = True  # gradients reach the distribution that z is drawn from
    latent_dim: int = 1  # latents at each position of each skip connection
    ce_weight: float = 0.6
    dice_weight: float = 0.4
    kl_weight: float = 1e-5
    kl_scale: str = "mean"  # over each level's positions; or "pixel": in nats a pixel of the image
    backbone: str = "unet"  # or "swin" (2D)
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # U-Net: a resolution level each
    convs: int = 3  # U-Net: 3-wide convolutions a level
    width: int = 96  # Swin: channels of the finest level, doubled at every coarser one
    depths: tuple[int, ...] = (2, 2, 2, 1)  # Swin: blocks a level, in the decoder too
    heads: tuple[int, ...] = (3, 6, 12, 24)  # Swin: of attention, a level each
    patch: int = 4  # Swin: pixels a side that become one token of the finest level
    window: int = 7  # Swin: tokens a side that attend to one another
    drop_path: float = 0.2  # Swin: highest probability that training skips a residual layer
    sample_drop_path: bool = False  # Swin: skip layers in `sample` too, which is epistemic


class VAEUNet(nn.Module):
    """VAE U-Net. Default: 11.78 M parameters."""

    Config = VAEUNetConfig
    TRAINING = dict(optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, batch_size=24,
                    steps=60_000, poly_power=0.9)
    # see "Differences" 3; latents down to maps of 4 x 4 pick a whole object's class or size
    QUICK_CONFIG = dict(channels=(16, 32, 64, 64, 64, 64), convs=1, width=24, depths=(2, 2, 2),
                        heads=(2, 4, 8), kl_scale="pixel", ce_weight=1.0, dice_weight=0.0,
                        kl_weight=1.0)
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
        """Features (B, C_i, *S_i) of every level, and the image's distribution of the latents
        (B, latent_dim, *S_i) of every skip connection, fine to coarse, of the padded image."""
        features = self.backbone.encode(pad_to_multiple(image, self.backbone.multiple))
        return features, [skip(f) for skip, f in zip(self.skips, features)]

    def encode_both(self, image: Tensor, label: Tensor):
        """`encode`, and the mask's distribution of the latents of every skip connection."""
        padded = pad_to_multiple(image, self.backbone.multiple)
        if self.config.latents == "image":
            hot = one_hot(label, self.config.num_classes, padded.shape[2:])
            of_mask = self.mask_net.encode(hot)
            return *self.encode(image), [skip(f) for skip, f in zip(self.mask_skips, of_mask)]
        # one pass for both, so that batch norm learns the moments of what it is used on
        both = self.backbone.encode(torch.cat([padded, self.label_image(label, padded.shape[2:])]))
        features, of_mask = zip(*[f.chunk(2) for f in both])
        return (list(features), [skip(f) for skip, f in zip(self.skips, features)],
                [skip(f) for skip, f in zip(self.skips, of_mask)])

    def label_image(self, label: Tensor, size) -> Tensor:
        """Label map (B, *S) -> (B, in_channels, *size): class k is the grey value k / (K - 1), and
        -1 is where the label is ignored, and the padding."""
        grey = (label / (self.config.num_classes - 1)).masked_fill(label == IGNORE, -1)
        padded = grey.new_full((len(label), 1, *size), -1)
        center_crop(padded, label.shape[1:]).copy_(grey.unsqueeze(1))
        return padded.expand(-1, self.config.in_channels, *[-1] * len(size))

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """(weighted sum of CE, Dice and KL, all means, not nats summed over pixels; its terms).

        image (B, C, *S), label int64 (B, *S) with 255 ignored, mask bool (B, *S). `kl` is the sum
        over skip connections of `kl_0` (finest), `kl_1`, ...
        """
        c, label = self.config, valid_label(label, mask)
        features, of_image, of_mask = self.encode_both(image, label)
        pixels = (label != IGNORE).sum().clamp(min=1)  # of the whole batch
        kls = []
        for p, q in zip(of_image, of_mask):
            positions = p.mean[0, 0].numel()
            kls.append(p.kl(q).sum() / (len(label) * positions if c.kl_scale == "mean" else pixels))
        z = [normal.sample() for normal in (of_mask if c.latents == "mask" else of_image)]
        z = z if c.reparameterised else [level.detach() for level in z]
        logits = self._logits(features, z, image.shape[2:])
        ce = cross_entropy(logits, label).sum() / pixels
        dice, kl = dice_loss(logits, label), sum(kls)
        loss = c.ce_weight * ce + c.dice_weight * dice + c.kl_weight * kl
        terms = {"cross_entropy": ce, "dice": dice, "kl": kl}
        terms |= {f"kl_{i}": level for i, level in enumerate(kls)}
        return loss, {name: term.detach() for name, term in terms.items()}

    forward = loss

    def _logits(self, features, z, size):
        """Features of every level and latents of every skip -> logits (B, K, *size)."""
        *skips, coarsest = features
        joined = [torch.cat([f, level.to(f)], 1) for f, level in zip(skips, z)]
        return self.head(center_crop(self.backbone.decode([*joined, coarsest]), size))

    def _decode(self, features, draws, size):
        """Yield the logits (n', B, K, *size) of a list of draws of all latents, in parts."""
        # the decoder's finest level holds about four maps like the finest skip
        chunk = samples_at_once(4 * features[0].numel(), features[0].device)
        for start in range(0, len(draws), chunk):
            part = draws[start : start + chunk]
            z = [torch.cat(level) for level in zip(*part)]
            repeated = [torch.cat([f] * len(part)) for f in features]
            yield self._logits(repeated, z, size).unflatten(0, (len(part), -1))

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The paper's sampling mode: n logit maps (n, B, K, *S), a pass of the decoder each; with
        `sample_drop_path` a pass of the encoder too."""
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
        """The paper's prior mode: probabilities (B, K, *S) at the means of the image's latents."""
        features, of_image = self.encode(image)
        means = [normal.mean for normal in of_image]
        return self._logits(features, means, image.shape[2:]).float().softmax(1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, *S) at the means of the mask's latents: how well z can say `label`."""
        features, _, of_mask = self.encode_both(image, label)
        return self._logits(features, [normal.mean for normal in of_mask], image.shape[2:])

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int,
                       mask: Tensor | None = None) -> Tensor:
        """Lower bound of log p(y | x) in nats by importance sampling with n draws, (B,): half of
        them from the mask's q, half from the image's p, see common.importance_log_ratio. With
        latents="image" all are from p."""
        label, (n_q, n_p) = valid_label(label, mask), (n - n // 2, n // 2)
        if self.config.latents == "image":
            n_q, n_p = 0, n
        features, of_image, of_mask = self.encode_both(image, label)
        draws = [[normal.sample() for normal in of_mask] for _ in range(n_q)]
        draws += [[normal.sample() for normal in of_image] for _ in range(n_p)]
        log_q = torch.stack([log_density(of_mask, z) for z in draws])  # (n, B)
        log_p = torch.stack([log_density(of_image, z) for z in draws])
        log_prob = torch.cat([-cross_entropy(logits, label)
                              for logits in self._decode(features, draws, image.shape[2:])])
        log_ratio = importance_log_ratio(log_q, log_p, n_q, n_p)
        return (log_prob + log_ratio).logsumexp(0) - math.log(n)


def log_density(normals: list[DiagonalNormal], z: list[Tensor]) -> Tensor:
    """log density of one draw of the latents of every skip connection, (B,)."""
    return sum(normal.log_prob(level) for normal, level in zip(normals, z))


class LatentSkip(nn.Module):
    """All the method adds to a network: features (B, channels, *S) -> DiagonalNormal of
    (B, latent_dim, *S). On a U-Net of your own, widen what reads the skip connection, and:

        normal = self.latent(skip)                        # normal.kl(other) for the loss
        skip = torch.cat([skip, normal.sample()], 1)      # normal.mean for the prior mode
    """

    def __init__(self, channels: int, latent_dim: int = 1, dims: int = 2):
        super().__init__()
        self.conv = CONV[dims](channels, 2 * latent_dim, 1)

    def forward(self, features: Tensor) -> DiagonalNormal:
        return predict_normal(self.conv, features)


def latent_skips(c: VAEUNetConfig, channels) -> nn.ModuleList:
    """A LatentSkip for every level but the coarsest, which has no skip connection."""
    skips = nn.ModuleList(LatentSkip(width, c.latent_dim, c.dims) for width in channels[:-1])
    if c.backbone == "swin":  # as all its layers; larger weights let the KL of early steps explode
        for skip in skips:
            nn.init.trunc_normal_(skip.conv.weight, std=0.02)
            nn.init.zeros_(skip.conv.bias)
    return skips


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Soft Dice loss in 0..1: 1 - mean_k 2 sum(s y) / (sum s^2 + sum y^2).

    logits (B, K, *S), label (B, *S). Sums over the batch's valid pixels; the mean is over all
    classes, background and absent ones too.
    """
    valid = (label != IGNORE).unsqueeze(1)
    hot = one_hot(label, logits.shape[1], label.shape[1:])
    prob = logits.float().softmax(1) * valid
    axes = [0, *range(2, prob.dim())]
    size = prob.square().sum(axes) + hot.sum(axes)
    return 1 - ((2 * (prob * hot).sum(axes) + 1e-5) / (size + 1e-5)).mean()


def build_backbone(c: VAEUNetConfig, in_channels: int, decoder: bool = True) -> nn.Module:
    """A network that reads `latent_dim` more channels from every skip connection.

    encode: image (B, C, *S), sides multiples of `multiple` -> features of every level, of
    `channels`, fine to coarse. decode: these with the latents -> (B, out_channels, *S).
    """
    if c.backbone == "swin":
        if c.dims != 2:
            raise ValueError(f"backbone='swin' with dims={c.dims}: dims is 2")
        return SwinUNet(in_channels, width=c.width, depths=c.depths, heads=c.heads, patch=c.patch,
                        window=c.window, joined=c.latent_dim, drop_path=c.drop_path,
                        decoder=decoder)
    unet = UNet(in_channels, c.channels, dims=c.dims, convs=c.convs)
    unet.channels, unet.out_channels, unet.decoder = c.channels, c.channels[0], nn.ModuleList()
    if decoder:
        for coarser, skip in zip(c.channels[:0:-1], c.channels[-2::-1]):
            unet.decoder.append(conv_block(c.dims, coarser + skip + c.latent_dim, skip,
                                           convs=c.convs))
    return unet


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
