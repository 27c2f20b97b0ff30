"""Ask all kinds of things over many connections for hours, and fail if one of them hangs or is wrong.

    python benchmarks/soak.py --seconds 3600 --plain
    python benchmarks/soak.py --seconds 3600 --sealed --seed 7

One process serves on a TCP and on two UNIX sockets; two ask, with two event loops each. Both sides ask each
other: one after another with pauses, in bursts, nested, in circles over many connections, by channels; they
cancel at any moment, and connections are opened, closed, drained and killed meanwhile. See `soak_calls`.

It ends with 1, and says why, if a call takes over 20 s, an answer is wrong, anything runs twice or runs that
must not, or the log tells of a defect. Every few minutes all rests: then every connection must be idle, and
tasks, connections and file descriptors must be as many as after the warm-up; at the end memory too.
"""
# ruff: noqa: PLR2004, S311  (a load is made of many numbers, and its dice guard nothing)

from __future__ import annotations

import argparse
import faulthandler
import gc
import hashlib
import json
import logging
import os
import queue
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any, Final

import trio
from soak_calls import BOUND, SERVER, Answerer, Asker, Book, Gone, Info, LogCheck, pause, together

from bokbok_trio import (
    AddressError,
    Connection,
    ConnectionLost,
    HandshakeError,
    Key,
    Settings,
    open_connection,
    open_reconnecting,
    open_server,
)

CLIENTS: Final = 2
"""Processes that ask."""
LOOPS: Final = 2
"""Event loops of each of them, in threads."""
STYLES: Final = (
    "lone",
    "lone",
    "mixed",
    "storm",
    "nested",
    "callbacks",
    "flicker",
    "channels",
    "lone",
    "reconnecting",
)
"""What the connections of an event loop are used for, each its own."""
ROUND: Final = 300.0
"""Seconds at most from one rest to the next."""
REST: Final = 3 * BOUND
"""Seconds in which all must come to rest."""
LEVEL_WITHIN: Final = 20.0
"""Seconds in which what was closed must be gone when all rests."""
STEADY: Final = 1.1
"""Seconds for which the first level must stay: what is closed may take one to be gone."""
SILENCE: Final = 60.0
"""Seconds after which a process that says nothing hangs."""
GROWTH: Final = 1.25
"""By which factor memory may grow from the first rest to the last, besides `SLACK`: allocators fragment."""
SLACK: Final = 24 * 2**20
"""Bytes by which memory may grow besides."""
MEMORY_AFTER: Final = 120.0
"""Seconds that it must last for memory to be compared: before that, caches and heaps still fill."""


class Oops(Exception):  # noqa: N818
    """What the block of a connection raises."""


