"""`Portal`: a thread with a Trio run, in which other threads call async functions.

Theory
======

A call is a task in that run, and a latch that the caller waits for. Ctrl-C interrupts the caller alone: it is
a ``KeyboardInterrupt`` in the main thread, between any two steps. So

- what the Trio thread shares with a caller is a plain lock, which it releases and never waits for: a
  condition of `threading` that an interrupt has left locked would stop it for ever;
- who is interrupted cancels his call, and waits until that has ended; again interrupted, he waits no more;
- no thread outlives the `Portal` that it is for. The thread refers to a `Loop`, which does not refer to the
  `Portal`; when that goes, by whatever interrupt in whatever step, its finalizer ends the thread. A hook ends
  what is left when the interpreter exits.
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
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, TypeVarTuple, final

import trio

from ._errors import ConnectionClosed

WAKE_EVERY: Final = 1.0
"""Seconds after which a waiting thread looks up: where a lock cannot be interrupted, as on Windows, Ctrl-C is
noticed then, and so is a latch that an interrupted thread did not pass on."""

CLOSE_GRACE: Final = 2.0
"""Seconds that blocks may take to be left when their portal is closed. Then they are cancelled."""

EXIT_GRACE: Final = CLOSE_GRACE + 1
"""Seconds that the interpreter waits for that when it exits."""

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

logger = logging.getLogger("bokbok_trio")


@final
class Place:
    """Where calls run, for the Trio thread alone.

    Arguments:
        make_error: makes the error for calls that find it closed, or that end with it.

    Attributes:
        nursery: for their tasks, while it is open.
    """

    def __init__(self, make_error: Callable[[], Exception]) -> None:
        self.nursery: trio.Nursery | None = None
        self.make_error = make_error


@final
class Latch:
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
class Call(Generic[_T]):
    """An async function that runs in the Trio thread for another thread.

    Arguments:
        function: what to call.
        timeout: seconds that it may take; None for no limit.
        place: where it runs.
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
        place: Place,
        when_done: Callable[[Call[_T]], object] = lambda _: None,
    ) -> None:
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must be at least 0 seconds, not {timeout}")
        self._function = function
        self._timeout = timeout
        self._place = place
        self._when_done = when_done
        self._context = contextvars.copy_context()
        self._scope = trio.CancelScope()
        self._values: list[_T] = []
        self._has_started = False
        self.error: BaseException | None = None
        self.was_cut = False
        self.done = Latch()

    # ---- in the Trio thread ----

    def start(self) -> None:
        """Begin, as a task of its place."""
        self._has_started = True
        if self._place.nursery is None:
            self._cut(self._place.make_error())
            return
        if self._timeout is not None:
            self._scope.deadline = trio.current_time() + self._timeout
        self._context.run(self._place.nursery.start_soon, self._run)

    def give_up(self) -> None:
        """Let it end soon; if it was not to start before, now."""
        self._scope.cancel()
        if not self._has_started:
            self._has_started = True
            self._cut(self._place.make_error())

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
            self._cut(self._place.make_error())

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
        if self.error is not None and self.error.__traceback__ is not None:
            # Without the frame of `_run`, or that and the error would keep each other alive.
            self.error = self.error.with_traceback(self.error.__traceback__.tb_next)
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
class Loop:
    """A Trio run in a thread of its own, until it is stopped.

    Attributes:
        calls: for calls that belong to nothing else; they are cancelled when it is stopped.
        blocks: for blocks that are held; they are left then.
        ends: by which those are told.
    """

    def __init__(self) -> None:
        self.calls = Place(self.make_error)
        self.blocks = Place(self.make_error)
        self.ends: set[trio.Event] = set()
        self._thread = threading.Thread(target=self._run, name="bokbok_trio portal", daemon=True)
        self._pid = os.getpid()
        self._ready = Latch()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stopped = trio.Event()
        self._is_stopping = False
        self._is_over = False
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin, and wait until it runs."""
        try:
            with _without_interrupts():
                self._thread.start()
            self.wait(self._ready)
        except BaseException:
            self.stop()
            raise
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Leave the blocks, cancel the calls, and end. Returns at once; for any thread, at any time."""
        self._is_stopping = True
        self.post(self._stopped.set)

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
        if self._token is None or self._is_over or os.getpid() != self._pid:
            return False
        try:
            with _without_interrupts():  # it takes a lock, which the Trio thread waits for
                self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return False
        return True

    def wait(self, latch: Latch) -> None:
        """Wait until a latch is set, which the run does unless it crashes."""
        is_over = False
        while not latch.look():
            if is_over:
                raise self.make_error()
            is_over = self._is_over

    def begin(self, call: Call[Any]) -> None:
        """Start a call."""
        if not self.post(call.start):
            raise self.make_error()

    def make_error(self) -> Exception:
        """See `Place`."""
        return ConnectionClosed("it was closed" if self._failure is None else "its Trio thread has crashed")

    def give_up(self, call: Call[Any]) -> None:
        """Cancel a call, and wait until it has ended."""
        if self.post(call.give_up):
            self.wait(call.done)

    def call(self, function: Callable[[], Awaitable[_T]], timeout: float | None, place: Place) -> _T:
        """Run an async function in the Trio thread, and wait for it."""
        self.check()
        call = Call(function, timeout, place)
        try:
            self.begin(call)
            self.wait(call.done)
        except BaseException:
            self.give_up(call)
            raise
        try:
            return call.result()
        finally:
            del call  # as there

    def submit(
        self, function: Callable[[], Awaitable[_T]], timeout: float | None, place: Place
    ) -> concurrent.futures.Future[_T]:
        """Run an async function in the Trio thread, and do not wait for it."""
        self.check()
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def settle(call: Call[_T]) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if call.error is None:
                future.set_result(call.result())
            else:
                future.set_exception(call.error)

        def note_cancelled(future: concurrent.futures.Future[_T]) -> None:
            if future.cancelled():
                self.post(call.give_up)

        call = Call(function, timeout, place, settle)
        future.add_done_callback(note_cancelled)
        try:
            self.begin(call)
        except BaseException:
            future.cancel()
            raise
        return future

    # ---- in the Trio thread ----

    def _run(self) -> None:
        _LOOPS.add(self)
        try:
            trio.run(self._main)
        except BaseException as exc:
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
            self._stopped.set()
        async with trio.open_nursery() as self.calls.nursery:
            async with trio.open_nursery() as self.blocks.nursery:
                self._ready.set()
                await self._stopped.wait()
                for end in self.ends:
                    end.set()
                self.blocks.nursery.cancel_scope.deadline = trio.current_time() + CLOSE_GRACE
            self.blocks.nursery = None
            self.calls.nursery.cancel_scope.cancel()
        self.calls.nursery = None


