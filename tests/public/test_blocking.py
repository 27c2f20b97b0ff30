"""Connections for scripts: blocking calls, over one Trio thread, that Ctrl-C ends at any step."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import (
    AuthenticationError,
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Key,
    MessageTooLarge,
    RemoteError,
    RequestError,
    Server,
    Settings,
    current_request,
    open_connection,
    open_server,
)
from bokbok_trio._portal_call import Latch
from bokbok_trio._portal_loop import Loop, _stop_all
from bokbok_trio.blocking import Portal, connect
from tests.support.helpers import documented_code
from tests.support.threads import Story, in_child, no_thread_but, sweep

KEY = Key.generate()


STORY = Story()


async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
    match request:
        case [b"sleep"]:
            STORY.tell(trio.current_effective_deadline() - trio.current_time())
            try:
                await trio.sleep_forever()
            finally:
                STORY.tell("cancelled")
        case [b"context"]:
            return [f"{name}={value!r}" for name, value in current_request().context.items()]
        case [b"back", *rest]:
            return list(await connection.request(rest))
        case [b"lose"]:
            await connection.aclose()
        case [b"error"]:
            raise RequestError("no", code="no")
    await trio.lowlevel.checkpoint()
    return list(request)


async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
    match request:
        case [b"count", upto]:
            for number in range(int(upto)):
                await channel.send([str(number)])
        case [b"error"]:
            raise RequestError("no", code="no")
        case _:
            STORY.tell(trio.current_effective_deadline() - trio.current_time())
            try:
                async for item in channel:
                    await channel.send(item)
            except trio.Cancelled:
                STORY.tell("cancelled")
                raise
    return ["done"]


@pytest.fixture(autouse=True)
def leaves_no_thread() -> Generator[None]:
    STORY.forget()
    before = set(threading.enumerate())
    yield
    # Of Trio's, some wait a while for more to do.
    no_thread_but({thread for thread in threading.enumerate() if "Trio thread" in thread.name} | before)


@pytest.fixture
def server(tmp_path: Path) -> Generator[Server]:
    with (
        Portal() as portal,
        portal.enter(
            open_server(f"{tmp_path}/s", handler, channel_handler=channel_handler, user_key={"alice": KEY})
        ) as server,
    ):
        yield server


def dial(server: Server, **options: Any) -> Any:
    return connect(server.addresses[0], user="alice", key=KEY, **options)


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


# ---- the portal ----


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


def test_a_run_may_end_just_before_it_is_called() -> None:
    portal = Portal()
    portal.close()
    portal._loop._is_over = False  # as it is for a moment
    with pytest.raises(ConnectionClosed):
        portal.call(trio.sleep, 0)


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
    monkeypatch.setattr("bokbok_trio._portal_call.Call._end", lambda _: None)
    portal = Portal()
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


# ---- forks, exits, interrupts ----


def test_a_forked_child_has_no_portal(server: Server) -> None:
    def act() -> str:
        errors = []
        for call in (lambda: c.request(["x"]), c.close, c.portal.close, c.__exit__):
            try:
                call()
            except (RuntimeError, TypeError) as exc:
                errors.append(str(exc))
        c.portal._loop.stop()
        return "\n".join(errors)

    with dial(server) as c:
        assert in_child(act).count("connect anew here") == 3
        assert c.request(["x"]) == [b"x"]


def test_who_is_in_another_process_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, without a fork."""
    with Portal() as portal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(RuntimeError, match="connect anew here"):
                portal.call(trio.sleep, 0)
            portal._loop.stop()  # as the finalizer does
        portal.call(trio.sleep, 0)


def test_at_exit_what_is_open_is_closed(server: Server) -> None:
    c = dial(server)
    _stop_all()
    assert c.connection.closed
    assert c.connection.reason == "this side closed the connection"
    c.close()


def test_a_block_that_will_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bokbok_trio._portal_loop.CLOSE_GRACE", 0.05)
    story: list[str] = []

    @asynccontextmanager
    async def endless() -> AsyncGenerator[None]:
        yield
        try:
            await trio.sleep_forever()
        finally:
            story.append("cancelled")

    with Portal() as portal, portal.enter(endless()):
        portal.close()
    assert story == ["cancelled"]


def run_script(script: str, address: object) -> subprocess.CompletedProcess[str]:
    prelude = """
        import atexit, sys, threading
        from bokbok_trio import Key
        from bokbok_trio.blocking import Portal, connect

        def dial(**options):
            return connect(sys.argv[1], user="alice", key=Key(bytes.fromhex(sys.stdin.readline())), **options)
    """
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(prelude) + textwrap.dedent(script), str(address)],
        input=KEY.raw.hex(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )


def test_what_a_script_leaves_open_is_closed_in_order_at_its_exit(tmp_path: Path) -> None:
    reasons = Story()

    async def on_close(connection: Connection) -> None:
        reasons.tell(connection.reason)

    with (
        Portal() as portal,
        portal.enter(
            open_server(f"{tmp_path}/s", handler, user_key={"alice": KEY}, close_handler=on_close)
        ) as server,
    ):
        script = """
            c = dial()
            say = lambda text: sys.stdout.write(text + "\\n")  # at once, as several threads do
            atexit.register(lambda: say(f"at exit {c.request(['y'])}"))
            threading.Thread(target=lambda: say(f"thread {c.request(['z'])}"), daemon=False).start()
            say(str(c.request(["x"])))
        """
        done = run_script(script, server.addresses[0])
        assert sorted(done.stdout.splitlines()) == ["[b'x']", "at exit [b'y']", "thread [b'z']"]
        assert done.stderr == ""
        assert str(reasons.next()).startswith("the peer closed the connection")


