"""Addresses: parsing them, dialling them, listening on them; and who is at the other end.

A TCP address is a host (a name, an IPv4 or an IPv6 address, or empty: all interfaces) and a port; a
UNIX address is a path. As strings::

    HOST:PORT   [V6]:PORT   :PORT   tcp:HOST:PORT        TCP
    PATH/WITH/A/SLASH   unix:PATH                        UNIX

The file of a UNIX socket is made under a lock on its directory, so that of two servers that start
together one wins, and it has its mode before anyone can connect.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import socket
import stat
import struct
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias, final

import trio

from ._errors import AddressError

MAX_PORT: Final = 2**16 - 1

MAX_PATH_SIZE: Final = 107
"""Bytes of a UNIX socket's path on Linux: ``sun_path`` less its final zero. Fewer on some systems."""

LOCK_POLL: Final = 0.02
"""Seconds between attempts at the lock on a directory. It is held for some system calls only, by us;
but anyone who can open the directory can hold it for as long as they like, so waiting for it must be
possible to cancel."""

UCRED: Final = struct.Struct("@iII")
"""Linux's ``struct ucred``: pid, uid, gid."""

logger = logging.getLogger("bokbok_trio")

_PREFIXES: Final = ("unix:", "tcp:")

_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_HOST = re.compile(r"[^\s\x00-\x1f\x7f:\[\]/@,]+")


@final
@dataclass(frozen=True, slots=True)
class TCPAddress:
    """A TCP address.

    Arguments:
        host: a name, an IPv4 address, an IPv6 address (without brackets, a zone allowed), or empty
            to listen on all interfaces.
        port: 0 to 65,535; 0, when listening, lets the system choose.

    Raises:
        TypeError: `host` is no str or `port` no int.
        AddressError: either is none that can be.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not isinstance(self.port, int):
            raise TypeError("a TCP address takes a str and an int")
        if not 0 <= self.port <= MAX_PORT:
            raise AddressError(f"a port is 0 to {MAX_PORT}, and not {self.port}")
        if ":" in self.host:
            _parse_ip(self.host)
        if self.host and _HOST.fullmatch(self.host.replace(":", ".")) is None:
            raise AddressError(f"no host: {self.host!r}")

    def __str__(self) -> str:
        text = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return f"tcp:{text}" if text.startswith(_PREFIXES) else text


@final
@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The address of a UNIX-domain socket.

    Arguments:
        path: the file's path, 1 to 107 bytes.

    Raises:
        TypeError: `path` is no str.
        AddressError: it is empty, too long, or has a zero in it.
    """

    path: str

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise TypeError(f"a UNIX address takes a str, not {type(self.path).__name__}")
        try:
            size = len(os.fsencode(self.path))
        except UnicodeEncodeError:
            raise AddressError(f"no path: {self.path!r}") from None
        if not 1 <= size <= MAX_PATH_SIZE or "\0" in self.path:
            raise AddressError(f"the path of a UNIX socket is 1 to {MAX_PATH_SIZE} bytes: {self.path!r}")

    def __str__(self) -> str:
        plain = "/" in self.path and not self.path.startswith(_PREFIXES)
        return self.path if plain else f"unix:{self.path}"


Address: TypeAlias = TCPAddress | UnixAddress


def _parse_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        raise AddressError(
            f"no IP address: {host!r}; an IPv6 address with a port is [ADDRESS]:PORT"
        ) from None


def parse_address(text: str) -> Address:
    """Parse an address.

    Raises:
        AddressError: it is none.
    """
    if text.startswith("unix:"):
        return UnixAddress(text.removeprefix("unix:"))
    if text.startswith("tcp:"):
        return _parse_tcp(text.removeprefix("tcp:"))
    if "/" in text:
        return UnixAddress(text)
    return _parse_tcp(text)


def _parse_tcp(text: str) -> TCPAddress:
    host, colon, port = text.rpartition(":")
    if not colon or _PORT.fullmatch(port) is None:
        raise AddressError(f"{text!r} is no address: HOST:PORT, [V6]:PORT, :PORT or a path with a / are")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _parse_ip(host).version != 6:  # noqa: PLR2004  (IPv6)
            raise AddressError(f"brackets are for IPv6: {text!r}")
    elif ":" in host:
        raise AddressError(f"which of it is the port? An IPv6 address goes in brackets: {text!r}")
    return TCPAddress(host, int(port))


def as_address(value: object) -> Address:
    """Take an address, or a str that is one.

    Raises:
        TypeError: it is neither.
        AddressError: it is a str that is none.
    """
    if isinstance(value, str):
        return parse_address(value)
    if isinstance(value, TCPAddress | UnixAddress):
        return value
    raise TypeError(f"an address is a str, a TCPAddress or a UnixAddress, not {type(value).__name__}")


# ---- plain TCP stays at home ----


