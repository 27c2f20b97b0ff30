"""`SocketStream`: a stream over a socket, which can also send without waiting and receives without copying.

Trio's own stream lets other tasks run after every receive and every send. Here other tasks run only while a
receive waits; `send_nowait` never waits. Only public interfaces of Trio are used.

Trio's socket sends only when it is awaited. ``os.write`` cannot suppress SIGPIPE: if a program has that
signal at its default, writing to a socket whose peer is gone ends the process. So each stream has a second
`socket.socket` for the descriptor of Trio's socket, and sends through it with ``MSG_NOSIGNAL``. Before each
use it asks Trio's socket whether it is still open: if the application has closed it, the number may belong to
another file by now. The second socket never closes the descriptor.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final, final

import trio

from .._fork import abandon_in_child, close_inherited
from .._protocol.outbox import MIN_BATCH_SIZE
from .fast import FastStream, Load, PlainStream

if sys.platform == "linux":  # pragma: no branch
    import fcntl
    import termios

RECEIVE_SIZE: Final = 2**17
"""Bytes received at once: two batches, so that a batch fits with the headers of its records. More made no
clear difference. All that is received at once is handled before other tasks have their turn."""

MALLOC_HINT: Final = 2**22
"""Bytes of a block that is allocated and freed once. From then on glibc's malloc no longer gives the end of
the heap back to the system whenever 128 KiB of it are free (mallopt(3), "dynamic mmap threshold"). The page
faults that bring it back are expensive, see ``docs/performance.rst``."""

NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
"""The flag of a send that fails with EPIPE instead of raising SIGPIPE. macOS has a socket option instead."""

SO_NOSIGPIPE: Final = 0x1022
"""The number of that option on macOS (``sys/socket.h``). Python has no name for it."""

QUEUED: Final = struct.Struct("=i")
"""The result of SIOCOUTQ."""

TCP_INFO: Final = struct.Struct("=68xI48xQ16xII")
"""Linux's ``struct tcp_info``: rtt, bytes_acked, notsent_bytes and min_rtt of it."""


class _Scratch(threading.local):
    """The buffer into which all streams of a thread receive, one at a time. So an idle stream needs none."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RECEIVE_SIZE))
        bytearray(MALLOC_HINT)


_scratch = _Scratch()


class _Borrowed(socket.socket):
    """A second socket object for a descriptor that another socket owns. It never closes the descriptor."""

    def __init__(self, owner: trio.socket.SocketType) -> None:
        super().__init__(owner.family, owner.type, owner.proto, fileno=owner.fileno())
        self.setblocking(False)  # socket.setdefaulttimeout() may have set a timeout

    def __del__(self) -> None:
        self.detach()


@final
class SocketStream(FastStream):
    """A fast stream over the stream of a socket.

    Arguments:
        stream: Trio's stream of the socket. It belongs to this one from now on.

    Attributes:
        socket: Trio's socket.
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
        self._rest = b""
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
        """See `FastStream`. After `send_end` it keeps everything, and `send_all` raises."""
        if self._rest:
            self._rest += data
            return False
        try:
            sent = self._borrowed.send(data, NO_SIGNAL) if self.socket.fileno() >= 0 else 0
        except OSError:
            sent = 0
        if sent == len(data):
            return True
        self._rest = bytes(data[sent:])
        return False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send the rest and then the data, as Trio's stream does, but without SIGPIPE."""
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
        """Wait as Trio's stream does."""
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
        """See `FastStream`. This raises nothing if the socket is broken."""
        if self._rest:
            await self.send_all(b"")
        return self.send_end_nowait()

    def send_end_nowait(self) -> bool:
        """See `FastStream`. The peer receives everything that was sent before the end."""
        if self._rest:
            return False
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        return True

    def _count_queued(self) -> int | None:
        """Count the bytes that were sent and that the peer's system has not acknowledged yet.

        On a UNIX socket, count those that the peer has not received, with the system's overhead. None: the
        stream was closed, or the system does not tell (only Linux does).
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
        """See `FastStream`. Only TCP sockets tell it."""
        queued = self._count_queued() if self.is_tcp else None
        return queued is not None and queued < MIN_BATCH_SIZE

    def load(self) -> Load | None:
        """See `FastStream`. Only TCP sockets tell it, on Linux since 4.6."""
        if sys.platform != "linux":
            return None
        try:
            found = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
            rtt, acknowledged, unsent, min_rtt = TCP_INFO.unpack(found)
        except (OSError, struct.error):
            return None  # not TCP, or closed, or an older system
        queued = self._count_queued()
        return None if queued is None else Load(queued, unsent, acknowledged, rtt / 1e6, min_rtt / 1e6)

    # ---- receiving ----

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive as Trio's stream does."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        return bytes(await self._receive_into(_scratch.view[:max_bytes]))

    def receive_view(self) -> Coroutine[Any, Any, memoryview]:
        """See `FastStream`."""
        return self._receive_into(_scratch.view)

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
            with suppress(OSError):  # nothing is here; or the socket is broken, and the next receive raises
                return self._borrowed.recv(max_bytes)
        return b""

    def has_hung_up(self) -> bool:
        """See `FastStream`. If only one direction has ended, only Linux tells."""
        if self.socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self.socket.fileno(), getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    # ---- closing ----

    def close_nowait(self) -> bool:
        """See `FastStream`. `aclose` needs no waiting either, but it is a checkpoint."""
        self._borrowed.detach()
        self.socket.close()
        return True

    async def aclose(self) -> None:
        """Close the socket, as Trio's stream does."""
        self._borrowed.detach()
        await self._stream.aclose()

    def abandon(self) -> None:
        """See `Abandonable.abandon`. Later calls find the stream closed."""
        self._borrowed.detach()
        close_inherited(self.socket)


def make_fast(stream: trio.abc.Stream) -> FastStream:
    """Make a fast stream of any stream. The given stream belongs to it from now on."""
    if isinstance(stream, FastStream):
        return stream
    if isinstance(stream, trio.SocketStream) and sys.platform != "win32":  # never tried on Windows
        return SocketStream(stream)
    return PlainStream(stream)
