"""`bokbok serve`: a server for development."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from bokbok_trio import ConnectionLost, Key, Keyring, PeerCredentials, open_connection
from bokbok_trio._cli import _serving
from tests.support.cli import Run, run

__all__ = ["run"]

WAIT = 20.0

APP = """
import os, signal, trio
from bokbok_trio import RequestError
async def handler(connection, request):
    if request[0] == b"stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if request == [b"stop", b"twice"]:
        await connection.draining.wait()
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()
    if request[0] == b"change":
        os.utime(__file__, (1, 1))
    if request == [b"change", b"stop"]:
        await connection.draining.wait()
        os.kill(os.getpid(), signal.SIGTERM)
    return ["first", connection.user or "nobody"]
class Box:
    handler = handler
number = 3
"""


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make a module to serve in the working directory. Return its name, which no other test uses."""
    name = f"app_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(_serving.RELOADED, raising=False)
    monkeypatch.setattr(_serving, "POLL", 0.01)
    yield name
    sys.modules.pop(name, None)
    for fd, _ in json.loads(os.environ.pop(_serving.RELOADED, "[]")):
        os.close(fd)


class Asked(threading.Thread):
    """Asks a server something as soon as it listens."""

    def __init__(self, address: str, *fields: str, **options: Any) -> None:
        super().__init__()
        self.answer: list[bytes] = []
        self._address, self._fields, self._options = address, fields, options
        self.start()

    def run(self) -> None:
        trio.run(self._ask)

    async def _ask(self) -> None:
        with trio.fail_after(WAIT):
            while True:
                try:
                    async with open_connection(self._address, **self._options) as connection:
                        self.answer = await connection.request(self._fields)
                        return
                except ConnectionLost:
                    return
                except OSError:
                    await trio.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unlink_when_it_waits(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Remove a file as soon as the server waits for a change."""
    wait = _serving.Files.wait_for_change

    async def unlink_and_wait(files: _serving.Files) -> None:
        path.unlink()
        await wait(files)

    monkeypatch.setattr(_serving.Files, "wait_for_change", unlink_and_wait)


def test_a_handler_is_served_until_a_signal_comes(run: Run, app: str) -> None:
    asked = Asked("./sock", "stop")
    ran = run("serve", f"{app}:Box.handler", "./sock", "--no-reload")
    asked.join()
    assert (ran.code, ran.out) == (0, "")
    assert asked.answer[0] == b"first"
    assert ran.err.startswith(f"bokbok: serving {app}:Box.handler plain on ")
    assert "bokbok: stopping: requests in flight have 10 s; another signal stops at once\n" in ran.err
    if sys.platform == "linux":
        assert asked.answer[1].decode() == pwd.getpwuid(os.getuid()).pw_name


def test_a_second_signal_stops_it_at_once(run: Run, app: str) -> None:
    asked = Asked("./sock", "stop", "twice")
    ran = run("serve", f"{app}:handler", "./sock")
    asked.join()
    assert (ran.code, asked.answer) == (0, [])


def test_users_are_let_in_by_their_keys(run: Run, app: str, tmp_path: Path) -> None:
    key = Key.generate()
    Keyring.create("users.keys").add("ann", key)
    address = f"127.0.0.1:{free_port()}"
    asked = Asked(address, "stop", user="ann", key=key, service="s")
    ran = run("serve", f"{app}:handler", address, "--users", "users.keys", "--service", "s", "--no-reload")
    asked.join()
    assert (ran.code, asked.answer) == (0, [b"first", b"ann"])
    assert ran.err.startswith(f"bokbok: serving {app}:handler sealed on {address}\n")


def test_it_begins_anew_when_the_code_changes(run: Run, app: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *args: ran.append(args))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "bokbok_trio", "serve"])
    asked = Asked("./sock", "change")
    assert run("serve", f"{app}:handler", "./sock").code == 0
    asked.join()
    assert asked.answer[0] == b"first"
    assert ran == [(sys.executable, [sys.executable, "-m", "bokbok_trio", "serve"])]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_the_process_that_begins_anew_goes_on_to_listen(
    run: Run, app: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: None)
    address = "./sock" if kind == "unix" else f"127.0.0.1:{free_port()}"
    asked = Asked(address, "change")
    ran = run("serve", f"{app}:handler", address)
    asked.join()
    assert (ran.code, asked.answer[0]) == (0, b"first")
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as dialled:
        # Nobody accepts yet, and it is not refused.
        dialled.connect("sock" if kind == "unix" else ("127.0.0.1", int(address.partition(":")[2])))
    asked = Asked(address, "stop")
    again = run("serve", f"{app}:handler", address)
    asked.join()
    assert (again.code, asked.answer[0]) == (0, b"first")
    assert again.err.splitlines()[0] == ran.err.splitlines()[0]
    assert _serving.RELOADED not in os.environ
    assert not Path("sock").exists()


@pytest.mark.parametrize("code", ["(", "handler = 3"])
def test_a_signal_ends_it_while_it_waits_for_a_change(
    run: Run, app: str, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: None)
    asked = Asked("./sock", "change")
    assert run("serve", f"{app}:handler", "./sock").code == 0
    asked.join()
    Path(f"{app}.py").write_text(code)
    sys.modules.pop(app)
    assert Path("sock").exists()

    async def wait_for_change(_: _serving.Files) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

    monkeypatch.setattr(_serving.Files, "wait_for_change", wait_for_change)
    ran = run("serve", f"{app}:handler", "./sock")
    assert ran.code == 0
    assert ran.err.endswith("; waiting for a change\n")
    assert not Path("sock").exists()


def test_a_signal_ends_it_while_it_stops_for_a_change(
    run: Run, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *args: began.append(args))
    asked = Asked("./sock", "change", "stop")
    assert run("serve", f"{app}:handler", "./sock").code == 0
    asked.join()
    assert asked.answer[0] == b"first"
    assert not began
    assert not Path("sock").exists()


def test_users_that_cannot_be_read_are_waited_for(
    run: Run, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *args: began.append(args))
    monkeypatch.setenv(_serving.RELOADED, "[]")
    Path("users.keys").write_text("nonsense")
    Path("users.keys").chmod(0o600)
    unlink_when_it_waits(monkeypatch, Path("users.keys"))
    ran = run("serve", f"{app}:handler", "./sock", "--users", "users.keys")
    assert ran.code == 0
    assert "; waiting for a change\n" in ran.err
    assert began


def test_code_that_cannot_be_loaded_is_waited_for(
    run: Run, app: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{app}.py"
    path.write_text("raise SystemExit(3)")
    assert run("serve", f"{app}:handler", "./sock").code == 1
    path.write_text("(")
    ran = run("serve", f"{app}:handler", "./sock")
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith(f"bokbok: cannot load {app}:handler: SyntaxError: ")
    began: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *args: began.append(args))
    monkeypatch.setenv(_serving.RELOADED, "[]")
    unlink_when_it_waits(monkeypatch, path)
    ran = run("serve", f"{app}:handler", "./sock")
    assert "; waiting for a change\n" in ran.err
    assert began


@pytest.mark.parametrize(
    ("object", "address", "code", "error"),
    [
        ("nothing", "./sock", 2, "'nothing' is not MODULE:OBJECT, such as app:handler"),
        ("APP:", "./sock", 2, "'APP:' is not MODULE:OBJECT, such as app:handler"),
        ("APP.py:handler", "./sock", 2, "'APP.py' is not the name of a module: that of app.py is app"),
        ("./APP:handler", "./sock", 2, "'./APP' is not the name of a module: that of app.py is app"),
        ("..APP:handler", "./sock", 2, "'..APP' is not the name of a module: that of app.py is app"),
        (
            "APP:nothing",
            "./sock",
            1,
            "cannot load APP:nothing: AttributeError: module 'APP' has no attribute 'nothing'",
        ),
        (
            "no_such_module:x",
            "./sock",
            1,
            "cannot load no_such_module:x: ModuleNotFoundError: No module named",
        ),
        ("APP:number", "./sock", 2, "request_handler must be an async function, not 3"),
        ("APP:handler", "nonsense", 2, "invalid address: 'nonsense'"),
        (
            "APP:handler",
            ":0",
            2,
            "plain TCP with all interfaces, which is not loopback, needs --insecure (or a key)",
        ),
        ("APP:handler", "./taken", 1, "CWD/taken is in use"),
        ("APP:handler", "./none/sock", 1, ""),
    ],
)
def test_what_cannot_be_served(  # noqa: PLR0917  (parameters)
    run: Run, app: str, object: str, address: str, code: int, error: str
) -> None:
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind("taken")
        taken.listen()
        ran = run("serve", object.replace("APP", app), address, "--no-reload")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.splitlines()[-1].startswith(
        "bokbok: " + error.replace("APP", app).replace("CWD", os.getcwd())
    )


def test_a_file_of_users_that_is_not_there(run: Run, app: str, tmp_path: Path) -> None:
    ran = run("serve", f"{app}:handler", "./sock", "--users", "none")
    assert (ran.code, ran.error) == (1, f"{tmp_path}/none: No such file or directory")
    ran = run("serve", f"{app}:handler", "./sock", "--service", "s")
    assert (ran.code, ran.err.splitlines()[-1].startswith("bokbok: a service needs ")) == (2, True)


def test_a_user_whom_the_system_does_not_know_has_a_number() -> None:
    assert _serving.name_peer(PeerCredentials(1, 4_000_000_000, 1)) == "4000000000"


def test_a_change_of_the_code_is_served_by_a_process(tmp_path: Path) -> None:
    """One run of a process: a change, broken code, its repair, and Ctrl-C."""
    path = tmp_path / "app.py"
    path.write_text(APP)
    command = [sys.executable, "-m", "bokbok_trio", "serve", "app:handler", "./sock"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None

        def wait_for(words: str) -> None:
            assert process.stderr is not None
            for line in process.stderr:
                if words in line:
                    return
            raise AssertionError(words)

        try:
            wait_for("serving app:handler plain on ")
            path.write_text("(")
            wait_for("waiting for a change")
            with socket.socket(socket.AF_UNIX) as dialled:
                dialled.connect(str(tmp_path / "sock"))
            path.write_text(APP.replace("first", "second"))
            wait_for("serving app:handler plain on ")
            asked = Asked(str(tmp_path / "sock"), "x")
            asked.join()
            assert asked.answer[0] == b"second"
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=WAIT)
            assert process.returncode == 0
            assert not (tmp_path / "sock").exists()
        finally:
            process.kill()
