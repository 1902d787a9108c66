"""PHiSeg, hierarchical probabilistic segmentation (Baumgartner et al., MICCAI 2019,
arXiv:1906.04045).

One image, many plausible masks, made from coarse to fine. Every resolution level l = L .. 1 (1 is
the finest) has a latent map z_l, drawn given the one drawn below it,
        p(s | x) = int p(s | z_1 .. z_L) p(z_1 | z_2, x) ... p(z_L | x) dz_1 .. dz_L,       (Eq. 1)
and adds a residual to the mask that the coarser levels have made so far. Nothing of the image
reaches the mask but through the latents. A posterior net, which sees the reader's mask s too, finds
the latents that stand for it during training, by minimising
        -E_q[ log p(s | z_1 .. z_L) ] + alpha_L KL( q(z_L | s, x) || p(z_L | x) )
        + sum_{l < L} alpha_l E_q[ KL( q(z_l | z_l+1, s, x) || p(z_l | z_l+1, x) ) ]         (Eq. 2)
and the cross-entropies of the coarser masks (deep supervision). With all alpha_l = 1, Eq. 2 alone
is -ELBO. What varies between samples is aleatoric uncertainty: what the image leaves open.

Three nets of L levels, fine to coarse: level l of the lists below is z_(l+1) of the paper.
    prior, posterior    encoder of R >= L resolution levels; the L coarsest carry a latent map each
    likelihood          latents -> residual logits of every level

Differences from the paper
  1. Its text puts z_1 at full resolution; its code, and so its numbers, at 2^-(R-L) of it (1/4 by
     default), and the likelihood doubles R - L times more. Here as in the code; `latent_levels` =
     len(channels) is the text's layout.
  2. alpha_l: 2^(l-1) in the text, 4^(l-1) in the code, and so in its numbers. Here kl_base^(l-1), 2
     unless said otherwise. (In 2D z_l has a quarter of the entries of z_(l-1): 4 makes up for it.)
  3. The code also leads every z up to every finer level by convolutions whose result nobody reads;
     left out. The first convolution on concat(features, convolutions of z) is computed as the sum
     of one for each, the former once for all samples. z_L's mean comes from a 1-wide convolution,
     as all other moments do (in the code from a 3-wide one).
  4. The nets predict log sigma, bounded (common.bounded_log_std), not softplus^-1(sigma).
  5. Any size is padded by reflection. In the posterior's one-hot mask (minus 0.5, as in the code),
     padding and ignored pixels (255) are -0.5 in every class.
  6. The paper trains for 48 hours and takes the model of lowest validation loss; here 500k steps,
     and the lowest validation GED. Its single prediction is the mean of samples (`dice_mean` of
     evaluate.py); `predict` stands at the prior's means. Weights at first are PyTorch's (the code:
     He's normal), and so are batch norm's momentum and eps.
  7. 1D and 3D work as well (`dims`); the paper is 2D.

    python phiseg.py                 # a small one, about a minute on two CPU cores
                                     # -> phiseg_levels.png (Fig. 1), phiseg_maps.png (Fig. 3)
    python train.py --model phiseg --data lidc --device cuda
    python train.py --model phiseg --data lidc --model-args latent_levels=1    # the ablation
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import (BATCH_NORM, CONV, LINEAR, POOL, DiagonalNormal, center_crop, check_choice,
                    conv_block, cross_entropy, one_hot, pad_to_multiple, standard_normal,
                    valid_label)

CHUNK = 2**24  # feature values computed at once when sampling: 64 MB in float32


@dataclass(frozen=True)
class PHiSegConfig:
    """Defaults are the paper's LIDC model, PHiSeg 7_5 of its code, with the text's KL weights."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    channels: tuple[int, ...] = (32, 64, 128, 192, 192, 192, 192)  # R resolution levels
    latent_levels: int = 5  # L, at most R; 1 is the paper's ablation
    latent_channels: int = 2  # D, channels of every latent map
    convs: int = 3  # 3-wide convolutions a level of the encoders
    kl_base: float = 2.0  # alpha_l = kl_base^(l-1), 1 the finest; 4: the authors' code; 1: none
    checkpoint: bool = False  # keep fewer activations in training, compute them twice


