# `make demo` and `make test` work on a fresh machine with Python 3.11+, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo docs prepared programs test test-all test-fast bench bench-gpu check format clean

demo: $(VENV)/installed
	$(BIN)/distrain train recipes/digits.yaml --processes 2

test: prepared
	$(BIN)/python scripts/test.py

# every combination too, of which `make test` runs a set that covers them
test-all: prepared
	$(BIN)/python scripts/test.py --all

# all that tests need
prepared: $(VENV)/installed programs

# what is no package of Python, one after the other as each locks the system's packages
programs:
	sh scripts/install-slurm.sh --if-possible
	sh scripts/install-chromium.sh --if-possible

# the quick tests of the rooms that differ from the main branch
test-fast: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/test.py --changed

# the tables of benchmarks/results/, beside other tools: 20 minutes on 2 cores
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/run.py

# 8 minutes on one CUDA GPU
bench-gpu: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/run.py --gpu

# the pages as a site: docs/_build/index.html
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

check: $(VENV)/packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# what pip would do with one core alone; of the packages' files some are for other versions of Python
$(VENV)/installed: $(VENV)/packages
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >$(VENV)/compiled.txt || :
	touch $@

$(VENV)/packages: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"distrain needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]}. Try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "installing into $(VENV): some minutes and 7 GB, most of it what PyTorch needs on GPUs"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
