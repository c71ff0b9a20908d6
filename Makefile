# Every target needs make and Python 3.11 or newer, nothing else: it makes .venv itself.

# What runs MLX: Apple silicon needs no choice; elsewhere one of cpu, cuda12, cuda13.
ifneq ($(shell uname -s),Darwin)
BACKEND ?= cpu
endif

comma := ,
EXTRAS := $(if $(BACKEND),$(BACKEND)$(comma))all
BIN := .venv/bin
# Two stamps: what runs the product, and with the tools of developers. The demo needs only the first.
RUNTIME := .venv/runtime-$(or $(BACKEND),metal)
INSTALLED := .venv/installed-$(or $(BACKEND),metal)

NEW_ENOUGH := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
# Not every tool of developers has a wheel for the newest Python, so that one is taken last.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.14 python3; do \
	$$python $(NEW_ENOUGH) >/dev/null 2>&1 && echo $$python && break; done)

# Recipes are checked by a test: GNU make 3.81, which Apple ships, runs them, and their tools have BSD's options only.
.DEFAULT_GOAL := help
.PHONY: help demo unit test test-heavy test-lowest test-newest test-wheel test-gguf test-huggingface test-memos check bench quality first-day dist wheels docs notebooks ecosystem reliability format clean test-clients test-sdks pictures bench-eviction bench-rivals bench-geometries test-scale server-load

help:
	@echo 'make demo         see a session survive a restart'
	@echo 'make unit         the tests that run no model, in less than a minute'
	@echo 'make test         all tests, in several processes'
	@echo 'make test-heavy   the tests that make test leaves out because they take long'
	@echo 'make test-lowest  the tests of the adapters, on the oldest frameworks that pyproject.toml allows'
	@echo 'make ecosystem    the tests inside packages that others wrote, and the table of what they reuse'
	@echo 'make test-newest  all tests, on the newest mlx-lm and frameworks, whatever pyproject.toml allows'
	@echo 'make test-wheel   the wheels of make dist in a new environment, as a user has them'
	@echo 'make test-gguf    the tests of GGUF models; compiles llama-cpp-python, which takes minutes'
	@echo 'make test-huggingface  the tests of models of transformers; installs PyTorch'
	@echo 'make test-memos   the tests inside MemOS, which has an environment of its own'
	@echo 'make docs         the site of the documentation, in build/site; a warning is an error'
	@echo 'make notebooks    run the notebooks and write what they print and draw into them'
	@echo 'make test-clients  the agents for the command line, which npm installs, and the tests with them'
	@echo 'make test-scale   a cluster of Ray on this machine: nodes killed and added, and the table of what moved'
	@echo 'make test-sdks    the frameworks and tools that call servers, and the tests with them'
	@echo 'make check        format, lint, types, floors'
	@echo 'make reliability  kill, damage and soak stores for 40 minutes, and the table of what was found'
	@echo 'make server-load  load a server for ten minutes, and the table of what was found'
	@echo 'make bench        measure speed and quality on this machine'
	@echo 'make bench-eviction  replay traces of agents with other rules of what leaves a full store first'
	@echo 'make bench-rivals  build mlx-lm, transformers, llama.cpp and vllm-mlx, and replay one conversation on each'
	@echo 'make bench-geometries  time to first token on the shapes of published models, where Metal or CUDA is'
	@echo 'make quality      measure only what rounding the KV cache costs'
	@echo 'make first-day    ten steps on a new machine, above all a Mac, and one report to send back'
	@echo 'make dist         the distributions, in dist'
	@echo 'make wheels       whether pip finds all packages for a Mac, without installing them'
	@echo 'make pictures     take the pictures of the pages that the documentation shows; needs Chromium'
	@echo 'make format       rewrite the sources as make check wants them'
	@echo 'make clean        remove what the other targets made'

demo: $(RUNTIME)
	$(BIN)/agent-memory demo

# One worker for each core, but not more than eight: each of them imports the frameworks. The tests of one file run
# in one worker, because they share its models. Files are started in the order in which pytest finds them.
PYTEST_PARALLEL := -n logical --maxprocesses=8 --dist loadfile --no-loadscope-reorder

# Tests start many interpreters, and each of them would compile our sources again.
unit test test-heavy: export PYTHONDONTWRITEBYTECODE =

unit: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m 'not model and not heavy' tests/unit

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m 'not heavy'

test-heavy: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_PARALLEL) -m heavy

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

