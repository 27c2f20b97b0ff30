"""Keyrings: the file, its changes, and their use by a server."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import AuthenticationError, Connection, Key, Keyring, _keyring, open_connection, open_server
from bokbok_trio._keyring import MAX_KEYRING_SIZE, SETTLE_TIME
from bokbok_trio._private_files import read_private
from bokbok_trio.testing import MemoryListener

from ..support.helpers import check_holds_no_secret
from ..support.keyring_files import KEYS, A, B, C, break_line, cut_short, make_unreadable, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.keys"


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


# ---- what is in the file ----


def test_users_and_their_keys(path: Path) -> None:
    write(
        path,
        f"# Staff\nalice {A.to_text()}\n\n  # two devices\n"
        f"bob\t{B.to_text().upper()}  \nbob {C.to_text()}\r\nbob {B.to_text()}\n"
        f"Alice B. Liddell   {A.to_text()}",
    )
    keyring = Keyring.load(path)
    assert dict(keyring) == {"alice": (A,), "bob": (B, C), "Alice B. Liddell": (A,)}
    assert list(keyring) == ["alice", "bob", "Alice B. Liddell"]
    assert list(keyring.values()) == [(A,), (B, C), (A,)]
    assert dict(keyring.items()) == dict(keyring)
    assert len(keyring) == 3
    assert keyring["bob"] == keyring.get("bob") == (B, C)
    assert keyring.get("carol") is None
    assert "alice" in keyring
    assert "carol" not in keyring
    with pytest.raises(KeyError):
        keyring["carol"]
    assert keyring == Keyring.load(str(path))
    assert repr(keyring) == f"<Keyring {str(path)!r} with 3 users>"


def test_a_file_without_users(path: Path) -> None:
    for text in ("", "\n", "# nobody\n"):
        write(path, text)
        assert not dict(Keyring.load(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alice", "this is not the text of a key"),
        (f"{A.to_text()} alice", "this is not the text of a key"),
        (f"alice {A.raw.hex()}", "this is not the text of a key"),
        (f"alice {A.to_text()[:-1]}", "this is not the text of a key: it has 69 characters, and not 70"),
        (f"alice {A.to_text()} # of the laptop", "this is not the text of a key"),
        (A.to_text(), "there is no user's name before the key"),
        (f"{B.to_text()} {A.to_text()}", "there is a key in the user's name"),
        (f"alice {B.to_text().upper()} {A.to_text()}", "there is a key in the user's name"),
        (f"u\u0308 {A.to_text()}", "is not in normal form C"),
        (f"u\u0308 {B.to_text()} {A.to_text()}", "there is a key in the user's name"),
        (f"a\0b {A.to_text()}", "has a control character"),
        (f"{'u' * 256} {A.to_text()}", "a user name is 1 to 255 bytes"),
        (f'"alice {A.to_text()}', "is no string of JSON"),
        (f'"alice" x {A.to_text()}', "is no string of JSON"),
        (f'"a\\nb" {A.to_text()}', "has a control character"),
        (f'"" {A.to_text()}', "a user name is 1 to 255 bytes"),
        (f'"\\ud800" {A.to_text()}', "surrogates not allowed"),
    ],
    ids=ascii,
)
def test_a_wrong_line_is_named_and_not_shown(line: str, message: str, path: Path) -> None:
    write(path, f"# first\nbob {B.to_text()}\n{line}\n")
    with pytest.raises(ValueError, match=f"^{path}, line 3: .*{message}") as caught:
        Keyring.load(path)
    check_holds_no_secret(caught.value, A.to_text()[:69], B.to_text()[:69], A.raw.hex())


def test_a_user_has_sixteen_keys_at_most(path: Path) -> None:
    lines = [f"alice {key.to_text()}\n" for key in KEYS]
    write(path, "".join(lines[:-1]))
    assert Keyring.load(path)["alice"] == tuple(KEYS[:-1])
    write(path, "".join(lines))
    with pytest.raises(ValueError, match=r"line 17: user 'alice' has more than 16 keys"):
        Keyring.load(path)


def test_a_file_that_others_can_use_is_refused(path: Path) -> None:
    write(path, f"alice {A.to_text()}\n")
    path.chmod(0o640)
    with pytest.raises(PermissionError, match=f"chmod 600 {path}"):
        Keyring.load(path)


def test_files_that_are_none(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Keyring.load(path)
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        Keyring.load(path)
    with path.open("wb") as file:
        file.truncate(MAX_KEYRING_SIZE + 1)
    with pytest.raises(ValueError, match="has more than 16777216 bytes"):
        Keyring.load(path)


def test_it_stays_the_same_file_when_the_directory_changes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, f"alice {A.to_text()}\n")
    monkeypatch.chdir(path.parent)
    keyring = Keyring.load(path.name)
    monkeypatch.chdir("/")
    keyring.add("bob", B)
    assert dict(keyring) == {"alice": (A,), "bob": (B,)}


# ---- it changes ----


def replace(path: Path, text: str) -> None:
    """Replace a file by a new one, as some editors do."""
    write(path.with_suffix(".new"), text)
    path.with_suffix(".new").rename(path)


def relink(path: Path, text: str) -> None:
    """Unpack a new version elsewhere, and replace the link to it."""
    version = path.with_suffix(f".{time.time_ns()}")
    write(version, text)
    path.with_suffix(".new").symlink_to(version)
    path.with_suffix(".new").rename(path)


CHANGES: list[Callable[[Path, str], None]] = [write, replace, relink]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_read_again(
    change: Callable[[Path, str], None], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(path, f"alice {A.to_text()}\n")
    keyring = Keyring.load(path)
    for key in (B, C, A):
        change(path, f"alice {key.to_text()}\n")
        assert keyring["alice"] == (key,)
    change(path, f"bob {B.to_text()}\nbob {A.to_text()}\n")
    assert dict(keyring) == {"bob": (B, A)}
    assert messages(caplog, logging.INFO)[-1] == f"{path} has changed and was read: 1 users"
    assert A.to_text() not in caplog.text


def test_no_change_is_missed_however_fast_they_come(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of the same size within one tick of the file system's clock, which is made to tick each second."""
    write(path, f"alice {A.to_text()}\n")
    stat_ = os.stat

    def coarse(path: Any, **kwargs: Any) -> Any:
        status = stat_(path, **kwargs)
        second = int(status.st_ctime)
        times = dict.fromkeys(("st_ctime", "st_mtime"), float(second))
        times |= dict.fromkeys(("st_ctime_ns", "st_mtime_ns"), second * 10**9)
        same = {name: getattr(status, name) for name in ("st_dev", "st_ino", "st_mode", "st_size")}
        return SimpleNamespace(**same, **times)

    monkeypatch.setattr(os, "stat", coarse)
    keyring = Keyring.load(path)
    for n in range(50):
        key = Key(n.to_bytes(32, "big"))
        with path.open("r+") as file:
            file.write(f"alice {key.to_text()}\n")
        assert keyring["alice"] == (key,)


