"""The engine and whole connections of the package, against the second implementation and the vectors."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Channel,
    ChannelHandler,
    Connection,
    ConnectionLost,
    Key,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    RequestError,
    RequestHandler,
    Settings,
    current_request,
    open_connection,
    open_server,
)
from bokbok_trio._protocol.events import Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from bokbok_trio._protocol.flow_control import WINDOW
from bokbok_trio._protocol.packets import PacketDecoder
from bokbok_trio._protocol.session import Session
from bokbok_trio.testing import MemoryListener

from ..support import second_implementation as second
from ..support.connection_vectors import SENT_BEFORE
from ..support.helpers import decode, echo
from .test_vectors import CONNECTION, OPEN_LIMITS, VECTORS, both_modes, named, packet_before

# ---- the engine, and the vectors ----


def receive(engine: Session, data: bytes) -> list[Event]:
    """Let the engine take some bytes that must be good."""
    events = engine.receive(data)
    if engine.error is not None:
        raise engine.error
    return events


def package_session(side: Literal["client", "server"] = "server") -> Session:
    size, count = OPEN_LIMITS
    return Session(side, max_message_size=size, max_requests=count, slots=count)


def as_context(encoded: bytes) -> dict[str, bytes]:
    return {name.decode(): value for name, value in second.context(encoded).items()}


@named(CONNECTION["good"])
def test_the_engine_takes_packets_of_a_connection(vector: dict[str, Any]) -> None:  # noqa: PLR0912  (one for each kind)
    packet, fields = bytes.fromhex(vector["packet"]), [bytes.fromhex(field) for field in vector["fields"]]
    server = package_session()
    for _ in range(2):
        server.request([b"ping", b"12345"])
    server.open_channel([])
    if fields == [b"bye-ok"]:
        server.drain()
    assert server.take(0.0)
    receive(server, packet_before(fields[0]))
    events = receive(server, packet)
    match fields:
        case [b"req" | b"chan", id, timeout, depth, context, *credit, body]:
            [request] = events
            assert request == Request(
                int(id),
                int(timeout) / 1e6 if timeout else math.inf,
                second.unpack_body(body),
                bool(credit),
                int(depth or b"0"),
                as_context(context),
            )
            if credit:
                assert server.flow_control.may_send(int(id)) is (credit != [b"0"])
        case [b"item", id, body]:
            assert events == [Item(int(id), len(body), second.unpack_body(body), body)]
        case [b"end", id]:
            assert events == [End(int(id))]
        case [b"ok", id, body]:
            assert events == [Answer(int(id), second.unpack_body(body))]
        case [b"err", id, code, message, details]:
            assert events == [Failure(int(id), code.decode(), message.decode(), details)]
        case [b"cancel", id]:
            assert events == [Cancel(int(id))]
        case [b"bye"]:
            assert events == [Bye([])]
        case [b"pong"]:
            assert events == [Pong()]
        case [b"abort", code, message]:
            assert events == [Abort(code.decode(), message.decode())]
        case _:
            assert events == []


def test_the_engine_sends_packets_as_in_the_vectors() -> None:
    """Each kind of packet, made by the calls that have it sent."""
    due = {vector["name"]: bytes.fromhex(vector["packet"]) for vector in CONNECTION["good"]}
    asker, answerer = package_session("client"), package_session("client")

    def sends(engine: Session, *names: str) -> None:
        assert engine.take(0.0) == b"".join(due[name] for name in names)

    asker.request(["ping", "12345"])
    sends(asker, "req")
    asker.request(["ping", "12345"], 1.5)
    sends(asker, "req with a timeout of 1.5 s")
    asker.cancel(0)
    sends(asker, "cancel")
    asker.open_channel(["log"], 1.5)
    sends(asker, "chan with a timeout of 1.5 s")
    asker.ping()
    sends(asker, "ping")
    asker.drain()
    sends(asker, "bye")
    asker.abort("`item` without credit")
    sends(asker, "abort")
    for kwargs, name in (
        ({"depth": 1}, "req of depth 1"),
        ({"depth": 15, "context": TRACE}, "req of depth 15, with a context"),
        ({"context": {"a" * 64: ""}}, "req with a context of one empty value"),
        ({"context": {"a": bytes(8192 - 10)}}, "req with the longest context"),
    ):
        engine = package_session("client")
        for _ in range(2):
            engine.cancel(engine.request([]))
        assert engine.take(0.0) == b""
        engine.request(second.unpack_body(second.unpack(due[name], 2**20)[-1]), **kwargs)
        sends(engine, name)
    receive(answerer, second.packet([b"req", b"1", b"", b"", b"", b"\0"]))
    answerer.answer(1, [b"pong", b"12345"])
    sends(answerer, "ok")
    for name in ("err", "err with details", "err with the longest details"):
        _, _, code, message, details = second.unpack(due[name], 2**20)
        receive(answerer, second.packet([b"req", b"3", b"", b"", b"", b"\0"]))
        answerer.fail(3, code.decode(), message.decode(), details)
        sends(answerer, name)
    receive(answerer, second.packet([b"chan", b"5", b"", b"", b"", b"262144", b"\0"]))
    answerer.flow_control.send(5, *answerer.flow_control.encode([b"line", b"12345"]))
    sends(answerer, "item")
    answerer.flow_control.grant(5, 1000)
    sends(answerer, "credit")
    answerer.flow_control.end(5)
    sends(answerer, "end")
    receive(answerer, due["ping"] + due["bye"])
    sends(answerer, "pong", "bye-ok")


TRACE = {"trace-id": b"4bf92f3577b34da6", "lang": "eo"}


@named(CONNECTION["bad"])
def test_the_engine_refuses_bad_packets_of_a_connection(vector: dict[str, Any]) -> None:
    server, packet = package_session(), bytes.fromhex(vector["packet"])
    assert server.receive(packet) == []
    assert isinstance(server.error, ProtocolError)
    server.abort(str(server.error))
    answer = server.take(0.0)
    if b"abort" in packet:  # which is never answered by another
        assert answer == b""
    else:
        kind, code, message = second.unpack(answer)
        assert (kind, code) == (b"abort", b"protocol")
        assert 0 < len(message) <= 256


def engine_of_a_sequence(has_bye: bool) -> Session:
    """The server to which a sequence is sent."""
    server = package_session()
    server.open_channel([])
    server.request([])
    if has_bye:
        server.drain()
    sent = second.Open(1, *OPEN_LIMITS)
    assert server.take(0.0) == b"".join(
        packet for fields in SENT_BEFORE[has_bye] for packet in sent.put(fields)
    )
    return server


def receive_sequence(server: Session, data: bytes) -> list[Event]:
    """Let that server take packets one after the other, and grant credit to the channels that it takes."""
    events = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        packet, data = data[:end], data[end:]
        for event in receive(server, packet):
            events.append(event)
            if isinstance(event, Request) and event.has_channel and (event.depth or not server.is_draining):
                server.flow_control.grant(event.id, CONNECTION["credit"])
    return events


@named(VECTORS["sequences"]["good"])
def test_the_engine_takes_sequences_of_packets(vector: dict[str, Any]) -> None:
    server = engine_of_a_sequence(vector["bye"])
    events = receive_sequence(server, bytes.fromhex("".join(vector["packets"])))
    for kind, name in ((Request, "requests"), (Item, "items")):
        found = [
            {"id": event.id, "fields": [field.hex() for field in event.fields]}
            for event in events
            if isinstance(event, kind)
        ]
        assert found == vector[name]
    assert server.take(0.0).hex() == vector["replies"]


@named(VECTORS["sequences"]["bad"])
def test_the_engine_refuses_bad_sequences_of_packets(vector: dict[str, Any]) -> None:
    server = engine_of_a_sequence(vector["bye"])
    *good, bad = vector["packets"]
    receive_sequence(server, bytes.fromhex("".join(good)))
    with pytest.raises(ProtocolError):
        receive_sequence(server, bytes.fromhex(bad))


def test_an_item_that_comes_with_its_channel_is_an_error_whatever_the_handler_does() -> None:
    server = package_session()
    chan = second.packet([b"chan", b"0", b"", b"", b"", b"0", b"\0"])
    [request] = server.receive(chan + second.packet([b"item", b"0", b"\0"]))
    assert isinstance(request, Request)
    assert isinstance(server.error, ProtocolError)


# ---- the engine, and the second implementation ----


def pump(package: Session, other: second.Open) -> list[list[bytes]]:
    """Take all that the package's side sends; what the second implementation is to answer."""
    decoder = PacketDecoder(second.MAX_WHOLE)
    taken: list[list[bytes] | None] = []
    while batch := package.take(0.0):
        taken += (other.take(second.packet(fields)) for fields in decode(decoder, batch))
    assert not decoder.buffered
    return [fields for fields in taken if fields is not None]


