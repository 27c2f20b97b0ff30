from __future__ import annotations

import logging
import signal

import pytest
from hypothesis import settings

# Where a test does not say how many. `--hypothesis-profile=default` tries more.
settings.register_profile("quick", max_examples=50, deadline=None)
settings.load_profile("quick")

pytest_plugins = ["pytester"]

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be the programs that tests
# start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def see_all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="bokbok_trio")


@pytest.fixture(params=["plain", "sealed"])
def sealed(request: pytest.FixtureRequest) -> bool:
    """For tests that must hold in both modes."""
    return bool(request.param == "sealed")
