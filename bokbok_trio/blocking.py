"""Connections for scripts, notebooks and threads: calls that block, and no ``async``.

::

    from bokbok_trio.blocking import connect

    with connect("localhost:12345", user="alice", key=key) as c:
        print(c.request(["ping", "12345"], timeout=5))
        files = c.consume(Files)
        print(c.call(files.stat, "/etc/hosts", timeout=5).size)

All of it happens in a thread with a Trio run, a `Portal`, and other threads wait for it. `connect` makes one,
unless it is given one. ``docs/blocking.rst`` shows what it is good for, in a notebook and under asyncio too.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple, final

import trio

from ._addresses import AddressLike
from ._client import open_connection
from ._combined import CombinedHandler
from ._connection import channel as _channel, connection as _connection
from ._keys import Key
from ._portal import Held, Portal, bind
from ._settings import Settings
from ._types import ChannelHandler, ConnectionHandler, Context, Fields, RequestHandler

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from .interface import DecodeHook, EncodeHook, Middleware

__all__ = ["Channel", "Connection", "Portal", "Stream", "connect"]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

Portal.__module__ = __name__  # where it is public


class _Receiving(Iterator[_T]):
    """What items are received from."""

    def __init__(self, connection: Connection, held: Held[Any], receive: Callable[[], Awaitable[_T]]) -> None:
        self._connection = connection  # which must not be collected
        self._loop = connection.portal._loop
        self._held = held
        self._receive = receive

    def receive(self, *, timeout: float | None = None) -> _T:
        """Receive an item.

        After the time no item is lost: the next call gets it. After Ctrl-C one may be.

        Raises:
            trio.EndOfChannel: there are no more.
        """
        return self._loop.call(self._receive, timeout, self._held.calls)

    def __next__(self) -> _T:
        try:
            return self.receive()
        except trio.EndOfChannel:
            raise StopIteration from None


@final
class Stream(_Receiving[_T]):
    """A stream of results, made by `Connection.open_stream`; any threads may use it at once.

    ``for item in stream`` ends where the method has ended. What that raises comes after the items before.
    """


@final
class Channel(_Receiving[list[bytes]]):
    """A channel of a `Connection`, made by `Connection.open_channel`; any threads may use it at once.

    ``for item in channel`` ends where the other side has ended its direction, or answered. The errors are
    those of `bokbok_trio.Channel`, and ``TimeoutError``.
    """

    def __init__(
        self, connection: Connection, held: Held[_channel.Channel], channel: _channel.Channel
    ) -> None:
        super().__init__(connection, held, channel.receive)
        self._channel = channel

    def send(self, item: Fields, *, timeout: float | None = None) -> None:
        """Send an item, as soon as the other side has room; see `bokbok_trio.Channel.send`."""
        self._loop.call(partial(self._channel.send, item), timeout, self._held.calls)

    def end(self) -> None:
        """Send no more items; receiving goes on."""
        self._loop.call(self._channel.end, None, self._held.calls)

    def answer(self, *, timeout: float | None = None) -> list[bytes]:
        """Wait for the answer of the handler over there; see `bokbok_trio.Channel.answer`."""
        return self._loop.call(self._channel.answer, timeout, self._held.calls)


@final
class Connection:
    """A connection whose calls block; made by `connect`. Any threads may use it at once.

    It is closed by `close`, with its block, or when nobody has it any more.

    Attributes:
        connection: the connection itself, for use in the Trio thread; its properties may be read anywhere.
        portal: where that runs.
    """

    def __init__(
        self,
        portal: Portal,
        held: Held[_connection.Connection],
        connection: _connection.Connection,
        *,
        owns: bool,
    ) -> None:
        self.portal = portal
        self.connection = connection
        self._held = held
        self._owns_portal = owns
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<bokbok_trio.blocking.Connection over {self.connection!r}>"

    def request(
        self, fields: Fields, *, context: Context | None = None, timeout: float | None = None
    ) -> list[bytes]:
        """Send a request and wait for its answer; see `bokbok_trio.Connection.request`.

        The time limit is the deadline of the handler over there as well.

        Arguments:
            fields, context: as there.
            timeout: seconds that it may take; None for no limit.

        Raises:
            TimeoutError: no answer came in time. The request was cancelled, over there too.
            BokbokError and others: as there.
        """
        return self.call(partial(self.connection.request, fields, context=context), timeout=timeout)

    @contextmanager
    def open_channel(
        self, fields: Fields, *, context: Context | None = None, timeout: float | None = None
    ) -> Generator[Channel]:
        """Send a request with a channel, which lasts as long as the block.

        ::

            with c.open_channel(["tail"]) as channel:
                for [line] in channel:
                    print(line)

        Leaving the block does what it does for `bokbok_trio.Connection.open_channel`.

        Arguments:
            fields, context: as there.
            timeout: seconds that the whole of it may last, here and over there; None for no limit. Each call
                may have a shorter limit of its own.
        """
        manager = self.connection.open_channel(fields, context=context)
        held = Held(self.portal._loop, manager, timeout, self._held.calls)
        with held as channel:
            yield Channel(self, held, channel)

    def consume(
        self,
        interface: TypeForm[_T],
        *,
        name: str | None = None,
        middleware: Sequence[Middleware] = (),
        encode_hook: EncodeHook | None = None,
        decode_hook: DecodeHook | None = None,
    ) -> _T:
        """Return a stand-in for what the peer serves, whose async methods are for `call` and `open_stream`.

        ::

            files = c.consume(Files)
            stat = c.call(files.stat, "/etc/hosts", timeout=5)
            stat = c.call(partial(files.stat, "/etc/hosts", follow=False))
            with c.open_stream(files.follow("/var/log/syslog")) as lines:
                for line in lines: ...

        What is passed to methods is as ever: middleware, callbacks and streams of arguments are async, and
        run in the Trio thread. It needs the extra ``interface``.

        Arguments are those of `bokbok_trio.interface.consume`; errors too, and those of `call`.
        """
        from .interface import consume  # noqa: PLC0415  (the rest of this module works without msgspec)

        async def make() -> _T:  # there, as it may add a handler for what is lent
            return consume(
                self.connection,
                interface,
                name=name,
                middleware=middleware,
                encode_hook=encode_hook,
                decode_hook=decode_hook,
            )

        return self.call(make)

    @contextmanager
    def open_stream(
        self,
        stream: AbstractAsyncContextManager[trio.abc.ReceiveChannel[_T]],
        *,
        timeout: float | None = None,
    ) -> Generator[Stream[_T]]:
        """Call a method that streams its results, which lasts as long as the block.

        ::

            with c.open_stream(files.follow("/var/log/syslog")) as lines:
                for line in lines:
                    print(line.text)

        Leaving the block cancels the method.

        Arguments:
            stream: what the method of the stand-in returned.
            timeout: as for `open_channel`.

        Raises:
            TypeError: `stream` is none.
        """
        if not hasattr(stream, "__aenter__"):
            raise TypeError(f"{stream!r} is no stream; pass what a method that streams its results returned")
        held = Held(self.portal._loop, stream, timeout, self._held.calls)
        with held as items:
            yield Stream(self, held, items.receive)

    def ping(self, *, timeout: float | None = None) -> float:
        """Return how long it takes there and back, in seconds."""
        return self.call(self.connection.ping, timeout=timeout)

    def call(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> _T:
        """Call any async function in the Trio thread, as `Portal.call` does; it ends with the connection.

        Keyword arguments go by `functools.partial`, as in Trio.
        """
        return self.portal._loop.call(bind(function, *args), timeout, self._held.calls)

    def submit(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> concurrent.futures.Future[_T]:
        """As `call`, but do not wait for it; see `Portal.submit`.

        ::

            futures = [c.submit(c.connection.request, ["ping", str(n)]) for n in range(100)]
            answers = [future.result() for future in futures]
        """
        return self.portal._loop.submit(bind(function, *args), timeout, self._held.calls)

    def close(self) -> None:
        """Close it, and the thread that it has for itself. Again it does nothing."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._is_closed:
            return None
        try:
            return self._held.__exit__(type, exc, traceback)
        finally:
            if self._owns_portal:
                self.portal.close()
            self._is_closed = True


