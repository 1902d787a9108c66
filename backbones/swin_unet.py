"""Swin-Unet (Cao et al. 2021, arXiv:2105.05537): a U-Net of windowed self-attention (Liu et al.
2021, arXiv:2103.14030). Inside, maps are (B, H, W, C)."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwinUNet(nn.Module):
    """Swin-Unet without stochastic depth and pre-trained weights.

    width: channels of the finest level, doubled at every coarser one.
    depths, heads: blocks and attention heads of each level, fine to coarse; the decoder has as
        many blocks.
    patch: pixels a side that become one token of the finest level.
    window: tokens a side that attend to one another.
    joined: channels that are concatenated to the features of every level before `decode`.
    """

    def __init__(self, in_channels: int, *, width: int = 96, depths: tuple[int, ...] = (2, 2, 2, 1),
                 heads: tuple[int, ...] = (3, 6, 12, 24), patch: int = 4, window: int = 7,
                 joined: int = 0):
        super().__init__()
        self.channels = channels = tuple(width * 2**level for level in range(len(depths)))
        if len(heads) != len(depths) or any(c % h for c, h in zip(channels, heads)):
            raise ValueError(f"Swin-Unet with depths={depths}, heads={heads}, channels {channels}: "
                             "depths and heads are of one length, and heads divide channels")
        self.out_channels = width
        self.multiple = patch * 2 ** (len(depths) - 1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, (depth, head) in enumerate(zip(depths, heads)):
            if level == 0:  # from pixels to tokens
                enter = nn.Sequential(Gather(patch), nn.Linear(patch**2 * in_channels, width),
                                      nn.LayerNorm(width))
            else:
                enter = nn.Sequential(
                    Gather(2), nn.LayerNorm(2 * channels[level]),
                    nn.Linear(2 * channels[level], channels[level], bias=False))
            blocks = swin_blocks(channels[level], depth, head, window)
            self.encoder.append(nn.ModuleDict(dict(enter=enter, blocks=blocks)))
        self.norm = nn.LayerNorm(channels[-1])
        before = channels[-1] + joined
        for level in reversed(range(len(depths) - 1)):
            skip = channels[level]
            up = nn.Sequential(nn.Linear(before, 4 * skip, bias=False), Scatter(2),
                               nn.LayerNorm(skip))
            join = nn.Linear(2 * skip + joined, skip)
            blocks = swin_blocks(skip, depths[level], heads[level], window)
            self.decoder.append(nn.ModuleDict(dict(up=up, join=join, blocks=blocks)))
            before = skip
        self.to_pixels = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, patch**2 * width, bias=False), Scatter(patch),
            nn.LayerNorm(width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> features (B, C_i, H_i, W_i) of every level, fine to coarse."""
        features, x = [], x.movedim(1, -1)
        for stage in self.encoder:
            x = stage["blocks"](stage["enter"](x))
            features.append(x)
        features[-1] = self.norm(x)
        return [f.movedim(-1, 1) for f in features]

    def decode(self, features: list[Tensor]) -> Tensor:
        """Features of every level with what is joined to them -> (B, width, H, W)."""
        *skips, x = [f.movedim(1, -1) for f in features]
        for stage, skip in zip(self.decoder, reversed(skips)):
            x = stage["join"](torch.cat([stage["up"](x), skip], -1))
            x = stage["blocks"](x)
        return self.to_pixels(x).movedim(-1, 1)


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


def swin_blocks(channels: int, depth: int, heads: int, window: int) -> nn.Sequential:
    """`depth` blocks; every second one has its windows shifted by half a window."""
    return nn.Sequential(*[SwinBlock(channels, heads, window, window // 2 * (i % 2))
                           for i in range(depth)])


class SwinBlock(nn.Module):
    """Self-attention within windows, then two layers on every token.

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
        index, hidden = window_layout((height, width), w, shifts, x.device)
        bias = self.bias.index_select(1, index).view(self.heads, w * w, w * w).to(q)
        bias = bias.masked_fill(hidden[:, None], -math.inf).flatten(0, 1)
        x = F.scaled_dot_product_attention(q, k, v, bias[None])
        x = x.view(count, rows, columns, self.heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(count, rows * w, columns * w, channels).roll(shifts, (1, 2))
        return self.out(x[:, :height, :width])


@functools.lru_cache(maxsize=64)  # a network has few map sizes
@torch.inference_mode(False)  # what is kept may be needed by autograd later
def window_layout(size, window: int, shifts, device) -> tuple[Tensor, Tensor]:
    """Which bias belongs to a pair of tokens of a window, and which pairs are hidden.

    index (w^4,): number of (query - key) in the table of biases, for w*w queries and w*w keys.
    hidden bool (windows, w*w queries, w*w keys): the map of `size` was padded at its ends to whole
    windows and rolled by -shifts. Rolling brings opposite edges into one window; they must not
    attend to each other, nor to padding.
    """
    offset = torch.arange(window)[:, None] - torch.arange(window) + window - 1  # query - key
    index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
    region = torch.zeros((), dtype=torch.long)
    for side, shift in zip(size, shifts):
        padded = side + -side % window
        origin = torch.arange(shift, padded + shift) % padded
        region = 4 * region[..., None] + 2 * (origin >= side) + (origin < shift)
    region = Gather(window)(region[None, ..., None]).flatten(0, 2)  # (windows, w*w)
    hidden = region[:, :, None] != region[:, None]
    return index.flatten().to(device), hidden.to(device)
