"""VAE U-Net: latents on the skip connections, at every resolution level (Bai and Bai 2023,
"Hierarchical Uncertainty Estimation for Medical Image Segmentation Networks", arXiv:2308.08465).

At every level i of a U-Net a 1-wide convolution turns the encoder's features into a normal for each
position, a draw z_i is concatenated to the features, and the decoder turns all levels into a mask:
        z_i ~ q(z_i|X) = N(mu_i(X), diag(sigma_i(X)^2)),   Y = decoder(features(X), z_0 .. z_L).
A second encoder, which sees the mask Y and exists in training only, gives p(z_i|Y). Minimised is
        L = E_{z ~ q(z|X)}[ 0.4 CE(Y, z) + 0.6 Dice(Y, z) ]
            + beta / (L + 1) sum_i KL( q(z_i|X) || p(z_i|Y) ).                     (Eq. 15, App. C)
The roles are the reverse of the other conditional VAEs here: the decoder is trained on latents of
the image, the same that it is sampled with, and never sees those of the mask. So there is no
`reconstruct`. A sample costs a pass of the decoder; the encoder runs once for all.

Which uncertainty: meant as aleatoric, but nothing in L asks for a sample per reader. z is drawn
without sight of Y, so CE is lowest where z changes nothing, and samples differ little, hardly more
in what readers dispute. Their spread serves the paper's other use, as a warning: it grows on
blurred, noisy and foreign images (`python evaluate.py RUN --ood`).

Differences from the paper
  1. Reductions: the paper gives none, but wants the KL's scale "consistent with the reconstruction
     loss". CE is the mean over a case's pixels, then over cases; the KL of a level the mean over
     positions and cases, then averaged over levels. (The other methods here sum.)
  2. Dice: 1 - mean_k 2 sum(s y) / (sum s^2 + sum y^2), sums over the batch's valid pixels, mean
     over the classes in the batch's masks, background too. A class absent there is left out.
  3. Levels: i = 0..L for L + 1 resolution levels, as Sec. 3.2 has it, so the coarsest features have
     latents as well (Fig. 11 shows three levels). Scalar latents, as the 3.6 k parameters suggest.
  4. Eq. 6 lets z_i depend on z_<i, but no path is described by which a drawn z would reach the next
     level's encoder. Here the levels share features, and are independent given X.
  5. The nets predict log sigma, and it is bounded (common.bounded_log_std).
  6. Backbone: the paper's general case is any U-Net; the default here is the U-Net of the other
     methods with batch norm. `backbone=swin` is the one behind the paper's 20.08 M parameters: a
     Swin-Unet of 2, 2, 2 and 1 blocks a level has 20.08 M, of them 5.1 k for the latents (paper:
     3.6 k). The paper gives no depths; 2, 2, 2 and 2 make 27.17 M, as in Swin-Unet. The mask
     encoder, another 13.33 M in training, is of the same kind; the paper does not count one. Swin's
     latents start at N(0, 1): from torch's usual weights SGD at lr 0.05 takes the KL to infinity
     within some twenty steps, as no layer bounds the scale of its features.
  7. "Decay rate 1e-4" of the learning rate is read as lr / (1 + 1e-4 step), changed every 5000
     steps; 150 epochs of LIDC are about 60k steps. For Synapse the paper has --lr 0.05.
  8. 1D and 3D work as well (`dims`), and any size: padded by reflection, the one-hot mask by 0.

    python vae_unet.py               # a small one on made organs, under a minute on a CPU
                                     # -> vae_unet_samples.png, vae_unet_latents.png
    python train.py --model vae_unet --data lidc --device cuda
    python train.py --model vae_unet --data lidc --model-args backbone=swin
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.swin_unet import SwinUNet
from common import (CONV, IGNORE, DiagonalNormal, UNet, center_crop, check_choice, conv_block,
                    cross_entropy, one_hot, pad_to_multiple, valid_label)

CE_WEIGHT, DICE_WEIGHT = 0.4, 0.6
CHUNK = 2**22  # feature values of the finest level decoded at once when sampling: bounds memory


@dataclass(frozen=True)
class VAEUNetConfig:
    """Latents and loss as in the paper, on the U-Net of the other methods."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    latent_dim: int = 1  # latents at each position of each level
    beta: float = 0.1  # weight of the KL
    backbone: str = "unet"  # or "swin" (2D)
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # U-Net: a resolution level each
    convs: int = 3  # U-Net: 3-wide convolutions a level
    width: int = 96  # Swin: channels of the finest level, doubled at every further one
    depths: tuple[int, ...] = (2, 2, 2, 1)  # Swin: blocks a level, in the decoder too
    heads: tuple[int, ...] = (3, 6, 12, 24)  # Swin: of attention, a level each
    patch: int = 4  # Swin: pixels a side that become one token of the finest level
    window: int = 7  # Swin: tokens a side that attend to one another


