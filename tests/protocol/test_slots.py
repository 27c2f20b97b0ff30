"""Requests wait for slots. Each depth and each kind has slots of its own."""

from __future__ import annotations

import math

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.events import Answer, Request
from tests.support.engines import make, receive, request_id
from tests.support.helpers import packet

# ---- the order ----


def test_requests_wait_for_slots_in_order() -> None:
    client, server = make("client", slots=2), make("server", max_requests=2)
    for n in range(4):
        client.request([str(n)])
    sent = client.take(0)
    assert [request_id(event) for event in receive(server, sent)] == [0, 2]
    assert client.take(0) == b""
    server.answer(2, [])
    assert list(receive(client, server.take(0))) == [Answer(2, [])]
    assert [request_id(event) for event in receive(server, client.take(0))] == [4]
    server.answer(0, [])
    server.answer(4, [])
    list(receive(client, server.take(0)))
    assert [request_id(event) for event in receive(server, client.take(0))] == [6]


def test_a_new_request_does_not_overtake_those_that_wait() -> None:
    client = make("client", slots=1)
    first, second = client.request([]), client.request([])
    assert client.is_unsent(second)
    client.take(0)
    list(receive(client, packet(b"ok", b"%d" % first, body=[])))
    third = client.request([])
    assert b"req" in (sent := client.take(0))
    assert b"\x00\x00\x00\x01%d" % second in sent
    assert client.is_unsent(third)


def test_more_requests_than_slots_are_an_error() -> None:
    server = make("server", max_requests=2)
    two = packet(b"req", b"0", b"", b"", b"", body=[]) + packet(b"req", b"2", b"", b"", b"", body=[])
    assert len(list(receive(server, two))) == 2
    server.answer(0, [])
    with pytest.raises(ProtocolError, match="more than 2 requests"):
        list(receive(server, packet(b"req", b"4", b"", b"", b"", body=[])))


def test_a_slot_is_free_as_soon_as_its_answer_is_taken() -> None:
    server = make("server", max_requests=1)
    list(receive(server, packet(b"req", b"0", b"", b"", b"", body=[])))
    server.answer(0, [])
    server.take(0)
    assert list(receive(server, packet(b"req", b"2", b"", b"", b"", body=[]))) == [Request(2, math.inf, [])]


# ---- depths and kinds ----


def test_channels_and_requests_of_each_depth_have_slots_of_their_own() -> None:
    server = make("server", max_requests=1)
    ids = iter(range(0, 200, 2))
    for depth in (b"", *(b"%d" % n for n in range(1, 16))):
        receive(server, packet(b"chan", b"%d" % next(ids), b"", depth, b"", b"0", body=[]))
        receive(server, packet(b"req", b"%d" % next(ids), b"", depth, b"", body=[]))
    assert server.handling == 32
    with pytest.raises(ProtocolError, match="more than 1 requests of depth 15"):
        receive(server, packet(b"req", b"%d" % next(ids), b"", b"15", b"", body=[]))
    other = make("server", max_requests=1)
    receive(other, packet(b"chan", b"0", b"", b"", b"", b"0", body=[]))
    with pytest.raises(ProtocolError, match="more than 1 channels of depth 0"):
        receive(other, packet(b"chan", b"2", b"", b"", b"", b"0", body=[]))


def test_a_request_waits_only_for_slots_of_its_own_depth_and_kind() -> None:
    client = make("client", slots=1)
    client.request(["0"])
    deeper, channel = client.request(["1"], depth=1), client.open_channel(["c"])
    waiting = [client.request(["0"]), client.request(["0"]), client.request(["1"], depth=1)]
    assert client.asked == 3
    assert client.waiting == 3
    assert client.local.oldest_waiting() == waiting[0]
    assert all(map(client.local.is_waiting, waiting))
    assert not client.local.is_waiting(channel)
    client.cancel(waiting[0])
    client.take(0)
    receive(client, packet(b"ok", b"%d" % deeper, body=[]))
    assert client.take(0) == packet(b"req", b"%d" % waiting[2], b"", b"1", b"", body=[b"1"])
    receive(client, packet(b"ok", b"0", body=[]))
    assert client.take(0) == packet(b"req", b"%d" % waiting[1], b"", b"", b"", body=[b"0"])
    assert client.local.oldest_waiting() is None
