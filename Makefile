# Two commands do everything on a fresh machine:  make demo  and  make test.  `make` alone lists the rest.
PYTHON ?= python3
VENV ?= .venv
AGENTS_VENV ?= $(VENV)-agents
OUT ?= outputs
BUDGET_MIN ?= 100
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -q -c constraints.txt
# A thread that waits for work must sleep, not spin: two processes share two cores during training.
TRAIN_ENV := OMP_WAIT_POLICY=PASSIVE
TYPES := build/typecheck
TYPED := $(patsubst %/,%,$(sort $(dir $(wildcard tests/*.py benchmarks/*.py tools/*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-agents lint format docs newcomer train-embedded bench clean distclean

help:  ## list the targets
	@echo "usage: make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/.stamp-run  ## a bundled photograph speaks: outputs/demo.mp4, with a report
	$(BIN)/rest demo --out $(OUT)

test: $(VENV)/.stamp-test  ## run the tests that take seconds (PYTEST_ARGS=... goes to pytest, TEST_WORKERS=2 processes)
	$(BIN)/python -m pytest -m 'not slow' -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp-test  ## run the others: whole runs, several processes, a browser, a Ray cluster
	$(BIN)/python -m pytest -m slow -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

test-agents: $(AGENTS_VENV)/.stamp  ## run the tests of the LiveKit and Pipecat adapters, in an environment of their own
	$(AGENTS_VENV)/bin/python -m pytest tests/avatar tests/integrations tests/test_agents_page.py $(PYTEST_ARGS)

lint: $(VENV)/.stamp-test  ## ruff and mypy over the whole tree
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy takes a package by its folder alone: lay links to those that are to be checked.
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/rest_lightning
	@ln -s $(CURDIR)/rest_lightning/* $(TYPES)/rest_lightning/
	@ln -s $(addprefix $(CURDIR)/,$(TYPED)) $(TYPES)/
	cd $(TYPES) && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache rest_lightning $(TYPED)

format: $(VENV)/.stamp-test  ## format the code, sort imports and apply ruff's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs  ## build the documentation site into build/site, strictly and without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

newcomer: $(VENV)/.stamp-test  ## build, check, install and use the package as a newcomer does, over the packages of $(VENV)
	tools/newcomer.sh --over $(VENV) wheel hub container app notebook

train-embedded: $(VENV)/.stamp-test  ## train all stages of the embedded model (BUDGET_MIN=100 PORTRAITS=... DRIVERS=...), resumable
	$(TRAIN_ENV) $(BIN)/rest train-embedded --budget-min $(BUDGET_MIN) $(addprefix --portraits ,$(PORTRAITS)) $(addprefix --drivers ,$(DRIVERS))

# asd.py and training_curves.py read a training run (make train-embedded), which a fresh checkout does not have; live.py
# needs a Chromium and the extra `serve`; gpu_job.py needs a GPU, or is rehearsed by a test.
bench: $(VENV)/.stamp-test  ## run the benchmarks, an hour or more; every one writes JSON (the paper size where CUDA is)
	@for file in $(filter-out benchmarks/asd.py benchmarks/training_curves.py benchmarks/live.py benchmarks/gpu_job.py,$(wildcard benchmarks/[a-z]*.py)); do echo "$$file"; $(BIN)/python -m "benchmarks.$$(basename "$$file" .py)" || exit 1; done
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		echo "benchmarks/streaming.py at paper size"; $(BIN)/python -m benchmarks.streaming --size paper --minutes 3; fi

clean:  ## remove what builds and runs left behind, keep .venv, data and trained models
	rm -rf build dist *.egg-info outputs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## also remove the virtual environments
	rm -rf $(VENV) $(AGENTS_VENV)

# Stamps: a second run installs nothing unless pyproject.toml or constraints.txt changed.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1): run make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "installing rest_lightning into $(VENV) (about 2 minutes the first time)"
	@$(PIP) -e .
	@touch $@

# livekit-agents and pipecat-ai need a newer protobuf than mediapipe admits: without the constraints but for torch.
$(AGENTS_VENV)/.stamp: pyproject.toml constraints.txt
	@test -x $(AGENTS_VENV)/bin/python || $(PYTHON) -m venv $(AGENTS_VENV)
	@grep -E '^(torch|torchvision|numpy|lightning|setuptools|av)==' constraints.txt > $(AGENTS_VENV)/constraints.txt
	@$(AGENTS_VENV)/bin/python -m pip --disable-pip-version-check install --progress-bar off -q -c $(AGENTS_VENV)/constraints.txt -e '.[test-agents]'
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "installing rest_lightning with its test tools into $(VENV) (about 2 minutes the first time)"
	@$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.stamp-run $(VENV)/.stamp-docs
