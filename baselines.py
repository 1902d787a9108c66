"""The methods that the Probabilistic U-Net was compared with (Kohl et al., NeurIPS 2018, Sec. 3.2).

All use the same U-Net and training schedule (App. H.1). Write eta_1 ... eta_M for a model's M
outputs, each a logit map, and CE_m = -sum_i log softmax(eta_m)[i, y_i] for their cross-entropies:

                        loss                                            a sample      varies with
    DeterministicUNet   CE                                              the output    nothing
    DropoutUNet         CE under a random dropout mask                  one mask      the weights
    EnsembleUNet        sum_m CE_m of M separate networks               one network   the weights
    MHeads              (1 - eps) CE_best + eps/(M - 1) sum of others   one head      the head

Samples that vary with the weights show epistemic uncertainty, which more data would reduce, and not
how annotators differ. The probabilities of a deterministic U-Net show aleatoric uncertainty, but of
each pixel separately. M-Heads learn how annotators differ, because the loss mainly trains the best
head, so that heads specialise; eps also trains the heads that are never the best. They cannot learn
how often each annotation occurs, because every head counts as equally likely.
The Image2Image VAE, the paper's other baseline, is a configuration of prob_unet.py.

The SSN paper's baselines (Monteiro et al. 2020) are the backbones of SSN without the method:
`norm=batch` is the U-Net of its Table 1, `backbone=deepmedic` the DeepMedic of its Table 2, trained
by `--model unet --data brats`.

Differences from the paper
  1. The paper trains separate models of 4, 8 and 16 outputs for as many samples. Here any number of
     samples can be drawn from one model: the first 4 of 16 outputs, or all of them repeatedly. To
     do as the paper, set M (`members` or `heads`) to the number of samples.
  2. The ensemble's members are trained in one run: they differ in their initial weights, but get
     the same batches. To vary the batches too, train `unet` with several values of --seed.
  3. Dropout acts on single activations, as in Bayesian SegNet, which the paper follows; in the
     decoder, on the whole input of a block, including the skip connection. `predict` uses none.
  4. One 1-wide convolution follows the U-Net; the paper has "the appropriate number".
  5. DeepMedic's cross-entropy is summed over a patch's voxels, like all losses here. The authors
     take the mean, which includes the air around the brain. RMSprop does not depend on this scale,
     and the weight decay in models.RECIPES is adapted to it.
  6. What the paper leaves open about the learning rate's steps, up-sampling and padding is as in
     prob_unet.py; 1D and 3D work as well (`dims`).

    python train.py --model unet --data lidc --device cuda     # dropout_unet, ensemble, m_heads
    python train.py --model ensemble --data lidc --model-args members=4
    python train.py --model unet --data lidc --lr 1e-3 --lr-drops 0:1 --steps 500000 \
        --batch-size 12 --model-args norm=batch "channels=(32,64,128,192,192,192,192)"
                                     # SSN's Table 1, except for the weight decay: 1e-5, not 0
    python train.py --model unet --data brats --device cuda    # SSN's Table 2
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.deepmedic import DeepMedic, DeepMedicConfig
from backbones.unet import DetUNet, UNet
from common import (CONV, center_crop, check_choice, cross_entropy, downsample, dropout,
                    init_orthogonal, pad_to_multiple, run_encoder, upsample, valid_label)


@dataclass(frozen=True)
class UNetConfig:
    """The network that all baselines use; defaults are the paper's LIDC model."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # width of each resolution level
    convs: int = 3  # 3-wide convolutions per level
    norm: str = "none"  # or "batch" for SSN's U-Net
    backbone: str = "unet"  # or "deepmedic" (3D), for unet and ensemble
    deepmedic: dict = field(default_factory=dict)  # fields of DeepMedicConfig to change


@dataclass(frozen=True)
class DropoutUNetConfig(UNetConfig):
    """The U-Net, and where its activations are dropped."""

    p: float = 0.5  # probability that an activation is dropped
    dropout_blocks: int = 3  # number of innermost encoder and decoder blocks with dropout


@dataclass(frozen=True)
class EnsembleUNetConfig(UNetConfig):
    """The U-Net of every member, and how many members."""

    members: int = 16  # M; the paper has as many as samples, up to 16


@dataclass(frozen=True)
class MHeadsConfig(UNetConfig):
    """The U-Net that all heads share, and the loss's epsilon."""

    heads: int = 16  # M; the paper has as many as samples, up to 16
    epsilon: float = 0.05  # total weight of all heads but the best (Rupprecht et al. 2017)


