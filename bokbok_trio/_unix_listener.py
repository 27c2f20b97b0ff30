"""Listen on a UNIX socket: one server at a time makes its file, and the server that made a file removes it.

A server finds a stale file by connecting to it, removes it, and binds. Two servers that start together could
each remove the other's file, so a server does all this under a lock (``flock``) on the directory. The lock is
only a safeguard: if the system cannot give it, the server logs that and goes on without it.

The file gets its mode before ``listen``, and so before a client can connect. Setting the mode does not follow
a symbolic link that another process may have put in the file's place.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Final, final

import trio

from ._addresses import UnixAddress
from ._errors import AddressError
from ._fork import abandon_in_child, close_inherited

LOCK_POLL: Final = 0.02
"""Seconds between attempts to take the lock. A server holds it for a few system calls only. But any process
that can open the directory can hold it for ever, so a task must be able to cancel the wait."""

LOCK_WARNING: Final = 0.5
"""Seconds of waiting for the lock after which a line is logged: much longer than a server holds it."""

logger = logging.getLogger("bokbok_trio")


@final
class UnixListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that removes its file when it closes, if the file is still its own."""

    def __init__(
        self, sock: trio.socket.SocketType, address: UnixAddress, path: str, inode: tuple[int, int]
    ) -> None:
        self._listener = trio.SocketListener(sock)
        self.address = address
        self._path = path
        self._inode: tuple[int, int] | None = inode
        abandon_in_child(self)

    @property
    def socket(self) -> trio.socket.SocketType:
        """The socket, as of a `trio.SocketListener`."""
        return self._listener.socket

    def leave_file(self) -> tuple[str, int, int]:
        """Leave the file in place for another process, and return its path, device and inode."""
        assert self._inode is not None
        inode, self._inode = self._inode, None
        return self._path, *inode

    async def accept(self) -> trio.SocketStream:
        return await self._listener.accept()

    async def aclose(self) -> None:
        inode, self._inode = self._inode, None  # a later file may get the same inode
        try:
            if inode is not None:
                _unlink(self._path, inode)
        except OSError as exc:
            logger.warning("the file of the UNIX socket %s cannot be removed: %s", self.address, exc)
        finally:
            await self._listener.aclose()

    def abandon(self) -> None:
        """See `Abandonable.abandon`. The file belongs to the parent."""
        self._inode = None
        close_inherited(self._listener.socket)


async def listen_unix(
    address: UnixAddress,
    *,
    backlog: int,
    mode: int,
    timeout: float,  # noqa: ASYNC109
) -> UnixListener:
    """Make the file of a UNIX socket, and listen on it.

    Arguments:
        address: the address of the socket.
        backlog: connections that may wait to be accepted.
        mode: the permissions of the file.
        timeout: seconds to wait for the lock on the directory, if another process holds it.

    Raises:
        AddressError: the address is in use, the path exists and is not a socket, or another process held the
            lock for too long.
        OSError: the system does not allow it. The error names the path.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise AddressError(f"cannot listen on {address}: this system has no UNIX sockets")
    path, address = _make_absolute(address)
    directory = os.path.dirname(path)
    lock = await _lock(address, directory, timeout)
    try:
        sock, inode = _bind(address.path, backlog, mode)
    finally:
        if lock is not None:
            _unlock(lock)
    return UnixListener(trio.socket.from_stdlib_socket(sock), address, path, inode)


def _make_absolute(address: UnixAddress) -> tuple[str, UnixAddress]:
    """Return the absolute path of an address, and an address of it, because the working directory may change.

    If that path is too long for an address, the address stays relative.
    """
    if os.path.isabs(address.path):
        return address.path, address
    with _name_path(address.path):
        # `os.path.abspath` would not do: it resolves ".." after a symbolic link wrongly.
        path = os.path.join(os.getcwd(), address.path.removeprefix("./").lstrip("/"))
    with suppress(AddressError):
        address = UnixAddress(path)
    return path, address


# ---- the lock on the directory ----


async def _lock(address: UnixAddress, directory: str, timeout: float) -> int | None:  # noqa: ASYNC109
    """Lock a directory, and return its descriptor; None: the system cannot give the lock."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError as exc:
        _warn_unlocked(address, directory, exc)
        return None
    except OSError as exc:  # mostly, the directory does not exist
        raise OSError(exc.errno, f"{exc.strerror} (the directory {directory!r})", address.path) from exc
    try:
        if await _wait_for_lock(lock, address, directory, timeout):
            return lock
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


