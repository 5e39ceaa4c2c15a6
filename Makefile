# `make demo` runs the demo, `make test` checks lint, types and tests. Both install what they need, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint
demo: .venv/ready
	$(BIN)/python train.py experiment=demo

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@
