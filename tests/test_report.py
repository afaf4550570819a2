"""report, comparison: made-up result files in, tables and plots out; the numbers are recomputed here and read back from the files."""

import csv
import dataclasses
import html
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import rich.console
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wdkd import comparison, config, published, report
from wdkd.errors import UsageError
from wdkd.figures import confusion_figure
from wdkd.figures import save as save_figure
from wdkd.files import read_json, write_json
from wdkd.prepared import MAX_CLASSES
from wdkd.result import Evaluation, Result, read_result, results_path, write_result

CLASSES = 10
METHODS = ["ce", "kd", "fitnet", "ab", "wdkd", "sobolev"]
ROOT = Path(__file__).parents[1]


def make_evaluation(accuracy, split="test", agreement=0.8, classes=CLASSES, count=10_000):
    each = count // classes
    right = round(accuracy * each)
    confusion = [[right if i == j else (each - right) // (classes - 1) for j in range(classes)] for i in range(classes)]
    names = [f"class {i}" for i in range(classes)]
    return Evaluation(split, count, accuracy, 0.03 + accuracy / 50, agreement, [accuracy] * classes, confusion, names)


def make_result(method="kd", n=50, seed=0, accuracy=0.8, epsilon=None, split="test", dataset="fashion_mnist", loss="kl", **changes):
    epsilon = config.MethodConfig(name=method).radius if epsilon is None else epsilon
    method_config = config.MethodConfig(name=method, epsilon=epsilon, loss=loss)
    options = config.Config(data=config.DataConfig(name=dataset, n_per_class=n), method=method_config, seed=seed, teacher="runs/teacher")
    fields = dict(config=options, evaluation=make_evaluation(accuracy, split, None if method == "ce" else accuracy - 0.05))
    fields |= dict(dataset=dataset, track="plain", method=method, n_per_class=n, seed=seed, epsilon=epsilon)
    fields |= dict(train_size=(n or 5500) * CLASSES, subset_hash=f"subset-{n}-{seed}", teacher_path="runs/teacher", teacher_hash="7e" * 8)
    fields |= dict(
        teacher_accuracy=0.9312,
        through_teacher=True,
        teacher_cached=False,
        model="cnn",
        parameters=73_210,
        forward_flops=2.5e6,
        parameter_hash="ab",
    )
    fields |= dict(
        steps=500, examples_per_second=1e4, wall_seconds=9.0, device_kind="NVIDIA H100", device_count=1, versions={}, revision="abc"
    )
    return Result(**{**fields, **changes})


def save(root, results):
    for r in results:
        write_result(results_path(root, r), r)
    return results


@pytest.fixture
def varied(tmp_path):
    """Four methods on three sizes with three seeds, one cell with one seed, holes; wdkd above kd at 50, below at full."""
    rng = np.random.default_rng(0)
    level = {"ce": (0.70, 0.85, 0.91), "kd": (0.80, 0.87, 0.920), "wdkd": (0.83, 0.871, 0.905), "zeta": (0.6, 0.7, 0.8)}
    made = []
    for method, accuracies in level.items():
        for n, accuracy in zip((50, 200, None), accuracies, strict=True):
            seeds = {("ce", None): [], ("zeta", 50): [4]}.get((method, n), [0, 1, 2])
            made += [make_result(method, n, seed, accuracy + rng.normal() * 0.004) for seed in seeds]
    return tmp_path, save(tmp_path, made)


def accuracies(results, method, n):
    return {r.seed: 100 * r.evaluation.accuracy for r in results if (r.method, r.n_per_class) == (method, n)}


def section(text, heading):
    """The rows of the first table below a heading that starts so, without emphasis, as cells by column by row name."""
    below = text.split(f"## {heading}")[1]
    rows = [[c.strip("* ") for c in line.strip("| ").split(" | ")] for line in re.search(r"(\|.*\n)+", below).group().splitlines()]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows if row[0] != "---"}


def test_means_and_deviations(varied):
    root, results = varied
    made = report.main_report(root)
    assert made.warnings == []
    assert [p.relative_to(root).as_posix() for p in made.paths] == [f"fashion_mnist/plain.{end}" for end in ("md", "csv", "png")]
    table = section((root / "fashion_mnist/plain.md").read_text(), "Accuracy on the test images")
    assert [name for name in list(table)[1:] if "published" not in name] == [*METHODS, "zeta", "best here"]
    assert list(table["kd"]) == ["50", "100", "200", "500", "1000", "full"]
    for method in ("ce", "kd", "fitnet", "wdkd", "zeta"):
        for n in (50, 100, 200, None):
            values = np.array(list(accuracies(results, method, n).values()))
            text = table[method]["full" if n is None else str(n)]
            if len(values) > 1:
                assert (
                    text
                    == f"{values.mean():.2f} ± {np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1)):.2f} ({len(values)})"
                )
            else:
                assert text == (f"{values[0]:.2f} (1)" if len(values) else "not run")


def test_csv_has_full_precision_and_the_paired_interval(varied):
    root, results = varied
    report.main_report(root)
    with open(root / "fashion_mnist/plain.csv", newline="") as file:
        rows = {(r["method"], r["n_per_class"]): r for r in csv.DictReader(file)}
    assert len(rows) == 11
    for n, name in ((50, "50"), (200, "200"), (None, "full")):
        kd, ours, row = accuracies(results, "kd", n), accuracies(results, "wdkd", n), rows["wdkd", name]
        test = scipy.stats.ttest_rel(list(ours.values()), list(kd.values()))
        low, high = test.confidence_interval(0.95)
        got = [float(row[k]) for k in ("accuracy_mean", "accuracy_sd", "minus_kd", "minus_kd_low", "minus_kd_high")]
        expected = [np.mean(list(ours.values())), np.std(list(ours.values()), ddof=1), np.mean([ours[s] - kd[s] for s in kd]), low, high]
        np.testing.assert_allclose(got, expected, rtol=1e-9)
        assert (row["seeds"], row["pairs"], row["epsilon"], row["split"]) == ("3", "3", "0.01", "test")
        assert float(row["published"] or "nan") == pytest.approx({"50": 81.73, "full": 94.72}.get(name, np.nan), nan_ok=True)
    assert (rows["zeta", "50"]["accuracy_sd"], rows["zeta", "50"]["minus_kd"], rows["ce", "50"]["agreement_mean"]) == ("", "", "")


def test_paired_table_uses_identical_subsets_only(tmp_path):
    save(tmp_path, [make_result("kd", 50, s, a) for s, a in enumerate((0.80, 0.81, 0.79, 0.5))])
    save(tmp_path, [make_result("wdkd", 50, s, a) for s, a in enumerate((0.81, 0.83, 0.80))])
    save(tmp_path, [make_result("wdkd", 50, 3, 0.9, subset_hash="another")])
    save(tmp_path, [make_result("ab", 50, 1, 0.80), make_result("fitnet", 50, 9, 0.7), make_result("ab", 100, 1, 0.80)])
    report.main_report(tmp_path)
    table = section((tmp_path / "fashion_mnist/plain.md").read_text(), "Paired difference from kd")
    low, high = scipy.stats.t.interval(0.95, 2, loc=4 / 3, scale=scipy.stats.sem([1.0, 2.0, 1.0]))
    assert table["wdkd"]["50"] == f"+1.33 [{low:+.2f}, {high:+.2f}] (3)"
    assert table["ab"] == {"50": "-1.00 [n/a, 1 seed]", "100": "n/a, kd not run"}
    assert table["fitnet"] == {"50": "n/a, no shared subset", "100": "not run"}


def test_agreement_and_calibration(varied):
    root, results = varied
    report.main_report(root)
    text = (root / "fashion_mnist/plain.md").read_text()
    ece = [100 * r.evaluation.ece for r in results if (r.method, r.n_per_class) == ("kd", 50)]
    assert section(text, "Expected calibration error")["kd"]["50"] == f"{np.mean(ece):.2f} ± {np.std(ece, ddof=1):.2f} (3)"
    assert section(text, "Agreement")["ce"]["50"] == "n/a, no teacher"
    agreement = np.mean([v - 5 for v in accuracies(results, "kd", 50).values()])
    assert section(text, "Agreement")["kd"]["50"].startswith(f"{agreement:.2f} ± ")


def test_facts_and_settings(varied):
    root, _ = varied
    save(root, [make_result("wdkd", 500, 0, 0.9, epsilon=0.1)])
    report.main_report(root)
    text = (root / "fashion_mnist/plain.md").read_text()
    for part in ("93.12 %", "7e" * 8, "cnn, 73,210 parameters, 2.50 MFLOPs", "500 steps of 64", "test (10,000 images)", "1 x NVIDIA H100"):
        assert part in text
    settings = section(text, "How each method was run")
    assert settings["wdkd"]["epsilon"] == "0.01 (50, 200, full); 0.1 (500)"
    assert (settings["ce"]["loss"], settings["kd"]["gradient through the teacher"]) == ("ce", "no gradient")
    assert (settings["ce"]["temperature"], settings["kd"]["temperature"], settings["kd"]["sobolev weight"]) == ("-", "4", "-")
    assert settings["kd"]["optimizer.name"] == "adamw" and settings["kd"]["learning rate"] == "0.002" and "momentum" not in settings["kd"]


def test_options_in_which_runs_differ_are_shown(tmp_path):
    plain = make_result("kd")
    other = dataclasses.replace(plain.config, optimizer=config.OptimizerConfig(momentum=0.5), train=config.TrainConfig(log_every=7))
    save(tmp_path, [plain, make_result("kd", 100, config=other), make_result("sobolev")])
    report.main_report(tmp_path)
    settings = section((tmp_path / "fashion_mnist/plain.md").read_text(), "How each method was run")
    assert settings["kd"]["momentum"] == "0.5 (100); 0.9 (50)" and settings["sobolev"]["momentum"] == "0.9"
    assert settings["sobolev"]["sobolev weight"] == "0.1" and "log every" not in settings["kd"]


def test_published_numbers_stand_in_rows_of_their_own(tmp_path):
    save(tmp_path, [make_result("kd", 50, 0, 0.8), make_result("kd", 50, 0, 0.8, dataset="digits")])
    report.main_report(tmp_path)
    text = (tmp_path / "fashion_mnist/plain.md").read_text()
    table = section(text, "Accuracy")
    assert table["wdkd, published"] == {"50": "81.73", "100": "85.18", "500": "90.46", "1000": "91.95", "full": "94.72"}
    names = list(table)[1:-2]
    assert [name.removesuffix(", published") for name in names if "published" in name] == ["kd", "fitnet", "ab", "wdkd"]
    assert all(names[i - 1] == name.removesuffix(", published") for i, name in enumerate(names) if "published" in name)
    assert "| *kd, published* | *78.50* |" in text and "not public" in text and "Kong" in text and "DivBFKD" in text
    assert table["kd"]["50"] == "80.00 (1)" and table["minus published wdkd"]["50"] == "-1.73"
    digits = (tmp_path / "digits/plain.md").read_text()
    assert "published" not in digits and set(section(digits, "Accuracy")["kd"]) == {"50"}


def test_published_numbers_are_those_of_the_protocol():
    """Typed once more, row by row: M, then ours, ab, fitnet and kd on CIFAR-10 and on Fashion-MNIST."""
    rows = """full 84.66 82.65 77.84 79.72 94.72 92.10 92.23 92.10
              1000 82.01 76.19 63.84 77.63 91.95 91.67 91.53 90.44
              500 73.08 66.69 54.51 50.63 90.46 90.25 82.60 89.45
              100 47.24 44.70 29.68 31.83 85.18 84.09 81.92 83.77
              50 41.16 38.23 31.65 28.32 81.73 80.82 81.40 78.50"""
    found = {}
    for row in rows.splitlines():
        n, *values = row.split()
        for place, value in enumerate(values):
            dataset, method = ("cifar10", "fashion_mnist")[place // 4], ("wdkd", "ab", "fitnet", "kd")[place % 4]
            found.setdefault(dataset, {}).setdefault(method, {})[None if n == "full" else int(n)] = float(value)
    assert found == published.ACCURACY


def test_the_best_of_each_column_ties_and_lonely_methods(tmp_path):
    save(tmp_path, [make_result(m, 50, s, a + s / 100) for m, a in (("kd", 0.8), ("ab", 0.8), ("wdkd", 0.79)) for s in (0, 1)])
    save(tmp_path, [make_result("ab", 100, 0, 0.7), make_result("kd", 500, 0, 0.9), make_result("sobolev", 500, 0, 0.91)])
    report.main_report(tmp_path)
    text = (tmp_path / "fashion_mnist/plain.md").read_text()
    table = section(text, "Accuracy")
    assert table["best here"] == {"50": "kd = ab (tie)", "100": "ab (alone)", "500": "sobolev", "1000": "not run", "full": "not run"}
    assert [table["minus published wdkd"][n] for n in ("50", "100", "500", "full")] == ["-1.23", "-15.18", "+0.54", "not run"]
    assert re.findall(r"\*\*(\S+) [^*]*\*\*", text.split("## Accuracy")[1].split("##")[0]) == ["80.50", "80.50", "91.00"]


def test_hours_are_added_up_by_device(tmp_path):
    save(tmp_path, [make_result("kd", 50, s, wall_seconds=t) for s, t in enumerate((3600.0, 1800.0, 90.0))])
    save(tmp_path, [make_result("ab", 50, 0, wall_seconds=None), make_result("ab", 50, 1, wall_seconds=7200.0, device_kind="cpu")])
    report.main_report(tmp_path)
    (line,) = [line for line in (tmp_path / "fashion_mnist/plain.md").read_text().splitlines() if line.startswith("- Training time")]
    assert re.search(
        r"1\.52 hours \(4 runs, [^;]*1 of them of unknown time\) on 1 x NVIDIA H100; 2\.00 hours \(1 runs.*\) on 1 x cpu$", line
    )


def test_honest_sentence_both_ways(varied):
    root, results = varied
    report.main_report(root)
    text = (root / "fashion_mnist/plain.md").read_text()
    for n, place in ((50, "above"), (None, "below")):
        gap = np.mean(list(accuracies(results, "wdkd", n).values())) - np.mean(list(accuracies(results, "kd", n).values()))
        images = "all images" if n is None else f"{n} images per class"
        assert (gap > 0) == (place == "above")
        assert f"With {images} wdkd is {abs(gap):.2f} points {place} kd: " in text
    assert "sobolev is" not in text


def test_sentence_says_when_the_sign_is_open(tmp_path):
    save(
        tmp_path,
        [make_result("kd", 50, s, 0.8 + s / 100) for s in range(3)] + [make_result("wdkd", 50, s, 0.82 - s / 100) for s in range(3)],
    )
    save(tmp_path, [make_result(m, 100, 0, a) for m, a in (("kd", 0.8), ("sobolev", 0.81))])
    report.main_report(tmp_path)
    text = (tmp_path / "fashion_mnist/plain.md").read_text()
    assert re.search(r"50 images per class wdkd is level with kd: .*contains 0, so the sign is open", text)
    assert re.search(r"100 images per class sobolev is 1.00 points above kd: .*no interval, so the sign is open", text)


def test_damaged_and_misplaced_files_are_named_and_left_out(varied):
    root, results = varied
    before = (root / "fashion_mnist/plain/kd/n50/seed0.json").read_text()
    report.main_report(root)
    clean = section((root / "fashion_mnist/plain.md").read_text(), "Accuracy")
    cell = root / "fashion_mnist/plain/kd/n50"
    (cell / "seed7.json").write_text(before[: len(before) // 2])
    (cell / "seed8.json").write_text(before)
    (cell / "seed9.json").write_text(before.replace('"steps"', '"stops"'))
    write_json(cell / "seed6.json", read_json(cell / "seed0.json") | {"seed": 6, "evaluation": dataclasses.asdict(make_evaluation(1.5))})
    made = report.main_report(root)
    text = (root / "fashion_mnist/plain.md").read_text()
    assert section(text, "Accuracy") == clean
    assert [re.search(r"seed\d", line).group() for line in made.warnings] == ["seed6", "seed7", "seed8", "seed9"]
    assert all("is left out" in line and line in text and str(root) not in line for line in made.warnings)


HOSTILE = {
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "huge": lambda path: os.truncate(path, 2**40),
    "deep": lambda path: path.write_text('{"config":' * 10**5),
    "many rows": lambda path: path.write_text(path.read_text().replace('"confusion": [', '"confusion": [' + "[]," * 4_000_000)),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "a path": lambda path: change(path, dataset="../../../outside"),
    "an absolute path": lambda path: change(path, track="/tmp"),
    "no name": lambda path: change(path, method=""),
    "a NUL": lambda path: change(path, method="k\0d"),
    "a path for a seed": lambda path: change(path, seed="../0"),
    "no number": lambda path: change(path, epsilon=float("nan")),
    "an infinite number": lambda path: change(path, forward_flops=float("inf")),
    "an absurd number": lambda path: change(path, n_per_class=10**4000),
    "another status": lambda path: change(path, status="diverged"),
    "a terminal's escape": lambda path: change(path, model="\x1b[2J"),
    "a row of a table": lambda path: change(path, device_kind="CPU\n\n| a | b |"),
    "no classes": lambda path: change(path, evaluation=dataclasses.asdict(make_evaluation(0.8)) | {"class_names": []}),
    "a matrix of nothing": lambda path: change(path, evaluation=dataclasses.asdict(make_evaluation(0.8)) | {"confusion": [[]] * 10}),
    "counts of nothing": lambda path: change(path, evaluation=dataclasses.asdict(make_evaluation(0.8)) | {"count": 0}),
    "an option out of range": lambda path: change(path, config=config_with("train", steps=0)),
    "an unknown option": lambda path: change(path, config=config_with("train", stops=1)),
}


def change(path, **fields):
    write_json(path, read_json(path) | fields)


def config_with(part, **options):
    values = config.to_dict(make_result().config)
    return values | {part: values[part] | options}


@pytest.mark.parametrize("damage", HOSTILE)
@pytest.mark.parametrize("kind", ["main", "tuning"])
def test_a_hostile_file_is_left_out_in_a_line_at_once(tmp_path, damage, kind):
    root, build = tmp_path / "results", {"main": report.main_report, "tuning": report.tuning_report}[kind]
    make = {
        "main": lambda seed: make_result("kd", 50, seed, 0.8),
        "tuning": lambda seed: make_result("wdkd", 50, seed, 0.8, 0.1, "validation"),
    }[kind]
    places = [root / ("tuning" if kind == "tuning" else "") / f"fashion_mnist/plain/kd/n50/seed{seed}.json" for seed in (0, 1)]
    for seed, place in enumerate(places):
        write_result(place, make(seed))
    HOSTILE[damage](places[0])
    start = time.process_time()  # Of this process alone: the machine may be busy with others.
    made = build(root)
    assert time.process_time() - start < 10
    (line,) = [line for line in made.warnings if "seed0" in line]
    assert "is left out: " in line and line.isprintable() and len(line) < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_a_run_that_diverged_is_left_out_and_named(tmp_path):
    lost = make_result("kd", 50, 0, evaluation=None, parameter_hash=None, status="diverged", reason="the loss of step 7 is nan")
    save(tmp_path, [lost, make_result("kd", 50, 1)])
    (line,) = report.main_report(tmp_path).warnings
    assert line == "fashion_mnist/plain/kd/n50/seed0.json is left out: it diverged: the loss of step 7 is nan"


def test_file_names_of_any_bytes_are_reported_and_printed(tmp_path):
    root = tmp_path / os.fsdecode(b"results \xff\n\x1b[2J")
    save(root, [make_result("kd")])
    odd = root / os.fsdecode(b"d\xff\n") / "plain" / "kd" / "n50" / "seed\n0.json"
    odd.parent.mkdir(parents=True)
    odd.write_text("{")
    done = launch("--results", root)
    assert done.returncode == 0 and not done.stderr
    assert "\x1b" not in done.stdout and "is left out" in done.stdout and "\\udcff" in done.stdout
    empty = launch("--results", root / "none")
    assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("field", ["dataset", "track", "method"])
@pytest.mark.parametrize("name", ["../../x", "/x", "", ".", "..", "a\0b", "a\nb", "a/../b", "a/b/c", "\ud800"])
def test_no_result_is_written_elsewhere(tmp_path, field, name):
    with pytest.raises(UsageError, match="a part of the result's path is ") as caught:
        results_path(tmp_path, make_result(**{field: name}))
    assert str(caught.value).isprintable()


def test_a_set_with_a_configuration_is_in_the_report(tmp_path):
    """One directory for each configuration, where the report looks for results and for tuning runs."""
    result = make_result(dataset="emnist/balanced")
    path = results_path(tmp_path, result)
    assert path.relative_to(tmp_path).as_posix() == "emnist-balanced/plain/kd/n50/seed0.json"
    write_result(path, result)
    tried = make_result(dataset="emnist/balanced", split="validation")
    write_result(results_path(tmp_path / "tuning", tried), tried)
    found = report.whole_report(tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in found.paths}
    assert found.warnings == [] and {"emnist-balanced/plain.md", "tuning/emnist-balanced/plain.md"} <= names
    assert "emnist/balanced, track plain" in (tmp_path / "emnist-balanced" / "plain.md").read_text()


def test_what_is_written_can_be_read(tmp_path):
    """With as many classes as a set may have, and a path of bytes."""
    result = make_result(teacher_path=os.fsdecode(b"runs/\xff"), evaluation=make_evaluation(0.5, classes=MAX_CLASSES))
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result


def test_other_json_is_ignored(varied):
    root, results = varied
    others = [f"{name}/a/b/n50" for name in ("benchmarks", "tuning", "long", "longer", "stronger", "stronger_longer", "teachers")]
    for place in (*others, "fashion_mnist/plain/kd"):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "seed0.json").write_text("{}")
    made = report.main_report(root)
    assert made.warnings == [] and len(made.paths) == 3


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(model="resnet20", parameters=270_000), "student are mixed .*resnet20 with 270,000 parameters in"),
        (dict(steps=900), "steps are mixed .*900 steps of 64 images in"),
        (dict(teacher_hash="beef"), "teacher hash are mixed .*beef in"),
        (dict(split="validation"), "evaluated split are mixed .*validation in"),
    ],
)
def test_what_must_not_be_mixed_is_named(varied, changes, names):
    root, _ = varied
    save(root, [make_result("wdkd", 50, 1, 0.8, **changes), make_result("kd", 500, 0, 0.8, **changes)])
    (line,) = report.main_report(root).warnings
    assert re.search(names + r" \[kd n500 seed 0; wdkd n50 seed 1\]", line)
    assert line.removeprefix("fashion_mnist/plain: ") in (root / "fashion_mnist/plain.md").read_text()