def connect(
    to: AddressLike,
    *,
    user: str | None = None,
    key: Key | None = None,
    service: str = "",
    insecure: bool = False,
    request_handler: RequestHandler | CombinedHandler | None = None,
    channel_handler: ChannelHandler | None = None,
    close_handler: ConnectionHandler | None = None,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
    portal: Portal | None = None,
) -> Connection:
    """Open a connection, to be used as a block, or at once and until `Connection.close`.

    It takes no longer than ``connect_timeout`` and ``handshake_timeout`` of the settings. Ctrl-C ends it.

    Arguments:
        to, user, key, service, insecure, settings: as for `bokbok_trio.open_connection`.
        request_handler, channel_handler, close_handler: as there; they run in the Trio thread.
        portal: whose thread to use; None: one of its own, which ends with the connection.

    Raises:
        ConnectionClosed, RuntimeError: as by `Portal.call`.
        Exception: what `bokbok_trio.open_connection` raises.
    """
    owns = portal is None
    portal = Portal() if portal is None else portal
    manager = open_connection(
        to,
        user=user,
        key=key,
        service=service,
        insecure=insecure,
        request_handler=request_handler,
        channel_handler=channel_handler,
        close_handler=close_handler,
        settings=settings,
    )
    held = Held(portal._loop, manager, None)
    try:
        return Connection(portal, held, held.__enter__(), owns=owns)
    except BaseException:
        if owns:
            portal.close()
        raise
