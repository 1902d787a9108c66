"""Swin-Unet (Cao et al. 2021, arXiv:2105.05537): a U-Net whose blocks are self-attention within
windows (Swin Transformer, Liu et al. 2021, arXiv:2103.14030) instead of convolutions. There are no
pre-trained weights. Inside this file, maps are (B, H, W, C)."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import uniform


class SwinUNet(nn.Module):
    """Encoder and decoder. The caller adds the 1-wide convolution that predicts logits.

    width: channels of the finest level; they double at every coarser one.
    depths, heads: blocks and attention heads of each level, fine to coarse, in the decoder too.
    patch: side, in pixels, of the square that becomes one token of the finest level.
    window: side, in tokens, of an attention window; a smaller map is a single window.
    joined: channels that the caller concatenates to every skip connection before `decode`.
    drop_path: rate of DropPath in the encoder's last block; it grows linearly from 0 in the first.
    decoder: False leaves out the decoder and all that only the decoder uses.
    """

    def __init__(self, in_channels: int, *, width: int = 96, depths: tuple[int, ...] = (2, 2, 2, 1),
                 heads: tuple[int, ...] = (3, 6, 12, 24), patch: int = 4, window: int = 7,
                 joined: int = 0, drop_path: float = 0.0, decoder: bool = True):
        super().__init__()
        self.channels = channels = tuple(width * 2**level for level in range(len(depths)))
        if len(heads) != len(depths) or any(c % h for c, h in zip(channels, heads)):
            raise ValueError(f"Swin-Unet with depths={depths}, heads={heads}, channels {channels}: "
                             "depths and heads are of one length, and heads divide channels")
        self.out_channels, self.multiple = width, patch * 2 ** (len(depths) - 1)
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        self.enter = nn.ModuleList([nn.Sequential(  # from pixels to tokens
            Gather(patch), nn.Linear(patch**2 * in_channels, width), nn.LayerNorm(width))])
        for c in channels[1:]:
            self.enter.append(nn.Sequential(Gather(2), nn.LayerNorm(2 * c),
                                            nn.Linear(2 * c, c, bias=False)))
        self.encoder = nn.ModuleList(swin_blocks(*level, window)
                                     for level in zip(channels, heads, rates))
        self.encoder[-1].append(nn.LayerNorm(channels[-1]))
        self.decoder = nn.ModuleList()
        if decoder:
            for level in reversed(range(len(depths) - 1)):
                c = channels[level]
                self.decoder.append(nn.ModuleDict(dict(
                    up=nn.Sequential(nn.Linear(2 * c, 4 * c, bias=False), Scatter(2),
                                     nn.LayerNorm(c)),
                    join=nn.Linear(2 * c + joined, c),
                    blocks=swin_blocks(c, heads[level], rates[level], window))))
            self.to_pixels = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, patch**2 * width, bias=False),
                Scatter(patch), nn.LayerNorm(width))
        embedding = self.enter[0][1]  # a convolution in the published code, with PyTorch's weights
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not embedding:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not decoder:  # a skip connection is taken before its level's blocks; the rest is unused
            del self.enter[-1], self.encoder[-2:]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Image (B, C, H, W) -> skip connections (B, C_i, H_i, W_i), fine to coarse, then the
        coarsest features. As in the published code, a skip connection holds the features before
        its level's blocks."""
        features, x = [], x.movedim(1, -1)  # (B, H, W, C)
        for level, enter in enumerate(self.enter):
            x = enter(x)  # (B, H_i, W_i, C_i)
            features.append(x)
            if level < len(self.encoder):
                x = self.encoder[level](x)
        features[-1] = x
        return [f.movedim(-1, 1) for f in features]

    def decode(self, features: list[Tensor]) -> Tensor:
        """Output of `encode`, with `joined` more channels on the skips -> (B, width, H, W)."""
        *skips, x = [f.movedim(1, -1) for f in features]  # each (B, H_i, W_i, C_i)
        for stage, skip in zip(self.decoder, reversed(skips)):
            x = stage["join"](torch.cat([stage["up"](x), skip], -1))
            x = stage["blocks"](x)
        return self.to_pixels(x).movedim(-1, 1)


