# make demo    the main job on the small checkpoint that ships with the project
# make test    the tests
# Both set up .venv first. TORCH_ARGS is what pip is given for torch; by default a CPU build where there is no NVIDIA GPU.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
BIN := .venv/bin
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

ifdef TORCH_ARGS
INSTALL_TORCH = $(BIN)/pip install --quiet $(TORCH_ARGS)
else ifeq ($(HAS_GPU),yes)
INSTALL_TORCH = $(BIN)/pip install --quiet torch==$(TORCH_VERSION)
else
# "+cpu" matches CPU builds only, so that no CUDA packages are ever fetched; where pip knows none, PyTorch's own index does.
INSTALL_TORCH = $(BIN)/pip install --quiet torch==$(TORCH_VERSION)+cpu || \
	$(BIN)/pip install --quiet torch==$(TORCH_VERSION)+cpu --index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/llava15-fast demo

test: .venv/ready lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .

.venv/ready: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(INSTALL_TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
