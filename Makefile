PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo teachers tuning tables faults test lint clean

# Extras of setup.cfg for the tests; with test,benchmark,ray they also compare with PyTorch and run a cluster of Ray.
EXTRAS ?= test
COMMA := ,
TESTED := .venv/stamp-$(subst $(COMMA),-,$(EXTRAS))

# A stamp for what running needs and one for what testing needs: a changed list installs again, an unchanged one costs nothing.
.venv/stamp: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(TESTED): .venv/stamp
	$(BIN)/pip install -q --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

setup: .venv/stamp

# A teacher on the embedded digits, six methods at 5 and 10 images per class with 3 seeds, a table and a plot.
demo: setup
	$(BIN)/python launch/train_teacher.py --preset digits --workdir demo/teacher
	$(BIN)/python launch/sweep.py --preset digits --teacher demo/teacher --n-per-class 5 10 --seeds 0 1 2 --workers 2 --workdir demo/runs --results demo/results
	$(BIN)/python launch/report.py --results demo/results

# The teachers that results/teachers holds: hours on two CPU cores. These and the next two need TFDS_DATA_DIR; killed, they go on where they were.
TEACHERS := fashion_mnist cifar10
teachers: $(TEACHERS:%=results/teachers/%)

results/teachers/%: | setup
	$(BIN)/python launch/train_teacher.py --preset $* --workdir runs/$*-teacher
	$(BIN)/python launch/compact.py --run runs/$*-teacher --out $@

# What results/ holds of real data: the options, chosen on validation images, and the tables. Many hours on two CPU cores, so that what
# results/ has is not run again; to measure it anew, empty results/ first.
WORKERS ?= 2
tuning tables: setup
	$(BIN)/python launch/sweep.py --grid launch/grids/$@.toml --skip-published True --workers $(WORKERS)
	$(BIN)/python launch/report.py

# Real runs, killed and damaged in every way, and the report of what came of it: most of an hour. Killed, it goes on where it was.
faults: $(TESTED)
	$(BIN)/python tests/faults/report.py --out results/reliability.md

# Notebooks by themselves: as files of one long test, xdist would leave them for the end. The tests in the order of their files' names for the
# same reason: the longest tests are in faults/ and in the middle.
test: lint
	$(BIN)/python -m pytest -q -n 2 --nbmake --nbmake-timeout=900 notebooks
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=25 tests

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf demo .venv
