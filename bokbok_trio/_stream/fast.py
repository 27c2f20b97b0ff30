"""`FastStream`: a stream that can also send, receive and close without waiting.

Most of the time of a small request goes into switching tasks, and every call of a Trio stream may switch. A
fast stream takes data in a plain function call. If it cannot write all of the data, it keeps the rest.

A connection owns one fast stream, and does not know its kind: a socket (`SocketStream`), secretbox over
another fast stream (`SecretboxStream`), or any other Trio stream (`PlainStream`), which always waits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable
from typing import Final, NamedTuple, final

import trio

from .._fork import close_in_child
from .._protocol.packets import Buffer

RECEIVE_SIZE: Final = 2**16
"""Bytes that one receive asks of a stream other than a socket: a batch."""


@final
class Load(NamedTuple):
    """The state of a TCP connection at one moment: sizes in bytes, times in seconds.

    Attributes:
        queued: bytes that were written and are not acknowledged.
        unsent: how many of these were not sent yet.
        acknowledged: bytes that were acknowledged since the connection was opened.
        round_trip: the recent round trip time.
        least_round_trip: the shortest in the last minutes, which is the round trip time of the empty path.
    """

    queued: int
    unsent: int
    acknowledged: int
    round_trip: float
    least_round_trip: float


class FastStream(trio.abc.Stream):
    """A Trio stream with functions that do not wait.

    The *rest* is the bytes that `send_nowait` was given and could not write. The next `send_all` sends the
    rest before anything else; its own data may be empty.
    """

    __slots__ = ()

    @property
    def can_send_nowait(self) -> bool:
        """Whether `send_nowait` may be called, if no other task sends. It must not while a rest is kept."""
        return False

    @property
    def has_rest(self) -> bool:
        """Whether a rest is kept."""
        return False

    @abstractmethod
    def send_nowait(self, data: bytes | memoryview) -> bool:
        """Write as many bytes as possible at once, and keep the rest. Return whether there is no rest.

        If the stream is broken, it raises nothing and keeps everything; `send_all` then raises the reason.
        """

    @abstractmethod
    def receive_view(self) -> Awaitable[Buffer | bytearray]:
        """Receive some bytes, which are good until the next checkpoint. Empty: the stream has ended.

        Raises as `receive_some` does.
        """

    def receive_nowait(self, max_bytes: int) -> bytes:  # noqa: ARG002
        """Return bytes that are here already; empty: there are none, or the stream cannot tell."""
        return b""

    @abstractmethod
    async def send_end(self) -> bool:
        """Send the rest, and then the end of this direction. Return whether the stream can send an end.

        A second call does nothing. Raises as `send_all` does.
        """

    def send_end_nowait(self) -> bool:
        """Send the end of this direction, if that needs no waiting. Return whether the end was sent."""
        return False

    @abstractmethod
    def close_nowait(self) -> bool:
        """Close the stream, if that needs no waiting. Return whether it is closed now."""

    def count_unacknowledged(self) -> int:
        """Count the bytes that were written and are not acknowledged; 0 if the system does not tell."""
        return 0

    def is_drained(self) -> bool:
        """Whether nearly nothing is unacknowledged; False if that is not known. It is cheaper than `load`."""
        return False

    def load(self) -> Load | None:
        """Ask for the state of the TCP connection; None if it is not known."""
        return None

    def has_hung_up(self) -> bool:
        """Whether the peer has ended the stream; False if that cannot be told without receiving."""
        return False


@final
class PlainStream(FastStream):
    """A fast stream over any Trio stream. It waits for everything.

    Arguments:
        stream: belongs to this one from now on.
    """

    __slots__ = ("_stream",)

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        close_in_child(stream)

    def send_nowait(self, data: bytes | memoryview) -> bool:  # noqa: ARG002
        """Raise: `can_send_nowait` is False, so nobody calls this."""
        raise AssertionError("this stream sends nothing without waiting")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send as the stream does."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait as the stream does."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive as the stream does."""
        return await self._stream.receive_some(max_bytes)

    async def receive_view(self) -> bytes | bytearray:
        """Receive as `receive_some` does, at most `RECEIVE_SIZE` bytes."""
        return await self._stream.receive_some(RECEIVE_SIZE)

    async def send_end(self) -> bool:
        """Half-close the stream, if it can be."""
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            await self._stream.send_eof()
            return True
        return False

    def close_nowait(self) -> bool:
        """Return False: closing the stream may have to wait."""
        return False

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()
