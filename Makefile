PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.requirements-installed

.PHONY: setup train test lint docs

setup: $(INSTALLED)

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed, for example: make setup PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

train: setup
	$(BIN)/python -m experiments.train --config=configs/digits.py --workdir=runs/digits

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

docs: setup
	$(BIN)/python docs/build_config.py
	$(BIN)/python -m sphinx --fail-on-warning --quiet docs docs/_build/html
	@echo open docs/_build/html/index.html
