"""A grid file says what command lines say, in its order, and what it cannot say is refused with its place in the file."""

import collections
import itertools
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import cases, damaged, in_place_of_a_file, outcome, replace

from wdkd import command_line
from wdkd.config import STUDENTS
from wdkd.errors import UsageError
from wdkd.grid_file import MAX_LINE, read_grid
from wdkd.models import create_model, parameter_count, variable_shapes

OPTIONS = {"preset", "workdir", "results", "teacher", "methods", "n_per_class", "seeds", "vary", "train.steps", "augment.flip"}
EXCLUDED = {"workers", "grid"}
GOOD = """
[default]
teacher = "runs/teacher"
methods = ["ce", "kd"]
train.steps = 300

[[sweep]]
n-per-class = [5, 10]

[[sweep]]
preset = "cifar10"
methods = "kd"
"train.steps" = 3_000
seeds = []
vary = ["method.temperature=1,4"]

[sweep.augment]
flip = true
"""


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_grid(path, OPTIONS, EXCLUDED)


def test_tables_are_command_lines_in_their_order_and_have_what_they_share(tmp_path):
    path = tmp_path / "grid.toml"
    shared = "--teacher runs/teacher --methods ce kd --train.steps 300"
    other = (
        "--teacher runs/teacher --methods kd --train.steps 3000 --preset cifar10 --seeds --vary method.temperature=1,4 --augment.flip True"
    )
    assert read(path, GOOD) == [(f"{path} [[sweep]] 1", f"{shared} --n_per_class 5 10".split()), (f"{path} [[sweep]] 2", other.split())]


def test_numbers_are_written_so_that_they_are_read_as_the_same(tmp_path):
    ((_, words),) = read(tmp_path / "grid.toml", "[[sweep]]\nseeds = [0x10, 1e-3, 0.1, -2, inf]")
    assert [float(word) for word in words[1:]] == [16, 0.001, 0.1, -2, float("inf")]


REFUSED = {
    "no TOML": ("[[sweep]", "is not TOML: "),
    "no text": (b"\xff\xfe[[sweep]]", "is not TOML: it is no UTF-8 text"),
    "nested without end": (f"[[sweep]]\nx = {'[' * 1900}", "is not TOML: it is nested too deeply"),
    "a long line": (f"[[sweep]]\n{'a.' * MAX_LINE}a = 1", f"line 2 has {2 * MAX_LINE + 5:,} characters; at most 2,000 are read: break it"),
    "too large": (b"#\n" * 2**20, "has 2,097,152 bytes; at most 65,536 are read"),
    "nothing": ("", "has 0 [[sweep]] tables; it must have between 1 and 200"),
    "very many": ("[[sweep]]\n" * 201, "has 201 [[sweep]] tables"),
    "one table": ("[sweep]\nseeds = [1]", "'sweep' must be tables, each below a line [[sweep]]"),
    "no table": ("sweep = [1]", "'sweep' must be tables"),
    "no default": ("default = 1\n[[sweep]]", "'default' one below [default]"),
    "options at the top": ("methods = ['ce']\n[[sweep]]", "there is no 'methods'; put options below [[sweep]]"),
    "a near name at the top": ("[[sweeps]]", "there is no 'sweeps'; did you mean 'sweep'? put options"),
    "unknown option": (
        "[[sweep]]\n[[sweep]]\ntrain.stepz = 3",
        "[[sweep]] 2: there is no option 'train.stepz'; did you mean 'train.steps'?",
    ),
    "unknown in default": ("[default]\nsedes = [3]\n[[sweep]]", "[default]: there is no option 'sedes'; did you mean 'seeds'?"),
    "a deeper table": ("[[sweep]]\na.b.c = 3", "[[sweep]] 1: there is no option 'a.b'; options are of the form 'train.steps'"),
    "about the execution": ("[[sweep]]\nworkers = 3", "[[sweep]] 1: workers is given on the command line only"),
    "help": ("[[sweep]]\nhelp = true", "there is no option 'help'; --help lists"),
    "tyro's own": ("[[sweep]]\ntyro-write-completion = ['bash', '/tmp/x']", "there is no option 'tyro-write-completion'"),
    "two spellings": ("[[sweep]]\nn-per-class = 3\nn_per_class = 4", "n_per_class is there twice; keep one"),
    "an option as a value": ("[[sweep]]\nteacher = '--workers'", "teacher is '--workers'; it must not begin with '-'"),
    "a date": ("[[sweep]]\nseeds = [2020-01-01]", "seeds is date; it must be text, a number"),
    "a list in a list": ("[[sweep]]\nseeds = [[1]]", "seeds is list; it must be text, a number"),
    "a table in a list": ("[[sweep]]\nseeds = [{a = 1}]", "seeds is dict; it must be text, a number"),
    "more than 64 bits": (f"[[sweep]]\nseeds = [0x{'f' * 1900}]", "seeds is int; it must be text, a number of 64 bits"),
}


