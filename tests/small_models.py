"""Models of every family the rules must work for, small enough for a test, and some that must be refused."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import compress_uq as cuq
from compress_uq.cost import Cost
from compress_uq.decisions import LAC, SGR
from compress_uq.stages import Origin
from compress_uq.uncertain import UncertainModel
from compress_uq.uq import MCDropout, Trained

SMALL = (3, 32, 32)


class Leaves(nn.Module):
    """A handful of layers held directly, as in the first tutorial everybody reads."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.fc1 = nn.Linear(24 * 64, 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class InnerDropout(nn.Module):
    """Dropout inside a residual branch: the skip connection leads around the only site."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.25), nn.Conv2d(16, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.branch(x)
        return self.head(x.mean((2, 3)))


class DictOutput(nn.Module):
    """Answers as Hugging Face's classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x):
        return {"logits": self.net(x)}


class ConvHead(nn.Module):
    """A fully convolutional classifier, as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
        self.last = nn.Conv2d(32, 7, 1)

    def forward(self, x):
        return F.relu(self.last(self.features(x))).mean((2, 3))


class Concat(nn.Module):
    """Two branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(3, 24, 1)
        self.bn = nn.BatchNorm2d(40)
        self.c = nn.Conv2d(40, 16, 3, groups=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        return self.fc(self.c(x).mean((2, 3)))


class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, x):
        return self.net(x), x


class OneLogit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.net(x)


def own(name: str, shape=SMALL, **options):
    return cuq.build_model(f"compress-uq:{name}", num_classes=10, input_shape=shape, options=options)


def torchvision(name: str):
    return cuq.build_model(f"torchvision:{name}", num_classes=10)


# name -> (model, image shape)
PRUNABLE = {
    "mlp": lambda: (own("mlp", (1, 8, 8), widths=(64, 32)), (1, 8, 8)),
    "cnn": lambda: (own("cnn", (1, 28, 28), widths=(32, 32), hidden=(32,)), (1, 28, 28)),
    "resnet20": lambda: (own("resnet20"), SMALL),
    "resnet18": lambda: (own("resnet18"), SMALL),
    "vgg19": lambda: (own("vgg19"), SMALL),
    "leaves": lambda: (Leaves(), SMALL),
    "inner dropout": lambda: (InnerDropout(), SMALL),
    "conv head": lambda: (ConvHead(), SMALL),
    "concat": lambda: (Concat(), SMALL),
    "torchvision resnet18": lambda: (torchvision("resnet18"), (3, 64, 64)),
    "torchvision mobilenet_v2": lambda: (torchvision("mobilenet_v2"), (3, 64, 64)),
    "torchvision densenet121": lambda: (torchvision("densenet121"), (3, 64, 64)),
    "torchvision regnet_y_400mf": lambda: (torchvision("regnet_y_400mf"), (3, 64, 64)),
    "torchvision convnext_tiny": lambda: (torchvision("convnext_tiny"), (3, 64, 64)),
    "torchvision resnext50_32x4d": lambda: (torchvision("resnext50_32x4d"), (3, 64, 64)),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch-norm statistics as after training: no zeros and ones, no equal channels."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return model.eval()


def no_model() -> dict:
    return {}


def uncertain_cnn(shape=(1, 8, 8), labels=("a", "b", "c", "d")) -> UncertainModel:
    """MC dropout with five members, well apart, on a small CNN of four classes; random weights."""
    torch.manual_seed(0)
    options = {"widths": [16, 16]}
    network = randomise(cuq.build_model("compress-uq:cnn", num_classes=4, input_shape=shape, options=options))
    network[-1].weight.data *= 5
    origin = Origin(shape, Cost(1, 10**12, 1), labels, (0.5,), (0.25,))
    method = MCDropout(p=0.2, samples=5)
    return UncertainModel(method.fit(Trained((network,), origin)), method, origin)


def decided_model(shape, labels):
    """The same with both decision rules."""
    return uncertain_cnn(shape, labels).but(
        acceptance=SGR({"risk": 0.1, "delta": 0.05}, threshold=torch.tensor(0.5)),
        sets=LAC({"coverage": 0.9}, threshold=torch.tensor(0.8)),
    )
