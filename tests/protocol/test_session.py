from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bokbok_trio import MessageTooLarge, ProtocolError
from bokbok_trio._errors import MAX_ERROR_TEXT_SIZE
from bokbok_trio._protocol.events import Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from bokbok_trio._protocol.flow_control import MAX_CREDIT, MAX_QUEUED, WINDOW
from bokbok_trio._protocol.interpreter import CROSSING, CROSSING_ITEMS, MAX_IGNORED
from bokbok_trio._protocol.local_requests import State
from bokbok_trio._protocol.packets import LARGE, encode_body, encode_packet
from bokbok_trio._protocol.queued_packet import HEAD_ROOM, MAX_WHOLE_SIZE, QueuedPacket
from bokbok_trio._protocol.session import Session

LIMIT = 4096


def make(side: Any = "client", *, max_requests: int = 3, slots: int = 3, limit: int = LIMIT) -> Session:
    return Session(side, max_message_size=limit, max_requests=max_requests, slots=slots)


def packet(*fields: bytes, body: list[bytes] | None = None) -> bytes:
    if body is None:
        return encode_packet(*fields)
    chunks, size = encode_body(body, 2**32)
    return encode_packet(*fields, body_size=size) + b"".join(chunks)


def receive(session: Session, data: bytes) -> list[Event]:
    """What was received says; raises how it breaks the protocol."""
    events = session.receive(data)
    while session.has_undecoded:
        events += session.receive(b"")
    if session.error is not None:
        raise session.error
    return events


def request_id(event: Event) -> int:
    assert isinstance(event, Request)
    return event.id


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


def test_a_failure_reaches_the_asker() -> None:
    client, server = make("client"), make("server")
    client.request([])
    list(receive(server, client.take(0)))
    server.fail(0, "no-such", "there is none")
    assert list(receive(client, server.take(0))) == [Failure(0, "no-such", "there is none")]


@pytest.mark.parametrize("character", ["a", "é", "€", "😀", "\ud800"])
def test_a_long_message_is_cut_between_characters(character: str) -> None:
    client, server = make("client"), make("server")
    client.request([])
    list(receive(server, client.take(0)))
    server.fail(0, "long", "x" + character * MAX_ERROR_TEXT_SIZE)
    [failure] = receive(client, server.take(0))
    assert isinstance(failure, Failure)
    size = len(failure.message.encode())
    assert MAX_ERROR_TEXT_SIZE - 3 <= size <= MAX_ERROR_TEXT_SIZE
    assert failure.message.startswith("x" + character.encode(errors="backslashreplace").decode())


def test_the_longest_error_fits_the_smallest_limit() -> None:
    server = make("server")
    list(receive(server, packet(b"req", b"9" * 17 + b"8", b"", b"", b"", body=[])))
    server.fail(int("9" * 17 + "8"), "c" * 64, "x" * 5000)
    assert len(server.take(0)) <= LIMIT


# ---- slots ----


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


# ---- cancelling ----


def test_a_request_cancelled_in_the_queue_never_existed() -> None:
    client = make("client", slots=1)
    queued, waiting, third = client.request([]), client.request([]), client.request(["third"])
    client.cancel(waiting)
    client.cancel(queued)
    assert client.take(0) == packet(b"req", b"%d" % third, b"", b"", b"", body=[b"third"])


def test_a_request_cancelled_later_is_followed_by_cancel_and_still_answered() -> None:
    client, server = make("client", slots=1), make("server")
    client.request([])
    list(receive(server, client.take(0)))
    client.cancel(0)
    waiting = client.request([])
    sent = client.take(0)
    assert sent == packet(b"cancel", b"0"), "its slot is not free before its answer came"
    assert list(receive(server, sent)) == [Cancel(0)]
    server.fail(0, "cancelled", "")
    assert list(receive(client, server.take(0))) == []
    assert client.is_unsent(waiting)
    assert b"req" in client.take(0)
    assert not client.is_unsent(waiting)


def test_cancel_leaves_before_what_was_queued_earlier() -> None:
    client = make("client")
    client.request([])
    client.take(0)
    client.request(["later"])
    client.cancel(0)
    assert client.take(0) == packet(b"cancel", b"0") + packet(b"req", b"2", b"", b"", b"", body=[b"later"])


@pytest.mark.parametrize("answered", [False, True])
def test_a_cancel_that_crosses_the_answer_is_ignored(answered: bool) -> None:
    server = make("server")
    list(receive(server, packet(b"req", b"0", b"", b"", b"", body=[])))
    server.answer(0, [])
    if answered:
        server.take(0)
        assert list(receive(server, packet(b"cancel", b"0"))) == []
    else:
        assert list(receive(server, packet(b"cancel", b"0"))) == []
        assert server.take(0) == packet(b"ok", b"0", body=[])


