"""Interprets the packets of the peer. Each changes the state of the session, and most become an event.

`KINDS` lists every kind of packet. Its function decodes the fields, checks that the peer may send this now,
and returns an event for `Connection`, or None.

Packets may cross: the peer can send a `cancel`, an item, a `credit` or an `end` before it knows that this
side has answered. Such packets are *ignored*, and counted, because a peer that sends nothing else keeps this
side busy. Everything else that does not fit the state is a `ProtocolError`.

Many packets are interpreted before anything of them is acted on. So whether a packet breaks the protocol
does not depend on what handlers do meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, final

from .._errors import MAX_DETAILS_SIZE, ProtocolError
from .budget import COUNTED
from .context import decode_context
from .draining import Draining
from .events import NO_CONTEXT, Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from .flow_control import ITEM_COST, WINDOW, FlowControl
from .local_requests import ENCODED_DEPTHS, LocalRequests, State
from .outbox import Outbox
from .packets import Buffer, decode_body, decode_number, decode_protocol_packet, decode_text, describe
from .pieces import Reassembler
from .remote_requests import UNANSWERED, RemoteRequests

MAX_ABORT_SIZE: Final = 256
"""Bytes of the text in `abort`."""

MAX_IGNORED: Final = 10_000
"""Packets that may be ignored even if no request was ever made: mostly pings while a pong waits."""

CROSSING: Final = 2
"""Packets that may be ignored for each request: its `cancel` crosses the answer, for example."""

SMALL_DROP: Final = 2**11
"""Bytes. A `drop` of fewer bytes in pieces counts as ignored, because it hardly costs the peer anything. Real
pieces are mostly far larger."""

CROSSING_ITEMS: Final = 2 * WINDOW // ITEM_COST + 2
"""Packets that may be ignored for each channel: as many items as there is credit for, a `credit` for each
of them, and an `end` for either direction."""

PIECED_KINDS: Final = frozenset({b"req", b"chan", b"ok", b"err", b"item"})
"""The kinds that may come in pieces: those that carry a user's bytes."""

_DEPTHS: Final = {encoded: depth for depth, encoded in enumerate(ENCODED_DEPTHS)}


