"""Both sides in one program, over a real socket, encrypted: python examples/demo.py."""

import trio

import bokbok_trio
from bokbok_trio import Connection, Key, RemoteError, RequestError


async def server_handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
    """Answer the client's requests."""
    print(f"  server: {connection.user} asks {request}")
    match request:
        case [b"hello", name]:
            return [b"hello, " + name]
        case [b"greet me back"]:
            [name] = await connection.request(["who are you?"])
            return [b"good to see you, " + name]
        case [b"count", upto]:
            await trio.sleep(0.1)
            return [str(n) for n in range(1, int(upto) + 1)]
        case [b"shutdown-server"]:
            assert connection.server is not None
            connection.server.stop()
            return ["as you wish"]
        case _:
            raise RequestError(f"I do not know {request}", code="unknown-request")


async def client_handler(connection: Connection, request: list[bytes]) -> list[str]:
    """Answer the server's requests: the connection goes both ways."""
    print(f"  client: the {'server' if connection.side == 'client' else 'client'} asks {request}")
    await trio.sleep(0.1)
    return ["a demo"]


async def ask(connection: Connection, *request: str) -> None:
    """Make a request and show its answer."""
    answer = await connection.request(request)
    print(f"{connection.side} asked {list(request)}, and the answer is {answer}")


async def main() -> None:
    """Run the demonstration."""
    key = Key.generate()
    async with bokbok_trio.open_server("localhost:0", server_handler, user_key={"alice": key}) as server:
        print("serving on", *server.addresses)
        async with bokbok_trio.open_connection(
            server.addresses[0], user="alice", key=key, request_handler=client_handler
        ) as connection:
            print("connected, encrypted and authenticated:", connection)

            await ask(connection, "hello", "server")

            try:
                await ask(connection, "make me coffee")
            except RemoteError as exc:
                print("client sees the error of the other side:", exc)

            await ask(connection, "greet me back")

            print("now four requests at once, two each way:")
            [other_end] = server.connections
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, connection, "count", "3")
                nursery.start_soon(ask, connection, "count", "5")
                nursery.start_soon(ask, other_end, "who are you?")
                nursery.start_soon(ask, other_end, "are you sure?")

            await ask(connection, "shutdown-server")
        await server.wait_stopped()
    print("stopped")

    try:
        async with bokbok_trio.open_connection(server.addresses[0], user="alice", key=key):
            raise AssertionError("nobody should be there")
    except OSError as exc:
        print("the server is gone:", exc)


if __name__ == "__main__":
    try:
        trio.run(main)
    except* KeyboardInterrupt:
        print("bye")
