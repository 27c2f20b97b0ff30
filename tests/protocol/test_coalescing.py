"""`Coalescing`: bursts leave together, interactive traffic leaves at once, and nothing stays."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bokbok_trio._protocol.coalescing import (
    EARLY_FLUSH_PACKETS,
    HOLD,
    INTERACTIVE_RECEIVES,
    LATER,
    NOW,
    Coalescing,
    When,
)


class CoalescingMachine(RuleBasedStateMachine):
    """A connection that decides when packets are sent, compared with the rule in plain words."""

    def __init__(self) -> None:
        super().__init__()
        self.coalescing = Coalescing()
        self.receives = [1] * INTERACTIVE_RECEIVES  # how many packets each brought
        self.received: int | None = None  # while the events of a receive are dispatched
        self.since_sent = 0  # requests and answers since something left at once, or the task was idle
        self.has_left_at_once = False  # one of them, since the task was idle or a receive was dispatched
        self.unsent = 0
        self.task = "asleep"  # or awake, or sending: only then does it hold the lock

    # ---- what happens ----

    @rule(interactive=st.booleans(), times=st.integers(1, EARLY_FLUSH_PACKETS))
    def queue(self, interactive: bool, times: int) -> None:
        """Queue packets in one turn of the event loop."""
        for _ in range(times):
            self.unsent += 1
            expected = self.expect(interactive)
            when = self.coalescing.interactive_queued() if interactive else self.coalescing.queued()
            assert when is expected
            if when is NOW:
                self.write()
            elif when is LATER:
                self.wake()

    def expect(self, interactive: bool) -> When:
        """The rule."""
        self.since_sent += interactive
        if interactive and self.since_sent >= EARLY_FLUSH_PACKETS:
            return NOW
        if self.received is not None:
            return HOLD
        is_interactive_traffic = all(count == 1 for count in self.receives[-INTERACTIVE_RECEIVES:])
        if interactive and is_interactive_traffic and not self.has_left_at_once:
            self.has_left_at_once = True
            return NOW
        return LATER

    @precondition(lambda self: self.received is None)
    @rule(received=st.sampled_from([0, 1, 1, 1, 2]))
    def cork(self, received: int) -> None:
        self.coalescing.cork(received)
        self.received = received

    @precondition(lambda self: self.received is None)
    @rule(received=st.sampled_from([1, 1, 2]), times=st.integers(1, INTERACTIVE_RECEIVES))
    def receive(self, received: int, times: int) -> None:
        """Dispatch some receives that queue nothing."""
        for _ in range(times):
            self.cork(received)
            self.uncork()

    @rule()
    def uncork(self) -> None:
        self.coalescing.uncork()
        if self.received:
            self.receives.append(self.received)
            self.has_left_at_once = False
        self.received = None
        self.write()

    def write(self) -> None:
        """Write everything, unless the sender task is writing."""
        self.since_sent = 0
        if self.task == "sending":
            return
        self.unsent = 0

    def wake(self) -> None:
        if self.task == "asleep":
            self.task = "awake"

    @precondition(lambda self: self.task != "asleep")
    @rule()
    def send(self) -> None:
        """The task takes everything that is queued, and waits for the stream."""
        self.unsent = 0
        self.task = "sending"

    @precondition(lambda self: self.task != "asleep" and not self.unsent)
    @rule()
    def sleep(self) -> None:
        self.coalescing.idle()
        self.task = "asleep"
        self.since_sent = 0
        self.has_left_at_once = False

    # ---- what holds ----

    @invariant()
    def nothing_stays_unsent(self) -> None:
        """Each packet that is queued leaves at once, or the task is awake, or `uncork` follows."""
        assert not self.unsent or self.task != "asleep" or self.received is not None

    @invariant()
    def it_is_corked_while_a_receive_is_dispatched(self) -> None:
        assert self.coalescing.is_corked is (self.received is not None)


CoalescingMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestCoalescing = CoalescingMachine.TestCase


def queue(coalescing: Coalescing, count: int) -> list[When]:
    return [coalescing.interactive_queued() for _ in range(count)]


def receive(coalescing: Coalescing, *counts: int) -> None:
    """Receive several times, and queue nothing meanwhile."""
    for count in counts:
        coalescing.cork(count)
        coalescing.uncork()


def test_the_first_request_of_a_connection_leaves_at_once_and_the_next_ones_together() -> None:
    assert queue(Coalescing(), 3) == [NOW, LATER, LATER]


def test_one_call_after_another_never_waits() -> None:
    coalescing = Coalescing()
    for _ in range(10):
        assert queue(coalescing, 1) == [NOW]
        receive(coalescing, 1)


def test_after_a_burst_traffic_is_interactive_again_with_the_third_receive_of_one_packet() -> None:
    coalescing = Coalescing()
    receive(coalescing, 2)
    for _ in range(INTERACTIVE_RECEIVES):
        coalescing.idle()
        assert queue(coalescing, 1) == [LATER]
        receive(coalescing, 1)
    assert queue(coalescing, 2) == [NOW, LATER]
    coalescing.idle()
    assert queue(coalescing, 2) == [NOW, LATER]


def test_a_receive_that_means_nothing_says_nothing_about_the_traffic() -> None:
    coalescing = Coalescing()
    receive(coalescing, 0, 0)
    assert queue(coalescing, 1) == [NOW]
    receive(coalescing, 0)
    assert queue(coalescing, 1) == [LATER]


def test_of_a_long_burst_some_packets_leave_early_even_while_a_receive_is_dispatched() -> None:
    coalescing = Coalescing()
    coalescing.cork(100)
    expected = [*[HOLD] * (EARLY_FLUSH_PACKETS - 1), NOW]
    assert queue(coalescing, 2 * EARLY_FLUSH_PACKETS) == 2 * expected
    coalescing.uncork()
    expected[:-1] = [LATER] * (EARLY_FLUSH_PACKETS - 1)
    assert queue(coalescing, EARLY_FLUSH_PACKETS) == expected


def test_packets_that_the_sender_has_sent_do_not_count_towards_those_that_leave_early() -> None:
    coalescing = Coalescing()
    receive(coalescing, 2)
    for _ in range(3):
        assert queue(coalescing, EARLY_FLUSH_PACKETS - 1) == [LATER] * (EARLY_FLUSH_PACKETS - 1)
        coalescing.idle()


def test_a_packet_that_nobody_waits_for_never_leaves_at_once() -> None:
    coalescing = Coalescing()
    assert {coalescing.queued() for _ in range(2 * EARLY_FLUSH_PACKETS)} == {LATER}
    coalescing.cork(1)
    assert {coalescing.queued() for _ in range(2 * EARLY_FLUSH_PACKETS)} == {HOLD}
