"""The vectors, the handshake of the package, the second implementation and the texts in ``docs``.

The engine of an open connection is compared with them in ``test_engine_vectors.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import AuthenticationError, HandshakeError, Key, ProtocolError, open_connection, open_server
from bokbok_trio._keys import encode_user
from bokbok_trio._protocol.handshake import ClientHandshake, ServerHandshake
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.options import decode_options
from bokbok_trio._protocol.packets import PacketDecoder, decode_number
from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio.testing import MemoryListener
from tests.support.vectors import CONNECTION, OPEN_LIMITS, VECTORS, both_modes, named, packet_before

from ..support import second_implementation as second
from ..support.connection_vectors import server_of_a_sequence
from ..support.helpers import decode
from ..support.make_vectors import PATH, dump, make
from ..support.vector_parts import CLIENT_GREASE, CLIENT_OPTIONS, SERVER_GREASE

DOCS = Path(__file__).parents[2] / "docs"
SEALED = VECTORS["sealed"]
PLAIN = VECTORS["plain"]
HANDSHAKES: dict[str, Any] = {"sealed": SEALED, "plain": PLAIN}


def unhex(vector: Mapping[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


# ---- the file ----


def test_the_vectors_are_those_that_are_made() -> None:
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
    """Return the user name that a server takes from an `open` with these bytes."""
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


# ---- options ----


@named(VECTORS["options"]["good"])
def test_good_options(vector: dict[str, Any]) -> None:
    options = {name.encode(): bytes.fromhex(value) for name, value in vector["options"].items()}
    encoded = bytes.fromhex(vector["body"])
    assert second.flat(options) == encoded
    assert second.options(encoded) == options
    assert decode_options(encoded) == {name.decode(): value for name, value in options.items()}


@named(VECTORS["options"]["bad"])
def test_bad_options(vector: dict[str, Any]) -> None:
    encoded = bytes.fromhex(vector["body"])
    with pytest.raises(HandshakeError):
        decode_options(encoded)
    with pytest.raises(second.Bad):
        second.options(encoded)


# ---- the handshake ----


def options_of(mode: str, side: str) -> dict[bytes, bytes]:
    shown = HANDSHAKES[mode][f"{side}_options"]
    return {name.encode(): bytes.fromhex(value) for name, value in shown.items()}


def package_client(mode: str) -> ClientHandshake:
    secret, session_key = unhex(SEALED, "client_secret", "session_key")
    random = iter([secret, CLIENT_GREASE, session_key] if mode == "sealed" else [CLIENT_GREASE])
    return ClientHandshake(
        user=SEALED["user"] if mode == "sealed" else None,
        key=Key(bytes.fromhex(SEALED["key"])) if mode == "sealed" else None,
        service=SEALED["service"] if mode == "sealed" else "",
        limits=Limits(*HANDSHAKES[mode]["client_limits"]),
        options=CLIENT_OPTIONS,
        randomness=lambda _: next(random),
    )


def package_server(mode: str, service: str = SEALED["service"]) -> ServerHandshake:
    secret = bytes.fromhex(SEALED["server_secret"])
    random = iter([secret, SERVER_GREASE, bytes(32)] if mode == "sealed" else [SERVER_GREASE])
    return ServerHandshake(
        sealed=mode == "sealed",
        service=service if mode == "sealed" else "",
        limits=Limits(*HANDSHAKES[mode]["server_limits"]),
        randomness=lambda _: next(random),
    )


def second_client(mode: str) -> second.Client:
    key, secret = unhex(SEALED, "key", "client_secret")
    limits = tuple(HANDSHAKES[mode]["client_limits"])
    options = options_of(mode, "client")
    if mode == "plain":
        return second.Client(b"", b"", b"", limits, b"", own_options=options)
    user, service = SEALED["user"].encode(), SEALED["service"].encode()
    return second.Client(user, key, service, limits, secret, own_options=options)


def second_server(mode: str) -> second.Server:
    key, secret = unhex(SEALED, "key", "server_secret")
    limits = tuple(HANDSHAKES[mode]["server_limits"])
    options = options_of(mode, "server")
    if mode == "plain":
        return second.Server(None, b"", limits, b"", own_options=options)
    keys = {SEALED["user"].encode(): key}
    return second.Server(keys, SEALED["service"].encode(), limits, secret, own_options=options)


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
    for side, other in ((client, "server"), (server, "client")):
        options = {name.decode(): value for name, value in options_of(mode, other).items()}
        assert side.peer_options == options
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
    assert client.peer_options == options_of(mode, "server")
    assert server.peer_options == options_of(mode, "client")
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
    assert second.unpack(final)[:6] == second.unpack(head)
    head, final = unhex(SEALED, "A", "accepted")
    assert second.unpack(final)[:4] == second.unpack(head)


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
    assert not server.peer_options
    other = second_server(mode)
    other.take_hello(hello)
    with pytest.raises(second.Bad) as refused:
        other.take_open(open)
    assert isinstance(refused.value, second.NotAuthentic) is authentication
    assert not other.peer_options


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


@named(CONNECTION["good"])
def test_the_second_implementation_takes_packets_of_a_connection(vector: dict[str, Any]) -> None:
    packet, fields = bytes.fromhex(vector["packet"]), [bytes.fromhex(field) for field in vector["fields"]]
    server = second.Open(1, *OPEN_LIMITS)
    for id in (b"1", b"3"):
        server.put([b"req", id, b"", b"", b"", second.body([])])
    server.put([b"chan", b"5", b"", b"", b"", b"262144", second.body([])])
    if fields == [b"bye-ok"]:
        server.put([b"bye"])
    if before := packet_before(fields[0]):
        server.take(before)
    taken = server.take(packet)
    kinds = {b"req", b"chan", b"ok", b"err", b"cancel", b"item", b"end", b"abort"}
    assert taken == (fields if fields[0] in kinds else None)
    if fields[0] == b"credit":
        assert server.to_send[5] == int(fields[2])


@named(CONNECTION["bad"])
def test_the_second_implementation_refuses_bad_packets_of_a_connection(vector: dict[str, Any]) -> None:
    server = second.Open(1, *OPEN_LIMITS)
    with pytest.raises(second.Bad) as caught:
        server.take(bytes.fromhex(vector["packet"]))
    aborts = server.abort(caught.value)
    if b"abort" in bytes.fromhex(vector["packet"]):  # which is never answered by another
        assert aborts == []
    else:
        [abort] = aborts
        assert second.Open(0, *OPEN_LIMITS).take(abort) == [b"abort", b"protocol", str(caught.value).encode()]


@named(VECTORS["sequences"]["good"])
def test_the_second_implementation_takes_sequences_of_packets(vector: dict[str, Any]) -> None:
    server = server_of_a_sequence(vector["bye"])
    taken = [fields for packet in vector["packets"] if (fields := server.take(bytes.fromhex(packet)))]
    for kinds, name in (({b"req", b"chan"}, "requests"), ({b"item"}, "items")):
        found = [
            {"id": int(fields[1]), "fields": [field.hex() for field in second.unpack_body(fields[-1])]}
            for fields in taken
            if fields[0] in kinds
        ]
        assert found == vector[name]
    assert b"".join(server.replies).hex() == vector["replies"]


@named(VECTORS["sequences"]["bad"])
def test_the_second_implementation_refuses_bad_sequences_of_packets(vector: dict[str, Any]) -> None:
    server = server_of_a_sequence(vector["bye"])
    *good, bad = [bytes.fromhex(packet) for packet in vector["packets"]]
    for packet in good:
        server.take(packet)
    with pytest.raises(second.Bad):
        server.take(bad)


def test_nothing_after_an_abort_counts() -> None:
    server = second.Open(1, *OPEN_LIMITS)
    assert server.take(second.packet([b"abort", b"protocol", b""]))
    assert server.take(b"no packet") is None
    assert server.abort(second.Bad("never in answer to an abort")) == []


# ---- what must get no answer ----


KEY = Key(bytes(range(200, 232)))


async def close_after(stream: trio.abc.Stream, data: bytes) -> bytes:
    """Send bytes. Return everything that arrives until the other side closes."""
    await stream.send_all(data)
    answer = b""
    with trio.fail_after(5):
        while more := await stream.receive_some():
            answer += more
    return answer


@named([v for v in VECTORS["bad_hellos"] if v["to"] == "server" and v["name"] != "its own key"])
async def test_a_bad_hello_gets_no_answer(
    vector: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    listener = MemoryListener()
    async with open_server([listener], user_key={"zo": KEY} if vector["mode"] == "sealed" else None):
        assert await close_after(listener.connect(), bytes.fromhex(vector["hello"])) == b""


async def test_a_recorded_client_does_not_get_in_again(autojump_clock: trio.testing.MockClock) -> None:
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
