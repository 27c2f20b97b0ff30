"""`Call`: an async function that runs in the Trio thread for another thread, which waits for a `Latch`.

Ctrl-C interrupts the caller between any two steps. So the Trio thread and the caller share a plain lock,
which the Trio thread releases and never waits for. A condition of `threading` would not do: an interrupted
thread may leave it locked, and the Trio thread would wait for it for ever.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar, final

import trio

from ._arguments import check_amount

WAKE_EVERY: Final = 1.0
"""Seconds between two looks of a waiting thread at its latch. Windows cannot interrupt a lock, so Ctrl-C is
noticed at such a look. So is a latch that an interrupted thread took and did not release."""

_T = TypeVar("_T")


@final
class CallGroup:
    """Calls that share a nursery, and end with it at the latest. For the Trio thread alone.

    Arguments:
        make_error: makes the error for a call that finds the nursery closed, or that ends with it.

    Attributes:
        nursery: where the calls run, while it is open.
    """

    def __init__(self, make_error: Callable[[], Exception]) -> None:
        self.nursery: trio.Nursery | None = None
        self.make_error = make_error


@final
class Latch:
    """One thread sets it, once. Others wait for it, and Ctrl-C may interrupt them at any step."""

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Set it. It must not be set yet."""
        self.is_set = True
        self._lock.release()

    def look(self) -> bool:
        """Wait for at most `WAKE_EVERY` seconds, and return whether it is set."""
        if not self.is_set and self._lock.acquire(timeout=WAKE_EVERY):
            self._lock.release()
        return self.is_set


@final
class Call(Generic[_T]):
    """An async function that runs in the Trio thread for another thread.

    Arguments:
        function: the function, without arguments.
        timeout: seconds that it may take; None for no limit.
        group: the calls that it belongs to.
        when_done: called in the Trio thread when the call has ended.

    Attributes:
        error: what the function raised, or why the call was cut; None if it returned.
        was_cut: whether the call was ended by its time limit or with its group. The error is ours then.
        done: set when the call has ended.

    Raises:
        TypeError, ValueError: `timeout` is not a number of seconds, or negative.
    """

    def __init__(
        self,
        function: Callable[[], Awaitable[_T]],
        timeout: float | None,
        group: CallGroup,
        when_done: Callable[[Call[_T]], object] = lambda _: None,
    ) -> None:
        if timeout is not None:
            check_amount("timeout", timeout, "seconds")
        self._function = function
        self._timeout = timeout
        self._group = group
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
        """Start it, as a task in the nursery of its group."""
        self._has_started = True
        if self._group.nursery is None:
            self._cut(self._group.make_error())
            return
        if self._timeout is not None:
            self._scope.deadline = trio.current_time() + self._timeout
        self._context.run(self._group.nursery.start_soon, self._run)

    def give_up(self) -> None:
        """Cancel it. A call that has not started ends at once, and never starts."""
        self._scope.cancel()
        if not self._has_started:
            self._has_started = True
            self._cut(self._group.make_error())

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
            self._cut(self._group.make_error())

    def is_late(self) -> bool:
        """Return whether its time limit has passed."""
        return self._scope.deadline <= trio.current_time()

    def make_timeout(self) -> TimeoutError:
        """Make the error of a call that took too long."""
        return TimeoutError(f"it took longer than {self._timeout} seconds")

    def _cut(self, error: Exception) -> None:
        self.error = error
        self.was_cut = True
        self._end()

    def _end(self) -> None:
        if self.error is not None and self.error.__traceback__ is not None:
            # Drop the frame of `_run`: it refers to this call, which refers to the error.
            self.error = self.error.with_traceback(self.error.__traceback__.tb_next)
        self._when_done(self)
        self.done.set()

    # ---- in the thread of the caller ----

    def result(self) -> _T:
        """Return what the function returned, or raise what it raised. The call must have ended."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                del self  # the traceback refers to this frame, and would keep the call alive
        return self._values[0]
