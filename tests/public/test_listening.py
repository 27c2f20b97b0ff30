"""Listening on TCP: the addresses of a name, with one port for all of them; and the arguments of `serve`."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import AddressError, Key, TCPAddress, UnixAddress, open_connection, open_server
from bokbok_trio._addresses import parse_address
from bokbok_trio._listening import PORT_TRIES
from bokbok_trio._sockets import listener_address, stream_address
from bokbok_trio.testing import MemoryListener
from tests.support.helpers import echo
from tests.support.sockets import dial_to, listen_on, resolve_to, tcp_address

KEY = Key(bytes(range(32)))


async def close(listeners: Any) -> None:
    for listener in listeners:
        await listener.aclose()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
@pytest.mark.parametrize("insecure", [False, True])
async def test_listening_and_dialling_over_tcp(host: str, insecure: bool) -> None:
    listeners = await listen_on(TCPAddress(host, 0), backlog=5)
    assert listeners
    for listener in listeners:
        address = tcp_address(listener)
        assert address.host in {"127.0.0.1", "::1"}
        assert address.port
        async with (
            listener,
            await dial_to(address, insecure=insecure) as stream,
            await listener.accept() as accepted,
        ):
            assert stream_address(stream) == address
            assert stream_address(accepted) == TCPAddress(*stream.socket.getsockname()[:2])
            await stream.send_all(b"x")
            assert await accepted.receive_some() == b"x"


async def test_listening_is_a_checkpoint(tmp_path: Path) -> None:
    for address in (TCPAddress("127.0.0.1", 0), UnixAddress(tmp_path / "sock")):
        with trio.testing.assert_checkpoints():
            [listener] = await listen_on(address)
        with trio.testing.assert_checkpoints():
            await listener.aclose()


async def test_plain_tcp_on_all_interfaces_is_refused() -> None:
    with pytest.raises(AddressError, match=r"^plain TCP with all interfaces, which is not loopback"):
        await listen_on(parse_address(":0"))


async def test_insecure_tcp_listens_everywhere() -> None:
    [listener] = await listen_on(TCPAddress("0.0.0.0", 0), insecure=True)
    assert tcp_address(listener).host == "0.0.0.0"
    await listener.aclose()


@pytest.mark.parametrize("host", ["", "name.example"])
async def test_a_chosen_port_is_one_for_all_addresses(host: str) -> None:
    resolve_to("127.0.0.1", "::1", "127.0.0.1")
    listeners = await listen_on(TCPAddress(host, 0), insecure=True)
    addresses = list(map(tcp_address, listeners))
    assert len({address.port for address in addresses}) == 1
    assert [address.host for address in addresses] == (["127.0.0.1", "::1"] if host else ["0.0.0.0", "::"])
    await close(listeners)


class Binding:
    """Fails to listen on given addresses, a given number of times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: dict[str, list[int]]) -> None:
        self.failures = failures
        real_bind = socket.socket.bind

        def bind(sock: socket.socket, where: tuple[Any, ...]) -> None:
            if errors := failures.get(where[0]):
                error = errors.pop()
                raise OSError(error, os.strerror(error))
            real_bind(sock, where)

        monkeypatch.setattr(socket.socket, "bind", bind)


