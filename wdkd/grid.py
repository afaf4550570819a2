"""The runs of a sweep: every combination of a grid's values, each an edit of one config, with its directory and its result's place."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from wdkd.config import Config, differences
from wdkd.errors import UsageError
from wdkd.evaluate import TRACKS
from wdkd.methods import create_stages
from wdkd.result import place
from wdkd.vary import Axis, edited, read_axis, suffix

MOST_RUNS = 100_000


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of these, each an edit of one config."""

    methods: tuple[str, ...]
    """Names of methods."""
    n_per_class: tuple[int, ...]
    """Training images per class; 0 means all of them."""
    seeds: tuple[int, ...]
    augmentations: tuple[Literal["none", "flip_crop", "matching"], ...] = ("none",)
    """none is the plain track."""
    epsilons: tuple[float, ...] = ()
    """Radii to try; none given: each method's own. Several need --data.evaluate-on validation."""
    vary: tuple[str, ...] = ()
    """Any other options to try, as method.temperature=1,4 optimizer.learning-rate=1e-3,3e-3, on validation too."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep: its config, its directory, below which its result is also written, and where recorded teachers are kept."""

    config: Config
    workdir: Path
    publish: Path
    cache: Path

    @property
    def root(self) -> Path:
        """The directory of all of its sweep's runs."""
        return self.workdir.parents[4]

    @property
    def variant(self) -> str:
        """The method, with the values of what else the grid tries."""
        return self.workdir.parts[-3]

    @property
    def target(self) -> Path:
        """The file that the result is also written to, where reports look for it; variants of a method are apart in tuning alone."""
        data, track = self.config.data, TRACKS[self.config.augment.name]
        name = self.variant if data.evaluate_on == "validation" else self.config.method.name
        return self.publish / place(data.dataset) / track / name / f"n{data.n_per_class or 'full'}" / f"seed{self.config.seed}.json"


def expand(grid: Grid, base: Config, workdir: Path, results: Path) -> list[Job]:
    """The grid's runs, small N first. Results of tuning (on validation) go below results/tuning, apart from the tables'.

    Raises:
      UsageError: for an empty axis, an option out of range in any combination, too many of them, or several values of what does not
        tell results on the test set apart.
    """
    for field in ("methods", "n_per_class", "seeds", "augmentations"):
        if not getattr(grid, field):
            raise UsageError(f"{field} is empty; name at least one")
    varied = [read_axis(text) for text in grid.vary]
    names = [axis.option for axis in varied]
    if len(set(names)) < len(names):
        raise UsageError(f"vary names an option twice ({', '.join(names)}); give all of its values at once, as {names[0]}=V1,V2")
    # Seeds last: methods of one seed may record the same teacher's outputs, and would at the same time.
    tried = (grid.epsilons or (None,), *(axis.values for axis in varied))
    axes = (grid.n_per_class, grid.augmentations, grid.methods, *tried, grid.seeds)
    if (count := math.prod(map(len, axes))) > MOST_RUNS:
        raise UsageError(f"the grid has {count:,} runs; at most {MOST_RUNS:,} are taken: divide it")
    jobs = [_job(base, workdir, results, point, varied) for point in itertools.product(*axes)]
    if (len(grid.epsilons) > 1 or varied) and any(job.config.data.evaluate_on == "test" for job in jobs):
        names += ["method.epsilon"] * (len(grid.epsilons) > 1)
        raise UsageError(
            f"{', '.join(names)} would be tried on the test set, where results that differ in nothing else are one file; "
            "tune with --data.evaluate-on validation, then give the one value that is best"
        )
    return merged(jobs)


def _job(base: Config, workdir: Path, results: Path, point: tuple[Any, ...], varied: list[Axis]) -> Job:
    n, augmentation, method, epsilon, *values, seed = point
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, n_per_class=n or None),
        augment=dataclasses.replace(base.augment, name=augmentation),
        method=dataclasses.replace(base.method, name=method, epsilon=base.method.epsilon if epsilon is None else epsilon),
        seed=seed,
    )
    variant = method if config.method.epsilon is None else f"{method}-epsilon{config.method.epsilon:g}"
    for axis, value in zip(varied, values, strict=True):
        config = edited(config, axis.option, value)
        variant += suffix(axis.option, value)
    create_stages(config.check().method)
    name = Path(place(config.data.dataset)) / augmentation / variant / f"n{n or 'full'}" / f"seed{seed}"
    publish = results / "tuning" if config.data.evaluate_on == "validation" else results
    return Job(config, workdir / name, publish, workdir / "teacher-cache")


def merged(jobs: Iterable[Job]) -> list[Job]:
    """The jobs in their order, each once. Raises UsageError where two that differ have one directory or one result file."""
    by_workdir: dict[str, Job] = {}
    by_target: dict[str, Job] = {}
    for job in jobs:
        other = by_workdir.setdefault(os.path.abspath(job.workdir), job)
        if other != job:
            what = "; ".join(differences(other.config, job.config)[:4]) or f"results: {other.publish}, {job.publish}"
            raise UsageError(f"{job.workdir} is the directory of two runs that differ ({what}); give one of them another workdir")
        other = by_target.setdefault(os.path.abspath(job.target), job)
        if other != job:
            raise UsageError(f"{job.target} is the result of both {other.workdir} and {job.workdir}; give one of them another results")
    return list(by_workdir.values())
