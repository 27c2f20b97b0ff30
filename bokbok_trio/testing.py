"""For the tests of applications: connections and interfaces in memory, and streams that fail on purpose.

Nothing here touches a socket or the clock by itself, so all of it works, in no time, under
`trio.testing.MockClock`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar, final

import trio
import trio.testing

from ._client import open_connection
from ._combined import CombinedHandler
from ._connection import Connection, ConnectionHandler
from ._handling import ChannelHandler, RequestHandler
from ._keys import Key
from ._server import open_server
from ._settings import Settings

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from .interface import DecodeHook, EncodeHook, Middleware

__all__ = ["FaultyStream", "MemoryListener", "consume_local", "open_connection_pair"]

_T = TypeVar("_T")


@final
class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    """A listener without a network: what `connect` returns is the other end of what it accepts."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](math.inf)

    def connect(self) -> trio.abc.Stream:
        """Make a connection and return the client's end.

        Raises:
            trio.BrokenResourceError: the listener was closed.
        """
        ours, theirs = trio.testing.memory_stream_pair()
        self._send.send_nowait(theirs)
        return ours

    async def accept(self) -> trio.abc.Stream:
        """See `trio.abc.Listener.accept`."""
        return await self._receive.receive()

    async def aclose(self) -> None:
        """Accept nothing more, and close what was not accepted."""
        with suppress(trio.WouldBlock, trio.ClosedResourceError):
            while True:
                await trio.aclose_forcefully(self._receive.receive_nowait())
        await self._receive.aclose()


@asynccontextmanager
async def open_connection_pair(
    client_handler: RequestHandler | CombinedHandler | None = None,
    server_handler: RequestHandler | CombinedHandler | None = None,
    *,
    sealed: bool = True,
    client_channel_handler: ChannelHandler | None = None,
    server_channel_handler: ChannelHandler | None = None,
    client_close_handler: ConnectionHandler | None = None,
    server_close_handler: ConnectionHandler | None = None,
    client_settings: Settings = Settings(),  # noqa: B008  (immutable)
    server_settings: Settings = Settings(),  # noqa: B008  (immutable)
    wrap: Callable[[trio.abc.Stream], trio.abc.Stream] = lambda stream: stream,
) -> AsyncGenerator[tuple[Connection, Connection]]:
    """Open both ends of a connection in memory, through the whole of handshake and server.

    ::

        async with open_connection_pair(server_handler=handler) as (client, server):
            assert await client.request(["ping", "1"]) == [b"pong", b"1"]

    Arguments:
        client_handler, server_handler: the request handlers of the two sides, or their combined handlers.
        sealed: whether it is encrypted, for the user ``"user"``, or plain.
        client_channel_handler, server_channel_handler: their channel handlers.
        client_close_handler, server_close_handler: their close handlers.
        client_settings, server_settings: the bounds of the two sides.
        wrap: what to put around the client's stream, such as a `FaultyStream`.

    What the block raises comes out as itself.
    """
    key = Key.generate()
    listener = MemoryListener()
    accepted: list[Connection] = []
    has_accepted = trio.Event()

    async def open_handler(connection: Connection) -> None:
        accepted.append(connection)
        has_accepted.set()
        await trio.lowlevel.checkpoint()

    async with (
        open_server(
            [listener],
            server_handler,
            channel_handler=server_channel_handler,
            user_key={"user": key} if sealed else None,
            open_handler=open_handler,
            close_handler=server_close_handler,
            settings=server_settings,
        ),
        open_connection(
            wrap(listener.connect()),
            user="user" if sealed else None,
            key=key if sealed else None,
            request_handler=client_handler,
            channel_handler=client_channel_handler,
            close_handler=client_close_handler,
            settings=client_settings,
        ) as client,
    ):
        await has_accepted.wait()
        yield client, accepted[0]


@asynccontextmanager
async def consume_local(
    interface: TypeForm[_T],
    implementation: object,
    *,
    middleware: Sequence[Middleware] = (),
    encode_hook: EncodeHook | None = None,
    decode_hook: DecodeHook | None = None,
) -> AsyncGenerator[_T]:
    """Serve an interface and call it, both in memory: the stand-in that a client would have.

    ::

        async with consume_local(Files, FilesInMemory()) as files:
            assert (await files.stat("/a")).size == 3

    All that a call over a network goes through is there, with every check. The user is ``"user"``. It needs
    the extra ``interface``.

    Arguments:
        interface, implementation, encode_hook, decode_hook: as for `bokbok_trio.interface.expose`.
        middleware: of the serving side.

    Raises:
        TypeError: as by `bokbok_trio.interface.expose`.
    """
    from .interface import consume, expose  # noqa: PLC0415  (the rest of this module works without msgspec)

    hooks: dict[str, Any] = {"encode_hook": encode_hook, "decode_hook": decode_hook}
    exposed = expose(interface, implementation, middleware=middleware, **hooks)
    async with open_connection_pair(server_handler=exposed) as (client, _):
        yield consume(client, interface, **hooks)


@final
class FaultyStream(trio.abc.Stream):
    """A stream around another that fails as it is told, at any time.

    Arguments:
        transport: the stream to pass things on to.

    Attributes:
        most: bytes that one `receive_some` returns at most; None for no such limit.
        alter: a function that what is received passes through; returning ``b""`` ends the stream.
        broken: whether sending and receiving raise `trio.BrokenResourceError` from the next call on.
    """

    def __init__(self, transport: trio.abc.Stream) -> None:
        self._transport = transport
        self._flowing = trio.Event()
        self._flowing.set()
        self.most: int | None = None
        self.alter: Callable[[bytes], bytes] | None = None
        self.broken = False

    def stall(self) -> None:
        """Let sending wait from now on, as to a peer that has stopped reading."""
        if self._flowing.is_set():
            self._flowing = trio.Event()

    def resume(self) -> None:
        """Let sending go on."""
        self._flowing.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream.send_all`."""
        await self._may_send()
        await self._transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`."""
        await self._may_send()
        await self._transport.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream.receive_some`."""
        self._check()
        if self.most is not None:
            max_bytes = min(self.most, max_bytes or self.most)
        data = await self._transport.receive_some(max_bytes)
        return data if self.alter is None else self.alter(bytes(data))

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource.aclose`."""
        self._flowing.set()
        await self._transport.aclose()

    async def _may_send(self) -> None:
        self._check()
        await self._flowing.wait()
        self._check()

    def _check(self) -> None:
        if self.broken:
            raise trio.BrokenResourceError("this stream was told to break")
