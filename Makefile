# make demo    train, audit, plan, unlearn and verify on a small data set   (make demo ARGS="--seed 1")
# make test    the whole test suite            make lint    ruff, mypy, import-linter
# make docs    the documentation site in site/, with warnings as errors
# make bench   every benchmark, quick form     make clean   remove the virtual environment
#
# The first run creates .venv and installs the pinned versions of constraints.txt into it.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
ARGS ?=
BENCHMARKS := $(filter-out __init__,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: demo test lint docs bench clean

# `python -m` from the repository root, so that `benchmarks` is the folder here: opacus installs one of the same name.
demo: $(VENV)/.installed-demo
	@$(BIN)/python -m per_instance_accountant demo $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n 2 --dist loadfile -q $(ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	@$(BIN)/zensical build --clean --strict

bench: $(VENV)/.installed-dev
	@for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --format json --quick || exit 1; done

clean:
	rm -rf $(VENV)

# Candidates are run, not only looked up: a version manager's stub may stand on PATH and start nothing.
$(BIN)/python:
	@found=; for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	  if "$$name" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then found=$$name; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'No Python 3.11 or newer with ensurepip was found: install one, or name it with make PYTHON=...' >&2; exit 1; \
	fi; \
	"$$found" -m venv --clear $(VENV) || \
	  { rm -rf $(VENV); echo "$$found could not create the virtual environment $(VENV)." >&2; exit 1; }

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing the "$*" dependencies into $(VENV); the first time this takes minutes.' >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]' || \
	  { echo 'pip could not install the "$*" dependencies: check the network, then run make again.' >&2; exit 1; }
	@touch $@
