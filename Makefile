# Every target first makes .venv, where it is missing or older than pyproject.toml.

PYTHON := $(shell python3.12 --version >/dev/null 2>&1 && echo python3.12 || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench format clean .venv

help: ## Print this list
	@awk -F ':.*## ' '/^[.a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## Fit latent-variable models to real digits and compare them: a table and pictures
	$(BIN)/pvae demo

test: $(STAMP) ## Run the tests, in two processes
	$(BIN)/pytest -n 2

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(STAMP) ## Time pvae beside its peers, which are installed first (25 minutes)
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks

format: $(STAMP) ## Put the code into the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove caches and build leftovers, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv: $(STAMP) ## Install pvae and its tools into .venv

$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and \
		"pvae needs Python 3.12 or newer, and $(PYTHON) is " + sys.version.split()[0] + \
		". Install a newer one, then run: make PYTHON=/path/to/python")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --editable '.[dev]'
	@touch $@