def memory() -> int:
    """Bytes that this process has in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stamp() -> str:
    """The time of day, for lines that are printed."""
    return time.strftime("%H:%M:%S")


def make_key(seed: str) -> Key:
    return Key(hashlib.blake2b(seed.encode(), digest_size=32).digest())


# ---- a side: one event loop ----


class ServerSide:
    """Serves, asks back, and ends connections.

    Arguments:
        book: of this event loop.
        given: the options of the command line.
        tell: sends the parent a message.
    """

    def __init__(
        self, book: Book, given: argparse.Namespace, tell: Callable[[dict[str, Any]], object]
    ) -> None:
        self.book = book
        self._given = given
        self._tell = tell
        self._answerer = Answerer(book)
        self._is_settled = trio.Event()  # all servers listen
        self._goes_on = trio.Event()

    def _open(self, on: str, **settings: float) -> Any:
        return open_server(
            on,
            self._answerer.on_request,
            channel_handler=self._answerer.on_channel,
            user_key={"soak": make_key(self._given.seed)} if self._given.sealed else None,
            settings=Settings(**settings),  # type: ignore[arg-type]
        )

    async def run(self, stack: AsyncExitStack) -> None:
        """Serve, until the stack is unwound."""
        many = await stack.enter_async_context(self._open("127.0.0.1:0", ping_after=1.0))
        few = await stack.enter_async_context(self._open(f"{self._given.folder}/few", max_requests=4))
        self.book.servers += [many, few]
        self.book.start(self._restart)
        self.book.start(self._end_connections)
        await self._is_settled.wait()
        self._tell({"ready": [str(many.addresses[0]), str(few.addresses[0]), f"{self._given.folder}/often"]})

    async def _restart(self) -> None:
        """Serve on an address that often goes away and comes back."""
        rng = self.book.rng
        while True:
            async with self._open(f"{self._given.folder}/often", max_requests=20) as server:
                self.book.servers.append(server)
                self._is_settled.set()
                await trio.sleep(0.5 + rng.random() * 4)
                await self._goes_on.wait()
                self._is_settled = trio.Event()
                with self.book.call("stop", bound=2 * BOUND):
                    server.stop(grace=rng.choice((0.0, rng.random(), 5.0)))
                    await server.wait_stopped()
                self.book.servers.remove(server)

    async def _end_connections(self) -> None:
        """End connections, one here and one there."""
        rng = self.book.rng
        while True:
            await trio.sleep(rng.random() * 0.5)
            connections = [each for server in self.book.servers for each in server.connections]
            ours = [each for each in connections if isinstance(each.data, Info) and not each.data.is_safe]
            if ours and not self.book.is_resting:
                connection = rng.choice(ours)
                self.book.counts["connections ended by the server"] += 1
                if rng.random() < 0.5:
                    connection.drain()
                else:
                    self.book.start(partial(self._close, connection))

    async def _close(self, connection: Connection) -> None:
        with self.book.call("aclose", connection):
            await connection.aclose()

    async def go(self) -> None:
        """Begin."""
        self.book.is_resting = False
        self._goes_on.set()

    async def rest(self) -> None:
        """Come to rest."""
        self.book.is_resting = True
        self._goes_on = trio.Event()
        await self._is_settled.wait()
        await self.book.check_claims_once()


class ClientSide:
    """Opens connections, and asks.

    Arguments:
        book: of this event loop.
        given: the options of the command line.
    """

    def __init__(self, book: Book, given: argparse.Namespace) -> None:
        self.book = book
        self._given = given
        self._answerer = Answerer(book)
        self._many, self._few, self._often = given.addresses
        self._who = {"user": "soak", "key": make_key(given.seed)} if given.sealed else {}
        self._ended = trio.Event()

    def _open(self, to: Any, rng: random.Random) -> Any:
        return open_connection(
            to,
            **self._who,
            request_handler=self._answerer.on_request,
            channel_handler=self._answerer.on_channel,
            settings=Settings(max_requests=rng.choice((3, 10, 100)), ping_after=rng.choice((0.3, 1.0, 20.0))),
        )

    async def run(self, stack: AsyncExitStack) -> None:
        """Be connected, until the stack is unwound."""
        control = await stack.enter_async_context(self._open(self._many, self.book.rng))
        await control.request(["hello", self.book.new_token(), str(self.book.loop), "control"])
        self.book.controls[SERVER] = control

    async def go(self) -> None:
        """Begin."""
        self.book.is_resting = False
        self._ended = trio.Event()
        self.book.start(self._work)

    async def rest(self) -> None:
        """Come to rest: all that goes on ends, and nothing new begins."""
        self.book.is_resting = True
        await self._ended.wait()
        await self.book.check_claims_once()

    async def _work(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for number, style in enumerate(STYLES):
                    nursery.start_soon(self._use, number, style)
        finally:
            self._ended.set()

    async def _use(self, number: int, style: str) -> None:
        """Have a connection, one after another, and use each in one way."""
        rng = random.Random(self.book.rng.random())
        while not self.book.is_resting:
            if style == "reconnecting":
                await self._reconnect(rng)
                continue
            is_safe = number % 2 == 0
            to = rng.choice((self._many, self._few) if is_safe else (self._many, self._few, self._often))
            with self._contain(is_safe or to != self._often):
                await self._session(style, to, rng, is_safe=is_safe)
            await pause(self.book, rng)

    @contextmanager
    def _contain(self, is_steady: bool) -> Iterator[None]:  # noqa: FBT001
        """What may go wrong while connections are opened and ended."""
        try:
            yield
        except (Gone, Oops):
            pass
        except (OSError, HandshakeError, AddressError) as exc:
            self.book.counts["connections not opened"] += 1
            if is_steady:
                self.book.fault(f"a connection was not opened: {exc!r}")

    async def _session(self, style: str, to: str, rng: random.Random, *, is_safe: bool) -> None:
        book = self.book
        stream: trio.SocketStream | None = None
        scope = trio.CancelScope()
        call = book.begin("open")
        try:
            with scope:
                if not is_safe:
                    stream = await self._dial(to)
                    if rng.random() < 0.05:
                        book.start(partial(self._cancel_later, scope, rng.random() * 0.004))
                async with self._open(to if stream is None else stream, rng) as connection:
                    book.done(call)
                    book.connections.add(connection)
                    try:
                        await self._fill(style, connection, rng, stream, scope, is_safe=is_safe)
                    finally:
                        call = book.begin("close", connection)
                    if not is_safe and rng.random() < 0.2:
                        raise Oops
        finally:
            book.done(call)
            if stream is not None and call.kind == "open":
                await trio.aclose_forcefully(stream)

    async def _dial(self, to: str) -> trio.SocketStream:
        if to.startswith("/"):
            return await trio.open_unix_socket(to)
        host, _, port = to.rpartition(":")
        return await trio.open_tcp_stream(host, int(port))

    async def _cancel_later(self, scope: trio.CancelScope, after: float) -> None:
        await trio.sleep(after)
        scope.cancel()

    async def _fill(
        self,
        style: str,
        connection: Connection,
        rng: random.Random,
        stream: trio.SocketStream | None,
        scope: trio.CancelScope,
        *,
        is_safe: bool,
    ) -> None:
        """Use a connection, and see to it that it ends, by itself or not."""
        asker = Asker(self.book, connection, rng, is_safe=is_safe)
        await asker.ask("hello", self.book.new_token(), str(self.book.loop), "safe" if is_safe else "unsafe")
        work = getattr(self, f"_be_{style}")
        if is_safe:
            await work(asker)
            await asker.ask("idle", self.book.new_token())
            await self._answerer.wait_idle(connection)
            return
        assert stream is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._kill_later, asker, stream, scope)
                await work(asker)
                nursery.cancel_scope.cancel()
        except* Gone:
            pass
        if rng.random() < 0.2:
            with self.book.call("wait_closed", connection):
                if rng.random() < 0.5:
                    connection.drain()
                else:
                    await connection.aclose()
                await connection.wait_closed()

    async def _kill_later(self, asker: Asker, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        """End a connection that is in use, in one of many ways."""
        rng = asker.rng
        await trio.sleep(rng.random() * rng.choice((0.05, 0.5, 5.0)))
        how = rng.choice(("close", "drain", "shut down", "half", "reset", "cancel", "die", "die"))
        self.book.counts["connections ended by the client"] += 1
        connection = asker.connection
        if how == "close":
            with self.book.call("aclose", connection):
                await connection.aclose()
        elif how == "drain":
            connection.drain()
            with self.book.call("drain", connection):
                await connection.wait_closed()
        elif how == "die":
            await asker.ask("die", self.book.new_token(), rng.choice(("close", "drain")))
        elif how == "cancel":
            scope.cancel()
        elif stream.socket.fileno() >= 0:
            self._break(stream, how)

    def _break(self, stream: trio.SocketStream, how: str) -> None:
        """End a connection behind its back."""
        try:
            if how == "reset":
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stream.socket.close()
            else:
                stream.socket.shutdown(socket.SHUT_WR if how == "half" else socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was faster

    # ---- styles ----

    async def _repeat(self, asker: Asker, call: Callable[[], Awaitable[object]], times: int) -> None:
        for _ in range(times):
            if self.book.is_resting or asker.connection.closed:
                return
            await call()
            await pause(self.book, asker.rng)

    async def _be_lone(self, asker: Asker) -> None:
        """One request after another."""
        await self._repeat(asker, asker.light, asker.rng.choice((100, 1_000, 5_000)))

    async def _be_mixed(self, asker: Asker) -> None:
        """Some tasks that do all kinds of things."""
        tasks = asker.rng.randrange(2, 8)
        await together(*[partial(self._repeat, asker, asker.any, 200)] * tasks)

    async def _be_storm(self, asker: Asker) -> None:
        """Bursts."""
        await self._repeat(asker, asker.burst, 40)

    async def _be_nested(self, asker: Asker) -> None:
        """More callers than slots, and handlers that call back."""
        now = asker.connection.statistics()
        most = min(
            120, 8 * min(now.total_slots, now.max_requests)
        )  # each takes long where there are few slots

        async def many() -> None:
            await together(*[asker.nest] * asker.rng.choice((2, 10, most)))

        await self._repeat(asker, many, 10)

    async def _be_callbacks(self, asker: Asker) -> None:
        """The server asks."""
        await together(*[partial(self._repeat, asker, asker.campaign, 10)] * 3)

    async def _be_channels(self, asker: Asker) -> None:
        """Channels, of all kinds."""

        async def one() -> None:
            await getattr(asker, asker.rng.choice(("up", "down", "both", "quit", "quitted", "cancelled")))()

        await together(*[partial(self._repeat, asker, one, 30)] * 4)

    async def _be_flicker(self, asker: Asker) -> None:
        """A connection that is hardly used."""
        for _ in range(asker.rng.randrange(3)):
            await asker.light()

    async def _reconnect(self, rng: random.Random) -> None:
        """Ask over a connection that comes back."""

        async def on_open(connection: Connection) -> None:
            self.book.connections.add(connection)
            await connection.request(["hello", self.book.new_token(), str(self.book.loop), "unsafe"])

        with self.book.call("open, reconnecting", bound=2 * BOUND):
            manager = open_reconnecting(
                [self._often, self._many],
                **self._who,
                request_handler=self._answerer.on_request,
                open_handler=on_open,
            )
            client = await manager.__aenter__()
        try:
            for _ in range(rng.choice((5, 100, 500))):
                if self.book.is_resting:
                    break
                token = self.book.new_token()
                # It may wait for the pauses between tries as well.
                with self.book.call("request, reconnecting", bound=3 * BOUND):
                    try:
                        answer = await client.request(["echo", token, "300", "1000", token])
                    except ConnectionLost:
                        self.book.counts["calls that lost their connection"] += 1
                    else:
                        if answer != [token, token * 125]:
                            self.book.fault(f"the answer to {token.hex()} is wrong: {answer!r:.200}")
                await pause(self.book, rng)
        finally:
            with self.book.call("close, reconnecting"):
                await manager.__aexit__(None, None, None)


# ---- a process of it ----


class Process:
    """Runs event loops in threads, takes commands by standard input, and reports by standard output."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._sides: list[tuple[Book, trio.lowlevel.TrioToken, trio.MemorySendChannel[str]]] = []
        self._threads: list[threading.Thread] = []

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            print(json.dumps(message), flush=True)

    def _fault(self, text: str) -> None:
        print(f"FAULT: {text}", file=sys.stderr, flush=True)
        self._tell({"faults": [text]})

    def run(self) -> int:
        """Do as told until the end."""
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        logger = logging.getLogger("bokbok_trio")
        logger.addHandler(LogCheck(self._fault))
        logger.propagate = False
        for loop in self._given.loops:
            thread = threading.Thread(target=self._run_loop, args=(loop,), daemon=True)
            thread.start()
            self._threads.append(thread)
            self._ready.get()
        threading.Thread(target=self._report, daemon=True).start()
        if self._given.addresses:
            self._tell({"ready": []})
        for line in sys.stdin:
            command = line.strip()
            if command == "measure":
                gc.collect()
            for book, token, send in self._sides:
                if command == "dump":
                    token.run_sync_soon(book.dump)
                else:
                    token.run_sync_soon(send.send_nowait, command)
            if command == "end":
                break
        for thread in self._threads:
            thread.join(BOUND)
            if thread.is_alive():
                self._fault("an event loop does not end")
                return 1
        return 0

    def _run_loop(self, loop: int) -> None:
        try:
            trio.run(self._main, loop)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            self._fault(f"event loop {loop} ended by an exception")
            raise

    async def _main(self, loop: int) -> None:
        book = Book(loop, self._given.seed)
        send, commands = trio.open_memory_channel[str](1000)
        side: ServerSide | ClientSide
        side = ServerSide(book, self._given, self._tell) if loop == SERVER else ClientSide(book, self._given)
        async with trio.open_nursery() as nursery:
            book.nursery = nursery
            nursery.start_soon(book.watch)
            nursery.start_soon(book.check_claims)
            async with AsyncExitStack() as stack:
                await side.run(stack)
                self._sides.append((book, trio.lowlevel.current_trio_token(), send))
                self._ready.put(None)
                async for command in commands:
                    if command == "end":
                        break
                    if command == "go":
                        await side.go()
                    elif command == "rest":
                        with book.call("rest", bound=REST):
                            await side.rest()
                        book.ran.clear()
                        book.ran_before.clear()
                        self._tell({"rested": loop})
                    elif command == "measure":
                        self._tell({"measured": book.measure()})
                nursery.cancel_scope.cancel()

    def _report(self) -> None:
        """Say each second how it goes."""
        while True:
            faults: list[str] = []
            counts: Counter[str] = Counter()
            for book, _, _ in self._sides:
                counts += book.counts.copy()
                faults += book.faults.copy()
            self._tell(
                {
                    "counts": counts,
                    "faults": faults,
                    "lateness": max(book.lateness for book, _, _ in self._sides),
                    "longest": max(book.longest for book, _, _ in self._sides),
                    "memory": memory(),
                    "files": len(os.listdir("/proc/self/fd")),
                }
            )
            time.sleep(1)


