"""Connections for scripts, notebooks and threads: calls that block, and no ``async``.

::

    from bokbok_trio.blocking import connect

    with connect("localhost:12345", user="alice", key=key) as c:
        print(c.request(["ping", "12345"], timeout=5))

A `Portal` is a thread with a Trio run; everything happens there, and other threads wait for it. `connect` makes
one, unless it is given one.

Theory
======

A call is a task in that run, and a latch that the caller waits for. What may be interrupted is the caller alone:
Ctrl-C is a ``KeyboardInterrupt`` in the main thread, between any two steps. So

- what the Trio thread shares with a caller is a plain lock, which it releases and never waits for: a condition of
  `threading` that an interrupt has left locked would stop it for ever;
- who is interrupted cancels his call, and waits until that has ended; again interrupted, he waits no more;
- no thread outlives the `Portal` that it is for. The thread refers to a `_Loop`, which does not refer to the
  `Portal`; when that goes, by whatever interrupt in whatever step, its finalizer ends the thread. What is left
  when the interpreter exits is ended by a hook.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextvars
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar, TypeVarTuple, final

import trio

from . import _channel, _connection
from ._addresses import AddressLike
from ._client import open_connection
from ._errors import ConnectionClosed
from ._handling import ChannelHandler, RequestHandler
from ._keys import Key
from ._packets import Context, Fields
from ._settings import Settings

__all__ = ["Channel", "Connection", "Portal", "connect"]

WAKE_EVERY: Final = 1.0
"""Seconds after which a waiting thread looks up: where a lock cannot be interrupted, as on Windows, Ctrl-C is
noticed then, and so is a latch that an interrupted thread did not pass on."""

EXIT_GRACE: Final = 2.0
"""Seconds that what is still open may take to close when the interpreter exits."""

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

logger = logging.getLogger("bokbok_trio")


class _Holder(Protocol):
    """Where calls run, for the Trio thread alone.

    Attributes:
        nursery: for their tasks, as long as it is open.
    """

    nursery: trio.Nursery | None

    def why_closed(self) -> Exception:
        """Make the error for calls that find it closed, or that it cancels."""


@final
class _Latch:
    """Set once, by one thread, and waited for by others, whom Ctrl-C may interrupt at any step."""

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Once only."""
        self.is_set = True
        self._lock.release()

    def look(self) -> bool:
        """Wait for it, for a while, and return whether it is set."""
        if not self.is_set and self._lock.acquire(timeout=WAKE_EVERY):
            self._lock.release()
        return self.is_set


