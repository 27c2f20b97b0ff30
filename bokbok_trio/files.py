"""Files over a channel: transferred whole or not at all, checked, and resumed after a break.

::

    async with connection.open_channel(["put", "report.pdf"]) as channel:
        await send_file(channel, "report.pdf")

    async def channel_handler(connection, request, channel):
        match request:
            case [b"put", name]:
                await receive_file(channel, f"/srv/files/{safe_name(name)}", max_size=2**30)

Either side of a channel may send, and several files may follow one another. It works on POSIX systems only.

Theory
======

The two sides exchange these items, with numbers as decimal text, and BLAKE2b digests of 32 bytes::

    sender      receiver
    file size              a file of so many bytes
                from offset digest    I have so many bytes of it (0 or more), with this digest
    from offset            I go on from there if my own first bytes have this digest; otherwise from 0
    data bytes             until all bytes are sent
    end digest             the digest of the whole file, as it was read
                done       the file is in its place

The receiver writes to a file with the name and ``.part``. This part gets the name when it is whole, checked
and on disk. Until then it stays, whatever happens, so that a transfer can resume. The sender never says where
the file goes: the receiver chooses names, and `safe_name` checks those that come over the wire. Files are
read, written and hashed in threads, a chunk at a time, with one chunk in memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Final, Protocol, TypeAlias, TypeVar, TypeVarTuple, final

import trio

from ._arguments import check_amount
from ._errors import BokbokError, RequestError
from ._types import Fields

__all__ = ["TransferError", "receive_file", "safe_name", "send_file"]

CHUNK_SIZE: Final = 2**16
"""Bytes of a file in one item: the most that is sent in one piece. A receiver takes other sizes too."""

HASH_SIZE: Final = 2**20
"""Bytes that are hashed at a time when a transfer is resumed. Cancellation is noticed in between."""

DIGEST_SIZE: Final = 32
"""Bytes of a digest."""

MAX_NAME_SIZE: Final = 250
"""Bytes of a file's name: most file systems take 255, and ``.part`` must fit."""

LOCK_PATIENCE: Final = 5.0
"""Seconds to wait for the lock on a file, which a broken transfer may still hold for a while."""

LOCK_POLL: Final = 0.05
"""Seconds between two attempts to lock a file."""

_NUMBER: Final = re.compile(rb"0|[1-9][0-9]{0,17}")

Progress: TypeAlias = Callable[[int, int], object]
"""A function that takes the bytes of the file that were transferred by now, and its size in bytes."""

_Path: TypeAlias = "str | os.PathLike[str]"
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class _Channel(Protocol):
    """A `bokbok_trio.Channel`, or an object with the same methods."""

    async def send(self, value: Fields, /) -> None: ...
    async def receive(self) -> list[bytes]: ...


@final
class TransferError(BokbokError):
    """A file was not transferred: the other side broke the rules or ended early, or the file changed."""


def safe_name(name: bytes | str) -> str:
    """Check the name of a file that a peer sent, so that it names a plain file inside its folder.

    Arguments:
        name: 1 to 250 bytes of UTF-8.

    Returns:
        The name as a str.

    Raises:
        RequestError: code ``"bad-name"``: the name is empty, too long or not UTF-8, has a slash, a backslash
            or an unprintable character, begins with a dot, or ends with ``.part``.
    """
    try:
        text = name if isinstance(name, str) else name.decode()
        size = len(text.encode())
    except UnicodeError:
        raise RequestError("the name of a file must be UTF-8", code="bad-name") from None
    if (
        not 1 <= size <= MAX_NAME_SIZE
        or not text.isprintable()
        or "/" in text
        or "\\" in text
        or text.startswith(".")
        or text.endswith(".part")
    ):
        raise RequestError(
            f"the name of a file must be 1 to {MAX_NAME_SIZE} printable bytes of UTF-8, without slashes, "
            "not begin with a dot, and not end with '.part'",
            code="bad-name",
        )
    return text


async def send_file(channel: _Channel, path: _Path, *, progress: Progress | None = None) -> bytes:
    """Send a file to the other side, which calls `receive_file`. Return when the file is in its place there.

    Arguments:
        channel: the channel to the other side.
        path: the path of a regular file.
        progress: called before the first chunk, and after each one, with the bytes that the other side has
            (also from an earlier transfer), and the size of the file in bytes.

    Returns:
        The digest of the file, BLAKE2b of 32 bytes.

    Raises:
        OSError: the file cannot be read.
        TransferError: the file became shorter during the transfer, or the other side broke the rules.
        Exception: any error of the channel. Its cause is the error that the other side answered with, if it
            did.
    """
    with _closing(await _in_thread(_open_source, os.fspath(path))) as fd:
        size = os.fstat(fd).st_size
        await channel.send(["file", str(size)])
        offset_text, digest = await _receive(channel, b"from", 2)
        offset = _number(offset_text)
        if offset > size:
            raise TransferError(f"the other side has {offset} bytes of a file of {size}")
        hasher = await _hash(fd, offset)
        if hasher.digest() != digest:
            offset, hasher = 0, _new_hasher()
        await channel.send(["from", str(offset)])
        done = offset
        _report(progress, done, size)
        while done < size:
            data = await _in_thread(_read, fd, hasher, done, min(CHUNK_SIZE, size - done))
            await channel.send([b"data", data])
            done += len(data)
            _report(progress, done, size)
        await channel.send([b"end", hasher.digest()])
        await _receive(channel, b"done", 0)
        return hasher.digest()


