"""Every mistake ends in one line with the value, the limit and the remedy, exit code 2, and nothing written; --help shows every default."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import files, method_config
from test_config import OPTIONS, get

from wdkd import command_line, parallel
from wdkd.checkpoint import Checkpoints
from wdkd.config import STUDENTS, TEACHERS
from wdkd.errors import UsageError
from wdkd.models import initialize
from wdkd.run_directory import Input, build_model, describe_run, start

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture(autouse=True)
def one_cache(monkeypatch):
    """The scripts leave the tests' cache of compiled programs as it is."""
    monkeypatch.setattr(parallel, "enable_compilation_cache", lambda: None)


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs a launch script in this process, as python would: (exit code, stdout, stderr)."""

    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [f"launch/{script}.py", *map(str, options)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(LAUNCH / f"{script}.py"), run_name="__main__")
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(call, tmp_path):
    """A function that runs a script on bad input and returns its one line, knowing that no file has come, gone or changed."""

    def refused(script, *options):
        before = files(tmp_path)
        code, printed, errors = call(script, *options)
        assert files(tmp_path) == before
        assert (code, printed) == (2, "")
        assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n"), errors
        assert "Traceback" not in errors
        return errors[len("error: ") : -1]

    return refused


def untrained_run(directory, classes, image_shape):
    """A run's directory, as `train.run` would write it, of a network with its initial parameters."""
    given = Input([f"class{i}" for i in range(classes)], list(image_shape), [0.5] * image_shape[-1], [0.25] * image_shape[-1])
    described = describe_run(method_config("ce", None), given)
    directory.mkdir()
    start(directory, described, {})
    variables = initialize(build_model(described.config, given), jax.random.key(0), image_shape)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(1, network=variables, state=variables, facts={})
    return directory


