"""Keyrings: adding and removing keys, by several writers too."""

from __future__ import annotations

import errno
import fcntl
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
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bokbok_trio import Key, Keyring
from bokbok_trio._keyring import LOCK_TIMEOUT, MAX_KEYRING_SIZE, SETTLE_TIME
from bokbok_trio._keys import encode_user

from ..support.helpers import check_holds_no_secret
from ..support.keyring_files import KEYS, A, B, C, break_line, cut_short, make_unreadable, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.keys"


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
