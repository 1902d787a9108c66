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

from common import (CONV, IGNORE, DiagonalNormal, UNet, center_crop, check_choice, conv_block,
                    cross_entropy, new_figure, one_hot, pad_to_multiple, paint_image, paint_label,
                    paint_map, save_figure, save_grid, show_image, show_map, valid_label)

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
        Backbone = {"unet": LatentUNet, "swin": SwinUNet}[c.backbone]
        self.backbone = Backbone(c, c.in_channels)
        self.skips = latent_skips(c, self.backbone.channels)
        self.head = CONV[c.dims](self.backbone.out_channels, c.num_classes, 1)
        self.mask_net = Backbone(c, c.num_classes)  # its features serve for p(z | Y) alone
        self.mask_net.decoder = None
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
    for parameter in skips.parameters() if c.backbone == "swin" else ():
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


class LatentUNet(UNet):
    """The U-Net of common.py, its decoder widened for the latents of every level."""

    def __init__(self, c: VAEUNetConfig, in_channels: int):
        super().__init__(in_channels, c.channels, dims=c.dims, convs=c.convs)
        self.channels, self.out_channels = c.channels, c.channels[0]
        below = [c.channels[-1] + c.latent_dim, *c.channels[-2:0:-1]]
        self.decoder = nn.ModuleList(
            conv_block(c.dims, before + skip + c.latent_dim, skip, convs=c.convs)
            for before, skip in zip(below, c.channels[-2::-1]))


