# make demo   everything from nothing to a missing-modality report
# make test   the same setup, then the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint bench clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg setup.py pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("karmma-dist needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[test]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/karmma-dist demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses=4 --durations=12 --dist=loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	@for script in tests/benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || [ $$? -eq 2 ] || exit 1; done

clean:
	rm -rf $(VENV) demo runs build *.egg-info
