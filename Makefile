# Everything a newcomer types. `make demo` and `make test` make the environment first, and only once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test check install docs clean

demo: $(VENV)/.installed
	@if [ -e runs/demo/results.jsonl ]; then \
	  echo "runs/demo is there already; its results (remove the folder to train again):"; $(BIN)/openimp info runs/demo; \
	elif ls -d runs/demo/checkpoints/step-* >/dev/null 2>&1; then \
	  $(BIN)/openimp train demo --resume && $(BIN)/openimp info runs/demo; \
	else rm -rf runs/demo; $(BIN)/openimp demo; fi

test: $(VENV)/.installed
	$(BIN)/pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

docs: $(VENV)/.installed
	$(BIN)/python tools/write_recipe_reference.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs
