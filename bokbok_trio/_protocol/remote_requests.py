"""The requests that the peer makes: their slots, the bytes they take up, and their one answer each.

A request of the peer is in flight from when it was received until the last byte of its answer is taken to be
sent. At that moment its slot is free, because the peer may use the slot as soon as it has read the answer,
which may be before our send returns.

Bytes are bounded too, see `budget`. A request counts until it has been answered, and its answer counts until
it has departed. A request that does not fit is answered `busy`, and does not run. The bytes of answers that
wait are only counted here; `Session.has_room_for_answers` tells whether more handlers may begin.

Invariants
==========

- The peer's requests of one slot class never exceed our slots.
- Every request is answered exactly once, cancelled or not.
"""

from __future__ import annotations

from typing import Final, final

from .._errors import MAX_ERROR_TEXT_SIZE, ProtocolError
from .._types import Fields
from .budget import Budget
from .outbox import Outbox
from .packets import cut_text, encode_body, encode_prefix, encode_small_packet
from .queued_packet import QueuedPacket
from .slots import CLASS_COUNT

UNANSWERED: Final = -1
"""Stands for the size of an answer that does not exist yet."""

BUSY: Final = "busy"
"""The code of the answer to a request that does not fit this side's budget. It has not run."""

_OK: Final = encode_prefix(b"ok", 3)


@final
class RemoteRequests:
    """The peer's requests in flight.

    Arguments:
        max_requests: how many requests of each class the peer may have in flight: its slots.
        max_body_size: bytes of a body.
        budget: how many bytes the peer may make this side hold.
        outbox: the session's.

    Attributes:
        budget: as above.
        answer_sizes: the bytes of each request's answer; `UNANSWERED` until it is queued.
        answer_bytes: bytes of all answers that have not departed.
        total: how many requests the peer has made since the connection was opened.
    """

    __slots__ = (
        "_classes",
        "_held",
        "_held_total",
        "_is_closed",
        "_max_body_size",
        "_max_requests",
        "_outbox",
        "_used",
        "answer_bytes",
        "answer_sizes",
        "budget",
        "total",
    )

    def __init__(self, max_requests: int, max_body_size: int, budget: Budget, outbox: Outbox) -> None:
        self._max_requests = max_requests
        self._max_body_size = max_body_size
        self.budget = budget
        self._outbox = outbox
        self.answer_sizes: dict[int, int] = {}
        self.answer_bytes = 0
        self.total = 0
        self._classes: dict[int, int] = {}  # slot classes, of all requests but those of class 0
        self._used = [0] * CLASS_COUNT  # slots, by class
        self._held: dict[int, int] = {}  # bytes of the requests that count
        self._held_total = 0
        self._is_closed = False

    # ---- a request comes ----

    def add(self, id: int, slot_class: int) -> None:
        """Give a request a slot of its class (see `slot_class_of`).

        Raises:
            ProtocolError: its id is in flight, or no slot is free.
        """
        if id in self.answer_sizes:
            raise ProtocolError(f"request {id} is in flight already")
        if self._used[slot_class] >= self._max_requests:
            kind = "channels" if slot_class % 2 else "requests"
            raise ProtocolError(f"more than {self._max_requests} {kind} of depth {slot_class // 2} in flight")
        self.total += 1
        self.answer_sizes[id] = UNANSWERED
        self._used[slot_class] += 1
        if slot_class:
            self._classes[id] = slot_class

    def hold(self, id: int, size: int) -> bool:
        """Count the bytes of a request. Return False if they do not fit: then it is answered `busy`."""
        self._held[id] = size
        self._held_total += size
        others = self._held_total - size
        if not others or self._held_total <= self.budget.requests:
            return True
        limit = self.budget.requests
        self.fail(id, BUSY, f"not run: of {limit} bytes of requests at once, {others} are held already")
        return False

    # ---- it is answered ----

    def answer(self, id: int, fields: Fields) -> None:
        """Queue the answer to a request.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` does; the request must still be answered.
        """
        body, size = encode_body(fields, self._max_body_size)
        # A channel's answer waits behind the items that are queued already.
        has_channel = self._classes.get(id, 0) % 2
        if len(body) > 1 or has_channel:
            self._queue_answer(id, QueuedPacket(b"ok", id, body=body, body_size=size), size)
        else:
            self._queue_answer(id, encode_small_packet(_OK, id, b"", body[0]), size)

    def fail(self, id: int, code: str, message: str, details: bytes = b"") -> bool:
        """Queue an error as the answer to a request. A long message is cut off.

        Returns:
            Whether the details fit. If not, the error goes without them.
        """
        encoded, text = code.encode(), cut_text(message, MAX_ERROR_TEXT_SIZE)
        fits = len(encoded) + len(text) + len(details) <= self._max_body_size
        self._queue_answer(id, QueuedPacket(b"err", id, encoded, text, details if fits else b""), 0)
        return fits

    def _queue_answer(self, id: int, packet: QueuedPacket | bytes, size: int) -> None:
        assert self.answer_sizes[id] == UNANSWERED, "answered twice"
        self.answer_sizes[id] = size
        self.answer_bytes += size
        if self._held:
            self._held_total -= self._held.pop(id, 0)
        if self._is_closed:
            return
        if isinstance(packet, bytes):
            self._outbox.put_encoded(id, packet)
        else:
            self._outbox.put(packet)

    def end(self, id: int) -> None:
        """Forget a request, and free its slot: the last byte of its answer was taken to be sent."""
        self.answer_bytes -= self.answer_sizes.pop(id)
        self._used[self._classes.pop(id, 0)] -= 1

    def close(self) -> None:
        """Queue no more answers."""
        self._is_closed = True

    # ---- how much is held ----

    def count_free(self) -> int:
        """Count the bytes of the budget that requests and answers do not take up."""
        return self.budget.total - self._held_total - self.answer_bytes
