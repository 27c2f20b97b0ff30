"""Sockets: find the addresses of a host, dial them, and tell the peer's address and credentials.

A host name is looked up once. The check that plain TCP stays on this machine, and dialling or listening, use
the same addresses. Look-ups run in threads that are counted apart from those of `trio.to_thread`, because one
that hangs keeps its thread after its task was cancelled.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, cast, final

import trio

from ._addresses import (
    Address,
    TCPAddress,
    UnixAddress,
    check_dialable,
    is_literal,
    is_loopback,
    refuse_insecure,
)
from ._errors import AddressError
from ._fork import close_in_child
from ._look_ups import look_up_in_thread
from ._trio_util import bare_nursery
from ._unix_listener import UnixListener

STAGGER: Final = 0.25
"""Seconds after which the next address of a name is tried beside the one before: the "Connection Attempt
Delay" that RFC 8305 recommends, and that Trio uses."""

BACKLOG_POLL: Final = 0.02
"""Seconds between attempts to connect to a UNIX socket with a full backlog, whose end the system does not
tell.
"""

UCRED: Final = struct.Struct("@iII")
"""Linux's ``struct ucred``: pid, uid, gid."""

AF_UNIX: Final = getattr(socket, "AF_UNIX", None)
"""None on Windows."""


@final
class Target(NamedTuple):
    """An address as the system takes it. Its str is for messages."""

    family: int
    where: tuple[str, int] | tuple[str, int, int, int]

    def __str__(self) -> str:
        return str(tcp_address(self.where))


# ---- finding the addresses of a host ----


async def resolve(address: TCPAddress, *, insecure: bool) -> Sequence[Target]:
    """Return the addresses of a host, each once.

    Raises:
        AddressError: the name is invalid; or one of its addresses is not loopback, without `insecure`.
        OSError: the name or the zone is not found.
    """
    host, port = address.host, address.port
    if is_literal(host):
        targets = [Target(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port))]
    else:
        targets = list(dict.fromkeys(await _look_up(address)))
    for target in targets:
        if not insecure and not is_loopback(str(target.where[0])):
            raise refuse_insecure(tcp_address(target.where).host)
    return targets


async def _look_up(address: TCPAddress) -> list[Target]:
    host, port = address.host, address.port
    try:
        if ":" in host:  # an IPv6 address with a zone, which needs no look-up of a name
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        elif (
            _has_custom_resolver() or not host.isascii()
        ):  # Trio encodes such names by IDNA 2008, Python does not
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        else:
            look_up = partial(socket.getaddrinfo, host.encode(), port, type=socket.SOCK_STREAM)
            found = await look_up_in_thread(host, look_up)
    except UnicodeError as exc:
        raise AddressError(f"invalid host name: {host!r}: {exc}") from exc
    except OSError as exc:
        raise type(exc)(exc.errno, f"cannot look up the host of {address}: {exc.strerror or exc}") from exc
    if not found:
        raise OSError(errno.EADDRNOTAVAIL, f"the host of {address} has no address")
    return [Target(family, cast("tuple[str, int]", where)) for family, _, _, _, where in found]


def _has_custom_resolver() -> bool:
    """Return whether `trio.socket.set_custom_hostname_resolver` was used. Only another call of it tells."""
    resolver = trio.socket.set_custom_hostname_resolver(None)
    trio.socket.set_custom_hostname_resolver(resolver)
    return resolver is not None


# ---- dialling ----


