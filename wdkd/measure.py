"""The parts of a benchmark: what steps cost, beside PyTorch; how that grows; how long a run takes to its first step."""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wdkd import parallel
from wdkd.benchmark import EPSILON, IDEALS, TEMPERATURE, Case, Setup, create_network, forward_flops, random_teacher
from wdkd.config import Config
from wdkd.errors import UsageError
from wdkd.models import parameter_count
from wdkd.run_directory import Input, describe_run
from wdkd.timing import interleaved, matrix_product, ratio, spread

MIB = 2**20
LAUNCH = Path(__file__).parents[1] / "launch"
TOLERANCE = 1e-4
"""Of the losses and of the parameters' gradient, by its norm, between the two implementations."""
AGREEING = ("wdkd live", "wdkd recorded", "kd live")


def describe_setup(setup: Setup, rounds: int) -> dict[str, Any]:
    """What was timed, where, and by what code."""
    kind = parallel.device_kind()
    device = f"{kind} {os.cpu_count()} cores" if jax.default_backend() == "cpu" else f"{kind} x{parallel.device_count()}"
    described = describe_run(Config(), Input([], [], [], []))
    shapes = jax.eval_shape(create_network(setup, setup.student).init, jax.random.key(0), np.zeros((1, *setup.image_shape), np.float32))
    parameters = {"student": parameter_count(shapes["params"]), "teacher": parameter_count(random_teacher(setup).variables["params"])}
    about = {"versions": described.versions, "revision": described.revision, "rounds": rounds}
    return {"device": device, "setup": dataclasses.asdict(setup), "parameters": parameters, **about}


def measure_steps(setup: Setup, methods: tuple[str, ...], rounds: int, folder: Path, *, with_torch: bool, show: bool) -> dict[str, Any]:
    """The steps of methods, kd and wdkd among them, the matrix product, and PyTorch's two steps, in one interleaved run.

    Raises:
      UsageError: the losses or gradients of the two implementations differ by more than 1e-4, so times would mean nothing.
    """
    began = time.monotonic()
    cases = {"wdkd recorded": Case(setup, "wdkd", cached=True, folder=folder, show=show)}
    recording = time.monotonic() - began
    wanted = [(method, cached) for method in methods for cached in (False, True) if not (method == "ce" and cached)]
    for method, cached in wanted:
        if (method, cached) != ("wdkd", True):
            cases[name_of(method, cached)] = Case(setup, method, cached=cached)
    found = {"record": describe_record(setup, cases["wdkd recorded"], folder, recording)}
    others: dict[str, Any] = {}
    if with_torch:
        others, found["torch"] = pytorch_cases(setup, cases)
    multiply, product_flops = matrix_product(2048 if jax.default_backend() == "cpu" else 8192)
    seconds = interleaved({**cases, **others, "matrix product": multiply}, rounds, title="steps", show=show)
    per_step = {name: np.asarray(values) / (cases[name].steps if name in cases else 1) for name, values in seconds.items()}
    peak = product_flops / np.asarray(seconds["matrix product"])
    forward = forward_flops(setup)
    found["forward_flops"] = {"student": forward[0], "teacher": forward[1]}
    found["peak"] = {"gflops": dataclasses.asdict(spread(peak / 1e9)), "rounds": rounds}
    found["steps"] = [describe_step(setup, case, per_step[name], peak, forward) for name, case in cases.items()]
    found["steps"] += [{"name": name, "milliseconds": dataclasses.asdict(spread(per_step[name] * 1e3))} for name in others]
    found["ratios"] = ratios(per_step, forward)
    return found


def name_of(method: str, cached: bool) -> str:
    """Of a case: the method, and what it is told of the teacher."""
    return "ce" if method == "ce" else f"{method} {'recorded' if cached else 'live'}"


def describe_step(setup: Setup, case: Case, seconds: np.ndarray, peak: np.ndarray, forward: tuple[float, float]) -> dict[str, Any]:
    """A row of the table: time, throughput, FLOPs against the ideal and the peak, memory."""
    cost = case.cost()
    # XLA counts a loop's body once.
    flops, ideal = cost["flops"], IDEALS[case.method](forward[0], 0.0 if case.cached else forward[1])
    return {
        "name": name_of(case.method, case.cached),
        "milliseconds": dataclasses.asdict(spread(seconds * 1e3)),
        "images_per_second": dataclasses.asdict(spread(setup.batch_size / seconds)),
        "gflop": flops and flops / 1e9,
        "over_ideal": flops and flops / ideal,
        "share_of_peak": flops and dataclasses.asdict(spread(flops / seconds / peak)),
        "scratch_mib": cost["scratch_mib"],
    }


