# `make` alone lists the targets. PYTHON chooses the interpreter that builds .venv, ARGS goes to the command behind a
# target: make demo ARGS="--num_train_epochs 2", make test ARGS="-k datasets".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
ARGS ?=
CONFIG ?= configs/vapt/digits.yaml
# Another table: make table DATA=drawn TABLE=outputs/counting ARGS="--dataset_name drawn/counting"
DATA ?= digits
TABLE ?= outputs/table
TABLE_CONFIGS ?= $(sort $(wildcard configs/*/$(DATA)*.yaml))
SEEDS ?= 0 1 2
RESULTS ?= outputs/results
RESULTS_DATA ?= digits drawn/sprite_location drawn/sprite_orientation drawn/counting

# Small tensors: several threads for each operation cost more than they bring, and test workers would share cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup test test-lowest lint format demo table results clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(VENV)/.installed  ## build .venv with the tested versions and install the package in it

# Two environments, each from a constraints file of its own.
$(VENV)/.installed: constraints.txt
$(LOWEST)/.installed: constraints-lowest.txt
$(VENV)/.installed $(LOWEST)/.installed: setup.cfg pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet -c $(filter constraints%,$^) -e ".[dev]"
	touch $@

test: setup  ## run the tests on two workers
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-lowest: $(LOWEST)/.installed  ## run the tests with the lowest supported versions, in .venv-lowest
	$(LOWEST)/bin/python -m pytest -n 2 $(ARGS)

lint: setup  ## check style without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup  ## train an adapter on handwritten digits, offline, in minutes
	$(BIN)/accelerate launch scripts/train.py --config $(CONFIG) $(ARGS)

table: setup  ## train every demo configuration with every seed and print the README's results table
	set -e; for config in $(TABLE_CONFIGS); do for seed in $(SEEDS); do \
	    name=$${config#configs/}; name=$${name%.yaml}; \
	    $(BIN)/accelerate launch scripts/train.py --config $$config --seed $$seed \
	        --output_dir $(TABLE)/$$name/seed$$seed $(ARGS); \
	done; done
	$(BIN)/python scripts/report.py $(TABLE)

results: setup  ## sweep every method and baseline on the digits and the drawn sets; several may run at once
	set -e; for data in $(RESULTS_DATA); do for config in $(sort $(wildcard configs/sweeps/*.yaml)); do \
	    $(BIN)/python scripts/sweep.py --config $$config --dataset_name $$data \
	        --output_dir $(RESULTS)/$$data/$$(basename $$config .yaml) $(ARGS); \
	done; done
	$(BIN)/python scripts/report.py $(RESULTS) --output_dir $(RESULTS)/report

clean:  ## remove what training and tests leave behind; .venv and .venv-lowest stay
	rm -rf outputs trainer_output build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './$(LOWEST)/*' -exec rm -rf {} +
