"""A forked child must not act for its parent.

Theory
======

A child of ``os.fork`` (or of `multiprocessing`, where it forks) has copies of the parent's sockets,
keys and counters. If it lives on, its copy of a socket keeps a connection open that the parent has
closed, and a port taken that the parent has given up. If it leaves the parent's blocks, as
``sys.exit`` does, it closes connections in the parent's name, removes the parent's socket file, and
seals under a nonce that the parent will use again for something else: whoever sees both records can
then forge one.

So one function runs in each forked child, before anything else does. It closes the descriptors of all
our sockets, and tells all our streams and listeners that they are no longer this process's.

It closes descriptors without ``shutdown``, which would act on the parent's connection, and not by
Trio's ``close``: that changes the epoll instance, which parent and child share, for the parent too. To
close a descriptor that the parent still has open leaves the shared epoll instance alone.

Rule
====

A forked child leaves by ``exec`` or ``os._exit``. Trio itself demands this: a child that goes on to run
the parent's event loop takes the parent's events from the shared epoll instance. What is here makes such
a child harmless to connections and socket files, and does not make it right.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Protocol, cast
from weakref import WeakSet

import trio


class Abandonable(Protocol):
    """A stream or a listener of ours."""

    def abandon(self) -> None:
        """Give everything up without acting on it: this is a forked child, and the parent owns it."""


_inherited: WeakSet[Abandonable | trio.socket.SocketType] = WeakSet()


def abandon_in_child(resource: Abandonable) -> None:
    """Have a stream or listener of ours abandoned in forked children."""
    _inherited.add(resource)


def close_in_child(resource: object) -> None:
    """Have the socket below one of Trio's streams or listeners closed in forked children.

    Arguments:
        resource: a Trio socket, a `trio.SocketStream` or `trio.SocketListener`, or either below TLS.
            Anything else is left alone.
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
    """Close the descriptor of a socket, and have the socket forget it. Again does nothing."""
    fd = sock.detach()
    if fd >= 0:
        with suppress(OSError):  # or the next one would stay open
            os.close(fd)


def _after_fork_in_child() -> None:
    for resource in list(_inherited):
        if isinstance(resource, trio.socket.SocketType):
            close_inherited(resource)
        else:
            resource.abandon()


if hasattr(os, "register_at_fork"):  # pragma: no branch  (not on Windows, which has no fork either)
    os.register_at_fork(after_in_child=_after_fork_in_child)
