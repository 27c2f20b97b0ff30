"""A packet that waits to be sent. It is encoded as late as possible: until then its timeout goes on, and the
user's bytes are not copied.
"""

from __future__ import annotations

from typing import Final, final

from .packets import Chunks, encode_number, encode_packet

MAX_WHOLE_SIZE: Final = 2**16 + 2**10
"""Bytes of the longest packet that leaves whole; longer ones leave in pieces. 64 KiB is a favourite size of a
field, so a field of that size still leaves whole, with the fields before it."""

HEAD_ROOM: Final = 128
"""Bytes of a packet kept for everything but the user's fields and context. The longest head is 93 bytes, with
three numbers of 18 digits. The room is always kept, so that it does not depend on a timeout, or on how many
requests there were before."""

MAX_TIMEOUT: Final = 10**17
"""Microseconds, about three thousand years. A number has 18 digits, so a longer timeout counts as none."""


@final
class QueuedPacket:
    """A packet of a request or channel: a few fields, and perhaps a user's body.

    Arguments:
        kind: the first field.
        id: the second field.
        fields: the fields between the id and the body.
        body: in chunks; None: the packet has no body.
        body_size: bytes of the body.
        deadline: of a request, by the clock that `Outbox.take` is told. Its timeout goes before `fields`.
            None: the packet has no such field.
    """

    __slots__ = ("_body", "_deadline", "_fields", "body_size", "id", "is_big", "kind")

    def __init__(
        self,
        kind: bytes,
        id: int,
        *fields: bytes,
        body: Chunks | None = None,
        body_size: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.kind = kind
        self.id = id
        self.body_size = body_size
        # It must not depend on the timeout, which changes.
        self.is_big = body_size + sum(map(len, fields)) > MAX_WHOLE_SIZE - HEAD_ROOM
        self._fields = fields
        self._body = body
        self._deadline = deadline

    def encode(self, now: float, chunks: Chunks) -> int:
        """Append the packet to some chunks, with its timeout as of now. Return its size in bytes."""
        fields = self._fields
        if self._deadline is not None:
            timeout = max(0.0, self._deadline - now) * 1e6
            fields = (b"" if timeout > MAX_TIMEOUT else encode_number(int(timeout)), *fields)
        body_size = None if self._body is None else self.body_size
        head = encode_packet(self.kind, encode_number(self.id), *fields, body_size=body_size)
        chunks.append(head)
        chunks += self._body or ()
        return len(head) + self.body_size
