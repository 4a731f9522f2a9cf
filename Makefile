# make demo    the whole path on a small corpus, two processes, about five minutes
# make test    lint nothing, test everything (make check adds lint and types)
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
DEMO   ?= demo
JOBS   ?= 2

.PHONY: help setup demo demo-quick test check lint types format constraints clean

help:
	@sed -n '1,2s/^# //p' Makefile
	@echo "also: make setup check lint types format constraints clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt launch/find-python.sh
	@set -e; python=$$(sh launch/find-python.sh); \
	test -x $(PY) || { echo "making $(VENV) with $$python"; "$$python" -m venv $(VENV); }
	@echo "installing the pinned packages (torch is large: a few minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(PY) -m megatron_lion demo --output $(DEMO)

demo-quick: $(STAMP)
	@$(PY) -m megatron_lion demo --output $(DEMO) --quick

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache >$(VENV)/.imports 2>&1 || { cat $(VENV)/.imports; exit 1; }

types: $(STAMP)
	@$(PY) -m mypy

format: $(STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

check: lint types test

constraints: $(STAMP)
	@{ echo "# Exact versions of the environment that the test suite runs in (Python 3.12, Linux x86-64)."; \
	   echo "# Made by: make constraints"; \
	   $(PY) -m pip freeze --exclude-editable | grep -iv '^pip==\|^setuptools=='; } > constraints.txt

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
