from __future__ import annotations

import math
import random
import sys
from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from bokbok_trio import TCPAddress, UnixAddress
from bokbok_trio._addresses import Address
from bokbok_trio._places import Place, Places, RandomSet, Turns, find_source
from tests.support.helpers import settle

# ---- sources ----


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (TCPAddress("192.0.2.1", 1), TCPAddress("192.0.2.1", 2), True),
        (TCPAddress("192.0.2.1", 1), TCPAddress("192.0.2.2", 1), False),
        (TCPAddress("2001:db8::1", 1), TCPAddress("2001:db8::ffff:1", 2), True),
        (TCPAddress("2001:db8::1", 1), TCPAddress("2001:db8:0:1::1", 1), False),
        (TCPAddress("::ffff:192.0.2.1", 1), TCPAddress("192.0.2.1", 1), True),
        (TCPAddress("::ffff:192.0.2.1", 1), TCPAddress("::ffff:192.0.2.2", 1), False),
        (TCPAddress("fe80::1%lo", 1), TCPAddress("fe80::2%lo", 1), True),
        (UnixAddress("/one"), UnixAddress("/other"), True),
        (UnixAddress("/one"), None, True),
        (TCPAddress("127.0.0.1", 1), None, False),
    ],
)
def test_a_source_is_one_ipv4_address_or_64_bits_of_ipv6(
    one: Address, other: Address | None, same: bool
) -> None:
    assert (find_source(one) == find_source(other)) is same


# ---- a set to draw from ----


@given(st.lists(st.integers(0, 9)))
def test_a_random_set_is_a_set(numbers: list[int]) -> None:
    members: set[int] = set()
    tested: RandomSet[int] = RandomSet()
    for number in numbers:
        if number in members:
            members.remove(number)
            tested.remove(number)
        else:
            members.add(number)
            tested.add(number)
        assert len(tested) == len(members)
        assert not members or tested.draw() in members


def test_each_member_is_drawn_as_often_as_the_others() -> None:
    tested: RandomSet[int] = RandomSet()
    for number in range(5):
        tested.add(number)
    tested.remove(1)
    drawn = Counter(tested.draw() for _ in range(8000))
    assert drawn.keys() == {0, 2, 3, 4}
    assert min(drawn.values()) > 1700


# ---- places ----


def take(places: Places, *sources: str) -> list[Place]:
    taken = [places.take(source) for source in sources]
    assert None not in taken
    return [place for place in taken if place is not None]


def displaced(places: list[Place]) -> list[int]:
    assert all(place.scope.cancel_called == place.is_displaced for place in places)
    return [number for number, place in enumerate(places) if place.is_displaced]


async def test_there_is_room_up_to_the_bound_and_again_where_one_has_left() -> None:
    places = Places(3, 1)
    first, second, third = take(places, "a", "a", "a")
    second.leave()
    (fourth,) = take(places, "a")
    assert len(places) == 3
    assert displaced([first, third, fourth]) == []


async def test_whoever_has_sent_a_valid_open_is_never_displaced_and_the_newcomer_is_closed() -> None:
    places = Places(3, 1)
    held = take(places, "a", "a", "a")
    for place in held:
        place.note_hello()
        place.note_open()
    assert [places.take(source) for source in "aaab"] == [None] * 4
    assert displaced(held) == []
    assert len(places) == 3


async def test_the_silent_make_room_before_those_who_have_sent_hello() -> None:
    for _ in range(50):
        places = Places(4, 1)
        held = take(places, "a", "a", "a", "a")
        held[1].note_hello()
        held[3].note_hello()
        take(places, "a")
        assert displaced(held) in ([0], [2])


async def test_those_who_have_sent_hello_make_room_for_a_newcomer() -> None:
    places = Places(2, 1)
    held = take(places, "a", "a")
    held[0].note_hello()
    held[0].note_open()
    held[1].note_hello()
    take(places, "a")
    assert displaced(held) == [1]


async def test_equals_are_drawn_at_random() -> None:
    victims = Counter[int]()
    for _ in range(900):
        places = Places(3, 1)
        held = take(places, "a", "a", "a")
        take(places, "a")
        victims.update(displaced(held))
    assert min(victims.values()) > 200


