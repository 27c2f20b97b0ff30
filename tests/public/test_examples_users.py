"""The examples that find users in databases: what they show, and that a look-up holds nobody up."""

from __future__ import annotations

import glob
import logging
import os
import pwd
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import AuthenticationError, Key, open_connection, open_server
from tests.support.helpers import load_example

EXAMPLES = Path(__file__).parents[2] / "examples"
A, B = Key(bytes(range(32))), Key(bytes(range(32, 64)))


def run_example(name: str, argument: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), argument]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=True)
    return run.stdout.splitlines()


def check_story(story: list[str], expected: str) -> None:
    """A letter for each line: who was let in, lower case, or not, upper case, with which key."""
    letters: dict[str, str] = {}
    for line, letter in zip(story, expected, strict=True):
        who, _, fingerprint = line.rpartition(" ")
        assert letters.setdefault(letter.lower(), fingerprint) == fingerprint
        let_in = "hello, alice, with the key" if letter.islower() else "alice is not let in with the key"
        assert who == let_in
    assert len(set(letters.values())) == len(letters)


async def check_holds_nobody_up(users: Any, hold: Callable[[], AbstractContextManager[object]]) -> None:
    """While a look-up waits for the database, which is held, connections go on."""
    found: list[str | None] = []
    async with open_server("127.0.0.1:0", user_key=users) as server:
        with trio.fail_after(20):
            async with (
                open_connection(server.addresses[0], user="alice", key=A) as connection,
                trio.open_nursery() as nursery,
            ):
                with hold():

                    @nursery.start_soon
                    async def connect() -> None:
                        async with open_connection(server.addresses[0], user="alice", key=A) as another:
                            found.append(another.key_fingerprint)

                    while not server.statistics().handshakes:
                        await connection.ping()
                    for _ in range(100):
                        assert await connection.ping() < 1
                    assert not found
    assert found == [A.fingerprint]


# ---- SQLite ----


def test_sqlite_shows_how_keys_are_rotated(tmp_path: Path) -> None:
    path = tmp_path / "users.db"
    check_story(run_example("users_sqlite", str(path)), "aBabAb")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM keys").fetchone() == (1,)
        with pytest.raises(sqlite3.IntegrityError):
            database.execute("INSERT INTO keys VALUES ('bob', x'00')")


async def test_sqlite_that_waits_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "users.db"
    users = load_example("users_sqlite").Users(str(path))
    users.add("alice", A)
    users.add("alice", A)

    @contextmanager
    def hold() -> Iterator[None]:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("BEGIN IMMEDIATE")
            yield

    await check_holds_nobody_up(users, hold)
    users.remove("alice", A)
    assert await users("alice") == []


# ---- PostgreSQL ----


def find_postgres() -> list[str]:
    """Where its programs initdb and postgres are."""
    path = [os.environ.get("PATH", ""), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    programs = [shutil.which(name, path=os.pathsep.join(path)) for name in ("initdb", "postgres")]
    if None in programs:
        pytest.skip("PostgreSQL is not installed here: there are no initdb and postgres")
    return [program for program in programs if program]


def find_account() -> dict[str, Any]:
    """Who runs it: not root, which it refuses."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no other user here")


@pytest.fixture(scope="module")
def psycopg() -> Any:
    pytest.importorskip("psycopg_pool", reason="psycopg_pool is not installed: pip install '.[examples]'")
    return pytest.importorskip("psycopg", reason="psycopg is not installed: pip install '.[examples]'")


@pytest.fixture(scope="module")
def postgres(psycopg: Any) -> Iterator[str]:
    """A PostgreSQL of our own, empty, on a UNIX socket; as libpq has its address."""
    [initdb, postgres], account = find_postgres(), find_account()
    directory = tempfile.mkdtemp(prefix="bokbok-pg-", dir="/tmp")  # a socket's path is short
    try:
        if account:
            os.chown(directory, account["user"], account["group"])
        data = f"{directory}/data"
        options = ["-N", "-A", "trust", "-U", "app", "--no-locale", "-E", "UTF8", "-D", data]
        made = subprocess.run(
            [initdb, *options],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
            **account,
        )
        assert made.returncode == 0, made.stdout
        options = ["-D", data, "-k", directory, "-F", "-c", "listen_addresses="]
        with (
            open(f"{directory}/log", "wb") as log,
            subprocess.Popen(
                [postgres, *options], cwd=directory, stdout=log, stderr=log, **account
            ) as server,
        ):
            try:
                conninfo = f"host={directory} user=app dbname=postgres"
                give_up_at = time.monotonic() + 30
                while True:
                    try:
                        psycopg.connect(conninfo).close()
                        break
                    except psycopg.OperationalError as exc:
                        if server.poll() is not None or time.monotonic() > give_up_at:
                            raise AssertionError(Path(log.name).read_text()) from exc
                    time.sleep(0.02)
                yield conninfo
            finally:
                server.send_signal(signal.SIGQUIT)  # it has nothing to keep
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def users(postgres: str) -> Iterator[Any]:
    users = load_example("users_postgres").Users(postgres, patience=5)
    try:
        users.create()
        users.create()
        for _ in range(2):
            users.add("alice", A)
        yield users
        for key in (A, B):
            users.remove("alice", key)
    finally:
        users.close()


def test_postgres_shows_who_is_let_in(postgres: str) -> None:
    check_story(run_example("users_postgres", postgres), "aB")


async def test_keys_are_rotated_in_postgres(users: Any) -> None:
    assert await users("alice") == [A]
    users.add("alice", B)
    assert {*await users("alice")} == {A, B}
    users.remove("alice", A)
    assert await users("alice") == [B]
    assert await users("nobody") == []


async def test_postgres_that_waits_holds_nobody_up(users: Any, postgres: str, psycopg: Any) -> None:
    @contextmanager
    def hold() -> Iterator[None]:
        with psycopg.connect(postgres) as database:
            database.execute("LOCK TABLE bokbok_keys IN ACCESS EXCLUSIVE MODE")
            yield

    await check_holds_nobody_up(users, hold)


async def test_users_are_found_after_postgres_has_cut_all_connections(
    users: Any, postgres: str, psycopg: Any
) -> None:
    assert await users("alice") == [A]
    with psycopg.connect(postgres, autocommit=True) as database:
        cut = database.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
    assert cut
    assert all(done for (done,) in cut)
    assert await users("alice") == [A]


async def test_nobody_gets_in_while_the_database_is_away(
    psycopg: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users = load_example("users_postgres").Users(f"host={tmp_path}", patience=0.2)
    try:
        async with open_server("127.0.0.1:0", user_key=users) as server:
            with pytest.raises(AuthenticationError):
                async with open_connection(server.addresses[0], user="alice", key=A):
                    pass
    finally:
        users.close()
    [failed] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert failed.getMessage() == "looking up the key of user 'alice' failed"
