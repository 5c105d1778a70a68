# Everything a newcomer types. Each makes the environment first, and only once: `make demo` with what training needs, `make
# serve` also with the search libraries, the others with the tools and the libraries that tests compare with, which are twice as much.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The versions that the tests passed with. `make lock` writes them anew.
LOCK   := --constraint constraints.txt
# Lets builds for CPUs and for CUDA fit, of the versions that the tests passed with.
TORCH  := 'torch<2.14' 'torchvision<0.29'

.PHONY: demo serve test test-newest browser check install lock docs dist site clean

demo: $(VENV)/.installed
	$(BIN)/openimp demo

serve: $(VENV)/.search
	$(BIN)/openimp serve openimp:base

test: $(VENV)/.dev
	$(BIN)/pytest

# The same with the newest versions that pyproject.toml allows, whatever constraints.txt says, in an environment of its own.
test-newest:
	$(MAKE) test VENV=.venv-newest LOCK=

# A browser for the tests of pages, if there is none.
browser: $(VENV)/.dev
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	else $(BIN)/playwright install chromium; fi

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# The newest versions that pyproject.toml allows, for Python 3.10 or newer under Linux and macOS. What torch itself needs
# is left to torch: its builds for CUDA differ in that.
lock: $(VENV)/.dev
	printf '%s ; sys_platform == "never"\n' torch torchvision | UV_CUSTOM_COMPILE_COMMAND="make lock" \
	  $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras --override /dev/stdin \
	  --no-emit-package torch --no-emit-package torchvision --no-annotate --output-file constraints.txt pyproject.toml
	printf '%s\n' $(TORCH) >> constraints.txt

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

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(LOCK) --editable .
	@touch $@

$(VENV)/.search: $(VENV)/.installed
	$(BIN)/pip install --quiet $(LOCK) --editable '.[search]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install --quiet $(LOCK) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-newest runs
