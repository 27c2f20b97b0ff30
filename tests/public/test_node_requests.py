"""The package and the implementation in Node: requests, big messages and channels, either way."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import HandshakeError, MessageTooLarge, RemoteError, Settings

from ..support.helpers import packet
from ..support.node_peer import (
    SMALL_PIECES,
    Link,
    NodeError,
    NodeProcess,
    Role,
    digest,
    interrupted,
    nothing_in_flight,
    open_link,
    pattern,
    until,
    why_not,
)

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


# ---- requests ----


async def test_many_requests_at_once_both_ways(node: NodeProcess, role: Role, sealed: bool) -> None:
    answers: list[list[bytes]] = []
    settings = Settings(max_requests=5)
    async with open_link(node, role, sealed=sealed, settings=settings, maxRequests=3) as link:

        async def ask(function: Callable[..., Awaitable[list[bytes]]], text: str) -> None:
            answers.append(await function("back", "ping", text))

        async with trio.open_nursery() as nursery:
            for i in range(100):
                nursery.start_soon(ask, link.we_ask, f"ours {i}")
                nursery.start_soon(ask, link.node_asks, f"theirs {i}")
        expected = [[b"pong", b"%s %d" % (side, i)] for side in (b"ours", b"theirs") for i in range(100)]
        assert sorted(answers) == sorted(expected)
        await nothing_in_flight(link)


async def test_errors_arrive_whole(link: Link) -> None:
    with pytest.raises(RemoteError) as caught:
        await link.ours.request(["fail", "no-room", "the disk of zoë is full", bytes(range(256))])
    assert (caught.value.code, caught.value.message) == ("no-room", "the disk of zoë is full")
    assert caught.value.details == bytes(range(256))
    with pytest.raises(NodeError) as caught_there:
        await link.node_asks("fail", "no-room", "the disk is full", "\x00\xff" * 8192)
    assert (caught_there.value.name, caught_there.value.code) == ("RequestError", "no-room")
    assert caught_there.value.message == "the disk is full"
    assert caught_there.value.details == b"\x00\xff" * 8192
    with pytest.raises(RemoteError) as caught:
        await link.ours.request(["crash"])
    assert (caught.value.code, caught.value.message) == ("handler-error", "TypeError: this handler is broken")
    with pytest.raises(NodeError) as caught_there:
        await link.node_asks("crash")
    assert caught_there.value.code == "handler-error"
    with pytest.raises(RemoteError) as caught:
        await link.ours.request(["fail", "long", "ë" * 2000, ""])
    assert caught.value.message == "ë" * 1024  # 2,048 bytes
    with pytest.raises(RemoteError) as caught:
        await link.ours.request(["many", "256"])
    assert caught.value.code == "handler-error"
    await nothing_in_flight(link)


async def test_a_side_without_handlers_says_so(node: NodeProcess, role: Role, sealed: bool) -> None:
    async with open_link(node, role, sealed=sealed, handles=False) as link:
        with pytest.raises(RemoteError) as caught:
            await link.ours.request(["ping"])
        assert caught.value.code == "no-handler"
        with pytest.raises(RemoteError) as caught:
            async with link.ours.open_channel(["shout"]) as channel:
                await channel.answer()
        assert caught.value.code == "no-channel"
        assert await link.node_asks("ping") == [b"pong"]


async def test_cancelled_requests_are_cancelled_over_there(link: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.we_ask, "sleep", "60000")
        nursery.start_soon(link.we_ask, "stubborn", "40")
        await trio.testing.wait_all_tasks_blocked()
        await link.ours.request(["ping"])  # so the others have arrived
        nursery.cancel_scope.cancel()
    assert link.ours.statistics().requests_cancelled == 2  # their slots are taken until they are answered
    await nothing_in_flight(link)
    assert await link.node("ended") == ["Cancelled"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.node_asks, "sleep", "60000")
        await until(lambda: link.ours.statistics().handlers_running == 1)
        nursery.cancel_scope.cancel()
    await nothing_in_flight(link)
    assert interrupted == ["cancelled"]
    assert await link.node_asks("ping") == await link.ours.request(["ping"]) == [b"pong"]


async def test_deadlines_cross_the_wire(link: Link) -> None:
    for answer in (await link.ours.request(["about"]), await link.node_asks("about")):
        about = json.loads(answer[0])
        assert about.get("left", about.get("timeout")) is None
    with trio.fail_after(100):
        [answer_there] = await link.ours.request(["about"])
    assert 90e6 < json.loads(answer_there)["timeout"] <= 100e6
    [answer_here] = await link.node_asks("about", timeout=100)
    assert 90 < json.loads(answer_here)["left"] <= 100
    with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
        await link.ours.request(["sleep", "60000"])
    await nothing_in_flight(link)
    assert await link.node("ended") in (["Cancelled"], ["DeadlinePassed"])
    with pytest.raises(NodeError) as caught:
        await link.node_asks("sleep", "60000", timeout=0.05)
    assert caught.value.name in {"DeadlinePassed", "RequestError"}
    await nothing_in_flight(link)
    assert interrupted == ["cancelled"]
    [far] = await link.node_asks(
        "about", timeout=1e11
    )  # 10 to the 17th microseconds are the most that is said
    assert json.loads(far)["left"] is not None
    [farther] = await link.node_asks("about", timeout=1.1e11)
    assert json.loads(farther)["left"] is None


async def test_the_deadline_ends_a_handler(link: Link) -> None:
    # An asker whose own clock says nothing: only the handler's deadline ends it.
    ask = packet(
        b"req",
        b"1000000" if link.theirs["user"] is None else b"1000001",
        b"20000",
        b"",
        b"",
        body=[b"sleep", b"9999"],
    )
    await link.node_does("write", data=ask.decode("latin-1"))
    await until(lambda: interrupted == ["cancelled"])
    # The answer belongs to no request of Node's, so this is a protocol error that Node tells us.
    assert "aborted by this side: err with an id" in await link.node_does("finished")
    await link.ours.wait_closed()
    assert "err with an id" in str(link.ours.reason)


async def test_depths_and_contexts_arrive(link: Link) -> None:
    context = {"trace-id": "4bf9\u00ff", "lang": ""}
    [about] = await link.node_asks("about", context=context)
    assert json.loads(about)["context"] == context
    [about] = await link.ours.request(["about"], context={"trace-id": "4bf9", "lang": b""})
    assert json.loads(about)["context"] == {"trace-id": "4bf9", "lang": ""}
    for depth in (1, 2, 15):
        [about] = await link.ours.request(["back"] * depth + ["about"])
        assert json.loads(about)["depth"] == depth
        [about] = await link.node_asks(*["back"] * depth, "about")
        assert json.loads(about)["depth"] == depth
    with pytest.raises(RemoteError) as caught:
        await link.we_ask(*["back"] * 16, "ping")
    assert caught.value.code == "handler-error"
    with pytest.raises(NodeError) as caught_there:
        await link.node_asks(*["back"] * 16, "ping")
    assert caught_there.value.code == "handler-error"
    await nothing_in_flight(link)


async def test_nested_requests_need_no_slot_of_their_askers(
    node: NodeProcess, role: Role, sealed: bool
) -> None:
    async with open_link(node, role, sealed=sealed, settings=Settings(max_requests=1), maxRequests=1) as link:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(partial(link.we_ask, *["back"] * 15, "ping"))
                nursery.start_soon(partial(link.node_asks, *["back"] * 15, "ping"))
        await nothing_in_flight(link)


async def test_room_is_kept(node: NodeProcess, role: Role, sealed: bool) -> None:
    settings = Settings(max_message_size=50_000)
    big: dict[str, Any] = {"extra": 40_000, "digested": True}
    async with open_link(node, role, sealed=sealed, settings=settings, options={"room": "100000"}) as link:
        room = int(link.theirs["options"]["room"])
        assert room < 60 * 40_000  # so that they have to wait
        await node("most")
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(link.we_ask, "stubborn", "3", bytes(40_000))
            for _ in range(60):  # `busy` would be the answer to one too many
                nursery.start_soon(partial(link.node_asks, "stubborn", "3", **big))
            for _ in range(10):
                nursery.start_soon(link.we_ask, "ping")
        assert 40_000 < await node("most") <= 100_000
        await nothing_in_flight(link)


@pytest.mark.parametrize("value", ["", "x", "01"])
async def test_room_that_is_no_number_is_an_invalid_option(node: NodeProcess, role: Role, value: str) -> None:
    with pytest.raises((NodeError, HandshakeError)):
        async with open_link(node, role, sealed=True, options={"room": value}):
            pytest.fail("it was let in")


# ---- big messages ----


async def test_big_messages_travel_in_pieces(link: Link) -> None:
    size, whole = 1_000_001, pattern(1_000_001)
    [asked] = await link.ours.request(["digest", whole])
    assert asked.decode() == digest(whole)
    assert await link.ours.request(["pattern", str(size)]) == [whole]
    [asked] = await link.node_asks("digest", extra=size)
    assert asked.decode() == digest(whole)
    [answered] = await link.node_asks("pattern", str(size), digested=True)
    assert answered.decode() == digest(whole)
    async with trio.open_nursery() as nursery:
        for _ in range(6):  # more than may be in pieces at once
            nursery.start_soon(link.we_ask, "digest", bytes(200_000))
            nursery.start_soon(partial(link.node_asks, "digest", extra=200_000))
            nursery.start_soon(link.we_ask, "ping")
            nursery.start_soon(link.node_asks, "ping")
    await nothing_in_flight(link)


async def test_pieces_and_records_of_any_size(node: NodeProcess, role: Role, sealed: bool) -> None:
    async with open_link(node, role, sealed=sealed, **SMALL_PIECES) as link:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(partial(link.node_asks, "digest", extra=5_000))
                nursery.start_soon(link.we_ask, "pattern", "5000")
        async with link.ours.open_channel(["pour", "10", "2000"]) as channel:
            assert [len(fields[0]) async for fields in channel] == [2000] * 10
            assert await channel.answer() == [b"poured"]
        await nothing_in_flight(link)


async def test_a_big_request_is_dropped(link: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.we_ask, "digest", bytes(4_000_000))
        nursery.start_soon(partial(link.node_asks, "digest", extra=4_000_000))
        await trio.sleep(0.005)  # at any moment of it, all must be well
        nursery.cancel_scope.cancel()
    assert await link.node_asks("ping") == await link.ours.request(["ping"]) == [b"pong"]
    await nothing_in_flight(link)


async def test_what_does_not_fit_is_not_sent(node: NodeProcess, role: Role, sealed: bool) -> None:
    async with open_link(node, role, sealed=sealed, maxMessageSize=4096) as link:
        room = 4096 - 128
        size = room - 1 - 4 - 6 - 4  # less the count, and the sizes of two fields and `digest`
        expected = [digest(pattern(size)).encode()]
        assert await link.node_asks("digest", extra=size) == expected
        assert await link.ours.request(["digest", pattern(size)]) == expected
        with pytest.raises(NodeError, match="RangeError"):
            await link.node_asks("digest", extra=size + 1)
        with pytest.raises(MessageTooLarge):
            await link.ours.request(["digest", pattern(size + 1)])
        with pytest.raises(RemoteError) as caught:
            await link.ours.request(["pattern", "5000"])
        assert caught.value.code == "too-large"
        with pytest.raises(NodeError) as caught_there:
            await link.node_asks("pattern", "5000")
        assert caught_there.value.code == "too-large"
        for size in (3000, 4000):  # those that do not fit are left out
            expected_details = pattern(size) if size < room else b""
            with pytest.raises(RemoteError) as caught:
                await link.ours.request(["details", str(size)])
            assert caught.value.details == expected_details
            with pytest.raises(NodeError) as caught_there:
                await link.node_asks("details", str(size))
            assert caught_there.value.details == expected_details


# ---- channels ----


async def test_channels_of_ours(link: Link) -> None:
    async with link.ours.open_channel(["shout"]) as channel:
        await channel.send(["hello", "you"])
        assert await channel.receive() == [b"HELLO", b"YOU"]
        await channel.send([])
        assert await channel.receive() == []
        await channel.end()
        assert await channel.answer() == [b"2"]
    async with link.ours.open_channel(["pour", "100", "20000"]) as channel:  # far more than the credit
        items = [fields[0] async for fields in channel]
        assert items == [bytes([i]) * 20_000 for i in range(100)]
        assert await channel.answer() == [b"poured"]
    async with link.ours.open_channel(["swallow"]) as channel:
        for _ in range(2000):
            await channel.send([bytes(500)])
        await channel.send([bytes(1_000_000)])
        await channel.end()
        assert await channel.answer() == [b"2001", b"2000000"]
    await nothing_in_flight(link)


async def test_channels_of_node(link: Link) -> None:
    channel = await link.node_does("open", fields=["shout"])
    await link.node("send", **channel, fields=["hello"])
    assert await link.node("receive", **channel) == ["HELLO"]
    await link.node("end", **channel)
    assert await link.node("receive", **channel) is None
    assert await link.node("answer", **channel) == ["1"]
    channel = await link.node_does("open", fields=["pour", "100", "20000"])
    for i in range(100):
        [item] = await link.node("receive", **channel)
        assert item == chr(i) * 20_000
    assert await link.node("receive", **channel) is None
    assert await link.node("answer", **channel) == ["poured"]
    channel = await link.node_does("open", fields=["swallow"])
    for _ in range(30):
        await link.node("send", **channel, fields=["x" * 30_000])
    await link.node("end", **channel)
    assert await link.node("answer", **channel) == ["30", "900000"]
    await nothing_in_flight(link)


async def test_a_channel_is_left_early(link: Link) -> None:
    async with link.ours.open_channel(["hold"]):
        assert await link.ours.request(["ping"]) == [b"pong"]
    async with link.ours.open_channel(["pour", "1000", "20000"]) as channel:
        await channel.receive()
    await nothing_in_flight(link)
    assert await link.node("ended") == ["Cancelled"]
    for fields in (["hold"], ["pour", "1000", "20000"]):
        channel_there = await link.node_does("open", fields=fields)
        await link.node_asks("ping")
        await link.node("leave", **channel_there)
        with pytest.raises(NodeError, match="Cancelled"):
            await link.node("answer", **channel_there)
    await nothing_in_flight(link)
    assert interrupted == ["cancelled"]


async def test_a_reader_that_does_not_read_stops_the_writer(link: Link) -> None:
    sent = {"ours": 0, "theirs": 0}

    async def pour() -> None:
        async with link.ours.open_channel(["hold"]) as channel:
            while True:
                await channel.send([bytes(10_000)])
                sent["ours"] += 1

    async def pour_there() -> None:
        channel = await link.node_does("open", fields=["hold"])
        try:
            while True:
                await link.node("send", **channel, fields=["x" * 10_000])
                sent["theirs"] += 1
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await link.node("leave", **channel)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pour)
        nursery.start_soon(pour_there)
        taken = -(-262_144 // 10_069)  # an item takes its 10,000 bytes, 5 for the list of it, and 64
        await until(lambda: sent == {"ours": taken, "theirs": taken})
        assert await link.node_asks("ping") == await link.we_ask("ping") == [b"pong"]
        assert sent == {"ours": taken, "theirs": taken}
        nursery.cancel_scope.cancel()
    await nothing_in_flight(link)
