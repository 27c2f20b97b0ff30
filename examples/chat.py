"""A chat: each member sees the lines of the others, and nobody waits for a slow member.

python examples/chat.py serve localhost:12345          the room
python examples/chat.py join localhost:12345 NAME      say lines of standard input, print those of others
"""

import os
import signal
import sys
from contextlib import suppress
from functools import partial

import trio

from bokbok_trio import BokbokError, Channel, Connection, RequestError, Server, open_connection, open_server
from bokbok_trio.broadcast import Broadcast

ROOM = Broadcast[tuple[str, str]](when_full="drop-oldest", length=50)
"""Pairs of a name and a line."""


def as_line(text: bytes, most: int) -> str:
    """Return a text as one line that is safe to print on a terminal, cut to `most` characters."""
    head = text[: 4 * most].decode(errors="replace")  # a long text would block everyone in the room
    return "".join(filter(str.isprintable, head))[:most]


def say(who: str, line: str) -> None:
    """Send a line to all members."""
    with suppress(trio.ClosedResourceError):  # the room is closed, and has no members
        ROOM.publish((who, line))


async def room(connection: Connection, request: list[bytes], channel: Channel) -> None:
    """Handle a member, from joining until leaving or until the room is closed."""
    match request:
        case [b"join", name] if who := as_line(name, 20):
            pass
        case _:
            raise RequestError("only [join, NAME] is known here", code="unknown-request")
    with ROOM.subscribe() as messages:
        say(who, "has joined")
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                try:
                    async for fields in channel:
                        for line in fields:
                            say(who, as_line(line, 500))
                finally:
                    say(who, "has left")
                nursery.cancel_scope.cancel()

            nursery.start_soon(hear)
            missed = 0
            async for message in messages:
                if messages.dropped > missed:
                    await channel.send(["*", f"you missed {messages.dropped - missed} lines"])
                    missed = messages.dropped
                await channel.send(message)
            nursery.cancel_scope.cancel()


async def stop_on_signals(server: Server, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM and Ctrl-C close the room, so all members leave; a second signal ends the server at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        for grace in (10, 0):
            await anext(signals)
            ROOM.close()
            server.stop(grace)


async def serve(address: str) -> None:
    """Serve the room until a signal comes."""
    async with open_server(address, channel_handler=room) as server, trio.open_nursery() as nursery:
        await nursery.start(stop_on_signals, server)
        print("serving on", *server.addresses, flush=True)
        await server.wait_stopped()
        nursery.cancel_scope.cancel()
    print("stopped")


async def speak(channel: Channel) -> None:
    """Send the lines of standard input."""
    stdin, rest = sys.stdin.fileno(), b""
    while data := await trio.to_thread.run_sync(os.read, stdin, 4096, abandon_on_cancel=True):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            await channel.send([line])
    if rest:
        await channel.send([rest])
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
    except* (BokbokError, OSError, ValueError, trio.BrokenResourceError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sys.exit(f"chat: {error}")
