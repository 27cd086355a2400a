"""One OnnxPredictor under load: many requests of mixed sizes from 8 threads, the same answers as alone, memory flat.

    make soak                                   100,000 requests
    make soak REQUESTS=5000                     fewer
    python tests/bench/soak.py --model FILE     a file of your own; by default a small one is made

Each request is one of a fixed set of batches whose answers were taken beforehand, alone; each answer is compared bit by
bit. Resident memory is read when a tenth, a half and all of the requests are done. Ends with 1 if an answer differs, a
call fails, or memory at the end is more than GROWTH above that after a tenth.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import compress_uq as cuq

THREADS, SIZES, VARIANTS = 8, (1, 2, 3, 5, 8, 13, 21, 32), 4
GROWTH = 16 * 2**20
"""Bytes that memory may grow by after a tenth of the requests: what allocators keep back, not what a leak makes."""


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_file(folder: Path) -> Path:
    """A small CNN with dropout, seeded, so that both inputs are at work; its weights are random."""
    torch.manual_seed(0)
    dense = cuq.build_model("compress-uq:cnn", num_classes=10, input_shape=(1, 8, 8))
    dense[-1].weight.data *= 5
    pruned = cuq.prune(dense, torch.randn(1, 1, 8, 8), sparsity=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network that was not trained with dropout
        uncertain = cuq.fit_uncertainty(pruned, method=cuq.uq.MCDropout(p=0.2, samples=20))
    cuq.export_onnx(uncertain, folder / "model.onnx", sampling="seeded", layout="fold")
    return folder / "model.onnx"


class Soak:
    """The requests, how far they are, and what went wrong."""

    def __init__(self, predictor: cuq.OnnxPredictor, requests: int) -> None:
        self.predictor, self.requests = predictor, requests
        random = np.random.default_rng(0)
        self.questions = []
        for size in SIZES * VARIANTS:
            images = random.normal(size=(size, *predictor.input_shape)).astype(np.float32)
            self.questions.append((images, random.integers(-(2**62), 2**62, size) if predictor.seeded else None))
        self.alone = [predictor(*question) for question in self.questions]
        self.next, self.images, self.wrong = 0, 0, list[str]()
        self.marks = {max(1, requests * share // 100): f"{share} %" for share in (10, 50, 100)}
        self.memory: dict[str, int] = {}
        self.lock = threading.Lock()

    def work(self) -> None:
        """Take requests until there are none left."""
        random = np.random.default_rng(threading.get_ident() % 2**32)
        while True:
            chosen = int(random.integers(len(self.questions)))
            try:
                different = self.compare(chosen)
            except Exception as error:  # a call that fails is what this looks for
                different = f"{type(error).__name__}: {error}"
            with self.lock:
                if self.next >= self.requests or self.wrong:
                    return
                self.next += 1
                self.images += len(self.questions[chosen][0])
                if different:
                    self.wrong.append(f"request {self.next}, {len(self.questions[chosen][0])} images: {different}")
                if self.next in self.marks:
                    self.memory[self.marks[self.next]] = resident()

    def compare(self, chosen: int) -> str:
        """The names of outputs that are not what they were alone."""
        got, wanted = self.predictor(*self.questions[chosen]), self.alone[chosen]
        pairs = zip(got._fields, got, wanted, strict=True)
        return ", ".join(name for name, a, b in pairs if a is not b and not np.array_equal(a, b))


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        predictor = cuq.OnnxPredictor(given.model or make_file(Path(folder)), threads=1)
        soak = Soak(predictor, given.requests)
        threads = [threading.Thread(target=soak.work) for _ in range(THREADS)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
    growth = soak.memory.get("100 %", 0) - soak.memory.get("10 %", 0)
    lines = [
        f"{soak.next:,} requests, {soak.images:,} images, {THREADS} threads, batches of {SIZES}, {seconds:.0f} s",
        *(f"resident memory at {mark}: {value / 2**20:.1f} MiB" for mark, value in soak.memory.items()),
        f"answers that differ from those alone: {len(soak.wrong)}",
        *soak.wrong,
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if soak.wrong:
        return 1
    if growth > GROWTH:
        sys.stdout.write(f"memory grew by {growth / 2**20:.1f} MiB, allowed {GROWTH / 2**20:.0f}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
