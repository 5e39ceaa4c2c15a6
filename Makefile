# `make demo` runs the demo, `make real` the real study's core, `make test` checks lint, types and tests.
# `make test-scale` runs ranks x stages as a whole table, 100 kills (their log is scale.log), and the demo on two
# processors, in hours.
# They install what they need, once.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo real test test-all test-gpu test-scale lint
demo: .venv/ready
	$(BIN)/python train.py experiment=demo
	@echo "next: source .venv/bin/activate, then python train.py --help"

HAS_BF16 := import sys; from sdpo.distributed import device; from sdpo.model.engine import has_bf16
HAS_BF16 += ; sys.exit(not has_bf16(device("auto")))
real: .venv/ready
	@if $(BIN)/python -c '$(HAS_BF16)'; then $(BIN)/python train.py experiment=real/core; else \
	    echo "no bf16 arithmetic here: fp32 takes several times as long; its cost first" && \
	    $(BIN)/python train.py experiment=real/core precision=fp32 plan=true && \
	    $(BIN)/python train.py experiment=real/core precision=fp32; fi

test: lint
	$(PYTEST) -m "not slow"

# Each of the tests of other processors occupies every core by itself.
test-all: lint
	$(PYTEST) --no-loadscope-reorder --ignore tests/test_processors.py
	$(BIN)/python -m pytest tests/test_processors.py -k numeric

# On a machine with a GPU, in three minutes. BIN=FOLDER names the programs of another environment than .venv.
test-gpu:
	$(BIN)/python3 -m pytest -m gpu

test-scale: SHELL := bash -o pipefail
test-scale: .venv/dev
	TABLE=whole KILLS=100 $(BIN)/python -m pytest --verbose --capture=no tests/scale 2>&1 | tee scale.log
	$(BIN)/python -m pytest tests/test_processors.py -k demo

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: requirements.txt
	@echo "installing into .venv: minutes, and 3 GB or more"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@
