"""Faults of links and processes, for some seconds: the ledgers agree, and all comes to rest."""

import re
import sys
from collections.abc import Iterator

import pytest

from tests.support.scripts import MODES, Processes, check_output, started_in_each_mode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with started_in_each_mode("ledger.py", "--requests", "600", "--calm", "0.4") as started:
        yield started


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_unsaid_or_run_twice(mode: str, processes: Processes) -> None:
    answers = re.search(r"answer +(\d+), of which (\d+) ran", check_output(processes[mode]))
    assert answers is not None
    assert answers[1] == answers[2]
    assert int(answers[1]) > 300
