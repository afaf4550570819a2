"""Generated hostile input, and what must hold of it: a valid value or one line, in seconds, and no file harmed.

Whole runs and checkpoints are not here, and nothing is compiled.
"""

import json
import shutil

import numpy as np
import pytest
from conftest import edit
from hypothesis import given
from hypothesis import strategies as st
from mutations import cases, damaged, hostile_json, in_place_of_a_file, mutated, nothing_changes, outcome, replace
from test_config import OPTIONS
from test_report import make_evaluation, make_result
from tiny_set import prepare_tiny, tiny_images

from wdkd import command_line, parsing
from wdkd.arrays import map_array, read_array
from wdkd.cache import temporary_beside
from wdkd.config import STUDENTS, Config, DataConfig, from_dict, to_dict
from wdkd.data import Dataset, load_dataset
from wdkd.files import write_json
from wdkd.models import create_model
from wdkd.recording import DAMAGED, read_files, write_files
from wdkd.report import main_report
from wdkd.result import Result, read_result, results_path
from wdkd.run_directory import Input, Run, describe_run, read_run, start
from wdkd.teacher_cache import DTYPES, Contents

# --- options ------------------------------------------------------------------------------------------------------------

VALUES = ["", "-1", "0", "nan", "inf", "1e400", "9" * 5000, "None", "none", "True", "{}", "[]"]
VALUES += ["../../x", "a\nb", "\x1b[2J", "\udcff", "x" * 5000]


@st.composite
def command_lines(draw):
    """Options, most of which are there, with values, most of which are not right."""
    arguments = ["--workdir", "w"]
    names = st.sampled_from([f"--{path.replace('_', '-')}" for path in OPTIONS] + ["--preset", "--processes", "--nothing", "---", "plain"])
    for _ in range(draw(st.integers(1, 4))):
        arguments.append(draw(names))
        text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
        values = st.sampled_from(VALUES) | text | st.integers().map(str) | st.floats().map(str)
        arguments += draw(st.lists(values.filter(lambda value: not value.startswith("-h")), min_size=1, max_size=1))
    return arguments


@cases(60)
@given(command_lines())
def test_command_lines(argv):
    default = command_line.TrainArguments(workdir="w", config=STUDENTS["digits"], preset="digits")
    parsed = outcome(parsing.parse, command_line.TrainArguments, argv, description=None, default=default)
    if isinstance(parsed, command_line.TrainArguments):
        checked(parsed.config)


def checked(config):
    """A config that passes its check can be made a network of, or the network is refused."""
    if isinstance(outcome(config.check), Config):
        outcome(create_model, config.model, classes=10, mean=[0.5] * 3, std=[0.5] * 3)


@cases(100)
@given(mutated(to_dict(Config())))
def test_configs(values):
    config = outcome(from_dict, Config, values)
    if isinstance(config, Config):
        checked(config)


@cases(100)
@given(st.sampled_from(sorted(OPTIONS)), st.integers() | st.floats() | st.text(max_size=200))
def test_options_out_of_range(path, value):
    """Set by a library's user, whose types nobody checks, but who means a number where there is one."""
    hint = OPTIONS[path]
    if (type(value) is str) == (hint in (str, str | None)):
        outcome(edit(Config(), {path: value}).check)


# --- a run's JSON files -------------------------------------------------------------------------------------------------

SUBSET = {"sha256": "ab" * 32, "images": "cd" * 32, "indices": list(range(50))}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(parent, directory, run) of a run that was started."""
    parent = tmp_path_factory.mktemp("begun")
    run = describe_run(Config(), Input([str(i) for i in range(10)], [8, 8, 1], [0.5], [0.5]))
    (parent / "run").mkdir()
    start(parent / "run", run, SUBSET)
    (parent / "sentinel").write_text("")
    return parent, parent / "run", run


@cases(100)
@given(st.data())
def test_the_config_and_the_subset_of_a_run(begun, data):
    parent, directory, run = begun
    path = directory / data.draw(st.sampled_from(["config.json", "subset.json"]))
    good = path.read_bytes()
    path.write_bytes(data.draw(hostile_json(json.loads(good))))
    with nothing_changes(parent):
        found = outcome(read_run, directory)
        assert isinstance(found, Run | str)
        outcome(start, directory, run, SUBSET)
    path.write_bytes(good)


RESULT = to_dict(make_result(evaluation=make_evaluation(0.8, classes=3, count=300)))


@cases(100)
@given(hostile_json(RESULT))
def test_results(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("results")
    path = folder / "root" / "fashion_mnist" / "plain" / "kd" / "n50" / "seed0.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with nothing_changes(folder):
        result = outcome(read_result, path)
        if isinstance(result, Result):
            outcome(results_path, folder / "root", result)
            assert results_path(folder / "root", result).resolve().is_relative_to(folder / "root")
    with nothing_changes(folder, *(folder / "root" / "fashion_mnist" / f"plain.{end}" for end in ("md", "csv", "png"))):
        outcome(main_report, folder / "root")
    shutil.rmtree(folder)


@cases(20)
@given(in_place_of_a_file())
def test_what_is_no_file(tmp_path_factory, make):
    folder = tmp_path_factory.mktemp("odd")
    write_json(folder / "result.json", RESULT)
    replace(folder / "result.json", make)
    with nothing_changes(folder):
        assert isinstance(outcome(read_result, folder / "result.json"), str)
    shutil.rmtree(folder)


# --- caches -------------------------------------------------------------------------------------------------------------

ARRAY = np.arange(60, dtype=np.int32).reshape(5, 12)


@cases(100)
@given(st.data())
def test_arrays(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("arrays") / "a.npy"
    np.save(path, ARRAY)
    good = path.read_bytes()
    path.write_bytes(data.draw(damaged(good)))
    with nothing_changes(path.parent):
        for read in (read_array, map_array):
            try:
                found = read(path, ARRAY.shape, ARRAY.dtype)
            except (ValueError, OSError):
                continue
            assert found.shape == ARRAY.shape and found.dtype == ARRAY.dtype and path.read_bytes()[:128] == good[:128]
    shutil.rmtree(path.parent)


HOLDS = Contents(6, {"logits": (10,), "jacobian": (10, 2, 2, 1)}, {"logits": DTYPES["float32"], "jacobian": DTYPES["bfloat16"]})
DESCRIBED = {"teacher": ["a", "b"], "arrays": {"logits": [6, 10, "float32"]}}


def chunks():
    draw = np.random.default_rng(0)
    for _ in range(2):
        yield {name: draw.normal(size=(3, *shape)).astype(HOLDS.dtypes[name]) for name, shape in HOLDS.shapes.items()}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The folder of a recorded teacher of made-up numbers."""
    final = tmp_path_factory.mktemp("record") / "kept"
    with temporary_beside(final) as temporary:
        write_files(temporary, DESCRIBED, HOLDS, chunks())
        temporary.rename(final)
    return final


