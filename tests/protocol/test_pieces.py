"""Big packets are sent in pieces that let others through."""

from __future__ import annotations

import math

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.events import Request
from bokbok_trio._protocol.pieces import MAX_IN_PIECES, Reassembler
from bokbok_trio._protocol.queued_packet import MAX_WHOLE_SIZE
from tests.support.engines import in_pieces, item_event, make, receive
from tests.support.helpers import packet
from tests.support.inside import held_in_pieces

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
    assert held_in_pieces(server) > 0
    client.cancel(0)
    client.request(["next"])
    sent = client.take(0)
    assert sent.startswith(packet(b"drop", b"0"))
    assert list(receive(server, sent)) == [Request(2, math.inf, [b"next"])]
    assert held_in_pieces(server) == 0


def test_a_big_answer_holds_its_slot_until_its_last_piece_leaves() -> None:
    server = make("server", max_requests=1, limit=2**20)
    list(receive(server, packet(b"req", b"0", b"", b"", b"", body=[])))
    server.answer(0, [bytes(2**17)])
    server.take(0)
    assert server.handling == 1
    server.take(0)
    assert server.handling == 0
    assert server.take(0) == b""


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


# ---- what else comes in pieces ----


def test_items_and_channels_may_come_in_pieces() -> None:
    client, server = make("client"), make("server")
    chan = packet(b"chan", b"0", b"", b"", b"", b"9", body=[b"x"])
    assert list(receive(server, in_pieces(chan[4:]))) == [Request(0, math.inf, [b"x"], has_channel=True)]
    client.open_channel([])
    client.take(0)
    assert list(receive(client, in_pieces(packet(b"item", b"0", body=[b"x"])[4:]))) == [item_event(0, b"x")]


# ---- the reassembler alone ----

PACKET_LIMIT = 2**20


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([(0, 0, b"")], "an empty piece"),
        ([(0, 5, b"x"), (0, 5, b"")], "an empty piece"),
        ([(0, PACKET_LIMIT, b"x")], f"a packet of {PACKET_LIMIT + 1} bytes"),
        ([(0, 10**17, b"x")], "a packet of 100000000000000001 bytes"),
        ([(0, 5, b"x"), (0, 5, b"x")], "a piece with 5 bytes to come after one with 5"),
        ([(0, 5, b"x"), (0, 0, b"x")], "a piece with 0 bytes to come after one with 5"),
        ([(0, 5, b"x"), (0, 0, b"123456")], "a piece with 0 bytes to come"),
        ([(n, 5, b"x") for n in range(MAX_IN_PIECES + 1)], "more than 4 packets in pieces"),
    ],
)
def test_pieces_that_break_the_rules(pieces: list[tuple[int, int, bytes]], error: str) -> None:
    receiver = Reassembler(PACKET_LIMIT)
    for piece in pieces[:-1]:
        assert receiver.add(*piece) is None
    held = receiver.held
    with pytest.raises(ProtocolError, match=error):
        receiver.add(*pieces[-1])
    assert receiver.held == held, "nothing of it was kept"


def test_the_limit_itself_is_allowed() -> None:
    receiver = Reassembler(5)
    assert receiver.add(0, 3, b"ab") is None
    assert bytes(receiver.add(0, 0, b"cde") or b"") == b"abcde"
    assert receiver.held == 0


def test_a_drop_of_what_is_not_there() -> None:
    with pytest.raises(ProtocolError, match="`drop` of packet 7, of which no piece has come"):
        Reassembler(5).drop(7)
