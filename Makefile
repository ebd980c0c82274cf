VENV ?= .venv
PYTHON ?= python3

RUN := $(VENV)/bin/python
READY := $(VENV)/.qwen3next-installed
# One thread per worker: two torch workers that each use all cores are slower than one.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-oracles test-cpu test-cpus test-slow test-sanitize test-gpu gpu-check gpu-bundle test-kernels test-packages test-saes test-hf test-tools test-server test-titan test-install lint types format wheel bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch is installed first and separately: without the pin, pip may choose a build with gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qwen3next needs Python 3.11 or newer and '$(PYTHON)' is none: name one with 'make PYTHON=/path/to/python3.11 ...'."; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -c constraints.txt torch==2.13.0
	$(RUN) -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY) ## train a tiny model on this machine and inspect it
	$(RUN) -m recipes.demo

test: $(READY) ## the tests that need no GPU, without the slow ones
	$(ONE_THREAD) $(RUN) -m pytest -n 2

# layers/cpp/cpu.py explains the choice of a processor and its limits.
CPU ?= native
PRECISION ?= auto
TESTS ?= tests
FORCED = $(ONE_THREAD) QWEN3NEXT_CPU=$(1) QWEN3NEXT_PRECISION=$(2) $(RUN) -m pytest -n 2 $(TESTS)

test-cpu: $(READY) ## the tests with another CPU's instructions: make test-cpu CPU=avx2 PRECISION=bf16
	$(call FORCED,$(CPU),$(PRECISION))