@cases(100)
@given(st.data())
def test_recorded_teachers(record, tmp_path_factory, data):
    """They are read as they were written, or `record_teacher` makes them again."""
    folder = tmp_path_factory.mktemp("copy") / "record"
    shutil.copytree(record, folder)
    spoil(folder / data.draw(st.sampled_from(["logits.npy", "jacobian.npy", "description.json"])), data)
    with nothing_changes(folder.parent):
        try:
            found = read_files(folder, DESCRIBED, HOLDS)
        except DAMAGED:
            found = None
    if found is not None:
        good = read_files(record, DESCRIBED, HOLDS)
        assert all(np.array_equal(found[name].view(np.uint8), good[name].view(np.uint8)) for name in HOLDS.shapes)
    shutil.rmtree(folder.parent)


def spoil(path, data):
    """Damages a file as bytes, as JSON where it is, or puts something else in its place."""
    kind = data.draw(st.sampled_from(["bytes", "bytes", "json", "other"]))
    if kind == "other":
        replace(path, data.draw(in_place_of_a_file()))
    elif kind == "json" and path.suffix == ".json":
        path.write_bytes(data.draw(hostile_json(json.loads(path.read_bytes()))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))


# --- data ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(the parent of a prepared set and of the cache of its arrays, the set's folder)."""
    with pytest.MonkeyPatch.context() as patch:
        parent = tmp_path_factory.mktemp("prepared")
        patch.setenv("WDKD_CACHE_DIR", str(parent / "cache"))
        folder = prepare_tiny(parent / "tfds")
        load_tiny(parent)
        yield parent, folder


def load_tiny(parent):
    return load_dataset(DataConfig(name="tiny_set", data_dir=str(parent / "tfds")))


@cases(30)
@given(st.data())
def test_the_cache_of_arrays(prepared, tmp_path_factory, data):
    """Whatever is in it, the images are right, and so is what is in it then."""
    parent = tmp_path_factory.mktemp("copy")
    shutil.copytree(prepared[0] / "cache", parent / "cache")
    (cache,) = (parent / "cache" / "arrays").iterdir()
    good = {path.name: path.read_bytes() for path in cache.iterdir()}
    spoil(cache / data.draw(st.sampled_from(sorted(good))), data)
    with pytest.MonkeyPatch.context() as patch, nothing_changes(parent, cache), nothing_changes(prepared[0]):
        patch.setenv("WDKD_CACHE_DIR", str(parent / "cache"))
        found = outcome(load_tiny, prepared[0])
    np.testing.assert_array_equal(found.train_images, tiny_images((12, 10, 3), 9, 9))
    assert all((cache / name).read_bytes() == content for name, content in good.items() if name.endswith(".npy"))
    shutil.rmtree(parent)


@cases(40)
@given(st.data())
def test_prepared_sets(prepared, tmp_path_factory, data):
    """They are read, or refused in a line."""
    parent = tmp_path_factory.mktemp("copy")
    shutil.copytree(prepared[0] / "tfds", parent / "tfds")
    folder = parent / "tfds" / "tiny_set" / "1.2.3"
    spoil(folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir()))), data)
    with pytest.MonkeyPatch.context() as patch, nothing_changes(parent, parent / "cache"):
        patch.setenv("WDKD_CACHE_DIR", str(parent / "cache"))
        found = outcome(load_tiny, parent)
    if isinstance(found, Dataset):
        assert found.train_images.shape == (9, *found.image_shape) and found.train_labels.max() < found.num_classes
    shutil.rmtree(parent)
