"""Listening on a UNIX socket: its file, its mode, and the lock."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from bokbok_trio import AddressError, UnixAddress
from bokbok_trio._sockets import listener_address, stream_address
from bokbok_trio._unix_listener import LOCK_WARNING
from tests.support.sockets import dial_to, full_backlog, knock, listen_on


@pytest.fixture
def path(tmp_path: Path) -> str:
    return f"{tmp_path}/app.sock"


def make_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


async def test_listening_and_dialling_on_a_unix_socket(path: str) -> None:
    address = UnixAddress(path)
    [listener] = await listen_on(address, backlog=1)
    assert listener_address(listener) == address
    async with listener, await dial_to(address) as stream, await listener.accept() as accepted:
        assert stream_address(stream) == address
        assert stream_address(accepted) == address
        await stream.send_all(b"x")
        assert await accepted.receive_some() == b"x"
    assert not os.path.lexists(path)


async def test_a_path_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [listener] = await listen_on(UnixAddress("app.sock"))
    async with listener:
        assert stat.S_ISSOCK(os.stat(tmp_path / "app.sock").st_mode)


async def test_a_stale_file_is_replaced(path: str) -> None:
    make_stale(path)
    [listener] = await listen_on(UnixAddress(path))
    async with listener, await dial_to(UnixAddress(path)), await listener.accept():
        pass


async def test_a_live_socket_is_left_alone(path: str) -> None:
    [listener] = await listen_on(UnixAddress(path))
    async with listener:
        with pytest.raises(AddressError, match=r"app\.sock is in use"):
            await listen_on(UnixAddress(path))
        await (await listener.accept()).aclose()  # it was asked whether it lives
        async with await dial_to(UnixAddress(path)), await listener.accept():
            pass


async def test_a_live_socket_with_a_full_backlog_is_left_alone(path: str) -> None:
    with full_backlog(socket.AF_UNIX, path):
        with pytest.raises(AddressError, match=r"is in use \(EAGAIN\)"):
            await listen_on(UnixAddress(path))
    assert os.path.lexists(path)


async def test_a_socket_of_another_kind_is_left_alone(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        with pytest.raises(AddressError, match=r"is in use \(EPROTOTYPE\)"):
            await listen_on(UnixAddress(path))
    assert os.path.lexists(path)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling-link"])
async def test_what_is_no_socket_is_left_alone(path: str, kind: str) -> None:
    match kind:
        case "file":
            Path(path).write_text("text")
        case "directory":
            Path(path).mkdir()
        case _:
            Path(path).symlink_to(f"{path}.stale")
    if kind == "link":
        make_stale(f"{path}.stale")
    before = os.lstat(path)
    with pytest.raises(AddressError, match=r"app\.sock exists and is not a socket$"):
        await listen_on(UnixAddress(path))
    assert os.lstat(path) == before


async def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await listen_on(UnixAddress(f"{tmp_path}/missing/app.sock"))


@pytest.fixture
def umask() -> Generator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o640])
async def test_the_mode_is_what_was_asked_for_before_anyone_can_connect(
    path: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask says, and it is not touched: other threads make files too."""
    found: list[int] = []

    def listen(sock: socket.socket, backlog: int) -> None:
        found.extend([knock(path), stat.S_IMODE(os.lstat(path).st_mode)])
        real_listen(sock, backlog)

    real_listen = socket.socket.listen
    monkeypatch.setattr(socket.socket, "listen", listen)
    monkeypatch.setattr(os, "umask", None)
    [listener] = await listen_on(UnixAddress(path), mode=mode)
    async with listener:
        assert stat.S_IMODE(os.lstat(path).st_mode) == mode
    assert found == [errno.ECONNREFUSED, mode]
    monkeypatch.undo()


def replace_after_bind(monkeypatch: pytest.MonkeyPatch, path: str, by: str) -> None:
    """Somebody who may write to the directory puts a link in the place of the socket that was just made."""

    def bind(sock: socket.socket, where: str) -> None:
        real_bind(sock, where)
        os.unlink(path)
        os.symlink(by, path)

    real_bind = socket.socket.bind
    monkeypatch.setattr(socket.socket, "bind", bind)


