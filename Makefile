# Every target installs what it needs into .venv; Python 3.11+ and pip are all that must be there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
TORCH  ?= 2.13.0
# Where PyTorch publishes its CPU builds; asked only if pip's own sources have none. Without the dependencies of torch,
# which come from the package index with everything else.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# make install VERIFIED=1 checks the sha256 of every package but torch (Python 3.11 on Linux).
VERIFIED ?=
# Extra arguments for pytest: make test PYTEST="-k cache -x"
PYTEST ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-train test test-slow test-versions test-suites check style docs bench dist clean

RUN       := $(VENV)/bin
STAMP     := $(VENV)/.installed
# Compiling every file of every package takes longer than the rest of the installation; Python compiles what it imports.
PIP       := $(RUN)/python -m pip --disable-pip-version-check
INSTALL   := $(PIP) install -q --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
WORKERS   ?= 2
export HF_HOME ?= $(CURDIR)/.data/huggingface
export MPLBACKEND ?= Agg
export TOKENIZERS_PARALLELISM ?= false

help: ## Show this help
	@echo "Usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv and install retro-hf with everything for development

$(STAMP): pyproject.toml constraints.txt constraints-hashed.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'make needs Python 3.11 or newer; name it with: make PYTHON=/path/to/python3.11'; exit 1; }
	@test -x $(RUN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(PIP) --version >/dev/null 2>&1 || $(RUN)/python -m ensurepip
	@echo "Installing PyTorch $(TORCH) for the CPU into $(VENV) ..."
	@$(INSTALL) --no-deps "torch==$(TORCH)+cpu" 2>/dev/null || \
	  $(INSTALL) --no-deps --retries 1 --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)" 2>/dev/null || { \
	  printf '%s\n' '' \
	    'WARNING: there is no CPU build of torch $(TORCH) for this Python, neither in the sources of pip nor in' \
	    '$(TORCH_CPU_INDEX). The build of the package index follows. On Linux it is the one for CUDA:' \
	    '5.7 GB with what it needs. To stop, press Ctrl-C; then name another source of CPU builds:' \
	    '    make install TORCH_CPU_INDEX=https://your.mirror/whl/cpu' '' >&2; \
	  $(INSTALL) "torch==$(TORCH)"; }
	@echo "Installing retro-hf into $(VENV) ..."
	@$(if $(VERIFIED),$(PIP) install -q --no-compile --no-deps --require-hashes -r constraints-hashed.txt)
	@$(INSTALL) $(if $(VERIFIED),--no-build-isolation) -e ".[dev]"
	@touch $@

demo: $(STAMP) ## Ask a real language model with and without documents, change one, measure (10 minutes on 2 cores)
	$(RUN)/python examples/demo.py

demo-train: $(STAMP) ## Train the toy from scratch, which examples/demo_toy.py shows
	$(RUN)/python examples/train_demo.py --bf16

test: $(STAMP) ## Run the tests (20 minutes at most on 2 cores)
	$(RUN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

test-slow: $(STAMP) ## Run the tests marked slow; they want Chromium, and install what quantizes
	$(INSTALL) -e ".[quantization]"
	$(PIP) install -q gradio  # by its own versions, which are older than those of constraints.txt
	$(RUN)/python -m pytest -m slow --timeout 3600 $(PYTEST)

test-versions: $(STAMP) ## Test the lowest, locked and newest versions of all dependencies: make test-versions VERSIONS="newest"
	$(PIP) install -q "uv>=0.9"
	$(RUN)/python tools/versions.py --workers $(WORKERS) $(VERSIONS)

test-suites: $(STAMP) ## Run transformers' own suites on our classes (3 to 5 minutes on 2 cores)
	$(RUN)/python -m pytest -m suites -n $(WORKERS) --dist worksteal tests/suites $(PYTEST)

check: $(STAMP) ## Check format, lint, types, imports, spelling, length and the rules for model files
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/lint-imports --no-cache
	$(RUN)/mlinter src/retro_hf --no-progress --no-cache
	$(RUN)/codespell
	@# At most 500 lines a file; the model file, which is the paper from top to bottom, has 800.
	@find src -name '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > ($$2 ~ /modeling_retro\.py$$/ ? 800 : 500) \
	  { print $$2 " has " $$1 " lines; split it by its jobs"; long = 1 } END { exit long }'
	@! grep -rnE 'type: ignore(\[[a-z-]+\])?$$' src || { echo 'Say after each "type: ignore[...]" why: "  # reason".'; exit 1; }

style: $(STAMP) ## Format the code and repair what ruff can
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

docs: $(STAMP) ## Build the site of the documentation into site/; a broken link is an error
	$(INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet

bench: $(STAMP) ## Measure speed and memory beside retro-pytorch
	$(PIP) install -q --no-deps retro-pytorch==0.3.9
	$(RUN)/python benchmarks/peers.py

dist: $(STAMP) ## Build the wheel and the source distribution, and check how the package index will show them
	$(PIP) install -q twine
	rm -rf dist
	$(RUN)/python -m hatchling build
	$(RUN)/python -m twine check --strict dist/*

clean: ## Remove .venv, caches and what the demo made
	rm -rf $(VENV) build dist site demo_output .versions .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
