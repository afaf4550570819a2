"""The command lines of training and of sweeps, and what the launch scripts share."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wdkd import parallel, parsing
from wdkd.budget import Student, choose, read_budgets
from wdkd.config import Config
from wdkd.data import load_dataset
from wdkd.errors import UsageError
from wdkd.grid import Grid, Job, expand, merged
from wdkd.grid_file import read_grid
from wdkd.interruption import Interruption
from wdkd.methods import METHODS
from wdkd.models import check_image_shape
from wdkd.notes import note
from wdkd.parsing import parse
from wdkd.result import Result, results_path, write_result
from wdkd.sweep import Cluster, run_sweep, unpublished
from wdkd.train import run
from wdkd.vary import option_types

Preset = Literal["digits", "fashion_mnist", "cifar10", "folder"]


def main(cls: type[Any], function: Callable[[Any], Any], **options: Any) -> None:
    """As `parsing.main`, with compiled programs kept between processes."""
    parallel.enable_compilation_cache()
    parsing.main(cls, function, **options)


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """The command line of a training run."""

    workdir: str
    """Directory of the run: config, subset, metrics, checkpoints, result. Given again, the run goes on."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: Preset = "digits"
    """Defaults for a data set, with --data.folder those of `folder`; the options below change them."""
    student: Student | None = None
    """auto: the largest network within --budget, instead of --model.name and --model.width; auto-resnet and so on: of that family."""
    budget: tuple[str, ...] = ()
    """What the student may take, for --student auto: 200k-params, 10MFLOPs, 1MB (of its export), or several of these."""
    results: str | None = None
    """Also write the result to RESULTS/<data set>/<track>/<method>/n<N>/seed<k>.json, where launch/report.py finds it."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes. This and the next two are found out below srun, mpirun and on TPU pods."""
    processes: int | None = None
    """How many processes the run has."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    connect_timeout: int = 60
    """Seconds that the processes wait for each other at the start."""


@dataclasses.dataclass(frozen=True)
class SweepArguments:
    """The command line of a sweep."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    axes: Annotated[Grid, tyro.conf.arg(name="")]
    preset: Preset = "digits"
    """Defaults for a data set; the options below change them, for all runs."""
    workdir: str = "runs"
    """Directory of the runs' directories."""
    results: str = "results"
    """Directory of the results, where launch/report.py finds them."""
    student: Student | None = None
    """auto: the largest network within --budget, as for launch/distill.py."""
    budget: tuple[str, ...] = ()
    """What the student may take, for --student auto: 200k-params, 10MFLOPs, 1MB, or several of these."""
    grid: str | None = None
    """TOML file of [[sweep]] tables of these options, and [default] for what they share; those of the command line hold for all."""
    skip_published: bool = False
    """Leave out the runs whose result is below --results already, as in a fresh clone, where the runs' own directories are not."""
    workers: int = 1
    """Runs at a time; the cores are shared out between them."""
    executor: Literal["local", "ray"] = "local"
    """ray: runs are tasks of a Ray cluster, whose nodes have this code, this directory, the data and the runs at the same paths."""
    address: str | None = None
    """HOST:PORT of the Ray cluster's head, or auto for the one that this machine is part of; None: one of this machine alone."""
    cpus_per_run: int = 1
    """CPUs of each run on Ray."""
    gpus_per_run: int = 0
    """GPUs of each run on Ray; 0: runs are on the CPU."""


SHARED = ("preset", "workdir", "results", "student", "budget")
"""Options of a sweep that a grid file may have too, beside those of its runs; the others say how it is executed."""


def train(presets: Mapping[str, Config], *, description: str | None) -> None:
    """The main function of the scripts that train: options are edits of the preset that --preset names."""
    name = _preset_name(presets, sys.argv[1:])
    default = TrainArguments(workdir=tyro.MISSING, config=presets[name], preset=name)

    def check_and_train(given: TrainArguments) -> None:
        _check_student(given, presets)
        _train(given)

    main(TrainArguments, check_and_train, description=description, default=default)


def sweep(presets: Mapping[str, Config], *, description: str | None) -> None:
    """The main function of launch/sweep.py."""
    function = functools.partial(_sweep, presets)
    main(SweepArguments, function, description=description, default=_default_sweep(presets, sys.argv[1:]))


def _default_sweep(presets: Mapping[str, Config], argv: Sequence[str]) -> SweepArguments:
    name = _preset_name(presets, argv)
    axes = Grid(methods=tuple(METHODS), n_per_class=(50,), seeds=(0,))
    return SweepArguments(config=presets[name], axes=axes, preset=name)


def _preset_name(presets: Mapping[str, Config], argv: Sequence[str]) -> Any:
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", nargs="?")
    peek.add_argument("--data.folder", nargs="?", dest="folder")
    given, _ = peek.parse_known_args(argv)
    # A name that is not there is left for tyro to refuse; as a default, it would be accepted.
    return given.preset if given.preset in presets else "digits" if given.folder is None else "folder"


