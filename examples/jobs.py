"""A service with a typed interface that counts primes, with progress, cancellation and deadlines.

python examples/jobs.py serve localhost:12345                    the service
python examples/jobs.py run localhost:12345 NAME UPTO [SECONDS]   count primes, within a time limit
python examples/jobs.py list localhost:12345                     the jobs that run
python examples/jobs.py watch localhost:12345                    the changes of jobs, as they happen
python examples/jobs.py cancel localhost:12345 NUMBER            cancel a job of any client
"""

import itertools
import math
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal, Protocol

import trio
from msgspec import Meta
from trio.abc import ReceiveChannel

from bokbok_trio import BokbokError, Server, open_connection, open_server
from bokbok_trio.broadcast import Broadcast
from bokbok_trio.interface import consume, expose, idempotent, raises

# ---- the interface: in real programs, a module that both import ----

Name = Annotated[str, Meta(min_length=1, max_length=40, pattern=r"^[\w .-]+\Z")]  # safe on a terminal

State = Literal["running", "done", "cancelled", "failed"]


@dataclass
class Job:
    """A job to do. Its bounds are checked before any method sees it."""

    name: Name
    upto: Annotated[int, Meta(ge=1, le=100_000_000)]


@dataclass
class Status:
    """The progress of a job; `seconds_left` until the caller's deadline, if there is one."""

    number: int
    job: Job
    state: State = "running"
    done: float = 0.0
    seconds_left: float | None = None


@dataclass
class Report:
    """The result of a job."""

    number: int
    primes: int
    largest: int | None
    seconds: float


@dataclass
class TooManyJobs(Exception):
    """The limit of running jobs is reached."""

    limit: int

    def __str__(self) -> str:
        return f"{self.limit} jobs run already"


@dataclass
class NoSuchJob(Exception):
    """No job with this number runs."""

    number: int

    def __str__(self) -> str:
        return f"no job {self.number} runs"


@dataclass
class JobCancelled(Exception):
    """Another client cancelled the job."""

    number: int
    reason: Name

    def __str__(self) -> str:
        return f"job {self.number} was cancelled: {self.reason}"


class Jobs(Protocol):
    """Counts primes."""

    @raises(TooManyJobs, JobCancelled)
    async def run(self, job: Job, *, progress: Callable[[Status], Awaitable[None]] | None = None) -> Report:
        """Do a job. It ends early if the caller disconnects, cancels the call, or has no time left."""
        ...

    @raises(NoSuchJob)
    async def cancel(self, number: int, *, reason: Name = "no reason") -> None:
        """Cancel a job of any client. Its caller gets `JobCancelled`."""
        ...

    @idempotent
    async def running(self) -> list[Status]:
        """Return the jobs that run."""
        ...

    def watch(self) -> AbstractAsyncContextManager[ReceiveChannel[Status]]:
        """Report each running job, then each job when it begins and when it has ended."""
        ...


# ---- the service ----

PIECE = 1_000
"""Numbers to test before other tasks run: some milliseconds of work."""

TELL_EVERY = 0.1
"""Seconds from one call of `progress` to the next."""


def find_primes(begin: int, end: int) -> list[int]:
    """Find the primes from one number to before another, without waiting."""
    return [
        number
        for number in range(max(begin, 2), end)
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
    ]


@dataclass
class RunningJob:
    """A running job, and its cancel scope."""

    status: Status
    deadline: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    reason: str = ""

    def tell(self) -> Status:
        """Return the progress, and the time that is left."""
        left = self.deadline - trio.current_time()
        return replace(self.status, seconds_left=left if math.isfinite(left) else None)


