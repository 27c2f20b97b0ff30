"""The handshake over a stream: its reads and writes, its timeout, its refusals.

Until the connection is open a stranger may be at the other end. So reads ask for no more than the
message that must come, every message has a bound, and all of it is done within
``handshake_timeout``. Whoever calls closes the stream when these raise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast, final

import trio

from ._addresses import PeerCredentials, stream_credentials
from ._direct_stream import DirectStream, make_direct
from ._errors import AuthenticationError, ConnectionRefused, HandshakeError
from ._handshake import MAX_KEYS, ClientHandshake, Limits, ServerHandshake, encode_refused
from ._keys import Key, encode_user
from ._packets import LENGTH_SIZE
from ._secretbox_stream import MAC_SIZE, SecretboxStream
from ._settings import Settings
from ._wire import Wire

MAX_PACKET_SIZE: Final = 4096
"""Bytes of a packet before the connection is open."""

MAX_EARLY_RECORD_SIZE: Final = MAX_PACKET_SIZE + MAC_SIZE
"""Bytes of a record before the connection is open."""

REFUSAL_DELAY: Final = 0.5
"""Seconds from `open` to the refusal of a user or key, so that its time does not tell which it was,
and guessing keys over the network is slow."""

HINT: Final = "does it expect a key, or none, and another service?"
"""What mostly is wrong where a handshake ends without a word."""

UserKeys: TypeAlias = Key | Sequence[Key] | None
UserKey: TypeAlias = Callable[[str], Awaitable[UserKeys]] | Mapping[str, Key | Sequence[Key]]
"""How a server finds a user's key: a mapping, or an async function; None for an unknown user."""

PeerUser: TypeAlias = Callable[[PeerCredentials], str | None]
"""How a plain server names who is at the other end of a UNIX socket; None refuses it."""

logger = logging.getLogger("bokbok_trio")


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """An open connection's stream, the transport below it, and what the handshake settled."""

    transport: trio.abc.Stream
    stream: trio.abc.Stream
    user: str | None
    peer_credentials: PeerCredentials | None
    encrypted: bool
    max_message_size: int
    peer_max_requests: int
    peer_options: Mapping[str, bytes]


def _broken(error: trio.BrokenResourceError) -> HandshakeError:
    return HandshakeError(f"the connection broke during the handshake: {error}; {HINT}")


def _late(settings: Settings) -> HandshakeError:
    return HandshakeError(f"the handshake was not done within {settings.handshake_timeout:g} seconds")


def _limits(settings: Settings) -> Limits:
    return Limits(settings.max_message_size, settings.max_requests)


def _opened(
    transport: trio.abc.Stream,
    stream: trio.abc.Stream,
    user: str | None,
    credentials: PeerCredentials | None,
    handshake: ClientHandshake | ServerHandshake,
    *,
    settings: Settings,
) -> Opened:
    if isinstance(stream, SecretboxStream) and handshake.final_keys is not None:
        stream.rekey(**handshake.final_keys.for_side(handshake.side))
    return Opened(
        transport,
        stream,
        user,
        credentials,
        handshake.sealed,
        min(settings.max_message_size, handshake.peer_limits.max_message_size),
        handshake.peer_limits.max_requests,
        handshake.peer_options,
    )


async def open_as_client(
    transport: trio.abc.Stream, *, user: str | None, key: Key | None, service: str, settings: Settings
) -> Opened:
    """Do the client's part.

    Raises:
        HandshakeError: or one of its subclasses; then nothing of ours was answered.
    """
    handshake = ClientHandshake(user=user, key=key, service=service, limits=_limits(settings))
    credentials = stream_credentials(transport)
    transport = make_direct(transport)
    with trio.CancelScope(deadline=trio.current_time() + settings.handshake_timeout):
        try:
            # In mode plain `open` needs nothing of the server's hello. To wait for that nevertheless would
            # be a third of the time that it takes to connect.
            along = b"" if handshake.sealed else handshake.open()
            await _send(transport, transport, handshake.hello + along)
            stream = await _exchange_hello(transport, handshake)
            if handshake.sealed:
                await _send(transport, stream, handshake.open())
            handshake.receive_reply(await _receive_packet(stream))
        except trio.BrokenResourceError as exc:
            raise _broken(exc) from exc
        return _opened(transport, stream, user, credentials, handshake, settings=settings)
    raise _late(settings)