# --- options -----------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "unknown option": ("--methud.name kd", "--methud.name", "Perhaps you meant: --method.name", "--help"),
    "unknown word": ("kd", "kd", "--help"),
    "no number": ("--method.temperature warm", "--method.temperature", "'warm'", "--help"),
    "fraction of a step": ("--train.steps 1.5", "--train.steps", "1.5", "--help"),
    "not a choice": ("--method.aggregate median", "--method.aggregate", "'median'", "('mean', 'rms', 'max')"),
    "unknown preset": ("--preset cifar", "--preset", "'cifar'", "('digits', 'fashion_mnist', 'cifar10', 'folder')"),
    "preset without a name": ("--preset", "Missing value for argument '--preset'", "--help"),
    "unknown data set": ("--data.name fashion_mnst", "unknown data set 'fashion_mnst'; did you mean 'fashion_mnist'?"),
    "a folder's preset alone": ("--preset folder", "preset folder is for images of your own; give --data.folder DIR"),
    "a folder's option alone": ("--data.channels 1", "data.channels is for images of your own; give --data.folder DIR"),
    "two places of data": ("--data.folder x --data.data-dir y", "data.data_dir is for TFDS sets", "leave it out"),
    "a size that is none": (
        "--data.folder x --data.image-size 32 5",
        "data.image_size is 32 5; it must be one or two numbers between 8 and 4096",
    ),
    "a folder that is not there": ("--data.folder nowhere", "nowhere does not exist, or cannot be reached; give the folder that has"),
    "far from any data set": ("--data.name qqqq", "unknown data set 'qqqq'", "Known: ", "digits", "cifar10"),
    "unknown method": ("--method.name kdd", "unknown method 'kdd'; did you mean 'kd'?", "Known: ab, ce, fitnet, kd, sobolev, wdkd"),
    "unknown model": ("--model.name cnnn", "unknown model 'cnnn'; did you mean 'cnn'?", "resnet20", "wrn_16_1"),
    "impossible depth": ("--model.name resnet21", "model 'resnet21' has depth 21; it must be 6n+2, as 20"),
    "n of 0": ("--data.n-per-class 0", "data.n_per_class is 0; it must be at least 1, or None for all images"),
    "negative n": ("--data.n-per-class -3", "data.n_per_class is -3; it must be at least 1, or None for all images"),
    "n too large": ("--data.n-per-class 500", "n_per_class is 500, but class 8 has only 102", "use at most 102"),
    "validation too large": ("--data.validation-size 1500", "validation_size is 1500", "use at most 1190"),
    "temperature 0": ("--method.temperature 0", "method.temperature is 0.0; it must be finite and above 0"),
    "negative temperature": ("--method.temperature -1", "method.temperature is -1.0; it must be finite and above 0"),
    "negative epsilon": ("--method.epsilon -0.1", "method.epsilon is -0.1; it must be finite and at least 0"),
    "epsilon nan": ("--method.epsilon nan", "method.epsilon is nan; it must be finite and at least 0"),
    "learning rate nan": ("--optimizer.learning-rate nan", "optimizer.learning_rate is nan; it must be finite and above 0"),
    "temperature inf": ("--method.temperature inf", "method.temperature is inf; it must be finite and above 0"),
    "batch of 0": ("--train.batch-size 0", "train.batch_size is 0; it must be at least 1"),
    "negative seed": ("--seed -1", "seed is -1; it must be between 0 and 2147483647"),
    "batch norm": (
        "--model.norm batch",
        "model.norm 'batch' mixes",
        "has no per-example input gradient",
        "use --model.norm group or epsilon 0",
    ),
    "too few steps": ("--method.name ab --train.steps 1", "train.steps is 1; 2 stages need at least 2"),
    "padding": ("--augment.name flip_crop --augment.padding 9", "augment.padding is 9; it must be at most the image's side, 8"),
    "views of 0": ("--augment.name matching --augment.views 0", "augment.views is 0; it must be at least 1, or None for fresh views"),
    "views of nothing": ("--augment.views 4", "augment.views is 4; it must be 1 or None with augment.name none"),
    "a cache of fresh views": (
        "--augment.name matching --cache.mode on",
        "cache.mode is on, but augmentation 'matching' draws a fresh view at every visit; fix some with --augment.views K",
    ),
    "a cache over budget": (
        "--cache.mode on --cache.budget 1 --augment.name flip_crop --augment.padding 1 --augment.views 9 --data.n-per-class 100",
        "9,000 views need 22.3 MiB, over the budget of 1 MiB",
        "raise --cache.budget, use --cache.precision bfloat16 or fewer views",
    ),
    "a cache that holds too little": (
        "--cache.mode on --method.name fitnet --method.pretrain-epsilon 0.1 --method.loss ce",
        "cache.mode is on, but the objective needs more of the teacher than can be recorded; use --cache.mode off",
    ),
    "no budget": ("--cache.budget 0", "cache.budget is 0; it must be at least 1 MiB"),
    "bfloat16 where there is none": (
        "--train.precision bfloat16",
        "train.precision is bfloat16, which cpu (cpu) does not compute in",
        "float32",
    ),
    "steps per call": ("--train.steps-per-call 0", "train.steps_per_call is 0; it must be at least 1"),
    "time to connect": ("--connect-timeout 0", "connect timeout is 0 s; it must be at least 1"),
    "one process of some": ("--processes 2", "--coordinator HOST:PORT, --processes N and --process-id I together"),
}


@pytest.mark.parametrize(("options", "words"), [(options, words) for options, *words in OUT_OF_RANGE.values()], ids=OUT_OF_RANGE)
def test_a_bad_option_is_refused(options, words, refused, teacher_run, tmp_path):
    line = refused("distill", "--workdir", tmp_path / "run", "--teacher", teacher_run[0], *options.split())
    assert all(word in line for word in words), line
    assert len(line) < 500, line


def test_a_workdir_must_be_given(refused):
    line = refused("distill", "--method.name", "ce")
    assert "--workdir" in line and "required" in line