def test_a_file_at_rest_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"alice {A.to_text()}\n")
    read: list[Path] = []

    def spy(path: Any, max_size: int) -> tuple[bytes, os.stat_result]:
        read.append(path)
        return read_private(path, max_size)

    monkeypatch.setattr(_keyring, "read_private", spy)
    keyring = Keyring.load(path)
    later = time.time() + SETTLE_TIME
    for _ in range(3):
        assert keyring["alice"] == (A,)
    assert len(read) == 4  # it may change once more without showing it
    monkeypatch.setattr(time, "time", lambda: later)
    for _ in range(3):
        assert keyring["alice"] == (A,)
    assert len(read) == 5
    write(path, f"alice {B.to_text()}\n")
    monkeypatch.setattr(time, "time", lambda: later + SETTLE_TIME)
    for _ in range(3):
        assert keyring["alice"] == (B,)
    assert len(read) == 6


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (make_unreadable, "others can read or change it: chmod 600 "),
        (break_line, "line 2: this is not the text of a key: it has 69 characters"),
        (cut_short, "line 1: this is not the text of a key: it has 61 characters"),
        (Path.unlink, "No such file or directory"),
    ],
)
@pytest.mark.parametrize("is_at_rest", [False, True])
def test_a_broken_version_is_logged_once_and_the_old_one_stays(  # noqa: PLR0917
    harm: Callable[[Path], None],
    message: str,
    is_at_rest: bool,
    path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(path, f"alice {A.to_text()}\n")
    keyring = Keyring.load(path)
    harm(path)
    if is_at_rest:
        later = time.time() + SETTLE_TIME
        monkeypatch.setattr(time, "time", lambda: later)
    for _ in range(3):
        assert dict(keyring) == {"alice": (A,)}
    [problem] = messages(caplog)
    assert problem.startswith(f"the keys read from {path} before stay in force: ")
    assert message in problem
    assert B.to_text()[:69] not in caplog.text
    for record in caplog.records:
        assert record.exc_info is None
    # Mended, and broken again, it is said again.
    for key in (B, C):
        write(path, f"alice {key.to_text()}\n")
        assert dict(keyring) == {"alice": (key,)}
        harm(path)
        assert dict(keyring) == {"alice": (key,)}
    assert len(messages(caplog)) == 3


def test_another_broken_version_is_logged_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, f"alice {A.to_text()}\n")
    keyring = Keyring.load(path)
    for n in range(3):
        for _ in range(2):
            write(path, f"alice {n}\n")
            assert keyring["alice"] == (A,)
    assert len(messages(caplog)) == 1 + 2  # of the same words, but another file
    path.unlink()
    assert keyring["alice"] == (A,)
    write(path, f"alice {A.to_text()}\n")
    assert keyring["alice"] == (A,)
    path.unlink()
    assert keyring["alice"] == (A,)
    assert len(messages(caplog)) == 3 + 2


