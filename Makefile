# make demo       build a small base and an adapter, merge them and check the result
# make test       formatting, lint, types, tests and documentation
# make benchmark  what a merge costs on this machine
# make docs       write docs/cli.md anew from the command line's own help, and docs/supported.md from its table
#
# The first call sets up .venv. It is done again only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test benchmark docs

demo: .venv/runtime
	$(BIN)/loratool demo loratool-demo --overwrite

test: .venv/development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

benchmark: .venv/development
	$(BIN)/python benchmarks/merge.py

docs: .venv/development
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_supported.py

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
