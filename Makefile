# Development targets. `make` alone lists them; each installs its requirements into .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROMPT ?= The value of an object
# As it was typed: make would expand a $ in it, and the shell quotes, $ and backslashes, if it stood in a recipe.
override PROMPT := $(value PROMPT)
export PROMPT

# The pins hold in the separate environment that builds the package too; newer versions of pip read the second name there.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# Settings of the user's that would send the packages elsewhere than into .venv, where pip refuses or nothing finds them.
export PIP_USER := 0
unexport PIP_TARGET PIP_PREFIX PIP_ROOT

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint check wheel docs clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  make %-10s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## install, train a small model on English prose, generate text (a few minutes)
	$(BIN)/psannlm train configs/waveresnet_cpu.yaml
	$(BIN)/psannlm generate --prompt="$$PROMPT"

test: $(VENV)/.installed-dev ## run the quick tests, one process per core (a few minutes)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(VENV)/.installed-dev ## run all tests (half an hour on two cores)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed-dev ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## what to run before a commit: lint and the quick tests

# Files left in build/ by an earlier build would be packed again, even if they are deleted since.
wheel: | $(BIN)/python ## build dist/*.whl
	rm -rf build dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

docs: $(VENV)/.installed-docs ## build the documentation into docs/_build/html; warnings are errors (Python 3.11)
	$(BIN)/sphinx-build -W --keep-going -E -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

clean: ## remove .venv and all build output; keeps runs/ and reports/
	rm -rf $(VENV) build dist docs/_build *.egg-info .smoke .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` needs no test tools, `make test` does: one environment, two stamp files, for runtime and dev dependencies.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing psannlm and what it needs into $(VENV) (torch is large: a minute or more)"
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[dev,data,tensorboard,hf,eval,gguf,serve,cluster]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The documentation is built with Python 3.11 or newer: make PYTHON=python3.11 clean docs"; exit 1; }
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "psannlm needs Python 3.10 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@case "$$(pwd)" in *:*) \
	  echo "Python makes no virtual environment in $$(pwd): its path holds a colon, which separates the entries of PATH."; \
	  echo "Move or clone the repository to a folder without one."; exit 1;; esac
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)."; exit 1; }
