"""Exports a finished run's network to one file, verified on the test images, and says what it costs on a device beside its teacher.

The file holds the normalisation of its input, its class names and what it takes; FILE.json beside it holds what is printed here.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from wdkd import command_line
from wdkd.export import export_run, report_of
from wdkd.latency import table


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: str
    """Directory of a finished run."""
    format: Literal["onnx", "stablehlo", "safetensors"] = "onnx"
    """onnx: for onnxruntime and phones; stablehlo: for JAX and XLA, without flax; safetensors: the parameters by name."""
    out: str | None = None
    """File to write; None: student.<format> in the run's directory."""
    int8: bool = False
    """Also write FILE.int8.onnx, quantised by onnxruntime with the run's training images."""
    teacher: str | None = None
    """The teacher, for the table, in any form that training takes; None: that of training."""
    data_dir: str | None = None
    """Where TFDS keeps the data; None: as in the run, else $TFDS_DATA_DIR."""


def main(arguments: Arguments) -> None:
    """Exports, verifies, prints."""
    out = Path(arguments.out or Path(arguments.run) / f"student.{arguments.format}")
    options = {"int8": arguments.int8, "teacher": arguments.teacher, "data_dir": arguments.data_dir}
    report = export_run(arguments.run, arguments.format, out, **options)
    for verified in report.verified:
        print(f"verified {verified.line()}")
    print("\n".join(table(report.costs)))
    names = ", ".join(str(out.with_name(verified.file)) for verified in report.verified)
    print(f"written: {names}, {report_of(out)}")


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__, flags=True)
