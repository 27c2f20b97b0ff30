"""An instrument that records all events, and checks them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from bokbok_trio import CombinedHandler, Connection, RequestHandler, Settings
from bokbok_trio.instruments import (
    ConnectionEnded,
    ConnectionOpened,
    HandshakeEnded,
    HandshakeStarted,
    Instrument,
    ItemPassed,
    RequestEnded,
    RequestStarted,
)
from bokbok_trio.testing import open_connection_pair


class Recorder(Instrument):
    """Records all events."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def handshake_started(self, event: HandshakeStarted) -> None:
        self.events.append(event)

    def handshake_ended(self, event: HandshakeEnded) -> None:
        self.events.append(event)

    def connection_opened(self, event: ConnectionOpened) -> None:
        self.events.append(event)

    def connection_ended(self, event: ConnectionEnded) -> None:
        self.events.append(event)

    def request_started(self, event: RequestStarted) -> None:
        self.events.append(event)

    def request_ended(self, event: RequestEnded) -> None:
        self.events.append(event)

    def item_passed(self, event: ItemPassed) -> None:
        self.events.append(event)

    # ---- for tests ----

    def settings(self, **more: Any) -> Settings:
        return Settings(instruments=[self], **more)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if type(event) is kind]

    @property
    def ended(self) -> list[Any]:
        """The requests that have ended, in the order of their ends."""
        return self.of(RequestEnded)

    @property
    def outcomes(self) -> list[str]:
        """The outcomes of these requests."""
        return [" ".join(filter(None, (event.outcome, event.code))) for event in self.ended]

    def check(self) -> None:
        """Check that everything that began ended once, in order, and before the thing that contains it."""
        handshakes: set[HandshakeStarted] = set()
        connections: set[Connection] = set()
        requests: dict[RequestStarted, list[int]] = {}
        for event in self.events:
            match event:
                case HandshakeStarted():
                    handshakes.add(event)
                case HandshakeEnded():
                    handshakes.remove(event.handshake)
                    assert event.seconds >= 0
                    assert (event.outcome == "ok") == (event.error == "")
                case ConnectionOpened():
                    assert event.connection not in connections
                    connections.add(event.connection)
                case ConnectionEnded():
                    assert not [each for each in requests if each.connection is event.connection]
                    connections.remove(event.connection)
                    assert event.reason
                case RequestStarted():
                    assert event.connection in connections
                    assert event not in requests
                    requests[event] = []
                case ItemPassed():
                    requests[event.request].append(event.size)
                case RequestEnded():
                    items = requests.pop(event.request)
                    assert len(items) == event.items_in + event.items_out
                    assert 0 <= event.waited <= event.seconds
                    assert (event.code != "") == (event.outcome == "error")
                    least = sum(items) + event.request.size
                    assert event.bytes_in + event.bytes_out >= least
        assert not handshakes
        assert not connections
        assert not requests


@asynccontextmanager
async def recorded_pair(
    server_handler: RequestHandler | CombinedHandler | None = None, **more: Any
) -> AsyncGenerator[tuple[Connection, Connection, Recorder, Recorder]]:
    """Both ends of a connection, with recorders of their events, which are checked at the end."""
    ours, theirs = Recorder(), Recorder()
    more.setdefault("client_settings", ours.settings())
    more.setdefault("server_settings", theirs.settings())
    async with open_connection_pair(server_handler=server_handler, **more) as (client, server):
        yield client, server, ours, theirs
    for each in (ours, theirs):
        each.check()
