"""Connections that do not open: cuts, faults, wrong records, silence."""

from __future__ import annotations

import math
import ssl
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

from bokbok_trio import AuthenticationError, ConnectionRefused, HandshakeError, Key, Settings
from bokbok_trio._protocol.packets import encode_packet
from bokbok_trio._stream.handshake_io import MAX_PACKET_SIZE, NothingCame
from bokbok_trio._stream.secretbox import SecretboxStream
from tests.support.establishing import (
    TIMEOUT,
    K,
    Mode,
    Side,
    Wire,
    as_client,
    as_server,
    as_side,
    end_of,
    enter_as_client,
    enter_as_server,
    in_both_modes,
    make_hello,
    make_wires,
    meet,
    on_both_sides,
    open_sockets,
)

pytestmark = pytest.mark.usefixtures("fixed_grease")


@on_both_sides
async def test_tls_that_is_cut_is_told_of_with_its_cause(side: Side, autojump_clock: MockClock) -> None:
    """Trio's exceptions of TLS have no text."""
    ours, theirs = memory_stream_pair()
    stream = trio.SSLStream(ours, ssl.create_default_context(), server_hostname="x", server_side=False)
    await theirs.send_all(b"no TLS at all")
    error = (await end_of(stream, as_side(side, stream, "plain"))).error
    assert not isinstance(error, NothingCame)
    assert "the connection broke during the handshake: BrokenResourceError: [SSL" in str(error)


@in_both_modes
@on_both_sides
async def test_the_end_at_any_byte_is_an_error_and_no_hang(
    mode: Mode, side: Side, autojump_clock: MockClock
) -> None:
    wires = make_wires()
    await meet(wires, mode)
    total = sum(map(len, wires[side == "server"].sent))
    for cut in range(total):
        client, server = await meet(make_wires(**{side: {"cut": cut}}), mode)
        told = server if side == "client" else client
        assert not isinstance(told.error, AuthenticationError | ConnectionRefused)
        assert told.seconds == 0


@in_both_modes
@on_both_sides
async def test_a_transport_that_breaks_at_any_call_is_an_error(
    mode: Mode, side: Side, autojump_clock: MockClock
) -> None:
    wires = make_wires()
    await meet(wires, mode)
    calls = wires[side == "server"].calls
    assert calls >= 4
    for call in range(calls):
        client, server = await meet(make_wires(**{side: {"break_at": call}}), mode)
        told = client if side == "client" else server
        assert "told to break" in str(told.error)
        assert isinstance(told.error.__cause__, trio.BrokenResourceError)
        assert told.seconds == 0


@pytest.mark.parametrize(("client_mode", "server_mode"), [("sealed", "plain"), ("plain", "sealed")])
async def test_sealed_and_plain_do_not_meet(
    client_mode: Mode, server_mode: Mode, autojump_clock: MockClock
) -> None:
    wires = make_wires()
    user_key = {"myuser": K} if server_mode == "sealed" else None
    client, server = await meet(wires, client_mode, server={"user_key": user_key})
    assert "may be plain" in str(server.error) or "may be sealed" in str(server.error)
    assert "check whether the server expects a key" in str(client.error)
    assert wires[1].sent == []
    assert [len(sent) for sent in wires[0].sent] == [78 if client_mode == "sealed" else 45]


async def test_sealed_and_plain_do_not_meet_over_sockets() -> None:
    """Where the server closes with something unread, the system tells the client that it broke."""
    async with open_sockets() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(end_of, theirs, as_server(theirs, "sealed"))
        client = await end_of(ours, as_client(ours, "plain"))
        assert isinstance(client.error, HandshakeError)
        assert "check whether the server expects a key" in str(client.error)


@in_both_modes
async def test_a_client_that_meets_itself_is_told(mode: Mode, autojump_clock: MockClock) -> None:
    wire, mirror = make_wires()
    async with trio.open_nursery() as nursery:

        async def reflect() -> None:
            await mirror.send_all(await mirror.receive_some(1000))

        nursery.start_soon(reflect)
        assert "our own hello came back" in str((await end_of(wire, as_client(wire, mode))).error)
    assert len(wire.sent) == 1


@in_both_modes
async def test_a_server_answers_nothing_but_a_whole_right_hello(
    mode: Mode, autojump_clock: MockClock
) -> None:
    right = make_hello("server", mode)
    low_order = make_hello("server", "sealed")[:-32] + bytes(32)
    for stranger in (b"GET / HTTP/1.1\r\n\r\n", right[:-1], b"bokbok1\n" + bytes(100), low_order):
        client, server = make_wires()
        await client.send_all(stranger)
        await client.transport.send_eof()
        assert isinstance((await end_of(server, as_server(server, mode))).result, HandshakeError)
        assert server.sent == []


Wrong = Callable[[SecretboxStream, bytes], Awaitable[None]]


async def in_two_records(stream: SecretboxStream, packet: bytes) -> None:
    await stream.send_all(packet[:30])
    await stream.send_all(packet[30:])


async def under_another_key(stream: SecretboxStream, packet: bytes) -> None:
    stream.rekey(send_key=K.raw, receive_key=K.raw)
    await stream.send_all(packet)


