# Two commands do all on a fresh machine with Python 3.11 or later: 'make demo' and 'make test'.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint unit floor other-stores pictures transcript gpu-evidence cloud-evidence cloud-constraints constraints
.PHONY: clean

# A real run with no cluster, no S3 and no GPU: scikit-learn's digits on two processes, then the table.
demo: $(VENV)/installed
	$(BIN)/rsb-cluster submit --recipe digits --job local --wait
	$(BIN)/rsb-cluster collect

# All there is to check; the real Slurm and S3 servers are installed (as root) and started by the tests themselves.
test: $(VENV)/installed-test
	bash tests/setup.sh || test -z "$$RSB_REQUIRE"
	$(MAKE) lint
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder --durations 25

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The unit tests that need no server, in some four minutes on two cores.
unit: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not slurm and not s3 and not long" -n 2 --dist loadfile --no-loadscope-reorder tests/unit

# What holds on GPUs, on all of this machine, in parts of less than ten minutes each (GPU_EVIDENCE="lamb saving": some of
# them), with a table at the end. Without a GPU the code is tried on the CPU, and the exit code is not 0.
GPU_EVIDENCE ?=
gpu-evidence: $(VENV)/installed-test
	$(BIN)/python -m tests.gpu.evidence $(GPU_EVIDENCE)

# The README's pictures, of a real run: some two minutes on two cores, and Chromium.
pictures: $(VENV)/installed-test
	$(BIN)/python -m tests.pictures

# docs/transcript.md: README and tutorial as a new user types them, in a clone and an empty environment; some ten minutes.
transcript: $(VENV)/installed-test
	bash tests/setup.sh
	$(BIN)/python -m tests.transcript

# Runs on the real SkyPilot, offline: spot machines of an EC2 that boots hosts here, and a Slurm by ssh. As root, on
# Debian 12; 14 GB and some ten minutes to set up once, half an hour to run. All that is installed has the version that
# tests/cloud/constraints.txt names, and each run begins with the proof that nodes can install it without a network.
CLOUD_LAB ?= $(HOME)/.cache/rsb-cluster/cloud-lab
cloud-evidence: $(VENV)/installed-test
	bash tests/setup.sh
	bash tests/cloud/setup.sh $(CLOUD_LAB)
	$(CLOUD_LAB)/venv/bin/python tests/cloud/prove.py $(CLOUD_LAB)
	$(CLOUD_LAB)/venv/bin/python -m pytest -m long tests/cloud -s

# Resolve what the lab installs anew: renew the list only with a 'make cloud-evidence' that passes.
LAB_LIST := tests/cloud/constraints.txt
cloud-constraints: $(VENV)/installed-test
	{ echo "# All that the cloud lab installs, on this machine and on its nodes; 'make cloud-constraints' writes this file."; \
	  $(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
	    --no-emit-find-links tests/cloud/requirements.in pyproject.toml --group test; } >$(LAB_LIST).new
	mv $(LAB_LIST).new $(LAB_LIST)

# The versions that all tests have passed with, for 'make demo' and 'make test' and for 'pip install -c'; renew them after
# a 'make test' of newer ones (rm -rf .venv; make test CONSTRAINTS=) has passed.
CONSTRAINTS ?= --constraints constraints.txt
constraints: $(VENV)/installed-test
	{ echo "# Versions with which all tests have passed; 'make constraints' writes this file."; \
	  $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -vE '^(pip|uv|setuptools)=='; } >$@.txt.new
	mv $@.txt.new $@.txt

# The oldest torch, torchvision and timm that pyproject.toml allows, in an environment of their own: the tests of training.
FLOOR := .venv-floor
OLDEST := $(shell sed -nE 's/^ *"(torch|torchvision|timm)>=([0-9.]+).*/\1==\2.*/p' pyproject.toml)
floor: $(VENV)/installed-test
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(FLOOR)
	$(BIN)/uv pip install --quiet --python $(FLOOR)/bin/python --editable . --group test $(foreach v,$(OLDEST),'$(v)')
	$(FLOOR)/bin/python -m pytest -m "not slurm and not s3 and not long" -n 2 --dist loadfile --no-loadscope-reorder tests/unit/train

# Data in the buckets of Azure and Google, which emulators hold (npm fetches one of them), in an environment of their own.
STORES := .venv-stores
other-stores: $(VENV)/installed-test
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(STORES)
	$(BIN)/uv pip install --quiet --python $(STORES)/bin/python $(CONSTRAINTS) --editable . --group test \
	  adlfs==2026.8.0 gcsfs==2026.10.1 gcp-storage-emulator==2026.7.19
	npm install --silent --no-save --prefix $(STORES) azurite@3.35.0
	PATH="$(CURDIR)/$(STORES)/bin:$(CURDIR)/$(STORES)/node_modules/.bin:$$PATH" RSB_REQUIRE=az,gs \
	  $(STORES)/bin/python -m pytest -m long tests/integration/test_other_stores.py

clean:
	rm -rf $(VENV) $(FLOOR) $(STORES) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist

$(VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv

$(VENV)/installed: $(VENV)/bin/uv pyproject.toml constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(CONSTRAINTS) --editable . --group test
	@touch $@