# ---- what leaves ----


def counts(session: Session) -> tuple[int, int, int, int, int]:
    return session.asked, session.waiting, session.cancelled, session.handling, session.queued


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


# ---- a peer that lies ----

BAD = {
    "an unknown packet": [packet(b"hello", b"0")],
    "no field at all": [packet()],
    "req of wrong arity": [packet(b"req", b"2", b"", body=[])],
    "a depth of 0 in digits": [packet(b"req", b"2", b"", b"0", b"", body=[])],
    "a depth that is no number": [packet(b"req", b"2", b"", b"01", b"", body=[])],
    "a depth over 15": [packet(b"req", b"2", b"", b"16", b"", body=[])],
    "a long depth": [packet(b"req", b"2", b"", b"1" * 20, b"", body=[])],
    "a context that is none": [packet(b"req", b"2", b"", b"", b"\x01", body=[])],
    "a context of half a pair": [packet(b"req", b"2", b"", b"", b"\x01\x00\x00\x00\x01a", body=[])],
    "abort of wrong arity": [packet(b"abort", b"protocol")],
    "a long abort": [packet(b"abort", b"protocol", bytes(257))],
    "an abort that is not UTF-8": [packet(b"abort", b"protocol", b"\xff")],
    "ok of wrong arity": [packet(b"ok", b"1")],
    "err of wrong arity": [packet(b"err", b"1", b"code", b"text")],
    "cancel of wrong arity": [packet(b"cancel", b"0", b"0")],
    "an id that is no number": [packet(b"req", b"+2", b"", b"", b"", body=[])],
    "an id with a leading zero": [packet(b"req", b"02", b"", b"", b"", body=[])],
    "a timeout that is no number": [packet(b"req", b"2", b"1.5", b"", b"", body=[])],
    "a body that is none": [packet(b"req", b"2", b"", b"", b"", b"\x01")],
    "an answer's body that is none": [packet(b"ok", b"1", b"")],
    "an error that is not UTF-8": [packet(b"err", b"1", b"code", b"\xff", b"")],
    "a code that is not UTF-8": [packet(b"err", b"1", b"\xff", b"text", b"")],
    "an id of our parity": [packet(b"req", b"3", b"", b"", b"", body=[])],
    "cancel of our parity": [packet(b"cancel", b"1")],
    "an id in flight": [packet(b"req", b"0", b"", b"", b"", body=[])],
    "an answer nobody awaits": [packet(b"ok", b"5", body=[])],
    "an answer to its own request": [packet(b"ok", b"0", body=[])],
    "an answer to what was never sent": [packet(b"ok", b"3", body=[])],
    "a second answer": [packet(b"ok", b"1", body=[]), packet(b"err", b"1", b"c", b"m", b"")],
    "a packet over the limit": [(LIMIT + 1).to_bytes(4, "big")],
    "a packet that is none": [b"\x00\x00\x00\x02\x01\x00"],
}


@pytest.mark.parametrize("packets", BAD.values(), ids=BAD)
def test_a_broken_rule_is_one_protocol_error(packets: list[bytes]) -> None:
    server = make("server")
    # In flight: request 0 of the peer's; of ours 1, awaited, and 3, unsent.
    list(receive(server, packet(b"req", b"0", b"", b"", b"", body=[])))
    server.request([])
    server.take(0)
    server.request([])
    for good in packets[:-1]:
        list(receive(server, good))
    with pytest.raises(ProtocolError):
        list(receive(server, packets[-1]))


def test_what_came_before_the_error_is_still_told() -> None:
    server = make("server")
    events = server.receive(packet(b"req", b"0", b"", b"", b"", body=[]) + packet(b"nonsense"))
    assert events == [Request(0, math.inf, [])]
    assert str(server.error) == "unknown packet: b'nonsense' with 1 fields"


def test_very_many_packets_are_decoded_some_at_a_time() -> None:
    server = make("server", max_requests=1000)
    sent = b"".join(packet(b"req", b"%d" % (2 * n), b"", b"", b"", body=[]) for n in range(250))
    ids = []
    counts = []
    data = sent + packet(b"nonsense")
    while True:
        events = server.receive(data)
        counts.append(len(events))
        ids += [request_id(event) for event in events]
        if not server.has_undecoded:
            break
        assert server.is_mid_packet
        data = b""
    assert ids == list(range(0, 500, 2))
    assert counts == [100, 100, 50]
    assert server.error is not None
    assert not server.has_undecoded


