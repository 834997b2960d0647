PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/quickstart/mnc_shapes.yaml
INSTALLED := $(VENV)/.installed

.PHONY: install clients quickstart test test-faults lint

install: $(INSTALLED)

# setuptools that detectron2 can use must be there before, and the build must see it: hence no build isolation.
$(INSTALLED): requirements/pinned.txt requirements/detectron2.txt requirements/install_detectron2.py setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements/pinned.txt
	$(BIN)/python requirements/install_detectron2.py
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@

# What some tests skip without: Playwright, which needs a system's chromium, and programs that use the models.
clients: install
	$(BIN)/python -m pip install --no-deps --requirement requirements/clients.txt

quickstart: install
	$(BIN)/python train_net.py --config-file $(CONFIG) --resume OUTPUT_DIR output/quickstart

# A process for each core, of one thread: the tests of a file in one process, the files in the order of tests/conftest.py.
test: export OMP_NUM_THREADS := 1
test: install
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Trainings that are killed at random moments.
test-faults: install
	$(BIN)/python -m pytest -m faults tests/test_faults.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mnc_d2