# ---- the parent ----


class Failed(Exception):  # noqa: N818
    """It must end, as something is wrong."""


class Child:
    """A process of the soak, as the parent sees it."""

    def __init__(self, name: str, given: argparse.Namespace, loops: list[int], addresses: list[str]) -> None:
        self.name = name
        self.loops = loops
        self.status: dict[str, Any] = {
            "counts": {},
            "longest": (0.0, ""),
            "lateness": 0.0,
            "memory": 0,
            "files": 0,
        }
        self.measured: dict[str, int] = {}
        self.rested: set[int] = set()
        self.ready: list[str] | None = None
        self.faults: list[str] = []
        self.heard_at = time.monotonic()
        mode = "--sealed" if given.sealed else "--plain"
        command = [
            sys.executable,
            os.path.abspath(__file__),
            mode,
            "--seed",
            given.seed,
            "--folder",
            given.folder,
        ]
        command += ["--loops", json.dumps(loops), "--addresses", json.dumps(addresses)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            self.heard_at = time.monotonic()
            self.faults += message.pop("faults", [])
            self.measured |= message.get("measured", {})
            self.ready = message.get("ready", self.ready)
            if "rested" in message:
                self.rested.add(message["rested"])
            if "counts" in message:
                self.status = message

    def tell(self, command: str) -> None:
        """Give a command."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"{self.name} has ended") from None

    def check(self) -> None:
        """Raise if it found a fault, or is one."""
        if self.faults:
            raise Failed(f"{self.name}: {self.faults[0]}")
        if self.process.poll() is not None:
            raise Failed(f"{self.name} has ended with {self.process.returncode}")
        if time.monotonic() - self.heard_at > SILENCE:
            raise Failed(f"{self.name} has said nothing for {SILENCE:g} s")


class Soak:
    """The whole of it, from the parent's side."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._children: list[Child] = []
        self._began = time.monotonic()
        self._shown_at = self._began
        self._shown_calls = 0

    def run(self) -> int:
        """Run it; 1 if anything is wrong."""
        try:
            self._run()
        except Failed as exc:
            print(f"{stamp()}  FAILED: {exc}", flush=True)
            self._ask_for_dumps()
            self._summarise()
            return 1
        finally:
            for child in self._children:
                child.process.kill()
            for child in self._children:
                child.process.wait()
        return 0

    def _run(self) -> None:
        given = self._given
        server = Child("the server", given, [SERVER], [])
        self._children.append(server)
        self._wait_until("the server listens", lambda: server.ready is not None, BOUND)
        assert server.ready is not None
        for number in range(CLIENTS):
            loops = [1 + number * LOOPS + loop for loop in range(LOOPS)]
            self._children.append(Child(f"client {number + 1}", given, loops, server.ready))
        self._wait_until(
            "all are connected", lambda: all(child.ready is not None for child in self._children), BOUND
        )
        self._began = self._shown_at = time.monotonic()
        left = given.seconds
        level: dict[str, int] | None = None
        memory: dict[str, int] = {}
        while left > 0:
            seconds = min(left, ROUND if memory else min(60.0, given.seconds / 3))
            left -= seconds
            self._work(seconds)
            level, now = self._rest(level)
            memory = memory or now
        self._summarise(memory, now)
        for child in self._children[::-1]:
            child.tell("end")
            self._wait_until(
                f"{child.name} ends",
                lambda child=child: child.process.poll() is not None,
                BOUND,
                ending=child,
            )
            if child.process.returncode != 0:
                raise Failed(f"{child.name} ended with {child.process.returncode}")
        if given.seconds >= MEMORY_AFTER:
            for name in memory:
                if now[name] > memory[name] * GROWTH + SLACK:
                    raise Failed(f"the memory of {name} has grown")

    def _wait_until(
        self, what: str, is_so: Callable[[], bool], timeout: float, *, ending: Child | None = None
    ) -> None:
        until = time.monotonic() + timeout
        while not is_so():
            for child in self._children:
                if child.faults or (child is not ending and child.process.returncode is None):
                    child.check()
            if time.monotonic() > until:
                raise Failed(f"not within {timeout:g} s: {what}")
            time.sleep(0.02)

    def _work(self, seconds: float) -> None:
        for child in self._children:
            child.tell("go")
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for child in self._children:
                child.check()
            if time.monotonic() - self._shown_at >= 60:
                self._show()
            time.sleep(min(0.5, left))

    def _rest(self, level: dict[str, int] | None) -> tuple[dict[str, int], dict[str, int]]:
        """Let all come to rest, and check that what there is is as it was. Returns that, and memory."""
        server, *clients = self._children
        for group in (clients, [server]):
            for child in group:
                child.rested.clear()
                child.tell("rest")
            self._wait_until("all rest", partial(self._have_rested, group), REST)
        found: dict[str, int] = {}
        since = time.monotonic()
        until = since + LEVEL_WITHIN
        while True:
            before, found = found, self._measure()
            if found != before:
                since = time.monotonic()
            if level is None:
                is_level = time.monotonic() > since + STEADY
            else:
                is_level = all(found[name] <= most for name, most in level.items())
            if is_level:
                return found, {child.name: child.status["memory"] for child in self._children}
            if time.monotonic() > until:
                wrong = {name: (most, found[name]) for name, most in (level or before).items()}
                raise Failed(f"not level with the rest before, (then, now): {wrong}")

    def _have_rested(self, children: list[Child]) -> bool:
        return all(child.rested == set(child.loops) for child in children)

    def _measure(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for child in self._children:
            child.measured = {}
            child.heard_at = time.monotonic()
            child.tell("measure")
        time.sleep(0.2)
        self._wait_until(
            "all have counted",
            lambda: all(len(child.measured) == 3 * len(child.loops) for child in self._children),
            BOUND,
        )
        for child in self._children:
            found |= child.measured
            found[f"files of {child.name}"] = child.status["files"]
        return found

    # ---- what is shown ----

    def _totals(self) -> tuple[Counter[str], float, str]:
        counts: Counter[str] = Counter()
        for child in self._children:
            counts += Counter(child.status["counts"])
        longest, kind = max(tuple(child.status["longest"]) for child in self._children)
        return counts, longest, kind

    def _memories(self, values: dict[str, int] | None = None) -> str:
        values = values or {child.name: child.status["memory"] for child in self._children}
        return ", ".join(f"{value / 2**20:.1f}" for value in values.values()) + " MiB"

    def _show(self) -> None:
        counts, longest, kind = self._totals()
        now = time.monotonic()
        rate = (counts["handled"] - self._shown_calls) / (now - self._shown_at)
        self._shown_calls, self._shown_at = counts["handled"], now
        figures = (
            f"{now - self._began:6.0f} s",
            f"{counts['handled']:,} handled",
            f"{rate:,.0f}/s",
            f"longest {longest:.2f} s ({kind})",
            f"{counts['open']:,} connections",
            f"{counts['calls cancelled']:,} cancelled",
            f"{counts['calls that lost their connection']:,} lost",
            f"memory {self._memories()}",
        )
        print(f"{stamp()} {', '.join(figures)}", flush=True)

    def _summarise(self, before: dict[str, int] | None = None, after: dict[str, int] | None = None) -> None:
        counts, longest, kind = self._totals()
        seconds = time.monotonic() - self._began
        mode = "sealed" if self._given.sealed else "plain"
        print(f"{mode}, seed {self._given.seed}, {seconds:.0f} s")
        for name, count in sorted(counts.items()):
            print(f"  {name:34} {count:12,}")
        print(f"  {'handled each second':34} {counts['handled'] / seconds:12,.0f}")
        lateness = max(child.status["lateness"] for child in self._children)
        print(f"  longest call {longest:.3f} s ({kind}); event loops were late by up to {lateness:.3f} s")
        if before is not None and after is not None:
            print(
                f"  memory after the warm-up {self._memories(before)}, at the end {self._memories(after)}",
                flush=True,
            )

    def _ask_for_dumps(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.tell("dump")
        time.sleep(2)
        for child in self._children:
            if child.process.poll() is None and time.monotonic() - child.heard_at > 5:
                child.process.send_signal(signal.SIGUSR1)  # it prints what its threads do
                time.sleep(1)


def main() -> int:
    """Run the soak, or a process of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long; an hour by default")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sealed", action="store_true", help="encrypted connections")
    mode.add_argument("--plain", action="store_false", dest="sealed", help="plain ones, the default")
    parser.add_argument("--seed", default="1", help="of all the dice")
    for hidden in ("--loops", "--addresses"):
        parser.add_argument(hidden, type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loops is not None:
        return Process(given).run()
    with tempfile.TemporaryDirectory() as given.folder:
        return Soak(given).run()


if __name__ == "__main__":
    sys.exit(main())
