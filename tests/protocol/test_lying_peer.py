"""One engine, and a peer that does everything the protocol allows, in any crossing, and lies, and babbles.

`LyingPeer` plays both the peer and the engine's user. A lie, noise or closing ends an engine, so it does
these to a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias, TypeVar

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from bokbok_trio._protocol.events import Cancel, Event
from bokbok_trio._protocol.flow_control import ITEM_OVERHEAD, MAX_QUEUED, WINDOW
from bokbok_trio._protocol.session import Session
from tests.support.engine_model import Model, count, is_refused, request
from tests.support.lies import CONTEXTS, DEPTHS, FORMS, HEAD_ROOM, LIMIT, SIZES, WRONG

from ..support.second_implementation import (
    MAX_CREDIT,
    MAX_DETAILS,
    MAX_OPEN,
    MAX_PIECE,
    MAX_WHOLE,
    PIECED,
    body,
    flat,
    packet,
)

T = TypeVar("T")


def one_of(which: int, choices: list[T]) -> T | None:
    return choices[which % len(choices)] if choices else None


Acts: TypeAlias = list[tuple[str | bytes, int, int]]

ACTS = (
    *("ping", "ask", "ask", "ask", "answer", "cancel", "end", "drain", "say_bye", "drop_pieces"),
    *("send_item", "send_item", "send_item", "send_item", "consume", "consume", "consume", "grant"),
    *("take", "take", "take", "take", "take", "say_piece", "say_piece", "say_piece"),
    *(b"req", b"chan", b"chan", b"chan", b"ok", b"err", b"cancel", b"end", b"ping", b"pong"),
    *(b"bye-ok", b"bye-ok", b"item", b"item", b"item", b"item", b"item", b"item", b"credit", b"credit"),
)
"""What the engine's user and an honest peer do, and the kinds of packets that the peer sends."""

A_FEW = st.lists(
    st.tuples(st.sampled_from(ACTS), st.integers(0, 999), st.sampled_from(SIZES)), min_size=5, max_size=30
)


