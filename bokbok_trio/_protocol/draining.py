"""How both sides stop taking new requests, before a connection is closed.

A side that *drains* says so with `bye`: it takes no new request of depth 0. The other side answers `bye-ok`
after its last such request. Requests in flight go on, with all requests that are nested in them. Either side
may drain, or both.
"""

from __future__ import annotations

from typing import final

from .._errors import ProtocolError


@final
class Draining:
    """The `bye` of either side, and the answers to them.

    Attributes:
        awaits_bye_ok: whether this side has said `bye`, and the peer has not answered it.
        peer_is_done: whether the peer has answered this side's `bye`, so that it makes no more requests of
            depth 0.
        peer_drains: whether the peer has said `bye`.
        owes_bye_ok: whether the peer has said `bye`, and this side has not answered it.
    """

    __slots__ = ("awaits_bye_ok", "owes_bye_ok", "peer_drains", "peer_is_done")

    def __init__(self) -> None:
        self.awaits_bye_ok = False
        self.peer_is_done = False
        self.peer_drains = False
        self.owes_bye_ok = False

    def receive_bye(self) -> None:
        """Note that the peer sent `bye`.

        Raises:
            ProtocolError: the peer has sent it before.
        """
        if self.peer_drains:
            raise ProtocolError("`bye` sent twice")
        self.peer_drains = True
        self.owes_bye_ok = True

    def receive_bye_ok(self) -> None:
        """Note that the peer sent `bye-ok`.

        Raises:
            ProtocolError: this side sent no `bye`, or it was answered before.
        """
        if not self.awaits_bye_ok:
            raise ProtocolError("`bye-ok` without `bye`")
        self.awaits_bye_ok = False
        self.peer_is_done = True
