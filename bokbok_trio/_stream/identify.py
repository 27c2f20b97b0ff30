"""The identity of a client: the application looks up the keys of a user, or names the peer of a plain socket.

The application's functions may fail. Then the client is refused like an unknown user, and the failure is
logged, but only after the client has been answered. Logging takes time, and that time would tell the client
which users exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

from .._arguments import list_keys
from .._errors import AuthenticationError
from .._keys import MAX_KEYS, Key, encode_user
from .._places import Place
from .._sockets import PeerCredentials
from .._trio_util import call_user, call_user_sync, forget_traceback, split_exception
from .._types import PeerUser, UserKey
from .fast import FastStream
from .handshake_io import PeerLeft


class LogFailure(Protocol):
    """Logs an error of the application: its kind, a message, the arguments of the message, and the error."""

    def __call__(self, kind: str, message: str, *args: object, error: BaseException | None) -> None: ...


@final
class Failures:
    """Failures of the application's functions, until they are logged."""

    def __init__(self, log: LogFailure) -> None:
        self._log = log
        self._too_many = 0
        self._found: list[tuple[str, object, BaseException, BaseException]] = []

    def add(self, what: str, whom: object, exc: BaseException) -> None:
        """Keep a failure for the log, and raise the part of it that `split_exception` says must be raised."""
        error, rest = split_exception(exc)
        if error is not None:
            self._found.append((what, whom, error, exc))  # a group is split, so the two may differ
        if rest is not None:
            try:
                raise rest from rest.__cause__
            finally:
                del exc, error, rest  # the traceback refers to this frame, and would keep the handshake alive

    def note_too_many(self, keys: int) -> None:
        """Note that a user has so many keys that some are not tried."""
        self._too_many = keys

    def log(self) -> None:
        """Log the failures, and drop their tracebacks.

        An application may raise the same exception object again and again. The object would collect a
        traceback each time, with everything that the frames refer to.
        """
        for what, whom, error, raised in self._found:
            self._log(f"{what}: {type(error).__name__}", "%s %r failed", what, whom, error=error)
            forget_traceback(raised)
        self._found.clear()
        if self._too_many:
            text = "user_key found %d keys, and only the first %d are tried"
            self._log("too many keys", text, self._too_many, MAX_KEYS, error=None)


async def look_up_in_turn(
    transport: FastStream, user_key: UserKey | None, user: str | None, place: Place, failures: Failures
) -> Sequence[Key]:
    """Look up the keys that a user may have, in the turn that the caller took, and end the turn."""
    try:
        if transport.has_hung_up():  # do not work for a client that is gone
            raise PeerLeft("the client left while it waited to be looked up")
        return await _look_up(user_key, user, failures)
    finally:
        place.end_turn()


async def _look_up(user_key: UserKey | None, user: str | None, failures: Failures) -> Sequence[Key]:
    """Look up the keys that a user may have. A look-up that fails finds none, as for an unknown user."""
    if user_key is None or user is None:
        return ()
    try:
        found = await call_user(user_key, user) if callable(user_key) else user_key.get(user)
        return _check_keys(found, failures)
    except BaseException as exc:  # noqa: BLE001  (`add` raises it on if it must go further)
        failures.add("looking up the key of user", user, exc)
    return ()


def _check_keys(found: object, failures: Failures) -> Sequence[Key]:
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


def name_peer(peer_user: PeerUser, credentials: PeerCredentials | None, failures: Failures) -> str:
    """Return the name of the user at the other end. If `peer_user` fails, there is no name.

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
