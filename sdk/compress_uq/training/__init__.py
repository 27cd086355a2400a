"""The one training loop: dense models, fine-tuning, controls."""

from compress_uq.training.hardware import resolve_device
from compress_uq.training.loop import fit_network, steps_of_epoch
from compress_uq.training.watching import AfterBackward, Epoch, Observer

__all__ = ["AfterBackward", "Epoch", "Observer", "fit_network", "resolve_device", "steps_of_epoch"]
