"""Look-ups of host names, in threads of their own: so many at once, and fewer of each name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

import trio

LOOK_UPS: Final = 40
"""Look-ups of names at once in one Trio run, abandoned ones included: as many threads as Trio allows for all
else. More wait in turn."""

LOOK_UPS_OF_NAME: Final = 2
"""Look-ups of one name at once. A name whose server hangs so keeps no other name waiting."""

_T = TypeVar("_T")

_Limiters = dict[str | None, trio.CapacityLimiter]

_limiters: trio.lowlevel.RunVar[_Limiters] = trio.lowlevel.RunVar("bokbok_trio look-ups")
"""By name; that of all names together is None's."""


async def look_up_in_thread(name: str, look_up: Callable[[], _T]) -> _T:
    """Look a name up in a thread. Cancelled, this gives the thread up, which counts until it has ended."""
    try:
        limiters = _limiters.get()
    except LookupError:
        limiters = _Limiters({None: trio.CapacityLimiter(LOOK_UPS)})
        _limiters.set(limiters)
    of_name = limiters.setdefault(name, trio.CapacityLimiter(LOOK_UPS_OF_NAME))
    token = trio.lowlevel.current_trio_token()
    borrower = object()
    taken: list[trio.CapacityLimiter] = []

    def release() -> None:
        for limiter in taken:
            limiter.release_on_behalf_of(borrower)
        if not of_name.borrowed_tokens:
            limiters.pop(name, None)

    def run() -> _T:
        try:
            return look_up()
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(release)

    try:
        for limiter in (of_name, limiters[None]):
            await limiter.acquire_on_behalf_of(borrower)
            taken.append(limiter)
        await trio.lowlevel.checkpoint_if_cancelled()
    except BaseException:
        release()
        raise
    # From here on nothing keeps the thread from running, so it is the thread that releases.
    return await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
