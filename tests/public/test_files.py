"""Files over a channel: whole or not at all, resumed, and safe from the peer."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Channel, Connection, ConnectionLost, RemoteError, RequestError
from bokbok_trio.files import CHUNK_SIZE, TransferError, receive_file, safe_name, send_file
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.helpers import documented_code

SOME = random.Random(7).randbytes(5 * CHUNK_SIZE + 123)


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


class Side:
    """One side of a transfer: its path, and the progress that it saw."""

    def __init__(self, path: Path, *, max_size: float = math.inf) -> None:
        self.path = path
        self.part = Path(f"{path}.part")
        self.max_size = max_size
        self.progress: list[tuple[int, int]] = []
        self.on_progress: Callable[[int], object] = lambda _: None

    def note(self, done: int, size: int) -> None:
        self.progress.append((done, size))
        self.on_progress(done)

    async def send(self, channel: Channel) -> bytes:
        return await send_file(channel, self.path, progress=self.note)

    async def receive(self, channel: Channel) -> bytes:
        return await receive_file(channel, self.path, max_size=self.max_size, progress=self.note)


@pytest.fixture
def source(tmp_path: Path) -> Side:
    side = Side(tmp_path / "source")
    side.path.write_bytes(SOME)
    return side


@pytest.fixture
def target(tmp_path: Path) -> Side:
    return Side(tmp_path / "target")


@asynccontextmanager
async def channels(
    act_there: Callable[[Channel], Awaitable[Any]], streams: list[FaultyStream] | None = None, **options: Any
) -> AsyncGenerator[Channel]:
    """A channel to a handler that does this; into `streams` goes what it passes through."""

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        digest = await act_there(channel)
        return [] if digest is None else [digest]

    def wrap(transport: trio.abc.HalfCloseableStream) -> FaultyStream:
        stream = FaultyStream(transport)
        if streams is not None:
            streams.append(stream)
        return stream

    async with open_connection_pair(server_channel_handler=handler, wrap=wrap, **options) as (client, _):
        async with client.open_channel([]) as channel:
            yield channel


async def put(source: Side, target: Side) -> bytes:
    async with channels(target.receive) as channel:
        digest = await source.send(channel)
        assert await channel.answer() == [digest]
    return digest


# ---- whole ----


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, len(SOME)])
@pytest.mark.parametrize("way", ["put", "get"])
async def test_a_file_arrives_whole(size: int, way: str, source: Side, target: Side) -> None:
    source.path.write_bytes(SOME[:size])
    if way == "put":
        digest = await put(source, target)
    else:
        async with channels(source.send) as channel:
            digest = await target.receive(channel)
            assert await channel.answer() == [digest]
    assert digest == digest_of(SOME[:size])
    assert target.path.read_bytes() == SOME[:size]
    assert not target.part.exists()
    assert source.progress == target.progress
    assert source.progress[0] == (0, size)
    assert source.progress[-1] == (size, size)
    steps = [done for done, _ in source.progress]
    assert all(0 < after - before <= CHUNK_SIZE for before, after in pairwise(steps))


async def test_several_files_follow_one_another_and_replace_what_was_there(
    source: Side, tmp_path: Path
) -> None:
    paths = [tmp_path / str(n) for n in range(3)]
    paths[1].write_bytes(b"old")
    paths[1].chmod(0o600)

    async def receive_all(channel: Channel) -> None:
        for path in paths:
            await receive_file(channel, path, max_size=math.inf)

    async with channels(receive_all) as channel:
        for _ in paths:
            await send_file(channel, source.path)
            source.path.write_bytes(source.path.read_bytes()[:-1000])
        await channel.answer()
    assert [path.stat().st_size for path in paths] == [len(SOME) - n * 1000 for n in range(3)]
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "source"]


async def test_a_path_in_this_folder(source: Side, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    await put(source, Side(Path("here")))
    assert (tmp_path / "here").read_bytes() == SOME


async def test_the_event_loop_never_waits_for_the_disk(
    source: Side, target: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.get_ident())
            return function(*args, **kwargs)

        return noted

    for name in ("open", "pread", "pwrite", "fsync", "replace", "ftruncate"):
        monkeypatch.setattr(os, name, note(getattr(os, name)))
    await put(source, target)
    assert threads
    assert threading.get_ident() not in threads


# ---- broken off, and resumed ----


async def test_it_is_resumed_where_the_connection_was_cut(source: Side, target: Side) -> None:
    streams: list[FaultyStream] = []
    with pytest.raises((ConnectionLost, trio.BrokenResourceError)):
        async with channels(target.receive, streams) as channel:
            streams[0].sending.cut(after=3 * CHUNK_SIZE + 5000)
            await source.send(channel)
    assert not target.path.exists()
    got = target.part.read_bytes()
    assert 0 < len(got) < len(SOME)
    assert SOME.startswith(got)
    streams.clear()
    async with channels(target.receive, streams) as channel:
        before = streams[0].sending.passed
        source.progress.clear()
        assert await source.send(channel) == digest_of(SOME)
        assert streams[0].sending.passed - before < len(SOME) - len(got) + 1000
    assert source.progress[0] == (len(got), len(SOME))
    assert target.path.read_bytes() == SOME
    assert not target.part.exists()


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_who_is_cancelled_half_way_leaves_a_part(who: str, source: Side, target: Side) -> None:
    target.path.write_bytes(b"old")
    side, other = (source, target) if who == "sender" else (target, source)
    act, act_there = (side.send, other.receive) if who == "sender" else (side.receive, other.send)
    async with channels(act_there) as channel:
        with trio.CancelScope() as scope:
            # The receiver's progress: chunks of the sender may wait when it is cancelled, and are dropped.
            target.on_progress = lambda done: done > 2 * CHUNK_SIZE and scope.cancel()
            await act(channel)
        assert scope.cancelled_caught
    got = target.part.read_bytes()
    assert len(got) >= 2 * CHUNK_SIZE
    assert SOME.startswith(got)
    assert target.path.read_bytes() == b"old"
    target.on_progress = lambda _: None
    source.progress.clear()
    await put(source, target)
    assert source.progress[0][0] == len(got)
    assert target.path.read_bytes() == SOME


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(SOME[: 2 * CHUNK_SIZE - 1] + b"!", id="another beginning"),
        pytest.param(SOME + b"more", id="longer than the file"),
        pytest.param(b"", id="nothing yet"),
    ],
)
async def test_a_part_of_another_file_is_begun_anew(part: bytes, source: Side, target: Side) -> None:
    target.part.write_bytes(part)
    await put(source, target)
    assert source.progress[0] == (0, len(SOME))
    assert target.path.read_bytes() == SOME


async def test_a_part_that_is_whole_needs_its_name_only(source: Side, target: Side) -> None:
    target.part.write_bytes(SOME)
    await put(source, target)
    assert source.progress == [(len(SOME), len(SOME))]
    assert target.path.read_bytes() == SOME


async def test_a_full_disk_is_told_and_leaves_a_part(
    source: Side, target: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def full(fd: int, data: Any, at: int) -> int:
        if at >= 2 * CHUNK_SIZE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:1000], at)  # some bytes at a time, as write(2) may do

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RemoteError, match="No space left"):
        async with channels(target.receive) as channel:
            with pytest.raises(trio.BrokenResourceError, match="No space left"):
                await source.send(channel)
            await channel.answer()
    assert target.part.read_bytes() == SOME[: 2 * CHUNK_SIZE]
    monkeypatch.undo()
    await put(source, target)
    assert target.path.read_bytes() == SOME


async def test_two_at_once_take_turns(source: Side, target: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was broken off may still hold its part for a moment."""
    async with channels(target.receive) as first:
        await first.send(["file", "5"])
        assert (await first.receive())[0] == b"from"
        with monkeypatch.context() as patch:
            patch.setattr("bokbok_trio.files.LOCK_PATIENCE", 0.1)
            with pytest.raises(RemoteError, match="is being received already"):
                async with channels(target.receive) as second:
                    await second.send(["file", "5"])
                    await second.answer()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, source, target)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await first.aclose()
    assert target.path.read_bytes() == SOME


