"""SSN's U-Net, with batch norm: the deterministic baseline `det_unet2D` of PHiSeg's code."""

from torch import nn

from common import UNet, conv_block, init_he


class DetUNet(nn.Sequential):
    """U-Net and 1-wide convolutions: image (B, in_channels, *S) -> features (B, out_channels, *S).

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