def test_a_method_without_teacher_is_not_a_mixture(tmp_path):
    save(tmp_path, [make_result("kd"), make_result("ce", teacher_hash=None, teacher_accuracy=None)])
    assert report.main_report(tmp_path).warnings == []


def check_image(path):
    with PIL.Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), np.float64)
    assert min(pixels.shape) > 300 and pixels.std() > 5
    return pixels


def test_plots_are_images_that_show_the_numbers(varied):
    root, _ = varied
    report.main_report(root)
    before = check_image(root / "fashion_mnist/plain.png")
    save(root, [make_result("wdkd", 50, s, 0.7) for s in range(3)])
    report.main_report(root)
    assert (check_image(root / "fashion_mnist/plain.png") != before).any()
    assert not list(root.rglob(".*"))


def test_the_plot_has_the_means_the_floor_the_teacher_and_the_published_cells(varied):
    _, results = varied
    above, below = comparison.accuracy_figure(results).axes
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["teacher (93.12 %)", "wdkd as published\n(other networks)", "ce (no teacher)", "kd", "wdkd", "zeta"]
    handles, named = above.get_legend_handles_labels()
    lines = dict(zip(named, handles, strict=True))
    means = [np.mean(list(accuracies(results, "wdkd", n).values())) for n in (50, 200, None)]
    np.testing.assert_allclose(lines["wdkd"].lines[0].get_ydata(orig=False), means)
    np.testing.assert_allclose(lines["wdkd"].lines[0].get_xdata(orig=False) / [50, 200, 5500], [1.015**k for k in [0.5] * 3], rtol=0.05)
    shown = dict(zip(lines[labels[1]].get_xdata(), lines[labels[1]].get_ydata(), strict=True))
    assert shown == {5500.0 if n is None else n: a for n, a in published.ACCURACY["fashion_mnist"]["wdkd"].items()}
    assert set(lines["teacher (93.12 %)"].get_ydata()) == {93.12}
    gaps = [np.mean([accuracies(results, "wdkd", n)[s] - accuracies(results, "kd", n)[s] for s in range(3)]) for n in (50, 200, None)]
    assert any(len(line.get_xdata()) == 3 and np.allclose(line.get_ydata(orig=False), gaps) for line in below.lines)


