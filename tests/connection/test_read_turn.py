"""`ReadTurn`: one task reads, one at most follows, and nobody is lost."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bokbok_trio._connection.read_turn import ReadTurn


class ReadTurnMachine(RuleBasedStateMachine):
    """What the tasks of a connection do with the turn, in any order.

    Tasks are numbers. A task reads, handles, follows, or has ended; `starting` counts those that were started
    to read and have not begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn: ReadTurn[int] = ReadTurn()
        self.count = 0
        self.reader: int | None = None
        self.follower: int | None = None
        self.handling: list[int] = []
        self.starting = 1

    @initialize()
    def start(self) -> None:
        self.begin()

    @precondition(lambda self: self.starting)
    @rule()
    def begin(self) -> None:
        """A task that was started runs for the first time."""
        self.starting -= 1
        self.count += 1
        self.turn.begin(self.count)
        self.reader = self.count

    @precondition(lambda self: self.reader is not None)
    @rule()
    def wait(self) -> None:
        """The handler that was begun in the task that reads waits."""
        assert self.reader is not None
        self.handling.append(self.reader)
        follower = self.turn.hand_over()
        assert follower == self.follower
        self.reader, self.follower = follower, None
        if follower is None:
            self.starting += 1

    @precondition(lambda self: self.handling)
    @rule(data=st.data())
    def end_handler(self, data: st.DataObject) -> None:
        """A handler that has waited ends: its task follows, or ends."""
        task = data.draw(st.sampled_from(self.handling))
        self.handling.remove(task)
        follows = self.turn.follow(task)
        assert follows is (self.follower is None)
        if follows:
            self.follower = task

    @precondition(lambda self: self.handling)
    @rule(data=st.data())
    def end_task(self, data: st.DataObject) -> None:
        """A handler spoils its task, which ends without following. Nobody else notices."""
        task = data.draw(st.sampled_from(self.handling))
        self.handling.remove(task)
        self.turn.leave(task)

    @precondition(lambda self: self.follower is not None)
    @rule()
    def cancel_follower(self) -> None:
        """The follower is cancelled."""
        assert self.follower is not None
        self.turn.leave(self.follower)
        self.follower = None

    @precondition(lambda self: self.reader is not None)
    @rule()
    def refuse_another(self) -> None:
        """The task that reads cannot follow, and no second one can read."""
        assert self.reader is not None
        with pytest.raises(AssertionError):
            self.turn.follow(self.reader)
        with pytest.raises(AssertionError):
            self.turn.begin(self.count + 1)

    @precondition(lambda self: self.starting)
    @rule()
    def refuse_to_hand_over_nothing(self) -> None:
        with pytest.raises(AssertionError):
            self.turn.hand_over()

    @invariant()
    def agrees(self) -> None:
        assert self.turn.reader == self.reader
        assert self.turn.follower == self.follower

    @invariant()
    def one_reads(self) -> None:
        """Exactly one task reads or is being started to."""
        assert (self.turn.reader is not None) + self.starting == 1

    @invariant()
    def nobody_is_two_things(self) -> None:
        tasks = [*self.handling, *(t for t in (self.turn.reader, self.turn.follower) if t is not None)]
        assert len(set(tasks)) == len(tasks)


ReadTurnMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReadTurn = ReadTurnMachine.TestCase


def test_a_task_whose_handler_ends_takes_over_from_a_handler_that_waits() -> None:
    turn: ReadTurn[str] = ReadTurn()
    turn.begin("a")
    assert turn.hand_over() is None  # a's handler waits: a new task is wanted
    turn.begin("b")
    assert turn.follow("a")
    assert turn.hand_over() == "a"  # b's handler waits: a reads
    assert (turn.reader, turn.follower) == ("a", None)


def test_a_second_task_whose_handler_ends_is_not_needed() -> None:
    turn: ReadTurn[str] = ReadTurn()
    turn.begin("a")
    turn.hand_over()
    turn.begin("b")
    turn.hand_over()
    turn.begin("c")
    assert turn.follow("a")
    assert not turn.follow("b")
    assert turn.follower == "a"


def test_one_that_is_not_the_follower_leaves_nothing_behind() -> None:
    turn: ReadTurn[str] = ReadTurn()
    turn.begin("a")
    turn.hand_over()
    turn.begin("b")
    turn.follow("a")
    assert not turn.leave("c")
    assert (turn.reader, turn.follower) == ("b", "a")
    assert not turn.leave("a")
    assert (turn.reader, turn.follower) == ("b", None)
    assert turn.leave("b")
    assert turn.reader is None
