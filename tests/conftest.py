from __future__ import annotations

import logging

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def see_all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="bokbok_trio")


@pytest.fixture(params=["plain", "sealed"])
def sealed(request: pytest.FixtureRequest) -> bool:
    """For tests that must hold in both modes."""
    return bool(request.param == "sealed")
