"""The U-Net that most methods stand on, and SSN's, `det_unet2D` of PHiSeg's code."""

import torch
from torch import Tensor, nn

from common import (center_crop, check_choice, conv_block, init_he, pad_to_multiple, run_encoder,
                    upsample)


class UNet(nn.Module):
    """U-Net without an output layer: image (B, in_channels, *S) of any size -> features
    (B, out_channels, *S).

    channels: widths of the resolution levels, fine to coarse. Every level has `convs` 3-wide
        convolutions and half the size of the level before.
    dims: number of spatial axes, 1 to 3.
    norm: "batch" (SSN, VAE U-Net) or "none" (Probabilistic U-Net).
    wide: decoder levels have the width of the next coarser level (SSN) instead of their own.
    joined: channels that the caller concatenates to every skip connection before `decode`.
    decoder: False leaves out the decoder and the coarsest level, which only the decoder uses.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], *, dims: int = 2,
                 convs: int = 3, norm: str = "batch", wide: bool = False, joined: int = 0,
                 decoder: bool = True):
        super().__init__()
        check_choice("norm", norm, ("batch", "none"))
        if not channels:
            raise ValueError("channels is empty: give one number for each resolution level")
        self.channels, self.multiple = channels, 2 ** (len(channels) - 1)
        self.encoder = nn.ModuleList(
            conv_block(dims, before, after, convs=convs, norm=norm)
            for before, after in zip((in_channels, *channels), channels))
        self.decoder = nn.ModuleList()  # coarse to fine
        width = channels[-1]
        for coarser, skip in zip(channels[:0:-1], channels[-2::-1]):
            before, after = width + skip + joined, coarser if wide else skip
            if decoder:
                self.decoder.append(conv_block(dims, before, after, convs=convs, norm=norm))
            width = after
        self.out_channels = width
        if not decoder:
            del self.encoder[-1]

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of every level, fine to coarse. Image sides are multiples of `multiple`."""
        return run_encoder(self.encoder, x)

    def decode(self, features: list[Tensor]) -> Tensor:
        """Upsample from the coarsest level, concatenating the features of each finer one."""
        *skips, x = features
        for block, skip in zip(self.decoder, reversed(skips)):
            x = block(torch.cat([skip, upsample(x)], 1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        return center_crop(self.decode(self.encode(pad_to_multiple(x, self.multiple))), size)


class DetUNet(nn.Sequential):
    """U-Net with batch norm and 1-wide convolutions: image (B, in_channels, *S) -> features
    (B, out_channels, *S).

    channels: widths of the resolution levels, fine to coarse.
    convs: 3-wide convolutions per level, and 1-wide ones, of channels[0] channels, after the U-Net.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], *, dims: int = 2,
                 convs: int = 3):
        unet = UNet(in_channels, channels, dims=dims, convs=convs, wide=True)
        join = conv_block(dims, unet.out_channels, channels[0], convs=convs, kernel=1)
        super().__init__(unet, join)
        self.out_channels = channels[0]
        init_he(self)