@pytest.mark.parametrize("mode", [0o600, 0o666])
async def test_no_link_in_the_place_of_the_socket_is_followed(
    path: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = Path(f"{path}.victim")
    victim.touch(0o640)
    replace_after_bind(monkeypatch, path, str(victim))
    with pytest.raises(OSError, match=re.escape(path)):
        await listen_on(UnixAddress(path), mode=mode)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o640
    assert os.path.islink(path), "what is not ours is not removed"


async def test_no_link_to_another_socket_is_followed_once_the_mode_must_be_set(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = f"{path}.victim"
    make_stale(victim)
    before = os.lstat(victim)
    real_lstat = os.lstat

    def lstat(where: str) -> os.stat_result:
        status = real_lstat(where)
        if where == path:
            os.unlink(path)
            os.symlink(victim, path)
        return status

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        patch.setattr(os, "fchmod", lambda *_: None)
        with pytest.raises(OSError, match="another process replaced the socket"):
            await listen_on(UnixAddress(path), mode=0o606)
    assert os.lstat(victim).st_mode == before.st_mode


async def test_where_a_socket_has_no_mode_before_it_is_bound(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS and the BSDs."""
    results: list[tuple[str, int, bool]] = []

    def chmod(where: str, mode: int, *, follow_symlinks: bool) -> None:
        results.append((where, mode, follow_symlinks))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        patch.setattr(os, "fchmod", None)
        patch.setattr(os, "chmod", chmod)
        [listener] = await listen_on(UnixAddress(path), mode=0o606)
    assert results == [(path, 0o606, False)]
    await listener.aclose()


async def test_closing_leaves_a_file_that_is_not_its_own(path: str) -> None:
    [listener] = await listen_on(UnixAddress(path))
    os.rename(path, f"{path}.moved")  # so that its inode stays taken
    Path(path).write_text("another's")
    await listener.aclose()
    assert Path(path).read_text() == "another's"


async def test_closing_when_the_file_is_gone(path: str) -> None:
    [listener] = await listen_on(UnixAddress(path))
    os.unlink(path)
    await listener.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_closing_twice_leaves_the_next_listener_alone(path: str) -> None:
    # The file system may give the next file the inode of the first.
    [first] = await listen_on(UnixAddress(path))
    await first.aclose()
    [second] = await listen_on(UnixAddress(path))
    async with second:
        await first.aclose()
        assert os.path.lexists(path)


async def test_a_file_that_cannot_be_removed_does_not_keep_the_listener_open(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: str) -> None:
        raise PermissionError(errno.EACCES, "not allowed", path)

    [listener] = await listen_on(UnixAddress(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with suppress(PermissionError):
            await listener.aclose()
    is_closed = knock(path) == errno.ECONNREFUSED
    await listener.aclose()
    assert is_closed


async def test_of_many_that_start_together_on_a_stale_file_one_wins(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: str) -> None:
        real_unlink(path)
        time.sleep(0.005)  # whoever is not kept out by the lock comes in now

    real_unlink = os.unlink
    make_stale(path)
    monkeypatch.setattr(os, "unlink", unlink)
    winners: list[trio.abc.Listener[trio.SocketStream]] = []
    refused: list[str] = []

    async def start() -> None:
        try:
            winners.extend(await listen_on(UnixAddress(path)))
        except AddressError as exc:
            refused.append(str(exc))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(start)
    assert len(winners) == 1
    assert refused == [f"{path} is in use (a server answers)"] * 9
    async with winners[0], await dial_to(UnixAddress(path)):
        pass


@contextmanager
def locked(path: str) -> Generator[None]:
    """Somebody else holds the lock on the directory."""
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


async def test_a_lock_that_another_holds_is_waited_for(
    path: str, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listeners: list[trio.abc.Listener[trio.SocketStream]] = []

    async def start() -> None:
        listeners.extend(await listen_on(UnixAddress(path)))

    async with trio.open_nursery() as nursery:
        with locked(path):
            nursery.start_soon(start)
            await trio.sleep(LOCK_WARNING / 2)
            assert warnings_of(caplog) == []
            await trio.sleep(9 - LOCK_WARNING / 2)
            [warning] = warnings_of(caplog)
            assert warning == (
                f"{path}: another process holds the lock (flock) on the directory {os.path.dirname(path)!r}; "
                "waiting for it"
            )
            assert not os.path.lexists(path)
    assert LOCK_WARNING < 1
    assert knock(path) == 0
    await listeners[0].aclose()


async def test_a_lock_that_another_keeps_is_an_error_that_says_what_to_do(
    path: str, autojump_clock: trio.testing.MockClock
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    began = trio.current_time()
    with locked(path), pytest.raises(AddressError) as caught:
        await listen_on(UnixAddress(path), timeout=5)
    assert 5 <= trio.current_time() - began < 5.1
    assert str(caught.value) == (
        f"cannot listen on {path}: another process has held the lock (flock) on the directory "
        f"{os.path.dirname(path)!r} for 5 seconds; end that process (lslocks shows it), or use a directory "
        "that other users cannot open"
    )
    assert len(os.listdir("/proc/self/fd")) == before


async def test_waiting_for_a_lock_that_another_holds_can_be_cancelled(
    path: str, autojump_clock: trio.testing.MockClock
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with locked(path), trio.move_on_after(1) as scope:
        await listen_on(UnixAddress(path))
    assert scope.cancelled_caught
    assert len(os.listdir("/proc/self/fd")) == before
    assert not os.path.lexists(path)


@pytest.mark.parametrize("error", [errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EACCES])
async def test_where_there_are_no_locks_it_serves_without(
    path: str, error: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", flock)
    [listener] = await listen_on(UnixAddress(path))
    async with listener:
        assert knock(path) == 0
        [warning] = warnings_of(caplog)
        assert warning.startswith(
            f"{path}: the directory {os.path.dirname(path)!r} cannot be locked ([Errno "
        )
    assert len(os.listdir("/proc/self/fd")) == before


async def test_in_a_directory_that_cannot_be_read_it_serves_without_a_lock(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of mode 333; root may read it nevertheless."""

    def open_(where: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        [listener] = await listen_on(UnixAddress(path))
    async with listener:
        assert knock(path) == 0
    assert "cannot be locked ([Errno 13] Permission denied" in warnings_of(caplog)[0]


async def test_a_forked_copy_of_the_lock_holds_nobody_up(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may fork while the lock is held; its child has a copy of the descriptor."""
    copies: list[int] = []

    def unlink(path: str) -> None:
        real_unlink(path)
        [lock] = [
            int(fd)
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
            and os.readlink(f"/proc/self/fd/{fd}") == os.path.dirname(path)
        ]
        copies.append(os.dup(lock))

    real_unlink = os.unlink
    make_stale(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        [first] = await listen_on(UnixAddress(path))
    [second] = await listen_on(UnixAddress(f"{path}2"), timeout=0.1)
    os.close(copies[0])
    await first.aclose()
    await second.aclose()


async def test_a_server_that_knows_nothing_of_the_lock_comes_first(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: str) -> None:
        real_unlink(path)
        other.bind(path)

    real_unlink = os.unlink
    make_stale(path)
    monkeypatch.setattr(os, "unlink", unlink)
    with socket.socket(socket.AF_UNIX) as other:
        with pytest.raises(AddressError, match=f"^{path} is in use$") as caught:
            await listen_on(UnixAddress(path))
        assert isinstance(caught.value.__cause__, OSError)
        other.listen()
        assert knock(path) == 0, "its file is still there"


async def test_a_failure_leaves_no_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def listen(sock: socket.socket, backlog: int) -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(socket.socket, "listen", listen)
    with pytest.raises(OSError, match="No buffer space available") as caught:
        await listen_on(UnixAddress(path))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOBUFS, path)
    assert not os.path.lexists(path)


async def test_an_error_of_bind_names_the_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(sock: socket.socket, where: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(PermissionError) as caught:
        await listen_on(UnixAddress(path))
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, path)


async def test_a_system_without_unix_sockets(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(AddressError, match=f"^cannot listen on {path}: this system has no UNIX sockets$"):
        await listen_on(UnixAddress(path))
