"""The handshake under attack: listeners, recorded messages, and changed messages."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from bokbok_trio import HandshakeError
from tests.support.establishing import (
    K,
    Side,
    as_client,
    as_server,
    end_of,
    enter_as_server,
    make_wires,
    meet,
    never_admit,
)

pytestmark = pytest.mark.usefixtures("fixed_grease")


async def test_a_client_sends_nothing_after_open_before_the_proof(autojump_clock: MockClock) -> None:
    client, server = make_wires()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_of, client, as_client(client))
        await enter_as_server(server)
        await trio.testing.wait_all_tasks_blocked()
        assert [len(sent) for sent in client.sent] == [78, 2 + 16 + 512]
        nursery.cancel_scope.cancel()


async def crossing(name: str, user_key: Any = None) -> tuple[list[bytes], list[bytes]]:
    """Return the bytes that a listener sees of a client with that name, in each direction."""
    wires = make_wires()
    await meet(wires, client={"user": name}, server={"user_key": user_key or {name: K}})
    return wires[0].sent, wires[1].sent


@pytest.mark.parametrize("user_key", [None, {"other": K}], ids=["accepted", "refused"])
async def test_a_listener_sees_neither_the_user_name_nor_its_length(
    user_key: Any, autojump_clock: MockClock
) -> None:
    sizes = []
    for name in ("x", "somebody", "x" * 255, "é" * 127):
        sent, received = await crossing(name, user_key)
        sizes.append([[len(data) for data in direction] for direction in (sent, received)])
        if len(name) > 1:
            assert name.encode() not in b"".join(sent + received)
    assert sizes == sizes[:1] * 4
    assert sizes[0][0] == [78, 530]


async def test_a_listener_sees_nothing_twice(autojump_clock: MockClock) -> None:
    """All that two connections of one user have in common is the fixed beginning of each hello."""
    size, fixed = 16, 78 - 32
    seen = [
        data[at : at + size]
        for _ in range(2)
        for direction in await crossing("myuser")
        for number, data in enumerate(direction)
        for at in range(0 if number else fixed, len(data) - size + 1)
    ]
    assert len(set(seen)) == len(seen)


async def test_a_replayed_session_does_not_open_the_same_server(autojump_clock: MockClock) -> None:
    wires = make_wires()
    client, _ = await meet(wires)
    await client.opened.stream.send_all(b"request")
    recording = wires[0].sent
    assert len(recording) == 3
    for upto in (2, 3):
        replayer, again = make_wires()
        await replayer.send_all(b"".join(recording[:upto]))
        ending = await end_of(again, as_server(again, admit=never_admit))
        assert "a record did not open" in str(ending.error)


@settings(deadline=None, max_examples=80)
@given(side=st.sampled_from(["client", "server"]), bit=st.integers(0, 8 * 608 - 1))
def test_no_bit_changed_on_the_wire_opens_a_connection(side: Side, bit: int) -> None:
    async def main() -> None:
        wires = make_wires()
        await meet(wires)
        size = 8 * sum(map(len, wires[side == "server"].sent))
        client, server = await meet(make_wires(**{side: {"alter": bit % size}}))
        told = server if side == "client" else client
        assert isinstance(told.result, HandshakeError)
        assert isinstance(client.result, HandshakeError)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_no_key_shows_in_what_was_opened(autojump_clock: MockClock) -> None:
    for ending in await meet(make_wires()):
        for text in (repr(ending.opened), str(ending.opened), repr(vars(ending.opened.stream))):
            for form in (repr(K.raw)[2:-1], K.raw.hex()):
                assert form not in text
