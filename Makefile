# Two commands from a clean clone: `make demo` tunes nano and leaves a profile; `make test` runs every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo check test lint docs notebook wheel clean

help:
	@echo 'make demo    installs into .venv, tunes the shipped model nano on the CPU, leaves outputs/demo/'
	@echo 'make check   lint and the tests of rules and arithmetic, which start no process'
	@echo 'make test    every test, two at a time; PROCESSES=1 runs one at a time'
	@echo 'make lint    ruff: rules and format; mypy: types'
	@echo 'make docs    builds the documentation site into site/, warnings are errors'
	@echo 'make notebook executes examples/tune_nano.ipynb and keeps its outputs, about three minutes'
	@echo 'make wheel   builds, checks and installs the wheel into empty environments'
	@echo 'make clean   removes .venv, build, dist and site; never outputs/'
	@echo 'PYTHON=/path/to/python3.12 before any of them picks the interpreter of a new .venv'

demo: $(STAMP)
	$(BIN)/stagevar-tune --model nano --budget 57% --out outputs/demo --fresh

# Most tests compute on one core or wait for a process that they started, so two at a time take half as long. Tests of Ray
# come after all others and one by one: a cluster starts a dozen processes, and only one may be there. Both parts always run.
PROCESSES ?= 2
test: $(STAMP)
	$(BIN)/python -m pytest -m 'not cluster' $(if $(filter-out 1,$(PROCESSES)),-n $(PROCESSES) --dist loadfile --no-loadscope-reorder); \
	rest=$$?; $(BIN)/python -m pytest -m cluster && exit $$rest

# Rooms of rules and arithmetic: no process, no cluster, no model larger than a few thousand weights.
CHECK := stagevar/schedule stagevar/prompts stagevar/tensors stagevar/sampling stagevar/accelerators \
	tuner/config tuner/proposals tuner/statistics

check: lint
	$(BIN)/python -m pytest -m "not process" $(CHECK:%=tests/%)

docs: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

notebook: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[notebook]'
	$(BIN)/python .ci/execute_notebook.py examples/tune_nano.ipynb

wheel:
	.ci/install_wheel.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check stagevar tuner tests benchmarks search_spaces training examples docs integrations
	$(BIN)/python -m mypy

# uv installs in a fraction of pip's time; where it cannot be had, pip does the same.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check uv \
		&& $(BIN)/uv pip install -q --python $(BIN)/python -e '.[dev]' \
		|| $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist site *.egg-info
