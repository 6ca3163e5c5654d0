# `make demo` and `make test` need Python >= 3.11 and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test launchers long lint types environment clean

demo: environment  ## merge the models that ship with the repository, and measure what came out
	$(BIN)/python recipes/quickstart/demo.py

test: environment  ## the whole suite, a process for each core
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

launchers: environment  ## what the suite leaves out: several processes, killed ones, several machines
	$(BIN)/python -m pytest -m launchers

long: environment  ## what the suite takes a slice of: every kill, more cases (an hour or more)
	$(BIN)/python -m pytest -m long -s

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: environment
	$(BIN)/mypy

environment: .venv/installed

# torch first and pinned, so that no other package's range chooses another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-output
