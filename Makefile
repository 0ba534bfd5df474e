# Start with `make demo` or `make test`. Both create the environment they need in .venv.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-data lint docs bench clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

demo: .venv/ready  ## compare methods on handwritten digits and on a photograph
	$(BIN)/steep compare digits --methods sven adabelief ps-kd --minutes 2 --out out/digits
	$(BIN)/steep compare photo --methods sven adabelief --minutes 3 --out out/photo

test: .venv/ready  ## run all tests
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

test-data: .venv/ready  ## run the tests that read real data, from STEEP_DATA
	$(BIN)/python -m pytest -q -n 2 tests/tasks tests/test_foreign_batches.py tests/evidence/test_claims.py

lint: .venv/ready  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/docs-ready  ## build the site, with an executed gallery, in docs/_build/html
	$(BIN)/python -m sphinx -q -W docs docs/_build/html

bench: .venv/ready  ## measure costs and write them to benchmarks/results
	for file in benchmarks/*.py; do $(BIN)/python $$file --out benchmarks/results/$$(basename $$file .py).json || exit 1; done

clean:
	rm -rf .venv out docs/_build docs/gallery docs/methods
