# Everything starts from a fresh clone; nothing has to be installed by hand but a C++ compiler and
# Python. A step that is done leaves a stamp in .venv and is not repeated.
#
#   make demo       a small trained model generates from quantised caches
#   make test       all tests, as CI runs them (make test-all: the heavy sweeps too)
#   make lint       ruff, clang-format, mypy
#
# Variables: PYTHON (3.10 or newer), TORCH (what pip installs), WORKERS (of pytest),
# ARGS (of the demo), TESTS and MPS_TESTS (files), PYTEST_ARGS.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
TESTS ?= tests
# What runs on MPS: the ops, the cache and transformers once more, and the software device's own.
MPS_TESTS ?= tests/softmetal $(filter-out %/test_packaging.py %/test_cli.py %/test_docs.py %/test_memory.py,$(wildcard tests/test_*.py))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What the library is built from.
SOURCES := $(shell find csrc metal -type f 2>/dev/null) setup.py pyproject.toml
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.mm' 'metal/*.h' 'metal/*.metal')

# tests/metal and tests/softmetal are built with these.
APT_PACKAGES := clang-19 libobjc-12-dev libblocksruntime-dev libclang-rt-19-dev python3-clang-19

.PHONY: demo test test-all lint build clean
.DELETE_ON_ERROR:

demo: .venv/stamp-built .venv/stamp-hf
	@$(BIN)/python -m torch_kvq demo $(ARGS)

# Two workers share the cores, so each computes on one thread. The second run repeats the tests of
# the ops, the cache and transformers on MPS: a Mac's, or on Linux the software device.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)
HAS_MPS = [ "$$(uname -s)" = Darwin ] || command -v clang++-19 >/dev/null

test: .venv/stamp-built .venv/stamp-test .venv/stamp-apt
	$(PYTEST) $(TESTS)
	@if [ -z "$(MPS_TESTS)" ]; then :; \
	elif $(HAS_MPS) || [ -n "$(KVQ_REQUIRE_ALL)" ]; then set -x; $(PYTEST) --device mps $(MPS_TESTS); \
	else echo "make: no clang-19: the tests on the software mps device are skipped"; fi

test-all: PYTEST_ARGS += --slow
test-all: test

lint: .venv/stamp-built .venv/stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

build: .venv/stamp-built

clean:
	rm -rf .venv build *.egg-info torch_kvq/_C*.so

.venv/stamp-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) must be Python 3.10 or newer; name another with PYTHON=..." >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
	  { echo "make: no C++ compiler $${CXX:-c++}: install g++ (apt install g++), or on macOS the" \
	    "command line tools (xcode-select --install)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "make: $(PYTHON) cannot make virtual environments: apt install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet '$(TORCH)' numpy ninja wheel 'setuptools>=77'
	@touch $@

# pip makes the editable installation once; after that only what changed is compiled.
.venv/stamp-built: .venv/stamp-torch $(SOURCES)
	@if [ -e .venv/stamp-editable ] && [ .venv/stamp-editable -nt pyproject.toml ] \
	    && [ .venv/stamp-editable -nt .venv/stamp-torch ]; then \
	  echo "building torch_kvq/_C"; \
	  $(BIN)/python setup.py --quiet build_ext --inplace >.venv/build.log 2>&1 || \
	    { cat .venv/build.log >&2; exit 1; }; \
	else \
	  echo "building and installing torch_kvq (a minute or two)"; \
	  $(PIP) install --quiet --no-build-isolation -e . && touch .venv/stamp-editable; \
	fi
	@touch $@

# torch_kvq is installed already: this adds what its extras name.
.venv/stamp-hf: pyproject.toml | .venv/stamp-built
	$(PIP) install --quiet 'torch_kvq[hf]'
	@touch $@

# MLX is an oracle of the tests where it can be had.
.venv/stamp-test: pyproject.toml | .venv/stamp-built
	$(PIP) install --quiet 'torch_kvq[test]'
	@$(PIP) install --quiet 'torch_kvq[mlx]' 2>/dev/null || echo "make: no MLX here: its comparisons are skipped"
	@touch $@

# On Linux as root, the compiler that the Metal tests need; elsewhere say what is skipped.
.venv/stamp-apt: Makefile | .venv/stamp-built
	@if [ "$$(uname -s)" != Linux ] || dpkg -s $(APT_PACKAGES) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing $(APT_PACKAGES)"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends $(APT_PACKAGES) >/dev/null; } || \
	  echo "make: apt-get failed: tests/metal and tests/softmetal are skipped" >&2; \
	else \
	  echo "make: not root, or no apt-get: without $(APT_PACKAGES)" \
	    "tests/metal and tests/softmetal are skipped" >&2; \
	fi
	@touch $@
