"""Slots bound the requests in flight, class by class.

A *slot* is the right to have one more request in flight. Each side takes `max_requests` requests of every
*slot class*: the requests of one depth, with channels counted apart.

A request made in a handler is one deeper than the request being handled. So a request that holds a slot waits
only for deeper ones, and the deepest wait for none. That is why nested callbacks cannot deadlock.
"""

from __future__ import annotations

from typing import Final

MAX_DEPTH: Final = 15
"""How deep requests may be nested: far deeper than programs call back and forth on purpose, and few enough
depths that their slots together are a bound."""

CLASS_COUNT: Final = 2 * (MAX_DEPTH + 1)


def slot_class_of(depth: int, *, has_channel: bool) -> int:
    """Return the slot class of a request. Classes 0 and 1 are those of depth 0."""
    return 2 * depth + has_channel
