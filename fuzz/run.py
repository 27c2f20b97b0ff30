"""Fuzz all targets, or see that fuzzing finds bugs that are planted for it.

An input that a target fails on is kept in ``fuzz/crashes``. When the fault is mended, it belongs to
``fuzz/found``, in the folder of its target: the tests run all of these.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from . import seeds
from .planted import PLANTED, Planted, plant
from .targets import TARGETS

ROOT: Final = Path(__file__).parent.parent
CRASHES: Final = ROOT / "fuzz" / "crashes"
MAX_SIZE: Final = 4096
"""Bytes of an input."""

SLOW: Final = 10
"""Seconds that one input may take."""

MEMORY: Final = 2048
"""MiB that a target may use."""

PYTHON_FAILED: Final = "=== Uncaught Python exception"
"""How Atheris tells of a target that raised."""

MAX_LOG: Final = 2000
"""Characters that are shown of the log of a target that failed."""


class Outcome(NamedTuple):
    """What came of fuzzing a target."""

    crashed: bool
    inputs: int
    coverage: int
    seconds: float
    log: str


def fuzz(target: str, corpus: Path, seconds: float, *, root: Path, crashes: Path) -> Outcome:
    """Fuzz a target of the tree at `root` for so many seconds, or until it fails."""
    since = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fuzz.one", target, str(corpus)),
            f"-max_total_time={max(1, round(seconds))}",
            f"-artifact_prefix={crashes}/{target}-",
            f"-max_len={MAX_SIZE}",
            f"-timeout={SLOW}",
            f"-rss_limit_mb={MEMORY}",
            "-print_final_stats=1",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    log = done.stdout + done.stderr
    inputs = re.findall(r"^(?:stat::number_of_executed_units: (\d+)|#(\d+)\t)", log, re.MULTILINE)
    coverage = re.findall(r" cov: (\d+) ", log)
    most = max((int(one or other) for one, other in inputs), default=0)
    covered = int(coverage[-1]) if coverage else 0
    return Outcome(done.returncode != 0, most, covered, time.perf_counter() - since, log)


def write_seeds(folder: Path) -> None:
    for target, inputs in seeds.make_seeds().items():
        corpus = folder / target
        corpus.mkdir()
        for number, data in enumerate(inputs):
            (corpus / f"{number:04}").write_bytes(data)


def fuzz_all(targets: list[str], seconds: float) -> bool:
    """Fuzz the package as it is. Returns whether nothing was found."""
    CRASHES.mkdir(exist_ok=True)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        for target in targets:
            outcome = fuzz(target, Path(folder, target), seconds, root=ROOT, crashes=CRASHES)
            print(
                f"{'FAILED' if outcome.crashed else 'passed'}  {target}: {outcome.inputs:,} inputs in"
                f" {outcome.seconds:.0f} s, {outcome.coverage} places reached",
                flush=True,
            )
            if outcome.crashed:
                print(outcome.log[outcome.log.find(PYTHON_FAILED) :][:MAX_LOG])
                good = False
    return good


def copy_with(planted: Planted, root: Path) -> None:
    """Copy what is needed, with one bug in it."""
    for name in ("bokbok_trio", "fuzz", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "crashes"))
    (root / "bokbok_trio" / planted.file).write_text(plant(planted), encoding="utf-8")


def find_planted(targets: list[str], seconds: float) -> bool:
    """Fuzz the package with each planted bug. Returns whether all were found."""
    good = True
    for planted in PLANTED:
        if planted.target not in targets:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_with(planted, folder)
            write_seeds(folder)
            outcome = fuzz(planted.target, folder / planted.target, seconds, root=folder, crashes=folder)
        found = outcome.crashed and PYTHON_FAILED in outcome.log
        print(
            f"{'found ' if found else 'MISSED'}  {planted.target}: {planted.what}:"
            f" {outcome.inputs:,} inputs, {outcome.seconds:.1f} s",
            flush=True,
        )
        if not found:
            print(outcome.log[-MAX_LOG:])
            good = False
    return good


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s fuzz --", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="which ones; all by default")
    parser.add_argument(
        "--seconds", type=float, help="for each target, 60 by default; at most for each bug, 180"
    )
    parser.add_argument("--planted", action="store_true", help="find the planted bugs instead")
    arguments = parser.parse_args()
    run, seconds = (find_planted, 180) if arguments.planted else (fuzz_all, 60)
    sys.exit(not run(arguments.targets or list(TARGETS), arguments.seconds or seconds))


if __name__ == "__main__":
    main()
