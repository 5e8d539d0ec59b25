# make demo | test | bench | lint | wheel | clean: each sets up what it needs in .venv.
#
#   TORCH=torch==2.13.0 make test    which torch to install (default: the newest)
#   QUEST_CUDA=OFF make test         leave the CUDA backend out (default: built where nvcc is found)
PYTHON ?= python3
TORCH ?= torch
QUEST_CUDA ?= AUTO
JOBS ?= $(shell nproc)

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/dev
CXX_FILES := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.DEFAULT_GOAL := demo
.PHONY: demo test test-cpp test-python bench lint wheel clean

# torch comes first and the build runs without isolation, so that it is fetched once.
$(BIN)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.26" "ninja>=1.11"
	touch $@

# One build serves the package, the googletests and the C++ benchmarks. Rebuilt when anything compiled has changed; Python sources are live.
$(BIN)/quest.stamp: $(BIN)/torch.stamp pyproject.toml CMakeLists.txt $(shell find cpp cuda bindings tests/cpp tests/cuda tests/emulated -type f) $(wildcard bench/*.cu bench/*.h)
	@test -e /usr/include/gtest/gtest.h || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] \
		|| { apt-get update -qq && apt-get install -y -qq libgtest-dev >/dev/null; }  # else CMake fetches it
	PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip install --quiet --no-build-isolation -C build-dir=$(BUILD) \
		-C cmake.define.QUEST_CUDA=$(QUEST_CUDA) -C cmake.define.QUEST_BUILD_TESTS=ON -C cmake.define.QUEST_BUILD_BENCH=ON -C cmake.define.QUEST_WERROR=ON -e ".[test]"
	touch $@

$(BIN)/lint.stamp: $(BIN)/torch.stamp
	$(BIN)/pip install --quiet "ruff>=0.9" "mypy>=1.14" "clang-format==19.1.7"
	touch $@

demo: $(BIN)/quest.stamp
	$(BIN)/python -m quest.demo

test: test-cpp test-python

test-cpp: $(BIN)/quest.stamp
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

test-python: $(BIN)/quest.stamp
	$(BIN)/python -m pytest

# run.py measures on the GPU, or on the CPU where torch sees none.
bench: $(BIN)/quest.stamp
	$(BIN)/python bench/run.py
	$(BIN)/python bench/plots.py bench/results/*/

lint: $(BIN)/lint.stamp $(BIN)/quest.stamp
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(BIN)/torch.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip wheel --no-build-isolation --no-deps -C cmake.define.QUEST_CUDA=$(QUEST_CUDA) -w dist .

clean:
	rm -rf build dist $(VENV)