# What pyproject.toml caps is upgraded beyond its cap; pip warns of the contradiction and does it all the same.
NEWEST := .venv-newest/bin/python
test-newest: export PYTHONDONTWRITEBYTECODE =
test-newest: $(INSTALLED)
	$(BIN)/python -m venv --clear .venv-newest
	$(NEWEST) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),dev]'
	$(NEWEST) -m pip install --quiet --disable-pip-version-check --upgrade 'mlx$(if $(BACKEND),[$(BACKEND)])' mlx-lm \
		langchain langchain-core langgraph llama-index-core
	$(NEWEST) -m pytest $(PYTEST_PARALLEL) -o filterwarnings=default

# The distributions that are published; the one of compat/ itself is for code of one's own.
DISTRIBUTIONS := . compat/langchain compat/llama-index
REPOSITORY_URL ?=
dist: export REPOSITORY_URL := $(REPOSITORY_URL)
dist: $(INSTALLED)
	rm -rf dist
	for folder in $(DISTRIBUTIONS); do \
		(cd $$folder && $(CURDIR)/$(BIN)/python -m hatchling build -d $(CURDIR)/dist) || exit 1; done

# From another folder, so that nothing of the clone is found.
WHEEL := .venv-wheel/bin/python
test-wheel:
	$(PYTHON) -m venv --clear .venv-wheel
	$(WHEEL) -m pip install --quiet --disable-pip-version-check --find-links dist \
		'agent-memory-mlx[$(if $(BACKEND),$(BACKEND)$(comma))agents,llama-index]' \
		langchain-mlx-persistent llama-index-llms-mlx-persistent
	cd .venv-wheel && bin/python ../tests/support/wheel_check.py

# These packages are many and heavy, and an agent's environment rarely has all of them, so they have one of their own.
ECOSYSTEM := .venv-ecosystem/bin/python
ecosystem: $(INSTALLED)
	$(BIN)/python -m venv .venv-ecosystem
	$(ECOSYSTEM) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),ecosystem-tests]'
	$(ECOSYSTEM) -m pytest tests/ecosystem
	$(ECOSYSTEM) benchmarks/ecosystem.py
	$(BIN)/python benchmarks/report.py

# What runs the other types of models is heavy, so each of them has an environment of its own. PyTorch is the release
# that was tried: a newer one may bring gigabytes for another platform.
TORCH ?= torch==2.13.0
GGUF := .venv-gguf/bin/python
test-gguf: $(INSTALLED)
	$(BIN)/python -m venv .venv-gguf
	$(GGUF) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),gguf,openai,dev]'
	$(GGUF) -m pytest tests/manager/test_gguf.py tests/manager/test_openai.py

HUGGINGFACE := .venv-huggingface/bin/python
test-huggingface: $(INSTALLED)
	$(BIN)/python -m venv .venv-huggingface
	$(HUGGINGFACE) -m pip install --quiet --disable-pip-version-check '$(TORCH)' --editable '.[$(EXTRAS),huggingface,openai,dev]'
	$(HUGGINGFACE) -m pytest tests/manager/test_huggingface.py tests/manager/test_guide.py

# MemOS asks for older releases than we do, so no environment can be asked for both. Its own has what it needs. Where our
# code runs in MemOS, our libraries come before those of MemOS.
MEMOS := .venv-memos/bin/python
test-memos: $(INSTALLED)
	$(BIN)/python -m venv .venv-memos
	$(MEMOS) -m pip install --quiet --disable-pip-version-check 'MemoryOS==2.0.33' '$(TORCH)' accelerate
	MEMOS_BASE_PATH=.venv-memos PYTHONPATH=tests $(BIN)/python tests/support/memos_run.py $(MEMOS)
	MEMOS_BASE_PATH=.venv-memos PYTHONPATH=src:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		$(MEMOS) tests/support/memos_register.py

# Agents for the command line are published on npm; those whose package does not fit this machine are skipped.
CLIENTS := .clients
test-clients: $(INSTALLED)
	npm install --no-fund --no-audit --prefix $(CLIENTS) @anthropic-ai/claude-code@2 @openai/codex@0 opencode-ai@1
	CLIENTS_FOLDER=$(CLIENTS) $(BIN)/python -m pytest tests/clients

# LlamaIndex's client needs an older release of OpenAI's, so it runs apart from the others. What these packages ask for
# takes pip a quarter of an hour to bring together, and uv seconds.
SDKS := .venv-sdks/bin/python
OPENAI_LIKE := .venv-openai-like/bin/python
test-sdks: $(INSTALLED)
	$(BIN)/python -m venv .venv-sdks
	$(SDKS) -m pip install --quiet --disable-pip-version-check uv
	$(SDKS) -m uv pip install --quiet --python $(SDKS) --editable '.[$(EXTRAS),dev,client-tests]'
	$(BIN)/python -m venv .venv-openai-like
	$(OPENAI_LIKE) -m pip install --quiet --disable-pip-version-check 'llama-index-llms-openai-like>=0.8,<1'
	OPENAI_LIKE_PYTHON=$(OPENAI_LIKE) $(SDKS) -m pytest tests/clients/test_sdks.py tests/clients/test_openai_like.py

