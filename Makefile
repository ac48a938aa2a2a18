# `make help` lists what there is to make. Every target sets up what it needs first.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

export PYTHONDONTWRITEBYTECODE := 1
# Compiled programs are kept from one run to the next. `bench` does without: it times the compilation too.
train test test-slow chaos smoke: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# The tests start a hundred processes: small programs are kept too, and the package's byte code.
test test-slow chaos: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test test-slow chaos: export PYTHONDONTWRITEBYTECODE :=

# What the environment is made from; its stamp is the checksum, so it is made again when one of these changes.
MADE_FROM = $(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)' && \
	echo '$(CURDIR)' && cat pyproject.toml constraints.txt
STAMP := $(VENV)/made-from

.PHONY: help setup compilers train test test-slow mutants chaos smoke lint bench bench-data bench-plan bench-compiled peers onnx visit-kit gpu-visit visit-proof

help:
	@echo 'make setup      the virtual environment $(VENV), of exact versions (PYTHON=python3.12 chooses the interpreter)'
	@echo 'make compilers  those of TPUs and GPUs into .cache/compilers, for the PYTHONPATH of vit-dist plan'
	@echo 'make train      trains the default recipe, configs/digits.py, into runs/digits'
	@echo 'make test       the test suite'
	@echo 'make test-slow  the tests that need many processes, kills or minutes'
	@echo 'make mutants    small wrong edits of the source, each of which a test must notice (WORDS=... chooses some)'
	@echo 'make chaos      kills and other faults from outside, as a table; CHAOS_ROUNDS=10: ten times as many'
	@echo 'make smoke      builds the wheel, installs it into $(SMOKE) and runs every verb in an empty folder'
	@echo 'make lint       ruff and mypy'
	@echo 'make bench      the time of a step beside a plain Flax Linen trainer; benchmarks/step.py --help: beside others'
	@echo 'make bench-plan how long the deployed configs take to plan, and what the plans say'
	@echo 'make bench-compiled memory, traffic, kernels, collectives of compiled steps beside the committed figures; no hardware'
	@echo 'make bench-data the loader beside Pillow, on ../shared/data/photos'
	@echo 'make peers      the architectures, files and outputs of timm, transformers and OpenCLIP, which the tests read; ours beside them'
	@echo 'make onnx       models of ours exported to ONNX, run by onnxruntime and compared with jax'
	@echo 'make visit-kit  what a visit to a GPU takes along, .visit; see benchmarks/README.md'
	@echo 'make gpu-visit  the visit itself; ARGS=--dry-run: in miniature, on the CPU'
	@echo 'make visit-proof the dry run as on the GPU machine: its jax, the kit'"'"'s wheels (MACHINE_PYTHON=python3.12)'

# An empty virtual environment $(1), in one shell command; Debian's python3 comes without ensurepip.
define new_venv
if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	  $(PYTHON) -m venv --clear $(1) >&2; \
	elif $(PYTHON) -c 'import pip, venv' 2>/dev/null; then \
	  $(PYTHON) -m venv --clear --without-pip $(1) >&2; \
	  $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip >&2; \
	else \
	  echo "error: $(PYTHON) has neither ensurepip nor pip; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 2; \
	fi
endef

