"""Have every type checker look at right and wrong code, and compare what each refuses with what it must.

`right.py` must be refused nowhere, and `wrong.py` in each line with ``# wrong`` and in no other. Where one
checker does not see what is wrong, the line says which.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

CHECKERS = {
    "mypy": ["mypy", "--strict", "--config-file=", "--no-error-summary", "right.py", "wrong.py"],
    "pyright": ["pyright", "--project", "."],
    "ty": ["ty", "check", "--output-format=concise", "--python", sys.executable, "."],
    "pyrefly": [
        *("pyrefly", "check", "--preset=default", "--output-format=min-text", "--search-path=."),
        *("--python-interpreter-path", sys.executable, "files.py", "right.py", "wrong.py"),
    ],
}


def find_expected(checker: str) -> set[int]:
    """The lines of the wrong code that a checker must refuse."""
    lines = enumerate((FOLDER / "wrong.py").read_text().splitlines(), 1)
    return {number for number, line in lines if "# wrong" in line and f"not seen by {checker}" not in line}


def find_refused(checker: str) -> dict[str, set[int]]:
    """What a checker says of each file: the lines with errors."""
    run = subprocess.run(CHECKERS[checker], cwd=FOLDER, capture_output=True, text=True, check=False)
    refused: dict[str, set[int]] = {"right.py": set(), "wrong.py": set(), "files.py": set()}
    for line in run.stdout.splitlines():
        found = re.search(r"(right|wrong|files)\.py:(\d+)", line)
        if found and ("error" in line.lower() or "warning[" in line):
            refused[f"{found[1]}.py"].add(int(found[2]))
    return refused


def main() -> int:
    """Say what is not as it must be; return how many checkers that are."""
    failed = 0
    for checker in CHECKERS:
        expected = find_expected(checker)
        refused = find_refused(checker)
        wrong = refused.pop("wrong.py")
        complaints = [
            f"refuses line {line} of {name}" for name, lines in refused.items() for line in sorted(lines)
        ]
        complaints += [f"does not refuse line {line} of wrong.py" for line in sorted(expected - wrong)]
        complaints += [f"refuses line {line} of wrong.py" for line in sorted(wrong - expected)]
        print(f"{checker}: {'; '.join(complaints) or f'all right, {len(expected)} wrong lines refused'}")
        failed += bool(complaints)
    return failed


if __name__ == "__main__":
    sys.exit(main())