class PrimeCounter(Jobs):
    """Does each job in the task of its call.

    Arguments:
        limit: jobs that may run at once.
    """

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._numbers = itertools.count(1)
        self._running: dict[int, RunningJob] = {}
        self._news = Broadcast[Status](when_full="drop-oldest", length=100)

    async def run(self, job: Job, *, progress: Callable[[Status], Awaitable[None]] | None = None) -> Report:
        """Do a job, and tell the watchers."""
        if len(self._running) >= self._limit:
            raise TooManyJobs(self._limit)
        number = next(self._numbers)
        running = RunningJob(Status(number, job), trio.current_effective_deadline())
        self._running[number] = running
        self._announce(running)
        state: State = "failed"
        try:
            with running.scope:
                report = await self._count_primes(running, progress)
                state = "done"
                return report
            state = "cancelled"  # by another client; tell the caller
            raise JobCancelled(number, running.reason)
        except trio.Cancelled:
            state = "cancelled"  # by the caller, who cancelled, disconnected, or ran out of time
            raise
        finally:
            del self._running[number]
            running.status.state = state
            self._announce(running)

    def _announce(self, running: RunningJob) -> None:
        """Tell the watchers about a job."""
        with suppress(trio.ClosedResourceError):  # watching has ended; the job goes on
            self._news.publish(running.tell())

    async def _count_primes(
        self, running: RunningJob, progress: Callable[[Status], Awaitable[None]] | None
    ) -> Report:
        """Count, piece by piece."""
        status, upto = running.status, running.status.job.upto
        began = told = trio.current_time()
        primes, largest = 0, None
        for begin in range(1, upto + 1, PIECE):
            end = min(begin + PIECE, upto + 1)
            if found := find_primes(begin, end):
                primes, largest = primes + len(found), found[-1]
            status.done = (end - 1) / upto
            await trio.lowlevel.checkpoint()  # lets other tasks run, and may be cancelled
            if progress is not None and (end > upto or trio.current_time() >= told + TELL_EVERY):
                told = trio.current_time()
                await progress(running.tell())
        return Report(status.number, primes, largest, trio.current_time() - began)

    async def cancel(self, number: int, *, reason: str = "no reason") -> None:
        """Cancel a job."""
        if number not in self._running:
            raise NoSuchJob(number)
        self._running[number].reason = reason
        self._running[number].scope.cancel()

    async def running(self) -> list[Status]:
        """Return the jobs that run."""
        return [running.tell() for running in self._running.values()]

    @trio.as_safe_channel
    async def watch(self) -> AsyncGenerator[Status]:
        """Report the changes of jobs, until the watcher leaves or `end_watching` is called."""
        with self._news.subscribe() as news:
            for status in await self.running():
                yield status
            async for status in news:
                yield status

    def end_watching(self) -> None:
        """End all watching, which would keep a server from stopping."""
        self._news.close()


async def stop_on_signals(server: Server, counter: PrimeCounter, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM and Ctrl-C give requests in flight ten seconds; a second signal ends them at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        for grace in (10, 0):
            await anext(signals)
            counter.end_watching()
            server.stop(grace)


async def serve(address: str) -> None:
    """Run the service until a signal comes."""
    counter = PrimeCounter()
    async with open_server(address, expose(Jobs, counter)) as server, trio.open_nursery() as nursery:
        await nursery.start(stop_on_signals, server, counter)
        print("serving on", *server.addresses, flush=True)
        await server.wait_stopped()
        nursery.cancel_scope.cancel()
    print("stopped")


# ---- the clients ----


async def show(status: Status) -> None:
    """Print the progress of a job."""
    left = "" if status.seconds_left is None else f", {status.seconds_left:.1f} s left"
    job = status.job
    print(
        f"{status.number} {job.name}, up to {job.upto}: {status.state}, {status.done:.0%}{left}", flush=True
    )


async def run(jobs: Jobs, name: str, upto: str, seconds: str = "inf") -> None:
    """Run a job, within a time limit."""
    with trio.move_on_after(float(seconds)):
        report = await jobs.run(Job(name, int(upto)), progress=show)
        print(f"{report.primes} primes, the largest {report.largest}, in {report.seconds:.1f} s")
        return
    print("there was not enough time")


async def show_running(jobs: Jobs) -> None:
    """Print the jobs that run."""
    for status in await jobs.running():
        await show(status)


async def watch(jobs: Jobs) -> None:
    """Print the changes of jobs."""
    async with jobs.watch() as statuses:
        async for status in statuses:
            await show(status)


async def cancel(jobs: Jobs, number: str) -> None:
    """Cancel a job."""
    await jobs.cancel(int(number), reason="from the command line")


CLIENTS: dict[tuple[str, int], Callable[..., Awaitable[None]]] = {
    ("run", 2): run,
    ("run", 3): run,
    ("list", 0): show_running,
    ("watch", 0): watch,
    ("cancel", 1): cancel,
}
"""The function of each command, by its name and the number of its arguments."""


async def connect(address: str, client: Callable[..., Awaitable[None]], *arguments: str) -> None:
    """Open a client connection, and run a command on it."""
    async with open_connection(address) as connection:
        await client(consume(connection, Jobs), *arguments)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", address]:
            main = partial(serve, address)
        case [command, address, *arguments] if (command, len(arguments)) in CLIENTS:
            main = partial(connect, address, CLIENTS[command, len(arguments)], *arguments)
        case _:
            sys.exit(__doc__)
    try:
        trio.run(main)
    except* KeyboardInterrupt:
        print("bye")
    except* (BokbokError, OSError, ValueError, TooManyJobs, NoSuchJob, JobCancelled) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"jobs: {error}")
