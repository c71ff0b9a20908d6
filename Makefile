# `make demo` and `make test` need make and Python 3.11 or newer, nothing else: each target makes .venv itself.

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
.PHONY: help demo test test-lowest check bench quality format clean

help:
	@echo 'make demo    see a session survive a restart'
	@echo 'make test    all tests'
	@echo 'make test-lowest  the adapters on the oldest frameworks that pyproject.toml allows'
	@echo 'make check   format, lint, types, floors'
	@echo 'make bench   measure on this machine'
	@echo 'make quality the part of it that measures what rounding costs'
	@echo 'make format  rewrite the sources as make check wants them'
	@echo 'make clean   remove what the other targets made'

demo: $(INSTALLED)
	$(BIN)/agent-memory demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

# Twice: LangChain's agents want a newer langchain-core than a chat model does. The SQLite checkpointer of the older
# one does not run with today's aiosqlite. Old releases warn under newer ones of what they use.
LOWEST := .venv-lowest/bin/python
LOWEST_INSTALL := $(LOWEST) -m pip install --quiet --disable-pip-version-check
LOWEST_TEST := $(LOWEST) -m pytest -o filterwarnings=default
test-lowest: $(INSTALLED)
	$(BIN)/python -m venv --clear .venv-lowest
	$(LOWEST_INSTALL) --editable '.$(if $(BACKEND),[$(BACKEND)])' \
		hypothesis pytest pytest-asyncio pytest-socket pytest-timeout langgraph-checkpoint-sqlite \
		$$($(LOWEST) tests/support/lowest_versions.py langgraph llama-index)
	$(LOWEST_TEST) tests/unit/test_langchain_*.py tests/unit/test_llama_index_*.py
	$(LOWEST_TEST) tests/unit/test_langgraph_follow.py -k 'not sqlite and not in_coroutines'
	$(LOWEST_INSTALL) langgraph-checkpoint-sqlite $$($(LOWEST) tests/support/lowest_versions.py agents)
	$(LOWEST_TEST) tests/unit/test_langchain_*.py tests/unit/test_langgraph_follow.py

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
