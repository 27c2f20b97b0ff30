"""Draw what was measured, as SVG files; needs matplotlib.

    python benchmarks/plot.py RESULTS.json DIRECTORY

Results of `run.py` become a chart for each figure (``seq-calls-s.svg``, ...) and one of all ratios
(``ratios.svg``); those of `scaling.py` become ``scaling.svg``.
"""

import json
import math
import os
import re
import sys
from typing import Any

import adapters
import matplotlib as mpl
from matplotlib import pyplot as plt
from run import show_number
from scenarios import LOWER_IS_BETTER

mpl.rcParams |= {"svg.hashsalt": "bokbok", "svg.fonttype": "none", "axes.spines.top": False}
mpl.rcParams |= {"axes.spines.right": False, "font.size": 9, "figure.constrained_layout.use": True}

COLOURS = {"bokbok plain": "#1b7837", "bokbok sealed": "#5aae61"}
YARDSTICKS = ("bare", "bare pipelined", "bare TLS")
CORES = {"free": "free cores", "one": "both processes on one core"}
MOST_RATIO = 8.0
"""Where the ratios' axis ends, and its inverse, where it begins."""


def colour(adapter: str) -> str:
    """Ours green, yardsticks dark, others light."""
    return COLOURS.get(adapter, "#555555" if adapter in YARDSTICKS else "#b0b8c4")


def draw_figure(rows: list[dict[str, Any]], title: str, path: str) -> None:
    """Bars with their spread; one panel with free cores, and one with one core."""
    panels = [cores for cores in CORES if any(row["cores"] == cores for row in rows)]
    size = (4.2 * len(panels), 0.9 + 0.27 * len({row["adapter"] for row in rows}))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, cores in zip(axes[0], panels, strict=True):
        shown = [row for row in reversed(rows) if row["cores"] == cores]
        names = [row["adapter"] for row in shown]
        medians = [row["median"] for row in shown]
        spread = [
            [row["median"] - row["min"] for row in shown],
            [row["max"] - row["median"] for row in shown],
        ]
        bars = axis.barh(
            names, medians, xerr=spread, color=[colour(name) for name in names], ecolor="#222222"
        )
        axis.bar_label(bars, [show_number(median) for median in medians], padding=4, fontsize=8)
        axis.margins(x=0.18)
        axis.set_title(CORES[cores], fontsize=9)
    figure.suptitle(title)
    save(figure, path)


def draw_ratios(rows: list[dict[str, Any]], path: str) -> None:
    """A point for each adapter in each scenario, relative to the yardstick."""
    kept = [row for row in rows if row["ratio"] and row["cores"] == "free" and "client_cpu_us" in row]
    kept = [row for row in kept if row["unit"] not in LOWER_IS_BETTER]
    scenarios = list(dict.fromkeys(row["scenario"] for row in kept))
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.42 * len(scenarios)))
    axis.axvline(1, color="#555555", linewidth=0.8)
    for adapter in dict.fromkeys(row["adapter"] for row in kept):
        of_adapter = [row for row in kept if row["adapter"] == adapter]
        axis.scatter(
            [min(max(row["ratio"], 1 / MOST_RATIO), MOST_RATIO) for row in of_adapter],
            [len(scenarios) - scenarios.index(row["scenario"]) for row in of_adapter],
            s=45,
            marker="o" if adapter in COLOURS else f"${list(adapters.WHERE).index(adapter)}$",
            color=COLOURS.get(adapter, "#444444"),
            label=adapter,
        )
    axis.set_xscale("log", base=2)
    axis.set_xlim(1 / MOST_RATIO / 1.1, MOST_RATIO * 1.1)
    ticks = [2.0**power for power in range(-int(math.log2(MOST_RATIO)), int(math.log2(MOST_RATIO)) + 1)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks(range(len(scenarios), 0, -1), scenarios)
    axis.grid(axis="y", linewidth=0.3)
    axis.set_title(f"as much as {adapters.YARDSTICK}, or more: free cores, medians of the rounds' ratios")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    save(figure, path)


def draw_scaling(records: list[dict[str, Any]], path: str) -> None:
    """Calls per second and memory, by callers on one connection and by connections."""
    figure, axes = plt.subplots(2, 2, figsize=(8, 5), sharex="col")
    ways = (("callers", "callers on one connection"), ("connections", "connections with a caller each"))
    for column, (by, label) in enumerate(ways):
        other = "connections" if by == "callers" else "callers"
        for adapter in dict.fromkeys(record["adapter"] for record in records):
            points = [
                record
                for record in records
                if record["adapter"] == adapter
                and record["scenario"] == "scale"
                and "figures" in record
                and (record["connections"] == 1 or (by == "connections" and record[by] == record[other]))
            ]
            for row, units in enumerate((["calls/s"], ["server's peak MiB", "client's peak MiB"])):
                for unit, style in zip(units, ("-o", "--s"), strict=False):
                    axes[row][column].plot(
                        [point[by] for point in points],
                        [point["figures"][unit] for point in points],
                        style,
                        color=colour(adapter),
                        label=adapter if row == 0 else f"{adapter}, {unit.split(chr(39))[0]}",
                    )
        axes[1][column].set_xlabel(label)
        axes[1][column].set_xscale("log")
        for row, name in enumerate(("calls/s", "peak of memory, MiB")):
            axes[row][column].set_ylim(bottom=0)
            axes[row][column].set_ylabel(name)
            axes[row][column].legend(fontsize=8, frameon=False)
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
        draw_figure(chosen, title, os.path.join(directory, f"{name}.svg"))
    draw_ratios(rows, os.path.join(directory, "ratios.svg"))


if __name__ == "__main__":
    main(*sys.argv[1:])
