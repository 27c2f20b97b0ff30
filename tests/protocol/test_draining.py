"""Draining: requests in flight finish, and no new one is taken."""

from __future__ import annotations

import math

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.events import Answer, Bye, Request
from bokbok_trio._protocol.local_requests import State
from tests.support.engines import make, receive
from tests.support.helpers import packet


def test_draining_lets_what_is_in_flight_finish_and_takes_nothing_new() -> None:
    client, server = make("client", slots=1), make("server", max_requests=1)
    client.request(["in flight"])
    list(receive(server, client.take(0)))
    waiting = client.request(["waits for a slot"])
    server.drain()
    server.drain()
    sent = server.take(0)
    assert sent == packet(b"bye")
    assert list(receive(client, sent)) == [Bye([waiting])]
    assert client.draining.peer_drains
    assert not server.draining.peer_drains
    assert list(receive(server, client.take(0))) == []
    assert not server.is_drained
    callback = server.request(["from the handler"])
    assert list(receive(client, server.take(0))) == [Request(callback, math.inf, [b"from the handler"])]
    client.answer(callback, [])
    assert list(receive(server, client.take(0))) == [Answer(callback, [])]
    server.answer(0, ["done"])
    assert not server.is_drained
    assert list(receive(client, server.take(0))) == [Answer(0, [b"done"])]
    assert server.is_drained
    assert not client.is_drained


def test_bye_ok_leaves_after_the_last_request() -> None:
    client, server = make("client", limit=2**20), make("server", limit=2**20)
    client.request([bytes(2**18)])
    client.request(["small"])
    client.take(0)
    server.drain()
    list(receive(client, server.take(0)))
    sent = b""
    while batch := client.take(0):
        sent += batch
    assert sent.endswith(packet(b"bye-ok"))
    assert sent.count(packet(b"bye-ok")) == 1


def test_both_sides_may_drain_at_once() -> None:
    client, server = make("client"), make("server")
    client.drain()
    server.drain()
    to_server, to_client = client.take(0), server.take(0)
    assert list(receive(server, to_server)) == list(receive(client, to_client)) == [Bye([])]
    assert list(receive(server, client.take(0))) == list(receive(client, server.take(0))) == []
    assert client.is_drained
    assert server.is_drained


@pytest.mark.parametrize(
    "packets",
    [
        [packet(b"bye"), packet(b"bye")],
        [packet(b"bye-ok"), packet(b"bye-ok")],
        [packet(b"bye-ok"), packet(b"req", b"0", b"", b"", b"", body=[])],
        [packet(b"bye", b"")],
        [packet(b"ping", b"")],
        [packet(b"pong", b"")],
    ],
)
def test_a_bye_that_breaks_the_rules(packets: list[bytes]) -> None:
    server = make("server")
    server.drain()
    for good in packets[:-1]:
        list(receive(server, good))
    with pytest.raises(ProtocolError):
        list(receive(server, packets[-1]))


def test_bye_ok_without_bye_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="`bye-ok` without `bye`"):
        receive(make("server"), packet(b"bye-ok"))


def test_after_close_only_what_is_queued_leaves_and_no_request() -> None:
    server = make("server", limit=2**20)
    requests = b"".join(packet(b"req", b"%d" % n, b"", b"", b"", body=[]) for n in (0, 2))
    list(receive(server, requests + packet(b"bye")))
    server.request(["ours"])
    server.request([bytes(2**18)])
    server.answer(0, ["queued"])
    server.ping()
    server.close()
    server.fail(2, "late", "late")
    assert server.take(0) == packet(b"ping") + packet(b"ok", b"0", body=[b"queued"])
    assert server.take(0) == b""


def test_big_answers_still_arrive_when_big_requests_were_cut_off_by_closing() -> None:
    client, server = (make(side, max_requests=9, slots=9, limit=2**20) for side in ("client", "server"))
    list(receive(server, b"".join(packet(b"req", b"%d" % n, b"", b"", b"", body=[]) for n in (0, 2))))
    client.local.next_id, client.local.states = 4, {0: State.SENT, 2: State.SENT}
    for _ in range(4):
        server.request([bytes(2**18)])
        list(receive(client, server.take(0)))
    server.answer(0, [bytes(2**18)])
    server.answer(2, [bytes(2**18)])
    server.close()
    events: list[object] = []
    while sent := server.take(0):
        events += receive(client, sent)
    assert events == [Answer(0, [bytes(2**18)]), Answer(2, [bytes(2**18)])]


def test_a_big_request_cancelled_before_its_turn_leaves_nothing() -> None:
    client, server = make("client", limit=2**20), make("server", limit=2**20)
    first, second = client.request([bytes(2**18)]), client.request([bytes(2**18)], deadline=9)
    list(receive(server, client.take(0)))
    client.cancel(second)
    third = client.request([bytes(2**18)], deadline=9)
    events: list[object] = []
    for now in (4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5):
        events += receive(server, client.take(now))
    assert events == [Request(first, math.inf, [bytes(2**18)]), Request(third, 5, [bytes(2**18)])]


def test_only_depth_0_is_refused_by_a_bye() -> None:
    client, server = make("client", slots=1), make("server", max_requests=1)
    client.request(["0"])
    client.request(["1"], depth=1)
    waiting, deeper = client.request(["0"]), client.request(["1"], depth=1)
    server.drain()
    assert receive(client, server.take(0)) == [Bye([waiting])]
    assert client.local.is_waiting(deeper)
    assert len(receive(server, client.take(0))) == 2
    receive(client, packet(b"ok", b"2", body=[]))
    server.answer(2, [])
    server.take(0)
    assert receive(server, client.take(0)) == [Request(deeper, math.inf, [b"1"], depth=1)], "after bye-ok"