@final
class Interpreter:
    """Interprets the packets of the peer.

    Arguments:
        parity: of the peer's ids: 0 for the client's, 1 for the server's.
        max_message_size: bytes of a packet.
        local, remote, flow_control, outbox, draining: the session's.

    Attributes:
        reassembler: the packets of which not all pieces have come.
        is_pong_queued: whether a pong waits to be sent.
        peer_aborted: whether the peer has sent `abort`.
    """

    __slots__ = (
        "_draining",
        "_flow_control",
        "_ignored",
        "_local",
        "_outbox",
        "_parity",
        "_remote",
        "is_pong_queued",
        "peer_aborted",
        "reassembler",
    )

    def __init__(
        self,
        parity: int,
        max_message_size: int,
        *,
        local: LocalRequests,
        remote: RemoteRequests,
        flow_control: FlowControl,
        outbox: Outbox,
        draining: Draining,
    ) -> None:
        self._parity = parity
        self._local = local
        self._remote = remote
        self._flow_control = flow_control
        self._outbox = outbox
        self._draining = draining
        self._ignored = 0
        self.reassembler = Reassembler(max_message_size)
        self.is_pong_queued = False
        self.peer_aborted = False

    def interpret(self, fields: list[Buffer]) -> Event | None:
        """Interpret one packet.

        Raises:
            ProtocolError: the peer may not send it, or not now.
        """
        kind = fields[0] if fields else b""
        known = KINDS.get(kind) if type(kind) is bytes else None
        if known is None or known[0] != len(fields):
            self.peer_aborted |= kind == b"abort"  # a malformed one is not answered either
            raise ProtocolError(f"unknown packet: {describe(fields)}")
        return known[1](self, fields)

    def _ignore(self) -> None:
        """Count a packet that is ignored, or a tiny piece that the peer took back.

        Raises:
            ProtocolError: there were more than can cross, for as many requests and items as there were.
        """
        self._ignored += 1
        if self._ignored <= MAX_IGNORED:
            return
        requests = self._local.next_id // 2 + self._remote.total
        if self._ignored > MAX_IGNORED + CROSSING * requests + CROSSING_ITEMS * self._flow_control.total:
            raise ProtocolError(f"{self._ignored} packets that mean nothing")

    # ---- requests and answers ----

    def _on_req(self, fields: list[Buffer], credit: int | None = None) -> Request | None:
        """Take a request. With `credit`, which is for our items, it has a channel."""
        has_channel = credit is not None
        _, id, timeout, depth, context, body = fields
        number = decode_number(id)
        self._check_parity(number)
        seconds = decode_number(timeout) / 1e6 if timeout else math.inf
        nested = _decode_depth(depth) if depth else 0
        pairs = decode_context(context) if context else NO_CONTEXT
        request = Request(number, seconds, decode_body(body), has_channel, nested, pairs)
        if self._draining.peer_is_done and not nested:
            raise ProtocolError("a new request of depth 0 after `bye-ok`")
        self._remote.add(number, 2 * nested + has_channel)  # `slot_class_of`, without its call
        if credit is not None:
            self._flow_control.add_remote(number, credit)
        if len(body) >= COUNTED and not self._remote.hold(number, len(body)):
            return None
        return request

    def _on_chan(self, fields: list[Buffer]) -> Request | None:
        return self._on_req(fields, decode_number(fields.pop(5)))

    def _on_ok(self, fields: list[Buffer]) -> Answer | None:
        _, id, body = fields
        answer = Answer(decode_number(id), decode_body(body))
        return answer if self._local.end_answered(answer.id) else None

    def _on_err(self, fields: list[Buffer]) -> Failure | None:
        _, id, code, message, details = fields
        if len(details) > MAX_DETAILS_SIZE:
            raise ProtocolError(f"details of {len(details)} bytes exceed the limit of {MAX_DETAILS_SIZE}")
        failure = Failure(decode_number(id), decode_text(code), decode_text(message), bytes(details))
        return failure if self._local.end_answered(failure.id) else None

    def _on_cancel(self, fields: list[Buffer]) -> Cancel | None:
        id = decode_number(fields[1])
        self._check_parity(id)
        if self._remote.answer_sizes.get(id) != UNANSWERED:
            self._ignore()  # it was never made, or it is answered
            return None
        return Cancel(id)

    def _check_parity(self, id: int) -> None:
        if id % 2 != self._parity:
            raise ProtocolError(f"the id {id} has the wrong parity for the other side")

    # ---- channels, of either side ----

    def _on_item(self, fields: list[Buffer]) -> Item | None:
        _, id, body = fields
        encoded = body if isinstance(body, bytes) else None
        item = Item(decode_number(id), len(body), decode_body(body), encoded)
        if not self._has_channel(item.id):
            self._ignore()
            return None
        self._flow_control.on_item(item.id, item.size)
        return item if self._is_wanted(item.id) else None

    def _on_credit(self, fields: list[Buffer]) -> None:
        id, size = decode_number(fields[1]), decode_number(fields[2])
        if self._has_channel(id):
            self._flow_control.on_credit(id, size)
        else:
            self._ignore()

    def _on_end(self, fields: list[Buffer]) -> End | None:
        id = decode_number(fields[1])
        if not self._has_channel(id):
            self._ignore()
            return None
        self._flow_control.on_end(id)
        return End(id) if self._is_wanted(id) else None

    def _has_channel(self, id: int) -> bool:
        """Whether that channel is in flight. If not, it has ended, and the packet has crossed its end.

        Raises:
            ProtocolError: a request of that id is in flight, but it has no channel.
        """
        if id not in self._remote.answer_sizes and self._local.states.get(id) in (None, State.QUEUED):
            return False
        if id not in self._flow_control.credits:
            raise ProtocolError(f"the request {id} has no channel")
        return True

    def _is_wanted(self, id: int) -> bool:
        return self._local.states.get(id) is not State.CANCELLED

    # ---- packets in pieces ----

    def _on_part(self, fields: list[Buffer]) -> Event | None:
        _, number, remaining, piece = fields
        body = self.reassembler.add(decode_number(number), decode_number(remaining), piece)
        if body is None:
            return None
        fields = decode_protocol_packet(body)
        if not fields or fields[0] not in PIECED_KINDS:
            raise ProtocolError(f"a packet of this kind may not come in pieces: {describe(fields)}")
        return self.interpret(fields)

    def _on_drop(self, fields: list[Buffer]) -> None:
        if self.reassembler.drop(decode_number(fields[1])) < SMALL_DROP:
            self._ignore()

    # ---- the connection as a whole ----

    def _on_ping(self, _fields: list[Buffer]) -> None:
        if self.is_pong_queued:
            self._ignore()
        else:
            self.is_pong_queued = True
            self._outbox.put_control(b"pong")

    def _on_pong(self, _fields: list[Buffer]) -> Pong:
        return Pong()

    def _on_bye(self, _fields: list[Buffer]) -> Bye:
        self._draining.receive_bye()
        return Bye(self._local.drop_waiting())

    def _on_bye_ok(self, _fields: list[Buffer]) -> None:
        self._draining.receive_bye_ok()

    def _on_abort(self, fields: list[Buffer]) -> Abort:
        _, code, message = fields
        self.peer_aborted = True  # also if it is malformed
        if len(message) > MAX_ABORT_SIZE:
            raise ProtocolError(f"an `abort` of {len(message)} bytes exceeds the limit of {MAX_ABORT_SIZE}")
        return Abort(decode_text(code), decode_text(message))


def _decode_depth(field: Buffer) -> int:
    depth = _DEPTHS.get(bytes(field[:3]))
    if depth is None:
        raise ProtocolError(f"invalid depth: {bytes(field[:20])!r}")
    return depth


KINDS: Final[dict[bytes, tuple[int, Callable[[Interpreter, list[Buffer]], Event | None]]]] = {
    b"req": (6, Interpreter._on_req),
    b"ok": (3, Interpreter._on_ok),
    b"err": (5, Interpreter._on_err),
    b"cancel": (2, Interpreter._on_cancel),
    b"part": (4, Interpreter._on_part),
    b"drop": (2, Interpreter._on_drop),
    b"ping": (1, Interpreter._on_ping),
    b"pong": (1, Interpreter._on_pong),
    b"bye": (1, Interpreter._on_bye),
    b"bye-ok": (1, Interpreter._on_bye_ok),
    b"chan": (7, Interpreter._on_chan),
    b"item": (3, Interpreter._on_item),
    b"credit": (3, Interpreter._on_credit),
    b"end": (2, Interpreter._on_end),
    b"abort": (3, Interpreter._on_abort),
}
"""Every kind of packet: how many fields it has, and the function that interprets it."""
