"""Handlers that leave a scope or nursery open, and abandoned blocks: nobody else suffers."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import traceback
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Channel, Connection, RemoteError, open_connection, open_server
from tests.support.pairs import WAYS, open_pair, over_all_ways, settle

kept: list[object] = []
"""What handlers left open, so that nothing collects it."""


async def leave_a_scope() -> None:
    scope = trio.CancelScope()
    scope.__enter__()
    kept.append(scope)


async def leave_several_scopes() -> None:
    for _ in range(3):
        await leave_a_scope()


async def leave_a_cancelled_scope() -> None:
    scope = trio.CancelScope()
    scope.__enter__()
    scope.cancel()
    kept.append(scope)


async def leave_a_nursery() -> None:
    manager = trio.open_nursery()
    await manager.__aenter__()
    kept.append(manager)


async def leave_a_nursery_with_a_task() -> None:
    manager = trio.open_nursery()
    nursery = await manager.__aenter__()
    nursery.start_soon(trio.sleep_forever)
    kept.append(manager)


async def leave_both() -> None:
    await leave_a_scope()
    await leave_a_nursery()


async def leave_both_the_other_way() -> None:
    await leave_a_nursery()
    await leave_a_scope()


async def leave_a_generator() -> None:
    """As it happens: an async generator with a scope in it that the handler does not use up."""

    async def ticks() -> AsyncGenerator[int]:
        with trio.move_on_after(10):
            while True:
                yield 1
                await trio.lowlevel.checkpoint()

    generator = ticks()
    kept.append(generator)
    async for _ in generator:
        break


LEAVINGS = [
    leave_a_scope,
    leave_several_scopes,
    leave_a_cancelled_scope,
    leave_a_nursery,
    leave_a_nursery_with_a_task,
    leave_both,
    leave_both_the_other_way,
    leave_a_generator,
]

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(name="clean")
def clean_up() -> Any:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nurseries and generators that were never left
        kept.clear()
        gc.collect()


@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("leave", LEAVINGS)
@pytest.mark.parametrize("waits", ["not", "before", "between", "after"])
@pytest.mark.parametrize("by_channel", [False, True])
async def test_only_the_handler_that_leaves_something_open_fails(
    way: str,
    leave: Callable[[], Awaitable[None]],
    waits: str,
    by_channel: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    may_end = trio.Event()

    async def bad() -> None:
        if waits in ("before", "between"):
            await trio.sleep(0.001)
        await leave()
        if waits in ("after", "between"):
            with contextlib.suppress(trio.Cancelled):
                await trio.sleep(0.001)

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        match request:
            case [b"bad"]:
                await bad()
            case [b"wait"]:
                await may_end.wait()
        return request

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        await bad()
        return request

    answers: list[list[bytes]] = []

    async with open_pair(way, None, handler, server_channel_handler=channel_handler) as (client, server):

        async def wait() -> None:
            answers.append(await client.request(["wait"]))

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(wait)
            await settle(client, server)
            for _ in range(3):
                with trio.fail_after(5):
                    with pytest.raises(RemoteError) as caught:
                        if by_channel:
                            async with client.open_channel(["bad"]) as channel:
                                await channel.answer()
                        else:
                            await client.request(["bad"])
                    assert caught.value.code == "handler-error"
                    assert await client.request(["good"]) == [b"good"]
            may_end.set()
        assert answers == [[b"wait"]] * 2
        with trio.fail_after(5):
            assert await client.request(["good"]) == [b"good"]
            assert await client.ping() >= 0
        assert not server.closed
    assert "left a cancel scope or a nursery open" in caplog.text
    assert [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize("leave", LEAVINGS)
async def test_the_server_serves_others_meanwhile_and_afterwards(
    leave: Callable[[], Awaitable[None]],
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"bad"]:
            await leave()
        return request

    async with open_server("127.0.0.1:0", handler) as server:
        to = server.addresses[0]
        async with open_connection(to) as other:
            async with open_connection(to) as client:
                with pytest.raises(RemoteError):
                    await client.request(["bad"])
                assert await other.request(["good"]) == [b"good"]
            with trio.fail_after(5):
                assert await other.request(["good"]) == [b"good"]
                async with open_connection(to) as third:
                    assert await third.request(["good"]) == [b"good"]


@over_all_ways
@pytest.mark.parametrize("leave", [leave_a_scope, leave_a_nursery, leave_both])
async def test_a_client_whose_handler_leaves_something_open_ends_its_block_as_ever(
    way: str, leave: Callable[[], Awaitable[None]]
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await leave()
        return request

    async with open_pair(way, handler, None) as (client, server):
        for _ in range(2):
            with trio.fail_after(5), pytest.raises(RemoteError):
                await server.request([])
        assert not client.closed
    assert client.reason == "this side closed the connection"


@pytest.mark.parametrize("leave", [leave_a_scope, leave_a_nursery, leave_both])
@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_handler_that_leaves_something_open_by_being_cancelled(
    leave: Callable[[], Awaitable[None]], how: str
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request:
            return request
        await leave()
        await trio.sleep_forever()
        return []

    async with open_pair("tcp plain", None, handler) as (client, server):
        for _ in range(3):
            with trio.CancelScope() as scope:
                if how == "deadline":
                    scope.deadline = trio.current_time() + 0.02
                    await client.request([])
                else:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(client.request, [])
                        await settle(client, server)
                        nursery.cancel_scope.cancel()
            with trio.fail_after(5):
                assert await client.request(["good"]) == [b"good"]
        with trio.fail_after(5):
            while server.statistics().handlers_running or client.statistics().requests_cancelled:
                await trio.sleep(0.001)


# ---- given up half-way ----


async def echo(connection: Connection, request: list[bytes]) -> list[bytes]:
    await trio.lowlevel.checkpoint()
    return request


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["connection", "server", "channel", "all"])
@pytest.mark.parametrize("where", ["same task", "nursery"])
def test_a_generator_that_is_dropped_inside_a_block_ends_in_an_error_and_does_not_hang(
    what: str, where: str
) -> None:
    async def answer(connection: Connection, request: list[bytes], channel: Channel) -> None:
        async for _ in channel:
            pass

    async def main() -> None:
        async with open_server("127.0.0.1:0", echo, channel_handler=answer) as server:
            to = server.addresses[0]

            async def generate() -> AsyncGenerator[int]:
                if what == "connection":
                    async with open_connection(to) as connection:
                        await connection.request(["x"])
                        yield 1
                elif what == "server":
                    async with open_server("127.0.0.1:0", echo):
                        yield 1
                elif what == "channel":
                    async with open_connection(to) as connection, connection.open_channel([]) as channel:
                        await channel.send([])
                        yield 1
                else:
                    async with (
                        open_server("127.0.0.1:0", echo, channel_handler=answer) as inner,
                        open_connection(inner.addresses[0]) as connection,
                        connection.open_channel([]),
                    ):
                        yield 1
                yield 2

            async def use_some() -> None:
                async for _ in generate():
                    break
                gc.collect()
                for _ in range(3):
                    await trio.sleep(0.01)

            if where == "same task":
                await use_some()
            else:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(use_some)

    outcome = run_in_process(main)
    # Trio 0.27 lets a task end that has left a nursery open.
    is_overlooked = where == "nursery" and trio.__version__.startswith("0.27.")
    assert outcome.startswith("error") or (is_overlooked and outcome == "fine"), outcome


def run_in_process(main: Callable[[], Awaitable[object]], patience: float = 8) -> str:
    """Run a function in a forked child, and return its end: a hang of Trio cannot be cancelled."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                trio.run(main)
            except BaseException:
                text = "error " + traceback.format_exc()
            else:
                text = "fine"
            os.write(write, text.encode()[:60_000])
        finally:
            os._exit(0)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], patience)
        return os.read(read, 60_000).decode() if ready else "hung"
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("what", ["connection", "channel"])
async def test_a_generator_that_is_closed_inside_a_block_is_well(what: str) -> None:
    async with open_pair("tcp plain", None, echo, server_channel_handler=hold) as (client, server):
        to = server.server
        assert to is not None
        address = to.addresses[0]

        async def generate() -> AsyncGenerator[int]:
            if what == "connection":
                async with open_connection(address) as connection:
                    await connection.request(["x"])
                    yield 1
                    yield 2
            else:
                async with client.open_channel([]) as channel:
                    await channel.send([])
                    yield 1
                    yield 2

        with trio.fail_after(5):
            async with contextlib.aclosing(generate()) as numbers:
                async for _ in numbers:
                    break
            assert await client.request(["x"]) == [b"x"]


async def hold(connection: Connection, request: list[bytes], channel: Channel) -> None:
    await trio.sleep_forever()
