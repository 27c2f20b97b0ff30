"""Helpers for tests of sockets: dialling and listening with the defaults, and names of any address."""

from __future__ import annotations

import errno
import socket
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio

from bokbok_trio import TCPAddress
from bokbok_trio._listening import listen
from bokbok_trio._sockets import dial, listener_address

listen_on = partial(listen, backlog=None, mode=0o600, insecure=False, timeout=10)
dial_to = partial(dial, insecure=False, timeout=10)


class FakeResolver(trio.abc.HostnameResolver):
    """A resolver that returns these addresses for every name."""

    def __init__(self, *hosts: str) -> None:
        self._hosts = hosts
        self.asked: list[bytes | None] = []

    async def getaddrinfo(self, host: bytes | None, port: Any, *_args: int) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append(host)
        found = [socket.getaddrinfo(literal, port, type=socket.SOCK_STREAM)[0] for literal in self._hosts]
        return [(*info[:3], "", info[4]) for info in found]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


def resolve_to(*hosts: str) -> FakeResolver:
    """Resolve every name to these addresses from now on."""
    resolver = FakeResolver(*hosts)
    trio.socket.set_custom_hostname_resolver(resolver)
    return resolver


def tcp_address(listener: trio.abc.Listener[trio.SocketStream]) -> TCPAddress:
    address = listener_address(listener)
    assert isinstance(address, TCPAddress)
    return address


def knock(path: str) -> int:
    """Try to connect to a UNIX socket. Return the number of the error, or 0."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path)


@contextmanager
def full_backlog(family: int, where: Any) -> Generator[socket.socket]:
    """Yield a listening socket whose backlog is full, so that it takes no more connections."""
    waiting: list[socket.socket] = []
    with socket.socket(family) as listener:
        listener.bind(where)
        listener.listen(0)
        try:
            for _ in range(6):
                waiting.append(socket.socket(family))
                waiting[-1].setblocking(False)
                if waiting[-1].connect_ex(listener.getsockname()) == errno.EAGAIN:
                    break
            yield listener
        finally:
            for sock in waiting:
                sock.close()
