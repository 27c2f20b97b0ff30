"""The handshake over a stream: its two sides, its timeout and its refusals.

The handshake must be done within ``handshake_timeout``. If a function here raises, its caller closes the
stream. A server calls `linger` first, because closing could destroy the refusal that it has sent.

A server waits at most `MAX_WAIT_SHARE` of that time for its turn to look the user up, and then refuses the
client as ``busy``. The client has a timeout too. If a server looked up clients that have waited longer, it
would look up only those that are about to give up, and nobody would ever get in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, final

import trio

from .._errors import AuthenticationError, ConnectionRefused, HandshakeError
from .._keys import Key
from .._places import Place
from .._protocol.budget import Budget
from .._protocol.handshake import ClientHandshake, ServerHandshake, encode_refused
from .._protocol.limits import Limits
from .._protocol.options import ROOM
from .._protocol.packets import encode_number
from .._settings import Settings
from .._sockets import PeerCredentials, stream_credentials
from .._trio_util import describe_error
from .._types import PeerUser, UserKey
from .fast import FastStream
from .handshake_io import PeerLeft, exchange_hello, receive_packet, send_packet
from .identify import Failures, LogFailure, look_up_in_turn, name_peer
from .secretbox import SecretboxStream
from .socket import make_fast

REFUSAL_DELAY: Final = 0.5
"""Seconds from `open` to the refusal of a user or a key, so that the time does not tell which of them is
wrong."""

MAX_WAIT_SHARE: Final = 0.5
"""The part of `handshake_timeout` for which a client may wait to be looked up. The rest is for the look-up,
and for the client's own timeout, which began a little earlier."""

LINGER_TIME: Final = 1.0
"""Seconds that a refused peer has to close its end: more than a round trip takes."""

LINGER_SIZE: Final = 2**13
"""Bytes that are read and dropped meanwhile: twice as many as a handshake may have under way. No client of
this package sends more."""

HINT: Final = "check whether the server expects a key, and which service"
"""The likely mistakes when a handshake ends without a word."""


@final
@dataclass(frozen=True, slots=True)
class Established:
    """The result of a handshake: the stream of an open connection, its user, and the limits of both sides."""

    stream: FastStream
    user: str | None
    peer_credentials: PeerCredentials | None
    key_fingerprint: str | None
    max_message_size: int
    peer_max_requests: int
    peer_options: Mapping[str, bytes]


@final
class Refusal(NamedTuple):
    """Why an authenticated client cannot stay.

    Attributes:
        code, message: for the client.
        reason: for the log.
    """

    code: Literal["busy", "stopping"]
    message: str
    reason: str


TOO_LATE: Final = Refusal(
    "busy",
    "the server is busy looking up other users (see its max_lookups); try again later",
    "the client waited too long for its look-up",
)


@final
class ServerStopped(HandshakeError):  # noqa: N818  (it says what happened)
    """The server stopped before the handshake was done."""


@final
class Displaced(HandshakeError):  # noqa: N818  (it says what happened)
    """The handshake got no place, or lost it to others."""


def _late(settings: Settings) -> HandshakeError:
    return HandshakeError(f"the handshake was not done within {settings.handshake_timeout:g} seconds")


def _explain_cancel(place: Place, settings: Settings) -> HandshakeError:
    """Return the exception for a server's handshake whose scope was cancelled."""
    if place.is_displaced:
        return Displaced("the handshake was ended to make room for others")
    if trio.current_time() < place.scope.deadline:
        return ServerStopped("the server stopped during the handshake")
    return _late(settings)


def _limits(settings: Settings) -> Limits:
    return Limits(settings.max_message_size, settings.max_requests)


def _options(settings: Settings) -> Mapping[str, bytes]:
    return {ROOM: encode_number(Budget.share_out(settings.effective_budget).requests)}


def _established(
    stream: FastStream,
    user: str | None,
    credentials: PeerCredentials | None,
    handshake: ClientHandshake | ServerHandshake,
    *,
    settings: Settings,
) -> Established:
    if isinstance(stream, SecretboxStream) and handshake.final_keys is not None:
        stream.rekey(**handshake.final_keys.for_side(handshake.side))
    return Established(
        stream,
        user,
        credentials,
        None if handshake.key is None else handshake.key.fingerprint,
        min(settings.max_message_size, handshake.peer_limits.max_message_size),
        handshake.peer_limits.max_requests,
        handshake.peer_options,
    )


