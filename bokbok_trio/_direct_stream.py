"""`DirectStream`: a socket's stream that can also send at once, and receives without copies.

Most of what a small request costs is the waking of tasks. Trio's own stream gives others a turn after
every receive and every send; here a receive gives them one while it waits, and `send_now` none at
all. Only public interfaces of Trio are used: the number of the socket, and waiting for it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from contextlib import suppress
from typing import Final, final

import trio

RECEIVE_SIZE: Final = 2**17
"""Bytes received at once: two batches, so that a batch and its records' headers come in one. More made
no clear difference, and what is received at once is handled before other tasks have their turn."""


MALLOC_HINT: Final = 2**22
"""Bytes of a block that is allocated and freed once. From this glibc's malloc learns (mallopt(3), "dynamic
mmap threshold") not to give the end of the heap back whenever 128 KiB of it are free: the page faults that
bring it back can take a third of a sealed echo of 64 KiB, and a quarter of one of 1 MiB."""


class _Scratch(threading.local):
    """Where all streams of a thread receive, one at a time: an idle connection needs no room."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RECEIVE_SIZE))
        bytearray(MALLOC_HINT)


_scratch = _Scratch()


@final
class DirectStream(trio.abc.Stream):
    """A stream over the one of a socket.

    Arguments:
        stream: the socket's, which is this one's from now on.

    Attributes:
        socket: Trio's.
        is_tcp: whether it is a TCP socket.
    """

    __slots__ = ("_fd", "_stream", "is_tcp", "socket")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        self.is_tcp = stream.socket.family in (socket.AF_INET, socket.AF_INET6)
        self._fd = stream.socket.fileno()  # -1 once it is closed

    def send_now(self, data: bytes) -> int:
        """Send as much of some data as the socket takes at once, and return how many bytes.

        It never raises: a broken socket takes nothing, and `send_all` finds out why. To be called only
        while no `send_all` is under way.
        """
        try:
            return os.write(self._fd, data)
        except OSError:
            return 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the socket's stream does."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the socket's stream does."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As the socket's stream does."""
        return bytes(await self.receive_view(max_bytes))

    async def receive_view(self, max_bytes: int | None = None) -> memoryview:
        """As `receive_some`, but what was received is good only until the next checkpoint."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        view = _scratch.view if max_bytes is None else _scratch.view[:max_bytes]
        if self._fd < 0:
            raise trio.ClosedResourceError("this stream was closed")
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                return view[: os.readv(self._fd, [view])]
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc

    def shutdown_send(self) -> None:
        """Send no more: the peer sees the end when it has received everything. A broken socket is left so."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close_now(self) -> None:
        """As `aclose`, which waits for nothing either, but is a checkpoint. Again does nothing."""
        self._fd = -1  # before its number can be another file's
        self.socket.close()

    async def aclose(self) -> None:
        """As the socket's stream does."""
        self._fd = -1  # as above
        await self._stream.aclose()


def make_direct(stream: trio.abc.Stream) -> trio.abc.Stream:
    """A direct stream over one of a socket; any other as it is."""
    # Elsewhere a socket is no file that one could write to.
    if isinstance(stream, trio.SocketStream) and sys.platform != "win32":
        return DirectStream(stream)
    return stream
