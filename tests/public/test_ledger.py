"""Faults of links and processes, for some seconds: the ledgers agree, and all comes to rest."""

import pathlib
import re
import subprocess
import sys
from collections.abc import Generator

import pytest

LEDGER = str(pathlib.Path(__file__).parents[2] / "benchmarks" / "ledger.py")


MODES = ("plain", "sealed")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@pytest.fixture(scope="module")
def processes() -> Generator[dict[str, subprocess.Popen[str]]]:
    """One for each mode, which run at the same time: they mostly wait."""
    started = {
        mode: subprocess.Popen(
            [sys.executable, LEDGER, "--requests", "600", "--calm", "0.4", f"--{mode}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mode in MODES
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_unsaid_or_run_twice(mode: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    process = processes[mode]
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (output + errors)[-20_000:]
    answers = re.search(r"answer +(\d+), of which (\d+) ran", output)
    assert answers is not None
    assert answers[1] == answers[2]
    assert int(answers[1]) > 300
