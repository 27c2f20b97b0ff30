"""Every file and method that docs/architecture.rst names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.rst").read_text()
SOURCES = {path: path.read_text() for path in (ROOT / "bokbok_trio").rglob("*.py")}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"``([\w./-]+\.(?:py|rst)|[\w./-]+/)``", TEXT))))
def test_each_file_is_there(name: str) -> None:
    assert any((folder / name).exists() for folder in (ROOT, ROOT / "bokbok_trio"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"``([A-Z]\w+\.\w+)``", TEXT))))
def test_each_method_is_there(name: str) -> None:
    owner, method = name.split(".")
    texts = [text for text in SOURCES.values() if re.search(rf"^class {owner}\b", text, re.MULTILINE)]
    assert any(re.search(rf"^ +(?:async )?def {method}\(", text, re.MULTILINE) for text in texts)
