# `make train` and `make test` each build .venv, install the package in it and run.
# `make test VENV=` takes the running python3 as it is and installs nothing: for a machine that reaches no registry.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
ARGS ?=

# The oldest Triton that pyproject.toml allows lies beside the newest one and PYTHONPATH chooses; it runs these, and
# compiles one row per axis instead of every rule, and no complex dtypes, which are pairs of real numbers to a kernel.
OLDEST := 3.6.0
OLD_TRITON := $(VENV)/triton-$(OLDEST)
ENGINE := tests/test_numerics.py tests/test_engine.py tests/test_compiled_kernels.py

ifeq ($(VENV),)
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH)
installed =
else
PY := $(VENV)/bin/python
installed = $(VENV)/.installed-$(1)
endif

# Only without a venv may a tool be missing, and then it is named. $(call with,MODULE,COMMAND)
with = if $(PY) -c 'import $(1)' 2>/dev/null; then $(2); else echo 'NOT RUN HERE (1): $(1) is not installed'; fi
pytest = FUSEDOPT_TEST_MODE=$(1) $(PY) -m pytest $$($(PY) -c 'import xdist; print("-n $(JOBS)")' 2>/dev/null || true)
# 5 is pytest's status when no test was selected.
if_any = || [ $$? -eq 5 ]
stage = @echo "== $(1) ($$(date +%T))"

.PHONY: train test lint types test-oldest test-compiled test-interpreted test-long clean

train: $(call installed,cli)
	$(PY) -m fusedopt.cli train $(or $(ARGS),--resume)

# Quick checks first; the largest run last, so that the output ends with what ran and what was NOT RUN HERE.
# Without a GPU `test-compiled` is what compiles off-line; with one it is every test, on the GPU.
test: lint types test-oldest test-compiled test-interpreted

lint: $(call installed,test)
	$(call stage,lint)
	@$(call with,ruff,$(PY) -m ruff check . && $(PY) -m ruff format --check .)

types: $(call installed,test)
	$(call stage,types)
	@$(call with,pyright,$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')")

test-compiled: $(call installed,test)
	$(call stage,compiled tests)
	@$(call pytest,compiled)

test-interpreted: $(call installed,test)
	$(call stage,interpreted and eager tests)
	@$(call pytest,interpreted)

ifeq ($(VENV),)
test-oldest:
	$(call stage,engine on Triton $(OLDEST))
	@echo 'NOT RUN HERE (1): nothing is installed without a venv'
else
test-oldest: $(call installed,test) $(OLD_TRITON)
	$(call stage,engine on Triton $(OLDEST))
	@PYTHONPATH=$(abspath $(OLD_TRITON)) $(call pytest,compiled) $(ENGINE) -k 'not sm_90_rules' $(if_any)
	@PYTHONPATH=$(abspath $(OLD_TRITON)) $(call pytest,interpreted) $(ENGINE) -k 'not complex'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# -qq: pip names every registry it cannot find a package on; errors still show.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo 'installing fusedopt[$*] into $(VENV) (minutes the first time)'
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

$(OLD_TRITON): | $(VENV)/bin/python
	@rm -rf $@.part
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target $@.part triton==$(OLDEST)
	@mv $@.part $@
endif

test-long: $(call installed,test)
	$(call stage,long tests)
	@$(call pytest,compiled) --long $(if_any)
	@$(call pytest,interpreted) --long $(if_any)

clean:
	rm -rf .venv build dist *.egg-info