async def test_room_is_made_within_the_source_that_has_most_of_those_who_may_be_displaced() -> None:
    """Of one source there are more, but those have sent `open`."""
    for _ in range(50):
        places = Places(7, 1)
        held = take(places, "a", "b", "b", "c", "c", "c", "c")
        for place in held[3:]:
            place.note_open()
        held[1].note_hello()
        held[2].note_hello()
        (honest,) = take(places, "d")
        assert displaced(held) in ([1], [2])
        honest.leave()


@pytest.mark.parametrize("one_source", [False, True])
async def test_to_make_room_takes_as_many_steps_however_many_places_there_are(
    one_source: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server does it when it is busiest. The steps are calls, also of generators and of what is in C."""
    monkeypatch.setattr(random, "choice", lambda members: members[-1])  # dice may be thrown more than once

    def count_steps(most: int) -> int:
        places = Places(most, 1)
        for number in range(most):
            places.take(0 if one_source else number)
        steps = 0

        def note(*_: object) -> None:
            nonlocal steps
            steps += 1

        sys.setprofile(note)
        newcomer = places.take(0 if one_source else most)
        sys.setprofile(None)
        assert newcomer is not None
        return steps

    assert count_steps(4096) == count_steps(64)


async def test_strangers_of_one_source_displace_only_each_other() -> None:
    places = Places(20, 1)
    honest = take(places, "honest")
    strangers: list[Place] = []
    for _ in range(1000):
        strangers += take(places, "strangers")
        if random.random() < 0.5:
            strangers[-1].note_hello()
        for number in reversed(displaced(strangers)):
            strangers.pop(number).leave()
    assert displaced(honest) == []


async def test_displaced_handshakes_that_do_not_end_are_bounded_too() -> None:
    places = Places(2, 1)
    given_out = [place for place in (places.take("a") for _ in range(200)) if place is not None]
    assert len(places) == len(given_out) == 4
    assert len(displaced(given_out)) == 2
    for number in displaced(given_out):
        given_out[number].leave()
    assert len(places) == 2
    assert places.take("b") is not None


async def test_what_is_noted_of_a_displaced_handshake_that_has_not_noticed_yet_counts_for_nothing() -> None:
    places = Places(1, 1)
    (victim,) = take(places, "a")
    (newcomer,) = take(places, "a")
    assert victim.is_displaced
    victim.note_hello()
    victim.note_open()
    victim.leave()
    newcomer.leave()
    assert len(places) == 0
    assert take(places, "b")


async def test_all_can_be_ended() -> None:
    places = Places(3, 1)
    held = take(places, "a", "b")
    held[0].note_open()
    places.cancel_all()
    assert all(place.scope.cancel_called for place in held)


@given(st.lists(st.tuples(st.sampled_from(["take", "hello", "open", "leave"]), st.integers(0, 5))))
def test_the_places_agree_with_a_model(steps: list[tuple[str, int]]) -> None:
    """The victims are those that may be, and of a source that has most of them by counting."""

    async def main() -> None:
        most = 4
        places = Places(most, 1)
        stages: dict[Place, str] = {}
        for what, number in steps:
            if what == "take":
                before = dict(stages)
                source = "abc"[number % 3]
                place = places.take(source)
                gone = [each for each in stages if each.is_displaced]
                if place is not None:
                    stages[place] = "take"
                for victim in gone:
                    assert stages.pop(victim) != "open"
                    counts = Counter(each.source for each, stage in before.items() if stage != "open")
                    assert counts[victim.source] == max(counts.values())
                    victim.leave()
            elif stages:
                place = list(stages)[number % len(stages)]
                if what == "leave":
                    del stages[place]
                    place.leave()
                elif what == "open":
                    stages[place] = what
                    place.note_open()
                elif stages[place] != "open":
                    stages[place] = what
                    place.note_hello()
            assert len(places) == len(stages) <= most

    trio.run(main)


async def test_those_who_failed_go_first_though_they_were_looked_up() -> None:
    places = Places(3, 1)
    guesser, honest, silent = take(places, "a", "a", "a")
    for each in (guesser, honest):
        each.note_hello()
        each.note_open()
    guesser.note_failure()
    held = [guesser, honest, silent, *take(places, "b")]
    assert displaced(held) == [0]
    for _ in range(5):
        for number in reversed(displaced(held)):
            held.pop(number).leave()
        held += take(places, "b")
    assert not honest.is_displaced


async def test_who_waits_for_a_look_up_gives_way_to_a_source_with_fewer_such() -> None:
    places = Places(4, 1)
    held = take(places, *"aaaa")
    async with trio.open_nursery() as nursery:
        for place in held:
            place.note_hello()
            place.note_open()
            nursery.start_soon(place.take_turn, math.inf)
            await trio.testing.wait_all_tasks_blocked()
        assert places.take("a") is None, "nobody gives way to its own source"
        (newcomer,) = take(places, "b")
        assert len(displaced(held)) == 1
        assert displaced(held) != [0], "that one has its turn"
        newcomer.note_hello()
        newcomer.note_open()
        nursery.start_soon(newcomer.take_turn, math.inf)
        await trio.testing.wait_all_tasks_blocked()
        assert places.take("b") is None, "it has one, and the other has two"
        nursery.cancel_scope.cancel()


async def test_a_source_that_waits_for_look_ups_displaces_its_own_and_no_other() -> None:
    places = Places(5, 1)
    strangers = take(places, *"aaaa")
    async with trio.open_nursery() as nursery:
        for place in strangers:
            place.note_hello()
            place.note_open()
            nursery.start_soon(place.take_turn, math.inf)
            await trio.testing.wait_all_tasks_blocked()
        (honest,) = take(places, "b")
        assert places.take("a") is None
        assert not honest.is_displaced
        take(places, "b")
        assert not honest.is_displaced
        assert len(displaced(strangers)) == 1
        nursery.cancel_scope.cancel()


async def test_where_files_are_short_somebody_gives_way() -> None:
    places = Places(5, 1)
    places.displace_early()
    held = take(places, *"aab")
    held[2].note_open()
    places.displace_early()
    assert len(displaced(held[:2])) == 1
    places.displace_early()
    places.displace_early()
    assert displaced(held) == [0, 1]


async def test_one_that_goes_on_when_it_was_displaced_is_counted_once() -> None:
    places = Places(1, 1)
    (victim,) = take(places, "a")
    take(places, "b")
    assert await victim.take_turn(math.inf)
    victim.end_turn()
    victim.note_failure()
    victim.leave()
    assert len(places) == 1


async def test_only_those_who_said_nothing_can_be_ended_first() -> None:
    places = Places(3, 1)
    silent, greeted = take(places, "a", "b")
    greeted.note_hello()
    assert places.has_greeted
    places.cancel_all(silent_only=True)
    assert silent.scope.cancel_called
    assert not greeted.scope.cancel_called
    greeted.leave()
    assert not places.has_greeted


# ---- turns ----


async def test_turns_are_bounded_and_given_in_order(autojump_clock: trio.testing.MockClock) -> None:
    turns = Turns(2)
    order: list[int] = []

    async def use(number: int) -> None:
        assert await turns.take("a", trio.current_time() + 100)
        order.append(number)
        await trio.sleep(1 if number else 1.5)
        turns.give_back()

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(use, number)
            await settle()
        assert order == [0, 1]
    assert order == [0, 1, 2, 3, 4, 5]
    assert trio.current_time() == 3.5


async def test_sources_take_turns(autojump_clock: trio.testing.MockClock) -> None:
    turns = Turns(1)
    order: list[str] = []

    async def use(source: str) -> None:
        assert await turns.take(source[0], trio.current_time() + 100)
        order.append(source)
        await trio.sleep(1)
        turns.give_back()

    async with trio.open_nursery() as nursery:
        for source in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
            nursery.start_soon(use, source)
            await settle()
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    await turns.take("d", 0)  # nobody is left who waits


async def test_a_turn_that_does_not_come_in_time(autojump_clock: trio.testing.MockClock) -> None:
    turns = Turns(1)
    assert await turns.take("a", 100)
    assert not await turns.take("a", 5)
    assert trio.current_time() == 5
    turns.give_back()
    assert await turns.take("a", 0)


@pytest.mark.parametrize("steps", [["cancel"], ["cancel", "give back"], ["give back", "cancel"]])
async def test_whoever_is_cancelled_while_waiting_loses_no_turn(steps: list[str]) -> None:
    """A cancellation and a turn may come in one step of the scheduler."""
    turns = Turns(1)
    assert await turns.take("a", 100)
    got: list[bool] = []

    async def wait() -> None:
        with scope:
            got.append(await turns.take("a", trio.current_time() + 100))

    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await settle()
        for step in steps:
            scope.cancel() if step == "cancel" else turns.give_back()
    assert got == ([True] if steps[0] == "give back" else [])
    if len(steps) == 1 or got:
        turns.give_back()
    assert await turns.take("b", 0)
    assert not await turns.take("b", 0), "there is one"
