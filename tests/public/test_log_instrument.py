"""The lines of `LogInstrument`."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, RemoteError, RequestError, Settings, open_connection, open_server
from bokbok_trio.instruments import LogInstrument
from bokbok_trio.testing import MemoryListener, open_memory_server

NAME = "bokbok_trio.requests"
CLOSED = "this side closed the connection"


async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
    match request:
        case [b"sleep", seconds]:
            await trio.sleep(float(seconds))
        case [b"no"]:
            raise RequestError("no", code="no\nway")
        case _:
            await trio.lowlevel.checkpoint()
    return request


async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
    await trio.sleep(30)


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [each.message for each in caplog.records if each.name == NAME and each.levelno == level]


async def test_each_request_has_a_line_with_its_connection_and_its_id(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(instruments=[LogInstrument()])
    async with open_memory_server(handler, users=["alice", "bob"]) as server:
        for user in ("alice", "bob"):
            async with server.connect(user, settings=settings) as client:
                await client.request(["a", "xyz"])
                with pytest.raises(RemoteError):
                    await client.request(["no"])
                with trio.move_on_after(2):
                    await client.request(["sleep", "3"])
    assert lines(caplog, logging.DEBUG) == [
        f"connection {number}{rest}"
        for number, user in ((1, "alice"), (2, "bob"))
        for rest in (
            f" is open: this side is the client, the peer is None, user '{user}'",
            ": request 0 out 'a': ok after 0.000 s (waited 0.000), 13 bytes in, 13 out",
            ": request 2 out 'no': error 'no\\nway' after 0.000 s (waited 0.000), 0 bytes in, 7 out",
            ": request 4 out 'sleep': timeout after 2.000 s (waited 0.000), 0 bytes in, 15 out",
            f" has ended after 2.0 seconds, with 0 requests received and 3 made: {CLOSED}",
        )
    ]


async def test_a_slow_request_is_a_warning_and_a_long_channel_is_none(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, NAME)
    instrument = LogInstrument(slow=1)
    settings = Settings(instruments=[instrument], max_requests=1)
    async with (
        open_memory_server(handler, channel_handler=channel_handler, settings=settings) as server,
        server.connect() as client,
    ):
        async with trio.open_nursery() as nursery:
            for seconds in ("0.9", "1.1"):
                nursery.start_soon(client.request, ["sleep", seconds])
        async with client.open_channel(["c"]) as channel:
            await channel.answer()
    [line] = lines(caplog, logging.WARNING)
    assert re.fullmatch(
        r"connection 1: slow request \d in 'sleep': ok after 1\.100 s \(waited 0\.000\), 17 bytes in, 17 out",
        line,
    )
    assert not lines(caplog, logging.DEBUG)


async def test_a_server_says_nothing_twice(caplog: pytest.LogCaptureFixture) -> None:
    listener = MemoryListener()
    async with open_server([listener], handler, settings=Settings(instruments=[LogInstrument()])):
        async with open_connection(listener.connect()) as client:
            await client.request(["a"])
    texts = [each.message for each in caplog.records]
    assert len([text for text in texts if "has ended" in text]) == 1
    assert len([text for text in texts if "is open: " in text]) == 1


@pytest.mark.parametrize(("slow", "error"), [("1", TypeError), (-1, ValueError), (float("nan"), ValueError)])
def test_slow_is_a_number_of_seconds(slow: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^slow must be "):
        LogInstrument(slow=slow)
