"""A whole engine: requests and answers, counts, pings, and the last packets."""

from __future__ import annotations

import math

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.events import Abort, Answer, Failure, Pong, Request
from tests.support.engines import counts, make, receive
from tests.support.helpers import packet


def test_a_request_and_its_answer() -> None:
    client, server = make("client"), make("server")
    assert client.request(["ping", b"1"]) == 0
    sent = client.take(0)
    assert sent == packet(b"req", b"0", b"", b"", b"", body=[b"ping", b"1"])
    assert list(receive(server, sent)) == [Request(0, math.inf, [b"ping", b"1"])]
    assert server.handling == 1
    server.answer(0, ["pong"])
    assert server.handling == 1, "a slot is taken until the answer leaves"
    sent = server.take(0)
    assert server.handling == 0
    assert sent == packet(b"ok", b"0", body=[b"pong"])
    assert list(receive(client, sent)) == [Answer(0, [b"pong"])]
    assert client.take(0) == server.take(0) == b""


def test_ids_count_up_by_parity() -> None:
    client, server = make("client"), make("server")
    assert [client.request([]) for _ in range(3)] == [0, 2, 4]
    assert [server.request([]) for _ in range(3)] == [1, 3, 5]


# ---- what is counted ----


def test_what_there_is_is_counted() -> None:
    client, server = make("client", slots=2), make("server", max_requests=2)
    first, second, third = (client.request([b"x"]) for _ in range(3))
    assert counts(client) == (2, 1, 0, 0, 2)
    list(receive(server, client.take(0)))
    assert counts(client) == (2, 1, 0, 0, 0)
    assert counts(server) == (0, 0, 0, 2, 0)
    client.cancel(first)
    client.cancel(third)
    assert counts(client) == (2, 0, 1, 0, 1)
    list(receive(server, client.take(0)))
    server.answer(first, [])
    server.answer(second, [])
    assert counts(server) == (0, 0, 0, 2, 2)
    list(receive(client, server.take(0)))
    assert counts(client) == counts(server) == (0, 0, 0, 0, 0)


def test_what_is_over_has_no_requests_of_ours() -> None:
    client, server = make("client", slots=2), make("server", slots=2)
    sent = client.request([b"x"])
    list(receive(server, client.take(0)))
    client.cancel(sent)
    client.request([b"y"])
    client.request([b"z"])
    list(receive(client, packet(b"req", b"1", b"", b"", b"", body=[])))
    client.answer(1, [])
    assert counts(client) == (2, 1, 1, 1, 3)
    client.close()
    assert counts(client) == (0, 0, 0, 1, 2), "the answer, and the cancel"


# ---- signs of life ----


def test_a_ping_is_answered_and_at_most_one_pong_is_queued() -> None:
    client, server = make("client"), make("server")
    client.ping()
    assert client.is_ping_queued
    ping = client.take(0)
    assert not client.is_ping_queued
    assert list(receive(server, ping * 1000)) == []
    pong = server.take(0)
    assert pong == packet(b"pong")
    assert list(receive(client, pong)) == [Pong()]
    assert list(receive(server, ping)) == []
    assert server.take(0) == pong


# ---- what travels beside a request, and last words ----


def test_depth_context_and_details_arrive() -> None:
    client, server = make("client"), make("server")
    client.request(["x"], 7.5, depth=15, context={"trace": "1", "b": b"2"})
    client.open_channel(["y"], depth=3, context={"c": b""})
    one, two = receive(server, client.take(5))
    assert one == Request(0, 2.5, [b"x"], False, 15, {"trace": b"1", "b": b"2"})
    assert two == Request(2, math.inf, [b"y"], True, 3, {"c": b""})
    assert server.fail(0, "c", "m", b"details")
    assert receive(client, server.take(0)) == [Failure(0, "c", "m", b"details")]


def test_an_abort_leaves_last_and_is_never_answered() -> None:
    client, server = make("client"), make("server")
    client.request(["x"])
    receive(server, client.take(0))
    server.answer(0, [])
    server.abort("x" * 300)
    assert server.has_queued
    sent = server.take(0)
    assert sent == packet(b"ok", b"0", body=[]) + packet(b"abort", b"protocol", b"x" * 256)
    assert not server.has_queued
    assert receive(client, sent) == [Answer(0, []), Abort("protocol", "x" * 256)]
    client.abort("no")
    assert client.take(0) == b""


@pytest.mark.parametrize("fields", [[b"protocol"], [b"", bytes(257)], [b"\xff", b""], [b"", b"", b""]])
def test_a_malformed_abort_is_an_error_and_not_answered_either(fields: list[bytes]) -> None:
    server = make("server")
    assert server.receive(packet(b"abort", *fields)) == []
    assert isinstance(server.error, ProtocolError)
    server.abort(str(server.error))
    assert server.take(0) == b""
