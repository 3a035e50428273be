# Every target but gpu-report works in a virtual environment of its own and installs the tested set of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
STAGE ?=
# Processes that run the tests, one thread each.
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadscope
REGRESSION := --benchmark-autosave --benchmark-compare --benchmark-columns=median,iqr,rounds --benchmark-max-time=0.5 --benchmark-warmup=on
CPP_SOURCES = $(shell find csrc tests/native tests/software_gpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo bits test test-all sanitize lint format docs bench bench-regression gpu-report gpu-rehearsal clean

help:
	@echo "make demo        install and train on the shipped digits"
	@echo "make bits        install, train on dequantised digits and print their bits per dimension"
	@echo "make test        install and run the fast tests against the installed package"
	@echo "make test-all    the same with the slow tests (packaging matrix, long training)"
	@echo "make sanitize    the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make lint        ruff, pyright, clang-format"
	@echo "make format      rewrite the sources with ruff and clang-format"
	@echo "make docs        this documentation as a site, into build/site"
	@echo "make bench       every CPU benchmark of the README and its figures"
	@echo "make bench-regression  every op beside its reference, compared with the run before"
	@echo "make gpu-report  build, tests and benchmarks on a CUDA machine (STAGE=build|test|sanitize|bench for one of them, OUT=folder)"
	@echo "make gpu-rehearsal  the tests of a GPU on one made of software, with torch's CUDA build (6 GB) in an environment of its own"
	@echo "make clean       remove the environment and everything that was built"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

demo: $(BIN)/python
	$(INSTALL) ".[train]"
	$(BIN)/fm-fast train digits --overwrite

bits: $(BIN)/python
	$(INSTALL) ".[train]"
	$(BIN)/fm-fast train digits --dequantise --out out/digits-dequantised --overwrite
	$(BIN)/fm-fast likelihood out/digits-dequantised

test: $(BIN)/python
	$(INSTALL) ".[test,train,plot]"
	$(PYTEST) -m "not slow and not gpu" tests

test-all: $(BIN)/python
	$(INSTALL) ".[test,train,plot,dev,docs]"
	$(PYTEST) -m "not gpu" tests

sanitize: $(BIN)/python
	$(INSTALL) ".[test]"
	$(BIN)/pytest tests/native

lint: $(BIN)/python
	$(INSTALL) ".[test,train,dev]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(BIN)/python
	$(INSTALL) ruff clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# Without fm_fast: the reference is read from the sources.
docs: $(BIN)/python
	$(INSTALL) latex2mathml mkdocs-material "mkdocstrings[python]" ruff
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every CPU benchmark of the README, and its figures. torchcfm asks for packages that nothing here needs, and comes without them.
bench: $(BIN)/python
	$(INSTALL) ".[test,train,plot,bench]"
	$(INSTALL) --no-deps torchcfm
	$(BIN)/python -c "from benchmarks import peers; assert not peers.remarks(list(peers.PINNED)), peers.remarks(list(peers.PINNED))"
	$(BIN)/python -m benchmarks.run --op all
	$(BIN)/python -m benchmarks.plot

# Runs are kept in .benchmarks/. The first has nothing to be compared with, and says so.
bench-regression: $(BIN)/python
	$(INSTALL) ".[test,train]"
	$(BIN)/pytest $(REGRESSION) benchmarks/test_regression.py

# In the Python that is there, whose torch knows the GPU; its first stage installs this checkout, without a network.
gpu-report:
	KINETO_LOG_LEVEL=99 $(PYTHON) -m benchmarks.gpu_report $(STAGE) $(if $(OUT),--out $(OUT))

# Two orders of work that CUDA allows: see docs/contributing.md. Triton's kernels, interpreted, take most of the time:
# REHEARSED='-k "not triton and not replayed"' leaves out the tests that are mostly theirs.
REHEARSED ?=
GPU_TORCH := torch==2.14.1
GPU_TESTS := tests/test_software_gpu.py tests/test_gpu_calls.py tests/test_gpu.py tests/test_trainer_parity.py
REHEARSE := .venv-gpu/bin/python tests/software_gpu/rehearse.py pytest --numprocesses $(WORKERS) -m gpu $(GPU_TESTS)

gpu-rehearsal:
	$(PYTHON) -m venv .venv-gpu
	mkdir -p build && grep -v "^torch==\|^triton==" constraints.txt > build/constraints-gpu.txt
	FM_FAST_BUILD=cpu .venv-gpu/bin/python -m pip install --quiet --constraint build/constraints-gpu.txt $(GPU_TORCH) ".[test,train]"
	$(REHEARSE) $(REHEARSED)
	SOFTWARE_GPU_ORDER=others-first $(REHEARSE) $(REHEARSED)

clean:
	rm -rf $(VENV) .venv-gpu build dist fm_fast/_native *.egg-info .pytest_cache .ruff_cache
