# Everything a newcomer types. Each makes the environment first, and only once: `make demo` with what training needs, `make
# serve` also with the search libraries, the others with the tools and the libraries that tests compare with, which are twice as much.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo serve test check install constraints docs dist site clean

demo: $(VENV)/.installed
	$(BIN)/openimp demo

serve: $(VENV)/.search
	$(BIN)/openimp serve openimp:base

test: $(VENV)/.dev
	$(BIN)/pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# What the tests passed with, on Python 3.11 under Linux; .ci/run installs these versions.
constraints: $(VENV)/.dev
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

docs: $(VENV)/.dev
	$(BIN)/python -m tools.write_recipe_reference

# The source distribution, and the wheel that it builds.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tools.check_dist dist

# The documentation as a site, in the folder site/. A dead link is an error.
site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.search: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[search]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs
