"""The soak, for some seconds: nothing hangs, no answer is wrong, and all comes to rest."""

import pathlib
import subprocess
import sys

import pytest

SOAK = str(pathlib.Path(__file__).parent.parent / "benchmarks" / "soak.py")


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("mode", ["plain", "sealed"])
def test_a_short_soak_finds_nothing_wrong(mode: str) -> None:
    command = [sys.executable, SOAK, "--seconds", "1.5", f"--{mode}", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
    assert "handled each second" in done.stdout
