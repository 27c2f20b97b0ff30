"""Exceptions and nurseries: what comes out of a nursery of ours, and what must not.

Trio wraps what leaves a nursery in an exception group. A user who writes ``async with
open_connection(...)`` did not ask for a nursery, so what the body raises must come out as itself;
and no failure of a handler may come out at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, cast, final

import trio

if TYPE_CHECKING:
    _Group = BaseExceptionGroup[BaseException]


def split_exception(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Tell apart what a piece of user code raised, in the task that ran it.

    Returns:
        What is its failure, to be logged; and what must be raised on, by itself: the first
        ``KeyboardInterrupt``, ``SystemExit`` or the like in it, else its ``Cancelled``, which belongs
        to a scope outside. Either may be None. A crash during a cancellation has both. A
        ``Cancelled`` where nothing is cancelled, kept from earlier and raised again, is a failure.
    """
    fatal = _find_fatal(exc)
    if fatal is not None:
        return None, fatal
    error, cancelled = _split_cancelled(exc)
    if cancelled is not None and trio.current_effective_deadline() > -math.inf:
        return exc, None
    return error, cancelled


def _find_fatal(exc: BaseException) -> BaseException | None:
    if members := _members(exc):
        return next(filter(None, map(_find_fatal, members)), None)
    return None if isinstance(exc, Exception | trio.Cancelled) else exc


def _split_cancelled(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """What of it is no cancellation, and what is."""
    if isinstance(exc, BaseExceptionGroup):
        cancelled, error = cast("_Group", exc).split(trio.Cancelled)
        return error, cancelled
    return (None, exc) if isinstance(exc, trio.Cancelled) else (exc, None)


@contextmanager
def contain(log: Callable[[BaseException], object]) -> Generator[None]:
    """Keep the failure of a block from going further, and give it to `log`.

    What must go further, as `split_exception` tells, does.
    """
    try:
        yield
    except BaseException as exc:  # noqa: BLE001  (what is not kept is raised on)
        keep(exc, log)


def keep(exc: BaseException, log: Callable[[BaseException], object]) -> None:
    """Give a failure to `log`, and raise what of it must go further, as `split_exception` tells."""
    error, rest = split_exception(exc)
    if error is not None:
        log(error)
    if rest is not None:
        raise rest from rest.__cause__


@final
class bare_nursery:  # noqa: N801  (as `trio.open_nursery`)
    """Open a nursery that adds no exception group of its own; the body must see that the children end.

    Of what is raised, this comes out, as itself: what a child raised that ends the program; else
    what the body raised; else what a child raised; else, if the whole was cancelled, that.

    Made of a generator it would take 5 us more, and 0.4 KiB for as long as it lasts.
    """

    __slots__ = ("_nursery",)

    def __init__(self) -> None:
        self._nursery = trio.open_nursery()

    async def __aenter__(self) -> trio.Nursery:
        return await self._nursery.__aenter__()

    async def __aexit__(
        self, _type: object, from_body: BaseException | None, _traceback: object
    ) -> Literal[False]:
        error: BaseException | None = None
        try:
            await self._nursery.__aexit__(None, None, None)
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            fatal = _find_fatal(exc)
            if fatal is not None:
                raise fatal from fatal.__cause__
            if from_body is None or _split_cancelled(from_body)[0] is None:
                error = _unwrap(_split_cancelled(exc)[0] or exc)
        if error is not None:
            try:
                raise error
            finally:
                del error  # or this frame and its traceback would keep each other alive
        return False


def _unwrap(exc: BaseException) -> BaseException:
    """What is in a group of one."""
    members = _members(exc)
    return _unwrap(members[0]) if len(members) == 1 else exc


def _members(exc: BaseException) -> tuple[BaseException, ...]:
    """What is in a group; nothing, where it is none."""
    return cast("_Group", exc).exceptions if isinstance(exc, BaseExceptionGroup) else ()


def check_run(home: trio.lowlevel.TrioToken, what: object) -> None:
    """Refuse a call that does not come from the Trio run, and so the thread, that something belongs to.

    Its state and its tasks are that run's: a change from another one corrupts both.

    Raises:
        RuntimeError: it comes from another run or thread, or from no Trio task.
    """
    try:
        if trio.lowlevel.current_trio_token() is home:
            return
    except RuntimeError:
        pass  # no Trio run in this thread
    raise RuntimeError(f"{what!r} belongs to another Trio run; call it there, with trio.from_thread.run")


@final
class Once:
    """A `trio.Event` that is made only where somebody waits for it: it would take up 0.4 KiB."""

    __slots__ = ("_event", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._event: trio.Event | None = None

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._is_set

    def set(self) -> None:
        """It has happened."""
        self._is_set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Wait until it has happened."""
        if self._event is None:
            self._event = trio.Event()
            if self._is_set:
                self._event.set()
        await self._event.wait()


def is_within(ancestor: trio.lowlevel.Task | None) -> bool:
    """Whether the current task is that one, or was started by it, at any remove."""
    task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
    while task is not None and task is not ancestor:
        task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
    return task is not None
