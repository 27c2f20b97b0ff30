"""Streams that do what no good stream does."""

from __future__ import annotations

import trio

from tests.support.helpers import WholeStream


class Deaf(WholeStream):
    """A stream that can send no more when it is told so, and goes on receiving."""

    broken = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.broken:
            raise trio.BrokenResourceError("nobody reads")
        await super().send_all(data)
