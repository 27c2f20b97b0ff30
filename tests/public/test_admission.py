"""Who is admitted to a server counts until the end, whatever goes wrong between."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import ConnectionLost, HandshakeError, open_connection, open_server
from bokbok_trio.testing import MemoryListener
from tests.support.helpers import echo


async def test_a_client_whose_connection_could_not_be_made_counts_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    listener = MemoryListener()
    async with open_server([listener], echo) as server:
        with monkeypatch.context() as patch:
            patch.setattr("bokbok_trio._server.Connection", fail)
            with pytest.raises((ConnectionLost, HandshakeError)):
                async with open_connection(listener.connect()) as client:
                    await client.request(["x"])
            await trio.testing.wait_all_tasks_blocked()
        assert "MemoryError" in caplog.text
        assert server.statistics().connections == 0
        async with open_connection(listener.connect()) as client:
            assert await client.request(["x"]) == [b"x"]
            assert server.statistics().connections == 1
