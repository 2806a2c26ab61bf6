# make run    post-train the shipped model: SFT, then GRPO (first call installs into .venv)
# make lab    open the course in JupyterLab
# make test   lint, types, tests, notebooks (solutions; make test-student: the others)
# Without make, README.md has the commands to set up, run and test.

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
STAMP := $(VENV)/.installed
SOLUTIONS := $(wildcard solutions/*.ipynb)

.PHONY: run test lint types units notebooks-test test-student test-browser lab notebooks bench clean

run: $(STAMP)
	$(BIN)/posttrain all --config quick

# Only a changed package list or a changed pin installs again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: this course needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 1; }
	@test -e $(BIN)/python -o -e $(BIN)/python.exe || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

test: lint types units notebooks-test

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/basedpyright

units: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

notebooks-test: $(STAMP)
ifneq ($(SOLUTIONS),)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval solutions
endif

test-student: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval-lax notebooks

# Without the setting JupyterLab begins with a question about its news.
lab: $(STAMP)
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
	  > $(VENV)/share/jupyter/lab/settings/overrides.json
	$(BIN)/jupyter lab --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  $(firstword $(wildcard notebooks/00_*.ipynb) notebooks)

notebooks: $(STAMP)
	$(BIN)/python -m tools.build_notebooks

test-browser: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m browser

bench: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[bench]'
	$(BIN)/python tests/benchmarks/bench.py

clean:
	rm -rf runs deploys .pytest_cache .ruff_cache .hypothesis
