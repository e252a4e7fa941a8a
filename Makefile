# The commands of a checkout. `make` alone lists them.
#
#   PYTHON=python3.12   the interpreter that .venv is made with (any from 3.11)
#   ARGS='key=value'    arguments passed on, as in: make train ARGS='model=moa_t data=cifar100 data.download=true'

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Newer than pyproject.toml: the environment is complete and up to date. Gone: it is made afresh.
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help train test torture lint format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(READY) ## set up, train a small MOA on handwritten digits (a minute on 2 cores), say what to type next
	@$(BIN)/moa-train $(ARGS)
	@printf '%s\n' '  first    source $(BIN)/activate' \
		'  then     moa-train model=moa_t data=cifar100 data.download=true, moa-train --help, README.md'

test: lint ## set up, run all checks and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

torture: $(READY) ## kill, cut and damage real runs at random places, and print what was survived
	OMP_NUM_THREADS=1 $(BIN)/python scripts/torture.py $(ARGS)

lint: $(READY) ## check style, format, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, builds and caches; runs and data stay
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src conf tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: '$(PYTHON)' must be Python 3.11 or newer. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) (once, a few minutes: PyTorch is large) ..."
	@# An environment without its mark was interrupted half-way: begin again (pip has kept what it fetched).
	@test -e $(READY) || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@rm -f $(READY)
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)