# Programs dial few hosts, and again and again; remembering what they are saves 8 us each time.
@lru_cache(maxsize=64)
def _is_numeric(host: str) -> bool:
    """Whether a host is an IP address that needs no look-up; a zone does."""
    if "%" in host:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=64)
def _is_loopback(host: str) -> bool:
    """Whether a numeric address is of this machine only."""
    ip = ipaddress.ip_address(host)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def _refuse_insecure(where: object) -> AddressError:
    return AddressError(f"plain TCP with {where}, which is not loopback, needs insecure=True (or a key)")


@contextmanager
def _name_errors(address: TCPAddress) -> Generator[None]:
    """A name that DNS cannot have is a UnicodeError of the look-up."""
    try:
        yield
    except UnicodeError as exc:
        raise AddressError(f"no host name: {address.host!r}: {exc}") from exc


async def _check_stays_home(address: TCPAddress) -> None:
    """Refuse a host that is, or may be, elsewhere, before anything is dialled or opened."""
    if not address.host:
        raise _refuse_insecure("all interfaces")
    if _is_numeric(address.host):
        require_loopback(address)
        return
    with _name_errors(address):
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for *_, name in found:
        if not _is_loopback(str(name[0])):
            raise _refuse_insecure(name[0])


def require_loopback(address: Address | None) -> None:
    """Refuse the TCP address of an open socket, ours or its peer's, that is not loopback.

    Raises:
        AddressError: so it is.
    """
    if isinstance(address, TCPAddress) and not _is_loopback(address.host):
        raise _refuse_insecure(address.host)


# ---- dialling ----


async def check_dialable(address: Address, *, insecure: bool) -> None:
    """Refuse an address that `dial` would refuse, without dialling it.

    Raises:
        AddressError: so it is.
        OSError: the name is not found.
    """
    if isinstance(address, UnixAddress):
        return
    if not address.host or not address.port:
        raise AddressError(f"{address} says where to listen, not whom to dial")
    if not insecure:
        await _check_stays_home(address)


async def dial(address: Address, *, insecure: bool) -> trio.SocketStream:
    """Connect to an address. Not always a checkpoint: the handshake that follows is one.

    Arguments:
        address: where to; of several addresses of a host name the first that answers.
        insecure: whether a TCP address that is not loopback will do.

    Raises:
        AddressError: the address cannot be dialled.
        OSError: nobody answers there.
    """
    await check_dialable(address, insecure=insecure)
    if isinstance(address, UnixAddress):
        return await trio.open_unix_socket(address.path)
    if _is_numeric(address.host):
        return await _dial_numeric(address)
    with _name_errors(address):
        return await trio.open_tcp_stream(address.host, address.port)


_CONNECTING: Final = {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK}
"""What the system says of a connection that is under way."""


async def _dial_numeric(address: TCPAddress) -> trio.SocketStream:
    """What `trio.open_tcp_stream` does for names, where there is but one address to try.

    A look-up, a nursery and a task less make 46 us out of 138. To wait only where the system does not
    connect at once, as it does over loopback, saves 15 us more; then this is no checkpoint.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await _connect(sock, (address.host, address.port))
            return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        await trio.lowlevel.checkpoint()  # for those who try again and again
        raise OSError(f"all attempts to connect to {address} failed: {exc}") from exc


async def _connect(sock: socket.socket, where: tuple[str, int]) -> None:
    sock.connect_ex(where)
    error = sock.connect_ex(where)  # to ask again tells what became of it
    if error in _CONNECTING:
        await trio.lowlevel.wait_writable(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error not in {0, errno.EISCONN}:
        raise OSError(error, os.strerror(error))


def stream_address(stream: trio.abc.Stream) -> Address | None:
    """The address of the peer at the other end of a socket; of a UNIX socket, the path it is on.

    None for other streams, and where a UNIX socket has no path on either end.
    """
    if not isinstance(stream, trio.SocketStream):
        return None
    sock = stream.socket
    try:
        name = sock.getpeername()
        if sock.family != socket.AF_UNIX:
            return _socket_address(name)
        return _unix_address(name) or _unix_address(sock.getsockname())
    except OSError:
        return None  # the peer is gone already


@final
@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """The process at the other end of a UNIX socket, by the word of the system and not its own.

    All of it is as of when a client connected or a server began to listen. The process may have
    changed its user since, or have handed its socket on to another.

    Attributes:
        pid: the process; 0 of one that this process cannot see, in a container. It may be another
            one's by now: good for a log, and not to decide by.
        uid: its effective user; of one that has no number in this process's user namespace, the
            overflow uid, mostly 65534 (``nobody``).
        gid: its effective group, likewise.
    """

    pid: int
    uid: int
    gid: int


def stream_credentials(stream: trio.abc.Stream) -> PeerCredentials | None:
    """Who is at the other end of a UNIX socket; None for other streams, and on systems but Linux."""
    if sys.platform != "linux" or not isinstance(stream, trio.SocketStream):
        return None
    if stream.socket.family != socket.AF_UNIX:
        return None
    try:
        found = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
    except OSError:
        return None  # it is closed
    return PeerCredentials(*UCRED.unpack(found))


def require_credentials(address: Address | None) -> None:
    """Refuse to listen where the system will not tell who connects, as far as that is known.

    Raises:
        AddressError: so it is.
    """
    if sys.platform != "linux":
        raise AddressError("peer_user needs Linux: this system does not tell who connects")
    if isinstance(address, TCPAddress):
        raise AddressError(f"peer_user needs a UNIX socket, and {address} is none")


def _unix_address(name: object) -> UnixAddress | None:
    """The path a UNIX socket is on; None of one that is on none, or on one that is no good.

    A peer may bind its own end to anything the system allows.
    """
    try:
        return UnixAddress(name) if isinstance(name, str) else None
    except AddressError:
        return None


def _socket_address(name: Sequence[object]) -> TCPAddress:
    return TCPAddress(str(name[0]), int(str(name[1])))


# ---- listening ----


@contextmanager
def _name_use(address: Address) -> Generator[None]:
    """That somebody else has an address is an error of the address."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise AddressError(f"{address} is in use") from exc
        raise


