"""The plots of a report, drawn through matplotlib's object interface, so that no global state is touched."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from wdkd.files import write_file
from wdkd.result import Evaluation
from wdkd.wording import shown

Curve = Sequence[tuple[float, float, float | None]]
"""Points (x, mean, standard deviation or None when there is one seed)."""

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
"""Okabe and Ito's palette less its yellow, told apart with any colour vision; markers and dashes repeat the distinction."""
MARKERS = "osD^vPX<>*"
DASHES = ("-", "--", "-.", ":")


def save(figure: Figure, path: str | os.PathLike) -> Path:
    """Renders a figure as PNG and writes it atomically. Returns its path."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return write_file(path, buffer.getvalue())


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
    ticks: Mapping[float, str],
    teachers: Sequence[float],
    published: Sequence[tuple[float, float]],
    title: str,
    split: str,
) -> Figure:
    """Accuracy against training images per class.

    Args: curves, by (style index, method), with x in images per class and accuracy in %; ticks, x to label; teachers,
    accuracies in % drawn as dashed lines; published (x, %) of the paper's own method; title; split evaluated on.
    """
    figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    if published:
        axes.plot(
            *zip(*published, strict=True),
            "d",
            color="0.65",
            markersize=8,
            mfc="none",
            label="wdkd as published\n(other networks)",
            zorder=1,
        )
    for accuracy in teachers:
        axes.axhline(accuracy, color="0.45", linestyle=(0, (6, 4)), linewidth=1.2, label=f"teacher ({accuracy:.2f} %)", zorder=1)
    middle = np.mean([index for index, _ in curves])
    for (index, name), curve in curves.items():
        # Methods stand 1.5 % apart, or their error bars would cover each other.
        draw_curve(axes, [(x * 1.015 ** (index - middle), *rest) for x, *rest in curve], index, name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(list(ticks.values()))
    axes.set_xlim(min(ticks) / 1.3, max(ticks) * 1.3)
    _finish(axes, title, "training images per class (log scale)", f"{split} accuracy (%, mean ± sd over seeds)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def epsilon_figure(panels: Mapping[str, Mapping[tuple[int, str], tuple[Curve, float]]], title: str, split: str) -> Figure:
    """Accuracy against the radius, one panel for each number of images; a ring marks the chosen radius.

    Args: panels, by heading: curves by (style index, label) with x = epsilon and accuracy in %, and the chosen epsilon.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.8 * columns + 0.6, 3.4 * rows + 1.0), dpi=130, layout="constrained")
    radii = sorted({x for curves in panels.values() for curve, _ in curves.values() for x, _, _ in curve})
    handles = {}
    for place, (heading, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for (index, label), (curve, chosen) in curves.items():
            draw_curve(axes, curve, index, label)
            height = next(mean for x, mean, _ in curve if x == chosen)
            axes.plot([chosen], [height], "o", markersize=13, mfc="none", mec=COLOURS[index % len(COLOURS)], label="_chosen")
        _radius_axis(axes, radii)
        _finish(axes, heading, "epsilon (pixels in [0, 1])", f"{split} accuracy (%, mean ± sd)")
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(f"{title} (ring: chosen epsilon)", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 2 * columns), frameon=False)
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
