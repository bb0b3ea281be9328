# make train   environment, text, training          make test    environment, real weights, the tests a person waits for
# make slow    the other claims, which .ci/run checks too       make overnight   every test that takes many minutes
# make parity  the whole parity ladder, all mutants, and the report
# make gpu-program   what XLA makes of a training step for an H100, and tests of it; no GPU, 4.6 GB of packages
# make gpu-wheels    packages for scripts/gpu_first.sh on a rented machine      make driver  which JAX fits the GPU's driver
# make docs    the pages under docs/ as a site in build/docs; a broken link is an error
# make soak    200 kills, 200 signals, 500 random lives of a checkpoint folder; thousands of examples of each property;
#              10,000 requests and 1,000 schemas to the server; llama.cpp, built here; fuzzing of every reader, 10 minutes
#              each: over three hours
# make mutants   bugs planted in the code, each of which a test must notice: a list of ours, and mutmut's; hours
# The first two are idempotent. Needs Python >= 3.11, make and a package index; a CUDA GPU is used when nvidia-smi is there.
#
# PYTHON=python3.12 on the command line: another interpreter, in an environment of its own, and so a newer JAX.
# TORCH=0: without PyTorch, the largest download, and the tests that need it.
# BROWSER=no: without the tests of the page that need Chromium, which make test installs otherwise where it can.
# ARGS="..." goes to train_jax.py.

PYTHON ?= python3
NAMED := $(filter command line,$(origin PYTHON))
TORCH ?= 1
BROWSER ?= yes
VENV ?= $(if $(NAMED),.venv-$(notdir $(PYTHON)),.venv)
BIN := $(VENV)/bin

# The CUDA major version that the driver supports decides which of jax's builds fits, which `make driver` says; "CUDA UMD
# Version" since driver 610. CUDA 13 runs on no GPU older than Turing. JAX= on the command line: JAX for a CPU.
NVIDIA := $(shell command -v nvidia-smi)
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA [A-Z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -1)
OLD := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | awk '/^[0-9]/ && $$1 < 7.5')
JAX := $(if $(CUDA),$(if $(OLD)$(filter 12,$(CUDA)),cuda12,cuda13),)
comma := ,
TRAIN_EXTRAS := gguf,plot$(if $(JAX),$(comma)$(JAX))
TESTED = SMOLLM_WITHOUT_TORCH=$(if $(filter 1,$(TORCH)),,1) SMOLLM_WITHOUT_BROWSER=$(if $(filter no,$(BROWSER)),1) $(BIN)/python -m pytest $(if $(filter 1,$(TORCH)),,tests)
READY := $(VENV)/.test$(if $(filter 1,$(TORCH)),,-without-torch)
TEST_EXTRAS := dev$(if $(JAX),$(comma)$(JAX))$(if $(filter 1,$(TORCH)),$(comma)torch$(comma)hf$(comma)eval$(comma)finetune-tests)

# Two at a time, file by file, in the order of tests/reporting.py. A worker that dies or hangs ends the run and is named;
# xdist's second try can wait for ever.
TWO := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

# Whole checkpoints only: a save that was killed leaves a folder with another name.
RESUME = $(shell ls runs/make-train/checkpoints 2>/dev/null | grep -qx '[0-9][0-9]*' && echo --resume)

.PHONY: train test parity docs slow overnight soak mutants gpu-program gpu-wheels driver browser lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.train
	$(BIN)/python scripts/fetch_assets.py
	$(BIN)/python scripts/train_jax.py --out runs/make-train $(RESUME) $(ARGS)

test: $(READY) browser
	$(BIN)/python scripts/fetch_assets.py
	$(TESTED) -m "not slow and not overnight" $(TWO) $(PYTEST)

slow: $(READY) browser
	$(BIN)/python scripts/fetch_assets.py
	$(TESTED) -m slow $(TWO) $(PYTEST)

overnight: $(READY)
	$(BIN)/python scripts/fetch_assets.py
	$(TESTED) -m overnight -s $(PYTEST)

parity: $(READY)
	$(BIN)/python scripts/fetch_assets.py
	$(BIN)/python -m pytest parity_tests $(TWO) -rP $(PYTEST)
	$(BIN)/python scripts/parity_report.py --weights assets/SmolLM2-135M-Instruct --out report --readme docs/parity.md

