# make demo    the main job on the small checkpoint that ships with the project
# make test    the tests, in at most 8 minutes on 2 cores; make test-slow  the long ones
# make test-oldest, make test-newest
#              the same on the oldest and the newest triton and transformers that are declared, each in an environment of its own
# make test-oldest TESTS="tests/test_drift.py"
#              only these
# make test-next
#              the same on releases beyond what is declared
# make test-others
#              what is tested together with lmms-eval, PEFT, torchao, Hugging Face's kernels and `transformers serve`, beside these
# make test-mixins
#              transformers' own tests of models and processors on ours, plain and patched, from its source distribution
# make test-mixins TRANSFORMERS_SRC=DIR
#              from a checkout of the same version, where those of generation are too
# All set up their environment first. TORCH_ARGS is what pip is given for torch; by default a CPU build where there is no NVIDIA GPU.

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?=
# Processes that the tests are dealt out to.
JOBS ?= 2
# What pip is to take into account besides setup.py.
PINS ?=
# Triton 3.6's interpreter does not work with numpy 2.4.
OLDEST := "triton==3.6.*" "transformers==5.17.*" "numpy<2.4"
NEWEST := --upgrade triton transformers
# lmms-eval asks for hundreds of packages, torchvision among them; these are what it imports for a task of images and text.
OTHERS := peft torchao kernels==0.16.2 datasets decord evaluate jsonlines levenshtein loguru lxml nltk numexpr pytablewriter python-dotenv \
	sacrebleu scikit-learn tenacity openai fastapi uvicorn
OTHERS_ALONE := lmms-eval==0.7.3 latex2sympy2==1.9.1
# What is installed without what it asks for.
ALONE ?=
# Where transformers' own tests are.
TRANSFORMERS_SRC ?=
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

.PHONY: demo test test-slow test-oldest test-newest test-next test-others test-mixins lint clean

demo: $(VENV)/ready
	$(BIN)/llava15-fast demo

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(if $(TESTS),,-m "not slow") $(TESTS)

test-slow: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder -m slow

test-oldest:
	$(MAKE) test VENV=.venv-oldest PINS='$(OLDEST)'

test-newest:
	$(MAKE) test VENV=.venv-newest PINS='$(NEWEST)'

test-next:
	$(MAKE) test VENV=.venv-next ALONE='--upgrade triton transformers'

test-others:
	$(MAKE) test VENV=.venv-others PINS='$(OTHERS)' ALONE='$(OTHERS_ALONE)' \
		TESTS="tests/patching/test_lmms_eval.py tests/patching/test_peft.py tests/patching/test_interference.py tests/tools/test_environment.py \
		tests/tools/test_serve.py tests/test_habits.py"

test-mixins: $(if $(TRANSFORMERS_SRC),$(VENV)/ready,$(VENV)/transformers-src/ready)
	$(BIN)/pip install --quiet parameterized
	TRANSFORMERS_SRC='$(or $(TRANSFORMERS_SRC),$(VENV)/transformers-src)' OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n $(JOBS) tests/mixins

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	$(BIN)/pip install --quiet --editable '.[dev,benchmarks]' $(PINS)
	$(if $(ALONE),$(BIN)/pip install --quiet --no-deps $(ALONE))
	touch $@

$(VENV)/transformers-src/ready: $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/pip download --quiet --no-deps --no-binary transformers --dest $(@D) "$$($(BIN)/pip freeze | grep ^transformers==)"
	tar -xzf $(@D)/transformers-*.tar.gz -C $(@D) --strip-components=1
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-next .venv-others build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
