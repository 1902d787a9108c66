"""Swin-Unet."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn




class SwinUNet(nn.Module):
    """Swin-Unet (Cao et al. 2021, arXiv:2105.05537) in short: a U-Net of windowed attention.

    Inside, maps are (B, H, W, C). No stochastic depth, no pre-trained weights.
    """

    def __init__(self, c, in_channels: int):
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
