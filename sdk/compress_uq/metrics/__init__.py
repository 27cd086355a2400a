"""Pure functions of arrays or tensors; what each means, its range, and where other libraries differ."""

from compress_uq.metrics import paper
from compress_uq.metrics.bootstrap import (
    Figure,
    classification_figures,
    classification_metrics,
    mean_figure,
    ood_figures,
    wilson,
)
from compress_uq.metrics.calibration import ReliabilityBins, classwise_ece, ece, reliability
from compress_uq.metrics.classification import accuracy, brier, f1_at, f1_macro, f1_per_class, nll, per_class_accuracy
from compress_uq.metrics.members import entropy, mutual_information, vote_entropy
from compress_uq.metrics.ood import ood_aupr, ood_aupr_in, ood_auroc, ood_fpr95, ood_fpr95_in
from compress_uq.metrics.ranking import (
    accuracy_at,
    aurc,
    ause,
    ause_exact,
    coverage_at_risk,
    error_auroc,
    random_ause,
    risk_at_coverage,
    sparsification_curves,
    spearman,
)
from compress_uq.metrics.sets import mean_set_size, set_coverage
from compress_uq.registry import Entry, Registry

__all__ = [
    "Figure",
    "METRICS",
    "ReliabilityBins",
    "accuracy",
    "accuracy_at",
    "aurc",
    "ause",
    "ause_exact",
    "brier",
    "classification_figures",
    "classification_metrics",
    "classwise_ece",
    "coverage_at_risk",
    "ece",
    "entropy",
    "error_auroc",
    "f1_at",
    "f1_macro",
    "f1_per_class",
    "mean_figure",
    "mean_set_size",
    "mutual_information",
    "nll",
    "ood_aupr",
    "ood_aupr_in",
    "ood_auroc",
    "ood_figures",
    "ood_fpr95",
    "ood_fpr95_in",
    "paper",
    "per_class_accuracy",
    "random_ause",
    "reliability",
    "risk_at_coverage",
    "set_coverage",
    "sparsification_curves",
    "spearman",
    "vote_entropy",
    "wilson",
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
