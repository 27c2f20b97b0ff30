"""What tests reach of the package's inside. No other file of the tests may touch private names."""

from __future__ import annotations

import socket
from collections.abc import Sized

import pytest

from bokbok_trio import Connection, Key
from bokbok_trio._protocol import handshake
from bokbok_trio._protocol.session import Session
from bokbok_trio._stream.socket import _Borrowed


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
