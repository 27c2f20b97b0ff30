"""A connection is watched: a silent peer is pinged, and lost in time, over a real link too."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from bokbok_trio import ConnectionLost, Settings
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.helpers import busy_handler, packet, raw_peer, settle
from tests.support.watchdogs import PATIENCE, system_tasks


async def test_a_silent_peer_that_lives_is_pinged_and_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with open_connection_pair(server_handler=busy_handler) as (client, server):
        await trio.sleep(1000)
        assert not client.closed
        assert not server.closed
        assert await client.request(["ping", "1"]) == [b"pong", b"1"]


async def test_the_pings_are_as_few_as_they_must_be(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        pings: list[float] = []

        async def answer() -> None:
            while True:
                assert await peer.receive() == [b"ping"]
                pings.append(trio.current_time())
                await peer.send(b"pong")

        nursery.start_soon(answer)
        await trio.sleep(105)
        assert pings == [20, 40, 60, 80, 100]
        assert not connection.closed
        nursery.cancel_scope.cancel()


async def test_a_peer_that_falls_silent_is_lost_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (connection, peer):
        await trio.sleep(15)
        await peer.send(b"ping")
        assert await peer.receive() == [b"pong"]
        with pytest.raises(ConnectionLost, match="has not been heard of for 40 seconds") as caught:
            await connection.request([])
        assert trio.current_time() == 15 + PATIENCE
        assert caught.value.may_have_run


async def test_any_packet_is_a_sign_of_life(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (connection, peer):
        for _ in range(10):
            await trio.sleep(39)
            await peer.stream.send_all(packet(b"cancel", b"1"))
        await settle()
        assert not connection.closed
        await connection.wait_closed()
        assert trio.current_time() == 390 + PATIENCE


@pytest.mark.parametrize("setting", ["ping_after", "ping_timeout"])
async def test_pings_can_be_turned_off(setting: str, autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer(settings=Settings(**{setting: math.inf})) as (connection, _):  # type: ignore[arg-type]
        await trio.sleep(10**6)
        assert not connection.closed
        assert not system_tasks()


async def test_a_send_that_gets_stuck_is_a_loss_though_the_peer_goes_on_sending(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It sends, and never reads."""
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    patient = Settings(ping_after=math.inf)  # it hears nothing of us meanwhile
    async with open_connection_pair(server_handler=busy_handler, wrap=wrap, server_settings=patient) as (
        client,
        server,
    ):
        await trio.sleep(7)
        streams[0].sending.stall()

        async def go_on() -> None:
            while True:
                await trio.sleep(1)
                with trio.move_on_after(0.5):
                    await server.request(["ping", "x"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            with pytest.raises(ConnectionLost, match="has not read for 40 seconds"):
                await client.request(["ping", "x"])
            nursery.cancel_scope.cancel()
        assert trio.current_time() == 7 + PATIENCE


class SlowStream(trio.abc.Stream):
    """A link that takes a second for every so many bytes, each way."""

    def __init__(self, transport: trio.abc.Stream, rate: float) -> None:
        self.transport = transport
        self.rate = rate

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / self.rate)
        await self.transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.transport.receive_some(max_bytes)
        await trio.sleep(len(data) / self.rate)
        return data

    async def aclose(self) -> None:
        await self.transport.aclose()


async def test_a_long_upload_is_no_silence(autojump_clock: trio.testing.MockClock) -> None:
    """4 MB at 4 kB/s: each batch takes 16 s, and a ping waits behind it."""
    async with open_connection_pair(
        server_handler=busy_handler, wrap=lambda stream: SlowStream(stream, 4000)
    ) as (client, _):
        await client.request(["ping", b"x" * 4 * 10**6])
        assert trio.current_time() > 1000


async def test_a_blocked_loop_is_not_the_peers_fault(autojump_clock: trio.testing.MockClock) -> None:
    """What the peer sent while the loop was blocked has not been read yet."""
    async with raw_peer() as (connection, peer):
        await trio.sleep(20)
        assert await peer.receive() == [b"ping"]
        autojump_clock.jump(1000)
        await trio.sleep(15)
        assert not connection.closed
        await peer.send(b"pong")
        await settle()
        await trio.sleep(PATIENCE - 1)
        assert not connection.closed
        await trio.sleep(PATIENCE)
        assert connection.closed


async def test_a_late_watchdog_still_loses_a_peer_that_is_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with raw_peer() as (connection, _):
        await trio.sleep(25)
        autojump_clock.jump(1000)
        await connection.wait_closed()
        assert trio.current_time() == 1025 + 20


async def test_a_machine_suspended_during_a_send_gets_its_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(server_handler=busy_handler, wrap=wrap) as (client, _):
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.request, ["ping", "x"])
            await trio.sleep(30)
            autojump_clock.jump(1000)
            await trio.sleep(10)
            assert not client.closed
            streams[0].sending.resume()


# Of this process only, so that two runs at once do not meet.
MARK = os.getpid()
NETWORK = f"bokbok-{MARK}"
CABLE = f"bok{MARK}"
SUBNET = f"10.77.{MARK % 256}"

PEER = """
import trio, sys
from bokbok_trio import Settings, open_server
async def handler(connection, request):
    return request
async def note(connection):
    print("closed", trio.current_time() - opened, flush=True)
async def main():
    global opened
    settings = Settings(ping_after=0.5, ping_timeout=0.5)
    async with open_server(sys.argv[1], handler, insecure=True, close_handler=note, settings=settings):
        print("listening", flush=True)
        opened = trio.current_time()
        await trio.sleep_forever()
trio.run(main)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def dead_end() -> Iterator[None]:
    """A network namespace at the other end of a virtual cable."""
    try:
        ip("netns", "add", NETWORK)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("link", "add", CABLE, "type", "veth", "peer", "name", "far", "netns", NETWORK)
        ip("address", "add", f"{SUBNET}.1/24", "dev", CABLE)
        ip("link", "set", CABLE, "up")
        ip("-n", NETWORK, "address", "add", f"{SUBNET}.2/24", "dev", "far")
        ip("-n", NETWORK, "link", "set", "far", "up")
        yield
    finally:
        ip("netns", "delete", NETWORK)


async def test_a_link_that_goes_dead_is_noticed_by_both_sides_in_time(dead_end: None) -> None:
    from bokbok_trio import open_connection  # noqa: PLC0415

    address = f"{SUBNET}.2:7777"
    command = ["ip", "netns", "exec", NETWORK, sys.executable, "-c", PEER, address]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            settings = Settings(ping_after=0.5, ping_timeout=0.5)
            async with open_connection(address, insecure=True, settings=settings) as connection:
                assert await connection.request(["x"]) == [b"x"]
                await trio.sleep(1.2)
                assert not connection.closed
                ip("-n", NETWORK, "link", "set", "far", "down")
                died = time.monotonic()
                await connection.wait_closed()
                assert time.monotonic() - died < 1.5
                line = await trio.to_thread.run_sync(process.stdout.readline)
                assert line.startswith("closed ")
                assert time.monotonic() - died < 2
        finally:
            process.kill()
