"""The soak, for some seconds: nothing hangs, no answer is wrong, and all comes to rest."""

import sys
from collections.abc import Iterator

import pytest

from tests.support.scripts import MODES, Processes, check_output, started_in_each_mode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with started_in_each_mode("soak.py", "--seconds", "1.5", "--seed", "1") as started:
        yield started


@pytest.mark.parametrize("mode", MODES)
def test_a_short_soak_finds_nothing_wrong(mode: str, processes: Processes) -> None:
    assert "handled each second" in check_output(processes[mode])
