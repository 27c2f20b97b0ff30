"""`Loop`: a Trio run in a thread of its own, in which other threads start calls.

Ctrl-C interrupts the main thread alone, between any two steps. So

- an interrupted caller cancels its call and waits for the end of it; a second interrupt ends the wait;
- no thread outlives the `Portal` that made it: the finalizer of the portal stops the loop, which refers to
  nothing of the portal, and a hook stops all loops when the interpreter exits.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, TypeVarTuple, final

import trio

from ._errors import ConnectionClosed
from ._portal_call import Call, CallGroup, Latch

CLOSE_GRACE: Final = 2.0
"""Seconds that blocks have to be left when their loop stops. Then they are cancelled."""

EXIT_GRACE: Final = CLOSE_GRACE + 1
"""Seconds that the interpreter waits for all loops when it exits."""

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

logger = logging.getLogger("bokbok_trio")


@final
class Loop:
    """A Trio run in a thread of its own, until it is stopped.

    Attributes:
        calls: the calls that belong to no block. Stopping cancels them.
        blocks: the calls that hold a block. Stopping leaves the blocks.
        ends: events that tell these calls to leave their blocks.
    """

    def __init__(self) -> None:
        self.calls = CallGroup(self.make_error)
        self.blocks = CallGroup(self.make_error)
        self.ends: set[trio.Event] = set()
        self._thread = threading.Thread(target=self._run, name="bokbok_trio portal", daemon=True)
        self._pid = os.getpid()
        self._ready = Latch()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stopped = trio.Event()
        self._is_stopping = False
        self._is_over = False
        self._failure: BaseException | None = None

    # ---- in any thread ----

    def start(self) -> None:
        """Start the thread, and wait until it takes calls."""
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
        """Leave the blocks, cancel the calls, and end the thread. Returns at once. Any thread may stop it."""
        self._is_stopping = True
        self.post(self._stopped.set)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, for at most `timeout` seconds."""
        self._thread.join(timeout)

    def check(self) -> None:
        """Refuse a call that would wait for ever.

        Raises:
            RuntimeError: called in the Trio thread, or in a forked child.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("this would block the Trio thread that it waits for; use the async API here")
        if os.getpid() != self._pid:
            raise RuntimeError("the Trio thread is in the parent of this forked process; connect anew here")

    def has_made_this_thread(self) -> bool:
        """Return whether this is a worker thread of the run, so that a call waits until the thread ends."""
        try:
            return trio.from_thread.run_sync(trio.lowlevel.current_trio_token) is self._token
        except RuntimeError:
            return False  # Trio did not make the thread, or its run has ended

    def post(self, function: Callable[[*_Ts], object], *args: *_Ts) -> bool:
        """Call a function in the Trio thread soon. Returns whether the run takes such calls."""
        if self._token is None or self._is_over or os.getpid() != self._pid:
            return False
        try:
            with _without_interrupts():  # run_sync_soon takes a lock, which the Trio thread waits for
                self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            return False
        return True

    def wait(self, latch: Latch) -> None:
        """Wait until the run sets a latch.

        Raises:
            ConnectionClosed: the run has ended and did not set it.
        """
        is_over = False
        while not latch.look():
            if is_over:
                raise self.make_error()
            is_over = self._is_over  # the run may have set it just before its end: look once more

    def begin(self, call: Call[Any]) -> None:
        """Start a call.

        Raises:
            ConnectionClosed: the run has ended.
        """
        if not self.post(call.start):
            raise self.make_error()

    def make_error(self) -> Exception:
        """Make the error of a call that finds the run ended."""
        if self._failure is None:
            return ConnectionClosed("the portal was closed")
        return ConnectionClosed("the Trio thread of the portal has crashed")

    def give_up(self, call: Call[Any]) -> None:
        """Cancel a call, and wait until it has ended."""
        if self.post(call.give_up):
            self.wait(call.done)

    def call(self, function: Callable[[], Awaitable[_T]], timeout: float | None, group: CallGroup) -> _T:
        """Run an async function in the Trio thread, and wait for its result."""
        self.check()
        call = Call(function, timeout, group)
        try:
            self.begin(call)
            self.wait(call.done)
        except BaseException:
            self.give_up(call)
            raise
        try:
            return call.result()
        finally:
            del call  # the traceback refers to this frame, and would keep the call alive

    def submit(
        self, function: Callable[[], Awaitable[_T]], timeout: float | None, group: CallGroup
    ) -> concurrent.futures.Future[_T]:
        """Run an async function in the Trio thread. The future gets its result."""
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

        call = Call(function, timeout, group, settle)
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
        if self._is_stopping:  # `stop` came before the token, and could not set the event
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
"""The loops that run."""


@atexit.register
def _stop_all() -> None:
    """Stop all loops when the interpreter exits, so that their peers see an orderly end."""
    loops = list(_LOOPS)
    for loop in loops:
        loop.stop()
    deadline = time.monotonic() + EXIT_GRACE
    for loop in loops:
        loop.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def _without_interrupts() -> Generator[None]:
    """Delay Ctrl-C until the end of the block, which must be short."""
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    delayed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: delayed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if delayed:
            handler(delayed[0], None)
