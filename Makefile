# One place for what people, hooks and CI call. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PERF_ANALYZER := $(VENV)/perf_analyzer
KSERVE := $(VENV)/kserve
RESULTS ?= results
TEST_WORKERS ?= 0
FUZZ_S ?= 60
FUZZ_TARGETS ?= $(notdir $(wildcard tests/fuzz/corpus/*))

.PHONY: help bench test soak fuzz conformance check format proto clean
help:
	@echo "make bench   set up, serve photographs with a published design and with the lanes, measure both, show the labels"
	@echo "make test    set up and run all tests"
	@echo "make soak    a million small requests on the CPU, every answer checked, memory watched"
	@echo "make fuzz    fuzz what reads clients' bytes, FUZZ_S seconds for each target, with a corpus that is kept in .fuzz"
	@echo "make conformance  NVIDIA's perf_analyzer against the server, over HTTP, gRPC and shared memory"
	@echo "make check   formatting, lint, types, import contracts"
	@echo "make format  rewrite the source in the project's format"
	@echo "make proto   rewrite what is made from the gRPC protocol's .proto file"
	@echo "make clean   remove $(VENV) and caches (results stay)"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Headrace needs Python 3.11 to 3.13, and $(PYTHON) is " + sys.version.split()[0] + ": say make PYTHON=python3.11")'
	@echo "Setting up $(VENV) (PyTorch is large: minutes on a first run)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

bench: $(READY)
	@$(BIN)/headrace bench --output-dir $(RESULTS)/bench-published --overwrite $(BENCH_OPTIONS)
	@$(BIN)/headrace bench --design lanes --output-dir $(RESULTS)/bench-lanes --overwrite $(BENCH_OPTIONS)
	@$(BIN)/headrace classify --design lanes

# The manifests are checked against the models in KServe's package. They are only read, so nothing that it needs is
# installed: an older psutil than ours, and all of a server.
$(KSERVE)/.ready: | $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade --target $(KSERVE) \
		kserve==0.21.0
	@touch $@

# The bytecode is made first: where PYTHONDONTWRITEBYTECODE is set, each of the tests' many processes would compile all
# that it imports anew. TEST_WORKERS=2 shares the files out to two processes, which is faster; but some tests measure, and
# are disturbed by others beside them.
test: $(READY) $(KSERVE)/.ready
	@$(BIN)/python -m compileall -q src
	@$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

soak: $(READY)
	@SOAK_REQUESTS=1000000 $(BIN)/python -m pytest tests/soak $(PYTEST_OPTIONS)

fuzz: $(READY)
	@for target in $(FUZZ_TARGETS); do \
		$(BIN)/python -m tests.fuzz $$target -max_total_time=$(FUZZ_S) -timeout=10 -rss_limit_mb=1024 -max_len=16384 \
			-artifact_prefix=.fuzz/$$target- .fuzz/$$target || exit 1; \
	done

# A folder of its own, since the tests use a newer tritonclient. Of the wheels that bring perf_analyzer this one runs with
# glibc 2.36; PyPI's package perf-analyzer is empty where its real wheels, for glibc 2.38, do not fit.
$(PERF_ANALYZER)/.ready: | $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PERF_ANALYZER) \
		tritonclient==2.48.0 nvidia-cuda-runtime-cu12==12.9.79
	@touch $@

conformance: $(PERF_ANALYZER)/.ready
	@$(BIN)/python -m tests.conformance $(PERF_ANALYZER)

check: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

proto: $(READY)
	@$(BIN)/python -m grpc_tools.protoc -I src/headrace/wire/grpc --descriptor_set_out=src/headrace/wire/grpc/inference.binpb \
		--pyi_out=src/headrace/wire/grpc inference.proto

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