# ---- as user_key ----


async def test_a_server_takes_it_and_keys_are_rotated(path: Path, autojump_clock: MockClock) -> None:
    keyring = Keyring.create(path)
    keyring.add("alice", A)
    listener = MemoryListener()

    async def connect(key: Key, *, is_known: bool = True) -> str | None:
        try:
            async with open_connection(listener.connect(), user="alice", key=key) as connection:
                assert connection.key_fingerprint == key.fingerprint
                [accepted] = server.connections
                assert accepted.key_fingerprint == key.fingerprint
                return accepted.key_fingerprint
        except AuthenticationError:
            assert not is_known
            return None

    async with open_server([listener], user_key=keyring) as server:
        assert await connect(A)
        await connect(B, is_known=False)
        await trio.to_thread.run_sync(keyring.add, "alice", B)
        assert {await connect(A), await connect(B)} == {A.fingerprint, B.fingerprint}
        async with open_connection(listener.connect(), user="alice", key=A) as old:
            keyring.remove("alice", A.fingerprint)
            await connect(A, is_known=False)
            # Who has got in stays, until somebody ends it.
            for connection in server.connections:
                if connection.key_fingerprint == A.fingerprint:
                    await connection.aclose()
            await old.wait_closed()
        assert await connect(B)
        write(path, "oops\n")
        assert await connect(B)


async def test_a_plain_connection_has_no_fingerprint() -> None:
    listener = MemoryListener()
    fingerprints = []

    async def note(connection: Connection) -> None:
        fingerprints.append(connection.key_fingerprint)

    async with open_server([listener], open_handler=note), open_connection(listener.connect()) as connection:
        assert connection.key_fingerprint is None
        await connection.ping()
    assert fingerprints == [None]