class SwinUNet(nn.Module):
    """Swin-Unet (Cao et al. 2021, arXiv:2105.05537) in short: a U-Net of windowed attention.

    Inside, maps are (B, H, W, C). No stochastic depth, no pre-trained weights.
    """

    def __init__(self, c: VAEUNetConfig, in_channels: int):
        super().__init__()
        levels = range(len(c.depths))
        self.channels = width = tuple(c.width * 2**level for level in levels)
        if c.dims != 2 or len(c.heads) != len(width) or any(w % h for w, h in zip(width, c.heads)):
            raise ValueError(f"backbone='swin' with dims={c.dims}, depths={c.depths}, heads="
                             f"{c.heads}, channels {width}: dims is 2, depths and heads are of one "
                             "length, and heads divide channels")
        self.out_channels = c.width
        self.multiple = c.patch * 2 ** (len(c.depths) - 1)

        def blocks(level):
            return [SwinBlock(width[level], c.heads[level], c.window, c.window // 2 * (i % 2))
                    for i in range(c.depths[level])]

        self.encoder = nn.ModuleList()
        for level in levels:
            if level == 0:  # from pixels to tokens
                enter = [Gather(c.patch), nn.Linear(c.patch**2 * in_channels, c.width),
                         nn.LayerNorm(c.width)]
            else:
                enter = [Gather(2), nn.LayerNorm(2 * width[level]),
                         nn.Linear(2 * width[level], width[level], bias=False)]
            self.encoder.append(nn.Sequential(*enter, *blocks(level)))
        self.encoder[-1].append(nn.LayerNorm(width[-1]))
        self.decoder = nn.ModuleList()
        for level in reversed(levels[:-1]):
            above, skip = width[level + 1], width[level]
            above += c.latent_dim if level == levels[-2] else 0
            self.decoder.append(nn.ModuleDict(dict(
                up=nn.Sequential(nn.Linear(above, 4 * skip, bias=False), Scatter(2),
                                 nn.LayerNorm(skip)),
                join=nn.Linear(2 * skip + c.latent_dim, skip),
                blocks=nn.Sequential(*blocks(level)))))
        self.decoder.append(nn.Sequential(  # from tokens back to pixels
            nn.LayerNorm(c.width), nn.Linear(c.width, c.patch**2 * c.width, bias=False),
            Scatter(c.patch), nn.LayerNorm(c.width)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> features (B, C_i, H_i, W_i) of every level, fine to coarse."""
        features, x = [], x.movedim(1, -1)
        for stage in self.encoder:
            x = stage(x)
            features.append(x.movedim(-1, 1))
        return features

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features with latents of every level, as `encode` lists them -> (B, C, H, W)."""
        *skips, x = [f.movedim(1, -1) for f in features]
        *stages, last = self.decoder
        for stage in stages:
            x = stage["join"](torch.cat([stage["up"](x), skips.pop()], -1))
            x = stage["blocks"](x)
        return last(x).movedim(-1, 1)


class Gather(nn.Module):
    """(B, H, W, C) -> (B, H/s, W/s, s*s*C): squares of s*s tokens become one."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x):
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))  # (B, h, s, w, s, C)
        return x.transpose(2, 3).flatten(3)


class Scatter(Gather):
    """The inverse of Gather."""

    def forward(self, x):
        x = x.unflatten(3, (self.side, self.side, -1))  # (B, h, w, s, s, C)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SwinBlock(nn.Module):
    """Self-attention within windows, then two layers on every token (Liu et al. 2021).

    (B, H, W, C) -> the same. A token attends to those of its window of window^2 tokens, with a
    learned bias for each relative position. `shift` moves the windows' borders by so many tokens,
    on axes longer than a window.
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(),
                                 nn.Linear(4 * channels, channels))
        self.bias = nn.Parameter(0.02 * torch.randn(heads, (2 * window - 1) ** 2))
        offset = torch.arange(window)[:, None] - torch.arange(window) + window - 1  # query - key
        index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
        self.register_buffer("index", index.reshape(window**2, window**2), persistent=False)

    def forward(self, x):
        x = x + self.attend(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))

    def attend(self, x):
        """Attention within (shifted) windows, (B, H, W, C) -> the same shape."""
        (count, height, width, channels), w = x.shape, self.window
        shifts = tuple(self.shift if side > w else 0 for side in (height, width))
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w)).roll([-s for s in shifts], (1, 2))
        rows, columns = x.shape[1] // w, x.shape[2] // w
        # windows beside the heads, so that one mask serves the whole batch
        q, k, v = (self.qkv(x).view(count, rows, w, columns, w, 3, self.heads, -1)
                   .permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, count, -1, w * w,
                                                            channels // self.heads))
        bias = self.bias[:, self.index].to(q)  # (heads, w*w, w*w)
        hidden = hidden_keys((height, width), w, shifts, x.device)  # (windows, w*w, w*w)
        bias = bias.masked_fill(hidden[:, None], -math.inf).flatten(0, 1)
        x = F.scaled_dot_product_attention(q, k, v, bias[None])
        x = x.view(count, rows, columns, self.heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(count, rows * w, columns * w, channels).roll(shifts, (1, 2))
        return self.out(x[:, :height, :width])


def hidden_keys(size, window: int, shifts, device) -> Tensor:
    """Which tokens of a window a token must not see: bool (windows, w*w queries, w*w keys).

    The map of `size` was padded at its ends to whole windows and rolled by -shifts. Rolling puts
    opposite edges into one window, and they see each other no more than they see padding.
    """
    region = torch.zeros((), dtype=torch.long, device=device)
    for side, shift in zip(size, shifts):
        padded = side + -side % window
        origin = torch.arange(shift, padded + shift, device=device) % padded
        region = 4 * region[..., None] + 2 * (origin >= side) + (origin < shift)
    region = Gather(window)(region[None, ..., None]).flatten(0, 2)  # (windows, w*w)
    return region[:, :, None] != region[:, None]


# ----------------------------------------------------------------------------------- pictures


@torch.no_grad()
def draw_latents(model: VAEUNet, image: Tensor, path: str) -> None:
    """Fig. 11: mean and log variance of the (first) latent of every level; image (C, H, W)."""
    latents = model.encode(image[None])[1]
    size = pad_to_multiple(image[None], model.backbone.multiple).shape[2:]
    figure, axes = new_figure(2, 1 + len(latents), panel=1.9)
    show_image(axes[0, 0], image, "image")
    for level, (q, column) in enumerate(zip(latents, axes[:, 1:].T)):
        maps = {f"mean, level {level}": q.mean, "log variance": 2 * q.log_std}
        for ax, (title, values) in zip(column, maps.items()):
            values = F.interpolate(values[:, :1], size)[0, 0]  # nearest
            picture = show_map(ax, center_crop(values, image.shape[1:]), title)
            figure.colorbar(picture, ax=ax, shrink=0.7).ax.tick_params(labelsize=6)
    save_figure(figure, path)


def draw_samples(model: VAEUNet, images: dict[str, Tensor], path: str) -> None:
    """Fig. 2: image, prediction, uncertainty map, samples; images {name: (C, H, W)} of one size."""
    import metrics

    batch = torch.stack(list(images.values()))
    probs = model.sample(batch, 16, torch.Generator().manual_seed(0)).softmax(2)
    predictions, maps = model.predict(batch).argmax(1), metrics.uncertainty_map(probs)
    rows = {}
    for i, (name, image) in enumerate(images.items()):
        labels = [paint_label(label, image) for label in probs[:6, i].argmax(1)]
        rows[name] = [paint_image(image), paint_label(predictions[i], image),
                      paint_map(maps[i], 1), *labels]
    columns = ["image", "prediction", "uncertainty", *(f"sample {m}" for m in range(1, 7))]
    save_grid(path, rows, columns)


if __name__ == "__main__":
    import time

    import data
    import metrics

    train, test = data.load("organs", ("train", "test"))
    torch.manual_seed(0)
    model = VAEUNet(VAEUNetConfig(num_classes=6, channels=(8, 16, 32, 64), convs=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    batches = data.batches(train, 8, seed=0, augmentation=data.AUGMENTATION["organs"])
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
    draw_samples(model, {"image": sharp, "another": test.images[5], "blurred": blurred,
                         "a patch": patched}, "vae_unet_samples.png")
    draw_latents(model, sharp, "vae_unet_latents.png")
    print("samples and uncertainty: vae_unet_samples.png, latents: vae_unet_latents.png")
