"""Channels over a connection: they behave as Trio's channels, and have answers."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, MessageTooLarge, RemoteError, RequestError, Settings
from bokbok_trio.testing import open_connection_pair
from tests.support.channels import assert_nothing_is_left, echo_items, fill, open_pair
from tests.support.helpers import settle


async def test_items_go_both_ways_and_then_the_answer_comes(sealed: bool, autojump_clock: MockClock) -> None:
    async with open_connection_pair(sealed=sealed, server_channel_handler=echo_items) as (client, server):
        async with client.open_channel(["a", b"b"]) as channel:
            items: list[list[bytes | str]]
            items = [[], [b""], ["text", b"bytes"], [bytes(10**6)], [b"x"] * 255]
            for item in items:
                await channel.send(item)
                received = await channel.receive()
                assert received == [field.encode() if isinstance(field, str) else field for field in item]
            await channel.end()
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()
            assert await channel.answer() == await channel.answer() == [b"a", b"b"]
        await settle()
        assert_nothing_is_left(client, server)


async def test_the_server_may_open_one_too(autojump_clock: MockClock) -> None:
    async with open_connection_pair(client_channel_handler=echo_items) as (_, server):
        async with server.open_channel(["hi"]) as channel:
            await channel.send(["1"])
            assert await channel.receive() == [b"1"]
            await channel.end()
            assert await channel.answer() == [b"hi"]


async def test_a_channel_inside_the_handler_of_a_channel(autojump_clock: MockClock) -> None:
    async def relay(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        async with connection.open_channel(request) as inner:
            async for item in channel:
                await inner.send([b"there", *item])
                await channel.send([*await inner.receive(), b"and back"])
            await inner.end()
            return await inner.answer()

    handlers = {"server_channel_handler": relay, "client_channel_handler": echo_items}
    async with open_connection_pair(**handlers) as (client, server):  # type: ignore[arg-type]
        async with client.open_channel(["name"]) as channel:
            await channel.send(["x"])
            assert await channel.receive() == [b"there", b"x", b"and back"]
            await channel.end()
            assert await channel.answer() == [b"name"]
        await settle()
        assert_nothing_is_left(client, server)


async def test_two_thousand_channels_on_one_connection(autojump_clock: MockClock) -> None:
    settings = Settings(max_requests=2000)
    most = 0

    async def use(connection: Connection, n: int) -> None:
        async with connection.open_channel([str(n)]) as channel:
            await channel.send([f"item of {n}"])
            assert await channel.receive() == [b"item of %d" % n]
            await everybody_is_here(n)
            await channel.end()
            assert await channel.answer() == [b"%d" % n]

    arrived = 0
    all_arrived = trio.Event()

    async def everybody_is_here(n: int) -> None:
        nonlocal arrived, most
        arrived += 1
        most = max(most, server.statistics().handlers_running)
        if arrived == 2000:
            all_arrived.set()
        await all_arrived.wait()

    pair = open_connection_pair(sealed=False, server_channel_handler=echo_items, server_settings=settings)
    async with pair as (client, server):
        async with trio.open_nursery() as nursery:
            for n in range(2000):
                nursery.start_soon(use, client, n)
        assert most == 2000
        await settle()
        assert_nothing_is_left(client, server)


async def test_a_channel_takes_a_slot_and_waits_for_one(autojump_clock: MockClock) -> None:
    async with open_pair(max_requests=1) as (client, server, channel, handler):
        async with client.open_channel(["second"]) as second:
            with trio.move_on_after(5) as scope:
                await second.send(["waits"])
            assert scope.cancelled_caught
            await second.end()
            assert server.statistics().handlers_running == 1
            handler.may_end.set()
            assert await channel.answer() == [b"re: ", b"hello"]
            assert await second.answer() == [b"re: ", b"second"]


async def test_one_that_waits_for_a_slot_can_be_given_up(autojump_clock: MockClock) -> None:
    async with open_pair(max_requests=1) as (client, _, _, handler):
        async with client.open_channel(["never seen"]):
            await settle()
        assert client.statistics().used_slots == 1
        assert client.statistics().requests_waiting == 0
        handler.may_end.set()


# ---- what Trio says of a channel ----


async def test_every_method_is_a_checkpoint(autojump_clock: MockClock) -> None:
    async with open_pair() as (client, _, channel, handler):
        await handler.channel.send(["x"])
        await handler.channel.send(["y"])
        await settle()
        with trio.testing.assert_checkpoints():
            await channel.send(["x"])
        with trio.testing.assert_checkpoints():
            await channel.receive()
        for method in (
            lambda: channel.send(["lost"]),
            channel.receive,
            lambda: client.open_channel([]).__aenter__(),
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                with trio.testing.assert_checkpoints():
                    await method()
            assert scope.cancelled_caught
        assert await channel.receive() == [b"y"]
        for end in (channel.end, channel.end):
            with trio.testing.assert_checkpoints():
                await end()
        with trio.testing.assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
            await channel.send([])
        handler.may_end.set()
        with trio.testing.assert_checkpoints():
            await channel.answer()
        with trio.testing.assert_checkpoints():
            await channel.answer()
        for close in (channel.aclose, channel.aclose):
            with trio.testing.assert_checkpoints():
                await close()
        with trio.testing.assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
            await channel.receive()
        assert "closed" in repr(channel)


async def test_receiving_ends_after_the_last_item(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        assert "open" in repr(channel)
        await channel.send(["1"])
        await channel.send(["2"])
        await channel.end()
        await settle()
        assert [item async for item in handler.channel] == [[b"1"], [b"2"]]
        for _ in range(2):
            with pytest.raises(trio.EndOfChannel):
                await handler.channel.receive()
        await handler.channel.send(["the other direction goes on"])
        assert await channel.receive() == [b"the other direction goes on"]
        handler.may_end.set()


async def test_a_receiver_that_waits_is_told_of_the_end(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def receive() -> None:
                with pytest.raises(trio.EndOfChannel):
                    await channel.receive()

            await settle()
            await handler.channel.end()


async def test_what_is_no_item_is_refused_and_harms_nothing(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        with pytest.raises(TypeError):
            await channel.send("text")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="255"):
            await channel.send([b""] * 256)
        with pytest.raises(MessageTooLarge):
            await channel.send([bytes(4 * 2**20)])
        await channel.send(["good"])
        assert await handler.channel.receive() == [b"good"]


@pytest.mark.parametrize("how", ["end", "aclose"])
async def test_sending_after_our_end_and_while_it_comes(how: str, autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await fill(channel)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await channel.send(["never leaves"])

            await settle()
            await getattr(channel, how)()
        with pytest.raises(trio.ClosedResourceError):
            await channel.send([])
        handler.may_end.set()


async def test_receiving_while_it_is_closed(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await channel.receive()

            @nursery.start_soon
            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await channel.answer()

            await settle()
            await channel.aclose()
        await settle()
        assert isinstance(handler.ended_by, trio.Cancelled)


# ---- answers ----


async def test_the_answer_comes_after_the_items_sent_before(autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
        await channel.send([bytes(2**17)])
        for n in range(5):
            await channel.send([str(n)])
        return ["answer"]

    async with open_connection_pair(server_channel_handler=handler) as (client, _):
        async with client.open_channel([]) as channel:
            assert await channel.answer() == [b"answer"]
            items = [item async for item in channel]
            assert items == [[bytes(2**17)], *([b"%d" % n] for n in range(5))]
            with pytest.raises(trio.BrokenResourceError, match="has answered"):
                await channel.send([])


async def test_an_error_of_the_handler(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        handler.error = RequestError("no such file", code="no-file")
        await handler.channel.send(["first"])
        await settle()
        handler.may_end.set()
        await settle()
        assert "broken" in repr(channel)
        assert await channel.receive() == [b"first"]
        for use in (channel.receive, lambda: channel.send([])):
            with pytest.raises(trio.BrokenResourceError, match="no such file") as caught:
                await use()
            assert isinstance(caught.value.__cause__, RemoteError)
        with pytest.raises(RemoteError, match="no such file"):
            await channel.answer()


async def test_an_error_after_the_end_does_not_cut_the_items_short(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        handler.error = RequestError("too late", code="late")
        await handler.channel.send(["all"])
        await handler.channel.end()
        handler.may_end.set()
        await settle()
        assert [item async for item in channel] == [[b"all"]]


async def test_those_who_wait_are_told_of_an_error(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        handler.error = RequestError("bad", code="bad")
        await fill(channel)
        async with trio.open_nursery() as nursery:
            for use in (channel.receive, lambda: channel.send([])):

                @nursery.start_soon
                async def wait(use: object = use) -> None:
                    with pytest.raises(trio.BrokenResourceError, match="bad"):
                        await use()  # type: ignore[operator]

            await settle()
            handler.may_end.set()


async def test_a_handler_cannot_wait_for_its_own_answer(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, _, handler):
        with pytest.raises(RuntimeError, match="gives the answer"):
            await handler.channel.answer()


async def test_without_a_channel_handler(autojump_clock: MockClock) -> None:
    async with open_connection_pair() as (client, server):
        async with client.open_channel([]) as channel:
            with pytest.raises(RemoteError) as caught:
                await channel.answer()
            assert caught.value.code == "no-channel"
        with pytest.raises(RemoteError) as caught:
            await client.request([])
        assert caught.value.code == "no-handler"
        await settle()
        assert_nothing_is_left(client, server)


async def test_the_handlers_channel_is_closed_when_it_returns(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await channel.send(["not read"])
        await settle()
        handler.may_end.set()
        assert await channel.answer()
        for use in (handler.channel.receive, lambda: handler.channel.send([])):
            with pytest.raises(trio.ClosedResourceError):
                await use()
        await handler.channel.end()
        await handler.channel.aclose()


async def test_a_handler_that_closes_its_channel_drops_what_comes(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await fill(channel)
        await handler.channel.aclose()
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
        for _ in range(1000):
            await channel.send([bytes(1000)])
        handler.may_end.set()
        assert await channel.answer() == [b"re: ", b"hello"]
