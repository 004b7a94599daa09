# Everything is installed into .venv from a plain python3; `make PYTHON=python3.12 ...` takes another one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Bytecode is made of what is imported, when it is, and not of all files: half of the minutes.
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --disable-pip-version-check -q --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all coverage test-oldest test-newest lint docs examples bench bench-gpu dist clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/'

# The stamps are older than what they depend on as soon as a dependency or its version changes.
$(VENV)/.run: setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once; this takes minutes."
	$(INSTALL) -e ".[gguf]"
	@touch $@

$(VENV)/.dev: setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once; this takes minutes."
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.run

demo: $(VENV)/.run  ## Train a model with two levels of codes and say how to look at it
	$(BIN)/python train.py fit --config configs/vq_logits_two_levels.yaml
	@printf '\nThe dense head reaches val/ppl 68.0 with 786,432 parameters (recorded; `train.py fit --config configs/dense.yaml`).\n'
	@printf 'Losses, what the clusters hold, and the config of this run:\n    $(BIN)/tensorboard --logdir runs\n'

# A process for each core, one thread each.
PYTEST = -m pytest -q -n auto
test test-all coverage test-oldest test-newest: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.dev  ## The fast tests
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: $(VENV)/.dev  ## All tests, the slow ones too; `MARK="not nightly"` leaves out what takes ten minutes more
	$(BIN)/python $(PYTEST) -m "$(MARK)"

coverage: $(VENV)/.dev  ## All tests, and the lines that they do not reach
	$(BIN)/python $(PYTEST) -m "" --cov --cov-report=term:skip-covered

# Each set has an environment of its own. They also run with the arithmetic of other processors. Pages and benchmarks are
# those of the pinned versions.
test-oldest: $(VENV)-oldest/.test  ## The fast tests with the oldest versions that setup.cfg admits; `TESTS=...` names files
	ATEN_CPU_CAPABILITY=default $(VENV)-oldest/bin/python $(PYTEST) $(TESTS) -m "not slow" --ignore=tests/test_docs.py --ignore-glob='tests/test_*_bench.py'

$(VENV)-oldest/.test: setup.cfg constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -q --no-compile -c constraints-oldest.txt -e ".[gguf,ot,peft,test]"
	@touch $@

# torch is the pinned one, of which there is a CPU build; `TORCH=torch` takes the newest.
test-newest: TORCH ?= $(shell grep '^torch==' constraints.txt)
test-newest:  ## The fast tests with the newest versions of today
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install -q --no-compile -U --upgrade-strategy eager -e ".[gguf,ot,peft,test]" '$(TORCH)'
	ATEN_CPU_CAPABILITY=avx2 $(VENV)-newest/bin/python $(PYTEST) -m "not slow"

# mypy sees the package as it is installed: callbacks, datamodules and configs are mapped into lit_logits by setup.cfg.
# typed_calls.py is checked as a user's file, by the strict rules, and apart from the tests, whose rules are milder.
lint: $(VENV)/.dev  ## ruff, codespell and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	@rm -rf build/types && mkdir -p build/types && cp -r lit_logits build/types
	@cp -r callbacks datamodules configs build/types/lit_logits
	@cp -r benchmarks tests build/types && mv build/types/tests/typed_calls.py build/types
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p lit_logits -p benchmarks -p tests
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml typed_calls.py

# Sphinx reads the installed package, and nothing from a network. Each warning is an error.
docs: $(VENV)/.dev  ## Build the pages into build/docs: open build/docs/index.html
	$(BIN)/python -m sphinx -b html -q -W --keep-going docs build/docs

bench: $(VENV)/.dev  ## Every benchmark that needs no models trained before; each prints its tables
	@set -e; for name in $(filter-out measure intents quantised_rows gpu vq_rivals vq_training dynamic_fusion fusion_answers fusion_criteria gld_fusion gld_fusion_pretrained pretrained_pivot head_pictures vq_compress vq_tables vq_generate vq_sizes kills,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do \
		echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name; done

# With BIN of another environment nothing is installed: machines with a card often have their own torch and no network.
ifeq ($(origin BIN),command line)
bench-gpu:
else
bench-gpu: $(VENV)/.run
endif
bench-gpu:  ## What a card decides, in eight minutes; without a GPU, the list of what would run
	$(BIN)/python -m benchmarks.gpu

examples: $(VENV)/.dev  ## Run the examples, minutes each, and write their pages in docs/
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[examples]"
	$(BIN)/python examples/render.py

dist: $(VENV)/.dev  ## Build sdist and wheel into dist/, and check what an index would show of them
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[release]"
	rm -rf build dist
	$(BIN)/python -m build -q
	$(BIN)/twine check --strict dist/*

clean:  ## Remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
