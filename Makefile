# Development commands. Run `make` without a target to list them.
#
#   PYTHON=python3.12   Python interpreter (3.11 or newer) with which .venv is created
#   ARGS='key=value'    arguments of the command, e.g. make train ARGS='model=moa_t data=cifar100'

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# If this file is newer than pyproject.toml and contains the path of this folder, to which the editable install points,
# the environment is up to date. If only pyproject.toml is newer, pip runs again. If the path differs, as in a copied or
# moved checkout, the environment is created again.
READY := $(VENV)/ready
# Earlier versions of this file left it empty.
OWNER := $(shell test -x $(BIN)/python && \
	if test -s $(READY); then cat $(READY); elif test -e $(READY); then pwd -P; fi)
ifneq ($(OWNER),$(CURDIR))
CREATE := yes
.PHONY: $(READY)
endif
.PRECIOUS: $(READY) # otherwise, make deletes it on Ctrl-C

.DEFAULT_GOAL := help
.PHONY: help train test gpu torture lint format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(READY) ## set up .venv, train a small MOA on handwritten digits (a minute or two on 2 cores)
	@$(BIN)/moa-train $(ARGS)
	@printf '%s\n' '  next     source $(BIN)/activate' \
		'  then     moa-train model=moa_t data=cifar100, moa-train --help, README.md'

test: lint ## set up .venv, run all checks and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

gpu: $(READY) ## on a machine with a CUDA GPU: check and measure what needs one, write docs/GPU.json (up to an hour)
	$(BIN)/python scripts/gpu.py $(ARGS)

torture: $(READY) ## inject random faults into real runs, and print how many were handled
	OMP_NUM_THREADS=1 $(BIN)/python scripts/torture.py $(ARGS)

lint: $(READY) ## check style, formatting, types and imports between layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format the code and apply ruff's automatic fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, builds and caches; keep runs and data
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src conf tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: '$(PYTHON)' is not Python 3.11 or newer. Choose another one: make PYTHON=python3.12" >&2; exit 1; }
	@test ! -e $(VENV) || test -e $(READY) || { \
		echo "error: make did not create $(VENV), and does not change it. Remove it (rm -r $(VENV)) and run make" \
			"again, or use it without make: pip install --editable '.[dev]'." >&2; exit 1; }
	@echo "Setting up $(VENV) (once, a few minutes: PyTorch is large) ..."
	@mkdir -p $(VENV) && echo 'The setup was interrupted.' > $(READY)
	@# $(PYTHON) may be that of the environment that is removed.
	@test -z '$(CREATE)' || { python=$$($(PYTHON) -c 'import sys; print(sys._base_executable)') && \
		find $(VENV) -mindepth 1 ! -path $(READY) -delete && "$$python" -m venv $(VENV); } || { \
		echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu, run: apt install python3-venv" >&2; exit 1; }
	@again='Run the same make command again: finished downloads are not repeated.'; \
	trap 'echo "error: The setup was interrupted. '"$$again"'" >&2; exit 130' INT TERM; \
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]' || { \
		echo "error: The setup failed; the reason is above. Without a network, pip needs PIP_INDEX_URL=MIRROR. $$again" >&2; \
		exit 1; }
	@pwd -P > $(READY)