class PHiSeg(nn.Module):
    """PHiSeg. Default: 17.81 M parameters, 11.83 M of them for sampling.

    Multiplications for n samples of a 128 x 128 image, in thousand millions: 1.46 once (the prior's
    encoder) + n x (0.12 for the latent path + 9.35 for the likelihood).
    """

    Config = PHiSegConfig
    TRAINING = dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=12, steps=500_000)
    QUICK_CONFIG = dict(channels=(16, 16, 32, 32, 32), latent_levels=4, convs=2)
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

    def encode(self, image: Tensor, label: Tensor | None = None) -> list[Tensor]:
        """What every level takes from the image, fine to coarse, by the prior's encoder or, with a
        label, by the posterior's: once, whatever the number of samples."""
        image = pad_to_multiple(image, self.multiple)
        if label is None:
            return self.prior.encode(image)
        hot = one_hot(label, self.config.num_classes, image.shape[2:])
        return self.posterior.encode(torch.cat([image, hot - 0.5], 1))

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Eq. 2 and deep supervision: (loss in nats, summed over pixels and averaged over the
        batch; its terms).

        image (B, C, *S), label int64 (B, *S) with 255 ignored, mask bool (B, *S). `reconstruction`
        is the finest map's cross-entropy, `supervision` the sum of the coarser ones', kl_<l> the
        unweighted KL of z_l, kl their sum; with one level `reconstruction` and `kl` are all.
        """
        label = valid_label(label, mask)
        seen = self.encode(image, label), self.encode(image)
        latents, normals = self.descend((self.posterior, self.prior), seen, self.noise(image, 1))
        maps = [F.interpolate(logits, scale_factor=2**level) if level else logits
                for level, logits in enumerate(pyramid(self.likelihood(latents)))]
        losses = [cross_entropy(center_crop(logits, label.shape[1:]), label).mean()
                  for logits in maps]
        kls = [posterior.kl(prior).mean() for posterior, prior in normals]
        loss = sum(losses) + sum(self.config.kl_base**l * kl for l, kl in enumerate(kls))
        terms = dict(reconstruction=losses[0], kl=sum(kls))
        if len(kls) > 1:
            terms |= dict(supervision=sum(losses[1:]))
            terms |= {f"kl_{l}": kl for l, kl in enumerate(kls, 1)}
        return loss, {name: term.detach() for name, term in terms.items()}

    forward = loss

    def noise(self, image: Tensor, n: int, generator: torch.Generator | None = None):
        """Standard normal noise for n draws of every level's latents, fine to coarse, each
        (n, B, D, *s)."""
        c, shapes = self.config, []
        for level in range(c.latent_levels):
            halved = len(c.channels) - c.latent_levels + level
            size = [-(-s // self.multiple) * self.multiple >> halved for s in image.shape[2:]]
            shapes.append((len(image), n, c.latent_channels, *size))
        return [standard_normal(s, image, generator).transpose(0, 1) for s in shapes]

    def descend(self, nets, seen, noise=None):
        """Ancestral sampling: z_L from the first of `nets`, then z_L-1 given z_L, ..., z_1.

        seen: a list of `encode` a net. noise: of `noise`; None is noise 0, the means. Every
        net is given these same latents, so that KLs compare like with like. Returns (latents,
        normals), fine to coarse: latents[level] (n * B, D, *s), all cases of a draw together;
        normals[level] a list, one per net.
        """
        z, latents, normals = None, [], []
        for level in reversed(range(self.config.latent_levels)):
            n = 1 if noise is None else len(noise[level])
            here = [net(level, s[level], z, n) for net, s in zip(nets, seen)]
            z = here[0].mean
            if noise is not None:
                z = z + here[0].std * noise[level].flatten(0, 1)
            latents.insert(0, z)
            normals.insert(0, here)
        return latents, normals

    def _chunk(self, image):
        """How many samples to compute at once, so that memory does not grow with n."""
        # the likelihood's finest level is the widest
        width = 3 * self.config.channels[len(self.config.channels) - self.config.latent_levels]
        return max(1, CHUNK // (image[:, 0].numel() * width))

    def _decode(self, latents, size, levels=None):
        """Logits (rows, K, *size) of latents; after the `levels` coarsest levels only if given."""
        maps = pyramid(self.likelihood(latents))
        level = 0 if levels is None else len(maps) - levels
        logits = F.interpolate(maps[level], scale_factor=2**level) if level else maps[0]
        return center_crop(logits, size)

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None, *,
               levels: int | None = None) -> Tensor:
        """n logit maps, (n, B, K, *S); the prior's encoder runs once whatever n is.

        levels: stop after so many levels, for the masks of Fig. 1; by default all of them.
        """
        if levels is not None and not 1 <= levels <= self.config.latent_levels:
            raise ValueError(f"levels={levels}: 1 (the coarsest) to {self.config.latent_levels}")
        seen, noise = self.encode(image), self.noise(image, n, generator)
        logits = image.new_empty(n, len(image), self.config.num_classes, *image.shape[2:])
        chunk = self._chunk(image)
        for i, out in enumerate(logits.split(chunk)):
            part = [e[i * chunk : (i + 1) * chunk] for e in noise]
            latents, _ = self.descend((self.prior,), (seen,), part)
            out.copy_(self._decode(latents, image.shape[2:], levels).view_as(out))
        return logits

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) with every level at its prior mean given the one below."""
        latents, _ = self.descend((self.prior,), (self.encode(image),))
        return self._decode(latents, image.shape[2:]).float().softmax(1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, *S) with every level at its posterior mean: how well z can say `label`."""
        latents, _ = self.descend((self.posterior,), (self.encode(image, label),))
        return self._decode(latents, image.shape[2:])

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int,
                       mask: Tensor | None = None) -> Tensor:
        """Lower bound of log p(y | x) in nats by importance sampling over the hierarchy, (B,):

            log (1/n) sum_i p(y | z^i) prod_l p(z_l^i | z_l+1^i, x) / q(z_l^i | z_l+1^i, y, x).

        On average n = 1 gives the ELBO; more samples tighten the bound.
        """
        label = valid_label(label, mask)
        seen, noise = (self.encode(image, label), self.encode(image)), self.noise(image, n)
        chunk, parts = self._chunk(image), []
        for start in range(0, n, chunk):
            part = [e[start : start + chunk] for e in noise]
            latents, normals = self.descend((self.posterior, self.prior), seen, part)
            logits = self._decode(latents, image.shape[2:]).unflatten(0, (-1, len(image)))
            ratio = sum(prior.log_prob(z) - posterior.log_prob(z)
                        for z, (posterior, prior) in zip(latents, normals))
            parts.append(ratio.view(-1, len(image)) - cross_entropy(logits, label))
        return torch.cat(parts).logsumexp(0) - math.log(n)


class LatentNet(nn.Module):
    """Prior or posterior: an encoder, and a normal for each of its L coarsest levels.

    The lists are fine to coarse, as the levels are numbered.
    """

    def __init__(self, c: PHiSegConfig, in_channels: int):
        super().__init__()
        self.config = c
        width, latents = c.channels[0], c.latent_channels
        self.encoder = nn.ModuleList(
            conv_block(c.dims, before, after, convs=c.convs)
            for before, after in zip((in_channels, *c.channels), c.channels))
        finer = c.latent_levels - 1  # levels that have a coarser one to be given
        features = c.channels[-c.latent_levels:]  # of the levels with latents

        def each(make):
            return nn.ModuleList(make(level) for level in range(finer))

        self.up = each(lambda i: conv_block(c.dims, latents, latents * width, convs=2))
        # the two halves of a convolution on concat(features, up): see "Differences" 3
        self.from_features = each(lambda i: CONV[c.dims](features[i], c.channels[i], 3, padding=1,
                                                         bias=False))
        self.from_z = each(lambda i: CONV[c.dims](latents * width, c.channels[i], 3, padding=1,
                                                  bias=False))
        self.join = each(lambda i: nn.Sequential(
            BATCH_NORM[c.dims](c.channels[i]), nn.ReLU(inplace=True),
            conv_block(c.dims, c.channels[i], c.channels[i]),
            CONV[c.dims](c.channels[i], 2 * latents, 1)))
        self.top = CONV[c.dims](features[-1], 2 * latents, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """What each level takes from the image; for the coarsest, its mean and log std."""
        features = []
        for block in self.encoder:
            x = POOL["average"][self.config.dims](x, 2) if features else x
            x = run(self, block, x)
            features.append(x)
        *fine, top = features[-self.config.latent_levels :]
        return [conv(x) for conv, x in zip(self.from_features, fine)] + [self.top(top)]

    def forward(self, level: int, seen: Tensor, z: Tensor | None, n: int) -> DiagonalNormal:
        """The normal of a level's latents, (n * B, D, *s), given those of the level below, z."""
        if z is None:
            moments = seen.repeat(n, *[1] * (seen.dim() - 1))
        else:
            moments = run(self, self._given, level, seen, z)
        return DiagonalNormal(*moments.chunk(2, 1))

    def _given(self, level, seen, z):
        z = self.from_z[level](self.up[level](double(z)))
        x = (z.unflatten(0, (-1, len(seen))) + seen).flatten(0, 1)
        return self.join[level](x)


