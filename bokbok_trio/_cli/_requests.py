"""`bokbok request` and `bokbok ping`."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections import deque
from functools import partial
from typing import Any, Final

import trio

from .. import BokbokError
from ._connecting import Session, run_connected
from ._exits import CommandError, Exit
from ._fields import parse_fields
from ._output import Output, while_read
from ._streams import send_nothing, write_items
from ._values import as_text

MS: Final = 1000
"""Milliseconds in a second."""

MAX_TIMES: Final = 100_000
"""Pings that the summary covers: the last ones."""


def request(options: Namespace, out: Output) -> None:
    """Make a request and write its answer, or the items of its channel."""
    fields = parse_fields(options.field)
    if options.channel:

        def encode(item: list[bytes]) -> bytes:
            return b"".join(item) if out.raw else out.encode([as_text(each) for each in item], is_item=True)

        run_connected(
            options, lambda session: write_items(session, fields, encode, out, send_nothing), is_stream=True
        )
        return

    async def ask(session: Session) -> list[bytes]:
        return await session.connection.request(fields)

    write_fields(run_connected(options, ask), out)


def write_fields(fields: list[bytes], out: Output) -> None:
    """Write the fields of an answer: one a line, as a JSON text, or as they are."""
    if out.raw:
        out.data(b"".join(fields))
    elif out.is_for_programs:
        out.value([as_text(field) for field in fields])
    else:
        for field in fields:
            out.data(field if out.is_terminal else field + b"\n")


# ---- ping ----


def ping(options: Namespace, out: Output) -> None:
    """Ping again and again. Write a line for each ping, and a summary at the end."""
    pings = Pings()
    try:
        run_connected(options, partial(_ping, pings=pings, out=out), is_stream=True)
    finally:
        if pings.sent:
            summary = pings.summarize()
            if out.is_for_programs:
                out.value(summary, is_item=True)
            else:
                out.line(show_summary(options.address, summary))


async def _ping(session: Session, *, pings: Pings, out: Output) -> None:
    connection, options = session.connection, session.options
    due = trio.current_time()
    async with while_read():
        while pings.sent < options.count:
            await trio.sleep_until(due)
            due = max(due + options.interval, trio.current_time())
            pings.sent += 1
            try:
                seconds = await connection.ping()
            except BokbokError as exc:  # a ping runs nothing, so nothing has run
                raise CommandError(f"the connection was lost: {exc}", Exit.LOST_NOT_RUN) from exc
            pings.add(seconds)
            line = f"pong from {connection.address}: seq={pings.sent} time={seconds * MS:.3f} ms"
            values = {"seq": pings.sent, "seconds": seconds}
            await out.item(out.encode(values, is_item=True) if out.is_for_programs else out.encode_raw(line))


class Pings:
    """Counts pings, and keeps the round trip times of the last ones.

    Attributes:
        sent: how many were sent.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._answered = 0
        self._times: deque[float] = deque(maxlen=MAX_TIMES)

    def add(self, seconds: float) -> None:
        """Note that a ping was answered after so many seconds."""
        self._answered += 1
        self._times.append(seconds)

    def summarize(self) -> dict[str, Any]:
        """Return the counts, and the minimum, the median and the 99th percentile of the times in seconds."""
        summary: dict[str, Any] = {"pings": self.sent, "pongs": self._answered}
        if self._times:
            times = sorted(self._times)
            nearest = math.ceil(0.99 * len(times)) - 1
            summary |= {"min": times[0], "median": statistics.median(times), "p99": times[nearest]}
        return summary


def show_summary(address: str, summary: dict[str, Any]) -> str:
    """Format a summary in two lines, or in one if no ping was answered."""
    head = f"--- {address}: {summary['pings']} pings, {summary['pongs']} pongs"
    times = [f"{name} {summary[name] * MS:.3f} ms" for name in ("min", "median", "p99") if name in summary]
    return "\n".join([head, ", ".join(times)]) if times else head
