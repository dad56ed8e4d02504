# ofakern: `make help` lists the targets. Everything happens in .venv inside this clone.

PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
BUILD := build/editable
EXTRAS := dev,bench,train
TRITON_TESTS := tests/ops/test_attention_triton.py tests/ops/test_triton_ops.py \
	tests/build/test_triton_compile.py tests/build/test_triton_ops_compile.py

TOOLS_STAMP := .venv/.ofakern-tools
INSTALL_STAMP := .venv/.ofakern-installed

# cmake and ninja come as wheels: the build finds them through PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup build test triton-newest test-triton-newest demo bench lint format sanitize arm clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALL_STAMP) build ## .venv with ofakern, its kernels and the developer tools

# An existing .venv is completed, not replaced.
$(TOOLS_STAMP): constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt \
		torch cmake ninja pybind11 scikit-build-core
	touch $@

$(INSTALL_STAMP): pyproject.toml $(TOOLS_STAMP)
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

build: $(INSTALL_STAMP) ## rebuild the compiled modules (seconds when little changed)
	@flock $(BUILD)/.lock cmake --build $(BUILD) $(if $(TARGET),--target $(TARGET))
	@cmake --install $(BUILD) --prefix "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" >/dev/null

test: setup ## all tests, compile checks included
	$(PY) -m pytest -q -n 2 --dist loadfile tests

# Beside the pinned one, in a folder of its own: CPU torch does not depend on triton, so nothing else changes.
triton-newest: setup ## fetch the newest Triton there is into build/
	rm -rf build/triton-newest build/triton-fetched
	timeout 300 $(PY) -m pip install -q --disable-pip-version-check --no-deps --target build/triton-fetched triton
	mv build/triton-fetched build/triton-newest

test-triton-newest: setup ## the Triton tests (interpreted, compiled ahead of time) with what triton-newest fetched
	test -d build/triton-newest
	PYTHONPATH=$(CURDIR)/build/triton-newest $(PY) -m pytest -q -n 2 $(TRITON_TESTS)

demo: setup ## train one model on three instructions and show it (about six minutes)
	$(PY) examples/demo.py

bench: setup ## attention against its peers on this machine
	$(BIN)/ofakern bench attention --quick

lint: setup ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: setup ## rewrite the sources in the house's format
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

sanitize: setup ## build _cpu with ASan and UBSan and run the op tests with it (about five minutes)
	$(PY) -m pytest -q -s -m sanitize tests/ops/test_sanitizers.py

arm: setup ## cross-compile every object of the scalar path (about a minute)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt ziglang
	$(PY) -m pytest -q -n 2 -m aarch64 tests/build/test_aarch64.py

clean: ## remove what was built; .venv stays
	rm -rf build dist demo-output .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks $(INSTALL_STAMP)

distclean: clean ## remove .venv too
	rm -rf .venv
