# The commands of a newcomer (serve, test) and of a developer (the rest). `make help` lists them.
PYTHON ?= python3
BACKEND ?=
CONFIG ?= deploy/embedded.yaml
export BACKEND
RUN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help serve test install install-dev lint types imports test-fast test-programs test-engines test-slow test-gpu audit bench bench-recipes bench-gateway bench-throughput bench-scoring bench-divergence bench-routing bench-limits clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: install ## install, prepare the tiers, start them, serve on http://127.0.0.1:8000
	@exec $(RUN)/assay serve --config $(CONFIG)

test: install-dev lint imports ## everything that must be green
	@# Types take one core, and whoever starts programs waits for them.
	@$(MAKE) --no-print-directory --jobs 2 --output-sync types test-programs
	@$(MAKE) --no-print-directory test-fast
	@$(MAKE) --no-print-directory test-engines

install: ## both environments; repairs an interrupted one
	@$(PYTHON) deploy/install.py

install-dev: # a fifth of a second where nothing is missing
	@$(PYTHON) deploy/install.py --dev

lint: ## ruff: style and common mistakes
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: ## mypy --strict
	$(RUN)/mypy

imports: ## server → tiers → kernels, never back up
	$(RUN)/lint-imports

test-fast: install-dev ## tests without an engine, in seconds
	@# Compiled tests are kept, even where Python is told not to: three processes would each compile them again.
	@# One thread each, or those of three processes wait for each other on few cores, and spin.
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN)/pytest --ignore tests/engines -m "not program" --numprocesses 3 \
		--dist worksteal

test-programs: install-dev ## tests that start Prometheus, kubectl, or processes of ours
	PYTHONDONTWRITEBYTECODE= $(RUN)/pytest --ignore tests/engines -m program --numprocesses 2 --dist worksteal

test-engines: install-dev ## tests on six real engines of two models, started once
	$(RUN)/pytest -m "engine and not gpu and not slow"

test-slow: install-dev ## tests on engines that `make test` has no time for
	$(RUN)/pytest -m "engine and not gpu and slow"

test-gpu: install-dev ## tests that need an NVIDIA GPU
	$(RUN)/pytest -m gpu

audit: install-dev ## known vulnerabilities in what the gateway depends on; options in AUDIT
	@$(RUN)/python deploy/audit.py $(AUDIT)

bench: ## speed, size and divergence of each tier of a running server; options in ARGS
	$(RUN)/python -m tests.bench.tiers $(ARGS)

bench-recipes: ## every quantization recipe tried, built and measured anew (two hours); options in ARGS
	PYTHONPATH=$(CURDIR) .venv-quantize/bin/python -m tests.bench.recipes $(ARGS)

bench-gateway: install-dev ## what a request costs here, in vLLM's router and in LiteLLM; options in ARGS
	$(RUN)/python -m tests.bench.gateway $(ARGS)

bench-throughput: install-dev ## tokens per second of a real engine, direct and through the gateway; options in ARGS
	$(RUN)/python -m tests.bench.throughput $(ARGS)

bench-scoring: install-dev ## prompt tokens per second that an engine scores, beside those it reads; options in ARGS
	$(RUN)/python -m tests.bench.scoring $(ARGS)

bench-divergence: install-dev ## time and memory of comparing distributions, beside PyTorch's own; options in ARGS
	$(RUN)/python -m tests.bench.divergence $(ARGS)

bench-routing: install-dev ## prefix-cache hits and first tokens of two replicas, beside round robin; options in ARGS
	$(RUN)/python -m tests.bench.routing $(ARGS)

bench-limits: install-dev ## what the limits of a key cost a request, in the process and in Redis; options in ARGS
	$(RUN)/python -m tests.bench.limits $(ARGS)

clean: ## remove environments, checkpoints and logs
	rm -rf .venv .venv-quantize .venv-bench .assay
