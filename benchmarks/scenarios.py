"""What is measured: each scenario is an async function, run in the client's process.

A scenario's first figure is the one that its CPU time is shown with.
"""

import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import trio
from adapters.base import JOB, JOB_BYTES, Adapter, Connection

SMALL = bytes(range(16))
BIG = 4 * 2**20  # bytes of the answer that `interleave` fetches
IDLE_CONNECTIONS = 500
CHURN_CONNECTIONS = 1_000
CHURN_TASKS = 10  # how many of those are opened at once
STEADY_PAUSE = 0.001  # seconds between two calls of the steady caller of `churn`
SLOW_PAUSE = 0.01  # seconds that a slow reader pauses, again and again
SETTLE = 0.3  # seconds for a server to be done with new connections, before its memory is read
WARM_UP = 0.2  # the part of the measured time that is spent before, unmeasured


@dataclass(frozen=True)
class Client:
    """What a scenario has: an adapter, its server (an address and a process id), and seconds to spend."""

    adapter: Adapter
    address: str
    server: int
    seconds: float

    def connect(self) -> AbstractAsyncContextManager[Connection]:
        return self.adapter.connect(self.address)


@dataclass
class Result:
    """Figures by their unit, and what it took in all; times are in seconds."""

    figures: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    seconds: float = 0.0
    client_cpu: float = 0.0
    server_cpu: float = 0.0

    def add_rate(self, unit: str, size: int = 0) -> None:
        """Add calls per second, or MiB per second where each call is of `size` bytes."""
        self.figures[unit] = self.calls / self.seconds * (size / 2**20 if unit == "MiB/s" else 1)


class Meter:
    """Times a block: by the clock, and by the CPU time of both processes."""

    def __init__(self, server: int) -> None:
        # The server's is what clock_getcpuclockid(3) returns. It counts ended threads, too.
        self._clocks = (time.CLOCK_MONOTONIC, time.CLOCK_PROCESS_CPUTIME_ID, ~server << 3 | 2)
        self._result = Result()

    def __enter__(self) -> Result:
        gc.collect()
        self._began = [time.clock_gettime(clock) for clock in self._clocks]
        return self._result

    def __exit__(self, *_: object) -> None:
        took = [
            time.clock_gettime(clock) - began for clock, began in zip(self._clocks, self._began, strict=True)
        ]
        self._result.seconds, self._result.client_cpu, self._result.server_cpu = took


