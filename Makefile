# The targets are what CI runs. VENV=path puts the environment elsewhere; ARGS="..." is handed on to the program.
VENV ?= .venv
# One `command -v` for each name: dash looks at the first of several only. `:` at the end: make drops what exited with 127.
PYTHON ?= $(firstword $(shell for name in python3 python3.11 python; do command -v $$name; done 2>/dev/null; :))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1 - /p' $(firstword $(MAKEFILE_LIST))

setup: ## make the virtual environment (3 GB, two to three minutes); does nothing when it is there
	@test -n "$(PYTHON)" || { echo "set-up failed: no python3 on PATH; Python 3.11 is needed" >&2; exit 1; }
	@"$(PYTHON)" scripts/setup.py --venv "$(VENV)"

demo: setup ## train, publish, serve, score and replay on this machine
	@"$(VENV)/bin/lorasync" demo $(ARGS)

# Engines and trainers run side by side: more busy threads than cores make them crawl.
test: export OMP_NUM_THREADS ?= 1
test: setup ## run the tests
	@"$(VENV)/bin/python" -m pytest $(ARGS)

lint: setup ## style, types and arrows
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/ruff" format --check .
	@"$(VENV)/bin/mypy"
	@"$(VENV)/bin/lint-imports"

lock: ## write requirements/cpu-py311.txt anew from pyproject.toml
	@"$(PYTHON)" scripts/lock.py

clean: ## remove the virtual environment and all outputs
	rm -rf "$(VENV)" "$(VENV).lock" "$(VENV).log" demo_out dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
