"""Measure, show a table, and write a JSON file.

    python benchmarks/run.py                    ours and the yardsticks, in some two minutes
    python benchmarks/run.py all                all libraries
    python benchmarks/run.py bare "bokbok plain" --scenarios seq,bulk64k --rounds 9

Each round runs each scenario with each adapter once, first with both processes free to use every core,
then with both on one. What is compared is compared within a round; of the rounds the median is shown.
"""

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from typing import Any

import adapters
from pair import Pair, measure_alone
from scenarios import LOWER_IS_BETTER, MEASURE_MEMORY, SCENARIOS

RESULTS = os.path.join(os.path.dirname(__file__), "results")
PACKAGES = ["bokbok-trio", "trio", "PyNaCl", "trustme", "grpcio", "rpyc", "aiorpcX", "uvloop", "Pyro5"]
PACKAGES += ["pycapnp", "Twisted", "zerorpc", "pyzmq", "gevent"]

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
    git = [
        "git",
        "-C",
        os.path.dirname(os.path.abspath(__file__)),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
        "cpu": ", ".join(sorted(models)),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": versions,
        "load before": os.getloadavg(),
    }


class Bench:
    """Measures; keeps the processes of each adapter, and starts new ones when something failed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pairs: dict[str, Pair] = {}
        self._every_core = os.sched_getaffinity(0)
        self._cores = {"free": self._every_core, "one": {max(self._every_core)}}

    def measure(self, scenario: str, adapter: str, cores: str) -> Record:
        """Measure once; an error is in what is returned."""
        try:
            if scenario in MEASURE_MEMORY:
                return measure_alone(adapter, scenario, self._seconds, self._cores[cores])
            if adapter not in self._pairs:
                self._pairs[adapter] = Pair(adapter)
            result = self._pairs[adapter].measure(scenario, self._seconds, self._cores[cores])
        except Exception as exc:  # noqa: BLE001  (one adapter's failure is not to end the run)
            result = {"error": str(exc)}
        if "error" in result and adapter in self._pairs:
            self._pairs.pop(adapter).close()
        return result

    def close(self) -> None:
        """End all processes."""
        for pair in self._pairs.values():
            pair.close()


def measure_all(names: list[str], scenarios: list[str], rounds: int, seconds: float) -> list[Record]:
    """Measure everything, several times, and say how far it is."""
    records: list[Record] = []
    given_up: set[tuple[str, str]] = set()  # what is unsupported stays so
    bench = Bench(seconds)
    try:
        for round_number in range(rounds):
            for scenario in scenarios:
                say(f"round {round_number + 1} of {rounds}: {scenario}")
                for cores in ("free", "one"):
                    for adapter in names:
                        if (scenario, adapter) in given_up or (scenario == "idle" and cores == "one"):
                            continue
                        record = bench.measure(scenario, adapter, cores)
                        record |= {
                            "round": round_number,
                            "scenario": scenario,
                            "adapter": adapter,
                            "cores": cores,
                        }
                        records.append(record)
                        if "unsupported" in record:
                            given_up.add((scenario, adapter))
                        if "error" in record:
                            say(f"{adapter}, {scenario}: {record['error']}\n")
    finally:
        bench.close()
        say("")
    return records


def say(text: str) -> None:
    """Show on standard error what goes on, in a line that the next overwrites."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


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
        compared = [
            record["figures"][unit] / base
            for record in group
            if (base := yardstick.get((scenario, unit, cores, record["round"])))
        ]
        row = {"scenario": scenario, "unit": unit, "cores": cores, "adapter": adapter, "rounds": len(group)}
        row |= {"median": statistics.median(values), "min": min(values), "max": max(values)}
        row["ratio"] = statistics.median(compared) if compared else None
        if unit == next(iter(group[0]["figures"])):
            for side in ("client", "server"):
                per_call = [record[f"{side}_cpu"] / max(record["calls"], 1) for record in group]
                row[f"{side}_cpu_us"] = statistics.median(per_call) * 1e6
        rows.append(row)
    return rows


def show(rows: list[Record], records: list[Record]) -> None:
    """Print a table for each figure of each scenario, and what is in none, with the reason."""
    found = {(row["scenario"], row["unit"], row["cores"], row["adapter"]): row for row in rows}
    columns = f"{'median':>8} {'min .. max':>18} {'ratio':>6} {'CPU us':>14}"
    print(f"CPU us: of a call, client + server. ratio: to {adapters.YARDSTICK}, in the same round.")
    for scenario, unit in dict.fromkeys((row["scenario"], row["unit"]) for row in rows):
        note = ", less is better" if unit in LOWER_IS_BETTER else ""
        title, one_core = f"{scenario}: {unit}{note}", "both on one core:"
        print(f"\n{title:{15 + len(columns)}} | {one_core}\n{'':15}{columns} | {columns}")
        for adapter in adapters.WHERE:
            cells = [found.get((scenario, unit, cores, adapter)) for cores in ("free", "one")]
            if any(cells):
                print(f"{adapter:15}{' | '.join(map(show_cell, cells))}".rstrip(" |"))
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if reason := record.get("unsupported"):
            left_out[record["adapter"], reason].append(record["scenario"])
    print()
    for (adapter, reason), scenarios in left_out.items():
        print(f"{adapter} is not in {', '.join(scenarios)}: {reason}")


def show_cell(row: Record | None) -> str:
    """The columns of one adapter, with free cores or on one."""
    if row is None:
        return " " * 49
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    cpu = f"{row['client_cpu_us']:,.0f}+{row['server_cpu_us']:,.0f}" if "client_cpu_us" in row else ""
    spread = f"{show_number(row['min'])} .. {show_number(row['max'])}"
    return f"{show_number(row['median']):>8} {spread:>18} {ratio:>6} {cpu:>14}"


def show_number(value: float) -> str:
    """Three figures or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004


def main() -> int:
    """Do as the command line says; 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="*", help=f"all, or some of: {', '.join(adapters.WHERE)}")
    parser.add_argument(
        "--scenarios", default=",".join(SCENARIOS), help="with commas between; all by default"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.25, help="of each measurement, 0.25 by default")
    parser.add_argument("--output", default=os.path.join(RESULTS, "run.json"))
    given = parser.parse_args()
    names = list(adapters.WHERE) if given.adapters == ["all"] else given.adapters or list(adapters.OURS)
    scenarios = given.scenarios.split(",")
    if unknown := {*names, *scenarios} - {*adapters.WHERE, *SCENARIOS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    about = environment() | {"rounds": given.rounds, "seconds": given.seconds}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TMPDIR"] = directory  # what the processes leave behind goes with it
        records = measure_all(names, scenarios, given.rounds, given.seconds)
    rows = summarize(records)
    show(rows, records)
    write(given.output, {"environment": about, "summary": rows, "records": records})
    failed = sorted({(record["adapter"], record["scenario"]) for record in records if "error" in record})
    for adapter, scenario in failed:
        print(f"FAILED: {adapter}, {scenario}")
    return 1 if failed else 0


def write(path: str, results: object) -> None:
    """Write a JSON file, and say so."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        json.dump(results, file, indent=1)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    sys.exit(main())
