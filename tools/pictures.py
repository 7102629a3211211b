"""Pictures of a report. An algorithm has one colour and one marker in all of them."""

import io
import re
import zlib

import matplotlib
import numpy as np
import pandas as pd
import scores as numbers

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

COLORS = {
    "BC": "#000000",
    "10% BC": "#8C8C8C",
    "IQL": "#1F77B4",
    "X-QL": "#17BECF",
    "X-QL T": "#17BED0",
    "X-QL C": "#66D9FF",
    "TD3+BC": "#2CA02C",
    "ReBRAC": "#8FD175",
    "SPOT": "#B5BD00",
    "FQL": "#FF7F0E",
    "AWAC": "#D62728",
    "CQL": "#9467BD",
    "Cal-QL": "#E377C2",
    "EDAC": "#8C564B",
    "SAC-N": "#C49C94",
    "LB-SAC": "#5C2E1F",
    "BCQ": "#FFBB00",
    "BRAC": "#AA4466",
    "DT": "#00695C",
    "DQN": "#1A237E",
    "QR-DQN": "#4CAF9A",
    "REM": "#F06292",
}
MARKERS = "os^DvP*X<>"
SPARE = ("#546E7A", "#7B1FA2", "#827717", "#4E342E", "#00838F", "#AD1457")
PANEL = ["data", *numbers.BUDGET, "unit"]
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "stitch",  # the same picture, the same bytes
}


def look(label: str) -> dict:
    """Colour and marker of a label, also of one that is not in the list."""
    base = label.removeprefix("Discrete").strip()  # no data is for both
    number = zlib.crc32(label.encode())
    color = COLORS.get(base, SPARE[number % len(SPARE)])
    place = list(COLORS).index(base) if base in COLORS else number
    return {"color": color, "marker": MARKERS[place % len(MARKERS)], "markersize": 4}


def budgets(evaluations: pd.DataFrame) -> dict:
    """{(data, updates, steps, unit): its rows}: what is drawn in one panel."""
    return dict(list(evaluations.groupby(PANEL, sort=True)))


def main_panels(evaluations: pd.DataFrame) -> dict:
    """Of each dataset the longest budget that has over half of the algorithms of the fullest one.

    What went on online has a panel of its own, where several algorithms did.
    """
    panels, phases, chosen = budgets(evaluations), {}, []
    for key, rows in panels.items():
        count = rows["label"].nunique()
        phases.setdefault((key[0], count > 1 and key[2] > 0), []).append((count, key))
    for found in phases.values():
        most = max(count for count, _ in found)
        chosen.append(max((key for count, key in found if 2 * count > most), key=lambda k: k[1:]))
    return {key: panels[key] for key in chosen}


def groups(rows: pd.DataFrame) -> list:
    """(name, [evaluations, seeds]) of each group, the best last score first."""
    parts = []
    for (label, number), part in rows.groupby(["label", "number"]):
        curve = part.groupby(["update", "seed"])["value"].last().unstack()
        name = f"{label} ({number + 1})" if number else label
        parts.append((label, name, curve))
    return sorted(parts, key=lambda part: -part[2].iloc[-1].mean())


def curves(axis, rows: pd.DataFrame, title: str, seeds: bool = False) -> None:
    """Learning curves of one dataset and budget: means over seeds, with the worst and the best.

    With `seeds` every seed is a thin line; of more than six algorithms the means alone are shown.
    """
    parts, lines = groups(rows), []
    for label, name, curve in parts:
        style, x, y = look(label), curve.index.to_numpy(), curve.to_numpy()
        mean = np.nanmean(y, 1)
        lines += axis.plot(x, mean, label=f"{name}  {mean[-1]:.0f}", **style)
        if seeds:
            gap = np.append(y.T, np.full((y.shape[1], 1), np.nan), 1)  # one line, for speed
            x = np.tile(np.append(x, np.nan), y.shape[1])
            axis.plot(x, gap.ravel(), color=style["color"], linewidth=0.6, alpha=0.6)
        elif len(parts) <= 6:
            ends = np.nanmin(y, 1), np.nanmax(y, 1)
            axis.fill_between(x, *ends, color=style["color"], alpha=0.12, linewidth=0)
    steps, updates = rows["steps"].iloc[0], rows["updates"].iloc[0]
    if steps:
        axis.axvline(updates, color="#555555", linestyle="--", linewidth=1)
    xlabel = "gradient updates" + (", online behind the dashed line" if steps else "")
    unit = rows["unit"].iloc[0]
    axis.set(title=title, xlabel=xlabel, ylabel=unit)
    if unit == "score":
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))  # so that small gains look small
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend(axis, lines)


def legend(axis, lines: list) -> None:
    """Below the axis, in columns that a phone still shows."""
    columns, names = min(3, max(1, len(lines))), [line.get_label() for line in lines]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": columns}
    axis.legend(lines, names, handlelength=1.5, columnspacing=1, **below)
    for ticks in (axis.xaxis, axis.yaxis):
        if ticks.get_scale() == "linear":
            ticks.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def profiles(axis, labels: dict, title: str) -> None:
    """Share of seeds above a score, of algorithms that have the same tasks."""
    values = np.concatenate([task for tasks in labels.values() for task in tasks.values()])
    thresholds = np.linspace(min(0, values.min()) - 1, values.max() + 1, 201)
    lines = []
    for label, tasks in labels.items():
        style, shares = look(label) | {"marker": ""}, numbers.profile([*tasks.values()], thresholds)
        lines += axis.plot(thresholds, shares, label=label, **style)
    axis.set(title=title, xlabel="score", ylabel="share of seeds above it", ylim=(-0.02, 1.02))
    legend(axis, lines)


def choices(axis, policies: dict, title: str, unit: str) -> None:
    """Expected score of the chosen seed, by the evaluation episodes spent on the choice."""
    found, lines = {}, []
    for name, own in policies.items():
        points = np.unique(np.geomspace(1, sum(map(len, own)), 12).round().astype(int))
        found[name] = points, numbers.chosen(own, points)
    for name, line in sorted(found.items(), key=lambda item: -item[1][1][-1]):
        lines += axis.plot(*line, label=name, **look(re.sub(r" \(\d+\)$", "", name)))
    axis.set(title=title, xlabel="evaluation episodes", ylabel=unit, xscale="log")
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    legend(axis, lines)


def svg(draw, lines: int, *arguments, **options) -> str:
    """One panel as an SVG document, with room for the legend of so many lines.

    The places are given, as to measure them would draw twice.
    """
    above, inner, below = 0.45, 2.3, 0.5 + 0.19 * -(-lines // 3)  # inches
    height = above + inner + below
    with plt.rc_context(STYLE):
        figure = Figure(figsize=(4.4, height))
        place = (0.13, below / height, 0.85, inner / height)
        draw(figure.add_axes(place), *arguments, **options)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def overview(evaluations: pd.DataFrame, path) -> None:
    """The main panels of all datasets as one PNG, three in a row."""
    panels = main_panels(evaluations)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        extent = {"figsize": (4.4 * columns, 3.9 * rows), "layout": "constrained"}
        figure, axes = plt.subplots(rows, columns, squeeze=False, **extent)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, (key, part) in zip(axes.flat, panels.items(), strict=False):
            curves(axis, part, f"{key[0]}\n{numbers.length(*key[1:3])} updates")
        figure.savefig(path, format="png", dpi=110)
        plt.close(figure)
