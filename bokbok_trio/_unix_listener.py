"""Listening on a UNIX socket: its file is made by one server at a time, and removed by the one that made it.

A server finds a stale file by connecting to it, removes it, and binds. Two servers that start together
could each remove the other's file, so all this is done under a lock (``flock``) on the directory. The
lock is a safeguard beside the socket, and worth less than it: where the system cannot give it, the server
goes on without, and says so in the log.

The file has its mode before anyone can connect, which ``listen`` allows. The mode is set without following
a symbolic link that somebody may have put in the file's place.
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
"""Seconds between attempts at the lock. We hold it for a few system calls only; but anyone who can open
the directory can hold it for as long as they like, so waiting for it must be possible to cancel."""

LOCK_WARNING: Final = 0.5
"""Seconds of waiting for the lock after which the log says so: much longer than any of us holds it."""

logger = logging.getLogger("bokbok_trio")


@final
class UnixListener(trio.abc.Listener[trio.SocketStream]):
    """A listener that unlinks its file when it closes, if the file is still its own."""

    def __init__(
        self, sock: trio.socket.SocketType, address: UnixAddress, path: str, inode: tuple[int, int]
    ) -> None:
        self._listener = trio.SocketListener(sock)
        self.address = address
        self._path = path
        self._inode: tuple[int, int] | None = inode
        abandon_in_child(self)

    async def accept(self) -> trio.SocketStream:
        return await self._listener.accept()

    async def aclose(self) -> None:
        inode, self._inode = self._inode, None  # the next file may get the same
        try:
            if inode is not None:
                _unlink(self._path, inode)
        except OSError as exc:
            logger.warning("the file of the UNIX socket %s cannot be removed: %s", self.address, exc)
        finally:
            await self._listener.aclose()

    def abandon(self) -> None:
        """See `Abandonable.abandon`. The file is the parent's."""
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
        address: where.
        backlog: connections that may wait to be accepted.
        mode: the permissions of the file.
        timeout: seconds to wait for the lock on the directory, where somebody else holds it.

    Raises:
        AddressError: the address is in use, or is something else's, or somebody held the lock for too long.
        OSError: the system does not allow it. It names the path.
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
    """The absolute path, and its address, as the working directory may change.

    Where that path is too long for an address, the address is as it was.
    """
    if os.path.isabs(address.path):
        return address.path, address
    with _name_path(address.path):
        # Not `os.path.abspath`, which would take ".." after a symbolic link for what it is not.
        path = os.path.join(os.getcwd(), address.path.removeprefix("./").lstrip("/"))
    with suppress(AddressError):
        address = UnixAddress(path)
    return path, address


# ---- the lock on the directory ----


async def _lock(address: UnixAddress, directory: str, timeout: float) -> int | None:  # noqa: ASYNC109
    """Lock a directory; return its descriptor, or None where the system cannot give the lock."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError as exc:
        _warn_unlocked(address, directory, exc)
        return None
    except OSError as exc:  # mostly, that it is not there
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
    """Wait for the lock. False: the system cannot give it."""
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
        fcntl.flock(
            lock, fcntl.LOCK_UN
        )  # a child that another thread just forked has a copy, which would hold it
    os.close(lock)


# ---- the file ----


def _bind(path: str, backlog: int, mode: int) -> tuple[socket.socket, tuple[int, int]]:
    """Make a listening socket with a file; return it, and the file's inode."""
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    inode: tuple[int, int] | None = None
    try:
        with _name_path(path):
            if sys.platform == "linux":
                os.fchmod(sock.fileno(), mode)  # bind() gives the file this mode, less the umask
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
    """Set the mode of a socket's file, and never of another file that is in its place."""
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
    """Make room at a path, if a socket is there that nobody listens on."""
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
        # Accepted, or a full backlog, or no permission to ask: somebody may be there.
        raise AddressError(f"{path} is in use ({errno.errorcode.get(result, 'a server answers')})")
    os.unlink(path)


def _unlink(path: str, inode: tuple[int, int]) -> None:
    """Remove a file, if it is still that one."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if (status.st_dev, status.st_ino) == inode:
        os.unlink(path)


@contextmanager
def _name_path(path: str) -> Generator[None]:
    """Have the system's errors name the path, and EADDRINUSE be an error of the address."""
    try:
        yield
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:  # by a server that knows nothing of the lock
            raise AddressError(f"{path} is in use") from exc
        raise OSError(exc.errno, exc.strerror, path) from exc