IGNORED = {
    "a ping while a pong waits": packet(b"ping"),
    "a cancel of what is done": packet(b"cancel", b"8"),
    "an item of what is done": packet(b"item", b"8", body=[b""]),
    "credit for what is done": packet(b"credit", b"8", b"1"),
    "an end of what is done": packet(b"end", b"8"),
    "pieces that are taken back": packet(b"part", b"1", b"99", b"x") + packet(b"drop", b"1"),
}


@pytest.mark.parametrize("kind", IGNORED)
def test_packets_that_mean_nothing_are_bounded(kind: str) -> None:
    server = make("server")
    receive(server, packet(b"ping"))
    assert receive(server, IGNORED[kind] * MAX_IGNORED) == []
    with pytest.raises(ProtocolError, match=f"{MAX_IGNORED + 1} packets that mean nothing"):
        receive(server, IGNORED[kind])


def test_as_many_packets_may_cross_as_there_were_requests_and_items() -> None:
    server = make("server")
    for n in range(3):
        receive(server, packet(b"chan", b"%d" % (2 * n), b"", b"", b"", b"1", body=[]))
        server.answer(2 * n, [])
        server.take(0)
    crossing = packet(b"item", b"0", body=[b""])
    most = MAX_IGNORED + 3 * (CROSSING + CROSSING_ITEMS)
    assert receive(server, crossing * most) == []
    with pytest.raises(ProtocolError, match="mean nothing"):
        receive(server, crossing)


def test_a_timeout_is_told() -> None:
    server = make("server")
    assert list(receive(server, packet(b"req", b"0", b"1500000", b"", b"", body=[]))) == [Request(0, 1.5, [])]


def test_being_mid_packet() -> None:
    server = make("server")
    sent = packet(b"req", b"0", b"", b"", b"", body=[])
    assert not server.is_mid_packet
    assert list(receive(server, sent[:-1])) == []
    assert server.is_mid_packet
    assert len(list(receive(server, sent[-1:]))) == 1
    assert not server.is_mid_packet


# ---- deadlines ----


@pytest.mark.parametrize(
    ("deadline", "now", "field"),
    [
        (math.inf, 5, b""),
        (7.5, 5, b"2500000"),
        (5.0000004, 5, b"0"),
        (4, 5, b"0"),
        (-math.inf, 5, b"0"),
        (5 + 1e10, 5, b"10000000000000000"),
        (5 + 1e11 + 1e9, 5, b""),
    ],
)
def test_the_timeout_is_what_is_left_when_it_leaves(deadline: float, now: float, field: bytes) -> None:
    client = make("client")
    client.request([], deadline)
    assert client.take(now) == packet(b"req", b"0", field, b"", b"", body=[])


# ---- big packets ----


def test_a_big_request_travels_in_pieces_that_let_others_through() -> None:
    client, server = make("client", limit=2**20), make("server", limit=2**20)
    big = bytes(range(256)) * 1024
    client.request([big], 100)
    events: list[object] = []
    batches = 0
    while sent := client.take(0):
        batches += 1
        events += receive(server, sent)
        if batches == 2:
            small = client.request(["small"])
    assert events == [Request(small, math.inf, [b"small"]), Request(0, 100, [big])]
    assert batches == 4


def test_a_big_request_cancelled_half_way_never_existed() -> None:
    client, server = make("client", slots=1, limit=2**20), make("server", max_requests=1, limit=2**20)
    client.request([bytes(2**18)])
    list(receive(server, client.take(0)))
    assert client.is_unsent(0)
    assert server._interpreter.reassembler.held > 0
    client.cancel(0)
    client.request(["next"])
    sent = client.take(0)
    assert sent.startswith(packet(b"drop", b"0"))
    assert list(receive(server, sent)) == [Request(2, math.inf, [b"next"])]
    assert server._interpreter.reassembler.held == 0


def test_a_big_answer_holds_its_slot_until_its_last_piece_leaves() -> None:
    server = make("server", max_requests=1, limit=2**20)
    list(receive(server, packet(b"req", b"0", b"", b"", b"", body=[])))
    server.answer(0, [bytes(2**17)])
    server.take(0)
    assert server.handling == 1
    server.take(0)
    assert server.handling == 0
    assert server.take(0) == b""


def in_pieces(body: bytes, number: int = 0) -> bytes:
    half = len(body) // 2
    parts = ((body[:half], len(body) - half), (body[half:], 0))
    return b"".join(packet(b"part", b"%d" % number, b"%d" % left, piece) for piece, left in parts)