@pytest.mark.parametrize("failures", [1, PORT_TRIES - 1])
async def test_a_chosen_port_that_is_taken_at_another_address_is_chosen_anew(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    binding = Binding(monkeypatch, {"::1": [errno.EADDRINUSE] * failures})
    resolve_to("127.0.0.1", "::1")
    listeners = await listen_on(TCPAddress("name.example", 0))
    assert len({tcp_address(listener).port for listener in listeners}) == 1
    assert len(listeners) == 2
    assert binding.failures == {"::1": []}
    await close(listeners)


async def test_where_no_port_is_free_everywhere_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Binding(monkeypatch, {"::1": [errno.EADDRINUSE] * PORT_TRIES})
    resolve_to("127.0.0.1", "::1")
    with pytest.raises(AddressError, match=r"^name\.example:0 is in use: cannot listen on \[::1\]:[1-9]"):
        await listen_on(TCPAddress("name.example", 0))


async def test_a_tcp_port_in_use() -> None:
    [listener] = await listen_on(TCPAddress("::1", 0))
    async with listener:
        address = tcp_address(listener)
        with pytest.raises(AddressError) as caught:
            await listen_on(address)
        reason = f"cannot listen on {address}: Address already in use"
        assert str(caught.value) == f"{address} is in use: {reason}"
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EADDRINUSE
        resolve_to("127.0.0.1", "::1")
        with pytest.raises(AddressError) as caught:
            await listen_on(TCPAddress("name.example", address.port))
        assert str(caught.value) == f"name.example:{address.port} is in use: {reason}"
        with socket.socket() as other:  # what was opened for the other address is closed
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections may linger there
            other.bind(("127.0.0.1", address.port))


async def test_of_a_name_the_addresses_that_are_here_are_enough(caplog: pytest.LogCaptureFixture) -> None:
    resolve_to("2001:db8::1", "127.0.0.1")
    async with open_server("name.example:0", echo, user_key={"u": KEY}) as server:
        async with open_connection(server.addresses[0], user="u", key=KEY) as client:
            assert await client.request(["x"]) == [b"x"]
        [address] = server.addresses
        assert isinstance(address, TCPAddress)
        assert address.host == "127.0.0.1"
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage() == (
        "name.example:0: not listening on one of its addresses: cannot listen on [2001:db8::1]:0: "
        "Cannot assign requested address"
    )


async def test_a_system_without_ipv6_listens_on_all_interfaces_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Binding(monkeypatch, {"::": [errno.EAFNOSUPPORT]})
    [listener] = await listen_on(TCPAddress("", 0), insecure=True)
    async with listener:
        assert tcp_address(listener).host == "0.0.0.0"


@pytest.mark.parametrize("host", ["2001:db8::1", "name.example"])
async def test_where_no_address_is_here_listening_fails(host: str) -> None:
    resolve_to("2001:db8::1", "2001:db8::2")
    with pytest.raises(
        OSError, match=r"cannot listen on \[2001:db8::1\]:0: Cannot assign requested"
    ) as caught:
        await listen_on(TCPAddress(host, 0), insecure=True)
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_another_error_of_one_address_is_one_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Binding(monkeypatch, {"::1": [errno.EACCES]})
    resolve_to("127.0.0.1", "::1")
    with pytest.raises(PermissionError, match=r"cannot listen on \[::1\]:[0-9]+: Permission denied"):
        await listen_on(TCPAddress("name.example", 0))


# ---- what `serve` may be given ----


async def test_several_addresses(tmp_path: Path) -> None:
    async with open_server(["127.0.0.1:0", tmp_path / "sock", TCPAddress("::1", 0)], echo) as server:
        assert [type(address) for address in server.addresses] == [TCPAddress, UnixAddress, TCPAddress]
        for address in server.addresses:
            async with open_connection(address) as client:
                assert await client.request(["x"]) == [b"x"]
    assert not (tmp_path / "sock").exists()


async def test_addresses_and_listeners_together() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with open_server(["[::1]:0", *listeners, "[::1]:0"], echo) as server:
        assert [getattr(address, "host", None) for address in server.addresses] == ["::1", "127.0.0.1", "::1"]


async def test_listeners_are_closed_where_an_address_fails() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with pytest.raises(TypeError, match=r"^pass a"):
        async with open_server([*listeners, 80], echo):  # type: ignore[list-item]
            raise AssertionError
    assert listeners[0].socket.fileno() == -1


async def test_a_path_object_is_an_address(tmp_path: Path) -> None:
    async with open_server(tmp_path / "sock", echo), open_connection(tmp_path / "sock") as client:
        assert client.address == UnixAddress(tmp_path / "sock")
        assert await client.request(["x"]) == [b"x"]


async def test_of_several_addresses_all_or_none(tmp_path: Path) -> None:
    async with open_server("127.0.0.1:0", echo) as other:
        with pytest.raises(AddressError, match="is in use"):
            async with open_server([tmp_path / "sock", other.addresses[0]], echo):
                raise AssertionError
    assert not (tmp_path / "sock").exists()


async def test_each_address_is_checked_before_any_is_listened_on(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="peer_user needs a UNIX socket"):
        async with open_server([tmp_path / "sock", "127.0.0.1:0"], echo, peer_user=str):
            raise AssertionError
    with pytest.raises(AddressError, match="invalid address"):
        async with open_server([tmp_path / "sock", "nonsense"], echo):
            raise AssertionError
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize("on", [[], (), None, 80, b"/x", MemoryListener(), ["127.0.0.1:0", 80]])
async def test_what_cannot_be_served_on(on: Any) -> None:
    with pytest.raises(TypeError, match=r"^pass a"):
        async with open_server(on, echo):
            raise AssertionError


async def test_listeners_have_no_address_where_they_are_no_sockets() -> None:
    assert listener_address(MemoryListener()) is None