@trio.lowlevel.enable_ki_protection
async def dial(address: Address, *, insecure: bool, timeout: float) -> trio.SocketStream:  # noqa: ASYNC109
    """Connect to an address. It is not always a checkpoint: the handshake that follows is one.

    Arguments:
        address: the address of the peer. The addresses of a host name are tried in the order of RFC 8305,
            each `STAGGER` seconds after the one before, or as soon as that one failed. The first one that
            answers wins.
        insecure: whether a TCP address may be other than loopback.
        timeout: seconds for all of this, including the look-up; `math.inf` for no limit but the system's.

    Raises:
        AddressError: the address cannot be dialled.
        OSError: the name is not found, or no server answers (`TimeoutError` after `timeout`).
    """
    check_dialable(address, insecure=insecure)
    await trio.lowlevel.checkpoint_if_cancelled()
    step = "connecting to"
    with trio.move_on_after(timeout):
        if isinstance(address, UnixAddress):
            return trio.SocketStream(await _dial_unix(address))
        step = "looking up the host of"
        targets = await resolve(address, insecure=insecure)
        step = "connecting to"
        return trio.SocketStream(await _dial_first(address, _reorder(targets)))
    text = f"{step} {address} took more than {timeout:g} seconds (connect_timeout)"
    raise TimeoutError(errno.ETIMEDOUT, text)


async def _dial_unix(address: UnixAddress) -> trio.socket.SocketType:
    if AF_UNIX is None:
        raise AddressError(f"cannot dial {address}: this system has no UNIX sockets")
    try:
        return await _connect(AF_UNIX, address.path)
    except OSError as exc:
        await trio.lowlevel.checkpoint()  # for those who try again and again
        raise OSError(exc.errno, exc.strerror, address.path) from exc


def _reorder(targets: Sequence[Target]) -> Sequence[Target]:
    """Move the first address of another family to the second position: RFC 8305, section 4."""
    for at, target in enumerate(targets):
        if target.family != targets[0].family:
            return [targets[0], target, *targets[1:at], *targets[at + 1 :]]
    return targets


async def _dial_first(address: TCPAddress, targets: Sequence[Target]) -> trio.socket.SocketType:
    """Connect to the first of several addresses that answers."""
    errors: list[OSError] = []
    if len(targets) == 1:
        sock = await _attempt(targets[0], errors)
    else:
        sock = await _race(targets, errors)
    if sock is not None:
        return sock
    await trio.lowlevel.checkpoint()  # for those who try again and again
    reasons = "; ".join(str(error.strerror) for error in errors).removeprefix(f"{address}: ")
    raise OSError(errors[-1].errno, f"cannot connect to {address}: {reasons}") from errors[-1]


async def _attempt(target: Target, errors: list[OSError]) -> trio.socket.SocketType | None:
    """Connect to an address; None: it failed, and the error is in `errors`."""
    try:
        return await _connect(target.family, target.where)
    except OSError as exc:
        errors.append(OSError(exc.errno, f"{target}: {exc.strerror}"))
        return None


async def _race(targets: Sequence[Target], errors: list[OSError]) -> trio.socket.SocketType | None:
    """Connect to several addresses, each started some time after the one before, until one answers."""
    connected: list[trio.socket.SocketType] = []

    async def run(target: Target, ended: trio.Event) -> None:
        if sock := await _attempt(target, errors):
            connected.append(sock)
            race.cancel()
        ended.set()

    try:
        with trio.CancelScope() as race:
            async with bare_nursery() as nursery:
                for target in targets:
                    ended = trio.Event()
                    nursery.start_soon(run, target, ended)
                    with trio.move_on_after(STAGGER):
                        await ended.wait()
    except BaseException:
        close_all(connected)
        raise
    close_all(connected[1:])
    return connected[0] if connected else None


RESET: Final = struct.pack("ii", 1, 0)
"""A linger of 0 seconds: closing the socket resets the connection."""

_CONNECTING: Final = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}
"""Errors that mean that the system is still connecting."""


async def _connect(family: int, where: str | tuple[object, ...]) -> trio.socket.SocketType:
    """Connect a new socket. It waits only if the system does not connect at once, as it does over loopback.

    For a literal address this is called without a look-up, a nursery or a task, because they take long beside
    it.
    """
    ours = socket.socket(family, socket.SOCK_STREAM)
    sock = trio.socket.from_stdlib_socket(ours)
    close_in_child(sock)
    try:
        error = ours.connect_ex(where)
        if family == AF_UNIX:
            while error == errno.EAGAIN:  # the backlog is full
                await trio.sleep(BACKLOG_POLL)
                error = ours.connect_ex(where)
        elif error in _CONNECTING:
            error = ours.connect_ex(where)  # over loopback it has ended by now
            if error in _CONNECTING:
                await trio.lowlevel.wait_writable(ours)
                error = ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error in {0, errno.EISCONN} and family != AF_UNIX and ours.getsockname() == ours.getpeername():
            # The socket is connected to itself (TCP's simultaneous open): no server listens, and the system
            # chose that very port for this end. A reset frees the port at once, for a server that starts
            # later. Go's net package does the same.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            error = errno.ECONNREFUSED
        if error not in {0, errno.EISCONN}:
            raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock


