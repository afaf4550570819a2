"""Makes tables and plots from result files: <dataset>/<track>.md, .csv and .png beside them, or tuning reports."""

import dataclasses
from pathlib import Path

import rich.console

from wdkd import command_line, report
from wdkd.wording import shown


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Where the results are and which report to make."""

    results: Path = Path("results")
    """Directory with <dataset>/<track>/<method>/n<M>/seed<k>.json below it, or tuning/<dataset>/<track>/*.json."""
    tuning: bool = False
    """Report validation accuracy against epsilon, from tuning/, instead of the main tables."""


def main(args: Arguments) -> None:
    """Writes the report, prints its tables, its warnings and the paths written."""
    made = (report.tuning_report if args.tuning else report.main_report)(args.results)
    console = rich.console.Console()
    for table in made.tables:
        console.print(table)
    for line in made.warnings:
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    for path in made.paths:
        console.print(f"wrote {shown(path, 1000)}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command_line.main(Arguments, main, description=__doc__)
