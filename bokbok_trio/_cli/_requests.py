"""`bokbok request` and `bokbok ping`."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from typing import Any, Final

import trio

from .. import BokbokError
from ._connecting import Session, run_connected
from ._exits import CommandError, Exit
from ._fields import parse_fields
from ._output import Output, wait_reader_gone
from ._streams import send_nothing, write_items
from ._values import as_text

MS: Final = 1000
"""Milliseconds in a second."""


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
    """Write the fields of an answer: a line each, or as a JSON text, or as they are."""
    if out.raw:
        out.data(b"".join(fields))
    elif out.is_for_programs:
        out.value([as_text(field) for field in fields])
    else:
        for field in fields:
            out.data(field if out.is_terminal else field + b"\n")


# ---- ping ----


def ping(options: Namespace, out: Output) -> None:
    """Ping again and again, and write a line for each and at last a summary."""
    times: list[float] = []
    sent = 0

    async def work(session: Session) -> None:
        nonlocal sent
        place = session.connection.address
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_reader_gone)
            due = trio.current_time()
            while sent < options.count:
                await trio.sleep_until(due)
                due = max(due + options.interval, trio.current_time())
                sent += 1
                times.append(await _ping(session))
                line = f"pong from {place}: seq={sent} time={times[-1] * MS:.3f} ms\n".encode()
                await out.item(
                    out.encode({"seq": sent, "seconds": times[-1]}, is_item=True)
                    if out.is_for_programs
                    else line
                )
            nursery.cancel_scope.cancel()

    try:
        run_connected(options, work, is_stream=True)
    finally:
        if sent:
            summary = summarize(sent, times)
            if out.is_for_programs:
                out.value(summary, is_item=True)
            else:
                for line in show_summary(options.address, summary):
                    out.line(line)


async def _ping(session: Session) -> float:
    try:
        return await session.connection.ping()
    except BokbokError as exc:
        raise CommandError(
            f"the connection was lost: {exc}", Exit.LOST_NOT_RUN
        ) from exc  # a ping runs nothing


def summarize(sent: int, times: list[float]) -> dict[str, Any]:
    """Count pings, and give the least, the middle and the 99th of a hundred times, in seconds."""
    summary: dict[str, Any] = {"pings": sent, "pongs": len(times)}
    if times:
        ordered = sorted(times)
        nearest = math.ceil(0.99 * len(ordered)) - 1
        summary |= {"min": ordered[0], "median": statistics.median(ordered), "p99": ordered[nearest]}
    return summary


def show_summary(address: str, summary: dict[str, Any]) -> list[str]:
    """The same in lines."""
    lines = [f"--- {address}: {summary['pings']} pings, {summary['pongs']} pongs"]
    if "min" in summary:
        lines.append(", ".join(f"{name} {summary[name] * MS:.3f} ms" for name in ("min", "median", "p99")))
    return lines
