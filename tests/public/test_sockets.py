"""Tests in which the real socket is the point, some between real processes."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import (
    AddressError,
    Connection,
    ConnectionLost,
    Key,
    Keyring,
    PeerCredentials,
    TCPAddress,
    UnixAddress,
    open_connection,
    open_server,
)
from bokbok_trio._protocol.packets import PacketDecoder
from bokbok_trio._protocol.queued_packet import MAX_WHOLE_SIZE
from tests.support.helpers import MAGIC, busy_handler, decode, echo, packet

KEY = Key(bytes(range(32)))
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(params=["127.0.0.1:0", "[::1]:0", "localhost:0", "unix"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "sock") if request.param == "unix" else request.param


async def test_requests_both_ways(where: str, sealed: bool) -> None:
    keys: dict[str, Any] = {"user": "u", "key": KEY} if sealed else {}
    async with open_server(where, busy_handler, user_key={"u": KEY} if sealed else None) as server:
        assert str(server.addresses[0]).split(":", maxsplit=1)[0] in where or where.startswith("localhost")
        for address in (server.addresses[0], str(server.addresses[0])):
            async with open_connection(address, request_handler=busy_handler, **keys) as client:
                assert await client.request(["back", "back", "ping", "x"]) == [b"pong", b"x"]
                assert client.address == server.addresses[0]
                [other] = server.connections
                if isinstance(client.address, TCPAddress):
                    assert isinstance(other.address, TCPAddress)
                    assert other.address.host == client.address.host
                else:
                    assert other.address == client.address == UnixAddress(where)
    if not where.endswith(":0"):
        assert not os.path.exists(where)


async def test_over_streams_and_listeners_of_the_users_own(tmp_path: Path) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with open_server(listeners, echo) as server:
        [address] = server.addresses
        assert isinstance(address, TCPAddress)
        stream = await trio.open_tcp_stream("127.0.0.1", address.port)
        async with open_connection(stream) as client:
            assert client.address == address
            assert await client.request(["x"]) == [b"x"]


async def test_plain_tcp_on_other_interfaces_needs_insecure() -> None:
    listeners = await trio.open_tcp_listeners(0, host="0.0.0.0")
    with pytest.raises(AddressError, match="insecure"):
        async with open_server(listeners, echo):
            raise AssertionError
    assert listeners[0].socket.fileno() == -1, "it is closed"
    async with open_server("0.0.0.0:0", echo, insecure=True) as server:
        with pytest.raises(AddressError, match="insecure"):
            async with open_connection(server.addresses[0]):
                raise AssertionError
        async with open_connection(server.addresses[0], insecure=True) as client:
            assert await client.request(["x"]) == [b"x"]
    async with open_server(":0", echo, user_key={"u": KEY}) as server:
        port = next(a.port for a in server.addresses if isinstance(a, TCPAddress) and a.host == "0.0.0.0")
        async with open_connection(f"127.0.0.1:{port}", user="u", key=KEY) as client:
            assert await client.request(["x"]) == [b"x"]


async def test_a_plain_stream_to_elsewhere_needs_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_server("127.0.0.1:0", echo) as server:
        [address] = server.addresses
        assert isinstance(address, TCPAddress)
        stream = await trio.open_tcp_stream("127.0.0.1", address.port)
        monkeypatch.setattr("bokbok_trio._addresses.is_loopback", lambda host: False)
        with pytest.raises(AddressError, match="insecure"):
            async with open_connection(stream):
                raise AssertionError
        assert stream.socket.fileno() == -1, "it is closed"


async def test_a_name_with_several_addresses_is_tried_in_turn() -> None:
    """Of two addresses of a name only one is served, and it is found, as it must be for localhost."""

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
            await trio.lowlevel.checkpoint()
            assert host == b"twofold.example"
            tcp = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            return [
                (socket.AF_INET6, *tcp, ("::1", port, 0, 0)),
                (socket.AF_INET, *tcp, ("127.0.0.1", port)),
            ]

        async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
            raise AssertionError

    async with open_server("127.0.0.1:0", echo) as server:
        [address] = server.addresses
        assert isinstance(address, TCPAddress)
        trio.socket.set_custom_hostname_resolver(Resolver())
        async with open_connection(f"twofold.example:{address.port}") as client:
            assert await client.request(["x"]) == [b"x"]
            assert client.address == address


async def test_a_thousand_requests_at_once(sealed: bool) -> None:
    keys: dict[str, Any] = {"user": "u", "key": KEY} if sealed else {}
    answers: list[bytes] = []

    async def ask(client: Connection, n: int) -> None:
        answers.extend(await client.request([str(n)]))

    async with (
        open_server("127.0.0.1:0", echo, user_key={"u": KEY} if sealed else None) as server,
        open_connection(server.addresses[0], **keys) as client,
        trio.open_nursery() as nursery,
    ):
        for n in range(1000):
            nursery.start_soon(ask, client, n)
    assert sorted(answers, key=int) == [b"%d" % n for n in range(1000)]


async def test_two_hundred_connections() -> None:
    answers: list[bytes] = []
    all_open = trio.Event()

    async def connect(address: Any, n: int) -> None:
        async with open_connection(address, user="u", key=KEY) as client:
            answers.extend(await client.request([str(n)]))
            if len(answers) == 200:
                all_open.set()
            await all_open.wait()

    # More than wait in the backlog at once are retried by the kernel, a second later.
    async with open_server("127.0.0.1:0", echo, user_key={"u": KEY}, backlog=200) as server:
        async with trio.open_nursery() as nursery:
            for n in range(200):
                nursery.start_soon(connect, server.addresses[0], n)
            await all_open.wait()
            assert len(server.connections) == 200
    assert sorted(answers, key=int) == [b"%d" % n for n in range(200)]


async def test_a_cancelled_request_to_a_peer_that_stopped_reading_leaves_no_half_packet() -> None:
    """The send of a large request is under way, and stuck in the kernel, when it is cancelled."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    big = bytes(2**21)
    async with trio.open_nursery() as nursery:
        accepted: list[trio.SocketStream] = []

        async def accept() -> None:
            accepted.append(await listeners[0].accept())
            stream = accepted[0]
            hello = MAGIC + packet(b"hello", b"client", b"plain", b"")
            while len(hello) > 0:
                hello = hello[len(await stream.receive_some(len(hello))) :]
            await stream.send_all(
                MAGIC
                + packet(b"hello", b"server", b"plain", b"")
                + packet(b"accepted", b"4194304", b"9", b"\0", b"")
            )

        nursery.start_soon(accept)
        async with open_connection(f"127.0.0.1:{port}") as client:
            with trio.move_on_after(0.2) as scope:
                await client.request([b"stuck", big])
            assert scope.cancelled_caught
            assert trio.current_time() - scope.deadline < 0.5
            answers: list[list[bytes]] = []

            async def ask() -> None:
                answers.append(await client.request(["after"]))

            nursery.start_soon(ask)
            decoder = PacketDecoder(MAX_WHOLE_SIZE)
            packets: list[list[bytes]] = []
            while not packets or packets[-1][0] != b"req":
                packets += decode(decoder, await accepted[0].receive_some())
            # After `open` every packet is whole: some of the request, that it is void, and the next.
            assert packets[-2:] == [[b"drop", b"0"], [b"req", b"2", b"", b"", b"", b"\x01\0\0\0\5after"]]
            assert {(kind, number) for kind, number, *_ in packets[1:-2]} == {(b"part", b"0")}
            await accepted[0].send_all(packet(b"ok", b"2", body=[b"well"]))
            while not answers:
                await trio.lowlevel.checkpoint()
            assert answers == [[b"well"]]
        await accepted[0].aclose()
    await listeners[0].aclose()