async def test_one_that_was_put_in_place_while_another_opened_it(
    source: Side, target: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened is the whole file by then, and must not be written to."""
    monkeypatch.setattr("bokbok_trio.files.fcntl.flock", lambda *_: put_in_place())
    target.part.write_bytes(b"another, whole")
    finished = target.path.with_name("finished")

    def put_in_place() -> None:
        if not finished.exists():
            target.part.rename(finished)

    await put(source, target)
    assert finished.read_bytes() == b"another, whole"
    assert target.path.read_bytes() == SOME


# ---- files that are none, or change ----


async def test_what_is_no_file_is_refused(source: Side, target: Side, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, error in (
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "nothing", "No such file"),
    ):
        async with channels(target.receive) as channel:
            with pytest.raises(OSError, match=error):
                await send_file(channel, path)
    target.path.mkdir()
    with pytest.raises(RemoteError, match="Is a directory"):
        async with channels(target.receive) as channel:
            await channel.send(["file", "5"])
            await channel.answer()
    with pytest.raises(RemoteError, match="No such file"):
        async with channels(Side(tmp_path / "no" / "folder").receive) as channel:
            await channel.send(["file", "5"])
            await channel.answer()


async def test_nothing_planted_is_written_to(source: Side, target: Side, tmp_path: Path) -> None:
    """Links and pipes where the part would be; a link where the file would be is replaced, not followed."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    plants: list[tuple[Callable[[], None], str]] = [
        (partial(target.part.symlink_to, precious), "symbolic links"),
        (partial(os.mkfifo, target.part), "not a regular file"),
    ]
    for plant, error in plants:
        plant()
        with pytest.raises(RemoteError, match=error):
            async with channels(target.receive) as channel:
                await channel.send(["file", "5"])
                await channel.answer()
        target.part.unlink()
    target.path.symlink_to(precious)
    await put(source, target)
    assert not target.path.is_symlink()
    assert target.path.read_bytes() == SOME
    assert precious.read_bytes() == b"precious"


