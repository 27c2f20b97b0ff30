"""Files over a connection: put and get, with progress; a broken transfer is resumed.

python examples/files.py                                    both sides in one program, with a line that breaks
python examples/files.py serve localhost:12345 FOLDER       a server for the files in a folder
python examples/files.py put localhost:12345 FILE           send it a file
python examples/files.py get localhost:12345 NAME           fetch one into this folder
"""

import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from bokbok_trio import BokbokError, Channel, Connection, RequestError, Server, open_connection, open_server
from bokbok_trio.files import receive_file, safe_name, send_file

MAX_SIZE = 2**30


class Store:
    """The files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def handle(self, _: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        """Handle a request; the answer is the digest of the file."""
        match request:
            case [b"put", name]:
                return [await receive_file(channel, self.folder / safe_name(name), max_size=MAX_SIZE)]
            case [b"get", name]:
                try:
                    return [await send_file(channel, self.folder / safe_name(name))]
                except FileNotFoundError:
                    raise RequestError("there is no such file", code="not-found") from None
            case _:
                raise RequestError("only [put, NAME] and [get, NAME] are known here", code="unknown-request")


def show(done: int, size: int) -> None:
    """Show the progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{done * 100 // max(size, 1):3} %", end="\n" if done == size else "", file=sys.stderr)


async def put(connection: Connection, path: Path) -> None:
    """Send a file."""
    async with connection.open_channel(["put", path.name]) as channel:
        digest = await send_file(channel, path, progress=show)
    print(f"put {path.name}, digest {digest.hex()[:16]}")


async def get(connection: Connection, name: str, folder: Path) -> None:
    """Fetch a file into a folder."""
    async with connection.open_channel(["get", name]) as channel:
        digest = await receive_file(channel, folder / safe_name(name), max_size=MAX_SIZE, progress=show)
    print(f"got {name}, digest {digest.hex()[:16]}")


async def stop_on_signals(server: Server, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM and Ctrl-C give requests in flight ten seconds; a second signal ends them at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        for grace in (10, 0):
            await anext(signals)
            server.stop(grace)


async def serve(address: str, folder: str) -> None:
    """Serve the files until a signal comes."""
    async with (
        open_server(address, channel_handler=Store(Path(folder)).handle) as server,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(stop_on_signals, server)
        print("serving on", *server.addresses, flush=True)
        await server.wait_stopped()
        nursery.cancel_scope.cancel()
    print("stopped")


async def client(address: str, what: str, name: str) -> None:
    """Put or get one file."""
    async with open_connection(address) as connection:
        if what == "put":
            await put(connection, Path(name))
        else:
            await get(connection, name, Path())


async def demo() -> None:
    """Put a file, break the transfer off half-way, resume it, and fetch the file back."""
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as here:
        source = trio.Path(here, "report.bin")
        await source.write_bytes(os.urandom(8_000_000))
        reached: list[int] = []

        async with (
            open_server("localhost:0", channel_handler=Store(Path(there)).handle) as server,
            open_connection(server.addresses[0]) as connection,
        ):
            with trio.CancelScope() as scope:
                async with connection.open_channel(["put", source.name]) as channel:
                    await send_file(
                        channel, source, progress=lambda done, size: done > size / 2 and scope.cancel()
                    )
            print("broken off half-way:", scope.cancelled_caught)
            print("the server has", *os.listdir(there))

            async with connection.open_channel(["put", source.name]) as channel:
                await send_file(channel, source, progress=lambda done, _: reached.append(done))
            print("resumed where it broke off:", reached[0] > 0)
            print("the server has", *os.listdir(there))

            await source.unlink()
            await get(connection, source.name, Path(here))
            copy = trio.Path(there, source.name)
            print("the copy is the same:", await source.read_bytes() == await copy.read_bytes())


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main = demo
        case ["serve", address, folder]:
            main = partial(serve, address, folder)
        case ["put" | "get" as what, address, name]:
            main = partial(client, address, what, name)
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
        sys.exit(f"files: {error}")
