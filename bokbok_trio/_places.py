"""`Places`: a bounded number of places for the handshakes of a server, and turns to look users up.

Theory
======

Every unfinished handshake holds a *place*, and there are ``max_handshakes`` of them. When one more client
connects, another is *displaced*: its connection is closed, and it comes back later. A client whose user is
being looked up is never displaced, because it would only come back and cost another look-up: a herd of
clients would displace each other for ever. For the same reason a client that has sent a valid `open` and
waits for its look-up is displaced only by a source that has fewer clients. If no client may be displaced, the
newcomer is closed.

Strangers must not lock out a client that is a few hundred milliseconds away. So the client to displace is
drawn from the source that has the most; there, first from clients whose authentication has failed and that
only wait for the refusal, then from silent ones, then from those that have sent a hello, then from those that
wait for their look-up; and at random among equals. A *source* is a set of addresses that one stranger may
well own: an IPv4 address, a /64 of IPv6 addresses, or all UNIX sockets together. All of this takes constant
time, however many places there are, because it happens when the server is busiest.

Looking a user up may be slow, and costs more than the rest of a handshake. So there are ``max_lookups``
*turns* for it. The others wait: the sources take turns, and the clients of one source go in the order of
their arrival.
"""

from __future__ import annotations

import ipaddress
import random
from collections import OrderedDict
from collections.abc import Hashable
from enum import IntEnum
from typing import Generic, TypeVar, final

import trio

from ._addresses import Address, TCPAddress

_T = TypeVar("_T", bound=Hashable)


def find_source(address: Address | None) -> Hashable:
    """Return the source of an address: equal for addresses that one stranger may well own.

    An IPv4 address is a source of its own, and so is a /64 of IPv6 addresses, the least that a site gets. All
    other clients, over UNIX sockets or streams that are not sockets, are one source.
    """
    if not isinstance(address, TCPAddress):
        return None
    ip = ipaddress.ip_address(address.host)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.packed
    return ip.ipv4_mapped.packed if ip.ipv4_mapped is not None else ip.packed[:8]


@final
class RandomSet(Generic[_T]):
    """A set that can draw a random member. All methods take constant time."""

    __slots__ = ("_members", "_positions")

    def __init__(self) -> None:
        self._members: list[_T] = []
        self._positions: dict[_T, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: _T) -> None:
        """Add an object that is not a member yet."""
        self._positions[member] = len(self._members)
        self._members.append(member)

    def remove(self, member: _T) -> None:
        """Remove a member. The last member takes its position."""
        position = self._positions.pop(member)
        last = self._members.pop()
        if position < len(self._members):
            self._members[position] = last
            self._positions[last] = position

    def draw(self) -> _T:
        """Return a random member, all with equal probability."""
        return random.choice(self._members)  # noqa: S311  (nothing secret)


class _Stage(IntEnum):
    """The stages of handshakes that may be displaced, in the order in which they are displaced."""

    FAILED = 0
    SILENT = 1
    GREETED = 2
    WAITING = 3  # for its look-up


@final
class _Crowd:
    """The clients of one source that may be displaced, by their stage."""

    __slots__ = ("size", "source", "stages")

    def __init__(self, source: Hashable) -> None:
        self.source = source
        self.size = 0
        self.stages: tuple[RandomSet[Place], ...] = tuple(RandomSet() for _ in _Stage)

    def draw(self) -> Place | None:
        """Draw a client of the first stage that has any, except WAITING; None: all of them are WAITING."""
        return next((stage.draw() for stage in self.stages[: _Stage.WAITING] if stage), None)


