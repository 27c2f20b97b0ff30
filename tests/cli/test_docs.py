"""Runs the commands that docs/cli.rst shows, and compares their output."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from bokbok_trio import Keyring
from bokbok_trio._cli._parser import make_parser
from tests.support.cli import Run, run, serving
from tests.support.helpers import documented_code

__all__ = ["run"]

TEXT = (Path(__file__).parents[2] / "docs" / "cli.rst").read_text()


def sessions() -> list[tuple[str, str]]:
    """Return each command that the text shows, with its output."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"\.\. code:: console\n\n((?:    .*\n|\n)+)", TEXT):
        for part in re.split(r"(?m)^    \$ ", block)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, re.sub(r"(?m)^    ", "", output).rstrip("\n")))
    return found


def matches(written: str, shown: str) -> bool:
    """Whether an output matches the text, in which three dots stand for anything."""
    expression = ".*".join(map(re.escape, shown.split("...")))
    return re.fullmatch(expression, written, re.DOTALL) is not None


def test_the_examples_do_what_they_show(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    [code] = documented_code("cli.rst")
    (tmp_path / "notes.py").write_text(code)
    first, second, *rest = sessions()
    for command, shown in (first, second):
        ran = run(*shlex.split(command)[1:])
        assert (ran.code, matches(ran.out.rstrip("\n"), shown)) == (0, True)
    app = importlib.import_module("notes").app
    with serving("127.0.0.1:0", app, user_key=Keyring.load("users.keys")) as address:
        for command, shown in rest:
            if command.startswith("export "):
                for pair in shlex.split(command)[1:]:
                    monkeypatch.setenv(*pair.split("="))
                continue
            program, *args = shlex.split(command.replace("localhost:12345", address))
            args, then = (
                (args[: args.index("&&")], args[args.index("&&") + 1 :]) if "&&" in args else (args, [])
            )
            assert program == "bokbok"
            ran = run(*args)
            written = ran.out + ran.err + ("" if ran.code else "".join(f"{each}\n" for each in then[1:]))
            written = written.replace(f"from {address}", "from 127.0.0.1:12345").replace(
                address, "localhost:12345"
            )
            assert matches(written.rstrip("\n"), shown), f"{command}\n{written}"
    sys.modules.pop("notes")
    assert len(rest) > 20


def test_the_commands_of_the_readme_are_right() -> None:
    readme = (Path(__file__).parents[2] / "README.rst").read_text()
    commands = re.findall(r"(?m)^    bokbok (.*)", readme)
    for command in commands:
        assert make_parser().parse_args(shlex.split(command, comments=True)).address == "localhost:12345"
    assert len(commands) == 5


def test_all_commands_are_in_the_text(run: Run) -> None:
    for command in (
        "request",
        "call",
        "follow",
        "list",
        "describe",
        "ping",
        "serve",
        "key",
        "users",
        "completion",
    ):
        assert re.search(rf"``[^`]*\b{command}\b|\$ bokbok {command}", TEXT), command
        assert re.search(rf"(?m)^    {command}\b", run("--help").out)
