"""examples/jobs.py: in memory, where no time passes, and as processes."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import RemoteError, open_server
from bokbok_trio.testing import consume_local
from tests.support.helpers import load_example, needs_safe_channel, settle

pytestmark = needs_safe_channel

EXAMPLE = Path(__file__).parents[2] / "examples" / "jobs.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example, which tells of progress after each piece."""
    module = load_example("jobs")
    monkeypatch.setattr(module, "TELL_EVERY", 0)
    return module


class Halt:
    """Progress that is waited for, so that the job stands still."""

    def __init__(self) -> None:
        self.is_reached = trio.Event()
        self.told: Any = None

    async def __call__(self, status: Any) -> None:
        self.told = status
        self.is_reached.set()
        await trio.sleep_forever()


async def test_a_job_tells_how_far_it_is_and_what_came_out(example: Any, autojump_clock: object) -> None:
    told: list[Any] = []

    async def note(status: Any) -> None:
        told.append(status)

    job = example.Job("some", 2_500)
    async with consume_local(example.Jobs, example.PrimeCounter()) as jobs:
        assert await jobs.run(job, progress=note) == example.Report(1, 367, 2_477, 0.0)
        assert told == [example.Status(1, job, done=done) for done in (0.4, 0.8, 1.0)]
        assert await jobs.run(example.Job("none", 1)) == example.Report(2, 0, None, 0.0)
        assert await jobs.running() == []


async def test_a_deadline_ends_a_job_and_is_known_to_it(example: Any, autojump_clock: object) -> None:
    halt = Halt()
    async with consume_local(example.Jobs, example.PrimeCounter()) as jobs:
        with trio.move_on_after(5) as scope:
            await jobs.run(example.Job("long", 10_000), progress=halt)
        assert scope.cancelled_caught
        assert halt.told.seconds_left == pytest.approx(5)
        await settle()
        assert await jobs.running() == []


async def test_who_cancels_a_job_tells_its_caller_why(example: Any, autojump_clock: object) -> None:
    halt = Halt()
    async with consume_local(example.Jobs, example.PrimeCounter()) as jobs:

        async def run() -> None:
            with pytest.raises(example.JobCancelled) as caught:
                await jobs.run(example.Job("long", 10_000), progress=halt)
            assert (caught.value.number, caught.value.reason) == (1, "enough")
            assert str(caught.value) == "job 1 was cancelled: enough"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await halt.is_reached.wait()
            [status] = await jobs.running()
            assert (status.number, status.done, status.state) == (1, 0.1, "running")
            await jobs.cancel(1, reason="enough")
        with pytest.raises(example.NoSuchJob, match="no job 1 runs"):
            await jobs.cancel(1)


async def test_so_many_jobs_may_run_and_no_more(example: Any, autojump_clock: object) -> None:
    halt = Halt()
    async with consume_local(example.Jobs, example.PrimeCounter(limit=1)) as jobs:
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await jobs.run(example.Job("long", 10_000), progress=halt)

            nursery.start_soon(run)
            await halt.is_reached.wait()
            with pytest.raises(example.TooManyJobs, match="1 jobs run already"):
                await jobs.run(example.Job("other", 1))
            nursery.cancel_scope.cancel()
        await settle()
        assert (await jobs.run(example.Job("other", 2))).primes == 1


async def test_who_watches_sees_what_becomes_of_jobs(example: Any, autojump_clock: object) -> None:
    async def fail(status: Any) -> None:
        raise ValueError("no room on the screen")

    async with consume_local(example.Jobs, example.PrimeCounter()) as jobs, jobs.watch() as statuses:
        await settle()
        await jobs.run(example.Job("short", 1))
        with trio.move_on_after(5):
            await jobs.run(example.Job("late", 10_000), progress=Halt())
        with pytest.raises(RemoteError, match="no room on the screen"):
            await jobs.run(example.Job("failing", 10_000), progress=fail)
        seen = [await statuses.receive() for _ in range(6)]
    assert [(each.job.name, each.state) for each in seen] == [
        ("short", "running"),
        ("short", "done"),
        ("late", "running"),
        ("late", "cancelled"),
        ("failing", "running"),
        ("failing", "failed"),
    ]