def test_the_plot_has_no_differences_where_kd_was_not_run(tmp_path):
    assert len(comparison.accuracy_figure([make_result("wdkd"), make_result("ab")]).axes) == 1


@pytest.mark.parametrize("classes", [2, 10, 20, 100])
def test_confusion_figure(tmp_path, classes):
    path = confusion_figure(make_evaluation(0.8, classes=classes), tmp_path / "confusion.png")
    check_image(path)


def test_a_saved_figure_looks_as_it_was_drawn(tmp_path):
    """Few of its colours are left out, and those by less than an eye sees."""
    figure = Figure()
    above, below = figure.subplots(2, 1)
    above.imshow(np.add.outer(np.arange(40), np.arange(90)))
    for index in range(8):
        below.plot([0, 1], [index, 2 * index], f"C{index}", label=f"{index}")
    below.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    with PIL.Image.open(save_figure(figure, tmp_path / "figure.png")) as image:
        assert image.mode == "P" and image.size == drawn.shape[1::-1]
        difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - drawn)
    assert difference.mean() < 1 and difference.max() < 32


def test_terminal_table(varied):
    _, results = varied
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    console.print(report.table_for_terminal(results))
    text = console.export_text()
    assert f"{accuracies(results, 'zeta', 50)[4]:.2f} (1)" in text and "not run" in text and "fashion_mnist, plain" in text
    with pytest.raises(UsageError, match="at least 1 result"):
        report.table_for_terminal([])


