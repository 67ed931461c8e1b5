# Everything installs into .venv and every output lands in a git-ignored place.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done

# QUICK=1 asks the notebooks for their small version.
QUICK ?= 0
quick := $(if $(filter-out 0,$(QUICK)),True,False)

notebooks := $(sort $(wildcard notebooks/*.ipynb))
executed := $(notebooks:notebooks/%=book/_executed/%)
# What a notebook's results depend on besides itself: the code and the tables in the repository.
inputs := $(shell find adapter_twin data -name external -prune -o -type f -not -path '*/__pycache__/*' -print 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup reproduce test lint book bench data lock clean

help:  ## Show this list
	@echo "usage: make TARGET [QUICK=1] [PYTHON=python3.12]"
	@echo
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP)  ## Create .venv and install the locked requirements and this package

reproduce: $(SETUP)  ## Run the whole study afresh and build the book (QUICK=1: small version)
	@rm -rf book/_executed
	@$(MAKE) --no-print-directory book QUICK=$(QUICK)

test: $(SETUP)  ## Run all tests and doctests, with the coverage floor
	$(BIN)/python -m pytest -n auto --cov

lint: $(SETUP)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

book: $(SETUP) $(executed)  ## Run the notebooks that are out of date and build the book
	$(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml \
	  --path-output book --all --quiet -W -n --keep-going
	@echo "The book is at book/_build/html/index.html"

bench: $(SETUP)  ## Time the twin (one simulated hour of each benchmark workload)
	$(BIN)/python -m benchmarks

data: $(SETUP)  ## List the measured data: what is there, from where, how to get the rest
	$(BIN)/adapter-twin data

lock: $(SETUP)  ## Refresh requirements/dev.lock from pyproject.toml (fetches uv)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra book --extra dev --universal --python-version 3.11 \
	  --fork-strategy fewest --no-header --upgrade --quiet --output-file requirements/dev.lock

clean:  ## Remove .venv and everything that was built
	rm -rf $(VENV) book/_executed book/_build build dist .coverage* .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(SETUP): requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/dev.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# A notebook is committed without outputs; papermill runs it into book/_executed, where the book reads it.
# One thread for the numerical libraries: the parallel work is in processes.
book/_executed/%.ipynb: export OMP_NUM_THREADS = 1
book/_executed/%.ipynb: notebooks/%.ipynb $(inputs) book/_executed/.quick-$(quick) | $(SETUP)
	@echo "running $< (quick = $(quick))"
	@$(BIN)/papermill $< $@ --kernel python3 --language python -p quick $(quick) --no-progress-bar --log-level WARNING

# Results of the small and of the full version are never mixed.
book/_executed/.quick-$(quick):
	@rm -rf $(@D) && mkdir -p $(@D) && touch $@
