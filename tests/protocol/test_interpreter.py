"""Packets that a peer may send, and packets that break the protocol."""

from __future__ import annotations

import math

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.events import Request
from bokbok_trio._protocol.flow_control import MAX_CREDIT
from bokbok_trio._protocol.interpreter import CROSSING, CROSSING_ITEMS, MAX_IGNORED
from tests.support.engines import LIMIT, in_pieces, make, receive, request_id
from tests.support.helpers import packet

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


# ---- a peer that lies about channels ----


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
