"""All that was tried on validation images: a record for each method and number of images, and what was chosen in each."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wdkd import figures, settings, tables
from wdkd.collection import Collection, TrackReport, collect, matching
from wdkd.document import Bullets, Cell, Plot, Section, Table, word
from wdkd.result import Result, results_path

RADII = {"method.epsilon": "epsilon (pixels in [0, 1])", "method.sobolev_weight": "weight of the Jacobian term"}
"""Options that accuracy is drawn against, with the axis's label."""
OF_THE_TERM = ("method.epsilon", "method.ground_norm", "method.aggregate", "method.through_teacher")
"""Options of the worst-case term, which change nothing at radius 0."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """The runs of one combination of options, one a seed."""

    options: Mapping[str, Any]
    """Those in which the trials of its study differ, by dotted name."""
    epsilon: float
    results: Sequence[Result]
    gain: tables.Difference | None = None
    """Over the same without the term (see `without_term`); None where that was not run."""

    @property
    def accuracy(self) -> tables.Summary:
        """Over the seeds, in %."""
        return tables.percent(self.results)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(r.seed for r in self.results))


@dataclasses.dataclass(frozen=True)
class Study:
    """The trials with one method and number of images, in the order of their options' values, radii last."""

    n: int | None
    method: str
    names: Sequence[str]
    """The options in which they differ."""
    trials: Sequence[Trial]

    @property
    def title(self) -> str:
        """What it is a study of."""
        return f"{self.method}, {'all images' if self.n is None else f'{self.n} images per class'}"

    @property
    def chosen(self) -> Trial:
        """The trial of the best mean; of equally good ones that with the smallest epsilon, then the first."""
        return min(self.trials, key=lambda t: (-round(t.accuracy.mean, 9), t.epsilon))


def tuning_collection(directory: Path) -> Collection:
    """Reports on the runs in tuning/<dataset>/<track>/ below a directory of results.

    Every JSON file there, at any depth, is one run evaluated on the validation split. One evaluated on another split is left
    out and named, because choosing by it would be tuning on the test set; and so are files that cannot be read.
    """
    root = directory / "tuning"
    return collect(root, matching(root, "*/*/**/*.json"), objection, track_report)


def objection(where: Path, result: Result) -> str | None:
    """Why a run at <dataset>/<track>/... may not be tuned by, if it may not."""
    right = results_path("", result).parts[:2]
    if where.parts[:2] != right:
        return f"it holds a run of {'/'.join(right)}; move it there"
    split = result.evaluation.split
    return None if split == "validation" else f"it was evaluated on {split}; run it again with --data.evaluate-on validation"


def track_report(results: Sequence[Result], warnings: list[str]) -> TrackReport:
    """What is said of the tuning on one data set and track."""
    found = studies(results)
    lines = [*warnings, *tables.mixed(results), *(line for study in found for line in doubts(study))]
    name = f"{results[0].dataset}, track {results[0].track}"
    title = f"{name}: tuning on validation images"
    image = Plot(f"{results[0].track}.png", "validation accuracy against the radius", lambda: figure(name, panels(found)))
    return TrackReport(
        section(title, image, found, lines),
        tables.rich_table(f"{name}: chosen on validation images, % (seeds)", chosen_table(found)),
        lines,
    )


# --- Trials ---------------------------------------------------------------------------------------------------------------


def studies(results: Sequence[Result]) -> list[Study]:
    """The results by number of images and method, and there by the options in which they differ."""
    cells = tables.in_cells(results)
    sizes, methods = tables.size_order(n for _, n in cells), tables.method_order(m for m, _ in cells)
    return [study(n, m, cells[m, n], cells.get(("kd", n), [])) for n in sizes for m in methods if (m, n) in cells]


def study(n: int | None, method: str, results: Sequence[Result], plain: Sequence[Result]) -> Study:
    """The trials of one method and number of images; `plain`: the runs of kd with as many."""
    every = [settings.options(r) for r in results]
    names = sorted(settings.differing(every), key=lambda name: (name in RADII, settings.short(name)))
    trials: dict[tuple, list[Result]] = {}
    for result, values in zip(results, every, strict=True):
        trials.setdefault(tuple(values[name] for name in names), []).append(result)
    ordered = sorted(trials, key=lambda values: [settings.sort_key(value) for value in values])
    gains = {v: tables.paired_difference(trials[v], without_term(trials[v][0], results, plain)) for v in ordered}
    return Study(n, method, names, [Trial(dict(zip(names, v, strict=True)), trials[v][0].epsilon, trials[v], gains[v]) for v in ordered])


def without_term(run: Result, own: Sequence[Result], plain: Sequence[Result]) -> list[Result]:
    """The runs, one for each seed, that are as `run` but for what it adds: of its method at radius 0, or else, of wdkd and sobolev, kd's.

    All other options that both methods look at are the same.
    """
    mine = settings.options(run)

    def alike(other: Result) -> bool:
        options = settings.options(other)
        return other.epsilon == 0 and all(mine[name] == options[name] for name in mine.keys() & options.keys() - set(OF_THE_TERM))

    if run.epsilon > 0 and (found := [other for other in own if alike(other)]):
        return found
    return [other for other in plain if alike(other)] if run.method in ("wdkd", "sobolev") else []


def doubts(study: Study) -> list[str]:
    """Lines about a choice that rests on unequal or repeated seeds, or lies at the end of what was tried."""
    lines, seeds = [], [trial.seeds for trial in study.trials]
    if any(len(set(s)) < len(s) for s in seeds):
        lines.append(f"{study.title}: some runs are there twice (same options and seed) and count twice")
    elif len(set(seeds)) > 1:
        lines.append(f"{study.title}: not every combination was run with the same seeds, so the means are of different subsets")
    ends = [f"{settings.short(name)} {end}" for name in study.names if (end := end_of_range(study, name))]
    if ends:
        lines.append(f"{study.title}: chosen at the end of what was tried, so try beyond: {', '.join(ends)}")
    return lines


