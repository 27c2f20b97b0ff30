"""Portals: blocking code calls async code in one Trio thread."""

from __future__ import annotations

import concurrent.futures
import contextvars
import threading
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio

from bokbok_trio import Connection, ConnectionClosed, Server, Settings, open_connection
from bokbok_trio._portal_loop import Loop
from bokbok_trio.blocking import Portal

from ..support.blocking_server import dial
from ..support.threads import in_child

pytestmark = pytest.mark.usefixtures("leaves_no_thread")


def test_a_portal_calls_anything_async() -> None:
    name = contextvars.ContextVar[str]("name")
    name.set("outside")

    async def tell(*args: int) -> tuple[str, tuple[int, ...]]:
        await trio.lowlevel.checkpoint()
        return name.get(), args

    async def fail() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise OSError("inner")

    async def leave() -> None:
        raise SystemExit(3)

    with Portal() as portal:
        assert portal.call(tell, 1, 2) == ("outside", (1, 2))
        assert portal.submit(tell).result() == ("outside", ())
        with pytest.raises(ExceptionGroup) as caught:
            portal.call(fail)
        assert str(caught.value.exceptions) == "(OSError('inner'),)"
        with pytest.raises(SystemExit):
            portal.call(leave)
        with pytest.raises(TimeoutError):
            portal.call(trio.sleep_forever, timeout=0.01)
    portal.close()
    with pytest.raises(ConnectionClosed, match="was closed"):
        portal.call(trio.sleep, 0)
    with pytest.raises(ConnectionClosed, match="was closed"), portal.enter(open_connection("x:1")):
        raise AssertionError


def test_a_failure_at_the_end_is_told_without_the_cancellation_around_it() -> None:
    has_begun = threading.Event()

    async def crash() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                has_begun.set()
                await trio.sleep_forever()
            finally:
                raise OSError("while it was cancelled")

    with Portal() as portal:
        future = portal.submit(crash)
        assert has_begun.wait(10)
    error = future.exception(timeout=10)
    assert isinstance(error, ExceptionGroup)
    assert str(error.exceptions) == "(OSError('while it was cancelled'),)"


@asynccontextmanager
async def block(story: list[object], *, mutes: bool = False) -> AsyncGenerator[str]:
    story.append("entered")
    try:
        yield "value"
    except ValueError as exc:
        story.append(exc)
        if not mutes:
            raise OSError("instead") from exc
    finally:
        story.append("left")
        await trio.lowlevel.checkpoint()


def test_an_async_block_does_with_errors_what_it_does() -> None:
    story: list[Any] = []
    with Portal() as portal:
        with portal.enter(block(story)) as value:
            assert value == "value"
        assert story == ["entered", "left"]
        with portal.enter(block(story, mutes=True)):
            raise ValueError("muted")
        assert str(story[3]) == "muted"
        with pytest.raises(OSError, match="instead"), portal.enter(block(story)):
            raise ValueError
        with pytest.raises(TimeoutError), portal.enter(block(story), timeout=0.01):
            portal.call(trio.sleep, 0.05)
        assert story[-1] == "left"


class Muting(AbstractAsyncContextManager[None]):
    """A block that nothing gets out of."""

    async def __aexit__(self, *_: object) -> bool:
        return True


def test_a_block_may_mute_even_its_cancellation() -> None:
    with Portal() as portal, portal.enter(Muting(), timeout=0.01):
        portal.call(trio.sleep, 0.03)


def test_a_run_may_end_just_before_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise trio.RunFinishedError

    with Portal() as portal, monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel.TrioToken, "run_sync_soon", fail)
        with pytest.raises(ConnectionClosed):
            portal.call(trio.sleep, 0)
        patch.undo()


def test_a_block_is_left_when_its_portal_is_closed_first() -> None:
    story: list[Any] = []
    portal = Portal()
    with portal.enter(block(story)):
        portal.close()
        assert story == ["entered", "left"]
    with pytest.raises(LookupError), Portal() as portal, portal.enter(block(story)):
        portal.close()
        raise LookupError


def test_a_call_from_a_thread_of_a_handler_is_nested_in_its_request(server: Server) -> None:
    """So it takes a slot of a deeper kind, and callbacks that block cannot lock up."""
    is_full = Settings(max_requests=1)

    async def serve(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"outer"]:
            return await trio.to_thread.run_sync(lambda: c.request(["back", "inner"], timeout=10))
        await trio.lowlevel.checkpoint()
        return request

    with dial(server, request_handler=serve, settings=is_full) as c:
        assert c.request(["back", "outer"], timeout=10) == [b"inner"]


def test_a_thread_that_cannot_run_trio_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError("no epoll")

    monkeypatch.setattr(trio, "run", fail)
    with pytest.raises(OSError, match="no epoll"):
        Portal()


def test_a_crash_of_trio_ends_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bokbok_trio._portal_call.WAKE_EVERY", 0.01)

    async def crash() -> None:
        await trio.lowlevel.wait_task_rescheduled(lambda _: None)  # type: ignore[arg-type, return-value]

    def act() -> str:
        portal = Portal()
        told = []
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(portal.call, trio.sleep_forever)
            crashing = pool.submit(lambda: portal.call(crash, timeout=0.05))
            told += [str(each.exception(timeout=10)) for each in (waiting, crashing)]
        portal.close()
        try:
            portal.call(trio.sleep, 0)
        except ConnectionClosed as exc:
            told.append(str(exc))
        return "; ".join(told)

    assert in_child(act) == "; ".join(["the Trio thread of the portal has crashed"] * 3)


def test_a_run_that_ends_without_its_calls_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same, without what Trio leaves lying about when it crashes."""
    monkeypatch.setattr("bokbok_trio._portal_call.WAKE_EVERY", 0.01)
    run = trio.run

    def crash(*args: Any) -> None:
        run(*args)
        raise trio.TrioInternalError("simulated")

    monkeypatch.setattr(trio, "run", crash)
    portal = Portal()
    monkeypatch.setattr("bokbok_trio._portal_call.Latch.set", lambda _: None)  # no call ends
    has_begun = threading.Event()

    async def wait() -> None:
        has_begun.set()
        await trio.sleep_forever()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(portal.call, wait)
        assert has_begun.wait(10)
        pool.submit(portal.close)
        with pytest.raises(ConnectionClosed, match="the Trio thread of the portal has crashed"):
            waiting.result(timeout=10)
    assert "the Trio thread of a portal has crashed" in caplog.text


def test_a_loop_that_is_stopped_before_it_runs_ends_at_once() -> None:
    loop = Loop()
    loop.stop()
    loop.start()
    loop.join(5)
    assert not loop.post(print)
