# Two commands do everything on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export HF_HUB_OFFLINE := 1

.PHONY: help setup setup-demo demo test lint check bench clean

help:
	@echo "make demo    fine-tune real experts, merge them with every method, print the table"
	@echo "make test    run the tests"
	@echo "make lint    formatting, lint, types, import directions"
	@echo "make check   lint and test, as the continuous integration does"
	@echo "make bench   compare speed and memory with cp and with mergekit (long)"

# a stamp per environment: made again only when the requirements change
$(VENV)/torch: constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	@touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) install --constraint constraints.txt --editable '.[demo]'
	@touch $@

setup: $(VENV)/dev

setup-demo: $(VENV)/demo

demo: setup-demo
	$(BIN)/python -m examples.demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

bench: setup
	$(BIN)/python -m benchmarks.merge_speed

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
