"""A forked child must not act for its parent.

Theory
======

A child of ``os.fork`` (or of `multiprocessing`, where it forks) has copies of the parent's sockets, keys and
counters. While it lives, its copy of a socket keeps a connection open that the parent has closed, and a port
taken that the parent has released. If it leaves the parent's blocks, as ``sys.exit`` does, it closes the
parent's connections, removes the parent's socket file, and seals under a nonce that the parent will use
again: an observer of both records can then forge one.

So one function runs in each forked child before anything else. It closes the descriptors of all sockets of
the library, and tells its streams and listeners that they belong to another process now.

It closes descriptors without ``shutdown``, which would act on the parent's connection, and without Trio's
``close``: that changes the epoll instance, which parent and child share. Closing a descriptor that the parent
still has open does not change it.

Rule
====

A forked child must end by ``exec`` or ``os._exit``. Trio itself demands this: a child that runs the parent's
event loop takes the parent's events from the shared epoll instance. This file keeps such a child from harming
connections and socket files, and no more.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Protocol, cast
from weakref import WeakSet

import trio


class Abandonable(Protocol):
    """A stream or a listener of the library."""

    def abandon(self) -> None:
        """Release everything without acting on it: this is a forked child, and the parent owns it."""


_inherited: WeakSet[Abandonable | trio.socket.SocketType] = WeakSet()


def abandon_in_child(resource: Abandonable) -> None:
    """Make forked children abandon a stream or listener of the library."""
    _inherited.add(resource)


def close_in_child(resource: object) -> None:
    """Make forked children close the socket below a stream or listener of Trio.

    Arguments:
        resource: a Trio socket, a `trio.SocketStream` or `trio.SocketListener`, or either below TLS.
            Any other object is ignored.
    """
    below = resource
    if isinstance(below, trio.SSLListener):
        below = cast("trio.SSLListener[trio.abc.Stream]", below).transport_listener
    while isinstance(below, trio.SSLStream):
        below = cast("trio.SSLStream[trio.abc.Stream]", below).transport_stream
    if isinstance(below, trio.SocketStream | trio.SocketListener):
        below = below.socket
    if isinstance(below, trio.socket.SocketType):
        _inherited.add(below)


def close_inherited(sock: trio.socket.SocketType) -> None:
    """Close the descriptor of a socket, and make the socket forget it. A second call does nothing."""
    fd = sock.detach()
    if fd >= 0:
        with suppress(OSError):  # an error must not keep the other descriptors open
            os.close(fd)


def _after_fork_in_child() -> None:
    for resource in list(_inherited):
        if isinstance(resource, trio.socket.SocketType):
            close_inherited(resource)
        else:
            resource.abandon()


if hasattr(os, "register_at_fork"):  # pragma: no branch  (not on Windows, which has no fork either)
    os.register_at_fork(after_in_child=_after_fork_in_child)
