"""Exit codes and error messages; `docs/cli.rst` has the table."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bokbok_trio import (
    AddressError,
    AuthenticationError,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    Settings,
)
from bokbok_trio._cli import main
from bokbok_trio._cli._exits import CommandError, Exit, OutputError, ReaderGone, explain, find_leaf
from tests.support.cli import Run, address, make_handler, run, serving

__all__ = ["address", "run"]

DOCS = (Path(__file__).parents[2] / "docs" / "cli.rst").read_text()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CommandError("so it is"), 1, "so it is"),
        (ProtocolError("no listing"), 1, "no listing"),
        (OutputError("full"), 1, "full"),
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x (this is a defect; --verbose shows where)"),
        (AddressError("no address"), 2, "no address"),
        (AddressError("needs insecure=True (or a key)"), 2, "needs --insecure (or a key)"),
        (HandshakeError("no peer"), 3, "no peer"),
        (AuthenticationError("who?"), 4, "who?"),
        (ConnectionRefused("full", "busy"), 4, "full [busy]"),
        (RemoteError("no\nforged", "bad\n"), 5, r"no\nforged [bad\n]"),
        (RemoteError("no", "handler-error"), 5, "no [handler-error]"),
        (RemoteError("$.x", "bad-arguments"), 6, "$.x [bad-arguments]"),
        (
            MessageTooLarge(2, 1),
            6,
            (
                "the message takes 2 bytes, and this connection allows 1 (the smaller "
                "max_message_size of both sides); a stream may have any size"
            ),
        ),
        (ConnectionLost("gone"), 7, "the connection was lost, and it may have run: gone"),
        (ConnectionClosed("gone"), 7, "the connection was lost, and it may have run: gone"),
        (ConnectionLost("gone", may_have_run=False), 8, "the connection was lost, and it did not run: gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ReaderGone(), 141, ""),
    ],
)
def test_what_an_error_means(error: BaseException, code: int, message: str) -> None:
    failure = explain(error)
    assert (failure.exit, failure.message) == (code, message)


def test_the_error_that_counts_of_several() -> None:
    lost, interrupt = ConnectionLost("gone"), KeyboardInterrupt()
    assert find_leaf(lost) is lost
    assert find_leaf(ExceptionGroup("", [ExceptionGroup("", [lost]), ValueError()])) is lost
    assert find_leaf(BaseExceptionGroup("", [lost, BaseExceptionGroup("", [interrupt])])) is interrupt


# ---- each row of the table ----


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[str]:
    """Run a server that another process kills with a request in flight, and return its address."""
    program = (
        "import os, sys, trio\nfrom bokbok_trio import open_server\n"
        "async def handler(connection, request):\n    os.kill(os.getpid(), 9)\n"
        "async def main():\n"
        "    async with open_server(sys.argv[1], handler) as server:\n"
        "        print(flush=True)\n        await server.wait_stopped()\n"
        "trio.run(main)\n"
    )
    path = str(tmp_path / "dying.sock")
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield path
        process.kill()


Case = Callable[[Run, str, Path], Any]
CASES: dict[int, Case] = {}


def case(code: int) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[code] = function
        return function

    return add


@case(0)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("request", address, "x")


@case(1)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("request", address, "@/nowhere")


@case(2)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("request", "nonsense", "x")


@case(3)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("request", tmp_path / "none", "x")


@case(4)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    with serving(str(tmp_path / "sock"), make_handler(), peer_user=lambda _: None) as strict:
        return run("request", strict, "x")


@case(5)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("request", address, "no", "why")


@case(6)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("call", address, "Files.stat", "path:=3")


@case(7)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("request", address, "close")


@case(124)
def _(run: Run, address: str, tmp_path: Path) -> Any:
    return run("request", "--timeout", "0.05", address, "sleep")


def test_every_row_of_the_table() -> None:
    rows = re.findall(r"(?m)^(\d+) {2,}\S", DOCS)
    assert [int(row) for row in rows] == [int(each) for each in Exit]


@pytest.mark.parametrize("code", CASES)
def test_an_exit_code(run: Run, address: str, tmp_path: Path, code: int) -> None:
    ran = CASES[code](run, address, tmp_path)
    assert ran.code == code
    if code:
        assert ran.out == ""
        assert ran.error
    else:
        assert ran.err == ""


def test_a_server_that_was_killed(run: Run, dying: str) -> None:
    ran = run("request", dying, "x")
    assert (ran.code, ran.out) == (7, "")
    assert ran.error.startswith("the connection was lost, and it may have run: ")
    ran = run("request", dying, "x")
    assert ran.code == 3
    assert ran.error.endswith("Connection refused")


def test_a_server_that_is_stopping_did_not_run_it(run: Run, tmp_path: Path) -> None:
    async def stop(connection: Any) -> None:
        connection.drain()

    with serving(str(tmp_path / "sock"), make_handler(), open_handler=stop) as address:
        ran = run("request", address, "x")
    assert ran.code == 8
    assert ran.error.startswith("the connection was lost, and it did not run: ")


def test_a_ping_that_is_lost_ran_nothing(run: Run, tmp_path: Path) -> None:
    async def close(connection: Any) -> None:
        await connection.aclose()

    with serving(str(tmp_path / "sock"), make_handler(), open_handler=close) as address:
        ran = run("ping", address)
    assert ran.code == 8
    assert ran.out == f"--- {address}: 1 pings, 0 pongs\n"


def test_a_message_that_is_too_large(run: Run, address: str, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(5 * 2**20))
    ran = run("request", address, f"@{path}")
    assert ran.code == 6
    assert re.fullmatch(
        r"the message takes 5242\d{3} bytes, and this connection allows 419\d{4} "
        r"\(the smaller max_message_size of both sides\); a stream may have any size",
        ran.error,
    )


def test_a_server_may_allow_messages_that_are_larger(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(5 * 2**20))
    settings = Settings(max_message_size=2**23)
    with serving(str(tmp_path / "sock"), make_handler(), settings=settings) as address:
        ran = run("request", "--raw", address, f"@{path}")
    assert (ran.code, len(ran.out)) == (0, 5 * 2**20)


# ---- --graceful, --json, --verbose ----


@pytest.mark.parametrize(
    ("graceful", "code"),
    [
        (["why"], 0),
        (["5"], 0),
        (["other", "why"], 0),
        (["other"], 5),
        (["4", "05", "7"], 0),
        (["404"], 5),
        (["¹"], 5),
    ],
)
def test_graceful_makes_one_error_none(run: Run, address: str, graceful: list[str], code: int) -> None:
    ran = run("request", address, "no", "why", *[f"--graceful={each}" for each in graceful])
    assert ran.code == code
    assert ran.error == r"it says no\nforged: line [why]"


@pytest.mark.parametrize("number", ["0", "1", "2", "130", "141"])
def test_an_exit_code_that_is_never_graceful_is_a_wrong_use(run: Run, address: str, number: str) -> None:
    ran = run("request", address, "no", "why", f"--graceful={number}")
    assert (ran.code, ran.out) == (2, "")
    assert f"exit code {number} cannot be made 0: use 3 to 8 or 124" in ran.error


def test_an_error_is_an_object_for_programs(run: Run, address: str) -> None:
    ran = run("request", "--json", address, "no", "why")
    assert json.loads(ran.err) == {
        "error": r"it says no\nforged: line [why]",
        "exit": 5,
        "code": "why",
        "details": "why",
    }
    assert json.loads(run("request", "--json").err)["exit"] == 2


def test_verbose_shows_where(run: Run, address: str) -> None:
    ran = run("request", "-v", address, "no", "why")
    assert "Traceback" in ran.err
    assert "Traceback" not in run("request", address, "no", "why").err


# ---- usage ----


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ([], "the following arguments are required: COMMAND (see bokbok --help)"),
        (["nonsense"], "argument COMMAND: invalid choice: 'nonsense' "),
        (["request"], "the following arguments are required: ADDRESS, FIELD (see bokbok request --help)"),
        (["request", "a:1", "x", "--nonsense"], "unrecognized arguments: --nonsense (see bokbok"),
        (["request", "a:1", "x", "--us", "ann"], "unrecognized arguments: --us (see bokbok"),
        (
            ["request", "a:1", "x", "--timeout", "x"],
            "argument --timeout: 'x' is not a number of seconds (see ",
        ),
        (
            ["request", "a:1", "x", "--timeout=-1"],
            "argument --timeout: '-1' is not a number of seconds (see ",
        ),
        (["request", "a:1", "x", "--timeout"], "argument --timeout: expected one argument (see "),
        (["ping", "a:1", "-c", "0"], "argument -c/--count: '0' is not a whole number from 1 on (see "),
        (
            ["request", "a:1", "x", "--user", "ann"],
            "a user needs a key: give --key-file FILE, or set BOKBOK_KEY_FILE; or use none by --plain",
        ),
        (
            ["request", "a:1", "x", "--key-file", "f"],
            "a key needs a user: give --user NAME, or set BOKBOK_USER; or use none by --plain",
        ),
        (["request", "a:1", "x", "--plain", "--user", "ann"], "--plain excludes --user and --key-file"),
        (["request", "localhost:1", "x", "--service", "s"], "a service needs a key: "),
        (
            ["request", "192.0.2.1:1", "x"],
            "plain TCP with 192.0.2.1, which is not loopback, needs --insecure (or a key)",
        ),
    ],
)
def test_a_wrong_use_is_one_line(run: Run, args: list[str], error: str) -> None:
    ran = run(*args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.error.startswith(error)


def test_a_key_in_the_environment_wants_a_user(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOKBOK_KEY_FILE", "/nowhere")
    ran = run("request", "a:1", "x")
    assert (ran.code, ran.error) == (
        2,
        "a key needs a user: give --user NAME, or set BOKBOK_USER; or use none by --plain",
    )
    monkeypatch.setenv("BOKBOK_USER", "ann")
    ran = run("request", "a:1", "x")
    assert (ran.code, ran.error) == (1, "cannot use the key file /nowhere: No such file or directory")


@pytest.mark.parametrize("args", [["--help"], ["call", "--help"], ["key", "new", "--help"], ["--version"]])
def test_help(run: Run, args: list[str]) -> None:
    ran = run(*args)
    assert (ran.code, ran.err) == (0, "")
    assert "bokbok" in ran.out


def test_the_arguments_of_the_process_are_those_of_main(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bokbok", "--version"])
    assert main() == 0
    assert capfd.readouterr().out.startswith("bokbok ")


def test_the_package_is_the_command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bokbok", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("bokbok_trio", run_name="__main__")
    assert caught.value.code == 0
    assert capfd.readouterr().out.startswith("bokbok ")
    assert runpy.run_module("bokbok_trio.__main__")["main"] is main


def test_without_msgspec_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(
            ("bokbok_trio.interface", "bokbok_trio._cli._calls", "bokbok_trio._cli._listing", "msgspec")
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "msgspec", None)
    for command in ("call", "follow", "describe"):
        ran = run(command, "localhost:1", "Files.stat")
        assert (ran.code, ran.error) == (
            1,
            "bokbok_trio.interface needs msgspec: install bokbok-trio[interface]",
        )
