"""Files of keys, and changes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bokbok_trio import Key
from bokbok_trio._keys import MAX_KEYS

A, B, C = (Key(bytes([n]) * 32) for n in (1, 2, 3))


KEYS = [Key(bytes([n]) * 32) for n in range(MAX_KEYS + 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "users.keys"


def write(path: Path, text: str) -> None:
    """Change a file in place, as some editors do."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)


def make_unreadable(path: Path) -> None:
    path.chmod(0o640)


def break_line(path: Path) -> None:
    write(path, f"alice {A.to_text()}\nbob {B.to_text()[:-1]}\n")


def cut_short(path: Path) -> None:
    write(path, f"alice {A.to_text()[:-9]}")
