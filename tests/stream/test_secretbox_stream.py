"""A secretbox stream is a stream as Trio defines it: sizes, cancelling, closing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import (
    MockClock,
    check_half_closeable_stream,
    check_two_way_stream,
    lockstep_stream_pair,
    memory_stream_pair,
)

from bokbok_trio._stream.records import HEADER_SIZE, MAC_SIZE, MAX_RECORD_SIZE
from bokbok_trio._stream.secretbox import SecretboxStream
from tests.support.sealed import (
    BATCH,
    CALLS_TO_SEND,
    IN,
    NEXT_OUT,
    OUT,
    SENDS,
    Transport,
    cancel_when_blocked,
    cancelled_from_the_start,
    facing,
    over,
    receive_rest,
    seal,
)

# ---- a stream as trio defines it ----


async def make_pair() -> tuple[SecretboxStream, SecretboxStream]:
    left, right = memory_stream_pair()
    return over(left), facing(right)


async def make_clogged_pair() -> tuple[SecretboxStream, SecretboxStream]:
    left, right = lockstep_stream_pair()
    return over(left), facing(right)


@pytest.mark.parametrize("check", [check_two_way_stream, check_half_closeable_stream])
async def test_is_a_stream_by_the_checks_of_trio(check: Any, autojump_clock: MockClock) -> None:
    with trio.fail_after(60):
        await check(make_pair, make_clogged_pair)


# ---- sizes ----


@pytest.mark.parametrize("limit", [64, 4112, MAX_RECORD_SIZE])
async def test_a_record_of_the_limit_is_received(limit: int) -> None:
    plaintext = bytes(limit - MAC_SIZE)
    stream = over(Transport(seal(IN, 0, plaintext)), max_record_size=limit)
    assert await stream.receive_some() == plaintext


@pytest.mark.parametrize("size", [0, MAC_SIZE - 1, 65, MAX_RECORD_SIZE])
async def test_a_record_size_that_is_not_allowed_is_refused_by_the_header(size: int) -> None:
    transport = Transport(size.to_bytes(2, "big") + bytes(size), most=HEADER_SIZE)
    stream = over(transport, max_record_size=64)
    with pytest.raises(trio.BrokenResourceError, match=f"a record of {size} bytes; 16 to 64 are allowed"):
        await stream.receive_some()
    assert len(transport.asked) == 1


async def test_an_empty_record_must_be_sealed_to_be_an_end() -> None:
    assert await receive_rest(over(Transport(seal(IN, 0, b"")))) == (b"", True)
    assert await receive_rest(over(Transport(b"\0\x10" + bytes(MAC_SIZE)))) == (b"", False)


async def test_reads_ask_for_no_more_than_a_record_of_the_limit() -> None:
    limit = 64
    incoming = seal(IN, 0, bytes(48)) + seal(IN, 1, b"x") + seal(IN, 2, bytes(48))
    transport = Transport(incoming, most=50)
    received, _ = await receive_rest(over(transport, max_record_size=limit))
    assert len(received) == 97
    assert len(transport.asked) > 3
    assert all(asked is not None and asked <= HEADER_SIZE + limit for asked in transport.asked)


@pytest.mark.parametrize("max_bytes", [0, -1])
async def test_max_bytes_is_at_least_one(max_bytes: int) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        await over(Transport()).receive_some(max_bytes)


# ---- cancelled, broken, busy ----

sends_something = pytest.mark.parametrize("send", SENDS.values(), ids=SENDS.keys())


async def check_sending_is_broken(stream: SecretboxStream, transport: Transport) -> None:
    sent = list(transport.sent)
    for call in CALLS_TO_SEND.values():
        with pytest.raises(trio.BrokenResourceError):
            await call(stream)
    stream.rekey(send_key=NEXT_OUT, receive_key=IN)
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    await stream.aclose()
    assert transport.sent == sent
    assert transport.closed == 1


@sends_something
async def test_a_cancelled_send_that_had_begun_breaks_sending_for_good(
    send: Callable[[SecretboxStream], Awaitable[None]],
) -> None:
    transport = Transport()
    stream = over(transport)
    transport.send_gate = trio.Event()
    await cancel_when_blocked(lambda: send(stream))
    transport.send_gate.set()
    await check_sending_is_broken(stream, transport)


async def test_a_send_cancelled_between_its_batches_breaks_sending() -> None:
    transport = Transport()
    stream = over(transport)

    async def send() -> None:
        await stream.send_all(bytes(3 * BATCH))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while not transport.sent:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert len(transport.sent) < 3
    await check_sending_is_broken(stream, transport)


class CrashError(BaseException):
    pass


@sends_something
@pytest.mark.parametrize(
    "failure", [trio.BrokenResourceError(), OSError(), trio.ClosedResourceError(), CrashError()], ids=repr
)
async def test_any_exception_of_the_transport_breaks_sending_for_good(
    send: Callable[[SecretboxStream], Awaitable[None]], failure: BaseException
) -> None:
    transport = Transport()
    stream = over(transport)
    transport.failure = failure
    with pytest.raises(type(failure)):
        await send(stream)
    transport.failure = None
    await check_sending_is_broken(stream, transport)


@sends_something
async def test_a_send_cancelled_before_it_began_leaves_sending_usable(
    send: Callable[[SecretboxStream], Awaitable[None]],
) -> None:
    transport = Transport()
    stream = over(transport)
    await cancelled_from_the_start(lambda: send(stream))
    assert transport.sent == []
    await stream.send_all(b"x")
    assert transport.sent == [seal(OUT, 0, b"x")]


async def test_a_cancelled_wait_to_send_leaves_sending_usable() -> None:
    transport = Transport()
    stream = over(transport)
    transport.send_gate = trio.Event()
    await cancel_when_blocked(stream.wait_send_all_might_not_block)
    transport.send_gate.set()
    await stream.wait_send_all_might_not_block()
    await stream.send_all(b"x")
    assert transport.sent == [seal(OUT, 0, b"x")]


async def test_receiving_goes_on_when_sending_is_broken() -> None:
    transport = Transport(seal(IN, 0, b"x") + seal(IN, 1, b""))
    stream = over(transport)
    transport.failure = OSError()
    with pytest.raises(OSError):  # noqa: PT011  (the very one)
        await stream.send_all(b"x")
    assert await receive_rest(stream) == (b"x", True)


async def test_sending_goes_on_when_receiving_is_broken() -> None:
    transport = Transport(b"\0\x10" + bytes(16))
    stream = over(transport)
    assert await receive_rest(stream) == (b"", False)
    await stream.send_all(b"x")
    assert transport.sent == [seal(OUT, 0, b"x")]


async def test_a_cancelled_receive_loses_nothing_wherever_it_was() -> None:
    incoming = seal(IN, 0, b"abc") + seal(IN, 1, b"d") + seal(IN, 2, b"ef") + seal(IN, 3, b"")
    for size in range(len(incoming) + 1):
        left, right = memory_stream_pair()
        stream = over(left)
        await right.send_all(incoming[:size])
        received = b""

        async def receive(stream: SecretboxStream = stream) -> None:
            nonlocal received
            while data := await stream.receive_some(2):
                received += data

        await cancel_when_blocked(receive)
        await cancelled_from_the_start(stream.receive_some)
        await right.send_all(incoming[size:])
        await receive()
        assert received == b"abcdef"


async def test_a_receive_cancelled_from_the_start_leaves_what_was_read() -> None:
    transport = Transport(seal(IN, 0, b"abc") + seal(IN, 1, b"d") + seal(IN, 2, b""))
    stream = over(transport)
    for expected in (b"a", b"b", b"c", b"d", b"", b""):
        await cancelled_from_the_start(lambda: stream.receive_some(1))
        assert await stream.receive_some(1) == expected


@pytest.mark.parametrize("second", CALLS_TO_SEND.values(), ids=CALLS_TO_SEND.keys())
@pytest.mark.parametrize("first", [name for name in CALLS_TO_SEND if name != "empty send_all"])
async def test_a_second_sender_is_told_busy_and_harms_nothing(
    first: str, second: Callable[[SecretboxStream], Awaitable[object]], autojump_clock: MockClock
) -> None:
    transport = Transport()
    stream = over(transport)
    transport.send_gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(CALLS_TO_SEND[first], stream)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(1), pytest.raises(trio.BusyResourceError):
            await second(stream)
        transport.send_gate.set()
    expected = {"send_all": [seal(OUT, 0, b"other")], "send_eof": [seal(OUT, 0, b"")], "wait": []}[first]
    assert transport.sent == expected


async def test_a_second_receiver_is_told_busy_and_harms_nothing(autojump_clock: MockClock) -> None:
    transport = Transport(seal(IN, 0, b"x") + seal(IN, 1, b"y"))
    stream = over(transport)
    transport.receive_gate = trio.Event()
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await stream.receive_some())

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_some()
            transport.receive_gate.set()
    assert received == [b"x"]
    assert await stream.receive_some() == b"y"


async def test_sending_and_receiving_at_once_is_no_conflict(autojump_clock: MockClock) -> None:
    left, right = lockstep_stream_pair()
    stream, peer = over(left), facing(right)

    async def exchange(stream: SecretboxStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"x")
            assert await stream.receive_some() == b"x"

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange, stream)
            nursery.start_soon(exchange, peer)


# ---- closing ----


CALLS: dict[str, Callable[[SecretboxStream], Awaitable[object]]] = {
    **CALLS_TO_SEND,
    "receive_some": lambda stream: stream.receive_some(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("broken", [False, True])
async def test_after_our_own_close_every_call_is_told_closed(
    call: Callable[[SecretboxStream], Awaitable[object]], *, broken: bool
) -> None:
    transport = Transport(seal(IN, 0, b"x"))
    stream = over(transport)
    if broken:
        transport.failure = OSError()
        with pytest.raises(OSError):  # noqa: PT011  (the very one)
            await stream.send_all(b"x")
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await call(stream)


@pytest.mark.parametrize("call", [name for name in CALLS_TO_SEND if name != "send_eof"])
async def test_after_send_eof_every_send_is_told_closed(call: str) -> None:
    transport = Transport()
    stream = over(transport)
    await stream.send_eof()
    with pytest.raises(trio.ClosedResourceError):
        await CALLS_TO_SEND[call](stream)
    with trio.testing.assert_checkpoints():
        await stream.send_eof()
    assert transport.sent == [seal(OUT, 0, b"")]


async def test_a_waiting_receive_is_told_that_our_side_closed() -> None:
    left, _right = memory_stream_pair()
    stream = over(left)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.aclose)
        with pytest.raises(trio.ClosedResourceError):
            await stream.receive_some()


async def test_the_close_of_the_peer_is_an_end_here_and_breaks_sending() -> None:
    left, right = memory_stream_pair()
    stream, peer = over(left), facing(right)
    await peer.send_all(b"x")
    await peer.aclose()
    assert await receive_rest(stream) == (b"x", True)
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")


async def test_the_end_of_the_transport_alone_is_no_end() -> None:
    left, right = memory_stream_pair()
    stream = over(left)
    await right.send_eof()
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await stream.receive_some()


@pytest.mark.parametrize(
    "spoiled",
    [
        pytest.param(b"", id="cut"),
        pytest.param(seal(IN, 7, b"bad"), id="does not open"),
        pytest.param(b"\0\x0f" + bytes(15), id="too short"),
    ],
)
async def test_what_was_spoiled_is_no_reason_to_say_the_end(spoiled: bytes) -> None:
    """The other side would take the end record for a close on purpose."""
    transport = Transport(seal(IN, 0, b"good") + spoiled)
    stream = over(transport)
    assert await receive_rest(stream) == (b"good", False)
    await stream.aclose()
    assert (transport.sent, transport.closed) == ([], 1)


async def test_aclose_again_only_closes_the_transport_again() -> None:
    transport = Transport()
    stream = over(transport)
    for times in (1, 2, 3):
        with trio.testing.assert_checkpoints():
            await stream.aclose()
        assert transport.closed == times
    assert transport.sent == [seal(OUT, 0, b"")]


async def test_aclose_after_send_eof_sends_no_second_end() -> None:
    transport = Transport()
    stream = over(transport)
    await stream.send_eof()
    await stream.aclose()
    assert transport.sent == [seal(OUT, 0, b"")]
    assert transport.closed == 1


@pytest.mark.parametrize("cancel", [cancelled_from_the_start, cancel_when_blocked])
async def test_a_cancelled_aclose_closes_the_transport(
    cancel: Callable[[Callable[[], Awaitable[object]]], Awaitable[None]],
) -> None:
    transport = Transport()
    stream = over(transport)
    transport.send_gate = trio.Event()
    await cancel(stream.aclose)
    assert transport.closed == 1
    assert transport.sent == []


async def test_aclose_sends_no_end_record_into_a_send_that_is_under_way(autojump_clock: MockClock) -> None:
    transport = Transport()
    stream = over(transport)
    transport.send_gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"x")
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(1):
            await stream.aclose()
        assert transport.closed == 1
        transport.send_gate.set()
    await stream.aclose()
    assert transport.sent == [seal(OUT, 0, b"x")]


@pytest.mark.parametrize("failure", [trio.BrokenResourceError(), trio.ClosedResourceError()], ids=repr)
async def test_aclose_over_a_broken_transport_says_nothing(failure: BaseException) -> None:
    transport = Transport()
    transport.failure = failure
    await over(transport).aclose()
    assert transport.closed == 1


async def test_aclose_closes_the_transport_whatever_the_end_record_raises() -> None:
    transport = Transport()
    transport.failure = CrashError()
    with pytest.raises(CrashError):
        await over(transport).aclose()
    assert transport.closed == 1
