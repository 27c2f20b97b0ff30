"""Arguments that can never work, or are surely mistakes, are refused at once, with what to do."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import trio

from bokbok_trio import (
    AddressError,
    AuthenticationError,
    Connection,
    Key,
    RemoteError,
    open_connection,
    open_reconnecting,
    open_server,
)
from bokbok_trio.testing import MemoryListener, open_connection_pair

KEY = Key(bytes(32))


async def echo(connection: Connection, request: list[bytes]) -> list[bytes]:
    return request


async def expect_refusal(
    open_it: Callable[..., Any], error: type[Exception], text: str, **arguments: Any
) -> None:
    on = arguments.pop("on", "127.0.0.1:1")
    with pytest.raises(error, match=text), trio.fail_after(5):
        async with open_it(on, **arguments):
            raise AssertionError


# ---- users and keys ----


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ("", "1 to 255 bytes"),
        ("a" * 256, "1 to 255 bytes"),
        ("e\u0301", "not in normal form C"),
        ("a\nb", "control character"),
        ("a\udc80", "surrogates"),
    ],
)
async def test_a_user_whom_nobody_can_be_is_refused(user: str, text: str) -> None:
    text = f"user_key has a name that no user can have: .*{text}"
    await expect_refusal(open_server, ValueError, text, user_key={"alice": KEY, user: KEY})


async def test_more_keys_than_are_tried_are_refused() -> None:
    text = "user_key has 17 keys for user 'alice'; 16 at most"
    await expect_refusal(open_server, ValueError, text, user_key={"alice": [KEY] * 17})
    async with open_server([MemoryListener()], user_key={"alice": [KEY] * 16}):
        pass


@pytest.mark.parametrize("raw", [bytes(32), bytearray(32), memoryview(bytes(32)), b"", "", KEY.to_text()])
async def test_what_is_not_wrapped_in_a_key_is_named_as_what_it_is(raw: Any) -> None:
    text = f"user_key has {type(raw).__name__} for user 'alice', not a Key: make one"
    for keys in (raw, [raw], [KEY, raw]):
        await expect_refusal(open_server, TypeError, text, user_key={"alice": keys})


async def test_bytes_that_a_look_up_finds_are_named_as_bytes(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    listener = MemoryListener()
    user_key: Any = AsyncMock(return_value=bytes(32))
    async with open_server([listener], echo, user_key=user_key):
        with pytest.raises(AuthenticationError):
            async with open_connection(listener.connect(), user="alice", key=KEY):
                raise AssertionError
    assert "TypeError: user_key found bytes, not a Key" in caplog.text


# ---- addresses ----


@pytest.mark.parametrize("address", [b"127.0.0.1:80", bytearray(b"127.0.0.1:80"), memoryview(b"/x")])
async def test_bytes_are_no_address(address: Any) -> None:
    for open_it in (open_server, open_connection, open_reconnecting):
        text = f"pass an address as .*, not {type(address).__name__}$"
        await expect_refusal(open_it, TypeError, text, on=address)


async def test_a_listener_goes_into_a_list() -> None:
    await expect_refusal(
        open_server, TypeError, r"pass a listener in a list: \[listener\]", on=MemoryListener()
    )


@pytest.mark.parametrize("url", ["http://127.0.0.1:80", "tcp://127.0.0.1:80", "HTTPS://a.example/b"])
async def test_a_url_is_no_path(url: str) -> None:
    for open_it in (open_server, open_connection, open_reconnecting):
        await expect_refusal(
            open_it, AddressError, "leave '.*://' out, as in HOST:PORT, or write unix:PATH", on=url
        )


@pytest.mark.parametrize("path", ["none/app.sock", "file/app.sock", "none/../app.sock"])
async def test_without_the_directory_of_a_socket_the_error_names_both(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    directory = re.escape(repr(os.path.dirname(tmp_path / path)))
    path = str(tmp_path / path)
    with pytest.raises(OSError, match=rf"\(the directory {directory}\): ") as caught:
        async with open_server(path, echo):
            raise AssertionError
    assert caught.value.filename == path
    assert isinstance(caught.value, FileNotFoundError | NotADirectoryError)


# ---- numbers and flags ----


@pytest.mark.parametrize("mode", [660, 600, 777, 700, -1, 0o1600, 0o7777])
async def test_a_mode_without_0o_is_refused(mode: int, tmp_path: Path) -> None:
    text = f"unix_mode must be 0 to 0o777, not {mode}, which is {oct(mode)}: octal numbers begin with 0o"
    await expect_refusal(open_server, ValueError, text, on=tmp_path / "sock", unix_mode=mode)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0, 0o444, 0o77, True])
async def test_a_mode_by_which_nobody_connects_is_refused(mode: int, tmp_path: Path) -> None:
    text = f"unix_mode {oct(mode)} does not let the file's owner connect"
    await expect_refusal(open_server, ValueError, text, on=tmp_path / "sock", unix_mode=mode)


@pytest.mark.parametrize("mode", [0o200, 0o600, 0o666, 0o777])
async def test_modes_that_are_some(mode: int, tmp_path: Path) -> None:
    async with open_server(tmp_path / "sock", echo, unix_mode=mode) as server:
        assert stat.S_IMODE(os.stat(tmp_path / "sock").st_mode) == mode
        async with open_connection(server.addresses[0]):
            pass


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"unix_mode": "600"}, TypeError, "unix_mode must be an int such as 0o660, not str"),
        ({"unix_mode": None}, TypeError, "unix_mode must be an int such as 0o660, not NoneType"),
        ({"backlog": "5"}, TypeError, "backlog must be an int or None, not str"),
        ({"backlog": 5.0}, TypeError, "backlog must be an int or None, not float"),
        ({"backlog": -1}, ValueError, "backlog must be at least 0, not -1"),
    ],
)
async def test_numbers_of_the_wrong_kind_are_named(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    await expect_refusal(open_server, error, text, **arguments)


@pytest.mark.parametrize("insecure", ["no", 1, None])
async def test_insecure_is_true_or_false(insecure: Any) -> None:
    for open_it in (open_server, open_connection, open_reconnecting):
        await expect_refusal(open_it, TypeError, "insecure must be True or False, not", insecure=insecure)


@pytest.mark.parametrize("grace", ["5", None, b"5", 1j])
async def test_a_grace_of_the_wrong_kind_is_named_and_stops_nothing(grace: Any) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo) as server:
        with pytest.raises(TypeError, match="grace must be a number of seconds, not"):
            server.stop(grace)
        async with open_connection(listener.connect()) as connection:
            assert await connection.request(["x"]) == [b"x"]


# ---- functions that cannot be called so ----


async def takes_none() -> None:
    raise AssertionError


async def takes_four(one: object, two: object, three: object, four: object) -> None:
    raise AssertionError


async def needs_more(*args: object, more: object) -> None:
    raise AssertionError


class CallTakesNone:
    async def __call__(self) -> None:
        raise AssertionError

    async def method(self) -> None:
        raise AssertionError


FEW: list[Any] = [
    *(takes_none, takes_four, needs_more, partial(takes_none), partial(needs_more, 1)),
    *(CallTakesNone(), CallTakesNone().method, functools.update_wrapper(partial(takes_none), echo)),
]


@pytest.mark.parametrize("name", ["request_handler", "channel_handler", "open_handler", "close_handler"])
@pytest.mark.parametrize("handler", FEW)
async def test_a_handler_that_takes_other_arguments_is_refused(name: str, handler: Any) -> None:
    text = rf"{name} is called with \(connection.*\), but .* takes \(.*\): .*argument"
    await expect_refusal(open_server, TypeError, text, **{name: handler})
    if name != "open_handler":
        await expect_refusal(open_connection, TypeError, text, **{name: handler})
    await expect_refusal(open_reconnecting, TypeError, text, **{name: handler})


@pytest.mark.parametrize("user_key", FEW)
async def test_a_user_key_that_takes_other_arguments_is_refused(user_key: Any) -> None:
    text = r"user_key is called with \(user\), but .* takes "
    await expect_refusal(open_server, TypeError, text, user_key=user_key)


async def test_a_peer_user_that_takes_other_arguments_is_refused(tmp_path: Path) -> None:
    def nobody() -> str:
        raise AssertionError

    text = r"peer_user is called with \(credentials\), but .* takes \(\)"
    await expect_refusal(open_server, TypeError, text, on=tmp_path / "sock", peer_user=nobody)
    assert os.listdir(tmp_path) == []


def inject(handler: Callable[..., Awaitable[list[bytes]]]) -> Any:
    """A decorator that adds an argument, so what it wraps takes another number of them."""

    @functools.wraps(handler)
    async def call(*args: Any) -> list[bytes]:
        return await handler("the database", *args)

    return call


@inject
async def with_database(database: str, connection: Connection, request: list[bytes]) -> list[bytes]:
    assert database == "the database"
    return request


async def with_defaults(
    connection: Connection, request: list[bytes], limit: int = 5, *, x: int = 1
) -> list[bytes]:
    return request


class Static:
    @staticmethod
    async def handle(connection: Connection, request: list[bytes]) -> list[bytes]:
        return request

    @classmethod
    async def handle_too(cls, connection: Connection, request: list[bytes]) -> list[bytes]:
        return request


async def shown_otherwise(*args: Any) -> list[bytes]:
    return list(args[1])


shown_otherwise.__signature__ = inspect.signature(takes_four)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "handler",
    [
        *(with_database, with_defaults, partial(with_defaults, x=3), Static.handle, Static().handle_too),
        *(shown_otherwise, partial(shown_otherwise)),
    ],
)
async def test_a_handler_that_can_be_called_is_taken(handler: Any) -> None:
    async with open_connection_pair(server_handler=handler) as (client, _):
        assert await client.request(["x"]) == [b"x"]


class NoSignature:
    """Nobody can tell what it takes: this stands for what other languages make."""

    __call__ = max


async def test_what_has_no_signature_is_taken() -> None:
    handler: Any = NoSignature()
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(handler)
    async with open_server([MemoryListener()], handler):
        pass


# ---- what a handler returns ----


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("text", "TypeError: the handler returned an invalid answer: pass a list of fields .*, not str"),
        (5, "TypeError: the handler returned an invalid answer: pass a list of fields .*, not int"),
        ([1], "TypeError: the handler returned an invalid answer: a field is bytes or str, not int"),
        (["x"] * 256, "ValueError: the handler returned an invalid answer: a packet has at most 255"),
        (["\ud800"], "ValueError: the handler returned an invalid answer: .*surrogates not allowed"),
    ],
)
async def test_a_wrong_answer_reads_as_the_fault_of_the_handler(
    answer: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> Any:
        return answer

    async def channel_handler(connection: Connection, request: list[bytes], channel: object) -> Any:
        return answer

    async with open_connection_pair(server_handler=handler, server_channel_handler=channel_handler) as (
        client,
        _,
    ):
        with pytest.raises(RemoteError, match=text) as caught:
            await client.request(["x"])
        assert caught.value.code == "handler-error"
        async with client.open_channel(["x"]) as channel:
            with pytest.raises(RemoteError, match=text):
                await channel.answer()
    assert [record.levelno for record in caplog.records if "handler of request" in record.message] == [
        logging.ERROR
    ] * 2
    assert len(re.findall(text, caplog.text)) == 2


async def test_the_value_of_a_context_is_named() -> None:
    context: Any = {"trace": 5}
    async with open_connection_pair(server_handler=echo) as (client, _):
        with pytest.raises(TypeError, match="the value of 'trace' in a context is bytes or str, not int"):
            await client.request(["x"], context=context)


# ---- a relative path ----


async def test_the_address_of_a_relative_path_can_be_dialled_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.chdir(tmp_path)
    # The parent of what a link leads to is not the parent of the link.
    async with open_server(["./rel.sock", "link/../up.sock", "unix:plain", ".//two"], echo) as server:
        assert sorted(os.listdir("elsewhere")) == ["deep", "up.sock"]
        monkeypatch.chdir("/")
        assert str(server.addresses[0]) == str(tmp_path / "rel.sock")
        for address in server.addresses:
            async with open_connection(address) as connection:
                assert connection.address == address
                assert await connection.request(["x"]) == [b"x"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]
    assert os.listdir(tmp_path / "elsewhere") == ["deep"]


async def test_a_relative_path_whose_absolute_one_is_too_long_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.chdir(deep)
    async with open_server("./rel.sock", echo) as server:
        assert str(server.addresses[0]) == "./rel.sock"
        async with open_connection(server.addresses[0]):
            pass
        monkeypatch.chdir("/")
    assert os.listdir(deep) == []


async def test_a_working_directory_that_is_gone_is_an_error_that_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError, match=r"'\./rel\.sock'$"):
        async with open_server("./rel.sock", echo):
            raise AssertionError
    async with open_server(tmp_path / "sock", echo) as server:  # which needs no working directory
        assert str(server.addresses[0]) == str(tmp_path / "sock")
