"""Clocks that jump: the wall clock, which nothing depends on, and Trio's clock, on a suspended machine."""

from __future__ import annotations

import ast
import os
import random
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import trio
import trio.testing

import bokbok_trio
from bokbok_trio import (
    Channel,
    Connection,
    HandshakeError,
    Key,
    Keyring,
    Settings,
    UnixAddress,
    open_connection,
    open_reconnecting,
    open_server,
)
from bokbok_trio.testing import MemoryListener, open_connection_pair
from tests.support.helpers import echo, packet, raw_peer, settle

KEY = Key(bytes(range(32)))
HOUR = 3600.0
PATIENCE = 40  # the defaults: 20 s of silence, 20 s more

# ---- the wall clock ----

WALL_CLOCK = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


def read_clocks(path: Path) -> Iterator[str]:
    """The functions of a module that tell the time of day."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if f"{owner}.{node.attr}" in WALL_CLOCK:
                yield f"{owner}.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (f"time.{name.name}" for name in node.names if f"time.{name.name}" in WALL_CLOCK)


def test_only_the_keyring_reads_the_wall_clock() -> None:
    """It compares it with the times of its file, which are of that clock."""
    folder = Path(bokbok_trio.__file__).parent
    found = {path.name: set(read_clocks(path)) for path in folder.rglob("*.py")}
    assert len(found) > 50
    assert {name: clocks for name, clocks in found.items() if clocks} == {"_keyring.py": {"time.time"}}


@pytest.fixture
def wild_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that jumps by days, back and forth, at each reading."""
    dice = random.Random(11)
    monkeypatch.setattr(time, "time", lambda: dice.uniform(0, 2e9))
    monkeypatch.setattr(time, "time_ns", lambda: dice.randrange(2 * 10**18))


async def test_nothing_goes_by_the_wall_clock(wild_clock: None, tmp_path: Path) -> None:
    """On a real socket: the lock on its directory, handshakes, look-ups, pings, deadlines, channels."""
    deadlines: list[float] = []

    async def handle(connection: Connection, request: list[bytes]) -> list[bytes]:
        deadlines.append(trio.current_effective_deadline() - trio.current_time())
        return request

    async def send_back(connection: Connection, request: list[bytes], channel: Channel) -> None:
        async for item in channel:
            await channel.send(item)

    settings = Settings(ping_after=0.05, ping_timeout=5, handshake_timeout=5, connect_timeout=5)
    path = UnixAddress(str(tmp_path / "socket"))
    async with open_server(
        path, handle, channel_handler=send_back, user_key={"u": KEY}, settings=settings
    ) as server:
        async with open_reconnecting(path, user="u", key=KEY, settings=settings) as client:
            with trio.fail_after(60):
                assert await client.request(["x"]) == [b"x"]
            assert 55 < deadlines[0] <= 60
            async with client.open_channel([]) as channel:
                await channel.send(["item"])
                assert await channel.receive() == [b"item"]
            await trio.sleep(0.3)  # six pings
            connection = client.connection
            assert connection is not None
            assert 0 <= await connection.ping() < 1
            [other] = server.connections
            await other.aclose()
            assert await client.request(["y"]) == [b"y"]
            assert client.connection is not connection


def test_a_keyring_misses_no_change_whatever_the_wall_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set back or put forward between a change and a look, and right or years off at the next."""
    truth = time.time
    keyring = Keyring.create(tmp_path / "keys")
    offsets = (0.0, -HOUR, HOUR, 0.0, 1e8, -1e8, 0.5, -0.5)
    for number, offset in zip(count(1), offsets * 3, strict=False):
        keyring.add(f"user{number}", KEY)
        monkeypatch.setattr(time, "time", lambda offset=offset: truth() + offset)
        assert len(keyring) == number
        assert len(Keyring.load(tmp_path / "keys")) == number


# ---- Trio's clock ----


@pytest.mark.parametrize("before", [0, 5, 19.99, 20, 20.01, 39.99])
@pytest.mark.parametrize("leap", [20.5, HOUR])
async def test_a_leap_of_the_clock_loses_no_peer_that_is_there(
    before: float, leap: float, autojump_clock: trio.testing.MockClock
) -> None:
    """At any moment of the watchdog's rounds, with requests in flight, and again and again."""

    async def handle(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.sleep(10)
        return request

    async with open_connection_pair(server_handler=handle) as (client, server):
        answers: list[list[bytes]] = []

        async def ask() -> None:
            answers.append(await client.request(["x"]))

        await trio.sleep(before)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settle()
            for _ in range(5):
                autojump_clock.jump(leap)
                await trio.sleep(1)
                assert not client.closed
                assert not server.closed
        assert answers == [[b"x"]]
        await trio.sleep(3 * PATIENCE)
        assert await client.request(["x"]) == [b"x"]


async def test_what_has_arrived_at_a_socket_is_read_before_the_peer_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """This process is stopped from just after a ping until just after the answer to it was due."""
    async with raw_peer(over_sockets=True) as (connection, peer):
        for _ in range(20):
            assert await peer.receive() == [b"ping"]
            await settle()
            os.write(peer.stream.socket.fileno(), packet(b"pong"))  # type: ignore[attr-defined]
            autojump_clock.jump(20.5)
            await settle()
            assert not connection.closed


async def test_a_leap_during_the_handshake_is_a_timeout_and_the_next_try_gets_in(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = MemoryListener()
    looked_up = 0

    async def look_up(user: str) -> Key:
        nonlocal looked_up
        looked_up += 1
        if looked_up <= 2:
            autojump_clock.jump(HOUR)
        await trio.lowlevel.checkpoint()
        return KEY

    async def dial(address: object, **_: object) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        return listener.connect()

    monkeypatch.setattr("bokbok_trio._client.dial", dial)
    async with open_server([listener], echo, user_key=look_up) as server:
        with pytest.raises(HandshakeError, match="not done within 10 seconds"):
            async with open_connection(listener.connect(), user="u", key=KEY):
                raise AssertionError
        async with open_reconnecting("127.0.0.1:1", user="u", key=KEY) as client:
            assert await client.request(["x"]) == [b"x"]
            assert trio.current_time() < 2 * HOUR + 10
        await trio.sleep(1)
        assert server.statistics().handshakes == 0


async def test_a_leap_ends_what_had_a_time_limit_and_nothing_else(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Where the clock went on while the machine slept, the time of a limit has passed: Trio says so too."""

    async def handle(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.sleep(30)
        return request

    async with open_connection_pair(server_handler=handle) as (client, server):
        ends: list[str] = []

        async def ask(limit: float) -> None:
            with trio.move_on_after(limit) as scope:
                assert await client.request(["x"]) == [b"x"]
            ends.append("late" if scope.cancelled_caught else "answered")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 60)
            nursery.start_soon(ask, 2 * HOUR)
            await trio.sleep(1)
            autojump_clock.jump(HOUR)
        assert sorted(ends) == ["answered", "late"]
        await settle()
        assert client.statistics().used_slots == 0
        assert server.statistics().handlers_running == 0
        assert await client.request(["y"]) == [b"y"]
