# `make demo` and `make test` each set everything up in $(VENV) by themselves; a second run starts at once.
PYTHON ?= python3
VENV ?= .venv
# Further arguments for pip, such as an index that has PyTorch's much smaller CPU build.
PIP_ARGS ?=
# A checkout of Stable-Baselines3 v2.9.2, for test-sb3.
SB3 ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt
# worksteal: tests of one file, which share models, mostly stay in one process.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
# These networks are too small to share among threads, which on a busy machine wait for each other most of the time.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo quick test test-all lint types tests heavy test-sb3 site

help:
	@echo "make demo                      train, evaluate and plot CartPole-v1 (results in logs/demo)"
	@echo "make quick                     pytest, the core only"
	@echo "make test                      ruff, mypy --strict, pytest"
	@echo "make test-all                  make test, then the tests that take long or need heavy packages"
	@echo "make lint                      ruff check, ruff format --check"
	@echo "make site                      guides and API as pages, in build/site/index.html"
	@echo "make test-sb3 SB3=CHECKOUT     SB3 v2.9.2's own tests with PPO replaced by PPOPlus"

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[zoo,plot]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[zoo,plot,export,track,ray,site,box2d,mujoco,dev]"
	@touch $@

$(VENV)/.site: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e ".[site]"
	@touch $@

# A check of system information in SB3's tests.
$(VENV)/.test-sb3: $(VENV)/.test
	$(INSTALL) psutil
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

quick: $(VENV)/.test
	$(PYTEST) -m quick

test: lint types tests

test-all: test heavy

# The blocks of Python in README and guides are formatted too.
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check sb3_ppo_plus tests examples README.md .mkdocs

types: $(VENV)/.test
	$(BIN)/mypy --strict sb3_ppo_plus

tests: $(VENV)/.test lint types
	$(PYTEST) -m "not heavy"

# pytest's exit status 5 says that there are none. Nothing is printed then, so that the summary of the tests before
# remains the last one.
heavy: $(VENV)/.test
	@status=0; $(BIN)/python -m pytest -m heavy --collect-only -q > /dev/null 2>&1 || status=$$?; \
	if [ $$status -ne 5 ]; then $(PYTEST) -m heavy; fi

# A broken link, or a name that is not there, is an error.
site: $(VENV)/.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file .mkdocs/mkdocs.yml

test-sb3: $(VENV)/.test-sb3
	@test -d "$(SB3)/tests" || { echo "usage: make test-sb3 SB3=/path/to/stable-baselines3 (a checkout of v2.9.2)"; exit 2; }
	PYTHONPATH=tests $(PYTEST) -p sb3_suite -c "$(SB3)/pyproject.toml" --rootdir "$(SB3)" -p no:cacheprovider "$(SB3)/tests"
