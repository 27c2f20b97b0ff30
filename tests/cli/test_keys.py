"""`bokbok key` and `bokbok users`: keys and users in files. No secret is shown to others."""

from __future__ import annotations

import getpass
import json
import os
import stat
from pathlib import Path

import pytest
import trio

from bokbok_trio import Key, Keyring, passphrase_to_key
from tests.support.cli import Run, run

__all__ = ["run"]

WHY_NOT = "keys and passphrases are not taken from the command line, where every process "


@pytest.fixture
def key(tmp_path: Path) -> Path:
    Key.generate().save(tmp_path / "a.key")
    return tmp_path / "a.key"


def swap_end(text: str) -> str:
    """Return a text with another last character."""
    return text[:-1] + ("q" if text[-1] != "q" else "p")


def test_a_new_key_is_in_a_file_of_its_owner(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new.key"
    ran = run("key", "new", path)
    assert (ran.code, ran.out, ran.err) == (0, f"{Key.load(path).fingerprint}\n", "")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    ran = run("key", "new", path)
    assert (ran.code, ran.out, ran.error) == (1, "", f"{path}: File exists")


def test_a_new_key_for_a_pipe(run: Run) -> None:
    ran = run("key", "new", "-")
    key = Key.from_text(ran.out)
    assert run("key", "check", "-", stdin=ran.out.encode()).out == f"{key.fingerprint}\n"
    assert run("key", "check", stdin=ran.out.encode()).code == 0


def test_a_key_is_shown_where_that_is_asked_for(run: Run, key: Path) -> None:
    loaded = Key.load(key)
    ran = run("key", "show", key)
    assert (ran.code, ran.out) == (0, f"{loaded.fingerprint}\n")
    assert run("key", "show", "--secret", key).out == f"{loaded.to_text()}\n"
    assert run("key", "show", "--json", key).json == {"name": str(key), "fingerprint": loaded.fingerprint}


@pytest.mark.parametrize("command", [("key", "check"), ("key", "show")])
def test_what_is_no_key_is_said_and_not_shown(
    run: Run, command: tuple[str, str], tmp_path: Path, key: Path
) -> None:
    text = swap_end(key.read_text().strip())
    wrong = tmp_path / "wrong.key"
    wrong.write_text(text)
    wrong.chmod(0o600)
    ran = run(*command, wrong)
    assert (ran.code, ran.out) == (1, "")
    assert text not in ran.error
    key.chmod(0o644)
    ran = run(*command, key)
    assert (ran.code, ran.error) == (
        1,
        f"cannot use the key file {key}: others can read or change it: chmod 600 {key}",
    )
    assert run(*command, tmp_path / "none").error == (
        f"cannot use the key file {tmp_path}/none: No such file or directory"
    )


def test_a_mistyped_key_is_noticed(run: Run) -> None:
    typed = swap_end(Key.generate().to_text())
    ran = run("key", "check", stdin=typed.encode())
    assert (ran.code, ran.out) == (1, "")
    assert typed not in ran.error
    assert run("key", "check", stdin=b"\xff").error == "the standard input is not text in UTF-8"


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the derivation of keys cheap. Its result does not matter here."""
    monkeypatch.setattr("bokbok_trio._keys.ARGON2ID_MEMORY", 2**16)


@pytest.mark.usefixtures("cheap")
def test_a_key_of_a_passphrase(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    ran = run("key", "from-passphrase", "ann", path, stdin="pass phrase ä\r\n".encode())
    assert ran.code == 0
    assert Key.load(path) == trio.run(passphrase_to_key, "pass phrase ä", "ann")
    ran = run("key", "from-passphrase", "ann", tmp_path / "b.key", stdin=b"\n")
    assert (ran.code, ran.error) == (1, "a passphrase must not be empty")


@pytest.mark.usefixtures("cheap")
def test_a_passphrase_is_asked_for_twice(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[str] = []

    def ask(prompt: str) -> str:
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr(os, "isatty", lambda fd: fd == 0)
    monkeypatch.setattr(getpass, "getpass", ask)
    ran = run("key", "from-passphrase", "ann", tmp_path / "a.key")
    assert (ran.code, ran.error) == (1, "nothing was typed")
    typed += ["one", "another"]
    ran = run("key", "from-passphrase", "ann", tmp_path / "a.key")
    assert (ran.code, ran.error) == (1, "the two differ")
    typed += ["one", "one"]
    assert run("key", "from-passphrase", "ann", tmp_path / "a.key").code == 0
    typed += [Key.generate().to_text()]
    assert run("key", "check").code == 0


def test_ctrl_c_at_a_prompt_leaves_a_line_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "isatty", lambda fd: fd == 0)
    monkeypatch.setattr(getpass, "getpass", ask)
    ran = run("key", "check")
    assert (ran.code, ran.err) == (130, "\nbokbok: interrupted\n")


# ---- users ----


def test_names_are_text_in_utf_8_whatever_the_locale(
    run: Run, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "users.keys"
    wrong = "the name '\\udcff' is not text in UTF-8"
    ran = run("users", "add", path, "\udcff", key)
    assert (ran.code, ran.error) == (2, wrong)
    ran = run("list", "--user=\udcff", f"--key-file={key}", "localhost:1")
    assert (ran.code, ran.error) == (2, wrong)
    monkeypatch.setenv("BOKBOK_USER", "\udcff")
    ran = run("list", f"--key-file={key}", "localhost:1")
    assert (ran.code, ran.error) == (2, wrong)
    monkeypatch.setattr(os, "fsencode", lambda text: str(text).encode("ascii", "surrogateescape"))
    assert run("users", "add", path, "\udcc3\udcbc", key).code == 0
    assert list(Keyring.load(path)) == ["ü"]
    assert run("users", "remove", path, "\udcc3\udcbc").code == 0


def test_users_are_added_listed_and_removed(run: Run, tmp_path: Path, key: Path) -> None:
    path, loaded = tmp_path / "users.keys", Key.load(key)
    ran = run("users", "add", path, "ann", key)
    assert (ran.code, ran.out, ran.error) == (0, f"{loaded.fingerprint}\n", f"made {path}")
    other = Key.generate()
    assert run("users", "add", path, "ann", "-", stdin=other.to_text().encode()).err == ""
    assert Keyring.load(path) == {"ann": (loaded, other)}
    assert run("users", "list", path).out == f"{loaded.fingerprint} ann\n{other.fingerprint} ann\n"
    assert run("users", "list", "--json", path).json == [
        {"user": "ann", "fingerprints": [loaded.fingerprint, other.fingerprint]}
    ]
    assert run("users", "remove", path, "ann", loaded.fingerprint).code == 0
    assert dict(Keyring.load(path)) == {"ann": (other,)}
    ran = run("users", "remove", path, "ann", loaded.fingerprint)
    assert (ran.code, ran.error) == (1, "user 'ann' has no such key")
    assert run("users", "remove", path, "ann").code == 0
    ran = run("users", "remove", path, "ann")
    assert (ran.code, ran.error) == (1, f"{path} has no user 'ann'")


def test_users_that_cannot_be(run: Run, tmp_path: Path, key: Path) -> None:
    ran = run("users", "list", tmp_path / "none")
    assert (ran.code, ran.error) == (1, f"{tmp_path}/none: No such file or directory")
    ran = run("users", "add", tmp_path / "users.keys", "", key)
    assert (ran.code, ran.err.splitlines()[-1]) == (
        1,
        "bokbok: a user name is 1 to 255 bytes of UTF-8, and not 0",
    )


# ---- secrets ----


@pytest.mark.parametrize(
    "args",
    [
        ["request", "--key", "SECRET", "x.sock", "a"],
        ["request", "--key=SECRET", "x.sock", "a"],
        ["request", "--key-file", "SECRET", "x.sock", "a"],
        ["request", "x.sock", "--", "SECRET"],
        ["key", "check", "SECRET"],
        ["users", "add", "users.keys", "ann", "SECRET"],
        ["key", "from-passphrase", "--passphrase", "SECRET", "ann", "a.key"],
        ["key", "from-passphrase", "--password=SECRET", "ann", "a.key"],
    ],
)
def test_a_secret_in_the_command_line_is_refused_with_the_reason(run: Run, args: list[str]) -> None:
    secret = Key.generate().to_text()
    ran = run(*[each.replace("SECRET", secret) for each in args])
    assert (ran.code, ran.out) == (2, "")
    assert ran.error.startswith(WHY_NOT)
    assert secret not in ran.err


def test_the_reason_is_an_object_for_programs(run: Run) -> None:
    ran = run("request", "--json", "--key", "x")
    assert json.loads(ran.err)["exit"] == 2
    assert run("request", "./none.sock", "--", "--key").code == 3  # that is data