def test_data_that_is_not_prepared_is_refused_with_the_command_that_prepares_it(refused, tmp_path):
    line = refused("distill", "--workdir", tmp_path / "run", "--data.name", "mnist", "--data.data-dir", tmp_path, "--method.name", "ce")
    assert f"data set 'mnist' is not prepared in {tmp_path}; run python launch/prepare_data.py --name mnist --data-dir {tmp_path}" in line


def test_a_batch_that_the_devices_do_not_divide_is_refused(refused, teacher_run, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    line = refused("distill", "--workdir", tmp_path / "run", "--teacher", teacher_run[0], "--train.batch-size", 100)
    assert line == "batch 100 is not divisible by 3 devices; use train.batch_size 99"


# --- teachers ----------------------------------------------------------------------------------------------------------


def teacher_is_refused(refused, tmp_path, teacher):
    line = refused("distill", "--workdir", tmp_path / "run", "--teacher", teacher)
    assert str(teacher) in line and line.startswith("teacher")
    return line


def test_a_method_that_needs_a_teacher_says_so(refused, tmp_path):
    line = refused("distill", "--workdir", tmp_path / "run", "--method.name", "kd")
    assert line == "method 'kd' needs a teacher; give --teacher DIRECTORY (launch/train_teacher.py makes one)"


def test_a_teacher_that_is_no_run_is_refused(refused, tmp_path):
    assert "is not a directory; give the directory of a run" in teacher_is_refused(refused, tmp_path, tmp_path / "missing")
    (tmp_path / "file").write_text("{}")
    words = "is a file of no kind that is known; give a run's directory, an .onnx file, module:function, or outputs in an .npz or .csv"
    assert words in teacher_is_refused(refused, tmp_path, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no run (no config.json); give a directory that" in teacher_is_refused(refused, tmp_path, tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.npz").write_text("no run")
    assert "holds no run (no config.json)" in teacher_is_refused(refused, tmp_path, tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: shutil.rmtree(d / "checkpoints"), "is not a directory of checkpoints"),
        (lambda d: [shutil.rmtree(p) for p in (d / "checkpoints").iterdir()], "holds no complete checkpoint; let the run reach its first"),
        (lambda d: shutil.rmtree(d / "checkpoints" / "24" / "network"), "is of other parameters than the checkpoint of step 22"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "must be an object"),
        (
            lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"width": 4', '"width": 8')),
            "no checkpoint verifies",
        ),
        (lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"width"', '"girth"')), "unknown field"),
        (lambda d: (d / "result.json").write_text("{}"), "lacks the field"),
    ],
    ids=["no checkpoints", "empty checkpoints", "no network", "no json", "list", "another width", "unknown field", "no result"],
)
def test_a_damaged_teacher_is_refused(damage, words, refused, teacher_run, tmp_path):
    shutil.copytree(teacher_run[0], tmp_path / "teacher")
    damage(tmp_path / "teacher")
    assert words in teacher_is_refused(refused, tmp_path, tmp_path / "teacher")


@pytest.mark.parametrize(
    ("classes", "image_shape", "words"),
    [
        (7, (8, 8, 1), "has 7 classes and the data 10; train a teacher on this data set"),
        (10, (12, 8, 1), "takes 12×8×1 images and the data has 8×8×1; train a teacher on this data set"),
        (10, (8, 8, 3), "takes 8×8×3 images and the data has 8×8×1; train a teacher on this data set"),
    ],
)
def test_a_teacher_of_other_classes_or_images_is_refused(classes, image_shape, words, refused, tmp_path):
    """The teacher is a run's directory in every respect, but was not trained: only what it was made for matters."""
    teacher = untrained_run(tmp_path / "teacher", classes, image_shape)
    assert words in teacher_is_refused(refused, tmp_path, teacher)


# --- directories -------------------------------------------------------------------------------------------------------


def test_another_runs_directory_is_refused(refused, finished_run, teacher_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished_run("ce")[0], directory)
    line = refused("distill", "--workdir", directory, "--teacher", teacher_run[0], "--seed", "5", "--data.n-per-class", "20")
    assert f"{directory} holds another run (" in line and line.endswith("stored and given); give another --workdir")
    assert "method.name: ce, wdkd" in line and "data.n_per_class" not in line


