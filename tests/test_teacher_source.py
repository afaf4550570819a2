"""What a teacher is given as is told from its name, and what its kind cannot do is refused before it is read."""

import pytest
from conftest import tiny

from wdkd import teacher_source
from wdkd.errors import UsageError
from wdkd.teacher_source import SHIPPED, check_source, find_source
from wdkd.train import check


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_kind_is_told_from_its_name(place):
    (place / "run").mkdir()
    for given, kind, location in (
        ("run", "run", place / "run"),
        ("deep/run", "run", place / "deep/run"),
        ("net.onnx", "onnx", place / "net.onnx"),
        ("a/NET.ONNX", "onnx", place / "a/NET.ONNX"),
        ("said.npz", "outputs", place / "said.npz"),
        ("said.csv", "outputs", place / "said.csv"),
        ("my.code:teacher", "function", "my.code:teacher"),
    ):
        source = find_source(given)
        assert (source.kind, source.location) == (kind, str(location)), given


def test_a_shipped_name_is_a_run_of_the_checkout_and_a_directory_here_comes_first(place):
    assert find_source("cifar10").location == str(SHIPPED / "cifar10") and find_source("cifar10").exists
    (place / "cifar10").mkdir()
    assert find_source("cifar10").location == str(place / "cifar10")


def test_whether_it_is_still_there(place):
    (place / "net.onnx").mkdir()
    (place / "said.csv").write_text("")
    for given, there in (("said.csv", True), ("gone.onnx", False), ("x/run", False), ("code:f", True)):
        assert find_source(given).exists == there, given
    assert find_source("net.onnx").kind == "run", "a directory is a run whatever it is called"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "cifar01",
            "unknown teacher 'cifar01'; did you mean 'cifar10'? Known: cifar10, fashion_mnist, fashion_mnist_muon; "
            "or give a run's directory, an .onnx",
        ),
        ("net.pth", "teacher net.pth is another framework's file; export the network to ONNX"),
        ("notes.txt", "teacher notes.txt is a file of no kind that is known"),
        ("x" * 300, "unknown teacher 'xxx"),
    ],
)
def test_what_it_cannot_be_is_said_with_what_it_may_be(place, given, words):
    (place / "notes.txt").write_text("")
    with pytest.raises(UsageError) as caught:
        find_source(given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "edits", "words"),
    [
        (
            "a.onnx",
            {"method__name": "fitnet"},
            "method 'fitnet' matches hidden features, and of teacher a.onnx the outputs alone are known",
        ),
        ("code:f", {"method__name": "ab"}, "method 'ab' matches hidden features"),
        ("a.npz", {"method__name": "sobolev"}, "it has no input Jacobian for method 'sobolev'"),
        ("a.npz", {"method__name": "kd", "method__boundary_radius": 0.1}, "and where images would move to nothing is known"),
        ("a.csv", {"method__name": "kd", "augment__name": "flip_crop"}, "augment.name is 'flip_crop', and of other views nothing is known"),
        ("a.npz", {"method__name": "kd", "teacher_input__layout": "nhwc"}, "teacher_input.layout is given, but teacher a.npz is a file of"),
        (
            "runs/a",
            {"method__name": "kd", "teacher_input__mean": (0.5,)},
            "teacher_input.mean is given, but teacher runs/a is a run of wdkd",
        ),
        ("nothing", {"method__name": "kd"}, "unknown teacher 'nothing'"),
    ],
)
def test_what_a_kind_cannot_do_is_refused_before_any_work(place, teacher, edits, words):
    with pytest.raises(UsageError) as caught:
        check(tiny(teacher=teacher, **edits))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_kind_can_do_is_not_refused(place):
    for teacher, edits in (
        ("a.onnx", {"method__name": "sobolev", "teacher_input__layout": "nhwc", "augment__name": "matching"}),
        ("a.npz", {"method__name": "wdkd", "teacher_input__classes": ("a", "b")}),
        ("runs/a", {"method__name": "ab", "method__epsilon": 0.0}),
    ):
        assert check(tiny(teacher=teacher, **edits))
    assert check_source(tiny(teacher="a.onnx"), needs_hidden=False).kind == "onnx"


def test_shipped_names_are_the_runs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_source, "SHIPPED", tmp_path)
    assert teacher_source.shipped_names() == []
    for name in ("b", "a", "none"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "config.json").write_text("{}")
    assert teacher_source.shipped_names() == ["a", "b"]
