"""The package against an implementation in another language: real processes and sockets, both roles."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    AuthenticationError,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    MessageTooLarge,
    RemoteError,
    Settings,
    open_connection,
    open_server,
)

from ..support.helpers import RawPeer, echo, packet
from ..support.node_peer import (
    HOME,
    KEY,
    USER,
    Link,
    NodeError,
    NodeProcess,
    Role,
    digest,
    interrupted,
    node_process,
    open_link,
    pattern,
    where,
    why_not,
)

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

ROLES: list[Role] = ["node dials", "node listens"]
VECTORS = Path(__file__).parents[1] / "support" / "vectors.json"
HELLO = b"bokbok1\n" + packet(b"hello", b"server", b"plain", b"")
SMALL_PIECES: dict[str, Any] = {"wholeUpTo": 300, "pieceSize": 101, "recordSize": 37}
"""Settings for Node: packets in many pieces, and pieces in many records."""


@pytest.fixture(scope="module")
def process() -> Generator[NodeProcess]:
    with node_process() as process:
        yield process


@pytest.fixture
async def node(process: NodeProcess) -> AsyncGenerator[NodeProcess]:
    async with process.ready():
        await process("ended")
        interrupted.clear()
        yield process


@pytest.fixture(params=ROLES)
def role(request: pytest.FixtureRequest) -> Role:
    role: Role = request.param
    return role


@pytest.fixture
async def link(node: NodeProcess, role: Role, sealed: bool) -> AsyncGenerator[Link]:
    async with open_link(node, role, sealed=sealed) as link:
        yield link


async def until(condition: Any) -> None:
    """Wait for what another process does, which no clock of ours can know."""
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.002)


async def nothing_in_flight(link: Link) -> None:
    """Both sides know of no request any more."""
    with trio.fail_after(5):
        while True:
            counts = await link.node_does("counts")
            ours = link.ours.statistics()
            if ours.used_slots == ours.handlers_running == counts["asked"] == counts["theirs"] == 0:
                assert counts["handling"] == 0
                return


def test_node_holds_the_vectors() -> None:
    done = subprocess.run(
        ["node", HOME / "vectors.mjs", VECTORS], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    vectors = json.loads(VECTORS.read_text())
    for kind, checked in counts.items():
        name, _, part = kind.partition(".")
        if name in vectors and kind != "records.stream":  # the others are one vector, or two
            assert checked == len(vectors[name][part] if part else vectors[name])
    sections = {kind.split(".")[0] for kind in counts}
    assert sections == set(vectors) - {"about", "magic", "sealed", "plain"} | {"handshakes"}


# ---- handshake ----


@pytest.mark.parametrize("over", ["tcp", "unix"])
async def test_they_connect(node: NodeProcess, role: Role, sealed: bool, over: str, tmp_path: Path) -> None:
    path = str(tmp_path / "socket") if over == "unix" else None
    service = "maps" if sealed else ""
    settings = Settings(max_message_size=70_000, max_requests=7)
    async with open_link(node, role, sealed=sealed, path=path, service=service, settings=settings) as link:
        assert link.ours.encrypted == sealed
        assert link.ours.user == (USER if sealed else None)
        assert link.theirs["user"] == (None if role == "node dials" else USER if sealed else "")
        assert (link.theirs["maxMessageSize"], link.theirs["maxRequests"]) == (70_000, 7)
        assert link.theirs["limit"] == 70_000
        assert await link.ours.request(["ping", "1"]) == [b"pong", b"1"]
        assert await link.node_asks("ping", "2") == [b"pong", b"2"]


async def test_unknown_options_are_ignored_and_grease_is_sent(
    node: NodeProcess, role: Role, sealed: bool
) -> None:
    options = {"example/1": "\x00\xff", "a": ""}
    async with open_link(node, role, sealed=sealed, options=options) as link:
        assert await link.ours.request(["ping"]) == [b"pong"]
        ours = link.theirs["options"]
        [grease] = [name for name in ours if name.startswith("grease.")]
        assert re.fullmatch(r"grease\.[0-9a-f]{4}", grease)
        assert len(ours[grease]) <= 8


WRONG = [{"key": "00" * 32}, {"user": "nobody"}, {"service": "other"}]


async def test_our_server_refuses_node(node: NodeProcess) -> None:
    async def dial(wrong: dict[str, str]) -> None:
        with pytest.raises(NodeError) as caught:
            await node("connect", **where(server.addresses[0]), **{"user": USER, "key": KEY, **wrong})
        assert (caught.value.name, caught.value.code) == ("Refused", "authentication")

    async with open_server("127.0.0.1:0", echo, user_key={USER: Key(bytes.fromhex(KEY))}) as server:
        async with trio.open_nursery() as nursery:
            for wrong in WRONG:  # at once, as each of them has to wait for half a second
                nursery.start_soon(dial, wrong)


async def test_a_node_server_refuses_us(node: NodeProcess) -> None:
    async def dial(wrong: dict[str, str]) -> None:
        right: dict[str, Any] = {"user": USER, "key": KEY, **wrong}
        key = Key(bytes.fromhex(right.pop("key")))
        with pytest.raises(AuthenticationError):
            async with open_connection(f"127.0.0.1:{listening['port']}", key=key, **right):
                pytest.fail("it was let in")

    listening = await node("listen", host="127.0.0.1", port=0, users={USER: [KEY]})
    async with trio.open_nursery() as nursery:
        for wrong in WRONG:
            nursery.start_soon(dial, wrong)
    assert (await node("accept", listener=listening["listener"]))["failed"]
    await node("unlisten", listener=listening["listener"])


@pytest.mark.parametrize("code", ["busy", "stopping"])
async def test_refusals_arrive(node: NodeProcess, sealed: bool, code: str) -> None:
    with pytest.raises(ConnectionRefused) as caught:
        async with open_link(node, "node listens", sealed=sealed, refuse=[code, "not now"]):
            pytest.fail("it was let in")
    assert (caught.value.code, str(caught.value).count("not now")) == (code, 1)


async def test_a_full_server_tells_node(node: NodeProcess, sealed: bool) -> None:
    async with open_link(node, "node dials", sealed=sealed, settings=Settings(max_connections=1)) as link:
        with pytest.raises(NodeError) as caught:
            await link.node("connect", **link.dialled)
        assert (caught.value.name, caught.value.code) == ("Refused", "busy")


async def test_modes_that_differ_end_the_handshake(node: NodeProcess, sealed: bool) -> None:
    keys = {USER: Key(bytes.fromhex(KEY))} if sealed else None
    mode = "plain" if sealed else "sealed"
    async with open_server("127.0.0.1:0", echo, user_key=keys) as server:
        with pytest.raises(NodeError):
            await node("connect", **where(server.addresses[0]), mode=mode, user=USER, key=KEY)
    listening = await node("listen", host="127.0.0.1", port=0, users={USER: [KEY]}, mode=mode)
    credentials: dict[str, Any] = {"user": USER, "key": Key(bytes.fromhex(KEY))} if sealed else {}
    with pytest.raises(HandshakeError):
        async with open_connection(f"127.0.0.1:{listening['port']}", **credentials):
            pytest.fail("they understood each other")
    await node("unlisten", listener=listening["listener"])


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


# ---- signs of life, draining, closing ----


async def test_pings_are_answered(link: Link) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(link.ours.ping)
            nursery.start_soon(link.node_does, "ping")


async def test_we_drain(link: Link) -> None:
    answers: list[list[bytes]] = []

    async def ask(*fields: str) -> None:
        answers.append(await link.ours.request(fields))

    async def ask_there(*fields: str) -> None:
        answers.append(await link.node_asks(*fields))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "back", "sleep", "60")  # needs a deeper one, both ways, while it drains
        nursery.start_soon(ask_there, "back", "sleep", "60")
        await until(lambda: link.ours.statistics().handlers_running == 2)
        link.ours.drain()
        with pytest.raises(NodeError) as caught:
            await link.node_asks("ping")
        assert (caught.value.name, caught.value.may_have_run) == ("ConnectionLost", False)
    assert answers == [[b"slept"]] * 2
    assert await link.node_does("finished") == "closed by the other side"
    await link.ours.wait_closed()


async def test_node_drains(link: Link) -> None:
    answers: list[list[bytes]] = []

    async def ask(*fields: str) -> None:
        answers.append(await link.ours.request(fields))

    async def drain() -> None:
        assert await link.node_does("drain") == "drained"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "back", "sleep", "60")
        await until(lambda: link.ours.statistics().handlers_running == 1)
        nursery.start_soon(drain)
        await link.ours.draining.wait()
        with pytest.raises(ConnectionLost) as caught:
            await link.ours.request(["ping"])
        assert not caught.value.may_have_run
    assert answers == [[b"slept"]]
    await link.ours.wait_closed()


async def test_both_drain(link: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.we_ask, "sleep", "30")
        nursery.start_soon(link.node_asks, "sleep", "30")
        await until(lambda: link.ours.statistics().handlers_running == 1)
        link.ours.drain()
        nursery.start_soon(link.node_does, "drain")
    await link.ours.wait_closed()
    assert await link.node_does("finished") in {"drained", "closed by the other side"}


async def test_we_close(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    async def is_lost() -> None:
        with pytest.raises(NodeError) as caught:
            await link.node_asks("sleep", "60000")
        assert (caught.value.name, caught.value.may_have_run) == ("ConnectionLost", True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(is_lost)
        await until(lambda: link.ours.statistics().handlers_running == 1)
        with trio.fail_after(0.5):  # it does not wait for long, as Node closes too
            await link.ours.aclose()
    assert await link.node_does("finished") == "closed by the other side"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_node_closes(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    async def is_lost() -> None:
        with pytest.raises(ConnectionLost) as caught:
            await link.ours.request(["sleep", "60000"])
        assert caught.value.may_have_run

    async with trio.open_nursery() as nursery:
        nursery.start_soon(is_lost)
        nursery.start_soon(link.node_asks, "ping")
        await until(lambda: link.ours.statistics().used_slots == 1)
        await link.ours.request(["ping"])  # so the other request has arrived
        with trio.fail_after(0.5):
            assert await link.node_does("close") == "closed by this side"
    await link.ours.wait_closed()
    assert await link.node("ended") == ["Cancelled"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_cut_is_told_from_a_close(node: NodeProcess, role: Role) -> None:
    async with open_link(node, role, sealed=True) as link:
        await link.node_does("cut")
        await link.ours.wait_closed()
        assert "closed" not in str(link.ours.reason)


# ---- errors ----


async def test_what_node_must_not_send_is_answered_by_abort(node: NodeProcess) -> None:
    connection = json.loads(VECTORS.read_text())["connection"]
    settings = Settings(max_message_size=connection["max_message_size"])
    for vector in connection["bad"]:
        async with open_link(node, "node dials", sealed=False, settings=settings) as link:
            await link.node_does("write", data=bytes.fromhex(vector["packet"]).decode("latin-1"))
            finished = await link.node_does("finished")
            if "abort" in vector["name"]:
                assert finished == "closed by the other side", vector
            else:
                assert finished.startswith("aborted by the other side: protocol: "), vector
            await link.ours.wait_closed()


async def test_what_node_must_not_receive_is_answered_by_abort(node: NodeProcess) -> None:
    connection = json.loads(VECTORS.read_text())["connection"]
    size, requests = connection["max_message_size"], connection["max_requests"]
    listening = await node(
        "listen", host="127.0.0.1", port=0, mode="plain", maxMessageSize=size, maxRequests=requests
    )
    for vector in connection["bad"]:
        peer = RawPeer(await trio.open_tcp_stream("127.0.0.1", listening["port"]))
        async with peer.stream:
            open = packet(b"open", b"", b"4294967295", b"1", b"\0", b"", b"")
            await peer.stream.send_all(HELLO.replace(b"server", b"client") + open)
            hello = b""
            while len(hello) < len(HELLO):
                hello += await peer.stream.receive_some(len(HELLO) - len(hello))
            assert hello == HELLO
            assert (await peer.receive())[0] == b"accepted"
            await peer.stream.send_all(bytes.fromhex(vector["packet"]))
            if "abort" not in vector["name"]:
                kind, code, _message = await peer.receive()
                assert (kind, code) == (b"abort", b"protocol"), vector
            assert await peer.stream.receive_some() == b"", vector
        described = await node("accept", listener=listening["listener"])
        reason = await node("finished", connection=described["connection"])
        assert reason.startswith(("aborted by this side", "malformed abort")), vector
    await node("unlisten", listener=listening["listener"])


@pytest.mark.parametrize("data", [b"\0\x10" + bytes(16), b"\0\x0f" + bytes(15)])
async def test_records_that_do_not_open_end_the_connection(
    node: NodeProcess, role: Role, data: bytes
) -> None:
    async with open_link(node, role, sealed=True) as link:
        await link.node_does("raw", data=data.decode("latin-1"))
        await link.ours.wait_closed()
        assert (await link.node_does("finished")).startswith("lost: ")  # no abort, no end record


async def test_more_than_was_granted_is_refused(node: NodeProcess) -> None:
    """Slots and credit, by packets that are right but for their number."""

    async def write(*packets: bytes) -> str:
        async with open_link(node, "node dials", sealed=True, settings=Settings(max_requests=3)) as link:
            await link.node_does("write", data=b"".join(packets).decode("latin-1"))
            finished: str = await link.node_does("finished")
            return finished

    def sleep(id: int, depth: bytes = b"") -> bytes:
        return packet(b"req", b"%d" % id, b"", depth, b"", body=[b"sleep", b"60000"])

    assert "of depth" in await write(*(sleep(2 * i) for i in range(4)))
    others = [sleep(2 * i, depth) for i, depth in enumerate([b""] * 3 + [b"1"] * 3 + [b"15"] * 3)]
    assert "of depth" in await write(*others, sleep(18, b"1"))
    channel = packet(b"chan", b"0", b"", b"", b"", b"0", body=[b"hold"])
    assert "without credit" in await write(channel, packet(b"item", b"0", body=[]))
    assert "credit" in await write(channel, packet(b"credit", b"0", b"4294967296"))
    assert "pieces" in await write(*(packet(b"part", b"%d" % i, b"1000", b"x") for i in range(5)))


# ---- a rogue ----


@pytest.mark.parametrize("seed", range(6))
async def test_a_rogue_harms_only_itself(
    node: NodeProcess, role: Role, sealed: bool, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Node breaks the protocol at random points of all that it can do."""
    async with open_link(
        node, role, sealed=sealed, spoil={"seed": seed, "oneIn": 12}, **SMALL_PIECES
    ) as link:
        with trio.fail_after(5):
            await use_it_all(link)
            await link.node_does("cut")
            await link.ours.wait_closed()
    for record in caplog.records:  # handlers may fail, as what they are asked may be spoiled too
        assert record.levelno < logging.ERROR or "handler" in record.getMessage(), record.getMessage()
    async with open_link(node, role, sealed=sealed) as link:
        assert await link.ours.request(["ping"]) == await link.node_asks("ping") == [b"pong"]


async def use_it_all(link: Link) -> None:
    """Ask all kinds of things both ways until the connection is over, or all are answered."""

    async def try_to(function: Any, *arguments: Any, **options: Any) -> None:
        with suppress(ConnectionLost, RemoteError, NodeError, trio.BrokenResourceError):
            await function(*arguments, **options)

    async def shout() -> None:
        async with link.ours.open_channel(["shout"]) as channel:
            for _ in range(5):
                await channel.send(["x" * 100])
                await channel.receive()

    async def shout_there() -> None:
        channel = await link.node_does("open", fields=["shout"])
        for _ in range(5):
            await link.node("send", **channel, fields=["x" * 100])
            await link.node("receive", **channel)
        await link.node("leave", **channel)

    with trio.move_on_after(0.5):  # what was spoiled may be what somebody waits for
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(try_to, shout)
                nursery.start_soon(try_to, shout_there)
                for fields in (["ping"], ["back", "back", "ping"], ["digest", "x" * 2000], ["pattern", "9"]):
                    nursery.start_soon(try_to, link.we_ask, *fields)
                    nursery.start_soon(try_to, link.node_asks, *fields)
