"""What a model costs where it runs, beside what it replaces."""

from compress_uq.measuring.alternatives import EagerLoop
from compress_uq.measuring.result import Benchmark, Ratio, Timing
from compress_uq.measuring.run import benchmark

__all__ = ["Benchmark", "EagerLoop", "Ratio", "Timing", "benchmark"]
