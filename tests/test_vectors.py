"""The vectors, the package, the second implementation and the texts in ``docs``, against each other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    AuthenticationError,
    Channel,
    ChannelHandler,
    Connection,
    ConnectionLost,
    HandshakeError,
    Key,
    ProtocolError,
    RemoteError,
    RequestHandler,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio._events import Answer, Bye, Cancel, End, Item, Request
from bokbok_trio._flow import WINDOW
from bokbok_trio._handshake import ClientHandshake, Limits, ServerHandshake
from bokbok_trio._keys import encode_user
from bokbok_trio._packets import PacketDecoder, decode_number
from bokbok_trio._secretbox_stream import SecretboxStream
from bokbok_trio._session import Session
from bokbok_trio.testing import MemoryListener

from . import second_implementation as second
from .helpers import decode, echo
from .make_vectors import PATH, dump, make, receive_sequence, server_of_a_sequence

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
VECTORS: dict[str, Any] = json.loads(PATH.read_text(encoding="ascii"))
SEALED = VECTORS["sealed"]
PLAIN = VECTORS["plain"]
HANDSHAKES: dict[str, Any] = {"sealed": SEALED, "plain": PLAIN}


def unhex(vector: Mapping[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """Run a test for each vector, with its name."""
    ids = [
        " ".join(str(vector[key]) for key in ("to", "mode", "name") if key in vector) for vector in vectors
    ]
    return pytest.mark.parametrize("vector", vectors, ids=ids)


both_modes = pytest.mark.parametrize("mode", ["sealed", "plain"])


# ---- the file ----


def test_the_vectors_are_those_that_the_package_makes() -> None:
    assert PATH.read_text(encoding="ascii") == dump(make()) + "\n"


def test_the_shared_secret_is_that_of_the_rfc() -> None:
    assert SEALED["ee"] == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


# ---- packets, numbers, user names ----


def package_decode(packet: bytes, limit: int) -> list[bytes]:
    decoder = PacketDecoder(limit)
    packets = decode(decoder, packet)
    assert len(packets) == 1
    assert not decoder.buffered
    return packets[0]


decoders = pytest.mark.parametrize(
    ("decode", "error"),
    [(package_decode, ProtocolError), (second.unpack, second.Bad)],
    ids=["package", "second"],
)
number_decoders = pytest.mark.parametrize(
    ("decode", "error"),
    [(decode_number, ProtocolError), (second.number, second.Bad)],
    ids=["package", "second"],
)


@decoders
@named(VECTORS["packets"]["good"])
def test_good_packets(
    vector: dict[str, Any], decode: Callable[[bytes, int], list[bytes]], error: type[Exception]
) -> None:
    fields = [bytes.fromhex(field) for field in vector["fields"]]
    packet = bytes.fromhex(vector["packet"])
    assert second.packet(fields) == packet
    assert decode(packet, len(packet) - 4) == fields
    with pytest.raises(error):
        decode(packet, len(packet) - 5)


@decoders
@named(VECTORS["packets"]["bad"])
def test_bad_packets(
    vector: dict[str, Any], decode: Callable[[bytes, int], list[bytes]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        decode(bytes.fromhex(vector["packet"]), vector["limit"])


@number_decoders
def test_numbers(decode: Callable[[bytes], int], error: type[Exception]) -> None:
    for vector in VECTORS["numbers"]["good"]:
        assert decode(bytes.fromhex(vector["field"])) == vector["number"]
    for field in VECTORS["numbers"]["bad"]:
        with pytest.raises(error):
            decode(bytes.fromhex(field))


def server_sees(user: bytes) -> str | None:
    """The user name that a server takes from an `open` with these bytes."""
    client = second.Client(user, bytes(32), b"", (4096, 1), bytes.fromhex(SEALED["client_secret"]))
    server = package_server("sealed", service="")
    server.receive_hello(client.own_hello)
    client.take_hello(server.hello)
    server.receive_open(client.open(bytes(32)))
    return server.user


def test_good_user_names() -> None:
    for vector in VECTORS["users"]["good"]:
        assert encode_user(vector["user"]).hex() == vector["field"]
        assert server_sees(bytes.fromhex(vector["field"])) == vector["user"]


@named(VECTORS["users"]["bad"])
def test_bad_user_names(vector: dict[str, Any]) -> None:
    assert server_sees(bytes.fromhex(vector["field"])) is None


def test_bad_user_names_that_are_text() -> None:
    texts = 0
    for vector in VECTORS["users"]["bad"]:
        try:
            user = bytes.fromhex(vector["field"]).decode()
        except UnicodeDecodeError:
            continue
        texts += 1
        with pytest.raises(ValueError, match="user name"):
            encode_user(user)
    assert texts == 6


# ---- the handshake ----


def package_client(mode: str) -> ClientHandshake:
    random = iter(unhex(SEALED, "client_secret", "session_key"))
    return ClientHandshake(
        user=SEALED["user"] if mode == "sealed" else None,
        key=Key(bytes.fromhex(SEALED["key"])) if mode == "sealed" else None,
        service=SEALED["service"] if mode == "sealed" else "",
        limits=Limits(*HANDSHAKES[mode]["client_limits"]),
        randomness=lambda _: next(random),
    )


def package_server(mode: str, service: str = SEALED["service"]) -> ServerHandshake:
    random = iter([bytes.fromhex(SEALED["server_secret"]), bytes(32)])
    return ServerHandshake(
        sealed=mode == "sealed",
        service=service if mode == "sealed" else "",
        limits=Limits(*HANDSHAKES[mode]["server_limits"]),
        randomness=lambda _: next(random),
    )


def second_client(mode: str) -> second.Client:
    key, secret = unhex(SEALED, "key", "client_secret")
    limits = tuple(HANDSHAKES[mode]["client_limits"])
    if mode == "plain":
        return second.Client(b"", b"", b"", limits, b"")
    return second.Client(SEALED["user"].encode(), key, SEALED["service"].encode(), limits, secret)


def second_server(mode: str) -> second.Server:
    key, secret = unhex(SEALED, "key", "server_secret")
    limits = tuple(HANDSHAKES[mode]["server_limits"])
    if mode == "plain":
        return second.Server(None, b"", limits, b"")
    return second.Server({SEALED["user"].encode(): key}, SEALED["service"].encode(), limits, secret)


SIZES = {"sealed": (78, 78, 512), "plain": (45, 45, None)}


@both_modes
def test_the_sizes_are_those_of_the_text(mode: str) -> None:
    client, server, open = unhex(HANDSHAKES[mode], "C", "S", "open")
    assert (len(client), len(server)) == SIZES[mode][:2]
    assert len(open) == (SIZES[mode][2] or len(open))


@both_modes
def test_the_package_takes_the_handshake(mode: str) -> None:
    vector = HANDSHAKES[mode]
    hello_c, hello_s, open, accepted = unhex(vector, "C", "S", "open", "accepted")
    client, server = package_client(mode), package_server(mode)
    assert (client.hello, server.hello) == (hello_c, hello_s)
    server.receive_hello(hello_c)
    client.receive_hello(hello_s)
    assert client.open() == open
    server.receive_open(open)
    assert server.user == vector.get("user")
    assert server.accept([Key(bytes.fromhex(SEALED["key"]))]) == accepted
    client.receive_reply(accepted)
    assert client.peer_limits == Limits(*vector["server_limits"])
    assert server.peer_limits == Limits(*vector["client_limits"])
    assert client.final_keys == server.final_keys


@both_modes
def test_the_second_implementation_takes_the_handshake(mode: str) -> None:
    vector = HANDSHAKES[mode]
    hello_c, hello_s, open, accepted, from_client, from_server = unhex(
        vector, "C", "S", "open", "accepted", "client_sends", "server_sends"
    )
    client, server = second_client(mode), second_server(mode)
    assert (client.own_hello, server.own_hello) == (hello_c, hello_s)
    server.take_hello(hello_c)
    client.take_hello(hello_s)
    assert client.open(bytes.fromhex(SEALED["session_key"])) == open
    assert server.take_open(open) == accepted
    client.take_reply(accepted)
    assert client.peer_limits == tuple(vector["server_limits"])
    assert server.peer_limits == tuple(vector["client_limits"])
    if mode == "plain":
        assert (from_client, from_server) == (hello_c + open, hello_s + accepted)
        return
    assert from_client == hello_c + second.Records(client.hs[:32]).seal(open)
    assert from_server == hello_s + second.Records(server.hs[32:]).seal(accepted)


def test_the_second_implementation_has_every_intermediate_value() -> None:
    client, server = second_client("sealed"), second_server("sealed")
    server.take_hello(client.own_hello)
    client.take_hello(server.own_hello)
    client.take_reply(server.take_open(client.open(bytes.fromhex(SEALED["session_key"]))))
    for side in (client, server):
        for name in ("ee", "h0", "hs", "h1", "session_key", "box_key", "box", "h2", "proof", "fk"):
            assert getattr(side, name).hex() == SEALED[name], name
    head, final = unhex(SEALED, "O", "open")
    assert second.unpack(final)[:5] == second.unpack(head)
    head, final = unhex(SEALED, "A", "accepted")
    assert second.unpack(final)[:3] == second.unpack(head)


@named(VECTORS["bad_hellos"])
def test_bad_hellos(vector: dict[str, Any]) -> None:
    hello = bytes.fromhex(vector["hello"])
    package = package_client if vector["to"] == "client" else package_server
    other = second_client if vector["to"] == "client" else second_server
    with pytest.raises(HandshakeError):
        package(vector["mode"]).receive_hello(hello)
    with pytest.raises(second.Bad):
        other(vector["mode"]).take_hello(hello)


@named(VECTORS["bad_opens"])
def test_bad_opens(vector: dict[str, Any]) -> None:
    mode, authentication = vector["mode"], vector["refused"] == "authentication"
    hello, open, key = *unhex(HANDSHAKES[mode], "C"), bytes.fromhex(vector["open"]), SEALED["key"]
    server = package_server(mode)
    server.receive_hello(hello)
    with pytest.raises(HandshakeError) as caught:
        server.receive_open(open)
        server.accept([Key(bytes.fromhex(key))] if server.user == SEALED["user"] else [])
    assert isinstance(caught.value, AuthenticationError) is authentication
    assert server.final_keys is None
    other = second_server(mode)
    other.take_hello(hello)
    with pytest.raises(second.Bad) as refused:
        other.take_open(open)
    assert isinstance(refused.value, second.NotAuthentic) is authentication


@named(VECTORS["bad_replies"])
def test_bad_replies(vector: dict[str, Any]) -> None:
    mode, authentication = vector["mode"], vector["authentication"]
    hello, reply = *unhex(HANDSHAKES[mode], "S"), bytes.fromhex(vector["reply"])
    client = package_client(mode)
    client.receive_hello(hello)
    client.open()
    with pytest.raises(HandshakeError) as caught:
        client.receive_reply(reply)
    assert isinstance(caught.value, AuthenticationError) is authentication
    other = second_client(mode)
    other.take_hello(hello)
    other.open(bytes.fromhex(SEALED["session_key"]))
    with pytest.raises(second.Bad) as refused:
        other.take_reply(reply)
    assert isinstance(refused.value, second.NotAuthentic) is authentication


def test_refusals_and_their_records() -> None:
    for vector in VECTORS["refused"]:
        packet, record = unhex(vector, "packet", "record")
        assert second.Records(bytes.fromhex(SEALED["hs"])[32:]).open(record) == packet
        assert second.unpack(packet)[0] == b"refused"
        client = package_client("sealed")
        with pytest.raises(HandshakeError, match="the server refused"):
            client.receive_reply(packet)


# ---- records ----


async def receive(ours: trio.abc.SendStream, stream: SecretboxStream, record: str) -> bytes:
    await ours.send_all(bytes.fromhex(record))
    return await stream.receive_some()


async def test_the_package_opens_the_records() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    records = iter(VECTORS["records"]["records"])
    keys = [bytes.fromhex(part["key"]) for part in VECTORS["records"]["stream"]]
    stream = SecretboxStream(theirs, send_key=bytes(32), receive_key=keys[0])
    for part, key in zip(VECTORS["records"]["stream"], keys, strict=True):
        if key != keys[0]:
            stream.rekey(send_key=bytes(32), receive_key=key)
        for plaintext in part["plaintexts"]:
            assert (await receive(ours, stream, next(records))).hex() == plaintext
    assert next(records, None) is None


def test_the_second_implementation_seals_and_opens_the_records() -> None:
    records = iter(VECTORS["records"]["records"])
    for part in VECTORS["records"]["stream"]:
        key, *plaintexts = [bytes.fromhex(text) for text in (part["key"], *part["plaintexts"])]
        sealer, opener = second.Records(key), second.Records(key)
        for plaintext in plaintexts:
            record = bytes.fromhex(next(records))
            assert sealer.seal(plaintext) == record
            assert opener.open(record) == plaintext


@named(VECTORS["records"]["bad"])
async def test_bad_records(vector: dict[str, Any]) -> None:
    key, record = unhex(vector, "key", "record")
    ours, theirs = trio.testing.memory_stream_pair()
    with pytest.raises(trio.BrokenResourceError):
        await receive(ours, SecretboxStream(theirs, send_key=bytes(32), receive_key=key), record.hex())
    with pytest.raises(second.Bad):
        second.Records(key).open(record)


# ---- an open connection ----


CONNECTION = VECTORS["connection"]
OPEN_LIMITS = (CONNECTION["max_message_size"], CONNECTION["max_requests"])


def package_session() -> Session:
    size, count = OPEN_LIMITS
    return Session("server", max_message_size=size, max_requests=count, slots=count)


def packet_before(kind: bytes) -> bytes:
    """What must come before a good packet of this kind."""
    names = {b"cancel": "req", b"drop": "part"}
    found = [vector["packet"] for vector in CONNECTION["good"] if vector["name"] == names.get(kind)]
    return bytes.fromhex("".join(found))


@named(CONNECTION["good"])
def test_packets_of_a_connection(vector: dict[str, Any]) -> None:
    packet, fields = bytes.fromhex(vector["packet"]), [bytes.fromhex(field) for field in vector["fields"]]
    assert second.packet(fields) == packet
    server = package_session()
    for _ in range(2):
        server.request([b"ping", b"12345"])
    server.open_channel([])
    if fields == [b"bye-ok"]:
        server.drain()
    assert server.take(0.0)
    list(server.receive(packet_before(fields[0])))
    events = list(server.receive(packet))
    match fields:
        case [b"req", id, timeout, body]:
            seconds = int(timeout) / 1e6 if timeout else math.inf
            assert events == [Request(int(id), seconds, second.unpack_body(body))]
        case [b"chan", id, timeout, credit, body]:
            seconds = int(timeout) / 1e6 if timeout else math.inf
            assert events == [Request(int(id), seconds, second.unpack_body(body), has_channel=True)]
            assert server.channels.may_send(int(id)) is (credit != b"0")
        case [b"item", id, body]:
            assert events == [Item(int(id), len(body), second.unpack_body(body), body)]
        case [b"end", id]:
            assert events == [End(int(id))]
        case [b"ok", id, body]:
            assert events == [(int(id), second.unpack_body(body))]
        case [b"err", id, code, message]:
            assert events == [(int(id), code.decode(), message.decode())]
        case [b"cancel", id]:
            assert events == [Cancel(int(id))]
        case [b"bye"]:
            assert events == [Bye([])]
        case _:
            assert events == []


@named(CONNECTION["good"])
def test_the_second_implementation_takes_packets_of_a_connection(vector: dict[str, Any]) -> None:
    packet, fields = bytes.fromhex(vector["packet"]), [bytes.fromhex(field) for field in vector["fields"]]
    server = second.Open(1, *OPEN_LIMITS)
    for id in (b"1", b"3"):
        server.put([b"req", id, b"", second.body([])])
    server.put([b"chan", b"5", b"", b"262144", second.body([])])
    if fields == [b"bye-ok"]:
        server.put([b"bye"])
    if before := packet_before(fields[0]):
        server.take(before)
    taken = server.take(packet)
    kinds = {b"req", b"chan", b"ok", b"err", b"cancel", b"item", b"end"}
    assert taken == (fields if fields[0] in kinds else None)
    if fields[0] == b"credit":
        assert server.to_send[5] == int(fields[2])


@named(CONNECTION["bad"])
def test_bad_packets_of_a_connection(vector: dict[str, Any]) -> None:
    packet = bytes.fromhex(vector["packet"])
    with pytest.raises(ProtocolError):
        list(package_session().receive(packet))
    with pytest.raises(second.Bad):
        second.Open(1, *OPEN_LIMITS).take(packet)


def servers_of_a_sequence(vector: dict[str, Any]) -> tuple[Session, second.Open]:
    package, sent = server_of_a_sequence(vector["bye"])
    other = second.Open(1, *OPEN_LIMITS, CONNECTION["credit"])
    before = [[b"chan", b"1", b"", b"262144", b"\0"], [b"req", b"3", b"", b"\0"]]
    if vector["bye"]:
        before.insert(0, [b"bye"])
    assert b"".join(packet for fields in before for packet in other.put(fields)) == sent
    return package, other


@named(VECTORS["sequences"]["good"])
def test_sequences_of_packets(vector: dict[str, Any]) -> None:
    package, other = servers_of_a_sequence(vector)
    requests, items = (
        [(event["id"], [bytes.fromhex(field) for field in event["fields"]]) for event in vector[name]]
        for name in ("requests", "items")
    )
    packets = [bytes.fromhex(packet) for packet in vector["packets"]]
    events = receive_sequence(package, b"".join(packets))
    assert [(event.id, event.fields) for event in events if isinstance(event, Request)] == requests
    assert [(event.id, event.fields) for event in events if isinstance(event, Item)] == items
    assert package.take(0.0).hex() == vector["replies"]
    taken = [fields for packet in packets if (fields := other.take(packet))]
    for kinds, expected in (({b"req", b"chan"}, requests), ({b"item"}, items)):
        found = [(int(fields[1]), second.unpack_body(fields[-1])) for fields in taken if fields[0] in kinds]
        assert found == expected
    assert b"".join(other.replies).hex() == vector["replies"]


@named(VECTORS["sequences"]["bad"])
def test_bad_sequences_of_packets(vector: dict[str, Any]) -> None:
    package, other = servers_of_a_sequence(vector)
    *good, bad = [bytes.fromhex(packet) for packet in vector["packets"]]
    receive_sequence(package, b"".join(good))
    for packet in good:
        other.take(packet)
    with pytest.raises(ProtocolError):
        receive_sequence(package, bad)
    with pytest.raises(second.Bad):
        other.take(bad)


def pump(package: Session, other: second.Open) -> list[list[bytes]]:
    """Take all that the package's side sends; what the second implementation is to answer."""
    decoder = PacketDecoder(second.MAX_WHOLE)
    taken: list[list[bytes] | None] = []
    while batch := package.take(0.0):
        taken += (other.take(second.packet(fields)) for fields in decode(decoder, batch))
    assert not decoder.buffered
    return [fields for fields in taken if fields is not None]


