# make demo: see it. make test: trust it. Both work on a fresh machine with Python 3.10 or newer.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Keys for the kernel's sockets, so that it has no reason to warn of plain ones.
NBCONVERT := $(BIN)/jupyter nbconvert --execute --to html --output-dir build \
	--ExecutePreprocessor.store_widget_state=False --KernelManager.transport_encryption=auto

.PHONY: demo lab test lint bench bench-memory docs clean

demo: .venv/lab
	@mkdir -p build
	@echo "Running the notebooks from top to bottom; 2 to 5 minutes."
	$(NBCONVERT) notebooks/*.ipynb
	@echo
	@echo "Done. Open build/01_look.html, 02_estimate.html and 03_train.html in a browser to see the result without a kernel,"
	@echo "and type 'make lab' to move the sliders yourself."

lab: .venv/lab
	$(BIN)/jupyter lab notebooks/01_look.ipynb

test: .venv/dev
	tests/ensure_chromium.sh
	@echo "Running the tests in $(WORKERS) processes."
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check qlab tests docs
	$(BIN)/ruff format --check qlab tests docs
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: .venv/dev
	tests/ensure_chromium.sh
	$(BIN)/python -m tests.bench.bench_panel
	$(BIN)/python -m tests.bench.bench_quality
	$(BIN)/python -m tests.bench.bench_step 1 64
	$(BIN)/python -m tests.bench.bench_live

bench-memory: .venv/dev
	$(BIN)/python -m tests.bench.bench_memory

docs: .venv/docs
	$(BIN)/mkdocs build --strict

.venv/bin/python:
	@echo "Making a Python environment in .venv."
	@$(PYTHON) -m venv .venv

.venv/lab .venv/dev .venv/docs: pyproject.toml | .venv/bin/python
	@echo "Installing qlab and what it needs for '$(@F)' into .venv; a few minutes the first time."
	@set -o pipefail; $(BIN)/pip install --progress-bar off -e ".[cpu,$(@F)]" | sed -nu -e 's/^Collecting \([^ ]*\).*/  \1/p' -e 's/^Installing collected.*/  unpacking/p'
	@touch $@

clean:
	rm -rf .venv build site
