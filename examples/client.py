"""A client of examples/server.py: it pings the server, handles callbacks, and may shut the server down.

python examples/client.py localhost:12345                           plain
python examples/client.py localhost:12345 users.keys NAME           encrypted, with that user's key
python examples/client.py localhost:12345 users.keys NAME shutdown  and shut the server down
"""

import sys
from functools import partial

import trio

from bokbok_trio import BokbokError, Connection, Keyring, RemoteError, open_connection


async def main(address: str, users: str | None = None, user: str | None = None, *what: str) -> None:
    """Talk to the server for about five seconds."""
    called = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        print(f"the server calls: {request}")
        await trio.lowlevel.checkpoint()
        if request == [b"callback", b"4"]:
            called.set()
        return [b"thank you"]

    key = Keyring.load(users)[user][0] if users and user else None
    async with open_connection(address, user=user, key=key, request_handler=handler) as connection:
        print("connected:", connection)
        print("the answer to ping is", await connection.request(["ping", "12345"]))
        try:
            await connection.request(["nonsense"])
        except RemoteError as exc:
            print("the answer to nonsense is an error:", exc)
        print("the answer to asynch is", await connection.request(["asynch"]))
        with trio.move_on_after(10):
            await called.wait()
        if "shutdown" in what:
            print("the answer to shutdown-server is", await connection.request(["shutdown-server"]))


if __name__ == "__main__":
    if len(sys.argv) not in {2, 4, 5}:
        sys.exit(__doc__)
    try:
        trio.run(partial(main, *sys.argv[1:]))
    except* KeyboardInterrupt:
        print("bye")
    except* (BokbokError, OSError, ValueError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"client: {error}")
