from __future__ import annotations

import errno
import gc
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import example, given, strategies as st

import bokbok_trio._addresses
from bokbok_trio import Address, AddressError, PeerCredentials, TCPAddress, UnixAddress, open_connection
from bokbok_trio._addresses import (
    MAX_PATH_SIZE,
    UCRED,
    as_address,
    dial,
    listen,
    listener_address,
    parse_address,
    require_credentials,
    require_loopback,
    stream_address,
    stream_credentials,
)

open_listeners = partial(listen, backlog=None, mode=0o600, insecure=False)

# ---- parsing ----


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:12345", TCPAddress("localhost", 12345)),
        ("127.0.0.1:80", TCPAddress("127.0.0.1", 80)),
        ("example.org:0", TCPAddress("example.org", 0)),
        ("example.org:65535", TCPAddress("example.org", 65535)),
        ("b\u00fccher.example:80", TCPAddress("b\u00fccher.example", 80)),
        ("h:00080", TCPAddress("h", 80)),
        (":80", TCPAddress("", 80)),
        ("[::1]:80", TCPAddress("::1", 80)),
        ("[::]:0", TCPAddress("::", 0)),
        ("[::ffff:127.0.0.1]:80", TCPAddress("::ffff:127.0.0.1", 80)),
        ("[fe80::1%eth0]:80", TCPAddress("fe80::1%eth0", 80)),
        ("tcp:localhost:80", TCPAddress("localhost", 80)),
        ("tcp::80", TCPAddress("", 80)),
        ("tcp:[::1]:80", TCPAddress("::1", 80)),
        ("tcp:tcp:80", TCPAddress("tcp", 80)),
        ("tcp:unix:80", TCPAddress("unix", 80)),
        ("/run/app.sock", UnixAddress("/run/app.sock")),
        ("./app.sock", UnixAddress("./app.sock")),
        ("run/a:80", UnixAddress("run/a:80")),
        ("/", UnixAddress("/")),
        ("unix:app.sock", UnixAddress("app.sock")),
        ("unix:/run/app.sock", UnixAddress("/run/app.sock")),
        ("unix:localhost:80", UnixAddress("localhost:80")),
        ("unix:unix:x", UnixAddress("unix:x")),
    ],
)
def test_an_address(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert as_address(text) == address
    assert as_address(address) is address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, "is no address")
            for text in ("", ":", "localhost", "host:", "h:x", "h: 1", "h:1 ", "h:1\n")
        ),
        *(
            (text, "is no address")
            for text in ("h:-1", "h:+1", "h:1_0", "h:000080", "h:\u0661", "[::1]", "tcp:80")
        ),
        ("h:65536", "a port is 0 to 65535, and not 65536"),
        ("h:99999", "a port is 0 to 65535, and not 99999"),
        ("::1", "which of it is the port?"),
        ("::1:80", "which of it is the port?"),
        ("a:b:80", "which of it is the port?"),
        ("[::1:80", "which of it is the port?"),
        ("[127.0.0.1]:80", "brackets are for IPv6"),
        ("[localhost]:80", "no IP address: 'localhost'"),
        ("[]:80", "no IP address: ''"),
        ("[[::1]]:80", "no IP address: '[::1]'"),
        ("[:::1]:80", "no IP address"),
        ("[::1%]:80", "no IP address"),
        ("]:80", "no host: ']'"),
        ("a b:80", "no host: 'a b'"),
        (" h:80", "no host"),
        ("h\n:80", "no host"),
        ("h\0:80", "no host"),
        ("user@h:80", "no host"),
        ("a,b:80", "no host"),
        ("tcp:a/b:80", "no host"),
        ("unix:", "the path of a UNIX socket is 1 to 107 bytes"),
        ("/" * 108, "the path of a UNIX socket is 1 to 107 bytes"),
        ("/" + "\u00fc" * 54, "the path of a UNIX socket is 1 to 107 bytes"),
        ("/a\0b", "the path of a UNIX socket is 1 to 107 bytes"),
        ("unix:\0abstract", "the path of a UNIX socket is 1 to 107 bytes"),
    ],
    ids=ascii,
)
def test_no_address(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=re.escape(message)):
        parse_address(text)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: TCPAddress("h", -1), AddressError),
        (lambda: TCPAddress("a:b", 1), AddressError),
        (lambda: TCPAddress("[::1]", 1), AddressError),
        (lambda: TCPAddress("fe80::1%a\nb", 1), AddressError),
        (lambda: UnixAddress("/\ud800"), AddressError),
        (lambda: TCPAddress(b"h", 1), TypeError),  # type: ignore[arg-type]
        (lambda: TCPAddress("h", "1"), TypeError),  # type: ignore[arg-type]
        (lambda: UnixAddress(b"/x"), TypeError),  # type: ignore[arg-type]
        (lambda: UnixAddress(Path("/x")), TypeError),  # type: ignore[arg-type]
        (lambda: as_address(b"h:1"), TypeError),
        (lambda: as_address(("h", 1)), TypeError),
        (lambda: as_address(None), TypeError),
    ],
    ids=[
        *("negative-port", "no-ip", "brackets", "newline-in-zone", "surrogate", "bytes-host", "str-port"),
        *("bytes-path", "path-object", "bytes", "tuple", "none"),
    ],
)
def test_what_cannot_be_an_address(make: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error


host_names = st.from_regex(r"[a-zA-Z0-9_.-]{1,30}", fullmatch=True)
tcp_addresses = st.builds(
    TCPAddress, host_names | st.ip_addresses().map(str) | st.just(""), st.integers(0, 65535)
)
unix_addresses = st.builds(
    UnixAddress, st.text(st.sampled_from("/:.[]@ ab0\u00fc\n"), min_size=1, max_size=50)
)


@given(tcp_addresses | unix_addresses)
@example(TCPAddress("unix", 80))
@example(TCPAddress("tcp", 80))
@example(UnixAddress("unix:/x"))
@example(UnixAddress("tcp:/x"))
@example(UnixAddress("tcp:x"))
def test_an_address_as_a_str_and_back(address: Address) -> None:
    assert parse_address(str(address)) == address


@given(st.text(max_size=20) | st.text(st.sampled_from("tcpunix:[]/.%0189af"), max_size=20))
def test_any_str_is_an_address_or_none(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError:
        return
    assert isinstance(address, TCPAddress | UnixAddress)


# ---- plain TCP stays at home ----


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1"])
def test_loopback(host: str) -> None:
    require_loopback(TCPAddress(host, 80))


NOT_LOOPBACK = [
    *("0.0.0.0", "10.0.0.1", "192.0.2.1", "128.0.0.1", "255.255.255.255"),
    *("::", "2001:db8::1", "fe80::1", "::ffff:192.0.2.1", "::ffff:0.0.0.0", "::127.0.0.1"),
]


@pytest.mark.parametrize("host", [*NOT_LOOPBACK, "fe80::1%1"])
def test_not_loopback(host: str) -> None:
    with pytest.raises(
        AddressError, match=f"^plain TCP with {host}, which is not loopback, needs insecure=True"
    ):
        require_loopback(TCPAddress(host, 80))


def test_only_tcp_must_stay_at_home() -> None:
    require_loopback(UnixAddress("/run/app.sock"))
    require_loopback(None)


@pytest.mark.parametrize("host", NOT_LOOPBACK)
async def test_plain_tcp_elsewhere_is_refused(host: str) -> None:
    for use in (open_listeners, partial(dial, insecure=False)):
        with pytest.raises(AddressError, match=f"^plain TCP with {host}, which is not loopback"):
            await use(TCPAddress(host, 80))


async def test_plain_tcp_on_all_interfaces_is_refused() -> None:
    with pytest.raises(AddressError, match=r"^plain TCP with all interfaces, which is not loopback"):
        await open_listeners(parse_address(":0"))


@pytest.mark.parametrize("host", ["", "0.0.0.0"])
async def test_insecure_tcp_listens_everywhere(host: str) -> None:
    listeners = await open_listeners(TCPAddress(host, 0), insecure=True)
    assert listeners
    for listener in listeners:
        address = listener_address(listener)
        assert isinstance(address, TCPAddress)
        assert address.host in {"0.0.0.0", "::"}
        await listener.aclose()


class FakeResolver(trio.abc.HostnameResolver):
    """Every name has these addresses."""

    def __init__(self, *hosts: str) -> None:
        self._hosts = hosts
        self.asked: list[bytes | None] = []

    async def getaddrinfo(self, host: bytes | None, port: Any, *_args: int) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append(host)
        found = [socket.getaddrinfo(numeric, port, type=socket.SOCK_STREAM)[0] for numeric in self._hosts]
        return [(*info[:3], "", info[4]) for info in found]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("hosts", [["192.0.2.1"], ["127.0.0.1", "192.0.2.1"], ["::1", "2001:db8::1"]])
async def test_a_host_name_that_may_be_elsewhere_is_refused(hosts: Sequence[str]) -> None:
    trio.socket.set_custom_hostname_resolver(FakeResolver(*hosts))
    for use in (open_listeners, partial(dial, insecure=False)):
        with pytest.raises(AddressError, match=f"^plain TCP with {hosts[-1]}, which is not loopback"):
            await use(TCPAddress("name.example", 80))


async def test_a_host_name_that_is_here() -> None:
    resolver = FakeResolver("127.0.0.1")
    trio.socket.set_custom_hostname_resolver(resolver)
    [listener] = await open_listeners(TCPAddress("name.example", 0))
    async with listener:
        address = listener_address(listener)
        assert isinstance(address, TCPAddress)
        async with await dial(TCPAddress("name.example", address.port), insecure=False) as stream:
            assert stream_address(stream) == address
    assert set(resolver.asked) == {b"name.example"}


async def test_a_host_name_that_moves_elsewhere_before_it_is_listened_on() -> None:
    class MovingResolver(FakeResolver):
        async def getaddrinfo(self, host: bytes | None, port: Any, *args: int) -> Any:
            found = await super().getaddrinfo(host, port, *args)
            self._hosts = ("0.0.0.0",)
            return found

    trio.socket.set_custom_hostname_resolver(MovingResolver("127.0.0.1"))
    listeners: list[trio.abc.Listener[trio.SocketStream]] = []
    with suppress(AddressError):
        listeners.extend(await open_listeners(TCPAddress("name.example", 0)))
    addresses = [listener_address(listener) for listener in listeners]
    for listener in listeners:
        await listener.aclose()
    for address in addresses:
        require_loopback(address)


# ---- TCP ----


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
@pytest.mark.parametrize("insecure", [False, True])
async def test_listening_and_dialling_over_tcp(host: str, insecure: bool) -> None:
    listeners = await open_listeners(TCPAddress(host, 0), backlog=5)
    assert listeners
    for listener in listeners:
        address = listener_address(listener)
        assert isinstance(address, TCPAddress)
        assert address.host in {"127.0.0.1", "::1"}
        assert address.port
        async with (
            listener,
            await dial(address, insecure=insecure) as stream,
            await listener.accept() as accepted,
        ):
            assert stream_address(stream) == address
            assert stream_address(accepted) == TCPAddress(*stream.socket.getsockname()[:2])
            await stream.send_all(b"x")
            assert await accepted.receive_some() == b"x"


async def test_a_tcp_port_in_use() -> None:
    [listener] = await open_listeners(TCPAddress("127.0.0.1", 0))
    async with listener:
        address = listener_address(listener)
        assert address is not None
        with pytest.raises(AddressError, match=f"^{address} is in use$") as caught:
            await open_listeners(address)
    assert isinstance(caught.value.__cause__, OSError)


async def test_listening_where_this_machine_is_not() -> None:
    with pytest.raises(OSError, match="Cannot assign requested address") as caught:
        await open_listeners(TCPAddress("192.0.2.1", 0), insecure=True)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize(("host", "port"), [("", 80), ("localhost", 0), ("", 0)])
@pytest.mark.parametrize("insecure", [False, True])
async def test_an_address_that_only_says_where_to_listen(host: str, port: int, insecure: bool) -> None:
    address = TCPAddress(host, port)
    with pytest.raises(AddressError, match=f"^{address} says where to listen, not whom to dial$"):
        await dial(address, insecure=insecure)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_numeric_host_is_not_looked_up(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [listener] = await open_listeners(TCPAddress(host, 0))
    async with listener:
        address = listener_address(listener)
        assert address is not None
        monkeypatch.setattr("trio.socket.getaddrinfo", None)
        monkeypatch.setattr("trio.open_tcp_stream", None)
        async with await dial(address, insecure=False) as stream:
            assert stream_address(stream) == address
            assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_zone_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(*arguments: object) -> None:
        raise ZeroDivisionError(*arguments)

    monkeypatch.setattr("trio.open_tcp_stream", look_up)
    with pytest.raises(ZeroDivisionError, match="'fe80::1%lo', 80"):
        await dial(TCPAddress("fe80::1%lo", 80), insecure=True)


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


@pytest.mark.usefixtures("slow_connect")
async def test_a_dialling_that_is_cancelled_leaves_no_socket() -> None:
    [listener] = await open_listeners(TCPAddress("127.0.0.1", 0))
    async with listener:
        address = listener_address(listener)
        assert address is not None
        with trio.CancelScope() as scope:
            scope.cancel()
            await dial(address, insecure=False)
        gc.collect()  # or an open socket would warn, which fails this
    assert scope.cancelled_caught


async def test_opening_that_is_cancelled_leaves_no_socket() -> None:
    """Dialling over loopback does not wait, and so cannot be cancelled by itself."""
    [listener] = await open_listeners(TCPAddress("127.0.0.1", 0))
    async with listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with open_connection(str(listener_address(listener))):
                raise AssertionError
        gc.collect()
    assert scope.cancelled_caught


@pytest.mark.usefixtures("slow_connect")
async def test_dialling_waits_where_it_must() -> None:
    [listener] = await open_listeners(TCPAddress("127.0.0.1", 0))
    async with listener:
        address = listener_address(listener)
        assert address is not None
        with trio.testing.assert_checkpoints():
            stream = await dial(address, insecure=False)
        async with stream, await listener.accept() as accepted:
            await stream.send_all(b"x")
            assert await accepted.receive_some() == b"x"
    with pytest.raises(OSError, match="all attempts to connect"):
        await dial(address, insecure=False)


async def test_dialling_where_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(OSError, match="all attempts to connect"):
            await dial(TCPAddress(*sock.getsockname()), insecure=False)
    with pytest.raises(FileNotFoundError):
        await dial(UnixAddress(f"{tmp_path}/nothing"), insecure=False)


@pytest.mark.parametrize("host", ["a..b", "x" * 64, ".b"])
@pytest.mark.parametrize("insecure", [False, True])
async def test_a_host_name_that_dns_cannot_have(host: str, insecure: bool) -> None:
    for use in (open_listeners, dial):
        with pytest.raises((AddressError, OSError)):
            await use(TCPAddress(host, 80), insecure=insecure)


# ---- UNIX sockets ----


@pytest.fixture
def path(tmp_path: Path) -> str:
    return f"{tmp_path}/app.sock"


def make_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


def knock(path: str) -> int:
    """Try to connect; the error's number, 0 for none."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path)


async def test_listening_and_dialling_on_a_unix_socket(path: str) -> None:
    address = UnixAddress(path)
    [listener] = await open_listeners(address, backlog=1)
    assert listener_address(listener) == address
    async with listener, await dial(address, insecure=False) as stream, await listener.accept() as accepted:
        assert stream_address(stream) == address
        assert stream_address(accepted) == address
        await stream.send_all(b"x")
        assert await accepted.receive_some() == b"x"
    assert not os.path.lexists(path)


async def test_a_path_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [listener] = await open_listeners(UnixAddress("app.sock"))
    async with listener:
        assert stat.S_ISSOCK(os.stat(tmp_path / "app.sock").st_mode)


async def test_a_stale_file_is_replaced(path: str) -> None:
    make_stale(path)
    [listener] = await open_listeners(UnixAddress(path))
    async with listener, await dial(UnixAddress(path), insecure=False), await listener.accept():
        pass


async def test_a_live_socket_is_left_alone(path: str) -> None:
    [listener] = await open_listeners(UnixAddress(path))
    async with listener:
        with pytest.raises(AddressError, match=r"app\.sock is in use"):
            await open_listeners(UnixAddress(path))
        await (await listener.accept()).aclose()  # it was asked whether it lives
        async with await dial(UnixAddress(path), insecure=False), await listener.accept():
            pass


async def test_a_live_socket_with_a_full_backlog_is_left_alone(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(path)
        live.listen(0)
        waiting = []
        while True:
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[-1].setblocking(False)
            if waiting[-1].connect_ex(path) == errno.EAGAIN:
                break
        with pytest.raises(AddressError, match=r"is in use \(EAGAIN\)"):
            await open_listeners(UnixAddress(path))
        for sock in waiting:
            sock.close()
    assert os.path.lexists(path)


async def test_a_socket_of_another_kind_is_left_alone(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        with pytest.raises(AddressError, match=r"is in use \(EPROTOTYPE\)"):
            await open_listeners(UnixAddress(path))
    assert os.path.lexists(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling-link"])
async def test_what_is_no_socket_is_left_alone(path: str, kind: str) -> None:
    match kind:
        case "file":
            Path(path).write_text("text")
        case "directory":
            Path(path).mkdir()
        case _:
            Path(path).symlink_to(f"{path}.stale")
    if kind == "link":
        make_stale(f"{path}.stale")
    before = os.lstat(path)
    with pytest.raises(AddressError, match=r"app\.sock exists and is not a socket$"):
        await open_listeners(UnixAddress(path))
    assert os.lstat(path) == before


async def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await open_listeners(UnixAddress(f"{tmp_path}/missing/app.sock"))


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
async def test_the_mode_is_what_was_asked_for_before_anyone_can_connect(
    path: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []

    def chmod(path: str, mode: int) -> None:
        results.append(knock(path))
        real_chmod(path, mode)

    real_chmod = os.chmod
    monkeypatch.setattr(os, "chmod", chmod)
    [listener] = await open_listeners(UnixAddress(path), mode=mode)
    async with listener:
        assert stat.S_IMODE(os.lstat(path).st_mode) == mode
    assert results == [errno.ECONNREFUSED]


async def test_closing_leaves_a_file_that_is_not_its_own(path: str) -> None:
    [listener] = await open_listeners(UnixAddress(path))
    os.rename(path, f"{path}.moved")  # so that its inode stays taken
    Path(path).write_text("another's")
    await listener.aclose()
    assert Path(path).read_text() == "another's"


async def test_closing_when_the_file_is_gone(path: str) -> None:
    [listener] = await open_listeners(UnixAddress(path))
    os.unlink(path)
    await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_closing_twice_leaves_the_next_listener_alone(path: str) -> None:
    # The file system may give the next file the inode of the first.
    [first] = await open_listeners(UnixAddress(path))
    await first.aclose()
    [second] = await open_listeners(UnixAddress(path))
    async with second:
        await first.aclose()
        assert os.path.lexists(path)


async def test_a_file_that_cannot_be_removed_does_not_keep_the_listener_open(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: str) -> None:
        raise PermissionError(errno.EACCES, "not allowed", path)

    [listener] = await open_listeners(UnixAddress(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with suppress(PermissionError):
            await listener.aclose()
    is_closed = knock(path) == errno.ECONNREFUSED
    await listener.aclose()
    assert is_closed


async def test_of_many_that_start_together_on_a_stale_file_one_wins(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_stale(path: str) -> None:
        real_remove_stale(path)
        time.sleep(0.005)  # whoever is not kept out by the lock comes in now

    real_remove_stale = bokbok_trio._addresses._remove_stale
    monkeypatch.setattr(bokbok_trio._addresses, "_remove_stale", remove_stale)
    make_stale(path)
    winners: list[trio.abc.Listener[trio.SocketStream]] = []
    refused: list[str] = []

    async def start() -> None:
        try:
            winners.extend(await open_listeners(UnixAddress(path)))
        except AddressError as exc:
            refused.append(str(exc))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(start)
    assert len(winners) == 1
    assert refused == [f"{path} is in use (it answers)"] * 9
    async with winners[0], await dial(UnixAddress(path), insecure=False):
        pass


async def test_waiting_for_a_lock_that_another_holds_can_be_cancelled(path: str) -> None:
    import fcntl  # noqa: PLC0415  (not on Windows)

    ended = trio.Event()
    scope = trio.CancelScope()

    async def start() -> None:
        with scope:
            [listener] = await open_listeners(UnixAddress(path))
            await listener.aclose()
        ended.set()

    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await trio.testing.wait_all_tasks_blocked()
            assert not os.path.lexists(path)
            assert not ended.is_set()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            was_cancelled = ended.is_set()
            fcntl.flock(directory, fcntl.LOCK_UN)
    finally:
        os.close(directory)
    assert was_cancelled


async def test_a_server_that_knows_nothing_of_the_lock_comes_first(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_stale(path: str) -> None:
        real_remove_stale(path)
        other.bind(path)

    real_remove_stale = bokbok_trio._addresses._remove_stale
    monkeypatch.setattr(bokbok_trio._addresses, "_remove_stale", remove_stale)
    with socket.socket(socket.AF_UNIX) as other:
        with pytest.raises(AddressError, match=f"^{path} is in use$") as caught:
            await open_listeners(UnixAddress(path))
        assert isinstance(caught.value.__cause__, OSError)
        other.listen()
        assert knock(path) == 0, "its file is still there"


async def test_a_failure_leaves_no_file(path: str) -> None:
    with pytest.raises(OverflowError):
        await open_listeners(UnixAddress(path), backlog=2**40)
    assert not os.path.lexists(path)


async def test_listening_and_dialling_are_checkpoints(path: str) -> None:
    for address in (TCPAddress("127.0.0.1", 0), UnixAddress(path)):
        with trio.testing.assert_checkpoints():
            [listener] = await open_listeners(address)
        found = listener_address(listener)
        assert found is not None
        if isinstance(found, UnixAddress):
            with trio.testing.assert_checkpoints():
                stream = await dial(found, insecure=False)
            await stream.aclose()
        with trio.testing.assert_checkpoints():
            await listener.aclose()


# ---- the addresses of what is open ----


async def test_streams_and_listeners_that_are_no_sockets_have_no_address() -> None:
    assert stream_address(trio.testing.memory_stream_pair()[0]) is None

    class Listener(trio.abc.Listener[trio.abc.Stream]):
        async def accept(self) -> trio.abc.Stream:
            raise NotImplementedError

        async def aclose(self) -> None:
            raise NotImplementedError

    assert listener_address(Listener()) is None


async def test_a_socket_pair_has_no_address() -> None:
    ours, theirs = trio.socket.socketpair()
    async with trio.SocketStream(ours) as stream, trio.SocketStream(theirs):
        assert stream_address(stream) is None


async def test_a_peer_that_is_gone_has_no_address() -> None:
    [listener] = await open_listeners(TCPAddress("127.0.0.1", 0))
    address = listener_address(listener)
    assert address is not None
    async with listener:
        stream = await dial(address, insecure=False)
        async with await listener.accept() as accepted:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close by a reset
            await stream.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await accepted.receive_some()
            assert stream_address(accepted) is None
    assert stream_address(stream) is None


async def test_unix_listeners_of_the_users_own(path: str) -> None:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(path)
    sock.listen()
    async with trio.SocketListener(sock) as listener:
        assert listener_address(listener) == UnixAddress(path)


async def test_abstract_unix_sockets_have_no_address() -> None:
    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(f"\0bokbok_trio {os.getpid()}")
    sock.listen()
    client = trio.socket.socket(socket.AF_UNIX)
    async with trio.SocketListener(sock) as listener:
        await client.connect(sock.getsockname())
        async with trio.SocketStream(client) as stream:
            assert stream_address(stream) is None
        assert listener_address(listener) is None


# ---- who is at the other end ----


def this_process() -> PeerCredentials:
    return PeerCredentials(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid())


async def test_both_ends_of_a_unix_socket_know_the_other(path: str) -> None:
    [listener] = await open_listeners(UnixAddress(path))
    async with listener:
        stream = await dial(UnixAddress(path), insecure=False)
        async with await listener.accept() as accepted:
            assert stream_credentials(stream) == stream_credentials(accepted) == this_process()
            await stream.aclose()
            assert stream_credentials(accepted) == this_process(), "though it is gone"
    assert stream_credentials(stream) is None


async def test_credentials_are_of_unix_sockets_only() -> None:
    assert stream_credentials(trio.testing.memory_stream_pair()[0]) is None
    [listener] = await open_listeners(TCPAddress("127.0.0.1", 0))
    async with listener:
        address = listener_address(listener)
        assert address is not None
        async with await dial(address, insecure=False) as stream, await listener.accept() as accepted:
            assert stream_credentials(stream) is stream_credentials(accepted) is None
            # What the system gives where there are none, which is why the family is looked at; and
            # users are not negative.
            found = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            assert UCRED.unpack(found) == (0, 2**32 - 1, 2**32 - 1)


async def test_credentials_are_known_on_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = trio.socket.socketpair()
    async with trio.SocketStream(ours) as stream, trio.SocketStream(theirs):
        assert stream_credentials(stream) == this_process()
        require_credentials(UnixAddress("/run/app.sock"))
        require_credentials(None)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "darwin")
            found = stream_credentials(stream)
            with pytest.raises(AddressError, match=r"^peer_user needs Linux"):
                require_credentials(UnixAddress("/run/app.sock"))
        assert found is None


def test_listening_for_credentials_takes_a_unix_socket() -> None:
    with pytest.raises(AddressError, match=r"^peer_user needs a UNIX socket, and 127\.0\.0\.1:80 is none$"):
        require_credentials(TCPAddress("127.0.0.1", 80))


def test_the_longest_path_works(tmp_path: Path) -> None:
    path = f"{tmp_path}/".ljust(MAX_PATH_SIZE, "x")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    assert UnixAddress(path).path == path
    with pytest.raises(AddressError):
        UnixAddress(path + "x")
