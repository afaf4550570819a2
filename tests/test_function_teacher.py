"""A teacher from Python code: what the function returns, and in one line what is wrong with it."""

import sys

import numpy as np
import pytest

from wdkd.config import TeacherInputConfig
from wdkd.errors import UsageError
from wdkd.function_teacher import read_function_teacher

CODE = """
import numpy as np

CALLS = []

def linear():
    CALLS.append("called")
    weights = np.arange(3 * 4 * 4 * 2, dtype=np.float32).reshape(3, 4, 4, 2) / 100
    return (lambda variables, x: (x[..., None] * variables["w"]).sum((1, 2, 3))), {"w": weights}

def numpy_inside():
    return (lambda variables, x: np.asarray(x).sum((1, 2))[:, :2]), {}

def fails():
    raise RuntimeError("no licence\\nfor this")

def one():
    return linear()[0]

def vector():
    return (lambda variables, x: x.sum((1, 2, 3))), {}

def three():
    return (lambda variables, x: x[:, :3, 0, 0] + variables), 1.0

def a_list():
    return (lambda variables, x: [x]), {}

def objects():
    return (lambda variables, x: x), {"w": object()}

number = 3
"""
NAMES = ("ant", "bee")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working directory."""
    monkeypatch.chdir(tmp_path)
    name = f"my_teacher_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CODE)
    yield name
    sys.modules.pop(name, None)


def read(entry, **options):
    return read_function_teacher(entry, TeacherInputConfig(**options), image_shape=(4, 4, 3), class_names=NAMES)


def test_a_function_of_the_working_directory_gives_a_teacher(module, tmp_path):
    path = list(sys.path)
    teacher = read(f"{module}:linear", value_range="0-255")
    assert sys.path == path and sys.modules[module].CALLS == ["called"]
    images = np.random.default_rng(0).uniform(size=(5, 4, 4, 3)).astype(np.float32)
    expected = np.einsum("bhwc,chwk->bk", 255 * images.astype(np.float64), teacher.variables["w"])
    np.testing.assert_allclose(teacher.apply(teacher.variables, images).logits, expected, rtol=1e-4)
    assert (teacher.classes, teacher.path, teacher.accuracy) == (2, f"{module}:linear", None)


def test_its_hash_is_of_the_variables_and_of_the_code(module, tmp_path):
    first = read(f"{module}:linear").hash
    assert read(f"{module}:linear").hash == first and read(f"{module}:linear", mean=(0.5,)).hash == first
    file = tmp_path / f"{module}.py"
    file.write_text(CODE + "\n# changed\n")
    assert read(f"{module}:linear").hash != first
    sys.modules.pop(module)
    file.write_text(CODE.replace("/ 100", "/ 200"))
    assert read(f"{module}:linear").hash != first


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{}:fails", "raises RuntimeError: no licence"),
        ("{}:one", "returns function; it must return (apply, variables)"),
        ("{}:vector", "gives an array of 2 for 2 images; it must give a row of 2 numbers"),
        ("{}:three", "has 3 classes and the data 2"),
        ("{}:a_list", "does not run on images of 2×3×4×4 (see --teacher-input.layout and size): TypeError: apply gives a list"),
        ("{}:objects", "returns variables that are no arrays: TypeError"),
        ("{}:numpy_inside", "does not run on images of 2×3×4×4 (see --teacher-input.layout and size): TracerArrayConversionError"),
        ("{}:number", "number is no function in"),
        ("{}:lienar", "lienar does not exist in"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_what_is_no_teacher_is_said_in_a_line(module, entry, words):
    with pytest.raises(UsageError) as caught:
        read(entry.format(module))
    text = str(caught.value)
    assert words in text and text.isprintable() and len(text) < 900, text


def test_a_module_that_does_not_compile_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_teacher_code.py").write_text("def f(:\n")
    with pytest.raises(UsageError, match="broken_teacher_code:f cannot be imported: SyntaxError"):
        read("broken_teacher_code:f")


def test_the_layout_is_what_the_options_say(module):
    with pytest.raises(UsageError, match="2×4×4×3"):
        read(f"{module}:a_list", layout="nhwc")
