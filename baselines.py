"""The systems that the Probabilistic U-Net was compared with (Kohl et al., NeurIPS 2018, Sec. 3.2).

All stand on the same U-Net core and are trained on the same schedule (App. H.1). With M outputs
eta_1 ... eta_M, each a map of logits, and CE_m = -sum_i log softmax(eta_m)[i, y_i], they are

                        loss                                            a sample      varies with
    DeterministicUNet   CE                                              the output    nothing
    DropoutUNet         CE under a random dropout mask                  one mask      the weights
    EnsembleUNet        sum_m CE_m of M separate networks               one network   the weights
    MHeads              (1 - eps) CE_best + eps/(M - 1) sum of others   one head      the head

What varies with the weights is epistemic uncertainty: what more data would settle, not how readers
differ. M-Heads learn how readers differ, which is aleatoric, but not how often: the best head takes
nearly all of the loss, and all are drawn equally often. A deterministic U-Net holds aleatoric
uncertainty pixel by pixel, in its probabilities. The Image2Image VAE, the paper's other baseline,
is a configuration of prob_unet.py.

Differences from the paper
  1. The paper trains a model of 4, 8 and 16 outputs for as many samples. Here any number can be
     drawn: the first 4 of 16 outputs, or all of them over and over. For the paper's, set M.
  2. The ensemble's members are trained in one run. They differ in their initial weights alone and,
     unlike separate runs, see the same batches. Nothing else ties them: each has its own loss, and
     Adam works weight by weight. For other batches too, train `unet` with one --seed after another.
  3. Dropout acts on single activations, as in Bayesian SegNet, which the paper follows, and in the
     decoder on the whole input of a block, skip connection included. `predict` leaves it out.
  4. One 1-wide convolution follows the core; the paper has "the appropriate number".

    python train.py --model unet --data lidc --device cuda     # dropout_unet, ensemble, m_heads
    python train.py --model ensemble --data lidc --model-args members=4
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import (CONV, UNet, center_crop, check_choice, cross_entropy, double, encode, halve,
                    init_orthogonal, pad_to_multiple, standard_normal, valid_label)

TRAINING = dict(optimizer="adam", lr=1e-4, weight_decay=1e-5, batch_size=32, steps=240_000,
                lr_drops=tuple((40_000 * i, 10 ** (-0.4 * i)) for i in range(1, 6)))  # to 1e-6
QUICK_CONFIG = dict(channels=(16, 32, 64), convs=2)
QUICK_TRAINING = dict(lr=2e-3, lr_drops=((400, 0.2),), batch_size=16, steps=500)


@dataclass(frozen=True)
class UNetConfig:
    """The core shared by all; defaults are the paper's LIDC model."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    channels: tuple[int, ...] = (32, 64, 128, 256, 512)  # a resolution level each
    convs: int = 3  # 3-wide convolutions a level


@dataclass(frozen=True)
class DropoutUNetConfig(UNetConfig):
    """The core, and where its activations are dropped."""

    p: float = 0.5  # probability that an activation is dropped
    dropout_blocks: int = 3  # innermost encoder blocks, and decoder blocks, with dropout


@dataclass(frozen=True)
class EnsembleUNetConfig(UNetConfig):
    """The core of every member."""

    members: int = 16  # M; the paper has one for each sample, of which it draws up to 16


@dataclass(frozen=True)
class MHeadsConfig(UNetConfig):
    """The core under all heads."""

    heads: int = 16  # M; the paper has one for each sample, of which it draws up to 16
    epsilon: float = 0.05  # weight of all heads but the best, together (Rupprecht et al. 2017)


def core(c: UNetConfig) -> UNet:
    """The U-Net all of them stand on: no normalisation, as in the paper."""
    check_choice("dims", c.dims, (1, 2, 3))
    return UNet(c.in_channels, c.channels, dims=c.dims, convs=c.convs, norm="none")


