"""Disks that are full, broken or read-only: a clear error, the old content, and nothing half-written.

Keys, keyrings, received files and UNIX sockets write to a disk. Each system call of theirs fails in turn; and
where this runs as root, there is a disk that is full in truth.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import (
    Channel,
    Connection,
    Key,
    Keyring,
    RemoteError,
    UnixAddress,
    open_connection,
    open_server,
)
from bokbok_trio._unix_listener import listen_unix
from bokbok_trio.files import CHUNK_SIZE, receive_file, send_file
from bokbok_trio.testing import open_connection_pair
from tests.support.helpers import check_holds_no_secret, echo

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its disks have other errors")

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]
A, B = Key(bytes(32)), Key(bytes(range(32)))
OLD, NEW = b"old", random.Random(11).randbytes(2 * CHUNK_SIZE + 1)

STEPS = [
    *((os, name) for name in ("open", "stat", "lstat", "pread", "pwrite", "fsync", "ftruncate")),
    *((os, name) for name in ("fchmod", "fchown", "chmod", "replace", "unlink")),
    *((socket.socket, name) for name in ("bind", "listen")),
]


@contextmanager
def failing(at: int, error: int) -> Generator[list[str]]:
    """Have the system call of that number fail; gives the names of those that were made."""
    made: list[str] = []
    lock = threading.Lock()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with lock:
                number = len(made)
                made.append(function.__name__)
            if number == at:
                paths = [each for each in arguments if isinstance(each, str | os.PathLike)]
                raise OSError(error, os.strerror(error), *paths[:1])
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, wrap(getattr(owner, name)))
        yield made


def contents(folder: Path) -> dict[str, bytes | None]:
    """Of all files; None for a socket."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


# ---- keys and keyrings ----

WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "save a key": ("key", lambda folder: A.save(folder / "key")),
    "create a keyring": ("new", lambda folder: Keyring.create(folder / "new")),
    "add a user": ("users", lambda folder: Keyring.load(folder / "users").add("bob", B)),
    "remove a user": ("users", lambda folder: Keyring.load(folder / "users").remove("alice")),
}


def write_users(folder: Path) -> None:
    users = folder / "users"
    users.unlink(missing_ok=True)
    Keyring.create(users).add("alice", A)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("what", ["save a key", "add a user", "remove a user"])
def test_keys_are_written_whole_or_not_at_all_whichever_step_fails(
    what: str, error: int, tmp_path: Path
) -> None:
    name, write = WRITERS[what]
    for at in count():
        write_users(tmp_path)
        before = contents(tmp_path)
        caught: OSError | None = None
        with failing(at, error) as made:
            try:
                write(tmp_path)
            except OSError as exc:
                caught = exc
        if caught is None:
            assert contents(tmp_path) != before
        else:
            assert contents(tmp_path) == before
            assert (caught.errno, caught.filename) == (error, str(tmp_path / name))
            check_holds_no_secret(caught, A.to_text(), B.to_text())
        if at >= len(made):
            break
        (tmp_path / "key").unlink(missing_ok=True)
    assert "fsync" in made


@pytest.mark.parametrize("what", WRITERS)
def test_a_disk_that_takes_some_bytes_only(what: str, tmp_path: Path) -> None:
    """As far as the system lets any process have this: files of ten bytes at most."""
    name, write = WRITERS[what]
    write_users(tmp_path)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=f"{name}'$") as caught:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert contents(tmp_path) == before
    write(tmp_path)


