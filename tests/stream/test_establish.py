from __future__ import annotations

import logging
import math
import os
import ssl
from collections import UserList
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

from bokbok_trio import (
    AuthenticationError,
    ConnectionRefused,
    HandshakeError,
    Key,
    PeerCredentials,
    Settings,
)
from bokbok_trio._keys import MAX_KEYS
from bokbok_trio._places import Places
from bokbok_trio._protocol import options
from bokbok_trio._protocol.handshake import ClientHandshake, ServerHandshake
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.packets import encode_packet
from bokbok_trio._stream.establish import (
    REFUSAL_DELAY,
    Established,
    Refusal,
    establish_as_client,
    establish_as_server,
)
from bokbok_trio._stream.handshake_io import MAX_EARLY_RECORD_SIZE, MAX_PACKET_SIZE, NothingCame
from bokbok_trio._stream.records import HEADER_SIZE, MAX_PLAINTEXT_SIZE
from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio._trio_util import MAX_CAUSES, describe_error
from tests.support.inside import take_few

Mode = Literal["sealed", "plain"]
Side = Literal["client", "server"]

K = Key(bytes(range(32)))
OTHER = Key(bytes(range(100, 132)))
LIMITS = Limits(65536, 10)
TIMEOUT = 7.0
STRANGER_SIZE = 16 * 2**10

in_both_modes = pytest.mark.parametrize("mode", ["sealed", "plain"])
on_both_sides = pytest.mark.parametrize("side", ["client", "server"])


@pytest.fixture(autouse=True, scope="module")
def fixed_grease() -> Iterator[None]:
    """Give every handshake messages of the same lengths, as cuts and changed bits are counted in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "make_grease", lambda randomness: ("grease.0000", b"1234"))
        yield


@final
class Wire(trio.abc.Stream):
    """One end of a transport, that notes what crosses it and can be made to misbehave.

    `most` bytes are received at once. Of what is sent, `cut` bytes leave and then comes the end.
    The call `stall_at` (from 0, sends and receives alike) waits for ever, and `break_at` fails.
    `alter` is a bit of what is sent, counted from the first, that leaves changed.
    """

    def __init__(
        self,
        transport: trio.abc.HalfCloseableStream,
        *,
        most: int | None = None,
        cut: float = math.inf,
        stall_at: int | None = None,
        break_at: int | None = None,
        alter: int | None = None,
    ) -> None:
        self.transport = transport
        self.most = most
        self.cut = cut
        self.stall_at = stall_at
        self.break_at = break_at
        self.alter = alter
        self.calls = 0
        self.sent: list[bytes] = []
        self.asked: list[int | None] = []
        self.received: list[bytes] = []

    async def _count(self) -> None:
        call, self.calls = self.calls, self.calls + 1
        if call == self.stall_at:
            await trio.sleep_forever()
        if call == self.break_at:
            raise trio.BrokenResourceError("told to break")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._count()
        start = sum(map(len, self.sent))
        data = bytearray(data)
        if self.alter is not None and start <= self.alter // 8 < start + len(data):
            data[self.alter // 8 - start] ^= 1 << self.alter % 8
        self.sent.append(bytes(data))
        left = self.cut - start
        if left >= len(data):
            await self.transport.send_all(data)
        elif left >= 0:
            await self.transport.send_all(data[: int(left)])
            await self.transport.send_eof()

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await self._count()
        self.asked.append(max_bytes)
        assert max_bytes is not None
        data = bytes(await self.transport.receive_some(min(max_bytes, self.most or max_bytes)))
        self.received.append(data)
        return data

    async def aclose(self) -> None:
        await self.transport.aclose()


def make_wires(
    client: dict[str, Any] | None = None, server: dict[str, Any] | None = None
) -> tuple[Wire, Wire]:
    left, right = memory_stream_pair()
    return Wire(left, **client or {}), Wire(right, **server or {})


def as_client(
    wire: trio.abc.Stream, mode: Mode = "sealed", **options: Any
) -> Coroutine[Any, Any, Established]:
    who = {"user": "myuser", "key": K} if mode == "sealed" else {"user": None, "key": None}
    return establish_as_client(wire, **{**who, "service": "", "settings": Settings(), **options})


def log_failure(kind: str, message: str, *args: object, error: BaseException | None) -> None:
    logging.getLogger("bokbok_trio").error(message, *args, exc_info=error)


def as_server(
    wire: trio.abc.Stream, mode: Mode = "sealed", **options: Any
) -> Coroutine[Any, Any, Established]:
    user_key = {"myuser": K} if mode == "sealed" else None
    place = Places(1, 1).take(None)
    others = {
        "service": "",
        "settings": Settings(),
        "admit": lambda _: None,
        "place": place,
        "log": log_failure,
    }
    return establish_as_server(wire, **{"user_key": user_key, "log": log_failure, **others, **options})


def as_side(
    side: Side, wire: trio.abc.Stream, mode: Mode, **options: Any
) -> Coroutine[Any, Any, Established]:
    return (as_client if side == "client" else as_server)(wire, mode, **options)


@dataclass
class Ending:
    """How a side's part ended, and how long it took."""

    result: Established | HandshakeError
    seconds: float

    @property
    def opened(self) -> Established:
        assert isinstance(self.result, Established)
        return self.result

    @property
    def error(self) -> HandshakeError:
        assert isinstance(self.result, HandshakeError)
        return self.result