test-cpus: $(READY) ## the tests with each instruction set that this CPU supports; results in test-cpus.txt
	@: > test-cpus.txt; failed=0; \
	cpus=$$($(RUN) -c "from layers.cpp.cpu import possible; print(*possible())") || exit 1; \
	for choice in $$cpus native/fp32 native/bf16; do \
	  cpu=$${choice%/*}; precision=auto; case $$choice in */*) precision=$${choice#*/};; esac; \
	  $(call FORCED,$$cpu,$$precision) > test-cpus.log 2>&1 || { failed=1; grep -E "^(FAILED|ERROR)" test-cpus.log >> test-cpus.txt; }; \
	  echo "CPU=$$cpu PRECISION=$$precision: $$(tail -n 1 test-cpus.log)" | tee -a test-cpus.txt; \
	done; exit $$failed

test-oracles: $(READY) ## the tests that compare with something independent: transformers, definitions, fp64
	$(ONE_THREAD) $(RUN) -m pytest -n 2 -m "oracle and not slow and not gpu"

test-slow: $(READY) ## the slow tests
	$(ONE_THREAD) $(RUN) -m pytest -n 2 -m "slow and not gpu"

# The sanitizers' libraries must be loaded before Python. CALLS is the number of calls, SEED selects them.
CALLS := 1000000
SEED := 0
SANITIZED = LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 QWEN3NEXT_SANITIZE=1 PYTHONPATH=.
test-sanitize: $(READY) ## wrong arguments to every compiled function, under AddressSanitizer and UBSan
	$(ONE_THREAD) $(SANITIZED) $(RUN) tests/native_fuzz.py $(CALLS) $(SEED)

# Run by $(PYTHON) where it has all that they import, so that a GPU machine without a network needs no environment.
test-gpu: ## the tests that need a CUDA device
	@if $(PYTHON) -c 'import pytest, beartype, recipes.gpu.sections' 2>/dev/null; \
	then $(PYTHON) -m pytest -m gpu tests/gpu; \
	else $(MAKE) --no-print-directory $(READY) && $(RUN) -m pytest -m gpu tests/gpu; fi

gpu-check: ## check parity, speed and memory on an NVIDIA GPU, in ten minutes
	@if $(PYTHON) -c 'import recipes.gpu.sections' 2>/dev/null; \
	then $(PYTHON) -m recipes.gpu_check; \
	else $(MAKE) --no-print-directory $(READY) && $(RUN) -m recipes.gpu_check; fi

gpu-bundle: $(READY) ## what a GPU machine without a network lacks, in gpu-bundle.txz
	$(RUN) -m recipes.gpu_bundle gpu-bundle.txz

# A separate environment: transformers uses FLA's kernels wherever they are installed, with or without a GPU.
KERNELS := .venv-kernels
$(KERNELS)/.installed: pyproject.toml constraints.txt
	test -x $(KERNELS)/bin/python || $(PYTHON) -m venv $(KERNELS)
	$(KERNELS)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(KERNELS)/bin/python -m pip install -c constraints.txt -e . pytest beartype triton==3.7.1
	$(KERNELS)/bin/python -m pip install --no-deps einops fla-core==0.6.0 flash-linear-attention==0.6.0
	@touch $@

test-kernels: $(KERNELS)/.installed ## flash-linear-attention's kernels in Triton's interpreter, without a GPU
	$(ONE_THREAD) TRITON_INTERPRET=1 FLA_FLASH_QLA=0 $(KERNELS)/bin/python -m pytest tests/kernels

# Also a separate environment: these packages, only needed for comparison, have about a hundred dependencies.
PACKAGES := .venv-packages
$(PACKAGES)/.installed: pyproject.toml constraints.txt
	test -x $(PACKAGES)/bin/python || $(PYTHON) -m venv $(PACKAGES)
	$(PACKAGES)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(PACKAGES)/bin/python -m pip install -c constraints.txt -e ".[dev]"
	$(PACKAGES)/bin/python -m pip install transformer-lens==4.3.0 nnsight==0.8.1
	@touch $@

test-packages: $(PACKAGES)/.installed ## compare hooks with TransformerLens and nnsight
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(PACKAGES)/bin/python -m pytest tests/hooks/test_hook_packages.py

# SAELens needs an older TransformerLens than the one above.
SAES := .venv-saes
$(SAES)/.installed: pyproject.toml constraints.txt
	test -x $(SAES)/bin/python || $(PYTHON) -m venv $(SAES)
	$(SAES)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(SAES)/bin/python -m pip install -c constraints.txt -e . transformers==5.23.0 pytest beartype
	$(SAES)/bin/python -m pip install sae-lens==6.54.12
	@touch $@

test-saes: $(SAES)/.installed ## SAELens on our classes
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(SAES)/bin/python -m pytest tests/hooks/test_sae_lens.py

# Packages that people use with transformers; torch first, as above.
TOOLS := .venv-tools
$(TOOLS)/.installed: pyproject.toml constraints.txt
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(TOOLS)/bin/python -m pip install -c constraints.txt -e ".[serve]" transformers==5.23.0 pytest pytest-xdist beartype parameterized
	$(TOOLS)/bin/python -m pip install -c constraints.txt peft==0.21.2 trl==1.16.0 accelerate==1.15.0 lm_eval==0.4.13 torchao==0.18.0
	$(TOOLS)/bin/python -m pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 inspect-ai==0.3.285 openai==3.57.0
	@touch $@

test-tools: $(TOOLS)/.installed ## PEFT, TRL, lm-eval, inspect-ai, accelerate, torchao and ONNX on our classes
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(TOOLS)/bin/python -m pytest tests/tools

# What holds the server to OpenAI's descriptions, and drives a browser. The page's tests need Chromium and chromedriver.
SERVED := .venv-server
LOAD_SECONDS := 60
$(SERVED)/.installed: pyproject.toml constraints.txt
	test -x $(SERVED)/bin/python || $(PYTHON) -m venv $(SERVED)
	$(SERVED)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(SERVED)/bin/python -m pip install -c constraints.txt -e ".[dev]" llm-comply schemathesis selenium
	@touch $@

test-server: $(SERVED)/.installed ## the server: conformance, random requests, hostile load, its page in a browser
	$(ONE_THREAD) QWEN3NEXT_LOAD_SECONDS=$(LOAD_SECONDS) $(SERVED)/bin/python -m pytest -m "not gpu" tests/serving tests/chat

# torchtitan names no torch and pip would take the newest; its other pins contradict constraints.txt.
TITAN := .venv-titan
$(TITAN)/.installed: pyproject.toml constraints.txt
	test -x $(TITAN)/bin/python || $(PYTHON) -m venv $(TITAN)
	$(TITAN)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(TITAN)/bin/python -m pip install -c constraints.txt -e . pytest beartype
	$(TITAN)/bin/python -m pip install torch==2.13.0 -e ".[titan]"
	@touch $@

test-titan: $(TITAN)/.installed ## training on 2 and 4 processes under torchtitan, on the CPU
	$(ONE_THREAD) $(TITAN)/bin/python -m pytest tests/titan

test-hf: $(TOOLS)/.installed ## transformers' own model tests, on its class and on ours
	$(ONE_THREAD) $(TOOLS)/bin/python tests/hf/suite.py

# ALSO names more interpreters and versions of torch: make test-install ALSO='--also python3.13 torch==2.15.0'
ALSO ?=
test-install: $(READY) ## the wheel by pip, uv and pipx in new environments; without a compiler; with triton
	$(RUN) tests/install/matrix.py $(ALSO)

lint: $(READY) types ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m mypy layers qwen3next recipes

format: $(READY) ## format all files
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

wheel: $(READY) ## build dist/*.whl
	$(RUN) -m build --wheel

bench: $(READY) ## run the benchmark on this machine
	$(RUN) -m recipes.benchmark

# Not part of `dev`: the tests check links and anchors without these packages.
DOCS := $(VENV)/.qwen3next-docs-installed
$(DOCS): $(READY)
	$(RUN) -m pip install -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(DOCS) ## build the pages and the API reference into site/; fails on a warning
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "Open site/index.html."

clean: ## remove files of builds and tests; keeps the environment
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f test-install.json test-cpus.txt test-cpus.log gpu-bundle.txz
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
