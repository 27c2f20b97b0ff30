"""How cost grows: more callers on one connection, more connections, and a long transfer.

    python benchmarks/scaling.py                 both plain and sealed; a table and a JSON file

Each line has processes of its own. Memory is the peak of the whole process, Python included: the
first line shows what that is.
"""

import argparse
import os
import sys
from typing import Any

from pair import measure_alone
from run import RESULTS, environment, show_number, write

NAMES = ("bokbok plain", "bokbok sealed")
CALLERS = (1, 10, 100, 1_000, 10_000)
CONNECTIONS = (1, 10, 100, 1_000)
ITEM = 64 * 1024


def main() -> int:
    """Measure and show; 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--transfer", type=int, default=2**30, help="bytes; 1 GiB by default")
    parser.add_argument("--output", default=os.path.join(RESULTS, "scaling.json"))
    given = parser.parse_args()
    jobs: list[tuple[str, dict[str, int]]] = [
        *(("scale", {"callers": callers, "connections": 1}) for callers in CALLERS),
        *(("scale", {"callers": connections, "connections": connections}) for connections in CONNECTIONS[1:]),
        ("transfer", {"total": given.transfer, "size": ITEM}),
    ]
    records: list[dict[str, Any]] = []
    for scenario, arguments in jobs:
        for adapter in NAMES:
            try:
                cores = os.sched_getaffinity(0)
                result = measure_alone(adapter, scenario, given.seconds, cores, **arguments)
            except Exception as exc:  # noqa: BLE001  (it is shown, and the rest is measured)
                result = {"error": str(exc)}
            records.append(result | {"scenario": scenario, "adapter": adapter, **arguments})
            show(records[-1], arguments)
    write(given.output, {"environment": environment(), "records": records})
    return 1 if any("error" in record for record in records) else 0


def show(record: dict[str, Any], arguments: dict[str, int]) -> None:
    """Print a line."""
    what = ", ".join(f"{name} {number:,}" for name, number in arguments.items())
    figures = [f"{show_number(value)} {unit}" for unit, value in record.get("figures", {}).items()]
    outcome = ", ".join(figures) or record.get("unsupported") or f"FAILED: {record['error']}"
    print(f"{record['adapter']:14} {record['scenario']:8} {what:34} {outcome}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
