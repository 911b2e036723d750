# Two commands: `make demo` and `make test`. Each does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types install clean

install: $(STAMP)

# torch before anything that depends on it, so that pip takes the pinned CPU build where one is offered.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[torch,data,plot,dev]"
	@touch $(STAMP)

demo: install
	$(BIN)/altgrad train --engine forward --beside backprop --out runs/demo --overwrite

test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # two processes of one thread each: small tensors gain nothing from more

lint: install
	$(BIN)/ruff check altgrad tests benchmarks examples
	$(BIN)/ruff format --check altgrad tests benchmarks examples

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
