"""`SocketStream`: a socket's stream that can also send without waiting, and receives without copies.

Trio's own stream gives others a turn after every receive and every send; here a receive gives them one while
it waits, and `send_nowait` none at all. Only public interfaces of Trio are used.

Trio's socket cannot send without being awaited, and ``os.write`` cannot ask for no SIGPIPE: with that
signal at its default, writing to a socket whose peer is gone ends the process. So each stream keeps a
second `socket.socket` for the descriptor of Trio's, sends through it with ``MSG_NOSIGNAL``, and asks
Trio's socket before each use whether it is still open. If the application closed it, its number may
belong to another file by now. The two take as long as ``os.write`` and ``os.readv`` on a bare number
would; the second socket never closes the descriptor.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import threading
from contextlib import suppress
from typing import Final, final

import trio

from .._fork import abandon_in_child, close_inherited
from .._protocol.outbox import MIN_BATCH_SIZE
from .fast import FastStream, Load, PlainStream

if sys.platform == "linux":  # pragma: no branch
    import fcntl
    import termios

RECEIVE_SIZE: Final = 2**17
"""Bytes received at once: two batches, so that a batch and its records' headers come in one. More made
no clear difference, and what is received at once is handled before other tasks have their turn."""

MALLOC_HINT: Final = 2**22
"""Bytes of a block that is allocated and freed once. From this glibc's malloc learns (mallopt(3), "dynamic
mmap threshold") not to give the end of the heap back whenever 128 KiB of it are free: the page faults that
bring it back can take a third of a sealed echo of 64 KiB, and a quarter of one of 1 MiB."""

NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
"""The flag of a send that raises EPIPE and no SIGPIPE. macOS has an option of the socket instead."""

SO_NOSIGPIPE: Final = 0x1022
"""macOS's number of that option (``sys/socket.h``), which Python does not name."""

QUEUED: Final = struct.Struct("=i")
"""The answer of SIOCOUTQ."""

TCP_INFO: Final = struct.Struct("=68xI48xQ16xII")
"""What we read of Linux's ``struct tcp_info``: rtt, bytes_acked, notsent_bytes, min_rtt."""


