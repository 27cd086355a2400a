"""Which of several draws of T masks stands best for many masks, on images whose labels nobody looks at.

Fixed masks are the same for every image, so that an unlucky draw is unlucky everywhere. The answers of all draws and of
a reference of 200 masks or more are computed together: what comes before the members part runs once per image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import Subset

from compress_uq.cost import on_device
from compress_uq.data import ImageDataset
from compress_uq.predict import collect
from compress_uq.uq.dropout import SampledDropout, draw_masks, sampled_macs
from compress_uq.uq.members import Fidelity
from compress_uq.uq.sites import Site

__all__ = ["choose_masks", "why_not_compared"]

REFERENCE = 200
"""Members that the draws are compared with, rounded up to whole draws of their own."""

_MOST_IMAGES, _FEWEST_IMAGES = 500, 50
_MACS = 2e12
"""What the comparison may cost: a minute or two of a CPU core, if that leaves the fewest images."""
_MASK_BYTES = 128_000_000
_MEMBER_IMAGES = 2048
"""Images times members in one batch."""
_REFERENCE_SEED = 7_919
_STEP = 104_729


def choose_masks(
    network: nn.Module,
    sites: Sequence[Site],
    members: int,
    images: ImageDataset,
    *,
    fold: str | None,
    example: Tensor,
    draws: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[list[Tensor], Fidelity]:
    """The masks (T, *shape) per site of the best draw, and how well they and the median draw do.

    The best has the highest rank correlation of mutual information with the reference among the draws whose mean
    probabilities are no farther from the reference's than the median draw's. It is chosen on one half of the images
    that are looked at, and the figures are of the other half, where the best may do worse than the median draw.

    Args:
        network: the classifier, in eval.
        sites, members, fold: as `SampledDropout` takes them.
        images: (image, label); a part of them, drawn from the seed, is looked at. For fewer of them than
            `why_not_compared` lets pass the figures say little.
        example: images (1, C, H, W) to count costs with.
        draws: sets of masks to choose from; the first is what `seed` alone would give.
        seed: draws everything.
    """
    of_reference = math.ceil(REFERENCE / members)
    seeds = [seed + _STEP * n for n in range(draws)]
    seeds += [seed + _STEP * n + _REFERENCE_SEED for n in range(of_reference)]
    trunk, tail = sampled_macs(network, sites, fold, example)
    affordable = int(_MACS / max(1, trunk + len(seeds) * members * tail))
    available = len(images)  # type: ignore[arg-type]
    count = min(available, max(_FEWEST_IMAGES, min(_MOST_IMAGES, affordable)))
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    answers = _answers(network, sites, members, Subset(images, chosen.tolist()), fold, seeds, device)
    correlations, differences = _compared(answers, draws, slice(0, None, 2))
    near = differences <= np.median(differences)
    kept = int(np.argmax(np.where(near, correlations, -2.0)))
    correlations, differences = _compared(answers, draws, slice(1, None, 2))
    return draw_masks(sites, members, seeds[kept]), Fidelity(
        draws=draws,
        kept=kept,
        images=count,
        reference=of_reference * members,
        spearman=float(correlations[kept]),
        spearman_median=float(np.median(correlations)),
        difference=float(differences[kept]),
        difference_median=float(np.median(differences)),
    )


def why_not_compared(members: int, images: int) -> str | None:
    """Why so many members cannot be compared with more of them on so many images; None where they can."""
    if members == 1:
        return "a single sample has no mutual information"
    if images < _FEWEST_IMAGES:
        return f"there were {images} calibration images, and {_FEWEST_IMAGES} are needed"
    return None


@dataclass(frozen=True)
class _Answers:
    """What D draws of T members say of N images."""

    means: np.ndarray
    """(D, N, K) float64 mean probabilities."""
    entropies: np.ndarray
    """(D, N) float64 mean entropies of the members."""
    information: np.ndarray
    """(D, N) float32 mutual information."""


def _compared(answers: _Answers, draws: int, images: slice) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the first draws on these images: Spearman of mutual information and difference to the reference."""
    means, entropies = answers.means[:, images], answers.entropies[:, images]
    reference = means[draws:].mean(0)
    wanted = -(reference * np.log(np.maximum(reference, 1e-30))).sum(1) - entropies[draws:].mean(0)
    correlations = np.array([_spearman(each, wanted) for each in answers.information[:draws, images]])
    return correlations, np.abs(means[:draws] - reference).mean((1, 2))


def _answers(
    network: nn.Module,
    sites: Sequence[Site],
    members: int,
    images: ImageDataset,
    fold: str | None,
    seeds: Sequence[int],
    device: torch.device | str,
) -> _Answers:
    of_one = sum(4 * members * math.prod(site.shape) for site in sites)
    together = max(1, min(len(seeds), _MASK_BYTES // of_one))
    parts = []
    for start in range(0, len(seeds), together):
        drawn = [draw_masks(sites, members, seed) for seed in seeds[start : start + together]]
        masks = [torch.cat(of_site) for of_site in zip(*drawn, strict=True)]
        sampled = SampledDropout(network, sites, len(masks[0]), fold=fold, masks=masks)
        with on_device(sampled, device):
            fields, _ = collect(
                partial(_summaries, sampled, members),
                images,
                device=device,
                batch_size=max(1, _MEMBER_IMAGES // sampled.count),
            )
        parts.append(fields)
    return _Answers(*(np.concatenate(column, axis=1).swapaxes(0, 1) for column in zip(*parts, strict=True)))


def _summaries(sampled: SampledDropout, members: int, images: Tensor) -> tuple[Tensor, ...]:
    """The fields of `_Answers` with the images in front, from draws of so many members each."""
    logits = sampled(images).unflatten(0, (-1, members))
    logs = torch.log_softmax(logits.double(), 3)
    entropies = -(logs.exp() * logs).sum(3).mean(1)
    fields = logs.exp().mean(1), entropies, _mutual_information(logits)
    return tuple(field.transpose(0, 1) for field in fields)


def _mutual_information(logits: Tensor) -> Tensor:
    """(D, N) from logits (D, T, N, K), in float32 as it is deployed: small values drown in its rounding there too."""
    logs = torch.log_softmax(logits, 3)
    mean = logs.exp().mean(1)
    of_mean = -(mean * mean.clamp_min(1e-12).log()).sum(2)
    return (of_mean + (logs.exp() * logs).sum(3).mean(1)).clamp_min(0.0)


def _spearman(values: np.ndarray, others: np.ndarray) -> float:
    """Rank correlation, ties averaged; 0 where one of the two is constant."""
    a, b = rankdata(values), rankdata(others)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
