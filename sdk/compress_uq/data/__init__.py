"""Data sets, splits and batches."""

from compress_uq.data.augment import AUGMENTATIONS, Augmentation
from compress_uq.data.dividing import SMALLEST_PART, balanced_sample, divide, set_aside
from compress_uq.data.folders import image_files, read_images
from compress_uq.data.images import ImageTensors, as_pixels, batches, check_labels, fit_images
from compress_uq.data.loading import check_data_names, hold_out, load_splits
from compress_uq.data.named import DATASETS
from compress_uq.data.ood import MADE_SETS, ood_set
from compress_uq.data.splits import (
    DataInfo,
    ImageDataset,
    Splits,
    identical_images,
    labels_of,
    shared_images,
    take_class_balanced,
)

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "MADE_SETS",
    "SMALLEST_PART",
    "Augmentation",
    "DataInfo",
    "ImageDataset",
    "ImageTensors",
    "Splits",
    "as_pixels",
    "balanced_sample",
    "batches",
    "check_data_names",
    "check_labels",
    "divide",
    "fit_images",
    "hold_out",
    "identical_images",
    "image_files",
    "labels_of",
    "load_splits",
    "ood_set",
    "read_images",
    "set_aside",
    "shared_images",
    "take_class_balanced",
]
