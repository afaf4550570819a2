"""A report as blocks, written once for Markdown and for the page: paragraphs, lists, tables and plots, in sections."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, what its column is sorted by (None: nothing to sort, so it stays last), and its kind."""

    text: str
    key: float | str | None = None
    kind: Literal["plain", "best", "published", "absent"] = "plain"


def word(text: str) -> Cell:
    """A cell that is sorted by its text."""
    return Cell(text, text)


@dataclasses.dataclass(frozen=True)
class Table:
    """Column headings, rows, and rows at the foot, which are not sorted; the first cell of a row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Sequence[Cell]] = ()


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of lines; `warning` where they are warnings."""

    lines: Sequence[str]
    warning: bool = False


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure, drawn anew for each format that it is rendered in, so that none depends on which came before."""

    file: str
    """Its file's name, beside the Markdown."""
    description: str
    draw: Callable[[], Figure]


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands below it. Text is plain but for `code` in backticks; empty blocks are left out."""

    title: str
    blocks: "Sequence[Block]"


Block = str | Bullets | Table | Plot | Section


def empty(block: Block) -> bool:
    """Whether there is nothing to show."""
    return not (block.lines if isinstance(block, Bullets) else block)


def plots(section: Section) -> Iterator[Plot]:
    """All plots of a section, in order."""
    for block in section.blocks:
        if isinstance(block, Plot):
            yield block
        elif isinstance(block, Section):
            yield from plots(block)


# --- Markdown -----------------------------------------------------------------------------------------------------------


def markdown(section: Section) -> str:
    """A section as a Markdown document."""
    return "\n\n".join(_parts(section, level=1)) + "\n"


def _parts(section: Section, level: int) -> Iterator[str]:
    yield f"{'#' * level} {_text(section.title)}"
    for block in section.blocks:
        if empty(block):
            continue
        if isinstance(block, Section):
            yield from _parts(block, level + 1)
        elif isinstance(block, Bullets):
            yield "\n".join(f"- {'**Warning:** ' * block.warning}{_text(line)}" for line in block.lines)
        elif isinstance(block, Table):
            yield markdown_table(block)
        elif isinstance(block, Plot):
            yield f"![{_text(block.description)}]({block.file})"
        else:
            yield _text(block)


def markdown_table(table: Table) -> str:
    """A table in Markdown: what is best is bold, what was published elsewhere is in italics."""
    marks = {"best": "**", "published": "*"}
    lines = [[_text(name) for name in table.head], ["---"] * len(table.head)]
    for row in (*table.rows, *table.foot):
        lines.append([f"{marks.get(cell.kind, '')}{_text(cell.text)}{marks.get(cell.kind, '')}" for cell in row])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(text: str) -> str:
    """Text from files may hold tags, which Markdown would take for HTML."""
    return re.sub("<", "&lt;", text)