async def test_a_client_may_have_bound_any_path(tmp_path: Path) -> None:
    """The system allows 108 bytes, of which getpeername() tells, and which no address may have."""
    async with open_server(str(tmp_path / "sock"), echo) as server:
        with trio.socket.socket(socket.AF_UNIX) as sock:
            name = struct.pack("=H", socket.AF_UNIX) + f"{tmp_path}/".encode().ljust(108, b"x")
            assert ctypes.CDLL(None).bind(sock.fileno(), name, len(name)) == 0
            await sock.connect(str(tmp_path / "sock"))
            async with open_connection(trio.SocketStream(sock)) as client:
                assert await client.request(["x"]) == [b"x"]
                [other] = server.connections
                assert other.address == UnixAddress(str(tmp_path / "sock"))


async def test_a_relative_path_is_removed_from_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_server("unix:sock", echo) as server:
        assert server.addresses == (UnixAddress(tmp_path / "sock"),)
        async with open_connection("unix:sock") as client:
            assert await client.request(["x"]) == [b"x"]
        monkeypatch.chdir("/")
    assert not (tmp_path / "sock").exists()


async def test_nothing_is_left_open(where: str) -> None:
    """File descriptors, after connections that ended well and badly."""
    before = len(os.listdir("/proc/self/fd"))
    async with open_server(where, echo, user_key={"u": KEY}) as server:
        for _ in range(3):
            async with open_connection(server.addresses[0], user="u", key=KEY):
                pass
            with trio.CancelScope() as scope:
                scope.cancel()
                async with open_connection(server.addresses[0], user="u", key=KEY):
                    pass
    assert len(os.listdir("/proc/self/fd")) <= before


# ---- two processes ----


@pytest.fixture
def users(tmp_path: Path) -> str:
    path = tmp_path / "users.keys"
    Keyring.create(path).add("alice", KEY)
    return str(path)