class VAEUNet(nn.Module):
    """VAE U-Net. Default: 19.65 M parameters, 11.79 M of them for sampling."""

    Config = VAEUNetConfig
    TRAINING = dict(optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4, batch_size=24,
                    steps=60_000,
                    lr_drops=tuple((s, 1 / (1 + 1e-4 * s)) for s in range(5000, 60_000, 5000)))
    QUICK_CONFIG = dict(channels=(16, 32, 64, 64), convs=1, width=24, depths=(2, 2, 2),
                        heads=(2, 4, 8))
    QUICK_TRAINING = dict(lr=0.1, lr_drops=((220, 0.2),), batch_size=8, steps=300)

    def __init__(self, config: VAEUNetConfig = VAEUNetConfig()):
        super().__init__()
        self.config = c = config
        check_choice("dims", c.dims, (1, 2, 3))
        check_choice("backbone", c.backbone, ("unet", "swin"))
        levels = len(c.channels if c.backbone == "unet" else c.depths)
        if c.latent_dim < 1 or levels < 2:
            raise ValueError(f"latent_dim={c.latent_dim}, {levels} resolution levels: latent_dim "
                             "is at least 1, and there are at least 2 levels")
        self.backbone = build_backbone(c, c.in_channels)
        self.skips = latent_skips(c, self.backbone.channels)
        self.head = CONV[c.dims](self.backbone.out_channels, c.num_classes, 1)
        self.mask_net = build_backbone(c, c.num_classes)  # its features serve for p(z | Y) alone
        self.mask_net.decoder = self.mask_net.to_pixels = None
        self.mask_skips = latent_skips(c, self.backbone.channels)

    def for_inference(self) -> "VAEUNet":
        """A copy without the mask encoder, which only `loss` needs; its state_dict() is the export.

            torch.save(model.for_inference().state_dict(), "weights.pt")
            model = VAEUNet(config).for_inference()
            model.load_state_dict(torch.load("weights.pt", weights_only=True))
        """
        model = copy.deepcopy(self)
        model.mask_net = model.mask_skips = None
        return model

    def encode(self, image: Tensor) -> tuple[list[Tensor], list[DiagonalNormal]]:
        """Features (B, C_i, *S_i) and q(z_i | X) (B, latent_dim, *S_i) of every level, fine to
        coarse, of the padded image."""
        features = self.backbone.encode(pad_to_multiple(image, self.backbone.multiple))
        return features, [skip(f) for skip, f in zip(self.skips, features)]

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """0.4 CE + 0.6 Dice + beta KL, all means: the paper's scale, not nats summed over pixels.

        image (B, C, *S), label int64 (B, *S) with 255 ignored, mask bool (B, *S). Returns the loss
        and its terms; `kl` is the mean over levels of `kl_0` (finest), `kl_1`, ...
        """
        if self.mask_net is None:
            raise RuntimeError("this VAEUNet has no mask encoder (for_inference): it cannot train")
        label = valid_label(label, mask)
        features, of_image = self.encode(image)
        size = [side + -side % self.backbone.multiple for side in image.shape[2:]]
        hot = one_hot(label, self.config.num_classes, size)
        of_mask = [skip(f) for skip, f in zip(self.mask_skips, self.mask_net.encode(hot))]
        kls = torch.stack([q.kl(p).mean() / q.mean[0, 0].numel()  # a mean over positions
                           for q, p in zip(of_image, of_mask)])

        logits = self._logits(features, [q.sample() for q in of_image], image.shape[2:])
        valid = label != IGNORE
        pixels = valid.flatten(1).sum(1).clamp(min=1)
        ce = (cross_entropy(logits, label) / pixels).mean()
        dice = dice_loss(logits, center_crop(hot, image.shape[2:]), valid)
        kl = kls.mean()
        loss = CE_WEIGHT * ce + DICE_WEIGHT * dice + self.config.beta * kl
        terms = {"cross_entropy": ce, "dice": dice, "kl": kl}
        terms |= {f"kl_{i}": level for i, level in enumerate(kls)}
        return loss, {name: term.detach() for name, term in terms.items()}

    forward = loss

    def _logits(self, features, z, size):
        """Features and latents of every level (B, ., *S_i) -> logits (B, K, *size)."""
        joined = [torch.cat([f, level.to(f)], 1) for f, level in zip(features, z)]
        return self.head(center_crop(self.backbone.decode(joined), size))

    def _samples(self, image, n, generator=None):
        """Yield the logits of n samples in parts, (n', B, K, *S): one pass of the encoder."""
        features, latents = self.encode(image)
        chunk = max(1, CHUNK // (len(image) * features[0][0].numel()))
        for start in range(0, n, chunk):
            # drawn sample by sample, so that they do not hang on the parts' size
            draws = [[q.sample(generator) for q in latents] for _ in range(min(chunk, n - start))]
            z = [torch.cat(level) for level in zip(*draws)]
            repeated = [torch.cat([f] * len(draws)) for f in features]
            yield self._logits(repeated, z, image.shape[2:]).unflatten(0, (len(draws), -1))

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The paper's sampling mode: n logit maps (n, B, K, *S), a pass of the decoder each."""
        return torch.cat(list(self._samples(image, n, generator)))

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """The paper's prior mode: probabilities (B, K, *S) at the means of q(z | X)."""
        features, latents = self.encode(image)
        return self._logits(features, [q.mean for q in latents], image.shape[2:]).float().softmax(1)

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int,
                       mask: Tensor | None = None) -> Tensor:
        """log (1/n) sum_i p(y | z_i, x), z_i ~ q(z|x), in nats: a lower bound on average, (B,)."""
        label = valid_label(label, mask)
        log_prob = torch.cat([-cross_entropy(part, label) for part in self._samples(image, n)])
        return log_prob.logsumexp(0) - math.log(n)


