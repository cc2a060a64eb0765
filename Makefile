# The two commands a newcomer needs are `make demo` and `make test`; nothing but Python >= 3.11 and make is assumed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
DEMO_FLAGS ?=
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench docs links lock clean

help:  ## List the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"

# Byte-compiled on purpose: every Airflow task is a new process, and without it each import costs two to three times as much.
$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	@echo "Installing into $(VENV) (about 1 GB, once) ..."
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

install: $(STAMP)  ## Install everything into .venv

demo: $(STAMP)  ## Run the closed loop: Airflow, MLflow, BentoML, drift, retraining (DATA=file.parquet, DEMO_FLAGS=--exit)
	@$(BIN)/airflow-mlops demo $(if $(DATA),--data $(DATA)) $(DEMO_FLAGS)

check: $(STAMP)  ## Lint, format, types, import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell airflow_mlops dags plugins docs tests benchmarks deploy docker-compose.yaml README.md CHANGELOG.md CONTRIBUTING.md

docs: $(STAMP)  ## Build the documentation, warnings are errors
	$(BIN)/sphinx-build -q -n -W --keep-going -b html docs docs/_build/html
	$(BIN)/sphinx-build -q -n -W --keep-going -b doctest docs docs/_build/doctest

links: $(STAMP)  ## Ask every outside address in the documentation whether it is still there
	$(BIN)/sphinx-build -q -b linkcheck docs docs/_build/linkcheck

# Integration tests wait for servers most of the time, so the others run beside them; what these said comes at the end.
test: check docs  ## Everything CI runs: check, docs, unit, contract, integration and system tests
	@$(BIN)/python -m pytest --durations=10 tests/unit tests/contract airflow_mlops/core tests/system > $(VENV)/others.log 2>&1 & others=$$!; \
	trap 'kill $$others' INT TERM; \
	$(BIN)/python -m pytest --durations=10 tests/integration; servers=$$?; \
	wait $$others; rest=$$?; cat $(VENV)/others.log; exit $$((servers | rest))

bench: $(STAMP)  ## Measure import, parse and step costs
	$(BIN)/python benchmarks/airflow_cost.py

lock: $(BIN)/uv  ## Resolve the dependencies again into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --extra all --group dev --no-emit-package airflow-mlops pyproject.toml -o requirements.lock

clean:  ## Remove what the commands made
	rm -rf $(VENV) .demo docs/_build .mypy_cache .ruff_cache .pytest_cache
