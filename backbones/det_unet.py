"""The U-Net with batch norm that PHiSeg's authors compare with and SSN stands on (`det_unet2D`)."""

from torch import nn

from common import UNet, conv_block


class DetUNet(nn.Sequential):
    """U-Net and 1-wide convolutions: image (B, in_channels, *S) -> features (B, out_channels, *S).

    channels: a resolution level each, fine to coarse, of `convs` 3-wide convolutions; then follow
    `convs` 1-wide ones.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], *, dims: int = 2,
                 convs: int = 3):
        unet = UNet(in_channels, channels, dims=dims, convs=convs)
        self.out_channels = channels[0]
        super().__init__(unet, conv_block(dims, channels[0], channels[0], convs=convs, kernel=1))