@final
class UnixListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that unlinks its file when it closes, if the file is still its own."""

    def __init__(self, sock: trio.socket.SocketType, path: str, inode: tuple[int, int]) -> None:
        self._listener = trio.SocketListener(sock)
        self.address = UnixAddress(path)
        self._path = os.path.abspath(path)  # the working directory may change
        self._inode: tuple[int, int] | None = inode

    async def accept(self) -> trio.SocketStream:
        return await self._listener.accept()

    async def aclose(self) -> None:
        inode, self._inode = self._inode, None  # the next file may get the same
        try:
            if inode is not None and _inode(self._path) == inode:
                os.unlink(self._path)
        except OSError as exc:
            logger.warning("the file of the UNIX socket %s stays: %s", self.address, exc)
        finally:
            await self._listener.aclose()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


async def listen(
    address: Address, *, backlog: int | None, mode: int, insecure: bool
) -> Sequence[trio.abc.Listener[trio.SocketStream]]:
    """Listen on an address: on all the addresses of a host name.

    Arguments:
        address: where.
        backlog: connections that may wait to be accepted, or None for the system's choice.
        mode: the permissions of a UNIX socket's file.
        insecure: whether a TCP address that is not loopback will do.

    Raises:
        AddressError: it is in use, or cannot be listened on.
        OSError: the system says no.
    """
    if isinstance(address, UnixAddress):
        with _name_use(address):  # by a server that knows nothing of the lock
            return [await _listen_unix(address.path, backlog, mode)]
    if not insecure:
        await _check_stays_home(address)
    with _name_errors(address), _name_use(address):
        listeners = await trio.open_tcp_listeners(address.port, host=address.host or None, backlog=backlog)
    if not insecure:
        try:
            for listener in listeners:
                require_loopback(listener_address(listener))  # a name may have moved in between
        except AddressError:
            for listener in listeners:
                listener.socket.close()
            raise
    return listeners


async def _listen_unix(path: str, backlog: int | None, mode: int) -> UnixListener:
    import fcntl  # noqa: PLC0415  (not on Windows, where there are no UNIX sockets either)

    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await trio.sleep(LOCK_POLL)
        sock, inode = _bind_unix(path, backlog, mode)
    finally:
        os.close(directory)
    return UnixListener(trio.socket.from_stdlib_socket(sock), path, inode)


def _bind_unix(path: str, backlog: int | None, mode: int) -> tuple[socket.socket, tuple[int, int]]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        try:
            # Nobody can connect before listen(), so no one gets in under another mode.
            os.chmod(path, mode)
            if backlog is None:
                sock.listen()
            else:
                sock.listen(backlog)
            status = os.lstat(path)
        except BaseException:
            os.unlink(path)
            raise
    except BaseException:
        sock.close()
        raise
    return sock, (status.st_dev, status.st_ino)


def _remove_stale(path: str) -> None:
    """Make room at a path, if what is there is a socket that nobody listens on."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise AddressError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        # Accepted, or a full backlog, or no permission to ask: somebody may be there.
        raise AddressError(f"{path} is in use ({errno.errorcode.get(result, 'it answers')})")
    os.unlink(path)


def listener_address(listener: trio.abc.Listener[trio.abc.Stream]) -> Address | None:
    """The address a listener is on, the port resolved; None where it is no socket's."""
    if isinstance(listener, UnixListener):
        return listener.address
    if not isinstance(listener, trio.SocketListener):
        return None
    name = listener.socket.getsockname()
    if listener.socket.family == socket.AF_UNIX:
        return _unix_address(name)
    return _socket_address(name)
