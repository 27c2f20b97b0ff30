"""Handlers that fail: the asker's error, and the log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from bokbok_trio import Connection, MessageTooLarge, RemoteError, Settings
from bokbok_trio.testing import open_connection_pair
from tests.support.connections import check_nothing_in_flight
from tests.support.helpers import busy_handler, settle

# ---- handlers that fail ----


async def crash_while_cancelled() -> None:
    async def crash() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("crashed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(crash)
        nursery.start_soon(trio.sleep_forever)
        await settle()
        nursery.cancel_scope.cancel()


async def raise_group() -> None:
    async with trio.open_nursery():
        raise ValueError("in a nursery")


def returning(value: object) -> Callable[[], Awaitable[Any]]:
    async def return_it() -> object:
        await trio.lowlevel.checkpoint()
        return value

    return return_it


def raising(error: BaseException) -> Callable[[], Awaitable[Any]]:
    async def raise_it() -> None:
        await trio.lowlevel.checkpoint()
        raise error

    return raise_it


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


NO_ANSWER = "TypeError: the handler returned an invalid answer: "


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (raising(ValueError("bad")), "ValueError: bad"),
        (raising(trio.TooSlowError()), "TooSlowError: "),
        (raising(MessageTooLarge(2, 1)), "MessageTooLarge: the message takes 2 bytes"),
        (raising(Unprintable()), "Unprintable"),
        (raise_group, "ValueError: in a nursery"),
        (crash_while_cancelled, "KeyError: 'crashed'"),
        (
            returning(7),
            NO_ANSWER + "pass a list of fields such as ['ping'], not int",
        ),
        (
            returning("text"),
            NO_ANSWER + "pass a list of fields such as ['ping'], not str",
        ),
        (
            returning([7]),
            NO_ANSWER + "a field is bytes or str, not int",
        ),
        (
            returning(["x"] * 256),
            "ValueError: the handler returned an invalid answer: a packet has at most 255 fields",
        ),
        (lambda: 7, "TypeError: object int can't be used in 'await' expression"),
    ],
)
async def test_a_failing_handler_is_one_error_and_harms_nobody(
    behaviour: Callable[[], Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> Any:
        return (await behaviour()) if request == [b"fail"] else request

    async with open_connection_pair(server_handler=handler) as (client, server):
        with pytest.raises(RemoteError) as caught:
            await client.request(["fail"])
        assert caught.value.message.startswith(message)
        assert caught.value.code == "handler-error"
        assert await client.request(["alive"]) == [b"alive"]
        check_nothing_in_flight(client, server)
    failures = [record for record in caplog.records if "the handler of request 0 failed" in record.message]
    assert len(failures) == 1
    assert failures[0].exc_info is not None


async def test_a_request_error_is_the_answer_and_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async with open_connection_pair(server_handler=busy_handler) as (client, _):
        with pytest.raises(RemoteError, match="unknown request") as caught:
            await client.request(["what?"])
    assert (caught.value.message, caught.value.code) == ("unknown request", "unknown-request")
    assert {record.levelname for record in caplog.records} <= {"DEBUG", "INFO"}


async def test_without_a_handler_the_answer_is_no_handler() -> None:
    async with open_connection_pair() as pair:
        for connection in pair:
            with pytest.raises(RemoteError) as caught:
                await connection.request([])
            assert caught.value.code == "no-handler"


async def test_describe_error_chooses_what_the_peer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def describe(error: BaseException) -> str:
        if isinstance(error, KeyError):
            raise RuntimeError("cannot describe")
        return f"ref {type(error).__name__[0]}"

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("secret") if request else ValueError("secret")

    discreet = Settings(describe_error=describe)
    async with open_connection_pair(server_handler=handler, server_settings=discreet) as (client, _):
        with pytest.raises(RemoteError, match=r"^ref V"):
            await client.request([])
        with pytest.raises(RemoteError, match=r"^KeyError \[handler-error\]"):
            await client.request(["x"])
    assert "describe_error failed" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("nested", [False, True])
async def test_what_ends_the_program_comes_out_bare(
    error: type[BaseException], side: str, nested: bool
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if nested:
            async with trio.open_nursery():
                raise error
        await trio.lowlevel.checkpoint()
        raise error

    handlers = (handler, None) if side == "client" else (None, handler)
    with pytest.raises(error) as caught:
        async with open_connection_pair(*handlers) as (client, server):
            # The body may be told of the loss, or be cancelled for it; the error wins.
            await (server if side == "client" else client).request([])
            await trio.sleep_forever()
    assert type(caught.value) is error


# ---- closing from this side ----


async def old_cancelled() -> trio.Cancelled:
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as exc:
            return exc
    raise AssertionError


async def test_a_cancelled_kept_from_earlier_is_a_failure_like_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stale = await old_cancelled()

    async def handler(*args: object) -> None:
        await trio.lowlevel.checkpoint()
        raise stale

    async with open_connection_pair(
        handler, handler, client_close_handler=handler, server_close_handler=handler
    ) as pair:
        for connection in pair:
            with pytest.raises(RemoteError, match="Cancelled"):
                await connection.request([])
    assert caplog.text.count("the close handler failed") == 2