async def test_a_file_that_shrinks_is_noticed(source: Side, target: Side) -> None:
    async with channels(target.receive) as channel:
        source.on_progress = partial(os.truncate, source.path)
        with pytest.raises(TransferError, match="has become shorter"):
            await source.send(channel)
    assert not target.path.exists()


async def test_a_file_that_grows_is_sent_as_it_was(source: Side, target: Side) -> None:
    def grow(_: int) -> None:
        with source.path.open("ab") as file:
            file.write(b"more")

    source.on_progress = grow
    await put(source, target)
    assert target.path.read_bytes() == SOME


async def test_a_file_may_be_too_large(source: Side, target: Side) -> None:
    target.max_size = len(SOME) - 1
    with pytest.raises(RemoteError, match=f"{len(SOME)} bytes is larger than the {len(SOME) - 1}"):
        async with channels(target.receive) as channel:
            with pytest.raises((TransferError, trio.BrokenResourceError)):
                await source.send(channel)
            await channel.answer()
    assert not target.part.exists()
    target.max_size += 1
    await put(source, target)
    for nonsense in (-1, math.nan):
        with pytest.raises(ValueError, match="at least 0 bytes"):
            await receive_file(channel, target.path, max_size=nonsense)
    for unfit in (None, "1 MiB"):
        with pytest.raises(TypeError, match="max_size must be a number of bytes, not"):
            await receive_file(channel, target.path, max_size=unfit)  # type: ignore[arg-type]


# ---- the other side lies ----


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ([], "ended instead of sending 'file'"),
        ([[]], "sent b''"),
        ([["file"]], "sent b'file'"),
        ([["data", "x"]], "sent b'data'"),
        *[
            ([["file", number]], "not a number")
            for number in ("", "-1", "+1", "1_0", "01", " 1", "9" * 19, "x")
        ],
        ([["file", "5"]], "ended instead of sending 'from'"),
        ([["file", "5"], ["from", "5"]], "goes on from 5 instead of 2"),
        ([["file", "5"], ["from", "1"]], "goes on from 1 instead of 2"),
        ([["file", "5"], ["from", "0"], ["data", ""]], "0 bytes instead of 1 to 5"),
        ([["file", "5"], ["from", "0"], ["data", "123456"]], "6 bytes instead of 1 to 5"),
        ([["file", "5"], ["from", "2"], ["data", "1234"]], "4 bytes instead of 1 to 3"),
        ([["file", "5"], ["from", "0"], ["data", "123"], ["end", "x"]], "sent b'end'"),
        ([["file", "5"], ["from", "0"], ["data", "12345"], ["data", "6"]], "sent b'data'"),
    ],
)
async def test_a_sender_that_breaks_the_rules(items: Any, match: str, target: Side) -> None:
    target.path.write_bytes(b"old")
    target.part.write_bytes(b"ab")
    with pytest.raises(RemoteError, match=match):
        async with channels(target.receive) as channel:
            for item in items:
                await channel.send(item)
            await channel.end()
            await channel.answer()
    assert target.path.read_bytes() == b"old"


