"""Users and keys in PostgreSQL, looked up in threads, over a pool of connections.

python examples/users_postgres.py "host=localhost dbname=app"   a demonstration; makes the table bokbok_keys

It needs ``pip install 'psycopg[binary,pool]'``. The server needs only the right to read the table.
"""

import sys

import trio
from psycopg_pool import ConnectionPool

from bokbok_trio import AuthenticationError, Connection, Key, open_connection, open_server

SCHEMA = """
CREATE TABLE IF NOT EXISTS bokbok_keys (
    name text NOT NULL,
    key bytea NOT NULL CHECK (octet_length(key) = 32),
    PRIMARY KEY (name, key)
)
"""


class Users:
    """The users of a database, and the keys of each.

    Arguments:
        conninfo: the database, as a libpq connection string.
        connections: the most to keep open; as many look-ups run at once, and others wait.
        patience: seconds to wait for the database before a look-up fails, and its user is refused.

    All methods except `__call__` wait for the database: in a Trio task use `trio.to_thread.run_sync`.
    """

    def __init__(self, conninfo: str, *, connections: int = 4, patience: float = 5) -> None:
        # Without a limiter of its own, strangers who cause look-ups could use up all threads of the program.
        self._limiter = trio.CapacityLimiter(connections)
        self._pool = ConnectionPool(
            conninfo,
            min_size=1,
            max_size=connections,
            timeout=patience,
            kwargs={"autocommit": True, "options": f"-c statement_timeout={patience:g}s"},
            check=ConnectionPool.check_connection,  # replaces a broken connection
            open=True,
        )

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def create(self) -> None:
        """Make the table, if it is not there."""
        with self._pool.connection() as database:
            database.execute(SCHEMA)

    def add(self, user: str, key: Key) -> None:
        """Add a key of a user."""
        with self._pool.connection() as database:
            database.execute(
                "INSERT INTO bokbok_keys VALUES (%s, %s) ON CONFLICT DO NOTHING", (user, key.raw)
            )

    def remove(self, user: str, key: Key) -> None:
        """Remove a key of a user."""
        with self._pool.connection() as database:
            database.execute("DELETE FROM bokbok_keys WHERE name = %s AND key = %s", (user, key.raw))

    def find(self, user: str) -> list[Key]:
        """Return the keys of a user; none if the user is unknown."""
        with self._pool.connection() as database:
            rows = database.execute("SELECT key FROM bokbok_keys WHERE name = %s", (user,))
            return [Key(raw) for (raw,) in rows]

    async def __call__(self, user: str) -> list[Key]:
        """Like `find`, for ``user_key``: a server cancels it when the handshake takes too long."""
        return await trio.to_thread.run_sync(self.find, user, limiter=self._limiter, abandon_on_cancel=True)


async def handler(connection: Connection, request: list[bytes]) -> list[str]:
    """Answer with the user's name and key."""
    return [f"hello, {connection.user}, with the key {connection.key_fingerprint}"]


async def show(conninfo: str) -> None:
    """Let Alice in with a known key, and not with another."""
    users = Users(conninfo)
    try:
        users.create()
        known, unknown = Key.generate(), Key.generate()
        users.add("alice", known)
        async with open_server("localhost:0", handler, user_key=users) as server:
            for key in (known, unknown):
                try:
                    async with open_connection(server.addresses[0], user="alice", key=key) as connection:
                        [answer] = await connection.request([])
                        print(answer.decode())
                except AuthenticationError:
                    print("alice is not let in with the key", key.fingerprint)
        users.remove("alice", known)
    finally:
        users.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004  (one argument)
        sys.exit(__doc__)
    try:
        trio.run(show, sys.argv[1])
    except* KeyboardInterrupt:
        print("bye")
