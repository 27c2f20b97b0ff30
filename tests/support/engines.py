"""For tests of the engine: engines, their events, and packets made by hand."""

from __future__ import annotations

from typing import Any

from bokbok_trio._protocol.events import Event, Item, Request
from bokbok_trio._protocol.packets import LARGE, encode_body
from bokbok_trio._protocol.session import Session
from tests.support.helpers import packet

LIMIT = 4096


def make(side: Any = "client", *, max_requests: int = 3, slots: int = 3, limit: int = LIMIT) -> Session:
    return Session(side, max_message_size=limit, max_requests=max_requests, slots=slots)


def receive(session: Session, data: bytes) -> list[Event]:
    """Return the events of some received bytes. Raise the error if they break the protocol."""
    events = session.receive(data)
    while session.has_undecoded:
        events += session.receive(b"")
    if session.error is not None:
        raise session.error
    return events


def request_id(event: Event) -> int:
    assert isinstance(event, Request)
    return event.id


def counts(session: Session) -> tuple[int, int, int, int, int]:
    return session.asked, session.waiting, session.cancelled, session.handling, session.queued


def in_pieces(body: bytes, number: int = 0) -> bytes:
    half = len(body) // 2
    parts = ((body[:half], len(body) - half), (body[half:], 0))
    return b"".join(packet(b"part", b"%d" % number, b"%d" % left, piece) for piece, left in parts)


def item_event(id: int, *fields: bytes) -> Item:
    chunks, _ = encode_body(fields, 2**32)
    body = b"".join(chunks)
    return Item(id, len(body), list(fields), body if len(body) < LARGE else None)


def open_pair(limit: int = LIMIT) -> tuple[Session, Session]:
    """Return two engines with the client's channel 0, and credit in both directions."""
    client, server = make("client", limit=limit), make("server", limit=limit)
    client.open_channel(["hello"])
    list(receive(server, client.take(0)))
    server.flow_control.accept(0)
    assert list(receive(client, server.take(0))) == []
    return client, server


def send_item(engine: Session, id: int, *fields: bytes) -> None:
    engine.flow_control.send(id, *engine.flow_control.encode(fields))
