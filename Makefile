# What a developer and an operator type. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
export PYTHON
# Everything that is kept between runs: the bundle, the base of the lab's machines, the labs themselves.
export CHATNIO_CACHE ?= /var/cache/chatnio
# Never look for anything beside what the lock file pins.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

step = @printf '\n\033[1m== %s\033[0m  (%s)\n' "$(1)" "$$(date +%T)"
python_files := collections/ansible_collections/chatnio/onprem/plugins roles molecule tests server

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: lab
lab: machine toolchain  ## boot a lab on this machine, install the platform on it and ask the model a question
	$(call step,Gather the bundle)
	ansible-playbook playbooks/bundle.yml
	$(call step,Boot three machines)
	ansible-playbook playbooks/lab_up.yml
	$(call step,Install the platform)
	ansible-playbook site.yml
	$(call step,Ask the model)
	ansible-playbook playbooks/lab_ask.yml

.PHONY: lab-down
lab-down:  ## remove the lab; only $CHATNIO_CACHE stays
	@ansible-playbook playbooks/lab_down.yml

.PHONY: test
test: machine toolchain check  ## everything that proves the platform, in half an hour
	$(call step,Gather the bundle)
	ansible-playbook playbooks/bundle.yml
	$(call step,Every role)
	molecule/run.sh
	$(call step,The whole platform)
	pytest -v -s tests/e2e

.PHONY: test-full
test-full: test  ## and what is slow: the real model against transformers, INT8's cost, a real vLLM, the peers
	$(call step,The model service, slowly)
	cd server
	python -m bench prepare
	NIOSERVE_TEST_MODEL=$(CHATNIO_CACHE)/bench/models/hf pytest -q -m slow tests
	nioserve evaluate $(CHATNIO_CACHE)/bench/models/int8 --reference $(CHATNIO_CACHE)/bench/models/hf
	python -m bench run --quick --out $(CHATNIO_CACHE)/bench/quick

BENCH_ARGS ?= run
.PHONY: bench
bench: toolchain  ## the model service beside its peers, in 25 minutes on a quiet machine (BENCH_ARGS='run --help')
	$(call step,Benchmark)
	PYTHONPATH=server python -m bench $(BENCH_ARGS)

.PHONY: check
check: toolchain  ## lint, types and unit tests, in under two minutes
	$(call step,Lint)
	yamllint --strict .
	ansible-lint --offline -q
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror server/native/*
	$(call step,Types)
	mypy
	python tests/role_docs.py --check
	$(call step,Unit tests)
	# Apart: importing Ansible replaces sys.intern, which torch can't bear.
	pytest -q -n 2 collections tests/unit
	pytest -q -n 2 -m 'not slow' server/tests

.PHONY: machine
machine:
	@roles/lab/files/check-machine.sh "$(CHATNIO_CACHE)"

# The packages that Python environments and the lab need, where they are missing.
.PHONY: toolchain
toolchain: .venv/.complete

.venv/.complete: tests/requirements.lock server/pyproject.toml server/setup.py $(wildcard server/native/*)
	$(call step,Install the toolchain)
	tests/toolchain.sh

.PHONY: lock
lock:  ## resolve the pinned versions again
	tests/lock.sh
