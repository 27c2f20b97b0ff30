"""Connections open, in memory and over sockets, and no side reads too far."""

from __future__ import annotations

from collections import UserList
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import AuthenticationError, HandshakeError, Key, Settings
from bokbok_trio._keys import MAX_KEYS
from bokbok_trio._protocol.handshake import ClientHandshake, ServerHandshake
from bokbok_trio._stream.handshake_io import MAX_EARLY_RECORD_SIZE, MAX_PACKET_SIZE, NothingCame
from bokbok_trio._stream.records import HEADER_SIZE
from tests.support.establishing import (
    LIMITS,
    OTHER,
    STRANGER_SIZE,
    K,
    Mode,
    Side,
    as_client,
    as_server,
    as_side,
    check_both_ways,
    end_of,
    enter_as_client,
    in_both_modes,
    make_hello,
    make_wires,
    meet,
    never_admit,
    on_both_sides,
    open_sockets,
    over,
    receive_exactly,
)
from tests.support.inside import take_few
from tests.support.sealed import seal

pytestmark = pytest.mark.usefixtures("fixed_grease")

# ---- it opens ----


@in_both_modes
@pytest.mark.parametrize("most", [None, 1])
async def test_a_connection_opens(mode: Mode, most: int | None, autojump_clock: MockClock) -> None:
    wires = make_wires({"most": most}, {"most": most})
    client, server = await meet(
        wires,
        mode,
        client={"settings": Settings(max_message_size=5000, max_requests=7)},
        server={"settings": Settings(max_message_size=6000, max_requests=8)},
    )
    user = "myuser" if mode == "sealed" else None
    for ending, peer_max_requests in ((client, 8), (server, 7)):
        assert ending.seconds == 0
        assert ending.opened.user == user
        assert ending.opened.key_fingerprint == (K.fingerprint if mode == "sealed" else None)
        assert ending.opened.max_message_size == 5000
        assert ending.opened.peer_max_requests == peer_max_requests
    for wire in wires:
        wire.most = None
    await check_both_ways(client.opened, server.opened)


async def key_of(user: str) -> Key:
    assert user == "myuser"
    return K


async def keys_of(_user: str) -> list[Key]:
    return [OTHER, K]


class MappingThatIsCalled(dict[str, Key]):
    async def __call__(self, user: str) -> Key:
        return await key_of(user)


@pytest.mark.parametrize(
    "user_key",
    [
        {"myuser": K},
        {"myuser": [OTHER, K]},
        {"myuser": (OTHER, K)},
        {"myuser": UserList([OTHER, K])},
        key_of,
        keys_of,
        MappingThatIsCalled(),
    ],
)
async def test_a_key_is_found_in_a_mapping_or_by_a_function(user_key: Any, autojump_clock: MockClock) -> None:
    client, server = await meet(make_wires(), server={"user_key": user_key})
    assert server.opened.user == "myuser"
    await check_both_ways(client.opened, server.opened)


