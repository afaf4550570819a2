"""tuning: made-up runs on the validation split in, the record of all that was tried out; means are recomputed here."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from scipy import stats
from test_report import check_image, make_result

from wdkd import config, report, tuning
from wdkd.result import write_result


def validation(n=10, seed=0, accuracy=0.7, epsilon=0.0, method="wdkd", optimizer=None, **options):
    made = make_result(method, n, seed, accuracy, epsilon, "validation")
    parts = {"method": dataclasses.replace(made.config.method, **options), "optimizer": optimizer or config.OptimizerConfig()}
    return dataclasses.replace(made, config=dataclasses.replace(made.config, **parts))


def tune(root, results):
    for i, r in enumerate(results):
        write_result(root / "tuning" / r.dataset / r.track / f"{i}-{r.method}-{r.epsilon}.json", r)


def report_text(root):
    made = report.tuning_report(root)
    return made, (root / "tuning/fashion_mnist/plain.md").read_text()


def rows(text, heading):
    """The rows of the first table below a heading that starts so, without emphasis, as lists of cells; headings first."""
    table = re.search(r"(\|.*\n)+", text.split(f"## {heading}")[1]).group()
    return [[c.strip("* ") for c in re.split(r" \| ", line[2:-2])] for line in table.splitlines() if not line.startswith("| ---")]


def warnings(made):
    return [line.removeprefix("fashion_mnist/plain: ") for line in made.warnings]


def test_the_best_mean_is_chosen(tmp_path):
    bumps = {0.0: 0.0, 0.01: 0.012, 0.1: 0.01, 1.0: -0.03}
    tune(tmp_path, [validation(10, s, 0.7 + b + s / 50, e) for e, b in bumps.items() for s in range(3)])
    made, text = report_text(tmp_path)
    head, *found = rows(text, "All that was tried: wdkd, 10 images per class")
    assert head == ["epsilon", "accuracy", "gain", "choice"]
    deviation = np.std([0, 2, 4], ddof=1)
    assert [row[:2] + row[3:] for row in found] == [
        [f"{e:g}", f"{72 + 100 * b:.2f} ± {deviation:.2f} (3)", "chosen" if e == 0.01 else ""] for e, b in sorted(bumps.items())
    ]
    assert rows(text, "Chosen")[1:] == [["10", "wdkd", f"73.20 ± {deviation:.2f} (3)", "4", "0.01"]]
    assert made.warnings == [] and len(made.paths) == 2 and made.tables[0].row_count == 1
    check_image(tmp_path / "tuning/fashion_mnist/plain.png")


def test_every_option_is_a_column_and_rows_are_in_the_order_of_their_values(tmp_path):
    grid = list(itertools.product((4.0, 1.0, 16.0), (3e-3, 1e-3), ("mse", "kl"), (0.1, 0.0, 0.01)))
    level = {point: 0.5 + 0.3 * np.random.default_rng(k).random() for k, point in enumerate(grid)}
    tune(
        tmp_path,
        [
            validation(10, 0, a, e, temperature=t, loss=loss, optimizer=config.OptimizerConfig(learning_rate=r))
            for (t, r, loss, e), a in level.items()
        ],
    )
    made, text = report_text(tmp_path)
    head, *found = rows(text, "All that was tried")
    assert head == ["learning rate", "loss", "temperature", "epsilon", "accuracy", "choice"]
    points = [(float(t), float(r), loss, float(e)) for r, loss, t, e, _, _ in found]
    assert points == sorted(level, key=lambda p: (p[1], p[2], p[0], p[3]))
    assert [row[4] for row in found] == [f"{100 * level[p]:.2f} (1)" for p in points]
    best = max(level, key=level.get)
    assert [p for p, row in zip(points, found, strict=True) if row[5] == "chosen"] == [best]
    assert rows(text, "Chosen")[1][2:] == [f"{100 * level[best]:.2f} (1)", "36", f"{best[1]:g}", best[2], f"{best[0]:g}", f"{best[3]:g}"]
    for t in (1.0, 4.0, 16.0):
        assert f"{t:g} → {100 * max(a for p, a in level.items() if p[0] == t):.2f} (of 12)" in text


GAINS = {
    # (method, epsilon, the other options): accuracies of seeds 0, 1, 2; those of one row are told from the next by what they add.
    ("kd", 0.0, ()): (0.50, 0.60, 0.55),
    ("kd", 0.0, (("temperature", 1.0),)): (0.10, 0.20, 0.30),
    ("wdkd", 0.1, ()): (0.51, 0.63, 0.57),
    ("wdkd", 0.1, (("aggregate", "max"),)): (0.50, 0.61, 0.56),
    ("wdkd", 0.1, (("temperature", 1.0),)): (0.05, 0.25, 0.35),
    ("wdkd", 0.1, (("temperature", 16.0),)): (0.5, 0.5, 0.5),
    ("sobolev", 0.0, (("sobolev_weight", 0.1),)): (0.60, 0.65, 0.60),
    ("sobolev", 0.1, (("sobolev_weight", 0.1),)): (0.61, 0.68, 0.60),
    ("ab", 0.0, ()): (0.7, 0.7, 0.7),
    ("ab", 0.1, ()): (0.69, 0.70, 0.67),
}


def with_gains(*chosen):
    """Runs of all seeds of those keys of GAINS."""
    return [validation(10, s, a, e, m, **dict(o)) for m, e, o in chosen for s, a in enumerate(GAINS[m, e, o])]


def difference(mine, other):
    """The gain of one key of GAINS over another, as the report has it."""
    d = 100 * (np.array(GAINS[mine]) - GAINS[other])
    half = stats.t.ppf(0.975, 2) * d.std(ddof=1) / np.sqrt(3)
    return f"{d.mean():+.2f} [{d.mean() - half:+.2f}, {d.mean() + half:+.2f}] (3)"


def test_a_single_combination_has_its_gain(tmp_path):
    plain, term = ("kd", 0.0, ()), ("wdkd", 0.1, ())
    tune(tmp_path, with_gains(plain, term))
    _, text = report_text(tmp_path)
    assert f"One combination: 57.00 ± 6.00 (3), gain {difference(term, plain)}.\n\nGain: over the same at radius 0, or over kd" in text
    assert "One combination: 55.00 ± 5.00 (3).\n" in text


def test_gains_are_over_the_same_without_the_term_and_the_same_seed(tmp_path):
    tune(tmp_path, with_gains(*GAINS))
    _, text = report_text(tmp_path)

    def gains(method):
        head, *found = rows(text, f"All that was tried: {method}, 10 images per class")
        return [row[head.index("gain")] for row in found]

    cool, plain = ("temperature", 1.0), ("kd", 0.0, ())
    assert gains("wdkd") == [  # By aggregate and temperature.
        difference(("wdkd", 0.1, (("aggregate", "max"),)), plain),
        difference(("wdkd", 0.1, (cool,)), ("kd", 0.0, (cool,))),
        difference(("wdkd", 0.1, ()), plain),
        "",
    ]
    weight = (("sobolev_weight", 0.1),)
    assert gains("sobolev") == [difference(("sobolev", 0.0, weight), plain), difference(("sobolev", 0.1, weight), ("sobolev", 0.0, weight))]
    assert gains("ab") == ["", difference(("ab", 0.1, ()), ("ab", 0.0, ()))]
    assert "gain" not in rows(text, "All that was tried: kd")[0]


def test_one_seed_has_no_gain(tmp_path):
    tune(tmp_path, [validation(epsilon=0.0), validation(epsilon=0.1, accuracy=0.8)])
    assert rows(report_text(tmp_path)[1], "All that was tried")[0] == ["epsilon", "accuracy", "choice"]


def test_sizes_and_methods_are_chosen_for_apart(tmp_path):
    tune(
        tmp_path,
        [validation(n, 0, a + (n or 0) / 1000, e, m) for n in (10, None) for m in ("kd", "wdkd") for e, a in ((0, 0.7), (0.1, 0.6))],
    )
    _, text = report_text(tmp_path)
    assert [row[:2] + row[-1:] for row in rows(text, "Chosen")[1:]] == [
        ["10", "kd", "0"],
        ["10", "wdkd", "0"],
        ["full", "kd", "0"],
        ["full", "wdkd", "0"],
    ]
    assert text.count("## All that was tried: ") == 4 and "wdkd, all images" in text


@pytest.mark.parametrize(("spread", "count"), [((0.0,), 1), ((0.257, 0.01, 0.219), 3)])
def test_of_equal_means_the_smallest_epsilon_then_the_first(tmp_path, spread, count):
    """Seeds in another order add up to another last bit, which must not decide."""
    runs = []
    for place, (t, e) in enumerate(((1.0, 0.1), (4.0, 0.0), (2.0, 0.0), (8.0, 0.0))):
        for seed, bump in enumerate(np.roll(spread, place)):
            runs.append(validation(10, seed, 0.6 + bump if t != 8.0 else 0.5, e, temperature=t))
    tune(tmp_path, runs)
    _, text = report_text(tmp_path)
    assert [row[:2] for row in rows(text, "All that was tried")[1:] if row[-1] == "chosen"] == [["2", "0"]]
    assert rows(text, "Chosen")[1][2].endswith(f"({count})")


def test_options_that_a_method_never_looks_at_make_no_trials(tmp_path):
    tune(
        tmp_path,
        [validation(10, s, 0.7, 0.0, m, sobolev_weight=float(s), ab_margin=1.0 + s) for m in ("ce", "kd", "sobolev") for s in (0, 1)],
    )
    _, text = report_text(tmp_path)
    found = {row[1]: row for row in rows(text, "Chosen")[1:]}
    assert rows(text, "Chosen")[0][-1] == "sobolev weight"
    assert (found["ce"][3:], found["kd"][3:], found["sobolev"][3:]) == (["1", "-"], ["1", "-"], ["2", "0"])
    assert "One combination: 70.00 ± 0.00 (2)." in text


def test_what_changes_no_result_makes_no_trials(tmp_path):
    quick = dataclasses.replace(validation().config, train=config.TrainConfig(checkpoint_every=5), cache=config.CacheConfig(mode="off"))
    tune(tmp_path, [validation(seed=0), dataclasses.replace(validation(seed=1), config=quick)])
    assert "One combination: 70.00 ± 0.00 (2)." in report_text(tmp_path)[1]


def test_values_that_look_alike_are_told_apart(tmp_path):
    rates = (0.00123456789, 0.00123456788, 0.001)
    tune(tmp_path, [validation(accuracy=0.7 + r, optimizer=config.OptimizerConfig(learning_rate=r)) for r in rates])
    assert [row[0] for row in rows(report_text(tmp_path)[1], "All that was tried")[1:]] == ["0.001", "0.00123456788", "0.00123456789"]


def test_runs_seen_on_test_are_left_out(tmp_path):
    wrong = [make_result("wdkd", 10, 0, 0.99, 0.3), dataclasses.replace(validation(accuracy=0.99, epsilon=0.4), dataset="digits")]
    tune(tmp_path, [validation(), validation(accuracy=0.6, epsilon=0.1), wrong[0], validation(accuracy=0.9, epsilon=0.2)])
    write_result(tmp_path / "tuning/fashion_mnist/plain/x.json", wrong[1])
    made, text = report_text(tmp_path)
    assert [row[0] for row in rows(text, "All that was tried")[1:]] == ["0", "0.1", "0.2"]
    for line, pattern in zip(warnings(made), ("evaluated on test", "digits/plain", "epsilon 0.2 .the largest"), strict=True):
        assert re.search(pattern, line) and line in text


def test_unequal_and_repeated_seeds_are_named(tmp_path):
    tune(tmp_path, [validation(seed=0), validation(seed=1), validation(accuracy=0.6, epsilon=0.1)])
    assert "not every combination was run with the same seeds" in report_text(tmp_path)[0].warnings[0]
    tune(tmp_path, [validation(seed=0), validation(seed=1), validation(accuracy=0.6, epsilon=0.1), validation(accuracy=0.6, epsilon=0.1)])
    assert "some runs are there twice" in report_text(tmp_path)[0].warnings[0]


@pytest.mark.parametrize(("best", "ends"), [(1.0, "temperature 1 (the smallest)"), (4.0, ""), (16.0, "temperature 16 (the largest)")])
def test_a_choice_at_the_end_of_what_was_tried_is_named(tmp_path, best, ends):
    tune(tmp_path, [validation(accuracy=0.8 if t == best else 0.7, temperature=t, through_teacher=False) for t in (1.0, 4.0, 16.0)])
    lines = warnings(report_text(tmp_path)[0])
    assert lines == ([f"wdkd, 10 images per class: chosen at the end of what was tried, so try beyond: {ends}"] if ends else [])


def test_zero_is_the_natural_end_of_a_range(tmp_path):
    tune(tmp_path, [validation(), validation(accuracy=0.6, epsilon=0.1)])
    made, text = report_text(tmp_path)
    assert made.warnings == [] and rows(text, "Chosen")[1][-1] == "0"


# --- Plots --------------------------------------------------------------------------------------------------------------------


def drawn(results):
    """The panels of a plot: heading, label of the x axis, curves by label as lists of (x, mean), and the ring."""
    return [
        (p.heading, p.x_label, {label: [point[:2] for point in curve] for label, curve in p.curves.items()}, p.ring)
        for p in tuning.panels(tuning.studies(results))
    ]


def test_a_curve_for_each_remaining_setting_with_several_epsilons():
    runs = [validation(10, s, 0.7 + t / 100 - e + s / 50, e, temperature=t) for t in (1.0, 4.0) for e in (0.0, 0.1) for s in (0, 1)]
    runs += [validation(10, s, 0.9, 0.0, temperature=16.0) for s in (0, 1)]
    ((heading, label, curves, ring),) = drawn(runs)
    assert (heading, label) == ("wdkd, 10 images per class", "epsilon (pixels in [0, 1])")
    assert list(curves) == ["temperature 1", "temperature 4"]  # One epsilon with temperature 16 is no curve, though it was chosen.
    np.testing.assert_allclose(curves["temperature 4"], [(0.0, 75.0), (0.1, 65.0)])
    assert ring is None


def test_the_weight_of_sobolev_is_a_radius_too():
    runs = [validation(10, 0, 0.7 + w, 0.0, "sobolev", sobolev_weight=w) for w in (0.0, 0.1, 0.01)]
    ((heading, label, curves, ring),) = drawn([*runs, validation(10, 0, 0.5, 0.1, "wdkd", sobolev_weight=9.0)])
    assert (heading, label) == ("sobolev, 10 images per class", "weight of the Jacobian term")
    np.testing.assert_allclose(curves["sobolev"], [(0.0, 70.0), (0.01, 71.0), (0.1, 80.0)])
    np.testing.assert_allclose(ring, (0.1, 80.0))


def test_without_several_radii_there_is_no_plot(tmp_path):
    tune(tmp_path, [validation(accuracy=t / 10, temperature=t) for t in (1.0, 4.0)])
    made, text = report_text(tmp_path)
    assert [path.suffix for path in made.paths] == [".md"] and "![" not in text


def test_zero_has_a_place_on_the_axis_of_radii():
    runs = [validation(10, 0, 0.7 - e, e) for e in (0.0, 0.001, 0.1)]
    (axes,) = tuning.figure("title", tuning.panels(tuning.studies(runs))).axes
    places = axes.transData.transform([(x, 70) for x in (0.0, 0.001, 0.1)])[:, 0]
    assert (np.diff(places) > 20).all() and [t.get_text() for t in axes.get_xticklabels()] == ["0", "0.001", "0.1"]
