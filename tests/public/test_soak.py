"""The soak, for some seconds: nothing hangs, no answer is wrong, and all comes to rest."""

import pathlib
import subprocess
import sys
from collections.abc import Generator

import pytest

SOAK = str(pathlib.Path(__file__).parents[2] / "benchmarks" / "soak.py")


MODES = ("plain", "sealed")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@pytest.fixture(scope="module")
def processes() -> Generator[dict[str, subprocess.Popen[str]]]:
    """One for each mode, which run at the same time: they mostly wait."""
    started = {
        mode: subprocess.Popen(
            [sys.executable, SOAK, "--seconds", "1.5", "--seed", "1", f"--{mode}"],
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
def test_a_short_soak_finds_nothing_wrong(mode: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    process = processes[mode]
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (output + errors)[-20_000:]
    assert "handled each second" in output
