# The two commands of the README, and a check of style and types. Each makes what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS := runs/quickstart-at runs/quickstart-at-awp

.PHONY: quickstart test lint $(RUNS)

# Trains plain adversarial training and the same with AWP on real digits, one core each, attacks
# both, measures gap and flatness, and puts them side by side.
quickstart: $(VENV)/installed
	$(MAKE) --no-print-directory -j2 $(RUNS)
	$(BIN)/robustflat landscape $(RUNS) --output runs/quickstart-landscape.png
	$(BIN)/robustflat report $(RUNS) --output runs/quickstart-report.html
	$(BIN)/robustflat compare $(RUNS)
	@echo "Open runs/quickstart-report.html, or see the curves: $(BIN)/tensorboard --logdir runs"

$(RUNS): runs/quickstart-%: $(VENV)/installed
	$(BIN)/robustflat train configs/quickstart/$*.yaml --overwrite
	$(BIN)/robustflat evaluate $@
	$(BIN)/robustflat flatness $@

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed $(VENV)/installed-test