@pytest.mark.parametrize("size", [66_432, 66_433, 66_560, 66_561, 2**20 - 128])
def test_packets_about_as_long_as_may_be_whole(size: int) -> None:
    """And the longest that may be; both ways. `size` is that of the body."""
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    text = b"a" * (size - 5)
    package.request([text])
    [request] = pump(package, other)
    assert second.unpack_body(request[-1]) == [text]
    packets = other.put([b"ok", request[1], second.body([text])])
    assert (len(packets) > 1) is (len(second.body([b"ok", request[1], second.body([text])])) > 66_560)
    assert receive(package, b"".join(packets)) == [Answer(0, [text])]


@pytest.mark.parametrize("size", [0, 1, 8192 - 10])
def test_a_context_and_a_body_share_the_room(size: int) -> None:
    """Of the limit 128 bytes are kept, and the rest is for both."""
    package = Session("client", max_message_size=2**14, max_requests=1, slots=1)
    other = second.Open(1, 2**14, 1)
    context = {"a": bytes(size)}
    most = 2**14 - 128 - 5 - len(second.flat({b"a": bytes(size)}))
    with pytest.raises(MessageTooLarge):
        package.request([bytes(most + 1)], context=context)
    package.request([bytes(most)], 10.0**9, depth=15, context=context)
    [request] = pump(package, other)
    assert second.context(request[4]) == {b"a": bytes(size)}
    assert second.unpack_body(request[-1]) == [bytes(most)]