async def establish_as_client(
    transport: trio.abc.Stream, *, user: str | None, key: Key | None, service: str, settings: Settings
) -> Established:
    """Do the client's part of the handshake.

    Raises:
        HandshakeError: it failed; this or a subclass.
    """
    handshake = ClientHandshake(
        user=user, key=key, service=service, limits=_limits(settings), options=_options(settings)
    )
    credentials = stream_credentials(transport)
    fast = make_fast(transport)
    with trio.CancelScope(deadline=trio.current_time() + settings.handshake_timeout):
        try:
            # In mode plain `open` does not depend on the server's hello, so it leaves with ours. That saves
            # a round trip. But a stream without a buffer takes `open` only after the server's hello.
            is_combined = not handshake.sealed and fast.can_send_nowait
            await send_packet(fast, handshake.hello + (handshake.open() if is_combined else b""))
            stream = await exchange_hello(fast, handshake)
            if not is_combined:
                await send_packet(stream, handshake.open())
            handshake.receive_reply(await receive_packet(stream))
        except trio.BrokenResourceError as exc:
            raise HandshakeError(f"{_broken(exc)}; {HINT}") from exc
        except PeerLeft as exc:
            raise HandshakeError(f"{exc}; {HINT}") from exc.__cause__
        return _established(stream, user, credentials, handshake, settings=settings)
    raise _late(settings)


async def establish_as_server(
    transport: trio.abc.Stream,
    *,
    user_key: UserKey | None,
    service: str,
    settings: Settings,
    peer_user: PeerUser | None = None,
    admit: Callable[[str | None], Refusal | None],
    place: Place,
    log: LogFailure,
) -> Established:
    """Do the server's part of the handshake.

    Arguments:
        user_key: finds the keys of a user. None: mode plain.
        peer_user: names the client in mode plain. None: everybody gets in.
        admit: called with the user who was authenticated or named. It returns why the client cannot stay, or
            None.
        place: the place of this handshake, which runs in the scope of the place. The caller leaves the place.
        log: logs how a function of the application failed.

    Raises:
        HandshakeError: it failed; this or a subclass. The client was told as much as it may know.
    """
    handshake = ServerHandshake(
        sealed=user_key is not None, service=service, limits=_limits(settings), options=_options(settings)
    )
    credentials = stream_credentials(transport)
    fast = make_fast(transport)
    failures = Failures(log)
    scope = place.scope
    began = trio.current_time()
    scope.deadline = began + settings.handshake_timeout
    try:
        with scope:
            stream = await exchange_hello(fast, handshake)
            place.note_hello()
            handshake.receive_open(await receive_packet(stream))
            place.note_open()
            # The delay begins at `open`. If it began at hello, a client could let it pass before it sends
            # `open`, and then measure the look-up.
            refuse_at = trio.current_time() + REFUSAL_DELAY
            if not await place.take_turn(began + MAX_WAIT_SHARE * settings.handshake_timeout):
                raise await _refuse(stream, TOO_LATE)
            keys = await look_up_in_turn(fast, user_key, handshake.user, place, failures)
            try:
                accepted = handshake.accept(keys)
                name = handshake.user if peer_user is None else name_peer(peer_user, credentials, failures)
            except AuthenticationError:
                place.note_failure()
                if handshake.sealed:  # a peer that the system names has nothing to guess
                    await trio.sleep_until(refuse_at)
                await _send_refusal(stream, "authentication", "authentication failed")
                raise
            refusal = admit(name or None)
            if refusal is not None:
                raise await _refuse(stream, refusal)
            await send_packet(stream, accepted)
            # The scope may have been cancelled after the last checkpoint. The code that cancelled it counts
            # on a failure of this handshake, and would not end the connection later.
            if not scope.cancel_called:
                return _established(stream, name or None, credentials, handshake, settings=settings)
    except trio.BrokenResourceError as exc:
        raise HandshakeError(_broken(exc)) from exc
    finally:
        failures.log()
    raise _explain_cancel(place, settings)


async def linger(transport: trio.abc.Stream) -> None:
    """Let a peer read the last bytes that it was sent, before the caller closes the transport.

    If a socket is closed with unread bytes, the connection is reset, and the peer's system drops what the
    peer has not read yet. So say that nothing follows, and read and drop until the peer has closed its end:
    for a second and 8 KiB at most.
    """
    with trio.move_on_after(LINGER_TIME), suppress(trio.BrokenResourceError):
        if isinstance(transport, trio.abc.HalfCloseableStream):
            await transport.send_eof()
        remaining = LINGER_SIZE
        while remaining > 0 and (dropped := len(await transport.receive_some(remaining))):
            remaining -= dropped


async def _refuse(stream: FastStream, refusal: Refusal) -> ConnectionRefused:
    """Tell the client that it cannot stay. Return the exception to raise, which says why."""
    await _send_refusal(stream, refusal.code, refusal.message)
    return ConnectionRefused(refusal.reason, refusal.code)


async def _send_refusal(
    stream: FastStream,
    code: Literal["authentication", "busy", "stopping"],
    message: str,
) -> None:
    with suppress(trio.BrokenResourceError):
        await send_packet(stream, encode_refused(code, message))


def _broken(error: trio.BrokenResourceError) -> str:
    return f"the connection broke during the handshake: {describe_error(error)}"
