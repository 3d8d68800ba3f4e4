# The two commands of the README, and a check of style and types. Each makes what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS := runs/quickstart-at runs/quickstart-at-awp

.PHONY: quickstart experiments-small test test-trackers test-oldest test-gpu docs lint $(RUNS)

# Trains plain adversarial training and the same with AWP on real digits, one core each, attacks
# both, measures gap and flatness, and puts them side by side.
quickstart: $(VENV)/installed
	$(MAKE) --no-print-directory -j2 $(RUNS)
	$(BIN)/robustflat landscape $(RUNS) --draws 3 --output runs/quickstart-landscape.png
	$(BIN)/robustflat report $(RUNS) --output runs/quickstart-report.html
	$(BIN)/robustflat compare $(RUNS)
	@echo "Open runs/quickstart-report.html, or see the curves: $(BIN)/tensorboard --logdir runs"

$(RUNS): runs/quickstart-%: $(VENV)/installed
	$(BIN)/robustflat train configs/quickstart/$*.yaml --overwrite
	$(BIN)/robustflat evaluate $@
	$(BIN)/robustflat flatness $@

# Makes a share of the digits runs that docs/results/evidence keeps again, and says how far the rows
# are apart.
SHARE ?= 0.1
experiments-small: $(VENV)/installed
	$(BIN)/python scripts/evidence.py redo --share $(SHARE)

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The tests with MLflow and W&B, which `make test` skips: mlflow and torchattacks want other versions
# of requests, and W&B's service is asked for in a process of its own.
test-trackers: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --quiet --editable '.[mlflow,wandb]'
	$(BIN)/python -m pytest tests/test_trackers.py

# The oldest torch that is promised, and the tests of what robustflat is for: perturbation, step,
# training (by several processes too), evaluation, flatness.
CORE := ascent ball batchnorm checkpoint data_batches distributed displace evaluate evaluate_gap \
        flatness_curvature flatness_sharpness flatness_state global inputs ladder meta \
        numerics objectives optim precision processes resume step train train_distributed \
        trajectories weights
test-oldest: $(VENV)/installed-oldest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(CORE:%=tests/test_%.py)

# Needs a GPU; without one every test is skipped with a sentence.
test-gpu: $(VENV)/installed-test
	$(BIN)/python -m pytest -m gpu -rs tests/test_gpu.py

# The documentation, into site/. A link that leads nowhere, or a page left out, is an error.
docs: $(VENV)/installed-docs
	PYTHONWARNINGS=ignore NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open site/index.html; for its search: $(BIN)/python -m http.server -d site"

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

$(VENV)/installed-oldest: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --editable '.[test]' 'torch==2.6.*' 'torchvision==0.21.*'
	touch $@

$(VENV)/installed-docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --editable '.[docs]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed $(VENV)/installed-test
