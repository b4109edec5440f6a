# make run, test, lint, bench and chaos each set up .venv first: from nothing but Python 3.11, once, until a pin changes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := run
.PHONY: run test lint bench chaos algorithms study venv docs

VARIANT := $(if $(shell command -v nvidia-smi),gpu,cpu)
# The stamp's name is a checksum of what .venv was made from: a changed pin asks for a new stamp.
STAMP := .venv/$(VARIANT)-$(shell cat requirements/$(VARIANT).txt pyproject.toml | cksum | tr ' ' '-')
PYTHON := .venv/bin/python
# No dependency resolution: it would put CUDA builds of torchvision beside a CPU build of torch, which cannot import.
INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps

run: venv
	@.venv/bin/rl run configs/arithmetic.yaml $(ARGS)

test: venv
	@$(PYTHON) -m pytest tests $(ARGS)

lint: venv
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright

bench: venv
	@for benchmark in tests/benchmarks/bench_*.py; do echo "$$benchmark"; $(PYTHON) $$benchmark $(ARGS); done

chaos: venv
	@$(PYTHON) -m pytest tests/chaos -s -m chaos $(ARGS)

algorithms: venv
	@$(PYTHON) -m pytest tests/e2e/test_every_algorithm.py -m algorithms $(ARGS)

study: venv
	@$(PYTHON) -m tests.study.study $(ARGS)

docs: venv
	@$(PYTHON) -m tests.learners.algorithms_page

venv: $(STAMP)

$(STAMP):
	@for python in python3.11 python3 none; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || true; \
	done; \
	if [ $$python = none ]; then \
	    echo "Python 3.11 or newer is needed, but python3 is $$(python3 --version 2>&1 || true); install python3.11"; \
	    exit 1; \
	fi; \
	echo "setting up .venv for $(VARIANT): a few minutes, once"; \
	$$python -m venv .venv
ifeq ($(VARIANT),cpu)
	@$(INSTALL) torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
endif
	@$(INSTALL) -r requirements/$(VARIANT).txt
	@$(INSTALL) --no-build-isolation -e .
	@rm -f .venv/cpu-* .venv/gpu-*
	@touch $@
