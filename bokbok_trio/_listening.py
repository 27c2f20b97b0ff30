"""Listen on addresses: on all of them, or on none.

A host name stands for all of its addresses that this machine has, with one port.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import Sequence
from typing import Final, TypeAlias, cast

import trio

from ._addresses import (
    Address,
    AddressLike,
    TCPAddress,
    UnixAddress,
    as_address,
    is_literal,
    refuse_insecure,
    require_loopback,
)
from ._arguments import is_several
from ._errors import AddressError
from ._fork import close_in_child
from ._sockets import Target, close_all, listener_address, require_credentials, resolve, tcp_address
from ._unix_listener import listen_unix

MAX_BACKLOG: Final = 2**16 - 1
"""Connections that may wait to be accepted, if the user names no number: so many that the system's own limit
holds. Some systems keep the number in 16 bits."""

PORT_TRIES: Final = 10
"""How often to look for a port that is free at all addresses of a name, if the system chooses the port."""

_Member: TypeAlias = AddressLike | trio.abc.Listener[trio.abc.Stream]

Listeners: TypeAlias = Sequence[trio.abc.Listener[trio.abc.Stream]]

logger = logging.getLogger("bokbok_trio")


async def open_listeners(
    on: AddressLike | Sequence[_Member],
    *,
    backlog: int | None,
    mode: int,
    insecure: bool,
    credentials: bool,
    timeout: float,  # noqa: ASYNC109
) -> Listeners:
    """Return listeners for all addresses and listeners that `serve` was given.

    If it fails, it closes all of them, also those that it was given.

    Arguments:
        on: an address; or a sequence of at least one address or listener.
        backlog, mode, insecure, timeout: see `listen`.
        credentials: whether the system must tell which process connects.

    Raises:
        TypeError: `on` is neither.
        AddressError, OSError: see `listen`.
    """
    if isinstance(on, trio.abc.Listener):
        raise TypeError("pass a listener in a list: [listener]")
    members = list(cast("Sequence[_Member]", on)) if is_several(on) else [as_address(on)]
    if not members:
        raise TypeError("pass an address, or a sequence of at least one address or trio.abc.Listener")
    opened: list[trio.abc.Listener[trio.abc.Stream]] = []  # closed if a later step fails
    opened += (member for member in members if isinstance(member, trio.abc.Listener))
    listeners: list[trio.abc.Listener[trio.abc.Stream]] = []
    try:
        wanted = [each if isinstance(each, trio.abc.Listener) else as_address(each) for each in members]
        for each in wanted:
            _check_wanted(each, insecure=insecure, credentials=credentials)
        for each in wanted:
            if isinstance(each, trio.abc.Listener):
                close_in_child(each)
                listeners.append(each)
            else:
                found = await listen(each, backlog=backlog, mode=mode, insecure=insecure, timeout=timeout)
                opened += found
                listeners += found
    except BaseException:
        for listener in opened:
            await trio.aclose_forcefully(listener)
        raise
    return listeners


def _check_wanted(
    wanted: Address | trio.abc.Listener[trio.abc.Stream], *, insecure: bool, credentials: bool
) -> None:
    """Refuse an address or a listener that must not be used, as far as this is known before listening."""
    if not isinstance(wanted, trio.abc.Listener):
        address: Address | None = wanted  # `listen` checks whether it is loopback
    elif (address := listener_address(wanted)) and not insecure:
        require_loopback(address)
    if credentials:
        require_credentials(address)


@trio.lowlevel.enable_ki_protection
async def listen(
    address: Address,
    *,
    backlog: int | None,
    mode: int,
    insecure: bool,
    timeout: float,  # noqa: ASYNC109
) -> Sequence[trio.abc.Listener[trio.SocketStream]]:
    """Listen on an address, or on all addresses of a host name that this machine has.

    With port 0 the system chooses a port, the same for all of them.

    Arguments:
        address: the address.
        backlog: connections that may wait to be accepted, 0 or more; None for the system's limit.
        mode: the permissions of a UNIX socket's file.
        insecure: whether a TCP address may be other than loopback.
        timeout: seconds for the look-up of a name, and for the lock on the directory of a UNIX socket.

    Raises:
        AddressError: the address is in use, or is not for listening.
        OSError: the name is not found, or the system does not allow it.
    """
    await trio.lowlevel.checkpoint()
    backlog = MAX_BACKLOG if backlog is None else min(backlog, MAX_BACKLOG)
    if isinstance(address, UnixAddress):
        return [await listen_unix(address, backlog=backlog, mode=mode, timeout=timeout)]
    if address.host:
        targets = await _resolve_to_listen(address, insecure=insecure, timeout=timeout)
    else:
        if not insecure:
            raise refuse_insecure("all interfaces")
        targets = [Target(socket.AF_INET, ("0.0.0.0", address.port))]  # noqa: S104  (the user asked for all interfaces)
        targets += [Target(socket.AF_INET6, ("::", address.port))]
    sockets = _bind_all(address, targets, backlog)
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets]
    for listener in listeners:
        close_in_child(listener)
    return listeners


async def _resolve_to_listen(address: TCPAddress, *, insecure: bool, timeout: float) -> Sequence[Target]:  # noqa: ASYNC109
    with trio.move_on_after(timeout):
        return await resolve(address, insecure=insecure)
    text = f"looking up the host of {address} took more than {timeout:g} seconds (connect_timeout)"
    raise TimeoutError(errno.ETIMEDOUT, text)


_NOT_HERE: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Errors of an address that this machine does not have, such as ``::1`` in many containers."""


def _bind_all(address: TCPAddress, targets: Sequence[Target], backlog: int) -> list[socket.socket]:
    """Listen on all addresses of a host with one port. This machine may lack some addresses of a name."""
    may_miss = ":" not in address.host and not is_literal(address.host)  # with a name, or with all interfaces
    tries = 1 if address.port else PORT_TRIES
    while True:
        tries -= 1
        try:
            sockets, missing = _bind_each(targets, address.port, backlog, may_miss=may_miss)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            if not tries:
                raise AddressError(f"{address} is in use: {exc.strerror}") from exc
        else:
            for error in missing:
                logger.warning("%s: not listening on one of its addresses: %s", address, error.strerror)
            return sockets


def _bind_each(
    targets: Sequence[Target], port: int, backlog: int, *, may_miss: bool
) -> tuple[list[socket.socket], list[OSError]]:
    """Listen on several addresses with one port; the system chooses it for the first one if it is 0.

    Returns:
        The sockets, and the errors of the addresses that this machine does not have.
    """
    sockets: list[socket.socket] = []
    missing: list[OSError] = []
    try:
        for target in targets:
            try:
                sockets.append(_bind(target, port, backlog))
            except OSError as exc:
                if not may_miss or exc.errno not in _NOT_HERE:
                    raise
                missing.append(exc)
            else:
                port = sockets[0].getsockname()[1]
        if not sockets:
            raise missing[0]
    except BaseException:
        close_all(sockets)
        raise
    return sockets, missing


def _bind(target: Target, port: int, backlog: int) -> socket.socket:
    try:
        sock = socket.socket(target.family, socket.SOCK_STREAM)
        try:
            if sys.platform != "win32":  # pragma: no branch  (Windows would let others take the port)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if target.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((target.where[0], port, *target.where[2:]))
            sock.listen(backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        where = tcp_address((target.where[0], port, *target.where[2:]))
        raise OSError(exc.errno, f"cannot listen on {where}: {exc.strerror}") from exc
    return sock
