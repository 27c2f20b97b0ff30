"""`start_eagerly` alone under Trio, and by handlers, which run as in tasks of their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, RemoteError
from bokbok_trio._connection.eager import start_eagerly
from bokbok_trio.testing import open_connection_pair
from tests.support.handlers import cancelled_in_its_handler
from tests.support.pairs import open_pair, over_all_ways, settle

NAME: ContextVar[str] = ContextVar("NAME", default="nobody")
THING: ContextVar[object] = ContextVar("THING")


async def run_eagerly(work: Coroutine[Any, Any, None], context: Context | None = None) -> bool:
    """Start eagerly, and give the task the context when the work waits, as the reader does."""
    own = copy_context() if context is None else context

    def take_over() -> None:
        trio.lowlevel.current_task().context = own

    return await start_eagerly(work, own, take_over)


# ---- alone ----


async def test_work_that_does_not_wait_takes_no_turn_of_the_loop() -> None:
    seen: list[str] = []

    async def work() -> None:
        seen.append("ran")

    def complain() -> None:
        raise AssertionError("it did not wait")

    with trio.testing.assert_no_checkpoints():
        assert not await start_eagerly(work(), copy_context(), complain)
    assert seen == ["ran"]


async def test_work_that_waits_is_gone_on_with(autojump_clock: MockClock) -> None:
    seen: list[object] = []

    async def work() -> None:
        seen.append(trio.lowlevel.current_task())
        for _ in range(3):
            await trio.sleep(1)
            seen.append(trio.lowlevel.current_task())

    assert await run_eagerly(work())
    assert seen == [trio.lowlevel.current_task()] * 4
    assert trio.current_time() == 3


async def test_on_first_wait_is_called_once() -> None:
    calls: list[None] = []

    async def work() -> None:
        for _ in range(5):
            await trio.lowlevel.checkpoint()

    assert await start_eagerly(work(), copy_context(), lambda: calls.append(None))
    assert calls == [None]


async def test_the_works_variables_are_its_own_before_and_after_its_first_wait() -> None:
    seen: list[str] = []

    async def work() -> None:
        NAME.set("work")
        await trio.lowlevel.checkpoint()
        seen.append(NAME.get())
        seen.append(await trio.to_thread.run_sync(NAME.get))
        NAME.set("still work")
        await trio.lowlevel.checkpoint()
        seen.append(NAME.get())

    own = trio.lowlevel.current_task().context
    context = copy_context()
    assert await run_eagerly(work(), context)
    assert seen == ["work", "work", "still work"]
    assert context[NAME] == "still work"
    assert NAME not in own
    trio.lowlevel.current_task().context = own


async def test_work_that_does_not_wait_leaves_the_tasks_variables_alone() -> None:
    async def work() -> None:
        NAME.set("work")

    await run_eagerly(work())
    assert NAME.get() == "nobody"


@pytest.mark.parametrize("waits", [0, 1, 2])
async def test_what_the_work_raises_comes_out(waits: int) -> None:
    async def work() -> None:
        for _ in range(waits):
            await trio.lowlevel.checkpoint()
        raise ValueError("from within")

    with pytest.raises(ValueError, match="from within"):
        await run_eagerly(work())


async def test_an_error_at_the_first_wait_reaches_the_work() -> None:
    async def wait_for_what_fails() -> None:
        task = trio.lowlevel.current_task()

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            return trio.lowlevel.Abort.FAILED

        trio.lowlevel.current_trio_token().run_sync_soon(
            lambda: trio.lowlevel.reschedule(task, outcome_error)
        )
        await trio.lowlevel.wait_task_rescheduled(abort)

    import outcome  # noqa: PLC0415  (Trio's own dependency, of which only this test needs something)

    outcome_error = outcome.Error(KeyError("at the first wait"))
    seen: list[str] = []

    async def work() -> None:
        try:
            await wait_for_what_fails()
        except KeyError:
            seen.append("caught")
        await trio.lowlevel.checkpoint()
        seen.append("went on")

    assert await run_eagerly(work())
    assert seen == ["caught", "went on"]


@pytest.mark.parametrize("catches", [True, False])
async def test_work_that_is_cancelled_at_its_first_wait(catches: bool) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            seen.append("cancelled")
            if not catches:
                raise
        finally:
            seen.append("cleaned up")

    with trio.CancelScope() as scope:
        scope.cancel()
        await run_eagerly(work())
    assert seen == ["cancelled", "cleaned up"]
    assert scope.cancelled_caught is not catches


@pytest.mark.parametrize("fails_too", [True, False])
async def test_where_on_first_wait_raises_the_work_is_not_abandoned(fails_too: bool) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await trio.lowlevel.checkpoint()
            seen.append("went on")
            await trio.lowlevel.checkpoint()
            if fails_too:
                raise ValueError("of the work")
        finally:
            seen.append("ended")

    def fail() -> None:
        raise LookupError("of on_first_wait")

    with pytest.raises(ValueError if fails_too else LookupError):
        await start_eagerly(work(), copy_context(), fail)
    assert seen == ["went on", "ended"]


async def test_the_frames_of_work_that_waits_are_the_tasks() -> None:
    async def inner() -> None:
        await trio.sleep_forever()

    async def work() -> None:
        await inner()

    async def run() -> None:
        await run_eagerly(work())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        (task,) = nursery.child_tasks
        names = frame_names(task)
        assert names[names.index("work") :][:2] == ["work", "inner"]
        assert names.index("work") > names.index("run_eagerly")
        nursery.cancel_scope.cancel()


async def test_work_that_was_given_up_can_be_closed() -> None:
    """The garbage collector does so at the end of a run that crashed."""
    seen: list[str] = []

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            seen.append("closed")

    coroutine = start_eagerly(work(), copy_context(), lambda: None)
    coroutine.__await__().send(None) if hasattr(coroutine, "__await__") else coroutine.send(None)
    del coroutine
    gc.collect()
    assert seen == ["closed"]


def frame_names(task: trio.lowlevel.Task) -> list[str]:
    return [frame.f_code.co_name for frame, _line in task.iter_await_frames()]


# ---- handlers ----


@over_all_ways
async def test_a_handlers_variables_are_its_own(way: str) -> None:
    seen: dict[bytes, list[str]] = {}

    async def handler(connection: Connection, request: list[bytes]) -> None:
        name = request[0]
        see = seen.setdefault(name, []).append
        see(NAME.get())
        NAME.set(name.decode())
        see(NAME.get())
        for _ in range(3):
            await trio.sleep(0.001)
            see(NAME.get())
        see(await trio.to_thread.run_sync(NAME.get))

        async def get() -> str:
            return NAME.get()

        see(await trio.to_thread.run_sync(trio.from_thread.run, get))
        see(await trio.to_thread.run_sync(trio.from_thread.run_sync, NAME.get))

    async with open_pair(way, None, handler) as (client, _), trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(client.request, [f"handler {i}"])
    assert seen == {b"handler %d" % i: ["nobody", *[f"handler {i}"] * 7] for i in range(20)}


@pytest.mark.parametrize("waits", [False, True])
async def test_what_one_handler_sets_no_later_one_sees(waits: bool) -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        seen.append(NAME.get())
        NAME.set("a handler")
        if waits:
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await handler(connection, request)

    async with open_pair("tcp plain", None, handler, server_channel_handler=channel_handler) as (client, _):
        for _ in range(5):
            await client.request([])
            async with client.open_channel([]) as channel:
                await channel.answer()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(client.request, [])
    assert seen == ["nobody"] * 30


async def test_handlers_see_the_variables_of_whoever_opened_the_connection() -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        seen.append(NAME.get())
        await trio.lowlevel.checkpoint()
        seen.append(NAME.get())

    token = NAME.set("opener")
    async with open_connection_pair(handler, None) as (_, server):
        NAME.reset(token)
        for _ in range(3):
            await server.request([])
    assert seen == ["opener"] * 6


@over_all_ways
async def test_a_handlers_task_is_the_same_all_along(way: str) -> None:
    tasks: list[list[object]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        mine: list[object] = [trio.lowlevel.current_task()]
        tasks.append(mine)
        for _ in range(3):
            await trio.sleep(0.001)
            mine.append(trio.lowlevel.current_task())

    async with open_pair(way, None, handler) as (client, _), trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(client.request, [])
    assert len(tasks) == 10
    assert all(len(set(mine)) == 1 for mine in tasks)


@over_all_ways
async def test_handlers_that_wait_at_once_have_tasks_names_and_frames_of_their_own(way: str) -> None:
    waiting: list[trio.lowlevel.Task] = []
    may_end = trio.Event()

    async def wait_for_permission() -> None:
        waiting.append(trio.lowlevel.current_task())
        await may_end.wait()

    async def my_handler(connection: Connection, request: list[bytes]) -> None:
        await wait_for_permission()

    async def my_channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await wait_for_permission()

    async with open_pair(way, None, my_handler, server_channel_handler=my_channel_handler) as (
        client,
        server,
    ):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(client.request, [])
            await settle(client, server)
            async with client.open_channel([]) as channel:
                await settle(client, server)
                assert len(set(waiting)) == 4
                for task in waiting[:3]:
                    assert "my_handler" in task.name
                    assert "request" in task.name
                    names = frame_names(task)
                    assert names[names.index("my_handler") :][:2] == ["my_handler", "wait_for_permission"]
                assert "my_channel_handler" in waiting[3].name
                assert "my_channel_handler" in frame_names(waiting[3])
                assert len({task.name for task in waiting}) == 4
                may_end.set()
                await channel.answer()
        await settle(client, server)
        everybody = [task.name for task in all_tasks_of_the_run()]
        assert not [name for name in everybody if "my_" in name], (
            "a task kept the name of a handler that ended"
        )


def all_tasks_of_the_run() -> list[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    return [task for nursery in root.child_nurseries for task in all_tasks(nursery)]


def all_tasks(nursery: trio.Nursery) -> list[trio.lowlevel.Task]:
    found: list[trio.lowlevel.Task] = []
    for task in nursery.child_tasks:
        found.append(task)
        for inner in task.child_nurseries:
            found += all_tasks(inner)
    return found


class Oops(Exception):
    """An exception of a handler."""


@over_all_ways
@pytest.mark.parametrize("waits", [0, 1, 2])
async def test_a_handler_that_fails_at_any_moment_is_answered_and_the_next_one_runs(
    way: str, waits: int
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        for _ in range(waits):
            await trio.lowlevel.checkpoint()
        raise Oops("of the handler")

    async with open_pair(way, None, handler) as (client, _):
        for _ in range(3):
            with trio.fail_after(5), pytest.raises(RemoteError, match="Oops: of the handler"):
                await client.request([])


@over_all_ways
async def test_a_handler_that_is_cancelled_at_its_first_wait_cleans_up_and_others_go_on(way: str) -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request:
            return request
        with trio.CancelScope() as own:
            own.cancel()
            try:
                await trio.sleep_forever()
            finally:
                seen.append("cleaned up")
        return [b"own" if own.cancelled_caught else b"other"]

    async with open_pair(way, None, handler) as (client, _):
        for _ in range(5):
            with trio.fail_after(5):
                assert await client.request([]) == [b"own"]
                assert await client.request(["x"]) == [b"x"]
    assert seen == ["cleaned up"] * 5


@over_all_ways
@pytest.mark.parametrize("shields", [True, False])
async def test_a_cancel_from_the_asker_at_any_wait_reaches_only_that_handler(way: str, shields: bool) -> None:
    ended: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        try:
            await trio.sleep_forever() if request[0] == b"wait" else await trio.sleep(0.01)
        finally:
            if shields:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    await trio.sleep(0.005)
            ended.append(request[0])
        return request

    async with open_pair(way, None, handler) as (client, server):
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, ["wait"])
                nursery.start_soon(client.request, ["wait"])
                await settle(client, server)
                with trio.fail_after(5):
                    assert await client.request(["short"]) == [b"short"]
                nursery.cancel_scope.cancel()
            with trio.fail_after(5):
                assert await client.request(["short"]) == [b"short"]
        await trio.sleep(0.02)
        await settle(client, server)
        assert sorted(ended) == [b"short"] * 10 + [b"wait"] * 10


@over_all_ways
async def test_a_handler_that_was_cancelled_leaves_neither_name_nor_variables_behind(way: str) -> None:
    class Held:
        """A value of a context variable."""

    held: list[weakref.ref[Held]] = []

    async def my_handler(connection: Connection, request: list[bytes]) -> None:
        thing = Held()
        held.append(weakref.ref(thing))
        THING.set(thing)
        del thing
        await trio.sleep_forever()

    async with open_pair(way, None, my_handler) as (client, server):
        async with cancelled_in_its_handler(server):
            await client.request([])
        while server.statistics().handlers_running:
            await trio.sleep(0.001)
        await settle(client, server)
        names = [task.name for task in all_tasks_of_the_run()]
        assert not [name for name in names if "my_handler" in name]
        gc.collect()
        assert [ref() for ref in held] == [None]