class Likelihood(nn.Module):
    """Latents of all levels -> residual logits of all levels, both fine to coarse.

    z_l is doubled R - L times, joined by the way up from the coarser levels, and put out.
    """

    def __init__(self, c: PHiSegConfig):
        super().__init__()
        self.config, more = c, len(c.channels) - c.latent_levels
        levels = range(c.latent_levels)
        out = [*c.channels[more:-1], c.channels[c.latent_levels - 1]]  # width of each level's end
        self.enter = nn.ModuleList(
            conv_block(c.dims, c.latent_channels, c.channels[l], convs=2) for l in levels)
        self.finer = nn.ModuleList(
            nn.ModuleList(conv_block(c.dims, c.channels[l], c.channels[l]) for _ in range(more))
            for l in levels)
        self.up = nn.ModuleList(conv_block(c.dims, out[l + 1], c.channels[l]) for l in levels[:-1])
        self.join = nn.ModuleList(
            conv_block(c.dims, 2 * c.channels[l], out[l], convs=2) for l in levels[:-1])
        self.out = nn.ModuleList(CONV[c.dims](out[l], c.num_classes, 1) for l in levels)

    def forward(self, latents: list[Tensor]) -> list[Tensor]:
        residuals, x = [], None
        for level in reversed(range(len(latents))):
            x = run(self, self._level, level, latents[level], x)
            residuals.insert(0, self.out[level](x))
        return residuals

    def _level(self, level, z, coarser):
        x = self.enter[level](z)
        for block in self.finer[level]:
            x = block(double(x))
        if coarser is None:
            return x
        return self.join[level](torch.cat([x, self.up[level](double(coarser))], 1))


