"""Connections for scripts, notebooks and threads: calls that block, and no ``async``.

::

    from bokbok_trio.blocking import connect

    with connect("localhost:12345", user="alice", key=key) as c:
        print(c.request(["ping", "12345"], timeout=5))
        files = c.consume(Files)
        print(c.call(files.stat, "/etc/hosts", timeout=5).size)

Everything runs in a thread with a Trio run, a `Portal`, and other threads wait for results. `connect` makes a
portal, unless you pass one. ``docs/blocking.rst`` has examples, also for notebooks and asyncio.
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
from ._connection.current import CURRENT
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

Portal.__module__ = __name__  # this is its public module


class _Receiving(Iterator[_T]):
    """The receiving side of a channel or a stream."""

    def __init__(self, connection: Connection, held: Held[Any], receive: Callable[[], Awaitable[_T]]) -> None:
        self._connection = connection  # keep it: collecting it would close it
        self._loop = connection.portal._loop
        self._held = held
        self._receive = receive

    def receive(self, *, timeout: float | None = None) -> _T:
        """Receive an item.

        A time limit loses no item: the next call gets it. Ctrl-C may lose one.

        Arguments:
            timeout: seconds that it may take, 0 or more; None for no limit.

        Raises:
            TimeoutError: no item came in time.
            trio.EndOfChannel: there are no more items.
        """
        return self._loop.call(self._receive, timeout, self._held.calls)

    def __next__(self) -> _T:
        try:
            return self.receive()
        except trio.EndOfChannel:
            raise StopIteration from None


@final
class Stream(_Receiving[_T]):
    """A stream of results. `Connection.open_stream` makes it. Any thread may use it, several at once.

    ``for item in stream`` ends when the method has returned. If the method raises, its error is raised after
    the items that it sent before.
    """


@final
class Channel(_Receiving[list[bytes]]):
    """A channel of a connection. `Connection.open_channel` makes it. Any thread may use it, several at once.

    ``for item in channel`` ends when the other side has ended its direction, or has answered. The errors are
    those of `bokbok_trio.Channel`, and ``TimeoutError``.
    """

    def __init__(
        self, connection: Connection, held: Held[_channel.Channel], channel: _channel.Channel
    ) -> None:
        super().__init__(connection, held, channel.receive)
        self._channel = channel

    def send(self, item: Fields, *, timeout: float | None = None) -> None:
        """Send an item as soon as the other side has room for it; see `bokbok_trio.Channel.send`.

        Arguments:
            item: 0 to 255 fields, each bytes or str (sent as UTF-8).
            timeout: seconds that it may take, 0 or more; None for no limit.

        Raises:
            TimeoutError: the other side had no room in time.
            Exception: the errors of `bokbok_trio.Channel.send`.
        """
        self._loop.call(partial(self._channel.send, item), timeout, self._held.calls)

    def end(self) -> None:
        """End the sending direction. Receiving goes on."""
        self._loop.call(self._channel.end, None, self._held.calls)

    def answer(self, *, timeout: float | None = None) -> list[bytes]:
        """Wait for the answer of the other side's handler; see `bokbok_trio.Channel.answer`.

        Arguments:
            timeout: seconds that it may take, 0 or more; None for no limit.

        Raises:
            TimeoutError: no answer came in time.
            Exception: the errors of `bokbok_trio.Channel.answer`.
        """
        return self._loop.call(self._channel.answer, timeout, self._held.calls)


@final
class Connection:
    """A connection whose calls block. `connect` makes it. Any thread may use it, several at once.

    It is closed when `close` is called, when its ``with`` block is left, or when nothing refers to it any
    more.

    Attributes:
        connection: the connection itself, for the Trio thread. Any thread may read its properties.
        portal: the portal in whose thread the connection runs.
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

        The time limit is also the deadline of the handler on the other side.

        Arguments:
            fields: 0 to 255 fields, each bytes or str (sent as UTF-8).
            context: as for `bokbok_trio.Connection.request`.
            timeout: seconds that it may take, 0 or more; None for no limit.

        Returns:
            The fields of the answer.

        Raises:
            TimeoutError: no answer came in time. The request was cancelled, on the other side too.
            BokbokError, TypeError, ValueError: as for `bokbok_trio.Connection.request`.
        """
        return self.call(partial(self.connection.request, fields, context=context), timeout=timeout)

    @contextmanager
    def open_channel(
        self, fields: Fields, *, context: Context | None = None, timeout: float | None = None
    ) -> Generator[Channel]:
        """Send a request with a channel, which is open as long as the block lasts.

        ::

            with c.open_channel(["tail"]) as channel:
                for [line] in channel:
                    print(line)

        Leaving the block does the same as for `bokbok_trio.Connection.open_channel`, which also lists the
        errors.

        Arguments:
            fields: 0 to 255 fields, each bytes or str (sent as UTF-8).
            context: as for `bokbok_trio.Connection.request`.
            timeout: seconds that the whole block may last, on both sides, 0 or more; None for no limit. Each
                call may have a shorter limit.
        """
        manager = self.connection.open_channel(fields, context=context)
        held = Held(self.portal._loop, manager, timeout, self._held.calls, name="channel")
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
        """Return a stand-in for the peer's implementation of an interface. Use its methods by `call` and
        `open_stream`.

        ::

            files = c.consume(Files)
            stat = c.call(files.stat, "/etc/hosts", timeout=5)
            stat = c.call(partial(files.stat, "/etc/hosts", follow=False))
            with c.open_stream(files.follow("/var/log/syslog")) as lines:
                for line in lines: ...

        Middleware, callbacks and streams that you pass are async, and run in the Trio thread. This needs the
        extra ``interface``.

        The arguments and errors are those of `bokbok_trio.interface.consume`. The errors of `call` may be
        raised too.
        """
        from .interface import consume  # noqa: PLC0415  (the rest of this module works without msgspec)

        async def make() -> _T:  # in the Trio thread, because it may add a handler for callbacks
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
        """Call a method that streams its results. The stream is open as long as the block lasts.

        ::

            with c.open_stream(files.follow("/var/log/syslog")) as lines:
                for line in lines:
                    print(line.text)

        Leaving the block cancels the method.

        Arguments:
            stream: the return value of a method of the stand-in.
            timeout: seconds that the whole block may last, on both sides, 0 or more; None for no limit.

        Raises:
            TypeError: `stream` is not such a return value.
            Exception: any error of the method, after the items before it; and the errors of `call`.
        """
        if not hasattr(stream, "__aenter__"):
            raise TypeError(f"{stream!r} is not a stream: pass the result of a method that streams")
        held = Held(self.portal._loop, stream, timeout, self._held.calls, name="stream")
        with held as items:
            yield Stream(self, held, items.receive)

    def ping(self, *, timeout: float | None = None) -> float:
        """Return the seconds that a ping and its answer take; see `bokbok_trio.Connection.ping`.

        Arguments:
            timeout: seconds that it may take, 0 or more; None for no limit.

        Raises:
            TimeoutError: no answer came in time.
        """
        return self.call(self.connection.ping, timeout=timeout)

    def call(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> _T:
        """Call any async function in the Trio thread, as `Portal.call` does. It ends with the connection.

        To pass keyword arguments, use `functools.partial`, as in Trio.

        Arguments and errors are those of `Portal.call`. ``ConnectionClosed`` says that the connection was
        closed.
        """
        return self.portal._loop.call(bind(function, *args), timeout, self._held.calls)

    def submit(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> concurrent.futures.Future[_T]:
        """Start an async function as `call` does, and return a future of its result; see `Portal.submit`.

        ::

            futures = [c.submit(c.connection.request, ["ping", str(n)]) for n in range(100)]
            answers = [future.result() for future in futures]
        """
        return self.portal._loop.submit(bind(function, *args), timeout, self._held.calls)

    def close(self) -> None:
        """Close the connection, and its portal if `connect` made that. A second call does nothing.

        Raises:
            RuntimeError: called in the Trio thread, in a forked child, or in a thread of one of its handlers.
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._is_closed:
            return None
        self.portal._loop.check()
        current = CURRENT.get(None)
        if current is not None and current.connection is self.connection and not current._has_ended:
            raise RuntimeError(
                "close would wait for the handler that calls it; use connection.aclose() there"
            )
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
    """Open a connection. Use it as a ``with`` block, or until you call `Connection.close`.

    It takes at most the ``connect_timeout`` and the ``handshake_timeout`` of the settings. Ctrl-C cancels it.

    Arguments:
        to, user, key, service, insecure, settings: as for `bokbok_trio.open_connection`.
        request_handler, channel_handler, close_handler: as for `bokbok_trio.open_connection`: async
            functions, which run in the Trio thread.
        portal: the portal whose thread the connection uses; None for a new one, which ends with the
            connection.

    Raises:
        ConnectionClosed, RuntimeError: as for `Portal.call`.
        Exception: the errors of `bokbok_trio.open_connection`.
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
    held = Held(portal._loop, manager, None, name="connection")
    try:
        return Connection(portal, held, held.__enter__(), owns=owns)
    except BaseException:
        if owns:
            portal.close()
        raise
