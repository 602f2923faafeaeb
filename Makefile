# make demo and make test set up their environment themselves; make env sets up nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# CUDA builds of torch, for make gpu: flash-attn and Transformer Engine compile against the torch that is installed.
TORCH_INDEX ?= https://download.pytorch.org/whl/cu130
OUT ?= outputs/gpu_check
# A file's tests stay in one process, because they share fixtures and warm ranks, and so do all of tests/slurm (see
# tests/conftest.py); their order is random, the same for a SEED. Three processes on two cores, because many tests wait: for a cluster, a time limit, a rank that is gone.
# If one of them crashes, the run ends: its replacement would wait for ever for the tests of the first.
SEED ?= 1
AT_ONCE := --numprocesses 3 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --random-order --random-order-seed=$(SEED)

.PHONY: help env demo test test-fast test-gpu gpu gpu-check slurm triton lint format docs published clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(READY) ## the environment in .venv, which the other targets make too

demo: $(READY) ## a real model answers from a long real document, over 2 ranks; figures in outputs/demo/result.json
	$(BIN)/python -m recipes.generate experiment=generate/demo

test: $(READY) slurm ## all tests that this machine can run
	$(BIN)/python -m pytest $(AT_ONCE)

test-fast: $(READY) ## the tests that take seconds: without those marked slow or slurm
	$(BIN)/python -m pytest $(AT_ONCE) -m "not slow and not slurm"

test-gpu: $(READY) ## what needs a GPU, on a machine with one
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { echo "no CUDA device here"; exit 1; }
	$(BIN)/python -m pytest tests/gpu

gpu: $(READY) ## a CUDA build of torch; then flash-attn and Transformer Engine, compiled for it (minutes to hours)
	$(BIN)/python -c 'import torch; raise SystemExit(torch.version.cuda is None)' || { $(BIN)/python -m pip uninstall -y torch \
		&& $(BIN)/python -m pip install --constraint constraints.txt torch --index-url $(TORCH_INDEX) \
			--extra-index-url https://pypi.org/simple; }
	$(BIN)/python -m pip install ninja packaging pybind11 wheel
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation flash-attn 'transformer-engine[core_cu13,pytorch]'
	$(BIN)/python -m recipes.doctor

gpu-check: $(READY) ## check this machine's GPU in minutes: make gpu-check OUT=outputs/gpu_check
	$(BIN)/python -m recipes.bench gpu_check out=$(OUT)

slurm: ## a real Slurm for its tests, installed where this is root and there is apt-get; they are skipped where not
	@(for each in slurmctld slurmd munged sbatch; do command -v $$each >/dev/null || exit 1; done) || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; } \
		|| echo "Slurm is not here and cannot be installed: its tests are skipped"

triton: $(READY) ## Triton, 200 MB, for the tests of its kernels in its interpreter; they are skipped without it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt triton \
		|| echo "Triton cannot be installed: its tests are skipped"

lint: $(READY) ## ruff, mypy, import-linter, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## pages of the public API, from its docstrings, in outputs/docs
	$(BIN)/python -m docs.build_api outputs/docs

published: $(READY) ## predicted against published times: longctx/cost/README.md, in a minute
	$(BIN)/python -m tests.cost.page

clean: ## remove the environment and what runs have written
	rm -rf $(VENV) outputs

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "longctx needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
