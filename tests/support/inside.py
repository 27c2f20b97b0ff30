"""The only file of the tests that may touch private names of the package."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sized
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import trio

from bokbok_trio import Channel, Connection, Key, ReconnectingConnection, Settings, _fork, _portal_loop
from bokbok_trio._admission import Admission
from bokbok_trio._cli import _calls
from bokbok_trio._connection.watchdog import _alarm_clock
from bokbok_trio._protocol import handshake
from bokbok_trio._protocol.session import Session
from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio._stream.socket import _Borrowed, _scratch
from bokbok_trio.blocking import Portal


def take_few(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Limit the bytes that a socket accepts of each send that does not wait."""

    def send(self: socket.socket, data: bytes, flags: int = 0) -> int:
        return socket.socket.send(self, data[:most], flags)

    monkeypatch.setattr(_Borrowed, "send", send)


# ---- connections, protocol and streams ----


def session_of(connection: Connection) -> Session:
    """Return the engine of a connection."""
    return connection._session


def held_in_pieces(session: Session) -> int:
    """Return the bytes of partly received packets that an engine holds."""
    return session._interpreter.reassembler.held


def tables_of_an_engine(session: Session) -> tuple[Sized, ...]:
    """Return an engine's state of requests, besides its counts: all empty if there are none."""
    return session.local._backlogs, session.local._classes, session.remote._classes


def draw_as_nobodys_key(monkeypatch: pytest.MonkeyPatch, key: Key) -> None:
    """Set the key that servers try in place of missing ones."""
    monkeypatch.setattr(handshake, "_NOBODYS_KEY", key)


def tables_of(connection: Connection) -> tuple[Sized, ...]:
    """Return a connection's state of requests and channels: all empty if there are none."""
    return connection._channels, connection._calls._calls, connection._handlers


def items_held(channel: Channel) -> deque[Any]:
    """Return the items that have arrived and that nobody has received."""
    return channel._buffer


def close_at_once(connection: Connection, reason: str) -> None:
    """Close a connection where nothing can be awaited."""
    connection._ending.close(reason)


async def break_transport(connection: Connection) -> None:
    """Close the transport below a connection, without an end for the peer."""
    await trio.aclose_forcefully(connection._stream)


async def send_raw(connection: Connection, data: bytes) -> None:
    """Send some bytes in place of packets."""
    await connection._stream.send_all(data)


def receive_something_else() -> None:
    """Overwrite the buffer that all sockets of a thread receive into, as their next receive would."""
    _scratch.view[:] = bytes([255]) * len(_scratch.view)


def keys_held(stream: SecretboxStream) -> tuple[bytes, bytes]:
    """Return the keys of both directions."""
    return stream._sealer._key, stream._opener.direction._key


def forked_from_now_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return the function that runs first in a forked child, for objects made from now on."""
    monkeypatch.setattr(_fork, "_inherited", WeakSet())
    return _fork._after_fork_in_child


def refuse_for_too_many(connections: int) -> str:
    """Return the refusal for a user with so many connections, when that is the limit."""
    admission = Admission.__new__(Admission)
    admission.is_stopping = False
    admission.admitted, admission.max_connections = 5, 10**18
    admission._settings = Settings(max_connections_per_user=connections)
    admission._of_user = {"u": connections}  # type: ignore[assignment]
    refusal = admission.find_refusal("u")
    assert refusal is not None
    return refusal.message


def count_alarms() -> int:
    """Count the alarms of all watchdogs of this Trio run."""
    clock = _alarm_clock.get()
    assert clock is not None
    return len(clock._heap)


# ---- servers, clients and interfaces ----


def close_as_a_channel_opens(
    monkeypatch: pytest.MonkeyPatch, client: ReconnectingConnection, *, for_good: bool
) -> None:
    """Close when the next channel has its connection, and before it is open there.

    Arguments:
        for_good: whether to close the client, and not only its connection.
    """
    may_ask = Connection._may_ask
    asked = 0

    def close_at_second(self: Connection, depth: int = 0) -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            if for_good:
                client._dialler.close()
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
    """Return the number of a lent object, as a request to it contains it."""
    number: bytes = stand_in._bokbok_options.head[1]
    return number


def reads_arguments(function: object) -> bool:
    """Whether a function reads the arguments of `bokbok call`, as a thread does before the call."""
    return isinstance(function, partial) and function.func is _calls._prepare


# ---- portals ----


def stop_portals_at_exit() -> None:
    """Do as the exit of the interpreter does."""
    _portal_loop._stop_all()


def finalize(portal: Portal) -> None:
    """Do as the finalizer of a portal does, when nothing refers to the portal any more."""
    portal._loop.stop()
