# make quickstart   set up, train on handwritten digits, evaluate, show where the pictures are
# make molecules    set up, make molecules with RDKit, train on them, evaluate, show where the pictures are
# make test         set up, run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIGITS := data/digits

.PHONY: quickstart molecules test clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-train $(DIGITS)
	$(BIN)/python unite_fast/train.py --config configs/quickstart.json --resume

molecules: $(VENV)/.installed-molecules
	$(BIN)/python unite_fast/train.py --config configs/molecules_quickstart.json --resume

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

$(DIGITS): | $(VENV)/.installed-train
	$(BIN)/python -m unite_fast.data.digits $(DIGITS)

$(VENV)/.installed-%: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "unite_fast needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
