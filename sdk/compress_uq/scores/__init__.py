"""Scores that rank images: by how likely the answer is wrong, or how likely the image is foreign."""

from compress_uq.registry import Entry, Registry
from compress_uq.scores.base import Answers, Score, TrainingFeatures
from compress_uq.scores.knn import KNN
from compress_uq.scores.relative_mahalanobis import RelativeMahalanobis
from compress_uq.scores.simple import Confidence, Energy, Entropy, GeneralisedEntropy, MutualInformation, Variance
from compress_uq.scores.vim import ViM

__all__ = [
    "KNN",
    "SCORES",
    "Answers",
    "Confidence",
    "Energy",
    "Entropy",
    "GeneralisedEntropy",
    "MutualInformation",
    "RelativeMahalanobis",
    "Score",
    "TrainingFeatures",
    "Variance",
    "ViM",
]

SCORES: Registry[type[Score]] = Registry(
    "score",
    Entry("confidence", "1 - the probability of the answer", "Hendrycks 2017", Confidence),
    Entry("entropy", "Shannon entropy of the probabilities, nats", "Shannon 1948", Entropy),
    Entry("mutual-information", "what the members disagree on, nats", "Smith 2018, equation 3", MutualInformation),
    Entry("variance", "variance over members of the answer's probability", "Gal 2016", Variance),
    Entry("energy", "-log sum exp of the mean logits", "Liu 2020, equation 4", Energy),
    Entry("gen", "generalised entropy of the largest probabilities", "Liu 2023", GeneralisedEntropy),
    Entry("knn", "distance of the features to the k-th nearest training image", "Sun 2022", KNN),
    Entry(
        "relative-mahalanobis",
        "distance of the features to the nearest class, less that to all images",
        "Ren 2021",
        RelativeMahalanobis,
    ),
    Entry("vim", "energy, and what the features hold outside the principal space", "Wang 2022", ViM),
)
