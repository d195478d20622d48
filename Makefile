# Everything runs in .venv, which `make env` builds from nothing.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= build/demo
RUNS ?= runs
SETS ?= replies replies_control rfc_title debian_synopsis
ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard persona_plug training eval tests)

# On a CPU idle OpenMP threads must not spin, and the tokenizer must not fork its own.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# Large pages where the kernel gives them on request: a training step takes some 8% less.
export THP_MEM_ALLOC_ENABLE ?= 1

.PHONY: help env test test-families test-serve lint format docs demo page serve-demo bench bench-tiny decide clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(STAMP) ## build .venv (PYTHON=..., TORCH=... choose versions)

$(STAMP): pyproject.toml .ci/env
	$(PYTHON) .ci/env $(VENV) '$(TORCH)'
	@touch $@

test: env ## run every test (ARGS="-k name" to choose, JOBS=1 for one process)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-families: env ## check every LLM family that transformers offers, and write docs/families.md
	$(BIN)/python -m tests.families.table
	$(BIN)/python -m pytest -m families tests/families $(ARGS)

test-serve: ## run the tests that need PostgreSQL, Chromium and vLLM, in environments of their own
	$(PYTHON) .ci/packages postgresql chromium
	$(PYTHON) .ci/env .venv-services '$(TORCH)' services
	.venv-services/bin/python -m pytest -m services tests --ignore=tests/serving/test_vllm.py $(ARGS)
	$(PYTHON) .ci/env-serve .venv-serve '$(TORCH)'
	.venv-serve/bin/python -m pytest -m services tests/serving/test_vllm.py $(ARGS)

lint: env ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m compileall -q $(SOURCES)

format: env ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Not quiet: MkDocs counts only those warnings that it shows.
docs: ## build the site in build/site, in an environment of its own; a warning is an error
	$(PYTHON) .ci/env-docs .venv-docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

# It goes on with a run of its own in that folder, and refuses any other.
demo: env ## fit a plug on generated replies, and see three users answer one request (DEMO=folder)
	mkdir -p $(DEMO)
	$(BIN)/persona-plug models pull smollm2-135m
	$(BIN)/persona-plug models pull minilm-l6
	$(BIN)/persona-plug data synthetic --kind replies --users 48 --items 12 --out $(DEMO)/replies.jsonl
	$(BIN)/persona-plug fit $(DEMO)/replies.jsonl --resume --recipe words --lora 8 --llm smollm2-135m --encoder minilm-l6 \
		--out $(DEMO)/plug --dtype auto --steps 40 --batch-size 8 --eval-every 20 --lr 3e-3 --max-input-tokens 160 \
		--max-answer-tokens 112 --targets-per-user 6 --report-samples 20 --generated 9 --examples 3

page: env ## open the page on the demo's plug (fits it first where it is missing)
	$(BIN)/python -c 'import gradio' 2> /dev/null || $(PYTHON) .ci/env $(VENV) '$(TORCH)' dev,app
	test -f $(DEMO)/plug/config.json || $(MAKE) demo
	$(BIN)/persona-plug demo $(DEMO)/plug --data $(DEMO)/replies.jsonl $(ARGS)

serve-demo: env ## serve the demo's plug with its users' histories on port 8000 (fits it first where it is missing)
	test -f $(DEMO)/plug/config.json || $(MAKE) demo
	$(BIN)/persona-plug users add $(DEMO)/replies.jsonl --store sqlite:///$(DEMO)/users.db --encoder minilm-l6 \
		--keep-text
	$(BIN)/persona-plug serve $(DEMO)/plug --store sqlite:///$(DEMO)/users.db --keep-text --name demo $(ARGS)

bench: env ## measure speed and memory against their floors
	$(BIN)/python -m eval.bench $(ARGS)

bench-tiny: env ## run every method on every task shape with tiny random models
	$(BIN)/python -m eval.tiny $(ARGS)

# Public sets alone; add further ones by their files: make decide SETS="rfc_title my_own".
decide: env $(SETS:%=$(RUNS)/%.jsonl) ## build public sets, compare what decides on each (hours), and render the page (SETS=names, RUNS=folder)
	for set in $(SETS); do \
		$(BIN)/python -m eval.run configs/decide/text.yaml data=$(RUNS)/$$set.jsonl task=$${set%_control} \
			out=$(RUNS)/$$set $(ARGS) || exit 1; done
	$(BIN)/python -m eval.report $(SETS:%=$(RUNS)/%/results.json) --decisions $(RUNS)/decide.md

$(RUNS)/debian_synopsis.jsonl: | env
	$(BIN)/persona-plug data debian --users 1000 --out $@
$(RUNS)/rfc_title.jsonl: | env
	$(BIN)/persona-plug data rfc --out $@
$(RUNS)/replies.jsonl: | env
	$(BIN)/persona-plug data synthetic --kind replies --users 144 --items 12 --held-out 0.45 --out $@
$(RUNS)/replies_control.jsonl: | env
	$(BIN)/persona-plug data synthetic --kind replies --users 144 --items 12 --held-out 0.45 --no-personal --out $@

clean: ## remove build products and caches, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
