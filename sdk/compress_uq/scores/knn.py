"""Distance to the nearest training images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress_uq.data import balanced_sample
from compress_uq.errors import UncertaintyError
from compress_uq.fitted import Plain
from compress_uq.scores.base import Answers, Score, TrainingFeatures

__all__ = ["KNN"]

_LARGEST = 8_000_000
"""Values that a bank may hold over all networks: 32 MB in the bundle, and again in the ONNX file."""


class KNN(Score):
    """How far the k-th nearest of a bank of training images is, features normalised (Sun et al. 2022).

    Half the squared distance, 1 - cosine: it ranks as the distance does, and rounds better near 0. The bank is a
    class-balanced sample of `bank` training images, fewer where more would hold over 8 million values. `neighbours` 0
    is a thousandth of the bank, the paper's share, and at least 1. Of several networks the mean is taken.
    """

    name = "knn"
    of_features = True
    needs = ("bank",)
    defaults: ClassVar[Mapping[str, Plain]] = {"bank": 5000, "neighbours": 0}
    bank: Tensor

    @classmethod
    def fit(cls, training: TrainingFeatures | None, options: Mapping[str, Plain] | None = None) -> KNN:
        """Choose the bank.

        Raises:
            UncertaintyError: no training images, or fewer in the bank than neighbours.
        """
        given = cls(options).options
        if training is None:
            raise UncertaintyError("'knn' looks at training images: pass splits with a train split")
        networks, _, width = training.features.shape
        size = min(int(given["bank"]), _LARGEST // (networks * width))
        chosen = balanced_sample(training.labels, size)
        neighbours = int(given["neighbours"]) or max(1, round(len(chosen) / 1000))
        if neighbours > len(chosen):
            raise UncertaintyError(f"knn: neighbours={neighbours}, and the bank holds {len(chosen)} images: take fewer")
        bank = F.normalize(torch.from_numpy(np.ascontiguousarray(training.features[:, chosen])), dim=2)
        return cls({"bank": len(chosen), "neighbours": neighbours}, bank=bank)

    def forward(self, answers: Answers) -> Tensor:
        """(N,) float32, 0 to 2."""
        self.require_fitted()
        assert answers.features is not None
        similar = F.normalize(answers.features, dim=2) @ self.bank.transpose(1, 2)
        return (1 - torch.topk(similar, int(self.options["neighbours"]), dim=2).values[:, :, -1]).mean(0)
