"""The addresses of open sockets, and the processes at their other ends."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from bokbok_trio import AddressError, PeerCredentials, TCPAddress, UnixAddress
from bokbok_trio._addresses import MAX_PATH_SIZE
from bokbok_trio._sockets import (
    UCRED,
    listener_address,
    require_credentials,
    stream_address,
    stream_credentials,
    tcp_address,
)
from tests.support.sockets import dial_to, listen_on


@pytest.fixture
def path(tmp_path: Path) -> str:
    return f"{tmp_path}/app.sock"


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
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    address = listener_address(listener)
    assert address is not None
    async with listener:
        stream = await dial_to(address)
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


@pytest.mark.parametrize(
    ("name", "host"),
    [
        (("::1", 80, 0, 0), "::1"),
        (("fe80::1", 80, 0, 1), f"fe80::1%{socket.if_indextoname(1)}"),
        (("fe80::1", 80, 0, 2**30), f"fe80::1%{2**30}"),
    ],
    ids=["none", "by-name", "by-number"],
)
def test_the_zone_of_an_address_is_part_of_it(name: tuple[str, int, int, int], host: str) -> None:
    assert tcp_address(name) == TCPAddress(host, 80)


def test_a_zone_that_no_address_may_name_goes_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.if_indextoname", lambda _: "a@b")
    assert tcp_address(("fe80::1", 80, 0, 7)) == TCPAddress("fe80::1%7", 80)


# ---- who is at the other end ----


def this_process() -> PeerCredentials:
    return PeerCredentials(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid())


async def test_both_ends_of_a_unix_socket_know_the_other(path: str) -> None:
    [listener] = await listen_on(UnixAddress(path))
    async with listener:
        stream = await dial_to(UnixAddress(path))
        async with await listener.accept() as accepted:
            assert stream_credentials(stream) == stream_credentials(accepted) == this_process()
            await stream.aclose()
            assert stream_credentials(accepted) == this_process(), "though it is gone"
    assert stream_credentials(stream) is None


async def test_credentials_are_of_unix_sockets_only() -> None:
    assert stream_credentials(trio.testing.memory_stream_pair()[0]) is None
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    async with listener:
        address = listener_address(listener)
        assert address is not None
        async with await dial_to(address) as stream, await listener.accept() as accepted:
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
    with pytest.raises(
        AddressError, match=r"^peer_user needs a UNIX socket, and 127\.0\.0\.1:80 is a TCP address$"
    ):
        require_credentials(TCPAddress("127.0.0.1", 80))


def test_the_longest_path_works(tmp_path: Path) -> None:
    path = f"{tmp_path}/".ljust(MAX_PATH_SIZE, "x")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
    assert UnixAddress(path).path == path
    with pytest.raises(AddressError):
        UnixAddress(path + "x")
