"""The package and the implementation in Node: bad packets of each, and a rogue."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import ConnectionLost, RemoteError, Settings

from ..support.helpers import RawPeer, packet
from ..support.node_peer import SMALL_PIECES, Link, NodeError, NodeProcess, Role, open_link, why_not

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


VECTORS = Path(__file__).parents[1] / "support" / "vectors.json"

HELLO = b"bokbok1\n" + packet(b"hello", b"server", b"plain", b"")


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
