# make quickstart   set up, train, resume and write an illustrated page on this machine
# make test         set up and run the tests
# make soak         set up and run what is long or needs servers on this machine, with a dated log
# make gpu          build the kernels with nvcc, test and measure them on this machine's GPU; installs nothing:
#                   PYTHON has torch with CUDA, and what is missing besides is named
# make check        formatting, lint and types
# make clean        remove the environment and everything built
#
# PYTHON=...        the Python to use, 3.11 or 3.12 (default: the first that is found)
# TORCH_INDEX=...   a package index to take torch from
# JOBS=...          tests that run at once (default: the cores, at most 4)

FITS = import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
BIN = .venv/bin
export TORCH_INDEX

.PHONY: quickstart test soak gpu check clean setup setup-dev setup-soak kernels python

# It runs here: where there is no GPU it does not wait for nvcc to compile the CUDA kernels.
quickstart: export FORCE_CUDA := $(or $(FORCE_CUDA),$(shell command -v nvidia-smi >/dev/null || echo 0))
quickstart: setup kernels
	$(BIN)/mmi quickstart

test: setup-dev kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not soak and not gpu"

# The log says what ran, when, at which commit and how long it took.
soak: SHELL = /bin/bash -o pipefail
soak: setup-soak kernels
	@mkdir -p runs/soak
	log=runs/soak/$$(date -u +%Y-%m-%dT%H%M%SZ).log; git log -1 --format='commit %h' | tee $$log; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -v $(SOAK) 2>&1 | tee -a $$log

# A library built before serves where there is no nvcc. The sanitizer looks at a part of the tests, both
# tiers: it makes them some fifty times slower. Torch must not keep freed memory then, or what is read
# beyond a tensor's end belongs to another and is no fault.
GPU_TESTS = tests/test_kernels_cuda.py tests/gpu
SANITIZED = test_channels or test_images or test_maps or test_more_queries
SANITIZED += or test_matrices or test_windows or test_second_tier
gpu: export PYTHONPATH := .:kernels
gpu: python
	@$(PYTHON) tests/gpu/ready.py
	$(PYTHON) -m mmi_kernels.build
	$(PYTHON) -m pytest -m gpu $(GPU_TESTS)
	@if command -v compute-sanitizer >/dev/null; then for tool in memcheck racecheck synccheck; do \
		echo "compute-sanitizer --tool $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --report-api-errors no \
			--error-exitcode 1 $(PYTHON) -m pytest -m gpu \
			-k "$(SANITIZED)" tests/test_kernels_cuda.py || exit 1; \
	done; fi
	$(PYTHON) -m benchmarks.kernels

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: python
	@$(PYTHON) bootstrap.py

setup-dev: python
	@$(PYTHON) bootstrap.py dev

setup-soak: python
	@$(PYTHON) bootstrap.py soak

kernels:
	@$(BIN)/python -m mmi_kernels.build >/dev/null || \
		echo "The compiled kernels could not be built; the slower reference is used (mmi doctor says why)."

python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and neither is on the PATH: make PYTHON=/path/to/python3.11"; exit 1; }

clean:
	rm -rf .venv build dist *.egg-info data_pipeline/_jpeg.* .pytest_cache .ruff_cache .mypy_cache .hypothesis kernels/mmi_kernels/_lib
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