def run_example(name: str, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(EXAMPLES / name), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def server_process(users: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """examples/server.py in a process of its own, and its address."""
    with run_example("server.py", "127.0.0.1:0", users) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"serving sealed on (127\.0\.0\.1:\d+)\n", line)
        assert match, line
        try:
            yield process, match[1]
        finally:
            process.kill()


def test_the_example_client_and_server_in_two_processes(
    server_process: tuple[subprocess.Popen[str], str], users: str
) -> None:
    process, address = server_process
    with run_example("client.py", address, users, "alice", "shutdown") as client:
        story, errors = client.communicate(timeout=30)
    assert client.returncode == 0, errors
    assert "the answer to ping is [b'pong', b'12345']" in story
    assert "the answer to nonsense is an error: unknown request [unknown-request]" in story
    assert [line[-3] for line in story.splitlines() if "calls" in line] == ["1", "2", "3", "4"]
    assert story.endswith("the answer to shutdown-server is [b'stopping']\n")
    story, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert story.count("is [b'thank you']") == 4
    assert story.endswith("stopped\n")


async def test_a_killed_process_is_noticed_by_its_peers(
    server_process: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = server_process
    async with open_connection(address, user="alice", key=KEY) as client:
        assert await client.request(["ping", "1"]) == [b"pong", b"1"]
        process.send_signal(signal.SIGKILL)
        await client.wait_closed()
        with pytest.raises(ConnectionLost):
            await client.request(["ping", "2"])


RACER = """
import os, sys, time
import trio
from bokbok_trio import AddressError, open_server

async def who(connection, request):
    return [str(os.getpid()), str(connection.peer_credentials.pid), connection.user]

async def main():
    print("ready")
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        path, start = line.rsplit(maxsplit=1)
        while time.monotonic() < float(start):
            pass
        try:
            async with open_server(path, who, peer_user=lambda peer: f"user {peer.uid}"):
                print("won")
                await trio.to_thread.run_sync(sys.stdin.readline)
        except AddressError as exc:
            print(exc)
        else:
            print("left")

trio.run(main)
"""
"""Serves a path from a given time on, or says why not, and leaves at the next line; again and again."""

RACES = 10
"""Without the lock, mostly the first has two winners already, or none, or an odd error."""


class Racer:
    def __init__(self, process: trio.Process) -> None:
        self.process = process

    async def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(f"{text}\n".encode())

    async def hear(self) -> str:
        assert self.process.stdout is not None
        heard = b""
        while not heard.endswith(b"\n"):
            heard += await self.process.stdout.receive_some()
            assert heard, "it has ended"
        return heard.decode().removesuffix("\n")


@asynccontextmanager
async def open_racers() -> AsyncGenerator[tuple[Racer, Racer]]:
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-u", "-c", RACER]
        run = partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        yield Racer(await nursery.start(run)), Racer(await nursery.start(run))
        nursery.cancel_scope.cancel()  # which kills what is left of them


async def check_who_serves(path: str, racer: Racer) -> None:
    async with open_connection(path) as client:
        assert client.peer_credentials == PeerCredentials(racer.process.pid, os.geteuid(), os.getegid())
        expected = [str(racer.process.pid), str(os.getpid()), f"user {os.geteuid()}"]
        assert await client.request([]) == [text.encode() for text in expected]


async def test_of_two_processes_that_race_for_a_stale_path_one_wins(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with trio.fail_after(60):
        async with open_racers() as racers:
            for racer in racers:
                assert await racer.hear() == "ready"
            for race in range(RACES):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.bind(path)  # and nobody listens on it
                start = time.monotonic() + 0.002  # by a clock they share
                for racer in racers:
                    await racer.tell(f"{path} {start}")
                heard = {await racer.hear(): racer for racer in racers}
                assert set(heard) == {"won", f"{path} is in use (a server answers)"}, f"race {race}"
                winner = heard.pop("won")
                await check_who_serves(path, winner)
                assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
                if race < RACES - 1:
                    await winner.tell("leave")
                    assert await winner.hear() == "left"
                    assert not os.path.lexists(path)
            # Killed, the winner cannot remove its file; the loser may then have it.
            winner.process.kill()
            await winner.process.wait()
            assert os.path.lexists(path)
            [loser] = heard.values()
            await loser.tell(f"{path} 0")
            assert await loser.hear() == "won"
            await check_who_serves(path, loser)


def story_of(name: str) -> str:
    """Run an example, which must end well, and return its output."""
    with run_example(name) as example:
        story, errors = example.communicate(timeout=30)
    assert example.returncode == 0, errors
    assert errors == ""
    return str(story)


def test_the_demo_tells_its_story() -> None:
    story = story_of("demo.py")
    for part in (
        "the answer is [b'hello, server']",
        "client sees the error of the other side: I do not know [b'make me coffee'] [unknown-request]",
        "the answer is [b'good to see you, a demo']",
        "server asked ['are you sure?']",
        "the answer is [b'1', b'2', b'3', b'4', b'5']",
        "the answer is [b'as you wish']\nstopped\nthe server is gone",
    ):
        assert part in story


def test_the_example_of_channels_follows_a_log_and_uploads_a_file() -> None:
    story = story_of("channels.py")
    for part in (
        "the log says: the server starts\nclient: the log says: big.bin is coming\n",
        "client: uploaded 1024000 bytes of big.bin; the digests match\n",
        "server: nobody follows the log any more\n",
    ):
        assert part in story
    error = "I do not know [b'nonsense'] [unknown-request]"
    assert story.endswith(f"the answer to nonsense is an error: {error}\n")
