# Everything here runs in .venv, which is made on demand from PyPI alone and without root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the environment was made from; newer than this file: install again.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-ipvs lint format bench bench-compare lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/pip:
	@$(PYTHON) .ci/make_venv.py $(VENV)

# The constraints hold for the build backend too: PIP_CONSTRAINT reaches its own environment.
$(STAMP): pyproject.toml requirements.lock | $(BIN)/pip
	@echo "installing kdns and its tools into $(VENV) (once; a minute or so)"
	@PIP_CONSTRAINT=$(CURDIR)/requirements.lock PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet -e '.[test,lint]'
	@touch $@

demo: $(STAMP) ## start kdns over examples/ and ask it what a person would
	@$(BIN)/python examples/walkthrough.py

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n auto

test-ipvs: $(STAMP) ## test mode ipvs in a small virtual machine
	$(BIN)/python .ci/ipvs_vm.py

lint: $(STAMP) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure (needs dnsperf); writes bench/RESULTS.md
	$(BIN)/python bench/run.py

bench-compare: $(STAMP) ## measure names and print the change since BASE=commit (HEAD)
	$(BIN)/python bench/run.py --only names --compare $(or $(BASE),HEAD)

lock: ## resolve the newest versions into requirements.lock
	@$(PYTHON) .ci/make_venv.py $(VENV).lock
	$(VENV).lock/bin/python -m pip install --quiet hatchling -e '.[test,lint]'
	@{ sed -n '/^#/p' requirements.lock; \
		$(VENV).lock/bin/python -m pip freeze --exclude-editable; } > $(VENV).lock/new
	@mv $(VENV).lock/new requirements.lock && rm -rf $(VENV).lock

clean: ## remove .venv and all caches
	rm -rf $(VENV) $(VENV).lock .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
