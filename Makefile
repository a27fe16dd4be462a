# Every command sets up .venv first, if it is not up to date.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup eval test lint lab figures bench model clean always

STAMP := .venv/.ready
RUN := .venv/bin/python -m

# An environment that was made in another directory, or for the other set of packages, is made anew.
quote = '$(subst ','\'',$1)'
stale := $(shell { read -r kind place <.venv/.made-for; } 2>/dev/null || exit 0; wanted=$(call quote,$(ACCELERATOR)); \
    [ "$$place" = "$$(pwd -P)" ] && [ "$${wanted:-$$kind}" = "$$kind" ] || echo stale)

# $(call option,MODEL,--model) is `--model <value>` if MODEL is set, else nothing.
option = $(if $($1),$2 $(call quote,$($1)))

help: ## show this list (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv with all packages: [ACCELERATOR=cpu|gpu] [PYTHON=python3.12]
	@echo "The environment in .venv is up to date."

$(STAMP): pyproject.toml scripts/setup.sh $(if $(stale),always)
	@PYTHON=$(call quote,$(PYTHON)) ACCELERATOR=$(call quote,$(ACCELERATOR)) bash scripts/setup.sh

eval: $(STAMP) ## perplexity by format: [MODEL=dir or name] [TASKS=a,b] [FORMATS=a,b] [BACKEND=hf|vllm] [LIMIT=n]
	@$(RUN) adallm.cli eval $(call option,MODEL,--model) $(call option,TASKS,--tasks) \
	    $(call option,FORMATS,--formats) $(call option,BACKEND,--backend) $(call option,LIMIT,--limit)

test: $(STAMP) ## run the tests: [ARGS="tests/test_nvfp4.py -k pack"]
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$((($$(nproc) + 1) / 2))} $(RUN) pytest -n 2 $(ARGS)

lint: $(STAMP) ## check style and format with ruff
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

lab: $(STAMP) ## open JupyterLab on notebooks/: [ARGS="--no-browser --port=8890"]
	@PATH="$$PWD/.venv/bin:$$PATH" $(RUN) jupyterlab --notebook-dir=notebooks $(ARGS)

figures: $(STAMP) ## run every notebook from a fresh kernel and rewrite the figures
	@ls notebooks/*.ipynb >/dev/null 2>&1 || { echo "notebooks/ has no notebook"; exit 1; }
	@PATH="$$PWD/.venv/bin:$$PATH" JUPYTER_PREFER_ENV_PATH=1 $(RUN) nbconvert \
	    --to notebook --inplace --execute notebooks/*.ipynb \
	    --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.timeout=3600 --ClearMetadataPreprocessor.enabled=True \
	    --ClearMetadataPreprocessor.preserve_nb_metadata_mask='{"kernelspec", ("language_info", "name")}'

bench: $(STAMP) ## run the benchmarks that fit this machine
	@$(RUN) adallm.bench quantize
	@$(RUN) adallm.bench sm89
	@if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then $(RUN) adallm.bench linear && $(RUN) adallm.bench attention; fi

model: $(STAMP) ## train the bundled model anew (needs a CUDA GPU)
	@$(RUN) adallm.tiny.train

clean: ## remove .venv, caches and build products; results/ stays
	@rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
