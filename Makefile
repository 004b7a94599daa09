# Everything is installed into .venv from a plain python3; `make PYTHON=python3.12 ...` takes another one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:  ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/'

# The stamps are older than what they depend on as soon as a dependency or its version changes.
$(VENV)/.run: setup.cfg pyproject.toml constraints.txt
	$(INSTALL) -e ".[gguf]"
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml constraints.txt
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.run

demo: $(VENV)/.run  ## Train the VQ-Logits recipe and say how to look at it
	$(BIN)/python train.py fit --config configs/vq_logits.yaml
	@printf '\nLosses, code usage and the config of this run:\n    $(BIN)/tensorboard --logdir runs\n'

test: $(VENV)/.dev  ## All tests, the slow ones too
	$(BIN)/python -m pytest -m ""

# mypy sees the package as it is installed: callbacks, datamodules and configs are mapped into lit_logits by setup.cfg.
lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types && cp -r lit_logits build/types
	@cp -r callbacks datamodules configs build/types/lit_logits
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p lit_logits

bench: $(VENV)/.dev  ## Every benchmark that needs no models trained before; each prints its tables
	@set -e; for name in $(filter-out measure dynamic_fusion gld_fusion vq_compress,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do \
		echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name; done

clean:  ## Remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
