"""Runs the code of the README as it stands."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support.helpers import needs_safe_channel

README = (Path(__file__).parents[2] / "README.rst").read_text()


def code_blocks() -> dict[str, str]:
    """The Python blocks that begin with a file's name, by that name."""
    blocks = re.findall(r"\.\. code:: python\n\n((?:    .*\n|\n)+)", README)
    named = [(re.match(r"    # (\S+\.py)\n", block), block) for block in blocks]
    return {match[1]: re.sub(r"(?m)^    ", "", block) for match, block in named if match}


def run_pair(folder: Path, server: str, client: str) -> list[str]:
    """Run a server and a client of the README at a free port; return the lines that the client printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, code in code_blocks().items():
        (folder / name).write_text(code.replace("localhost:12345", f"127.0.0.1:{port}"))
    if server == "server.py":
        subprocess.run([sys.executable, "make_key.py"], cwd=folder, timeout=30, check=True)
    with subprocess.Popen([sys.executable, server], cwd=folder) as process:
        try:
            wait_for_port(port)
            ran = subprocess.run(
                [sys.executable, client],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
        finally:
            process.kill()
    assert ran.stderr == ""
    return ran.stdout.splitlines()


@needs_safe_channel
def test_the_typed_server_and_client_do_what_their_comments_say(tmp_path: Path) -> None:
    comments = re.findall(r"print\(await .*\)  +# (.*)", code_blocks()["watcher.py"])
    assert len(comments) == 2
    reading, callback_and_result = comments
    assert run_pair(tmp_path, "station.py", "watcher.py") == [reading, *callback_and_result.split(", ")]


def test_the_server_and_the_client_of_bytes_do_what_their_comments_say(tmp_path: Path) -> None:
    comments = re.findall(r"request\(.*\)\)\s+# (.*)", code_blocks()["client.py"])
    assert len(comments) == 2
    assert run_pair(tmp_path, "server.py", "client.py") == comments


def wait_for_port(port: int) -> None:
    """Wait until a server answers: it writes nothing when it is ready."""
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server of the README does not listen")
