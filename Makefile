# What one types, and what it does. `make help` prints this list.
#
# PYTHON=...       the interpreter to build .venv with (default: the first of 3.11, 3.12, 3.13 that starts)
# TORCH_INDEX=...  a package index to take torch from, such as one that holds CPU builds only. Without it the
#                  usual index is asked, whose Linux builds of torch bring several GB of CUDA libraries.
# ARGS=...         more words for the command: make demo ARGS="pictures=DIR", make test ARGS="-k store -n0" (one process)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# `make -s` or CI=true: pip prints errors only.
ifneq ($(CI)$(findstring s,$(firstword -$(MAKEFLAGS))),)
PIP += --quiet
endif
TORCH_CPU := torch==2.13.0
# The stamp's name changes with what setup depends on: an unchanged project installs nothing twice.
STAMP := $(VENV)/.setup-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# Tests and checks never ask the network for models or data.
OFFLINE := HF_HUB_OFFLINE=1
# Tests run in as many processes as there are cores, a core for each: more would fight. From five on memory would run
# short before the time does; a file is never shared by two processes (its fixtures train models).
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 4 ? 4 : n)))
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo smoke test faults check audit lock bench report docs clean

help:  ## print this list
	@awk -F ":.*## " "/^[a-z-]+:.*## / { printf \"  make %-6s  %s\\n\", \$$1, \$$2 }" $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install everything (the other targets do it by themselves)

demo: setup  ## the whole road on real pictures: train, draw, show (15 minutes on 2 cores)
	$(BIN)/python -m vqlm.demo $(ARGS)

smoke: setup  ## the whole road on a toy set, in a minute
	$(BIN)/python -m vqlm.demo size=smoke out=runs/smoke $(ARGS)

test: setup  ## prove it: unit, config, journey and wheel tests
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q $(PARALLEL) $(ARGS)

faults: setup  ## the faults of docs/reliability.md at full count, and its table anew (about half an hour)
	FAULTS=full $(OFFLINE) $(BIN)/python -m pytest tests/faults -q --timeout 1800 $(ARGS)

check: setup  ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

audit:  ## known holes in the packages of requirements-cpu.txt, where an advisory database can be reached
	@$(find_python); [[ -x build/audit/bin/pip-audit ]] || { "$$python" -m venv build/audit && \
	  build/audit/bin/pip --disable-pip-version-check install --quiet pip-audit==2.10.1; } || \
	  { echo "audit: not run: pip-audit cannot be installed from here"; exit 0; }; \
	build/audit/bin/python .ci/audit.py $(ARGS)

lock: setup  ## requirements-cpu.txt anew: each package of constraints.txt with the sha256 of its file
	@mkdir -p build
	$(PIP) install --quiet --dry-run --ignore-installed --report build/lock.json \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt '$(TORCH_CPU)+cpu' -e '.[demo,dev]'
	$(BIN)/python .ci/lock.py < build/lock.json > build/lock.txt && mv build/lock.txt requirements-cpu.txt

bench: setup  ## the quantizer: ours, the library, the limit
	$(OFFLINE) $(BIN)/python benchmarks/quantizer.py $(ARGS)

report: setup  ## every table that is made of numbers, from the files of the runs: READMEs, docs/claims.md, docs/reliability.md
	$(BIN)/python benchmarks/report.py $(ARGS)
	$(BIN)/python tests/faults/report.py

docs: setup  ## the site of docs/, in build/docs (a warning is an error)
	@$(BIN)/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || $(PIP) install -c constraints.txt -e '.[docs]'
	$(OFFLINE) $(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs $(ARGS)
	@echo "docs: build/docs/index.html"

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# torch first, and by itself: whatever is asked for later is satisfied with it and does not bring another build.
# constraints.txt does not name torch, so that it holds on a machine with a GPU too.
$(STAMP): pyproject.toml constraints.txt
	@$(find_python); \
	if [[ ! -x $(BIN)/python ]] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  rm -rf $(VENV); \
	  echo "setup: $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv $(VENV) || { rm -rf $(VENV); $(explain_venv); exit 1; }; \
	fi
	@rm -f $(VENV)/.setup-*
	@if nvidia-smi >/dev/null 2>&1; then torch='torch>=2.10'; else torch='$(TORCH_CPU)'; fi; \
	echo "setup: installing $$torch, then the rest (a few minutes the first time)"; \
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$torch"
	@$(PIP) install -c constraints.txt -e '.[demo,dev]'
	@touch $@
	@echo "setup: done"

# Starts each candidate: a name on PATH may be a shim that leads nowhere.
define find_python
python=''; for each in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
  if "$$each" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; \
  then python="$$each"; break; fi; \
done; \
if [[ -z "$$python" ]]; then \
  echo "setup: no Python 3.11, 3.12 or 3.13 found$(if $(PYTHON), (PYTHON=$(PYTHON)))." \
    "On Debian or Ubuntu: apt-get install python3.11 python3.11-venv; or name one: make PYTHON=/path/to/python" >&2; \
  exit 1; \
fi
endef

define explain_venv
v=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
echo "setup: $$python cannot make a virtual environment." \
  "On Debian or Ubuntu its venv module is a package of its own: apt-get install python$$v-venv" >&2
endef
