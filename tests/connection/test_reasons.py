"""The reasons for the end of a connection are never empty, and name their causes."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import Connection, ConnectionLost
from bokbok_trio._connection.pings import Pings
from bokbok_trio._trio_util import MAX_CAUSES, describe_error
from bokbok_trio.testing import open_connection_pair
from tests.support.pairs import open_pair


def caused(error: BaseException, cause: BaseException | None, *, hidden: bool = False) -> BaseException:
    if hidden:
        error.__context__, error.__suppress_context__ = cause, True
    else:
        error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad"), "bad"),
        (ValueError(), "ValueError"),
        (caused(ValueError("bad"), KeyError("worse")), "bad"),
        (
            caused(trio.BrokenResourceError(), OSError("certificate verify failed")),
            "BrokenResourceError: certificate verify failed",
        ),
        (
            caused(trio.BrokenResourceError(), caused(ValueError(), KeyError())),
            "BrokenResourceError: ValueError: KeyError",
        ),
        (caused(ValueError(), OSError("elsewhere"), hidden=True), "ValueError"),
    ],
)
def test_an_error_is_never_described_by_nothing(error: BaseException, text: str) -> None:
    assert describe_error(error) == text


def test_causes_in_a_circle_and_contexts_are_described_too() -> None:
    error = ValueError()
    error.__cause__ = error
    assert describe_error(error) == ": ".join(["ValueError"] * MAX_CAUSES)
    with pytest.raises(trio.BrokenResourceError) as caught:
        try:
            raise OSError("reset")
        finally:
            raise trio.BrokenResourceError
    assert describe_error(caught.value) == "BrokenResourceError: reset"


class NoException(BaseException):
    """Not even an ``Exception``."""


class Textless(trio.abc.Stream):
    """A stream that fails on demand, by an exception that may have no text."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.error: BaseException | None = None
        self.sending = False
        self.failed = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.error is not None and self.sending:
            await trio.lowlevel.checkpoint()
            raise self.error
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.stream.receive_some(max_bytes)
        if self.error is not None and not self.sending:
            raise self.error
        return data

    async def aclose(self) -> None:
        await self.stream.aclose()


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize(
    ("error", "is_ours"),
    [
        (trio.BrokenResourceError(), False),
        (trio.ClosedResourceError(), False),
        (OSError(), False),
        (OSError(32, "a pipe"), False),
        (AssertionError(), True),
        (ZeroDivisionError("division by zero"), True),
        (NoException("the stream's own"), True),
    ],
)
@pytest.mark.parametrize("sending", [False, True])
async def test_a_reason_is_never_empty_and_names_its_cause(  # noqa: PLR0917
    sealed: bool,
    error: BaseException,
    is_ours: bool,
    sending: bool,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    streams: list[Textless] = []

    def wrap(stream: trio.abc.Stream) -> trio.abc.Stream:
        streams.append(Textless(stream))
        return streams[0]

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep_forever()

    async with open_connection_pair(None, handler, sealed=sealed, wrap=wrap) as (client, server):

        async def wait() -> None:
            with pytest.raises(ConnectionLost) as caught:
                await client.request([])
            reason = caught.value.reason
            assert reason == str(caught.value) == client.reason
            assert not reason.rstrip().endswith(":")
            assert "failed" in reason
            assert (str(error) or type(error).__name__) in reason
            causes: list[BaseException | None] = [caught.value.__cause__]
            while causes[-1] is not None:
                causes.append(causes[-1].__cause__ or causes[-1].__context__)
            assert error in causes

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            streams[0].sending = sending
            streams[0].error = error
            if sending:
                with pytest.raises(ConnectionLost):
                    await client.request([])
            else:
                with pytest.raises(ConnectionLost):
                    await server.request([])
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert bool(logged) is is_ours
    assert all("a stream raised an error" in record.getMessage() for record in logged)
    assert all(record.exc_info is not None and record.exc_info[2] is not None for record in logged)


async def test_a_defect_of_our_own_is_logged_once_and_is_the_cause(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Defect(Exception):
        """A defect of the library."""

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.sleep(0.05)
        return request

    def fail(*_: object) -> None:
        raise Defect

    monkeypatch.setattr(Pings, "on_pong", fail)
    async with open_pair("tcp plain", None, handler) as (client, server):
        errors: list[BaseException] = []

        async def wait() -> None:
            try:
                await client.request([])
            except ConnectionLost as exc:
                errors.append(exc)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked(0.001)
                with pytest.raises(ConnectionLost) as caught:
                    await client.ping()
                errors.append(caught.value)
            await server.wait_closed()
    assert len(errors) == 4
    for error in errors:
        assert "Defect" in str(error)
        assert isinstance(error.__cause__, Defect)
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.exc_info[0] for record in logged if record.exc_info] == [Defect]
    assert "Traceback" in caplog.text
