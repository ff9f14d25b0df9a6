# make quickstart   set up and run the whole chain on a laptop (about ten minutes)
# make test         set up and run the tests
# make check        lint, format and types
# Set-up happens once: the stamp files depend on pyproject.toml and constraints.txt alone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: quickstart test check format setup clean

quickstart: $(VENV)/.product
	$(BIN)/python run_sweep.py run quickstart --open

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "varscale needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: its exact pin picks the tested build before anything else asks for a newer one.
$(VENV)/.product: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: .ci/trackio.txt $(VENV)/.product
	$(PIP) --editable '.[dev]'
	$(PIP) --requirement .ci/trackio.txt
	$(PIP) --no-deps trackio
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