async def _wait_for_lock(lock: int, address: UnixAddress, directory: str, timeout: float) -> bool:  # noqa: ASYNC109
    """Wait for the lock. Returns False if the system cannot give it."""
    import fcntl  # noqa: PLC0415  (not on Windows)

    began = trio.current_time()
    has_warned = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError as exc:
            _warn_unlocked(address, directory, exc)
            return False
        else:
            return True
        waited = trio.current_time() - began
        if waited >= timeout:
            raise AddressError(
                f"cannot listen on {address}: another process has held the lock (flock) on the directory"
                f" {directory!r} for {timeout:g} seconds; end that process (lslocks shows it), or use a"
                " directory that other users cannot open"
            )
        if waited >= LOCK_WARNING and not has_warned:
            has_warned = True
            logger.warning(
                "%s: another process holds the lock (flock) on the directory %r; waiting for it",
                address,
                directory,
            )
        await trio.sleep(LOCK_POLL)


def _warn_unlocked(address: UnixAddress, directory: str, error: OSError) -> None:
    logger.warning(
        "%s: the directory %r cannot be locked (%s): listening without the lock, so do not start two"
        " servers there at the same moment",
        address,
        directory,
        error,
    )


def _unlock(lock: int) -> None:
    import fcntl  # noqa: PLC0415  (not on Windows)

    with suppress(OSError):
        # Closing would not do: a child that another thread just forked has a copy, which keeps the lock.
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


# ---- the file ----


def _bind(path: str, backlog: int, mode: int) -> tuple[socket.socket, tuple[int, int]]:
    """Make a listening socket with a file. Return the socket, and the device and inode of the file."""
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    inode: tuple[int, int] | None = None
    try:
        with _name_path(path):
            if sys.platform == "linux":
                # bind() gives the file the mode of the socket, less the umask.
                os.fchmod(sock.fileno(), mode)
            sock.bind(path)
            status = os.lstat(path)
            if stat.S_ISSOCK(status.st_mode):
                inode = status.st_dev, status.st_ino
            if inode is None or stat.S_IMODE(status.st_mode) != mode:
                _set_mode(path, mode)
            sock.listen(backlog)
        assert inode is not None
    except BaseException:
        if inode is not None:
            with suppress(OSError):
                _unlink(path, inode)
        sock.close()
        raise
    return sock, inode


def _set_mode(path: str, mode: int) -> None:
    """Set the mode of a socket's file, and never that of another file in its place."""
    if sys.platform != "linux":
        os.chmod(path, mode, follow_symlinks=False)
        return
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise FileExistsError(errno.EEXIST, "another process replaced the socket", path)
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    """Remove the socket at a path, if there is one that no server listens on.

    Raises:
        AddressError: a server listens there, or the path is not a socket.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise AddressError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result != errno.ECONNREFUSED:
        # The probe was accepted, or the backlog is full, or permission is missing: a server may be there.
        raise AddressError(f"{path} is in use ({errno.errorcode.get(result, 'a server answers')})")
    os.unlink(path)


def _unlink(path: str, inode: tuple[int, int]) -> None:
    """Remove a file, if it still has this inode."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if (status.st_dev, status.st_ino) == inode:
        os.unlink(path)


@contextmanager
def _name_path(path: str) -> Generator[None]:
    """Put the path into errors of the system, and turn EADDRINUSE into `AddressError`."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:  # a server bound it without taking the lock
            raise AddressError(f"{path} is in use") from exc
        raise OSError(exc.errno, exc.strerror, path) from exc
