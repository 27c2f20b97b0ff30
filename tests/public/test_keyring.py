from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from bokbok_trio import (
    AuthenticationError,
    Connection,
    Key,
    Keyring,
    _keyring,
    open_connection,
    open_server,
)
from bokbok_trio._keyring import LOCK_TIMEOUT, MAX_KEYRING_SIZE, SETTLE_TIME
from bokbok_trio._keys import MAX_KEYS, encode_user
from bokbok_trio._private_files import read_private
from bokbok_trio.testing import MemoryListener

from ..support.helpers import check_holds_no_secret

A, B, C = (Key(bytes([n]) * 32) for n in (1, 2, 3))
KEYS = [Key(bytes([n]) * 32) for n in range(MAX_KEYS + 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.keys"


def write(path: Path, text: str) -> None:
    """As an editor does that writes into the file itself."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)


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
    """As an editor does that puts a new file in the place of the old one."""
    write(path.with_suffix(".new"), text)
    path.with_suffix(".new").rename(path)


def relink(path: Path, text: str) -> None:
    """As what unpacks a new version elsewhere, and has a link to it."""
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


def make_unreadable(path: Path) -> None:
    path.chmod(0o640)


def break_line(path: Path) -> None:
    write(path, f"alice {A.to_text()}\nbob {B.to_text()[:-1]}\n")


def cut_short(path: Path) -> None:
    write(path, f"alice {A.to_text()[:-9]}")


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


# ---- writing ----


def test_it_is_made_and_filled(path: Path) -> None:
    keyring = Keyring.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not keyring
    keyring.add("alice", A)
    keyring.add("bob", B)
    keyring.add("alice", C)
    keyring.add("alice", A)  # again
    assert dict(keyring) == dict(Keyring.load(path)) == {"alice": (A, C), "bob": (B,)}
    first, *rest = path.read_text().splitlines()
    assert first.startswith("# ")
    assert rest == [f"alice {A.to_text()}", f"bob {B.to_text()}", f"alice {C.to_text()}"]
    with pytest.raises(FileExistsError):
        Keyring.create(path)
    assert len(Keyring.load(path)) == 2


@pytest.mark.parametrize("end", ["", "\n", "\n\n# the end"])
def test_comments_and_the_rest_stay_as_they_are(end: str, path: Path) -> None:
    text = f"# Staff\n\n  alice\t{A.to_text()}\r\nbob {B.to_text()}\nalice  {C.to_text()}{end}"
    write(path, text)
    keyring = Keyring.load(path)
    keyring.add("carol", A)
    added = text if text.endswith("\n") else f"{text}\n"
    assert path.read_bytes().decode() == f"{added}carol {A.to_text()}\n"
    keyring.remove("carol")
    keyring.remove("alice", A)
    assert (
        path.read_bytes().decode()
        == f"# Staff\n\nbob {B.to_text()}\n{added.partition('B.to_text()')[0][added.index('alice  ') :]}"
    )
    assert dict(keyring) == {"bob": (B,), "alice": (C,)}


def test_keys_are_removed(path: Path) -> None:
    keyring = Keyring.create(path)
    for user, key in (("alice", A), ("bob", A), ("alice", B), ("alice", C)):
        keyring.add(user, key)
    keyring.remove("alice", B)
    assert dict(keyring) == {"alice": (A, C), "bob": (A,)}
    keyring.remove("alice", A.fingerprint)
    assert dict(keyring) == {"alice": (C,), "bob": (A,)}
    for wrong in (A, A.fingerprint, "", C.to_text()):
        with pytest.raises(ValueError, match=r"^user 'alice' has no such key$") as caught:
            keyring.remove("alice", wrong)
        check_holds_no_secret(caught.value, C.to_text())
    keyring.remove("bob")
    assert dict(keyring) == {"alice": (C,)}
    for which in (None, B):
        with pytest.raises(KeyError, match="bob"):
            keyring.remove("bob", which)
    keyring.remove("alice")
    assert dict(keyring) == dict(Keyring.load(path)) == {}


ODD = [
    *(
        "my user",
        "a  b",
        "J\u00fcrgen",
        "#1",
        '"quoted"',
        '"',
        " a",
        "a ",
        "\u00a0a",
        "a\u3000",
        "\u200b",
        "a\u2028b",
    ),
    *("\ufeff", "\U0001f511", "\\", "u" * 255, "bokbok-key-", "alice # of wonderland", "\u202ebob"),
]


def test_odd_names(path: Path) -> None:
    keyring = Keyring.create(path)
    for user in ODD:
        keyring.add(user, A)
        keyring.add(user, B)
    assert list(keyring.items()) == list(Keyring.load(path).items()) == [(user, (A, B)) for user in ODD]
    for line in path.read_text().split("\n"):
        assert line.isprintable()
    for user in ODD:
        keyring.remove(user)
    assert not keyring


@settings(deadline=None, max_examples=50)
@given(users=st.lists(st.text(min_size=1, max_size=5) | st.sampled_from(ODD), max_size=5))
def test_any_name_is_added_or_refused(users: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    keyring = Keyring.create(tmp_path_factory.mktemp("keyring") / "users")
    added: dict[str, tuple[Key, ...]] = {}
    for user in users:
        try:
            encode_user(user)
        except ValueError:
            with pytest.raises(ValueError, match=r"user name|surrogates"):
                keyring.add(user, A)
        else:
            keyring.add(user, A)
            added[user] = (A,)
    assert dict(keyring) == added


@pytest.mark.parametrize(
    ("user", "key", "error", "message"),
    [
        ("", A, ValueError, "a user name is 1 to 255 bytes"),
        ("u\u0308", A, ValueError, "is not in normal form C"),
        (f"x {B.to_text().upper()}", A, ValueError, "there is a key in the user's name"),
        (b"alice", A, TypeError, "a user name is a str, not bytes"),
        ("alice", A.raw, TypeError, "key must be a Key, not bytes"),
        ("alice", A.to_text(), TypeError, "key must be a Key, not str"),
    ],
)
def test_what_cannot_be_added(user: Any, key: Any, error: type[Exception], message: str, path: Path) -> None:
    keyring = Keyring.create(path)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        keyring.add(user, key)
    assert path.read_bytes() == before


def test_one_key_too_many_is_not_added(path: Path) -> None:
    keyring = Keyring.create(path)
    for key in KEYS[:-1]:
        keyring.add("alice", key)
    with pytest.raises(ValueError, match="user 'alice' has more than 16 keys"):
        keyring.add("alice", KEYS[-1])
    assert keyring["alice"] == tuple(KEYS[:-1])


def test_a_file_does_not_grow_too_large(path: Path) -> None:
    write(path, "#" * MAX_KEYRING_SIZE)
    keyring = Keyring.load(path)
    with pytest.raises(ValueError, match="would have more than 16777216 bytes"):
        keyring.add("alice", A)
    assert path.stat().st_size == MAX_KEYRING_SIZE


@pytest.mark.parametrize("harm", [break_line, cut_short, make_unreadable, Path.unlink])
def test_a_broken_file_is_not_written(harm: Callable[[Path], None], path: Path) -> None:
    keyring = Keyring.create(path)
    harm(path)
    before = path.read_bytes() if path.exists() else None
    for change in (partial(keyring.add, "alice", B), partial(keyring.remove, "alice")):
        with pytest.raises((ValueError, OSError)) as caught:
            change()
        check_holds_no_secret(caught.value, A.to_text()[:50], B.to_text()[:50])
    assert (path.read_bytes() if path.exists() else None) == before


def test_what_changed_in_the_file_meanwhile_is_kept(path: Path) -> None:
    keyring = Keyring.create(path)
    write(path, f"bob {B.to_text()}\n")
    keyring.add("alice", A)
    assert dict(keyring) == {"bob": (B,), "alice": (A,)}


def test_a_link_stays_a_link(path: Path) -> None:
    (path.parent / "real").mkdir()
    real = path.parent / "real" / "users"
    path.symlink_to(real)
    write(real, f"alice {A.to_text()}\n")
    keyring = Keyring.load(path)
    keyring.add("bob", B)
    assert path.is_symlink()
    assert dict(keyring) == dict(Keyring.load(real)) == {"alice": (A,), "bob": (B,)}
    assert os.listdir(real.parent) == ["users"]


@pytest.mark.parametrize("step", ["fsync", "replace", "fchown"])
def test_a_failure_leaves_the_file_as_it_was(step: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring.create(path)
    keyring.add("alice", A)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr(os, step, fail)
        keyring.add("bob", B)
    check_holds_no_secret(caught.value, A.to_text(), B.to_text())
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert dict(keyring) == {"alice": (A,)}


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_mode_and_owner_stay(mode: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring.create(path)
    if os.getuid() == 0:
        os.chown(path, 12345, 23456)
        path.chmod(mode)
    before = path.stat()
    keyring.add("alice", A)
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)


# ---- many ----


def test_concurrent_writers_lose_nothing(path: Path) -> None:
    """Processes and threads, all of them on the same file; and somebody who looks on."""
    keyring = Keyring.create(path)
    code = """
import sys
from bokbok_trio import Key, Keyring
keyring = Keyring.load(sys.argv[1])
for n in range(10):
    keyring.add(f"{sys.argv[2]} {n}", Key.generate())
    if n % 2:
        keyring.remove(f"{sys.argv[2]} {n}")
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, path, str(n)]) for n in range(3)]

    def write_here(name: str) -> None:
        for n in range(10):
            keyring.add(f"{name} {n}", A)
            keyring.remove(f"{name} {n}")
            keyring.add(f"{name} {n}", B)

    threads = [threading.Thread(target=write_here, args=(f"thread {n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads) or any(writer.poll() is None for writer in writers):
        seen = max(seen, len(Keyring.load(path)), len(keyring))
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    expected = {f"{n} {m}" for n in range(3) for m in range(0, 10, 2)}
    expected |= {f"thread {n} {m}" for n in range(2) for m in range(10)}
    assert set(keyring) == set(Keyring.load(path)) == expected
    assert seen > 10
    assert os.listdir(path.parent) == [path.name]


def test_a_writer_does_not_wait_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring.create(path)
    now = [0.0]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    with path.open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: now[0])
            patch.setattr(time, "sleep", pass_time)
            with pytest.raises(TimeoutError, match=f"has had it locked for 10 s: '{path}'"):
                keyring.add("alice", A)
    assert LOCK_TIMEOUT < now[0] < LOCK_TIMEOUT + 1
    keyring.add("alice", A)
    assert dict(keyring) == {"alice": (A,)}


@pytest.fixture
def many(path: Path) -> list[tuple[str, Key]]:
    users = [(f"user {n}", Key(n.to_bytes(32, "big"))) for n in range(10_000)]
    write(path, "".join(f"{user} {key.to_text()}\n" for user, key in users))
    return users


def test_ten_thousand_users(many: list[tuple[str, Key]], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring.load(path)
    keyring.add("new", A)
    users = [*many, ("new", A)]
    decoded: list[str] = []
    from_text = Key.from_text

    def spy(text: str) -> Key:
        decoded.append(text)
        return from_text(text)

    monkeypatch.setattr(Key, "from_text", spy)
    assert len(keyring) == len(users)
    assert decoded == [A.to_text()]  # those that were there are not decoded again
    later = time.time() + SETTLE_TIME
    monkeypatch.setattr(time, "time", lambda: later)
    for user, key in random.sample(users, 1000):
        assert keyring[user] == (key,)
        assert f"not {user}" not in keyring
    took = time.perf_counter()
    for user, _ in users:
        keyring[user]
    took = time.perf_counter() - took
    assert took < 1  # some 3 us each; and 3 ms if it read the file, or looked through it


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