def test_in_a_notebook_an_event_loop_runs_already(server: Server) -> None:
    script = """
        import asyncio

        async def cell():
            with dial() as c:
                print(c.request(["x"]))
            print(threading.active_count())

        asyncio.run(cell())
    """
    done = run_script(script, server.addresses[0])
    assert (done.stdout, done.stderr) == ("[b'x']\n1\n", "")


def use_all(address: Any) -> None:
    """Every kind of call."""
    with connect(address) as c:
        assert c.request(["x"]) == [b"x"]
        with suppress(TimeoutError):
            c.request(["sleep"], timeout=0.001)
        with c.open_channel(["echo"]) as channel:
            channel.send(["1"])
            assert channel.receive() == [b"1"]
            channel.end()


def test_ctrl_c_works_at_every_step_and_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def act() -> str:
        with (
            Portal() as portal,
            portal.enter(open_server(str(path), handler, channel_handler=channel_handler)),
        ):
            return sweep(lambda: use_all(path), 100)

    assert in_child(act) == "fine"


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Interrupts the next call of a method."""

    def interrupt(owner: type, name: str, *, after: bool = False) -> None:
        real = getattr(owner, name)

        def interrupted(*args: Any) -> Any:
            monkeypatch.setattr(owner, name, real)
            if after:
                real(*args)
            signal.raise_signal(signal.SIGINT)
            return None if after else real(*args)

        monkeypatch.setattr(owner, name, interrupted)

    return interrupt


def test_ctrl_c_here_and_there(interrupts: Callable[..., None], server: Server) -> None:
    """A few of the steps, in this process."""
    before = set(threading.enumerate())
    for owner, name in ((threading.Thread, "start"), (Latch, "look"), (Loop, "begin")):
        for after in (False, True):
            interrupts(owner, name, after=after)
            with pytest.raises(KeyboardInterrupt):
                dial(server)
            gc.collect()
            no_thread_but(before)
    with dial(server) as c:
        for after in (False, True):
            for name, call in (("begin", c.ping), ("begin", lambda: c.submit(c.connection.ping))):
                interrupts(Loop, name, after=after)
                with pytest.raises(KeyboardInterrupt):
                    call()
            for name in ("begin", "post"):
                with pytest.raises(KeyboardInterrupt), c.open_channel(["x"]):
                    interrupts(Loop, name, after=after)
                    c.ping()
            with pytest.raises(KeyboardInterrupt):
                with c.open_channel(["x"]):
                    interrupts(Loop, "wait", after=after)
        assert c.request(["x"]) == [b"x"]


@pytest.mark.parametrize("stubborn", [False, True])
def test_ctrl_c_while_a_call_waits(server: Server, stubborn: bool) -> None:
    """It is cancelled over there too; where it will not end, a second Ctrl-C waits no more."""
    has_begun = threading.Event()
    may_end = threading.Event()

    async def wait() -> None:
        try:
            has_begun.set()
            await trio.sleep_forever()
        finally:
            if stubborn:
                os.kill(os.getpid(), signal.SIGINT)
                await trio.to_thread.run_sync(may_end.wait)

    def interrupt() -> None:
        has_begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    def act() -> str:
        with Portal() as portal:
            threading.Thread(target=interrupt).start()
            try:
                portal.call(wait)
            except KeyboardInterrupt:
                return "interrupted"
            finally:
                may_end.set()
        return "not interrupted"

    assert in_child(act) == "interrupted"


def test_ctrl_c_while_a_block_is_entered_or_left() -> None:
    def interrupt_soon() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    @asynccontextmanager
    async def slow(*, at_the_end: bool) -> AsyncGenerator[None]:
        try:
            if not at_the_end:
                await trio.sleep_forever()
            yield
            await trio.sleep_forever()
        finally:
            story.append("left")

    story: list[str] = []

    def act() -> str:
        with Portal() as portal:
            for at_the_end in (False, True):
                interrupt_soon()
                try:
                    with portal.enter(slow(at_the_end=at_the_end)):
                        story.append("inside")
                except KeyboardInterrupt:
                    story.append("interrupted")
        return str(story)

    assert in_child(act) == str(["left", "interrupted", "inside", "left", "interrupted"])


def test_the_handler_of_ctrl_c_stays_what_it_is(server: Server) -> None:
    before = signal.getsignal(signal.SIGINT)
    with dial(server) as c:
        c.request(["x"])
        assert signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with dial(server) as c:
            c.request(["x"])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


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


def programs() -> dict[str, str]:
    """The programs of the documentation without typed calls, by their names."""
    return {code.split()[1]: code for code in documented_code("blocking.rst") if "consume" not in code}


@pytest.mark.parametrize("name", programs())
def test_the_programs_of_the_documentation_print_what_they_say(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        match request:
            case [b"ping", text]:
                return ["pong", text]
            case [b"greet"]:
                [who] = await connection.request(["your name?"])
                return [b"hello, " + who]
            case [b"sleep"]:
                await trio.sleep_forever()
        raise RequestError("unknown request", code="unknown-request")

    async def shout(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
        async for [chunk] in channel:
            await channel.send([chunk.upper()])
        return ["done"]

    keys = {"alice": Key(bytes.fromhex("d2" * 32))}
    with (
        Portal() as portal,
        portal.enter(open_server("127.0.0.1:0", handler, channel_handler=shout, user_key=keys)) as server,
    ):
        program = programs()[name]
        expected = re.findall(r"print\(.*\)  +# (.*)", program)
        assert expected
        exec(program.replace("localhost:12345", str(server.addresses[0])), {})
    assert capsys.readouterr() == ("".join(f"{line}\n" for line in expected), "")


def test_a_loop_that_is_stopped_before_it_runs_ends_at_once() -> None:
    loop = Loop()
    loop.stop()
    loop.start()
    loop.join(5)
    assert not loop.post(print)