def end_of_range(study: Study, name: str) -> str:
    """The chosen value of an option and which end of the tried ones it is; empty where it is neither, or 0, or no number."""
    numbers = sorted({trial.options[name] for trial in study.trials if settings.is_number(trial.options[name])})
    value = study.chosen.options[name]
    if len(numbers) < 2 or value not in (numbers[0], numbers[-1]) or value == 0:
        return ""
    return f"{settings.written(value)} (the {'largest' if value == numbers[-1] else 'smallest'})"


def effects(study: Study) -> list[str]:
    """For each option, the best mean that was reached with each of its values."""
    lines = []
    for name in study.names:
        means: dict[str, list[float]] = {}
        for trial in sorted(study.trials, key=lambda trial: settings.sort_key(trial.options[name])):
            means.setdefault(settings.written(trial.options[name]), []).append(trial.accuracy.mean)
        lines.append(
            f"{settings.short(name)}: " + "; ".join(f"{value} → {max(found):.2f} (of {len(found)})" for value, found in means.items())
        )
    return lines


# --- Words, tables and plots ------------------------------------------------------------------------------------------------

GAIN = (
    "Gain: over the same at radius 0, or over kd with the same options, in points; runs with the same seed and subset: "
    "mean [95 % t-interval] (number of pairs)."
)


def section(title: str, image: Plot, found: Sequence[Study], warnings: Sequence[str]) -> Section:
    """The whole record; `image` is left out where no study has several radii."""
    return Section(
        title,
        [
            "Made by `launch/report.py` from runs evaluated on the validation images, which no training subset contains. Accuracies: "
            "mean ± sample standard deviation (number of seeds), %. Chosen: the best mean; of equal ones that with the smallest epsilon, "
            "then the first row.",
            Bullets(warnings, warning=True),
            Section("Chosen", [chosen_table(found)]),
            image if panels(found) else "",
            *(Section(f"All that was tried: {study.title}", trial_blocks(study)) for study in found),
        ],
    )


def chosen_table(found: Sequence[Study]) -> Table:
    """The chosen combination of each study; a dash where its method does not look at an option."""
    names = list(dict.fromkeys(name for study in found for name in study.names)) or ["method.epsilon"]
    rows = []
    for study in found:
        first = study.chosen.results[0]
        options = settings.options(first)
        size = Cell(tables.size_name(study.n), first.train_size / len(first.evaluation.class_names))
        rows.append([size, word(study.method), accuracy_cell(study.chosen), Cell(str(len(study.trials)), len(study.trials))])
        rows[-1] += [option_cell(options[name]) if name in options else Cell("-", None, "absent") for name in names]
    return Table(["images per class", "method", "accuracy", "combinations", *map(settings.short, names)], rows)


def trial_blocks(study: Study) -> list[str | Bullets | Table]:
    """All trials of a study, and what each option did."""
    paired = any(trial.gain is not None and trial.gain.low is not None for trial in study.trials)
    column, note = (["gain"], [GAIN]) if paired else ([], [])
    if not study.names:
        gain = f", gain {study.chosen.gain}" if paired else ""
        return [f"One combination: {accuracy_cell(study.chosen).text}{gain}.", *note]
    rows = []
    for trial in study.trials:
        best = trial is study.chosen
        values = [option_cell(trial.options[name]) for name in study.names]
        mark = Cell("chosen", 1) if best else Cell("", 0)
        gain = [Cell("", None) if trial.gain is None else Cell(str(trial.gain), trial.gain.mean)] if paired else []
        rows.append([*values, dataclasses.replace(accuracy_cell(trial), kind="best" if best else "plain"), *gain, mark])
    table = Table([*map(settings.short, study.names), "accuracy", *column, "choice"], rows)
    if len(study.names) == 1:
        return [table, *note]
    best_of = "The best mean with each value of an option, whatever the others were (of that many combinations):"
    return [table, *note, best_of, Bullets(effects(study))]


def accuracy_cell(trial: Trial) -> Cell:
    """A trial's accuracy."""
    return Cell(str(trial.accuracy), trial.accuracy.mean)


def option_cell(value: Any) -> Cell:
    """An option's value; numbers are sorted by size."""
    return Cell(settings.written(value), value if settings.is_number(value) else settings.written(value))


def panels(found: Sequence[Study]) -> list[figures.Panel]:
    """A panel for each study and radius of which several values were tried with the other options as they were."""
    drawn = []
    for study in found:
        for name in (name for name in study.names if name in RADII):
            curves: dict[str, list[Trial]] = {}
            for trial in study.trials:
                others = [f"{settings.short(k)} {settings.written(v)}" for k, v in trial.options.items() if k != name]
                curves.setdefault(", ".join(others) or study.method, []).append(trial)
            curves = {label: trials for label, trials in curves.items() if len(trials) > 1}
            ring = next(((t.options[name], t.accuracy.mean) for ts in curves.values() for t in ts if t is study.chosen), None)
            if curves:
                points = {label: [point(trial, name) for trial in trials] for label, trials in curves.items()}
                drawn.append(figures.Panel(study.title, RADII[name], points, ring))
    return drawn


def point(trial: Trial, name: str) -> tuple[float, float, float | None]:
    """A trial as a point above the value of an option."""
    return trial.options[name], trial.accuracy.mean, trial.accuracy.deviation


def figure(title: str, drawn: Sequence[figures.Panel]) -> figures.Figure:
    """Accuracy against the radii."""
    return figures.radius_figure(drawn, f"{title} (ring: chosen)", "validation")