def test_only_requests_of_depth_0_are_taken_back_by_a_bye() -> None:
    package = Session("client", max_message_size=2**14, max_requests=1, slots=1)
    other = second.Open(1, 2**14, 1)
    asks = (package.request, package.open_channel)
    sent, waiting = ([[ask([], depth=depth) for ask in asks] for depth in (0, 1)] for _ in range(2))
    assert [int(fields[1]) for fields in pump(package, other)] == [id for ids in sent for id in ids]
    assert receive(package, second.packet([b"bye"])) == [Bye(waiting[0])]
    assert package.take(0.0) == second.BYE_OK
    for id in sent[1]:
        receive(package, b"".join(other.put([b"ok", b"%d" % id, second.body([])])))
    assert [int(fields[1]) for fields in pump(package, other)] == waiting[1]


def test_details_come_in_pieces_too() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    package.request([])
    pump(package, other)
    assert not other.put([b"err", b"0", b"code", b"text", bytes(16_384)])[1:]
    details = bytes(16_384)
    encoded = second.body([b"err", b"0", b"code", b"text", details])
    parts = [encoded[:9000], encoded[9000:]]
    for left, part in zip((len(parts[1]), 0), parts, strict=True):
        events = receive(package, second.packet([b"part", b"0", b"%d" % left, part]))
    assert events == [Failure(0, "code", "text", details)]


def test_the_second_implementation_reads_big_and_small_requests_together() -> None:
    package = Session("client", max_message_size=2**20, max_requests=20, slots=20)
    other = second.Open(1, 2**20, 20)
    texts = [bytes((i,)) * (300_000 if i % 2 else 300) for i in range(16)]
    for text in texts:
        package.request([text])
    requests = pump(package, other)
    assert sorted(second.unpack_body(request[-1])[0] for request in requests) == texts
    assert [len(request[-1]) > 300_000 for request in requests] == [False] * 8 + [True] * 8


def test_the_second_implementation_sees_that_a_request_was_dropped() -> None:
    package = Session("client", max_message_size=2**20, max_requests=2, slots=2)
    other = second.Open(1, 2**20, 2)
    big = package.request([b"a" * 300_000])
    for fields in decode(PacketDecoder(second.MAX_WHOLE), package.take(0.0)):
        assert other.take(second.packet(fields)) is None
    assert other.pieces
    package.cancel(big)
    package.request([b"small"])
    assert [fields[1] for fields in pump(package, other)] == [b"2"]
    assert not other.pieces


@pytest.mark.parametrize("how", ["cancel", "answer"])
def test_the_second_implementation_sees_that_an_item_was_dropped(how: str) -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    package.open_channel([])
    pump(package, other)
    receive(package, other.replies.pop())
    package.flow_control.send(0, *package.flow_control.encode([bytes(250_000)]))
    package.flow_control.end(0)
    for fields in decode(PacketDecoder(second.MAX_WHOLE), package.take(0.0)):
        assert other.take(second.packet(fields)) is None
    assert other.pieces
    if how == "cancel":
        package.cancel(0)
        assert pump(package, other) == [[b"cancel", b"0"]]
    else:
        [packet] = other.put([b"ok", b"0", second.body([])])
        assert receive(package, packet) == [Answer(0, [])]
        assert pump(package, other) == []
    assert not other.pieces


def test_both_count_the_credit_of_the_packages_items_alike() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1, 168)
    package.open_channel([])
    pump(package, other)
    receive(package, other.replies.pop())
    # An item takes up 69 bytes more than its field. After the last of each row nothing may start.
    for sizes, more in [([30, 0], 1), ([100_000], 100_068), ([], 70), ([0, 0], 0)]:
        for size in sizes:
            package.flow_control.send(0, *package.flow_control.encode([bytes(size)]))
            assert [len(fields[2]) for fields in pump(package, other)] == [size + 5]
        assert not package.flow_control.may_send(0)
        assert other.to_take[0] == package.flow_control.credits[0].send_credit <= 0
        receive(package, b"".join(other.put([b"credit", b"0", b"%d" % more])))
    assert other.to_take[0] == -68


