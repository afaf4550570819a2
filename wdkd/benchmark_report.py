"""A benchmark's numbers as a table with its targets, and a plot."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wdkd.figures import COLOURS, save
from wdkd.files import write_file

Found = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on something that was measured, by its path in the numbers."""

    text: str
    path: tuple[str, ...]
    limit: float
    at_least: bool


TARGETS = (
    Target("exact step, live teacher: times as fast as PyTorch", ("ratios", "PyTorch wdkd over wdkd live", "median"), 1.5, True),
    Target("the same, PyTorch's batch norm fused", ("ratios", "PyTorch fused wdkd over wdkd live", "median"), 1.5, True),
    Target("exact step, recorded teacher: times as fast as PyTorch", ("ratios", "PyTorch wdkd over wdkd recorded", "median"), 7, True),
    Target("the same, PyTorch's batch norm fused", ("ratios", "PyTorch fused wdkd over wdkd recorded", "median"), 7, True),
    Target("exact step over plain distillation, both recorded", ("ratios", "wdkd over kd, recorded", "median"), 2.3, False),
    Target(
        "exact step over plain distillation, both live, relative to their FLOPs",
        ("ratios", "wdkd over kd, live, relative to their FLOPs", "median"),
        1.15,
        False,
    ),
    Target("share of the matrix product's FLOP/s in the live exact step", ("exact share of peak",), 0.5, True),
    Target("memory of the record over classes × H × W × C × bytes × views", ("record", "over_jacobians"), 1.1, False),
    Target("seconds to the first step, warm, live teacher", ("start", "live warm", "median"), 5, False),
    Target("seconds to the first step, warm, recorded teacher", ("start", "recorded warm", "median"), 5, False),
)
"""What the project asks of a 2-core CPU, at the default sizes."""


def judge(found: Found) -> list[dict[str, Any]]:
    """Every target with what was measured, None where it was not, and whether it was met."""
    share = {row["name"]: row.get("share_of_peak") for row in found.get("steps", ())}.get("wdkd live")
    values = {**found, "exact share of peak": share and share["median"]}
    judged = []
    for target in TARGETS:
        value: Any = values
        for name in target.path:
            value = None if value is None else value.get(name)
        met = None if value is None else value >= target.limit if target.at_least else value <= target.limit
        judged.append({"target": target.text, "limit": target.limit, "at_least": target.at_least, "measured": value, "met": met})
    return judged


def write_report(found: Found, json_path: Path) -> list[Path]:
    """Writes the table and the plot beside the numbers' file. Returns their paths."""
    table = write_file(json_path.with_suffix(".md"), markdown(found, json_path.with_suffix(".png").name).encode())
    return [table, save(figure(found), json_path.with_suffix(".png"))]


# --- the table ----------------------------------------------------------------------------------------------------------


def markdown(found: Found, picture: str) -> str:
    """The whole table."""
    parts = [f"# Benchmark: {found['device']}", "", heading(found), "", f"![Milliseconds of a step, and how they grow]({picture})", ""]
    if "steps" in found:
        parts += [*steps_table(found), *ratios_table(found["ratios"])]
    if "torch" in found:
        parts += ["## PyTorch", "", torch_line(found["torch"]), ""]
    if "record" in found:
        parts += ["## The record of the teacher", "", record_line(found["record"]), ""]
    if "growth" in found:
        parts += growth_table(found["growth"])
    if "start" in found:
        parts += start_table(found["start"])
    return "\n".join([*parts, *targets_table(judge(found))]) + "\n"


def heading(found: Found) -> str:
    setup, rounds = found["setup"], found["rounds"]
    networks = " from ".join(
        f"`{setup[n]['name']}` of width {setup[n]['width']} ({found['parameters'][n]:,} parameters)" for n in ("student", "teacher")
    )
    return (
        f"{networks}; batch {setup['batch_size']}, images {setup['side']}×{setup['side']}×{setup['channels']}, {setup['classes']} classes, "
        f"{setup['precision']}, {setup['steps_per_call']} steps per call. "
        f"Medians and quartiles of {rounds} interleaved rounds in one process; random images and weights. "
        f"jax {found['versions']['jax']}, wdkd {found['revision']}. Made by `launch/benchmark.py`."
    )


def spread_text(value: Mapping[str, float] | None, digits: int = 1) -> str:
    """median (lower–upper)."""
    if value is None:
        return ""
    return f"{value['median']:,.{digits}f} ({value['lower']:,.{digits}f}–{value['upper']:,.{digits}f})"


def rows(header: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in body), ""]


def steps_table(found: Found) -> list[str]:
    peak, forward = found["peak"]["gflops"], found["forward_flops"]
    body = [
        (
            row["name"],
            spread_text(row["milliseconds"]),
            spread_text(row.get("images_per_second"), 0),
            f"{row['gflop']:.2f}" if row.get("gflop") else "",
            f"{row['over_ideal']:.3f}" if row.get("over_ideal") else "",
            spread_text(row.get("share_of_peak"), 2),
            f"{row['scratch_mib']:,.0f}" if row.get("scratch_mib") is not None else "",
        )
        for row in found["steps"]
    ]
    header = ("step", "ms", "images/s", "GFLOP", "over ideal", "share of peak", "scratch MiB")
    return [
        "## Steps",
        "",
        f"Forward passes of a batch: student F_S = {forward['student'] / 1e9:.2f} GFLOP, teacher F_T = {forward['teacher'] / 1e9:.2f}. "
        f"Peak is a float32 matrix product's {spread_text(peak, 0)} GFLOP/s. Ideal FLOPs are 3F_S + F_T for plain distillation and "
        "6F_S + 3F_T for the exact step (sobolev: 6F_S + 2F_T, its directions being constants); a recorded teacher costs none. fitnet and "
        "ab are their first stages, whose ideals count neither connectors nor that fitnet trains a part of the student. PyTorch's rows "
        "leave out the optimiser, ours do not.",
        "",
        *rows(header, body),
    ]