@pytest.mark.parametrize("size", [66_464, 66_465, 66_560, 66_561, 2**20 - 96])
def test_packets_about_as_long_as_may_be_whole(size: int) -> None:
    """And the longest that may be; both ways. `size` is that of the body."""
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    text = b"a" * (size - 5)
    package.request([text])
    [request] = pump(package, other)
    assert second.unpack_body(request[3]) == [text]
    packets = other.put([b"ok", request[1], second.body([text])])
    assert (len(packets) > 1) is (len(second.body([b"ok", request[1], second.body([text])])) > 66_560)
    [answer] = package.receive(b"".join(packets))
    assert answer == Answer(0, [text])


def test_the_second_implementation_reads_big_and_small_requests_together() -> None:
    package = Session("client", max_message_size=2**20, max_requests=20, slots=20)
    other = second.Open(1, 2**20, 20)
    texts = [bytes((i,)) * (300_000 if i % 2 else 300) for i in range(16)]
    for text in texts:
        package.request([text])
    requests = pump(package, other)
    assert sorted(second.unpack_body(request[3])[0] for request in requests) == texts
    assert [len(request[3]) > 300_000 for request in requests] == [False] * 8 + [True] * 8


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
    list(package.receive(other.replies.pop()))
    package.channels.send(0, *package.channels.encode([bytes(250_000)]))
    package.channels.end(0)
    for fields in decode(PacketDecoder(second.MAX_WHOLE), package.take(0.0)):
        assert other.take(second.packet(fields)) is None
    assert other.pieces
    if how == "cancel":
        package.cancel(0)
        assert pump(package, other) == [[b"cancel", b"0"]]
    else:
        [packet] = other.put([b"ok", b"0", second.body([])])
        assert list(package.receive(packet)) == [Answer(0, [])]
        assert pump(package, other) == []
    assert not other.pieces