def ratios(seconds: dict[str, np.ndarray], forward: tuple[float, float]) -> dict[str, Any]:
    """Quotients of times, each round by round."""
    student, teacher = forward
    live = ratio(seconds["wdkd live"], seconds["kd live"])
    ideal = IDEALS["wdkd"](student, teacher) / IDEALS["kd"](student, teacher)
    found = {
        "wdkd over kd, live": live,
        "wdkd over kd, live, relative to their FLOPs": ratio(seconds["wdkd live"], seconds["kd live"] * ideal),
        "wdkd over kd, recorded": ratio(seconds["wdkd recorded"], seconds["kd recorded"]),
        "wdkd live over recorded": ratio(seconds["wdkd live"], seconds["wdkd recorded"]),
    }
    for kind in ("PyTorch", "PyTorch fused"):
        if f"wdkd {kind}" in seconds:
            found[f"{kind} wdkd over wdkd live"] = ratio(seconds[f"wdkd {kind}"], seconds["wdkd live"])
            found[f"{kind} wdkd over wdkd recorded"] = ratio(seconds[f"wdkd {kind}"], seconds["wdkd recorded"])
            found[f"{kind} kd over kd live"] = ratio(seconds[f"kd {kind}"], seconds["kd live"])
    return {name: dataclasses.asdict(value) for name, value in found.items()}


def describe_record(setup: Setup, case: Case, folder: Path, seconds: float) -> dict[str, Any]:
    """The record's size in memory and in files, and how long it took to make."""
    views = setup.images_per_class * setup.classes
    jacobians = views * setup.classes * setup.side**2 * setup.channels * 4
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(case.rest[0]))
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"views": views, "memory_mib": held / MIB, "over_jacobians": held / jacobians, "files_mib": stored / MIB, "seconds": seconds}


# --- PyTorch ------------------------------------------------------------------------------------------------------------


def pytorch_cases(setup: Setup, cases: dict[str, Case]) -> tuple[dict[str, Any], dict[str, Any]]:
    """PyTorch's steps in their fastest setting, after checking that they compute what ours do; and what was found.

    With the teacher as it is, and with its batch norm put into the convolutions, as ours is.
    """
    import torch

    from wdkd import torch_reference as reference

    trainer, random = cases["wdkd live"].trainer, random_teacher(setup)
    students = {name: reference.mirror(trainer.student, cases[name].first | {"input": trainer.input}) for name in AGREEING}
    teachers = {name: reference.mirror(random.model, random.variables).requires_grad_(False) for name in ("PyTorch", "PyTorch fused")}
    reference.fuse(teachers["PyTorch fused"])
    x = torch.tensor(np.ascontiguousarray(cases["wdkd live"].batch.transpose(0, 3, 1, 2)))

    def take(name: str, kind: str) -> Any:
        if name.startswith("kd"):
            return reference.kd_step(students[name], teachers[kind], x, TEMPERATURE)
        return reference.worst_case_step(students[name], teachers[kind], x, TEMPERATURE, EPSILON)

    first = {name: cases[name].gradients() for name in AGREEING}
    apart = {
        f"{name}, {kind}": disagreement(f"{name}, {kind}", first[name], *take(name, kind), students[name])
        for name in AGREEING
        for kind in teachers
    }
    modules = (*students.values(), *teachers.values())
    settings = fastest_settings(torch, modules, lambda: take("wdkd live", "PyTorch fused"))
    x = settle(torch, modules, settings["threads"], settings["channels_last"], x)
    timed = {
        f"{method} {kind}": functools.partial(take, f"{method} live", kind)
        for method in ("wdkd", "kd")
        for kind in ("PyTorch", "PyTorch fused")
    }
    return timed, {"version": torch.__version__, "disagreement": apart, **settings}


def disagreement(name: str, ours: tuple[float, Any], loss: Any, gradients: Any, student: Any) -> dict[str, float]:
    """Relative differences of the loss, of all parameters' gradient, and of the array that is worst. Raises UsageError above 1e-4.

    The worst array may be over it: in float32, the first convolution's gradient, a sum over all pixels, is off by as much from float64.
    """
    from wdkd.torch_reference import to_flax

    objective, tree = ours
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(to_flax(student, gradients)), strict=True))
    apart, size = (np.array([np.linalg.norm(value) for value in values]) for values in ([a - b for a, b in pairs], [b for _, b in pairs]))
    found = {
        "loss": abs(objective - float(loss)) / abs(float(loss)),
        "gradient": float(np.linalg.norm(apart) / np.linalg.norm(size)),
        "worst array": float((apart / size).max()),
    }
    if not max(found["loss"], found["gradient"]) <= TOLERANCE:
        raise UsageError(f"{name}: loss and gradient differ from PyTorch's by {found}, more than {TOLERANCE}; nothing was timed")
    return found


