from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio._stream.fast import FastStream
from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio._stream.socket import SocketStream, make_fast
from tests.support.helpers import WholeStream
from tests.support.inside import take_few

BATCH = bytes(range(256)) * 256


def streams(*, sealed: bool, buffer: int = 2**13) -> tuple[FastStream, FastStream]:
    """Both ends, over sockets that take little at once."""
    sockets = trio.socket.socketpair()
    for each in sockets:
        each.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, buffer)
    ours, theirs = [SocketStream(trio.SocketStream(each)) for each in sockets]
    if not sealed:
        return ours, theirs
    one, other = bytes(32), bytes([1]) * 32
    return (
        SecretboxStream(ours, send_key=one, receive_key=other),
        SecretboxStream(theirs, send_key=other, receive_key=one),
    )


async def receive(stream: FastStream, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += await stream.receive_view()
    return received


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def sealed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_what_leaves_at_once_arrives(sealed: bool) -> None:
    ours, theirs = streams(sealed=sealed)
    async with ours, theirs:
        assert ours.can_send_nowait
        assert ours.send_nowait(b"small")
        assert ours.can_send_nowait
        assert not ours.has_rest
        assert await theirs.receive_view() == b"small"


@pytest.mark.parametrize("buffer", [1, 2**13])  # the system makes it larger
async def test_what_did_not_leave_at_once_leaves_first(sealed: bool, buffer: int) -> None:
    ours, theirs = streams(sealed=sealed, buffer=buffer)
    async with ours, theirs, trio.open_nursery() as nursery:
        assert not ours.send_nowait(BATCH)
        assert ours.has_rest
        assert not ours.can_send_nowait

        @nursery.start_soon
        async def send() -> None:
            await ours.send_all(b"next")
            assert not ours.has_rest
            await ours.send_all(b"and next")

        whole = BATCH + b"next" + b"and next"
        assert await receive(theirs, len(whole)) == whole


async def test_a_rest_that_cannot_leave_breaks_sending(sealed: bool) -> None:
    ours, theirs = streams(sealed=sealed)
    async with ours:
        await theirs.aclose()
        assert not ours.send_nowait(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"")


async def test_a_rest_cut_by_cancellation_is_followed_by_no_end_record() -> None:
    ours, theirs = streams(sealed=True)
    assert not ours.send_nowait(BATCH)
    with trio.move_on_after(0.01):
        await ours.send_all(b"")
    await ours.aclose()
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        while await theirs.receive_view():
            pass
    await theirs.aclose()


async def test_a_stream_that_is_no_socket_only_sends() -> None:
    left, right = trio.testing.memory_stream_pair()
    ours, theirs = make_fast(left), make_fast(right)
    assert not ours.can_send_nowait
    await ours.send_all(b"hello")
    assert await theirs.receive_view() == b"hello"


async def is_cut_short(stream: FastStream) -> bool:
    """Whether the stream ends without an end record, after whatever."""
    try:
        while await stream.receive_view():
            pass
    except trio.BrokenResourceError as exc:
        return "cut short" in str(exc)
    return False


@pytest.mark.parametrize("end", [False, True])
async def test_it_closes_at_once(sealed: bool, end: bool) -> None:
    ours, theirs = streams(sealed=sealed)
    async with theirs:
        assert ours.send_nowait(b"last")
        assert not end or ours.send_end_nowait()
        assert ours.close_nowait()
        assert ours.close_nowait()
        await ours.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"x")
        assert await is_cut_short(theirs) is (sealed and not end)


async def test_the_end_shows_while_the_other_direction_goes_on(sealed: bool) -> None:
    ours, theirs = streams(sealed=sealed)
    async with ours, theirs:
        assert await ours.send_end()
        assert await ours.send_end(), "again does no harm"
        assert await theirs.receive_view() == b""
        await theirs.send_all(b"more")
        assert await ours.receive_view() == b"more"


@pytest.mark.parametrize("most", [0, 1, 17])
async def test_the_rest_of_an_end_record_is_waited_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = streams(sealed=True)
    take_few(monkeypatch, most)
    async with ours, theirs:
        assert await ours.send_end()
        assert not await is_cut_short(theirs)


async def test_an_end_follows_the_rest(sealed: bool) -> None:
    ours, theirs = streams(sealed=sealed)
    async with ours, theirs, trio.open_nursery() as nursery:
        assert not ours.send_nowait(BATCH)
        assert not ours.send_end_nowait(), "something goes before it"
        nursery.start_soon(ours.send_end)
        assert await receive(theirs, len(BATCH)) == BATCH
        assert await theirs.receive_view() == b""


async def test_a_rest_that_is_given_up_is_followed_by_no_end_record() -> None:
    ours, theirs = streams(sealed=True)
    async with theirs:
        assert not ours.send_nowait(BATCH)
        assert not ours.send_end_nowait()
        assert ours.close_nowait()
        assert await is_cut_short(theirs)


async def test_what_the_peer_has_not_acknowledged_is_counted() -> None:
    ours, theirs = streams(sealed=False)
    async with ours, theirs:
        assert ours.count_unacknowledged() == 0
        assert not ours.send_nowait(BATCH)
        assert ours.count_unacknowledged() > 0


async def test_a_stream_that_is_no_socket_does_not_close_at_once() -> None:
    left, right = trio.testing.memory_stream_pair()
    for stream in (left, SecretboxStream(left, send_key=bytes(32), receive_key=bytes(32))):
        fast = make_fast(stream)
        assert not fast.send_end_nowait()
        assert not fast.close_nowait()
        assert fast.count_unacknowledged() == 0
        await fast.send_all(b"x")
        await right.receive_some()


async def test_streams_that_are_no_sockets_say_their_end_as_they_can() -> None:
    left, right = trio.testing.memory_stream_pair()
    assert await make_fast(left).send_end()
    assert await right.receive_some() == b""
    left, right = trio.testing.memory_stream_pair()
    sealed = SecretboxStream(left, send_key=bytes(32), receive_key=bytes(32))
    assert await sealed.send_end()
    peer = SecretboxStream(right, send_key=bytes(32), receive_key=bytes(32))
    assert await peer.receive_some() == b""
    whole = WholeStream(left)
    assert not await make_fast(whole).send_end(), "it has no way to say so"
