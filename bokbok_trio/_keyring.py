"""`Keyring`: a text file of users and their keys, which is read again after each change.

A line is a user's name, white space, and the text of a key. A user with several lines has several keys. Empty
lines, and lines that begin with ``#``, are comments. A name that begins with ``#`` or ``"``, or begins or
ends with white space, is written as a string of JSON.

Theory
======

A look-up asks the system for the file's status, and uses the keys that were read before if the status is
unchanged. This alone would miss a second change within one tick of the file system's clock. So a file that
has just changed is read at each look-up, and compared, until it has rested for `SETTLE_TIME`. A file that
cannot be read, or is broken, changes nothing: one line is logged, and the keys that were read before stay in
force.

A writer locks the file, reads it, and puts a new one in its place. While it waited for the lock, another
writer may have replaced the file. So it checks, once it has the lock, that the file is still the one at the
path.

A line that was read before is not decoded again, because decoding takes most of the time that reading takes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, ItemsView, Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from typing import Final, NamedTuple, final

from ._keys import KEY_PREFIX, MAX_KEYS, Key, decode_lines, encode_user, is_comment, without_secrets
from ._private_files import StrPath, create_private, read_private, replace_private

MAX_KEYRING_SIZE: Final = 2**24
"""Bytes of the file: enough for more than 100,000 users. For so many, a database is the better place."""

SETTLE_TIME: Final = 2.0
"""Seconds after which a further change surely shows in a file's status: the clocks of file systems tick every
few milliseconds to 2 seconds."""

LOCK_TIMEOUT: Final = 10.0
"""Seconds that a writer waits for the lock, while others write."""

_LOCK_PAUSE: Final = 0.01
_HEADER: Final = (
    b"# Users of bokbok_trio, a key a line: the user's name, a space, the key. See docs/keys.rst.\n"
)

logger = logging.getLogger("bokbok_trio")


@final
class _Entry(NamedTuple):
    """The content of a line."""

    user: str
    key: Key


@final
class _Table(NamedTuple):
    """The content of a file.

    Attributes:
        entries: the content of each line, by the line.
        users: the keys of each user, in the order of the lines.
    """

    entries: Mapping[str, _Entry]
    users: Mapping[str, Sequence[Key]]


def _parse(path: str, content: bytes, known: Mapping[str, _Entry]) -> _Table:
    """Parse the content of a file. Lines in `known` are not decoded again.

    Raises:
        ValueError: a line is wrong. The message has its number and does not show it, because it may contain a
            key.
    """
    entries: dict[str, _Entry] = {}
    users: dict[str, list[Key]] = {}
    for number, line in enumerate(decode_lines(path, content), 1):
        if is_comment(line):
            continue
        try:
            entry = entries[line] = known.get(line) or _parse_line(line)
            keys = users.setdefault(entry.user, [])
            if entry.key not in keys:
                keys.append(entry.key)
            if len(keys) > MAX_KEYS:
                raise ValueError(f"user {entry.user!r} has more than {MAX_KEYS} keys")
        except ValueError as exc:
            raise ValueError(f"{path}, line {number}: {exc}") from None
    return _Table(entries, {user: tuple(keys) for user, keys in users.items()})


def _parse_line(line: str) -> _Entry:
    *names, text = line.strip().rsplit(None, 1)
    key = Key.from_text(text)
    if not names:
        raise ValueError("there is no user's name before the key")
    [user] = names
    if user.startswith('"'):
        try:
            user = json.loads(user)
        except ValueError:
            raise ValueError(
                "the user's name begins with a quotation mark and is no string of JSON"
            ) from None
    _check_user(user)
    return _Entry(user, key)


def _check_user(user: str) -> None:
    if isinstance(user, str) and f"{KEY_PREFIX}1" in user.lower():
        raise ValueError("there is a key in the user's name")
    encode_user(user)  # last, because its errors show the name


def _format_line(user: str, key: Key) -> str:
    is_plain = user.isprintable() and user == user.strip() and user[0] not in {"#", '"'}
    return f"{user if is_plain else json.dumps(user)} {key.to_text()}\n"


@contextmanager
def _locked(path: str) -> Generator[None]:
    """Lock a file against other writers.

    Raises:
        TimeoutError: other processes held the lock for `LOCK_TIMEOUT`.
    """
    import fcntl  # noqa: PLC0415  (not on Windows)

    give_up_at = time.monotonic() + LOCK_TIMEOUT
    while True:
        fd = os.open(path, os.O_RDWR)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up_at:
                        raise TimeoutError(
                            errno.ETIMEDOUT, f"another process has had it locked for {LOCK_TIMEOUT:g} s", path
                        ) from None
                time.sleep(_LOCK_PAUSE)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                yield
                return
        finally:
            os.close(fd)


@final
class Keyring(Mapping[str, Sequence[Key]]):
    """A mapping from the users of a text file to the keys of each. A server takes it as ``user_key``.

    ::

        keyring = Keyring.load("users.keys")
        async with open_server("localhost:12345", handler, user_key=keyring) as server:
            ...

    Make one by `load` or `create`. ``docs/keys.rst`` describes the file, which only its owner may read. After
    a change, the next look-up reads the file again. If the new version is broken, or cannot be read, an error
    is logged, and the keys that were read before stay in force. Look-ups take constant time. Any thread may
    use a keyring.
    """

    __slots__ = ("_content", "_lock", "_path", "_problem", "_stamp", "_table")

    @without_secrets
    def __init__(self, path: StrPath) -> None:
        self._path = os.path.abspath(path)
        self._lock = threading.Lock()  # held while the file is read again
        self._problem: str | None = None  # the last one that was logged
        self._stamp = self._look()
        self._content, _ = read_private(self._path, MAX_KEYRING_SIZE)  # good or bad: it is not parsed again
        self._table = _parse(self._path, self._content, {})

    @classmethod
    def load(cls, path: StrPath) -> Keyring:
        """Read a file of users and keys.

        Raises:
            PermissionError: group or others may read or change the file (correct it by ``chmod 600``), or
                this process may not read it.
            OSError: the file does not exist, or is not a regular file.
            ValueError: a line is wrong, or the file is larger than 16 MiB. The message has the number of the
                line, and does not show the line.
        """
        return cls(path)

    @classmethod
    def create(cls, path: StrPath) -> Keyring:
        """Make a new file without users, which only its owner may read.

        Raises:
            FileExistsError: the path exists already.
            OSError: the file cannot be written.
        """
        create_private(path, _HEADER)
        return cls(path)

    def add(self, user: str, key: Key) -> None:
        """Append a key of a user to the file, and sync the file to the disk.

        The file is replaced in one step, so readers see the old file or the new one. Several processes may
        add and remove keys at the same time. A key that the user has already is not added again. The call
        blocks on the disk and on other writers: in a Trio program, call it by `trio.to_thread.run_sync`.

        Arguments:
            user: the user's name, 1 to 255 bytes of UTF-8.
            key: the key.

        Raises:
            TypeError: `user` is not a str, or `key` is not a `Key`.
            ValueError: the name is invalid, or looks like a key; the user has 16 keys already; or the file is
                broken.
            TimeoutError: other processes have held the lock on the file for 10 seconds.
            OSError: the file cannot be read or written. Then it is unchanged.
        """
        _check_user(user)
        if not isinstance(key, Key):
            raise TypeError(f"key must be a Key, not {type(key).__name__}")

        def edit(content: bytes, table: _Table) -> bytes:
            if key in table.users.get(user, ()):
                return content
            end = b"" if content.endswith(b"\n") or not content else b"\n"
            return content + end + _format_line(user, key).encode()

        self._change(edit)

    @without_secrets
    def remove(self, user: str, key: Key | str | None = None) -> None:
        """Remove all keys of a user from the file, or one of them. Other lines and comments stay. See `add`.

        Open connections stay open: to close those of a key, see `Connection.key_fingerprint`.

        Arguments:
            user: the user's name.
            key: the key, or its fingerprint; None for all keys of the user.

        Raises:
            KeyError: the file does not have the user.
            ValueError: the user does not have the key, or the file is broken.
            TimeoutError, OSError: as for `add`.
        """

        def edit(content: bytes, table: _Table) -> bytes:
            if user not in table.users:
                raise KeyError(user)
            kept: list[str] = []
            lines = decode_lines(self._path, content)
            for line in lines:
                entry = table.entries.get(line)
                if entry is None or entry.user != user or key not in {None, entry.key, entry.key.fingerprint}:
                    kept.append(line)
            if len(kept) == len(lines):
                raise ValueError(f"user {user!r} has no such key")
            return "\n".join(kept).encode()

        self._change(edit)

    @without_secrets
    def _change(self, edit: Callable[[bytes, _Table], bytes]) -> None:
        path = os.path.realpath(self._path)  # a symbolic link stays one
        with _locked(path):
            content, status = read_private(path, MAX_KEYRING_SIZE)
            table = _parse(path, content, self._table.entries)
            edited = edit(content, table)
            if len(edited) > MAX_KEYRING_SIZE:
                raise ValueError(f"{path} would have more than {MAX_KEYRING_SIZE} bytes")
            _parse(path, edited, table.entries)
            if edited != content:
                replace_private(path, edited, status)

    # ---- the mapping ----

    def __getitem__(self, user: str) -> Sequence[Key]:
        return self._users()[user]

    def __iter__(self) -> Iterator[str]:
        return iter(self._users())

    def __len__(self) -> int:
        return len(self._users())

    def items(self) -> ItemsView[str, Sequence[Key]]:
        """Return all users with their keys, of one version of the file."""
        return self._users().items()

    def values(self) -> ValuesView[Sequence[Key]]:
        """Return the keys of each user, of one version of the file."""
        return self._users().values()

    def __repr__(self) -> str:
        return f"<Keyring {self._path!r} with {len(self._table.users)} users>"

    # ---- the file ----

    def _users(self) -> Mapping[str, Sequence[Key]]:
        """Return the users with their keys, as the file has them now."""
        stamp = self._look()
        if stamp is None or stamp != self._stamp:
            with self._lock:
                stamp = self._look()  # before reading: the next look-up must see a change in between
                self._read_again()
                self._stamp = stamp
        return self._table.users

    def _look(self) -> tuple[int, ...] | None:
        """Return a stamp that differs after each change of the file.

        None: there is no such stamp, because the system tells nothing of the file, or the file changed so
        recently that a further change may not show.
        """
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        if abs(time.time() - status.st_ctime) < SETTLE_TIME:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _read_again(self) -> None:
        try:
            content, _ = read_private(self._path, MAX_KEYRING_SIZE)
            is_new, self._content = content != self._content, content
            if is_new:
                self._table = _parse(self._path, content, self._table.entries)
                logger.info("%s has changed and was read: %d users", self._path, len(self._table.users))
            self._problem = None
        except (OSError, ValueError) as exc:
            problem = str(exc)
            if problem != self._problem:
                logger.error("the keys read from %s before stay in force: %s", self._path, problem)
            self._problem = problem
