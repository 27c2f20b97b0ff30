"""A chat: each member sees the lines of the others, and nobody waits for a slow member.

python examples/chat.py serve localhost:12345          the room
python examples/chat.py join localhost:12345 NAME      say lines of standard input, print those of others
"""

import os
import sys
from functools import partial

import trio

from bokbok_trio import BokbokError, Channel, Connection, RequestError, open_connection, open_server
from bokbok_trio.broadcast import Broadcast

ROOM = Broadcast[tuple[str, str]](when_full="drop-oldest", length=50)
"""Pairs of a name and a line."""


def as_line(text: bytes, most: int) -> str:
    """Return a text as one line that is safe to print on a terminal, cut to `most` characters."""
    return "".join(filter(str.isprintable, text.decode(errors="replace")))[:most]


async def listen(channel: Channel, task_status: trio.TaskStatus[None]) -> None:
    """Send the lines of the room, and the number of lines that were dropped."""
    missed = 0
    with ROOM.subscribe() as messages:
        task_status.started()
        async for message in messages:
            if messages.dropped > missed:
                await channel.send(["*", f"you missed {messages.dropped - missed} lines"])
                missed = messages.dropped
            await channel.send(message)


async def room(connection: Connection, request: list[bytes], channel: Channel) -> None:
    """Handle a member, from joining until leaving or until the server stops."""
    match request:
        case [b"join", name] if who := as_line(name, 20):
            pass
        case _:
            raise RequestError("only [join, NAME] is known here", code="unknown-request")
    async with trio.open_nursery() as nursery:
        await nursery.start(listen, channel)
        ROOM.publish((who, "has joined"))
        try:
            async for [line] in channel:
                ROOM.publish((who, as_line(line, 500)))
        finally:
            ROOM.publish((who, "has left"))
        nursery.cancel_scope.cancel()


async def serve(address: str) -> None:
    """Serve the room."""
    async with open_server(address, channel_handler=room) as server:
        print("serving on", *server.addresses, flush=True)
        await server.wait_stopped()


async def speak(channel: Channel) -> None:
    """Send the lines of standard input."""
    stdin, rest = sys.stdin.fileno(), b""
    while data := await trio.to_thread.run_sync(os.read, stdin, 4096, abandon_on_cancel=True):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            await channel.send([line])
    await channel.end()


async def join(address: str, name: str) -> None:
    """Join the room: send standard input, print the lines of others."""
    async with (
        open_connection(address) as connection,
        connection.open_channel(["join", name]) as channel,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(speak, channel)
        async for who, line in channel:
            print(f"{as_line(who, 20)}: {as_line(line, 500)}", flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", address]:
            main = partial(serve, address)
        case ["join", address, name]:
            main = partial(join, address, name)
        case _:
            sys.exit(__doc__)
    try:
        trio.run(main)
    except* KeyboardInterrupt:
        print("bye")
    except* (BokbokError, OSError, trio.BrokenResourceError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"chat: {error}")