def test_no_results(tmp_path):
    for build in (report.main_report, report.tuning_report):
        with pytest.raises(UsageError, match=f"{tmp_path}.*no result files; run launch") as error:
            build(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "digits/plain/kd/n50").mkdir(parents=True)
    (tmp_path / "digits/plain/kd/n50/seed0.json").write_text("{")
    with pytest.raises(UsageError, match="1 result files, none usable .*seed0.json"):
        report.main_report(tmp_path)


# --- Command line ---------------------------------------------------------------------------------------------------------


def test_longer_schedules_and_a_stronger_teacher_have_their_own_reports(tmp_path):
    save(tmp_path, [make_result(accuracy=0.8)])
    save(tmp_path / "long", [make_result(accuracy=0.9), make_result("ab", accuracy=0.91)])
    save(tmp_path / "longer", [make_result(accuracy=0.95)])
    save(tmp_path / "stronger", [make_result(accuracy=0.97)])
    save(tmp_path / "stronger_longer", [make_result(accuracy=0.98)])
    (tmp_path / "long/fashion_mnist/plain/ab/n50/seed1.json").write_text("{")
    made = report.whole_report(tmp_path)
    accuracies = {"": "80.00 (1)", "long/": "90.00 (1)", "longer/": "95.00 (1)", "stronger/": "97.00 (1)", "stronger_longer/": "98.00 (1)"}
    for where, accuracy in accuracies.items():
        assert section((tmp_path / f"{where}fashion_mnist/plain.md").read_text(), "Accuracy")["kd"]["50"] == accuracy
        assert all((tmp_path / f"{where}fashion_mnist/plain.{end}").is_file() for end in ("csv", "png"))
    assert [line for line in made.warnings if line.startswith("long schedule: fashion_mnist/plain/ab/n50/seed1.json is left out")]
    assert len(made.warnings) == 1 and len(made.paths) == 16
    titles = ["", "long schedule: ", "longer schedule: ", "stronger teacher: ", "stronger teacher, longer schedule: "]
    assert [table.title.partition("fashion_mnist, ")[0] for table in made.tables] == titles


