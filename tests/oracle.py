"""The slow oracle of pruning: a dense copy in which what reads a removed channel reads zeros."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from compress_uq.models import ChannelSelect
from compress_uq.pruning.graph.groups import CoupledLayer, dependency_groups


class KeptNorm(nn.Module):
    """Layer norm whose mean and variance are of the kept channels alone; the others come out as they may."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm
        self.kept = torch.ones(norm.normalized_shape[0], dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels_first = type(self.norm).__name__ == "LayerNorm2d"
        x = x.movedim(1, -1) if channels_first else x
        kept = x[..., self.kept]
        variance, mean = torch.var_mean(kept, -1, unbiased=False, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.norm.eps)
        x = x * self.norm.weight + (0 if self.norm.bias is None else self.norm.bias)
        return x.movedim(-1, 1) if channels_first else x


def masked(model: nn.Module, example: torch.Tensor, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the dense model that computes what it should without the removed channels, given by group.

    Weights that read a removed channel are zero; layer norm takes its statistics over kept channels; queries, keys and
    values of a removed place are zero.
    """
    groups = {group.name: group for group in dependency_groups(copy.deepcopy(model).eval(), example)}
    oracle = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, channels in removed.items():
            gone = torch.zeros(groups[name].channels, dtype=torch.bool)
            gone[list(channels)] = True
            for layer in groups[name].layers:
                _silence(oracle, layer, layer.indices[gone[layer.channels]])
    return oracle


def _silence(oracle: nn.Module, layer: CoupledLayer, gone: torch.Tensor) -> None:
    module = oracle.get_submodule(layer.name)
    last = layer.name.rpartition(".")[2]
    if not len(gone):
        return
    if isinstance(module, nn.LayerNorm):
        replacement = KeptNorm(module)
        parent = oracle.get_submodule(layer.name.rpartition(".")[0])
        replacement.kept[gone] = False
        setattr(parent, last, replacement)
    elif isinstance(module, KeptNorm):
        module.kept[gone] = False
    elif isinstance(module, nn.MultiheadAttention):
        rows = torch.cat([gone + module.embed_dim * i for i in range(3)])
        module.in_proj_weight[:, gone] = 0
        module.in_proj_weight[rows] = 0
        module.in_proj_bias[rows] = 0
    elif layer.side == "out":
        if last in ("qkv", "to_qkv"):
            module.weight[gone] = 0
            if module.bias is not None:
                module.bias[gone] = 0
    elif isinstance(module, ChannelSelect):
        module.index[torch.isin(module.index, gone)] = module.in_channels
    elif isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        width, rows = module.in_channels // module.groups, module.out_channels // module.groups
        for position in gone.tolist():
            part = position // width
            module.weight[part * rows : (part + 1) * rows, position % width] = 0
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.weight[gone] = 0
    else:
        module.weight[:, gone] = 0


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """No zeros, ones or equal channels in what a network starts with: every weight and statistic matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm) and module.weight is not None:
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            for key, parameter in module.named_parameters(recurse=False):
                if key != "weight" and parameter.std(unbiased=False) < 1e-3:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                elif parameter.abs().max() == 0:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def relative_difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


__all__ = ["KeptNorm", "masked", "randomise", "relative_difference"]