def test_both_count_the_credit_of_the_second_implementations_items_alike() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    package.open_channel([])
    pump(package, other)
    for size in (0, 70_000, 250_000):
        assert other.to_send[0] == package.flow_control.credits[0].receive_credit > 0
        [event] = receive(package, b"".join(other.put([b"item", b"0", second.body([bytes(size)])])))
        assert event[:3] == (0, size + 5, [bytes(size)])
        package.flow_control.consume(0, size + 5)
        pump(package, other)
    receive(package, b"".join(other.put([b"item", b"0", second.body([bytes(WINDOW - 69)])])))
    assert other.to_send[0] == 0, "all was given back before"
    with pytest.raises(ProtocolError, match="without credit"):
        receive(package, second.packet([b"item", b"0", b"\0"]))


# ---- the second implementation and the package, connected ----


class Peer:
    """The second implementation on a stream, with a handshake and packets one after the other."""

    def __init__(self, stream: trio.abc.Stream, side: second.Client | second.Server) -> None:
        self.stream = stream
        self.side = side
        self.sealed = bool(side.ephemeral)
        self.plaintext = b""
        self.seen: list[bytes] = []
        self.open = second.Open(side.me, 4096, 1)

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self.stream.receive_some(size - len(data))
            assert more, "the end of the stream"
            data += more
        return data

    async def read_record(self) -> bytes:
        header = await self.read(2)
        return self.opener.open(header + await self.read(int.from_bytes(header, "big")))

    async def send(self, packet: bytes) -> None:
        if not self.sealed:
            await self.stream.send_all(packet)
            return
        for start in range(0, len(packet) or 1, 65_519):
            await self.stream.send_all(self.sealer.seal(packet[start : start + 65_519]))

    async def receive(self) -> bytes:
        """One packet, its length included."""

        async def read(size: int) -> bytes:
            if not self.sealed:
                return await self.read(size)
            while len(self.plaintext) < size:
                self.plaintext += await self.read_record()
            data, self.plaintext = self.plaintext[:size], self.plaintext[size:]
            return data

        length = await read(4)
        return length + await read(int.from_bytes(length, "big"))

    def use_keys(self, keys: bytes) -> None:
        if self.sealed:
            own, other = (keys[:32], keys[32:]) if self.side.me == 0 else (keys[32:], keys[:32])
            self.sealer, self.opener = second.Records(own), second.Records(other)

    async def shake_hands(self) -> None:
        side = self.side
        if isinstance(side, second.Client):
            await self.stream.send_all(side.own_hello)
        side.take_hello(await self.read(len(side.own_hello)))
        self.use_keys(side.hs)
        if isinstance(side, second.Client):
            await self.send(side.open(bytes(range(32))))
            side.take_reply(await self.receive())
        else:
            await self.stream.send_all(side.own_hello)
            await self.send(side.take_open(await self.receive()))
        self.use_keys(side.fk)
        sizes = int(side.own_limits[0]), side.peer_limits[0]
        self.open = second.Open(side.me, min(sizes), int(side.own_limits[1]))

    async def put(self, *fields: bytes) -> None:
        """Send a packet, in pieces if it must be."""
        for packet in self.open.put(list(fields)):
            await self.send(packet)

    async def take(self) -> list[bytes]:
        """The next packet that is to be answered, or an answer; all others are answered meanwhile."""
        while True:
            packet = await self.receive()
            self.seen.append(second.unpack_body(packet[4:])[0])
            fields = self.open.take(packet)
            await self.reply()
            if fields is not None:
                return fields

    async def reply(self) -> None:
        replies, self.open.replies = self.open.replies, []
        for packet in replies:
            await self.send(packet)

    async def take_word(self, *fields: bytes) -> None:
        """Take a packet of these fields, which says nothing to the user."""
        packet = await self.receive()
        assert second.unpack(packet) == list(fields)
        assert self.open.take(packet) is None
        await self.reply()

    async def talk(self, timeout: bytes) -> None:
        """Make a request, answer the one that its handler makes, and get the answer."""
        own, other = self.ids
        await self.put(b"req", own, b"60000000", b"", b"", second.body([b"double", b"ab"]))
        assert await self.take() == [b"req", other, timeout, b"1", b"", second.body([b"again?", b"ab"])]
        await self.put(b"ok", other, second.body([b"yes"]))
        assert await self.take() == [b"ok", own, second.body([b"abab", b"yes"])]

    async def take_nothing(self) -> None:
        """See that the other side waits for this one."""
        with trio.move_on_after(1) as scope:
            await self.take()
        assert scope.cancelled_caught

    @property
    def ids(self) -> tuple[bytes, bytes]:
        """Those of the first requests, its own and the other side's."""
        return (b"0", b"1") if self.side.me == 0 else (b"1", b"0")

    async def expect_end(self) -> None:
        if self.sealed:
            assert await self.read_record() == b""
        assert await self.stream.receive_some() == b""

    async def end(self) -> None:
        if self.sealed:
            await self.send(b"")
        await self.stream.aclose()