async def end_of(wire: trio.abc.Stream, opening: Awaitable[Established]) -> Ending:
    """Do a side's part as those do who call it: where it fails, the stream is closed."""
    start = trio.current_time()
    try:
        result: Established | HandshakeError = await opening
    except HandshakeError as exc:
        result = exc
    seconds = trio.current_time() - start
    if isinstance(result, HandshakeError):
        await trio.aclose_forcefully(wire)
    return Ending(result, seconds)


async def meet(
    wires: tuple[trio.abc.Stream, trio.abc.Stream],
    mode: Mode = "sealed",
    *,
    client: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
) -> tuple[Ending, Ending]:
    """Do both parts to the end."""
    endings: dict[Side, Ending] = {}

    async def play(side: Side, wire: trio.abc.Stream, options: dict[str, Any]) -> None:
        endings[side] = await end_of(wire, as_side(side, wire, mode, **options))

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(play, "client", wires[0], client or {})
            nursery.start_soon(play, "server", wires[1], server or {})
    return endings["client"], endings["server"]


async def receive_exactly(stream: trio.abc.Stream, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = await stream.receive_some(size - len(received))
        assert data
        received += data
    return received


def make_hello(side: Side, mode: Mode) -> bytes:
    """The hello that this side is to receive."""
    if side == "client":
        return ServerHandshake(sealed=mode == "sealed", service="", limits=LIMITS).hello
    user, key = ("myuser", K) if mode == "sealed" else (None, None)
    return ClientHandshake(user=user, key=key, service="", limits=LIMITS).hello


def over(wire: trio.abc.Stream, handshake: ClientHandshake | ServerHandshake) -> SecretboxStream:
    keys = handshake.channel_keys().for_side(handshake.side)
    return SecretboxStream(wire, send_key=keys["send_key"], receive_key=keys["receive_key"])


async def enter_as_client(wire: Wire, name: bytes = b"myuser") -> tuple[SecretboxStream, bytes]:
    """Go into the anonymous channel; the stream, and the `open` to send."""
    handshake = ClientHandshake(user="myuser", key=K, service="", limits=LIMITS)
    handshake._user = name
    await wire.send_all(handshake.hello)
    handshake.receive_hello(await receive_exactly(wire, handshake.hello_size))
    return over(wire, handshake), handshake.open()


async def enter_as_server(wire: Wire) -> tuple[SecretboxStream, bytes]:
    """Go into the anonymous channel and receive `open`; the stream, and the `accepted` to send."""
    handshake = ServerHandshake(sealed=True, service="", limits=LIMITS)
    handshake.receive_hello(await receive_exactly(wire, handshake.hello_size))
    await wire.send_all(handshake.hello)
    stream = over(wire, handshake)
    handshake.receive_open(await stream.receive_some())
    return stream, handshake.accept([K])


# ---- what went wrong, in words ----


def caused(error: BaseException, cause: BaseException | None, *, hidden: bool = False) -> BaseException:
    if hidden:
        error.__context__, error.__suppress_context__ = cause, True
    else:
        error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad"), "bad"),
        (ValueError(), "ValueError"),
        (caused(ValueError("bad"), KeyError("worse")), "bad"),
        (
            caused(trio.BrokenResourceError(), OSError("certificate verify failed")),
            "BrokenResourceError: certificate verify failed",
        ),
        (
            caused(trio.BrokenResourceError(), caused(ValueError(), KeyError())),
            "BrokenResourceError: ValueError: KeyError",
        ),
        (caused(ValueError(), OSError("elsewhere"), hidden=True), "ValueError"),
    ],
)
def test_an_error_is_never_described_by_nothing(error: BaseException, text: str) -> None:
    assert describe_error(error) == text


