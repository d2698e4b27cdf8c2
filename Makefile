# Two commands on a fresh machine: make demo, make test. The rest: make help.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-keras soak check bench bench-precision bench-diagnosis clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.setup ## make .venv and install fromzero into it

demo: .venv/.setup ## train the notes' three networks on handwritten digits, in about two minutes
	$(BIN)/fromzero demo

test: .venv/.test ## install what tests need and run them
	$(BIN)/python -m pytest $(PYTEST)

test-keras: .venv/.test .venv/.keras ## compare the networks with Keras itself, layer by layer
	KERAS_BACKEND=torch $(BIN)/python -m pytest tests/test_keras.py $(PYTEST)

soak: .venv/.test ## the reliability tests to their full numbers, some five minutes; writes docs/reliability.md
	$(BIN)/python -m tests.soak --output docs/reliability.md

check: .venv/.check ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.setup .venv-bench/.setup ## speed beside Keras and PyTorch, in one run of 40 minutes to more than an hour; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks $(BENCH)

bench-precision: .venv/.setup ## whether bfloat16 learns as well as float32, a study of 48 runs; writes docs/precision.md
	$(BIN)/fromzero study benchmarks/precision.toml $(BENCH)
	$(BIN)/fromzero lessons precision --write docs/precision.md

bench-diagnosis: .venv/.setup ## how well diagnose names planted faults, and what its remedies do, in two hours; writes docs/diagnosis.md
	$(BIN)/python -m benchmarks.diagnosis $(BENCH)
	$(BIN)/python -m benchmarks.diagnosis --remedies --seeds 10 11 12 13 14 15 $(BENCH)
	$(BIN)/python -m benchmarks.diagnosis --render

clean: ## delete the environment and what tools left
	rm -rf .venv .venv-bench .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info

.venv/.setup: $(INPUTS)
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/.test: .venv/.setup
	$(INSTALL) --editable '.[test]'
	@touch $@

.venv/.check: .venv/.setup
	$(INSTALL) --editable '.[check]'
	@touch $@

.venv/.keras: .venv/.setup
	$(INSTALL) --editable '.[keras]'
	@touch $@

.venv-bench/.setup: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@
