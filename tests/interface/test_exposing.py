"""Exposing interfaces, and the methods that a peer may call."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import trio

from bokbok_trio import Channel, Connection, RemoteError
from bokbok_trio.interface import consume, expose
from bokbok_trio.testing import open_connection_pair

from ..support.helpers import echo
from ..support.job_queue import Jobs, Queue, code_of, open_jobs


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (b"Jobs.secret", "no-method"),
        (b"Jobs._private", "no-method"),
        (b"Jobs.__init__", "no-method"),
        (b"Jobs.jobs", "no-method"),
        (b"Jobs.", "no-method"),
        (b"Jobs", "no-method"),
        (b"total", "no-method"),
        (b"jobs.total", "no-method"),
        (b"\xff", "no-method"),
        (b"", "no-method"),
        (b"Jobs.total", "bad-arguments"),
    ],
)
async def test_only_what_the_interface_names_can_be_called(name: bytes, code: str) -> None:
    async with open_jobs() as (_, _, client):
        assert await code_of(client, b"%call", name, b"\x80") == code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ([b"%call"], "bad-arguments"),
        ([b"%call", b"Jobs.total"], "bad-arguments"),
        ([b"%call", b"Jobs.total", b"\x80", b""], "bad-arguments"),
        ([b"%other"], "no-method"),
        ([b"%"], "no-method"),
        ([b"%list"], "no-method"),
        ([b"%back", b"1", b"", b"\x90"], "no-reference"),
        ([b"plain"], "no-handler"),
        ([], "no-handler"),
    ],
)
async def test_other_requests_are_refused(fields: list[bytes], code: str) -> None:
    async with open_jobs() as (_, _, client):
        assert await code_of(client, *fields) == code
        with pytest.raises(RemoteError) as caught:
            async with client.open_channel(fields) as channel:
                await channel.answer()
        assert caught.value.code == code.replace("handler", "channel")


class Admin(Protocol):
    async def stop(self) -> str: ...


class Stopper(Admin):
    async def stop(self) -> str:
        return "stopped"


class Rest:
    async def handle_request(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        return [b"rest", *request]

    async def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> list[bytes]:
        return [b"channel", *request]


async def test_several_go_together_and_a_plain_handler_gets_the_rest() -> None:
    exposed = expose(Jobs, Queue()) | expose(Admin, Stopper()) | echo
    assert repr(exposed).startswith("<bokbok_trio.interface.Exposed Jobs | Admin | <function echo")
    async with open_connection_pair(server_handler=exposed) as (client, _):
        assert await consume(client, Jobs).total(1) == 51
        assert await consume(client, Admin).stop() == "stopped"
        assert await client.request(["a", "b"]) == [b"a", b"b"]
        assert await client.request([]) == []
        for field in (b"%", b"%x", b"%call"):
            assert await code_of(client, field) in {"no-method", "bad-arguments"}
        with pytest.raises(RemoteError) as caught:
            async with client.open_channel(["a"]) as channel:
                await channel.answer()
        assert caught.value.code == "no-channel"


async def test_a_combined_handler_gets_the_rest_of_the_channels_too() -> None:
    exposed = expose(Jobs, Queue()) | Rest()
    async with open_connection_pair(server_handler=exposed) as (client, _):
        assert await client.request(["a"]) == [b"rest", b"a"]
        async with client.open_channel(["b"]) as channel:
            assert await channel.answer() == [b"channel", b"b"]
        assert await consume(client, Jobs).total(1) == 51


def test_what_is_put_together_must_make_sense() -> None:
    jobs = expose(Jobs, Queue())
    for other in (expose(Jobs, Queue()), expose(Admin, Stopper(), name="Jobs")):
        with pytest.raises(ValueError, match="two interfaces are named Jobs; give one of them another name="):
            _ = jobs | other
    _ = jobs | expose(Jobs, Queue(), name="Others")
    with pytest.raises(TypeError, match="gets all other requests; put it last"):
        _ = jobs | echo | expose(Admin, Stopper())
    wrong: Any
    for wrong in (3, Admin):
        with pytest.raises(TypeError, match="unsupported operand"):
            _ = jobs | wrong


async def test_a_name_of_its_own_is_used_by_both() -> None:
    exposed = expose(Jobs, Queue(), name="Jobs.v2") | expose(Admin, Stopper(), name="Admin")
    async with open_connection_pair(server_handler=exposed) as (client, _):
        assert await consume(client, Jobs, name="Jobs.v2").total(1) == 51
        with pytest.raises(RemoteError) as caught:
            await consume(client, Jobs).total(1)
        assert (caught.value.code, caught.value.message) == ("no-method", "no such method: Jobs.total")


async def test_both_sides_serve_and_call_at_once() -> None:
    async with open_connection_pair(expose(Admin, Stopper()), expose(Jobs, Queue())) as (client, server):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(consume(client, Jobs).total, 1)
                nursery.start_soon(consume(server, Admin).stop)


class UnhashableHook:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, value: object) -> object:
        raise AssertionError


async def test_an_interface_is_prepared_once_for_all_connections() -> None:
    """A server may consume one anew in each call."""
    async with open_connection_pair(server_handler=expose(Jobs, Queue(), name="Others")) as (client, server):
        jobs = consume(client, Jobs)
        assert type(jobs) is type(consume(server, Jobs)) is type(consume(client, Jobs, middleware=[]))
        others = consume(client, Jobs, name="Others")
        assert type(others) is not type(jobs)
        hook = UnhashableHook()
        hooked = [consume(client, Jobs, name="Others", encode_hook=hook) for _ in range(2)]
        assert type(hooked[0]) is not type(hooked[1])
        for each in (others, *hooked):
            assert await each.total(1) == 51


@pytest.mark.parametrize("wrong", [None, "localhost:1", Jobs])
def test_consume_takes_a_connection_first(wrong: Any) -> None:
    with pytest.raises(TypeError, match="consume takes a connection first, not "):
        consume(wrong, Jobs)


async def test_consume_tells_what_is_wrong_with_an_interface() -> None:
    class Wrong(Protocol):
        def stat(self, path: str) -> int: ...

    async with open_connection_pair() as (client, _):
        with pytest.raises(TypeError, match="it is not async; write 'async def'"):
            consume(client, Wrong)
