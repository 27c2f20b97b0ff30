"""A server with three requests: ping, asynch and shutdown-server.

python examples/server.py localhost:12345               plain
python examples/server.py localhost:12345 users.txt     encrypted; lines of "NAME KEY-IN-HEX"
python examples/server.py /tmp/demo.sock                on a UNIX socket
"""

import sys
from functools import partial
from pathlib import Path

import trio

from bokbok_trio import BokbokError, Connection, Key, RequestError, Server, serve


def read_keys(path: str) -> dict[str, Key]:
    """Read a file of lines "NAME KEY-IN-HEX"."""
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    return {name: Key(bytes.fromhex(key)) for name, key in lines}


async def call_back(connection: Connection) -> None:
    """Call the client four times, one second apart, unless it goes away."""
    try:
        for n in range(1, 5):
            await trio.sleep(1)
            answer = await connection.request(["callback", str(n)])
            print(f"{connection.address}: callback {n} was answered {answer}")
    except BokbokError as exc:
        print(f"{connection.address}: no more callbacks: {exc}")


async def main(address: str, users: str | None = None) -> None:
    """Serve until a client says shutdown-server."""
    async with trio.open_nursery() as background:

        async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
            print(f"{connection.user or connection.address} asks {request}")
            match request:
                case [b"ping", text]:
                    return ["pong", text]
                case [b"asynch"]:
                    background.start_soon(call_back, connection)
                    return ["I will call you back"]
                case [b"shutdown-server"]:
                    assert connection.server is not None
                    connection.server.stop()
                    return ["stopping"]
                case _:
                    raise RequestError("unknown request", code="unknown-request")

        user_key = read_keys(users) if users else None
        server: Server = await background.start(partial(serve, address, handler, user_key=user_key))
        print("serving", "sealed" if user_key else "plain", "on", *server.addresses)
        await server.wait_stopped()
        background.cancel_scope.cancel()
    print("stopped")


if __name__ == "__main__":
    trio.run(partial(main, *sys.argv[1:]))
