"""How cost grows: more callers on one connection, more connections, and a long transfer.

    python benchmarks/scaling.py                plain and sealed; a table and a JSON file

Each line has processes of its own. Memory is the peak of a whole process, Python included: the first
line shows what that is.
"""

import os
import sys
from typing import Any

from pair import measure_alone
from report import environment, show_number, write
from run import make_parser

NAMES = ("bokbok plain", "bokbok sealed")
CALLERS = (1, 10, 100, 1_000, 10_000)
CONNECTIONS = (10, 100, 1_000)
ITEM = 64 * 1024  # bytes


def main() -> int:
    """Measure and show; 1 if anything failed."""
    parser = make_parser(__doc__, "scaling.json")
    parser.add_argument("--transfer", type=int, default=2**30, help="bytes; 1 GiB by default")
    parser.set_defaults(seconds=3.0)
    given = parser.parse_args()
    jobs = [("scale", {"callers": number, "connections": 1}) for number in CALLERS]
    jobs += [("scale", {"callers": number, "connections": number}) for number in CONNECTIONS]
    jobs += [("transfer", {"total": given.transfer, "size": ITEM})]
    about = environment() | {"seconds": given.seconds}
    records: list[dict[str, Any]] = []
    for scenario, arguments in jobs:
        for adapter in NAMES:
            try:
                cores = os.sched_getaffinity(0)
                result = measure_alone(adapter, scenario, given.seconds, cores, **arguments)
            except Exception as exc:  # noqa: BLE001  (it is shown, and the rest is measured)
                result = {"error": str(exc)}
            records.append({"scenario": scenario, "adapter": adapter, **arguments, **result})
            what = ", ".join(f"{name} {number:,}" for name, number in arguments.items())
            figures = [f"{show_number(value)} {unit}" for unit, value in result.get("figures", {}).items()]
            outcome = ", ".join(figures) or result.get("unsupported") or f"FAILED: {result['error']}"
            print(f"{adapter:14} {scenario:8} {what:34} {outcome}", flush=True)
    write(given.output, {"environment": about, "records": records})
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
