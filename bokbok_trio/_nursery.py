"""Exceptions and nurseries: what comes out of a nursery of ours, and what must not.

Trio wraps what leaves a nursery in an exception group. A user who writes ``async with
open_connection(...)`` did not ask for a nursery, so what the body raises must come out as itself;
and no failure of a handler may come out at all.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast

import trio

if TYPE_CHECKING:
    _Group = BaseExceptionGroup[BaseException]


def split_exception(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Tell apart what a piece of user code raised.

    Returns:
        What is its failure, to be logged; and what must be raised on, by itself: the first
        ``KeyboardInterrupt``, ``SystemExit`` or the like in it, else its ``Cancelled``, which belongs
        to a scope outside. Either may be None. A crash during a cancellation has both.
    """
    fatal = _find_fatal(exc)
    if fatal is not None:
        return None, fatal
    if isinstance(exc, trio.Cancelled):
        return None, exc
    if isinstance(exc, BaseExceptionGroup):
        cancelled, error = cast("_Group", exc).split(trio.Cancelled)
        return error, cancelled
    return exc, None


def _find_fatal(exc: BaseException) -> BaseException | None:
    if isinstance(exc, BaseExceptionGroup):
        return next(filter(None, map(_find_fatal, cast("_Group", exc).exceptions)), None)
    return None if isinstance(exc, Exception | trio.Cancelled) else exc


@asynccontextmanager
async def bare_nursery() -> AsyncGenerator[trio.Nursery]:
    """Open a nursery that adds no exception group of its own.

    Its children must raise nothing but what `split_exception` gives to be raised on; the body must
    see to it that they end. What the body raises then comes out as itself, unless a child raised
    something fatal: then that does.
    """
    from_body: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as exc:  # noqa: BLE001  (raised again below)
                from_body = exc
    except BaseException as exc:
        error, rest = split_exception(exc)
        if error is not None:
            raise
        cancelled = isinstance(rest, trio.Cancelled | BaseExceptionGroup)
        if from_body is None or not cancelled:
            assert rest is not None
            raise rest from None
    if from_body is not None:
        try:
            raise from_body
        finally:
            del from_body  # or this frame and its traceback would keep each other alive
