"""Packets that wait to be sent: their limits, and that nothing is copied."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from bokbok_trio import MessageTooLarge
from bokbok_trio._protocol.events import Event
from bokbok_trio._protocol.queued_packet import HEAD_ROOM
from tests.support.engines import LIMIT, make, receive, request_id
from tests.support.helpers import packet


def test_nothing_is_copied_before_it_is_taken() -> None:
    client = make("client", limit=2**20)
    for field in (bytes(2**14), bytes(2**19)):
        tracemalloc.start()
        try:
            client.request([field])
            assert tracemalloc.get_traced_memory()[1] < len(field) / 2, "bytes at the most"
        finally:
            tracemalloc.stop()


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
    client, server = make("client", limit=2**20), make("server", limit=2**20)
    longest = client.local.next_id = int("9" * 17 + "8")
    client.open_channel([bytes(2**20 - HEAD_ROOM - 5)], 1e11)
    events: list[Event] = []
    while sent := client.take(0):
        events += receive(server, sent)
    assert [request_id(event) for event in events] == [longest]