@final
class _Call(Generic[_T]):
    """An async function that runs in the Trio thread for another thread.

    Arguments:
        function: what to call.
        timeout: seconds that it may take; None for no limit.
        when_done: called in the Trio thread in the end.

    Attributes:
        error: what it raised, or why it was cut.
        was_cut: whether it ended by its time limit, or with what it belongs to; the error is ours then.
        done: set in the end.
    """

    def __init__(
        self,
        function: Callable[[], Awaitable[_T]],
        timeout: float | None,
        when_done: Callable[[_Call[_T]], object] = lambda _: None,
    ) -> None:
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must be at least 0 seconds, not {timeout}")
        self._function = function
        self._timeout = timeout
        self._when_done = when_done
        self._context = contextvars.copy_context()
        self._scope = trio.CancelScope()
        self._values: list[_T] = []
        self._make_error: Callable[[], Exception] = RuntimeError  # replaced at its start
        self.error: BaseException | None = None
        self.was_cut = False
        self.done = _Latch()

    # ---- in the Trio thread ----

    def start(self, holder: _Holder) -> None:
        """Begin, as a task of the holder's nursery."""
        if holder.nursery is None:
            self._cut(holder.why_closed())
            return
        self._make_error = holder.why_closed
        if self._timeout is not None:
            self._scope.deadline = trio.current_time() + self._timeout
        self._context.run(holder.nursery.start_soon, self._run)

    def cancel(self) -> None:
        """Let it end soon, if it runs."""
        self._scope.cancel()

    async def _run(self) -> None:
        try:
            with self._scope:
                self._values.append(await self._function())
        except trio.Cancelled:
            pass
        except BaseExceptionGroup as exc:
            self.error = exc.split(trio.Cancelled)[1]
        except BaseException as exc:  # noqa: BLE001  (the caller gets it)
            self.error = exc
        if self._values or self.error is not None:
            self._end()
        elif self._scope.cancelled_caught:
            self._cut(self.make_timeout())
        else:
            self._cut(self._make_error())

    def is_late(self) -> bool:
        """Whether its time has passed."""
        return self._scope.deadline <= trio.current_time()

    def make_timeout(self) -> TimeoutError:
        """Make the error that says so."""
        return TimeoutError(f"it took longer than {self._timeout} seconds")

    def _cut(self, error: Exception) -> None:
        self.error = error
        self.was_cut = True
        self._end()

    def _end(self) -> None:
        self._when_done(self)
        self.done.set()

    # ---- in the caller's ----

    def result(self) -> _T:
        """Return or raise what it did."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # or this frame and the traceback would keep each other alive
        return self._values[0]


@final
class _Loop:
    """A Trio run in a thread of its own, with a nursery for calls, until it is stopped."""

    def __init__(self) -> None:
        self.nursery: trio.Nursery | None = None
        self._thread = threading.Thread(target=self._run, name="bokbok_trio portal", daemon=True)
        self._pid = os.getpid()
        self._ready = _Latch()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._is_stopping = False
        self._is_over = False
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin, and wait until it runs."""
        with _without_interrupts():
            self._thread.start()
        while not self._ready.look():
            pass
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Cancel whatever runs, and end. Returns at once; may be called at any time in any thread."""
        self._is_stopping = True
        self.post(self._scope.cancel)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, for so many seconds at most."""
        self._thread.join(timeout)

    def check(self) -> None:
        """Refuse a call from where it could only wait for ever."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("this would block the Trio thread that it waits for; use the async API here")
        if os.getpid() != self._pid:
            raise RuntimeError("the Trio thread is in the parent of this forked process; connect anew here")

    def post(self, function: Callable[[*_Ts], object], *args: *_Ts) -> bool:
        """Call a function in the Trio thread soon. Returns whether there is a run that could."""
        if self._token is None or self._is_over:
            return False
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return False
        return True

    def wait(self, latch: _Latch) -> None:
        """Wait until a latch is set that a call has."""
        is_over = False
        while not latch.look():
            if is_over:
                raise self.why_closed()
            is_over = self._is_over

    def begin(self, call: _Call[Any], holder: _Holder) -> None:
        """Start a call."""
        if not self.post(call.start, holder):
            raise self.why_closed()

    def why_closed(self) -> Exception:
        """See `_Holder`."""
        return ConnectionClosed(
            "the portal was closed" if self._failure is None else "its thread has crashed"
        )

    def give_up(self, call: _Call[Any]) -> None:
        """Cancel a call, and wait until it has ended."""
        if self.post(call.cancel):
            self.wait(call.done)

    def call(self, function: Callable[[], Awaitable[_T]], timeout: float | None, holder: _Holder) -> _T:
        """Run an async function in the Trio thread, and wait for it."""
        self.check()
        call = _Call(function, timeout)
        try:
            self.begin(call, holder)
            self.wait(call.done)
        except BaseException:
            self.give_up(call)
            raise
        try:
            return call.result()
        finally:
            del call  # as there

    def submit(
        self, function: Callable[[], Awaitable[_T]], timeout: float | None, holder: _Holder
    ) -> concurrent.futures.Future[_T]:
        """Run an async function in the Trio thread, and do not wait for it."""
        self.check()
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def settle(call: _Call[_T]) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if call.error is None:
                future.set_result(call.result())
            else:
                future.set_exception(call.error)

        def note_cancelled(future: concurrent.futures.Future[_T]) -> None:
            if future.cancelled():
                self.post(call.cancel)

        call = _Call(function, timeout, settle)
        future.add_done_callback(note_cancelled)
        self.begin(call, holder)
        return future

    # ---- in the Trio thread ----

    def _run(self) -> None:
        _LOOPS.add(self)
        try:
            trio.run(self._main)
        except BaseException as exc:  # noqa: BLE001  (nobody is above)
            self._failure = exc
            if self._ready.is_set:
                logger.error("the Trio thread of a portal has crashed", exc_info=exc)
        finally:
            self._is_over = True
            _LOOPS.discard(self)
            if not self._ready.is_set:
                self._ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._is_stopping:  # from before there was a token
            self._scope.cancel()
        try:
            with self._scope:
                async with trio.open_nursery() as self.nursery:
                    self._ready.set()
                    await trio.sleep_forever()
        finally:
            self.nursery = None


_LOOPS: Final[set[_Loop]] = set()
"""Those that run."""


@atexit.register
def _stop_all() -> None:
    """Close what is open when the interpreter exits, so that the other sides see it end in order."""
    loops = list(_LOOPS)
    for loop in loops:
        loop.stop()
    deadline = time.monotonic() + EXIT_GRACE
    for loop in loops:
        loop.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def _without_interrupts() -> Generator[None]:
    """Put off Ctrl-C. For what is short and would be left half done, such as a thread's start."""
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(came[0], None)


