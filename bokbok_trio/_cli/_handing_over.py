"""Listening sockets that outlive a process, which hands them to the one that takes its place.

They stay open meanwhile, so whoever dials waits until that one accepts, and is not refused.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from typing import TypeAlias

import trio

from .._addresses import UnixAddress
from .._listening import Listeners
from .._unix_listener import UnixListener

_One: TypeAlias = tuple[int, tuple[str, str, int, int] | None]

Handed: TypeAlias = list[_One]
"""The descriptor of each socket; and of a UNIX socket its address, its file, and what tells that file."""


def hand_over(listeners: Listeners) -> Handed:
    """Keep sockets open, and their files there, whatever becomes of their listeners."""
    # On Windows the sockets are opened anew: no process takes the place of another there.
    return [] if os.name == "nt" else [*map(_hand_over_one, listeners)]


def _hand_over_one(listener: trio.abc.Listener[trio.abc.Stream]) -> _One:
    if isinstance(listener, UnixListener):
        fd = os.dup(listener.socket.fileno())
        return fd, (listener.address.path, *listener.leave_file())
    assert isinstance(listener, trio.SocketListener)
    return os.dup(listener.socket.fileno()), None


def take_over(handed: Handed) -> list[trio.abc.Listener[trio.SocketStream]]:
    """Listen on sockets that were handed over."""
    listeners: list[trio.abc.Listener[trio.SocketStream]] = []
    for fd, file in handed:
        os.set_inheritable(fd, False)
        sock = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
        if file is None:
            listeners.append(trio.SocketListener(sock))
        else:
            address, path, device, inode = file
            listeners.append(UnixListener(sock, UnixAddress(address), path, (device, inode)))
    return listeners


async def close_all(listeners: Iterable[trio.abc.Listener[trio.abc.Stream]]) -> None:
    """Close listeners, and remove their files."""
    for each in listeners:
        await trio.aclose_forcefully(each)


def begin_anew(command: list[str], variable: str, handed: Handed) -> None:
    """Replace this process.

    Arguments:
        command: to run, with its arguments.
        variable: of the environment, by which the new process is told what is handed over.
        handed: to be given to `take_over` there.
    """
    for fd, _ in handed:
        os.set_inheritable(fd, True)
    os.environ[variable] = json.dumps(handed)
    os.execv(command[0], command)  # noqa: S606  (no shell is wanted)
