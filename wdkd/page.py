"""Reports as one static page that needs nothing else: style, script and plots are inside, and it works from a file."""

import base64
import hashlib
import html
import re
import urllib.parse
from collections.abc import Iterator, Sequence

from wdkd import figures
from wdkd.document import Bullets, Cell, Plot, Section, Table, empty
from wdkd.page_assets import SCRIPT, STYLE

TITLE = "wdkd: students from a handful of images"
SUBTITLE = (
    "Made by `launch/report.py` from result files; nothing measured is typed by hand. A click on the heading of a column sorts by it; "
    "further clicks reverse the order and restore the first one."
)
INTRODUCTION = Section(
    "How to read this",
    [
        "A large trained network, the teacher, is distilled into a small one, the student, by each of several methods, where only M images "
        "of each class are at hand. `ce` learns from the labels alone, without a teacher, and is the floor; the others are compared with "
        "`kd`. There are two tracks, with the same images, teacher, student and budget for every method:",
        Bullets(
            [
                "plain: no augmentation. It shows what an objective does by itself.",
                "matching: teacher and student see the same strongly augmented view (flip, padded crop, then mixup or cutmix). "
                "It is what one would run to get a good student.",
            ]
        ),
        "The rules; where results that stand together differ in teacher, student, budget or split, a warning says so:",
        Bullets(
            [
                "All methods have the same teacher, student, number of steps and batch size at every M; two stages divide the steps.",
                "Each seed draws its own images and initial parameters, the same for all methods; smaller M are contained in larger ones.",
                "Test accuracy is read once, at the last step. Options are chosen on validation images, which no training subset contains.",
                "Means come with the sample standard deviation and the number of seeds. Differences from kd are taken pair by pair on the "
                "same images; where the 95 % interval contains 0 their sign is open, and with one seed there is no interval.",
                "Published numbers stand beside, in rows of their own. They are of other networks, which are not public.",
                "What was not run says so.",
            ]
        ),
    ],
)


def html_page(chapters: Sequence[Section]) -> str:
    """The page: an introduction, contents, and the chapters, whose sections are listed in the contents.

    The titles of a section's own sections must differ, as they become the places that links lead to.
    """
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # Nothing but this very script may run and nothing may be loaded, whatever the files of results said.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'"
    parts = [INTRODUCTION, *chapters]
    body = "\n".join(line for part in parts for line in render(part, 2, ""))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(TITLE)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{escape(TITLE)}</h1>\n"
        f"<p>{text(SUBTITLE)}</p>\n</header>\n{contents(parts)}\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def contents(parts: Sequence[Section]) -> str:
    """Links to the parts, and below each to its sections."""
    lines = ['<nav aria-label="Contents">', "<h2>Contents</h2>", "<ul>"]
    for part in parts:
        inner = "".join(f"<li>{link(place(part), s)}</li>" for s in part.blocks if isinstance(s, Section))
        lines.append(f"<li>{link('', part)}" + (f"<ul>{inner}</ul>" if inner else "") + "</li>")
    return "\n".join([*lines, "</ul>", "</nav>"])


def link(parent: str, section: Section) -> str:
    """A link to a section."""
    return f'<a href="#{urllib.parse.quote(place(section, parent))}">{escape(section.title)}</a>'


def place(section: Section, parent: str = "") -> str:
    """The identifier of a section below another's."""
    own = re.sub(r"[^\w.]+", "-", section.title.lower()).strip("-")
    return f"{parent}/{own}" if parent else own


def render(section: Section, level: int, parent: str) -> Iterator[str]:
    """A section's lines of HTML, with headings from `level` on."""
    own = place(section, parent)
    yield f'<section id="{escape(own)}">\n<h{level}>{escape(section.title)}</h{level}>'
    for block in section.blocks:
        if isinstance(block, Section):
            yield from render(block, min(level + 1, 6), own)
        elif not empty(block):
            yield render_block(block, section.title)
    yield "</section>"


def render_block(block: str | Bullets | Table | Plot, title: str) -> str:
    """A block that is no section, in a section of that title."""
    if isinstance(block, Bullets):
        items = "".join(f"<li>{'<strong>Warning:</strong> ' * block.warning}{text(line)}</li>" for line in block.lines)
        return f'<ul class="{"warnings" if block.warning else "facts"}">{items}</ul>'
    if isinstance(block, Plot):
        return f"""<p class="plot"><img src='{image_address(block)}' alt="{escape(f"{title}: {block.description}")}"></p>"""
    if isinstance(block, Table):
        return render_table(block, title)
    return f"<p>{text(block)}</p>"


def image_address(plot: Plot) -> str:
    """A plot as an address that may stand between single quotes in HTML."""
    # Most of SVG stands for itself there; base64 would be a third longer.
    return "data:image/svg+xml," + urllib.parse.quote(figures.svg(plot.draw()), safe=' !"$()*+,-./:;<=>?@[]^_`{|}~')


def render_table(table: Table, title: str) -> str:
    """A table that scrolls sideways where it is too wide, by the keyboard too."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    body = "\n".join(render_row(row) for row in table.rows)
    foot = "<tfoot>\n" + "\n".join(render_row(row) for row in table.foot) + "\n</tfoot>\n" if table.foot else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(title)}" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n{foot}</table>\n</div>"
    )


def render_row(row: Sequence[Cell]) -> str:
    """A row, whose first cell is its heading."""
    return "<tr>" + render_cell(row[0], 'th scope="row"') + "".join(render_cell(cell, "td") for cell in row[1:]) + "</tr>"


def render_cell(cell: Cell, tag: str) -> str:
    """A cell with what its column is sorted by, in full precision."""
    kind = "" if cell.kind == "plain" else f' class="{cell.kind}"'
    key = "" if cell.key is None else f' data-key="{escape(str(cell.key))}"'
    return f"<{tag}{kind}{key}>{escape(cell.text)}</{tag.split()[0]}>"


def text(value: str) -> str:
    """Text as HTML, with what is in backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(value))


def escape(value: str) -> str:
    """Text that is nothing but text, in an element or in an attribute's quotes."""
    return html.escape(value, quote=True)