@pytest.mark.parametrize(("content", "line"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_command_line_is_refused(content, line, tmp_path):
    path = tmp_path / "grid.toml"
    with pytest.raises(UsageError) as refused:
        read(path, content)
    text = str(refused.value)
    assert text.startswith(str(path)) and line in text and "\n" not in text and len(text) < 500


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("missing", "does not exist; give a TOML file"),
        (".", "cannot be read: Is a directory"),
        ("pipe", "is no regular"),
    ):
        with pytest.raises(UsageError, match=words):
            read_grid(tmp_path / name, OPTIONS, EXCLUDED)


@cases(150)
@given(st.data())
def test_damaged_files(tmp_path_factory, data):
    """They are read, or refused in a line, within seconds; and no word is an option that is not there."""
    path = Path(tmp_path_factory.mktemp("grids")) / "grid.toml"
    path.write_bytes(data.draw(damaged(GOOD.encode())))
    if data.draw(st.integers(0, 9)) == 0:
        replace(path, data.draw(in_place_of_a_file()))
    found = outcome(read_grid, path, OPTIONS, EXCLUDED)
    if isinstance(found, list):
        assert {word[2:] for _, words in found for word in words if word.startswith("--")} <= OPTIONS


# --- the grids of this repository -----------------------------------------------------------------------------------------

GRIDS = Path(__file__).parents[1] / "launch" / "grids"


@pytest.fixture
def declared(monkeypatch):
    """A function: name of a grid -> its jobs, as launch/sweep.py makes them."""

    def read(name):
        monkeypatch.setattr(sys, "argv", ["launch/sweep.py", "--grid", str(GRIDS / f"{name}.toml")])
        return command_line._declared_jobs(STUDENTS, str(GRIDS / f"{name}.toml"))

    return read


def test_the_tables_have_every_cell_with_the_seeds_that_the_protocol_asks_for(declared):
    jobs = declared("tables")
    cells = collections.Counter((c.data.name, c.augment.name, c.method.name, c.data.n_per_class) for c in (job.config for job in jobs))
    axes = ("cifar10", "fashion_mnist"), ("none", "matching"), ("ce", "kd", "fitnet", "ab", "wdkd", "sobolev"), (50, 100, 500, 1000, None)
    assert cells.keys() == set(itertools.product(*axes))
    assert all(count >= 3 for cell, count in cells.items() if cell[-1] in (50, 100))
    assert {job.config.data.evaluate_on for job in jobs} == {"test"}
    # What makes one table comparable: all that is not the method's own, cell by cell.
    for data, track in itertools.product(*axes[:2]):
        mine = [job.config for job in jobs if (job.config.data.name, job.config.augment.name) == (data, track)]
        assert len({(c.teacher, c.model, c.augment, c.train) for c in mine}) == 1


@pytest.mark.parametrize("name", ["tuning", "worst_case"])
def test_what_is_chosen_by_looks_at_validation_images_alone(name, declared):
    assert {job.config.data.evaluate_on for job in declared(name)} == {"validation"}


@pytest.mark.parametrize(("name", "count"), [("tables", 2), ("long", 3)])
def test_the_students_have_at_most_the_parameters_that_the_protocol_allows(name, count, declared):
    shapes = {"cifar10": (32, 32, 3), "fashion_mnist": (28, 28, 1)}
    students = {(c.data.name, c.model) for c in (job.config for job in declared(name)) if c.data.evaluate_on == "test"}
    assert {data for data, _ in students} == set(shapes) and len(students) == count
    for data, model in students:
        network = create_model(model, classes=10, mean=[0.5] * shapes[data][2], std=[0.25] * shapes[data][2])
        assert parameter_count(variable_shapes(network, shapes[data])["params"]) <= 300_000


def test_a_longer_schedule_has_the_same_budget_in_all_cells(declared):
    budgets = collections.defaultdict(set)
    for job in declared("long"):
        c = job.config
        if c.data.evaluate_on == "test":
            budgets[job.publish, c.augment.name].add((c.optimizer, c.train, c.augment))
    assert [len(found) for found in budgets.values()] == [1, 1, 1, 1, 1, 1]