def test_small_packets_may_come_in_pieces_too() -> None:
    server = make("server")
    request = packet(b"req", b"0", b"", b"", b"", body=[b"x"])
    assert list(receive(server, in_pieces(request[4:]))) == [Request(0, math.inf, [b"x"])]


@pytest.mark.parametrize(
    "bad",
    [
        in_pieces(packet(b"err", b"1", b"code", b"message", b"")[4:]),
        in_pieces(packet(b"cancel", b"0")[4:]),
        in_pieces(packet(b"part", b"0", b"0", b"x")[4:]),
        in_pieces(packet()[4:] + b"x"),
        packet(b"part", b"0", b"0", packet()[4:]),
        packet(b"part", b"0", b"1", b""),
        packet(b"part", b"0", b"x", b"x"),
        packet(b"drop", b"0"),
        packet(b"drop", b"0", b"0"),
        (MAX_WHOLE_SIZE + 1).to_bytes(4, "big"),
    ],
)
def test_bad_pieces_are_an_error(bad: bytes) -> None:
    server = make("server", limit=2**20)
    with pytest.raises(ProtocolError):
        list(receive(server, bad))


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


# ---- draining ----


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


# ---- channels ----


def item_event(id: int, *fields: bytes) -> Item:
    chunks, _ = encode_body(fields, 2**32)
    body = b"".join(chunks)
    return Item(id, len(body), list(fields), body if len(body) < LARGE else None)


def open_pair(limit: int = LIMIT) -> tuple[Session, Session]:
    """Two engines with the channel 0 of the client's, and credit both ways."""
    client, server = make("client", limit=limit), make("server", limit=limit)
    client.open_channel(["hello"])
    list(receive(server, client.take(0)))
    server.flow_control.accept(0)
    assert list(receive(client, server.take(0))) == []
    return client, server


def send_item(engine: Session, id: int, *fields: bytes) -> None:
    engine.flow_control.send(id, *engine.flow_control.encode(fields))


def test_a_channel_with_items_both_ways_and_its_answer() -> None:
    client, server = make("client"), make("server")
    assert client.open_channel(["hello"], 2.5) == 0
    sent = client.take(0)
    assert sent == packet(b"chan", b"0", b"2500000", b"", b"", b"%d" % WINDOW, body=[b"hello"])
    assert list(receive(server, sent)) == [Request(0, 2.5, [b"hello"], has_channel=True)]
    assert not client.flow_control.may_send(0)
    assert server.flow_control.may_send(0)
    server.flow_control.accept(0)
    sent = server.take(0)
    assert sent == packet(b"credit", b"0", b"%d" % WINDOW)
    assert list(receive(client, sent)) == []
    assert client.flow_control.take_writable() == {0}
    send_item(client, 0, b"up")
    client.flow_control.end(0)
    sent = client.take(0)
    assert sent == packet(b"item", b"0", body=[b"up"]) + packet(b"end", b"0")
    assert list(receive(server, sent)) == [item_event(0, b"up"), End(0)]
    send_item(server, 0, b"down")
    server.answer(0, ["answer"])
    sent = server.take(0)
    assert sent == packet(b"item", b"0", body=[b"down"]) + packet(b"ok", b"0", body=[b"answer"])
    assert list(receive(client, sent)) == [item_event(0, b"down"), Answer(0, [b"answer"])]
    assert not len(client.flow_control)
    assert not len(server.flow_control)
    assert server.handling == 0


def test_the_answer_waits_for_big_items_and_small_ones_of_other_channels_do_not() -> None:
    client, server = open_pair(2**20)
    list(receive(server, packet(b"chan", b"2", b"", b"", b"", b"100", body=[])))
    send_item(server, 0, bytes(2**17))
    send_item(server, 2, b"small")
    server.answer(0, [])
    client.local.states[2] = State.SENT
    client.flow_control.add_local(2)
    events: list[object] = []
    while sent := server.take(0):
        events += receive(client, sent)
        assert (Answer(0, []) in events) == (server.handling == 1), "its slot is free with its answer"
    assert events == [item_event(2, b"small"), item_event(0, bytes(2**17)), Answer(0, [])]


def test_cancelling_a_channel_drops_what_has_not_left() -> None:
    client, server = open_pair(2**20)
    send_item(client, 0, bytes(2**17))
    list(receive(server, client.take(0)))
    assert server._interpreter.reassembler.held
    send_item(server, 0, b"crosses")
    server.flow_control.end(0)
    client.flow_control.end(0)
    client.cancel(0)
    sent = client.take(0)
    assert sent == packet(b"drop", b"0") + packet(b"cancel", b"0")
    assert list(receive(server, sent)) == [Cancel(0)]
    assert list(receive(client, server.take(0))) == [], "nobody wants it"
    server.fail(0, "cancelled", "")
    assert list(receive(client, server.take(0))) == []
    assert not len(client.flow_control)


