# make quickstart   set up, train on handwritten digits, evaluate, show where the pictures are
# make molecules    set up, make molecules with RDKit, train on them, evaluate, show where the pictures are
# make test         set up, run the tests
# make bench        set up, measure against the rivals, record, draw the history, fail on a regression
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIGITS := data/digits

.PHONY: quickstart molecules test bench clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-train $(DIGITS)
	$(BIN)/python unite_fast/train.py --config configs/quickstart.json --resume

molecules: $(VENV)/.installed-molecules
	$(BIN)/python unite_fast/train.py --config configs/molecules_quickstart.json --resume

# Two processes, of one thread each (tests/conftest.py). A file's tests stay together, since they share what they make
# first; files keep their order, since by number of tests the longest test of all would come last, alone.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks/ --record --gate --benchmark-columns=median,iqr,rounds

$(DIGITS): | $(VENV)/.installed-train
	$(BIN)/python -m unite_fast.data.digits $(DIGITS)

$(VENV)/.installed-%: setup.py pyproject.toml kernels/cpu.c kernels/cpu_rows.h kernels/cpu_products.h
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "unite_fast needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@# A rival that tests compare with stands beside the packages, not among them: without torchvision, which would come
	@# with it, torchmetrics fails to import where it finds it.
	@test $* != test || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/rivals 'torch-fidelity==0.4.*'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/_cpu*.so
