"""The context of a request, and the context variables of its handler."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, RemoteError, Settings, current_request
from bokbok_trio.instruments import Instrument, RequestStarted
from bokbok_trio.testing import open_connection_pair
from tests.support.handlers import tell_context
from tests.support.recorder import recorded_pair

from ..support.helpers import echo
from ..support.recorder import Recorder

# ---- what travels beside a request ----


class Adding(Recorder):
    """Adds to the context of requests."""

    def __init__(self, added: Any) -> None:
        super().__init__()
        self.added = added

    def context_for(self, event: RequestStarted) -> Mapping[str, bytes | str]:
        assert self.events[-1] is event
        added: Mapping[str, bytes | str] = self.added
        return added


async def test_instruments_add_to_the_context_and_read_it() -> None:
    first, second = Adding({"trace": "1", "mine": "x"}), Adding({"trace": "2", "more": b"3"})
    async with recorded_pair(tell_context, client_settings=Settings(instruments=[first, second])) as (
        client,
        _,
        _,
        theirs,
    ):
        assert await client.request([]) == [b"trace=1", b"mine=x", b"more=3"]
        mine = {"mine": "mine"}
        assert await client.request([], context=mine) == [b"mine=mine", b"trace=1", b"more=3"]
        assert mine == {"mine": "mine"}
        async with client.open_channel([]) as channel:
            with pytest.raises(RemoteError):
                await channel.answer()
    assert [event.context for event in first.of(RequestStarted)] == [{}, {"mine": "mine"}, {}]
    assert theirs.of(RequestStarted)[0].context == {"trace": b"1", "mine": b"x", "more": b"3"}
    first.check()


async def test_what_is_told_of_a_context_does_not_change() -> None:
    async with recorded_pair(echo) as (client, _, ours, _):
        context: dict[str, bytes | str] = {"a": "1"}
        await client.request([], context=context)
        context["a"] = "2"
        [started] = ours.of(RequestStarted)
        assert started.context == {"a": "1"}
        with pytest.raises(TypeError):
            started.context["a"] = "3"
        with pytest.raises(AttributeError):
            started.name = "b"


@pytest.mark.parametrize(
    ("added", "size", "context"),
    [
        ({f"n{number}": "" for number in range(40)}, 1, [f"n{number}=" for number in range(32)]),
        ({"a": "1", "b": bytes(9000), "c": "2"}, 1, ["a=1"]),
        ({"a": "1", "b": bytes(300), "c": "2"}, 3800, ["a=1"]),
        ({"a": "1"}, 4096 - 128 - 5, []),
    ],
)
async def test_what_does_not_fit_is_left_out(
    added: Mapping[str, bytes | str], size: int, context: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(instruments=[Adding(added)], max_message_size=4096)
    if size == 1:
        settings = Settings(instruments=[Adding(added)])
    async with recorded_pair(tell_context, client_settings=settings) as (client, *_):
        for _ in range(2):
            assert await client.request([bytes(size - 1)]) == [each.encode() for each in context]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("added", [None, 5, {"A": "b"}, {"a": 5}, {5: "b"}, {"": "b"}])
async def test_a_context_that_is_none_harms_nothing(added: Any, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Adding(added), Adding({"good": "1"})
    async with recorded_pair(tell_context, client_settings=Settings(instruments=[bad, good])) as (
        client,
        *_,
    ):
        for _ in range(3):
            assert await client.request([]) == [b"good=1"]
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Adding.context_for failed, and this instrument is not called any more" in record.message
    assert len(bad.of(RequestStarted)) == 1
    good.check()


# ---- context variables ----


LABEL: ContextVar[str] = ContextVar("label", default="nothing")


class Labelling(Instrument):
    """Sets a context variable for each request of the peer."""

    def request_started(self, event: RequestStarted) -> None:
        if event.direction == "in":
            assert LABEL.get() == "nothing"
            assert current_request().id == event.id
            LABEL.set(event.name)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_context_variable_is_the_handlers_and_nobody_elses(waits: bool) -> None:
    seen: list[str] = []

    async def look() -> None:
        seen.append(LABEL.get())
        if waits:
            await trio.testing.wait_all_tasks_blocked()
            seen.append(LABEL.get())

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        await look()
        if request[0].startswith(b"task"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
        return [LABEL.get(), *(await connection.request(request) if request[1:] else [])]

    settings = Settings(instruments=[Labelling()])
    async with (
        open_connection_pair(handler, handler, client_settings=settings, server_settings=settings) as (
            client,
            _,
        ),
        trio.open_nursery() as nursery,
    ):

        async def ask(name: str) -> None:
            for _ in range(5):
                request = [name] if name == "a" else [name, "back"]
                if name == "task b":
                    request = [name]
                assert await client.request(request) == [name.encode()] * len(request)
                assert LABEL.get() == "nothing"

        for name in ("a", "task b"):
            nursery.start_soon(ask, name)
    assert set(seen) == {"a", "task b"}


async def test_many_requests_of_one_receive_have_contexts_of_their_own() -> None:
    """All but the first begin in tasks of their own, as that one waits."""

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        await trio.lowlevel.checkpoint()
        return [LABEL.get()]

    settings = Settings(instruments=[Labelling()])
    async with (
        open_connection_pair(server_handler=handler, server_settings=settings) as (client, _),
        trio.open_nursery() as nursery,
    ):

        async def ask(name: str) -> None:
            assert await client.request([name]) == [name.encode()]

        for number in range(40):
            nursery.start_soon(ask, f"r{number}")
