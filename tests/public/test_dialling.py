"""Dialling an address: what is refused, how long it may take, and what the errors say."""

from __future__ import annotations

import errno
import gc
import math
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    AddressError,
    Settings,
    TCPAddress,
    UnixAddress,
    open_connection,
    open_reconnecting,
    open_server,
)
from bokbok_trio._addresses import Address, require_loopback
from bokbok_trio._look_ups import LOOK_UPS, LOOK_UPS_OF_NAME
from bokbok_trio._sockets import STAGGER, listener_address, stream_address
from tests.support.helpers import echo
from tests.support.sockets import dial_to, full_backlog, listen_on, resolve_to, tcp_address

NOT_LOOPBACK = [
    *("0.0.0.0", "10.0.0.1", "192.0.2.1", "128.0.0.1", "255.255.255.255"),
    *("::", "2001:db8::1", "fe80::1", "::ffff:192.0.2.1", "::ffff:0.0.0.0", "::127.0.0.1"),
]


@pytest.mark.parametrize("host", NOT_LOOPBACK)
async def test_plain_tcp_elsewhere_is_refused(host: str) -> None:
    for use in (listen_on, dial_to):
        with pytest.raises(AddressError, match=f"^plain TCP with {host}, which is not loopback"):
            await use(TCPAddress(host, 80))


@pytest.mark.parametrize("hosts", [["192.0.2.1"], ["127.0.0.1", "192.0.2.1"], ["::1", "2001:db8::1"]])
async def test_a_host_name_that_may_be_elsewhere_is_refused(hosts: Sequence[str]) -> None:
    resolve_to(*hosts)
    for use in (listen_on, dial_to):
        with pytest.raises(AddressError, match=f"^plain TCP with {hosts[-1]}, which is not loopback"):
            await use(TCPAddress("name.example", 80))


