"""What tests reach of the package's inside. No other file of the tests may touch private names."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sized
from typing import Any
from weakref import WeakSet

import pytest
import trio

from bokbok_trio import Channel, Connection, Key, Server, Settings, _fork
from bokbok_trio._connection.watchdog import _alarm_clock
from bokbok_trio._protocol import handshake
from bokbok_trio._protocol.session import Session
from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio._stream.socket import _Borrowed, _scratch


def take_few(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let sockets take only so many bytes of each send that does not wait."""

    def send(self: socket.socket, data: bytes, flags: int = 0) -> int:
        return socket.socket.send(self, data[:most], flags)

    monkeypatch.setattr(_Borrowed, "send", send)


# ---- connections, protocol and streams ----


def session_of(connection: Connection) -> Session:
    """The engine of a connection."""
    return connection._session


def held_in_pieces(session: Session) -> int:
    """How many bytes of packets that have partly come an engine holds."""
    return session._interpreter.reassembler.held


def tables_of_an_engine(session: Session) -> tuple[Sized, ...]:
    """What an engine keeps of requests beside what it counts: all empty where there are none."""
    return session.local._backlogs, session.local._classes, session.remote._classes


def draw_as_nobodys_key(monkeypatch: pytest.MonkeyPatch, key: Key) -> None:
    """Let the key that servers try in place of missing ones be this one."""
    monkeypatch.setattr(handshake, "_NOBODYS_KEY", key)


def tables_of(connection: Connection) -> tuple[Sized, ...]:
    """What a connection keeps of requests and channels: all empty where there are none."""
    return connection._channels, connection._calls._calls, connection._handlers


def items_held(channel: Channel) -> deque[Any]:
    """The items that have come and nobody has received."""
    return channel._buffer


def close_at_once(connection: Connection, reason: str) -> None:
    """Close it, where nothing can be awaited."""
    connection._ending.close(reason)


async def break_transport(connection: Connection) -> None:
    """Close the transport below a connection, which says nothing to the peer."""
    await trio.aclose_forcefully(connection._stream)


async def send_raw(connection: Connection, data: bytes) -> None:
    """Send something in the place of packets."""
    await connection._stream.send_all(data)


def receive_something_else() -> None:
    """Fill the buffer that all sockets of a thread receive into, as the next of them would."""
    _scratch.view[:] = bytes([255]) * len(_scratch.view)


def keys_held(stream: SecretboxStream) -> tuple[bytes, bytes]:
    """The keys of either direction."""
    return stream._sealer._key, stream._opener.direction._key


def forked_from_now_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What runs first in a forked child, for what is made from now on."""
    monkeypatch.setattr(_fork, "_inherited", WeakSet())
    return _fork._after_fork_in_child


def refuse_for_too_many(connections: int) -> str:
    """What a server tells a user who has so many connections, which are as many as there may be."""
    server = Server.__new__(Server)
    server._stopping = False
    server._admitted, server._max_connections = 5, 10**18
    server._settings = Settings(max_connections_per_user=connections)
    server._of_user = {"u": connections}  # type: ignore[assignment]
    refusal = server._find_refusal("u")
    assert refusal is not None
    return refusal.message


def count_alarms() -> int:
    """How many alarms the task has that serves the watchdogs of this Trio run."""
    clock = _alarm_clock.get()
    assert clock is not None
    return len(clock._heap)
