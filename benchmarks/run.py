"""Measure, show a table, and write a JSON file.

    python benchmarks/run.py                    ours and the yardsticks, in some two minutes
    python benchmarks/run.py all                all libraries
    python benchmarks/run.py bare "bokbok plain" --scenarios seq,bulk64k --rounds 9

Each round runs each scenario with each adapter once, first with both processes free to use every core,
then with both on one. What is compared is compared within a round; of the rounds the median is shown.
"""

import argparse
import os
import sys
import tempfile
from itertools import product

import adapters
from pair import Pair, measure_alone
from report import RESULTS, Record, environment, show, summarize, write
from scenarios import MEASURE_MEMORY, SCENARIOS


class Bench:
    """Measures; keeps the processes of each adapter, and starts new ones when something failed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pairs: dict[str, Pair] = {}
        every = os.sched_getaffinity(0)
        self._cores = {"free": every, "one": {max(every)}}

    def measure(self, scenario: str, cores: str, adapter: str) -> Record:
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
    left_out: set[tuple[str, str]] = set()  # what is unsupported stays so
    bench = Bench(seconds)
    try:
        for number, scenario, cores in product(range(rounds), scenarios, ("free", "one")):
            if scenario == "idle" and cores == "one":
                continue  # memory does not depend on cores
            say(f"round {number + 1} of {rounds}: {scenario}")
            for adapter in names:
                if (scenario, adapter) not in left_out:
                    record = {"round": number, "scenario": scenario, "cores": cores, "adapter": adapter}
                    record |= bench.measure(scenario, cores, adapter)
                    records.append(record)
                    if "unsupported" in record:
                        left_out.add((scenario, adapter))
                    if "error" in record:
                        say(f"{adapter}, {scenario}: {record['error']}\n")
    finally:
        bench.close()
        say("")
    return records


def say(text: str) -> None:
    """Show on standard error what goes on, in a line that the next overwrites."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def make_parser(text: str | None, output: str) -> argparse.ArgumentParser:
    """A command line, with a module's docstring as its help."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--output", default=os.path.join(RESULTS, output), help="the JSON file")
    return parser


def main() -> int:
    """Do as the command line says; 1 if anything failed."""
    parser = make_parser(__doc__, "run.json")
    parser.add_argument("adapters", nargs="*", help=f"all, or some of: {', '.join(adapters.WHERE)}")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="commas between; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(seconds=0.15)
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
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
