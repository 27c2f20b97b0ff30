"""Users and keys in PostgreSQL, looked up in threads, over connections that are kept.

python examples/users_postgres.py "host=localhost dbname=app"   shows it; it makes the table bokbok_keys there

It needs ``pip install 'psycopg[binary,pool]'``. The role of the server needs no more than to read the table.
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
        conninfo: where the database is, as libpq has it.
        connections: how many to keep at most; so many look-ups run at once, and others wait.
        patience: seconds to wait for the database before a look-up fails, and its user is refused.

    All methods but the call wait for the database: call them by `trio.to_thread.run_sync` where others wait
    too.
    """

    def __init__(self, conninfo: str, *, connections: int = 4, patience: float = 5) -> None:
        # Of its own, or strangers who ask for users could take up all threads of the program.
        self._limiter = trio.CapacityLimiter(connections)
        self._pool = ConnectionPool(
            conninfo,
            min_size=1,
            max_size=connections,
            timeout=patience,
            kwargs={"autocommit": True, "options": f"-c statement_timeout={patience:g}s"},
            check=ConnectionPool.check_connection,  # one that was cut is replaced
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
        """Let a user in with a key, beside those that the user has."""
        with self._pool.connection() as database:
            database.execute(
                "INSERT INTO bokbok_keys VALUES (%s, %s) ON CONFLICT DO NOTHING", (user, key.raw)
            )

    def remove(self, user: str, key: Key) -> None:
        """Let a user in no more with a key."""
        with self._pool.connection() as database:
            database.execute("DELETE FROM bokbok_keys WHERE name = %s AND key = %s", (user, key.raw))

    def find(self, user: str) -> list[Key]:
        """The keys of a user; none of who is unknown."""
        with self._pool.connection() as database:
            rows = database.execute("SELECT key FROM bokbok_keys WHERE name = %s", (user,))
            return [Key(raw) for (raw,) in rows]

    async def __call__(self, user: str) -> list[Key]:
        """As `find`, for ``user_key``: a server gives up on it when the handshake takes too long."""
        return await trio.to_thread.run_sync(self.find, user, limiter=self._limiter, abandon_on_cancel=True)


async def handler(connection: Connection, request: list[bytes]) -> list[str]:
    """Say who it is."""
    return [f"hello, {connection.user}, with the key {connection.key_fingerprint}"]


async def show(conninfo: str) -> None:
    """Let Alice in with one key of two."""
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
