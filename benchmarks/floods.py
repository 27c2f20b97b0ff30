"""Floods: how long a client waits for its answers while others flood the server.

python benchmarks/floods.py [--kinds ping,records,...] [--flooders 1] [--seconds 4]

A server, a process of flooders and a client that asks one request after another, five milliseconds apart,
over loopback. A flooder has the key, and sends one kind of packet as fast as the server takes it; where the
server ends its connection, it comes back. Prints the client's median and 99th percentile, quiet and with
each kind of flood.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import trio
import trio.lowlevel

from bokbok_trio import BokbokError, Key, Settings, open_connection, open_server
from bokbok_trio._protocol.packets import encode_body, encode_packet
from bokbok_trio._stream.establish import establish_as_client
from bokbok_trio._stream.secretbox import SecretboxStream

KEY = Key(bytes(range(32)))

CHUNK = 2**16
"""Bytes that a flooder sends at once, about."""

PAUSE = 0.005
"""Seconds between two requests of the client."""


def packet(*fields: bytes, body: list[bytes] | None = None) -> bytes:
    """A packet by hand."""
    if body is None:
        return encode_packet(*fields)
    chunks, size = encode_body(body, 2**32)
    return encode_packet(*fields, body_size=size) + b"".join(chunks)


async def repeat(stream: trio.abc.Stream, data: bytes) -> None:
    """Send the same for ever."""
    data *= max(1, CHUNK // len(data))
    while True:
        await stream.send_all(data)


async def send_records(stream: trio.abc.Stream) -> None:
    """Send pings in records of one byte each."""
    assert isinstance(stream, SecretboxStream)
    ping = packet(b"ping")
    while True:
        seal = stream._sealer.seal
        records = b"".join(seal(ping[at : at + 1]) for _ in range(20) for at in range(len(ping)))
        await stream._transmit(records)


async def ask(stream: trio.abc.Stream) -> None:
    """Ask as many tiny requests as there are slots, again and again."""
    number = 0
    left = 0
    while True:
        requests = []
        while left < Settings().max_requests:
            requests.append(packet(b"req", b"%d" % number, b"", b"", b"", body=[]))
            number += 2
            left += 1
        await stream.send_all(b"".join(requests))
        left -= (await stream.receive_some()).count(b"\2ok")


async def send_items(stream: trio.abc.Stream) -> None:
    """Send items of no byte on a channel, with what credit there is."""
    await stream.send_all(packet(b"chan", b"0", b"", b"", b"", b"1", body=[]))
    item = packet(b"item", b"0", body=[])
    received = b""
    while True:
        received += await stream.receive_some()
        while (at := received.find(b"\6credit")) >= 0 and len(received) >= at + 7 + 4 + 1 + 4 + 6:
            received = received[at + 7 :]
            await stream.send_all(item * (2**18 // 64 // 2))


FLOODS: dict[str, Callable[[trio.abc.Stream], object]] = {
    "ping": partial(repeat, data=packet(b"ping")),
    "cancel": partial(repeat, data=packet(b"cancel", b"8")),
    "credit": partial(repeat, data=packet(b"credit", b"8", b"1")),
    "pieces": partial(repeat, data=packet(b"part", b"1", b"9", b"x") + packet(b"drop", b"1")),
    "records": send_records,
    "requests": ask,
    "items": send_items,
}
"""By name: the packets, or what sends them."""


async def serve() -> None:
    """Be the server, and print its address."""

    async def handler(connection: object, request: list[bytes]) -> list[bytes]:
        return request

    async def read(
        connection: object, request: list[bytes], channel: trio.abc.ReceiveChannel[object]
    ) -> None:
        async for _ in channel:
            pass

    async with open_server("127.0.0.1:0", handler, channel_handler=read, user_key={"user": KEY}) as server:
        print(server.addresses[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        server.stop(grace=0)


async def flood(address: str, kind: str, flooders: int) -> None:
    """Be so many flooders."""
    host, _, port = address.rpartition(":")

    async def drop(stream: trio.abc.Stream) -> None:
        while await stream.receive_some():
            pass

    async def be_one() -> None:
        while True:
            try:
                transport = await trio.open_tcp_stream(host, int(port))
                opened = await establish_as_client(
                    transport, user="user", key=KEY, service="", settings=Settings()
                )
                async with trio.open_nursery() as nursery:
                    if kind not in ("requests", "items"):
                        nursery.start_soon(drop, opened.stream)
                    await FLOODS[kind](opened.stream)  # type: ignore[misc]
            except* (trio.BrokenResourceError, BokbokError, OSError):
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(flooders):
            nursery.start_soon(be_one)


async def measure(address: str, seconds: float) -> None:
    """Be the client, and print the times of its requests."""
    times = []
    async with open_connection(address, user="user", key=KEY) as connection:
        for _ in range(20):
            await connection.request([b"x"])
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.perf_counter()
            await connection.request([b"x"])
            times.append(time.perf_counter() - began)
            await trio.sleep(PAUSE)
    cuts = statistics.quantiles(times, n=100)
    print(f"{statistics.median(times) * 1e3:8.2f} ms  {cuts[98] * 1e3:8.2f} ms  of {len(times)}", flush=True)


def drive(arguments: argparse.Namespace) -> None:
    """Start all of it, and print what came of it."""
    me = [sys.executable, __file__]
    start = partial(subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(f"{arguments.flooders} flooders:       median       99 of 100")
    for kind in ("quiet", *arguments.kinds.split(",")):
        processes = [start([*me, "server"], stderr=subprocess.DEVNULL)]
        try:
            assert processes[0].stdout
            address = processes[0].stdout.readline().strip()
            if kind != "quiet":
                nice = ["nice", "-n", "5"]  # they are many machines, and must not take the client's time
                flooders = [*nice, *me, "flood", address, "--kinds", kind]
                processes.append(start([*flooders, "--flooders", str(arguments.flooders)]))
                time.sleep(1.0)  # until all of them are in
            client = subprocess.run(
                [*me, "client", address, "--seconds", str(arguments.seconds)],
                capture_output=True,
                text=True,
                check=False,
                timeout=30 + 10 * arguments.seconds,
            )
            print(f"{kind:10} {client.stdout.rstrip() or client.stderr[-300:]}", flush=True)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def main() -> None:
    """Be what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("side", nargs="?", choices=["drive", "server", "flood", "client"], default="drive")
    parser.add_argument("address", nargs="?")
    parser.add_argument("--kinds", default=",".join(FLOODS))
    parser.add_argument("--flooders", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    if arguments.side == "server":
        trio.run(serve)
    elif arguments.side == "flood":
        trio.run(flood, arguments.address, arguments.kinds, arguments.flooders)
    elif arguments.side == "client":
        trio.run(measure, arguments.address, arguments.seconds)
    else:
        drive(arguments)


if __name__ == "__main__":
    main()
