"""Reconnecting connections: requests, also when their connection is lost."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Key,
    MessageTooLarge,
    ReconnectingConnection,
    RemoteError,
    Settings,
    open_reconnecting,
    open_server,
)

from ..support.helpers import close_in_one_step, echo, settle
from ..support.network import A, Network, drop

KEY = Key(bytes(range(32)))


async def test_requests_wait_for_the_next_connection_under_their_own_deadlines(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.extend(request)
        return await echo(connection, request)

    answers: list[list[bytes]] = []
    async with network.server(handler) as server, open_reconnecting(A) as client:
        async with trio.open_nursery() as nursery:
            listener = network.listeners.pop(A)
            await drop(server)
            assert client.connection is None

            async def ask(text: str) -> None:
                answers.append(await client.request([text]))

            nursery.start_soon(ask, "patient")
            with trio.move_on_after(1) as scope:
                await ask("impatient")
            assert scope.cancelled_caught
            assert trio.current_time() == 1
            network.listeners[A] = listener
        assert trio.current_time() == pytest.approx(1.4)
        assert answers == [[b"patient"]]
        assert ran == [b"patient"]


async def test_a_request_that_may_have_run_is_sent_again_only_if_idempotent(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.append(request[0])
        if len(ran) <= 2:
            await trio.sleep_forever()
        return await echo(connection, request)

    caught: list[ConnectionLost] = []
    answers: list[list[bytes]] = []
    async with network.server(handler) as server, open_reconnecting(A) as client:

        async def ask(text: str, **kwargs: Any) -> None:
            try:
                answers.append(await client.request([text], **kwargs))
            except ConnectionLost as exc:
                caught.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "once")
            nursery.start_soon(partial(ask, "any", idempotent=True))
            await settle()
            assert sorted(ran) == [b"any", b"once"]
            await drop(server)
    assert [exc.may_have_run for exc in caught] == [True]
    assert answers == [[b"any"]]
    assert ran[2:] == [b"any"]


async def test_a_request_that_certainly_did_not_run_is_sent_over_the_next_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """One is being handled, one waits for a slot: that one is not lost."""
    async with network.server(settings=Settings(max_requests=1)), open_reconnecting(A) as client:
        async with trio.open_nursery() as nursery:

            async def ask_for_long() -> None:
                with pytest.raises(ConnectionLost) as caught:
                    await client.request(["sleep", "inf"])
                assert caught.value.may_have_run

            nursery.start_soon(ask_for_long)
            await settle()
            nursery.start_soon(client.request, ["ping", "x"])
            await settle()
            await network.cut()
            nursery.start_soon(client.request, ["ping", "y"])


async def kill_on_request(connection: Connection, request: list[bytes]) -> list[bytes]:
    """A handler that some requests kill: the connection, as a server that crashes would."""
    await trio.lowlevel.checkpoint()
    if request[0] == b"poison":
        await close_in_one_step(connection)
        await trio.sleep_forever()
    return request


@pytest.mark.parametrize("max_repeats", [0, 1, 3])
async def test_a_request_that_kills_its_servers_is_repeated_a_bounded_number_of_times(
    max_repeats: int,
    network: Network,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed: list[float] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        killed.append(trio.current_time())
        return await kill_on_request(connection, request)

    async with network.server(handler), open_reconnecting(A, max_repeats=max_repeats) as client:
        with pytest.raises(ConnectionLost) as caught:
            await client.request([b"poison" + b"" * 100, "x"], idempotent=True)
    assert len(killed) == 1 + max_repeats
    assert caught.value.may_have_run
    assert isinstance(caught.value.__cause__, ConnectionLost)
    if max_repeats == 0:
        assert str(caught.value).startswith(
            "the request was sent once, and the connection was lost each time"
        )
        assert "was in flight" not in caplog.text
        return
    seconds = killed[-1] - killed[0]
    assert f"the request was sent {1 + max_repeats} times in {seconds:.1f} seconds" in str(caught.value)
    assert caplog.text.count("a request that begins with b'poison' was in flight on") == max_repeats
    gaps = [later - sooner for sooner, later in pairwise(killed)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 0.2 * 4 ** (max_repeats - 1)


async def test_others_use_the_connection_between_the_repeats(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    answered = 0
    async with network.server(kill_on_request), open_reconnecting(A) as client:

        async def ask_on() -> None:
            nonlocal answered
            while True:
                with suppress(ConnectionLost):
                    await client.request(["other"])
                    answered += 1
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_on)
            with pytest.raises(ConnectionLost):
                await client.request(["poison"], idempotent=True)
            nursery.cancel_scope.cancel()
    assert answered > 100


async def test_a_pause_between_repeats_ends_when_this_side_closes(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        network.server(kill_on_request),
        open_reconnecting(A) as client,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            with pytest.raises(ConnectionClosed):
                await client.request(["poison"], idempotent=True)

        nursery.start_soon(ask)
        await trio.sleep(0.7)  # in the second pause, of 0.8 s
        await client.aclose()
        await settle()
        assert nursery.child_tasks == frozenset()


@pytest.mark.parametrize(
    ("fields", "name"),
    [([], "without fields"), (["x" * 100], "that begins with b'" + "x" * 40 + "'"), ([b"\n"], r"b'\n'")],
)
async def test_the_request_is_named_in_the_log_in_short(
    network: Network,
    fields: list[Any],
    name: str,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await kill_on_request(connection, [b"poison"])

    async with network.server(handler), open_reconnecting(A, max_repeats=1) as client:
        with pytest.raises(ConnectionLost):
            await client.request(fields, idempotent=True)
    assert f"{name} was in flight on 2 connections" in caplog.text


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
@pytest.mark.parametrize("what", ["request", "channel"])
async def test_a_call_that_is_cancelled_before_it_begins_sends_nothing(how: str, what: str) -> None:
    ran: list[object] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        ran.append(request)

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await handler(connection, request)

    async with open_server("127.0.0.1:0", handler, channel_handler=channel_handler) as server:
        async with open_reconnecting(server.addresses[0]) as client:
            for _ in range(5):
                with trio.CancelScope() as scope:
                    if how == "cancelled":
                        scope.cancel()
                    else:  # it has passed, and Trio has not noticed yet
                        scope.deadline = trio.current_time()
                    if what == "request":
                        await client.request(["x"])
                    else:
                        async with client.open_channel(["x"]):
                            raise AssertionError
                assert scope.cancelled_caught
            await client.request(["last"])
    assert ran == [[b"last"]]


async def test_calls_from_another_run_are_refused() -> None:
    async with open_server("127.0.0.1:0", echo) as server, open_reconnecting(server.addresses[0]) as client:

        async def misuse() -> None:
            with pytest.raises(RuntimeError, match="another Trio run"):
                await client.request(["x"])
            with pytest.raises(RuntimeError, match="another Trio run"):
                async with client.open_channel(["x"]):
                    raise AssertionError
            with pytest.raises(RuntimeError, match="another Trio run"):
                await client.aclose()

        await trio.to_thread.run_sync(trio.run, misuse)
        assert await client.request(["x"]) == [b"x"]


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_connection_cut_at_any_step_neither_loses_nor_repeats_a_request(
    network: Network, sealed: bool, idempotent: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Cut after so many steps of the scheduler, from 0 until it would be done; with one slot of two."""
    keys: dict[str, Any] = {"user": "u", "key": KEY} if sealed else {}
    ran: list[bytes] = []
    outcomes: dict[bytes, object] = {}
    lost = answered = repeated = 0

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.extend(request)
        return await echo(connection, request)

    async def ask(client: ReconnectingConnection, name: bytes) -> None:
        try:
            outcomes[name] = await client.request([name], idempotent=idempotent)
        except ConnectionLost as exc:
            outcomes[name] = exc

    settings = Settings(max_requests=2)
    async with network.server(handler, user_key={"u": KEY} if sealed else None, settings=settings):
        for steps in range(25):
            async with open_reconnecting(A, **keys) as client:
                ran.clear()
                outcomes.clear()
                async with trio.open_nursery() as nursery:
                    for name in (b"1", b"2", b"3"):
                        nursery.start_soon(ask, client, name)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    await network.cut()
                    nursery.start_soon(ask, client, b"4")
            assert sorted(outcomes) == [b"1", b"2", b"3", b"4"]
            for name, outcome in outcomes.items():
                if isinstance(outcome, ConnectionLost):
                    assert not idempotent
                    assert outcome.may_have_run
                    assert ran.count(name) <= 1
                    lost += 1
                else:
                    assert outcome == [name]
                    assert ran.count(name) in ({1, 2} if idempotent else {1})
                    repeated += ran.count(name) == 2
                    answered += 1
    assert answered
    assert bool(lost) is not idempotent
    assert bool(repeated) is idempotent


