"""For the tests of applications: connections and interfaces in memory, and streams that fail on purpose.

Nothing here uses a socket or the real clock, so it all works under `trio.testing.MockClock`, without delay.
``docs/testing.rst`` has recipes, and `bokbok_trio.pytest_plugin` has fixtures.
"""

from __future__ import annotations

import math
import operator
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import trio
import trio.testing

from ._arguments import is_several
from ._client import open_connection
from ._combined import CombinedHandler
from ._connection.connection import Connection
from ._keys import Key
from ._server import Server, open_server
from ._settings import Settings
from ._types import ChannelHandler, ConnectionHandler, RequestHandler

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from .interface import DecodeHook, EncodeHook, Middleware

__all__ = [
    "Faults",
    "FaultyStream",
    "MemoryListener",
    "MemoryServer",
    "consume_local",
    "open_connection_pair",
    "open_memory_server",
]

_T = TypeVar("_T")

THROTTLE_STEP: Final = 0.1
"""Seconds: a throttled stream passes on at a time the bytes that its rate allows in this time."""


@final
class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    """A listener in memory. It accepts one end of a stream, and `connect` returns the other end."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](math.inf)

    def connect(self) -> trio.abc.HalfCloseableStream:
        """Make a stream in memory, and return the client's end.

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


@final
class MemoryServer:
    """A server in memory. `open_memory_server` makes it.

    Attributes:
        server: the server itself.
        keys: the keys of its users, by their names; empty for a plain server.
    """

    def __init__(self, server: Server, listener: MemoryListener, keys: Mapping[str, Key]) -> None:
        self.server = server
        self.keys = keys
        self._listener = listener

    def connect(
        self,
        user: str | None = None,
        *,
        request_handler: RequestHandler | CombinedHandler | None = None,
        channel_handler: ChannelHandler | None = None,
        close_handler: ConnectionHandler | None = None,
        settings: Settings = Settings(),  # noqa: B008  (immutable)
        wrap: Callable[[trio.abc.HalfCloseableStream], trio.abc.Stream] = lambda stream: stream,
    ) -> AbstractAsyncContextManager[Connection]:
        """Connect to the server, as `bokbok_trio.open_connection` does.

        Arguments:
            user: the name of the user; None for the first user of the server, or for none with a plain
                server.
            request_handler, channel_handler, close_handler, settings: the client's, as for
                `bokbok_trio.open_connection`.
            wrap: takes the client's stream and returns the stream to use, such as a `FaultyStream` around it.

        Raises:
            ValueError: the server does not have the user.
            Exception: the errors of `bokbok_trio.open_connection`.
        """
        if user is None:
            user = next(iter(self.keys), None)
        elif user not in self.keys:
            raise ValueError(f"the server has no user {user!r}; name it in the users of open_memory_server")
        return open_connection(
            wrap(self._listener.connect()),
            user=user,
            key=None if user is None else self.keys[user],
            request_handler=request_handler,
            channel_handler=channel_handler,
            close_handler=close_handler,
            settings=settings,
        )


@asynccontextmanager
async def open_memory_server(
    request_handler: RequestHandler | CombinedHandler | None = None,
    *,
    users: Sequence[str] | None = ("user",),
    channel_handler: ChannelHandler | None = None,
    open_handler: ConnectionHandler | None = None,
    close_handler: ConnectionHandler | None = None,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
) -> AsyncGenerator[MemoryServer]:
    """Open a server in memory. Clients may connect as any of its users.

    ::

        async with (
            open_memory_server(handler, users=["alice", "bob"]) as server,
            server.connect("alice") as alice,
            server.connect("bob") as bob,
        ):
            assert await alice.request(["who am I?"]) == [b"alice"]

    Arguments:
        request_handler, channel_handler, open_handler, close_handler, settings: as for
            `bokbok_trio.open_server`.
        users: the names of its users, each of whom gets a new key; None for a plain server.

    Raises:
        TypeError: `users` is not a list of names.
        ValueError: `users` is empty, or has a name that no user can have.

    An exception of the block is raised as itself.
    """
    if users is not None and not is_several(users):
        raise TypeError(f"users must be a list of names, or None for a plain server, not {users!r}")
    if users is not None and not users:
        raise ValueError("users must not be empty; pass None for a plain server")
    keys = None if users is None else {user: Key.generate() for user in users}
    listener = MemoryListener()
    async with open_server(
        [listener],
        request_handler,
        channel_handler=channel_handler,
        user_key=keys,
        open_handler=open_handler,
        close_handler=close_handler,
        settings=settings,
    ) as server:
        yield MemoryServer(server, listener, MappingProxyType(keys or {}))


