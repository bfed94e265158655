# make demo and make test need Python 3.11 to 3.13 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow check docs install install-test clean

demo: install
	$(BIN)/edgecompress compress --target jetson --overwrite

test: install-test
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-slow: install-test
	$(BIN)/python -m pytest -m slow -n auto --dist loadfile

check: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Rewrites docs/reference/cli.md and builds build/site. Not --quiet: mkdocs then hides warnings from --strict too.
docs: install-test
	$(BIN)/python docs/generate_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13)) " \
	  || (echo "edgecompress needs Python 3.11 to 3.13; name one with PYTHON=python3.12 make ..." >&2; exit 1)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e . -c constraints.txt
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e ".[test]" -c constraints.txt
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info
