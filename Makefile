# longpretrain: `make help` lists the targets. Needs python3.11 with headers, g++ and bash.
PYTHON ?= python3.11
VENV := .venv
UV := $(VENV)/bin/uv
# uv does not read pip's setting of this name by itself; an empty value is fine.
INSTALL := VIRTUAL_ENV="$(CURDIR)/$(VENV)" UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(UV) pip install -q --compile-bytecode
LOCKS := install/requirements.lock install/fairseq.lock
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup demo test exactness golden check lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/'

setup: $(VENV)/.done  ## build the environment in .venv from the locks (about a minute; again only when they change)

demo: setup  ## the main job on real text: short model -> 4,096 tokens -> pretraining on 2 ranks -> HF export
	python -m longpretrain.demo

test: setup check  ## everything a 2-core CPU machine can check
	python -m pytest

exactness: setup  ## every trainer, stage, rank count, resume and launcher compared; writes docs/exactness.md (18 minutes on two cores)
	PYTHONPATH=tests python -m exactness docs/exactness.md

golden: setup  ## write tests/golden/ anew, after a change that is meant to change the numbers
	PYTHONPATH=tests python -m exactness.golden --write

check: setup  ## lint, format, types, shell scripts
	ruff check .
	ruff format --check .
	mypy
	shellcheck launch.sh slurm/*.sh slurm/*.sbatch .ci/run

lock:  ## resolve install/requirements.in again into the hashed lock
	VIRTUAL_ENV="$(CURDIR)/$(VENV)" UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(UV) pip compile -q --generate-hashes \
	  --python-version 3.11 --no-emit-package torch --no-emit-find-links --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" install/requirements.in -o install/requirements.lock

clean:  ## remove what the targets made: the environment, caches, the demo's run
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo

# torch is pinned by version, not by hash: its CPU and CUDA wheels differ.
$(VENV)/.done: $(LOCKS) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make setup: no $(PYTHON) on PATH; install Python 3.11 (Debian: apt-get install python3.11-venv python3.11-dev) or say make PYTHON=..." >&2; exit 2; }
	@command -v g++ >/dev/null || { echo "make setup: no g++ on PATH, and fairseq has C++ parts; install it (Debian: apt-get install g++)" >&2; exit 2; }
	test -x $(UV) || { $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q uv==0.13.9; }
	$(INSTALL) torch==2.13.0
	$(INSTALL) --no-deps --require-hashes -r install/requirements.lock
	PYTHONPATH="$(CURDIR)/install/stub" $(INSTALL) --no-deps --no-build-isolation --require-hashes -r install/fairseq.lock
	$(INSTALL) --no-deps --no-build-isolation -e .
	touch $@