class _Scratch(threading.local):
    """Where all streams of a thread receive, one at a time: an idle connection needs no room."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RECEIVE_SIZE))
        bytearray(MALLOC_HINT)


_scratch = _Scratch()


class _Borrowed(socket.socket):
    """A second socket object for a descriptor that another one owns. It never closes the descriptor."""

    def __init__(self, owner: trio.socket.SocketType) -> None:
        super().__init__(owner.family, owner.type, owner.proto, fileno=owner.fileno())
        self.setblocking(False)  # whatever socket.setdefaulttimeout() said

    def __del__(self) -> None:
        self.detach()


@final
class SocketStream(FastStream):
    """A stream over the one of a socket.

    Arguments:
        stream: the socket's, which is this one's from now on.

    Attributes:
        socket: Trio's.
        is_tcp: whether it is a TCP socket.

    Raises:
        trio.ClosedResourceError: the stream was closed.
    """

    __slots__ = ("__weakref__", "_borrowed", "_is_sending", "_rest", "_stream", "is_tcp", "socket")

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        self.is_tcp = stream.socket.family in (socket.AF_INET, socket.AF_INET6)
        self._is_sending = False
        self._rest = b""  # of what `send_nowait` was given
        self._check_open()
        self._borrowed = _Borrowed(stream.socket)
        if sys.platform == "darwin":
            self.socket.setsockopt(socket.SOL_SOCKET, SO_NOSIGPIPE, 1)
        abandon_in_child(self)

    def _check_open(self) -> None:
        if self.socket.fileno() < 0:
            raise trio.ClosedResourceError("this stream was closed")

    # ---- sending ----

    @property
    def can_send_nowait(self) -> bool:
        """See `FastStream`."""
        return not self._rest

    @property
    def has_rest(self) -> bool:
        """See `FastStream`."""
        return bool(self._rest)

    def send_nowait(self, data: bytes | memoryview) -> bool:
        """See `FastStream`. After the end was said it sends nothing, and `send_all` raises."""
        if self._rest:
            self._rest += data
            return False
        sent = 0
        if self.socket.fileno() >= 0:
            with suppress(OSError):
                sent = self._borrowed.send(data, NO_SIGNAL)
        if sent == len(data):
            return True
        self._rest = bytes(data[sent:])
        return False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the socket's stream does, but never with a SIGPIPE; and the rest first."""
        self._start_sending()
        try:
            if not data and not self._rest:
                await trio.lowlevel.checkpoint()
            rest, self._rest = self._rest, b""
            for each in (rest, data) if rest else (data,):
                with memoryview(each) as view:
                    sent = 0
                    while sent < len(view):
                        with view[sent:] as unsent:
                            sent += await self.socket.send(unsent, NO_SIGNAL)
        except OSError as exc:
            raise self._translate(exc) from exc
        finally:
            self._is_sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """As the socket's stream does."""
        self._start_sending()
        try:
            await self.socket.wait_writable()
        except OSError as exc:
            raise self._translate(exc) from exc
        finally:
            self._is_sending = False

    def _start_sending(self) -> None:
        if self._is_sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._check_open()
        if self.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("sending on this stream was shut down")
        self._is_sending = True

    def _translate(self, error: OSError) -> trio.ClosedResourceError | trio.BrokenResourceError:
        if self.socket.fileno() < 0:
            return trio.ClosedResourceError("this stream was closed")
        return trio.BrokenResourceError(str(error))

    async def send_end(self) -> bool:
        """See `FastStream`. Ignores a broken socket."""
        if self._rest:
            await self.send_all(b"")
        return self.send_end_nowait()

    def send_end_nowait(self) -> bool:
        """See `FastStream`. The peer receives what was sent, and then the end."""
        if self._rest:
            return False
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        return True

    def _count_queued(self) -> int | None:
        """Count the bytes that were sent and that the peer's system has not acknowledged yet.

        Of a UNIX socket: that the peer has not received, with the system's overhead. None: the stream was
        closed, or this system does not tell (only Linux does).
        """
        if sys.platform != "linux":
            return None
        try:
            [queued] = QUEUED.unpack(fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, bytes(QUEUED.size)))
        except (OSError, ValueError):
            return None
        return int(queued)

    def count_unacknowledged(self) -> int:
        """See `FastStream`."""
        return self._count_queued() or 0

    def is_drained(self) -> bool:
        """See `FastStream`. Only TCP tells."""
        queued = self._count_queued() if self.is_tcp else None
        return queued is not None and queued < MIN_BATCH_SIZE

    def load(self) -> Load | None:
        """See `FastStream`. Known of TCP sockets, on Linux since 4.6."""
        if sys.platform != "linux":
            return None
        try:
            found = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
            rtt, acknowledged, unsent, min_rtt = TCP_INFO.unpack(found)
        except (OSError, struct.error):
            return None  # no TCP; closed; an older system
        queued = self._count_queued()
        return None if queued is None else Load(queued, unsent, acknowledged, rtt / 1e6, min_rtt / 1e6)

    # ---- receiving ----

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As the socket's stream does."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        return bytes(await self._receive_into(_scratch.view[:max_bytes]))

    async def receive_view(self) -> memoryview:
        """See `FastStream`."""
        return await self._receive_into(_scratch.view)

    async def _receive_into(self, view: memoryview) -> memoryview:
        fileno = self.socket.fileno
        while True:
            if (descriptor := fileno()) < 0:
                raise trio.ClosedResourceError("this stream was closed")
            try:
                await trio.lowlevel.wait_readable(descriptor)
                if fileno() < 0:  # it was closed after this task was woken
                    continue
                return view[: self._borrowed.recv_into(view)]
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._translate(exc) from exc

    def receive_nowait(self, max_bytes: int) -> bytes:
        """See `FastStream`."""
        if self.socket.fileno() >= 0:
            with suppress(OSError):  # nothing is here, or it is broken, and receiving will tell
                return self._borrowed.recv(max_bytes)
        return b""

    def has_hung_up(self) -> bool:
        """See `FastStream`. Of one direction alone only Linux tells."""
        if self.socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self.socket.fileno(), getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    # ---- closing ----

    def close_nowait(self) -> bool:
        """As `aclose`, which waits for nothing either, but is a checkpoint."""
        self._borrowed.detach()
        self.socket.close()
        return True

    async def aclose(self) -> None:
        """As the socket's stream does."""
        self._borrowed.detach()
        await self._stream.aclose()

    def abandon(self) -> None:
        """See `Abandonable.abandon`. To whoever uses it then, it is closed."""
        self._borrowed.detach()
        close_inherited(self.socket)


def make_fast(stream: trio.abc.Stream) -> FastStream:
    """Make the fastest stream there is of any stream, which is that one's from now on."""
    if isinstance(stream, FastStream):
        return stream
    if isinstance(stream, trio.SocketStream) and sys.platform != "win32":  # where it was never tried
        return SocketStream(stream)
    return PlainStream(stream)
