"""The plots of a report, drawn through matplotlib's object interface, so that no global state is touched."""

import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

from wdkd.files import write_file
from wdkd.result import Evaluation
from wdkd.wording import shown

Curve = Sequence[tuple[float, float, float | None]]
"""Points (x, mean, standard deviation or None when there is one seed)."""

Intervals = Sequence[tuple[float, float, float | None, float | None]]
"""Points (x, mean, lower and upper end of an interval or None where there is none)."""
Points = TypeVar("Points", Curve, Intervals)

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
"""Okabe and Ito's palette less its yellow, told apart with any colour vision; markers and dashes repeat the distinction."""
MARKERS = "osD^vPX<>*"
DASHES = ("-", "--", "-.", ":")


def save(figure: Figure, path: str | os.PathLike) -> Path:
    """Renders a figure as PNG and writes it atomically. Returns its path.

    It has 256 colours, which no eye misses in plots, and which makes the file a third as large.
    """
    buffer, canvas = io.BytesIO(), FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)  # Median cut would lose a thin line's colour.
    few.save(buffer, "PNG", optimize=True)
    return write_file(path, buffer.getvalue())


def svg(figure: Figure) -> bytes:
    """Renders a figure as SVG without a background, the same bytes for the same figure.

    It is made small: text stays text in few fonts, coordinates have two decimals, and what nothing refers to has no name.
    """
    buffer = io.BytesIO()
    for part in (figure, *figure.axes):
        part.set_facecolor("none")
    with matplotlib.rc_context({"svg.hashsalt": "wdkd", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "Verdana"]}):
        FigureCanvasSVG(figure).print_svg(buffer)
    # The metadata hold the date.
    whole = re.sub(rb"<!--.*?-->|<metadata>.*?</metadata>", b"", buffer.getvalue(), flags=re.DOTALL)
    used = set(re.findall(rb"#([\w.-]+)", whole))

    def shorter(tag: re.Match[bytes]) -> bytes:
        rounded = re.sub(rb"(\.\d\d)\d+", rb"\1", re.sub(rb"\s+", b" ", tag[0]))
        return re.sub(rb' id="([^"]*)"', lambda name: name[0] if name[1] in used else b"", rounded)

    return re.sub(rb">\s+<", b"><", re.sub(rb"<[^>]+>", shorter, whole))


def draw_curve(axes: Axes, curve: Curve, index: int, label: str) -> None:
    """Adds one line with error bars, none where there is one seed; `index` fixes its colour, marker and dashes."""
    x, mean, deviation = zip(*curve, strict=True)
    axes.errorbar(
        x,
        mean,
        yerr=[np.nan if d is None else d for d in deviation],
        label=label,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=DASHES[index % len(DASHES)],
        markersize=5.5,
        linewidth=1.5,
        capsize=3,
    )


def accuracy_figure(
    curves: Mapping[tuple[int, str], Curve],
    differences: Mapping[tuple[int, str], Intervals],
    ticks: Mapping[float, str],
    teachers: Sequence[float],
    published: Sequence[tuple[float, float]],
    title: str,
    split: str,
) -> Figure:
    """Accuracy against training images per class, and below it the differences from kd, where there are any.

    Args: curves, by (style index, method), with x in images per class and accuracy in %; differences likewise, in points;
    ticks, x to label; teachers, accuracies in % drawn as dashed lines; published (x, %) of the paper's own method; title;
    split evaluated on.
    """
    figure = Figure(figsize=(8.5, 7.8 if differences else 5.2), dpi=130, layout="constrained")
    above, *below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 3]) if differences else [figure.add_subplot()]
    for accuracy in teachers:
        above.axhline(accuracy, color="0.45", linestyle=(0, (6, 4)), linewidth=1.2, label=f"teacher ({accuracy:.2f} %)", zorder=1)
    for (index, name), curve in apart(curves).items():
        draw_curve(above, curve, index, name)
    if published:
        style = dict(color="0.3", markersize=9, mfc="none", linestyle="none", marker="d", zorder=5)
        above.plot(*zip(*published, strict=True), **style, label="wdkd as published\n(other networks)")
    for axes in below:
        draw_differences(axes, differences)
    last = below[0] if below else above
    last.set_xscale("log")
    last.xaxis.set_major_locator(FixedLocator(list(ticks)))
    last.xaxis.set_minor_locator(NullLocator())
    last.set_xticklabels(list(ticks.values()))
    last.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
    _finish(above, title, "", f"{split} accuracy (%, mean ± sd)")
    last.set_xlabel("training images per class (log scale)")
    above.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def apart(curves: Mapping[tuple[int, str], Points]) -> dict[tuple[int, str], Points]:
    """The curves 1.5 % apart on a logarithmic axis, or their error bars would cover each other."""
    middle = np.mean([index for index, _ in curves])
    return {(index, name): [(x * 1.015 ** (index - middle), *rest) for x, *rest in curve] for (index, name), curve in curves.items()}


