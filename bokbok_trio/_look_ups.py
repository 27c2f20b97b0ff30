"""Look-ups of host names in threads: a limited number at once, and fewer of the same name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

import trio

LOOK_UPS: Final = 40
"""Look-ups at once in one Trio run, including those that were abandoned and have not ended. Others wait in
order. Trio allows as many threads for all other purposes."""

LOOK_UPS_OF_NAME: Final = 2
"""Look-ups of one name at once, so that a name whose server hangs does not hold up other names."""

_T = TypeVar("_T")

_Limiters = dict[str | None, trio.CapacityLimiter]

_limiters: trio.lowlevel.RunVar[_Limiters] = trio.lowlevel.RunVar("bokbok_trio look-ups")
"""The limiter of each name; that of all names together has the key None."""


async def look_up_in_thread(name: str, look_up: Callable[[], _T]) -> _T:
    """Look a name up in a thread. Cancellation abandons the thread, which counts until it has ended."""
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
    # From here on the thread runs in any case. So the thread releases the limiters, and not this task.
    return await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
