"""The text of docs/running.rst: servers that signals stop, examples and Ctrl-C, the table of bounds."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import Connection, ConnectionLost, Key, Settings, open_connection
from bokbok_trio.files import send_file

from ..support.helpers import load_example, needs_safe_channel
from .test_readme import code_blocks, wait_for_port

HOME = Path(__file__).parents[2]
EXAMPLES = HOME / "examples"
DOCS = (HOME / "docs" / "running.rst").read_text()

signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python with some arguments. It ends with the test."""
    with ExitStack() as stack:

        def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
            command = [sys.executable, *map(str, arguments)]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def readme_server(start: Start, tmp_path: Path) -> tuple[subprocess.Popen[str], int, Key]:
    """The server of the README, when it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("make_key.py", "server.py"):
        (tmp_path / name).write_text(code_blocks()[name].replace("localhost:12345", f"127.0.0.1:{port}"))
    subprocess.run([sys.executable, "make_key.py"], cwd=tmp_path, timeout=30, check=True)
    process = start("server.py", cwd=tmp_path)
    wait_for_port(port)
    return process, port, Key.load(tmp_path / "alice.key")


@contextmanager
def ends_quietly(process: subprocess.Popen[str], within: float) -> Iterator[None]:
    yield
    output, errors = process.communicate(timeout=within)
    assert (process.returncode, output, errors) == (0, "", "")


async def greet(
    port: int, key: Key, handler: Callable[[Connection, list[bytes]], Awaitable[list[str]]]
) -> list[bytes]:
    with trio.fail_after(8):
        async with open_connection(
            f"127.0.0.1:{port}", user="alice", key=key, request_handler=handler
        ) as connection:
            return await connection.request(["greet"])


@signals
async def test_the_server_of_the_readme_answers_what_is_in_flight_when_it_is_stopped(
    number: signal.Signals, readme_server: tuple[subprocess.Popen[str], int, Key]
) -> None:
    process, port, key = readme_server

    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        process.send_signal(number)
        await connection.draining.wait()
        return ["Alice"]

    with ends_quietly(process, 5):
        assert await greet(port, key, handler) == [b"hello, Alice"]


@signals
async def test_a_second_signal_stops_the_server_of_the_readme_at_once(
    number: signal.Signals, readme_server: tuple[subprocess.Popen[str], int, Key]
) -> None:
    process, port, key = readme_server

    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        process.send_signal(number)
        await connection.draining.wait()
        process.send_signal(number)
        await trio.sleep_forever()
        raise AssertionError

    with ends_quietly(process, 5):
        with pytest.raises(ConnectionLost, match="draining, as a stopping server does") as caught:
            await greet(port, key, handler)
        assert caught.value.may_have_run


def test_a_third_signal_does_what_it_did_before(start: Start, tmp_path: Path) -> None:
    """A handler that shields itself keeps a server from stopping; then one more Ctrl-C must help."""
    recipe = find_recipe(code_blocks()["server.py"])
    (tmp_path / "stubborn.py").write_text(
        "import signal, trio\nfrom bokbok_trio import open_connection, open_server\n"
        "async def handler(connection, request):\n"
        "    with trio.CancelScope(shield=True):\n"
        "        print('handling', flush=True)\n"
        "        while True:\n"
        "            await trio.sleep(0.01)\n"
        "            print('still', flush=True)\n" + recipe + "async def main():\n"
        "    async with open_server('127.0.0.1:0', handler) as server, trio.open_nursery() as nursery:\n"
        "        await nursery.start(stop_on_signals, server)\n"
        "        async with open_connection(server.addresses[0]) as connection:\n"
        "            await connection.request([])\n"
        "trio.run(main)\n"
    )
    process = start("stubborn.py", cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "handling\n"
    sent = 0
    # Two signals that come at once may be one, so more than three may be needed.
    while process.stdout.readline() and process.stdout.readline():
        sent += 1
        process.send_signal(signal.SIGTERM)
    process.communicate()
    assert sent >= 3
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("name", "begin", "rest"),
    [
        ("server", "main", []),
        ("chat", "serve", []),
        ("files", "serve", ["."]),
        ("prometheus", "serve", ["127.0.0.1:0"]),
        pytest.param("jobs", "serve", [], marks=needs_safe_channel),
    ],
)
async def test_a_signal_may_come_as_soon_as_an_example_says_that_it_serves(
    name: str, begin: str, rest: list[str], tmp_path: Path
) -> None:
    example = load_example(name)
    printed: list[str] = []

    def note(line: str, *_: object, **__: object) -> None:
        printed.append(line)
        if line.startswith("serving"):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            signal.raise_signal(signal.SIGTERM)

    example.print = note
    with trio.fail_after(10):
        await getattr(example, begin)(str(tmp_path / "sock"), *rest)
    assert printed[-1] == "stopped"
    assert os.listdir(tmp_path) == []


def find_recipe(text: str) -> str:
    """Return a recipe of the text, without its indentation."""
    found = re.search(
        r"^( *)async def stop_on_signals\(server, task_status\):\n(?:\1 +.*\n)+", text, re.MULTILINE
    )
    assert found is not None
    return "".join(line.removeprefix(found[1]) for line in found[0].splitlines(keepends=True))


def test_the_recipe_is_the_same_wherever_it_is_shown() -> None:
    assert find_recipe(DOCS) == find_recipe((HOME / "README.rst").read_text())
    # The example has types, and its own words.
    example = {bare(line) for line in (EXAMPLES / "server.py").read_text().splitlines()}
    assert {bare(line) for line in find_recipe(DOCS).splitlines()[1:]} <= example


def bare(line: str) -> str:
    return line.partition("#")[0].strip()


# ---- the examples ----


@signals
def test_the_server_of_the_examples_stops_in_order(
    number: signal.Signals, start: Start, tmp_path: Path
) -> None:
    path = tmp_path / "sock"
    process = start(EXAMPLES / "server.py", path)
    assert process.stdout is not None
    assert process.stdout.readline() == f"serving plain on {path}\n"

    async def ask() -> None:
        async def handler(connection: Connection, request: list[bytes]) -> list[str]:
            return []

        async with open_connection(path, request_handler=handler) as connection:
            assert await connection.request(["ping", "x"]) == [b"pong", b"x"]
            process.send_signal(number)
            with trio.fail_after(5):
                await connection.wait_closed()

    trio.run(ask)
    output, errors = process.communicate(timeout=5)
    assert output.splitlines()[-1] == "stopped"
    assert (process.returncode, errors) == (0, "")
    assert os.listdir(tmp_path) == []


def test_the_files_example_takes_a_file_to_its_end_when_it_is_stopped(start: Start, tmp_path: Path) -> None:
    folder, path, source = tmp_path / "folder", tmp_path / "sock", tmp_path / "big.bin"
    folder.mkdir()
    source.write_bytes(os.urandom(1_000_000))
    process = start(EXAMPLES / "files.py", "serve", path, folder)
    assert process.stdout is not None
    assert process.stdout.readline() == f"serving on {path}\n"

    async def put() -> None:
        async with open_connection(path) as connection:
            async with connection.open_channel(["put", source.name]) as channel:
                sent: list[int] = []

                def stop_it(done: int, size: int) -> None:
                    sent.append(done)
                    if len(sent) == 5:
                        process.send_signal(signal.SIGTERM)

                await send_file(channel, source, progress=stop_it)

    trio.run(put)
    output, errors = process.communicate(timeout=5)
    assert (output, errors, process.returncode) == ("stopped\n", "", 0)
    assert (folder / source.name).read_bytes() == source.read_bytes()


def test_ctrl_c_ends_a_client_with_one_line(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    server = start(EXAMPLES / "server.py", path)
    assert server.stdout is not None
    server.stdout.readline()
    client = start("-u", EXAMPLES / "client.py", path)
    assert client.stdout is not None
    while not client.stdout.readline().startswith("the answer to asynch is"):
        assert client.poll() is None
    client.send_signal(signal.SIGINT)
    output, errors = client.communicate(timeout=5)
    assert output.splitlines()[-1] == "bye"
    assert (client.returncode, errors) == (0, "")


def test_ctrl_c_ends_an_example_with_both_sides_with_one_line(start: Start) -> None:
    process = start("-u", EXAMPLES / "demo.py")
    assert process.stdout is not None
    while not process.stdout.readline().startswith("  client: the server asks [b'who are you?']"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=5)
    assert output.splitlines()[-1] == "bye"
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    "name",
    [
        "server",
        "client",
        "users_postgres",
        "chat",
        "prometheus",
        pytest.param("jobs", marks=needs_safe_channel),
    ],
)
def test_an_example_without_arguments_says_how_it_is_used(name: str, start: Start) -> None:
    if name == "users_postgres":
        pytest.importorskip("psycopg_pool", reason="psycopg_pool is not installed: pip install '.[examples]'")
    process = start(EXAMPLES / f"{name}.py")
    output, errors = process.communicate(timeout=10)
    assert output == ""
    assert f"python examples/{name}.py " in errors
    assert "Traceback" not in errors
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["client", "127.0.0.1:1"], "client: [Errno 111] cannot connect to 127.0.0.1:1"),
        (["server", "nonsense"], "server: invalid address: 'nonsense'"),
        (["server", "127.0.0.1:0", "/none/users.keys"], "server: [Errno 2] No such file"),
        (["client", "127.0.0.1:1", "/none/users.keys", "alice"], "client: [Errno 2] No such file"),
        (["files", "put", "127.0.0.1:1", "x"], "files: [Errno 111] cannot connect to 127.0.0.1:1"),
        (["files", "serve", "nonsense", "."], "files: invalid address: 'nonsense'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], line: str, start: Start) -> None:
    name, *rest = arguments
    output, errors = start(EXAMPLES / f"{name}.py", *rest).communicate(timeout=10)
    assert output == ""
    assert errors.startswith(line)
    assert errors.count("\n") == 1


# ---- the table of bounds ----


def as_number(text: str) -> float | None:
    """Return the number that a default in the table stands for."""
    number, _, unit = text.partition(" ")
    if number == "None":
        return None
    return float(number) * {"": 1, "s": 1, "MiB": 2**20, "KiB/s": 2**10}[unit]


def test_the_table_of_bounds_has_them_all_with_their_defaults() -> None:
    rows = dict(re.findall(r"(?m)^``(\w+)`` +(None|\S+(?: MiB| KiB/s| s)?) {2,}\S", DOCS))
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name in ("describe_error", "instruments", "_instruments"):
        del defaults[name]  # no bounds
    defaults["budget"] = Settings().effective_budget
    assert {name: as_number(default) for name, default in rows.items()} == defaults