@final
class _Crowds:
    """The crowds of all sources, and which of them are the largest.

    Attributes:
        largest: size of the largest crowd.
    """

    __slots__ = ("_by_size", "_crowds", "largest")

    def __init__(self) -> None:
        self._crowds: dict[Hashable, _Crowd] = {}  # by source; none is empty
        self._by_size: dict[int, RandomSet[_Crowd]] = {}  # none is empty
        self.largest = 0

    def find(self, source: Hashable) -> _Crowd | None:
        """Return the crowd of a source; None: it has no clients here."""
        return self._crowds.get(source)

    def add(self, place: Place, stage: _Stage) -> None:
        crowd = self._crowds.setdefault(place.source, _Crowd(place.source))
        crowd.stages[stage].add(place)
        self._rank(crowd, 1)

    def remove(self, place: Place, stage: _Stage) -> None:
        crowd = self._crowds[place.source]
        crowd.stages[stage].remove(place)
        self._rank(crowd, -1)

    def move(self, place: Place, before: _Stage, after: _Stage) -> None:
        stages = self._crowds[place.source].stages
        stages[before].remove(place)
        stages[after].add(place)

    def draw_largest(self) -> _Crowd:
        """Draw one of the largest crowds. There must be a crowd."""
        return self._by_size[self.largest].draw()

    def _rank(self, crowd: _Crowd, change: int) -> None:
        """Change the size of a crowd, by 1 or -1."""
        if crowd.size:
            equals = self._by_size[crowd.size]
            equals.remove(crowd)
            if not equals:
                del self._by_size[crowd.size]
        crowd.size += change
        if crowd.size:
            self._by_size.setdefault(crowd.size, RandomSet()).add(crowd)
        else:
            del self._crowds[crowd.source]
        if crowd.size > self.largest:
            self.largest = crowd.size
        elif self.largest not in self._by_size:
            self.largest -= 1  # this crowd was the largest, and still is


@final
class Places:
    """The places of a server, and its turns to look a user up.

    Arguments:
        most: how many places there are.
        lookups: how many users are looked up at once.
    """

    __slots__ = ("_crowds", "_displaced", "_most", "_unfinished", "turns")

    def __init__(self, most: int, lookups: int) -> None:
        self._most = most
        self._unfinished: set[Place] = set()  # including displaced ones that have not ended
        self._displaced = 0  # how many displaced ones there are in it
        self._crowds = _Crowds()
        self.turns = Turns(lookups)

    def __len__(self) -> int:
        """Return how many handshakes have not ended, including displaced ones."""
        return len(self._unfinished)

    def take(self, source: Hashable) -> Place | None:
        """Give a newcomer from a source a place. This may displace another client.

        Returns:
            The place, which the caller must leave in the end; None: there is none.
        """
        # Displaced clients end at once, unless their streams, which the application may supply, close slowly.
        if len(self._unfinished) >= 2 * self._most:
            return None
        if len(self._unfinished) - self._displaced >= self._most:
            victim = self._find_victim(source)
            if victim is None:
                return None
            self._displace(victim)
        place = Place(self, source)
        self._unfinished.add(place)
        place._enter(_Stage.SILENT)
        return place

    def _find_victim(self, source: Hashable) -> Place | None:
        """Return the client to displace for a newcomer from a source; None: there is none."""
        if not self._crowds.largest:
            return None
        largest, own = self._crowds.draw_largest(), self._crowds.find(source)
        victim = largest.draw()
        if victim is None and largest.size > (0 if own is None else own.size) + 1:
            return largest.stages[_Stage.WAITING].draw()
        if victim is None and own is not None:
            return own.draw()
        return victim

    def _displace(self, victim: Place) -> None:
        victim.displace()
        self._displaced += 1

    def displace_early(self) -> None:
        """Displace a client of a largest crowd that has cost no look-up yet, if there is one."""
        victim = self._crowds.draw_largest().draw() if self._crowds.largest else None
        if victim is not None:
            self._displace(victim)

    @property
    def has_greeted(self) -> bool:
        """Whether a handshake goes on whose client has sent a hello."""
        return any(not place.is_silent and not place.scope.cancel_called for place in self._unfinished)

    def cancel_all(self, *, silent_only: bool = False) -> None:
        """Cancel all handshakes, or only those whose clients are silent: the server is stopping."""
        for place in self._unfinished:
            if place.is_silent or not silent_only:
                place.scope.cancel()


