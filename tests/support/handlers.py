"""For tests of tasks: handlers, awaitables, and the connections to try them on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from bokbok_trio import Channel, Connection, current_request

in_memory_and_over_sockets = pytest.mark.parametrize("over_sockets", [False, True])


async def never_waits(connection: Connection, request: list[bytes]) -> list[bytes]:
    return request


class Foreign:
    """An awaitable that belongs to another event loop."""

    def __await__(self) -> Generator[str, Any, Any]:
        return (yield "are you there, asyncio?")


async def wait_and_do(something: Callable[[], object]) -> None:
    """Wait, and call a function before any other task runs."""

    def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
        something()
        return trio.lowlevel.Abort.SUCCEEDED

    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.lowlevel.wait_task_rescheduled(abort)


async def sleep_forever(connection: Connection, request: list[bytes], *channel: Channel) -> None:
    await trio.sleep_forever()


async def tell_context(connection: Connection, request: list[bytes]) -> list[bytes | str]:
    await trio.lowlevel.checkpoint()
    return [f"{name}={value.decode()[:5]}" for name, value in current_request().context.items()]


@asynccontextmanager
async def cancelled_in_its_handler(server: Connection) -> AsyncGenerator[trio.CancelScope]:
    """A scope that is cancelled as soon as the handler of the request made in it has begun."""

    async def cancel() -> None:
        while not server.statistics().handlers_running:
            await trio.sleep(0.001)
        scope.cancel()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            yield scope
