# Two commands matter: `make train` and `make test`. Each does all the set-up that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Processes that share the tests, each module to one of them: for two cores. 0 is this process alone.
WORKERS ?= 2
# One thread for each, and for what it starts: tensors of tests are too small for more. And bytecode is written, whatever
# the environment says: each of the processes that tests start would compile the package again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder
FUZZ_CASES ?= 5000
FUZZ_SEED ?= 0
KILLS ?= 30

.DEFAULT_GOAL := help
.PHONY: help setup train test lint types pytest matrix fuzz kills bench clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lightning-optim needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed  ## Virtual environment with pinned versions

train: setup  ## Train a small GPT on the Python standard library, by one command
	$(BIN)/lightning-optim fit --config examples/char_lm/config.yaml

test: setup lint types pytest  ## Lint, types and the test suite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

pytest: setup
	$(PYTEST) $(PYTEST_ARGS)

matrix: setup  ## Every optimizer through every test, which takes many times as long as `make test`
	$(PYTEST) --matrix $(PYTEST_ARGS)

fuzz: setup  ## Thousands of random cases of each fuzzer; FUZZ_CASES=, FUZZ_SEED= for others
	FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/fuzz

kills: setup  ## Kill trainings, resume them, compare the bits; KILLS= for more or fewer than 30
	$(BIN)/python -m tests.kills --kills $(KILLS)

bench: setup  ## Host step against torch; writes benchmarks/results/
	$(BIN)/python benchmarks/host_step.py

clean:  ## Remove the environment, builds and runs
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache *.egg-info