class LatentSkip(nn.Module):
    """A normal for every position of a skip connection: all the method adds to a network.

    Features (B, channels, *S) -> DiagonalNormal of (B, latent_dim, *S). On a U-Net of your own,
    widen what reads the skip connection by `latent_dim` channels, and where it is read:

        normal = self.latent(skip)                        # normal.kl(other) for the loss
        skip = torch.cat([skip, normal.sample()], 1)      # normal.mean for the prior mode
    """

    def __init__(self, channels: int, latent_dim: int = 1, dims: int = 2):
        super().__init__()
        self.conv = CONV[dims](channels, 2 * latent_dim, 1)

    def forward(self, features: Tensor) -> DiagonalNormal:
        mean, log_std = self.conv(features).chunk(2, 1)
        return DiagonalNormal(mean, log_std)


def latent_skips(c: VAEUNetConfig, channels) -> nn.ModuleList:
    """A LatentSkip a level; on Swin, see "Differences" 6, all normals start close to N(0, 1)."""
    skips = nn.ModuleList(LatentSkip(width, c.latent_dim, c.dims) for width in channels)
    if c.backbone == "swin":
        for parameter in skips.parameters():
            nn.init.normal_(parameter, std=1e-3)
    return skips


def dice_loss(logits: Tensor, hot: Tensor, valid: Tensor) -> Tensor:
    """Soft Dice loss in 0..1, see "Differences" 2; a batch without valid pixels has 0.

    logits (B, K, *S), hot (B, K, *S) one-hot and 0 where ignored, valid bool (B, *S).
    """
    prob = (logits.float().softmax(1) * valid.unsqueeze(1)).transpose(0, 1).flatten(1)  # (K, B*S)
    hot = hot.transpose(0, 1).flatten(1)
    size = hot.sum(1)  # of hot^2 too
    dice = 2 * (prob * hot).sum(1) / (prob.square().sum(1) + size).clamp(min=1e-6)
    present = size > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