def _sweep(presets: Mapping[str, Config], arguments: SweepArguments) -> None:
    cluster = _cluster(arguments)
    jobs = _jobs(presets, arguments) if arguments.grid is None else _declared_jobs(presets, arguments.grid)
    places = ", ".join(dict.fromkeys(str(job.publish) for job in jobs))
    rest = unpublished(jobs) if arguments.skip_published else jobs
    if len(rest) < len(jobs):
        print(f"{len(jobs) - len(rest)} of {len(jobs)} runs are left out, as their results are below {places}", flush=True)
    failed = run_sweep(rest, arguments.workers, cluster)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are complete; results are below {places}")
    for job, line in failed:
        print(f"not complete: {job.workdir}: {line}")
    if failed:
        job, line = failed[0]
        raise UsageError(f"{len(failed)} runs are not complete, first {job.workdir}: {line}; the same command goes on with the rest")


def _jobs(presets: Mapping[str, Config], arguments: SweepArguments) -> list[Job]:
    _check_student(arguments, presets)
    arguments = _with_student(arguments)
    return expand(arguments.axes, arguments.config, Path(arguments.workdir), Path(arguments.results))


def _declared_jobs(presets: Mapping[str, Config], path: str) -> list[Job]:
    """The jobs of a grid file's tables, each parsed as the command line that it stands for, before what this one says itself."""
    options = {*option_types(), *(field.name for field in dataclasses.fields(Grid)), *SHARED}
    excluded = {field.name for field in dataclasses.fields(SweepArguments)} - {*SHARED, "config", "axes"}
    jobs = []
    for where, words in read_grid(path, options, excluded):
        argv = [*words, *sys.argv[1:]]
        try:
            jobs += _jobs(presets, parse(SweepArguments, argv, description=None, default=_default_sweep(presets, argv)))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    return merged(jobs)


def _check_student(arguments: TrainArguments | SweepArguments, presets: Mapping[str, Config]) -> None:
    """Raises UsageError where --student auto and what belongs to it do not go together."""
    model, preset = arguments.config.model, presets[arguments.preset].model
    if arguments.student is None and arguments.budget:
        raise UsageError(f"--budget {' '.join(arguments.budget)} is for --student auto; give that too, or leave it out")
    if arguments.student is not None and (model.name, model.width) != (preset.name, preset.width):
        raise UsageError("--student auto finds --model.name and --model.width itself; leave them out")


def _with_student(arguments: Any) -> Any:
    """The arguments with the network that --student auto finds within --budget. Raises UsageError where there is none."""
    if arguments.student is None:
        return arguments
    config = arguments.config
    config.data.check()
    read_budgets(arguments.budget)  # Before the data, which may take a while to read.
    images = load_dataset(config.data)
    check_image_shape(images.image_shape)
    shape = {"classes": images.num_classes, "image_shape": images.image_shape}
    found, line = choose(arguments.student, arguments.budget, config.model.norm, **shape)
    if parallel.is_main_process():
        note(line)
    return dataclasses.replace(arguments, config=dataclasses.replace(config, model=found))


def _cluster(arguments: SweepArguments) -> Cluster | None:
    """The cluster to run on, None for this machine. Raises UsageError for an option that would have no effect."""
    given = Cluster(arguments.address, arguments.cpus_per_run, arguments.gpus_per_run)
    if arguments.executor == "local":
        if given != Cluster():
            raise UsageError("--address, --cpus-per-run and --gpus-per-run are for --executor ray; give that too, or leave them out")
        return None
    if arguments.workers != 1:
        raise UsageError(
            f"workers is {arguments.workers}, which is for --executor local; on Ray --cpus-per-run says how many runs have room"
        )
    return given


def _train(arguments: TrainArguments) -> None:
    processes = arguments.coordinator, arguments.processes, arguments.process_id, arguments.connect_timeout
    with Interruption() as interruption, parallel.joined(*processes):
        arguments = _with_student(arguments)
        result = run(arguments.config, arguments.workdir, interruption=interruption)
        if parallel.is_main_process():
            if arguments.results is not None:
                write_result(results_path(arguments.results, result), result)
            print(summary(result))


def summary(result: Result) -> str:
    """A result in one line."""
    found = result.evaluation
    parts = [
        f"{result.dataset} {result.method} N={result.n_per_class or 'full'} seed {result.seed}",
        f"{found.split} accuracy {'not known' if found.accuracy is None else f'{found.accuracy:.2%}'} on {found.count} images",
        "" if found.agreement is None else f"agreement with the teacher {found.agreement:.2%}",
        "" if found.ece is None else f"ECE {found.ece:.3f}",
        f"{result.model}, {result.parameters:,} parameters, {result.steps} steps",
    ]
    return "; ".join(part for part in parts if part)
