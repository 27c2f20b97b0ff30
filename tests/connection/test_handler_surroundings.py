"""The surroundings of a handler, in whichever task it runs: its context, its deadline, its callbacks."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from contextvars import ContextVar

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, RemoteError, Settings
from bokbok_trio.testing import open_connection_pair
from tests.support.helpers import open_peer, outcomes, packet, req, settle
from tests.support.inside import check_idle

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def test_context_variables_are_each_handlers_own() -> None:
    seen: list[str] = []

    async def look() -> None:
        seen.append(variable.get())

    async def handler(connection: Connection, request: list[bytes]) -> None:
        seen.append(variable.get())
        token = variable.set(request[0].decode())
        if request[0] != b"now":
            await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
            await trio.to_thread.run_sync(lambda: seen.append(variable.get()))
            seen.append(variable.get())
            variable.reset(token)
            seen.append(variable.get())

    async with open_peer(handler) as (_, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"later") + req(5, b"now"))
        await outcomes(peer, 3)
        await peer.stream.send_all(req(7, b"now"))
        await peer.receive()
        # A handler sees none of the others': not those of the task that reads either.
        assert sorted(seen) == ["later"] * 3 + ["unset"] * 5
    assert variable.get() == "unset"


async def test_the_deadline_of_a_request_is_that_of_a_handler_called_by_the_task_that_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    deadlines: list[float] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        deadlines.append(trio.current_effective_deadline())
        if request:
            await trio.sleep_forever()

    async with open_peer(handler) as (connection, peer):
        # The second has none left, but asks for nothing that takes time.
        await peer.stream.send_all(req(1, timeout=b"2000000") + req(3, timeout=b"0") + req(5))
        assert await outcomes(peer, 3) == {1: b"ok", 3: b"ok", 5: b"ok"}
        assert deadlines == [2, 0, math.inf]
        await peer.stream.send_all(req(1, b"x", timeout=b"2000000") + req(3, b"x", timeout=b"0") + req(5))
        assert await outcomes(peer, 3) == {1: b"timeout", 3: b"timeout", 5: b"ok"}
        assert trio.current_time() == 2
        await settle()
        check_idle(connection)


async def test_a_handler_called_by_the_task_that_reads_cannot_wait_until_the_connection_has_ended() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await connection.wait_closed()

    async with open_connection_pair(server_handler=handler) as (client, _):
        with pytest.raises(RemoteError, match="RuntimeError: a task of the connection"):
            await client.request([])


async def test_handlers_call_back_and_are_called_back_hundreds_at_once(sealed: bool) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        [left] = request
        return [b"done"] if left == b"0" else await connection.request([b"%d" % (int(left) - 1)])

    answers: list[list[bytes]] = []

    async def ask(connection: Connection, depth: int) -> None:
        answers.append(await connection.request([str(depth)]))

    many = Settings(max_requests=2000)
    async with open_connection_pair(
        handler, handler, sealed=sealed, client_settings=many, server_settings=many
    ) as pair:
        async with trio.open_nursery() as nursery:
            for n in range(300):
                nursery.start_soon(ask, pair[n % 2], n % 7)
        for connection in pair:
            await settle()
            await settle()
            check_idle(connection)
    assert answers == [[b"done"]] * 300


async def test_a_handler_is_handed_an_answer_that_came_together_with_its_request() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return await connection.request(request)

    async with open_peer(handler) as (connection, peer), trio.open_nursery() as nursery:
        nursery.start_soon(connection.request, [])
        await peer.receive()
        # The handler asks, and waits; behind its request there is an answer to another one.
        await peer.stream.send_all(req(1, b"x") + packet(b"ok", b"0", body=[]) + req(3, b"y"))
        asked = sorted([await peer.receive(), await peer.receive()])
        assert [fields[:2] for fields in asked] == [[b"req", b"2"], [b"req", b"4"]]
        await peer.stream.send_all(packet(b"ok", b"4", body=[]) + packet(b"ok", b"2", body=[]))
        assert await outcomes(peer, 2) == {1: b"ok", 3: b"ok"}
        await settle()
        check_idle(connection)


@pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")
@pytest.mark.parametrize("has_scope", [False, True])
async def test_an_async_generator_left_early_by_a_handler_harms_no_other(has_scope: bool) -> None:
    async def count() -> AsyncGenerator[bytes]:
        with trio.CancelScope() if has_scope else nullcontext():
            yield b"0"
            yield b"1"

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request:
            return request
        async for number in count():
            return [number]
        raise AssertionError

    async with open_peer(handler, Settings(max_requests=4)) as (connection, peer):
        await peer.stream.send_all(req(1) + req(3, b"x") + req(5) + req(7, b"x"))
        left = b"handler-error" if has_scope else b"ok"
        assert await outcomes(peer, 4) == {1: left, 3: b"ok", 5: left, 7: b"ok"}
        gc.collect()
        await settle()
        await peer.stream.send_all(req(1))
        assert await outcomes(peer, 1) == {1: left}
        await settle()
        check_idle(connection)
