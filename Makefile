# Every target builds its own environment in ./.venv when it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test serve-test bench soak zoo lint clean

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

# A real Triton server, in an environment of its own (half a gigabyte), with the exported file behind it.
SERVER := .venv-serve
$(SERVER)/.ready:
	$(PYTHON) -m venv $(SERVER)
	$(SERVER)/bin/pip install --quiet "nvidia-pytriton>=0.7" "onnxruntime>=1.31.1" "tritonclient[http]>=2.73"
	touch $@

serve-test: $(READY) $(SERVER)/.ready
	COMPRESS_UQ_SERVER=$(CURDIR)/$(SERVER)/bin/python OMP_NUM_THREADS=1 $(BIN)/pytest -s tests/serve/serving.py

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
	$(BIN)/python tests/bench/training_cost.py

# 100,000 requests of mixed sizes from 8 threads on one OnnxPredictor; REQUESTS=5000 for less.
REQUESTS ?= 100000
soak: $(READY)
	$(BIN)/python tests/bench/soak.py --requests $(REQUESTS)

# Every torchvision classifier: pruned, checked, saved, exported; takes hours, goes on where it stopped.
zoo: $(READY)
	$(BIN)/python tests/bench/zoo.py

clean:
	rm -rf .venv $(SERVER) .mypy_cache .ruff_cache .pytest_cache
