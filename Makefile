# Everything starts here; nothing needs to be installed first but Python 3.11 or newer and, for the Lava
# simulator, a Python 3.10. Variables, as in 'make demo PYTHON=python3.12':
#   PYTHON                the Python to build the main environment with; without it, usual ones are tried
#   SPIKEGUARD_PYTHON310  the Python 3.10 for Lava; without it, usual ones are tried
#   DATA_DIR              folder of Fashion-MNIST's files, for the measurements on it; without it they are left out
#   ENGINE, BUILD         the commands of a container engine; without them, docker's
#   SPIKEGUARD_TORCH      auto (default: CUDA where nvidia-smi lists a GPU), cpu or cuda

.DEFAULT_GOAL := help
.PHONY: help demo test setup lint check-full check-containers check-page bench clean

BIN := .venv/bin
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 $$HOME/.pyenv/versions/3.1[1-9].*/bin/python3 \
  /usr/local/bin/python3 /usr/bin/python3 /opt/homebrew/bin/python3 $$(uv python find --no-project 3.11 2>/dev/null))
# Tests are small: a second thread per process only gets in the way of the others.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: setup ## Train, quantise, export, run everywhere and compare: runs/demo/report.html
	@$(BIN)/spikeguard demo

test: setup lint ## Style, types and all tests
	@if [ -x .venv-lava/bin/python ]; then marks=''; else marks='not lava'; \
	  echo '=== NO LAVA ENVIRONMENT: the tests of the Lava runtimes are left out (see above) ===' >&2; fi; \
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "$$marks"

lint: setup ## Style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

setup: ## Make the environments .venv and .venv-lava, or bring them up to date
	@set -- $(PYTHONS); for python; do \
	  "$$python" -I -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  "$$python" -I hardware/environments.py main lava && exit 0; status=$$?; \
	  [ $$status -eq 3 ] || exit $$status; \
	  echo '=== GOING ON WITHOUT LAVA: nothing will be certified on it ===' >&2; exit 0; \
	done; \
	echo "No Python 3.11 or newer that runs and can make environments (venv, ensurepip); tried $$*." >&2; \
	echo 'Install one, or name it: make PYTHON=/path/to/python3' >&2; exit 2

check-full: ## The tests, the demo, its bundle in a fresh environment, its report in a browser, the check's own score, measurements
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory demo
	@$(BIN)/python -m tests.fresh_verify runs/demo/bundle
	@$(MAKE) --no-print-directory check-page
	@$(BIN)/spikeguard selftest
	@$(MAKE) --no-print-directory bench

check-containers: setup ## Build the container images and exercise them, on the bundle of the demo
	@[ -d runs/demo/bundle ] || $(BIN)/spikeguard demo
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m tests.check_containers runs/demo/bundle \
	  --engine "$(or $(ENGINE),docker)" --build "$(or $(BUILD),docker build -t)"

check-page: setup ## The report page in Chromium, light, dark, on a phone and printed; left out where there is none
	@$(BIN)/python -m tests.check_page $(wildcard runs/demo/report.html)

bench: setup ## The measurements of tests/benchmarks
	@set -e; for script in tests/benchmarks/bench_*.py; do \
	  echo "== $$script"; $(BIN)/python -m "tests.benchmarks.$$(basename "$$script" .py)"; done; \
	if [ -z "$(DATA_DIR)" ]; then echo '=== NO DATA_DIR: nothing was measured on MNIST and Fashion-MNIST ===' >&2; exit; fi; \
	for preset in fashion-mnist mnist; do \
	  $(BIN)/python -m tests.benchmarks.bench_method $$preset --data-dir "$(DATA_DIR)" --seeds 1 --images 1000 \
	    --strong-images 300; done; \
	$(BIN)/python -m tests.benchmarks.bench_integers fashion-mnist --data-dir "$(DATA_DIR)" --images 1000 --bits 8 4

clean: ## Remove both environments and what tools left behind; runs/ stays
	@rm -rf .venv .venv-lava build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find hardware exporters pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
