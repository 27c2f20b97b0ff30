"""Faults of links and of processes, and a ledger of what was asked, run and answered.

    python benchmarks/ledger.py --requests 200000 --sealed
    python benchmarks/ledger.py --requests 200000 --plain --seed 7

A server, and two processes that ask it, by `open_connection` and `open_reconnecting`, over TCP and UNIX
sockets: directly, and through a proxy that is a bad link (see `bad_link`). Meanwhile the server is killed,
stopped in good order, and started again at the same addresses; it is suspended; it and those who ask have no
descriptors left for a while; and their clocks leap by up to an hour, and the time of day by a day either way.
Handlers ask back. Who asks and who runs a request each write a line at once into a file, so a killed server
has written what it ran.

At the end the two are compared. It ends with 1, and says why, if

- a request was answered that did not run, or its answer is another's;
- one ran twice that was not asked for as idempotent, or more often than it may be repeated;
- one has no end in the ledger, or a late one;
- one ran of which `may_have_run` said that it did not;
- slots, tasks, connections, descriptors or memory were more when all rested than when all rested before;
- the log tells of a defect, or a process ended by itself.
"""
# ruff: noqa: PLR2004, S311  (a load is made of many numbers, and its dice guard nothing)

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, Final

import trio
import trio.lowlevel
from bad_link import Weather, serve_links
from soak_calls import WORST, pattern

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    HandshakeError,
    Key,
    ReconnectingConnection,
    RemoteError,
    RequestError,
    Settings,
    open_connection,
    open_reconnecting,
    open_server,
)

CLIENTS: Final = 2
"""Processes that ask."""
SETTINGS: Final = Settings(ping_after=1.0, ping_timeout=1.0, connect_timeout=3.0, handshake_timeout=5.0)
"""Of all connections. What is lost is noticed within twice the first two, and a turn of the machine's."""
BOUND: Final = 20.0
"""Seconds that a request may take."""
ENTERING: Final = 5.0
"""Seconds for which an `open_reconnecting` waits for its first connection before another is tried."""
LATE: Final = 5.0
"""Seconds by which one may end after its bound: the machine is full."""
REPEATS: Final = 3
"""How often an idempotent request may be repeated."""
FILES: Final = 256
"""Descriptors that the server and those who ask may have."""
KINDS: Final = {"echo": 70, "sleep": 10, "back": 8, "fail": 4, "crash": 1, "channel": 4, "big": 3}
"""What is asked, and how often."""
ITEMS: Final = 5
"""Items each way on a channel."""
LEAPS: Final = (1.5, 30.0, 3600.0)
"""Seconds by which Trio's clock leaps, as where a machine was suspended and the clock went on."""
DAY: Final = 86_400.0
"""Seconds by which the wall clock jumps at most, back or forth."""
PHASES: Final = {"restarts": 0.5, "warm-up": 0.1, "faults": 0.4}
"""What part of the requests is asked in each. The server is killed in the first only, so that it lives
through the other two, and can be compared."""
REST: Final = 30.0
"""Seconds within which all must be at rest after a phase."""
PATIENCE: Final = 180.0
"""Seconds that a phase may last, and 20 milliseconds more for each request."""
PR_SET_PDEATHSIG: Final = 1
"""Of prctl(2): the signal when the parent ends. So nobody outlives a driver that was killed."""
GROWTH: Final = 1.25
"""By which factor memory may grow, besides `SLACK`."""
SLACK: Final = 24 * 2**20
"""Bytes by which memory may grow besides."""


class Crash(Exception):  # noqa: N818
    """What a handler raises that is asked to."""


