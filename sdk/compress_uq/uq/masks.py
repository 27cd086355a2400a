"""Dropout masks for T members: fixed, from a seed per image, or fresh.

Stratified: every unit is dropped in exactly round(p T) of the T members (rounded at random where p T is no integer),
so that a mean over the members has the expectation of dropout with much less spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["hashed_masks", "random_masks", "stratified_masks"]

# A prime with P % 3 == 2, so that cubing is a bijection modulo P; P ** 2 fits in int64.
_PRIME = 2_147_483_579
_STEP = 1_640_531_527


def stratified_masks(
    members: int, shape: Sequence[int], p: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(members, *shape) of 0 and 1 / (1 - p), each unit 0 in floor(p T) or ceil(p T) members, p T on average."""
    scores = torch.rand(members, *shape, generator=generator, dtype=torch.float64)
    extra = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return _drop_lowest(scores, extra, p).to(dtype)


def random_masks(members: int, like: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """(members, N, *shape), fresh at each call, in operators that export as RandomUniformLike."""
    template = like.flatten(1)[:, :1].reshape(1, -1, *(1 for _ in shape)).expand(members, -1, *shape)
    scores = torch.rand_like(template.float())
    extra = torch.rand_like(template[0].float())
    return _drop_lowest(scores, extra, p)


def hashed_masks(members: int, seed: Tensor, shape: Sequence[int], p: float, salt: int) -> Tensor:
    """(members, N, *shape) from `seed` (N,) int64: the same seed gives the same masks, in any batch.

    A unit's score is a hash of the image's seed, the site (`salt`) and the unit: additions and cubes modulo a prime,
    which every runtime computes alike. All of int64 is a valid seed.
    """
    units = math.prod(shape)
    count = torch.arange(1, (members + 1) * units + 1, dtype=torch.int64)
    constants = (count * _STEP + salt * 805_459_861) % _PRIME
    constants = constants.reshape(members + 1, 1, *shape).to(seed.device)
    key = _cube(seed % _PRIME + 1 + salt)
    mixed = _cube(key.reshape(1, -1, *(1 for _ in shape)) + constants)
    uniform = _cube(mixed + _STEP).to(torch.float32) / _PRIME
    return _drop_lowest(uniform[:-1], uniform[-1], p)


def _cube(value: Tensor) -> Tensor:
    reduced = value % _PRIME
    return (reduced * reduced % _PRIME) * reduced % _PRIME


def _drop_lowest(scores: Tensor, extra: Tensor, p: float) -> Tensor:
    """Drop the lowest floor(p T) scores of each unit, and one more where `extra` is below the fraction left over."""
    members = len(scores)
    low = math.floor(p * members + 1e-9)
    fraction = p * members - low
    ordered = scores.topk(min(low + 1, members), dim=0, largest=False).values
    below = ordered[low - 1] if low else torch.full_like(extra, -1.0)
    if fraction > 1e-9:
        below = torch.where(extra < fraction, ordered[low], below)
    return (scores > below.unsqueeze(0)).to(scores.dtype) / (1 - p)