async def open_as_server(
    transport: trio.abc.Stream,
    *,
    user_key: UserKey | None,
    service: str,
    settings: Settings,
    peer_user: PeerUser | None = None,
    admit: Callable[[], Literal["busy", "stopping"] | None],
    scope: trio.CancelScope | None = None,
) -> Opened:
    """Do the server's part.

    Arguments:
        user_key: how to find the key of a user; None for mode plain.
        peer_user: how to name the client in mode plain; None to let everybody in.
        admit: called once the client is authenticated, or named; returns why it cannot stay nevertheless.
        scope: all of it is done in this one; for the caller, to cancel it.

    Raises:
        HandshakeError: or one of its subclasses; the client has been told what it may know.
    """
    handshake = ServerHandshake(sealed=user_key is not None, service=service, limits=_limits(settings))
    credentials = stream_credentials(transport)
    transport = make_direct(transport)
    scope = scope or trio.CancelScope()
    scope.deadline = trio.current_time() + settings.handshake_timeout
    with scope:
        try:
            stream = await _exchange_hello(transport, handshake)
            handshake.receive_open(await _receive_packet(stream))
            # Counted from `open`: from hello, a client could let it pass first, and time the look-up.
            refuse_at = trio.current_time() + REFUSAL_DELAY
            keys = () if user_key is None else await _look_up(user_key, handshake.user)
            try:
                accepted = handshake.accept(keys)
                user = handshake.user or None
                if peer_user is not None:
                    user = _name_peer(peer_user, credentials)
            except AuthenticationError:
                if handshake.sealed:  # whom the system names has nothing to guess
                    await trio.sleep_until(refuse_at)
                with suppress(trio.BrokenResourceError):
                    await _send(transport, stream, encode_refused("authentication", "authentication failed"))
                raise
            refusal = admit()
            if refusal is not None:
                await _send(transport, stream, encode_refused(refusal, f"the server is {refusal}"))
                raise ConnectionRefused("the client was refused", refusal)
            await _send(transport, stream, accepted)
        except trio.BrokenResourceError as exc:
            raise _broken(exc) from exc
        # Cancelled too late to be caught is cancelled nevertheless: nobody would end it later.
        if not scope.cancel_called:
            return _opened(transport, stream, user, credentials, handshake, settings=settings)
    if trio.current_time() < scope.deadline:
        raise HandshakeError("the handshake had to make room, or the server stopped")
    raise _late(settings)


async def _exchange_hello(
    transport: trio.abc.Stream, handshake: ClientHandshake | ServerHandshake
) -> trio.abc.Stream:
    """Receive the other side's hello, answer it where we are the server, and enter the channel."""
    # A client's hello comes right after its dialling.
    hello = _read_now(transport, handshake.hello_size) if handshake.side == "server" else b""
    while len(hello) < handshake.hello_size:
        handshake.check_hello(hello)
        hello += await _receive(transport, handshake.hello_size - len(hello))
    handshake.receive_hello(hello)
    if handshake.side == "server":
        await _send(transport, transport, handshake.hello)
    if not handshake.sealed:
        return transport
    keys = handshake.channel_keys().for_side(handshake.side)
    return SecretboxStream(transport, **keys, max_record_size=MAX_EARLY_RECORD_SIZE)


async def _send(transport: trio.abc.Stream, stream: trio.abc.Stream, packet: bytes) -> None:
    """Send a packet over the stream over a transport, or over that itself.

    Over a socket this is no checkpoint, and need not be one: a client goes on to receive, and a server's
    task is the library's own. It saves both sides together 25 us, sealed 42.
    """
    wire = Wire(stream, transport)
    if not wire.can_send_now:
        await wire.send(packet)
    elif not wire.send_now(packet):
        await wire.send_rest()


async def _receive_packet(stream: trio.abc.Stream) -> bytes:
    """Receive what must be exactly one packet: a record's worth, or, in the clear, by its length."""
    if isinstance(stream, SecretboxStream):
        return await _receive(stream, None)
    packet = _read_now(stream, LENGTH_SIZE)
    while len(packet) < LENGTH_SIZE:
        packet += await _receive(stream, LENGTH_SIZE - len(packet))
    size = int.from_bytes(packet, "big")
    if size > MAX_PACKET_SIZE:
        raise HandshakeError(f"a packet of {size} bytes in the handshake")
    end = LENGTH_SIZE + size
    packet += _read_now(stream, size)
    while len(packet) < end:
        packet += await _receive(stream, end - len(packet))
    return packet


def _read_now(stream: trio.abc.Stream, most: int) -> bytes:
    """What of a message is here already, as far as that can be told without waiting.

    Not to wait for what is likely to be saves 27 us in mode plain, where a packet is received in two
    parts, and 8 in mode sealed.
    """
    if isinstance(stream, DirectStream):
        with suppress(OSError):  # nothing is here, or it is broken, and receiving will tell
            return os.read(stream.socket.fileno(), most)
    return b""


async def _receive(stream: trio.abc.Stream, most: int | None) -> bytes:
    data = await stream.receive_some(most)
    if not data:
        raise HandshakeError(f"the peer closed the connection during the handshake; {HINT}")
    return bytes(data)


async def _look_up(user_key: UserKey, user: str | None) -> Sequence[Key]:
    """The keys a user may have. A failing look-up finds none, like that of an unknown user."""
    if user is None:
        return ()
    try:
        return _check_keys(await user_key(user) if callable(user_key) else user_key.get(user))
    except Exception:
        logger.exception("looking up the key of user %r failed", user)
        return ()


def _name_peer(peer_user: PeerUser, credentials: PeerCredentials | None) -> str:
    """The user at the other end. A function that fails names nobody.

    Raises:
        AuthenticationError: there is no name.
    """
    if credentials is None:
        raise AuthenticationError("the system does not tell who the peer is, so peer_user was not asked")
    try:
        user = peer_user(credentials)
        if user is not None:
            encode_user(user)
            return user
    except Exception:
        logger.exception("naming the peer %r failed", credentials)
    raise AuthenticationError(f"peer_user has no name for {credentials}")


def _check_keys(found: object) -> Sequence[Key]:
    if found is None:
        return ()
    keys: list[Key] = []
    for key in cast("Sequence[object]", found if isinstance(found, Sequence) else [found]):
        if not isinstance(key, Key):
            raise TypeError(f"user_key found {type(key).__name__}, not a Key")
        keys.append(key)
    if len(keys) > MAX_KEYS:
        logger.warning("user_key found %d keys, and only the first %d are tried", len(keys), MAX_KEYS)
    return keys
