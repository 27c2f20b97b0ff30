"""Faults of links and processes, for some seconds: the ledgers agree, and all comes to rest."""

import pathlib
import re
import subprocess
import sys

import pytest

LEDGER = str(pathlib.Path(__file__).parent.parent / "benchmarks" / "ledger.py")


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("mode", ["plain", "sealed"])
def test_nothing_is_lost_unsaid_or_run_twice(mode: str) -> None:
    command = [sys.executable, LEDGER, "--requests", "600", "--calm", "0.4", f"--{mode}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
    answers = re.search(r"answer +(\d+), of which (\d+) ran", done.stdout)
    assert answers is not None
    assert answers[1] == answers[2]
    assert int(answers[1]) > 300
