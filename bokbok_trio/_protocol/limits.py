"""The limits that each side declares in the handshake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .._errors import HandshakeError, ProtocolError
from .._settings import MAX_REQUESTS, MIN_MESSAGE_SIZE
from .packets import decode_number, encode_number


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that one side declares: bytes of a packet, and incoming requests in flight."""

    max_message_size: int
    max_requests: int

    def fields(self) -> tuple[bytes, bytes]:
        return encode_number(self.max_message_size), encode_number(self.max_requests)

    @classmethod
    def parse(cls, max_message_size: bytes, max_requests: bytes) -> Limits:
        try:
            limits = cls(decode_number(max_message_size), decode_number(max_requests))
        except ProtocolError as exc:
            raise HandshakeError(str(exc)) from None
        if limits.max_message_size < MIN_MESSAGE_SIZE:
            raise HandshakeError(
                f"the peer takes messages of only {limits.max_message_size} bytes, under {MIN_MESSAGE_SIZE}"
            )
        if not 1 <= limits.max_requests <= MAX_REQUESTS:
            raise HandshakeError(
                f"the peer takes {limits.max_requests} requests at once, not 1 to {MAX_REQUESTS}"
            )
        return limits
