"""The pre-shared keys of users, and the names of users and services.

A key is 32 bytes that only the user and the server know. It is the key of two hashes, one in the handshake
and one for its fingerprint, and of nothing else; see ``docs/protocol.rst`` and ``docs/keys.rst``.

No secret may appear in the report of an error: neither in the exception, nor in the local variables of the
frames of its traceback. See `without_secrets`.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import secrets
import unicodedata
from collections.abc import Callable
from typing import Final, NoReturn, ParamSpec, TypeVar, final

import trio
from nacl.bindings import crypto_pwhash_alg, crypto_pwhash_ALG_ARGON2ID13
from nacl.exceptions import RuntimeError as SodiumError

from . import _bech32
from ._private_files import StrPath, create_private, read_private

_P = ParamSpec("_P")
_T = TypeVar("_T")

KEY_SIZE: Final = 32
"""Bytes of a key."""

KEY_PREFIX: Final = "bokbok-key-"
"""The text of a key begins with this and a ``1``, so that scanners can find leaked keys."""

KEY_TEXT_SIZE: Final = 70
"""Characters of the text of a key."""

MAX_KEY_FILE_SIZE: Final = 2**16
"""Bytes of a key file with its comments. A larger file is certainly something else."""

MAX_KEYS: Final = 16
"""Keys of one user that a server tries. For a user with fewer keys, or for an unknown user, it tries as many,
so that the time does not tell how many keys there are."""

MAX_NAME_SIZE: Final = 255
"""Bytes of the name of a user or a service in UTF-8. The name of a user must fit a packet of fixed size, and
the size of the name of a service must fit one byte."""

ARGON2ID_PASSES: Final = 3
ARGON2ID_MEMORY: Final = 256 * 2**20
"""The cost of a guess at a passphrase: passes over so many bytes of memory, in one lane. It is libsodium's
MODERATE, and fixed, because both sides must derive the same key."""


def without_secrets(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a function whose arguments or variables are secrets: its exceptions leave it without
    traceback, cause and context.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except Exception as exc:  # noqa: BLE001  (raised again below)
            error = exc
        del args, kwargs
        error.__context__ = error.__cause__ = None
        try:
            raise error.with_traceback(None)
        finally:
            del error  # the traceback refers to this frame, and both would keep each other alive

    return call


@final
class Key:
    """The pre-shared key of one user.

    Arguments:
        raw: exactly 32 bytes. Use `generate` to make a new key.

    Raises:
        TypeError: `raw` is not bytes.
        ValueError: `raw` is not 32 bytes long.

    Keys are equal if their bytes are equal; the comparison takes constant time. Neither ``repr`` nor ``str``
    shows them. A key cannot be changed, and a copy is the same object. Keys cannot be pickled, so none gets
    into another process or into a cache by accident.
    """

    __slots__ = ("_raw",)
    _raw: bytes

    def __new__(cls, raw: bytes) -> Key:
        try:
            checked = _check_raw(raw)
        finally:
            del raw
        self = super().__new__(cls)
        object.__setattr__(self, "_raw", checked)
        return self

    @classmethod
    def generate(cls) -> Key:
        """Make a new key from the system's source of randomness."""
        return cls(secrets.token_bytes(KEY_SIZE))

    @classmethod
    @without_secrets
    def from_text(cls, text: str) -> Key:
        """Return the key of a text that `to_text` made. The text may be in upper case, with white space
        around it.

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` is not the text of a key, or is mistyped. The message says how, and does not
                show it.
        """
        if not isinstance(text, str):
            raise TypeError(f"the text of a key is a str, not {type(text).__name__}")
        text = text.strip()
        try:
            if text.lower().startswith(f"{KEY_PREFIX}1") and len(text) != KEY_TEXT_SIZE:
                raise ValueError(f"it has {len(text)} characters, and not {KEY_TEXT_SIZE}")
            return cls(_bech32.to_bytes(_bech32.decode(KEY_PREFIX, text)))
        except ValueError as exc:
            raise ValueError(f"this is not the text of a key: {exc}") from None

    @classmethod
    @without_secrets
    def from_hex(cls, text: str) -> Key:
        """Return the key of 64 hexadecimal digits, such as ``openssl rand -hex 32`` prints. They have no
        checksum.

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` is not 64 hexadecimal digits. The message does not show it.
        """
        if not isinstance(text, str):
            raise TypeError(f"a key in hex is a str, not {type(text).__name__}")
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        if len(raw) != KEY_SIZE:
            raise ValueError(f"a key in hex is {2 * KEY_SIZE} hexadecimal digits")
        return cls(raw)

    @classmethod
    @without_secrets
    def load(cls, path: StrPath) -> Key:
        """Read a key from a file that only its owner may read; see ``docs/keys.rst``.

        The file contains the text of one key. Empty lines, and lines that begin with ``#``, are ignored.

        Raises:
            PermissionError: group or others may read or change the file (correct it by ``chmod 600``), or
                this process may not read it.
            OSError: the file does not exist, or is not a regular file.
            ValueError: the file contains no key, several, or a mistyped one. The message does not show it.
        """
        content, _ = read_private(path, MAX_KEY_FILE_SIZE)
        texts = [line for line in decode_lines(path, content) if not is_comment(line)]
        if len(texts) != 1:
            raise ValueError(f"{os.fspath(path)} has {len(texts)} lines with a key, instead of one")
        try:
            return cls.from_text(texts[0])
        except ValueError as exc:
            raise ValueError(f"{os.fspath(path)}: {exc}") from None

    @without_secrets
    def save(self, path: StrPath) -> None:
        """Write the key's text to a new file with mode 0600, and sync the file to the disk.

        Raises:
            FileExistsError: the path exists already. It is never overwritten.
            OSError: the file cannot be written. Then it does not exist.
        """
        create_private(path, f"{self.to_text()}\n".encode())

    def to_text(self) -> str:
        """Return the key as text with a checksum: ``bokbok-key-1`` and 58 characters. Show it to nobody."""
        return _bech32.encode(KEY_PREFIX, _bech32.to_values(self._raw))

    @property
    def raw(self) -> bytes:
        """The 32 bytes. Store them only where nobody but the owner can read them."""
        return self._raw

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell this key from others. They are safe to show: nobody can compute the
        key from them.

        This does not hold for the key of a weak passphrase: the fingerprint lets anybody test guesses at it.
        """
        return hashlib.blake2b(b"", digest_size=8, key=self._raw, person=b"bokbok1 key id").hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> int:
        return hash((Key, self._raw))

    def __repr__(self) -> str:
        return "<Key>"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a key cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a key cannot be changed")

    def __copy__(self) -> Key:
        return self

    def __deepcopy__(self, memo: object) -> Key:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a key is not pickled: pass the path of its file, and load it there")


@without_secrets
def _check_raw(raw: bytes) -> bytes:
    if not isinstance(raw, bytes):
        raise TypeError(f"a key is made of bytes, not {type(raw).__name__}")
    if len(raw) != KEY_SIZE:
        raise ValueError(f"a key is {KEY_SIZE} bytes long, and not {len(raw)}")
    return raw


def decode_lines(path: StrPath, content: bytes) -> list[str]:
    """Return the lines of a file of keys, without the byte order mark that some editors write.

    Raises:
        ValueError: the file is not text in UTF-8.
    """
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{os.fspath(path)} is not text in UTF-8") from None


def is_comment(line: str) -> bool:
    """Return whether a line of such a file is empty or a comment."""
    return line.strip()[:1] in {"", "#"}


def encode_user(user: str) -> bytes:
    """Check the name of a user, and encode it.

    Raises:
        TypeError: the name is not a str.
        ValueError: the name is not 1 to 255 bytes of UTF-8 in normal form C without control characters.
    """
    if not isinstance(user, str):
        raise TypeError(f"a user name is a str, not {type(user).__name__}")
    encoded = user.encode()
    if not 1 <= len(encoded) <= MAX_NAME_SIZE:
        raise ValueError(f"a user name is 1 to {MAX_NAME_SIZE} bytes of UTF-8, and not {len(encoded)}")
    if user.isascii() and user.isprintable():
        return encoded  # printable ASCII has only one form, and no control characters
    if unicodedata.normalize("NFC", user) != user:
        raise ValueError(f"the user name {user!r} is not in normal form C")
    if any(unicodedata.category(character) == "Cc" for character in user):
        raise ValueError(f"the user name {user!r} has a control character")
    return encoded


def encode_service(service: str) -> bytes:
    """Check the name of a service, and encode it.

    Raises:
        TypeError: the name is not a str.
        ValueError: the name is not 0 to 255 bytes of UTF-8 in normal form C. It is never sent, so another
            form would look like a wrong key.
    """
    if not isinstance(service, str):
        raise TypeError(f"a service is a str, not {type(service).__name__}")
    encoded = service.encode()
    if len(encoded) > MAX_NAME_SIZE:
        raise ValueError(f"a service is at most {MAX_NAME_SIZE} bytes of UTF-8, and not {len(encoded)}")
    if unicodedata.normalize("NFC", service) != service:
        raise ValueError(f"the service {service!r} is not in normal form C")
    return encoded


async def passphrase_to_key(passphrase: str, user: str) -> Key:
    """Derive a user's key from a passphrase, with Argon2id, in a worker thread.

    Prefer `Key.generate`: if a client with a weak passphrase talks to a fake server, the server can test
    guesses at it, as fast as its memory allows. Derive the key once and keep it: this takes 256 MiB of memory
    and about a second.

    If the call is cancelled, it ends at once. The thread runs to its end, and its result is dropped.

    Arguments:
        passphrase: text, not empty. It is converted to normal form C, because keyboards differ.
        user: the user's name, 1 to 255 bytes of UTF-8. It makes the salt:
            ``blake2b(user, 16 bytes, "bokbok1 argon2id")``.

    Raises:
        TypeError: an argument is not a str.
        ValueError: the passphrase is empty, or the user name is invalid.
        MemoryError: the system does not give so much memory.

    Source: RFC 9106, as libsodium's ``crypto_pwhash`` (version 1.3, one lane).
    """
    try:
        derive = _prepare(passphrase, user)
    finally:
        del passphrase
    return Key(await trio.to_thread.run_sync(derive, abandon_on_cancel=True))


@without_secrets
def _prepare(passphrase: str, user: str) -> Callable[[], bytes]:
    if not isinstance(passphrase, str):
        raise TypeError(f"a passphrase is a str, not {type(passphrase).__name__}")
    if not passphrase:
        raise ValueError("a passphrase must not be empty")
    # Check this before encode(), whose error would show the passphrase.
    if any(unicodedata.category(character) == "Cs" for character in passphrase):
        raise ValueError("a passphrase must be text that UTF-8 can encode")
    secret = unicodedata.normalize("NFC", passphrase).encode()
    salt = hashlib.blake2b(encode_user(user), digest_size=16, person=b"bokbok1 argon2id").digest()

    @without_secrets
    def derive() -> bytes:
        try:
            return crypto_pwhash_alg(
                KEY_SIZE, secret, salt, ARGON2ID_PASSES, ARGON2ID_MEMORY, crypto_pwhash_ALG_ARGON2ID13
            )
        except SodiumError:
            size = ARGON2ID_MEMORY // 2**20
            raise MemoryError(
                f"deriving a key takes {size} MiB of memory, which the system did not give"
            ) from None

    return derive