@final
class Place:
    """The place of one unfinished handshake.

    Attributes:
        scope: the scope that the handshake runs in. Displacing the client cancels it.
        source: the source of the client.
        is_displaced: whether another client has displaced this one.
        is_silent: whether the client has not sent a valid hello.
    """

    __slots__ = ("_places", "_stage", "is_displaced", "is_silent", "scope", "source")

    def __init__(self, places: Places, source: Hashable) -> None:
        self._places = places
        self.source = source
        self.scope = trio.CancelScope()
        self.is_displaced = False
        self.is_silent = True
        self._stage: _Stage | None = None  # None: the client cannot be displaced, or was

    def note_hello(self) -> None:
        """The client has sent a valid hello."""
        self.is_silent = False
        if self._stage is not None:
            self._places._crowds.move(self, self._stage, _Stage.GREETED)
            self._stage = _Stage.GREETED

    def note_open(self) -> None:
        """The client has sent a valid `open`. From now on it may be displaced only in `take_turn`."""
        self._exit()

    def note_failure(self) -> None:
        """The client could not be authenticated. It may be displaced before it gets the refusal."""
        if not self.is_displaced:
            self._enter(_Stage.FAILED)

    def displace(self) -> None:
        """Cancel the handshake, because another client takes the place."""
        self._exit()
        self.is_displaced = True
        self.scope.cancel()

    def leave(self) -> None:
        """The handshake has ended."""
        self._exit()
        self._places._unfinished.remove(self)
        self._places._displaced -= self.is_displaced

    async def take_turn(self, until: float) -> bool:
        """Wait for a turn to look the user up; `end_turn` ends it. Returns False if none came in time.

        Arguments:
            until: a time of Trio's clock.
        """
        if not self.is_displaced:
            self._enter(_Stage.WAITING)
        try:
            return await self._places.turns.take(self.source, until)
        finally:
            self._exit()

    def end_turn(self) -> None:
        """End the turn that `take_turn` took."""
        self._places.turns.give_back()

    def _enter(self, stage: _Stage) -> None:
        self._stage = stage
        self._places._crowds.add(self, stage)

    def _exit(self) -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            self._places._crowds.remove(self, stage)


@final
class Turns:
    """Turns to look a user up. A bounded number of clients has one; the others wait, and their sources take
    turns.

    Arguments:
        most: how many clients may have a turn at once.
    """

    __slots__ = ("_free", "_waiting")

    def __init__(self, most: int) -> None:
        self._free = most  # 0 if a client waits
        # By source: first the source that is served next, and in it first the client that waits longest.
        self._waiting: OrderedDict[Hashable, OrderedDict[trio.Event, None]] = OrderedDict()

    async def take(self, source: Hashable, until: float) -> bool:
        """Wait for a turn, until a time of Trio's clock. Returns whether there was one in time.

        It is not a checkpoint if a turn is free.
        """
        if self._free:
            self._free -= 1
            return True
        turn = trio.Event()
        self._waiting.setdefault(source, OrderedDict())[turn] = None
        try:
            with trio.CancelScope(deadline=until):
                await turn.wait()
        except BaseException:
            if turn.is_set():
                self.give_back()
            raise
        finally:
            if not turn.is_set():
                queue = self._waiting[source]
                del queue[turn]
                if not queue:
                    del self._waiting[source]
        return turn.is_set()

    def give_back(self) -> None:
        """End a turn, and give it to the next client that waits."""
        if not self._waiting:
            self._free += 1
            return
        source, queue = self._waiting.popitem(last=False)
        turn, _ = queue.popitem(last=False)
        if queue:
            self._waiting[source] = queue  # the last now
        turn.set()
