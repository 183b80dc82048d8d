# Everything runs in .venv, which is made from pyproject.toml and the pinned constraints.txt.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready

.PHONY: demo test look lint format types clean

demo: $(READY)
	$(VENV)/bin/alsace demo

# Three processes on two cores: the tests on the real Slurm wait now and then. Files keep the order of tests/conftest.py.
test: $(READY)
	$(VENV)/bin/python -m pytest -n 3 --dist=loadfile --no-loadscope-reorder

# The demo's report and TensorBoard in a headless Chromium; screenshots in build/screenshots.
look: $(READY)
	ALSACE_LOOK_AT=runs/demo $(VENV)/bin/python -m pytest tests/browser

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
