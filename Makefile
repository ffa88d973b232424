# Every target sets up what it needs, on a fresh clone too. ARGS is passed on: make test ARGS="-k adam".

PYTHON ?= python3
ARGS   ?=

BIN   := .venv/bin
READY := .venv/.ready
BUILD := docs/_build
PEERS := .venv-peers/.ready
WRITERS := .venv-formats/.ready

# Nothing here needs a model hub: policies are trained or built from a configuration.
export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all mutants lint bench scale peers calibration runs sweep torture formats docs clean
.DELETE_ON_ERROR:

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Train a small policy, take real AdamW steps, explain the last one
	@$(BIN)/fkernel demo $(ARGS)

test: $(READY) ## Run every law, docstring example and quick test, and the slow ones whose turn it is
	@$(BIN)/pytest -n auto --dist loadfile $(ARGS)

test-all: $(READY) ## Run every test, and every deliberate mistake (three quarters of an hour)
	@FKERNEL_TESTS=all $(BIN)/pytest -n auto --dist loadfile $(ARGS)

mutants: $(READY) ## Try every deliberate mistake; each must fail its test (a quarter of an hour)
	@$(BIN)/pytest tests/test_mutations.py tests/test_upper_mutations.py $(ARGS)

lint: $(READY) ## Check style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright

bench: $(READY) ## Measure speed and memory, print ratios to the limit, save JSON
	@$(BIN)/python -m benchmarks $(ARGS)

scale: $(READY) ## Exact kernels of a 494M-parameter model within 8 GiB, save JSON (half an hour)
	@$(BIN)/python -m benchmarks.scale $(ARGS)

peers: $(READY) $(PEERS) ## Compare with the research code's method and with bergson, save JSON
	@$(BIN)/python -m benchmarks.peers $(ARGS)

calibration: $(READY) ## Steps of TRL, every optimizer and the floor against what really happened, save JSON and a page (2 minutes)
	@$(BIN)/python -m benchmarks.calibration $(ARGS)

runs: $(READY) $(PEERS) ## Accounts of whole runs: do they add up, predict, find culprits; save JSON and a page (half an hour)
	@$(BIN)/python -m benchmarks.runs $(ARGS)

sweep: $(READY) ## Every causal language model in transformers against plain autograd, save JSON and a page (2 minutes)
	@$(BIN)/python -m benchmarks.sweep $(ARGS)

torture: $(READY) ## Stop what writes at every operation and at random, save JSON (hours; what is in the JSON is not tried again)
	@$(BIN)/python -W ignore -m tests.torture $(ARGS)

formats: $(WRITERS) ## Write the tests' checkpoints with the trainers' own packages again (some minutes)
	@.venv-formats/bin/python -m tests.formats $(ARGS)

docs: $(READY) ## Build the pages (they execute) and run their examples; warnings are errors
	@$(BIN)/sphinx-build -q -E -W --keep-going -j auto -d $(BUILD)/doctrees -b html docs $(BUILD)/html
	@$(BIN)/sphinx-build -q -W --keep-going -d $(BUILD)/doctrees -b doctest docs $(BUILD)/doctest
	@echo "$(BUILD)/html/index.html"

clean: ## Remove what was built, and the caches; .venv stays
	@rm -rf $(BUILD) docs/jupyter_execute dist .pytest_cache .ruff_cache .hypothesis
	@find fkernel tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("fkernel needs Python 3.11 or newer; name one: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv; the first time takes some minutes (torch is large)."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Trainers' packages ask for other versions of half of ours, and for GPUs' compilers: an environment of their own.
$(WRITERS): constraints.txt tests/formats/requirements.txt tests/formats/trainers.txt
	@$(PYTHON) -m venv .venv-formats
	@.venv-formats/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/formats/requirements.txt
	@.venv-formats/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/formats/trainers.txt
	@touch $@

# A peer lives in a virtual environment of its own. Its torchvision and torchaudio do not load beside this torch.
$(PEERS): constraints.txt
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt bergson==2.5.1
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python explaind==0.0.2
	@.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	@touch $@
