from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio._stream.socket import DirectStream
from bokbok_trio._stream.wire import Wire
from tests.support.helpers import WholeStream

BATCH = bytes(range(256)) * 256


def wires(*, sealed: bool, buffer: int = 2**13) -> tuple[Wire, Wire]:
    """Both ends, over sockets that take little at once."""
    sockets = trio.socket.socketpair()
    for each in sockets:
        each.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, buffer)
    transports = [DirectStream(trio.SocketStream(each)) for each in sockets]
    streams: Sequence[trio.abc.Stream] = transports
    if sealed:
        keys = (bytes(32), bytes([1]) * 32)
        streams = [
            SecretboxStream(stream, send_key=send, receive_key=receive)
            for stream, send, receive in zip(transports, keys, reversed(keys), strict=True)
        ]
    ours, theirs = map(Wire, streams, transports)
    return ours, theirs


async def receive(wire: Wire, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += await wire.receive()
    return received


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def sealed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_what_leaves_at_once_arrives(sealed: bool) -> None:
    ours, theirs = wires(sealed=sealed)
    async with ours._stream, theirs._stream:
        assert ours.can_send_now
        assert ours.send_now(b"small")
        assert ours.can_send_now
        assert not ours.has_rest
        assert await theirs.receive() == b"small"


@pytest.mark.parametrize("buffer", [1, 2**13])  # the system makes it larger
async def test_what_did_not_leave_at_once_leaves_first(sealed: bool, buffer: int) -> None:
    ours, theirs = wires(sealed=sealed, buffer=buffer)
    async with ours._stream, theirs._stream, trio.open_nursery() as nursery:
        assert not ours.send_now(BATCH)
        assert ours.has_rest
        assert not ours.can_send_now

        @nursery.start_soon
        async def send() -> None:
            await ours.send(b"next")
            assert not ours.has_rest
            await ours.send(b"and next")

        whole = BATCH + b"next" + b"and next"
        assert await receive(theirs, len(whole)) == whole


async def test_a_rest_that_cannot_leave_breaks_sending(sealed: bool) -> None:
    ours, theirs = wires(sealed=sealed)
    async with ours._stream:
        await theirs._stream.aclose()
        assert not ours.send_now(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await ours.send(b"")


async def test_a_rest_cut_by_cancellation_is_followed_by_no_end_record() -> None:
    ours, theirs = wires(sealed=True)
    assert not ours.send_now(BATCH)
    with trio.move_on_after(0.01):
        await ours.send(b"")
    await ours._stream.aclose()
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        while await theirs.receive():
            pass
    await theirs._stream.aclose()


async def test_a_stream_that_is_no_socket_only_sends() -> None:
    left, right = trio.testing.memory_stream_pair()
    ours, theirs = Wire(left, left), Wire(right, right)
    assert not ours.can_send_now
    await ours.send(b"hello")
    assert await theirs.receive() == b"hello"


async def is_cut_short(wire: Wire) -> bool:
    """Whether the stream ends without an end record, after whatever."""
    try:
        while await wire.receive():
            pass
    except trio.BrokenResourceError as exc:
        return "cut short" in str(exc)
    return False


@pytest.mark.parametrize("end", [False, True])
async def test_it_closes_at_once(sealed: bool, end: bool) -> None:
    ours, theirs = wires(sealed=sealed)
    async with theirs._stream:
        assert ours.send_now(b"last")
        assert not end or ours.send_end_now()
        assert ours.close_now()
        assert ours.close_now()
        await ours._stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await ours._stream.send_all(b"x")
        assert await is_cut_short(theirs) is (sealed and not end)


async def test_the_end_shows_while_the_other_direction_goes_on(sealed: bool) -> None:
    ours, theirs = wires(sealed=sealed)
    async with ours._stream, theirs._stream:
        assert await ours.send_end()
        assert await ours.send_end(), "again does no harm"
        assert await theirs.receive() == b""
        await theirs.send(b"more")
        assert await ours.receive() == b"more"


@pytest.mark.parametrize("most", [0, 1, 17])
async def test_the_rest_of_an_end_record_is_waited_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = wires(sealed=True)
    send_now = DirectStream.send_now
    monkeypatch.setattr(DirectStream, "send_now", lambda self, data: send_now(self, data[:most]))
    async with ours._stream, theirs._stream:
        assert await ours.send_end()
        assert not await is_cut_short(theirs)


async def test_an_end_follows_the_rest(sealed: bool) -> None:
    ours, theirs = wires(sealed=sealed)
    async with ours._stream, theirs._stream, trio.open_nursery() as nursery:
        assert not ours.send_now(BATCH)
        assert not ours.send_end_now(), "something goes before it"
        nursery.start_soon(ours.send_end)
        assert await receive(theirs, len(BATCH)) == BATCH
        assert await theirs.receive() == b""


async def test_a_rest_that_is_given_up_is_followed_by_no_end_record() -> None:
    ours, theirs = wires(sealed=True)
    async with theirs._stream:
        assert not ours.send_now(BATCH)
        assert not ours.send_end_now()
        assert ours.close_now()
        assert await is_cut_short(theirs)


async def test_what_the_peer_has_not_acknowledged_is_counted() -> None:
    ours, theirs = wires(sealed=False)
    async with ours._stream, theirs._stream:
        assert ours.unacknowledged() == 0
        assert not ours.send_now(BATCH)
        assert ours.unacknowledged() > 0


async def test_a_stream_that_is_no_socket_does_not_close_at_once() -> None:
    left, right = trio.testing.memory_stream_pair()
    for stream in (left, SecretboxStream(left, send_key=bytes(32), receive_key=bytes(32))):
        wire = Wire(stream, left)
        assert not wire.send_end_now()
        assert not wire.close_now()
        assert wire.unacknowledged() == 0
        await wire.send(b"x")
        await right.receive_some()


async def test_streams_that_are_no_sockets_say_their_end_as_they_can() -> None:
    left, right = trio.testing.memory_stream_pair()
    assert await Wire(left, left).send_end()
    assert await right.receive_some() == b""
    left, right = trio.testing.memory_stream_pair()
    sealed = SecretboxStream(left, send_key=bytes(32), receive_key=bytes(32))
    assert await Wire(sealed, left).send_end()
    peer = SecretboxStream(right, send_key=bytes(32), receive_key=bytes(32))
    assert await peer.receive_some() == b""
    whole = WholeStream(left)
    assert not await Wire(whole, whole).send_end(), "it has no way to say so"
