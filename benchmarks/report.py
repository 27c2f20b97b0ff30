"""What becomes of measurements: where they were made, medians and ratios, a table, a JSON file."""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections import defaultdict
from contextlib import suppress
from typing import Any

import adapters
from scenarios import LOWER_IS_BETTER

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
PACKAGES = [
    "bokbok-trio",
    "trio",
    "PyNaCl",
    "msgspec",
    "trustme",
    "grpcio",
    "rpyc",
    "aiorpcX",
    "uvloop",
    "Pyro5",
]
PACKAGES += ["pycapnp", "Twisted", "zerorpc", "pyzmq", "gevent"]
CELL = "{:>8} {:>18} {:>6} {:>14}"

Record = dict[str, Any]
"""What one measurement gave, and of what it is: round, scenario, adapter, cores ("free" or "one")."""


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    with open("/proc/cpuinfo") as lines:
        models = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = os.path.dirname(RESULTS)
    described = subprocess.run(git, cwd=here, capture_output=True, text=True, check=False)
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": described.stdout.strip() or None,
        "cpu": ", ".join(sorted(models)),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": versions,
        "load before": os.getloadavg(),
    }


def summarize(records: list[Record]) -> list[Record]:
    """Find, for each figure: median, least and most; the ratio to the yardstick; CPU time of a call."""
    grouped: dict[tuple[str, str, str, str], list[Record]] = defaultdict(list)
    yardstick: dict[tuple[Any, ...], float] = {}
    for record in records:
        for unit, value in record.get("figures", {}).items():
            grouped[record["scenario"], unit, record["cores"], record["adapter"]].append(record)
            if record["adapter"] == adapters.YARDSTICK:
                yardstick[record["scenario"], unit, record["cores"], record["round"]] = value
    rows = []
    for (scenario, unit, cores, adapter), group in grouped.items():
        values = [record["figures"][unit] for record in group]
        bases = [yardstick.get((scenario, unit, cores, record["round"])) for record in group]
        ratios = [value / base for value, base in zip(values, bases, strict=True) if base]
        row = {"scenario": scenario, "unit": unit, "cores": cores, "adapter": adapter, "rounds": len(group)}
        row |= {"median": statistics.median(values), "min": min(values), "max": max(values)}
        row["ratio"] = statistics.median(ratios) if ratios else None
        if unit == next(iter(group[0]["figures"])):
            for side in ("client", "server"):
                per_call = [record[f"{side}_cpu"] / max(record["calls"], 1) for record in group]
                row[f"{side}_cpu_us"] = statistics.median(per_call) * 1e6
        rows.append(row)
    return rows


def show(rows: list[Record], records: list[Record]) -> None:
    """Print a table for each figure of each scenario, and what is in none, with the reason."""
    found = {(row["scenario"], row["unit"], row["cores"], row["adapter"]): row for row in rows}
    columns = CELL.format("median", "min .. max", "ratio", "CPU us")
    print(f"CPU us: of a call, client + server. ratio: to {adapters.YARDSTICK}, in the same round.")
    for scenario, unit in dict.fromkeys((row["scenario"], row["unit"]) for row in rows):
        title = f"{scenario}: {unit}" + (", less is better" if unit in LOWER_IS_BETTER else "")
        print(f"\n{title:{15 + len(columns)}} | both on one core:\n{'':15}{columns} | {columns}")
        for adapter in adapters.WHERE:
            cells = [found.get((scenario, unit, cores, adapter)) for cores in ("free", "one")]
            if any(cells):
                print(f"{adapter:15}{' | '.join(map(show_cell, cells))}".rstrip(" |"))
    print()
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if "unsupported" in record:
            left_out[record["adapter"], record["unsupported"]].append(record["scenario"])
    for (adapter, reason), scenarios in left_out.items():
        print(f"{adapter} is not in {', '.join(scenarios)}: {reason}")
    for adapter, scenario in sorted({(r["adapter"], r["scenario"]) for r in records if "error" in r}):
        print(f"FAILED: {adapter}, {scenario}")


def show_cell(row: Record | None) -> str:
    """The columns of one adapter, with free cores or on one."""
    if row is None:
        return CELL.format("", "", "", "")
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    cpu = f"{row['client_cpu_us']:,.0f}+{row['server_cpu_us']:,.0f}" if "client_cpu_us" in row else ""
    spread = f"{show_number(row['min'])} .. {show_number(row['max'])}"
    return CELL.format(show_number(row["median"]), spread, ratio, cpu)


def show_number(value: float) -> str:
    """Three figures or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004


def write(path: str, results: object) -> None:
    """Write a JSON file, and say so."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        json.dump(results, file, indent=1)
    print(f"\nwritten: {path}")
