"""The output: descriptors, terminals, colours, progress, pipes that nobody reads, full disks."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import pty
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from bokbok_trio import Settings
from bokbok_trio._cli import _progress, main
from bokbok_trio._cli._exits import OutputError, ReaderGone
from bokbok_trio._cli._output import Output, colour, open_missing_descriptors, write_all
from bokbok_trio._cli._values import as_json, dump
from bokbok_trio.interface import expose
from tests.support.cli import Run, address, make_handler, replaced, run, serving

__all__ = ["address", "run"]


@contextmanager
def on_terminal(*fds: int) -> Iterator[Callable[[], str]]:
    """Put a terminal at some descriptors. Yield a function that reads its output."""
    ours, theirs = pty.openpty()

    def read() -> str:
        os.write(theirs, b"\x04")  # after all else
        data = b""
        while not data.endswith(b"\x04"):
            data += os.read(ours, 65536)
        return data[:-1].decode().replace("\r\n", "\n")

    try:
        if len(fds) == 1:
            with replaced(fds[0], theirs):
                yield read
        else:
            with replaced(fds[0], theirs), replaced(fds[1], theirs):
                yield read
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


# ---- terminals ----


def test_a_result_is_pretty_on_a_terminal_only(
    run: Run, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["call", address, "Files.stat", "path=/etc", "follow=false"]
    assert run(*args).out == '{"size": 4, "owner": null, "digest": "/wA="}\n'
    with on_terminal(1) as read:
        main(args)
        coloured = read()
        main([*args, "--json"])
        plain = read()
        monkeypatch.setenv("NO_COLOR", "1")
        main(args)
        without = read()
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        main(args)
        dumb = read()
    assert coloured == (
        '{\n  \x1b[34m"size"\x1b[0m: \x1b[36m4\x1b[0m,\n  \x1b[34m"owner"\x1b[0m: \x1b[35mnull\x1b[0m,\n'
        '  \x1b[34m"digest"\x1b[0m: \x1b[32m"/wA="\x1b[0m\n}\n'
    )
    assert plain == '{"size": 4, "owner": null, "digest": "/wA="}\n'
    assert without == dumb == '{\n  "size": 4,\n  "owner": null,\n  "digest": "/wA="\n}\n'


def test_items_are_a_line_each_on_a_terminal_too(address: str) -> None:
    with on_terminal(1, 2) as read:
        main(["follow", address, "Files.lines", "path=x", "count=2"])
        assert read() == '\x1b[32m"x:0"\x1b[0m\n\x1b[32m"x:1"\x1b[0m\n'


def test_nothing_that_comes_steers_a_terminal(address: str) -> None:
    evil = "\x1b[2J\x9b2J\x07\u202e\u2066\rx\ty"
    with on_terminal(1, 2) as read:
        main(["request", address, evil])
        assert read() == r"\x1b[2J\x9b2J\x07\u202e\u2066\rx" + "\ty\n"
        main(["request", "--raw", address, evil])
        assert read() == r"\x1b[2J\x9b2J\x07\u202e\u2066\rx" + "\ty\n"
        main(["call", address, "Files.lines", "path=" + evil, "count=1", "--raw"])
        assert "\x1b[2J" not in read()
        main(["request", address, "no", "\x1b[2J"])
        assert read() == r"bokbok: it says no\nforged: line [\x1b[2J]" + "\n"
        main(["call", address, "Files.lines", "path=" + evil, "count=1"])
        shown = re.sub(r"\x1b\[\d+m", "", read())
        assert shown.isascii()
        assert json.loads(shown) == evil + ":0"
        main(["request", address, "@/dev/null", "--raw"])
        assert read() == "\n"


class Steering(Protocol):
    """Says \x1b]0;evil\x07 and \u202e."""

    async def do(self, text: str = "\x9b") -> None: ...


class NoSteering:
    async def do(self, text: str = "") -> None: ...


def test_a_listing_steers_no_terminal_behind_a_pipe(run: Run, tmp_path: Path) -> None:
    served = expose(Steering, NoSteering(), listed=True)
    with serving(str(tmp_path / "sock"), served, peer_user=lambda _: "tester") as address:
        listed = run("list", address).out + run("list", "--markdown", address).out
        described = run("describe", address, "Steering.do").out
    assert r"Says \x1b]0;evil\x07 and \u202e." in listed
    assert (listed + described).isascii()
    assert "\x1b" not in listed + described


def test_bytes_are_written_as_they_are_unless_on_a_terminal(run: Run, address: str, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\x1b")
    with on_terminal(1) as read:
        main(["request", address, f"@{path}"])
        assert read() == "\\xff\\x1b\n"


# ---- progress ----


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(_progress, "time", found)
    return found


def test_progress_is_shown_after_a_second_and_wiped(clock: Clock) -> None:
    with on_terminal(2) as read:
        progress = _progress.Progress(Output(), 4 * 2**20)
        progress.add(100)
        clock.now = 1
        progress.add(2**20 - 100)
        clock.now = 1.1
        progress.add(2**20)
        clock.now = 2
        progress.add(2**20)
        progress.end()
        wipe = "\r\x1b[K"
        assert read() == (
            f"{wipe}1.0 MiB of 4.0 MiB, 25%, 1.0 MiB/s{wipe}3.0 MiB of 4.0 MiB, 75%, 1.5 MiB/s{wipe}"
        )
        progress = _progress.Progress(Output())
        clock.now = 4
        progress.add(10)
        assert read() == f"{wipe}10 B, 5 B/s"


def test_progress_is_for_terminals(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    for out in (Output(), Output(json=True)):
        progress = _progress.Progress(out)
        clock.now += 5
        progress.add(100)
        progress.end()
    assert capfd.readouterr().err == ""


def test_a_transfer_goes_on_when_the_terminal_is_gone(clock: Clock) -> None:
    with on_terminal(2):
        progress = _progress.Progress(Output())
        full = os.open("/dev/full", os.O_WRONLY)
        with replaced(2, full):
            clock.now = 5
            progress.add(1)
        os.close(full)
        clock.now = 10
        progress.add(1)


def test_a_transfer_into_a_file_shows_how_far_it_is(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "SHOW_AFTER", 0)
    path = tmp_path / "up"
    path.write_bytes(bytes(100_000))
    with on_terminal(2) as read:
        fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
        with replaced(1, fd):
            assert main(["follow", address, "Files.lines", "path=x"]) == 0
            assert main(["call", address, "Files.upload", "name=x", f"chunks=@{path}"]) == 0
        os.close(fd)
        shown = read()
    assert "\r\x1b[K6 B, " in shown
    assert "64.0 KiB of 97.7 KiB, 66%, " in shown
    assert shown.endswith("\r\x1b[K")


# ---- what cannot be written ----


def test_a_full_disk_is_said(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for args in (
        ["request", address, "x"],
        ["follow", address, "Files.lines", "path=x"],
        ["ping", "-c", "1", address],
        ["--help"],
    ):
        with replaced(1, full):
            code = main(args)
        assert code == 1
        assert capfd.readouterr().err == "bokbok: cannot write the output: No space left on device\n"
    with replaced(2, full):
        assert main(["request"]) == 2
        assert main(["request", "--json"]) == 2
    os.close(full)


def test_a_pipe_that_nobody_reads_ends_a_command_quietly(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for args, closes_later in (
        (["request", address, "x"], False),
        (["ping", address, "-i", "3600"], True),
        (["request", "--channel", address, "endless"], True),
        (["follow", address, "Files.lines", "path=/endless", "count=0"], True),  # which writes nothing
    ):
        reader, writer = os.pipe()
        closing = threading.Timer(0.1 if closes_later else 0, os.close, [reader])
        closing.start()
        if not closes_later:
            closing.join()
        with replaced(1, writer):
            code = main(args)
        closing.join()
        os.close(writer)
        assert code == 141
        assert capfd.readouterr().err == ""


def test_both_ends_of_a_pipe_are_still_read(address: str, tmp_path: Path) -> None:
    """A shell may have a pipe open for reading and writing. Data in it does not mean that nobody reads."""
    os.mkfifo(tmp_path / "pipe")
    both = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(both, b"x")
    with replaced(1, both):
        assert main(["follow", address, "Files.lines", "path=/slow"]) == 0
    assert os.read(both, 100) == b'x"/slow:0"\n"/slow:1"\n"/slow:2"\n'
    os.close(both)


def test_a_reader_who_waits_does_not_break_the_connection(tmp_path: Path) -> None:
    """The reader pauses for longer than the server waits for a sign of life, and the pipe is full."""
    settings = Settings(ping_after=0.2, ping_timeout=0.4)
    path = "x" * 1000
    with serving(str(tmp_path / "sock"), make_handler(), settings=settings) as address:
        reader, writer = os.pipe()
        data = b""

        def read() -> None:
            nonlocal data
            time.sleep(1)
            while chunk := os.read(reader, 65536):
                data += chunk

        thread = threading.Thread(target=read)
        thread.start()
        with replaced(1, writer):
            os.close(writer)
            code = main(["follow", address, "Files.lines", f"path={path}", "count:=200"])
        thread.join()
        os.close(reader)
    assert code == 0
    assert data.count(path.encode()) == 200


def test_what_is_written_waits_where_a_pipe_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    waits = threading.Event()
    original = select.select

    def spy(*args: Any) -> Any:
        waits.set()
        return original(*args)

    monkeypatch.setattr(select, "select", spy)
    data = b""

    def read() -> None:
        nonlocal data
        waits.wait()
        while chunk := os.read(reader, 65536):
            data += chunk

    thread = threading.Thread(target=read)
    thread.start()
    write_all(writer, bytes(2**20))
    os.close(writer)
    thread.join()
    assert data == bytes(2**20)
    os.close(reader)


def test_what_cannot_be_written_is_told_apart() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(ReaderGone):
        write_all(writer, b"x")
    os.close(writer)
    with pytest.raises(OutputError, match="Bad file descriptor"):
        write_all(writer, b"x")


def test_descriptors_that_are_missing_are_not_given_to_sockets() -> None:
    kept = os.dup(1)
    try:
        os.close(1)
        open_missing_descriptors()
        with pytest.raises(OutputError, match="Bad file descriptor"):
            write_all(1, b"x")
    finally:
        os.dup2(kept, 1)
        os.close(kept)


# ---- values ----


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "null"),
        (math.inf, "null"),
        (1.5, "1.5"),
        (2**70, "1180591620717411303424"),
        (b"\xff", '"/w=="'),
        ({1: 2, b"\xff": 3, None: 4, (1, 2): 5}, '{"1": 2, "/w==": 3, "null": 4, "[1, 2]": 5}'),
        ([True, None, [1]], "[true, null, [1]]"),
        ("grüße", '"grüße"'),
        ("\ud800", '"\\ud800"'),
    ],
)
def test_a_value_as_json(value: Any, shown: str) -> None:
    assert dump(as_json(value)) == shown


def test_times_and_what_else_travels_are_texts() -> None:
    assert as_json(dt.datetime(2020, 1, 2, tzinfo=dt.UTC)) == "2020-01-02T00:00:00+00:00"
    assert as_json(Path("/x")) == "/x"


def test_colours_leave_the_text_as_it_is() -> None:
    text = dump({"a": [1, -2.5e3, True, None, 'x"y: 3 true'], "b\\": {}}, indent=2)
    assert re.sub(r"\x1b\[\d+m", "", colour(text)) == text
    assert colour('"a": "b"') == '\x1b[34m"a"\x1b[0m: \x1b[32m"b"\x1b[0m'
