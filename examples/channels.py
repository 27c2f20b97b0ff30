"""Channels: a log that a client follows, and an upload, over a real socket: python examples/channels.py."""

import hashlib
from typing import NoReturn

import trio

from bokbok_trio import Channel, Connection, RemoteError, RequestError, open_connection, open_server


class Log:
    """Lines that are added one by one, and the channels that follow them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._grown = trio.Event()

    def write(self, line: str) -> None:
        """Add a line, and wake the followers."""
        self.lines.append(line)
        self._grown.set()
        self._grown = trio.Event()

    async def follow(self, channel: Channel) -> NoReturn:
        """Send every line, and each new line when it is added, until cancelled."""
        sent = 0
        while True:
            while sent < len(self.lines):
                await channel.send([self.lines[sent]])  # waits here for a slow reader
                sent += 1
            await self._grown.wait()


LOG = Log()


async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
    """Handle the requests that come with a channel."""
    match request:
        case [b"tail"]:
            try:
                return await LOG.follow(channel)
            finally:
                print("  server: nobody follows the log any more")
        case [b"upload", name]:
            LOG.write(f"{name.decode()} is coming")
            hashed, size = hashlib.sha256(), 0
            async for [chunk] in channel:
                hashed.update(chunk)
                size += len(chunk)
            LOG.write(f"{name.decode()} is here")
            return [str(size), hashed.hexdigest()]
        case _:
            raise RequestError(f"I do not know {request}", code="unknown-request")


async def upload(connection: Connection, name: str, content: bytes) -> None:
    """Send a file in chunks, and compare the server's digest."""
    async with connection.open_channel(["upload", name]) as channel:
        for at in range(0, len(content), 50_000):
            await channel.send([content[at : at + 50_000]])
        await channel.end()
        [size, digest] = await channel.answer()
    same = digest.decode() == hashlib.sha256(content).hexdigest()
    print(f"client: uploaded {int(size)} bytes of {name}; the digests {'match' if same else 'differ'}")


async def main() -> None:
    """Follow the log while a file is uploaded, on one connection."""
    LOG.write("the server starts")
    async with (
        open_server("localhost:0", channel_handler=handler) as server,
        open_connection(server.addresses[0]) as connection,
    ):
        async with trio.open_nursery() as nursery, connection.open_channel(["tail"]) as tail:
            nursery.start_soon(upload, connection, "big.bin", bytes(range(256)) * 4000)
            async for [line] in tail:
                print("client: the log says:", line.decode())
                if line.endswith(b"is here"):
                    break  # leaving the block cancels the server's handler

        try:
            async with connection.open_channel(["nonsense"]) as channel:
                await channel.answer()
        except RemoteError as exc:
            print("client: the answer to nonsense is an error:", exc)


if __name__ == "__main__":
    try:
        trio.run(main)
    except* KeyboardInterrupt:
        print("bye")