def test_what_a_cancelled_channel_gets_is_still_checked() -> None:
    client, server = open_pair()
    client.cancel(0)
    server.flow_control.end(0)
    list(receive(client, server.take(0)))
    with pytest.raises(ProtocolError, match="`item` after `end`"):
        list(receive(client, packet(b"item", b"0", body=[])))


def test_a_channel_cancelled_before_it_leaves_never_existed() -> None:
    client = make("client", slots=1)
    client.open_channel([])
    client.open_channel([])
    client.flow_control.end(0)
    client.flow_control.end(2)
    client.cancel(2)
    client.cancel(0)
    assert client.take(0) == b""
    assert not len(client.flow_control)


def test_a_channel_that_was_ended_while_it_had_no_slot() -> None:
    client = make("client", slots=1)
    client.request([])
    client.take(0)
    client.open_channel([])
    client.flow_control.end(2)
    list(receive(client, packet(b"ok", b"0", body=[])))
    chan = packet(b"chan", b"2", b"", b"", b"", b"%d" % WINDOW, body=[])
    assert client.take(0) == chan + packet(b"end", b"2")


def test_who_is_cancelled_takes_back_the_items_that_have_not_left() -> None:
    client, server = open_pair(2**20)
    send_item(server, 0, bytes(2**17))
    list(receive(client, server.take(0)))
    assert client._interpreter.reassembler.held
    client.cancel(0)
    assert list(receive(server, client.take(0))) == [Cancel(0)]
    server.drop_items(0)
    server.fail(0, "cancelled", "")
    sent = server.take(0)
    assert sent == packet(b"drop", b"0") + packet(b"err", b"0", b"cancelled", b"", b"")
    assert list(receive(client, sent)) == []
    assert client._interpreter.reassembler.held == client.asked == 0


def test_a_cancel_that_crosses_the_answer_leaves_what_comes_before_it() -> None:
    client, server = open_pair()
    send_item(server, 0, b"x")
    server.answer(0, [])
    client.cancel(0)
    assert list(receive(server, client.take(0))) == []
    assert server.take(0) == packet(b"item", b"0", body=[b"x"]) + packet(b"ok", b"0", body=[])


def test_the_answer_drops_our_items_that_have_not_left() -> None:
    client, server = open_pair(2**20)
    send_item(client, 0, bytes(2**17))
    list(receive(server, client.take(0)))
    server.answer(0, [])
    assert list(receive(client, server.take(0))) == [Answer(0, [])]
    sent = client.take(0)
    assert sent == packet(b"drop", b"0")
    list(receive(server, sent))
    assert server._interpreter.reassembler.held == 0


def test_a_channel_without_a_slot_fails_when_the_peer_drains() -> None:
    client = make("client", slots=1)
    client.open_channel([])
    client.open_channel([])
    assert list(receive(client, packet(b"bye"))) == [Bye([2])]
    client.cancel(0)
    assert not len(client.flow_control)


def test_after_close_no_item_of_ours_leaves() -> None:
    client, server = open_pair()
    send_item(client, 0, b"x")
    client.close()
    client.flow_control.end(0)
    client.flow_control.consume(0, WINDOW)
    assert client.take(0) == b""
    send_item(server, 0, b"x")
    server.answer(0, [])
    server.close()
    assert server.take(0) == packet(b"item", b"0", body=[b"x"]) + packet(b"ok", b"0", body=[])


def test_what_is_not_in_flight_is_ignored_of_either_parity() -> None:
    server = make("server")
    server.open_channel([])  # unsent
    for id in (b"0", b"1", b"7"):
        for crossing in (packet(b"item", id, body=[]), packet(b"credit", id, b"5"), packet(b"end", id)):
            assert list(receive(server, crossing)) == []
    assert not server.flow_control.may_send(1)


