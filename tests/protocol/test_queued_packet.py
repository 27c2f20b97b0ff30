"""Packets that wait to leave: what fits into them, and that nothing is copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bokbok_trio import MessageTooLarge
from bokbok_trio._protocol.queued_packet import HEAD_ROOM, QueuedPacket
from tests.support.engines import LIMIT, make
from tests.support.helpers import packet


def test_nothing_is_copied_before_it_is_taken() -> None:
    client = make("client", limit=2**20)
    small, big = bytes(2**14), bytes(2**19)
    client.request([small])
    client.request([big])
    for queue, field in ((client._outbox._small, small), (client._outbox._big, big)):
        [queued] = queue.values()
        assert isinstance(queued, QueuedPacket)
        assert queued._body is not None
        assert any(chunk is field for chunk in queued._body)


@pytest.mark.parametrize("queue", ["request", "answer"])
def test_what_fits_does_not_depend_on_the_id(queue: str) -> None:
    room = LIMIT - HEAD_ROOM - 5
    engine = make("server")
    list(engine.receive(packet(b"req", b"9" * 17 + b"8", b"", b"", b"", body=[])))
    if queue == "request":
        put: Callable[[list[bytes]], object] = engine.request
        engine.local.next_id = int("9" * 18)
    else:
        put = lambda fields: engine.answer(int("9" * 17 + "8"), fields)  # noqa: E731
    with pytest.raises(MessageTooLarge) as caught:
        put([bytes(room + 1)])
    assert (caught.value.size, caught.value.limit) == (LIMIT - HEAD_ROOM + 1, LIMIT - HEAD_ROOM)
    assert engine.take(0) == b""
    put([bytes(room)])
    sent = engine.take(0)
    assert room < len(sent) <= LIMIT + 4


def test_the_longest_head_fits_its_room() -> None:
    client = make("client", limit=2**20)
    client.local.next_id = int("9" * 17 + "8")
    client.open_channel([bytes(2**20 - HEAD_ROOM - 5)], 1e11)
    while client.take(0):
        assert (
            not client._outbox._in_pieces or next(iter(client._outbox._in_pieces.values())).remaining < 2**20
        )
