"""Which clients may shake hands with a server: a bounded number of places, and turns to look a user up.

Theory
======

Every unfinished handshake holds a *place*, and there are ``max_handshakes`` of them. When one too many
comes, one is *displaced*: its connection is closed, and its client comes back later. A client that has sent
a valid `open` is never displaced, because a look-up has been or will be spent on it, and because it would
only come back and cost another one: a herd of clients would displace each other for ever. So a newcomer
that finds all places held by such clients is closed itself.

The other victims are drawn so that strangers who say nothing cannot lock out a client that is a few hundred
milliseconds away: from the source that has the most clients in question; of these from the silent ones,
before those that have sent a hello; and among equals at random. A *source* is what one stranger may well own:
an IPv4 address, a /64 of IPv6 addresses, or all UNIX sockets together. All of this takes constant time,
however many places there are, because it happens when the server is busiest.

Looking a user up may be slow, and costs more than all else. So there are ``max_lookups`` *turns* for it. The
rest wait: the sources one after another, and the clients of one source in the order in which they came.
"""

from __future__ import annotations

import ipaddress
import random
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar, final

import trio

from ._addresses import Address, TCPAddress

_T = TypeVar("_T", bound=Hashable)


def find_source(address: Address | None) -> Hashable:
    """What a client at this address shares with others that may well be the same stranger's.

    An IPv4 address is a source of its own, and so is a /64 of IPv6 addresses, which is the least that a
    site gets. All other clients, over UNIX sockets or streams that are no sockets, are one source.
    """
    if not isinstance(address, TCPAddress):
        return None
    ip = ipaddress.ip_address(address.host)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.packed
    return ip.ipv4_mapped.packed if ip.ipv4_mapped is not None else ip.packed[:8]


@final
class RandomSet(Generic[_T]):
    """A set that can draw one of its members at random. Everything takes constant time."""

    __slots__ = ("_members", "_positions")

    def __init__(self) -> None:
        self._members: list[_T] = []
        self._positions: dict[_T, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: _T) -> None:
        """Add what is no member yet."""
        self._positions[member] = len(self._members)
        self._members.append(member)

    def remove(self, member: _T) -> None:
        """Remove a member; the last one takes its position."""
        position = self._positions.pop(member)
        last = self._members.pop()
        if position < len(self._members):
            self._members[position] = last
            self._positions[last] = position

    def draw(self) -> _T:
        """Return any member, each as likely as the others."""
        return random.choice(self._members)  # noqa: S311  (nothing secret)


@final
class _Crowd:
    """The clients of one source that may be displaced."""

    __slots__ = ("greeted", "silent", "source")

    def __init__(self, source: Hashable) -> None:
        self.source = source
        self.silent: RandomSet[Place] = RandomSet()
        self.greeted: RandomSet[Place] = RandomSet()

    def __len__(self) -> int:
        return len(self.silent) + len(self.greeted)