BAD_CHANNELS = {
    "chan of wrong arity": packet(b"chan", b"4", b"", b"", b"", body=[]),
    "chan of our parity": packet(b"chan", b"5", b"", b"", b"", b"0", body=[]),
    "chan with an id in flight": packet(b"chan", b"0", b"", b"", b"", b"0", body=[]),
    "chan with the id of a request": packet(b"chan", b"2", b"", b"", b"", b"0", body=[]),
    "req with the id of a channel": packet(b"req", b"0", b"", b"", b"", body=[]),
    "a credit that is no number": packet(b"chan", b"4", b"", b"", b"", b"-1", body=[]),
    "too much credit at first": packet(b"chan", b"4", b"", b"", b"", b"%d" % (MAX_CREDIT + 1), body=[]),
    "too much credit in all": packet(b"credit", b"0", b"%d" % MAX_CREDIT),
    "credit of wrong arity": packet(b"credit", b"0"),
    "no number of credit": packet(b"credit", b"0", b"x"),
    "an item without credit": packet(b"item", b"0", body=[]),
    "an item that is none": packet(b"item", b"1", b"\x01"),
    "one that is none and would be ignored": packet(b"item", b"99", b"\x01"),
    "item of wrong arity": packet(b"item", b"1"),
    "an item for a request": packet(b"item", b"2", body=[]),
    "credit for a request": packet(b"credit", b"2", b"5"),
    "an end for a request": packet(b"end", b"2"),
    "end of wrong arity": packet(b"end", b"1", b""),
    "a second end": packet(b"end", b"1") * 2,
    "an item after the end": packet(b"end", b"1") + packet(b"item", b"1", body=[]),
    "an end in pieces": in_pieces(packet(b"end", b"1")[4:]),
    "a credit in pieces": in_pieces(packet(b"credit", b"1", b"5")[4:]),
    "an id that is no number": packet(b"end", b"01"),
}


@pytest.mark.parametrize("bad", BAD_CHANNELS.values(), ids=BAD_CHANNELS)
def test_a_broken_rule_of_channels_is_a_protocol_error(bad: bytes) -> None:
    server = make("server", max_requests=5)
    # In flight: of the peer's the channel 0, with no credit granted, and the request 2; of ours channel 1.
    list(
        receive(
            server,
            packet(b"chan", b"0", b"", b"", b"", b"10", body=[])
            + packet(b"req", b"2", b"", b"", b"", body=[]),
        )
    )
    server.open_channel([])
    server.take(0)
    with pytest.raises(ProtocolError):
        list(receive(server, bad))


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


def test_depth_context_and_details_arrive() -> None:
    client, server = make("client"), make("server")
    client.request(["x"], 7.5, depth=15, context={"trace": "1", "b": b"2"})
    client.open_channel(["y"], depth=3, context={"c": b""})
    one, two = receive(server, client.take(5))
    assert one == Request(0, 2.5, [b"x"], False, 15, {"trace": b"1", "b": b"2"})
    assert two == Request(2, math.inf, [b"y"], True, 3, {"c": b""})
    assert server.fail(0, "c", "m", b"details")
    assert receive(client, server.take(0)) == [Failure(0, "c", "m", b"details")]


def test_details_that_do_not_fit_are_left_out() -> None:
    client, server = make("client"), make("server")
    client.request([])
    receive(server, client.take(0))
    assert not server.fail(0, "c", "m", bytes(LIMIT))
    assert receive(client, server.take(0)) == [Failure(0, "c", "m", b"")]


def test_details_over_their_limit_break_the_protocol() -> None:
    client = make("client", limit=2**20)
    client.request([])
    client.take(0)
    with pytest.raises(ProtocolError, match="details of 16385 bytes exceed the limit of 16384"):
        receive(client, packet(b"err", b"0", b"c", b"m", bytes(2**14 + 1)))


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


def test_items_and_channels_may_come_in_pieces() -> None:
    client, server = make("client"), make("server")
    chan = packet(b"chan", b"0", b"", b"", b"", b"9", body=[b"x"])
    assert list(receive(server, in_pieces(chan[4:]))) == [Request(0, math.inf, [b"x"], has_channel=True)]
    client.open_channel([])
    client.take(0)
    assert list(receive(client, in_pieces(packet(b"item", b"0", body=[b"x"])[4:]))) == [item_event(0, b"x")]


def test_the_longest_head_fits_its_room() -> None:
    client = make("client", limit=2**20)
    client.local.next_id = int("9" * 17 + "8")
    client.open_channel([bytes(2**20 - HEAD_ROOM - 5)], 1e11)
    while client.take(0):
        assert (
            not client._outbox._in_pieces or next(iter(client._outbox._in_pieces.values())).remaining < 2**20
        )


# ---- two engines, in any order ----


