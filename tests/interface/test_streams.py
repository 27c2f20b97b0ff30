"""Streams both ways at once, calls and channels that do not fit, and the end of the connection."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import ConnectionClosed, ConnectionLost, RemoteError
from bokbok_trio.interface import consume, expose
from bokbok_trio.testing import consume_local, open_connection_pair

from ..support.helpers import settle
from ..support.logs import Implementation, Line, Logs, Source, check_usable, encode, open_logs, texts

# ---- both ----


async def test_a_method_may_stream_both_ways() -> None:
    async with open_logs() as (logs, _, client):
        async with logs.number(texts(100)) as lines:
            assert [line async for line in lines] == [Line(number, f"{number:1000}") for number in range(100)]
        await check_usable(logs, client)


async def test_leaving_the_block_ends_both() -> None:
    async with open_logs() as (logs, implementation, client):
        for up_to in (3, 10**9):  # all was sent, or not
            implementation.ended = trio.Event()
            async with aclosing(texts(up_to)) as source:
                async with logs.number(source) as lines:
                    await lines.receive()
                    await settle()
                await implementation.ended.wait()
        await check_usable(logs, client)


async def test_a_failing_stream_ends_the_block() -> None:
    async def failing() -> AsyncGenerator[str]:
        yield "a"
        raise KeyError("no more")

    async with open_logs() as (logs, _, client):
        with pytest.raises(KeyError, match="no more"):
            async with logs.number(failing()) as lines:
                await lines.receive()
                await trio.sleep_forever()
        await check_usable(logs, client)


async def test_closing_one_stream_leaves_the_other(autojump_clock: MockClock) -> None:
    async with open_logs() as (logs, _implementation, client):
        async with logs.number(texts(0), mode="close") as lines:
            with pytest.raises(RemoteError):
                await lines.receive()  # the caller's stream had ended: there was no time to close it

        async def later() -> AsyncGenerator[str]:
            await trio.sleep(100)
            yield "late"

        async with logs.number(later(), mode="close") as lines:
            assert [line async for line in lines] == [Line(7)]
        await check_usable(logs, client)


async def test_closing_the_results_ends_the_arguments() -> None:
    async with open_logs() as (logs, _, client):
        async with logs.number(texts(10**9)) as lines:
            await lines.receive()
            await lines.aclose()
            await settle()
        await check_usable(logs, client)


# ---- calls and channels that do not fit ----


@pytest.mark.parametrize("name", [b"Logs.follow", b"Logs.upload"])
async def test_a_stream_without_a_channel_is_refused(name: bytes) -> None:
    async with open_logs() as (_, _, client):
        with pytest.raises(RemoteError, match="streams, and takes a channel") as caught:
            await client.request([b"%call", name, encode({"name": ""})])
        assert caught.value.code == "bad-arguments"


async def test_a_channel_without_a_stream_is_refused() -> None:
    async with open_logs() as (_, _, client):
        with pytest.raises(RemoteError, match=r"Logs.plain streams nothing, and takes no channel") as caught:
            async with client.open_channel(["%call", "Logs.plain", b"\x80"]) as channel:
                await channel.answer()
        assert caught.value.code == "bad-arguments"


# ---- the end of the connection ----


@pytest.mark.parametrize("ends_here", [True, False])
async def test_a_stream_breaks_with_its_connection(ends_here: bool) -> None:
    logs: Any = Implementation()
    async with open_connection_pair(server_handler=expose(Logs, logs)) as (client, server):
        async with consume(client, Logs).follow("stuck") as lines:
            await settle()
            await (client if ends_here else server).aclose()
            with pytest.raises(ConnectionClosed if ends_here else ConnectionLost):
                while True:
                    await lines.receive()


async def test_an_upload_breaks_with_its_connection(autojump_clock: MockClock) -> None:
    logs: Any = Implementation()
    async with open_connection_pair(server_handler=expose(Logs, logs)) as (client, server):
        source = Source(10**6, pause=0.1)

        async def close() -> None:
            await trio.sleep(1)
            await server.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(ConnectionLost):
                await consume(client, Logs).upload("", source)
        assert source.closed == 1


@pytest.mark.parametrize(
    "wrong", [[Line(1)], iter([Line(1)]), None, 3], ids=["list", "iterator", "None", "int"]
)
async def test_what_is_no_stream_is_told_before_anything_is_sent(wrong: Any) -> None:
    async with consume_local(Logs, Implementation()) as logs:
        with pytest.raises(
            TypeError, match=r"Logs\.upload: lines is a stream, and .* does not work with 'async for'"
        ):
            await logs.upload("a", wrong)
        with pytest.raises(TypeError, match=r"Logs\.number: lines is a stream"):
            async with logs.number(wrong):
                raise AssertionError
