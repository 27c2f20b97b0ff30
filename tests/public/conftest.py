"""Fixtures of several files."""

from __future__ import annotations

import pytest

from ..support.network import Network


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr("bokbok_trio._client.dial", network.dial)
    # The longest waits there are, so that times can be told.
    monkeypatch.setattr("bokbok_trio._reconnecting._jitter", lambda _least, longest: longest)
    return network
