"""Two engines, in any order: they never disagree, and nothing leaks."""

from __future__ import annotations

import math

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

from bokbok_trio._protocol.events import Answer, Bye, Cancel, End, Failure, Item, Pong, Request
from bokbok_trio._protocol.flow_control import MAX_QUEUED, WINDOW
from tests.support.engines import make, receive, send_item
from tests.support.inside import held_in_pieces, tables_of_an_engine


class TwoEngines(RuleBasedStateMachine):
    """Two honest engines, joined by wires that carry bytes in any chunks, until one is cut.

    The model is what a user of each side may expect; the engines must never disagree with it.
    """

    asked = Bundle("asked")

    @initialize(slots=st.tuples(st.integers(1, 3), st.integers(1, 3)))
    def start(self, slots: tuple[int, int]) -> None:
        self.slots = slots
        self.engines = (
            make("client", max_requests=slots[0], slots=slots[1], limit=2**20),
            make("server", max_requests=slots[1], slots=slots[0], limit=2**20),
        )
        self.now = 0.0
        self.timeouts: list[dict[int, float]] = [{}, {}]  # of those without a deadline, by asker
        self.has_drained = [False, False]
        self.wires = [bytearray(), bytearray()]  # by sender
        self.is_cut = [False, False]
        self.waiting: list[dict[int, bytes]] = [{}, {}]  # id -> what it asked, by asker
        self.cancelled: list[set[int]] = [set(), set()]
        self.seen: list[set[int]] = [set(), set()]  # ids the other side was told of, by asker
        self.handling: list[dict[int, bytes]] = [{}, {}]  # id -> what was asked, by answerer
        # Of channels, by the side that does it, and id: what was sent and not told, what is to be consumed.
        self.items: list[dict[int, list[bytes]]] = [{}, {}]
        self.held: list[dict[int, list[int]]] = [{}, {}]
        self.ended: list[set[int]] = [set(), set()]
        self.end_told: list[set[int]] = [set(), set()]

    @rule(
        target=asked,
        side=st.integers(0, 1),
        text=st.binary(max_size=40),
        times=st.sampled_from([1, 1, 1, 5000]),
        timeout=st.sampled_from([math.inf, 2.5]),
        has_channel=st.booleans(),
        depth=st.sampled_from([0, 0, 1, 15]),
    )
    def ask(
        self, *, side: int, text: bytes, times: int, timeout: float, has_channel: bool, depth: int
    ) -> tuple[int, int]:
        if self.engines[side].draining.peer_drains and not depth:
            return side, -1
        text *= times
        if has_channel:
            id = self.engines[side].open_channel([text], self.now + timeout, depth=depth)
            self.items[side][id], self.items[1 - side][id] = [], []
            self.held[side][id] = []
        else:
            id = self.engines[side].request([text], self.now + timeout, depth=depth)
        if timeout == math.inf:
            self.timeouts[side][id] = timeout
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
            self.held[side].pop(id, None)

    def channel_of(self, side: int, which: int) -> int | None:
        """Return a channel whose end on that side is still in use."""
        ids = [id for id in self.held[side] if id in self.waiting[side] or id in self.handling[side]]
        return ids[which % len(ids)] if ids else None

    @rule(side=st.integers(0, 1), which=st.integers(0, 9), size=st.sampled_from([0, 10, 30_000, 200_000]))
    def send_item(self, side: int, which: int, size: int) -> None:
        id = self.channel_of(side, which)
        if id is not None and id not in self.ended[side] and self.engines[side].flow_control.may_send(id):
            self.items[side][id].append(bytes(size))
            send_item(self.engines[side], id, bytes(size))

    @rule(side=st.integers(0, 1), which=st.integers(0, 9))
    def end(self, side: int, which: int) -> None:
        id = self.channel_of(side, which)
        if id is not None:
            self.engines[side].flow_control.end(id)
            self.ended[side].add(id)

    @rule(side=st.integers(0, 1), which=st.integers(0, 9))
    def consume(self, side: int, which: int) -> None:
        id = self.channel_of(side, which)
        if id is not None and self.held[side][id]:
            self.engines[side].flow_control.consume(id, self.held[side][id].pop(0))

    @rule(side=st.integers(0, 1), which=st.integers(0, 9), good=st.booleans())
    def answer(self, side: int, which: int, good: bool) -> None:
        if self.handling[side]:
            ids = list(self.handling[side])
            id = ids[which % len(ids)]
            text = self.handling[side].pop(id)
            self.held[side].pop(id, None)
            if good:
                self.engines[side].answer(id, [b"re: " + text])
            else:
                self.engines[side].fail(id, "bad", text[:100].hex())  # a longer message would be cut off

    @rule(side=st.integers(0, 1))
    def send(self, side: int) -> None:
        self.wires[side] += self.engines[side].take(self.now)
        assert self.engines[side].has_more == self.engines[side].has_queued

    @rule()
    def wait(self) -> None:
        self.now += 1

    @rule(side=st.integers(0, 1))
    def ping(self, side: int) -> None:
        self.engines[side].ping()

    @rule(side=st.integers(0, 1), often=st.sampled_from([False, False, False, True]))
    def drain(self, side: int, often: bool) -> None:
        if often:  # else no machine would go far
            self.engines[side].drain()
            self.has_drained[side] = True

    @rule(side=st.integers(0, 1), size=st.sampled_from([1, 7, 60, 1000, 10**6]))
    def deliver(self, side: int, size: int) -> None:
        if not self.is_cut[side]:
            data = bytes(self.wires[side][:size])
            del self.wires[side][:size]
            for event in receive(self.engines[1 - side], data):
                self.check_event(1 - side, event)

    def check_event(self, side: int, event: object) -> None:
        match event:
            case Item(id, size, [field]):
                if id not in self.held[side]:
                    assert id % 2 != side, "of a cancelled channel nothing is told"
                    return
                assert self.items[1 - side][id].pop(0) == field
                assert id not in self.end_told[side]
                self.held[side][id].append(size)
            case End(id):
                assert id not in self.end_told[side]
                assert id in self.ended[1 - side]
                assert id not in self.held[side] or not self.items[1 - side][id]
                self.end_told[side].add(id)
            case Pong():
                pass
            case Request(id, timeout, [text], has_channel, _, _):
                assert has_channel == (id in self.items[side])
                if has_channel:
                    self.held[side][id] = []
                    self.engines[side].flow_control.accept(id)
                assert timeout == self.timeouts[1 - side].get(id, timeout)
                assert id not in self.seen[1 - side]
                assert self.waiting[1 - side].get(id, text) == text
                self.seen[1 - side].add(id)
                self.handling[side][id] = text
            case Bye(ids):
                assert self.has_drained[1 - side]
                for id in ids:
                    assert id not in self.seen[side]
                    del self.waiting[side][id]
                    self.held[side].pop(id, None)
            case Cancel(id):
                assert id in self.cancelled[1 - side]
                self.engines[side].drop_items(id)
            case Answer(id, [text]):
                assert text == b"re: " + self.waiting[side].pop(id)
                self.on_answered(side, id)
            case Failure(id, "bad", text, b""):
                assert bytes.fromhex(text) == self.waiting[side].pop(id)[:100]
                self.on_answered(side, id)
            case _:
                raise AssertionError(event)

    def on_answered(self, side: int, id: int) -> None:
        if self.held[side].pop(id, None) is not None:
            assert self.items[1 - side][id] == [], "all items come before the answer"

    @precondition(lambda self: not any(self.is_cut))
    @rule(side=st.integers(0, 1))
    def cut(self, side: int) -> None:
        self.is_cut[side] = True

    @invariant()
    def nothing_is_over_its_bound(self) -> None:
        for side in (0, 1):
            assert held_in_pieces(self.engines[side]) <= 4 * 2**20
            for sizes in self.held[side].values():
                assert sum(sizes) < WINDOW + 200_005
            for flow in self.engines[side].flow_control.credits.values():
                assert 0 <= flow.queued < MAX_QUEUED + 200_005
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
            left = tables_of_an_engine(engine)
            assert not any(left), left
            assert engine.asked == engine.waiting == engine.handling == engine.queued == 0
            assert not len(engine.flow_control)
            assert held_in_pieces(engine) == 0
            assert engine.is_drained == self.has_drained[side]

    def step(self) -> bool:
        """Answer, send and deliver everything. Return whether there was anything."""
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
        TwoEngines, settings=settings(max_examples=50, stateful_step_count=60, deadline=None)
    )
