# Every target makes the virtual environment first; only python3 (with its venv module) is needed.
#   make demo    the whole path on the bundled model: finetune, export, build, generate, compare
#   make test    the default tests          make lint    style, types, import layers
#   make thorough   the tests that continuous integration runs besides
#   make bench-export   architectures and export modes
#   make interop optimum-onnx runs exported models (its packages go to .interop/)
#   make bench   the committed benchmarks   make clean   caches and build leftovers (never artifacts/)
#   make gpu-check   on a machine with a GPU: engines, parity and speed there (scripts/gpu_check.sh)

PYTHON ?= python3
PYTEST_ARGS ?=
MARKS ?= thorough
BIN := .venv/bin
STAMP := .venv/quest-deploy-installed
# Many of the versions in constraints.txt are for Python 3.11 and later; 3.10 gets the newest that pyproject.toml allows.
PINS := $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq $(PINS)

.PHONY: demo test thorough interop lint bench bench-export gpu-check clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

thorough: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m '($(MARKS)) and not slow and not gpu' $(PYTEST_ARGS)

interop: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not gpu' $(PYTEST_ARGS) tests/interop/test_optimum.py

lint: $(STAMP)
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	scripts/lint_wheel.sh

gpu-check: $(STAMP)
	PYTHON=$(BIN)/python scripts/gpu_check.sh $(GPU_CHECK_ARGS)

bench-export: $(STAMP)
	$(BIN)/python -m benchmarks modes

bench: $(STAMP)
	@$(PIP) nvidia-modelopt nncf openvino
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# PyTorch comes first and alone, so that the build that the machine's package index prefers (CPU or CUDA) is settled
# before anything depends on it. tensorrt-stubs would pull in `tensorrt`, which installs only next to a GPU.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	    { rm -rf .venv; echo "make: no virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (minutes the first time)"
	@$(PIP) torch==2.13.0 setuptools
	@$(PIP) --no-build-isolation -e '.[dev,tensorrt-rtx,openvino,lora]'
	@$(PIP) --no-deps tensorrt-stubs
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
