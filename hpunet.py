"""Hierarchical Probabilistic U-Net (Kohl et al. 2019, arXiv:1905.13077).

One image, many plausible masks, made from coarse to fine. The coarsest levels i = 0 .. L of a
U-Net's decoder have a latent map each, drawn given the image X and the coarser draws,
        z_i ~ N(mu_i(z_<i, X), sigma_i(z_<i, X)^2) =: p(z_i | z_<i, X),                      (Eq. 1)
and joined to the features it was predicted from, before both go up a level. A sample costs a run of
the decoder. Coarse latents come to decide on objects, fine ones on outlines. In training the draws
are those of a posterior net q of the same kind, which sees a reader's mask Y too (Eq. 3), and
        lambda (E_q[ -log P_c(Y | S(X, z)) ] - kappa)
            + sum_i E_q[ KL( q(z_i | z_<i, X, Y) || p(z_i | z_<i, X) ) ]                     (Eq. 6)
is minimised (GECO): lambda rises until the reconstruction reaches its target kappa, then falls and
leaves the pressure to the KL. The first term is summed over 2 % of the batch's pixels, drawn with
odds in proportion to their loss; kappa stands for so many nats a pixel drawn. What varies between
samples is aleatoric uncertainty: what the image leaves open.

A model of masks whose objects carry random class numbers segments instances: pixels of one object
change together from sample to sample (`cluster_instances`). One that is also given the labels
around a hidden region extrapolates them into it (`--data-args hide=50`).

Differences from the paper
  1. lambda = softplus(rho)^2, as in the authors' code. There Adam moves rho, by about the learning
     rate a step whatever the constraint (the gradient's factor 1e-2 is without effect); here rho is
     a buffer and moves by exactly lambda_rate, up while the constraint is violated, else down: no
     second optimiser, and a resumed run goes on exactly. It does not slow down as the learning rate
     drops: by the end of the LIDC run it is 20 times as fast as the authors'.
  2. The moving average is that of the whole constraint, and begins at the first batch; in the code
     it is that of the reconstruction, and kappa times the pixels kept is the batch's own. They are
     the same but where pixels are ignored. `objective="elbo"` is Eq. 5 with top_k=1 alone.
  3. The posterior stops at its last latents; the authors' goes up one level more, read by nobody.
  4. A convolution on concat(below, skip) is the sum of one for each, the skip's computed once for
     all samples. The nets predict log sigma, bounded (common.bounded_log_std).
  5. Learning rate: the paper gives both ends and "in 4 steps"; here by equal factors, 48k apart.
     These are LIDC's; the schedules of the other two sets cannot be given at the command line.
  6. App. D.1 speaks of 8 latent scales on LIDC; Sec. 2, Table 2 and the code have 4, as here.
  7. Clean-up of instances: an instance is painted over all at once. Weight decay adds 1e-5 w to the
     gradient w.r.t. w; the authors' penalty, 1e-5 |w|^2, twice that.
  8. The checkpoint judged is that of lowest validation GED; the paper names no choice.
  9. Any size is padded by reflection. In the posterior's one-hot mask, padding and ignored pixels
     (255) are zero in every class. 1D and 3D work as well (`dims`); the paper is 2D.

    python hpunet.py                 # a small one on made-up cells, a minute on two CPU cores
                                     # -> hpunet_scales.png (Fig. 3), hpunet_instances.png (Fig. 4)
    python train.py --model hpunet --data lidc --device cuda
with, for the paper's ablations (App. F) and its two other data sets (App. D),
    --model-args "latents=(0,0,0,1)"            # the most local latents alone
    --model-args "latents=(85,)" kappa=0.15     # global latents alone
    --model-args top_k=1                        # all pixels
    --data em --steps 450000 --batch-size 24
        --model-args "channels=(32,64,128,256,256,256,256,256,256)" kappa=1.2
    --data cityscapes --data-args task=cars --steps 100000 --batch-size 128 --lr 2e-4
        --model-args "channels=(32,64,128,256,256,256,256,256,256)" blocks=2 kappa=0.77
        lambda_rate=2e-4                        # and evaluate.py RUN --cluster 32 32
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import (CONV, IGNORE, POOL, DiagonalNormal, center_crop, check_choice, cross_entropy,
                    init_orthogonal, one_hot, pad_to_multiple, standard_normal, valid_label)

CHUNK = 2**24  # feature values computed at once when sampling: 64 MB in float32
DECAY = 0.99  # of the moving average, a step


@dataclass(frozen=True)
class HPUNetConfig:
    """Defaults are the paper's LIDC model."""

    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2  # spatial axes, 1 to 3
    channels: tuple[int, ...] = (24, 48, 96, 192, 192, 192, 192, 192)  # a resolution level each
    blocks: int = 3  # residual blocks a level, in encoder and decoder
    convs: int = 3  # 3-wide convolutions a block, at half its width
    latents: tuple[int, ...] = (1, 1, 1, 1)  # channels of z_0, z_1 .., coarse to fine; 0: no z_i
    objective: str = "geco"  # Eq. 6; or "elbo", Eq. 5 if top_k=1: reconstruction + beta KL
    kappa: float = 0.05  # GECO's target: nats a kept pixel
    lambda_rate: float = 1e-4  # of rho, a step: the learning rate, so give it with --lr
    beta: float = 1.0  # for "elbo"
    top_k: float = 0.02  # share of the batch's pixels that the loss keeps; 1: all


