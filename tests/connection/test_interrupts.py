"""Ctrl-C, wherever it hits: right answers, or an orderly end by ``KeyboardInterrupt``; no inner error.

Each case runs in a forked child, in its main thread, with Python's own handler of SIGINT, as a program does.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import pytest
import trio
import trio.testing

from bokbok_trio import (
    BokbokError,
    Channel,
    Connection,
    Key,
    RemoteError,
    Settings,
    open_connection,
    open_server,
)
from tests.support.threads import stop_tracing

INTERRUPT_SECONDS: Final = float(os.environ.get("INTERRUPT_SECONDS", "1.5"))
"""How long the test with random times goes on."""


def in_child(work: Callable[[], object], patience: float = 15) -> str:
    """Run a function in a child. Return its result, or its traceback."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing"
        try:
            stop_tracing()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            text = str(work())
        except BaseException:
            text = traceback.format_exc()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.write(write, text.encode()[-60_000:])
            os._exit(0)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], patience)
        return os.read(read, 60_000).decode() if ready else "hung"
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


class Interrupter(trio.abc.Instrument):
    """Raises SIGINT once, before or after the step of a task with a certain number."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.at = at
        self.after = after
        self.count = 0
        self.is_on = False
        self.has_fired = False

    def _step(self) -> None:
        if self.is_on:
            self.count += 1
            if self.count == self.at:
                self.has_fired = True
                interrupt()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self.after:
            self._step()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.after:
            self._step()


async def echo(connection: Connection, request: list[bytes]) -> list[bytes]:
    if request[0] == b"wait":
        await trio.sleep(0.002)
    elif request[0] == b"back":
        await connection.request(request[1:])
    return request


async def echo_items(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    async for item in channel:
        await channel.send(item)
    return request


async def act(connection: Connection, what: str, i: int) -> None:
    """One call, whose answer is checked."""
    name = b"%d" % i
    match what:
        case "request":
            assert_same(await connection.request([b"x", name]), [b"x", name])
        case "large":
            body = [b"wait", name, bytes(150_000)]
            assert_same(await connection.request(body), body)
        case "waiting":
            assert_same(await connection.request([b"wait", name]), [b"wait", name])
        case "callback":
            assert_same(await connection.request([b"back", name]), [b"back", name])
        case "ping":
            await connection.ping()
        case "cancelled":
            with trio.move_on_after(0.001):
                await connection.request([b"wait", name])
        case _:
            async with connection.open_channel([name]) as channel:
                await channel.send([name])
                assert_same(await channel.receive(), [name])
                await channel.end()
                assert_same(await channel.answer(), [name])


def assert_same(got: list[bytes], expected: list[bytes]) -> None:
    if got != expected:
        raise LookupError(f"another's answer: {got[:2]} instead of {expected[:2]}")


CALLS = ["request", "large", "waiting", "callback", "ping", "cancelled", "channel"]


def run_calls(what: str, mode: str, instrument: Interrupter | None, *, catches: bool) -> str:
    """Make some requests, with Ctrl-C caught around each call, or not at all."""
    caught: list[str] = []

    async def main() -> None:
        key = Key.generate()
        secrets: dict[str, Any] = {"user": "u", "key": key} if mode == "sealed" else {}
        async with open_server(
            "127.0.0.1:0", echo, channel_handler=echo_items, user_key={"u": key} if secrets else None
        ) as server:
            async with open_connection(server.addresses[0], request_handler=echo, **secrets) as connection:
                await act(connection, what, -1)
                if instrument is not None:
                    instrument.is_on = True
                for i in range(4):
                    try:
                        with trio.fail_after(5):
                            await act(connection, what, i)
                    except KeyboardInterrupt:
                        caught.append("call")
                        if not catches:
                            raise
                if instrument is not None:
                    instrument.is_on = False

    try:
        trio.run(main, instruments=[] if instrument is None else [instrument])
    except KeyboardInterrupt:
        caught.append("run")
    return f"fine {caught}"


@pytest.mark.parametrize("mode", ["plain", "sealed"])
@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("catches", [True, False])
def test_one_interrupt_at_each_step_of_the_loop(mode: str, what: str, catches: bool) -> None:
    """Between the steps of tasks, which is where Trio sees most of them."""

    def work() -> str:
        for after in (False, True):
            at = 0
            while True:
                at += 1
                instrument = Interrupter(at, after=after)
                try:
                    outcome = run_calls(what, mode, instrument, catches=catches)
                except BaseException as exc:
                    raise LookupError(f"with the interrupt at step {at}, after={after}") from exc
                if not instrument.has_fired:
                    break
                if outcome == "fine []":
                    return f"swallowed at step {at}, after={after}"
                if at > 40:
                    break
        return "fine"

    outcome = in_child(work, patience=40)
    assert outcome == "fine", outcome


class Line:
    """Raises SIGINT once at a certain line of the library, counted as they are run."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.has_fired = False

    def trace(self, frame: Any, event: str, arg: object) -> Any:
        if event == "call" and "bokbok_trio/_" not in frame.f_code.co_filename:
            return None
        if event == "line" and not self.has_fired:
            self.count += 1
            if self.count == self.at:
                self.has_fired = True
                interrupt()
        return self.trace


