"""Files that only their owner may read: written whole or not at all, and refused where others can read them.

All of it waits for the disk, so in a Trio program it belongs into a thread, or before the program serves
anybody.
"""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

StrPath: TypeAlias = "str | os.PathLike[str]"

MODE: Final = 0o600
"""What its owner may do with a new file. Others may do nothing."""


def read_private(path: StrPath, max_size: int) -> tuple[bytes, os.stat_result]:
    """Read a file that only its owner may read; its status is as it was before that.

    Raises:
        PermissionError: the file's mode lets group or others do something with it, or does not let us read
            it.
        OSError: it is not there, or no regular file, or cannot be read. It names the path.
        ValueError: it has more than `max_size` bytes.
    """
    with _naming(os.fspath(path)):
        # A pipe would be waited for, without the flag.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if os.name != "nt" and status.st_mode & 0o077:  # Windows has no such bits
                problem = f"others can read or change it: chmod 600 {shlex.quote(os.fspath(path))}"
                raise PermissionError(errno.EACCES, problem)
            if status.st_size > max_size:
                raise ValueError(f"{os.fspath(path)} has more than {max_size} bytes")
            with open(fd, "rb", closefd=False) as file:
                return file.read(), status
        finally:
            os.close(fd)


def create_private(path: StrPath, content: bytes, prepare: Callable[[int], object] = lambda _: None) -> None:
    """Write a new file, to the disk.

    Arguments:
        path: where nothing is; not even a symbolic link.
        content: all that will be in it.
        prepare: called with the file's descriptor, before anything is in it.

    Raises:
        FileExistsError: something is there.
        OSError: it cannot be written; then nothing is left of it. It names the path.
    """
    with _naming(os.fspath(path)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
        try:
            with open(fd, "wb") as file:
                prepare(fd)
                file.write(content)
                file.flush()
                os.fsync(fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise
    _sync_directory(path)


def replace_private(path: str, content: bytes, status: os.stat_result) -> None:
    """Put a new file in the place of an old one, at once, with the mode and the owner of that.

    Arguments:
        path: of the old file itself, and not of a symbolic link to it.
        content: all that will be in it.
        status: the old one's.

    Raises:
        OSError: it cannot be written; then the old file is as it was. It names the path.
    """

    def take_after(fd: int) -> None:
        # Root may write for another user, who must be able to read it afterwards.
        os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))

    temporary = os.path.join(os.path.dirname(path), f".bokbok-{secrets.token_hex(8)}")
    with _naming(path):
        create_private(temporary, content, take_after)
        try:
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    _sync_directory(path)


@contextmanager
def _naming(path: str) -> Generator[None]:
    """Have the system's errors name that path: reading and writing name none, or that of a temporary file."""
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from exc


def _sync_directory(path: StrPath) -> None:
    """Have the file's name on the disk too, on systems that can do that."""
    with suppress(OSError):
        fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
