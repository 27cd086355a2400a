"""ResNet-20 and ResNet-56 for 32x32 images, shortcuts without weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from compress_uq.models.layers import ChannelSelect

__all__ = ["ThinResNet", "resnet20", "resnet56"]


class ThinBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut of option A."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut: nn.Module = nn.Identity() if same else ChannelSelect(in_channels, channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in, H, W) to (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(images))


class ThinResNet(nn.Module):
    """6n + 2 layers in three stages of 16, 32 and 64 channels (He et al. 2016, section 4.2)."""

    def __init__(self, blocks: int, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = ThinBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(ThinBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))  # type: ignore[no-any-return]


def resnet20(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """ResNet-20, option A: 269,722 parameters at ten classes."""
    return ThinResNet(3, num_classes, input_shape)


def resnet56(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """ResNet-56, option A: 853,018 parameters at ten classes."""
    return ThinResNet(9, num_classes, input_shape)