def pyramid(residuals: list[Tensor]) -> list[Tensor]:
    """Residual logits, fine to coarse -> the masks' logits: each level adds to those below it."""
    maps = [residuals[-1].float()]  # under autocast the sum would be rounded at every level
    for residual in residuals[-2::-1]:
        maps.insert(0, residual + F.interpolate(maps[0], scale_factor=2))
    return maps


def double(x: Tensor) -> Tensor:
    """Linear interpolation to twice the size."""
    return F.interpolate(x, scale_factor=2, mode=LINEAR[x.dim() - 2], align_corners=False)


def run(owner: nn.Module, function, *args):
    """function(*args); in training with `checkpoint`, without keeping what it computes between."""
    if not (owner.config.checkpoint and owner.training and torch.is_grad_enabled()):
        return function(*args)
    if torch.compiler.is_compiling():  # which counts a batch once by itself, and takes no contexts
        return checkpoint(function, *args, use_reentrant=False)
    contexts = lambda: (contextlib.nullcontext(), FrozenStatistics(owner))  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


class FrozenStatistics:
    """Batch norms leave their running statistics alone: those of a batch count once, not twice.

    A class, as every backward pass through the graph enters it again.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        self.before = [(m, m.momentum) for m in self.module.modules()
                       if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for m, _ in self.before:
            m.momentum = 0.0

    def __exit__(self, *_):  # by an exception too: a recomputation stops when it has all it needs
        for m, momentum in self.before:
            m.momentum = momentum


# ----------------------------------------------------------------------------------- pictures


if __name__ == "__main__":
    import time
    from analysis.paper_figures import plot_levels, plot_maps

    import data
    import metrics

    train, test = data.load("shapes", ("train", "test"), size=32)
    torch.manual_seed(0)
    model = PHiSeg(PHiSegConfig(num_classes=4, channels=(16, 32, 32, 32), latent_levels=3, convs=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = data.batches(train, 12, seed=0, augmentation=data.DATASETS["shapes"].augmentation)
    start, steps = time.monotonic(), 300
    for step, (image, label) in zip(range(1, steps + 1), batches):
        optimizer.param_groups[0]["lr"] = 2e-3 if step < 0.7 * steps else 5e-4
        optimizer.zero_grad()
        loss, terms = model(image, label)
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            left = (time.monotonic() - start) / step * (steps - step)
            print(f"step {step}/{steps}  " + "  ".join(f"{k} {v:.1f}" for k, v in terms.items())
                  + f"  {left:.0f} s left", flush=True)
    model.eval()
    probs = model.sample(test.images, 16, torch.Generator().manual_seed(0)).softmax(2)
    ged = metrics.ged(probs.argmax(2), test.labels, 4, test.weights)
    ncc = metrics.ncc(probs, test.labels, test.weights)
    print(f"GED {ged.mean():.3f}, NCC {ncc.mean():.3f} (16 samples, {len(test)} cases)")
    plot_levels(model, test.images[0], "phiseg_levels.png")
    some = test.subset(range(5))
    likeliest = some.weights.argsort(1, descending=True)[:, :4]
    error, gamma = metrics.error_map(probs[:, :5], some.labels, some.weights), \
        metrics.gamma_map(probs[:, :5])
    plot_maps("phiseg_maps.png", [
        dict(name=some.names[i], image=some.images[i], labels=some.labels[i, likeliest[i]],
             samples=probs[:, i].argmax(1), error=error[i], gamma=gamma[i], ncc=ncc[i])
        for i in range(5)])
    print("drawn: phiseg_levels.png (samples, level by level), phiseg_maps.png (error and gamma)")
