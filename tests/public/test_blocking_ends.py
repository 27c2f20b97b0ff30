"""Blocking connections: forks, the end of the program, and Ctrl-C at any step."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import Connection, Server, open_server
from bokbok_trio._portal_call import Latch
from bokbok_trio._portal_loop import Loop
from bokbok_trio.blocking import Portal, connect

from ..support.blocking_server import KEY, channel_handler, dial, handler
from ..support.inside import finalize, stop_portals_at_exit
from ..support.threads import Story, in_child, no_thread_but, sweep

pytestmark = pytest.mark.usefixtures("leaves_no_thread")


def test_a_forked_child_has_no_portal(server: Server) -> None:
    def act() -> str:
        errors = []
        for call in (lambda: c.request(["x"]), c.close, c.portal.close, c.__exit__):
            try:
                call()
            except (RuntimeError, TypeError) as exc:
                errors.append(str(exc))
        finalize(c.portal)
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
            finalize(portal)
        portal.call(trio.sleep, 0)


def test_at_exit_what_is_open_is_closed(server: Server) -> None:
    c = dial(server)
    stop_portals_at_exit()
    assert c.connection.closed
    # The server's portal stops too, and either end may be the first.
    assert c.connection.reason is not None
    assert re.search("this side closed the connection|which it was draining", c.connection.reason)
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

        asyncio.run(cell(), debug=False)  # else it tells of steps that took long
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