def test_one_interrupt_at_each_line_of_the_library_while_a_request_is_made() -> None:
    """Of the asker's own steps: what is done between calling `request` and sleeping."""

    def once(at: int, mode: str) -> tuple[bool, str]:
        line = Line(at)
        caught: list[str] = []

        async def main() -> None:
            key = Key.generate()
            secrets: dict[str, Any] = {"user": "u", "key": key} if mode == "sealed" else {}
            async with (
                open_server("127.0.0.1:0", echo, user_key={"u": key} if secrets else None) as server,
                open_connection(server.addresses[0], **secrets) as connection,
            ):
                await connection.request(["warm"])
                try:
                    coroutine = connection.request(["interrupted"])
                    sys.settrace(line.trace)
                    await coroutine
                except KeyboardInterrupt:
                    caught.append("call")
                finally:
                    sys.settrace(None)
                with trio.fail_after(3):
                    for i in range(3):
                        assert_same(await connection.request([b"%d" % i]), [b"%d" % i])

        try:
            trio.run(main)
        except KeyboardInterrupt:
            caught.append("run")
        return line.has_fired, str(caught)

    def work() -> str:
        for mode in ("plain", "sealed"):
            at = 1
            while True:
                try:
                    has_fired, outcome = once(at, mode)
                except BaseException as exc:
                    raise LookupError(f"{mode}, line {at}") from exc
                if has_fired and outcome == "[]":
                    return f"swallowed at line {at}, {mode}"
                if not has_fired or at > 400:
                    break
                at += 1 if at < 100 else 7
        return "fine"

    outcome = in_child(work, patience=60)
    assert outcome == "fine", outcome


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("side", ["server", "client"])
def test_in_a_handler_it_ends_the_program(waits: bool, by_channel: bool, side: str) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if waits:
            await trio.sleep(0.001)
        interrupt()
        await trio.sleep_forever()

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await handler(connection, request)

    async def main() -> None:
        async def ask(connection: Connection) -> None:
            if by_channel:
                async with connection.open_channel([]) as channel:
                    await channel.answer()
            else:
                await connection.request([])

        handlers: dict[str, Any] = {"request_handler": handler, "channel_handler": channel_handler}

        async def on_open(connection: Connection) -> None:
            if side == "client":
                await ask(connection)
            await trio.lowlevel.checkpoint()

        async with (
            open_server("127.0.0.1:0", open_handler=on_open, **handlers) as server,
            open_connection(server.addresses[0], **handlers) as connection,
        ):
            if side == "server":
                await ask(connection)
            await trio.sleep(5)

    def work() -> str:
        try:
            trio.run(main)
        except KeyboardInterrupt:
            return "interrupted"
        except BokbokError as exc:
            return f"lost: {exc!r}"
        return "nothing"

    assert in_child(work) == "interrupted"


