PYTHON ?= python3
# What to install: REQUIREMENTS=locks/python3.11.txt installs the versions with which the tests passed.
REQUIREMENTS ?= requirements.txt
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
INSTALLED := .venv/.$(notdir $(REQUIREMENTS))-installed

.PHONY: setup train test pytest test-fast slow lint docs lock

setup: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed, for example: make setup PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

train: setup
	$(BIN)/python -m experiments.train --config=configs/digits.py --workdir=runs/digits

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint pytest

pytest: setup
	$(PYTEST)

# AGC, layers, optimizers, convolutions, data and configs: two minutes, and no run is trained.
FAST := $(addprefix tests/,test_agc.py test_layers.py test_optimizers.py test_schedules.py \
	test_fields.py test_errors.py test_files.py test_architecture.py test_docs.py convolution data experiments/test_config.py)

test-fast: setup
	$(PYTEST) $(FAST)

# Large networks, long fuzzing and wider cases of what `make test` holds already.
slow: setup
	$(PYTEST) -m slow

docs: setup
	$(BIN)/python docs/build_config.py
	$(BIN)/python docs/build_results.py
	$(BIN)/python -m sphinx --fail-on-warning --quiet docs docs/_build/html
	@echo open docs/_build/html/index.html

lock: setup
	mkdir -p locks
	$(BIN)/python -m pip freeze --disable-pip-version-check --exclude-editable \
		> locks/python$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
