# Every target builds its own environment in ./.venv when it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test bench lint clean

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev,timm]"
	touch $(READY)

# Train a small dense model on scikit-learn's digits, then prune it; leaves model.pt and model-compressed/.
demo: $(READY)
	$(BIN)/compress-uq demo

# Linter, type checker and all tests.
test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The exported file against one dense pass and against the eager loop; ratios, by hand.
bench: $(READY)
	$(BIN)/python tests/bench/latency.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
