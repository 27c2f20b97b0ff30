"""What tests reach of the package's inside. No other file of the tests may touch private names."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

import pytest

from bokbok_trio import Connection, ReconnectingConnection, _portal
from bokbok_trio._cli import _calls
from bokbok_trio._stream.socket import _Borrowed
from bokbok_trio.blocking import Portal


def take_few(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let sockets take only so many bytes of each send that does not wait."""

    def send(self: socket.socket, data: bytes, flags: int = 0) -> int:
        return socket.socket.send(self, data[:most], flags)

    monkeypatch.setattr(_Borrowed, "send", send)


# ---- servers, clients and interfaces ----


def close_as_a_channel_opens(
    monkeypatch: pytest.MonkeyPatch, client: ReconnectingConnection, *, for_good: bool
) -> None:
    """Let this side close when the next channel has a connection, and before it is open on that.

    Arguments:
        for_good: whether the client is closed, and not its connection alone.
    """
    may_ask = Connection._may_ask
    asked = 0

    def close_at_second(self: Connection, depth: int = 0) -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            if for_good:
                client._close()
            else:
                self._close("closed at that moment")
        return may_ask(self, depth)

    monkeypatch.setattr(Connection, "_may_ask", close_at_second)


def check_idle(connection: Connection) -> None:
    """Check that a connection is idle: no request remains, one task reads, and at most one waits to read."""
    assert connection._session.handling == connection._session.queued == len(connection._handlers) == 0
    assert not connection._sender.coalescing.is_corked
    assert not connection._sender.lock.is_held
    turn = connection._reader._turn
    assert connection._reader._nursery is not None
    tasks = connection._reader._nursery.child_tasks
    assert tasks == {task for task in (turn.reader, turn.follower) if task is not None}
    assert {task.name for task in tasks} == {"bokbok_trio reader"}


def reference_number(stand_in: Any) -> bytes:
    """The number of what was lent, as a request to it has it."""
    number: bytes = stand_in._bokbok_options.head[1]
    return number


def reads_arguments(function: object) -> bool:
    """Whether this is what a thread does for `bokbok call` before the call: read its arguments."""
    return isinstance(function, partial) and function.func is _calls._prepare


# ---- portals ----


def stop_portals_at_exit() -> None:
    """Do as the interpreter's exit does."""
    _portal._stop_all()


def finalize(portal: Portal) -> None:
    """Do as the finalizer of a portal does, which nobody has any more."""
    portal._loop.stop()
