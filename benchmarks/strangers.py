"""Strangers: what an honest client and the server notice of clients that have no key.

python benchmarks/strangers.py [--only silent,wrong-keys,nonsense,descriptors] [--sockets 10000] [--dials 100]

A server, a process of strangers, and the honest client, over loopback. The strangers come from 127.0.0.1, the
client from 127.0.0.2 (Linux lets it), once through a proxy that makes it 200 ms away. Prints how many of the
client's dials got in, and in what time; and what the server holds afterwards. Ends with 1 where that is not
what ``docs/security.rst`` says.
"""
# ruff: noqa: S311  (a load is made of many numbers, and its dice guard nothing)

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, Final

import trio
import trio.lowlevel

from bokbok_trio import BokbokError, Key, Settings, open_connection, open_server
from bokbok_trio._protocol.handshake import encode_hello
from bokbok_trio._stream.establish import establish_as_client

KEY: Final = Key(bytes(range(32)))
WRONG: Final = Key(bytes(32))
LOGIN: Final = {"user": "user", "key": KEY}

RATE: Final = 4000
"""Silent strangers a second."""
AWAY: Final = 0.2
"""Seconds of the honest client's round trip, where it is far away."""
HONEST: Final = "127.0.0.2"
"""Where the honest client is, unless it shares the address of the strangers."""
SLOW: Final = 0.5
"""Seconds that a slow look-up takes, in a thread."""
WRONG_KEYS: Final = 300
"""Of them a second, where look-ups are slow; where they are quick, as many as come."""
AT_ONCE: Final = 64
"""Strangers of a kind at once."""
FILES: Final = 256
"""Descriptors that a server may have that is to run out of them."""
PROMPT: Final = 0.1
"""Seconds within which an honest client is served when the strangers have gone."""
LEVEL_WITHIN: Final = 15.0
"""Seconds within which the server holds no more than before: handshakes may take ten."""
SLACK: Final = 4 * 2**20
"""Bytes by which its memory may have grown: allocators fragment."""

START: Final = b"bokbok1\n"
LOW_ORDER: Final = bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
"""A point of X25519 that makes every shared secret zero."""


# ---- the server ----


def read_memory() -> int:
    """Bytes that this process has in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def serve(lookup: str) -> None:
    """Be a sealed and a plain server, and print their addresses."""

    async def find(user: str) -> Key | None:
        if lookup == "slow":
            await trio.to_thread.run_sync(time.sleep, SLOW)
        return KEY if user == "user" else None

    async def handler(connection: object, request: list[bytes]) -> list[str]:
        if request != [b"level"]:
            return ["here"]
        gc.collect()
        level = {
            "handshakes": sealed.statistics().handshakes + plain.statistics().handshakes,
            "connections": sealed.statistics().connections + plain.statistics().connections,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "memory": read_memory(),
        }
        return [json.dumps(level)]

    async with (
        open_server("127.0.0.1:0", handler, user_key=find) as sealed,
        open_server("127.0.0.1:0", handler) as plain,
    ):
        print(sealed.addresses[0], plain.addresses[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        sealed.stop(grace=0)
        plain.stop(grace=0)


# ---- the strangers ----


def hello(public: bytes) -> bytes:
    """What a client sends first."""
    return encode_hello("client", public)


def client_hello() -> bytes:
    """What a TLS client sends first."""
    out = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="example.org")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


async def flood(port: int) -> None:
    """Connect `RATE` times a second, and say nothing; the newest stay open for a second."""
    strangers: dict[int, socket.socket] = {}
    began = trio.current_time()
    for number in count():
        await trio.sleep_until(began + number / RATE)
        stranger = strangers[number % RATE] = socket.socket()
        stranger.setblocking(False)
        stranger.connect_ex(("127.0.0.1", port))
        if not number % 100:
            print(number, trio.current_time() - began, flush=True)


async def try_wrong_keys(port: int, rate: float) -> None:
    """Try a wrong key so often a second, as long as few enough wait."""
    limiter = trio.CapacityLimiter(8 * AT_ONCE)
    tried = 0
    began = trio.current_time()

    async def try_one() -> None:
        nonlocal tried
        async with limiter:
            await wrong_key(port)
        tried += 1
        if not tried % 100:  # nobody reads that before the end, and a pipe is soon full
            print(tried, trio.current_time() - began, flush=True)

    async with trio.open_nursery() as nursery:
        for number in count():
            await trio.sleep_until(began + number / rate)
            if limiter.available_tokens:
                nursery.start_soon(try_one)


async def wrong_key(port: int) -> None:
    """Try a wrong key."""
    with suppress(OSError, BokbokError, trio.BrokenResourceError):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await establish_as_client(stream, user="user", key=WRONG, service="", settings=Settings())


async def hold(port: int, number: int) -> None:
    """Hold so many descriptors of the server, saying nothing: whatever it closes is opened again."""

    async def hold_one() -> None:
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await stream.receive_some(1)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for _ in range(number):
            nursery.start_soon(hold_one)


Say = Callable[[trio.SocketStream], Awaitable[object]]


def saying(*parts: bytes) -> Say:
    """Sends bytes, and waits until the server closes."""

    async def say(stream: trio.SocketStream) -> None:
        for part in parts:
            await stream.send_all(part)
        while await stream.receive_some():
            pass

    return say


async def leave(stream: trio.SocketStream) -> None:
    """Say nothing, and end."""
    await stream.send_eof()
    await stream.receive_some()


async def be_reset(stream: trio.SocketStream) -> None:
    """Say nothing, and go by a reset."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def be_slow(stream: trio.SocketStream) -> None:
    """Send a right hello byte by byte."""
    for byte in hello(os.urandom(32)):
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.2)