class TwoEngines(RuleBasedStateMachine):
    """Two honest engines, joined by wires that carry bytes in any chunks, until one is cut.

    The model is what a user of each side may expect; the engines must never disagree with it.
    """

    asked = Bundle("asked")

    @initialize(slots=st.tuples(st.integers(1, 3), st.integers(1, 3)))
    def start(self, slots: tuple[int, int]) -> None:
        self.slots = slots
        self.engines = (
            make("client", max_requests=slots[0], slots=slots[1], limit=2**20),
            make("server", max_requests=slots[1], slots=slots[0], limit=2**20),
        )
        self.now = 0.0
        self.timeouts: list[dict[int, float]] = [{}, {}]  # of those without a deadline, by asker
        self.has_drained = [False, False]
        self.wires = [bytearray(), bytearray()]  # by sender
        self.is_cut = [False, False]
        self.waiting: list[dict[int, bytes]] = [{}, {}]  # id -> what it asked, by asker
        self.cancelled: list[set[int]] = [set(), set()]
        self.seen: list[set[int]] = [set(), set()]  # ids the other side was told of, by asker
        self.handling: list[dict[int, bytes]] = [{}, {}]  # id -> what was asked, by answerer
        # Of channels, by the side that does it, and id: what was sent and not told, what is to be consumed.
        self.items: list[dict[int, list[bytes]]] = [{}, {}]
        self.held: list[dict[int, list[int]]] = [{}, {}]
        self.ended: list[set[int]] = [set(), set()]
        self.end_told: list[set[int]] = [set(), set()]

    @rule(
        target=asked,
        side=st.integers(0, 1),
        text=st.binary(max_size=40),
        times=st.sampled_from([1, 1, 1, 5000]),
        timeout=st.sampled_from([math.inf, 2.5]),
        has_channel=st.booleans(),
        depth=st.sampled_from([0, 0, 1, 15]),
    )
    def ask(
        self, *, side: int, text: bytes, times: int, timeout: float, has_channel: bool, depth: int
    ) -> tuple[int, int]:
        if self.engines[side].draining.peer_drains and not depth:
            return side, -1
        text *= times
        if has_channel:
            id = self.engines[side].open_channel([text], self.now + timeout, depth=depth)
            self.items[side][id], self.items[1 - side][id] = [], []
            self.held[side][id] = []
        else:
            id = self.engines[side].request([text], self.now + timeout, depth=depth)
        if timeout == math.inf:
            self.timeouts[side][id] = timeout
        assert id % 2 == side
        assert id not in self.waiting[side]
        self.waiting[side][id] = text
        return side, id

    @rule(request=consumes(asked))
    def cancel(self, request: tuple[int, int]) -> None:
        side, id = request
        if self.waiting[side].pop(id, None) is not None:
            self.engines[side].cancel(id)
            self.cancelled[side].add(id)
            self.held[side].pop(id, None)

    def channel_of(self, side: int, which: int) -> int | None:
        """A channel of which that side's user still has its end."""
        ids = [id for id in self.held[side] if id in self.waiting[side] or id in self.handling[side]]
        return ids[which % len(ids)] if ids else None

    @rule(side=st.integers(0, 1), which=st.integers(0, 9), size=st.sampled_from([0, 10, 30_000, 200_000]))
    def send_item(self, side: int, which: int, size: int) -> None:
        id = self.channel_of(side, which)
        if id is not None and id not in self.ended[side] and self.engines[side].flow_control.may_send(id):
            self.items[side][id].append(bytes(size))
            send_item(self.engines[side], id, bytes(size))

    @rule(side=st.integers(0, 1), which=st.integers(0, 9))
    def end(self, side: int, which: int) -> None:
        id = self.channel_of(side, which)
        if id is not None:
            self.engines[side].flow_control.end(id)
            self.ended[side].add(id)

    @rule(side=st.integers(0, 1), which=st.integers(0, 9))
    def consume(self, side: int, which: int) -> None:
        id = self.channel_of(side, which)
        if id is not None and self.held[side][id]:
            self.engines[side].flow_control.consume(id, self.held[side][id].pop(0))

    @rule(side=st.integers(0, 1), which=st.integers(0, 9), good=st.booleans())
    def answer(self, side: int, which: int, good: bool) -> None:
        if self.handling[side]:
            ids = list(self.handling[side])
            id = ids[which % len(ids)]
            text = self.handling[side].pop(id)
            self.held[side].pop(id, None)
            if good:
                self.engines[side].answer(id, [b"re: " + text])
            else:
                self.engines[side].fail(id, "bad", text[:100].hex())  # a longer message would be cut off

    @rule(side=st.integers(0, 1))
    def send(self, side: int) -> None:
        self.wires[side] += self.engines[side].take(self.now)
        assert self.engines[side].has_more == self.engines[side].has_queued

    @rule()
    def wait(self) -> None:
        self.now += 1

    @rule(side=st.integers(0, 1))
    def ping(self, side: int) -> None:
        self.engines[side].ping()

    @rule(side=st.integers(0, 1), often=st.sampled_from([False, False, False, True]))
    def drain(self, side: int, often: bool) -> None:
        if often:  # else no machine would go far
            self.engines[side].drain()
            self.has_drained[side] = True

    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 7, 60, 1000, 10**6]))
    def deliver(self, side: int, size: int) -> None:
        if not self.is_cut[side]:
            data = bytes(self.wires[side][:size])
            del self.wires[side][:size]
            for event in receive(self.engines[1 - side], data):
                self.check_event(1 - side, event)

    def check_event(self, side: int, event: object) -> None:
        match event:
            case Item(id, size, [field]):
                if id not in self.held[side]:
                    assert id % 2 != side, "of a cancelled channel nothing is told"
                    return
                assert self.items[1 - side][id].pop(0) == field
                assert id not in self.end_told[side]
                self.held[side][id].append(size)
            case End(id):
                assert id not in self.end_told[side]
                assert id in self.ended[1 - side]
                assert id not in self.held[side] or not self.items[1 - side][id]
                self.end_told[side].add(id)
            case Pong():
                pass
            case Request(id, timeout, [text], has_channel, _, _):
                assert has_channel == (id in self.items[side])
                if has_channel:
                    self.held[side][id] = []
                    self.engines[side].flow_control.accept(id)
                assert timeout == self.timeouts[1 - side].get(id, timeout)
                assert id not in self.seen[1 - side]
                assert self.waiting[1 - side].get(id, text) == text
                self.seen[1 - side].add(id)
                self.handling[side][id] = text
            case Bye(ids):
                assert self.has_drained[1 - side]
                for id in ids:
                    assert id not in self.seen[side]
                    del self.waiting[side][id]
                    self.held[side].pop(id, None)
            case Cancel(id):
                assert id in self.cancelled[1 - side]
                self.engines[side].drop_items(id)
            case Answer(id, [text]):
                assert text == b"re: " + self.waiting[side].pop(id)
                self.on_answered(side, id)
            case Failure(id, "bad", text, b""):
                assert bytes.fromhex(text) == self.waiting[side].pop(id)[:100]
                self.on_answered(side, id)
            case _:
                raise AssertionError(event)

    def on_answered(self, side: int, id: int) -> None:
        if self.held[side].pop(id, None) is not None:
            assert self.items[1 - side][id] == [], "all items come before the answer"

    @precondition(lambda self: not any(self.is_cut))
    @rule(side=st.integers(0, 1))
    def cut(self, side: int) -> None:
        self.is_cut[side] = True

    @invariant()
    def nothing_is_over_its_bound(self) -> None:
        for side in (0, 1):
            assert max(self.engines[side].local._used) <= self.slots[1 - side]
            assert max(self.engines[side].remote._used) <= self.slots[side]
            assert sum(self.engines[side].local._used) == self.engines[side].asked
            assert self.engines[side]._interpreter.reassembler.held <= 4 * 2**20
            assert len(self.engines[side]._outbox._in_pieces) <= 4
            for sizes in self.held[side].values():
                assert sum(sizes) < WINDOW + 200_005
            for flow in self.engines[side].flow_control.credits.values():
                assert 0 <= flow.queued < MAX_QUEUED + 200_005
            for id in self.seen[side]:
                assert not self.engines[side].is_unsent(id)

    def teardown(self) -> None:
        if not hasattr(self, "engines") or any(self.is_cut):
            return
        while self.step():
            pass
        for side in (0, 1):
            assert self.waiting[side] == {}
            engine = self.engines[side]
            left = (
                engine.local.states,
                engine.remote.answer_sizes,
                engine.local._backlogs,
                engine.local._classes,
                engine.remote._classes,
            )
            assert not any(left), left
            assert not len(engine.flow_control)
            outbox = engine._outbox
            assert not any(
                (outbox._control, outbox._small, outbox._big, outbox._in_pieces, outbox._blocked_by_order)
            )
            assert engine._interpreter.reassembler.held == 0
            assert engine.is_drained == self.has_drained[side]

    def step(self) -> bool:
        """Answer, send and deliver all there is. Returns whether there was anything."""
        busy = False
        for side in (0, 1):
            while self.handling[side]:
                self.answer(side, 0, good=True)
            self.send(side)
            busy = busy or bool(self.wires[side])
            self.deliver(side, len(self.wires[side]))
        return busy


def test_two_engines_never_disagree_and_leak_nothing() -> None:
    run_state_machine_as_test(
        TwoEngines, settings=settings(max_examples=50, stateful_step_count=60, deadline=None)
    )