@pytest.mark.parametrize("kind", ["other files", "a file"])
def test_what_is_no_run_is_left_alone(kind, refused, teacher_run, tmp_path):
    thesis = tmp_path / "thesis"
    if kind == "a file":
        thesis.write_text("chapter 1")
    else:
        thesis.mkdir()
        (thesis / "chapter1.tex").write_text("chapter 1")
    line = refused("distill", "--workdir", thesis, "--teacher", teacher_run[0])
    assert str(thesis) in line and "give a" in line and "new --workdir" in line


@pytest.mark.parametrize("place", ["/proc/wdkd/run", "{file}/run"])
def test_a_directory_that_cannot_be_written_is_refused(place, refused, teacher_run, tmp_path):
    (tmp_path / "file").write_text("")
    workdir = place.format(file=tmp_path / "file")
    line = refused("distill", "--workdir", workdir, "--teacher", teacher_run[0])
    assert f"cannot write {workdir}/" in line and "choose a directory that you may write to" in line


# --- the other scripts -------------------------------------------------------------------------------------------------


def test_evaluate_refuses_what_is_no_run(refused, tmp_path):
    assert f"{tmp_path / 'no'} is not a directory" in refused("evaluate", "--run", tmp_path / "no")
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused("evaluate", "--run", tmp_path / "empty")
    assert "--run" in refused("evaluate")
    assert "'train'" in refused("evaluate", "--run", tmp_path / "empty", "--split", "train")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--methods kd kdd", "unknown method 'kdd'; did you mean 'kd'?"),
        ("--n-per-class -1", "data.n_per_class is -1; it must be at least 1"),
        ("--epsilons 0.1 -2", "method.epsilon is -2.0; it must be finite and at least 0"),
        ("--augmentations mixup", "augmentations"),
        ("--seeds", "seeds"),
        ("--workers 0", "workers is 0; it must be between 1 and"),
        ("--workers 1000", "workers is 1000; it must be between 1 and"),
        ("--methods kd --epsilons nan", "method.epsilon is nan"),
    ],
)
def test_a_bad_sweep_is_refused_before_it_starts(options, words, refused, teacher_run, tmp_path):
    line = refused(
        "sweep", "--workdir", tmp_path / "runs", "--results", tmp_path / "results", "--teacher", teacher_run[0], *options.split()
    )
    assert words in line, line


def test_a_script_as_a_process_prints_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, LAUNCH / "distill.py", "--workdir", tmp_path / "run", "--method.epsilon", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: method.epsilon is -1.0; it must be finite and at least 0\n"
    assert not (tmp_path / "run").exists()


# --- what is good ------------------------------------------------------------------------------------------------------


def shown_defaults(text):
    """{option: default} of a help text."""
    found = {}
    for described in re.split(r"(?m)^[│| ] ?(?=--[a-z])", text):  # Other options are named within a description.
        part = " ".join(re.sub(r"[╭╮╰╯│─]+|-{4,}|(?<!\S)[|+](?!\S)", " ", described).split())
        default = re.search(r"\((?:default: (.*?)|(required))\)(?= |$)", part)
        if default:
            found[part.split()[0]] = default[1] or default[2]
    return found