def ratios_table(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    return ["## Ratios", "", *rows(("round by round", "median (quartiles)"), [(n, spread_text(v, 2)) for n, v in ratios.items()])]


def torch_line(torch: Found) -> str:
    tried = ", ".join(
        f"{t['threads']} threads {'channels last' if t['channels_last'] else 'contiguous'} {t['milliseconds']:,.0f} ms"
        for t in torch["tried"]
    )
    apart = "; ".join(
        f"{name} {', '.join(f'{part} {v:.1g}' for part, v in parts.items())}" for name, parts in torch["disagreement"].items()
    )
    return (
        f"Eager PyTorch {torch['version']}, create_graph double backward, the same networks, weights and batch; "
        f"fused: its teacher's batch norm put into the convolutions, as ours is. "
        f"Before timing, the two were compared (relative differences): {apart}. "
        f"Its fastest setting was used; tried for the exact step: {tried}."
    )


def record_line(record: Found) -> str:
    return (
        f"{record['views']:,} views take {record['memory_mib']:.1f} MiB of memory ({record['over_jacobians']:.4f} times their Jacobians "
        f"alone) and {record['files_mib']:.1f} MiB of files; recording them took {record['seconds']:.1f} s, compilation included."
    )


def growth_table(growth: list[Found]) -> list[str]:
    names = list(growth[0]["milliseconds"])
    body = [
        (f"{row['what']} {row['value']:,}", *(spread_text(row["milliseconds"][name]) for name in names), f"{row['record_mib']:,.1f}")
        for row in growth
    ]
    return ["## Growth (ms)", "", *rows(("", *names, "record MiB"), body)]


def start_table(start: Mapping[str, Mapping[str, float]]) -> list[str]:
    text = "Seconds from the start of `launch/distill.py` to its first finished step on the embedded digits; cold: empty caches."
    return ["## Time to the first step", "", text, "", *rows(("", "s"), [(name, spread_text(value)) for name, value in start.items()])]


def targets_table(judged: list[dict[str, Any]]) -> list[str]:
    body = []
    for row in judged:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        limit = f"{'at least' if row['at_least'] else 'at most'} {row['limit']:g}"
        body.append((row["target"], limit, measured, {None: "", True: "met", False: "MISSED"}[row["met"]]))
    return ["## Targets (2-core CPU)", "", *rows(("", "limit", "measured", ""), body)]


# --- the plot -----------------------------------------------------------------------------------------------------------


def figure(found: Found) -> Figure:
    """Bars of the steps' times, and one panel for each thing that grows."""
    growth = list(dict.fromkeys(row["what"] for row in found.get("growth", ())))
    drawn = Figure(figsize=(11, 4.5 * (("steps" in found) + bool(growth)) or 1), layout="constrained")
    grid = drawn.add_gridspec(1 + bool(growth and "steps" in found), max(1, len(growth)))
    if "steps" in found:
        draw_steps(drawn.add_subplot(grid[0, :]), found)
    first = None
    for place, what in enumerate(growth):
        axes = drawn.add_subplot(grid[-1, place], sharey=first)
        draw_growth(axes, [row for row in found["growth"] if row["what"] == what])
        if first is None:
            first = axes
            axes.set_ylabel("ms")
            axes.legend(fontsize=8)
    return drawn


def draw_steps(axes: Any, found: Found) -> None:
    steps = sorted(found.get("steps", ()), key=lambda row: row["milliseconds"]["median"])
    for place, row in enumerate(steps):
        time = row["milliseconds"]
        kind = row["name"].split()[-1]
        colour = COLOURS[{"live": 1, "recorded": 3, "PyTorch": 4, "fused": 4}.get(kind, 0)]
        error = [[time["median"] - time["lower"]], [time["upper"] - time["median"]]]
        axes.barh(place, time["median"], xerr=error, color=colour, height=0.7)
        axes.annotate(f" {time['median']:,.0f}", (time["upper"], place), va="center", fontsize=8)
    axes.set_yticks(range(len(steps)), [row["name"] for row in steps])
    axes.set_xlabel("milliseconds of a step (median, quartiles); blue: live teacher, green: recorded, red: PyTorch")
    axes.margins(x=0.08)


def draw_growth(axes: Any, measured: list[Found]) -> None:
    for index, name in enumerate(measured[0]["milliseconds"]):
        times = [row["milliseconds"][name]["median"] for row in measured]
        axes.plot([row["value"] for row in measured], times, "osD"[index] + "-", color=COLOURS[1 + index], label=name)
    axes.set(xscale="log", yscale="log", xlabel=measured[0]["what"].replace("_", " "))
    axes.set_xticks([row["value"] for row in measured], [str(row["value"]) for row in measured])
    axes.xaxis.minorticks_off()
    axes.grid(axis="y", which="both", alpha=0.3)
