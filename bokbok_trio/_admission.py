"""`Admission`: shakes hands with the clients of a server, and admits or refuses them.

A client gets a place for its handshake (see `_places`) when it is accepted, and keeps it until the handshake
has ended. It is admitted in the handshake, once it is authenticated. From then on it counts, until
`Admission.leave` is called for it. A refused client has no place any more, but may stay a moment to read why.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from functools import partial
from typing import Final, final

import trio

from ._addresses import Address
from ._errors import ConnectionRefused, HandshakeError
from ._instruments import watch_handshake
from ._places import Place, Places, find_source
from ._settings import Settings
from ._stream.establish import (
    Displaced,
    Established,
    Refusal,
    ServerStopped,
    establish_as_server,
    linger,
)
from ._stream.handshake_io import NothingCame
from ._throttle import Throttle
from ._trio_util import describe_error, isolate_failures
from ._types import PeerUser, UserKey

SPARE_DESCRIPTORS: Final = 64
"""Open files that a server leaves to the rest of the program, if its connections could use all."""

HANDSHAKE_SHARE: Final = 4
"""Unfinished handshakes may use a quarter of the open files that the process may have."""

LINGER_SHARE: Final = 16
"""Refused clients that read why may use a sixteenth of them."""

logger = logging.getLogger("bokbok_trio")


def fit_descriptors(settings: Settings) -> tuple[int, int, int]:
    """Return how many connections, unfinished handshakes and refused clients a server may have at once.

    These are the numbers of the settings, or less if the process may have few open files.
    """
    wanted = settings.max_connections, settings.max_handshakes, settings.max_handshakes
    if sys.platform == "win32":
        return wanted
    import resource  # noqa: PLC0415  (Windows has none)

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return wanted
    handshakes = max(1, min(settings.max_handshakes, files // HANDSHAKE_SHARE))
    lingering = max(1, min(settings.max_handshakes, files // LINGER_SHARE))
    connections = max(1, files - SPARE_DESCRIPTORS - handshakes - lingering)
    return min(settings.max_connections, connections), handshakes, lingering


@final
class Admission:
    """Shakes hands with the clients of a server, admits them or refuses them, and counts them.

    Arguments:
        name: the server's, for log lines.
        user_key, peer_user, service, settings: as for `serve`.
        throttle: gets the log lines that strangers can cause.

    Attributes:
        admitted: number of clients that were admitted and have not left.
        max_connections: how many clients may be admitted at once.
        max_handshakes: how many handshakes may go on at once.
        places: the places of clients in their handshake.
        is_stopping: whether the server is stopping, so that nobody is admitted any more.
        idle: set when it is stopping, and no client is admitted or about to be told that it is stopping.
    """

    def __init__(
        self,
        name: str,
        *,
        user_key: UserKey | None,
        peer_user: PeerUser | None,
        service: str,
        settings: Settings,
        throttle: Throttle,
    ) -> None:
        self._name = name
        self._user_key = user_key
        self._peer_user = peer_user
        self._service = service
        self._settings = settings
        self._throttle = throttle
        self.admitted = 0
        self._of_user: Counter[str | None] = Counter()
        self.max_connections, max_handshakes, self._max_lingering = fit_descriptors(settings)
        self.places = Places(max_handshakes, settings.max_lookups)
        self.max_handshakes = max_handshakes
        self._lingering = 0
        self.is_stopping = False
        self.idle = trio.Event()
        if self.max_connections < settings.max_connections:
            logger.info(
                "%s: takes %d connections at once, and not %d, as this process may not have more open files "
                "(raise that limit by ulimit -n)",
                name,
                self.max_connections,
                settings.max_connections,
            )

    def stop(self, *, at_once: bool = False) -> None:
        """Admit nobody any more.

        Arguments:
            at_once: end all handshakes. Otherwise a client that has sent a hello goes on, to be told that the
                server is stopping.
        """
        self.is_stopping = True
        self.places.cancel_all(silent_only=not at_once)
        self._note_idle()

    # ---- the handshake ----

    def take_place(self, address: Address | None) -> Place | None:
        """Return a place for the handshake of a client that was accepted; None: there is none."""
        return self.places.take(find_source(address))

    @trio.lowlevel.enable_ki_protection
    async def turn_away(self, stream: trio.abc.Stream, address: Address | None) -> None:
        """Close the stream of a client that got no place."""
        with isolate_failures(partial(self.log_failure, address)):
            try:
                with watch_handshake(self._settings._instruments, "server", address):
                    raise Displaced("there was no place for its handshake")
            finally:
                await trio.aclose_forcefully(stream)

    async def shake_hands(
        self, stream: trio.abc.Stream, address: Address | None, place: Place
    ) -> Established | None:
        """Shake hands with a client. It leaves its place at the end.

        Returns:
            The result, if the client was admitted: it counts until `leave` is called. None: the handshake
            failed, which was logged, and the client had time to read why.
        """
        admitted: list[str | None] = []

        def admit(user: str | None) -> Refusal | None:
            refusal = self.find_refusal(user)
            if refusal is None:
                self.admitted += 1
                self._of_user[user] += 1
                admitted.append(user)
            return refusal

        try:
            with watch_handshake(self._settings._instruments, "server", address):
                return await establish_as_server(
                    stream,
                    user_key=self._user_key,
                    peer_user=self._peer_user,
                    service=self._service,
                    settings=self._settings,
                    admit=admit,
                    place=place,
                    log=self._log_of_users,
                )
        except BaseException as exc:
            for user in admitted:
                self.leave(user)
            if not isinstance(exc, HandshakeError):
                raise
            self.log_failure(address, exc)
        finally:
            place.leave()
            self._note_idle()
        if not place.scope.cancel_called:
            await self._linger(stream)
        return None

    async def _linger(self, stream: trio.abc.Stream) -> None:
        """Give a client time to read why it was refused, unless too many others have it already."""
        if self._lingering < self._max_lingering:
            self._lingering += 1
            try:
                await linger(stream)
            finally:
                self._lingering -= 1

    # ---- the number of clients ----

    def find_refusal(self, user: str | None) -> Refusal | None:
        """Return why one more client of a user is refused; None: it may be admitted."""
        if self.is_stopping:
            return Refusal("stopping", "the server is stopping", "the server is stopping")
        if self.admitted >= self.max_connections:
            return Refusal(
                "busy",
                "the server has as many connections as it takes (see its max_connections); try again later",
                f"there are {self.max_connections} connections already",
            )
        most = self._settings.max_connections_per_user
        if most is not None and user is not None and self._of_user[user] >= most:
            return Refusal(
                "busy",
                f"this user has {most} connections, as many as it may (see max_connections_per_user)",
                f"user {user!r} has {most} connections already (max_connections_per_user)",
            )
        return None

    def leave(self, user: str | None) -> None:
        """Count a client of this user no more."""
        self.admitted -= 1
        self._of_user[user] -= 1
        if not self._of_user[user]:
            del self._of_user[user]
        self._note_idle()

    def _note_idle(self) -> None:
        if self.is_stopping and not self.admitted and not self.places.has_greeted:
            self.idle.set()

    # ---- the log ----

    def log_failure(self, address: Address | None, error: BaseException) -> None:
        """Log why there is no connection with a client, or why its connection failed."""
        if isinstance(error, NothingCame):
            logger.debug("%s: no connection with %s: %s", self._name, address, error)
        elif isinstance(error, HandshakeError):
            # Lines of one kind are throttled, and those about strangers must not hide those about users.
            kind, level = type(error).__name__, logging.WARNING
            if isinstance(error, ServerStopped) or (
                isinstance(error, ConnectionRefused) and error.code == "stopping"
            ):
                kind, level = "stopping", logging.INFO  # the application asked for it
            self._throttle.log(
                kind,
                level,
                "%s: no connection with %s: %s",
                self._name,
                address,
                describe_error(error),
            )
        else:
            logger.error("%s: the connection with %s failed", self._name, address, exc_info=error)

    def _log_of_users(self, kind: str, message: str, *args: object, error: BaseException | None) -> None:
        """Log an error of the application's `user_key` or `peer_user`, which strangers can cause."""
        self._throttle.log(kind, logging.ERROR, message, *args, error=error)
