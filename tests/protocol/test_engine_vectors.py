"""The engine of an open connection, compared with the vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.events import Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from bokbok_trio._protocol.session import Session
from tests.support.vectors import engine_of_a_sequence, package_session

from ..support import second_implementation as second
from ..support.engines import receive
from ..support.vectors import CONNECTION, VECTORS, named, packet_before


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
    """Make each kind of packet by the calls that send it."""
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
