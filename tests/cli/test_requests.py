"""`bokbok request` and `bokbok ping`, and the options of all commands that need a connection."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bokbok_trio import Key
from tests.support.cli import Run, address, make_handler, replaced, run, serving

__all__ = ["address", "run"]


def test_a_field_of_an_answer_is_a_line(run: Run, address: str) -> None:
    ran = run("request", address, "ping", "12345", "grüße")
    assert (ran.code, ran.out, ran.err) == (0, "ping\n12345\ngrüße\n", "")


def test_options_may_stand_anywhere(run: Run, address: str) -> None:
    for args in (
        ["--json", address, "a", "b"],
        [address, "--json", "a", "b"],
        [address, "a", "--json", "b"],
        [address, "a", "--timeout", "5", "b", "--json"],
        [address, "--json", "a", "--timeout=5", "--", "b"],
    ):
        assert run("request", *args).json == ["a", "b"]
    assert run("request", address, "--", "-x", "--json").out == "-x\n--json\n"
    assert run("request", address, "--", "a", "--", "b").out == "a\n--\nb\n"
    assert run("request", address, "-1").out == "-1\n"


def test_fields_of_files_and_of_the_standard_input(run: Run, address: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xffin the file")
    ran = run("request", "--json", address, f"@{path}", "-", r"\@home", r"\-", r"\\x", stdin=b"typed\n")
    assert ran.json == [{"base64": "/2luIHRoZSBmaWxl"}, "typed\n", "@home", "-", r"\x"]
    assert run("request", address, "@-", "--raw", stdin=b"\n\n").out == "\n\n"


def test_what_cannot_be_read_is_said(run: Run, address: str, tmp_path: Path) -> None:
    ran = run("request", address, f"@{tmp_path}/none")
    assert (ran.code, ran.out) == (1, "")
    assert ran.error == f"cannot read '{tmp_path}/none': No such file or directory"
    ran = run("request", address, "@/dev/zero")
    assert (ran.code, ran.error) == (6, "'/dev/zero' has more than 16777216 bytes")
    ran = run("request", address, "-", "@-")
    assert (ran.code, ran.error) == (2, "the standard input can be one field only")
    folder = os.open(tmp_path, os.O_RDONLY)
    with replaced(0, folder):
        ran = run("request", address, "-")
    os.close(folder)
    assert (ran.code, ran.error) == (1, "cannot read the standard input: Is a directory")
    ran = run("request", address, "@a\0b")
    assert (ran.code, ran.error) == (1, r"cannot read 'a\x00b': embedded null byte")


def test_json_and_records(run: Run, address: str) -> None:
    assert run("request", "--json", address, "a").out == '["a"]\n'
    assert run("request", "--seq", address, "a").out == '\x1e["a"]\n'


def test_the_items_of_a_channel_are_a_line_each(run: Run, address: str) -> None:
    ran = run("request", "--channel", address, "x")
    item = '["%d", {"base64": "/w=="}]\n'
    assert (ran.code, ran.out, ran.err) == (0, item % 0 + item % 1 + item % 2, "")
    ran = run("request", "--channel", address, "no")
    assert (ran.code, ran.error) == (5, "it broke [broken]")
    assert ran.out.count("\n") == 3
    ran = run("request", "--channel", address, "close")
    assert ran.code == 7


# ---- ping ----


def test_ping_writes_a_line_each_and_a_summary(run: Run, address: str) -> None:
    ran = run("ping", "-c", 3, "-i", 0.001, address)
    *pongs, head, times = ran.out.splitlines()
    assert ran.code == 0
    assert [line.partition("time=")[0] for line in pongs] == [
        f"pong from {address}: seq={n} " for n in (1, 2, 3)
    ]
    assert head == f"--- {address}: 3 pings, 3 pongs"
    assert [part.split()[0] for part in times.split(", ")] == ["min", "median", "p99"]


def test_a_ping_that_does_not_come_to_pass_has_no_summary(run: Run) -> None:
    ran = run("ping", "./none")
    assert (ran.code, ran.out) == (3, "")


def test_ping_for_programs(run: Run, address: str) -> None:
    ran = run("ping", "--seq", "-c", 1, "-i", 0, address)
    assert ran.out.count("\x1e") == 2
    assert '"median"' in ran.out


# ---- users, keys and time ----


def test_a_key(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, path, wrong = Key.generate(), tmp_path / "a.key", tmp_path / "wrong.key"
    key.save(path)
    Key.generate().save(wrong)
    with serving("127.0.0.1:0", make_handler(), user_key={"ann": key}, service="files") as address:
        given = ("request", "--user", "ann", "--service", "files", address, "who")
        assert run(*given, "--key-file", path).out == "ann\n"
        monkeypatch.setenv("BOKBOK_KEY_FILE", str(path))
        assert run(*given).out == "ann\n"
        ran = run(*given, "--key-file", wrong)
        assert ran.code == 4
        assert ran.error.startswith("authentication failed for user 'ann' at ")
        ran = run("request", "--plain", address, "who")
        assert ran.code == 3
