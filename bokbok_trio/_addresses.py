"""Addresses: parse and print them, and tell which of them plain TCP may use. No sockets.

A TCP address is a host (a name, an IPv4 or an IPv6 address, or empty: all interfaces) and a port; a
UNIX address is a path. As strings::

    HOST:PORT   [V6]:PORT   [V6%ZONE]:PORT   :PORT   tcp:HOST:PORT        TCP
    PATH/WITH/A/SLASH   unix:PATH                                         UNIX

`parse_address` of ``str(address)`` is an equal address.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias, cast, final

from ._errors import AddressError, escape

MAX_PORT: Final = 2**16 - 1

MAX_PATH_SIZE: Final = 107
"""Bytes of a UNIX socket's path on Linux: ``sun_path`` without its final zero. Some systems allow fewer."""

_PREFIXES: Final = ("unix:", "tcp:")

_URL = re.compile(r"(?!unix:)[a-z][a-z0-9+.-]*://", re.ASCII | re.IGNORECASE)
"""How a URL begins. As a path, a URL would make a file with an odd name, or name a directory that is missing.
"""

_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_HOST = re.compile(r"[^\s\x00-\x1f\x7f:\[\]/@,]+")


@final
@dataclass(frozen=True, slots=True)
class TCPAddress:
    """A TCP address.

    Arguments:
        host: a name, an IPv4 address, an IPv6 address (without brackets, a zone allowed), or empty
            to listen on all interfaces.
        port: 0 to 65,535. A listener with port 0 gets a free port from the system.

    Raises:
        TypeError: `host` is not a str, or `port` is not an int.
        AddressError: the host or the port is invalid.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not isinstance(self.port, int):
            raise TypeError("pass the host of a TCPAddress as a str, and its port as an int")
        if not 0 <= self.port <= MAX_PORT:
            raise AddressError(f"port {self.port} is out of range: use 0 to {MAX_PORT}")
        if ":" in self.host:
            _parse_ip(self.host)
        if self.host and _HOST.fullmatch(self.host.replace(":", ".")) is None:
            raise AddressError(f"invalid host: {self.host!r}")

    def __str__(self) -> str:
        text = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return f"tcp:{text}" if text.startswith(_PREFIXES) else text


@final
@dataclass(frozen=True, slots=True, init=False)
class UnixAddress:
    """The address of a UNIX-domain socket.

    Arguments:
        path: the file's path, 1 to 107 bytes; a str or a path object, such as a `pathlib.Path`.

    Attributes:
        path: the same path, as a str.

    ``str(address)`` escapes control characters, because a peer chooses its path: it is always one line.

    Raises:
        TypeError: `path` is neither a str nor a path object.
        AddressError: the path is empty, too long, or contains a zero byte.
    """

    path: str

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text: object = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not isinstance(text, str):
            raise TypeError(f"pass the path of a UnixAddress as a str or a path, not {type(text).__name__}")
        try:
            size = len(os.fsencode(text))
        except UnicodeEncodeError:
            raise AddressError(f"invalid path: {text!r}") from None
        if not 1 <= size <= MAX_PATH_SIZE or "\0" in text:
            raise AddressError(
                f"invalid path: {text!r}; the path of a UNIX socket has 1 to {MAX_PATH_SIZE} bytes, none 0"
            )
        object.__setattr__(self, "path", text)

    def __str__(self) -> str:
        path = escape(self.path)
        plain = "/" in path and not path.startswith(_PREFIXES) and not _URL.match(path)
        return path if plain else f"unix:{path}"


Address: TypeAlias = TCPAddress | UnixAddress

AddressLike: TypeAlias = str | os.PathLike[str] | Address
"""An address as a user may pass it. A path object is the path of a UNIX socket, with or without a slash."""


def _parse_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        raise AddressError(
            f"invalid IP address: {host!r}; write an IPv6 address with its port as [ADDRESS]:PORT"
        ) from None


def parse_address(text: str) -> Address:
    """Parse an address.

    Raises:
        AddressError: the address is invalid.
    """
    if url := _URL.match(text):
        raise AddressError(
            f"invalid address: {text!r}; leave {url[0]!r} out, as in HOST:PORT, or write unix:PATH for a path"
        )
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
        raise AddressError(
            f"invalid address: {text!r}; use HOST:PORT, [IPV6]:PORT, :PORT, or a path with a /"
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _parse_ip(host).version != 6:  # noqa: PLR2004  (IPv6)
            raise AddressError(f"invalid address: {text!r}; only IPv6 addresses go in brackets")
    elif ":" in host:
        raise AddressError(f"ambiguous port: {text!r}; put an IPv6 address in brackets, as in [::1]:80")
    return TCPAddress(host, int(port))


def as_address(value: object) -> Address:
    """Return the address that a user passed: parse a str, and take a path object for a UNIX socket.

    Raises:
        TypeError: the value is neither an address, a str nor a path object.
        AddressError: the address is invalid.
    """
    if isinstance(value, str):
        return parse_address(value)
    if isinstance(value, TCPAddress | UnixAddress):
        return value
    if isinstance(value, os.PathLike):
        return UnixAddress(cast("os.PathLike[str]", value))
    raise TypeError(
        f"pass an address as a str, a path, a TCPAddress or a UnixAddress, not {type(value).__name__}"
    )


# ---- literal addresses, and plain TCP ----


# Cached because programs dial few hosts, and the same ones again and again.
@lru_cache(maxsize=64)
def is_literal(host: str) -> bool:
    """Return whether a host is an IP address without a zone, which needs no look-up of any kind."""
    if "%" in host:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Return whether an IP address is a loopback address, of this machine only."""
    ip = ipaddress.ip_address(host)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def refuse_insecure(where: object) -> AddressError:
    """Make the error for plain TCP that would leave this machine."""
    return AddressError(f"plain TCP with {where}, which is not loopback, needs insecure=True (or a key)")


def require_loopback(address: Address | None) -> None:
    """Refuse the TCP address of a socket, or of its peer, that is not loopback.

    Raises:
        AddressError: the address is not loopback.
    """
    if isinstance(address, TCPAddress) and not is_loopback(address.host):
        raise refuse_insecure(address.host)


def check_dialable(address: Address, *, insecure: bool) -> None:
    """Refuse an address that `dial` would refuse without a look-up.

    Raises:
        AddressError: the address is good only for listening, or it needs `insecure`.
    """
    if isinstance(address, UnixAddress):
        return
    if not address.host or not address.port:
        raise AddressError(f"{address} is for listening and cannot be dialled: give a host and a port")
    if not insecure and is_literal(address.host):
        require_loopback(address)