class LyingPeer(RuleBasedStateMachine):
    """The engine's user and its peer, in any order."""

    @initialize(
        me=st.integers(0, 1), max_requests=st.integers(1, 6), slots=st.integers(1, 6), grants=st.booleans()
    )
    def begin(self, me: int, max_requests: int, slots: int, grants: bool) -> None:
        self.me, self.max_requests, self.slots = me, max_requests, slots
        self.grants = grants  # credit at once to each channel of the peer's, or when it pleases
        self.model = Model(me, max_requests, slots)
        self.engine = self.make()
        self.log: list[Callable[[Session], object]] = []
        self.texts = 0
        self.next_id = 1 - me  # of the peer's
        # Packets that it sends in pieces: the slots that they take, id, the rest.
        self.sending: dict[int, tuple[tuple[int, bool] | None, int, bytes]] = {}
        self.next_number = 0

    def make(self) -> Session:
        return Session(
            "server" if self.me else "client",
            max_message_size=LIMIT,
            max_requests=self.max_requests,
            slots=self.slots,
        )

    def do(self, act: Callable[[Session], T]) -> T:
        self.log.append(act)
        return act(self.engine)

    def copy(self) -> tuple[Session, Model]:
        """Return another engine in the same state, and its model."""
        engine = self.make()
        for act in self.log:
            act(engine)
        return engine, self.model.copy()

    def fields(self, size: int) -> list[bytes]:
        """Return fields that are like no others, so that a mix-up shows."""
        self.texts += 1
        each = b"%d." % self.texts
        return [(each * (size // len(each) + 1))[:size]]

    # Each rule does some of what goes on, and then to a copy what ends an engine.

    def act(self, acts: Acts) -> None:
        """Take many actions in one step, as a step costs more than they do."""
        for act, which, size in acts:
            if isinstance(act, bytes):
                self.say(act, which, size)
            else:
                getattr(self, act)(which, size)
            self.check()

    # ---- the engine's user ----

    def ask(self, which: int, size: int) -> None:
        nested, along = DEPTHS[which % 6], CONTEXTS[which // 6 % 4]
        if self.model.peer_drains and not nested:
            return
        encoded = flat(along) if along else b""
        fields = self.fields(min(size, LIMIT - HEAD_ROOM - 5 - len(encoded)))
        has_channel = which % 7 > 2
        timeout = (math.inf, -1.0, 0.25, 1e7, 1e12)[which % 5]
        given = {name.decode(): value for name, value in along.items()}

        def ask(engine: Session) -> int:
            call = engine.open_channel if has_channel else engine.request
            return call(fields, timeout, depth=nested, context=given)

        due = self.model.ask(fields, timeout, has_channel=has_channel, depth=nested, context=encoded)
        assert self.do(ask) == due

    def cancel(self, which: int, _size: int) -> None:
        wanted = [id for id, talk in self.model.ours.items() if not talk.is_cancelled]
        id = one_of(which, wanted + list(self.model.backlog))
        if id is not None:
            self.do(lambda engine: engine.cancel(id))
            self.model.cancel(id)

    def answer(self, which: int, size: int) -> None:
        id = one_of(which, self.model.unanswered)
        if id is None:
            return
        if which % 4:
            fields = self.fields(size)
            self.do(lambda engine: engine.answer(id, fields))
            self.model.answer(id, [b"ok", b"%d" % id, body(fields)])
        else:
            [message] = self.fields(min(size, 2048))
            details = bytes(min(size, MAX_DETAILS)) if which % 3 else b""
            self.do(lambda engine: engine.fail(id, "code", message.decode(), details))
            self.model.answer(id, [b"err", b"%d" % id, b"code", message, details])

    def send_item(self, which: int, size: int) -> None:
        ids = [id for id in self.model.used if not self.model.talk(id).out_ended]
        id = one_of(which, [id for id in ids if self.model.talk(id).out_credit > 0])
        if id is not None and self.engine.flow_control.may_send(id):
            fields = self.fields(size)
            self.do(lambda engine: engine.flow_control.send(id, *engine.flow_control.encode(fields)))
            self.model.send_item(id, body(fields))

    def end(self, which: int, _size: int) -> None:
        used = self.model.used
        id = one_of(which, [id for id in used if id in self.model.backlog and which % 2] or used)
        if id is not None:
            self.do(lambda engine: engine.flow_control.end(id))
            self.model.end(id)

    def grant(self, which: int, _size: int) -> None:
        """The first credit for the peer's items."""
        model = self.model
        new = [id for id in model.used if id in model.theirs and not model.theirs[id].has_begun]
        id = one_of(which, new)
        if id is not None:
            self.do(lambda engine: engine.flow_control.accept(id))
            self.model.grant(id, WINDOW)

    def consume(self, which: int, _size: int) -> None:
        id = one_of(which, [id for id in self.model.used if self.model.talk(id).held])
        if id is None:
            return
        talk = self.model.talk(id)
        for _ in range(len(talk.held) if which % 2 else 1):
            size, before = talk.held[0], talk.in_credit
            self.model.consume(id)
            granted = self.do(partial(lambda size, engine: engine.flow_control.consume(id, size), size))
            assert granted == (talk.in_credit > before)

    def ping(self, _which: int, _size: int) -> None:
        if not self.engine.is_ping_queued:
            self.do(lambda engine: engine.ping())
            self.model.control.append([b"ping"])

    def drain(self, which: int, _size: int) -> None:
        if which % 3 == 2:  # else no machine would go far
            self.do(lambda engine: engine.drain())
            self.model.drain()

    def take(self, which: int, _size: int) -> None:
        self.send((0.0, 0.25, 2.0, 1e9)[which % 4])
        self.do(lambda engine: engine.note_sent((0, 0, 0.005, 1)[which % 4]))

    def send(self, now: float) -> bytes:
        before = {id: talk.may_send for id, talk in self.model.channels.items()}
        batch = self.do(lambda engine: engine.take(now))
        self.model.check_batch(batch, now)
        self.check_writable(before)
        return batch

    def check_writable(self, before: dict[int, bool]) -> None:
        """Check that a task that waits to send an item is woken."""
        told = self.do(lambda engine: set(engine.flow_control.take_writable()))
        for id, talk in self.model.channels.items():
            if before.get(id) is False and talk.may_send and not talk.is_cancelled:
                assert id in told

    @rule(acts=A_FEW, late=st.integers(0, 3))
    def close(self, acts: Acts, late: int) -> None:
        self.act(acts)
        engine, model = self.copy()
        engine.close()
        model.close()
        for id in model.unanswered[:late]:
            engine.fail(id, "late", "")
            model.answer(id, [])
        batch = b"."
        while batch:
            batch = engine.take(0)
            model.check_batch(batch, 0)
        assert (engine.asked, engine.waiting, engine.cancelled, engine.queued) == (0, 0, 0, 0)
        assert engine.handling == len(model.theirs)

    # ---- the peer, honest ----

    def deliver(self, data: bytes, size: int = 10**6) -> None:
        before = {id: talk.may_send for id, talk in self.model.channels.items()}
        events: list[Event] = []
        assert not is_refused(self.engine, self.model, data, size, events), "the peer was honest"
        self.log.append(lambda engine: engine.receive(data))
        self.check_writable(before)
        for event in events:
            if isinstance(event, Cancel):
                self.drop_items(event.id)
        if self.grants:
            self.grant(0, 0)

    def drop_items(self, id: int) -> None:
        self.do(lambda engine: engine.drop_items(id))
        self.model.drop_items(id)

    def say(self, kind: bytes, which: int, size: int) -> None:
        if kind == b"item" and which % 3:
            size = 150_000  # more often, as credit is large
        fields = self.honest(kind, which, size)
        if fields is None:
            return
        chunk = (10**6, 10**6, 7, 1)[which // 5 % 4]
        if kind in PIECED and (which % 5 == 4 or len(body(fields)) > MAX_WHOLE):
            id = int(fields[1])
            if len(self.sending) == MAX_OPEN or (id in self.model.ours and id not in self.model.in_flight):
                return
            asks = (int(fields[3] or 0), kind == b"chan") if kind in (b"req", b"chan") else None
            self.sending[self.next_number] = (asks, id, body(fields))
            self.go_on(self.next_number, which % 90 + 1, to_the_end=which % 2 == 0)
            self.next_number += 1 + which % 3
        else:
            self.deliver(packet(fields), chunk)
        if kind in (b"req", b"chan"):
            self.next_id = int(fields[1]) + 2

    def honest(self, kind: bytes, which: int, size: int) -> list[bytes] | None:  # noqa: PLR0912  (the same)
        """Return a packet of that kind that the peer may send now, if there is one."""
        model = self.model
        busy = {id for _, id, _ in self.sending.values()}  # what comes next of them waits
        free = {id: talk for id, talk in model.in_flight.items() if id not in busy}
        open_to_items = [
            id
            for id, talk in free.items()
            if talk.has_channel and not talk.in_ended and not (talk.is_cancelled and id in model.theirs)
        ]
        asking = [slots for slots, _, _ in self.sending.values() if slots is not None]
        ids: list[int] = []
        rest: list[bytes] = []
        match kind:
            case b"req" | b"chan":
                slots = DEPTHS[which // 3 % 6], kind == b"chan"
                used = count(model.theirs, slots) + asking.count(slots)
                if used < model.max_requests and (slots[0] or not model.heard_bye_ok):
                    ids = [self.next_id, self.next_id + 2]
                timeout = (b"", b"0", b"1500000", b"9" * 18)[which % 4]
                along = CONTEXTS[which // 7 % 4]
                encoded = flat(along) if along else b""
                credit = [b"%d" % (0, 70_000, MAX_CREDIT)[which % 3]] if kind == b"chan" else []
                inner = body(self.fields(min(size, LIMIT - HEAD_ROOM - 5 - len(encoded))))
                rest = [timeout, b"%d" % slots[0] if slots[0] else b"", encoded, *credit, inner]
            case b"ok":
                ids = [id for id in free if id in model.ours]
                rest = [body(self.fields(size))]
            case b"err":
                ids = [id for id in free if id in model.ours]
                details = bytes(min(size, MAX_DETAILS)) if which % 3 else b""
                rest = [b"code", *self.fields(min(size, 3000)), details]
            case b"cancel":
                ids = [id for id, talk in free.items() if id in model.theirs and not talk.is_cancelled]
            case b"item":
                # As far as the peer knows of its credit.
                ids = [id for id in open_to_items if model.talk(id).in_credit > model.credits.get(id, 0)]
                rest = [body(self.fields(size))]
            case b"credit":
                ids = [id for id, talk in model.in_flight.items() if talk.has_channel]
                room = [model.talk(id).room for id in ids if id == one_of(which, ids)]
                rest = [b"%d" % min(*room, *2 * [(0, 1, 5000, 300_000, MAX_CREDIT)[which % 5]])]
            case b"end":
                ids = open_to_items
            case b"drop":
                number = one_of(which, list(model.pieces))
                return None if number is None else [b"drop", b"%d" % number]
            case b"bye":
                return None if model.peer_drains else [b"bye"]
            case b"bye-ok":
                may = model.is_draining and [b"bye"] not in model.control and not model.heard_bye_ok
                return [b"bye-ok"] if may and not any(depth == 0 for depth, _ in asking) else None
            case b"abort":
                return [b"abort", b"protocol", b"you know why"]
            case _:
                return [kind]
        if kind in (b"cancel", b"item", b"credit", b"end") and (not ids or which % 9 == 8):
            # One that is not in flight: it is taken for one that crossed.
            gone = [*model.gone[-4:], *model.ours, 10**17 + self.me, 10**17 + 1 - self.me]
            ids = [
                id for id in gone if id not in model.in_flight and (kind != b"cancel" or id % 2 != self.me)
            ]
        id = one_of(which, ids)
        return None if id is None else [kind, b"%d" % id, *rest]

    def say_piece(self, which: int, _size: int) -> None:
        n = one_of(which, list(self.sending))
        if n is not None:
            self.go_on(n, MAX_PIECE, to_the_end=which % 2 == 0)

    def go_on(self, n: int, size: int, *, to_the_end: bool) -> None:
        """Send one more piece of a packet, or all that there are."""
        slots, id, rest = self.sending.pop(n)
        piece, rest = rest[:size], rest[size:]
        if rest:
            self.sending[n] = (slots, id, rest)
        self.deliver(packet([b"part", b"%d" % n, b"%d" % len(rest), piece]))
        if rest and to_the_end:
            self.go_on(n, MAX_PIECE, to_the_end=True)

    def drop_pieces(self, which: int, _size: int) -> None:
        number = one_of(which, list(self.sending))
        if number is not None:
            del self.sending[number]
            self.deliver(packet([b"drop", b"%d" % number]))

    def say_bye(self, which: int, _size: int) -> None:
        if which % 3 == 2 and not self.model.peer_drains:
            self.deliver(packet([b"bye"]))

    # ---- the peer, lying ----

    def misshapen(self, which: int) -> Iterator[list[bytes]]:
        """Packets that would be good now, but for one field."""
        yield [(b"", b"Req", b"hello", b"req ", b"\xff")[which % 5]]
        for kind, form in FORMS.items():
            fields = self.honest(kind, which, 20)
            if fields is not None:
                wrong = [fields[:-1], [*fields, b""]]
                for at, letter in enumerate(form, 1):
                    wrong += ([*fields[:at], value, *fields[at + 1 :]] for value in WRONG[letter])
                yield wrong[which % len(wrong)]
                yield wrong[which // 5 % len(wrong)]

    def misplaced(self, which: int) -> Iterator[list[bytes]]:
        """Packets that would be good at another time, but not now."""
        if self.model.peer_drains:
            yield [b"bye"]
        if not self.model.is_draining or self.model.heard_bye_ok:
            yield [b"bye-ok"]
        yield from self.misplaced_requests(which)
        yield from self.misplaced_answers(which)
        yield from self.misplaced_items(which)
        yield from self.misplaced_pieces(which)

    def misplaced_requests(self, which: int) -> Iterator[list[bytes]]:
        model, new = self.model, self.next_id
        for id in (one_of(which, list(model.theirs)), one_of(which, [10**17 + self.me, *model.ours])):
            if id is not None:
                yield request(id, DEPTHS[which % 6], has_channel=which % 2 == 0)
        for has_channel in (False, True):
            for nested in {*DEPTHS}:
                if model.is_full((nested, has_channel)) or (model.heard_bye_ok and not nested):
                    yield request(new, nested, has_channel=has_channel)
        yield request(new, 2, has_channel=True, credit=MAX_CREDIT + 1)
        yield [b"cancel", b"%d" % (one_of(which, [*model.ours, model.next_id]) or self.me)]

    def misplaced_answers(self, which: int) -> Iterator[list[bytes]]:
        model = self.model
        unsent = [id for id, talk in model.ours.items() if not talk.has_left]
        for ids in (unsent, [*model.backlog, model.next_id], list(model.theirs), model.gone):
            id = one_of(which, ids)
            if id is not None:
                both = [b"ok", b"%d" % id, body([])], [b"err", b"%d" % id, b"code", b"", b""]
                yield both[which % 2]

    def misplaced_items(self, which: int) -> Iterator[list[bytes]]:
        for id, talk in self.model.in_flight.items():
            field = b"%d" % id
            item, end = [b"item", field, body(self.fields(which % 9))], [b"end", field]
            if not talk.has_channel:
                yield from (item, end, [b"credit", field, b"%d" % (which % 2)])
                continue
            if talk.in_ended or talk.in_credit <= 0:
                yield item
            if talk.in_ended:
                yield end
            yield [b"credit", field, b"%d" % (MAX_CREDIT + 1 - talk.out_credit)]

    def misplaced_pieces(self, which: int) -> Iterator[list[bytes]]:
        pieces = self.model.pieces
        unused = b"%d" % (self.next_number + which)
        yield [b"drop", unused]
        if len(pieces) == MAX_OPEN:
            yield [b"part", unused, b"1", b"x"]
            yield [b"part", unused, b"0", body([b"item", b"%d" % 10**17, body([])])]
        else:
            yield [b"part", unused, b"0", b""]
            yield [b"part", unused, b"%d" % (which + 1), b""]
            yield [b"part", unused, b"%d" % LIMIT, b"x"]
            yield [b"part", unused, b"0", (b"\xff", b"\x00", b"\x01")[which % 3]]
            for kind in (b"ping", b"pong", b"bye", b"end", b"credit", b"cancel", b"drop", b"abort"):
                fields = self.honest(kind, which, 20)
                if fields is not None:
                    yield [b"part", unused, b"0", body(fields)]
        for open_number, (_, left) in pieces.items():
            n = b"%d" % open_number
            yield [b"part", n, b"%d" % left, b""]
            yield [b"part", n, b"%d" % left, b"x"]
            yield [b"part", n, b"%d" % max(left - 2, 0), bytes(min(left, 9) + 2)]
            if left > 2:
                yield [b"part", n, b"%d" % (left - 2), b"x"]

    @rule(acts=A_FEW, which=st.integers(0, 999), chunk=st.sampled_from([10**6, 7, 1]))
    def lie(self, acts: Acts, which: int, chunk: int) -> None:
        self.act(acts)
        for at, fields in enumerate((*self.misshapen(which), *self.misplaced(which))):
            if (at + which) % 6 == 0:
                self.tell(fields, chunk, which % 7)
        self.announce(which)
        self.abort(which, chunk)

    def abort(self, which: int, chunk: int) -> None:
        """Send `abort` to a copy of the engine. Nothing after it counts."""
        engine, model = self.copy()
        last = packet([b"abort", (b"protocol", b"other")[which % 2], b"\xc3\xa4" * (which % 129)])
        assert not is_refused(engine, model, last + (b"", packet([b"ping"]), packet([]))[which % 3], chunk)

    def tell(self, fields: list[bytes], chunk: int, which: int) -> None:
        """Send a lie to a copy of the engine: whole, or in pieces, or after a good packet."""
        engine, model = self.copy()
        data = packet(fields)
        if which % 3 == 0 and fields and fields[0] in PIECED and len(model.pieces) < MAX_OPEN:
            half, rest = data[4 : len(data) // 2 + 4], data[len(data) // 2 + 4 :]
            n = b"%d" % (self.next_number + 5)
            data = packet([b"part", n, b"%d" % len(rest), half]) + packet([b"part", n, b"0", rest])
        elif which % 3 == 1:
            others = [self.honest(kind, which, 20) for kind in (b"ping", b"cancel", b"credit")]
            data = b"".join(packet(other) for other in others if other is not None) + data
        assert is_refused(engine, model, data, chunk), fields

    def announce(self, which: int) -> None:
        """The length of a packet, which must be refused at once, or not at all."""
        engine, model = self.copy()
        length = (MAX_WHOLE, MAX_WHOLE + 1, LIMIT, 2**32 - 1)[which % 4]
        assert is_refused(engine, model, length.to_bytes(4, "big"), 10**6) == (length > MAX_WHOLE)
        assert engine.is_mid_packet == (length <= MAX_WHOLE)

    @rule(
        acts=A_FEW,
        kinds=st.lists(st.sampled_from([*FORMS]), min_size=1, max_size=3),
        which=st.integers(0, 999),
        at=st.floats(0, 1, exclude_max=True),
        noise=st.binary(max_size=4),
        cut=st.integers(0, 4),
    )
    def babble(
        self, *, acts: Acts, kinds: list[bytes], which: int, at: float, noise: bytes, cut: int
    ) -> None:
        """Packets that were good, but for some bytes that were replaced, taken out or put in."""
        self.act(acts)
        packets = [self.honest(kind, which, 20) for kind in kinds]
        data = b"".join(packet(fields) for fields in packets if fields is not None)
        where = int(at * (len(data) + 1))
        engine, model = self.copy()
        is_refused(engine, model, data[:where] + noise + data[where + cut :], 10**6)

    # ---- what must hold ----

    def check(self) -> None:
        engine, model = self.engine, self.model
        assert engine.asked == len(model.ours)
        assert engine.handling == len(model.theirs)
        for talks, most in ((model.ours, self.slots), (model.theirs, self.max_requests)):
            assert all(count(talks, talk.slots) <= most for talk in talks.values())
        assert engine.waiting == len(model.backlog)
        assert engine.cancelled == sum(talk.is_cancelled for talk in model.ours.values())
        assert engine.queued == model.queued
        assert engine.draining.peer_drains == model.peer_drains
        assert engine.is_draining == model.is_draining
        over = model.heard_bye_ok and not (model.ours or model.backlog or model.theirs)
        assert engine.is_drained == over
        assert engine.is_mid_packet == bool(model.buffer)
        assert engine.is_ping_queued == ([b"ping"] in model.control)
        assert len(engine.flow_control) == len(model.channels)
        assert not any(engine.is_unsent(id) for id in model.gone[-4:])
        for id, talk in (model.ours | model.backlog).items():
            assert engine.is_unsent(id) == (not talk.has_left)
        assert sum(len(held) for held, _ in model.pieces.values()) <= MAX_OPEN * LIMIT
        assert len(model.partly_left) <= MAX_OPEN
        assert model.control.count([b"pong"]) <= 1
        for id, talk in model.channels.items():
            assert sum(talk.held) < WINDOW + LIMIT
            items = [len(x[-1]) + ITEM_OVERHEAD for x in talk.due if x[0] == b"item"]
            assert sum(items[:-1]) < MAX_QUEUED
            if not talk.is_cancelled:
                assert engine.flow_control.may_send(id) == talk.may_send

    def teardown(self) -> None:
        """When all requests are answered, all queued packets leave, and nothing stays."""
        if not hasattr(self, "engine"):
            return
        while self.sending:
            self.say_piece(0, 0)
        while self.model.ours:
            if (fields := self.honest(b"err", 0, 20)) is not None:
                self.deliver(packet(fields))
            else:
                self.send(0)
            self.check()
        while self.model.unanswered:
            self.answer(1, 20)
        while self.send(0):
            pass
        self.check()
        assert not self.model.theirs
        assert not self.engine.queued
        assert not len(self.engine.flow_control)


def test_an_engine_does_what_is_due_whatever_its_peer_does() -> None:
    run_state_machine_as_test(
        LyingPeer, settings=settings(max_examples=40, stateful_step_count=20, deadline=None)
    )