async def test_what_arrived_differently_is_dropped(target: Side) -> None:
    target.path.write_bytes(b"old")
    with pytest.raises(RemoteError, match="arrived differently"):
        async with channels(target.receive) as channel:
            for item in (["file", "5"], ["from", "0"], ["data", "12345"]):
                await channel.send(item)
            await channel.send(["end", digest_of(b"12346")])
            await channel.answer()
    assert target.path.read_bytes() == b"old"
    assert not target.part.exists(), "or it would be resumed for ever"


@pytest.mark.parametrize(
    ("items", "match"),
    [
        ([], "ended instead of sending 'from'"),
        ([["from", "0"]], "sent b'from'"),
        ([["from", "x", ""]], "not a number"),
        ([["from", str(len(SOME) + 1), ""]], f"has {len(SOME) + 1} bytes of a file of {len(SOME)}"),
        ([["from", str(len(SOME)), digest_of(SOME)]], "ended instead of sending 'done'"),
        ([["from", str(len(SOME)), digest_of(SOME)], ["well done"]], "sent b'well done'"),
    ],
)
async def test_a_receiver_that_breaks_the_rules(items: Any, match: str, source: Side) -> None:
    async def lie(channel: Channel) -> None:
        await channel.receive()
        for item in items:
            await channel.send(item)
        while items and (await channel.receive())[0] != b"end":
            pass

    async with channels(lie) as channel:
        with pytest.raises(TransferError, match=match):
            await source.send(channel)


async def test_a_receiver_cannot_make_it_resume_what_it_does_not_have(source: Side) -> None:
    async def lie(channel: Channel) -> bytes:
        await channel.receive()
        await channel.send(["from", "1000", digest_of(b"a guess")])
        return (await channel.receive())[1]

    async with channels(lie) as channel:
        with pytest.raises((TransferError, trio.BrokenResourceError)):
            await source.send(channel)
        assert await channel.answer() == [b"0"]


# ---- names ----


@pytest.mark.parametrize("name", ["a", "report.pdf", "ümläut", "two words", "x" * 250, "a.b.c", "-rf", "~"])
def test_plain_names_are_safe(name: str) -> None:
    assert safe_name(name) == safe_name(name.encode()) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "/etc/passwd", "a/b", "a/", "a\\b", "..\\x", ".ssh", ".bashrc"),
        *("a\0b", "a\nb", "\x1b[31m", "x" * 251, "ü" * 126, "x.part", ".part", "\u202ecod.exe", "\ud800"),
        *(b"\xff", b"a\xc0\xaf", b"/x"),
    ],
)
def test_others_are_refused(name: str | bytes) -> None:
    with pytest.raises(RequestError, match="the name of a file must be") as caught:
        safe_name(name)
    assert caught.value.code == "bad-name"


# ---- the documentation, and the example ----


async def test_what_the_documentation_shows(
    source: Side, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    [code] = documented_code("patterns.rst", "receive_file")
    exec(code.replace("/srv/files", str(tmp_path / "there")), names)
    (tmp_path / "there").mkdir()
    async with open_connection_pair(server_channel_handler=names["channel_handler"]) as (client, _):
        await names["put"](client, source.path)
        assert (tmp_path / "there" / "source").read_bytes() == SOME
        async with client.open_channel(["get", "source"]) as channel:
            await receive_file(channel, tmp_path / "copy", max_size=math.inf)
        assert (tmp_path / "copy").read_bytes() == SOME
        async with client.open_channel(["get", "../source"]) as channel:
            with pytest.raises(RemoteError, match="bad-name"):
                await channel.answer()
    assert capsys.readouterr().out.endswith(f"{len(SOME)} of {len(SOME)}\n")


EXAMPLE = Path(__file__).parents[2] / "examples" / "files.py"


def test_the_example_puts_and_gets(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (here / "a.bin").write_bytes(SOME)
    with subprocess.Popen(
        [sys.executable, EXAMPLE, "serve", "127.0.0.1:0", there], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, EXAMPLE, *arguments],
                cwd=here,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )

        try:
            expected = f"a.bin, digest {digest_of(SOME).hex()[:16]}\n"
            done = run("put", address, "a.bin")
            assert (done.stdout, done.stderr) == (f"put {expected}", "")
            assert (there / "a.bin").read_bytes() == SOME
            (here / "a.bin").unlink()
            done = run("get", address, "a.bin")
            assert (done.stdout, done.stderr) == (f"got {expected}", "")
            assert (here / "a.bin").read_bytes() == SOME
            assert "there is no such file" in run("get", address, "nothing").stderr
        finally:
            server.kill()