class LeapingClock(trio.abc.Clock):
    """A clock for `trio.run`, which leaps at a signal, and the wall clock with it."""

    def __init__(self) -> None:
        self.leaps = 0
        self._ahead = 0.0

    def start_clock(self) -> None:
        """Do nothing, as it runs."""

    def current_time(self) -> float:
        return time.perf_counter() + self._ahead

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.current_time()

    async def leap_often(
        self, rng: random.Random, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Leap at each SIGUSR2."""
        now = time.time
        wrong = 0.0
        time.time = lambda: now() + wrong
        with trio.open_signal_receiver(signal.SIGUSR2) as signals:
            task_status.started()
            async for _ in signals:
                self.leaps += 1
                self._ahead += rng.choice(LEAPS)
                wrong = rng.uniform(-DAY, DAY)


CLOCK: Final = LeapingClock()
"""Of this process."""


# ---- what both sides do ----


class Side:
    """A process that asks and runs requests, and its ledger.

    Arguments:
        name: of its ledger, and the first part of its tokens.
        given: the options of the command line.
    """

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name = name
        self.rng = random.Random(f"{given.seed}-{name}")
        self._file = os.open(
            f"{given.folder}/{name}.ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode=0o600
        )
        self._tokens = count()
        logging.getLogger("bokbok_trio").addHandler(LogCheck(self))

    def write(self, *words: object) -> None:
        """Write a line, at once: this process may be killed at any time."""
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())

    async def ask(
        self,
        call: Callable[[bytes], Awaitable[list[bytes]]],
        bound: float,
        *,
        idempotent: bool = False,
        may_wait: bool = False,
    ) -> str:
        """Ask one thing, and write that, and how it ended; returns this.

        Arguments:
            call: asks it, given the token.
            bound: seconds until it is given up.
            idempotent: that it may run more than once.
            may_wait: that it waits while there is no connection, and so may be given up.
        """
        token = f"{self.name}.{next(self._tokens)}"
        self.write("asked", token, int(idempotent))
        outcome = "cancelled"  # where something else comes out, a cancellation most likely
        began = time.monotonic()
        leaps = CLOCK.leaps
        try:
            with trio.move_on_after(bound) as scope:
                outcome = "answer" if (await call(token.encode()))[0] == token.encode() else "wrong"
            if scope.cancelled_caught and bound == BOUND:
                outcome = "leapt" if CLOCK.leaps > leaps else "waited" if may_wait else "hung"
        except RemoteError as exc:
            outcome = "busy" if exc.code == "busy" else "error"
        except (ConnectionLost, ConnectionClosed) as exc:
            outcome = f"{'lost' if isinstance(exc, ConnectionLost) else 'closed'}-{exc.may_have_run:d}"
        finally:
            self.write("ended", token, outcome, f"{time.monotonic() - began:.3f}", f"{bound:.3f}")
        return outcome

    async def run(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        """Handle a request."""
        kind, token, *rest = request
        self.write("ran", token.decode())
        match kind:
            case b"sleep":
                await trio.sleep(float(rest[0]))
            case b"back":
                await self.ask(lambda back: connection.request([b"echo", back]), BOUND)
            case b"fail":
                raise RequestError("as asked", code="asked")
            case b"crash":
                raise Crash
        return [token, *rest]

    async def run_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> list[bytes]:
        """Send the items of a channel back."""
        _, token = request
        self.write("ran", token.decode())
        async for item in channel:
            await channel.send(item)
        return [token]

    def level(self) -> dict[str, int]:
        """What must be level when all rests."""
        gc.collect()
        with open("/proc/self/statm") as statm:
            memory = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "memory": memory,
        }

    async def exhaust_descriptors(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """At each SIGUSR1, take all descriptors that are left, for half a second."""
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            task_status.started()
            async for _ in signals:
                taken = []
                try:
                    while True:
                        taken.append(os.dup(0))
                except OSError:
                    await trio.sleep(0.5)
                finally:
                    for each in taken:
                        os.close(each)


class LogCheck(logging.Handler):
    """Writes what must not be in the log into the ledger."""

    def __init__(self, side: Side) -> None:
        super().__init__(logging.WARNING)
        self._side = side

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if any(words in text for words in WORST):
            self._side.write("fault", repr(text))


def say(message: object) -> None:
    """Tell the driver."""
    print(json.dumps(message), flush=True)


# ---- the server ----


async def serve(given: argparse.Namespace) -> None:
    """Be the server: until SIGTERM, or until the driver is gone."""
    side = Side(f"server{given.number}", given)

    async def handle(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"level"]:
            for _ in range(int(REST / 0.1)):
                found = server.statistics()
                if (found.connections, found.handshakes, found.handlers_running) == (1, 0, 1):
                    break
                await trio.sleep(0.1)
            level = side.level() | {
                "connections": found.connections,
                "handshakes": found.handshakes,
                "handlers": found.handlers_running,
            }
            return [json.dumps(level).encode()]
        return await side.run(connection, request)

    async def stop_at_sigterm() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                server.stop(grace=1.0)

    async with (
        open_server(
            [given.tcp, f"{given.folder}/server"],
            handle,
            channel_handler=side.run_channel,
            user_key=users(given),
            settings=SETTINGS,
        ) as server,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(stop_at_sigterm)
        await nursery.start(side.exhaust_descriptors)
        await nursery.start(CLOCK.leap_often, side.rng)
        say("ready")
        await server.wait_stopped()
        nursery.cancel_scope.cancel()


def users(given: argparse.Namespace) -> dict[str, Key] | None:
    return {"user": make_key(given)} if given.sealed else None


def make_key(given: argparse.Namespace) -> Key:
    return Key(random.Random(given.seed).randbytes(32))


# ---- who asks ----


class Client(Side):
    """A process that asks."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(f"client{given.number}", given)
        self._login = {"user": "user", "key": make_key(given)} if given.sealed else {}
        folder = given.folder
        self._ways = [given.tcp, given.bad_tcp, given.bad_tcp, f"{folder}/server", *[f"{folder}/bad"] * 2]
        self._left = 0

    async def live(self) -> None:
        """Ask so many things as the driver says; again and again, until it is gone."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.exhaust_descriptors)
            await nursery.start(CLOCK.leap_often, self.rng)
            say("ready")  # for signals, too
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                self._left = int(line)
                async with trio.open_nursery() as askers:
                    for way in self._ways:
                        askers.start_soon(self._connect_often, way)
                        askers.start_soon(self._reconnect, way)
                say("done")
                await trio.to_thread.run_sync(sys.stdin.readline)  # no more faults
                say(await self._rest_all())
            nursery.cancel_scope.cancel()

    async def _rest_all(self) -> dict[str, int]:
        """Wait until the tasks have been as many for a while; returns the level."""
        tasks = [0]
        with trio.move_on_after(REST):
            while len(set(tasks[-10:])) > 1 or len(tasks) < 10:
                await trio.sleep(0.1)
                tasks.append(trio.lowlevel.current_statistics().tasks_living)
        return self.level()

    def _take(self) -> Iterator[None]:
        """One for each request that is left."""
        while self._left > 0:
            self._left -= 1
            yield

    async def _ask(self, client: Connection | ReconnectingConnection) -> str:
        """Ask anything."""
        rng = self.rng
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        bound = BOUND if rng.random() < 0.85 else rng.random() ** 2 * 0.3
        may_wait = isinstance(client, ReconnectingConnection)
        if kind == "channel":
            return await self.ask(partial(self._talk, client), bound, may_wait=may_wait)
        argument = b"%.3f" % (rng.random() ** 4 * 0.5) if kind == "sleep" else b""
        size = rng.randrange(300_000) if kind == "big" else int(rng.paretovariate(0.5)) % 10_000
        ask = client.request
        idempotent = False
        if isinstance(client, ReconnectingConnection) and rng.random() < 0.5:
            ask = partial(client.request, idempotent=True)
            idempotent = True

        async def request(token: bytes) -> list[bytes]:
            rest = [argument, pattern(token, size)]
            answer = await ask([("echo" if kind == "big" else kind).encode(), token, *rest])
            return answer if answer[1:] == rest else [b"another's"]

        return await self.ask(request, bound, idempotent=idempotent, may_wait=may_wait)

    async def _talk(self, client: Connection | ReconnectingConnection, token: bytes) -> list[bytes]:
        """Ask for a channel, and send items both ways."""
        async with client.open_channel([b"channel", token]) as channel:
            try:
                for number in range(ITEMS):
                    item = [b"%d" % number, pattern(token, 1000)]
                    await channel.send(item)
                    if await channel.receive() != item:
                        return [b"another's item"]
                await channel.end()
            except (trio.EndOfChannel, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the answer says why
            return await channel.answer()

    # ---- by open_connection ----

    async def _connect_often(self, way: str) -> None:
        while self._left > 0:
            began = time.monotonic()
            try:
                async with open_connection(
                    way,
                    **self._login,  # type: ignore[arg-type]
                    request_handler=self.run,
                    settings=SETTINGS,
                ) as connection:
                    await self._use(connection)
            except (OSError, HandshakeError) as exc:
                if time.monotonic() - began > BOUND:
                    self.write("fault", f"dialling took {time.monotonic() - began:.1f} s: {exc!r}")
                await trio.sleep(self.rng.random() * 0.2)

    async def _use(self, connection: Connection) -> None:
        """Ask some hundred things over one connection, and end that in one of several ways."""
        requests = iter(range(self.rng.randrange(400)))

        async def ask_many() -> None:
            for _, _ in zip(requests, self._take(), strict=False):
                if (await self._ask(connection)).startswith(("lost", "closed")):
                    return

        async def end() -> None:
            await trio.sleep(self.rng.random() * 2)
            match self.rng.randrange(4):
                case 0:
                    await connection.aclose()
                case 1:
                    connection.drain()
                case 2:
                    askers.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            async with trio.open_nursery() as askers:
                for _ in range(self.rng.randrange(1, 16)):
                    askers.start_soon(ask_many)
            nursery.cancel_scope.cancel()
        await self._rest(connection)

    async def _rest(self, connection: Connection) -> None:
        """Wait until nothing is in flight on a connection that nobody asks anything."""
        leaps = CLOCK.leaps
        with trio.move_on_after(BOUND) as scope:
            while not connection.closed:
                found = connection.statistics()
                if not (
                    found.used_slots + found.requests_waiting + found.handlers_running + found.packets_queued
                ):
                    break
                await trio.sleep(0.02)
        if scope.cancelled_caught and CLOCK.leaps == leaps:
            self.write("fault", f"a connection that nobody asks is not idle: {found}")

    # ---- by open_reconnecting ----

    async def _reconnect(self, way: str) -> None:
        while self._left > 0:
            with trio.move_on_after(ENTERING) as entering:  # it waits ever longer, and others may ask all
                async with open_reconnecting(
                    way,
                    **self._login,  # type: ignore[arg-type]
                    request_handler=self.run,
                    max_repeats=REPEATS,
                    settings=SETTINGS,
                ) as client:
                    entering.deadline = math.inf
                    await self._use_reconnecting(client)

    async def _use_reconnecting(self, client: ReconnectingConnection) -> None:
        async def ask_many() -> None:
            for _ in self._take():
                await self._ask(client)

        async with trio.open_nursery() as nursery:
            for _ in range(self.rng.randrange(1, 12)):
                nursery.start_soon(ask_many)
        if client.connection is not None:
            await self._rest(client.connection)


# ---- the driver ----


SIGNALS: Final = {"files": signal.SIGUSR1, "leap": signal.SIGUSR2}
"""What has a process do that to itself."""


class Driver:
    """Starts all of it, is the bad link, makes the faults, and compares what all hold at rest.

    Arguments:
        given: the options of the command line.

    Attributes:
        killed: servers that were killed, by name.
        faults: what was found, in words.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._rng = random.Random(given.seed)
        self._weather = Weather(given.seed, given.calm, is_sealed=given.sealed)
        self._server: subprocess.Popen[str] | None = None
        self._clients: list[subprocess.Popen[str]] = []
        self._lives = 0
        self.killed: set[str] = set()
        self._done: Counter[str] = Counter()
        self._log = open(f"{given.folder}/stderr", "w+")  # noqa: SIM115  (for as long as this)
        self.faults: list[str] = []

    def _start(self, role: str, number: int) -> subprocess.Popen[str]:
        options = {**vars(self._given), "role": role, "number": number}
        return subprocess.Popen(
            [sys.executable, __file__, "--be", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    async def run(self) -> None:
        """Do all of it."""
        given = self._given
        upstream = [
            partial(trio.open_tcp_stream, "127.0.0.1", int(given.tcp.rpartition(":")[2])),
            partial(trio.open_unix_socket, f"{given.folder}/server"),
        ]

        async def dial() -> trio.SocketStream:
            return await self._rng.choice(upstream)()

        [tcp] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        given.bad_tcp = "{}:{}".format(*tcp.socket.getsockname())
        unix = trio.socket.socket(socket.AF_UNIX)
        await unix.bind(f"{given.folder}/bad")
        unix.listen()
        try:
            async with trio.open_nursery() as nursery:
                for listener in (tcp, trio.SocketListener(unix)):
                    nursery.start_soon(serve_links, listener, self._weather, dial)
                await self._start_server()
                self._clients = [self._start("client", number) for number in range(CLIENTS)]
                for client in self._clients:
                    await self._hear(client)
                levels = [await self._have_phase(*phase) for phase in PHASES.items()]
                nursery.cancel_scope.cancel()
            self._compare_levels(*levels[1:])
            print(f"troubles of links: {dict(self._weather.troubles)}; of processes: {dict(self._done)}")
        finally:
            for process in [self._server, *self._clients]:
                if process is not None:
                    process.kill()
                    process.wait()

    async def _have_phase(self, phase: str, share: float) -> list[dict[str, int]]:
        """Have so much asked; returns the levels of all when all rests again."""
        requests = int(self._given.requests * share / CLIENTS)
        began = time.monotonic()
        self._weather.is_bad = True
        self._tell_clients(requests)
        async with trio.open_nursery() as nursery:
            if phase != "warm-up":
                nursery.start_soon(self._make_faults, ["kill", "stop"] if phase == "restarts" else [])
            with trio.move_on_after(PATIENCE + requests * 0.02) as scope:
                for client in self._clients:
                    await self._hear(client)
            nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise TimeoutError(f"{phase}: those who ask say nothing after {PATIENCE} s")
        self._weather.is_bad = False
        seconds = time.monotonic() - began
        print(f"{phase}: {requests * CLIENTS} requests in {seconds:.1f} s", flush=True)
        self._tell_clients(0)
        levels = [await self._hear(client) for client in self._clients]
        if phase == "restarts":
            await self._restart(signal.SIGKILL)
        login = {"user": "user", "key": make_key(self._given)} if self._given.sealed else {}
        async with open_connection(self._given.tcp, **login) as connection:  # type: ignore[arg-type]
            levels.append(json.loads((await connection.request(["level"]))[0]))
        return levels

    def _tell_clients(self, requests: int) -> None:
        for client in self._clients:
            assert client.stdin
            client.stdin.write(f"{requests}\n")
            client.stdin.flush()

    async def _hear(self, process: subprocess.Popen[str]) -> Any:
        assert process.stdout
        line = await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)
        if not line:
            raise RuntimeError(f"{process.args[-1]!r} ended with {process.wait()}")  # type: ignore[index]
        return json.loads(line)

    # ---- faults of processes ----

    async def _start_server(self) -> None:
        self._lives += 1
        self._server = self._start("server", self._lives)
        await self._hear(self._server)

    async def _restart(self, how: signal.Signals) -> None:
        assert self._server
        server, name = self._server, f"server{self._lives}"
        if how == signal.SIGKILL:
            self.killed.add(name)
        server.send_signal(how)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * REST):
            code = await trio.to_thread.run_sync(server.wait, abandon_on_cancel=True)
            if code != -how * (how == signal.SIGKILL):
                self.faults.append(f"{name} ended with {code} after {how.name}")
            await trio.sleep(self._rng.choice((0.0, 0.0, 0.2, 1.0)))
            await self._start_server()

    async def _make_faults(self, more: list[str]) -> None:
        """Do something to a process from time to time, for ever."""
        while True:
            await trio.sleep(self._rng.expovariate(0.5 / self._given.calm))
            assert self._server
            fault = self._rng.choice(
                ["suspend", "files", "files of a client", "leap", "leap of a client", *more]
            )
            self._done[fault] += 1
            match fault:
                case "kill":
                    await self._restart(signal.SIGKILL)
                case "stop":
                    await self._restart(signal.SIGTERM)
                case "suspend":
                    self._server.send_signal(signal.SIGSTOP)
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                        await trio.sleep(self._rng.choice((0.1, 0.5, 1.5, 4.0)) * self._given.calm)
                    self._server.send_signal(signal.SIGCONT)
                case "files" | "leap":
                    self._server.send_signal(SIGNALS[fault])
                case _:
                    self._rng.choice(self._clients).send_signal(SIGNALS[fault.partition(" ")[0]])

    def _compare_levels(self, before: list[dict[str, int]], after: list[dict[str, int]]) -> None:
        names = [*(f"client{number}" for number in range(CLIENTS)), "server"]
        for name, first, last in zip(names, before, after, strict=True):
            print(f"{name}: {first} when warm, {last} at the end")
            for what, value in last.items():
                most = first[what] * GROWTH + SLACK if what == "memory" else first[what]
                if what == "tasks":  # of a connection at rest one reads, and another may wait to read next
                    most += last.get("connections", 1)
                if value > most:
                    self.faults.append(f"{name}: {what} grew from {first[what]} to {value}")

    def tell_faults(self) -> bool:
        """Print the faults; returns whether there were any."""
        for fault in self.faults[:50]:
            print(f"FAULT: {fault}")
        if self.faults:
            self._log.seek(0)
            print(f"{len(self.faults)} faults; of what the processes said:\n{self._log.read()[-5000:]}")
        self._log.close()
        return bool(self.faults)


class Comparison:
    """Compares the ledgers.

    Arguments:
        killed: servers that were killed: what they asked may have no end.

    Attributes:
        faults: what was found, in words.
    """

    def __init__(self, killed: set[str]) -> None:
        self.faults: list[str] = []
        self._killed = killed
        self._asked: dict[str, int] = {}  # how often it may run, by token
        self._ended: dict[str, str] = {}  # with which outcome
        self._ran: Counter[str] = Counter()
        self._longest = 0.0

    def read(self, name: str, line: str) -> None:
        """Read a line of a ledger of that name."""
        what, token, *rest = line.split()
        match what:
            case "asked":
                self._asked[token] = 1 + REPEATS * int(rest[0])
            case "ran":
                self._ran[token] += 1
            case "ended":
                if token in self._ended:
                    self.faults.append(f"{token} ended twice")
                self._ended[token] = rest[0]
                took, bound = map(float, rest[1:])
                self._longest = max(self._longest, took)
                if took > bound + LATE:
                    self.faults.append(f"{token} ended {took - bound:.1f} s late: {rest[0]}")
            case _:
                self.faults.append(f"{name}: {line.strip()}")

    def judge(self) -> None:
        """Find what is wrong, when all has been read."""
        for token, most in self._asked.items():
            outcome = self._ended.get(token)
            if outcome is None and token.partition(".")[0] not in self._killed:
                self.faults.append(f"{token} was asked, and has no end")
            if outcome in {"wrong", "hung"}:
                self.faults.append(f"{token} ended with {outcome}")
            runs = self._ran[token]
            if outcome == "waited" and runs and most == 1:  # it was in flight, and lost with its connection
                self.faults.append(f"{token} ran, and waited for another connection")
            if runs > most:
                self.faults.append(f"{token} ran {runs} times")
            if outcome in {"answer", "error"} and not runs:
                self.faults.append(f"{token} ended with {outcome}, and did not run")
            if outcome in {"lost-0", "closed-0", "busy"} and runs:
                self.faults.append(f"{token} ended with {outcome}, and ran")
        self.faults += [f"{token} ran, and was not asked" for token in self._ran if token not in self._asked]

    def print_sums(self) -> None:
        """Print how often there was what."""
        back = sum(token.startswith("server") for token in self._asked)
        again = sum(runs > 1 for runs in self._ran.values())
        print(f"{len(self._asked)} asked, {back} of them back; {self._ran.total()} runs, {again} ran again")
        for outcome, number in sorted(Counter(self._ended.values()).items()):
            runs = sum(self._ran[token] > 0 for token, each in self._ended.items() if each == outcome)
            print(f"  {outcome:10} {number:8}, of which {runs} ran")
        print(f"  no end     {len(self._asked) - len(self._ended):8}: their servers were killed")
        print(f"the longest took {self._longest:.1f} s; {len(self._killed)} servers were killed")


def find_port() -> int:
    """A port of which the system makes none for who dials, so that it stays free between two servers."""
    while True:
        with socket.socket() as probe:
            port = random.randrange(20_000, 32_000)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def drive(given: argparse.Namespace) -> int:
    """Do all of it; returns the exit status."""
    with tempfile.TemporaryDirectory() as given.folder:
        given.tcp = f"127.0.0.1:{find_port()}"
        driver = Driver(given)
        try:
            trio.run(driver.run)
        except* (RuntimeError, TimeoutError) as group:
            driver.faults += map(str, group.exceptions)
        comparison = Comparison(driver.killed)
        for name in sorted(os.listdir(given.folder)):
            if name.endswith(".ledger"):
                with open(f"{given.folder}/{name}") as ledger:
                    for line in ledger:
                        comparison.read(name, line)
        comparison.judge()
        comparison.print_sums()
        driver.faults += comparison.faults
        return int(driver.tell_faults())


def main() -> int:
    """Be what the command line says."""
    if sys.argv[1:2] == ["--be"]:
        given = argparse.Namespace(**json.loads(sys.argv[2]))
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
        main = partial(serve, given) if given.role == "server" else Client(given).live
        trio.run(main, clock=CLOCK)
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--calm",
        type=float,
        default=1.0,
        help="seconds from one trouble of a link to the next; processes have one half as often",
    )
    parser.add_argument("--plain", dest="sealed", action="store_false")
    parser.add_argument("--sealed", action="store_true", default=True)
    return drive(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
