"""A small U-Net backbone around diffusers.UNet2DModel: real channels and a condition vector in, real channels out."""

from typing import Any

import torch
from torch import Tensor, nn

from msmri.model.adm import pad_to_multiple, remove_padding


class UNet(nn.Module):
    """Convolutional U-Net that works at any image size, on blocks of ``patch`` x ``patch`` pixels.

    Folding pixels into channels before the first convolution makes the network about ``patch``^2 times cheaper at the
    same width. Every residual block is scaled and shifted by an embedding of the condition vector.

    Parameters
    ----------
    in_channels, out_channels
        Real channels.
    channels
        Width of each level; each level halves the resolution.
    blocks_per_level
        Residual blocks on the way down; one more on the way up.
    conditions
        Length of the condition vector, such as (log sigma, log noise, ...).
    patch
        Side of the pixel blocks that are folded into channels.
    """

    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        channels: tuple[int, ...] = (64, 96, 128),
        blocks_per_level: int = 2,
        conditions: int = 4,
        patch: int = 2,
    ) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        levels, self.patch = len(channels), patch
        self.multiple = patch * 2 ** (levels - 1)
        width = 4 * channels[0]  # of the time embedding inside the network
        self.embed = nn.Sequential(nn.Linear(conditions, width), nn.SiLU(), nn.Linear(width, width))
        network: Any = UNet2DModel(
            in_channels=in_channels * patch**2,
            out_channels=out_channels * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=blocks_per_level,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=8,
            add_attention=False,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
        self.network = network

    def forward(self, channels: Tensor, condition: Tensor) -> Tensor:
        """Map (b, in_channels, y, x) and the condition (b, conditions) to (b, out_channels, y, x)."""
        height, width = channels.shape[-2:]
        padded = pad_to_multiple(channels, self.multiple)
        folded = nn.functional.pixel_unshuffle(padded, self.patch)
        folded = folded.to(memory_format=torch.channels_last)
        zeros = torch.zeros(len(channels), device=channels.device)
        output = self.network(folded, zeros, class_labels=self.embed(condition)).sample
        output = nn.functional.pixel_shuffle(output, self.patch)
        return remove_padding(output, (height, width))
