# `make demo` and `make test` set up all they need: Python 3.11 is enough.
PYTHON ?= python3
VENV := .venv
SERVERS := .venv-servers
PEERS := .venv-peers
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-gpu test-servers bench check models clean help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e .
	@touch $@

$(VENV)/dev: $(VENV)/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	@touch $@

demo: $(VENV)/run ## Distil the bundled student twice and write a page about it
	$(BIN)/potstill demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/dev ## Lint, types and the fast tests (under 5 minutes on two cores)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow and not gpu and not servers" -n 2 --dist loadfile

test-slow: $(VENV)/dev ## Tests that train models
	$(BIN)/pytest -m "slow"

test-gpu: $(VENV)/dev ## Tests that need a GPU
	$(BIN)/pytest -m gpu

# vLLM's own requirements ask for torchvision, torchaudio and torchcodec, which text does not need.
$(SERVERS)/done: constraints-servers.txt
	$(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

test-servers: $(VENV)/dev $(SERVERS)/done ## Tests against vLLM, llama.cpp and transformers (ten minutes, 3.5 GB)
	$(BIN)/pytest -m servers

# Liger asks for Triton, which a CPU has no use for.
$(PEERS)/done: constraints-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch trl peft
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c $< liger-kernel
	@touch $@

bench: $(VENV)/run $(PEERS)/done ## Speed and memory beside TRL, Liger and transformers (one to two hours, 1.5 GB)
	$(BIN)/python -m benchmarks $(NAMES)

models: $(VENV)/dev ## Fetch the real models of recipes/smollm2.toml
	$(BIN)/python tools/fetch_models.py

clean: ## Remove the environments and all caches, keep runs/
	rm -rf $(VENV) $(SERVERS) $(PEERS) .pytest_cache .ruff_cache build dist
