"""Calls that fail: declared errors, undeclared ones, and errors that do not fit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import msgspec
import pytest
import trio

from bokbok_trio import Connection, RemoteError, RequestError
from bokbok_trio.interface import consume, expose, raises
from bokbok_trio.testing import open_connection_pair

from ..support.helpers import open_peer
from ..support.job_queue import Jobs, NoSuchJob, Queue, QueueFull, encode, open_jobs


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("full", QueueFull(7, retry_after=0.5)),
        ("group", QueueFull(7, retry_after=0.5)),
        ("specific", NoSuchJob("specific", 3)),
        ("other", NoSuchJob("other")),
    ],
)
async def test_declared_errors_come_as_they_are(
    name: str, error: QueueFull | NoSuchJob, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(type(error)) as caught:
            await jobs.find(name)
        found = caught.value
        assert type(found) is type(error)
        assert vars(found) == vars(error)
        assert str(found) == str(error) or str(found) == str(found.args)
        assert isinstance(found.__cause__, RemoteError)
        assert found.__cause__.code == f"%{type(error).__name__}"
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


async def test_a_declared_error_has_the_text_of_its_arguments() -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(NoSuchJob) as caught:
            await jobs.find("other")
        assert caught.value.args == ("other", 1)


async def test_errors_that_are_not_declared_are_failures(caplog: pytest.LogCaptureFixture) -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError) as caught:
            await jobs.fail("x")
        assert caught.value.code == "handler-error"
        assert caught.value.message == "NoSuchJob: x"
        assert "NoSuchJob" in caplog.text
        with pytest.raises(RemoteError) as caught:
            await jobs.fail("request")
        assert (caught.value.code, caught.value.details) == ("closed-today", b"more")


async def test_a_declared_error_that_comes_with_the_deadline_is_told(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_peer(expose(Jobs, Queue())) as (_, peer):
        body = [b"%call", b"Jobs.find", encode({"name": "late"})]
        await peer.send(b"req", b"1", b"1000000", b"", b"", body=body)
        kind, _, code, _, details = await peer.receive()
        assert (kind, code, msgspec.msgpack.decode(details)) == (
            b"err",
            b"%QueueFull",
            {"limit": 3, "retry_after": None},
        )
        await peer.send(b"req", b"3", b"", b"", b"", body=[b"%call", b"Jobs.total", encode({"a": 1})])
        assert (await peer.receive())[0] == b"ok"


async def test_two_declared_errors_at_once_are_a_failure() -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError) as caught:
            await jobs.find("groups")
        assert caught.value.code == "handler-error"
        assert caught.value.message.startswith("ExceptionGroup: both")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("long", "the fields of NoSuchJob take 16[0-9]{3} bytes; the limit is 16384"),
        ("unencodable", "NoSuchJob has a value that its fields do not allow: can't serialize ints"),
        ("odd", r"NoSuchJob has a value that its fields do not allow: \$.tried: expected int, got str"),
    ],
)
async def test_fields_that_cannot_travel_are_a_failure_that_says_so(
    name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError, match=text) as caught:
            await jobs.find(name)
        assert caught.value.code == "handler-error"
    assert "NoSuchJob" in caplog.text  # the one that was to be told


async def test_an_error_without_its_fields_is_a_remote_error() -> None:
    async with open_jobs() as (jobs, _, _):
        with pytest.raises(RemoteError) as caught:
            await jobs.find("bare")
        assert caught.value.code == "%NoSuchJob"


@pytest.mark.parametrize("code", ["%Exception", "%os.system", "%", "%%NoSuchJob", "NoSuchJob", "%Specific"])
async def test_no_name_of_the_peers_chooses_a_class(code: str) -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code=code, details=encode({"name": "a"}))

    async with open_connection_pair(server_handler=lie) as (client, _):
        with pytest.raises(RemoteError) as caught:
            await consume(client, Jobs).find("a")
        assert caught.value.code == code


@pytest.mark.parametrize("details", [b"", b"\xc1", encode({}), encode({"name": 3}), encode([])])
async def test_wrong_fields_of_an_error_are_a_remote_error(details: bytes) -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code="%NoSuchJob", details=details)

    async with open_connection_pair(server_handler=lie) as (client, _):
        with pytest.raises(RemoteError) as caught:
            await consume(client, Jobs).find("a")
        assert caught.value.details == details


async def test_an_error_may_lack_what_has_a_default_and_have_more() -> None:
    async def newer(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code="%NoSuchJob", details=encode({"name": "a", "new": [1]}))

    async with open_connection_pair(server_handler=newer) as (client, _):
        with pytest.raises(NoSuchJob) as caught:
            await consume(client, Jobs).find("a")
        assert vars(caught.value) == {"name": "a", "tried": 1}


@dataclass
class Fussy(Exception):
    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise KeyError(self.number)


class Fails(Protocol):
    @raises(Fussy)
    async def fail(self) -> None: ...


async def test_an_error_that_refuses_its_fields_is_a_remote_error() -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("x", code="%Fussy", details=encode({"number": -1}))

    async with open_connection_pair(server_handler=lie) as (client, _):
        with pytest.raises(RemoteError):
            await consume(client, Fails).fail()
