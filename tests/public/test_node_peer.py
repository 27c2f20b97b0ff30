"""The package against an implementation in another language, in both roles: from hello to goodbye."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import (
    AuthenticationError,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    Settings,
    open_connection,
    open_server,
)

from ..support.helpers import echo
from ..support.node_peer import (
    HOME,
    KEY,
    USER,
    Link,
    NodeError,
    NodeProcess,
    Role,
    open_link,
    until,
    where,
    why_not,
)

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


VECTORS = Path(__file__).parents[1] / "support" / "vectors.json"


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
