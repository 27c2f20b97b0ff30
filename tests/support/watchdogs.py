"""For tests of the watchdog: a diary of its actions, and the task that serves all watchdogs."""

from __future__ import annotations

import trio

from bokbok_trio._connection.watchdog import Watchdog
from tests.support.tasks import tasks_named

PATIENCE = 40  # the defaults: 20 s of silence, 20 s more


class Diary:
    """The actions of a watchdog, with their times."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str]] = []

    def ping(self) -> None:
        self.events.append((trio.current_time(), "ping"))

    def lose(self, reason: str) -> None:
        self.events.append((trio.current_time(), reason))

    def watchdog(self, ping_after: float = 20, ping_timeout: float = 20) -> Watchdog:
        return Watchdog(ping_after, ping_timeout, ping=self.ping, fail=self.lose)


def system_tasks() -> list[trio.lowlevel.Task]:
    """Return the tasks that serve watchdogs."""
    return tasks_named("bokbok_trio watchdogs")
