"""ResNet-18 with a 3x3 stem for small images, in the layer names of the common CIFAR training scripts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet18", "resnet18"]


class WideBlock(nn.Module):
    """Two 3x3 convolutions and a projection shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        """(N, in, H, W) to (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(images))


class ResNet18(nn.Module):
    """Four stages of two blocks, 64 to 512 channels (He et al. 2016, table 1, small-image stem)."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(WideBlock(64, 64, 1), WideBlock(64, 64, 1))
        self.layer2 = nn.Sequential(WideBlock(64, 128, 2), WideBlock(128, 128, 1))
        self.layer3 = nn.Sequential(WideBlock(128, 256, 2), WideBlock(256, 256, 1))
        self.layer4 = nn.Sequential(WideBlock(256, 512, 2), WideBlock(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))  # type: ignore[no-any-return]


def resnet18(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """ResNet-18 for small images: 11,173,962 parameters at ten classes."""
    return ResNet18(num_classes, input_shape)
