from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from bokbok_trio._protocol.outbox import MAX_BATCH_SIZE, MIN_BATCH_SIZE, RESERVED_FRACTION, SLOW_SEND, Outbox
from bokbok_trio._protocol.packets import PacketDecoder, decode_body, encode_packet
from bokbok_trio._protocol.pieces import MAX_IN_PIECES, MAX_PIECE_SIZE, Reassembler
from bokbok_trio._protocol.queued_packet import HEAD_ROOM, MAX_WHOLE_SIZE, QueuedPacket
from bokbok_trio._stream.records import MAX_PLAINTEXT_SIZE
from tests.support.helpers import decode

LIMIT = 2**20


def message(id: int, size: int) -> QueuedPacket:
    """Make a packet whose body has so many bytes, each of them the id."""
    return QueuedPacket(b"ok", id, body=[bytes((id,)) * size], body_size=size)


class Receiver:
    """The other side, which decodes the batches."""

    def __init__(self) -> None:
        self._decoder = PacketDecoder(MAX_WHOLE_SIZE)
        self.pieces = Reassembler(LIMIT)
        self.whole: list[tuple[int, int]] = []  # the id and the size of the body, as they come

    def receive(self, batch: bytes) -> list[list[bytes]]:
        packets = decode(self._decoder, batch)
        for fields in packets:
            self._interpret(fields)
        return packets

    def _interpret(self, fields: list[bytes]) -> None:
        match fields:
            case [b"part", number, left, piece]:
                body = self.pieces.add(int(number), int(left), piece)
                if body is not None:
                    self._interpret(decode_body(body))
            case [b"drop", number]:
                self.pieces.drop(int(number))
            case [b"ok", id, body]:
                assert body == bytes((int(id),)) * len(body)
                self.whole.append((int(id), len(body)))
            case _:
                assert fields == [b"ping"]


def take(outbox: Outbox, now: float, room: int = MAX_BATCH_SIZE) -> tuple[bytes, list[int]]:
    """Take the next batch. Return it, and the ids of the packets that have departed with it."""
    batch = outbox.take(now, room)
    assert batch.items == []
    return b"".join(batch.chunks), batch.departed


def kinds(packets: list[list[bytes]]) -> list[bytes]:
    return [fields[0] for fields in packets]


def test_what_has_not_wholly_left_is_counted() -> None:
    outbox = Outbox()
    assert len(outbox) == 0
    outbox.put_control(b"ping")
    outbox.put(message(1, 10))
    outbox.put(message(2, MAX_BATCH_SIZE * 2))
    outbox.put(message(3, MAX_BATCH_SIZE * 2))
    assert len(outbox) == 4
    take(outbox, 0)
    assert len(outbox) == 2, "one of them partly"
    while take(outbox, 0)[0]:
        pass
    assert len(outbox) == 0


def test_control_leaves_first() -> None:
    outbox = Outbox()
    outbox.put(message(0, 10))
    outbox.put_control(b"ping")
    batch, left = take(outbox, 0)
    assert kinds(Receiver().receive(batch)) == [b"ping", b"ok"]
    assert left == [0]
    assert take(outbox, 0) == (b"", [])


@pytest.mark.parametrize("size", [MAX_WHOLE_SIZE - HEAD_ROOM, MAX_WHOLE_SIZE - HEAD_ROOM + 1])
def test_what_is_too_big_leaves_in_pieces(size: int) -> None:
    outbox, receiver = Outbox(), Receiver()
    outbox.put(message(1, size))
    found = []
    while 1 in outbox:
        found += kinds(receiver.receive(take(outbox, 0)[0]))
    assert found == ([b"ok"] if size <= MAX_WHOLE_SIZE - HEAD_ROOM else [b"part", b"part"])
    assert receiver.whole == [(1, size)]


def test_a_piece_with_the_longest_head_fits_one_record() -> None:
    longest = b"9" * 18
    head = encode_packet(b"part", longest, longest, body_size=MAX_PIECE_SIZE)
    assert len(head) + MAX_PIECE_SIZE == MAX_PLAINTEXT_SIZE


