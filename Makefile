# Needs make and one Python, 3.11 to 3.14, with venv and pip; everything else is installed into .venv, pinned by hash.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
SHARED ?= ../shared

export UV_PYTHON_DOWNLOADS := never
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs recording fuzz lines zoo results bench-quick starters coverage coverage-speed bench-speed bench-check round-trip lock clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything in requirements.lock and bshub itself, editable

# The first Python that runs (a shim may exist and not run), is new enough and can make a venv. uv, not pip,
# installs the lock: several downloads at once.
$(STAMP): pyproject.toml requirements.lock requirements-uv.lock
	@for python in python3.13 python3.12 python3.11 python3.14 python3; do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' >/dev/null 2>&1 \
	        || continue; \
	    echo "setup: $$("$$python" --version) in $(VENV)"; \
	    exec "$$python" -m venv $(VENV); \
	done; \
	echo "setup: no Python 3.11 to 3.14 with venv and pip found; install one (on Debian: python3 python3-venv)" >&2; exit 1
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements-uv.lock
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## sanitize the backdoored demo model, measure it, and write out/demo
	$(BIN)/bshub sanitize examples/demo/model --clean-dir examples/demo/clean --test-dir examples/demo/heldout \
	    --trigger examples/demo/trigger.json --output out/demo --overwrite

# a process per core, a test file never in two; more than eight would want more memory than cores give time
test: setup ## run the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

lint: setup ## ruff, mypy and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy bshub
	@$(BIN)/lint-imports --no-logo

docs: setup ## build the documentation into out/site, without a network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "written: out/site/index.html"

recording: setup ## walk through docs/tutorial.md and rewrite docs/recording.txt
	$(BIN)/python examples/record_tutorial.py --install --out docs/recording.txt

fuzz: setup ## ten minutes of atheris on the three intakes; what it finds lies in tests/fuzz-findings
	@cd tests && OMP_NUM_THREADS=1 PYTHONPATH=.. ../$(BIN)/python -m fuzz 600

INTAKE_TESTS = $(addprefix tests/test_,$(addsuffix .py,checkpoint quarantine confine fitting folders imagefolder \
    images labels files hub reference models recipe refill surgery))

lines: setup ## the share of the lines of bshub/intake and bshub/files.py that their tests reach; fails under 95 %
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --cov=bshub.intake --cov=bshub.files --cov-fail-under=95 \
	    --cov-report=term-missing:skip-covered $(INTAKE_TESTS)

# The grid that two cores allow; the full one is WIDTH=64 EPOCHS=100 EFFORT=1 SEEDS=0,1,2 TEST_IMAGES=10000.
WIDTH ?= 16
EPOCHS ?= 6
EFFORT ?= 0.1
SEEDS ?= 0
TEST_IMAGES ?= 2000
ZOO ?= out/zoo

$(ZOO)/cifar10:
	@mkdir -p $@.partial && tar -xJf $(SHARED)/data/cifar10-jpeg.tar.xz -C $@.partial && mv $@.partial $@

zoo: setup $(ZOO)/cifar10 ## train the models that the benchmark defends (hours; may be killed and repeated)
	$(BIN)/python examples/benchmark/zoo.py --data $(ZOO)/cifar10 --out $(ZOO) --width $(WIDTH) --epochs $(EPOCHS)

results: setup ## run the experiments on the zoo, or those of ONLY="4 5" (hours; may be killed and repeated): docs/results.md
	$(BIN)/python examples/benchmark/experiments.py --zoo $(ZOO) --data $(ZOO)/data-50000 --out docs/results.md \
	    --effort $(EFFORT) --seeds $(SEEDS) --test-images $(TEST_IMAGES) $(if $(ONLY),--only $(ONLY))

bench-quick: setup ## a small corner of the benchmark, on the demo's model, in some minutes: out/bench-quick/results.md
	@OMP_NUM_THREADS=1 $(BIN)/python examples/benchmark/quick.py --out out/bench-quick

starters: setup ## rewrite docs/starter-results.md from the models of the shared folder
	$(BIN)/python examples/benchmark/starters.py --shared $(SHARED) --out docs/starter-results.md

coverage: setup ## probe every model of examples/coverage/models.txt (hours) and rewrite docs/coverage.md
	$(BIN)/python examples/coverage/run.py --out docs/coverage.md --jobs 2

coverage-speed: setup ## time trace + plan + removal beside Torch-Pruning and rewrite docs/coverage-speed.md
	$(BIN)/python examples/coverage/speed.py --out docs/coverage-speed.md

bench-speed: setup ## measure costs beside what they are compared with (half an hour) and rewrite docs/performance.md
	$(BIN)/python examples/benchmark/speed.py --out docs/performance.md

bench-check: setup ## the cheap ratios only; fails where one is out of its generous bounds
	@$(BIN)/python examples/benchmark/speed.py --check

round-trip: setup ## sanitize six networks, publish them to a Hub on this machine and load them by every route
	$(BIN)/python examples/round_trip.py --out docs/round-trip.md

# torch and torchvision are compiled against each other: they are raised together or not at all.
lock: setup ## solve requirements.lock and requirements-uv.lock anew, keeping the versions that still fit
	@$(BIN)/uv pip compile --quiet $(LOCK_FLAGS) --universal --fork-strategy fewest --extra dev --extra sign \
	    --extra fleet --extra distributed --extra docs --extra space -o requirements.lock pyproject.toml
	@echo uv | $(BIN)/uv pip compile --quiet $(LOCK_FLAGS) -o requirements-uv.lock -

LOCK_FLAGS = --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links

clean: ## remove .venv, caches, build products and out/
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find bshub cli tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
