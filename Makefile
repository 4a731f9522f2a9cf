# make demo    the whole path on a small corpus, two processes, five to ten minutes
# make test    the tests except the slow ones, at most 15 minutes on two cores (make check adds lint and types)
# make docs    the documentation site in site/; make notebooks runs examples/ and stores the outputs
# make test-ci the slow tests; make test-full injects every fault and writes docs/scorecard.md (about 90 minutes)
VENV   ?= .venv
PY     := $(VENV)/bin/python
DEMO   ?= demo
JOBS   ?= 2
# The extra of pyproject.toml to install, and additional arguments for pytest; CI sets both.
EXTRA  ?= dev
STAMP  := $(VENV)/.installed-$(EXTRA)
FLAGS  ?=
# Name of a case for make chaos (all are listed without it), and options of `python -m faults`.
CASE   ?=
OPTIONS ?=
PYTEST  = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

.PHONY: help setup demo demo-quick test test-ci test-nightly test-full chaos check lint types format constraints docs notebooks clean

help:
	@sed -n '1,4s/^# //p' Makefile
	@echo "also: make setup check lint types format constraints test-nightly chaos clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt launch/find-python.sh
	@set -e; python=$$(sh launch/find-python.sh); \
	test -x $(PY) || { echo "making $(VENV) with $$python"; "$$python" -m venv $(VENV); }
	@echo "installing the pinned packages (torch is large: a few minutes the first time, without output)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRA)]'
	@touch $(STAMP)
	@echo "done; next: source $(VENV)/bin/activate, then megatron-lion --help; or make demo"

demo: $(STAMP)
	@$(PY) -m megatron_lion demo --output $(DEMO)

demo-quick: $(STAMP)
	@$(PY) -m megatron_lion demo --output $(DEMO) --quick

test: $(STAMP)
	@$(PYTEST) -m "not slow and not full" $(FLAGS)

test-ci: $(STAMP)
	@$(PYTEST) -m "slow and not full" $(FLAGS)

# Property tests with random seeds and ten times as many examples.
test-nightly: $(STAMP)
	@$(PYTEST) -m hypothesis --hypothesis-profile nightly --timeout 3000 $(FLAGS)

FAULTS = OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m faults --jobs $(JOBS) $(OPTIONS)

# A case that has a row of this commit in fault-results/ is left out, so an interrupted run can be continued; FORCE=1
# runs all again.
test-full: $(STAMP)
	@$(FAULTS) $(if $(FAMILY),--family '$(FAMILY)',--all) --docs $(if $(filter 1,$(FORCE)),--force)

chaos: $(STAMP)
	@$(FAULTS) $(CASE)

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) .ci/words.py
	@$(VENV)/bin/lint-imports --no-cache >$(VENV)/.imports 2>&1 || { cat $(VENV)/.imports; exit 1; }

types: $(STAMP)
	@$(PY) -m mypy

format: $(STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

# mkdocs.yml is strict: a broken link or anchor fails.
docs: $(STAMP)
	@$(PY) docs/update_reference.py --check
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "open site/index.html; the search needs a server: $(PY) -m http.server --directory site"

# PATH: the notebooks call megatron-lion as a reader does. The other settings keep times and machines out of the files.
notebooks: $(STAMP)
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m nbconvert --to notebook --inplace --execute \
	    --ExecutePreprocessor.record_timing=False --ClearMetadataPreprocessor.enabled=True \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec examples/*.ipynb

check: lint types test

# From the largest environment: make constraints EXTRA=ci
constraints: $(STAMP)
	@{ echo "# Exact versions of the environment that the test suite runs in (Python 3.12, Linux x86-64)."; \
	   echo "# Made by: make constraints EXTRA=ci"; \
	   $(PY) -m pip freeze --exclude-editable | grep -iv '^pip==\|^setuptools=='; } > constraints.txt

clean:
	rm -rf $(VENV) $(DEMO) site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
