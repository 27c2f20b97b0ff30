"""The reads and writes of the handshake: a hello, then one packet at a time, each with a bound.

Until the connection is open a stranger may be at the other end. So a read asks for no more than the
message that must come.
"""

from __future__ import annotations

from typing import Final, final

import trio

from .._errors import HandshakeError
from .._protocol.handshake import ClientHandshake, ServerHandshake
from .._protocol.packets import LENGTH_SIZE
from .._trio_util import describe_error
from .fast import FastStream
from .records import MAC_SIZE
from .secretbox import SecretboxStream

MAX_PACKET_SIZE: Final = 4096
"""Bytes of a packet before the connection is open."""

MAX_EARLY_RECORD_SIZE: Final = MAX_PACKET_SIZE + MAC_SIZE
"""Bytes of a record before the connection is open."""


class PeerLeft(HandshakeError):  # noqa: N818  (it says what happened)
    """The peer closed the connection, or it broke."""


@final
class NothingCame(PeerLeft):
    """The client left before it had sent a byte, as health checks do."""


async def exchange_hello(transport: FastStream, handshake: ClientHandshake | ServerHandshake) -> FastStream:
    """Receive the other side's hello. A server answers it; a client has sent its own before.

    Returns:
        The anonymous channel; in mode plain, `transport`.
    """
    # A client sends its hello right after it has dialled, so the hello is mostly here already.
    hello = transport.receive_nowait(handshake.hello_size) if handshake.side == "server" else b""
    while len(hello) < handshake.hello_size:
        handshake.check_hello(hello)
        try:
            hello += await _receive(transport, handshake.hello_size - len(hello))
        except (PeerLeft, trio.BrokenResourceError) as exc:
            # A client that resets the connection has left too, and Trio gives the reset as the cause. Other
            # causes, such as a failed TLS handshake, must be reported.
            if hello or handshake.side == "client" or not isinstance(exc.__cause__, ConnectionError | None):
                raise
            raise NothingCame(f"the client left before it had sent anything: {describe_error(exc)}") from exc
    handshake.receive_hello(hello)
    if handshake.side == "server":
        await send_packet(transport, handshake.hello)
    if not handshake.sealed:
        return transport
    keys = handshake.channel_keys().for_side(handshake.side)
    return SecretboxStream(transport, **keys, max_record_size=MAX_EARLY_RECORD_SIZE)


async def send_packet(stream: FastStream, packet: bytes) -> None:
    """Send a packet.

    Over a socket this is not a checkpoint, and need not be one: a client receives next, and the task of a
    server belongs to the library.
    """
    if not stream.can_send_nowait:
        await stream.send_all(packet)
    elif not stream.send_nowait(packet):
        await stream.send_all(b"")


async def receive_packet(stream: FastStream) -> bytes:
    """Receive one record, which must be one packet; in mode plain, one packet by its length."""
    if isinstance(stream, SecretboxStream):
        return await _receive(stream, None)
    packet = stream.receive_nowait(LENGTH_SIZE)  # mostly the packet is here already
    while len(packet) < LENGTH_SIZE:
        packet += await _receive(stream, LENGTH_SIZE - len(packet))
    size = int.from_bytes(packet, "big")
    if size > MAX_PACKET_SIZE:
        raise HandshakeError(f"packet of {size} bytes in the handshake; the limit is {MAX_PACKET_SIZE}")
    end = LENGTH_SIZE + size
    packet += stream.receive_nowait(size)
    while len(packet) < end:
        packet += await _receive(stream, end - len(packet))
    return packet


async def _receive(stream: FastStream, max_bytes: int | None) -> bytes:
    data = await stream.receive_some(max_bytes)
    if not data:
        raise PeerLeft("the peer closed the connection during the handshake")
    return bytes(data)
