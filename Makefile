# Two commands do all the set-up: `make quickstart` and `make test`. Both make .venv themselves when it is missing or stale.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help quickstart test soak setup lint schema emoji-check clean

help:
	@echo "make quickstart   pack real image-text pairs, train a small vision-language model, report (about 5 minutes on 2 cores)"
	@echo "make test         lint, types, wheel, tests (about 15 minutes on 2 cores)"
	@echo "make soak         packing killed 50 times, 5,000 damaged shards, training killed 36 times (about 12 minutes on 2 cores)"
	@echo "make setup        only make .venv (about 3 minutes and 6 GB, mostly PyTorch)"
	@echo "make lint         ruff and mypy"
	@echo "make schema       write configs/schema.json anew"
	@echo "make emoji-check  rebuild the shipped data set from its Debian packages and compare"
	@echo "make clean        remove what these made, .venv and your runs apart"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or run make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON): about 3 minutes and 6 GB on disk, most of it PyTorch"
	@$(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) cannot make a venv: install the venv module (Debian: python3-venv)"; exit 2; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)
	@echo "done: $(BIN)/mm is the command, $(BIN)/mm doctor looks at the set-up"

quickstart: $(READY)
	@echo "quickstart: packing, training and evaluating take about 5 minutes on 2 cores; Ctrl-C saves, and the same command goes on"
	@$(BIN)/mm train configs/quickstart.yaml --resume
	@$(BIN)/mm report runs/quickstart

test: $(READY) lint
	@echo "wheel: built, and imported outside the checkout"
	@$(BIN)/python tests/check_wheel.py
	@echo "tests: about 14 minutes on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

soak: $(READY)
	@MM_SOAK_KILLS=50 MM_SOAK_MUTATIONS=5000 $(BIN)/python -m pytest tests/data/test_write.py tests/data/test_hostile.py
	@MM_SOAK_KILLS=30 $(BIN)/python -m pytest -s tests/train/test_soak.py

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

schema: $(READY)
	@$(BIN)/mm config --schema > configs/schema.json

emoji-check: $(READY)
	@$(BIN)/python -m mm.data.builtin.build_emoji --check mm/data/builtin/emoji

clean:
	@rm -rf runs/quickstart build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
