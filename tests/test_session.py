from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bokbok_trio import MessageTooLarge, ProtocolError
from bokbok_trio._errors import MAX_ERROR_TEXT_SIZE
from bokbok_trio._packets import encode_body, encode_head
from bokbok_trio._session import BATCH_SIZE, HEAD_ROOM, Answer, Cancel, Failure, Request, Session

LIMIT = 4096


def make(side: Any = "client", *, max_requests: int = 3, slots: int = 3, limit: int = LIMIT) -> Session:
    return Session(side, max_message_size=limit, max_requests=max_requests, slots=slots)


def packet(*fields: bytes, body: list[bytes] | None = None) -> bytes:
    if body is None:
        return encode_head(*fields)
    chunks, size = encode_body(body, 2**32)
    return encode_head(*fields, body_size=size) + b"".join(chunks)


def test_a_request_and_its_answer() -> None:
    client, server = make("client"), make("server")
    assert client.request(["ping", b"1"]) == 0
    sent = client.take()
    assert sent == packet(b"req", b"0", b"", body=[b"ping", b"1"])
    assert list(server.receive(sent)) == [Request(0, None, [b"ping", b"1"])]
    assert server.handling == 1
    server.answer(0, ["pong"])
    assert server.handling == 1, "a slot is taken until the answer leaves"
    sent = server.take()
    assert server.handling == 0
    assert sent == packet(b"ok", b"0", body=[b"pong"])
    assert list(client.receive(sent)) == [Answer(0, [b"pong"])]
    assert client.take() == server.take() == b""


def test_ids_count_up_by_parity() -> None:
    client, server = make("client"), make("server")
    assert [client.request([]) for _ in range(3)] == [0, 2, 4]
    assert [server.request([]) for _ in range(3)] == [1, 3, 5]


def test_a_failure_reaches_the_asker() -> None:
    client, server = make("client"), make("server")
    client.request([])
    list(server.receive(client.take()))
    server.fail(0, "no-such", "there is none")
    assert list(client.receive(server.take())) == [Failure(0, "no-such", "there is none")]


@pytest.mark.parametrize("character", ["a", "é", "€", "😀", "\ud800"])
def test_a_long_message_is_cut_between_characters(character: str) -> None:
    client, server = make("client"), make("server")
    client.request([])
    list(server.receive(client.take()))
    server.fail(0, "long", "x" + character * MAX_ERROR_TEXT_SIZE)
    [failure] = client.receive(server.take())
    assert isinstance(failure, Failure)
    size = len(failure.message.encode())
    assert MAX_ERROR_TEXT_SIZE - 3 <= size <= MAX_ERROR_TEXT_SIZE
    assert failure.message.startswith("x" + character.encode(errors="backslashreplace").decode())


def test_the_longest_error_fits_the_smallest_limit() -> None:
    server = make("server")
    list(server.receive(packet(b"req", b"9" * 17 + b"8", b"", body=[])))
    server.fail(int("9" * 17 + "8"), "c" * 64, "x" * 5000)
    assert len(server.take()) <= LIMIT


# ---- slots ----


def test_requests_wait_for_slots_in_order() -> None:
    client, server = make("client", slots=2), make("server", max_requests=2)
    for n in range(4):
        client.request([str(n)])
    sent = client.take()
    assert [event.id for event in server.receive(sent)] == [0, 2]
    assert client.take() == b""
    server.answer(2, [])
    assert list(client.receive(server.take())) == [Answer(2, [])]
    assert [event.id for event in server.receive(client.take())] == [4]
    server.answer(0, [])
    server.answer(4, [])
    list(client.receive(server.take()))
    assert [event.id for event in server.receive(client.take())] == [6]


def test_a_new_request_does_not_overtake_those_that_wait() -> None:
    client = make("client", slots=1)
    first, second = client.request([]), client.request([])
    assert client.is_unsent(second)
    client.take()
    list(client.receive(packet(b"ok", b"%d" % first, body=[])))
    third = client.request([])
    assert b"req" in (sent := client.take())
    assert b"\x00\x00\x00\x01%d" % second in sent
    assert client.is_unsent(third)


