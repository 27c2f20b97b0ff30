"""How long small requests take while a 4 MiB answer travels over slow links of several kinds.

    python benchmarks/slow_link.py [ROUNDS]      needs root, iproute2, veth, tbf and tun; some minutes

The link is between this process and a server in a network namespace; for each kind of it, and for
each congestion control that the kernel has, the server's answers are measured:

bucket, short queue     10 Mbit/s by tc's token bucket, which drops what would wait over 50 ms;
bucket, long queue      the same with room for 1 s: nothing is dropped, and much can stand in the way;
short cable             10 Mbit/s in user space (see link.py), a queue of 50 ms, a way of no length;
long cable              the same with a round trip of 20 ms and a queue of 100 ms;
long, fast cable        100 Mbit/s, round trip 100 ms, queue 100 ms: holding back must not cost
                        throughput here.

A line says how long small requests take on the idle link and beside the big answer, one after
another with 5 ms between; and how fast the big answer travels, and how fast with nothing beside it.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from link import open_tun, run_link

from bokbok_trio import Connection, Key, open_connection, serve

HERE, THERE = "10.78.0.1", "10.78.0.2"
PORT = 7777
KEY = Key(bytes(range(32)))
ROUNDS = 10
BIG = 4 * 2**20 - 200
IDLE_REQUESTS = 50
PAUSE = 0.005
CONTROLS = ("cubic", "bbr")
MEGABIT = 1_000_000 / 8


@dataclass(frozen=True)
class Kind:
    """A kind of link: a cable in user space where it has a round trip, else a bucket of tc's."""

    name: str
    rate: int  # Mbit/s
    queue: int  # ms
    round_trip: int | None  # ms; None of a bucket


KINDS = (
    Kind("bucket, short queue", 10, 50, None),
    Kind("bucket, long queue", 10, 1000, None),
    Kind("short cable", 10, 50, 0),
    Kind("long cable", 10, 100, 20),
    Kind("long, fast cable", 100, 100, 100),
)


# ---- the two sides ----


async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
    """Answer with as many bytes as were asked for."""
    return [bytes(int(request[0]))]


async def serve_there(control: str) -> None:
    """Be the server, in the namespace."""
    listeners = await trio.open_tcp_listeners(PORT, host=THERE)
    for listener in listeners:
        listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, listeners, handler, user_key={"bench": KEY}))
        print("listening", flush=True)


async def measure(kind: Kind, control: str, rounds: int) -> None:
    """Be the client, and print a line."""
    idle: list[float] = []
    beside: list[float] = []
    took: list[float] = []
    alone: list[float] = []
    async with open_connection(f"{THERE}:{PORT}", user="bench", key=KEY) as connection:

        async def ask(size: int, times: list[float]) -> None:
            began = trio.current_time()
            await connection.request([str(size)])
            times.append(trio.current_time() - began)

        for _ in range(IDLE_REQUESTS):
            await ask(16, idle)
        for _ in range(rounds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, BIG, took)
                done = len(took)
                while len(took) == done:
                    await ask(16, beside)
                    await trio.sleep(PAUSE)
        for _ in range(rounds):
            await ask(BIG, alone)
    figures = [at(idle, 0.5), at(beside, 0.5), at(beside, 0.99), max(beside)]
    speeds = [BIG / MEGABIT / statistics.median(times) for times in (took, alone)]
    print(
        f"{kind.name:20} {control:6} {figures[0] * 1000:6.1f} {len(beside):6}",
        *(f"{figure * 1000:7.1f}" for figure in figures[1:]),
        *(f"{speed:7.1f}" for speed in speeds),
        flush=True,
    )


def at(times: list[float], share: float) -> float:
    """The time that such a share of them do not exceed."""
    return sorted(times)[math.ceil(len(times) * share) - 1]


# ---- the link ----


def run(command: str) -> None:
    """Run a command, and show what it says only if it fails."""
    subprocess.run(command.split(), check=True)


@contextmanager
def laid(kind: Kind) -> Iterator[str]:
    """Lay a link to a network namespace, whose name is given, and take it away at the end."""
    network, near, far = f"bokbok-{os.getpid()}", f"bokbok-a{os.getpid()}", f"bokbok-b{os.getpid()}"
    run(f"ip netns add {network}")
    try:
        with bucket(kind, network, near, far) if kind.round_trip is None else cable(kind, network, near, far):
            yield network
    finally:
        run(f"ip netns delete {network}")


def set_up(network: str, near: str, far: str) -> None:
    """Give the ends their addresses."""
    run(f"ip address add {HERE} peer {THERE} dev {near}")
    run(f"ip link set {near} up")
    run(f"ip -n {network} address add {THERE} peer {HERE} dev {far}")
    run(f"ip -n {network} link set {far} up")


@contextmanager
def bucket(kind: Kind, network: str, near: str, far: str) -> Iterator[None]:
    """A cable in the kernel, slowed at the server's end."""
    run(f"ip link add {near} type veth peer name {far} netns {network}")
    try:
        set_up(network, near, far)
        shape = f"tbf rate {kind.rate}mbit burst 16kb latency {kind.queue}ms"
        run(f"tc -n {network} qdisc add dev {far} root {shape}")
        yield
    finally:
        run(f"ip link delete {near}")  # the namespace would take it along, but only later


@contextmanager
def cable(kind: Kind, network: str, near: str, far: str) -> Iterator[None]:
    """A cable in a process of its own."""
    assert kind.round_trip is not None
    ends = open_tun(near), open_tun(far)
    child = 0
    try:
        run(f"ip link set {far} netns {network}")
        set_up(network, near, far)
        child = os.fork()
        if child == 0:
            rate, round_trip, queue = kind.rate * MEGABIT, kind.round_trip / 1000, kind.queue / 1000
            run_link(*ends, rate=rate, round_trip=round_trip, queue=queue)
        yield
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for end in ends:
            os.close(end)


def main(rounds: int) -> None:
    """Measure all, and print a table."""
    print(f"{'':27}   idle       beside a 4 MiB answer         its Mbit/s")
    print(
        f"{'link':20} {'TCP':6} {'median':>6} {'n':>6} {'median':>7} {'p99':>7} {'max':>7}"
        f" {'beside':>7} {'alone':>7}"
    )
    known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    for kind in KINDS:
        for control in CONTROLS:
            if control not in known:
                continue
            with laid(kind) as network:
                command = ["ip", "netns", "exec", network, sys.executable, os.path.abspath(__file__), control]
                with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
                    try:
                        assert server.stdout is not None
                        server.stdout.readline()
                        trio.run(measure, kind, control, rounds)
                    finally:
                        server.kill()


if __name__ == "__main__":
    match sys.argv[1:]:
        case [control] if control in CONTROLS:
            trio.run(serve_there, control)
        case [rounds]:
            main(int(rounds))
        case _:
            main(ROUNDS)