soak: $(READY)
	$(BIN)/python scripts/fetch_assets.py
	CMAKE_ARGS=-DGGML_NATIVE=ON $(BIN)/python -m pip install --quiet --no-binary llama-cpp-python "llama-cpp-python[server]<0.4"
	SMOLLM_SOAK=1 $(BIN)/python -m pytest tests/training/test_survival.py tests/runs/test_store.py parity_tests/test_llamacpp.py \
	  tests/data/test_batches.py tests/tokenizer/test_chat_protection.py tests/web/test_middleware.py \
	  tests/serve/test_crowd.py tests/serve/test_schemas.py tests/serve/test_published.py -rP $(PYTEST)
	$(BIN)/python -m pip install --quiet "atheris>=3,<4"
	$(BIN)/python -m tests.fuzzing all 600

# ARGS="order web": only these packages of smollm_parity/tool_mutants.py.
mutants: $(READY)
	$(BIN)/python scripts/fetch_assets.py
	$(BIN)/python -m pip install --quiet "mutmut>=3.8,<4"
	$(BIN)/python -m smollm_parity.mutants; listed=$$?; $(BIN)/python -m smollm_parity.tool_mutants $(ARGS) && exit $$listed

docs: .venv-docs/.docs
	.venv-docs/bin/mkdocs build

.venv-docs/.docs: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet "mkdocs-material>=9.6,<10" "mkdocs-jupyter>=0.26.3,<0.28"
	@touch $@

gpu-program: .venv-cuda/.test
	.venv-cuda/bin/python scripts/compile_for_gpu.py $(ARGS)
	SMOLLM_CUDA=1 SMOLLM_WITHOUT_TORCH=1 .venv-cuda/bin/python -m pytest tests/benchmarks/test_compiled_for_gpu.py -rP $(PYTEST)

.venv-cuda/.test: pyproject.toml
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install --quiet --editable ".[dev,cuda13]"
	@touch $@

# What scripts/gpu_first.sh needs of packages on a rented GPU machine without a network, beside JAX and PyTorch.
gpu-wheels: $(VENV)/.train
	rm -rf .whl
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest .whl \
	  tyro docstring-parser typeguard gguf
	@ls .whl

driver:
	@if [ -z "$(NVIDIA)" ] || [ "$(origin JAX)" = "command line" ]; then exit 0; fi; \
	instead="or leave the GPU alone: make JAX= train"; \
	if [ -z "$(CUDA)" ]; then said=$$(nvidia-smi 2>&1); \
	  said=$$(echo "$$said" | grep -m 1 "Version:" || echo "$$said" | head -n 1); \
	  echo "error: nvidia-smi names no CUDA version, it says: $${said:-nothing}; mend the driver, $$instead" >&2; exit 2; fi; \
	if [ "$(CUDA)" -lt 12 ]; then echo "error: the NVIDIA driver here supports CUDA $(CUDA), JAX needs 12 or newer:" \
	  "install driver 525 or newer, $$instead" >&2; exit 2; fi; \
	echo "CUDA $(CUDA): jax[$(JAX)]"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/bin/python: | driver
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | driver $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$(TRAIN_EXTRAS)]"
	@touch $@

$(READY): pyproject.toml | driver $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$(TEST_EXTRAS)]"$(if $(filter 1,$(TORCH)), || { \
	  echo "error: is there no PyTorch for this interpreter? make TORCH=0 runs the tests that need none" >&2; exit 1; })
	@touch $@ $(VENV)/.train

# The page is tested in the Chromium or Chrome that is installed, otherwise in one of the system's packages.
browser:
	@if [ "$(BROWSER)" = no ] || command -v chromium || command -v chromium-browser || command -v google-chrome; \
	  then exit 0; fi >/dev/null; \
	if ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ]; then \
	  echo "no Chromium: the page is not tested in a browser; install chromium by the system's package manager"; exit 0; fi; \
	echo "installing Chromium by apt-get to test the page in it; make BROWSER=no leaves it out"; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium || \
	  echo "apt-get cannot install Chromium: the page is not tested in a browser"

clean:
	rm -rf .venv .venv-* build *.egg-info
