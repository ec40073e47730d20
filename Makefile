# make demo       build a small base and an adapter, merge them and check the result
# make test       formatting, lint, types, tests and documentation
# make test-cuda  the tests of the CUDA path, on a machine that has a GPU
# make benchmark  what a merge costs on this machine
# make docs       write docs/cli.md anew from the command line's own help, docs/supported.md from its table,
#                 and the types of the library's keywords from the options
#
# The first call sets up .venv. It is done again only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
BIN := .venv/bin
# one more than cores, for some tests wait
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(6, (os.cpu_count() or 1) + 1))')
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-cuda benchmark docs

demo: .venv/runtime
	$(BIN)/loratool demo loratool-demo --overwrite

# what is imported is compiled once, not by each of the processes that tests start
test: .venv/development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-cuda: .venv/development
	LORATOOL_TEST_CUDA=1 $(BIN)/pytest tests/merging/test_row_blocks.py tests/algebra/test_cuda.py

benchmark: .venv/development
	$(BIN)/python benchmarks/merge.py

docs: .venv/development
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_supported.py
	$(BIN)/python docs/generate_keywords.py

# torch comes first and alone: with its version settled, nothing later can ask for another build of it
.venv/runtime: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "loratool needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation --editable .
	touch $@

.venv/development: .venv/runtime
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@
