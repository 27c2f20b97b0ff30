"""A proxy that is a bad link: it cuts, stalls, delays, throttles, drops, repeats, reorders and corrupts."""
# ruff: noqa: S311  (bad luck is made of many numbers, and its dice guard nothing)

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import trio

CHUNK: Final = 2**16
"""Bytes that a link receives at once."""

ALWAYS: Final = ("delay", "stall", "throttle", "bytes", "cut", "reset", "half", "hole")
"""What may be wrong with a link where nothing would notice that its bytes are others."""

SEALED: Final = ("corrupt", "drop", "repeat", "swap")
"""What may also be wrong where each change is noticed."""


class Cut(Exception):  # noqa: N818
    """The link is over."""


class Weather:
    """What all links have in common: the dice, and whether the weather is bad at all.

    Arguments:
        seed: of the dice.
        calm: seconds, on average, from one trouble of a link to the next.
        is_sealed: whether what goes through the links is sealed.

    Attributes:
        is_bad: whether there is any trouble now.
        troubles: how often there was each.
    """

    def __init__(self, seed: int, calm: float, *, is_sealed: bool) -> None:
        self.rng = random.Random(seed)
        self.kinds = ALWAYS + SEALED * is_sealed
        self.calm = calm
        self.is_bad = False
        self.troubles: Counter[str] = Counter()


class Link:
    """One connection through the proxy."""

    def __init__(self, weather: Weather, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self._weather = weather
        self._rng = weather.rng
        self._ends = (client, server)
        self._trouble = ""
        self._is_over = trio.Event()  # that trouble

    async def run(self) -> None:
        """Be the link, until both directions have ended, or it is cut."""
        client, server = self._ends
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._have_trouble)
                async with trio.open_nursery() as both:
                    both.start_soon(self._pump, client, server)
                    both.start_soon(self._pump, server, client)
                nursery.cancel_scope.cancel()
        except* (Cut, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            for end in self._ends:
                await trio.aclose_forcefully(end)

    async def _have_trouble(self) -> None:
        """Be well for a while, then be not, for ever."""
        while True:
            await trio.sleep(self._rng.expovariate(1 / self._weather.calm))
            if self._weather.is_bad:
                self._is_over = trio.Event()
                self._trouble = self._rng.choice(self._weather.kinds)
                await trio.sleep(self._rng.choice((0.05, 0.3, 1.0, 3.0)))
                self._trouble = ""
                self._is_over.set()

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        """Pass on what comes from one end."""
        while chunk := await source.receive_some(CHUNK):
            trouble = self._trouble
            if not trouble:
                await sink.send_all(chunk)
                continue
            self._weather.troubles[trouble] += 1
            if trouble in {"half", "hole"}:  # one direction ends, or falls silent, and the other goes on
                if trouble == "half":
                    await sink.send_eof()
                while await source.receive_some(CHUNK):
                    pass
                return
            await self._pass_badly(trouble, chunk, sink)
        await sink.send_eof()

    async def _pass_badly(self, trouble: str, chunk: bytes, sink: trio.SocketStream) -> None:
        """Pass a chunk on slowly, in part, or as another."""
        at = self._rng.randrange(len(chunk))
        match trouble:
            case "delay":
                await trio.sleep(self._rng.uniform(0.001, 0.1))
                await sink.send_all(chunk)
            case "stall":
                await self._is_over.wait()
                await sink.send_all(chunk)
            case "throttle":
                for start in range(0, len(chunk), 2048):
                    await sink.send_all(chunk[start : start + 2048])
                    await trio.sleep(0.005)
            case "bytes":
                for start in range(min(len(chunk), 300)):
                    await sink.send_all(chunk[start : start + 1])
                await sink.send_all(chunk[300:])
            case "cut":
                await sink.send_all(chunk[:at])
                raise Cut
            case "reset":
                for end in self._ends:
                    reset(end)
                raise Cut
            case _:
                self._trouble = ""  # once is enough
                await sink.send_all(falsify(trouble, chunk, at))


def falsify(trouble: str, chunk: bytes, at: int) -> bytes:
    """What is passed on instead of a chunk; `at` is where in it."""
    return {
        "corrupt": chunk[:at] + bytes([chunk[at] ^ 1 << at % 8]) + chunk[at + 1 :],
        "drop": b"",
        "repeat": chunk + chunk,
        "swap": chunk[at:] + chunk[:at],
    }[trouble]


def reset(stream: trio.SocketStream) -> None:
    """Have a TCP connection reset when it is closed."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def serve_links(
    listener: trio.SocketListener, weather: Weather, dial: Callable[[], Awaitable[trio.SocketStream]]
) -> None:
    """Be the proxy, for ever.

    Arguments:
        listener: where the clients come.
        weather: of its links.
        dial: connects to the server.
    """

    async def handle(client: trio.SocketStream) -> None:
        try:
            server = await dial()
        except OSError:  # it is down
            reset(client)
            await trio.aclose_forcefully(client)
        else:
            await Link(weather, client, server).run()

    await trio.serve_listeners(handle, [listener])
