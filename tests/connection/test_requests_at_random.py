"""Requests of any behaviour, received in pieces of any size: each gets one answer, the right one."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings, strategies as st

from bokbok_trio import Connection, RequestError, Settings
from tests.support.handlers import Foreign
from tests.support.helpers import RawPeer, cancel, open_peer, packet, req, settle
from tests.support.inside import check_idle
from tests.support.strategies import chunked

BEHAVIOURS = {
    "return": b"ok",
    "raise": b"no",
    "leave a scope open": b"handler-error",
    "ask": b"ok",
    "wait": b"ok",
    "wait and raise": b"no",
    "wait for what is foreign": b"handler-error",
}
"""What a handler may do, and how that is answered unless it is cancelled."""
INLINE = {"return", "raise"}
"""What of it waits for nothing."""
UNTIL_CANCELLED = {"ask", "wait", "wait and raise"}
"""What of it lasts until all the requests have come."""


@pytest.mark.parametrize("over_sockets", [False, True])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_request_is_answered_once_and_rightly_however_it_comes(
    over_sockets: bool, data: st.DataObject
) -> None:
    asked = data.draw(st.lists(st.sampled_from(list(BEHAVIOURS)), min_size=1, max_size=12), label="asked")
    cancelled = data.draw(st.sets(st.integers(0, len(asked) - 1), max_size=4), label="cancelled")
    pings = data.draw(st.sets(st.integers(0, len(asked) - 1), max_size=3), label="pings")
    delay = data.draw(st.integers(0, 3), label="requests between one and its cancelling")
    packets: list[bytes] = []
    for n, behaviour in enumerate(asked):
        packets.append(req(1 + 2 * n, b"%d" % n, behaviour.encode()))
        packets += [packet(b"ping")] * (n in pings) + [cancel(1 + 2 * (n - delay))] * (n - delay in cancelled)
    chunks = data.draw(chunked(b"".join(packets)), label="chunks")
    pauses = data.draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)), label="pauses")
    cancelled = {n for n in cancelled if n + delay < len(asked)}
    trio.run(check_requests, asked, cancelled, list(zip(chunks, pauses, strict=True)), over_sockets)


class Asked:
    """The behaviour of the requests, and their outcomes."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.gate = trio.Event()  # what waits, waits for it
        self.answers: dict[int, bytes] = {}
        self.callbacks: list[tuple[bytes, bytes]] = []

    async def handle(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        number, behaviour = request
        self.started.append(int(number))
        match behaviour.decode():
            case "raise":
                raise RequestError("no", code="no")
            case "leave a scope open":
                trio.CancelScope().__enter__()
            case "ask":
                return await connection.request([number])
            case "wait":
                await self.gate.wait()
            case "wait and raise":
                await self.gate.wait()
                raise RequestError("no", code="no")
            case "wait for what is foreign":
                await Foreign()
        return [number]

    async def hear(self, peer: RawPeer) -> None:
        """Record the packets that the peer gets."""
        while True:
            kind, *rest = await peer.receive()
            if kind == b"req":
                self.callbacks.append((rest[0], rest[4]))
            elif kind in (b"ok", b"err"):
                id = int(rest[0])
                assert id not in self.answers, "answered twice"
                self.answers[id] = kind if kind == b"ok" else rest[1]
                assert kind == b"err" or rest[1].endswith(b"%d" % (id // 2))


async def check_requests(
    asked: list[str], cancelled: set[int], chunks: list[tuple[bytes, bool]], over_sockets: bool
) -> None:
    was = Asked()
    options = {"max_requests": 20, "over_sockets": over_sockets}
    async with open_peer(was.handle, Settings(max_requests=len(asked)), **options) as (connection, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(was.hear, peer)
            for chunk, pause in chunks:
                await peer.stream.send_all(chunk)
                if pause:
                    await settle()
            await settle()
            was.gate.set()
            for id, body in was.callbacks:
                await peer.send(b"ok", id, body=[body[5:]])
            await settle()
            nursery.cancel_scope.cancel()
        await settle()
        check_idle(connection)
        assert connection.statistics().used_slots == 0
    expected = {1 + 2 * n: BEHAVIOURS[behaviour] for n, behaviour in enumerate(asked)}
    expected |= {1 + 2 * n: b"cancelled" for n in cancelled if asked[n] in UNTIL_CANCELLED}
    assert was.answers == expected
    assert sorted(was.started) == list(range(len(asked)))
    # As they came, as long as none waits; the order of tasks that are started is up to Trio.
    first = next((n for n, behaviour in enumerate(asked) if behaviour not in INLINE), len(asked) - 1)
    assert was.started[: first + 1] == list(range(first + 1))
