"""The server's and the client's process of one adapter, as their driver sees them."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any

TIMEOUT = 120
"""Seconds to wait for a process to start, or to measure."""
SHOWN_OF_ERROR = 4_000
"""Characters."""

Result = dict[str, Any]
"""The fields of a `scenarios.Result`, or why it is ``unsupported``, or the ``error``."""


class Pair:
    """Processes that run until `close`, or until something fails."""

    def __init__(self, name: str) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._files: list[IO[str]] = []
        try:
            self._server = self._start("server", name)
            self._client = self._start("client", name)
            self._address = self._read_line(self._server)
        except BaseException:
            self.close()
            raise

    def _start(self, side: str, name: str) -> "subprocess.Popen[str]":
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._files.append(errors)
        peer = os.path.join(os.path.dirname(__file__), "peer.py")
        process = subprocess.Popen(
            [sys.executable, peer, side, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self._processes.append(process)
        return process

    def _read_line(self, process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], TIMEOUT)
        if line := process.stdout.readline() if readable else "":
            return line.rstrip("\n")
        raise RuntimeError(f"{'it ended' if readable else 'no answer'}: {self._errors()}")

    def _errors(self) -> str:
        """What both have printed to standard error, the end of it."""
        for file in self._files:
            file.seek(0)
        return "\n".join(file.read()[-SHOWN_OF_ERROR:] for file in self._files)

    def measure(self, scenario: str, seconds: float, cores: Iterable[int], **arguments: int) -> Result:
        """Run a scenario with both processes on these cores."""
        for process in self._processes:
            for thread in os.listdir(f"/proc/{process.pid}/task"):
                with suppress(ProcessLookupError):  # it has ended
                    os.sched_setaffinity(int(thread), cores)
        order = {
            "scenario": scenario,
            "seconds": seconds,
            "address": self._address,
            "server": self._server.pid,
            "arguments": arguments,
        }
        assert self._client.stdin is not None
        print(json.dumps(order), file=self._client.stdin, flush=True)
        answer: Result = json.loads(self._read_line(self._client))
        if "error" in answer:
            answer["error"] += self._errors()
        return answer

    def close(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.communicate()
        for file in self._files:
            file.close()


def measure_alone(name: str, scenario: str, seconds: float, cores: Iterable[int], **arguments: int) -> Result:
    """Run a scenario in processes of its own."""
    pair = Pair(name)
    try:
        return pair.measure(scenario, seconds, cores, **arguments)
    finally:
        pair.close()
