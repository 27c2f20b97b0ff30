"""Deadlines cross the wire. The clock is `autojump_clock`."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Connection, RemoteError, RequestError
from bokbok_trio.testing import open_connection_pair
from tests.support.helpers import packet, raw_peer, settle


class Sleeper:
    """A handler that sleeps for a given time, and records its deadline."""

    def __init__(self) -> None:
        self.left: list[float] = []
        self.ended: list[tuple[str, float]] = []

    async def __call__(self, connection: Connection, request: list[bytes]) -> list[str]:
        self.left.append(trio.current_effective_deadline() - trio.current_time())
        try:
            if request[0] == b"ask on":
                await connection.request(request[1:])
            else:
                await trio.sleep(float(request[0]))
        except trio.Cancelled:
            self.ended.append(("cancelled", trio.current_time()))
            raise
        self.ended.append(("done", trio.current_time()))
        return ["slept"]


async def test_the_handler_has_the_askers_deadline(sealed: bool, autojump_clock: MockClock) -> None:
    handler = Sleeper()
    async with open_connection_pair(server_handler=handler, sealed=sealed) as (client, _):
        assert await client.request(["0"]) == [b"slept"]
        with trio.fail_after(2):
            assert await client.request(["1"]) == [b"slept"]
        with pytest.raises(trio.TooSlowError), trio.fail_after(2):
            await client.request(["100"])
        assert trio.current_time() == 3
        await settle()
    assert handler.left == [math.inf, pytest.approx(2), pytest.approx(2)]
    assert [how for how, _ in handler.ended] == ["done", "done", "cancelled"]
    assert [when for _, when in handler.ended] == pytest.approx([0, 1, 3])


@pytest.mark.parametrize("hops", [1, 2, 5])
async def test_a_deadline_holds_over_any_number_of_hops_either_way(
    hops: int, autojump_clock: MockClock
) -> None:
    handlers = Sleeper(), Sleeper()
    async with open_connection_pair(*handlers) as (client, _):
        with pytest.raises(trio.TooSlowError), trio.fail_after(7):
            await client.request([*["ask on"] * hops, "100"])
        await settle()
        assert trio.current_time() == 7
    left = [*handlers[0].left, *handlers[1].left]
    assert left == [pytest.approx(7)] * (hops + 1)
    ended = [*handlers[0].ended, *handlers[1].ended]
    assert [how for how, _ in ended] == ["cancelled"] * (hops + 1)
    assert [when for _, when in ended] == [pytest.approx(7)] * (hops + 1)


async def test_a_nearer_deadline_of_the_handler_is_its_own_affair(autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        with trio.fail_after(1):
            await trio.sleep(5)

    async with open_connection_pair(server_handler=handler) as (client, _):
        with trio.fail_after(100), pytest.raises(RemoteError, match="TooSlowError") as caught:
            await client.request([])
        assert caught.value.code == "handler-error"
        assert trio.current_time() == 1


async def test_the_timeout_is_counted_from_when_the_request_leaves(autojump_clock: MockClock) -> None:
    async with raw_peer(max_requests=1) as (connection, peer), trio.open_nursery() as nursery:
        nursery.start_soon(connection.request, ["first"])
        await settle()
        nursery.start_soon(ask_within, connection, 10)
        assert (await peer.receive())[:3] == [b"req", b"0", b""]
        await trio.sleep(4)
        await peer.send(b"ok", b"0", body=[])
        assert (await peer.receive())[:3] == [b"req", b"2", b"6000000"]
        await peer.send(b"ok", b"2", body=[])


async def ask_within(connection: Connection, seconds: float) -> None:
    with trio.fail_after(seconds):
        await connection.request(["second"])


async def test_an_err_timeout_that_comes_first_is_held_until_the_askers_own_clock_runs_out(
    autojump_clock: MockClock,
) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:

        async def hasty() -> None:
            await peer.receive()
            await trio.sleep(2.96)
            await peer.send(b"err", b"0", b"timeout", b"too slow", b"")

        nursery.start_soon(hasty)
        with pytest.raises(trio.TooSlowError), trio.fail_after(3):
            await connection.request([])
        assert trio.current_time() == 3
        assert connection.statistics().used_slots == 0
        await settle()
        nursery.start_soon(ask_within, connection, 10)
        assert (await peer.receive())[0] == b"req", "no cancel was sent for what was answered"
        await peer.send(b"ok", b"2", body=[])


async def test_an_asker_whose_deadline_was_moved_meanwhile_sees_the_remote_timeout(
    autojump_clock: MockClock,
) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        with trio.CancelScope(deadline=3) as scope:

            async def extend() -> None:
                await peer.receive()
                await trio.sleep(2.96)
                scope.deadline = 100
                await peer.send(b"err", b"0", b"timeout", b"too slow", b"")

            nursery.start_soon(extend)
            with pytest.raises(RemoteError) as caught:
                await connection.request([])
            assert caught.value.code == "timeout"
            assert trio.current_time() == 3


async def test_a_handlers_own_timeout_code_is_its_answer_where_there_is_no_deadline(
    autojump_clock: MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        raise RequestError("the backend was too slow", code="timeout")

    async with open_connection_pair(server_handler=handler) as (client, _):
        with pytest.raises(RemoteError, match="the backend was too slow"):
            await client.request([])
        assert trio.current_time() == 0


async def test_a_handler_that_is_cancelled_by_the_deadline_answers_timeout(
    autojump_clock: MockClock,
) -> None:
    async with raw_peer(Sleeper()) as (_, peer):
        await peer.send(b"req", b"1", b"1500000", b"", b"", body=[b"100"])
        assert (await peer.receive())[:3] == [b"err", b"1", b"timeout"]
        assert trio.current_time() == 1.5
        await peer.send(b"req", b"3", b"0", b"", b"", body=[b"100"])
        assert (await peer.receive())[:3] == [b"err", b"3", b"timeout"]
        await peer.send(b"req", b"5", b"9" * 18, b"", b"", body=[b"100"])
        await peer.stream.send_all(packet(b"cancel", b"5"))
        assert (await peer.receive())[:3] == [b"err", b"5", b"cancelled"]
        assert trio.current_time() == 1.5