async def receive_file(
    channel: _Channel, path: _Path, *, max_size: float, progress: Progress | None = None
) -> bytes:
    """Receive a file from the other side, which calls `send_file`.

    When it returns, the file is at `path`, and has replaced an earlier file there in one step. If it raises,
    or is cancelled, `path` is unchanged, and the received part stays in ``path + ".part"``, where the next
    call resumes. Only an error in the very last steps, after the file got its name, leaves the file in place:
    when the name is synced to the disk, or the other side is told. A part with the wrong digest, or one that
    the disk fails to keep, is removed.

    Arguments:
        channel: the channel to the other side.
        path: the path for the file. Its folder must exist, and other users should not be able to write to it.
            If another call receives to the same path, this one waits up to 5 seconds for its end.
        max_size: bytes that the file may have, 0 or more; ``math.inf`` if the other side may fill the disk.
        progress: called before the first chunk, and after each one, with the bytes that are there, and the
            size of the file in bytes.

    Returns:
        The digest of the file, BLAKE2b of 32 bytes.

    Raises:
        TypeError, ValueError: `max_size` is not a number of bytes, or negative.
        OSError: the file cannot be written.
        TransferError: the file is too large, or arrived differently than it was sent; another call receives
            to the path; or the other side broke the rules.
        Exception: any error of the channel. Its cause is the error that the other side answered with, if it
            did.
    """
    path = os.fspath(path)
    check_amount("max_size", max_size, "bytes")
    [size_text] = await _receive(channel, b"file", 1)
    size = _number(size_text)
    if size > max_size:
        raise TransferError(f"a file of {size} bytes is larger than the {max_size} that are allowed")
    with _closing(await _claim_part(path)) as fd:
        offset = os.fstat(fd).st_size
        if offset > size:
            offset = 0  # the part is of another file
        hasher = await _hash(fd, offset)
        await channel.send(["from", str(offset), hasher.digest()])
        [start_text] = await _receive(channel, b"from", 1)
        done = _number(start_text)
        if done != offset:
            if done:
                raise TransferError(f"the other side goes on from {done} instead of {offset}")
            hasher = _new_hasher()
        await _in_thread(os.ftruncate, fd, done)
        _report(progress, done, size)
        while done < size:
            [data] = await _receive(channel, b"data", 1)
            if not 1 <= len(data) <= size - done:
                raise TransferError(f"the other side sent {len(data)} bytes instead of 1 to {size - done}")
            await _in_thread(_write, fd, hasher, done, data)
            done += len(data)
            _report(progress, done, size)
        [digest] = await _receive(channel, b"end", 1)
        if digest != hasher.digest():
            await _in_thread(os.unlink, _part_of(path))
            raise TransferError("the file arrived differently than it was sent; it was dropped")
        await _in_thread(_put_in_place, fd, path)
        await channel.send([b"done"])
        return digest


# ---- items ----


async def _receive(channel: _Channel, kind: bytes, count: int) -> list[bytes]:
    """Receive an item of a kind, and return its other fields, of which there must be `count`."""
    try:
        got, *fields = await channel.receive()
    except trio.EndOfChannel:
        raise TransferError(f"the other side ended instead of sending {kind.decode()!r}") from None
    except ValueError:
        got, fields = b"", []
    if got != kind or len(fields) != count:
        raise TransferError(f"the other side sent {got[:20]!r} instead of {kind.decode()!r}")
    return fields


def _number(text: bytes) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise TransferError(f"the other side sent {text[:20]!r}, which is not a number")
    return int(text)


def _report(progress: Progress | None, done: int, size: int) -> None:
    if progress is not None:
        progress(done, size)


async def _claim_part(path: str) -> int:
    """Open the part of a file, new or old, and lock it."""
    until = trio.current_time() + LOCK_PATIENCE
    while (fd := await _in_thread(_open_part, path)) is None:
        if trio.current_time() >= until:
            raise TransferError(f"{path} is being received already")
        await trio.sleep(LOCK_POLL)
    return fd


# ---- in threads ----


async def _in_thread(function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
    return await trio.to_thread.run_sync(function, *args)


@contextmanager
def _closing(fd: int) -> Generator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _new_hasher() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=DIGEST_SIZE)


async def _hash(fd: int, size: int) -> hashlib.blake2b:
    """Hash the first `size` bytes of a file."""
    hasher = _new_hasher()
    for at in range(0, size, HASH_SIZE):
        await _in_thread(_read, fd, hasher, at, min(HASH_SIZE, size - at))
    return hasher


def _read(fd: int, hasher: hashlib.blake2b, at: int, size: int) -> bytes:
    """Read and hash `size` bytes."""
    data = os.pread(fd, size, at)
    if len(data) < size:
        raise TransferError("the file has become shorter while it was read")
    hasher.update(data)
    return data


def _write(fd: int, hasher: hashlib.blake2b, at: int, data: bytes) -> None:
    """Write and hash all of `data`."""
    hasher.update(data)
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, at)
        rest, at = rest[written:], at + written


def _open_source(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_part(path: str) -> int | None:
    """Open and lock the part of a file; None: another transfer has locked it."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    part = _part_of(path)
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            _check_regular(fd, part)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, part):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the transfer that had locked it has renamed it: open the path again


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _check_regular(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)


def _put_in_place(fd: int, path: str) -> None:
    """Sync a part to the disk, give it the name of the file, and sync the name."""
    with _closing(os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)) as folder:
        try:
            os.fsync(fd)
        except OSError:
            # Nobody knows what is on disk now, and another sync would report no error.
            # https://wiki.postgresql.org/wiki/Fsync_Errors
            with suppress(OSError):
                os.unlink(_part_of(path))
            raise
        os.replace(_part_of(path), path)
        os.fsync(folder)


def _part_of(path: str) -> str:
    return f"{path}.part"
