"""examples/chat.py, in processes of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import open_connection

from ..support.helpers import load_example

CHAT = Path(__file__).parents[2] / "examples" / "chat.py"

Start = Callable[..., "Talker"]


class Talker:
    """A process of the example."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address = ""

    def say(self, *lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")


@contextmanager
def start(*arguments: str) -> Generator[Talker]:
    with subprocess.Popen(
        [sys.executable, str(CHAT), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield Talker(process)
        finally:
            process.kill()


@pytest.fixture
def room() -> Generator[tuple[Talker, Callable[[str], Any]]]:
    with ExitStack() as stack:
        server = stack.enter_context(start("serve", "127.0.0.1:0"))
        server.address = server.hear().removeprefix("serving on ")
        yield server, lambda name: stack.enter_context(start("join", server.address, name))


def test_people_come_talk_and_go(room: tuple[Talker, Callable[[str], Talker]]) -> None:
    _, join = room
    alice = join("alice")
    assert alice.hear() == "alice: has joined"
    bob = join("b\x1b[31mob")
    assert alice.hear() == bob.hear() == "b[31mob: has joined", "nothing for the terminal to obey"
    alice.say("hello", "anybody?")
    for each in (alice, bob):
        assert [each.hear(), each.hear()] == ["alice: hello", "alice: anybody?"]
    assert bob.process.stdin is not None
    bob.process.stdin.close()
    assert alice.hear() == "b[31mob: has left"
    assert bob.process.wait(10) == 0
    alice.process.send_signal(signal.SIGINT)
    assert alice.hear() == "bye"
    assert alice.process.wait(10) == 0


def test_a_signal_closes_the_room_and_all_may_go(room: tuple[Talker, Callable[[str], Talker]]) -> None:
    server, join = room
    alice = join("alice")
    assert alice.hear() == "alice: has joined"
    bob = join("bob")
    assert alice.hear() == "bob: has joined"
    server.process.send_signal(signal.SIGINT)
    assert server.process.communicate(timeout=5)[0] == "stopped\n"
    for each, heard in ((alice, ""), (bob, "bob: has joined\n")):
        assert each.process.communicate(timeout=5)[0] == heard
        assert each.process.returncode == 0
    assert server.process.returncode == 0


def test_a_last_line_without_its_end_is_heard(room: tuple[Talker, Callable[[str], Talker]]) -> None:
    _, join = room
    alice = join("alice")
    assert alice.hear() == "alice: has joined"
    bob = join("bob")
    assert [alice.hear(), bob.hear()] == ["bob: has joined"] * 2
    bob.process.communicate("hello", timeout=10)
    assert [alice.hear(), alice.hear()] == ["bob: hello", "bob: has left"]


def test_a_line_is_looked_at_as_far_as_it_is_shown() -> None:
    as_line = load_example("chat").as_line
    assert as_line("\N{SLIGHTLY SMILING FACE}".encode() * 30, 20) == "\N{SLIGHTLY SMILING FACE}" * 20
    assert as_line(b"a\nb\x1b" + b"c" * 30, 20) == "ab" + "c" * 18
    assert as_line(b"\0" * 80 + b"too late", 20) == ""


def test_who_does_not_keep_to_the_form_harms_nothing(room: tuple[Talker, Callable[[str], Talker]]) -> None:
    server, join = room
    alice = join("alice")
    assert alice.hear() == "alice: has joined"

    async def be_odd() -> None:
        async with (
            open_connection(server.address) as connection,
            connection.open_channel(["join", "odd"]) as channel,
        ):
            await channel.send([])
            await channel.send(["one", "two"])
            assert [await channel.receive() for _ in range(3)] == [
                [b"odd", b"has joined"],
                [b"odd", b"one"],
                [b"odd", b"two"],
            ]

    trio.run(be_odd)
    assert [alice.hear() for _ in range(4)] == [
        "odd: has joined",
        "odd: one",
        "odd: two",
        "odd: has left",
    ]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.communicate(timeout=5)[0] == "stopped\n"


def test_who_is_slow_misses_lines_and_delays_nobody(room: tuple[Talker, Callable[[str], Talker]]) -> None:
    _, join = room
    alice = join("alice")
    assert alice.hear() == "alice: has joined"
    bob = join("bob")
    assert alice.hear() == bob.hear() == "bob: has joined"
    bob.process.send_signal(signal.SIGSTOP)
    for number in range(1000):
        alice.say(f"{number} {'x' * 400}")
        assert alice.hear().startswith(f"alice: {number} x")
    bob.process.send_signal(signal.SIGCONT)
    alice.say("the end")
    heard = [bob.hear()]
    while heard[-1] != "alice: the end":
        heard.append(bob.hear())
    missed = sum(int(line.split()[3]) for line in heard if line.startswith("*: you missed "))
    lines = [line for line in heard if line.startswith("alice: ")]
    assert missed > 0
    assert missed + len(lines) == 1001


def test_what_it_does_not_know_it_says(room: tuple[Talker, Callable[[str], Talker]]) -> None:
    with start("dance") as lost:
        assert "python examples/chat.py serve" in lost.process.communicate(timeout=10)[0]
        assert lost.process.returncode == 1
    _, join = room
    nobody = join("\x07")
    assert nobody.process.communicate(timeout=10)[0].startswith("chat: ")
    assert nobody.process.returncode == 1


def test_one_plain_line_where_the_server_is_gone(room: tuple[Talker, Callable[[str], Talker]]) -> None:
    server, join = room
    alice = join("alice")
    assert alice.hear() == "alice: has joined"
    server.process.kill()
    assert alice.hear().startswith("chat: ")
    assert alice.hear() == ""