def draw_differences(axes: Axes, differences: Mapping[tuple[int, str], Intervals]) -> None:
    """Differences from kd with their intervals, cut where they are much longer than the differences."""
    axes.axhline(0, color=COLOURS[1], linewidth=1.2, zorder=1)
    for (index, _), points in apart(differences).items():
        x, mean, low, high = (np.array(values, np.float64) for values in zip(*points, strict=True))
        style = dict(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], linestyle=DASHES[index % len(DASHES)])
        axes.errorbar(x, mean, yerr=[mean - low, high - mean], markersize=5.5, linewidth=1.5, capsize=3, **style)
    means = [0.0, *(mean for points in differences.values() for _, mean, _, _ in points)]
    room = max(0.5, 0.6 * (max(means) - min(means)))
    axes.set_ylim(min(means) - room, max(means) + room)
    _finish(axes, "", "", "difference from kd\n(points, paired, 95 % interval)")


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves of accuracy in % against a radius that may be 0, by label, and the point that a ring is drawn around, if any."""

    heading: str
    x_label: str
    curves: Mapping[str, Curve]
    ring: tuple[float, float] | None


def radius_figure(panels: Sequence[Panel], title: str, split: str) -> Figure:
    """A panel for each of `panels`, three in a row; a label has the same style in all of them."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    below = -(-len(labels) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.6 * rows + 0.8 + 0.2 * below), dpi=130, layout="constrained")
    handles = {}
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for label, curve in panel.curves.items():
            draw_curve(axes, curve, labels.index(label), label)
        if panel.ring is not None:
            axes.plot(*zip(panel.ring, strict=True), "o", markersize=13, mfc="none", mec="0.3", label="_ring")
        _radius_axis(axes, sorted({x for curve in panel.curves.values() for x, _, _ in curve}))
        _finish(axes, panel.heading, panel.x_label, f"{split} accuracy (%, mean ± sd)")
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def confusion_figure(evaluation: Evaluation, path: str | os.PathLike) -> Path:
    """Writes a heat map of the confusion matrix, rows normalised to the class's images, as PNG. Returns its path.

    Up to 20 classes the counts are written into the cells; above, only the colours, and up to 50 of the names.
    """
    counts = np.asarray(evaluation.confusion)
    classes = len(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(3.5 + 0.5 * classes, 11.0)
    figure = Figure(figsize=(side + 1.0, side), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, vmin=0, vmax=100)  # square root: on a linear scale the confusions, a few % each, would look empty
    image = axes.imshow(100 * share, cmap="Blues", norm=norm)
    figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 10, 20, 40, 70, 100], label="share of the true class (%)")
    named = range(0, classes, -(-classes // 50))
    names, size = [shown(evaluation.class_names[i], 40) for i in named], 9 if classes <= 20 else 7
    axes.set_xticks(named, names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(named, names, fontsize=size, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{evaluation.split} accuracy {100 * evaluation.accuracy:.2f} % of {evaluation.count:,} images", fontsize=11)
    if classes <= 20:
        for (i, j), value in np.ndenumerate(counts):
            axes.text(j, i, f"{value}", ha="center", va="center", fontsize=8, color="white" if norm(100 * share[i, j]) > 0.6 else "0.15")
    return save(figure, path)


def _radius_axis(axes: Axes, radii: Sequence[float]) -> None:
    """A logarithmic axis on which 0 has a place, labelled at the radii that were run."""
    smallest = min((r for r in radii if r > 0), default=1.0)
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    axes.xaxis.set_major_locator(FixedLocator(list(radii)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{r:g}" for r in radii], rotation=45 if len(radii) > 6 else 0)
    axes.set_xlim(-0.3 * smallest, max(*radii, smallest) * 1.4)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