class Gather(nn.PixelUnshuffle):
    """(B, H, W, C) -> (B, H/s, W/s, C*s*s): each square of s*s tokens becomes one token."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class Scatter(nn.PixelShuffle):
    """The inverse of Gather."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def swin_blocks(channels: int, heads: int, rates: Tensor, window: int) -> nn.Sequential:
    """One block for each DropPath rate. In every second block, windows are shifted by half a side,
    so that tokens of neighbouring windows can attend to each other."""
    return nn.Sequential(*[SwinBlock(channels, heads, window, window // 2 * (i % 2), rate)
                           for i, rate in enumerate(rates.tolist())])


class SwinBlock(nn.Module):
    """Self-attention within windows, then an MLP on every token: (B, H, W, C) -> the same shape.

    A token attends to the tokens of its window, with a learned bias for each relative position. The
    borders of the windows are moved by `shift` tokens on axes that are longer than a window.
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int, drop_path: float = 0.0):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(),
                                 nn.Linear(4 * channels, channels))
        self.drop_path = DropPath(drop_path)
        self.bias = nn.Parameter(torch.empty(heads, (2 * window - 1) ** 2))
        nn.init.trunc_normal_(self.bias, std=0.02)
        offset = torch.arange(window)[:, None] - torch.arange(window) + window - 1  # query - key
        index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
        self.register_buffer("index", index, persistent=False)  # (w, w) queries, (w, w) keys

    def forward(self, x):
        x = x + self.drop_path(self.attend(self.norms[0](x)))
        return x + self.drop_path(self.mlp(self.norms[1](x)))

    def attend(self, x):
        """Attention within (shifted) windows, (B, H, W, C) -> the same shape."""
        count, height, width, channels = x.shape
        h, w = min(self.window, height), min(self.window, width)  # sides of a window
        shifts = [self.shift if side > self.window else 0 for side in (height, width)]
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % h)).roll([-s for s in shifts], (1, 2))
        rows, columns = x.shape[1] // h, x.shape[2] // w  # x is (B, rows*h, columns*w, C)
        # windows are an axis beside the heads, so that the whole batch shares one mask
        q, k, v = (self.qkv(x).view(count, rows, h, columns, w, 3, self.heads, -1)
                   .permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, B, rows, columns, heads, h, w, C/heads)
                   .reshape(3, count, -1, h * w, channels // self.heads))
        bias = self.bias.index_select(1, self.index[:h, :w, :h, :w].flatten()).to(q)
        hidden = hidden_keys((height, width), (h, w), shifts, x.device)[:, None]
        bias = bias.view(1, self.heads, h * w, h * w).masked_fill(hidden, -math.inf)
        bias = bias.flatten(0, 1)[None]  # (1, windows*heads, h*w, h*w)
        x = F.scaled_dot_product_attention(q, k, v, bias)  # (B, windows*heads, h*w, C/heads)
        x = x.view(count, rows, columns, self.heads, h, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(count, rows * h, columns * w, channels).roll(shifts, (1, 2))
        return self.out(x[:, :height, :width])


def hidden_keys(size, window, shifts, device) -> Tensor:
    """True where a query must not attend to a key of its window: (windows, h*w queries, h*w keys).

    The map of `size` was padded at its ends to whole windows (h, w) and rolled by -shifts. Rolling
    brings opposite edges of the map into one window; they, and the padding, must not attend to each
    other. (The mask is computed in every pass, which takes 1 % of a block's time.)
    """
    region = torch.zeros((), dtype=torch.long, device=device)
    for side, length, shift in zip(size, window, shifts):
        padded = side + -side % length
        origin = torch.arange(shift, padded + shift, device=device) % padded
        region = 4 * region[..., None] + 2 * (origin >= side) + (origin < shift)
    h, w = window  # region is (rows*h, columns*w)
    region = region.unflatten(1, (-1, w)).unflatten(0, (-1, h)).transpose(1, 2)
    region = region.reshape(-1, h * w)  # (windows, h*w)
    return region[:, :, None] != region[:, None]


class DropPath(nn.Module):
    """Stochastic depth: training skips a residual layer for each case with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path={rate}: at least 0 and below 1")
        self.rate, self.generator = rate, None

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        kept = uniform((len(x), 1, 1, 1), x, self.generator) >= self.rate
        return x * kept / (1 - self.rate)


@contextlib.contextmanager
def dropping_paths(model: nn.Module, generator: torch.Generator | None):
    """Context in which DropPath is active, drawing from `generator`, although in eval mode."""
    paths = [module for module in model.modules() if isinstance(module, DropPath)]
    for path in paths:
        path.training, path.generator = True, generator
    try:
        yield
    finally:
        for path in paths:
            path.training, path.generator = model.training, None
