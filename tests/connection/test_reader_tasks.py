"""Which task reads, and which runs the handlers, whatever they wait for."""

from __future__ import annotations

import trio
import trio.testing

from bokbok_trio import Connection, RequestError, Settings, open_connection, open_server
from bokbok_trio.testing import MemoryListener
from tests.support.handlers import in_memory_and_over_sockets
from tests.support.helpers import open_peer, outcomes, packet, req, settle
from tests.support.inside import check_idle
from tests.support.tasks import count_reading_tasks


@in_memory_and_over_sockets
async def test_handlers_that_wait_for_nothing_run_in_the_task_that_reads_in_the_order_they_came(
    over_sockets: bool,
) -> None:
    ran: list[tuple[bytes, trio.lowlevel.Task]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        ran.append((request[0], trio.lowlevel.current_task()))
        if request[0] == b"2":
            raise RequestError("no")

    settings = Settings(max_requests=100)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(b"".join(req(1 + 2 * n, b"%d" % n) for n in range(50)))
        assert await outcomes(peer, 50) == {
            1 + 2 * n: b"request-error" if n == 2 else b"ok" for n in range(50)
        }
        await peer.stream.send_all(req(1, b"50"))
        await peer.receive()
        assert [field for field, _ in ran] == [b"%d" % n for n in range(51)]
        assert len({task for _, task in ran}) == 1
        await settle()
        await settle()
        check_idle(connection)


@in_memory_and_over_sockets
async def test_a_handler_that_waits_keeps_its_task_and_another_reads_on(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    tasks: dict[bytes, list[trio.lowlevel.Task]] = {}

    async def handler(connection: Connection, request: list[bytes]) -> None:
        [name] = request
        tasks[name] = [trio.lowlevel.current_task()]
        if name != b"now":
            await trio.sleep(1)
            tasks[name].append(trio.lowlevel.current_task())
            await trio.sleep(1)
            tasks[name].append(trio.lowlevel.current_task())

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"a") + req(3, b"now") + req(5, b"b"))
        assert await peer.receive() == packet_fields(b"ok", b"3")
        assert connection.statistics().handlers_running == 2
        await peer.stream.send_all(req(7, b"c"))
        assert await outcomes(peer, 3) == {1: b"ok", 5: b"ok", 7: b"ok"}
        assert trio.current_time() == 2
        assert all(len(set(each)) == 1 for each in tasks.values())
        assert len({each[0] for each in tasks.values()}) == 4
        await settle()
        check_idle(connection)


async def test_two_tasks_take_turns_where_each_handler_waits() -> None:
    tasks: list[trio.lowlevel.Task] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        tasks.append(trio.lowlevel.current_task())
        await trio.lowlevel.checkpoint()

    async with open_peer(handler) as (connection, peer):
        for n in range(6):
            await peer.stream.send_all(req(1 + 2 * n))
            assert (await peer.receive())[0] == b"ok"
            await settle()
        assert tasks == tasks[:2] * 3
        assert tasks[0] is not tasks[1]
        await settle()
        check_idle(connection)


async def test_of_the_tasks_whose_handlers_have_ended_one_waits_for_its_turn() -> None:
    may_end = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await may_end.wait()

    async with open_peer(handler, Settings(max_requests=9)) as (connection, peer):
        for n in range(5):  # each in a receive of its own, so that each is called by who reads
            await peer.stream.send_all(req(1 + 2 * n))
            await settle()
        assert count_reading_tasks() == 6
        may_end.set()
        await outcomes(peer, 5)
        await settle()
        assert count_reading_tasks() == 2
        await settle()
        check_idle(connection)
        await peer.stream.aclose()
        await settle()
        assert count_reading_tasks() == 0


def packet_fields(*fields: bytes) -> list[bytes]:
    """An answer without fields, as it arrives."""
    return [*fields, b"\0"]


async def test_one_task_reads_through_a_mixture_of_handlers() -> None:
    most = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal most
        most = max(most, count_reading_tasks())
        assert connection.statistics().handlers_running >= 1  # one called by the task that reads counts
        for _ in range(int(request[0])):
            await trio.lowlevel.checkpoint()

    async with open_peer(handler, Settings(max_requests=6)) as (connection, peer):
        for turn in range(20):
            waits = [(turn * n) % 4 for n in range(6)]
            await peer.stream.send_all(b"".join(req(1 + 2 * n, b"%d" % w) for n, w in enumerate(waits)))
            assert set((await outcomes(peer, 6)).values()) == {b"ok"}
        await settle()
        await settle()
        check_idle(connection)
    assert most <= 7


async def test_requests_wait_for_the_open_handler_and_all_are_handled_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    started: list[float] = []

    async def open_handler(connection: Connection) -> None:
        await trio.sleep(1)

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        started.append(trio.current_time())
        return request

    listener = MemoryListener()
    async with (
        open_server([listener], handler, open_handler=open_handler),
        open_connection(listener.connect()) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(10):
            nursery.start_soon(client.request, ["x"])
    assert started == [1] * 10


async def test_where_there_is_no_handler_what_comes_is_answered_before_and_after_one_that_waits() -> None:
    gate = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await gate.wait()

    chan = (
        packet(b"chan", b"1", b"", b"", b"", b"0", body=[]),
        packet(b"chan", b"5", b"", b"", b"", b"0", body=[]),
    )
    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(chan[0] + req(3) + chan[1])
        assert await outcomes(peer, 2) == {1: b"no-channel", 5: b"no-channel"}
        gate.set()
        assert await outcomes(peer, 1) == {3: b"ok"}
        await settle()
        await settle()
        check_idle(connection)