def test_both_count_the_credit_of_the_packages_items_alike() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1, 40)
    package.open_channel([])
    pump(package, other)
    list(package.receive(other.replies.pop()))
    # The body of an item is 5 bytes longer than its field. After the last of each row nothing may start.
    for sizes, more in [([30, 0], 1), ([100_000], 100_004), ([], 7), ([0, 0], 0)]:
        for size in sizes:
            package.channels.send(0, *package.channels.encode([bytes(size)]))
            assert [len(fields[2]) for fields in pump(package, other)] == [size + 5]
        assert not package.channels.may_send(0)
        assert other.to_take[0] == package.channels.by_id[0].send_credit <= 0
        list(package.receive(b"".join(other.put([b"credit", b"0", b"%d" % more]))))
    assert other.to_take[0] == -3


def test_both_count_the_credit_of_the_second_implementations_items_alike() -> None:
    package = Session("client", max_message_size=2**20, max_requests=1, slots=1)
    other = second.Open(1, 2**20, 1)
    package.open_channel([])
    pump(package, other)
    for size in (0, 70_000, 250_000):
        assert other.to_send[0] == package.channels.by_id[0].receive_credit > 0
        [event] = package.receive(b"".join(other.put([b"item", b"0", second.body([bytes(size)])])))
        assert event[:3] == (0, size + 5, [bytes(size)])
        package.channels.consume(0, size + 5)
        pump(package, other)
    list(package.receive(b"".join(other.put([b"item", b"0", second.body([bytes(WINDOW - 5)])]))))
    assert other.to_send[0] == 0, "all was given back before"
    with pytest.raises(ProtocolError, match="without credit"):
        list(package.receive(second.packet([b"item", b"0", b"\0"])))


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
        await self.put(b"req", own, b"60000000", second.body([b"double", b"ab"]))
        assert await self.take() == [b"req", other, timeout, second.body([b"again?", b"ab"])]
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
            await peer.put(b"req", own, b"", second.body([text, b"1"]))
            assert await peer.take() == [b"ok", own, second.body([text, b"1"])]
        assert peer.seen == [b"part"] * len(peer.seen)
        assert len(peer.seen) >= 5

        async def answer() -> None:
            _, id, _, body = await peer.take()
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
            _, _, timeout, body = await peer.take()
            assert (timeout, second.unpack_body(body)) == (b"1500000", [b"too long"])
            # The package waits for its own clock, and says so then.
            await peer.put(b"err", id, b"timeout", b"")
            _, id, timeout, body = await peer.take()
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
        await peer.put(b"req", own, b"2500000", second.body([]))
        assert (await peer.take())[:3] == [b"err", own, b"timeout"]
        assert trio.current_time() == 2.5


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
            await peer.put(b"chan", own, b"", b"1000", second.body([b"log"]))
            await peer.take_word(b"credit", own, b"262144")
            for item in (small, large):
                await peer.put(b"item", own, item)
                assert await peer.take() == [b"item", own, item]
            assert peer.open.to_send[int(own)] == WINDOW, "it gave back what was consumed"
            await peer.put(b"item", own, small)
            await peer.put(b"end", own)
            await peer.take_nothing()
            await peer.put(b"credit", own, b"%d" % (len(small) + len(large) - 1000))
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
            assert await peer.take() == [b"chan", other, b"", b"262144", second.body([b"log"])]
            for _ in range(3):
                assert await peer.take() == [b"item", other, second.body([text])]
            await peer.take_nothing()
            await peer.put(b"credit", other, b"%d" % (3 * 100_005 - WINDOW))
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
            for fields in ([b"item", b"\0"], [b"credit", b"1"], [b"end"], [b"err", b"cancelled", b""]):
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
            await peer.put(b"chan", own, b"", b"0", second.body([]))
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
            await peer.put(b"chan", own, b"", b"9", second.body([]))
            await peer.take_word(b"credit", own, b"262144")
            await peer.put(b"cancel", own)
            await peer.put(b"credit", own, b"1")
            assert (await peer.take())[:3] == [b"err", own, b"cancelled"]


