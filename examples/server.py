"""A server with three requests: ping, asynch and shutdown-server.

python examples/server.py localhost:12345               plain
python examples/server.py localhost:12345 users.keys    encrypted, for the users of that file
python examples/server.py /tmp/demo.sock                on a UNIX socket

This makes such a file, with one user:

python -c "from bokbok_trio import Key, Keyring; Keyring.create('users.keys').add('alice', Key.generate())"
"""

import signal
import sys
from functools import partial

import trio

from bokbok_trio import BokbokError, Connection, Keyring, RequestError, Server, serve


async def call_back(connection: Connection) -> None:
    """Call the client four times, one second apart, unless it goes away."""
    try:
        for n in range(1, 5):
            await trio.sleep(1)
            answer = await connection.request(["callback", str(n)])
            print(f"{connection.address}: the answer to callback {n} is {answer}")
    except BokbokError as exc:
        print(f"{connection.address}: no more callbacks: {exc}")


async def stop_on_signals(server: Server, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM and Ctrl-C give requests in flight ten seconds; a second signal ends them at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        for grace in (10, 0):
            await anext(signals)
            server.stop(grace)


async def main(address: str, users: str | None = None) -> None:
    """Serve until a client says shutdown-server, or a signal comes."""
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

        user_key = Keyring.load(users) if users else None
        server: Server = await background.start(partial(serve, address, handler, user_key=user_key))
        await background.start(stop_on_signals, server)
        print("serving", "plain" if user_key is None else "sealed", "on", *server.addresses, flush=True)
        await server.wait_stopped()
        background.cancel_scope.cancel()
    print("stopped")


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        sys.exit(__doc__)
    try:
        trio.run(partial(main, *sys.argv[1:]))
    except* KeyboardInterrupt:
        print("bye")
    except* (BokbokError, OSError, ValueError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"server: {error}")
