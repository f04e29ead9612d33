# `make demo` shows the whole path on this machine, `make check` is for while you work, `make test` checks everything.
VENV ?= .venv
PYTHON ?= python3
# Options of `make gpu`, for instance GPU="--parts tests,decode".
GPU ?=
BIN := $(VENV)/bin
# Two processes, and no more on larger machines: tests start processes of their own.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo stop check test coverage gpu lint format clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(VENV)/.installed ## the virtual environment with every pinned dependency

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python is {v[0]}.{v[1]}, at least 3.11 is needed; give one with make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: install ## prepare, train on 2 workers, register, serve, answer: all on this machine
	$(BIN)/python deploy/demo.py start

stop: ## end what `make demo` started, and nothing else
	@test ! -x $(BIN)/python || $(BIN)/python deploy/demo.py stop

check: lint ## lint, types, and all tests that need no Ray
	$(PYTEST) -m "not ray"

test: lint ## lint, types and the whole suite
	$(PYTEST)

coverage: lint ## the whole suite, and which lines it runs: half as long again, for it traces every line of Python
	$(PYTEST) --cov --cov-report=term:skip-covered

gpu: ## on a GPU, without the environment: its tests, then training and decoding against the card's limits, in 8 minutes
	$(PYTHON) benchmarks/gpu.py $(GPU)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## rewrite the code the way `make test` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: stop ## remove the environment and what the demo made
	rm -rf $(VENV) .demo