@final
class Places:
    """The places of a server, and its turns to look a user up.

    Arguments:
        most: how many places there are.
        lookups: how many users are looked up at once.
    """

    __slots__ = ("_by_size", "_crowds", "_displaced", "_largest", "_most", "_unfinished", "turns")

    def __init__(self, most: int, lookups: int) -> None:
        self._most = most
        self._unfinished: set[Place] = set()  # with the displaced ones that have not ended
        self._displaced = 0  # how many of these there are
        self._crowds: dict[Hashable, _Crowd] = {}  # by source; none is empty
        self._by_size: dict[int, RandomSet[_Crowd]] = {}  # none is empty
        self._largest = 0  # size of the largest crowd
        self.turns = Turns(lookups)

    def __len__(self) -> int:
        """How many handshakes have not ended; the displaced ones are among them until they have."""
        return len(self._unfinished)

    def take(self, source: Hashable) -> Place | None:
        """Give a newcomer a place, which may displace somebody.

        Returns:
            The place, which the caller leaves at the end; None if there is none.
        """
        # Displaced clients end at once, unless their streams (the application's own) take their time.
        if len(self._unfinished) >= 2 * self._most:
            return None
        if len(self._unfinished) - self._displaced >= self._most:
            if not self._largest:
                return None
            self._displace()
        place = Place(self, source)
        self._unfinished.add(place)
        crowd = self._crowds.setdefault(source, _Crowd(source))
        place._enter(crowd, crowd.silent)
        return place

    def cancel_all(self) -> None:
        """End all handshakes: the server stops."""
        for place in self._unfinished:
            place.scope.cancel()

    def _displace(self) -> None:
        crowd = self._by_size[self._largest].draw()
        victim = (crowd.silent or crowd.greeted).draw()
        victim._exit()
        victim.is_displaced = True
        self._displaced += 1
        victim.scope.cancel()

    def _rank(self, crowd: _Crowd, change: int) -> None:
        """A crowd's size has changed, by 1 or -1."""
        size = len(crowd)
        before = size - change
        if before:
            equals = self._by_size[before]
            equals.remove(crowd)
            if not equals:
                del self._by_size[before]
        if size:
            self._by_size.setdefault(size, RandomSet()).add(crowd)
        else:
            del self._crowds[crowd.source]
        if size > self._largest:
            self._largest = size
        elif self._largest not in self._by_size:
            self._largest -= 1  # this crowd was the largest, and still is


@final
class Place:
    """The place of one unfinished handshake.

    Attributes:
        scope: the handshake runs in this one. Displacing it cancels this.
        source: where the client comes from.
        is_displaced: whether the place was given to somebody else.
    """

    __slots__ = ("_crowd", "_places", "_stage", "is_displaced", "scope", "source")

    def __init__(self, places: Places, source: Hashable) -> None:
        self._places = places
        self.source = source
        self.scope = trio.CancelScope()
        self.is_displaced = False
        self._crowd: _Crowd | None = None  # None: it cannot be displaced, or was
        self._stage: RandomSet[Place] = RandomSet()

    def note_hello(self) -> None:
        """The client has sent a valid hello."""
        if self._crowd is not None:
            self._stage.remove(self)
            self._stage = self._crowd.greeted
            self._stage.add(self)

    def note_open(self) -> None:
        """The client has sent a valid `open`: it is not displaced any more."""
        self._exit()

    def leave(self) -> None:
        """The handshake has ended."""
        self._exit()
        self._places._unfinished.remove(self)
        self._places._displaced -= self.is_displaced

    async def take_turn(self, until: float) -> bool:
        """Wait for a turn to look the user up; `Turns.give_back` ends it. False: none came in time."""
        return await self._places.turns.take(self.source, until)

    def end_turn(self) -> None:
        """End the turn that was taken."""
        self._places.turns.give_back()

    def _enter(self, crowd: _Crowd, stage: RandomSet[Place]) -> None:
        self._crowd, self._stage = crowd, stage
        stage.add(self)
        self._places._rank(crowd, 1)

    def _exit(self) -> None:
        crowd, self._crowd = self._crowd, None
        if crowd is not None:
            self._stage.remove(self)
            self._places._rank(crowd, -1)


@final
class Turns:
    """So many at once may look a user up; the rest wait, the sources one after another.

    Arguments:
        most: how many at once.
    """

    __slots__ = ("_free", "_waiting")

    def __init__(self, most: int) -> None:
        self._free = most  # 0 where anybody waits
        # By source; the source whose turn is next comes first, and in it the client that came first.
        self._waiting: OrderedDict[Hashable, OrderedDict[trio.Event, None]] = OrderedDict()

    async def take(self, source: Hashable, until: float) -> bool:
        """Take a turn, and wait for it until a time of Trio's clock. Returns whether there was one.

        No checkpoint where a turn is free.
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
        """End a turn, and give it to the next who waits."""
        if not self._waiting:
            self._free += 1
            return
        source, queue = self._waiting.popitem(last=False)
        turn, _ = queue.popitem(last=False)
        if queue:
            self._waiting[source] = queue  # the last now
        turn.set()
