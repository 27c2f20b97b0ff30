"""Streams that misbehave."""

from __future__ import annotations

import trio

from tests.support.helpers import WholeStream


class Deaf(WholeStream):
    """A stream that stops sending on demand, and goes on receiving."""

    broken = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.broken:
            raise trio.BrokenResourceError("nobody reads")
        await super().send_all(data)


class OddStream(trio.abc.Stream):
    """A stream that does its work, and then raises."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport
        self.odd: set[str] = set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport.send_all(data)
        if "send" in self.odd:
            raise OSError("odd")

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            return await self.transport.receive_some(max_bytes)
        except trio.Cancelled as exc:
            if "receive" in self.odd:
                raise BaseExceptionGroup("odd", [exc, OSError("odd")]) from None
            raise

    async def aclose(self) -> None:
        await self.transport.aclose()
        if "close" in self.odd:
            self.odd.remove("close")
            raise OSError("odd")
