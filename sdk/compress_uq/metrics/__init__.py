"""Pure functions of arrays or tensors; what each means, its range, and where other libraries differ."""

from compress_uq.metrics.bootstrap import Figure, classification_figures, mean_figure, ood_figures
from compress_uq.metrics.calibration import ReliabilityBins, ece, reliability
from compress_uq.metrics.classification import accuracy, brier, f1_macro, nll, per_class_accuracy
from compress_uq.metrics.ood import ood_aupr, ood_auroc, ood_fpr95
from compress_uq.metrics.ranking import (
    accuracy_at,
    aurc,
    ause,
    ause_exact,
    error_auroc,
    random_ause,
    sparsification_curves,
)
from compress_uq.registry import Entry, Registry

__all__ = [
    "METRICS",
    "Figure",
    "ReliabilityBins",
    "accuracy",
    "accuracy_at",
    "aurc",
    "ause",
    "ause_exact",
    "brier",
    "classification_figures",
    "ece",
    "error_auroc",
    "f1_macro",
    "mean_figure",
    "nll",
    "ood_aupr",
    "ood_auroc",
    "ood_figures",
    "ood_fpr95",
    "per_class_accuracy",
    "random_ause",
    "reliability",
    "sparsification_curves",
]

METRICS: Registry[str] = Registry(
    "metric",
    Entry("accuracy", "share of images classified right", "", "higher"),
    Entry("nll", "negative log-likelihood of the label, nats", "", "lower"),
    Entry("brier", "squared distance of the probabilities from the truth, 0 to 2", "Brier 1950", "lower"),
    Entry("ece", "expected calibration error, top label, 15 equal-width bins", "Guo 2017, equation 3", "lower"),
    Entry("ause", "area under the sparsification error, 50 steps", "Holzbock, algorithm 1, sign corrected", "lower"),
    Entry("ause_exact", "the same, every image a step, ties averaged", "Geifman 2019 (E-AURC, oracle 1 - p)", "lower"),
    Entry("aurc", "area under the risk-coverage curve", "Geifman 2017", "lower"),
    Entry("error_auroc", "AUROC of the uncertainty for the errors", "Hendrycks 2017", "higher"),
    Entry("accuracy_at_50", "accuracy of the more certain half", "Aguettaz", "higher"),
    Entry("f1_macro", "mean F1 over classes", "", "higher"),
    Entry("ood_auroc", "AUROC of the OOD score, mean over sets, OOD positive", "Hendrycks 2017", "higher"),
)
