"""Copies a finished run's network, rounded to bfloat16 and without training state, to a directory that works as --teacher."""

import dataclasses

from wdkd import command_line
from wdkd.compact import compact


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line."""

    run: str
    """Directory of a finished run."""
    out: str
    """Directory to make: config, checkpoint of the network, result with the accuracy after rounding."""
    data_dir: str | None = None
    """Where TFDS keeps the data; None: as in the run, else $TFDS_DATA_DIR."""


def main(arguments: Arguments) -> None:
    """Rounds, evaluates, prints."""
    print(command_line.summary(compact(arguments.run, arguments.out, data_dir=arguments.data_dir)))


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__)