# Ray is heavy, and has no wheel for every Python, so it has an environment of its own.
SCALE := .venv-scale/bin/python
test-scale: $(INSTALLED)
	$(BIN)/python -m venv .venv-scale
	$(SCALE) -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),scale,scale-tests,dev]'
	@command -v npm >/dev/null || echo 'without npm there is no emulator of Azure, and its tests are skipped'
	! command -v npm >/dev/null || npm install --no-fund --no-audit --prefix $(CLIENTS) azurite@3
	AZURITE=$(CLIENTS)/node_modules/.bin/azurite-blob $(SCALE) -m pytest tests/unit/storage/cold tests/unit/scale
	RAY_USAGE_STATS_ENABLED=0 $(SCALE) benchmarks/raylets.py
	$(SCALE) benchmarks/cold_loss.py
	$(BIN)/python benchmarks/report.py

reliability: $(INSTALLED)
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/report.py

server-load: $(INSTALLED)
	$(BIN)/python benchmarks/server_load.py
	$(BIN)/python benchmarks/report.py

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python benchmarks/ttft.py
	$(BIN)/python benchmarks/ttft_plot.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/append_cost.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/encryption.py
	$(BIN)/python benchmarks/cold.py
	$(BIN)/python benchmarks/fleet.py
	$(BIN)/python benchmarks/server.py
	@$(MAKE) quality

bench-eviction: $(INSTALLED)
	$(BIN)/python benchmarks/eviction.py
	$(BIN)/python benchmarks/report.py

# Each rival has an environment of its own below RIVALS; half an hour for each round.
RIVALS ?= .venv-rivals
ROUNDS ?= 5
bench-rivals: $(INSTALLED)
	$(BIN)/python benchmarks/rivals.py --environments '$(RIVALS)' --rounds $(ROUNDS)
	$(BIN)/python benchmarks/report.py

bench-geometries: $(INSTALLED)
	$(BIN)/python benchmarks/geometries.py

quality: $(INSTALLED)
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality_plot.py
	$(BIN)/python benchmarks/report.py

pictures: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python tests/support/pictures.py

MODEL ?= tiny-chat
first-day: $(INSTALLED)
	$(BIN)/python benchmarks/first_day.py --model '$(MODEL)'

wheels: $(INSTALLED)
	$(BIN)/python tests/support/mac_wheels.py

# Its authors warn at every build of a later mkdocs, which is not what is built with here.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),docs]'
	$(BIN)/mkdocs build --strict

notebooks: $(INSTALLED)
	$(BIN)/python tests/support/run_notebooks.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-wheel .venv-ecosystem .venv-gguf .venv-huggingface .venv-memos build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks .venv-sdks .venv-openai-like .clients .venv-rivals .venv-scale
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# MLX has no build for x86_64 on a Mac. Under Rosetta uname says x86_64 too, so the processor itself is asked.
ON_A_MAC := sys=$$(uname -s); machine=$$(uname -m); \
	if test "$$sys" = Darwin && test "$$(sysctl -n hw.optional.arm64 2>/dev/null)" != 1 && test "$$machine" != arm64; then \
		echo 'agent-memory needs a Mac with Apple silicon (M1 or newer): MLX does not run on Intel Macs' >&2; exit 1; fi; \
	mac_python() { test "$$sys" != Darwin || "$$1" -c 'import platform, sys; sys.exit(platform.machine() != "arm64")' || { \
		echo "$$1 is a Python for Intel, which Rosetta translates, and MLX cannot run in it: install an arm64 Python" \
			"(from python.org or with brew in /opt/homebrew), run make clean, or name it with make PYTHON=..." >&2; exit 1; }; }

# A .venv of a Python that is too old, or gone, is made anew.
$(RUNTIME): pyproject.toml
	@$(ON_A_MAC); \
	if $(BIN)/python $(NEW_ENOUGH) 2>/dev/null; then mac_python $(BIN)/python; exit 0; fi; \
	python='$(PYTHON)'; \
	test -n "$$python" && "$$python" $(NEW_ENOUGH) 2>/dev/null || { \
		echo 'agent-memory needs Python 3.11 or newer with its venv module: install it, or name it with make PYTHON=...' >&2; \
		exit 1; }; \
	mac_python "$$python"; \
	echo "making .venv with $$python"; \
	"$$python" -m venv --clear .venv
	@echo 'installing into .venv (a few minutes the first time)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

$(INSTALLED): $(RUNTIME)
	@echo 'installing what the tests need into .venv'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),dev]'
	@touch $@