@asynccontextmanager
async def open_connection_pair(
    client_handler: RequestHandler | CombinedHandler | None = None,
    server_handler: RequestHandler | CombinedHandler | None = None,
    *,
    sealed: bool = True,
    user: str = "user",
    client_channel_handler: ChannelHandler | None = None,
    server_channel_handler: ChannelHandler | None = None,
    client_close_handler: ConnectionHandler | None = None,
    server_close_handler: ConnectionHandler | None = None,
    client_settings: Settings = Settings(),  # noqa: B008  (immutable)
    server_settings: Settings = Settings(),  # noqa: B008  (immutable)
    wrap: Callable[[trio.abc.HalfCloseableStream], trio.abc.Stream] = lambda stream: stream,
) -> AsyncGenerator[tuple[Connection, Connection]]:
    """Open both ends of a connection in memory, with a real server and handshake.

    ::

        async with open_connection_pair(server_handler=handler) as (client, server):
            assert await client.request(["ping", "1"]) == [b"pong", b"1"]

    Arguments:
        client_handler, server_handler: the request handlers of the two sides, or their combined handlers.
        sealed: whether the connection is encrypted, with a new key for `user`; otherwise it is plain.
        user: the client's name, which the server sees as `Connection.user` if the connection is encrypted.
        client_channel_handler, server_channel_handler: the channel handlers of the two sides.
        client_close_handler, server_close_handler: the close handlers of the two sides.
        client_settings, server_settings: the settings of the two sides.
        wrap: takes the client's stream and returns the stream to use, such as a `FaultyStream` around it.

    The block gets the two connections, first the client's. An exception of the block is raised as itself.
    """
    accepted: list[Connection] = []
    has_accepted = trio.Event()

    async def open_handler(connection: Connection) -> None:
        accepted.append(connection)
        has_accepted.set()
        await trio.lowlevel.checkpoint()

    async with (
        open_memory_server(
            server_handler,
            users=[user] if sealed else None,
            channel_handler=server_channel_handler,
            open_handler=open_handler,
            close_handler=server_close_handler,
            settings=server_settings,
        ) as server,
        server.connect(
            request_handler=client_handler,
            channel_handler=client_channel_handler,
            close_handler=client_close_handler,
            settings=client_settings,
            wrap=wrap,
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
    """Serve an interface in memory, and return the stand-in that a client would use.

    ::

        async with consume_local(Files, FilesInMemory()) as files:
            assert (await files.stat("/a")).size == 3

    Calls go through the same steps and checks as over a network. The user is ``"user"``. This needs the extra
    ``interface``.

    Arguments:
        interface, implementation, encode_hook, decode_hook: as for `bokbok_trio.interface.expose`.
        middleware: the middleware of the serving side.

    Raises:
        TypeError: as for `bokbok_trio.interface.expose`.
    """
    from .interface import consume, expose  # noqa: PLC0415  (the rest of this module works without msgspec)

    hooks: dict[str, Any] = {"encode_hook": encode_hook, "decode_hook": decode_hook}
    exposed = expose(interface, implementation, middleware=middleware, **hooks)
    async with open_connection_pair(server_handler=exposed) as (client, _):
        yield consume(client, interface, **hooks)


@final
class Faults:
    """The faults of one direction of a `FaultyStream`. They may be changed at any time.

    Each piece of data waits while the direction is stalled, then for `delay`, and as long as `rate` demands.
    Then some of its bytes are dropped or corrupted, and `alter` is applied.

    Attributes:
        delay: seconds that each piece waits, 0 or more. Data that arrives meanwhile follows as one piece.
        rate: bytes a second that may pass, more than 0; ``math.inf`` for no limit.
        most: bytes that a piece may have, 1 or more; None for no limit.
        alter: a function that takes each piece and returns the piece to pass on; None for no such function.
            An empty piece is lost. The stream raises the errors of the function.
        passed: how many bytes were dropped, corrupted or passed on by now.
    """

    __slots__ = (
        "_corrupted",
        "_dropped",
        "_end",
        "_flowing",
        "_name",
        "_scope",
        "alter",
        "delay",
        "most",
        "passed",
        "rate",
    )
    """No other attributes: a misspelled fault would do nothing, and a test with it would prove nothing."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._flowing = trio.Event()
        self._flowing.set()
        self._scope: trio.CancelScope | None = None  # around the task that uses this direction
        self._dropped: list[range] = []
        self._corrupted: list[range] = []
        self._end = math.inf
        self.delay = 0.0
        self.rate = math.inf
        self.most: int | None = None
        self.alter: Callable[[bytes], bytes] | None = None
        self.passed = 0

    def __repr__(self) -> str:
        return f"<bokbok_trio.testing.Faults of {self._name} after {self.passed} bytes>"

    def stall(self) -> None:
        """Let nothing pass from now on, as if the peer had stopped reading, or a cable was pulled."""
        if self._flowing.is_set():
            self._flowing = trio.Event()

    def resume(self) -> None:
        """End a stall. No data was lost."""
        self._flowing.set()

    def drop(self, count: int = 1, *, after: int = 0) -> None:
        """Lose `count` bytes, after `after` more bytes have passed."""
        self._dropped.append(self._range(count, after))

    def corrupt(self, count: int = 1, *, after: int = 0) -> None:
        """Flip a bit in each of `count` bytes, after `after` more bytes have passed."""
        self._corrupted.append(self._range(count, after))

    def cut(self, *, after: int) -> None:
        """Cut the connection, both ways, after `after` more bytes have passed in this direction."""
        self._end = self._range(0, after).start

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse an impossible value at once, where the test sets it."""
        if name in {"rate", "most", "delay"} and not (name == "most" and value is None):
            if not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, not {type(value).__name__}")
            if name != "delay" and not value > 0:
                raise ValueError(f"{name} must be over 0, not {value}; to let nothing pass, call stall")
            if name == "delay" and not 0 <= value < math.inf:
                raise ValueError(f"delay must be at least 0 seconds, not {value}")
        super().__setattr__(name, value)

    def _range(self, count: int, after: int) -> range:
        if count < 0 or after < 0:
            raise ValueError(f"bytes are counted from 0, not {min(count, after)}")
        return range(self.passed + after, self.passed + after + count)

    # ---- for the stream ----

    def _limit(self, size: int | None) -> int | None:
        """Return how many bytes the next piece may have, if `size` bytes are there or asked for; None: any
        number.
        """
        limits = [math.inf if limit is None else limit for limit in (size, self.most)]
        limit = min(*limits, self.rate * THROTTLE_STEP)
        return None if limit == math.inf else max(1, int(limit))

    async def _hold_up(self, size: int) -> None:
        """Wait as long as a piece of `size` bytes must."""
        await self._flowing.wait()
        if seconds := self.delay + size / self.rate:
            await trio.sleep(seconds)
            await self._flowing.wait()

    def _edit(self, piece: bytes) -> tuple[bytes, bool]:
        """Return the bytes of a piece that pass, and whether the connection must be cut after them."""
        start = self.passed
        is_cut = start + len(piece) >= self._end
        if is_cut:
            piece = piece[: int(self._end) - start]
        self.passed += len(piece)
        self._dropped = [each for each in self._dropped if each.stop > start]
        self._corrupted = [each for each in self._corrupted if each.stop > start]
        if self._dropped or self._corrupted:
            piece = bytes(
                byte ^ any(at in each for each in self._corrupted)
                for at, byte in enumerate(piece, start)
                if not any(at in each for each in self._dropped)
            )
        if self.alter is not None:
            altered: object = self.alter(piece)
            if not isinstance(altered, bytes | bytearray | memoryview):
                raise TypeError(f"alter must return bytes, not {type(altered).__name__}: {self.alter!r}")
            piece = bytes(altered)
        return piece, is_cut


@final
class FaultyStream(trio.abc.HalfCloseableStream):
    """A stream around another, with faults that a test may set at any time, separately for each direction.

    ::

        stream = FaultyStream(transport)
        stream.sending.stall()
        stream.receiving.delay = 0.2
        await stream.cut()

    Arguments:
        transport: the stream below. With TLS, put the `FaultyStream` below the TLS stream, not around it.

    Attributes:
        sending, receiving: the faults of each direction; at first there are none.

    Raises:
        TypeError: `transport` is not a `trio.abc.HalfCloseableStream`.
    """

    __slots__ = (
        "_held",
        "_is_closed",
        "_is_cut",
        "_ready",
        "_transport",
        "receiving",
        "sending",
    )  # no other attributes: faults belong to a direction

    def __init__(self, transport: trio.abc.HalfCloseableStream) -> None:
        if not isinstance(transport, trio.abc.HalfCloseableStream):
            raise TypeError(
                f"a FaultyStream goes around a trio.abc.HalfCloseableStream, not {type(transport).__name__}"
            )
        self._transport = transport
        self._is_cut = False
        self._is_closed = False
        self._held = b""  # received, and waiting
        self._ready = b""  # received, and returned next
        self.sending = Faults("sending")
        self.receiving = Faults("receiving")

    async def cut(self) -> None:
        """Cut the connection now. Tasks that send or receive get `trio.BrokenResourceError` at once.

        The other side sees the end of the stream. If it must see nothing, stall both directions instead.
        """
        await self._cut(self.sending, self.receiving)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream.send_all`."""
        with self._using(self.sending):
            await trio.lowlevel.checkpoint()
            rest = bytes(data)
            while rest:
                piece = rest[: self.sending._limit(len(rest))]
                await self.sending._hold_up(len(piece))
                edited, is_cut = self.sending._edit(piece)
                await self._transport.send_all(edited)
                rest = rest[len(piece) :]
                if is_cut:
                    await self._cut(self.receiving)
                    self._check()

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`."""
        with self._using(self.sending):
            await self.sending._flowing.wait()
            await self._transport.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream.send_eof`."""
        with self._using(self.sending):
            await self.sending._hold_up(0)
            await self._transport.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream.receive_some`."""
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        data = b""
        with self._using(self.receiving):
            await trio.lowlevel.checkpoint()
            limit = self.receiving._limit(max_bytes)
            while not self._ready:
                self._check()
                # Keep the data in the stream: if this call is cancelled, the next one goes on with it.
                self._held = self._held or bytes(await self._transport.receive_some(limit))
                await self.receiving._hold_up(len(self._held))
                if not self._held:
                    break
                self._ready, is_cut = self.receiving._edit(self._held)
                self._held = b""
                if is_cut:
                    await self._cut(self.sending)
            data = self._ready[:limit]
            self._ready = self._ready[len(data) :]
        return data

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource.aclose`."""
        self._is_closed = True
        _interrupt(self.sending, self.receiving)
        await self._transport.aclose()

    async def _cut(self, *interrupted: Faults) -> None:
        self._is_cut = True
        _interrupt(*interrupted)
        await trio.aclose_forcefully(self._transport)

    @contextmanager
    def _using(self, faults: Faults) -> Generator[None]:
        """Let one task use a direction. `_interrupt` ends the block.

        Raises:
            trio.BusyResourceError: another task uses the direction.
        """
        if faults._scope is not None:
            raise trio.BusyResourceError(f"another task is {faults._name} on this stream")
        self._check()
        try:
            with trio.CancelScope() as faults._scope:
                yield
                return
        finally:
            faults._scope = None
        self._check()

    def _check(self) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._is_cut:
            raise trio.BrokenResourceError("this stream was cut")


def _interrupt(*directions: Faults) -> None:
    """Wake the tasks that use these directions, so that they notice that the stream was closed or cut."""
    for faults in directions:
        if faults._scope is not None:
            faults._scope.cancel()
