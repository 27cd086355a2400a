"""Your own architecture and your own data, for the command line.

From the folder that holds `examples/`:

    compress-uq train --arch examples.my_model:small_net --data examples.my_model:digits_splits --out mine.pt
    compress-uq prune mine.pt --arch examples.my_model:small_net --data examples.my_model:digits_splits --sparsity 0.5
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import compress_uq as cuq

MEAN, STD = 0.305, 0.376


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in, H, W) to (N, channels, H / stride, W / stride)."""
        out = torch.relu(self.norm1(self.conv1(images)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(images))


class SmallNet(nn.Module):
    """Three blocks and a linear classifier, for grey images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1, 32, 1), Block(32, 64, 2), Block(64, 64, 2))
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, H, W) to logits (N, K)."""
        return self.classifier(self.blocks(images).mean((2, 3)))


def small_net(num_classes: int = 10) -> nn.Module:
    """What `--arch examples.my_model:small_net` calls; `num_classes` is passed because it is taken."""
    return SmallNet(num_classes)


def digits_splits() -> cuq.Splits:
    """What `--data examples.my_model:digits_splits` calls: disjoint parts, normalised, not augmented.

    `calibration` holds images that no training may see; `ood` is optional.
    """
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - MEAN) / STD
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, calibration, test = order[:1200], order[1200:1400], order[1400:]
    noise = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return cuq.Splits(
        train=TensorDataset(images[train], labels[train]),
        calibration=TensorDataset(images[calibration], labels[calibration]),
        test=TensorDataset(images[test], labels[test]),
        ood={"noise": TensorDataset((noise - MEAN) / STD, torch.zeros(300, dtype=torch.int64))},
        info=cuq.DataInfo(name="my digits", labels=tuple("0123456789"), mean=(MEAN,), std=(STD,)),
    )
