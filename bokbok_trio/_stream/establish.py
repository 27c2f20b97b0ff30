"""The handshake over a stream: its reads and writes, its timeout, its refusals.

Until the connection is open a stranger may be at the other end. So reads ask for no more than the
message that must come, every message has a bound, and all of it is done within
``handshake_timeout``. The caller closes the stream when these functions raise; a server calls `linger`
before that, or closing could destroy the refusal that it has sent.

Of that time a server spends at most `MAX_WAIT_SHARE` on waiting for a turn to look the user up, and refuses
the client as ``busy`` where that was not enough. For the client has a timeout too: a server that looks up who
has waited too long looks up only those who are about to give up, and then nobody ever gets in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, cast, final

import trio

from .._arguments import list_keys
from .._errors import AuthenticationError, ConnectionRefused, HandshakeError
from .._keys import MAX_KEYS, Key, encode_user
from .._places import Place
from .._protocol.budget import Budget
from .._protocol.handshake import ClientHandshake, ServerHandshake, encode_refused
from .._protocol.limits import Limits
from .._protocol.options import ROOM
from .._protocol.packets import LENGTH_SIZE, encode_number
from .._settings import Settings
from .._sockets import PeerCredentials, stream_credentials
from .._trio_util import call_user, call_user_sync, describe_error, split_exception
from .._types import PeerUser, UserKey
from .fast import FastStream
from .records import MAC_SIZE
from .secretbox import SecretboxStream
from .socket import make_fast

MAX_PACKET_SIZE: Final = 4096
"""Bytes of a packet before the connection is open."""

MAX_EARLY_RECORD_SIZE: Final = MAX_PACKET_SIZE + MAC_SIZE
"""Bytes of a record before the connection is open."""

REFUSAL_DELAY: Final = 0.5
"""Seconds from `open` to the refusal of a user or key, so that its time does not tell which it was."""

MAX_WAIT_SHARE: Final = 0.5
"""The part of `handshake_timeout` that a client may wait for the turn to look it up. The rest is for the
look-up, and for the client's own timeout, which began a little earlier."""

LINGER_TIME: Final = 1.0
"""Seconds that a peer has to close its end after it was refused: more than a round trip takes."""

LINGER_SIZE: Final = 2**13
"""Bytes that are read and dropped meanwhile. Twice what a handshake may have under way; who sends more is no
client of ours."""

HINT: Final = "check whether the server expects a key, and which service"
"""What mostly is wrong where a handshake ends without a word."""

logger = logging.getLogger("bokbok_trio")


class LogFailure(Protocol):
    """Logs an error of the application's: of which kind it is, a message, its arguments, and the error."""

    def __call__(self, kind: str, message: str, *args: object, error: BaseException | None) -> None: ...


@final
@dataclass(frozen=True, slots=True)
class Established:
    """An open connection's stream, and what the handshake settled."""

    stream: FastStream
    user: str | None
    peer_credentials: PeerCredentials | None
    key_fingerprint: str | None
    max_message_size: int
    peer_max_requests: int
    peer_options: Mapping[str, bytes]


@final
class Refusal(NamedTuple):
    """Why a client that is authenticated cannot stay.

    Attributes:
        code, message: what the client is told.
        reason: what the log is told.
    """

    code: Literal["busy", "stopping"]
    message: str
    reason: str


TOO_LATE: Final = Refusal(
    "busy",
    "the server is busy looking up other users (see its max_lookups); try again later",
    "the client waited too long for its look-up",
)


class _PeerLeft(HandshakeError):  # noqa: N818  (what happened)
    """The peer closed the connection, or it broke."""


@final
class NothingCame(_PeerLeft):
    """The client left before it had sent a byte, as health checks do."""


@final
class ServerStopped(HandshakeError):  # noqa: N818  (what happened)
    """The server stopped before the handshake was done."""


@final
class Displaced(HandshakeError):  # noqa: N818  (what happened)
    """The handshake had no place, or lost it."""


def _late(settings: Settings) -> HandshakeError:
    return HandshakeError(f"the handshake was not done within {settings.handshake_timeout:g} seconds")


def _limits(settings: Settings) -> Limits:
    return Limits(settings.max_message_size, settings.max_requests)


def _options(settings: Settings) -> Mapping[str, bytes]:
    return {ROOM: encode_number(Budget.share_out(settings.effective_budget).requests)}


