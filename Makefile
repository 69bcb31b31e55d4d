# The project's commands. Each sets up .venv on first use and is quick afterwards.
#   make run     the main job: a real kernel's set_memory_valid on numpy tables, judged
#   make test    the tests (PYTEST_MARK='full or not full' for everything)
#   make check   format, lint, types, tests
#   make docs    the documentation site, into build/site
#   make bench   every bound of docs/performance.md, measured (BENCH='--quick' and other options)
#   make clean   removes .venv and everything made; fetched kernels stay in the user's cache
PYTHON ?= python3
PYTEST_MARK ?= not full
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: run test check format lint types docs bench clean

run: $(VENV)/.run-installed
	@$(BIN)/python -m emu.demo

test: $(VENV)/.dev-installed
	$(BIN)/pytest -q -n 2 -m '$(PYTEST_MARK)'

check: lint types test

lint: $(VENV)/.dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev-installed
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases docs/_site
	$(BIN)/mypy -p benchmarks

docs: $(VENV)/.dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.bench-installed
	$(BIN)/python -m benchmarks $(BENCH)

format: $(VENV)/.dev-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	@echo "setting up $(VENV)" >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgtable needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)

# Only wheels are installed: no C compiler is needed.
$(VENV)/.run-installed: $(VENV)/bin/python pyproject.toml
	@$(PIP) install --only-binary :all: -e .
	@touch $@

$(VENV)/.dev-installed: $(VENV)/bin/python pyproject.toml
	@$(PIP) install --only-binary :all: -e '.[dev]'
	@touch $@ $(VENV)/.run-installed

$(VENV)/.bench-installed: $(VENV)/.dev-installed
	@$(PIP) install --only-binary :all: -e '.[dev,bench]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-judge dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
