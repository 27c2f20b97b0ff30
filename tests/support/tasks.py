"""The tasks of this Trio run, by their names."""

from __future__ import annotations

import re

import trio


def tasks_named(pattern: str) -> list[trio.lowlevel.Task]:
    """Return all tasks whose whole name matches a pattern."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    found: list[trio.lowlevel.Task] = []
    tasks = [root]
    while tasks:
        task = tasks.pop()
        if re.fullmatch(pattern, task.name):
            found.append(task)
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return found


def count_reading_tasks() -> int:
    """Count the tasks of connections that read, handle a request that they read, or wait to read."""
    return len(tasks_named(r"bokbok_trio reader|.* \(request \d+\)"))