async def test_a_host_name_that_is_here_is_looked_up_once() -> None:
    resolver = resolve_to("127.0.0.1")
    [listener] = await listen_on(TCPAddress("name.example", 0))
    async with listener:
        async with await dial_to(TCPAddress("name.example", tcp_address(listener).port)) as stream:
            assert stream_address(stream) == listener_address(listener)
    assert resolver.asked == [b"name.example"] * 2, "once by each"


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("address", [TCPAddress("", 80), TCPAddress("localhost", 0)])
async def test_an_address_that_only_says_where_to_listen(address: Address, insecure: bool) -> None:
    with pytest.raises(AddressError, match=f"^{address} is for listening and cannot be dialled"):
        await dial_to(address, insecure=insecure)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_literal_address_is_not_looked_up(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [listener] = await listen_on(TCPAddress(host, 0))
    async with listener:
        monkeypatch.setattr("trio.socket.getaddrinfo", None)
        monkeypatch.setattr("socket.getaddrinfo", None)
        async with await dial_to(tcp_address(listener)) as stream:
            assert stream_address(stream) == listener_address(listener)
            assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_link_local_address_and_its_zone() -> None:
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*alone, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"this system gives a process no network of its own: {exc}")
    script = [sys.executable, "-m", "tests.support.link_local"]
    found = subprocess.run([*alone, *script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


async def test_a_zone_that_does_not_exist() -> None:
    with pytest.raises(OSError, match=r"^\[.*cannot look up the host of \[fe80::1%nowhere\]:80: "):
        await dial_to(TCPAddress("fe80::1%nowhere", 80), insecure=True)


# ---- cancellation ----


@pytest.fixture
def slow_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection is still under way when the system is asked for the first time."""
    begun: set[socket.socket] = set()

    def connect_ex(sock: socket.socket, where: tuple[str, int]) -> int:
        if sock in begun:
            return errno.EALREADY
        begun.add(sock)
        return real(sock, where) or errno.EINPROGRESS

    real = socket.socket.connect_ex
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)


async def test_dialling_in_a_cancelled_scope_connects_to_nobody() -> None:
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    async with listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            await dial_to(tcp_address(listener))
        assert scope.cancelled_caught
        with trio.move_on_after(0.05) as waiting:
            await listener.accept()
        assert waiting.cancelled_caught


@pytest.mark.usefixtures("slow_connect")
async def test_dialling_that_is_cancelled_leaves_no_socket() -> None:
    with full_backlog(socket.AF_INET, ("127.0.0.1", 0)) as dead:
        with trio.move_on_after(0.05) as scope:
            await dial_to(TCPAddress(*dead.getsockname()))
        gc.collect()  # or an open socket would warn, which fails this
    assert scope.cancelled_caught


async def test_opening_that_is_cancelled_leaves_no_socket() -> None:
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    async with listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with open_connection(str(listener_address(listener))):
                raise AssertionError
        gc.collect()
    assert scope.cancelled_caught


@pytest.mark.usefixtures("slow_connect")
async def test_dialling_waits_where_it_must() -> None:
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    async with listener:
        address = tcp_address(listener)
        with trio.testing.assert_checkpoints():
            stream = await dial_to(address)
        async with stream, await listener.accept() as accepted:
            await stream.send_all(b"x")
            assert await accepted.receive_some() == b"x"
    with pytest.raises(ConnectionRefusedError):
        await dial_to(address)


# ---- what the errors say ----


async def test_dialling_where_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and does not listen
        address = TCPAddress(*sock.getsockname())
        with trio.testing.assert_checkpoints(), pytest.raises(ConnectionRefusedError) as caught:
            await dial_to(address)
        assert caught.value.errno == errno.ECONNREFUSED
        assert caught.value.strerror == f"cannot connect to {address}: Connection refused"
        resolve_to("::1", "127.0.0.1")
        with pytest.raises(ConnectionRefusedError) as caught:
            await dial_to(TCPAddress("name.example", address.port))
        assert caught.value.strerror == (
            f"cannot connect to name.example:{address.port}: [::1]:{address.port}: Connection refused; "
            f"127.0.0.1:{address.port}: Connection refused"
        )
    path = f"{tmp_path}/nothing"
    with trio.testing.assert_checkpoints(), pytest.raises(FileNotFoundError) as missing:
        await dial_to(UnixAddress(path))
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, path)


async def test_a_network_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: errno.ENETUNREACH)
    with pytest.raises(OSError, match=r"cannot connect to 192\.0\.2\.1:80: Network is unreachable") as caught:
        await dial_to(TCPAddress("192.0.2.1", 80), insecure=True)
    assert caught.value.errno == errno.ENETUNREACH


async def test_a_system_without_unix_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bokbok_trio._sockets.AF_UNIX", None)
    with pytest.raises(AddressError, match=r"^cannot dial /x: this system has no UNIX sockets"):
        await dial_to(UnixAddress("/x"))


@pytest.mark.parametrize("host", ["a..b", "x" * 64, ".b", "\u00fc..\u00fc"])
@pytest.mark.parametrize("insecure", [False, True])
async def test_a_host_name_that_dns_cannot_have(host: str, insecure: bool) -> None:
    for use in (listen_on, dial_to):
        with pytest.raises((AddressError, OSError), match=re.escape(host)):
            await use(TCPAddress(host, 80), insecure=insecure)


async def test_a_name_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    for use in (listen_on, dial_to):
        with pytest.raises(socket.gaierror) as caught:
            await use(TCPAddress("name.example", 80))
        assert caught.value.errno == socket.EAI_NONAME
        assert caught.value.strerror == (
            "cannot look up the host of name.example:80: Name or service not known"
        )


async def test_a_name_without_an_address() -> None:
    resolve_to()
    for use in (listen_on, dial_to):
        with pytest.raises(OSError, match=r"the host of name\.example:80 has no address"):
            await use(TCPAddress("name.example", 80))


async def test_a_name_that_is_not_ascii_is_looked_up_as_trio_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By IDNA 2008, where a sharp s is not two others."""
    asked: list[Any] = []

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "not here")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    with pytest.raises(socket.gaierror):
        await dial_to(TCPAddress("stra\u00dfe.example", 80))
    assert asked[-1] == b"xn--strae-oqa.example"


# ---- several addresses of a name ----


@pytest.mark.parametrize("insecure", [False, True])
async def test_of_a_names_addresses_one_that_answers_is_taken_at_once(insecure: bool) -> None:
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    async with listener:
        resolve_to("::1", "127.0.0.1", "127.0.0.1")
        began = trio.current_time()
        address = TCPAddress("name.example", tcp_address(listener).port)
        async with await dial_to(address, insecure=insecure) as stream:
            assert stream_address(stream) == listener_address(listener)
        assert trio.current_time() - began < STAGGER, "it does not wait when the one before was refused"


async def test_an_address_that_does_not_answer_delays_the_next_a_little() -> None:
    """And after one of one family comes one of the other."""
    with full_backlog(socket.AF_INET, ("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
        [listener] = await listen_on(TCPAddress("::1", port))
        async with listener:
            resolve_to("127.0.0.1", *(f"127.0.0.{n}" for n in range(2, 9)), "::1")
            began = trio.current_time()
            async with await dial_to(TCPAddress("name.example", port)) as stream:
                assert stream_address(stream) == TCPAddress("::1", port)
            assert STAGGER * 0.9 < trio.current_time() - began < 2 * STAGGER


@pytest.mark.usefixtures("slow_connect")
async def test_of_two_that_answer_together_one_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = await listen_on(TCPAddress("localhost", 0))
    resolve_to("::1", "127.0.0.1")
    both = trio.Event()
    waiting = 0

    async def wait_writable(sock: socket.socket) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 2:
            both.set()
        with trio.CancelScope(shield=True):
            await both.wait()

    monkeypatch.setattr("trio.lowlevel.wait_writable", wait_writable)
    async with await dial_to(TCPAddress("name.example", tcp_address(listeners[0]).port)):
        gc.collect()  # an open socket would warn
    assert waiting == 2
    for listener in listeners:
        await listener.aclose()


@pytest.mark.usefixtures("slow_connect")
async def test_cancelled_when_one_has_answered_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = await listen_on(TCPAddress("localhost", 0))
    resolve_to("::1", "127.0.0.1")
    scope = trio.CancelScope()

    async def wait_writable(sock: socket.socket) -> None:
        scope.cancel()

    monkeypatch.setattr("trio.lowlevel.wait_writable", wait_writable)
    with scope:
        await dial_to(TCPAddress("name.example", tcp_address(listeners[0]).port))
    assert scope.cancelled_caught
    gc.collect()
    for listener in listeners:
        await listener.aclose()


# ---- the time limit ----


async def test_an_address_that_does_not_answer_is_given_up() -> None:
    with full_backlog(socket.AF_INET, ("127.0.0.1", 0)) as dead:
        address = TCPAddress(*dead.getsockname())
        with pytest.raises(TimeoutError) as caught:
            async with open_connection(address, settings=Settings(connect_timeout=0.1)):
                raise AssertionError
        assert caught.value.errno == errno.ETIMEDOUT
        assert caught.value.strerror == (
            f"connecting to {address} took more than 0.1 seconds (connect_timeout)"
        )
        with trio.move_on_after(0.2) as scope:
            await dial_to(address, timeout=math.inf)
        assert scope.cancelled_caught


async def test_a_unix_socket_with_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    path = f"{tmp_path}/app.sock"
    with full_backlog(socket.AF_UNIX, path) as live:
        with pytest.raises(TimeoutError, match=f"connecting to {path} took more than 0.1 seconds"):
            await dial_to(UnixAddress(path), timeout=0.1)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def accept() -> None:
                await trio.sleep(0.05)
                live.accept()[0].close()

            async with await dial_to(UnixAddress(path)):
                pass


async def test_a_name_that_is_never_found_is_given_up_and_keeps_nobody_else_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The threads that look it up are not those of the rest of the program."""
    hanging = threading.Event()
    asked = 0

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        hanging.wait()
        return []

    async def give_up(name: str) -> None:
        with pytest.raises(TimeoutError, match=rf"looking up the host of {name}:80 took more than 0\.2"):
            await dial_to(TCPAddress(name, 80), timeout=0.2)

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    trio.to_thread.current_default_thread_limiter().total_tokens = 2
    try:
        async with trio.open_nursery() as nursery:
            for number in range(LOOK_UPS + 10):
                nursery.start_soon(give_up, f"name{number}.example")
        assert asked == LOOK_UPS, "those that nobody waits for any more count"
        with trio.fail_after(5):
            assert await trio.to_thread.run_sync(os.getpid) == os.getpid()
            with pytest.raises(TimeoutError, match="looking up the host"):
                await listen_on(TCPAddress("name.example", 0), timeout=0.1)
    finally:
        hanging.set()


async def test_one_name_that_is_never_found_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    asked: list[bytes] = []

    def getaddrinfo(host: bytes, port: int, **kwargs: Any) -> Any:
        asked.append(host)
        if host == b"bad.example":
            hanging.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await dial_to(TCPAddress("bad.example", 80), timeout=0.3)

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    here = listener_address(listener)
    assert isinstance(here, TCPAddress)
    async with listener:
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(LOOK_UPS + 10):
                    nursery.start_soon(give_up)
                await trio.testing.wait_all_tasks_blocked()
                with trio.fail_after(5):
                    await (await dial_to(TCPAddress("good.example", here.port))).aclose()
        finally:
            hanging.set()
        assert asked.count(b"bad.example") == LOOK_UPS_OF_NAME
        with trio.fail_after(5):
            while asked.count(b"bad.example") == LOOK_UPS_OF_NAME:  # until the threads have ended
                with trio.move_on_after(0.05), suppress(OSError):
                    await (await dial_to(TCPAddress("bad.example", here.port))).aclose()


async def test_nobody_connects_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens, the system may give this end the port that it dials."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]

    class Bound(socket.socket):
        def connect_ex(self, where: Any) -> int:
            with suppress(OSError):
                self.bind(where)
            return super().connect_ex(where)

    monkeypatch.setattr("bokbok_trio._sockets.socket.socket", Bound)
    with pytest.raises(ConnectionRefusedError):
        await dial_to(TCPAddress("127.0.0.1", port))
    monkeypatch.undo()
    for listener in await listen_on(TCPAddress("127.0.0.1", port)):
        await listener.aclose()  # the port is free at once


async def test_a_look_up_that_was_loopback_is_what_is_used() -> None:
    """A name that moves between the check and the use leads nowhere else."""

    class MovingResolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *args: int) -> Any:
            await trio.lowlevel.checkpoint()
            found, self.host = self.host, "0.0.0.0"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port))]

        async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
            raise NotImplementedError

        host = "127.0.0.1"

    trio.socket.set_custom_hostname_resolver(MovingResolver())
    [listener] = await listen_on(TCPAddress("name.example", 0))
    async with listener:
        require_loopback(listener_address(listener))


async def test_a_look_up_that_hangs_keeps_no_other_address_from_being_dialled() -> None:
    class HangingResolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *args: int) -> Any:
            await trio.sleep_forever()

        async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(HangingResolver())
    settings = Settings(connect_timeout=0.1)
    async with open_server("127.0.0.1:0", echo) as server:
        with trio.fail_after(5):
            addresses = ["name.example:80", server.addresses[0]]
            async with open_reconnecting(addresses, settings=settings) as client:
                assert await client.request(["x"]) == [b"x"]
