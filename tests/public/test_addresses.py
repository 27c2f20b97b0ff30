"""Parsing and printing addresses, and which of them plain TCP may use."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, strategies as st

from bokbok_trio import Address, AddressError, TCPAddress, UnixAddress
from bokbok_trio._addresses import as_address, check_dialable, is_literal, parse_address, require_loopback

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
            (text, "invalid address")
            for text in ("", ":", "localhost", "host:", "h:x", "h: 1", "h:1 ", "h:1\n")
        ),
        *(
            (text, "invalid address")
            for text in ("h:-1", "h:+1", "h:1_0", "h:000080", "h:\u0661", "[::1]", "tcp:80")
        ),
        ("h:65536", "port 65536 is out of range: use 0 to 65535"),
        ("h:99999", "port 99999 is out of range: use 0 to 65535"),
        ("::1", "ambiguous port"),
        ("::1:80", "ambiguous port"),
        ("a:b:80", "ambiguous port"),
        ("[::1:80", "ambiguous port"),
        ("[127.0.0.1]:80", "only IPv6 addresses go in brackets"),
        ("[localhost]:80", "invalid IP address: 'localhost'"),
        ("[]:80", "invalid IP address: ''"),
        ("[[::1]]:80", "invalid IP address: '[::1]'"),
        ("[:::1]:80", "invalid IP address"),
        ("[::1%]:80", "invalid IP address"),
        ("]:80", "invalid host: ']'"),
        ("a b:80", "invalid host: 'a b'"),
        (" h:80", "invalid host"),
        ("h\n:80", "invalid host"),
        ("h\0:80", "invalid host"),
        ("user@h:80", "invalid host"),
        ("a,b:80", "invalid host"),
        ("tcp:a/b:80", "invalid host"),
        ("unix:", "the path of a UNIX socket has 1 to 107 bytes"),
        ("/" * 108, "the path of a UNIX socket has 1 to 107 bytes"),
        ("/" + "\u00fc" * 54, "the path of a UNIX socket has 1 to 107 bytes"),
        ("/a\0b", "the path of a UNIX socket has 1 to 107 bytes"),
        ("unix:\0abstract", "the path of a UNIX socket has 1 to 107 bytes"),
    ],
    ids=ascii,
)
def test_no_address(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=re.escape(message)):
        parse_address(text)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"/x"


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
        (lambda: as_address(BytesPath()), TypeError),
        (lambda: as_address(b"h:1"), TypeError),
        (lambda: as_address(("h", 1)), TypeError),
        (lambda: as_address(None), TypeError),
    ],
    ids=[
        *("negative-port", "no-ip", "brackets", "newline-in-zone", "surrogate", "bytes-host", "str-port"),
        *("bytes-path", "path-of-bytes", "bytes", "tuple", "none"),
    ],
)
def test_what_cannot_be_an_address(make: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        make()
    assert type(caught.value) is error


def test_a_path_object_is_the_path_of_a_unix_socket() -> None:
    for path in ("/run/app.sock", "app.sock", "localhost:80"):
        assert UnixAddress(Path(path)) == as_address(Path(path)) == UnixAddress(path)
        assert type(UnixAddress(Path(path)).path) is str


def test_an_address_can_be_copied_matched_and_pickled() -> None:
    address = UnixAddress(Path("/run/app.sock"))
    match address:
        case UnixAddress(path):
            assert path == "/run/app.sock"
    assert (
        pickle.loads(pickle.dumps(address)) == copy.copy(address) == dataclasses.replace(address) == address
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        address.path = "/x"  # type: ignore[misc]


host_names = st.from_regex(r"[a-zA-Z0-9_.-]{1,30}", fullmatch=True)
with_zones = st.builds(
    "{}%{}".format, st.ip_addresses(v=6), st.from_regex(r"[a-zA-Z0-9_.-]{1,15}", fullmatch=True)
)
tcp_addresses = st.builds(
    TCPAddress, host_names | st.ip_addresses().map(str) | with_zones | st.just(""), st.integers(0, 65535)
)
unix_addresses = st.builds(UnixAddress, st.text(st.sampled_from("/:.[]@ ab0\u00fc"), min_size=1, max_size=50))


@given(tcp_addresses | unix_addresses)
@example(TCPAddress("unix", 80))
@example(TCPAddress("tcp", 80))
@example(UnixAddress("unix:/x"))
@example(UnixAddress("tcp:/x"))
@example(UnixAddress("tcp:x"))
def test_an_address_as_a_str_and_back(address: Address) -> None:
    assert parse_address(str(address)) == address


def test_a_path_that_a_peer_chose_is_one_line() -> None:
    address = UnixAddress("/run/a\nERROR forged\x1b[31m\u202e")
    assert str(address) == r"/run/a\nERROR forged\x1b[31m\u202e"
    assert address.path == "/run/a\nERROR forged\x1b[31m\u202e"


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


@pytest.mark.parametrize("insecure", [False, True])
def test_an_address_that_only_says_where_to_listen(insecure: bool) -> None:
    for address in (TCPAddress("", 80), TCPAddress("localhost", 0), TCPAddress("", 0)):
        with pytest.raises(AddressError, match=f"^{address} is for listening and cannot be dialled"):
            check_dialable(address, insecure=insecure)


def test_what_can_be_told_of_dialling_without_a_look_up() -> None:
    for address in (UnixAddress("/x"), TCPAddress("127.0.0.1", 80), TCPAddress("any.example", 80)):
        check_dialable(address, insecure=False)
    check_dialable(TCPAddress("192.0.2.1", 80), insecure=True)
    with pytest.raises(AddressError, match="insecure"):
        check_dialable(TCPAddress("192.0.2.1", 80), insecure=False)


def test_literal_addresses_need_no_look_up() -> None:
    assert all(map(is_literal, ["127.0.0.1", "::1"]))
    assert not any(map(is_literal, ["localhost", "127.1", "::1%lo", ""]))
