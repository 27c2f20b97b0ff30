"""The protocol engine of an open connection: bytes and calls in, bytes and events out.

`Session` never waits. `Connection` feeds it the received bytes, sends the batches that `take` returns, and
acts on its events. The session is the face; each part of the work has a file of its own:

- `local_requests`: the requests that this side makes. They wait for slots (`slots`) and for the peer's room
  (`budget`).
- `remote_requests`: the requests that the peer makes, and their answers.
- `flow_control`: the credit of channels. A *channel* is a request with items in both directions.
- `interpreter`: the meaning of each packet of the peer.
- `draining`: the agreement of both sides to take no more requests.
- `outbox` and `pieces`: the order in which packets leave.

At most one ping and one pong are queued. After a `ProtocolError` the engine only sends, `abort` last of all.
"""

from __future__ import annotations

from typing import Final, final

from .._errors import ProtocolError
from .._types import Side
from .budget import Budget
from .draining import Draining
from .events import Abort, Bye, Event, Failure
from .flow_control import FlowControl
from .interpreter import MAX_ABORT_SIZE, Interpreter
from .local_requests import LocalRequests, State
from .outbox import MAX_BATCH_SIZE, Outbox
from .packets import Buffer, PacketDecoder, cut_text, encode_packet
from .queued_packet import HEAD_ROOM, MAX_WHOLE_SIZE
from .remote_requests import RemoteRequests

NO_BUDGET: Final = Budget.share_out(2**62)
"""A budget without a bound, for tests."""