def test_more_requests_than_slots_are_an_error() -> None:
    server = make("server", max_requests=2)
    two = packet(b"req", b"0", b"", body=[]) + packet(b"req", b"2", b"", body=[])
    assert len(list(server.receive(two))) == 2
    server.answer(0, [])
    with pytest.raises(ProtocolError, match="more than 2 requests"):
        list(server.receive(packet(b"req", b"4", b"", body=[])))


def test_a_slot_is_free_as_soon_as_its_answer_is_taken() -> None:
    server = make("server", max_requests=1)
    list(server.receive(packet(b"req", b"0", b"", body=[])))
    server.answer(0, [])
    server.take()
    assert list(server.receive(packet(b"req", b"2", b"", body=[]))) == [Request(2, None, [])]


# ---- cancelling ----


def test_a_request_cancelled_in_the_queue_never_existed() -> None:
    client = make("client", slots=1)
    queued, waiting, third = client.request([]), client.request([]), client.request(["third"])
    client.cancel(waiting)
    client.cancel(queued)
    assert client.take() == packet(b"req", b"%d" % third, b"", body=[b"third"])


def test_a_request_cancelled_later_is_followed_by_cancel_and_still_answered() -> None:
    client, server = make("client", slots=1), make("server")
    client.request([])
    list(server.receive(client.take()))
    client.cancel(0)
    waiting = client.request([])
    sent = client.take()
    assert sent == packet(b"cancel", b"0"), "its slot is not free before its answer came"
    assert list(server.receive(sent)) == [Cancel(0)]
    server.fail(0, "cancelled", "")
    assert list(client.receive(server.take())) == []
    assert client.is_unsent(waiting)
    assert b"req" in client.take()
    assert not client.is_unsent(waiting)


def test_cancel_leaves_before_what_was_queued_earlier() -> None:
    client = make("client")
    client.request([])
    client.take()
    client.request(["later"])
    client.cancel(0)
    assert client.take() == packet(b"cancel", b"0") + packet(b"req", b"2", b"", body=[b"later"])


@pytest.mark.parametrize("answered", [False, True])
def test_a_cancel_that_crosses_the_answer_is_ignored(answered: bool) -> None:
    server = make("server")
    list(server.receive(packet(b"req", b"0", b"", body=[])))
    server.answer(0, [])
    if answered:
        server.take()
        assert list(server.receive(packet(b"cancel", b"0"))) == []
    else:
        assert list(server.receive(packet(b"cancel", b"0"))) == [Cancel(0)]
        assert server.take() == packet(b"ok", b"0", body=[])


# ---- what leaves ----


