"""The small networks of the pruning literature: a perceptron and a plain convolutional net of any width and depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

__all__ = ["cnn", "mlp"]


def mlp(
    num_classes: int,
    input_shape: tuple[int, int, int] = (1, 28, 28),
    widths: Sequence[int] = (128, 64),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """Fully connected layers of the given widths, each followed by batch norm if asked, a ReLU, and dropout if any."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(input_shape)
    for width in widths:
        layers += [
            nn.Linear(features, width),
            *([nn.BatchNorm1d(width)] if batch_norm else []),
            nn.ReLU(),
            *([nn.Dropout(dropout)] if dropout > 0 else []),
        ]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


def cnn(
    num_classes: int,
    input_shape: tuple[int, int, int] = (1, 28, 28),
    widths: Sequence[int] = (32, 64, 128),
    kernel_size: int = 3,
    hidden: Sequence[int] = (),
) -> nn.Module:
    """Convolutions of the given widths, each with batch norm, ReLU and, while space lasts, a 2x2 maximum pooling.

    `hidden` are the widths of fully connected layers before the classifier.
    """
    channels, height, width_left = input_shape
    layers: list[nn.Module] = []
    for width in widths:
        layers += [
            nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
        if min(height, width_left) >= 4:
            layers.append(nn.MaxPool2d(2))
            height, width_left = height // 2, width_left // 2
    layers.append(nn.Flatten())
    features = channels * height * width_left
    for width in hidden:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))
