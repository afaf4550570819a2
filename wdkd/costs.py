"""The table of what a student costs beside its teacher, whatever the teacher is: a run, an ONNX file, Python code."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from wdkd import parallel
from wdkd.errors import UsageError
from wdkd.export_formats import forward_flops, onnx_content
from wdkd.graph import PIXELS
from wdkd.latency import Cost, Timed, single_image
from wdkd.models import parameter_count
from wdkd.notes import note
from wdkd.result import read_result
from wdkd.run_directory import Run, Trained, read_trained
from wdkd.teacher_loading import find_teacher, reader
from wdkd.teacher_source import Source


@dataclasses.dataclass(frozen=True)
class Row:
    """What is said of one network, and how it is timed; None where it cannot be."""

    cost: Cost
    timed: Timed | None


def can_time() -> bool:
    """Whether what writes and runs ONNX is installed."""
    return all(importlib.util.find_spec(package) for package in ("onnx", "onnxruntime"))


def costs(rows: Sequence[Row], *, show: bool) -> list[Cost]:
    """The rows with the time of one image on one core, measured in turn, of those that can be timed."""
    cases = {row.cost.name: row.timed for row in rows if row.timed is not None}
    times = single_image(cases, show=show) if cases else {}
    return [dataclasses.replace(row.cost, milliseconds=times.get(row.cost.name)) for row in rows]


def row_of_network(name: str, network: Trained, accuracy: float | None, *, file: Path | None = None, onnx: bytes | None = None) -> Row:
    """The row of a network of this project, which is timed as ONNX.

    Args:
      file: its export, whose size is told; None: that of the ONNX export that it would be.
      onnx: the content of its ONNX export; None: it is written for this.
    """
    if onnx is None and can_time():
        onnx = onnx_content(network, {})
    height, width, channels = network.run.input.image_shape
    return Row(
        Cost(
            name=name,
            model=network.run.config.model.words,
            parameters=parameter_count(network.variables["params"]),
            flops=forward_flops(network),
            bytes=file.stat().st_size if file is not None else onnx and len(onnx),
            accuracy=accuracy,
            milliseconds=None,
        ),
        onnx and Timed(onnx, PIXELS, (1, channels, height, width)),
    )


def row_of_teacher(run: Run, given: str | None, accuracy: float | None) -> Row | None:
    """The row of a run's teacher; None, and a note that says why, where there is none to be had.

    Args:
      given: the teacher, in any form that training takes; None: that of training.
      accuracy: of the teacher on the test images, where it is not a run of this project, which knows its own.

    Raises:
      UsageError: if what is given cannot be read.
    """
    try:
        found = find_teacher(run, given, answers=True)
        if found is None:
            return None
        named, source = found
        return _row_of_run(source) if source.kind == "run" else _row_from_elsewhere(run, source, named, accuracy)
    except UsageError as error:
        if given is not None:
            raise
        note(f"the teacher is not in the table: {error}")
        return None


def _row_of_run(source: Source) -> Row:
    result = Path(source.location) / "result.json"
    evaluation = read_result(result).evaluation if result.exists() else None
    return row_of_network("teacher", read_trained(source.location), evaluation and evaluation.accuracy)


def _row_from_elsewhere(run: Run, source: Source, named: str, accuracy: float | None) -> Row:
    shape = tuple(run.input.image_shape)
    read = reader(named, source, image_shape=shape, class_names=run.input.class_names)
    teacher = read(run.config.teacher_input)
    size, timed = None, None
    if source.kind == "onnx":
        from wdkd.onnx_teacher import single_image_case

        size, timed = single_image_case(source.location, run.config.teacher_input, shape)
    floats = [leaf for leaf in map(np.asarray, jax.tree.leaves(teacher.variables)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    flops = parallel.forward_flops(teacher.apply, teacher.variables, shape)
    cost = Cost(
        name="teacher",
        model=Path(named).name,
        parameters=sum(leaf.size for leaf in floats),
        flops=None if flops is None else round(flops),
        bytes=size,
        accuracy=accuracy,
        milliseconds=None,
    )
    return Row(cost, timed)
