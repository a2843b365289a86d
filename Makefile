# Portwright's targets. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
# An image that sets this makes each start of the daemon compile its modules anew, which takes longer than the rest.
unexport PYTHONDONTWRITEBYTECODE
MULTIARCH := $(shell gcc -print-multiarch 2>/dev/null)

# --- what is compiled -------------------------------------------------------------------------
DATAPLANE := src/portwright/dataplane
BPF_SOURCES := $(wildcard $(DATAPLANE)/*.bpf.c)
BPF_HEADERS := $(wildcard $(DATAPLANE)/*.h)
BPF_OBJECTS := $(BPF_SOURCES:.c=.o) $(DATAPLANE)/abi.bpf.o
BPF_CFLAGS := -O2 -g -target bpf -mcpu=v3 -fms-extensions -Wno-microsoft-anon-tag -Wall -Werror -I $(DATAPLANE) -I /usr/include/$(MULTIARCH)

SHIM := src/portwright/cni/shim/portwright-cni
# Static, so that it starts in a sandbox's or an installer's root with no libc, and in half the time.
SHIM_CFLAGS := -O2 -g -std=gnu11 -Wall -Wextra -Werror -static
# In a guest's initramfs, which has no libc either. No debugging information: each guest would load it.
PWROUTE := src/portwright/vmm/guest/pwroute

C_FILES = $(shell find src tests bench -name '*.[ch]' -not -name '*.skel.h' 2>/dev/null)
# mypy takes a folder without Python in it for a mistake.
PY_DIRS := src tests lab demo prove $(if $(wildcard bench/*.py),bench)

.PHONY: help setup build demo test lint bench prove lab clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## packages, .venv, BPF objects, CNI shim; quick when there is nothing to do
	@packaging/setup.sh

build: $(BPF_OBJECTS) $(SHIM) $(PWROUTE) ## BPF objects, the CNI shim, what sets up guests

$(DATAPLANE)/%.bpf.o: $(DATAPLANE)/%.bpf.c $(BPF_HEADERS) Makefile
	clang $(BPF_CFLAGS) -c $< -o $@

# Never loaded: a variable of every type of abi.h, so that its BTF has all of them, for generate.py; and the sizes asserted.
$(DATAPLANE)/abi.bpf.o: $(DATAPLANE)/abi.h Makefile
	{ echo '#include "abi.h"'; \
	  sed -n 's|^struct \(pw_[a-z0-9_]*\) { /\* \([0-9]*\) bytes \*/$$|_Static_assert(sizeof(struct \1) == \2, "\1");|p' $<; \
	  echo 'struct {'; \
	  sed -n 's/^\(enum\|struct\) \(pw_[a-z0-9_]*\) {.*$$/\1 \2 \2;/p' $<; echo '} pw_types;'; } \
	  | clang $(BPF_CFLAGS) -x c -c - -o $@

$(SHIM): $(SHIM).c Makefile
	gcc $(SHIM_CFLAGS) $< -o $@

$(PWROUTE): $(PWROUTE).c Makefile
	gcc $(SHIM_CFLAGS) -s $< -o $@

demo: setup ## the first few minutes, on this machine, cleaned up at the end
	@demo/demo.sh

# --- what is checked --------------------------------------------------------------------------
# Workers share the files; then, one by one, comes what would have no verdict beside others. With ARGS it is one session
# and no workers: what was named is sooner there, and -s and --pdb work.
WORKERS := 2

test: setup ## unit, netns, containers, conformance and fault tests on this kernel (ARGS= for pytest, WORKERS=)
ifdef ARGS
	$(PYTHON) -m pytest -m "not lab" $(ARGS)
else
	$(PYTHON) -m pytest -m "not lab and not alone" -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(PYTHON) -m pytest -m "alone and not lab"
endif

lint: setup ## ruff, mypy --strict, clang-format
	.venv/bin/ruff check $(PY_DIRS)
	.venv/bin/ruff format --check $(PY_DIRS)
	.venv/bin/mypy $(PY_DIRS)
	clang-format --dry-run -Werror $(C_FILES)

# One command, one test, one kernel: make lab KERNEL=6.1 TEST=tests/netns/test_x.py::test_y
lab: ## the netns tests under other kernels (KERNEL=6.1, TEST=path::name, LIMIT=seconds, ARGS= for pytest)
	@packaging/setup.sh lab
	@$(PYTHON) -m lab $(if $(LIMIT),--limit $(LIMIT)) $(foreach k,$(KERNEL),--kernel $k) $(foreach t,$(TEST),$t) $(if $(ARGS),-- $(ARGS))

bench: setup ## the figures of the docs (PART= for one of them)
	$(PYTHON) -m bench $(or $(PART),--doc)

prove: setup ## PART=port, policy or microvm: one PASS or FAIL line for each claim, with its figure
	@$(PYTHON) -m prove $(or $(PART),$(error name a part: make prove PART=port))

clean: ## everything that was made here, but not .venv
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(BPF_OBJECTS) $(SHIM) $(PWROUTE)
	find src tests bench lab demo prove -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
