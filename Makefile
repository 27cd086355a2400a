# Every target builds its own environment in ./.venv when it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test bench zoo lint clean

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev,timm]"
	touch $(READY)

# Train a small dense model on scikit-learn's digits, then prune it; leaves model.pt and model-compressed/.
demo: $(READY)
	$(BIN)/compress-uq demo

# Linter, type checker and all tests, one process a core, each with one thread: two would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ratios, by hand: the exported file against one dense pass, criteria against loops, pruning against bare torch-pruning.
bench: $(READY)
	$(BIN)/python tests/bench/latency.py
	$(BIN)/python tests/bench/criteria.py
	$(BIN)/python tests/bench/importance.py
	$(BIN)/python tests/bench/table1.py
	$(BIN)/python tests/bench/card.py

# Every torchvision classifier: pruned, checked, saved, exported; takes hours, goes on where it stopped.
zoo: $(READY)
	$(BIN)/python tests/bench/zoo.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
