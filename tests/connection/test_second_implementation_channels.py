"""Channels and draining between the package and the second implementation, which are connected."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import Channel, Connection, ConnectionLost, RemoteError
from bokbok_trio._protocol.flow_control import WINDOW
from tests.support.channels import echo_items
from tests.support.second_peer import both_roles, connected

from ..support import second_implementation as second


@both_roles
async def test_a_channel_of_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Its credit goes to the very byte; one item of each side's travels in pieces."""
    small, large = second.body([b"a"]), second.body([bytes(range(256)) * 1200])
    async with connected(role, channel_handler=echo_items) as (_, peer):
        own, _ = peer.ids
        with trio.fail_after(9):
            await peer.put(b"chan", own, b"", b"", b"", b"1000", second.body([b"log"]))
            await peer.take_word(b"credit", own, b"262144")
            for item in (small, large):
                await peer.put(b"item", own, item)
                assert await peer.take() == [b"item", own, item]
            assert peer.open.to_send[int(own)] == WINDOW, "it gave back what was consumed"
            await peer.put(b"item", own, small)
            await peer.put(b"end", own)
            await peer.take_nothing()
            await peer.put(b"credit", own, b"%d" % (len(small) + len(large) + 128 - 1000))
            assert peer.open.to_take[int(own)] == 0
            await peer.take_nothing()
            await peer.put(b"credit", own, b"1")
            assert await peer.take() == [b"item", own, small]
            assert await peer.take() == [b"ok", own, second.body([b"log"])]


@both_roles
async def test_a_channel_to_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    received = []
    text = bytes(100_000)

    async def use(connection: Connection) -> None:
        async with connection.open_channel(["log"]) as channel:
            for _ in range(4):
                await channel.send([text])
            await channel.end()
            received.extend([item async for item in channel])
            received.append(await channel.answer())

    async with connected(role) as (connection, peer), trio.open_nursery() as nursery:
        _, other = peer.ids
        nursery.start_soon(use, connection)
        with trio.fail_after(9):
            assert await peer.take() == [b"chan", other, b"", b"", b"", b"262144", second.body([b"log"])]
            for _ in range(3):
                assert await peer.take() == [b"item", other, second.body([text])]
            await peer.take_nothing()
            await peer.put(b"credit", other, b"%d" % (3 * 100_069 - WINDOW))
            await peer.take_nothing()
            await peer.put(b"credit", other, b"1")
            assert await peer.take() == [b"item", other, second.body([text])]
            assert await peer.take() == [b"end", other]
            for item in ([b"small"], [bytes(200_000)], [b"after it"]):
                await peer.put(b"item", other, second.body(item))
            await peer.put(b"ok", other, second.body([b"done"]))
    assert received == [[b"small"], [bytes(200_000)], [b"after it"], [b"done"]]


