"""Records made by hand, and transports that receive them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, final

import pytest
import trio
import trio.testing
from nacl.bindings import crypto_secretbox
from trio.testing import MockClock

from bokbok_trio._stream.records import MAX_PLAINTEXT_SIZE
from bokbok_trio._stream.secretbox import RECORDS_PER_SEND, SecretboxStream

T = TypeVar("T")

OUT = b"o" * 32
IN = b"i" * 32
NEXT_OUT = b"O" * 32
NEXT_IN = b"I" * 32

BATCH = RECORDS_PER_SEND * MAX_PLAINTEXT_SIZE


def seal(key: bytes, counter: int, plaintext: bytes) -> bytes:
    """Make one record, from the specification alone."""
    box = crypto_secretbox(plaintext, counter.to_bytes(24, "big"), key)
    return len(box).to_bytes(2, "big") + box


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run one example of a Hypothesis test. A hang fails at once."""

    async def bounded() -> T:
        with trio.fail_after(60):
            return await main()

    return trio.run(bounded, clock=MockClock(autojump_threshold=0))


@final
class Transport(trio.abc.Stream):
    """A transport that receives given bytes, and records its calls and the bytes sent."""

    def __init__(self, incoming: bytes = b"", most: int = 2**20) -> None:
        self.incoming = incoming
        self.most = most
        self.asked: list[int | None] = []
        self.sent: list[bytes] = []
        self.send_gate = trio.Event()
        self.send_gate.set()
        self.receive_gate = trio.Event()
        self.receive_gate.set()
        self.failure: BaseException | None = None
        self.closed = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.wait_send_all_might_not_block()
        self.sent.append(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        await self.send_gate.wait()
        if self.failure is not None:
            raise self.failure

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        await self.receive_gate.wait()
        self.asked.append(max_bytes)
        assert max_bytes is not None
        end = min(self.most, max_bytes)
        received, self.incoming = self.incoming[:end], self.incoming[end:]
        return received

    async def aclose(self) -> None:
        self.closed += 1
        await trio.lowlevel.checkpoint()


def over(transport: trio.abc.Stream, **options: int) -> SecretboxStream:
    return SecretboxStream(transport, send_key=OUT, receive_key=IN, **options)


def facing(transport: trio.abc.Stream) -> SecretboxStream:
    """Return the other end of `over`."""
    return SecretboxStream(transport, send_key=IN, receive_key=OUT)


async def receive_rest(stream: SecretboxStream) -> tuple[bytes, bool]:
    """Receive all plaintext. Return it, and whether it ended properly."""
    received = b""
    try:
        while data := await stream.receive_some():
            received += data
    except trio.BrokenResourceError:
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        return received, False
    assert await stream.receive_some() == b""
    return received, True


async def cancel_when_blocked(call: Callable[[], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def cancelled_from_the_start(call: Callable[[], Awaitable[object]]) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await call()
    assert scope.cancelled_caught


CALLS_TO_SEND: dict[str, Callable[[SecretboxStream], Awaitable[object]]] = {
    "send_all": lambda stream: stream.send_all(b"other"),
    "empty send_all": lambda stream: stream.send_all(b""),
    "send_eof": lambda stream: stream.send_eof(),
    "wait": lambda stream: stream.wait_send_all_might_not_block(),
}
SENDS: dict[str, Callable[[SecretboxStream], Awaitable[None]]] = {
    "send_all": lambda stream: stream.send_all(b"data"),
    "several batches": lambda stream: stream.send_all(bytes(BATCH + 1)),
    "send_eof": lambda stream: stream.send_eof(),
}
