"""How long small requests take while a 4 MiB answer travels over a link of 10 Mbit/s.

    python benchmarks/slow_link.py            needs root, iproute2, and the kernel's veth and tbf

The link is a virtual cable between this process and a server in a network namespace, slowed to 10
Mbit/s by tc's token bucket at the server's end. Printed beside it, from the same run: the same small
requests on the idle link.
"""

import math
import os
import statistics
import subprocess
import sys

import trio

from bokbok_trio import Connection, Key, open_connection, open_server

NETWORK = "bokbok-slow"
HERE, THERE = "10.78.0.1", "10.78.0.2"
PORT = 7777
KEY = Key(bytes(range(32)))
ROUNDS = 10
BIG = 4 * 2**20 - 200


async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
    """Answer with as many bytes as were asked for."""
    return [bytes(int(request[0]))]


async def serve() -> None:
    """Be the server, in the namespace."""
    async with open_server(f"{THERE}:{PORT}", handler, user_key={"bench": KEY}) as server:
        print("listening", flush=True)
        await server.wait_stopped()


async def small_requests(connection: Connection, until: trio.Event) -> list[float]:
    """Make small requests, one after another, and time them, in milliseconds."""
    times: list[float] = []
    while not until.is_set():
        began = trio.current_time()
        await connection.request(["16"])
        times.append((trio.current_time() - began) * 1000)
        await trio.sleep(0.005)
    return times


def show(name: str, times: list[float]) -> None:
    """Print the spread of some times."""
    p99 = sorted(times)[math.ceil(len(times) * 0.99) - 1]
    middle = statistics.median(times)
    print(f"{name:24} n={len(times):4}  median {middle:6.1f} ms  p99 {p99:6.1f} ms  max {max(times):6.1f} ms")


async def measure() -> None:
    """Be the client."""
    async with open_connection(f"{THERE}:{PORT}", user="bench", key=KEY) as connection:
        idle_over = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleep_and_set, idle_over)
            show("idle link", await small_requests(connection, idle_over))
        times: list[float] = []
        for _ in range(ROUNDS):
            arrived = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch, connection, arrived)
                times += await small_requests(connection, arrived)
        show("beside a 4 MiB answer", times)


async def sleep_and_set(event: trio.Event) -> None:
    """Let the idle link be measured for a while."""
    await trio.sleep(2)
    event.set()


async def fetch(connection: Connection, arrived: trio.Event) -> None:
    """Ask for the big answer."""
    await connection.request([str(BIG)])
    arrived.set()


def run(command: str) -> None:
    """Run a command, and show what it says only if it fails."""
    subprocess.run(command.split(), check=True)


def main() -> None:
    """Lay the cable, measure, take it away."""
    run(f"ip netns add {NETWORK}")
    try:
        run(f"ip link add bokbok2 type veth peer name bokbok3 netns {NETWORK}")
        run(f"ip address add {HERE}/24 dev bokbok2")
        run("ip link set bokbok2 up")
        run(f"ip -n {NETWORK} address add {THERE}/24 dev bokbok3")
        run(f"ip -n {NETWORK} link set bokbok3 up")
        run(f"tc -n {NETWORK} qdisc add dev bokbok3 root tbf rate 10mbit burst 16kb latency 50ms")
        command = ["ip", "netns", "exec", NETWORK, sys.executable, os.path.abspath(__file__), "serve"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                server.stdout.readline()
                trio.run(measure)
            finally:
                server.kill()
    finally:
        run(f"ip netns delete {NETWORK}")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        trio.run(serve)
    else:
        main()
