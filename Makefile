# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# One release of torch for everybody who runs the tests; a CPU build is enough.
TORCH ?= torch==2.13.0
# Types of the real TensorRT; its own dependencies cannot be installed everywhere, and types need none of them.
STUBS ?= tensorrt-stubs==10.13.0.35.1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint types bench clean

demo: $(VENV)/.installed-all
	$(BIN)/rwkv-edge demo -o artifacts/demo

test: lint
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/all.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-all: pyproject.toml | $(VENV)/bin/python
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[dev]'
	$(PIP) install --no-deps $(STUBS)
	@touch $@ $(VENV)/.installed-all

clean:
	rm -rf $(VENV) artifacts build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