@pytest.mark.parametrize(
    ("name", "upto", "why"),
    [
        ("some", 0, r"\$\.job\.upto: expected int >= 1"),
        ("some", 10**9, r"\$\.job\.upto: expected int <= 100000000"),
        ("", 1, r"\$\.job\.name: expected str of length >= 1"),
        ("\x1b[31m", 1, r"\$\.job\.name: expected str matching"),
        ("a\n", 1, r"\$\.job\.name: expected str matching"),
    ],
)
async def test_what_is_no_job_does_not_begin(example: Any, name: str, upto: int, why: str) -> None:
    async with consume_local(example.Jobs, example.PrimeCounter()) as jobs:
        with pytest.raises(RemoteError, match=why) as caught:
            await jobs.run(example.Job(name, upto))
        assert caught.value.code == "bad-arguments"


# ---- the command line ----


async def test_the_clients_print_what_they_are_told(
    example: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "TELL_EVERY", math.inf)

    async with open_server("127.0.0.1:0", example.expose(example.Jobs, example.PrimeCounter())) as server:

        async def client(command: str, *arguments: str) -> list[str]:
            await example.connect(
                str(server.addresses[0]), example.CLIENTS[command, len(arguments)], *arguments
            )
            return capsys.readouterr().out.splitlines()

        told, report = await client("run", "short", "100")
        assert told == "1 short, up to 100: running, 100%"
        assert report.startswith("25 primes, the largest 97, in 0.")
        assert await client("run", "late", "100000000", "0.05") == ["there was not enough time"]

        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(example.JobCancelled, match="job 3 was cancelled: from the command line"):
                    await client("run", "long", "100000000")

            nursery.start_soon(run)
            while not (listed := await client("list")):
                pass
            assert listed[0].startswith("3 long, up to 100000000: running")
            assert await client("cancel", "3") == []


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_processes_run_watch_and_cancel() -> None:
    with ExitStack() as stack:

        def begin(*arguments: str) -> subprocess.Popen[str]:
            process = stack.enter_context(start(*arguments))
            stack.callback(process.kill)
            return process

        address = read_line(begin("serve", "127.0.0.1:0")).split()[-1]
        runner, watcher = begin("run", address, "long", "100000000"), begin("watch", address)
        assert read_line(runner).startswith("1 long, up to 100000000: running, 0%")
        assert read_line(watcher).startswith("1 long, up to 100000000: running")
        assert begin("cancel", address, "1").wait(10) == 0
        assert runner.communicate(timeout=10)[1] == "jobs: job 1 was cancelled: from the command line\n"
        assert runner.returncode == 1
        watcher.send_signal(signal.SIGINT)
        output, errors = watcher.communicate(timeout=10)
        assert (output.splitlines()[-1], errors, watcher.returncode) == ("bye", "", 0)


def test_a_signal_lets_jobs_end_and_watchers_go() -> None:
    with ExitStack() as stack:

        def begin(*arguments: str) -> subprocess.Popen[str]:
            process = stack.enter_context(start(*arguments))
            stack.callback(process.kill)
            return process

        address = read_line(server := begin("serve", "127.0.0.1:0")).split()[-1]
        watcher, runner = begin("watch", address), begin("run", address, "short", "200000")
        assert read_line(watcher).startswith("1 short, up to 200000: running")
        assert read_line(runner).startswith("1 short, up to 200000: running")
        server.send_signal(signal.SIGTERM)
        output, errors = runner.communicate(timeout=10)
        assert output.splitlines()[-1].startswith("17984 primes, the largest 199999, in ")
        assert (errors, runner.returncode) == ("", 0)
        assert (*watcher.communicate(timeout=10), watcher.returncode) == ("", "", 0)
        assert (*server.communicate(timeout=10), server.returncode) == ("stopped\n", "", 0)
