"""VGG-19 with batch norm and a single linear classifier, for small images."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["VGG", "vgg19"]

_LAYOUT = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


class VGG(nn.Module):
    """Sixteen 3x3 convolutions with batch norm, a pooling after each stage (Simonyan and Zisserman 2015, net E)."""

    def __init__(self, num_classes: int, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width in _LAYOUT:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            else:
                # Rounding up lets images smaller than 32 pixels through all five poolings.
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to logits (N, K)."""
        return self.classifier(self.features(images).mean((2, 3)))  # type: ignore[no-any-return]


def vgg19(num_classes: int, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """VGG-19 with batch norm for small images: 20,040,522 parameters at ten classes."""
    return VGG(num_classes, input_shape)
