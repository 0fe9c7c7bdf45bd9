# The commands of the project; each installs what it needs into .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
# pip's hundreds of lines as one that counts.
COUNT := awk '/^Collecting|^Installing/ {n++; printf "\r  %d packages", n} /ERROR/ {print} END {print ""}'

.PHONY: help install demo check test test-all bench bench-data bench-jobs bench-recovery soak clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/:/' | column -t -s:

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "[1/3] a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] packages: torch, deepspeed, ray and what they need (a few minutes the first time)"
	@$(PIP) torch | $(COUNT)
	@$(PIP) -e '.[dev]' | $(COUNT)
	@echo "[3/3] DeepSpeed's CPU op"
	@$(BIN)/python -m dltrain.training.cpu_op
	@touch $@

install: $(VENV)/.installed  ## everything into .venv

demo: install  ## handwriting: make the data, train on 2 workers, show the result and a page about it
	@test -d .data/digits/train || $(BIN)/python -m jobs.image_cnn make-data .data/digits
	@$(BIN)/dltrain run jobs/image_cnn.yaml
	@$(BIN)/dltrain report image-cnn

check: install  ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

test: install  ## the tests that need nothing but this machine
	$(BIN)/python -m pytest -q tests/unit -n 2
	$(BIN)/python -m pytest -q tests/dist tests/chaos tests/e2e -n 2 --dist worksteal \
		-m 'not (servers or lab or soak or long)' --durations=20

test-all: install  ## and those that need a server (S3), several hosts or minutes: .ci/run installs what they need
	$(BIN)/python -m pytest -q tests/chaos tests/e2e -n 2 --dist loadgroup -m '(servers or lab or long) and not soak' \
		--durations=20

bench: install  ## what dltrain costs against a bare DeepSpeed loop
	$(BIN)/python tests/bench/overhead.py --out tests/bench/results/overhead.json

bench-data: install  ## how fast batches arrive, against Ray Data, a DataLoader and the store: tests/bench/results
	@$(PIP) -e '.[bench]' | $(COUNT)
	@$(BIN)/python tests/bench/data.py --results tests/bench/results

bench-jobs: install  ## what every job reaches, against its goal and a baseline (JOB=speech_rnn for one)
	@$(BIN)/python tests/bench/train_jobs.py $(JOB) --results tests/bench/results

bench-recovery: install  ## seconds from a fault to the next new step, beside Ray Train (20 minutes; the lab needs root)
	@$(PIP) -e '.[bench]' | $(COUNT)
	@$(BIN)/python tests/bench/recovery.py --results tests/bench/results

soak: install  ## 40 minutes of faults; must come out as if nothing had happened (needs root)
	$(BIN)/python -m pytest -q tests/chaos tests/e2e -m soak
	@$(BIN)/python tests/bench/soak.py --results tests/bench/results

clean:  ## remove what was built
	rm -rf $(VENV) build *.egg-info