def test_causes_in_a_circle_and_contexts_are_described_too() -> None:
    error = ValueError()
    error.__cause__ = error
    assert describe_error(error) == ": ".join(["ValueError"] * MAX_CAUSES)
    with pytest.raises(trio.BrokenResourceError) as caught:
        try:
            raise OSError("reset")
        finally:
            raise trio.BrokenResourceError
    assert describe_error(caught.value) == "BrokenResourceError: reset"


@on_both_sides
async def test_tls_that_is_cut_is_told_of_with_its_cause(side: Side, autojump_clock: MockClock) -> None:
    """Trio's exceptions of TLS have no text."""
    ours, theirs = memory_stream_pair()
    stream = trio.SSLStream(ours, ssl.create_default_context(), server_hostname="x", server_side=False)
    await theirs.send_all(b"no TLS at all")
    error = (await end_of(stream, as_side(side, stream, "plain"))).error
    assert not isinstance(error, NothingCame)
    assert "the connection broke during the handshake: BrokenResourceError: [SSL" in str(error)


# ---- it opens ----


async def check_both_ways(client: Established, server: Established) -> None:
    sent = bytes(range(256)) * (MAX_PLAINTEXT_SIZE // 256 + 1)
    for sender, receiver in ((client, server), (server, client)):
        await sender.stream.send_all(sent)
        assert await receive_exactly(receiver.stream, len(sent)) == sent


@in_both_modes
@pytest.mark.parametrize("most", [None, 1])
async def test_a_connection_opens(mode: Mode, most: int | None, autojump_clock: MockClock) -> None:
    wires = make_wires({"most": most}, {"most": most})
    client, server = await meet(
        wires,
        mode,
        client={"settings": Settings(max_message_size=5000, max_requests=7)},
        server={"settings": Settings(max_message_size=6000, max_requests=8)},
    )
    user = "myuser" if mode == "sealed" else None
    for ending, peer_max_requests in ((client, 8), (server, 7)):
        assert ending.seconds == 0
        assert ending.opened.user == user
        assert ending.opened.key_fingerprint == (K.fingerprint if mode == "sealed" else None)
        assert ending.opened.max_message_size == 5000
        assert ending.opened.peer_max_requests == peer_max_requests
    for wire in wires:
        wire.most = None
    await check_both_ways(client.opened, server.opened)


async def key_of(user: str) -> Key:
    assert user == "myuser"
    return K


async def keys_of(_user: str) -> list[Key]:
    return [OTHER, K]


class MappingThatIsCalled(dict[str, Key]):
    async def __call__(self, user: str) -> Key:
        return await key_of(user)


@pytest.mark.parametrize(
    "user_key",
    [
        {"myuser": K},
        {"myuser": [OTHER, K]},
        {"myuser": (OTHER, K)},
        {"myuser": UserList([OTHER, K])},
        key_of,
        keys_of,
        MappingThatIsCalled(),
    ],
)
async def test_a_key_is_found_in_a_mapping_or_by_a_function(user_key: Any, autojump_clock: MockClock) -> None:
    client, server = await meet(make_wires(), server={"user_key": user_key})
    assert server.opened.user == "myuser"
    await check_both_ways(client.opened, server.opened)


async def test_keys_that_are_never_tried_are_told_of(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    await meet(make_wires(), server={"user_key": {"myuser": [K] * MAX_KEYS}})
    assert caplog.text == ""
    await meet(make_wires(), server={"user_key": {"myuser": [K] * (MAX_KEYS + 1)}})
    assert "found 17 keys, and only the first 16 are tried" in caplog.text


async def test_the_same_service_opens_and_another_looks_like_a_wrong_key(autojump_clock: MockClock) -> None:
    client, server = await meet(make_wires(), client={"service": "a"}, server={"service": "a"})
    await check_both_ways(client.opened, server.opened)
    endings = [
        await meet(make_wires(), client={"service": "a"}, server={"service": "b"}),
        await meet(make_wires(), client={"key": OTHER}),
    ]
    assert len({(str(client.error), client.seconds, str(server.error)) for client, server in endings}) == 1


@in_both_modes
async def test_each_side_is_told_the_options_of_the_other(mode: Mode, autojump_clock: MockClock) -> None:
    for ending in await meet(make_wires(), mode):
        assert ending.opened.peer_options == {"room": b"%d" % (40 * 2**20), "grease.0000": b"1234"}


# ---- nothing comes of it, at once ----


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
    "a record under another key": lambda stream, packet: SecretboxStream(
        stream._transport, send_key=K.raw, receive_key=K.raw
    ).send_all(packet),
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


# ---- time ----


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


# ---- refusals ----


async def raising(_user: str) -> Key:
    raise LookupError("the database is down")


async def none_of(_user: str) -> None:
    return None


async def finding_raw_bytes(_user: str) -> bytes:
    return K.raw


async def finding_mixed(_user: str) -> list[object]:
    return [K, K.raw]


def not_async(_user: str) -> Key:
    return K


REFUSED: dict[str, tuple[bytes, Any]] = {
    "unknown user": (b"myuser", {"other": K}),
    "unknown user, by function": (b"myuser", none_of),
    "no keys": (b"myuser", {"myuser": []}),
    "wrong key": (b"myuser", {"myuser": OTHER}),
    "wrong keys": (b"myuser", {"myuser": [OTHER] * 5}),
    "empty name": (b"", {"": K}),
    "name with control character": (b"a\0b", {"a\0b": K}),
    "name that is not UTF-8": (b"\xff", {"\xff": K}),
    "name that is too long": (b"x" * 256, {"x" * 256: K}),
    "look-up raises": (b"myuser", raising),
    "look-up is not async": (b"myuser", not_async),
    "look-up finds bytes": (b"myuser", finding_raw_bytes),
    "look-up finds bytes in a list": (b"myuser", finding_mixed),
    "mapping holds bytes": (b"myuser", {"myuser": K.raw}),
}


@dataclass(frozen=True)
class Seen:
    """All that a client can see of a refusal."""

    packet: bytes
    seconds: float
    sizes: tuple[int, ...]


def never_admit(_: str | None) -> None:
    raise AssertionError("an unauthenticated client was to be admitted")


async def be_refused(name: bytes, user_key: Any, *, late: float = 0) -> tuple[Seen, Ending]:
    client, server = make_wires()
    endings: list[Ending] = []

    async def serve() -> None:
        endings.append(await end_of(server, as_server(server, user_key=user_key, admit=never_admit)))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        stream, opening = await enter_as_client(client, name)
        await trio.sleep(late)
        await stream.send_all(opening)
        packet = await stream.receive_some()
        seconds = trio.current_time() - start
    return Seen(packet, round(seconds, 6), tuple(map(len, server.sent))), endings[0]


async def test_every_refusal_of_a_user_looks_the_same_and_comes_at_the_same_time(
    autojump_clock: MockClock,
) -> None:
    refusals = {why: await be_refused(name, user_key) for why, (name, user_key) in REFUSED.items()}
    for refusal, ending in refusals.values():
        assert refusal == refusals["unknown user"][0]
        assert type(ending.error) is AuthenticationError
    assert refusal.seconds == REFUSAL_DELAY
    assert refusal.packet == encode_packet(b"refused", b"authentication", b"authentication failed")


@pytest.mark.parametrize("late", [0.0, 0.45, 0.5, 1.0, 3.0])
async def test_a_late_open_does_not_show_how_long_a_look_up_took(
    late: float, autojump_clock: MockClock
) -> None:
    async def slow_where_known(user: str) -> Key | None:
        if user != "myuser":
            return None
        await trio.sleep(0.1)
        return OTHER

    known, _ = await be_refused(b"myuser", slow_where_known, late=late)
    unknown, _ = await be_refused(b"nobody", slow_where_known, late=late)
    unusable, _ = await be_refused(b"a\0b", slow_where_known, late=late)
    assert known == unknown == unusable
    assert known.seconds >= REFUSAL_DELAY


@pytest.mark.parametrize(
    ("why", "error"),
    [
        ("look-up raises", LookupError),
        ("look-up is not async", TypeError),
        ("look-up finds bytes", TypeError),
        ("look-up finds bytes in a list", TypeError),
        ("mapping holds bytes", TypeError),
    ],
)
async def test_a_failing_look_up_is_logged(
    why: str, error: type[Exception], caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    await be_refused(*REFUSED[why])
    (record,) = caplog.records
    assert record.name == "bokbok_trio"
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "looking up the key of user 'myuser' failed"
    assert record.exc_info is not None
    assert record.exc_info[0] is error
    assert repr(K.raw)[2:-1] not in caplog.text


@pytest.mark.parametrize("user_key", [raising, {"myuser": [OTHER] * (MAX_KEYS + 1)}], ids=["fails", "keys"])
async def test_what_is_wrong_with_a_look_up_is_logged_after_the_refusal(
    user_key: Any, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """Logging takes time, by which one could tell who is known."""
    client, server = make_wires()
    logged: list[int] = []

    async def note_when_sent() -> None:
        stream, opening = await enter_as_client(client, b"myuser")
        await stream.send_all(opening)
        await stream.receive_some()

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(len(server.sent))

    note = Note()
    logging.getLogger("bokbok_trio").addHandler(note)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(note_when_sent)
            await end_of(server, as_server(server, user_key=user_key))
    finally:
        logging.getLogger("bokbok_trio").removeHandler(note)
    assert logged == [2]  # hello, and the refusal


ONCE = ExceptionGroup("made once", [LookupError("the database is down")])


async def test_failing_look_ups_keep_no_tracebacks(autojump_clock: MockClock) -> None:
    """An exception that was made once and is raised each time would collect them."""

    async def raise_it_again(user: str) -> Key:
        raise ONCE

    for _ in range(3):
        await be_refused(b"myuser", raise_it_again)
    assert ONCE.__traceback__ is None
    assert ONCE.exceptions[0].__traceback__ is None


async def test_a_look_up_that_fails_while_it_is_cancelled_is_logged(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async def fail_late(user: str) -> Key:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise LookupError("the database is down")

    options = {"user_key": fail_late, "settings": Settings(handshake_timeout=TIMEOUT)}
    _client, server = await meet(make_wires(), server=options)
    assert "not done within 7 seconds" in str(server.error)
    assert caplog.text.count("looking up the key of user 'myuser' failed") == 1


async def test_no_look_up_is_asked_for_an_unusable_name(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    await be_refused(b"a\0b", raising)
    assert caplog.records == []


async def test_a_client_is_told_that_it_was_refused(autojump_clock: MockClock) -> None:
    client, server = await meet(make_wires(), client={"key": OTHER})
    assert type(client.error) is AuthenticationError
    assert str(client.error) == "the server refused: 'authentication failed'"
    assert str(server.error) == "user 'myuser' has no key that fits"
    assert client.seconds == REFUSAL_DELAY


async def test_a_wrong_key_is_known_for_one_though_the_client_hung_up(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def hang_up() -> None:
        stream, opening = await enter_as_client(client)
        await stream.send_all(opening)
        await trio.aclose_forcefully(client)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        ending = await end_of(server, as_server(server, user_key={"myuser": OTHER}))
    assert str(ending.error) == "user 'myuser' has no key that fits"


async def test_a_server_without_the_key_is_no_server(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def pretend() -> None:
        stream, _ = await enter_as_server(server)
        await stream.send_all(encode_packet(b"accepted", b"65536", b"10", b"\0", bytes(32)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pretend)
        ending = await end_of(client, as_client(client))
    assert type(ending.error) is AuthenticationError
    assert len(client.sent) == 2


@in_both_modes
@pytest.mark.parametrize("code", ["busy", "stopping"])
async def test_a_server_may_not_admit_a_client(
    mode: Mode, code: Literal["busy", "stopping"], autojump_clock: MockClock
) -> None:
    asked = 0

    def admit(user: str | None) -> Refusal:
        nonlocal asked
        asked += 1
        assert user == ("myuser" if mode == "sealed" else None)
        return Refusal(code, "told so", "for a reason")

    texts = []
    for ending in await meet(make_wires(), mode, server={"admit": admit}):
        assert isinstance(ending.error, ConnectionRefused)
        assert ending.error.code == code
        assert ending.seconds == 0
        texts.append(str(ending.error))
    assert asked == 1
    assert "told so" in texts[0]
    assert "for a reason" in texts[1]


@in_both_modes
async def test_what_admit_raises_comes_out_as_itself(mode: Mode, autojump_clock: MockClock) -> None:
    client, server = make_wires()

    def admit(_: str | None) -> None:
        raise ZeroDivisionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_of, client, as_client(client, mode))
        with pytest.raises(ZeroDivisionError):
            await as_server(server, mode, admit=admit)
        await trio.aclose_forcefully(server)


# ---- over sockets ----


@asynccontextmanager
async def open_sockets() -> AsyncGenerator[tuple[trio.SocketStream, trio.SocketStream]]:
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    async with ours, theirs:
        yield ours, theirs


@in_both_modes
@pytest.mark.parametrize("most", [0, 1, 20])
async def test_what_a_socket_does_not_take_at_once_follows(
    mode: Mode, most: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        take_few(patch, most)
        async with open_sockets() as sockets:
            client, server = await meet(sockets, mode)
            await check_both_ways(client.opened, server.opened)


@in_both_modes
async def test_a_message_in_pieces_is_read_no_further_than_its_end(
    mode: Mode, autojump_clock: MockClock
) -> None:
    """What follows `accepted` is for the connection, even where it is here already."""
    async with open_sockets() as (ours, theirs), trio.open_nursery() as nursery:
        handshake = ServerHandshake(sealed=mode == "sealed", service="", limits=LIMITS)

        async def serve() -> None:
            hello = await receive_exactly(theirs, handshake.hello_size)
            for start in range(0, len(handshake.hello), 7):
                await theirs.send_all(handshake.hello[start : start + 7])
                await trio.testing.wait_all_tasks_blocked()
            handshake.receive_hello(hello)
            if mode == "plain":
                handshake.receive_open(await theirs.receive_some())
                await theirs.send_all(handshake.accept([]) + b"more")
                return
            stream = over(theirs, handshake)
            handshake.receive_open(await stream.receive_some())
            accepted = stream._sealer.seal_all(handshake.accept([K]))
            assert handshake.final_keys is not None
            stream.rekey(**handshake.final_keys.for_side("server"))
            await theirs.send_all(accepted + stream._sealer.seal_all(b"more"))

        nursery.start_soon(serve)
        opened = await as_client(ours, mode)
        assert await opened.stream.receive_some() == b"more"


@in_both_modes
@on_both_sides
async def test_a_socket_that_is_broken_or_closed(side: Side, mode: Mode, autojump_clock: MockClock) -> None:
    async with open_sockets() as (ours, theirs):
        await theirs.aclose()
        error = (await end_of(ours, as_side(side, ours, mode))).error
        assert isinstance(error, NothingCame) == (side == "server")
        with pytest.raises(trio.ClosedResourceError):
            await as_side(side, ours, mode)


# ---- naming the peer ----

THIS_PROCESS = PeerCredentials(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid())


@in_both_modes
async def test_both_sides_know_who_is_at_the_other_end_of_a_unix_socket(
    mode: Mode, autojump_clock: MockClock
) -> None:
    async with open_sockets() as sockets:
        for ending in await meet(sockets, mode):
            assert ending.opened.peer_credentials == THIS_PROCESS
    for ending in await meet(make_wires(), mode):
        assert ending.opened.peer_credentials is None


async def test_peer_user_names_the_peer_for_the_server(autojump_clock: MockClock) -> None:
    asked: list[PeerCredentials] = []

    def name(credentials: PeerCredentials) -> str:
        asked.append(credentials)
        return "alïce"

    async with open_sockets() as sockets:
        client, server = await meet(sockets, "plain", server={"peer_user": name})
        assert server.opened.user == "alïce"
        assert client.opened.user is None
        assert server.opened.key_fingerprint is None
        assert asked == [THIS_PROCESS]


def name_badly(_credentials: PeerCredentials) -> str:
    raise LookupError("the database is down")


@pytest.mark.parametrize(
    ("peer_user", "error"),
    [
        (lambda _: None, None),
        (name_badly, LookupError),
        (lambda _: "", ValueError),
        (lambda _: "x" * 256, ValueError),
        (lambda _: "a\0b", ValueError),
        (lambda _: b"alice", TypeError),
        (lambda credentials: credentials.uid, TypeError),
        (lambda: "alice", TypeError),
    ],
)
async def test_whom_peer_user_does_not_name_is_refused_at_once(
    peer_user: Any,
    error: type[Exception] | None,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    async with open_sockets() as sockets:
        client, server = await meet(sockets, "plain", server={"peer_user": peer_user, "admit": never_admit})
    for ending in (client, server):
        assert type(ending.error) is AuthenticationError
        assert ending.seconds == 0
    assert str(client.error) == "the server refused: 'authentication failed'"
    assert str(server.error) == f"peer_user has no name for {THIS_PROCESS}"
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info is not None]
    assert logged == ([] if error is None else [error])
    assert caplog.text.count(f"naming the peer {THIS_PROCESS} failed") == len(logged) == len(caplog.records)


async def test_who_has_no_credentials_is_refused_unasked(autojump_clock: MockClock) -> None:
    def never_ask(credentials: PeerCredentials) -> str:
        raise AssertionError

    client, server = await meet(make_wires(), "plain", server={"peer_user": never_ask, "admit": never_admit})
    assert str(client.error) == "the server refused: 'authentication failed'"
    assert str(server.error) == "the system does not tell who the peer is, so peer_user was not asked"
    assert type(client.error) is type(server.error) is AuthenticationError


async def test_what_ends_the_program_is_no_refusal(autojump_clock: MockClock) -> None:
    def leave(credentials: PeerCredentials) -> str:
        raise SystemExit(3)

    async with open_sockets() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(end_of, ours, as_client(ours, "plain"))
        with pytest.raises(SystemExit):
            await as_server(theirs, "plain", peer_user=leave)
        await theirs.aclose()


# ---- what is read ----


@in_both_modes
async def test_reads_ask_for_no_more_than_may_come(mode: Mode, autojump_clock: MockClock) -> None:
    wires = make_wires({"most": 7}, {"most": 7})
    await meet(wires, mode)
    for wire in wires:
        received, hello = 0, 78 if mode == "sealed" else 45
        for asked, data in zip(wire.asked, wire.received, strict=True):
            assert asked is not None
            if received < hello:
                assert asked == hello - received
            elif mode == "sealed":
                assert asked <= HEADER_SIZE + MAX_EARLY_RECORD_SIZE
            else:
                assert asked <= 4 + MAX_PACKET_SIZE
            received += len(data)
        if mode == "plain":
            peer = wires[wire is wires[0]]
            assert received == sum(map(len, peer.sent))


@pytest.mark.parametrize("most", [None, 1000])
@pytest.mark.parametrize(
    ("mode", "greets", "after"),
    [
        ("sealed", False, b"\xff"),
        ("sealed", False, b"bokbok1\n"),
        ("sealed", True, b"\xff"),
        ("sealed", True, b"\x10\x10" + b"\0" * 4112),
        ("sealed", True, b"\x10\x11" + b"\0" * 4113),
        ("plain", False, b"\xff"),
        ("plain", True, b"\xff"),
        ("plain", True, b"\0\0\x10\0" + b"\0" * 4096),
    ],
)
async def test_a_stranger_who_floods_is_read_for_less_than_16_kib(
    *, mode: Mode, greets: bool, after: bytes, most: int | None, autojump_clock: MockClock
) -> None:
    client, server = make_wires(None, {"most": most})
    await client.send_all((make_hello("server", mode) if greets else b"") + after * (2**17 // len(after)))
    ending = await end_of(server, as_server(server, mode))
    assert type(ending.error) is HandshakeError
    assert ending.seconds == 0
    assert sum(map(len, server.received)) < STRANGER_SIZE


async def test_a_stranger_in_the_channel_is_read_for_less_than_16_kib(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def flood() -> None:
        stream, opening = await enter_as_client(client, b"nobody")
        await stream.send_all(opening)
        for _ in range(50):
            await stream.send_all(bytes(MAX_PACKET_SIZE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        ending = await end_of(server, as_server(server, admit=never_admit))
    assert type(ending.error) is AuthenticationError
    assert sum(map(len, server.received)) < STRANGER_SIZE


@in_both_modes
async def test_what_comes_together_with_accepted_is_kept(mode: Mode, autojump_clock: MockClock) -> None:
    wires = make_wires()
    client_wire, server_wire = wires

    class Late(trio.abc.Stream):
        """The client's end, that receives only when the server has nothing left to say."""

        send_all = client_wire.send_all
        wait_send_all_might_not_block = client_wire.wait_send_all_might_not_block
        aclose = client_wire.aclose

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.testing.wait_all_tasks_blocked()
            return await client_wire.receive_some(max_bytes)

    async def serve() -> None:
        opened = await as_server(server_wire, mode)
        await opened.stream.send_all(b"first")
        await opened.stream.send_all(b"second")
        await trio.testing.wait_all_tasks_blocked()
        assert await opened.stream.receive_some(100) == b"answer"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        opened = await as_client(Late(), mode)
        if mode == "sealed":
            assert client_wire.received[-1] == b"".join(server_wire.sent[1:])
        else:
            assert b"".join(client_wire.received) == b"".join(server_wire.sent[:2])
        assert await receive_exactly(opened.stream, 11) == b"firstsecond"
        await opened.stream.send_all(b"answer")


async def test_a_record_sent_before_the_proof_is_no_part_of_the_connection(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def hurry() -> None:
        stream, opening = await enter_as_client(client)
        await stream.send_all(opening)
        await stream.send_all(b"under the old key")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hurry)
        ending = await end_of(server, as_server(server))
    with pytest.raises(trio.BrokenResourceError):
        await ending.opened.stream.receive_some()


async def test_plain_bytes_after_open_are_kept(autojump_clock: MockClock) -> None:
    client, server = make_wires()
    handshake = ClientHandshake(user=None, key=None, service="", limits=LIMITS)
    await client.send_all(handshake.hello + handshake.open() + b"first")
    ending = await end_of(server, as_server(server, "plain"))
    assert await ending.opened.stream.receive_some(100) == b"first"


# ---- attacks on the wire ----


async def test_a_client_sends_nothing_after_open_before_the_proof(autojump_clock: MockClock) -> None:
    client, server = make_wires()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_of, client, as_client(client))
        await enter_as_server(server)
        await trio.testing.wait_all_tasks_blocked()
        assert [len(sent) for sent in client.sent] == [78, 2 + 16 + 512]
        nursery.cancel_scope.cancel()


async def crossing(name: str, user_key: Any = None) -> tuple[list[bytes], list[bytes]]:
    """What a listener sees of a client with that name, in each direction."""
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
