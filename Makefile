# Everything runs in .venv, which is made from pyproject.toml and the pinned constraints.txt.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready

.PHONY: demo test lint format types clean

demo: $(READY)
	$(VENV)/bin/alsace demo

# Three processes on two cores: the tests on the real Slurm wait now and then. Files keep the order of tests/conftest.py.
test: $(READY)
	$(VENV)/bin/python -m pytest -n 3 --dist=loadfile --no-loadscope-reorder

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
