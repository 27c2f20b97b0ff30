"""`ReadTurn`: which task of a connection reads. No Trio, no I/O.

One task reads, and begins the handler of each request that it reads. If a handler waits, the task becomes
that handler's, and the follower reads on, or a new task if there is no follower. A task whose handler has
ended becomes the follower, or ends if there is one already.

This is the Leader/Followers pattern (Schmidt et al., PLoP 2000), in which the thread that received an
event handles it.
"""

from __future__ import annotations

from typing import Generic, TypeVar, final

_Task = TypeVar("_Task")


@final
class ReadTurn(Generic[_Task]):
    """The turn to read, and the task that waits for it.

    Attributes:
        reader: the task that reads; None while the next one is being started.
        follower: the task that waits to read next; None if there is none.
    """

    __slots__ = ("follower", "reader")

    def __init__(self) -> None:
        self.reader: _Task | None = None
        self.follower: _Task | None = None

    def begin(self, task: _Task) -> None:
        """Note that a task that was started to read runs now."""
        assert self.reader is None, "two tasks read"
        self.reader = task

    def hand_over(self) -> _Task | None:
        """Note that the task that reads is a handler's from now on.

        Returns:
            The follower, which reads from now on. None: there is none, so start a task to read.
        """
        assert self.reader is not None, "nobody reads"
        self.reader, self.follower = self.follower, None
        return self.reader

    def follow(self, task: _Task) -> bool:
        """Return whether a task whose handler has ended is the follower now. If not, it must end."""
        assert task is not self.reader, "a task that reads cannot follow"
        if self.follower is not None:
            return False
        self.follower = task
        return True

    def leave(self, task: _Task) -> bool:
        """Note that a task ends, so that it neither reads nor follows. Return whether it was reading."""
        if self.follower is task:
            self.follower = None
        if self.reader is not task:
            return False
        self.reader = None
        return True