@both_roles
async def test_what_crosses_the_end_of_a_channel(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """A cancel, the answer of the second implementation, and that of the package."""

    async def answer_at_once(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await trio.lowlevel.checkpoint()

    async with connected(role, channel_handler=answer_at_once) as (connection, peer):
        own, other = peer.ids
        following = b"%d" % (int(other) + 2)
        with trio.fail_after(5):
            async with connection.open_channel([]):
                assert (await peer.take())[:2] == [b"chan", other]
            assert await peer.take() == [b"cancel", other]
            for fields in ([b"item", b"\0"], [b"credit", b"1"], [b"end"], [b"err", b"cancelled", b"", b""]):
                await peer.put(fields[0], other, *fields[1:])

            async with connection.open_channel([]) as channel:
                assert (await peer.take())[:2] == [b"chan", following]
                await channel.send([b"crosses"])
                await channel.end()
                await trio.testing.wait_all_tasks_blocked()
                await peer.put(b"ok", following, second.body([]))
                await peer.take_word(b"item", following, second.body([b"crosses"]))
                await peer.take_word(b"end", following)
                assert await channel.answer() == []
            await peer.put(b"chan", own, b"", b"", b"", b"0", second.body([]))
            await peer.take_word(b"credit", own, b"262144")
            await trio.testing.wait_all_tasks_blocked()  # it has answered
            for fields in ([b"item", b"\0"], [b"credit", b"1"], [b"end"]):
                await peer.put(fields[0], own, *fields[1:])
            assert await peer.take() == [b"ok", own, second.body([])]
            await peer.put(b"ping")
            await peer.take_word(b"pong")
            assert not peer.open.to_send
            assert not peer.open.to_take


@both_roles
async def test_a_channel_that_the_second_implementation_cancels(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role, channel_handler=echo_items) as (_, peer):
        own, _ = peer.ids
        with trio.fail_after(5):
            await peer.put(b"chan", own, b"", b"", b"", b"9", second.body([]))
            await peer.take_word(b"credit", own, b"262144")
            await peer.put(b"cancel", own)
            await peer.put(b"credit", own, b"1")
            assert (await peer.take())[:3] == [b"err", own, b"cancelled"]


@both_roles
async def test_a_side_without_a_channel_handler(role: str, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(role) as (connection, peer):
        own, other = peer.ids
        with trio.fail_after(5):
            await peer.put(b"chan", own, b"", b"", b"", b"9", second.body([]))
            await peer.put(b"end", own)
            assert (await peer.take())[:3] == [b"err", own, b"no-channel"]
            with pytest.raises(RemoteError) as caught:
                async with connection.open_channel([]) as channel:
                    await peer.take()
                    await peer.put(b"err", other, b"no-channel", b"", b"")
                    await channel.answer()
            assert caught.value.code == "no-channel"


@both_roles
async def test_channels_go_on_while_both_drain(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """And one that crosses the `bye` does not begin."""
    async with connected(role, channel_handler=echo_items) as (connection, peer):
        own, other = peer.ids
        crossing = b"%d" % (int(own) + 2)
        with trio.fail_after(5):
            async with connection.open_channel([]) as channel:
                assert (await peer.take())[:2] == [b"chan", other]
                await peer.put(b"chan", own, b"", b"", b"", b"99", second.body([]))
                await peer.take_word(b"credit", own, b"262144")
                connection.drain()
                await peer.put(b"chan", crossing, b"", b"", b"", b"99", second.body([]))
                await peer.take_word(b"bye")  # and sends bye-ok
                assert (await peer.take())[:3] == [b"err", crossing, b"closing"]
                await peer.put(b"bye")
                await peer.take_word(b"bye-ok")
                await peer.put(b"item", own, second.body([b"a"]))
                assert await peer.take() == [b"item", own, second.body([b"a"])]
                await peer.put(b"item", other, second.body([b"b"]))
                assert await channel.receive() == [b"b"]
                await channel.send([b"c"])
                assert await peer.take() == [b"item", other, second.body([b"c"])]
                await peer.put(b"ok", other, second.body([]))
                assert await channel.answer() == []
            await peer.put(b"end", own)
            assert await peer.take() == [b"ok", own, second.body([])]
            await peer.expect_end()
            await connection.wait_closed()


class Slow:
    """A handler that asks back, and answers when it is told to."""

    def __init__(self) -> None:
        self.may_answer = trio.Event()

    async def __call__(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        await self.may_answer.wait()
        return [*request, *await connection.request([b"again?"])]


@both_roles
async def test_the_package_drains(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """With a request in flight that asks back, and one that crosses the `bye`."""
    slow = Slow()
    async with connected(role, slow) as (connection, peer):
        own, other = peer.ids
        crossing = b"%d" % (int(own) + 2)
        with trio.fail_after(5):
            await peer.put(b"req", own, b"", b"", b"", second.body([b"first"]))
            await trio.testing.wait_all_tasks_blocked()
            connection.drain()
            await trio.testing.wait_all_tasks_blocked()
            await peer.put(b"req", crossing, b"", b"", b"", second.body([b"second"]))
            await peer.take_word(b"bye")  # and sends bye-ok
            assert (await peer.take())[:3] == [b"err", crossing, b"closing"]
            slow.may_answer.set()
            assert await peer.take() == [b"req", other, b"", b"1", b"", second.body([b"again?"])]
            assert not connection.closed
            # To answer that, the peer needs another one, which is of depth 2, and so goes on too.
            nested = b"%d" % (int(own) + 4)
            await peer.put(b"req", nested, b"", b"2", b"", second.body([b"third"]))
            _, id, *fields = await peer.take()
            assert fields == [b"", b"3", b"", second.body([b"again?"])]
            await peer.put(b"ok", id, second.body([b"no"]))
            assert await peer.take() == [b"ok", nested, second.body([b"third", b"no"])]
            await peer.put(b"ok", other, second.body([b"yes"]))
            assert await peer.take() == [b"ok", own, second.body([b"first", b"yes"])]
            await peer.expect_end()
            await connection.wait_closed()


@both_roles
async def test_the_second_implementation_drains(role: str, autojump_clock: trio.testing.MockClock) -> None:
    """With a request of the package's in flight, and one of its own."""
    slow = Slow()
    slow.may_answer.set()
    async with connected(role, slow) as (connection, peer):
        own, other = peer.ids
        answers = []

        async def ask() -> None:
            answers.append(await connection.request([b"a" * 100_000]))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                assert (await peer.take())[:2] == [b"req", other]
                await peer.put(b"bye")
                await peer.take_word(b"bye-ok")
                with pytest.raises(ConnectionLost, match="takes no new request") as caught:
                    await connection.request([b"too late"])
                assert not caught.value.may_have_run
                # A request that it makes itself still may need one back, which is of depth 1.
                await peer.put(b"req", own, b"", b"", b"", second.body([b"first"]))
                _, id, *fields = await peer.take()
                assert fields == [b"", b"1", b"", second.body([b"again?"])]
                await peer.put(b"ok", id, second.body([b"yes"]))
                assert await peer.take() == [b"ok", own, second.body([b"first", b"yes"])]
                assert not peer.open.is_drained()
                await peer.put(b"ok", other, second.body([b"yes"]))
            assert answers == [[b"yes"]]
            assert peer.open.is_drained()
            await peer.end()
            await connection.wait_closed()


@both_roles
async def test_both_drain(role: str, autojump_clock: trio.testing.MockClock) -> None:
    async with connected(role) as (connection, peer):
        with trio.fail_after(5):
            await peer.put(b"bye")
            connection.drain()
            words = [second.unpack(await peer.receive()), second.unpack(await peer.receive())]
            assert words == [[b"bye"], [b"bye-ok"]]
            assert not connection.closed
            await peer.send(second.BYE_OK)
            await peer.expect_end()
