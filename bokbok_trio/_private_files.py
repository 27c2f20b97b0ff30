"""Files that only their owner may read: written whole or not at all, and refused if others can read them.

All functions block on the disk. So a Trio program should call them in a thread, or before it serves clients.
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
"""The permissions of a new file: its owner may read and write it, others may do nothing."""


def read_private(path: StrPath, max_size: int) -> tuple[bytes, os.stat_result]:
    """Read a file that only its owner may read. Return its content, and its status before it was read.

    Raises:
        PermissionError: the file's mode gives group or others a permission, or does not let this process read
            it.
        OSError: the file does not exist, is not a regular file, or cannot be read. The error names the path.
        ValueError: the file has more than `max_size` bytes.
    """
    with _naming(os.fspath(path)):
        # O_NONBLOCK, because opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if os.name != "nt" and status.st_mode & 0o077:  # Windows does not have these bits
                problem = f"others can read or change it: chmod 600 {shlex.quote(os.fspath(path))}"
                raise PermissionError(errno.EACCES, problem)
            if status.st_size > max_size:
                raise ValueError(f"{os.fspath(path)} has more than {max_size} bytes")
            with open(fd, "rb", closefd=False) as file:
                return file.read(), status
        finally:
            os.close(fd)


def create_private(path: StrPath, content: bytes, prepare: Callable[[int], object] = lambda _: None) -> None:
    """Write a new file, and sync it to the disk.

    Arguments:
        path: a path that does not exist, not even as a symbolic link.
        content: the whole content.
        prepare: called with the descriptor of the file while the file is empty.

    Raises:
        FileExistsError: the path exists.
        OSError: the file cannot be written. Then it does not exist. The error names the path.
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
    """Replace a file by a new one in one step, with the mode and the owner of the old one.

    Arguments:
        path: the path of the old file itself, and not of a symbolic link to it.
        content: the whole new content.
        status: the status of the old file.

    Raises:
        OSError: the new file cannot be written. Then the old one is unchanged. The error names the path.
    """

    def take_after(fd: int) -> None:
        # Root may write the file of another user, who must be able to read it afterwards.
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
    """Put the path into errors of the system, which name no path, or that of a temporary file."""
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from exc


def _sync_directory(path: StrPath) -> None:
    """Sync the name of a file to the disk too, on systems that can."""
    with suppress(OSError):
        fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
