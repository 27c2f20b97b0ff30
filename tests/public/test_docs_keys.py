"""Runs the code of docs/keys.rst as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bokbok_trio import Key, Keyring

TEXT = (Path(__file__).parents[2] / "docs" / "keys.rst").read_text()
PROGRAMS = {
    match[1]: re.sub(r"(?m)^    ", "", match[0])
    for match in re.finditer(r"(?m)^    # (\w+\.py)\n(?:(?:    .*)?\n)+", TEXT)
}


def block_after(words: str) -> str:
    """Return the literal block after some words."""
    match = re.search(re.escape(words) + r"[^:]*::\n\n((?:    .*\n)+)", TEXT)
    assert match
    return re.sub(r"(?m)^    ", "", match[1])


def test_the_key_and_its_fingerprint() -> None:
    key = Key.from_text(block_after("Its text form has 70 characters"))
    assert key.raw == bytes(range(32))
    assert f"``{key.fingerprint}``" in TEXT


def test_the_expression_for_scanners_finds_the_keys() -> None:
    expression = block_after("by this regular expression").strip()
    found = re.findall(expression, TEXT)
    assert len(found) == 5
    assert len({Key.from_text(text) for text in found}) == 4
    assert re.findall(expression, f"KEY={found[0].upper()};", re.IGNORECASE)


def test_the_file_of_users(tmp_path: Path) -> None:
    path = tmp_path / "users.keys"
    path.write_text(block_after("a mapping that servers take as ``user_key``"))
    path.chmod(0o600)
    users = {user: len(keys) for user, keys in Keyring.load(path).items()}
    assert users == {"alice": 1, "bob": 2, "#1 of the machines": 1}


@pytest.mark.parametrize(("name", "printed"), [("files.py", ""), ("replace.py", "1 key is left\n")])
def test_the_programs_run(name: str, printed: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAMS[name]]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, printed, "")
