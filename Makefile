# Needs make and Python 3.11 or later; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# With what tests and checks need.
DEV := $(VENV)/.developed

.DEFAULT_GOAL := help
.PHONY: dist docs-site docs-browser help demo test test-all test-transformers check check-mypy check-rest generate docs clean

help:
	@echo "make demo    install, then show two accelerated models and cases of every op; about a minute"
	@echo "make test    install, then run the tests"
	@echo "make test-all   the same, with large matrices and compilations"
	@echo "make test-transformers VERSION=5.24.0   the tests of the integrations with that version"
	@echo "make check   install, then run ruff, mypy, pyright and import-linter"
	@echo "make generate   write the public functions and docs/ops from the specs"
	@echo "make docs    the same, the figures, docs/benchmarks.md and docs/compatibility.md"
	@echo "make docs-site   build the site of the documentation into build/site; a warning is an error"
	@echo "make docs-browser   install the browser that the site's test opens it with"
	@echo "make dist    build the sdist and the wheel, and check them as a release is checked"
	@echo "make clean   remove the virtual environment, builds and caches"
	@echo "PYTHON=python3.12 make ...   use another interpreter (3.11 or later)"

demo: $(STAMP)
	@$(BIN)/polyfuse demo

test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# A virtual environment of its own with another version of Transformers, over all else that $(VENV) has.
VERSION ?= 5.24.0
OTHER := .venv-transformers-$(VERSION)
test-transformers: $(DEV)
	@test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	@base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$base')" > $$($(OTHER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check 'transformers==$(VERSION)'
	$(OTHER)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" -W default tests/integrations

check: $(DEV)
	@$(MAKE) --no-print-directory -j2 check-mypy check-rest

check-mypy: $(DEV)
	$(BIN)/mypy

check-rest: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

generate: $(DEV)
	@$(BIN)/python scripts/generate.py

docs: generate
	@$(BIN)/python -m polyfuse.bench.page
	@$(BIN)/python -m polyfuse.bench.compatibility
	@$(BIN)/python -m polyfuse.bench.plots

SITE := $(VENV)/.docs
$(SITE): $(DEV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]' --constraint constraints.txt
	@touch $@

docs-site: $(SITE)
	@$(BIN)/python scripts/site.py build/site

docs-browser: $(SITE)
	$(BIN)/python -m playwright install --with-deps chromium

# The tools in an environment of their own: they share no version with what is tested.
RELEASE := .venv-release
dist:
	@test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	@$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["release"])') --constraint constraints.txt
	@rm -rf build dist
	$(RELEASE)/bin/python -m build --outdir dist .
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl
	$(RELEASE)/bin/pyroma --min 8 . # of 10: the project has neither a URL nor an author's e-mail to state

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, $(PYTHON) is " + sys.version.split()[0] + "; try: PYTHON=python3.12 make")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]' --constraint constraints.txt
	@touch $@

$(DEV): $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-transformers-* .venv-release build dist report src/*.egg-info .coverage* .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
