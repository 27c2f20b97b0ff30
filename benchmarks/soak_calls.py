"""The calls of the soak, and what is right of each: both sides ask and answer all kinds of them.

A request is ``[kind, token, ...]``. The token is the call's own: its answer, and every payload, is made of
it, so that a mix-up shows; and each side keeps a ledger of the tokens that its handlers saw.
"""
# ruff: noqa: PLR2004, S311  (a load is made of many numbers, and its dice guard nothing)

from __future__ import annotations

import logging
import math
import random
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    RemoteError,
    RequestError,
    Server,
    current_request,
)

BOUND: Final = 20.0
"""Seconds that a call may take: far above what is right."""
LATE: Final = 2.0
"""Seconds: while a call of an event loop takes longer, little new is begun, as the machine is behind."""
SHOWN_AFTER: Final = 2.0
"""Seconds after which a call is shown with the one that hangs, as it may hang too."""
SHOWN_LINES: Final = 4_000
"""Lines of tasks and frames that are printed of one event loop."""
SETTLING: Final = 10.0
"""Seconds within which a connection that nobody asks anything must be idle."""
REMEMBERED: Final = 20.0
"""Seconds, at least, that the ledger knows a token."""
CLAIM_AFTER: Final = 1.0
"""Seconds after which the other side is asked whether something ran that is said not to have run."""
MAX_DEPTH: Final = 15
"""Of requests within requests; the contract's."""
READING: Final = {"Reader._take_turn", "Reader._receive_more"}
"""Where tasks are that read, or wait to."""
SERVER: Final = 0
"""The number of the server's event loop; those of the clients count from 1."""

SIZES: Final = (
    *([(0, 0)] * 4),
    *([(1, 100)] * 30),
    *([(1_000, 5_000)] * 8),
    *([(16_000, 40_000)] * 3),
    *([(65_000, 66_000)] * 2),
    (200_000, 300_000),
    (2**20 - 100, 2**20),
)
"""Bytes, from and to, of payloads; each entry is as likely as the next."""
ITEM_SIZES: Final = (
    0,
    10,
    10,
    100,
    10,
    1_000,
    0,
    10,
    5_000,
    100,
    20_000,
    10,
    70_000,
    100,
    10,
    10,
    1_000,
    200_000,
)
"""Bytes of the items of a channel, in turn."""

CODES: Final = ("soak-error", "timeout", "cancelled", "too-large")
"""Of errors that handlers raise."""
WORST: Final = (
    "defect of bokbok_trio",
    "internal error",
    "broke the protocol",
    "streams do not raise",
    "ended badly",
)
"""What must not be in any line of the log, nor be the reason of any loss."""


class Gone(Exception):  # noqa: N818  (it is no fault)
    """The connection is over, as it may be."""


class Crash(Exception):  # noqa: N818
    """What a handler raises that is asked to."""


EXPECTED_OF_HANDLERS: Final = (Crash, Gone, ConnectionLost, ConnectionClosed)
"""What handlers may raise that is logged."""


