"""`Portal`: a thread with a Trio run, in which other threads call async functions.

`Portal` is the public face. `Held` is an async block that a thread enters and leaves. ``_portal_loop.py`` has
the thread and its Trio run, and ``_portal_call.py`` has a single call.
"""

from __future__ import annotations

import concurrent.futures
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple, final

import trio

from ._errors import ConnectionClosed
from ._portal_call import Call, CallGroup, Latch
from ._portal_loop import Loop

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


@final
class Held(AbstractContextManager[_T]):
    """An async block that another thread enters and leaves. A task of the loop stays in it.

    Arguments:
        loop: the loop that runs the task.
        manager: the block.
        timeout: seconds that the block may last; None for no limit.
        outer: the calls of the block around this one, which ends with them; None: there is no such block.
        name: what the block is, for errors.

    Attributes:
        calls: calls that end with the block at the latest.
    """

    def __init__(
        self,
        loop: Loop,
        manager: AbstractAsyncContextManager[_T],
        timeout: float | None,
        outer: CallGroup | None = None,
        *,
        name: str = "block",
    ) -> None:
        self.calls = CallGroup(self._make_error)
        self._loop = loop
        self._manager = manager
        self._name = name
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
            return None  # the body raised already, or the portal was closed, which needs no error here
        try:
            raise error
        finally:
            del self, error, exc  # the traceback refers to this frame, and would keep them alive

    # ---- in the Trio thread ----

    def _make_error(self) -> Exception:
        if self._call.is_late():
            return self._call.make_timeout()
        return ConnectionClosed(f"the {self._name} was closed")

    async def _hold(self) -> None:
        value = await self._manager.__aenter__()
        error: BaseException | None
        self._loop.ends.add(self._left)
        try:
            async with trio.open_nursery() as self.calls.nursery:
                self._values.append(value)
                self._entered.set()
                await self._left.wait()
                self.calls.nursery.cancel_scope.cancel()
            error = self._body_error
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            error = exc
        self.calls.nursery = None
        self._loop.ends.discard(self._left)
        try:
            # Pass the error on and do not raise it: it may be a StopIteration, which a coroutine cannot
            # raise.
            error_type, traceback = (None, None) if error is None else (type(error), error.__traceback__)
            is_suppressed = await self._manager.__aexit__(error_type, error, traceback)
            if error is self._body_error:
                self._is_suppressed = is_suppressed
            elif not is_suppressed:
                assert error is not None
                raise error
        finally:
            del error  # the traceback refers to this frame, and both would keep each other alive

    def _leave(self, error: BaseException | None) -> None:
        self._body_error = error
        self._left.set()

    def _note_end(self, _call: object) -> None:
        if not self._entered.is_set:
            self._entered.set()


def bind(function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts) -> Callable[[], Awaitable[_T]]:
    """Return a function without arguments that calls an async function with its arguments.

    Raises:
        TypeError: `function` is a coroutine: it was called already.
    """
    if isinstance(function, Coroutine):
        function.close()
        raise TypeError("pass an async function and its arguments, and not a coroutine: call(f, 1)")
    return partial(_call, function, *args)


async def _call(function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts) -> _T:
    """Call an async function. If the function is not async, the error names it."""
    result: object = function(*args)
    if not isinstance(result, Awaitable):
        hint = "; pass that to open_stream or Portal.enter" if hasattr(result, "__aenter__") else ""
        raise TypeError(f"pass an async function: {function!r} returned {type(result).__name__}{hint}")
    value: _T = await result
    return value


@final
class Portal:
    """A thread with a Trio run, in which other threads call async functions.

    ::

        with Portal() as portal:
            portal.call(trio.sleep, 1)

    The thread starts when the object is made. It ends when `close` is called, when the ``with`` block is
    left, or when nothing refers to the object any more; then its blocks are left and its calls are cancelled.
    Any thread may use a portal, several at once.

    A forked child does not have the thread, so calls raise ``RuntimeError`` there.
    """

    def __init__(self) -> None:
        self._loop = Loop()
        weakref.finalize(self, self._loop.stop).atexit = False  # at exit `_stop_all` stops it
        self._loop.start()

    def call(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> _T:
        """Call an async function in the Trio thread, and wait for its result.

        The first Ctrl-C cancels the function and waits for its end; a second one ends the wait. The function
        sees the context variables of the calling thread.

        Arguments:
            function, args: the async function, and its positional arguments.
            timeout: seconds that it may take, 0 or more, as for `trio.fail_after`; None for no limit.

        Returns:
            The value that the function returned.

        Raises:
            TypeError: `function` is a coroutine: pass the function and its arguments instead.
            ValueError: `timeout` is negative.
            TimeoutError: the function took longer than `timeout`, and was cancelled.
            ConnectionClosed: the portal was closed before the call, or during it.
            RuntimeError: called in the Trio thread, or in a forked child.
            BaseException: any error that the function raised.
        """
        return self._loop.call(bind(function, *args), timeout, self._loop.calls)

    def submit(
        self, function: Callable[[*_Ts], Awaitable[_T]], *args: *_Ts, timeout: float | None = None
    ) -> concurrent.futures.Future[_T]:
        """Start an async function in the Trio thread, and return a future of its result.

        Cancelling the future cancels the function. ``asyncio.wrap_future`` turns it into a future of asyncio.

        Arguments and errors are those of `call`. Errors that happen after the start are raised by the future.
        """
        return self._loop.submit(bind(function, *args), timeout, self._loop.calls)

    @contextmanager
    def enter(
        self, manager: AbstractAsyncContextManager[_T], *, timeout: float | None = None
    ) -> Generator[_T]:
        """Enter an async block from this thread, and leave it with the ``with`` block.

        ::

            with portal.enter(open_server("localhost:0", handler)) as server:
                ...

        Arguments:
            manager: the block: an async context manager.
            timeout: seconds from entering to leaving the block, 0 or more; None for no limit.

        Raises:
            ValueError, TimeoutError, ConnectionClosed, RuntimeError: as for `call`.
            BaseException: any error that the block raises when it is entered or left.
        """
        with Held(self._loop, manager, timeout) as value:
            yield value

    def close(self) -> None:
        """Leave the open blocks, for at most two seconds, cancel the calls, and end the thread.

        A second call does nothing.

        Raises:
            RuntimeError: called in the Trio thread, in a thread that one of the portal's calls waits for, or
                in a forked child.
        """
        self._loop.check()
        if self._loop.has_made_this_thread():
            raise RuntimeError("close would wait for a call that waits for this thread")
        self._loop.stop()
        self._loop.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
