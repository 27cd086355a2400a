"""Layers that the named architectures need and torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ChannelSelect"]


class ChannelSelect(nn.Module):
    """Subsample space and lay out channels by an index, zeros where there is none: He et al. 2016, shortcut option A.

    Output channel c is input channel `index[c]`; the index `in_channels` stands for zeros. It has no weights, and
    either side can lose channels without the other knowing, which zero padding cannot.
    """

    index: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        before = (out_channels - in_channels) // 2
        index = torch.full((out_channels,), in_channels)
        index[before : before + in_channels] = torch.arange(in_channels)
        self.register_buffer("index", index)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride))."""
        # A pooling window of one is a strided slice that tracers see as one plain operator.
        kept = F.avg_pool2d(images, 1, stride=self.stride)
        return F.pad(kept, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)

    def remove_inputs(self, removed: list[int]) -> None:
        """Forget input channels; outputs that showed them become zeros."""
        kept = [c for c in range(self.in_channels) if c not in set(removed)]
        position = torch.full((self.in_channels + 1,), len(kept))
        position[kept] = torch.arange(len(kept))
        self.index = position.to(self.index.device)[self.index]
        self.in_channels = len(kept)

    def remove_outputs(self, removed: list[int]) -> None:
        """Forget output channels."""
        kept = [c for c in range(self.out_channels) if c not in set(removed)]
        self.index = self.index[kept]
        self.out_channels = len(kept)