class Mixture(nn.Module):
    """M outputs of equal probability: p(y | x) = 1/M sum_m prod_i softmax(eta_m)[i, y_i].

    A subclass sets `count`, which is M, and defines `outputs` and `loss`.
    """

    TRAINING, QUICK_CONFIG, QUICK_TRAINING = TRAINING, QUICK_CONFIG, QUICK_TRAINING
    count: int

    def outputs(self, image: Tensor, n: int) -> Tensor:
        """Logits of the first n <= M outputs, (n, B, K, *S)."""
        raise NotImplementedError

    def forward(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        return self.loss(image, label, mask)

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Logits (n, B, K, *S): the outputs in order, over and over. Nothing is random."""
        outputs = self.outputs(image, min(n, self.count))
        return outputs[torch.arange(n, device=outputs.device) % self.count]

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S), averaged over the outputs: the mixture's marginals."""
        return self.outputs(image, self.count).float().softmax(2).mean(0)

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int,
                       mask: Tensor | None = None) -> Tensor:
        """log p(y | x) of the mixture in nats, (B,); exact, whatever n."""
        log_prob = -cross_entropy(self.outputs(image, self.count), valid_label(label, mask))
        return log_prob.logsumexp(0) - math.log(self.count)


class DeterministicUNet(Mixture):
    """One U-Net, one output. Default: 2D, 11.77 M parameters."""

    Config = UNetConfig
    count = 1

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = c = config
        self.unet = core(c)
        self.head = CONV[c.dims](c.channels[0], c.num_classes, 1)
        init_orthogonal(self)

    def outputs(self, image: Tensor, n: int = 1) -> Tensor:
        """The one logit map there is, (1, B, K, *S)."""
        return self.head(self.unet(image)).unsqueeze(0)

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Cross-entropy in nats, summed over pixels, averaged over the batch; and its terms.

        image (B, C, *S), label int64 (B, *S) with 255 ignored, mask bool (B, *S).
        """
        loss = cross_entropy(self.outputs(image)[0], valid_label(label, mask)).mean()
        return loss, {"cross_entropy": loss.detach()}


class EnsembleUNet(Mixture):
    """M U-Nets of independent initial weights. Default: 188 M parameters; `members[m]` is one."""

    Config = EnsembleUNetConfig
    QUICK_CONFIG = QUICK_CONFIG | dict(members=2)

    def __init__(self, config: EnsembleUNetConfig = EnsembleUNetConfig()):
        super().__init__()
        if config.members < 1:
            raise ValueError(f"members={config.members}: an ensemble has at least 1")
        self.config, self.count = config, config.members
        self.members = nn.ModuleList(DeterministicUNet(config) for _ in range(config.members))

    def outputs(self, image: Tensor, n: int) -> Tensor:
        """The logits of the first n members, (n, B, K, *S)."""
        return torch.cat([member.outputs(image) for member in self.members[:n]])

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """The members' losses summed, so that each has the gradient it would have alone.

        Arguments as DeterministicUNet.loss; the term `cross_entropy` is the members' mean. The
        backward pass computes each member's activations anew, so that those of only one are in
        memory at a time (1 GB a member by default): a third more work.
        """
        losses = [checkpoint(member, image, label, mask, use_reentrant=False)[0]
                  for member in self.members]
        loss = torch.stack(losses).sum()
        return loss, {"cross_entropy": loss.detach() / self.count}


class MHeads(Mixture):
    """One U-Net with M 1-wide convolutions on it, that share out the readers among themselves."""

    Config = MHeadsConfig

    def __init__(self, config: MHeadsConfig = MHeadsConfig()):
        super().__init__()
        if config.heads < 2 or not 0 <= config.epsilon < 1:
            raise ValueError(f"heads={config.heads}, epsilon={config.epsilon}: heads is at least "
                             "2, epsilon at least 0 and below 1")
        self.config = c = config
        self.count = c.heads
        self.unet = core(c)
        self.heads = CONV[c.dims](c.channels[0], c.heads * c.num_classes, 1)
        init_orthogonal(self)

    def outputs(self, image: Tensor, n: int) -> Tensor:
        """The logits of the first n heads, (n, B, K, *S)."""
        logits = self.heads(self.unet(image))  # (B, M*K, *S)
        return logits.unflatten(1, (self.count, -1)).transpose(0, 1)[:n]

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """(1 - eps) of the best head's cross-entropy, eps shared by the others; and both terms.

        Arguments as DeterministicUNet.loss. The best head is found for every case of its own.
        """
        losses = cross_entropy(self.outputs(image, self.count), valid_label(label, mask))  # (M, B)
        best = losses.min(0).values
        others = (losses.sum(0) - best) / (self.count - 1)  # mean of the others
        epsilon = self.config.epsilon
        loss = ((1 - epsilon) * best + epsilon * others).mean()
        return loss, {"best": best.detach().mean(), "others": others.detach().mean()}


class DropoutUNet(nn.Module):
    """One U-Net; a sample is one random dropout mask, the same in training and sampling.

    The encoder's levels before the first dropout are computed once for all samples, in the default
    a seventh of the network's multiplications; the rest once a sample.
    """

    Config = DropoutUNetConfig
    TRAINING, QUICK_TRAINING = TRAINING, QUICK_TRAINING
    QUICK_CONFIG = QUICK_CONFIG | dict(dropout_blocks=1)  # of three levels

    def __init__(self, config: DropoutUNetConfig = DropoutUNetConfig()):
        super().__init__()
        self.config = c = config
        if not (0 < c.p < 1 and 1 <= c.dropout_blocks < len(c.channels)):
            raise ValueError(f"p={c.p}, dropout_blocks={c.dropout_blocks}: p is between 0 and 1, "
                             f"dropout_blocks 1 to {len(c.channels) - 1}, as the image is never "
                             "dropped")
        self.threshold = NormalDist().inv_cdf(c.p)  # normal noise falls below it with probability p
        self.unet = core(c)
        self.head = CONV[c.dims](c.channels[0], c.num_classes, 1)
        init_orthogonal(self)

    def dropout(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (B, ...) with a share p of zeros and the rest scaled by 1/(1 - p).

        F.dropout takes no generator, and would give every process of a run the same masks.
        """
        dropped = standard_normal(x.shape, x, generator) < self.threshold
        return x.masked_fill(dropped, 0) / (1 - self.config.p)

    def outer(self, image: Tensor) -> list[Tensor]:
        """Features of the encoder's levels before the first dropout, fine to coarse."""
        blocks = self.unet.encoder[: -self.config.dropout_blocks]
        return encode(blocks, pad_to_multiple(image, self.unet.multiple))

    def inner(self, features: list[Tensor], size,
              generator: torch.Generator | None = None) -> Tensor:
        """The rest: from the features of `outer`, logits (B, K, *size) under a new mask."""
        *skips, x = features
        for block in self.unet.encoder[-self.config.dropout_blocks :]:
            skips.append(x)
            x = block(self.dropout(halve(x), generator))
        for depth, block in enumerate(self.unet.decoder):
            x = torch.cat([skips.pop(), double(x)], 1)
            x = block(self.dropout(x, generator) if depth < self.config.dropout_blocks else x)
        return self.head(center_crop(x, size))

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Cross-entropy under one random mask a case; arguments as DeterministicUNet.loss."""
        logits = self.inner(self.outer(image), image.shape[2:])
        loss = cross_entropy(logits, valid_label(label, mask)).mean()
        return loss, {"cross_entropy": loss.detach()}

    forward = loss

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Logits (n, B, K, *S), a mask of its own for every sample and case."""
        features = self.outer(image)
        return torch.stack([self.inner(features, image.shape[2:], generator) for _ in range(n)])

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) without dropout, the usual stand-in for the mean over masks."""
        return self.head(self.unet(image)).float().softmax(1)

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int,
                       mask: Tensor | None = None) -> Tensor:
        """log 1/n sum of n masks' p(y | x) in nats: a lower bound on average, (B,)."""
        features, label = self.outer(image), valid_label(label, mask)
        log_prob = [-cross_entropy(self.inner(features, image.shape[2:]), label) for _ in range(n)]
        return torch.stack(log_prob).logsumexp(0) - math.log(n)