async def double(connection: Connection, request: list[bytes]) -> list[bytes]:
    tag, text = request
    assert tag == b"double"
    [answer] = await connection.request([b"again?", text])
    return [text * 2, answer]


SECRET = bytes(range(100, 132))
KEY = Key(bytes(range(200, 232)))


@both_modes
async def test_the_second_implementation_as_client(mode: str, autojump_clock: trio.testing.MockClock) -> None:
    sealed = mode == "sealed"
    key = KEY.raw if sealed else b""
    client = second.Client(b"zo" if sealed else b"", key, b"maps" if sealed else b"", (4096, 1), SECRET)
    listener = MemoryListener()
    settings = Settings(max_message_size=5000, max_requests=2)
    lost = []

    async def on_close(connection: Connection) -> None:
        with pytest.raises(ConnectionLost, match="the peer closed the connection") as caught:
            await connection.request([])
        lost.append((connection.user, connection.encrypted, caught.value.may_have_run))

    async with open_server(
        [listener],
        double,
        user_key={"zo": KEY} if sealed else None,
        service="maps" if sealed else "",
        close_handler=on_close,
        settings=settings,
    ):
        with trio.fail_after(5):
            peer = Peer(listener.connect(), client)
            await peer.shake_hands()
            assert client.peer_limits == (5000, 2)
            await peer.talk(b"60000000")
            await peer.end()
    assert lost == [("zo" if sealed else None, sealed, False)]


@both_modes
async def test_the_second_implementation_as_server(mode: str, autojump_clock: trio.testing.MockClock) -> None:
    sealed = mode == "sealed"
    keys = {b"zo": KEY.raw} if sealed else None
    server = second.Server(keys, b"maps" if sealed else b"", (4096, 1), SECRET)
    ours, theirs = trio.testing.memory_stream_pair()
    peer = Peer(theirs, server)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.shake_hands)
            async with open_connection(
                ours,
                user="zo" if sealed else None,
                key=KEY if sealed else None,
                service="maps" if sealed else "",
                request_handler=double,
                settings=Settings(max_message_size=5000, max_requests=2),
            ) as connection:
                assert connection.encrypted is sealed
                assert server.peer_limits == (5000, 2)
                await peer.talk(b"5000000")
        await peer.expect_end()


@asynccontextmanager
async def connected(
    role: str,
    handler: RequestHandler = echo,
    *,
    channel_handler: ChannelHandler | None = None,
    settings: Settings = Settings(max_message_size=2**20),  # noqa: B008
) -> AsyncGenerator[tuple[Connection, Peer]]:
    """The package, and the second implementation in that role, connected in mode sealed."""
    limits = (2**20, 5)
    accepted = []

    async def on_open(connection: Connection) -> None:
        accepted.append(connection)
        await trio.lowlevel.checkpoint()

    if role == "client":
        listener = MemoryListener()
        async with open_server(
            [listener],
            handler,
            channel_handler=channel_handler,
            user_key={"zo": KEY},
            open_handler=on_open,
            settings=settings,
        ):
            peer = Peer(listener.connect(), second.Client(b"zo", KEY.raw, b"", limits, SECRET))
            await peer.shake_hands()
            await trio.testing.wait_all_tasks_blocked()
            yield accepted[0], peer
        return
    ours, theirs = trio.testing.memory_stream_pair()
    peer = Peer(theirs, second.Server({b"zo": KEY.raw}, b"", limits, SECRET))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.shake_hands)
        async with open_connection(
            ours,
            user="zo",
            key=KEY,
            request_handler=handler,
            channel_handler=channel_handler,
            settings=settings,
        ) as connection:
            yield connection, peer


both_roles = pytest.mark.parametrize("role", ["client", "server"])


@both_roles
async def test_an_echo_of_300_kib(role: str, autojump_clock: trio.testing.MockClock) -> None:
    text = bytes(range(256)) * 1200
    async with connected(role) as (connection, peer):
        own, other = peer.ids
        with trio.fail_after(5):
            await peer.put(b"req", own, b"", b"", b"", second.body([text, b"1"]))
            assert await peer.take() == [b"ok", own, second.body([text, b"1"])]
        assert peer.seen == [b"part"] * len(peer.seen)
        assert len(peer.seen) >= 5

        async def answer() -> None:
            _, id, *_, body = await peer.take()
            assert id == other
            await peer.put(b"ok", id, body)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                assert await connection.request([text, b"2"]) == [text, b"2"]


