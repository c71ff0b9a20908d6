# Every target needs make and Python 3.11 or newer, nothing else: it makes .venv itself.

# What runs MLX: Apple silicon needs no choice; elsewhere one of cpu, cuda12, cuda13.
ifneq ($(shell uname -s),Darwin)
BACKEND ?= cpu
endif

comma := ,
EXTRAS := $(if $(BACKEND),$(BACKEND)$(comma))all,dev
BIN := .venv/bin
INSTALLED := .venv/installed-$(or $(BACKEND),metal)

NEW_ENOUGH := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python $(NEW_ENOUGH) >/dev/null 2>&1 && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo unit test test-lowest check bench quality format clean

help:
	@echo 'make demo         see a session survive a restart'
	@echo 'make unit         the tests that run no model, in less than a minute'
	@echo 'make test         all tests, in several processes'
	@echo 'make test-lowest  the tests of the adapters, on the oldest frameworks that pyproject.toml allows'
	@echo 'make check        format, lint, types, floors'
	@echo 'make bench        measure speed and quality on this machine'
	@echo 'make quality      measure only what rounding the KV cache costs'
	@echo 'make format       rewrite the sources as make check wants them'
	@echo 'make clean        remove what the other targets made'

demo: $(INSTALLED)
	$(BIN)/agent-memory demo

# One worker for each core, but not more than eight: each of them imports the frameworks. The tests of one file run
# in one worker, because they share its models. Files are started in the order in which pytest finds them.
PYTEST_PARALLEL := -n logical --maxprocesses=8 --dist loadfile --no-loadscope-reorder

# Tests start many interpreters, and each of them would compile our sources again.
unit test: export PYTHONDONTWRITEBYTECODE =

unit: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m 'not model' tests/unit

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL)

# There are two rounds because LangChain's agents need a newer langchain-core than a chat model does. The SQLite
# checkpointer of the older one does not run with today's aiosqlite. Old releases warn about the newer ones below them.
LOWEST := .venv-lowest/bin/python
LOWEST_INSTALL := $(LOWEST) -m pip install --quiet --disable-pip-version-check
LOWEST_TEST := $(LOWEST) -m pytest -o filterwarnings=default
test-lowest: $(INSTALLED)
	$(BIN)/python -m venv --clear .venv-lowest
	$(LOWEST_INSTALL) --editable '.$(if $(BACKEND),[$(BACKEND)])' \
		hypothesis pytest pytest-asyncio pytest-socket pytest-timeout langgraph-checkpoint-sqlite \
		$$($(LOWEST) tests/support/lowest_versions.py langgraph llama-index)
	$(LOWEST_TEST) tests/unit/langchain_agent_memory tests/unit/llama_index_agent_memory \
		-k 'not test_langgraph or not (sqlite or in_coroutines)'
	$(LOWEST_INSTALL) langgraph-checkpoint-sqlite $$($(LOWEST) tests/support/lowest_versions.py agents)
	$(LOWEST_TEST) tests/unit/langchain_agent_memory

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python benchmarks/ttft.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/append_cost.py
	$(BIN)/python benchmarks/families.py
	@$(MAKE) quality

quality: $(INSTALLED)
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality_plot.py
	$(BIN)/python benchmarks/report.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv of a Python that is too old, or gone, is made anew.
$(INSTALLED): pyproject.toml
	@$(BIN)/python $(NEW_ENOUGH) 2>/dev/null || { \
		python='$(PYTHON)'; \
		test -n "$$python" && "$$python" $(NEW_ENOUGH) 2>/dev/null || { \
			echo 'agent-memory needs Python 3.11 or newer with its venv module: install it, or name it with make PYTHON=...' >&2; \
			exit 1; }; \
		echo "making .venv with $$python"; \
		"$$python" -m venv --clear .venv; }
	@echo 'installing into .venv (a few minutes the first time)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@