@final
class _Held(AbstractContextManager[_T]):
    """An async block that is entered and left from another thread, in a task that stays in it.

    Arguments:
        loop: where.
        manager: the block.
        timeout: seconds that it may last.
        holder: what it is part of: it ends, at the latest, with that.
    """

    def __init__(
        self,
        loop: _Loop,
        manager: AbstractAsyncContextManager[_T],
        timeout: float | None,
        holder: _Holder,
    ) -> None:
        self.nursery: trio.Nursery | None = None
        self._loop = loop
        self._manager = manager
        self._holder = holder
        self._values: list[_T] = []
        self._entered = _Latch()
        self._left = trio.Event()
        self._body_error: BaseException | None = None
        self._is_suppressed: bool | None = None
        self._call = _Call(self._hold, timeout, self._note_end)

    def __enter__(self) -> _T:
        self._loop.check()
        try:
            self._loop.begin(self._call, self._holder)
            self._loop.wait(self._entered)
            if not self._values:
                self._loop.wait(self._call.done)
                self._call.result()
            return self._values[0]
        except BaseException:
            self._loop.give_up(self._call)
            raise

    def __exit__(
        self, type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._loop.check()
        try:
            self._loop.post(self._leave, exc)
            self._loop.wait(self._call.done)
        except BaseException:
            self._loop.give_up(self._call)
            raise
        error = self._call.error
        if error is None or error is exc:
            return self._is_suppressed
        if self._call.was_cut and (exc is not None or isinstance(error, ConnectionClosed)):
            return None  # the body knows, or need not know
        try:
            raise error
        finally:
            del self, error, exc  # as above

    def why_closed(self) -> Exception:
        """See `_Holder`."""
        return self._call.make_timeout() if self._call.is_late() else ConnectionClosed("its block was left")

    # ---- in the Trio thread ----

    async def _hold(self) -> None:
        value = await self._manager.__aenter__()
        error: BaseException | None
        try:
            async with trio.open_nursery() as self.nursery:
                self._values.append(value)
                self._entered.set()
                await self._left.wait()
                self.nursery.cancel_scope.cancel()
            error = self._body_error
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            error = exc
        self.nursery = None
        try:
            # Not raised here as what the body raised may be a StopIteration, which a coroutine cannot raise.
            traceback = None if error is None else error.__traceback__
            is_suppressed = await self._manager.__aexit__(error and type(error), error, traceback)
            if error is self._body_error:
                self._is_suppressed = is_suppressed
            elif error is not None and not is_suppressed:
                raise error
        finally:
            del error  # or this frame and the traceback would keep each other alive

    def _leave(self, error: BaseException | None) -> None:
        self._body_error = error
        self._left.set()

    def _note_end(self, _call: object) -> None:
        if not self._entered.is_set:
            self._entered.set()


@final
class Portal:
    """A thread with a Trio run, in which other threads call async functions.

    ::

        with Portal() as portal:
            portal.call(trio.sleep, 1)

    It begins with this object, and ends by `close`, with the block, or when nobody has the object any more.
    Any threads may use it at once. What runs there is cancelled when it ends.

    A forked child has no such thread, and calls raise ``RuntimeError`` there.
    """

    def __init__(self) -> None:
        self._loop = _Loop()
        weakref.finalize(self, self._loop.stop).atexit = False  # there `_stop_all` does it
        self._loop.start()

    def call(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> _T:
        """Call an async function in the Trio thread, and wait for what it returns.

        Ctrl-C cancels it, and a second one leaves it alone. The context variables of this thread hold for it.

        Arguments:
            function, args: what to call.
            timeout: seconds that it may take, a deadline as by `trio.fail_after`; None for no limit.

        Raises:
            TimeoutError: it took longer, and was cancelled.
            ConnectionClosed: the portal was closed, before or meanwhile.
            RuntimeError: called in the Trio thread, or in a forked child.
            BaseException: whatever it raised.
        """
        return self._loop.call(partial(function, *args), timeout, self._loop)

    def submit(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> concurrent.futures.Future[_T]:
        """Call an async function in the Trio thread, and do not wait for it.

        Cancelling the future cancels it; ``asyncio.wrap_future`` makes it one of asyncio's.

        Arguments and errors are those of `call`; the future raises what comes after the start.
        """
        return self._loop.submit(partial(function, *args), timeout, self._loop)

    @contextmanager
    def enter(
        self, manager: AbstractAsyncContextManager[_T], *, timeout: float | None = None
    ) -> Generator[_T]:
        """Be in an async block, from this thread.

        ::

            with portal.enter(open_server("localhost:0", handler)) as server:
                ...

        Arguments:
            manager: the block.
            timeout: seconds that the whole of it may last, until it is left; None for no limit.

        Raises:
            TimeoutError, ConnectionClosed, RuntimeError: as by `call`.
            BaseException: whatever the block raises when it is entered or left.
        """
        with _Held(self._loop, manager, timeout, self._loop) as value:
            yield value

    def close(self) -> None:
        """Cancel what runs, and end the thread. Again it does nothing.

        Raises:
            RuntimeError: called in the Trio thread, or in a forked child.
        """
        self._loop.check()
        self._loop.stop()
        self._loop.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@final
class Channel:
    """A channel of a `Connection`, made by `Connection.open_channel`; any threads may use it at once.

    ``for item in channel`` ends where the other side has ended its direction, or answered. The errors are those of
    `bokbok_trio.Channel`, and ``TimeoutError``.
    """

    def __init__(
        self, connection: Connection, held: _Held[_channel.Channel], channel: _channel.Channel
    ) -> None:
        self._connection = connection  # which must not be collected
        self._loop = connection.portal._loop
        self._held = held
        self._channel = channel

    def send(self, item: Fields, *, timeout: float | None = None) -> None:
        """Send an item, as soon as the other side has room; see `bokbok_trio.Channel.send`."""
        self._loop.call(partial(self._channel.send, item), timeout, self._held)

    def receive(self, *, timeout: float | None = None) -> list[bytes]:
        """Receive an item; see `bokbok_trio.Channel.receive`.

        After the time no item is lost: the next call gets it. After Ctrl-C one may be.
        """
        return self._loop.call(self._channel.receive, timeout, self._held)

    def end(self) -> None:
        """Send no more items; receiving goes on."""
        self._loop.call(self._channel.end, None, self._held)

    def answer(self, *, timeout: float | None = None) -> list[bytes]:
        """Wait for the answer of the handler over there; see `bokbok_trio.Channel.answer`."""
        return self._loop.call(self._channel.answer, timeout, self._held)

    def __iter__(self) -> Iterator[list[bytes]]:
        return self

    def __next__(self) -> list[bytes]:
        try:
            return self.receive()
        except trio.EndOfChannel:
            raise StopIteration from None


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
        held: _Held[_connection.Connection],
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
        held = _Held(self.portal._loop, manager, timeout, self._held)
        with held as channel:
            yield Channel(self, held, channel)

    def ping(self, *, timeout: float | None = None) -> float:
        """Return how long it takes there and back, in seconds."""
        return self.call(self.connection.ping, timeout=timeout)

    def call(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> _T:
        """Call any async function in the Trio thread, as `Portal.call` does; it ends with the connection."""
        return self.portal._loop.call(partial(function, *args), timeout, self._held)

    def submit(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> concurrent.futures.Future[_T]:
        """As `call`, but do not wait for it; see `Portal.submit`.

        ::

            futures = [c.submit(c.connection.request, ["ping", str(n)]) for n in range(100)]
            answers = [future.result() for future in futures]
        """
        return self.portal._loop.submit(partial(function, *args), timeout, self._held)

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
    request_handler: RequestHandler | None = None,
    channel_handler: ChannelHandler | None = None,
    close_handler: _connection.ConnectionHandler | None = None,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
    portal: Portal | None = None,
) -> Connection:
    """Open a connection, to be used as a block, or at once and until `Connection.close`.

    It takes no longer than ``connect_timeout`` and ``handshake_timeout`` of the settings. Ctrl-C ends it.

    Arguments:
        to, user, key, service, insecure, settings: as for `bokbok_trio.open_connection`.
        request_handler, channel_handler, close_handler: async functions, which run in the Trio thread.
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
    held = _Held(portal._loop, manager, None, portal._loop)
    try:
        return Connection(portal, held, held.__enter__(), owns=owns)
    except BaseException:
        if owns:
            portal.close()
        raise