@pytest.mark.parametrize(("script", "presets"), [("distill", STUDENTS), ("train_teacher", TEACHERS), ("sweep", STUDENTS)])
@pytest.mark.parametrize("preset", [None, "cifar10"])
def test_help_shows_every_option_with_the_default_of_the_preset(script, presets, preset, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, printed, errors = call(script, *([] if preset is None else ["--preset", preset]), "--help")
    assert (code or 0, errors) == (0, "")
    shown = shown_defaults(printed)
    config = presets[preset or "digits"]
    words = {path: " ".join(map(str, value)) if isinstance(value := get(config, path), tuple) else str(value) for path in OPTIONS}
    expected = {f"--{path.replace('_', '-')}": word for path, word in words.items()}
    assert {name: shown.get(name) for name in expected} == expected
    assert shown["--preset"] == (preset or "digits")
    assert shown["--workdir"] == ("runs" if script == "sweep" else "required")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("evaluate", ("--run", "--split", "--data-dir", "--folder", "--teacher", "--out")),
        ("report", ("--results", "--tuning")),
        ("prepare_data", ("--name", "--data-dir", "--archive", "--folder", "--image-size", "--channels", "--test-share")),
        ("compact", ("--run", "--out", "--data-dir")),
        ("export", ("--run", "--format", "--out", "--teacher", "--data-dir")),
        ("predict", ("--model", "--teacher", "--run")),
    ],
)
def test_help_of_the_other_scripts(script, options, call):
    code, printed, errors = call(script, "--help")
    assert (code or 0, errors) == (0, "")
    assert all(f"{option} " in printed for option in options)
    assert set(options) <= set(shown_defaults(printed)) | {"--name"}


def test_output_that_nobody_reads_any_more_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run([sys.executable, LAUNCH / "predict.py", "--help"], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("options", [[], ["--data.n-per-class", "None", "--optimizer.clip-norm", "None", "--method.epsilon", "None"]])
def test_options_are_edits_of_the_preset(options, monkeypatch):
    given = []
    monkeypatch.setattr(command_line, "_train", given.append)
    monkeypatch.setattr(sys, "argv", ["x", "--workdir", "w", "--preset", "cifar10", "--augment.flip", "False", *options])
    command_line.train(STUDENTS, description=None)
    expected = dataclasses.replace(STUDENTS["cifar10"], augment=dataclasses.replace(STUDENTS["cifar10"].augment, flip=False))
    if options:
        expected = dataclasses.replace(
            expected,
            data=dataclasses.replace(expected.data, n_per_class=None),
            optimizer=dataclasses.replace(expected.optimizer, clip_norm=None),
        )
    assert given[0].config == expected and given[0].workdir == "w"


@pytest.mark.parametrize(
    ("options", "preset"),
    [
        (["--data.folder", "photos"], "folder"),
        (["--data.folder=photos"], "folder"),
        (["--data.folder", "photos", "--preset", "cifar10"], "cifar10"),
    ],
)
def test_a_folder_has_a_preset_of_its_own(options, preset, monkeypatch):
    given = []
    monkeypatch.setattr(command_line, "_train", given.append)
    monkeypatch.setattr(sys, "argv", ["x", "--workdir", "w", "--data.image-size", "32", "48", *options])
    command_line.train(STUDENTS, description=None)
    expected = STUDENTS[preset]
    expected = dataclasses.replace(expected, data=dataclasses.replace(expected.data, folder="photos", image_size=(32, 48)))
    assert given[0].config == expected and given[0].preset == preset
    assert given[0].config.data.dataset == "photos"


@pytest.mark.parametrize(
    ("error", "code", "line"), [(UsageError("two\n  lines"), 2, "two lines"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_errors_become_one_line(error, code, line, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(command_line, "_train", fail)
    monkeypatch.setattr(sys, "argv", ["x", "--workdir", "w"])
    with pytest.raises(SystemExit) as stopped:
        command_line.train(STUDENTS, description=None)
    assert stopped.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}") and printed.count("\n") == 1


def test_evaluate_writes_what_it_found(finished_run, monkeypatch, tmp_path, capsys):
    directory, result = finished_run("kd")
    before = files(directory)
    monkeypatch.setattr(sys, "argv", ["launch/evaluate.py", "--run", str(directory), "--out", str(tmp_path / "out")])
    runpy.run_path(str(LAUNCH / "evaluate.py"), run_name="__main__")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["evaluation"] == dataclasses.asdict(result.evaluation)
    assert (tmp_path / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert files(directory) == before
    printed = capsys.readouterr().out
    assert f"test accuracy {result.evaluation.accuracy:.2%} on 540 images" in printed
    assert all(name in printed for name in result.evaluation.class_names)
