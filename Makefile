# Two commands do all on a fresh machine with Python 3.11 or later: 'make demo' and 'make test'.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint unit cloud-evidence constraints clean

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

# Runs on the real SkyPilot, offline: spot machines of an EC2 that boots hosts here, and a Slurm by ssh. As root, on
# Debian 12; 14 GB and some ten minutes to set up once, half an hour to run.
CLOUD_LAB ?= $(HOME)/.cache/rsb-cluster/cloud-lab
cloud-evidence: $(VENV)/installed-test
	bash tests/setup.sh
	bash tests/cloud/setup.sh $(CLOUD_LAB)
	$(CLOUD_LAB)/venv/bin/python -m pytest -m long tests/cloud -s

# The versions that all tests have passed with, for 'make demo' and 'make test' and for 'pip install -c'; renew them after
# a 'make test' of newer ones (rm -rf .venv; make test CONSTRAINTS=) has passed.
CONSTRAINTS ?= --constraints constraints.txt
constraints: $(VENV)/installed-test
	{ echo "# Versions with which all tests have passed; 'make constraints' writes this file."; \
	  $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep -vE '^(pip|uv|setuptools)=='; } >$@.txt.new
	mv $@.txt.new $@.txt

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist

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