@both_roles
async def test_a_deadline_is_seen_by_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role) as (connection, peer):
        _, id = peer.ids

        async def ask() -> None:
            with trio.move_on_after(1.5) as scope:
                await connection.request([b"too long"])
            assert scope.cancelled_caught
            assert await connection.request([b"for ever"]) == []

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            _, _, timeout, _, _, body = await peer.take()
            assert (timeout, second.unpack_body(body)) == (b"1500000", [b"too long"])
            # So near its own deadline the package waits for that, and its user sees it alone.
            await trio.sleep(1.46)
            await peer.put(b"err", id, b"timeout", b"", b"")
            _, id, timeout, _, _, body = await peer.take()
            assert (timeout, second.unpack_body(body)) == (b"", [b"for ever"])
            await peer.put(b"ok", id, second.body([]))
            assert trio.current_time() == 1.5


@both_roles
async def test_a_deadline_of_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async def sleep(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep_forever()

    async with connected(role, sleep) as (_, peer):
        own, _ = peer.ids
        await peer.put(b"req", own, b"2500000", b"", b"", second.body([]))
        assert (await peer.take())[:3] == [b"err", own, b"timeout"]
        assert trio.current_time() == 2.5


@both_roles
async def test_a_timeout_that_the_second_implementation_means_as_a_code(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Far from the deadline it can only be the handler's own."""
    async with connected(role) as (connection, peer):

        async def answer() -> None:
            _, id, *_ = await peer.take()
            await peer.put(b"err", id, b"timeout", b"of my own", b"")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with trio.fail_after(1.5), pytest.raises(RemoteError, match="of my own") as caught:
                await connection.request([])
            assert caught.value.code == "timeout"
        assert trio.current_time() == 0


@both_roles
async def test_depth_context_and_details_cross_both_ways(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        context = current_request().context
        with pytest.raises(RemoteError, match="too far") as caught:
            await connection.request([b"deeper"], context={"copied": context["trace-id"]})
        raise RequestError("no", code="no-way", details=caught.value.details * 2)

    context = second.flat({b"trace-id": b"\0\xff"})
    async with connected(role, handler) as (_, peer):
        own, other = peer.ids
        with trio.fail_after(5):
            await peer.put(b"req", own, b"", b"7", context, second.body([b"deep"]))
            copied = second.flat({b"copied": b"\0\xff"})
            assert await peer.take() == [b"req", other, b"", b"8", copied, second.body([b"deeper"])]
            await peer.put(b"err", other, b"too-far", b"too far", b"\1\2")
            assert await peer.take() == [b"err", own, b"no-way", b"no", b"\1\2\1\2"]


@both_roles
async def test_the_second_implementation_is_told_what_it_did_wrong(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role) as (connection, peer):
        with trio.fail_after(5):
            await peer.send(second.packet([b"hello"]))
            kind, code, message = await peer.take()
            assert (kind, code) == (b"abort", b"protocol")
            assert b"hello" in message
            await peer.expect_end()
            await connection.wait_closed()


@both_roles
async def test_an_abort_of_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role) as (connection, peer):
        with trio.fail_after(5):
            for packet in peer.open.abort(second.Bad("so many mistakes")):
                await peer.send(packet)
            await connection.wait_closed()
            with pytest.raises(ConnectionLost, match="so many mistakes"):
                await connection.request([])
            rest = b""
            while more := await peer.stream.receive_some():
                rest += more
            assert not rest or peer.opener.open(rest) == b"", "an abort is not answered by another"


@both_roles
async def test_pings_of_both_sides(role: str, autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(max_message_size=2**20, ping_after=3, ping_timeout=1)
    async with connected(role, settings=settings) as (connection, peer):
        with trio.move_on_after(10):
            await peer.take()
        assert peer.seen == [b"ping"] * 3
        assert not connection.closed
        await peer.put(b"ping")
        await peer.take_word(b"pong")
        await peer.take_word(b"ping")
        with trio.fail_after(5):
            await connection.wait_closed()  # as the peer is silent from here on
        assert trio.current_time() == 17


async def echo_items(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    async for item in channel:
        await channel.send(item)
    return request


@both_roles
async def test_a_channel_of_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Its credit goes to the very byte; one item of each side's travels in pieces."""
    small, large = second.body([b"a"]), second.body([bytes(range(256)) * 1200])
    async with connected(role, channel_handler=echo_items) as (_, peer):
        own, _ = peer.ids
        with trio.fail_after(9):
            await peer.put(b"chan", own, b"", b"", b"", b"1000", second.body([b"log"]))
            await peer.take_word(b"credit", own, b"262144")
            for item in (small, large):
                await peer.put(b"item", own, item)
                assert await peer.take() == [b"item", own, item]
            assert peer.open.to_send[int(own)] == WINDOW, "it gave back what was consumed"
            await peer.put(b"item", own, small)
            await peer.put(b"end", own)
            await peer.take_nothing()
            await peer.put(b"credit", own, b"%d" % (len(small) + len(large) + 128 - 1000))
            assert peer.open.to_take[int(own)] == 0
            await peer.take_nothing()
            await peer.put(b"credit", own, b"1")
            assert await peer.take() == [b"item", own, small]
            assert await peer.take() == [b"ok", own, second.body([b"log"])]


@both_roles
async def test_a_channel_to_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    received = []
    text = bytes(100_000)

    async def use(connection: Connection) -> None:
        async with connection.open_channel(["log"]) as channel:
            for _ in range(4):
                await channel.send([text])
            await channel.end()
            received.extend([item async for item in channel])
            received.append(await channel.answer())

    async with connected(role) as (connection, peer), trio.open_nursery() as nursery:
        _, other = peer.ids
        nursery.start_soon(use, connection)
        with trio.fail_after(9):
            assert await peer.take() == [b"chan", other, b"", b"", b"", b"262144", second.body([b"log"])]
            for _ in range(3):
                assert await peer.take() == [b"item", other, second.body([text])]
            await peer.take_nothing()
            await peer.put(b"credit", other, b"%d" % (3 * 100_069 - WINDOW))
            await peer.take_nothing()
            await peer.put(b"credit", other, b"1")
            assert await peer.take() == [b"item", other, second.body([text])]
            assert await peer.take() == [b"end", other]
            for item in ([b"small"], [bytes(200_000)], [b"after it"]):
                await peer.put(b"item", other, second.body(item))
            await peer.put(b"ok", other, second.body([b"done"]))
    assert received == [[b"small"], [bytes(200_000)], [b"after it"], [b"done"]]


@both_roles
async def test_what_crosses_the_end_of_a_channel(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """A cancel, the answer of the second implementation, and that of the package."""

    async def answer_at_once(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await trio.lowlevel.checkpoint()

    async with connected(role, channel_handler=answer_at_once) as (connection, peer):
        own, other = peer.ids
        following = b"%d" % (int(other) + 2)
        with trio.fail_after(5):
            async with connection.open_channel([]):
                assert (await peer.take())[:2] == [b"chan", other]
            assert await peer.take() == [b"cancel", other]
            for fields in ([b"item", b"\0"], [b"credit", b"1"], [b"end"], [b"err", b"cancelled", b"", b""]):
                await peer.put(fields[0], other, *fields[1:])

            async with connection.open_channel([]) as channel:
                assert (await peer.take())[:2] == [b"chan", following]
                await channel.send([b"crosses"])
                await channel.end()
                await trio.testing.wait_all_tasks_blocked()
                await peer.put(b"ok", following, second.body([]))
                await peer.take_word(b"item", following, second.body([b"crosses"]))
                await peer.take_word(b"end", following)
                assert await channel.answer() == []
            await peer.put(b"chan", own, b"", b"", b"", b"0", second.body([]))
            await peer.take_word(b"credit", own, b"262144")
            await trio.testing.wait_all_tasks_blocked()  # it has answered
            for fields in ([b"item", b"\0"], [b"credit", b"1"], [b"end"]):
                await peer.put(fields[0], own, *fields[1:])
            assert await peer.take() == [b"ok", own, second.body([])]
            await peer.put(b"ping")
            await peer.take_word(b"pong")
            assert not peer.open.to_send
            assert not peer.open.to_take


@both_roles
async def test_a_channel_that_the_second_implementation_cancels(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role, channel_handler=echo_items) as (_, peer):
        own, _ = peer.ids
        with trio.fail_after(5):
            await peer.put(b"chan", own, b"", b"", b"", b"9", second.body([]))
            await peer.take_word(b"credit", own, b"262144")
            await peer.put(b"cancel", own)
            await peer.put(b"credit", own, b"1")
            assert (await peer.take())[:3] == [b"err", own, b"cancelled"]


@both_roles
async def test_a_side_without_a_channel_handler(role: str, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(role) as (connection, peer):
        own, other = peer.ids
        with trio.fail_after(5):
            await peer.put(b"chan", own, b"", b"", b"", b"9", second.body([]))
            await peer.put(b"end", own)
            assert (await peer.take())[:3] == [b"err", own, b"no-channel"]
            with pytest.raises(RemoteError) as caught:
                async with connection.open_channel([]) as channel:
                    await peer.take()
                    await peer.put(b"err", other, b"no-channel", b"", b"")
                    await channel.answer()
            assert caught.value.code == "no-channel"


@both_roles
async def test_channels_go_on_while_both_drain(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """And one that crosses the `bye` does not begin."""
    async with connected(role, channel_handler=echo_items) as (connection, peer):
        own, other = peer.ids
        crossing = b"%d" % (int(own) + 2)
        with trio.fail_after(5):
            async with connection.open_channel([]) as channel:
                assert (await peer.take())[:2] == [b"chan", other]
                await peer.put(b"chan", own, b"", b"", b"", b"99", second.body([]))
                await peer.take_word(b"credit", own, b"262144")
                connection.drain()
                await peer.put(b"chan", crossing, b"", b"", b"", b"99", second.body([]))
                await peer.take_word(b"bye")  # and sends bye-ok
                assert (await peer.take())[:3] == [b"err", crossing, b"closing"]
                await peer.put(b"bye")
                await peer.take_word(b"bye-ok")
                await peer.put(b"item", own, second.body([b"a"]))
                assert await peer.take() == [b"item", own, second.body([b"a"])]
                await peer.put(b"item", other, second.body([b"b"]))
                assert await channel.receive() == [b"b"]
                await channel.send([b"c"])
                assert await peer.take() == [b"item", other, second.body([b"c"])]
                await peer.put(b"ok", other, second.body([]))
                assert await channel.answer() == []
            await peer.put(b"end", own)
            assert await peer.take() == [b"ok", own, second.body([])]
            await peer.expect_end()
            await connection.wait_closed()


class Slow:
    """A handler that asks back, and answers when it is told to."""

    def __init__(self) -> None:
        self.may_answer = trio.Event()

    async def __call__(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        await self.may_answer.wait()
        return [*request, *await connection.request([b"again?"])]


@both_roles
async def test_the_package_drains(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """With a request in flight that asks back, and one that crosses the `bye`."""
    slow = Slow()
    async with connected(role, slow) as (connection, peer):
        own, other = peer.ids
        crossing = b"%d" % (int(own) + 2)
        with trio.fail_after(5):
            await peer.put(b"req", own, b"", b"", b"", second.body([b"first"]))
            await trio.testing.wait_all_tasks_blocked()
            connection.drain()
            await trio.testing.wait_all_tasks_blocked()
            await peer.put(b"req", crossing, b"", b"", b"", second.body([b"second"]))
            await peer.take_word(b"bye")  # and sends bye-ok
            assert (await peer.take())[:3] == [b"err", crossing, b"closing"]
            slow.may_answer.set()
            assert await peer.take() == [b"req", other, b"", b"1", b"", second.body([b"again?"])]
            assert not connection.closed
            # To answer that, the peer needs another one, which is of depth 2, and so goes on too.
            nested = b"%d" % (int(own) + 4)
            await peer.put(b"req", nested, b"", b"2", b"", second.body([b"third"]))
            _, id, *fields = await peer.take()
            assert fields == [b"", b"3", b"", second.body([b"again?"])]
            await peer.put(b"ok", id, second.body([b"no"]))
            assert await peer.take() == [b"ok", nested, second.body([b"third", b"no"])]
            await peer.put(b"ok", other, second.body([b"yes"]))
            assert await peer.take() == [b"ok", own, second.body([b"first", b"yes"])]
            await peer.expect_end()
            await connection.wait_closed()


@both_roles
async def test_the_second_implementation_drains(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """With a request of the package's in flight, and one of its own."""
    slow = Slow()
    slow.may_answer.set()
    async with connected(role, slow) as (connection, peer):
        own, other = peer.ids
        answers = []

        async def ask() -> None:
            answers.append(await connection.request([b"a" * 100_000]))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                assert (await peer.take())[:2] == [b"req", other]
                await peer.put(b"bye")
                await peer.take_word(b"bye-ok")
                with pytest.raises(ConnectionLost, match="takes no new request") as caught:
                    await connection.request([b"too late"])
                assert not caught.value.may_have_run
                # A request that it makes itself still may need one back, which is of depth 1.
                await peer.put(b"req", own, b"", b"", b"", second.body([b"first"]))
                _, id, *fields = await peer.take()
                assert fields == [b"", b"1", b"", second.body([b"again?"])]
                await peer.put(b"ok", id, second.body([b"yes"]))
                assert await peer.take() == [b"ok", own, second.body([b"first", b"yes"])]
                assert not peer.open.is_drained()
                await peer.put(b"ok", other, second.body([b"yes"]))
            assert answers == [[b"yes"]]
            assert peer.open.is_drained()
            await peer.end()
            await connection.wait_closed()


@both_roles
async def test_both_drain(role: str, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(role) as (connection, peer):
        with trio.fail_after(5):
            await peer.put(b"bye")
            connection.drain()
            words = [second.unpack(await peer.receive()), second.unpack(await peer.receive())]
            assert words == [[b"bye"], [b"bye-ok"]]
            assert not connection.closed
            await peer.send(second.BYE_OK)
            await peer.expect_end()


async def test_the_second_implementation_as_client_with_another_key(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = second.Client(b"zo", bytes(32), b"", (4096, 1), SECRET)
    listener = MemoryListener()
    async with open_server([listener], user_key={"zo": KEY}):
        peer = Peer(listener.connect(), client)
        with trio.fail_after(5), pytest.raises(second.NotAuthentic, match="refused"):
            await peer.shake_hands()
        assert await peer.stream.receive_some() == b""
