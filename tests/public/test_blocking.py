"""Connections for scripts: blocking calls, over one Trio thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import traceback
from contextlib import suppress
from typing import Any

import pytest
import trio

from bokbok_trio import (
    AuthenticationError,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Key,
    MessageTooLarge,
    RemoteError,
    Server,
)
from bokbok_trio.blocking import Portal, connect

from ..support.blocking_server import STORY, dial
from ..support.threads import no_thread_but

pytestmark = pytest.mark.usefixtures("leaves_no_thread")


# ---- requests ----


def test_requests_and_their_errors_are_those_of_the_async_api(server: Server) -> None:
    with dial(server) as c:
        assert c.request(["x", b"y"]) == [b"x", b"y"]
        assert c.request(["context"], context={"trace": "7"}) == [b"trace=b'7'"]
        assert 0 < c.ping() < 5
        assert c.connection.user == "alice"
        assert repr(c) == f"<bokbok_trio.blocking.Connection over {c.connection!r}>"
        with pytest.raises(RemoteError, match="no") as caught:
            c.request(["error"])
        assert caught.value.code == "no"
        with pytest.raises(TypeError):
            c.request("not a list")
        with pytest.raises(MessageTooLarge):
            c.request([bytes(2**23)])
        with pytest.raises(ConnectionLost):
            c.request(["lose"])
        with pytest.raises(ConnectionLost):
            c.request(["x"])


def test_handlers_of_this_side_run_in_the_trio_thread(server: Server) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        with pytest.raises(RuntimeError, match="would block the Trio thread"):
            c.request(["x"])
        with pytest.raises(RuntimeError, match="would block the Trio thread"):
            c.submit(connection.request, ["x"])
        with pytest.raises(RuntimeError, match="would block the Trio thread"):
            c.close()
        return [threading.current_thread().name]

    with dial(server, request_handler=handler) as c:
        assert c.request(["back", "x"]) == [b"bokbok_trio portal"]


def test_a_time_limit_reaches_the_handler(server: Server) -> None:
    with dial(server) as c:
        with pytest.raises(TimeoutError, match=r"longer than 0\.05 seconds"):
            c.request(["sleep"], timeout=0.05)
        left = STORY.next()
        assert isinstance(left, float)
        assert 0 < left <= 0.05
        assert STORY.next() == "cancelled"
        with pytest.raises(TimeoutError):
            c.request(["x"], timeout=0)
        assert c.request(["x"], timeout=10) == [b"x"]
        for timeout in (-1, float("nan")):
            with pytest.raises(ValueError, match="at least 0 seconds"):
                c.request(["x"], timeout=timeout)


@pytest.mark.parametrize("by_block", [False, True])
def test_it_closes_by_its_block_or_by_close(server: Server, by_block: bool) -> None:
    c = dial(server)
    assert c.request(["x"]) == [b"x"]
    for _ in range(2):
        if by_block:
            with c:
                pass
        else:
            c.close()
    assert c.connection.closed
    for call in (c.ping, lambda: c.request(["x"]), lambda: c.submit(c.connection.ping)):
        with pytest.raises(ConnectionClosed, match="was closed"):
            call()


def test_what_the_body_raises_comes_out_as_itself(server: Server) -> None:
    for error in (ValueError("x"), StopIteration("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        with pytest.raises(type(error)) as caught:
            with dial(server) as c, c.open_channel(["echo"]):
                raise error
        assert caught.value is error
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert not [name for name in frames if name in {"_hold", "_run"}], "only those of this thread"
        assert (isinstance(STORY.next(), float), STORY.next()) == (True, "cancelled")


@pytest.mark.parametrize(
    ("to", "options", "error"),
    [
        ("/nowhere/at/all", {}, OSError),
        ("no address", {}, ValueError),
        ("/nowhere", {"user": "alice"}, TypeError),
    ],
)
def test_what_cannot_be_opened_leaves_nothing(
    to: str, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        connect(to, **options)
    with Portal() as portal:
        with pytest.raises(error):
            connect(to, portal=portal, **options)
        portal.call(trio.sleep, 0)


def test_a_wrong_key_is_told(server: Server) -> None:
    with pytest.raises(AuthenticationError, match="check the user name, the key"):
        connect(server.addresses[0], user="alice", key=Key.generate())


def test_several_connections_share_a_portal(server: Server) -> None:
    with Portal() as portal, dial(server, portal=portal) as one:
        with dial(server, portal=portal) as other:
            assert one.request(["x"]) == other.request(["x"])
            assert len(server.connections) == 2
        assert one.request(["x"]) == [b"x"]


def test_several_threads_share_a_connection(server: Server) -> None:
    with dial(server) as c, concurrent.futures.ThreadPoolExecutor(8) as pool:
        numbers = [str(n) for n in range(200)]
        assert list(pool.map(lambda n: c.request([n]), numbers)) == [[n.encode()] for n in numbers]


def test_calls_of_other_threads_end_when_it_is_closed(server: Server) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        c = dial(server)
        waiting = [pool.submit(c.request, ["sleep"]) for _ in range(4)]
        waiting.append(c.submit(c.connection.request, ["sleep"]))
        for _ in waiting:
            assert STORY.next() == float("inf")
        c.close()
        for each in waiting:
            with pytest.raises(ConnectionClosed, match="was closed"):
                each.result(timeout=10)
            assert STORY.next() == "cancelled"


def test_a_thread_that_a_call_waits_for_does_not_close_the_portal() -> None:
    with Portal() as portal, Portal() as other:

        async def close(which: Portal) -> None:
            await trio.to_thread.run_sync(which.close)

        with pytest.raises(RuntimeError, match="would wait for a call that waits for this thread"):
            portal.call(close, portal)
        portal.call(close, other)
        with pytest.raises(ConnectionClosed, match="the portal was closed"):
            other.call(trio.sleep, 0)


def test_nobody_has_it_any_more(server: Server) -> None:
    before = set(threading.enumerate())
    dial(server).request(["x"])
    no_thread_but(before)
    with dial(server).open_channel(["echo"]) as channel:
        gc.collect()
        channel.send(["still here"])
        assert channel.receive() == [b"still here"]
    del channel
    no_thread_but(before)


def test_a_failed_call_keeps_nothing_alive(server: Server) -> None:
    before = set(threading.enumerate())
    gc.disable()  # for so long, only counting references frees anything
    try:
        c = dial(server)
        with pytest.raises(RemoteError):
            c.request(["error"])
        with c.open_channel(["count", "2"]) as channel:
            assert len(list(channel)) == 2
        del c, channel
        no_thread_but(before)
    finally:
        gc.enable()


def test_a_handler_that_ends_the_program_does(server: Server) -> None:
    async def leave(connection: Connection, request: list[bytes]) -> None:
        raise SystemExit(7)

    with pytest.raises(SystemExit, match="7"):
        with dial(server, request_handler=leave) as c:
            with pytest.raises(ConnectionClosed):
                c.request(["back"])


# ---- channels ----


def test_a_channel_is_iterated_over(server: Server) -> None:
    with dial(server) as c:
        with c.open_channel(["count", "5"]) as channel:
            assert list(channel) == [[b"%d" % n] for n in range(5)]
            assert channel.answer() == [b"done"]
            with pytest.raises(trio.EndOfChannel):
                channel.receive()
        with c.open_channel(["echo"]) as channel:
            assert STORY.next() == float("inf")
            channel.send(["a"], timeout=5)
            channel.send(["b"])
            assert next(channel) == [b"a"]
            channel.end()
            assert list(channel) == [[b"b"]]
            assert channel.answer(timeout=5) == [b"done"]
        with pytest.raises(trio.ClosedResourceError):
            channel.receive()
        with pytest.raises(RemoteError, match="no"), c.open_channel(["error"]) as channel:
            channel.answer()
        with pytest.raises(TypeError), c.open_channel("no list"):
            raise AssertionError


def test_no_item_is_lost_by_a_time_limit(server: Server) -> None:
    with dial(server) as c, c.open_channel(["echo"]) as channel:
        STORY.next()
        for number in range(20):
            channel.send([str(number)])
            with suppress(TimeoutError):
                channel.send([], timeout=0)  # which sends nothing
            while True:
                try:
                    item = channel.receive(timeout=0.0002)
                except TimeoutError:
                    continue
                break
            assert item == [b"%d" % number]
    assert STORY.next() == "cancelled"


def test_a_channel_may_have_a_time_limit_as_a_whole(server: Server) -> None:
    with dial(server) as c:
        with pytest.raises(TimeoutError, match=r"longer than 0\.05 seconds"):
            with c.open_channel(["echo"], timeout=0.05) as channel:
                channel.receive()
        left = STORY.next()
        assert isinstance(left, float)
        assert 0 < left <= 0.05
        assert STORY.next() == "cancelled"
        with pytest.raises(TimeoutError, match=r"longer than 0\.02 seconds"):
            with c.open_channel(["echo"], timeout=0.02) as channel:
                STORY.next()
                assert STORY.next() == "cancelled"
        with pytest.raises(TimeoutError, match=r"longer than 0\.02 seconds"):
            channel.receive()
        with pytest.raises(TimeoutError), c.open_channel(["echo"], timeout=0):
            raise AssertionError
        assert c.request(["x"]) == [b"x"]


# ---- futures ----


def test_many_requests_at_once(server: Server) -> None:
    with dial(server) as c:
        futures = [c.submit(c.connection.request, [str(n)]) for n in range(200)]
        assert [future.result() for future in futures] == [[b"%d" % n] for n in range(200)]
        failed = c.submit(c.connection.request, ["error"])
        assert isinstance(failed.exception(timeout=10), RemoteError)
        late = c.submit(c.connection.request, ["sleep"], timeout=0.01)
        assert isinstance(late.exception(timeout=10), TimeoutError)
        assert isinstance(STORY.next(), float)
        assert STORY.next() == "cancelled"


def test_cancelling_a_future_cancels_the_handler(server: Server) -> None:
    with dial(server) as c:
        future = c.submit(c.connection.request, ["sleep"])
        assert STORY.next() == float("inf")
        assert future.cancel()
        assert STORY.next() == "cancelled"
        with pytest.raises(concurrent.futures.CancelledError):
            future.result()
        for _ in range(50):
            c.submit(c.connection.request, ["x"]).cancel()
        assert c.request(["x"]) == [b"x"]


# ---- asyncio, and what the documentation shows ----


def test_what_cancels_in_asyncio_reaches_the_handler(server: Server) -> None:
    async def main() -> None:
        c = await asyncio.to_thread(dial, server)

        async def ask(*fields: str) -> list[bytes]:
            return await asyncio.wrap_future(c.submit(c.connection.request, fields))

        assert await ask("x") == [b"x"]
        with pytest.raises(RemoteError):
            await ask("error")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ask("sleep")
        assert [STORY.next(), STORY.next()] == [float("inf"), "cancelled"]
        task = asyncio.create_task(ask("sleep"))
        assert await asyncio.to_thread(STORY.next) == float("inf")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(STORY.next) == "cancelled"
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(ask("sleep"))
                assert await asyncio.to_thread(STORY.next) == float("inf")
                group.create_task(ask("error"))
        assert await asyncio.to_thread(STORY.next) == "cancelled"
        assert await ask("x") == [b"x"]
        await asyncio.to_thread(c.close)

    before = set(threading.enumerate())
    asyncio.run(main())
    no_thread_but(before)
