# make demo | test | lint | clean: everything happens in .venv, installed once.
PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(PY) examples/demo.py

test: lint
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Runs again only when what it installs has changed.
$(INSTALLED): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[train,test]'
	touch $@

clean:
	rm -rf .venv build runs *.egg-info
