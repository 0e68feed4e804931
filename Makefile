# Every target does all of its own set-up: a virtual environment in .venv with the versions of constraints.txt, and the
# compiled extension built into the source tree.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(SOURCES) $(wildcard tests/csrc/*.h tests/csrc/*.cpp)
# Where `make bench` puts its statistics: one folder a machine.
RESULTS ?= benchmarks/results/local

.PHONY: venv demo test test-slow gates sanitize lint format bench report gpu-check gpu-bench clean

venv: .venv/built

# torch comes first: the build imports it.
.venv/installed: constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python >= 3.10 is needed, found {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch numpy setuptools ninja
	touch $@

.venv/built: .venv/installed pyproject.toml setup.py $(SOURCES)
	CFLAGS=-Werror PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	LAYERDROP_FAST_BUILD=none $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/layerdrop-fast demo

# A process a core, each with one thread.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8
	$(MAKE) --no-print-directory gpu-check DRY=1
	$(MAKE) --no-print-directory gpu-bench DRY=1 ONLY="steps small_batch"
	.ci/sanitize --if-possible

test-slow: venv
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 3600

# Every GPU kernel x configuration, compiled without a GPU; rewrites the figures of docs/kernels.md.
gates: venv
	$(BIN)/python -m tests.gates --all

sanitize: venv
	.ci/sanitize

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: venv
	$(BIN)/python -m pytest benchmarks -m "slow or not slow" --timeout 3600 --benchmark-enable \
		--benchmark-storage=file://$(RESULTS) --benchmark-save=$(or $(NAME),bench)

# Plots, tables and goals of docs/performance.md and README.md, from what `make bench` put into the same folder.
report: venv
	$(BIN)/python -m benchmarks.report $(RESULTS)

# On a machine with a GPU: its own Python and torch, nothing is downloaded. DRY=1: on a CPU, in .venv. TUNE=1: tunes too.
# ONLY="...": some of the stages.
gpu-check gpu-bench: $(if $(DRY),venv)
	$(if $(DRY),CFLAGS=-Werror PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check \
		$(if $(filter gpu-bench,$@),--steps) $(if $(DRY),--dry) $(if $(TUNE),--tune) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf .venv build out *.egg-info layerdrop_fast/*.so
