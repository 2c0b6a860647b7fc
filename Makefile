# `make test` and `make demo` set up everything they need in .venv; there is no other step.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
LAYERS := cli pipeline storage tasks
# A folder in which the package looks as it is imported: editable installs hide the layout of the tree from mypy.
FARM := build/typing/mergepipe
# mergekit is what our results are compared with, never a dependency: it has an environment of its own.
RIVAL := .venv-mergekit
# Where benchmarks leave their figures, for `python -m benchmarks.compare OLD.json NEW.json`.
RESULTS := build/bench
# Processes that run tests side by side.
WORKERS ?= 2

.PHONY: help test test-all test-mergekit demo lint format types docs bench bench-full bench-gpu proof-7b proof-70b check clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mergepipe needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,test,lint]'
	touch $@

test: $(READY)  ## the tests, without the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(READY)  ## all tests, a fuzzer that follows coverage among them
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m pytest -n $(WORKERS) -m '' $(ARGS)

$(RIVAL)/ready:
	$(PYTHON) -m venv $(RIVAL)
	$(RIVAL)/bin/python -m pip install --quiet --upgrade pip
	$(RIVAL)/bin/python -m pip install --quiet -c constraints.txt torch
	$(RIVAL)/bin/python -m pip install --quiet mergekit==0.1.5
	touch $@

test-mergekit: $(READY) $(RIVAL)/ready  ## compare with mergekit 0.1.5, recipe by recipe
	MERGEPIPE_MERGEKIT_PYTHON=$(CURDIR)/$(RIVAL)/bin/python $(BIN)/python -m pytest -m '' tests/oracle $(ARGS)

demo: $(READY)  ## train a small base and experts, merge them, print accuracy per task
	$(BIN)/mergepipe demo $(ARGS)

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## mypy --strict
	rm -rf $(FARM)
	mkdir -p $(FARM)
	ln -s $(foreach layer,$(LAYERS),$(CURDIR)/$(layer)) $(wildcard $(CURDIR)/src/mergepipe/*.py) $(CURDIR)/src/mergepipe/py.typed $(FARM)
	MYPYPATH=build/typing $(BIN)/mypy --cache-dir build/typing/cache -p mergepipe

docs: $(READY)  ## what the documentation says about commands, methods and the tree is so
	$(BIN)/python -m pytest -q tests/test_repo tests/test_cli/test_help.py $(ARGS)

bench: $(READY)  ## the benchmarks in minutes, at sizes that show where time goes; results in build/bench
	mkdir -p $(RESULTS)
	$(BIN)/python -m benchmarks.bench_run --method all --reader direct --repeats 2 --json $(RESULTS)/run.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_run --repeats 2 --no-rival --json $(RESULTS)/readers.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_shares --json $(RESULTS)/shares.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_kernels --json $(RESULTS)/kernels.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_dask --json $(RESULTS)/dask.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_plan --size 70B --repeats 1 --json $(RESULTS)/plan.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_tadrop --json $(RESULTS)/tadrop.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_rkl --json $(RESULTS)/rkl.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_store --json $(RESULTS)/store.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_write --json $(RESULTS)/write.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_start --json $(RESULTS)/start.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_svd --size medium --route randomized --json $(RESULTS)/svd.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_memory --json $(RESULTS)/memory.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_reads --json $(RESULTS)/reads.json $(ARGS)
	$(BIN)/python -m benchmarks.bench_growth --size 0.1B --size 0.3B --models 2 --models 3 --json $(RESULTS)/growth.json $(ARGS)

bench-full: $(READY)  ## every benchmark at full size, in some hours and 40 GB; results in build/bench-full
	mkdir -p $(RESULTS)-full
	$(BIN)/python -m benchmarks.bench_run --method all --json $(RESULTS)-full/run.json $(ARGS)
	for bench in $(filter-out bench_gpu bench_run bench_svd,$(basename $(notdir $(wildcard benchmarks/bench_*.py)))); do \
	  echo "== $$bench"; \
	  $(BIN)/python -m benchmarks.$$bench --json $(RESULTS)-full/$${bench#bench_}.json $(ARGS) || exit 1; \
	done
	$(BIN)/python -m benchmarks.bench_svd --size full --json $(RESULTS)-full/svd.json $(ARGS)

bench-gpu: $(READY)  ## a GPU against the CPU: SVD units and row scoring of 70B-sized matrices
	$(BIN)/python -m benchmarks.bench_gpu $(ARGS)

proof-7b: $(READY)  ## merge 7B models of real bytes under 2 GiB, killed five times (70 GB of disk)
	$(BIN)/python -m benchmarks.proof_7b $(ARGS)

proof-70b: $(READY)  ## merge 70B models whose layers share extents, killed ten times (root, xfsprogs, 60 GB of disk)
	$(BIN)/python -m benchmarks.proof_70b $(ARGS)

check: test lint types  ## what .ci/run runs

clean:  ## remove the environment, caches and build folders
	rm -rf .venv $(RIVAL) build mergepipe.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