@both_roles
async def test_a_side_without_a_channel_handler(role: str, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(role) as (connection, peer):
        own, other = peer.ids
        with trio.fail_after(5):
            await peer.put(b"chan", own, b"", b"9", second.body([]))
            await peer.put(b"end", own)
            assert (await peer.take())[:3] == [b"err", own, b"no-channel"]
            with pytest.raises(RemoteError) as caught:
                async with connection.open_channel([]) as channel:
                    await peer.take()
                    await peer.put(b"err", other, b"no-channel", b"")
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
                await peer.put(b"chan", own, b"", b"99", second.body([]))
                await peer.take_word(b"credit", own, b"262144")
                connection.drain()
                await peer.put(b"chan", crossing, b"", b"99", second.body([]))
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
            await peer.put(b"req", own, b"", second.body([b"first"]))
            await trio.testing.wait_all_tasks_blocked()
            connection.drain()
            await trio.testing.wait_all_tasks_blocked()
            await peer.put(b"req", crossing, b"", second.body([b"second"]))
            await peer.take_word(b"bye")  # and sends bye-ok
            assert (await peer.take())[:3] == [b"err", crossing, b"closing"]
            slow.may_answer.set()
            assert await peer.take() == [b"req", other, b"", second.body([b"again?"])]
            assert not connection.closed
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
                # Its handlers may go on to ask, and what they ask back is too late.
                await peer.put(b"req", own, b"", second.body([]))
                assert (await peer.take())[:3] == [b"err", own, b"handler-error"]
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


async def close_after(stream: trio.abc.Stream, data: bytes) -> bytes:
    """Send bytes; what comes back until the other side closes."""
    await stream.send_all(data)
    answer = b""
    with trio.fail_after(5):
        while more := await stream.receive_some():
            answer += more
    return answer


@named([v for v in VECTORS["bad_hellos"] if v["to"] == "server" and v["name"] != "its own key"])
async def test_a_bad_hello_gets_no_answer(vector: dict[str, Any]) -> None:
    listener = MemoryListener()
    async with open_server([listener], user_key={"zo": KEY} if vector["mode"] == "sealed" else None):
        assert await close_after(listener.connect(), bytes.fromhex(vector["hello"])) == b""


async def test_a_recorded_client_does_not_get_in_again() -> None:
    key, recorded = unhex(SEALED, "key", "client_sends")
    listener = MemoryListener()
    async with open_server(
        [listener], user_key={SEALED["user"]: Key(key)}, service=SEALED["service"]
    ) as server:
        assert len(await close_after(listener.connect(), recorded)) == 78
        assert not server.connections


async def test_a_recorded_server_does_not_convince_a_client_again() -> None:
    key, recorded = unhex(SEALED, "key", "server_sends")
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(recorded)
    with pytest.raises(HandshakeError, match="did not open"):
        async with open_connection(ours, user=SEALED["user"], key=Key(key), service=SEALED["service"]):
            raise AssertionError


# ---- the texts ----


def look_up(path: str) -> object:
    value: Any = VECTORS
    for name in path.split("."):
        value = value[int(name) if isinstance(value, list) else name]
    return value


def test_the_values_in_the_protocol_text_are_those_of_the_vectors() -> None:
    text = (DOCS / "protocol.rst").read_text(encoding="utf-8")
    shown = re.findall(r"^    ([\w.]+) =\n((?:        [0-9a-f]+\n)+)", text, re.MULTILINE)
    assert len(shown) == text.count(" =\n") >= 20
    for path, value in shown:
        assert "".join(value.split()) == look_up(path), path


def test_the_tests_named_in_the_security_text_exist() -> None:
    text = (DOCS / "security.rst").read_text(encoding="utf-8")
    named = re.findall(r"^- ``(test_\w+\.py)::(test_\w+)``$", text, re.MULTILINE)
    assert len(named) == text.count("::test_") >= 10
    for file, name in named:
        source = (TESTS / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:async )?def {name}\(", source, re.MULTILINE), f"{file}::{name}"