def test_a_batch_ends_near_its_size() -> None:
    outbox, receiver = Outbox(), Receiver()
    for id in range(5):
        outbox.put(message(id, MAX_BATCH_SIZE // 2))
    assert [len(receiver.receive(take(outbox, 0)[0])) for _ in range(4)] == [2, 2, 1, 0]


def test_small_packets_and_pieces_do_not_starve_each_other() -> None:
    outbox, receiver = Outbox(), Receiver()
    outbox.put(message(200, LIMIT // 2))
    for id in range(100):
        outbox.put(message(id, 4000))
    sizes = []
    while 200 in outbox:
        batch = take(outbox, 0)[0]
        packets = receiver.receive(batch)
        assert kinds(packets)[-1] == b"part"
        assert kinds(packets).count(b"part") == 1
        assert len(packets[-1][3]) >= MAX_BATCH_SIZE * RESERVED_FRACTION or 200 not in outbox
        sizes.append(len(batch))
    assert receiver.whole == [*((id, 4000) for id in range(100)), (200, LIMIT // 2)]
    assert max(sizes) <= MAX_BATCH_SIZE + 5000
    assert min(sizes[:-1]) > MAX_BATCH_SIZE * 0.9


def test_big_packets_take_turns_and_four_at_most_are_open() -> None:
    outbox, receiver = Outbox(), Receiver()
    for id in range(6):
        outbox.put(message(id, 3 * MAX_PIECE_SIZE))
    turns = []
    while batch := take(outbox, 0)[0]:
        parts = receiver.receive(batch)
        [number] = {int(part[1]) for part in parts}
        turns.append(number)
        assert receiver.pieces.held <= MAX_IN_PIECES * LIMIT
    assert turns[:9] == [*[0, 1, 2, 3] * 2, 0], "the first is done, its last bytes too, and makes room"
    assert turns[9] == 4
    assert sorted(turns) == sorted([0, 1, 2, 3, 4, 5] * 3)
    assert sorted(id for id, _ in receiver.whole) == list(range(6))


def test_batches_fit_how_long_they_take() -> None:
    outbox, receiver = Outbox(), Receiver()
    outbox.put(message(0, LIMIT - HEAD_ROOM))

    def next_size() -> int:
        batch, _ = take(outbox, 0)
        receiver.receive(batch)
        return len(batch)

    assert MAX_BATCH_SIZE - 200 < next_size() <= MAX_BATCH_SIZE
    sizes = []
    for _ in range(4):
        outbox.note_sent(SLOW_SEND * 2)
        sizes.append(next_size())
    assert [round(size / 2**14) for size in sizes] == [2, 1, 1, 1]
    assert sizes[-1] <= MIN_BATCH_SIZE + 200
    outbox.note_sent(SLOW_SEND / 2)
    assert next_size() == sizes[-1]
    for _ in range(4):
        outbox.note_sent(0)
        sizes.append(next_size())
    assert [round(size / 2**14) for size in sizes[-4:]] == [2, 4, 4, 4]


def test_without_room_pieces_wait_and_small_packets_go() -> None:
    outbox, receiver = Outbox(), Receiver()
    assert not outbox.has_big
    outbox.put(message(0, LIMIT // 2))
    outbox.put(message(1, 100))
    assert outbox.has_big
    assert kinds(receiver.receive(take(outbox, 0, 0)[0])) == [b"ok"]
    assert take(outbox, 0, 0) == (b"", [])
    batch, _ = take(outbox, 0, MIN_BATCH_SIZE)
    assert kinds(receiver.receive(batch)) == [b"part"]
    assert MIN_BATCH_SIZE - 100 < len(batch) <= MIN_BATCH_SIZE + 100
    assert outbox.has_big
    outbox.remove(0)
    assert not outbox.has_big


def test_room_is_for_pieces_and_no_bound_without_them() -> None:
    outbox = Outbox()
    for id in range(20):
        outbox.put(message(id, 4000))
    assert len(take(outbox, 0, 0)[0]) > MAX_BATCH_SIZE - 4000


def test_pieces_that_were_overtaken_use_all_the_room_there_is() -> None:
    outbox = Outbox()
    outbox.put(message(0, LIMIT // 2))
    outbox.put(message(1, MIN_BATCH_SIZE))
    assert take(outbox, 0, 0)[1] == [1]
    assert len(take(outbox, 0)[0]) > MAX_BATCH_SIZE - 200


def test_pieces_without_room_are_not_starved() -> None:
    outbox, receiver = Outbox(), Receiver()
    outbox.put(message(200, LIMIT - HEAD_ROOM))
    pieces, between, longest = 0, 0, 0
    for id in range(200):
        outbox.put(message(id, 4000))
        for fields in receiver.receive(take(outbox, 0, 0)[0]):
            between = 0 if fields[0] == b"part" else between + 4000
            pieces += fields[0] == b"part"
            longest = max(longest, between)
    assert pieces > 30
    assert longest < MIN_BATCH_SIZE * 2


def test_a_packet_is_taken_back_unless_it_has_left() -> None:
    outbox, receiver = Outbox(), Receiver()
    for id, size in ((0, 10), (1, LIMIT // 2), (2, LIMIT // 2)):
        outbox.put(message(id, size))
    assert outbox.remove(0)
    receiver.receive(take(outbox, 0)[0])
    assert 0 not in outbox
    assert receiver.pieces.held > 0
    assert outbox.remove(1)
    assert not outbox.remove(1)
    assert kinds(receiver.receive(take(outbox, 0)[0])) == [b"drop", b"part"]
    assert outbox.remove(2)
    assert kinds(receiver.receive(take(outbox, 0)[0])) == [b"drop"]
    assert receiver.pieces.held == 0
    assert receiver.whole == []


def test_a_big_packet_that_has_not_begun_leaves_no_drop() -> None:
    outbox = Outbox()
    outbox.put(message(0, LIMIT))
    assert outbox.remove(0)
    assert take(outbox, 0) == (b"", [])


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from([0, 1, 100, 30_000, 70_000, 200_000])),
        st.tuples(st.just("remove"), st.integers(0, 60)),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("ping"), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(OPERATIONS)
def test_whatever_is_queued_arrives_once_unless_it_was_taken_back(operations: list[tuple[str, int]]) -> None:
    outbox, receiver = Outbox(), Receiver()
    sizes: dict[int, int] = {}
    done: list[int] = []

    def receive() -> bytes:
        batch, now_done = take(outbox, 0)
        receiver.receive(batch)
        done.extend(now_done)
        assert sorted(done) == sorted(id for id, _ in receiver.whole), "the last byte has left"
        assert all(id not in outbox for id in done)
        assert len(batch) <= MAX_BATCH_SIZE + max(sizes.values(), default=0) + 200
        return batch

    for id, (operation, number) in enumerate(operations):
        match operation:
            case "put":
                sizes[id] = number
                outbox.put(message(id, number))
            case "remove":
                was_there = number in outbox
                assert outbox.remove(number) == was_there
                if was_there:
                    del sizes[number]
            case "ping":
                outbox.put_control(b"ping")
            case _:
                receive()
    while receive():
        pass
    assert sorted(receiver.whole) == sorted(sizes.items())
    assert receiver.pieces.held == 0
