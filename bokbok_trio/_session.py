r"""The protocol engine of an open connection: bytes and calls in, bytes and events out.

No Trio, no I/O: `Session` never waits. `Connection` feeds it what was received, sends what it
`take`\\ s, and does what its events say.

Theory
======

A request has an id: the client's are even, the server's odd, counted up, never used twice. Of a
request *of ours* the engine knows one of these, and nothing once it is done:

========= ==================================================== ============================
state     what it means                                        where it is
========= ==================================================== ============================
backlog   no slot is free; the peer knows nothing              ``_backlog``
queued    it has a slot; the peer knows nothing                ``_queue``, ``_asked``
asked     it was taken to be sent, and the answer is awaited   ``_asked``
cancelled as asked, but nobody wants the answer any more       ``_asked``, ``_cancelled``
========= ==================================================== ============================

Of a request *of the peer's*: handled (``_handling``), then its answer is queued (``_handling`` and
``_queue``), then it is done, at the very moment the answer is taken to be sent.

Invariants
==========

- ``len(_asked)`` never passes the peer's slots; ``len(_handling)`` never passes ours.
- Every request of the peer's is answered exactly once, cancelled or not.
- A cancelled request that was not yet taken to be sent never existed: it leaves no `cancel`.
- The queues hold references to what the user gave, and no copies, until `take` joins them.

After a `ProtocolError` the engine is of no more use.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias, final

from ._errors import MAX_ERROR_TEXT_SIZE, ProtocolError
from ._handshake import Side
from ._packets import (
    Chunks,
    Field,
    PacketDecoder,
    decode_body,
    decode_number,
    decode_text,
    describe,
    encode_body,
    encode_head,
    encode_number,
)

HEAD_ROOM: Final = 96
"""Bytes of a packet kept for what stands before the user's fields: 79 for the longest head, with
three numbers of 18 digits. Always kept, so that what fits does not depend on how many requests
there were before."""

BATCH_SIZE: Final = 2**16
"""Bytes after which `take` adds no further packet to a batch: enough to make system calls rare,
little enough for a control packet not to wait long behind it."""


class Request(NamedTuple):
    """The peer asks. `timeout` is the microseconds it had left, or None."""

    id: int
    timeout: int | None
    fields: list[bytes]


class Cancel(NamedTuple):
    """The peer no longer wants the answer to a request of its own that is being handled."""

    id: int


class Answer(NamedTuple):
    """The answer to a request of ours."""

    id: int
    fields: list[bytes]


class Failure(NamedTuple):
    """The answer to a request of ours that failed."""

    id: int
    code: str
    message: str


Event: TypeAlias = Request | Cancel | Answer | Failure


@final
class Session:
    """One side of an open connection.

    Arguments:
        side: ours.
        max_message_size: bytes of a packet, as agreed.
        max_requests: the peer's requests that we take at once: the peer's slots.
        slots: our requests that the peer takes at once.
    """

    def __init__(self, side: Side, *, max_message_size: int, max_requests: int, slots: int) -> None:
        self._decoder = PacketDecoder(max_message_size)
        self._max_body_size = max_message_size - HEAD_ROOM
        self._max_requests = max_requests
        self._slots = slots
        self._next_id = 0 if side == "client" else 1
        self._peer_parity = 1 - self._next_id
        self._asked: set[int] = set()
        self._cancelled: set[int] = set()
        self._handling: set[int] = set()
        self._backlog: OrderedDict[int, Chunks] = OrderedDict()
        # At most one packet of an id waits at a time: ours is a request, the peer's an answer.
        self._queue: OrderedDict[int, Chunks] = OrderedDict()
        self._control: deque[bytes] = deque()
        self._is_closed = False

    # ---- asking ----

    def request(self, fields: Sequence[Field]) -> int:
        """Queue a request, or keep it until a slot is free, and return its id.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` does; nothing is queued.
        """
        body, size = encode_body(fields, self._max_body_size)
        id = self._next_id
        self._next_id += 2
        head = encode_head(b"req", encode_number(id), b"", body_size=size)
        if self._backlog or len(self._asked) >= self._slots:
            self._backlog[id] = [head, *body]
        else:
            self._asked.add(id)
            self._queue[id] = [head, *body]
        return id

    def cancel(self, id: int) -> None:
        """No longer want the answer to a request of ours that has none yet."""
        if self._backlog.pop(id, None) is not None:
            return
        if self._queue.pop(id, None) is not None:
            self._free_slot(id)
            return
        self._cancelled.add(id)
        self._control.append(encode_head(b"cancel", encode_number(id)))

    def is_unsent(self, id: int) -> bool:
        """Whether it is certain that the peer has seen nothing of a request of ours."""
        return id in self._queue or id in self._backlog

    def _free_slot(self, id: int) -> None:
        self._asked.remove(id)
        if self._backlog:
            id, chunks = self._backlog.popitem(last=False)
            self._asked.add(id)
            self._queue[id] = chunks

    # ---- answering ----

    def answer(self, id: int, fields: Sequence[Field]) -> None:
        """Queue the answer to a request of the peer's.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` does; it is still to be answered.
        """
        body, size = encode_body(fields, self._max_body_size)
        self._queue_answer(id, [encode_head(b"ok", encode_number(id), body_size=size), *body])

    def fail(self, id: int, code: str, message: str) -> None:
        """Queue an error as the answer to a request of the peer's. A long message is cut off."""
        text = message.encode(errors="backslashreplace")
        if len(text) > MAX_ERROR_TEXT_SIZE:
            # Cut between characters: what is left of one that was cut is no UTF-8, and is dropped.
            text = text[:MAX_ERROR_TEXT_SIZE].decode(errors="ignore").encode()
        self._queue_answer(id, [encode_head(b"err", encode_number(id), code.encode(), text)])

    def _queue_answer(self, id: int, chunks: Chunks) -> None:
        assert id in self._handling, "never asked, or done"
        assert id not in self._queue, "answered twice"
        if not self._is_closed:
            self._queue[id] = chunks

    @property
    def handling(self) -> int:
        """How many of the peer's requests are not done."""
        return len(self._handling)

    # ---- what leaves ----

    def close(self) -> None:
        """It is over: what leaves now is the answers that are queued, and nothing else any more."""
        self._is_closed = True
        self._control.clear()
        self._backlog.clear()
        for id in self._asked:
            self._queue.pop(id, None)

    def take(self) -> bytes:
        """Take the next batch to be sent, in one piece: control packets, then the queue in order.

        The slots of the answers in it are free from here on, as the peer may use them as soon as
        it has read the answer, which may be before our send returns.
        """
        chunks: Chunks = []
        size = 0
        while self._control:
            packet = self._control.popleft()
            chunks.append(packet)
            size += len(packet)
        while self._queue and size < BATCH_SIZE:
            id, packet_chunks = self._queue.popitem(last=False)
            self._handling.discard(id)
            chunks += packet_chunks
            size += sum(map(len, packet_chunks))
        return b"".join(chunks)

    # ---- what arrives ----

    @property
    def is_mid_packet(self) -> bool:
        """Whether the end of the stream would cut a packet short."""
        return self._decoder.buffered > 0

    def receive(self, data: bytes | bytearray) -> Iterator[Event]:
        """Take in what was received; yield what it says, as far as it is good.

        Raises:
            ProtocolError: the peer broke the protocol.
        """
        for fields in self._decoder.decode(data):
            event = self._interpret(fields)
            if event is not None:
                yield event

    def _interpret(self, fields: list[bytes]) -> Event | None:
        match fields:
            case [b"req", id, timeout, body]:
                return self._on_request(decode_number(id), timeout, body)
            case [b"ok", id, body]:
                fields = decode_body(body)
                number = decode_number(id)
                return Answer(number, fields) if self._on_answered(number) else None
            case [b"err", id, code, message]:
                failure = Failure(decode_number(id), decode_text(code), decode_text(message))
                return failure if self._on_answered(failure.id) else None
            case [b"cancel", id]:
                number = self._check_parity(decode_number(id), self._peer_parity)
                return Cancel(number) if number in self._handling else None
            case _:
                raise ProtocolError(f"no packet of ours: {describe(fields)}")

    def _on_request(self, id: int, timeout: bytes, body: bytes) -> Request:
        self._check_parity(id, self._peer_parity)
        request = Request(id, decode_number(timeout) if timeout else None, decode_body(body))
        if id in self._handling:
            raise ProtocolError(f"request {id} is in flight already")
        if len(self._handling) >= self._max_requests:
            raise ProtocolError(f"more than {self._max_requests} requests in flight")
        self._handling.add(id)
        return request

    def _on_answered(self, id: int) -> bool:
        """Note an answer to a request of ours; False: nobody wants it any more."""
        if id not in self._asked or id in self._queue:
            raise ProtocolError(f"an answer to {id}, which is not awaited")
        self._free_slot(id)
        if id in self._cancelled:
            self._cancelled.remove(id)
            return False
        return True

    @staticmethod
    def _check_parity(id: int, parity: int) -> int:
        if id % 2 != parity:
            raise ProtocolError(f"the id {id} is none of the other side's")
        return id
