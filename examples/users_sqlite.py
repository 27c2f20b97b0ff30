"""Users and keys in SQLite, looked up in threads, so that a slow disk or a lock does not block Trio.

python examples/users_sqlite.py            a demonstration, with a file of its own
python examples/users_sqlite.py users.db   the same with that file, which is made if necessary
"""

import os
import sqlite3
import sys
import tempfile
from contextlib import closing

import trio

from bokbok_trio import AuthenticationError, Connection, Key, open_connection, open_server

SCHEMA = """
PRAGMA journal_mode = WAL;  -- writers do not block readers
CREATE TABLE IF NOT EXISTS keys (
    user TEXT NOT NULL,
    key BLOB NOT NULL CHECK (length(key) = 32),
    PRIMARY KEY (user, key)
) WITHOUT ROWID;
"""


class Users:
    """The users of a database, and the keys of each.

    `add` and `remove` wait for the disk: in a Trio task call them by `trio.to_thread.run_sync`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # Without a limiter of its own, strangers who cause look-ups could use up all threads of the program.
        self._limiter = trio.CapacityLimiter(8)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # the file has keys in it
        with closing(self._connect()) as database:
            database.executescript(SCHEMA)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=5)

    def add(self, user: str, key: Key) -> None:
        """Add a key of a user."""
        with closing(self._connect()) as database, database:
            database.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (user, key.raw))

    def remove(self, user: str, key: Key) -> None:
        """Remove a key of a user."""
        with closing(self._connect()) as database, database:
            database.execute("DELETE FROM keys WHERE user = ? AND key = ?", (user, key.raw))

    def find(self, user: str) -> list[Key]:
        """Return the keys of a user; none if the user is unknown."""
        with closing(self._connect()) as database:
            rows = database.execute("SELECT key FROM keys WHERE user = ?", (user,))
            return [Key(raw) for (raw,) in rows]

    async def __call__(self, user: str) -> list[Key]:
        """Like `find`, for ``user_key``: a server cancels it when the handshake takes too long."""
        return await trio.to_thread.run_sync(self.find, user, limiter=self._limiter, abandon_on_cancel=True)


async def handler(connection: Connection, request: list[bytes]) -> list[str]:
    """Answer with the user's name and key."""
    return [f"hello, {connection.user}, with the key {connection.key_fingerprint}"]


async def show(path: str) -> None:
    """Let Alice in, give her a new key, and remove the old one."""
    users = Users(path)
    old, new = Key.generate(), Key.generate()
    users.add("alice", old)
    async with open_server("localhost:0", handler, user_key=users) as server:

        async def greet(key: Key) -> None:
            try:
                async with open_connection(server.addresses[0], user="alice", key=key) as connection:
                    [answer] = await connection.request([])
                    print(answer.decode())
            except AuthenticationError:
                print("alice is not let in with the key", key.fingerprint)

        await greet(old)
        await greet(new)
        await trio.to_thread.run_sync(users.add, "alice", new)
        await greet(old)
        await greet(new)
        await trio.to_thread.run_sync(users.remove, "alice", old)
        await greet(old)
        await greet(new)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        path = sys.argv[1] if sys.argv[1:] else os.path.join(directory, "users.db")
        try:
            trio.run(show, path)
        except* KeyboardInterrupt:
            print("bye")
