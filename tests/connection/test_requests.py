"""Requests and answers, both ways, and calls that cannot be made."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, MessageTooLarge, RemoteError, Settings
from bokbok_trio._protocol.queued_packet import HEAD_ROOM
from bokbok_trio.testing import open_connection_pair
from tests.support.helpers import busy_handler, echo


async def test_requests_go_both_ways(sealed: bool) -> None:
    async with open_connection_pair(busy_handler, busy_handler, sealed=sealed) as (client, server):
        assert await client.request(["ping", "1"]) == [b"pong", b"1"]
        assert await server.request((b"ping", bytearray(b"2"))) == [b"pong", b"2"]


async def test_a_handler_calls_back_and_is_called_back(sealed: bool) -> None:
    async with open_connection_pair(busy_handler, busy_handler, sealed=sealed) as (client, _):
        assert await client.request(["back", "back", "back", "ping", "x"]) == [b"pong", b"x"]


async def test_a_handler_answers_while_its_background_callbacks_go_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    heard: list[list[bytes]] = []

    async def hear(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        heard.append(request)

    async def call_back(connection: Connection) -> None:
        for n in range(4):
            await trio.sleep(1)
            await connection.request(["called back", str(n)])

    async with trio.open_nursery() as nursery:

        async def handler(connection: Connection, request: list[bytes]) -> list[str]:
            await trio.lowlevel.checkpoint()
            nursery.start_soon(call_back, connection)
            return ["later"]

        async with open_connection_pair(hear, handler) as (client, _):
            assert await client.request(["asynch"]) == [b"later"]
            assert heard == []
            await trio.sleep(4.5)
    assert heard == [[b"called back", b"%d" % n] for n in range(4)]


async def test_many_requests_at_once_both_ways_with_few_slots(sealed: bool) -> None:
    few = Settings(max_requests=3)
    done: list[bytes] = []

    async def ask(connection: Connection, n: int) -> None:
        # Each asks back: with all slots of both sides taken, answers must still get through.
        [_, text] = await connection.request(["ping", str(n)])
        done.append(text)

    async with (
        open_connection_pair(
            busy_handler, busy_handler, sealed=sealed, client_settings=few, server_settings=few
        ) as pair,
        trio.open_nursery() as nursery,
    ):
        for n in range(100):
            nursery.start_soon(ask, pair[n % 2], n)
    assert sorted(done, key=int) == [b"%d" % n for n in range(100)]


async def test_fields_are_bytes_or_str_and_an_answer_may_be_none() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str | bytes] | None:
        await trio.lowlevel.checkpoint()
        return ["é", b"\xff"] if request else None

    async with open_connection_pair(server_handler=handler) as (client, _):
        assert await client.request(["x"]) == ["é".encode(), b"\xff"]
        assert await client.request([]) == []
        full = [b"x"] * 255
    async with open_connection_pair(server_handler=echo) as (client, _):
        assert await client.request(full) == full


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ("abc", TypeError),
        (b"abc", TypeError),
        (None, TypeError),
        ({"a"}, TypeError),
        (iter(["a"]), TypeError),
        ([1], TypeError),
        ([None], TypeError),
        (["a", ["b"]], TypeError),
        (["a"] * 256, ValueError),
        (["\ud800"], ValueError),
        ([bytes(5000)], MessageTooLarge),
    ],
)
async def test_a_bad_call_raises_and_sends_nothing(fields: Any, error: type[Exception]) -> None:
    small = Settings(max_message_size=4096)
    async with open_connection_pair(echo, echo, client_settings=small) as pair:
        for connection in pair:
            with pytest.raises(error):
                await connection.request(fields)
            assert await connection.request(["still"]) == [b"still"]
            largest = [bytes(4096 - HEAD_ROOM - 5)]
            assert await connection.request(largest) == largest


async def test_an_answer_that_is_too_large_is_an_error_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return [bytes(10000)]

    small = Settings(max_message_size=8192)
    async with open_connection_pair(server_handler=handler, client_settings=small) as (client, _):
        with pytest.raises(RemoteError, match=r"10005 bytes.* 8064") as caught:
            await client.request([])
        assert caught.value.code == "too-large"
    assert "the answer to request 0 is too large" in caplog.text
