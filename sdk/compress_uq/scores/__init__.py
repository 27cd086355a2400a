"""Scores that rank images: by how likely the answer is wrong, or how likely the image is foreign."""

from compress_uq.registry import Entry, Registry
from compress_uq.scores.base import Answers, Score, TrainingFeatures
from compress_uq.scores.simple import Confidence, Entropy

__all__ = ["SCORES", "Answers", "Confidence", "Entropy", "Score", "TrainingFeatures"]

SCORES: Registry[type[Score]] = Registry(
    "score",
    Entry("confidence", "1 - the probability of the answer", "Hendrycks 2017", Confidence),
    Entry("entropy", "Shannon entropy of the probabilities, nats", "", Entropy),
)
