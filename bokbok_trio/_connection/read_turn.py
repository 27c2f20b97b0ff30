"""`ReadTurn`: which task of a connection reads. No Trio, no I/O.

One task reads, and begins the handler of each request that it reads. Where a handler waits, the task is that
handler's from then on, and the follower goes on reading, or a new task where there is no follower. A task
whose handler has ended becomes the follower, or ends where there is one already.

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
        follower: the task that waits to read next; None where there is none.
    """

    __slots__ = ("follower", "reader")

    def __init__(self) -> None:
        self.reader: _Task | None = None
        self.follower: _Task | None = None

    def begin(self, task: _Task) -> None:
        """A task was started to read, and runs now."""
        assert self.reader is None, "two tasks read"
        self.reader = task

    def hand_over(self) -> _Task | None:
        """The task that reads is a handler's from now on.

        Returns:
            The follower, which reads from now on; None: start a task to read.
        """
        assert self.reader is not None, "nobody reads"
        self.reader, self.follower = self.follower, None
        return self.reader

    def follow(self, task: _Task) -> bool:
        """The handler of a task has ended. Returns whether the task is the follower now; else it ends."""
        assert task is not self.reader, "a task that reads cannot follow"
        if self.follower is not None:
            return False
        self.follower = task
        return True

    def leave(self, task: _Task) -> bool:
        """A task ends: it reads no more, and follows no more. Return whether it was the one that read."""
        if self.follower is task:
            self.follower = None
        if self.reader is not task:
            return False
        self.reader = None
        return True
