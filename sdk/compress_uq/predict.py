"""The one inference loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress_uq.data import ImageDataset, batches
from compress_uq.errors import ModelError
from compress_uq.progress import Progress, ProgressCallback, silent
from compress_uq.types import Prediction

__all__ = ["collect", "collect_predictions", "default_batch_size"]


def default_batch_size(shape: Sequence[int]) -> int:
    """Images per batch that keep activations in reasonable memory: 256 at 3x32x32, 27 at 3x224x224."""
    return int(np.clip(4_194_304 // max(1, int(np.prod(shape))), 1, 256))


def collect(
    function: Callable[[Tensor], Any],
    dataset: ImageDataset,
    *,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    workers: int = 0,
    progress: ProgressCallback = silent,
    stage: str = "predicting",
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """What `function` says of every image, and the labels (N,).

    Args:
        function: maps images (B, C, H, W) to a tensor, an array, or a tuple of them, all batch-first; None is left out.
        dataset: (image, label).

    Raises:
        DataError: images hold NaN.
        ModelError: the model does not run on these images.
    """
    shape = dataset[0][0].shape
    size = batch_size or default_batch_size(shape)
    total = -(-len(dataset) // size)  # type: ignore[arg-type]
    parts: list[list[np.ndarray]] = []
    labels: list[np.ndarray] = []
    with torch.inference_mode():
        for step, (images, truth) in enumerate(batches(dataset, size, workers=workers)):
            try:
                answer = function(images.to(device))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ModelError(f"the model does not run on images of shape {tuple(shape)}: {reason}") from error
            fields = answer if isinstance(answer, tuple) else (answer,)
            parts.append([_array(field) for field in fields if field is not None])
            labels.append(truth.numpy())
            progress(Progress(stage, step + 1, total))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True)), np.concatenate(labels)


def collect_predictions(
    model: Callable[[Tensor], Prediction],
    dataset: ImageDataset,
    *,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    workers: int = 0,
    progress: ProgressCallback = silent,
    stage: str = "predicting",
) -> tuple[Prediction, np.ndarray]:
    """What a model or an exported file says of every image, as one `Prediction` of arrays, and the labels (N,).

    Raises:
        DataError: images hold NaN.
        ModelError: the model does not run on these images.
    """
    names: list[str] = []

    def answer(images: Tensor) -> Prediction:
        prediction = model(images)
        names[:] = [name for name, field in zip(Prediction._fields, prediction, strict=True) if field is not None]
        return prediction

    fields, labels = collect(
        answer, dataset, device=device, batch_size=batch_size, workers=workers, progress=progress, stage=stage
    )
    return Prediction(**dict(zip(names, fields, strict=True))), labels


def _array(field: Any) -> np.ndarray:
    return field.detach().cpu().numpy() if isinstance(field, Tensor) else np.asarray(field)