@pytest.mark.parametrize("function", ["describe_error", "open_handler", "close_handler", "user_key"])
def test_in_other_functions_of_the_users(function: str) -> None:
    async def fail(connection: Connection, request: list[bytes]) -> None:
        raise ValueError

    def describe(error: BaseException) -> str:
        interrupt()
        return "not reached"

    async def on_connection(connection: Connection) -> None:
        interrupt()
        await trio.lowlevel.checkpoint()

    key = Key.generate()

    async def user_key(user: str) -> Key:
        interrupt()
        await trio.lowlevel.checkpoint()
        return key

    all_options: dict[str, dict[str, Any]] = {
        "describe_error": {"settings": Settings(describe_error=describe)},
        "open_handler": {"open_handler": on_connection},
        "close_handler": {"close_handler": on_connection},
        "user_key": {"user_key": user_key},
    }
    options = all_options[function]
    secrets: dict[str, Any] = {"user": "u", "key": key} if function == "user_key" else {}

    async def main() -> None:
        async with open_server("127.0.0.1:0", fail, **options) as server:
            async with open_connection(server.addresses[0], **secrets) as connection:
                await connection.request([])

    def work() -> str:
        try:
            trio.run(main)
        except KeyboardInterrupt:
            return "interrupted"
        except RemoteError as exc:
            return f"answered: {exc!r}"
        return "nothing"

    assert in_child(work) == "interrupted"


def test_a_busy_handler_can_be_interrupted() -> None:
    async def spin(connection: Connection, request: list[bytes]) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            pass

    async def main() -> None:
        async with (
            open_server("127.0.0.1:0", spin) as server,
            open_connection(server.addresses[0]) as connection,
        ):
            await connection.request([])

    def work() -> str:
        try:
            trio.run(main)
        except KeyboardInterrupt:
            return "interrupted"
        return "nothing"

    assert in_child(work, patience=10) == "interrupted"


@pytest.mark.parametrize("mode", ["plain", "sealed"])
@pytest.mark.parametrize("askers", [1, 5])
def test_interrupts_at_random_times(mode: str, askers: int) -> None:  # noqa: PLR0915
    """A program catches Ctrl-C around each call and goes on; where it hits elsewhere, it begins anew."""

    def work() -> str:
        is_over = threading.Event()
        bad: list[str] = []
        survived = 0
        fired = [0]

        def fire() -> None:
            while not is_over.is_set():
                time.sleep(random.random() * 0.006)
                fired[0] += 1
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        async def ask(connection: Connection, end: float) -> None:
            nonlocal survived
            i = 0
            while time.monotonic() < end and not bad:
                i += 1
                what = CALLS[i % len(CALLS)] if i % 3 else "request"
                try:
                    with trio.fail_after(5):
                        await act(connection, what, i)
                except KeyboardInterrupt:
                    survived += 1
                except (trio.TooSlowError, RuntimeError, LookupError, AssertionError) as exc:
                    bad.append(repr(exc))

        async def main(end: float) -> None:
            key = Key.generate()
            secrets: dict[str, Any] = {"user": "u", "key": key} if mode == "sealed" else {}
            async with (
                open_server(
                    "127.0.0.1:0", echo, channel_handler=echo_items, user_key={"u": key} if secrets else None
                ) as server,
                open_connection(server.addresses[0], request_handler=echo, **secrets) as connection,
                trio.open_nursery() as nursery,
            ):
                for _ in range(askers - 1):
                    nursery.start_soon(ask, connection, end)
                await ask(connection, end)

        def find_bad(exc: BaseException) -> list[str]:
            if isinstance(exc, BaseExceptionGroup):
                return [text for inner in exc.exceptions for text in find_bad(inner)]
            if isinstance(exc, KeyboardInterrupt | BokbokError | trio.Cancelled):
                return []
            return ["".join(traceback.format_exception(exc))[-3000:]]

        end = time.monotonic() + INTERRUPT_SECONDS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        thread = threading.Thread(target=fire, daemon=True)
        thread.start()
        while not is_over.is_set():
            try:  # these lines are interrupted too
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                while time.monotonic() < end and not bad:
                    try:
                        trio.run(main, end)
                    except BaseException as exc:
                        bad += find_bad(exc)
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                is_over.set()
            except KeyboardInterrupt:
                pass
        thread.join()
        if bad:
            return "bad: " + "; ".join(bad[:3])
        return f"fine: {fired[0]} interrupts, {survived} of them in a call" if survived else "no interrupt"

    outcome = in_child(work, patience=15 + INTERRUPT_SECONDS)
    print(outcome)  # noqa: T201  (with -s)
    assert outcome.startswith("fine: "), outcome