def build_unet(c: UNetConfig) -> nn.Module:
    """The U-Net that all baselines use, which returns features of `out_channels` channels, or
    DeepMedic, which returns logits."""
    check_choice("dims", c.dims, (1, 2, 3))
    check_choice("norm", c.norm, ("none", "batch"))
    check_choice("backbone", c.backbone, ("unet", "deepmedic"))
    if c.backbone == "deepmedic":
        check_choice("dims", c.dims, (3,))
        return DeepMedic(c.in_channels, DeepMedicConfig(**c.deepmedic), c.num_classes)
    if c.norm == "batch":
        return DetUNet(c.in_channels, c.channels, dims=c.dims, convs=c.convs)
    return UNet(c.in_channels, c.channels, dims=c.dims, convs=c.convs, norm="none")


class Mixture(nn.Module):
    """M outputs of equal probability: p(y | x) = 1/M sum_m prod_i softmax(eta_m)[i, y_i].

    `sample` returns the outputs in turn, and `predict` averages their probabilities. A subclass
    defines `count` (M), `loss` (which `forward` calls), and outputs(image, n), the logits
    (n, B, K, *S) of the first n <= M outputs.
    """

    TRAINING = dict(optimizer="adam", lr=1e-4, weight_decay=1e-5, batch_size=32, steps=240_000,
                    lr_drops=tuple((40_000 * i, 10 ** (-0.4 * i)) for i in range(1, 6)))  # to 1e-6
    QUICK_CONFIG = dict(channels=(16, 32, 64), convs=2, deepmedic=DeepMedic.QUICK)
    QUICK_TRAINING = dict(lr=2e-3, lr_drops=((400, 0.2),), batch_size=16, steps=500)

    def forward(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        return self.loss(image, label, mask)

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Logits (n, B, K, *S): the outputs in order, repeated if n > M. Nothing is random."""
        outputs = self.outputs(image, min(n, self.count))
        return outputs[torch.arange(n, device=outputs.device) % self.count]

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) of the mixture for each pixel: the mean over the outputs."""
        return self.outputs(image, self.count).float().softmax(2).mean(0)

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int, mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
        """log p(y | x) of the mixture in nats, (B,). It is exact and does not depend on n."""
        log_prob = -cross_entropy(self.outputs(image, self.count), valid_label(label, mask))
        return log_prob.logsumexp(0) - math.log(self.count)


class DeterministicUNet(Mixture):
    """One U-Net (or DeepMedic) with one output. Default: 2D, 11.77 M parameters."""

    Config = UNetConfig
    count = 1

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = c = config
        self.unet = build_unet(c)
        if c.backbone == "deepmedic":
            return
        self.head = CONV[c.dims](self.unet.out_channels, c.num_classes, 1)
        if c.norm == "none":
            init_orthogonal(self)

    def outputs(self, image: Tensor, n: int = 1) -> Tensor:
        """Logits of the single output, (1, B, K, *S)."""
        if self.config.backbone == "deepmedic":
            return torch.stack(self.unet.stitch(image, lambda logits: [logits]))
        return self.head(self.unet(image)).unsqueeze(0)

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Cross-entropy in nats, summed over pixels and averaged over the batch: (loss, terms).

        image (B, C, *S), label int64 (B, *S), ignored where it is 255 or mask (B, *S) is False.
        With DeepMedic, the loss is that of one random patch of every volume.
        """
        label = valid_label(label, mask)
        if self.config.backbone == "deepmedic":
            image, label = self.unet.random_patches(image, label)
            logits = self.unet(image)
        else:
            logits = self.outputs(image)[0]
        loss = cross_entropy(logits, label).mean()
        return loss, {"cross_entropy": loss.detach()}


class EnsembleUNet(Mixture):
    """M U-Nets with independent initial weights, in `members`. Default: 188 M parameters."""

    Config = EnsembleUNetConfig
    QUICK_CONFIG = Mixture.QUICK_CONFIG | dict(members=2)

    def __init__(self, config: EnsembleUNetConfig = EnsembleUNetConfig()):
        super().__init__()
        if config.members < 1:
            raise ValueError(f"members={config.members}: an ensemble has at least 1")
        self.config, self.count = config, config.members
        self.members = nn.ModuleList(DeterministicUNet(config) for _ in range(config.members))

    def outputs(self, image: Tensor, n: int) -> Tensor:
        """Logits of the first n members, (n, B, K, *S)."""
        return torch.cat([member.outputs(image) for member in self.members[:n]])

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Sum of the members' losses, so that each gets the gradient it would get alone.

        Arguments as in DeterministicUNet.loss; the term `cross_entropy` is the members' mean. To
        hold only one member's activations in memory at a time (1 GB each by default), the backward
        pass computes them again, which is a third more work. Members with batch normalisation or
        DeepMedic's random patches would not compute the same twice, so they keep theirs.
        """
        repeatable = self.config.norm == "none" and self.config.backbone == "unet"
        losses = []
        for member in self.members:
            if repeatable:
                loss, _ = checkpoint(member, image, label, mask, use_reentrant=False,
                                     preserve_rng_state=False)
            else:
                loss, _ = member(image, label, mask)
            losses.append(loss)
        loss = torch.stack(losses).sum()
        return loss, {"cross_entropy": loss.detach() / self.count}


class MHeads(Mixture):
    """One U-Net with M output layers (heads), each of which specialises on some annotations."""

    Config = MHeadsConfig

    def __init__(self, config: MHeadsConfig = MHeadsConfig()):
        super().__init__()
        if config.heads < 2 or not 0 <= config.epsilon < 1:
            raise ValueError(f"heads={config.heads}, epsilon={config.epsilon}: heads is at least "
                             "2, epsilon at least 0 and below 1")
        check_choice("backbone", config.backbone, ("unet",))
        self.config = c = config
        self.count = c.heads
        self.unet = build_unet(c)
        self.heads = CONV[c.dims](self.unet.out_channels, c.heads * c.num_classes, 1)
        if c.norm == "none":
            init_orthogonal(self)

    def outputs(self, image: Tensor, n: int) -> Tensor:
        """Logits of the first n heads, (n, B, K, *S)."""
        logits = self.heads(self.unet(image))  # (B, M*K, *S)
        return logits.unflatten(1, (self.count, -1)).transpose(0, 1)[:n]

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """(1 - eps) CE of the best head + eps (mean CE of the others): (loss, both CEs as terms).

        Arguments as in DeterministicUNet.loss. Each case of the batch has its own best head.
        """
        losses = cross_entropy(self.outputs(image, self.count), valid_label(label, mask))  # (M, B)
        best, epsilon = losses.min(0).values, self.config.epsilon
        others = (losses.sum(0) - best) / (self.count - 1)
        loss = ((1 - epsilon) * best + epsilon * others).mean()
        return loss, {"best": best.detach().mean(), "others": others.detach().mean()}


class DropoutUNet(DeterministicUNet):
    """One U-Net with dropout; every sample is computed under a random dropout mask, as in training.

    `outputs` and `predict` use no dropout, the usual approximation of the mean over dropout masks.
    The encoder's levels before the first dropout are computed once for all samples, the rest once
    per sample.
    """

    Config = DropoutUNetConfig
    QUICK_CONFIG = Mixture.QUICK_CONFIG | dict(dropout_blocks=1)  # of three levels

    def __init__(self, config: DropoutUNetConfig = DropoutUNetConfig()):
        c = config
        if not (0 < c.p < 1 and 1 <= c.dropout_blocks < len(c.channels) and c.norm == "none"):
            raise ValueError(f"p={c.p}, dropout_blocks={c.dropout_blocks}, norm={c.norm!r}: p is "
                             f"between 0 and 1, dropout_blocks 1 to {len(c.channels) - 1} (the "
                             "first encoder block has no dropout), norm is 'none'")
        check_choice("backbone", c.backbone, ("unet",))
        super().__init__(c)

    def before_dropout(self, image: Tensor) -> list[Tensor]:
        """Features of the encoder's levels before the first dropout, fine to coarse."""
        blocks = self.unet.encoder[: -self.config.dropout_blocks]
        return run_encoder(blocks, pad_to_multiple(image, self.unet.multiple))

    def with_dropout(self, features: list[Tensor], size,
                     generator: torch.Generator | None = None) -> Tensor:
        """Run the other levels of the encoder, the decoder and the head under a new dropout mask:
        features of `before_dropout` -> logits (B, K, *size)."""
        c = self.config
        features = list(features)
        for block in self.unet.encoder[-c.dropout_blocks :]:
            features.append(block(dropout(downsample(features[-1]), c.p, generator)))
        *skips, x = features
        for depth, (block, skip) in enumerate(zip(self.unet.decoder, reversed(skips))):
            x = torch.cat([skip, upsample(x)], 1)
            if depth < c.dropout_blocks:
                x = dropout(x, c.p, generator)
            x = block(x)
        return self.head(center_crop(x, size))

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Cross-entropy, a dropout mask for each case; arguments as DeterministicUNet.loss."""
        logits = self.with_dropout(self.before_dropout(image), image.shape[2:])
        loss = cross_entropy(logits, valid_label(label, mask)).mean()
        return loss, {"cross_entropy": loss.detach()}

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Logits (n, B, K, *S). Every sample of every case has its own mask."""
        features, size = self.before_dropout(image), image.shape[2:]
        return torch.stack([self.with_dropout(features, size, generator) for _ in range(n)])

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int, mask: Tensor | None = None,
                       generator: torch.Generator | None = None) -> Tensor:
        """log of the mean p(y | x) over n dropout masks, nats, (B,): a lower bound on average."""
        features, label = self.before_dropout(image), valid_label(label, mask)
        log_prob = [-cross_entropy(self.with_dropout(features, label.shape[1:], generator), label)
                    for _ in range(n)]
        return torch.stack(log_prob).logsumexp(0) - math.log(n)
