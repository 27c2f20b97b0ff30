"""Hands the listening sockets of this process over to the process that replaces it.

The sockets stay open meanwhile. So a client that connects is not refused, but waits until the new process
accepts.
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
"""The descriptor of each socket. A UNIX socket also has its address, and the path, device and inode of its
file."""


def hand_over(listeners: Listeners) -> Handed:
    """Keep the sockets open and their files in place, even if the listeners are closed."""
    # On Windows no process can replace another. The new process opens its own sockets.
    return [] if os.name == "nt" else [*map(_hand_over_one, listeners)]


def _hand_over_one(listener: trio.abc.Listener[trio.abc.Stream]) -> _One:
    if isinstance(listener, UnixListener):
        fd = os.dup(listener.socket.fileno())
        return fd, (listener.address.path, *listener.leave_file())
    assert isinstance(listener, trio.SocketListener)
    return os.dup(listener.socket.fileno()), None


def take_over(handed: Handed) -> list[trio.abc.Listener[trio.SocketStream]]:
    """Make listeners of the sockets that were handed over."""
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


def restart(command: list[str], variable: str, handed: Handed) -> None:
    """Replace this process by a new one.

    Arguments:
        command: the program of the new process, and its arguments.
        variable: the environment variable that tells the new process which sockets it gets.
        handed: the sockets, for `take_over` in the new process.
    """
    for fd, _ in handed:
        os.set_inheritable(fd, True)
    os.environ[variable] = json.dumps(handed)
    os.execv(command[0], command)  # noqa: S606  (no shell is wanted)