class HPUNet(nn.Module):
    """Hierarchical Probabilistic U-Net. Default: 20.58 M parameters, 11.18 M of them for sampling.

    Multiplications for n samples of a 128 x 128 image, in thousand millions: 1.30 + n x 1.31.
    """

    Config = HPUNetConfig
    TRAINING = dict(optimizer="adam", lr=1e-4, weight_decay=1e-5, batch_size=32, steps=240_000,
                    lr_drops=tuple((48_000 * k, 0.05 ** (k / 4)) for k in range(1, 5)))
    # 2 % of a small image would be few pixels. The target is one that a small net reaches early, so
    # that lambda stays near 1 and has time to fall: while it is high, z carries what x could tell.
    QUICK_CONFIG = dict(channels=(16, 32, 48, 48, 48, 48, 48), blocks=1, convs=2, top_k=0.1,
                        kappa=0.35, lambda_rate=1e-3)
    QUICK_TRAINING = dict(lr=1.5e-3, lr_drops=((900, 0.3),), batch_size=8, steps=1200)

    def __init__(self, config: HPUNetConfig = HPUNetConfig()):
        super().__init__()
        self.config = c = config
        check_choice("dims", c.dims, (1, 2, 3))
        check_choice("objective", c.objective, ("geco", "elbo"))
        if not (0 < len(c.latents) < len(c.channels) and min(c.latents) >= 0 < c.latents[-1]):
            raise ValueError(f"latents={c.latents}: 1 to {len(c.channels) - 1} numbers (fewer than "
                             "channels) from 0 up, the last one at least 1")
        if not 0 < c.top_k <= 1:
            raise ValueError(f"top_k={c.top_k}: above 0 and at most 1")
        self.multiple = 2 ** (len(c.channels) - 1)
        self.unet = LatentUNet(c, c.in_channels, len(c.channels) - 1)
        self.out = CONV[c.dims](c.channels[0], c.num_classes, 1)
        self.posterior = LatentUNet(c, c.in_channels + c.num_classes, len(c.latents) - 1)
        init_orthogonal(self)
        # GECO: lambda = softplus(rho)^2 is 1 at first
        self.register_buffer("rho", torch.tensor(math.log(math.e - 1)))
        self.register_buffer("constraint", torch.zeros(()))  # its moving average
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))

    def loss(self, image: Tensor, label: Tensor, mask: Tensor | None = None):
        """Eq. 6 or 5: (loss in nats, summed over pixels and averaged over the batch; its terms).

        image (B, C, *S), label int64 (B, *S) with 255 ignored, mask bool (B, *S). Terms:
        `reconstruction`, the kept pixels' cross-entropy, and reconstruction_per_pixel, its mean
        over them; kl_<i>, the KL of z_i, and kl, their sum; for GECO `lambda` and
        `constraint`, reconstruction - kappa * kept pixels (in training, its moving average).
        """
        c, label = self.config, valid_label(label, mask)
        noise = self.noise(image, 1)
        _, latents, posteriors = self.posterior(self.encode(image, label), drawn(noise))
        x, _, priors = self.unet(self.encode(image), given(latents))
        kls = {f"kl_{level}": q.kl(priors[level]).mean() for level, q in posteriors.items()}
        kl = sum(kls.values())

        logits = center_crop(self.out(x), label.shape[1:]).float()
        error = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")  # (B, *S)
        kept = hard_pixels(error.detach(), c.top_k) & (label != IGNORE)
        reconstruction, count = (t.sum() / len(label) for t in (error * kept, kept))
        terms = dict(reconstruction=reconstruction, kl=kl, **kls,
                     reconstruction_per_pixel=reconstruction / count.clamp(min=1e-6))
        if c.objective == "elbo":
            loss = reconstruction + c.beta * kl
        else:
            constraint, weight = self._constrain(reconstruction - c.kappa * count)
            loss = weight * constraint + kl
            terms |= {"constraint": constraint, "lambda": weight}
        return loss, {name: term.detach() for name, term in terms.items()}

    forward = loss

    def _constrain(self, constraint):
        """(the constraint, in training with its moving average's value and its own gradient;
        lambda). Training moves the average, and then lambda for the next step."""
        weight = F.softplus(self.rho).square()
        if self.training:
            now = constraint.detach().clone()
            if dist.is_initialized():
                dist.all_reduce(now)
                now /= dist.get_world_size()
            average = torch.where(self.steps_seen == 0, now, now.lerp(self.constraint, DECAY))
            self.constraint.copy_(average)
            self.rho += self.config.lambda_rate * average.sign()
            self.steps_seen += 1
            constraint = constraint + (average - constraint).detach()
        return constraint, weight

    def encode(self, image: Tensor, label: Tensor | None = None) -> tuple:
        """What the samples have in common: all that the U-Net, or with a label the posterior,
        computes before its first latent is drawn."""
        image = pad_to_multiple(image, self.multiple)
        if label is None:
            return self.unet.encode(image)
        hot = one_hot(label, self.config.num_classes, image.shape[2:])
        return self.posterior.encode(torch.cat([image, hot], 1))

    def noise(self, image: Tensor, n: int, generator: torch.Generator | None = None):
        """Standard normal noise for n draws of every latent map: {level: (n, B, D, *s)}."""
        noise = {}
        for level, width in enumerate(self.config.latents):
            if width:
                halved = len(self.config.channels) - 1 - level
                size = [-(-s // self.multiple) * self.multiple >> halved for s in image.shape[2:]]
                shape = (len(image), n, width, *size)
                noise[level] = standard_normal(shape, image, generator).transpose(0, 1)
        return noise

    def _chunks(self, image, n, noise):
        """(range of samples, their noise), so few at once that memory does not grow with n."""
        width = 4 * self.config.channels[0]  # what the finest level's blocks hold at a time
        step = max(1, CHUNK // (image[:, 0].numel() * width))
        for i in range(0, n, step):
            rows = range(i, min(i + step, n))
            yield rows, {level: e[i : i + step] for level, e in noise.items()}

    def _logits(self, x, size, n=1):
        """The U-Net's last features (n * B, C, *s) -> logits (n, B, K, *size)."""
        return center_crop(self.out(x), size).unflatten(0, (n, -1))

    @torch.no_grad()
    def sample(self, image: Tensor, n: int, generator: torch.Generator | None = None, *,
               scales: Collection[int] | None = None) -> Tensor:
        """n logit maps, (n, B, K, *S); the encoder runs once whatever n is.

        scales: levels whose latents are drawn, 0 the most global; the others stand at their mean
            given the coarser ones (Fig. 3). By default all are drawn.
        """
        seen, noise = self.encode(image), self.noise(image, n, generator)
        if not set(scales or ()) <= noise.keys():
            raise ValueError(f"scales={tuple(scales)}: choose from {', '.join(map(str, noise))}")
        logits = image.new_empty(n, len(image), self.config.num_classes, *image.shape[2:])
        for rows, part in self._chunks(image, n, noise):
            x, _, _ = self.unet(seen, drawn(part, scales), len(rows))
            logits[rows.start : rows.stop] = self._logits(x, image.shape[2:], len(rows))
        return logits

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Probabilities (B, K, *S) with every level at its prior mean given the coarser ones."""
        x, _, _ = self.unet(self.encode(image), at_mean)
        return self._logits(x, image.shape[2:])[0].float().softmax(1)

    @torch.no_grad()
    def reconstruct(self, image: Tensor, label: Tensor) -> Tensor:
        """Logits (B, K, *S) at the posterior means: how well z can say `label` (IoU_rec)."""
        _, latents, _ = self.posterior(self.encode(image, label), at_mean)
        x, _, _ = self.unet(self.encode(image), given(latents))
        return self._logits(x, image.shape[2:])[0]

    @torch.no_grad()
    def log_likelihood(self, image: Tensor, label: Tensor, n: int,
                       mask: Tensor | None = None) -> Tensor:
        """Lower bound of log p(y | x) in nats by importance sampling over the hierarchy, (B,):

            log (1/n) sum_k P_c(y | S(x, z^k)) prod_i p(z_i^k | z_<i^k, x) / q(z_i^k | z_<i^k, x, y)

        with z^k from q, over all pixels. On average n = 1 gives the ELBO; more tighten the bound.
        """
        label = valid_label(label, mask)
        asked, seen, noise = self.encode(image, label), self.encode(image), self.noise(image, n)
        parts = []
        for rows, part in self._chunks(image, n, noise):
            _, latents, posteriors = self.posterior(asked, drawn(part), len(rows))
            x, _, priors = self.unet(seen, given(latents), len(rows))
            ratio = sum(priors[level].log_prob(z) - posteriors[level].log_prob(z)
                        for level, z in latents.items())
            error = cross_entropy(self._logits(x, image.shape[2:], len(rows)), label)
            parts.append(ratio.view(len(rows), -1) - error)
        return torch.cat(parts).logsumexp(0) - math.log(n)


# Where a net takes its latents from: functions (level, its normal there) -> latents.


def drawn(noise: dict[int, Tensor], scales: Collection[int] | None = None) -> Callable:
    """Draws of its own normals, made with `noise`; means where `scales` leaves a level out."""
    def draw(level, normal):
        if scales is not None and level not in scales:
            return normal.mean
        return normal.mean + normal.std * noise[level].flatten(0, 1)
    return draw


def at_mean(level: int, normal: DiagonalNormal) -> Tensor:
    """The means of its own normals."""
    return normal.mean


def given(latents: dict[int, Tensor]) -> Callable:
    """Not its own: those that another net, the posterior, drew."""
    return lambda level, normal: latents[level]


class LatentUNet(nn.Module):
    """A U-Net with latents at its coarsest decoder levels. The posterior is one, and goes up no
    further than to its last latents.

    Decoder levels count from the coarsest, 0, to `top`; the lists are in this order.
    """

    def __init__(self, c: HPUNetConfig, in_channels: int, top: int):
        super().__init__()
        self.pool = POOL["average"][c.dims]
        self.start = next(level for level, width in enumerate(c.latents) if width)
        out, z = c.channels[::-1], (*c.latents, *[0] * len(c.channels))

        def blocks(*widths):
            return nn.Sequential(*[ResBlock(c.dims, *pair, c.convs)
                                   for pair in zip(widths, widths[1:])])

        self.encoder = nn.ModuleList(blocks(before, *[after] * c.blocks) for before, after
                                     in zip((in_channels, *c.channels), c.channels))
        self.heads = nn.ModuleDict({str(i): CONV[c.dims](out[i], 2 * width, 1)
                                    for i, width in enumerate(c.latents) if width})
        self.joins = nn.ModuleList(UpBlock(c.dims, out[i] + z[i], out[i + 1], c.convs)
                                   for i in range(top))
        self.decoder = nn.ModuleList(blocks(*[out[i + 1]] * c.blocks) for i in range(top))

    def encode(self, x: Tensor) -> tuple:
        """Image (B, C, *S), sizes multiples of 2^(levels - 1) -> what no latent has a part in: the
        features and moments where the first are drawn, and each level's share of its skip."""
        skips = []
        for blocks in self.encoder:
            x = blocks(self.pool(x, 2) if skips else x)
            skips.append(x)
        x = skips.pop()
        skips = [join.encode(skip) for join, skip in zip(self.joins, reversed(skips))]
        for level in range(self.start):
            x = self.decoder[level](self.joins[level](x, skips[level]))
        return x, self.heads[str(self.start)](x), skips

    def forward(self, seen: tuple, draw: Callable, n: int = 1):
        """(features of the top level, {level: latents}, {level: their normals}), each of n * B
        rows, the cases of a sample together. `draw`: `drawn`, `at_mean` or `given`."""
        x, moments, skips = seen
        x, moments = (t.repeat(n, *[1] * (t.dim() - 1)) for t in (x, moments))
        latents, normals = {}, {}
        for level in range(self.start, len(self.decoder) + 1):
            if str(level) in self.heads:
                if level > self.start:
                    moments = self.heads[str(level)](x)
                normals[level] = DiagonalNormal(*moments.chunk(2, 1))
                latents[level] = draw(level, normals[level])
                x = torch.cat([x, latents[level].to(x.dtype)], 1)
            if level < len(self.decoder):
                x = self.decoder[level](self.joins[level](x, skips[level]))
        return x, latents, normals


class ResBlock(nn.Module):
    """Pre-activated residual block (App. D): `convs` 3-wide convolutions at half the width and a
    1-wide one back to it; a 1-wide one beside them where the width changes."""

    def __init__(self, dims: int, before: int, after: int, convs: int):
        super().__init__()
        conv, half = CONV[dims], max(1, after // 2)
        self.first = conv(before, half, 3, padding=1)
        self.rest = nn.Sequential()
        for _ in range(convs - 1):
            self.rest.extend([nn.ReLU(inplace=True), conv(half, half, 3, padding=1)])
        self.rest.append(conv(half, after, 1))
        self.skip = conv(before, after, 1) if before != after else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.rest(self.first(x.relu()))


class UpBlock(ResBlock):
    """A residual block on concat(x at twice its size, skip), which is never put together."""

    def __init__(self, dims: int, below: int, after: int, convs: int):
        super().__init__(dims, below + after, after, convs)

    def encode(self, skip):
        """The share of the skip connection in the two convolutions that meet it, with biases."""
        return partly(self.first, skip.relu(), last=True), partly(self.skip, skip, last=True)

    def forward(self, x, seen):
        first = add(partly(self.first, double(x.relu())), seen[0])
        skip = add(double(partly(self.skip, x)), seen[1])  # 1-wide: before doubling it costs less
        return skip + self.rest(first)


def partly(conv: nn.Module, x: Tensor, last: bool = False) -> Tensor:
    """What x, the first of the input's channels, adds to `conv`'s output; or the last, and bias."""
    weight = conv.weight[:, -x.shape[1] :] if last else conv.weight[:, : x.shape[1]]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    return convolve(x, weight, conv.bias if last else None, padding=conv.padding)


def double(x: Tensor) -> Tensor:
    """Twice the size by repetition."""
    return F.interpolate(x, scale_factor=2)


def add(x: Tensor, shared: Tensor) -> Tensor:
    """x of n * B rows + shared of B."""
    return (x.unflatten(0, (-1, len(shared))) + shared).flatten(0, 1)


def hard_pixels(error: Tensor, share: float) -> Tensor:
    """Stochastic top-k: where the loss looks, a `share` of all pixels of the batch, (B, *S) bool.

    error (B, *S) >= 0. Pixels are drawn one after the other without replacement, with odds
    proportional to `error`: the largest log error + Gumbel noise. Its exponential is taken here,
    error / E with E ~ Exp(1). With several processes, the batch is the global one.
    """
    if share == 1:
        return torch.ones_like(error, dtype=torch.bool)
    whole, rank = error.contiguous(), 0
    if dist.is_initialized():
        parts = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, whole)
        whole, rank = torch.cat(parts), dist.get_rank()
    # E = 0 would make 0 / 0, which counts as the largest
    score = (whole / torch.empty_like(whole).exponential_().clamp_(min=1e-20)).flatten()
    top = score.topk(max(1, round(share * len(score))), sorted=False).indices
    kept = torch.zeros_like(score, dtype=torch.bool).index_fill_(0, top, True).view(whole.shape)
    return kept[rank * len(error) : (rank + 1) * len(error)]


# ------------------------------------------------------------------------------------- instances


# ----------------------------------------------------------------------------------- pictures


if __name__ == "__main__":
    import time
    from analysis.instances import clean_instances, cluster_instances, plot_instances
    from analysis.paper_figures import plot_scales

    import data
    import metrics

    train, test = data.load("cells", ("train", "test"), size=32)
    torch.manual_seed(0)
    model = HPUNet(HPUNetConfig(num_classes=16, channels=(16, 32, 32), blocks=1, convs=1,
                                latents=(2, 1), kappa=1.3, top_k=0.2, lambda_rate=5e-3))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    batches = data.batches(train, 8, seed=0, augmentation=data.DATASETS["cells"].augmentation)
    start, steps = time.monotonic(), 1300
    for step, (image, label) in zip(range(1, steps + 1), batches):
        optimizer.param_groups[0]["lr"] = 4e-3 if step < 0.7 * steps else 1e-3
        optimizer.zero_grad()
        loss, terms = model(image, label)
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            left = (time.monotonic() - start) / step * (steps - step)
            print(f"step {step}/{steps}  " + "  ".join(f"{k} {v:.2f}" for k, v in terms.items())
                  + f"  {left:.0f} s left", flush=True)
    model.eval()
    test = test.subset(range(20))
    samples = model.sample(test.images, 16, torch.Generator().manual_seed(0)).argmax(2)
    # smaller boxes than the paper's: these cells are but 6 to 8 pixels wide
    found = torch.stack([clean_instances(cluster_instances(s), 3, 7) for s in samples.unbind(1)])
    error = metrics.rand_error(found, test.instances.long())
    print(f"instances clustered from 16 samples: Rand error {error.mean():.3f}")
    again = model.reconstruct(test.images, test.labels[:, 0].long()).argmax(1)
    plot_instances("hpunet_instances.png", [
        dict(name=test.names[i], image=test.images[i], truth=test.instances[i], found=found[i],
             again=again[i], samples=samples[:, i]) for i in range(4)])
    plot_scales(model, test.images[0], "hpunet_scales.png")
    print("samples, scale by scale: hpunet_scales.png; instances: hpunet_instances.png")