WRONG_RECORDS: dict[str, Wrong] = {
    "two packets": lambda stream, packet: stream.send_all(packet * 2),
    "a packet and a half": lambda stream, packet: stream.send_all(packet + packet[:30]),
    "half a packet": lambda stream, packet: stream.send_all(packet[:30]),
    "a packet in two records": in_two_records,
    "an end record": lambda stream, _packet: stream.send_eof(),
    "an oversized record": lambda stream, _packet: stream.send_all(bytes(MAX_PACKET_SIZE + 1)),
    "an oversized record with a packet": lambda stream, packet: stream.send_all(packet + bytes(5000)),
    "an oversized packet": lambda stream, _packet: stream.send_all(encode_packet(bytes(9999))[:4000]),
    "another packet": lambda stream, _packet: stream.send_all(encode_packet(b"ping")),
    "a record under another key": under_another_key,
}
wrong_records = pytest.mark.parametrize("wrong", WRONG_RECORDS.values(), ids=WRONG_RECORDS.keys())


@wrong_records
@on_both_sides
async def test_open_and_accepted_are_one_record_with_one_packet(
    side: Side, wrong: Wrong, autojump_clock: MockClock
) -> None:
    wires = make_wires()
    ours, theirs = wires if side == "client" else wires[::-1]
    enter = enter_as_server if side == "client" else enter_as_client
    asked_admission = False

    def admit(_: str | None) -> None:
        nonlocal asked_admission
        asked_admission = True

    async def misbehave() -> None:
        await wrong(*await enter(theirs))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(misbehave)
        options = {"admit": admit} if side == "server" else {}
        ending = await end_of(ours, as_side(side, ours, "sealed", **options))
    assert not isinstance(ending.error, AuthenticationError | ConnectionRefused)
    assert ending.seconds == 0
    assert not asked_admission
    assert len(ours.sent) == (2 if side == "client" else 1)


@pytest.mark.parametrize(
    ("size", "told"),
    [(MAX_PACKET_SIZE, "not exactly one packet"), (MAX_PACKET_SIZE + 1, "a record of 4113 bytes")],
)
@on_both_sides
async def test_an_early_record_is_bounded(
    side: Side, size: int, told: str, autojump_clock: MockClock
) -> None:
    wires = make_wires()
    ours, theirs = wires if side == "client" else wires[::-1]

    async def misbehave() -> None:
        stream, _ = await (enter_as_server if side == "client" else enter_as_client)(theirs)
        await stream.send_all(bytes(size))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(misbehave)
        ending = await end_of(ours, as_side(side, ours, "sealed"))
    assert told in str(ending.error)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (MAX_PACKET_SIZE, "4091 bytes after the last field"),
        (MAX_PACKET_SIZE + 1, "packet of 4097 bytes"),
        (0, "count"),
    ],
)
@on_both_sides
async def test_a_plain_packet_is_bounded_by_its_length(
    side: Side, size: int, told: str, autojump_clock: MockClock
) -> None:
    wires = make_wires()
    ours, theirs = wires if side == "client" else wires[::-1]
    hello = make_hello(side, "plain")
    await theirs.send_all(hello + size.to_bytes(4, "big") + b"\1" + bytes(10_000))
    ending = await end_of(ours, as_side(side, ours, "plain"))
    with pytest.raises(HandshakeError, match=told):
        raise ending.error
    taken = sum(map(len, ours.received)) - len(hello)
    assert taken == (4 if size > MAX_PACKET_SIZE else 4 + size)


@pytest.mark.parametrize(
    ("mode", "call"), [("sealed", n) for n in range(4)] + [("plain", n) for n in range(5)]
)
@on_both_sides
async def test_a_peer_that_stalls_at_any_call_is_given_the_timeout(
    side: Side, mode: Mode, call: int, autojump_clock: MockClock
) -> None:
    left, right = lockstep_stream_pair()
    ours, theirs = Wire(left), Wire(right, stall_at=call)
    other: Side = "server" if side == "client" else "client"
    patient, hasty = Settings(handshake_timeout=math.inf), Settings(handshake_timeout=TIMEOUT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_of, theirs, as_side(other, theirs, mode, settings=patient))
        ending = await end_of(ours, as_side(side, ours, mode, settings=hasty))
        nursery.cancel_scope.cancel()
    assert "not done within 7 seconds" in str(ending.error)
    assert ending.seconds == pytest.approx(TIMEOUT, abs=1e-6)


@in_both_modes
@on_both_sides
async def test_a_trickle_does_not_lengthen_the_timeout(
    side: Side, mode: Mode, autojump_clock: MockClock
) -> None:
    wires = make_wires()
    ours, theirs = wires if side == "client" else wires[::-1]

    async def trickle() -> None:
        hello = make_hello(side, mode)
        for byte in hello:
            await theirs.transport.send_all(bytes((byte,)))
            await trio.sleep(0.9)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        ending = await end_of(ours, as_side(side, ours, mode, settings=Settings(handshake_timeout=TIMEOUT)))
        nursery.cancel_scope.cancel()
    assert ending.seconds == pytest.approx(TIMEOUT, abs=1e-6)
    assert sum(map(len, ours.received)) == 8


async def test_a_look_up_is_within_the_timeout(autojump_clock: MockClock) -> None:
    async def user_key(_user: str) -> Key:
        await trio.sleep_forever()
        raise AssertionError

    options = {"user_key": user_key, "settings": Settings(handshake_timeout=TIMEOUT)}
    client, server = await meet(make_wires(), server=options)
    assert "not done within 7 seconds" in str(server.error)
    assert server.seconds == client.seconds == pytest.approx(TIMEOUT, abs=1e-6)
    assert not isinstance(client.error, AuthenticationError)


@in_both_modes
@on_both_sides
async def test_cancellation_from_outside_stays_cancellation(
    side: Side, mode: Mode, autojump_clock: MockClock
) -> None:
    ours, _theirs = make_wires()
    with trio.move_on_after(3) as scope:
        await as_side(side, ours, mode)
    assert scope.cancelled_caught
