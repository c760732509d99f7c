# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv if it is missing.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
ARGS ?=
FLAGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
# Threads that wait give up their core soon: see nbs/91_cli.ipynb.
export GOMP_SPINCOUNT ?= 1000
LIMIT := $(if $(shell command -v timeout),timeout 1800,)

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser lab docs export clean hooks install

help: ## this list
	@echo 'hjepa: a Hierarchical JEPA for images, as a workbook'
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

$(STAMP): settings.ini setup.py
	@test -n '$(PYTHON)' || { echo 'No Python found: install Python 3.11.4 or later, or say make PYTHON=/path/to/python.'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(STAMP) ## make .venv with everything in it

demo: $(STAMP) ## train, judge and report on CIFAR-10, minutes on two cores (ARGS='minutes=1 --fresh' changes the recipe and starts anew)
	$(BIN)/hjepa train cifar10-cpu --fallback --out runs/demo $(ARGS)

test: $(STAMP) ## the gates, the notebooks, the tests (FLAGS='slow' runs flagged cells too)
	$(BIN)/python tools/gate.py drift checks
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(LIMIT) $(BIN)/nbdev_test --n_workers 2 --do_print --timing --flags '$(FLAGS)'
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(LIMIT) $(BIN)/python -m pytest tests -q -n 2 --dist loadfile
	@$(BIN)/python tools/gate.py skipped --flags '$(FLAGS)'

test-browser: $(STAMP) docs ## JupyterLab and the site in Chromium, pictures in build/ (not part of make test)
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -e '.[browser]'
	$(BIN)/python -m pytest tests/browser.py -q
	$(BIN)/python -m pytest tests/browser_live.py -q

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=nbs

export: $(STAMP) ## notebooks -> hjepa/, clean notebooks, README.md
	$(BIN)/python tools/gate.py export

docs: $(STAMP) ## the site: _docs/ with Quarto where it is installed, else a pandoc preview in _site/
	$(BIN)/python tools/readme.py
	@if command -v quarto >/dev/null; then PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs && echo 'Quarto site: _docs/index.html'; \
	else $(BIN)/python tools/preview.py; fi

hooks: $(STAMP) ## nbdev's git merge driver for notebooks (also writes settings into ~/.jupyter: a choice, not needed)
	$(BIN)/nbdev_install_hooks

clean: ## take away what building made (keeps .venv and runs)
	rm -rf _proc _site _docs build dist *.egg-info .pytest_cache nbs/.last_checked
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