def settle(torch: Any, modules: tuple[Any, ...], threads: int, channels_last: bool, x: Any = None) -> Any:
    """Sets PyTorch's threads and the memory layout of modules, and of the images, which it returns."""
    torch.set_num_threads(threads)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in modules:
        module.to(memory_format=layout)
    return None if x is None else x.to(memory_format=layout)


def fastest_settings(torch: Any, modules: tuple[Any, ...], take: Callable[[], Any]) -> dict[str, Any]:
    """Threads and memory layout of PyTorch's fastest worst-case step, the best of two calls each."""
    found = {}
    for threads in sorted({os.cpu_count() or 1, max(1, (os.cpu_count() or 1) // 2)}):
        for channels_last in (False, True):
            settle(torch, modules, threads, channels_last)
            take()
            times = []
            for _ in range(2):
                began = time.perf_counter()
                take()
                times.append(time.perf_counter() - began)
            found[threads, channels_last] = min(times)
    threads, channels_last = min(found, key=found.get)
    tried = [{"threads": t, "channels_last": c, "milliseconds": s * 1e3} for (t, c), s in found.items()]
    return {"threads": threads, "channels_last": channels_last, "tried": tried}


# --- growth and start ---------------------------------------------------------------------------------------------------

GROWTH: dict[str, tuple[int, ...]] = {
    "images_per_class": (10, 100, 500),
    "batch_size": (16, 64, 256),
    "classes": (2, 10, 100),
    "side": (16, 32, 64),
}
"""What grows, one at a time, around the middle of each."""


def measure_growth(setup: Setup, rounds: int, *, show: bool) -> list[dict[str, Any]]:
    """Milliseconds of the exact step, live and recorded, and of plain distillation, as N, batch, classes and image side grow."""
    base = dataclasses.replace(setup, **{name: values[1] for name, values in GROWTH.items()})
    found = []
    for what, values in GROWTH.items():
        for value in values:
            here = dataclasses.replace(base, **{what: value})
            if what == "classes":
                # The same number of images, so that nothing else grows.
                here = dataclasses.replace(here, images_per_class=1000 // value)
            wanted = (("kd", False), ("wdkd", False), ("wdkd", True))
            cases = {name_of(method, cached): Case(here, method, cached=cached) for method, cached in wanted}
            seconds = interleaved(cases, rounds, title=f"{what} {value}", show=show)
            times = {name: dataclasses.asdict(spread(np.asarray(s) * 1e3 / here.steps_per_call)) for name, s in seconds.items()}
            record = sum(leaf.nbytes for leaf in jax.tree.leaves(cases["wdkd recorded"].rest[0])) / MIB
            found.append({"what": what, "value": value, "milliseconds": times, "record_mib": record})
    return found


def measure_start(setup: Setup, folder: Path) -> dict[str, Any]:
    """Seconds from the start of `launch/distill.py` to its first finished step, with empty caches and once more with full ones.

    On the embedded digits, with this setup's networks and the worst-case objective.
    """
    environment = os.environ | {"WDKD_CACHE_DIR": str(folder / "cache")}
    teacher = ["--workdir", folder / "teacher", "--train.steps", 1, *named(setup.teacher)]
    launch("train_teacher.py", teacher, environment)
    found: dict[str, Any] = {}
    for mode in ("off", "on"):
        for number, temperature in enumerate(("cold", "warm", "warm", "warm")):
            workdir = folder / f"{mode}-{number}"
            options = ["--workdir", workdir, "--teacher", folder / "teacher", "--cache.mode", mode, "--method.name", "wdkd"]
            options += ["--train.steps", 1, *named(setup.student)]
            seconds = launch("distill.py", options, environment, until=workdir / "metrics.jsonl")
            found.setdefault(f"{'recorded' if mode == 'on' else 'live'} {temperature}", []).append(seconds)
    return {name: dataclasses.asdict(spread(values)) for name, values in found.items()}


def named(model: Any) -> list[Any]:
    return ["--model.name", model.name, "--model.width", model.width, "--model.norm", model.norm]


def launch(script: str, options: list[Any], environment: dict[str, str], until: Path | None = None) -> float:
    """Runs a launch script; seconds until the file `until` has something in it, or to the end."""
    command = [sys.executable, str(LAUNCH / script), *map(str, options)]
    began, reached = time.monotonic(), None
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process:
        while process.poll() is None:
            if reached is None and until is not None and until.exists() and until.stat().st_size:
                reached = time.monotonic() - began
            time.sleep(0.01)
        if process.returncode:
            said.seek(0)
            raise UsageError(f"{script} failed: {' '.join(said.read().split())[-300:]}")
    return time.monotonic() - began if reached is None else reached
