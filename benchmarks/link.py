"""A link in user space, where the kernel has no ``netem``: two TUN devices, and a cable between them.

Each direction has a rate, a delay, and before them a queue which drops what does not fit. Unlike a
token bucket it lets no burst pass at the speed of the machine, and it has a length.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import time
from collections import deque
from typing import Final

TUNSETIFF: Final = 0x400454CA
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000

MAX_PACKET_SIZE: Final = 65_536
"""Bytes of an IP packet."""

LATENESS: Final = 0.002
"""Seconds by which this process may be late without the link losing capacity by it."""


def open_tun(name: str) -> int:
    """Make a TUN device of that name; returns its file descriptor, and it goes when that is closed."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


class Direction:
    """One direction: sizes in bytes, times in seconds."""

    def __init__(self, source: int, sink: int, rate: float, delay: float, limit: float) -> None:
        self._source = source
        self._sink = sink
        self._rate = rate
        self._delay = delay
        self._limit = limit
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._free_at = 0.0
        self._flying: deque[tuple[float, bytes]] = deque()

    def read(self) -> None:
        """Queue what has come."""
        while True:
            try:
                packet = os.read(self._source, MAX_PACKET_SIZE)
            except BlockingIOError:
                return
            if self._queued + len(packet) <= self._limit:
                self._queue.append(packet)
                self._queued += len(packet)

    def step(self, now: float) -> float | None:
        """Do what is due; returns when the next is, if anything is."""
        while self._queue and self._free_at <= now:
            packet = self._queue.popleft()
            self._queued -= len(packet)
            self._free_at = max(self._free_at, now - LATENESS) + len(packet) / self._rate
            self._flying.append((self._free_at + self._delay, packet))
        while self._flying and self._flying[0][0] <= now:
            os.write(self._sink, self._flying.popleft()[1])
        due = [self._free_at] if self._queue else []
        due += [self._flying[0][0]] if self._flying else []
        return min(due, default=None)


def run_link(one: int, other: int, *, rate: float, round_trip: float, queue: float) -> None:
    """Be the link, for ever.

    Arguments:
        one, other: the descriptors of its ends.
        rate: bytes per second, of each direction.
        round_trip: seconds, of the empty link.
        queue: seconds that a full queue takes to drain.
    """
    directions = {
        one: Direction(one, other, rate, round_trip / 2, rate * queue),
        other: Direction(other, one, rate, round_trip / 2, rate * queue),
    }
    while True:
        now = time.monotonic()
        due = [at for direction in directions.values() if (at := direction.step(now)) is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        for source in select.select(list(directions), [], [], wait)[0]:
            directions[source].read()
