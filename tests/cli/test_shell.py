"""The command as a user has it: a process in pipes and terminals, under signals, completed by shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bokbok_trio._cli._parser import make_parser
from tests.support.cli import Run, address, run

__all__ = ["address", "run"]

BOKBOK = [sys.executable, "-m", "bokbok_trio"]
WAIT = 20.0  # seconds, for what takes a fraction of one


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with ExitStack() as stack:

        def start(*args: object, **options: Any) -> subprocess.Popen[str]:
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
            process = subprocess.Popen([*BOKBOK, *map(str, args)], **options)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def read_until(fd: int, words: str, *, without_colours: bool = True) -> str:
    """Read a terminal until it shows some words."""
    data, end = "", time.monotonic() + WAIT
    while words not in data:
        ready, _, _ = select.select([fd], [], [], end - time.monotonic())
        assert ready, f"no {words!r} in {data!r}"
        data += os.read(fd, 65536).decode(errors="replace")
        data = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", data) if without_colours else data
    return data


def in_shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that can call bokbok."""
    command = f'bokbok() {{ {shlex.join(BOKBOK)} "$@"; }}\n{script}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=WAIT, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


@needs("bash")
def test_in_pipes(address: str) -> None:
    """One script: a stream into a reader that stops, a full disk, and a closed output."""
    script = (
        'bokbok follow "$A" Files.lines path=/endless | head -n 1\n'
        'echo "${PIPESTATUS[@]}"\n'
        'bokbok request "$A" x > /dev/full\necho $?\n'
        'bokbok request "$A" x >&-\necho $?\n'
    )
    ran = in_shell(script, A=address)
    assert ran.stdout == '"/endless:0"\n141 0\n1\n1\n'
    assert ran.stderr == (
        "bokbok: cannot write the output: No space left on device\n"
        "bokbok: cannot write the output: Bad file descriptor\n"
    )


def test_each_item_is_there_at_once_and_ctrl_c_ends_a_stream(start: Any, address: str) -> None:
    process = start("follow", address, "Files.lines", "path=/endless", "count=2")
    assert process.stdout.readline() == '"/endless:0"\n'
    assert process.stdout.readline() == '"/endless:1"\n'
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, output, errors) == (130, "", "bokbok: interrupted\n")


def test_ctrl_c_ends_a_ping_with_its_summary(start: Any, address: str) -> None:
    process = start("ping", address)
    assert process.stdout.readline().startswith(f"pong from {address}: seq=1 time=")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT)
    assert (process.returncode, errors) == (130, "bokbok: interrupted\n")
    assert output.startswith(f"--- {address}: ")


def test_in_a_terminal(address: str) -> None:
    ours, theirs = pty.openpty()
    command = [*BOKBOK, "call", address, "Files.stat", "path=/etc"]
    env = {**os.environ, "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        shown = read_until(ours, "}", without_colours=False)
        assert process.wait(WAIT) == 0
    os.close(ours)
    os.close(theirs)
    assert '  \x1b[34m"size"\x1b[0m: \x1b[36m4\x1b[0m,' in shown


@needs("tmux")
def test_a_key_is_typed_in_tmux(tmp_path: Path) -> None:
    """A mistyped key is noticed, and the typed text is not shown."""
    session = ["tmux", "-L", f"bokbok-{os.getpid()}", "-f", "/dev/null"]
    script = f"{shlex.join(BOKBOK)} key check; echo code $?; sleep {WAIT}"
    subprocess.run([*session, "new-session", "-d", "-x", "100", "-y", "20", script], check=True)

    def wait_for(words: str) -> str:
        end = time.monotonic() + WAIT
        while True:
            shown = subprocess.run(
                [*session, "capture-pane", "-p"], capture_output=True, text=True, check=True
            ).stdout
            if words in shown:
                return shown
            assert time.monotonic() < end, shown
            time.sleep(0.02)

    try:
        wait_for("Key:")
        subprocess.run([*session, "send-keys", "bokbok-key-1qqq", "Enter"], check=True)
        shown = wait_for("code ")
    finally:
        subprocess.run([*session, "kill-server"], check=True)
    assert "qqq" not in shown
    assert "bokbok: this is not the text of a key: it has 15 characters, and not 70" in shown
    assert "code 1" in shown


# ---- completion ----


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The completions for all shells, as the command writes them."""
    shtab = pytest.importorskip(
        "shtab", reason="shtab is not installed: pip install 'bokbok-trio[completion]'"
    )
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(shtab.complete(make_parser(), shell))
    return Path(folder)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_completion_is_written(run: Run, shell: str) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'bokbok-trio[completion]'")
    ran = run("completion", shell)
    assert (ran.code, ran.err) == (0, "")
    assert "bokbok" in ran.out


@needs("bash")
def test_bash_completes(scripts: Path) -> None:
    script = (
        f". {scripts}/bash\n"
        'try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_bokbok\n'
        "echo ${COMPREPLY[@]}; }\n"
        "try bokbok re\ntry bokbok key n\ntry bokbok call --key\ntry bokbok completion z\n"
    )
    ran = in_shell(script)
    assert (ran.stdout, ran.stderr) == ("request\nnew\n--key-file\nzsh\n", "")


@needs("zsh")
def test_zsh_completes(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "_bokbok").write_text((scripts / "zsh").read_text())
    (tmp_path / "some.key").touch()
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        os.write(
            fd, b"PS1='ready> '; fpath=($PWD $fpath); autoload -U compinit; compinit -u -D; echo x$((1))y\n"
        )
        read_until(fd, "x1y")
        os.write(fd, b"bokbok describ\t")
        read_until(fd, "describe ")
        os.write(fd, b"--key-file som\t")
        read_until(fd, "some.key")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)


def test_without_shtab_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    ran = run("completion", "bash")
    assert (ran.code, ran.error) == (1, "this needs shtab: install bokbok-trio[completion]")


def test_an_older_shtab_knows_fewer_shells(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shtab = pytest.importorskip(
        "shtab", reason="shtab is not installed: pip install 'bokbok-trio[completion]'"
    )
    monkeypatch.setattr(shtab, "SUPPORTED_SHELLS", ["bash"])
    ran = run("completion", "zsh")
    assert (ran.code, ran.error) == (1, "this version of shtab does not know zsh")