def test_a_longer_schedule_alone_is_enough_but_not_for_what_it_lacks(tmp_path):
    save(tmp_path / "long", [make_result()])
    made = report.whole_report(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in made.paths][-1] == "index.html" and len(made.paths) == 4
    with pytest.raises(UsageError, match="tuning holds no result files"):
        report.whole_report(tmp_path, tuning=True)


def test_tuning_alone_is_enough(tmp_path):
    write_result(tmp_path / "tuning/fashion_mnist/plain/a.json", make_result(split="validation"))
    made = report.whole_report(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in made.paths] == ["tuning/fashion_mnist/plain.md", "index.html"]
    assert made.warnings == [] and len(made.tables) == 1


def test_an_empty_or_damaged_longer_schedule_hides_nothing(tmp_path):
    save(tmp_path, [make_result()])
    (tmp_path / "long/fashion_mnist/plain/ab/n50").mkdir(parents=True)
    assert report.whole_report(tmp_path).warnings == []
    (tmp_path / "long/fashion_mnist/plain/ab/n50/seed1.json").write_text("{")
    (line,) = report.whole_report(tmp_path).warnings
    assert "long schedule: fashion_mnist/plain/ab/n50/seed1.json is left out" in line and line.split(": ", 1)[1] in (
        html.unescape((tmp_path / "index.html").read_text())
    )


def launch(*arguments):
    command = [sys.executable, ROOT / "launch" / "report.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"})


def test_command_line(varied):
    root, _ = varied
    write_result(root / "tuning/fashion_mnist/plain/a.json", make_result(split="validation"))
    save(root / "long", [make_result(seed=5, accuracy=0.91)])
    done = launch("--results", root)
    assert done.returncode == 0, done.stderr
    for title in ("fashion_mnist, plain: ", "long schedule: fashion_mnist, plain: ", "tuning: fashion_mnist, track plain: "):
        assert title in done.stdout
    for path in ("fashion_mnist/plain.png", "tuning/fashion_mnist/plain.md", "long/fashion_mnist/plain.md", "index.html"):
        assert f"wrote {root}/{path}" in done.stdout
    tuned = launch("--results", root, "--tuning", "True").stdout
    assert f"wrote {root}/tuning/fashion_mnist/plain.md" in tuned and f"wrote {root}/index.html" in tuned and "plain.csv" not in tuned
    nothing = launch("--results", root / "nowhere")
    assert (nothing.returncode, nothing.stderr.count("\n")) == (2, 1) and "nowhere" in nothing.stderr