def test_a_keyring_that_cannot_be_read_keeps_its_users(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_users(tmp_path)
    keyring = Keyring.load(tmp_path / "users")
    for at in range(4):  # it is looked at twice, and opened, and that is all
        with failing(at, errno.EIO):
            assert keyring["alice"] == (A,)
    assert "the keys read from" in caplog.text
    assert "Input/output error" in caplog.text


# ---- received files ----


async def transfer(source: Path, target: Path) -> None:
    """Send a file to a handler that receives it."""

    async def receive(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await receive_file(channel, target, max_size=10**6)

    async with open_connection_pair(server_channel_handler=receive) as (client, _):
        async with client.open_channel([]) as channel:
            with suppress(trio.BrokenResourceError):  # the answer says why
                await send_file(channel, source)
            await channel.answer()


@pytest.mark.parametrize("error", ERRORS)
async def test_a_received_file_is_whole_or_the_old_one_whichever_step_fails(
    error: int, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(NEW)
    for at in count():
        target.write_bytes(OLD)
        caught: Exception | None = None
        with failing(at, error) as made:
            try:
                await transfer(source, target)
            except (RemoteError, OSError) as exc:
                caught = exc
        assert caught is None or os.strerror(error) in str(caught)
        # After it was put in its place, all that is missing is its name on the disk.
        is_there = caught is None or made[at - 1] == "replace"
        assert target.read_bytes() == (NEW if is_there else OLD)
        if at >= len(made):
            break
        await transfer(source, target)
        assert contents(tmp_path) == {"source": NEW, "target": NEW}
    assert made[-3:] == ["fsync", "replace", "fsync"]


async def test_a_part_that_could_not_be_kept_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After that error what is on disk is unknown, and the system tells of it once only."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(NEW)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(RemoteError, match="Input/output error"):
        patch.setattr(os, "fsync", fail)
        await transfer(source, target)
    assert contents(tmp_path) == {"source": NEW}
    await transfer(source, target)
    assert contents(tmp_path) == {"source": NEW, "target": NEW}


# ---- UNIX sockets ----


@pytest.mark.parametrize("error", ERRORS)
async def test_a_socket_is_made_or_nothing_is_left_whichever_step_fails(error: int, tmp_path: Path) -> None:
    """Where it cannot even be looked at after it was made, a stale one is left, as after a crash."""
    path = tmp_path / "socket"
    left: list[str] = []
    for at in count():
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        caught: OSError | None = None
        with failing(at, error) as made:
            try:
                listener = await listen_unix(UnixAddress(str(path)), backlog=1, mode=0o600, timeout=1)
            except OSError as exc:
                caught = exc
        if caught is None:
            await listener.aclose()
            assert not path.exists()
        else:
            assert (caught.errno, caught.filename) == (error, str(path))
            if "bind" in made[:at] and path.exists():
                left.append(made[at])
            path.unlink(missing_ok=True)
        if at >= len(made):
            break
    assert {"bind", "listen", "fchmod", "unlink"} <= {*made}
    assert left == ["lstat"]


# ---- a disk that is full in truth ----


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """Of 64 KiB, and 12 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=64k,nr_inodes=12,mode=700"
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"to mount a small disk needs Linux and root: {exc}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))


def use_up_files(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        for number in range(20):
            (disk / f"no {number}").touch()


@contextmanager
def read_only(disk: Path) -> Generator[None]:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def test_keys_on_a_full_disk_and_on_one_that_is_read_only(disk: Path) -> None:
    users = disk / "users"
    write_users(disk)
    keyring = Keyring.load(users)
    before = users.read_bytes()
    fill(disk)

    def check(message: str) -> None:
        listing = contents(disk)
        with pytest.raises(OSError, match=f"{message}.*/users'"):
            keyring.add("bob", B)
        with pytest.raises(OSError, match=f"{message}.*/key'"):
            A.save(disk / "key")
        assert contents(disk) == listing
        assert users.read_bytes() == before
        assert keyring["alice"] == (A,)

    check("No space left")
    (disk / "ballast").unlink()
    with read_only(disk):
        check("Read-only file system")
    keyring.add("bob", B)
    assert keyring["bob"] == (B,)


async def test_a_file_received_on_a_full_disk_is_resumed_when_there_is_room(
    disk: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", disk / "target"
    source.write_bytes(NEW[: 2**16 - 2**13])
    target.write_bytes(OLD)
    (disk / "other").write_bytes(bytes(2**14))
    with pytest.raises(RemoteError, match="No space left"):
        await transfer(source, target)
    assert target.read_bytes() == OLD
    (disk / "other").unlink()
    with read_only(disk), pytest.raises(RemoteError, match="Read-only file system"):
        await transfer(source, target)
    assert target.read_bytes() == OLD
    await transfer(source, target)
    assert contents(disk) == {"target": source.read_bytes()}


async def test_a_unix_socket_on_a_full_disk_and_on_one_that_is_read_only(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = UnixAddress(str(disk / "socket"))
    use_up_files(disk)
    with pytest.raises(OSError, match="No space left on device") as caught:
        await listen_unix(path, backlog=1, mode=0o600, timeout=1)
    assert caught.value.filename == path.path
    (disk / "no 0").unlink()
    async with open_server(path, echo) as server:
        fill(disk)
        with read_only(disk):
            async with open_connection(path) as connection:
                assert await connection.request(["x"]) == [b"x"]
            server.stop()
            await server.wait_stopped()
    assert "the file of the UNIX socket" in caplog.text
    assert "cannot be removed: [Errno 30] Read-only file system" in caplog.text
    async with open_server(path, echo), open_connection(path) as connection:
        assert await connection.request(["x"]) == [b"x"]