async def send_garbage(stream: trio.SocketStream) -> None:
    """Send random bytes."""
    await saying(random.randbytes(random.randrange(1, 5000)))(stream)


SEALED: Final = hello(bytes(range(32)))
NONSENSE: Final[dict[str, tuple[bool, Say | None]]] = {
    "garbage": (True, send_garbage),
    "half a hello": (True, saying(SEALED[:20])),
    "hello and no open": (True, saying(SEALED)),
    "key of low order": (True, saying(hello(LOW_ORDER))),
    "plain to sealed": (True, saying(hello(b""))),
    "sealed to plain": (False, saying(SEALED)),
    "TLS": (True, saying(client_hello())),
    "HTTP": (True, saying(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")),
    "huge length": (False, saying(hello(b""), b"\xff\xff\xff\xff" + bytes(2**16))),
    "end at once": (True, leave),
    "reset at once": (True, be_reset),
    "byte by byte": (True, be_slow),
    "wrong key": (True, None),
}
"""By name: whether it is said to the sealed server, and what says it; None for a whole handshake."""


async def talk_nonsense(port: int, kind: str, sockets: int) -> None:
    """Open so many sockets, say that on each, and print when all have been opened and have said it.

    Who would wait for the server waits for two seconds at most, and leaves then.
    """
    _, say = NONSENSE[kind]
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def be_one() -> None:
        async with limiter:
            if say is None:
                await wrong_key(port)
                return
            with suppress(OSError, trio.BrokenResourceError), trio.move_on_after(2):
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await say(stream)

    async with trio.open_nursery() as nursery:
        for _ in range(sockets):
            nursery.start_soon(be_one)


# ---- the honest client ----


async def be_away(server: int, delay: float) -> tuple[str, Callable[[], Awaitable[None]]]:
    """Make a proxy, half of the delay each way; returns its address, and what runs it."""

    async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](1000)

        async def fly() -> None:
            async for due, data in receive:
                await trio.sleep_until(due)
                await sink.send_all(data)
            await sink.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fly)
            async with send:
                while data := await source.receive_some():
                    await send.send((trio.current_time() + delay / 2, data))

    async def handle(client: trio.SocketStream) -> None:
        with suppress(OSError):
            async with await trio.open_tcp_stream("127.0.0.1", server, local_address=HONEST) as stream:
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(pump, client, stream)
                        nursery.start_soon(pump, stream, client)
                except* (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    name = "{}:{}".format(*listener.socket.getsockname())
    return name, partial(trio.serve_listeners, handle, [listener])


class Dials:
    """What came of dials.

    Attributes:
        times: seconds until each that got in had its first answer.
        errors: of the others.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.errors: list[str] = []

    async def dial(self, connect: Callable[[], Awaitable[str | trio.abc.Stream]]) -> None:
        """Dial once, and ask one thing."""
        began = time.monotonic()
        try:
            async with open_connection(await connect(), **LOGIN) as connection:  # type: ignore[arg-type]
                await connection.request(["there?"])
                self.times.append(time.monotonic() - began)
        except (OSError, BokbokError) as exc:
            self.errors.append(f"{type(exc).__name__}: {exc}")

    def describe(self) -> str:
        """In a line."""
        dials = len(self.times) + len(self.errors)
        line = f"{len(self.times):4} of {dials} in"
        if self.times:
            line += f", median {statistics.median(self.times):.2f} s, longest {max(self.times):.2f} s"
        if self.errors:
            line += f"; for one: {self.errors[0]}"
        return line


async def dial_often(
    connect: Callable[[], Awaitable[str | trio.abc.Stream]], dials: int, rate: float
) -> Dials:
    """Dial so often, so many times a second, whatever came of those before."""
    found = Dials()
    async with trio.open_nursery() as nursery:
        for _ in range(dials):
            nursery.start_soon(found.dial, connect)
            await trio.sleep(1 / rate)
    return found


async def from_address(port: int, local: str) -> trio.SocketStream:
    """Dial from an address."""
    return await trio.open_tcp_stream("127.0.0.1", port, local_address=local)


async def serve_promptly(port: int) -> float:
    """Seconds from the dialling to the first answer, of one client."""
    dials = await dial_often(partial(from_address, port, HONEST), 1, 1000)
    return dials.times[0] if dials.times else float("inf")


# ---- the driver ----

START_PROCESS: Final = partial(
    subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
)


@contextmanager
def process(*words: object, nice: bool = False) -> Iterator[Any]:
    """A process of this file."""
    command = ["nice", "-n", "5"] * nice  # they are many machines, and must not take the client's time
    started = START_PROCESS([*command, sys.executable, __file__, *map(str, words)])
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def server(lookup: str = "quick", files: int = 0) -> Iterator[tuple[int, int]]:
    """A server; gives the ports of the sealed and the plain one."""
    with process("server", lookup, files) as started:
        sealed, plain = started.stdout.readline().split()
        yield int(sealed.rpartition(":")[2]), int(plain.rpartition(":")[2])


class Table:
    """Prints rows, and keeps whether one was not as it must be."""

    def __init__(self) -> None:
        self.failed = False

    def add_dials(self, name: str, dials: Dials, least: float) -> None:
        """A row of dials; at least that part of them must have got in."""
        got_in = len(dials.times)
        self.add(name, dials.describe(), good=got_in >= least * (got_in + len(dials.errors)))

    def add(self, name: str, text: str, *, good: bool = True) -> None:
        self.failed = self.failed or not good
        print(f"{name:52} {text}{'' if good else '   <-- NOT GOOD'}", flush=True)


PLACES: Final = {
    "client near": (HONEST, 0.0),
    "client 200 ms away": (HONEST, AWAY),
    "client at their address": ("127.0.0.1", 0.0),
}
"""Where the honest client is: its address, and seconds of its round trip."""


async def dial_from(place: str, port: int, dials: int, rate: float) -> Dials:
    """Dial so often from one of `PLACES`."""
    address, away = PLACES[place]
    if not away:
        return await dial_often(partial(from_address, port, address), dials, rate)
    name, run = await be_away(port, away)

    async def give_name() -> str:
        return name

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        found = await dial_often(give_name, dials, rate)
        nursery.cancel_scope.cancel()
    return found


def find_rate(strangers: subprocess.Popen[str]) -> float:
    """End strangers that print how many they were in how many seconds, again and again; how many a second."""
    strangers.kill()
    assert strangers.stdout
    came, seconds = strangers.stdout.read().split("\n")[-2].split()
    return float(came) / float(seconds)


async def measure_silent(table: Table, given: argparse.Namespace) -> None:
    """Silent strangers."""
    for place in PLACES:
        with server() as (port, _), process("flood", port, nice=True) as strangers:
            await trio.sleep(1)
            dials = await dial_from(place, port, given.dials, 10)
            name = f"silent, {find_rate(strangers):.0f}/s, {place}"
        table.add_dials(name, dials, 0 if "their" in place else 0.99)


async def measure_wrong_keys(table: Table, given: argparse.Namespace) -> None:
    """Wrong keys."""
    for lookup, rate in (("slow", WRONG_KEYS), ("quick", 2000)):
        for place in PLACES:
            with server(lookup) as (port, _), process("wrong-keys", port, rate, nice=True) as strangers:
                await trio.sleep(3)
                dials = await dial_from(place, port, given.dials // 2, 5)
                name = f"wrong keys, {lookup}, {find_rate(strangers):.0f}/s, {place}"
            table.add_dials(name, dials, 0 if "their" in place else 0.99)


async def find_level(port: int) -> dict[str, int]:
    """What the server holds when nothing goes on."""
    for _ in range(int(LEVEL_WITHIN / 0.25)):
        stream = await from_address(port, HONEST)
        async with open_connection(stream, **LOGIN) as connection:  # type: ignore[arg-type]
            level: dict[str, int] = json.loads((await connection.request(["level"]))[0])
        if (level["handshakes"], level["connections"]) == (0, 1):
            break
        await trio.sleep(0.25)
    return level


async def measure_nonsense(table: Table, given: argparse.Namespace) -> None:
    """Nonsense of all kinds."""
    share = given.sockets // len(NONSENSE)
    with server() as ports:
        before: dict[str, int] = {}
        for sockets in (share // 10, share):  # the first time for caches to fill
            if sockets == share:
                before = await find_level(ports[0])
            for kind, (is_sealed, _) in NONSENSE.items():
                began = time.monotonic()
                with process("nonsense", ports[not is_sealed], kind, sockets, nice=True) as strangers:
                    await trio.to_thread.run_sync(strangers.wait)
                    took = time.monotonic() - began
                    served = await serve_promptly(ports[0])
                if sockets == share:
                    text = f"{sockets} in {took:5.1f} s; then a client is served in {served * 1e3:4.1f} ms"
                    table.add(kind, text, good=served < PROMPT)
        after = await find_level(ports[0])
    table.add("held before", json.dumps(before))
    good = all(value <= before[what] + SLACK * (what == "memory") for what, value in after.items())
    table.add("held afterwards", json.dumps(after), good=good)


async def measure_descriptors(table: Table, given: argparse.Namespace) -> None:
    """Descriptors exhausted, and back."""
    with server(files=FILES) as (port, _):
        before = await find_level(port)
        with process("hold", port, 2 * FILES, nice=True):
            await trio.sleep(3)
            dials = await dial_often(partial(from_address, port, HONEST), given.dials // 5, 2)
        table.add_dials(f"{2 * FILES} silent, {FILES} descriptors", dials, 0.99)
        began = time.monotonic()
        for _ in range(int(LEVEL_WITHIN / PROMPT)):
            if (served := await serve_promptly(port)) < PROMPT:
                break
            await trio.sleep(PROMPT)
        back = time.monotonic() - began
        after = await find_level(port)
    good = (
        served < PROMPT
        and after["descriptors"] <= before["descriptors"]
        and after["tasks"] <= before["tasks"]
    )
    table.add("they leave", f"prompt again {back:.1f} s later; {json.dumps(after)}", good=good)


MEASURES: Final = {
    "silent": measure_silent,
    "wrong-keys": measure_wrong_keys,
    "nonsense": measure_nonsense,
    "descriptors": measure_descriptors,
}


async def drive(given: argparse.Namespace) -> bool:
    """Measure all; returns whether something was not as it must be."""
    table = Table()
    for name in given.only.split(","):
        await MEASURES[name](table, given)
    return table.failed


def main() -> int:
    """Be what the command line says."""
    role, *words = sys.argv[1:] or [""]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = int(words[1]) if role == "server" else 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (files or most, files or most))
    if role == "server":
        trio.run(serve, words[0])
    elif role == "flood":
        trio.run(flood, int(words[0]))
    elif role == "wrong-keys":
        trio.run(try_wrong_keys, int(words[0]), float(words[1]))
    elif role == "hold":
        trio.run(hold, int(words[0]), int(words[1]))
    elif role == "nonsense":
        trio.run(talk_nonsense, int(words[0]), words[1], int(words[2]))
    else:
        parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
        parser.add_argument("--only", default=",".join(MEASURES))
        parser.add_argument("--sockets", type=int, default=10_000)
        parser.add_argument("--dials", type=int, default=100)
        return int(trio.run(drive, parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