def own_memory(pid: int) -> int:
    """Bytes of a process that it shares with no other."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def reset_peak_memory(pid: int) -> None:
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")


def peak_memory(pid: int) -> int:
    """Bytes of a process at most, since it was reset."""
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def p99(times: list[float]) -> float:
    return sorted(times)[math.ceil(len(times) * 0.99) - 1]


async def echo(connection: Connection, data: bytes) -> None:
    """Make one call, and see that the answer is right, for as much as costs nothing."""
    answer = await connection.echo(data)
    if len(answer) != len(data):
        raise AssertionError(f"asked to echo {len(data)} bytes, and was answered with {len(answer)}")


async def timed_echo(connection: Connection, times: list[float]) -> None:
    """Make a small call, and note how many milliseconds it took."""
    began = time.perf_counter()
    await echo(connection, SMALL)
    times.append((time.perf_counter() - began) * 1e3)


async def repeat(
    client: Client,
    call: Callable[[], Awaitable[object]],
    callers: int = 1,
    shared: Connection | None = None,
) -> Result:
    """Let callers repeat a call until the time is over, and count; several share a connection."""
    calls = 0
    end = 0.0

    async def caller() -> None:
        nonlocal calls
        while time.perf_counter() < end:
            await call()
            calls += 1

    for seconds in (client.seconds * WARM_UP, client.seconds):
        with Meter(client.server) as result:
            calls = 0
            end = time.perf_counter() + seconds
            if shared is None:
                await caller()
            else:
                await shared.gather(client.adapter, [caller] * callers)
    result.calls = calls
    return result


async def echoes(client: Client, size: int, callers: int, unit: str) -> Result:
    """Echo over one connection, from one caller or several."""
    async with client.connect() as connection:
        call = partial(echo, connection, os.urandom(size))
        result = await repeat(client, call, callers, connection if callers > 1 else None)
    result.add_rate(unit, size)
    return result


async def typed(client: Client, callers: int) -> Result:
    """Echo a dataclass, or its bytes where nothing is typed, over one connection."""
    async with client.connect() as connection:
        answer = await connection.echo_job()
        if answer not in (JOB, JOB_BYTES):
            raise AssertionError(f"asked to echo {JOB}, and was answered with {answer!r}")
        result = await repeat(client, connection.echo_job, callers, connection if callers > 1 else None)
    result.add_rate("calls/s")
    return result


async def connect(client: Client) -> Result:
    """Open a connection, make a call, close it, again and again."""

    async def once() -> None:
        async with client.connect() as connection:
            await echo(connection, SMALL)

    result = await repeat(client, once)
    result.add_rate("connections/s")
    return result


async def idle(client: Client) -> Result:
    """Open connections, make a call on each, and see what memory the server has taken for them."""
    async with AsyncExitStack() as stack:
        await echo(await stack.enter_async_context(client.connect()), SMALL)  # the first costs more
        before = own_memory(client.server)
        with Meter(client.server) as result:
            for _ in range(IDLE_CONNECTIONS):
                await echo(await stack.enter_async_context(client.connect()), SMALL)
        result.calls = IDLE_CONNECTIONS
        await client.adapter.sleep(SETTLE)
        result.figures["KiB"] = (own_memory(client.server) - before) / IDLE_CONNECTIONS / 1024
    return result


async def callback(client: Client) -> Result:
    """Call a handler that calls back before it answers."""
    async with client.connect() as connection:
        result = await repeat(client, partial(connection.call_back, SMALL))
    result.add_rate("calls/s")
    return result


async def interleave(client: Client) -> Result:
    """Make small calls, one after another, while big answers travel, one after another."""
    times: list[float] = []
    fetched = 0

    async def fetch() -> None:
        nonlocal fetched
        while time.perf_counter() < end:
            await connection.give(BIG)
            fetched += 1

    async def call() -> None:
        while time.perf_counter() < end:
            await timed_echo(connection, times)

    async with client.connect() as connection:
        with Meter(client.server) as result:
            end = time.perf_counter() + client.seconds
            await connection.gather(client.adapter, [fetch, call])
    result.calls = len(times)
    result.figures["p99 ms"] = p99(times)
    result.figures["MiB/s beside"] = fetched * BIG / 2**20 / result.seconds
    return result


async def channel(client: Client, size: int, unit: str, pause_every: int = 0) -> Result:
    """Receive a stream of items; a slow reader pauses, and sees what memory the server has taken for it."""
    items = 0
    server_grew = 0

    async def take(received: int) -> bool:
        nonlocal items, server_grew
        if received != size:
            raise AssertionError(f"an item of {received} bytes instead of {size}")
        items += 1
        if pause_every and items % pause_every == 0:
            await client.adapter.sleep(SLOW_PAUSE)
        if time.perf_counter() < end:
            return True
        server_grew = own_memory(client.server) - before
        return False

    async with client.connect() as connection:
        await echo(connection, SMALL)
        before = own_memory(client.server)
        with Meter(client.server) as result:
            end = time.perf_counter() + client.seconds
            await connection.stream(size, take)
    result.calls = items
    result.add_rate(unit, size)
    if pause_every:
        result.figures["KiB of server"] = server_grew / 1024
    return result


async def churn(client: Client) -> Result:
    """Open and close connections, a call on each, beside a caller who calls all the time."""
    times: list[float] = []
    opening = [True] * CHURN_TASKS  # a list, as threads may share it

    async def steady() -> None:
        async with client.connect() as connection:
            while opening:
                await timed_echo(connection, times)
                await client.adapter.sleep(STEADY_PAUSE)

    async def open_and_close() -> None:
        try:
            for _ in range(CHURN_CONNECTIONS // CHURN_TASKS):
                async with client.connect() as connection:
                    await echo(connection, SMALL)
        finally:
            opening.pop()

    with Meter(client.server) as result:
        await client.adapter.gather([steady, *[open_and_close] * CHURN_TASKS])
    result.calls = CHURN_CONNECTIONS
    result.add_rate("connections/s")
    result.figures["caller's median ms"] = statistics.median(times)
    result.figures["caller's p99 ms"] = p99(times)
    return result


async def scale(client: Client, callers: int, connections: int) -> Result:
    """Let callers, spread over connections, call; with the peak of both sides' memory. In Trio only."""

    async def hold(task_status: trio.TaskStatus[Connection]) -> NoReturn:
        async with client.connect() as connection:
            task_status.started(connection)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        opened = [await nursery.start(hold) for _ in range(connections)]
        turn = itertools.cycle(opened)
        for pid in (client.server, os.getpid()):
            reset_peak_memory(pid)
        result = await repeat(client, lambda: echo(next(turn), SMALL), callers, opened[0])
        nursery.cancel_scope.cancel()
    result.add_rate("calls/s")
    add_peaks(client, result)
    return result


async def transfer(client: Client, total: int, size: int) -> Result:
    """Receive so many bytes over one stream, in items of a size; with the peak of both sides' memory."""
    left = total

    async def take(received: int) -> bool:
        nonlocal left
        left -= received
        return left > 0

    async with client.connect() as connection:
        await echo(connection, SMALL)
        for pid in (client.server, os.getpid()):
            reset_peak_memory(pid)
        with Meter(client.server) as result:
            await connection.stream(size, take)
    result.calls = total // size
    result.add_rate("MiB/s", size)
    add_peaks(client, result)
    return result


def add_peaks(client: Client, result: Result) -> None:
    result.figures["client's peak MiB"] = peak_memory(os.getpid()) / 2**20
    result.figures["server's peak MiB"] = peak_memory(client.server) / 2**20


SCENARIOS: dict[str, Callable[[Client], Awaitable[Result]]] = {
    "seq": partial(echoes, size=16, callers=1, unit="calls/s"),
    "conc100": partial(echoes, size=16, callers=100, unit="calls/s"),
    "bulk64k": partial(echoes, size=64 * 1024, callers=1, unit="MiB/s"),
    "bulk64k-x8": partial(echoes, size=64 * 1024, callers=8, unit="MiB/s"),
    "bulk1m": partial(echoes, size=2**20, callers=1, unit="MiB/s"),
    "typed": partial(typed, callers=1),
    "typed100": partial(typed, callers=100),
    "connect": connect,
    "callback": callback,
    "interleave": interleave,
    "channel-64b": partial(channel, size=64, unit="items/s"),
    "channel-64k": partial(channel, size=64 * 1024, unit="MiB/s"),
    # These read at most 10,000 items, and 100 MiB, per second.
    "channel-64b-slow": partial(channel, size=64, unit="items/s", pause_every=100),
    "channel-64k-slow": partial(channel, size=64 * 1024, unit="MiB/s", pause_every=16),
    "churn": churn,
    "idle": idle,
}

MEASURE_MEMORY = ("channel-64b-slow", "channel-64k-slow", "idle")
"""These get processes of their own: what others have freed would hide what these take."""

LOWER_IS_BETTER = ("p99 ms", "KiB", "KiB of server", "caller's median ms", "caller's p99 ms")
