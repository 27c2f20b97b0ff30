"""Eager start: run a coroutine in the current task, and make the task its own when it first waits.

asyncio calls tasks that begin like this eager tasks. A handler that never waits needs no task of its own. A
handler that waits finds everything as in a task of its own from then on: its context variables are the task's
context, and its frames are the task's frames.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from types import CoroutineType, FrameType, coroutine
from typing import Any, cast, final


@final
class _Started:
    """A coroutine that has begun and waits, in a form that ``yield from`` continues.

    ``yield from`` begins with ``send(None)``. The first of these returns the message that the coroutine has
    yielded already. Trio's introspection takes this object for the coroutine itself.
    """

    __slots__ = ("_message", "_work", "close", "send", "throw")

    def __init__(self, work: Coroutine[Any, Any, object], message: object) -> None:
        self._work = work
        self._message = message
        self.send = work.send
        self.throw = work.throw
        self.close = work.close

    def __iter__(self) -> _Started:
        return self

    def __next__(self) -> object:
        if self._message is None:
            return self.send(None)
        message, self._message = self._message, None
        return message

    @property
    def cr_frame(self) -> FrameType | None:
        return cast("CoroutineType[Any, Any, object]", self._work).cr_frame

    @property
    def cr_await(self) -> object:
        return cast("CoroutineType[Any, Any, object]", self._work).cr_await


@coroutine
def start_eagerly(
    work: Coroutine[Any, Any, object], context: Context, on_first_wait: Callable[[], object]
) -> Generator[Any, Any, bool]:
    """Begin a coroutine in a context of its own, and await it.

    Arguments:
        work: a native coroutine that has not begun.
        context: its context variables until it first waits.
        on_first_wait: called when it first waits. It makes `context` the task's. The event loop does not know
            yet that the current task waits, so this function must not wake the task.

    Returns:
        Whether the coroutine waited. An exception of the coroutine is raised here. So is an exception of
        `on_first_wait`, after the coroutine has ended: it is never abandoned.
    """
    try:
        message = context.run(work.send, None)
    except StopIteration:
        return False
    failure: BaseException | None = None
    try:
        on_first_wait()
    except BaseException as exc:  # noqa: BLE001  (raised below)
        failure = exc
    yield from _Started(work, message)
    if failure is not None:
        raise failure
    return True