def close_all(sockets: Sequence[socket.socket | trio.socket.SocketType]) -> None:
    """Close sockets."""
    for sock in sockets:
        sock.close()


# ---- the addresses of open sockets ----


def stream_address(stream: trio.abc.Stream) -> Address | None:
    """Return the address of the peer of a socket. For a UNIX socket it is the path of either end.

    None: the stream is not a socket, the peer is gone, or neither end of the UNIX socket has a path.
    """
    if not isinstance(stream, trio.SocketStream):
        return None
    sock = stream.socket
    try:
        name = sock.getpeername()
        if sock.family != AF_UNIX:
            return tcp_address(name)
        return _unix_address(name) or _unix_address(sock.getsockname())
    except OSError:
        return None  # the peer is gone already


def listener_address(listener: trio.abc.Listener[trio.abc.Stream]) -> Address | None:
    """Return the address of a listener, with its real port; None: the listener is not a socket."""
    if isinstance(listener, UnixListener):
        return listener.address
    if not isinstance(listener, trio.SocketListener):
        return None
    name = listener.socket.getsockname()
    if listener.socket.family == AF_UNIX:
        return _unix_address(name)
    return tcp_address(name)


def _unix_address(name: object) -> UnixAddress | None:
    """Return the address of one end of a UNIX socket; None: it has no path, or an invalid one.

    A peer may bind its own end to any name that the system allows.
    """
    try:
        return UnixAddress(name) if isinstance(name, str) else None
    except AddressError:
        return None


def tcp_address(name: Sequence[object]) -> TCPAddress:
    """Return the address of a socket's name, as the system calls it, with its zone."""
    host, port, *rest = name
    zone = cast("int", rest[1]) if len(rest) > 1 else 0
    if not zone:
        return TCPAddress(str(host), int(str(port)))
    try:
        return TCPAddress(f"{host}%{socket.if_indextoname(zone)}", int(str(port)))
    except (OSError, AddressError):  # the interface is gone, or its name has a character that no host has
        return TCPAddress(f"{host}%{zone}", int(str(port)))


# ---- the credentials of the peer ----


@final
@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """The process at the other end of a UNIX socket, according to the system.

    The values are from the moment when a client connected or a server began to listen. The process may have
    changed its user since, or have passed its socket to another process.

    Attributes:
        pid: the number of the process; 0 if this process cannot see it, from inside a container. Another
            process may have the number by now: use it in a log, and not for decisions.
        uid: its effective user; the overflow uid, mostly 65534 (``nobody``), if the user has no number in the
            user namespace of this process.
        gid: its effective group, likewise.
    """

    pid: int
    uid: int
    gid: int


def stream_credentials(stream: trio.abc.Stream) -> PeerCredentials | None:
    """Return the process at the other end of a UNIX socket; None for other streams and other systems than
    Linux.
    """
    if sys.platform != "linux" or not isinstance(stream, trio.SocketStream):
        return None
    if stream.socket.family != socket.AF_UNIX:
        return None
    try:
        found = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    except OSError:
        return None  # the socket is closed
    return PeerCredentials(*UCRED.unpack(found))


def require_credentials(address: Address | None) -> None:
    """Refuse to listen if it is known that the system does not tell which process connects.

    Raises:
        AddressError: the system is not Linux, or the address is a TCP address.
    """
    if sys.platform != "linux":
        raise AddressError("peer_user needs Linux: this system does not tell who connects")
    if isinstance(address, TCPAddress):
        raise AddressError(f"peer_user needs a UNIX socket, and {address} is a TCP address")
