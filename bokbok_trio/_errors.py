"""The exceptions of bokbok_trio, one tree:

::

    BokbokError
     ├── AddressError            (a ValueError)
     ├── HandshakeError
     │    ├── AuthenticationError
     │    └── ConnectionRefused
     ├── ConnectionClosed        (a trio.ClosedResourceError)
     ├── ConnectionLost          (a trio.BrokenResourceError)
     ├── ProtocolError
     ├── MessageTooLarge
     ├── RemoteError
     └── RequestError

``TypeError``, ``ValueError``, `AddressError`, `MessageTooLarge` and `ConnectionClosed` say that this program
used the library wrongly. `HandshakeError`, `ConnectionLost` and `ProtocolError` say that the peer is gone, or
broke the rules. A handler raises `RequestError` to answer with an error; its asker gets `RemoteError`.
"""

import unicodedata
from typing import Final, final

import trio

MAX_CODE_SIZE: Final = 64
"""Bytes of an error code in UTF-8. A code is a word for programs to compare, not a text."""

MAX_ERROR_TEXT_SIZE: Final = 2048
"""Bytes of an error's message in UTF-8, on the wire. With the code and the packet's head it fits the smallest
``max_message_size``, so an error can always be sent."""

MAX_DETAILS_SIZE: Final = 2**14
"""Bytes of an error's details, which say more about the error. A result belongs into an answer."""

_INVISIBLE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that break, hide or reorder a line where it is shown."""


def escape(text: str) -> str:
    """Return the text of a peer as one line, with control, format and bidi characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _INVISIBLE
        else character
        for character in text
    )


class BokbokError(Exception):
    """The base class of all exceptions of bokbok_trio."""


@final
class AddressError(BokbokError, ValueError):
    """An address cannot be parsed, cannot be used here, or is in use."""


class HandshakeError(BokbokError):
    """The connection could not be opened: the peer is gone, does not speak bokbok, or broke the rules."""


@final
class AuthenticationError(HandshakeError):
    """One side could not prove that it has the user's key, or a server has no name for its peer.

    On a client: the server refused the user and key, or its `peer_user` refused this process; or the server
    did not prove that it has the key.
    """


@final
class ConnectionRefused(HandshakeError):  # noqa: N818  (the contract's name)
    """The server does not take this connection now.

    Attributes:
        message: the reason, for people.
        code: ``"busy"`` (the server has as many connections as it takes) or ``"stopping"``.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, code)
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


@final
class ConnectionClosed(BokbokError, trio.ClosedResourceError):  # noqa: N818  (the contract's name)
    """This side has closed the connection.

    Attributes:
        may_have_run: as for `ConnectionLost`.
    """

    def __init__(self, reason: str, may_have_run: bool = True) -> None:  # noqa: FBT001, FBT002  (pickles)
        super().__init__(reason, may_have_run)
        self.may_have_run = may_have_run

    def __str__(self) -> str:
        return str(self.args[0])


@final
class ConnectionLost(BokbokError, trio.BrokenResourceError):  # noqa: N818  (the contract's name)
    """The peer closed the connection, vanished, or broke the protocol.

    Attributes:
        reason: the reason, for people.
        may_have_run: whether a handler of the peer may have seen the request. If False, certainly none has,
            and it is safe to send the request again elsewhere.
    """

    def __init__(self, reason: str, may_have_run: bool = True) -> None:  # noqa: FBT001, FBT002  (pickles)
        super().__init__(reason, may_have_run)
        self.reason = reason
        self.may_have_run = may_have_run

    def __str__(self) -> str:
        return self.reason


@final
class ProtocolError(BokbokError):
    """The peer sent something that the protocol does not allow, which ends the connection."""


@final
class MessageTooLarge(BokbokError):  # noqa: N818  (the contract's name)
    """A message is larger than the two sides agreed on. Nothing of it was sent.

    Attributes:
        size: the encoded size of the message, in bytes.
        limit: the largest size that this connection allows, in bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(size, limit)
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"the message takes {self.size} bytes, and this connection allows {self.limit}"


@final
class RemoteError(BokbokError):
    """The other side answered the request with an error.

    ``str(error)`` escapes control characters, so a peer cannot forge a line of a log.

    A handler that sends a request to another peer passes an error on by
    ``raise RequestError(error.message, code=error.code, details=error.details) from error``.

    Attributes:
        message: the error for people, as the other side sent it.
        code: the error for programs, such as ``"handler-error"``, or the code of the handler's
            `RequestError`.
        details: the details of the handler's `RequestError`, at most 16 KiB; mostly empty.
    """

    def __init__(self, message: str, code: str, details: bytes = b"") -> None:
        super().__init__(message, code, details)
        self.message = message
        self.code = code
        self.details = details

    def __str__(self) -> str:
        return f"{escape(self.message)} [{escape(self.code)}]"


@final
class RequestError(BokbokError):
    """A handler raises this to answer its request with exactly this error.

    Arguments:
        message: the error for people. It is cut off after 2,048 bytes of UTF-8 when it is sent.
        code: the error for programs: 1 to 64 bytes of UTF-8. The code ``"closing"`` is reserved: it tells the
            asker that no handler saw the request.
        details: more for programs, at most 16 KiB. If they do not fit the size of messages that the two sides
            agreed on, the answer is sent without them, and a line is logged.

    Raises:
        TypeError: `message` or `code` is not a ``str``, or `details` is not ``bytes``.
        ValueError: the code is empty, too long, or ``"closing"``; or the details are too long.
    """

    def __init__(self, message: str, code: str = "request-error", details: bytes = b"") -> None:
        if not isinstance(message, str) or not isinstance(code, str):
            raise TypeError("a RequestError takes a message and a code, both str")
        if not isinstance(details, bytes):
            raise TypeError(f"the details of a RequestError are bytes, not {type(details).__name__}")
        if not 1 <= len(code.encode()) <= MAX_CODE_SIZE:
            raise ValueError(f"a code is 1 to {MAX_CODE_SIZE} bytes of UTF-8, not {code!r}")
        if code == "closing":
            raise ValueError("the code 'closing' is the connection's own; choose another one")
        if len(details) > MAX_DETAILS_SIZE:
            raise ValueError(f"details are at most {MAX_DETAILS_SIZE} bytes, not {len(details)}")
        super().__init__(message, code, details)
        self._message = message
        self._code = code
        self._details = details

    @property
    def message(self) -> str:
        """The error, for people."""
        return self._message

    @property
    def code(self) -> str:
        """The error, for programs."""
        return self._code

    @property
    def details(self) -> bytes:
        """More about the error, for programs."""
        return self._details

    def __str__(self) -> str:
        return f"{escape(self.message)} [{escape(self.code)}]"
