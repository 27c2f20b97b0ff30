"""Draw what was measured, as SVG files; needs matplotlib.

    python benchmarks/plot.py RESULTS.json DIRECTORY

Results of `run.py` become a chart for each figure (``seq-calls-s.svg``, ...) and one of all ratios
(``ratios.svg``); those of `scaling.py` become ``scaling.svg``.
"""

import json
import os
import re
import sys
from typing import Any

import adapters
import matplotlib as mpl
from matplotlib import pyplot as plt
from report import Record, show_number
from scenarios import LOWER_IS_BETTER

mpl.rcParams |= {"svg.hashsalt": "bokbok", "svg.fonttype": "none", "font.size": 9}
mpl.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}

OURS = {
    "bokbok plain": "#1b7837",
    "bokbok sealed": "#5aae61",
    "typed plain": "#1b7837",
    "typed sealed": "#5aae61",
}
CORES = {"free": "free cores", "one": "both processes on one core"}


def colour(adapter: str) -> str:
    """Ours green, yardsticks dark, others light."""
    return OURS.get(adapter, "#555555" if adapter in adapters.OURS else "#b0b8c4")


def draw_bars(rows: list[Record], title: str, path: str) -> None:
    """Medians with their spread, with free cores and on one."""
    panels = [cores for cores in CORES if any(row["cores"] == cores for row in rows)]
    size = (4.2 * len(panels), 0.9 + 0.27 * len({row["adapter"] for row in rows}))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, cores in zip(axes[0], panels, strict=True):
        shown = [row for row in reversed(rows) if row["cores"] == cores]
        names = [row["adapter"] for row in shown]
        below = [row["median"] - row["min"] for row in shown]
        above = [row["max"] - row["median"] for row in shown]
        medians, colours = [row["median"] for row in shown], [colour(name) for name in names]
        bars = axis.barh(names, medians, xerr=[below, above], color=colours)
        axis.bar_label(bars, list(map(show_number, medians)), padding=4, fontsize=8)
        axis.margins(x=0.18)
        axis.set_title(CORES[cores], fontsize=9)
    figure.suptitle(title)
    save(figure, path)


def draw_ratios(rows: list[Record], path: str) -> None:
    """A mark for each adapter in each scenario, relative to the yardstick."""
    rows = [row for row in rows if row["cores"] == "free" and row["ratio"] and "client_cpu_us" in row]
    rows = [row for row in rows if row["unit"] not in LOWER_IS_BETTER]
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.42 * len(scenarios)))
    for number, adapter in enumerate(adapters.WHERE):
        shown = [row for row in rows if row["adapter"] == adapter]
        places = [-scenarios.index(row["scenario"]) for row in shown]
        mark = "o" if adapter in OURS else f"${number}$"
        colours = OURS.get(adapter, "#444444")
        axis.scatter([row["ratio"] for row in shown], places, s=45, marker=mark, color=colours, label=adapter)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axis.axvline(1, color="#555555", linewidth=0.8)
    axis.set_yticks([-place for place in range(len(scenarios))], scenarios)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_title(f"ratio to {adapters.YARDSTICK}, free cores; more is better")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    save(figure, path)


def draw_scaling(records: list[Record], path: str) -> None:
    """Calls per second and memory, by callers on one connection and by connections."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 5), sharex="col")
    ways = (("callers", "callers on one connection"), ("connections", "connections with a caller each"))
    rows = (("calls/s", "-o", 0), ("server's peak MiB", "-o", 1), ("client's peak MiB", "--s", 1))
    for column, (by, label) in enumerate(ways):
        axes[1][column].set_xlabel(label)
        axes[1][column].set_xscale("log")
        for adapter, (unit, style, row) in ((adapter, row) for adapter in OURS for row in rows):
            points = [
                (record[by], record["figures"][unit])
                for record in records
                if record["adapter"] == adapter and record["scenario"] == "scale" and "figures" in record
                if record["connections"] == (1 if by == "callers" else record["callers"])
            ]
            if points:
                axis = axes[row][column]
                axis.plot(*zip(*points, strict=True), style, color=OURS[adapter], label=f"{adapter}, {unit}")
                axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    save(figure, path)


def save(figure: Any, path: str) -> None:
    """Write it, without a date, so that the same results give the same file."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main(results_path: str, directory: str) -> None:
    """Draw everything that a file of results has."""
    with open(results_path) as file:
        results = json.load(file)
    os.makedirs(directory, exist_ok=True)
    if "summary" not in results:
        draw_scaling(results["records"], os.path.join(directory, "scaling.svg"))
        return
    rows = results["summary"]
    for scenario, unit in dict.fromkeys((row["scenario"], row["unit"]) for row in rows):
        name = re.sub(r"[^a-z0-9]+", "-", f"{scenario} {unit}".lower())
        title = f"{scenario}: {unit}" + (", less is better" if unit in LOWER_IS_BETTER else "")
        chosen = [row for row in rows if (row["scenario"], row["unit"]) == (scenario, unit)]
        draw_bars(chosen, title, os.path.join(directory, f"{name}.svg"))
    draw_ratios(rows, os.path.join(directory, "ratios.svg"))


if __name__ == "__main__":
    main(*sys.argv[1:])
