# Every target sets itself up: the environment in .venv is made when it lacks, and kept while pyproject.toml stays.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: demo test bench lint types docs help fmt clean
.PHONY: env-demo env-dev env-bench env-docs servers

PYTHON := .venv/bin/python

demo: env-demo ## An app with two workers, a change while it runs (CLUSTER=1: on etcd and Redis, which are killed)
ifdef CLUSTER
	@scripts/servers.sh etcd redis-server
endif
	@$(PYTHON) examples/demo.py $(if $(CLUSTER),--cluster)

test: lint types servers ## Lint, types, and the tests on every supported Python of this machine
	@scripts/suite.sh

bench: env-bench servers ## The measurements (QUICK=1: a short run)
	@$(PYTHON) -m benchmarks

lint: env-dev ## Ruff: faults and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: env-dev ## mypy --strict, and pyright on the public surface
	$(PYTHON) -m mypy --strict
	$(PYTHON) -m pyright --pythonpath $(PYTHON)
	$(PYTHON) scripts/public_types.py

docs: env-docs ## The documentation, in docs/_build/html
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

fmt: env-dev ## Fix what ruff can fix, and format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean: ## Remove all that the other targets made
	rm -rf .venv .venvs build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

help: ## This list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)$$/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

servers:
	@scripts/servers.sh etcd etcdctl redis-server redis-cli openssl promtool wrk

# Not left to an implicit rule: make does not look for one where a target is phony.
env-demo env-dev env-bench env-docs: env-%:
	@scripts/environment.sh .venv $*