@final
class Session:
    """One side of an open connection.

    Arguments:
        side: this one.
        max_message_size: bytes of a packet, as agreed.
        max_requests: how many of the peer's requests of each class this side takes at once: the peer's slots.
        slots: how many of our requests of each class the peer takes at once.
        budget: how many bytes the peer may make this side hold.
        peer_room: how many bytes of our requests the peer takes; None: it has not told.

    Attributes:
        local: the requests that this side makes.
        request, open_channel, cancel: its methods.
        remote: the requests that the peer makes.
        answer, fail: its methods.
        flow_control: sends and grants, for the channels in flight.
        draining: which side takes no new request of depth 0.
        error: the error by which the peer broke the protocol; None before that.
        has_more: whether packets remained after the last `take`.
        has_undecoded: whether received packets remain to be decoded. Then call `receive` again, without data.
        has_spoken: whether the peer has asked or answered anything, besides saying that it ends.
        is_draining: whether this side takes no new request of depth 0.
        is_holding_back: whether handlers wait for `has_room_for_answers`; the caller sets it.
        is_ping_queued: whether a ping waits to be sent.
    """

    __slots__ = (
        "_abort",
        "_decoder",
        "_interpret",
        "_interpreter",
        "_outbox",
        "_peer_parity",
        "answer",
        "cancel",
        "draining",
        "error",
        "fail",
        "flow_control",
        "has_more",
        "has_spoken",
        "has_undecoded",
        "is_draining",
        "is_holding_back",
        "is_ping_queued",
        "local",
        "open_channel",
        "remote",
        "request",
    )

    def __init__(
        self,
        side: Side,
        *,
        max_message_size: int,
        max_requests: int,
        slots: int,
        budget: Budget = NO_BUDGET,
        peer_room: int | None = None,
    ) -> None:
        parity = 0 if side == "client" else 1
        max_body_size = max_message_size - HEAD_ROOM
        self._peer_parity = 1 - parity
        self._outbox = Outbox()
        self.draining = Draining()
        self.remote = RemoteRequests(max_requests, max_body_size, budget, self._outbox)
        self.flow_control = FlowControl(self._outbox, max_body_size, budget.items, self.remote.count_free)
        self.local = LocalRequests(
            parity,
            slots=slots,
            peer_room=peer_room,
            max_body_size=max_body_size,
            outbox=self._outbox,
            flow_control=self.flow_control,
        )
        # These are called for every request, so they are no methods that pass the call on.
        self.request = self.local.request
        self.open_channel = self.local.open_channel
        self.cancel = self.local.cancel
        self.answer = self.remote.answer
        self.fail = self.remote.fail
        self._interpreter = Interpreter(
            self._peer_parity,
            max_message_size,
            local=self.local,
            remote=self.remote,
            flow_control=self.flow_control,
            outbox=self._outbox,
            draining=self.draining,
        )
        self._interpret = self._interpreter.interpret
        self._decoder = PacketDecoder(min(max_message_size, MAX_WHOLE_SIZE))
        self._abort: bytes | None = None  # the packet that leaves last
        self.error: ProtocolError | None = None
        self.has_more = False
        self.has_undecoded = False
        self.has_spoken = False
        self.is_draining = False
        self.is_holding_back = False
        self.is_ping_queued = False

    def is_unsent(self, id: int) -> bool:
        """Whether it is certain that no handler of the peer has seen a request of this side."""
        return self.local.states.get(id) is State.QUEUED or self.local.is_waiting(id)

    def drop_items(self, id: int) -> None:
        """Send no more items for a request that the peer has cancelled."""
        self._outbox.remove(id)

    # ---- draining, liveness, closing ----

    def ping(self) -> None:
        """Queue a ping."""
        self.is_ping_queued = True
        self._outbox.put_control(b"ping")

    def drain(self) -> None:
        """Say that this side takes no new request of depth 0. A second call does nothing."""
        if not self.is_draining:
            self.is_draining = self.draining.awaits_bye_ok = True
            self._outbox.put_control(b"bye")

    @property
    def is_drained(self) -> bool:
        """Whether nothing is in flight after this side's `bye`, and nothing will be."""
        return self.draining.peer_is_done and not (
            self.local.states or self.local.has_waiting or self.remote.answer_sizes
        )

    def abort(self, text: str) -> None:
        """Tell the peer, last of all, that it broke the protocol. An `abort` of the peer is not answered."""
        if not self._interpreter.peer_aborted:
            self._abort = encode_packet(b"abort", b"protocol", cut_text(text, MAX_ABORT_SIZE))

    def close(self) -> None:
        """End all requests. Only queued answers and control packets are still sent."""
        self.remote.close()
        self.local.close()
        self.draining.owes_bye_ok = False

    # ---- sending ----

    @property
    def has_queued(self) -> bool:
        """Whether a packet waits to be sent."""
        return not self._outbox.is_empty or self.draining.owes_bye_ok or self._abort is not None

    @property
    def has_big(self) -> bool:
        """Whether a big packet waits, or has partly departed."""
        return self._outbox.has_big

    @property
    def is_all_encoded(self) -> bool:
        """Whether all packets that wait are encoded already. Then `take` needs no time and no room."""
        return self._outbox.is_all_encoded

    def take(self, now: float, room: int = MAX_BATCH_SIZE) -> bytes:
        """Take the next batch to be sent, in one piece.

        Arguments:
            now: the time, in seconds, by the clock of the deadlines.
            room: see `Outbox.take`.
        """
        self.is_ping_queued = self._interpreter.is_pong_queued = False
        chunks, departed, items = self._outbox.take(now, room)
        peer_parity, states, credits = self._peer_parity, self.local.states, self.flow_control.credits
        for id in departed:
            if id % 2 == peer_parity:  # an answer: its slot is free from now on, see `remote_requests`
                self.remote.end(id)
                if id in credits:
                    self.flow_control.remove(id)
            else:
                states[id] = State.SENT
        for id, size in items:
            self.flow_control.item_departed(id, size)
        if self.draining.owes_bye_ok and not self.local.has_queued_at_depth_0():
            self.draining.owes_bye_ok = False
            chunks.append(encode_packet(b"bye-ok"))
        if self._abort is not None and self._outbox.is_empty:
            chunks.append(self._abort)
            self._abort = None
        self.has_more = self._outbox.has_more
        return b"".join(chunks)

    def note_sent(self, seconds: float) -> None:
        """Tell how long it took to send the last batch."""
        self._outbox.note_sent(seconds)

    # ---- receiving ----

    def receive(self, data: Buffer | bytearray) -> list[Event]:
        """Decode received bytes, up to `MAX_AT_ONCE` packets, and return their events.

        If the peer broke the protocol, `error` says how, and the events are those of the packets before.
        """
        events: list[Event] = []
        try:
            # The loop runs in C. If it raises, the events before that are in the list.
            events.extend(filter(None, map(self._interpret, self._decoder.decode(data))))
        except ProtocolError as exc:
            self.error = exc.with_traceback(None)  # its frames refer to this session
        self.has_undecoded = self._decoder.has_rest and self.error is None
        if events and not self.has_spoken:
            self.has_spoken = not all(map(_is_farewell, events))
        return events

    @property
    def is_mid_packet(self) -> bool:
        """Whether the end of the stream would cut a packet short."""
        return self._decoder.buffered > 0

    # ---- how many there are ----

    @property
    def made(self) -> int:
        """How many requests this side has made since the connection was opened."""
        return self.local.next_id // 2

    @property
    def received(self) -> int:
        """How many requests the peer has made since the connection was opened."""
        return self.remote.total

    @property
    def asked(self) -> int:
        """How many of our requests have a slot."""
        return len(self.local.states)

    @property
    def cancelled(self) -> int:
        """How many of our requests with a slot were cancelled and are not answered yet."""
        return self.local.count_cancelled()

    @property
    def waiting(self) -> int:
        """How many of our requests wait for a slot."""
        return self.local.count_waiting()

    @property
    def handling(self) -> int:
        """How many of the peer's requests are in flight."""
        return len(self.remote.answer_sizes)

    @property
    def queued(self) -> int:
        """How many packets have not wholly departed."""
        return len(self._outbox)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the answers and items that wait to be sent."""
        return self.remote.answer_bytes + self.flow_control.queued

    @property
    def has_room_for_answers(self) -> bool:
        """Whether handlers may begin: the bytes of the answers that wait are within the budget."""
        return self.remote.answer_bytes <= self.remote.budget.answers


def _is_farewell(event: Event) -> bool:
    """Whether an event only says that the peer is about to end."""
    return isinstance(event, Bye | Abort) or (isinstance(event, Failure) and event.code == "closing")