async def test_keys_that_are_never_tried_are_told_of(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    await meet(make_wires(), server={"user_key": {"myuser": [K] * MAX_KEYS}})
    assert caplog.text == ""
    await meet(make_wires(), server={"user_key": {"myuser": [K] * (MAX_KEYS + 1)}})
    assert "found 17 keys, and only the first 16 are tried" in caplog.text


async def test_the_same_service_opens_and_another_looks_like_a_wrong_key(autojump_clock: MockClock) -> None:
    client, server = await meet(make_wires(), client={"service": "a"}, server={"service": "a"})
    await check_both_ways(client.opened, server.opened)
    endings = [
        await meet(make_wires(), client={"service": "a"}, server={"service": "b"}),
        await meet(make_wires(), client={"key": OTHER}),
    ]
    assert len({(str(client.error), client.seconds, str(server.error)) for client, server in endings}) == 1


@in_both_modes
async def test_each_side_is_told_the_options_of_the_other(mode: Mode, autojump_clock: MockClock) -> None:
    for ending in await meet(make_wires(), mode):
        assert ending.opened.peer_options == {"room": b"%d" % (40 * 2**20), "grease.0000": b"1234"}


# ---- over sockets ----


@in_both_modes
@pytest.mark.parametrize("most", [0, 1, 20])
async def test_what_a_socket_does_not_take_at_once_follows(
    mode: Mode, most: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        take_few(patch, most)
        async with open_sockets() as sockets:
            client, server = await meet(sockets, mode)
            await check_both_ways(client.opened, server.opened)


@in_both_modes
async def test_a_message_in_pieces_is_read_no_further_than_its_end(
    mode: Mode, autojump_clock: MockClock
) -> None:
    """What follows `accepted` is for the connection, even where it is here already."""
    async with open_sockets() as (ours, theirs), trio.open_nursery() as nursery:
        handshake = ServerHandshake(sealed=mode == "sealed", service="", limits=LIMITS)

        async def serve() -> None:
            hello = await receive_exactly(theirs, handshake.hello_size)
            for start in range(0, len(handshake.hello), 7):
                await theirs.send_all(handshake.hello[start : start + 7])
                await trio.testing.wait_all_tasks_blocked()
            handshake.receive_hello(hello)
            if mode == "plain":
                handshake.receive_open(await theirs.receive_some())
                await theirs.send_all(handshake.accept([]) + b"more")
                return
            handshake.receive_open(await over(theirs, handshake).receive_some())
            keys = handshake.channel_keys().for_side("server")
            accepted = seal(keys["send_key"], 0, handshake.accept([K]))
            assert handshake.final_keys is not None
            keys = handshake.final_keys.for_side("server")
            await theirs.send_all(accepted + seal(keys["send_key"], 0, b"more"))

        nursery.start_soon(serve)
        opened = await as_client(ours, mode)
        assert await opened.stream.receive_some() == b"more"


@in_both_modes
@on_both_sides
async def test_a_socket_that_is_broken_or_closed(side: Side, mode: Mode, autojump_clock: MockClock) -> None:
    async with open_sockets() as (ours, theirs):
        await theirs.aclose()
        error = (await end_of(ours, as_side(side, ours, mode))).error
        assert isinstance(error, NothingCame) == (side == "server")
        with pytest.raises(trio.ClosedResourceError):
            await as_side(side, ours, mode)


# ---- what is read ----


@in_both_modes
async def test_reads_ask_for_no_more_than_may_come(mode: Mode, autojump_clock: MockClock) -> None:
    wires = make_wires({"most": 7}, {"most": 7})
    await meet(wires, mode)
    for wire in wires:
        received, hello = 0, 78 if mode == "sealed" else 45
        for asked, data in zip(wire.asked, wire.received, strict=True):
            assert asked is not None
            if received < hello:
                assert asked == hello - received
            elif mode == "sealed":
                assert asked <= HEADER_SIZE + MAX_EARLY_RECORD_SIZE
            else:
                assert asked <= 4 + MAX_PACKET_SIZE
            received += len(data)
        if mode == "plain":
            peer = wires[wire is wires[0]]
            assert received == sum(map(len, peer.sent))


@pytest.mark.parametrize("most", [None, 1000])
@pytest.mark.parametrize(
    ("mode", "greets", "after"),
    [
        ("sealed", False, b"\xff"),
        ("sealed", False, b"bokbok1\n"),
        ("sealed", True, b"\xff"),
        ("sealed", True, b"\x10\x10" + b"\0" * 4112),
        ("sealed", True, b"\x10\x11" + b"\0" * 4113),
        ("plain", False, b"\xff"),
        ("plain", True, b"\xff"),
        ("plain", True, b"\0\0\x10\0" + b"\0" * 4096),
    ],
)
async def test_a_stranger_who_floods_is_read_for_less_than_16_kib(
    *, mode: Mode, greets: bool, after: bytes, most: int | None, autojump_clock: MockClock
) -> None:
    client, server = make_wires(None, {"most": most})
    await client.send_all((make_hello("server", mode) if greets else b"") + after * (2**17 // len(after)))
    ending = await end_of(server, as_server(server, mode))
    assert type(ending.error) is HandshakeError
    assert ending.seconds == 0
    assert sum(map(len, server.received)) < STRANGER_SIZE


async def test_a_stranger_in_the_channel_is_read_for_less_than_16_kib(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def flood() -> None:
        stream, opening = await enter_as_client(client, b"nobody")
        await stream.send_all(opening)
        for _ in range(50):
            await stream.send_all(bytes(MAX_PACKET_SIZE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        ending = await end_of(server, as_server(server, admit=never_admit))
    assert type(ending.error) is AuthenticationError
    assert sum(map(len, server.received)) < STRANGER_SIZE


@in_both_modes
async def test_what_comes_together_with_accepted_is_kept(mode: Mode, autojump_clock: MockClock) -> None:
    wires = make_wires()
    client_wire, server_wire = wires

    class Late(trio.abc.Stream):
        """The client's end. It receives only when the server has sent everything."""

        send_all = client_wire.send_all
        wait_send_all_might_not_block = client_wire.wait_send_all_might_not_block
        aclose = client_wire.aclose

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.testing.wait_all_tasks_blocked()
            return await client_wire.receive_some(max_bytes)

    async def serve() -> None:
        opened = await as_server(server_wire, mode)
        await opened.stream.send_all(b"first")
        await opened.stream.send_all(b"second")
        await trio.testing.wait_all_tasks_blocked()
        assert await opened.stream.receive_some(100) == b"answer"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        opened = await as_client(Late(), mode)
        if mode == "sealed":
            assert client_wire.received[-1] == b"".join(server_wire.sent[1:])
        else:
            assert b"".join(client_wire.received) == b"".join(server_wire.sent[:2])
        assert await receive_exactly(opened.stream, 11) == b"firstsecond"
        await opened.stream.send_all(b"answer")


async def test_a_record_sent_before_the_proof_is_no_part_of_the_connection(autojump_clock: MockClock) -> None:
    client, server = make_wires()

    async def hurry() -> None:
        stream, opening = await enter_as_client(client)
        await stream.send_all(opening)
        await stream.send_all(b"under the old key")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hurry)
        ending = await end_of(server, as_server(server))
    with pytest.raises(trio.BrokenResourceError):
        await ending.opened.stream.receive_some()


async def test_plain_bytes_after_open_are_kept(autojump_clock: MockClock) -> None:
    client, server = make_wires()
    handshake = ClientHandshake(user=None, key=None, service="", limits=LIMITS)
    await client.send_all(handshake.hello + handshake.open() + b"first")
    ending = await end_of(server, as_server(server, "plain"))
    assert await ending.opened.stream.receive_some(100) == b"first"
