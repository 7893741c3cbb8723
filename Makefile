# Everything installs what it needs into .venv; `make demo` and `make test` are all a newcomer runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
KITS := workspaces/federation

.PHONY: demo up console down test test-frameworks faults faults-long soak check bench reproduce docs transcripts protos clean

demo: $(VENV)/core.stamp          ## provision, start, train on four hospitals, show, stop
	@$(BIN)/python -m workspaces.federation demo

up: $(VENV)/core.stamp            ## start the demo federation and leave it running
	@$(BIN)/python -m workspaces.federation up

console: $(VENV)/core.stamp       ## open the console on it
	@$(BIN)/python -m workspaces.federation console

down: $(VENV)/core.stamp          ## stop it
	@$(BIN)/python -m workspaces.federation down

test: check                       ## all checks and tests that need no ML framework
	@sh tools/install-test-tools.sh
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not torch and not tensorflow and not sklearn"

test-frameworks: $(VENV)/frameworks.stamp   ## the rest, on CPU builds of PyTorch and TensorFlow
	@$(BIN)/python -m pytest -q -m "torch or tensorflow or sklearn"

faults: $(VENV)/dev.stamp         ## real processes killed, stopped, cut off; part of make test
	@$(BIN)/python -m tests.faults quick

faults-long: $(VENV)/dev.stamp    ## every call that makes something durable, many seeds
	@$(BIN)/python -m tests.faults long

MINUTES ?= 10
soak: $(VENV)/dev.stamp           ## a fault every five seconds for MINUTES; nothing may grow
	@$(BIN)/python -m tests.faults soak --minutes $(MINUTES)

check: $(VENV)/dev.stamp          ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(VENV)/core.stamp         ## this machine's limits beside ours, as ratios
	@$(BIN)/python -m benchmarks

reproduce: $(VENV)/core.stamp     ## the published FedAvg figures, on the platform
	@$(BIN)/python -m workspaces.reproduce

docs: $(VENV)/core.stamp          ## write the command reference and the table of permissions anew
	@$(BIN)/python -m tools.commands

transcripts: $(VENV)/dev.stamp    ## record the console's transcripts anew, and show what differs
	@$(BIN)/python -m tests.scenarios.console.record
	@git --no-pager diff --stat -- tests/scenarios/console/transcripts

protos:                           ## generate the protobuf code anew, with the pinned generator
	@$(PYTHON) tools/protos.py

clean:                            ## stop the demo, remove everything installed or generated
	@test ! -d $(KITS) || test ! -x $(BIN)/python || $(BIN)/python -m workspaces.federation down
	rm -rf $(VENV) $(KITS) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/core.stamp: setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing flplatform into $(VENV) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	@echo "installing the development tools ..."
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/frameworks.stamp: $(VENV)/dev.stamp
	@echo "installing CPU builds of PyTorch and TensorFlow, and scikit-learn ..."
	@sh tools/install-frameworks.sh $(BIN)/python
	@touch $@
