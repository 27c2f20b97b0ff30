"""Records as specified: every change is noticed; new keys, and nonces."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import cycle

import pytest
import trio
import trio.testing
from hypothesis import assume, given, settings, strategies as st
from nacl.bindings import crypto_secretbox, crypto_secretbox_open
from trio.testing import memory_stream_pair

from bokbok_trio._protocol.packets import MAX_AT_ONCE
from bokbok_trio._stream import records
from bokbok_trio._stream.records import (
    HEADER_SIZE,
    MAC_SIZE,
    MAX_PLAINTEXT_SIZE,
    MAX_RECORD_SIZE,
    Direction,
    Keyless,
)
from bokbok_trio._stream.secretbox import RECORDS_PER_SEND, SecretboxStream
from tests.support.sealed import (
    BATCH,
    IN,
    NEXT_IN,
    NEXT_OUT,
    OUT,
    SENDS,
    Transport,
    facing,
    over,
    receive_rest,
    run,
    seal,
)

Tamper = Callable[[list[bytes]], bytes]

# ---- records ----


async def test_records_are_as_specified() -> None:
    transport = Transport()
    stream = over(transport)
    await stream.send_all(b"a")
    await stream.send_all(bytes(MAX_PLAINTEXT_SIZE + 1))
    await stream.send_eof()
    assert transport.sent == [
        seal(OUT, 0, b"a"),
        seal(OUT, 1, bytes(65519)) + seal(OUT, 2, b"\0"),
        seal(OUT, 3, b""),
    ]


async def test_a_big_send_leaves_in_batches() -> None:
    transport = Transport()
    await over(transport).send_all(bytes(2 * BATCH + 1))
    full = RECORDS_PER_SEND * (HEADER_SIZE + MAX_RECORD_SIZE)
    assert [len(sent) for sent in transport.sent] == [full, full, HEADER_SIZE + MAC_SIZE + 1]


@settings(deadline=None)
@given(
    sends=st.lists(st.binary(max_size=50)),
    receives=st.lists(st.none() | st.integers(1, 60), min_size=1),
    most=st.integers(1, 200),
)
def test_any_sends_are_received_by_any_receives(
    sends: list[bytes], receives: list[int | None], most: int
) -> None:
    async def main() -> None:
        sending = Transport()
        stream = over(sending)
        for data in sends:
            await stream.send_all(data)
        await stream.aclose()
        receiver = facing(Transport(b"".join(sending.sent), most))
        received = b""
        for max_bytes in cycle(receives):
            data = await receiver.receive_some(max_bytes)
            assert max_bytes is None or len(data) <= max_bytes
            received += data
            if not data:
                break
        assert received == b"".join(sends)

    run(main)


@pytest.mark.parametrize(
    "size", [MAX_PLAINTEXT_SIZE, MAX_PLAINTEXT_SIZE + 1, BATCH, BATCH + 1, 2 * BATCH + 7]
)
@pytest.mark.parametrize("most", [999, 2**20])
async def test_round_trip_over_several_records_and_batches(size: int, most: int) -> None:
    sending = Transport()
    sent = bytes(range(256)) * (size // 256 + 1)
    async with over(sending) as stream:
        await stream.send_all(memoryview(sent)[:size])
    receiver = facing(Transport(b"".join(sending.sent), most))
    assert await receive_rest(receiver) == (sent[:size], True)


async def test_received_byte_by_byte() -> None:
    receiver = over(Transport(seal(IN, 0, b"abc") + seal(IN, 1, b"d") + seal(IN, 2, b""), most=1))
    assert [await receiver.receive_some(1) for _ in range(6)] == [b"a", b"b", b"c", b"d", b"", b""]


async def test_items_that_are_not_bytes_are_counted_in_bytes() -> None:
    transport = Transport()
    await over(transport).send_all(memoryview(bytes(MAX_PLAINTEXT_SIZE + 1)).cast("I"))
    assert transport.sent == [seal(OUT, 0, bytes(MAX_PLAINTEXT_SIZE)) + seal(OUT, 1, b"\0")]


async def test_an_empty_send_sends_nothing() -> None:
    transport = Transport()
    stream = over(transport)
    with trio.testing.assert_checkpoints():
        await stream.send_all(b"")
    assert transport.sent == []
    await stream.send_all(b"x")
    assert transport.sent == [seal(OUT, 0, b"x")]


async def test_the_transport_is_not_read_after_the_end_record() -> None:
    transport = Transport(seal(IN, 0, b"") + b"left")
    stream = over(transport)
    assert await stream.receive_some() == b""
    asked = list(transport.asked)
    with trio.testing.assert_checkpoints():
        assert await stream.receive_some() == b""
    assert transport.asked == asked


# ---- nothing goes unnoticed ----


def change(record: int, position: int, mask: int) -> Tamper:
    def tamper(records: list[bytes]) -> bytes:
        changed = bytearray(records[record % len(records)])
        changed[position % len(changed)] ^= mask
        records[record % len(records)] = bytes(changed)
        return b"".join(records)

    return tamper


def swap(first: int, second: int) -> Tamper:
    def tamper(records: list[bytes]) -> bytes:
        a, b = first % len(records), second % len(records)
        records[a], records[b] = records[b], records[a]
        return b"".join(records)

    return tamper


def repeat(record: int, at: int) -> Tamper:
    def tamper(records: list[bytes]) -> bytes:
        records.insert(at % (len(records) + 1), records[record % len(records)])
        return b"".join(records)

    return tamper


def drop(record: int) -> Tamper:
    def tamper(records: list[bytes]) -> bytes:
        del records[record % len(records)]
        return b"".join(records)

    return tamper


def cut(at: int) -> Tamper:
    def tamper(records: list[bytes]) -> bytes:
        whole = b"".join(records)
        return whole[: at % len(whole)]

    return tamper


def reflect(at: int, *, instead: bool) -> Tamper:
    """Put in a record that the receiver itself sent, with the very number that is awaited there."""

    def tamper(records: list[bytes]) -> bytes:
        place = at % len(records)
        records[place : place + instead] = [seal(IN, place, b"reflected")]
        return b"".join(records)

    return tamper


numbers = st.integers(0, 200)
tampers = st.one_of(
    st.builds(change, numbers, numbers, st.integers(1, 255)),
    st.builds(swap, numbers, numbers),
    st.builds(repeat, numbers, numbers),
    st.builds(drop, numbers),
    st.builds(cut, numbers),
    st.builds(reflect, numbers, instead=st.booleans()),
)


@settings(deadline=None, max_examples=100)
@given(
    sends=st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=6),
    ended=st.booleans(),
    tamper=tampers,
    most=st.integers(1, 100),
)
def test_no_tampering_goes_unnoticed(*, sends: list[bytes], ended: bool, tamper: Tamper, most: int) -> None:
    async def main() -> None:
        sending = Transport()
        stream = over(sending)
        for data in sends:
            await stream.send_all(data)
        if ended:
            await stream.send_eof()
        records = sending.sent
        original = b"".join(records)
        tampered = tamper(list(records))
        assume(tampered != original)

        received, at_end = await receive_rest(facing(Transport(tampered, most)))

        intact = [n for n in range(len(records)) if tampered.startswith(b"".join(records[: n + 1]))]
        assert received == b"".join(sends[: len(intact)])
        assert at_end == (ended and len(intact) == len(records))

    run(main)


async def test_truncation_at_every_byte_is_noticed() -> None:
    ends = {0: b""}
    whole = b""
    for counter, plaintext in enumerate([b"a", b"bcd", b""]):
        whole += seal(IN, counter, plaintext)
        ends[len(whole)] = ends[max(ends)] + plaintext
    for size in range(len(whole)):
        received, at_end = await receive_rest(over(Transport(whole[:size])))
        assert not at_end
        assert received == ends[max(end for end in ends if end <= size)]
    assert await receive_rest(over(Transport(whole))) == (b"abcd", True)


async def test_a_failed_record_ends_receiving_though_good_ones_follow() -> None:
    records = [seal(OUT, 0, b"reflected"), seal(IN, 1, b"x"), seal(IN, 2, b"y")]
    stream = over(Transport(b"".join(records), most=len(records[0])))
    for _ in records:
        assert await receive_rest(stream) == (b"", False)


async def test_a_record_that_does_not_open_shows_no_key_to_a_crash_reporter() -> None:
    """One that prints the local variables of every frame, of this exception and its context."""
    with pytest.raises(trio.BrokenResourceError) as caught:
        await over(Transport(bytes((0, 20)) + bytes(20))).receive_some()
    printed = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "did not open" in printed
    assert repr(IN)[2:-1] not in printed


# ---- all that is there ----


async def test_all_records_that_are_here_come_together() -> None:
    transport = Transport(seal(IN, 0, b"one") + seal(IN, 1, b"two") + seal(IN, 2, b"three")[:9])
    stream = over(transport)
    assert await stream.receive_view() == b"onetwo"
    transport.incoming += seal(IN, 2, b"three")[9:] + seal(IN, 3, b"")
    assert await stream.receive_view() == b"three"
    for _ in range(2):
        assert await stream.receive_view() == b""


@pytest.mark.parametrize("count", [3 * MAX_AT_ONCE, 3 * MAX_AT_ONCE + 1])
async def test_tiny_records_come_some_at_a_time_and_others_have_their_turn_between(count: int) -> None:
    stream = over(Transport(b"".join(seal(IN, n, b"x") for n in range(count)) + seal(IN, count, b"")))
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        batches: list[bytes] = []
        while received := await stream.receive_view():
            assert turns > len(batches)
            batches.append(received)
        nursery.cancel_scope.cancel()
    assert b"".join(batches) == b"x" * count
    assert max(map(len, batches)) == MAX_AT_ONCE


async def test_records_come_byte_by_byte() -> None:
    transport = Transport(seal(IN, 0, b"one") + seal(IN, 1, b"two") + seal(IN, 2, b""), most=1)
    stream = over(transport)
    assert [await stream.receive_view() for _ in range(3)] == [b"one", b"two", b""]


async def test_what_was_read_before_comes_first() -> None:
    stream = over(Transport(seal(IN, 0, b"first") + seal(IN, 1, b"then") + seal(IN, 2, b"and then")))
    assert await stream.receive_some(2) == b"fi"
    assert await stream.receive_view() == b"rst"
    assert await stream.receive_view() == b"thenand then"


async def test_a_record_that_does_not_open_is_told_after_those_before_it() -> None:
    stream = over(Transport(seal(IN, 0, b"good") + seal(IN, 7, b"bad") + seal(IN, 2, b"never seen")))
    assert await stream.receive_view() == b"good"
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="did not open"):
            await stream.receive_view()


async def test_the_end_of_the_transport_is_no_end_of_the_records() -> None:
    stream = over(Transport(seal(IN, 0, b"good")))
    assert await stream.receive_view() == b"good"
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await stream.receive_view()


# ---- new keys ----


async def test_ciphertext_read_before_rekey_is_opened_under_the_new_key() -> None:
    transport = Transport(seal(IN, 0, b"old") + seal(NEXT_IN, 0, b"new") + seal(NEXT_IN, 1, b""))
    stream = over(transport)
    assert await stream.receive_some() == b"old"
    assert transport.incoming == b""
    stream.rekey(send_key=NEXT_OUT, receive_key=NEXT_IN)
    assert await receive_rest(stream) == (b"new", True)


async def test_a_record_under_the_old_key_does_not_open_after_rekey() -> None:
    stream = over(Transport(seal(IN, 0, b"old") + seal(IN, 1, b"old") + seal(NEXT_IN, 0, b"new")))
    assert await stream.receive_some() == b"old"
    stream.rekey(send_key=NEXT_OUT, receive_key=NEXT_IN)
    assert await receive_rest(stream) == (b"", False)


async def test_sent_records_are_counted_anew_after_rekey() -> None:
    transport = Transport()
    stream = over(transport)
    await stream.send_all(b"a")
    await stream.send_all(b"b")
    stream.rekey(send_key=NEXT_OUT, receive_key=NEXT_IN)
    await stream.send_all(b"c")
    await stream.send_all(b"d")
    assert transport.sent == [
        seal(OUT, 0, b"a"),
        seal(OUT, 1, b"b"),
        seal(NEXT_OUT, 0, b"c"),
        seal(NEXT_OUT, 1, b"d"),
    ]


async def test_both_sides_rekey_at_the_same_place_and_go_on() -> None:
    left, right = memory_stream_pair()
    sides = (
        (over(left), {"send_key": NEXT_OUT, "receive_key": NEXT_IN}),
        (facing(right), {"send_key": NEXT_IN, "receive_key": NEXT_OUT}),
    )
    for stream, _ in sides:
        await stream.send_all(b"last under the old keys")
    for stream, keys in sides:
        assert await stream.receive_some() == b"last under the old keys"
        stream.rekey(**keys)
        await stream.send_all(b"first under the new ones")
    for stream, _ in sides:
        assert await stream.receive_some() == b"first under the new ones"


async def test_rekey_raises_the_limit_of_a_record() -> None:
    plaintext = bytes(MAX_PLAINTEXT_SIZE)
    transport = Transport(seal(IN, 0, b"old") + seal(NEXT_IN, 0, plaintext), most=50)
    stream = over(transport, max_record_size=64)
    assert await stream.receive_some() == b"old"
    stream.rekey(send_key=NEXT_OUT, receive_key=NEXT_IN)
    assert await stream.receive_some() == plaintext
    assert max(asked or 0 for asked in transport.asked) == HEADER_SIZE + MAX_RECORD_SIZE


# ---- nonces ----


ACTIONS: dict[str, Callable[[SecretboxStream], Awaitable[object]]] = {
    **SENDS,
    "empty": lambda stream: stream.send_all(b""),
    "receive": lambda stream: stream.receive_some(),
    "aclose": lambda stream: stream.aclose(),
}


async def act(stream: SecretboxStream, transport: Transport, action: str, how: str) -> None:
    """Take a step, and ignore its failure."""
    if how == "failed":
        transport.failure = OSError()
    elif how == "blocked":
        transport.send_gate = trio.Event()
    with (
        trio.move_on_after(0 if how == "cancelled" else 1),
        suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError),
    ):
        await ACTIONS[action](stream)
    transport.failure = None
    transport.send_gate.set()


@settings(deadline=None)
@given(
    actions=st.lists(
        st.tuples(
            st.sampled_from(sorted(ACTIONS)), st.sampled_from(["done", "cancelled", "blocked", "failed"])
        ),
        max_size=12,
    ),
    rekey_at=st.integers(0, 12),
)
def test_no_nonce_is_used_twice_under_a_key(actions: list[tuple[str, str]], rekey_at: int) -> None:
    used: list[tuple[str, bytes, bytes]] = []

    def spy_seal(message: bytes, nonce: bytes, key: bytes) -> bytes:
        used.append(("seal", key, nonce))
        return crypto_secretbox(message, nonce, key)

    def spy_open(box: bytes, nonce: bytes, key: bytes) -> bytes:
        used.append(("open", key, nonce))
        return crypto_secretbox_open(box, nonce, key)

    async def main() -> None:
        transport = Transport(seal(IN, 0, b"x") + seal(IN, 1, b"y") + seal(NEXT_IN, 0, b"z"))
        stream = over(transport)
        for number, (action, how) in enumerate(actions):
            if number == rekey_at:
                stream.rekey(send_key=NEXT_OUT, receive_key=NEXT_IN)
            await act(stream, transport, action, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "crypto_secretbox", spy_seal)
        patch.setattr(records, "crypto_secretbox_open", spy_open)
        run(main)
    assert len(set(used)) == len(used)
    assert {key for call, key, _ in used if call == "seal"} <= {OUT, NEXT_OUT}
    assert all(len(nonce) == 24 for _, _, nonce in used)


def test_no_key_shows_in_a_repr() -> None:
    key = bytes(range(32))
    stream = SecretboxStream(Transport(), send_key=key, receive_key=key)
    for shown in (repr(stream), repr(Direction(key)), str(stream)):
        assert repr(key)[2:-1] not in shown
        assert key.hex() not in shown


def test_a_direction_that_is_over_seals_and_opens_nothing() -> None:
    """Somebody may still wait for a record when its stream is closed."""
    over = Keyless("it is closed")
    with pytest.raises(trio.ClosedResourceError, match="it is closed"):
        over.seal(b"x")
    with pytest.raises(trio.ClosedResourceError, match="it is closed"):
        over.open(memoryview(bytes(20)))