@pytest.mark.parametrize("connected", [False, True])
async def test_a_request_cancelled_at_any_step_disturbs_nobody(
    network: Network, connected: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Cancelled after so many steps, from when there is no connection, or from when the next comes."""
    ran: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.extend(request)
        return await echo(connection, request)

    cancelled = 0
    rounds = 80 if connected else 5
    async with network.server(handler) as server:
        for steps in range(rounds):
            async with open_reconnecting(A) as client:
                await drop(server)
                assert client.connection is None
                ran.clear()
                async with trio.open_nursery() as nursery:
                    scope = trio.CancelScope()

                    async def mine(scope: trio.CancelScope, client: ReconnectingConnection) -> None:
                        with scope:
                            await client.request([b"mine"])

                    async def other(client: ReconnectingConnection) -> None:
                        assert await client.request([b"other"]) == [b"other"]

                    nursery.start_soon(mine, scope, client)
                    nursery.start_soon(other, client)
                    if connected:
                        await trio.sleep(0.2)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
                cancelled += scope.cancelled_caught
                assert ran.count(b"other") == 1
                assert ran.count(b"mine") <= 1
                await settle()
                assert client.connection
                assert client.connection.statistics().used_slots == 0
    assert (0 < cancelled < rounds) if connected else (cancelled == rounds)


async def test_errors_of_a_request_come_out_at_once(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server():
        async with open_reconnecting(A) as client:
            with pytest.raises(RemoteError, match="unknown request"):
                await client.request(["what?"], idempotent=True)
            with pytest.raises(MessageTooLarge):
                await client.request([bytes(2**23)], idempotent=True)
            await network.cut()
            await settle()
            assert client.connection is None
            started = trio.current_time()
            for fields, error in [("text", TypeError), ([7], TypeError), (["\ud800"], ValueError)]:
                with pytest.raises(error):
                    await client.request(fields)  # type: ignore[arg-type]
            assert trio.current_time() == started


async def test_fields_are_sent_as_they_were_when_it_was_asked(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(echo) as server, open_reconnecting(A) as client:
        await drop(server)
        fields = [bytearray(b"before")]
        answers: list[list[bytes]] = []

        async def ask() -> None:
            answers.append(await client.request(fields))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settle()
            fields[0][:] = b"after."
            fields.append(bytearray(b"more"))
    assert answers == [[b"before"]]
