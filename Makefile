# Everything runs in .venv, made on first use with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all checks audit golden wheel clean

demo: $(READY)
	$(BIN)/python scripts/overfit_demo.py

# Each file runs whole in one of WORKERS processes, with what its tests share; the slow folders are begun first.
# make test WORKERS=0 ARGS="-m 'not slow' tests/unit -s"
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not grid" $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

checks: $(READY) audit
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# Known vulnerabilities of what is installed, where the advisories can be reached.
audit: $(READY)
	$(BIN)/python scripts/audit.py

# Rewrites tests/golden; read the diff.
golden: $(READY)
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/golden

wheel: $(READY)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