def test_a_batch_ends_near_its_size() -> None:
    client = make("client", slots=100, limit=2**20)
    for _ in range(5):
        client.request([bytes(BATCH_SIZE // 2)])
    sizes = []
    while sent := client.take():
        sizes.append(sent.count(b"req"))
    assert sizes == [2, 2, 1]


def test_nothing_is_copied_before_it_is_taken() -> None:
    client = make("client", limit=2**20)
    big = bytes(2**19)
    client.request([big])
    [chunks] = client._queue.values()
    assert any(chunk is big for chunk in chunks)


@pytest.mark.parametrize("queue", ["request", "answer"])
def test_what_fits_does_not_depend_on_the_id(queue: str) -> None:
    room = LIMIT - HEAD_ROOM - 5
    engine = make("server")
    list(engine.receive(packet(b"req", b"9" * 17 + b"8", b"", body=[])))
    if queue == "request":
        put: Callable[[list[bytes]], object] = engine.request
        engine._next_id = int("9" * 18)
    else:
        put = lambda fields: engine.answer(int("9" * 17 + "8"), fields)  # noqa: E731
    with pytest.raises(MessageTooLarge) as caught:
        put([bytes(room + 1)])
    assert (caught.value.size, caught.value.limit) == (LIMIT - HEAD_ROOM + 1, LIMIT - HEAD_ROOM)
    assert engine.take() == b""
    put([bytes(room)])
    sent = engine.take()
    assert room < len(sent) <= LIMIT + 4


# ---- a peer that lies ----

BAD = {
    "an unknown packet": [packet(b"hello", b"0")],
    "no field at all": [packet()],
    "req of wrong arity": [packet(b"req", b"0", body=[])],
    "ok of wrong arity": [packet(b"ok", b"1")],
    "err of wrong arity": [packet(b"err", b"1", b"code")],
    "cancel of wrong arity": [packet(b"cancel", b"0", b"0")],
    "an id that is no number": [packet(b"req", b"+2", b"", body=[])],
    "an id with a leading zero": [packet(b"req", b"02", b"", body=[])],
    "a timeout that is no number": [packet(b"req", b"2", b"1.5", body=[])],
    "a body that is none": [packet(b"req", b"2", b"", b"\x01")],
    "an answer's body that is none": [packet(b"ok", b"1", b"")],
    "an error that is not UTF-8": [packet(b"err", b"1", b"code", b"\xff")],
    "a code that is not UTF-8": [packet(b"err", b"1", b"\xff", b"text")],
    "an id of our parity": [packet(b"req", b"3", b"", body=[])],
    "cancel of our parity": [packet(b"cancel", b"1")],
    "an id in flight": [packet(b"req", b"0", b"", body=[])],
    "an answer nobody awaits": [packet(b"ok", b"5", body=[])],
    "an answer to its own request": [packet(b"ok", b"0", body=[])],
    "an answer to what was never sent": [packet(b"ok", b"3", body=[])],
    "a second answer": [packet(b"ok", b"1", body=[]), packet(b"err", b"1", b"c", b"m")],
    "a packet over the limit": [(LIMIT + 1).to_bytes(4, "big")],
    "a packet that is none": [b"\x00\x00\x00\x02\x01\x00"],
}


@pytest.mark.parametrize("packets", BAD.values(), ids=BAD)
def test_a_broken_rule_is_one_protocol_error(packets: list[bytes]) -> None:
    server = make("server")
    # In flight: request 0 of the peer's; of ours 1, awaited, and 3, unsent.
    list(server.receive(packet(b"req", b"0", b"", body=[])))
    server.request([])
    server.take()
    server.request([])
    for good in packets[:-1]:
        list(server.receive(good))
    with pytest.raises(ProtocolError):
        list(server.receive(packets[-1]))


def test_what_came_before_the_error_is_still_told() -> None:
    server = make("server")
    events = server.receive(packet(b"req", b"0", b"", body=[]) + packet(b"nonsense"))
    assert next(events) == Request(0, None, [])
    with pytest.raises(ProtocolError):
        next(events)


def test_a_timeout_is_told() -> None:
    server = make("server")
    assert list(server.receive(packet(b"req", b"0", b"1500000", body=[]))) == [Request(0, 1500000, [])]


def test_being_mid_packet() -> None:
    server = make("server")
    sent = packet(b"req", b"0", b"", body=[])
    assert not server.is_mid_packet
    assert list(server.receive(sent[:-1])) == []
    assert server.is_mid_packet
    assert len(list(server.receive(sent[-1:]))) == 1
    assert not server.is_mid_packet


# ---- two engines, in any order ----


class TwoEngines(RuleBasedStateMachine):
    """Two honest engines, joined by wires that carry bytes in any chunks, until one is cut.

    The model is what a user of each side may expect; the engines must never disagree with it.
    """

    asked = Bundle("asked")

    @initialize(slots=st.tuples(st.integers(1, 3), st.integers(1, 3)))
    def start(self, slots: tuple[int, int]) -> None:
        self.slots = slots
        self.engines = (
            make("client", max_requests=slots[0], slots=slots[1]),
            make("server", max_requests=slots[1], slots=slots[0]),
        )
        self.wires = [bytearray(), bytearray()]  # by sender
        self.is_cut = [False, False]
        self.waiting: list[dict[int, bytes]] = [{}, {}]  # id -> what it asked, by asker
        self.cancelled: list[set[int]] = [set(), set()]
        self.seen: list[set[int]] = [set(), set()]  # ids the other side was told of, by asker
        self.handling: list[dict[int, bytes]] = [{}, {}]  # id -> what was asked, by answerer

    @rule(target=asked, side=st.integers(0, 1), text=st.binary(max_size=40))
    def ask(self, side: int, text: bytes) -> tuple[int, int]:
        id = self.engines[side].request([text])
        assert id % 2 == side
        assert id not in self.waiting[side]
        self.waiting[side][id] = text
        return side, id

    @rule(request=consumes(asked))
    def cancel(self, request: tuple[int, int]) -> None:
        side, id = request
        if self.waiting[side].pop(id, None) is not None:
            self.engines[side].cancel(id)
            self.cancelled[side].add(id)

    @rule(side=st.integers(0, 1), which=st.integers(0, 9), good=st.booleans())
    def answer(self, side: int, which: int, good: bool) -> None:
        if self.handling[side]:
            ids = list(self.handling[side])
            id = ids[which % len(ids)]
            text = self.handling[side].pop(id)
            if good:
                self.engines[side].answer(id, [b"re: " + text])
            else:
                self.engines[side].fail(id, "bad", text.hex())

    @rule(side=st.integers(0, 1))
    def send(self, side: int) -> None:
        self.wires[side] += self.engines[side].take()

    @rule(side=st.integers(0, 1), size=st.integers(1, 60))
    def deliver(self, side: int, size: int) -> None:
        if not self.is_cut[side]:
            data = bytes(self.wires[side][:size])
            del self.wires[side][:size]
            for event in self.engines[1 - side].receive(data):
                self.check_event(1 - side, event)

    def check_event(self, side: int, event: object) -> None:
        match event:
            case Request(id, None, [text]):
                assert id not in self.seen[1 - side]
                assert self.waiting[1 - side].get(id, text) == text
                self.seen[1 - side].add(id)
                self.handling[side][id] = text
            case Cancel(id):
                assert id in self.cancelled[1 - side]
            case Answer(id, [text]):
                assert text == b"re: " + self.waiting[side].pop(id)
            case Failure(id, "bad", text):
                assert bytes.fromhex(text) == self.waiting[side].pop(id)
            case _:
                raise AssertionError(event)

    @precondition(lambda self: not any(self.is_cut))
    @rule(side=st.integers(0, 1))
    def cut(self, side: int) -> None:
        self.is_cut[side] = True

    @invariant()
    def nothing_is_over_its_bound(self) -> None:
        for side in (0, 1):
            assert len(self.engines[side]._asked) <= self.slots[1 - side]
            assert self.engines[side].handling <= self.slots[side]
            assert len(self.engines[side]._control) <= self.slots[1 - side]
            for id in self.seen[side]:
                assert not self.engines[side].is_unsent(id)

    def teardown(self) -> None:
        if not hasattr(self, "engines") or any(self.is_cut):
            return
        while self.step():
            pass
        for side in (0, 1):
            assert self.waiting[side] == {}
            engine = self.engines[side]
            left = (engine._asked, engine._cancelled, engine._handling, engine._backlog, engine._queue)
            assert not any(left), left

    def step(self) -> bool:
        """Answer, send and deliver all there is. Returns whether there was anything."""
        busy = False
        for side in (0, 1):
            while self.handling[side]:
                self.answer(side, 0, good=True)
            self.send(side)
            busy = busy or bool(self.wires[side])
            self.deliver(side, len(self.wires[side]))
        return busy


def test_two_engines_never_disagree_and_leak_nothing() -> None:
    run_state_machine_as_test(
        TwoEngines, settings=settings(max_examples=100, stateful_step_count=60, deadline=None)
    )