# It speaks on stderr alone, so that stdout is the job's: `make train` ends with the line of its summary.
setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON) is not a Python 3.11 or newer that runs; name one: make PYTHON=python3.12 ..." >&2; \
	  exit 2; }
	@made_from=$$({ $(MADE_FROM); } | cksum); \
	if [ "$$made_from" != "$$(cat $(STAMP) 2>/dev/null)" ] || ! $(RUN)/python -c '' 2>/dev/null; then \
	  set -e; \
	  echo "Installing into $(VENV): a minute or two, once ..." >&2; \
	  $(call new_venv,$(VENV)); \
	  $(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' >&2; \
	  echo "$$made_from" > $(STAMP); \
	fi

train: setup
	@$(RUN)/vit-dist train --config=configs/digits.py --workdir=runs/digits

test: setup
	@$(RUN)/pytest -n 2 --dist loadfile --durations=40

# The compilers for TPUs and GPUs, which need neither. In a folder of their own, for the `PYTHONPATH` of `vit-dist plan`
# alone: whatever else imports jax beside them would look for the hardware. (nvimgcodec is no part of jax's.)
COMPILERS := $(CURDIR)/.cache/compilers
PACKAGES = sed -n -E '/nvimgcodec/d; s/^(libtpu|jax-cuda13-[a-z]+|nvidia-[a-z0-9-]+)==.*/\1/p' constraints.txt | sort -u

compilers: setup
	@made_from=$$({ $(RUN)/python -V && cat constraints.txt; } | cksum); \
	if [ "$$made_from" != "$$(cat $(COMPILERS)/made-from 2>/dev/null)" ]; then \
	  set -e; \
	  echo "Installing the compilers for TPUs and GPUs into $(COMPILERS): 5 GB, a minute or more, once ..." >&2; \
	  rm -rf $(COMPILERS); \
	  $(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
	    --target $(COMPILERS) $$($(PACKAGES)) >&2; \
	  echo "$$made_from" > $(COMPILERS)/made-from; \
	fi

test-slow: setup
	@$(MAKE) --no-print-directory compilers || \
	  echo 'WARNING: the compilers could not be installed: the tests that need them will NOT run' >&2
	@COMPILERS=$(COMPILERS) $(RUN)/pytest -n 2 --dist loadfile -m slow

mutants: setup
	@$(RUN)/python tests/mutants.py $(WORDS)

chaos: setup
	@$(RUN)/pytest -n 2 --dist loadfile -m chaos

# The wheel, in an environment that holds nothing else, as a user has it.
SMOKE ?= .cache/smoke
WHEEL_OF := vit_dist configs setup.py pyproject.toml README.md LICENSE

smoke:
	@set -e; \
	made_from=$$({ $(MADE_FROM); } | cksum); \
	if [ "$$made_from" != "$$(cat $(SMOKE)/made-from 2>/dev/null)" ]; then $(call new_venv,$(SMOKE)); fi; \
	rm -rf $(SMOKE)/source $(SMOKE)/wheel; mkdir $(SMOKE)/source; cp -R $(WHEEL_OF) $(SMOKE)/source; \
	pip="$(SMOKE)/bin/python -m pip --quiet --disable-pip-version-check"; \
	$$pip wheel --no-deps --wheel-dir $(SMOKE)/wheel $(SMOKE)/source; \
	$$pip install -c constraints.txt $(SMOKE)/wheel/*.whl; \
	$$pip install --no-deps --force-reinstall $(SMOKE)/wheel/*.whl; \
	echo "$$made_from" > $(SMOKE)/made-from; \
	tests/smoke.sh $(SMOKE)/bin/vit-dist

lint: setup
	@$(RUN)/ruff check .
	@$(RUN)/ruff format --check .
	@$(RUN)/mypy

bench: setup
	@$(RUN)/python benchmarks/step.py

bench-data: setup
	@$(RUN)/python benchmarks/data.py

bench-plan: compilers
	@PYTHONPATH=$(COMPILERS) $(RUN)/python benchmarks/plan.py

bench-compiled: compilers
	@PYTHONPATH=$(COMPILERS) $(RUN)/python benchmarks/compiled.py $(ARGS)

visit-kit: compilers
	@$(RUN)/python benchmarks/visit_kit.py

# What other libraries' weights mean, by those libraries, in an environment of their own; see benchmarks/peers. Nothing
# is downloaded but the libraries.
PEERS := .cache/peers
PEER = PYTHONPATH=benchmarks HF_HUB_OFFLINE=1 $(PEERS)/bin/python -m

peers: setup
	@made_from=$$({ $(PYTHON) -VV && echo '$(CURDIR)' && cat benchmarks/peers/requirements.txt; } | cksum); \
	if [ "$$made_from" != "$$(cat $(PEERS)/made-from 2>/dev/null)" ]; then \
	  set -e; \
	  echo "Installing PyTorch, timm, transformers and OpenCLIP into $(PEERS): 6 GB, some minutes, once ..." >&2; \
	  $(call new_venv,$(PEERS)); \
	  $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers/requirements.txt >&2; \
	  echo "$$made_from" > $(PEERS)/made-from; \
	fi
	@$(PEER) peers.architectures
	@$(PEER) peers.defaults
	@$(PEER) peers.golden --all --out=$(PEERS)/files
	@$(PEER) peers.adapted_fixtures tests/weights/adapted.json
	@$(PEER) peers.fitting_fixtures tests/weights/fitting.json
	@$(PEER) peers.preprocessing_fixtures fixtures tests/weights/preprocessing.json
	@results=benchmarks/results/$$(date +%F)-peers-cpu.md; \
	$(RUN)/python benchmarks/peers/compare.py $(PEERS)/files > $$results && echo "$$results"
	@PYTHONPATH=benchmarks $(RUN)/python -m peers.write_back $(PEERS)/files
	@results=benchmarks/results/$$(date +%F)-written-cpu.md; \
	$(PEER) peers.read_back $(PEERS)/files > $$results && echo "$$results"

# ONNX, by a converter that needs other libraries than ours, in an environment of its own.
ONNX := .cache/onnx

onnx: setup
	@made_from=$$({ $(PYTHON) -VV && echo '$(CURDIR)' && cat benchmarks/onnx/requirements.txt; } | cksum); \
	if [ "$$made_from" != "$$(cat $(ONNX)/made-from 2>/dev/null)" ]; then \
	  set -e; \
	  $(call new_venv,$(ONNX)); \
	  $(ONNX)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/onnx/requirements.txt >&2; \
	  echo "$$made_from" > $(ONNX)/made-from; \
	fi
	@results=benchmarks/results/$$(date +%F)-onnx-cpu.md; \
	$(RUN)/python benchmarks/onnx/compare.py $(ONNX)/bin/python > $$results && echo "$$results"

# A kit for this machine: without wheels, and with plans for the CPU of a dry run.
KIT := .cache/visit-kit
MAKE_KIT = $(RUN)/python benchmarks/visit_kit.py --out=$(KIT) --targets=cpu:1 --only

$(KIT)/kit.json: $(shell find vit_dist benchmarks -name '*.py') | setup
	@$(MAKE_KIT) golden plans photos

gpu-visit: $(KIT)/kit.json
	@$(RUN)/python benchmarks/gpu_visit.py --kit=$(KIT) --out=runs/gpu-visit $(ARGS)

# What the GPU machine has of its own; all else travels, and is put in place as benchmarks/README.md says.
MACHINE_HAS := jax==0.11.2 jaxlib==0.11.2 numpy==2.5.2 matplotlib pillow
MACHINE_PYTHON ?= python3.12
MACHINE := .cache/visit-machine

visit-proof: $(KIT)/kit.json
	@made_from=$$({ $(MACHINE_PYTHON) -VV && echo '$(MACHINE_HAS)' && cat constraints.txt benchmarks/visit_kit.py; } | cksum); \
	if [ "$$made_from" != "$$(cat $(MACHINE)/made-from 2>/dev/null)" ]; then \
	  set -e; \
	  $(MAKE_KIT) wheels; \
	  $(MACHINE_PYTHON) -m venv --clear $(MACHINE); \
	  $(MACHINE)/bin/python -m pip install -q --disable-pip-version-check $(MACHINE_HAS); \
	  $(MACHINE)/bin/python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
	    --target $(MACHINE)/site $(KIT)/wheels/*.whl; \
	  echo "$$made_from" > $(MACHINE)/made-from; \
	fi
	@PYTHONPATH=$(MACHINE)/site:. $(MACHINE)/bin/python benchmarks/gpu_visit.py --dry-run --kit=$(KIT) \
	  --out=runs/visit-proof
