"""`FastStream`: a stream that also does, without waiting, what needs no waiting.

Most of what a small request costs is the waking of tasks. Trio's streams give others a turn at every call; a
fast stream can be given some data in passing, and keeps what did not leave.

A connection owns one fast stream, and nobody asks what it is made of: a socket (`SocketStream`), secretbox
over another fast stream (`SecretboxStream`), or any other stream (`PlainStream`), which waits for everything.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final, NamedTuple, final

import trio

from .._fork import close_in_child
from .._protocol.packets import Buffer

RECEIVE_SIZE: Final = 2**16
"""Bytes that a stream that is no socket is asked for at once: a batch."""


@final
class Load(NamedTuple):
    """What TCP has to do, as of one moment: sizes in bytes, times in seconds.

    Attributes:
        queued: written and not acknowledged.
        unsent: of these, not sent yet.
        acknowledged: of all that was ever written.
        round_trip: as of late.
        least_round_trip: the shortest in the last minutes, which tells how long the empty path is.
    """

    queued: int
    unsent: int
    acknowledged: int
    round_trip: float
    least_round_trip: float


class FastStream(trio.abc.Stream):
    """A stream, and what can be done with it without waiting.

    What `send_nowait` was given and could not write is the *rest*. It leaves before anything else, with the
    next `send_all`, which may be an empty one.
    """

    __slots__ = ()

    @property
    def can_send_nowait(self) -> bool:
        """Whether `send_nowait` may be called, if no other task sends: it can be, and there is no rest."""
        return False

    @property
    def has_rest(self) -> bool:
        """Whether a rest is kept."""
        return False

    @abstractmethod
    def send_nowait(self, data: bytes | memoryview) -> bool:
        """Write what can leave at once, and keep the rest. Return whether there is none.

        It raises nothing where the stream is broken: that keeps everything, and `send_all` finds out why.
        """

    @abstractmethod
    async def receive_view(self) -> Buffer | bytearray:
        """Receive some of what is there. It is good until the next checkpoint. Empty: the stream has ended.

        Raises as `receive_some` does.
        """

    def receive_nowait(self, max_bytes: int) -> bytes:  # noqa: ARG002
        """Return what is there already, as far as that can be told at once; else nothing."""
        return b""

    @abstractmethod
    async def send_end(self) -> bool:
        """Send the rest, and that nothing follows. Return whether the stream can say so. Again does nothing.

        Raises as `send_all` does.
        """

    def send_end_nowait(self) -> bool:
        """As `send_end`, as far as nothing has to be waited for. Return whether the end has left."""
        return False

    @abstractmethod
    def close_nowait(self) -> bool:
        """Close the stream, if that needs no waiting; return whether it was so. Again does no harm."""

    def count_unacknowledged(self) -> int:
        """Count the bytes that were written and have not arrived; 0 where the system does not say."""
        return 0

    def is_drained(self) -> bool:
        """Whether nearly nothing is unacknowledged, as far as that is known. It costs less than `load`."""
        return False

    def load(self) -> Load | None:
        """Ask what TCP has to do; None where that is not known."""
        return None

    def has_hung_up(self) -> bool:
        """Whether the peer has ended the stream, as far as that can be told without receiving."""
        return False


@final
class PlainStream(FastStream):
    """Any other stream: everything is waited for.

    Arguments:
        stream: it is this one's from now on.
    """

    __slots__ = ("_stream",)

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        close_in_child(stream)

    def send_nowait(self, data: bytes | memoryview) -> bool:  # noqa: ARG002
        """Not to be called: `can_send_nowait` is False."""
        raise AssertionError("this stream sends nothing without waiting")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream does."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream does."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream does."""
        return await self._stream.receive_some(max_bytes)

    async def receive_view(self) -> bytes | bytearray:
        """As the stream receives some."""
        return await self._stream.receive_some(RECEIVE_SIZE)

    async def send_end(self) -> bool:
        """Half-close the stream, if it can be."""
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            await self._stream.send_eof()
            return True
        return False

    def close_nowait(self) -> bool:
        """Return False: any stream may have to wait."""
        return False

    async def aclose(self) -> None:
        """As the stream does."""
        await self._stream.aclose()
