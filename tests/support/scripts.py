"""Runs the long-running programs of ``benchmarks/`` for some seconds in each mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODES = ("plain", "sealed")

Processes = dict[str, "subprocess.Popen[str]"]


@contextmanager
def started_in_each_mode(script: str, *arguments: str) -> Iterator[Processes]:
    """Start a process for each mode. They run at the same time, because they mostly wait."""
    path = Path(__file__).parents[2] / "benchmarks" / script
    started = {
        mode: subprocess.Popen(
            [sys.executable, str(path), *arguments, f"--{mode}"],
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


def check_output(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a process that must end well, and return what it printed."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (output + errors)[-20_000:]
    return output