# ---------------------------------------------------------------------------------- backbones
# encode: image (B, C, *S), sides multiples of `multiple` -> features of every level, of `channels`,
# fine to coarse. decode: these, each with `latent_dim` channels more -> (B, out_channels, *S).


def build_backbone(c: VAEUNetConfig, in_channels: int) -> nn.Module:
    """The network of the config, which reads `latent_dim` more channels at every level."""
    if c.backbone == "unet":
        return LatentUNet(c, in_channels)
    if c.dims != 2:
        raise ValueError(f"backbone='swin' with dims={c.dims}: dims is 2")
    return SwinUNet(in_channels, width=c.width, depths=c.depths, heads=c.heads, patch=c.patch,
                    window=c.window, joined=c.latent_dim)


class LatentUNet(UNet):
    """The U-Net of common.py, its decoder widened for the latents of every level."""

    def __init__(self, c: VAEUNetConfig, in_channels: int):
        super().__init__(in_channels, c.channels, dims=c.dims, convs=c.convs)
        self.channels, self.out_channels = c.channels, c.channels[0]
        below = [c.channels[-1] + c.latent_dim, *c.channels[-2:0:-1]]
        self.decoder = nn.ModuleList(
            conv_block(c.dims, before + skip + c.latent_dim, skip, convs=c.convs)
            for before, skip in zip(below, c.channels[-2::-1]))


# ----------------------------------------------------------------------------------- pictures


if __name__ == "__main__":
    import time
    from analysis.paper_figures import plot_latents, plot_vae_samples

    import data
    import metrics

    train, test = data.load("organs", ("train", "test"))
    torch.manual_seed(0)
    model = VAEUNet(VAEUNetConfig(num_classes=6, channels=(8, 16, 32, 64), convs=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    batches = data.batches(train, 8, seed=0, augmentation=data.DATASETS["organs"].augmentation)
    start, steps = time.monotonic(), 300
    for step, (image, label) in zip(range(1, steps + 1), batches):
        optimizer.param_groups[0]["lr"] = 0.2 if step < 0.7 * steps else 0.04
        optimizer.zero_grad()
        loss, terms = model(image, label)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}/{steps}, {time.monotonic() - start:.0f} s: "
                  + ", ".join(f"{name} {term:.3f}" for name, term in terms.items()), flush=True)
    model.eval()
    test = test.subset(range(0, len(test), 2))
    samples = model.sample(test.images, 10, torch.Generator().manual_seed(0)).argmax(2)
    prior = metrics.dice(model.predict(test.images).argmax(1), test.labels, 6, test.weights).mean()
    draws = metrics.sample_dice(samples, test.labels, 6, test.weights).mean(1)
    print(f"Dice: prior mode {prior:.3f}, sampling mode {draws.mean():.3f} +- {draws.std():.4f}")
    sharp = test.images[0]
    blurred = F.avg_pool2d(sharp, 9, 1, 4, count_include_pad=False)
    patched = sharp.clone()
    patched[:, 40:52, 30:42] = sharp.max()
    plot_vae_samples(model, {"image": sharp, "another": test.images[5], "blurred": blurred,
                         "a patch": patched}, "vae_unet_samples.png")
    plot_latents(model, sharp, "vae_unet_latents.png")
    print("samples and uncertainty: vae_unet_samples.png, latents: vae_unet_latents.png")
