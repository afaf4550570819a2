"""Makes tables and plots from result files: <dataset>/<track>.md, .csv and .png beside them, and the same of tuning.

Where there are folders long/, longer/ (longer schedules), stronger/ (a stronger teacher) or stronger_longer/ (both), each gets its own.
And index.html: one page with all of these.
"""

import dataclasses
from pathlib import Path

import rich.console

from wdkd import command_line, report
from wdkd.wording import shown


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where the results are and which report to make."""

    results: Path = Path("results")
    """Directory of <dataset>/<track>/<method>/n<M>/seed<k>.json, tuning/<dataset>/<track>/*.json, or of the same in long/ and so on."""
    tuning: bool = False
    """Write and print only what was tried on validation images, from tuning/; index.html has everything in either case."""


def main(args: Arguments) -> None:
    """Writes the report, prints its tables, its warnings and the paths written."""
    made = report.whole_report(args.results, args.tuning)
    console = rich.console.Console()
    for table in made.tables:
        console.print(table)
    for line in made.warnings:
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    for path in made.paths:
        console.print(f"wrote {shown(path, 1000)}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__)
