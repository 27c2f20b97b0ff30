"""A herd: clients that all come at once to a server whose look-up of a user is slow.

python benchmarks/herd.py [--clients 3000] [--seconds 2] [--flood 0] [--places N] [--lookups N]

Starts a server, and processes with the clients, over loopback. Each client is an `open_reconnecting` with the
default settings. Prints how long it took until all were in, beside the ideal (all look-ups, as many at once
as the server does), and how many look-ups it took. With ``--flood``, so many silent strangers connect each
second meanwhile.
"""

import argparse
import resource
import socket
import subprocess
import sys
import time
from functools import partial
from itertools import count

import trio

from bokbok_trio import Key, Settings, open_connection, open_reconnecting, open_server

KEY = Key(bytes(range(32)))

PROCESSES = 2
"""Of clients. More would wait for each other on a small machine."""

PATIENCE = 600.0
"""Seconds after which it has failed."""


async def serve(arguments: argparse.Namespace) -> None:
    """Be the server, and print its address."""
    lookups = 0

    async def look_up(user: str) -> Key:
        nonlocal lookups
        lookups += 1
        await trio.sleep(arguments.seconds)
        return KEY

    async def handler(connection: object, request: list[bytes]) -> list[str]:
        return [str(lookups), str(server.statistics().connections)]

    settings = Settings(
        max_connections=2 * arguments.clients, max_handshakes=arguments.places, max_lookups=arguments.lookups
    )
    async with open_server("127.0.0.1:0", handler, user_key=look_up, settings=settings) as server:
        print(server.addresses[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)  # until the driver is gone, or has done
        server.stop(grace=0)


async def be_clients(address: str, number: int, first: int) -> None:
    """Be so many clients, and stay until the driver has done."""
    inside = trio.Event()
    left = number

    async def come(user: str) -> None:
        nonlocal left
        async with open_reconnecting(address, user=user, key=KEY):
            left -= 1
            if not left:
                inside.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for each in range(first, first + number):
            nursery.start_soon(come, f"user{each}")
        await inside.wait()
        print("in", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def flood(address: str, rate: int) -> None:
    """Connect so many times a second, and say nothing; the newest 4,000 stay open."""
    host, _, port = address.rpartition(":")
    strangers: dict[int, socket.socket] = {}
    began = trio.current_time()
    for number in count():
        await trio.sleep_until(began + number / rate)
        stranger = strangers[number % 4000] = socket.socket()
        stranger.setblocking(False)
        stranger.connect_ex((host, int(port)))


async def drive(arguments: argparse.Namespace) -> None:
    """Start all of it, and tell what came of it."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("clients", "seconds", "places", "lookups")]
    start = partial(
        subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    me = [sys.executable, __file__]
    processes = [start([*me, "server", *options])]
    assert processes[0].stdout
    address = processes[0].stdout.readline().strip()
    if arguments.flood:
        processes.append(start([*me, "flood", address, str(arguments.flood)]))
    share = arguments.clients // PROCESSES
    began = time.monotonic()
    herds = [start([*me, "clients", address, str(share), str(n * share)]) for n in range(PROCESSES)]
    processes += herds
    try:
        with trio.move_on_after(PATIENCE) as scope:
            for herd in herds:
                assert herd.stdout
                await trio.to_thread.run_sync(herd.stdout.readline, abandon_on_cancel=True)
        took = time.monotonic() - began
        async with open_connection(address, user="driver", key=KEY) as connection:
            lookups, connections = await connection.request([])
        ideal = arguments.clients * arguments.seconds / arguments.lookups
        verdict = "not all" if scope.cancelled_caught else "all"
        print(
            f"{verdict} of {share * PROCESSES} clients in after {took:.1f} s (ideal {ideal:.1f}), with "
            f"{int(lookups) - 1} look-ups; {int(connections) - 1} are connected"
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Be what the command line says."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if sys.argv[1:2] == ["clients"]:
        address, number, first = sys.argv[2:]
        trio.run(be_clients, address, int(number), int(first))
    elif sys.argv[1:2] == ["flood"]:
        trio.run(flood, sys.argv[2], int(sys.argv[3]))
    else:
        defaults = Settings()
        parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
        parser.add_argument("side", nargs="?", choices=["drive", "server"], default="drive")
        parser.add_argument("--clients", type=int, default=3000)
        parser.add_argument("--seconds", type=float, default=2.0, help="of a look-up")
        parser.add_argument("--flood", type=int, default=0, help="silent strangers a second")
        parser.add_argument("--places", type=int, default=defaults.max_handshakes)
        parser.add_argument("--lookups", type=int, default=defaults.max_lookups)
        arguments = parser.parse_args()
        trio.run(serve if arguments.side == "server" else drive, arguments)


if __name__ == "__main__":
    main()
