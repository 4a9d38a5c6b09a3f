# Two commands do everything on a fresh machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export HF_HUB_OFFLINE := 1

.PHONY: help setup setup-demo demo test lint check bench audit sbom clean

help:
	@echo "make demo    fine-tune real experts, merge them with every method, print the table"
	@echo "make test    run the tests"
	@echo "make lint    formatting, lint, types, import directions"
	@echo "make check   lint and test, as the continuous integration does"
	@echo "make audit   look the installed packages up in the database of known vulnerabilities"
	@echo "make sbom    write sbom.json, the list of the installed packages (CycloneDX)"
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

$(VENV)/audit: $(VENV)/dev
	$(PIP) install --constraint constraints.txt 'pip-audit>=2.7,<3' 'cyclonedx-bom>=5,<8'
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

# packages that the service does not know are skipped by pip-audit without an error, so what was looked up is counted
audit: $(VENV)/audit
	@$(BIN)/pip-audit --skip-editable --progress-spinner off --format json --output $(VENV)/audit.json || { \
	echo "make audit: a known vulnerability, or no answer from the vulnerability service; see above" >&2; exit 1; }
	@$(BIN)/python -c 'import json, sys; \
	found = json.load(open("$(VENV)/audit.json"))["dependencies"]; known = [d for d in found if "vulns" in d]; \
	print(f"{len(known)} of {len(found)} packages were looked up, no known vulnerability"); \
	sys.exit(0 if 2 * len(known) > len(found) else "make audit: the vulnerability service does not know most packages")'

sbom: $(VENV)/audit
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o sbom.json $(BIN)/python
	@echo "sbom.json: $$($(BIN)/python -c 'import json; print(len(json.load(open("sbom.json"))["components"]))') packages"

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