def _opened(
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
    """Do the client's part.

    Raises:
        HandshakeError: or one of its subclasses; then nothing of ours was answered.
    """
    handshake = ClientHandshake(
        user=user, key=key, service=service, limits=_limits(settings), options=_options(settings)
    )
    credentials = stream_credentials(transport)
    fast = make_fast(transport)
    with trio.CancelScope(deadline=trio.current_time() + settings.handshake_timeout):
        try:
            # In mode plain `open` needs nothing of the server's hello. To wait for that nevertheless would
            # be a third of the time that it takes to connect. But a stream without a buffer would take no
            # `open` before the server has sent its hello.
            goes_along = not handshake.sealed and fast.can_send_nowait
            await _send(fast, handshake.hello + (handshake.open() if goes_along else b""))
            stream = await _exchange_hello(fast, handshake)
            if not goes_along:
                await _send(stream, handshake.open())
            handshake.receive_reply(await _receive_packet(stream))
        except trio.BrokenResourceError as exc:
            raise HandshakeError(f"{_broken(exc)}; {HINT}") from exc
        except _PeerLeft as exc:
            raise HandshakeError(f"{exc}; {HINT}") from exc.__cause__
        return _opened(stream, user, credentials, handshake, settings=settings)
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
    """Do the server's part.

    Arguments:
        user_key: how to find the key of a user; None for mode plain.
        peer_user: how to name the client in mode plain; None to let everybody in.
        admit: called with the user once that is authenticated, or named; returns why the client cannot stay
            nevertheless.
        place: the place of this handshake, which runs in its scope. The caller leaves it.
        log: logs how one of the application's functions failed.

    Raises:
        HandshakeError: or one of its subclasses; the client has been told what it may know.
    """
    handshake = ServerHandshake(
        sealed=user_key is not None, service=service, limits=_limits(settings), options=_options(settings)
    )
    credentials = stream_credentials(transport)
    fast = make_fast(transport)
    failures = _Failures(log)
    scope = place.scope
    began = trio.current_time()
    scope.deadline = began + settings.handshake_timeout
    try:
        with scope:
            stream = await _exchange_hello(fast, handshake)
            place.note_hello()
            handshake.receive_open(await _receive_packet(stream))
            place.note_open()
            # Counted from `open`: from hello, a client could let it pass first, and time the look-up.
            refuse_at = trio.current_time() + REFUSAL_DELAY
            if not await place.take_turn(began + MAX_WAIT_SHARE * settings.handshake_timeout):
                raise await _refuse(stream, TOO_LATE)
            keys = await _look_up_in_turn(fast, user_key, handshake.user, place, failures)
            try:
                accepted = handshake.accept(keys)
                name = handshake.user if peer_user is None else _name_peer(peer_user, credentials, failures)
            except AuthenticationError:
                place.note_failure()
                if handshake.sealed:  # whom the system names has nothing to guess
                    await trio.sleep_until(refuse_at)
                await _send_refusal(stream, "authentication", "authentication failed")
                raise
            refusal = admit(name or None)
            if refusal is not None:
                raise await _refuse(stream, refusal)
            await _send(stream, accepted)
            # Cancelled too late to be caught is cancelled nevertheless: nobody would end it later.
            if not scope.cancel_called:
                return _opened(stream, name or None, credentials, handshake, settings=settings)
    except trio.BrokenResourceError as exc:
        raise HandshakeError(_broken(exc)) from exc
    finally:
        failures.log()
    if place.is_displaced:
        raise Displaced("the handshake was ended to make room for others")
    if trio.current_time() < scope.deadline:
        raise ServerStopped("the server stopped during the handshake")
    raise _late(settings)


async def linger(transport: trio.abc.Stream) -> None:
    """Let a peer read what it was sent last, before the caller closes the transport.

    A socket that is closed with something unread resets the connection, and the peer's system then drops
    what the peer has not read yet. So say that nothing follows, and read and drop until the peer has closed
    its end, for a second and 8 KiB at most.
    """
    with trio.move_on_after(LINGER_TIME), suppress(trio.BrokenResourceError):
        if isinstance(transport, trio.abc.HalfCloseableStream):
            await transport.send_eof()
        left = LINGER_SIZE
        while left > 0 and (dropped := len(await transport.receive_some(left))):
            left -= dropped


async def _refuse(stream: FastStream, refusal: Refusal) -> ConnectionRefused:
    """Tell the client that it cannot stay, and return the exception to raise, which says why."""
    await _send_refusal(stream, refusal.code, refusal.message)
    return ConnectionRefused(refusal.reason, refusal.code)


async def _send_refusal(
    stream: FastStream,
    code: Literal["authentication", "busy", "stopping"],
    message: str,
) -> None:
    with suppress(trio.BrokenResourceError):
        await _send(stream, encode_refused(code, message))


def _broken(error: trio.BrokenResourceError) -> str:
    return f"the connection broke during the handshake: {describe_error(error)}"


async def _exchange_hello(transport: FastStream, handshake: ClientHandshake | ServerHandshake) -> FastStream:
    """Receive the other side's hello, answer it where we are the server, and enter the channel."""
    # A client's hello comes right after its dialling.
    hello = transport.receive_nowait(handshake.hello_size) if handshake.side == "server" else b""
    while len(hello) < handshake.hello_size:
        handshake.check_hello(hello)
        try:
            hello += await _receive(transport, handshake.hello_size - len(hello))
        except (_PeerLeft, trio.BrokenResourceError) as exc:
            # Where the system reports a reset, Trio says so in the cause; TLS that fails is another matter.
            if hello or handshake.side == "client" or not isinstance(exc.__cause__, ConnectionError | None):
                raise
            raise NothingCame(f"the client left before it had sent anything: {describe_error(exc)}") from exc
    handshake.receive_hello(hello)
    if handshake.side == "server":
        await _send(transport, handshake.hello)
    if not handshake.sealed:
        return transport
    keys = handshake.channel_keys().for_side(handshake.side)
    return SecretboxStream(transport, **keys, max_record_size=MAX_EARLY_RECORD_SIZE)


async def _send(stream: FastStream, packet: bytes) -> None:
    """Send a packet.

    Over a socket this is no checkpoint, and need not be one: a client goes on to receive, and a server's
    task is the library's own.
    """
    if not stream.can_send_nowait:
        await stream.send_all(packet)
    elif not stream.send_nowait(packet):
        await stream.send_all(b"")


async def _receive_packet(stream: FastStream) -> bytes:
    """Receive what must be exactly one packet: a record's worth, or, in the clear, by its length."""
    if isinstance(stream, SecretboxStream):
        return await _receive(stream, None)
    packet = stream.receive_nowait(LENGTH_SIZE)  # mostly it is here already
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


async def _receive(stream: FastStream, most: int | None) -> bytes:
    data = await stream.receive_some(most)
    if not data:
        raise _PeerLeft("the peer closed the connection during the handshake")
    return bytes(data)


def _check_still_there(transport: FastStream) -> None:
    """Do not look up a client that has left while it waited, as far as that can be told."""
    if transport.has_hung_up():
        raise _PeerLeft("the client left while it waited to be looked up")


@final
class _Failures:
    """Failures of the application's functions. They are logged when the client has been answered, because
    logging takes time, by which a client could tell who is known.
    """

    def __init__(self, log: LogFailure) -> None:
        self._log = log
        self._too_many = 0
        self._found: list[tuple[str, object, BaseException, BaseException]] = []

    def add(self, what: str, whom: object, exc: BaseException) -> None:
        """Take a failure, and raise what of it must go further, as `split_exception` tells."""
        error, rest = split_exception(exc)
        if error is not None:
            self._found.append((what, whom, error, exc))  # a group is split, so the two may differ
        if rest is not None:
            raise rest from rest.__cause__

    def note_too_many(self, keys: int) -> None:
        """There are more keys of a user than are tried."""
        self._too_many = keys

    def log(self) -> None:
        """Log them, and drop their tracebacks: an exception that is raised again and again, because it was
        made only once, would collect them, with all that the frames hold.
        """
        for what, whom, error, raised in self._found:
            self._log(f"{what}: {type(error).__name__}", "%s %r failed", what, whom, error=error)
            _drop_tracebacks(raised)
        self._found.clear()
        if self._too_many:
            text = "user_key found %d keys, and only the first %d are tried"
            self._log("too many keys", text, self._too_many, MAX_KEYS, error=None)


def _drop_tracebacks(error: BaseException) -> None:
    error.__traceback__ = None
    if isinstance(error, BaseExceptionGroup):
        for member in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            _drop_tracebacks(member)


async def _look_up_in_turn(
    transport: FastStream, user_key: UserKey | None, user: str | None, place: Place, failures: _Failures
) -> Sequence[Key]:
    """Use the turn that was taken, and end it."""
    try:
        _check_still_there(transport)
        return await _look_up(user_key, user, failures)
    finally:
        place.end_turn()


async def _look_up(user_key: UserKey | None, user: str | None, failures: _Failures) -> Sequence[Key]:
    """The keys a user may have. A failing look-up finds none, like that of an unknown user."""
    if user_key is None or user is None:
        return ()
    try:
        found = await call_user(user_key, user) if callable(user_key) else user_key.get(user)
        return _check_keys(found, failures)
    except BaseException as exc:  # noqa: BLE001  (what is not kept is raised on)
        failures.add("looking up the key of user", user, exc)
    return ()


def _name_peer(peer_user: PeerUser, credentials: PeerCredentials | None, failures: _Failures) -> str:
    """The user at the other end. A function that fails names nobody.

    Raises:
        AuthenticationError: there is no name.
    """
    if credentials is None:
        raise AuthenticationError("the system does not tell who the peer is, so peer_user was not asked")
    try:
        user = call_user_sync(peer_user, credentials)
        if user is not None:
            encode_user(user)
            return user
    except BaseException as exc:  # noqa: BLE001  (as above)
        failures.add("naming the peer", credentials, exc)
    raise AuthenticationError(f"peer_user has no name for {credentials}")


def _check_keys(found: object, failures: _Failures) -> Sequence[Key]:
    if found is None:
        return ()
    keys: list[Key] = []
    for key in list_keys(found):
        if not isinstance(key, Key):
            raise TypeError(f"user_key found {type(key).__name__}, not a Key")
        keys.append(key)
    if len(keys) > MAX_KEYS:
        failures.note_too_many(len(keys))
    return keys