_LOOPS: Final[set[Loop]] = set()
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
    """Put off Ctrl-C. For what is short, and would do harm if it were left half done."""
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
class Held(AbstractContextManager[_T]):
    """An async block that is entered and left from another thread, in a task that stays in it.

    Arguments:
        loop: where.
        manager: the block.
        timeout: seconds that it may last.
        outer: what it is in, and ends with at the latest; None: in nothing.

    Attributes:
        place: for calls that end with it at the latest.
    """

    def __init__(
        self,
        loop: Loop,
        manager: AbstractAsyncContextManager[_T],
        timeout: float | None,
        outer: Place | None = None,
    ) -> None:
        self.place = Place(self._make_error)
        self._loop = loop
        self._manager = manager
        self._values: list[_T] = []
        self._entered = Latch()
        self._left = trio.Event()
        self._body_error: BaseException | None = None
        self._is_suppressed: bool | None = None
        self._call = Call(self._hold, timeout, outer or loop.blocks, self._note_end)

    def __enter__(self) -> _T:
        self._loop.check()
        try:
            self._loop.begin(self._call)
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

    # ---- in the Trio thread ----

    def _make_error(self) -> Exception:
        return self._call.make_timeout() if self._call.is_late() else ConnectionClosed("it was closed")

    async def _hold(self) -> None:
        value = await self._manager.__aenter__()
        error: BaseException | None
        self._loop.ends.add(self._left)
        try:
            async with trio.open_nursery() as self.place.nursery:
                self._values.append(value)
                self._entered.set()
                await self._left.wait()
                self.place.nursery.cancel_scope.cancel()
            error = self._body_error
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            error = exc
        self.place.nursery = None
        self._loop.ends.discard(self._left)
        try:
            # Not raised here as what the body raised may be a StopIteration, which a coroutine cannot raise.
            error_type, traceback = (None, None) if error is None else (type(error), error.__traceback__)
            is_suppressed = await self._manager.__aexit__(error_type, error, traceback)
            if error is self._body_error:
                self._is_suppressed = is_suppressed
            elif not is_suppressed:
                assert error is not None
                raise error
        finally:
            del error  # or this frame and the traceback would keep each other alive

    def _leave(self, error: BaseException | None) -> None:
        self._body_error = error
        self._left.set()

    def _note_end(self, _call: object) -> None:
        if not self._entered.is_set:
            self._entered.set()


def bind(function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts) -> Callable[[], Awaitable[_T]]:
    """Put an async function and its arguments together.

    Raises:
        TypeError: it has been called already.
    """
    if isinstance(function, Coroutine):
        function.close()
        raise TypeError("pass an async function and its arguments, and not what it returned: call(f, 1)")
    return partial(function, *args)


@final
class Portal:
    """A thread with a Trio run, in which other threads call async functions.

    ::

        with Portal() as portal:
            portal.call(trio.sleep, 1)

    It begins with this object, and ends by `close`, with the block, or when nobody has the object any more.
    Any threads may use it at once. In the end blocks are left, and calls cancelled.

    A forked child has no such thread, and calls raise ``RuntimeError`` there.
    """

    def __init__(self) -> None:
        self._loop = Loop()
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
            ConnectionClosed: it was closed, before or meanwhile.
            RuntimeError: called in the Trio thread, or in a forked child.
            BaseException: whatever it raised.
        """
        return self._loop.call(bind(function, *args), timeout, self._loop.calls)

    def submit(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> concurrent.futures.Future[_T]:
        """Call an async function in the Trio thread, and do not wait for it.

        Cancelling the future cancels it; ``asyncio.wrap_future`` makes it one of asyncio's.

        Arguments and errors are those of `call`; the future raises what comes after the start.
        """
        return self._loop.submit(bind(function, *args), timeout, self._loop.calls)

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
        with Held(self._loop, manager, timeout) as value:
            yield value

    def close(self) -> None:
        """Leave the blocks that are open, which may take two seconds, cancel what runs, and end the thread.

        Again it does nothing.

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