def pattern(token: bytes, size: int) -> bytes:
    """The payload of a token."""
    return (token * (size // len(token) + 1))[:size]


def pick_size(rng: random.Random) -> int:
    return rng.randint(*rng.choice(SIZES))


def item_size(token: bytes, index: int) -> int:
    return ITEM_SIZES[(token[-1] * 5 + index) % len(ITEM_SIZES)]


async def pause(book: Book, rng: random.Random) -> None:
    """Wait as long as somebody might who asks one thing after another; longer if the machine is behind."""
    if book.is_late:
        await trio.sleep(rng.random() * LATE)
    luck = rng.random()
    if luck < 0.55:
        return
    if luck < 0.85:
        await trio.sleep(rng.random() * 0.004)
    elif luck < 0.99:
        await trio.sleep(rng.random() * 0.04)
    else:
        await trio.sleep(rng.random())


async def together(*jobs: Callable[[], Awaitable[object]]) -> None:
    """Run jobs at the same time. That the connection is gone comes out as itself."""
    is_gone = False
    try:
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
    except* Gone:
        is_gone = True
    if is_gone:
        raise Gone


# ---- what is kept of it ----


@dataclass(eq=False, slots=True)
class Call:
    """A call in flight: it must end before `bound` seconds have passed."""

    kind: str
    connection: Connection | None
    bound: float
    task: trio.lowlevel.Task = field(default_factory=trio.lowlevel.current_task)
    began: float = field(default_factory=trio.current_time)


@dataclass(slots=True)
class Info:
    """`Connection.data` of the server's connections."""

    loop: int
    is_safe: bool
    is_leaving: bool = False


class Book:
    """What one event loop asked, answered and found wrong.

    Arguments:
        loop: its number.
        seed: of its dice.
    """

    def __init__(self, loop: int, seed: str) -> None:
        self.loop = loop
        self.rng = random.Random(f"{seed}-{loop}")
        self.calls: set[Call] = set()
        self.counts: Counter[str] = Counter()
        self.longest = (0.0, "")
        self.faults: list[str] = []
        self.connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.servers: list[Server] = []
        self.controls: dict[int, Connection] = {}  # to ask what ran, by the number of the loop there
        self.claims: list[tuple[int, bytes, str]] = []  # where, what and why nothing should have run
        self.ran: set[bytes] = set()
        self.ran_before: set[bytes] = set()
        self.is_resting = True
        self.is_late = False  # a call takes long
        self.lateness = 0.0  # seconds, of the event loop, at most
        self.nursery: trio.Nursery | None = None  # for the length of the whole
        self._tokens = 0

    def new_token(self) -> bytes:
        self._tokens += 1
        return self.loop.to_bytes(2) + self._tokens.to_bytes(6)

    def fault(self, text: str) -> None:
        """Something is wrong."""
        print(f"FAULT in event loop {self.loop}: {text}", file=sys.stderr, flush=True)
        self.faults.append(text)

    def start(self, job: Callable[[], Awaitable[object]]) -> None:
        """Run something that is no part of any request."""
        assert self.nursery is not None
        Context().run(self.nursery.start_soon, job)

    # ---- calls ----

    def begin(self, kind: str, connection: Connection | None = None, bound: float = BOUND) -> Call:
        call = Call(kind, connection, bound)
        self.calls.add(call)
        return call

    def done(self, call: Call) -> None:
        self.calls.discard(call)
        self.counts[call.kind] += 1
        lasted = trio.current_time() - call.began
        if lasted > self.longest[0] and call.bound == BOUND:
            self.longest = (lasted, call.kind)

    @contextmanager
    def call(self, kind: str, connection: Connection | None = None, bound: float = BOUND) -> Iterator[None]:
        call = self.begin(kind, connection, bound)
        try:
            yield
        finally:
            self.done(call)

    async def watch(self) -> None:
        """Find calls that hang, and what ran that must not have."""
        turned_at = trio.current_time()
        while True:
            due = trio.current_time() + 0.1
            await trio.sleep_until(due)
            now = trio.current_time()
            self.lateness = max(self.lateness, now - due)
            self.is_late = any(now - call.began > LATE and call.bound == BOUND for call in self.calls)
            hanging = [call for call in self.calls if now - call.began > call.bound]
            if hanging:
                self.dump()
                for call in hanging:
                    self.calls.discard(call)
                    self.fault(f"HANG: {call.kind} on {call.connection} took over {call.bound:g} s")
            if now - turned_at > REMEMBERED:
                turned_at = now
                self.ran_before, self.ran = self.ran, set()

    async def check_claims(self) -> None:
        """Ask the other sides whether anything ran that is said not to have run."""
        while True:
            await trio.sleep(CLAIM_AFTER)
            await self.check_claims_once()

    async def check_claims_once(self) -> None:
        claims, self.claims = self.claims, []
        for loop in {loop for loop, _, _ in claims}:
            there = [(token, why) for at, token, why in claims if at == loop]
            with self.call("ran?"):
                for begin in range(0, len(there), 200):
                    some = there[begin : begin + 200]
                    fields: list[bytes | str] = ["ran", self.new_token(), *(token for token, _ in some)]
                    answer = await self.controls[loop].request(fields)
                    for (token, why), ran in zip(some, answer[1:], strict=True):
                        if ran == b"yes":
                            self.fault(f"{token.hex()} ran in event loop {loop}, and: {why}")
        self.counts["claims that nothing ran"] += len(claims)

    # ---- what there is ----

    def measure(self) -> dict[str, int]:
        """What must be level when all rests.

        Tasks that read are left out: a connection has one, and keeps another once it needed one.
        """
        root = trio.lowlevel.current_root_task()
        assert root is not None
        return {
            f"tasks of loop {self.loop}": sum(not is_reader(task) for task in iterate_tasks(root)),
            f"calls of loop {self.loop}": len(self.calls),
            f"connections of loop {self.loop}": len(self.connections),
        }

    def dump(self) -> None:
        """Print what goes on: long calls, connections, tasks and where they wait."""
        print("\n".join(self._describe()), file=sys.stderr, flush=True)

    def _describe(self) -> Iterator[str]:
        now = trio.current_time()
        yield f"==== event loop {self.loop}: {len(self.calls)} calls in flight"
        for call in sorted(self.calls, key=lambda call: call.began):
            if now - call.began > SHOWN_AFTER:
                yield f"  {now - call.began:7.2f} s  {call.kind} on {call.connection} in {call.task.name}"
        yield "---- connections"
        for connection in [
            *self.connections,
            *(each for server in self.servers for each in server.connections),
        ]:
            yield f"  {connection} {connection.reason or ''} {connection.statistics()}"
        yield "---- tasks"
        root = trio.lowlevel.current_root_task()
        assert root is not None
        for number, line in enumerate(describe_tasks(root, "  ")):
            if number == SHOWN_LINES:
                yield "  ..."
                break
            yield line


def iterate_tasks(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    """A task, and those it has started, at any remove."""
    yield task
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from iterate_tasks(child)


def is_reader(task: trio.lowlevel.Task) -> bool:
    """Whether it reads for a connection, or waits to."""
    return any(frame.f_code.co_qualname in READING for frame, _ in task.iter_await_frames())


def describe_tasks(task: trio.lowlevel.Task, indent: str) -> Iterator[str]:
    """Show a task, where it waits, and the tasks it has started."""
    yield f"{indent}{task.name}"
    for frame, line in task.iter_await_frames():
        code = frame.f_code
        yield f"{indent}    {code.co_filename.rpartition('/')[2]}:{line} {code.co_qualname}"
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from describe_tasks(child, indent + "  ")


class LogCheck(logging.Handler):
    """Reads the log: what must not be there is a fault."""

    def __init__(self, fault: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._fault = fault

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        is_bad = any(words in text for words in WORST)
        if record.exc_info and record.exc_info[1] is not None:
            is_bad = is_bad or not self._is_expected(record.exc_info[1])
            text += "\n" + "".join(traceback.format_exception(record.exc_info[1]))
        if is_bad or (record.levelno >= logging.ERROR and not record.exc_info):
            self._fault(f"in the log: {text}")

    def _is_expected(self, error: BaseException) -> bool:
        if isinstance(error, BaseExceptionGroup):
            return all(map(self._is_expected, error.exceptions))
        return isinstance(error, (*EXPECTED_OF_HANDLERS, trio.Cancelled))


# ---- who asks ----


class Asker:
    """Asks over one connection.

    Arguments:
        book: of the event loop.
        connection: the way.
        rng: the dice.
        is_safe: nobody ends the connection, so that losing it is a fault.

    Attributes:
        may_end: somebody here ends the connection now.
    """

    def __init__(
        self, book: Book, connection: Connection, rng: random.Random, *, is_safe: bool = False
    ) -> None:
        self.book = book
        self.connection = connection
        self.rng = rng
        self.is_safe = is_safe
        info = connection.data
        self.peer = info.loop if isinstance(info, Info) else SERVER

    @contextmanager
    def _guard(self, kind: str, token: bytes) -> Iterator[None]:
        """A call: whatever it may not raise is a fault."""
        try:
            with self.book.call(kind, self.connection):
                yield
        except (ConnectionLost, ConnectionClosed) as exc:
            self._note_loss(kind, token, exc)
            raise Gone from None
        except RequestError:
            raise
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel) as exc:
            self.book.fault(f"{kind} on {self.connection}: {exc!r}, caused by {exc.__cause__!r}")
            raise Gone from None

    def _note_loss(self, kind: str, token: bytes, error: ConnectionLost | ConnectionClosed) -> None:
        self.book.counts["calls that lost their connection"] += 1
        if self.is_safe or any(words in str(error) for words in WORST):
            self.book.fault(f"{kind} on {self.connection}: {error!r}")
        if isinstance(error, ConnectionLost) and not error.may_have_run:
            self.book.claims.append((self.peer, token, f"{error!r} with may_have_run False"))

    def _check(self, kind: str, is_right: bool, what: object) -> None:  # noqa: FBT001
        if not is_right:
            self.book.fault(f"{kind} on {self.connection}: wrong: {what!r:.200}")

    async def ask(self, kind: str, token: bytes, *args: bytes | str, context: bool = False) -> list[bytes]:
        """Ask, and check whose answer it is; returns the rest of it."""
        with self._guard(kind, token):
            names = {"token": token, "x-more": b"1"} if context else None
            answer = await self.connection.request([kind, token, *args], context=names)
        self._check(kind, answer[:1] == [token], answer)
        return answer[1:]

    # ---- kinds ----

    async def any(self) -> None:
        """Make a call of any kind."""
        kind = self.rng.choice(self.KINDS)
        await getattr(self, kind)()

    async def light(self) -> None:
        """Make a call as somebody makes most of the time."""
        kind = self.rng.choice(
            ("echo", "echo", "echo", "small", "small", "small", "small", "fail", "pong", "small")
        )
        await getattr(self, kind)()

    async def echo(self) -> None:
        rng = self.rng
        wait = rng.choice(("", "", "0", str(rng.randrange(2_000)), str(rng.randrange(10_000))))
        await self._echo(wait, pick_size(rng), pick_size(rng) if rng.random() < 0.3 else rng.randrange(50))

    async def small(self) -> None:
        await self._echo(self.rng.choice(("", "", "0", "500")), self.rng.choice((*[10] * 11, 200_000)), 5)

    async def _echo(self, wait: str, size: int, asking: int) -> None:
        token = self.book.new_token()
        with_context = self.rng.random() < 0.2
        answer = await self.ask("echo", token, wait, str(size), pattern(token, asking), context=with_context)
        self._check("echo", answer == [pattern(token, size)], answer)

    async def fail(self) -> None:
        """A handler that raises, in one of several ways."""
        token = self.book.new_token()
        how = self.rng.choice(("bare", "nursery", "waiting", "crash"))
        code, details = self.rng.choice(CODES), pattern(token, self.rng.choice((0, 0, 5, 16_384)))
        try:
            with self._guard("fail", token):
                try:
                    await self.connection.request(["fail", token, how, code, details])
                except RemoteError as exc:
                    raise RequestError(exc.message, exc.code, exc.details) from None
        except RequestError as exc:
            right = (f"Crash: {token.hex()}", "handler-error", b"")
            if how != "crash":
                right = (token.hex(), code, details)
            self._check("fail", (exc.message, exc.code, exc.details) == right, (how, exc.args))
        else:
            self.book.fault(f"fail on {self.connection}: answered")

    async def pong(self) -> None:
        with self._guard("ping", b""):
            await self.connection.ping()

    async def nest(self, depth: int | None = None) -> None:
        """Handlers that call each other back."""
        token = self.book.new_token()
        if depth is None:
            depth = self.rng.randrange(13)
        answer = await self.ask("nest", token, str(depth))
        self._check("nest", answer == [], answer)

    async def abyss(self) -> None:
        """Handlers that call each other back without end."""
        await self.nest(MAX_DEPTH + 5)

    async def fan(self) -> None:
        """A handler that calls back many times at once."""
        answer = await self.ask("fan", self.book.new_token(), str(self.rng.randrange(1, 30)))
        self._check("fan", answer == [], answer)

    async def relay(self, depth: int | None = None) -> None:
        """Handlers that ask somebody else, so that requests go in circles over many connections."""
        await self.ask("relay", self.book.new_token(), str(self.rng.randrange(8) if depth is None else depth))

    async def campaign(self) -> None:
        """Let the other side ask many things here, none of them within a request."""
        await self.ask("campaign", self.book.new_token(), str(self.rng.randrange(1, 25)))

    async def burst(self) -> None:
        """Many at once, more than there are slots."""
        await together(*[self.small] * self.rng.choice((3, 20, 120)))

    async def never(self) -> None:
        """Calls under a scope that was cancelled before, or a deadline that has passed."""
        token = self.book.new_token()
        scope = trio.CancelScope(deadline=self.rng.choice((math.inf, trio.current_time() - 0.001)))
        if scope.deadline == math.inf:
            scope.cancel()
        with scope:
            if self.rng.random() < 0.5:
                await self.ask("echo", token, "", "10", b"")
            else:
                async with self.connection.open_channel(["down", token, "1", ""]):
                    pass
        self._check("never", scope.cancelled_caught, scope)
        self.book.claims.append((self.peer, token, "its scope was cancelled before"))

    async def cancelled(self) -> None:
        """Something that is cancelled soon, or has a near deadline."""
        rng = self.rng
        after = rng.choice((0.0, rng.random() * 0.002, rng.random() * 0.03))
        kind = rng.choice(
            ("echo", "wait", "wait", "nest", "fan", "up", "down", "both", "burst", "relay", "campaign")
        )
        scope = trio.CancelScope()
        if rng.random() < 0.5:
            scope.deadline = trio.current_time() + after
        else:
            self.book.start(partial(self._cancel_later, scope, after))
        with scope:
            await getattr(self, kind)()
        self.book.counts[
            "calls cancelled" if scope.cancelled_caught else "calls faster than their cancellation"
        ] += 1

    async def _cancel_later(self, scope: trio.CancelScope, after: float) -> None:
        await trio.sleep(after)
        scope.cancel()

    async def wait(self) -> None:
        """A handler that waits for long, to be cancelled."""
        with trio.move_on_after(0.3):
            await self.ask("wait", self.book.new_token())

    # ---- kinds with a channel ----

    def _count_items(self) -> int:
        return self.rng.choice((0, 1, 5, 5, 20, 60))

    def _slow(self) -> str:
        return self.rng.choice(("", "", "slow"))

    async def _read(self, channel: Channel, token: bytes, *, slow: str) -> int:
        """Receive all items and check them. Returns how many there were."""
        return await read_items(self.book, channel, token, slow=slow, rng=self.rng)

    async def up(self) -> None:
        """Items to the handler, which may be slow."""
        token, count = self.book.new_token(), self._count_items()
        with self._guard("up", token):
            async with self.connection.open_channel(["up", token, self._slow()]) as channel:
                await send_items(channel, token, count)
                await channel.end()
                answer = await channel.answer()
        self._check("up", answer == [token, str(count).encode()], answer)

    async def down(self) -> None:
        """Items from the handler, to a reader that may be slow."""
        token, count = self.book.new_token(), self._count_items()
        with self._guard("down", token):
            async with self.connection.open_channel(["down", token, str(count)]) as channel:
                got = await self._read(channel, token, slow=self._slow())
                answer = await channel.answer()
        self._check("down", got == count and answer == [token, str(count).encode()], (got, answer))

    async def both(self) -> None:
        """Items both ways at once."""
        token, count, got = self.book.new_token(), self._count_items(), 0
        slow = self._slow()
        with self._guard("both", token):
            async with self.connection.open_channel(["both", token, self._slow()]) as channel:

                async def write() -> None:
                    with self._guard("both, writing", token):
                        await send_items(channel, token, count)
                        await channel.end()

                async def read() -> None:
                    nonlocal got
                    with self._guard("both, reading", token):
                        got = await self._read(channel, token, slow=slow)

                await together(write, read)
                answer = await channel.answer()
        self._check("both", got == count and answer == [token, str(count).encode()], (got, answer))

    async def quit(self) -> None:
        """Leave a channel in the middle, with or without a word."""
        token = self.book.new_token()
        left = self.rng.randrange(10)
        with self._guard("quit", token):
            async with self.connection.open_channel(["down", token, "1000"]) as channel:
                while left:
                    await channel.receive()
                    left -= 1
                if self.rng.random() < 0.3:
                    await channel.aclose()

    async def quitted(self) -> None:
        """The handler leaves a channel in the middle, with an answer or an error."""
        token, how = self.book.new_token(), self.rng.choice(("answer", "error"))
        with self._guard("quitted", token):
            async with self.connection.open_channel(
                ["quitted", token, str(self.rng.randrange(10)), how]
            ) as channel:
                try:
                    await send_items(channel, token, 10_000)
                except (ConnectionLost, ConnectionClosed):
                    raise
                except trio.BrokenResourceError as exc:
                    is_remote = isinstance(exc.__cause__, RemoteError)
                    self._check("quitted", is_remote == (how == "error"), exc.__cause__)
                outcome: object
                try:
                    outcome = await channel.answer()
                except RemoteError as exc:
                    outcome = (exc.message, exc.code)
        right = [token] if how == "answer" else (token.hex(), "soak-quit")
        self._check("quitted", outcome == right, outcome)

    KINDS = (
        *["echo"] * 10,
        *["small"] * 10,
        *["cancelled"] * 6,
        *["never"] * 2,
        *["fail"] * 2,
        *["nest"] * 3,
        "abyss",
        "pong",
        "fan",
        *["relay"] * 2,
        "burst",
        "wait",
        *["up", "down", "both"] * 2,
        "quit",
        "quitted",
    )


async def send_items(channel: Channel, token: bytes, count: int) -> None:
    for index in range(count):
        await channel.send([str(index), pattern(token, item_size(token, index))])


async def read_items(book: Book, channel: Channel, token: bytes, *, slow: str, rng: random.Random) -> int:
    """Receive all items and check them. Returns how many there were."""
    count = 0
    async for item in channel:
        if item != [str(count).encode(), pattern(token, item_size(token, count))]:
            book.fault(f"item {count} of {token.hex()} is wrong: {item!r:.200}")
        count += 1
        if slow and rng.random() < 0.3:
            await trio.sleep(rng.random() * 0.01)
    return count


# ---- who answers ----


class Answerer:
    """The handlers of either side.

    Arguments:
        book: of the event loop.
    """

    def __init__(self, book: Book) -> None:
        self.book = book

    async def on_request(self, connection: Connection, request: list[bytes]) -> list[bytes | str]:
        kind, token, *args = request
        self._note(connection, token)
        answer = await getattr(self, f"on_{kind.decode()}")(connection, token, *args)
        self._check_surroundings(connection, token)
        return [token, *answer]

    async def on_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> list[bytes | str]:
        kind, token, *args = request
        self._note(connection, token)
        answer = await getattr(self, f"use_{kind.decode()}")(channel, token, *args)
        self._check_surroundings(connection, token)
        return [token, *answer]

    def _note(self, connection: Connection, token: bytes) -> None:
        book = self.book
        if token in book.ran or token in book.ran_before:
            book.fault(f"{token.hex()} ran twice, now on {connection}")
        book.ran.add(token)
        book.counts["handled"] += 1
        self._check_surroundings(connection, token)

    def _check_surroundings(self, connection: Connection, token: bytes) -> None:
        """What surrounds a handler must be its own request's."""
        current = current_request()
        if current.connection is not connection or current.context.get("token", token) != token:
            self.book.fault(f"{token.hex()} on {connection} sees {current} with {dict(current.context)}")
        deadline = trio.current_effective_deadline()
        if deadline not in (current.deadline, -math.inf):
            self.book.fault(
                f"{token.hex()} on {connection} has the deadline {deadline}, not {current.deadline}"
            )

    def _asker(self, connection: Connection) -> Asker:
        return Asker(self.book, connection, self.book.rng)

    # ---- requests ----

    async def on_hello(self, connection: Connection, token: bytes, loop: bytes, how: bytes) -> list[bytes]:
        """The first request of each connection: who is there, and whether the connection may be ended."""
        connection.data = Info(int(loop), is_safe=how != b"unsafe")
        if how == b"control":
            self.book.controls[int(loop)] = connection
        return []

    async def on_ran(self, connection: Connection, token: bytes, *tokens: bytes) -> list[bytes]:
        return [b"yes" if each in self.book.ran or each in self.book.ran_before else b"no" for each in tokens]

    async def on_idle(self, connection: Connection, token: bytes) -> list[bytes]:
        """Wait until nothing but this goes on."""
        connection.data.is_leaving = True
        await self.wait_idle(connection, handlers_running=1)
        return []

    async def wait_idle(self, connection: Connection, *, handlers_running: int = 0) -> None:
        """Wait until nothing goes on on a connection."""
        with trio.move_on_after(SETTLING):
            while True:
                now = connection.statistics()
                used = (now.used_slots, now.requests_waiting, now.requests_cancelled, now.packets_queued)
                if connection.closed or (not any(used) and now.handlers_running == handlers_running):
                    return
                await trio.sleep(0.01)
        if trio.current_effective_deadline() != -math.inf:
            self.book.fault(f"{connection} is not idle: {connection.statistics()}")

    async def on_echo(
        self, connection: Connection, token: bytes, wait: bytes, size: bytes, payload: bytes
    ) -> list[bytes]:
        if payload != pattern(token, len(payload)):
            self.book.fault(f"the payload of {token.hex()} is wrong: {payload!r:.200}")
        if wait:
            await trio.sleep(int(wait) / 1_000_000)
        return [pattern(token, int(size))]

    async def on_fail(
        self, connection: Connection, token: bytes, how: bytes, code: bytes, details: bytes
    ) -> list[bytes]:
        error = RequestError(token.hex(), code.decode(), details)
        if how == b"bare":
            raise error
        if how == b"waiting":
            await trio.sleep(0.0003)
            raise error
        if how == b"crash":
            raise Crash(token.hex())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.lowlevel.checkpoint()
            raise error

    async def on_wait(self, connection: Connection, token: bytes) -> list[bytes]:
        await trio.sleep(BOUND * 3 / 4)
        return []

    async def on_nest(self, connection: Connection, token: bytes, depth: bytes) -> list[bytes]:
        if int(depth) == 0:
            return []
        is_deepest = current_request().depth == MAX_DEPTH
        try:
            await self._asker(connection).nest(int(depth) - 1)
        except RecursionError:
            if not is_deepest:
                self.book.fault(f"{token.hex()} may ask nothing at the depth {current_request().depth}")
        else:
            if is_deepest:
                self.book.fault(f"{token.hex()} asked deeper than {MAX_DEPTH}")
        return []

    async def on_fan(self, connection: Connection, token: bytes, count: bytes) -> list[bytes]:
        await together(*[self._asker(connection).small] * int(count))
        return []

    async def on_relay(self, connection: Connection, token: bytes, depth: bytes) -> list[bytes]:
        others = [
            each
            for server in self.book.servers
            for each in server.connections
            if each.data is not None and not each.data.is_leaving
        ]
        via = self.book.rng.choice(others) if others else connection
        if int(depth) > 0:
            try:
                await self._asker(via).relay(int(depth) - 1)
            except Gone:
                return [b"gone"]
        return []

    async def on_campaign(self, connection: Connection, token: bytes, count: bytes) -> list[bytes]:
        done = trio.Event()
        scope = trio.CancelScope()
        asker = self._asker(connection)

        async def run() -> None:
            try:
                with scope:
                    for _ in range(int(count)):
                        await asker.any()
            except Gone:
                pass
            finally:
                done.set()

        self.book.start(run)
        try:
            await done.wait()
        finally:
            scope.cancel()
        return []

    async def on_die(self, connection: Connection, token: bytes, how: bytes) -> list[bytes]:
        """End the connection from here."""
        if how == b"close":
            await connection.aclose()
        else:
            connection.drain()
        return []

    # ---- requests with a channel ----

    async def use_up(self, channel: Channel, token: bytes, slow: bytes) -> list[str]:
        return [str(await read_items(self.book, channel, token, slow=slow.decode(), rng=self.book.rng))]

    async def use_down(self, channel: Channel, token: bytes, count: bytes, *more: bytes) -> list[bytes]:
        await send_items(channel, token, int(count))
        return [count]

    async def use_both(self, channel: Channel, token: bytes, slow: bytes) -> list[str]:
        count = 0
        async for item in channel:
            count += 1
            if slow and self.book.rng.random() < 0.2:
                await trio.sleep(self.book.rng.random() * 0.005)
            await channel.send(item)
        return [str(count)]

    async def use_quitted(self, channel: Channel, token: bytes, count: bytes, how: bytes) -> list[bytes]:
        for _ in range(int(count)):
            await channel.receive()
        if how == b"error":
            raise RequestError(token.hex(), "soak-quit")
        return []
