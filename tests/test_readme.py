"""What the README shows is run as it stands."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

README = (Path(__file__).parent.parent / "README.rst").read_text()


def code_blocks() -> dict[str, str]:
    """The Python blocks that begin with a file's name, by that name."""
    blocks = re.findall(r"\.\. code:: python\n\n((?:    .*\n|\n)+)", README)
    named = [(re.match(r"    # (\S+\.py)\n", block), block) for block in blocks]
    return {match[1]: re.sub(r"(?m)^    ", "", block) for match, block in named if match}


def test_the_server_and_the_client_do_what_their_comments_say(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = code_blocks()
    assert sorted(blocks) == ["client.py", "make_key.py", "server.py"]
    for name, code in blocks.items():
        (tmp_path / name).write_text(code.replace("localhost:12345", f"127.0.0.1:{port}"))
    expected = re.findall(r"request\(.*\)\)\s+# (.*)", blocks["client.py"])
    assert len(expected) == 2
    subprocess.run([sys.executable, "make_key.py"], cwd=tmp_path, timeout=30, check=True)
    with subprocess.Popen([sys.executable, "server.py"], cwd=tmp_path) as server:
        try:
            wait_for_port(port)
            client = subprocess.run(
                [sys.executable, "client.py"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
        finally:
            server.kill()
    assert client.stdout.splitlines() == expected
    assert client.stderr == ""


def wait_for_port(port: int) -> None:
    """The server says nothing when it is ready, so ask until it answers."""
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server of the README does not listen")
